//! From a chosen variant to launches: everything that depends only on geometry is computed once.

use super::problem::Problem;
use crate::bundle::manifest::{Factor, Grid, Launch, Param, Quantity, Tensor, Variant};
use crate::device::{DeviceContext, log_drop_error};
use crate::driver::{FunctionHandle, LaunchRequest, ParamBlock, StreamHandle, TensorMapSpec};
use crate::error::{Error, Result};
use crate::tensor::Layout;

/// The addresses of one call; 0 where there is no tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Addresses {
    pub(crate) q: u64,
    pub(crate) k: u64,
    pub(crate) v: u64,
    pub(crate) out: u64,
    pub(crate) lse: u64,
    pub(crate) attn_mask: u64,
}

impl Addresses {
    fn tensor(&self, tensor: Tensor) -> u64 {
        match tensor {
            Tensor::Q => self.q,
            Tensor::K => self.k,
            Tensor::V => self.v,
            Tensor::Out => self.out,
        }
    }
}

/// A problem bound to a kernel: launching it needs only addresses and a stream.
#[derive(Debug)]
pub struct Plan {
    variant: String,
    problem: Problem,
    launches: Vec<PlannedLaunch>,
    /// Bytes of each scratch buffer.
    workspace: Vec<usize>,
}

#[derive(Debug)]
struct PlannedLaunch {
    function: FunctionHandle,
    grid: [u32; 3],
    block_threads: u32,
    cluster: u32,
    shared_bytes: u32,
    /// Every parameter, with those that hold addresses still zero.
    params: ParamBlock,
    pointers: Vec<(usize, Quantity)>,
    tensor_maps: Vec<(usize, Tensor, TensorMapSpec)>,
}

impl Plan {
    /// Binds `problem` to `variant`, whose launches' kernels are `functions`.
    pub(crate) fn new(
        variant: &Variant,
        functions: &[FunctionHandle],
        problem: Problem,
        sm_count: u32,
    ) -> Result<Self> {
        let values = Values { problem: &problem, tile_query: variant.tile.query };
        let launches = variant
            .launches
            .iter()
            .zip(functions)
            .map(|(launch, &function)| PlannedLaunch::new(launch, function, &values, sm_count))
            .collect::<Result<_>>()?;
        let workspace = variant
            .workspace
            .iter()
            .map(|scratch| {
                let bytes = values.product(&scratch.bytes)?;
                usize::try_from(bytes).map_err(|_| Error::OutOfMemory { requested: usize::MAX })
            })
            .collect::<Result<_>>()?;
        Ok(Self { variant: variant.name.clone(), problem, launches, workspace })
    }

    /// The name of the kernel variant.
    pub fn variant(&self) -> &str {
        &self.variant
    }

    /// The problem it answers.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Queues the launches. Scratch memory is stream-ordered and belongs to this call alone, so that calls on several
    /// streams share nothing.
    pub(crate) fn launch(&self, context: &DeviceContext, stream: StreamHandle, addresses: &Addresses) -> Result<()> {
        let mut workspace = Vec::new();
        let queued = self
            .workspace
            .iter()
            .try_for_each(|&bytes| {
                workspace.push(context.driver.alloc(context.handle, bytes.max(1), stream)?);
                Ok(())
            })
            .and_then(|()| {
                self.launches.iter().try_for_each(|launch| launch.launch(context, stream, addresses, &workspace))
            });
        for address in workspace {
            log_drop_error("scratch memory", context.driver.free(context.handle, address, stream));
        }
        queued
    }
}

impl PlannedLaunch {
    fn new(launch: &Launch, function: FunctionHandle, values: &Values<'_>, sm_count: u32) -> Result<Self> {
        let mut planned = Self {
            function,
            grid: grid(&launch.grid, values, sm_count)?,
            block_threads: launch.block_threads,
            cluster: launch.cluster,
            shared_bytes: launch.shared_bytes,
            params: ParamBlock::default(),
            pointers: Vec::new(),
            tensor_maps: Vec::new(),
        };
        for param in &launch.params {
            planned.push(param, values)?;
        }
        Ok(planned)
    }

    fn push(&mut self, param: &Param, values: &Values<'_>) -> Result<()> {
        let align = param.size();
        let index = match param {
            Param::Ptr { .. } | Param::Scratch { .. } => self.params.push(&0u64.to_ne_bytes(), align),
            Param::I32 { value } => self.params.push(&values.i32(*value)?.to_ne_bytes(), align),
            Param::I64 { value } => self.params.push(&values.stride(*value).to_ne_bytes(), align),
            Param::F32 { value } => self.params.push(&values.f32(*value).to_ne_bytes(), align),
            Param::TensorMap { .. } => self.params.push(&[0; 128], align),
        };
        let index = index.ok_or_else(|| Error::invalid("kernel", "too many parameters", "2 KiB of parameters"))?;
        match param {
            Param::Ptr { value } => self.pointers.push((index, *value)),
            Param::TensorMap { value: Quantity::Address(tensor), box_dims, swizzle } => {
                let spec = tensor_map(&values.layout(*tensor), *box_dims, *swizzle);
                self.tensor_maps.push((index, *tensor, spec));
            }
            _ => {}
        }
        Ok(())
    }

    fn launch(
        &self,
        context: &DeviceContext,
        stream: StreamHandle,
        addresses: &Addresses,
        workspace: &[u64],
    ) -> Result<()> {
        let mut params = self.params.clone();
        for &(index, quantity) in &self.pointers {
            let address = match quantity {
                Quantity::Address(tensor) => addresses.tensor(tensor),
                Quantity::Lse => addresses.lse,
                Quantity::AttnMask => addresses.attn_mask,
                Quantity::Workspace(index) => workspace.get(index).copied().unwrap_or_default(),
                _ => 0,
            };
            params.set(index, &address.to_ne_bytes());
        }
        for (index, tensor, spec) in &self.tensor_maps {
            let spec = TensorMapSpec { address: addresses.tensor(*tensor), ..*spec };
            let map = context.driver.encode_tensor_map(context.handle, &spec)?;
            params.set(*index, &map.0);
        }
        context.driver.launch(
            context.handle,
            &LaunchRequest {
                function: self.function,
                grid: self.grid,
                block_threads: self.block_threads,
                cluster: self.cluster,
                shared_bytes: self.shared_bytes,
                stream,
                params: &params,
            },
        )
    }
}

fn tensor_map(layout: &Layout, box_dims: [u32; 4], swizzle: u32) -> TensorMapSpec {
    let [batch, head, seq, dim] = layout.shape.map(|size| size as u64);
    let [batch_stride, head_stride, seq_stride, _] =
        layout.strides.map(|stride| stride as u64 * layout.dtype.size() as u64);
    TensorMapSpec {
        dtype: layout.dtype,
        address: 0,
        dims: [dim, seq, head, batch],
        strides: [seq_stride, head_stride, batch_stride],
        box_dims,
        swizzle,
    }
}

fn grid(grid: &Grid, values: &Values<'_>, sm_count: u32) -> Result<[u32; 3]> {
    const LIMITS: [u64; 3] = [i32::MAX as u64, 65535, 65535];
    let mut out = [1u32; 3];
    for ((size, factors), limit) in out.iter_mut().zip([&grid.x, &grid.y, &grid.z]).zip(LIMITS) {
        let product = values.product(factors)?;
        if product == 0 || product > limit {
            return Err(Error::invalid(
                "query",
                format!("{product} tiles"),
                format!("1 to {limit} tiles of queries over batch and heads"),
            ));
        }
        *size = product as u32;
    }
    if let Some(per_sm) = grid.max_ctas_per_sm {
        out[0] = out[0].min(per_sm.saturating_mul(sm_count).max(1));
    }
    Ok(out)
}

/// The quantities of a problem by name.
struct Values<'a> {
    problem: &'a Problem,
    tile_query: u32,
}

impl Values<'_> {
    fn layout(&self, tensor: Tensor) -> Layout {
        match tensor {
            Tensor::Q => self.problem.q_layout(),
            Tensor::K => self.problem.k_layout(),
            Tensor::V => self.problem.v_layout(),
            Tensor::Out => self.problem.out_layout(),
        }
    }

    fn stride(&self, quantity: Quantity) -> i64 {
        match quantity {
            Quantity::Stride(tensor, dim) => self.layout(tensor).strides[dim],
            Quantity::MaskStride(dim) => self.problem.attn_mask.map_or(0, |mask| mask.strides[dim]),
            _ => 0,
        }
    }

    fn f32(&self, quantity: Quantity) -> f32 {
        match quantity {
            Quantity::ScaleLog2 => self.problem.scale() * std::f32::consts::LOG2_E,
            _ => self.problem.scale(),
        }
    }

    fn i32(&self, quantity: Quantity) -> Result<i32> {
        let value = self.integer(quantity);
        i32::try_from(value)
            .map_err(|_| Error::invalid("query", format!("{quantity:?} = {value}"), "sizes that fit 32 bits"))
    }

    fn integer(&self, quantity: Quantity) -> i64 {
        let problem = self.problem;
        let size = |n: usize| n as i64;
        let tiles = size(problem.seq_len_q.div_ceil(self.tile_query as usize));
        // A dense problem on a kernel with bands: everything is visible.
        let (lo, hi) = problem
            .band
            .map_or((-size(problem.seq_len_q), size(problem.seq_len_k)), |band| (band.lo.into(), band.hi.into()));
        match quantity {
            Quantity::Shape(tensor, dim) => size(self.layout(tensor).shape[dim]),
            Quantity::Batch => size(problem.batch),
            Quantity::NumHeadsQ => size(problem.num_heads_q),
            Quantity::NumHeadsKv => size(problem.num_heads_kv),
            Quantity::Group => size(problem.group()),
            Quantity::SeqLenQ => size(problem.seq_len_q),
            Quantity::SeqLenK => size(problem.seq_len_k),
            Quantity::HeadDimQk => size(problem.head_dim_qk),
            Quantity::HeadDimV => size(problem.head_dim_v),
            Quantity::BandLo => lo,
            Quantity::BandHi => hi,
            Quantity::TilesQuery => tiles,
            Quantity::NumTiles => tiles.saturating_mul(size(problem.num_heads_q)).saturating_mul(size(problem.batch)),
            _ => 0,
        }
    }

    fn product(&self, factors: &[Factor]) -> Result<u64> {
        let mut product = 1u64;
        for factor in factors {
            let value = match factor {
                Factor::Constant(value) => u64::from(*value),
                Factor::Quantity(quantity) => self.integer(*quantity).unsigned_abs(),
            };
            product = product.saturating_mul(value);
        }
        Ok(product)
    }
}
