#![no_main]

// The disassembler's output is trusted as little as any other input: an error, never a panic.
libfuzzer_sys::fuzz_target!(|text: &str| drop(flashcore::audit::judge_listing(text)));
