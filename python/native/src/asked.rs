//! A call as it was made, and what its results look like.

use flashcore::{DType, Device};

use crate::call::Inputs;
use crate::errors::Result;
use crate::operand::{LSE, MAX_RANK, OUT, Operand};
use crate::sdpa::{Options, broadcast, out_shape, out_strides};
use crate::shim::{Tensor, Torch};

/// The arguments of a call, with tensors as plain numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) query: Operand,
    pub(crate) key: Operand,
    pub(crate) value: Operand,
    pub(crate) attn_mask: Option<Operand>,
    /// Where the caller wants the result.
    pub(crate) out: Option<Operand>,
    pub(crate) return_lse: bool,
    pub(crate) options: Options,
}

impl Asked {
    /// In the library's words: checked and broadcast.
    pub(crate) fn inputs(&self) -> Result<Inputs> {
        let &Self { query, key, value, attn_mask, .. } = self;
        let options = self.options.check(attn_mask.is_some())?;
        let mut inputs = Inputs { query, key, value, attn_mask, options };
        broadcast(&mut inputs, self.options.enable_gqa)?;
        Ok(inputs)
    }

    /// Whether another call differs in nothing but the addresses of its tensors.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let both = |one: &Option<Operand>, other: &Option<Operand>| match (one, other) {
            (Some(one), Some(other)) => one.is_like(other),
            (one, other) => one.is_none() && other.is_none(),
        };
        self.query.is_like(&other.query)
            && self.key.is_like(&other.key)
            && self.value.is_like(&other.value)
            && both(&self.attn_mask, &other.attn_mask)
            && both(&self.out, &other.out)
            && self.return_lse == other.return_lse
            && self.options == other.options
    }
}

/// What the results of a call look like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Results {
    dtype: DType,
    device: Device,
    pub(crate) shape: [usize; MAX_RANK],
    pub(crate) rank: usize,
    strides: [i64; MAX_RANK],
}

impl Results {
    pub(crate) fn of(inputs: &Inputs) -> Self {
        let (shape, rank) = out_shape(inputs);
        let Operand { dtype, device, .. } = inputs.query;
        Self { dtype, device, shape, rank, strides: out_strides(&inputs.query, &shape) }
    }

    /// A new output, and where it is.
    pub(crate) fn new_out(&self, torch: &'static Torch) -> Result<(Tensor, Operand)> {
        let &Self { dtype, device, shape, rank, strides } = self;
        let own = MAX_RANK - rank..;
        let tensor = torch.empty(&shape[own.clone()], &strides[own], dtype, device)?;
        let address = tensor.borrow().address()?;
        Ok((tensor, Operand { role: &OUT, device, address, dtype, rank, shape, strides }))
    }

    /// A new log-sum-exp, contiguous, and where it is.
    pub(crate) fn new_lse(&self, torch: &'static Torch) -> Result<(Tensor, Operand)> {
        let &Self { device, mut shape, rank, .. } = self;
        shape[MAX_RANK - 1] = 1;
        let mut strides = [1; MAX_RANK];
        for dim in (0..MAX_RANK - 1).rev() {
            strides[dim] = strides[dim + 1] * shape[dim + 1].max(1) as i64;
        }
        let own = MAX_RANK - rank..MAX_RANK - 1;
        let tensor = torch.empty(&shape[own.clone()], &strides[own], DType::F32, device)?;
        let address = tensor.borrow().address()?;
        Ok((tensor, Operand { role: &LSE, device, address, dtype: DType::F32, rank, shape, strides }))
    }
}
