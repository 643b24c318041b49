//! `selftest`: can this program fail, and does it do so as often as it says?

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::super::case::Case;
use super::super::matrix::{Extent, classic, matrix};
use super::super::measure::{ArmSpec, Mode, Protocol, Source, Suite};
use super::super::mutants::{Kill, Mutant, hunt, mutants};
use super::super::open;
use super::super::properties::property_cases;
use super::super::stats::{Outcome, Plan, calibrate};
use super::super::summary::CompareRow;
use super::measure::sampled;
use super::{Exit, Options, Result, Session, ordinal, print};
use crate::tensor::Device;

/// A wrong kernel may never end.
const HUNT_LIMIT: Duration = Duration::from_secs(120);

/// What to test with.
#[derive(Args)]
pub(super) struct Arguments {
    /// Folder of bundles with wrong kernels, and their list mutants.json: each must give a wrong result
    #[arg(long, value_name = "DIR")]
    mutants: Option<PathBuf>,
    /// Bundles with slower kernels: each must be called a regression from the embedded one
    #[arg(long, value_name = "FILE", num_args = 1..)]
    slow: Vec<PathBuf>,
    /// Bundles with the same kernels: none may be called a regression
    #[arg(long, value_name = "FILE", num_args = 1..)]
    same: Vec<PathBuf>,
}

/// A wrong kernel, and what it came to.
#[derive(Serialize)]
struct MutantRow {
    name: String,
    description: String,
    /// `cpu`, or where the machine code ran.
    device: String,
    killed: bool,
    /// The case that gave it away, and how.
    case: Option<String>,
    reason: Option<String>,
}

/// A comparison with a known answer: a suite in one mode.
#[derive(Serialize)]
struct PlantedRow {
    baseline: String,
    candidate: String,
    mode: Mode,
    expected: Outcome,
    /// Candidate to baseline, by case.
    ratios: Vec<f64>,
    /// The smallest effects that would have been found, by case.
    mde: Vec<f64>,
    regressions: usize,
    inconclusive: usize,
    passes: usize,
    pass: bool,
}

/// `mutants.json`, as `python -m kernels.mutants` writes it.
#[derive(Deserialize)]
struct Listing {
    mutants: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    name: String,
    description: String,
    file: PathBuf,
    /// Words that the names of cases have which may give it away.
    filter: String,
}

pub(super) fn run(arguments: &Arguments, options: &Options) -> Result<Exit> {
    let mut session = Session::new("selftest", options)?;
    let done = all(arguments, options, &mut session);
    session.finish(options, done)
}

fn all(arguments: &Arguments, options: &Options, session: &mut Session) -> Result<()> {
    calibration(options, session)?;
    cpu_mutants(options, session)?;
    if let Some(folder) = &arguments.mutants {
        bundle_mutants(folder, options, session)?;
    }
    planted(arguments, options, session)
}

fn exit(pass: bool) -> Exit {
    if pass { Exit::Pass } else { Exit::Selftest }
}

/// Verdicts on samples with a known answer.
fn calibration(options: &Options, session: &mut Session) -> Result<()> {
    let mut plan = if options.quick { Plan::quick() } else { Plan::default() };
    plan.settings.seed = options.seed;
    session.ui.phase("calibrate", plan.suites);
    for row in calibrate(&plan, &mut || session.ui.done()) {
        session.ended(exit(row.met));
        session.evidence.push("calibration", &row)?;
    }
    Ok(())
}

/// The problems that wrong kernels are run on.
fn prey(extent: Extent, filter: &str) -> Vec<Case> {
    let all = matrix(extent).into_iter().chain(property_cases(Extent::Quick));
    all.filter(|case| filter.split_whitespace().all(|word| case.to_string().contains(word))).collect()
}

/// The wrong kernels of the CPU.
fn cpu_mutants(options: &Options, session: &mut Session) -> Result<()> {
    let all: Vec<_> = mutants().collect();
    let cases = prey(Extent::Default, "");
    session.ui.phase("mutants", all.len());
    for (fault, description) in all {
        session.ui.doing(description);
        let kill = hunt(&Mutant(Some(fault)), &cases, options.seed);
        mutant(format!("{fault:?}"), description.into(), "cpu".into(), kill, session)?;
        session.ui.done();
    }
    Ok(())
}

fn mutant(name: String, description: String, device: String, kill: Option<Kill>, session: &mut Session) -> Result<()> {
    session.ended(exit(kill.is_some()));
    let killed = kill.is_some();
    let (case, reason) = kill.map(|kill| (kill.case, kill.reason)).unzip();
    Ok(session.evidence.push("mutant", &MutantRow { name, description, device, killed, case, reason })?)
}

/// The wrong kernels that are machine code, each in a process of its own: what they do to the device ends with it.
fn bundle_mutants(folder: &Path, options: &Options, session: &mut Session) -> Result<()> {
    let ordinal = match session.runtime.device() {
        Device::Cuda(ordinal) => ordinal,
        Device::Cpu => return Err("--mutants needs a CUDA device: its kernels are machine code".into()),
    };
    let list = folder.join("mutants.json");
    let listing: Listing =
        serde_json::from_slice(&open::read(&list)?).map_err(|error| format!("{}: {error}", list.display()))?;
    session.ui.phase("mutant bundles", listing.mutants.len());
    let ui = &session.ui;
    let hunted = |listed: &Listed| {
        let kill = hunted(folder, listed, ordinal, options).map_err(|error| format!("mutant {}: {error}", listed.name));
        ui.done();
        kill
    };
    let kills = listing.mutants.par_iter().map(hunted).collect::<Result<Vec<_>, String>>()?;
    for (Listed { name, description, .. }, kill) in listing.mutants.into_iter().zip(kills) {
        mutant(name, description, session.runtime.device().to_string(), kill, session)?;
    }
    Ok(())
}

/// What gives a wrong kernel away, found in another process.
fn hunted(folder: &Path, mutant: &Listed, ordinal: u32, options: &Options) -> Result<Option<Kill>> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["hunt", "--filter", &mutant.filter, "--seed", &options.seed.to_string()])
        .args(["--device", &format!("cuda:{ordinal}"), "--bundle"])
        .arg(folder.join(&mutant.file));
    match output_within(&mut command, HUNT_LIMIT)? {
        Some(output) if output.status.success() => Ok(serde_json::from_slice(&output.stdout)?),
        Some(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!("{}: {}", output.status, said.lines().last().unwrap_or_default()).into())
        }
        None => Ok(Some(Kill { case: "unknown".into(), reason: format!("did not end within {HUNT_LIMIT:?}") })),
    }
}

/// What a program writes; `None` when it had to be ended.
fn output_within(command: &mut Command, limit: Duration) -> Result<Option<Output>> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(Some(child.wait_with_output()?))
}

/// The command `hunt`: one bundle, and the case that gives it away as JSON.
pub(super) fn hunt_bundle(options: &Options) -> Result<Exit> {
    let (runtime, _) = options.open()?;
    // The largest problems are for those who ask for them by name.
    let extent = if options.filter.is_empty() { Extent::Default } else { Extent::Full };
    let kill = hunt(&runtime, &prey(extent, &options.filter), options.seed);
    print(&serde_json::to_string(&kill)?);
    Ok(Exit::Pass)
}

/// Comparisons with a known answer: the same code, the same with a delay, slower code.
fn planted(arguments: &Arguments, options: &Options, session: &mut Session) -> Result<()> {
    let device = session.runtime.device();
    let own: ArmSpec = match device {
        Device::Cpu => Source::Cpu,
        Device::Cuda(_) => options.source().unwrap_or(Source::Embedded),
    }
    .into();
    // On the CPU nothing below a tenth is told apart from other programs' work.
    let (delay_us, margin) = if device == Device::Cpu { (20_000.0, 0.25) } else { (1.0, 0.005) };
    let delayed = ArmSpec { delay_us, ..own.clone() };
    let slow = arguments.slow.iter().map(|path| ArmSpec::from(Source::Bundle(path.clone())));
    let same = arguments.same.iter().map(|path| ArmSpec::from(Source::Bundle(path.clone())));
    let equals = std::iter::once(own.clone()).chain(same).map(|arm| (arm, Outcome::Pass));
    let slower = std::iter::once(delayed).chain(slow).map(|arm| (arm, Outcome::Regression));
    for (candidate, expected) in equals.chain(slower) {
        let rows = compared(&own, &candidate, margin, options, session)?;
        if rows.is_empty() {
            return Err(format!("{candidate}: nothing was compared").into());
        }
        for of_mode in rows.chunk_by(|one, next| one.mode == next.mode) {
            let row = planted_row(&own, &candidate, expected, of_mode);
            session.ended(exit(row.pass));
            session.evidence.push("planted", &row)?;
        }
    }
    Ok(())
}

fn planted_row(own: &ArmSpec, candidate: &ArmSpec, expected: Outcome, rows: &[CompareRow]) -> PlantedRow {
    let count = |outcome| rows.iter().filter(|row| row.outcome == outcome).count();
    let regressions = count(Outcome::Regression);
    PlantedRow {
        baseline: own.to_string(),
        candidate: candidate.to_string(),
        mode: rows[0].mode,
        expected,
        ratios: rows.iter().map(|row| row.comparison.ratio).collect(),
        mde: rows.iter().map(|row| row.judged.mde).collect(),
        regressions,
        inconclusive: count(Outcome::Inconclusive),
        passes: count(Outcome::Pass),
        // What must not happen between equals is a regression; more samples would decide the rest.
        pass: (regressions > 0) == (expected == Outcome::Regression),
    }
}

fn compared(
    baseline: &ArmSpec,
    candidate: &ArmSpec,
    margin: f64,
    options: &Options,
    session: &mut Session,
) -> Result<Vec<CompareRow>> {
    let device = session.runtime.device();
    let protocol = Protocol::for_device(device, options.quick);
    let (cases, protocol) = match device {
        Device::Cpu => {
            let case = Case::new("selftest", [2, 2], [128, 128], 64).batch(1).without_lse();
            (vec![case], Protocol { processes: 5, blocks: 5, samples: 4, warmup: 20, ..protocol })
        }
        Device::Cuda(_) => (
            classic(),
            Protocol {
                modes: vec![Mode::Graph],
                processes: 6,
                blocks: 10,
                samples: 5,
                warmup: 20,
                sets: 1,
                ..protocol
            },
        ),
    };
    let protocol = Protocol { margin, seed: options.seed, ..protocol };
    let arms = vec![baseline.clone(), candidate.clone()];
    let suite = Suite { cases, arms, ordinal: ordinal(&session.runtime), protocol };
    // The samples of this are no evidence of the kernels.
    let document =
        sampled(suite, &[std::env::current_exe()?.into()], options, &session.evidence, false, &mut session.ui)?;
    Ok(document.measured().compared())
}
