//! The real driver.

mod api;

use std::ffi::{CString, c_int, c_uint, c_void};
use std::mem::MaybeUninit;

use cudarc::driver::sys;

use self::api::Api;
use super::{
    ContextHandle, DeviceInfo, Driver, EventHandle, FunctionHandle, GraphHandle, LaunchRequest, MAX_PARAMS, MapChange,
    ModuleHandle, StreamHandle, TensorMap, TensorMapSpec,
};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// The installed CUDA driver.
pub(crate) struct CudaDriver {
    api: Api,
}

/// Calls a driver function and turns its result into ours.
macro_rules! cu {
    ($driver:expr, $field:ident($($arg:expr),* $(,)?), $name:literal) => {{
        // SAFETY: stated at each use.
        let code = unsafe { ($driver.api.$field)($($arg),*) };
        if code == 0 { Ok(()) } else { Err($driver.api.error($name, code)) }
    }};
}

const OUT_OF_MEMORY: u32 = 2;
const STREAM_NON_BLOCKING: c_uint = 1;
const EVENT_DISABLE_TIMING: c_uint = 2;
const CAPTURE_MODE_THREAD_LOCAL: c_uint = 1;
const CAPTURE_MODE_RELAXED: c_uint = 2;
const FUNC_MAX_DYNAMIC_SHARED: c_uint = 8;
const DEVICE_ATTR_SM_COUNT: c_uint = 16;
const DEVICE_ATTR_L2_BYTES: c_uint = 38;
const DEVICE_ATTR_CC_MAJOR: c_uint = 75;
const DEVICE_ATTR_CC_MINOR: c_uint = 76;
const DEVICE_ATTR_SHARED_OPTIN: c_uint = 97;

impl CudaDriver {
    /// Loads and initialises the installed driver.
    pub(crate) fn load() -> Result<Self> {
        Ok(Self { api: Api::load_default()? })
    }

    /// Makes `context` current for this thread until the guard drops. Reading the current one first is cheaper than
    /// setting it, and restoring another library's choice keeps its idea of the current device true.
    fn bind(&self, context: ContextHandle) -> Result<Bound<'_>> {
        let wanted = context.0 as sys::CUcontext;
        let mut current = std::ptr::null_mut();
        // SAFETY: `current` is a valid place for a context.
        cu!(self, ctx_get_current(&mut current), "cuCtxGetCurrent")?;
        if current == wanted {
            return Ok(Bound { driver: self, restore: std::ptr::null_mut() });
        }
        // SAFETY: a `ContextHandle` comes from `retain_context` and is never released.
        cu!(self, ctx_set_current(wanted), "cuCtxSetCurrent")?;
        Ok(Bound { driver: self, restore: current })
    }

    fn device(&self, ordinal: u32) -> Result<sys::CUdevice> {
        let count = self.device_count()?;
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, count });
        }
        let mut device = 0;
        // SAFETY: `device` is a valid place, the ordinal is in range.
        cu!(self, device_get(&mut device, ordinal as c_int), "cuDeviceGet")?;
        Ok(device)
    }

    fn attribute(&self, device: sys::CUdevice, attribute: c_uint) -> Result<u32> {
        let mut value = 0;
        // SAFETY: `value` is a valid place; the attribute numbers are from cuda.h and exist in every supported driver.
        cu!(self, device_get_attribute(&mut value, attribute, device), "cuDeviceGetAttribute")?;
        Ok(value.unsigned_abs())
    }

    /// Encodes a descriptor; some context is current.
    fn encode(&self, spec: &TensorMapSpec) -> Result<TensorMap> {
        const TYPE_FLOAT16: c_uint = 6;
        const TYPE_BFLOAT16: c_uint = 9;
        const L2_PROMOTION_128B: c_uint = 2;
        let dtype = if spec.dtype == DType::BF16 { TYPE_BFLOAT16 } else { TYPE_FLOAT16 };
        let swizzle = match spec.swizzle {
            0 => 0,
            32 => 1,
            64 => 2,
            _ => 3,
        };
        let mut map = TensorMap([0; 128]);
        let element_strides = [1u32; 4];
        // SAFETY: `map` is 128 bytes, 128-byte aligned; the four arrays have the rank's length (strides one less). The
        // driver validates the values and does not dereference the address.
        cu!(
            self,
            tensor_map_encode_tiled(
                (&raw mut map).cast(),
                dtype,
                4,
                spec.address as *mut c_void,
                spec.dims.as_ptr(),
                spec.strides.as_ptr(),
                spec.box_dims.as_ptr(),
                element_strides.as_ptr(),
                0,
                swizzle,
                L2_PROMOTION_128B,
                0,
            ),
            "cuTensorMapEncodeTiled"
        )?;
        Ok(map)
    }

    /// Moves an encoded descriptor to another address; some context is current.
    fn move_map(&self, map: &mut [u8], address: u64) -> Result<()> {
        debug_assert_eq!(map.len(), size_of::<TensorMap>());
        // SAFETY: `map` is a descriptor that `encode` made, at a multiple of its size in a block that is aligned to it.
        // The driver validates the address and does not dereference it.
        cu!(
            self,
            tensor_map_replace_address(map.as_mut_ptr().cast(), address as *mut c_void),
            "cuTensorMapReplaceAddress"
        )
    }

    /// Runs `body` with the thread's capture mode relaxed, so that loading a module is legal while some stream captures.
    fn with_relaxed_capture<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut mode = CAPTURE_MODE_RELAXED;
        // SAFETY: `mode` is a valid place holding a valid mode; the driver swaps it with the thread's.
        cu!(self, thread_exchange_capture_mode(&mut mode), "cuThreadExchangeStreamCaptureMode")?;
        let result = body();
        // SAFETY: as above; `mode` now holds what the thread had.
        cu!(self, thread_exchange_capture_mode(&mut mode), "cuThreadExchangeStreamCaptureMode")?;
        result
    }
}

/// Restores the thread's context when another one was current.
struct Bound<'a> {
    driver: &'a CudaDriver,
    restore: sys::CUcontext,
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        if !self.restore.is_null() {
            // SAFETY: the context was current on this thread when the guard was made.
            unsafe { (self.driver.api.ctx_set_current)(self.restore) };
        }
    }
}

impl Driver for CudaDriver {
    fn device_count(&self) -> Result<u32> {
        let mut count = 0;
        // SAFETY: `count` is a valid place.
        cu!(self, device_get_count(&mut count), "cuDeviceGetCount")?;
        Ok(count.unsigned_abs())
    }

    fn device_info(&self, ordinal: u32) -> Result<DeviceInfo> {
        let device = self.device(ordinal)?;
        let mut name = [0u8; 256];
        // SAFETY: `name` has room for 255 characters and a terminator.
        cu!(self, device_get_name(name.as_mut_ptr().cast(), 256, device), "cuDeviceGetName")?;
        let mut total_memory = 0;
        // SAFETY: `total_memory` is a valid place.
        cu!(self, device_total_mem(&mut total_memory, device), "cuDeviceTotalMem_v2")?;
        let mut driver_version = 0;
        // SAFETY: `driver_version` is a valid place.
        cu!(self, driver_get_version(&mut driver_version), "cuDriverGetVersion")?;
        Ok(DeviceInfo {
            ordinal,
            name: String::from_utf8_lossy(name.split(|&b| b == 0).next().unwrap_or_default()).into_owned(),
            compute_capability: (
                self.attribute(device, DEVICE_ATTR_CC_MAJOR)?,
                self.attribute(device, DEVICE_ATTR_CC_MINOR)?,
            ),
            sm_count: self.attribute(device, DEVICE_ATTR_SM_COUNT)?,
            shared_bytes_optin: self.attribute(device, DEVICE_ATTR_SHARED_OPTIN)?,
            total_memory,
            l2_bytes: self.attribute(device, DEVICE_ATTR_L2_BYTES)?,
            driver_version: driver_version.unsigned_abs(),
        })
    }

    fn retain_context(&self, ordinal: u32) -> Result<ContextHandle> {
        let device = self.device(ordinal)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: `context` is a valid place. The reference is never released: buffers and modules may outlive any
        // owner, and the primary context ends with the process.
        cu!(self, primary_ctx_retain(&mut context, device), "cuDevicePrimaryCtxRetain")?;
        Ok(ContextHandle(context as u64))
    }

    fn load_module(&self, context: ContextHandle, image: &[u8]) -> Result<ModuleHandle> {
        let _bound = self.bind(context)?;
        // The driver wants a NUL after PTX text and reads cubins in words: copy to an aligned, terminated buffer.
        let mut words = vec![0u64; image.len() / 8 + 2];
        for (word, chunk) in words.iter_mut().zip(image.chunks(8)) {
            let mut bytes = [0u8; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_ne_bytes(bytes);
        }
        let mut module = std::ptr::null_mut();
        self.with_relaxed_capture(|| {
            // SAFETY: `words` holds the image, aligned and NUL-terminated; the driver copies what it needs.
            cu!(self, module_load_data(&mut module, words.as_ptr().cast()), "cuModuleLoadData")
        })?;
        Ok(ModuleHandle(module as u64))
    }

    fn function(
        &self,
        context: ContextHandle,
        module: ModuleHandle,
        name: &str,
        shared_bytes: u32,
    ) -> Result<FunctionHandle> {
        let _bound = self.bind(context)?;
        let name = CString::new(name).map_err(|_| Error::invalid("kernel name", name, "a name without NUL"))?;
        let mut function = std::ptr::null_mut();
        self.with_relaxed_capture(|| {
            // SAFETY: the module is loaded and never unloaded; `name` is NUL-terminated.
            cu!(
                self,
                module_get_function(&mut function, module.0 as sys::CUmodule, name.as_ptr()),
                "cuModuleGetFunction"
            )?;
            // SAFETY: `function` was just returned by the driver.
            cu!(
                self,
                func_set_attribute(function, FUNC_MAX_DYNAMIC_SHARED, shared_bytes as c_int),
                "cuFuncSetAttribute"
            )
        })?;
        Ok(FunctionHandle(function as u64))
    }

    fn param_count(&self, function: FunctionHandle) -> Result<Option<usize>> {
        let Some(get) = self.api.func_get_param_count else { return Ok(None) };
        let mut count = 0;
        // SAFETY: the function is loaded; `count` is a valid place.
        match unsafe { get(function.0 as sys::CUfunction, &mut count) } {
            0 => Ok(Some(count)),
            code => Err(self.api.error("cuFuncGetParamCount", code)),
        }
    }

    fn param_info(&self, function: FunctionHandle, index: usize) -> Result<Option<(usize, usize)>> {
        const INVALID_VALUE: u32 = 1;
        let Some(get) = self.api.func_get_param_info else { return Ok(None) };
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function is loaded; both places are valid.
        match unsafe { get(function.0 as sys::CUfunction, index, &mut offset, &mut size) } {
            0 => Ok(Some((offset, size))),
            INVALID_VALUE => Ok(None),
            code => Err(self.api.error("cuFuncGetParamInfo", code)),
        }
    }

    fn encode_tensor_map(&self, context: ContextHandle, spec: &TensorMapSpec) -> Result<TensorMap> {
        let _bound = self.bind(context)?;
        self.encode(spec)
    }

    fn launch(&self, context: ContextHandle, request: &mut LaunchRequest<'_>) -> Result<()> {
        let _bound = self.bind(context)?;
        for (index, change) in request.tensor_maps {
            match change {
                MapChange::New(spec) => request.params.set(*index, &self.encode(spec)?.0),
                MapChange::Moved(address) => self.move_map(request.params.get_mut(*index), *address)?,
            }
        }
        let params = &*request.params;
        let base = params.as_ptr();
        let mut pointers = [const { MaybeUninit::<*mut c_void>::uninit() }; MAX_PARAMS];
        for (pointer, offset) in pointers.iter_mut().zip(params.offsets()) {
            pointer.write(base.wrapping_add(usize::from(*offset)).cast_mut().cast());
        }
        let mut attribute = MaybeUninit::<sys::CUlaunchAttribute>::zeroed();
        let mut attributes = 0;
        if request.cluster > 1 {
            let attribute = attribute.as_mut_ptr();
            // SAFETY: the struct is plain data; the id selects the `clusterDim` member of the union written here.
            unsafe {
                (*attribute).id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
                (*attribute).value.clusterDim.x = request.cluster;
                (*attribute).value.clusterDim.y = 1;
                (*attribute).value.clusterDim.z = 1;
            }
            attributes = 1;
        }
        let config = sys::CUlaunchConfig {
            gridDimX: request.grid[0],
            gridDimY: request.grid[1],
            gridDimZ: request.grid[2],
            blockDimX: request.block_threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: request.shared_bytes,
            hStream: request.stream.0 as sys::CUstream,
            attrs: attribute.as_mut_ptr(),
            numAttrs: attributes,
        };
        // SAFETY: the function is loaded in the bound context. `pointers` has one entry per parameter, in order, into
        // `params` (the driver reads as many as the code has parameters, and no more), which outlives the call (the
        // driver copies arguments before it returns); count and sizes were checked against the code when it was loaded.
        // What the arguments point to is the caller's contract.
        cu!(
            self,
            launch_kernel_ex(
                &config,
                request.function.0 as sys::CUfunction,
                pointers.as_mut_ptr().cast(),
                std::ptr::null_mut()
            ),
            "cuLaunchKernelEx"
        )
    }

    fn alloc(&self, context: ContextHandle, bytes: usize, stream: StreamHandle) -> Result<u64> {
        let _bound = self.bind(context)?;
        let mut address = 0;
        // SAFETY: `address` is a valid place, the stream is live.
        let code = unsafe { (self.api.mem_alloc_async)(&mut address, bytes, stream.0 as sys::CUstream) };
        match code {
            0 => Ok(address),
            OUT_OF_MEMORY => Err(Error::OutOfMemory { requested: bytes }),
            code => Err(self.api.error("cuMemAllocAsync", code)),
        }
    }

    fn free(&self, context: ContextHandle, address: u64, stream: StreamHandle) -> Result<()> {
        let _bound = self.bind(context)?;
        // SAFETY: the address came from `alloc`, is freed once, and all its uses precede this point of the stream.
        cu!(self, mem_free_async(address, stream.0 as sys::CUstream), "cuMemFreeAsync")
    }

    fn memset(
        &self,
        context: ContextHandle,
        address: u64,
        value: u8,
        bytes: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        let _bound = self.bind(context)?;
        // SAFETY: `bytes` bytes at `address` belong to a live allocation.
        cu!(self, memset_d8_async(address, value, bytes, stream.0 as sys::CUstream), "cuMemsetD8Async")
    }

    fn copy_to_device(&self, context: ContextHandle, address: u64, data: &[u8], stream: StreamHandle) -> Result<()> {
        let _bound = self.bind(context)?;
        // SAFETY: the destination is a live allocation of at least `data.len()` bytes. The source is borrowed until the
        // synchronisation below returns.
        cu!(
            self,
            memcpy_htod_async(address, data.as_ptr().cast(), data.len(), stream.0 as sys::CUstream),
            "cuMemcpyHtoDAsync_v2"
        )?;
        self.synchronize(context, stream)
    }

    fn copy_to_host(&self, context: ContextHandle, data: &mut [u8], address: u64, stream: StreamHandle) -> Result<()> {
        let _bound = self.bind(context)?;
        // SAFETY: the source is a live allocation of at least `data.len()` bytes. The destination is borrowed until the
        // synchronisation below returns.
        cu!(
            self,
            memcpy_dtoh_async(data.as_mut_ptr().cast(), address, data.len(), stream.0 as sys::CUstream),
            "cuMemcpyDtoHAsync_v2"
        )?;
        self.synchronize(context, stream)
    }

    fn create_stream(&self, context: ContextHandle) -> Result<StreamHandle> {
        let _bound = self.bind(context)?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: `stream` is a valid place.
        cu!(self, stream_create(&mut stream, STREAM_NON_BLOCKING), "cuStreamCreate")?;
        Ok(StreamHandle(stream as u64))
    }

    fn destroy_stream(&self, context: ContextHandle, stream: StreamHandle) -> Result<()> {
        let _bound = self.bind(context)?;
        // SAFETY: the stream came from `create_stream` and is destroyed once; its pending work still completes.
        cu!(self, stream_destroy(stream.0 as sys::CUstream), "cuStreamDestroy_v2")
    }

    fn stream_is_capturing(&self, context: ContextHandle, stream: StreamHandle) -> Result<bool> {
        if stream == StreamHandle::default() {
            return Ok(false);
        }
        let _bound = self.bind(context)?;
        let mut status = 0;
        // SAFETY: the stream is live; `status` is a valid place for the C enum.
        cu!(self, stream_is_capturing(stream.0 as sys::CUstream, &mut status), "cuStreamIsCapturing")?;
        Ok(status != 0)
    }

    fn synchronize(&self, context: ContextHandle, stream: StreamHandle) -> Result<()> {
        let _bound = self.bind(context)?;
        // SAFETY: the stream is live.
        cu!(self, stream_synchronize(stream.0 as sys::CUstream), "cuStreamSynchronize")
    }

    fn create_event(&self, context: ContextHandle, timing: bool) -> Result<EventHandle> {
        let _bound = self.bind(context)?;
        let mut event = std::ptr::null_mut();
        let flags = if timing { 0 } else { EVENT_DISABLE_TIMING };
        // SAFETY: `event` is a valid place.
        cu!(self, event_create(&mut event, flags), "cuEventCreate")?;
        Ok(EventHandle(event as u64))
    }

    fn destroy_event(&self, context: ContextHandle, event: EventHandle) -> Result<()> {
        let _bound = self.bind(context)?;
        // SAFETY: the event came from `create_event` and is destroyed once; pending waits on it still complete.
        cu!(self, event_destroy(event.0 as sys::CUevent), "cuEventDestroy_v2")
    }

    fn record_event(&self, context: ContextHandle, event: EventHandle, stream: StreamHandle) -> Result<()> {
        let _bound = self.bind(context)?;
        // SAFETY: event and stream are live and of this context.
        cu!(self, event_record(event.0 as sys::CUevent, stream.0 as sys::CUstream), "cuEventRecord")
    }

    fn wait_event(&self, context: ContextHandle, stream: StreamHandle, event: EventHandle) -> Result<()> {
        let _bound = self.bind(context)?;
        // SAFETY: event and stream are live.
        cu!(self, stream_wait_event(stream.0 as sys::CUstream, event.0 as sys::CUevent, 0), "cuStreamWaitEvent")
    }

    fn synchronize_event(&self, context: ContextHandle, event: EventHandle) -> Result<()> {
        let _bound = self.bind(context)?;
        // SAFETY: the event is live.
        cu!(self, event_synchronize(event.0 as sys::CUevent), "cuEventSynchronize")
    }

    fn elapsed_ms(&self, context: ContextHandle, start: EventHandle, end: EventHandle) -> Result<f32> {
        let _bound = self.bind(context)?;
        let mut ms = 0.0;
        // SAFETY: both events are live timing events; `ms` is a valid place.
        cu!(self, event_elapsed(&mut ms, start.0 as sys::CUevent, end.0 as sys::CUevent), "cuEventElapsedTime")?;
        Ok(ms)
    }

    fn begin_capture(&self, context: ContextHandle, stream: StreamHandle) -> Result<()> {
        let _bound = self.bind(context)?;
        // SAFETY: the stream is live and not the legacy stream (checked by the caller; the driver refuses it).
        cu!(self, stream_begin_capture(stream.0 as sys::CUstream, CAPTURE_MODE_THREAD_LOCAL), "cuStreamBeginCapture_v2")
    }

    fn end_capture(&self, context: ContextHandle, stream: StreamHandle) -> Result<Option<GraphHandle>> {
        let _bound = self.bind(context)?;
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream is live; `graph` is a valid place.
        cu!(self, stream_end_capture(stream.0 as sys::CUstream, &mut graph), "cuStreamEndCapture")?;
        if graph.is_null() {
            return Ok(None);
        }
        let mut exec = std::ptr::null_mut();
        // SAFETY: `graph` was just returned; `exec` is a valid place.
        let result = cu!(self, graph_instantiate(&mut exec, graph, 0), "cuGraphInstantiateWithFlags");
        // SAFETY: an instantiated graph does not need its template; destroyed once.
        cu!(self, graph_destroy(graph), "cuGraphDestroy")?;
        result.map(|()| Some(GraphHandle(exec as u64)))
    }

    fn launch_graph(&self, context: ContextHandle, graph: GraphHandle, stream: StreamHandle) -> Result<()> {
        let _bound = self.bind(context)?;
        // SAFETY: graph and stream are live; the memory the graph uses is kept alive by its owner.
        cu!(self, graph_launch(graph.0 as sys::CUgraphExec, stream.0 as sys::CUstream), "cuGraphLaunch")
    }

    fn destroy_graph(&self, context: ContextHandle, graph: GraphHandle) -> Result<()> {
        let _bound = self.bind(context)?;
        // SAFETY: the graph came from `end_capture`, is not running (its owner waited), and is destroyed once.
        cu!(self, graph_exec_destroy(graph.0 as sys::CUgraphExec), "cuGraphExecDestroy")
    }
}
