//! Do two classes of inputs take the same time, up to a margin? A test on the nine deciles of paired samples.
//!
//! Samples come in rounds, in each of which every class has its turn, in random order. Rounds near each other are
//! alike (clocks, temperature), so that the bootstrap draws blocks of rounds, the same for both classes.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// Rounds of one block.
const BLOCK: usize = 10;
/// Bootstrap samples.
const RESAMPLES: usize = 400;

/// What the test says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// All deciles differ by less than the margin.
    Same,
    /// Some decile differs by more.
    Different,
    /// The data do not decide.
    Inconclusive,
}

/// A comparison of two classes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// What the test says.
    pub outcome: Outcome,
    /// The margin.
    pub margin: f64,
    /// Differences of the deciles.
    pub deciles: [f64; 9],
    /// Half the width of the simultaneous confidence band around all of them.
    pub band: f64,
    /// The smallest difference that these data would have shown for sure.
    pub detectable: f64,
}

/// Compares paired samples at an error rate: the chance to call classes different that differ by less than the margin,
/// and to call those the same that differ by more.
pub fn compare(one: &[f64], other: &[f64], margin: f64, error: f64, seed: u64) -> Comparison {
    let deciles = differences(one, other);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut deviations: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let rounds = resample(one.len().min(other.len()), &mut rng);
            let pick = |samples: &[f64]| -> Vec<f64> { rounds.iter().map(|&round| samples[round]).collect() };
            let drawn = differences(&pick(one), &pick(other));
            drawn.iter().zip(deciles).map(|(drawn, seen)| (drawn - seen).abs()).fold(0.0, f64::max)
        })
        .collect();
    deviations.sort_by(f64::total_cmp);
    let band = deviations[((1.0 - error) * (RESAMPLES - 1) as f64).ceil() as usize];
    let largest = deciles.iter().map(|difference| difference.abs()).fold(0.0, f64::max);
    let outcome = if largest - band > margin {
        Outcome::Different
    } else if largest + band <= margin {
        Outcome::Same
    } else {
        Outcome::Inconclusive
    };
    Comparison { outcome, margin, deciles, band, detectable: margin + 2.0 * band }
}

/// The share of trials in which the test calls classes different: rounds are drawn anew, and with `swap` each round's
/// samples change places at random, so that there is nothing to find.
pub fn rate(one: &[f64], other: &[f64], margin: f64, error: f64, trials: usize, swap: bool, seed: u64) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let different = (0..trials).filter(|&trial| {
        let rounds = resample(one.len().min(other.len()), &mut rng);
        let mut pairs: Vec<(f64, f64)> = rounds.iter().map(|&round| (one[round], other[round])).collect();
        if swap {
            pairs.chunks_mut(BLOCK).for_each(|block| {
                if rng.random_bool(0.5) {
                    block.iter_mut().for_each(|pair| *pair = (pair.1, pair.0));
                }
            });
        }
        let (one, other): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
        compare(&one, &other, margin, error, seed ^ trial as u64).outcome == Outcome::Different
    });
    different.count() as f64 / trials.max(1) as f64
}

/// Figures of several rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The middle one.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// How many.
    pub rounds: usize,
}

impl Summary {
    /// Sums up at least one figure.
    pub fn of(figures: &[f64]) -> Self {
        let mut sorted = figures.to_vec();
        sorted.sort_by(f64::total_cmp);
        let [low, high] = [(sorted.len() - 1) / 2, sorted.len() / 2];
        Self {
            median: (sorted[low] + sorted[high]) / 2.0,
            min: sorted[0],
            max: sorted[sorted.len() - 1],
            rounds: sorted.len(),
        }
    }
}

/// Rounds in blocks, drawn with replacement.
fn resample(count: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let block = BLOCK.min(count.max(1));
    let mut rounds = Vec::with_capacity(count + block);
    while rounds.len() < count {
        let start = rng.random_range(0..count);
        rounds.extend((start..start + block).map(|round| round % count));
    }
    rounds.truncate(count);
    rounds
}

fn differences(one: &[f64], other: &[f64]) -> [f64; 9] {
    let [one, other] = [deciles(one), deciles(other)];
    std::array::from_fn(|i| one[i] - other[i])
}

fn deciles(samples: &[f64]) -> [f64; 9] {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1) as f64;
    std::array::from_fn(|i| {
        let at = last * (i + 1) as f64 / 10.0;
        let (low, share) = (at.floor() as usize, at.fract());
        let value = |index: usize| sorted.get(index).or(sorted.last()).copied().unwrap_or(0.0);
        value(low) * (1.0 - share) + value(low + 1) * share
    })
}

#[cfg(test)]
mod tests {
    use rand_distr::StandardNormal;

    use super::*;

    /// Times around 10, with a drift that both classes share, and now and then a late one.
    fn samples(rounds: usize, shift: f64, seed: u64) -> (Vec<f64>, Vec<f64>) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut drift = 0.0;
        let pair = |_| {
            drift = 0.9 * drift + 0.02 * rng.sample::<f64, _>(StandardNormal);
            let mut time = |shift: f64| {
                let late = if rng.random_bool(0.02) { 1.0 } else { 0.0 };
                10.0 + shift + drift + 0.03 * rng.sample::<f64, _>(StandardNormal) + late
            };
            (time(0.0), time(shift))
        };
        (0..rounds).map(pair).unzip()
    }

    fn share(outcome: Outcome, shift: f64, margin: f64) -> f64 {
        let trial = |seed: u64| {
            let (one, other) = samples(400, shift, seed);
            compare(&one, &other, margin, 0.05, seed).outcome == outcome
        };
        const TRIALS: u64 = 60;
        (0..TRIALS).filter(|&seed| trial(seed)).count() as f64 / TRIALS as f64
    }

    #[test]
    fn false_alarms_are_rare_and_shifts_are_found() {
        const MARGIN: f64 = 0.01;
        assert!(share(Outcome::Different, 0.0, MARGIN) <= 0.05);
        assert!(share(Outcome::Different, MARGIN, MARGIN) <= 0.05);
        assert!(share(Outcome::Different, 0.05, MARGIN) >= 0.95);
    }

    #[test]
    fn what_differs_is_not_called_the_same() {
        assert!(share(Outcome::Same, 0.05, 0.05) <= 0.05);
        assert!(share(Outcome::Same, 0.0, 0.05) >= 0.9);
    }

    #[test]
    fn a_change_of_the_spread_alone_is_found() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut times = |spread: f64| -> Vec<f64> {
            (0..400).map(|_| 10.0 + spread * rng.sample::<f64, _>(StandardNormal)).collect()
        };
        let (narrow, wide) = (times(0.02), times(0.2));
        assert_eq!(compare(&narrow, &wide, 0.02, 0.05, 0).outcome, Outcome::Different);
    }

    #[test]
    fn rates_say_what_a_single_test_does() {
        let (one, other) = samples(400, 0.08, 3);
        assert!(rate(&one, &other, 0.01, 0.05, 40, false, 0) >= 0.95);
        assert!(rate(&one, &other, 0.01, 0.05, 40, true, 0) <= 0.05);
    }
}
