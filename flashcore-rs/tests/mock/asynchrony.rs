//! Every access is ordered, whatever safe code does.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use flashcore::testing::{Entry, LentMemory, MockConfig, MockDriver};
use flashcore::{DType, DeviceBuffer, Error, Graph, Runtime, Stream, TensorView};

use crate::scenarios::CASES;
use crate::support::{assert_sound, mock, runtime};
use crate::workload::Workload;

#[test]
fn scenarios_hold_on_the_mock() -> flashcore::Result<()> {
    let work = Workload::new([1, 2, 5, 8], 1)?;
    for (name, case) in CASES {
        let (driver, runtime) = mock();
        case(&runtime, &work).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(driver.violations(), Vec::<String>::new(), "{name}");
        drop(runtime);
        assert_eq!(driver.live(), (0, 0, 0, 0), "{name} leaks");
        assert_sound(&driver);
    }
    Ok(())
}

#[test]
fn threads_that_overtake_each_other_are_ordered() -> flashcore::Result<()> {
    let work = Workload::new([1, 2, 5, 8], 1)?;
    for (name, case) in CASES.into_iter().filter(|(name, _)| name.starts_with("threads")) {
        let driver = Arc::new(MockDriver::new(MockConfig { dawdles: true, ..MockConfig::default() }));
        case(&runtime(&driver, 0)?, &work).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(driver.violations(), Vec::<String>::new(), "{name}");
    }
    Ok(())
}

/// Numbers that look random.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % limit
    }
}

/// What many threads use at once. The graphs write what they all read.
struct Common {
    graphs: Vec<Graph>,
    buffers: Vec<DeviceBuffer>,
    /// After all that is at home there.
    streams: Vec<Stream>,
    runtime: Runtime,
    work: Workload,
}

impl Common {
    fn new(driver: &Arc<MockDriver>) -> flashcore::Result<Self> {
        let (runtime, work) = (runtime(driver, 0)?, Workload::new([1, 1, 3, 8], 1)?);
        let mut streams = vec![runtime.stream()?.clone(), runtime.new_stream()?, runtime.new_stream()?];
        // SAFETY: the stream lives as long as its second name, and is not captured any more when threads use both.
        #[expect(unsafe_code, reason = "a second name")]
        streams.push(unsafe { runtime.foreign_stream(streams[1].raw()) }?);
        let mut buffers = Vec::new();
        for home in streams.iter().chain(&streams) {
            buffers.push(DeviceBuffer::from_slice(home, &work.query)?);
        }
        let mut graphs = Vec::new();
        for (stream, [q, k, v, out]) in [(0, [0, 0, 2, 3]), (2, [4, 4, 5, 0]), (1, [1, 3, 5, 6])] {
            let mut output = buffers.remove(out);
            let place = |index: usize| if index > out { index - 1 } else { index };
            let inputs = [q, k, v].map(|index| &buffers[place(index)]);
            work.run_with(&runtime, &streams[stream], inputs, &mut output)?;
            let captured = || work.run_with(&runtime, &streams[stream], inputs, &mut output);
            graphs.push(streams[stream].capture(captured)?);
            buffers.insert(out, output);
        }
        Ok(Self { runtime, work, streams, buffers, graphs })
    }

    /// A piece of work on a stream, with memory at home anywhere.
    fn step(&self, dice: &mut Dice) -> flashcore::Result<()> {
        let stream = &self.streams[dice.below(self.streams.len())];
        let mut buffer = || &self.buffers[dice.below(self.buffers.len())];
        let (inputs, read) = ([buffer(), buffer(), buffer()], buffer());
        match dice.below(12) {
            0..5 => {
                let mut out = self.work.output(&self.streams[dice.below(self.streams.len())])?;
                self.work.run_with(&self.runtime, stream, inputs, &mut out)
            }
            5..9 => self.graphs[dice.below(self.graphs.len())].launch(stream),
            9 => read.to_vec::<half::f16>().map(drop),
            10 => stream.wait_for(&self.streams[dice.below(self.streams.len())]),
            _ => stream.synchronize(),
        }
    }
}

#[test]
fn many_threads_are_ordered_and_never_stuck() {
    let rounds = if cfg!(miri) { 1 } else { 60 };
    for seed in 1..=rounds {
        let (done, is_done) = channel();
        std::thread::spawn(move || {
            let config = MockConfig { dawdles: seed % 2 == 0, ..MockConfig::default() };
            let driver = Arc::new(MockDriver::new(config));
            let common = Common::new(&driver).expect("buffers and graphs");
            std::thread::scope(|scope| {
                for thread in 1..=4 {
                    let (common, mut dice) = (&common, Dice(seed << 8 | thread));
                    scope.spawn(move || {
                        (0..16).try_for_each(|_| common.step(&mut dice)).expect("work that is queued");
                        // A capture of a stream that only this thread uses, of work with buffers that all do.
                        let own = common.runtime.new_stream().expect("a stream");
                        let mut out = common.work.output(&own).expect("memory");
                        let inputs = [0, 1, 2].map(|_| &common.buffers[dice.below(common.buffers.len())]);
                        let run = || common.work.run_with(&common.runtime, &own, inputs, &mut out);
                        own.capture(run).and_then(|graph| graph.launch(&own)).expect("a graph");
                    });
                }
            });
            drop(common);
            done.send((driver.violations(), driver.live())).expect("somebody who waits");
        });
        let (violations, live) = is_done.recv_timeout(Duration::from_secs(60)).expect("threads that get on");
        assert_eq!((violations, live), (Vec::<String>::new(), (0, 0, 0, 0)), "seed {seed}");
    }
}

#[test]
fn two_names_of_a_stream_need_not_be_joined() -> flashcore::Result<()> {
    let (driver, runtime) = mock();
    let work = Workload::new([1, 1, 3, 8], 1)?;
    let home = runtime.new_stream()?;
    // SAFETY: the stream outlives its second name.
    #[expect(unsafe_code, reason = "a second name")]
    let alias = unsafe { runtime.foreign_stream(home.raw()) }?;
    let inputs = work.upload([&home, &alias, &home])?;
    let mut out = work.output(&alias)?;
    for stream in [&home, &alias] {
        work.run(&runtime, stream, &inputs, &mut out)?;
        work.assert_in(&out);
    }
    assert_eq!(driver.count(Entry::CreateEvent), 0);
    assert_sound(&driver);
    Ok(())
}

#[test]
fn only_memory_away_from_home_is_lost() -> flashcore::Result<()> {
    let (driver, runtime) = mock();
    let work = Workload::new([1, 1, 3, 8], 1)?;
    let (home, side) = (runtime.stream()?, runtime.new_stream()?);
    let inputs = work.upload([home, &side, &side])?;
    let mut out = work.output(&side)?;
    driver.fail(Entry::CreateEvent, 1, 999);
    driver.fail(Entry::Synchronize, 0, 999);
    assert!(work.run(&runtime, &side, &inputs, &mut out).is_err());
    let [lost, kept, _] = &inputs.0;
    assert!(matches!(lost.to_vec::<half::f16>(), Err(Error::InvalidArgument { argument: "buffer", .. })));
    // The stream of the work is in order with it, whatever became of the others.
    assert_eq!(kept.to_vec::<half::f16>()?, work.key);
    work.assert_in(&out);
    assert_sound(&driver);
    drop((inputs, out));
    assert_eq!(driver.live().0, 1);
    Ok(())
}

#[test]
fn secrets_are_zeroed_before_they_are_freed() -> flashcore::Result<()> {
    let (driver, runtime) = mock();
    let stream = runtime.new_stream()?;
    let secret = || DeviceBuffer::from_slice(&stream, &[1u8; 64])?.zero_on_drop();
    let zeroed = |count: usize| {
        let log = driver.log();
        assert_eq!(log.iter().filter(|&&entry| entry == Entry::Free).count(), count);
        let before = log.windows(2).filter(|pair| *pair == [Entry::Memset, Entry::Free]).count();
        assert_eq!(before, count);
    };
    drop(secret()?);
    zeroed(1);
    // During a capture of the stream: afterwards.
    let during = secret()?;
    drop(stream.capture(|| {
        drop(during);
        zeroed(1);
        Ok(())
    })?);
    zeroed(2);
    // Memory that cannot be zeroed is kept.
    let kept = secret()?;
    driver.fail(Entry::Memset, 0, 1);
    drop(kept);
    zeroed(2);
    assert_eq!(driver.live().0, 1);
    assert_sound(&driver);
    Ok(())
}

#[test]
fn memory_on_loan_is_ordered_on_its_own_stream() -> flashcore::Result<()> {
    let (driver, runtime) = mock();
    let homes = [driver.foreign_stream(0), driver.foreign_stream(0)];
    let shape = [1, 1, 3, 8];
    let side = runtime.new_stream()?;
    for stream in [runtime.stream()?, &side] {
        let mut inputs = homes.map(|home| LentMemory::new(&driver, home, 48));
        let mut out = LentMemory::new(&driver, homes[1], 48);
        inputs.iter_mut().for_each(LentMemory::overwrite);
        let owned = DeviceBuffer::filled(&side, 48, 0)?;
        {
            let [q, k] = &inputs;
            let (q, k) = (q.view(DType::F16, &shape)?, k.view(DType::F16, &shape)?);
            let v = TensorView::from_buffer(&owned, DType::F16, &shape)?;
            runtime.attention(&q, &k, &v).on(stream).run(&mut out.view_mut(DType::F16, &shape)?)?;
        }
        assert_eq!((inputs[0].loans(), out.loans()), (0, 0));
        // Their owner writes again at once, and frees.
        inputs.iter_mut().for_each(LentMemory::overwrite);
        out.overwrite();
        // A graph cannot own it.
        let captured = side.capture(|| {
            let [q, k] = &inputs;
            let (q, k) = (q.view(DType::F16, &shape)?, k.view(DType::F16, &shape)?);
            runtime.attention(&q, &k, &k).on(&side).run(&mut out.view_mut(DType::F16, &shape)?)
        });
        assert!(matches!(captured, Err(Error::InvalidArgument { argument: "stream", .. })), "{captured:?}");
        assert_eq!(out.loans(), 0);
    }
    assert_sound(&driver);
    drop((side, runtime));
    assert_eq!(driver.live(), (0, 2, 0, 0));
    Ok(())
}

#[test]
fn memory_is_leaked_when_nobody_can_say_that_it_is_free() -> flashcore::Result<()> {
    let (driver, runtime) = mock();
    let work = Workload::new([1, 1, 3, 8], 1)?;
    let (home, side) = (runtime.stream()?, runtime.new_stream()?);
    for waits in [true, false] {
        let inputs = work.upload([home, home, home])?;
        let mut out = work.output(home)?;
        // The second event is the one that would make the home stream wait for the kernel.
        driver.fail(Entry::CreateEvent, 1, 999);
        if !waits {
            driver.fail(Entry::Synchronize, 0, 999);
        }
        let result = work.run(&runtime, &side, &inputs, &mut out);
        assert_eq!(result.is_ok(), waits, "{result:?}");
        drop((inputs, out));
        assert_eq!(driver.live().0, if waits { 0 } else { 4 });
    }
    assert_sound(&driver);
    Ok(())
}

#[test]
fn memory_that_may_still_be_in_use_is_refused() -> flashcore::Result<()> {
    let (driver, runtime) = mock();
    let work = Workload::new([1, 1, 3, 8], 1)?;
    let (home, side, another) = (runtime.stream()?, runtime.new_stream()?, runtime.new_stream()?);
    let inputs = work.upload([home, home, home])?;
    let mut out = work.output(home)?;
    let graph = another.capture(|| work.run(&runtime, &another, &inputs, &mut out))?;
    // The second event is the one that would make the home stream wait for the kernel.
    driver.fail(Entry::CreateEvent, 1, 999);
    driver.fail(Entry::Synchronize, 0, 999);
    let failed = work.run(&runtime, &side, &inputs, &mut out);
    assert!(matches!(failed, Err(Error::Driver { code: 999, .. })), "{failed:?}");

    let calls = driver.log().len();
    let refused = |what: &str, result: flashcore::Result<()>| match result {
        Err(Error::InvalidArgument { argument: "buffer", given, .. }) => assert!(given.contains("in use"), "{given}"),
        other => panic!("{what}: {other:?}"),
    };
    for stream in [home, &side, &another] {
        refused("a call", work.run(&runtime, stream, &inputs, &mut out));
        refused("a graph", graph.launch(stream));
    }
    refused("a download", out.to_vec::<half::f16>().map(drop));
    refused("a capture", another.capture(|| work.run(&runtime, &another, &inputs, &mut out)).map(drop));
    assert_eq!(driver.log()[calls..], [Entry::BeginCapture, Entry::EndCapture, Entry::DestroyGraph]);

    // Others have their order still.
    let others = work.upload([home, &side, home])?;
    let mut other_out = work.output(home)?;
    work.run(&runtime, &side, &others, &mut other_out)?;
    work.assert_in(&other_out);
    refused("one of many", work.run(&runtime, &side, &inputs, &mut other_out));
    work.assert_in(&other_out);

    drop((graph, inputs, out, others, other_out));
    assert_eq!(driver.live().0, 4);
    assert_sound(&driver);
    Ok(())
}
