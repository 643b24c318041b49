//! How long does it take? Samples by a protocol that does not mix what must not be mixed.
//!
//! A [`Suite`] is cases, one or two [`ArmSpec`]s to run them with, and a [`Protocol`]. It runs in several fresh
//! processes, one after the other, because what differs between processes (where memory lies, what the clock does) is
//! more than what differs within one. In each, blocks of samples of every case and mode follow one another in random
//! order; within a block the arms take turns, in one of both orders, so that drift reaches both alike.
//!
//! - `call`: the whole call by the host's clock: the queue is empty, the clock starts, the call is made into an existing
//!   output, the stream is synchronised, the clock stops. What a caller waits for, and the headline.
//! - `cold`, `hot`: one launch between two events, with the L2 cache flushed before or after another launch of the same.
//! - `graph`: one of [`LAUNCHES`] launches in a captured graph, between two events.
//!
//! In the last three a gate holds the stream until a whole block is queued, so that no host time is between the events.
//! After each sample the clock of an SM is read.

mod arm;
mod bench;
mod process;
mod samples;
mod spec;

pub use self::arm::{Arm, LAUNCHES};
pub use self::process::{ProcessReport, Warmup, run_process, run_suite};
#[cfg(test)]
pub(super) use self::process::{measure_on, read_lines};
pub(super) use self::samples::gzip;
pub use self::samples::{Raw, Sample};
pub use self::spec::{ArmSpec, Mode, Protocol, Source, Suite};
