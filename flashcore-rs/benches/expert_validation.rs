//! The nine configurations under criterion: whole calls, and on a device single launches by events.
//!
//! For looking around while a kernel changes. Criterion takes samples for independent and has one process, so verdicts
//! are those of `flashcore-validate compare`.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use flashcore::validate::{Arm, Case, classic, flops};
use flashcore::{Device, Result, Runtime};

/// The time of `iterations` measurements, each in microseconds. A benchmark has nobody to tell of a failure but the user.
fn total(iterations: u64, mut microseconds: impl FnMut() -> Result<f64>) -> Duration {
    let total: f64 =
        (0..iterations).map(|_| microseconds().unwrap_or_else(|error| panic!("while measuring: {error}"))).sum();
    Duration::from_secs_f64(total / 1e6)
}

fn expert_validation(criterion: &mut Criterion) {
    let runtimes = [Runtime::cuda(0).ok(), Some(Runtime::cpu())];
    for runtime in runtimes.iter().flatten() {
        let on_cpu = runtime.device() == Device::Cpu;
        // A call of the largest ones takes the CPU a second.
        for case in classic().iter().filter(|case| !on_cpu || case.batch == 8) {
            bench(criterion, runtime, case);
        }
    }
}

fn bench(criterion: &mut Criterion, runtime: &Runtime, case: &Case) {
    let mut group = criterion.benchmark_group(format!("expert_validation/{}", runtime.device()));
    group.sample_size(10).throughput(Throughput::Elements(flops(case) as u64));
    let name = format!("S{}B{}", case.seq_len_q, case.batch);
    let mut arm = Arm::new(runtime, case, 0).unwrap_or_else(|error| panic!("{case}: {error}"));
    group.bench_function(BenchmarkId::new("call", &name), |bencher| {
        bencher.iter_custom(|iterations| total(iterations, || arm.whole_call()));
    });
    if runtime.device() != Device::Cpu {
        group.bench_function(BenchmarkId::new("launch", &name), |bencher| {
            bencher.iter_custom(|iterations| total(iterations, || Ok(arm.launch_time()?.unwrap_or_default())));
        });
    }
    group.finish();
}

criterion_group!(benches, expert_validation);
criterion_main!(benches);
