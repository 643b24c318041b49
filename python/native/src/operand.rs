//! A tensor argument as plain numbers.

use flashcore::{DType, Device, Error, Layout};

use crate::errors::{Failure, invalid};

/// Dimensions that a tensor may have: `(..., batch, heads, seq, head_dim)`.
pub(crate) const MAX_RANK: usize = 6;
/// Dimensions before `batch`.
pub(crate) const OUTER: usize = MAX_RANK - 4;

/// Which argument a tensor is, and which ranks it may have.
#[derive(Debug)]
pub(crate) struct Role {
    pub(crate) name: &'static str,
    lowest_rank: usize,
    wanted: &'static str,
    /// Dimensions of size 1 that are added at the end.
    trailing: usize,
}

const TENSOR: &str = "2 to 6 dimensions: (..., batch, heads, seq, head_dim)";

pub(crate) static QUERY: Role = Role { name: "query", lowest_rank: 2, wanted: TENSOR, trailing: 0 };
pub(crate) static KEY: Role = Role { name: "key", lowest_rank: 2, wanted: TENSOR, trailing: 0 };
pub(crate) static VALUE: Role = Role { name: "value", lowest_rank: 2, wanted: TENSOR, trailing: 0 };
pub(crate) static OUT: Role = Role { name: "out", lowest_rank: 2, wanted: TENSOR, trailing: 0 };
pub(crate) static ATTN_MASK: Role = Role {
    name: "attn_mask",
    lowest_rank: 2,
    wanted: "2 to 6 dimensions that broadcast to (..., batch, heads, seq_q, seq_k)",
    trailing: 0,
};
pub(crate) static LSE: Role =
    Role { name: "lse", lowest_rank: 1, wanted: "1 to 5 dimensions: (..., batch, heads, seq)", trailing: 1 };

/// A tensor argument. Describes memory, and does not keep it alive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand {
    pub(crate) role: &'static Role,
    pub(crate) device: Device,
    pub(crate) address: u64,
    pub(crate) dtype: DType,
    /// Dimensions that the argument has itself; those before them are of size 1.
    pub(crate) rank: usize,
    pub(crate) shape: [usize; MAX_RANK],
    /// In elements.
    pub(crate) strides: [i64; MAX_RANK],
}

impl Operand {
    /// Pads the rank. `shape` holds no negative sizes.
    #[inline]
    pub(crate) fn new(
        role: &'static Role,
        device: Device,
        address: u64,
        dtype: DType,
        shape: &[i64],
        strides: &[i64],
    ) -> Result<Self, Error> {
        let rank = shape.len() + role.trailing;
        if shape.len() < role.lowest_rank || rank > MAX_RANK {
            let given = format!("{} dimensions, shape {shape:?}", shape.len());
            return Err(invalid(role.name, given, role.wanted));
        }
        let mut operand = Self { role, device, address, dtype, rank, shape: [1; MAX_RANK], strides: [0; MAX_RANK] };
        for (dim, (&size, &stride)) in (MAX_RANK - rank..).zip(shape.iter().zip(strides)) {
            operand.shape[dim] = size as usize;
            operand.strides[dim] = stride;
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

    /// Whether elements are repeated by strides of 0.
    pub(crate) fn repeats(&self) -> bool {
        self.shape.iter().zip(&self.strides).any(|(&size, &stride)| size > 1 && stride == 0)
    }

    /// The shape as the argument has it.
    pub(crate) fn own_shape(&self) -> &[usize] {
        &self.shape[MAX_RANK - self.rank..MAX_RANK - self.role.trailing]
    }

    /// `(batch, heads, seq, head_dim)`.
    pub(crate) fn shape4(&self) -> &[usize; 4] {
        self.shape.last_chunk().unwrap_or(&[0; 4])
    }

    /// The strides of [`Operand::shape4`].
    pub(crate) fn strides4(&self) -> &[i64; 4] {
        self.strides.last_chunk().unwrap_or(&[0; 4])
    }

    /// The layout of the last four dimensions, with refusals that name the argument.
    pub(crate) fn layout(&self) -> Result<Layout, Error> {
        Layout::new(self.role.name, self.dtype, self.shape4(), self.strides4())
    }

    /// Bytes from the first to one past the last.
    pub(crate) fn whole_span(&self) -> std::ops::Range<u64> {
        if self.shape.contains(&0) {
            return self.address..self.address;
        }
        let last = |(&size, &stride): (&usize, &i64)| (size as u64 - 1).saturating_mul(stride.unsigned_abs());
        let elements = self.shape.iter().zip(&self.strides).map(last).fold(1, u64::saturating_add);
        self.address..self.address.saturating_add(elements.saturating_mul(self.dtype.size() as u64))
    }

    /// Bytes from the first to one past the last of the last four dimensions.
    pub(crate) fn span(&self) -> Result<std::ops::Range<u64>, Error> {
        let bytes = self.layout()?.extent() as u64 * self.dtype.size() as u64;
        Ok(self.address..self.address.saturating_add(bytes))
    }
}

/// The refusal of an element type that no kernel of ours takes; masks of other types are refused by torch too.
pub(crate) fn bad_dtype(role: &Role, given: &str) -> Failure {
    let given = format!("dtype {given}");
    match role.name {
        "attn_mask" => invalid(role.name, given, "bool, f32 or the query's dtype").into(),
        _ => Failure::Elsewhere(invalid(role.name, given, "f16, bf16, f32 or f64 (f16 or bf16 on a GPU)")),
    }
}
