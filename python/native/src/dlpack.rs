//! DLPack's C exchange table: how a tensor of another library is read without its headers, in tens of nanoseconds.
//!
//! The structs are those of `dlpack.h` 1.3. A table of the same major version has them at the same offsets.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::NonNull;

use flashcore::{DType, Device};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods};

use crate::errors::{Failure, Result, invalid};
use crate::operand::{Operand, Role};

const CAPSULE: &CStr = c"dlpack_exchange_api";
const MAJOR: u32 = 1;
const CPU: i32 = 1;
const CUDA: i32 = 2;
const CUDA_HOST: i32 = 3;

#[repr(C)]
struct DLTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

#[repr(C)]
struct DLManagedTensorVersioned {
    version: [u32; 2],
    manager_ctx: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
    flags: u64,
    tensor: DLTensor,
}

#[repr(C)]
struct Table {
    version: [u32; 2],
    previous: *const Table,
    allocate: *const c_void,
    managed_from_object: unsafe extern "C" fn(*mut c_void, *mut *mut DLManagedTensorVersioned) -> c_int,
    managed_to_object: *const c_void,
    /// Null where the producer has no such function.
    tensor_from_object: Option<unsafe extern "C" fn(*mut c_void, *mut DLTensor) -> c_int>,
    current_work_stream: unsafe extern "C" fn(c_int, i32, *mut *mut c_void) -> c_int,
}

/// The exchange functions of one tensor type.
#[derive(Clone, Copy)]
pub(crate) struct Exchange(&'static Table);

// SAFETY: the table is a constant of the library that published it, and its functions may be called from any thread
// that holds the GIL.
unsafe impl Send for Exchange {}
// SAFETY: as above.
unsafe impl Sync for Exchange {}

impl Exchange {
    /// The table that a type publishes; `None` when it has none that can be read here.
    pub(crate) fn of(tensor_type: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        let Some(capsule) = tensor_type.getattr_opt("__dlpack_c_exchange_api__")? else { return Ok(None) };
        let mut table =
            capsule.cast::<PyCapsule>()?.pointer_checked(Some(CAPSULE))?.as_ptr().cast::<Table>().cast_const();
        // SAFETY: a capsule of this name holds a `DLPackExchangeAPI` that lives as long as the process. Version and
        // `previous` are its header, which stays the same in all versions; `previous` is null or such a table.
        unsafe {
            while !table.is_null() && (*table).version[0] > MAJOR {
                table = (*table).previous;
            }
            let Some(table) = table.as_ref() else { return Ok(None) };
            Ok((table.version[0] == MAJOR && table.tensor_from_object.is_some()).then_some(Self(table)))
        }
    }

    /// Reads a tensor without taking part in its ownership.
    ///
    /// # Safety
    /// `object` is of the type that published this table, or of a subclass.
    #[inline]
    pub(crate) unsafe fn read(self, role: &'static Role, object: &Bound<'_, PyAny>) -> Result<Operand> {
        let mut tensor = std::mem::MaybeUninit::<DLTensor>::uninit();
        let Some(function) = self.0.tensor_from_object else { return Err(unreadable(role, "no reader")) };
        // SAFETY: the object is of the table's type (the caller's promise), and `tensor` has room for the result.
        let status = unsafe { function(object.as_ptr().cast(), tensor.as_mut_ptr()) };
        if status != 0 {
            return Err(refused(role, object.py()));
        }
        // SAFETY: the function succeeded, so it filled the struct; `object` keeps shape and strides alive meanwhile.
        unsafe { describe(role, tensor.assume_init_ref()) }
    }

    /// Reads a tensor and shares the ownership of its memory.
    ///
    /// # Safety
    /// As [`Exchange::read`].
    pub(crate) unsafe fn share(self, role: &'static Role, object: &Bound<'_, PyAny>) -> Result<(Operand, Shared)> {
        let mut managed = std::ptr::null_mut();
        // SAFETY: the object is of the table's type (the caller's promise), and `managed` has room for the result.
        let status = unsafe { (self.0.managed_from_object)(object.as_ptr().cast(), &mut managed) };
        let Some(managed) = NonNull::new(managed).filter(|_| status == 0) else {
            return Err(refused(role, object.py()));
        };
        let shared = Shared(managed);
        // SAFETY: the function succeeded, so this is a live managed tensor, and ours. Its version precedes everything
        // that another major version may have moved.
        let tensor = unsafe {
            if (*managed.as_ptr()).version[0] != MAJOR {
                return Err(unreadable(role, "another DLPack version"));
            }
            &(*managed.as_ptr()).tensor
        };
        // SAFETY: shape and strides live as long as `shared`.
        Ok((unsafe { describe(role, tensor) }?, shared))
    }

    /// The library's current stream on a CUDA device.
    pub(crate) fn current_stream(self, py: Python<'_>, ordinal: u32) -> PyResult<u64> {
        let mut stream = std::ptr::null_mut();
        // SAFETY: `stream` has room for the result; the GIL is held.
        let status = unsafe { (self.0.current_work_stream)(CUDA, ordinal as i32, &mut stream) };
        if status == 0 { Ok(stream.addr() as u64) } else { Err(PyErr::fetch(py)) }
    }
}

/// A share in the ownership of a tensor's memory.
pub(crate) struct Shared(NonNull<DLManagedTensorVersioned>);

// SAFETY: the deleter may be called from any thread (DLPack asks producers for that); nothing else is reachable.
unsafe impl Send for Shared {}
// SAFETY: as above; a shared reference gives no access.
unsafe impl Sync for Shared {}

impl Drop for Shared {
    fn drop(&mut self) {
        let managed = self.0.as_ptr();
        // SAFETY: the producer gave us this tensor to delete once, and the deleter lies before anything that versions
        // may move.
        unsafe {
            if let Some(deleter) = (*managed).deleter {
                deleter(managed);
            }
        }
    }
}

/// Copies a description out.
///
/// # Safety
/// `tensor` was filled by its producer, and its shape and strides are alive.
#[inline]
unsafe fn describe(role: &'static Role, tensor: &DLTensor) -> Result<Operand> {
    let device = match tensor.device_type {
        CPU | CUDA_HOST => Device::Cpu,
        CUDA => Device::Cuda(tensor.device_id.unsigned_abs()),
        other => {
            let given = format!("DLPack device type {other}");
            return Err(Failure::Unreadable(invalid(role.name, given, "cpu or cuda")));
        }
    };
    let Some(dtype) = dtype(tensor.code, tensor.bits, tensor.lanes) else {
        let given = dtype_name(tensor.code, tensor.bits);
        return Err(crate::operand::bad_dtype(role, &given));
    };
    let rank = tensor.ndim.unsigned_abs() as usize;
    // SAFETY: the producer's shape has `ndim` sizes (the caller's promise).
    let shape = unsafe { list(tensor.shape, rank) };
    // SAFETY: so have its strides, which are never null from DLPack 1.2 on; before, null meant row-major.
    let strides = unsafe { list(tensor.strides, rank) };
    if strides.len() != shape.len() {
        return Err(unreadable(role, "no strides"));
    }
    let address = (tensor.data.addr() as u64).wrapping_add(tensor.byte_offset);
    Ok(Operand::new(role, device, address, dtype, shape, strides)?)
}

/// # Safety
/// `start` is null or points to `len` numbers that live during `'a`.
unsafe fn list<'a>(start: *const i64, len: usize) -> &'a [i64] {
    match start.is_null() {
        true => &[],
        // SAFETY: the caller's promise.
        false => unsafe { std::slice::from_raw_parts(start, len) },
    }
}

fn dtype(code: u8, bits: u8, lanes: u16) -> Option<DType> {
    match (code, bits, lanes) {
        (2, 16, 1) => Some(DType::F16),
        (4, 16, 1) => Some(DType::BF16),
        (2, 32, 1) => Some(DType::F32),
        (2, 64, 1) => Some(DType::F64),
        (6, 8, 1) => Some(DType::Bool),
        _ => None,
    }
}

fn dtype_name(code: u8, bits: u8) -> String {
    const KINDS: [&str; 7] = ["int", "uint", "float", "opaque", "bfloat", "complex", "bool"];
    let kind = KINDS.get(usize::from(code)).copied().unwrap_or("float8 or narrower, ");
    format!("{kind}{bits}")
}

fn unreadable(role: &'static Role, why: &str) -> Failure {
    let given = format!("a tensor that DLPack cannot describe ({why})");
    Failure::Unreadable(invalid(role.name, given, "a dense tensor on cpu or cuda"))
}

/// The exception that a producer raised, in our words.
fn refused(role: &'static Role, py: Python<'_>) -> Failure {
    let message = PyErr::fetch(py).value(py).to_string();
    unreadable(role, message.lines().next().unwrap_or_default())
}
