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

/// What a command wrote to FILE.json in a folder.
fn json(folder: &tempfile::TempDir, file: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(folder.path().join(file)).expect("a file")).expect("a JSON document")
}

fn path(folder: &tempfile::TempDir, file: &str) -> String {
    folder.path().join(file).to_str().expect("a path").to_owned()
}

fn kinds(document: &serde_json::Value, kind: &str) -> usize {
    document["rows"].as_array().expect("rows").iter().filter(|row| row["kind"] == kind).count()
}

#[test]
fn passes_and_writes_evidence() {
    let folder = tempfile::tempdir().expect("a folder");
    let files = ["--json", "run.json", "--junit", "run.xml", "--markdown", "run.md"];
    let files = files.map(|word| if word.starts_with("run") { path(&folder, word) } else { word.into() });
    let arguments =
        ["correct", "--device", "cpu", "--filter", "head_dim d8", "--seed", "5", "--repeats", "3", "--commit", "abc"];
    assert_eq!(code(&[&arguments[..], &files.each_ref().map(String::as_str)].concat()), Some(0));
    let evidence = json(&folder, "run.json");
    assert_eq!((&evidence["topic"], &evidence["commit"]), (&"correctness".into(), &"abc".into()));
    assert_eq!((&evidence["env"]["device"], &evidence["env"]["seed"]), (&"cpu".into(), &5.into()));
    assert!(kinds(&evidence, "correct") >= 4 && kinds(&evidence, "repeat") >= 4, "{evidence}");
    assert!(evidence["rows"].as_array().expect("rows").iter().all(|row| row["correct"] == true));
    let read = |file| std::fs::read_to_string(folder.path().join(file)).expect("a file");
    assert!(read("run.xml").contains("<testsuite name=\"correct\"") && read("run.md").contains("| head_dim |"));
}

/// A small case, so that a sample takes no time.
const SMALL: &str = "[protocol]\nprocesses = 5\nblocks = 3\nsamples = 3\nwarmup = 5\n\n\
    [[case]]\nbatch = 1\nnum_heads_q = 2\nseq_len_q = 64\nhead_dim = 32\n";

fn small(folder: &tempfile::TempDir) -> String {
    std::fs::write(folder.path().join("cases.toml"), SMALL).expect("a file");
    path(folder, "cases.toml")
}

#[test]
fn measures_replays_and_reports() {
    let folder = tempfile::tempdir().expect("a folder");
    let (cases, run) = (small(&folder), path(&folder, "run.json"));
    let output = stdout(&["measure", "--device", "cpu", "--cases", &cases, "--json", &run]);
    assert!(output.contains("file/f16 b1 h2 s64 d32") && output.trim_end().ends_with("PASS"), "{output}");
    let document = json(&folder, "run.json");
    assert_eq!((kinds(&document, "measure"), document["processes"].as_array().map(Vec::len)), (1, Some(5)));
    assert_eq!(kinds(&document, "correct"), 1, "what is measured is checked");
    let row = &document["rows"][1];
    assert_eq!((&row["mode"], &row["stats"]["samples"]), (&"call".into(), &45.into()));
    assert_eq!(document["raw"]["path"], "run.samples.csv.gz");

    assert_eq!(code(&["replay", &run]), Some(0));
    assert!(stdout(&["report", &run]).contains("file/f16 b1 h2 s64 d32"));

    // A figure that the samples do not give is found, and so are other samples.
    let forged = std::fs::read_to_string(folder.path().join("run.json"))
        .expect("a file")
        .replace("\"samples\": 45", "\"samples\": 46");
    std::fs::write(folder.path().join("run.json"), forged).expect("a file");
    let replayed = validate(&["replay", &run]);
    assert_eq!(replayed.status.code(), Some(6));
    assert!(
        String::from_utf8_lossy(&replayed.stdout).contains("DIFFERENT: measure[0].stats.samples: 46 in the file, 45")
    );
    std::fs::write(folder.path().join("run.samples.csv.gz"), b"no samples").expect("a file");
    assert_eq!(code(&["replay", &run]), Some(5));
}

#[test]
fn a_baseline_gates_what_comes_after() {
    let folder = tempfile::tempdir().expect("a folder");
    let (cases, old, new) = (small(&folder), path(&folder, "old.json"), path(&folder, "new.json"));
    let measure =
        |file: &str| code(&["measure", "--device", "cpu", "--against", "reference", "--cases", &cases, "--json", file]);
    assert_eq!((measure(&old), measure(&new)), (Some(0), Some(0)));
    let compare =
        |more: &[&str]| code(&[&["compare", "--device", "cpu", "--baseline", &old, "--margin", "20"], more].concat());
    assert_eq!(compare(&["--candidate", &new]), Some(0), "files");
    let json_file = path(&folder, "against.json");
    assert_eq!(compare(&["--json", &json_file]), Some(0), "a file and a run");
    let document = json(&folder, "against.json");
    assert_eq!((kinds(&document, "baseline"), document["arms"][0].as_str()), (1, Some("reference")));

    // A baseline a hundred times faster than it was makes today's code a regression.
    let text = std::fs::read(folder.path().join("old.samples.csv.gz")).expect("a file");
    let mut samples = String::new();
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(text.as_slice()), &mut samples).expect("text");
    let faster: String = samples.lines().map(|line| faster(line) + "\n").collect();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gzip, faster.as_bytes()).expect("bytes");
    let bytes = gzip.finish().expect("bytes");
    std::fs::write(folder.path().join("old.samples.csv.gz"), &bytes).expect("a file");
    let mut document = json(&folder, "old.json");
    document["raw"]["sha256"] = flashcore::testing::sha256(&bytes).into();
    std::fs::write(folder.path().join("old.json"), document.to_string()).expect("a file");
    assert_eq!(compare(&["--candidate", &new]), Some(2));
}

/// A line of samples whose candidate took a hundredth of the time.
fn faster(line: &str) -> String {
    let mut cells: Vec<String> = line.split(',').map(str::to_owned).collect();
    if cells[5] == "1" {
        cells[6] = (cells[6].parse::<f64>().expect("a number") / 100.0).to_string();
    }
    cells.join(",")
}

#[test]
fn times_of_another_machine_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let (cases, run) = (small(&folder), path(&folder, "run.json"));
    assert_eq!(code(&["measure", "--device", "cpu", "--cases", &cases, "--json", &run]), Some(0));
    let mut document = json(&folder, "run.json");
    document["env"]["cpu"] = "another".into();
    std::fs::write(folder.path().join("other.json"), document.to_string()).expect("a file");
    let output =
        validate(&["compare", "--device", "cpu", "--baseline", &path(&folder, "other.json"), "--candidate", &run]);
    assert_eq!(output.status.code(), Some(5));
    assert!(String::from_utf8_lossy(&output.stderr).contains("times of different machines"));
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
        &["correct", "--repeats", "0"],
        &["measure", "--device", "cpu", "--modes", "graph"],
        &["measure", "--cases", "no/such/file"],
        &["compare", "--device", "cpu", "--baseline", "no such arm"],
        &["compare", "--device", "cpu", "--baseline", "cpu", "--processes", "1", "--filter", "s128 b8"],
        &["compare", "--device", "cpu", "--baseline", "cpu", "--margin=-1", "--filter", "s128 b8"],
        &["compare", "--device", "cpu", "--baseline", "a", "--worker", "true", "--filter", "s128 b8"],
        &["measure", "--device", "cpu", "--margin", "nan", "--filter", "s128 b8"],
        &["measure", "--device", "cpu", "--json", "no/such/folder/run.json"],
        &["dump", "unused", "--filter", "no such case"],
        &["replay", "no/such/file"],
    ] {
        assert_eq!(code(arguments), Some(5), "{arguments:?}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_str().expect("a path");
    assert_eq!(code(&["--device", "cpu", "--filter", "empty", "--json", path]), Some(5), "a folder is no file");
}

#[test]
fn a_protocol_that_measures_nothing_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    for (from, to) in [("samples = 3", "samples = 0"), ("warmup = 5", "alpha = 2.0"), ("warmup = 5", "modes = []")] {
        let cases = path(&folder, "cases.toml");
        std::fs::write(&cases, SMALL.replace(from, to)).expect("a file");
        for command in [&["measure"][..], &["compare", "--baseline", "cpu"]] {
            let output = validate(&[command, &["--device", "cpu", "--cases", &cases]].concat());
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(5), "{to}: {said}");
            assert!(said.contains(to.split(' ').next().expect("a word")) && said.contains("accepted"), "{said}");
        }
    }
}

#[test]
fn a_worker_that_does_not_measure_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let cases = small(&folder);
    for (worker, said) in
        [("true", "samples, not 18"), ("false", "ended with"), ("echo hi", "wrote \"hi measure-process 0\"")]
    {
        let arms = ["compare", "--device", "cpu", "--baseline", "a", "--candidate", "b", "--cases", &cases];
        let output = validate(&[&arms[..], &["--worker", worker]].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(5), "{worker}: {error}");
        assert!(error.contains("process 0 that measures") && error.contains(said), "{worker}: {error}");
    }
}

#[test]
fn compares_what_a_baseline_file_has() {
    let folder = tempfile::tempdir().expect("a folder");
    let (cases, old) = (small(&folder), path(&folder, "old.json.gz"));
    assert_eq!(code(&["measure", "--device", "cpu", "--cases", &cases, "--json", &old]), Some(0));
    let compare = |more: &[&str]| {
        let output = validate(&[&["compare", "--device", "cpu", "--margin", "20", "--baseline", &old], more].concat());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(compare(&["--candidate", &old]).0, Some(0), "compressed documents");
    assert_eq!(compare(&[]).0, Some(0));
    assert_eq!(compare(&["--list"]).0, Some(0));
    let (exit, said) = compare(&["--cases", &cases]);
    assert!(exit == Some(5) && said.contains("--cases"), "{said}");
    let (exit, said) = compare(&["--filter", "nothing"]);
    assert!(exit == Some(5) && said.contains("no case"), "{said}");
}

#[test]
fn one_report_has_the_results_of_every_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let [one, other, xml, md] = ["one.json", "other.json.gz", "all.xml", "all.md"].map(|file| path(&folder, file));
    for (filter, file) in [("empty", &one), ("head_dim", &other)] {
        assert_eq!(code(&["correct", "--quick", "--device", "cpu", "--filter", filter, "--json", file]), Some(0));
    }
    assert_eq!(code(&["report", &one, &other, "--junit", &xml, "--markdown", &md]), Some(0));
    for file in [xml, md] {
        let text = std::fs::read_to_string(file).expect("a file");
        assert!(text.contains("empty") && text.contains("head_dim"), "{text}");
    }
}

#[test]
fn help_documents_the_exit_codes() {
    let output = validate(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8(output.stdout).expect("UTF-8").contains("1 a wrong result"));
}
