//! A call as it was made, and what its results look like.

use flashcore::{DType, Device};

use crate::call::Inputs;
use crate::errors::Result;
use crate::operand::{ATTN_MASK, KEY, LSE, MAX_RANK, OUT, Operand, QUERY, VALUE};
use crate::sdpa::{Options, broadcast, out_shape, out_strides};
use crate::shim::{Look, Tensor, Torch};

/// The arguments of a call, with tensors as plain numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) query: Operand,
    pub(crate) key: Operand,
    pub(crate) value: Operand,
    pub(crate) attn_mask: Option<Operand>,
    /// Where the caller wants the result.
    pub(crate) out: Option<Operand>,
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
}

/// A call on torch's tensors, as it came.
pub(crate) struct TorchCall<'a> {
    pub(crate) query: Look<'a>,
    pub(crate) key: Look<'a>,
    pub(crate) value: Look<'a>,
    pub(crate) attn_mask: Option<Look<'a>>,
    /// Where the caller wants the result.
    pub(crate) out: Option<Look<'a>>,
    pub(crate) return_lse: bool,
    pub(crate) options: Options,
}

impl TorchCall<'_> {
    pub(crate) fn asked(&self) -> Result<Asked> {
        Ok(Asked {
            query: self.query.operand(&QUERY)?,
            key: self.key.operand(&KEY)?,
            value: self.value.operand(&VALUE)?,
            attn_mask: self.attn_mask.map(|mask| mask.operand(&ATTN_MASK)).transpose()?,
            out: self.out.map(|out| out.operand(&OUT)).transpose()?,
            options: self.options,
        })
    }
}

/// What the results of a call look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

    /// A new output.
    #[inline]
    pub(crate) fn new_out(&self, torch: &'static Torch) -> Result<Tensor> {
        let own = MAX_RANK - self.rank..;
        torch.empty(&self.shape[own.clone()], &self.strides[own], self.dtype, self.device)
    }

    /// An output at an address.
    pub(crate) fn out(&self, address: u64) -> Operand {
        let &Self { dtype, device, shape, rank, strides } = self;
        Operand { role: &OUT, device, address, dtype, rank, shape, strides }
    }

    /// A new log-sum-exp, contiguous.
    pub(crate) fn new_lse(&self, torch: &'static Torch) -> Result<Tensor> {
        let Operand { shape, strides, device, .. } = self.lse(0);
        let own = MAX_RANK - self.rank..MAX_RANK - 1;
        torch.empty(&shape[own.clone()], &strides[own], DType::F32, device)
    }

    /// A log-sum-exp at an address.
    pub(crate) fn lse(&self, address: u64) -> Operand {
        let &Self { device, mut shape, rank, .. } = self;
        shape[MAX_RANK - 1] = 1;
        let mut strides = [1; MAX_RANK];
        for dim in (0..MAX_RANK - 1).rev() {
            strides[dim] = strides[dim + 1] * shape[dim + 1].max(1) as i64;
        }
        Operand { role: &LSE, device, address, dtype: DType::F32, rank, shape, strides }
    }
}
