//! Wrong kernels: does the harness find each of them?
//!
//! [`Mutant`] is a small tiled attention that works as the GPU kernels do: a tile of queries walks tiles of keys with an
//! online softmax in base 2 (Milakov and Gimelshein, 2018; Dao et al., FlashAttention-2, 2023), head_dim and keys padded
//! to the tile, weights rounded to the element type before they meet the values, and long walks split in two parts that
//! are put together afterwards (Flash-Decoding, 2023). Without a [`Fault`] it passes the whole matrix. Each fault changes
//! one line into one that somebody has written, or could have.

use std::cell::Cell;
use std::ops::Range;

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::case::Case;
use super::correct::{check_repeatedly, problem_of};
use super::host::HostTensor;
use super::inputs::Inputs;
use super::properties::check_properties;
use super::subject::{Ran, Subject};
use crate::attention::{Band, CausalAlign, Problem};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Query rows that are taken at a time.
const ROWS: usize = 16;
/// Keys that are taken at a time.
const KEYS: usize = 32;
/// Tiles of keys from which on a walk is split in two.
const SPLIT_FROM: usize = 4;

macro_rules! faults {
    ($($fault:ident: $what:literal,)*) => {
        /// What is wrong with a [`Mutant`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Fault {
            $(#[doc = $what] $fault,)*
        }

        /// Every fault, with what it does.
        const FAULTS: &[(Fault, &str)] = &[$((Fault::$fault, $what)),*];
    };
}

faults! {
    ValueFromKey: "the value is read through the key's pointer",
    ValueFromQuery: "the value is read through the query's pointer",
    QueryKeySwapped: "the pointers of query and key are swapped",
    KeyTailScoresZero: "keys past the end score 0 instead of -inf",
    KeyTailOfQueryLength: "keys past the end are told by the length of the query",
    KeyRemainderSkipped: "the last tile of keys is skipped unless it is full",
    CausalOffByOne: "a row sees one key past its diagonal",
    CausalOtherDiagonal: "the diagonal is top-left where bottom-right was asked for",
    CausalByTile: "the band of a tile's first row stands for all its rows",
    WindowOffByOne: "a window reaches one key too far back",
    WindowStartUnmasked: "keys before the window are skipped by the tile, not by the row",
    ScaleOfPaddedHeadDim: "the default scale is that of the padded head_dim",
    ScaleSquared: "the scale is applied twice",
    ScaleSignLost: "the scale's sign is lost",
    MaxNotSubtracted: "no maximum is subtracted: large scores overflow",
    MaxNotCarried: "the maximum is forgotten after each tile",
    StateStale: "maximum, sum and accumulator go on from where the tile of queries before left them",
    AccumulatorNotRescaled: "the accumulator is not rescaled when the maximum rises",
    SumNotRescaled: "the sum is not rescaled when the maximum rises",
    HeadModulo: "query head h reads key/value head h % num_heads_kv",
    HeadsNotGrouped: "query head h reads key/value head h, or the last one",
    LseBase2: "the log-sum-exp is in base 2",
    LseWithoutMax: "the log-sum-exp lacks the maximum",
    LseOfEmptyRowsZero: "the log-sum-exp of a row that sees no key is 0",
    EmptyRowsNan: "a row that sees no key is NaN",
    HiddenFinite: "hidden keys score -1e30: a row that sees none is a mean of what it does not see",
    TileStoredWhole: "the last tile of queries is stored whole, past the end",
    LastRowNotStored: "the last row is not stored",
    LastColumnNotStored: "columns are stored in pairs, and the last of an odd number is lost",
    HeadDimTailOfKeyRead: "columns past the end are read for the key, zeros for the query",
    HeadDimTailRead: "columns past the end are read for query and key",
    OffsetWraps: "offsets wrap: at 16 bits here, for what happens to 32 with tensors that no test on a CPU holds",
    BatchStrideIgnored: "the key's batch stride is taken to be that of a contiguous tensor",
    HeadStrideIgnored: "the value's head stride is taken to be that of a contiguous tensor",
    SeqStrideOfQuery: "the key is read with the query's stride along the sequence",
    OutputThroughBf16: "the output is rounded to bf16 before it is rounded to its type",
    OutputTruncated: "the output is cut off instead of rounded",
    AccumulatorNarrow: "the accumulator is rounded to the element type after every tile",
    WeightsNarrow: "the weights are rounded to 3 bits of mantissa, as in FP8",
    ScoresNarrow: "the scores are rounded to the element type",
    SubnormalsFlushed: "subnormal values are read as 0",
    MaskBeforeScale: "the mask is added before the scale is applied",
    BoolMaskInverted: "a boolean mask hides what it should show",
    MaskIgnored: "the mask is ignored",
    MaskOfFirstRow: "the mask is broadcast along the rows",
    MaskOfFirstHead: "the mask is broadcast along the heads",
    MaskOfFirstKey: "the mask is broadcast along the keys of a tile",
    Race: "tiles of keys are taken in an order that changes from call to call",
    NanSwallowed: "the maximum with -inf drops a NaN score, and its key with it",
    NanLeaks: "the accumulator is cleared by multiplying it with 0",
    CombineWithoutWeights: "the parts of split keys are averaged",
    CombineCountsEmptyParts: "a part that saw no key counts as one of weight 1",
    SplitBoundaryDropped: "the first key of the second part is lost",
    SplitBoundaryTwice: "the first key of the second part is in the first part too",
}

/// Every fault, with what it does.
pub fn mutants() -> impl Iterator<Item = (Fault, &'static str)> {
    FAULTS.iter().copied()
}

/// A kernel with a fault, or without one. Computes in f16 and bf16.
#[derive(Clone, Copy, Debug)]
pub struct Mutant(pub Option<Fault>);

/// What gave a wrong subject away.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kill {
    /// The case's name.
    pub case: String,
    /// What was wrong.
    pub reason: String,
}

/// Runs cases until one shows that a subject is wrong: against the oracle, bit by bit on a second run, and, for cases of
/// the family `property`, by the properties. The smallest cases of every family come first. A refusal is no kill.
pub fn hunt(subject: &dyn Subject, cases: &[Case], seed: u64) -> Option<Kill> {
    hunt_telling(subject, cases, seed, &mut |_| ())
}

/// The same, and `next` is told each case before it runs.
pub(super) fn hunt_telling(
    subject: &dyn Subject,
    cases: &[Case],
    seed: u64,
    next: &mut dyn FnMut(&Case),
) -> Option<Kill> {
    in_order(cases).into_iter().find_map(|case| {
        next(case);
        let verdict = check_repeatedly(subject, case, seed, 2);
        let wrong = !verdict.pass && (verdict.refused.is_none() || verdict.device_failed);
        let oracle = wrong.then(|| verdict.reason());
        let reason = oracle.or_else(|| {
            let verdicts = if case.family == "property" { check_properties(subject, case, seed) } else { Vec::new() };
            let broken = verdicts.into_iter().find(|verdict| !verdict.pass && !verdict.refused)?;
            Some(format!("{}: {}", broken.property, broken.reason))
        });
        reason.map(|reason| Kill { case: case.to_string(), reason })
    })
}

/// Families in turns, the least work of each first.
fn in_order(cases: &[Case]) -> Vec<&Case> {
    let work = |case: &Case| {
        let [query, key, value, out] = case.shapes().map(|shape| shape.iter().product::<usize>());
        (query + out) * case.seq_len_k + key + value
    };
    let mut ordered: Vec<&Case> = cases.iter().collect();
    ordered.sort_by_key(|case| work(case));
    let mut seen = std::collections::HashMap::<&str, usize>::new();
    let mut ranked: Vec<(usize, &Case)> = ordered
        .into_iter()
        .map(|case| {
            let rank = seen.entry(&case.family).or_default();
            *rank += 1;
            (*rank, case)
        })
        .collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, case)| case).collect()
}

impl Subject for Mutant {
    fn compute(&self, inputs: &Inputs, out: &mut HostTensor, lse: Option<&mut HostTensor>) -> Result<Ran> {
        let problem = problem_of(inputs, out, lse.is_some())?;
        if !matches!(problem.dtype, DType::F16 | DType::BF16) {
            return Err(Error::invalid("query", format!("dtype {}", problem.dtype), "f16 or bf16"));
        }
        Kernel::new(self.0, problem, inputs).run(out, lse);
        Ok(Ran { variant: "model".into(), tile: Some([ROWS, KEYS]), key_splits: 1 })
    }
}

thread_local! {
    /// Calls of this thread, for [`Fault::Race`].
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

/// A tensor in memory, widened, with all that is around it.
struct Source {
    memory: Vec<f32>,
    start: usize,
    shape: [usize; 4],
    strides: [usize; 4],
}

impl Source {
    fn new(tensor: &HostTensor) -> Self {
        let strides = tensor.layout().strides.map(|stride| stride as usize);
        Self { memory: tensor.memory(), start: tensor.start(), shape: tensor.layout().shape, strides }
    }

    /// What is at an offset, inside the tensor or not; beyond all memory there is nothing but NaN.
    fn at(&self, offset: usize) -> f32 {
        self.memory.get(self.start + offset).copied().unwrap_or(f32::NAN)
    }

    fn offset(&self, index: [usize; 4]) -> usize {
        self.strides.iter().zip(index).map(|(stride, i)| stride * i).sum()
    }

    /// The stride that a contiguous tensor has.
    fn contiguous(&self, dim: usize) -> usize {
        self.shape[dim + 1..].iter().product()
    }
}

/// One call.
struct Kernel {
    fault: Option<Fault>,
    problem: Problem,
    query: Source,
    key: Source,
    value: Source,
    mask: Option<(Source, DType)>,
    band: Band,
    scale: f32,
    /// head_dim of query and key as a tile holds it.
    padded: usize,
    odd_call: bool,
}

/// A tile of query rows on its way through keys.
struct Walk {
    max: [f32; ROWS],
    sum: [f32; ROWS],
    /// Row by row.
    acc: Vec<f32>,
}

/// What a walk comes to.
struct Part {
    /// In base 2.
    lse: [f32; ROWS],
    /// Row by row.
    out: Vec<f32>,
}

impl Kernel {
    fn new(fault: Option<Fault>, problem: Problem, inputs: &Inputs) -> Self {
        CALLS.set(CALLS.get() + 1);
        let mut kernel = Self {
            fault,
            query: Source::new(&inputs.query),
            key: Source::new(&inputs.key),
            value: Source::new(&inputs.value),
            mask: inputs.attn_mask.as_ref().map(|mask| (Source::new(mask), mask.layout().dtype)),
            band: problem.band.unwrap_or(Band { lo: -(problem.seq_len_q as i32), hi: problem.seq_len_k as i32 }),
            scale: problem.scale(),
            padded: problem.head_dim_qk.next_power_of_two().max(16),
            odd_call: CALLS.get() % 2 == 1,
            problem,
        };
        if let Some((mask, _)) = &mut kernel.mask {
            for (stride, size) in mask.strides.iter_mut().zip(mask.shape) {
                *stride = if size == 1 { 0 } else { *stride };
            }
        }
        kernel.plant_in_arguments(inputs);
        kernel
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    /// The faults of a caller who passes the wrong arguments.
    fn plant_in_arguments(&mut self, inputs: &Inputs) {
        let ahead = self.problem.seq_len_k as i32 - self.problem.seq_len_q as i32;
        let options = inputs.options;
        match self.fault {
            Some(Fault::ValueFromKey) => self.value = Source::new(&inputs.key),
            Some(Fault::ValueFromQuery) => self.value = Source::new(&inputs.query),
            Some(Fault::QueryKeySwapped) => std::mem::swap(&mut self.query, &mut self.key),
            Some(Fault::BatchStrideIgnored) => self.key.strides[0] = self.key.contiguous(0),
            Some(Fault::HeadStrideIgnored) => self.value.strides[1] = self.value.contiguous(1),
            Some(Fault::SeqStrideOfQuery) => self.key.strides[2] = self.query.strides[2],
            Some(Fault::CausalOffByOne) if options.causal => self.band.hi += 1,
            Some(Fault::WindowOffByOne) if options.window.is_some() => self.band.lo -= 1,
            Some(Fault::CausalOtherDiagonal) if options.causal_align == CausalAlign::BottomRight => {
                self.band = Band { lo: self.band.lo - ahead, hi: self.band.hi - ahead };
            }
            Some(Fault::ScaleOfPaddedHeadDim) if options.scale.is_none() => {
                self.scale = 1.0 / (self.padded as f32).sqrt();
            }
            Some(Fault::ScaleSquared) => self.scale *= self.scale,
            Some(Fault::ScaleSignLost) => self.scale = self.scale.abs(),
            Some(Fault::MaskIgnored) => self.mask = None,
            Some(Fault::MaskOfFirstHead) => self.mask.iter_mut().for_each(|(mask, _)| mask.strides[1] = 0),
            Some(Fault::MaskOfFirstRow) => self.mask.iter_mut().for_each(|(mask, _)| mask.strides[2] = 0),
            _ => {}
        }
    }

    fn run(&self, out: &mut HostTensor, mut lse: Option<&mut HostTensor>) {
        let p = &self.problem;
        let mut walk = Walk::new(p.head_dim_v);
        for (batch, head) in (0..p.batch).flat_map(|b| (0..p.num_heads_q).map(move |h| (b, h))) {
            for first in (0..p.seq_len_q).step_by(ROWS) {
                let parts = self.parts(first);
                let parts = parts.into_iter().map(|keys| {
                    self.walk(&mut walk, [batch, head, first], keys);
                    self.finish(&walk)
                });
                let whole = self.combine(parts.collect());
                self.store(&whole, [batch, head, first], out, lse.as_deref_mut());
            }
        }
    }

    /// The keys that a tile of queries visits, in the parts in which it does.
    fn parts(&self, first: usize) -> Vec<Range<usize>> {
        let p = &self.problem;
        let rows = first as i64..(first + ROWS).min(p.seq_len_q) as i64;
        let clamp = |key: i64| key.clamp(0, p.seq_len_k as i64) as usize;
        let start = clamp(rows.start + i64::from(self.band.lo)) / KEYS * KEYS;
        let end = clamp(rows.end + i64::from(self.band.hi));
        let end = if self.is(Fault::KeyRemainderSkipped) { end / KEYS * KEYS } else { end };
        let tiles = end.saturating_sub(start).div_ceil(KEYS);
        let whole = start..end;
        if tiles < SPLIT_FROM {
            return vec![whole];
        }
        let middle = start + tiles / 2 * KEYS;
        let one_end = if self.is(Fault::SplitBoundaryTwice) { middle + 1 } else { middle };
        let other_start = if self.is(Fault::SplitBoundaryDropped) { middle + 1 } else { middle };
        vec![start..one_end, other_start..end]
    }

    /// Takes a tile of queries through keys.
    fn walk(&self, walk: &mut Walk, [batch, head, first]: [usize; 3], keys: Range<usize>) {
        let p = &self.problem;
        if !self.is(Fault::StateStale) {
            walk.max.fill(f32::NEG_INFINITY);
            walk.sum.fill(0.0);
            walk.acc.iter_mut().for_each(|acc| *acc = if self.is(Fault::NanLeaks) { *acc * 0.0 } else { 0.0 });
        }
        let kv_head = match self.fault {
            Some(Fault::HeadModulo) => head % p.num_heads_kv,
            Some(Fault::HeadsNotGrouped) => head.min(p.num_heads_kv - 1),
            _ => head / p.group(),
        };
        let rows = ROWS.min(p.seq_len_q - first);
        let query: Vec<Vec<f32>> =
            (0..rows).map(|r| self.load(&self.query, [batch, head, first + r], p.head_dim_qk, self.padded)).collect();
        let mut tiles: Vec<usize> = keys.clone().step_by(KEYS).collect();
        if self.is(Fault::Race) && self.odd_call {
            tiles.reverse();
        }
        for tile in tiles {
            let count = KEYS.min(p.seq_len_k - tile);
            let index = |j| [batch, kv_head, tile + j];
            let key: Vec<Vec<f32>> =
                (0..count).map(|j| self.load(&self.key, index(j), p.head_dim_qk, self.padded)).collect();
            let value: Vec<Vec<f32>> =
                (0..count).map(|j| self.load(&self.value, index(j), p.head_dim_v, p.head_dim_v)).collect();
            for (r, query) in query.iter().enumerate() {
                let mut scores = [0.0; KEYS];
                for (j, score) in scores.iter_mut().enumerate() {
                    let dot = key.get(j).map_or(0.0, |key| dot(query, key));
                    *score = self.score(dot, [batch, head, first + r, tile + j], keys.end);
                }
                self.update(walk, r, &scores, &value);
            }
        }
    }

    /// A row as a tile holds it: 0 in the columns past the end.
    fn load(&self, source: &Source, [batch, head, row]: [usize; 3], dim: usize, padded: usize) -> Vec<f32> {
        let first = source.offset([batch, head, row, 0]);
        let is_key = std::ptr::eq(source, &self.key);
        let reads_tail = self.is(Fault::HeadDimTailRead) || (self.is(Fault::HeadDimTailOfKeyRead) && is_key);
        let wrap = if self.is(Fault::OffsetWraps) { 1 << 16 } else { usize::MAX };
        let smallest = match self.problem.dtype {
            DType::F16 => f16::MIN_POSITIVE.to_f32(),
            _ => bf16::MIN_POSITIVE.to_f32(),
        };
        let mut row = vec![0.0; padded];
        for (d, x) in row.iter_mut().enumerate().take(if reads_tail { padded } else { dim }) {
            *x = source.at((first + d) % wrap);
            if self.is(Fault::SubnormalsFlushed) && x.abs() < smallest {
                *x = 0.0;
            }
        }
        row
    }

    /// What a row gives a key, in base 2; -inf where it does not see it.
    fn score(&self, dot: f32, [batch, head, row, key]: [usize; 4], end: usize) -> f32 {
        let p = &self.problem;
        let hidden = if self.is(Fault::HiddenFinite) { -1e30 } else { f32::NEG_INFINITY };
        let keys = if self.is(Fault::KeyTailOfQueryLength) { p.seq_len_q } else { p.seq_len_k };
        if key >= keys {
            return if self.is(Fault::KeyTailScoresZero) { 0.0 } else { hidden };
        }
        let stands_at = if self.is(Fault::CausalByTile) { row / ROWS * ROWS } else { row };
        let ahead = key as i64 - stands_at as i64;
        let before_window = ahead < self.band.lo.into() && !self.is(Fault::WindowStartUnmasked);
        if key >= end || before_window || ahead > self.band.hi.into() {
            return hidden;
        }
        let bias = self.bias([batch, head, row, key]);
        if bias == f32::NEG_INFINITY {
            return hidden;
        }
        let score = match self.fault {
            Some(Fault::MaskBeforeScale) => (dot + bias) * self.scale,
            Some(Fault::ScoresNarrow) => self.narrow(dot * self.scale) + bias,
            Some(Fault::NanSwallowed) => (dot * self.scale + bias).max(f32::NEG_INFINITY),
            _ => dot * self.scale + bias,
        };
        score * std::f32::consts::LOG2_E
    }

    /// What the mask adds to a score.
    fn bias(&self, [batch, head, row, key]: [usize; 4]) -> f32 {
        let Some((mask, dtype)) = &self.mask else { return 0.0 };
        let key = if self.is(Fault::MaskOfFirstKey) { key / KEYS * KEYS } else { key };
        let bias = mask.at(mask.offset([batch, head, row, key]));
        match dtype {
            DType::Bool if (bias == 0.0) != self.is(Fault::BoolMaskInverted) => f32::NEG_INFINITY,
            DType::Bool => 0.0,
            _ => bias,
        }
    }

    /// The online softmax of one row and one tile of keys.
    fn update(&self, walk: &mut Walk, r: usize, scores: &[f32; KEYS], value: &[Vec<f32>]) {
        let before = if self.is(Fault::MaxNotCarried) { f32::NEG_INFINITY } else { walk.max[r] };
        let max = if self.is(Fault::MaxNotSubtracted) { 0.0 } else { scores.iter().copied().fold(before, larger) };
        // A row that has seen nothing yet: any origin keeps its weights 0.
        let origin = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let rescale = (before - origin).exp2();
        let weights = scores.map(|score| (score - origin).exp2());
        let sum_rescale = if self.is(Fault::SumNotRescaled) { 1.0 } else { rescale };
        walk.sum[r] = weights.iter().fold(walk.sum[r] * sum_rescale, |sum, weight| sum + weight);
        let dim = self.problem.head_dim_v;
        let acc = &mut walk.acc[r * dim..][..dim];
        if !self.is(Fault::AccumulatorNotRescaled) {
            acc.iter_mut().for_each(|acc| *acc *= rescale);
        }
        for (weight, value) in weights.iter().zip(value) {
            let weight = if self.is(Fault::WeightsNarrow) { cut(*weight, 3) } else { self.narrow(*weight) };
            acc.iter_mut().zip(value).for_each(|(acc, x)| *acc += weight * x);
        }
        if self.is(Fault::AccumulatorNarrow) {
            acc.iter_mut().for_each(|acc| *acc = self.narrow(*acc));
        }
        walk.max[r] = max;
    }

    fn finish(&self, walk: &Walk) -> Part {
        let mut part = Part { lse: [f32::NEG_INFINITY; ROWS], out: vec![0.0; walk.acc.len()] };
        let dim = self.problem.head_dim_v;
        for r in 0..ROWS {
            let (max, sum) = (walk.max[r], walk.sum[r]);
            if sum == 0.0 && !self.is(Fault::EmptyRowsNan) {
                continue;
            }
            part.lse[r] = if self.is(Fault::LseWithoutMax) { sum.log2() } else { max + sum.log2() };
            for (out, acc) in part.out[r * dim..][..dim].iter_mut().zip(&walk.acc[r * dim..]) {
                *out = acc / sum;
            }
        }
        part
    }

    /// Puts the parts of a tile of queries together.
    fn combine(&self, parts: Vec<Part>) -> Part {
        let dim = self.problem.head_dim_v;
        let mut whole = Part { lse: [f32::NEG_INFINITY; ROWS], out: vec![0.0; ROWS * dim] };
        for r in 0..ROWS {
            let max = parts.iter().fold(f32::NEG_INFINITY, |max, part| larger(max, part.lse[r]));
            let origin = if max == f32::NEG_INFINITY { 0.0 } else { max };
            let weight = |part: &Part| match self.fault {
                Some(Fault::CombineWithoutWeights) => 1.0,
                Some(Fault::CombineCountsEmptyParts) if part.lse[r] == f32::NEG_INFINITY => 1.0,
                _ => (part.lse[r] - origin).exp2(),
            };
            let sum: f32 = parts.iter().map(weight).sum();
            if sum == 0.0 {
                continue;
            }
            whole.lse[r] = max + sum.log2();
            for part in &parts {
                for (out, x) in whole.out[r * dim..][..dim].iter_mut().zip(&part.out[r * dim..]) {
                    *out += weight(part) / sum * x;
                }
            }
        }
        whole
    }

    fn store(
        &self,
        whole: &Part,
        [batch, head, first]: [usize; 3],
        out: &mut HostTensor,
        lse: Option<&mut HostTensor>,
    ) {
        let p = &self.problem;
        let dim = p.head_dim_v;
        let rows = if self.is(Fault::TileStoredWhole) { ROWS } else { ROWS.min(p.seq_len_q - first) };
        let rows = if self.is(Fault::LastRowNotStored) { rows.min(p.seq_len_q - 1 - first) } else { rows };
        let columns = if self.is(Fault::LastColumnNotStored) { dim / 2 * 2 } else { dim };
        let [batch_stride, head_stride, seq_stride, _] = out.layout().strides.map(|stride| stride as usize);
        for r in 0..rows {
            let row = out.start() + batch * batch_stride + head * head_stride + (first + r) * seq_stride;
            for d in 0..columns {
                let x = whole.out[r * dim + d];
                out.poke(
                    row + d,
                    match self.fault {
                        Some(Fault::OutputThroughBf16) => bf16::from_f32(x).to_f32(),
                        Some(Fault::OutputTruncated) => cut(x, if p.dtype == DType::F16 { 10 } else { 7 }),
                        _ => x,
                    },
                );
            }
        }
        let Some(lse) = lse else { return };
        let row = lse.start() + (batch * p.num_heads_q + head) * p.seq_len_q + first;
        for (r, &x) in whole.lse[..rows.min(p.seq_len_q - first)].iter().enumerate() {
            lse.poke(
                row + r,
                match self.fault {
                    Some(Fault::LseBase2) => x,
                    Some(Fault::LseOfEmptyRowsZero) if x == f32::NEG_INFINITY => 0.0,
                    _ => x * std::f32::consts::LN_2,
                },
            );
        }
    }

    /// Rounded to the element type.
    fn narrow(&self, x: f32) -> f32 {
        match self.problem.dtype {
            DType::F16 => f16::from_f32(x).to_f32(),
            _ => bf16::from_f32(x).to_f32(),
        }
    }
}

impl Walk {
    fn new(dim: usize) -> Self {
        Self { max: [f32::NEG_INFINITY; ROWS], sum: [0.0; ROWS], acc: vec![0.0; ROWS * dim] }
    }
}

/// The larger of two, or a NaN among them.
fn larger(x: f32, y: f32) -> f32 {
    if y.is_nan() || y > x { y } else { x }
}

/// The first bits of the mantissa; the rest is 0.
fn cut(x: f32, mantissa: u32) -> f32 {
    f32::from_bits(x.to_bits() & (u32::MAX << (23 - mantissa)))
}

fn dot(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).fold(0.0, |sum, (x, y)| sum + x * y)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::correct::Outcome;
    use super::super::matrix::{Extent, matrix};
    use super::super::properties::property_cases;
    use super::*;

    fn cases(extent: Extent) -> Vec<Case> {
        matrix(extent).into_iter().chain(property_cases(Extent::Quick)).collect()
    }

    #[test]
    fn without_a_fault_nothing_is_wrong() {
        let kill = hunt(&Mutant(None), &cases(Extent::Quick), 0);
        assert!(kill.is_none(), "{kill:?}");
    }

    #[test]
    fn every_mutant_is_killed() {
        let cases = cases(Extent::Default);
        let alive: Vec<String> = mutants()
            .filter(|(fault, _)| hunt(&Mutant(Some(*fault)), &cases, 0).is_none())
            .map(|(fault, what)| format!("{fault:?}: {what}"))
            .collect();
        assert!(alive.is_empty(), "alive:\n{}", alive.join("\n"));
        assert!(mutants().count() >= 24);
    }

    #[test]
    fn every_property_finds_some_fault_by_itself() {
        let cases = property_cases(Extent::Default);
        for (property, fault, case) in [
            ("key_permutation", Fault::MaxNotCarried, "f16 s65 d64"),
            ("value_linearity", Fault::ValueFromKey, "f16 s65 d64"),
            ("softmax_shift", Fault::MaxNotSubtracted, "f16 s65 d64"),
            ("causal_prefix", Fault::CausalOffByOne, "f16 s65 d64 causal"),
            ("split_merge", Fault::LseBase2, "f16 s65 d64"),
            ("grouped_heads", Fault::HeadModulo, "f16 s65 d64"),
            ("head_alone", Fault::HeadModulo, "f16 s65 d64"),
            ("position", Fault::StateStale, "f16 s65 d64"),
            ("ones", Fault::AccumulatorNotRescaled, "f16 s65 d64"),
            ("uniform", Fault::OutputTruncated, "f16 s65 d64"),
            ("scale_exchange", Fault::ScaleSquared, "f16 s65 d64"),
            ("column_permutation", Fault::HeadDimTailRead, "bf16 s70x90 d111"),
            ("duplication", Fault::KeyTailScoresZero, "f16 s65 d64"),
            ("band_as_mask", Fault::CausalOffByOne, "f16 s65 d64 causal"),
            ("bool_as_additive", Fault::BoolMaskInverted, "f16 s50x97 bool-mask"),
        ] {
            let has_words = |name: &str| case.split(' ').all(|word| name.contains(word));
            let case = cases.iter().find(|case| has_words(&case.to_string())).expect("a case");
            let of = |subject| {
                let verdicts = check_properties(&subject, case, 0);
                verdicts.into_iter().find(|verdict| verdict.property == property).expect("a verdict")
            };
            let (sound, wrong) = (of(Mutant(None)), of(Mutant(Some(fault))));
            assert!(sound.pass, "{property} of {case}: {}", sound.reason);
            assert!(!wrong.pass && !wrong.refused && !wrong.reason.is_empty(), "{property} does not find {fault:?}");
        }
    }

    /// The output of a mutant for inputs of which query, key and value are the same.
    fn with_the_same_inputs(mutant: Mutant, case: &Case) -> HostTensor {
        let mut inputs = Inputs::draw(case, 0).expect("inputs");
        (inputs.key, inputs.value) = (inputs.query.clone(), inputs.query.clone());
        Outcome::new(&mutant, case, &inputs).expect("an answer").out
    }

    #[test]
    fn with_the_same_tensor_three_times_wrong_pointers_live() {
        let square = |seq, dim| Case::new("test", [2, 2], [seq, seq], dim);
        for case in [square(128, 64), square(65, 40), square(300, 128)] {
            let right = with_the_same_inputs(Mutant(None), &case);
            for fault in [Fault::ValueFromKey, Fault::ValueFromQuery, Fault::QueryKeySwapped] {
                assert!(
                    with_the_same_inputs(Mutant(Some(fault)), &case).same_bits(&right),
                    "{fault:?} shows in {case}"
                );
                assert!(
                    hunt(&Mutant(Some(fault)), std::slice::from_ref(&case), 0).is_some(),
                    "{fault:?} lives in {case}"
                );
            }
        }
    }

    /// One dense shape of whole tiles, the same tensor three times, and a fixed tolerance: what FlashCore's predecessor
    /// was checked by.
    #[test]
    fn a_weak_check_lets_most_mutants_live() {
        let case = Case::new("test", [4, 4], [128, 128], 64).without_lse();
        let right = with_the_same_inputs(Mutant(None), &case);
        let close = |out: &HostTensor| {
            right.memory().iter().zip(out.memory()).all(|(x, y)| (x.is_nan() && y.is_nan()) || (x - y).abs() <= 2e-3)
        };
        let alive: HashSet<Fault> = mutants()
            .map(|(fault, _)| fault)
            .filter(|&fault| close(&with_the_same_inputs(Mutant(Some(fault)), &case)))
            .collect();
        let all = mutants().count();
        assert!(alive.len() > all * 2 / 3 && alive.len() < all, "{} of {all} live", alive.len());
        for fault in [Fault::KeyTailScoresZero, Fault::HeadModulo, Fault::NanSwallowed, Fault::Race] {
            assert!(alive.contains(&fault), "{fault:?} is found");
        }
    }
}
