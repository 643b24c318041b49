//! What attention should give: an fp64 oracle, and the same-precision eager reference that sets the bar.
//!
//! Both are written for being evidently right, share no arithmetic with the kernels they judge, and run in parallel over
//! heads and rows. They read their tensors by the views' own strides; of the problem they use sizes, band, scale and
//! element type. Keys that the band or the mask (`false`, or an additive `-inf`) hides are left out, so nothing that they
//! hold matters; a row whose scores are all `-inf` gives 0 and an LSE of `-inf`.

use rayon::prelude::*;

#[cfg(feature = "validate")]
pub(crate) use super::judge::ulp;
pub use super::judge::{ErrorReport, LseReport, judge, judge_lse, lse_bound};
use super::real::{Real, Scalar, gather, offset};
use crate::attention::Problem;
use crate::dtype::DType;
use crate::tensor::{HostRef, Storage, TensorView};

/// An output and its log-sum-exp, in fp64.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reference {
    /// Contiguous `(batch, num_heads_q, seq_len_q, head_dim_v)`.
    pub out: Vec<f64>,
    /// Contiguous `(batch, num_heads_q, seq_len_q)`.
    pub lse: Vec<f64>,
    /// What one rounding is worth in each row of `out`; see [`judge`]. The oracle's alone: empty in an eager reference.
    pub out_unit: Vec<f64>,
    /// What one rounding is worth in each element of `lse`; see [`judge_lse`]. Empty in an eager reference.
    pub lse_unit: Vec<f64>,
}

/// Attention as defined: the softmax of all scores of a row in two passes, in fp64 from the inputs as stored.
///
/// # Panics
/// When a tensor is not in host memory or does not have the problem's shape and element type; the mask may have size 1
/// where it broadcasts.
pub fn oracle(
    problem: &Problem,
    query: TensorView<'_>,
    key: TensorView<'_>,
    value: TensorView<'_>,
    attn_mask: Option<TensorView<'_>>,
) -> Reference {
    evaluate(problem, [query, key, value], attn_mask, true)
}

/// Attention as frameworks compute it without a fused kernel: scores and softmax in fp32, weights rounded to the
/// element type, products accumulated in fp32, the output rounded to the element type. An fp64 problem is fp64
/// throughout.
///
/// # Panics
/// As [`oracle`].
pub fn eager(
    problem: &Problem,
    query: TensorView<'_>,
    key: TensorView<'_>,
    value: TensorView<'_>,
    attn_mask: Option<TensorView<'_>>,
) -> Reference {
    evaluate(problem, [query, key, value], attn_mask, false)
}

/// The elements of a host tensor, contiguous, in fp64.
///
/// # Panics
/// When the tensor is not in host memory.
pub fn values(tensor: &TensorView<'_>) -> Vec<f64> {
    fn read<S: Scalar>(data: &[S], tensor: &TensorView<'_>) -> Vec<f64> {
        let [batch, heads, seq, _] = tensor.layout().shape;
        let heads = (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h)));
        heads.flat_map(|(b, h)| read_head(data, tensor, b, h, 0..seq)).map(Real::to_f64).collect()
    }
    match host(tensor) {
        HostRef::F16(data) => read(data, tensor),
        HostRef::BF16(data) => read(data, tensor),
        HostRef::F32(data) => read(data, tensor),
        HostRef::F64(data) => read(data, tensor),
        HostRef::Bool(data) => {
            let bytes: Vec<f32> = data.iter().map(|&x| f32::from(u8::from(x != 0))).collect();
            read(&bytes, tensor)
        }
    }
}

fn host<'a>(tensor: &TensorView<'a>) -> HostRef<'a> {
    match tensor.storage {
        Storage::Host(host) => host,
        Storage::Device { .. } => panic!("the references read host memory, not {}", tensor.device()),
    }
}

/// Rows of a head, contiguous.
fn read_head<S: Scalar>(
    data: &[S],
    tensor: &TensorView<'_>,
    batch: usize,
    head: usize,
    rows: std::ops::Range<usize>,
) -> Vec<S::Acc> {
    let layout = tensor.layout();
    let dim = layout.shape[3];
    let mut out = vec![S::Acc::ZERO; rows.len() * dim];
    for (i, out) in rows.zip(out.chunks_mut(dim.max(1))) {
        gather(data, offset(layout.strides, [batch, head, i, 0]), layout.strides[3] as usize, out);
    }
    out
}

fn evaluate(
    problem: &Problem,
    [query, key, value]: [TensorView<'_>; 3],
    attn_mask: Option<TensorView<'_>>,
    exact: bool,
) -> Reference {
    let p = problem;
    for (name, tensor, layout) in
        [("query", &query, p.q_layout()), ("key", &key, p.k_layout()), ("value", &value, p.v_layout())]
    {
        let given = tensor.layout();
        assert!((given.dtype, given.shape) == (layout.dtype, layout.shape), "{name}: {given:?} in {problem}");
    }
    let mask = attn_mask.map(|mask| Mask::new(problem, &mask));
    let views = [query, key, value];
    match problem.dtype {
        DType::F16 => Inputs::<half::f16>::new(problem, views, mask).evaluate(exact),
        DType::BF16 => Inputs::<half::bf16>::new(problem, views, mask).evaluate(exact),
        DType::F32 => Inputs::<f32>::new(problem, views, mask).evaluate(exact),
        DType::F64 => Inputs::<f64>::new(problem, views, mask).evaluate(exact),
        DType::Bool => panic!("attention has no bool inputs"),
    }
}

/// An attention mask over all rows and keys.
struct Mask<'a> {
    data: HostRef<'a>,
    strides: [i64; 4],
}

impl<'a> Mask<'a> {
    fn new(p: &Problem, mask: &TensorView<'a>) -> Self {
        let layout = mask.layout();
        let full = [p.batch, p.num_heads_q, p.seq_len_q, p.seq_len_k];
        let mut strides = layout.strides;
        for ((stride, &size), full) in strides.iter_mut().zip(&layout.shape).zip(full) {
            assert!(size == full || size == 1, "mask: {:?} does not broadcast to {full:?}", layout.shape);
            if size == 1 {
                *stride = 0;
            }
        }
        Self { data: host(mask), strides }
    }

    /// What is added to a score; `-inf` hides the key.
    fn at(&self, index: [usize; 4]) -> f64 {
        let at = offset(self.strides, index);
        match self.data {
            HostRef::F16(data) => data[at].to_f64(),
            HostRef::BF16(data) => data[at].to_f64(),
            HostRef::F32(data) => data[at].into(),
            HostRef::F64(data) => data[at],
            HostRef::Bool(data) if data[at] == 0 => f64::NEG_INFINITY,
            HostRef::Bool(_) => 0.0,
        }
    }
}

struct Inputs<'a, S: Scalar> {
    problem: &'a Problem,
    /// Query, key, value.
    views: [TensorView<'a>; 3],
    mask: Option<Mask<'a>>,
    data: [&'a [S]; 3],
}

/// One key/value head, in the accumulator type: exact, and half the size of fp64.
struct Head<T> {
    index: [usize; 2],
    key: Vec<T>,
    value: Vec<T>,
    /// Of each key: its squared norm, and the mean square of its value row. What is not finite counts as 0.
    norms: Vec<[f64; 2]>,
}

/// The visible keys of a row and what became of them.
#[derive(Default)]
struct Visible<T> {
    keys: Vec<usize>,
    /// Scores, then weights.
    weights: Vec<T>,
}

/// Where a row's results go.
struct RowOut<'a> {
    out: &'a mut [f64],
    lse: &'a mut f64,
    out_unit: Option<&'a mut f64>,
    lse_unit: Option<&'a mut f64>,
}

/// Rows that a thread takes at a time.
const ROWS: usize = 16;

impl<'a, S: Scalar> Inputs<'a, S> {
    fn new(problem: &'a Problem, views: [TensorView<'a>; 3], mask: Option<Mask<'a>>) -> Self {
        Self { problem, views, mask, data: views.each_ref().map(|view| S::slice(host(view))) }
    }

    fn evaluate(&self, exact: bool) -> Reference {
        let p = self.problem;
        let rows = p.batch * p.num_heads_q * p.seq_len_q;
        let (dim, seq) = (p.head_dim_v, p.seq_len_q);
        let mut result =
            Reference { out: vec![0.0; rows * dim], lse: vec![f64::NEG_INFINITY; rows], ..Default::default() };
        if exact {
            result.out_unit = vec![0.0; rows];
            result.lse_unit = vec![0.0; rows];
        }
        // A head of width 0 still has rows: give each an empty slice.
        let mut outs = result.out.chunks_mut(dim.max(1));
        let mut out_units = result.out_unit.iter_mut();
        let mut lse_units = result.lse_unit.iter_mut();
        let mut places: Vec<RowOut<'_>> = result
            .lse
            .iter_mut()
            .map(|lse| RowOut {
                out: outs.next().unwrap_or_default(),
                lse,
                out_unit: out_units.next(),
                lse_unit: lse_units.next(),
            })
            .collect();
        places.par_chunks_mut(seq.max(1)).enumerate().for_each(|(index, places)| {
            let [b, h] = [index / p.num_heads_q, index % p.num_heads_q];
            let head = self.head(b, h, exact);
            places.par_chunks_mut(ROWS).enumerate().for_each(|(chunk, places)| {
                let first = chunk * ROWS;
                let queries = read_head(self.data[0], &self.views[0], b, h, first..first + places.len());
                for (r, place) in places.iter_mut().enumerate() {
                    let query = &queries[r * p.head_dim_qk..][..p.head_dim_qk];
                    if exact {
                        self.exact_row(&head, first + r, query, place);
                    } else {
                        self.eager_row(&head, first + r, query, place);
                    }
                }
            });
        });
        drop(places);
        result
    }

    fn head(&self, b: usize, h: usize, exact: bool) -> Head<S::Acc> {
        let p = self.problem;
        let read = |i: usize| read_head(self.data[i], &self.views[i], b, h / p.group(), 0..p.seq_len_k);
        let (key, value) = (read(1), read(2));
        let mut norms = Vec::new();
        if exact {
            let square = |row: &[S::Acc]| {
                let sum: f64 = row.iter().map(|x| x.to_f64() * x.to_f64()).sum();
                if sum.is_finite() { sum } else { 0.0 }
            };
            let (dim_k, dim_v) = (p.head_dim_qk, p.head_dim_v);
            norms = (0..p.seq_len_k)
                .map(|j| {
                    [square(&key[j * dim_k..][..dim_k]), square(&value[j * dim_v..][..dim_v]) / dim_v.max(1) as f64]
                })
                .collect();
        }
        Head { index: [b, h], key, value, norms }
    }

    /// The visible keys of row `i`, with scores in type `T`.
    fn scores<T: Real>(
        &self,
        head: &Head<S::Acc>,
        i: usize,
        query: &[T],
        convert: impl Fn(S::Acc) -> T + Copy,
    ) -> Visible<T> {
        let p = self.problem;
        let scale = T::from_f32(p.scale());
        let mut visible = Visible { keys: Vec::new(), weights: Vec::new() };
        for j in p.visible_keys(i) {
            let bias = self.mask.as_ref().map_or(0.0, |mask| mask.at([head.index[0], head.index[1], i, j]));
            if bias != f64::NEG_INFINITY {
                let dot = dot(query, &head.key[j * p.head_dim_qk..][..p.head_dim_qk], convert);
                visible.keys.push(j);
                visible.weights.push(scale * dot + T::from_f64(bias));
            }
        }
        visible
    }

    fn exact_row(&self, head: &Head<S::Acc>, i: usize, query: &[S::Acc], place: &mut RowOut<'_>) {
        let p = self.problem;
        let query: Vec<f64> = query.iter().map(|x| x.to_f64()).collect();
        let Visible { keys, mut weights } = self.scores(head, i, &query, Real::to_f64);
        if weights.iter().all(|&x| x == f64::NEG_INFINITY) {
            return;
        }
        let max = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        weights.iter_mut().for_each(|x| *x = (*x - max).exp());
        let sum: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|x| *x /= sum);
        weighted_sum(&keys, &weights, &head.value, Real::to_f64, place.out);
        *place.lse = max + sum.ln();

        // Root-mean-square sizes under the weights, for the units that the judge counts in.
        let [mut value, mut noisy_value, mut key, mut mean_key] = [0.0; 4];
        for (&j, &w) in keys.iter().zip(&weights) {
            let [k2, v2] = head.norms[j];
            value += w * w * v2;
            noisy_value += w * w * v2 * k2;
            key += w * w * k2;
            mean_key += w * k2;
        }
        let largest = place.out.iter().filter(|x| x.is_finite()).fold(0.0, |max: f64, x| max.max(x.abs()));
        let magnitude = largest.max(value.sqrt());
        let reach = f64::from(p.scale()).abs() * query.iter().map(|x| x * x).sum::<f64>().sqrt();
        let length = (keys.len() as f64).sqrt() + place.lse.abs();
        let noise = length * magnitude + reach * (noisy_value.sqrt() + largest * key.sqrt());
        let noise = if noise.is_finite() { noise } else { 0.0 };
        if let Some(unit) = &mut place.out_unit {
            // An fp64 oracle of an fp64 problem is no better than what it judges.
            let own = if p.dtype == DType::F64 { 4.0 } else { 1.0 };
            **unit = own * (super::judge::ulp(p.dtype, magnitude) + 2.0 * S::Acc::UNIT_ROUNDOFF * noise);
        }
        if let Some(unit) = &mut place.lse_unit {
            let noise = 1.0 + length + reach * mean_key.sqrt();
            **unit = f32::UNIT_ROUNDOFF * if noise.is_finite() { noise } else { 1.0 };
        }
    }

    fn eager_row(&self, head: &Head<S::Acc>, i: usize, query: &[S::Acc], place: &mut RowOut<'_>) {
        let p = self.problem;
        let Visible { keys, mut weights } = self.scores(head, i, query, |x| x);
        if weights.iter().all(|&x| x == S::Acc::NEG_INFINITY) {
            return;
        }
        let max = weights.iter().fold(S::Acc::NEG_INFINITY, |max, &x| if x > max { x } else { max });
        weights.iter_mut().for_each(|x| *x = (*x - max).exp());
        let sum = weights.iter().fold(S::Acc::ZERO, |sum, &x| sum + x);
        weights.iter_mut().for_each(|x| *x = *x / sum);
        round::<S>(&mut weights);
        let mut out = vec![S::Acc::ZERO; p.head_dim_v];
        weighted_sum(&keys, &weights, &head.value, |x| x, &mut out);
        round::<S>(&mut out);
        for (place, x) in place.out.iter_mut().zip(out) {
            *place = x.to_f64();
        }
        *place.lse = (max + sum.ln()).to_f64();
    }
}

fn round<S: Scalar>(x: &mut [S::Acc]) {
    let mut rounded = vec![S::default(); x.len()];
    S::narrow(x, &mut rounded);
    S::widen(&rounded, x);
}

/// Sums that advance side by side, so that loops vectorise.
const LANES: usize = 8;

/// A dot product in interleaved sums.
fn dot<A: Real, T: Real>(x: &[T], y: &[A], convert: impl Fn(A) -> T) -> T {
    let (mut xs, mut ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let mut lanes = [T::ZERO; LANES];
    for (x, y) in xs.by_ref().zip(ys.by_ref()) {
        for (lane, (&x, &y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane += x * convert(y);
        }
    }
    for (lane, (&x, &y)) in lanes.iter_mut().zip(xs.remainder().iter().zip(ys.remainder())) {
        *lane += x * convert(y);
    }
    lanes.into_iter().fold(T::ZERO, |sum, x| sum + x)
}

/// `out = sum of weight * row`, in the order of the keys.
fn weighted_sum<A: Real, T: Real>(
    keys: &[usize],
    weights: &[T],
    rows: &[A],
    convert: impl Fn(A) -> T + Copy,
    out: &mut [T],
) {
    fn columns<A: Real, T: Real, const N: usize>(
        terms: impl Iterator<Item = (usize, T)>,
        rows: &[A],
        convert: impl Fn(A) -> T,
    ) -> [T; N] {
        let mut sums = [T::ZERO; N];
        for (first, w) in terms {
            for (sum, &x) in sums.iter_mut().zip(&rows[first..first + N]) {
                *sum += w * convert(x);
            }
        }
        sums
    }
    let dim = out.len();
    let terms = |column: usize| keys.iter().zip(weights).map(move |(&j, &w)| (j * dim + column, w));
    let mut column = 0;
    let mut whole = out.chunks_exact_mut(LANES);
    for out in whole.by_ref() {
        out.copy_from_slice(&columns::<A, T, LANES>(terms(column), rows, convert));
        column += LANES;
    }
    for out in whole.into_remainder() {
        [*out] = columns(terms(column), rows, convert);
        column += 1;
    }
}
