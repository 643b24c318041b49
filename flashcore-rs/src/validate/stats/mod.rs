//! What samples of time say, and what they do not: descriptions of one arm, ratios of two, and verdicts on suites.
//!
//! Samples within a process are not independent, and processes differ by more than their samples do (Kalibera and Jones,
//! "Rigorous benchmarking in reasonable time", ISMM 2013). So the unit of every test is the process: [`compare`] makes one
//! log ratio of each, from interleaved blocks, and [`judge_suite`] tests those. [`describe`] is about the processes that
//! were seen, and its intervals count autocorrelated samples for what they are worth. [`calibrate`] plants slowdowns in
//! synthetic suites and counts what the same rules make of them.
//!
//! Samples that are not finite are ignored everywhere. No result is NaN.

mod bootstrap;
mod changes;
mod clock;
mod describe;
mod multiple;
mod order;
mod rank;
mod ratio;
mod series;
mod simulate;
mod student;
mod verdict;

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use self::changes::{changepoints, steady};
pub use self::clock::quantum;
pub use self::describe::{Description, Percentile, describe};
pub use self::multiple::{benjamini_hochberg, holm};
pub use self::order::{interval, median, quantile};
pub use self::rank::{hodges_lehmann, mann_whitney, shift};
pub use self::ratio::{Block, Comparison, Settings, compare, compare_unpaired};
pub use self::series::{acf, ess};
pub use self::simulate::{Bound, Calibration, Noise, Plan, Question, calibrate, clopper_pearson};
pub use self::verdict::{Judged, MIN_PROCESSES, Outcome, judge_suite};

/// Samples of one process in the order of time, in nanoseconds.
pub type Series = Vec<f64>;

/// From `low` to `high`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// The interval of a monotone function of what this one is of.
    fn map(self, function: impl Fn(f64) -> f64) -> Self {
        Self { low: function(self.low), high: function(self.high) }
    }
}

/// Coverage of every interval that has `95` in its name.
const CONFIDENCE: f64 = 0.95;

/// What of the samples is a number.
fn finite(samples: &[f64]) -> Vec<f64> {
    samples.iter().copied().filter(|sample| sample.is_finite()).collect()
}

/// The mean of at least one value; of equal ones it is exact.
fn mean(values: &[f64]) -> f64 {
    let first = values[0];
    first + values.iter().map(|value| value - first).sum::<f64>() / values.len() as f64
}

/// Unbiased variance of at least one value, of which it is 0.
fn variance(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    squares / values.len().saturating_sub(1).max(1) as f64
}
