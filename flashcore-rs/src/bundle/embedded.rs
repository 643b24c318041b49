//! The bundles that are part of the library.

macro_rules! bundles {
    ($($arch:literal),* $(,)?) => {
        &[$(($arch, include_bytes!(concat!("../../bundle/", $arch, ".fcb")))),*]
    };
}

/// `(architecture, file)`, one per GPU architecture.
pub(crate) const fn embedded() -> &'static [(&'static str, &'static [u8])] {
    bundles!["sm_80", "sm_86", "sm_90a", "sm_100a", "sm_120a", "compute_80"]
}
