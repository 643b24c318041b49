//! What Python can ask about: decisions, devices, bundles and kernels.

use flashcore::bundle::{self, manifest::CodeKind};
use pyo3::prelude::*;

use crate::errors::Result;

/// Which kernel answers a call and why not each of the others; `str()` is a report.
#[pyclass(frozen, get_all, module = "flashcore")]
pub(crate) struct Explanation {
    /// The call in words.
    request: String,
    /// The architecture of the kernels that were considered; "cpu" for the CPU backend.
    arch: String,
    /// The kernel that would run; None when none qualifies.
    chosen: Option<String>,
    /// The sizes for which that kernel was measured to be the best; None when it is for all sizes.
    rule: Option<String>,
    /// Every other candidate, with one reason.
    rejected: Vec<(String, String)>,
}

impl From<flashcore::Explanation> for Explanation {
    fn from(explanation: flashcore::Explanation) -> Self {
        let rejected = explanation.rejected.into_iter().map(|(name, reason)| (name, reason.to_string())).collect();
        let flashcore::Explanation { request, arch, chosen, rule, .. } = explanation;
        Self { request, arch, chosen, rule, rejected }
    }
}

#[pymethods]
impl Explanation {
    fn __str__(&self) -> String {
        let verdict = match (&self.chosen, &self.rule) {
            (Some(name), Some(rule)) => format!("runs {name} ({rule})"),
            (Some(name), None) => format!("runs {name}"),
            (None, _) => "no kernel qualifies".into(),
        };
        let rejected: String = self.rejected.iter().map(|(name, reason)| format!("\n  not {name}: {reason}")).collect();
        format!("{} on {}\n  {verdict}{rejected}", self.request, self.arch)
    }

    fn __repr__(&self) -> String {
        let chosen = self.chosen.as_deref().unwrap_or("none");
        format!("<flashcore.Explanation: {chosen} of {} on {}>", self.rejected.len() + 1, self.arch)
    }
}

/// What this thread's last call ran.
#[pyclass(frozen, get_all, module = "flashcore")]
pub(crate) struct LastPlan {
    /// Where: "cuda:0", "cpu".
    device: String,
    /// The kernel's name; "cpu" for the CPU backend, "none" when there was nothing to do.
    kernel: String,
    /// The call in words.
    request: String,
}

#[pymethods]
impl LastPlan {
    fn __repr__(&self) -> String {
        format!("<flashcore.LastPlan: {} on {}>", self.kernel, self.device)
    }
}

/// What this thread's last call of `flashcore.attention`, of the operators, or of an overridden SDPA ran; None before the
/// first. What torch answered itself does not count.
#[pyfunction]
pub(crate) fn last_plan() -> Option<LastPlan> {
    flashcore::last_plan().map(|flashcore::LastPlan { device, kernel, request }| LastPlan {
        device: device.to_string(),
        kernel,
        request,
    })
}

/// Facts about a CUDA device.
#[pyclass(frozen, get_all, module = "flashcore")]
pub(crate) struct DeviceInfo {
    /// Ordinal as the driver counts.
    ordinal: u32,
    /// Marketing name.
    name: String,
    /// (major, minor).
    compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    sm_count: u32,
    /// Device memory, bytes.
    total_memory: usize,
    /// (major, minor) of the newest CUDA that the driver supports.
    driver_version: (u32, u32),
}

impl From<&flashcore::DeviceInfo> for DeviceInfo {
    fn from(info: &flashcore::DeviceInfo) -> Self {
        Self {
            ordinal: info.ordinal,
            name: info.name.clone(),
            compute_capability: info.compute_capability,
            sm_count: info.sm_count,
            total_memory: info.total_memory,
            driver_version: (info.driver_version / 1000, info.driver_version % 1000 / 10),
        }
    }
}

#[pymethods]
impl DeviceInfo {
    fn __repr__(&self) -> String {
        let (major, minor) = self.compute_capability;
        format!("<flashcore.DeviceInfo: cuda:{} {}, compute capability {major}.{minor}>", self.ordinal, self.name)
    }
}

/// The CUDA devices of this machine.
#[pyfunction]
pub(crate) fn devices() -> Result<Vec<DeviceInfo>> {
    Ok(flashcore::Runtime::devices()?.iter().map(DeviceInfo::from).collect())
}

/// A file of finished machine code for one architecture.
#[pyclass(frozen, get_all, module = "flashcore")]
pub(crate) struct Bundle {
    /// The architecture, such as "sm_90a"; "compute_80" for PTX.
    arch: String,
    /// The version of Triton that compiled it.
    triton: String,
    /// The version of the assembler.
    ptxas: String,
    /// What is in it.
    kernels: Vec<Kernel>,
}

impl From<&bundle::Manifest> for Bundle {
    fn from(manifest: &bundle::Manifest) -> Self {
        Self {
            arch: manifest.arch.clone(),
            triton: manifest.compiler.triton.clone(),
            ptxas: manifest.compiler.ptxas.clone(),
            kernels: manifest.variants.iter().map(Kernel::from).collect(),
        }
    }
}

#[pymethods]
impl Bundle {
    /// Reads a bundle and checks every hash, length and name in it.
    #[staticmethod]
    fn parse(data: &[u8]) -> Result<Self> {
        let bundle = bundle::Bundle::parse(data).map_err(flashcore::Error::from)?;
        Ok(Self::from(bundle.manifest()))
    }

    fn __repr__(&self) -> String {
        format!("<flashcore.Bundle: {} kernels for {}>", self.kernels.len(), self.arch)
    }
}

/// One kernel of a bundle.
#[pyclass(frozen, get_all, module = "flashcore")]
#[derive(Clone)]
pub(crate) struct Kernel {
    /// Unique in its bundle.
    name: String,
    /// The operation that it answers.
    op: String,
    /// "portable" or "hopper".
    family: String,
    /// Type of query, key, value and output.
    dtype: String,
    /// Smallest and largest head_dim of query and key.
    head_dim_qk: (u32, u32),
    /// Smallest and largest head_dim of value and output.
    head_dim_v: (u32, u32),
    /// Whether it answers causal and windowed calls too.
    band: bool,
    /// The mask it takes: "none", "bool", "f16", "bf16" or "f32".
    attn_mask: String,
    /// Query rows, key rows and padded head_dim of a tile.
    tile: (u32, u32, u32),
    /// Among the kernels that qualify, the highest runs.
    priority: i32,
    /// Threads per block.
    block_threads: u32,
    /// Registers per thread.
    registers: u32,
    /// Bytes of spilled registers per thread.
    spill_bytes: u32,
    /// Bytes of dynamic shared memory.
    shared_bytes: u32,
    /// "cubin" or "ptx".
    code: String,
    /// Bytes of code.
    code_bytes: u64,
    /// Hash of the code.
    sha256: String,
    /// The verdict of the constant-trace audit.
    audit: String,
}

impl From<&bundle::Variant> for Kernel {
    fn from(variant: &bundle::Variant) -> Self {
        let when = &variant.when;
        let main = variant.launches.first();
        let most = |of: fn(&bundle::manifest::Launch) -> u32| variant.launches.iter().map(of).max().unwrap_or(0);
        Self {
            name: variant.name.clone(),
            op: variant.op.clone(),
            family: variant.family.clone(),
            dtype: when.dtype.to_string(),
            head_dim_qk: when.head_dim_qk,
            head_dim_v: when.head_dim_v,
            band: when.band,
            attn_mask: format!("{:?}", when.attn_mask).to_lowercase(),
            tile: (variant.tile.query, variant.tile.key, variant.tile.head_dim),
            priority: variant.priority,
            block_threads: most(|launch| launch.block_threads),
            registers: most(|launch| launch.registers),
            spill_bytes: most(|launch| launch.spill_bytes),
            shared_bytes: most(|launch| launch.shared_bytes),
            code: match main.map(|launch| launch.code.kind) {
                Some(CodeKind::Ptx) => "ptx".into(),
                _ => "cubin".into(),
            },
            code_bytes: variant.launches.iter().map(|launch| launch.code.len).sum(),
            sha256: main.map(|launch| launch.code.sha256.clone()).unwrap_or_default(),
            audit: main.map(|launch| launch.audit.verdict.to_string()).unwrap_or_default(),
        }
    }
}

#[pymethods]
impl Kernel {
    fn __repr__(&self) -> String {
        format!("<flashcore.Kernel: {}>", self.name)
    }
}

/// The bundles that are part of the library.
#[pyfunction]
pub(crate) fn bundles() -> Result<Vec<Bundle>> {
    bundle::embedded().iter().map(|(_, bytes)| Bundle::parse(bytes)).collect()
}
