//! A tensor argument as plain numbers: `(batch, heads, seq, head_dim)` after broadcasting.

use flashcore::{DType, Device, Error, Layout};

use crate::errors::invalid;

/// Which argument a tensor is, and which ranks it may have.
#[derive(Debug)]
pub(crate) struct Role {
    pub(crate) name: &'static str,
    ranks: std::ops::RangeInclusive<usize>,
    wanted: &'static str,
    /// Dimensions that are missing come first (broadcasting) or last.
    missing_first: bool,
}

const RANK_4: &str = "4 dimensions: (batch, heads, seq, head_dim)";

pub(crate) static QUERY: Role = Role { name: "query", ranks: 4..=4, wanted: RANK_4, missing_first: true };
pub(crate) static KEY: Role = Role { name: "key", ranks: 4..=4, wanted: RANK_4, missing_first: true };
pub(crate) static VALUE: Role = Role { name: "value", ranks: 4..=4, wanted: RANK_4, missing_first: true };
pub(crate) static OUT: Role = Role { name: "out", ranks: 4..=4, wanted: RANK_4, missing_first: true };
pub(crate) static ATTN_MASK: Role = Role {
    name: "attn_mask",
    ranks: 2..=4,
    wanted: "2 to 4 dimensions that broadcast to (batch, heads, seq_q, seq_k)",
    missing_first: true,
};
pub(crate) static LSE: Role =
    Role { name: "lse", ranks: 3..=3, wanted: "3 dimensions: (batch, heads, seq)", missing_first: false };

/// A tensor argument. Describes memory, and does not keep it alive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand {
    pub(crate) role: &'static Role,
    pub(crate) device: Device,
    pub(crate) address: u64,
    pub(crate) dtype: DType,
    pub(crate) shape: [usize; 4],
    /// In elements.
    pub(crate) strides: [i64; 4],
}

impl Operand {
    /// Pads the rank to 4. `shape` holds no negative sizes.
    pub(crate) fn new(
        role: &'static Role,
        device: Device,
        address: u64,
        dtype: DType,
        shape: &[i64],
        strides: &[i64],
    ) -> Result<Self, Error> {
        let rank = shape.len();
        if !role.ranks.contains(&rank) {
            return Err(invalid(role.name, format!("{rank} dimensions, shape {shape:?}"), role.wanted));
        }
        let mut operand = Self { role, device, address, dtype, shape: [1; 4], strides: [0; 4] };
        let first = if role.missing_first { 4 - rank } else { 0 };
        for (dim, (&size, &stride)) in shape.iter().zip(strides).enumerate() {
            operand.shape[first + dim] = size as usize;
            operand.strides[first + dim] = stride;
        }
        Ok(operand)
    }

    /// Repeats a dimension of size 1 `size` times; leaves any other as it is.
    pub(crate) fn broadcast(&mut self, dim: usize, size: usize) {
        if self.shape[dim] == 1 && size != 1 {
            self.shape[dim] = size;
            self.strides[dim] = 0;
        }
    }

    /// The layout, with refusals that name the argument.
    pub(crate) fn layout(&self) -> Result<Layout, Error> {
        Layout::new(self.role.name, self.dtype, &self.shape, &self.strides)
    }

    /// Bytes from the first to one past the last.
    pub(crate) fn span(&self) -> Result<std::ops::Range<u64>, Error> {
        let bytes = self.layout()?.extent() as u64 * self.dtype.size() as u64;
        Ok(self.address..self.address.saturating_add(bytes))
    }
}

/// The refusal of an element type that no operation takes.
pub(crate) fn bad_dtype(role: &Role, given: &str) -> Error {
    let accepted = match role.name {
        "attn_mask" => "bool, f32 or the query's dtype",
        _ => "f16, bf16, f32 or f64 (f16 or bf16 on a GPU)",
    };
    invalid(role.name, format!("dtype {given}"), accepted)
}
