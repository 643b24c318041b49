//! The document that `benches/tests/test_crosscheck.py` checks with scipy is what the statistics make of its samples.
//!
//! `REGENERATE=1 cargo test -p flashcore-rs --features validate --test crosscheck` writes it anew.

#![cfg(feature = "validate")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};

use flashcore::validate::stats::{self, Block, Settings};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const SETTINGS: Settings = Settings { margin: 0.005, alpha: 0.05, power: 0.95, seed: 7 };
const MIN_SM_SHARE: f64 = 0.75;

/// A sample as it is in the raw file.
#[derive(Clone, Copy)]
struct Sample {
    case: usize,
    mode: &'static str,
    process: usize,
    block: usize,
    position: usize,
    arm: usize,
    ns: f64,
    sm_mhz: Option<f64>,
}

/// What a case's samples are drawn from.
struct Source {
    case: usize,
    mode: &'static str,
    processes: usize,
    blocks: usize,
    samples: usize,
    ratio: f64,
    /// Steps of the clock in a typical time, and nanoseconds in a step.
    steps: f64,
    step: f64,
    /// Share of a typical time that noise adds at most.
    noise: f64,
    /// Whether the clock of the multiprocessors is known.
    clocked: bool,
}

/// A regression with a throttled spell and a change of level; one that passes; one with too few processes; times without a
/// step; and times that are all the same.
const SOURCES: [Source; 5] = [
    Source {
        case: 0,
        mode: "cold",
        processes: 6,
        blocks: 6,
        samples: 8,
        ratio: 1.06,
        steps: 700.0,
        step: 32.0,
        noise: 0.02,
        clocked: true,
    },
    Source {
        case: 1,
        mode: "cold",
        processes: 6,
        blocks: 4,
        samples: 5,
        ratio: 1.0,
        steps: 5000.0,
        step: 32.0,
        noise: 0.002,
        clocked: true,
    },
    Source {
        case: 2,
        mode: "cold",
        processes: 3,
        blocks: 3,
        samples: 4,
        ratio: 1.02,
        steps: 900.0,
        step: 32.0,
        noise: 0.01,
        clocked: true,
    },
    Source {
        case: 0,
        mode: "call",
        processes: 5,
        blocks: 3,
        samples: 4,
        ratio: 1.003,
        steps: 1e9,
        step: 1e-5,
        noise: 0.05,
        clocked: false,
    },
    Source {
        case: 1,
        mode: "call",
        processes: 5,
        blocks: 2,
        samples: 3,
        ratio: 1.0,
        steps: 40.0,
        step: 1000.0,
        noise: 0.0,
        clocked: false,
    },
];

/// Draws the samples in time order, with sums and products only, so that they are the same on every machine.
fn draw() -> Vec<Sample> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut samples = Vec::new();
    for source in &SOURCES {
        for process in 0..source.processes {
            let shared = source.noise * (rng.random::<f64>() - 0.5);
            let mut walk = 0.0;
            for block in 0..source.blocks {
                let first = usize::from(rng.random_bool(0.5));
                for position in 0..2 * source.samples {
                    let arm = if position < source.samples { first } else { 1 - first };
                    walk = 0.5 * walk + source.noise * (rng.random::<f64>() + rng.random::<f64>() - 1.0) / 2.0;
                    let throttled = source.clocked && process == 2 && block == 1 && position % 7 == 3;
                    let level = if source.case == 0 && process == 1 && block >= 3 { 4.0 * source.noise } else { 0.0 };
                    let late = if throttled { 0.4 } else { 0.0 };
                    let ratio = if arm == 1 { source.ratio } else { 1.0 };
                    let ns = (source.steps * (1.0 + shared + walk + level + late) * ratio).round() * source.step;
                    let sm_mhz = source.clocked.then_some(if throttled { 1200.0 } else { 1980.0 });
                    let Source { case, mode, .. } = *source;
                    samples.push(Sample { case, mode, process, block, position, arm, ns, sm_mhz });
                }
            }
        }
    }
    samples
}

fn csv(samples: &[Sample]) -> String {
    let mut text = String::from("case,mode,process,block,position,arm,ns,sm_mhz\n");
    for Sample { case, mode, process, block, position, arm, ns, sm_mhz } in samples {
        let sm_mhz = sm_mhz.map(|mhz| mhz.to_string()).unwrap_or_default();
        writeln!(text, "{case},{mode},{process},{block},{position},{arm},{ns},{sm_mhz}").expect("writes to memory");
    }
    text
}

/// The samples of one case and mode that the rule for slow clocks keeps.
fn kept(samples: &[Sample], case: usize, mode: &str) -> Vec<Sample> {
    let all: Vec<Sample> = samples.iter().filter(|s| s.case == case && s.mode == mode).copied().collect();
    let limit =
        stats::median(&all.iter().filter_map(|sample| sample.sm_mhz).collect::<Vec<_>>()).map(|mhz| MIN_SM_SHARE * mhz);
    all.into_iter()
        .filter(|sample| !matches!((sample.sm_mhz, limit), (Some(mhz), Some(limit)) if mhz < limit))
        .collect()
}

fn series(samples: &[Sample], arm: usize) -> Vec<Vec<f64>> {
    let mut processes: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    for sample in samples.iter().filter(|sample| sample.arm == arm) {
        processes.entry(sample.process).or_default().push(sample.ns);
    }
    processes.into_values().collect()
}

fn blocks(samples: &[Sample]) -> Vec<Vec<Block>> {
    let mut processes: BTreeMap<usize, BTreeMap<usize, Block>> = BTreeMap::new();
    for sample in samples {
        let block = processes.entry(sample.process).or_default().entry(sample.block).or_default();
        block.arms[sample.arm].push(sample.ns);
    }
    processes.into_values().map(|blocks| blocks.into_values().collect()).collect()
}

fn rows(samples: &[Sample]) -> Vec<Value> {
    let mut rows = Vec::new();
    for mode in ["cold", "call"] {
        let cases: Vec<usize> = SOURCES.iter().filter(|source| source.mode == mode).map(|source| source.case).collect();
        let mut comparisons = Vec::new();
        for &case in &cases {
            let kept = kept(samples, case, mode);
            for arm in 0..2 {
                let series = series(&kept, arm);
                let timer = json!({ "quantum_ns": stats::quantum(&series.concat()) });
                let stats = stats::describe(&series).expect("there are samples");
                rows.push(json!({ "kind": "measure", "case_index": case, "mode": mode, "arm": arm, "timer": timer, "stats": stats }));
            }
            comparisons.push(stats::compare(&blocks(&kept), &SETTINGS).expect("there are processes"));
        }
        let judged = stats::judge_suite(&comparisons, &SETTINGS);
        for ((case, comparison), judged) in cases.iter().zip(comparisons).zip(judged) {
            rows.push(json!({ "kind": "compare", "case_index": case, "mode": mode, "comparison": comparison, "judged": judged }));
        }
    }
    rows
}

fn document(samples: &[Sample], raw: &Path) -> Value {
    let bytes = std::fs::read(raw).expect("the raw file");
    let sha256: String = Sha256::digest(&bytes).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writes to memory");
        text
    });
    json!({
        "schema": "flashcore.evidence/1",
        "topic": "crosscheck",
        "commit": "",
        "env": {},
        "protocol": {
            "margin": SETTINGS.margin, "alpha": SETTINGS.alpha, "power": SETTINGS.power, "confidence": 0.95,
            "seed": SETTINGS.seed, "min_sm_share": MIN_SM_SHARE,
        },
        "raw": {
            "path": raw.file_name().and_then(|name| name.to_str()),
            "sha256": sha256,
            "columns": ["case", "mode", "process", "block", "position", "arm", "ns", "sm_mhz"],
        },
        "rows": rows(samples),
    })
}

/// Where two documents differ by more than the mathematical functions of different machines do.
fn differences(one: &Value, other: &Value, path: &str) -> Vec<String> {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) if one.len() == other.len() => one
            .iter()
            .flat_map(|(key, value)| {
                differences(value, other.get(key).unwrap_or(&Value::Null), &format!("{path}.{key}"))
            })
            .collect(),
        (Value::Array(one), Value::Array(other)) if one.len() == other.len() => one
            .iter()
            .zip(other)
            .enumerate()
            .flat_map(|(i, (one, other))| differences(one, other, &format!("{path}[{i}]")))
            .collect(),
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap_or(f64::NAN), b.as_f64().unwrap_or(f64::NAN));
            let same = (a - b).abs() <= 1e-11 * a.abs().max(b.abs()) + 1e-15;
            if same { Vec::new() } else { vec![format!("{path}: {a} and {b}")] }
        }
        _ if one == other => Vec::new(),
        _ => vec![format!("{path}: {one} and {other}")],
    }
}

#[test]
fn the_committed_document_is_what_the_statistics_give() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../benches/tests/data");
    let (raw, json) = (folder.join("crosscheck.csv.gz"), folder.join("crosscheck.json"));
    let samples = draw();
    if std::env::var_os("REGENERATE").is_some() {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
        gzip.write_all(csv(&samples).as_bytes()).expect("compresses");
        std::fs::write(&raw, gzip.finish().expect("compresses")).expect("writes");
        let text = serde_json::to_string_pretty(&document(&samples, &raw)).expect("is JSON");
        std::fs::write(&json, text + "\n").expect("writes");
    }
    let mut text = String::new();
    GzDecoder::new(std::fs::File::open(&raw).expect("the raw file")).read_to_string(&mut text).expect("is gzip");
    assert!(text == csv(&samples), "the raw samples are not those of this test");
    let committed: Value = serde_json::from_slice(&std::fs::read(&json).expect("the document")).expect("is JSON");
    let differences = differences(&committed, &document(&samples, &raw), "");
    assert!(differences.is_empty(), "{differences:#?}");
}
