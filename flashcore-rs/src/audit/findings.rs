//! What a secret must not reach, and where it does.

use serde::Serialize;

use super::opcodes::Class;
use super::parse::{Instruction, Section};
use super::registers::RegisterSet;
use super::taint::Taint;

/// A way in which a secret shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// T1: it decides which instruction comes next.
    ControlFlow,
    /// T2: it is part of an address, a descriptor or a lane.
    Address,
    /// T3: it decides whether memory, a barrier or a tensor core is touched.
    Guard,
    /// T4: it decides whether an instruction on registers alone is executed, in the same time.
    GuardedAlu,
    /// T5: it is an operand of an instruction whose time may depend on it.
    VariableLatency,
}

impl Kind {
    /// Whether it fails the audit whatever is asked for.
    pub fn is_leak(self) -> bool {
        self <= Self::Guard
    }

    /// In words.
    pub fn describe(self) -> &'static str {
        match self {
            Self::ControlFlow => "T1 value-dependent control flow",
            Self::Address => "T2 value-dependent address",
            Self::Guard => "T3 value-guarded memory, barrier or tensor core",
            Self::GuardedAlu => "T4 value-guarded ALU instruction",
            Self::VariableLatency => "T5 value in a variable-latency instruction",
        }
    }
}

/// Something found, before it has a witness.
#[derive(Clone, Copy, Debug)]
pub struct Sink {
    /// What.
    pub kind: Kind,
    /// Where.
    pub index: usize,
    /// The tainted registers that show there.
    pub through: RegisterSet,
}

/// Everything that a secret reaches, in the order of the code.
pub fn sinks(section: &Section, taint: &Taint) -> Vec<Sink> {
    let live = section.instructions.iter().enumerate().filter(|(index, _)| taint.live[*index]);
    live.flat_map(|(index, instruction)| at(instruction, taint, index)).collect()
}

fn at(instruction: &Instruction, taint: &Taint, index: usize) -> Vec<Sink> {
    let effect = &taint.effects[index];
    let opcode = instruction.opcode;
    let guard = match opcode {
        _ if opcode.is_control() => Kind::ControlFlow,
        _ if opcode.is_shared_effect() => Kind::Guard,
        _ => Kind::GuardedAlu,
    };
    let slow = opcode.class == Class::SlowAlu || instruction.has("F64");
    let exposed = [
        (guard, effect.guard),
        (Kind::ControlFlow, effect.steer),
        (Kind::Address, effect.address),
        (Kind::Guard, effect.mask),
        (Kind::VariableLatency, if slow { effect.data } else { RegisterSet::default() }),
    ];
    let tainted = exposed.into_iter().map(|(kind, set)| (kind, set.and(&taint.before[index])));
    tainted.filter(|(_, set)| !set.is_empty()).map(|(kind, through)| Sink { kind, index, through }).collect()
}
