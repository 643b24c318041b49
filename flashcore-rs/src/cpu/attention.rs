//! Tiled attention with an online softmax, on threads.
//!
//! A task owns a block of query rows that share a key/value head and walks the keys in tiles. Tasks depend on the problem
//! alone and finish their rows by themselves, so results do not depend on the number of threads. Nothing of size
//! `seq_len_q * seq_len_k` exists, and a task holds a few tiles and its own rows.

use std::array::from_fn;
use std::ops::Range;

use rayon::prelude::*;

use super::real::{Real, Scalar, gather, offset};
use crate::attention::Problem;
use crate::tensor::{HostMut, HostRef};

/// Keys in a tile.
const TILE: usize = 64;
/// Columns that the inner product keeps in registers.
const LANES: usize = 8;
/// Below this many multiply-adds threads cost more than they bring.
const SERIAL_BELOW: f64 = 2e5;

/// The inputs of a checked problem.
pub(crate) struct HostInputs<'a> {
    pub query: HostRef<'a>,
    pub key: HostRef<'a>,
    pub value: HostRef<'a>,
    pub attn_mask: Option<HostRef<'a>>,
}

/// Computes a checked problem: writes every element of `out`, and of `lse`, contiguous `(batch, num_heads_q, seq_len_q)`,
/// exactly once and touches nothing else.
///
/// The semantics are those of the design: a row whose scores are all `-inf` gives 0 and an LSE of `-inf`; a key that the
/// band, a `false` or an additive `-inf` hides from a row has no influence on it, whatever it holds; NaN and infinities
/// in a visible key follow IEEE arithmetic.
pub(crate) fn attention(problem: &Problem, inputs: HostInputs<'_>, out: HostMut<'_>, lse: Option<&mut [f32]>) {
    // As many rows at a time as leave the accumulators in the 16 registers of the x86-64 baseline.
    match out {
        HostMut::F16(out) => Call::<_, 4>::new(problem, &inputs).run(out, lse),
        HostMut::BF16(out) => Call::<_, 4>::new(problem, &inputs).run(out, lse),
        HostMut::F32(out) => Call::<_, 4>::new(problem, &inputs).run(out, lse),
        HostMut::F64(out) => Call::<_, 2>::new(problem, &inputs).run(out, lse),
        HostMut::Bool(_) => unreachable!("a checked problem has a float output"),
    }
}

/// A problem with its inputs; the inner loops take `ROWS` query rows at a time.
struct Call<'a, S: Scalar, const ROWS: usize> {
    problem: &'a Problem,
    query: &'a [S],
    key: &'a [S],
    value: &'a [S],
    mask: Option<(HostRef<'a>, [i64; 4])>,
    scale: S::Acc,
    /// Blocks of output columns.
    panels: usize,
    /// Query rows per task.
    block: usize,
    /// Tasks per key/value head.
    blocks: usize,
}

/// A tile of keys and values in the accumulator type.
struct Tile<T> {
    keys: Range<usize>,
    /// `[key / LANES][column][key % LANES]`.
    key: Vec<[T; LANES]>,
    /// `[column / LANES][key][column % LANES]`.
    value: Vec<[T; LANES]>,
    /// Value rows that are not finite throughout, with their places in the tile. They are 0 in `value`: a weight of 0
    /// would not keep them from the rows that do not see them.
    special: Vec<(usize, Vec<[T; LANES]>)>,
    row: Vec<T>,
}

/// Query rows on their way through the keys.
struct Rows<T> {
    batch: usize,
    /// Head and sequence position.
    places: Vec<(usize, usize)>,
    visible: Vec<Range<usize>>,
    query: Vec<T>,
    max: Vec<T>,
    sum: Vec<T>,
    acc: Vec<[T; LANES]>,
}

/// Finished rows.
struct Finished<S> {
    batch: usize,
    places: Vec<(usize, usize)>,
    out: Vec<S>,
    lse: Vec<f32>,
}

impl<'a, S: Scalar, const ROWS: usize> Call<'a, S, ROWS> {
    fn new(problem: &'a Problem, inputs: &HostInputs<'a>) -> Self {
        let rows = problem.group() * problem.seq_len_q;
        // A tile is repacked for every block, so blocks are large, unless that leaves too few of them.
        let block = match problem.batch * problem.num_heads_kv * rows {
            0..4096 => 32,
            4096..16384 => 64,
            _ => 128,
        };
        Self {
            problem,
            query: S::slice(inputs.query),
            key: S::slice(inputs.key),
            value: S::slice(inputs.value),
            mask: inputs.attn_mask.zip(problem.attn_mask.map(|mask| mask.strides)),
            scale: S::Acc::from_f32(problem.scale()),
            panels: problem.head_dim_v.div_ceil(LANES),
            block,
            blocks: rows.div_ceil(block),
        }
    }

    fn run(&self, out: &mut [S], mut lse: Option<&mut [f32]>) {
        let p = self.problem;
        if p.is_empty() {
            return;
        }
        let tasks = p.batch * p.num_heads_kv * self.blocks;
        let rows = (p.batch * p.num_heads_q * p.seq_len_q) as f64;
        let work = rows * p.seq_len_k as f64 * (p.head_dim_qk + p.head_dim_v) as f64;
        // The output may have any strides, so tasks fill buffers of their own and this thread places them. The waves
        // bound how many buffers there are.
        let wave = if work < SERIAL_BELOW { 1 } else { 16 * rayon::current_num_threads() };
        for first in (0..tasks).step_by(wave) {
            let wave = first..tasks.min(first + wave);
            if wave.len() == 1 {
                self.place(&self.task(first), out, lse.as_deref_mut());
                continue;
            }
            let finished: Vec<_> = wave.into_par_iter().with_max_len(1).map(|task| self.task(task)).collect();
            for rows in &finished {
                self.place(rows, out, lse.as_deref_mut());
            }
        }
    }

    fn place(&self, rows: &Finished<S>, out: &mut [S], lse: Option<&mut [f32]>) {
        let p = self.problem;
        let dim = p.head_dim_v;
        let stride = p.out_strides[3] as usize;
        for (r, &(head, i)) in rows.places.iter().enumerate() {
            let row = &rows.out[r * dim..][..dim];
            let first = offset(p.out_strides, [rows.batch, head, i, 0]);
            if dim == 0 {
                continue; // `out` is empty, whatever its strides say
            }
            if stride == 1 {
                out[first..][..dim].copy_from_slice(row);
            } else {
                for (d, &x) in row.iter().enumerate() {
                    out[first + d * stride] = x;
                }
            }
        }
        if let Some(lse) = lse {
            for (&(head, i), &x) in rows.places.iter().zip(&rows.lse) {
                lse[(rows.batch * p.num_heads_q + head) * p.seq_len_q + i] = x;
            }
        }
    }

    fn task(&self, task: usize) -> Finished<S> {
        let p = self.problem;
        let (head, block) = (task / self.blocks, task % self.blocks);
        let (batch, kv_head) = (head / p.num_heads_kv, head % p.num_heads_kv);
        let mut rows = self.rows(batch, kv_head, block);
        let seen = || rows.visible.iter().filter(|keys| !keys.is_empty());
        let start = seen().map(|keys| keys.start).min().unwrap_or(0);
        let end = seen().map(|keys| keys.end).max().unwrap_or(0);

        let mut tile = Tile::new(p.head_dim_qk, self.panels);
        // Tiles start at multiples of their size whatever the block sees, so that a row's sums do not depend on its block.
        for first in (start / TILE * TILE..end).step_by(TILE) {
            self.load(&mut tile, batch, kv_head, first);
            let count = rows.places.len();
            let whole = count / ROWS * ROWS;
            for row in (0..whole).step_by(ROWS) {
                self.update::<ROWS>(&tile, &mut rows, row);
            }
            for row in whole..count {
                self.update::<1>(&tile, &mut rows, row);
            }
        }
        self.finish(rows)
    }

    fn rows(&self, batch: usize, kv_head: usize, block: usize) -> Rows<S::Acc> {
        let p = self.problem;
        let dim = p.head_dim_qk;
        let end = ((block + 1) * self.block).min(p.group() * p.seq_len_q);
        let places: Vec<_> =
            (block * self.block..end).map(|row| (kv_head * p.group() + row / p.seq_len_q, row % p.seq_len_q)).collect();
        let mut query = vec![S::Acc::ZERO; places.len() * dim];
        for (r, &(head, i)) in places.iter().enumerate() {
            let first = offset(p.q_strides, [batch, head, i, 0]);
            gather(self.query, first, p.q_strides[3] as usize, &mut query[r * dim..][..dim]);
        }
        Rows {
            batch,
            visible: places.iter().map(|&(_, i)| p.visible_keys(i)).collect(),
            query,
            max: vec![S::Acc::NEG_INFINITY; places.len()],
            sum: vec![S::Acc::ZERO; places.len()],
            acc: vec![[S::Acc::ZERO; LANES]; places.len() * self.panels],
            places,
        }
    }

    fn load(&self, tile: &mut Tile<S::Acc>, batch: usize, kv_head: usize, first: usize) {
        let p = self.problem;
        tile.keys = first..p.seq_len_k.min(first + TILE);
        tile.special.clear();
        for (j, key) in tile.keys.clone().enumerate() {
            let row = &mut tile.row[..p.head_dim_qk];
            gather(self.key, offset(p.k_strides, [batch, kv_head, key, 0]), p.k_strides[3] as usize, row);
            let panel = &mut tile.key[j / LANES * p.head_dim_qk..][..p.head_dim_qk];
            for (column, &x) in panel.iter_mut().zip(row.iter()) {
                column[j % LANES] = x;
            }

            let row = &mut tile.row[..p.head_dim_v];
            gather(self.value, offset(p.v_strides, [batch, kv_head, key, 0]), p.v_strides[3] as usize, row);
            if !row.iter().fold(true, |finite, x| finite & x.is_finite()) {
                let mut special = vec![[S::Acc::ZERO; LANES]; self.panels];
                for (panel, x) in special.iter_mut().zip(row.chunks(LANES)) {
                    panel[..x.len()].copy_from_slice(x);
                }
                tile.special.push((j, special));
                row.fill(S::Acc::ZERO);
            }
            for (panel, x) in row.chunks(LANES).enumerate() {
                tile.value[panel * TILE + j][..x.len()].copy_from_slice(x);
            }
        }
    }

    /// Takes `N` rows from `first` on through a tile.
    fn update<const N: usize>(&self, tile: &Tile<S::Acc>, rows: &mut Rows<S::Acc>, first: usize) {
        let keys = &tile.keys;
        let seen: [Range<usize>; N] = from_fn(|r| {
            let clip = |key: usize| key.clamp(keys.start, keys.end) - keys.start;
            clip(rows.visible[first + r].start)..clip(rows.visible[first + r].end)
        });
        if seen.iter().all(Range::is_empty) {
            return;
        }
        let dim = self.problem.head_dim_qk;
        let query: [&[S::Acc]; N] = from_fn(|r| &rows.query[(first + r) * dim..][..dim]);
        let mut scores = [[S::Acc::ZERO; TILE]; N];
        for panel in 0..keys.len().div_ceil(LANES) {
            let product = multiply(query, &tile.key[panel * dim..][..dim]);
            for (row, product) in scores.iter_mut().zip(product) {
                row[panel * LANES..][..LANES].copy_from_slice(&product);
            }
        }

        let mut bias = [S::Acc::ZERO; TILE];
        let mut rescale = [S::Acc::ZERO; N];
        for r in 0..N {
            let masked = self.bias(rows.batch, rows.places[first + r], keys, &mut bias);
            let row = &mut scores[r];
            if masked {
                for (x, &bias) in row.iter_mut().zip(&bias) {
                    let score = *x * self.scale + bias;
                    *x = if bias == S::Acc::NEG_INFINITY { bias } else { score };
                }
            } else {
                row.iter_mut().for_each(|x| *x *= self.scale);
            }
            row[..seen[r].start].fill(S::Acc::NEG_INFINITY);
            row[seen[r].end..].fill(S::Acc::NEG_INFINITY);
            rescale[r] = online_softmax(row, &mut rows.max[first + r], &mut rows.sum[first + r]);
        }

        let weights: [&[S::Acc]; N] = from_fn(|r| &scores[r][..keys.len()]);
        for panel in 0..self.panels {
            let product = multiply(weights, &tile.value[panel * TILE..][..keys.len()]);
            for r in 0..N {
                let acc = &mut rows.acc[(first + r) * self.panels + panel];
                for (acc, x) in acc.iter_mut().zip(product[r]) {
                    *acc = *acc * rescale[r] + x;
                }
            }
        }

        for r in 0..N {
            if tile.special.iter().all(|(j, _)| !seen[r].contains(j)) {
                continue;
            }
            let masked = self.bias(rows.batch, rows.places[first + r], keys, &mut bias);
            for (j, value) in &tile.special {
                if seen[r].contains(j) && !(masked && bias[*j] == S::Acc::NEG_INFINITY) {
                    let acc = &mut rows.acc[(first + r) * self.panels..][..self.panels];
                    for (acc, &x) in acc.as_flattened_mut().iter_mut().zip(value.as_flattened()) {
                        *acc += scores[r][*j] * x;
                    }
                }
            }
        }
    }

    /// What the mask adds to the scores of a row; `-inf` hides a key. False when there is no mask.
    fn bias(&self, batch: usize, place: (usize, usize), keys: &Range<usize>, bias: &mut [S::Acc; TILE]) -> bool {
        let Some((mask, strides)) = self.mask else { return false };
        let bias = &mut bias[..keys.len()];
        let first = offset(strides, [batch, place.0, place.1, keys.start]);
        let stride = strides[3] as usize;
        match mask {
            HostRef::F16(mask) => add_in(mask, first, stride, S::Acc::from_f32, bias),
            HostRef::BF16(mask) => add_in(mask, first, stride, S::Acc::from_f32, bias),
            HostRef::F32(mask) => add_in(mask, first, stride, S::Acc::from_f32, bias),
            HostRef::F64(mask) => add_in(mask, first, stride, S::Acc::from_f64, bias),
            HostRef::Bool(mask) => {
                for (j, x) in bias.iter_mut().enumerate() {
                    *x = if mask[first + j * stride] == 0 { S::Acc::NEG_INFINITY } else { S::Acc::ZERO };
                }
            }
        }
        true
    }

    fn finish(&self, rows: Rows<S::Acc>) -> Finished<S> {
        let dim = self.problem.head_dim_v;
        let mut out = vec![S::default(); rows.places.len() * dim];
        let mut lse = vec![f32::NEG_INFINITY; rows.places.len()];
        let mut row = vec![S::Acc::ZERO; dim];
        for r in 0..rows.places.len() {
            // The largest score contributes a weight of 1, so a sum of 0 means that there was none above -inf.
            if rows.sum[r] == S::Acc::ZERO {
                continue;
            }
            let acc = rows.acc[r * self.panels..][..self.panels].as_flattened();
            for (x, &acc) in row.iter_mut().zip(acc) {
                *x = acc / rows.sum[r];
            }
            S::narrow(&row, &mut out[r * dim..][..dim]);
            lse[r] = (rows.max[r] + rows.sum[r].ln()).to_f64() as f32;
        }
        Finished { batch: rows.batch, places: rows.places, out, lse }
    }
}

impl<T: Real> Tile<T> {
    fn new(head_dim_qk: usize, panels: usize) -> Self {
        Self {
            keys: 0..0,
            key: vec![[T::ZERO; LANES]; TILE / LANES * head_dim_qk],
            value: vec![[T::ZERO; LANES]; panels * TILE],
            special: Vec::new(),
            row: vec![T::ZERO; head_dim_qk.max(panels * LANES)],
        }
    }
}

/// `N` rows times a panel of columns, summed in order.
#[inline(always)]
fn multiply<T: Real, const N: usize>(rows: [&[T]; N], panel: &[[T; LANES]]) -> [[T; LANES]; N] {
    let rows = rows.map(|row| &row[..panel.len()]);
    let mut product = [[T::ZERO; LANES]; N];
    for (k, column) in panel.iter().enumerate() {
        for r in 0..N {
            let x = rows[r][k];
            for lane in 0..LANES {
                product[r][lane] += x * column[lane];
            }
        }
    }
    product
}

/// Turns scores into weights relative to the largest score so far; returns what brings earlier sums to the same footing.
fn online_softmax<T: Real>(scores: &mut [T; TILE], max: &mut T, sum: &mut T) -> T {
    // A comparison with NaN is false, so the maximum passes over it; the weight of a NaN is NaN and reaches the sum.
    let larger = |x: T, y: T| if y > x { y } else { x };
    let mut lanes = [*max; LANES];
    for chunk in scores.chunks_exact(LANES) {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, x);
        }
    }
    let new = lanes.into_iter().fold(*max, larger);
    // While all scores are -inf there is no largest one to subtract: any finite number gives them weight 0.
    let base = if new == T::NEG_INFINITY { T::ZERO } else { new };
    let rescale = (*max - base).exp_nonpositive();
    let mut lanes = [T::ZERO; LANES];
    for chunk in scores.chunks_exact_mut(LANES) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *x = (*x - base).exp_nonpositive();
            *lane += *x;
        }
    }
    *sum = *sum * rescale + lanes.into_iter().fold(T::ZERO, |sum, x| sum + x);
    *max = new;
    rescale
}

/// Reads a row of an additive mask.
fn add_in<M: Scalar, T: Real>(mask: &[M], first: usize, stride: usize, convert: fn(M::Acc) -> T, bias: &mut [T]) {
    let mut row = [M::Acc::ZERO; TILE];
    let row = &mut row[..bias.len()];
    gather(mask, first, stride, row);
    for (bias, &x) in bias.iter_mut().zip(row.iter()) {
        *bias = convert(x);
    }
}
