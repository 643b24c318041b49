//! From views to launches: which kernel runs, and every parameter it gets.

use std::sync::Arc;

use flashcore::bundle::Bundle;
use flashcore::testing::{self, Argument, Entry, LaunchRecord, MockConfig, MockDriver};
use flashcore::{
    AttentionOptions, BundleError, CausalAlign, DType, DeviceBuffer, Error, Rejection, Result, Runtime, TensorView,
    TensorViewMut, Window,
};

use crate::support::{
    Call, Form, Operand, assert_sound, devices, mock, runtime, split_keys, tuned, two_launches, with_bundle,
};

/// Runs a call on a fresh mock and gives the one launch that it makes.
fn launched(call: &Call) -> LaunchRecord {
    let (driver, runtime) = mock();
    call.assert_same(&runtime);
    assert_sound(&driver);
    let [launch] = <[LaunchRecord; 1]>::try_from(driver.launches()).expect("one launch");
    launch
}

#[track_caller]
fn assert_integers(launch: &LaunchRecord, expected: &[(&str, i64)]) {
    for (name, value) in expected {
        assert_eq!(launch.arguments.get(name), Some(Argument::Integer(*value)), "{name}");
    }
}

fn pointer(launch: &LaunchRecord, name: &str) -> u64 {
    match launch.arguments.get(name) {
        Some(Argument::Pointer(address)) => address,
        other => panic!("{name} is {other:?}"),
    }
}

#[test]
fn a_portable_kernel_gets_every_quantity() {
    let mut call = Call::new(DType::F16, [2, 6, 70, 40], [2, 3, 90, 40], 24).with_lse();
    // Query and output as (batch, seq, heads, dim), rows two elements apart; a mask that broadcasts over heads.
    call.query = Operand::new(DType::F16, [2, 6, 70, 40], Form { order: [0, 2, 1], padding: 2, offset: 1 }, 6);
    call.out = Operand::new(DType::F16, [2, 6, 70, 24], Form { order: [0, 2, 1], padding: 0, offset: 3 }, 7).poison();
    call.attn_mask = Some(Operand::with_strides(DType::F32, [2, 1, 70, 90], [6300, 0, 90, 1], 0, 8));
    call.options = AttentionOptions {
        causal: true,
        causal_align: CausalAlign::BottomRight,
        window: Some(Window { left: Some(30), right: None }),
        scale: Some(-0.3),
    };
    let launch = launched(&call);
    assert_eq!(launch.variant.as_deref(), Some("portable.f16.f32.band.2"));
    assert_eq!(launch.kernel, "attention_forward_portable");
    assert_eq!((launch.grid, launch.block_threads, launch.cluster), ([2 * 6 * 2, 1, 1], 128, 1));
    assert_eq!((launch.shared_bytes, launch.captured), (98304, false));
    assert_integers(
        &launch,
        &[
            ("q.stride.batch", 70 * 6 * 42),
            ("q.stride.head", 42),
            ("q.stride.seq", 6 * 42),
            ("k.stride.batch", 3 * 90 * 40),
            ("k.stride.head", 90 * 40),
            ("k.stride.seq", 40),
            ("v.stride.batch", 3 * 90 * 24),
            ("v.stride.head", 90 * 24),
            ("v.stride.seq", 24),
            ("out.stride.batch", 70 * 6 * 24),
            ("out.stride.head", 24),
            ("out.stride.seq", 6 * 24),
            ("attn_mask.stride.batch", 6300),
            ("attn_mask.stride.head", 0),
            ("attn_mask.stride.query", 90),
            ("attn_mask.stride.key", 1),
            ("num_heads_q", 6),
            ("group", 2),
            ("seq_len_q", 70),
            ("seq_len_k", 90),
            ("head_dim_qk", 40),
            ("head_dim_v", 24),
            ("band_lo", 20 - 30),
            ("band_hi", 20),
        ],
    );
    assert_eq!(launch.arguments.get("scale"), Some(Argument::Real(-0.3)));
    assert_eq!(pointer(&launch, "q") % 16, 2, "one element after the start of an allocation");
    assert_eq!(pointer(&launch, "out") % 16, 6);
    assert_ne!(pointer(&launch, "lse"), 0);
    assert_ne!(pointer(&launch, "attn_mask"), 0);
    assert_eq!(launch.arguments.iter().filter(|argument| *argument == Argument::Scratch(0)).count(), 2);
}

#[test]
fn a_tensor_map_kernel_gets_descriptors() {
    let mut call = Call::new(DType::BF16, [3, 4, 100, 64], [3, 2, 130, 64], 64);
    call.key = Operand::new(DType::BF16, [3, 2, 130, 64], Form { order: [0, 2, 1], padding: 8, offset: 16 }, 6);
    call.options.scale = Some(0.125);
    let launch = launched(&call);
    assert_eq!(launch.variant.as_deref(), Some("hopper.bf16.none.dense.16"));
    // 2 tiles x 4 heads x 3 batches; a persistent grid stops at the number of multiprocessors.
    assert_eq!(launch.grid, [24, 1, 1]);
    let Some(Argument::TensorMap(map)) = launch.arguments.get("k") else { panic!("no descriptor") };
    assert_eq!(map.dtype, DType::BF16);
    assert_eq!(map.dims, [64, 130, 2, 3]);
    assert_eq!(map.strides, [2 * 72 * 2, 72 * 2, 130 * 2 * 72 * 2]);
    assert_eq!((map.box_dims, map.swizzle), ([64, 128, 1, 1], 128));
    assert_eq!(map.address % 512, 32);
    assert_integers(
        &launch,
        &[
            ("num_tiles", 24),
            ("tiles_query", 2),
            ("k.shape.batch", 3),
            ("k.shape.head", 2),
            ("k.shape.seq", 130),
            ("k.shape.dim", 64),
            ("k.stride.seq", 144),
            ("k.stride.head", 72),
            ("k.stride.batch", 130 * 144),
            ("k.stride.dim", 1),
        ],
    );
    assert_eq!(launch.arguments.get("scale_log2"), Some(Argument::Real(0.125 * std::f32::consts::LOG2_E)));
    assert_eq!(pointer(&launch, "lse"), 0, "nobody asked for it");
}

#[test]
fn a_persistent_grid_is_no_larger_than_the_device() {
    let launch = launched(&Call::new(DType::F16, [2, 2, 64 * 40, 8], [2, 2, 8, 8], 8));
    assert_eq!(launch.grid, [132, 1, 1]);
    assert_integers(&launch, &[("num_tiles", 160)]);
}

#[test]
fn a_dense_call_on_a_banded_kernel_sees_everything() {
    let mut call = Call::new(DType::F16, [1, 1, 7, 6], [1, 1, 9, 6], 6);
    call.key.strides[2] = 6;
    let launch = launched(&call);
    assert_eq!(launch.variant.as_deref(), Some("portable.f16.none.band.2"), "rows of 12 bytes: no tensor maps");
    assert_integers(&launch, &[("band_lo", -7), ("band_hi", 9)]);
}

#[test]
fn plans_are_made_once_per_geometry() -> Result<()> {
    let (driver, runtime) = mock();
    let call = Call::new(DType::F16, [1, 2, 9, 16], [1, 2, 9, 16], 16);
    for _ in 0..3 {
        call.clone().on_device(&runtime)?;
    }
    assert_eq!((driver.count(Entry::LoadModule), driver.count(Entry::Function)), (1, 1));
    assert_eq!(driver.launches().len(), 3);
    // The same geometry from addresses that are less aligned must not reuse the plan.
    let mut shifted = call.clone();
    shifted.query = Operand::new(DType::F16, [1, 2, 9, 16], Form { offset: 1, ..Form::CONTIGUOUS }, 1);
    shifted.assert_same(&runtime);
    let variants: Vec<_> = driver.launches().into_iter().map(|launch| launch.variant).collect();
    assert_ne!(variants.first(), variants.last());
    assert_eq!(driver.count(Entry::LoadModule), 2);
    assert_sound(&driver);
    Ok(())
}

#[test]
fn a_plan_made_ahead_spares_the_call_its_module() -> Result<()> {
    let (driver, runtime) = mock();
    let problem = flashcore::Problem {
        dtype: DType::F16,
        batch: 1,
        num_heads_q: 2,
        num_heads_kv: 2,
        seq_len_q: 9,
        seq_len_k: 9,
        head_dim_qk: 16,
        head_dim_v: 16,
        q_strides: [288, 144, 16, 1],
        k_strides: [288, 144, 16, 1],
        v_strides: [288, 144, 16, 1],
        out_strides: [288, 144, 16, 1],
        attn_mask: None,
        band: None,
        scale_bits: 0.25f32.to_bits(),
        lse: false,
    };
    let plan = runtime.plan(&problem)?;
    assert_eq!(plan.variant(), "hopper.f16.none.dense.16");
    assert_eq!(driver.count(Entry::LoadModule), 1);
    Call::new(DType::F16, [1, 2, 9, 16], [1, 2, 9, 16], 16).on_device(&runtime)?;
    assert_eq!(driver.count(Entry::LoadModule), 1);

    // A problem is plain data, and may say anything.
    for broken in [
        flashcore::Problem { q_strides: [-1, 144, 16, 1], ..problem },
        flashcore::Problem { q_strides: [i64::MAX, i64::MAX, i64::MAX, 1], seq_len_q: 1 << 30, ..problem },
        flashcore::Problem { batch: usize::MAX, ..problem },
        flashcore::Problem { num_heads_kv: 0, ..problem },
        flashcore::Problem { head_dim_qk: 257, ..problem },
        flashcore::Problem { scale_bits: f32::NAN.to_bits(), ..problem },
        flashcore::Problem { v_strides: [288, 144, 16, 2], ..problem },
    ] {
        assert!(matches!(runtime.plan(&broken), Err(Error::InvalidArgument { .. })), "{broken:?}");
    }
    Ok(())
}

#[test]
fn threads_load_a_module_once() -> Result<()> {
    let (driver, runtime) = mock();
    let call = Call::new(DType::F16, [1, 2, 9, 16], [1, 2, 9, 16], 16);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| call.clone().on_device(&runtime))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })?;
    assert_eq!(driver.count(Entry::LoadModule), 1);
    assert_sound(&driver);
    Ok(())
}

#[test]
fn a_module_may_be_loaded_during_a_capture() -> Result<()> {
    let (driver, runtime) = mock();
    let stream = runtime.new_stream()?;
    let inputs = DeviceBuffer::filled(&stream, 256, 0)?;
    let mut out = DeviceBuffer::filled(&stream, 256, 0xff)?;
    let shape = [1, 1, 8, 16];
    let graph = stream.capture(|| {
        let view = TensorView::from_buffer(&inputs, DType::F16, &shape)?;
        let mut out = TensorViewMut::from_buffer(&mut out, DType::F16, &shape)?;
        runtime.attention(&view, &view, &view).on(&stream).run(&mut out)
    })?;
    assert_eq!(driver.count(Entry::LoadModule), 1);
    assert!(driver.launches()[0].captured);
    assert!(out.to_vec::<u8>()?.iter().all(|&byte| byte == 0xff), "not launched yet");
    graph.launch(&stream)?;
    assert!(out.to_vec::<u8>()?.iter().all(|&byte| byte == 0));
    assert_sound(&driver);
    Ok(())
}

/// A runtime whose bundle declares other parameters than the code, as the mock knows it, has.
fn with_wrong_params(driver_version: u32, change: impl Fn(&mut Vec<serde_json::Value>)) -> Result<()> {
    let mut config = MockConfig::default();
    config.devices[0].driver_version = driver_version;
    let driver = Arc::new(MockDriver::new(config));
    driver.learn(Bundle::parse(&testing::sample_bundle())?.manifest());
    let (mut manifest, code) = testing::sample();
    for variant in manifest["variants"].as_array_mut().expect("variants") {
        change(variant["launches"][0]["params"].as_array_mut().expect("params"));
    }
    let bundle = testing::pack(manifest.to_string().as_bytes(), &code);
    let runtime = testing::with_bundle(Runtime::builder(), &driver, bundle).build()?;
    let result = Call::new(DType::F16, [1, 1, 8, 16], [1, 1, 8, 16], 16).on_device(&runtime);
    if result.is_err() {
        assert_eq!(driver.launches(), [], "refused before anything ran");
    }
    result
}

#[test]
fn code_and_manifest_must_agree_about_parameters() {
    let abi = |detail: &str| {
        let variant = "hopper.f16.none.dense.16".to_owned();
        Err(Error::Bundle(BundleError::Abi { variant, detail: detail.into() }))
    };
    let swap = |params: &mut Vec<serde_json::Value>| params.swap(0, 1);
    assert_eq!(with_wrong_params(13_020, swap), abi("parameter 0 has 128 bytes, the manifest says 4"));
    let more = |params: &mut Vec<serde_json::Value>| params.push(params[1].clone());
    assert_eq!(with_wrong_params(12_040, more), abi("the code has 46 parameters, the manifest 47"));
    let fewer = |params: &mut Vec<serde_json::Value>| drop(params.pop());
    assert_eq!(with_wrong_params(13_020, fewer), abi("the code has 46 parameters, the manifest 45"));
}

#[test]
fn old_drivers_that_cannot_tell_parameters_are_served() {
    assert_eq!(with_wrong_params(12_000, |_| {}), Ok(()));
    assert_eq!(with_wrong_params(12_040, |_| {}), Ok(()));
    assert_eq!(with_wrong_params(13_020, |_| {}), Ok(()));
}

#[test]
fn a_workspace_belongs_to_the_call() -> Result<()> {
    let driver = Arc::new(MockDriver::default());
    let runtime = with_bundle(&driver, Runtime::builder(), two_launches())?;
    let mut call = Call::new(DType::F16, [1, 3, 8, 16], [1, 3, 8, 16], 16);
    call.on_device(&runtime)?;
    let launches = driver.launches();
    assert_eq!(launches.len(), 2);
    assert_eq!(pointer(&launches[0], "workspace.1"), pointer(&launches[1], "workspace.1"));
    assert_sound(&driver);

    // The second launch fails: the first one's memory must still outlive it.
    driver.fail(Entry::Launch, 1, 1);
    assert!(matches!(call.on_device(&runtime), Err(Error::Driver { code: 1, .. })));
    // No room for the second scratch buffer: nothing was launched.
    driver.fail(Entry::Alloc, 5, 2);
    let before = driver.launches().len();
    assert_eq!(call.on_device(&runtime), Err(Error::OutOfMemory { requested: 7 }));
    assert_eq!(driver.launches().len(), before);
    drop(runtime);
    assert_eq!(driver.live().0, 0);
    assert_sound(&driver);
    Ok(())
}

#[test]
fn devices_do_not_mix() -> Result<()> {
    let driver = devices(&[(9, 0), (9, 0)]);
    let runtimes = [runtime(&driver, 0)?, runtime(&driver, 1)?];
    let call = Call::new(DType::F16, [1, 1, 8, 16], [1, 1, 8, 16], 16);
    runtimes.iter().for_each(|runtime| call.assert_same(runtime));

    let buffers = [0, 1].map(|i| DeviceBuffer::filled(runtimes[i].stream().expect("a stream"), 256, 0));
    let [zero, one] = buffers;
    let (zero, one) = (zero?, one?);
    let mut out = DeviceBuffer::filled(runtimes[0].stream()?, 256, 0xff)?;
    let shape = [1, 1, 8, 16];
    let view = |buffer| TensorView::from_buffer(buffer, DType::F16, &shape);
    let mut out = TensorViewMut::from_buffer(&mut out, DType::F16, &shape)?;
    let refused = |result: Result<()>| result.expect_err("refused").to_string();
    assert_eq!(
        refused(runtimes[0].attention(&view(&zero)?, &view(&one)?, &view(&zero)?).run(&mut out)),
        "key: given a tensor on cuda:1; accepted the query's device, cuda:0"
    );
    assert_eq!(
        refused(runtimes[1].attention(&view(&zero)?, &view(&zero)?, &view(&zero)?).run(&mut out)),
        "query: given a tensor on cuda:0; accepted the runtime's device, cuda:1"
    );
    let call = runtimes[0].attention(&view(&zero)?, &view(&zero)?, &view(&zero)?);
    assert_eq!(
        refused(call.on(runtimes[1].stream()?).run(&mut out)),
        "stream: given a stream of cuda:1; accepted a stream of cuda:0"
    );
    assert_eq!(
        refused(Runtime::cpu().attention(&view(&zero)?, &view(&zero)?, &view(&zero)?).run(&mut out)),
        "query: given a tensor on cuda:0; accepted the runtime's device, cpu"
    );
    // Streams of two devices may wait for each other.
    runtimes[0].stream()?.wait_for(runtimes[1].stream()?)?;
    assert_sound(&driver);
    Ok(())
}

#[test]
fn drivers_do_not_mix() -> Result<()> {
    let ((_first, one), (_second, other)) = (mock(), mock());
    let foreign = DeviceBuffer::filled(other.stream()?, 256, 0)?;
    // Another address than the first buffer of the other mock.
    let _first_buffer = DeviceBuffer::filled(one.stream()?, 256, 0)?;
    let mut out = DeviceBuffer::filled(one.stream()?, 256, 0)?;
    let shape = [1, 1, 8, 16];
    let view = TensorView::from_buffer(&foreign, DType::F16, &shape)?;
    let result = one.attention(&view, &view, &view).run(&mut TensorViewMut::from_buffer(&mut out, DType::F16, &shape)?);
    assert!(matches!(result, Err(Error::InvalidArgument { argument: "buffer", .. })), "{result:?}");
    assert!(one.stream()?.wait_for(other.stream()?).is_err());
    assert!(one.stream()?.record()?.block(other.stream()?).is_err());
    Ok(())
}

#[test]
fn explain_names_one_reason_per_candidate() -> Result<()> {
    let (driver, runtime) = mock();
    let mut call = Call::new(DType::F16, [1, 2, 9, 24], [1, 2, 9, 24], 24);
    call.options.scale = Some(-1.0);
    let stream = runtime.stream()?;
    let [q, k, v] = [call.query.upload(stream)?, call.key.upload(stream)?, call.value.upload(stream)?];
    let attention = runtime.attention(&call.query.on(&q)?, &call.key.on(&k)?, &call.value.on(&v)?);
    let explanation = attention.options(call.options).explain()?;
    assert_eq!(explanation.chosen.as_deref(), Some("portable.f16.none.band.16"));
    let reason = |name: &str| explanation.rejected.iter().find(|(n, _)| n == name).map(|(_, reason)| reason);
    assert_eq!(reason("hopper.f16.none.dense.16"), Some(&Rejection::Scale));
    assert_eq!(reason("hopper.bf16.none.dense.16"), Some(&Rejection::DType { takes: DType::BF16 }));
    assert_eq!(
        reason("portable.f16.none.band.2"),
        Some(&Rejection::Outranked { by: "portable.f16.none.band.16".into() })
    );
    assert_eq!(explanation.rejected.len(), 13, "every other variant");
    assert_eq!(driver.count(Entry::LoadModule) + driver.launches().len(), 0, "looking costs nothing");
    Ok(())
}

#[test]
fn limits_choose_among_builds() -> Result<()> {
    let driver = Arc::new(MockDriver::default());
    let runtime = with_bundle(&driver, Runtime::builder(), tuned())?;
    for (batch, rows, expected) in [
        (1, 1, "hopper.f16.none.dense.16"),
        (2, 99, "hopper.f16.none.dense.16"),
        (4, 64, "hopper.f16.none.dense.16"),
        (4, 65, "hopper.f16.none.band.16"),
        (5, 9, "hopper.f16.none.band.16"),
        (1, 100, "large"),
        (9, 200, "large"),
    ] {
        Call::new(DType::F16, [batch, 1, rows, 8], [batch, 1, 9, 8], 8).assert_same(&runtime);
        let launch = driver.launches().pop().expect("a launch");
        assert_eq!(launch.variant.as_deref(), Some(expected), "{batch} x {rows}");
    }
    assert_sound(&driver);
    Ok(())
}

#[test]
fn explain_says_which_rule_chose() -> Result<()> {
    let driver = Arc::new(MockDriver::default());
    let runtime = with_bundle(&driver, Runtime::builder(), tuned())?;
    let explain = |rows: usize, scale: Option<f32>| {
        let call = Call::new(DType::F16, [1, 1, rows, 8], [1, 1, 9, 8], 8);
        let stream = runtime.stream()?;
        let [q, k, v] = [call.query.upload(stream)?, call.key.upload(stream)?, call.value.upload(stream)?];
        let attention = runtime.attention(&call.query.on(&q)?, &call.key.on(&k)?, &call.value.on(&v)?);
        attention.options(AttentionOptions { scale, ..call.options }).explain()
    };
    let large = explain(100, None)?;
    assert_eq!(large.rule.as_deref(), Some("seq_len_q in 100..=1073741824"));
    assert!(large.to_string().contains("\n  runs large (seq_len_q in 100..=1073741824)\n"), "{large}");
    let (_, reason) = large.rejected.iter().find(|(name, _)| name == "hopper.f16.none.dense.16").expect("a candidate");
    assert_eq!(*reason, Rejection::Limit { quantity: "seq_len_q", found: 100, low: 1, high: 99 });
    assert_eq!(reason.to_string(), "seq_len_q is 100; this kernel was tuned for 1 to 99");
    let small = explain(99, None)?;
    assert_eq!(small.rule.as_deref(), Some("num_tiles in 1..=4, seq_len_q in 1..=99"));
    let without = explain(99, Some(-1.0))?;
    assert_eq!((without.chosen.as_deref(), without.rule), (Some("portable.f16.none.band.16"), None));
    Ok(())
}

#[test]
fn keys_are_split_where_tiles_are_few() -> Result<()> {
    let launches = |batch: usize, keys: usize| {
        let driver = Arc::new(MockDriver::default());
        let runtime = with_bundle(&driver, Runtime::builder(), split_keys())?;
        Call::new(DType::F16, [batch, 2, 65, 16], [batch, 2, keys, 16], 16).with_lse().assert_same(&runtime);
        assert_sound(&driver);
        Ok::<_, Error>(driver.launches())
    };
    for (batch, keys, splits) in [(1, 20, 2), (1, 33, 3), (1, 900, 4), (66, 900, 2), (132, 20, 1)] {
        let [parts, whole] = <[LaunchRecord; 2]>::try_from(launches(batch, keys)?).expect("two launches");
        let tiles = 4 * batch as i64;
        assert_eq!((i64::from(parts.grid[0]), i64::from(whole.grid[0])), ((tiles * splits).min(132), tiles * 4));
        for launch in [&parts, &whole] {
            assert_integers(launch, &[("key_splits", splits), ("num_tiles", tiles)]);
        }
        assert_eq!(pointer(&parts, "workspace.0"), pointer(&whole, "workspace.0"));
        assert_ne!(pointer(&whole, "lse"), 0);
    }
    let [launch] = <[LaunchRecord; 1]>::try_from(launches(1, 19)?).expect("one launch");
    assert_eq!(launch.variant.as_deref(), Some("portable.f16.none.band.16"), "too few keys");
    Ok(())
}

#[test]
fn an_empty_output_launches_nothing() -> Result<()> {
    let (driver, runtime) = mock();
    for (q, kv, dim_v) in [
        ([0, 2, 4, 8], [0, 2, 4, 8], 8),
        ([2, 0, 4, 8], [2, 0, 4, 8], 8),
        ([2, 2, 0, 8], [2, 2, 4, 8], 8),
        ([2, 2, 4, 8], [2, 2, 4, 8], 0),
    ] {
        Call::new(DType::F16, q, kv, dim_v).on_device(&runtime)?;
        Call::new(DType::F16, q, kv, dim_v).on_cpu()?;
    }
    assert_eq!(driver.launches(), []);
    // Nothing to see is not nothing to write.
    Call::new(DType::F16, [2, 2, 4, 8], [2, 2, 0, 8], 8).with_lse().assert_same(&runtime);
    assert_eq!(driver.launches().len(), 1);
    assert_sound(&driver);
    Ok(())
}

#[test]
#[cfg(all(feature = "cuda", not(miri)))]
fn embedded_variants_compute_what_they_are_asked() -> Result<()> {
    let capability = |arch: &str| match arch {
        "sm_80" | "compute_80" => (8, 0),
        "sm_86" => (8, 6),
        "sm_90a" => (9, 0),
        "sm_100a" => (10, 0),
        "sm_120a" => (12, 0),
        other => panic!("a new architecture {other}: say which device it runs on"),
    };
    for (arch, bytes) in flashcore::bundle::embedded() {
        let driver = devices(&[capability(arch)]);
        let manifest = Bundle::parse(bytes)?.manifest().clone();
        driver.learn(&manifest);
        let builder = Runtime::builder().arch(*arch);
        let runtime = testing::with_driver(builder, &driver).build()?;
        for variant in &manifest.variants {
            for call in calls_for(variant) {
                call.assert_same(&runtime);
            }
        }
        assert_sound(&driver);
        let seen: std::collections::HashSet<_> = driver.launches().into_iter().filter_map(|l| l.variant).collect();
        let unseen: Vec<_> = manifest.variants.iter().map(|v| &v.name).filter(|name| !seen.contains(*name)).collect();
        assert!(unseen.is_empty(), "{arch}: no call reaches {unseen:?}");
    }
    Ok(())
}

/// Calls that a variant answers, one of which should prefer it.
#[cfg(all(feature = "cuda", not(miri)))]
fn calls_for(variant: &flashcore::bundle::Variant) -> Vec<Call> {
    use flashcore::bundle::manifest::MaskKind;

    let when = &variant.when;
    let aligned = variant.requires.stride_align > 2;
    let dim = |(low, high): (u32, u32)| match (low == high, aligned) {
        (true, _) => high as usize,
        (false, true) => high as usize - 8,
        (false, false) => high as usize - 1,
    };
    let (dim_qk, dim_v) = (dim(when.head_dim_qk), dim(when.head_dim_v));
    let at_least = |name: &str, usual: usize| {
        let low = when.limits.0.iter().find(|limit| limit.name == name).map_or(0, |limit| limit.low);
        usual.max(low as usize)
    };
    let (seq_q, seq_k) = (at_least("seq_len_q", 5), at_least("seq_len_k", 7));
    let heads = at_least("num_tiles", 1).div_ceil(seq_q.div_ceil(variant.tile.query as usize)).max(2);
    let mut call = Call::new(when.dtype, [1, heads, seq_q, dim_qk], [1, 1, seq_k, dim_qk], dim_v).with_lse();
    let mask = match when.attn_mask {
        MaskKind::None => None,
        MaskKind::Bool => Some(DType::Bool),
        MaskKind::F16 => Some(DType::F16),
        MaskKind::Bf16 => Some(DType::BF16),
        MaskKind::F32 => Some(DType::F32),
    };
    call.attn_mask = mask.map(|dtype| Operand::new(dtype, [1, 1, seq_q, seq_k], Form::CONTIGUOUS, 9));
    let mut banded = call.clone();
    banded.options.causal = when.band;
    let negative =
        |call: &Call| Call { options: AttentionOptions { scale: Some(-0.5), ..call.options }, ..call.clone() };
    vec![negative(&call), negative(&banded), call, banded]
}
