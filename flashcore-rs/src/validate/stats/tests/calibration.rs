use super::*;
use crate::validate::stats::simulate::{Rule, count};

/// Rows in which a promise is broken.
fn broken(rows: &[Calibration]) -> Vec<(Question, f64)> {
    rows.iter().filter(|row| !row.met).map(|row| (row.question, row.planted)).collect()
}

#[test]
fn the_rules_keep_their_promises() {
    let mut suites = 0;
    let plan = Plan::quick();
    let rows = calibrate(&plan, &mut || suites += 1);
    assert_eq!((broken(&rows), suites), (vec![], plan.suites));
    assert_eq!(rows, calibrate(&plan, &mut || ()));
}

/// One-sided p-values of a case, judged by Holm's procedure as if they were sound.
struct Naive<F>(F);

impl<F: Fn(&[Vec<Block>]) -> f64 + Sync> Rule for Naive<F> {
    type Evidence = f64;

    fn weigh(&self, processes: &[Vec<Block>]) -> f64 {
        (self.0)(processes)
    }

    fn judge(&self, suite: &[&f64]) -> Vec<Outcome> {
        let p: Vec<f64> = suite.iter().map(|&&p| p).collect();
        holm(&p).iter().map(|&p| if p <= 0.05 { Outcome::Regression } else { Outcome::Pass }).collect()
    }
}

/// A candidate's samples, made faster by the margin, beside the baseline's.
fn pooled(processes: &[Vec<Block>]) -> [Vec<f64>; 2] {
    let arm =
        |arm: usize, by: f64| processes.iter().flatten().flat_map(|block| &block.arms[arm]).map(|ns| ns / by).collect();
    [arm(0, 1.0), arm(1, 1.005)]
}

/// All samples pooled as if they were independent: the same data show at the margin that this raises false alarms.
#[test]
fn a_rule_that_ignores_processes_is_found_out() {
    let rule = Naive(|processes: &[Vec<Block>]| {
        let [baseline, candidate] = pooled(processes);
        let slower = median(&candidate) > median(&baseline);
        if slower { mann_whitney(&baseline, &candidate) / 2.0 } else { 1.0 }
    });
    let rows = count(&Plan::quick(), &rule, &mut || ());
    let at_margin =
        rows.iter().find(|row| row.question == Question::FalseAlarm && row.planted > 0.0).expect("is asked");
    assert!(at_margin.ci95.low > 0.5 && !at_margin.met, "{at_margin:?}");
    assert!(broken(&rows).contains(&(Question::FalseAlarm, 0.005)));
}

/// Blocks as if they were independent: pairs cancel the autocorrelation, but not what each process has of its own.
#[test]
fn a_rule_that_counts_blocks_is_found_out() {
    let rule = Naive(|processes: &[Vec<Block>]| {
        let blocks: Vec<Vec<Block>> = processes.iter().flatten().map(|block| vec![block.clone()]).collect();
        ratio::estimate(&blocks).map_or(1.0, |estimate| estimate.p_slower(0.005))
    });
    let noise = Noise { arm_sd: 0.003, ..Noise::default() };
    let rows = count(&Plan { suites: 20, cases: 4, noise, ..Plan::quick() }, &rule, &mut || ());
    assert!(broken(&rows).contains(&(Question::FalseAlarm, 0.005)), "{rows:?}");
}

/// No adjustment for the number of cases.
#[test]
fn a_rule_without_adjustment_is_found_out() {
    struct Unadjusted;
    impl Rule for Unadjusted {
        type Evidence = f64;

        fn weigh(&self, processes: &[Vec<Block>]) -> f64 {
            ratio::estimate(processes).map_or(1.0, |estimate| estimate.p_slower(0.005))
        }

        fn judge(&self, suite: &[&f64]) -> Vec<Outcome> {
            suite.iter().map(|&&p| if p <= 0.05 { Outcome::Regression } else { Outcome::Pass }).collect()
        }
    }
    let rows = count(&Plan { cases: 20, blocks: 3, samples: 3, ..Plan::quick() }, &Unadjusted, &mut || ());
    assert!(broken(&rows).contains(&(Question::FalseAlarm, 0.005)), "{rows:?}");
}

/// A rule that never decides has no false alarms, and is found out all the same.
#[test]
fn a_rule_that_never_decides_is_found_out() {
    struct Undecided;
    impl Rule for Undecided {
        type Evidence = ();

        fn weigh(&self, _: &[Vec<Block>]) {}

        fn judge(&self, suite: &[&()]) -> Vec<Outcome> {
            vec![Outcome::Inconclusive; suite.len()]
        }
    }
    let rows = count(&Plan { blocks: 1, samples: 1, ..Plan::quick() }, &Undecided, &mut || ());
    let expected = [(Question::TruePass, 0.0), (Question::CaseDetected, 0.01), (Question::SuiteDetected, 0.05)];
    assert!(expected.iter().all(|row| broken(&rows).contains(row)), "{rows:?}");
}

#[test]
fn few_processes_are_inconclusive() {
    for processes in [1, 2, MIN_PROCESSES - 1] {
        let rows = calibrate(&Plan { suites: 16, processes, ..Plan::quick() }, &mut || ());
        assert!(rows.iter().all(|row| row.hits == 0), "{rows:?}");
    }
}

/// Noise that the protocol does not overcome, and a clock whose steps are larger than what is looked for, cost detections,
/// not wrong verdicts.
#[test]
fn noise_and_coarse_clocks_cost_power_alone() {
    let noisy = Noise { arm_sd: 0.01, ..Noise::default() };
    let coarse = Noise { quantum_ns: 1024.0, ..Noise::default() };
    for noise in [noisy, coarse] {
        let rows = calibrate(&Plan { noise, ..Plan::quick() }, &mut || ());
        let broken = broken(&rows);
        assert!(
            broken.contains(&(Question::CaseDetected, 0.01)) && broken.contains(&(Question::TruePass, 0.0)),
            "{rows:?}"
        );
        let wrong = [Question::FalseAlarm, Question::FalsePass];
        assert!(broken.iter().all(|(question, _)| !wrong.contains(question)), "{rows:?}");
    }
}

/// A slowdown of the minimum detectable effect is detected with the power that it is given for.
#[test]
fn the_minimum_detectable_effect_has_its_power() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let settings = Settings::default();
    let (spread, count) = (0.002_f64, 10);
    let truth = ratio::Estimate {
        processes: count,
        log_ratio: 0.0,
        se: spread / (count as f64).sqrt(),
        df: (count - 1) as f64,
    };
    let planted = truth.mde(settings.margin, settings.alpha, settings.power).ln_1p();
    const TRIALS: usize = 2000;
    let mut detected = || {
        let logs: Vec<f64> = (0..count).map(|_| planted + spread * rng.sample::<f64, _>(StandardNormal)).collect();
        let seen = ratio::Estimate { log_ratio: mean(&logs), se: (variance(&logs) / count as f64).sqrt(), ..truth };
        seen.p_slower(settings.margin) <= settings.alpha
    };
    let share = (0..TRIALS).filter(|_| detected()).count() as f64 / TRIALS as f64;
    assert!((0.93..0.97).contains(&share), "{share}");
}

/// Values of `scipy.stats.binomtest(hits, trials).proportion_ci(0.95, "exact")`.
#[test]
fn shares_have_the_intervals_of_scipy() {
    let cases = [
        (0, 60, 0.0, 0.05962949228633472),
        (60, 60, 0.9403705077136653, 1.0),
        (4, 60, 0.018461777575881164, 0.16198675519767744),
        (429, 8000, 0.04878936423589337, 0.05878895119403631),
    ];
    for (hits, trials, low, high) in cases {
        let found = clopper_pearson(hits, trials);
        assert!(close(found.low, low, 1e-9) && close(found.high, high, 1e-9), "{found:?}");
    }
}
