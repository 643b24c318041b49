//! `selftest`: can this program fail, and does it do so as often as it says?

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use clap::Args;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::super::case::Case;
use super::super::matrix::{Extent, classic, matrix};
use super::super::measure::{ArmSpec, Mode, Protocol, Source, Suite};
use super::super::mutants::{Kill, Mutant, hunt, hunt_telling, mutants};
use super::super::open;
use super::super::properties::property_cases;
use super::super::stats::{Outcome, Plan, calibrate};
use super::super::summary::CompareRow;
use super::measure::{sampled, subject, this_program};
use super::{Exit, Options, Result, Session, ordinal, print};
use crate::tensor::Device;

/// A wrong kernel may never end: how long one case may take, or a process that hunts to start.
const CASE_LIMIT: Duration = Duration::from_secs(120);

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
        session.add("calibration", &row, exit(row.met))?;
    }
    Ok(())
}

/// The problems that wrong kernels are run on.
fn prey(extent: Extent) -> Vec<Case> {
    matrix(extent).into_iter().chain(property_cases(Extent::Quick)).collect()
}

/// The wrong kernels of the CPU.
fn cpu_mutants(options: &Options, session: &mut Session) -> Result<()> {
    let all: Vec<_> = mutants().collect();
    let cases = prey(Extent::Default);
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
    let killed = kill.is_some();
    let (case, reason) = kill.map(|kill| (kill.case, kill.reason)).unzip();
    session.add("mutant", &MutantRow { name, description, device, killed, case, reason }, exit(killed))
}

/// The wrong kernels that are machine code, each in a process of its own: what they do to the device ends with it.
fn bundle_mutants(folder: &Path, options: &Options, session: &mut Session) -> Result<()> {
    let ordinal = match session.runtime.device() {
        Device::Cuda(ordinal) => ordinal,
        Device::Cpu => return Err("--mutants needs a CUDA device: its kernels are machine code".into()),
    };
    let listing: Listing = open::json(&folder.join("mutants.json"))?;
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

/// What a process that hunts writes, one a line.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Step {
    /// The case that runs now.
    Case(String),
    /// What came of all of them.
    End(Option<Kill>),
}

/// What gives a wrong kernel away, found in another process.
fn hunted(folder: &Path, mutant: &Listed, ordinal: u32, options: &Options) -> Result<Option<Kill>> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["hunt", "--filter", &mutant.filter, "--seed", &options.seed.to_string()])
        .args(["--device", &format!("cuda:{ordinal}"), "--bundle"])
        .arg(folder.join(&mutant.file));
    followed(&mut command, CASE_LIMIT)
}

/// Follows a process that hunts. One that stays at a case for longer than `limit` is ended, and that is a kill: the limit
/// is of one case, so that no sound kernel meets it by being run on many.
fn followed(command: &mut Command, limit: Duration) -> Result<Option<Kill>> {
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let (sender, steps) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        // Ends with the process, whose output it reads.
        std::thread::spawn(move || BufReader::new(stdout).lines().try_for_each(|line| sender.send(line)));
    }
    let mut at = None;
    loop {
        match steps.recv_timeout(limit) {
            Ok(line) => match serde_json::from_str(&line?)? {
                Step::Case(case) => at = Some(case),
                Step::End(kill) => {
                    let status = child.wait()?;
                    return if status.success() { Ok(kill) } else { Err(status.to_string().into()) };
                }
            },
            Err(RecvTimeoutError::Disconnected) => return Err(child.wait()?.to_string().into()),
            Err(RecvTimeoutError::Timeout) => {
                child.kill()?;
                child.wait()?;
                let case = at.ok_or_else(|| format!("did not start within {limit:?}"))?;
                return Ok(Some(Kill { case, reason: format!("did not end within {limit:?}") }));
            }
        }
    }
}

/// The command `hunt`: one bundle, its cases as they run, and the one that gives it away.
pub(super) fn hunt_bundle(options: &Options) -> Result<Exit> {
    let (runtime, _) = options.open()?;
    // The largest problems are for those who ask for them by name.
    let extent = if options.filter.is_empty() { Extent::Default } else { Extent::Full };
    let say = |step: &Step| -> Result<()> {
        print(&serde_json::to_string(step)?);
        Ok(())
    };
    let mut next = |case: &Case| drop(say(&Step::Case(case.to_string())));
    let kill = hunt_telling(&runtime, &options.select(prey(extent)), options.seed, &mut next);
    say(&Step::End(kill))?;
    Ok(Exit::Pass)
}

/// Comparisons with a known answer: the same code, the same with a delay, slower code.
fn planted(arguments: &Arguments, options: &Options, session: &mut Session) -> Result<()> {
    let device = session.runtime.device();
    let own = subject(options, session);
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
            session.add("planted", &row, exit(row.pass))?;
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
    let document = sampled(suite, &this_program()?, options, &session.evidence, false, &mut session.ui)?;
    Ok(document.measured().compared())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn follow(script: &str, limit: Duration) -> Result<Option<Kill>> {
        followed(Command::new("sh").args(["-c", script]), limit)
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn hunts_are_followed_to_their_end() {
        let alive = follow(r#"echo '{"case":"one"}'; echo '{"case":"two"}'; echo '{"end":null}'"#, LONG);
        assert!(alive.is_ok_and(|kill| kill.is_none()));
        let killed = follow(r#"echo '{"end":{"case":"one","reason":"wrong"}}'"#, LONG);
        assert!(killed.is_ok_and(|kill| kill.is_some_and(|kill| kill.case == "one")));
    }

    #[test]
    fn only_a_case_that_does_not_end_is_a_kill() {
        let short = Duration::from_millis(300);
        let hangs = follow(r#"echo '{"case":"one"}'; exec sleep 30"#, short).expect("a kill").expect("a kill");
        assert_eq!(hangs.case, "one");
        assert!(follow("exec sleep 30", short).is_err(), "never started");
        assert!(follow(r#"echo '{"case":"one"}'; exit 5"#, LONG).is_err(), "ended without an answer");
        assert!(follow(r#"echo '{"end":null}'; exit 5"#, LONG).is_err(), "failed afterwards");
        assert!(follow("echo nonsense", LONG).is_err());
    }
}
