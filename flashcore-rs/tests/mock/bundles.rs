//! Hostile bundles: an error, never a panic.

use flashcore::bundle::{Bundle, Manifest, embedded};
use std::sync::Arc;

use crate::support::with_bundle;
use flashcore::testing::{MockDriver, pack, sample, sample_bundle};
use flashcore::{BundleError, Error, Runtime};
use serde_json::{Value, json};

fn refusal(bytes: &[u8]) -> String {
    Bundle::parse(bytes).expect_err("a refusal").to_string()
}

#[test]
fn embedded_bundles_are_sound() {
    for (arch, bytes) in embedded() {
        let bundle = Bundle::parse(bytes).unwrap_or_else(|error| panic!("{arch}: {error}"));
        assert_eq!(bundle.manifest().arch, *arch);
    }
}

#[test]
fn packing_and_parsing_agree() {
    let (manifest, _) = sample();
    let bundle = Bundle::parse(&sample_bundle()).expect("a bundle");
    let parsed = Manifest::parse(manifest.to_string().as_bytes()).expect("a manifest");
    assert_eq!(*bundle.manifest(), parsed);
    let launch = &bundle.manifest().variants[0].launches[0];
    assert!(bundle.member(&launch.code).is_some_and(|code| code.starts_with(b"code of hopper.f16.none.dense.16")));
}

#[test]
fn every_truncation_is_refused() {
    let bundle = sample_bundle();
    for len in 0..bundle.len() {
        let message = refusal(&bundle[..len]);
        let expected = match len {
            0 | 8..112 => format!("header: {len} bytes, expected 112"),
            1..8 => "not a FlashCore bundle (bad magic)".into(),
            _ => format!("body: {} bytes, expected {}", len - 112, bundle.len() - 112),
        };
        assert_eq!(message, expected);
    }
    let mut longer = bundle;
    longer.push(0);
    assert!(refusal(&longer).starts_with("body: "));
}

#[test]
fn every_damaged_byte_is_noticed() {
    let bundle = sample_bundle();
    let step = if cfg!(miri) { 97 } else { 1 };
    for at in (0..bundle.len()).step_by(step) {
        for bit in [0, 7] {
            let mut damaged = bundle.clone();
            damaged[at] ^= 1 << bit;
            // A damaged frame header may still decompress to the same bytes; anything else is refused.
            if let Ok(parsed) = Bundle::parse(&damaged) {
                assert!(at >= 112, "byte {at} of the header does not matter");
                assert_eq!(parsed.manifest(), Bundle::parse(&bundle).expect("a bundle").manifest());
            }
        }
    }
}

#[test]
fn headers_are_checked() {
    let bundle = sample_bundle();
    let with = |at: usize, bytes: &[u8]| {
        let mut damaged = bundle.clone();
        damaged[at..at + bytes.len()].copy_from_slice(bytes);
        refusal(&damaged)
    };
    assert_eq!(with(0, b"FCBUNDLF"), "not a FlashCore bundle (bad magic)");
    assert_eq!(with(8, &2u32.to_le_bytes()), "container version 2; this runtime reads version 1");
    assert_eq!(with(12, &1u32.to_le_bytes()), "manifest: reserved header bytes are not zero");
    assert_eq!(with(24, &u64::MAX.to_le_bytes()), "manifest section: 18446744073709551615 bytes, expected 268435456");
    let real = u64::from_le_bytes(bundle[24..32].try_into().expect("8 bytes"));
    let short = with(24, &(real - 1).to_le_bytes());
    assert_eq!(short, format!("manifest section: {real} bytes, expected {}", real - 1));
    assert_eq!(with(32, &[0; 32]), "manifest section: sha256 mismatch (the bundle is corrupt)");
    assert_eq!(with(80, &[0; 32]), "code section: sha256 mismatch (the bundle is corrupt)");
    let message = with(16, &u64::MAX.to_le_bytes());
    assert!(message.starts_with("body: "), "{message}");
}

#[test]
fn audited_kernels_can_be_asked_for() {
    let driver = Arc::new(MockDriver::default());
    let open = |verdict: &str, audited_only: bool| {
        let (mut manifest, code) = sample();
        let variants = manifest["variants"].as_array_mut().expect("variants");
        variants.iter_mut().for_each(|variant| variant["launches"][0]["audit"]["verdict"] = json!("pass"));
        variants[1]["launches"][0]["audit"]["verdict"] = json!(verdict);
        let bundle = pack(manifest.to_string().as_bytes(), &code);
        with_bundle(&driver, Runtime::builder().audited_only(audited_only), bundle).map(|_| ())
    };
    assert_eq!(open("pass", true), Ok(()));
    for verdict in ["not_run", "pass_as_assembled"] {
        assert_eq!(open(verdict, false), Ok(()));
        match open(verdict, true) {
            Err(Error::Bundle(BundleError::NotAudited { variant, verdict: found })) => {
                assert!(found == verdict && variant.starts_with("hopper."), "{variant}: {found}");
            }
            other => panic!("{verdict}: {other:?}"),
        }
    }
}

#[test]
fn embedded_kernels_are_audited() {
    for (arch, bytes) in embedded() {
        let bundle = Bundle::parse(bytes).unwrap_or_else(|error| panic!("{arch}: {error}"));
        let wanted = if arch.starts_with("compute_") { "pass_as_assembled" } else { "pass" };
        let launches = bundle.manifest().variants.iter().flat_map(|variant| &variant.launches);
        launches.for_each(|launch| assert_eq!(launch.audit.verdict.to_string(), wanted, "{arch}"));
    }
}

#[test]
fn a_frame_that_unpacks_to_more_than_promised_is_not_unpacked() {
    let (manifest, _) = sample();
    let mut bundle = pack(manifest.to_string().as_bytes(), &vec![0; 1 << 20]);
    bundle[72..80].copy_from_slice(&64u64.to_le_bytes());
    assert_eq!(refusal(&bundle), "code section: 65 bytes, expected 64");
}

/// The sample with one change to its manifest.
fn changed(change: impl FnOnce(&mut Value)) -> String {
    let (mut manifest, code) = sample();
    change(&mut manifest);
    refusal(&pack(manifest.to_string().as_bytes(), &code))
}

/// The sample with one change to its first variant.
fn variant(change: impl FnOnce(&mut Value)) -> String {
    let message = changed(|manifest| change(&mut manifest["variants"][0]));
    message.trim_start_matches("manifest: hopper.f16.none.dense.16: ").into()
}

#[test]
fn manifests_are_checked() {
    assert_eq!(
        changed(|manifest| manifest["schema"] = json!("flashcore.bundle/2")),
        "manifest: schema \"flashcore.bundle/2\"; this runtime reads \"flashcore.bundle/1\""
    );
    assert!(changed(|manifest| manifest["licence"] = json!("?")).contains("unknown field `licence`"));
    assert!(variant(|variant| variant["launches"][0]["fast"] = json!(true)).contains("unknown field `fast`"));
    assert!(changed(|manifest| manifest["arch"] = json!(90)).starts_with("manifest: invalid type"));
    assert_eq!(
        changed(|manifest| manifest["variants"][1]["name"] = manifest["variants"][0]["name"].clone()),
        "manifest: hopper.f16.none.dense.16 appears twice"
    );
    assert_eq!(
        variant(|variant| variant["requires"]["stride_align"] = json!(3)),
        "alignment 3 is not a power of two up to 4096"
    );
    assert_eq!(
        variant(|variant| variant["requires"]["base_align"] = json!(8)),
        "tensor maps need addresses and strides aligned to 16 bytes"
    );
    assert_eq!(variant(|variant| variant["tile"]["query"] = json!(0)), "a tile dimension is 0 or above 65536");
    assert_eq!(variant(|variant| variant["when"]["dtype"] = json!("f64")), "dtype f64 has no kernels");
    assert_eq!(variant(|variant| variant["launches"] = json!([])), "no launches");
    assert_eq!(variant(|variant| variant["max_key_splits"] = json!(0)), "max_key_splits is 0");
    assert!(variant(|variant| variant["max_key_splits"] = json!(null)).contains("invalid type: null"));
    assert!(
        variant(|variant| drop(variant.as_object_mut().expect("fields").remove("max_key_splits"))).contains("missing")
    );
    assert_eq!(
        variant(|variant| variant["launches"][0]["block_threads"] = json!(1025)),
        "1025 threads per block, 1 blocks per cluster"
    );
    assert_eq!(
        variant(|variant| variant["launches"][0]["cluster"] = json!(0)),
        "128 threads per block, 0 blocks per cluster"
    );
    assert_eq!(variant(|variant| variant["launches"][0]["grid"]["x"] = json!([0])), "a factor is 0");
    assert_eq!(
        variant(|variant| variant["launches"][0]["grid"]["x"] = json!(["band_lo"])),
        "BandLo cannot be a factor"
    );
    let params = |params: Value| variant(|variant| variant["launches"][0]["params"] = params);
    assert_eq!(params(json!([{"kind": "ptr", "value": "attn_mask"}])), "AttnMask is not an address of this variant");
    assert_eq!(
        params(json!([{"kind": "i64", "value": "attn_mask.stride.key"}])),
        "MaskStride(3) is not a stride of this variant"
    );
    assert_eq!(
        params(json!([{"kind": "ptr", "value": "workspace.0"}])),
        "Workspace(0) is not an address of this variant"
    );
    assert_eq!(params(json!([{"kind": "i32", "value": "scale"}])), "Scale is not a 32-bit quantity of this variant");
    assert!(params(json!([{"kind": "i32", "value": "seq_len"}])).contains("unknown quantity \"seq_len\""));
    assert_eq!(
        params(json!([{"kind": "tensor_map", "value": "q", "box": [64, 0, 1, 1], "swizzle": 128}])),
        "tensor map with box [64, 0, 1, 1], swizzle 128"
    );
    assert_eq!(params(json!(vec![json!({"kind": "i32", "value": "batch"}); 97])), "97 parameters");
    let maps = vec![json!({"kind": "tensor_map", "value": "q", "box": [64, 1, 1, 1], "swizzle": 128}); 17];
    assert_eq!(params(json!(maps)), "parameters of more than 2048 bytes");
}

#[test]
fn limits_are_checked() {
    let limits = |limits: Value| variant(|variant| variant["when"]["limits"] = limits);
    let refused = |given: Value, message: &str| {
        let found = limits(given);
        assert!(found.contains(message), "{found}");
    };
    refused(json!({"seq_len_q": [2, 1]}), "seq_len_q is limited to 2 to 1");
    refused(json!({"seq_len": [1, 2]}), "\"seq_len\" cannot be limited");
    refused(json!({"key_splits": [1, 2]}), "\"key_splits\" cannot be limited");
    refused(json!({"band_lo": [1, 2]}), "\"band_lo\" cannot be limited");
    refused(json!({"batch": [-1, 2]}), "invalid value: integer `-1`");
    refused(json!({"batch": [1, 2.5]}), "invalid type: floating point `2.5`");
    refused(json!({"batch": [1]}), "invalid length 1");
    refused(json!({"batch": [1, 2, 3]}), "manifest: ");
    refused(json!({"batch": 1}), "invalid type: integer `1`");
    refused(json!(null), "expected an inclusive range for each limited quantity");
    refused(json!([]), "expected an inclusive range for each limited quantity");
    assert!(
        variant(|variant| drop(variant["when"].as_object_mut().expect("fields").remove("limits"))).contains("missing")
    );

    let (manifest, code) = sample();
    let twice = manifest.to_string().replacen("\"limits\":{}", "\"limits\":{\"batch\":[0,9],\"batch\":[1,9]}", 1);
    let message = refusal(&pack(twice.as_bytes(), &code));
    assert!(message.contains("batch is limited twice"), "{message}");
}

#[test]
fn code_is_checked() {
    let code =
        |change: &dyn Fn(&mut Value)| changed(|manifest| change(&mut manifest["variants"][0]["launches"][0]["code"]));
    let outside = "manifest: hopper.f16.none.dense.16: code lies outside the code section";
    assert_eq!(code(&|code| code["offset"] = json!(u64::MAX)), outside);
    assert_eq!(code(&|code| code["len"] = json!(u64::MAX)), outside);
    assert_eq!(code(&|code| code["len"] = json!(1 << 20)), outside);
    let hash = "hopper.f16.none.dense.16: sha256 mismatch (the bundle is corrupt)";
    assert_eq!(code(&|code| code["offset"] = json!(1)), hash);
    assert_eq!(code(&|code| code["sha256"] = json!("")), hash);
}

#[test]
fn a_bundle_for_another_architecture_is_refused() {
    let (mut manifest, code) = sample();
    manifest["arch"] = json!("sm_80");
    let bundle = pack(manifest.to_string().as_bytes(), &code);
    let driver = std::sync::Arc::new(flashcore::testing::MockDriver::default());
    let result = flashcore::testing::with_bundle(Runtime::builder(), &driver, bundle).build();
    let error = BundleError::ForeignArch { bundle: "sm_80".into(), device: "Mock GPU (compute capability 9.0)".into() };
    assert_eq!(result.err(), Some(error.into()));
}
