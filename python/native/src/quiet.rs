//! Whether torch would do nothing with a call but run a kernel.
//!
//! A dozen switches of torch change what a call means: gradients, autocast, function transforms, modes, tracing. All
//! must be off for a kernel to be launched without asking torch, so all are read on every call. [`crate::internals`] reads
//! them where it can. [`Switches`] reads them anywhere: they are C functions behind Python objects; where Python's stable
//! ABI names the C function, it is called without the object around it.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::plain::Plain;

/// The switches of the running torch.
pub(crate) struct Switches {
    /// Must all be falsy.
    off: [Switch; 5],
    grad_enabled: Switch,
    requires_grad: Property,
    is_neg: Method,
    is_zero: Method,
    forward_ad: Py<PyDict>,
    forward_level: Py<PyAny>,
}

impl Switches {
    pub(crate) fn of(torch: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = torch.py();
        let c = torch.getattr("_C")?;
        let base = c.getattr("TensorBase")?;
        let forward_ad = py.import("torch.autograd.forward_ad")?;
        Ok(Self {
            off: [
                Switch::of(c.getattr("_len_torch_dispatch_stack")?),
                Switch::of(c.getattr("_is_torch_function_mode_enabled")?),
                Switch::of(c.getattr("_is_any_autocast_enabled")?),
                Switch::of(c.getattr("_get_tracing_state")?),
                Switch::of(c.getattr("_functorch")?.getattr("maybe_current_level")?),
            ],
            grad_enabled: Switch::of(torch.getattr("is_grad_enabled")?),
            requires_grad: Property::of(&base, c"requires_grad")?,
            is_neg: Method::of(&base, c"is_neg")?,
            is_zero: Method::of(&base, c"_is_zerotensor")?,
            forward_ad: forward_ad.dict().unbind(),
            forward_level: "_current_level".into_pyobject(py)?.into_any().unbind(),
        })
    }
}

/// The state of torch that decides whether it would do nothing with a call but run a kernel.
pub(crate) trait State {
    /// Whether nothing is on that concerns all calls, derivatives aside.
    fn all_off(&self, py: Python<'_>) -> PyResult<bool>;
    /// Whether a level of forward-mode differentiation is on.
    fn forward_mode(&self, py: Python<'_>) -> PyResult<bool>;
    /// Whether operations on tensors that require gradients record them.
    fn grad_enabled(&self, py: Python<'_>) -> PyResult<bool>;
    /// Whether a tensor asks for a gradient.
    fn requires_grad(&self, tensor: Plain<'_, '_>) -> PyResult<bool>;
    /// Whether a tensor may have a gradient or a tangent.
    fn has_autograd(&self, tensor: Plain<'_, '_>) -> bool;
    /// Whether a tensor stands for the negative of what is in its memory.
    fn is_neg(&self, tensor: Plain<'_, '_>) -> PyResult<bool>;
    /// Whether a tensor stands for zeros, and has no memory.
    fn is_zero(&self, tensor: Plain<'_, '_>) -> PyResult<bool>;
}

impl State for Switches {
    fn all_off(&self, py: Python<'_>) -> PyResult<bool> {
        for switch in &self.off {
            if switch.is_on(py)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn forward_mode(&self, py: Python<'_>) -> PyResult<bool> {
        let level = self.forward_ad.bind(py).get_item(&self.forward_level)?;
        Ok(level.is_some_and(|level| level.extract::<i64>().map_or(true, |level| level >= 0)))
    }

    fn grad_enabled(&self, py: Python<'_>) -> PyResult<bool> {
        self.grad_enabled.is_on(py)
    }

    fn requires_grad(&self, tensor: Plain<'_, '_>) -> PyResult<bool> {
        self.requires_grad.read(tensor.object())
    }

    fn has_autograd(&self, _tensor: Plain<'_, '_>) -> bool {
        true
    }

    fn is_neg(&self, tensor: Plain<'_, '_>) -> PyResult<bool> {
        self.is_neg.call(tensor.object())
    }

    fn is_zero(&self, tensor: Plain<'_, '_>) -> PyResult<bool> {
        self.is_zero.call(tensor.object())
    }
}

type CFunction = unsafe extern "C" fn(*mut ffi::PyObject, *mut ffi::PyObject) -> *mut ffi::PyObject;
type CGetter = unsafe extern "C" fn(*mut ffi::PyObject, *mut c_void) -> *mut ffi::PyObject;

/// A function without arguments.
struct Switch {
    object: Py<PyAny>,
    /// Its C function and the first argument of that, where it is one of `METH_NOARGS`.
    direct: Option<(CFunction, *mut ffi::PyObject)>,
}

// SAFETY: the pointers are those of `object`, a Python object, and are used with the GIL alone.
unsafe impl Send for Switch {}
// SAFETY: as above.
unsafe impl Sync for Switch {}

impl Switch {
    fn of(function: Bound<'_, PyAny>) -> Self {
        let object = function.as_ptr();
        // SAFETY: the three calls are made on a `PyCFunction`, whose type was just checked.
        let direct = unsafe {
            (ffi::PyCFunction_CheckExact(object) != 0
                && ffi::PyCFunction_GetFlags(object) & CALLING == ffi::METH_NOARGS)
                .then(|| ffi::PyCFunction_GetFunction(object))
                .flatten()
                .map(|function| (function, ffi::PyCFunction_GetSelf(object)))
        };
        Self { object: function.unbind(), direct }
    }

    fn is_on(&self, py: Python<'_>) -> PyResult<bool> {
        match self.direct {
            // SAFETY: a call as Python would make it: the flags say that the function takes `(self, NULL)`, the GIL is
            // held, and `object` keeps `first` alive.
            Some((function, first)) => truth(py, unsafe { function(first, ptr::null_mut()) }),
            None => self.object.bind(py).call0()?.is_truthy(),
        }
    }
}

/// The flags that say how a C function is called.
const CALLING: c_int = ffi::METH_VARARGS | ffi::METH_KEYWORDS | ffi::METH_NOARGS | ffi::METH_O | ffi::METH_FASTCALL;

/// A method of a static type, without arguments.
struct Method(CFunction);

impl Method {
    fn of(class: &Bound<'_, PyAny>, name: &CStr) -> PyResult<Self> {
        // SAFETY: the slot of a type is null or a list that ends with a null name and lives as long as the type, which
        // is static.
        let found = unsafe {
            let mut entry = slot(class, ffi::Py_tp_methods)?.cast::<ffi::PyMethodDef>();
            while !entry.is_null() && !is_or_ends((*entry).ml_name, name) {
                entry = entry.add(1);
            }
            entry.as_ref().filter(|entry| !entry.ml_name.is_null() && entry.ml_flags & CALLING == ffi::METH_NOARGS)
        };
        // SAFETY: the flags say that it takes `(self, NULL)`.
        found.map(|entry| Self(unsafe { entry.ml_meth.PyCFunction })).ok_or_else(|| missing(name))
    }

    fn call(&self, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        // SAFETY: a call as Python would make it: callers pass objects of the method's class, and the GIL is held.
        truth(object.py(), unsafe { (self.0)(object.as_ptr(), ptr::null_mut()) })
    }
}

/// A property of a static type.
struct Property {
    get: CGetter,
    closure: *mut c_void,
}

// SAFETY: the closure belongs to the static type, and is passed to its own getter with the GIL alone.
unsafe impl Send for Property {}
// SAFETY: as above.
unsafe impl Sync for Property {}

impl Property {
    fn of(class: &Bound<'_, PyAny>, name: &CStr) -> PyResult<Self> {
        // SAFETY: as in `Method::of`.
        let found = unsafe {
            let mut entry = slot(class, ffi::Py_tp_getset)?.cast::<ffi::PyGetSetDef>();
            while !entry.is_null() && !is_or_ends((*entry).name, name) {
                entry = entry.add(1);
            }
            entry.as_ref().filter(|entry| !entry.name.is_null())
        };
        let property = found.and_then(|entry| Some(Self { get: entry.get?, closure: entry.closure }));
        property.ok_or_else(|| missing(name))
    }

    fn read(&self, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        // SAFETY: a call as Python would make it: callers pass objects of the property's class, and the GIL is held.
        truth(object.py(), unsafe { (self.get)(object.as_ptr(), self.closure) })
    }
}

fn slot(class: &Bound<'_, PyAny>, which: c_int) -> PyResult<*mut c_void> {
    let class = class.cast::<pyo3::types::PyType>()?;
    // SAFETY: a type object, and one of the slots that the API lists.
    Ok(unsafe { ffi::PyType_GetSlot(class.as_type_ptr(), which) })
}

/// Whether a list's entry is the one looked for, or the end of the list.
///
/// # Safety
/// `entry` is null or a string.
unsafe fn is_or_ends(entry: *const c_char, name: &CStr) -> bool {
    // SAFETY: the caller's promise.
    entry.is_null() || unsafe { CStr::from_ptr(entry) } == name
}

fn missing(name: &CStr) -> PyErr {
    pyo3::exceptions::PyAttributeError::new_err(format!("torch's tensor type has no C function for {name:?}"))
}

/// Whether a call's result, which is ours to release, counts as true.
fn truth(py: Python<'_>, result: *mut ffi::PyObject) -> PyResult<bool> {
    // SAFETY: a C function gives a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(py, result) }?.is_truthy()
}
