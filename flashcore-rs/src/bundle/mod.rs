//! Bundles: finished machine code and the manifest that says how to launch it. The format is in `docs/bundle.md`.

mod container;
#[cfg(feature = "cuda")]
mod embedded;
pub mod manifest;

use sha2::{Digest, Sha256};

pub(crate) use self::container::pack;
pub use self::manifest::{Manifest, Variant};
use crate::error::BundleError;

/// The bundles that are part of the library, as `(architecture, file)`; none without the `cuda` feature.
pub fn embedded() -> &'static [(&'static str, &'static [u8])] {
    #[cfg(feature = "cuda")]
    return self::embedded::embedded();
    #[cfg(not(feature = "cuda"))]
    return &[];
}

/// A parsed and verified bundle.
#[derive(Debug)]
pub struct Bundle {
    manifest: Manifest,
    code: Vec<u8>,
}

impl Bundle {
    /// Parses a bundle and checks every hash, length and name in it.
    ///
    /// # Errors
    /// [`BundleError`]; hostile input is an error, never a panic.
    pub fn parse(bytes: &[u8]) -> Result<Self, BundleError> {
        let (manifest, code) = container::unpack(bytes)?;
        let manifest = Manifest::parse(&manifest)?;
        let bundle = Self { manifest, code };
        for variant in &bundle.manifest.variants {
            for launch in &variant.launches {
                let member = bundle.member(&launch.code).ok_or_else(|| BundleError::Manifest {
                    detail: format!("{}: code lies outside the code section", variant.name),
                })?;
                if sha256_hex(member) != launch.code.sha256 {
                    return Err(BundleError::Hash { what: variant.name.clone() });
                }
            }
        }
        Ok(bundle)
    }

    /// What the bundle holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The bytes of one member; `None` when they lie outside the code section.
    pub fn member(&self, code: &manifest::Code) -> Option<&[u8]> {
        let start = usize::try_from(code.offset).ok()?;
        let len = usize::try_from(code.len).ok()?;
        self.code.get(start..start.checked_add(len)?)
    }
}

pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
