//! The bundles that are part of the library.

/// `(architecture, file)`, one per GPU architecture.
pub(crate) const fn embedded() -> &'static [(&'static str, &'static [u8])] {
    &[("sm_90a", include_bytes!("../../bundle/sm_90a.fcb"))]
}
