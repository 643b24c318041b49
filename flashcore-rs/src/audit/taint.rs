//! Which registers may hold something that depends on a secret, at every point of the code.

use super::bits;
use super::effect::Effect;
use super::flow::{Flow, closure};
use super::opcodes::Class;
use super::operand::{File, Operand};
use super::parse::{Instruction, Section};
use super::registers::{RegisterSet, bit};
use super::shared::Memory;
use super::state::{Literal, State, Truth};

/// The result of the analysis.
#[derive(Debug)]
pub struct Taint {
    /// What each instruction reads and writes.
    pub effects: Vec<Effect>,
    /// Registers that are tainted before each instruction when its guard holds; empty where control never comes.
    pub before: Vec<RegisterSet>,
    /// Whether each instruction's results are tainted.
    pub results: Vec<bool>,
    /// Whether control can come to each instruction.
    pub live: Vec<bool>,
    /// The branch that a secret steers and that decides whether the instruction is executed.
    pub decided_by: Vec<Option<usize>>,
    /// Writes to shared or local memory that put tainted bytes there.
    pub writes: Vec<bool>,
}

impl Taint {
    /// Runs the analysis. All memory but shared and local is secret: whatever a load brings in is tainted.
    pub fn of(section: &Section, flow: &Flow, memory: &Memory) -> Self {
        let count = section.instructions.len();
        let live = flow.live();
        let mut taint = Self {
            effects: section.instructions.iter().map(Effect::of).collect(),
            before: vec![RegisterSet::default(); count],
            results: vec![false; count],
            live: (0..count).map(|index| live[flow.block_of[index]]).collect(),
            decided_by: vec![None; count],
            writes: vec![false; count],
        };
        let post_dominators = flow.post_dominators();
        // Memory and control are flow-insensitive: each round sees all that the ones before found.
        loop {
            taint.registers(section, flow, memory);
            let more_writes = taint.find_writes(section);
            let more_control = taint.find_control(section, flow, &post_dominators);
            if !more_writes && !more_control {
                return taint;
            }
        }
    }

    /// Whether any part of an instruction's reading is tainted.
    pub fn reads(&self, index: usize, part: &RegisterSet) -> bool {
        self.before[index].meets(part)
    }

    fn registers(&mut self, section: &Section, flow: &Flow, memory: &Memory) {
        flow.forward(
            State::default(),
            |block, state| {
                for index in flow.blocks[block].clone() {
                    let guard = literal(&section.instructions[index]);
                    self.before[index] = state.under(guard);
                    let bits = self.tainted_bits(section, memory, index, state);
                    self.results[index] = bits != 0;
                    let truth = truth(&section.instructions[index]);
                    state.write(&self.effects[index].results, bits, guard, truth);
                }
            },
            |block, follower, state, entry| {
                let last = &section.instructions[flow.blocks[block].end - 1];
                merge(entry, state.given(decision(last, flow.blocks[follower].start)))
            },
        );
    }

    /// The bits of an instruction's results that are tainted.
    fn tainted_bits(&self, section: &Section, memory: &Memory, index: usize, state: &State) -> u32 {
        let instruction = &section.instructions[index];
        let effect = &self.effects[index];
        let source = match instruction.opcode.class {
            _ if instruction.never() => return 0,
            _ if instruction.opcode.is_source() => true,
            Class::Load(_) | Class::Atomic(_) => memory.writes_seen_by(index).any(|write| self.writes[write]),
            _ => false,
        };
        if source || self.decided_by[index].is_some() {
            return u32::MAX;
        }
        let shown = if self.reads(index, &effect.guard) { bits::changed(instruction).unwrap_or(u32::MAX) } else { 0 };
        let all = if self.reads(index, &effect.operands()) { u32::MAX } else { 0 };
        bits::of_result(instruction, &self.before[index], |register| state.clean(register))
            .map_or(all, |bits| bits & all)
            | shown
    }

    /// Marks the writes that put tainted bytes into memory.
    fn find_writes(&mut self, section: &Section) -> bool {
        let mut more = false;
        for (index, instruction) in section.instructions.iter().enumerate() {
            let class = instruction.opcode.class;
            let writes = matches!(class, Class::Store(_) | Class::Atomic(_) | Class::CopyIn);
            if !writes || self.writes[index] || !self.live[index] || instruction.never() {
                continue;
            }
            let uses = self.effects[index].uses();
            let tainted = class == Class::CopyIn || self.decided_by[index].is_some() || self.reads(index, &uses);
            self.writes[index] = tainted;
            more |= tainted;
        }
        more
    }

    /// Marks what branches that a secret steers decide over: all between the branch and where its ways meet again.
    fn find_control(&mut self, section: &Section, flow: &Flow, post_dominators: &[Option<usize>]) -> bool {
        let mut more = false;
        for (block, range) in flow.blocks.iter().enumerate() {
            let branch = range.end - 1;
            let effect = &self.effects[branch];
            let steered = self.reads(branch, &effect.guard.or(&effect.steer));
            if !steered || !section.instructions[branch].opcode.is_control() || !self.live[branch] {
                continue;
            }
            let meet = post_dominators[block];
            let decided = closure(&flow.successors, &flow.successors[block], |block| Some(block) == meet);
            for index in (0..self.decided_by.len()).filter(|&index| decided[flow.block_of[index]]) {
                more |= self.decided_by[index].is_none();
                self.decided_by[index].get_or_insert(branch);
            }
        }
        more
    }
}

fn merge(entry: &mut Option<State>, state: State) -> bool {
    match entry {
        Some(entry) => entry.merge(&state),
        None => {
            *entry = Some(state);
            true
        }
    }
}

/// The guard of an instruction.
fn literal(instruction: &Instruction) -> Option<Literal> {
    let guard = instruction.guard?;
    guard.index.map(|index| Literal::new(guard.file, index, !guard.negated))
}

/// What is known of a branch's guard on the way to one of its followers.
fn decision(branch: &Instruction, follower: usize) -> Option<Literal> {
    let guard = literal(branch).filter(|_| branch.opcode.class == Class::Branch && branch.operands.is_empty())?;
    let next = branch.address as usize / super::opcodes::SIZE + 1;
    match (branch.targets.contains(&follower), follower == next) {
        // One that a warp takes as a whole, if the guard holds for any or for all: the other threads go along.
        (true, false) if branch.has("ANY") => None,
        (false, true) if branch.has("ALL") => None,
        (true, false) => Some(guard),
        (false, true) => Some(guard.not()),
        _ => None,
    }
}

/// What an instruction does with a truth value.
fn truth(instruction: &Instruction) -> Option<Truth> {
    match (instruction.opcode.name, instruction.operands.as_slice()) {
        ("VOTEU", [to, from]) if instruction.has("ANY") && instruction.guard.is_none() => {
            let (to, from) = (to.register()?, from.register()?);
            let any = Literal::new(from.file, from.index.filter(|_| from.file == File::Predicate)?, !from.negated);
            let to = bit(to.file, to.index.filter(|_| to.file == File::UniformPredicate)?);
            Some(Truth::Vote { to, any })
        }
        ("LOP3", [to, from, Operand::Integer(mask), zero, Operand::Integer(table), _]) if is_zero(zero) => {
            let (to, from, mask) = (general(to)?, general(from)?, *mask as u32);
            match table {
                0xc0 if to == from => Some(Truth::Clear { register: to, mask: !mask }),
                0xfc if to == from && mask.is_power_of_two() => Some(Truth::Set { register: to, mask }),
                _ => None,
            }
        }
        ("LOP3", [to, result, from, Operand::Integer(mask), zero, Operand::Integer(0xc0), _])
            if is_zero(zero) && is_zero(result) && instruction.guard.is_none() =>
        {
            let (to, mask) = (to.register().filter(|to| to.file == File::Predicate)?, *mask as u32);
            let to = bit(to.file, to.index?);
            mask.is_power_of_two().then_some(Truth::Test { to, register: general(from)?, mask })
        }
        _ => None,
    }
}

fn is_zero(operand: &Operand) -> bool {
    matches!(operand.register(), Some(register) if register.index.is_none())
}

fn general(operand: &Operand) -> Option<u16> {
    operand.register().filter(|register| register.file == File::General && !register.modified)?.index
}
