//! Is a kernel right, how fast is it, and has it become slower? The harness behind `flashcore-validate`.
//!
//! - [`Case`] is a problem as data; [`matrix`] lists the problems that the library must solve, [`random_cases`] draws more,
//!   [`classic`] are the nine that it is measured on, and a [`CaseFile`] has others.
//! - A [`Subject`] computes attention: a [`Runtime`](crate::Runtime) on a device or on the CPU, or a [`Mutant`].
//! - [`check`] draws independent inputs from a seed, runs a subject into poisoned memory, and judges what it wrote against
//!   the fp64 oracle; [`check_properties`] compares results with each other.
//! - [`run_suite`] takes samples in fresh processes, [`stats`] says what they mean; [`ct_time`] asks whether times depend
//!   on values.
//! - [`Evidence`] is what is kept of a run, and [`cli`] the command line. `docs/validation.md` has the method.

mod baseline;
mod case;
mod casefile;
pub mod cli;
mod correct;
pub mod ct_time;
mod dump;
mod environment;
mod host;
mod inputs;
mod matrix;
mod measure;
mod mutants;
mod open;
mod properties;
mod random;
mod report;
pub mod stats;
mod subject;
mod summary;
mod trial;
mod ui;

#[cfg(test)]
mod tests;

pub use self::baseline::{Document, compare_documents};
pub use self::case::{Case, Hidden, Mask, MaskType, Memory, Order, Special, SpecialTensor, SpecialValue};
pub use self::casefile::CaseFile;
pub use self::correct::{Verdict, check, check_repeatedly, check_variant};
pub use self::environment::{Board, BundleRecord, Environment, Gpu, State};
pub use self::host::{Damage, HostTensor};
pub use self::inputs::Inputs;
pub use self::matrix::{Extent, classic, matrix};
pub use self::measure::{
    Arm, ArmSpec, LAUNCHES, Mode, ProcessReport, Protocol, Raw, Sample, Source, Suite, Warmup, run_process, run_suite,
};
pub use self::mutants::{Fault, Kill, Mutant, hunt, mutants};
pub use self::properties::{PropertyVerdict, check_properties, property_cases};
pub use self::random::{random_cases, random_cases_of};
pub use self::report::{Evidence, Section, TestOutcome, junit, markdown, outcomes, sections};
pub use self::subject::{Ran, Subject};
pub use self::summary::{CompareRow, Floor, MeasureRow, Measured, Timer, flops};

/// How a run ended, as the exit code of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Everything passed.
    Pass = 0,
    /// A wrong result.
    Correctness = 1,
    /// Slower than the baseline.
    Regression = 2,
    /// A constant-time violation.
    ConstantTime = 3,
    /// Not enough data for a verdict.
    Inconclusive = 4,
    /// The environment or the command line does not allow the run.
    Environment = 5,
    /// The harness does not work as it should.
    Selftest = 6,
}

impl Exit {
    /// In one word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Correctness => "FAIL",
            Self::Regression => "REGRESSION",
            Self::ConstantTime => "NOT CONSTANT-TIME",
            Self::Inconclusive => "INCONCLUSIVE",
            Self::Environment => "NOT RUN",
            Self::Selftest => "SELFTEST FAILED",
        }
    }

    /// The graver of two ends.
    pub fn and(self, other: Self) -> Self {
        let gravity = |exit| match exit {
            Self::Pass => 0,
            Self::Inconclusive => 1,
            Self::Environment => 2,
            Self::Regression => 3,
            Self::ConstantTime => 4,
            Self::Correctness => 5,
            Self::Selftest => 6,
        };
        if gravity(other) > gravity(self) { other } else { self }
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
