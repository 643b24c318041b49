//! The array libraries that arguments may come from. Neither is imported here: only a library that the program already
//! uses can have made an argument.

use flashcore::{DType, Device};
use pyo3::buffer::PyUntypedBuffer;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

use crate::dlpack::{Exchange, Shared};
use crate::errors::{Result, invalid, unsupported};
use crate::internals::Internals;
use crate::operand::{MAX_RANK, OUT, Operand, Role, bad_dtype};
use crate::plain::{Classes, Plain};
use crate::quiet::{State, Switches};
use crate::sdpa::out_strides;
use crate::shim::Look;

/// The library whose arrays a call is made of.
#[derive(Clone, Copy)]
pub(crate) enum Library {
    Torch(&'static Torch),
    Numpy(&'static Numpy),
}

/// A share in an array's memory, for the time that an operand is in use.
pub(crate) enum Keep {
    Tensor(#[expect(dead_code, reason = "held, not read")] Shared),
    Buffer(#[expect(dead_code, reason = "held, not read")] PyUntypedBuffer),
}

impl Library {
    /// PyTorch, if the program has imported it.
    pub(crate) fn torch(py: Python<'_>) -> Result<Option<&'static Torch>> {
        Torch::get(py)
    }

    /// The library that made `object`.
    pub(crate) fn of(role: &'static Role, object: &Bound<'_, PyAny>) -> Result<Self> {
        let py = object.py();
        if let Some(torch) = Torch::get(py)?
            && torch.classes.plain(object).is_some()
        {
            return Ok(Self::Torch(torch));
        }
        match Numpy::get(py)? {
            Some(numpy) if numpy.made(object) => Ok(Self::Numpy(numpy)),
            _ => Err(foreign(role, object, "a torch.Tensor or a numpy.ndarray").into()),
        }
    }

    /// A new array of the query's dtype, on its device, uninitialised; a torch tensor has the query's order of
    /// dimensions in memory, as SDPA's output does.
    pub(crate) fn empty_out<'py>(
        self,
        query: &Bound<'py, PyAny>,
        operand: &Operand,
        shape: &[usize; MAX_RANK],
        rank: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = query.py();
        let first = MAX_RANK - rank;
        match self {
            Self::Torch(torch) if *shape == operand.shape && rank == operand.rank && !operand.repeats() => {
                torch.empty_like.bind(py).call1((query,))
            }
            Self::Torch(_) => {
                let strides = out_strides(operand, shape);
                query.call_method1(intern!(py, "new_empty_strided"), (&shape[first..], &strides[first..]))
            }
            Self::Numpy(numpy) => {
                let shape = PyTuple::new(py, &shape[first..])?;
                numpy.empty.bind(py).call1((shape, query.getattr(intern!(py, "dtype"))?))
            }
        }
    }

    /// A new f32 array on the query's device, uninitialised.
    pub(crate) fn empty_lse<'py>(self, query: &Bound<'py, PyAny>, shape: &[usize]) -> PyResult<Bound<'py, PyAny>> {
        let py = query.py();
        let shape = PyTuple::new(py, shape)?;
        match self {
            Self::Torch(torch) => {
                let options = PyDict::new(py);
                options.set_item(intern!(py, "dtype"), &torch.float32)?;
                query.call_method(intern!(py, "new_empty"), (shape,), Some(&options))
            }
            Self::Numpy(numpy) => numpy.empty.bind(py).call1((shape, intern!(py, "float32"))),
        }
    }

    /// The stream on which the library would queue work now; 0 for the CPU, which has none.
    pub(crate) fn current_stream(self, py: Python<'_>, device: Device) -> PyResult<u64> {
        match (self, device) {
            (Self::Torch(torch), Device::Cuda(ordinal)) => torch.exchange.current_stream(py, ordinal),
            _ => Ok(0),
        }
    }
}

/// Reads the arguments of one call.
pub(crate) struct Reader {
    pub(crate) library: Library,
    /// Whether the operands outlive the call, and with it the caller's references to the arrays.
    share: bool,
    /// Whether torch's modes and the tensors' flags have yet to be looked at.
    check: bool,
    keep: Vec<Keep>,
}

impl Reader {
    /// Reads arrays for the time of a call that torch need not see.
    pub(crate) fn new(library: Library) -> Self {
        Self { library, share: false, check: false, keep: Vec::new() }
    }

    /// Reads any arrays, and refuses what is more than its memory; with `share`, for longer than the call.
    pub(crate) fn checking(library: Library, share: bool) -> Self {
        Self { library, share, check: true, keep: Vec::new() }
    }

    pub(crate) fn read(&mut self, role: &'static Role, object: &Bound<'_, PyAny>) -> Result<Operand> {
        if let Library::Torch(torch) = self.library
            && self.check
        {
            torch.check(role, object)?;
        }
        let (operand, keep) = match self.library {
            Library::Torch(torch) if !self.share => return torch.read(role, object),
            Library::Torch(torch) => torch.share(role, object)?,
            Library::Numpy(numpy) => numpy.read(role, object)?,
        };
        self.keep.push(keep);
        Ok(operand)
    }

    /// What the operands' memory depends on.
    pub(crate) fn into_keep(self) -> Vec<Keep> {
        self.keep
    }
}

/// PyTorch, from 2.10 on.
pub(crate) struct Torch {
    pub(crate) classes: Classes,
    exchange: Exchange,
    internals: Option<Internals>,
    empty_like: Py<PyAny>,
    float32: Py<PyAny>,
    switches: Switches,
}

impl Torch {
    /// PyTorch, if the program has imported it.
    fn get(py: Python<'_>) -> Result<Option<&'static Self>> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        if let Some(torch) = TORCH.get(py) {
            return Ok(Some(torch));
        }
        // A module that is still being imported has no `nn.Parameter` yet.
        let Some(module) = imported(py, "torch")? else { return Ok(None) };
        let Some(parameter) = attribute(&module, &["nn", "Parameter"])? else { return Ok(None) };
        let tensor = module.getattr("Tensor")?;
        let Some(exchange) = Exchange::of(&tensor)? else {
            let version = module.getattr("__version__")?;
            return Err(unsupported(format!("torch {version} has no DLPack exchange table; torch 2.10 or newer has")));
        };
        let classes = Classes::new(tensor, parameter)?;
        let torch = Self {
            internals: Internals::find(&module, &classes),
            classes,
            exchange,
            empty_like: module.getattr("empty_like")?.unbind(),
            float32: module.getattr("float32")?.unbind(),
            switches: Switches::of(&module)?,
        };
        Ok(Some(TORCH.get_or_init(py, || torch)))
    }

    /// The running torch from the inside, where that can be.
    pub(crate) fn internals(&self) -> Option<&Internals> {
        self.internals.as_ref()
    }

    /// Whether a call with these tensors is nothing but a kernel to torch, so that nobody else need see it.
    #[inline]
    pub(crate) fn is_quiet<'a, 'py: 'a>(
        &self,
        py: Python<'py>,
        tensors: impl Iterator<Item = &'a Bound<'py, PyAny>>,
    ) -> PyResult<bool> {
        match &self.internals {
            Some(internals) => self.is_quiet_by(internals, py, tensors),
            None => self.is_quiet_by(&self.switches, py, tensors),
        }
    }

    fn is_quiet_by<'a, 'py: 'a>(
        &self,
        state: &impl State,
        py: Python<'py>,
        tensors: impl Iterator<Item = &'a Bound<'py, PyAny>>,
    ) -> PyResult<bool> {
        if !state.all_off(py)? {
            return Ok(false);
        }
        let mut derivatives = None;
        for object in tensors {
            let Some(tensor) = self.classes.plain(object) else {
                // Another library's array is refused where it is read.
                if self.classes.is_tensor(object)? {
                    return Ok(false);
                }
                continue;
            };
            if state.is_neg(tensor)? || state.is_zero(tensor)? {
                return Ok(false);
            }
            if state.has_autograd(tensor) {
                let (forward, backward) = match derivatives {
                    Some(known) => known,
                    None => *derivatives.insert((state.forward_mode(py)?, state.grad_enabled(py)?)),
                };
                if forward || (backward && state.requires_grad(tensor)?) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    #[inline]
    pub(crate) fn read(&self, role: &'static Role, object: &Bound<'_, PyAny>) -> Result<Operand> {
        let tensor = self.plain(role, object)?;
        match &self.internals {
            Some(internals) => internals.look(role, tensor)?.operand(role),
            None => {
                #[expect(unsafe_code, reason = "the exchange table's contract")]
                // SAFETY: only `torch.Tensor` and `torch.nn.Parameter` passed; the table is `torch.Tensor`'s.
                unsafe {
                    self.exchange.read(role, object)
                }
            }
        }
    }

    /// What a tensor says of itself.
    #[inline]
    pub(crate) fn look<'a>(
        &self,
        internals: &Internals,
        role: &'static Role,
        object: &'a Bound<'_, PyAny>,
    ) -> Result<Look<'a>> {
        internals.look(role, self.plain(role, object)?)
    }

    fn share(&self, role: &'static Role, object: &Bound<'_, PyAny>) -> Result<(Operand, Keep)> {
        self.plain(role, object)?;
        #[expect(unsafe_code, reason = "the exchange table's contract")]
        // SAFETY: as in `read`.
        let (operand, shared) = unsafe { self.exchange.share(role, object) }?;
        Ok((operand, Keep::Tensor(shared)))
    }

    #[inline]
    fn plain<'a, 'py>(&self, role: &'static Role, object: &'a Bound<'py, PyAny>) -> Result<Plain<'a, 'py>> {
        self.classes.plain(object).ok_or_else(|| foreign(role, object, "a torch.Tensor, like the query").into())
    }

    /// Refuses what the exchange table would let pass: tensors whose memory does not say all about them.
    pub(crate) fn check(&self, role: &'static Role, object: &Bound<'_, PyAny>) -> Result<()> {
        let py = object.py();
        let tensor = self.plain(role, object)?;
        if !self.switches.all_off(py)? || self.switches.forward_mode(py)? {
            let message = "a mode of torch is on (autocast, a function transform, tracing): plan outside of it";
            return Err(unsupported(message));
        }
        if self.switches.requires_grad(tensor)? && self.switches.grad_enabled(py)? {
            return Err(unsupported(format!(
                "{}: requires_grad; there is no backward yet: call under torch.no_grad(), or detach the tensor",
                role.name
            )));
        }
        if self.switches.is_neg(tensor)? {
            let accepted = "a tensor as it is in memory; call .resolve_neg() first";
            return Err(invalid(role.name, "a view with its sign to be flipped (negative bit)", accepted).into());
        }
        if self.switches.is_zero(tensor)? {
            return Err(invalid(role.name, "a tensor of zeros without memory", "a tensor with memory").into());
        }
        Ok(())
    }
}

/// Whether torch would do nothing with a call on these tensors but run a kernel: as Python says, and as torch's C++
/// functions say, which are asked where they can be (else None).
#[pyfunction]
#[pyo3(signature = (*tensors))]
pub(crate) fn is_quiet(py: Python<'_>, tensors: &Bound<'_, PyTuple>) -> Result<(bool, Option<bool>)> {
    let Some(torch) = Torch::get(py)? else { return Err(unsupported("torch is not imported")) };
    let tensors: Vec<_> = tensors.iter().collect();
    let inside = torch.internals().map(|internals| torch.is_quiet_by(internals, py, tensors.iter())).transpose()?;
    Ok((torch.is_quiet_by(&torch.switches, py, tensors.iter())?, inside))
}

/// NumPy; on the CPU only.
pub(crate) struct Numpy {
    ndarray: Py<PyType>,
    empty: Py<PyAny>,
    ascontiguousarray: Py<PyAny>,
}

impl Numpy {
    /// NumPy, if the program has imported it.
    fn get(py: Python<'_>) -> Result<Option<&'static Self>> {
        static NUMPY: PyOnceLock<Numpy> = PyOnceLock::new();
        if let Some(numpy) = NUMPY.get(py) {
            return Ok(Some(numpy));
        }
        let Some(module) = imported(py, "numpy")? else { return Ok(None) };
        let Some(ascontiguousarray) = attribute(&module, &["ascontiguousarray"])? else { return Ok(None) };
        let numpy = Self {
            ndarray: module.getattr("ndarray")?.cast_into::<PyType>().map_err(PyErr::from)?.unbind(),
            empty: module.getattr("empty")?.unbind(),
            ascontiguousarray: ascontiguousarray.unbind(),
        };
        Ok(Some(NUMPY.get_or_init(py, || numpy)))
    }

    fn made(&self, object: &Bound<'_, PyAny>) -> bool {
        object.get_type_ptr() == self.ndarray.as_ptr().cast()
    }

    fn read(&self, role: &'static Role, object: &Bound<'_, PyAny>) -> Result<(Operand, Keep)> {
        if !self.made(object) {
            return Err(foreign(role, object, "a numpy.ndarray, like the query").into());
        }
        let Ok(buffer) = PyUntypedBuffer::get(object) else {
            return Err(bad_dtype(role, &object.getattr("dtype")?.to_string()));
        };
        let is_out = std::ptr::eq(role, &OUT);
        if is_out && buffer.readonly() {
            return Err(invalid(role.name, "a read-only array", "a writable array").into());
        }
        if !is_out && buffer.strides().iter().any(|&stride| stride < 0) {
            return self.read(role, &self.ascontiguousarray.bind(object.py()).call1((object,))?);
        }
        let Some(dtype) = dtype(buffer.format().to_bytes()) else {
            return Err(bad_dtype(role, &object.getattr("dtype")?.to_string()));
        };
        let shape: Vec<i64> = buffer.shape().iter().map(|&size| size as i64).collect();
        let size = dtype.size() as isize;
        if let Some(stride) = buffer.strides().iter().find(|&&stride| stride % size != 0) {
            let accepted = format!("strides that are multiples of the element size, {size} bytes");
            return Err(invalid(role.name, format!("a stride of {stride} bytes"), accepted).into());
        }
        let strides: Vec<i64> = buffer.strides().iter().map(|&stride| (stride / size) as i64).collect();
        let address = buffer.buf_ptr().addr() as u64;
        Ok((Operand::new(role, Device::Cpu, address, dtype, &shape, &strides)?, Keep::Buffer(buffer)))
    }
}

/// The element type of a buffer format in native byte order.
fn dtype(format: &[u8]) -> Option<DType> {
    let native = if cfg!(target_endian = "little") { b'<' } else { b'>' };
    match format {
        [b'@' | b'=', rest @ ..] => dtype(rest),
        [order, rest @ ..] if *order == native => dtype(rest),
        b"e" => Some(DType::F16),
        b"f" => Some(DType::F32),
        b"d" => Some(DType::F64),
        b"?" => Some(DType::Bool),
        _ => None,
    }
}

/// A module that the program has imported.
fn imported<'py>(py: Python<'py>, name: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
    let modules = py.import("sys")?.getattr("modules")?.cast_into::<PyDict>()?;
    modules.get_item(name)
}

/// An attribute's attribute; `None` when it is not there (yet).
fn attribute<'py>(module: &Bound<'py, PyAny>, path: &[&str]) -> PyResult<Option<Bound<'py, PyAny>>> {
    let mut object = module.clone();
    for name in path {
        match object.getattr_opt(*name)? {
            Some(next) => object = next,
            None => return Ok(None),
        }
    }
    Ok(Some(object))
}

/// An object that is no array, or another library's, or one with behaviour of its own.
fn foreign(role: &'static Role, object: &Bound<'_, PyAny>, accepted: &str) -> flashcore::Error {
    let class = object.get_type();
    let name = class.fully_qualified_name().map_or_else(|_| "an object".into(), |name| name.to_string());
    let base = class.mro().iter().skip(1).find_map(|base| {
        let name = base.cast::<PyType>().ok()?.fully_qualified_name().ok()?.to_string();
        matches!(name.as_str(), "torch.Tensor" | "numpy.ndarray").then_some(name)
    });
    match base {
        Some(base) => {
            let accepted = format!("a plain {base}: a subclass may mean something else than its memory");
            invalid(role.name, format!("an object of type {name}, a subclass of {base}"), accepted)
        }
        None => invalid(role.name, format!("an object of type {name}"), accepted),
    }
}

/// Python's view of an output and an optional log-sum-exp.
pub(crate) fn outputs<'py>(out: Bound<'py, PyAny>, lse: Option<Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
    match lse {
        None => Ok(out),
        Some(lse) => Ok(PyTuple::new(out.py(), [out, lse])?.into_any()),
    }
}
