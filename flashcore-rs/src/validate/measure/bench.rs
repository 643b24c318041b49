//! The clocks, and what is around the calls that are timed.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::arm::{Arm, LAUNCHES};
use super::spec::Mode;
use crate::cpu::oracle::eager;
use crate::device::{DeviceBuffer, Event, Graph, Probe, READING, Stream};
use crate::error::Result;
use crate::validate::correct::problem_of;
use crate::validate::host::HostTensor;
use crate::validate::inputs::Inputs;

/// How long the SM clock is watched after each sample.
const WATCHED: Duration = Duration::from_micros(4);
/// What the L2 cache is flushed with; anything but zeros.
const PATTERN: u8 = 0xa5;

/// Something that is timed.
pub(super) trait Timed {
    /// Goes on to other tensors.
    fn rotate(&mut self) {}
    /// On a device it only queues the work.
    fn call(&mut self) -> Result<()>;
    /// [`LAUNCHES`] calls.
    fn graph(&self) -> Option<&Graph> {
        None
    }
}

impl Timed for Arm<'_> {
    fn rotate(&mut self) {
        Arm::rotate(self);
    }

    fn call(&mut self) -> Result<()> {
        Arm::call(self)
    }

    fn graph(&self) -> Option<&Graph> {
        Arm::graph(self)
    }
}

/// Eager attention on one thread.
pub(super) struct Reference {
    inputs: Inputs,
    out: HostTensor,
}

impl Reference {
    pub(super) fn new(inputs: Inputs, out: HostTensor) -> Self {
        Self { inputs, out }
    }
}

impl Timed for Reference {
    fn call(&mut self) -> Result<()> {
        let problem = problem_of(&self.inputs, &self.out, false)?;
        let Inputs { query, key, value, attn_mask, .. } = &self.inputs;
        let mask = attn_mask.as_ref().map(HostTensor::view).transpose()?;
        std::hint::black_box(eager(&problem, query.view()?, key.view()?, value.view()?, mask));
        Ok(())
    }
}

/// A call that does nothing: the floor of every time.
struct Nothing<'a>(Option<(&'a Probe, &'a Stream)>);

impl Timed for Nothing<'_> {
    fn call(&mut self) -> Result<()> {
        self.0.map_or(Ok(()), |(probe, stream)| probe.nothing(stream))
    }
}

/// An arm with a planted slowdown.
pub(super) struct Turn<'a, 'b> {
    pub(super) timed: &'a mut (dyn Timed + 'b),
    pub(super) delay: Duration,
}

/// One sample, in the order in which they were taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Reading {
    pub(super) arm: usize,
    pub(super) ns: f64,
    pub(super) sm_mhz: Option<f64>,
}

/// Where times are taken.
pub(super) enum Bench {
    Host,
    Device(Box<DeviceBench>),
}

/// A stream, the tools around it, and memory to flush the L2 cache with.
pub(super) struct DeviceBench {
    stream: Stream,
    probe: Rc<Probe>,
    flush: DeviceBuffer,
    readings: DeviceBuffer,
}

impl Bench {
    /// On a stream whose device flushes its L2 cache by writing `flush` times its size; blocks have at most `turns` samples.
    pub(super) fn new(stream: Option<Stream>, flush: u32, turns: usize) -> Result<Self> {
        let Some(stream) = stream else { return Ok(Self::Host) };
        let bytes = stream.context().info.l2_bytes as usize * flush as usize;
        Ok(Self::Device(Box::new(DeviceBench {
            probe: Rc::new(Probe::new(&stream)?),
            flush: DeviceBuffer::filled(&stream, bytes, PATTERN)?,
            readings: DeviceBuffer::filled(&stream, turns * READING, 0)?,
            stream,
        })))
    }

    /// Takes one sample of an arm after the other, in the order of `turns`.
    pub(super) fn block(&mut self, arms: &mut [Turn<'_, '_>], mode: Mode, turns: &[usize]) -> Result<Vec<Reading>> {
        match (self, mode) {
            (Self::Host, _) => turns.iter().map(|&arm| on_host(&mut arms[arm], arm)).collect(),
            (Self::Device(bench), Mode::Call) => bench.whole_calls(arms, turns),
            (Self::Device(bench), _) => bench.gated(arms, mode, turns),
        }
    }

    /// Nanoseconds of a call that does nothing; `None` where nothing of the kind can be timed.
    pub(super) fn floor(&mut self, mode: Mode) -> Result<Option<f64>> {
        const SAMPLES: usize = 50;
        if mode == Mode::Graph {
            return Ok(None);
        }
        let readings = match self {
            Self::Host => Self::Host.block(&mut [still(&mut Nothing(None))], mode, &[0; SAMPLES])?,
            Self::Device(bench) => bench.floor(mode, SAMPLES)?,
        };
        let mut ns: Vec<f64> = readings.iter().map(|reading| reading.ns).collect();
        ns.sort_by(f64::total_cmp);
        Ok(ns.get(ns.len() / 2).copied())
    }
}

fn still<'a, 'b>(timed: &'a mut (dyn Timed + 'b)) -> Turn<'a, 'b> {
    Turn { timed, delay: Duration::ZERO }
}

fn on_host(turn: &mut Turn<'_, '_>, arm: usize) -> Result<Reading> {
    let start = Instant::now();
    turn.timed.call()?;
    let end = Instant::now() + turn.delay;
    while Instant::now() < end {
        std::hint::spin_loop();
    }
    Ok(Reading { arm, ns: start.elapsed().as_nanos() as f64, sm_mhz: None })
}

impl DeviceBench {
    /// Whole calls by the host's clock, each with an empty queue.
    fn whole_calls(&self, arms: &mut [Turn<'_, '_>], turns: &[usize]) -> Result<Vec<Reading>> {
        let mut ns = Vec::with_capacity(turns.len());
        for (i, &arm) in turns.iter().enumerate() {
            self.stream.synchronize()?;
            let start = Instant::now();
            self.slowed(&mut arms[arm])?;
            self.stream.synchronize()?;
            ns.push(start.elapsed().as_nanos() as f64);
            self.probe.clock(&self.readings, i * READING, WATCHED)?;
        }
        self.finish(turns, &ns)
    }

    /// Launches between events, behind a gate that opens when all are queued.
    fn gated(&mut self, arms: &mut [Turn<'_, '_>], mode: Mode, turns: &[usize]) -> Result<Vec<Reading>> {
        let mut events = Vec::with_capacity(turns.len());
        let closed = self.probe.close(&self.stream)?;
        for (i, &arm) in turns.iter().enumerate() {
            match mode {
                Mode::Cold => self.flush.fill(PATTERN)?,
                Mode::Hot => arms[arm].timed.call()?,
                Mode::Call | Mode::Graph => {}
            }
            events.push(self.timed(&mut arms[arm], mode)?);
            self.probe.clock(&self.readings, i * READING, WATCHED)?;
        }
        closed.open()?;
        let per_event = if mode == Mode::Graph { LAUNCHES } else { 1 };
        let elapsed = |(start, end): &(Event, Event)| {
            // Events count whole nanoseconds; the driver gives them as an f32 of milliseconds.
            Ok((f64::from(start.elapsed_ms(end)?) * 1e6).round() / per_event as f64)
        };
        let ns = events.iter().map(elapsed).collect::<Result<Vec<_>>>()?;
        self.finish(turns, &ns)
    }

    fn timed(&self, turn: &mut Turn<'_, '_>, mode: Mode) -> Result<(Event, Event)> {
        let start = self.stream.record()?;
        match (mode, turn.timed.graph()) {
            (Mode::Graph, Some(graph)) => {
                graph.launch(&self.stream)?;
                self.delay(turn.delay * LAUNCHES as u32)?;
            }
            _ => self.slowed(turn)?,
        }
        Ok((start, self.stream.record()?))
    }

    fn slowed(&self, turn: &mut Turn<'_, '_>) -> Result<()> {
        turn.timed.call()?;
        self.delay(turn.delay)
    }

    fn delay(&self, span: Duration) -> Result<()> {
        // After the readings of the block: nobody looks there.
        let spare = self.readings.len() - READING;
        if span.is_zero() { Ok(()) } else { self.probe.clock(&self.readings, spare, span) }
    }

    fn finish(&self, turns: &[usize], ns: &[f64]) -> Result<Vec<Reading>> {
        // Buffers give elements of tensors; any with 64 bits will do.
        let words: Vec<u64> = self.readings.to_vec::<f64>()?.into_iter().map(f64::to_bits).collect();
        let clock = |i: usize| match words[2 * i..2 * i + 2] {
            // Cycles per nanosecond are GHz.
            [cycles, ns] if ns > 0 => Some(cycles as f64 / ns as f64 * 1e3),
            _ => None,
        };
        let reading = |(i, (&arm, &ns))| Reading { arm, ns, sm_mhz: clock(i) };
        Ok(turns.iter().zip(ns).enumerate().map(reading).collect())
    }

    fn floor(&mut self, mode: Mode, samples: usize) -> Result<Vec<Reading>> {
        let turns = vec![0; samples.min(self.readings.len() / READING - 1)];
        let (stream, probe) = (self.stream.clone(), self.probe.clone());
        let mut nothing = Nothing(Some((&probe, &stream)));
        match mode {
            Mode::Call => self.whole_calls(&mut [still(&mut nothing)], &turns),
            _ => self.gated(&mut [still(&mut nothing)], mode, &turns),
        }
    }
}
