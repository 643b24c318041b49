//! Bad input: each refused with a message that names the argument, what was given and what is accepted; and nothing is
//! launched or written.

use std::sync::Arc;

use flashcore::testing::{Entry, MockConfig, MockDriver};
use flashcore::{DType, Device, DeviceBuffer, Error, Result, Runtime, TensorView, TensorViewMut};

use crate::support::{Call, Form, Operand, assert_sound, mock, runtime};

fn call() -> Call {
    Call::new(DType::F16, [2, 4, 5, 8], [2, 2, 7, 8], 8).with_lse()
}

/// A well-formed call with one thing changed.
#[track_caller]
fn refused(change: impl FnOnce(&mut Call), message: &str) {
    let mut call = call();
    change(&mut call);
    call.assert_refused(message);
}

fn contiguous(dtype: DType, shape: [usize; 4]) -> Operand {
    Operand::new(dtype, shape, Form::CONTIGUOUS, 1)
}

#[track_caller]
fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.expect_err("a refusal").to_string()
}

#[test]
fn the_call_itself_is_accepted() {
    let (_driver, runtime) = mock();
    call().assert_same(&runtime);
}

#[test]
fn ranks() {
    let data = [0f32; 24];
    assert_eq!(
        message(TensorView::from_slice(&data, &[2, 3, 4])),
        "tensor: given shape [2, 3, 4] with 3 strides; accepted 4 dimensions: (batch, heads, seq, head_dim)"
    );
    assert_eq!(
        message(TensorView::from_slice_strided(&data, &[1, 2, 3, 4], &[12, 4, 1])),
        "tensor: given shape [1, 2, 3, 4] with 3 strides; accepted 4 dimensions: (batch, heads, seq, head_dim)"
    );
    let mut data = data;
    assert_eq!(
        message(TensorViewMut::from_slice(&mut data, &[])),
        "out: given shape [] with 0 strides; accepted 4 dimensions: (batch, heads, seq, head_dim)"
    );
}

#[test]
fn element_types() {
    refused(
        |call| call.key = contiguous(DType::BF16, [2, 2, 7, 8]),
        "key: given dtype bf16; accepted the query's dtype, f16",
    );
    refused(
        |call| call.value = contiguous(DType::F32, [2, 2, 7, 8]),
        "value: given dtype f32; accepted the query's dtype, f16",
    );
    refused(
        |call| call.out = contiguous(DType::F32, [2, 4, 5, 8]).poison(),
        "out: given dtype f32; accepted the query's dtype, f16",
    );
    refused(
        |call| call.query = contiguous(DType::Bool, [2, 4, 5, 8]),
        "query: given dtype bool; accepted f16, bf16, f32 or f64 (f16 or bf16 on a GPU)",
    );
    refused(
        |call| call.attn_mask = Some(contiguous(DType::BF16, [2, 4, 5, 7])),
        "attn_mask: given dtype bf16; accepted bool, f32 or the query's dtype, f16",
    );
    refused(
        |call| call.lse = Some(contiguous(DType::F16, [2, 4, 5, 1]).poison()),
        "lse: given f16 [2, 4, 5, 1] with strides [20, 5, 1, 1]; accepted f32 [2, 4, 5, 1], contiguous",
    );
}

#[test]
fn types_without_kernels_name_every_candidate() {
    let (driver, runtime) = mock();
    let result = Call::new(DType::F32, [1, 1, 5, 8], [1, 1, 7, 8], 8).on_device(&runtime);
    let Err(Error::Unsupported(unsupported)) = &result else { panic!("{result:?}") };
    assert_eq!(unsupported.rejected.len(), 14);
    let message = message(result);
    assert!(message.starts_with("no kernel answers attention(f32, batch 1, heads 1/1, seq 5x7, head_dim 8, dense"));
    assert!(message.contains("\n  portable.f16.none.band.2: computes in f16\n"), "{message}");
    assert!(message.ends_with("\n  GPU kernels compute in f16 and bf16: cast, or use the CPU backend"), "{message}");
    assert_eq!(driver.launches(), []);
}

#[test]
fn shapes() {
    refused(
        |call| call.key = contiguous(DType::F16, [3, 2, 7, 8]),
        "key: given shape [3, 2, 7, 8]; accepted shape [2, 2, 7, 8] (batch and head_dim of the query)",
    );
    refused(
        |call| call.key = contiguous(DType::F16, [2, 2, 7, 16]),
        "key: given shape [2, 2, 7, 16]; accepted shape [2, 2, 7, 8] (batch and head_dim of the query)",
    );
    refused(
        |call| call.value = contiguous(DType::F16, [2, 2, 6, 8]),
        "value: given shape [2, 2, 6, 8]; accepted shape [2, 2, 7, 8] (batch, heads and seq of the key)",
    );
    refused(
        |call| {
            call.key = contiguous(DType::F16, [2, 3, 7, 8]);
            call.value = contiguous(DType::F16, [2, 3, 7, 8]);
        },
        "key: given 3 heads for 4 query heads; accepted a number of heads that divides the query's",
    );
    refused(
        |call| {
            call.key = contiguous(DType::F16, [2, 0, 7, 8]);
            call.value = contiguous(DType::F16, [2, 0, 7, 8]);
        },
        "key: given 0 heads for 4 query heads; accepted a number of heads that divides the query's",
    );
    refused(
        |call| call.out = contiguous(DType::F16, [2, 4, 5, 16]).poison(),
        "out: given shape [2, 4, 5, 16]; accepted shape [2, 4, 5, 8] (query's batch, heads and seq, value's head_dim)",
    );
    refused(
        |call| call.attn_mask = Some(contiguous(DType::Bool, [2, 2, 5, 7])),
        "attn_mask: given shape [2, 2, 5, 7]; accepted a shape that broadcasts to [2, 4, 5, 7]",
    );
    refused(
        |call| call.lse = Some(contiguous(DType::F32, [2, 5, 4, 1]).poison()),
        "lse: given f32 [2, 5, 4, 1] with strides [20, 4, 1, 1]; accepted f32 [2, 4, 5, 1], contiguous",
    );
    refused(
        |call| {
            let form = Form { order: [1, 0, 2], ..Form::CONTIGUOUS };
            call.lse = Some(Operand::new(DType::F32, [2, 4, 5, 1], form, 1).poison());
        },
        "lse: given f32 [2, 4, 5, 1] with strides [5, 10, 1, 1]; accepted f32 [2, 4, 5, 1], contiguous",
    );
}

#[test]
fn head_dims_and_sequences_too_long() {
    let long = |dim, dim_v| Call::new(DType::F16, [1, 1, 2, dim], [1, 1, 2, dim], dim_v);
    long(257, 8).assert_refused("query: given head_dim 257; accepted head_dim 0 to 256");
    long(8, 257).assert_refused("value: given head_dim 257; accepted head_dim 0 to 256");
    // One row, repeated by a stride of 0.
    let mut call = Call::new(DType::F16, [1, 1, 2, 8], [1, 1, 2, 8], 8);
    call.key = Operand::with_strides(DType::F16, [1, 1, 1 << 30, 8], [0, 0, 0, 1], 0, 1);
    call.value = call.key.clone();
    call.assert_refused("key: given seq 1073741824; accepted seq 0 to 1073741823");
}

#[test]
fn strides() {
    refused(
        |call| call.query = Operand::with_strides(DType::F16, [2, 4, 5, 8], [320, 80, 16, 2], 0, 1),
        "query: given strides [320, 80, 16, 2]; accepted a contiguous last dimension (stride 1); call .contiguous() first",
    );
    refused(
        |call| call.out = Operand::with_strides(DType::F16, [2, 4, 5, 8], [320, 80, 16, 2], 0, 1).poison(),
        "out: given strides [320, 80, 16, 2]; accepted a contiguous last dimension (stride 1); call .contiguous() first",
    );
    let data = [0f32; 64];
    assert_eq!(
        message(TensorView::from_slice_strided(&data, &[1, 2, 3, 4], &[24, 12, -4, 1])),
        "tensor: given strides [24, 12, -4, 1]; accepted strides >= 0"
    );
    assert_eq!(
        message(TensorView::from_slice_strided(&data, &[1, 2, 3, 4], &[24, i64::MAX, 4, 1])),
        "tensor: given shape [1, 2, 3, 4] with strides [24, 9223372036854775807, 4, 1]; accepted sizes below 2^31 and \
         a total extent below 2^63 bytes"
    );
}

#[test]
fn sizes_that_do_not_fit() {
    let data = [0f32; 64];
    assert_eq!(
        message(TensorView::from_slice(&data, &[1, 1, 9, 8])),
        "tensor: given shape [1, 1, 9, 8], strides [72, 72, 8, 1] over 64 elements; accepted memory of at least 72 \
         elements"
    );
    for shape in [[1, 1, 1 << 31, 1], [usize::MAX, 1, 1, 1], [1 << 30, 1 << 30, 1 << 30, 1 << 30]] {
        let message = message(TensorView::from_slice(&data, &shape));
        assert!(message.ends_with("accepted sizes below 2^31 and a total extent below 2^63 bytes"), "{message}");
    }
    let (_driver, runtime) = mock();
    let buffer = DeviceBuffer::filled(runtime.stream().expect("a stream"), 100, 0).expect("a buffer");
    assert_eq!(
        message(TensorView::from_buffer_strided(&buffer, DType::F16, &[1, 1, 5, 8], &[40, 40, 8, 1], 11)),
        "tensor: given shape [1, 1, 5, 8], strides [40, 40, 8, 1] of f16 from element 11 over a buffer of 100 bytes; \
         accepted a view inside the buffer"
    );
    let huge = TensorView::from_buffer_strided(&buffer, DType::F16, &[1, 1, 1, 1], &[1; 4], usize::MAX);
    assert!(matches!(huge, Err(Error::InvalidArgument { .. })), "{huge:?}");
}

#[test]
fn scales() {
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        refused(|call| call.options.scale = Some(scale), &format!("scale: given {scale}; accepted a finite number"));
    }
}

/// Views of foreign memory on the mock: `addresses` are offsets into one allocation for query, key, value, mask, output
/// and log-sum-exp.
fn foreign(offsets: [u64; 6]) -> Result<()> {
    let (driver, runtime) = mock();
    let base = driver.foreign_memory(0, 4096);
    driver.poke(base, &[0xff; 4096]);
    let shape = [1, 1, 4, 8];
    let [q, k, v, mask, out, lse] = offsets.map(|offset| if offset == u64::MAX { 0 } else { base + offset });
    let strides = [32, 32, 8, 1];
    // SAFETY: the mock checks every access, and asserts below that there was none.
    #[expect(unsafe_code, reason = "foreign memory")]
    let result = unsafe {
        let view = |address, dtype, shape: &[usize], strides: &[i64]| {
            TensorView::from_raw(Device::Cuda(0), address, dtype, shape, strides)
        };
        let view_mut = |address, dtype, shape: &[usize], strides: &[i64]| {
            TensorViewMut::from_raw(Device::Cuda(0), address, dtype, shape, strides)
        };
        let operand = |address| view(address, DType::F16, &shape, &strides);
        let mask = view(mask, DType::Bool, &[1, 1, 4, 4], &[16, 16, 4, 1])?;
        let mut out = view_mut(out, DType::F16, &shape, &strides)?;
        let mut lse = view_mut(lse, DType::F32, &[1, 1, 4, 1], &[4, 4, 1, 1])?;
        let call = runtime.attention(&operand(q)?, &operand(k)?, &operand(v)?).attn_mask(mask);
        call.run_with_lse(&mut out, &mut lse)
    };
    if result.is_err() {
        assert_eq!(driver.launches(), []);
        assert_eq!(driver.peek(base, 4096), [0xff; 4096]);
    }
    assert_sound(&driver);
    result
}

#[test]
fn addresses() {
    assert_eq!(foreign([0, 64, 128, 192, 256, 320]), Ok(()));
    for (index, name) in ["query", "key", "value", "attn_mask", "out", "lse"].into_iter().enumerate() {
        let mut offsets = [0, 64, 128, 192, 256, 320];
        offsets[index] = u64::MAX;
        let multiple = match name {
            "attn_mask" => 1,
            "lse" => 4,
            _ => 2,
        };
        assert_eq!(
            message(foreign(offsets)),
            format!("{name}: given address 0x0; accepted a non-null address that is a multiple of {multiple}")
        );
        if name != "attn_mask" {
            let mut offsets = [0, 64, 128, 192, 256, 320];
            offsets[index] += 1;
            let message = message(foreign(offsets));
            assert!(message.starts_with(&format!("{name}: given address 0x7")), "{message}");
            assert!(message.ends_with(&format!("multiple of {multiple}")), "{message}");
        }
    }
}

#[test]
fn outputs_that_share_memory() {
    let own = "memory of its own";
    for (index, name) in ["query", "key", "value", "attn_mask"].into_iter().enumerate() {
        // The last bytes of the input are the first of the output, and the other way round.
        for distance in [-14, 14] {
            let mut offsets = [512, 1024, 1536, 2048, 0, 3072];
            offsets[4] = (offsets[index] as i64 + distance) as u64;
            assert_eq!(message(foreign(offsets)), format!("out: given memory shared with {name}; accepted {own}"));
        }
        let mut offsets = [512, 1024, 1536, 2048, 2560, 0];
        offsets[5] = offsets[index] + 12;
        assert_eq!(message(foreign(offsets)), format!("lse: given memory shared with {name}; accepted {own}"));
    }
    assert_eq!(
        message(foreign([512, 1024, 1536, 2048, 2560, 2560 + 60])),
        format!("lse: given memory shared with out; accepted {own}")
    );
    // Neighbours are fine.
    assert_eq!(foreign([0, 64, 128, 192, 208, 272]), Ok(()));
    let overlapping = |strides| {
        refused(
            |call| call.out = Operand::with_strides(DType::F16, [2, 4, 5, 8], strides, 0, 1).poison(),
            &format!(
                "out: given shape [2, 4, 5, 8] with strides {strides:?}; accepted a tensor whose elements do not share \
                 memory"
            ),
        );
    };
    overlapping([160, 40, 7, 1]);
    overlapping([160, 0, 8, 1]);
    overlapping([159, 40, 8, 1]);
}

#[test]
fn streams() -> Result<()> {
    let (driver, runtime) = mock();
    // SAFETY: handles 0 to 2 name streams that always exist.
    #[expect(unsafe_code, reason = "foreign streams")]
    let [legacy, same, per_thread] = unsafe { [0, 1, 2].map(|raw| runtime.foreign_stream(raw)) };
    assert_eq!((legacy.clone()?.raw(), same?.raw()), (0, 0));
    assert_eq!(
        message(per_thread),
        "stream: given the per-thread default stream; accepted a stream that is the same on every thread"
    );
    assert_eq!(
        message(legacy?.capture(|| Ok(()))),
        "stream: given the legacy default stream; accepted a created stream, for capture"
    );
    assert_eq!(
        message(Runtime::cpu().stream().map(drop)),
        "runtime: given the CPU backend; accepted a runtime on a CUDA device"
    );
    let data = [half::f16::ZERO; 32];
    let view = TensorView::from_slice(&data, &[1, 1, 4, 8])?;
    let mut out = data;
    let cpu = Runtime::cpu();
    let on_stream = cpu.attention(&view, &view, &view).on(runtime.stream()?);
    assert_eq!(
        message(on_stream.run(&mut TensorViewMut::from_slice(&mut out, &[1, 1, 4, 8])?)),
        "stream: given a CUDA stream; accepted none: the CPU backend runs the call at once"
    );
    assert_sound(&driver);
    Ok(())
}

#[test]
fn work_on_a_stream_that_somebody_else_captures() -> Result<()> {
    let (driver, runtime) = mock();
    let raw = driver.foreign_stream(0);
    // SAFETY: the mock never destroys the stream.
    #[expect(unsafe_code, reason = "a foreign stream")]
    let stream = unsafe { runtime.foreign_stream(raw) }?;
    let at_home = DeviceBuffer::filled(&stream, 64, 0)?;
    let mut out = DeviceBuffer::filled(runtime.stream()?, 64, 0xff)?;
    let shape = [1, 1, 4, 8];
    driver.begin_foreign_capture(0, raw)?;
    // The other library's graph would not own these buffers.
    let view = TensorView::from_buffer(&at_home, DType::F16, &shape)?;
    let mut out_view = TensorViewMut::from_buffer(&mut out, DType::F16, &shape)?;
    assert_eq!(
        message(runtime.attention(&view, &view, &view).on(&stream).run(&mut out_view)),
        "buffer: given a stream that is being captured; accepted a stream that is not"
    );
    assert!(at_home.to_vec::<u8>().is_err());
    assert!(stream.synchronize().is_err());
    // Foreign memory is the other library's own business, and its capture's.
    let memory = driver.foreign_memory(0, 128);
    // SAFETY: the memory is never freed.
    #[expect(unsafe_code, reason = "foreign memory")]
    unsafe {
        let view = TensorView::from_raw(Device::Cuda(0), memory, DType::F16, &shape, &[32, 32, 8, 1])?;
        let mut out = TensorViewMut::from_raw(Device::Cuda(0), memory + 64, DType::F16, &shape, &[32, 32, 8, 1])?;
        runtime.attention(&view, &view, &view).on(&stream).run(&mut out)?;
    }
    assert!(driver.launches()[0].captured);
    driver.end_foreign_capture(0, raw)?;
    assert_eq!(out.to_vec::<u8>()?, [0xff; 64]);
    assert_sound(&driver);
    Ok(())
}

#[test]
fn a_missing_driver_is_named() {
    match Runtime::cuda(0) {
        // A machine with a driver: its own tests are in `tests/cuda.rs`.
        Ok(_) | Err(Error::NoDevice { .. }) => {}
        Err(error) => {
            let message = error.to_string();
            assert!(matches!(error, Error::DriverNotFound { .. }), "{message}");
            assert!(message.starts_with("CUDA driver not found: "), "{message}");
            assert!(message.ends_with("install the NVIDIA driver, or use the CPU backend (Runtime::cpu)"), "{message}");
            assert_eq!(Runtime::auto().device(), Device::Cpu);
        }
    }
}

#[test]
fn devices_that_are_not_there() {
    let driver = Arc::new(MockDriver::new(MockConfig { devices: Vec::new(), ..MockConfig::default() }));
    assert_eq!(message(runtime(&driver, 0)), "no CUDA device 0: the driver reports 0 device(s)");
    let driver = Arc::new(MockDriver::default());
    assert_eq!(message(runtime(&driver, 3)), "no CUDA device 3: the driver reports 1 device(s)");
}

#[test]
#[cfg(feature = "cuda")]
fn devices_without_code() -> Result<()> {
    let build = |capability, arch: Option<&str>| {
        let driver = crate::support::devices(&[capability]);
        let builder = Runtime::builder();
        let builder = if let Some(arch) = arch { builder.arch(arch) } else { builder };
        flashcore::testing::with_driver(builder, &driver).build()
    };
    let old = message(build((7, 5), None));
    assert!(old.starts_with("no bundle for Mock GPU (compute capability 7.5); bundles present: sm_80, "), "{old}");
    assert_eq!(
        message(build((8, 0), Some("sm_90a"))),
        "bundle: bundle is for sm_90a, the device is Mock GPU (compute capability 8.0)"
    );
    assert!(message(build((9, 0), Some("sm_35"))).starts_with("no bundle for Mock GPU"));
    // What a device that nobody has heard of gets.
    for (capability, arch) in [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100a"),
        ((12, 0), "sm_120a"),
        ((12, 1), "compute_80"),
        ((15, 3), "compute_80"),
    ] {
        let runtime = build(capability, None)?;
        assert_eq!(runtime.manifest().map(|manifest| manifest.arch.as_str()), Some(arch), "{capability:?}");
    }
    Ok(())
}

#[test]
fn memory_that_runs_out() -> Result<()> {
    let (driver, runtime) = mock();
    let stream = runtime.stream()?;
    assert_eq!(message(DeviceBuffer::uninit(stream, (64 << 20) + 1)), "out of device memory: 67108865 bytes requested");
    // Memory that was freed can be had again.
    for _ in 0..4 {
        drop(DeviceBuffer::uninit(stream, 64 << 20)?);
    }
    driver.fail(Entry::Alloc, 0, 2);
    assert_eq!(message(DeviceBuffer::uninit(stream, 7)), "out of device memory: 7 bytes requested");
    assert_eq!(DeviceBuffer::uninit(stream, 0)?.to_vec::<f32>()?, Vec::<f32>::new());
    Ok(())
}

#[test]
fn a_lost_context_stays_lost() -> Result<()> {
    let (driver, runtime) = mock();
    let stream = runtime.stream()?;
    let mut call = call();
    call.on_device(&runtime)?;
    let buffer = DeviceBuffer::filled(stream, 64, 0)?;
    // A kernel of somebody else went out of bounds; the next call to wait hears of it.
    driver.fail(Entry::Synchronize, 0, 700);
    let lost = "CUDA context lost: cuStreamSynchronize returned CUresult 700 (700); restart the process";
    assert_eq!(message(stream.synchronize()), lost);
    for result in [
        stream.synchronize(),
        call.on_device(&runtime),
        buffer.to_vec::<u8>().map(drop),
        DeviceBuffer::uninit(stream, 64).map(drop),
        stream.capture(|| Ok(())).map(drop),
        runtime.new_stream().map(drop),
        runtime.plan(&flashcore_problem()).map(drop),
    ] {
        assert!(matches!(result, Err(Error::ContextLost { code: 700, .. })), "{result:?}");
    }
    // Nothing panics on the way out.
    drop(buffer);
    drop(runtime);
    assert_sound(&driver);
    Ok(())
}

fn flashcore_problem() -> flashcore::Problem {
    flashcore::Problem {
        dtype: DType::BF16,
        batch: 1,
        num_heads_q: 1,
        num_heads_kv: 1,
        seq_len_q: 1,
        seq_len_k: 1,
        head_dim_qk: 8,
        head_dim_v: 8,
        q_strides: [8, 8, 8, 1],
        k_strides: [8, 8, 8, 1],
        v_strides: [8, 8, 8, 1],
        out_strides: [8, 8, 8, 1],
        attn_mask: None,
        band: None,
        scale_bits: 1f32.to_bits(),
        lse: false,
    }
}

#[test]
fn other_driver_failures_say_which_call() {
    for (entry, name) in [
        (Entry::LoadModule, "cuModuleLoadData"),
        (Entry::Function, "cuModuleGetFunction"),
        (Entry::Launch, "cuLaunchKernelEx"),
        (Entry::EncodeTensorMap, "cuTensorMapEncodeTiled"),
    ] {
        let (driver, runtime) = mock();
        driver.fail(entry, 0, 4242);
        let mut call = call();
        assert_eq!(message(call.on_device(&runtime)), format!("{name} returned CUresult 4242 (4242)"));
        call.assert_same(&runtime);
        assert_sound(&driver);
    }
}

#[test]
fn a_panic_in_a_capture_is_an_error() -> Result<()> {
    let (_driver, runtime) = mock();
    let result = runtime.stream()?.capture(|| std::panic::panic_any("a panic that a test wants"));
    assert_eq!(message(result.map(drop)), "a callback panicked during capture");
    runtime.stream()?.synchronize()
}
