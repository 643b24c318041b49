//! The CPU backend against the oracle, the oracle against pencil and paper, and the judge against planted errors.

#![expect(clippy::unwrap_used, reason = "a test may fail this way")]

use half::{bf16, f16};
use proptest::prelude::*;

use super::attention::{HostInputs, attention};
use super::oracle::{self, Reference, judge, judge_lse};
use super::real::offset;
use crate::attention::{Band, MaskLayout, Problem};
use crate::dtype::DType;
use crate::tensor::{HostElement, HostMut, HostRef, Layout, Storage, TensorView};

const FLOATS: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];

/// Host memory of any element type.
#[derive(Clone)]
enum Buffer {
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<u8>),
}

macro_rules! each {
    ($buffer:expr, $data:ident => $body:expr) => {
        match $buffer {
            Buffer::F16($data) => $body,
            Buffer::BF16($data) => $body,
            Buffer::F32($data) => $body,
            Buffer::F64($data) => $body,
            Buffer::Bool($data) => $body,
        }
    };
}

impl Buffer {
    fn new(dtype: DType, values: impl Iterator<Item = f64>) -> Self {
        match dtype {
            DType::F16 => Self::F16(values.map(f16::from_f64).collect()),
            DType::BF16 => Self::BF16(values.map(bf16::from_f64).collect()),
            DType::F32 => Self::F32(values.map(|x| x as f32).collect()),
            DType::F64 => Self::F64(values.collect()),
            DType::Bool => Self::Bool(values.map(|x| u8::from(x > 0.0) * 3).collect()),
        }
    }

    fn set(&mut self, at: usize, x: f64) {
        match self {
            Self::F16(data) => data[at] = f16::from_f64(x),
            Self::BF16(data) => data[at] = bf16::from_f64(x),
            Self::F32(data) => data[at] = x as f32,
            Self::F64(data) => data[at] = x,
            Self::Bool(data) => data[at] = x as u8,
        }
    }

    fn get(&self, at: usize) -> f64 {
        match self {
            Self::F16(data) => data[at].to_f64(),
            Self::BF16(data) => data[at].to_f64(),
            Self::F32(data) => data[at].into(),
            Self::F64(data) => data[at],
            Self::Bool(data) => data[at].into(),
        }
    }

    fn host(&self) -> HostRef<'_> {
        each!(self, data => HostElement::wrap(data))
    }

    fn host_mut(&mut self) -> HostMut<'_> {
        each!(self, data => HostElement::wrap_mut(data))
    }

    fn view(&self, layout: Layout) -> TensorView<'_> {
        assert!(layout.extent() <= each!(self, data => data.len()));
        TensorView { layout, storage: Storage::Host(self.host()) }
    }
}

/// SplitMix64, and normal deviates from it.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn uniform(&mut self) -> f64 {
        ((self.bits() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

/// How a tensor lies in memory.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// Contiguous.
    Bhsd,
    /// Contiguous as `(batch, seq, heads, head_dim)`.
    Bshd,
    /// Three elements between rows, five between heads.
    Padded,
    /// Every other element.
    Spread,
}

const ORDERS: [Order; 4] = [Order::Bhsd, Order::Bshd, Order::Padded, Order::Spread];

fn strides(order: Order, [_, heads, seq, dim]: [usize; 4]) -> [i64; 4] {
    let [heads, seq, dim] = [heads as i64, seq as i64, dim as i64];
    match order {
        Order::Bhsd => [heads * seq * dim, seq * dim, dim, 1],
        Order::Bshd => [seq * heads * dim, dim, heads * dim, 1],
        Order::Padded => {
            let row = dim + 3;
            let head = seq * row + 5;
            [heads * head, head, row, 1]
        }
        Order::Spread => [2 * heads * seq * dim, 2 * seq * dim, 2 * dim, 2],
    }
}

/// A dense problem of `[batch, num_heads_q, num_heads_kv, seq_len_q, seq_len_k, head_dim_qk, head_dim_v]`, contiguous.
fn problem(
    dtype: DType,
    [batch, num_heads_q, num_heads_kv, seq_len_q, seq_len_k, head_dim_qk, head_dim_v]: [usize; 7],
) -> Problem {
    let problem = Problem {
        dtype,
        batch,
        num_heads_q,
        num_heads_kv,
        seq_len_q,
        seq_len_k,
        head_dim_qk,
        head_dim_v,
        q_strides: [0; 4],
        k_strides: [0; 4],
        v_strides: [0; 4],
        out_strides: [0; 4],
        attn_mask: None,
        band: None,
        scale_bits: (1.0 / (head_dim_qk.max(1) as f32).sqrt()).to_bits(),
        lse: true,
    };
    ordered(problem, [Order::Bhsd; 4])
}

fn ordered(p: Problem, [q, k, v, out]: [Order; 4]) -> Problem {
    Problem {
        q_strides: strides(q, p.q_layout().shape),
        k_strides: strides(k, p.k_layout().shape),
        v_strides: strides(v, p.v_layout().shape),
        out_strides: strides(out, p.out_layout().shape),
        ..p
    }
}

fn scaled(p: Problem, scale: f32) -> Problem {
    Problem { scale_bits: scale.to_bits(), ..p }
}

fn banded(p: Problem, lo: i32, hi: i32) -> Problem {
    Problem { band: Some(Band { lo, hi }), ..p }
}

fn causal(p: Problem) -> Problem {
    banded(p, i32::MIN, 0)
}

/// A problem with its data.
#[derive(Clone)]
struct Case {
    problem: Problem,
    query: Buffer,
    key: Buffer,
    value: Buffer,
    /// With its layout, in which broadcast dimensions have size 1.
    mask: Option<(Buffer, Layout)>,
}

impl Case {
    fn new(problem: Problem, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut fill = |layout: Layout| Buffer::new(layout.dtype, (0..layout.extent()).map(|_| random.normal()));
        let [query, key, value] = [problem.q_layout(), problem.k_layout(), problem.v_layout()].map(&mut fill);
        Self { problem, query, key, value, mask: None }
    }

    /// With a mask of this type, broadcast along the dimensions that `broadcast` names. Of additive masks a quarter is
    /// `-inf`; of bool masks half is false.
    fn masked(mut self, dtype: DType, broadcast: [bool; 4], seed: u64) -> Self {
        let p = &mut self.problem;
        let mut shape = [p.batch, p.num_heads_q, p.seq_len_q, p.seq_len_k];
        for (size, broadcast) in shape.iter_mut().zip(broadcast) {
            if broadcast {
                *size = (*size).min(1);
            }
        }
        let mut layout = Layout { dtype, shape, strides: strides(Order::Padded, shape) };
        let mut random = Random(seed);
        let data = (0..layout.extent()).map(|_| match (dtype, random.uniform()) {
            (DType::Bool, x) => x - 0.5,
            (_, x) if x < 0.25 => f64::NEG_INFINITY,
            _ => 3.0 * random.normal(),
        });
        let data = Buffer::new(dtype, data);
        for (stride, broadcast) in layout.strides.iter_mut().zip(broadcast) {
            if broadcast {
                *stride = 0;
            }
        }
        p.attn_mask = Some(MaskLayout { dtype, strides: layout.strides });
        self.mask = Some((data, layout));
        self
    }

    fn mask_view(&self) -> Option<TensorView<'_>> {
        self.mask.as_ref().map(|(data, layout)| data.view(*layout))
    }

    fn references(&self) -> (Reference, Reference) {
        let p = &self.problem;
        let views = [self.query.view(p.q_layout()), self.key.view(p.k_layout()), self.value.view(p.v_layout())];
        let [q, k, v] = views;
        (oracle::oracle(p, q, k, v, self.mask_view()), oracle::eager(p, q, k, v, self.mask_view()))
    }

    /// Runs the CPU backend, in memory larger than the output, and checks that it wrote the view and nothing else.
    fn run(&self) -> (Vec<f64>, Vec<f32>) {
        const UNTOUCHED: f64 = -12.5;
        let p = &self.problem;
        let layout = p.out_layout();
        let size = layout.extent() + 7;
        let mut out = Buffer::new(p.dtype, std::iter::repeat_n(UNTOUCHED, size));
        let mut lse = vec![UNTOUCHED as f32; p.batch * p.num_heads_q * p.seq_len_q];
        let inputs = HostInputs {
            query: self.query.host(),
            key: self.key.host(),
            value: self.value.host(),
            attn_mask: self.mask.as_ref().map(|(data, _)| data.host()),
        };
        attention(p, inputs, out.host_mut(), Some(&mut lse));

        let mut inside = vec![false; size];
        let values = indices(layout.shape).map(|index| {
            let at = offset(layout.strides, index);
            inside[at] = true;
            out.get(at)
        });
        let values: Vec<f64> = values.collect();
        assert!(values.iter().all(|&x| x != UNTOUCHED), "{p}: output not written");
        assert!(lse.iter().all(|&x| f64::from(x) != UNTOUCHED), "{p}: log-sum-exp not written");
        assert!((0..size).all(|at| inside[at] || out.get(at) == UNTOUCHED), "{p}: wrote outside the output");
        (values, lse)
    }

    /// Checks the CPU backend against the oracle.
    fn check(&self) {
        let p = &self.problem;
        let (oracle, eager) = self.references();
        let (out, lse) = self.run();
        let report = judge(p, &out, &oracle, &eager);
        assert!(report.pass, "{p}: {report:?}");
        let report = judge_lse(p, &lse, &oracle, &eager);
        assert!(report.pass, "{p}: {report:?}");
    }
}

fn indices([b, h, s, d]: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    (0..b * h * s * d).map(move |i| [i / d / s / h, i / d / s % h, i / d % s, i % d])
}

#[test]
fn oracle_of_a_case_worked_by_hand() {
    // Scores 0 and ln 3: weights 1/4 and 3/4.
    let p = scaled(problem(DType::F64, [1, 1, 1, 1, 2, 1, 2]), 1.0);
    let (query, key, value) = ([2.0], [0.0, 3f64.ln() / 2.0], [4.0, 0.0, 8.0, -4.0]);
    let view = |data, shape: [usize; 4]| TensorView::from_slice::<f64>(data, &shape).unwrap();
    let views = (view(&query, [1, 1, 1, 1]), view(&key, [1, 1, 2, 1]), view(&value, [1, 1, 2, 2]));
    for reference in [oracle::oracle, oracle::eager] {
        let got = reference(&p, views.0, views.1, views.2, None);
        for (got, exact) in got.out.iter().chain(&got.lse).zip([7.0, -3.0, 4f64.ln()]) {
            assert!((got - exact).abs() < 1e-14, "{got} instead of {exact}");
        }
    }
}

#[test]
fn equal_scores_give_the_mean_of_the_values() {
    for dtype in FLOATS {
        let p = scaled(problem(dtype, [2, 4, 2, 3, 100, 8, 5]), 0.0);
        let case = Case::new(p, 1);
        let (oracle, _) = case.references();
        let (out, lse) = case.run();
        for (i, [b, h, s, d]) in indices(p.out_layout().shape).enumerate() {
            let values = (0..100).map(|j| case.value.get(offset(p.v_strides, [b, h / 2, j, d])));
            let mean = values.sum::<f64>() / 100.0;
            assert!((oracle.out[i] - mean).abs() < 1e-14);
            assert!((out[i] - mean).abs() < 2e-3, "{dtype}: {} instead of {mean}", out[i]);
            let row = (b * 4 + h) * 3 + s;
            assert!((oracle.lse[row] - 100f64.ln()).abs() < 1e-14);
            assert!((f64::from(lse[row]) - 100f64.ln()).abs() < 1e-6);
        }
    }
}

#[test]
fn odd_sizes() {
    let sizes = [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 300, 64, 64],
        [2, 6, 2, 1, 65, 7, 9],
        [1, 2, 2, 63, 64, 16, 8],
        [1, 3, 1, 65, 63, 40, 17],
        [1, 1, 1, 129, 127, 33, 1],
        [3, 2, 1, 5, 2, 0, 3],
        [1, 2, 1, 4, 3, 2, 0],
        [1, 1, 1, 5, 130, 256, 256],
    ];
    for dtype in FLOATS {
        for (seed, size) in sizes.into_iter().enumerate() {
            Case::new(problem(dtype, size), seed as u64).check();
            Case::new(causal(problem(dtype, size)), seed as u64).check();
        }
    }
}

#[test]
fn empty_sizes() {
    for dtype in FLOATS {
        for zero in [0, 1, 3, 4] {
            let mut size = [2, 4, 2, 3, 5, 8, 8];
            size[zero] = 0;
            if zero == 1 {
                size[2] = 0;
            }
            let case = Case::new(problem(dtype, size), 0);
            case.check();
            let (out, lse) = case.run();
            assert!(out.iter().all(|&x| x == 0.0) && lse.iter().all(|&x| x == f32::NEG_INFINITY));
        }
    }
}

#[test]
fn every_order_of_memory() {
    for dtype in FLOATS {
        for i in 0..16 {
            let orders = [ORDERS[i % 4], ORDERS[(i + i / 4) % 4], ORDERS[i / 4], ORDERS[(3 * i + 1) % 4]];
            Case::new(ordered(problem(dtype, [2, 4, 2, 7, 70, 20, 12]), orders), i as u64).check();
        }
    }
}

#[test]
fn bands() {
    for dtype in FLOATS {
        for (lo, hi) in [
            (i32::MIN, 0),
            (i32::MIN, 30),
            (i32::MIN, -40),
            (0, i32::MAX),
            (-10, 3),
            (60, 70),
            (5, 4),
            (-200, -150),
            (i32::MIN, i32::MAX),
            (i32::MAX, i32::MAX),
        ] {
            Case::new(banded(problem(dtype, [1, 2, 1, 70, 150, 8, 8]), lo, hi), 5).check();
            Case::new(banded(problem(dtype, [1, 1, 1, 150, 70, 8, 8]), lo, hi), 6).check();
        }
    }
}

#[test]
fn masks() {
    for dtype in FLOATS {
        for (i, mask) in [DType::Bool, dtype, DType::F32, DType::F16, DType::BF16].into_iter().enumerate() {
            for bits in 0..16u64 {
                let broadcast = [0, 1, 2, 3].map(|dim| bits >> dim & 1 == 1);
                let p = problem(dtype, [2, 4, 2, 6, 75, 4, 4]);
                let p = if i % 2 == bits as usize % 2 { causal(p) } else { p };
                Case::new(p, bits).masked(mask, broadcast, bits).check();
            }
        }
    }
}

#[test]
fn rows_without_keys_are_zero() {
    for dtype in FLOATS {
        for mask in [DType::Bool, DType::F32] {
            let mut case = Case::new(problem(dtype, [1, 2, 1, 6, 70, 8, 8]), 2).masked(mask, [false; 4], 3);
            if let Some((data, layout)) = &mut case.mask {
                let hidden = if mask == DType::Bool { 0.0 } else { f64::NEG_INFINITY };
                (0..70).for_each(|j| data.set(offset(layout.strides, [0, 1, 4, j]), hidden));
            }
            case.check();
            let (out, lse) = case.run();
            assert!(out[10 * 8..11 * 8].iter().all(|x| x.to_bits() == 0) && lse[10] == f32::NEG_INFINITY);
            assert!(lse.iter().filter(|x| x.is_finite()).count() == 11);
        }
    }
}

#[test]
fn any_scale() {
    for dtype in FLOATS {
        for scale in [0.0, -0.5, 1e-30, 3.0, -20.0, 1e4] {
            Case::new(scaled(problem(dtype, [1, 2, 1, 20, 90, 16, 16]), scale), 4).check();
        }
        let p = scaled(problem(dtype, [1, 1, 1, 3, 5, 4, 4]), f32::NAN);
        assert!(Case::new(p, 4).run().0.iter().all(|x| x.is_nan()));
    }
}

#[test]
fn extreme_scores() {
    for dtype in [DType::BF16, DType::F32, DType::F64] {
        // The running maximum rises by far more than an exponential can span, in the last of several tiles.
        let mut case = Case::new(problem(dtype, [1, 1, 1, 10, 200, 8, 8]), 9);
        (0..8).for_each(|d| case.key.set(170 * 8 + d, 1e4));
        case.check();
        // Scores that overflow fp32 to both infinities.
        let mut case = Case::new(problem(dtype, [1, 1, 1, 10, 20, 8, 8]), 9);
        (0..8).for_each(|d| case.key.set(7 * 8 + d, 3e38));
        (0..8).for_each(|d| case.query.set(4 * 8 + d, if d < 4 { 3e38 } else { -2e38 }));
        case.check();
    }
}

#[test]
fn special_values_reach_the_rows_that_see_them_and_no_others() {
    for dtype in FLOATS {
        for special in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for in_key in [true, false] {
                for mask in [None, Some(DType::Bool), Some(DType::F32)] {
                    let p = causal(ordered(problem(dtype, [2, 4, 2, 70, 70, 4, 4]), [Order::Bshd; 4]));
                    let mut case = Case::new(p, 7);
                    if let Some(mask) = mask {
                        case = case.masked(mask, [true, true, false, false], 8);
                    }
                    let clean = case.run();
                    let (buffer, strides) =
                        if in_key { (&mut case.key, p.k_strides) } else { (&mut case.value, p.v_strides) };
                    buffer.set(offset(strides, [1, 0, 66, 3]), special);
                    case.check();

                    let (out, lse) = case.run();
                    let sees = |i| {
                        let hidden = case.mask.as_ref().is_some_and(|(data, layout)| {
                            let x = data.get(offset(layout.strides, [0, 0, i, 66]));
                            if mask == Some(DType::Bool) { x == 0.0 } else { x == f64::NEG_INFINITY }
                        });
                        i >= 66 && !hidden
                    };
                    for (at, [b, h, i, d]) in indices(p.out_layout().shape).enumerate() {
                        let reached = b == 1 && h < 2 && sees(i);
                        if !reached {
                            assert_eq!(out[at].to_bits(), clean.0[at].to_bits(), "{p}: row {i} of {b}, {h}");
                            assert_eq!(lse[at / 4].to_bits(), clean.1[at / 4].to_bits());
                        } else if !in_key && d == 3 {
                            assert!(out[at].is_nan() == special.is_nan() && !out[at].is_finite());
                        } else if !in_key {
                            assert!(out[at].is_finite());
                        } else if special.is_nan() {
                            assert!(out[at].is_nan() && lse[at / 4].is_nan());
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn an_infinite_score_gives_nan() {
    for dtype in FLOATS {
        let mut case = Case::new(problem(dtype, [1, 1, 1, 2, 100, 1, 1]), 3);
        case.query.set(0, 1.0);
        case.query.set(1, -1.0);
        case.key.set(70, f64::INFINITY);
        case.check();
        let (out, lse) = case.run();
        assert!(out[0].is_nan() && lse[0].is_nan() && out[1].is_finite() && lse[1].is_finite());
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let p = ordered(problem(DType::F32, [1, 4, 2, 150, 200, 24, 16]), [Order::Bshd; 4]);
    let case = Case::new(causal(p), 11).masked(DType::F32, [true, false, false, false], 12);
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (out, lse) = pool.install(|| case.run());
        (out.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), lse.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
    };
    let alone = with(1);
    for threads in [2, 3, 5] {
        assert!(with(threads) == alone, "{threads} threads");
    }
}

#[test]
fn values_reads_every_type_and_order() {
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64, DType::Bool] {
        for order in ORDERS {
            let shape = [2, 3, 4, 5];
            let layout = Layout { dtype, shape, strides: strides(order, shape) };
            let buffer = Buffer::new(dtype, (0..layout.extent()).map(|i| f64::from(i as u32 % 200)));
            let expected = indices(shape).map(|index| buffer.get(offset(layout.strides, index)));
            let expected: Vec<f64> = expected.map(|x| if dtype == DType::Bool { x.min(1.0) } else { x }).collect();
            assert_eq!(oracle::values(&buffer.view(layout)), expected);
        }
    }
}

/// What can go wrong in a fused kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    ValueFromKey,
    OffByOne,
    TailUnmasked,
    WrongScale,
    NoRescale,
    WrongHead,
    NarrowScores,
    NarrowSums,
    LastKeyLost,
}

/// A model of a fused GPU kernel: tiles of 32 keys, fp32 sums, unnormalised weights rounded to the element type.
fn fused(case: &Case, fault: Fault) -> (Vec<f64>, Vec<f32>) {
    let p = &case.problem;
    let (dim_k, dim_v) = (p.head_dim_qk, p.head_dim_v);
    let narrow = |x: f32| match p.dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    };
    let read = |buffer: &Buffer, layout| oracle::values(&buffer.view(layout)).iter().map(|&x| x as f32).collect();
    let query: Vec<f32> = read(&case.query, p.q_layout());
    let key: Vec<f32> = read(&case.key, p.k_layout());
    let value: Vec<f32> = read(&case.value, p.v_layout());
    let scale = if fault == Fault::WrongScale { p.scale() * 1.01 } else { p.scale() };
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for (row, [b, h, i, _]) in indices([p.batch, p.num_heads_q, p.seq_len_q, 1]).enumerate() {
        let visible = match (p.visible_keys(i), fault) {
            (keys, Fault::OffByOne) => keys.start..(keys.end + 1).min(p.seq_len_k),
            (keys, Fault::TailUnmasked) if keys.end == p.seq_len_k => keys.start..keys.end + 1,
            (keys, Fault::LastKeyLost) => keys.start..keys.end.saturating_sub(1).max(keys.start),
            (keys, _) => keys,
        };
        let kv_head = if fault == Fault::WrongHead { h % p.num_heads_kv } else { h / p.group() };
        // Beyond the last key a tile holds zeros.
        let first = (b * p.num_heads_kv + kv_head) * p.seq_len_k;
        let key = |j: usize| (j < p.seq_len_k).then(|| &key[(first + j) * dim_k..][..dim_k]);
        let value = |j: usize| (j < p.seq_len_k).then(|| &value[(first + j) * dim_v..][..dim_v]);
        let query = &query[row * dim_k..][..dim_k];
        let (mut max, mut sum, mut acc) = (f32::NEG_INFINITY, 0f32, vec![0f32; dim_v]);
        let keys: Vec<usize> = visible.collect();
        for keys in keys.chunks(32) {
            let scores = keys.iter().map(|&j| {
                let dot = key(j).map_or(0.0, |key| query.iter().zip(key).fold(0.0, |dot, (q, k)| dot + q * k));
                if fault == Fault::NarrowScores { bf16::from_f32(dot * scale).to_f32() } else { dot * scale }
            });
            let scores: Vec<f32> = scores.collect();
            let new = scores.iter().fold(max, |max, &x| max.max(x));
            let rescale = if fault == Fault::NoRescale && max.is_finite() { 1.0 } else { (max - new).exp() };
            max = new;
            sum *= rescale;
            acc.iter_mut().for_each(|acc| *acc *= rescale);
            for (&j, score) in keys.iter().zip(scores) {
                let weight = (score - max).exp();
                sum += weight;
                let row = if fault == Fault::ValueFromKey { key(j) } else { value(j) };
                for (acc, x) in acc.iter_mut().zip(row.unwrap_or_default()) {
                    *acc += narrow(weight) * x;
                    if fault == Fault::NarrowSums {
                        *acc = narrow(*acc);
                    }
                }
            }
        }
        outs.extend(acc.iter().map(|&x| if sum == 0.0 { 0.0 } else { f64::from(narrow(x / sum)) }));
        lses.push(max + sum.ln());
    }
    (outs, lses)
}

#[test]
fn judge_accepts_a_sound_kernel_and_rejects_planted_errors() {
    let faults = [
        Fault::ValueFromKey,
        Fault::OffByOne,
        Fault::TailUnmasked,
        Fault::WrongScale,
        Fault::NoRescale,
        Fault::WrongHead,
        Fault::NarrowScores,
        Fault::NarrowSums,
        Fault::LastKeyLost,
    ];
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        let problems = [
            causal(problem(dtype, [1, 4, 2, 100, 100, 16, 16])),
            causal(problem(dtype, [1, 4, 2, 40, 40, 32, 32])),
            problem(dtype, [1, 4, 2, 6, 333, 32, 32]),
            problem(dtype, [1, 4, 2, 1, 500, 64, 64]),
        ];
        let mut present = [0; 9];
        for (seed, p) in problems.into_iter().enumerate() {
            let case = Case::new(p, seed as u64);
            let (oracle, eager) = case.references();
            let (sound, lse) = fused(&case, Fault::None);
            let report = judge(&p, &sound, &oracle, &eager);
            assert!(report.pass, "{p}: {report:?}");
            let report = judge_lse(&p, &lse, &oracle, &eager);
            assert!(report.pass, "{p}: {report:?}");
            for (fault, present) in faults.into_iter().zip(&mut present) {
                let (out, lse) = fused(&case, fault);
                if out != sound {
                    *present += 1;
                    let report = judge(&p, &out, &oracle, &eager);
                    let lse_report = judge_lse(&p, &lse, &oracle, &eager);
                    let accepted = report.pass && lse_report.pass;
                    assert!(!accepted, "{fault:?} accepted in {p}: {report:?} {lse_report:?}");
                }
            }
        }
        for (fault, present) in faults.into_iter().zip(present) {
            assert!(present >= 2 || (fault == Fault::NarrowSums && dtype == DType::F32), "{fault:?} in {dtype}");
        }
    }
}

#[test]
fn judge_sees_the_small_rows_beside_the_large() {
    // Only rows whose outputs are far below an ulp of the first row's are wrong.
    let p = causal(problem(DType::BF16, [1, 1, 1, 500, 500, 8, 8]));
    let case = Case::new(p, 21);
    let (oracle, eager) = case.references();
    let mut out = eager.out.clone();
    assert!(judge(&p, &out, &oracle, &eager).pass);
    out[450 * 8..].iter_mut().for_each(|x| *x = 0.95 * *x + 0.001);
    let report = judge(&p, &out, &oracle, &eager);
    assert!(report.e <= report.bound && !report.pass, "{report:?}");
}

#[test]
fn judge_wants_special_values_in_their_places() {
    let p = problem(DType::F16, [1, 1, 1, 4, 8, 4, 4]);
    let mut case = Case::new(p, 1);
    case.value.set(3, f64::NAN);
    let (oracle, eager) = case.references();
    let good = eager.out.clone();
    assert!(judge(&p, &good, &oracle, &eager).pass && good[3].is_nan());
    for (at, x) in [(3, 0.0), (3, f64::INFINITY), (2, f64::NAN), (2, f64::INFINITY), (2, f64::NEG_INFINITY)] {
        let mut bad = good.clone();
        bad[at] = x;
        let report = judge(&p, &bad, &oracle, &eager);
        assert!(!report.pass && report.misplaced == 1, "{x} at {at}");
    }
    let lse: Vec<f32> = eager.lse.iter().map(|&x| x as f32).collect();
    assert!(judge_lse(&p, &lse, &oracle, &eager).pass);
    for x in [f32::NEG_INFINITY, f32::NAN, 0.0, lse[1] + 1e-4] {
        let mut bad = lse.clone();
        bad[1] = x;
        assert!(!judge_lse(&p, &bad, &oracle, &eager).pass, "{x}");
    }
}

#[test]
fn ulps() {
    use super::judge::ulp;
    for (dtype, one, smallest) in [
        (DType::F16, 2f64.powi(-10), 2f64.powi(-24)),
        (DType::BF16, 2f64.powi(-7), 2f64.powi(-133)),
        (DType::F32, f64::from(f32::EPSILON), f64::from(f32::from_bits(1))),
        (DType::F64, f64::EPSILON, f64::from_bits(1)),
    ] {
        assert_eq!(
            [ulp(dtype, 1.0), ulp(dtype, 1.999), ulp(dtype, 2.0), ulp(dtype, 0.99)],
            [one, one, 2.0 * one, one / 2.0]
        );
        assert_eq!(ulp(dtype, 0.0), smallest);
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (1..3usize, 1..3usize, 1..4usize, 0..50usize, 0..150usize, 1..24usize, 1..24usize);
    let orders = prop::array::uniform4(prop::sample::select(ORDERS.to_vec()));
    let band = prop::option::of((-100..100i32, -100..180i32));
    let mask = prop::option::of((0..5usize, prop::array::uniform4(any::<bool>())));
    let scale = prop::sample::select(vec![0.0, 0.1, 0.25, 1.0, -0.3, 5.0]);
    (prop::sample::select(FLOATS.to_vec()), sizes, orders, band, mask, scale, any::<u64>()).prop_map(
        |(dtype, (b, kv, group, sq, sk, dim_k, dim_v), orders, band, mask, scale, seed)| {
            let p = ordered(problem(dtype, [b, kv * group, kv, sq, sk, dim_k, dim_v]), orders);
            let p = scaled(p, scale);
            let p = band.map_or(p, |(lo, hi)| banded(p, lo, hi));
            let case = Case::new(p, seed);
            let dtypes = [DType::Bool, dtype, DType::F32, DType::F16, DType::BF16];
            match mask {
                Some((mask, broadcast)) => case.masked(dtypes[mask], broadcast, seed ^ 1),
                None => case,
            }
        },
    )
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} with mask {:?}", self.problem, self.mask.as_ref().map(|(_, layout)| layout))
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_problem(case in cases()) {
        case.check();
    }

    #[test]
    fn any_problem_with_special_values(mut case in cases(), places in prop::collection::vec((0..3usize, any::<usize>(), 0..3usize), 1..4)) {
        for (tensor, at, special) in places {
            let buffer = [&mut case.query, &mut case.key, &mut case.value].into_iter().nth(tensor).unwrap();
            let len = each!(&*buffer, data => data.len());
            if len > 0 {
                buffer.set(at % len, [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][special]);
            }
        }
        case.check();
    }
}
