//! What one instruction reads, writes and exposes, as sets of registers.

use super::opcodes::{Class, Results, Space, Width, count, wgmma_shape};
use super::operand::{Bracket, File, Operand, Register};
use super::parse::Instruction;
use super::registers::{RegisterSet, bit};

/// The registers of an instruction, by the part they play.
#[derive(Clone, Debug, Default)]
pub struct Effect {
    /// Written.
    pub results: RegisterSet,
    /// Read as values.
    pub data: RegisterSet,
    /// Read as addresses, descriptors or lanes.
    pub address: RegisterSet,
    /// Read to decide what is executed next.
    pub steer: RegisterSet,
    /// Predicates that decide whether memory, a barrier or a tensor core is touched.
    pub mask: RegisterSet,
    /// The predicate it is executed under.
    pub guard: RegisterSet,
}

impl Effect {
    /// The effect of an instruction.
    pub fn of(instruction: &Instruction) -> Self {
        let mut effect = Self::default();
        if instruction.never() {
            return effect;
        }
        if let Some(guard) = instruction.guard
            && let Some(index) = guard.index
        {
            effect.guard.insert(bit(guard.file, index));
        }
        let results = result_count(instruction);
        let (written, read) = instruction.operands.split_at(results);
        for operand in written {
            effect.write(instruction, operand);
        }
        let mut position = 0;
        for operand in read {
            effect.read(instruction, operand, position);
            position += usize::from(!operand.is_predicate());
        }
        effect
    }

    /// Everything it reads but its guard.
    pub fn operands(&self) -> RegisterSet {
        self.data.or(&self.address).or(&self.steer).or(&self.mask)
    }

    /// Everything it reads.
    pub fn uses(&self) -> RegisterSet {
        self.operands().or(&self.guard)
    }

    fn write(&mut self, instruction: &Instruction, operand: &Operand) {
        match operand {
            Operand::Register(register) => {
                let width = if operand.is_predicate() { 1 } else { result_width(instruction) };
                self.results.add(*register, width);
            }
            Operand::PredicateFile(file) => add_file(&mut self.results, *file, mask_of(instruction)),
            _ => {}
        }
    }

    fn read(&mut self, instruction: &Instruction, operand: &Operand, position: usize) {
        match operand {
            Operand::Register(register) => {
                let width = if operand.is_predicate() { 1 } else { source_width(instruction, position) };
                let width = if register.pair { width.max(2) } else { width };
                self.role(instruction, operand.is_predicate(), position).add(*register, width);
            }
            Operand::PredicateFile(file) => add_file(&mut self.data, *file, mask_of(instruction)),
            Operand::Constant { registers, .. } => {
                registers.iter().for_each(|term| self.address.add(term.register, 1));
            }
            Operand::Address { space, brackets } => {
                for (index, bracket) in brackets.iter().enumerate() {
                    let width = address_width(instruction, space, position, index, brackets);
                    add_bracket(&mut self.address, bracket, unread(instruction, space, position), width);
                }
            }
            Operand::Integer(_) | Operand::Float | Operand::Special(_) | Operand::Label(_) => {}
        }
    }

    /// What a register that is read on its own is read as.
    fn role(&mut self, instruction: &Instruction, predicate: bool, position: usize) -> &mut RegisterSet {
        let opcode = instruction.opcode;
        match opcode.class {
            Class::Alu | Class::SlowAlu | Class::Ambient | Class::Vote | Class::Nop => &mut self.data,
            _ if opcode.is_control() => &mut self.steer,
            _ if predicate => &mut self.mask,
            Class::Store(_) | Class::Atomic(_) | Class::Load(_) | Class::Mma | Class::MmaAsync => &mut self.data,
            Class::Shuffle if position == 0 => &mut self.data,
            _ => &mut self.address,
        }
    }
}

fn add_file(set: &mut RegisterSet, file: File, mask: u16) {
    (0..8).filter(|index| mask >> index & 1 == 1).for_each(|index| set.insert(bit(file, index)));
}

/// The predicates that `P2R` and its like move: an immediate operand, all where there is none.
fn mask_of(instruction: &Instruction) -> u16 {
    let immediate = instruction.operands.iter().rev().find_map(|operand| match operand {
        Operand::Integer(mask) => Some(*mask as u16),
        _ => None,
    });
    immediate.unwrap_or(0xff) & 0xff
}

/// Adds what a bracket reads: `width` registers from each of its own on, but for the first `unread`.
fn add_bracket(set: &mut RegisterSet, bracket: &Bracket, unread: u16, width: u16) {
    for term in &bracket.terms {
        let pair = if term.register.pair { 2 } else { 1 };
        let register = Register { index: term.register.index.map(|index| index + unread), ..term.register };
        set.add(register, width.max(pair) - unread);
    }
}

/// Registers of a bracket that are named and not read. A warpgroup product names the descriptors of A and of B; with A in
/// registers, before them, ptxas keeps other things where A's would be.
fn unread(instruction: &Instruction, space: &str, position: usize) -> u16 {
    if space == "gdesc" && instruction.opcode.width == Width::Wgmma && position > 0 { 2 } else { 0 }
}

/// How many of the first operands are results.
fn result_count(instruction: &Instruction) -> usize {
    let operands = &instruction.operands;
    let predicates = |from: usize| operands[from..].iter().take_while(|operand| operand.is_predicate()).count();
    match instruction.opcode.results {
        Results::None => 0,
        Results::Predicates => predicates(0).min(2),
        Results::AllButLast => operands.len().saturating_sub(1),
        Results::BeforeAddress => {
            operands.iter().take_while(|operand| !matches!(operand, Operand::Address { .. })).count()
        }
        Results::Register => {
            let leading = predicates(0);
            match operands.get(leading) {
                Some(Operand::Register(_) | Operand::PredicateFile(_)) => leading + 1 + predicates(leading + 1),
                _ => leading,
            }
        }
    }
}

fn result_width(instruction: &Instruction) -> u16 {
    let has = |modifier| instruction.has(modifier);
    match instruction.opcode.width {
        Width::Single if has("64") => 2,
        Width::Single if instruction.opcode.name.ends_with("MNMX") && (has("U64") || has("S64")) => 2,
        Width::Single | Width::Tma => 1,
        Width::Double => 2,
        Width::WideMultiply => 1 + u16::from(has("WIDE")),
        Width::Memory if instruction.opcode.name == "CS2R" => 2 - u16::from(has("32")),
        Width::Memory => memory_width(instruction),
        Width::Matrices => matrices(instruction),
        Width::Convert => convert_widths(instruction).0,
        Width::Mma => mma_widths(instruction)[2],
        Width::Wgmma => wgmma_width(instruction),
        Width::Tensor => tensor_width(instruction),
    }
}

fn source_width(instruction: &Instruction, position: usize) -> u16 {
    let has = |modifier| instruction.has(modifier);
    let funnel = matches!(instruction.opcode.name, "SHF" | "USHF");
    match instruction.opcode.width {
        Width::Single if has("64") || (!funnel && (has("U64") || has("S64"))) => 2,
        Width::Single => 1,
        Width::Double => 2,
        Width::WideMultiply => 1 + u16::from(position == 2 && (has("WIDE") || has("HI"))),
        Width::Memory => memory_width(instruction),
        Width::Matrices => matrices(instruction),
        Width::Convert => convert_widths(instruction).1,
        Width::Mma => mma_widths(instruction)[position.min(2)],
        Width::Wgmma if position == 0 => 4,
        Width::Wgmma => wgmma_width(instruction),
        Width::Tensor => tensor_width(instruction),
        Width::Tma => 1,
    }
}

fn memory_width(instruction: &Instruction) -> u16 {
    [("128", 4), ("96", 3), ("64", 2)].into_iter().find(|(bits, _)| instruction.has(bits)).map_or(1, |(_, width)| width)
}

fn matrices(instruction: &Instruction) -> u16 {
    [("4", 4), ("2", 2)].into_iter().find(|(n, _)| instruction.has(n)).map_or(1, |(_, width)| width)
}

/// Of the result and the source of a conversion.
fn convert_widths(instruction: &Instruction) -> (u16, u16) {
    let wide = |types: &[&str]| 1 + u16::from(types.iter().any(|t| instruction.has(t)));
    match instruction.opcode.name {
        "F2F" => {
            let types: Vec<_> = instruction.modifiers.iter().filter(|m| m.starts_with(['F', 'B'])).collect();
            let is_wide = |index: usize| 1 + u16::from(types.get(index).is_some_and(|t| *t == "F64"));
            (is_wide(0), is_wide(1))
        }
        "F2I" | "UF2I" => (wide(&["U64", "S64"]), wide(&["F64"])),
        _ => (wide(&["F64"]), wide(&["U64", "S64"])),
    }
}

/// Of A, B, and C or the result.
fn mma_widths(instruction: &Instruction) -> [u16; 3] {
    let half = instruction.opcode.name != "IMMA" && !instruction.has("F32") && instruction.has("F16");
    let (a, b) = if instruction.has("1688") { (2, 1) } else { (4, 2) };
    [a, b, if half { 2 } else { 4 }]
}

/// Of the accumulator of a warpgroup product: 64 rows over 128 threads.
fn wgmma_width(instruction: &Instruction) -> u16 {
    let columns = instruction.modifiers.iter().find_map(|m| wgmma_shape(m)).map_or(512, |[_, n, _]| n);
    let half = instruction.opcode.name != "IGMMA" && !instruction.has("F32") && instruction.has("F16");
    (columns / if half { 4 } else { 2 }) as u16
}

fn tensor_width(instruction: &Instruction) -> u16 {
    let repeat = instruction.modifiers.iter().find_map(|m| count(m)).unwrap_or(1);
    let each = if instruction.has("16dp256bit") {
        4
    } else if instruction.has("16dp128bit") {
        2
    } else {
        1
    };
    (repeat * each) as u16
}

/// How many uniform registers a bracket spans where it does not say so itself.
fn address_width(instruction: &Instruction, space: &str, position: usize, index: usize, brackets: &[Bracket]) -> u16 {
    let uniform = brackets[index].terms.iter().any(|term| term.register.file == File::Uniform);
    match (space, instruction.opcode.width) {
        ("gdesc", Width::Wgmma) => 4,
        ("gdesc", _) => 2,
        ("desc", _) if index == 0 => 2,
        ("tmem" | "idesc", _) => 1,
        (_, Width::Tma) if position == 0 => 2 + dimensions(instruction),
        (_, Width::Tma) => 2,
        _ if uniform
            && matches!(instruction.opcode.class, Class::Load(Space::Global) | Class::Store(Space::Global)) =>
        {
            2
        }
        _ => 1,
    }
}

fn dimensions(instruction: &Instruction) -> u16 {
    (1..=5).find(|n| instruction.has(&format!("{n}D"))).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::parse::parse;
    use super::super::registers::name;
    use super::*;

    fn effect(line: &str) -> Effect {
        let text = format!(".section .text.k,\"ax\"\n/*0000*/ {line} ;\n");
        let sections = parse(&text).unwrap_or_else(|error| panic!("{error}"));
        Effect::of(&sections[0].instructions[0])
    }

    fn names(set: RegisterSet) -> String {
        set.iter().map(name).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn results_and_values() {
        let cases = [
            ("IADD3 R4, P0, PT, R5, R6, RZ", "R4 P0", "R5 R6"),
            ("IADD3.X R4, R5, UR6, RZ, P1, !PT", "R4", "R5 UR6 P1"),
            ("ISETP.GE.AND.EX P4, PT, R1, R2, PT, P3", "P4", "R1 R2 P3"),
            ("LOP3.LUT P0, RZ, R3, 0x1, RZ, 0xc0, !PT", "P0", "R3"),
            ("IMAD.WIDE.U32 R4, R6, R7, R8", "R4 R5", "R6 R7 R8 R9"),
            ("IMAD.HI.U32 R4, R6, R7, R8", "R4", "R6 R7 R8 R9"),
            ("IADD.64 R4, R6, UR8", "R4 R5", "R6 R7 UR8 UR9"),
            ("UIMNMX.U64 UPT, UPT, UR4, UR6, UR8, !UPT, !UPT", "UR4 UR5", "UR6 UR7 UR8 UR9"),
            ("FFMA2 R4, R6.F32x2.HI_LO, R8.F32x2.HI_LO, R10.F32x2.HI_LO", "R4 R5", "R6 R7 R8 R9 R10 R11"),
            ("HMMA.16816.F32.BF16 R4, R8, R12, R16", "R4 R5 R6 R7", "R8 R9 R10 R11 R12 R13 R16 R17 R18 R19"),
            ("F2F.F64.F32 R4, R6", "R4 R5", "R6"),
            ("I2F.U64 R4, R6", "R4", "R6 R7"),
            ("P2R R4, PR, RZ, 0x5", "R4", "P0 P2"),
            ("R2P PR, R4, 0x6", "P1 P2", "R4"),
            ("VOTEU.ANY UP3, P2", "UP3", "P2"),
            ("VOTE.ANY R0, PT, P1", "R0", "P1"),
            ("CS2R R4, SRZ", "R4 R5", ""),
            ("LDTM.x4 R4, tmem[UR7+0x10]", "R4 R5 R6 R7", ""),
        ];
        for (line, results, data) in cases {
            let effect = effect(line);
            assert_eq!((names(effect.results).as_str(), names(effect.data).as_str()), (results, data), "{line}");
        }
    }

    #[test]
    fn what_is_exposed() {
        let cases = [
            ("LDG.E.64 R4, desc[UR6][R2.64+0x8]", "R2 R3 UR6 UR7", "", ""),
            ("@P1 STS.128 [R4+UR5+0x10], R8", "R4 UR5", "", ""),
            ("LDGSTS.E.BYPASS.128 [R4+0x10], desc[UR6][R2.64], P5", "R2 R3 R4 UR6 UR7", "P5", ""),
            ("SHFL.IDX PT, R3, R2, R7, 0x1f", "R7", "", ""),
            ("UTMALDG.4D [UR8], [UR26]", "UR8 UR9 UR10 UR11 UR12 UR13 UR26 UR27", "", ""),
            ("LDC R4, c[0x2][R3]", "R3", "", ""),
            ("WARPSYNC R5", "", "", "R5"),
            ("HGMMA.64x8x16.F32 R24, R4, gdesc[UR8].tnspB, R24, UP0, gsb0", "UR10 UR11", "UP0", ""),
            ("HGMMA.64x8x16.F32 R24, gdesc[UR8].tnspB, R24, UP0, gsb0", "UR8 UR9 UR10 UR11", "UP0", ""),
        ];
        for (line, address, mask, steer) in cases {
            let effect = effect(line);
            let found = [effect.address, effect.mask, effect.steer].map(names);
            assert_eq!(found, [address, mask, steer], "{line}");
        }
        assert_eq!(names(effect("@P1 STS.128 [R4+UR5+0x10], R8").guard), "P1");
        assert!(effect("@!PT LDS RZ, [RZ]").uses().is_empty());
    }
}
