//! One arm by itself.

use serde::{Deserialize, Serialize};

use super::order::{interval, median, quantile, sorted};
use super::series::pooled_acf;
use super::{CONFIDENCE, Interval, Series, changepoints, ess, finite};

/// The percentiles that are given.
const PERCENTILES: [f64; 5] = [0.5, 0.9, 0.95, 0.99, 0.999];
/// Effective samples that must be expected on either side of a percentile for its interval to be given.
const BEYOND: f64 = 10.0;

/// A percentile.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Percentile {
    /// Share of samples below.
    pub p: f64,
    /// Its value, in the samples' unit.
    pub ns: f64,
    /// Its interval at 95 %; `None` with fewer than ten effective samples on either side.
    pub ci: Option<Interval>,
}

/// One arm in one mode, over all processes; times in the samples' unit.
///
/// The intervals are about the processes that were seen: how far other processes may differ, only a comparison says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// Finite samples.
    pub samples: usize,
    /// Processes that have any.
    pub processes: usize,
    /// The middle of all samples.
    pub median: f64,
    /// Its interval by order statistics, with ranks from the effective sample size; see [`interval`].
    pub ci95: Option<Interval>,
    /// The 50th, 90th, 95th, 99th and 99.9th.
    pub percentiles: Vec<Percentile>,
    /// Mean.
    pub mean: f64,
    /// Standard deviation, unbiased variance.
    pub sd: f64,
    /// Median absolute deviation from the median, unscaled.
    pub mad: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
    /// Autocorrelation of neighbours, within processes.
    pub acf1: f64,
    /// Effective sample size, summed over processes; see [`ess`].
    pub ess: f64,
    /// Where the level changes within a process, as offsets into all samples one process after the other; see
    /// [`changepoints`].
    pub changepoints: Vec<usize>,
}

/// Describes samples by process; `None` without samples.
pub fn describe(processes: &[Series]) -> Option<Description> {
    let processes: Vec<Series> = processes.iter().map(|series| finite(series)).filter(|s| !s.is_empty()).collect();
    let all = processes.concat();
    let sorted = sorted(&all);
    let middle = median(&all)?;
    let deviations: Vec<f64> = all.iter().map(|sample| (sample - middle).abs()).collect();
    let ess: f64 = processes.iter().map(|series| ess(series)).sum();
    let percentile = |p: f64| {
        let known = ess * p.min(1.0 - p) >= BEYOND;
        let ci = known.then(|| interval(&sorted, p, ess, CONFIDENCE)).flatten();
        Percentile { p, ns: quantile(&sorted, p), ci }
    };
    let mut offset = 0;
    let mut changes = Vec::new();
    for series in &processes {
        changes.extend(changepoints(series).into_iter().map(|change| offset + change));
        offset += series.len();
    }
    Some(Description {
        samples: all.len(),
        processes: processes.len(),
        median: middle,
        ci95: interval(&sorted, 0.5, ess, CONFIDENCE),
        percentiles: PERCENTILES.map(percentile).to_vec(),
        mean: super::mean(&all),
        sd: super::variance(&all).sqrt(),
        mad: median(&deviations)?,
        min: *sorted.first()?,
        max: *sorted.last()?,
        acf1: pooled_acf(&processes, 1),
        ess,
        changepoints: changes,
    })
}
