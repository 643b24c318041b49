//! Taint bit by bit, for the instructions with which compilers keep flags in registers that hold something else besides:
//! `LOP3` clears, sets and tests one bit; `PRMT` replaces half a register.

use super::operand::{File, Operand, Register};
use super::parse::Instruction;
use super::registers::{RegisterSet, bit};

/// The tainted bits of the result, if the instruction works on bits. `clean` are the bits of a tainted register that are
/// not.
pub fn of_result(instruction: &Instruction, tainted: &RegisterSet, clean: impl Fn(u16) -> u32) -> Option<u32> {
    let value = |operand: &Operand| source(operand, tainted, &clean);
    let values: Vec<&Operand> = instruction.operands.iter().filter(|operand| !operand.is_predicate()).collect();
    match (instruction.opcode.name, values.as_slice()) {
        ("LOP3" | "ULOP3", [_, a, b, c, Operand::Integer(table)]) => {
            Some(logic([value(a), value(b), value(c)], *table))
        }
        ("PRMT" | "UPRMT", [_, a, Operand::Integer(selector), b]) => Some(permute(value(a), value(b), *selector)),
        ("MOV" | "UMOV", [_, a]) if instruction.modifiers.is_empty() => Some(value(a).tainted),
        _ => None,
    }
}

/// The bits that a `LOP3` on one register can change there: those that a secret guard shows in.
pub fn changed(instruction: &Instruction) -> Option<u32> {
    let [result, a, b, c, Operand::Integer(table)] = instruction.operands.get(..5)? else { return None };
    if !matches!(instruction.opcode.name, "LOP3" | "ULOP3") || result.is_predicate() {
        return None;
    }
    let own = [a, b, c]
        .iter()
        .position(|operand| operand.register().map(|r| r.index) == result.register().map(|r| r.index))?;
    let sources = [a, b, c].map(|operand| source(operand, &RegisterSet::default(), &|_| 0));
    let changes = |row: &i64| row >> (2 - own) & 1 != table >> row & 1;
    Some((0..8).filter(changes).fold(0, |all, row| all | possible(&sources, row, None)))
}

/// What is known of a source: bits that may depend on a secret, and its value if that is a constant.
#[derive(Clone, Copy)]
struct Source {
    tainted: u32,
    constant: Option<u32>,
}

fn source(operand: &Operand, tainted: &RegisterSet, clean: &impl Fn(u16) -> u32) -> Source {
    match operand {
        Operand::Integer(value) => Source { tainted: 0, constant: Some(*value as u32) },
        Operand::Register(Register { index: None, modified: false, .. }) => Source { tainted: 0, constant: Some(0) },
        Operand::Register(register) => {
            let known = [File::General, File::Uniform].contains(&register.file);
            let bit = register.index.filter(|_| known).map(|index| bit(register.file, index));
            let mask = match bit {
                Some(bit) if !tainted.contains(bit) => 0,
                Some(bit) if !register.modified => !clean(bit),
                _ => u32::MAX,
            };
            Source { tainted: mask, constant: None }
        }
        // Constants of the launch; a secret in their index is a finding of its own.
        _ => Source { tainted: 0, constant: None },
    }
}

/// The bits in which the inputs, but for one, may be those of a row of the table.
fn possible(sources: &[Source; 3], row: i64, but: Option<usize>) -> u32 {
    let bits = |index: usize| match (sources[index].constant, row >> (2 - index) & 1 == 1) {
        (Some(value), true) => value,
        (Some(value), false) => !value,
        (None, _) => u32::MAX,
    };
    (0..3).filter(|&index| Some(index) != but).fold(u32::MAX, |all, index| all & bits(index))
}

/// A result bit is tainted if a tainted input can change it, whatever the public inputs are.
fn logic(sources: [Source; 3], table: i64) -> u32 {
    let mut result = 0;
    for (index, source) in sources.iter().enumerate() {
        let sensitive = |row: &i64| table >> row & 1 != table >> (row ^ (4 >> index)) & 1;
        let rows = (0..8).filter(sensitive).fold(0, |all, row| all | possible(&sources, row, Some(index)));
        result |= source.tainted & rows;
    }
    result
}

/// Each nibble of the selector picks one of the eight bytes of both sources; its top bit spreads that byte's sign.
fn permute(a: Source, b: Source, selector: i64) -> u32 {
    let bytes = u64::from(b.tainted) << 32 | u64::from(a.tainted);
    (0..4).fold(0, |result, position| {
        let pick = selector >> (4 * position) & 0xf;
        let byte = (bytes >> (8 * (pick & 7)) & 0xff) as u32;
        let byte = if pick >= 8 && byte != 0 { 0xff } else { byte };
        result | byte << (8 * position)
    })
}

#[cfg(test)]
mod tests {
    use super::super::parse::parse;
    use super::*;

    fn instruction(line: &str) -> Instruction {
        let text = format!(".section .text.k,\"ax\"\n/*0000*/ {line} ;\n");
        parse(&text).unwrap_or_else(|error| panic!("{error}")).remove(0).instructions.remove(0)
    }

    fn tainted_bits(line: &str, clean: u32) -> Option<u32> {
        let mut tainted = RegisterSet::default();
        tainted.insert(4);
        of_result(&instruction(line), &tainted, |_| clean)
    }

    #[test]
    fn flags_in_a_register_that_holds_a_secret() {
        assert_eq!(tainted_bits("LOP3.LUT R4, R4, 0xffffffbf, RZ, 0xc0, !PT", 0), Some(!0x40));
        assert_eq!(tainted_bits("LOP3.LUT R4, R4, 0x40, RZ, 0xfc, !PT", 0x3), Some(!0x43));
        assert_eq!(tainted_bits("LOP3.LUT P6, RZ, R4, 0x40, RZ, 0xc0, !PT", 0x40), Some(0));
        assert_eq!(tainted_bits("LOP3.LUT P6, RZ, R4, 0x41, RZ, 0xc0, !PT", 0x40), Some(1));
        assert_eq!(tainted_bits("LOP3.LUT R5, R4, R6, R7, 0x96, !PT", 0), Some(u32::MAX));
        assert_eq!(tainted_bits("PRMT R4, RZ, 0x7610, R4", 0), Some(0xffff_0000));
        assert_eq!(tainted_bits("PRMT R5, R4, 0x9991, RZ", !0x100), Some(0xffff_ff01));
        assert_eq!(tainted_bits("IADD3 R5, R4, R6, RZ", 0), None);
    }

    #[test]
    fn what_a_guarded_flag_changes() {
        let changed = |line| changed(&instruction(line));
        assert_eq!(changed("@P0 LOP3.LUT R4, R4, 0x80, RZ, 0xfc, !PT"), Some(0x80));
        assert_eq!(changed("@P0 LOP3.LUT R4, R4, 0xffffff7f, RZ, 0xc0, !PT"), Some(0x80));
        assert_eq!(changed("@P0 LOP3.LUT R4, R5, 0x80, RZ, 0xfc, !PT"), None);
    }
}
