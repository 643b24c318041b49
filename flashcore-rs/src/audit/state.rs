//! The tainted registers at one point of the code, also under the assumption that a predicate holds or does not.
//!
//! Compilers reuse a register under a guard: `@P1 MOV R4, 0` and then `@P1 LDG R5, [R4]`, where R4 held a secret before.
//! The load does not see the secret, but only because both have the same guard.

use super::operand::File;
use super::registers::{Bit, RegisterSet, bit};

/// The predicates of both files.
const PREDICATES: usize = 16;

/// A predicate that holds, or does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Literal {
    predicate: usize,
    holds: bool,
}

impl Literal {
    /// The predicate with this index in its file.
    pub fn new(file: File, index: u16, holds: bool) -> Self {
        Self { predicate: usize::from(bit(file, index) - FIRST), holds }
    }

    /// The other way round.
    pub fn not(self) -> Self {
        Self { holds: !self.holds, ..self }
    }
}

const FIRST: Bit = 384;

/// A uniform predicate that says whether some thread of the warp has this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flag {
    /// The uniform predicate.
    pub to: Bit,
    /// What it says.
    pub any: Literal,
}

/// Registers of 32 bits.
const WORDS: usize = FIRST as usize;

/// Tainted registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    all: RegisterSet,
    /// Bits that are not tainted.
    clean: [u32; WORDS],
    /// Those that are tainted if the predicate does not hold, and if it does; both are part of `all`.
    when: [[RegisterSet; 2]; PREDICATES],
    /// Votes whose outcome is known to be that of `VOTEU.ANY` on this predicate as it is now.
    votes: [Option<Literal>; PREDICATES],
}

impl Default for State {
    fn default() -> Self {
        Self {
            all: RegisterSet::default(),
            clean: [u32::MAX; WORDS],
            when: Default::default(),
            votes: [None; PREDICATES],
        }
    }
}

impl State {
    /// The bits of a register that are not tainted.
    pub fn clean(&self, register: Bit) -> u32 {
        self.clean.get(usize::from(register)).copied().unwrap_or(0)
    }

    /// What is tainted for an instruction with this guard.
    pub fn under(&self, guard: Option<Literal>) -> RegisterSet {
        guard.map_or(self.all, |literal| self.when[literal.predicate][usize::from(literal.holds)])
    }

    /// What is left on a path on which this is known.
    pub fn given(&self, known: Option<Literal>) -> Self {
        if known.is_none() {
            return self.clone();
        }
        let all = self.under(known);
        Self { all, clean: self.clean, votes: self.votes, when: self.when.map(|cases| cases.map(|set| set.and(&all))) }
    }

    /// Writes registers under a guard; `bits` are those of the results that are tainted.
    pub fn write(&mut self, results: &RegisterSet, bits: u32, guard: Option<Literal>, flag: Option<Flag>) {
        for register in results.iter().take_while(|&register| register < FIRST) {
            let clean = &mut self.clean[usize::from(register)];
            *clean = if guard.is_some() { *clean & !bits } else { !bits };
        }
        match (bits != 0, guard) {
            (true, _) => self.taint(results, guard),
            (false, None) => self.clear(results),
            (false, Some(guard)) => {
                let cases = &mut self.when[guard.predicate];
                cases[usize::from(guard.holds)] = cases[usize::from(guard.holds)].without(results);
                let either = cases[0].or(&cases[1]);
                self.clear(&results.without(&either));
            }
        }
        for predicate in (0..PREDICATES).filter(|&p| results.contains(FIRST + p as Bit)) {
            self.define(predicate, flag.filter(|flag| flag.to == FIRST + predicate as Bit));
        }
    }

    /// A predicate gets a new value: what it was says nothing about what it is now, unless another one says the same.
    fn define(&mut self, predicate: usize, flag: Option<Flag>) {
        let same = flag.and_then(|flag| self.votes.iter().position(|&vote| vote == Some(flag.any)));
        let about_it = |vote: &Option<Literal>| vote.is_some_and(|literal| literal.predicate == predicate);
        self.votes.iter_mut().filter(|vote| about_it(vote)).for_each(|vote| *vote = None);
        self.when[predicate] = same.map_or([self.all; 2], |same| self.when[same]);
        self.votes[predicate] = flag.map(|flag| flag.any);
    }

    fn taint(&mut self, results: &RegisterSet, guard: Option<Literal>) {
        self.all = self.all.or(results);
        for (predicate, cases) in self.when.iter_mut().enumerate() {
            for (holds, set) in cases.iter_mut().enumerate() {
                // Where the guard does not hold the registers stay as they were.
                let untouched = guard.is_some_and(|g| g.predicate == predicate && usize::from(g.holds) != holds);
                if !untouched {
                    *set = set.or(results);
                }
            }
        }
    }

    fn clear(&mut self, results: &RegisterSet) {
        self.all = self.all.without(results);
        self.when.iter_mut().flatten().for_each(|set| *set = set.without(results));
    }

    /// Adds what is tainted on another path; says whether that is more.
    pub fn merge(&mut self, other: &Self) -> bool {
        let before = self.clone();
        self.all = self.all.or(&other.all);
        self.clean.iter_mut().zip(other.clean).for_each(|(mine, theirs)| *mine &= theirs);
        for (mine, theirs) in self.when.iter_mut().flatten().zip(other.when.iter().flatten()) {
            *mine = mine.or(theirs);
        }
        for (mine, theirs) in self.votes.iter_mut().zip(other.votes) {
            *mine = mine.filter(|_| *mine == theirs);
        }
        *self != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(registers: &[Bit]) -> RegisterSet {
        let mut set = RegisterSet::default();
        registers.iter().for_each(|&bit| set.insert(bit));
        set
    }

    fn p(index: u16, holds: bool) -> Option<Literal> {
        Some(Literal::new(File::Predicate, index, holds))
    }

    #[test]
    fn a_register_is_clean_under_the_guard_it_was_written_under() {
        let mut state = State::default();
        state.write(&set(&[4]), u32::MAX, None, None);
        state.write(&set(&[4]), 0, p(1, true), None);
        assert_eq!(state.under(p(1, true)), set(&[]));
        for guard in [None, p(1, false), p(2, true)] {
            assert_eq!(state.under(guard), set(&[4]));
        }
        assert_eq!(state.given(p(1, true)).under(None), set(&[]));
        state.write(&set(&[4]), 0, p(1, false), None);
        assert_eq!(state.under(None), set(&[]));
    }

    #[test]
    fn two_votes_on_one_predicate_agree() {
        let flag = |to| Some(Flag { to: FIRST + to, any: Literal::new(File::Predicate, 2, true) });
        let uniform = |index| Some(Literal::new(File::UniformPredicate, index, true));
        let mut state = State::default();
        state.write(&set(&[300]), u32::MAX, None, None);
        state.write(&set(&[FIRST + 11]), 0, None, flag(11));
        state.write(&set(&[300]), 0, uniform(3), None);
        state.write(&set(&[FIRST + 12]), 0, None, flag(12));
        assert_eq!(state.under(uniform(4)), set(&[]));
        state.write(&set(&[FIRST + 2]), 0, None, None);
        state.write(&set(&[FIRST + 13]), 0, None, flag(13));
        assert_eq!(state.under(uniform(5)), set(&[300]));
    }

    #[test]
    fn a_new_predicate_ends_what_the_old_one_told() {
        let mut state = State::default();
        state.write(&set(&[4]), u32::MAX, None, None);
        state.write(&set(&[4]), 0, p(1, true), None);
        state.write(&set(&[FIRST + 1]), 0, None, None);
        assert_eq!(state.under(p(1, true)), set(&[4]));
    }

    #[test]
    fn a_tainted_write_under_a_guard_leaves_the_other_case() {
        let mut state = State::default();
        state.write(&set(&[4]), u32::MAX, p(1, true), None);
        assert_eq!(state.under(p(1, false)), set(&[]));
        assert_eq!(state.under(None), set(&[4]));
    }
}
