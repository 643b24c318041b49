//! `count-calls PATH CALLS`: makes calls on a driver that does nothing, for `.ci/instructions.py` to count instructions.

use std::process::ExitCode;

use flashcore_benches::{Calls, Path, idle_runtime};

#[expect(clippy::print_stderr, reason = "a program")]
fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    let path = Path::ALL.into_iter().find(|path| path.name() == name);
    let count = arguments.next().and_then(|count| count.parse().ok());
    let (Some(path), Some(count)) = (path, count) else {
        eprintln!("count-calls raw|prepared|repeated|first_seen CALLS");
        return ExitCode::FAILURE;
    };
    match idle_runtime().and_then(Calls::new).and_then(|mut calls| calls.time(path, count)) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
