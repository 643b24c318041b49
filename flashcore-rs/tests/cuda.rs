//! The same promises on a GPU. Without one every test says so and passes.
//!
//! Self-contained: the test binary needs no file at run time, so that it can be built here and run on the GPU's machine.
#![cfg(feature = "cuda")]

#[path = "shared/asynchrony.rs"]
mod scenarios;
#[path = "shared/workload.rs"]
mod workload;

use std::io::Write;
use std::sync::Arc;

use flashcore::cpu::oracle::{eager, judge, judge_lse, oracle, values};
use flashcore::interop::cudarc::driver::{CudaContext, CudaStream};
use flashcore::{CausalAlign, DType, DeviceBuffer, Error, Layout, Problem, Result, Runtime, TensorView, TensorViewMut};
use half::f16;

use crate::workload::{Workload, noise};

/// The runtime of device 0; without a GPU `None`, and the reason on standard error.
fn gpu() -> Option<Runtime> {
    match Runtime::cuda(0) {
        Ok(runtime) => Some(runtime),
        Err(error @ (Error::DriverNotFound { .. } | Error::NoDevice { .. })) => {
            static ONCE: std::sync::Once = std::sync::Once::new();
            // Straight to the stream, because the harness swallows the output of tests that pass.
            ONCE.call_once(|| drop(writeln!(std::io::stderr(), "GPU tests skipped: {error}")));
            None
        }
        Err(error) => panic!("the driver is there, and yet: {error}"),
    }
}

/// Kernels that run long enough to be overtaken.
fn long() -> Result<Workload> {
    Workload::new([2, 8, 1024, 64], 1)
}

macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {$(
        #[test]
        fn $name() -> Result<()> {
            let Some(runtime) = gpu() else { return Ok(()) };
            scenarios::$name(&runtime, &long()?)
        }
    )*

    #[test]
    fn every_scenario_runs_here() {
        let names = [$(stringify!($name)),*];
        assert_eq!(names.map(Some).to_vec(), scenarios::CASES.map(|(name, _)| Some(name)).to_vec());
    }};
}

scenarios! {
    buffers_dropped_mid_kernel,
    every_buffer_at_home_elsewhere,
    outputs_feed_inputs_across_streams,
    threads_share_inputs,
    threads_share_a_graph,
    threads_at_home_and_a_graph_elsewhere,
    threads_elsewhere_and_a_graph_at_home,
    threads_with_two_names_of_a_stream,
    a_graph_outlives_its_inputs,
    a_graph_is_dropped_while_it_runs,
    captures_that_fail_leave_no_trace,
    a_capture_refuses_what_it_cannot_hold,
    downloads_follow_all_work,
}

/// Judges a causal call against the fp64 oracle.
fn judge_call(runtime: &Runtime, q: [usize; 4], kv: [usize; 4]) -> Result<()> {
    let layout = |shape: [usize; 4]| Layout::contiguous("tensor", DType::F16, &shape);
    let out_shape = [q[0], q[1], q[2], kv[3]];
    let lse_shape = [q[0], q[1], q[2], 1];
    let [query, key, value] = [(q, 1), (kv, 2), (kv, 3)].map(|(shape, seed)| noise(shape.iter().product(), seed));
    let views =
        (TensorView::from_slice(&query, &q)?, TensorView::from_slice(&key, &kv)?, TensorView::from_slice(&value, &kv)?);
    let problem = Problem {
        dtype: DType::F16,
        batch: q[0],
        num_heads_q: q[1],
        num_heads_kv: kv[1],
        seq_len_q: q[2],
        seq_len_k: kv[2],
        head_dim_qk: q[3],
        head_dim_v: kv[3],
        q_strides: layout(q)?.strides,
        k_strides: layout(kv)?.strides,
        v_strides: layout(kv)?.strides,
        out_strides: layout(out_shape)?.strides,
        attn_mask: None,
        band: Some(flashcore::attention::Band { lo: -(q[2] as i32), hi: kv[2] as i32 - q[2] as i32 }),
        scale_bits: (1.0 / (q[3] as f32).sqrt()).to_bits(),
        lse: true,
    };
    let truth = oracle(&problem, views.0, views.1, views.2, None);
    let bar = eager(&problem, views.0, views.1, views.2, None);

    let stream = runtime.stream()?;
    let inputs = [&query, &key, &value].map(|data| DeviceBuffer::from_slice(stream, data));
    let [dq, dk, dv] = inputs;
    let (dq, dk, dv) = (dq?, dk?, dv?);
    let mut out = DeviceBuffer::filled(stream, out_shape.iter().product::<usize>() * 2, 0xff)?;
    let mut lse = DeviceBuffer::filled(stream, lse_shape.iter().product::<usize>() * 4, 0xff)?;
    runtime
        .attention(
            &TensorView::from_buffer(&dq, DType::F16, &q)?,
            &TensorView::from_buffer(&dk, DType::F16, &kv)?,
            &TensorView::from_buffer(&dv, DType::F16, &kv)?,
        )
        .causal(true)
        .causal_align(CausalAlign::BottomRight)
        .run_with_lse(
            &mut TensorViewMut::from_buffer(&mut out, DType::F16, &out_shape)?,
            &mut TensorViewMut::from_buffer(&mut lse, DType::F32, &lse_shape)?,
        )?;
    let out = out.to_vec::<f16>()?;
    let report = judge(&problem, &values(&TensorView::from_slice(&out, &out_shape)?), &truth, &bar);
    assert!(report.pass, "{problem}: {report:?}");
    let report = judge_lse(&problem, &lse.to_vec::<f32>()?, &truth, &bar);
    assert!(report.pass, "{problem}: {report:?}");
    Ok(())
}

#[test]
fn outputs_pass_the_oracle() -> Result<()> {
    let Some(runtime) = gpu() else { return Ok(()) };
    for (q, kv) in [
        ([2, 8, 300, 64], [2, 8, 300, 64]),
        ([1, 6, 129, 128], [1, 2, 257, 128]),
        ([3, 4, 65, 40], [3, 1, 191, 40]),
        ([1, 2, 33, 111], [1, 2, 64, 111]),
        ([1, 2, 1, 256], [1, 1, 500, 256]),
    ] {
        judge_call(&runtime, q, kv)?;
    }
    Ok(())
}

#[test]
fn slices_of_cudarc_are_ordered_with_their_streams() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let Some(runtime) = gpu() else { return Ok(()) };
    let work = long()?;
    let context = CudaContext::new(0)?;
    let streams = [context.new_stream()?, context.new_stream()?, context.default_stream()];
    let wrapped = streams.iter().map(|stream| runtime.cudarc_stream(stream)).collect::<Result<Vec<_>>>()?;
    let upload = |stream: &Arc<CudaStream>, data: &[f16]| stream.clone_htod(data);
    for (home, elsewhere) in [(0, 1), (1, 2), (2, 0)] {
        // On the slices' own stream, on another of theirs, and on one of ours.
        for stream in [&wrapped[home], &wrapped[elsewhere], runtime.stream()?] {
            let query = upload(&streams[home], &work.query)?;
            let key = upload(&streams[elsewhere], &work.key)?;
            let mut value = upload(&streams[home], &work.value)?;
            let mut out = streams[home].alloc_zeros::<f16>(work.query.len())?;
            runtime
                .attention(
                    &TensorView::from_cuda_slice(&query, &work.shape)?,
                    &TensorView::from_cuda_slice(&key, &work.shape)?,
                    &TensorView::from_cuda_slice(&value, &work.shape)?,
                )
                .causal(true)
                .on(stream)
                .run(&mut TensorViewMut::from_cuda_slice(&mut out, &work.shape)?)?;
            // The kernel may still run: its inputs are freed, and one is overwritten from another stream.
            drop((query, key));
            streams[elsewhere].memset_zeros(&mut value)?;
            let garbage = streams[home].clone_htod(&vec![f16::NAN; work.query.len()])?;
            let got = streams[elsewhere].clone_dtoh(&out)?;
            for (got, expected) in got.iter().zip(&work.expected) {
                assert!((got.to_f32() - expected.to_f32()).abs() < 4e-3, "{got} instead of {expected}");
            }
            drop(garbage);
        }
    }
    let per_thread = runtime.cudarc_stream(&context.per_thread_stream());
    assert!(matches!(per_thread, Err(Error::InvalidArgument { argument: "stream", .. })), "{per_thread:?}");
    Ok(())
}

#[test]
fn foreign_streams_and_the_legacy_one_are_served() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let Some(runtime) = gpu() else { return Ok(()) };
    let work = long()?;
    let context = CudaContext::new(0)?;
    let created = context.new_stream()?;
    for raw in [0, 1, created.cu_stream() as u64] {
        // SAFETY: the legacy stream always exists, and `created` outlives everything here.
        #[expect(unsafe_code, reason = "foreign streams")]
        let stream = unsafe { runtime.foreign_stream(raw) }?;
        let inputs = work.upload([&stream, runtime.stream()?, &stream])?;
        let mut out = work.output(&stream)?;
        work.run(&runtime, runtime.stream()?, &inputs, &mut out)?;
        work.run(&runtime, &stream, &inputs, &mut out)?;
        drop(inputs);
        work.assert_in(&out);
    }
    Ok(())
}

#[test]
fn a_graph_of_somebody_else_takes_foreign_memory_only() -> std::result::Result<(), Box<dyn std::error::Error>> {
    use flashcore::interop::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

    let Some(runtime) = gpu() else { return Ok(()) };
    let work = Workload::new([1, 2, 64, 64], 1)?;
    let stream = CudaContext::new(0)?.new_stream()?;
    let wrapped = runtime.cudarc_stream(&stream)?;
    let inputs = work.upload([&wrapped, &wrapped, &wrapped])?;
    let mut out = work.output(&wrapped)?;
    work.run(&runtime, &wrapped, &inputs, &mut out)?;
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
    let refused = work.run(&runtime, &wrapped, &inputs, &mut out);
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    drop(stream.end_capture(flags)?);
    assert!(matches!(refused, Err(Error::InvalidArgument { .. })), "{refused:?}");
    work.assert_in(&out);
    Ok(())
}

#[test]
fn memory_that_runs_out_is_an_error() -> Result<()> {
    let Some(runtime) = gpu() else { return Ok(()) };
    let total = runtime.device_info().map_or(0, |info| info.total_memory);
    let result = DeviceBuffer::uninit(runtime.stream()?, total * 2);
    assert_eq!(result.err(), Some(Error::OutOfMemory { requested: total * 2 }));
    // And the device is as good as before.
    scenarios::downloads_follow_all_work(&runtime, &Workload::new([1, 2, 64, 64], 1)?)
}
