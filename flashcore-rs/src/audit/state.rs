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

    /// Whether it may differ between the threads of a warp.
    fn is_of_a_thread(self) -> bool {
        FIRST + (self.predicate as Bit) < bit(File::UniformPredicate, 0)
    }
}

const FIRST: Bit = 384;

/// What an instruction does with a truth value, besides what it does with registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    /// The uniform predicate `to` says whether some thread of the warp has `any`.
    Vote { to: Bit, any: Literal },
    /// Bits of a register become 0.
    Clear { register: Bit, mask: u32 },
    /// Bits of a register become 1, where the guard holds.
    Set { register: Bit, mask: u32 },
    /// The predicate `to` says whether one bit of a register is 1.
    Test { to: Bit, register: Bit, mask: u32 },
}

/// What a bit that keeps a predicate is at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Now {
    /// 0.
    Zero,
    /// What this says.
    Is(Literal),
    /// Whatever it was.
    Past,
}

/// A bit of a register that keeps a predicate: the tainted registers if it is 0, and if it is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kept {
    register: Bit,
    mask: u32,
    now: Now,
    when: [RegisterSet; 2],
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
    /// Predicates that are kept in registers while there are too few.
    kept: Vec<Kept>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            all: RegisterSet::default(),
            clean: [u32::MAX; WORDS],
            when: Default::default(),
            votes: [None; PREDICATES],
            kept: Vec::new(),
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
        let mut given = self.clone();
        given.all = self.under(known);
        let all = given.all;
        given.every_case(|set| *set = set.and(&all));
        given
    }

    /// Applies a change to the registers of every case.
    fn every_case(&mut self, change: impl Fn(&mut RegisterSet)) {
        self.when.iter_mut().chain(self.kept.iter_mut().map(|kept| &mut kept.when)).flatten().for_each(change);
    }

    /// Applies a change to the cases that a literal is.
    fn cases_of(&mut self, literal: Literal, change: impl Fn(&mut RegisterSet)) {
        change(&mut self.when[literal.predicate][usize::from(literal.holds)]);
        for kept in &mut self.kept {
            match kept.now {
                Now::Is(now) if now == literal => change(&mut kept.when[1]),
                Now::Is(now) if now == literal.not() => change(&mut kept.when[0]),
                _ => {}
            }
        }
    }

    /// Writes registers under a guard; `bits` are those of the results that are tainted.
    pub fn write(&mut self, results: &RegisterSet, bits: u32, guard: Option<Literal>, truth: Option<Truth>) {
        for register in results.iter().take_while(|&register| register < FIRST) {
            let clean = &mut self.clean[usize::from(register)];
            *clean = if guard.is_some() { *clean & !bits } else { !bits };
        }
        match (bits != 0, guard) {
            (true, guard) => self.taint(results, guard),
            (false, None) => self.clear(results),
            (false, Some(guard)) => {
                self.cases_of(guard, |set| *set = set.without(results));
                let [one, other] = self.when[guard.predicate];
                self.clear(&results.without(&one.or(&other)));
            }
        }
        let found = self.found(truth);
        self.keep(results, guard, truth);
        for predicate in (0..PREDICATES).filter(|&p| results.contains(FIRST + p as Bit)) {
            self.define(predicate, guard, truth, found);
        }
    }

    fn taint(&mut self, results: &RegisterSet, guard: Option<Literal>) {
        // Where the guard does not hold the registers stay as they were, but for those that a warp has in common: there
        // it may hold for another thread.
        let untouched = guard.map(|guard| {
            let common = if guard.is_of_a_thread() { results.uniform() } else { RegisterSet::default() };
            (guard.not(), self.under(Some(guard.not())).or(&common))
        });
        self.all = self.all.or(results);
        self.every_case(|set| *set = set.or(results));
        if let Some((literal, before)) = untouched {
            self.when[literal.predicate][usize::from(literal.holds)] = before;
        }
    }

    fn clear(&mut self, results: &RegisterSet) {
        self.all = self.all.without(results);
        self.every_case(|set| *set = set.without(results));
    }

    /// The cases of the bit that an instruction tests, if that keeps a predicate.
    fn found(&self, truth: Option<Truth>) -> Option<[RegisterSet; 2]> {
        let Some(Truth::Test { register, mask, .. }) = truth else { return None };
        self.kept.iter().find(|kept| (kept.register, kept.mask) == (register, mask)).map(|kept| kept.when)
    }

    /// Follows what an instruction does to the predicates that are kept in registers.
    fn keep(&mut self, results: &RegisterSet, guard: Option<Literal>, truth: Option<Truth>) {
        match truth {
            Some(Truth::Clear { register, mask }) if guard.is_none() => {
                self.forget(register, mask);
                let when = [self.all, RegisterSet::default()];
                let bits = (0..32).map(|bit| 1 << bit).filter(|one| mask & one != 0);
                self.kept.extend(bits.map(|mask| Kept { register, mask, now: Now::Zero, when }));
                self.kept.sort_by_key(|kept| (kept.register, kept.mask));
            }
            Some(Truth::Set { register, mask }) => {
                let is_it = |kept: &&mut Kept| (kept.register, kept.mask, kept.now) == (register, mask, Now::Zero);
                match (self.kept.iter_mut().find(is_it), guard) {
                    (Some(kept), Some(guard)) => {
                        let cases = self.when[guard.predicate];
                        kept.when = if guard.holds { cases } else { [cases[1], cases[0]] };
                        kept.now = Now::Is(guard);
                    }
                    _ => self.forget(register, mask),
                }
            }
            _ => self.kept.retain(|kept| !results.contains(kept.register)),
        }
    }

    fn forget(&mut self, register: Bit, mask: u32) {
        self.kept.retain(|kept| kept.register != register || kept.mask & mask == 0);
    }

    /// A predicate gets a new value: what it was says nothing about what it is now, unless that is known from elsewhere.
    fn define(
        &mut self,
        predicate: usize,
        guard: Option<Literal>,
        truth: Option<Truth>,
        found: Option<[RegisterSet; 2]>,
    ) {
        let is_it = |to: Bit| to == FIRST + predicate as Bit;
        let vote = match truth {
            Some(Truth::Vote { to, any }) if is_it(to) => Some(any),
            _ => None,
        };
        let same = vote.and_then(|any| self.votes.iter().position(|&vote| vote == Some(any)));
        let tested = found.filter(|_| matches!(truth, Some(Truth::Test { to, .. }) if is_it(to)));
        let about_it = |literal: Literal| literal.predicate == predicate;
        self.votes.iter_mut().filter(|vote| vote.is_some_and(about_it)).for_each(|vote| *vote = None);
        for kept in &mut self.kept {
            if matches!(kept.now, Now::Is(literal) if about_it(literal)) {
                kept.now = Now::Past;
            }
        }
        let mut unknown = [self.all; 2];
        if let Some(guard) = guard.filter(|&guard| about_it(guard)) {
            // Written under itself: where the guard holds now it held before, else the predicate would be as it was.
            let case = usize::from(guard.holds);
            unknown[case] = self.when[predicate][case];
        }
        self.when[predicate] = tested.or(same.map(|same| self.when[same])).unwrap_or(unknown);
        self.votes[predicate] = vote;
    }

    /// Adds what is tainted on another path; says whether that is more.
    pub fn merge(&mut self, other: &Self) -> bool {
        let before = self.clone();
        self.all = self.all.or(&other.all);
        self.clean.iter_mut().zip(other.clean).for_each(|(mine, theirs)| *mine &= theirs);
        for (mine, theirs) in self.when.iter_mut().flatten().zip(other.when.iter().flatten()) {
            *mine = mine.or(theirs);
        }
        self.kept.retain_mut(|mine| {
            let same = |theirs: &&Kept| (theirs.register, theirs.mask) == (mine.register, mine.mask);
            let theirs = other.kept.iter().find(same);
            if let Some(theirs) = theirs {
                mine.now = if mine.now == theirs.now { mine.now } else { Now::Past };
                mine.when = [0, 1].map(|case| mine.when[case].or(&theirs.when[case]));
            }
            theirs.is_some()
        });
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
        let flag = |to| Some(Truth::Vote { to: FIRST + to, any: Literal::new(File::Predicate, 2, true) });
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

    #[test]
    fn a_predicate_that_is_written_under_itself_tells_what_it_told() {
        let after = |guard, written| {
            let mut state = State::default();
            state.write(&set(&[4]), u32::MAX, None, None);
            state.write(&set(&[4]), 0, p(1, written), None);
            state.write(&set(&[FIRST + 1]), 0, guard, None);
            (state.under(p(1, true)), state.under(p(1, false)))
        };
        assert_eq!(after(p(1, true), true), (set(&[]), set(&[4])));
        assert_eq!(after(p(1, false), false), (set(&[4]), set(&[])));
        // What was known of the other case, or is written under another guard or none, is lost.
        for (guard, written) in [(p(1, true), false), (p(1, false), true), (p(2, true), true), (None, true)] {
            assert_eq!(after(guard, written), (set(&[4]), set(&[4])));
        }
    }

    #[test]
    fn a_warp_has_uniform_registers_in_common() {
        let uniform = bit(File::Uniform, 8);
        let mut state = State::default();
        state.write(&set(&[4, uniform]), u32::MAX, p(1, true), None);
        assert_eq!(state.under(p(1, false)), set(&[uniform]));
        state.write(&set(&[uniform]), 0, None, None);
        let guard = Literal::new(File::UniformPredicate, 1, true);
        state.write(&set(&[uniform]), u32::MAX, Some(guard), None);
        assert_eq!(state.under(Some(guard.not())), set(&[4]));
    }

    #[test]
    fn a_predicate_is_kept_in_a_register() {
        let (register, mask) = (27, 1);
        let flag = |truth| (set(&[register]), truth);
        let run = |clear: bool, again: bool| {
            let mut state = State::default();
            let mut write =
                |(results, truth): (RegisterSet, Option<Truth>), bits, guard| state.write(&results, bits, guard, truth);
            write((set(&[176]), None), u32::MAX, None);
            if clear {
                write(flag(Some(Truth::Clear { register, mask })), 0, None);
            }
            write(flag(Some(Truth::Set { register, mask })), 0, p(6, true));
            write((set(&[176]), None), 0, p(6, true));
            write((set(&[FIRST + 6]), None), 0, None);
            if again {
                write(flag(Some(Truth::Set { register, mask })), 0, p(6, true));
            }
            write((set(&[FIRST + 6]), Some(Truth::Test { to: FIRST + 6, register, mask })), 0, None);
            (state.under(p(6, true)), state.under(p(6, false)))
        };
        assert_eq!(run(true, false), (set(&[]), set(&[176])));
        // A bit that may have been 1 before, or become so since, says nothing.
        assert_eq!(run(false, false), (set(&[176]), set(&[176])));
        assert_eq!(run(true, true), (set(&[176]), set(&[176])));
    }
}
