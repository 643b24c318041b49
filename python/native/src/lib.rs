//! `flashcore._core`: the Python face of FlashCore.
//!
//! Arrays come in through [`library`] as plain [`operand::Operand`]s, [`request`] gives them SDPA's meaning, and
//! [`call`] runs them on a [`flashcore::Runtime`]. `unsafe` is confined to [`dlpack`], where foreign structs are read,
//! and to [`call`], where the described memory is used.

mod call;
#[allow(unsafe_code, reason = "the boundary to DLPack")]
mod dlpack;
mod errors;
mod info;
mod library;
mod operand;
mod request;
mod runtime;
mod threads;

use pyo3::prelude::*;

/// Attention for NVIDIA GPUs as finished machine code: the native module.
#[pymodule]
mod _core {
    use super::Bound;
    use super::PyModule;
    use super::PyModuleMethods;
    use super::PyResult;

    #[pymodule_export]
    use super::info::{Bundle, DeviceInfo, Explanation, Kernel, bundles, devices};
    #[pymodule_export]
    use super::request::{attention, explain};
    #[pymodule_export]
    use super::runtime::{Plan, Runtime};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::threads::watch_forks(module.py())?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
