//! Quantiles, and intervals for them that assume no distribution.

use statrs::distribution::{Binomial, DiscreteCDF};

use super::Interval;

/// Finite samples in ascending order.
pub(super) fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = super::finite(samples);
    sorted.sort_unstable_by(f64::total_cmp);
    sorted
}

/// The middle of the finite samples, or the mean of the middle two; `None` without any.
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut samples = super::finite(samples);
    let half = samples.len() / 2;
    if samples.is_empty() {
        return None;
    }
    let even = samples.len().is_multiple_of(2);
    let (below, &mut middle, _) = samples.select_nth_unstable_by(half, f64::total_cmp);
    let other = if even { below.iter().copied().fold(f64::NEG_INFINITY, f64::max) } else { middle };
    Some((other + middle) / 2.0)
}

/// The quantile `p` of ascending samples, at least one, interpolated between the two around rank `p (n - 1)` (type 7 of
/// Hyndman and Fan, "Sample quantiles in statistical packages", The American Statistician 50, 1996).
pub fn quantile(sorted: &[f64], p: f64) -> f64 {
    let at = p * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// A confidence interval for the quantile `p` of what ascending samples are drawn from, from two of them: of `n`
/// independent samples the count below the quantile is binomial (David and Nagaraja, "Order Statistics", 3rd edition,
/// section 7.1). Each side errs by at most half of `1 - confidence`; `None` where not even the extremes are enough.
///
/// With fewer effective samples than samples, `n` is the integer part of `ess`, each rank of `n` stands for an equal
/// share of the samples, and the interval takes in the shares of both its ranks.
pub fn interval(sorted: &[f64], p: f64, ess: f64, confidence: f64) -> Option<Interval> {
    let n = (ess as usize).min(sorted.len());
    let binomial = Binomial::new(p, n as u64).ok()?;
    let error = (1.0 - confidence) / 2.0;
    // P(count < low) <= error, with the largest such rank; P(count >= high) <= error, with the smallest.
    let low = first(n, |rank| binomial.cdf(rank as u64) > error);
    let high = 1 + first(n, |rank| binomial.sf(rank as u64) <= error);
    if low == 0 || high > n {
        return None;
    }
    let share = |rank: usize| rank * sorted.len();
    Some(Interval { low: sorted[share(low - 1) / n], high: sorted[share(high).div_ceil(n) - 1] })
}

/// The first of `0..n` for which a condition holds that then goes on to hold, else `n`.
fn first(n: usize, condition: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, n);
    while low < high {
        let middle = low + (high - low) / 2;
        if condition(middle) { high = middle } else { low = middle + 1 }
    }
    low
}
