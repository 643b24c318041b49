//! Device memory that knows its stream.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Stream, log_drop_error};
use crate::dtype::Element;
use crate::error::{Error, Result};

/// Device memory, allocated and freed in the order of its home stream. Dropping it never waits, and never frees memory
/// that queued work still uses.
#[derive(Debug)]
pub struct DeviceBuffer {
    inner: Arc<BufferInner>,
}

#[derive(Debug)]
pub(crate) struct BufferInner {
    home: Stream,
    address: u64,
    bytes: usize,
    zero_on_drop: bool,
    /// Held from the first join to the last of one piece of work. Borrows alone do not order threads here: a graph
    /// writes to buffers that it shares.
    enqueue: Mutex<()>,
}

impl Drop for BufferInner {
    fn drop(&mut self) {
        let context = self.home.context();
        if self.bytes == 0 {
            return;
        }
        if self.zero_on_drop {
            let zeroed = context.driver.memset(context.handle, self.address, 0, self.bytes, self.home.handle());
            log_drop_error("a secret buffer", zeroed);
        }
        log_drop_error("a buffer", context.driver.free(context.handle, self.address, self.home.handle()));
    }
}

impl BufferInner {
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.enqueue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Queues `work` on `stream`, ordered with every other use of `buffers`.
pub(crate) fn enqueue(
    stream: &Stream,
    buffers: &mut [&Arc<BufferInner>],
    work: impl FnOnce() -> Result<()>,
) -> Result<()> {
    // Address order, each once: two threads with the same buffers cannot deadlock.
    buffers.sort_unstable_by_key(|buffer| Arc::as_ptr(buffer).addr());
    let mut guards: Vec<MutexGuard<'_, ()>> = Vec::new();
    let mut previous = None;
    for buffer in buffers.iter() {
        if previous != Some(Arc::as_ptr(buffer)) {
            guards.push(buffer.lock());
        }
        previous = Some(Arc::as_ptr(buffer));
    }
    if stream.is_capturing() {
        // The graph joins at each launch instead; a capture may not wait for work outside it.
        buffers.iter().for_each(|buffer| stream.retain_for_capture(buffer));
        return work();
    }
    for buffer in buffers.iter() {
        stream.wait_for(&buffer.home)?;
    }
    work()?;
    let joined = buffers.iter().try_for_each(|buffer| buffer.home.wait_for(stream));
    joined.or_else(|error| stream.synchronize().and(Err(error)))
}

impl DeviceBuffer {
    /// Uninitialised memory whose home is `stream`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::InvalidArgument`] while the stream is being captured.
    pub fn uninit(stream: &Stream, bytes: usize) -> Result<Self> {
        stream.refuse_while_capturing("allocation")?;
        let context = stream.context();
        let address = match bytes {
            0 => 0,
            _ => context.driver.alloc(context.handle, bytes, stream.handle())?,
        };
        let inner = BufferInner { home: stream.clone(), address, bytes, zero_on_drop: false, enqueue: Mutex::new(()) };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Memory filled with one byte value.
    ///
    /// # Errors
    /// As [`DeviceBuffer::uninit`].
    pub fn filled(stream: &Stream, bytes: usize, value: u8) -> Result<Self> {
        let buffer = Self::uninit(stream, bytes)?;
        if bytes > 0 {
            let context = stream.context();
            context.driver.memset(context.handle, buffer.address(), value, bytes, stream.handle())?;
        }
        Ok(buffer)
    }

    /// A copy of host data.
    ///
    /// # Errors
    /// As [`DeviceBuffer::uninit`].
    pub fn from_slice<T: Element>(stream: &Stream, data: &[T]) -> Result<Self> {
        let bytes = as_bytes(data);
        let buffer = Self::uninit(stream, bytes.len())?;
        if !bytes.is_empty() {
            let context = stream.context();
            context.driver.copy_to_device(context.handle, buffer.address(), bytes, stream.handle())?;
        }
        Ok(buffer)
    }

    /// Copies the contents to the host, after everything queued on the buffer.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the size is not a multiple of `T`'s, or the home stream is being captured; an
    /// error of the queued work.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        let size = size_of::<T>();
        if self.len() % size != 0 {
            return Err(Error::invalid("buffer", format!("{} bytes", self.len()), format!("a multiple of {size}")));
        }
        self.inner.home.refuse_while_capturing("copy")?;
        let mut data = vec![T::default(); self.len() / size];
        if !data.is_empty() {
            let context = self.inner.home.context();
            let home = self.inner.home.handle();
            let _ordered = self.inner.lock();
            context.driver.copy_to_host(context.handle, as_bytes_mut(&mut data), self.address(), home)?;
        }
        Ok(data)
    }

    /// Overwrites the memory with zeros before it is freed, in stream order, however the buffer is dropped.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when a captured graph already shares the buffer.
    pub fn zero_on_drop(mut self) -> Result<Self> {
        match Arc::get_mut(&mut self.inner) {
            Some(inner) => inner.zero_on_drop = true,
            None => return Err(Error::invalid("buffer", "shared with a graph", "a buffer no graph has captured")),
        }
        Ok(self)
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.inner.bytes
    }

    /// Whether the size is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The device's ordinal.
    pub fn ordinal(&self) -> u32 {
        self.inner.home.ordinal()
    }

    /// The stream on which the buffer was allocated and will be freed.
    pub fn home(&self) -> &Stream {
        &self.inner.home
    }

    pub(crate) fn address(&self) -> u64 {
        self.inner.address
    }

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
