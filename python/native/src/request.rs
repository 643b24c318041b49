//! A call as Python makes it.

use flashcore::CausalAlign;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyNotImplemented, PyString, PyStringMethods};

use crate::asked::{Asked, Results, TorchCall};
use crate::call::Call;
use crate::errors::{Failure, Result, invalid};
use crate::info::Explanation;
use crate::internals::Internals;
use crate::library::{Library, Reader, Torch, outputs};
use crate::operand::{ATTN_MASK, KEY, LSE, OUT, QUERY, VALUE};
use crate::runtime::default_runtime;
use crate::sdpa::{self, Options};
use crate::shim::Tensor;
use crate::torch_call;

/// The arguments that `attention`, `explain` and `Runtime.plan` share.
pub(crate) struct Request<'a, 'py> {
    pub(crate) query: &'a Bound<'py, PyAny>,
    pub(crate) key: &'a Bound<'py, PyAny>,
    pub(crate) value: &'a Bound<'py, PyAny>,
    pub(crate) attn_mask: Option<&'a Bound<'py, PyAny>>,
    pub(crate) options: Options,
}

/// A request that has been read, and its outputs as Python objects.
pub(crate) struct Prepared<'py> {
    pub(crate) call: Call,
    pub(crate) out: Bound<'py, PyAny>,
    pub(crate) lse: Option<Bound<'py, PyAny>>,
}

impl<'py> Request<'_, 'py> {
    /// The library whose arrays these are.
    pub(crate) fn library(&self) -> Result<Library> {
        Library::of(&QUERY, self.query)
    }

    /// Reads the arguments.
    pub(crate) fn asked(&self, reader: &mut Reader, out: Option<&Bound<'py, PyAny>>) -> Result<Asked> {
        Ok(Asked {
            query: reader.read(&QUERY, self.query)?,
            key: reader.read(&KEY, self.key)?,
            value: reader.read(&VALUE, self.value)?,
            attn_mask: self.attn_mask.map(|mask| reader.read(&ATTN_MASK, mask)).transpose()?,
            out: out.map(|out| reader.read(&OUT, out)).transpose()?,
            options: self.options,
        })
    }

    /// Runs a call that is nothing but a kernel to torch.
    #[inline]
    fn run_inside(
        &self,
        torch: &Torch,
        internals: &Internals,
        out: Option<&Bound<'py, PyAny>>,
        return_lse: bool,
    ) -> Result<Bound<'py, PyAny>> {
        let py = self.query.py();
        let call = TorchCall {
            query: torch.look(internals, &QUERY, self.query)?,
            key: torch.look(internals, &KEY, self.key)?,
            value: torch.look(internals, &VALUE, self.value)?,
            attn_mask: self.attn_mask.map(|mask| torch.look(internals, &ATTN_MASK, mask)).transpose()?,
            out: out.map(|out| torch.look(internals, &OUT, out)).transpose()?,
            return_lse,
            options: self.options,
        };
        #[expect(unsafe_code, reason = "memory that Python owns")]
        // SAFETY: the arguments keep the tensors alive during the call.
        let made = unsafe { torch_call::run(internals.torch(), &call, Some(py)) }?;
        let wrap = |tensor: Tensor| internals.wrap(py, tensor.borrow());
        let lse = made.lse.map(wrap).transpose()?;
        let out = match made.out {
            Some(new) => wrap(new)?,
            None => out.cloned().ok_or_else(|| Failure::Internal("a call without an output".into()))?,
        };
        Ok(outputs(out, lse)?)
    }

    /// Reads the inputs, and reads or makes the outputs.
    pub(crate) fn prepare(
        &self,
        reader: &mut Reader,
        out: Option<&Bound<'py, PyAny>>,
        return_lse: bool,
    ) -> Result<Prepared<'py>> {
        let asked = self.asked(reader, out)?;
        let inputs = asked.inputs()?;
        let Results { shape, rank, .. } = Results::of(&inputs);
        let out = match out {
            Some(out) => out.clone(),
            None => reader.library.empty_out(self.query, &inputs.query, &shape, rank)?,
        };
        let own_shape = &shape[shape.len() - rank..shape.len() - 1];
        let lse = return_lse.then(|| reader.library.empty_lse(self.query, own_shape)).transpose()?;
        let call = Call {
            inputs,
            out: asked.out.map_or_else(|| reader.read(&OUT, &out), Ok)?,
            lse: lse.as_ref().map(|lse| reader.read(&LSE, lse)).transpose()?,
        };
        call.check_outer(&shape, rank)?;
        Ok(Prepared { call, out, lse })
    }

    /// Whether nobody but a kernel need see the call.
    fn is_quiet(&self, library: Library, out: Option<&Bound<'py, PyAny>>) -> Result<bool> {
        let Library::Torch(torch) = library else { return Ok(true) };
        let tensors = [Some(self.query), Some(self.key), Some(self.value), self.attn_mask, out];
        Ok(torch.is_quiet(self.query.py(), tensors.into_iter().flatten())?)
    }

    /// Whether torch should see a call that was refused.
    fn is_for_torch(&self, library: Library, failure: &Failure, elsewhere: bool) -> bool {
        let inputs = || self.asked(&mut Reader::new(library), None).ok()?.inputs().ok();
        match (library, failure) {
            (Library::Numpy(_), _) => false,
            (Library::Torch(_), Failure::Unreadable(_)) => true,
            (Library::Torch(_), failure) => elsewhere && sdpa::elsewhere(&self.options, failure, inputs).is_some(),
        }
    }

    /// The library of a call that can be launched at once; `None` when torch has to see it first.
    fn direct(&self, out: Option<&Bound<'py, PyAny>>) -> Result<Option<Library>> {
        match self.library() {
            Ok(library) => Ok(self.is_quiet(library, out)?.then_some(library)),
            Err(refusal) => match Library::torch(self.query.py())? {
                Some(torch) if torch.classes.is_tensor(self.query)? => Ok(None),
                _ => Err(refusal),
            },
        }
    }
}

/// Where the diagonal is, by its name in Python.
pub(crate) fn causal_align(name: &str) -> Result<CausalAlign> {
    match name {
        "top_left" => Ok(CausalAlign::TopLeft),
        "bottom_right" => Ok(CausalAlign::BottomRight),
        other => Err(invalid("causal_align", format!("{other:?}"), r#""top_left" or "bottom_right""#).into()),
    }
}

/// Whether torch's own SDPA may answer instead, by the name of the backend.
fn elsewhere(backend: &Bound<'_, PyAny>) -> Result<bool> {
    match backend.extract::<PyBackedStr>().as_deref() {
        Ok("auto") => Ok(true),
        Ok("flashcore") => Ok(false),
        _ => Err(invalid("backend", backend.repr()?, r#""auto" or "flashcore""#).into()),
    }
}

/// The call of `flashcore.attention` without torch's dispatcher. `NotImplemented` when torch must see the call:
/// gradients, subclasses, modes, transforms, and with the backend "auto" also what torch's own SDPA may be able to do.
#[pyfunction]
#[pyo3(signature = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, causal_align, return_lse,
    out, backend, /))]
#[expect(clippy::too_many_arguments, reason = "the signature of SDPA")]
pub(crate) fn attention<'py>(
    query: &Bound<'py, PyAny>,
    key: &Bound<'py, PyAny>,
    value: &Bound<'py, PyAny>,
    attn_mask: Option<&Bound<'py, PyAny>>,
    dropout_p: f64,
    is_causal: bool,
    scale: Option<f64>,
    enable_gqa: bool,
    window: Option<(Option<i64>, Option<i64>)>,
    causal_align: &Bound<'py, PyString>,
    return_lse: bool,
    out: Option<&Bound<'py, PyAny>>,
    backend: &Bound<'py, PyAny>,
) -> Result<Bound<'py, PyAny>> {
    // Python's constants are interned, so that all but a few calls need not look into them.
    let py = query.py();
    let causal_align = match causal_align.is(intern!(py, "top_left")) {
        true => CausalAlign::TopLeft,
        false => self::causal_align(&causal_align.to_cow()?)?,
    };
    let elsewhere = backend.is(intern!(py, "auto")) || elsewhere(backend)?;
    let options = Options { dropout_p, is_causal, scale, enable_gqa, window, causal_align };
    let request = Request { query, key, value, attn_mask, options };
    let Some(library) = request.direct(out)? else { return Ok(not_implemented(query.py())) };
    match run(&request, library, out, return_lse) {
        Err(failure) if request.is_for_torch(library, &failure, elsewhere && !return_lse) => {
            Ok(not_implemented(query.py()))
        }
        result => result,
    }
}

fn not_implemented(py: Python<'_>) -> Bound<'_, PyAny> {
    PyNotImplemented::get(py).to_owned().into_any()
}

fn run<'py>(
    request: &Request<'_, 'py>,
    library: Library,
    out: Option<&Bound<'py, PyAny>>,
    return_lse: bool,
) -> Result<Bound<'py, PyAny>> {
    if let Library::Torch(torch) = library
        && let Some(internals) = torch.internals()
    {
        match request.run_inside(torch, internals, out, return_lse) {
            // Asked through Python, torch says why in an exception of its own.
            Err(Failure::Allocation) => {}
            result => return result,
        }
    }
    let py = request.query.py();
    let mut reader = Reader::new(library);
    let Prepared { call, out, lse } = request.prepare(&mut reader, out, return_lse)?;
    let device = call.inputs.query.device;
    let runtime = default_runtime(device)?;
    let stream = library.current_stream(py, device)?;
    #[expect(unsafe_code, reason = "memory that Python owns")]
    // SAFETY: the arguments keep the arrays alive during the call, `reader` their buffers, and a library that frees
    // device memory reuses it in the order of the stream that it named. As for every operation of torch and numpy, the
    // caller may not write to the arrays from another thread meanwhile.
    let work = || unsafe { call.run(runtime, stream) };
    // A launch takes microseconds: giving up the GIL would cost more than it brings.
    if runtime.device() == flashcore::Device::Cpu {
        py.detach(work)?
    } else {
        work()?
    }
    drop(reader);
    Ok(outputs(out, lse)?)
}

/// Which kernel would answer a call, and why not each of the others. Takes the arguments of `attention`; launches
/// nothing.
#[pyfunction]
#[pyo3(signature = (query, key, value, attn_mask=None, dropout_p=0.0, is_causal=false, *, scale=None, enable_gqa=false,
    window=None, causal_align="top_left"))]
#[expect(clippy::too_many_arguments, reason = "the signature of SDPA")]
pub(crate) fn explain(
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
) -> Result<Explanation> {
    let causal_align = self::causal_align(causal_align)?;
    let options = Options { dropout_p, is_causal, scale, enable_gqa, window, causal_align };
    let request = Request { query, key, value, attn_mask, options };
    let inputs = request.asked(&mut Reader::checking(request.library()?, false), None)?.inputs()?;
    Ok(inputs.explain(default_runtime(inputs.query.device)?)?.into())
}
