//! The Rust ways to make a call, for `benches/overhead.py` to measure among its own, in its process.

use std::cell::RefCell;

use flashcore::{Result, Runtime};

use crate::{Calls, Path, idle_runtime};

thread_local! {
    static CALLS: RefCell<Option<Calls>> = const { RefCell::new(None) };
}

/// Nanoseconds of the host for one of `count` calls made in the way of this number in [`Path::ALL`]: on the first GPU, or
/// without one on a driver that does nothing. NaN for a failure, which goes to stderr. The queue is emptied before.
#[expect(unsafe_code, reason = "a name for other languages, which nothing else has")]
#[unsafe(no_mangle)]
pub extern "C" fn flashcore_host_path(path: u32, count: u64) -> f64 {
    measure(path as usize, count).unwrap_or_else(|error| {
        #[expect(clippy::print_stderr, reason = "there is nobody else to tell")]
        {
            eprintln!("{error}");
        }
        f64::NAN
    })
}

fn measure(path: usize, count: u64) -> Result<f64> {
    let Some(&path) = Path::ALL.get(path) else { return Ok(f64::NAN) };
    CALLS.with_borrow_mut(|calls| {
        let calls = match calls {
            Some(calls) => calls,
            none => none.insert(Calls::new(Runtime::cuda(0).or_else(|_| idle_runtime())?)?),
        };
        Ok(calls.time(path, count)?.as_nanos() as f64 / count as f64)
    })
}
