//! `host-path [ROUNDS]`: what a call costs the host from Rust, as one line of JSON: nanoseconds a call of every path, round
//! by round, the paths in turn within a round. For machines without cargo; `benches/overhead.py` reads it.

use std::process::ExitCode;

use flashcore::{Result, Runtime};
use flashcore_benches::{BATCH, Calls, Path, SHAPE, idle_runtime};

fn measure(runtime: Runtime, rounds: usize) -> Result<String> {
    let device = runtime.device_info().map(|info| info.name.clone()).unwrap_or_default();
    let mut calls = Calls::new(runtime)?;
    let kernel = calls.kernel()?;
    let mut figures: [Vec<String>; Path::ALL.len()] = Default::default();
    for round in 0..rounds + 2 {
        for (figures, path) in figures.iter_mut().zip(Path::ALL) {
            let nanoseconds = calls.time(path, BATCH)?.as_nanos() as f64 / BATCH as f64;
            // The first rounds warm caches and clocks.
            if round >= 2 {
                figures.push(format!("{nanoseconds:.1}"));
            }
        }
    }
    let paths: Vec<_> = Path::ALL
        .iter()
        .zip(&figures)
        .map(|(path, figures)| format!(r#""{}": [{}]"#, path.name(), figures.join(", ")))
        .collect();
    let head = format!(r#""device": "{device}", "kernel": "{kernel}", "shape": {SHAPE:?}, "calls": {BATCH}"#);
    Ok(format!(r#"{{{head}, "paths": {{{}}}}}"#, paths.join(", ")))
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "a program")]
fn main() -> ExitCode {
    let rounds = std::env::args().nth(1).and_then(|rounds| rounds.parse().ok()).unwrap_or(200);
    let runtime = Runtime::cuda(0).or_else(|error| {
        eprintln!("{error}; measuring on a driver that does nothing");
        idle_runtime()
    });
    match runtime.and_then(|runtime| measure(runtime, rounds)) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
