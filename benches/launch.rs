//! What a call costs the host, by how much of it is new: on a driver that does nothing, and on a device.

use criterion::{Criterion, criterion_group, criterion_main};
use flashcore::Runtime;
use flashcore_benches::{Calls, Path, idle_runtime};

fn launch(criterion: &mut Criterion) {
    for (name, runtime) in [("idle", idle_runtime().ok()), ("cuda", Runtime::cuda(0).ok())] {
        let Some(runtime) = runtime else { continue };
        let mut calls = Calls::new(runtime).unwrap_or_else(|error| panic!("{error}"));
        let mut group = criterion.benchmark_group(format!("launch/{name}"));
        for path in Path::ALL {
            group.bench_function(path.name(), |bencher| {
                bencher.iter_custom(|count| calls.time(path, count).unwrap_or_else(|error| panic!("{error}")));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, launch);
criterion_main!(benches);
