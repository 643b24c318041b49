//! What the benchmarks share.

use std::time::Duration;

use flashcore::Result;

/// The time of `iterations` measurements, each in microseconds.
///
/// # Panics
/// When a measurement fails: a benchmark has nobody to tell.
pub fn total(iterations: u64, mut microseconds: impl FnMut() -> Result<f64>) -> Duration {
    let total: f64 =
        (0..iterations).map(|_| microseconds().unwrap_or_else(|error| panic!("while measuring: {error}"))).sum();
    Duration::from_secs_f64(total / 1e6)
}
