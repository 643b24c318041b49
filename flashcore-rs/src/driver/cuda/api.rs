//! The functions of libcuda that FlashCore calls, resolved once.
//!
//! Types come from `cudarc::driver::sys`, with one exception: results are read as `u32`. The driver may return a code
//! newer than the bindings, and reading an unknown value as their Rust enum would be undefined behaviour.

use std::error::Error as _;
use std::ffi::{c_char, c_int, c_uint, c_void};

use cudarc::driver::sys;
use libloading::Library;

use crate::driver::result_error;
use crate::error::{Error, Result};

macro_rules! api {
    ($(fn $field:ident = $symbol:literal ($($arg:ty),* $(,)?);)*) => {
        /// Entry points of the driver library, which stays loaded for the life of the process.
        pub(super) struct Api {
            $(pub(super) $field: unsafe extern "C" fn($($arg),*) -> u32,)*
            /// CUDA 12.4 and newer.
            pub(super) func_get_param_info: Option<unsafe extern "C" fn(sys::CUfunction, usize, *mut usize, *mut usize) -> u32>,
            /// CUDA 13.2 and newer.
            pub(super) func_get_param_count: Option<unsafe extern "C" fn(sys::CUfunction, *mut usize) -> u32>,
        }

        impl Api {
            fn resolve(library: &'static Library) -> Result<Self> {
                Ok(Self {
                    // SAFETY: each symbol is looked up with the type that cuda.h documents for that name, except that
                    // `CUresult`, a C enum, is read as the u32 it is represented by.
                    $($field: unsafe {
                        *library.get(concat!($symbol, "\0").as_bytes()).map_err(|_| missing($symbol))?
                    },)*
                    // SAFETY: as above; absent before CUDA 12.4.
                    func_get_param_info: unsafe { library.get(b"cuFuncGetParamInfo\0").ok().map(|f| *f) },
                    // SAFETY: as above; absent before CUDA 13.2.
                    func_get_param_count: unsafe { library.get(b"cuFuncGetParamCount\0").ok().map(|f| *f) },
                })
            }
        }
    };
}

api! {
    fn init = "cuInit"(c_uint);
    fn driver_get_version = "cuDriverGetVersion"(*mut c_int);
    fn get_error_name = "cuGetErrorName"(u32, *mut *const c_char);
    fn device_get_count = "cuDeviceGetCount"(*mut c_int);
    fn device_get = "cuDeviceGet"(*mut sys::CUdevice, c_int);
    fn device_get_name = "cuDeviceGetName"(*mut c_char, c_int, sys::CUdevice);
    fn device_get_attribute = "cuDeviceGetAttribute"(*mut c_int, c_uint, sys::CUdevice);
    fn device_total_mem = "cuDeviceTotalMem_v2"(*mut usize, sys::CUdevice);
    fn primary_ctx_retain = "cuDevicePrimaryCtxRetain"(*mut sys::CUcontext, sys::CUdevice);
    fn ctx_get_current = "cuCtxGetCurrent"(*mut sys::CUcontext);
    fn ctx_set_current = "cuCtxSetCurrent"(sys::CUcontext);
    fn module_load_data = "cuModuleLoadData"(*mut sys::CUmodule, *const c_void);
    fn module_get_function = "cuModuleGetFunction"(*mut sys::CUfunction, sys::CUmodule, *const c_char);
    fn func_set_attribute = "cuFuncSetAttribute"(sys::CUfunction, c_uint, c_int);
    fn launch_kernel_ex = "cuLaunchKernelEx"(*const sys::CUlaunchConfig, sys::CUfunction, *mut *mut c_void, *mut *mut c_void);
    fn tensor_map_encode_tiled = "cuTensorMapEncodeTiled"(
        *mut c_void, c_uint, c_uint, *mut c_void, *const u64, *const u64, *const u32, *const u32, c_uint, c_uint, c_uint, c_uint,
    );
    fn tensor_map_replace_address = "cuTensorMapReplaceAddress"(*mut c_void, *mut c_void);
    fn mem_alloc_async = "cuMemAllocAsync"(*mut sys::CUdeviceptr, usize, sys::CUstream);
    fn mem_free_async = "cuMemFreeAsync"(sys::CUdeviceptr, sys::CUstream);
    fn memset_d8_async = "cuMemsetD8Async"(sys::CUdeviceptr, u8, usize, sys::CUstream);
    fn memcpy_htod_async = "cuMemcpyHtoDAsync_v2"(sys::CUdeviceptr, *const c_void, usize, sys::CUstream);
    fn memcpy_dtoh_async = "cuMemcpyDtoHAsync_v2"(*mut c_void, sys::CUdeviceptr, usize, sys::CUstream);
    fn stream_create = "cuStreamCreate"(*mut sys::CUstream, c_uint);
    fn stream_destroy = "cuStreamDestroy_v2"(sys::CUstream);
    fn stream_is_capturing = "cuStreamIsCapturing"(sys::CUstream, *mut c_uint);
    fn stream_synchronize = "cuStreamSynchronize"(sys::CUstream);
    fn stream_wait_event = "cuStreamWaitEvent"(sys::CUstream, sys::CUevent, c_uint);
    fn stream_begin_capture = "cuStreamBeginCapture_v2"(sys::CUstream, c_uint);
    fn stream_end_capture = "cuStreamEndCapture"(sys::CUstream, *mut sys::CUgraph);
    fn thread_exchange_capture_mode = "cuThreadExchangeStreamCaptureMode"(*mut c_uint);
    fn graph_instantiate = "cuGraphInstantiateWithFlags"(*mut sys::CUgraphExec, sys::CUgraph, u64);
    fn graph_destroy = "cuGraphDestroy"(sys::CUgraph);
    fn graph_launch = "cuGraphLaunch"(sys::CUgraphExec, sys::CUstream);
    fn graph_exec_destroy = "cuGraphExecDestroy"(sys::CUgraphExec);
    fn event_create = "cuEventCreate"(*mut sys::CUevent, c_uint);
    fn event_destroy = "cuEventDestroy_v2"(sys::CUevent);
    fn event_record = "cuEventRecord"(sys::CUevent, sys::CUstream);
    fn event_synchronize = "cuEventSynchronize"(sys::CUevent);
    fn event_elapsed = "cuEventElapsedTime"(*mut f32, sys::CUevent, sys::CUevent);
}

fn missing(symbol: &str) -> Error {
    Error::DriverTooOld { detail: format!("the driver library has no {symbol}"), needed: "12.0" }
}

/// Names under which the driver library is installed, in the order tried.
const LIBRARY_NAMES: [&str; 3] = ["libcuda.so.1", "libcuda.so", "nvcuda.dll"];

impl Api {
    /// Loads the driver library by the first of `names` that opens, and initialises it.
    pub(super) fn load(names: &[&str]) -> Result<Self> {
        let mut tried = Vec::new();
        for name in names {
            // SAFETY: libcuda's initialisers have no preconditions; it is the vendor's driver by its installed name.
            match unsafe { Library::new(*name) } {
                // Leaked on purpose: contexts and modules outlive every owner we could give the library.
                Ok(library) => return Self::resolve(Box::leak(Box::new(library)))?.initialised(),
                // The loader's own words are the source of the error.
                Err(error) => tried.push(error.source().map_or_else(|| error.to_string(), ToString::to_string)),
            }
        }
        Err(Error::DriverNotFound { detail: tried.join("; ") })
    }

    /// Loads the installed driver.
    pub(super) fn load_default() -> Result<Self> {
        Self::load(&LIBRARY_NAMES)
    }

    fn initialised(self) -> Result<Self> {
        const NO_DEVICE: u32 = 100;
        // SAFETY: flags must be 0, and are.
        match unsafe { (self.init)(0) } {
            0 => Ok(self),
            NO_DEVICE => Err(Error::NoDevice { ordinal: 0, count: 0 }),
            code => Err(self.error("cuInit", code)),
        }
    }

    /// The typed error for a driver result that is not success.
    #[cold]
    pub(super) fn error(&self, call: &'static str, code: u32) -> Error {
        result_error(call, code, self.error_name(code))
    }

    fn error_name(&self, code: u32) -> String {
        let mut name = std::ptr::null();
        // SAFETY: `name` is a valid place for a pointer; for unknown codes the driver stores null.
        unsafe { (self.get_error_name)(code, &mut name) };
        if name.is_null() {
            return format!("CUresult {code}");
        }
        // SAFETY: a non-null name is a static NUL-terminated string of the driver.
        unsafe { std::ffi::CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_a_typed_error() {
        let error = Api::load(&["libcuda-that-is-not-there.so.1"]).err();
        assert!(matches!(error, Some(Error::DriverNotFound { .. })), "{error:?}");
    }

    #[test]
    fn a_library_without_the_symbols_is_too_old() {
        let error = Api::load(&["libc.so.6"]).err();
        assert!(matches!(error, Some(Error::DriverTooOld { .. })), "{error:?}");
    }
}
