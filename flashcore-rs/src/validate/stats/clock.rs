//! The step of a clock, from what it said.

use super::order::sorted;

/// Differences of samples below this share of the largest are rounding: event times come as 32-bit floats, whose
/// differences are off by up to 2^-23.
const ROUNDING: f64 = 1.0 / (1 << 22) as f64;
/// How far from a whole number of steps a difference may be, in steps.
const SLACK: f64 = 0.05;

/// The largest step of which all differences between samples are multiples, up to rounding: an approximate greatest
/// common divisor by Euclid's algorithm, refined by least squares. `None` where fewer than two values differ, or where
/// the step would be less than 2^-19 of the largest sample, as it is for a clock that is finer than its noise.
pub fn quantum(samples: &[f64]) -> Option<f64> {
    let sorted = sorted(samples);
    let largest = sorted.first()?.abs().max(sorted.last()?.abs());
    let rounding = ROUNDING * largest;
    let mut steps: Vec<f64> = sorted.windows(2).map(|pair| pair[1] - pair[0]).filter(|&step| step > rounding).collect();
    steps.sort_unstable_by(f64::total_cmp);
    steps.dedup();
    let mut divisor = *steps.first()?;
    for &step in &steps {
        divisor = common(step, divisor, rounding);
        if divisor < 8.0 * rounding {
            return None;
        }
    }
    let (mut products, mut squares) = (0.0, 0.0);
    for step in steps {
        let count = (step / divisor).round();
        products += count * step;
        squares += count * count;
    }
    Some(products / squares)
}

/// The greatest common divisor of a step and a smaller one, where a remainder that is slight is none.
fn common(step: f64, divisor: f64, rounding: f64) -> f64 {
    let (mut larger, mut smaller) = (step, divisor);
    loop {
        let remainder = (larger - smaller * (larger / smaller).round()).abs();
        if remainder <= rounding.max(SLACK * smaller) {
            return smaller;
        }
        (larger, smaller) = (smaller, remainder);
    }
}
