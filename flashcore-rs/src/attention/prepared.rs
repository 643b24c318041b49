//! A call that is ready to be launched.

use std::sync::Arc;

use super::plan::{Addresses, Placed};
use super::recent::Settled;
use super::{Attention, Operands};
use crate::device::Stream;
use crate::error::Result;
use crate::runtime::Runtime;
use crate::tensor::TensorViewMut;

/// One call with its tensors, made ready by [`Attention::prepare`]. Every launch reads and writes their memory as it is
/// then. It keeps the runtime and the stream, and borrows the tensors.
#[derive(Debug)]
pub struct PreparedCall<'a> {
    runtime: Runtime,
    /// `None`: the runtime's own.
    stream: Option<Stream>,
    operands: Operands<'a>,
    out: TensorViewMut<'a>,
    lse: Option<TensorViewMut<'a>>,
    settled: Arc<Settled>,
    addresses: Addresses,
    placed: Placed,
}

impl<'a> PreparedCall<'a> {
    pub(super) fn new(
        call: &Attention<'_, 'a>,
        out: TensorViewMut<'a>,
        lse: Option<TensorViewMut<'a>>,
    ) -> Result<Self> {
        let runtime = call.runtime.clone();
        let (settled, addresses, placed) = runtime.prepare(call, &out, lse.as_ref())?;
        let (stream, operands) = (call.stream.cloned(), call.operands);
        Ok(Self { runtime, stream, operands, out, lse, settled, addresses, placed })
    }

    /// Queues the call; on the CPU, runs it. A launch counts as a call for [`last_plan`](crate::last_plan()) and the log.
    ///
    /// # Errors
    /// A driver failure; [`Error::InvalidArgument`](crate::Error::InvalidArgument) when another thread captures the
    /// stream, or when a buffer is lost (see [`DeviceBuffer`](crate::DeviceBuffer)).
    #[inline]
    pub fn launch(&mut self) -> Result<()> {
        let Self { runtime, stream, operands, out, lse, settled, addresses, placed } = self;
        runtime.make(settled, stream.as_ref(), operands, out, lse.as_mut(), addresses, placed)
    }

    /// As [`PreparedCall::launch`], but on this stream.
    ///
    /// # Errors
    /// As [`PreparedCall::launch`], and [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a stream of another
    /// device, or any on the CPU.
    #[inline]
    pub fn launch_on(&mut self, stream: &Stream) -> Result<()> {
        let Self { runtime, operands, out, lse, settled, addresses, placed, .. } = self;
        runtime.check_stream(Some(stream))?;
        runtime.make(settled, Some(stream), operands, out, lse.as_mut(), addresses, placed)
    }

    /// See [`crate::testing::launch_alone`].
    pub(crate) fn launch_alone(&mut self) -> Result<()> {
        let Self { runtime, stream, settled, addresses, placed, .. } = self;
        runtime.launch_alone(settled, stream.as_ref(), addresses, placed)
    }
}
