//! The command line of `flashcore-validate`.

use std::ffi::OsString;
use std::io::{Write, stderr, stdout};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

use clap::{Args, Parser, Subcommand};

use super::case::Case;
use super::correct::check_repeatedly;
use super::matrix::{Extent, classic, matrix};
use super::measure::{LAUNCHES, Protocol, measure};
use super::report::{CorrectRow, Environment, Evidence, MeasureRow, correct_table, ct_time_table, measure_table, row};
use super::subject::Subject;
use super::ui::Ui;
use super::{Exit, ct_time, dump};
use crate::runtime::Runtime;
use crate::tensor::Device;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Cases that are repeated.
const REPEATED: usize = 24;
/// Failures that are printed in full.
const SHOWN: usize = 20;

const EXIT_CODES: &str = "\
Exit codes: 0 everything passed; 1 a wrong result; 2 regression; 3 constant-time violation; 4 inconclusive;
5 environment or usage; 6 selftest failed. (2 belongs to a command that is still to come.)";

/// Is FlashCore right on this machine, and how fast is it? Without a command: `correct`, then `measure`.
#[derive(Parser)]
#[command(name = "flashcore-validate", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Options,
}

#[derive(Clone, PartialEq, Subcommand)]
enum Command {
    /// Checks the correctness matrix against the fp64 oracle
    Correct,
    /// Measures the nine classic configurations: S 128, 256, 512 x B 8, 16, 32, 8 heads, head_dim 64, fp16
    Measure,
    /// Writes cases with their inputs and outputs as safetensors files
    Dump {
        /// Folder for the files
        folder: PathBuf,
    },
    /// Times kernels with inputs as different as can be: does the time depend on values?
    CtTime {
        /// Bundles with planted leaks that the test has to find
        #[arg(long, value_name = "FILE", num_args = 1..)]
        planted: Vec<PathBuf>,
    },
    /// Audits machine code: does it branch on, or address by, the values it processes?
    #[cfg(feature = "audit")]
    Ct(crate::audit::cli::CtArguments),
}

#[derive(Args)]
struct Options {
    /// Where to run: auto (cuda:0 if there is a usable one, else cpu), cpu, cuda or cuda:N
    #[arg(long, global = true, default_value = "auto")]
    device: DeviceChoice,
    /// Use the embedded bundle of this architecture, such as sm_80 or compute_80
    #[arg(long, global = true, conflicts_with = "bundle")]
    arch: Option<String>,
    /// Use this bundle
    #[arg(long, global = true, value_name = "FILE")]
    bundle: Option<PathBuf>,
    /// A seventh of the cases and few rounds: a smoke run
    #[arg(long, global = true, conflicts_with = "full")]
    quick: bool,
    /// Long sequences and tensors of more than 2^31 elements too (24 GB of memory)
    #[arg(long, global = true)]
    full: bool,
    /// Only cases whose name contains every one of these words
    #[arg(long, global = true, value_name = "WORDS", default_value = "")]
    filter: String,
    /// Seed of the inputs
    #[arg(long, global = true, default_value_t = 0)]
    seed: u64,
    /// Runs of each of a sample of cases, compared bit by bit
    #[arg(long, global = true, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// Rounds of measurement, instead of what suits the device
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Write the results as JSON
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Commit of the sources, for the JSON
    #[arg(long, global = true, default_value = "unknown", value_name = "HASH")]
    commit: String,
    /// Print the names of the cases and stop
    #[arg(long, global = true)]
    list: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DeviceChoice {
    Auto,
    Cpu,
    Cuda(u32),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|ordinal| ordinal.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| "expected auto, cpu, cuda or cuda:N".into()),
        }
    }
}

/// Runs the command line and says how it ended.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> Exit {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            drop(error.print());
            return if error.use_stderr() { Exit::Environment } else { Exit::Pass };
        }
    };
    run(&cli).unwrap_or_else(|error| {
        drop(writeln!(stderr(), "flashcore-validate: {error}"));
        Exit::Environment
    })
}

fn run(cli: &Cli) -> Result<Exit> {
    let options = &cli.options;
    #[cfg(feature = "audit")]
    if let Some(Command::Ct(arguments)) = &cli.command {
        let (exit, table) =
            crate::audit::cli::run(arguments, &options.filter, &options.commit, options.json.as_deref())?;
        print(&table);
        print(if exit == Exit::Pass { "PASS" } else { "FAIL" });
        return Ok(exit);
    }
    let wants = |command: Command| cli.command.is_none() || cli.command == Some(command);
    let select = |cases: Vec<Case>| -> Vec<Case> { cases.into_iter().filter(|case| options.selects(case)).collect() };
    let problems = if cli.command == Some(Command::Measure) { Vec::new() } else { select(matrix(options.extent())) };
    let configurations = if wants(Command::Measure) { select(classic()) } else { Vec::new() };
    if problems.is_empty() && configurations.is_empty() {
        return Err(
            format!("no case has every word of {:?} in its name; --list shows the names", options.filter).into()
        );
    }
    if options.list {
        let names: Vec<_> = problems.iter().chain(&configurations).map(Case::to_string).collect();
        return Ok(print(&names.join("\n")));
    }

    let (runtime, environment) = options.open()?;
    let mut ui = Ui::new();
    ui.line(&environment.summary());
    if let Some(Command::CtTime { planted }) = &cli.command {
        return ct_time_all(&runtime, planted, options, environment, &mut ui);
    }
    if let Some(Command::Dump { folder }) = &cli.command {
        return dump_all(&runtime, &problems, options.seed, folder, &mut ui);
    }
    let mut evidence = Evidence::new("first-light", &options.commit, environment);
    let mut exit = Exit::Pass;
    if !problems.is_empty() {
        exit = exit.and(correct(&runtime, &problems, options, &mut ui, &mut evidence)?);
    }
    if !configurations.is_empty() {
        exit = exit.and(timings(&runtime, &configurations, options, &mut ui, &mut evidence)?);
    }
    options.write(&evidence)?;
    print(if exit == Exit::Pass { "PASS" } else { "FAIL" });
    Ok(exit)
}

impl Options {
    fn extent(&self) -> Extent {
        match (self.quick, self.full) {
            (true, _) => Extent::Quick,
            (_, true) => Extent::Full,
            _ => Extent::Default,
        }
    }

    fn write(&self, evidence: &Evidence) -> Result<()> {
        let Some(path) = &self.json else { return Ok(()) };
        let text = serde_json::to_string_pretty(evidence)? + "\n";
        std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()).into())
    }

    fn selects(&self, case: &Case) -> bool {
        let name = case.to_string();
        self.filter.split_whitespace().all(|word| name.contains(word))
    }

    fn open(&self) -> Result<(Runtime, Environment)> {
        let named = self.arch.is_some() || self.bundle.is_some();
        let bundle = self.bundle.as_deref().map(read).transpose()?;
        let open = |ordinal| {
            let mut builder = Runtime::builder().ordinal(ordinal);
            if let Some(arch) = &self.arch {
                builder = builder.arch(arch);
            }
            if let Some(bundle) = &bundle {
                // SAFETY: whoever runs this program with `--bundle` vouches for the file, as for the program itself.
                #[expect(unsafe_code, reason = "kernels that the user names")]
                let named = unsafe { builder.bundle(bundle.clone()) };
                builder = named;
            }
            builder.build()
        };
        let (runtime, why) = match self.device {
            DeviceChoice::Cpu if named => return Err("the CPU backend runs no bundle: drop --arch and --bundle".into()),
            DeviceChoice::Cpu => (Runtime::cpu(), None),
            DeviceChoice::Cuda(ordinal) => (open(ordinal)?, None),
            DeviceChoice::Auto => match open(0) {
                Ok(runtime) => (runtime, None),
                Err(error) if named => return Err(error.into()),
                Err(error) => (Runtime::cpu(), Some(error.to_string())),
            },
        };
        let environment = Environment::of(&runtime, why, bundle.as_deref(), self.seed);
        Ok((runtime, environment))
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// The matrix once, and a sample of it repeatedly.
fn correct(
    subject: &dyn Subject,
    cases: &[Case],
    options: &Options,
    ui: &mut Ui,
    evidence: &mut Evidence,
) -> Result<Exit> {
    let judge = |case: &Case, repeats: usize| {
        let start = Instant::now();
        let verdict = check_repeatedly(subject, case, options.seed, repeats);
        let seconds = start.elapsed().as_secs_f64();
        CorrectRow { name: case.to_string(), case: case.clone(), repeats, verdict, seconds }
    };
    ui.phase("correct", cases.len());
    let mut rows: Vec<CorrectRow> = Vec::with_capacity(cases.len());
    for family in cases.chunk_by(|one, next| one.family == next.family) {
        let first = rows.len();
        for case in family {
            ui.doing(&case.to_string());
            rows.push(judge(case, 1));
            ui.done();
        }
        let passed = rows[first..].iter().filter(|row| row.verdict.pass).count();
        ui.plain(&format!("  {:12} {passed}/{} pass", family[0].family, family.len()));
    }
    let small: Vec<&Case> = cases.iter().filter(|case| case.judged_heads.is_empty()).collect();
    let sample: Vec<&Case> = small.iter().step_by(small.len().div_ceil(REPEATED).max(1)).copied().collect();
    ui.phase("repeat", sample.len());
    let mut repeated = Vec::new();
    for case in sample {
        ui.doing(&case.to_string());
        repeated.push(judge(case, options.repeats as usize));
        ui.done();
    }
    ui.finish();

    for result in &rows {
        evidence.rows.push(row("correct", result)?);
    }
    for result in &repeated {
        evidence.rows.push(row("repeat", result)?);
    }
    let failed = |rows: &[CorrectRow]| rows.iter().filter(|row| !row.verdict.pass).count();
    print(&format!("Correctness against the fp64 oracle (e <= 1.5 e_ref + 1 ulp):\n{}", correct_table(&rows)));
    print(&format!(
        "{} problems, {} failed; {} of them run {} times, {} not bit-identical",
        rows.len(),
        failed(&rows),
        repeated.len(),
        options.repeats,
        repeated.iter().filter(|row| row.verdict.irreproducible > 0).count(),
    ));
    let failures: Vec<_> = rows.iter().chain(&repeated).filter(|row| !row.verdict.pass).collect();
    for failure in failures.iter().take(SHOWN) {
        print(&format!("FAILED {}: {}", failure.name, failure.verdict.reason()));
    }
    if failures.len() > SHOWN {
        print(&format!("... and {} more", failures.len() - SHOWN));
    }
    Ok(if failures.is_empty() { Exit::Pass } else { Exit::Correctness })
}

/// The nine configurations: right first, then timed.
fn timings(runtime: &Runtime, cases: &[Case], options: &Options, ui: &mut Ui, evidence: &mut Evidence) -> Result<Exit> {
    let mut protocol = Protocol::for_device(runtime.device(), options.quick);
    protocol.rounds = options.rounds.map_or(protocol.rounds, |rounds| rounds as usize);
    ui.phase("measure", cases.len() * (1 + protocol.rounds));
    let mut verdicts = Vec::new();
    for case in cases {
        verdicts.push(check_repeatedly(runtime, case, options.seed, 1));
        ui.done();
    }
    let measurements = measure(runtime, cases, options.seed, protocol, &mut || ui.done())?;
    ui.finish();

    let rows: Vec<MeasureRow> = cases
        .iter()
        .zip(verdicts)
        .zip(measurements)
        .map(|((case, verdict), measurement)| MeasureRow {
            name: case.to_string(),
            case: case.clone(),
            verdict,
            measurement,
        })
        .collect();
    for result in &rows {
        evidence.rows.push(row("measure", result)?);
    }
    print(&format!(
        "The nine configurations, fp16, dense; medians of {} rounds, warm caches. call: whole call with an empty queue, \
         by the host's clock.\ndevice: one of {LAUNCHES} launches in a graph, by events. floor: bytes or operations at the \
         card's measured ceilings.\n{}",
        protocol.rounds,
        measure_table(&rows, runtime.device())
    ));
    for failure in rows.iter().filter(|row| !row.verdict.pass) {
        print(&format!("FAILED {}: {}", failure.name, failure.verdict.reason()));
    }
    Ok(if rows.iter().all(|row| row.verdict.pass) { Exit::Pass } else { Exit::Correctness })
}

/// The shipped kernels and the planted leaks, timed with every class of inputs.
fn ct_time_all(
    runtime: &Runtime,
    planted: &[PathBuf],
    options: &Options,
    environment: Environment,
    ui: &mut Ui,
) -> Result<Exit> {
    let mut evidence = Evidence::new("ct-time", &options.commit, environment);
    let ordinal = match runtime.device() {
        Device::Cuda(ordinal) => ordinal,
        Device::Cpu => 0,
    };
    let runtimes = planted.iter().map(|path| open_planted(path, ordinal)).collect::<Result<Vec<_>>>()?;
    let subject = |name: String, planted, runtime, (case, regime, rounds)| ct_time::Subject {
        name,
        planted,
        runtime,
        case,
        regime,
        rounds: options.rounds.map_or(rounds, |rounds| rounds as usize),
    };
    let shipped =
        ct_time::shipped(options.quick).into_iter().map(|problem| subject("shipped".into(), false, runtime, problem));
    let leaks = planted
        .iter()
        .zip(&runtimes)
        .map(|(path, runtime)| subject(ct_time::planted_name(path), true, runtime, ct_time::planted(options.quick)));
    let mut rows = Vec::new();
    for subject in shipped.chain(leaks) {
        ui.phase(&subject.name, subject.rounds);
        rows.extend(ct_time::run(&subject, options.seed, &mut || ui.done())?);
    }
    ui.finish();
    for result in &rows {
        evidence.rows.push(row("ct_time", result)?);
    }
    options.write(&evidence)?;
    print(&ct_time_table(&rows).to_string());
    let (found, missed) = ct_time::complaints(&rows);
    for leak in &found {
        print(&format!("DIFFERENT: {leak}"));
    }
    for name in &missed {
        print(&format!("NOT FOUND: the leak planted in {name}"));
    }
    let undecided = rows.iter().any(|row| !row.planted && row.test.outcome == ct_time::Outcome::Inconclusive);
    let exit = match (missed.is_empty(), found.is_empty(), undecided) {
        (false, _, _) => Exit::Selftest,
        (true, false, _) => Exit::ConstantTime,
        (true, true, true) => Exit::Inconclusive,
        (true, true, false) => Exit::Pass,
    };
    print(&format!("{exit:?}"));
    Ok(exit)
}

fn open_planted(path: &Path, ordinal: u32) -> Result<Runtime> {
    let bytes = read(path)?;
    // SAFETY: whoever runs this program with `--planted` vouches for the file, as for the program itself.
    #[expect(unsafe_code, reason = "kernels that the user names")]
    let builder = unsafe { Runtime::builder().ordinal(ordinal).bundle(bytes) };
    Ok(builder.build()?)
}

fn dump_all(runtime: &Runtime, cases: &[Case], seed: u64, folder: &Path, ui: &mut Ui) -> Result<Exit> {
    std::fs::create_dir_all(folder)?;
    ui.phase("dump", cases.len());
    for (i, case) in cases.iter().enumerate() {
        ui.doing(&case.to_string());
        dump::dump(runtime, case, seed, &folder.join(format!("{i:04}.safetensors")))?;
        ui.done();
    }
    ui.finish();
    Ok(Exit::Pass)
}

/// Writes to standard output; a reader that has gone away is no failure.
fn print(text: &str) -> Exit {
    drop(writeln!(stdout(), "{text}"));
    Exit::Pass
}

#[cfg(test)]
mod tests {
    use super::super::host::HostTensor;
    use super::super::inputs::Inputs;
    use super::super::subject::Ran;
    use super::*;

    /// The CPU backend, with one element of the output off.
    struct Wrong;

    impl Subject for Wrong {
        fn compute(&self, inputs: &Inputs, out: &mut HostTensor, lse: Option<&mut HostTensor>) -> crate::Result<Ran> {
            let ran = Runtime::cpu().compute(inputs, out, lse)?;
            out.set([0; 4], 3.0);
            Ok(ran)
        }
    }

    fn exit_of(subject: &dyn Subject) -> (Exit, Evidence) {
        let cli = Cli::try_parse_from(["flashcore-validate", "correct", "--repeats", "2"]).expect("a command line");
        let environment = Environment::of(&Runtime::cpu(), None, None, 0);
        let mut evidence = Evidence::new("first-light", "unknown", environment);
        let cases = [Case::new("test", [1, 1], [4, 4], 8), Case::new("test", [1, 1], [5, 5], 8)];
        let exit = correct(subject, &cases, &cli.options, &mut Ui::new(), &mut evidence).expect("a run");
        (exit, evidence)
    }

    #[test]
    fn a_wrong_result_is_exit_code_1() {
        assert_eq!(exit_of(&Runtime::cpu()).0, Exit::Pass);
        let (exit, evidence) = exit_of(&Wrong);
        assert_eq!((exit, exit as u8), (Exit::Correctness, 1));
        assert_eq!(evidence.rows.len(), 4);
        assert!(evidence.rows.iter().all(|row| row["correct"] == false));
    }
}
