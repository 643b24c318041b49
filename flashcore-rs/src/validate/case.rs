//! A problem as data: everything that, with a seed, makes one attention call.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::attention::{AttentionOptions, CausalAlign, Window};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Layout;

/// One attention problem. Serialises to what the reports carry, and back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// What the case is about; results are summed up by family.
    pub family: String,
    /// Type of query, key, value and output.
    pub dtype: DType,
    /// Batch size.
    pub batch: usize,
    /// Heads of query and output.
    pub num_heads_q: usize,
    /// Heads of key and value.
    pub num_heads_kv: usize,
    /// Rows of query and output.
    pub seq_len_q: usize,
    /// Rows of key and value.
    pub seq_len_k: usize,
    /// Columns of query and key.
    pub head_dim_qk: usize,
    /// Columns of value and output.
    pub head_dim_v: usize,
    /// Causal, window and scale.
    pub options: AttentionOptions,
    /// Where query, key, value and output lie in memory.
    pub memory: [Memory; 4],
    /// The attention mask.
    pub attn_mask: Option<Mask>,
    /// Whether the log-sum-exp is asked for.
    pub lse: bool,
    /// Query, key and value are standard normal times these powers of two.
    pub magnitude: [i32; 3],
    /// One element that is not finite.
    pub special: Option<Special>,
    /// The `(batch, query head)` pairs that are judged; empty judges all.
    pub judged_heads: Vec<[usize; 2]>,
}

/// How a tensor lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// The order of its dimensions.
    pub order: Order,
    /// Elements between the end of a row of head_dim and the start of the next.
    pub pad: usize,
    /// Elements by which the base address is off a multiple of 256 bytes.
    pub offset: usize,
}

/// The order of dimensions in memory, outermost first; head_dim is innermost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Batch, heads, seq.
    #[default]
    Bhsd,
    /// Batch, seq, heads.
    Bshd,
    /// Seq, batch, heads.
    Sbhd,
    /// Batch, seq; all heads are the same memory (stride 0). Inputs only.
    Expanded,
}

/// An attention mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mask {
    /// Its element type.
    pub kind: MaskType,
    /// Whether it has size 1 along batch, head, query and key.
    pub broadcast: [bool; 4],
    /// Query rows that it hides every key from.
    pub hidden: Hidden,
    /// How it lies in memory.
    pub memory: Memory,
}

/// What a mask's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskType {
    /// Bytes, non-zero is visible.
    Bool,
    /// Added to the scores, in the query's type.
    Query,
    /// Added to the scores, f32.
    F32,
}

/// Query rows that a mask hides every key from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hidden {
    /// No row on purpose.
    #[default]
    None,
    /// Every fifth.
    Some,
    /// All.
    All,
}

/// An element of batch 0, head 0, middle column, that is not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Special {
    /// Which tensor it is in.
    pub tensor: SpecialTensor,
    /// Its row.
    pub key: usize,
    /// What it is.
    pub value: SpecialValue,
}

/// A tensor that holds a [`Special`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpecialTensor {
    /// The query.
    Query,
    /// The key.
    Key,
    /// The value.
    Value,
}

/// What a [`Special`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpecialValue {
    /// A quiet NaN.
    Nan,
    /// +infinity.
    Inf,
    /// -infinity.
    NegInf,
}

impl SpecialValue {
    pub(super) fn as_f32(self) -> f32 {
        match self {
            Self::Nan => f32::NAN,
            Self::Inf => f32::INFINITY,
            Self::NegInf => f32::NEG_INFINITY,
        }
    }
}

impl Memory {
    /// The layout of a shape. Sizes of 0 count as 1, so that strides stay meaningful.
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub fn layout(self, dtype: DType, shape: [usize; 4]) -> Result<Layout> {
        let inner_to_outer: &[usize] = match self.order {
            Order::Bhsd => &[2, 1, 0],
            Order::Bshd => &[1, 2, 0],
            Order::Sbhd => &[1, 0, 2],
            Order::Expanded => &[2, 0],
        };
        let mut strides = [0, 0, 0, 1];
        let mut next = (shape[3] + self.pad).max(1) as i64;
        for &dim in inner_to_outer {
            strides[dim] = next;
            next *= shape[dim].max(1) as i64;
        }
        Layout::new("case", dtype, &shape, &strides)
    }
}

impl MaskType {
    pub(super) fn dtype(self, query: DType) -> DType {
        match self {
            Self::Bool => DType::Bool,
            Self::Query => query,
            Self::F32 => DType::F32,
        }
    }
}

/// Making cases: a dense f16 problem of batch 2, and what differs from it.
impl Case {
    /// Heads are `(query, key/value)`, sequence lengths `(query, key)`.
    pub fn new(family: &str, heads: [usize; 2], seq_lens: [usize; 2], head_dim: usize) -> Self {
        Self {
            family: family.into(),
            dtype: DType::F16,
            batch: 2,
            num_heads_q: heads[0],
            num_heads_kv: heads[1],
            seq_len_q: seq_lens[0],
            seq_len_k: seq_lens[1],
            head_dim_qk: head_dim,
            head_dim_v: head_dim,
            options: AttentionOptions::default(),
            memory: [Memory::default(); 4],
            attn_mask: None,
            lse: true,
            magnitude: [0; 3],
            special: None,
            judged_heads: Vec::new(),
        }
    }

    pub(super) fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = dtype;
        self
    }

    pub(super) fn batch(mut self, batch: usize) -> Self {
        self.batch = batch;
        self
    }

    pub(super) fn head_dim_v(mut self, head_dim_v: usize) -> Self {
        self.head_dim_v = head_dim_v;
        self
    }

    pub(super) fn mask(mut self, mode: Mode) -> Self {
        (self.options.causal, self.options.causal_align) = match mode {
            Mode::Dense => (false, CausalAlign::TopLeft),
            Mode::TopLeft => (true, CausalAlign::TopLeft),
            Mode::BottomRight => (true, CausalAlign::BottomRight),
        };
        self
    }

    pub(super) fn window(mut self, align: CausalAlign, left: Option<u32>, right: Option<u32>) -> Self {
        self.options.causal_align = align;
        self.options.window = Some(Window { left, right });
        self
    }

    pub(super) fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    pub(super) fn memory(mut self, memory: [Memory; 4]) -> Self {
        self.memory = memory;
        self
    }

    pub(super) fn attn_mask(mut self, mask: Mask) -> Self {
        self.attn_mask = Some(mask);
        self
    }

    pub(super) fn without_lse(mut self) -> Self {
        self.lse = false;
        self
    }

    pub(super) fn magnitude(mut self, magnitude: [i32; 3]) -> Self {
        self.magnitude = magnitude;
        self
    }

    pub(super) fn special(mut self, special: Special) -> Self {
        self.special = Some(special);
        self
    }

    pub(super) fn judged_heads(mut self, heads: &[[usize; 2]]) -> Self {
        self.judged_heads = heads.to_vec();
        self
    }

    /// Shapes of query, key, value and output.
    pub fn shapes(&self) -> [[usize; 4]; 4] {
        [
            [self.batch, self.num_heads_q, self.seq_len_q, self.head_dim_qk],
            [self.batch, self.num_heads_kv, self.seq_len_k, self.head_dim_qk],
            [self.batch, self.num_heads_kv, self.seq_len_k, self.head_dim_v],
            [self.batch, self.num_heads_q, self.seq_len_q, self.head_dim_v],
        ]
    }

    /// Shape of a mask.
    pub fn mask_shape(&self, mask: Mask) -> [usize; 4] {
        let mut shape = [self.batch, self.num_heads_q, self.seq_len_q, self.seq_len_k];
        for (size, one) in shape.iter_mut().zip(mask.broadcast) {
            *size = if one { 1 } else { *size };
        }
        shape
    }

    /// Bytes that an ideal kernel moves: inputs once in, output once out.
    pub fn bytes(&self) -> usize {
        self.shapes().iter().map(|shape| shape.iter().product::<usize>()).sum::<usize>() * self.dtype.size()
    }
}

/// The bands that most families go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Dense,
    TopLeft,
    BottomRight,
}

/// The name: unique in the matrix, and what `--filter` searches.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.family, self.dtype)?;
        write!(f, " b{} h{}", self.batch, self.num_heads_q)?;
        write_unless(f, "-", self.num_heads_kv, self.num_heads_q)?;
        write!(f, " s{}", self.seq_len_q)?;
        write_unless(f, "x", self.seq_len_k, self.seq_len_q)?;
        write!(f, " d{}", self.head_dim_qk)?;
        write_unless(f, "-", self.head_dim_v, self.head_dim_qk)?;
        let AttentionOptions { causal, causal_align, window, scale } = self.options;
        if causal {
            f.write_str(" causal")?;
        }
        if let Some(Window { left, right }) = window {
            let side = |x: Option<u32>| x.map_or("inf".into(), |x| x.to_string());
            write!(f, " window{},{}", side(left), side(right))?;
        }
        if causal_align == CausalAlign::BottomRight {
            f.write_str(" bottom-right")?;
        }
        if let Some(scale) = scale {
            write!(f, " scale{scale}")?;
        }
        match self.memory {
            [q, k, v, out] if q == k && q == v && q == out => write!(f, "{q}")?,
            memory => {
                for (name, memory) in ["q", "k", "v", "o"].iter().zip(memory).filter(|(_, m)| *m != Memory::default()) {
                    write!(f, " {name}:{}", memory.to_string().trim_start())?;
                }
            }
        }
        if let Some(mask) = self.attn_mask {
            write!(f, " {mask}")?;
        }
        if self.magnitude != [0; 3] {
            write!(f, " 2^{:?}", self.magnitude)?;
        }
        if let Some(Special { tensor, key, value }) = self.special {
            write!(f, " {value:?}-in-{tensor:?}{key}")?;
        }
        if self.lse { f.write_str(" lse") } else { Ok(()) }
    }
}

fn write_unless(f: &mut fmt::Formatter<'_>, prefix: &str, value: usize, usual: usize) -> fmt::Result {
    if value == usual { Ok(()) } else { write!(f, "{prefix}{value}") }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::default() {
            return Ok(());
        }
        write!(f, " {}", format!("{:?}", self.order).to_lowercase())?;
        write_unless(f, "+", self.pad, 0)?;
        write_unless(f, "@", self.offset, 0)
    }
}

impl fmt::Display for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-mask[", format!("{:?}", self.kind).to_lowercase())?;
        for (name, one) in "bhqk".chars().zip(self.broadcast) {
            write!(f, "{}", if one { '1' } else { name })?;
        }
        f.write_str("]")?;
        if self.hidden != Hidden::None {
            write!(f, " {}-rows-hidden", format!("{:?}", self.hidden).to_lowercase())?;
        }
        write!(f, "{}", self.memory)
    }
}
