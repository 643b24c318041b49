//! The container: two hashed, compressed sections behind a fixed header.

use std::io::Read;

use sha2::{Digest, Sha256};

use crate::error::BundleError;

const MAGIC: &[u8; 8] = b"FCBUNDLE";
const VERSION: u32 = 1;
const HEADER: usize = 112;
/// A bundle is a few MiB; a header that promises more is damaged or hostile.
const MAX_RAW: u64 = 256 << 20;

struct Section {
    name: &'static str,
    compressed: u64,
    raw: u64,
    sha256: [u8; 32],
}

/// Splits a bundle into its raw manifest and code sections.
pub(super) fn unpack(bytes: &[u8]) -> Result<(Vec<u8>, Vec<u8>), BundleError> {
    let Some((header, body)) = bytes.split_at_checked(HEADER) else {
        return Err(match bytes.starts_with(MAGIC) || bytes.is_empty() {
            true => length("header", bytes.len(), HEADER as u64),
            false => BundleError::BadMagic,
        });
    };
    if !header.starts_with(MAGIC) {
        return Err(BundleError::BadMagic);
    }
    let version = u32::from_le_bytes(array(header, 8));
    if version != VERSION {
        return Err(BundleError::Version { found: version });
    }
    if array::<4>(header, 12) != [0; 4] {
        return Err(BundleError::Manifest { detail: "reserved header bytes are not zero".into() });
    }
    let manifest = section("manifest section", header, 16);
    let code = section("code section", header, 64);
    let expected = manifest.compressed.saturating_add(code.compressed);
    if body.len() as u64 != expected {
        return Err(length("body", body.len(), expected));
    }
    let (manifest_bytes, code_bytes) = body.split_at(manifest.compressed as usize);
    Ok((manifest.unpack(manifest_bytes)?, code.unpack(code_bytes)?))
}

/// Packs sections that [`unpack`] gives back; for tests, since bundles are made by `kernels/bundle.py`.
pub(crate) fn pack(manifest: &[u8], code: &[u8]) -> Vec<u8> {
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    let sections = [manifest, code].map(|raw| (raw, compress_to_vec(raw, CompressionLevel::Fastest)));
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0; 4]);
    for (raw, compressed) in &sections {
        bytes.extend((compressed.len() as u64).to_le_bytes());
        bytes.extend((raw.len() as u64).to_le_bytes());
        bytes.extend(Sha256::digest(raw));
    }
    sections.iter().for_each(|(_, compressed)| bytes.extend(compressed));
    bytes
}

fn section(name: &'static str, header: &[u8], at: usize) -> Section {
    Section {
        name,
        compressed: u64::from_le_bytes(array(header, at)),
        raw: u64::from_le_bytes(array(header, at + 8)),
        sha256: array(header, at + 16),
    }
}

impl Section {
    fn unpack(&self, compressed: &[u8]) -> Result<Vec<u8>, BundleError> {
        if self.raw > MAX_RAW {
            return Err(BundleError::Length { what: self.name, found: self.raw, expected: MAX_RAW });
        }
        let fail = |detail: String| BundleError::Decompress { what: self.name, detail };
        let decoder = ruzstd::decoding::StreamingDecoder::new(compressed).map_err(|e| fail(e.to_string()))?;
        let mut raw = Vec::new();
        // One byte more than promised, so that a longer stream is noticed without being unpacked.
        decoder.take(self.raw + 1).read_to_end(&mut raw).map_err(|e| fail(e.to_string()))?;
        if raw.len() as u64 != self.raw {
            return Err(length(self.name, raw.len(), self.raw));
        }
        if Sha256::digest(&raw).as_slice() != self.sha256 {
            return Err(BundleError::Hash { what: self.name.into() });
        }
        Ok(raw)
    }
}

fn length(what: &'static str, found: usize, expected: u64) -> BundleError {
    BundleError::Length { what, found: found as u64, expected }
}

/// `N` bytes at `at`; the caller has checked that the header is long enough.
fn array<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&header[at..at + N]);
    out
}
