//! Captured work.

use std::sync::{Arc, Mutex, PoisonError};

use super::buffer::{BufferInner, Captured, enqueue};
use super::{DeviceContext, Stream, log_drop_error};
use crate::driver::GraphHandle;
use crate::error::{Error, Result};

/// Work captured from a stream, to be replayed. It owns the buffers that the work uses.
#[derive(Debug)]
pub struct Graph {
    context: Arc<DeviceContext>,
    handle: GraphHandle,
    buffers: Vec<Arc<BufferInner>>,
    /// Held while launching: the driver's graphs are not thread-safe.
    turn: Mutex<()>,
}

impl Graph {
    pub(super) fn new(context: Arc<DeviceContext>, handle: GraphHandle, mut buffers: Vec<Arc<BufferInner>>) -> Self {
        buffers.sort_unstable_by_key(|buffer| Arc::as_ptr(buffer).addr());
        buffers.dedup_by(|a, b| Arc::ptr_eq(a, b));
        Self { context, handle, buffers, turn: Mutex::new(()) }
    }

    /// Queues the captured work on a stream, ordered with every other use of its buffers.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a stream of another device or one that is being captured; a driver failure.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        if !stream.context().is(&self.context) {
            let given = format!("a stream of cuda:{}", stream.ordinal());
            return Err(Error::invalid("stream", given, format!("a stream of cuda:{}", self.context.info.ordinal)));
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        enqueue(stream, self.buffers.iter(), &[], Captured::Refused("graph launch"), || {
            self.context.driver.launch_graph(self.context.handle, self.handle, stream.handle())
        })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // The driver lets a launch in flight finish first; the buffers are freed in the order of their home streams.
        log_drop_error("a graph", self.context.driver.destroy_graph(self.context.handle, self.handle));
    }
}
