//! A device, its verified bundle, the modules loaded from it, and the plans made so far.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::attention::plan::{Addresses, Placed};
use crate::attention::recent::{self, Geometry, Key, Settled};
use crate::attention::{
    Attention, AttentionOptions, BaseAlign, Checked, Explanation, Operands, Plan, Problem, choose, explain, restate,
};
use crate::bundle::manifest::{AuditVerdict, Launch, Variant};
use crate::bundle::{Bundle, Manifest, embedded};
use crate::cpu;
use crate::device::{BufferInner, Captured, DeviceContext, Few, Loan, Stream, enqueue};
use crate::driver::{DeviceInfo, Driver, FunctionHandle, StreamHandle};
use crate::error::{BundleError, Error, Result};
use crate::tensor::{Device, HostMut, Layout, Owner, OwnerMut, StorageMut, TensorView, TensorViewMut};

/// Plans are small; a workload with more geometries than this re-plans some of them.
const MAX_PLANS: usize = 4096;

/// The one variant of the CPU backend.
const CPU_VARIANT: &str = "cpu";

/// Where attention runs: one CUDA device, or the CPU backend. Cheap to share: `Send`, `Sync`, and clones are the same
/// runtime.
#[derive(Clone, Debug)]
pub struct Runtime {
    backend: Backend,
}

#[derive(Clone, Debug)]
enum Backend {
    Cpu,
    Device(Arc<DeviceRuntime>),
}

/// The last is the index of the variant that a call is pinned to.
type PlanKey = (Problem, BaseAlign, Option<u32>);

#[derive(Debug)]
struct DeviceRuntime {
    /// Tells runtimes apart, also those that are gone.
    number: u64,
    context: Arc<DeviceContext>,
    bundle: Bundle,
    stream: Stream,
    functions: Mutex<HashMap<String, Arc<[FunctionHandle]>>>,
    plans: RwLock<HashMap<PlanKey, Arc<Plan>>>,
}

/// How to make a [`Runtime`] that differs from the default.
#[derive(Default)]
pub struct RuntimeBuilder {
    ordinal: u32,
    arch: Option<String>,
    bundle: Option<Vec<u8>>,
    audited_only: bool,
    driver: Option<Arc<dyn Driver>>,
}

impl RuntimeBuilder {
    /// The device's ordinal; 0 unless said otherwise.
    pub fn ordinal(mut self, ordinal: u32) -> Self {
        self.ordinal = ordinal;
        self
    }

    /// Takes the embedded bundle of this architecture (`sm_80`, `compute_80`, ...) instead of the best for the device.
    pub fn arch(mut self, arch: impl Into<String>) -> Self {
        self.arch = Some(arch.into());
        self
    }

    /// Takes this bundle, a file's bytes, instead of an embedded one. The bytes are checked like hostile input; the
    /// machine code in them cannot be.
    ///
    /// # Safety
    /// The code does what its manifest says, and touches no other memory: the bundle was built from `kernels/`, or is
    /// trusted as much. Its hashes show that it is whole, not who made it.
    #[expect(unsafe_code, reason = "machine code that only the caller can vouch for")]
    pub unsafe fn bundle(self, bytes: impl Into<Vec<u8>>) -> Self {
        self.bundle_bytes(bytes.into())
    }

    /// Opens only a bundle all of whose kernels passed the constant-trace audit: no branch, address or guard in their
    /// machine code depends on what tensors hold. PTX, which the driver compiles, cannot pass.
    pub fn audited_only(mut self, audited_only: bool) -> Self {
        self.audited_only = audited_only;
        self
    }

    pub(crate) fn bundle_bytes(mut self, bytes: Vec<u8>) -> Self {
        self.bundle = Some(bytes);
        self
    }

    pub(crate) fn driver(mut self, driver: Arc<dyn Driver>) -> Self {
        self.driver = Some(driver);
        self
    }

    /// Opens the device, and verifies the bundle.
    ///
    /// # Errors
    /// [`Error::DriverNotFound`], [`Error::DriverTooOld`], [`Error::NoDevice`], [`Error::NoBundle`],
    /// [`Error::Bundle`] (also of [`RuntimeBuilder::audited_only`]), or a driver failure.
    pub fn build(self) -> Result<Runtime> {
        let driver = match self.driver {
            Some(driver) => driver,
            None => installed_driver()?,
        };
        let context = DeviceContext::new(driver, self.ordinal)?;
        let bytes = match (&self.bundle, &self.arch) {
            (Some(bytes), _) => bytes.as_slice(),
            (None, Some(arch)) => embedded_by_name(arch, &context.info)?,
            (None, None) => embedded_for(&context.info)?,
        };
        let bundle = Bundle::parse(bytes)?;
        if !arch_runs_on(&bundle.manifest().arch, context.info.compute_capability) {
            let (major, minor) = context.info.compute_capability;
            return Err(BundleError::ForeignArch {
                bundle: bundle.manifest().arch.clone(),
                device: format!("{} (compute capability {major}.{minor})", context.info.name),
            }
            .into());
        }
        if self.audited_only {
            check_audited(bundle.manifest())?;
        }
        let stream = Stream::create(context.clone())?;
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let (functions, plans) = (Mutex::default(), RwLock::default());
        let runtime = DeviceRuntime { number, context, bundle, stream, functions, plans };
        Ok(Runtime { backend: Backend::Device(Arc::new(runtime)) })
    }
}

impl Runtime {
    /// A runtime on a CUDA device.
    ///
    /// # Errors
    /// As [`RuntimeBuilder::build`].
    pub fn cuda(ordinal: u32) -> Result<Self> {
        Self::builder().ordinal(ordinal).build()
    }

    /// The CPU backend.
    pub const fn cpu() -> Self {
        Self { backend: Backend::Cpu }
    }

    /// CUDA device 0 if there is a usable one, else the CPU backend; says which, and why, in the log.
    pub fn auto() -> Self {
        Self::cuda(0).unwrap_or_else(|error| {
            log::warn!("using the CPU backend: {error}");
            Self::cpu()
        })
    }

    /// For a device that is not ordinal 0, or another bundle.
    pub fn builder() -> RuntimeBuilder {
        RuntimeBuilder::default()
    }

    /// The CUDA devices of this machine. Looking does not open them.
    ///
    /// # Errors
    /// [`Error::DriverNotFound`], [`Error::DriverTooOld`], or a driver failure.
    pub fn devices() -> Result<Vec<DeviceInfo>> {
        let driver = installed_driver()?;
        (0..driver.device_count()?).map(|ordinal| driver.device_info(ordinal)).collect()
    }

    /// Where tensors must be.
    pub fn device(&self) -> Device {
        match &self.backend {
            Backend::Cpu => Device::Cpu,
            Backend::Device(device) => Device::Cuda(device.context.info.ordinal),
        }
    }

    /// Facts about the device; `None` for the CPU backend.
    pub fn device_info(&self) -> Option<&DeviceInfo> {
        match &self.backend {
            Backend::Cpu => None,
            Backend::Device(device) => Some(&device.context.info),
        }
    }

    /// The manifest of the kernels in use; `None` for the CPU backend.
    pub fn manifest(&self) -> Option<&Manifest> {
        match &self.backend {
            Backend::Cpu => None,
            Backend::Device(device) => Some(device.bundle.manifest()),
        }
    }

    /// The runtime's own stream, on which work is queued unless another one is named.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for the CPU backend, which has no streams.
    pub fn stream(&self) -> Result<&Stream> {
        Ok(&self.device_runtime()?.stream)
    }

    /// A new stream.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for the CPU backend; a driver failure.
    pub fn new_stream(&self) -> Result<Stream> {
        Stream::create(self.device_runtime()?.context.clone())
    }

    /// A stream that another library made (`CUstream` as a number; 0 and 1 are the legacy default stream). It is not
    /// destroyed here.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for the CPU backend, and for 2, the per-thread default stream, which is another stream
    /// on every thread.
    ///
    /// # Safety
    /// The stream belongs to this runtime's device's primary context, and is alive whenever a clone of the returned value
    /// is used and as long as there is a buffer whose home it is. Nobody begins or ends a capture of it on one thread
    /// while another uses the returned value.
    #[expect(unsafe_code, reason = "a handle that only the caller can vouch for")]
    pub unsafe fn foreign_stream(&self, raw: u64) -> Result<Stream> {
        Stream::foreign(self.context()?.clone(), StreamHandle(raw), None)
    }

    /// Starts an attention call; see [`Attention`].
    #[inline]
    pub fn attention<'a>(
        &self,
        query: &TensorView<'a>,
        key: &TensorView<'a>,
        value: &TensorView<'a>,
    ) -> Attention<'_, 'a> {
        let operands = Operands { query: *query, key: *key, value: *value, attn_mask: None };
        Attention { runtime: self, operands, options: AttentionOptions::default(), stream: None, pin: None }
    }

    /// The index of a variant in the manifest; `None` for the CPU backend, which has nothing to choose from.
    pub(crate) fn variant_index(&self, name: &str) -> Result<Option<u32>> {
        let names: Vec<&str> = match self.manifest() {
            Some(manifest) => manifest.variants.iter().map(|variant| variant.name.as_str()).collect(),
            None if name == CPU_VARIANT => return Ok(None),
            None => vec![CPU_VARIANT],
        };
        let accepted = || format!("one of {}", names.join(", "));
        let index = names.iter().position(|&known| known == name);
        let index = index.ok_or_else(|| Error::invalid("variant", format!("{name:?}"), accepted()))?;
        Ok(u32::try_from(index).ok())
    }

    /// The plan for a problem whose tensors are aligned to 256 bytes, made now if there is none yet. Loads its module,
    /// so that no later call with the same geometry does.
    ///
    /// # Errors
    /// [`Error::Unsupported`]; [`Error::InvalidArgument`] for a malformed problem or the CPU backend; a driver failure.
    pub fn plan(&self, problem: &Problem) -> Result<Arc<Plan>> {
        self.device_runtime()?.plan(&restate(problem)?, BaseAlign::MAX, None)
    }

    pub(crate) fn run(
        &self,
        call: &Attention<'_, '_>,
        out: &mut TensorViewMut<'_>,
        lse: Option<&mut TensorViewMut<'_>>,
    ) -> Result<()> {
        let (geometry, addresses) = self.geometry(call, out, lse.as_deref())?;
        let mut placed = geometry.take_arguments();
        let settled = &geometry.settled;
        // Addresses that are in their places have passed.
        let passed = if placed.is_at(&addresses) { Ok(()) } else { settled.checked.check_addresses(&addresses) };
        let made =
            passed.and_then(|()| self.make(settled, call.stream, &call.operands, out, lse, &addresses, &mut placed));
        geometry.give_back(placed);
        made
    }

    /// Everything that can be made before a launch.
    pub(crate) fn prepare(
        &self,
        call: &Attention<'_, '_>,
        out: &TensorViewMut<'_>,
        lse: Option<&TensorViewMut<'_>>,
    ) -> Result<(Arc<Settled>, Addresses, Placed)> {
        let (geometry, addresses) = self.geometry(call, out, lse)?;
        let settled = geometry.settled.clone();
        settled.checked.check_addresses(&addresses)?;
        let placed = match (&self.backend, &settled.plan) {
            (Backend::Device(device), Some(plan)) => plan.place(&device.context, &addresses)?,
            _ => Placed::default(),
        };
        Ok((settled, addresses, placed))
    }

    /// Makes a call that has passed all checks, with arguments of its plan.
    #[inline]
    #[expect(clippy::too_many_arguments, reason = "the parts of a call, which two types own")]
    pub(crate) fn make(
        &self,
        settled: &Arc<Settled>,
        stream: Option<&Stream>,
        operands: &Operands<'_>,
        out: &mut TensorViewMut<'_>,
        lse: Option<&mut TensorViewMut<'_>>,
        addresses: &Addresses,
        placed: &mut Placed,
    ) -> Result<()> {
        match (&self.backend, &settled.plan) {
            (Backend::Device(device), Some(plan)) => {
                settled.announce();
                let stream = stream.unwrap_or(&device.stream);
                let work = || plan.launch(&device.context, stream.handle(), placed, addresses);
                device.enqueue(stream, operands, out, lse, work)?;
            }
            (Backend::Device(_), None) => {}
            (Backend::Cpu, _) => {
                settled.announce();
                run_on_cpu(&settled.checked.problem, operands, out, lse)?;
            }
        }
        recent::ran(settled);
        Ok(())
    }

    pub(crate) fn launch_alone(
        &self,
        settled: &Settled,
        stream: Option<&Stream>,
        addresses: &Addresses,
        placed: &mut Placed,
    ) -> Result<()> {
        let device = self.device_runtime()?;
        let stream = stream.unwrap_or(&device.stream).handle();
        settled.plan.as_ref().map_or(Ok(()), |plan| plan.launch(&device.context, stream, placed, addresses))
    }

    /// Everything about a call that its addresses do not change, and the addresses, not all of them checked.
    fn geometry(
        &self,
        call: &Attention<'_, '_>,
        out: &TensorViewMut<'_>,
        lse: Option<&TensorViewMut<'_>>,
    ) -> Result<(Rc<Geometry>, Addresses)> {
        let addresses = Addresses::of(&call.operands, out, lse);
        let align = BaseAlign::of([addresses.q, addresses.k, addresses.v, addresses.out]);
        let runtime = match &self.backend {
            Backend::Device(device) => device.number,
            Backend::Cpu => u64::MAX,
        };
        let key = Key { runtime, call, out, lse, align };
        if let Some(geometry) = recent::find(&key) {
            self.check_stream(call.stream)?;
            return Ok((geometry, addresses));
        }
        let checked = Checked::new(&call.operands, &call.options, out, lse)?;
        if checked.device != self.device() {
            let given = format!("a tensor on {}", checked.device);
            return Err(Error::invalid("query", given, format!("the runtime's device, {}", self.device())));
        }
        self.check_stream(call.stream)?;
        let plan = match &self.backend {
            Backend::Device(device) if !checked.problem.is_empty() => {
                Some(device.plan(&checked.problem, align, call.pin)?)
            }
            _ => None,
        };
        let geometry = key.geometry(checked, plan);
        recent::keep(&key, &geometry);
        Ok((geometry, addresses))
    }

    #[inline]
    pub(crate) fn check_stream(&self, stream: Option<&Stream>) -> Result<()> {
        match (&self.backend, stream) {
            (_, None) => Ok(()),
            (Backend::Cpu, Some(_)) => {
                Err(Error::invalid("stream", "a CUDA stream", "none: the CPU backend runs the call at once"))
            }
            (Backend::Device(device), Some(stream)) if !stream.context().is(&device.context) => {
                let given = format!("a stream of cuda:{}", stream.ordinal());
                let accepted = format!("a stream of cuda:{}", device.context.info.ordinal);
                Err(Error::invalid("stream", given, accepted))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn explain(&self, call: &Attention<'_, '_>) -> Result<Explanation> {
        let Operands { query, key, value, .. } = &call.operands;
        let [batch, heads, seq, _] = query.layout().shape;
        let shape = [batch, heads, seq, value.layout().shape[3]];
        let out = Layout::contiguous("out", query.layout().dtype, &shape)?;
        let problem = crate::attention::check::problem(&call.operands, &call.options, &out, false)?;
        let align = BaseAlign::of([query.address(), key.address(), value.address(), 0]);
        Ok(match &self.backend {
            Backend::Device(device) => explain(device.bundle.manifest(), &problem, align, call.pin),
            Backend::Cpu => Explanation {
                request: problem.to_string(),
                arch: "cpu".into(),
                chosen: Some("attention_forward.cpu".into()),
                rule: None,
                rejected: Vec::new(),
            },
        })
    }

    pub(crate) fn context(&self) -> Result<&Arc<DeviceContext>> {
        Ok(&self.device_runtime()?.context)
    }

    fn device_runtime(&self) -> Result<&Arc<DeviceRuntime>> {
        match &self.backend {
            Backend::Device(device) => Ok(device),
            Backend::Cpu => Err(Error::invalid("runtime", "the CPU backend", "a runtime on a CUDA device")),
        }
    }
}

/// The most tensors that a call has.
const MAX_TENSORS: usize = 6;

/// The owned buffers of a call; `None` when some of its memory is on loan.
#[inline]
fn buffers<'b>(
    operands: &Operands<'b>,
    out: &'b TensorViewMut<'_>,
    lse: Option<&'b TensorViewMut<'_>>,
) -> Option<[Option<&'b Arc<BufferInner>>; MAX_TENSORS]> {
    let input = |view: Option<&TensorView<'b>>| match view.and_then(TensorView::owner) {
        Some(Owner::Lender(_)) => None,
        Some(Owner::Buffer(buffer)) => Some(Some(buffer.inner())),
        None => Some(None),
    };
    let output = |view: Option<&'b TensorViewMut<'_>>| match view.and_then(TensorViewMut::owner) {
        Some(OwnerMut::Lender(_)) => None,
        Some(OwnerMut::Buffer(buffer)) => Some(Some(buffer.inner())),
        None => Some(None),
    };
    let Operands { query, key, value, attn_mask } = operands;
    let inputs = (input(Some(query))?, input(Some(key))?, input(Some(value))?, input(attn_mask.as_ref())?);
    Some([inputs.0, inputs.1, inputs.2, inputs.3, output(Some(out))?, output(lse)?])
}

impl DeviceRuntime {
    /// Queues `work` on a stream, in order with other uses of a call's memory.
    #[inline]
    fn enqueue(
        &self,
        stream: &Stream,
        operands: &Operands<'_>,
        out: &mut TensorViewMut<'_>,
        lse: Option<&mut TensorViewMut<'_>>,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        match buffers(operands, out, lse.as_deref()) {
            Some(buffers) => enqueue(stream, buffers.iter().filter_map(|buffer| *buffer), &[], Captured::Allowed, work),
            None => self.enqueue_with_loans(stream, operands, out, lse, work),
        }
    }

    /// [`DeviceRuntime::enqueue`] of a call some of whose memory is another library's.
    fn enqueue_with_loans(
        &self,
        stream: &Stream,
        operands: &Operands<'_>,
        out: &mut TensorViewMut<'_>,
        lse: Option<&mut TensorViewMut<'_>>,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut buffers = Few::new();
        let mut loans = Few::new();
        let Operands { query, key, value, attn_mask } = operands;
        let inputs = [Some(query), Some(key), Some(value), attn_mask.as_ref()];
        for owner in inputs.into_iter().flatten().filter_map(TensorView::owner) {
            match owner {
                Owner::Buffer(buffer) => buffers.push(buffer.inner()),
                Owner::Lender(lender) => loans.push(lender.lend()),
            }
        }
        for owner in [out.owner_mut(), lse.and_then(TensorViewMut::owner_mut)].into_iter().flatten() {
            match owner {
                OwnerMut::Buffer(buffer) => buffers.push(buffer.inner()),
                OwnerMut::Lender(lender) => loans.push(lender.lend_mut()),
            }
        }
        let lenders = Loan::homes(&loans, &self.context)?;
        enqueue(stream, buffers.iter().copied(), &lenders, Captured::Allowed, work)
    }

    fn plan(&self, problem: &Problem, align: BaseAlign, pin: Option<u32>) -> Result<Arc<Plan>> {
        let key = (*problem, align, pin);
        if let Some(plan) = self.plans.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(plan.clone());
        }
        let variant = choose(self.bundle.manifest(), problem, align, pin).map_err(Error::Unsupported)?;
        let functions = self.functions(variant)?;
        let plan = Arc::new(Plan::new(variant, &functions, *problem, self.context.info.sm_count)?);
        let mut plans = self.plans.write().unwrap_or_else(PoisonError::into_inner);
        if plans.len() >= MAX_PLANS {
            plans.clear();
        }
        plans.insert(key, plan.clone());
        Ok(plan)
    }

    /// The kernels of a variant, loaded on first use.
    fn functions(&self, variant: &Variant) -> Result<Arc<[FunctionHandle]>> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = functions.get(&variant.name) {
            return Ok(loaded.clone());
        }
        let loaded: Arc<[FunctionHandle]> =
            variant.launches.iter().map(|launch| self.load(variant, launch)).collect::<Result<_>>()?;
        functions.insert(variant.name.clone(), loaded.clone());
        Ok(loaded)
    }

    fn load(&self, variant: &Variant, launch: &Launch) -> Result<FunctionHandle> {
        let context = &self.context;
        let code = self.bundle.member(&launch.code).unwrap_or_default();
        let module = context.driver.load_module(context.handle, code)?;
        let function = context.driver.function(context.handle, module, &launch.kernel, launch.shared_bytes)?;
        check_abi(context, function, variant, launch)?;
        Ok(function)
    }
}

/// Refuses a bundle with a kernel that has not passed the audit.
fn check_audited(manifest: &Manifest) -> Result<()> {
    let launches = manifest.variants.iter().flat_map(|v| v.launches.iter().map(move |launch| (v, launch)));
    let mut unaudited = launches.filter(|(_, launch)| launch.audit.verdict != AuditVerdict::Pass);
    unaudited.next().map_or(Ok(()), |(variant, launch)| {
        let verdict = launch.audit.verdict.to_string();
        Err(BundleError::NotAudited { variant: variant.name.clone(), verdict }.into())
    })
}

/// Compares the manifest's parameter list with what the driver read from the code.
fn check_abi(context: &DeviceContext, function: FunctionHandle, variant: &Variant, launch: &Launch) -> Result<()> {
    let abi = |detail: String| Error::from(BundleError::Abi { variant: variant.name.clone(), detail });
    if context.driver.param_info(function, 0)?.is_none() && !launch.params.is_empty() {
        log::debug!("the driver does not report parameters; {} is not cross-checked", variant.name);
        return Ok(());
    }
    for (index, param) in launch.params.iter().enumerate() {
        let expected = param.size();
        match context.driver.param_info(function, index)? {
            Some((_, size)) if size == expected => {}
            Some((_, size)) => {
                return Err(abi(format!("parameter {index} has {size} bytes, the manifest says {expected}")));
            }
            None => {
                let have = launch.params.len();
                return Err(abi(format!("the code has {index} parameters, the manifest {have}")));
            }
        }
    }
    // Asking for a parameter past the last would do where the driver cannot count them, but memory checkers report
    // every failing driver call of a program, this one included.
    match context.driver.param_count(function)? {
        Some(count) if count != launch.params.len() => {
            Err(abi(format!("the code has {count} parameters, the manifest {}", launch.params.len())))
        }
        _ => Ok(()),
    }
}

fn run_on_cpu(
    problem: &Problem,
    operands: &Operands<'_>,
    out: &mut TensorViewMut<'_>,
    lse: Option<&mut TensorViewMut<'_>>,
) -> Result<()> {
    // The devices were compared in the checks, so every view is a host view.
    let Operands { query, key, value, attn_mask } = operands;
    let (Some(query), Some(key), Some(value)) = (query.host(), key.host(), value.host()) else { return Ok(()) };
    let StorageMut::Host(out) = &mut out.storage else { return Ok(()) };
    let lse = match lse.map(|lse| &mut lse.storage) {
        Some(StorageMut::Host(HostMut::F32(lse))) => Some(&mut **lse),
        _ => None,
    };
    let inputs = cpu::HostInputs { query, key, value, attn_mask: attn_mask.and_then(|mask| mask.host()) };
    cpu::attention(problem, inputs, out.reborrow(), lse);
    Ok(())
}

#[cfg(feature = "cuda")]
fn installed_driver() -> Result<Arc<dyn Driver>> {
    static DRIVER: std::sync::OnceLock<Result<Arc<crate::driver::cuda::CudaDriver>>> = std::sync::OnceLock::new();
    let driver = DRIVER.get_or_init(|| crate::driver::cuda::CudaDriver::load().map(Arc::new));
    driver.clone().map(|driver| driver as Arc<dyn Driver>)
}

#[cfg(not(feature = "cuda"))]
fn installed_driver() -> Result<Arc<dyn Driver>> {
    Err(Error::DriverNotFound { detail: "this build has no `cuda` feature".into() })
}

fn embedded_by_name(arch: &str, info: &DeviceInfo) -> Result<&'static [u8]> {
    embedded().iter().find(|(name, _)| *name == arch).map(|(_, bytes)| *bytes).ok_or_else(|| no_bundle(info))
}

/// The best embedded bundle for a device: machine code for its very architecture, then for an older minor revision of
/// the same major one, then PTX.
fn embedded_for(info: &DeviceInfo) -> Result<&'static [u8]> {
    embedded()
        .iter()
        .filter(|(arch, _)| arch_runs_on(arch, info.compute_capability))
        .max_by_key(|(arch, _)| parse_arch(arch).map(|a| (!a.ptx, a.exact, a.capability)))
        .map(|(_, bytes)| *bytes)
        .ok_or_else(|| no_bundle(info))
}

fn no_bundle(info: &DeviceInfo) -> Error {
    let (major, minor) = info.compute_capability;
    let present: Vec<_> = embedded().iter().map(|(arch, _)| *arch).collect();
    Error::NoBundle { device: info.name.clone(), major, minor, present: present.join(", ") }
}

struct Arch {
    ptx: bool,
    /// `sm_90a`: this compute capability and no other.
    exact: bool,
    capability: (u32, u32),
}

fn parse_arch(arch: &str) -> Option<Arch> {
    let (ptx, rest) = match arch.strip_prefix("compute_") {
        Some(rest) => (true, rest),
        None => (false, arch.strip_prefix("sm_")?),
    };
    let digits = rest.trim_end_matches('a');
    let number: u32 = digits.parse().ok()?;
    Some(Arch { ptx, exact: digits.len() < rest.len(), capability: (number / 10, number % 10) })
}

/// Whether code for `arch` runs on a device of this compute capability.
fn arch_runs_on(arch: &str, device: (u32, u32)) -> bool {
    let Some(Arch { ptx, exact, capability }) = parse_arch(arch) else { return false };
    match (exact, ptx) {
        (true, _) => capability == device,
        (false, true) => capability <= device,
        (false, false) => capability.0 == device.0 && capability.1 <= device.1,
    }
}

#[cfg(test)]
mod tests {
    use super::arch_runs_on;

    #[test]
    fn code_runs_where_cuda_says_it_does() {
        assert!(arch_runs_on("sm_90a", (9, 0)));
        assert!(!arch_runs_on("sm_90a", (10, 0)));
        assert!(arch_runs_on("sm_86", (8, 9)));
        assert!(!arch_runs_on("sm_86", (8, 0)));
        assert!(!arch_runs_on("sm_120a", (12, 1)));
        assert!(arch_runs_on("compute_80", (12, 1)));
        assert!(!arch_runs_on("compute_80", (7, 5)));
        assert!(!arch_runs_on("gfx90a", (9, 0)));
    }
}
