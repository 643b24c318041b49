//! A call on torch's tensors, whose new results come from torch's allocator.

use flashcore::Device;
use pyo3::Python;

use crate::asked::{Asked, Results};
use crate::call::Call;
use crate::errors::Result;
use crate::memo::{self, Addresses};
use crate::runtime::default_runtime;
use crate::shim::{Tensor, Torch};

/// New tensors; no output where the caller gave one.
pub(crate) struct Made {
    pub(crate) out: Option<Tensor>,
    pub(crate) lse: Option<Tensor>,
}

/// Runs a call: on a device, queues it on torch's current stream; on the CPU, returns when it is done, without the GIL
/// if the caller holds it.
///
/// # Safety
/// The tensors are alive until this returns, and torch's allocator reuses device memory in the order of the current
/// stream. As for every operator of torch, nobody writes to the tensors from another thread meanwhile.
#[expect(unsafe_code, reason = "memory that the caller vouches for")]
pub(crate) unsafe fn run(torch: &'static Torch, asked: &Asked, gil: Option<Python<'_>>) -> Result<Made> {
    let device = asked.query.device;
    let stream = torch.current_stream(device)?;
    let known = memo::find(asked);
    let (inputs, results) = match &known {
        Some(known) => (None, known.results),
        None => {
            let inputs = asked.inputs()?;
            (Some(inputs), Results::of(&inputs))
        }
    };
    let (out, new_out) = match asked.out {
        Some(out) => (out, None),
        None => results.new_out(torch).map(|(tensor, operand)| (operand, Some(tensor)))?,
    };
    let lse = asked.return_lse.then(|| results.new_lse(torch)).transpose()?;
    let (new_lse, lse) = lse.unzip();
    let made = Made { out: new_out, lse: new_lse };
    let addresses = Addresses::of(asked, &out, lse.as_ref());
    if let Some(kind) = &known {
        // SAFETY: forwarded from the caller; the tensors are of this kind.
        if unsafe { memo::launch(kind, &addresses, stream) }? {
            return Ok(made);
        }
    }
    let inputs = inputs.map_or_else(|| asked.inputs(), Ok)?;
    let call = Call { inputs, out, lse };
    call.check_outer(&results.shape, results.rank)?;
    let runtime = default_runtime(device)?;
    if device != Device::Cpu && call.is_one_launch() {
        // SAFETY: forwarded from the caller; later launches have a promise of their own (`memo::launch`).
        let ready = unsafe {
            let mut ready = call.ready(runtime, stream)?;
            ready.launch(stream)?;
            ready
        };
        memo::keep(&known.unwrap_or_else(|| memo::learn(asked, results)), addresses, ready);
        return Ok(made);
    }
    // SAFETY: forwarded from the caller.
    let work = || unsafe { call.run(runtime, stream) };
    match gil {
        // A launch takes microseconds: giving up the GIL would cost more than it brings.
        Some(py) if device == Device::Cpu => py.detach(work)?,
        _ => work()?,
    }
    Ok(made)
}
