//! FlashCore: attention for NVIDIA GPUs as finished machine code.
//!
//! Kernels are compiled ahead of time and carried in the library; this crate chooses one, checks that the call honours
//! what it takes for granted, and launches it. There is no nvcc, no JIT and no libtorch. Without a GPU the same calls
//! run on the CPU.
//!
//! ```
//! use flashcore::{Runtime, TensorView, TensorViewMut};
//!
//! # fn main() -> flashcore::Result<()> {
//! let shape = [1, 2, 5, 8]; // (batch, heads, seq, head_dim)
//! let (q, k, v) = (vec![0.1f32; 80], vec![0.2f32; 80], vec![0.3f32; 80]);
//! let mut out = vec![0f32; 80];
//! Runtime::cpu()
//!     .attention(
//!         &TensorView::from_slice(&q, &shape)?,
//!         &TensorView::from_slice(&k, &shape)?,
//!         &TensorView::from_slice(&v, &shape)?,
//!     )
//!     .causal(true)
//!     .run(&mut TensorViewMut::from_slice(&mut out, &shape)?)?;
//! assert!((out[0] - 0.3).abs() < 1e-6);
//! # Ok(())
//! # }
//! ```

pub mod attention;
#[cfg(feature = "audit")]
pub mod audit;
pub mod bundle;
pub mod cpu;
mod device;
#[allow(unsafe_code, reason = "the boundary to CUDA")]
mod driver;
mod dtype;
mod error;
#[cfg(feature = "cuda")]
pub mod interop;
mod runtime;
mod tensor;
#[doc(hidden)]
pub mod testing;
#[cfg(feature = "validate")]
pub mod validate;

pub use self::attention::{
    Attention, AttentionOptions, CausalAlign, Explanation, LastPlan, Plan, PreparedCall, Problem, Rejection, Window,
    last_plan,
};
pub use self::device::{DeviceBuffer, Event, Graph, Stream};
pub use self::driver::DeviceInfo;
pub use self::dtype::{DType, Element};
pub use self::error::{BundleError, Error, Result, Unsupported};
pub use self::runtime::{Runtime, RuntimeBuilder};
pub use self::tensor::{Device, Layout, TensorView, TensorViewMut};
