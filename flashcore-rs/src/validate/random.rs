//! Problems drawn at random over everything that a case can say.
//!
//! Each is a function of the seed and its place in the list, so a list is the beginning of every longer one, and a case is
//! found again by its name and the seed of its list. Sizes come from the edges of tiles, from primes and from anything in
//! between, and are cut down until the fp64 oracle takes a few milliseconds.

use std::collections::HashSet;

use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use super::case::{Case, Hidden, Mask, MaskType, Memory, Order, Special, SpecialTensor, SpecialValue};
use super::inputs::generator;
use super::matrix::DTYPES;
use crate::attention::{AttentionOptions, CausalAlign, Window};
use crate::dtype::DType;

/// Multiply-adds of a problem at most, hidden keys included.
const MOST_WORK: usize = 3_000_000;
/// Elements of a mask at most.
const MOST_MASK: usize = 200_000;

const EDGES: [usize; 21] =
    [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 511, 513];
const PRIMES: [usize; 16] = [2, 3, 5, 7, 11, 13, 29, 53, 97, 101, 149, 211, 307, 401, 503, 1009];
const HEAD_DIMS: [usize; 17] = [1, 8, 16, 24, 32, 40, 64, 72, 80, 96, 111, 120, 128, 160, 192, 255, 256];
const GROUPS: [usize; 10] = [1, 1, 1, 1, 2, 2, 3, 4, 7, 8];

/// `count` problems that every backend answers: f16 and bf16.
pub fn random_cases(count: usize, seed: u64) -> Vec<Case> {
    random_cases_of(&DTYPES, count, seed)
}

/// `count` problems of these element types; the CPU backend computes in f32 and f64 too.
pub fn random_cases_of(dtypes: &[DType], count: usize, seed: u64) -> Vec<Case> {
    let mut names = HashSet::new();
    let cases = (0_u64..).filter_map(|index| {
        let mut draw = Draw(generator(seed, "random", &index.to_string()));
        draw.case(dtypes).filter(|case| names.insert(case.to_string()))
    });
    cases.take(if dtypes.is_empty() { 0 } else { count }).collect()
}

struct Draw(ChaCha8Rng);

impl Draw {
    /// One of these; `None` only where there are none.
    fn of<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        from.choose(&mut self.0).copied()
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.0.random_ratio(1, n)
    }

    fn size(&mut self, typical: &[usize], most: usize) -> Option<usize> {
        if self.one_in(3) { Some(self.0.random_range(1..=most)) } else { self.of(typical) }
    }

    fn case(&mut self, dtypes: &[DType]) -> Option<Case> {
        let (kv_heads, group) = (self.0.random_range(1..=3), self.of(&GROUPS)?);
        let seq_lens = [self.seq_len()?, self.seq_len()?];
        let head_dim = self.size(&HEAD_DIMS, 256)?;
        let mut case = Case::new("random", [kv_heads * group, kv_heads], seq_lens, head_dim);
        case.dtype = self.of(dtypes)?;
        case.batch = self.0.random_range(1..=3);
        if self.one_in(3) {
            case.head_dim_v = self.size(&HEAD_DIMS, 256)?;
        }
        self.options(&mut case)?;
        self.memory(&mut case)?;
        case.lse = !self.one_in(4);
        if self.one_in(3) {
            case.attn_mask = Some(self.mask()?);
        }
        self.cut(&mut case);
        self.values(&mut case)?;
        Some(case)
    }

    fn seq_len(&mut self) -> Option<usize> {
        match self.0.random_range(0..20) {
            0 if self.one_in(2) => Some(0),
            1 => Some(self.0.random_range(1000..8192)),
            2..6 => self.of(&PRIMES),
            _ => self.size(&EDGES, 300),
        }
    }

    fn options(&mut self, case: &mut Case) -> Option<()> {
        let causal = self.one_in(2);
        let reach = |draw: &mut Self| -> Option<Option<u32>> {
            let most = case.seq_len_q.max(case.seq_len_k) as u32;
            let near = draw.of(&[0, 1, 16, 63, 64, 65])?;
            let any = draw.0.random_range(0..=most + 1);
            draw.of(&[None, Some(near), Some(any)])
        };
        let window = if self.one_in(3) { Some(Window { left: reach(self)?, right: reach(self)? }) } else { None };
        let causal_align = self.of(&[CausalAlign::TopLeft, CausalAlign::BottomRight])?;
        let causal_align = if causal || window.is_some() { causal_align } else { CausalAlign::TopLeft };
        case.options = AttentionOptions { causal, causal_align, window, scale: None };
        Some(())
    }

    fn memory(&mut self, case: &mut Case) -> Option<()> {
        if self.one_in(2) {
            return Some(());
        }
        let same = self.place(&[Order::Bhsd, Order::Bshd, Order::Sbhd])?;
        for (i, memory) in case.memory.iter_mut().enumerate() {
            let orders: &[Order] = match i {
                1 | 2 => &[Order::Bhsd, Order::Bshd, Order::Sbhd, Order::Expanded],
                _ => &[Order::Bhsd, Order::Bshd, Order::Sbhd],
            };
            *memory = same;
            if self.one_in(2) {
                *memory = self.place(orders)?;
            }
        }
        Some(())
    }

    fn place(&mut self, orders: &[Order]) -> Option<Memory> {
        let (order, pad, offset) =
            (self.of(orders)?, self.of(&[0, 0, 0, 8, 64, 1, 3, 5])?, self.of(&[0, 0, 0, 8, 4, 1, 3])?);
        Some(Memory { order, pad, offset })
    }

    fn mask(&mut self) -> Option<Mask> {
        let kind = self.of(&[MaskType::Bool, MaskType::Query, MaskType::F32])?;
        let broadcast = [2, 2, 4, 6].map(|n| self.one_in(n));
        let hidden = self.of(&[Hidden::None, Hidden::None, Hidden::None, Hidden::Some, Hidden::Some, Hidden::All])?;
        let memory =
            if self.one_in(3) { self.place(&[Order::Bhsd, Order::Bshd, Order::Sbhd])? } else { Memory::default() };
        Some(Mask { kind, broadcast, hidden, memory })
    }

    /// Makes a case smaller until it is no more work than it should be: fewer batches and groups of heads first, then
    /// shorter sequences.
    fn cut(&mut self, case: &mut Case) {
        let too_large = |case: &Case| {
            let heads = case.batch * case.num_heads_q;
            let scores = heads * case.seq_len_q * case.seq_len_k;
            let inputs = heads * case.seq_len_k.max(case.seq_len_q);
            let mask = case.attn_mask.map_or(0, |mask| case.mask_shape(mask).iter().product());
            (scores + inputs) * (case.head_dim_qk + case.head_dim_v) > MOST_WORK || mask > MOST_MASK
        };
        while too_large(case) {
            let group = case.num_heads_q / case.num_heads_kv;
            if case.batch > 1 && self.one_in(2) {
                case.batch -= 1;
            } else if case.num_heads_kv > 1 && self.one_in(2) {
                case.num_heads_kv -= 1;
                case.num_heads_q -= group;
            } else if group > 2 && self.one_in(2) {
                case.num_heads_q -= case.num_heads_kv;
            } else if case.seq_len_q >= case.seq_len_k {
                case.seq_len_q = self.shorter(case.seq_len_q);
            } else if self.one_in(3) {
                case.seq_len_k = self.shorter(case.seq_len_k);
            } else {
                case.seq_len_q = self.shorter(case.seq_len_q);
            }
        }
    }

    /// At a tile's edge below, or anywhere below.
    fn shorter(&mut self, len: usize) -> usize {
        let edges: Vec<usize> = EDGES.iter().copied().filter(|&edge| 4 * edge > len && edge < len).collect();
        let anywhere = self.0.random_range(len / 2..len.max(1));
        if self.one_in(3) { anywhere } else { self.of(&edges).unwrap_or(anywhere) }.max(1)
    }

    /// Scale, magnitudes, or an element that is not finite.
    fn values(&mut self, case: &mut Case) -> Option<()> {
        match self.0.random_range(0..10) {
            0..2 => {
                let scale = self.0.random_range(-8.0_f32..2.0).exp2();
                case.options.scale = self.of(&[scale, scale, -scale, 0.0]);
            }
            2 => {
                let inner = || -14..=6;
                case.magnitude =
                    [self.0.random_range(inner()), self.0.random_range(inner()), self.0.random_range(-22..=11)];
                if self.one_in(4) {
                    case.magnitude[self.0.random_range(0..2)] = -130;
                }
            }
            3 if case.seq_len_q * case.seq_len_k > 0 => {
                let tensor = self.of(&[SpecialTensor::Query, SpecialTensor::Key, SpecialTensor::Value])?;
                let rows = if tensor == SpecialTensor::Query { case.seq_len_q } else { case.seq_len_k };
                let value = self.of(&[SpecialValue::Nan, SpecialValue::Inf, SpecialValue::NegInf])?;
                case.special = Some(Special { tensor, key: self.0.random_range(0..rows), value });
            }
            _ => {}
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::correct::check;
    use super::*;
    use crate::runtime::Runtime;

    #[test]
    fn a_list_is_the_beginning_of_every_longer_one() {
        let long = random_cases(200, 5);
        assert_eq!(long[..50], random_cases(50, 5));
        assert_ne!(long[..50], random_cases(50, 6));
        let names: HashSet<String> = random_cases(2000, 5).iter().map(Case::to_string).collect();
        assert_eq!(names.len(), 2000);
        assert!(random_cases_of(&[], 3, 5).is_empty());
    }

    #[test]
    fn everything_that_a_case_can_say_is_said() {
        let cases = random_cases(2000, 1);
        let assert_some = |what: &str, least: usize, is: &dyn Fn(&Case) -> bool| {
            let count = cases.iter().filter(|case| is(case)).count();
            assert!(count >= least, "{what}: {count} of {}", cases.len());
        };
        for dtype in DTYPES {
            assert_some("each type", 900, &|case| case.dtype == dtype);
        }
        assert_some("one row", 40, &|case| case.seq_len_q == 1);
        assert_some("one key", 40, &|case| case.seq_len_k == 1);
        assert_some("nothing", 40, &|case| case.seq_len_q == 0 || case.seq_len_k == 0);
        assert_some("long keys", 40, &|case| case.seq_len_k >= 1000);
        assert_some("more keys than rows", 400, &|case| case.seq_len_q < case.seq_len_k);
        assert_some("more rows than keys", 400, &|case| case.seq_len_q > case.seq_len_k);
        for edge in [16, 32, 64, 128] {
            for len in edge - 1..=edge + 1 {
                assert_some("rows at a tile's edge", 8, &|case| case.seq_len_q == len);
                assert_some("keys at a tile's edge", 8, &|case| case.seq_len_k == len);
            }
        }
        assert_some("grouped heads", 500, &|case| case.num_heads_q > case.num_heads_kv);
        assert_some("several key/value heads in groups", 150, &|case| {
            case.num_heads_q > case.num_heads_kv && case.num_heads_kv > 1
        });
        assert_some("several batches", 500, &|case| case.batch > 1);
        assert_some("odd head_dim", 400, &|case| case.head_dim_qk % 2 == 1);
        assert_some("head_dim 1", 30, &|case| case.head_dim_qk == 1);
        assert_some("head_dim above 128", 300, &|case| case.head_dim_qk > 128);
        assert_some("narrower values", 200, &|case| case.head_dim_v < case.head_dim_qk);
        assert_some("wider values", 200, &|case| case.head_dim_v > case.head_dim_qk);
        for align in [CausalAlign::TopLeft, CausalAlign::BottomRight] {
            assert_some("causal", 300, &|case| case.options.causal && case.options.causal_align == align);
            assert_some("windows", 150, &|case| case.options.window.is_some() && case.options.causal_align == align);
        }
        assert_some("causal windows", 150, &|case| case.options.causal && case.options.window.is_some());
        assert_some("dense", 400, &|case| !case.options.causal && case.options.window.is_none());
        assert_some("negative scales", 60, &|case| case.options.scale.is_some_and(|scale| scale < 0.0));
        assert_some("scale 0", 60, &|case| case.options.scale == Some(0.0));
        for tensor in 0..4 {
            for order in [Order::Bhsd, Order::Bshd, Order::Sbhd] {
                assert_some("each order", 100, &|case| case.memory[tensor].order == order);
            }
            assert_some("padded rows", 200, &|case| case.memory[tensor].pad > 0);
            assert_some("unaligned", 200, &|case| case.memory[tensor].offset % 8 != 0);
        }
        assert_some("heads that share memory", 100, &|case| case.memory[1].order == Order::Expanded);
        for kind in [MaskType::Bool, MaskType::Query, MaskType::F32] {
            let masked = |case: &Case| case.attn_mask.filter(|mask| mask.kind == kind);
            for dim in 0..4 {
                assert_some("broadcast masks", 15, &|case| masked(case).is_some_and(|mask| mask.broadcast[dim]));
                assert_some("whole masks", 40, &|case| masked(case).is_some_and(|mask| !mask.broadcast[dim]));
            }
            for hidden in [Hidden::Some, Hidden::All] {
                assert_some("hidden rows", 15, &|case| masked(case).is_some_and(|mask| mask.hidden == hidden));
            }
            assert_some("masks in a band", 80, &|case| masked(case).is_some() && case.options.causal);
        }
        assert_some("large and small values", 120, &|case| case.magnitude != [0; 3]);
        assert_some("subnormal values", 20, &|case| case.magnitude[..2].contains(&-130));
        for tensor in [SpecialTensor::Query, SpecialTensor::Key, SpecialTensor::Value] {
            assert_some("what is not finite", 40, &|case| case.special.is_some_and(|special| special.tensor == tensor));
        }
        assert_some("no log-sum-exp", 300, &|case| !case.lse);
    }

    #[test]
    fn the_cpu_backend_answers_them_in_every_type() {
        let floats = [DType::F16, DType::BF16, DType::F32, DType::F64];
        for case in random_cases(60, 2).iter().chain(&random_cases_of(&floats, 60, 3)) {
            let verdict = check(&Runtime::cpu(), case, 0);
            assert!(verdict.pass, "{case}: {}", verdict.reason());
        }
    }
}
