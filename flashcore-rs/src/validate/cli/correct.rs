//! `correct`: the matrix, random problems and relations between results, once each, and a sample of them repeatedly.

use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::super::case::Case;
use super::super::correct::{Verdict, check_variant};
use super::super::matrix::{Extent, matrix};
use super::super::properties::{check_properties, property_cases};
use super::super::random::random_cases;
use super::super::subject::Subject;
use super::{Exit, Options, Result, Session, list};

/// Cases that are repeated.
const REPEATED: usize = 24;

/// What to check.
#[derive(Args)]
pub(super) struct Arguments {
    /// Runs of each of a sample of cases, compared bit by bit
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// Random problems, instead of as many as the extent has
    #[arg(long, value_name = "N")]
    random: Option<usize>,
    /// The matrix alone: no random problems, no properties
    #[arg(long, conflicts_with_all = ["random", "every_variant"])]
    matrix_only: bool,
    /// Every variant that can compute a case, not only the one that the runtime prefers; --full does so too
    #[arg(long)]
    every_variant: bool,
}

impl Default for Arguments {
    fn default() -> Self {
        Self { repeats: 10, random: None, matrix_only: false, every_variant: false }
    }
}

impl Arguments {
    pub(super) fn cases(&self, options: &Options) -> Vec<Case> {
        let random = self.random.unwrap_or(match options.extent() {
            _ if self.matrix_only => 0,
            Extent::Quick => 50,
            Extent::Default => 300,
            Extent::Full => 4500,
        });
        let mut cases = matrix(options.extent());
        cases.extend(random_cases(random, options.seed));
        options.select(cases)
    }

    /// The cases of which the properties are tried.
    fn property_cases(&self, options: &Options) -> Vec<Case> {
        if self.matrix_only { Vec::new() } else { options.select(property_cases(options.extent())) }
    }
}

/// One case.
#[derive(Clone, Debug, Serialize)]
struct Row {
    name: String,
    /// Left out where another row has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    case: Option<Case>,
    repeats: usize,
    #[serde(flatten)]
    verdict: Verdict,
    /// Why it failed.
    reason: String,
    /// Seconds, oracle included.
    seconds: f64,
}

pub(super) fn run(arguments: &Arguments, options: &Options) -> Result<Exit> {
    let cases = arguments.cases(options);
    let related = arguments.property_cases(options);
    if cases.is_empty() && related.is_empty() {
        return Err(options.no_case());
    }
    if options.list {
        return Ok(list(cases.iter().chain(&related)));
    }
    let mut session = Session::new("correctness", options)?;
    let done = check(&cases, arguments, options, &mut session);
    session.finish(options, done)
}

/// Checks cases, and the relations between results of others.
pub(super) fn check(cases: &[Case], arguments: &Arguments, options: &Options, session: &mut Session) -> Result<()> {
    let runtime = session.runtime.clone();
    once(&runtime, cases, options, session)?;
    let small: Vec<&Case> = cases.iter().filter(|case| case.judged_heads.is_empty()).collect();
    let sample: Vec<&Case> = small.iter().step_by(small.len().div_ceil(REPEATED).max(1)).copied().collect();
    repeatedly(&runtime, &sample, arguments, options, session)?;
    if arguments.every_variant || options.full {
        on_every_variant(&runtime, &small, options, session)?;
    }
    properties(&runtime, &arguments.property_cases(options), options, session)
}

fn judge(subject: &dyn Subject, case: &Case, seed: u64, repeats: usize, variant: Option<&str>) -> Row {
    let start = Instant::now();
    let verdict = check_variant(subject, case, seed, repeats, variant);
    let seconds = start.elapsed().as_secs_f64();
    Row { name: case.to_string(), case: None, repeats, reason: verdict.reason(), verdict, seconds }
}

fn exit(pass: bool) -> Exit {
    if pass { Exit::Pass } else { Exit::Correctness }
}

/// Every case once, against the oracle.
pub(super) fn once(subject: &dyn Subject, cases: &[Case], options: &Options, session: &mut Session) -> Result<()> {
    session.ui.phase("correct", cases.len());
    for family in cases.chunk_by(|one, next| one.family == next.family) {
        let mut passed = 0;
        for case in family {
            session.ui.doing(&case.to_string());
            let row = Row { case: Some(case.clone()), ..judge(subject, case, options.seed, 1, None) };
            passed += usize::from(row.verdict.pass);
            session.add("correct", &row, exit(row.verdict.pass))?;
            session.ui.done();
        }
        session.ui.plain(&format!("  {:12} {passed}/{} pass", family[0].family, family.len()));
    }
    Ok(())
}

fn repeatedly(
    subject: &dyn Subject,
    cases: &[&Case],
    arguments: &Arguments,
    options: &Options,
    session: &mut Session,
) -> Result<()> {
    session.ui.phase("repeat", cases.len());
    for case in cases {
        session.ui.doing(&case.to_string());
        let row = judge(subject, case, options.seed, arguments.repeats as usize, None);
        session.add("repeat", &row, exit(row.verdict.pass))?;
        session.ui.done();
    }
    Ok(())
}

/// What the runtime seldom prefers is held to the same rule.
fn on_every_variant(subject: &dyn Subject, cases: &[&Case], options: &Options, session: &mut Session) -> Result<()> {
    session.ui.phase("variants", cases.len());
    for case in cases {
        session.ui.doing(&case.to_string());
        for variant in subject.variants(case)? {
            let row = judge(subject, case, options.seed, 1, Some(&variant));
            session.add("variant", &row, exit(row.verdict.pass))?;
        }
        session.ui.done();
    }
    Ok(())
}

fn properties(subject: &dyn Subject, cases: &[Case], options: &Options, session: &mut Session) -> Result<()> {
    session.ui.phase("properties", cases.len());
    for case in cases {
        session.ui.doing(&case.to_string());
        for verdict in check_properties(subject, case, options.seed) {
            session.add("property", &verdict, exit(verdict.pass))?;
        }
        session.ui.done();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::super::environment::Environment;
    use super::super::super::host::HostTensor;
    use super::super::super::inputs::Inputs;
    use super::super::super::report::Evidence;
    use super::super::super::subject::Ran;
    use super::super::{Cli, Ui};
    use super::*;
    use crate::runtime::Runtime;

    /// The CPU backend, with one element of the output off.
    struct Wrong;

    impl Subject for Wrong {
        fn compute(&self, inputs: &Inputs, out: &mut HostTensor, lse: Option<&mut HostTensor>) -> crate::Result<Ran> {
            let ran = Runtime::cpu().compute(inputs, out, lse)?;
            out.set([0; 4], 3.0);
            Ok(ran)
        }
    }

    fn session_of(subject: &dyn Subject, options: &Options) -> Session {
        let runtime = Runtime::cpu();
        let environment = Environment::of(&runtime, None, None, 0);
        let evidence = Evidence::new("test", "unknown", environment);
        let mut session = Session { runtime, ui: Ui::new(), evidence, exit: Exit::Pass };
        let cases = [Case::new("test", [1, 1], [4, 4], 8), Case::new("test", [1, 1], [5, 5], 8)];
        let arguments = Arguments { repeats: 2, ..Arguments::default() };
        once(subject, &cases, options, &mut session).expect("a run");
        let all: Vec<&Case> = cases.iter().collect();
        repeatedly(subject, &all, &arguments, options, &mut session).expect("a run");
        session
    }

    fn options(arguments: &[&str]) -> Options {
        Cli::try_parse_from([&["flashcore-validate"], arguments].concat()).expect("a command line").options
    }

    fn exit_of(subject: &dyn Subject) -> (Exit, Evidence) {
        let session = session_of(subject, &options(&[]));
        (session.exit, session.evidence)
    }

    #[test]
    fn what_was_found_before_an_error_is_kept_and_the_gravest_code_wins() {
        let folder = tempfile::tempdir().expect("a folder");
        let [json, junit] = ["run.json", "run.xml"].map(|file| folder.path().join(file));
        let files = ["--json", json.to_str().expect("a path"), "--junit", junit.to_str().expect("a path")];
        let options = options(&files);
        let exit = session_of(&Wrong, &options).finish(&options, Err("the card fell out".into())).expect("an end");
        assert_eq!(exit, Exit::Correctness);
        let read = |path| std::fs::read_to_string(path).expect("a file");
        let evidence: Evidence = serde_json::from_str(&read(json)).expect("a document");
        assert_eq!((evidence.of_kind("correct").count(), evidence.of_kind("error").count()), (2, 1));
        assert!(read(junit).contains("the card fell out"));
        let exit = session_of(&Runtime::cpu(), &options).finish(&options, Err("the card fell out".into()));
        assert_eq!(exit.expect("an end"), Exit::Environment);
    }

    #[test]
    fn a_wrong_result_is_exit_code_1() {
        assert_eq!(exit_of(&Runtime::cpu()).0, Exit::Pass);
        let (exit, evidence) = exit_of(&Wrong);
        assert_eq!((exit, exit as u8), (Exit::Correctness, 1));
        assert_eq!(evidence.rows.len(), 4);
        assert!(evidence.rows.iter().all(|row| row["correct"] == false && row["reason"] != ""));
    }
}
