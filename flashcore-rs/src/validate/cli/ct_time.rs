//! `ct-time`: the shipped kernels and the planted leaks, timed with every class of inputs.

use std::path::PathBuf;

use clap::Args;

use super::super::ct_time::{self, Outcome, Subject};
use super::super::measure::Source;
use super::super::open;
use super::{Exit, Options, Result, Session, ordinal, print};

/// What to time.
#[derive(Args)]
pub(super) struct Arguments {
    /// Bundles with planted leaks that the test has to find
    #[arg(long, value_name = "FILE", num_args = 1..)]
    planted: Vec<PathBuf>,
    /// Rounds of each kernel, instead of what suits it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
}

pub(super) fn run(arguments: &Arguments, options: &Options) -> Result<Exit> {
    let mut session = Session::new("ct-time", options)?;
    let open = |path: &PathBuf| open::on_device(&Source::Bundle(path.clone()), ordinal(&session.runtime));
    let runtimes = arguments.planted.iter().map(open).collect::<Result<Vec<_>>>()?;
    let subject = |name: String, planted, runtime, (case, regime, rounds)| Subject {
        name,
        planted,
        runtime,
        case,
        regime,
        rounds: arguments.rounds.map_or(rounds, |rounds| rounds as usize),
    };
    let runtime = session.runtime.clone();
    let shipped =
        ct_time::shipped(options.quick).into_iter().map(|problem| subject("shipped".into(), false, &runtime, problem));
    let leaks =
        arguments.planted.iter().zip(&runtimes).map(|(path, runtime)| {
            subject(ct_time::planted_name(path), true, runtime, ct_time::planted(options.quick))
        });
    let mut rows = Vec::new();
    let done = shipped.chain(leaks).try_for_each(|subject| -> Result<()> {
        session.ui.phase(&subject.name, subject.rounds);
        let of_subject = ct_time::run(&subject, options.seed, &mut || session.ui.done())?;
        of_subject.iter().try_for_each(|row| session.evidence.push("ct_time", row))?;
        rows.extend(of_subject);
        Ok(())
    });
    session.ended(verdict(&rows));
    session.finish(options, done)
}

fn verdict(rows: &[ct_time::Row]) -> Exit {
    let (found, missed) = ct_time::complaints(rows);
    for leak in &found {
        print(&format!("DIFFERENT: {leak}"));
    }
    for name in &missed {
        print(&format!("NOT FOUND: the leak planted in {name}"));
    }
    let undecided = rows.iter().any(|row| !row.planted && row.test.outcome == Outcome::Inconclusive);
    match (missed.is_empty(), found.is_empty(), undecided) {
        (false, _, _) => Exit::Selftest,
        (true, false, _) => Exit::ConstantTime,
        (true, true, true) => Exit::Inconclusive,
        (true, true, false) => Exit::Pass,
    }
}
