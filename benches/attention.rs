//! Attention on the device and on the CPU backend: whole calls, and on a device single launches by events.
//!
//! For comparisons with other libraries see `first_light.py`, which measures in one process, interleaved.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use flashcore::validate::{Arm, Case, classic};
use flashcore::{Device, Runtime};
use flashcore_benches::total;

fn attention(criterion: &mut Criterion) {
    let cpu = Runtime::cpu();
    let runtimes = [Runtime::cuda(0).ok(), Some(cpu)];
    for runtime in runtimes.iter().flatten() {
        let on_cpu = runtime.device() == Device::Cpu;
        // A call of the largest ones takes the CPU a second.
        for case in classic().iter().filter(|case| !on_cpu || case.batch == 8) {
            bench(criterion, runtime, case);
        }
    }
}

fn bench(criterion: &mut Criterion, runtime: &Runtime, case: &Case) {
    let mut group = criterion.benchmark_group(format!("attention/{}", runtime.device()));
    let flops = 4 * (case.batch * case.num_heads_q * case.seq_len_q * case.seq_len_k * case.head_dim_qk) as u64;
    group.sample_size(10).throughput(Throughput::Elements(flops));
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

criterion_group!(benches, attention);
criterion_main!(benches);
