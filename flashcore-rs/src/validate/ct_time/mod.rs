//! Does the time of a call depend on the values in it? The dynamic side of the constant-trace audit.
//!
//! Every class of inputs goes through the same memory, the same plan and the same graph, in random order within each
//! round. In the *latency-bound* regime the card is far from its power limit, and times must agree. In the
//! *power-limited* one they need not: what data make the card draw decides its clock. Kernels with planted leaks are
//! measured beside: the test has to find those.

mod classes;
mod stats;

use std::path::Path;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;

pub use self::classes::{CLASSES, Class};
pub use self::stats::{Comparison, Outcome, Summary, compare, rate};
use super::case::Case;
use super::measure::Arm;
use super::stats::quantum;
use crate::error::Result;
use crate::runtime::Runtime;

/// The margin, as a share of the median time; the clock's resolution if that is more.
pub const MARGIN: f64 = 1e-3;
/// Error rate of all comparisons of one kernel together.
pub const ERROR: f64 = 0.05;
/// Trials of the rates of false alarms and of detection.
const TRIALS: usize = 40;

/// How much work the card does meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Regime {
    /// A few microseconds now and then.
    LatencyBound,
    /// All the card can do.
    PowerLimited,
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    /// `shipped`, or the name of a planted leak.
    pub name: String,
    /// Whether there is a leak in it that takes time.
    pub planted: bool,
    /// Where it runs.
    pub runtime: &'a Runtime,
    /// The problem.
    pub case: Case,
    /// How busy the card is.
    pub regime: Regime,
    /// Times that every class has its turn.
    pub rounds: usize,
}

/// A class beside the reference.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The kernel.
    pub subject: String,
    /// Whether there is a leak in it that takes time.
    pub planted: bool,
    /// The problem.
    pub case: String,
    /// How busy the card was.
    pub regime: Regime,
    /// The class.
    pub class: Class,
    /// Rounds.
    pub rounds: usize,
    /// Microseconds of one launch, of the reference and of the class.
    pub us: [Summary; 2],
    /// Step of the clock, microseconds; `None` where it is finer than the noise.
    pub quantum_us: Option<f64>,
    /// The test, in microseconds.
    pub test: Comparison,
    /// Share of trials, with rounds drawn anew, that call the class different.
    pub detection_rate: f64,
    /// The same with samples of both classes swapped at random: false alarms.
    pub false_alarm_rate: f64,
}

/// The problems of the shipped kernels.
pub fn shipped(quick: bool) -> Vec<(Case, Regime, usize)> {
    let case = |heads: usize, seq_len: usize, dim: usize| Case::new("ct_time", [heads, heads], [seq_len, seq_len], dim);
    let (few, many) = if quick { (20, 10) } else { (400, 40) };
    vec![
        (case(8, 512, 64), Regime::LatencyBound, few),
        (case(8, 512, 128), Regime::LatencyBound, few),
        (case(16, 4096, 128), Regime::PowerLimited, many),
    ]
}

/// The problem of the planted leaks.
pub fn planted(quick: bool) -> (Case, Regime, usize) {
    (Case::new("ct_time", [8, 8], [512, 512], 64), Regime::LatencyBound, if quick { 20 } else { 200 })
}

/// Measures a kernel with every class, and compares each to the first.
///
/// # Errors
/// Whatever keeps the case from running.
pub fn run(subject: &Subject<'_>, seed: u64, progress: &mut dyn FnMut()) -> Result<Vec<Row>> {
    let times = measure(subject, seed, progress)?;
    let (reference, others) = times.split_at(1);
    let reference = &reference[0];
    let quantum_us = quantum(reference);
    let margin = (MARGIN * Summary::of(reference).median).max(quantum_us.unwrap_or(0.0));
    let error = ERROR / others.len() as f64;
    let row = |(class, times): (&Class, &Vec<f64>)| Row {
        subject: subject.name.clone(),
        planted: subject.planted,
        case: subject.case.to_string(),
        regime: subject.regime,
        class: *class,
        rounds: subject.rounds,
        us: [Summary::of(reference), Summary::of(times)],
        quantum_us,
        test: compare(reference, times, margin, error, seed),
        detection_rate: rate(reference, times, margin, error, TRIALS, false, seed),
        false_alarm_rate: rate(reference, times, margin, error, TRIALS, true, seed),
    };
    Ok(CLASSES[1..].par_iter().zip(others).map(row).collect())
}

/// Microseconds of one launch, per class and round.
fn measure(subject: &Subject<'_>, seed: u64, progress: &mut dyn FnMut()) -> Result<Vec<Vec<f64>>> {
    const WARMUP: usize = 3;
    let Subject { runtime, case, .. } = subject;
    let inputs = CLASSES.iter().map(|class| class.draw(case, seed)).collect::<Result<Vec<_>>>()?;
    let mut arm = Arm::with(runtime, case, inputs[0].clone())?;
    let mut order: Vec<usize> = (0..CLASSES.len()).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut times = vec![Vec::with_capacity(subject.rounds); CLASSES.len()];
    for round in 0..subject.rounds + WARMUP {
        order.shuffle(&mut rng);
        for &class in &order {
            arm.replace(inputs[class].clone())?;
            let time = match arm.launch_time()? {
                Some(time) => time,
                None => arm.whole_call()?,
            };
            if round >= WARMUP {
                times[class].push(time);
            }
        }
        progress();
    }
    Ok(times)
}

/// The name of a bundle with a planted leak.
pub fn planted_name(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// What is wrong with the results of the latency-bound regime: leaks where there should be none, and none where there
/// should be.
pub fn complaints(rows: &[Row]) -> (Vec<String>, Vec<String>) {
    let different = |row: &&Row| row.test.outcome == Outcome::Different;
    let shipped = rows.iter().filter(|row| !row.planted && row.regime == Regime::LatencyBound);
    let leaks =
        shipped.filter(different).map(|row| format!("{} {} with {:?} inputs", row.subject, row.case, row.class));
    let mut names: Vec<&str> = rows.iter().filter(|row| row.planted).map(|row| row.subject.as_str()).collect();
    names.dedup();
    let found = |name: &str| rows.iter().any(|row| row.subject == name && different(&row));
    let missed = names.into_iter().filter(|name| !found(name)).map(str::to_owned);
    (leaks.collect(), missed.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_runs_on_the_cpu() {
        let runtime = Runtime::cpu();
        let case = Case::new("ct_time", [1, 1], [16, 16], 8);
        let subject = Subject {
            name: "shipped".into(),
            planted: false,
            runtime: &runtime,
            case,
            regime: Regime::LatencyBound,
            rounds: 20,
        };
        let mut rounds = 0;
        let rows = run(&subject, 0, &mut || rounds += 1).expect("a run");
        assert_eq!((rows.len(), rounds), (CLASSES.len() - 1, 23));
        assert!(rows.iter().all(|row| row.us[1].rounds == 20));
    }

    #[test]
    fn leaks_and_misses_are_told_apart() {
        let summary = Summary::of(&[1.0]);
        let test = |outcome| Comparison { outcome, margin: 0.1, deciles: [0.0; 9], band: 0.0, detectable: 0.1 };
        let row = |subject: &str, planted, outcome| Row {
            subject: subject.into(),
            planted,
            case: String::new(),
            regime: Regime::LatencyBound,
            class: Class::Zeros,
            rounds: 1,
            us: [summary; 2],
            quantum_us: Some(0.1),
            test: test(outcome),
            detection_rate: 0.0,
            false_alarm_rate: 0.0,
        };
        let rows = [
            row("shipped", false, Outcome::Same),
            row("loop", true, Outcome::Different),
            row("lookup", true, Outcome::Same),
        ];
        assert_eq!(complaints(&rows), (vec![], vec!["lookup".to_owned()]));
        let (leaks, _) = complaints(&[row("shipped", false, Outcome::Different)]);
        assert_eq!(leaks.len(), 1);
    }
}
