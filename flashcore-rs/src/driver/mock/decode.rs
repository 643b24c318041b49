//! From a launch's arguments back to the problem that they stand for.
//!
//! The inverse of `attention/plan.rs`, written from `docs/bundle.md` and not from the planner, so that one checks the
//! other. Quantities that a kernel is not told (a head_dim compiled in, a batch only the grid knows) are worked out.

use std::collections::HashMap;

use super::memory::Span;
use crate::attention::{Band, MaskLayout, Problem};
use crate::bundle::manifest::{Factor, Launch, MaskKind, Param, Quantity, Tensor, Variant};
use crate::driver::{LaunchRequest, TensorMap, TensorMapSpec};
use crate::dtype::DType;
use crate::tensor::Layout;

/// One decoded argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Argument {
    /// An address.
    Pointer(u64),
    /// A number of 32 or 64 bits.
    Integer(i64),
    /// A binary32.
    Real(f32),
    /// A TMA descriptor.
    TensorMap(TensorMapSpec),
    /// A hidden pointer.
    Scratch(u64),
}

/// The arguments of one launch by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Arguments {
    values: Vec<(Option<Quantity>, Argument)>,
}

impl Arguments {
    /// The argument that passes a quantity, by its name in the manifest.
    pub fn get(&self, name: &str) -> Option<Argument> {
        let wanted = Quantity::try_from(name.to_owned()).ok()?;
        self.find(wanted)
    }

    /// All arguments, in order.
    pub fn iter(&self) -> impl Iterator<Item = Argument> {
        self.values.iter().map(|(_, argument)| *argument)
    }

    /// These, then those of a later launch.
    pub(super) fn and(mut self, later: &Self) -> Self {
        self.values.extend_from_slice(&later.values);
        self
    }

    /// The address of the first scratch memory, which no two calls share.
    pub(super) fn scratch(&self) -> Option<u64> {
        self.named().find_map(|named| match named {
            (Quantity::Workspace(_), Argument::Pointer(address)) => Some(address),
            _ => None,
        })
    }

    /// The arguments that have names.
    pub(super) fn named(&self) -> impl Iterator<Item = (Quantity, Argument)> {
        self.values.iter().filter_map(|(quantity, argument)| Some(((*quantity)?, *argument)))
    }

    fn find(&self, wanted: Quantity) -> Option<Argument> {
        self.values.iter().find(|(quantity, _)| *quantity == Some(wanted)).map(|(_, argument)| *argument)
    }

    fn integer(&self, wanted: Quantity) -> Option<i64> {
        match self.find(wanted) {
            Some(Argument::Integer(value)) => Some(value),
            _ => None,
        }
    }

    /// Reads a parameter block in the order of the manifest.
    pub(super) fn read(launch: &Launch, request: &LaunchRequest<'_>) -> Result<Self, String> {
        if launch.params.len() != request.params.count() {
            return Err(format!("{} arguments for {} parameters", request.params.count(), launch.params.len()));
        }
        let values = launch.params.iter().enumerate().map(|(index, param)| {
            let bytes = request.params.get(index);
            let wrong = || format!("parameter {index} has {} bytes", bytes.len());
            let long = || bytes.try_into().map(u64::from_ne_bytes).map_err(|_| wrong());
            let short = || bytes.try_into().map(i32::from_ne_bytes).map_err(|_| wrong());
            Ok(match param {
                Param::Ptr { value } => (Some(*value), Argument::Pointer(long()?)),
                Param::I64 { value } => (Some(*value), Argument::Integer(long()? as i64)),
                Param::I32 { value } => (Some(*value), Argument::Integer(short()?.into())),
                Param::F32 { value } => (Some(*value), Argument::Real(f32::from_bits(short()? as u32))),
                Param::Scratch { .. } => (None, Argument::Scratch(long()?)),
                Param::TensorMap { value, .. } => {
                    let map = decode_tensor_map(bytes).ok_or_else(|| format!("parameter {index} is no tensor map"))?;
                    (Some(*value), Argument::TensorMap(map))
                }
            })
        });
        values.collect::<Result<_, _>>().map(|values| Self { values })
    }
}

const MAGIC: [u8; 8] = *b"MOCK TMA";

/// A descriptor that [`decode_tensor_map`] reads back.
pub(super) fn encode_tensor_map(spec: &TensorMapSpec) -> TensorMap {
    let mut map = TensorMap([0; 128]);
    let words = [u64::from(spec.dtype == DType::BF16) | u64::from(spec.swizzle) << 8, spec.address]
        .into_iter()
        .chain(spec.dims)
        .chain(spec.strides)
        .chain(spec.box_dims.map(u64::from));
    map.0[..8].copy_from_slice(&MAGIC);
    for (slot, word) in map.0[8..].chunks_exact_mut(8).zip(words) {
        slot.copy_from_slice(&word.to_le_bytes());
    }
    map
}

/// Moves a descriptor; false if it is none.
pub(super) fn move_tensor_map(bytes: &mut [u8], address: u64) -> bool {
    let Some(spec) = decode_tensor_map(bytes) else { return false };
    bytes.copy_from_slice(&encode_tensor_map(&TensorMapSpec { address, ..spec }).0);
    true
}

fn decode_tensor_map(bytes: &[u8]) -> Option<TensorMapSpec> {
    let bytes: &[u8; 128] = bytes.try_into().ok()?;
    if bytes[..8] != MAGIC {
        return None;
    }
    let mut words = [0u64; 15];
    for (word, slot) in words.iter_mut().zip(bytes[8..].chunks_exact(8)) {
        *word = u64::from_le_bytes(slot.try_into().ok()?);
    }
    let dtype = if words[0] & 1 == 1 { DType::BF16 } else { DType::F16 };
    Some(TensorMapSpec {
        dtype,
        address: words[1],
        dims: [words[2], words[3], words[4], words[5]],
        strides: [words[6], words[7], words[8]],
        box_dims: [words[9] as u32, words[10] as u32, words[11] as u32, words[12] as u32],
        swizzle: (words[0] >> 8) as u32,
    })
}

/// Memory of one operand, and whether it is written.
pub(super) type Operand = (&'static str, Span, bool);

/// A launch as the operation it performs.
#[derive(Debug)]
pub(super) struct Decoded {
    pub(super) problem: Problem,
    pub(super) query: Span,
    pub(super) key: Span,
    pub(super) value: Span,
    pub(super) attn_mask: Option<Span>,
    pub(super) out: Span,
    pub(super) lse: Option<Span>,
}

impl Decoded {
    /// What the launch touches; nothing for empty tensors.
    pub(super) fn operands(&self) -> Vec<Operand> {
        let all = [
            Some(("query", self.query, false)),
            Some(("key", self.key, false)),
            Some(("value", self.value, false)),
            self.attn_mask.map(|span| ("attn_mask", span, false)),
            Some(("out", self.out, true)),
            self.lse.map(|span| ("lse", span, true)),
        ];
        all.into_iter().flatten().filter(|(_, span, _)| span.bytes > 0).collect()
    }
}

/// Works out the problem; an error says what contradicts or is missing.
pub(super) fn decode(
    variant: &Variant,
    launch: &Launch,
    grid: [u32; 3],
    arguments: &Arguments,
) -> Result<Decoded, String> {
    let mut sizes = Sizes::default();
    sizes.gather(variant, arguments)?;
    sizes.solve(variant, launch, grid)?;
    let when = &variant.when;
    let size = |quantity| usize::try_from(sizes.get(quantity)?).map_err(|e| format!("{quantity:?}: {e}"));
    let mut problem = Problem {
        dtype: when.dtype,
        batch: size(Quantity::Batch)?,
        num_heads_q: size(Quantity::NumHeadsQ)?,
        num_heads_kv: size(Quantity::NumHeadsKv)?,
        seq_len_q: size(Quantity::SeqLenQ)?,
        seq_len_k: size(Quantity::SeqLenK)?,
        head_dim_qk: size(Quantity::HeadDimQk)?,
        head_dim_v: size(Quantity::HeadDimV)?,
        q_strides: strides(Tensor::Q, arguments)?,
        k_strides: strides(Tensor::K, arguments)?,
        v_strides: strides(Tensor::V, arguments)?,
        out_strides: strides(Tensor::Out, arguments)?,
        attn_mask: mask(when.attn_mask, arguments)?,
        band: None,
        scale_bits: scale(arguments)?.to_bits(),
        lse: matches!(arguments.find(Quantity::Lse), Some(Argument::Pointer(1..))),
    };
    if when.band {
        let bound = |quantity| {
            let value = arguments.integer(quantity).ok_or("a banded kernel without its band")?;
            i32::try_from(value).map_err(|e| e.to_string())
        };
        problem.band = Some(Band { lo: bound(Quantity::BandLo)?, hi: bound(Quantity::BandHi)? });
    }
    let span = |tensor: Tensor, layout: Layout| {
        let address = match arguments.find(Quantity::Address(tensor)) {
            Some(Argument::Pointer(address)) => address,
            Some(Argument::TensorMap(map)) => map.address,
            _ => return Err(format!("no address of {tensor:?}")),
        };
        Ok(Span { address, bytes: layout.extent() as u64 * layout.dtype.size() as u64 })
    };
    let rows = [problem.batch, problem.num_heads_q, problem.seq_len_q];
    let lse = match arguments.find(Quantity::Lse) {
        Some(Argument::Pointer(address @ 1..)) => {
            Some(Span { address, bytes: rows.iter().product::<usize>() as u64 * 4 })
        }
        _ => None,
    };
    let attn_mask = match (problem.attn_mask, arguments.find(Quantity::AttnMask)) {
        (Some(MaskLayout { dtype, strides }), Some(Argument::Pointer(address))) => {
            let shape = [rows[0], rows[1], rows[2], problem.seq_len_k];
            let layout = Layout { dtype, shape, strides };
            Some(Span { address, bytes: layout.extent() as u64 * dtype.size() as u64 })
        }
        (Some(_), _) => return Err("a mask without an address".into()),
        (None, _) => None,
    };
    Ok(Decoded {
        query: span(Tensor::Q, problem.q_layout())?,
        key: span(Tensor::K, problem.k_layout())?,
        value: span(Tensor::V, problem.v_layout())?,
        out: span(Tensor::Out, problem.out_layout())?,
        attn_mask,
        lse,
        problem,
    })
}

#[derive(Default)]
struct Sizes(HashMap<Quantity, i64>);

impl Sizes {
    fn get(&self, quantity: Quantity) -> Result<i64, String> {
        self.0.get(&quantity).copied().ok_or_else(|| format!("{quantity:?} cannot be worked out"))
    }

    /// Notes a size under its plainest name; a second value must agree with the first.
    fn note(&mut self, quantity: Quantity, value: i64) -> Result<(), String> {
        use Quantity::*;
        let name = match quantity {
            Shape(_, 0) => Batch,
            Shape(Tensor::Q | Tensor::Out, 1) => NumHeadsQ,
            Shape(_, 1) => NumHeadsKv,
            Shape(Tensor::Q | Tensor::Out, 2) => SeqLenQ,
            Shape(_, 2) => SeqLenK,
            Shape(Tensor::Q | Tensor::K, _) => HeadDimQk,
            Shape(..) => HeadDimV,
            other => other,
        };
        match self.0.insert(name, value) {
            Some(old) if old != value => Err(format!("{name:?} is given as {old} and as {value}")),
            _ => Ok(()),
        }
    }

    fn gather(&mut self, variant: &Variant, arguments: &Arguments) -> Result<(), String> {
        for (quantity, argument) in &arguments.values {
            match (quantity, argument) {
                (Some(Quantity::BandLo | Quantity::BandHi | Quantity::Stride(..) | Quantity::MaskStride(_)), _) => {}
                (Some(quantity), Argument::Integer(value)) => self.note(*quantity, *value)?,
                (Some(Quantity::Address(tensor)), Argument::TensorMap(map)) => {
                    if map.dtype != variant.when.dtype {
                        return Err(format!("a tensor map of {}", map.dtype));
                    }
                    for (dim, size) in map.dims.into_iter().rev().enumerate() {
                        self.note(Quantity::Shape(*tensor, dim), size as i64)?;
                    }
                }
                (None, Argument::Scratch(1..)) => return Err("a scratch pointer is not null".into()),
                _ => {}
            }
        }
        let when = &variant.when;
        for (quantity, (low, high)) in [(Quantity::HeadDimQk, when.head_dim_qk), (Quantity::HeadDimV, when.head_dim_v)]
        {
            if low == high {
                self.note(quantity, low.into())?;
            }
        }
        Ok(())
    }

    /// Fills in what follows from the rest.
    fn solve(&mut self, variant: &Variant, launch: &Launch, grid: [u32; 3]) -> Result<(), String> {
        let get = |sizes: &Self, quantity| sizes.0.get(&quantity).copied();
        if let (Some(heads), Some(group @ 1..)) = (get(self, Quantity::NumHeadsQ), get(self, Quantity::Group)) {
            self.note(Quantity::NumHeadsKv, heads / group)?;
        }
        if let Some(rows) = get(self, Quantity::SeqLenQ) {
            self.note(Quantity::TilesQuery, rows.unsigned_abs().div_ceil(variant.tile.query.into()) as i64)?;
        }
        for (factors, blocks) in [&launch.grid.x, &launch.grid.y, &launch.grid.z].into_iter().zip(grid) {
            if launch.grid.max_ctas_per_sm.is_some() {
                break;
            }
            let mut known = 1i64;
            let mut unknown = Vec::new();
            for factor in factors {
                match factor {
                    Factor::Constant(value) => known *= i64::from(*value),
                    Factor::Quantity(quantity) => match get(self, *quantity) {
                        Some(value) => known *= value,
                        None => unknown.push(*quantity),
                    },
                }
            }
            match unknown.as_slice() {
                [] if known != i64::from(blocks) => return Err(format!("{blocks} blocks instead of {known}")),
                [quantity] if known > 0 && i64::from(blocks) % known == 0 => {
                    self.note(*quantity, i64::from(blocks) / known)?;
                }
                _ => {}
            }
        }
        let tiles = [Quantity::TilesQuery, Quantity::NumHeadsQ].map(|quantity| get(self, quantity));
        if let (Some(all), [Some(tiles @ 1..), Some(heads @ 1..)]) = (get(self, Quantity::NumTiles), tiles) {
            self.note(Quantity::Batch, all / (tiles * heads))?;
        }
        Ok(())
    }
}

fn strides(tensor: Tensor, arguments: &Arguments) -> Result<[i64; 4], String> {
    let mut strides = match arguments.find(Quantity::Address(tensor)) {
        Some(Argument::TensorMap(map)) => {
            let elements = map.strides.map(|bytes| (bytes / map.dtype.size() as u64) as i64);
            [Some(elements[2]), Some(elements[1]), Some(elements[0]), Some(1)]
        }
        _ => [None, None, None, Some(1)],
    };
    for (dim, stride) in strides.iter_mut().enumerate() {
        match (arguments.integer(Quantity::Stride(tensor, dim)), &stride) {
            (Some(given), Some(known)) if given != *known => {
                return Err(format!("stride {dim} of {tensor:?} is given as {known} and as {given}"));
            }
            (Some(given), _) => *stride = Some(given),
            (None, _) => {}
        }
    }
    match strides {
        [Some(batch), Some(head), Some(seq), Some(dim)] => Ok([batch, head, seq, dim]),
        _ => Err(format!("no strides of {tensor:?}")),
    }
}

fn mask(kind: MaskKind, arguments: &Arguments) -> Result<Option<MaskLayout>, String> {
    let dtype = match kind {
        MaskKind::None => return Ok(None),
        MaskKind::Bool => DType::Bool,
        MaskKind::F16 => DType::F16,
        MaskKind::Bf16 => DType::BF16,
        MaskKind::F32 => DType::F32,
    };
    let mut strides = [0; 4];
    for (dim, stride) in strides.iter_mut().enumerate() {
        *stride = arguments.integer(Quantity::MaskStride(dim)).ok_or("a mask without its strides")?;
    }
    Ok(Some(MaskLayout { dtype, strides }))
}

fn scale(arguments: &Arguments) -> Result<f32, String> {
    match (arguments.find(Quantity::Scale), arguments.find(Quantity::ScaleLog2)) {
        (Some(Argument::Real(scale)), _) => Ok(scale),
        (None, Some(Argument::Real(scale))) => Ok(scale / std::f32::consts::LOG2_E),
        _ => Err("no scale".into()),
    }
}
