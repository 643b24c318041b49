//! Calls that look like earlier ones, and calls made ready beforehand.

use std::sync::Arc;

use flashcore::testing::{Entry, MockDriver};
use flashcore::{DType, Device, DeviceBuffer, Error, Result, Runtime, TensorView, TensorViewMut, last_plan};

use crate::support::{assert_sound, mock, split_keys, two_launches, with_bundle};
use crate::workload::noise;

const SHAPE: [usize; 4] = [1, 2, 70, 16];
const LEN: usize = 2 * 70 * 16;

fn on_a_fresh_mock(bundle: Vec<u8>) -> Result<(Arc<MockDriver>, Runtime)> {
    let driver = Arc::new(MockDriver::default());
    let runtime = with_bundle(&driver, Runtime::builder(), bundle)?;
    Ok((driver, runtime))
}

/// Query, key and value that differ by `seed`.
fn inputs(runtime: &Runtime, seed: u64) -> Result<[DeviceBuffer; 3]> {
    let stream = runtime.stream()?;
    let buffer = |part| DeviceBuffer::from_slice(stream, &noise(LEN, 3 * seed + part));
    Ok([buffer(0)?, buffer(1)?, buffer(2)?])
}

fn views(buffers: &[DeviceBuffer; 3]) -> Result<[TensorView<'_>; 3]> {
    let view = |buffer| TensorView::from_buffer(buffer, DType::F16, &SHAPE);
    let [q, k, v] = buffers.each_ref().map(view);
    Ok([q?, k?, v?])
}

fn run(runtime: &Runtime, buffers: &[DeviceBuffer; 3], causal: bool) -> Result<Vec<half::f16>> {
    let mut out = DeviceBuffer::filled(runtime.stream()?, 2 * LEN, 0xff)?;
    let [q, k, v] = views(buffers)?;
    let mut view = TensorViewMut::from_buffer(&mut out, DType::F16, &SHAPE)?;
    runtime.attention(&q, &k, &v).causal(causal).run(&mut view)?;
    out.to_vec()
}

#[test]
fn a_call_like_an_earlier_one_has_its_own_tensors_and_options() -> Result<()> {
    let (driver, runtime) = mock();
    let (one, other) = (inputs(&runtime, 1)?, inputs(&runtime, 2)?);
    let first = [run(&runtime, &one, false)?, run(&runtime, &other, false)?, run(&runtime, &one, true)?];
    let again = [run(&runtime, &one, false)?, run(&runtime, &other, false)?, run(&runtime, &one, true)?];
    assert_eq!(first, again);
    assert!(first[0] != first[1] && first[0] != first[2]);
    assert_sound(&driver);
    Ok(())
}

#[test]
fn addresses_are_checked_every_time() -> Result<()> {
    let (driver, runtime) = mock();
    let buffers = inputs(&runtime, 1)?;
    run(&runtime, &buffers, false)?;
    let launches = driver.launches().len();
    let mut both = DeviceBuffer::filled(runtime.stream()?, 2 * 2 * LEN, 0)?;
    let [_, k, v] = views(&buffers)?;
    let address = 0x1000_0000;
    let raw = |address| {
        // SAFETY: the call is refused before anything is read.
        #[expect(unsafe_code, reason = "memory that is never used")]
        unsafe {
            let strides = [LEN as i64, 70 * 16, 16, 1];
            let query = TensorView::from_raw(Device::Cuda(0), address, DType::F16, &SHAPE, &strides)?;
            let out = TensorViewMut::from_raw(Device::Cuda(0), address + 256, DType::F16, &SHAPE, &strides)?;
            Ok::<_, Error>((query, out))
        }
    };
    for _ in 0..2 {
        let (query, mut out) = raw(address)?;
        let refusal = runtime.attention(&query, &k, &v).run(&mut out).expect_err("shared memory");
        assert_eq!(refusal.to_string(), "out: given memory shared with query; accepted memory of its own");
    }
    let (query, _) = raw(0)?;
    let mut out = TensorViewMut::from_buffer_strided(&mut both, DType::F16, &SHAPE, &[LEN as i64, 1120, 16, 1], 0)?;
    let refusal = runtime.attention(&query, &k, &v).run(&mut out).expect_err("a null pointer");
    assert!(refusal.to_string().starts_with("query: given address 0x0"), "{refusal}");
    assert_eq!(driver.launches().len(), launches);
    Ok(())
}

#[test]
fn runtimes_do_not_share_what_they_know() -> Result<()> {
    let (plain, split) = (mock(), on_a_fresh_mock(split_keys())?);
    for _ in 0..2 {
        for ((driver, runtime), launches) in [(&plain, 1), (&split, 2)] {
            let buffers = inputs(runtime, 1)?;
            let before = driver.launches().len();
            run(runtime, &buffers, false)?;
            assert_eq!(driver.launches().len() - before, launches);
        }
    }
    Ok(())
}

#[test]
fn more_geometries_than_are_remembered() -> Result<()> {
    let (driver, runtime) = mock();
    let buffers = inputs(&runtime, 1)?;
    for _ in 0..2 {
        for seq in 1..70 {
            let shape = [1, 2, seq, 16];
            let mut out = DeviceBuffer::uninit(runtime.stream()?, 2 * LEN)?;
            let [q, k, v] = buffers.each_ref().map(|buffer| TensorView::from_buffer(buffer, DType::F16, &shape));
            runtime.attention(&q?, &k?, &v?).run(&mut TensorViewMut::from_buffer(&mut out, DType::F16, &shape)?)?;
            let plan = last_plan().expect("a call was made");
            assert!(plan.request.contains(&format!("seq {seq}")), "{plan:?}");
        }
    }
    assert_sound(&driver);
    Ok(())
}

#[test]
fn a_prepared_call_reads_its_tensors_as_they_are() -> Result<()> {
    for bundle in [flashcore::testing::sample_bundle(), split_keys()] {
        let (driver, runtime) = on_a_fresh_mock(bundle)?;
        let buffers = inputs(&runtime, 1)?;
        let expected = run(&runtime, &buffers, true)?;
        let mut out = DeviceBuffer::filled(runtime.stream()?, 2 * LEN, 0xff)?;
        let [q, k, v] = views(&buffers)?;
        let view = TensorViewMut::from_buffer(&mut out, DType::F16, &SHAPE)?;
        let mut call = runtime.attention(&q, &k, &v).causal(true).prepare(view)?;
        let encoded = driver.log().iter().filter(|entry| **entry == Entry::EncodeTensorMap).count();
        for _ in 0..3 {
            call.launch()?;
        }
        let after = driver.log().iter().filter(|entry| **entry == Entry::EncodeTensorMap).count();
        assert_eq!(after, encoded, "descriptors are made once");
        drop(call);
        assert_eq!(out.to_vec::<half::f16>()?, expected);
        assert_sound(&driver);
    }
    Ok(())
}

#[test]
fn a_prepared_call_is_ordered_like_any_other() -> Result<()> {
    let (driver, runtime) = mock();
    let other = runtime.new_stream()?;
    let buffers = inputs(&runtime, 1)?;
    let expected = run(&runtime, &buffers, false)?;
    let mut out = DeviceBuffer::filled(runtime.stream()?, 2 * LEN, 0xff)?;
    let [q, k, v] = views(&buffers)?;
    let view = TensorViewMut::from_buffer(&mut out, DType::F16, &SHAPE)?;
    let mut call = runtime.attention(&q, &k, &v).on(&other).prepare(view)?;
    call.launch()?;
    call.launch()?;
    drop(call);
    assert_eq!(out.to_vec::<half::f16>()?, expected);
    assert_sound(&driver);
    Ok(())
}

#[test]
fn prepared_calls_own_their_scratch_memory_for_a_launch() -> Result<()> {
    let (driver, runtime) = on_a_fresh_mock(two_launches())?;
    let buffers = inputs(&runtime, 1)?;
    let mut out = DeviceBuffer::uninit(runtime.stream()?, 2 * LEN)?;
    let [q, k, v] = views(&buffers)?;
    let view = TensorViewMut::from_buffer(&mut out, DType::F16, &SHAPE)?;
    let mut call = runtime.attention(&q, &k, &v).prepare(view)?;
    let (memory, ..) = driver.live();
    call.launch()?;
    call.launch()?;
    runtime.stream()?.synchronize()?;
    assert_eq!(driver.live().0, memory);
    assert_sound(&driver);
    Ok(())
}

#[test]
fn preparing_checks_and_the_cpu_computes() -> Result<()> {
    let data: Vec<f32> = noise(LEN, 1).iter().map(|x| x.to_f32()).collect();
    let (mut one, mut two) = (vec![0f32; LEN], vec![0f32; LEN]);
    let view = TensorView::from_slice(&data, &SHAPE)?;
    let cpu = Runtime::cpu();
    cpu.attention(&view, &view, &view).run(&mut TensorViewMut::from_slice(&mut one, &SHAPE)?)?;
    assert_eq!(last_plan().map(|plan| (plan.device, plan.kernel)), Some((Device::Cpu, "cpu".into())));
    cpu.attention(&view, &view, &view).prepare(TensorViewMut::from_slice(&mut two, &SHAPE)?)?.launch()?;
    assert_eq!(one, two);
    let short = TensorViewMut::from_slice(&mut two[..LEN / 2], &[1, 1, 70, 16])?;
    let refusal = cpu.attention(&view, &view, &view).prepare(short).expect_err("another shape");
    assert!(refusal.to_string().starts_with("out: given shape [1, 1, 70, 16]"), "{refusal}");
    let (_, device) = mock();
    let out = TensorViewMut::from_slice(&mut two, &SHAPE)?;
    assert!(matches!(device.attention(&view, &view, &view).prepare(out), Err(Error::InvalidArgument { .. })));
    Ok(())
}

#[test]
fn the_last_plan_is_a_thread_s_own() -> Result<()> {
    let (_driver, runtime) = mock();
    let buffers = inputs(&runtime, 1)?;
    let none = std::thread::spawn(last_plan).join().expect("a thread");
    assert_eq!(none, None);
    run(&runtime, &buffers, true)?;
    let plan = last_plan().expect("a call was made");
    assert_eq!((plan.device, plan.kernel.as_str()), (Device::Cuda(0), "hopper.f16.none.band.16"));
    Ok(())
}
