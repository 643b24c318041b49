//! A run beside an earlier one, from their files.
//!
//! Times of different runs can be compared only where they were taken on the same kind of machine. Runs with a reference
//! arm are an exception: what is compared is then how the candidate's time relates to that of the reference, measured in
//! turns with it. That is how a baseline in a repository can gate runs on machines that nobody chose.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::case::Case;
use super::environment::Environment;
use super::measure::{Mode, Protocol, Sample, Source};
use super::open::json;
use super::report::Evidence;
use super::stats::compare_unpaired;
use super::summary::{CompareRow, Compared, Grouped, MeasureRow, Measured, judged};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// A run that was written to a file, with its samples.
#[derive(Clone, Debug)]
pub struct Document {
    /// Where it is.
    pub path: PathBuf,
    /// What was written.
    pub evidence: Evidence,
    /// The samples that it names.
    pub samples: Vec<Sample>,
    /// How it was measured.
    pub protocol: Protocol,
    /// The cases, by index.
    pub cases: Vec<Case>,
}

impl Document {
    /// Reads a document and its samples.
    ///
    /// # Errors
    /// When one of them is not there, is not what was written, or is not of a measurement.
    pub fn read(path: &Path) -> Result<Self> {
        let evidence: Evidence = json(path)?;
        let (Some(raw), Some(protocol)) = (&evidence.raw, &evidence.protocol) else {
            return Err(format!("{}: no samples; give a file that `measure` or `compare` wrote", path.display()).into());
        };
        let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        protocol.check().map_err(|error| named(&error))?;
        let (samples, protocol) = (raw.read(path)?, protocol.clone());
        let cases = cases(&evidence).map_err(|error| named(&error))?;
        let arms = evidence.arms.len();
        if !(1..=2).contains(&arms) {
            return Err(named(&format_args!("{arms} arms; one, or a baseline and a candidate")).into());
        }
        if let Some(sample) = samples.iter().find(|sample| !sample.fits(cases.len(), arms, &protocol.modes)) {
            return Err(named(&format_args!("{sample:?} is of nothing that the document has, or no time")).into());
        }
        Ok(Self { path: path.into(), evidence, samples, protocol, cases })
    }

    /// What its rows are made from.
    pub fn measured(&self) -> Measured<'_> {
        Measured {
            cases: &self.cases,
            arms: &self.evidence.arms,
            protocol: &self.protocol,
            processes: &self.evidence.processes,
            samples: &self.samples,
            device: self.evidence.env.gpu.as_ref().map_or("", |gpu| &gpu.name),
        }
    }

    /// Whether its unit is a reference that was measured in turns with the arm.
    pub(super) fn is_relative(&self) -> bool {
        self.evidence.arms.len() == 2
            && self.evidence.arms[0] == super::measure::ArmSpec::from(Source::Reference).to_string()
    }

    fn name(&self) -> String {
        let arm = self.evidence.arms.last().map_or("", String::as_str);
        match self.path.file_name() {
            Some(file) => format!("{arm} ({})", file.to_string_lossy()),
            None => format!("{arm} now"),
        }
    }
}

/// The cases of a document's rows, by index.
fn cases(evidence: &Evidence) -> Result<Vec<Case>> {
    let mut cases: Vec<Option<Case>> = Vec::new();
    for row in evidence.of_kind("measure") {
        let row: MeasureRow = serde_json::from_value(row.clone())?;
        if row.case_index >= evidence.rows.len() {
            return Err(format!("case {} of {} rows", row.case_index, evidence.rows.len()).into());
        }
        cases.resize(cases.len().max(row.case_index + 1), None);
        cases[row.case_index] = Some(row.case);
    }
    cases.into_iter().collect::<Option<_>>().ok_or_else(|| "a case without a row".into())
}

/// Compares the cases and modes that both runs have, by the candidate's protocol.
///
/// # Errors
/// When the machines differ and there is no reference, or the runs have nothing in common.
pub fn compare_documents(baseline: &Document, candidate: &Document) -> Result<Vec<CompareRow>> {
    let relative = baseline.is_relative() && candidate.is_relative();
    if !relative {
        same_machine(&baseline.evidence.env, &candidate.evidence.env)?;
    }
    let theirs: HashMap<String, usize> =
        baseline.cases.iter().enumerate().map(|(index, case)| (case.to_string(), index)).collect();
    let protocol = &candidate.protocol;
    let (old, new) = (baseline.measured().grouped(), candidate.measured().grouped());
    // The times of the last arm by process, in the documents' unit.
    let series = |document: &Document, samples: &Grouped<'_>, case: usize, mode: Mode| match relative {
        true => samples.ratios(case, mode),
        false => samples.times(case, mode, document.evidence.arms.len() - 1),
    };
    let [from, to] = [baseline.name(), candidate.name()];
    let mut rows = Vec::new();
    for &mode in &protocol.modes {
        let both = candidate.cases.iter().enumerate().filter_map(|(case_index, case)| {
            let name = case.to_string();
            let &theirs = theirs.get(&name)?;
            let discarded = old.discarded(theirs, mode).max(new.discarded(case_index, mode));
            let times = [series(baseline, &old, theirs, mode), series(candidate, &new, case_index, mode)];
            let comparison = compare_unpaired(&times[0], &times[1], &protocol.settings())?;
            Some(Compared { case_index, name, comparison, discarded })
        });
        rows.extend(judged(both.collect(), mode, [&from, &to], protocol));
    }
    if rows.is_empty() {
        let (one, other) = (baseline.path.display(), candidate.path.display());
        return Err(format!("{one} and {other} have no case and mode in common, with two processes each").into());
    }
    Ok(rows)
}

/// Times of one machine are those of the other only where both are of one kind.
pub(super) fn same_machine(one: &Environment, other: &Environment) -> Result<()> {
    let machine = |env: &Environment| match &env.gpu {
        Some(gpu) => {
            let power_cap = gpu.board.as_ref().and_then(|board| board.power_cap_w);
            let power_cap = power_cap.map_or_else(|| "an unknown power cap".into(), |watts| format!("{watts} W"));
            format!("{} at {power_cap} with {}", gpu.name, env.cpu)
        }
        None => format!("{}, {} threads", env.cpu, env.threads),
    };
    let (one, other) = (machine(one), machine(other));
    if one == other {
        return Ok(());
    }
    Err(format!(
        "the baseline is of {one}, this is {other}: times of different machines say nothing about the code. Measure a \
                 baseline here, or, on the CPU, both with the reference arm"
    )
    .into())
}
