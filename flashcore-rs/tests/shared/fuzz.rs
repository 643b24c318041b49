//! What the fuzzers run, one function per target: any bytes, and no panic.

use std::sync::Arc;

use flashcore::bundle::{Bundle, Manifest};
use flashcore::testing::{self, Argument, MockConfig, MockDriver};
use flashcore::{
    AttentionOptions, CausalAlign, DType, Device, DeviceBuffer, Result, Runtime, TensorView, TensorViewMut, Window,
};
use serde_json::{Value, json};

/// A target by name.
pub type Target = (&'static str, fn(&[u8]));
pub const TARGETS: [Target; 3] = [("bundle", bundle), ("manifest", manifest), ("launch", launch)];

/// Bytes as a bundle file.
pub fn bundle(data: &[u8]) {
    if let Ok(bundle) = Bundle::parse(data) {
        for launch in bundle.manifest().variants.iter().flat_map(|variant| &variant.launches) {
            assert!(bundle.member(&launch.code).is_some(), "a parsed bundle has all its code");
        }
    }
}

/// Bytes as the manifest of a sound container.
pub fn manifest(data: &[u8]) {
    if Manifest::parse(data).is_ok() {
        let (_, code) = testing::sample();
        bundle(&testing::pack(data, &code));
    }
}

/// Bytes as choices: a manifest whose every list is made up, and a call with made-up shapes, strides, addresses and
/// options. Whatever reaches the driver must be made of what the call gave.
pub fn launch(data: &[u8]) {
    let mut choices = Choices(data);
    let code = *b"sixteen bytes!!!";
    let manifest = made_up_manifest(&mut choices, &testing::sha256(&code)).to_string();
    let Ok(parsed) = Manifest::parse(manifest.as_bytes()) else { return };
    let driver = Arc::new(MockDriver::new(MockConfig { computes: false, ..MockConfig::default() }));
    driver.learn(&parsed);
    let bundle = testing::pack(manifest.as_bytes(), &code);
    let runtime = testing::with_bundle(Runtime::builder(), &driver, bundle).build().expect("a sound bundle");
    let mut addresses = vec![0];
    let _ = made_up_call(&mut choices, &runtime, &mut addresses);
    for launch in driver.launches() {
        for argument in launch.arguments.iter() {
            let address = match argument {
                Argument::Pointer(address) | Argument::Scratch(address) => address,
                Argument::TensorMap(map) => map.address,
                Argument::Integer(_) | Argument::Real(_) => continue,
            };
            // Scratch memory is the runtime's own, and the mock's allocations start there.
            assert!(addresses.contains(&address) || address >= 0x7000_0000_0000, "{address:#x} came from nowhere");
        }
    }
    let unread = |violation: &String| violation.contains("arguments for") || violation.contains("parameter");
    assert!(!driver.violations().iter().any(unread), "{:?}", driver.violations());
}

/// Bytes, used up choice by choice; zeros when there are none left.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let (&first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        first
    }

    fn below(&mut self, n: usize) -> usize {
        usize::from(self.byte()) % n
    }

    fn of<T: Copy>(&mut self, options: &[T]) -> T {
        options[self.below(options.len())]
    }

    /// Small numbers mostly, and all others.
    fn number(&mut self) -> u64 {
        match self.byte() {
            small @ 0..200 => u64::from(small),
            shift @ 200..255 => (1u64 << (shift - 192)).wrapping_add_signed(i64::from(self.byte() as i8)),
            255 => u64::from_le_bytes(std::array::from_fn(|_| self.byte())),
        }
    }
}

const QUANTITIES: [&str; 23] = [
    "q",
    "k",
    "v",
    "out",
    "lse",
    "attn_mask",
    "workspace.0",
    "workspace.7",
    "batch",
    "num_heads_q",
    "num_heads_kv",
    "group",
    "seq_len_q",
    "seq_len_k",
    "head_dim_qk",
    "head_dim_v",
    "band_lo",
    "band_hi",
    "scale",
    "scale_log2",
    "tiles_query",
    "num_tiles",
    "key_splits",
];

fn quantity(choices: &mut Choices<'_>) -> String {
    match choices.below(29) {
        23 => format!("attn_mask.stride.{}", choices.of(&["batch", "head", "query", "key"])),
        24..29 => {
            let tensor = choices.of(&["q", "k", "v", "out"]);
            let dim = choices.of(&["batch", "head", "seq", "dim"]);
            format!("{tensor}.{}.{dim}", choices.of(&["stride", "shape"]))
        }
        simple => QUANTITIES[simple].into(),
    }
}

fn factors(choices: &mut Choices<'_>) -> Vec<Value> {
    (0..choices.below(4))
        .map(|_| if choices.byte() < 64 { json!(choices.number() as u32) } else { json!(quantity(choices)) })
        .collect()
}

fn param(choices: &mut Choices<'_>) -> Value {
    let kind = choices.of(&["ptr", "i32", "i64", "f32", "tensor_map", "scratch"]);
    match kind {
        "scratch" => json!({"kind": kind, "value": "none"}),
        "tensor_map" => {
            let sides: [u64; 4] = std::array::from_fn(|_| choices.number());
            let tensor = choices.of(&["q", "k", "v", "out"]);
            json!({"kind": kind, "value": tensor, "box": sides, "swizzle": choices.of(&[0, 32, 64, 128, 1])})
        }
        "f32" => json!({"kind": kind, "value": choices.of(&["scale", "scale_log2"])}),
        "ptr" => json!({"kind": kind, "value": choices.of(&QUANTITIES[..8])}),
        _ => json!({"kind": kind, "value": quantity(choices)}),
    }
}

/// Mostly none: a call has to get past them.
fn limits(choices: &mut Choices<'_>) -> Value {
    match choices.below(8) {
        0 => json!({quantity(choices): [choices.number(), choices.number()]}),
        1 => json!({choices.of(&QUANTITIES[8..16]): [0, choices.number()]}),
        _ => json!({}),
    }
}

fn made_up_manifest(choices: &mut Choices<'_>, sha256: &str) -> Value {
    let align = |choices: &mut Choices<'_>| choices.of(&[1, 2, 16, 16, 256, 4096, 3]);
    let range = |choices: &mut Choices<'_>| [choices.number() as u32 % 64, choices.number() as u32];
    let variants: Vec<_> = (0..1 + choices.below(3))
        .map(|index| {
            let launches: Vec<_> = (0..1 + choices.below(2))
                .map(|_| {
                    json!({
                        "kernel": "kernel",
                        "code": {"kind": "cubin", "offset": 0, "len": 16, "sha256": sha256},
                        "source_sha256": "",
                        "grid": {
                            "x": factors(choices), "y": factors(choices), "z": factors(choices),
                            "max_ctas_per_sm": if choices.byte() < 64 { Some(choices.number() as u32) } else { None },
                        },
                        "block_threads": choices.of(&[32, 128, 1024, 0]),
                        "cluster": choices.of(&[1, 1, 2, 16]),
                        "shared_bytes": choices.number() as u32,
                        "tile_bytes": choices.number() as u32,
                        "registers": 0,
                        "spill_bytes": 0,
                        "params": (0..choices.below(100)).map(|_| param(choices)).collect::<Vec<_>>(),
                        "audit": {"verdict": choices.of(&["not_run", "pass", ""]), "auditor": 1, "disassembler": ""},
                    })
                })
                .collect();
            json!({
                "name": index.to_string(),
                "op": "attention_forward",
                "family": "made_up",
                "priority": choices.byte(),
                "when": {
                    "dtype": choices.of(&["f16", "bf16"]),
                    "head_dim_qk": range(choices),
                    "head_dim_v": range(choices),
                    "band": choices.byte() < 128,
                    "attn_mask": choices.of(&["none", "none", "bool", "f16", "bf16", "f32"]),
                    "limits": limits(choices),
                },
                "requires": {
                    "base_align": align(choices), "stride_align": align(choices), "head_dim_align": align(choices),
                    "positive_scale": choices.byte() < 64,
                },
                "tile": {"query": choices.number() as u32, "key": 1 + choices.below(64), "head_dim": 64},
                "max_key_splits": choices.number() as u32,
                "secret": [],
                "workspace": (0..choices.below(3)).map(|_| json!({"bytes": factors(choices)})).collect::<Vec<_>>(),
                "launches": launches,
            })
        })
        .collect();
    json!({
        "schema": "flashcore.bundle/1",
        "arch": "sm_90a",
        "compiler": {"triton": "", "ptxas": ""},
        "variants": variants,
    })
}

fn made_up_call(choices: &mut Choices<'_>, runtime: &Runtime, addresses: &mut Vec<u64>) -> Result<()> {
    let dtype = choices.of(&[DType::F16, DType::BF16, DType::F16, DType::F32]);
    let [batch, heads_kv, group, seq_q, seq_k, dim_qk, dim_v] = std::array::from_fn(|_| choices.number() as usize);
    let heads_q = heads_kv.wrapping_mul(group);
    let mut address = |choices: &mut Choices<'_>| {
        let address = choices.number().wrapping_mul(u64::from(choices.of(&[1u8, 2, 16, 255])));
        addresses.push(address);
        address
    };
    let strides = |choices: &mut Choices<'_>, shape: [usize; 4]| match choices.below(3) {
        0 => std::array::from_fn(|_| choices.number() as i64),
        seed => {
            let mut stride = 1i64;
            let mut strides = [1; 4];
            for dim in (0..4).rev() {
                strides[dim] = if seed == 2 && choices.byte() < 32 { 0 } else { stride };
                stride = stride.wrapping_mul(shape[dim].max(1) as i64);
            }
            strides
        }
    };
    #[allow(unsafe_code, reason = "made-up memory")]
    let mut view = |choices: &mut Choices<'_>, dtype, shape: [usize; 4]| {
        let strides = strides(choices, shape);
        // SAFETY: the mock dereferences no address that it did not allocate itself.
        unsafe { TensorView::from_raw(Device::Cuda(0), address(choices), dtype, &shape, &strides) }
    };
    let query = view(choices, dtype, [batch, heads_q, seq_q, dim_qk])?;
    let key = view(choices, dtype, [batch, heads_kv, seq_k, dim_qk])?;
    let value = view(choices, dtype, [batch, heads_kv, seq_k, dim_v])?;
    let mask = match choices.below(3) {
        0 => {
            let dtype = choices.of(&[DType::Bool, DType::F32, DType::F16, DType::BF16, DType::F64]);
            let shape = [batch, heads_q, seq_q, seq_k].map(|n| if choices.byte() < 64 { 1 } else { n });
            Some(view(choices, dtype, shape)?)
        }
        _ => None,
    };
    let shape = [batch, heads_q, seq_q, dim_v];
    let out_strides = strides(choices, shape);
    let out_address = address(choices);
    // SAFETY: as above.
    #[allow(unsafe_code, reason = "made-up memory")]
    let mut out = unsafe { TensorViewMut::from_raw(Device::Cuda(0), out_address, dtype, &shape, &out_strides) }?;
    let side = |choices: &mut Choices<'_>| (choices.byte() < 128).then(|| choices.number() as u32);
    let options = AttentionOptions {
        causal: choices.byte() < 128,
        causal_align: choices.of(&[CausalAlign::TopLeft, CausalAlign::BottomRight]),
        window: (choices.byte() < 128).then(|| Window { left: side(choices), right: side(choices) }),
        scale: (choices.byte() < 128).then(|| f32::from_bits(choices.number() as u32)),
    };
    let mut call = runtime.attention(&query, &key, &value).options(options);
    if let Some(mask) = mask {
        call = call.attn_mask(mask);
    }
    let elements = batch.saturating_mul(heads_q).saturating_mul(seq_q);
    if choices.byte() < 64 && elements < 1 << 16 {
        // An owned output beside foreign inputs.
        let mut lse = DeviceBuffer::uninit(runtime.stream()?, elements * 4)?;
        let shape = [batch, heads_q, seq_q, 1];
        call.run_with_lse(&mut out, &mut TensorViewMut::from_buffer(&mut lse, DType::F32, &shape)?)?;
    } else {
        call.run(&mut out)?;
    }
    Ok(())
}
