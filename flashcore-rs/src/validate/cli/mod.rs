//! The command line of `flashcore-validate`.

mod correct;
mod ct_time;
mod files;
mod measure;
mod selftest;

use std::ffi::OsString;
use std::io::{Write, stderr, stdout};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use serde::Serialize;

use super::case::Case;
use super::environment::Environment;
use super::matrix::Extent;
use super::measure::Source;
use super::measure::gzip;
use super::report::{Evidence, failures, junit, markdown, sections};
use super::ui::Ui;
use super::{Exit, dump, open};
use crate::runtime::Runtime;
use crate::tensor::Device;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const EXIT_CODES: &str = "\
Exit codes: 0 everything passed; 1 a wrong result; 2 regression; 3 constant-time violation; 4 inconclusive;
5 environment or usage; 6 selftest failed. Where several apply, the gravest: 6, 1, 3, 2, 5, 4.";

/// Is FlashCore right on this machine, how fast is it, and has it become slower? Without a command: `correct`, then
/// `measure`.
#[derive(Parser)]
#[command(name = "flashcore-validate", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Options,
}

#[derive(Subcommand)]
enum Command {
    /// Checks results against the fp64 oracle and against each other
    Correct(correct::Arguments),
    /// Measures: by default S 128, 256, 512 x B 8, 16, 32 with 8 heads, head_dim 64, fp16
    Measure(measure::MeasureArguments),
    /// Is a candidate slower than a baseline? Both are measured in turns, or are files of earlier runs
    Compare(measure::CompareArguments),
    /// Proves that this program can fail: verdicts on samples with a known answer, wrong kernels, slow ones
    Selftest(selftest::Arguments),
    /// Makes every statistic of a file again from its samples, and says where they differ
    Replay {
        /// What `measure` or `compare` wrote with --json
        file: PathBuf,
    },
    /// Prints the tables of files, and writes them with --markdown and --junit; says nothing by its exit code
    Report {
        /// What any command wrote with --json
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Writes cases with their inputs and outputs as safetensors files
    Dump {
        /// Folder for the files
        folder: PathBuf,
    },
    /// Times kernels with inputs as different as can be: does the time depend on values?
    CtTime(ct_time::Arguments),
    /// Audits machine code: does it branch on, or address by, the values it processes?
    #[cfg(feature = "audit")]
    Ct(crate::audit::cli::CtArguments),
    /// Looks for a case that a bundle gets wrong; what `selftest` starts
    #[command(hide = true)]
    Hunt,
    /// Measures a suite that is read from standard input; what `measure` starts
    #[command(hide = true)]
    MeasureProcess {
        /// Its number
        process: u32,
    },
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
    /// A seventh of the cases and few samples: a smoke run
    #[arg(long, global = true, conflicts_with = "full")]
    quick: bool,
    /// More cases, long sequences and tensors of more than 2^31 elements too (24 GB of memory)
    #[arg(long, global = true)]
    full: bool,
    /// Only cases whose name contains every one of these words
    #[arg(long, global = true, value_name = "WORDS", default_value = "")]
    filter: String,
    /// Seed of the inputs, and of every order
    #[arg(long, global = true, default_value_t = 0)]
    seed: u64,
    /// Write the results as JSON, compressed when the name ends with .gz; samples go into a file beside it
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the results as JUnit XML
    #[arg(long, global = true, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write the tables as Markdown
    #[arg(long, global = true, value_name = "FILE")]
    markdown: Option<PathBuf>,
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

/// Runs the command line and says how it ended. A panic has said so itself: the harness does not work.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> Exit {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            drop(error.print());
            return if error.use_stderr() { Exit::Environment } else { Exit::Pass };
        }
    };
    let ran = std::panic::catch_unwind(|| run(&cli)).unwrap_or(Ok(Exit::Selftest));
    ran.unwrap_or_else(|error| {
        complain(&*error);
        Exit::Environment
    })
}

fn run(cli: &Cli) -> Result<Exit> {
    let options = &cli.options;
    match &cli.command {
        None => both(options),
        Some(Command::Correct(arguments)) => correct::run(arguments, options),
        Some(Command::Measure(arguments)) => measure::run(arguments, options),
        Some(Command::Compare(arguments)) => measure::compare(arguments, options),
        Some(Command::Selftest(arguments)) => selftest::run(arguments, options),
        Some(Command::Replay { file }) => files::replay(file, options),
        Some(Command::Report { files }) => files::report(files, options),
        Some(Command::Dump { folder }) => dump_all(folder, options),
        Some(Command::CtTime(arguments)) => ct_time::run(arguments, options),
        #[cfg(feature = "audit")]
        Some(Command::Ct(arguments)) => audit(arguments, options),
        Some(Command::Hunt) => selftest::hunt_bundle(options),
        Some(Command::MeasureProcess { process }) => measure::process(*process),
    }
}

/// What a newcomer runs.
fn both(options: &Options) -> Result<Exit> {
    let arguments = correct::Arguments::default();
    let problems = arguments.cases(options);
    let suite = measure::Arguments::default().suite(options)?;
    if problems.is_empty() && suite.cases.is_empty() {
        return Err(options.no_case());
    }
    if options.list {
        return Ok(list(problems.iter().chain(&suite.cases)));
    }
    let mut session = Session::new("validate", options)?;
    let mut done = Ok(());
    if !problems.is_empty() {
        done = correct::check(&problems, &arguments, options, &mut session);
    }
    if !suite.cases.is_empty() {
        done = done.and_then(|()| measure::measure(suite, options, &mut session));
    }
    session.finish(options, done)
}

#[cfg(feature = "audit")]
fn audit(arguments: &crate::audit::cli::CtArguments, options: &Options) -> Result<Exit> {
    let (exit, table) = crate::audit::cli::run(arguments, &options.filter, &options.commit, options.json.as_deref())?;
    print(&table);
    print(exit.word());
    Ok(exit)
}

fn dump_all(folder: &Path, options: &Options) -> Result<Exit> {
    let cases = correct::Arguments::default().cases(options);
    if cases.is_empty() {
        return Err(options.no_case());
    }
    if options.list {
        return Ok(list(cases.iter()));
    }
    let session = Session::new("dump", options)?;
    std::fs::create_dir_all(folder)?;
    let mut ui = session.ui;
    ui.phase("dump", cases.len());
    for (i, case) in cases.iter().enumerate() {
        ui.doing(&case.to_string());
        dump::dump(&session.runtime, case, options.seed, &folder.join(format!("{i:04}.safetensors")))?;
        ui.done();
    }
    ui.finish();
    Ok(Exit::Pass)
}

/// A run of a command: where it runs, what it found, how it ends.
struct Session {
    runtime: Runtime,
    ui: Ui,
    evidence: Evidence,
    exit: Exit,
}

impl Session {
    fn new(topic: &str, options: &Options) -> Result<Self> {
        options.writable()?;
        let (runtime, environment) = options.open()?;
        let ui = Ui::new();
        ui.line(&environment.summary());
        Ok(Self { runtime, ui, evidence: Evidence::new(topic, &options.commit, environment), exit: Exit::Pass })
    }

    fn ended(&mut self, exit: Exit) {
        self.exit = self.exit.and(exit);
    }

    /// Adds a row, and what it means for how the run ends.
    fn add(&mut self, kind: &str, row: &impl Serialize, exit: Exit) -> Result<()> {
        self.ended(exit);
        Ok(self.evidence.push(kind, row)?)
    }

    /// Writes and prints what was found, until `done` if that is an error: it takes nothing away from what came before.
    fn finish(mut self, options: &Options, done: Result<()>) -> Result<Exit> {
        self.ui.finish();
        if let Err(error) = done {
            if self.evidence.rows.is_empty() {
                return Err(error);
            }
            complain(&*error);
            self.ended(Exit::Environment);
            self.evidence.push("error", &Failed { reason: error.to_string() })?;
        }
        options.write(&self.evidence)?;
        show(&self.evidence);
        print(self.exit.word());
        Ok(self.exit)
    }
}

/// What ended a run before its time, as a row.
#[derive(Serialize)]
struct Failed {
    reason: String,
}

fn complain(error: &dyn std::error::Error) {
    drop(writeln!(stderr(), "flashcore-validate: {error}"));
}

fn show(evidence: &Evidence) {
    for section in sections(evidence) {
        print(&format!("{}\n{}\n", section.title, section.table));
    }
    failures(evidence).iter().for_each(|failure| print(failure));
}

impl Options {
    fn extent(&self) -> Extent {
        match (self.quick, self.full) {
            (true, _) => Extent::Quick,
            (_, true) => Extent::Full,
            _ => Extent::Default,
        }
    }

    /// Whether there are folders for the results: what takes hours should not end with an error about that.
    fn writable(&self) -> Result<()> {
        for path in [&self.json, &self.junit, &self.markdown].into_iter().flatten() {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            match folder {
                _ if path.is_dir() => return Err(format!("{}: is a folder; name a file", path.display()).into()),
                Some(folder) if !folder.is_dir() => return Err(format!("{}: no such folder", folder.display()).into()),
                _ => {}
            }
        }
        Ok(())
    }

    fn write(&self, evidence: &Evidence) -> Result<()> {
        let json = || Ok::<_, Box<dyn std::error::Error>>(serde_json::to_string_pretty(evidence)? + "\n");
        write(self.json.as_deref(), json)?;
        write(self.junit.as_deref(), || Ok(junit(std::slice::from_ref(evidence))?))?;
        write(self.markdown.as_deref(), || Ok(markdown(evidence)))
    }

    fn select(&self, cases: Vec<Case>) -> Vec<Case> {
        let chosen = |case: &Case| {
            let name = case.to_string();
            self.filter.split_whitespace().all(|word| name.contains(word))
        };
        cases.into_iter().filter(chosen).collect()
    }

    fn no_case(&self) -> Box<dyn std::error::Error> {
        format!("no case has every word of {:?} in its name; --list shows the names", self.filter).into()
    }

    /// Where the code is from, when that was said.
    fn source(&self) -> Option<Source> {
        let arch = self.arch.clone().map(Source::Arch);
        arch.or_else(|| self.bundle.clone().map(Source::Bundle))
    }

    fn open(&self) -> Result<(Runtime, Environment)> {
        let source = self.source();
        let named = source.clone().unwrap_or(Source::Embedded);
        let (runtime, why) = match self.device {
            DeviceChoice::Cpu if source.is_some() => {
                return Err("the CPU backend runs no bundle: drop --arch and --bundle".into());
            }
            DeviceChoice::Cpu => (Runtime::cpu(), None),
            DeviceChoice::Cuda(ordinal) => (open::on_device(&named, ordinal)?, None),
            DeviceChoice::Auto => match open::on_device(&named, 0) {
                Ok(runtime) => (runtime, None),
                Err(error) if source.is_some() => return Err(error),
                Err(error) => (Runtime::cpu(), Some(error.to_string())),
            },
        };
        let bundle = self.bundle.as_deref().map(open::read).transpose()?;
        let environment = Environment::of(&runtime, why, bundle.as_deref(), self.seed);
        Ok((runtime, environment))
    }
}

/// The device's ordinal; 0 on the CPU, which has none.
fn ordinal(runtime: &Runtime) -> u32 {
    match runtime.device() {
        Device::Cuda(ordinal) => ordinal,
        Device::Cpu => 0,
    }
}

fn write(path: Option<&Path>, text: impl FnOnce() -> Result<String>) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let bytes = text()?.into_bytes();
    let bytes = if path.extension() == Some("gz".as_ref()) { gzip(&bytes)? } else { bytes };
    std::fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()).into())
}

fn list<'a>(cases: impl Iterator<Item = &'a Case>) -> Exit {
    let names: Vec<_> = cases.map(Case::to_string).collect();
    print(&names.join("\n"));
    Exit::Pass
}

/// Writes to standard output; a reader that has gone away is no failure.
fn print(text: &str) {
    drop(writeln!(stdout(), "{text}"));
}
