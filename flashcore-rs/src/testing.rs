//! Seams for tests: not part of the API, and may change at any time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use crate::attention::PreparedCall;
use crate::bundle::sha256_hex;
use crate::device::{Lender, LenderMut, Loan};
pub use crate::driver::TensorMapSpec;
pub use crate::driver::mock::{Argument, Arguments, Entry, LaunchRecord, MockConfig, MockDriver};
use crate::dtype::DType;
use crate::error::Result;
use crate::runtime::RuntimeBuilder;
use crate::tensor::{Layout, Owner, OwnerMut, Storage, StorageMut, TensorView, TensorViewMut, offset_in};

/// Takes this driver instead of the installed one.
pub fn with_driver(builder: RuntimeBuilder, driver: &Arc<MockDriver>) -> RuntimeBuilder {
    builder.driver(driver.clone())
}

/// Takes this bundle, and a driver that never runs its code, instead of the installed one.
pub fn with_bundle(builder: RuntimeBuilder, driver: &Arc<MockDriver>, bundle: Vec<u8>) -> RuntimeBuilder {
    builder.bundle_bytes(bundle).driver(driver.clone())
}

/// Memory of another library on the mock, lent as `cudarc` lends its slices, and freed on its own stream alone.
#[derive(Debug)]
pub struct LentMemory {
    driver: Arc<MockDriver>,
    address: u64,
    bytes: usize,
    home: u64,
    loans: AtomicUsize,
}

impl LentMemory {
    /// Fresh memory on device 0, ordered on `home`, a stream of [`MockDriver::foreign_stream`].
    pub fn new(driver: &Arc<MockDriver>, home: u64, bytes: usize) -> Self {
        let address = driver.foreign_memory(0, bytes);
        Self { driver: driver.clone(), address, bytes, home, loans: AtomicUsize::new(0) }
    }

    /// A view of all of it.
    ///
    /// # Errors
    /// As [`TensorView::from_buffer`].
    pub fn view(&self, dtype: DType, shape: &[usize]) -> Result<TensorView<'_>> {
        let layout = Layout::contiguous("tensor", dtype, shape)?;
        let address = self.address + offset_in(self.bytes, &layout, 0)?;
        Ok(TensorView { layout, storage: Storage::Device { address, ordinal: 0, owner: Some(Owner::Lender(self)) } })
    }

    /// A writable view of all of it.
    ///
    /// # Errors
    /// As [`TensorViewMut::from_buffer`].
    pub fn view_mut(&mut self, dtype: DType, shape: &[usize]) -> Result<TensorViewMut<'_>> {
        let layout = Layout::contiguous("out", dtype, shape)?;
        let address = self.address + offset_in(self.bytes, &layout, 0)?;
        let owner = Some(OwnerMut::Lender(self));
        Ok(TensorViewMut { layout, storage: StorageMut::Device { address, ordinal: 0, owner } })
    }

    /// Writes all of it in the order of its stream.
    pub fn overwrite(&mut self) {
        self.driver.foreign_memset(0, self.address, self.bytes, self.home);
    }

    /// Calls that have it on loan.
    pub fn loans(&self) -> usize {
        self.loans.load(Ordering::Relaxed)
    }

    fn loan(&self) -> Loan<'_> {
        self.loans.fetch_add(1, Ordering::Relaxed);
        Loan { home: self.home, context: MockDriver::context(0), guard: Box::new(Returned(&self.loans)) }
    }
}

impl Lender for LentMemory {
    fn lend(&self) -> Loan<'_> {
        self.loan()
    }
}

impl LenderMut for LentMemory {
    fn lend_mut(&mut self) -> Loan<'_> {
        self.loan()
    }
}

impl Drop for LentMemory {
    fn drop(&mut self) {
        self.driver.foreign_free(0, self.address, self.home);
    }
}

struct Returned<'a>(&'a AtomicUsize);

impl Drop for Returned<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Launches a prepared call with nothing around the launch: no order with other uses of its memory. For measuring what
/// the rest costs; the stream is the one of the call, and nobody else uses the memory.
///
/// # Errors
/// As [`PreparedCall::launch`].
pub fn launch_alone(call: &mut PreparedCall<'_>) -> Result<()> {
    call.launch_alone()
}

/// The hash of a member as manifests write it.
pub fn sha256(bytes: &[u8]) -> String {
    sha256_hex(bytes)
}

/// A bundle of this manifest and code, well-formed as a container whatever they hold.
pub fn pack(manifest: &[u8], code: &[u8]) -> Vec<u8> {
    crate::bundle::pack(manifest, code)
}

/// A small bundle for `sm_90a`: portable variants for every mask, with and without alignment, and variants that take
/// tensor maps, as the real ones do. The code is made up.
pub fn sample_bundle() -> Vec<u8> {
    let (manifest, code) = sample();
    pack(manifest.to_string().as_bytes(), &code)
}

/// The manifest of [`sample_bundle`], and its code section.
pub fn sample() -> (serde_json::Value, Vec<u8>) {
    let mut code = Vec::new();
    let mut variants = Vec::new();
    for dtype in ["f16", "bf16"] {
        for (band, priority) in [(false, 1001), (true, 1000)] {
            variants.push(variant("hopper", dtype, "none", band, 16, priority, &mut code));
        }
        for (mask, align, priority) in
            [("none", 16, 20), ("none", 2, 10), ("bool", 2, 10), (dtype, 2, 10), ("f32", 2, 10)]
        {
            variants.push(variant("portable", dtype, mask, true, align, priority, &mut code));
        }
    }
    let manifest = json!({
        "schema": "flashcore.bundle/1",
        "arch": "sm_90a",
        "compiler": {"triton": "0", "ptxas": "0"},
        "variants": variants,
    });
    (manifest, code)
}

fn variant(
    family: &str,
    dtype: &str,
    mask: &str,
    band: bool,
    align: u64,
    priority: i32,
    code: &mut Vec<u8>,
) -> serde_json::Value {
    let hopper = family == "hopper";
    let name = format!("{family}.{dtype}.{mask}.{}.{align}", if band { "band" } else { "dense" });
    let member = format!("code of {name:<40}").into_bytes();
    let offset = code.len();
    code.extend(&member);
    code.resize(code.len().next_multiple_of(16), 0);
    let grid = json!({
        "x": ["tiles_query", "num_heads_q", "batch"], "y": [], "z": [],
        "max_ctas_per_sm": if hopper { Some(1) } else { None },
    });
    json!({
        "name": name,
        "op": "attention_forward",
        "family": family,
        "priority": priority,
        "when": {
            "dtype": dtype, "head_dim_qk": [1, 256], "head_dim_v": [1, 256], "band": band, "attn_mask": mask,
            "limits": {},
        },
        "requires": {
            "base_align": align, "stride_align": align, "head_dim_align": if hopper { 2 } else { align },
            "positive_scale": hopper,
        },
        "tile": {"query": 64, "key": 32, "head_dim": 256},
        "max_key_splits": 1,
        "secret": ["q", "k", "v"],
        "workspace": [],
        "launches": [{
            "kernel": format!("attention_forward_{family}"),
            "code": {"kind": "cubin", "offset": offset, "len": member.len(), "sha256": sha256(&member)},
            "source_sha256": "",
            "grid": grid,
            "block_threads": 128,
            "cluster": 1,
            "shared_bytes": 98304,
            "tile_bytes": 0,
            "registers": 255,
            "spill_bytes": 0,
            "params": if hopper { hopper_params(band) } else { portable_params(mask) },
            "audit": {"verdict": "not_run", "auditor": 0, "disassembler": ""},
        }],
    })
}

fn param(kind: &str, value: impl Into<String>) -> serde_json::Value {
    json!({"kind": kind, "value": value.into()})
}

fn portable_params(mask: &str) -> Vec<serde_json::Value> {
    let masked = mask != "none";
    let mut params: Vec<_> = ["q", "k", "v", "out", "lse"].map(|name| param("ptr", name)).into();
    params.extend(masked.then(|| param("ptr", "attn_mask")));
    for tensor in ["q", "k", "v", "out"] {
        params.extend(["batch", "head", "seq"].map(|dim| param("i64", format!("{tensor}.stride.{dim}"))));
    }
    if masked {
        params.extend(["batch", "head", "query", "key"].map(|dim| param("i64", format!("attn_mask.stride.{dim}"))));
    }
    let sizes = ["num_heads_q", "group", "seq_len_q", "seq_len_k", "head_dim_qk", "head_dim_v", "band_lo", "band_hi"];
    params.extend(sizes.map(|name| param("i32", name)));
    params.push(param("f32", "scale"));
    params.extend([param("scratch", "none"), param("scratch", "none")]);
    params
}

fn hopper_params(band: bool) -> Vec<serde_json::Value> {
    let mut params = Vec::new();
    for (tensor, rows) in [("q", 64), ("k", 128), ("v", 128), ("out", 64)] {
        params.push(json!({"kind": "tensor_map", "value": tensor, "box": [64, rows, 1, 1], "swizzle": 128}));
        params.extend(["batch", "head", "seq", "dim"].map(|dim| param("i32", format!("{tensor}.shape.{dim}"))));
        params.extend(["batch", "head", "seq", "dim"].map(|dim| param("i64", format!("{tensor}.stride.{dim}"))));
    }
    params.push(param("ptr", "lse"));
    let sizes = ["num_tiles", "tiles_query", "num_heads_q", "group", "seq_len_q", "seq_len_k"];
    params.extend(sizes.map(|name| param("i32", name)));
    params.extend(band.then(|| ["band_lo", "band_hi"].map(|name| param("i32", name))).into_iter().flatten());
    params.push(param("f32", "scale_log2"));
    params.extend([param("scratch", "none"), param("scratch", "none")]);
    params
}
