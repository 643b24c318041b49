//! How much slower a candidate is than its baseline, and how well that is known.

use serde::{Deserialize, Serialize};

use super::bootstrap;
use super::clock::quantum;
use super::order::median;
use super::rank::{hodges_lehmann, mann_whitney, shift};
use super::student::{critical, upper_tail};
use super::{CONFIDENCE, Interval, Series, finite, mean, variance};

/// Samples that were taken next to each other, in the order AB or BA.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Block {
    /// Nanoseconds of the baseline and of the candidate.
    pub arms: [Vec<f64>; 2],
}

/// What a verdict is to hold to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// How much slower is not yet a regression: 0.005 is half a percent.
    pub margin: f64,
    /// Chance of any false alarm in a suite, and of a false pass of a case.
    pub alpha: f64,
    /// Chance of detection that the minimum detectable effect is given for.
    pub power: f64,
    /// Seed of the bootstrap.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { margin: 0.005, alpha: 0.05, power: 0.95, seed: 0 }
    }
}

/// One case in one mode: candidate over baseline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// How many times as long the candidate takes: the geometric mean over processes.
    pub ratio: f64,
    /// Its t-interval over processes.
    pub ci95: Interval,
    /// Processes with samples: those with both arms, and of an unpaired comparison the baseline's and the candidate's.
    pub processes: [usize; 2],
    /// Logarithm of the ratio by process. Paired: the median over blocks of the log ratio of the arms' medians. Unpaired: each
    /// candidate process's log median less the baseline's mean log median.
    pub log_ratios: Vec<f64>,
    /// Standard error of the log ratio; see [`compare`].
    pub se: f64,
    /// Degrees of freedom of the t distribution.
    pub df: f64,
    /// The ratio by ranks; see [`hodges_lehmann`], and [`shift`] for an unpaired comparison.
    pub hodges_lehmann: f64,
    /// Its interval; `None` where the processes are too few for 95 %.
    pub hodges_lehmann_ci95: Option<Interval>,
    /// Percentile interval of the cluster bootstrap: processes, then blocks. A cross-check only.
    pub bootstrap_ci95: Interval,
    /// Mann-Whitney test of all samples, two-sided. A diagnostic only: samples are not independent.
    pub mann_whitney_p: f64,
    /// One-sided p-value of "the ratio is at most `1 + margin`". That of "it is at least" is `1 - p_slower`.
    pub p_slower: f64,
    /// Smallest `ratio - 1` that would be called a regression with the power asked for, were this the only case.
    pub mde: f64,
}

/// What a verdict rests on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Estimate {
    /// Processes, the fewer where the arms have different numbers.
    pub processes: usize,
    /// Mean log ratio.
    pub log_ratio: f64,
    /// Its standard error.
    pub se: f64,
    /// Degrees of freedom.
    pub df: f64,
}

impl Estimate {
    /// What is in a comparison.
    pub fn of(comparison: &Comparison) -> Self {
        let Comparison { processes: [one, other], ratio, se, df, .. } = *comparison;
        Self { processes: one.min(other), log_ratio: ratio.ln(), se, df }
    }

    /// One-sided p-value of a ratio of at most `1 + margin`. A ratio without any error is above or it is not.
    pub fn p_slower(&self, margin: f64) -> f64 {
        let distance = self.log_ratio - margin.ln_1p();
        match self.se > 0.0 {
            true => upper_tail(distance / self.se, self.df),
            false if distance > 0.0 => 0.0,
            false => 1.0,
        }
    }

    /// The ratio so many standard errors away.
    pub fn bound(&self, errors: f64) -> f64 {
        (self.log_ratio + errors * self.se).exp()
    }

    /// Minimum detectable effect: margin plus the critical values of level and power, in standard errors (Bloom, "Minimum
    /// detectable effects", Evaluation Review 19, 1995).
    pub fn mde(&self, margin: f64, level: f64, power: f64) -> f64 {
        let errors = critical(level, self.df) + critical(1.0 - power, self.df);
        (margin.ln_1p() + errors * self.se).exp_m1()
    }
}

/// The blocks' log ratios and the arms' medians of one process.
struct Process {
    log_ratios: Vec<f64>,
    log_ratio: f64,
    medians: [f64; 2],
}

impl Process {
    /// `None` without a block in which both arms have a positive median.
    fn of(blocks: &[Block]) -> Option<Self> {
        let medians = |block: &Block| {
            let [one, other] = [median(&block.arms[0])?, median(&block.arms[1])?];
            (one > 0.0 && other > 0.0).then_some([one, other])
        };
        let medians: Vec<[f64; 2]> = blocks.iter().filter_map(medians).collect();
        let log_ratios: Vec<f64> = medians.iter().map(|[one, other]| (other / one).ln()).collect();
        let arm = |arm: usize| median(&medians.iter().map(|block| block[arm]).collect::<Vec<f64>>());
        Some(Self { log_ratio: median(&log_ratios)?, medians: [arm(0)?, arm(1)?], log_ratios })
    }
}

/// Compares two arms that took turns in the same processes; `None` with fewer than two processes that have both.
///
/// Each process gives one log ratio, and these a t-interval. To their variance, and to their mean, belongs what rounding
/// to the clock's step `q` can hide. An arm's process medians vary by at least `q^2/12`, whatever a few of them show. And
/// where they spread by less than half a step, they are all rounded the same way: the mean square of that bias is at
/// most `q^2/12 exp(-(2 pi s/q)^2)` for a spread `s` (from the characteristic function of the rounding error: Widrow and
/// Kollár, "Quantization Noise", 2008, section 5). So the squared standard error is `max(v, r)/n + b`, where `v` is the
/// variance of `n` log ratios, `r` the sum over the arms of `q^2/12` and `b` that of the bias, both over the square of the
/// arm's mean. A clock that says nothing but one time may have that time for a step.
pub fn compare(processes: &[Vec<Block>], settings: &Settings) -> Option<Comparison> {
    let (estimate, paired) = paired(processes)?;
    let log_ratios: Vec<f64> = paired.iter().map(|process| process.log_ratio).collect();
    let blocks: Vec<Vec<f64>> = paired.into_iter().map(|process| process.log_ratios).collect();
    let arm =
        |arm: usize| -> Vec<f64> { processes.iter().flatten().flat_map(|block| &block.arms[arm]).copied().collect() };
    Some(comparison(Parts {
        estimate,
        processes: [log_ratios.len(); 2],
        centre: hodges_lehmann(&log_ratios)?,
        log_ratios,
        bootstrap: bootstrap::percentile(&bootstrap::means(&blocks, settings.seed)),
        mann_whitney_p: mann_whitney(&arm(0), &arm(1)),
        settings,
    }))
}

/// The estimate that a verdict rests on, without the diagnostics.
pub(super) fn estimate(processes: &[Vec<Block>]) -> Option<Estimate> {
    paired(processes).map(|(estimate, _)| estimate)
}

fn paired(processes: &[Vec<Block>]) -> Option<(Estimate, Vec<Process>)> {
    let paired: Vec<Process> = processes.iter().filter_map(|blocks| Process::of(blocks)).collect();
    if paired.len() < 2 {
        return None;
    }
    let samples: Vec<f64> = processes.iter().flatten().flat_map(|block| block.arms.iter().flatten()).copied().collect();
    let step = step(&samples);
    let log_ratios: Vec<f64> = paired.iter().map(|process| process.log_ratio).collect();
    let rounding = [0, 1].map(|arm| {
        let medians: Vec<f64> = paired.iter().map(|process| process.medians[arm]).collect();
        Rounding::of(&medians, step)
    });
    let spread = variance(&log_ratios).max(rounding[0].variance + rounding[1].variance);
    let squared = spread / paired.len() as f64 + rounding[0].bias + rounding[1].bias;
    let df = (paired.len() - 1) as f64;
    Some((Estimate { processes: paired.len(), log_ratio: mean(&log_ratios), se: squared.sqrt(), df }, paired))
}

/// Compares arms that were measured apart, each in its own processes, for a baseline that is kept in a file: Welch's test
/// on the processes' log medians (Welch, "The generalization of Student's problem when several different population
/// variances are involved", Biometrika 34, 1947). `None` with fewer than two processes with positive medians in either.
///
/// What differs between the two occasions (machine, clocks, temperature) counts as slower or faster.
pub fn compare_unpaired(baseline: &[Series], candidate: &[Series], settings: &Settings) -> Option<Comparison> {
    let step = step(&[baseline, candidate].concat().concat());
    let arms = [baseline, candidate].map(|arm| -> Vec<f64> {
        arm.iter().filter_map(|series| median(series)).filter(|&median| median > 0.0).collect()
    });
    if arms.iter().any(|medians| medians.len() < 2) {
        return None;
    }
    let logs = arms.each_ref().map(|medians| -> Vec<f64> { medians.iter().map(|median| median.ln()).collect() });
    let rounding = arms.each_ref().map(|medians| Rounding::of(medians, step));
    let squares = [0, 1].map(|arm| variance(&logs[arm]).max(rounding[arm].variance) / logs[arm].len() as f64);
    let estimate = Estimate {
        processes: logs[0].len().min(logs[1].len()),
        log_ratio: mean(&logs[1]) - mean(&logs[0]),
        se: (squares[0] + squares[1] + rounding[0].bias + rounding[1].bias).sqrt(),
        df: welch(squares, [logs[0].len(), logs[1].len()]),
    };
    let single = |logs: &[f64]| -> Vec<Vec<f64>> { logs.iter().map(|&log| vec![log]).collect() };
    let from = bootstrap::means(&single(&logs[0]), settings.seed);
    let to = bootstrap::means(&single(&logs[1]), settings.seed.wrapping_add(1));
    let level = mean(&logs[0]);
    Some(comparison(Parts {
        estimate,
        processes: [logs[0].len(), logs[1].len()],
        centre: shift(&logs[0], &logs[1])?,
        log_ratios: logs[1].iter().map(|log| log - level).collect(),
        bootstrap: bootstrap::percentile(&from.iter().zip(&to).map(|(from, to)| to - from).collect::<Vec<f64>>()),
        mann_whitney_p: mann_whitney(&finite(&baseline.concat()), &finite(&candidate.concat())),
        settings,
    }))
}

/// Degrees of freedom of a sum of two squared standard errors (Welch and Satterthwaite); those of equal variances where
/// nothing varies.
fn welch(squares: [f64; 2], counts: [usize; 2]) -> f64 {
    let [one, other] = counts.map(|count| (count - 1) as f64);
    let parts = squares[0].powi(2) / one + squares[1].powi(2) / other;
    if parts > 0.0 { (squares[0] + squares[1]).powi(2) / parts } else { one + other }
}

/// The clock's step as far as samples show it: 0 for one that is finer than its noise, and the time itself where there is
/// only one.
fn step(samples: &[f64]) -> f64 {
    let samples = finite(samples);
    let same = samples.windows(2).all(|pair| pair[0] == pair[1]);
    let only = samples.first().copied().filter(|_| same);
    only.or_else(|| quantum(&samples)).unwrap_or(0.0)
}

/// What rounding does to the log medians of an arm; see [`compare`].
struct Rounding {
    /// Variance of one.
    variance: f64,
    /// Mean square of what they have in common.
    bias: f64,
}

impl Rounding {
    fn of(medians: &[f64], step: f64) -> Self {
        if step <= 0.0 {
            return Self { variance: 0.0, bias: 0.0 };
        }
        let square = (step / mean(medians)).powi(2) / 12.0;
        let spread = 2.0 * std::f64::consts::PI * variance(medians).sqrt() / step;
        Self { variance: square, bias: square * (-spread * spread).exp() }
    }
}

/// What a comparison is put together from; logarithms.
struct Parts<'a> {
    estimate: Estimate,
    processes: [usize; 2],
    log_ratios: Vec<f64>,
    centre: (f64, Option<Interval>),
    bootstrap: Interval,
    mann_whitney_p: f64,
    settings: &'a Settings,
}

fn comparison(parts: Parts<'_>) -> Comparison {
    let Parts { estimate, processes, log_ratios, centre, bootstrap, mann_whitney_p, settings } = parts;
    let reach = critical((1.0 - CONFIDENCE) / 2.0, estimate.df);
    Comparison {
        ratio: estimate.log_ratio.exp(),
        ci95: Interval { low: estimate.bound(-reach), high: estimate.bound(reach) },
        processes,
        log_ratios,
        se: estimate.se,
        df: estimate.df,
        hodges_lehmann: centre.0.exp(),
        hodges_lehmann_ci95: centre.1.map(|interval| interval.map(f64::exp)),
        bootstrap_ci95: bootstrap.map(f64::exp),
        mann_whitney_p,
        p_slower: estimate.p_slower(settings.margin),
        mde: estimate.mde(settings.margin, settings.alpha, settings.power),
    }
}
