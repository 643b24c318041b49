//! Does the machine code branch on, or address by, the values it processes? A taint analysis of SASS.
//!
//! The vendor's disassembler prints a cubin ([`Tool`]); [`parse`] reads the listing, every line of it; [`opcodes`] says
//! what each instruction reads and writes. [`Flow`] is the control flow, [`Memory`] which writes to shared memory a read
//! may see, [`Taint`] which registers may depend on a secret at every point, and [`sinks`] where that shows. Whatever is
//! not understood fails the audit. `docs/security/CONSTANT_TIME_VERIFICATION.md` has the method and its limits.
//!
//! Everything that code loads is secret: there is no list of secret pointers that could be wrong. Parameters, constants
//! and the thread's place in the grid are public.

mod bits;
pub mod cli;
mod effect;
mod elf;
mod findings;
mod flow;
mod opcodes;
mod operand;
mod parse;
mod range;
mod registers;
mod report;
mod shared;
mod state;
mod subject;
mod table;
mod taint;
mod tools;
mod witness;

#[cfg(test)]
mod tests;

pub use self::findings::Kind;
use self::findings::sinks;
use self::flow::Flow;
use self::opcodes::Class;
pub use self::parse::ParseError;
use self::parse::Section;
pub use self::report::{Counts, Finding, Report, Verdict};
use self::shared::{Layout, Memory};
pub use self::subject::{Code, Subject};
use self::taint::Taint;
pub use self::tools::{Tool, ToolError};
pub use self::witness::Step;
use self::witness::Witness;

/// Version of the rules; goes into the manifest with a verdict.
pub const RULES: u32 = 1;

/// What is known about a kernel from outside its code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Threads of a block, at most.
    pub threads: u32,
    /// Bytes at the start of its shared memory that hold tiles; 0 if nobody says.
    pub tile_bytes: u32,
}

impl Default for Facts {
    fn default() -> Self {
        Self { threads: 1024, tile_bytes: 0 }
    }
}

/// Findings and counts of one listing, or what was not understood.
type Judged = Result<(Vec<Finding>, Counts), String>;

/// Parses a listing as the auditor does; for fuzzing.
///
/// # Errors
/// The first line that is not understood.
pub fn parse_listing(listing: &str) -> Result<usize, ParseError> {
    Ok(parse::parse(listing)?.iter().map(|section| section.instructions.len()).sum())
}

/// Audits a listing as far as that goes without the cubin it is of; for fuzzing.
pub fn judge_listing(listing: &str) -> Result<usize, String> {
    judge(listing, Facts::default()).map(|(findings, _)| findings.len())
}

/// Audits the listing of a cubin.
fn judge(listing: &str, facts: Facts) -> Judged {
    let start = match architecture(listing) {
        // The system keeps the first KiB of shared memory to itself from Hopper on.
        Some(90..) => 0x400,
        Some(75..90) => 0,
        _ => return Err("unknown architecture".into()),
    };
    let tile_bytes = (facts.tile_bytes > 0).then_some(facts.tile_bytes);
    let layout = Layout { threads: facts.threads, start, tile_bytes };
    let (mut findings, mut counts) = (Vec::new(), Counts::default());
    for section in parse::parse(listing).map_err(|error| error.to_string())? {
        let flow = Flow::of(&section);
        let memory = Memory::of(&section, &flow, layout);
        let taint = Taint::of(&section, &flow, &memory);
        let witness = Witness::new(&section, &flow, &taint, &memory);
        findings.extend(sinks(&section, &taint).iter().map(|sink| witness.finding(sink)));
        add_counts(&mut counts, &section, &taint, &memory);
    }
    Ok((findings, counts))
}

/// `80` of `EF_CUDA_SM80`, or `100` of `.target sm_100a`.
fn architecture(listing: &str) -> Option<u32> {
    let mut lines = listing.lines().map(str::trim);
    let after = lines.find_map(|line| {
        let flags = line.starts_with(".headerflags").then(|| line.split_once("EF_CUDA_SM")).flatten();
        flags.or_else(|| line.starts_with(".target").then(|| line.split_once("sm_")).flatten())
    });
    let digits = after?.1.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

fn add_counts(counts: &mut Counts, section: &Section, taint: &Taint, memory: &Memory) {
    let count = |f: &dyn Fn(usize) -> bool| (0..section.instructions.len()).filter(|&index| f(index)).count() as u64;
    let opcode = |index: usize| section.instructions[index].opcode;
    let guarded = |index: usize| section.instructions[index].guard.is_some();
    let (shared, assumed) = memory.counts();
    counts.understood += section.instructions.len() as u64;
    counts.reached += count(&|index| taint.live[index]);
    counts.guarded += count(&guarded);
    counts.conditional_control_flow +=
        count(&|index| opcode(index).is_control() && (guarded(index) || !taint.effects[index].steer.is_empty()));
    counts.sources +=
        count(&|index| taint.results[index] && opcode(index).is_source() || opcode(index).class == Class::CopyIn);
    counts.shared_accesses += shared as u64;
    counts.shared_assumed += assumed as u64;
}
