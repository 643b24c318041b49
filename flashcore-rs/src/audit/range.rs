//! Which values 32-bit registers can have: intervals over the thread index and constants. Only shared and local
//! addresses need them, so whatever these are not made of is "anything".

use super::effect::Effect;
use super::flow::Flow;
use super::opcodes::Class;
use super::operand::{Bracket, File, Operand, Register, Term};
use super::parse::{Instruction, Section};
use super::registers::{COUNT, bit};

/// What an interval is relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// Nothing: a number.
    Zero,
    /// The block's window of shared memory.
    Window,
    /// The block's rank in its cluster, which in bits 24 and up makes an address of the window.
    Rank,
    /// The stack pointer at entry.
    Stack,
}

/// No bound.
pub const INFINITE: i64 = i64::MAX / 4;
const WORD: i64 = 1 << 32;
/// Joins of a block before its bounds give way.
const PATIENCE: u32 = 4;

/// An interval, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// What it is relative to.
    pub base: Base,
    /// The lowest value.
    pub low: i64,
    /// The highest value.
    pub high: i64,
}

impl Range {
    /// Anything.
    pub const ANY: Self = Self { base: Base::Zero, low: -INFINITE, high: INFINITE };

    fn new(base: Base, low: i64, high: i64) -> Self {
        let low = if low < -WORD { -INFINITE } else { low };
        let high = if high > WORD { INFINITE } else { high };
        Self { base, low, high }
    }

    fn number(value: i64) -> Self {
        // A word of 2^31 or more is a negative number.
        let value = i64::from(value as u32 as i32);
        Self { base: Base::Zero, low: value, high: value }
    }

    fn between(low: i64, high: i64) -> Self {
        Self::new(Base::Zero, low, high)
    }

    fn constant(self) -> Option<i64> {
        (self.base == Base::Zero && self.low == self.high).then_some(self.low)
    }

    fn plus(self, other: Self) -> Self {
        let base = match (self.base, other.base) {
            (base, Base::Zero) | (Base::Zero, base) => base,
            _ => return Self::ANY,
        };
        Self::new(base, self.low.saturating_add(other.low), self.high.saturating_add(other.high))
    }

    fn times(self, other: Self) -> Self {
        let (one, factor) = if let Some(factor) = other.constant() {
            (self, factor)
        } else if let Some(factor) = self.constant() {
            (other, factor)
        } else if self.base == Base::Zero && other.base == Base::Zero && self.low >= 0 && other.low >= 0 {
            let product = |a: i64, b: i64| i128::from(a) * i128::from(b);
            let clamp = |p: i128| i64::try_from(p).unwrap_or(INFINITE).min(INFINITE);
            return Self::between(clamp(product(self.low, other.low)), clamp(product(self.high, other.high)));
        } else {
            return Self::ANY;
        };
        match (factor, one.base) {
            (0, _) => Self::number(0),
            (1, _) => one,
            (_, Base::Zero) => {
                let ends = [one.low, one.high].map(|end| end.saturating_mul(factor).clamp(-INFINITE, INFINITE));
                Self::between(ends[0].min(ends[1]), ends[0].max(ends[1]))
            }
            // The rank of the block, shifted to where the window's address has it.
            (0x100_0000, Base::Rank) => Self { base: Base::Window, low: 0, high: 0 },
            _ => Self::ANY,
        }
    }

    /// Either.
    fn join(self, other: Self) -> Self {
        if self.base != other.base {
            return Self::ANY;
        }
        Self { base: self.base, low: self.low.min(other.low), high: self.high.max(other.high) }
    }

    /// Either, giving up the bounds that moved.
    fn widen(self, other: Self) -> Self {
        let joined = self.join(other);
        Self {
            base: joined.base,
            low: if joined.low < self.low { -INFINITE } else { joined.low },
            high: if joined.high > self.high { INFINITE } else { joined.high },
        }
    }

    /// Bits that may be 1 and bits that must be.
    fn bits(self) -> (u32, u32) {
        match self.constant() {
            Some(value) => (value as u32, value as u32),
            None if self.base == Base::Zero && self.low >= 0 && self.high < WORD => {
                let bits = 64 - self.high.leading_zeros();
                (((1u64 << bits) - 1) as u32, 0)
            }
            None => (u32::MAX, 0),
        }
    }
}

/// The values at one point of the code: of the registers, then of the words of the stack.
type State = Vec<Range>;
/// Words of the stack that are followed, below the stack pointer at entry.
const SLOTS: i64 = 128;

/// For each instruction that has an address of shared or local memory, the values that address can have.
pub fn addresses(section: &Section, flow: &Flow, threads: u32) -> Vec<Option<Range>> {
    let entries = fixpoint(section, flow, threads);
    let mut found = vec![None; section.instructions.len()];
    for (block, entry) in entries.into_iter().enumerate() {
        let Some(mut state) = entry else { continue };
        for index in flow.blocks[block].clone() {
            let instruction = &section.instructions[index];
            found[index] = address_of(instruction, &state);
            step(instruction, &mut state, threads);
        }
    }
    found
}

fn fixpoint(section: &Section, flow: &Flow, threads: u32) -> Vec<Option<State>> {
    let mut visits = vec![0u32; flow.blocks.len()];
    flow.forward(
        vec![Range::ANY; COUNT + SLOTS as usize],
        |block, state| {
            for index in flow.blocks[block].clone() {
                step(&section.instructions[index], state, threads);
            }
        },
        |_, follower, state, entry| {
            visits[follower] += 1;
            merge(entry, state, visits[follower] > PATIENCE)
        },
    )
}

fn merge(entry: &mut Option<State>, state: &State, widen: bool) -> bool {
    let Some(entry) = entry else {
        *entry = Some(state.clone());
        return true;
    };
    let mut changed = false;
    for (old, new) in entry.iter_mut().zip(state) {
        let merged = if widen { old.widen(*new) } else { old.join(*new) };
        changed |= merged != *old;
        *old = merged;
    }
    changed
}

fn step(instruction: &Instruction, state: &mut State, threads: u32) {
    if instruction.opcode.name == "STL" {
        spill(instruction, state);
    }
    let effect = Effect::of(instruction);
    let value = evaluate(instruction, state, threads);
    let mut results = effect.results.iter().filter(|&bit| bit < 384);
    let (first, second) = (results.next(), results.next());
    for result in effect.results.iter() {
        // Pairs and wider are never addresses of shared memory.
        let value = if second.is_none() && first == Some(result) { value } else { Range::ANY };
        let slot = &mut state[usize::from(result)];
        *slot = if instruction.guard.is_some() { slot.join(value) } else { value };
    }
}

/// The sources of an instruction, without results and predicates.
fn sources<'a>(instruction: &'a Instruction) -> Vec<&'a Operand> {
    let values: Vec<&'a Operand> = instruction.operands.iter().filter(|operand| !operand.is_predicate()).collect();
    let skip = usize::from(matches!(values.first(), Some(Operand::Register(_))));
    values.into_iter().skip(skip).collect()
}

fn evaluate(instruction: &Instruction, state: &State, threads: u32) -> Range {
    let operands = sources(instruction);
    let has = |modifier| instruction.has(modifier);
    let value = |index: usize| operands.get(index).map_or(Range::ANY, |operand| read(operand, state));
    match instruction.opcode.name {
        "S2R" | "S2UR" | "CS2R" => ambient(operands.first().copied(), threads),
        "LDC" if is_stack_pointer(operands.first().copied()) => Range { base: Base::Stack, low: 0, high: 0 },
        "MOV" | "UMOV" | "R2UR" => value(0),
        "IMAD" | "UIMAD" if !has("HI") && !has("WIDE") && !has("X") => value(0).times(value(1)).plus(value(2)),
        "IADD3" | "UIADD3" if !has("X") && !has("64") => value(0).plus(value(1)).plus(value(2)),
        "VIADD" | "UVIADD" | "IADD" => value(0).plus(value(1)),
        "LEA" | "ULEA" if !has("HI") && !has("X") => shift_left(value(0), value(2)).plus(value(1)),
        "SHF" | "USHF" if has("L") && has("U32") && !has("HI") => shift_left(value(0), value(1)),
        "SHF" | "USHF" if has("R") && has("HI") && !has("U64") => shift_right(value(2), value(1), has("U32")),
        "LOP3" | "ULOP3" => logic([value(0), value(1), value(2)], operands.get(3).copied()),
        "SGXT" | "USGXT" if has("U32") => zero_extend(value(0), value(1)),
        "SEL" | "USEL" | "IMNMX" | "VIMNMX" | "UVIMNMX" | "UIMNMX" => value(0).join(value(1)),
        "LDL" if instruction.modifiers.is_empty() => {
            address_of(instruction, state).and_then(slot).map_or(Range::ANY, |slot| state[slot])
        }
        "LDS" if has("U8") => Range::between(0, 0xff),
        "LDS" if has("U16") => Range::between(0, 0xffff),
        _ => Range::ANY,
    }
}

/// The word of the stack at an address, if it is one that is followed.
fn slot(address: Range) -> Option<usize> {
    let words = -address.low / 4;
    let exact = address.base == Base::Stack && address.low == address.high && address.low % 4 == 0;
    (exact && (1..=SLOTS).contains(&words)).then(|| COUNT + words as usize - 1)
}

/// Follows a store to the stack: of one word to a known place, of several, or of something that may be anywhere.
fn spill(instruction: &Instruction, state: &mut State) {
    let words =
        [("128", 4), ("96", 3), ("64", 2)].into_iter().find(|(bits, _)| instruction.has(bits)).map_or(1, |w| w.1);
    let value = match instruction.operands.last() {
        Some(operand) if instruction.guard.is_none() && instruction.modifiers.is_empty() => read(operand, state),
        _ => Range::ANY,
    };
    match address_of(instruction, state).and_then(slot).filter(|slot| slot + 1 >= COUNT + words) {
        Some(slot) if words == 1 => state[slot] = value,
        // Higher addresses come first.
        Some(slot) => state[slot + 1 - words..=slot].fill(Range::ANY),
        None => state[COUNT..].fill(Range::ANY),
    }
}

fn shift_left(value: Range, shift: Range) -> Range {
    match shift.constant() {
        Some(shift @ 0..32) => value.times(Range::between(1 << shift, 1 << shift)),
        _ => Range::ANY,
    }
}

fn read(operand: &Operand, state: &State) -> Range {
    match operand {
        Operand::Register(register) if !register.modified => value_of(*register, state),
        Operand::Integer(value) => Range::number(*value),
        Operand::Constant { .. } if is_stack_pointer(Some(operand)) => Range { base: Base::Stack, low: 0, high: 0 },
        _ => Range::ANY,
    }
}

fn value_of(register: Register, state: &State) -> Range {
    match (register.file, register.index) {
        (_, None) => Range::number(0),
        (File::General | File::Uniform, Some(index)) => state[usize::from(bit(register.file, index))],
        _ => Range::ANY,
    }
}

/// Where the launch leaves the stack pointer: `c[0x0][0x28]` up to Hopper, `c[0x0][0x37c]` from Blackwell on.
fn is_stack_pointer(operand: Option<&Operand>) -> bool {
    matches!(operand, Some(Operand::Constant { place: Some((0, 0x28 | 0x37c)), .. }))
}

fn ambient(register: Option<&Operand>, threads: u32) -> Range {
    let Some(Operand::Special(name)) = register else { return Range::ANY };
    match name.as_str() {
        "SR_TID.X" => Range::between(0, i64::from(threads) - 1),
        "SR_LANEID" => Range::between(0, 31),
        "SRZ" => Range::number(0),
        "SR_CgaCtaId" => Range { base: Base::Rank, low: 0, high: 0 },
        _ => Range::ANY,
    }
}

fn shift_right(value: Range, shift: Range, unsigned: bool) -> Range {
    let Some(shift @ 0..32) = shift.constant() else { return Range::ANY };
    if value.base == Base::Zero && value.low >= 0 && value.high < WORD {
        return Range::between(value.low >> shift, value.high >> shift);
    }
    if unsigned {
        Range::between(0, (WORD - 1) >> shift)
    } else {
        Range::between(-(WORD >> 1 >> shift), WORD >> 1 >> shift)
    }
}

fn zero_extend(value: Range, bits: Range) -> Range {
    let Some(bits @ 0..32) = bits.constant() else { return Range::ANY };
    let most = (1 << bits) - 1;
    if value.base == Base::Zero && value.low >= 0 && value.high <= most { value } else { Range::between(0, most) }
}

/// Any function of three bits, given as a table of eight.
fn logic(values: [Range; 3], table: Option<&Operand>) -> Range {
    let Some(Operand::Integer(table)) = table else { return Range::ANY };
    let mut bits = values.map(Range::bits);
    let window = values.iter().position(|value| value.base != Base::Zero);
    if let Some(window) = window {
        bits[window] = (u32::MAX, 0);
    }
    let (mut ones, mut zeros, mut changed) = (0, 0, 0);
    for row in 0..8 {
        let input = |index: usize| row >> (2 - index) & 1 == 1;
        let select = |index: usize| if input(index) { bits[index].0 } else { !bits[index].1 };
        let possible = select(0) & select(1) & select(2);
        let out = table >> row & 1 == 1;
        *(if out { &mut ones } else { &mut zeros }) |= possible;
        if window.is_some_and(|window| input(window) != out) {
            changed |= possible;
        }
    }
    match window {
        None => Range::between(i64::from(ones & !zeros), i64::from(ones)),
        // An address with some low bits changed has moved by no more than they weigh.
        Some(window) if changed < 1 << 20 => {
            let by = Range::between(-i64::from(changed), i64::from(changed));
            values[window].plus(by)
        }
        Some(_) => Range::ANY,
    }
}

/// The first address of an instruction on shared or local memory.
fn address_of(instruction: &Instruction, state: &State) -> Option<Range> {
    use super::opcodes::Space::{Local, Shared};
    let class = instruction.opcode.class;
    let wanted = matches!(class, Class::CopyIn | Class::Load(Shared | Local) | Class::Store(Shared | Local))
        || class == Class::Atomic(Shared);
    let bracket = instruction.operands.iter().find_map(|operand| match operand {
        Operand::Address { brackets, .. } if wanted => brackets.first(),
        _ => None,
    });
    bracket.filter(|_| !instruction.never()).map(|bracket| sum(bracket, state))
}

fn sum(bracket: &Bracket, state: &State) -> Range {
    let term = |term: &Term| value_of(term.register, state).times(Range::number(term.scale));
    let start = Range::between(bracket.offset, bracket.offset);
    bracket.terms.iter().map(term).fold(start, Range::plus)
}

#[cfg(test)]
mod tests {
    use super::super::parse::parse;
    use super::*;

    /// The address of the last instruction.
    fn last(lines: &[&str]) -> Range {
        let body: Vec<_> = lines.iter().enumerate().map(|(i, line)| format!("/*{:04x}*/ {line} ;\n", i * 16)).collect();
        let text = format!(".section .text.k,\"ax\"\n{}", body.concat());
        let section = &parse(&text).unwrap_or_else(|error| panic!("{error}"))[0];
        addresses(section, &Flow::of(section), 128).pop().flatten().expect("an address")
    }

    #[test]
    fn the_window_and_a_swizzle() {
        let range = last(&[
            "S2UR UR5, SR_CgaCtaId",
            "UMOV UR4, 0x400",
            "ULEA UR4, UR5, UR4, 0x18",
            "S2R R0, SR_TID.X",
            "IMAD.SHL.U32 R1, R0, 0x10, RZ",
            "LOP3.LUT R1, R1, 0x70, RZ, 0xc0, !PT",
            "IMAD.U32 R2, RZ, RZ, UR4",
            "IMAD.IADD R1, R1, 0x1, R2",
            "LOP3.LUT R1, R1, 0x20, RZ, 0x3c, !PT",
            "STS [R1+0x1000], R9",
        ]);
        assert_eq!(range, Range { base: Base::Window, low: 0x1400 - 0x20, high: 0x1400 + 0x70 + 0x20 });
    }

    #[test]
    fn a_warp_index_and_a_spill() {
        let range =
            last(&["S2R R0, SR_TID.X", "SHF.R.U32.HI R2, RZ, 0x5, R0", "R2UR UR4, R2", "LDS.U8 R3, [UR4+0x80]"]);
        assert_eq!((range.low, range.high), (0x80, 0x83));
        let range = last(&["LDC R1, c[0x0][0x28]", "VIADD R1, R1, 0xffffffe0", "STL [R1+0x8], R9"]);
        assert_eq!(range, Range { base: Base::Stack, low: -24, high: -24 });
        assert_eq!(last(&["LDG.E R1, [R2.64]", "STS [R1], R9"]), Range::ANY);
        let spilled = |between: &str| {
            let stack = ["LDC R1, c[0x0][0x28]", "VIADD R1, R1, 0xffffffe0", "S2R R0, SR_TID.X", "STL [R1+0x8], R0"];
            let code = [&stack[..], &[between, "LDL R5, [R1+0x8]", "STS [R5], R9"]].concat();
            (last(&code).low, last(&code).high)
        };
        assert_eq!(spilled("STL [R1+0xc], R7"), (0, 127));
        assert_eq!(spilled("STL [R1+0x8], R7"), (Range::ANY.low, Range::ANY.high));
        assert_eq!(spilled("STL.64 [R1+0xc], R6"), (0, 127));
        assert_eq!(spilled("STL [R9], R6"), (Range::ANY.low, Range::ANY.high));
        assert_eq!(spilled("STL.64 [R1+0x4], R6"), (Range::ANY.low, Range::ANY.high));
    }
}
