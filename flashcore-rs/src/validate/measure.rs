//! How long does a call take? Whole calls by the host's clock, and the device's share by events.
//!
//! Two figures that are never mixed. The *whole call* is what a caller waits for: the queue is empty, the clock starts, the
//! call is made into an existing output, the stream is synchronised, the clock stops. The *device* time is that of one
//! of [`LAUNCHES`] launches in a captured graph, between events that are queued behind another replay of it, so that no
//! host time is in it. Caches are warm in both. All cases are measured in turn, in random order, once per round.

use std::time::Instant;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::case::Case;
use super::host::HostTensor;
use super::inputs::Inputs;
use crate::device::{DeviceBuffer, Graph};
use crate::error::Result;
use crate::runtime::Runtime;
use crate::tensor::Device;

/// Launches in the graph that device time is taken from.
pub const LAUNCHES: usize = 50;

/// How often to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Protocol {
    /// Times that every case has its turn.
    pub rounds: usize,
    /// Whole calls per turn; their median counts.
    pub calls: usize,
    /// Unmeasured calls of each case before the first round.
    pub warmup: usize,
}

impl Protocol {
    /// What suits a device, at length or for a smoke run.
    pub fn for_device(device: Device, quick: bool) -> Self {
        match (device, quick) {
            (Device::Cpu, true) => Self { rounds: 1, calls: 1, warmup: 0 },
            (Device::Cpu, false) => Self { rounds: 5, calls: 1, warmup: 1 },
            (Device::Cuda(_), true) => Self { rounds: 5, calls: 10, warmup: 20 },
            (Device::Cuda(_), false) => Self { rounds: 50, calls: 20, warmup: 200 },
        }
    }
}

/// What was measured for one case.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measurement {
    /// The whole call, microseconds by the host's clock.
    pub call_us: Summary,
    /// One launch, microseconds by the device's clock; `None` on the CPU.
    pub device_us: Option<Summary>,
    /// 10^12 floating-point operations per second of the device time, or on the CPU of the whole call.
    pub tflops: f64,
    /// The speed of light, for cards whose ceilings have been measured.
    pub floor: Option<Floor>,
}

/// Figures of several rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The middle one.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// How many.
    pub rounds: usize,
}

/// The least time that a card's measured ceilings allow.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Floor {
    /// Whose ceilings.
    pub card: &'static str,
    /// Microseconds to move the bytes, each once.
    pub bytes_us: f64,
    /// Microseconds to do the operations.
    pub flops_us: f64,
}

/// A card's measured ceilings: bytes read and dense 16-bit operations, per second.
struct Ceiling {
    card: &'static str,
    bytes: f64,
    flops: f64,
}

/// Measured with a device-wide read and an 8192^3 matrix product.
const CEILINGS: [Ceiling; 1] = [Ceiling { card: "H200", bytes: 4480e9, flops: 787e12 }];

impl Summary {
    /// Sums up at least one figure.
    pub fn of(figures: &[f64]) -> Self {
        let mut sorted = figures.to_vec();
        sorted.sort_by(f64::total_cmp);
        let [low, high] = [(sorted.len() - 1) / 2, sorted.len() / 2];
        Self {
            median: (sorted[low] + sorted[high]) / 2.0,
            min: sorted[0],
            max: sorted[sorted.len() - 1],
            rounds: sorted.len(),
        }
    }
}

impl Floor {
    /// The floor of a case on a device with this name.
    pub fn of(case: &Case, flops: f64, device: &str) -> Option<Self> {
        let ceiling = CEILINGS.iter().find(|ceiling| device.contains(ceiling.card))?;
        Some(Self {
            card: ceiling.card,
            bytes_us: case.bytes() as f64 / ceiling.bytes * 1e6,
            flops_us: flops / ceiling.flops * 1e6,
        })
    }

    /// The larger of the two.
    pub fn us(&self) -> f64 {
        self.bytes_us.max(self.flops_us)
    }
}

/// Measures cases against each other; `progress` is called after every turn.
///
/// # Errors
/// Whatever keeps a case from running.
pub fn measure(
    runtime: &Runtime,
    cases: &[Case],
    seed: u64,
    protocol: Protocol,
    progress: &mut dyn FnMut(),
) -> Result<Vec<Measurement>> {
    let mut arms = cases.iter().map(|case| Arm::new(runtime, case, seed)).collect::<Result<Vec<_>>>()?;
    for arm in &mut arms {
        for _ in 0..protocol.warmup {
            arm.whole_call()?;
        }
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..arms.len()).collect();
    let mut samples = vec![(Vec::new(), Vec::new()); arms.len()];
    for _ in 0..protocol.rounds {
        order.shuffle(&mut rng);
        for &i in &order {
            let calls = (0..protocol.calls).map(|_| arms[i].whole_call()).collect::<Result<Vec<_>>>()?;
            samples[i].0.push(Summary::of(&calls).median);
            samples[i].1.extend(arms[i].launch_time()?);
            progress();
        }
    }
    let device = runtime.device_info().map(|info| info.name.as_str()).unwrap_or_default();
    Ok(cases
        .iter()
        .zip(&samples)
        .map(|(case, (calls, launches))| {
            let call_us = Summary::of(calls);
            let device_us = (!launches.is_empty()).then(|| Summary::of(launches));
            let flops = flops(case);
            Measurement {
                call_us,
                device_us,
                tflops: flops / device_us.unwrap_or(call_us).median * 1e-6,
                floor: Floor::of(case, flops, device),
            }
        })
        .collect())
}

/// Operations of a dense case.
fn flops(case: &Case) -> f64 {
    let scores = (case.batch * case.num_heads_q * case.seq_len_q) as f64 * case.seq_len_k as f64;
    2.0 * scores * (case.head_dim_qk + case.head_dim_v) as f64
}

/// A case that is ready to be called and timed, without a log-sum-exp.
pub struct Arm<'a> {
    runtime: &'a Runtime,
    inputs: Inputs,
    out: HostTensor,
    device: Option<OnDevice>,
}

/// The same memory on the device.
struct OnDevice {
    inputs: [DeviceBuffer; 3],
    out: DeviceBuffer,
    graph: Option<Graph>,
}

impl<'a> Arm<'a> {
    /// Draws the inputs, and on a device uploads them and captures the graph.
    ///
    /// # Errors
    /// Whatever keeps the case from running.
    pub fn new(runtime: &'a Runtime, case: &Case, seed: u64) -> Result<Self> {
        Self::with(runtime, case, Inputs::draw(case, seed)?)
    }

    /// The same with inputs that are drawn already.
    ///
    /// # Errors
    /// As [`Arm::new`].
    pub fn with(runtime: &'a Runtime, case: &Case, inputs: Inputs) -> Result<Self> {
        let (out, _) = Inputs::outputs(case)?;
        if runtime.device() == Device::Cpu {
            return Ok(Self { runtime, inputs, out, device: None });
        }
        let stream = runtime.stream()?;
        let tensors = [&inputs.query, &inputs.key, &inputs.value];
        let [query, key, value] = tensors.map(|tensor| tensor.upload(stream));
        let device = OnDevice { inputs: [query?, key?, value?], out: out.upload(stream)?, graph: None };
        let mut arm = Self { runtime, inputs, out, device: Some(device) };
        // The first call loads the module; the graph then holds launches alone.
        arm.call()?;
        stream.synchronize()?;
        let graph = stream.capture(|| (0..LAUNCHES).try_for_each(|_| arm.call()))?;
        if let Some(device) = &mut arm.device {
            device.graph = Some(graph);
        }
        Ok(arm)
    }

    /// Puts other inputs of the same shapes into the same memory.
    ///
    /// # Errors
    /// A driver failure.
    pub fn replace(&mut self, inputs: Inputs) -> Result<()> {
        if let Some(OnDevice { inputs: buffers, .. }) = &mut self.device {
            for (tensor, buffer) in [&inputs.query, &inputs.key, &inputs.value].into_iter().zip(buffers) {
                tensor.overwrite(buffer)?;
            }
        }
        self.inputs = inputs;
        Ok(())
    }

    /// The call itself: on a device it only queues the work.
    ///
    /// # Errors
    /// As [`crate::Attention::run`].
    pub fn call(&mut self) -> Result<()> {
        let Inputs { query, key, value, options, .. } = &self.inputs;
        match &mut self.device {
            None => {
                let (query, key, value) = (query.view()?, key.view()?, value.view()?);
                self.runtime.attention(&query, &key, &value).options(*options).run(&mut self.out.view_mut()?)
            }
            Some(OnDevice { inputs: [q, k, v], out, .. }) => {
                let (query, key, value) = (query.on_device(q)?, key.on_device(k)?, value.on_device(v)?);
                let mut out = self.out.on_device_mut(out)?;
                self.runtime.attention(&query, &key, &value).options(*options).run(&mut out)
            }
        }
    }

    /// Microseconds of a call with an empty queue, to the end of its work.
    ///
    /// # Errors
    /// As [`crate::Attention::run`].
    pub fn whole_call(&mut self) -> Result<f64> {
        let stream = self.device.is_some().then(|| self.runtime.stream()).transpose()?;
        if let Some(stream) = stream {
            stream.synchronize()?;
        }
        let start = Instant::now();
        self.call()?;
        if let Some(stream) = stream {
            stream.synchronize()?;
        }
        Ok(start.elapsed().as_secs_f64() * 1e6)
    }

    /// Microseconds of one launch in the graph; `None` on the CPU.
    ///
    /// # Errors
    /// A driver failure.
    pub fn launch_time(&self) -> Result<Option<f64>> {
        let Some(graph) = self.device.as_ref().and_then(|device| device.graph.as_ref()) else { return Ok(None) };
        let stream = self.runtime.stream()?;
        graph.launch(stream)?;
        let start = stream.record()?;
        graph.launch(stream)?;
        let end = stream.record()?;
        Ok(Some(f64::from(start.elapsed_ms(&end)?) * 1e3 / LAUNCHES as f64))
    }
}
