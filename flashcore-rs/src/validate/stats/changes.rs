//! Where the level of a series changes.

use super::clock::quantum;
use super::order::{median, sorted};

/// Samples of the shortest level: fewer are an outlier.
const SHORTEST: usize = 5;
/// Penalty of a change, in long-run variances times the logarithm of the number of samples. Schwarz's criterion has 2, for
/// Gaussian noise of known variance; times have heavier tails.
const PENALTY: f64 = 3.0;
/// Share of squared differences that count, the smallest, and what their mean is in a Gaussian of variance 1: with
/// `z = 1.2816`, the 90th percentile, and the density `f`, it is `1 - 2 z f(z) / 0.8`.
const TRIMMED: (f64, f64) = (0.8, 0.437_724_594_903_638_9);
/// Samples on either side in the filter for outliers, and how many standard deviations make one.
const HAMPEL: (usize, f64) = (3, 3.0);
/// Limit of the autocorrelation: beyond it a walk cannot be told from levels.
const LIMIT: f64 = 0.9;

/// Offsets among the finite samples at which another mean begins: the segmentation that minimises squares plus a penalty,
/// by PELT (Killick, Fearnhead and Eckley, "Optimal detection of changepoints with a linear computational cost", JASA 107,
/// 2012), after a Hampel filter has taken out lone outliers.
///
/// The penalty is `3 ln(n)` long-run variances. These are `variance * (1 + r) / (1 - r)`, where the autocorrelation `r` and
/// the variance come from differences at lags 1 and 2, which a few changes hardly touch (Chakar, Lebarbier, Lévy-Leduc and
/// Robin, "A robust approach for estimating change-points in the mean of an AR(1) process", Bernoulli 23, 2017, section 2):
/// their mean squares are `2 variance (1 - r)` and `2 variance (1 - r^2)`. Of the squares the largest fifth does not count;
/// medians, as in the paper, would be coarse for times in a few steps of a clock. `r` is kept from 0 to 0.9. The standard deviation counts as at least half the clock's step, which is the most that a time
/// between two ticks can have.
pub fn changepoints(series: &[f64]) -> Vec<usize> {
    let series = super::finite(series);
    let (Some(level), Some((sd, autocorrelation))) = (median(&series), noise(&series)) else { return Vec::new() };
    let centred: Vec<f64> = series.iter().map(|sample| sample - level).collect();
    let long_run = sd * sd * (1.0 + autocorrelation) / (1.0 - autocorrelation);
    pelt(&without_outliers(&centred, sd), PENALTY * (series.len() as f64).ln() * long_run)
}

/// Whether the level does not change in the last half of the samples, so that a warm-up may end. Too few samples to tell
/// are not steady.
pub fn steady(series: &[f64]) -> bool {
    let count = super::finite(series).len();
    count >= 2 * SHORTEST && changepoints(series).last().is_none_or(|&change| change <= count / 2)
}

/// Standard deviation and autocorrelation of the noise about the levels; `None` where nothing varies.
fn noise(series: &[f64]) -> Option<(f64, f64)> {
    let (one, two) = (difference(series, 1)?, difference(series, 2)?);
    let autocorrelation = if one > 0.0 { (two / one - 1.0).clamp(0.0, LIMIT) } else { 0.0 };
    let sd = (one / (2.0 * (1.0 - autocorrelation))).sqrt();
    let sd = sd.max(quantum(series).unwrap_or(0.0) / 2.0);
    (sd > 0.0).then_some((sd, autocorrelation))
}

/// Mean square of the differences at a lag, from the smallest of them.
fn difference(series: &[f64], lag: usize) -> Option<f64> {
    let (share, expected) = TRIMMED;
    let squares: Vec<f64> =
        series.iter().zip(series.iter().skip(lag)).map(|(one, other)| (other - one).powi(2)).collect();
    let counted = (share * squares.len() as f64).ceil() as usize;
    (counted > 0).then(|| super::mean(&sorted(&squares)[..counted]) / expected)
}

/// A sample far from the median of its neighbours and itself becomes that median.
fn without_outliers(series: &[f64], sd: f64) -> Vec<f64> {
    let (reach, limit) = HAMPEL;
    let filtered = |(i, &sample): (usize, &f64)| {
        let window = &series[i.saturating_sub(reach)..(i + reach + 1).min(series.len())];
        median(window).filter(|median| (sample - median).abs() > limit * sd).unwrap_or(sample)
    };
    series.iter().enumerate().map(filtered).collect()
}

/// The optimal partition into segments of at least [`SHORTEST`].
pub(super) fn pelt(series: &[f64], penalty: f64) -> Vec<usize> {
    let cost = Cost::new(series);
    let count = series.len();
    let mut best = vec![f64::INFINITY; count + 1];
    let mut previous = vec![0; count + 1];
    best[0] = -penalty;
    // Starts of the last segment, each with the last end for which it can be the best.
    let mut starts = Vec::new();
    for end in SHORTEST..=count {
        if best[end - SHORTEST].is_finite() {
            starts.push((end - SHORTEST, usize::MAX));
        }
        starts.retain(|&(_, last)| last >= end);
        for &(start, _) in &starts {
            let total = best[start] + cost.of(start, end) + penalty;
            if total < best[end] {
                (best[end], previous[end]) = (total, start);
            }
        }
        // What loses by more than a change costs is beaten by a change here, as soon as the segment after it is long enough.
        for (start, last) in &mut starts {
            if best[*start] + cost.of(*start, end) > best[end] {
                *last = (*last).min(end + SHORTEST - 1);
            }
        }
    }
    let mut changes: Vec<usize> =
        std::iter::successors(Some(previous[count]), |&change| Some(previous[change])).take_while(|&c| c > 0).collect();
    changes.reverse();
    changes
}

/// Sums from which the squares about the mean of any segment follow.
struct Cost {
    sums: Vec<f64>,
    squares: Vec<f64>,
}

impl Cost {
    fn new(series: &[f64]) -> Self {
        let running = |of: fn(f64) -> f64| {
            let sums = series.iter().scan(0.0, |sum, &sample| {
                *sum += of(sample);
                Some(*sum)
            });
            std::iter::once(0.0).chain(sums).collect()
        };
        Self { sums: running(|sample| sample), squares: running(|sample| sample * sample) }
    }

    fn of(&self, start: usize, end: usize) -> f64 {
        let sum = self.sums[end] - self.sums[start];
        self.squares[end] - self.squares[start] - sum * sum / (end - start) as f64
    }
}
