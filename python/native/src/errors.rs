//! From the library's errors to Python's exceptions, which `flashcore/errors.py` defines.

use std::fmt;

use flashcore::Error;
use pyo3::prelude::*;

mod classes {
    #![allow(missing_docs, reason = "documented where they are defined, in Python")]

    use pyo3::import_exception;

    import_exception!(flashcore.errors, FlashCoreError);
    import_exception!(flashcore.errors, InvalidArgumentError);
    import_exception!(flashcore.errors, UnsupportedError);
    import_exception!(flashcore.errors, DriverError);
    import_exception!(flashcore.errors, DriverNotFoundError);
    import_exception!(flashcore.errors, DriverTooOldError);
    import_exception!(flashcore.errors, ContextLostError);
    import_exception!(flashcore.errors, DeviceNotFoundError);
    import_exception!(flashcore.errors, BundleError);
    import_exception!(flashcore.errors, BundleNotFoundError);
    import_exception!(flashcore.errors, OutOfMemoryError);
}

/// Why a call failed, before it is known whether Python or libtorch is told.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The library's refusal.
    Library(Error),
    /// The refusal of something that torch's own SDPA may know how to do.
    Elsewhere(Error),
    /// The refusal of a tensor that has no memory to read; torch may know what it stands for.
    Unreadable(Error),
    /// A valid request that is not there yet.
    Unsupported(String),
    /// A bug of ours, contained.
    Internal(String),
    /// torch has no memory for a result, and did not say more.
    Allocation,
    /// What torch raised, as text.
    Torch(String),
    /// What Python raised.
    Python(PyErr),
}

pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Library(error) | Self::Elsewhere(error) | Self::Unreadable(error) => error.fmt(f),
            Self::Unsupported(message) | Self::Torch(message) => f.write_str(message),
            Self::Allocation => f.write_str("torch could not allocate the output"),
            Self::Internal(message) => write!(f, "internal error, please report it: {message}"),
            Self::Python(error) => error.fmt(f),
        }
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Library(error)
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        match failure {
            Failure::Python(error) => error,
            Failure::Unsupported(_) => classes::UnsupportedError::new_err(message),
            Failure::Torch(_) | Failure::Allocation => pyo3::exceptions::PyRuntimeError::new_err(message),
            Failure::Internal(_) => classes::FlashCoreError::new_err(message),
            Failure::Library(error) | Failure::Elsewhere(error) | Failure::Unreadable(error) => match error {
                Error::InvalidArgument { .. } => classes::InvalidArgumentError::new_err(message),
                Error::Unsupported(_) => classes::UnsupportedError::new_err(message),
                Error::DriverNotFound { .. } => classes::DriverNotFoundError::new_err(message),
                Error::DriverTooOld { .. } => classes::DriverTooOldError::new_err(message),
                Error::ContextLost { .. } => classes::ContextLostError::new_err(message),
                Error::Driver { .. } => classes::DriverError::new_err(message),
                Error::NoDevice { .. } => classes::DeviceNotFoundError::new_err(message),
                Error::NoBundle { .. } => classes::BundleNotFoundError::new_err(message),
                Error::Bundle(_) => classes::BundleError::new_err(message),
                Error::OutOfMemory { .. } => classes::OutOfMemoryError::new_err(message),
                _ => classes::FlashCoreError::new_err(message),
            },
        }
    }
}

/// A malformed argument, in the library's words.
pub(crate) fn invalid(argument: &'static str, given: impl ToString, accepted: impl ToString) -> Error {
    Error::InvalidArgument { argument, given: given.to_string(), accepted: accepted.to_string() }
}

/// A valid request that is not there yet.
pub(crate) fn unsupported(message: impl Into<String>) -> Failure {
    Failure::Unsupported(message.into())
}

/// A bug of ours, contained.
pub(crate) fn internal(panic: &(dyn std::any::Any + Send)) -> Failure {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    Failure::Internal(text.unwrap_or("no message").to_owned())
}
