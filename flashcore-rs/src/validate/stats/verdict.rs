//! Slower, not slower, or not known.

use serde::{Deserialize, Serialize};

use super::multiple::{benjamini_hochberg, holm};
use super::ratio::{Comparison, Estimate, Settings};
use super::student::critical;

/// Processes without which there is no verdict: with fewer, not even all of them agreeing has a chance below 5 % (2^-5 =
/// 3.1 % is the least p-value of a sign test of five), and everything would rest on the assumption of normality.
pub const MIN_PROCESSES: usize = 5;

/// What a suite says of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Slower by less than the margin.
    Pass,
    /// Slower by more.
    Regression,
    /// The data do not decide.
    Inconclusive,
}

/// A case within its suite.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    /// The verdict.
    pub outcome: Outcome,
    /// `p_slower` after Holm's adjustment, which the verdict rests on.
    pub p_holm: f64,
    /// `p_slower` after Benjamini and Hochberg's, to look around with.
    pub q_bh: f64,
    /// Lower bound of the ratio at the level of this case's step in Holm's procedure: with enough processes it is above
    /// `1 + margin` exactly for regressions.
    pub lower: f64,
    /// Upper bound of the ratio, one-sided at `1 - alpha`: below `1 + margin` for passes. It needs no adjustment:
    /// a suite passes only if all its cases do (Berger, "Multiparameter hypothesis testing and acceptance sampling",
    /// Technometrics 24, 1982).
    pub upper: f64,
    /// Smallest `ratio - 1` that is called a regression with the power asked for when no other case is, that is at
    /// `alpha` over the number of cases.
    pub mde: f64,
}

/// Judges the cases of one suite together: a regression where the Holm-adjusted p-value of "slower by no more than the
/// margin" is at most `alpha`, a pass where the upper bound is below the margin, else inconclusive; and always
/// inconclusive with fewer than [`MIN_PROCESSES`].
pub fn judge_suite(comparisons: &[Comparison], settings: &Settings) -> Vec<Judged> {
    let estimates: Vec<Estimate> = comparisons.iter().map(Estimate::of).collect();
    judge(&estimates.iter().collect::<Vec<_>>(), settings)
}

/// The same from what the verdict rests on.
pub(super) fn judge(estimates: &[&Estimate], settings: &Settings) -> Vec<Judged> {
    let Settings { margin, alpha, power, .. } = *settings;
    let decisive = |estimate: &Estimate| estimate.processes >= MIN_PROCESSES;
    let p: Vec<f64> =
        estimates.iter().map(|estimate| if decisive(estimate) { estimate.p_slower(margin) } else { 1.0 }).collect();
    let (p_holm, q_bh) = (holm(&p), benjamini_hochberg(&p));
    let judged = |i: usize| {
        let estimate = estimates[i];
        // Cases that Holm's procedure rejects before this one; it stops at the first that it does not.
        let before = p.iter().zip(&p_holm).filter(|&(&other, &adjusted)| adjusted <= alpha && other < p[i]).count();
        let level = alpha / (estimates.len() - before) as f64;
        let lower = estimate.bound(-critical(level, estimate.df));
        let upper = estimate.bound(critical(alpha, estimate.df));
        let outcome = match () {
            () if !decisive(estimate) => Outcome::Inconclusive,
            () if p_holm[i] <= alpha => Outcome::Regression,
            () if upper < 1.0 + margin => Outcome::Pass,
            () => Outcome::Inconclusive,
        };
        let mde = estimate.mde(margin, alpha / estimates.len() as f64, power);
        Judged { outcome, p_holm: p_holm[i], q_bh: q_bh[i], lower, upper, mde }
    };
    (0..estimates.len()).map(judged).collect()
}
