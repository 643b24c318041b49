//! Running a call whose tensors are plain numbers.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use flashcore::attention::MAX_HEAD_DIM;
use flashcore::{Attention, AttentionOptions, Device, Error, PreparedCall, Runtime, Stream, TensorView, TensorViewMut};

use crate::errors::{Result, internal, invalid};
use crate::operand::{MAX_RANK, OUTER, Operand};
use crate::threads;

/// The inputs of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inputs {
    pub(crate) query: Operand,
    pub(crate) key: Operand,
    pub(crate) value: Operand,
    pub(crate) attn_mask: Option<Operand>,
    pub(crate) options: AttentionOptions,
}

/// A call and where its results go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) inputs: Inputs,
    pub(crate) out: Operand,
    pub(crate) lse: Option<Operand>,
}

impl Inputs {
    fn operands(&self) -> impl Iterator<Item = &Operand> {
        [Some(&self.query), Some(&self.key), Some(&self.value), self.attn_mask.as_ref()].into_iter().flatten()
    }

    /// Hands the inputs to the library.
    ///
    /// # Safety
    /// Until the work that is made of the result is done on its stream, each time that it is done, the operands' memory
    /// is valid for reads, as wide as their layouts say, and written by nobody else except in stream order. Memory of the
    /// host is all that as long as the result lives.
    #[expect(unsafe_code, reason = "memory that the caller vouches for")]
    unsafe fn attention<'r, 'a>(&self, runtime: &'r Runtime) -> Result<Attention<'r, 'a>, Error> {
        self.operands().try_for_each(check_host)?;
        let view = |operand: &Operand| {
            // SAFETY: the caller's promise; `check_host` has shown that host memory is aligned and not null.
            let view = unsafe {
                let (shape, strides) = (operand.shape4(), operand.strides4());
                TensorView::from_raw(operand.device, operand.address, operand.dtype, shape, strides)
            };
            // The library does not know which argument it is.
            view.or_else(|error| operand.layout().and(Err(error)))
        };
        let attention =
            runtime.attention(&view(&self.query)?, &view(&self.key)?, &view(&self.value)?).options(self.options);
        match &self.attn_mask {
            Some(mask) => Ok(attention.attn_mask(view(mask)?)),
            None => Ok(attention),
        }
    }

    /// What no kernel of ours takes and torch's own SDPA may; `None` when there is nothing of the kind.
    pub(crate) fn beyond_us(&self) -> Option<String> {
        for operand in [&self.query, &self.key, &self.value] {
            let (&[.., head_dim], &[.., stride]) = (operand.shape4(), operand.strides4());
            if head_dim > MAX_HEAD_DIM {
                return Some(format!("{}: head_dim {head_dim}; kernels take up to {MAX_HEAD_DIM}", operand.role.name));
            }
            if head_dim > 1 && stride != 1 {
                return Some(format!("{}: its last dimension is not contiguous (stride {stride})", operand.role.name));
            }
        }
        None
    }

    /// Which kernel would run.
    #[expect(unsafe_code, reason = "memory that is described and not used")]
    pub(crate) fn explain(&self, runtime: &Runtime) -> Result<flashcore::Explanation, Error> {
        // SAFETY: `explain` looks at addresses and layouts only; the caller keeps the arrays alive meanwhile.
        unsafe { self.attention(runtime) }?.explain()
    }
}

impl Call {
    /// Compares what the library does not see of the outputs' shapes with the result's: the rank, and dimensions before
    /// `batch`.
    pub(crate) fn check_outer(&self, shape: &[usize; MAX_RANK], rank: usize) -> Result<(), Error> {
        let Self { out, lse, .. } = self;
        let outer = |operand: &Operand| operand.rank == rank && operand.shape[..OUTER] == shape[..OUTER];
        if outer(out) && lse.as_ref().is_none_or(outer) {
            return Ok(());
        }
        let accepted = format!("shape {:?} (that of the result)", &shape[MAX_RANK - rank..]);
        Err(invalid(out.role.name, format!("shape {:?}", out.own_shape()), accepted))
    }

    /// Runs the call: on a device, queues it on the stream with this handle; on the CPU, returns when it is done.
    ///
    /// # Safety
    /// Until the work is done on its stream, the operands' memory is valid, for writes too where it is an output's, as
    /// wide as their layouts say, and nobody else writes inputs or uses outputs except in stream order. The stream is
    /// of the runtime's device's primary context, and alive.
    #[expect(unsafe_code, reason = "memory that the caller vouches for")]
    pub(crate) unsafe fn run(&self, runtime: &Runtime, stream: u64) -> Result<()> {
        let work = || match runtime.device() {
            // SAFETY: forwarded from the caller.
            Device::Cpu => unsafe { self.pieces(runtime, None) },
            Device::Cuda(_) => with_stream(runtime, stream, |stream| {
                // SAFETY: forwarded from the caller.
                unsafe { self.pieces(runtime, Some(stream)) }
            }),
        };
        let pool = if runtime.device() == Device::Cpu { threads::pool()? } else { None };
        contained(|| match pool {
            Some(pool) => pool.install(work),
            None => work(),
        })
    }

    /// Whether there are no dimensions before `batch`, as in most calls.
    pub(crate) fn is_one_launch(&self) -> bool {
        self.out.shape[..OUTER] == [1; OUTER]
    }

    /// One launch for every index of the dimensions before `batch`.
    ///
    /// # Safety
    /// As [`Call::run`].
    #[expect(unsafe_code, reason = "memory that the caller vouches for")]
    unsafe fn pieces(&self, runtime: &Runtime, stream: Option<&Stream>) -> Result<(), Error> {
        if self.is_one_launch() {
            // SAFETY: forwarded from the caller.
            return unsafe { self.launch(runtime, stream) };
        }
        let folded = self.folded();
        folded.check_overlap()?;
        let outer = &folded.out.shape[..OUTER];
        for index in 0..outer.iter().product() {
            let piece = folded.piece(index);
            // SAFETY: a part of what the caller vouches for.
            unsafe { piece.launch(runtime, stream)? };
        }
        Ok(())
    }

    fn operands_mut(&mut self) -> impl Iterator<Item = &mut Operand> {
        let Self { inputs: Inputs { query, key, value, attn_mask, .. }, out, lse } = self;
        [Some(query), Some(key), Some(value), attn_mask.as_mut(), Some(out), lse.as_mut()].into_iter().flatten()
    }

    /// The same call with dimensions before `batch` made part of it, as far as every operand's strides allow.
    fn folded(&self) -> Self {
        let mut call = *self;
        for dim in (0..OUTER).rev() {
            let (size, batch) = (call.out.shape[dim], call.out.shape[OUTER]);
            call.operands_mut().for_each(|operand| operand.broadcast(OUTER, batch));
            let dense = |operand: &mut Operand| operand.strides[dim] == operand.strides[OUTER] * batch as i64;
            if size != 1 && batch != 1 && !call.operands_mut().all(dense) {
                break;
            }
            for operand in call.operands_mut() {
                if batch == 1 {
                    operand.strides[OUTER] = operand.strides[dim];
                }
                operand.shape[OUTER] = size * batch;
                (operand.shape[dim], operand.strides[dim]) = (1, 0);
            }
        }
        call
    }

    /// The call at one index of the dimensions before `batch`, counted row by row.
    fn piece(&self, index: usize) -> Self {
        let mut piece = *self;
        let outer: [usize; OUTER] = std::array::from_fn(|dim| self.out.shape[dim]);
        for operand in piece.operands_mut() {
            let mut rest = index;
            for dim in (0..OUTER).rev() {
                let offset = (rest % outer[dim]) as i64 * operand.strides[dim] * operand.dtype.size() as i64;
                operand.address = operand.address.wrapping_add_signed(offset);
                rest /= outer[dim];
                operand.shape[dim] = 1;
            }
        }
        piece
    }

    /// Outputs must share no memory with an input, over all pieces: the library sees one at a time.
    fn check_overlap(&self) -> Result<(), Error> {
        for output in [Some(&self.out), self.lse.as_ref()].into_iter().flatten() {
            let span = output.whole_span();
            for input in self.inputs.operands().filter(|input| input.device == output.device) {
                let other = input.whole_span();
                if span.start < other.end && other.start < span.end {
                    let given = format!("memory shared with {}", input.role.name);
                    return Err(invalid(output.role.name, given, "memory of its own"));
                }
            }
        }
        Ok(())
    }

    /// # Safety
    /// As [`Call::run`].
    #[expect(unsafe_code, reason = "memory that the caller vouches for")]
    unsafe fn launch(&self, runtime: &Runtime, stream: Option<&Stream>) -> Result<(), Error> {
        // SAFETY: forwarded from the caller.
        let (mut outputs, attention) = unsafe { (self.outputs()?, self.inputs.attention(runtime)?) };
        let attention = match stream {
            Some(stream) => attention.on(stream),
            None => attention,
        };
        match &mut outputs {
            (out, Some(lse)) => attention.run_with_lse(out, lse),
            (out, None) => attention.run(out),
        }
    }

    /// Makes the call ready to be launched any number of times. It must be of one launch, on a device.
    ///
    /// # Safety
    /// As [`Call::run`], for each launch.
    #[expect(unsafe_code, reason = "memory that the caller vouches for")]
    pub(crate) unsafe fn ready(&self, runtime: &Runtime, stream: u64) -> Result<ReadyCall> {
        let prepare = || {
            // SAFETY: forwarded from the caller.
            match unsafe { (self.outputs()?, self.inputs.attention(runtime)?) } {
                ((out, Some(lse)), attention) => attention.prepare_with_lse(out, lse),
                ((out, None), attention) => attention.prepare(out),
            }
        };
        let call = contained(prepare)?;
        // SAFETY: the value is used only for launches, which name a live stream of this handle.
        let stream = unsafe { runtime.foreign_stream(stream) }?;
        Ok(ReadyCall { runtime: runtime.clone(), stream, call })
    }

    /// Hands the outputs to the library.
    ///
    /// # Safety
    /// As [`Inputs::attention`], for writes too, and nobody else reads the memory meanwhile.
    #[expect(unsafe_code, reason = "memory that the caller vouches for")]
    unsafe fn outputs<'a>(&self) -> Result<(TensorViewMut<'a>, Option<TensorViewMut<'a>>), Error> {
        self.check_outputs()?;
        let view = |operand: &Operand| {
            // SAFETY: the caller's promise; `check_outputs` has shown that host memory is aligned, not null, and no
            // other operand's. Its bytes were written or zeroed by an allocator of another language, so that they are
            // initialised as far as Rust can know.
            let view = unsafe {
                let (shape, strides) = (operand.shape4(), operand.strides4());
                TensorViewMut::from_raw(operand.device, operand.address, operand.dtype, shape, strides)
            };
            view.or_else(|error| operand.layout().and(Err(error)))
        };
        Ok((view(&self.out)?, self.lse.as_ref().map(view).transpose()?))
    }

    /// What must be known before exclusive slices of host memory exist. The library checks the rest, and device
    /// memory.
    fn check_outputs(&self) -> Result<(), Error> {
        for output in [Some(&self.out), self.lse.as_ref()].into_iter().flatten() {
            if output.device != Device::Cpu {
                continue;
            }
            check_host(output)?;
            let span = output.span()?;
            for input in self.inputs.operands().filter(|input| input.device == Device::Cpu) {
                let other = input.span()?;
                if span.start < other.end && other.start < span.end {
                    let given = format!("memory shared with {}", input.role.name);
                    return Err(invalid(output.role.name, given, "memory of its own"));
                }
            }
        }
        Ok(())
    }
}

/// A call on a device, ready to be launched. Holds none of its memory.
pub(crate) struct ReadyCall {
    runtime: Runtime,
    /// That of the launch before.
    stream: Stream,
    call: PreparedCall<'static>,
}

impl ReadyCall {
    /// Queues the call on the stream with this handle.
    ///
    /// # Safety
    /// As [`Call::run`].
    #[expect(unsafe_code, reason = "memory that the caller vouches for")]
    #[inline]
    pub(crate) unsafe fn launch(&mut self, stream: u64) -> Result<()> {
        if self.stream.raw() != stream {
            // SAFETY: as in `Call::ready`.
            self.stream = unsafe { self.runtime.foreign_stream(stream) }?;
        }
        let Self { call, stream, .. } = self;
        contained(|| call.launch_on(stream))
    }
}

/// Runs the library's code, of which a panic goes no further.
#[inline]
fn contained<T>(work: impl FnOnce() -> Result<T, Error>) -> Result<T> {
    let outcome = catch_unwind(AssertUnwindSafe(work));
    Ok(outcome.map_err(|panic| internal(&*panic))??)
}

/// Hands `body` the library's name for a stream that is another library's.
#[expect(unsafe_code, reason = "a stream that the caller vouches for")]
fn with_stream<T>(runtime: &Runtime, handle: u64, body: impl FnOnce(&Stream) -> Result<T, Error>) -> Result<T, Error> {
    thread_local! {
        /// The name made last: a program queues most of its work on one stream.
        static LAST: RefCell<Option<Stream>> = const { RefCell::new(None) };
    }
    // Taken out meanwhile: a logger, say, may call again.
    let known = LAST.take().filter(|stream| stream.is_foreign(runtime, handle));
    let stream = match known {
        Some(stream) => stream,
        // SAFETY: the value is used only here, during calls that name a live stream of this handle, and no buffer's home
        // is among them.
        None => unsafe { runtime.foreign_stream(handle) }?,
    };
    let outcome = body(&stream);
    LAST.set(Some(stream));
    outcome
}

/// Host memory becomes slices, which must be aligned and not null.
fn check_host(operand: &Operand) -> Result<(), Error> {
    if operand.device != Device::Cpu {
        return Ok(());
    }
    let size = operand.dtype.size() as u64;
    let misplaced = operand.address == 0 || !operand.address.is_multiple_of(size);
    if misplaced && !operand.layout()?.is_empty() {
        let given = format!("address {:#x}", operand.address);
        return Err(invalid(operand.role.name, given, format!("a non-null address that is a multiple of {size}")));
    }
    Ok(())
}
