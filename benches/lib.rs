//! What the benchmarks share.

mod host_path;

use std::sync::Arc;
use std::time::{Duration, Instant};

use flashcore::testing::{MockConfig, MockDriver, launch_alone, sample_bundle, with_bundle};
use flashcore::{DType, DeviceBuffer, PreparedCall, Result, Runtime, Stream, TensorView, TensorViewMut};

/// (batch, heads, seq, head_dim) of the calls whose host time is measured: long enough on a device that its queue is never
/// empty, so that no call waits for it.
pub const SHAPE: [usize; 4] = [8, 8, 128, 64];
/// Sets of tensors to go round, so that a call's addresses are not those of the calls before.
const SETS: usize = 12;
/// Calls before the queue is emptied; fewer than it has room for.
pub const BATCH: u64 = 512;

/// A runtime on a driver that does nothing: what is left is what a call costs above it.
///
/// # Errors
/// None that a test would not have found.
pub fn idle_runtime() -> Result<Runtime> {
    let driver = Arc::new(MockDriver::new(MockConfig { computes: false, idle: true, ..MockConfig::default() }));
    with_bundle(Runtime::builder(), &driver, sample_bundle()).build()
}

/// The ways to make one and the same call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// The launch alone: its arguments are ready, and nothing is checked or ordered.
    Raw,
    /// [`PreparedCall::launch`].
    Prepared,
    /// A call with the tensors of the call before.
    Repeated,
    /// A call with tensors that this program has not called with lately.
    FirstSeen,
}

impl Path {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Raw, Self::Prepared, Self::Repeated, Self::FirstSeen];

    /// As reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Prepared => "prepared",
            Self::Repeated => "repeated",
            Self::FirstSeen => "first_seen",
        }
    }
}

/// Query, key, value and output on a device.
#[derive(Debug)]
struct Set {
    inputs: [DeviceBuffer; 3],
    out: DeviceBuffer,
}

/// Tensors to call with.
#[derive(Debug)]
pub struct Calls {
    runtime: Runtime,
    sets: Vec<Set>,
}

impl Calls {
    /// Allocates them.
    ///
    /// # Errors
    /// A driver failure.
    pub fn new(runtime: Runtime) -> Result<Self> {
        let stream = runtime.stream()?;
        let bytes = SHAPE.iter().product::<usize>() * DType::F16.size();
        let buffer = || DeviceBuffer::filled(stream, bytes, 0);
        let set = || Ok(Set { inputs: [buffer()?, buffer()?, buffer()?], out: buffer()? });
        let sets = (0..SETS).map(|_| set()).collect::<Result<_>>()?;
        Ok(Self { runtime, sets })
    }

    /// The time that the host spends on `count` calls. The queue is emptied outside of it, before it is full.
    ///
    /// # Errors
    /// A driver failure.
    pub fn time(&mut self, path: Path, count: u64) -> Result<Duration> {
        let mut total = Duration::ZERO;
        for first in (0..count).step_by(BATCH as usize) {
            let batch = BATCH.min(count - first);
            total += match path {
                Path::Raw => self.prepared(batch, launch_alone)?,
                Path::Prepared => self.prepared(batch, |call| call.launch())?,
                Path::Repeated => self.unprepared(batch, 1)?,
                Path::FirstSeen => self.unprepared(batch, SETS)?,
            };
            self.runtime.stream().and_then(Stream::synchronize)?;
        }
        Ok(total)
    }

    fn prepared(&mut self, count: u64, launch: fn(&mut PreparedCall<'_>) -> Result<()>) -> Result<Duration> {
        let Self { runtime, sets } = self;
        let Set { inputs: [q, k, v], out } = &mut sets[0];
        let [q, k, v] = [view(q)?, view(k)?, view(v)?];
        let out = TensorViewMut::from_buffer(out, DType::F16, &SHAPE)?;
        let mut call = runtime.attention(&q, &k, &v).prepare(out)?;
        launch(&mut call)?;
        let start = Instant::now();
        for _ in 0..count {
            launch(&mut call)?;
        }
        Ok(start.elapsed())
    }

    fn unprepared(&mut self, count: u64, sets: usize) -> Result<Duration> {
        self.call(0)?;
        let start = Instant::now();
        for index in 0..count {
            self.call(index as usize % sets)?;
        }
        Ok(start.elapsed())
    }

    /// One call with one set of tensors, from the views on.
    ///
    /// # Errors
    /// A driver failure.
    pub fn call(&mut self, set: usize) -> Result<()> {
        let Self { runtime, sets } = self;
        let Set { inputs: [q, k, v], out } = &mut sets[set];
        runtime.attention(&view(q)?, &view(k)?, &view(v)?).run(&mut TensorViewMut::from_buffer(
            out,
            DType::F16,
            &SHAPE,
        )?)
    }

    /// The kernel that the calls run.
    ///
    /// # Errors
    /// As a call.
    pub fn kernel(&mut self) -> Result<String> {
        self.call(0)?;
        Ok(flashcore::last_plan().map(|plan| plan.kernel).unwrap_or_default())
    }
}

fn view(buffer: &DeviceBuffer) -> Result<TensorView<'_>> {
    TensorView::from_buffer(buffer, DType::F16, &SHAPE)
}
