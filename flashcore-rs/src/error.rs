//! The one error type of the crate.

use std::fmt;

use crate::attention::Rejection;

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused or failed. A refusal ([`Error::InvalidArgument`], [`Error::Unsupported`],
/// [`Error::OutOfMemory`]) has written nothing; what a driver failure leaves in the outputs is unspecified.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument breaks the contract of the operation.
    #[error("{argument}: given {given}; accepted {accepted}")]
    InvalidArgument {
        /// Which argument.
        argument: &'static str,
        /// What was passed.
        given: String,
        /// What would have been accepted.
        accepted: String,
    },
    /// A valid request that no kernel on this device answers.
    #[error("{0}")]
    Unsupported(Box<Unsupported>),
    /// The CUDA driver library is not installed or cannot be loaded.
    #[error("CUDA driver not found: {detail}; install the NVIDIA driver, or use the CPU backend (Runtime::cpu)")]
    DriverNotFound {
        /// What the loader said.
        detail: String,
    },
    /// The driver lacks a function that the runtime needs.
    #[error("CUDA driver too old: {detail}; FlashCore needs a driver for CUDA {needed} or newer")]
    DriverTooOld {
        /// What is missing.
        detail: String,
        /// The lowest CUDA version that has it.
        needed: &'static str,
    },
    /// The driver is there, but no device with this ordinal.
    #[error("no CUDA device {ordinal}: the driver reports {count} device(s)")]
    NoDevice {
        /// The ordinal asked for.
        ordinal: u32,
        /// How many devices there are.
        count: u32,
    },
    /// No bundle holds code for the device's architecture.
    #[error("no bundle for {device} (compute capability {major}.{minor}); bundles present: {present}")]
    NoBundle {
        /// The device's name.
        device: String,
        /// Compute capability, major.
        major: u32,
        /// Compute capability, minor.
        minor: u32,
        /// Architectures for which there is a bundle.
        present: String,
    },
    /// A bundle is corrupt, truncated, or for something else.
    #[error("bundle: {0}")]
    Bundle(#[from] BundleError),
    /// Device memory is exhausted.
    #[error("out of device memory: {requested} bytes requested")]
    OutOfMemory {
        /// Bytes requested.
        requested: usize,
    },
    /// The CUDA context hit an error that it cannot recover from (an illegal address, say). Every later call on the
    /// device fails; the process must be restarted.
    #[error("CUDA context lost: {call} returned {name} ({code}); restart the process")]
    ContextLost {
        /// The driver function.
        call: &'static str,
        /// `CUresult` as a number.
        code: u32,
        /// `CUresult` by name.
        name: String,
    },
    /// Any other failure of a driver call.
    #[error("{call} returned {name} ({code})")]
    Driver {
        /// The driver function.
        call: &'static str,
        /// `CUresult` as a number.
        code: u32,
        /// `CUresult` by name.
        name: String,
    },
    /// A closure passed to the library panicked; the panic was contained and the operation undone.
    #[error("a callback panicked during {during}")]
    CallbackPanicked {
        /// The operation that ran the callback.
        during: &'static str,
    },
}

impl Error {
    /// An [`Error::InvalidArgument`].
    pub(crate) fn invalid(argument: &'static str, given: impl fmt::Display, accepted: impl fmt::Display) -> Self {
        Self::InvalidArgument { argument, given: given.to_string(), accepted: accepted.to_string() }
    }
}

/// A request that no kernel answers, with every candidate and the one reason it was rejected.
#[derive(Debug, Clone, PartialEq)]
pub struct Unsupported {
    /// The request in words.
    pub request: String,
    /// Each candidate and why it does not apply.
    pub rejected: Vec<(String, Rejection)>,
    /// The nearest change that would be supported.
    pub hint: String,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no kernel answers {}", self.request)?;
        for (name, reason) in &self.rejected {
            write!(f, "\n  {name}: {reason}")?;
        }
        write!(f, "\n  {}", self.hint)
    }
}

/// What is wrong with a bundle.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// The file does not start with the magic bytes.
    #[error("not a FlashCore bundle (bad magic)")]
    BadMagic,
    /// A container version this runtime does not read.
    #[error("container version {found}; this runtime reads version 1")]
    Version {
        /// The version found.
        found: u32,
    },
    /// The file is shorter or longer than its headers say.
    #[error("{what}: {found} bytes, expected {expected}")]
    Length {
        /// Which part.
        what: &'static str,
        /// Bytes present.
        found: u64,
        /// Bytes expected.
        expected: u64,
    },
    /// A section's hash does not match.
    #[error("{what}: sha256 mismatch (the bundle is corrupt)")]
    Hash {
        /// Which part.
        what: String,
    },
    /// A section does not decompress.
    #[error("{what}: {detail}")]
    Decompress {
        /// Which part.
        what: &'static str,
        /// The decoder's message.
        detail: String,
    },
    /// The manifest is not valid.
    #[error("manifest: {detail}")]
    Manifest {
        /// What is wrong.
        detail: String,
    },
    /// Code and manifest disagree about the parameter list.
    #[error("{variant}: {detail}")]
    Abi {
        /// The variant.
        variant: String,
        /// What differs.
        detail: String,
    },
    /// Only audited kernels were asked for, and this one is not.
    #[error(
        "{variant}: the constant-trace audit says {verdict} of its code, and only audited kernels were asked for; take a \
         bundle that passes it, or drop that option"
    )]
    NotAudited {
        /// The variant.
        variant: String,
        /// What the manifest says of it.
        verdict: String,
    },
    /// The bundle is for another architecture than the device.
    #[error("bundle is for {bundle}, the device is {device}")]
    ForeignArch {
        /// The bundle's architecture.
        bundle: String,
        /// The device's.
        device: String,
    },
}
