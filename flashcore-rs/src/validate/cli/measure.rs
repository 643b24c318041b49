//! `measure` and `compare`, and the processes that they start.

use std::ffi::OsString;
use std::io::{stdin, stdout};
use std::path::PathBuf;

use clap::Args;

use super::super::baseline::{Document, compare_documents};
use super::super::casefile::CaseFile;
use super::super::correct::check;
use super::super::matrix::classic;
use super::super::measure::{ArmSpec, Mode, Protocol, Raw, Source, Suite, run_process, run_suite};
use super::super::report::Evidence;
use super::super::stats::{MIN_PROCESSES, Outcome};
use super::super::summary::CompareRow;
use super::super::ui::Ui;
use super::{Exit, Options, Result, Session, list, ordinal};
use crate::tensor::Device;

/// What to measure, and how.
#[derive(Args, Default)]
pub(super) struct Arguments {
    /// Cases, and how to measure them, from a TOML file instead of the nine configurations
    #[arg(long, value_name = "FILE")]
    cases: Option<PathBuf>,
    /// Measure this arm in turns: embedded, an architecture, a bundle FILE.fcb, cpu, or reference (eager attention on one
    /// CPU thread)
    #[arg(long, value_name = "ARM")]
    against: Option<String>,
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
    /// Measure with this program instead, which knows other arms by names of its own: benches/torch_worker.py
    #[arg(long, value_name = "COMMAND")]
    worker: Option<String>,
    /// Slowdown that is still no regression, as a share
    #[arg(long, value_name = "SHARE")]
    margin: Option<f64>,
}

/// What to compare.
#[derive(Args)]
pub(super) struct CompareArguments {
    /// An arm as in --against, or the JSON file of an earlier run
    #[arg(long, value_name = "ARM|FILE")]
    baseline: String,
    /// Likewise; without it, what --device, --arch and --bundle name
    #[arg(long, value_name = "ARM|FILE")]
    candidate: Option<String>,
    /// End with exit code 0 when nothing can be concluded
    #[arg(long)]
    tolerate_inconclusive: bool,
    #[command(flatten)]
    arguments: Arguments,
}

impl Arguments {
    /// The suite, before it is known where it runs: its one arm is what the options name.
    pub(super) fn suite(&self, options: &Options) -> Result<Suite> {
        let file = self.cases.as_deref().map(CaseFile::read).transpose()?;
        let cases = file.map_or_else(classic, |file| file.cases);
        Ok(Suite { cases: options.select(cases), arms: Vec::new(), ordinal: 0, protocol: Protocol::default() })
    }

    fn arm(&self, text: &str) -> Result<ArmSpec> {
        match self.worker {
            Some(_) => Ok(Source::External(text.into()).into()),
            None => text.parse().map_err(|error| format!("{text}: {error}").into()),
        }
    }

    /// What measures: this very program unless another is named.
    fn program(&self) -> Result<Vec<OsString>> {
        match &self.worker {
            None => Ok(vec![std::env::current_exe()?.into_os_string()]),
            Some(command) => Ok(command.split_whitespace().map(OsString::from).collect()),
        }
    }

    fn protocol(&self, device: Device, options: &Options) -> Result<Protocol> {
        let mut protocol = Protocol { seed: options.seed, ..Protocol::for_device(device, options.quick) };
        if let Some(path) = &self.cases {
            protocol = CaseFile::read(path)?.apply(protocol)?;
        }
        protocol.processes = self.processes.unwrap_or(protocol.processes);
        protocol.blocks = self.blocks.unwrap_or(protocol.blocks);
        protocol.samples = self.samples.unwrap_or(protocol.samples);
        protocol.margin = self.margin.unwrap_or(protocol.margin);
        if !self.modes.is_empty() {
            protocol.modes.clone_from(&self.modes);
        }
        let possible = if device == Device::Cpu { &Mode::ALL[..1] } else { &Mode::ALL[..] };
        match protocol.modes.iter().find(|mode| !possible.contains(mode)) {
            Some(mode) => Err(format!("{mode} is not measured on the CPU, only call").into()),
            None if protocol.modes.is_empty() => Err("no modes: give some of call, cold, hot, graph".into()),
            None => Ok(protocol),
        }
    }
}

/// The command `measure`.
pub(super) fn run(arguments: &Arguments, options: &Options) -> Result<Exit> {
    let mut suite = arguments.suite(options)?;
    if suite.cases.is_empty() {
        return Err(options.no_case());
    }
    if options.list {
        return Ok(list(suite.cases.iter()));
    }
    let mut session = Session::new("measure", options)?;
    suite.protocol = arguments.protocol(session.runtime.device(), options)?;
    suite.arms.extend(arguments.against.as_deref().map(|text| arguments.arm(text)).transpose()?);
    suite.arms.push(subject(options, &session));
    timed(suite, arguments, options, &mut session)?;
    session.finish(options)
}

/// Measures what the options name, as suits the device.
pub(super) fn measure(mut suite: Suite, options: &Options, session: &mut Session) -> Result<()> {
    let arguments = Arguments::default();
    suite.protocol = arguments.protocol(session.runtime.device(), options)?;
    suite.arms = vec![subject(options, session)];
    timed(suite, &arguments, options, session)
}

/// What the options name.
fn subject(options: &Options, session: &Session) -> ArmSpec {
    let source = match session.runtime.device() {
        Device::Cpu => Source::Cpu,
        Device::Cuda(_) => options.source().unwrap_or(Source::Embedded),
    };
    source.into()
}

/// Whether the results are right, then how long they take.
fn timed(mut suite: Suite, arguments: &Arguments, options: &Options, session: &mut Session) -> Result<()> {
    suite.ordinal = ordinal(&session.runtime);
    session.ui.phase("check", suite.cases.len());
    for case in &suite.cases {
        let verdict = check(&session.runtime, case, options.seed);
        if !verdict.pass {
            session.ui.line(&format!("WRONG {case}: {}", verdict.reason()));
            session.ended(Exit::Correctness);
        }
        session.ui.done();
    }
    let document = sampled(suite, &arguments.program()?, options, &session.evidence, true, &mut session.ui)?;
    session.evidence = document.evidence.clone();
    for row in document.measured().measured() {
        if row.discarded > document.protocol.max_discarded {
            session.ended(Exit::Inconclusive);
        }
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

impl Side {
    fn parse(text: &str, arguments: &Arguments) -> Result<Self> {
        match text.ends_with(".json") {
            true => Ok(Self::File(text.into())),
            false => Ok(Self::Arm(arguments.arm(text).map_err(|error| format!("{error}, or a FILE.json"))?)),
        }
    }
}

/// The command `compare`.
pub(super) fn compare(arguments: &CompareArguments, options: &Options) -> Result<Exit> {
    let baseline = Side::parse(&arguments.baseline, &arguments.arguments)?;
    let candidate = arguments.candidate.as_deref();
    let candidate = candidate.map(|text| Side::parse(text, &arguments.arguments)).transpose()?;
    let mut session = Session::new("compare", options)?;
    let rows = match (baseline, candidate) {
        (Side::File(old), Some(Side::File(new))) => {
            let (old, mut new) = (Document::read(&old)?, Document::read(&new)?);
            new.protocol.margin = arguments.arguments.margin.unwrap_or(new.protocol.margin);
            let rows = compare_documents(&old, &new)?;
            session.evidence.env = new.evidence.env.clone();
            session.evidence.protocol = Some(new.protocol);
            rows.iter().try_for_each(|row| session.evidence.push("baseline", row))?;
            rows
        }
        (Side::File(old), candidate) => {
            let arm = arm(candidate)?;
            with_file(&Document::read(&old)?, arm, arguments, options, &mut session)?
        }
        (Side::Arm(old), candidate) => {
            let arm = arm(candidate)?.unwrap_or_else(|| subject(options, &session));
            in_turns([old, arm], arguments, options, &mut session)?
        }
    };
    session.ended(ended(&rows, arguments.tolerate_inconclusive));
    session.finish(options)
}

fn arm(candidate: Option<Side>) -> Result<Option<ArmSpec>> {
    match candidate {
        None => Ok(None),
        Some(Side::Arm(arm)) => Ok(Some(arm)),
        Some(Side::File(_)) => {
            Err("a candidate's file needs a baseline's file: the baseline cannot be measured now".into())
        }
    }
}

/// Measures the candidate as the baseline's file was, and compares the files.
fn with_file(
    old: &Document,
    arm: Option<ArmSpec>,
    arguments: &CompareArguments,
    options: &Options,
    session: &mut Session,
) -> Result<Vec<CompareRow>> {
    let reference = ArmSpec::from(Source::Reference);
    let mut suite = arguments.arguments.suite(options)?;
    suite.cases = options.select(old.cases.clone());
    if suite.cases.is_empty() {
        return Err(options.no_case());
    }
    suite.protocol = Protocol { seed: options.seed, ..old.protocol.clone() };
    suite.protocol.margin = arguments.arguments.margin.unwrap_or(suite.protocol.margin);
    suite.protocol.processes = arguments.arguments.processes.unwrap_or(suite.protocol.processes);
    enough(&mut suite.protocol, &arguments.arguments)?;
    suite.ordinal = ordinal(&session.runtime);
    if old.evidence.arms.first() == Some(&reference.to_string()) {
        suite.arms.push(reference);
    }
    suite.arms.push(arm.unwrap_or_else(|| subject(options, session)));
    let new = sampled(suite, &arguments.arguments.program()?, options, &session.evidence, true, &mut session.ui)?;
    let rows = compare_documents(old, &new)?;
    session.evidence = new.evidence;
    rows.iter().try_for_each(|row| session.evidence.push("baseline", row))?;
    Ok(rows)
}

/// Measures both in turns.
fn in_turns(
    arms: [ArmSpec; 2],
    arguments: &CompareArguments,
    options: &Options,
    session: &mut Session,
) -> Result<Vec<CompareRow>> {
    let mut suite = arguments.arguments.suite(options)?;
    if suite.cases.is_empty() {
        return Err(options.no_case());
    }
    suite.protocol = arguments.arguments.protocol(session.runtime.device(), options)?;
    suite.ordinal = ordinal(&session.runtime);
    suite.arms = arms.to_vec();
    enough(&mut suite.protocol, &arguments.arguments)?;
    let document = sampled(suite, &arguments.arguments.program()?, options, &session.evidence, true, &mut session.ui)?;
    let rows = document.measured().compared();
    session.evidence = document.evidence;
    rows.iter().try_for_each(|row| session.evidence.push("compare", row))?;
    Ok(rows)
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
