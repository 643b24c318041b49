//! Random programs of everything that safe code can do with buffers, streams, graphs and threads, with driver calls that
//! fail at random: none may touch memory out of order, after it was freed, or outside its allocation.

use std::sync::{Arc, Mutex, MutexGuard};

use flashcore::testing::{Entry, MockDriver, sample_bundle};
use flashcore::{DType, DeviceBuffer, Error, Event, Graph, Result, Runtime, Stream, TensorView, TensorViewMut};
use proptest::prelude::*;

use crate::support::{cases, two_launches, with_bundle};

const SHAPE: [usize; 4] = [1, 1, 3, 8];
const BYTES: usize = 48;

#[derive(Clone, Debug)]
enum Step {
    Buffer { home: usize, secret: bool },
    DropBuffer(usize),
    Stream { foreign: bool },
    DropStream(usize),
    Run { stream: usize, inputs: [usize; 3], out: usize },
    Download(usize),
    Wait(usize, usize),
    Synchronize(usize),
    Record { stream: usize },
    Block { event: usize, stream: usize },
    Capture { stream: usize, steps: Vec<Step>, fails: bool },
    Launch { graph: usize, stream: usize },
    DropGraph(usize),
    Fail { entry: Entry, after: usize, code: u32 },
}

fn step(faults: bool) -> impl Strategy<Value = Step> {
    let leaf = leaf(faults).boxed();
    let body = prop::collection::vec(leaf.clone(), 0..6);
    prop_oneof![
        8 => leaf,
        1 => (0..6usize, body, any::<bool>()).prop_map(|(stream, steps, fails)| Step::Capture { stream, steps, fails }),
    ]
}

fn leaf(faults: bool) -> impl Strategy<Value = Step> {
    use Entry::*;
    let entry = prop::sample::select(vec![
        Launch,
        Alloc,
        Free,
        Memset,
        Synchronize,
        CreateEvent,
        RecordEvent,
        WaitEvent,
        EndCapture,
        BeginCapture,
        LaunchGraph,
        CopyToHost,
        CreateStream,
        DestroyEvent,
    ]);
    prop_oneof![
        4 => (0..6usize, any::<bool>()).prop_map(|(home, secret)| Step::Buffer { home, secret }),
        2 => (0..8usize).prop_map(Step::DropBuffer),
        1 => any::<bool>().prop_map(|foreign| Step::Stream { foreign }),
        1 => (0..6usize).prop_map(Step::DropStream),
        8 => (0..6usize, [0..8usize, 0..8, 0..8], 0..8usize)
            .prop_map(|(stream, inputs, out)| Step::Run { stream, inputs, out }),
        2 => (0..8usize).prop_map(Step::Download),
        1 => (0..6usize, 0..6usize).prop_map(|(a, b)| Step::Wait(a, b)),
        1 => (0..6usize).prop_map(Step::Synchronize),
        1 => (0..6usize).prop_map(|stream| Step::Record { stream }),
        1 => (0..4usize, 0..6usize).prop_map(|(event, stream)| Step::Block { event, stream }),
        3 => (0..4usize, 0..6usize).prop_map(|(graph, stream)| Step::Launch { graph, stream }),
        1 => (0..4usize).prop_map(Step::DropGraph),
        1 => (entry, 0..4usize, prop::sample::select(vec![1, 2, 999])).prop_map(move |(entry, after, code)| {
            if faults { Step::Fail { entry, after, code } } else { Step::DropBuffer(after) }
        }),
    ]
}

struct World<'a> {
    driver: &'a MockDriver,
    runtime: &'a Runtime,
    streams: Vec<Stream>,
    buffers: Vec<DeviceBuffer>,
    events: Vec<Event>,
    shared: &'a Shared,
}

/// What the threads have in common.
struct Shared {
    graphs: Mutex<Vec<Arc<Graph>>>,
    /// The sixth and the seventh input.
    inputs: [DeviceBuffer; 2],
}

impl<'a> World<'a> {
    fn new(driver: &'a MockDriver, runtime: &'a Runtime, shared: &'a Shared) -> Result<Self> {
        let streams = vec![runtime.stream()?.clone(), runtime.new_stream()?];
        Ok(Self { driver, runtime, streams, buffers: Vec::new(), events: Vec::new(), shared })
    }

    fn graphs(&self) -> MutexGuard<'a, Vec<Arc<Graph>>> {
        self.shared.graphs.lock().expect("no panic")
    }

    fn input(&self, index: usize) -> &DeviceBuffer {
        let [sixth, seventh] = &self.shared.inputs;
        match index {
            6 => sixth,
            _ => self.buffers.get(index).unwrap_or(seventh),
        }
    }

    fn stream(&self, index: usize) -> Stream {
        self.streams[index % self.streams.len()].clone()
    }

    /// Does a step. Its errors are values, and of no interest here.
    fn step(&mut self, step: &Step) -> Result<()> {
        match step {
            &Step::Buffer { home, secret } => {
                let buffer = DeviceBuffer::filled(&self.stream(home), BYTES, 1)?;
                self.buffers.push(if secret { buffer.zero_on_drop()? } else { buffer });
            }
            &Step::DropBuffer(index) if index < self.buffers.len() => drop(self.buffers.swap_remove(index)),
            Step::Stream { foreign: false } => self.streams.push(self.runtime.new_stream()?),
            Step::Stream { foreign: true } => {
                // SAFETY: the mock never destroys the streams that it makes for others.
                #[expect(unsafe_code, reason = "a foreign stream")]
                self.streams.push(unsafe { self.runtime.foreign_stream(self.driver.foreign_stream(0)) }?);
            }
            &Step::DropStream(index) if self.streams.len() > 2 && index < self.streams.len() => {
                drop(self.streams.swap_remove(index));
            }
            &Step::Run { stream, inputs, out } if out < self.buffers.len() => {
                let stream = self.stream(stream);
                let mut output = self.buffers.swap_remove(out);
                let done = self.run(&stream, inputs, &mut output);
                self.buffers.push(output);
                done?;
            }
            &Step::Download(index) if index < self.buffers.len() => drop(self.buffers[index].to_vec::<u8>()?),
            &Step::Wait(a, b) => self.stream(a).wait_for(&self.stream(b))?,
            &Step::Synchronize(stream) => self.stream(stream).synchronize()?,
            &Step::Record { stream } => self.events.push(self.stream(stream).record()?),
            &Step::Block { event, stream } if event < self.events.len() => {
                self.events[event].block(&self.stream(stream))?;
            }
            Step::Capture { stream, steps, fails } => {
                let stream = self.stream(*stream);
                let graph = stream.capture(|| {
                    // Most steps go to the captured stream; all others must be kept out of it.
                    self.streams.push(stream.clone());
                    for step in steps {
                        let _ = self.step(step);
                    }
                    if *fails { Err(Error::OutOfMemory { requested: 0 }) } else { Ok(()) }
                })?;
                self.graphs().push(Arc::new(graph));
            }
            &Step::Launch { graph, stream } => {
                let graph = self.graphs().get(graph).cloned();
                graph.map_or(Ok(()), |graph| graph.launch(&self.stream(stream)))?;
            }
            &Step::DropGraph(index) => {
                let mut graphs = self.graphs();
                let graph = (index < graphs.len()).then(|| graphs.swap_remove(index));
                drop(graphs);
                drop(graph);
            }
            &Step::Fail { entry, after, code } => self.driver.fail(entry, after, code),
            _ => {}
        }
        Ok(())
    }

    fn run(&self, stream: &Stream, inputs: [usize; 3], out: &mut DeviceBuffer) -> Result<()> {
        let [q, k, v] = inputs.map(|index| TensorView::from_buffer(self.input(index), DType::F16, &SHAPE));
        let mut out = TensorViewMut::from_buffer(out, DType::F16, &SHAPE)?;
        self.runtime.attention(&q?, &k?, &v?).on(stream).run(&mut out)
    }
}

fn run(bundle: Vec<u8>, threads: &[Vec<Step>]) -> std::result::Result<(), TestCaseError> {
    let driver = Arc::new(MockDriver::default());
    let runtime = with_bundle(&driver, Runtime::builder(), bundle).expect("a runtime");
    let home = runtime.stream().expect("a stream");
    let inputs = [2, 3].map(|value| DeviceBuffer::filled(home, BYTES, value).expect("a buffer"));
    let shared = Shared { graphs: Mutex::default(), inputs };
    let worlds = threads.iter().map(|_| World::new(&driver, &runtime, &shared).expect("a world"));
    std::thread::scope(|scope| {
        for (mut world, steps) in worlds.collect::<Vec<_>>().into_iter().zip(threads) {
            scope.spawn(move || {
                for step in steps {
                    let _ = world.step(step);
                }
            });
        }
    });
    drop((shared, runtime));
    prop_assert_eq!(driver.violations(), Vec::<String>::new());
    let faults = |steps: &[Step]| {
        let body = |step: &Step| match step {
            Step::Fail { .. } => true,
            Step::Capture { steps, .. } => steps.iter().any(|step| matches!(step, Step::Fail { .. })),
            _ => false,
        };
        steps.iter().any(body)
    };
    if !threads.iter().any(|steps| faults(steps)) {
        let (allocations, _, events, graphs) = driver.live();
        prop_assert_eq!((allocations, events, graphs), (0, 0, 0), "leaks");
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn programs_are_ordered(steps in prop::collection::vec(step(false), 1..40)) {
        run(sample_bundle(), &[steps])?;
    }

    #[test]
    fn programs_with_failing_calls_are_ordered(steps in prop::collection::vec(step(true), 1..40)) {
        // Two launches per call, so that a call can fail half-way.
        run(two_launches(), &[steps])?;
    }

    #[test]
    fn threads_are_ordered(
        first in prop::collection::vec(step(true), 1..20),
        second in prop::collection::vec(step(false), 1..20),
    ) {
        run(two_launches(), &[first, second])?;
    }
}
