//! What the cubin says about itself: how much code there is.

use std::collections::HashMap;

use object::read::elf::ElfFile64;
use object::{Endianness, Object as _, ObjectSection as _};

/// Bytes of code by kernel; empty if the file is no ELF of 64 bits.
pub fn code_bytes(cubin: &[u8]) -> HashMap<String, u64> {
    let Ok(file) = ElfFile64::<Endianness>::parse(cubin) else { return HashMap::new() };
    let named = |section: object::read::elf::ElfSection64<'_, '_, Endianness>| {
        let name = section.name().ok()?.strip_prefix(".text.")?.to_owned();
        Some((name, section.size()))
    };
    file.sections().filter_map(named).collect()
}
