//! From the disassembler's listing to instructions. Every line must be understood; one that is not is an error.

use std::collections::HashMap;

use super::opcodes::{self, Opcode};
use super::operand::{File, Operand};

/// One instruction.
#[derive(Clone, Debug)]
pub struct Instruction {
    /// Byte offset in its section.
    pub address: u32,
    /// The predicate it is executed under, if it is not always.
    pub guard: Option<Guard>,
    /// The row of the opcode table.
    pub opcode: &'static Opcode,
    /// What follows the opcode's name, between dots.
    pub modifiers: Vec<String>,
    /// Its operands.
    pub operands: Vec<Operand>,
    /// Where it may jump to: indices into the section's instructions.
    pub targets: Vec<usize>,
    /// As printed, for witnesses.
    pub text: String,
}

/// `@P0`, `@!UP1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guard {
    /// Which file.
    pub file: File,
    /// Which one; `None` is the constant one, so that the instruction is never executed.
    pub index: Option<u16>,
    /// `@!P0`.
    pub negated: bool,
}

impl Instruction {
    /// Whether it has this modifier.
    pub fn has(&self, modifier: &str) -> bool {
        self.modifiers.iter().any(|m| m == modifier)
    }

    /// `@!PT`: it is there for timing alone.
    pub fn never(&self) -> bool {
        self.guard.is_some_and(|guard| guard.index.is_none())
    }
}

/// The code of one section: a kernel, and the functions it calls.
#[derive(Clone, Debug)]
pub struct Section {
    /// The kernel's name.
    pub name: String,
    /// Its instructions, without gaps.
    pub instructions: Vec<Instruction>,
}

/// A line that is not understood, or a listing that is not whole.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}: {text}")]
pub struct ParseError {
    /// From 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: &'static str,
    /// The line.
    pub text: String,
}

/// A line of the listing.
enum Line<'a> {
    Nothing,
    Section(&'a str),
    Label(&'a str),
    Instruction { address: &'a str, body: &'a str },
}

/// An instruction whose labels are not resolved yet.
struct Draft {
    line: usize,
    instruction: Instruction,
    labels: Vec<String>,
}

/// Parses a whole listing.
///
/// # Errors
/// The first line that is not understood.
pub fn parse(listing: &str) -> Result<Vec<Section>, ParseError> {
    let mut sections: Vec<(String, Vec<Draft>)> = Vec::new();
    let mut labels: HashMap<&str, (usize, usize)> = HashMap::new();
    for (index, text) in listing.lines().enumerate() {
        let fail = |reason| ParseError { line: index + 1, reason, text: text.trim().to_owned() };
        match classify(text).ok_or_else(|| fail("not understood"))? {
            Line::Nothing => {}
            Line::Section(name) => sections.push((name.to_owned(), Vec::new())),
            Line::Label(name) => {
                let count = sections.len();
                let section = sections.last().ok_or_else(|| fail("a label outside any section"))?;
                if labels.insert(name, (count - 1, section.1.len())).is_some() {
                    return Err(fail("the label is there twice"));
                }
            }
            Line::Instruction { address, body } => {
                let (_, drafts) = sections.last_mut().ok_or_else(|| fail("an instruction outside any section"))?;
                let address = u32::from_str_radix(address, 16).map_err(|_| fail("the address is not a number"))?;
                if address as usize != drafts.len() * opcodes::SIZE {
                    return Err(fail("the address does not follow the one before"));
                }
                let mut draft = instruction(address, body).map_err(fail)?;
                draft.line = index + 1;
                drafts.push(draft);
            }
        }
    }
    let resolve = |(index, (name, drafts)): (usize, (String, Vec<Draft>))| {
        let len = drafts.len();
        let instructions = drafts.into_iter().map(|draft| resolved(draft, index, len, &labels));
        Ok(Section { name, instructions: instructions.collect::<Result<_, _>>()? })
    };
    sections.into_iter().enumerate().map(resolve).collect()
}

fn resolved(
    draft: Draft,
    section: usize,
    len: usize,
    labels: &HashMap<&str, (usize, usize)>,
) -> Result<Instruction, ParseError> {
    let Draft { line, mut instruction, labels: names } = draft;
    for name in names {
        match labels.get(name.as_str()) {
            Some(&(home, index)) if home == section && index < len => instruction.targets.push(index),
            _ => return Err(ParseError { line, reason: "unresolved target", text: instruction.text }),
        }
    }
    if instruction.opcode.needs_target() && instruction.targets.is_empty() {
        return Err(ParseError { line, reason: "unresolved target", text: instruction.text });
    }
    Ok(instruction)
}

/// Directives that say nothing about what the code does.
const DIRECTIVES: [&str; 15] = [
    ".headerflags",
    ".elftype",
    ".target",
    ".sectionflags",
    ".sectioninfo",
    ".align",
    ".global",
    ".type",
    ".size",
    ".other",
    ".weak",
    ".local",
    ".sectionentsize",
    ".file",
    ".virtual",
];

fn classify(line: &str) -> Option<Line<'_>> {
    let text = line.trim();
    if text.is_empty() || text.starts_with("//") {
        return Some(Line::Nothing);
    }
    if let Some(rest) = text.strip_prefix("/*") {
        let (address, body) = rest.split_once("*/")?;
        return Some(Line::Instruction { address, body: body.trim() });
    }
    if let Some(rest) = text.strip_prefix(".section").filter(|rest| rest.starts_with(char::is_whitespace)) {
        let name = rest.split(',').next()?.trim();
        return name.strip_prefix(".text.").map(Line::Section);
    }
    if let Some(name) = text.strip_suffix(':') {
        let plain = !name.is_empty() && !name.contains(|c: char| c.is_whitespace() || c == ',');
        // The section's own label stands at its start, as the kernel's does.
        return plain.then(|| if name.starts_with(".text.") { Line::Nothing } else { Line::Label(name) });
    }
    let word = text.split_whitespace().next()?;
    DIRECTIVES.contains(&word).then_some(Line::Nothing)
}

fn instruction(address: u32, body: &str) -> Result<Draft, &'static str> {
    let body = body.trim_end().trim_end_matches(';').trim_end();
    let (body, mut labels) = branch_targets(body)?;
    let (guard, rest) = guard(body)?;
    let (name, operands) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let mut parts = name.split('.');
    let opcode = opcodes::find(parts.next().unwrap_or_default()).ok_or("unknown opcode")?;
    let modifiers: Vec<String> = parts.map(str::to_owned).collect();
    if !modifiers.iter().all(|modifier| opcodes::is_modifier(modifier)) {
        return Err("unknown modifier");
    }
    let mut parsed = Vec::new();
    for text in split_operands(operands) {
        let operand = Operand::parse(text).ok_or("unknown operand")?;
        match operand {
            // RET names the function it returns to, which is not where it goes.
            Operand::Label(label) if !opcode.returns() => labels.push(label),
            operand => parsed.push(operand),
        }
    }
    let instruction = Instruction {
        address,
        guard,
        opcode,
        modifiers,
        operands: parsed,
        targets: Vec::new(),
        text: body.split_whitespace().collect::<Vec<_>>().join(" "),
    };
    Ok(Draft { line: 0, instruction, labels })
}

/// Splits off the disassembler's note: `(*"BRANCH_TARGETS a,b"*)` says where an indirect branch may go.
fn branch_targets(body: &str) -> Result<(&str, Vec<String>), &'static str> {
    let Some((code, note)) = body.split_once("(*\"") else { return Ok((body, Vec::new())) };
    let list = note.strip_suffix("\"*)").ok_or("a note that does not end")?;
    if list == "SpillRefill" {
        return Ok((code.trim_end(), Vec::new()));
    }
    let list = list.strip_prefix("BRANCH_TARGETS").ok_or("an unknown note")?;
    Ok((code.trim_end(), list.split(',').map(|label| label.trim().to_owned()).collect()))
}

fn guard(body: &str) -> Result<(Option<Guard>, &str), &'static str> {
    let Some(rest) = body.strip_prefix('@') else { return Ok((None, body)) };
    let (name, rest) = rest.split_once(char::is_whitespace).ok_or("a guard without an instruction")?;
    let register = Operand::parse(name).and_then(|operand| operand.register()).ok_or("unknown guard")?;
    if !matches!(register.file, File::Predicate | File::UniformPredicate) {
        return Err("unknown guard");
    }
    let guard = Guard { file: register.file, index: register.index, negated: register.negated };
    let always = register.index.is_none() && !register.negated;
    Ok((if always { None } else { Some(guard) }, rest.trim_start()))
}

/// At commas, and at the blank before the displacement of an indirect branch (`BRX R4 -0xa9e0`).
fn split_operands(text: &str) -> impl Iterator<Item = &str> {
    text.split([',', ' ', '\t']).filter(|part| !part.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(lines: &str) -> String {
        format!("\t.section\t.text.k,\"ax\",@progbits\nk:\n.text.k:\n{lines}")
    }

    #[test]
    fn a_small_kernel() {
        let text = listing(
            "        /*0000*/                   MOV R1, 0x4 ;\n.L_x_0:\n\
             /*0010*/  @!P0 BRA `(.L_x_0) ;\n/*0020*/ @!PT LDS RZ, [RZ] ;\n/*0030*/ EXIT ;\n",
        );
        let sections = parse(&text).expect("a listing");
        let code = &sections[0].instructions;
        assert_eq!((sections[0].name.as_str(), code.len()), ("k", 4));
        assert_eq!(code[1].targets, [1]);
        assert!(code[2].never() && !code[1].never());
    }

    #[test]
    fn what_is_not_understood_is_an_error_with_its_line() {
        let cases = [
            ("/*0000*/ FROB R1, R2 ;", "unknown opcode"),
            ("/*0000*/ MOV.FROB R1, R2 ;", "unknown modifier"),
            ("/*0000*/ MOV R1, %2 ;", "unknown operand"),
            ("/*0000*/ BRA `(.L_x_9) ;", "unresolved target"),
            ("/*0000*/ BRX R4 -0x10 ;", "unresolved target"),
            ("/*0010*/ EXIT ;", "the address does not follow the one before"),
            ("/*0000*/ @R4 EXIT ;", "unknown guard"),
            ("something else", "not understood"),
        ];
        for (line, reason) in cases {
            let error = parse(&listing(line)).expect_err(line);
            assert_eq!((error.line, error.reason), (4, reason), "{line}");
        }
    }
}
