//! What torch knows of a tensor and of the current thread, by functions of its C++ libraries.
//!
//! To ask through Python takes longer than all the rest of a call; these functions take nanoseconds. They are no stable
//! interface. So each is found by its mangled name, which holds the types that it takes, and all are tried on tensors
//! whose answers Python gives too. Where one is missing, or one answer differs, none is used, and everything is asked
//! through Python and DLPack ([`crate::quiet`], [`crate::dlpack`]).

use std::ffi::c_void;

use flashcore::Device;
use libloading::os::unix::Library;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::IntoPyDict;

use crate::errors::Result;
use crate::operand::{QUERY, Role};
use crate::plain::{Classes, Plain};
use crate::quiet::{State, Switches};
use crate::shim::{self, Look, TensorRef};

macro_rules! functions {
    ($($field:ident = $library:literal $symbol:literal fn($($arg:ty)?) -> $ret:ty;)*) => {
        struct Functions {
            $($field: unsafe extern "C-unwind" fn($($arg)?) -> $ret,)*
            /// What is called must stay loaded.
            _libraries: Vec<Library>,
        }

        impl Functions {
            fn find() -> Option<Self> {
                let mut libraries = Vec::new();
                $(
                    let library = shim::loaded($library)?;
                    // SAFETY: the mangled name holds the types of the parameters, of which an enumeration of 16 bits
                    // comes in a register of at least 32; `agrees` tries what each gives back.
                    let $field = unsafe { shim::symbol(&library, concat!($symbol, "\0")) }?;
                    libraries.push(library);
                )*
                Some(Self { $($field,)* _libraries: libraries })
            }
        }
    };
}

functions! {
    // c10::impl::tls_is_dispatch_key_included(c10::DispatchKey)
    key_included = "libc10.so" "_ZN3c104impl28tls_is_dispatch_key_includedENS_11DispatchKeyE" fn(u32) -> bool;
    // c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey)
    key_excluded = "libc10.so" "_ZN3c104impl28tls_is_dispatch_key_excludedENS_11DispatchKeyE" fn(u32) -> bool;
    // c10::GradMode::is_enabled()
    grad_enabled = "libc10.so" "_ZN3c108GradMode10is_enabledEv" fn() -> bool;
    // c10::TensorImpl::requires_grad() const
    requires_grad = "libc10.so" "_ZNK3c1010TensorImpl13requires_gradEv" fn(*const c_void) -> bool;
    // c10::TensorImpl::autograd_meta() const
    autograd_meta = "libc10.so" "_ZNK3c1010TensorImpl13autograd_metaEv" fn(*const c_void) -> *const c_void;
    // at::impl::torch_function_mode_enabled()
    function_mode = "libtorch_cpu.so" "_ZN2at4impl27torch_function_mode_enabledEv" fn() -> bool;
    // at::native::is_neg(at::Tensor const&)
    is_neg = "libtorch_cpu.so" "_ZN2at6native6is_negERKNS_6TensorE" fn(*const c_void) -> bool;
    // at::native::_is_zerotensor(at::Tensor const&)
    is_zero = "libtorch_cpu.so" "_ZN2at6native14_is_zerotensorERKNS_6TensorE" fn(*const c_void) -> bool;
    // THPVariable_Wrap(at::TensorBase const&)
    wrap = "libtorch_python.so" "_Z16THPVariable_WrapRKN2at10TensorBaseE" fn(*const c_void) -> *mut ffi::PyObject;
}

/// Keys of the dispatcher that a thread includes while something is on: a mode (also of tracers that come before the
/// dispatcher, or dispatch in Python), a function transform, a trace.
const INCLUDED: [&str; 5] = ["Python", "PreDispatch", "PythonDispatcher", "FuncTorchDynamicLayerFrontMode", "Tracer"];
/// Keys that a thread excludes while autocast is off. Autocast of other devices does nothing to our tensors.
const EXCLUDED: [&str; 2] = ["AutocastCPU", "AutocastCUDA"];

/// The running torch from the inside.
pub(crate) struct Internals {
    torch: &'static shim::Torch,
    functions: Functions,
    /// Bytes from the start of a tensor's Python object to its `at::Tensor`.
    place: usize,
    included: [u32; INCLUDED.len()],
    excluded: [u32; EXCLUDED.len()],
    /// For what only Python knows.
    switches: Switches,
}

impl Internals {
    /// `None` where anything is not as expected; then nothing of this may be used.
    pub(crate) fn find(torch: &Bound<'_, PyAny>, classes: &Classes) -> Option<Self> {
        let found = Self::search(torch, classes)
            .inspect_err(|error| log::debug!("torch's C++ functions are not used: {error}"));
        found.ok().flatten()
    }

    fn search(torch: &Bound<'_, PyAny>, classes: &Classes) -> PyResult<Option<Self>> {
        let (Some(functions), Ok(shims)) = (Functions::find(), shim::Torch::get()) else { return Ok(None) };
        let samples = samples(torch)?;
        let Some(samples) = samples.iter().map(|sample| classes.plain(sample)).collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        let Some(place) = place(&samples)? else { return Ok(None) };
        let internals = Self {
            torch: shims,
            functions,
            place,
            included: keys(torch, INCLUDED)?,
            excluded: keys(torch, EXCLUDED)?,
            switches: Switches::of(torch)?,
        };
        Ok(internals.agrees(torch, &samples)?.then_some(internals))
    }

    /// The functions of libtorch's stable interface.
    pub(crate) fn torch(&self) -> &'static shim::Torch {
        self.torch
    }

    /// Whether every answer is the one that Python gives.
    fn agrees(&self, torch: &Bound<'_, PyAny>, samples: &[Plain<'_, '_>]) -> PyResult<bool> {
        for &sample in samples {
            let object = sample.object();
            let asks = object.getattr("requires_grad")?.is_truthy()?;
            let is_zero = object.call_method0("_is_zerotensor")?.is_truthy()?;
            let same = self.is_neg(sample)? == object.call_method0("is_neg")?.is_truthy()?
                && self.is_zero(sample)? == is_zero
                && self.requires_grad(sample)? == asks
                && (self.has_autograd(sample) || !asks)
                && self.look(&QUERY, sample).is_ok_and(|look| is_zero || describes(&look, object).unwrap_or(false))
                && self.wrap(object.py(), self.tensor(sample))?.is(object);
            if !same {
                return Ok(false);
            }
        }
        let states = [
            torch.call_method0("no_grad")?,
            torch.call_method0("enable_grad")?,
            torch.getattr("overrides")?.call_method0("BaseTorchFunctionMode")?,
            torch.call_method1("autocast", ("cpu",))?,
        ];
        for state in states {
            state.call_method0("__enter__")?;
            let same = self.agrees_now(torch.py());
            let none = torch.py().None();
            state.call_method1("__exit__", (&none, &none, &none))?;
            if !same? {
                return Ok(false);
            }
        }
        self.agrees_now(torch.py())
    }

    /// Whether the state of the thread is what Python says.
    fn agrees_now(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.grad_enabled(py)? == self.switches.grad_enabled(py)?
            && self.all_off(py)? == self.switches.all_off(py)?)
    }

    /// The `TensorImpl` of a tensor.
    #[inline]
    fn implementation(&self, tensor: Plain<'_, '_>) -> *const c_void {
        // SAFETY: an `at::Tensor` is a pointer to its `TensorImpl`.
        unsafe { *self.tensor(tensor).handle().cast() }
    }

    /// The `at::Tensor` of a Python object.
    #[inline]
    fn tensor<'a>(&self, tensor: Plain<'a, '_>) -> TensorRef<'a> {
        let handle = tensor.object().as_ptr().cast::<u8>().wrapping_add(self.place).cast();
        // SAFETY: in the objects of both classes there is an `at::Tensor` at this place (`place`), which lives as long
        // as the object, and the object as long as it is borrowed.
        unsafe { self.torch.borrow(handle) }
    }

    /// What a tensor says of itself.
    #[inline]
    pub(crate) fn look<'a>(&self, role: &'static Role, tensor: Plain<'a, '_>) -> Result<Look<'a>> {
        self.tensor(tensor).look(role)
    }

    /// The Python object of a tensor.
    pub(crate) fn wrap<'py>(&self, py: Python<'py>, tensor: TensorRef<'_>) -> PyResult<Bound<'py, PyAny>> {
        // SAFETY: the argument is a live `at::Tensor`; the result is a new reference, or null with an exception set.
        unsafe { Bound::from_owned_ptr_or_err(py, (self.functions.wrap)(tensor.handle())) }
    }
}

impl State for Internals {
    #[inline]
    fn all_off(&self, _py: Python<'_>) -> PyResult<bool> {
        let Functions { key_included, key_excluded, function_mode, .. } = self.functions;
        // SAFETY: the functions take a key or nothing, and read variables of the thread.
        Ok(unsafe {
            !self.included.iter().any(|&key| key_included(key))
                && self.excluded.iter().all(|&key| key_excluded(key))
                && !function_mode()
        })
    }

    fn forward_mode(&self, py: Python<'_>) -> PyResult<bool> {
        self.switches.forward_mode(py)
    }

    #[inline]
    fn grad_enabled(&self, _py: Python<'_>) -> PyResult<bool> {
        // SAFETY: the function takes nothing, and reads a variable of the thread.
        Ok(unsafe { (self.functions.grad_enabled)() })
    }

    #[inline]
    fn requires_grad(&self, tensor: Plain<'_, '_>) -> PyResult<bool> {
        // SAFETY: the `TensorImpl` is alive.
        Ok(unsafe { (self.functions.requires_grad)(self.implementation(tensor)) })
    }

    #[inline]
    fn has_autograd(&self, tensor: Plain<'_, '_>) -> bool {
        // SAFETY: the `TensorImpl` is alive.
        unsafe { !(self.functions.autograd_meta)(self.implementation(tensor)).is_null() }
    }

    #[inline]
    fn is_neg(&self, tensor: Plain<'_, '_>) -> PyResult<bool> {
        // SAFETY: the argument is a live `at::Tensor`.
        Ok(unsafe { (self.functions.is_neg)(self.tensor(tensor).handle()) })
    }

    #[inline]
    fn is_zero(&self, tensor: Plain<'_, '_>) -> PyResult<bool> {
        // SAFETY: the argument is a live `at::Tensor`.
        Ok(unsafe { (self.functions.is_zero)(self.tensor(tensor).handle()) })
    }
}

/// Tensors that differ in everything that is asked.
fn samples<'py>(torch: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let device = [("device", "cpu")].into_py_dict(torch.py())?;
    let plain = torch.call_method("zeros", ((2, 3, 4),), Some(&device))?;
    let half = plain.call_method0("half")?;
    let moved = half.call_method1("transpose", (0, 2))?.get_item(1)?;
    let negative = torch.call_method1("_neg_view", (&plain,))?;
    let parameter = torch.getattr("nn")?.call_method1("Parameter", (&plain,))?;
    let zero = torch.call_method("_efficientzerotensor", ((4, 3),), Some(&device))?;
    Ok(vec![plain, half, moved, negative, parameter, zero])
}

/// Where all of these objects keep the pointer that Python calls `_cdata`: an `at::Tensor`, which is nothing else.
/// `None` unless there is one such place, within the objects of every class.
fn place(samples: &[Plain<'_, '_>]) -> PyResult<Option<usize>> {
    const WORD: usize = size_of::<usize>();
    let mut places: Option<Vec<usize>> = None;
    for sample in samples {
        let object = sample.object();
        let size: usize = object.get_type().getattr("__basicsize__")?.extract()?;
        let pointer: usize = object.getattr("_cdata")?.extract()?;
        let holds = |&offset: &usize| {
            let word = object.as_ptr().cast::<u8>().wrapping_add(offset).cast::<usize>();
            // SAFETY: an object is as large as its type says, and aligned to words.
            unsafe { word.read() == pointer }
        };
        let within = (0..size / WORD).map(|word| word * WORD).filter(holds);
        places = Some(within.filter(|offset| places.as_ref().is_none_or(|all| all.contains(offset))).collect());
    }
    Ok(places.and_then(|places| <[usize; 1]>::try_from(places).ok()).map(|[place]| place))
}

/// The dispatcher's numbers of its keys.
fn keys<const N: usize>(torch: &Bound<'_, PyAny>, names: [&str; N]) -> PyResult<[u32; N]> {
    let parse = torch.getattr("_C")?.getattr("_dispatch_key_parse")?;
    let mut numbers = [0; N];
    for (number, name) in numbers.iter_mut().zip(names) {
        *number = parse.call1((name,))?.call_method0("__int__")?.extract()?;
    }
    Ok(numbers)
}

/// Whether Python describes a tensor in the same way.
fn describes(look: &Look<'_>, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
    let sizes: Vec<i64> = tensor.call_method0("size")?.extract()?;
    let strides: Vec<i64> = tensor.call_method0("stride")?.extract()?;
    let address: u64 = tensor.call_method0("data_ptr")?.extract()?;
    let size: usize = tensor.call_method0("element_size")?.extract()?;
    let operand = look.operand(&QUERY).ok();
    Ok(look.sizes == sizes
        && look.strides == strides
        && look.address == address
        && operand.is_some_and(|operand| operand.dtype.size() == size && operand.device == Device::Cpu))
}
