//! The correctness rule: how far from the oracle is as good as the arithmetic allows.

use serde::Serialize;

use super::oracle::Reference;
use crate::attention::Problem;
use crate::dtype::DType;

/// The verdict on an output, from [`judge`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ErrorReport {
    /// Largest `|actual - oracle|`.
    pub e: f64,
    /// Largest `|eager - oracle|`.
    pub e_ref: f64,
    /// `e / e_ref`; 1 when both are 0.
    pub ratio: f64,
    /// What `e` must not exceed: `1.5 * e_ref` and one unit.
    pub bound: f64,
    /// Largest error in units of its row.
    pub max_ulp: f64,
    /// The same for the eager reference.
    pub max_ulp_ref: f64,
    /// Frobenius norm of the error over that of the oracle.
    pub rel_fro: f64,
    /// The same for the eager reference. Over a suite, `rel_fro / rel_fro_ref` shows small biases that the rule lets by.
    pub rel_fro_ref: f64,
    /// Elements of another kind (finite, NaN, +inf, -inf) than they should be.
    pub misplaced: usize,
    /// Elements for which the range of fp32 is too short; see [`judge`].
    pub out_of_range: usize,
    /// Whether the output is right.
    pub pass: bool,
}

/// The verdict on a log-sum-exp, from [`judge_lse`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LseReport {
    /// Largest `|actual - oracle|`.
    pub e: f64,
    /// Largest error over its bound.
    pub ratio: f64,
    /// As in [`ErrorReport`].
    pub misplaced: usize,
    /// As in [`ErrorReport`].
    pub out_of_range: usize,
    /// Whether the log-sum-exp is right.
    pub pass: bool,
}

/// Judges an output, contiguous and widened to fp64: `e <= 1.5 * e_ref + 1 unit`, where `e` is the largest error against
/// the fp64 oracle and `e_ref` that of eager attention in the same precision. It must hold twice, in absolute terms and
/// with every error counted in units of its own row:
///
/// - absolutely, with the largest unit of any row. Alone, this would be blind wherever rows differ in size: under a
///   causal band the first row is a value itself and the thousandth an average near 0, which could be all wrong within
///   the rounding of the first.
/// - by row, `max_ulp <= 1.5 * max_ulp_ref + 1`. The reference's maximum is over all rows, so a row is not failed because
///   the reference happened to be exact there.
///
/// The unit of a row is one unit in the last place of the element type at the row's magnitude, the larger of its
/// largest output and the root-mean-square `sqrt(sum p_j^2 mean(v_j^2))` that its outputs would have were the signs of
/// the values random (a row that cancels to almost 0 is not held to the precision of 0); and the rounding that fp32
/// scores and sums of this length cannot avoid, `2^-23 (sqrt(keys) + |lse| + |scale| |q| rms|k|)` of that magnitude. The
/// second part is nothing beside an f16 ulp; it is what makes the rule fair to f32 problems of few elements, where
/// `e_ref` is a matter of luck. For an fp64 problem it is fp64 rounding, and the unit is four times as large, because the
/// oracle then has errors of the same size.
///
/// NaN and infinities must be where the oracle's are. Two exceptions are counted in `out_of_range`: a row whose scores
/// overflow fp32, so that the eager reference has no finite log-sum-exp where the oracle has one, is not judged; and an
/// element may be of the eager reference's kind, as when a weight underflows against an infinite value.
///
/// # Panics
/// When the lengths are not those of the problem's output, or the first reference is not an oracle's.
pub fn judge(problem: &Problem, actual: &[f64], oracle: &Reference, eager: &Reference) -> ErrorReport {
    let dim = problem.head_dim_v;
    assert_eq!(actual.len(), oracle.out.len(), "output of {problem}");
    assert_eq!(eager.out.len(), oracle.out.len(), "eager reference of {problem}");
    assert_eq!(oracle.out_unit.len() * dim, oracle.out.len(), "oracle of {problem}");

    let mut kinds = Kinds::default();
    let [mut e, mut e_ref, mut max_ulp, mut max_ulp_ref] = [0f64; 4];
    let [mut error, mut error_ref, mut norm] = [0f64; 3];
    for (i, ((&x, &exact), &reference)) in actual.iter().zip(&oracle.out).zip(&eager.out).enumerate() {
        let row = i / dim;
        if oracle.lse[row].is_finite() != eager.lse[row].is_finite() {
            kinds.out_of_range += 1;
            continue;
        }
        let unit = oracle.out_unit[row];
        kinds.compare(x, exact, reference);
        if exact.is_finite() && x.is_finite() {
            let d = (x - exact).abs();
            e = e.max(d);
            max_ulp = max_ulp.max(d / unit);
            error += d * d;
            norm += exact * exact;
        }
        if exact.is_finite() && reference.is_finite() {
            let d = (reference - exact).abs();
            e_ref = e_ref.max(d);
            max_ulp_ref = max_ulp_ref.max(d / unit);
            error_ref += d * d;
        }
    }
    let bound = 1.5 * e_ref + oracle.out_unit.iter().copied().fold(0.0, f64::max);
    ErrorReport {
        e,
        e_ref,
        ratio: quotient(e, e_ref, 1.0),
        bound,
        max_ulp,
        max_ulp_ref,
        rel_fro: quotient(error.sqrt(), norm.sqrt(), 0.0),
        rel_fro_ref: quotient(error_ref.sqrt(), norm.sqrt(), 0.0),
        misplaced: kinds.misplaced,
        out_of_range: kinds.out_of_range,
        pass: kinds.misplaced == 0 && e <= bound && max_ulp <= 1.5 * max_ulp_ref + 1.0,
    }
}

/// Judges a log-sum-exp, contiguous: every element within 8 units of the oracle's and never further than `1e-3` of
/// `max(1, |lse|)`; `-inf`, for rows that see no key, exactly where the oracle has it. The unit of an element is
/// `2^-24 (1 + sqrt(keys) + |lse| + |scale| |q| rms|k|)`: the rounding of the result and of a sum of that many weights,
/// of the exponents, and of the scores under the weights, each as it adds up statistically. The factor leaves room for
/// approximate exponentials and for tensor cores that truncate.
///
/// # Panics
/// As [`judge`].
pub fn judge_lse(problem: &Problem, actual: &[f32], oracle: &Reference, eager: &Reference) -> LseReport {
    assert_eq!(actual.len(), oracle.lse.len(), "log-sum-exp of {problem}");
    assert_eq!(eager.lse.len(), oracle.lse.len(), "eager reference of {problem}");
    assert_eq!(oracle.lse_unit.len(), oracle.lse.len(), "oracle of {problem}");

    let mut kinds = Kinds::default();
    let [mut e, mut ratio] = [0f64; 2];
    for (i, &x) in actual.iter().enumerate() {
        let (x, exact) = (f64::from(x), oracle.lse[i]);
        // An LSE beyond the range of fp32 is an infinity there.
        kinds.compare(x, f64::from(exact as f32), eager.lse[i]);
        if exact.is_finite() && x.is_finite() {
            let bound = lse_bound(exact, oracle.lse_unit[i]);
            e = e.max((x - exact).abs());
            ratio = ratio.max((x - exact).abs() / bound);
        }
    }
    let Kinds { misplaced, out_of_range } = kinds;
    LseReport { e, ratio, misplaced, out_of_range, pass: misplaced == 0 && ratio <= 1.0 }
}

/// How far an element of a log-sum-exp may be from the oracle's; see [`judge_lse`].
pub fn lse_bound(exact: f64, unit: f64) -> f64 {
    (8.0 * unit).min(1e-3 * exact.abs().max(1.0))
}

/// One unit in the last place of a type at a magnitude: the distance between its numbers there.
pub(crate) fn ulp(dtype: DType, magnitude: f64) -> f64 {
    let (mantissa, min_exponent) = match dtype {
        DType::F16 => (10, -14),
        DType::BF16 => (7, -126),
        DType::F32 => (23, -126),
        DType::F64 => (52, -1022),
        DType::Bool => unreachable!("attention has no bool output"),
    };
    let exponent = (magnitude.to_bits() >> 52 & 0x7ff) as i32 - 1023;
    f64::from(exponent.max(min_exponent) - mantissa).exp2()
}

/// How many elements are of the wrong kind.
#[derive(Default)]
struct Kinds {
    misplaced: usize,
    out_of_range: usize,
}

impl Kinds {
    fn compare(&mut self, actual: f64, oracle: f64, eager: f64) {
        let alike = |x: f64| (actual.is_finite() && x.is_finite()) || (actual.is_nan() && x.is_nan()) || actual == x;
        if !alike(oracle) {
            let count = if alike(eager) { &mut self.out_of_range } else { &mut self.misplaced };
            *count += 1;
        }
    }
}

fn quotient(x: f64, y: f64, neither: f64) -> f64 {
    if x == 0.0 && y == 0.0 { neither } else { x / y }
}
