//! What is kept of a run: rows with their environment as JSON, and tables for people.

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use serde_json::Value;

use super::case::Case;
use super::correct::Verdict;
use super::measure::{Measurement, Summary};
use crate::runtime::Runtime;
use crate::tensor::Device;

/// Format of the JSON.
const SCHEMA: &str = "flashcore.evidence/1";

/// A run as JSON.
#[derive(Clone, Debug, Serialize)]
pub struct Evidence {
    /// Format of the JSON.
    pub schema: &'static str,
    /// What the run is about.
    pub topic: String,
    /// Commit of the sources, as the caller says.
    pub commit: String,
    /// Where it ran.
    pub env: Environment,
    /// One row per result; `kind` says which.
    pub rows: Vec<Value>,
}

impl Evidence {
    /// A run without rows yet.
    pub fn new(topic: &str, commit: &str, env: Environment) -> Self {
        Self { schema: SCHEMA, topic: topic.into(), commit: commit.into(), env, rows: Vec::new() }
    }
}

/// Where a run ran.
#[derive(Clone, Debug, Serialize)]
pub struct Environment {
    /// Version of this crate.
    pub flashcore: &'static str,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Why this device, when it was not asked for.
    pub why: Option<String>,
    /// The GPU.
    pub gpu: Option<Gpu>,
    /// The machine code.
    pub bundle: Option<BundleRecord>,
    /// The host's processor.
    pub cpu: String,
    /// Threads of the CPU backend.
    pub threads: usize,
    /// Operating system and architecture.
    pub platform: String,
    /// The inputs' seed.
    pub seed: u64,
}

/// A GPU and its driver.
#[derive(Clone, Debug, Serialize)]
pub struct Gpu {
    /// Marketing name.
    pub name: String,
    /// Compute capability.
    pub compute_capability: String,
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Device memory in bytes.
    pub total_memory: usize,
    /// CUDA version of the driver.
    pub cuda: String,
}

/// Which machine code ran.
#[derive(Clone, Debug, Serialize)]
pub struct BundleRecord {
    /// Its architecture.
    pub arch: String,
    /// Hash of the bundle file.
    pub sha256: String,
    /// Number of variants.
    pub variants: usize,
    /// The Triton that compiled it.
    pub triton: String,
    /// The assembler.
    pub ptxas: String,
}

impl Environment {
    /// Describes a runtime. `bundle` are the bytes of a bundle that is not embedded.
    pub fn of(runtime: &Runtime, why: Option<String>, bundle: Option<&[u8]>, seed: u64) -> Self {
        let gpu = runtime.device_info().map(|info| Gpu {
            name: info.name.clone(),
            compute_capability: format!("{}.{}", info.compute_capability.0, info.compute_capability.1),
            sm_count: info.sm_count,
            total_memory: info.total_memory,
            cuda: format!("{}.{}", info.driver_version / 1000, info.driver_version % 1000 / 10),
        });
        let record = runtime.manifest().map(|manifest| BundleRecord {
            arch: manifest.arch.clone(),
            sha256: bundle.or_else(|| embedded(&manifest.arch)).map(crate::bundle::sha256_hex).unwrap_or_default(),
            variants: manifest.variants.len(),
            triton: manifest.compiler.triton.clone(),
            ptxas: manifest.compiler.ptxas.clone(),
        });
        Self {
            flashcore: env!("CARGO_PKG_VERSION"),
            device: runtime.device().to_string(),
            why,
            gpu,
            bundle: record,
            cpu: processor(),
            threads: rayon::current_num_threads(),
            platform: format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
            seed,
        }
    }

    /// One line for people.
    pub fn summary(&self) -> String {
        let on = match (&self.gpu, &self.bundle) {
            (Some(gpu), Some(bundle)) => {
                format!("{} ({}), CUDA {}, bundle {}", self.device, gpu.name, gpu.cuda, bundle.arch)
            }
            _ => format!("the CPU backend, {} threads of {}", self.threads, self.cpu),
        };
        let why = self.why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        format!("flashcore {} on {on}{why}, seed {}", self.flashcore, self.seed)
    }
}

#[cfg(feature = "cuda")]
fn embedded(arch: &str) -> Option<&'static [u8]> {
    crate::bundle::embedded().iter().find(|(name, _)| *name == arch).map(|(_, bytes)| *bytes)
}

#[cfg(not(feature = "cuda"))]
fn embedded(_: &str) -> Option<&'static [u8]> {
    None
}

fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| std::env::consts::ARCH.into(), |(_, name)| name.trim().into())
}

/// One case of the correctness matrix.
#[derive(Clone, Debug, Serialize)]
pub struct CorrectRow {
    /// Name of the case.
    pub name: String,
    /// The case.
    pub case: Case,
    /// How often it ran.
    pub repeats: usize,
    /// What became of it.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// Seconds, oracle included.
    pub seconds: f64,
}

/// One measured configuration.
#[derive(Clone, Debug, Serialize)]
pub struct MeasureRow {
    /// Name of the case.
    pub name: String,
    /// The case.
    pub case: Case,
    /// Whether it is right.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// How fast it is.
    #[serde(flatten)]
    pub measurement: Measurement,
}

/// A row as JSON, tagged with its kind.
pub(super) fn row(kind: &str, row: &impl Serialize) -> serde_json::Result<Value> {
    let mut value = serde_json::to_value(row)?;
    if let Value::Object(fields) = &mut value {
        fields.insert("kind".into(), kind.into());
    }
    Ok(value)
}

/// What one family of cases came to.
struct Family<'a> {
    name: &'a str,
    rows: Vec<&'a CorrectRow>,
}

impl Family<'_> {
    fn cells(&self) -> Vec<String> {
        let errors = || self.rows.iter().filter_map(|row| row.verdict.error.as_ref());
        let worst = |figures: &mut dyn Iterator<Item = f64>| figures.filter(|x| x.is_finite()).fold(0.0, f64::max);
        let ratios: Vec<f64> = errors().map(|e| e.ratio).filter(|r| *r > 0.0 && r.is_finite()).collect();
        let geomean = (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len().max(1) as f64).exp();
        let lse = self.rows.iter().filter_map(|row| row.verdict.lse.as_ref());
        vec![
            self.name.into(),
            self.rows.len().to_string(),
            self.rows.iter().filter(|row| row.verdict.pass).count().to_string(),
            format!("{:.2}", worst(&mut errors().filter(|e| e.bound > 0.0).map(|e| e.e / e.bound))),
            format!("{geomean:.2}"),
            format!("{:.1}", worst(&mut errors().map(|e| e.max_ulp))),
            format!("{:.2}", worst(&mut lse.map(|lse| lse.ratio))),
            format!("{:.1}", self.rows.iter().map(|row| row.seconds).sum::<f64>()),
        ]
    }
}

/// The correctness matrix by family.
pub(super) fn correct_table(rows: &[CorrectRow]) -> Table {
    let header =
        ["family", "cases", "pass", "worst error / bound", "geomean e / e_ref", "max ulp", "worst lse / bound", "s"];
    let mut table = new_table(&header);
    let mut families: Vec<Family<'_>> = Vec::new();
    for row in rows {
        match families.iter_mut().find(|family| family.name == row.case.family) {
            Some(family) => family.rows.push(row),
            None => families.push(Family { name: &row.case.family, rows: vec![row] }),
        }
    }
    families.push(Family { name: "all", rows: rows.iter().collect() });
    for family in families {
        table.add_row(family.cells());
    }
    table
}

/// Classes of inputs beside the reference.
pub(super) fn ct_time_table(rows: &[super::ct_time::Row]) -> Table {
    let header =
        ["kernel", "regime", "case", "class", "reference us", "us", "largest decile difference", "margin", "test"];
    let mut table = new_table(&header);
    for row in rows {
        let largest = row.test.deciles.iter().map(|difference| difference.abs()).fold(0.0, f64::max);
        table.add_row([
            row.subject.clone(),
            format!("{:?}", row.regime),
            row.case.clone(),
            format!("{:?}", row.class),
            format!("{:.3}", row.us[0].median),
            format!("{:.3}", row.us[1].median),
            format!("{largest:.4} +- {:.4}", row.test.band),
            format!("{:.4}", row.test.margin),
            format!("{:?}", row.test.outcome),
        ]);
    }
    table
}

/// The measured configurations.
pub(super) fn measure_table(rows: &[MeasureRow], device: Device) -> Table {
    let header =
        ["configuration", "variant", "correct", "call us", "min..max", "device us", "min..max", "TFLOP/s", "floor us"];
    let mut table = new_table(&header);
    for MeasureRow { case, verdict, measurement, .. } in rows {
        let figure = |summary: Option<Summary>| {
            summary.map_or(["-".into(), "-".into()], |s| {
                let digits = usize::from(device != Device::Cpu);
                [format!("{:.digits$}", s.median), format!("{:.digits$}..{:.digits$}", s.min, s.max)]
            })
        };
        let [call, call_range] = figure(Some(measurement.call_us));
        let [launch, launch_range] = figure(measurement.device_us);
        table.add_row([
            format!("S {} B {} H {} D {}", case.seq_len_q, case.batch, case.num_heads_q, case.head_dim_qk),
            verdict.variant.clone().unwrap_or_default(),
            if verdict.pass { "yes" } else { "NO" }.into(),
            call,
            call_range,
            launch,
            launch_range,
            format!("{:.3}", measurement.tflops),
            measurement.floor.map_or("-".into(), |floor| format!("{:.1}", floor.us())),
        ]);
    }
    table
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
