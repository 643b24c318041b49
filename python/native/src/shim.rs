//! The C functions that libtorch exports, found at run time.
//!
//! Nothing is linked: the program has already loaded libtorch, and its stable C interface has been the same since 2.10.
//! So one build serves every torch from there on. [`SYMBOLS`] is the list that tests compare with the installed torch.

use std::ffi::{CStr, CString, c_char, c_void};
use std::marker::PhantomData;
use std::ptr;
use std::sync::OnceLock;

use flashcore::{DType, Device};
use libloading::os::unix::{Library, RTLD_NOW};

use crate::errors::{Failure, Result, invalid, unsupported};
use crate::operand::{MAX_RANK, Operand, Role, bad_dtype};

/// Finds a library that is loaded, and loads none.
const RTLD_NOLOAD: i32 = 4;
/// The interface that is asked for: that of torch 2.10.
const ABI: u64 = (2 << 56) | (10 << 48);
const DEVICE_CPU: i32 = 0;
const DEVICE_CUDA: i32 = 1;

/// `AtenTensorHandle`.
type Handle = *mut c_void;
type LibraryHandle = *mut c_void;
/// `AOTITorchError`; 0 is success.
type Status = i32;
/// A value on the operator's stack: a number, a handle, or a pointer to another such value.
pub(crate) type Value = u64;
/// An operator's kernel: arguments in, results out on the same stack.
pub(crate) type Kernel = unsafe extern "C-unwind" fn(*mut Value, u64, u64);

macro_rules! symbols {
    ($($name:ident: fn($($arg:ty),* $(,)?) $(-> $ret:ty)?;)*) => {
        /// Functions that every torch from 2.10 on has.
        pub(crate) struct Symbols {
            $($name: unsafe extern "C-unwind" fn($($arg),*) $(-> $ret)?,)*
        }

        /// Their names.
        pub(crate) const SYMBOLS: &[&str] = &[$(stringify!($name)),*];

        impl Symbols {
            fn find(library: &Library) -> Result<Self> {
                Ok(Self { $(
                    // SAFETY: the signature is the one in torch's `shim.h`, which is stable.
                    $name: unsafe { symbol(library, concat!(stringify!($name), "\0")) }
                        .ok_or_else(|| too_old(stringify!($name)))?,
                )* })
            }
        }
    };
}

symbols! {
    aoti_torch_library_init_fragment: fn(*const c_char, *const c_char, u32, *mut LibraryHandle) -> Status;
    aoti_torch_library_init_impl: fn(*const c_char, *const c_char, *const c_char, u32, *mut LibraryHandle) -> Status;
    aoti_torch_library_def: fn(LibraryHandle, *const c_char) -> Status;
    torch_library_impl: fn(LibraryHandle, *const c_char, Kernel, u64) -> Status;
    torch_call_dispatcher: fn(*const c_char, *const c_char, *mut Value, u64) -> Status;
    aoti_torch_check: fn(bool, *const c_char, *const c_char, u32, *const c_char);
    aoti_torch_get_dim: fn(Handle, *mut i64) -> Status;
    aoti_torch_get_sizes: fn(Handle, *mut *const i64) -> Status;
    aoti_torch_get_strides: fn(Handle, *mut *const i64) -> Status;
    aoti_torch_get_dtype: fn(Handle, *mut i32) -> Status;
    aoti_torch_get_device_type: fn(Handle, *mut i32) -> Status;
    aoti_torch_get_device_index: fn(Handle, *mut i32) -> Status;
    aoti_torch_get_data_ptr: fn(Handle, *mut *mut c_void) -> Status;
    aoti_torch_empty_strided: fn(i64, *const i64, *const i64, i32, i32, i32, *mut Handle) -> Status;
    aoti_torch_new_tensor_handle: fn(Handle, *mut Handle) -> Status;
    aoti_torch_copy_: fn(Handle, Handle, i32) -> Status;
    aoti_torch_delete_tensor_object: fn(Handle) -> Status;
}

/// Functions that only some versions have, or only builds with CUDA.
struct Optional {
    /// From 2.13 on. Before, boxes are made and freed with C++'s operators.
    new_box: Option<unsafe extern "C-unwind" fn(*mut *mut Value) -> Status>,
    delete_box: Option<unsafe extern "C-unwind" fn(*mut Value) -> Status>,
    cxx_new: Option<unsafe extern "C-unwind" fn(usize) -> *mut c_void>,
    cxx_delete: Option<unsafe extern "C-unwind" fn(*mut c_void)>,
    last_error: Option<unsafe extern "C-unwind" fn() -> *const c_char>,
    current_stream: Option<unsafe extern "C-unwind" fn(i32, *mut *mut c_void) -> Status>,
}

/// The running torch.
pub(crate) struct Torch {
    symbols: Symbols,
    optional: Optional,
    /// What is called must stay loaded.
    _libraries: Vec<Library>,
}

/// # Safety
/// `T` is the function's type.
pub(crate) unsafe fn symbol<T: Copy>(library: &Library, name: &str) -> Option<T> {
    // SAFETY: the caller's promise.
    unsafe { library.get::<T>(name.as_bytes()) }.ok().map(|symbol| *symbol)
}

fn too_old(what: &str) -> Failure {
    unsupported(format!("this torch has no {what}; torch 2.10 or newer has"))
}

/// A library that the program has loaded.
pub(crate) fn loaded(name: &str) -> Option<Library> {
    // SAFETY: a library that is loaded already runs no initialisers.
    unsafe { Library::open(Some(name), RTLD_NOW | RTLD_NOLOAD) }.ok()
}

/// Whether the shim succeeded.
fn done(status: Status, what: &str) -> Result<()> {
    match status {
        0 => Ok(()),
        _ => Err(Failure::Internal(format!("libtorch could not {what}"))),
    }
}

impl Torch {
    /// The torch that this program has loaded.
    pub(crate) fn get() -> Result<&'static Self> {
        static TORCH: OnceLock<Torch> = OnceLock::new();
        if let Some(torch) = TORCH.get() {
            return Ok(torch);
        }
        let torch = Self::find()?;
        Ok(TORCH.get_or_init(|| torch))
    }

    fn find() -> Result<Self> {
        let cpu =
            loaded("libtorch_cpu.so").ok_or_else(|| unsupported("libtorch_cpu.so is not loaded: import torch"))?;
        let symbols = Symbols::find(&cpu)?;
        let cuda = loaded("libtorch_cuda.so");
        // SAFETY: the signatures are those of `shim.h`, and of C++'s global allocation functions.
        let optional = unsafe {
            Optional {
                new_box: symbol(&cpu, "torch_new_stable_ivalue\0"),
                delete_box: symbol(&cpu, "torch_delete_stable_ivalue\0"),
                cxx_new: symbol(&cpu, "_Znwm\0"),
                cxx_delete: symbol(&cpu, "_ZdlPv\0"),
                last_error: symbol(&cpu, "torch_exception_get_what_without_backtrace\0"),
                current_stream: cuda.as_ref().and_then(|cuda| symbol(cuda, "aoti_torch_get_current_cuda_stream\0")),
            }
        };
        let boxes = (optional.new_box.is_some() && optional.delete_box.is_some())
            || (optional.cxx_new.is_some() && optional.cxx_delete.is_some());
        if !boxes {
            return Err(too_old("torch_new_stable_ivalue"));
        }
        Ok(Self { symbols, optional, _libraries: [Some(cpu), cuda].into_iter().flatten().collect() })
    }

    /// Adds operators to a namespace.
    pub(crate) fn define(&self, namespace: &CStr, schemas: &[&CStr]) -> Result<()> {
        let mut library = ptr::null_mut();
        // SAFETY: strings end with NUL, `library` has room. The library is never deleted, so that the operators stay.
        unsafe {
            let made =
                (self.symbols.aoti_torch_library_init_fragment)(namespace.as_ptr(), FILE.as_ptr(), LINE, &mut library);
            done(made, "open the namespace")?;
            for schema in schemas {
                done((self.symbols.aoti_torch_library_def)(library, schema.as_ptr()), "define an operator")?;
            }
        }
        Ok(())
    }

    /// Gives operators their kernels for one dispatch key.
    pub(crate) fn implement(&self, namespace: &CStr, key: &CStr, kernels: &[(&CStr, Kernel)]) -> Result<()> {
        let mut library = ptr::null_mut();
        // SAFETY: as in `define`; the kernels live as long as this module, which Python never unloads.
        unsafe {
            let made = (self.symbols.aoti_torch_library_init_impl)(
                namespace.as_ptr(),
                key.as_ptr(),
                FILE.as_ptr(),
                LINE,
                &mut library,
            );
            done(made, "open the namespace")?;
            for (name, kernel) in kernels {
                done((self.symbols.torch_library_impl)(library, name.as_ptr(), *kernel, ABI), "register a kernel")?;
            }
        }
        Ok(())
    }

    /// Takes the argument at a place of an operator's stack.
    ///
    /// # Safety
    /// The place holds a `Tensor`, which nobody else takes.
    pub(crate) unsafe fn take_tensor(&'static self, value: Value) -> Tensor {
        Tensor { torch: self, handle: ptr::with_exposed_provenance_mut(value as usize) }
    }

    /// Names a tensor that is another's.
    ///
    /// # Safety
    /// `handle` points to an `at::Tensor` that lives during `'a`.
    pub(crate) unsafe fn borrow<'a>(&'static self, handle: Handle) -> TensorRef<'a> {
        TensorRef { torch: self, handle, owner: PhantomData }
    }

    /// Takes the argument at a place of an operator's stack.
    ///
    /// # Safety
    /// The place holds an optional value, which nobody else takes.
    pub(crate) unsafe fn take_optional(&self, value: Value) -> Option<Value> {
        let boxed = ptr::with_exposed_provenance_mut::<Value>(value as usize);
        if boxed.is_null() {
            return None;
        }
        // SAFETY: an optional argument that is there is a box of one value, made with the allocator that frees it here.
        unsafe {
            let value = *boxed;
            match (self.optional.delete_box, self.optional.cxx_delete) {
                (Some(delete), _) => _ = delete(boxed),
                (None, Some(delete)) => delete(boxed.cast()),
                (None, None) => {}
            }
            Some(value)
        }
    }

    /// A value for an optional argument of an operator that will be called; ownership goes with it.
    fn optional(&self, value: Option<Value>) -> Value {
        let Some(value) = value else { return 0 };
        let mut boxed = ptr::null_mut::<Value>();
        // SAFETY: `boxed` has room for the pointer; the box is fresh and as large as a value.
        unsafe {
            match (self.optional.new_box, self.optional.cxx_new) {
                (Some(new), _) => _ = new(&mut boxed),
                (None, Some(new)) => boxed = new(size_of::<Value>()).cast(),
                (None, None) => {}
            }
            if let Some(place) = boxed.as_mut() {
                *place = value;
            }
        }
        boxed.expose_provenance() as Value
    }

    /// `aten::scaled_dot_product_attention`, torch's own. Where it fails and cannot say why, so does `refusal`.
    pub(crate) fn sdpa(&'static self, call: &Sdpa<'_>, refusal: Failure) -> Result<Tensor> {
        let mut stack = [
            call.query.share()?.into_value(),
            call.key.share()?.into_value(),
            call.value.share()?.into_value(),
            self.optional(call.attn_mask.map(|mask| mask.share().map(Tensor::into_value)).transpose()?),
            call.dropout_p.to_bits(),
            call.is_causal.into(),
            self.optional(call.scale.map(f64::to_bits)),
            call.enable_gqa.into(),
        ];
        let name = c"aten::scaled_dot_product_attention";
        // SAFETY: the stack holds the operator's arguments in order, whose ownership it takes, and has room for the
        // result, which is ours.
        unsafe {
            match (self.symbols.torch_call_dispatcher)(name.as_ptr(), c"".as_ptr(), stack.as_mut_ptr(), ABI) {
                0 => Ok(self.take_tensor(stack[0])),
                _ => Err(self.last_error().map_or(refusal, Failure::Torch)),
            }
        }
    }

    /// The text of the thread's last exception; torch tells it from 2.13 on.
    fn last_error(&self) -> Option<String> {
        // SAFETY: the function takes nothing, and gives null or a string that lives until the thread's next exception.
        let text = self.optional.last_error.map(|get| unsafe { get() }).filter(|text| !text.is_null())?;
        // SAFETY: see above.
        Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }

    /// A new tensor.
    pub(crate) fn empty(
        &'static self,
        shape: &[usize],
        strides: &[i64],
        dtype: DType,
        device: Device,
    ) -> Result<Tensor> {
        let mut sizes = [0i64; MAX_RANK];
        for (size, &given) in sizes.iter_mut().zip(shape) {
            *size = given as i64;
        }
        let (kind, index) = match device {
            Device::Cpu => (DEVICE_CPU, -1),
            Device::Cuda(ordinal) => (DEVICE_CUDA, ordinal as i32),
        };
        let mut handle = ptr::null_mut();
        // SAFETY: `sizes` and `strides` have a number for each of `shape`'s dimensions; `handle` has room.
        let status = unsafe {
            (self.symbols.aoti_torch_empty_strided)(
                shape.len() as i64,
                sizes.as_ptr(),
                strides.as_ptr(),
                scalar_type(dtype),
                kind,
                index,
                &mut handle,
            )
        };
        match status {
            0 => Ok(Tensor { torch: self, handle }),
            _ => Err(Failure::Allocation),
        }
    }

    /// The current stream of a device; 0 for the CPU, which has none.
    pub(crate) fn current_stream(&self, device: Device) -> Result<u64> {
        let Device::Cuda(ordinal) = device else { return Ok(0) };
        let current_stream = self.optional.current_stream.ok_or_else(|| too_old("CUDA streams"))?;
        let mut stream = ptr::null_mut();
        // SAFETY: `stream` has room for the result.
        done(unsafe { current_stream(ordinal as i32, &mut stream) }, "name its current stream")?;
        Ok(stream.addr() as u64)
    }

    /// Raises an exception in the caller of an operator. Unwinds through the calling frame, which must own nothing.
    ///
    /// # Safety
    /// The caller was called by C++, and every frame between has the C-unwind ABI.
    pub(crate) unsafe fn throw(&self, message: &CString) {
        // SAFETY: strings end with NUL and outlive the call, which copies them.
        unsafe { (self.symbols.aoti_torch_check)(false, c"flashcore".as_ptr(), FILE.as_ptr(), LINE, message.as_ptr()) }
    }
}

const FILE: &CStr = c"flashcore";
const LINE: u32 = 0;

/// The arguments of torch's own SDPA.
pub(crate) struct Sdpa<'a> {
    pub(crate) query: &'a Tensor,
    pub(crate) key: &'a Tensor,
    pub(crate) value: &'a Tensor,
    pub(crate) attn_mask: Option<&'a Tensor>,
    pub(crate) dropout_p: f64,
    pub(crate) is_causal: bool,
    pub(crate) scale: Option<f64>,
    pub(crate) enable_gqa: bool,
}

/// A tensor of libtorch: one reference to it.
pub(crate) struct Tensor {
    torch: &'static Torch,
    handle: Handle,
}

impl Drop for Tensor {
    fn drop(&mut self) {
        // SAFETY: the handle is ours, and is deleted once.
        unsafe { (self.torch.symbols.aoti_torch_delete_tensor_object)(self.handle) };
    }
}

impl Tensor {
    /// Another reference to the same tensor.
    fn share(&self) -> Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: the handle is live; the new one has room.
        done(unsafe { (self.torch.symbols.aoti_torch_new_tensor_handle)(self.handle, &mut handle) }, "share a tensor")?;
        Ok(Self { torch: self.torch, handle })
    }

    /// As a value on an operator's stack, which then owns it.
    pub(crate) fn into_value(self) -> Value {
        let handle = self.handle;
        std::mem::forget(self);
        handle.expose_provenance() as Value
    }

    /// Overwrites the tensor with another of the same shape.
    pub(crate) fn copy_from(&self, source: &Self) -> Result<()> {
        // SAFETY: both handles are live.
        done(unsafe { (self.torch.symbols.aoti_torch_copy_)(self.handle, source.handle, 0) }, "copy a tensor")
    }

    pub(crate) fn borrow(&self) -> TensorRef<'_> {
        TensorRef { torch: self.torch, handle: self.handle, owner: PhantomData }
    }

    /// The tensor as plain numbers.
    pub(crate) fn read(&self, role: &'static Role) -> Result<Operand> {
        self.borrow().read(role)
    }
}

/// A tensor that is another's.
#[derive(Clone, Copy)]
pub(crate) struct TensorRef<'a> {
    torch: &'static Torch,
    handle: Handle,
    owner: PhantomData<&'a ()>,
}

impl<'a> TensorRef<'a> {
    /// The place of the `at::Tensor`.
    pub(crate) fn handle(self) -> *const c_void {
        self.handle
    }

    /// The address of the first element.
    #[inline]
    pub(crate) fn address(self) -> Result<u64> {
        let mut data = ptr::null_mut();
        // SAFETY: the handle is live, and `data` has room for what is asked.
        let status = unsafe { (self.torch.symbols.aoti_torch_get_data_ptr)(self.handle, &mut data) };
        done(status, "find a tensor's memory")?;
        Ok(data.addr() as u64)
    }

    /// The tensor as plain numbers.
    pub(crate) fn read(self, role: &'static Role) -> Result<Operand> {
        self.look(role)?.operand(role)
    }

    /// What the tensor says of itself.
    #[inline]
    pub(crate) fn look(self, role: &'static Role) -> Result<Look<'a>> {
        let symbols = &self.torch.symbols;
        let (mut rank, mut scalar, mut kind, mut index) = (0, 0, 0, 0);
        let (mut sizes, mut strides, mut data) = (ptr::null(), ptr::null(), ptr::null_mut());
        // SAFETY: the handle is live, and each place has room for what is asked.
        let status = unsafe {
            (symbols.aoti_torch_get_dim)(self.handle, &mut rank)
                | (symbols.aoti_torch_get_dtype)(self.handle, &mut scalar)
                | (symbols.aoti_torch_get_device_type)(self.handle, &mut kind)
                | (symbols.aoti_torch_get_device_index)(self.handle, &mut index)
                | (symbols.aoti_torch_get_sizes)(self.handle, &mut sizes)
                | (symbols.aoti_torch_get_strides)(self.handle, &mut strides)
                | (symbols.aoti_torch_get_data_ptr)(self.handle, &mut data)
        };
        if status != 0 {
            return Err(unreadable(role, "nested or sparse".into()));
        }
        // SAFETY: both have `rank` numbers, which live as long as the tensor and change only with it.
        let (sizes, strides) = unsafe { (list(sizes, rank), list(strides, rank)) };
        Ok(Look { sizes, strides, scalar, kind, index, address: data.addr() as u64 })
    }
}

/// What a tensor says of itself, in torch's numbers.
#[derive(Clone, Copy)]
pub(crate) struct Look<'a> {
    pub(crate) sizes: &'a [i64],
    pub(crate) strides: &'a [i64],
    scalar: i32,
    kind: i32,
    index: i32,
    pub(crate) address: u64,
}

impl Look<'_> {
    /// Element type and device, in torch's numbers.
    #[inline]
    pub(crate) fn numbers(&self) -> [i32; 3] {
        [self.scalar, self.kind, self.index]
    }

    /// In our own.
    pub(crate) fn operand(&self, role: &'static Role) -> Result<Operand> {
        let &Self { sizes, strides, scalar, kind, index, address } = self;
        let device = match kind {
            DEVICE_CPU => Device::Cpu,
            DEVICE_CUDA => Device::Cuda(index.unsigned_abs()),
            other => return Err(unreadable(role, device_name(other))),
        };
        let dtype = dtype(scalar).ok_or_else(|| bad_dtype(role, &scalar_name(scalar)))?;
        if address == 0 && !sizes.contains(&0) {
            return Err(unreadable(role, "no memory".into()));
        }
        Ok(Operand::new(role, device, address, dtype, sizes, strides)?)
    }

    /// The CUDA device that it is on, or the CPU.
    #[inline]
    pub(crate) fn device(&self) -> Device {
        if self.kind == DEVICE_CUDA { Device::Cuda(self.index.unsigned_abs()) } else { Device::Cpu }
    }
}

fn unreadable(role: &'static Role, why: String) -> Failure {
    let given = format!("a tensor that torch cannot describe by its memory ({why})");
    Failure::Unreadable(invalid(role.name, given, "a dense tensor on cpu or cuda"))
}

/// # Safety
/// `start` is null or points to `len` numbers that live during `'a`.
unsafe fn list<'a>(start: *const i64, len: i64) -> &'a [i64] {
    match start.is_null() {
        true => &[],
        // SAFETY: the caller's promise.
        false => unsafe { std::slice::from_raw_parts(start, len.unsigned_abs() as usize) },
    }
}

/// torch's numbers for element types, by ours.
const SCALAR_TYPES: [(i32, DType); 5] =
    [(5, DType::F16), (6, DType::F32), (7, DType::F64), (11, DType::Bool), (15, DType::BF16)];

fn dtype(scalar: i32) -> Option<DType> {
    SCALAR_TYPES.iter().find(|(number, _)| *number == scalar).map(|(_, dtype)| *dtype)
}

fn scalar_type(dtype: DType) -> i32 {
    SCALAR_TYPES.iter().find(|(_, known)| *known == dtype).map_or(-1, |(number, _)| *number)
}

/// torch's names of the types of devices that it numbers, where they are not ours.
fn device_name(kind: i32) -> String {
    const NAMES: [(i32, &str); 4] = [(9, "xla"), (12, "xpu"), (13, "mps"), (14, "meta")];
    named(&NAMES, kind).map_or_else(|| format!("on torch's device type {kind}"), |name| format!("on {name}"))
}

/// torch's names of the element types that it numbers, where they are not ours.
fn scalar_name(scalar: i32) -> String {
    const NAMES: [(i32, &str); 15] = [
        (0, "uint8"),
        (1, "int8"),
        (2, "int16"),
        (3, "int32"),
        (4, "int64"),
        (8, "complex32"),
        (9, "complex64"),
        (10, "complex128"),
        (23, "float8_e5m2"),
        (24, "float8_e4m3fn"),
        (25, "float8_e5m2fnuz"),
        (26, "float8_e4m3fnuz"),
        (27, "uint16"),
        (28, "uint32"),
        (29, "uint64"),
    ];
    named(&NAMES, scalar).map_or_else(|| format!("number {scalar} of torch"), str::to_owned)
}

fn named<'a>(names: &[(i32, &'a str)], wanted: i32) -> Option<&'a str> {
    names.iter().find(|(number, _)| *number == wanted).map(|(_, name)| *name)
}
