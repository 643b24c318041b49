//! Against values from scipy, against simpler definitions, and on samples whose truth is known.

mod calibration;
mod one_arm;
mod two_arms;

use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use super::*;

fn close(one: f64, other: f64, relative: f64) -> bool {
    (one - other).abs() <= relative * one.abs().max(other.abs())
}

/// A first-order autoregressive series with variance 1.
fn autoregressive(count: usize, phi: f64, rng: &mut ChaCha8Rng) -> Series {
    let mut state: f64 = rng.sample(StandardNormal);
    let step = |_| {
        state = phi * state + (1.0 - phi * phi).sqrt() * rng.sample::<f64, _>(StandardNormal);
        state
    };
    (0..count).map(step).collect()
}

/// Anything that a caller can put into a sample.
fn any_sample() -> impl Strategy<Value = f64> {
    prop_oneof![4 => 1e3..1e6_f64, 1 => Just(2e4), 1 => (0..8_u32).prop_map(|ticks| 32.0 * f64::from(ticks)), 1 => any::<f64>()]
}
