//! The correctness matrix: which problems, and why. Every family is a table; each of its cases runs in f16 and bf16.

use super::case::{Case, Hidden, Mask, MaskType, Memory, Mode, Order, Special, SpecialTensor, SpecialValue};
use crate::attention::CausalAlign::{BottomRight, TopLeft};
use crate::dtype::DType;

/// The element types that every backend computes in.
pub(super) const DTYPES: [DType; 2] = [DType::F16, DType::BF16];

/// How much of the matrix to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Every seventh case of each family: a smoke run.
    Quick,
    /// What `make validate` runs.
    Default,
    /// Long sequences and tensors of more than 2^31 elements too.
    Full,
}

/// The problems that the library must solve.
pub fn matrix(extent: Extent) -> Vec<Case> {
    let families = [
        head_dims(),
        lengths(),
        head_groups(),
        memory_layouts(),
        windows(),
        masks(),
        empties(),
        scales(),
        magnitudes(),
        specials(),
        grids(),
        outputs(),
    ];
    let mut cases: Vec<Case> = match extent {
        Extent::Quick => families.into_iter().flat_map(|family| family.into_iter().step_by(7)).collect(),
        _ => families.into_iter().flatten().collect(),
    };
    if extent == Extent::Full {
        cases.extend(large());
    }
    let mut cases: Vec<Case> = cases.iter().flat_map(|case| DTYPES.map(|dtype| case.clone().dtype(dtype))).collect();
    if extent == Extent::Full {
        cases.extend(huge());
    }
    cases
}

/// The nine configurations that FlashCore's predecessor was measured on: fp16, 8 heads, head_dim 64, dense.
pub fn classic() -> Vec<Case> {
    let configuration = |seq, batch: usize| {
        let heads = [[0, 0], [batch / 2, 3], [batch - 1, 7]];
        Case::new("classic", [8, 8], [seq, seq], 64).batch(batch).without_lse().judged_heads(&heads)
    };
    [128, 256, 512].iter().flat_map(|&seq| [8, 16, 32].map(|batch| configuration(seq, batch))).collect()
}

/// Every head_dim that the kernels pad differently, value narrower and wider than key included.
fn head_dims() -> Vec<Case> {
    let square = [1, 8, 32, 40, 64, 80, 96, 111, 128, 192, 256].map(|dim| (dim, dim));
    let other = [(64, 128), (128, 64), (192, 128), (40, 72), (1, 256), (96, 80), (256, 8), (24, 33)];
    let dims = square.into_iter().chain(other);
    dims.flat_map(|(dim_qk, dim_v)| {
        let case = Case::new("head_dim", [2, 2], [129, 129], dim_qk).head_dim_v(dim_v);
        [case.clone().without_lse(), case.mask(Mode::TopLeft)]
    })
    .collect()
}

/// Sequence lengths at and around the edges of tiles, equal and not.
fn lengths() -> Vec<Case> {
    let edges = [1, 2, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257];
    let pairs = [
        [1, 1000],
        [1, 64],
        [2, 129],
        [64, 1],
        [128, 1],
        [63, 257],
        [257, 63],
        [1000, 65],
        [65, 1000],
        [129, 127],
        [17, 300],
        [300, 17],
    ];
    let case = |seq, dim, mode| Case::new("length", [2, 2], seq, dim).mask(mode);
    let square = edges.iter().flat_map(|&s| {
        [64, 128].into_iter().flat_map(move |dim| [Mode::Dense, Mode::TopLeft].map(|mode| case([s, s], dim, mode)))
    });
    let rectangular =
        pairs.iter().flat_map(|&seq| [Mode::Dense, Mode::TopLeft, Mode::BottomRight].map(|mode| case(seq, 64, mode)));
    let long = [(64, Mode::Dense), (128, Mode::TopLeft), (256, Mode::TopLeft)]
        .map(|(dim, mode)| case([1000, 1000], dim, mode).batch(1));
    square.chain(rectangular).chain(long).collect()
}

/// Multi-head, grouped and multi-query attention.
fn head_groups() -> Vec<Case> {
    let heads = [[4, 4], [8, 2], [8, 1], [16, 2], [32, 1], [64, 2], [3, 1]];
    heads
        .iter()
        .flat_map(|&heads| {
            [(64, Mode::Dense), (64, Mode::BottomRight), (128, Mode::TopLeft)]
                .map(|(dim, mode)| Case::new("head_group", heads, [65, 129], dim).mask(mode))
        })
        .collect()
}

/// Strides and base addresses as callers have them, padding filled with NaN.
fn memory_layouts() -> Vec<Case> {
    let plain = Memory::default();
    let of = |order, pad, offset| Memory { order, pad, offset };
    let uniform = [
        of(Order::Bshd, 0, 0),
        of(Order::Sbhd, 0, 0),
        of(Order::Bhsd, 8, 0),
        of(Order::Bshd, 64, 0),
        of(Order::Bhsd, 3, 0),
        of(Order::Bhsd, 0, 1),
        of(Order::Bhsd, 0, 4),
        of(Order::Bhsd, 0, 8),
        of(Order::Bshd, 5, 3),
    ];
    let expanded = of(Order::Expanded, 0, 0);
    let mixed = [
        [plain, expanded, expanded, plain],
        [of(Order::Bshd, 0, 0), of(Order::Bhsd, 8, 0), of(Order::Sbhd, 0, 8), plain],
        [plain, plain, plain, of(Order::Bshd, 0, 0)],
        [plain, plain, plain, of(Order::Bhsd, 1, 1)],
        [of(Order::Bhsd, 1, 0), plain, plain, plain],
        [plain, of(Order::Bhsd, 0, 1), plain, plain],
        [plain, plain, of(Order::Bshd, 2, 0), plain],
    ];
    let layouts = uniform.into_iter().map(|memory| [memory; 4]).chain(mixed);
    layouts
        .flat_map(|memory| {
            [(64, Mode::Dense), (128, Mode::TopLeft), (111, Mode::BottomRight)]
                .map(|(dim, mode)| Case::new("memory", [4, 2], [129, 140], dim).mask(mode).memory(memory))
        })
        .collect()
}

/// Sliding windows, rows that see no key among them.
fn windows() -> Vec<Case> {
    let windows = [
        (Some(0), Some(0)),
        (Some(1), Some(1)),
        (Some(16), Some(0)),
        (Some(0), Some(16)),
        (Some(64), Some(64)),
        (Some(127), None),
        (None, Some(5)),
        (Some(1000), Some(1000)),
    ];
    let case = |seq, dim, align, (left, right)| Case::new("window", [2, 1], seq, dim).window(align, left, right);
    let around = windows.iter().flat_map(|&window| {
        [
            case([129, 257], 64, TopLeft, window),
            case([129, 257], 128, BottomRight, window),
            case([257, 129], 64, TopLeft, window),
            case([257, 129], 64, BottomRight, window),
        ]
    });
    let causal = [(Some(0), None), (Some(31), None), (Some(128), Some(7))].into_iter().flat_map(|window| {
        [Mode::TopLeft, Mode::BottomRight].map(|mode| case([200, 257], 96, TopLeft, window).mask(mode))
    });
    let long = [case([1000, 1000], 128, BottomRight, (Some(100), Some(0))).batch(1)];
    around.chain(causal).chain(long).collect()
}

/// Boolean and additive masks, broadcast along every dimension, hiding rows, in odd memory.
fn masks() -> Vec<Case> {
    let kinds = [MaskType::Bool, MaskType::Query, MaskType::F32];
    let broadcasts = [
        [false, false, false, false],
        [true, false, false, false],
        [false, true, false, false],
        [true, true, false, false],
        [false, true, true, false],
        [false, false, false, true],
        [true, true, true, true],
    ];
    let mask = |kind, broadcast| Mask { kind, broadcast, hidden: Hidden::None, memory: Memory::default() };
    let base = Case::new("attn_mask", [4, 2], [70, 129], 64);
    let full = [false; 4];
    let mut cases = Vec::new();
    for kind in kinds {
        let with = |mask| base.clone().attn_mask(mask);
        cases.extend(broadcasts.map(|broadcast| with(mask(kind, broadcast))));
        cases.extend([Hidden::Some, Hidden::All].map(|hidden| with(Mask { hidden, ..mask(kind, full) })));
        cases.extend([(0, 1), (3, 0)].map(|(pad, offset)| {
            with(Mask { memory: Memory { order: Order::Bhsd, pad, offset }, ..mask(kind, full) })
        }));
        cases.push(with(mask(kind, full)).mask(Mode::BottomRight));
        cases.push(with(Mask { hidden: Hidden::Some, ..mask(kind, full) }).mask(Mode::TopLeft));
        cases.push(with(mask(kind, full)).window(BottomRight, Some(20), Some(3)));
        cases.push(with(mask(kind, full)).memory([Memory { order: Order::Bshd, pad: 1, offset: 1 }; 4]));
        let dims = [1, 40, 111, 128, 192, 256];
        cases.extend(dims.map(|dim| Case::new("attn_mask", [2, 2], [65, 77], dim).attn_mask(mask(kind, full))));
        let lengths = [[1, 1], [1, 300], [128, 128]];
        cases.extend(lengths.map(|seq| Case::new("attn_mask", [8, 1], seq, 64).attn_mask(mask(kind, full))));
    }
    cases
}

/// Nothing to read, nothing to write, or both.
fn empties() -> Vec<Case> {
    let shapes = [
        (2, [2, 2], [0, 129]),
        (2, [2, 2], [129, 0]),
        (2, [2, 2], [0, 0]),
        (0, [2, 2], [64, 64]),
        (2, [0, 0], [64, 64]),
    ];
    let case = |(batch, heads, seq)| Case::new("empty", heads, seq, 64).batch(batch);
    let mask = Mask { kind: MaskType::F32, broadcast: [false; 4], hidden: Hidden::None, memory: Memory::default() };
    let mut cases: Vec<Case> =
        shapes.into_iter().flat_map(|shape| [case(shape), case(shape).mask(Mode::BottomRight).without_lse()]).collect();
    cases.extend(shapes[..2].iter().map(|&shape| case(shape).attn_mask(mask)));
    cases.push(case((1, [2, 2], [129, 0])).head_dim_v(111));
    cases
}

/// Softmax scales of both signs, and 0.
fn scales() -> Vec<Case> {
    let scales = [0.0, -0.125, 1.0, 4.0, -2.0, 1e-4];
    let mut cases: Vec<Case> = scales
        .into_iter()
        .flat_map(|scale| {
            [(64, Mode::Dense), (128, Mode::TopLeft)]
                .map(|(dim, mode)| Case::new("scale", [2, 1], [129, 150], dim).mask(mode).scale(scale))
        })
        .collect();
    let negative = Case::new("scale", [2, 2], [140, 60], 64).scale(-0.3);
    let mask = Mask { kind: MaskType::Query, broadcast: [false; 4], hidden: Hidden::Some, memory: Memory::default() };
    cases.push(negative.clone().mask(Mode::BottomRight));
    cases.push(negative.attn_mask(mask));
    cases
}

/// Logits of 1e4, large and tiny values, subnormal numbers.
fn magnitudes() -> Vec<Case> {
    let magnitudes = [[7, 7, 0], [0, 0, 12], [-10, -10, -18], [-130, 0, 0], [0, -130, 0]];
    magnitudes
        .iter()
        .flat_map(|&magnitude| {
            [(64, Mode::Dense), (128, Mode::TopLeft), (256, Mode::BottomRight)]
                .map(|(dim, mode)| Case::new("magnitude", [2, 2], [100, 160], dim).mask(mode).magnitude(magnitude))
        })
        .collect()
}

/// One NaN or infinity in one key: it reaches the rows that see it and no other head or batch.
fn specials() -> Vec<Case> {
    let mut cases = Vec::new();
    for tensor in [SpecialTensor::Key, SpecialTensor::Value] {
        for value in [SpecialValue::Nan, SpecialValue::Inf, SpecialValue::NegInf] {
            let case = |key| Case::new("special", [4, 2], [300, 300], 64).special(Special { tensor, key, value });
            cases.push(case(131));
            cases.push(case(200).mask(Mode::TopLeft));
            cases.push(case(40).window(TopLeft, Some(20), Some(20)));
            cases.push(case(299).mask(Mode::TopLeft).memory([Memory { order: Order::Bshd, pad: 3, offset: 1 }; 4]));
        }
    }
    cases
}

/// More blocks than a 16-bit grid dimension holds.
fn grids() -> Vec<Case> {
    let case = |batch, heads, seq| Case::new("grid", [heads, heads], [seq, 2], 8).batch(batch);
    vec![case(66_000, 1, 1), case(1, 66_000, 1), case(300, 300, 1), case(1, 1, 66_000)]
}

/// Calls without a log-sum-exp, across the features.
fn outputs() -> Vec<Case> {
    let mask = Mask {
        kind: MaskType::Bool,
        broadcast: [true, true, false, false],
        hidden: Hidden::Some,
        memory: Memory::default(),
    };
    let case = |dim| Case::new("no_lse", [4, 1], [130, 190], dim).without_lse();
    vec![
        case(64).mask(Mode::BottomRight),
        case(128).window(BottomRight, Some(30), Some(10)),
        case(256).mask(Mode::TopLeft),
        case(111),
        case(64).attn_mask(mask),
        case(64).memory([Memory { order: Order::Bshd, pad: 0, offset: 1 }; 4]),
        case(128).memory([Memory { order: Order::Bshd, pad: 0, offset: 0 }; 4]),
        case(96).scale(-1.0),
    ]
}

/// Long sequences.
fn large() -> Vec<Case> {
    let heads = [[0, 0], [0, 7]];
    let case = |seq, dim, mode| Case::new("large", [8, 2], seq, dim).mask(mode).batch(1).judged_heads(&heads);
    vec![
        case([4096, 4096], 64, Mode::Dense),
        case([4096, 4096], 128, Mode::TopLeft),
        case([2048, 2048], 256, Mode::TopLeft),
        case([1, 65_536], 128, Mode::Dense),
        case([1000, 8191], 128, Mode::BottomRight),
        case([8191, 8191], 64, Mode::Dense).window(BottomRight, Some(512), Some(0)),
    ]
}

/// Offsets past 2^31 elements: in query and output, and in key and value.
fn huge() -> Vec<Case> {
    let rows = |batch, heads, seq| Case::new("huge", heads, seq, 128).batch(batch).without_lse();
    vec![
        rows(2, [128, 1], [65_700, 33]).judged_heads(&[[0, 0], [0, 127], [1, 0], [1, 127]]),
        rows(2, [128, 128], [5, 65_700]).judged_heads(&[[0, 0], [1, 1], [1, 127]]),
        rows(1, [1, 1], [3, 1 << 20]).judged_heads(&[[0, 0]]).memory([
            Memory::default(),
            Memory { pad: 1920, ..Memory::default() },
            Memory::default(),
            Memory::default(),
        ]),
    ]
}
