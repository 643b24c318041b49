//! Which variant answers a problem, and why not each of the others.

use std::fmt;

use super::plan::count;
use super::problem::Problem;
use crate::bundle::manifest::{Limit, Manifest, MaskKind, Param, Variant};
use crate::dtype::DType;
use crate::error::Unsupported;
use crate::tensor::Layout;

/// A power of two that divides the base addresses of query, key, value and output; at most 256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BaseAlign(pub(crate) u16);

impl BaseAlign {
    pub(crate) const MAX: Self = Self(256);

    pub(crate) fn of(addresses: [u64; 4]) -> Self {
        let all = addresses.iter().fold(u64::from(Self::MAX.0), |bits, address| bits | address);
        Self(1 << all.trailing_zeros().min(8))
    }
}

/// The one reason why a variant does not answer a problem.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Rejection {
    /// It computes in another type.
    DType {
        /// The variant's type.
        takes: DType,
    },
    /// The head_dim is outside its range.
    HeadDim {
        /// The head_dim that does not fit.
        asked: usize,
        /// The largest that does.
        up_to: u32,
    },
    /// It computes every score; the call hides some.
    Band,
    /// It takes another kind of mask, or none.
    AttnMask {
        /// The kind it takes.
        takes: MaskKind,
    },
    /// A base address is not aligned enough.
    BaseAlign {
        /// Bytes it needs.
        needs: u64,
        /// Bytes the addresses have.
        found: u64,
    },
    /// A stride is not a multiple of what it needs.
    StrideAlign {
        /// Which tensor.
        tensor: &'static str,
        /// The stride in bytes.
        found: i64,
        /// Bytes it must be a multiple of.
        needs: u64,
    },
    /// A row is not a multiple of what it needs.
    HeadDimAlign {
        /// Bytes in the row.
        found: u64,
        /// Bytes it must be a multiple of.
        needs: u64,
    },
    /// The softmax scale must be positive.
    Scale,
    /// Another variant was measured to be faster for such sizes.
    Limit {
        /// The quantity by its name in the manifest.
        quantity: &'static str,
        /// What the call has.
        found: u64,
        /// The smallest value that the variant is for.
        low: u64,
        /// The largest.
        high: u64,
    },
    /// TMA cannot address a tensor.
    TensorMap {
        /// Which tensor.
        tensor: &'static str,
        /// What it cannot do.
        why: &'static str,
    },
    /// It qualifies, and another variant is preferred.
    Outranked {
        /// The variant chosen.
        by: String,
    },
    /// The call asked for another variant by name.
    NotAsked {
        /// The variant asked for.
        pinned: String,
    },
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DType { takes } => write!(f, "computes in {takes}"),
            Self::HeadDim { asked, up_to } => write!(f, "head_dim {asked}; takes up to {up_to}"),
            Self::Band => write!(f, "has no causal or window masking"),
            Self::AttnMask { takes: MaskKind::None } => write!(f, "takes no attn_mask"),
            Self::AttnMask { takes } => write!(f, "takes a {takes:?} attn_mask"),
            Self::BaseAlign { needs, found } => write!(f, "needs addresses aligned to {needs} bytes, found {found}"),
            Self::StrideAlign { tensor, found, needs } => {
                write!(f, "{tensor} has a stride of {found} bytes; needs multiples of {needs}")
            }
            Self::HeadDimAlign { found, needs } => write!(f, "rows of {found} bytes; needs multiples of {needs}"),
            Self::Scale => write!(f, "needs a positive scale"),
            Self::Limit { quantity, found, low, high } => {
                write!(f, "{quantity} is {found}; this kernel was tuned for {low} to {high}")
            }
            Self::TensorMap { tensor, why } => write!(f, "TMA cannot address {tensor}: {why}"),
            Self::Outranked { by } => write!(f, "qualifies; {by} is preferred"),
            Self::NotAsked { pinned } => write!(f, "the call asked for {pinned}"),
        }
    }
}

/// Which kernel answers a call and why not each of the others.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// The call in words.
    pub request: String,
    /// The architecture of the bundle that was searched; `cpu` for the CPU backend.
    pub arch: String,
    /// The variant that would run; `None` when none qualifies.
    pub chosen: Option<String>,
    /// The sizes for which the chosen variant was measured to be the best; `None` when it is for all sizes.
    pub rule: Option<String>,
    /// Every other candidate, with one reason.
    pub rejected: Vec<(String, Rejection)>,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} on {}", self.request, self.arch)?;
        match (&self.chosen, &self.rule) {
            (Some(name), Some(rule)) => writeln!(f, "  runs {name} ({rule})")?,
            (Some(name), None) => writeln!(f, "  runs {name}")?,
            (None, _) => writeln!(f, "  no kernel qualifies")?,
        }
        for (name, reason) in &self.rejected {
            writeln!(f, "  not {name}: {reason}")?;
        }
        Ok(())
    }
}

/// The variant that answers `problem`: the one at index `pin` of the manifest, or the preferred one. A pinned variant
/// answers whatever it can, also outside the sizes that it was tuned for.
pub(crate) fn choose<'m>(
    manifest: &'m Manifest,
    problem: &Problem,
    align: BaseAlign,
    pin: Option<u32>,
) -> Result<&'m Variant, Box<Unsupported>> {
    let Some(variant) = pin.and_then(|pin| manifest.variants.get(pin as usize)) else {
        return select(manifest, problem, align);
    };
    let Some(reason) = reject_pinned(variant, problem, align) else { return Ok(variant) };
    let hint = match select(manifest, problem, align) {
        Ok(other) => format!("ask for no variant by name; {} answers it", other.name),
        Err(_) => hint(problem),
    };
    Err(Box::new(Unsupported { request: problem.to_string(), rejected: vec![(variant.name.clone(), reason)], hint }))
}

/// The variants that answer `problem` when they are pinned.
#[cfg(feature = "validate")]
pub(crate) fn capable<'m>(manifest: &'m Manifest, problem: &Problem, align: BaseAlign) -> Vec<&'m Variant> {
    manifest.variants.iter().filter(|variant| reject_pinned(variant, problem, align).is_none()).collect()
}

/// The preferred variant that answers `problem`.
pub(crate) fn select<'m>(
    manifest: &'m Manifest,
    problem: &Problem,
    align: BaseAlign,
) -> Result<&'m Variant, Box<Unsupported>> {
    let qualifies = |variant: &&Variant| reject(variant, problem, align).is_none();
    manifest
        .variants
        .iter()
        .filter(qualifies)
        .max_by(|a, b| rank(a).cmp(&rank(b)))
        .ok_or_else(|| Box::new(unsupported(manifest, problem, align)))
}

/// Higher priority first, then the name that sorts first.
fn rank(variant: &Variant) -> (i32, std::cmp::Reverse<&str>) {
    (variant.priority, std::cmp::Reverse(variant.name.as_str()))
}

/// The whole decision.
pub(crate) fn explain(manifest: &Manifest, problem: &Problem, align: BaseAlign, pin: Option<u32>) -> Explanation {
    let variant = choose(manifest, problem, align, pin).ok();
    let pinned = pin.and_then(|pin| manifest.variants.get(pin as usize));
    let chosen = variant.map(|variant| variant.name.clone());
    let limits = variant.map(|variant| &variant.when.limits).filter(|limits| !limits.0.is_empty());
    let rejected = manifest.variants.iter().filter(|v| chosen.as_ref() != Some(&v.name)).map(|variant| {
        let reason = match pinned {
            Some(pinned) if pinned.name == variant.name => reject_pinned(variant, problem, align),
            Some(pinned) => Some(Rejection::NotAsked { pinned: pinned.name.clone() }),
            None => reject(variant, problem, align),
        };
        let reason = reason.unwrap_or_else(|| Rejection::Outranked { by: chosen.clone().unwrap_or_default() });
        (variant.name.clone(), reason)
    });
    Explanation {
        request: problem.to_string(),
        arch: manifest.arch.clone(),
        chosen: chosen.clone(),
        rule: limits.map(ToString::to_string),
        rejected: rejected.collect(),
    }
}

fn unsupported(manifest: &Manifest, problem: &Problem, align: BaseAlign) -> Unsupported {
    let rejected: Vec<_> = manifest
        .variants
        .iter()
        .filter_map(|variant| Some((variant.name.clone(), reject(variant, problem, align)?)))
        .collect();
    Unsupported { request: problem.to_string(), hint: hint(problem), rejected }
}

fn hint(problem: &Problem) -> String {
    match problem.dtype {
        DType::F32 | DType::F64 => "GPU kernels compute in f16 and bf16: cast, or use the CPU backend".into(),
        _ => match problem.attn_mask {
            Some(mask) if MaskKind::of(Some(mask.dtype)).is_none() => "cast attn_mask to f32".into(),
            _ => "make query, key, value and out contiguous".into(),
        },
    }
}

/// Why `variant` does not answer `problem`; `None` when it does.
fn reject(variant: &Variant, problem: &Problem, align: BaseAlign) -> Option<Rejection> {
    let limits = || variant.when.limits.0.iter().find_map(|limit| reject_size(variant, problem, limit));
    reject_request(variant, problem).or_else(limits).or_else(|| reject_layout(variant, problem, align))
}

/// Why `variant` cannot answer `problem`, whatever sizes it was tuned for; `None` when it can.
fn reject_pinned(variant: &Variant, problem: &Problem, align: BaseAlign) -> Option<Rejection> {
    reject_request(variant, problem).or_else(|| reject_layout(variant, problem, align))
}

fn reject_request(variant: &Variant, problem: &Problem) -> Option<Rejection> {
    let when = &variant.when;
    if when.dtype != problem.dtype {
        return Some(Rejection::DType { takes: when.dtype });
    }
    let mask = problem.attn_mask.map(|mask| mask.dtype);
    if MaskKind::of(mask) != Some(when.attn_mask) {
        return Some(Rejection::AttnMask { takes: when.attn_mask });
    }
    for (asked, (low, high)) in [(problem.head_dim_qk, when.head_dim_qk), (problem.head_dim_v, when.head_dim_v)] {
        if asked < low as usize || asked > high as usize {
            return Some(Rejection::HeadDim { asked, up_to: high });
        }
    }
    if problem.band.is_some() && !when.band {
        return Some(Rejection::Band);
    }
    (variant.requires.positive_scale && problem.scale() <= 0.0).then_some(Rejection::Scale)
}

fn reject_size(variant: &Variant, problem: &Problem, limit: &Limit) -> Option<Rejection> {
    let &Limit { name, quantity, low, high } = limit;
    let found = count(problem, &variant.tile, quantity).unsigned_abs();
    (!(low..=high).contains(&found)).then_some(Rejection::Limit { quantity: name, found, low, high })
}

fn reject_layout(variant: &Variant, problem: &Problem, align: BaseAlign) -> Option<Rejection> {
    let requires = &variant.requires;
    if u64::from(align.0) < requires.base_align {
        return Some(Rejection::BaseAlign { needs: requires.base_align, found: align.0.into() });
    }
    let size = problem.dtype.size() as u64;
    for dim in [problem.head_dim_qk, problem.head_dim_v] {
        let found = dim as u64 * size;
        if !found.is_multiple_of(requires.head_dim_align) {
            return Some(Rejection::HeadDimAlign { found, needs: requires.head_dim_align });
        }
    }
    let tensors = [
        ("query", problem.q_layout()),
        ("key", problem.k_layout()),
        ("value", problem.v_layout()),
        ("out", problem.out_layout()),
    ];
    for (tensor, layout) in &tensors {
        for stride in &layout.strides[..3] {
            let found = stride.saturating_mul(size as i64);
            if found.rem_euclid(requires.stride_align as i64) != 0 {
                return Some(Rejection::StrideAlign { tensor, found, needs: requires.stride_align });
            }
        }
    }
    uses_tensor_maps(variant).then(|| tensors.iter().find_map(|(tensor, layout)| reject_tma(tensor, layout)))?
}

fn uses_tensor_maps(variant: &Variant) -> bool {
    variant.launches.iter().flat_map(|launch| &launch.params).any(|param| matches!(param, Param::TensorMap { .. }))
}

/// The limits of `cuTensorMapEncodeTiled`.
fn reject_tma(tensor: &'static str, layout: &Layout) -> Option<Rejection> {
    const MAX_STRIDE: i64 = 1 << 40;
    let reject = |why| Some(Rejection::TensorMap { tensor, why });
    if layout.is_empty() {
        return reject("it is empty");
    }
    if layout.strides[..3].contains(&0) {
        return reject("a stride is 0");
    }
    if layout.strides[..3].iter().any(|s| s.saturating_mul(layout.dtype.size() as i64) >= MAX_STRIDE) {
        return reject("a stride is 2^40 bytes or more");
    }
    None
}
