//! Captured work.

use std::sync::{Arc, Mutex, PoisonError};

use super::buffer::{BufferInner, enqueue};
use super::{DeviceContext, Event, Stream, log_drop_error};
use crate::driver::GraphHandle;
use crate::error::{Error, Result};

/// Work captured from a stream, to be replayed. It owns the buffers that the work uses.
#[derive(Debug)]
pub struct Graph {
    context: Arc<DeviceContext>,
    handle: GraphHandle,
    buffers: Vec<Arc<BufferInner>>,
    /// After the last launch, so that the graph is not destroyed while it runs.
    last_launch: Mutex<Option<Event>>,
}

impl Graph {
    pub(super) fn new(context: Arc<DeviceContext>, handle: GraphHandle, buffers: Vec<Arc<BufferInner>>) -> Self {
        Self { context, handle, buffers, last_launch: Mutex::new(None) }
    }

    /// Queues the captured work on a stream, ordered with every other use of its buffers.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a stream of another device or one that is being captured; a driver failure.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        if stream.ordinal() != self.context.info.ordinal {
            let given = format!("a stream of cuda:{}", stream.ordinal());
            return Err(Error::invalid("stream", given, format!("a stream of cuda:{}", self.context.info.ordinal)));
        }
        stream.refuse_while_capturing("graph launch")?;
        let mut last = self.last_launch.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(event) = last.as_ref() {
            event.block(stream)?;
        }
        enqueue(stream, &mut self.buffers.iter().collect::<Vec<_>>(), || {
            self.context.driver.launch_graph(self.context.handle, self.handle, stream.handle())
        })?;
        let event = match last.take() {
            Some(event) => event,
            None => Event::new(self.context.clone(), false)?,
        };
        event.record(stream)?;
        *last = Some(event);
        Ok(())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let last = self.last_launch.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(event) = last {
            log_drop_error("a graph", event.synchronize());
        }
        log_drop_error("a graph", self.context.driver.destroy_graph(self.context.handle, self.handle));
    }
}
