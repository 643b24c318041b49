//! The library's messages go to Python's logger `flashcore`.

use std::ffi::CString;

use log::{Level, LevelFilter, Log, Metadata, Record};
use pyo3::prelude::*;

struct PythonLogger;

impl Log for PythonLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        let level = match record.level() {
            Level::Error => 40,
            Level::Warn => 30,
            Level::Info => 20,
            Level::Debug | Level::Trace => 10,
        };
        // Not while the interpreter ends. A logger that raises has nobody to tell.
        Python::try_attach(|py| {
            let logger = py.import("logging").and_then(|logging| logging.call_method1("getLogger", ("flashcore",)));
            let outcome =
                logger.and_then(|logger| logger.call_method1("log", (level, "%s", record.args().to_string())));
            outcome.err().map(|error| error.write_unraisable(py, None))
        });
    }

    fn flush(&self) {}
}

/// Starts passing messages on: those of this level and above, by its name in `FLASHCORE_LOG`.
#[pyfunction]
pub(crate) fn start_logging(level: &str) -> PyResult<()> {
    let Ok(level) = level.parse::<LevelFilter>() else {
        let message = CString::new(format!("FLASHCORE_LOG={level}: one of off, error, warn, info, debug"))?;
        return Python::attach(|py| PyErr::warn(py, &py.get_type::<pyo3::exceptions::PyUserWarning>(), &message, 1));
    };
    // Another logger is there only when this module was loaded twice.
    _ = log::set_logger(&PythonLogger);
    log::set_max_level(level);
    Ok(())
}
