//! What is validated: something that computes attention.

use serde::Serialize;

use super::case::Case;
use super::correct::problem_of;
use super::host::HostTensor;
use super::inputs::Inputs;
use crate::attention::recent::last_planned;
use crate::attention::{BaseAlign, capable, last_plan};
use crate::error::Result;
use crate::runtime::Runtime;
use crate::tensor::{Device, TensorView, TensorViewMut};

/// Something that computes attention: a [`Runtime`], or in tests of the harness a wrong one.
pub trait Subject {
    /// Computes from inputs, and writes outputs that are given as poison. A subject that has several variants runs the
    /// one that the inputs name, if they name one, or refuses.
    ///
    /// # Errors
    /// Whatever keeps it from computing.
    fn compute(&self, inputs: &Inputs, out: &mut HostTensor, lse: Option<&mut HostTensor>) -> Result<Ran>;

    /// The variants that compute a case when the inputs name them; none where there is nothing to choose from.
    ///
    /// # Errors
    /// As [`Inputs::draw`].
    fn variants(&self, _case: &Case) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

/// What computed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Ran {
    /// The kernel variant.
    pub variant: String,
    /// Query and key rows that it takes at a time, and in which a NaN of a value may spread; `None` when it may not.
    pub tile: Option<[usize; 2]>,
    /// Parts that it splits the keys of a tile into.
    pub key_splits: u32,
}

impl Subject for Runtime {
    fn compute(&self, inputs: &Inputs, out: &mut HostTensor, lse: Option<&mut HostTensor>) -> Result<Ran> {
        match self.device() {
            Device::Cpu => run_on_host(self, inputs, out, lse),
            Device::Cuda(_) => run_on_device(self, inputs, out, lse),
        }
    }

    fn variants(&self, case: &Case) -> Result<Vec<String>> {
        let Some(manifest) = self.manifest() else { return Ok(Vec::new()) };
        let (out, lse) = Inputs::outputs(case)?;
        let problem = problem_of(&Inputs::undrawn(case)?, &out, lse.is_some())?;
        if problem.is_empty() {
            return Ok(Vec::new());
        }
        // Memory on a device starts at a multiple of 256 bytes, and so does a tensor in it but for its offset.
        let align = BaseAlign::of(case.memory.map(|memory| (memory.offset * case.dtype.size()) as u64));
        Ok(capable(manifest, &problem, align).into_iter().map(|variant| variant.name.clone()).collect())
    }
}

fn run_on_host(runtime: &Runtime, inputs: &Inputs, out: &mut HostTensor, lse: Option<&mut HostTensor>) -> Result<Ran> {
    let views = [inputs.query.view()?, inputs.key.view()?, inputs.value.view()?];
    let mask = inputs.attn_mask.as_ref().map(HostTensor::view).transpose()?;
    let mut lse = lse.map(HostTensor::view_mut).transpose()?;
    call(runtime, views, mask, inputs, &mut out.view_mut()?, lse.as_mut())
}

fn run_on_device(
    runtime: &Runtime,
    inputs: &Inputs,
    out: &mut HostTensor,
    mut lse: Option<&mut HostTensor>,
) -> Result<Ran> {
    let stream = runtime.stream()?;
    let upload = |tensor: &HostTensor| tensor.upload(stream);
    let [query, key, value] = [upload(&inputs.query)?, upload(&inputs.key)?, upload(&inputs.value)?];
    let mask = inputs.attn_mask.as_ref().map(upload).transpose()?;
    let mut out_buffer = upload(out)?;
    let mut lse_buffer = lse.as_deref().map(upload).transpose()?;
    let views = [inputs.query.on_device(&query)?, inputs.key.on_device(&key)?, inputs.value.on_device(&value)?];
    let mask = match (&inputs.attn_mask, &mask) {
        (Some(tensor), Some(buffer)) => Some(tensor.on_device(buffer)?),
        _ => None,
    };
    let mut lse_view = match (lse.as_deref(), &mut lse_buffer) {
        (Some(tensor), Some(buffer)) => Some(tensor.on_device_mut(buffer)?),
        _ => None,
    };
    let mut out_view = out.on_device_mut(&mut out_buffer)?;
    let ran = call(runtime, views, mask, inputs, &mut out_view, lse_view.as_mut())?;
    out.download(&out_buffer)?;
    if let (Some(tensor), Some(buffer)) = (&mut lse, &lse_buffer) {
        tensor.download(buffer)?;
    }
    Ok(ran)
}

fn call(
    runtime: &Runtime,
    [query, key, value]: [TensorView<'_>; 3],
    attn_mask: Option<TensorView<'_>>,
    inputs: &Inputs,
    out: &mut TensorViewMut<'_>,
    lse: Option<&mut TensorViewMut<'_>>,
) -> Result<Ran> {
    let mut call = runtime.attention(&query, &key, &value).options(inputs.options);
    if let Some(name) = &inputs.variant {
        call = call.variant(name)?;
    }
    if let Some(mask) = attn_mask {
        call = call.attn_mask(mask);
    }
    match lse {
        Some(lse) => call.run_with_lse(out, lse)?,
        None => call.run(out)?,
    }
    Ok(ran_last(runtime))
}

/// What this thread's last call ran.
fn ran_last(runtime: &Runtime) -> Ran {
    let variant = last_plan().map_or_else(|| "none".into(), |plan| plan.kernel);
    let variants = runtime.manifest().map_or(&[][..], |manifest| &manifest.variants);
    let tile = variants.iter().find(|known| known.name == variant).map(|known| &known.tile);
    Ran {
        variant,
        tile: tile.map(|tile| [tile.query as usize, tile.key as usize]),
        key_splits: last_planned().map_or(1, |plan| plan.key_splits()),
    }
}
