//! The manifest: what each variant answers, requires, and how its launches are filled. See `docs/bundle.md`.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::dtype::DType;
use crate::error::BundleError;

const SCHEMA: &str = "flashcore.bundle/1";

/// Everything a bundle says about its machine code.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Format of this manifest.
    pub schema: String,
    /// Architecture of the code: `sm_90a`, or `compute_80` for PTX.
    pub arch: String,
    /// What compiled it.
    pub compiler: Compiler,
    /// The variants, in no particular order.
    pub variants: Vec<Variant>,
}

/// Compiler versions.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compiler {
    /// Triton.
    pub triton: String,
    /// The assembler.
    pub ptxas: String,
}

/// One way to answer an operation.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// Unique in the bundle.
    pub name: String,
    /// `attention_forward`.
    pub op: String,
    /// The kernel family, `portable` or `hopper`.
    pub family: String,
    /// Among the variants that qualify, the highest wins.
    pub priority: i32,
    /// The requests it answers.
    pub when: When,
    /// What the code takes for granted.
    pub requires: Requires,
    /// Rows per step.
    pub tile: Tile,
    /// Parts that the keys of one query tile are at most split into; 1 for a kernel that does not split them.
    pub max_key_splits: u32,
    /// Tensors whose contents are secret: what the audit taints.
    pub secret: Vec<Quantity>,
    /// Scratch memory of one call.
    pub workspace: Vec<Workspace>,
    /// What runs, in order.
    pub launches: Vec<Launch>,
}

/// The requests a variant answers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct When {
    /// Type of query, key, value and output.
    pub dtype: DType,
    /// True head_dim of query and key, inclusive.
    pub head_dim_qk: (u32, u32),
    /// True head_dim of value and output, inclusive.
    pub head_dim_v: (u32, u32),
    /// Whether it answers bands (causal, windows) too.
    pub band: bool,
    /// The kind of mask it takes; it takes no other.
    pub attn_mask: MaskKind,
    /// Where it was measured to be the best choice.
    pub limits: Limits,
}

/// The sizes a variant is for; empty means all.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Limits(pub Vec<Limit>);

/// An inclusive range of a quantity.
#[derive(Debug, Clone, PartialEq)]
pub struct Limit {
    /// The quantity's name.
    pub name: &'static str,
    /// The quantity.
    pub quantity: Quantity,
    /// The smallest value.
    pub low: u64,
    /// The largest value.
    pub high: u64,
}

impl Limits {
    /// What a limit may name: what a problem and the variant's tile alone decide.
    const QUANTITIES: [(&'static str, Quantity); 10] = [
        ("batch", Quantity::Batch),
        ("num_heads_q", Quantity::NumHeadsQ),
        ("num_heads_kv", Quantity::NumHeadsKv),
        ("group", Quantity::Group),
        ("seq_len_q", Quantity::SeqLenQ),
        ("seq_len_k", Quantity::SeqLenK),
        ("head_dim_qk", Quantity::HeadDimQk),
        ("head_dim_v", Quantity::HeadDimV),
        ("tiles_query", Quantity::TilesQuery),
        ("num_tiles", Quantity::NumTiles),
    ];

    /// Adds a limit, or says what is wrong with it.
    fn add(&mut self, name: &str, (low, high): (u64, u64)) -> Result<(), String> {
        let found = Self::QUANTITIES.into_iter().find(|(known, _)| *known == name);
        let (name, quantity) = found.ok_or_else(|| format!("{name:?} cannot be limited"))?;
        if self.0.iter().any(|limit| limit.quantity == quantity) {
            return Err(format!("{name} is limited twice"));
        }
        if low > high {
            return Err(format!("{name} is limited to {low} to {high}"));
        }
        self.0.push(Limit { name, quantity, low, high });
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Limits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Ranges;

        impl<'de> Visitor<'de> for Ranges {
            type Value = Limits;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an inclusive range for each limited quantity")
            }

            // By hand because a map would quietly keep the last of two ranges for one quantity.
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Limits, A::Error> {
                let mut limits = Limits::default();
                while let Some((name, range)) = map.next_entry::<String, _>()? {
                    limits.add(&name, range).map_err(A::Error::custom)?;
                }
                Ok(limits)
            }
        }

        deserializer.deserialize_map(Ranges)
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Limit { name, low, high, .. }) in self.0.iter().enumerate() {
            write!(f, "{}{name} in {low}..={high}", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// The mask a variant takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MaskKind {
    /// No mask.
    None,
    /// One byte per element, non-zero is visible.
    Bool,
    /// Additive, f16.
    F16,
    /// Additive, bf16.
    Bf16,
    /// Additive, f32.
    F32,
}

impl MaskKind {
    /// The kind that a mask's type, or its absence, asks for; `None` when no kernel takes such a mask.
    pub fn of(dtype: Option<DType>) -> Option<Self> {
        match dtype {
            None => Some(Self::None),
            Some(DType::Bool) => Some(Self::Bool),
            Some(DType::F16) => Some(Self::F16),
            Some(DType::BF16) => Some(Self::Bf16),
            Some(DType::F32) => Some(Self::F32),
            Some(DType::F64) => None,
        }
    }
}

/// What the code takes for granted, in bytes.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Requires {
    /// Base addresses are multiples.
    pub base_align: u64,
    /// Strides of dimensions larger than 1 are multiples.
    pub stride_align: u64,
    /// Rows of head_dim elements are multiples.
    pub head_dim_align: u64,
    /// The softmax scale is > 0.
    pub positive_scale: bool,
}

/// Rows of one step, and the padded head_dim.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tile {
    /// Query rows.
    pub query: u32,
    /// Key rows.
    pub key: u32,
    /// Padded head_dim.
    pub head_dim: u32,
}

/// One scratch buffer.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workspace {
    /// Size, a product.
    pub bytes: Vec<Factor>,
}

/// One kernel launch.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// Entry point.
    pub kernel: String,
    /// Where its code is.
    pub code: Code,
    /// Hash of the sources, for rebuilding.
    pub source_sha256: String,
    /// The grid.
    pub grid: Grid,
    /// Threads per block.
    pub block_threads: u32,
    /// Blocks per cluster.
    pub cluster: u32,
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// Bytes at its start that hold tiles, where the compiler keeps variables of its own behind them; else 0.
    pub tile_bytes: u32,
    /// Registers per thread at entry.
    pub registers: u32,
    /// Bytes of local memory per thread.
    pub spill_bytes: u32,
    /// The parameter list.
    pub params: Vec<Param>,
    /// The verdict of the constant-trace audit.
    pub audit: Audit,
}

/// What the constant-trace audit said of a launch's code. Code that fails it is not bundled.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Audit {
    /// How it ended.
    pub verdict: AuditVerdict,
    /// Version of the auditor's rules.
    pub auditor: u32,
    /// Version of the disassembler.
    pub disassembler: String,
}

/// How the audit of a launch's code ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuditVerdict {
    /// There was none.
    NotRun,
    /// No control flow, address or guard of memory depends on what tensors hold.
    Pass,
    /// That holds for the code that the build's assembler makes of this PTX; a driver makes its own.
    PassAsAssembled,
}

impl fmt::Display for AuditVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotRun => "not_run",
            Self::Pass => "pass",
            Self::PassAsAssembled => "pass_as_assembled",
        })
    }
}

/// A member of the code section.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Code {
    /// `cubin` or `ptx`.
    pub kind: CodeKind,
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
    /// Its hash, lower-case hex.
    pub sha256: String,
}

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CodeKind {
    /// An ELF of machine code.
    Cubin,
    /// PTX text, compiled by the driver when it is loaded.
    Ptx,
}

/// Blocks along each axis.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grid {
    /// Along x.
    pub x: Vec<Factor>,
    /// Along y.
    pub y: Vec<Factor>,
    /// Along z.
    pub z: Vec<Factor>,
    /// For persistent kernels: x is at most this times the number of SMs.
    pub max_ctas_per_sm: Option<u32>,
}

/// A factor of a product.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Factor {
    /// A constant.
    Constant(u32),
    /// A quantity of the problem.
    Quantity(Quantity),
}

/// One parameter of a kernel.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Param {
    /// A device address.
    Ptr {
        /// Whose.
        value: Quantity,
    },
    /// A 32-bit integer.
    I32 {
        /// Which.
        value: Quantity,
    },
    /// A 64-bit integer.
    I64 {
        /// Which.
        value: Quantity,
    },
    /// A binary32.
    F32 {
        /// Which.
        value: Quantity,
    },
    /// A TMA descriptor by value.
    TensorMap {
        /// Of which tensor.
        value: Quantity,
        /// Elements per box, innermost dimension first.
        #[serde(rename = "box")]
        box_dims: [u32; 4],
        /// Swizzle span in bytes.
        swizzle: u32,
    },
    /// A hidden pointer of the compiler that it asked 0 bytes for.
    Scratch {
        /// `none`.
        value: ScratchKind,
    },
}

impl Param {
    /// Bytes in the parameter list, and their alignment there.
    pub(crate) fn size(&self) -> usize {
        match self {
            Self::I32 { .. } | Self::F32 { .. } => 4,
            Self::Ptr { .. } | Self::I64 { .. } | Self::Scratch { .. } => 8,
            Self::TensorMap { .. } => 128,
        }
    }
}

/// What a scratch pointer needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScratchKind {
    /// Nothing: null.
    None,
}

/// One of the four tensors with a shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tensor {
    /// The query.
    Q,
    /// The key.
    K,
    /// The value.
    V,
    /// The output.
    Out,
}

/// A named quantity of the problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub enum Quantity {
    /// Base address of a tensor.
    Address(Tensor),
    /// Base address of the log-sum-exp, or null.
    Lse,
    /// Base address of the mask.
    AttnMask,
    /// Base address of a scratch buffer.
    Workspace(usize),
    /// Stride of a tensor along a dimension, elements.
    Stride(Tensor, usize),
    /// Size of a tensor along a dimension.
    Shape(Tensor, usize),
    /// Stride of the mask along batch, head, query, key; elements.
    MaskStride(usize),
    /// Batch size.
    Batch,
    /// Heads of the query.
    NumHeadsQ,
    /// Heads of key and value.
    NumHeadsKv,
    /// Query heads per key/value head.
    Group,
    /// Query rows.
    SeqLenQ,
    /// Key rows.
    SeqLenK,
    /// Columns of query and key.
    HeadDimQk,
    /// Columns of value and output.
    HeadDimV,
    /// First visible key, relative to the query row.
    BandLo,
    /// Last visible key, relative to the query row.
    BandHi,
    /// Softmax scale.
    Scale,
    /// Softmax scale times log2(e).
    ScaleLog2,
    /// Query tiles per head.
    TilesQuery,
    /// Query tiles in all.
    NumTiles,
    /// Parts that the keys of one query tile are split into.
    KeySplits,
}

impl TryFrom<String> for Quantity {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        Self::parse(&name).ok_or_else(|| format!("unknown quantity {name:?}"))
    }
}

impl Quantity {
    fn parse(name: &str) -> Option<Self> {
        let simple = match name {
            "lse" => Self::Lse,
            "attn_mask" => Self::AttnMask,
            "batch" => Self::Batch,
            "num_heads_q" => Self::NumHeadsQ,
            "num_heads_kv" => Self::NumHeadsKv,
            "group" => Self::Group,
            "seq_len_q" => Self::SeqLenQ,
            "seq_len_k" => Self::SeqLenK,
            "head_dim_qk" => Self::HeadDimQk,
            "head_dim_v" => Self::HeadDimV,
            "band_lo" => Self::BandLo,
            "band_hi" => Self::BandHi,
            "scale" => Self::Scale,
            "scale_log2" => Self::ScaleLog2,
            "tiles_query" => Self::TilesQuery,
            "num_tiles" => Self::NumTiles,
            "key_splits" => Self::KeySplits,
            _ => return Self::parse_dotted(name),
        };
        Some(simple)
    }

    fn parse_dotted(name: &str) -> Option<Self> {
        const DIMS: [&str; 4] = ["batch", "head", "seq", "dim"];
        const MASK_DIMS: [&str; 4] = ["batch", "head", "query", "key"];
        let position = |dims: [&str; 4], dim: &str| dims.iter().position(|&d| d == dim);
        let parts: Vec<&str> = name.split('.').collect();
        match parts.as_slice() {
            ["workspace", index] => index.parse().ok().filter(|&i| i < 8).map(Self::Workspace),
            ["attn_mask", "stride", dim] => position(MASK_DIMS, dim).map(Self::MaskStride),
            [tensor] => Tensor::parse(tensor).map(Self::Address),
            [tensor, "stride", dim] => Some(Self::Stride(Tensor::parse(tensor)?, position(DIMS, dim)?)),
            [tensor, "shape", dim] => Some(Self::Shape(Tensor::parse(tensor)?, position(DIMS, dim)?)),
            _ => None,
        }
    }
}

impl Tensor {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "q" => Some(Self::Q),
            "k" => Some(Self::K),
            "v" => Some(Self::V),
            "out" => Some(Self::Out),
            _ => None,
        }
    }
}

impl Manifest {
    /// Parses and checks a manifest.
    ///
    /// # Errors
    /// [`BundleError::Manifest`] with what is wrong.
    pub fn parse(json: &[u8]) -> Result<Self, BundleError> {
        let fail = |detail: String| BundleError::Manifest { detail };
        let manifest: Self = serde_json::from_slice(json).map_err(|e| fail(e.to_string()))?;
        if manifest.schema != SCHEMA {
            return Err(fail(format!("schema {:?}; this runtime reads {SCHEMA:?}", manifest.schema)));
        }
        let mut names = std::collections::HashSet::new();
        for variant in &manifest.variants {
            if !names.insert(variant.name.as_str()) {
                return Err(fail(format!("{} appears twice", variant.name)));
            }
            variant.check().map_err(|detail| fail(format!("{}: {detail}", variant.name)))?;
        }
        Ok(manifest)
    }
}

impl Variant {
    fn check(&self) -> Result<(), String> {
        let requires = &self.requires;
        for align in [requires.base_align, requires.stride_align, requires.head_dim_align] {
            if !align.is_power_of_two() || align > 4096 {
                return Err(format!("alignment {align} is not a power of two up to 4096"));
            }
        }
        if [self.tile.query, self.tile.key, self.tile.head_dim].iter().any(|&t| t == 0 || t > 1 << 16) {
            return Err("a tile dimension is 0 or above 65536".into());
        }
        if !matches!(self.when.dtype, DType::F16 | DType::BF16) {
            return Err(format!("dtype {} has no kernels", self.when.dtype));
        }
        if self.max_key_splits == 0 {
            return Err("max_key_splits is 0".into());
        }
        if self.launches.is_empty() {
            return Err("no launches".into());
        }
        for factors in self.workspace.iter().map(|w| &w.bytes) {
            check_factors(factors)?;
        }
        let mut params = self.launches.iter().flat_map(|launch| &launch.params);
        let tensor_maps = params.any(|param| matches!(param, Param::TensorMap { .. }));
        if tensor_maps && (requires.base_align < 16 || requires.stride_align < 16) {
            return Err("tensor maps need addresses and strides aligned to 16 bytes".into());
        }
        self.launches.iter().try_for_each(|launch| self.check_launch(launch))
    }

    fn check_launch(&self, launch: &Launch) -> Result<(), String> {
        if !(1..=1024).contains(&launch.block_threads) || launch.cluster == 0 || launch.cluster > 16 {
            return Err(format!("{} threads per block, {} blocks per cluster", launch.block_threads, launch.cluster));
        }
        if launch.params.len() > crate::driver::MAX_PARAMS {
            return Err(format!("{} parameters", launch.params.len()));
        }
        let sizes = launch.params.iter().map(Param::size);
        if sizes.fold(0usize, |used, size| used.next_multiple_of(size) + size) > crate::driver::PARAM_BYTES {
            return Err(format!("parameters of more than {} bytes", crate::driver::PARAM_BYTES));
        }
        for factors in [&launch.grid.x, &launch.grid.y, &launch.grid.z] {
            check_factors(factors)?;
        }
        launch.params.iter().try_for_each(|param| self.check_param(param))
    }

    fn check_param(&self, param: &Param) -> Result<(), String> {
        let (wanted, value) = match param {
            Param::Ptr { value } => ("an address", value),
            Param::I32 { value } => ("a 32-bit quantity", value),
            Param::I64 { value } => ("a stride", value),
            Param::F32 { value } => ("a real quantity", value),
            Param::TensorMap { value, box_dims, swizzle } => {
                if !matches!(swizzle, 0 | 32 | 64 | 128) || box_dims.iter().any(|b| !(1..=256).contains(b)) {
                    return Err(format!("tensor map with box {box_dims:?}, swizzle {swizzle}"));
                }
                ("a tensor", value)
            }
            Param::Scratch { .. } => return Ok(()),
        };
        let fits = match (param, value) {
            (Param::Ptr { .. }, Quantity::Workspace(index)) => *index < self.workspace.len(),
            (Param::Ptr { .. }, Quantity::AttnMask) => self.when.attn_mask != MaskKind::None,
            (Param::Ptr { .. }, Quantity::Address(_) | Quantity::Lse) => true,
            (Param::TensorMap { .. }, Quantity::Address(_)) => true,
            (Param::I64 { .. }, Quantity::MaskStride(_)) => self.when.attn_mask != MaskKind::None,
            (Param::I64 { .. }, Quantity::Stride(..)) => true,
            (Param::F32 { .. }, Quantity::Scale | Quantity::ScaleLog2) => true,
            (Param::I32 { .. }, quantity) => quantity.is_i32(),
            _ => false,
        };
        if fits { Ok(()) } else { Err(format!("{value:?} is not {wanted} of this variant")) }
    }
}

impl Quantity {
    /// Whether it is passed as a 32-bit integer, and may be a factor.
    pub(crate) fn is_i32(self) -> bool {
        use Quantity::*;
        matches!(
            self,
            Shape(..)
                | Batch
                | NumHeadsQ
                | NumHeadsKv
                | Group
                | SeqLenQ
                | SeqLenK
                | HeadDimQk
                | HeadDimV
                | BandLo
                | BandHi
                | TilesQuery
                | NumTiles
                | KeySplits
        )
    }
}

fn check_factors(factors: &[Factor]) -> Result<(), String> {
    for factor in factors {
        if *factor == Factor::Constant(0) {
            return Err("a factor is 0".into());
        }
        if let Factor::Quantity(quantity) = factor
            && (!quantity.is_i32() || matches!(quantity, Quantity::BandLo | Quantity::BandHi))
        {
            return Err(format!("{quantity:?} cannot be a factor"));
        }
    }
    Ok(())
}
