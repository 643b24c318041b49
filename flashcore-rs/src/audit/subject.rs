//! What is audited: the code of a bundle, or of files.

use std::collections::BTreeMap;

use super::findings::Kind;
use super::report::{Counts, Report, Verdict};
use super::tools::{Tool, ToolError};
use super::{Facts, elf, judge, opcodes};
use crate::bundle::manifest::CodeKind;
use crate::bundle::{Bundle, sha256_hex};

/// What to assemble PTX for, that runs wherever the PTX does.
const ASSEMBLE_FOR: &str = "sm_80";

/// A member of a bundle, or a file.
#[derive(Clone, Debug)]
pub enum Code {
    /// Machine code.
    Cubin(Vec<u8>),
    /// Text that the driver compiles; it is assembled to be audited.
    Ptx(Vec<u8>),
}

/// One piece of code, however many kernels have it.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The kernels that have this code.
    pub names: Vec<String>,
    /// The architecture it is for.
    pub arch: String,
    /// The code.
    pub code: Code,
    /// What is known about it.
    pub facts: Facts,
}

impl Subject {
    /// The code of a bundle; code that several variants share is there once, unless they differ in what they declare.
    pub fn of_bundle(bundle: &Bundle) -> Vec<Self> {
        let manifest = bundle.manifest();
        let mut subjects: BTreeMap<(&str, u32, u32), Self> = BTreeMap::new();
        for variant in &manifest.variants {
            for launch in &variant.launches {
                let key = (launch.code.sha256.as_str(), launch.tile_bytes, launch.block_threads);
                let subject = subjects.entry(key).or_insert_with(|| {
                    let bytes = bundle.member(&launch.code).unwrap_or_default().to_vec();
                    let code = match launch.code.kind {
                        CodeKind::Cubin => Code::Cubin(bytes),
                        CodeKind::Ptx => Code::Ptx(bytes),
                    };
                    let facts = Facts { threads: launch.block_threads, tile_bytes: launch.tile_bytes };
                    Self { names: Vec::new(), arch: manifest.arch.clone(), code, facts }
                });
                subject.names.push(format!("{}/{}", variant.name, launch.kernel));
            }
        }
        subjects.into_values().collect()
    }

    /// Audits it.
    ///
    /// # Errors
    /// [`ToolError`] if a tool is missing. A tool that refuses the code is a verdict.
    pub fn audit(&self, disassembler: &Tool, assembler: Option<&Tool>) -> Result<Report, ToolError> {
        let (Code::Cubin(bytes) | Code::Ptx(bytes)) = &self.code;
        let mut report = Report {
            names: self.names.clone(),
            arch: self.arch.clone(),
            sha256: sha256_hex(bytes),
            assembled: None,
            verdict: Verdict::NotAudited,
            reason: None,
            counts: Counts::default(),
            found: BTreeMap::new(),
            findings: Vec::new(),
        };
        let cubin = match &self.code {
            Code::Cubin(cubin) => Ok(cubin.clone()),
            Code::Ptx(ptx) => {
                let assembler = assembler.map_or_else(|| Tool::assembler(None), |tool| Ok(tool.clone()))?;
                report.assembled = Some(format!("ptxas {} for {ASSEMBLE_FOR}", assembler.version));
                assembler.assemble(ptx, ASSEMBLE_FOR)
            }
        };
        let judged =
            cubin.map_err(|error| error.to_string()).and_then(|cubin| inspect(&cubin, self.facts, disassembler));
        match judged {
            Err(reason) => report.reason = Some(reason),
            Ok((findings, counts)) => {
                findings.iter().for_each(|finding| *report.found.entry(finding.kind).or_insert(0) += 1);
                let leaks = report.found.keys().copied().any(Kind::is_leak);
                report.verdict = if leaks { Verdict::Fail } else { Verdict::Pass };
                (report.findings, report.counts) = (findings, counts);
            }
        }
        Ok(report)
    }
}

fn inspect(cubin: &[u8], facts: Facts, disassembler: &Tool) -> super::Judged {
    let code = elf::code_bytes(cubin);
    let listing = disassembler.disassemble(cubin).map_err(|error| error.to_string())?;
    let (findings, mut counts) = judge(&listing, facts)?;
    counts.instructions = code.values().sum::<u64>() / opcodes::SIZE as u64;
    if counts.instructions != counts.understood || counts.instructions == 0 {
        let Counts { instructions, understood, .. } = counts;
        return Err(format!("the cubin has {instructions} instructions, the listing {understood}"));
    }
    Ok((findings, counts))
}
