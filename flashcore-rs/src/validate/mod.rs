//! Is a kernel right, and how fast is it? The harness behind `flashcore-validate`.
//!
//! - [`Case`] is a problem as data; [`matrix`] lists the problems that the library must solve, [`classic`] the nine that
//!   it is measured on.
//!   [`random_cases`] draws more.
//! - A [`Subject`] computes attention: a [`Runtime`](crate::Runtime) on a device or on the CPU.
//! - [`check`] draws independent inputs from a seed, runs a subject into poisoned memory, and judges what it wrote against
//!   the fp64 oracle.
//! - [`check_properties`] holds a subject to what is true of attention whatever the inputs ([`property_cases`]).
//! - [`measure`] times whole calls and launches; [`ct_time`] asks whether times depend on values.
//! - [`Evidence`] is what is kept of a run, and [`cli`] the command line.

mod case;
pub mod cli;
mod correct;
pub mod ct_time;
mod dump;
mod host;
mod inputs;
mod matrix;
mod measure;
pub mod mutants;
mod properties;
mod random;
mod report;
mod subject;
mod trial;
mod ui;

#[cfg(test)]
mod tests;

pub use self::case::{Case, Hidden, Mask, MaskType, Memory, Order, Special, SpecialTensor, SpecialValue};
pub use self::correct::{Verdict, check, check_repeatedly, check_variant};
pub use self::host::{Damage, HostTensor};
pub use self::inputs::Inputs;
pub use self::matrix::{Extent, classic, matrix};
pub use self::measure::{Arm, Floor, LAUNCHES, Measurement, Protocol, Summary, measure};
pub use self::properties::{PropertyVerdict, check_properties, property_cases};
pub use self::random::{random_cases, random_cases_of};
pub use self::report::{CorrectRow, Environment, Evidence, MeasureRow};
pub use self::subject::{Ran, Subject};

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
