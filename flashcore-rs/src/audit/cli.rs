//! The command `flashcore-validate ct`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use rayon::prelude::*;
use serde_json::json;

use super::report::{Report, Verdict};
use super::tools::Tool;
use super::{Code, Facts, RULES, Subject, table};
use crate::bundle::{Bundle, embedded};
use crate::validate::Exit;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// What `ct` is told.
#[derive(Args, Clone, Debug, PartialEq)]
pub struct CtArguments {
    /// Bundles (.fcb), cubins (.cubin) or PTX (.ptx); the embedded bundles if there are none
    files: Vec<PathBuf>,
    /// Warnings (T4, T5) fail too
    #[arg(long)]
    strict: bool,
    /// The disassembler; otherwise $NVDISASM, or the one on the path
    #[arg(long, value_name = "FILE")]
    nvdisasm: Option<PathBuf>,
    /// The assembler for PTX; otherwise $PTXAS, or the one on the path
    #[arg(long, value_name = "FILE")]
    ptxas: Option<PathBuf>,
    /// Write the table as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Threads of a block, for files that are not bundles
    #[arg(long, default_value_t = 1024, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: u32,
    /// Bytes at the start of shared memory that hold tiles, for files that are not bundles
    #[arg(long, default_value_t = 0, value_name = "N")]
    tile_bytes: u32,
}

/// Audits, prints the table, and writes what was asked for.
///
/// # Errors
/// A file that cannot be read, or a tool that is missing.
pub fn run(arguments: &CtArguments, filter: &str, commit: &str, json: Option<&Path>) -> Result<(Exit, String)> {
    let disassembler = Tool::disassembler(arguments.nvdisasm.as_deref())?;
    let assembler = Tool::assembler(arguments.ptxas.as_deref()).ok();
    let mut subjects = arguments.subjects()?;
    let wanted = |name: &String| filter.split_whitespace().all(|word| name.contains(word));
    subjects.retain(|subject| subject.names.iter().any(wanted));
    if subjects.is_empty() {
        return Err("nothing to audit: name bundles, cubins or PTX files".into());
    }
    let start = Instant::now();
    let audit = |subject: &Subject| subject.audit(&disassembler, assembler.as_ref());
    let mut reports = subjects.par_iter().map(audit).collect::<Result<Vec<Report>, _>>()?;
    reports.sort_by(|one, other| (&one.arch, &one.names).cmp(&(&other.arch, &other.names)));
    let table = table::markdown(&reports);
    if let Some(path) = &arguments.markdown {
        write(path, &table)?;
    }
    if let Some(path) = json {
        let tools = json!({
            "nvdisasm": disassembler.version,
            "ptxas": assembler.map(|tool| tool.version),
            "rules": RULES,
            "seconds": start.elapsed().as_secs_f64().round(),
        });
        write(path, &evidence(&reports, commit, &tools)?)?;
    }
    let verdict = |report: &Report| if arguments.strict { report.strict() } else { report.verdict };
    let pass = reports.iter().all(|report| verdict(report) == Verdict::Pass);
    Ok((if pass { Exit::Pass } else { Exit::ConstantTime }, table))
}

impl CtArguments {
    fn subjects(&self) -> Result<Vec<Subject>> {
        let mut subjects = Vec::new();
        if self.files.is_empty() {
            for (_, bytes) in embedded() {
                subjects.extend(Subject::of_bundle(&Bundle::parse(bytes)?));
            }
        }
        for path in &self.files {
            let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
            let kind = path.extension().and_then(|extension| extension.to_str());
            let code = match kind {
                Some("fcb") => {
                    subjects.extend(Subject::of_bundle(&Bundle::parse(&bytes)?));
                    continue;
                }
                Some("ptx") => Code::Ptx(bytes),
                Some("cubin") => Code::Cubin(bytes),
                _ => return Err(format!("{}: expected a name in .fcb, .cubin or .ptx", path.display()).into()),
            };
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let facts = Facts { threads: self.threads, tile_bytes: self.tile_bytes };
            subjects.push(Subject { names: vec![name], arch: "file".into(), code, facts });
        }
        Ok(subjects)
    }
}

fn evidence(reports: &[Report], commit: &str, tools: &serde_json::Value) -> Result<String> {
    let row = |report: &Report| -> Result<serde_json::Value> {
        let mut row = serde_json::to_value(report)?;
        row["kind"] = "cubin".into();
        row["coverage"] = report.coverage().into();
        Ok(row)
    };
    let rows = reports.iter().map(row).collect::<Result<Vec<_>>>()?;
    let document = json!({
        "schema": "flashcore.evidence/1",
        "topic": "constant-trace",
        "commit": commit,
        "env": { "tools": tools },
        "rows": rows,
    });
    Ok(serde_json::to_string_pretty(&document)? + "\n")
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()).into())
}
