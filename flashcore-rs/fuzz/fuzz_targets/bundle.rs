#![no_main]

#[allow(dead_code)]
#[path = "../../tests/shared/fuzz.rs"]
mod fuzz;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::bundle(data));
