//! Sets of registers.

use super::operand::{File, Register};

const WORDS: usize = 7;
/// Bits of a set.
pub const COUNT: usize = WORDS * 64;

/// A register as a bit: `R0` to `R255`, `UR0` to `UR127`, `P0` to `P7`, `UP0` to `UP7`, `B0` to `B15`.
pub type Bit = u16;

/// The bit of a register.
pub fn bit(file: File, index: u16) -> Bit {
    index
        + match file {
            File::General => 0,
            File::Uniform => 256,
            File::Predicate => 384,
            File::UniformPredicate => 392,
            File::Barrier => 400,
        }
}

/// How a register is called.
pub fn name(bit: Bit) -> String {
    match bit {
        0..256 => format!("R{bit}"),
        256..384 => format!("UR{}", bit - 256),
        384..392 => format!("P{}", bit - 384),
        392..400 => format!("UP{}", bit - 392),
        _ => format!("B{}", bit - 400),
    }
}

/// A set of registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegisterSet([u64; WORDS]);

impl RegisterSet {
    /// Adds `width` registers from this one on, up to the end of its file.
    pub fn add(&mut self, register: Register, width: u16) {
        let Some(first) = register.index else { return };
        let end = match register.file {
            File::General => 255,
            File::Uniform => 128,
            File::Predicate | File::UniformPredicate => 8,
            File::Barrier => 16,
        };
        for index in first..(first + width).min(end) {
            self.insert(bit(register.file, index));
        }
    }

    /// Adds one bit.
    pub fn insert(&mut self, bit: Bit) {
        self.0[usize::from(bit) / 64] |= 1 << (bit % 64);
    }

    /// Those that all threads of a warp have in common.
    pub fn uniform(&self) -> Self {
        let mut uniform = Self::default();
        let common = |bit: &Bit| matches!(bit, 256..384 | 392..400);
        self.iter().filter(common).for_each(|bit| uniform.insert(bit));
        uniform
    }

    /// Whether it has this register.
    pub fn contains(&self, bit: Bit) -> bool {
        self.0[usize::from(bit) / 64] >> (bit % 64) & 1 == 1
    }

    /// All of either.
    pub fn or(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    /// What both have.
    pub fn and(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    /// What the other does not have.
    pub fn without(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & !b)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; WORDS]
    }

    /// Whether there is one that both have.
    pub fn meets(&self, other: &Self) -> bool {
        !self.and(other).is_empty()
    }

    /// Its registers, in order.
    pub fn iter(&self) -> impl Iterator<Item = Bit> + '_ {
        (0..COUNT as Bit).filter(|&bit| self.contains(bit))
    }

    fn zip(&self, other: &Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}
