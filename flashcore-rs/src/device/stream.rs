//! Streams and events.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::ThreadId;

use super::buffer::{BufferInner, Memory};
use super::{DeviceContext, Few, Graph, log_drop_error};
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
    origin: Origin,
    /// The capture in progress, and the lock on what is at home here. Work on this very stream holds it for reading, and
    /// is ordered by the stream. Whoever else touches memory at home here holds it for writing, from the first join of
    /// the streams to the last, and so does a capture while it begins or ends: neither happens in the middle of the
    /// other. Nobody holds it while the host waits for the device.
    capture: RwLock<Option<Capture>>,
    /// Held for reading, and taken before `capture`, where the host waits for the stream; for writing where a capture
    /// begins or ends.
    waits: RwLock<()>,
}

/// Whose a stream is.
#[derive(Debug)]
enum Origin {
    /// Ours to destroy.
    Created,
    /// Another library's, which keeps it alive, or is held to by a reference.
    Foreign(Option<KeepAlive>),
}

/// A reference to what must outlive a stream.
pub(crate) type KeepAlive = Arc<dyn std::any::Any + Send + Sync>;

/// A capture that [`Stream::capture`] has begun.
#[derive(Debug)]
struct Capture {
    thread: ThreadId,
    kept: Mutex<Kept>,
}

/// What a capture has to look after.
#[derive(Debug, Default)]
struct Kept {
    /// Buffers that the captured work uses.
    buffers: Vec<Arc<BufferInner>>,
    /// Memory to free on the stream once it is no longer captured.
    frees: Vec<Memory>,
}

impl Capture {
    #[cold]
    fn keep<'b>(&self, buffers: impl Iterator<Item = &'b Arc<BufferInner>>) -> Result<()> {
        if self.thread != std::thread::current().id() {
            return Err(Error::invalid("stream", "a stream that another thread is capturing", "a stream that is not"));
        }
        self.kept().buffers.extend(buffers.cloned());
        Ok(())
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for StreamInner {
    fn drop(&mut self) {
        if matches!(self.origin, Origin::Created) {
            log_drop_error("a stream", self.context.driver.destroy_stream(self.context.handle, self.handle));
        }
    }
}

/// Keeps captures of a stream from beginning or ending, and more if it is for writing.
pub(super) struct Hold<'a> {
    stream: &'a Stream,
    capture: Guard<'a>,
}

enum Guard<'a> {
    Shared(RwLockReadGuard<'a, Option<Capture>>),
    Alone(RwLockWriteGuard<'a, Option<Capture>>),
}

impl Deref for Guard<'_> {
    type Target = Option<Capture>;

    #[inline]
    fn deref(&self) -> &Option<Capture> {
        match self {
            Self::Shared(capture) => capture,
            Self::Alone(capture) => capture,
        }
    }
}

impl Hold<'_> {
    /// Whether it holds this very stream.
    pub(super) fn is_on(&self, stream: &Stream) -> bool {
        self.stream.same(stream)
    }

    /// Hands buffers to this thread's capture of the stream; false when there is none.
    #[inline]
    pub(super) fn keep<'b>(&self, buffers: impl Iterator<Item = &'b Arc<BufferInner>>) -> Result<bool> {
        self.capture.as_ref().map_or(Ok(false), |capture| capture.keep(buffers).map(|()| true))
    }

    /// Refuses a stream that is being captured, by this crate or (for foreign streams) by anybody.
    #[inline]
    pub(super) fn refuse_capture(&self, what: &'static str) -> Result<()> {
        let StreamInner { context, handle, origin, .. } = &*self.stream.inner;
        let by_another = match origin {
            Origin::Created => false,
            Origin::Foreign(_) => context.driver.stream_is_capturing(context.handle, *handle)?,
        };
        if self.capture.is_some() || by_another {
            return Err(Error::invalid(what, "a stream that is being captured", "a stream that is not"));
        }
        Ok(())
    }
}

impl Stream {
    pub(crate) fn create(context: Arc<DeviceContext>) -> Result<Self> {
        let handle = context.driver.create_stream(context.handle)?;
        Ok(Self::new(context, handle, Origin::Created))
    }

    /// A stream that is not ours to destroy. `keep` is held as long as the stream is.
    pub(crate) fn foreign(context: Arc<DeviceContext>, handle: StreamHandle, keep: Option<KeepAlive>) -> Result<Self> {
        const PER_THREAD: u64 = 2;
        if handle.0 == PER_THREAD {
            let given = "the per-thread default stream";
            return Err(Error::invalid("stream", given, "a stream that is the same on every thread"));
        }
        Ok(Self::new(context, one_name(handle), Origin::Foreign(keep)))
    }

    fn new(context: Arc<DeviceContext>, handle: StreamHandle, origin: Origin) -> Self {
        Self {
            inner: Arc::new(StreamInner {
                context,
                handle,
                origin,
                capture: RwLock::default(),
                waits: RwLock::default(),
            }),
        }
    }

    #[inline]
    pub(crate) fn context(&self) -> &Arc<DeviceContext> {
        &self.inner.context
    }

    /// Whether this is what [`crate::Runtime::foreign_stream`] gives for a handle.
    pub fn is_foreign(&self, runtime: &crate::Runtime, raw: u64) -> bool {
        let foreign = matches!(self.inner.origin, Origin::Foreign(None));
        foreign
            && self.handle() == one_name(StreamHandle(raw))
            && runtime.context().is_ok_and(|context| self.context().is(context))
    }

    #[inline]
    pub(crate) fn handle(&self) -> StreamHandle {
        self.inner.handle
    }

    /// The device's ordinal.
    #[inline]
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
        self.wait("synchronize", || {
            let context = self.context();
            context.driver.synchronize(context.handle, self.handle())
        })
    }

    /// Does what may have to wait for the stream, while no capture of it begins.
    pub(super) fn wait(&self, what: &'static str, body: impl FnOnce() -> Result<()>) -> Result<()> {
        let _waits = self.inner.waits.read().unwrap_or_else(PoisonError::into_inner);
        self.hold().refuse_capture(what)?;
        body()
    }

    /// Records a new timing event here.
    ///
    /// # Errors
    /// As [`Event::record`].
    pub fn record(&self) -> Result<Event> {
        let event = Event::new(self.context().clone(), true)?;
        event.record(self)?;
        Ok(event)
    }

    /// Makes later work on this stream wait for everything queued on `other` so far.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] while one of them is captured; a driver failure.
    pub fn wait_for(&self, other: &Self) -> Result<()> {
        let mut streams = Few::from_slice(&[self, other]);
        let holds = hold_all(&mut streams, |_| false);
        holds.iter().try_for_each(|hold| hold.refuse_capture("wait"))?;
        self.follow(other)
    }

    /// [`Stream::wait_for`] for a caller that holds both streams.
    pub(super) fn follow(&self, other: &Self) -> Result<()> {
        if self.is(other) {
            return Ok(());
        }
        self.context().check_driver(other.context())?;
        let event = Event::new(other.context().clone(), false)?;
        event.record_held(other)?;
        event.block_held(self)
    }

    /// Whether both are one value, and not two names of one queue.
    #[inline]
    pub(super) fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Whether both name the same queue.
    pub(super) fn is(&self, other: &Self) -> bool {
        self.handle() == other.handle() && self.context().is(other.context())
    }

    /// Captures the work that `body` queues on this stream into a graph instead of running it. The graph keeps every
    /// owned buffer that it uses alive. Other threads cannot use the stream meanwhile, and work that it would have to
    /// wait for, or that would wait for it, is refused: a capture is one stream's work.
    ///
    /// # Errors
    /// The error of `body`; [`Error::CallbackPanicked`] when it panics; [`Error::InvalidArgument`] on the legacy
    /// stream or inside another capture; a driver failure. Nothing stays captured after an error.
    pub fn capture(&self, body: impl FnOnce() -> Result<()>) -> Result<Graph> {
        if self.handle() == StreamHandle::default() {
            return Err(Error::invalid("stream", "the legacy default stream", "a created stream, for capture"));
        }
        self.begin_capture()?;
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        let ended = self.end_capture();
        outcome.map_err(|_| Error::CallbackPanicked { during: "capture" })??;
        ended?.ok_or_else(|| Error::invalid("capture", "an invalidated capture", "work that can be captured"))
    }

    fn begin_capture(&self) -> Result<()> {
        let context = self.context();
        let _waits = self.inner.waits.write().unwrap_or_else(PoisonError::into_inner);
        let mut capture = self.inner.capture.write().unwrap_or_else(PoisonError::into_inner);
        if capture.is_some() {
            return Err(Error::invalid("capture", "a stream that is being captured", "a stream that is not"));
        }
        context.driver.begin_capture(context.handle, self.handle())?;
        *capture = Some(Capture { thread: std::thread::current().id(), kept: Mutex::default() });
        Ok(())
    }

    fn end_capture(&self) -> Result<Option<Graph>> {
        let context = self.context();
        let waits = self.inner.waits.write().unwrap_or_else(PoisonError::into_inner);
        let mut capture = self.inner.capture.write().unwrap_or_else(PoisonError::into_inner);
        let ended = context.driver.end_capture(context.handle, self.handle());
        let kept = capture.take().map(|capture| std::mem::take(&mut *capture.kept())).unwrap_or_default();
        // Buffers and memory below are released through the stream, which must be free to be held again.
        drop((capture, waits));
        kept.frees.into_iter().for_each(|memory| self.free(memory));
        Ok(ended?.map(|handle| Graph::new(context.clone(), handle, kept.buffers)))
    }

    /// Frees memory in stream order; after the capture, if the stream is being captured.
    pub(super) fn free(&self, memory: Memory) {
        let hold = self.hold();
        match hold.capture.as_ref() {
            Some(capture) => capture.kept().frees.push(memory),
            // A capture by somebody else: the memory is leaked, which harms nobody.
            None => log_drop_error("a buffer", hold.refuse_capture("free").and_then(|()| memory.free(self))),
        }
    }

    #[inline]
    pub(super) fn hold(&self) -> Hold<'_> {
        let capture = self.inner.capture.read().unwrap_or_else(PoisonError::into_inner);
        Hold { stream: self, capture: Guard::Shared(capture) }
    }

    /// [`Stream::hold`], and keeps all others from holding it.
    fn hold_alone(&self) -> Hold<'_> {
        let capture = self.inner.capture.write().unwrap_or_else(PoisonError::into_inner);
        Hold { stream: self, capture: Guard::Alone(capture) }
    }
}

/// The legacy default stream has two names; it is 0 here.
fn one_name(handle: StreamHandle) -> StreamHandle {
    const LEGACY: u64 = 1;
    if handle.0 == LEGACY { StreamHandle::default() } else { handle }
}

/// Holds each stream once, for writing those that are to be held `alone`, in an order that all threads share: whoever
/// waits for a hold between two of the same stream, or of two streams in opposite orders, would be a deadlock.
pub(super) fn hold_all<'a>(streams: &mut Few<&'a Stream>, alone: impl Fn(&Stream) -> bool) -> Few<Hold<'a>> {
    streams.sort_unstable_by_key(|stream| Arc::as_ptr(&stream.inner).addr());
    streams.dedup_by(|a, b| a.same(b));
    let hold = |&stream: &&'a Stream| if alone(stream) { stream.hold_alone() } else { stream.hold() };
    streams.iter().map(hold).collect()
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
    /// [`Error::InvalidArgument`] while the stream is captured; a driver failure.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        self.context.check_driver(stream.context())?;
        let hold = stream.hold();
        hold.refuse_capture("event")?;
        self.record_held(stream)
    }

    fn record_held(&self, stream: &Stream) -> Result<()> {
        self.context.driver.record_event(self.context.handle, self.handle, stream.handle())
    }

    /// Makes later work on `stream` wait for the event.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] while the stream is captured; a driver failure.
    pub fn block(&self, stream: &Stream) -> Result<()> {
        self.context.check_driver(stream.context())?;
        let hold = stream.hold();
        hold.refuse_capture("event")?;
        self.block_held(stream)
    }

    fn block_held(&self, stream: &Stream) -> Result<()> {
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
        self.context.check_driver(&end.context)?;
        end.synchronize()?;
        self.context.driver.elapsed_ms(self.context.handle, self.handle, end.handle)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        log_drop_error("an event", self.context.driver.destroy_event(self.context.handle, self.handle));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Duration;

    use super::super::{Captured, DeviceBuffer, enqueue};
    use super::*;
    use crate::driver::mock::MockDriver;

    fn streams() -> Result<[Stream; 2]> {
        let context = DeviceContext::new(Arc::new(MockDriver::default()), 0)?;
        Ok([Stream::create(context.clone())?, Stream::create(context)?])
    }

    /// Does `work` on another thread, and tells when it is done.
    fn elsewhere<'s>(
        scope: &'s std::thread::Scope<'s, '_>,
        work: impl FnOnce() -> Result<()> + Send + 's,
    ) -> Receiver<Result<()>> {
        let (done, is_done) = channel();
        scope.spawn(move || done.send(work()));
        is_done
    }

    #[test]
    fn work_does_not_wait_while_the_host_waits() -> Result<()> {
        let [home, side] = streams()?;
        let buffer = DeviceBuffer::filled(&home, 64, 0)?;
        let use_on = |stream: &Stream| enqueue(stream, [buffer.inner()].into_iter(), &[], Captured::Allowed, || Ok(()));
        std::thread::scope(|scope| {
            home.wait("test", || {
                for work in [elsewhere(scope, || use_on(&side)), elsewhere(scope, || use_on(&home))] {
                    work.recv_timeout(Duration::from_secs(20)).expect("work that is queued meanwhile")?;
                }
                Ok(())
            })
        })
    }

    #[test]
    fn captures_wait_while_the_host_waits() -> Result<()> {
        let [home, _] = streams()?;
        std::thread::scope(|scope| {
            let mut captured = None;
            home.wait("test", || {
                let capture = elsewhere(scope, || home.capture(|| Ok(())).map(drop));
                assert!(capture.recv_timeout(Duration::from_millis(100)).is_err(), "captured in the middle of a wait");
                captured = Some(capture);
                Ok(())
            })?;
            captured.expect("a capture").recv().expect("a result")
        })
    }
}
