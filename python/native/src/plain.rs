//! Tensors that are nothing but their memory.

use pyo3::prelude::*;
use pyo3::types::PyType;

/// The Python classes of tensors without behaviour of their own. A subclass may stand for something else than its
/// memory (a `FakeTensor` has none).
pub(crate) struct Classes {
    tensor: Py<PyType>,
    parameter: Py<PyType>,
}

/// An object of the very class `torch.Tensor` or `torch.nn.Parameter`.
#[derive(Clone, Copy)]
pub(crate) struct Plain<'a, 'py>(&'a Bound<'py, PyAny>);

impl<'a, 'py> Plain<'a, 'py> {
    pub(crate) fn object(self) -> &'a Bound<'py, PyAny> {
        self.0
    }
}

impl Classes {
    /// The two classes, of which the second is there only once torch is imported as a whole.
    pub(crate) fn new(tensor: Bound<'_, PyAny>, parameter: Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self {
            tensor: tensor.cast_into::<PyType>()?.unbind(),
            parameter: parameter.cast_into::<PyType>()?.unbind(),
        })
    }

    /// The object, if it is of one of the two.
    #[inline]
    pub(crate) fn plain<'a, 'py>(&self, object: &'a Bound<'py, PyAny>) -> Option<Plain<'a, 'py>> {
        let class = object.get_type_ptr();
        let known = class == self.tensor.as_ptr().cast() || class == self.parameter.as_ptr().cast();
        known.then_some(Plain(object))
    }

    /// Whether `object` is a tensor of any class.
    pub(crate) fn is_tensor(&self, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        object.is_instance(self.tensor.bind(object.py()))
    }
}
