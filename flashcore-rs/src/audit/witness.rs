//! How a secret got to where it was found: a shortest chain of definitions and uses.

use std::collections::{HashMap, VecDeque};

use serde::Serialize;

use super::findings::Sink;
use super::flow::Flow;
use super::opcodes::Class;
use super::parse::Section;
use super::registers::{Bit, RegisterSet, name};
use super::report::Finding;
use super::shared::Memory;
use super::taint::Taint;

/// One step, from the secret on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// Byte offset of the instruction.
    pub address: String,
    /// The instruction.
    pub text: String,
    /// What carries the secret on from here.
    pub carries: String,
}

/// What a step hands to the one after it.
#[derive(Clone, Copy)]
enum Via {
    Register(Bit),
    Memory,
    Control,
}

/// Looks for chains in one section.
pub struct Witness<'a> {
    section: &'a Section,
    taint: &'a Taint,
    memory: &'a Memory,
    /// Each instruction's predecessors.
    back: Vec<Vec<usize>>,
}

impl<'a> Witness<'a> {
    /// Prepares the search.
    pub fn new(section: &'a Section, flow: &Flow, taint: &'a Taint, memory: &'a Memory) -> Self {
        let mut back = vec![Vec::new(); section.instructions.len()];
        for (from, followers) in flow.steps().into_iter().enumerate() {
            followers.into_iter().for_each(|to| back[to].push(from));
        }
        Self { section, taint, memory, back }
    }

    /// A sink with its chain.
    pub fn finding(&self, sink: &Sink) -> Finding {
        let instruction = &self.section.instructions[sink.index];
        Finding {
            kind: sink.kind,
            section: self.section.name.clone(),
            address: format!("{:#06x}", instruction.address),
            text: instruction.text.clone(),
            through: sink.through.iter().map(name).collect(),
            witness: self.chain(sink),
        }
    }

    /// The chain to a sink, the secret's source first.
    fn chain(&self, sink: &Sink) -> Vec<Step> {
        let mut parents: HashMap<usize, (usize, Via)> = HashMap::new();
        let mut queue = VecDeque::new();
        self.causes(sink.index, &sink.through, &mut |cause, via| {
            if cause != sink.index && parents.insert(cause, (sink.index, via)).is_none() {
                queue.push_back(cause);
            }
        });
        while let Some(index) = queue.pop_front() {
            if self.is_source(index) {
                return self.unwind(index, sink.index, &parents);
            }
            let uses = self.taint.effects[index].uses().and(&self.taint.before[index]);
            self.causes(index, &uses, &mut |cause, via| {
                if cause != sink.index && !parents.contains_key(&cause) {
                    parents.insert(cause, (index, via));
                    queue.push_back(cause);
                }
            });
        }
        Vec::new()
    }

    fn unwind(&self, source: usize, sink: usize, parents: &HashMap<usize, (usize, Via)>) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut at = source;
        while let Some(&(next, via)) = parents.get(&at).filter(|_| at != sink) {
            let carries = match via {
                Via::Register(bit) => name(bit),
                Via::Memory => "memory".to_owned(),
                Via::Control => "control".to_owned(),
            };
            steps.push(self.step(at, carries));
            at = next;
        }
        steps.push(self.step(sink, String::new()));
        steps
    }

    fn step(&self, index: usize, carries: String) -> Step {
        let instruction = &self.section.instructions[index];
        Step { address: format!("{:#06x}", instruction.address), text: instruction.text.clone(), carries }
    }

    /// Calls `found` for each instruction that the taint of `index` comes from directly.
    fn causes(&self, index: usize, registers: &RegisterSet, found: &mut impl FnMut(usize, Via)) {
        for bit in registers.iter() {
            self.definitions(index, bit, found);
        }
        self.memory.writes_seen_by(index).filter(|&write| self.taint.writes[write]).for_each(|w| found(w, Via::Memory));
        if let Some(branch) = self.taint.decided_by[index] {
            found(branch, Via::Control);
        }
    }

    /// The tainted definitions of a register that reach an instruction.
    fn definitions(&self, index: usize, bit: Bit, found: &mut impl FnMut(usize, Via)) {
        let mut seen = vec![false; self.back.len()];
        let mut work = self.back[index].clone();
        while let Some(at) = work.pop() {
            if std::mem::replace(&mut seen[at], true) {
                continue;
            }
            let writes = self.taint.effects[at].results.contains(bit);
            if writes && self.taint.results[at] {
                found(at, Via::Register(bit));
            }
            if !writes || self.section.instructions[at].guard.is_some() {
                work.extend(self.back[at].iter().copied());
            }
        }
    }

    fn is_source(&self, index: usize) -> bool {
        let opcode = self.section.instructions[index].opcode;
        opcode.is_source() || opcode.class == Class::CopyIn
    }
}
