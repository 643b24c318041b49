//! The cluster bootstrap: processes are drawn, then blocks within each (Davison and Hinkley, "Bootstrap Methods and their
//! Application", section 3.8).
//!
//! A cross-check only: with about ten processes its percentile intervals are too narrow (Cameron, Gelbach and Miller,
//! "Bootstrap-based improvements for inference with clustered errors", Review of Economics and Statistics 90, 2008).

use super::order::{median, quantile, sorted};
use super::{CONFIDENCE, Interval};

/// Bootstrap samples.
const RESAMPLES: usize = 1000;

/// Means over processes of the median over blocks, of bootstrap samples. `processes` holds one value per block.
pub fn means(processes: &[Vec<f64>], seed: u64) -> Vec<f64> {
    let longest = processes.iter().map(Vec::len).max().unwrap_or(0);
    let stride = (processes.len() * (1 + longest)) as u64;
    let resample = |resample: usize| {
        let slot = |slot: usize| {
            let counter = resample as u64 * stride + (slot * (1 + longest)) as u64;
            let process = &processes[draw(seed, counter, processes.len())];
            let pick = |block: usize| process[draw(seed, counter + 1 + block as u64, process.len())];
            median(&(0..process.len()).map(pick).collect::<Vec<f64>>()).unwrap_or(0.0)
        };
        super::mean(&(0..processes.len()).map(slot).collect::<Vec<f64>>())
    };
    (0..RESAMPLES).map(resample).collect()
}

/// The percentile interval of bootstrap samples at 95 %.
pub fn percentile(samples: &[f64]) -> Interval {
    let sorted = sorted(samples);
    let tail = (1.0 - CONFIDENCE) / 2.0;
    Interval { low: quantile(&sorted, tail), high: quantile(&sorted, 1.0 - tail) }
}

/// The `counter`-th number below `bound` of a seed: SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", OOPSLA 2014), whose outputs need no state, so that the cross-check draws the same in numpy.
fn draw(seed: u64, counter: u64, bound: usize) -> usize {
    let mut z = seed.wrapping_add((counter + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((((z ^ (z >> 31)) >> 32) * bound as u64) >> 32) as usize
}
