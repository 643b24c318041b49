//! `measure` and `compare`, and the processes that they start.

use std::ffi::OsString;
use std::io::{stdin, stdout};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use super::super::baseline::{Document, compare_documents, same_machine};
use super::super::case::Case;
use super::super::casefile::CaseFile;
use super::super::matrix::classic;
use super::super::measure::{ArmSpec, Mode, Protocol, Raw, Source, Suite, run_process, run_suite};
use super::super::report::Evidence;
use super::super::stats::{MIN_PROCESSES, Outcome};
use super::super::summary::CompareRow;
use super::super::ui::Ui;
use super::{Exit, Options, Result, Session, correct, list, open, ordinal};
use crate::runtime::Runtime;
use crate::tensor::Device;

/// What to measure.
#[derive(Args)]
pub(super) struct MeasureArguments {
    /// Measure this arm in turns: embedded, an architecture, a bundle FILE.fcb, cpu, or reference (eager attention on one
    /// CPU thread)
    #[arg(long, value_name = "ARM")]
    against: Option<String>,
    #[command(flatten)]
    arguments: Arguments,
}

/// How to measure it.
#[derive(Args, Default)]
pub(super) struct Arguments {
    /// Cases, and how to measure them, from a TOML file instead of the nine configurations
    #[arg(long, value_name = "FILE", value_parser = case_file)]
    cases: Option<CaseFile>,
    /// What to take the time of: call, cold, hot, graph
    #[arg(long, value_name = "MODES", value_delimiter = ',')]
    modes: Vec<Mode>,
    /// Fresh processes
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    processes: Option<u32>,
    /// Blocks of each case and mode in a process
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    blocks: Option<u32>,
    /// Samples of each arm in a block
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    samples: Option<u32>,
    /// Slowdown that is still no regression, as a share
    #[arg(long, value_name = "SHARE")]
    margin: Option<f64>,
}

/// What to compare.
#[derive(Args)]
pub(super) struct CompareArguments {
    /// An arm (embedded, an architecture, a bundle FILE.fcb, cpu, reference), or the JSON file of an earlier run, which
    /// says how to measure the candidate, too
    #[arg(long, value_name = "ARM|FILE")]
    baseline: String,
    /// Likewise; without it, what --device, --arch and --bundle name
    #[arg(long, value_name = "ARM|FILE")]
    candidate: Option<String>,
    /// End with exit code 0 when nothing can be concluded
    #[arg(long)]
    tolerate_inconclusive: bool,
    /// Measure with this program instead, which knows other arms by names of its own: benches/torch_worker.py
    #[arg(long, value_name = "COMMAND", requires = "candidate")]
    worker: Option<String>,
    #[command(flatten)]
    arguments: Arguments,
}

impl Arguments {
    /// The suite, before it is known where it runs: without arms.
    pub(super) fn suite(&self, options: &Options) -> Result<Suite> {
        let cases = self.cases.as_ref().map_or_else(classic, |file| file.cases.clone());
        Ok(Suite { cases: options.select(cases), arms: Vec::new(), ordinal: 0, protocol: Protocol::default() })
    }

    /// How to measure arms: as suits the device, but for what a case file says, but for what the command line says.
    fn protocol(&self, device: Device, arms: &[ArmSpec], options: &Options) -> Result<Protocol> {
        let mut protocol = Protocol { seed: options.seed, ..Protocol::for_device(device, options.quick) };
        if arms.iter().any(ArmSpec::is_on_host) {
            protocol.modes = vec![Mode::Call];
        }
        if let Some(file) = &self.cases {
            protocol = file.apply(protocol)?;
        }
        self.overlay(protocol, device, arms)
    }

    /// A protocol with what the command line says.
    fn overlay(&self, mut protocol: Protocol, device: Device, arms: &[ArmSpec]) -> Result<Protocol> {
        protocol.processes = self.processes.unwrap_or(protocol.processes);
        protocol.blocks = self.blocks.unwrap_or(protocol.blocks);
        protocol.samples = self.samples.unwrap_or(protocol.samples);
        protocol.margin = self.margin.unwrap_or(protocol.margin);
        if !self.modes.is_empty() {
            protocol.modes.clone_from(&self.modes);
        }
        protocol.check()?;
        let on_host = device == Device::Cpu || arms.iter().any(ArmSpec::is_on_host);
        match protocol.modes.iter().find(|&&mode| on_host && mode != Mode::Call) {
            Some(mode) => Err(format!("{mode} is not measured on the CPU, only call").into()),
            None => Ok(protocol),
        }
    }
}

fn case_file(path: &str) -> Result<CaseFile, String> {
    CaseFile::read(Path::new(path)).map_err(|error| error.to_string())
}

fn arm_of(text: &str) -> Result<ArmSpec> {
    text.parse().map_err(|error| format!("{text}: {error}").into())
}

/// This very program, which measures.
pub(super) fn this_program() -> Result<Vec<OsString>> {
    Ok(vec![std::env::current_exe()?.into_os_string()])
}

/// The command `measure`.
pub(super) fn run(MeasureArguments { against, arguments }: &MeasureArguments, options: &Options) -> Result<Exit> {
    let mut suite = arguments.suite(options)?;
    if suite.cases.is_empty() {
        return Err(options.no_case());
    }
    if options.list {
        return Ok(list(suite.cases.iter()));
    }
    let mut session = Session::new("measure", options)?;
    suite.arms.extend(against.as_deref().map(arm_of).transpose()?);
    suite.arms.push(subject(options, &session));
    suite.protocol = arguments.protocol(session.runtime.device(), &suite.arms, options)?;
    let done = timed(suite, options, &mut session);
    session.finish(options, done)
}

/// Measures what the options name, as suits the device.
pub(super) fn measure(mut suite: Suite, options: &Options, session: &mut Session) -> Result<()> {
    suite.arms = vec![subject(options, session)];
    suite.protocol = Arguments::default().protocol(session.runtime.device(), &suite.arms, options)?;
    timed(suite, options, session)
}

/// What the options name.
pub(super) fn subject(options: &Options, session: &Session) -> ArmSpec {
    let source = match session.runtime.device() {
        Device::Cpu => Source::Cpu,
        Device::Cuda(_) => options.source().unwrap_or(Source::Embedded),
    };
    source.into()
}

/// Whether the results are right, then how long they take.
fn timed(mut suite: Suite, options: &Options, session: &mut Session) -> Result<()> {
    suite.ordinal = ordinal(&session.runtime);
    correct::once(&session.runtime.clone(), &suite.cases, options, session)?;
    let document = sampled(suite, &this_program()?, options, &session.evidence, true, &mut session.ui)?;
    session.evidence = document.evidence;
    let discarded =
        |row: &Value| row["discarded"].as_f64().is_some_and(|share| share > document.protocol.max_discarded);
    if session.evidence.of_kind("measure").any(discarded) {
        session.ended(Exit::Inconclusive);
    }
    Ok(())
}

/// Measures a suite in fresh processes; the rows come after those that the evidence has. The samples are kept in a file
/// where the results are, if they are evidence.
pub(super) fn sampled(
    suite: Suite,
    program: &[OsString],
    options: &Options,
    so_far: &Evidence,
    keep: bool,
    ui: &mut Ui,
) -> Result<Document> {
    let steps = suite.samples_per_process() * suite.protocol.processes as usize;
    ui.phase("measure", steps);
    let (samples, processes) = run_suite(program, &suite, &mut || ui.done())?;
    let mut evidence = so_far.clone();
    evidence.arms = suite.arms.iter().map(ArmSpec::to_string).collect();
    evidence.protocol = Some(suite.protocol.clone());
    evidence.processes = processes;
    evidence.raw = options.json.as_deref().filter(|_| keep).map(|path| Raw::write(path, &samples)).transpose()?;
    let path = options.json.clone().unwrap_or_default();
    let mut document = Document { path, evidence, samples, protocol: suite.protocol, cases: suite.cases };
    let rows = document.measured().measured();
    rows.iter().try_for_each(|row| document.evidence.push("measure", row))?;
    Ok(document)
}

/// One side of a comparison.
enum Side {
    Arm(ArmSpec),
    File(PathBuf),
}

/// The other side, of which a file is read before anything else: it says what to measure.
enum Baseline {
    Arm(ArmSpec),
    Document(Box<Document>),
}

impl CompareArguments {
    fn side(&self, text: &str) -> Result<Side> {
        Ok(match &self.worker {
            _ if text.ends_with(".json") || text.ends_with(".json.gz") => Side::File(text.into()),
            Some(_) => Side::Arm(Source::External(text.into()).into()),
            None => Side::Arm(arm_of(text).map_err(|error| format!("{error}, or a FILE.json"))?),
        })
    }

    /// What measures: this very program unless another is named.
    fn program(&self) -> Result<Vec<OsString>> {
        match &self.worker {
            None => this_program(),
            Some(command) => Ok(command.split_whitespace().map(OsString::from).collect()),
        }
    }
}

/// The command `compare`.
pub(super) fn compare(arguments: &CompareArguments, options: &Options) -> Result<Exit> {
    let baseline = arguments.side(&arguments.baseline)?;
    let candidate = arguments.candidate.as_deref().map(|text| arguments.side(text)).transpose()?;
    let baseline = match baseline {
        Side::File(path) => Baseline::Document(Box::new(Document::read(&path)?)),
        Side::Arm(arm) => Baseline::Arm(arm),
    };
    let cases = match (&baseline, &arguments.arguments.cases) {
        (Baseline::Document(_), Some(_)) => {
            return Err("--cases: a baseline's file says what to measure; drop one of them".into());
        }
        (Baseline::Document(old), None) => options.select(old.cases.clone()),
        (Baseline::Arm(_), _) => arguments.arguments.suite(options)?.cases,
    };
    if cases.is_empty() {
        return Err(options.no_case());
    }
    if options.list {
        return Ok(list(cases.iter()));
    }
    let mut session = Session::new("compare", options)?;
    let done = match (baseline, candidate) {
        (Baseline::Document(old), Some(Side::File(new))) => files(&old, &new, &cases, arguments, &mut session),
        (Baseline::Arm(_), Some(Side::File(_))) => {
            Err("a candidate's file needs a baseline's file: the baseline cannot be measured now".into())
        }
        (Baseline::Document(old), Some(Side::Arm(arm))) => {
            with_file(&old, arm, cases, arguments, options, &mut session)
        }
        (Baseline::Document(old), None) => {
            let arm = subject(options, &session);
            with_file(&old, arm, cases, arguments, options, &mut session)
        }
        (Baseline::Arm(old), candidate) => {
            let arm = match candidate {
                Some(Side::Arm(arm)) => arm,
                _ => subject(options, &session),
            };
            in_turns(vec![old, arm], cases, arguments, options, &mut session)
        }
    };
    let done = done.and_then(|rows| {
        session.ended(ended(&rows, arguments.tolerate_inconclusive));
        if rows.is_empty() { Err("nothing was compared".into()) } else { Ok(()) }
    });
    session.finish(options, done)
}

/// Compares the files of two runs.
fn files(
    old: &Document,
    new: &Path,
    cases: &[Case],
    arguments: &CompareArguments,
    session: &mut Session,
) -> Result<Vec<CompareRow>> {
    let mut new = Document::read(new)?;
    new.protocol.margin = arguments.arguments.margin.unwrap_or(new.protocol.margin);
    new.protocol.check()?;
    let names: Vec<String> = cases.iter().map(Case::to_string).collect();
    let has = |name: &String| new.cases.iter().any(|case| case.to_string() == *name);
    if let Some(name) = names.iter().find(|name| !has(name)) {
        return Err(format!("{name} is in the baseline's file and not in {}", new.path.display()).into());
    }
    if let Some(mode) = old.protocol.modes.iter().find(|mode| !new.protocol.modes.contains(mode)) {
        return Err(format!("{mode} was measured for the baseline and not for {}", new.path.display()).into());
    }
    let mut rows = compare_documents(old, &new)?;
    rows.retain(|row| names.contains(&row.name));
    session.evidence.env = new.evidence.env.clone();
    session.evidence.protocol = Some(new.protocol);
    rows.iter().try_for_each(|row| session.evidence.push("baseline", row))?;
    Ok(rows)
}

/// Measures the candidate as the baseline's file was, and compares the files.
fn with_file(
    old: &Document,
    arm: ArmSpec,
    cases: Vec<Case>,
    arguments: &CompareArguments,
    options: &Options,
    session: &mut Session,
) -> Result<Vec<CompareRow>> {
    let mut arms = Vec::new();
    if old.is_relative() {
        arms.push(ArmSpec::from(Source::Reference));
    } else {
        same_machine(&old.evidence.env, &session.evidence.env)?;
    }
    arms.push(arm);
    let protocol = Protocol { seed: options.seed, ..old.protocol.clone() };
    let mut protocol = arguments.arguments.overlay(protocol, session.runtime.device(), &arms)?;
    if let Some(mode) = protocol.modes.iter().find(|mode| !old.protocol.modes.contains(mode)) {
        return Err(format!("{mode} was not measured for the baseline {}", old.path.display()).into());
    }
    enough(&mut protocol, &arguments.arguments)?;
    candidate_is_right(&arms, &cases, options, session)?;
    let suite = Suite { cases, arms, ordinal: ordinal(&session.runtime), protocol };
    let new = sampled(suite, &arguments.program()?, options, &session.evidence, true, &mut session.ui)?;
    session.evidence = new.evidence.clone();
    let rows = compare_documents(old, &new)?;
    rows.iter().try_for_each(|row| session.evidence.push("baseline", row))?;
    Ok(rows)
}

/// Measures both in turns.
fn in_turns(
    arms: Vec<ArmSpec>,
    cases: Vec<Case>,
    arguments: &CompareArguments,
    options: &Options,
    session: &mut Session,
) -> Result<Vec<CompareRow>> {
    let mut protocol = arguments.arguments.protocol(session.runtime.device(), &arms, options)?;
    enough(&mut protocol, &arguments.arguments)?;
    candidate_is_right(&arms, &cases, options, session)?;
    let suite = Suite { cases, arms, ordinal: ordinal(&session.runtime), protocol };
    let document = sampled(suite, &arguments.program()?, options, &session.evidence, true, &mut session.ui)?;
    let rows = document.measured().compared();
    session.evidence = document.evidence;
    rows.iter().try_for_each(|row| session.evidence.push("compare", row))?;
    Ok(rows)
}

/// Checks the results of the candidate, unless they are another program's: what is wrong may be as fast as it likes.
fn candidate_is_right(arms: &[ArmSpec], cases: &[Case], options: &Options, session: &mut Session) -> Result<()> {
    let runtime = match arms.last().map(|arm| &arm.source) {
        None | Some(Source::External(_) | Source::Reference) => return Ok(()),
        Some(Source::Cpu) => Runtime::cpu(),
        Some(source) => open::on_device(source, ordinal(&session.runtime))?,
    };
    correct::once(&runtime, cases, options, session)
}

/// As many processes as a verdict needs, unless another number was asked for.
fn enough(protocol: &mut Protocol, arguments: &Arguments) -> Result<()> {
    let least = MIN_PROCESSES as u32;
    match arguments.processes {
        Some(few) if few < least => {
            Err(format!("--processes: given {few}; accepted at least {least}, for fewer decide nothing").into())
        }
        Some(_) => Ok(()),
        None => {
            protocol.processes = protocol.processes.max(least);
            Ok(())
        }
    }
}

/// How a comparison ends.
pub(super) fn ended(rows: &[CompareRow], tolerate_inconclusive: bool) -> Exit {
    let has = |outcome| rows.iter().any(|row| row.outcome == outcome);
    match (has(Outcome::Regression), has(Outcome::Inconclusive) && !tolerate_inconclusive) {
        (true, _) => Exit::Regression,
        (false, true) => Exit::Inconclusive,
        (false, false) => Exit::Pass,
    }
}

/// One of the processes that measure: a suite comes in, samples go out.
pub(super) fn process(number: u32) -> Result<Exit> {
    let suite: Suite = serde_json::from_reader(stdin().lock())?;
    run_process(&suite, number, &mut std::io::BufWriter::new(stdout().lock()))?;
    Ok(Exit::Pass)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::Cli;
    use super::*;

    #[test]
    fn arms_on_the_host_have_whole_calls_alone() {
        let cli = Cli::try_parse_from(["flashcore-validate"]).expect("a command line");
        let modes = |sources: &[Source], modes: &[Mode]| {
            let arms: Vec<ArmSpec> = sources.iter().cloned().map(ArmSpec::from).collect();
            let arguments = Arguments { modes: modes.to_vec(), ..Arguments::default() };
            let protocol = arguments.protocol(Device::Cuda(0), &arms, &cli.options);
            protocol.map(|protocol| protocol.modes).map_err(|error| error.to_string())
        };
        assert_eq!(modes(&[Source::Embedded], &[]).expect("modes"), Mode::ALL);
        for source in [Source::Cpu, Source::Reference] {
            let arms = [source, Source::Embedded];
            assert_eq!(modes(&arms, &[]).expect("modes"), [Mode::Call]);
            let refused = modes(&arms, &[Mode::Call, Mode::Hot]).expect_err("events say nothing");
            assert!(refused.starts_with("hot is not measured"), "{refused}");
        }
    }
}
