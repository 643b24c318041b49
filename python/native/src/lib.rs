//! `flashcore._core`: the Python face of FlashCore.
//!
//! Arrays come in as plain [`operand::Operand`]s, from Python through [`library`] and [`request`], and from torch's
//! dispatcher through [`op`]. [`asked`] is a call as it came, [`sdpa`] says what it means, and [`call`] runs it on a
//! [`flashcore::Runtime`]. Calls on torch's tensors go through [`torch_call`], which looks into [`memo`] first. `unsafe` is
//! confined to the boundaries, [`dlpack`], [`quiet`], [`internals`], [`shim`] and [`op`], and to the four that hand memory
//! on: [`request`], [`torch_call`], [`memo`] and [`call`].

mod asked;
mod call;
#[allow(unsafe_code, reason = "the boundary to DLPack")]
mod dlpack;
mod errors;
mod info;
#[allow(unsafe_code, reason = "the boundary to torch's C++")]
mod internals;
mod library;
mod logging;
mod memo;
#[allow(unsafe_code, reason = "an operator that libtorch calls")]
mod op;
mod operand;
mod plain;
#[allow(unsafe_code, reason = "the boundary to Python's C functions")]
mod quiet;
mod request;
mod runtime;
mod sdpa;
#[allow(unsafe_code, reason = "the boundary to libtorch")]
mod shim;
mod threads;
mod torch_call;

use pyo3::prelude::*;

/// Attention for NVIDIA GPUs as finished machine code: the native module.
#[pymodule]
mod _core {
    use super::Bound;
    use super::PyModule;
    use super::PyModuleMethods;
    use super::PyResult;

    #[pymodule_export]
    use super::info::{Bundle, DeviceInfo, Explanation, Kernel, LastPlan, bundles, devices, last_plan};
    #[pymodule_export]
    use super::library::is_quiet;
    #[pymodule_export]
    use super::logging::start_logging;
    #[pymodule_export]
    use super::op::{last_failure, log_fallback, register_torch_operators, torch_symbols};
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
