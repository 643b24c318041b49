//! A call on torch's tensors, whose new results come from torch's allocator.

use std::rc::Rc;

use flashcore::Device;
use pyo3::Python;

use crate::asked::{Results, TorchCall};
use crate::call::Call;
use crate::errors::Result;
use crate::memo::{self, Addresses, Again, Kind};
use crate::runtime::default_runtime;
use crate::shim::{Tensor, Torch};

/// New tensors; no output where the caller gave one.
pub(crate) struct Made {
    pub(crate) out: Option<Tensor>,
    pub(crate) lse: Option<Tensor>,
}

impl Made {
    #[inline]
    fn new(torch: &'static Torch, call: &TorchCall<'_>, results: &Results) -> Result<(Self, Addresses)> {
        let new_out = call.out.is_none().then(|| results.new_out(torch)).transpose()?;
        let lse = call.return_lse.then(|| results.new_lse(torch)).transpose()?;
        let address = |tensor: &Option<Tensor>| tensor.as_ref().map_or(Ok(0), |tensor| tensor.borrow().address());
        let out = call.out.map_or_else(|| address(&new_out), |out| Ok(out.address))?;
        let addresses = Addresses::of(call, out, address(&lse)?);
        Ok((Self { out: new_out, lse }, addresses))
    }
}

/// Runs a call: on a device, queues it on torch's current stream; on the CPU, returns when it is done, without the GIL
/// if the caller holds it.
///
/// # Safety
/// The tensors are alive until this returns, and torch's allocator reuses device memory in the order of the current
/// stream. As for every operator of torch, nobody writes to the tensors from another thread meanwhile.
#[expect(unsafe_code, reason = "memory that the caller vouches for")]
#[inline]
pub(crate) unsafe fn run(torch: &'static Torch, call: &TorchCall<'_>, gil: Option<Python<'_>>) -> Result<Made> {
    let known = match memo::find(call) {
        Some(kind) => {
            let stream = torch.current_stream(call.query.device())?;
            let (made, addresses) = Made::new(torch, call, &kind.results)?;
            // SAFETY: forwarded from the caller; the tensors are of this kind.
            match unsafe { memo::launch(&kind, &addresses, stream) }? {
                Again::Launched => return Ok(made),
                again => Some((kind, made, addresses, again)),
            }
        }
        None => None,
    };
    // SAFETY: forwarded from the caller.
    unsafe { run_new(torch, call, known, gil) }
}

/// [`run`] for a call that was not made lately; `known` is what is there if its kind was.
///
/// # Safety
/// As [`run`].
#[expect(unsafe_code, reason = "memory that the caller vouches for")]
unsafe fn run_new(
    torch: &'static Torch,
    call: &TorchCall<'_>,
    known: Option<(Rc<Kind>, Made, Addresses, Again)>,
    gil: Option<Python<'_>>,
) -> Result<Made> {
    let asked = call.asked()?;
    let inputs = asked.inputs()?;
    let results = Results::of(&inputs);
    let (kind, made, addresses, again) = match known {
        Some((kind, made, addresses, again)) if kind.results == results => (Some(kind), made, addresses, again),
        _ => {
            let (made, addresses) = Made::new(torch, call, &results)?;
            (None, made, addresses, Again::New)
        }
    };
    let out = asked.out.unwrap_or_else(|| results.out(addresses.out()));
    let lse = made.lse.as_ref().map(|_| results.lse(addresses.lse()));
    let described = Call { inputs, out, lse };
    described.check_outer(&results.shape, results.rank)?;
    let device = inputs.query.device;
    let (runtime, stream) = (default_runtime(device)?, torch.current_stream(device)?);
    let remembered = device != Device::Cpu && described.is_one_launch();
    // Before the launch: a logger may run then, and whoever it lets run may change the tensors.
    let kind = remembered.then(|| kind.unwrap_or_else(|| Kind::new(call, results)));
    let mut ready = None;
    // SAFETY: forwarded from the caller; later launches have a promise of their own (`memo::launch`).
    let mut work = || unsafe {
        if remembered && again == Again::Once {
            return ready.insert(described.ready(runtime, stream)?).launch(stream);
        }
        described.run(runtime, stream)
    };
    match gil {
        // A launch takes microseconds: giving up the GIL would cost more than it brings.
        Some(py) if device == Device::Cpu => py.detach(work)?,
        _ => work()?,
    }
    if let Some(kind) = kind {
        memo::keep(kind, addresses, ready);
    }
    Ok(made)
}
