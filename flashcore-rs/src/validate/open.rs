//! Runtimes for what the command line names.

use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use serde::de::DeserializeOwned;

use super::measure::Source;
use crate::runtime::Runtime;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Opens a device with the code that a source names.
///
/// # Errors
/// As [`RuntimeBuilder::build`](crate::runtime::RuntimeBuilder::build); when a file cannot be read.
pub(super) fn on_device(source: &Source, ordinal: u32) -> Result<Runtime> {
    let builder = Runtime::builder().ordinal(ordinal);
    let builder = match source {
        Source::Arch(arch) => builder.arch(arch),
        Source::Bundle(path) => {
            let bytes = read(path)?;
            // SAFETY: whoever names a bundle on the command line vouches for it, as for the program itself.
            #[expect(unsafe_code, reason = "kernels that the user names")]
            unsafe {
                builder.bundle(bytes)
            }
        }
        Source::Embedded | Source::Cpu | Source::Reference | Source::External(_) => builder,
    };
    Ok(builder.build()?)
}

/// What a JSON file says; the error names it.
pub(super) fn json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&read(path)?).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// The bytes of a file, uncompressed when its name ends with .gz; the error names it.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(path).and_then(|bytes| match path.extension() {
        Some(extension) if extension == "gz" => {
            let mut unzipped = Vec::new();
            GzDecoder::new(bytes.as_slice()).read_to_end(&mut unzipped).map(|_| unzipped)
        }
        _ => Ok(bytes),
    });
    bytes.map_err(|error| format!("{}: {error}", path.display()).into())
}
