//! Drawing a case's inputs: independent of each other, and the same wherever and whenever they are drawn.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use sha2::{Digest, Sha256};

use super::case::{Case, Hidden, Mask, MaskType, SpecialTensor};
use super::host::HostTensor;
use crate::attention::AttentionOptions;
use crate::dtype::DType;
use crate::error::Result;

/// Share of keys that a random mask hides.
const HIDDEN_SHARE: f64 = 0.2;

/// The inputs of one attention call, in host memory.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Query.
    pub query: HostTensor,
    /// Key.
    pub key: HostTensor,
    /// Value.
    pub value: HostTensor,
    /// Attention mask.
    pub attn_mask: Option<HostTensor>,
    /// Causal, window and scale.
    pub options: AttentionOptions,
    /// The only kernel variant that may compute; `None` leaves the choice to the subject.
    pub variant: Option<String>,
}

impl Inputs {
    /// Draws a case's inputs. They depend on the case's name and the seed alone.
    ///
    /// # Errors
    /// [`crate::Error::InvalidArgument`] when the sizes overflow.
    pub fn draw(case: &Case, seed: u64) -> Result<Self> {
        let name = case.to_string();
        let mut inputs = Self::undrawn(case)?;
        let tensors = [("query", &mut inputs.query), ("key", &mut inputs.key), ("value", &mut inputs.value)];
        for ((name_of, tensor), exponent) in tensors.into_iter().zip(case.magnitude) {
            let mut rng = generator(seed, &name, name_of);
            let factor = f64::from(exponent).exp2();
            tensor.draw(|_| (rng.sample::<f64, _>(StandardNormal) * factor) as f32);
        }
        if let (Some(tensor), Some(mask)) = (&mut inputs.attn_mask, case.attn_mask) {
            draw_mask(tensor, mask, generator(seed, &name, "attn_mask"));
        }
        if let Some(special) = case.special {
            let tensor = match special.tensor {
                SpecialTensor::Query => &mut inputs.query,
                SpecialTensor::Key => &mut inputs.key,
                SpecialTensor::Value => &mut inputs.value,
            };
            tensor.set([0, 0, special.key, tensor.layout().shape[3] / 2], special.value.as_f32());
        }
        Ok(inputs)
    }

    /// A case's inputs before they are drawn: all poison.
    pub(super) fn undrawn(case: &Case) -> Result<Self> {
        let shapes = case.shapes();
        let tensor = |i: usize| HostTensor::input(case.dtype, shapes[i], case.memory[i]);
        let mask = |mask: Mask| HostTensor::input(mask.kind.dtype(case.dtype), case.mask_shape(mask), mask.memory);
        Ok(Self {
            query: tensor(0)?,
            key: tensor(1)?,
            value: tensor(2)?,
            attn_mask: case.attn_mask.map(mask).transpose()?,
            options: case.options,
            variant: None,
        })
    }

    /// Poisoned outputs for a case: the attention's, and its log-sum-exp where the case asks for it.
    ///
    /// # Errors
    /// As [`Inputs::draw`].
    pub fn outputs(case: &Case) -> Result<(HostTensor, Option<HostTensor>)> {
        let [.., memory] = case.memory;
        let out = HostTensor::output(case.dtype, case.shapes()[3], memory)?;
        let rows = [case.batch, case.num_heads_q, case.seq_len_q, 1];
        let lse_memory = super::case::Memory { offset: memory.offset, ..Default::default() };
        let lse = case.lse.then(|| HostTensor::output(DType::F32, rows, lse_memory)).transpose()?;
        Ok((out, lse))
    }
}

fn draw_mask(tensor: &mut HostTensor, mask: Mask, mut rng: ChaCha8Rng) {
    let (visible, hidden) = match mask.kind {
        MaskType::Bool => (None, 0.0),
        MaskType::Query | MaskType::F32 => (Some(2.0), f32::NEG_INFINITY),
    };
    tensor.draw(|[_, _, i, _]| {
        let hides_row = match mask.hidden {
            Hidden::None => false,
            Hidden::Some => i % 5 == 2,
            Hidden::All => true,
        };
        let hides_key = rng.random_bool(HIDDEN_SHARE);
        let bias = visible.map_or(1.0, |spread: f32| spread * rng.sample::<f32, _>(StandardNormal));
        if hides_row || hides_key { hidden } else { bias }
    });
}

/// A generator for one tensor of one case.
pub(super) fn generator(seed: u64, case: &str, tensor: &str) -> ChaCha8Rng {
    ChaCha8Rng::from_seed(Sha256::digest(format!("{seed}/{case}/{tensor}")).into())
}
