//! A recording driver over host memory.

/// To be written.
#[derive(Debug, Default)]
pub struct MockDriver;
