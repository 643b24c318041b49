//! Running a call whose tensors are plain numbers.

use std::panic::{AssertUnwindSafe, catch_unwind};

use flashcore::{Attention, AttentionOptions, Device, Error, Runtime, Stream, TensorView, TensorViewMut};
use pyo3::prelude::*;

use crate::errors::{Result, internal, invalid};
use crate::operand::Operand;
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

    /// The shape of the output.
    pub(crate) fn out_shape(&self) -> [usize; 4] {
        let [batch, heads, seq, _] = self.query.shape;
        [batch, heads, seq, self.value.shape[3]]
    }

    /// Hands the inputs to the library.
    ///
    /// # Safety
    /// Until `body`'s work is done on its stream, the operands' memory is valid for reads, as wide as their layouts
    /// say, and written by nobody else except in stream order.
    #[expect(unsafe_code, reason = "memory that the caller vouches for")]
    unsafe fn attention<T>(
        &self,
        runtime: &Runtime,
        body: impl FnOnce(Attention<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.operands().try_for_each(check_host)?;
        let view = |operand: &Operand| {
            operand.layout()?;
            // SAFETY: the caller's promise; `check_host` has shown that host memory is aligned and not null.
            unsafe {
                TensorView::from_raw(operand.device, operand.address, operand.dtype, &operand.shape, &operand.strides)
            }
        };
        let attention =
            runtime.attention(&view(&self.query)?, &view(&self.key)?, &view(&self.value)?).options(self.options);
        match &self.attn_mask {
            Some(mask) => body(attention.attn_mask(view(mask)?)),
            None => body(attention),
        }
    }

    /// Which kernel would run.
    #[expect(unsafe_code, reason = "memory that is described and not used")]
    pub(crate) fn explain(&self, runtime: &Runtime) -> Result<flashcore::Explanation, Error> {
        // SAFETY: `explain` looks at addresses and layouts only; Python keeps the arrays alive meanwhile.
        unsafe { self.attention(runtime, |attention| attention.explain()) }
    }
}

impl Call {
    /// Runs the call: on a device, queues it on the stream with this handle; on the CPU, returns when it is done, and
    /// lets other Python threads run meanwhile.
    ///
    /// # Safety
    /// Until the work is done on its stream, the operands' memory is valid, for writes too where it is an output's, as
    /// wide as their layouts say, and nobody else writes inputs or uses outputs except in stream order. The stream is
    /// of the runtime's device's primary context, and alive.
    #[expect(unsafe_code, reason = "memory that the caller vouches for")]
    pub(crate) unsafe fn run(&self, py: Python<'_>, runtime: &Runtime, stream: u64) -> Result<()> {
        let stream = match runtime.device() {
            Device::Cpu => None,
            // SAFETY: forwarded from the caller.
            Device::Cuda(_) => Some(unsafe { runtime.foreign_stream(stream) }?),
        };
        // SAFETY: forwarded from the caller.
        let work = || unsafe { self.launch(runtime, stream.as_ref()) };
        // A launch takes microseconds: giving up the GIL would cost more than it brings.
        let outcome = match &stream {
            None => {
                let pool = threads::pool(py)?;
                py.detach(|| catch_unwind(AssertUnwindSafe(|| pool.map_or_else(work, |pool| pool.install(work)))))
            }
            Some(_) => catch_unwind(AssertUnwindSafe(work)),
        };
        Ok(outcome.map_err(|panic| internal(&*panic))??)
    }

    /// # Safety
    /// As [`Call::run`].
    #[expect(unsafe_code, reason = "memory that the caller vouches for")]
    unsafe fn launch(&self, runtime: &Runtime, stream: Option<&Stream>) -> Result<(), Error> {
        self.check_outputs()?;
        let view = |operand: &Operand| {
            operand.layout()?;
            // SAFETY: the caller's promise; `check_outputs` has shown that host memory is aligned, not null, and no
            // other operand's. Its bytes were written or zeroed by an allocator of another language, so that they are
            // initialised as far as Rust can know.
            unsafe {
                TensorViewMut::from_raw(
                    operand.device,
                    operand.address,
                    operand.dtype,
                    &operand.shape,
                    &operand.strides,
                )
            }
        };
        let mut out = view(&self.out)?;
        let mut lse = self.lse.as_ref().map(view).transpose()?;
        let run = |attention: Attention<'_>| {
            let attention = match stream {
                Some(stream) => attention.on(stream),
                None => attention,
            };
            match &mut lse {
                Some(lse) => attention.run_with_lse(&mut out, lse),
                None => attention.run(&mut out),
            }
        };
        // SAFETY: forwarded from the caller.
        unsafe { self.inputs.attention(runtime, run) }
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

/// Host memory becomes slices, which must be aligned and not null.
fn check_host(operand: &Operand) -> Result<(), Error> {
    let size = operand.dtype.size() as u64;
    let misplaced = operand.address == 0 || !operand.address.is_multiple_of(size);
    if operand.device == Device::Cpu && misplaced && !operand.layout()?.is_empty() {
        let given = format!("address {:#x}", operand.address);
        return Err(invalid(operand.role.name, given, format!("a non-null address that is a multiple of {size}")));
    }
    Ok(())
}
