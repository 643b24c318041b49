//! Kernels that measuring needs: a gate that holds a stream, a reading of the SM clock, and nothing at all.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{DeviceBuffer, DeviceContext, Stream, log_drop_error};
use crate::driver::{FunctionHandle, LaunchRequest, ParamBlock};
use crate::error::{Error, Result};

/// PTX, so that it runs on every card. What is measured is machine code; this is only around it.
const CODE: &[u8] = include_bytes!("probe.ptx");
/// How long a gate stays closed at most, so that a mistake is an error and not a hang.
const LIMIT: Duration = Duration::from_secs(5);
/// Bytes of one reading: cycles and nanoseconds.
pub(crate) const READING: usize = 16;

/// The kernels, loaded on one device.
pub(crate) struct Probe {
    context: Arc<DeviceContext>,
    gate: FunctionHandle,
    clock: FunctionHandle,
    nothing: FunctionHandle,
    /// Not 0 while the gate is open. At home on a stream of its own, which no gate holds.
    flag: Mutex<DeviceBuffer>,
}

/// A closed gate. It opens when this is dropped, if not before.
pub(crate) struct Closed<'a> {
    probe: &'a Probe,
    stream: &'a Stream,
    since: Instant,
}

impl Probe {
    /// Loads the kernels where `stream` is.
    pub(crate) fn new(stream: &Stream) -> Result<Self> {
        let context = stream.context().clone();
        let module = context.driver.load_module(context.handle, CODE)?;
        let kernel = |name| context.driver.function(context.handle, module, name, 0);
        let (gate, clock, nothing) = (kernel("gate")?, kernel("clock")?, kernel("nothing")?);
        let flag = DeviceBuffer::filled(&Stream::create(context.clone())?, size_of::<u32>(), 1)?;
        Ok(Self { gate, clock, nothing, flag: Mutex::new(flag), context })
    }

    /// Holds back what is queued on `stream` from here on, until the gate is opened. Meanwhile nothing may wait for the
    /// stream.
    pub(crate) fn close<'a>(&'a self, stream: &'a Stream) -> Result<Closed<'a>> {
        // The flag is for one gate at a time, and the one before may not have run yet.
        stream.synchronize()?;
        let flag = self.set_flag(0)?;
        self.launch(stream, self.gate, &[flag, LIMIT.as_nanos() as u64])?;
        Ok(Closed { probe: self, stream, since: Instant::now() })
    }

    /// Spins for `span` and writes [`READING`] bytes at an offset of `out`: how many cycles and nanoseconds that were.
    pub(crate) fn clock(&self, out: &DeviceBuffer, offset: usize, span: Duration) -> Result<()> {
        if offset + READING > out.len() {
            return Err(Error::invalid("offset", offset, format!("at most {}", out.len().saturating_sub(READING))));
        }
        self.launch(out.home(), self.clock, &[out.address() + offset as u64, span.as_nanos() as u64])
    }

    /// Queues a kernel that does nothing: what a launch costs.
    pub(crate) fn nothing(&self, stream: &Stream) -> Result<()> {
        self.launch(stream, self.nothing, &[])
    }

    /// Sets the flag, waits until it is set, and says where it is.
    fn set_flag(&self, value: u8) -> Result<u64> {
        let mut flag = self.flag.lock().unwrap_or_else(PoisonError::into_inner);
        flag.fill(value)?;
        flag.home().synchronize()?;
        Ok(flag.address())
    }

    fn launch(&self, stream: &Stream, function: FunctionHandle, arguments: &[u64]) -> Result<()> {
        self.context.check_driver(stream.context())?;
        let mut params = ParamBlock::default();
        for argument in arguments {
            params.push(&argument.to_ne_bytes(), 8);
        }
        let hold = stream.hold();
        hold.refuse_capture("probe")?;
        self.context.driver.launch(
            self.context.handle,
            &mut LaunchRequest {
                function,
                grid: [1; 3],
                block_threads: 1,
                cluster: 1,
                shared_bytes: 0,
                stream: stream.handle(),
                params: &mut params,
                tensor_maps: &[],
            },
        )
    }
}

impl Closed<'_> {
    /// Lets the stream go on, and waits for it.
    ///
    /// # Errors
    /// The first error of the work; [`Error::InvalidArgument`] when the gate may have opened by itself before.
    pub(crate) fn open(self) -> Result<()> {
        let held = self.since.elapsed();
        self.release()?;
        if held > LIMIT / 2 {
            let given = format!("work that took {held:?} to queue");
            return Err(Error::invalid("gate", given, format!("less than {:?}", LIMIT / 2)));
        }
        Ok(())
    }

    fn release(&self) -> Result<()> {
        self.probe.set_flag(1)?;
        self.stream.synchronize()
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        // After `open` this finds nothing to wait for.
        log_drop_error("a gate", self.release());
    }
}
