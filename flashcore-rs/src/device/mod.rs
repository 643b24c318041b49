//! Devices, streams, buffers and graphs: asynchrony that safe code cannot misuse.
//!
//! One rule makes it sound. A buffer has a *home* stream: it is allocated and freed there. Work on another stream that
//! touches the buffer first waits for the home stream, and afterwards, even if it failed half-way, the home stream waits
//! for that work. So the home stream is always ordered after every use, a free on it comes after all of them, and a host
//! read through it sees them. A buffer for which the driver refuses every way to wait is never used or freed again.
//! Concurrent readers on different streams are serialised by this rule; give them copies, or foreign views
//! ([`crate::TensorView::from_raw`]) and order them yourself, where that matters.
//!
//! A capture is one stream's work and stands outside this order until its graph is launched, which follows the rule. So
//! while a stream is captured nothing waits for it, it waits for nothing, memory at home there is freed afterwards, and
//! no other thread uses it. `docs/safety.md` has the whole argument, `tests/asynchrony.rs` the proof on a driver that
//! checks the order of every access.

mod buffer;
mod graph;
mod loan;
#[cfg(feature = "validate")]
mod probe;
mod stream;

use std::sync::Arc;

pub use self::buffer::DeviceBuffer;
pub(crate) use self::buffer::{BufferInner, Captured, Few, enqueue};
pub use self::graph::Graph;
pub(crate) use self::loan::{Lender, LenderMut, Loan};
#[cfg(feature = "validate")]
pub(crate) use self::probe::{Probe, READING};
pub use self::stream::{Event, Stream};
use crate::driver::{ContextHandle, DeviceInfo, Driver};
use crate::error::{Error, Result};

/// A device's primary context and the driver it belongs to.
pub(crate) struct DeviceContext {
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) handle: ContextHandle,
    pub(crate) info: DeviceInfo,
}

impl DeviceContext {
    pub(crate) fn new(driver: Arc<dyn Driver>, ordinal: u32) -> Result<Arc<Self>> {
        let info = driver.device_info(ordinal)?;
        let handle = driver.retain_context(ordinal)?;
        Ok(Arc::new(Self { driver, handle, info }))
    }

    /// Whether both are the same device of the same driver.
    pub(crate) fn is(&self, other: &Self) -> bool {
        std::ptr::eq(self, other) || (self.info.ordinal == other.info.ordinal && self.same_driver(other))
    }

    /// Handles mean nothing to another driver.
    pub(crate) fn check_driver(&self, other: &Self) -> Result<()> {
        match self.same_driver(other) {
            true => Ok(()),
            false => Err(Error::invalid("stream", "a stream of another driver", "one driver")),
        }
    }

    fn same_driver(&self, other: &Self) -> bool {
        std::ptr::addr_eq(Arc::as_ptr(&self.driver), Arc::as_ptr(&other.driver))
    }
}

impl std::fmt::Debug for DeviceContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DeviceContext").field(&self.info).finish()
    }
}

/// Logs a failure where there is nobody to return it to.
pub(crate) fn log_drop_error(what: &str, result: Result<()>) {
    if let Err(error) = result {
        log::error!("while releasing {what}: {error}");
    }
}
