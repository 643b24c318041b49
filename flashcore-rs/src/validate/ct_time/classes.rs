//! Classes of inputs that one shape may hold, as far apart as values can be.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use serde::Serialize;

use super::super::case::Case;
use super::super::inputs::Inputs;
use crate::error::Result;

/// What the tensors hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Standard normal numbers: what the others are compared with.
    Random,
    /// The same from another seed: a comparison that must find nothing.
    RandomAgain,
    /// Zeros.
    Zeros,
    /// Ones.
    Constant,
    /// Scores grow from key to key: every tile has a new maximum.
    Ascending,
    /// Scores fall from key to key: the first tile has the maximum.
    Descending,
    /// Subnormal numbers.
    Subnormal,
    /// Numbers near the largest, of both signs.
    Extremes,
}

/// All, the reference first.
pub const CLASSES: [Class; 8] = [
    Class::Random,
    Class::RandomAgain,
    Class::Zeros,
    Class::Constant,
    Class::Ascending,
    Class::Descending,
    Class::Subnormal,
    Class::Extremes,
];

/// Magnitudes that binary16 holds: its largest number is 65504, its smallest normal one 6.1e-5.
const LARGE: f32 = 60000.0;
const SUBNORMAL: f32 = 3.0e-6;
/// Difference between the largest and the smallest score of a row, in units of the query's norm.
const SPREAD: f32 = 4.0;

impl Class {
    /// The inputs of a case that are of this class.
    ///
    /// # Errors
    /// As [`Inputs::draw`].
    pub fn draw(self, case: &Case, seed: u64) -> Result<Inputs> {
        let mut inputs = Inputs::draw(case, if self == Self::RandomAgain { seed ^ 0x5eed } else { seed })?;
        let keys = case.seq_len_k.max(1) as f32;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut normal = move || rng.sample::<f64, _>(StandardNormal) as f32;
        let Inputs { query, key, value, .. } = &mut inputs;
        let all = [query, key, value];
        match self {
            Self::Random | Self::RandomAgain => {}
            Self::Zeros => all.map(|tensor| tensor.draw(|_| 0.0)).into_iter().collect(),
            Self::Constant => all.map(|tensor| tensor.draw(|_| 1.0)).into_iter().collect(),
            Self::Subnormal => all.map(|tensor| tensor.draw(|_| SUBNORMAL * normal())).into_iter().collect(),
            Self::Extremes => all.map(|tensor| tensor.draw(|_| LARGE.copysign(normal()))).into_iter().collect(),
            Self::Ascending | Self::Descending => {
                let [query, key, _] = all;
                query.draw(|_| 1.0);
                let sign = if self == Self::Ascending { 1.0 } else { -1.0 };
                key.draw(|[_, _, row, _]| sign * SPREAD * (row as f32 / keys - 0.5) + 0.01 * normal());
            }
        }
        Ok(inputs)
    }
}
