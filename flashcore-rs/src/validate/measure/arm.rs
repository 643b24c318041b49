//! A case that is ready to be called and timed, without a log-sum-exp.

use std::time::Instant;

use super::super::case::Case;
use super::super::host::HostTensor;
use super::super::inputs::Inputs;
use crate::device::{DeviceBuffer, Graph, Stream};
use crate::error::Result;
use crate::runtime::Runtime;
use crate::tensor::Device;

/// Launches in a captured graph.
pub const LAUNCHES: usize = 50;

/// A case on a runtime. Its tensors exist once or several times over, with other values each.
pub struct Arm<'a> {
    runtime: &'a Runtime,
    /// `None` on the CPU.
    stream: Option<Stream>,
    sets: Vec<Set>,
    current: usize,
}

/// Tensors to call with.
struct Set {
    inputs: Inputs,
    out: HostTensor,
    device: Option<OnDevice>,
}

/// The same memory on the device.
struct OnDevice {
    inputs: [DeviceBuffer; 3],
    attn_mask: Option<DeviceBuffer>,
    out: DeviceBuffer,
    graph: Option<Graph>,
}

impl<'a> Arm<'a> {
    /// Draws the inputs, and on a device uploads them and captures the graph, on the runtime's own stream.
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
        let stream = match runtime.device() {
            Device::Cpu => None,
            Device::Cuda(_) => Some(runtime.stream()?.clone()),
        };
        Self::on(runtime, stream, case, vec![inputs])
    }

    /// The same on a stream that other arms may share, with several sets of inputs.
    pub(super) fn on(runtime: &'a Runtime, stream: Option<Stream>, case: &Case, inputs: Vec<Inputs>) -> Result<Self> {
        let set = |inputs| Set::new(stream.as_ref(), case, inputs);
        let sets = inputs.into_iter().map(set).collect::<Result<_>>()?;
        let mut arm = Self { runtime, stream, sets, current: 0 };
        (0..arm.sets.len()).try_for_each(|_| arm.capture())?;
        Ok(arm)
    }

    /// Captures the graph of the current set, and goes on to the next set.
    fn capture(&mut self) -> Result<()> {
        if let Some(stream) = self.stream.clone() {
            // The first call loads the module; the graph then holds launches alone.
            self.call()?;
            stream.synchronize()?;
            let graph = stream.capture(|| (0..LAUNCHES).try_for_each(|_| self.call()))?;
            if let Some(device) = &mut self.sets[self.current].device {
                device.graph = Some(graph);
            }
        }
        self.rotate();
        Ok(())
    }

    /// Goes on to the next set of tensors, round and round.
    pub fn rotate(&mut self) {
        self.current = (self.current + 1) % self.sets.len();
    }

    /// Puts other inputs of the same shapes into the same memory.
    ///
    /// # Errors
    /// A driver failure.
    pub fn replace(&mut self, inputs: Inputs) -> Result<()> {
        let set = &mut self.sets[self.current];
        if let Some(OnDevice { inputs: buffers, .. }) = &mut set.device {
            for (tensor, buffer) in [&inputs.query, &inputs.key, &inputs.value].into_iter().zip(buffers) {
                tensor.overwrite(buffer)?;
            }
        }
        set.inputs = inputs;
        Ok(())
    }

    /// The call itself: on a device it only queues the work.
    ///
    /// # Errors
    /// As [`crate::Attention::run`].
    pub fn call(&mut self) -> Result<()> {
        self.sets[self.current].call(self.runtime, self.stream.as_ref())
    }

    /// The captured launches of the current set; `None` on the CPU.
    pub(super) fn graph(&self) -> Option<&Graph> {
        self.sets[self.current].device.as_ref().and_then(|device| device.graph.as_ref())
    }

    /// Microseconds of a call with an empty queue, to the end of its work.
    ///
    /// # Errors
    /// As [`crate::Attention::run`].
    pub fn whole_call(&mut self) -> Result<f64> {
        self.stream.as_ref().map_or(Ok(()), Stream::synchronize)?;
        let start = Instant::now();
        self.call()?;
        self.stream.as_ref().map_or(Ok(()), Stream::synchronize)?;
        Ok(start.elapsed().as_secs_f64() * 1e6)
    }

    /// Microseconds of one launch in the graph, replayed right behind another replay of it; `None` on the CPU.
    ///
    /// # Errors
    /// A driver failure.
    pub fn launch_time(&self) -> Result<Option<f64>> {
        let (Some(graph), Some(stream)) = (self.graph(), &self.stream) else { return Ok(None) };
        graph.launch(stream)?;
        let start = stream.record()?;
        graph.launch(stream)?;
        let end = stream.record()?;
        Ok(Some(f64::from(start.elapsed_ms(&end)?) * 1e3 / LAUNCHES as f64))
    }
}

impl Set {
    fn new(stream: Option<&Stream>, case: &Case, inputs: Inputs) -> Result<Self> {
        let (out, _) = Inputs::outputs(case)?;
        let device = stream.map(|stream| OnDevice::new(stream, &inputs, &out)).transpose()?;
        Ok(Self { inputs, out, device })
    }

    fn call(&mut self, runtime: &Runtime, stream: Option<&Stream>) -> Result<()> {
        let Inputs { query, key, value, attn_mask, options, .. } = &self.inputs;
        match (&mut self.device, stream) {
            (Some(OnDevice { inputs: [q, k, v], attn_mask: mask, out, .. }), Some(stream)) => {
                let (query, key, value) = (query.on_device(q)?, key.on_device(k)?, value.on_device(v)?);
                let mut call = runtime.attention(&query, &key, &value).options(*options).on(stream);
                if let (Some(tensor), Some(buffer)) = (attn_mask, mask) {
                    call = call.attn_mask(tensor.on_device(buffer)?);
                }
                call.run(&mut self.out.on_device_mut(out)?)
            }
            _ => {
                let (query, key, value) = (query.view()?, key.view()?, value.view()?);
                let mut call = runtime.attention(&query, &key, &value).options(*options);
                if let Some(mask) = attn_mask {
                    call = call.attn_mask(mask.view()?);
                }
                call.run(&mut self.out.view_mut()?)
            }
        }
    }
}

impl OnDevice {
    fn new(stream: &Stream, inputs: &Inputs, out: &HostTensor) -> Result<Self> {
        let upload = |tensor: &HostTensor| tensor.upload(stream);
        Ok(Self {
            inputs: [upload(&inputs.query)?, upload(&inputs.key)?, upload(&inputs.value)?],
            attn_mask: inputs.attn_mask.as_ref().map(upload).transpose()?,
            out: upload(out)?,
            graph: None,
        })
    }
}
