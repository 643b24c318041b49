//! Device memory that another library owns and lends for a call, in safe code.
//!
//! A lender has a home stream as buffers have: it is ordered there with every other use that it allows. So a call waits
//! for the home stream before, the home stream waits for the call afterwards, and then the loan ends.

use std::fmt::Debug;

use super::{DeviceContext, Few, Stream};
use crate::driver::StreamHandle;
use crate::error::{Error, Result};

/// Memory to read.
///
/// Implemented in this crate only: the runtime believes what an implementation says.
pub(crate) trait Lender: Debug + Send + Sync {
    /// Lends the memory: everything that must come before a read is ordered on the home stream.
    fn lend(&self) -> Loan<'_>;
}

/// Memory to write.
pub(crate) trait LenderMut: Lender {
    /// Lends the memory: everything that must come before a write is ordered on the home stream.
    fn lend_mut(&mut self) -> Loan<'_>;
}

/// Memory on loan. What follows on the home stream follows the use once this is dropped.
pub(crate) struct Loan<'a> {
    /// The home stream (`CUstream`), which outlives the loan.
    pub(crate) home: u64,
    /// The context (`CUcontext`) of the memory and the stream.
    pub(crate) context: u64,
    /// Ends the loan when it drops.
    #[expect(dead_code, reason = "held for its drop")]
    pub(crate) guard: Box<dyn Guard + 'a>,
}

/// Anything that does its work by being dropped.
pub(crate) trait Guard {}

impl<T> Guard for T {}

impl Loan<'_> {
    /// The home streams of loans, each once.
    pub(crate) fn homes(loans: &[Self], context: &std::sync::Arc<DeviceContext>) -> Result<Few<Stream>> {
        if loans.iter().any(|loan| loan.context != context.handle.0) {
            let given = "memory of another context of the device";
            return Err(Error::invalid("buffer", given, "memory of the device's primary context"));
        }
        let mut homes: Few<u64> = loans.iter().map(|loan| loan.home).collect();
        homes.sort_unstable();
        homes.dedup();
        homes.into_iter().map(|home| Stream::foreign(context.clone(), StreamHandle(home), None)).collect()
    }
}
