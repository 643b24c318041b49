//! Runtimes: the ones that calls use, and those that Python opens itself.

use std::sync::{Mutex, OnceLock};

use flashcore::Device;
use pyo3::prelude::*;

use crate::call::{Call, ReadyCall};
use crate::errors::{Result, invalid};
use crate::info::{Bundle, DeviceInfo};
use crate::library::{Keep, Library, Reader};
use crate::request::{Prepared, Request};
use crate::sdpa::Options;

const MAX_DEVICES: usize = 64;

/// The runtime of a device, opened on first use and kept for the life of the process.
pub(crate) fn default_runtime(device: Device) -> Result<&'static flashcore::Runtime> {
    static CPU: flashcore::Runtime = flashcore::Runtime::cpu();
    static CUDA: [OnceLock<flashcore::Runtime>; MAX_DEVICES] = [const { OnceLock::new() }; MAX_DEVICES];
    let Device::Cuda(ordinal) = device else { return Ok(&CPU) };
    let Some(slot) = CUDA.get(ordinal as usize) else {
        return Err(invalid("query", device, format!("one of the first {MAX_DEVICES} devices")).into());
    };
    match slot.get() {
        Some(runtime) => Ok(runtime),
        None => {
            let runtime = flashcore::Runtime::cuda(ordinal)?;
            Ok(slot.get_or_init(|| runtime))
        }
    }
}

/// A device and the kernels for it. Calls of `flashcore.attention` need none; it is for looking, for forcing a bundle,
/// and for launching with the least overhead.
///
/// device: "cuda:0" or "cpu".
/// arch: take the embedded bundle of this architecture instead of the best for the device.
/// bundle: take the kernels of this bundle, a file's bytes. They are machine code: pass none that you would not run.
/// audited_only: open the bundle only if all its kernels passed the constant-trace audit.
#[pyclass(frozen, module = "flashcore")]
pub(crate) struct Runtime {
    runtime: flashcore::Runtime,
}

#[pymethods]
impl Runtime {
    #[new]
    #[pyo3(signature = (device="cuda:0", *, arch=None, bundle=None, audited_only=false))]
    fn new(device: &str, arch: Option<String>, bundle: Option<Vec<u8>>, audited_only: bool) -> Result<Self> {
        let Device::Cuda(ordinal) = parse_device(device)? else {
            if audited_only {
                return Err(
                    invalid("audited_only", "the CPU backend", "a CUDA device: only its kernels are audited").into()
                );
            }
            return Ok(Self { runtime: flashcore::Runtime::cpu() });
        };
        let mut builder = flashcore::Runtime::builder().ordinal(ordinal).audited_only(audited_only);
        if let Some(arch) = arch {
            builder = builder.arch(arch);
        }
        if let Some(bundle) = bundle {
            // SAFETY: Python runs any machine code that it is given; whoever passes a bundle vouches for it.
            #[expect(unsafe_code, reason = "kernels that the caller names")]
            let named = unsafe { builder.bundle(bundle) };
            builder = named;
        }
        Ok(Self { runtime: builder.build()? })
    }

    /// Where tensors must be: "cuda:0" or "cpu".
    #[getter]
    fn device(&self) -> String {
        self.runtime.device().to_string()
    }

    /// Facts about the device; None for the CPU.
    #[getter]
    fn info(&self) -> Option<DeviceInfo> {
        self.runtime.device_info().map(DeviceInfo::from)
    }

    /// The kernels in use; None for the CPU.
    #[getter]
    fn bundle(&self) -> Option<Bundle> {
        self.runtime.manifest().map(Bundle::from)
    }

    /// Prepares one call, whose arguments are those of `flashcore.attention`, to be launched any number of times.
    #[pyo3(signature = (query, key, value, attn_mask=None, dropout_p=0.0, is_causal=false, *, scale=None,
        enable_gqa=false, window=None, causal_align="top_left", return_lse=false, out=None))]
    #[expect(clippy::too_many_arguments, reason = "the signature of SDPA")]
    fn plan(
        &self,
        query: &Bound<'_, PyAny>,
        key: &Bound<'_, PyAny>,
        value: &Bound<'_, PyAny>,
        attn_mask: Option<&Bound<'_, PyAny>>,
        dropout_p: f64,
        is_causal: bool,
        scale: Option<f64>,
        enable_gqa: bool,
        window: Option<(Option<i64>, Option<i64>)>,
        causal_align: &str,
        return_lse: bool,
        out: Option<&Bound<'_, PyAny>>,
    ) -> Result<Plan> {
        let causal_align = crate::request::causal_align(causal_align)?;
        let options = Options { dropout_p, is_causal, scale, enable_gqa, window, causal_align };
        let request = Request { query, key, value, attn_mask, options };
        let mut reader = Reader::checking(request.library()?, true);
        let Prepared { call, out, lse } = request.prepare(&mut reader, out, return_lse)?;
        let (given, wanted) = (call.inputs.query.device, self.runtime.device());
        if given != wanted {
            let given = format!("a tensor on {given}");
            return Err(invalid("query", given, format!("the runtime's device, {wanted}")).into());
        }
        let explanation = call.inputs.explain(&self.runtime)?;
        let device = self.runtime.device();
        let ready = match device != Device::Cpu && call.is_one_launch() {
            #[expect(unsafe_code, reason = "memory that the plan shares")]
            // SAFETY: nothing is launched yet; `launch` says why it may.
            true => Some(Mutex::new(unsafe {
                call.ready(&self.runtime, reader.library.current_stream(query.py(), device)?)
            }?)),
            false => None,
        };
        Ok(Plan {
            call,
            ready,
            runtime: self.runtime.clone(),
            library: reader.library,
            keep: reader.into_keep(),
            kernel: explanation.chosen.unwrap_or_default(),
            out: out.unbind(),
            lse: lse.map(Bound::unbind),
        })
    }

    fn __repr__(&self) -> String {
        match self.runtime.manifest() {
            Some(manifest) => format!("<flashcore.Runtime on {} with {}>", self.runtime.device(), manifest.arch),
            None => "<flashcore.Runtime on cpu>".into(),
        }
    }
}

/// A prepared call. It shares the memory of its tensors, and reads and writes that memory at every launch.
#[pyclass(frozen, module = "flashcore")]
pub(crate) struct Plan {
    call: Call,
    /// The same, where it is one launch on a device.
    ready: Option<Mutex<ReadyCall>>,
    runtime: flashcore::Runtime,
    library: Library,
    #[expect(dead_code, reason = "held, not read")]
    keep: Vec<Keep>,
    /// The name of the kernel.
    #[pyo3(get)]
    kernel: String,
    /// The output.
    #[pyo3(get)]
    out: Py<PyAny>,
    /// The log-sum-exp, if it was asked for.
    #[pyo3(get)]
    lse: Option<Py<PyAny>>,
}

#[pymethods]
impl Plan {
    /// Queues the call on the current stream.
    fn launch(&self, py: Python<'_>) -> Result<()> {
        let stream = self.library.current_stream(py, self.runtime.device())?;
        #[expect(unsafe_code, reason = "memory that the plan shares")]
        // SAFETY: `keep` holds a share in every operand's memory. As for `attention`, the caller may not write to it
        // from another thread meanwhile.
        let work = || unsafe {
            // Busy in another thread, or in this one's logger: the long way.
            match self.ready.as_ref().and_then(|ready| ready.try_lock().ok()) {
                Some(mut ready) => ready.launch(stream),
                None => self.call.run(&self.runtime, stream),
            }
        };
        if self.runtime.device() == Device::Cpu { py.detach(work) } else { work() }
    }

    fn __repr__(&self) -> String {
        format!("<flashcore.Plan for {} on {}>", self.kernel, self.runtime.device())
    }
}

fn parse_device(name: &str) -> Result<Device> {
    let ordinal = match name.strip_prefix("cuda") {
        Some("") => Some(0),
        Some(rest) => rest.strip_prefix(':').and_then(|ordinal| ordinal.parse().ok()),
        None => None,
    };
    match (name, ordinal) {
        ("cpu", _) => Ok(Device::Cpu),
        (_, Some(ordinal)) => Ok(Device::Cuda(ordinal)),
        _ => Err(invalid("device", format!("{name:?}"), r#""cpu" or "cuda:0""#).into()),
    }
}
