//! The arithmetic of the CPU backend: which type accumulates for which element, and an exponential that vectorises.

use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Sub};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::dtype::Element;
use crate::tensor::{HostElement, HostRef};

/// A type that scores, weights and sums are held in.
pub(crate) trait Real:
    Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
    + MulAssign
    + 'static
{
    const ZERO: Self;
    const NEG_INFINITY: Self;
    /// Largest relative error of one rounding.
    const UNIT_ROUNDOFF: f64;

    fn from_f32(x: f32) -> Self;
    fn from_f64(x: f64) -> Self;
    fn to_f64(self) -> f64;
    fn is_finite(self) -> bool;
    /// The standard library's exponential.
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    /// `e^x` for `x <= 0` within 2 units in the last place, in plain arithmetic that the compiler vectorises. Underflows
    /// gradually to 0; a NaN stays one.
    fn exp_nonpositive(self) -> Self;
}

/// An element type with its accumulator.
pub(crate) trait Scalar: HostElement {
    type Acc: Real;

    /// The elements of host memory known to be of this type.
    fn slice(host: HostRef<'_>) -> &[Self];
    /// Converts exactly.
    fn widen(src: &[Self], dst: &mut [Self::Acc]);
    /// Rounds to nearest even.
    fn narrow(src: &[Self::Acc], dst: &mut [Self]);
}

/// Reads `dst.len()` elements that are `stride` apart.
pub(crate) fn gather<S: Scalar>(src: &[S], offset: usize, stride: usize, dst: &mut [S::Acc]) {
    if dst.is_empty() {
        return;
    }
    if stride == 1 {
        return S::widen(&src[offset..][..dst.len()], dst);
    }
    let mut packed = [S::default(); 64];
    for (chunk, dst) in dst.chunks_mut(packed.len()).enumerate() {
        let first = offset + chunk * packed.len() * stride;
        for (i, x) in packed[..dst.len()].iter_mut().enumerate() {
            *x = src[first + i * stride];
        }
        S::widen(&packed[..dst.len()], dst);
    }
}

/// The offset of an index tuple. Views have been checked to fit their memory, so this cannot wrap.
pub(crate) fn offset(strides: [i64; 4], index: [usize; 4]) -> usize {
    strides.iter().zip(index).map(|(&stride, i)| stride as usize * i).sum()
}

// `e^x = 2^n e^r` with `n = round(x / ln 2)` and a Taylor polynomial in `r`, `|r| <= ln 2 / 2`. Adding `MAGIC` leaves `n`
// in the low bits; `2^n` is applied in two factors so that results may be subnormal.
macro_rules! exp_nonpositive {
    ($x:expr, $float:ident, $bits:ident, magic: $magic:expr, zero_below: $zero_below:expr, ln2: ($hi:expr, $lo:expr),
     bias: $bias:expr, mantissa: $mantissa:expr, taylor: $taylor:expr) => {{
        const MAGIC: $float = $magic;
        const TWICE_BIAS: $bits = 2 * ($bias + 1);
        let x = if $x < $zero_below { $zero_below } else { $x };
        let shifted = x * std::$float::consts::LOG2_E + MAGIC;
        let n = shifted - MAGIC;
        let r = (x - n * $hi) - n * $lo;
        let [mut p, rest @ ..] = $taylor;
        for c in rest {
            p = p * r + c;
        }
        let n = shifted.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(TWICE_BIAS);
        let half = n >> 1;
        let rest = n.wrapping_sub(half);
        let power = |e: $bits| $float::from_bits(e.wrapping_sub(1) << $mantissa);
        p * power(half) * power(rest)
    }};
}

macro_rules! inverse_factorials {
    ($float:ident: $($n:expr),*) => { [$(1.0 / ($n as $float)),*] };
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const NEG_INFINITY: Self = Self::NEG_INFINITY;
    const UNIT_ROUNDOFF: f64 = (Self::EPSILON / 2.0) as f64;

    fn from_f32(x: f32) -> Self {
        x
    }

    fn from_f64(x: f64) -> Self {
        x as Self
    }

    fn to_f64(self) -> f64 {
        self.into()
    }

    fn is_finite(self) -> bool {
        self.is_finite()
    }

    fn exp(self) -> Self {
        self.exp()
    }

    fn ln(self) -> Self {
        self.ln()
    }

    #[inline(always)]
    fn exp_nonpositive(self) -> Self {
        exp_nonpositive!(self, f32, u32, magic: 12_582_912.0, zero_below: -104.0, ln2: (355.0 / 512.0, -2.121_944_4e-4),
            bias: 127, mantissa: 23, taylor: inverse_factorials!(f32: 5040, 720, 120, 24, 6, 2, 1, 1))
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const NEG_INFINITY: Self = Self::NEG_INFINITY;
    const UNIT_ROUNDOFF: f64 = Self::EPSILON / 2.0;

    fn from_f32(x: f32) -> Self {
        x.into()
    }

    fn from_f64(x: f64) -> Self {
        x
    }

    fn to_f64(self) -> f64 {
        self
    }

    fn is_finite(self) -> bool {
        self.is_finite()
    }

    fn exp(self) -> Self {
        self.exp()
    }

    fn ln(self) -> Self {
        self.ln()
    }

    #[inline(always)]
    fn exp_nonpositive(self) -> Self {
        exp_nonpositive!(self, f64, u64, magic: 6_755_399_441_055_744.0, zero_below: -746.0,
            ln2: (6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10), bias: 1023, mantissa: 52,
            taylor: inverse_factorials!(f64: 6_227_020_800u64, 479_001_600, 39_916_800, 3_628_800, 362_880, 40_320,
                5040, 720, 120, 24, 6, 2, 1, 1))
    }
}

macro_rules! scalar {
    ($($ty:ty, $variant:ident, $acc:ty, $widen:expr, $narrow:expr;)*) => {$(
        impl Scalar for $ty {
            type Acc = $acc;

            fn slice(host: HostRef<'_>) -> &[Self] {
                match host {
                    HostRef::$variant(slice) => slice,
                    _ => unreachable!("a checked problem has {} here", Self::DTYPE),
                }
            }

            #[inline]
            fn widen(src: &[Self], dst: &mut [$acc]) {
                let convert: fn(&[Self], &mut [$acc]) = $widen;
                convert(src, dst);
            }

            #[inline]
            fn narrow(src: &[$acc], dst: &mut [Self]) {
                let convert: fn(&[$acc], &mut [Self]) = $narrow;
                convert(src, dst);
            }
        }
    )*};
}

scalar! {
    f16, F16, f32, |src, dst| src.convert_to_f32_slice(dst), |src, dst| dst.convert_from_f32_slice(src);
    bf16, BF16, f32, |src, dst| src.convert_to_f32_slice(dst), |src, dst| dst.convert_from_f32_slice(src);
    f32, F32, f32, |src, dst| dst.copy_from_slice(src), |src, dst| dst.copy_from_slice(src);
    f64, F64, f64, |src, dst| dst.copy_from_slice(src), |src, dst| dst.copy_from_slice(src);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ulps<T: Real>(got: T, exact: f64, min_positive: f64) -> f64 {
        let unit = 2.0 * T::UNIT_ROUNDOFF * exact.max(min_positive);
        (got.to_f64() - exact).abs() / unit
    }

    #[test]
    fn exponential_is_accurate_down_to_subnormals() {
        for i in 0..200_000 {
            let x = -f64::from(i) / 1900.0;
            let exact = f64::from(x as f32).exp();
            assert!(ulps((x as f32).exp_nonpositive(), exact, f32::MIN_POSITIVE.into()) <= 2.0, "f32 exp({x})");
            let x = 7.1 * x;
            assert!(ulps(x.exp_nonpositive(), x.exp(), f64::MIN_POSITIVE) <= 2.0, "f64 exp({x})");
        }
    }

    #[test]
    fn exponential_at_the_edges() {
        assert_eq!((1.0, 1.0), (0f32.exp_nonpositive(), 0f64.exp_nonpositive()));
        for x in [f32::NEG_INFINITY, f32::MIN, -1e4] {
            assert_eq!((0.0, 0.0), (x.exp_nonpositive(), f64::from(x).exp_nonpositive()));
        }
        assert!(f32::NAN.exp_nonpositive().is_nan() && f64::NAN.exp_nonpositive().is_nan());
        assert_eq!(f32::from_bits(1), (-103.5f32).exp_nonpositive());
        assert_eq!(f64::from_bits(1), (-745.1f64).exp_nonpositive());
    }

    #[test]
    fn gather_reads_any_stride() {
        let data: Vec<f16> = (0..1000).map(|i| f16::from_f32(i as f32)).collect();
        for (stride, len) in [(0, 70), (1, 130), (3, 200), (7, 1), (9, 0)] {
            let mut dst = vec![0.0; len];
            gather(&data, 5, stride, &mut dst);
            assert!(dst.iter().enumerate().all(|(i, &x)| x == (5 + i * stride) as f32), "stride {stride}");
        }
    }
}
