//! The attention operation: what is asked, whether it is well-formed, which kernel answers it, and how it is launched.

pub(crate) mod check;
pub(crate) mod plan;
pub(crate) mod prepared;
mod problem;
pub(crate) mod recent;
mod select;

use serde::{Deserialize, Serialize};

pub use self::check::MAX_HEAD_DIM;
pub use self::plan::Plan;
pub use self::prepared::PreparedCall;
pub use self::problem::{Band, CausalAlign, MaskLayout, Problem};
pub use self::recent::{LastPlan, last_plan};
pub use self::select::{Explanation, Rejection};
use crate::device::Stream;
use crate::error::Result;
use crate::runtime::Runtime;
use crate::tensor::{TensorView, TensorViewMut};

pub(crate) use self::check::{Checked, Operands, restate};
pub(crate) use self::select::{BaseAlign, choose, explain};
#[cfg(feature = "validate")]
pub(crate) use self::{check::band, problem::visible_pairs, select::capable};

/// How far a query looks, in keys, either side of its diagonal; `None` is unbounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Window {
    /// Keys before the diagonal.
    pub left: Option<u32>,
    /// Keys after the diagonal.
    pub right: Option<u32>,
}

/// Everything about a call but its tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AttentionOptions {
    /// Query `i` sees no key after its diagonal.
    pub causal: bool,
    /// Where the diagonal is when the sequence lengths differ.
    pub causal_align: CausalAlign,
    /// A sliding window around the diagonal.
    pub window: Option<Window>,
    /// Softmax scale; `None` is `1 / sqrt(head_dim_qk)`.
    pub scale: Option<f32>,
}

/// One attention call being put together: `out = softmax(scale * query key^T + mask) value`.
///
/// Tensors are `(batch, heads, seq, head_dim)` views with any batch, head and seq strides; the last dimension is
/// contiguous. Made by [`Runtime::attention`]; borrows the runtime and the stream for `'r`, the tensors for `'a`.
#[derive(Debug)]
#[must_use = "nothing happens until `run`"]
pub struct Attention<'r, 'a> {
    pub(crate) runtime: &'r Runtime,
    pub(crate) operands: Operands<'a>,
    pub(crate) options: AttentionOptions,
    pub(crate) stream: Option<&'r Stream>,
    /// The only variant that may run, by its index in the runtime's manifest.
    pub(crate) pin: Option<u32>,
}

impl<'r, 'a> Attention<'r, 'a> {
    /// Hides keys after the diagonal.
    #[inline]
    pub fn causal(mut self, causal: bool) -> Self {
        self.options.causal = causal;
        self
    }

    /// Chooses the diagonal that causal and windows refer to.
    #[inline]
    pub fn causal_align(mut self, align: CausalAlign) -> Self {
        self.options.causal_align = align;
        self
    }

    /// Limits how far a query looks either side of its diagonal.
    #[inline]
    pub fn window(mut self, window: Window) -> Self {
        self.options.window = Some(window);
        self
    }

    /// Sets the softmax scale; any finite value, 0 and negative ones included.
    #[inline]
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// Adds a mask, `(batch or 1, num_heads_q or 1, seq_len_q or 1, seq_len_k or 1)`: bool (non-zero = visible), or
    /// additive in the query's type or f32.
    #[inline]
    pub fn attn_mask(mut self, mask: TensorView<'a>) -> Self {
        self.operands.attn_mask = Some(mask);
        self
    }

    /// Queues the work on this stream instead of the runtime's own.
    #[inline]
    pub fn on(mut self, stream: &'r Stream) -> Self {
        self.stream = Some(stream);
        self
    }

    /// Lets this kernel variant run and no other, instead of the one that the runtime prefers: to measure it, or to
    /// compare results bit by bit. It answers whatever it can, also outside the sizes that it was tuned for; a call that
    /// it cannot answer is refused with [`Error::Unsupported`](crate::Error::Unsupported), which names the reason.
    ///
    /// Variants are those of [`Runtime::manifest`]; the CPU backend has one, `cpu`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument), naming those there are, for a variant that is not.
    pub fn variant(mut self, name: &str) -> Result<Self> {
        self.pin = self.runtime.variant_index(name)?;
        Ok(self)
    }

    /// Replaces all options at once.
    #[inline]
    pub fn options(mut self, options: AttentionOptions) -> Self {
        self.options = options;
        self
    }

    /// Queues the attention, writing `out` (`(batch, num_heads_q, seq_len_q, head_dim_v)`).
    ///
    /// On a device this returns once the work is queued; on the CPU, once it is done.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a malformed call,
    /// [`Error::Unsupported`](crate::Error::Unsupported) when no kernel answers it, or a driver failure. Nothing is
    /// written on a refusal.
    #[inline]
    pub fn run(self, out: &mut TensorViewMut<'_>) -> Result<()> {
        self.runtime.run(&self, out, None)
    }

    /// As [`Attention::run`], and writes the log-sum-exp of each row: f32, `(batch, num_heads_q, seq_len_q, 1)`,
    /// contiguous, natural logarithm, -inf for rows that see no key.
    ///
    /// # Errors
    /// As [`Attention::run`].
    #[inline]
    pub fn run_with_lse(self, out: &mut TensorViewMut<'_>, lse: &mut TensorViewMut<'_>) -> Result<()> {
        self.runtime.run(&self, out, Some(lse))
    }

    /// Makes everything that can be made before a launch: checks, the choice of a kernel, its arguments. For a call that
    /// is made many times with the same tensors. What comes of it borrows the tensors alone.
    ///
    /// # Errors
    /// As [`Attention::run`].
    pub fn prepare(self, out: TensorViewMut<'a>) -> Result<PreparedCall<'a>> {
        PreparedCall::new(&self, out, None)
    }

    /// As [`Attention::prepare`], for a call that writes the log-sum-exp too.
    ///
    /// # Errors
    /// As [`Attention::run`].
    pub fn prepare_with_lse(self, out: TensorViewMut<'a>, lse: TensorViewMut<'a>) -> Result<PreparedCall<'a>> {
        PreparedCall::new(&self, out, Some(lse))
    }

    /// Says which kernel would run for a contiguous output, and why not each of the others. Launches nothing.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a malformed call.
    pub fn explain(self) -> Result<Explanation> {
        self.runtime.explain(&self)
    }
}
