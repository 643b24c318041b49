//! Checks and measures FlashCore on this machine; see [`flashcore::validate`].

use std::process::ExitCode;

fn main() -> ExitCode {
    flashcore::validate::cli::main(std::env::args_os()).into()
}
