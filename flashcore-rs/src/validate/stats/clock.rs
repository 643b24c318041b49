//! The step of a clock, from what it said.

use super::order::sorted;

/// Differences of samples below this share of the largest are rounding: event times come as 32-bit floats, whose
/// differences are off by up to 2^-23.
const ROUNDING: f64 = 1.0 / (1 << 22) as f64;

/// The largest step of which all differences between samples are multiples, up to rounding: an approximate greatest
/// common divisor. `None` where fewer than two values differ, or where the step would be less than 2^-19 of the largest
/// sample, as it is for a clock that is finer than its noise.
///
/// Differences to the smallest sample are taken in ascending order. One that is no multiple of the step so far divides it
/// by the least number that makes it one, and each corrects the step. So the step is as good as the last difference, and
/// the next may be off by its own rounding and that of the last times how much larger it is.
pub fn quantum(samples: &[f64]) -> Option<f64> {
    let sorted = sorted(samples);
    let (&smallest, &largest) = (sorted.first()?, sorted.last()?);
    let rounding = ROUNDING * smallest.abs().max(largest.abs());
    let mut differences =
        sorted.iter().map(|sample| sample - smallest).skip_while(|&difference| difference <= rounding);
    let mut last = differences.next()?;
    let mut step = last;
    for difference in differences {
        let off = rounding * (1.0 + difference / last);
        let divided = (1..)
            .map(|divisor| step / f64::from(divisor))
            .take_while(|&step| step >= 8.0 * rounding)
            .find(|&step| (difference - step * (difference / step).round()).abs() <= off)?;
        step = difference / (difference / divided).round();
        last = difference;
    }
    Some(step)
}
