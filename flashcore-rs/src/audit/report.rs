//! What the audit of one kernel found.

use std::collections::BTreeMap;

use serde::Serialize;

use super::findings::Kind;
use super::witness::Step;

/// How an audit ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// No secret reaches control flow, an address, or a guard of memory.
    Pass,
    /// One does.
    Fail,
    /// Something was not understood.
    NotAudited,
}

/// One finding with its witness.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What.
    pub kind: Kind,
    /// The kernel of the cubin it is in.
    pub section: String,
    /// Byte offset of the instruction.
    pub address: String,
    /// The instruction.
    pub text: String,
    /// The registers that show there.
    pub through: Vec<String>,
    /// From a source of secrets to here.
    pub witness: Vec<Step>,
}

/// Counts over the code of a cubin.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Instructions that the file has.
    pub instructions: u64,
    /// Instructions that were read and understood.
    pub understood: u64,
    /// Instructions that control can come to; behind the end there is padding.
    pub reached: u64,
    /// Guarded instructions.
    pub guarded: u64,
    /// Control flow that something decides over, all of it.
    pub conditional_control_flow: u64,
    /// Sources: loads, copies and tensor-core products that bring secrets in.
    pub sources: u64,
    /// Accesses of shared memory.
    pub shared_accesses: u64,
    /// Those whose place is not from the code alone, but also from the declared layout.
    pub shared_assumed: u64,
}

/// The audit of one cubin.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The kernels that have this code.
    pub names: Vec<String>,
    /// The architecture of the code.
    pub arch: String,
    /// Hash of what was audited: of the cubin, or of the PTX that was assembled.
    pub sha256: String,
    /// The assembler's version and target, if the code is shipped as PTX.
    pub assembled: Option<String>,
    /// How it ended.
    pub verdict: Verdict,
    /// Why it was not audited.
    pub reason: Option<String>,
    /// Counts of the code.
    pub counts: Counts,
    /// How many findings there are of each kind.
    pub found: BTreeMap<Kind, usize>,
    /// The findings, in the order of the code.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Share of the instructions that was understood.
    pub fn coverage(&self) -> f64 {
        if self.counts.instructions == 0 {
            0.0
        } else {
            self.counts.understood as f64 / self.counts.instructions as f64
        }
    }

    /// How many findings of a kind there are.
    pub fn count(&self, kind: Kind) -> usize {
        self.found.get(&kind).copied().unwrap_or(0)
    }

    /// The verdict if warnings count too.
    pub fn strict(&self) -> Verdict {
        match self.verdict {
            Verdict::Pass if !self.findings.is_empty() => Verdict::Fail,
            verdict => verdict,
        }
    }
}
