//! What a call costs the host: checks, choice of kernel, plan, parameters, and the driver where there is one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use flashcore::Runtime;
use flashcore::testing::{MockConfig, MockDriver, sample_bundle, with_bundle};
use flashcore::validate::{Arm, Case};

/// Calls before the queue is emptied, or the recording driver replaced.
const BATCH: u64 = 512;

fn case() -> Case {
    let mut case = Case::new("bench", [8, 8], [128, 128], 64);
    case.lse = false;
    case
}

/// The time of `iterations` calls that only queue work. The queue is emptied outside of it, before it is full.
fn enqueue(runtime: &Runtime, iterations: u64) -> Duration {
    let mut arm = Arm::new(runtime, &case(), 0).unwrap_or_else(|error| panic!("{error}"));
    let mut total = Duration::ZERO;
    for first in (0..iterations).step_by(BATCH as usize) {
        let start = Instant::now();
        for _ in first..iterations.min(first + BATCH) {
            arm.call().unwrap_or_else(|error| panic!("{error}"));
        }
        total += start.elapsed();
        let emptied = runtime.stream().and_then(flashcore::Stream::synchronize);
        emptied.unwrap_or_else(|error| panic!("{error}"));
    }
    total
}

/// A runtime on a driver that only takes notes; they are part of the time.
fn mock() -> Runtime {
    let driver = Arc::new(MockDriver::new(MockConfig { computes: false, ..MockConfig::default() }));
    with_bundle(Runtime::builder(), &driver, sample_bundle()).build().unwrap_or_else(|error| panic!("{error}"))
}

fn launch(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("launch");
    group.bench_function("mock", |bencher| {
        bencher.iter_custom(|iterations| {
            // The notes grow, so no driver takes many.
            (0..iterations).step_by(BATCH as usize).map(|first| enqueue(&mock(), BATCH.min(iterations - first))).sum()
        });
    });
    if let Ok(runtime) = Runtime::cuda(0) {
        group.bench_function("cuda", |bencher| bencher.iter_custom(|iterations| enqueue(&runtime, iterations)));
    }
    group.finish();
}

criterion_group!(benches, launch);
criterion_main!(benches);
