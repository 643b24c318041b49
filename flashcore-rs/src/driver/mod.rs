//! The CUDA driver as the rest of the crate sees it: a small trait with two implementations.
//!
//! `cuda` calls the driver library; `mock` records calls over host memory, so that everything above this module runs
//! and is tested without a GPU. Handles are plain numbers: whoever holds one must keep the order that the driver asks
//! for, and only `device/` and `runtime.rs` do. This module tree is the only one with `unsafe` over CUDA.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod mock;

use crate::dtype::DType;
use crate::error::{Error, Result};

macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub u64);
    )*};
}

handles! {
    /// A primary context (`CUcontext`).
    ContextHandle,
    /// A loaded module (`CUmodule`).
    ModuleHandle,
    /// A kernel in a loaded module (`CUfunction`).
    FunctionHandle,
    /// A stream (`CUstream`); 0 is the legacy default stream.
    StreamHandle,
    /// An event (`CUevent`).
    EventHandle,
    /// An instantiated graph (`CUgraphExec`).
    GraphHandle,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Ordinal as the driver counts.
    pub ordinal: u32,
    /// Marketing name.
    pub name: String,
    /// Compute capability.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Shared memory that one block may opt into, bytes.
    pub shared_bytes_optin: u32,
    /// Device memory, bytes.
    pub total_memory: usize,
    /// L2 cache, bytes.
    pub l2_bytes: u32,
    /// CUDA version of the driver, as `1000 * major + 10 * minor`.
    pub driver_version: u32,
}

/// A rank-4 TMA descriptor request; dimensions innermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMapSpec {
    /// Element type, two bytes wide.
    pub dtype: DType,
    /// Base address, 16-byte aligned.
    pub address: u64,
    /// Sizes, in elements.
    pub dims: [u64; 4],
    /// Strides of dimensions 1..4, in bytes, multiples of 16.
    pub strides: [u64; 3],
    /// Box, in elements.
    pub box_dims: [u32; 4],
    /// Swizzle span in bytes: 0, 32, 64 or 128.
    pub swizzle: u32,
}

/// A `CUtensorMap`: 128 opaque bytes, 128-byte aligned to satisfy every version of the driver API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(128))]
pub struct TensorMap(pub [u8; 128]);

/// What becomes of a TMA descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapChange {
    /// It is encoded.
    New(TensorMapSpec),
    /// It was encoded before, and describes the same at this address now.
    Moved(u64),
}

/// One kernel launch.
#[derive(Debug)]
pub struct LaunchRequest<'a> {
    /// The kernel.
    pub function: FunctionHandle,
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads per block.
    pub block_threads: u32,
    /// Blocks per cluster along x.
    pub cluster: u32,
    /// Dynamic shared memory, bytes.
    pub shared_bytes: u32,
    /// The stream.
    pub stream: StreamHandle,
    /// The arguments.
    pub params: &'a mut ParamBlock,
    /// Arguments that are TMA descriptors, by their index, and what is to become of each first.
    pub tensor_maps: &'a [(usize, MapChange)],
}

/// Room for the arguments of one launch. (The driver's own limit is 4 KiB; a forward with four tensor maps takes 856.)
pub const PARAM_BYTES: usize = 2048;
/// The most parameters a kernel may have.
pub const MAX_PARAMS: usize = 96;

/// The arguments of one launch: bytes, and where each parameter starts in them.
#[derive(Clone)]
#[repr(C, align(128))]
pub struct ParamBlock {
    bytes: [u8; PARAM_BYTES],
    offsets: [u16; MAX_PARAMS],
    sizes: [u16; MAX_PARAMS],
    count: usize,
    used: usize,
}

impl std::fmt::Debug for ParamBlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ParamBlock").field("count", &self.count).field("used", &self.used).finish()
    }
}

impl Default for ParamBlock {
    fn default() -> Self {
        Self { bytes: [0; PARAM_BYTES], offsets: [0; MAX_PARAMS], sizes: [0; MAX_PARAMS], count: 0, used: 0 }
    }
}

impl ParamBlock {
    /// Appends a parameter at the next multiple of `align` (a power of two up to 128) and returns its index, or `None`
    /// when there is no room.
    pub fn push(&mut self, bytes: &[u8], align: usize) -> Option<usize> {
        let start = self.used.next_multiple_of(align);
        let end = start.checked_add(bytes.len())?;
        if end > PARAM_BYTES || self.count == MAX_PARAMS {
            return None;
        }
        self.bytes[start..end].copy_from_slice(bytes);
        self.offsets[self.count] = start as u16;
        self.sizes[self.count] = bytes.len() as u16;
        self.used = end;
        self.count += 1;
        Some(self.count - 1)
    }

    /// Overwrites parameter `index`, which must have this size.
    #[inline]
    pub fn set(&mut self, index: usize, bytes: &[u8]) {
        let start = usize::from(self.offsets[index]);
        debug_assert_eq!(usize::from(self.sizes[index]), bytes.len());
        self.bytes[start..start + bytes.len()].copy_from_slice(bytes);
    }

    /// Where the bytes start; 128-byte aligned.
    #[cfg(feature = "cuda")]
    pub fn as_ptr(&self) -> *const u8 {
        self.bytes.as_ptr()
    }

    /// The offset of each parameter from [`ParamBlock::as_ptr`].
    #[cfg(feature = "cuda")]
    pub fn offsets(&self) -> &[u16] {
        &self.offsets[..self.count]
    }

    /// Number of parameters.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The bytes of parameter `index`, to be changed.
    pub fn get_mut(&mut self, index: usize) -> &mut [u8] {
        let start = usize::from(self.offsets[index]);
        &mut self.bytes[start..start + usize::from(self.sizes[index])]
    }

    /// The bytes of parameter `index`.
    pub fn get(&self, index: usize) -> &[u8] {
        let start = usize::from(self.offsets[index]);
        &self.bytes[start..start + usize::from(self.sizes[index])]
    }
}

/// The typed error for a `CUresult` other than success.
#[cold]
pub(crate) fn result_error(call: &'static str, code: u32, name: String) -> Error {
    match code {
        // Sticky: the context is corrupt and every later call on it repeats the error.
        214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721 => Error::ContextLost { call, code, name },
        _ => Error::Driver { call, code, name },
    }
}

/// What the runtime needs from a CUDA driver. Every method that takes a context makes it current first.
///
/// # Contract for implementors and callers
/// Addresses and handles must be live and belong to the context they are used with; asynchronous operations read and
/// write their memory until the stream has passed them. Callers (`device/`, `runtime.rs`) uphold this; it is why the
/// trait is not public API.
pub trait Driver: Send + Sync {
    /// Number of devices.
    fn device_count(&self) -> Result<u32>;
    /// Facts about a device.
    fn device_info(&self, ordinal: u32) -> Result<DeviceInfo>;
    /// Retains the device's primary context, the one that PyTorch and cudarc use too.
    fn retain_context(&self, ordinal: u32) -> Result<ContextHandle>;

    /// Loads a cubin or PTX text. `image` need not be aligned or terminated. Legal during stream capture.
    fn load_module(&self, context: ContextHandle, image: &[u8]) -> Result<ModuleHandle>;
    /// Looks a kernel up and lets it use `shared_bytes` of dynamic shared memory.
    fn function(
        &self,
        context: ContextHandle,
        module: ModuleHandle,
        name: &str,
        shared_bytes: u32,
    ) -> Result<FunctionHandle>;
    /// Number of parameters; `None` when the driver cannot say (before CUDA 13.2).
    fn param_count(&self, function: FunctionHandle) -> Result<Option<usize>>;
    /// `(offset, size)` of parameter `index`, or `None` past the last. Drivers before CUDA 12.4 cannot say: `Ok(None)`
    /// for index 0.
    fn param_info(&self, function: FunctionHandle, index: usize) -> Result<Option<(usize, usize)>>;
    /// Encodes a TMA descriptor. Touches no device state, but the driver wants a context on the thread.
    fn encode_tensor_map(&self, context: ContextHandle, spec: &TensorMapSpec) -> Result<TensorMap>;
    /// Changes what descriptors the request says, and launches its kernel. Never synchronises.
    fn launch(&self, context: ContextHandle, request: &mut LaunchRequest<'_>) -> Result<()>;

    /// Stream-ordered allocation.
    fn alloc(&self, context: ContextHandle, bytes: usize, stream: StreamHandle) -> Result<u64>;
    /// Stream-ordered free.
    fn free(&self, context: ContextHandle, address: u64, stream: StreamHandle) -> Result<()>;
    /// Fills `bytes` bytes with `value`, in stream order.
    fn memset(&self, context: ContextHandle, address: u64, value: u8, bytes: usize, stream: StreamHandle)
    -> Result<()>;
    /// Copies to the device and waits until the source may be reused.
    fn copy_to_device(&self, context: ContextHandle, address: u64, data: &[u8], stream: StreamHandle) -> Result<()>;
    /// Copies to the host in stream order and waits for it.
    fn copy_to_host(&self, context: ContextHandle, data: &mut [u8], address: u64, stream: StreamHandle) -> Result<()>;

    /// A new non-blocking stream.
    fn create_stream(&self, context: ContextHandle) -> Result<StreamHandle>;
    /// Destroys a stream once its work is done. Does not wait.
    fn destroy_stream(&self, context: ContextHandle, stream: StreamHandle) -> Result<()>;
    /// Whether somebody is capturing a stream; never the legacy one.
    fn stream_is_capturing(&self, context: ContextHandle, stream: StreamHandle) -> Result<bool>;
    /// Waits for a stream.
    fn synchronize(&self, context: ContextHandle, stream: StreamHandle) -> Result<()>;

    /// A new event; `timing` makes it usable with [`Driver::elapsed_ms`].
    fn create_event(&self, context: ContextHandle, timing: bool) -> Result<EventHandle>;
    /// Destroys an event.
    fn destroy_event(&self, context: ContextHandle, event: EventHandle) -> Result<()>;
    /// Records an event on a stream.
    fn record_event(&self, context: ContextHandle, event: EventHandle, stream: StreamHandle) -> Result<()>;
    /// Makes a stream wait for an event.
    fn wait_event(&self, context: ContextHandle, stream: StreamHandle, event: EventHandle) -> Result<()>;
    /// Waits for an event on the host.
    fn synchronize_event(&self, context: ContextHandle, event: EventHandle) -> Result<()>;
    /// Milliseconds between two recorded timing events; both must have finished.
    fn elapsed_ms(&self, context: ContextHandle, start: EventHandle, end: EventHandle) -> Result<f32>;

    /// Starts capturing a stream (thread-local mode).
    fn begin_capture(&self, context: ContextHandle, stream: StreamHandle) -> Result<()>;
    /// Ends a capture and instantiates the graph; `None` when the capture was invalidated.
    fn end_capture(&self, context: ContextHandle, stream: StreamHandle) -> Result<Option<GraphHandle>>;
    /// Launches a graph.
    fn launch_graph(&self, context: ContextHandle, graph: GraphHandle, stream: StreamHandle) -> Result<()>;
    /// Destroys an instantiated graph that is not running.
    fn destroy_graph(&self, context: ContextHandle, graph: GraphHandle) -> Result<()>;
}
