//! How often the rules are wrong, counted on synthetic suites with planted slowdowns.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Exp1, StandardNormal};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use statrs::distribution::{Beta, ContinuousCDF};

use super::ratio::{Block, Estimate, Settings, estimate};
use super::verdict::{Outcome, judge};
use super::{CONFIDENCE, Interval};

/// How times vary. All effects are on the logarithm of the time; a standard deviation of 0.01 is one percent.
///
/// ```text
/// ns = round(base * exp(process + arm + drift * position + ar + late), quantum)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Noise {
    /// Autocorrelation of neighbouring samples, whichever arm they are of: an AR(1) process.
    pub phi: f64,
    /// Its standard deviation.
    pub sample_sd: f64,
    /// Standard deviation between processes of what both arms share: clocks, addresses.
    pub process_sd: f64,
    /// Standard deviation between processes of what each arm has for itself. No number of samples averages it out.
    pub arm_sd: f64,
    /// Standard deviation of the slope from the first to the last sample of a process.
    pub drift_sd: f64,
    /// Share of late samples.
    pub late_share: f64,
    /// Mean of how late they are, exponentially distributed.
    pub late_mean: f64,
    /// Step of the clock, nanoseconds.
    pub quantum_ns: f64,
}

impl Default for Noise {
    fn default() -> Self {
        Self {
            phi: 0.6,
            sample_sd: 0.008,
            process_sd: 0.01,
            arm_sd: 0.001,
            drift_sd: 0.01,
            late_share: 0.03,
            late_mean: 0.03,
            quantum_ns: 32.0,
        }
    }
}

/// What to simulate. Case `i` takes `10 * 1.25^i` microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Suites: trials of every question.
    pub suites: usize,
    /// Cases of a suite.
    pub cases: usize,
    /// Processes.
    pub processes: usize,
    /// Blocks in a process.
    pub blocks: usize,
    /// Samples of an arm in a block.
    pub samples: usize,
    /// How they vary.
    pub noise: Noise,
    /// What is held to; its seed is also that of the samples.
    pub settings: Settings,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            suites: 400,
            cases: 9,
            processes: 10,
            blocks: 20,
            samples: 20,
            noise: Noise::default(),
            settings: Settings::default(),
        }
    }
}

impl Plan {
    /// What an unoptimised build does in seconds.
    pub fn quick() -> Self {
        Self { suites: 60, ..Self::default() }
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// All cases have the ratio, at most `1 + margin`: is any called a regression?
    FalseAlarm,
    /// One case has the ratio, the others none: is that one called a regression?
    CaseDetected,
    /// All cases have the ratio: is any called a regression?
    SuiteDetected,
    /// One case has the ratio, at least `1 + margin`: does it pass?
    FalsePass,
    /// No case is slower: does one of them pass?
    TruePass,
}

/// What a rate must not exclude at 95 %.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Rates up to this.
    AtMost(f64),
    /// Rates from this.
    AtLeast(f64),
    /// Nothing is asked for.
    None,
}

impl Bound {
    /// Whether an interval has a rate that the bound allows.
    pub fn allows(self, rate: Interval) -> bool {
        match self {
            Self::AtMost(most) => rate.low <= most,
            Self::AtLeast(least) => rate.high >= least,
            Self::None => true,
        }
    }
}

/// How often something happened.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// What was counted.
    pub question: Question,
    /// Planted `ratio - 1`.
    pub planted: f64,
    /// Suites.
    pub trials: usize,
    /// Those in which it happened.
    pub hits: usize,
    /// Their share.
    pub rate: f64,
    /// Its interval; see [`clopper_pearson`].
    pub ci95: Interval,
    /// What is asked for.
    pub bound: Bound,
    /// Whether the interval allows it.
    pub met: bool,
}

/// The exact interval for a share at 95 % (Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the
/// case of the binomial", Biometrika 26, 1934), from quantiles of beta distributions.
pub fn clopper_pearson(hits: usize, trials: usize) -> Interval {
    let tail = (1.0 - CONFIDENCE) / 2.0;
    let quantile = |a: usize, b: usize, p: f64| Beta::new(a as f64, b as f64).map(|beta| beta.inverse_cdf(p));
    // A shape of 0 is no distribution: there the end is that of the range.
    Interval {
        low: quantile(hits, trials - hits + 1, tail).unwrap_or(0.0),
        high: quantile(hits + 1, trials - hits, 1.0 - tail).unwrap_or(1.0),
    }
}

/// Counts what [`judge_suite`](super::judge_suite) makes of synthetic suites; `progress` is called after each.
///
/// The same noise carries all slowdowns, each of which multiplies the candidate's times before they are rounded. A trial
/// of one case takes the cases in turn, so that trials are independent of each other.
pub fn calibrate(plan: &Plan, progress: &mut dyn FnMut()) -> Vec<Calibration> {
    count(plan, &Processes { settings: plan.settings }, progress)
}

/// A way to decide: evidence of each case, then outcomes of a suite.
pub(super) trait Rule: Sync {
    /// What is kept of a case.
    type Evidence: Send + Sync;

    /// Looks at a case's samples by process.
    fn weigh(&self, processes: &[Vec<Block>]) -> Self::Evidence;

    /// Decides about all cases of a suite.
    fn judge(&self, suite: &[&Self::Evidence]) -> Vec<Outcome>;
}

/// The rule of this module's parent.
struct Processes {
    settings: Settings,
}

impl Rule for Processes {
    type Evidence = Estimate;

    fn weigh(&self, processes: &[Vec<Block>]) -> Estimate {
        let none = Estimate { processes: 0, log_ratio: 0.0, se: f64::MAX.sqrt(), df: 1.0 };
        estimate(processes).unwrap_or(none)
    }

    fn judge(&self, suite: &[&Estimate]) -> Vec<Outcome> {
        judge(suite, &self.settings).iter().map(|judged| judged.outcome).collect()
    }
}

/// Suites between two reports of progress.
const BATCH: usize = 8;

/// Counts what a rule makes of the suites of a plan.
pub(super) fn count<R: Rule>(plan: &Plan, rule: &R, progress: &mut dyn FnMut()) -> Vec<Calibration> {
    let questions = questions(&plan.settings);
    let mut planted: Vec<f64> = questions.iter().map(|question| question.1).chain([0.0]).collect();
    planted.sort_by(f64::total_cmp);
    planted.dedup();
    let mut hits = vec![0; questions.len()];
    let suites: Vec<usize> = (0..plan.suites).collect();
    for batch in suites.chunks(BATCH) {
        let answers: Vec<Vec<bool>> =
            batch.par_iter().map(|&suite| answer(plan, rule, suite, &questions, &planted)).collect();
        for answers in answers {
            answers.iter().zip(&mut hits).for_each(|(&answer, hits)| *hits += usize::from(answer));
            progress();
        }
    }
    let row = |(&(question, planted, bound), &hits): (&(Question, f64, Bound), &usize)| {
        let ci95 = clopper_pearson(hits, plan.suites);
        let rate = hits as f64 / plan.suites.max(1) as f64;
        Calibration { question, planted, trials: plan.suites, hits, rate, ci95, bound, met: bound.allows(ci95) }
    };
    questions.iter().zip(&hits).map(row).collect()
}

/// What is asked, with which slowdown, and what must come out. The margin itself is the worst that is no regression, and
/// the least that must not pass; detection is promised from twice the margin on.
fn questions(settings: &Settings) -> Vec<(Question, f64, Bound)> {
    const SLOWDOWNS: [f64; 4] = [0.005, 0.01, 0.02, 0.05];
    let Settings { margin, alpha, power, .. } = *settings;
    let promised = |planted: f64| if planted >= 2.0 * margin { Bound::AtLeast(power) } else { Bound::None };
    let mut questions = vec![
        (Question::FalseAlarm, 0.0, Bound::AtMost(alpha)),
        (Question::FalseAlarm, margin, Bound::AtMost(alpha)),
        (Question::TruePass, 0.0, Bound::AtLeast(power)),
        (Question::FalsePass, margin, Bound::AtMost(alpha)),
        (Question::FalsePass, 2.0 * margin, Bound::AtMost(alpha)),
    ];
    for planted in SLOWDOWNS {
        questions.push((Question::CaseDetected, planted, promised(planted)));
        questions.push((Question::SuiteDetected, planted, promised(planted)));
    }
    questions
}

/// One suite's answers.
fn answer<R: Rule>(
    plan: &Plan,
    rule: &R,
    suite: usize,
    questions: &[(Question, f64, Bound)],
    planted: &[f64],
) -> Vec<bool> {
    let mut rng = ChaCha8Rng::seed_from_u64(plan.settings.seed);
    rng.set_stream(suite as u64);
    let evidence: Vec<Vec<R::Evidence>> = (0..plan.cases)
        .map(|case| {
            let times = Times::draw(plan, 1e4 * 1.25_f64.powi(case as i32), &mut rng);
            planted.iter().map(|&planted| rule.weigh(&times.blocks(1.0 + planted, plan.noise.quantum_ns))).collect()
        })
        .collect();
    let at = |ratio: f64| planted.iter().position(|&planted| planted == ratio).unwrap_or(0);
    let turn = suite % plan.cases.max(1);
    let one = |ratio: f64| -> Option<Outcome> {
        let cases: Vec<&R::Evidence> = evidence
            .iter()
            .enumerate()
            .map(|(case, at_ratios)| &at_ratios[at(if case == turn { ratio } else { 0.0 })])
            .collect();
        rule.judge(&cases).get(turn).copied()
    };
    let any = |ratio: f64| {
        let cases: Vec<&R::Evidence> = evidence.iter().map(|at_ratios| &at_ratios[at(ratio)]).collect();
        rule.judge(&cases).contains(&Outcome::Regression)
    };
    let hit = |&(question, ratio, _): &(Question, f64, Bound)| match question {
        Question::FalseAlarm | Question::SuiteDetected => any(ratio),
        Question::CaseDetected => one(ratio) == Some(Outcome::Regression),
        Question::FalsePass | Question::TruePass => one(ratio) == Some(Outcome::Pass),
    };
    questions.iter().map(hit).collect()
}

/// Times of one case before a slowdown and rounding, by process and block.
struct Times(Vec<Vec<Block>>);

impl Times {
    fn draw(plan: &Plan, base: f64, rng: &mut ChaCha8Rng) -> Self {
        Self((0..plan.processes).map(|_| process(plan, base, rng)).collect())
    }

    /// The times with a slower candidate, as a clock gives them.
    fn blocks(&self, ratio: f64, quantum: f64) -> Vec<Vec<Block>> {
        let round = |ns: f64| if quantum > 0.0 { (ns / quantum).round() * quantum } else { ns };
        let block = |Block { arms: [one, other] }: &Block| Block {
            arms: [one.iter().map(|&ns| round(ns)).collect(), other.iter().map(|&ns| round(ns * ratio)).collect()],
        };
        self.0.iter().map(|blocks| blocks.iter().map(block).collect()).collect()
    }
}

/// One process: blocks in the order AB or BA, drawn anew for each.
fn process(plan: &Plan, base: f64, rng: &mut ChaCha8Rng) -> Vec<Block> {
    let Plan { noise, blocks, samples, .. } = *plan;
    let normal = |sd: f64, rng: &mut ChaCha8Rng| sd * rng.sample::<f64, _>(StandardNormal);
    let shared = normal(noise.process_sd, rng);
    let own = [normal(noise.arm_sd, rng), normal(noise.arm_sd, rng)];
    let slope = normal(noise.drift_sd, rng) / (2 * blocks * samples) as f64;
    let innovation = noise.sample_sd * (1.0 - noise.phi * noise.phi).sqrt();
    let mut autocorrelated = normal(noise.sample_sd, rng);
    let mut position = 0.0;
    let mut sample = |arm: usize, rng: &mut ChaCha8Rng| {
        let late = if rng.random_bool(noise.late_share) { noise.late_mean * rng.sample::<f64, _>(Exp1) } else { 0.0 };
        autocorrelated = noise.phi * autocorrelated + innovation * rng.sample::<f64, _>(StandardNormal);
        position += 1.0;
        base * (shared + own[arm] + slope * position + autocorrelated + late).exp()
    };
    let mut block = || {
        let first = usize::from(rng.random_bool(0.5));
        let mut arms = [Vec::with_capacity(samples), Vec::with_capacity(samples)];
        for arm in [first, 1 - first] {
            arms[arm].extend((0..samples).map(|_| sample(arm, rng)));
        }
        Block { arms }
    };
    (0..blocks).map(|_| block()).collect()
}
