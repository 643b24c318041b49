//! What the caller asks for, as plain numbers.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::tensor::Layout;

/// Which diagonal "causal" and windows are measured from when `seq_len_q != seq_len_k`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CausalAlign {
    /// Query `i` stands at key `i`, as in PyTorch's SDPA.
    #[default]
    TopLeft,
    /// The last query stands at the last key, as in flash-attn.
    BottomRight,
}

/// The keys that a query sees: query `i` sees key `j` iff `i + lo <= j <= i + hi`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Band {
    /// Offset of the first visible key.
    pub lo: i32,
    /// Offset of the last visible key.
    pub hi: i32,
}

/// The layout of an attention mask, broadcast to `(batch, num_heads_q, seq_len_q, seq_len_k)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MaskLayout {
    /// [`DType::Bool`]: non-zero = visible. A float type: added to the scaled scores.
    pub dtype: DType,
    /// Elements; 0 along dimensions that broadcast.
    pub strides: [i64; 4],
}

/// One attention call without its addresses: `out = softmax(scale * query key^T + mask) value`.
///
/// Tensors are `(batch, heads, seq, head_dim)`; strides are in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Type of query, key, value and output.
    pub dtype: DType,
    /// Batch size.
    pub batch: usize,
    /// Heads of query and output; a multiple of `num_heads_kv`.
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
    /// Strides of the query.
    pub q_strides: [i64; 4],
    /// Strides of the key.
    pub k_strides: [i64; 4],
    /// Strides of the value.
    pub v_strides: [i64; 4],
    /// Strides of the output.
    pub out_strides: [i64; 4],
    /// The attention mask, if there is one.
    pub attn_mask: Option<MaskLayout>,
    /// Visible keys; `None` when every query sees every key.
    pub band: Option<Band>,
    /// Bits of the softmax scale (f32), so that the problem can be hashed.
    pub scale_bits: u32,
    /// Whether the log-sum-exp is asked for.
    pub lse: bool,
}

impl Problem {
    /// The softmax scale.
    pub fn scale(&self) -> f32 {
        f32::from_bits(self.scale_bits)
    }

    /// Query heads per key/value head.
    pub fn group(&self) -> usize {
        self.num_heads_q / self.num_heads_kv.max(1)
    }

    /// Whether there is nothing to write, neither output nor log-sum-exp.
    pub fn is_empty(&self) -> bool {
        let no_rows = self.batch == 0 || self.num_heads_q == 0 || self.seq_len_q == 0;
        no_rows || (self.head_dim_v == 0 && !self.lse)
    }

    /// Whether query row `i` sees key `j`, mask aside.
    pub fn sees(&self, i: usize, j: usize) -> bool {
        self.band.is_none_or(|band| {
            let offset = j as i64 - i as i64;
            i64::from(band.lo) <= offset && offset <= i64::from(band.hi)
        })
    }

    /// The keys that query row `i` sees, mask aside: a possibly empty range within `0..seq_len_k`.
    pub fn visible_keys(&self, i: usize) -> std::ops::Range<usize> {
        visible_keys(self.band, i, self.seq_len_k)
    }

    /// Layout of the query.
    pub fn q_layout(&self) -> Layout {
        self.layout(self.num_heads_q, self.seq_len_q, self.head_dim_qk, self.q_strides)
    }

    /// Layout of the key.
    pub fn k_layout(&self) -> Layout {
        self.layout(self.num_heads_kv, self.seq_len_k, self.head_dim_qk, self.k_strides)
    }

    /// Layout of the value.
    pub fn v_layout(&self) -> Layout {
        self.layout(self.num_heads_kv, self.seq_len_k, self.head_dim_v, self.v_strides)
    }

    /// Layout of the output.
    pub fn out_layout(&self) -> Layout {
        self.layout(self.num_heads_q, self.seq_len_q, self.head_dim_v, self.out_strides)
    }

    fn layout(&self, heads: usize, seq: usize, dim: usize, strides: [i64; 4]) -> Layout {
        Layout { dtype: self.dtype, shape: [self.batch, heads, seq, dim], strides }
    }

    /// Floating-point operations of the two products over the visible keys; mask contents are not looked at.
    pub fn flops(&self) -> f64 {
        let visible = visible_pairs(self.band, self.seq_len_q, self.seq_len_k);
        let dims = self.head_dim_qk as f64 + self.head_dim_v as f64;
        2.0 * visible * self.batch as f64 * self.num_heads_q as f64 * dims
    }
}

fn visible_keys(band: Option<Band>, i: usize, seq_len_k: usize) -> std::ops::Range<usize> {
    let len = seq_len_k as i64;
    let Some(band) = band else { return 0..seq_len_k };
    let start = (i as i64 + i64::from(band.lo)).clamp(0, len);
    let end = (i as i64 + i64::from(band.hi) + 1).clamp(start, len);
    start as usize..end as usize
}

/// How many pairs there are of a query row and a key that it sees, mask aside, in one head.
pub(crate) fn visible_pairs(band: Option<Band>, seq_len_q: usize, seq_len_k: usize) -> f64 {
    match band {
        None => seq_len_q as f64 * seq_len_k as f64,
        Some(_) => (0..seq_len_q).map(|i| visible_keys(band, i, seq_len_k).len() as f64).sum(),
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "attention({}, batch {}, heads {}/{}, seq {}x{}, head_dim {}",
            self.dtype,
            self.batch,
            self.num_heads_q,
            self.num_heads_kv,
            self.seq_len_q,
            self.seq_len_k,
            self.head_dim_qk,
        )?;
        if self.head_dim_v != self.head_dim_qk {
            write!(f, "/{}", self.head_dim_v)?;
        }
        match self.band {
            None => f.write_str(", dense")?,
            Some(band) => write!(f, ", band {}..={}", band.lo, band.hi)?,
        }
        if let Some(mask) = self.attn_mask {
            write!(f, ", {} mask", mask.dtype)?;
        }
        write!(f, ", scale {})", self.scale())
    }
}
