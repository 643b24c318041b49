//! From a chosen variant to launches: everything that depends only on geometry is computed once.

use super::problem::Problem;
use crate::bundle::manifest::{Factor, Grid, Launch, Param, Quantity, Tensor, Tile, Variant};
use crate::device::{DeviceContext, Few, log_drop_error};
use crate::driver::{FunctionHandle, LaunchRequest, MapChange, ParamBlock, StreamHandle, TensorMapSpec};
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
    #[inline]
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
    key_splits: i64,
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
    /// Parameters that point to scratch memory, and which.
    workspace: Vec<(usize, usize)>,
    tensor_maps: Vec<(usize, Tensor, TensorMapSpec)>,
}

/// The arguments of a plan's launches, and the addresses that they hold. Arguments that are placed stay so: a launch with
/// the same addresses takes them as they are.
#[derive(Debug, Default)]
pub(crate) struct Placed {
    /// `None` when the arguments hold no call's addresses, or not all of one call's.
    addresses: Option<Addresses>,
    /// Of each launch.
    params: Vec<ParamBlock>,
}

impl Placed {
    /// Whether the arguments hold these addresses.
    #[inline]
    pub(crate) fn is_at(&self, addresses: &Addresses) -> bool {
        self.addresses.as_ref() == Some(addresses)
    }
}

/// Descriptors that a launch has to change: the index of each parameter, and how.
type Maps = Few<(usize, MapChange)>;

impl Plan {
    /// Binds `problem` to `variant`, whose launches' kernels are `functions`.
    pub(crate) fn new(
        variant: &Variant,
        functions: &[FunctionHandle],
        problem: Problem,
        sm_count: u32,
    ) -> Result<Self> {
        let values = Values { problem: &problem, variant, sm_count };
        let launches = variant
            .launches
            .iter()
            .zip(functions)
            .map(|(launch, &function)| PlannedLaunch::new(launch, function, &values))
            .collect::<Result<_>>()?;
        let workspace = variant
            .workspace
            .iter()
            .map(|scratch| {
                let bytes = values.product(&scratch.bytes)?;
                usize::try_from(bytes).map_err(|_| Error::OutOfMemory { requested: usize::MAX })
            })
            .collect::<Result<_>>()?;
        Ok(Self { variant: variant.name.clone(), problem, launches, workspace, key_splits: values.key_splits() })
    }

    /// The name of the kernel variant.
    pub fn variant(&self) -> &str {
        &self.variant
    }

    /// The problem it answers.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Parts that the keys of a tile of queries are dealt to; 1 when they are not split.
    pub fn key_splits(&self) -> u32 {
        self.key_splits.try_into().unwrap_or(u32::MAX)
    }

    /// The arguments of every launch, with no address in its place.
    pub(crate) fn unplaced(&self) -> Placed {
        Placed { addresses: None, params: self.launches.iter().map(|launch| launch.params.clone()).collect() }
    }

    /// The arguments of every launch, with all addresses but those of scratch memory in their places.
    pub(crate) fn place(&self, context: &DeviceContext, addresses: &Addresses) -> Result<Placed> {
        let mut placed = self.unplaced();
        for (launch, params) in self.launches.iter().zip(&mut placed.params) {
            launch.place_pointers(params, addresses);
            for (index, tensor, spec) in &launch.tensor_maps {
                let spec = TensorMapSpec { address: addresses.tensor(*tensor), ..*spec };
                params.set(*index, &context.driver.encode_tensor_map(context.handle, &spec)?.0);
            }
        }
        placed.addresses = Some(*addresses);
        Ok(placed)
    }

    /// Queues the launches with arguments of this plan, which hold `addresses` afterwards; after a failure they are
    /// placed anew. Scratch memory is stream-ordered and belongs to this call alone, so that calls on several streams
    /// share nothing.
    #[inline]
    pub(crate) fn launch(
        &self,
        context: &DeviceContext,
        stream: StreamHandle,
        placed: &mut Placed,
        addresses: &Addresses,
    ) -> Result<()> {
        if placed.is_at(addresses) {
            return self.with_workspace(context, stream, |workspace| {
                let mut launches = self.launches.iter().zip(&mut placed.params);
                launches.try_for_each(|(launch, params)| launch.queue(context, stream, params, workspace, &[]))
            });
        }
        let earlier = placed.addresses.take();
        self.with_workspace(context, stream, |workspace| {
            let mut launches = self.launches.iter().zip(&mut placed.params);
            launches.try_for_each(|(launch, params)| {
                launch.place_pointers(params, addresses);
                let maps = launch.maps(earlier.as_ref(), addresses);
                launch.queue(context, stream, params, workspace, &maps)
            })
        })?;
        placed.addresses = Some(*addresses);
        Ok(())
    }

    #[inline]
    fn with_workspace(
        &self,
        context: &DeviceContext,
        stream: StreamHandle,
        work: impl FnOnce(&[u64]) -> Result<()>,
    ) -> Result<()> {
        if self.workspace.is_empty() { work(&[]) } else { self.with_scratch_memory(context, stream, work) }
    }

    fn with_scratch_memory(
        &self,
        context: &DeviceContext,
        stream: StreamHandle,
        work: impl FnOnce(&[u64]) -> Result<()>,
    ) -> Result<()> {
        let mut workspace = Few::new();
        let allocated = self.workspace.iter().try_for_each(|&bytes| {
            workspace.push(context.driver.alloc(context.handle, bytes.max(1), stream)?);
            Ok(())
        });
        let queued = allocated.and_then(|()| work(&workspace));
        for address in workspace {
            log_drop_error("scratch memory", context.driver.free(context.handle, address, stream));
        }
        queued
    }
}

impl PlannedLaunch {
    fn new(launch: &Launch, function: FunctionHandle, values: &Values<'_>) -> Result<Self> {
        let mut planned = Self {
            function,
            grid: grid(&launch.grid, values)?,
            block_threads: launch.block_threads,
            cluster: launch.cluster,
            shared_bytes: launch.shared_bytes,
            params: ParamBlock::default(),
            pointers: Vec::new(),
            workspace: Vec::new(),
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
            Param::Ptr { value: Quantity::Workspace(which) } => self.workspace.push((index, *which)),
            Param::Ptr { value } => self.pointers.push((index, *value)),
            Param::TensorMap { value: Quantity::Address(tensor), box_dims, swizzle } => {
                let spec = tensor_map(&values.layout(*tensor), *box_dims, *swizzle);
                self.tensor_maps.push((index, *tensor, spec));
            }
            _ => {}
        }
        Ok(())
    }

    /// Puts the addresses in their places.
    fn place_pointers(&self, params: &mut ParamBlock, addresses: &Addresses) {
        for &(index, quantity) in &self.pointers {
            let address = match quantity {
                Quantity::Address(tensor) => addresses.tensor(tensor),
                Quantity::Lse => addresses.lse,
                Quantity::AttnMask => addresses.attn_mask,
                _ => 0,
            };
            params.set(index, &address.to_ne_bytes());
        }
    }

    /// What becomes of the descriptors where the arguments hold `earlier` addresses, or none.
    fn maps(&self, earlier: Option<&Addresses>, addresses: &Addresses) -> Maps {
        let change = |(index, tensor, spec): &(usize, Tensor, TensorMapSpec)| {
            let address = addresses.tensor(*tensor);
            match earlier {
                None => Some((*index, MapChange::New(TensorMapSpec { address, ..*spec }))),
                Some(earlier) => (earlier.tensor(*tensor) != address).then_some((*index, MapChange::Moved(address))),
            }
        };
        self.tensor_maps.iter().filter_map(change).collect()
    }

    #[inline]
    fn queue(
        &self,
        context: &DeviceContext,
        stream: StreamHandle,
        params: &mut ParamBlock,
        workspace: &[u64],
        tensor_maps: &[(usize, MapChange)],
    ) -> Result<()> {
        for &(index, which) in &self.workspace {
            params.set(index, &workspace.get(which).copied().unwrap_or_default().to_ne_bytes());
        }
        let &Self { function, grid, block_threads, cluster, shared_bytes, .. } = self;
        let mut request =
            LaunchRequest { function, grid, block_threads, cluster, shared_bytes, stream, params, tensor_maps };
        context.driver.launch(context.handle, &mut request)
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

fn grid(grid: &Grid, values: &Values<'_>) -> Result<[u32; 3]> {
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
        out[0] = out[0].min(per_sm.saturating_mul(values.sm_count).max(1));
    }
    Ok(out)
}

/// The quantities that a problem and a tile alone decide; 0 for any other.
pub(super) fn count(problem: &Problem, tile: &Tile, quantity: Quantity) -> i64 {
    let tiles = problem.seq_len_q.div_ceil(tile.query as usize);
    let count = match quantity {
        Quantity::Batch => problem.batch,
        Quantity::NumHeadsQ => problem.num_heads_q,
        Quantity::NumHeadsKv => problem.num_heads_kv,
        Quantity::Group => problem.group(),
        Quantity::SeqLenQ => problem.seq_len_q,
        Quantity::SeqLenK => problem.seq_len_k,
        Quantity::HeadDimQk => problem.head_dim_qk,
        Quantity::HeadDimV => problem.head_dim_v,
        Quantity::TilesQuery => tiles,
        Quantity::NumTiles => tiles.saturating_mul(problem.num_heads_q).saturating_mul(problem.batch),
        _ => 0,
    };
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// The quantities of a problem by name.
struct Values<'a> {
    problem: &'a Problem,
    variant: &'a Variant,
    sm_count: u32,
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
        // A dense problem on a kernel with bands: everything is visible.
        let (lo, hi) = problem
            .band
            .map_or((-size(problem.seq_len_q), size(problem.seq_len_k)), |band| (band.lo.into(), band.hi.into()));
        match quantity {
            Quantity::Shape(tensor, dim) => size(self.layout(tensor).shape[dim]),
            Quantity::BandLo => lo,
            Quantity::BandHi => hi,
            Quantity::KeySplits => self.key_splits(),
            other => count(problem, &self.variant.tile, other),
        }
    }

    /// Enough parts that every SM has a few, but none without a tile of keys.
    fn key_splits(&self) -> i64 {
        const CTAS_PER_SM: u64 = 4;
        let tile = &self.variant.tile;
        let num_tiles = count(self.problem, tile, Quantity::NumTiles).unsigned_abs();
        let wanted = (CTAS_PER_SM * u64::from(self.sm_count)).div_ceil(num_tiles.max(1));
        let tiles_key = (self.problem.seq_len_k as u64).div_ceil(tile.key.into());
        let most = tiles_key.min(self.variant.max_key_splits.into()).max(1);
        wanted.clamp(1, most) as i64
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::bundle::Manifest;
    use crate::dtype::DType;

    /// The first variant of the sample, with `key_splits` wherever it can be.
    fn split_variant(max_key_splits: u32) -> Variant {
        let (mut manifest, _) = crate::testing::sample();
        let variant = &mut manifest["variants"][0];
        variant["max_key_splits"] = json!(max_key_splits);
        variant["workspace"] = json!([{"bytes": ["key_splits", "seq_len_q", 4]}]);
        let launch = &mut variant["launches"][0];
        launch["grid"] = json!({"x": ["num_tiles"], "y": ["key_splits"], "z": [], "max_ctas_per_sm": null});
        launch["params"] = json!([{"kind": "i32", "value": "key_splits"}]);
        let manifest = Manifest::parse(manifest.to_string().as_bytes()).expect("a manifest");
        manifest.variants.into_iter().next().expect("a variant")
    }

    /// Bound to a variant whose tiles are 64 queries and 32 keys.
    fn plan(max_key_splits: u32, seq_len_q: usize, seq_len_k: usize, sm_count: u32) -> Plan {
        let strides = [1 << 30, 1 << 20, 64, 1];
        let problem = Problem {
            dtype: DType::F16,
            batch: 1,
            num_heads_q: 2,
            num_heads_kv: 2,
            seq_len_q,
            seq_len_k,
            head_dim_qk: 64,
            head_dim_v: 64,
            q_strides: strides,
            k_strides: strides,
            v_strides: strides,
            out_strides: strides,
            attn_mask: None,
            band: None,
            scale_bits: 0.125f32.to_bits(),
            lse: false,
        };
        Plan::new(&split_variant(max_key_splits), &[FunctionHandle(1)], problem, sm_count).expect("a plan")
    }

    #[test]
    fn keys_are_split_until_every_sm_has_work() {
        for (max_key_splits, seq_len_q, seq_len_k, sm_count, expected) in [
            (8, 64, 1024, 132, 8),
            (1, 64, 1024, 132, 1),
            (8, 64, 65, 132, 3),
            (8, 64, 0, 132, 1),
            (u32::MAX, 64, 1 << 30, 132, 264),
            (8, 64 * 132, 1024, 132, 2),
            (8, 64 * 131, 1024, 132, 3),
            (8, 64 * 264, 1024, 132, 1),
            (8, 64 * 265, 1024, 132, 1),
            (8, 64, 1024, 1, 2),
        ] {
            let plan = plan(max_key_splits, seq_len_q, seq_len_k, sm_count);
            let launch = &plan.launches[0];
            let case = format!("{seq_len_q} x {seq_len_k}, up to {max_key_splits} on {sm_count} SMs");
            assert_eq!(launch.grid, [2 * seq_len_q.div_ceil(64) as u32, expected, 1], "{case}");
            assert_eq!(plan.workspace, [expected as usize * seq_len_q * 4], "{case}");
            assert_eq!(launch.params.get(0), (expected as i32).to_ne_bytes(), "{case}");
        }
    }
}
