//! Streams and events.

use std::sync::{Arc, Mutex, PoisonError};

use super::buffer::BufferInner;
use super::{DeviceContext, Graph, log_drop_error};
use crate::driver::{EventHandle, StreamHandle};
use crate::error::{Error, Result};

/// A queue of work on a device. Clones name the same queue.
#[derive(Clone, Debug)]
pub struct Stream {
    inner: Arc<StreamInner>,
}

#[derive(Debug)]
struct StreamInner {
    context: Arc<DeviceContext>,
    handle: StreamHandle,
    owned: bool,
    /// What the capture in progress must keep alive; `None` when this crate is not capturing the stream.
    capturing: Mutex<Option<Vec<Arc<BufferInner>>>>,
}

impl Drop for StreamInner {
    fn drop(&mut self) {
        if self.owned {
            log_drop_error("a stream", self.context.driver.destroy_stream(self.context.handle, self.handle));
        }
    }
}

impl Stream {
    pub(crate) fn create(context: Arc<DeviceContext>) -> Result<Self> {
        let handle = context.driver.create_stream(context.handle)?;
        Ok(Self::wrap(context, handle, true))
    }

    pub(crate) fn wrap(context: Arc<DeviceContext>, handle: StreamHandle, owned: bool) -> Self {
        Self { inner: Arc::new(StreamInner { context, handle, owned, capturing: Mutex::new(None) }) }
    }

    pub(crate) fn context(&self) -> &Arc<DeviceContext> {
        &self.inner.context
    }

    pub(crate) fn handle(&self) -> StreamHandle {
        self.inner.handle
    }

    /// The device's ordinal.
    pub fn ordinal(&self) -> u32 {
        self.context().info.ordinal
    }

    /// The driver's handle (`CUstream`), for interoperation.
    pub fn raw(&self) -> u64 {
        self.handle().0
    }

    /// Waits until the device has done everything queued so far.
    ///
    /// # Errors
    /// The first error of that work, or [`Error::InvalidArgument`] while the stream is captured.
    pub fn synchronize(&self) -> Result<()> {
        self.refuse_while_capturing("synchronize")?;
        let context = self.context();
        context.driver.synchronize(context.handle, self.handle())
    }

    /// Records a new timing event here.
    ///
    /// # Errors
    /// A driver failure.
    pub fn record(&self) -> Result<Event> {
        let event = Event::new(self.context().clone(), true)?;
        event.record(self)?;
        Ok(event)
    }

    /// Makes later work on this stream wait for everything queued on `other` so far.
    ///
    /// # Errors
    /// A driver failure.
    pub fn wait_for(&self, other: &Self) -> Result<()> {
        if self.handle() == other.handle() && self.ordinal() == other.ordinal() {
            return Ok(());
        }
        let event = Event::new(other.context().clone(), false)?;
        event.record(other)?;
        event.block(self)
    }

    /// Captures the work that `body` queues on this stream into a graph instead of running it. The graph keeps every
    /// owned buffer that it uses alive.
    ///
    /// # Errors
    /// The error of `body`; [`Error::CallbackPanicked`] when it panics; [`Error::InvalidArgument`] on the legacy
    /// stream or inside another capture; a driver failure. Nothing stays captured after an error.
    pub fn capture(&self, body: impl FnOnce() -> Result<()>) -> Result<Graph> {
        if self.handle() == StreamHandle::default() {
            return Err(Error::invalid("stream", "the legacy default stream", "a created stream, for capture"));
        }
        self.refuse_while_capturing("capture")?;
        let context = self.context();
        context.driver.begin_capture(context.handle, self.handle())?;
        *self.captured() = Some(Vec::new());
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        let buffers = self.captured().take().unwrap_or_default();
        let ended = context.driver.end_capture(context.handle, self.handle());
        let graph = match ended {
            Ok(Some(handle)) => Some(Graph::new(context.clone(), handle, buffers)),
            Ok(None) => None,
            Err(error) => {
                outcome.map_err(|_| Error::CallbackPanicked { during: "capture" })??;
                return Err(error);
            }
        };
        outcome.map_err(|_| Error::CallbackPanicked { during: "capture" })??;
        graph.ok_or_else(|| Error::invalid("capture", "an invalidated capture", "work that can be captured"))
    }

    /// Whether [`Stream::capture`] is running on this stream.
    pub(crate) fn is_capturing(&self) -> bool {
        self.captured().is_some()
    }

    /// Hands a buffer to the capture in progress.
    pub(crate) fn retain_for_capture(&self, buffer: &Arc<BufferInner>) {
        if let Some(buffers) = self.captured().as_mut() {
            buffers.push(buffer.clone());
        }
    }

    pub(crate) fn refuse_while_capturing(&self, what: &'static str) -> Result<()> {
        if self.is_capturing() {
            return Err(Error::invalid(what, "a stream that is being captured", "a stream that is not"));
        }
        Ok(())
    }

    fn captured(&self) -> std::sync::MutexGuard<'_, Option<Vec<Arc<BufferInner>>>> {
        self.inner.capturing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A point in a stream's work.
#[derive(Debug)]
pub struct Event {
    context: Arc<DeviceContext>,
    handle: EventHandle,
}

impl Event {
    pub(crate) fn new(context: Arc<DeviceContext>, timing: bool) -> Result<Self> {
        let handle = context.driver.create_event(context.handle, timing)?;
        Ok(Self { context, handle })
    }

    /// Moves the event to the current end of `stream`.
    ///
    /// # Errors
    /// A driver failure.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        self.context.driver.record_event(self.context.handle, self.handle, stream.handle())
    }

    /// Makes later work on `stream` wait for the event.
    ///
    /// # Errors
    /// A driver failure.
    pub fn block(&self, stream: &Stream) -> Result<()> {
        let context = stream.context();
        context.driver.wait_event(context.handle, stream.handle(), self.handle)
    }

    /// Waits on the host until the device has passed the event.
    ///
    /// # Errors
    /// The first error of the work before the event.
    pub fn synchronize(&self) -> Result<()> {
        self.context.driver.synchronize_event(self.context.handle, self.handle)
    }

    /// Milliseconds from this event to `end`, waiting for `end` first. Both must come from [`Stream::record`].
    ///
    /// # Errors
    /// A driver failure.
    pub fn elapsed_ms(&self, end: &Self) -> Result<f32> {
        end.synchronize()?;
        self.context.driver.elapsed_ms(self.context.handle, self.handle, end.handle)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        log_drop_error("an event", self.context.driver.destroy_event(self.context.handle, self.handle));
    }
}
