//! Attention on the CPU: the operation itself where there is no GPU, and the references that every kernel is judged by.
//!
//! The CPU backend is not constant-trace: it skips work that a mask or a non-finite value makes unnecessary.

pub(crate) mod attention;
mod judge;
pub mod oracle;
mod real;

pub(crate) use self::attention::{HostInputs, attention};

#[cfg(test)]
mod tests;
