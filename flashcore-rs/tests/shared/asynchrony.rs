//! What safe code may do with buffers, streams, threads and graphs, and the output must still be right. The mock proves
//! that every access is ordered; a GPU shows it on the machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use flashcore::{DeviceBuffer, Error, Result, Runtime};

use crate::workload::Workload;

/// Buffers go out of scope while their kernel runs, and their memory is handed out again at once.
pub fn buffers_dropped_mid_kernel(runtime: &Runtime, work: &Workload) -> Result<()> {
    let home = runtime.stream()?;
    let side = runtime.new_stream()?;
    for stream in [home, &side] {
        for _ in 0..4 {
            let inputs = work.upload([home, home, home])?;
            let mut out = work.output(home)?;
            work.run(runtime, stream, &inputs, &mut out)?;
            drop(inputs);
            let reused = (0..3).map(|_| DeviceBuffer::filled(home, work.bytes(), 0xff)).collect::<Result<Vec<_>>>()?;
            work.assert_in(&out);
            drop(reused);
            // An output that nobody reads, dropped while it is written.
            let mut unread = work.output(&side)?;
            let inputs = work.upload([&side, home, &side])?;
            work.run(runtime, stream, &inputs, &mut unread)?;
        }
    }
    Ok(())
}

/// Every buffer has another home, and the kernel runs on yet another stream, which is dropped first.
pub fn every_buffer_at_home_elsewhere(runtime: &Runtime, work: &Workload) -> Result<()> {
    let homes = [runtime.new_stream()?, runtime.new_stream()?, runtime.new_stream()?, runtime.new_stream()?];
    let [a, b, c, d] = &homes;
    for _ in 0..4 {
        let inputs = work.upload([a, b, c])?;
        let mut out = work.output(d)?;
        let stream = runtime.new_stream()?;
        work.run(runtime, &stream, &inputs, &mut out)?;
        drop(stream);
        work.assert_in(&out);
        // Overwrites what the kernel read.
        drop(inputs);
        drop((DeviceBuffer::filled(a, work.bytes(), 0xff)?, DeviceBuffer::filled(b, work.bytes(), 0xff)?));
    }
    Ok(())
}

/// One call's output is the next one's input, on alternating streams.
pub fn outputs_feed_inputs_across_streams(runtime: &Runtime, work: &Workload) -> Result<()> {
    let streams = [runtime.new_stream()?, runtime.new_stream()?];
    let [a, b] = &streams;
    let inputs = work.upload([a, b, a])?;
    let mut out = work.output(b)?;
    work.run(runtime, b, &inputs, &mut out)?;
    // The other order of reading and writing: the output of the first call is overwritten by the third.
    let mut second = work.output(a)?;
    let [q, k, v] = inputs.0;
    let chained = crate::workload::Inputs([out, k, v]);
    work.run(runtime, a, &chained, &mut second)?;
    let [mut out, k, v] = chained.0;
    work.run(runtime, b, &crate::workload::Inputs([q, k, v]), &mut out)?;
    drop(second);
    work.assert_in(&out);
    Ok(())
}

/// Threads share inputs, each with a stream and an output of its own.
pub fn threads_share_inputs(runtime: &Runtime, work: &Workload) -> Result<()> {
    let home = runtime.stream()?;
    let inputs = work.upload([home, home, home])?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    let stream = runtime.new_stream()?;
                    for _ in 0..4 {
                        let mut out = work.output(&stream)?;
                        work.run(runtime, &stream, &inputs, &mut out)?;
                        work.assert_in(&out);
                    }
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })
}

/// Threads launch one graph on different streams while another reads its output.
pub fn threads_share_a_graph(runtime: &Runtime, work: &Workload) -> Result<()> {
    let home = runtime.new_stream()?;
    let inputs = work.upload([&home, &home, &home])?;
    let mut out = work.output(&home)?;
    work.run(runtime, &home, &inputs, &mut out)?;
    let graph = home.capture(|| work.run(runtime, &home, &inputs, &mut out))?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let launchers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    let stream = runtime.new_stream()?;
                    (0..8).try_for_each(|_| graph.launch(&stream))
                })
            })
            .collect();
        let reader = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                work.assert_in(&out);
            }
        });
        let outcome = launchers.into_iter().try_for_each(|thread| thread.join().expect("no panic"));
        done.store(true, Ordering::Relaxed);
        reader.join().expect("no panic");
        outcome
    })
}

/// Does all pieces of work at once, each several times on a thread of its own.
fn at_once<const N: usize>(work: [&(dyn Fn() -> Result<()> + Sync); N]) -> Result<()> {
    std::thread::scope(|scope| {
        let threads = work.map(|work| scope.spawn(move || (0..12).try_for_each(|_| work())));
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })
}

/// Calls on a stream, at home there, read what a graph writes on another.
pub fn threads_at_home_and_a_graph_elsewhere(runtime: &Runtime, work: &Workload) -> Result<()> {
    let (home, side) = (runtime.new_stream()?, runtime.new_stream()?);
    let [inputs, graph_inputs] = [work.upload([&home, &home, &home])?, work.upload([&home, &home, &home])?];
    let mut out = work.output(&home)?;
    work.run(runtime, &home, &graph_inputs, &mut out)?;
    let graph = home.capture(|| work.run(runtime, &home, &graph_inputs, &mut out))?;
    let [_, k, v] = &inputs.0;
    let read = || work.run_with(runtime, &home, [&out, k, v], &mut work.output(&home)?);
    at_once([&read, &|| graph.launch(&side)])?;
    work.assert_in(&out);
    Ok(())
}

/// Calls on a stream read what a graph writes at home, on another, and what it writes on a third.
pub fn threads_elsewhere_and_a_graph_at_home(runtime: &Runtime, work: &Workload) -> Result<()> {
    let [home, side, third] = [runtime.new_stream()?, runtime.new_stream()?, runtime.new_stream()?];
    let inputs = work.upload([&home, &home, &home])?;
    let mut out = work.output(&home)?;
    work.run(runtime, &home, &inputs, &mut out)?;
    let graph = home.capture(|| work.run(runtime, &home, &inputs, &mut out))?;
    let [_, k, v] = &inputs.0;
    let read = || work.run_with(runtime, &side, [&out, k, v], &mut work.output(&side)?);
    at_once([&read, &|| graph.launch(&home)])?;
    at_once([&read, &|| graph.launch(&third)])?;
    work.assert_in(&out);
    Ok(())
}

/// A stream has two names, and work under either is ordered with a graph on another stream.
pub fn threads_with_two_names_of_a_stream(runtime: &Runtime, work: &Workload) -> Result<()> {
    let (home, side) = (runtime.new_stream()?, runtime.new_stream()?);
    // SAFETY: `home` is dropped after everything here, and captured while nobody uses its other name.
    #[expect(unsafe_code, reason = "a second name")]
    let alias = unsafe { runtime.foreign_stream(home.raw()) }?;
    let [inputs, graph_inputs] = [work.upload([&home, &alias, &home])?, work.upload([&home, &home, &home])?];
    let mut out = work.output(&home)?;
    work.run(runtime, &alias, &graph_inputs, &mut out)?;
    let graph = side.capture(|| work.run(runtime, &side, &graph_inputs, &mut out))?;
    let [_, k, v] = &inputs.0;
    let read = |stream| work.run_with(runtime, stream, [&out, k, v], &mut work.output(&home)?);
    at_once([&|| read(&home), &|| read(&alias), &|| graph.launch(&side)])?;
    at_once([&|| read(&side), &|| graph.launch(&alias), &|| graph.launch(&home)])?;
    work.assert_in(&out);
    Ok(())
}

/// A graph is replayed after its inputs, and the stream that it was captured on, went out of scope.
pub fn a_graph_outlives_its_inputs(runtime: &Runtime, work: &Workload) -> Result<()> {
    let home = runtime.new_stream()?;
    let mut out = work.output(&home)?;
    let graph = {
        let inputs = work.upload([&home, runtime.stream()?, &home])?;
        let stream = runtime.new_stream()?;
        work.run(runtime, &stream, &inputs, &mut out)?;
        stream.capture(|| work.run(runtime, &stream, &inputs, &mut out))?
    };
    let garbage = (0..3).map(|_| DeviceBuffer::filled(&home, work.bytes(), 0xff)).collect::<Result<Vec<_>>>()?;
    for stream in [&home, runtime.stream()?, &runtime.new_stream()?] {
        graph.launch(stream)?;
        work.assert_in(&out);
    }
    // The graph goes while it runs, and the buffers with it.
    let graph = Arc::new(graph);
    graph.launch(runtime.stream()?)?;
    drop((graph, garbage));
    work.assert_in(&out);
    Ok(())
}

/// A graph is all that is left, and is dropped while it runs.
pub fn a_graph_is_dropped_while_it_runs(runtime: &Runtime, work: &Workload) -> Result<()> {
    for _ in 0..4 {
        let home = runtime.new_stream()?;
        let inputs = work.upload([&home, &home, &home])?;
        let mut out = work.output(&home)?;
        work.run(runtime, &home, &inputs, &mut out)?;
        let graph = home.capture(|| work.run(runtime, &home, &inputs, &mut out))?;
        graph.launch(runtime.stream()?)?;
        drop((inputs, out, graph));
    }
    runtime.stream()?.synchronize()
}

/// Errors and panics in a capture leave the stream as it was, and the call can be repeated.
pub fn captures_that_fail_leave_no_trace(runtime: &Runtime, work: &Workload) -> Result<()> {
    let stream = runtime.new_stream()?;
    let inputs = work.upload([&stream, &stream, &stream])?;
    let mut out = work.output(&stream)?;
    work.run(runtime, &stream, &inputs, &mut out)?;
    work.assert_in(&out);

    let own = Error::OutOfMemory { requested: 7 };
    let failed = stream.capture(|| {
        work.run(runtime, &stream, &inputs, &mut out)?;
        Err(own.clone())
    });
    assert_eq!(failed.err(), Some(own));

    let panicked = stream.capture(|| {
        work.run(runtime, &stream, &inputs, &mut out)?;
        std::panic::panic_any("a panic that a test wants")
    });
    assert_eq!(panicked.err(), Some(Error::CallbackPanicked { during: "capture" }));

    drop(DeviceBuffer::filled(&stream, work.bytes(), 0xff)?);
    work.run(runtime, &stream, &inputs, &mut out)?;
    work.assert_in(&out);
    Ok(())
}

/// What a capture cannot hold is refused, one thing at a time, and the capture goes on.
pub fn a_capture_refuses_what_it_cannot_hold(runtime: &Runtime, work: &Workload) -> Result<()> {
    let (stream, other) = (runtime.new_stream()?, runtime.new_stream()?);
    let inputs = work.upload([&stream, &stream, &stream])?;
    let elsewhere = work.upload([&other, &other, &other])?;
    let mut out = work.output(&stream)?;
    let mut out_elsewhere = work.output(&other)?;
    work.run(runtime, &stream, &inputs, &mut out)?;
    let event = stream.record()?;
    let earlier = stream.capture(|| work.run(runtime, &stream, &inputs, &mut out))?;
    let refused = |what: &str, result: Result<()>| match result {
        Err(Error::InvalidArgument { given, .. }) => assert!(given.contains("captur"), "{what}: {given}"),
        other => panic!("{what}: {other:?}"),
    };
    let graph = stream.capture(|| {
        refused("allocation", DeviceBuffer::uninit(&stream, 64).map(drop));
        refused("upload", DeviceBuffer::from_slice(&stream, &[1f32]).map(drop));
        refused("download", inputs.0[0].to_vec::<half::f16>().map(drop));
        refused("synchronize", stream.synchronize());
        refused("timing", stream.record().map(drop));
        refused("an event", event.record(&stream));
        refused("waiting for an event", event.block(&stream));
        refused("waiting for a stream", stream.wait_for(&other));
        refused("a stream that waits", other.wait_for(&stream));
        refused("a second capture", stream.capture(|| Ok(())).map(drop));
        refused("a graph", earlier.launch(&stream));
        // Work on another stream would have to wait for the captured home of these.
        refused("buffers elsewhere", work.run(runtime, &other, &inputs, &mut out_elsewhere));
        std::thread::scope(|scope| {
            let result = scope.spawn(|| work.run(runtime, &stream, &elsewhere, &mut out_elsewhere)).join();
            refused("another thread", result.expect("no panic"));
        });
        work.run(runtime, &stream, &inputs, &mut out)?;
        // Buffers at home here are freed after the capture; buffers of other streams join at each launch.
        drop(inputs);
        work.run(runtime, &stream, &elsewhere, &mut out_elsewhere)
    })?;
    drop((elsewhere, earlier));
    graph.launch(&other)?;
    work.assert_in(&out);
    work.assert_in(&out_elsewhere);
    Ok(())
}

/// A download sees everything queued before it, on any stream.
pub fn downloads_follow_all_work(runtime: &Runtime, work: &Workload) -> Result<()> {
    let home = runtime.stream()?;
    let streams = [runtime.new_stream()?, runtime.new_stream()?];
    let inputs = work.upload([home, &streams[0], &streams[1]])?;
    let mut out = work.output(home)?;
    for stream in &streams {
        work.run(runtime, stream, &inputs, &mut out)?;
        work.assert_in(&out);
    }
    let secret = DeviceBuffer::from_slice(home, &work.query)?.zero_on_drop()?;
    assert_eq!(secret.to_vec::<half::f16>()?, work.query);
    Ok(())
}

/// All of the above by name.
pub type Case = (&'static str, fn(&Runtime, &Workload) -> Result<()>);
pub const CASES: [Case; 13] = [
    ("buffers_dropped_mid_kernel", buffers_dropped_mid_kernel),
    ("every_buffer_at_home_elsewhere", every_buffer_at_home_elsewhere),
    ("outputs_feed_inputs_across_streams", outputs_feed_inputs_across_streams),
    ("threads_share_inputs", threads_share_inputs),
    ("threads_share_a_graph", threads_share_a_graph),
    ("threads_at_home_and_a_graph_elsewhere", threads_at_home_and_a_graph_elsewhere),
    ("threads_elsewhere_and_a_graph_at_home", threads_elsewhere_and_a_graph_at_home),
    ("threads_with_two_names_of_a_stream", threads_with_two_names_of_a_stream),
    ("a_graph_outlives_its_inputs", a_graph_outlives_its_inputs),
    ("a_graph_is_dropped_while_it_runs", a_graph_is_dropped_while_it_runs),
    ("captures_that_fail_leave_no_trace", captures_that_fail_leave_no_trace),
    ("a_capture_refuses_what_it_cannot_hold", a_capture_refuses_what_it_cannot_hold),
    ("downloads_follow_all_work", downloads_follow_all_work),
];
