//! Worker threads that survive `fork`.
//!
//! A child process inherits the memory of rayon's global pool and none of its threads, so that it would wait for them
//! forever. A child that computes gets a pool of its own.

use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use flashcore::Error;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rayon::ThreadPool;

use crate::errors::invalid;

static FORKED: AtomicBool = AtomicBool::new(false);
static POOL: AtomicPtr<ThreadPool> = AtomicPtr::new(std::ptr::null_mut());

/// Asks Python to tell us about forks.
pub(crate) fn watch_forks(py: Python<'_>) -> PyResult<()> {
    let hooks = PyDict::new(py);
    hooks.set_item("after_in_child", wrap_pyfunction!(forked, py)?)?;
    py.import("os")?.call_method("register_at_fork", (), Some(&hooks))?;
    Ok(())
}

#[pyfunction]
fn forked() {
    FORKED.store(true, Ordering::Relaxed);
    POOL.store(std::ptr::null_mut(), Ordering::Relaxed);
}

/// The threads of this process; `None` is rayon's global pool.
pub(crate) fn pool() -> Result<Option<&'static ThreadPool>, Error> {
    if !FORKED.load(Ordering::Relaxed) {
        return Ok(None);
    }
    let mut pool = POOL.load(Ordering::Acquire);
    if pool.is_null() {
        let threads = rayon::ThreadPoolBuilder::new().build();
        let threads = threads.map_err(|error| invalid("threads", error, "a process that may start threads"))?;
        let ours = Box::into_raw(Box::new(threads));
        // Where two threads come first, one pool is never used; it costs idle threads once in a child's life.
        let placed = POOL.compare_exchange(std::ptr::null_mut(), ours, Ordering::AcqRel, Ordering::Acquire);
        pool = placed.map_or_else(|other| other, |_| ours);
    }
    #[expect(unsafe_code, reason = "a pool that is never freed")]
    // SAFETY: the pointer comes from a box above, in this process, and is never freed.
    unsafe {
        Ok(pool.as_ref())
    }
}
