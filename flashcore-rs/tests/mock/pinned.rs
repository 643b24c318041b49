//! Calls that name the variant that may run.

use std::sync::Arc;

use flashcore::testing::MockDriver;
use flashcore::{
    AttentionOptions, DType, DeviceBuffer, Error, Explanation, Rejection, Result, Runtime, TensorView, TensorViewMut,
    last_plan,
};

use crate::support::{Call, assert_sound, mock, tuned, with_bundle};
use crate::workload::noise;

const SHAPE: [usize; 4] = [1, 2, 70, 16];
const LEN: usize = 2 * 70 * 16;

const PREFERRED: &str = "hopper.f16.none.dense.16";
const OTHER: &str = "portable.f16.none.band.2";

/// Runs a call, pinned or not, into poison; the output, and what was refused.
fn run(runtime: &Runtime, variant: Option<&str>, options: AttentionOptions) -> (Vec<half::f16>, Result<()>) {
    let stream = runtime.stream().expect("a stream");
    let buffers = [1, 2, 3].map(|seed| DeviceBuffer::from_slice(stream, &noise(LEN, seed)).expect("a buffer"));
    let mut out = DeviceBuffer::filled(stream, 2 * LEN, 0xff).expect("a buffer");
    let mut attempt = || {
        let [q, k, v] = buffers.each_ref().map(|buffer| TensorView::from_buffer(buffer, DType::F16, &SHAPE));
        let mut view = TensorViewMut::from_buffer(&mut out, DType::F16, &SHAPE)?;
        let mut call = runtime.attention(&q?, &k?, &v?).options(options);
        if let Some(name) = variant {
            call = call.variant(name)?;
        }
        call.run(&mut view)
    };
    let ran = attempt();
    (out.to_vec().expect("the output"), ran)
}

fn last_launch(driver: &MockDriver) -> Option<String> {
    driver.launches().pop().and_then(|launch| launch.variant)
}

#[test]
fn a_pinned_variant_is_the_one_that_is_launched() -> Result<()> {
    let (driver, runtime) = mock();
    let options = AttentionOptions::default();
    // Alternately, so that what is remembered of one call could be mistaken for the other.
    for _ in 0..3 {
        for (pin, expected) in [(None, PREFERRED), (Some(OTHER), OTHER), (Some(PREFERRED), PREFERRED)] {
            let (out, ran) = run(&runtime, pin, options);
            ran?;
            assert_eq!(last_launch(&driver).as_deref(), Some(expected));
            assert_eq!(last_plan().map(|plan| plan.kernel).as_deref(), Some(expected));
            assert!(out.iter().all(|x| x.is_finite()));
        }
    }
    assert_sound(&driver);
    Ok(())
}

#[test]
fn a_prepared_call_keeps_its_pin() -> Result<()> {
    let (driver, runtime) = mock();
    let stream = runtime.stream()?;
    let inputs = [1, 2, 3].map(|seed| DeviceBuffer::from_slice(stream, &noise(LEN, seed)));
    let [q, k, v] = inputs;
    let (q, k, v) = (q?, k?, v?);
    let view = |buffer| TensorView::from_buffer(buffer, DType::F16, &SHAPE);
    let mut out = DeviceBuffer::filled(stream, 2 * LEN, 0xff)?;
    let out = TensorViewMut::from_buffer(&mut out, DType::F16, &SHAPE)?;
    let mut call = runtime.attention(&view(&q)?, &view(&k)?, &view(&v)?).variant(OTHER)?.prepare(out)?;
    for _ in 0..2 {
        call.launch()?;
        assert_eq!(last_launch(&driver).as_deref(), Some(OTHER));
    }
    assert_sound(&driver);
    Ok(())
}

#[test]
fn a_pin_that_cannot_answer_is_refused_and_nothing_is_written() {
    let (driver, runtime) = mock();
    let causal = AttentionOptions { causal: true, ..AttentionOptions::default() };
    for _ in 0..2 {
        let (out, ran) = run(&runtime, Some(PREFERRED), causal);
        let Err(Error::Unsupported(refusal)) = &ran else { panic!("{ran:?}") };
        assert_eq!(refusal.rejected, [(PREFERRED.to_owned(), Rejection::Band)]);
        assert_eq!(refusal.hint, "ask for no variant by name; hopper.f16.none.band.16 answers it");
        assert!(out.iter().all(|x| x.to_bits() == 0xffff), "something was written");
    }
    let negative = AttentionOptions { scale: Some(-1.0), ..AttentionOptions::default() };
    assert!(matches!(run(&runtime, Some(PREFERRED), negative).1, Err(Error::Unsupported(_))));
    assert_eq!((driver.launches(), driver.violations()), (vec![], vec![]));
    // Not even where a call without the pin has just been answered.
    run(&runtime, None, causal).1.expect("an answer");
    assert!(run(&runtime, Some(PREFERRED), causal).1.is_err());
    assert_eq!(driver.launches().len(), 1);
}

#[test]
fn a_variant_that_is_not_there_is_refused_by_name() {
    let (driver, runtime) = mock();
    let (out, ran) = run(&runtime, Some("faster"), AttentionOptions::default());
    let message = ran.expect_err("a refusal").to_string();
    assert!(message.starts_with("variant: given \"faster\"; accepted one of hopper.f16.none.dense.16, "), "{message}");
    assert!(out.iter().all(|x| x.to_bits() == 0xffff));
    assert_eq!(driver.launches(), []);
}

#[test]
fn the_cpu_backend_has_one_variant() -> Result<()> {
    let data: Vec<f32> = noise(LEN, 1).iter().map(|x| x.to_f32()).collect();
    let mut out = vec![0f32; LEN];
    let (view, cpu) = (TensorView::from_slice(&data, &SHAPE)?, Runtime::cpu());
    cpu.attention(&view, &view, &view).variant("cpu")?.run(&mut TensorViewMut::from_slice(&mut out, &SHAPE)?)?;
    let refusal = cpu.attention(&view, &view, &view).variant(PREFERRED).expect_err("no such variant");
    assert_eq!(refusal.to_string(), format!("variant: given {PREFERRED:?}; accepted one of cpu"));
    Ok(())
}

#[test]
fn a_pin_overrules_what_a_variant_was_tuned_for() -> Result<()> {
    let driver = Arc::new(MockDriver::default());
    let runtime = with_bundle(&driver, Runtime::builder(), tuned())?;
    // 70 rows: `large` was tuned for 100 and more, and preferred to nothing below.
    for (pin, expected) in [(None, PREFERRED), (Some("large"), "large")] {
        run(&runtime, pin, AttentionOptions::default()).1?;
        assert_eq!(last_plan().map(|plan| plan.kernel).as_deref(), Some(expected));
    }
    assert_sound(&driver);
    Ok(())
}

#[test]
fn explain_honours_the_pin() -> Result<()> {
    let (_driver, runtime) = mock();
    let explain = |variant: &str, options| -> Result<Explanation> {
        let call = Call::new(DType::F16, SHAPE, SHAPE, 16);
        let stream = runtime.stream()?;
        let [q, k, v] = [call.query.upload(stream)?, call.key.upload(stream)?, call.value.upload(stream)?];
        let attention = runtime.attention(&call.query.on(&q)?, &call.key.on(&k)?, &call.value.on(&v)?);
        attention.options(options).variant(variant)?.explain()
    };
    let answered = explain(OTHER, AttentionOptions::default())?;
    assert_eq!(answered.chosen.as_deref(), Some(OTHER));
    let not_asked = Rejection::NotAsked { pinned: OTHER.into() };
    assert!(answered.rejected.len() == 13 && answered.rejected.iter().all(|(_, reason)| *reason == not_asked));
    let refused = explain(PREFERRED, AttentionOptions { causal: true, ..AttentionOptions::default() })?;
    assert_eq!(refused.chosen, None);
    assert!(refused.rejected.contains(&(PREFERRED.into(), Rejection::Band)), "{refused}");
    Ok(())
}
