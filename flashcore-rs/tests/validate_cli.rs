//! The binary `flashcore-validate`: exit codes, and what it writes.
#![cfg(feature = "validate")]

use std::process::{Command, Output};

fn validate(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_flashcore-validate")).args(arguments).output().expect("the binary runs")
}

fn code(arguments: &[&str]) -> Option<i32> {
    validate(arguments).status.code()
}

fn stdout(arguments: &[&str]) -> String {
    String::from_utf8(validate(arguments).stdout).expect("UTF-8")
}

#[test]
fn passes_and_writes_evidence() {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("evidence.json");
    let path = json.to_str().expect("a path");
    let filter = ["--device", "cpu", "--filter", "head_dim d8", "--seed", "5", "--repeats", "3", "--commit", "abc"];
    assert_eq!(code(&[&filter[..], &["--json", path]].concat()), Some(0));
    let evidence: serde_json::Value =
        serde_json::from_slice(&std::fs::read(json).expect("a file")).expect("a JSON document");
    assert_eq!((&evidence["topic"], &evidence["commit"]), (&"first-light".into(), &"abc".into()));
    assert_eq!((&evidence["env"]["device"], &evidence["env"]["seed"]), (&"cpu".into(), &5.into()));
    let rows = evidence["rows"].as_array().expect("rows");
    let kinds = |kind: &str| rows.iter().filter(|row| row["kind"] == kind).count();
    assert!(kinds("correct") >= 4 && kinds("repeat") >= 4, "{rows:?}");
    assert!(rows.iter().all(|row| row["correct"] == true));
}

#[test]
fn measures_on_the_cpu() {
    let output = stdout(&["measure", "--device", "cpu", "--rounds", "2", "--filter", "s128 b8"]);
    assert!(output.contains("S 128 B 8 H 8 D 64") && output.trim_end().ends_with("PASS"), "{output}");
}

#[test]
fn says_why_it_runs_on_the_cpu() {
    let output = validate(&["correct", "--filter", "empty"]);
    let said = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(said.contains("the CPU backend, ") || said.contains("cuda:0"), "{said}");
    assert!(!said.contains("CPU backend") || said.contains("CUDA"), "no reason: {said}");
}

#[test]
fn lists_every_case() {
    let lines = |arguments: &[&str]| stdout(arguments).lines().count();
    assert!(lines(&["correct", "--list"]) >= 400);
    assert_eq!(lines(&["measure", "--list"]), 9);
    assert!(lines(&["--list", "--quick"]) < lines(&["--list"]));
}

#[test]
fn dumps_what_it_computed() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_str().expect("a path");
    assert_eq!(code(&["dump", path, "--device", "cpu", "--filter", "memory/f16 d64 bshd+5@3"]), Some(0));
    let bytes = std::fs::read(folder.path().join("0000.safetensors")).expect("a file");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).expect("a JSON header");
    let end = json["out"]["data_offsets"][1].as_u64().expect("an offset");
    let lse_end = json["lse"]["data_offsets"][1].as_u64().expect("an offset");
    assert_eq!(lse_end.max(end) as usize, bytes.len() - 8 - header);
    assert_eq!(json["query"]["dtype"], "F16");
    let tensors = json["__metadata__"]["tensors"].as_str().expect("text");
    let tensors: serde_json::Value = serde_json::from_str(tensors).expect("JSON");
    assert_eq!((&tensors["key"]["start"], &tensors["key"]["strides"][3]), (&131.into(), &1.into()));
}

#[test]
fn usage_and_environment_are_exit_code_5() {
    for arguments in [
        &["--no-such-option"][..],
        &["no-such-command"],
        &["--device", "tpu"],
        &["--device", "cuda:99"],
        &["--device", "cpu", "--arch", "sm_80"],
        &["--bundle", "no/such/file"],
        &["--filter", "no such case"],
        &["--quick", "--full"],
        &["--repeats", "0"],
    ] {
        assert_eq!(code(arguments), Some(5), "{arguments:?}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_str().expect("a path");
    assert_eq!(code(&["--device", "cpu", "--filter", "empty", "--json", path]), Some(5), "a folder is no file");
}

#[test]
fn help_documents_the_exit_codes() {
    let output = validate(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8(output.stdout).expect("UTF-8").contains("1 a wrong result"));
}
