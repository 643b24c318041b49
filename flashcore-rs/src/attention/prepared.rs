//! A call that is ready to be launched.

use super::Attention;
use super::plan::Plan;
use crate::driver::ParamBlock;
use crate::error::Result;
use crate::tensor::TensorViewMut;

/// One call with its tensors, made ready by [`Attention::prepare`]. Every launch reads and writes their memory as it is
/// then.
#[derive(Debug)]
pub struct PreparedCall<'a> {
    call: Attention<'a>,
    out: TensorViewMut<'a>,
    lse: Option<TensorViewMut<'a>>,
    /// `None` on the CPU, and when there is nothing to do.
    ready: Option<Ready>,
}

#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) plan: std::sync::Arc<Plan>,
    /// Of each launch.
    pub(crate) params: Vec<ParamBlock>,
}

impl<'a> PreparedCall<'a> {
    pub(super) fn new(call: Attention<'a>, out: TensorViewMut<'a>, lse: Option<TensorViewMut<'a>>) -> Result<Self> {
        let ready = call.runtime.ready(&call, &out, lse.as_ref())?;
        Ok(Self { call, out, lse, ready })
    }

    /// Queues the call; on the CPU, runs it.
    ///
    /// # Errors
    /// A driver failure; [`Error::InvalidArgument`](crate::Error::InvalidArgument) when another thread captures the
    /// stream.
    pub fn launch(&mut self) -> Result<()> {
        let Self { call, out, lse, ready } = self;
        call.runtime.launch(call, out, lse.as_mut(), ready.as_mut())
    }

    /// See [`crate::testing::launch_alone`].
    pub(crate) fn launch_alone(&mut self) -> Result<()> {
        match &mut self.ready {
            Some(ready) => self.call.runtime.launch_alone(&self.call, ready),
            None => Ok(()),
        }
    }
}
