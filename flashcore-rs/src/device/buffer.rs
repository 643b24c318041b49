//! Device memory that knows its stream.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use smallvec::SmallVec;

use super::stream::hold_all;
use super::{DeviceContext, Stream};
use crate::driver::StreamHandle;
use crate::dtype::Element;
use crate::error::{Error, Result};

/// Device memory, allocated and freed in the order of its home stream. Dropping it never waits, and never frees memory
/// that queued work still uses. If a call fails so badly that neither a stream nor the host can wait for its work, its
/// buffers are lost: every later use is an [`Error::InvalidArgument`], and the memory is never freed.
#[derive(Debug)]
pub struct DeviceBuffer {
    inner: Arc<BufferInner>,
}

#[derive(Debug)]
pub(crate) struct BufferInner {
    home: Stream,
    memory: Memory,
    /// Whether the home stream is not ordered after every use there has been, because the last join of one failed.
    /// Written by who holds the turn and the home for writing, read by who holds either: locks order the accesses, which
    /// therefore need not.
    lost: AtomicBool,
    /// Held by work on another stream than the home, from the first join to the last, and by copies, which may wait for
    /// the device and so do not hold the home.
    turn: Mutex<()>,
}

/// An allocation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    address: u64,
    bytes: usize,
    zero: bool,
}

impl Memory {
    /// Frees the memory in the order of `stream`, zeroing it first if it holds a secret.
    pub(super) fn free(self, stream: &Stream) -> Result<()> {
        let Self { address, bytes, zero } = self;
        if bytes == 0 {
            return Ok(());
        }
        let context = stream.context();
        if zero {
            // Memory that could not be zeroed is not given back.
            context.driver.memset(context.handle, address, 0, bytes, stream.handle())?;
        }
        context.driver.free(context.handle, address, stream.handle())
    }
}

impl Drop for BufferInner {
    fn drop(&mut self) {
        // Nobody can say when work out of order ends, so its memory is never given back.
        if !*self.lost.get_mut() && self.memory.bytes > 0 {
            self.home.free(self.memory);
        }
    }
}

impl BufferInner {
    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses memory that work may still use, with nothing to wait for it by.
    #[inline]
    fn refuse_lost(&self) -> Result<()> {
        const GIVEN: &str = "memory that may still be in use, by a call whose streams could not be joined";
        match self.lost.load(Relaxed) {
            false => Ok(()),
            true => Err(Error::invalid("buffer", GIVEN, "another buffer; this one is lost")),
        }
    }
}

/// What becomes of work on a stream that is being captured.
#[derive(Clone, Copy)]
pub(crate) enum Captured {
    /// It goes into the graph.
    Allowed,
    /// It is refused under this name.
    Refused(&'static str),
}

/// As many as a call has tensors, without memory of their own.
pub(crate) type Few<T> = SmallVec<[T; 8]>;

/// Queues `work` on `stream`, ordered with every other use of `buffers`, and of memory on loan whose home streams are
/// `lenders`.
#[inline]
pub(crate) fn enqueue<'a>(
    stream: &Stream,
    buffers: impl Iterator<Item = &'a Arc<BufferInner>> + Clone,
    lenders: &[Stream],
    captured: Captured,
    work: impl FnOnce() -> Result<()>,
) -> Result<()> {
    if !lenders.is_empty() || buffers.clone().any(|buffer| !buffer.home.same(stream)) {
        return enqueue_away(stream, buffers.collect(), lenders, captured, work);
    }
    // All at home here, and so in order whatever becomes of the work.
    let hold = stream.hold();
    buffers.clone().try_for_each(|buffer| buffer.refuse_lost())?;
    match captured {
        Captured::Refused(what) => hold.refuse_capture(what)?,
        Captured::Allowed if hold.keep(buffers.clone())? => {}
        // The order of foreign memory is the caller's contract, also in captures by other libraries.
        Captured::Allowed if buffers.clone().next().is_none() => {}
        Captured::Allowed => hold.refuse_capture("buffer")?,
    }
    work()
}

/// [`enqueue`] of work that must be joined with other streams, or names its own in two ways.
#[cold]
fn enqueue_away(
    stream: &Stream,
    mut buffers: Few<&Arc<BufferInner>>,
    lenders: &[Stream],
    captured: Captured,
    work: impl FnOnce() -> Result<()>,
) -> Result<()> {
    if let Some(buffer) = buffers.iter().find(|buffer| !buffer.home.context().is(stream.context())) {
        let given = format!("a buffer of cuda:{}", buffer.home.ordinal());
        return Err(Error::invalid("buffer", given, "buffers of the stream's device and driver"));
    }
    // Address order, each once: two threads with the same buffers cannot deadlock.
    buffers.sort_unstable_by_key(|buffer| Arc::as_ptr(buffer).addr());
    buffers.dedup_by(|a, b| Arc::ptr_eq(a, b));
    let away = buffers.iter().filter(|buffer| !buffer.home.same(stream));
    let _turns: Few<_> = away.clone().map(|buffer| buffer.turn()).collect();
    let homes = buffers.iter().map(|buffer| &buffer.home).chain(lenders);
    let mut streams: Few<&Stream> = homes.chain([stream]).collect();
    // Others may use this stream meanwhile: its order is theirs too.
    let holds = hold_all(&mut streams, |home| !home.same(stream));
    buffers.iter().try_for_each(|buffer| buffer.refuse_lost())?;
    for hold in holds.iter().filter(|hold| hold.is_on(stream)) {
        match captured {
            // A graph cannot own what is only lent.
            Captured::Allowed if !lenders.is_empty() => hold.refuse_capture("stream")?,
            // The graph joins at each launch instead; a capture may not wait for work outside it.
            Captured::Allowed if hold.keep(buffers.iter().copied())? => return work(),
            Captured::Refused(what) => hold.refuse_capture(what)?,
            Captured::Allowed => {}
        }
    }
    holds.iter().try_for_each(|hold| hold.refuse_capture("buffer"))?;
    if streams.iter().all(|home| home.is(stream)) {
        // At home here after all, under another name.
        return work();
    }
    streams.iter().try_for_each(|home| stream.follow(home))?;
    // Set back only by the last join, so that whatever ends this early leaves the memory unused, and never freed.
    let joining = away.filter(|buffer| !buffer.home.is(stream));
    joining.clone().for_each(|buffer| buffer.lost.store(true, Relaxed));
    let worked = catch_unwind(AssertUnwindSafe(work));
    // Also after a failure or a panic: part of the work may be on its way.
    let joined = join(&streams, stream);
    if joined.is_ok() {
        joining.for_each(|buffer| buffer.lost.store(false, Relaxed));
    }
    worked.unwrap_or_else(|panic| resume_unwind(panic)).and(joined)
}

/// Makes what follows on `homes` follow the work on `stream`.
fn join(homes: &[&Stream], stream: &Stream) -> Result<()> {
    let Err(error) = homes.iter().try_for_each(|home| home.follow(stream)) else { return Ok(()) };
    let context = stream.context();
    let waited = context.driver.synchronize(context.handle, stream.handle());
    match &waited {
        Ok(()) => log::warn!("waited on the host, because streams could not be joined: {error}"),
        Err(_) => log::error!("buffers are lost, because neither streams nor the host could wait: {error}"),
    }
    waited
}

impl DeviceBuffer {
    /// Uninitialised memory whose home is `stream`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::InvalidArgument`] while the stream is being captured.
    pub fn uninit(stream: &Stream, bytes: usize) -> Result<Self> {
        let context = stream.context();
        let hold = stream.hold();
        hold.refuse_capture("allocation")?;
        let address = match bytes {
            0 => 0,
            _ => context.driver.alloc(context.handle, bytes, stream.handle())?,
        };
        let memory = Memory { address, bytes, zero: false };
        let (home, lost, turn) = (stream.clone(), AtomicBool::new(false), Mutex::default());
        Ok(Self { inner: Arc::new(BufferInner { home, memory, lost, turn }) })
    }

    /// Memory filled with one byte value.
    ///
    /// # Errors
    /// As [`DeviceBuffer::uninit`].
    pub fn filled(stream: &Stream, bytes: usize, value: u8) -> Result<Self> {
        let buffer = Self::uninit(stream, bytes)?;
        buffer.queue("fill", |context, home| {
            context.driver.memset(context.handle, buffer.address(), value, bytes, home)
        })?;
        Ok(buffer)
    }

    /// A copy of host data.
    ///
    /// # Errors
    /// As [`DeviceBuffer::uninit`].
    pub fn from_slice<T: Element>(stream: &Stream, data: &[T]) -> Result<Self> {
        let bytes = as_bytes(data);
        let buffer = Self::uninit(stream, bytes.len())?;
        buffer.queue("copy", |context, home| {
            context.driver.copy_to_device(context.handle, buffer.address(), bytes, home)
        })?;
        Ok(buffer)
    }

    /// Copies host data of the same size into the buffer, after everything queued on its home stream.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the sizes differ or the stream is being captured; a driver failure.
    #[cfg(feature = "validate")]
    pub(crate) fn overwrite<T: Element>(&mut self, data: &[T]) -> Result<()> {
        let bytes = as_bytes(data);
        if bytes.len() != self.len() {
            return Err(Error::invalid("data", format!("{} bytes", bytes.len()), format!("{} bytes", self.len())));
        }
        self.queue("copy", |context, home| context.driver.copy_to_device(context.handle, self.address(), bytes, home))
    }

    /// Fills the buffer again, in the order of its home stream.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] while the stream is being captured; a driver failure.
    #[cfg(feature = "validate")]
    pub(crate) fn fill(&mut self, value: u8) -> Result<()> {
        self.queue("fill", |context, home| {
            context.driver.memset(context.handle, self.address(), value, self.len(), home)
        })
    }

    /// Copies the contents to the host, after everything queued on the buffer. Memory that nothing was written to holds
    /// anything.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the size is not a multiple of `T`'s, or the home stream is being captured; an
    /// error of the queued work.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        let size = size_of::<T>();
        if !self.len().is_multiple_of(size) {
            return Err(Error::invalid("buffer", format!("{} bytes", self.len()), format!("a multiple of {size}")));
        }
        let mut data = vec![T::default(); self.len() / size];
        self.queue("copy", |context, home| {
            context.driver.copy_to_host(context.handle, as_bytes_mut(&mut data), self.address(), home)
        })?;
        Ok(data)
    }

    /// Queues work on the home stream, unless there is nothing in the buffer.
    fn queue(&self, what: &'static str, work: impl FnOnce(&DeviceContext, StreamHandle) -> Result<()>) -> Result<()> {
        let home = self.home();
        let _turn = self.inner.turn();
        self.inner.refuse_lost()?;
        home.wait(what, || if self.is_empty() { Ok(()) } else { work(home.context(), home.handle()) })
    }

    /// Overwrites the memory with zeros before it is freed, in stream order, however the buffer is dropped.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when a captured graph already shares the buffer.
    pub fn zero_on_drop(mut self) -> Result<Self> {
        match Arc::get_mut(&mut self.inner) {
            Some(inner) => inner.memory.zero = true,
            None => return Err(Error::invalid("buffer", "shared with a graph", "a buffer no graph has captured")),
        }
        Ok(self)
    }

    /// Size in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.inner.memory.bytes
    }

    /// Whether the size is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The device's ordinal.
    #[inline]
    pub fn ordinal(&self) -> u32 {
        self.inner.home.ordinal()
    }

    /// The stream on which the buffer was allocated and will be freed.
    pub fn home(&self) -> &Stream {
        &self.inner.home
    }

    #[inline]
    pub(crate) fn address(&self) -> u64 {
        self.inner.memory.address
    }

    #[inline]
    pub(crate) fn inner(&self) -> &Arc<BufferInner> {
        &self.inner
    }
}

/// The bytes of a slice of elements.
#[expect(unsafe_code, reason = "viewing plain numbers as bytes")]
fn as_bytes<T: Element>(data: &[T]) -> &[u8] {
    // SAFETY: `Element` is sealed to number types without padding; any byte of them is initialised.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

/// The bytes of a slice of elements, writable.
#[expect(unsafe_code, reason = "viewing plain numbers as bytes")]
fn as_bytes_mut<T: Element>(data: &mut [T]) -> &mut [u8] {
    // SAFETY: as `as_bytes`, and every bit pattern is a valid value of every `Element`.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), size_of_val(data)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::mock::{Entry, MockDriver};

    /// Work on another stream than the buffer's home, which panics once it has begun.
    fn panics_midway(buffer: &DeviceBuffer, stream: &Stream) {
        let context = stream.context();
        let work = || {
            context.driver.memset(context.handle, buffer.address(), 1, buffer.len(), stream.handle())?;
            resume_unwind(Box::new("a panic that a test wants"))
        };
        let enqueue = || enqueue(stream, [buffer.inner()].into_iter(), &[], Captured::Allowed, work);
        let panic = catch_unwind(AssertUnwindSafe(enqueue)).expect_err("a panic");
        assert_eq!(panic.downcast_ref(), Some(&"a panic that a test wants"));
    }

    #[test]
    fn work_that_panics_is_joined() -> Result<()> {
        let driver = Arc::new(MockDriver::default());
        let context = DeviceContext::new(driver.clone(), 0)?;
        let (home, side) = (Stream::create(context.clone())?, Stream::create(context)?);

        let joined = DeviceBuffer::filled(&home, 64, 0)?;
        panics_midway(&joined, &side);
        assert_eq!(joined.to_vec::<u8>()?, [1; 64]);
        drop(joined);
        assert_eq!(driver.live().0, 0);

        let lost = DeviceBuffer::filled(&home, 64, 0)?;
        // The second event is the one that would make the home stream wait for the work.
        driver.fail(Entry::CreateEvent, 1, 999);
        driver.fail(Entry::Synchronize, 0, 999);
        panics_midway(&lost, &side);
        assert!(matches!(lost.to_vec::<u8>(), Err(Error::InvalidArgument { argument: "buffer", .. })));
        drop(lost);
        assert_eq!(driver.live().0, 1);
        assert_eq!(driver.violations(), Vec::<String>::new());
        Ok(())
    }
}
