//! A recording driver over host memory: what everything above the driver is tested, fuzzed and interpreted with.
//!
//! It keeps the driver's rules (contexts, capture, stream order) and reports every broken one as a violation: memory
//! used after it was freed or outside its allocation, and accesses that streams, events and host waits do not order.
//! Given a bundle's manifest it also reads launches back, checks them, and computes them on the CPU backend.

#![deny(unsafe_code)]

mod decode;
mod execute;
mod memory;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

pub use self::decode::{Argument, Arguments};
use self::execute::Bytes;
use self::memory::{Clock, Memory, Point, Span, join};
use super::{
    ContextHandle, DeviceInfo, Driver, EventHandle, FunctionHandle, GraphHandle, LaunchRequest, MapChange,
    ModuleHandle, ParamBlock, StreamHandle, TensorMap, TensorMapSpec, result_error,
};
use crate::bundle::manifest::{Launch, Manifest, Quantity, Tensor, Variant};
use crate::bundle::sha256_hex;
use crate::error::{Error, Result};

/// An entry point of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "named as the methods of the trait")]
pub enum Entry {
    DeviceCount,
    DeviceInfo,
    RetainContext,
    LoadModule,
    Function,
    ParamCount,
    ParamInfo,
    EncodeTensorMap,
    MoveTensorMap,
    Launch,
    Alloc,
    Free,
    Memset,
    CopyToDevice,
    CopyToHost,
    CreateStream,
    DestroyStream,
    StreamIsCapturing,
    Synchronize,
    CreateEvent,
    DestroyEvent,
    RecordEvent,
    WaitEvent,
    SynchronizeEvent,
    ElapsedMs,
    BeginCapture,
    EndCapture,
    LaunchGraph,
    DestroyGraph,
}

/// A kernel launch as the driver saw it.
#[derive(Clone, Debug, PartialEq)]
pub struct LaunchRecord {
    /// Entry point.
    pub kernel: String,
    /// The first variant of the manifest with this code.
    pub variant: Option<String>,
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads per block.
    pub block_threads: u32,
    /// Blocks per cluster.
    pub cluster: u32,
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// The stream's handle.
    pub stream: u64,
    /// The arguments; empty for code that no manifest describes.
    pub arguments: Arguments,
    /// Whether it went into a graph.
    pub captured: bool,
}

/// What the device is like.
#[derive(Clone, Debug)]
pub struct MockConfig {
    /// The devices.
    pub devices: Vec<DeviceInfo>,
    /// Whether launches are computed, where the manifest says what they mean.
    pub computes: bool,
    /// Whether calls take a while, so that threads overtake each other between them.
    pub dawdles: bool,
    /// Whether launches are let through unseen: what a call costs is then that of everything above the driver.
    pub idle: bool,
}

impl Default for MockConfig {
    fn default() -> Self {
        Self { devices: vec![Self::device(0, (9, 0))], computes: true, dawdles: false, idle: false }
    }
}

impl MockConfig {
    /// A device of some compute capability, with 64 MiB of memory.
    pub fn device(ordinal: u32, compute_capability: (u32, u32)) -> DeviceInfo {
        DeviceInfo {
            ordinal,
            name: "Mock GPU".into(),
            compute_capability,
            sm_count: 132,
            shared_bytes_optin: 232_448,
            total_memory: 64 << 20,
            l2_bytes: 1 << 20,
            driver_version: PARAM_COUNT_SINCE,
        }
    }
}

/// The driver.
#[derive(Debug)]
pub struct MockDriver {
    state: Mutex<State>,
    idle: bool,
}

#[derive(Debug)]
struct Stream {
    ordinal: u32,
    clock: Clock,
    capture: Option<u64>,
}

#[derive(Debug)]
struct Event {
    clock: Clock,
    capture: Option<u64>,
    recorded_at: Option<u64>,
    timing: bool,
}

#[derive(Debug)]
struct Capture {
    origin: u64,
    thread: ThreadId,
    ordinal: u32,
    operations: Vec<Operation>,
    /// Memory that the graph allocates.
    owned: Vec<u64>,
    invalid: bool,
}

#[derive(Clone, Debug)]
struct Graph {
    ordinal: u32,
    operations: Vec<Operation>,
    clock: Clock,
}

#[derive(Clone, Debug)]
enum Operation {
    Launch(Box<(Kernel, [u32; 3], ParamBlock, Arguments)>),
    Memset(Span, u8),
    Alloc(u64),
    Free(u64),
}

/// A function of a loaded module.
#[derive(Clone, Debug)]
struct Kernel {
    name: String,
    described: Option<Box<(Variant, Launch)>>,
}

/// A call, some of whose launches are done.
#[derive(Debug)]
struct Unfinished {
    variant: Variant,
    done: usize,
    /// Of those launches.
    arguments: Arguments,
}

impl Unfinished {
    /// Whether this is its next launch. Variants may share code, so the variant of one launch may not be the call's.
    fn expects(&self, launch: &Launch) -> bool {
        let next = self.variant.launches.get(self.done);
        next.is_some_and(|next| (&next.kernel, &next.code.sha256) == (&launch.kernel, &launch.code.sha256))
    }
}

#[derive(Debug)]
struct Fault {
    entry: Entry,
    after: usize,
    code: u32,
}

#[derive(Debug)]
struct State {
    config: MockConfig,
    manifests: Vec<Manifest>,
    memory: Memory,
    streams: HashMap<u64, Stream>,
    events: HashMap<u64, Event>,
    graphs: HashMap<u64, Graph>,
    captures: HashMap<u64, Capture>,
    modules: HashMap<u64, String>,
    kernels: HashMap<u64, Kernel>,
    /// Calls of several launches that have begun, by stream and scratch memory.
    unfinished: HashMap<(u64, Option<u64>), Unfinished>,
    /// What the host has waited for; later operations follow it.
    host: Clock,
    next_handle: u64,
    /// Operations so far, as a time.
    ticks: u64,
    log: Vec<Entry>,
    launches: Vec<LaunchRecord>,
    violations: Vec<String>,
    faults: Vec<Fault>,
    /// The sticky error of each lost context.
    lost: BTreeMap<u32, u32>,
}

/// The CUDA versions that can count a kernel's parameters, and describe them.
const PARAM_COUNT_SINCE: u32 = 13_020;
const PARAM_INFO_SINCE: u32 = 12_040;
const INVALID_VALUE: u32 = 1;
const OUT_OF_MEMORY: u32 = 2;
const INVALID_CONTEXT: u32 = 201;
const INVALID_HANDLE: u32 = 400;
const CAPTURE_UNSUPPORTED: u32 = 900;
const CAPTURE_INVALIDATED: u32 = 901;
const CAPTURE_UNMATCHED: u32 = 903;
const CAPTURE_ISOLATION: u32 = 905;
const CAPTURED_EVENT: u32 = 907;
const CAPTURE_WRONG_THREAD: u32 = 908;
const CONTEXT_BASE: u64 = 0xC0_0000;

fn failure(entry: Entry, code: u32) -> Error {
    let call = match entry {
        Entry::DeviceCount => "cuDeviceGetCount",
        Entry::DeviceInfo => "cuDeviceGetAttribute",
        Entry::RetainContext => "cuDevicePrimaryCtxRetain",
        Entry::LoadModule => "cuModuleLoadData",
        Entry::Function => "cuModuleGetFunction",
        Entry::ParamCount => "cuFuncGetParamCount",
        Entry::ParamInfo => "cuFuncGetParamInfo",
        Entry::EncodeTensorMap => "cuTensorMapEncodeTiled",
        Entry::MoveTensorMap => "cuTensorMapReplaceAddress",
        Entry::Launch => "cuLaunchKernelEx",
        Entry::Alloc => "cuMemAllocAsync",
        Entry::Free => "cuMemFreeAsync",
        Entry::Memset => "cuMemsetD8Async",
        Entry::CopyToDevice => "cuMemcpyHtoDAsync_v2",
        Entry::CopyToHost => "cuMemcpyDtoHAsync_v2",
        Entry::CreateStream => "cuStreamCreate",
        Entry::DestroyStream => "cuStreamDestroy_v2",
        Entry::StreamIsCapturing => "cuStreamIsCapturing",
        Entry::Synchronize => "cuStreamSynchronize",
        Entry::CreateEvent => "cuEventCreate",
        Entry::DestroyEvent => "cuEventDestroy_v2",
        Entry::RecordEvent => "cuEventRecord",
        Entry::WaitEvent => "cuStreamWaitEvent",
        Entry::SynchronizeEvent => "cuEventSynchronize",
        Entry::ElapsedMs => "cuEventElapsedTime",
        Entry::BeginCapture => "cuStreamBeginCapture_v2",
        Entry::EndCapture => "cuStreamEndCapture",
        Entry::LaunchGraph => "cuGraphLaunch",
        Entry::DestroyGraph => "cuGraphExecDestroy",
    };
    result_error(call, code, format!("CUresult {code}"))
}

impl Default for MockDriver {
    fn default() -> Self {
        Self::new(MockConfig::default())
    }
}

/// What tests ask.
impl MockDriver {
    /// A driver with these devices.
    pub fn new(config: MockConfig) -> Self {
        let idle = config.idle;
        let state = State {
            config,
            manifests: Vec::new(),
            memory: Memory::default(),
            streams: HashMap::new(),
            events: HashMap::new(),
            graphs: HashMap::new(),
            captures: HashMap::new(),
            modules: HashMap::new(),
            kernels: HashMap::new(),
            unfinished: HashMap::new(),
            host: Clock::new(),
            next_handle: 0x10,
            ticks: 0,
            log: Vec::new(),
            launches: Vec::new(),
            violations: Vec::new(),
            faults: Vec::new(),
            lost: BTreeMap::new(),
        };
        Self { state: Mutex::new(state), idle }
    }

    /// Teaches the driver what code means: launches of it are read back, checked and computed from then on.
    pub fn learn(&self, manifest: &Manifest) {
        self.lock().manifests.push(manifest.clone());
    }

    /// Makes the call of `entry` after the next `after` ones fail with a `CUresult`. A sticky code loses the context.
    pub fn fail(&self, entry: Entry, after: usize, code: u32) {
        self.lock().faults.push(Fault { entry, after, code });
    }

    /// Every call so far.
    pub fn log(&self) -> Vec<Entry> {
        self.lock().log.clone()
    }

    /// How often `entry` was called.
    pub fn count(&self, entry: Entry) -> usize {
        self.lock().log.iter().filter(|&&logged| logged == entry).count()
    }

    /// Every launch so far.
    pub fn launches(&self) -> Vec<LaunchRecord> {
        self.lock().launches.clone()
    }

    /// Every broken rule so far.
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// Live `(allocations, streams, events, graphs)`.
    pub fn live(&self) -> (usize, usize, usize, usize) {
        let state = self.lock();
        let streams = state.streams.keys().filter(|&&stream| stream >= 0x10).count();
        (state.memory.count(), streams, state.events.len(), state.graphs.len())
    }

    /// Memory, or a stream, that another library would have made.
    pub fn foreign_memory(&self, ordinal: u32, bytes: usize) -> u64 {
        let mut state = self.lock();
        let address = state.memory.reserve(ordinal, bytes);
        let at = state.host_point("a foreign allocation");
        state.memory.wake(&at, address);
        address
    }

    /// A stream that another library would have made.
    pub fn foreign_stream(&self, ordinal: u32) -> u64 {
        self.lock().new_stream(ordinal)
    }

    /// Frees what another library allocated, in the order of its stream.
    pub fn foreign_free(&self, ordinal: u32, address: u64, stream: u64) {
        if let Err(error) = self.free(context(ordinal), address, StreamHandle(stream)) {
            self.lock().violation(format!("a foreign free: {error}"));
        }
    }

    /// Writes what another library allocated, in the order of its stream.
    pub fn foreign_memset(&self, ordinal: u32, address: u64, bytes: usize, stream: u64) {
        if let Err(error) = self.memset(context(ordinal), address, 0, bytes, StreamHandle(stream)) {
            self.lock().violation(format!("a foreign memset: {error}"));
        }
    }

    /// The handle of a device's context.
    pub(crate) fn context(ordinal: u32) -> u64 {
        context(ordinal).0
    }

    /// Captures a stream behind the runtime's back.
    ///
    /// # Errors
    /// As the driver.
    pub fn begin_foreign_capture(&self, ordinal: u32, stream: u64) -> Result<()> {
        self.begin_capture(context(ordinal), StreamHandle(stream))
    }

    /// Ends such a capture and drops what it captured.
    ///
    /// # Errors
    /// As the driver.
    pub fn end_foreign_capture(&self, ordinal: u32, stream: u64) -> Result<()> {
        let graph = self.end_capture(context(ordinal), StreamHandle(stream))?;
        graph.map_or(Ok(()), |graph| self.destroy_graph(context(ordinal), graph))
    }

    /// Overwrites memory from the host, in no order with anything.
    pub fn poke(&self, address: u64, data: &[u8]) {
        let mut state = self.lock();
        let at = state.everything("a poke");
        let ordinal = state.ordinal_of(address);
        let span = Span { address, bytes: data.len() as u64 };
        match state.memory.access(&at, ordinal, span, true) {
            Ok((bytes, _)) => bytes.copy_from_slice(data),
            Err(violation) => state.violations.push(violation),
        }
    }

    /// Memory as it is once everything queued is done.
    pub fn peek(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut state = self.lock();
        let at = state.everything("a peek");
        let ordinal = state.ordinal_of(address);
        match state.memory.access(&at, ordinal, Span { address, bytes: bytes as u64 }, false) {
            Ok((bytes, _)) => bytes.to_vec(),
            Err(violation) => {
                state.violations.push(violation);
                Vec::new()
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs a call, and fails it if a test asked for that.
    fn enter(&self, entry: Entry, context: Option<ContextHandle>) -> Result<(MutexGuard<'_, State>, u32)> {
        let mut state = self.lock();
        state.log.push(entry);
        if state.config.dawdles {
            let pause = std::time::Duration::from_micros(state.log.len() as u64 * 7 % 60);
            drop(state);
            std::thread::sleep(pause);
            state = self.lock();
        }
        let ordinal = match context {
            None => 0,
            Some(ContextHandle(handle)) => {
                let ordinal = handle.wrapping_sub(CONTEXT_BASE) as u32;
                if state.config.devices.get(ordinal as usize).is_none() {
                    state.violations.push(format!("{entry:?}: no context {handle:#x}"));
                    return Err(failure(entry, INVALID_CONTEXT));
                }
                ordinal
            }
        };
        let mut due = None;
        state.faults.retain_mut(|fault| {
            if fault.entry != entry || due.is_some() {
                return true;
            }
            if fault.after > 0 {
                fault.after -= 1;
                return true;
            }
            due = Some(fault.code);
            false
        });
        if context.is_some()
            && let Some(&code) = state.lost.get(&ordinal)
        {
            return Err(failure(entry, code));
        }
        match due {
            None => Ok((state, ordinal)),
            Some(code) => {
                let error = failure(entry, code);
                if matches!(error, Error::ContextLost { .. }) {
                    state.lost.insert(ordinal, code);
                }
                Err(error)
            }
        }
    }
}

fn context(ordinal: u32) -> ContextHandle {
    ContextHandle(CONTEXT_BASE + u64::from(ordinal))
}

/// The legacy stream exists once per device.
fn stream_key(ordinal: u32, stream: StreamHandle) -> u64 {
    if stream.0 == 0 { u64::from(ordinal) } else { stream.0 }
}

impl State {
    fn handle(&mut self) -> u64 {
        self.next_handle += 0x10;
        self.next_handle
    }

    fn new_stream(&mut self, ordinal: u32) -> u64 {
        let handle = self.handle();
        self.streams.insert(handle, Stream { ordinal, clock: Clock::new(), capture: None });
        handle
    }

    fn ordinal_of(&self, address: u64) -> u32 {
        self.config.devices.iter().map(|d| d.ordinal).find(|&o| self.memory.is_on(address, o)).unwrap_or_default()
    }

    fn violation(&mut self, what: impl Into<String>) {
        self.violations.push(what.into());
    }

    /// What a function's code is, for drivers of a version or newer.
    fn described(&self, function: FunctionHandle, since: u32) -> Option<&Launch> {
        let version = self.config.devices.first().map_or(0, |device| device.driver_version);
        let described = self.kernels.get(&function.0)?.described.as_deref()?;
        (version >= since).then_some(&described.1)
    }

    /// A stream by handle; the legacy one appears when it is first used.
    fn stream(&mut self, entry: Entry, ordinal: u32, stream: StreamHandle) -> Result<u64> {
        let key = stream_key(ordinal, stream);
        if stream.0 == 0 {
            self.streams.entry(key).or_insert_with(|| Stream { ordinal, clock: Clock::new(), capture: None });
        }
        match self.streams.get(&key) {
            Some(found) if found.ordinal == ordinal => Ok(key),
            _ => {
                self.violation(format!("{entry:?}: {:#x} is not a live stream of device {ordinal}", stream.0));
                Err(failure(entry, INVALID_HANDLE))
            }
        }
    }

    /// The capture that `key` is in, if it is still good for operations.
    fn capture(&mut self, entry: Entry, key: u64) -> Result<Option<&mut Capture>> {
        let id = self.streams.get(&key).and_then(|stream| stream.capture);
        match id.and_then(|id| self.captures.get_mut(&id)) {
            Some(capture) if capture.invalid => Err(failure(entry, CAPTURE_INVALIDATED)),
            other => Ok(other),
        }
    }

    /// Ends the capture that a stream is in.
    fn abandon_capture(&mut self, key: u64) -> Option<Capture> {
        let id = self.streams.get(&key)?.capture?;
        self.streams.values_mut().filter(|s| s.capture == Some(id)).for_each(|stream| stream.capture = None);
        self.captures.remove(&id)
    }

    /// Fails an operation that a captured stream cannot do, and its capture with it.
    fn refuse_capture(&mut self, entry: Entry, key: u64, code: u32) -> Result<()> {
        match self.capture(entry, key)? {
            None => Ok(()),
            Some(capture) => {
                capture.invalid = true;
                Err(failure(entry, code))
            }
        }
    }

    /// The next operation on a stream.
    fn point(&mut self, key: u64, what: impl Into<String>) -> Point {
        let host = self.host.clone();
        let Some(stream) = self.streams.get_mut(&key) else { return self.host_point("an unknown stream") };
        join(&mut stream.clock, &host);
        let time = stream.clock.entry(key).or_default();
        *time += 1;
        let (time, what) = (*time, format!("{} on stream {key:#x}", what.into()));
        self.ticks += 1;
        Point { stream: key, time, clock: stream.clock.clone(), what }
    }

    /// Something the host does itself.
    fn host_point(&mut self, what: &str) -> Point {
        const HOST: u64 = u64::MAX;
        let time = self.host.entry(HOST).or_default();
        *time += 1;
        Point { stream: HOST, time: *time, clock: self.host.clone(), what: what.into() }
    }

    /// A point after everything that was queued.
    fn everything(&mut self, what: &str) -> Point {
        let mut at = self.host_point(what);
        self.streams.values().for_each(|stream| join(&mut at.clock, &stream.clock));
        at
    }

    fn host_waits_for(&mut self, key: u64) {
        if let Some(stream) = self.streams.get(&key) {
            join(&mut self.host, &stream.clock);
        }
    }

    /// The bytes of a span, or a violation and `None`.
    fn touch(&mut self, at: &Point, ordinal: u32, span: Span, write: bool) -> Option<&mut [u8]> {
        match self.memory.access(at, ordinal, span, write) {
            Ok((bytes, ordered)) => {
                self.violations.extend(ordered.err());
                Some(bytes)
            }
            Err(violation) => {
                self.violations.push(violation);
                None
            }
        }
    }

    /// Runs an operation now, or puts it into the capture.
    fn perform(&mut self, entry: Entry, ordinal: u32, key: u64, operation: Operation) -> Result<()> {
        if let Some(capture) = self.capture(entry, key)? {
            capture.operations.push(operation);
            return Ok(());
        }
        self.run(ordinal, key, &operation, false);
        Ok(())
    }

    fn run(&mut self, ordinal: u32, key: u64, operation: &Operation, in_graph: bool) {
        match operation {
            Operation::Launch(launch) => self.run_kernel(ordinal, key, launch),
            &Operation::Memset(span, value) => {
                let at = self.point(key, "a memset");
                if let Some(bytes) = self.touch(&at, ordinal, span, true) {
                    bytes.fill(value);
                }
            }
            &Operation::Alloc(address) => {
                let at = self.point(key, "an allocation");
                self.memory.wake(&at, address);
            }
            &Operation::Free(address) => {
                let at = self.point(key, "a free");
                let freed = self.memory.free(&at, address, in_graph);
                self.violations.extend(freed.err());
            }
        }
    }

    fn run_kernel(&mut self, ordinal: u32, key: u64, launch: &(Kernel, [u32; 3], ParamBlock, Arguments)) {
        let (kernel, grid, params, arguments) = launch;
        let at = self.point(key, format!("kernel {}", kernel.name));
        if kernel.name == "gate" {
            // It waits for a write that no stream orders before it; that is its purpose.
            return;
        }
        let Some((variant, description)) = kernel.described.as_deref() else {
            // Unknown code may read and write whatever it was given an address of.
            for bytes in (0..params.count()).map(|index| params.get(index)) {
                let address = bytes.try_into().map(u64::from_ne_bytes).unwrap_or_default();
                if let Some(span) = self.memory.rest(address) {
                    self.touch(&at, ordinal, span, true);
                }
            }
            return;
        };
        if variant.launches.len() > 1 {
            self.touch_arguments(&at, ordinal, variant, arguments);
        }
        let call = (key, arguments.scratch());
        let fresh = || Unfinished { variant: variant.clone(), done: 0, arguments: Arguments::default() };
        let mut begun = self.unfinished.remove(&call).filter(|begun| begun.expects(description)).unwrap_or_else(fresh);
        begun.done += 1;
        begun.arguments = begun.arguments.and(arguments);
        if begun.done < begun.variant.launches.len() {
            self.unfinished.insert(call, begun);
            return;
        }
        // The last launch finishes the work of all.
        match decode::decode(&begun.variant, description, *grid, &begun.arguments) {
            Ok(decoded) => self.run_decoded(&at, ordinal, &decoded),
            Err(why) => self.violation(format!("{}: {why}", begun.variant.name)),
        }
    }

    fn run_decoded(&mut self, at: &Point, ordinal: u32, decoded: &decode::Decoded) {
        let mut taken = HashMap::new();
        for (name, span, write) in decoded.operands() {
            let named = Point { what: format!("{name} of {}", at.what), ..at.clone() };
            let Some(bytes) = self.touch(&named, ordinal, span, write) else { return };
            taken.insert(name, bytes.to_vec());
        }
        if !self.config.computes || decoded.problem.is_empty() {
            return;
        }
        let mut take = |name| taken.remove(name);
        let mut bytes = Bytes {
            query: take("query").unwrap_or_default(),
            key: take("key").unwrap_or_default(),
            value: take("value").unwrap_or_default(),
            attn_mask: decoded.attn_mask.map(|_| take("attn_mask").unwrap_or_default()),
            out: take("out").unwrap_or_default(),
            lse: decoded.lse.map(|_| take("lse").unwrap_or_default()),
        };
        execute::execute(decoded, &mut bytes);
        let outputs = [Some((decoded.out, bytes.out)), decoded.lse.zip(bytes.lse)];
        for (span, bytes) in outputs.into_iter().flatten().filter(|(span, _)| span.bytes > 0) {
            if let Some(memory) = self.touch(at, ordinal, span, true) {
                memory.copy_from_slice(&bytes);
            }
        }
    }

    /// For one of several launches, whose share of the work the manifest does not say: to the end of each allocation.
    fn touch_arguments(&mut self, at: &Point, ordinal: u32, variant: &Variant, arguments: &Arguments) {
        for (name, argument) in arguments.named() {
            let address = match argument {
                Argument::Pointer(address @ 1..) => address,
                Argument::TensorMap(map) => map.address,
                _ => continue,
            };
            let input = matches!(name, Quantity::Address(Tensor::Q | Tensor::K | Tensor::V) | Quantity::AttnMask);
            match self.memory.rest(address) {
                Some(span) => drop(self.touch(at, ordinal, span, !input)),
                None => self.violation(format!("{}: {name:?} at {address:#x} is in no allocation", variant.name)),
            }
        }
    }
}

impl MockDriver {
    fn move_tensor_map(&self, context: ContextHandle, map: &mut [u8], address: u64) -> Result<()> {
        if self.idle {
            return Ok(());
        }
        let (mut state, _) = self.enter(Entry::MoveTensorMap, Some(context))?;
        if !address.is_multiple_of(16) {
            return Err(failure(Entry::MoveTensorMap, INVALID_VALUE));
        }
        if !decode::move_tensor_map(map, address) {
            state.violation("MoveTensorMap: no descriptor was encoded there");
        }
        Ok(())
    }
}

impl Driver for MockDriver {
    fn device_count(&self) -> Result<u32> {
        let (state, _) = self.enter(Entry::DeviceCount, None)?;
        Ok(state.config.devices.len() as u32)
    }

    fn device_info(&self, ordinal: u32) -> Result<DeviceInfo> {
        let (state, _) = self.enter(Entry::DeviceInfo, None)?;
        let count = state.config.devices.len() as u32;
        state.config.devices.get(ordinal as usize).cloned().ok_or(Error::NoDevice { ordinal, count })
    }

    fn retain_context(&self, ordinal: u32) -> Result<ContextHandle> {
        let (state, _) = self.enter(Entry::RetainContext, None)?;
        let count = state.config.devices.len() as u32;
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, count });
        }
        Ok(context(ordinal))
    }

    fn load_module(&self, context: ContextHandle, image: &[u8]) -> Result<ModuleHandle> {
        let (mut state, _) = self.enter(Entry::LoadModule, Some(context))?;
        let handle = state.handle();
        state.modules.insert(handle, sha256_hex(image));
        Ok(ModuleHandle(handle))
    }

    fn function(
        &self,
        context: ContextHandle,
        module: ModuleHandle,
        name: &str,
        shared_bytes: u32,
    ) -> Result<FunctionHandle> {
        let (mut state, ordinal) = self.enter(Entry::Function, Some(context))?;
        let Some(image) = state.modules.get(&module.0).cloned() else {
            state.violation(format!("Function: {:#x} is no module", module.0));
            return Err(failure(Entry::Function, INVALID_HANDLE));
        };
        if shared_bytes > state.config.devices[ordinal as usize].shared_bytes_optin {
            return Err(failure(Entry::Function, INVALID_VALUE));
        }
        let variants = state.manifests.iter().flat_map(|manifest| &manifest.variants);
        let mut launches = variants.flat_map(|v| v.launches.iter().map(move |launch| (v, launch)));
        let described = launches
            .find(|(_, launch)| launch.code.sha256 == image && launch.kernel == name)
            .map(|(variant, launch)| Box::new((variant.clone(), launch.clone())));
        let handle = state.handle();
        state.kernels.insert(handle, Kernel { name: name.into(), described });
        Ok(FunctionHandle(handle))
    }

    fn param_count(&self, function: FunctionHandle) -> Result<Option<usize>> {
        let (state, _) = self.enter(Entry::ParamCount, None)?;
        Ok(state.described(function, PARAM_COUNT_SINCE).map(|launch| launch.params.len()))
    }

    fn param_info(&self, function: FunctionHandle, index: usize) -> Result<Option<(usize, usize)>> {
        let (state, _) = self.enter(Entry::ParamInfo, None)?;
        let Some(launch) = state.described(function, PARAM_INFO_SINCE) else { return Ok(None) };
        let mut offset = 0usize;
        for (at, param) in launch.params.iter().enumerate() {
            let size = param.size();
            offset = offset.next_multiple_of(size);
            if at == index {
                return Ok(Some((offset, size)));
            }
            offset += size;
        }
        Ok(None)
    }

    fn encode_tensor_map(&self, context: ContextHandle, spec: &TensorMapSpec) -> Result<TensorMap> {
        if self.idle {
            return Ok(TensorMap([0; 128]));
        }
        let (_state, _) = self.enter(Entry::EncodeTensorMap, Some(context))?;
        let inner_bytes = spec.box_dims[0].saturating_mul(spec.dtype.size() as u32);
        let sound = spec.address.is_multiple_of(16)
            && spec.dims.iter().all(|size| (1..=1 << 32).contains(size))
            && spec.strides.iter().all(|stride| stride.is_multiple_of(16) && *stride < 1 << 40)
            && spec.box_dims.iter().all(|size| (1..=256).contains(size))
            && inner_bytes.is_multiple_of(16)
            && (spec.swizzle == 0 || inner_bytes <= spec.swizzle);
        if sound { Ok(decode::encode_tensor_map(spec)) } else { Err(failure(Entry::EncodeTensorMap, INVALID_VALUE)) }
    }

    fn launch(&self, context: ContextHandle, request: &mut LaunchRequest<'_>) -> Result<()> {
        for (index, change) in request.tensor_maps {
            match change {
                MapChange::New(spec) => request.params.set(*index, &self.encode_tensor_map(context, spec)?.0),
                MapChange::Moved(address) => self.move_tensor_map(context, request.params.get_mut(*index), *address)?,
            }
        }
        if self.idle {
            std::hint::black_box(request);
            return Ok(());
        }
        let (mut state, ordinal) = self.enter(Entry::Launch, Some(context))?;
        let key = state.stream(Entry::Launch, ordinal, request.stream)?;
        let Some(kernel) = state.kernels.get(&request.function.0).cloned() else {
            state.violation(format!("Launch: {:#x} is no function", request.function.0));
            return Err(failure(Entry::Launch, INVALID_HANDLE));
        };
        let [x, y, z] = request.grid;
        if x == 0 || y == 0 || z == 0 || x > i32::MAX as u32 || y > 65535 || z > 65535 || x % request.cluster != 0 {
            return Err(failure(Entry::Launch, INVALID_VALUE));
        }
        let arguments = match &kernel.described {
            None => Arguments::default(),
            Some(described) => match Arguments::read(&described.1, request) {
                Ok(arguments) => arguments,
                Err(why) => {
                    state.violation(format!("{}: {why}", described.0.name));
                    Arguments::default()
                }
            },
        };
        let captured = state.capture(Entry::Launch, key)?.is_some();
        let record = LaunchRecord {
            kernel: kernel.name.clone(),
            variant: kernel.described.as_ref().map(|described| described.0.name.clone()),
            grid: request.grid,
            block_threads: request.block_threads,
            cluster: request.cluster,
            shared_bytes: request.shared_bytes,
            stream: request.stream.0,
            arguments: arguments.clone(),
            captured,
        };
        state.launches.push(record);
        let launch = Box::new((kernel, request.grid, request.params.clone(), arguments));
        state.perform(Entry::Launch, ordinal, key, Operation::Launch(launch))
    }

    fn alloc(&self, context: ContextHandle, bytes: usize, stream: StreamHandle) -> Result<u64> {
        let (mut state, ordinal) = self.enter(Entry::Alloc, Some(context)).map_err(|error| match error {
            Error::Driver { code: OUT_OF_MEMORY, .. } => Error::OutOfMemory { requested: bytes },
            error => error,
        })?;
        let key = state.stream(Entry::Alloc, ordinal, stream)?;
        if bytes == 0 {
            return Err(failure(Entry::Alloc, INVALID_VALUE));
        }
        let limit = state.config.devices[ordinal as usize].total_memory;
        if state.memory.used(ordinal).saturating_add(bytes) > limit {
            return Err(Error::OutOfMemory { requested: bytes });
        }
        let captured = state.capture(Entry::Alloc, key)?.is_some();
        let address = state.memory.reserve(ordinal, bytes);
        if captured && let Some(capture) = state.capture(Entry::Alloc, key)? {
            capture.owned.push(address);
        }
        state.perform(Entry::Alloc, ordinal, key, Operation::Alloc(address))?;
        Ok(address)
    }

    fn free(&self, context: ContextHandle, address: u64, stream: StreamHandle) -> Result<()> {
        let (mut state, ordinal) = self.enter(Entry::Free, Some(context))?;
        let key = state.stream(Entry::Free, ordinal, stream)?;
        if let Some(capture) = state.capture(Entry::Free, key)?
            && !capture.owned.contains(&address)
        {
            state.violation("Free: a capture frees memory that its graph did not allocate");
            return Err(failure(Entry::Free, INVALID_VALUE));
        }
        state.perform(Entry::Free, ordinal, key, Operation::Free(address))
    }

    fn memset(
        &self,
        context: ContextHandle,
        address: u64,
        value: u8,
        bytes: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        let (mut state, ordinal) = self.enter(Entry::Memset, Some(context))?;
        let key = state.stream(Entry::Memset, ordinal, stream)?;
        let span = Span { address, bytes: bytes as u64 };
        state.perform(Entry::Memset, ordinal, key, Operation::Memset(span, value))
    }

    fn copy_to_device(&self, context: ContextHandle, address: u64, data: &[u8], stream: StreamHandle) -> Result<()> {
        let (mut state, ordinal) = self.enter(Entry::CopyToDevice, Some(context))?;
        let key = state.stream(Entry::CopyToDevice, ordinal, stream)?;
        state.refuse_capture(Entry::CopyToDevice, key, CAPTURE_UNSUPPORTED)?;
        let at = state.point(key, "a copy to the device");
        if let Some(bytes) = state.touch(&at, ordinal, Span { address, bytes: data.len() as u64 }, true) {
            bytes.copy_from_slice(data);
        }
        state.host_waits_for(key);
        Ok(())
    }

    fn copy_to_host(&self, context: ContextHandle, data: &mut [u8], address: u64, stream: StreamHandle) -> Result<()> {
        let (mut state, ordinal) = self.enter(Entry::CopyToHost, Some(context))?;
        let key = state.stream(Entry::CopyToHost, ordinal, stream)?;
        state.refuse_capture(Entry::CopyToHost, key, CAPTURE_UNSUPPORTED)?;
        let at = state.point(key, "a copy to the host");
        if let Some(bytes) = state.touch(&at, ordinal, Span { address, bytes: data.len() as u64 }, false) {
            data.copy_from_slice(bytes);
        }
        state.host_waits_for(key);
        Ok(())
    }

    fn create_stream(&self, context: ContextHandle) -> Result<StreamHandle> {
        let (mut state, ordinal) = self.enter(Entry::CreateStream, Some(context))?;
        Ok(StreamHandle(state.new_stream(ordinal)))
    }

    fn destroy_stream(&self, context: ContextHandle, stream: StreamHandle) -> Result<()> {
        let (mut state, ordinal) = self.enter(Entry::DestroyStream, Some(context))?;
        let key = state.stream(Entry::DestroyStream, ordinal, stream)?;
        if state.capture(Entry::DestroyStream, key)?.is_some() {
            state.violation("DestroyStream: the stream is being captured");
        }
        state.streams.remove(&key);
        Ok(())
    }

    fn stream_is_capturing(&self, context: ContextHandle, stream: StreamHandle) -> Result<bool> {
        let (mut state, ordinal) = self.enter(Entry::StreamIsCapturing, Some(context))?;
        let key = state.stream(Entry::StreamIsCapturing, ordinal, stream)?;
        Ok(state.streams.get(&key).is_some_and(|stream| stream.capture.is_some()))
    }

    fn synchronize(&self, context: ContextHandle, stream: StreamHandle) -> Result<()> {
        let (mut state, ordinal) = self.enter(Entry::Synchronize, Some(context))?;
        let key = state.stream(Entry::Synchronize, ordinal, stream)?;
        state.refuse_capture(Entry::Synchronize, key, CAPTURE_UNSUPPORTED)?;
        state.host_waits_for(key);
        Ok(())
    }

    fn create_event(&self, context: ContextHandle, timing: bool) -> Result<EventHandle> {
        let (mut state, _) = self.enter(Entry::CreateEvent, Some(context))?;
        let handle = state.handle();
        state.events.insert(handle, Event { clock: Clock::new(), capture: None, recorded_at: None, timing });
        Ok(EventHandle(handle))
    }

    fn destroy_event(&self, context: ContextHandle, event: EventHandle) -> Result<()> {
        let (mut state, _) = self.enter(Entry::DestroyEvent, Some(context))?;
        if state.events.remove(&event.0).is_none() {
            state.violation("DestroyEvent: no such event");
        }
        Ok(())
    }

    fn record_event(&self, context: ContextHandle, event: EventHandle, stream: StreamHandle) -> Result<()> {
        let (mut state, ordinal) = self.enter(Entry::RecordEvent, Some(context))?;
        let key = state.stream(Entry::RecordEvent, ordinal, stream)?;
        state.capture(Entry::RecordEvent, key)?;
        let at = state.point(key, "an event");
        let ticks = state.ticks;
        let capture = state.streams.get(&key).and_then(|stream| stream.capture);
        match state.events.get_mut(&event.0) {
            None => state.violation("RecordEvent: no such event"),
            Some(event) => {
                event.capture = capture;
                event.recorded_at = Some(ticks);
                if capture.is_none() {
                    event.clock = at.clock;
                }
            }
        }
        Ok(())
    }

    fn wait_event(&self, context: ContextHandle, stream: StreamHandle, event: EventHandle) -> Result<()> {
        let (mut state, ordinal) = self.enter(Entry::WaitEvent, Some(context))?;
        let key = state.stream(Entry::WaitEvent, ordinal, stream)?;
        state.capture(Entry::WaitEvent, key)?;
        let Some((clock, from)) = state.events.get(&event.0).map(|event| (event.clock.clone(), event.capture)) else {
            state.violation("WaitEvent: no such event");
            return Err(failure(Entry::WaitEvent, INVALID_HANDLE));
        };
        let into = state.streams.get(&key).and_then(|stream| stream.capture);
        match (from, into) {
            (None, None) => {
                if let Some(stream) = state.streams.get_mut(&key) {
                    join(&mut stream.clock, &clock);
                }
            }
            (from, into) if from == into => {}
            (_, Some(_)) => state.refuse_capture(Entry::WaitEvent, key, CAPTURE_ISOLATION)?,
            (Some(from), None) => {
                // Legal for the driver, but the runtime must never pull a second stream into a capture.
                state.violation("WaitEvent: a second stream joins a capture");
                if let Some(stream) = state.streams.get_mut(&key) {
                    stream.capture = Some(from);
                }
            }
        }
        Ok(())
    }

    fn synchronize_event(&self, context: ContextHandle, event: EventHandle) -> Result<()> {
        let (mut state, _) = self.enter(Entry::SynchronizeEvent, Some(context))?;
        match state.events.get(&event.0).map(|event| (event.clock.clone(), event.capture)) {
            None => state.violation("SynchronizeEvent: no such event"),
            Some((_, Some(_))) => return Err(failure(Entry::SynchronizeEvent, CAPTURED_EVENT)),
            Some((clock, None)) => join(&mut state.host, &clock),
        }
        Ok(())
    }

    fn elapsed_ms(&self, context: ContextHandle, start: EventHandle, end: EventHandle) -> Result<f32> {
        let (state, _) = self.enter(Entry::ElapsedMs, Some(context))?;
        let at = |event: EventHandle| state.events.get(&event.0).filter(|e| e.timing).and_then(|e| e.recorded_at);
        match (at(start), at(end)) {
            (Some(start), Some(end)) => Ok(end as f32 - start as f32),
            _ => Err(failure(Entry::ElapsedMs, INVALID_HANDLE)),
        }
    }

    fn begin_capture(&self, context: ContextHandle, stream: StreamHandle) -> Result<()> {
        let (mut state, ordinal) = self.enter(Entry::BeginCapture, Some(context))?;
        let key = state.stream(Entry::BeginCapture, ordinal, stream)?;
        if stream.0 == 0 || state.streams.get(&key).is_some_and(|stream| stream.capture.is_some()) {
            return Err(failure(Entry::BeginCapture, CAPTURE_UNSUPPORTED));
        }
        let id = state.handle();
        let thread = std::thread::current().id();
        let capture =
            Capture { origin: key, thread, ordinal, operations: Vec::new(), owned: Vec::new(), invalid: false };
        state.captures.insert(id, capture);
        if let Some(stream) = state.streams.get_mut(&key) {
            stream.capture = Some(id);
        }
        Ok(())
    }

    fn end_capture(&self, context: ContextHandle, stream: StreamHandle) -> Result<Option<GraphHandle>> {
        let (mut state, ordinal) = match self.enter(Entry::EndCapture, Some(context)) {
            Ok(entered) => entered,
            Err(error) => {
                // Whatever goes wrong, the stream is not captured afterwards.
                self.lock().abandon_capture(stream.0);
                return Err(error);
            }
        };
        let key = state.stream(Entry::EndCapture, ordinal, stream)?;
        let id = state.streams.get(&key).and_then(|stream| stream.capture).unwrap_or_default();
        let Some(capture) = state.captures.get(&id).filter(|capture| capture.origin == key) else {
            return Err(failure(Entry::EndCapture, CAPTURE_UNMATCHED));
        };
        if capture.thread != std::thread::current().id() {
            return Err(failure(Entry::EndCapture, CAPTURE_WRONG_THREAD));
        }
        let Some(capture) = state.abandon_capture(key) else { return Ok(None) };
        if capture.invalid {
            return Err(failure(Entry::EndCapture, CAPTURE_INVALIDATED));
        }
        let graph = Graph { ordinal: capture.ordinal, operations: capture.operations, clock: Clock::new() };
        let handle = state.handle();
        state.graphs.insert(handle, graph);
        Ok(Some(GraphHandle(handle)))
    }

    fn launch_graph(&self, context: ContextHandle, graph: GraphHandle, stream: StreamHandle) -> Result<()> {
        let (mut state, ordinal) = self.enter(Entry::LaunchGraph, Some(context))?;
        let key = state.stream(Entry::LaunchGraph, ordinal, stream)?;
        state.refuse_capture(Entry::LaunchGraph, key, CAPTURE_UNSUPPORTED)?;
        let Some(found) = state.graphs.get(&graph.0).filter(|found| found.ordinal == ordinal).cloned() else {
            state.violation("LaunchGraph: no such graph");
            return Err(failure(Entry::LaunchGraph, INVALID_HANDLE));
        };
        // The driver orders launches of one graph.
        if let Some(stream) = state.streams.get_mut(&key) {
            join(&mut stream.clock, &found.clock);
        }
        for operation in &found.operations {
            state.run(ordinal, key, operation, true);
        }
        let clock = state.streams.get(&key).map(|stream| stream.clock.clone()).unwrap_or_default();
        if let Some(graph) = state.graphs.get_mut(&graph.0) {
            graph.clock = clock;
        }
        Ok(())
    }

    fn destroy_graph(&self, context: ContextHandle, graph: GraphHandle) -> Result<()> {
        let (mut state, _) = self.enter(Entry::DestroyGraph, Some(context))?;
        if state.graphs.remove(&graph.0).is_none() {
            state.violation("DestroyGraph: no such graph");
        }
        Ok(())
    }
}
