//! How much samples in the order of time repeat each other.

/// Autocovariance at a lag, times the number of samples.
fn covariance(centred: &[f64], lag: usize) -> f64 {
    centred.iter().zip(centred.iter().skip(lag)).map(|(one, other)| one * other).sum()
}

/// Finite samples less their mean; exactly 0 where all are the same.
fn centred(series: &[f64]) -> Vec<f64> {
    let series = super::finite(series);
    let mean = if series.is_empty() { 0.0 } else { super::mean(&series) };
    series.iter().map(|sample| sample - mean).collect()
}

/// Autocorrelation at a lag, from autocovariances that divide by the number of samples (Box and Jenkins, "Time Series
/// Analysis", section 2.1.5); 0 for a constant series.
pub fn acf(series: &[f64], lag: usize) -> f64 {
    pooled_acf(&[series], lag)
}

/// The same within several series, each about its own mean.
pub(super) fn pooled_acf(processes: &[impl AsRef<[f64]>], lag: usize) -> f64 {
    let (mut at_lag, mut at_zero) = (0.0, 0.0);
    for series in processes {
        let centred = centred(series.as_ref());
        at_lag += covariance(&centred, lag);
        at_zero += covariance(&centred, 0);
    }
    if at_zero > 0.0 { at_lag / at_zero } else { 0.0 }
}

/// Effective sample size: how many independent samples would tell the mean as well.
///
/// `n / (2 sum G_k - 1)` with `G_k = acf(2k) + acf(2k + 1)`, up to the first that is not positive: Geyer's initial positive
/// sequence ("Practical Markov chain Monte Carlo", Statistical Science 7, 1992, section 3.3). Never more than the number
/// of samples, and all of them for a constant series.
pub fn ess(series: &[f64]) -> f64 {
    let centred = centred(series);
    let count = centred.len();
    let variance = covariance(&centred, 0);
    if variance == 0.0 {
        return count as f64;
    }
    let pair = |k: usize| (covariance(&centred, 2 * k) + covariance(&centred, 2 * k + 1)) / variance;
    let sum: f64 = (0..count / 2).map(pair).take_while(|&pair| pair > 0.0).sum();
    (count as f64 / (2.0 * sum - 1.0).max(1.0)).min(count as f64)
}
