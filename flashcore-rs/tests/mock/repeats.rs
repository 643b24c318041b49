//! Calls that look like earlier ones, and calls made ready beforehand.

use std::sync::Arc;

use std::sync::Mutex;

use flashcore::testing::{Entry, LaunchRecord, MockDriver, sample_bundle};
use flashcore::{
    DType, Device, DeviceBuffer, Error, PreparedCall, Result, Runtime, TensorView, TensorViewMut, last_plan,
};

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

/// Query, key, value, attn_mask, out and lse by number.
const TENSORS: usize = 6;
const MASK: usize = 3;
const MASK_SHAPE: [usize; 4] = [1, 1, 70, 70];
const LSE_SHAPE: [usize; 4] = [1, 2, 70, 1];

/// Two places for each tensor of one call.
struct Places([[DeviceBuffer; 2]; TENSORS]);

impl Places {
    fn new(runtime: &Runtime) -> Result<Self> {
        let stream = runtime.stream()?;
        let place = |seed| DeviceBuffer::from_slice(stream, &noise(4 * LEN, seed));
        let tensor = |seed| Ok::<_, Error>([place(seed)?, place(seed + 1)?]);
        Ok(Self([tensor(0)?, tensor(2)?, tensor(4)?, tensor(6)?, tensor(8)?, tensor(10)?]))
    }

    /// Calls with each tensor in one of its places.
    fn run(&mut self, runtime: &Runtime, places: [usize; TENSORS], masked: bool) -> Result<()> {
        let mut at = places.into_iter();
        let mut place = self.0.each_mut().map(|tensor| &mut tensor[at.next().expect("a place")]);
        let [q, k, v, mask, out, lse] = &mut place;
        let (mut out, mut lse) = (
            TensorViewMut::from_buffer(out, DType::F16, &SHAPE)?,
            TensorViewMut::from_buffer(lse, DType::F32, &LSE_SHAPE)?,
        );
        let input = |buffer| TensorView::from_buffer(buffer, DType::F16, &SHAPE);
        let (q, k, v) = (input(q)?, input(k)?, input(v)?);
        let call = runtime.attention(&q, &k, &v).causal(true);
        let call = if masked { call.attn_mask(TensorView::from_buffer(mask, DType::F16, &MASK_SHAPE)?) } else { call };
        call.run_with_lse(&mut out, &mut lse)
    }
}

/// The launches since there were `before`.
fn launches(driver: &MockDriver, before: usize) -> Vec<LaunchRecord> {
    driver.launches().split_off(before)
}

/// Whether a call that knows its geometry gets the arguments of one that nobody knows.
#[track_caller]
fn assert_like_a_first_call(
    driver: &Arc<MockDriver>,
    runtime: &Runtime,
    bundle: &[u8],
    tensors: &mut Places,
    (places, masked): ([usize; TENSORS], bool),
) {
    let before = driver.launches().len();
    tensors.run(runtime, places, masked).expect("a call");
    let got = launches(driver, before);
    let fresh = with_bundle(driver, Runtime::builder(), bundle.to_vec()).expect("a runtime");
    // On a thread that has made no call, so that it pushes nothing out of what this one remembers.
    std::thread::scope(|scope| scope.spawn(|| tensors.run(&fresh, places, masked)).join())
        .expect("no panic")
        .expect("a call");
    let expected = launches(driver, before + got.len());
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(&expected) {
        assert_eq!((&got.variant, &got.kernel, got.grid), (&expected.variant, &expected.kernel, expected.grid));
        // What is allocated for a call is the call's own.
        let named = |launch: &LaunchRecord, name| launch.arguments.get(name);
        for name in ["q", "k", "v", "out", "lse", "attn_mask", "seq_len_k", "group"] {
            assert_eq!(named(got, name), named(expected, name), "{name} at {places:?}");
        }
    }
}

#[test]
fn arguments_follow_every_address() -> Result<()> {
    for (bundle, masked, maps) in
        [(sample_bundle(), false, 4), (sample_bundle(), true, 0), (two_launches(), false, 8), (split_keys(), false, 4)]
    {
        let (driver, runtime) = on_a_fresh_mock(bundle.clone())?;
        let mut tensors = Places::new(&runtime)?;
        let mut places = [0; TENSORS];
        let mut made = |places, encoded, moved| {
            let count = || (driver.count(Entry::EncodeTensorMap), driver.count(Entry::MoveTensorMap));
            let before = count();
            tensors.run(&runtime, places, masked).expect("a call");
            assert_eq!(count(), (before.0 + encoded, before.1 + moved), "{places:?}");
            assert_like_a_first_call(&driver, &runtime, &bundle, &mut tensors, (places, masked));
        };
        made(places, maps, 0);
        made(places, 0, 0);
        for tensor in (0..TENSORS).chain(0..TENSORS) {
            places[tensor] = 1 - places[tensor];
            let has_map = tensor < MASK || tensor == MASK + 1;
            made(places, 0, if has_map { maps / 4 } else { 0 });
        }
        made([1; TENSORS], 0, maps);
        made(places, 0, maps);
        assert_sound(&driver);
    }
    Ok(())
}

#[test]
fn a_call_that_fails_leaves_no_arguments_behind() -> Result<()> {
    for (entry, after) in [
        (Entry::MoveTensorMap, 0),
        (Entry::MoveTensorMap, 1),
        (Entry::MoveTensorMap, 5),
        (Entry::Launch, 0),
        (Entry::Launch, 1),
        (Entry::Alloc, 1),
    ] {
        for then in [0, 1] {
            let (driver, runtime) = on_a_fresh_mock(two_launches())?;
            let mut tensors = Places::new(&runtime)?;
            tensors.run(&runtime, [0; TENSORS], false)?;
            driver.fail(entry, after, 999);
            let failed = tensors.run(&runtime, [1; TENSORS], false);
            assert!(matches!(failed, Err(Error::Driver { code: 999, .. })), "{entry:?} after {after}: {failed:?}");
            assert_like_a_first_call(&driver, &runtime, &two_launches(), &mut tensors, ([then; TENSORS], false));
            assert_sound(&driver);
        }
    }
    Ok(())
}

#[test]
fn a_prepared_call_that_fails_can_be_launched_again() -> Result<()> {
    for (entry, after) in [(Entry::Launch, 0), (Entry::Launch, 1), (Entry::Alloc, 1)] {
        let (driver, runtime) = on_a_fresh_mock(two_launches())?;
        let buffers = inputs(&runtime, 1)?;
        let expected = run(&runtime, &buffers, false)?;
        let mut out = DeviceBuffer::filled(runtime.stream()?, 2 * LEN, 0xff)?;
        let [q, k, v] = views(&buffers)?;
        let mut call =
            runtime.attention(&q, &k, &v).prepare(TensorViewMut::from_buffer(&mut out, DType::F16, &SHAPE)?)?;
        driver.fail(entry, after, 999);
        assert!(matches!(call.launch(), Err(Error::Driver { code: 999, .. })));
        call.launch()?;
        drop(call);
        assert_eq!(out.to_vec::<half::f16>()?, expected);
        assert_sound(&driver);
    }
    Ok(())
}

/// A call with memory of another library, which need not be there until it is launched.
#[expect(unsafe_code, reason = "memory that the mock never frees")]
fn prepare_raw(runtime: &Runtime, at: [u64; 4], lse: Option<u64>) -> Result<PreparedCall<'static>> {
    let strides = [LEN as i64, 70 * 16, 16, 1];
    let [q, k, v, out] = at;
    // SAFETY: the memory is there whenever a test launches the call.
    let (q, k, v, out, lse) = unsafe {
        let input = |address| TensorView::from_raw(Device::Cuda(0), address, DType::F16, &SHAPE, &strides);
        let out = TensorViewMut::from_raw(Device::Cuda(0), out, DType::F16, &SHAPE, &strides)?;
        let lse =
            lse.map(|lse| TensorViewMut::from_raw(Device::Cuda(0), lse, DType::F32, &LSE_SHAPE, &[140, 70, 1, 1]));
        (input(q)?, input(k)?, input(v)?, out, lse.transpose()?)
    };
    let call = runtime.attention(&q, &k, &v);
    match lse {
        Some(lse) => call.prepare_with_lse(out, lse),
        None => call.prepare(out),
    }
}

#[test]
fn a_prepared_call_with_foreign_memory_can_be_kept() -> Result<()> {
    static KEPT: Mutex<Option<PreparedCall<'static>>> = Mutex::new(None);
    let (driver, runtime) = mock();
    let buffers = inputs(&runtime, 1)?;
    let expected = run(&runtime, &buffers, false)?;
    let memory: [u64; 4] = std::array::from_fn(|_| driver.foreign_memory(0, 2 * LEN));
    let data = [0, 1, 2].map(|part| noise(LEN, 3 + part));
    for (address, data) in memory.iter().zip(&data) {
        let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_bits().to_ne_bytes()).collect();
        driver.poke(*address, &bytes);
    }
    *KEPT.lock().expect("no panic") = Some(prepare_raw(&runtime, memory, None)?);
    // It keeps what it needs of the runtime, and another thread may launch it.
    drop((runtime, buffers));
    std::thread::spawn(|| KEPT.lock().expect("no panic").as_mut().expect("a call").launch())
        .join()
        .expect("no panic")?;
    let got = driver.peek(memory[3], 2 * LEN);
    let expected: Vec<u8> = expected.iter().flat_map(|x| x.to_bits().to_ne_bytes()).collect();
    assert_eq!(got, expected);
    *KEPT.lock().expect("no panic") = None;
    assert_sound(&driver);
    Ok(())
}

#[test]
fn addresses_of_a_known_geometry_are_refused_as_of_a_new_one() -> Result<()> {
    let (driver, runtime) = mock();
    let at = [0x1_0000, 0x2_0000, 0x3_0000, 0x4_0000];
    let lse = Some(0x5_0000);
    let mut moved = at;
    moved[3] = at[1] + 256;
    for _ in 0..2 {
        prepare_raw(&runtime, at, lse)?;
        for (refused, argument) in [
            (prepare_raw(&runtime, moved, lse), "out: given memory shared with key"),
            (prepare_raw(&runtime, at, Some(0x5_0002)), "lse: given address 0x50002"),
            (prepare_raw(&runtime, at, Some(0)), "lse: given address 0x0"),
            (prepare_raw(&runtime, at, Some(at[3] + 64)), "lse: given memory shared with out"),
            (prepare_raw(&runtime, at, Some(at[2] + 64)), "lse: given memory shared with value"),
        ] {
            let refused = refused.expect_err(argument).to_string();
            assert!(refused.starts_with(argument), "{refused}");
        }
    }
    assert_sound(&driver);
    Ok(())
}

#[test]
fn a_prepared_call_goes_to_any_stream_of_its_device() -> Result<()> {
    let driver = crate::support::devices(&[(9, 0), (9, 0)]);
    let (runtime, other) = (crate::support::runtime(&driver, 0)?, crate::support::runtime(&driver, 1)?);
    let buffers = inputs(&runtime, 1)?;
    let expected = run(&runtime, &buffers, false)?;
    let side = runtime.new_stream()?;
    let mut out = DeviceBuffer::filled(runtime.stream()?, 2 * LEN, 0xff)?;
    let [q, k, v] = views(&buffers)?;
    let mut call = runtime.attention(&q, &k, &v).prepare(TensorViewMut::from_buffer(&mut out, DType::F16, &SHAPE)?)?;
    let before = driver.launches().len();
    call.launch_on(&side)?;
    call.launch()?;
    let refused = call.launch_on(other.stream()?).expect_err("another device");
    assert_eq!(refused.to_string(), "stream: given a stream of cuda:1; accepted a stream of cuda:0");
    let streams: Vec<_> = launches(&driver, before).iter().map(|launch| launch.stream).collect();
    assert_eq!(streams, [side.raw(), runtime.stream()?.raw()]);
    drop(call);
    assert_eq!(out.to_vec::<half::f16>()?, expected);

    let data = noise(LEN, 1);
    let mut on_cpu = data.clone();
    let view = TensorView::from_slice(&data, &SHAPE)?;
    let cpu = Runtime::cpu();
    let mut call = cpu.attention(&view, &view, &view).prepare(TensorViewMut::from_slice(&mut on_cpu, &SHAPE)?)?;
    let refused = call.launch_on(&side).expect_err("no streams");
    assert!(refused.to_string().starts_with("stream: given a CUDA stream; accepted none"), "{refused}");
    drop(call);
    assert_eq!(on_cpu, data);
    assert_sound(&driver);
    Ok(())
}

#[test]
fn launches_of_prepared_calls_count() -> Result<()> {
    let (driver, runtime) = mock();
    let buffers = inputs(&runtime, 1)?;
    let mut out = DeviceBuffer::uninit(runtime.stream()?, 2 * LEN)?;
    let [q, k, v] = views(&buffers)?;
    let view = TensorViewMut::from_buffer(&mut out, DType::F16, &SHAPE)?;
    let mut call = runtime.attention(&q, &k, &v).causal(true).prepare(view)?;
    assert_eq!(last_plan(), None);
    call.launch()?;
    let kernel = || last_plan().map(|plan| plan.kernel);
    let (banded, dense) = (Some("hopper.f16.none.band.16".to_owned()), Some("hopper.f16.none.dense.16".to_owned()));
    assert_eq!(kernel(), banded);
    run(&runtime, &buffers, false)?;
    assert_eq!(kernel(), dense);
    // One that fails does not.
    driver.fail(Entry::Launch, 0, 999);
    call.launch().expect_err("a failure");
    assert_eq!(kernel(), dense);
    call.launch()?;
    call.launch()?;
    assert_eq!(kernel(), banded);
    // Nor does it elsewhere.
    std::thread::scope(|scope| {
        let kernels = scope.spawn(|| -> Result<_> {
            let before = last_plan();
            call.launch()?;
            Ok((before, last_plan().map(|plan| plan.kernel)))
        });
        assert_eq!(kernels.join().expect("no panic"), Ok((None, banded)));
    });
    assert_sound(&driver);
    Ok(())
}

/// Keeps what each thread logs.
struct Logbook;

thread_local! {
    static LOGGED: std::cell::RefCell<Vec<String>> = const { std::cell::RefCell::new(Vec::new()) };
}

impl log::Log for Logbook {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        LOGGED.with_borrow_mut(|logged| logged.push(format!("{} {}", record.level(), record.args())));
    }

    fn flush(&self) {}
}

#[test]
fn launches_of_prepared_calls_are_logged() -> Result<()> {
    log::set_logger(&Logbook).expect("the only logger");
    log::set_max_level(log::LevelFilter::Info);
    let (_driver, runtime) = mock();
    let buffers = inputs(&runtime, 1)?;
    run(&runtime, &buffers, false)?;
    let called = LOGGED.take();
    let mut out = DeviceBuffer::uninit(runtime.stream()?, 2 * LEN)?;
    let [q, k, v] = views(&buffers)?;
    let view = TensorViewMut::from_buffer(&mut out, DType::F16, &SHAPE)?;
    let mut call = runtime.attention(&q, &k, &v).prepare(view)?;
    assert_eq!(LOGGED.take(), Vec::<String>::new());
    call.launch()?;
    call.launch()?;
    let launched = LOGGED.take();
    assert!(called[0].starts_with("INFO attention(") && called[0].contains("runs hopper"), "{called:?}");
    assert_eq!(launched, [called.clone(), called].concat());
    Ok(())
}
