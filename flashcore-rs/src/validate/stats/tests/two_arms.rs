use super::*;

/// Blocks of processes with given log ratios, and noise of a given size in every sample.
fn paired(log_ratios: &[f64], noise: f64, rng: &mut ChaCha8Rng) -> Vec<Vec<Block>> {
    let mut sample = |log: f64| 2e4 * (log + noise * rng.sample::<f64, _>(StandardNormal)).exp();
    let mut block =
        |log: f64| Block { arms: [(0..5).map(|_| sample(0.0)).collect(), (0..5).map(|_| sample(log)).collect()] };
    log_ratios.iter().map(|&log| (0..4).map(|_| block(log)).collect()).collect()
}

#[test]
fn a_comparison_is_a_t_test_of_the_processes() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let planted = [0.011, 0.008, 0.013, 0.009, 0.010, 0.012];
    let compared = compare(&paired(&planted, 1e-4, &mut rng), &Settings::default()).expect("processes");
    let logs = &compared.log_ratios;
    assert!(logs.iter().zip(planted).all(|(found, planted)| (found - planted).abs() < 3e-4));
    let (center, spread) = (mean(logs), (variance(logs) / 6.0).sqrt());
    // With scipy: `t.isf(0.025, 5)` is 2.5705818366147395.
    let reach = 2.5705818366147395 * spread;
    assert!(close(compared.ratio, center.exp(), 1e-12) && close(compared.se, spread, 1e-12));
    assert!(
        close(compared.ci95.low, (center - reach).exp(), 1e-9)
            && close(compared.ci95.high, (center + reach).exp(), 1e-9)
    );
    assert_eq!((compared.processes, compared.df), ([6, 6], 5.0));
    // Six values give the extremes: the interval of Wilcoxon's statistic at 96.9 %.
    let bounds = compared.hodges_lehmann_ci95.expect("six processes");
    let (least, most) = (logs[1], logs[2]);
    assert!(close(bounds.low, least.exp(), 1e-12) && close(bounds.high, most.exp(), 1e-12));
}

#[test]
fn unpaired_is_welchs_test() {
    let series =
        |medians: &[f64]| -> Vec<Series> { medians.iter().map(|&ns| vec![ns - 10.0, ns, ns + 10.0]).collect() };
    let baseline = series(&[20100.0, 20200.0, 20050.0, 20150.0, 20120.0, 20080.0]);
    let candidate = series(&[20400.0, 20600.0, 20350.0, 20500.0, 20450.0, 20300.0, 20550.0]);
    let compared = compare_unpaired(&baseline, &candidate, &Settings::default()).expect("processes");
    // `ttest_ind(..., equal_var=False)` of scipy on the logarithms, and the same against log(1.005), one-sided.
    assert!(close(compared.df, 9.084550841047596, 1e-9), "{compared:?}");
    assert!(close(compared.ratio, 1.016560810824145, 1e-12));
    assert!(close(compared.ci95.low, 1.01136362, 1e-8) && close(compared.ci95.high, 1.02178471, 1e-8));
    assert!(close(compared.p_slower, 0.0003396797983673235, 1e-9));
    assert_eq!((compared.processes, compared.log_ratios.len()), ([6, 7], 7));
    assert!(close(compared.ratio.ln(), mean(&compared.log_ratios), 1e-12));
    assert_eq!(compare_unpaired(&baseline[..1], &candidate, &Settings::default()), None);
    assert_eq!(compare_unpaired(&baseline, &[vec![1.0], vec![f64::NAN]], &Settings::default()), None);
}

#[test]
fn rank_tests_are_those_of_tables_and_scipy() {
    let x = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30];
    let y = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.15, 1.29];
    // The complementary error function of statrs has ten digits.
    assert!(close(mann_whitney(&x, &y), 0.13291945818531892, 1e-9));
    assert_eq!((mann_whitney(&[1.0; 5], &[1.0; 7]), mann_whitney(&[], &x)), (1.0, 1.0));
    // Tables: of ten values the ninth smallest and largest of 55 means, of ten and ten the 24th of 100 differences.
    let ten: Vec<f64> = (0..10).map(|i| 2.0_f64.powi(i)).collect();
    let mut walsh: Vec<f64> =
        (0..10).flat_map(|i| (0..=i).map(move |j| (i, j))).map(|(i, j)| (ten[i] + ten[j]) / 2.0).collect();
    walsh.sort_by(f64::total_cmp);
    let expected = Interval { low: walsh[8], high: walsh[46] };
    assert_eq!(hodges_lehmann(&ten), Some((walsh[27], Some(expected))));
    let other: Vec<f64> = ten.iter().map(|x| 3.0 * x + 0.1).collect();
    let mut differences: Vec<f64> = other.iter().flat_map(|to| ten.iter().map(move |from| to - from)).collect();
    differences.sort_by(f64::total_cmp);
    let expected = Interval { low: differences[23], high: differences[76] };
    assert_eq!(shift(&ten, &other).and_then(|(_, interval)| interval), Some(expected));
    assert_eq!(hodges_lehmann(&ten[..5]).map(|(_, interval)| interval), Some(None));
    assert_eq!(hodges_lehmann(&[]), None);
}

#[test]
fn adjustments_are_those_of_their_papers() {
    let p = [0.01, 0.04, 0.03, 0.005, 0.5];
    let same = |one: &[f64], other: &[f64]| one.iter().zip(other).all(|(one, other)| close(*one, *other, 1e-12));
    assert!(same(&holm(&p), &[0.04, 0.09, 0.09, 0.025, 0.5]));
    assert!(same(&benjamini_hochberg(&p), &[0.025, 0.05, 0.05, 0.025, 0.5]));
    assert!(holm(&[]).is_empty() && benjamini_hochberg(&[]).is_empty());
}

/// Identical times on a coarse clock are no proof of identical kernels: the step hides up to its size.
#[test]
fn a_coarse_clock_decides_nothing() {
    let constant = |arms: [f64; 2]| vec![vec![Block { arms: arms.map(|ns| vec![ns; 5]) }; 4]; 10];
    let judge = |processes: &[Vec<Block>]| {
        let compared = compare(processes, &Settings::default()).expect("processes");
        assert!(compared.se > 0.0 && compared.ci95.low.is_finite() && compared.mde.is_finite());
        judge_suite(&[compared], &Settings::default())[0].outcome
    };
    assert_eq!(judge(&constant([20480.0, 20480.0])), Outcome::Inconclusive);
    // 2 % slower, but only one step of 1 % is seen between the arms: the clock may have steps of 2 %.
    assert_eq!(judge(&constant([20480.0, 20889.6])), Outcome::Inconclusive);
    // A single other sample shows that the step is fine enough to say "the same".
    let mut fine = constant([20480.0, 20480.0]);
    fine[3][2].arms[0][1] = 20481.0;
    assert_eq!(judge(&fine), Outcome::Pass);
    let mut slower = constant([20480.0, 20889.0]);
    slower[3][2].arms[0][1] = 20481.0;
    assert_eq!(judge(&slower), Outcome::Regression);
}

/// Rounding to a step is covered: at the margin a clock of any phase errs no more often than it may, although all its times
/// are the same, as long as the step is what the samples show.
#[test]
fn rounding_raises_no_false_alarms() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    const TRIALS: usize = 400;
    let settings = Settings::default();
    let mut alarm = || {
        let (step, base) = (128.0, 2e4 + 1000.0 * rng.random::<f64>());
        let round = |ns: f64| (ns / step).round() * step;
        let arms = [round(base), round(base * 1.005)];
        // One late sample in each process, so that the step shows.
        let block = Block { arms: arms.map(|ns| vec![ns, ns, ns, ns, ns + step]) };
        let compared = compare(&vec![vec![block; 4]; 10], &settings).expect("processes");
        judge_suite(&[compared], &settings)[0].outcome == Outcome::Regression
    };
    let alarms = (0..TRIALS).filter(|_| alarm()).count();
    assert!(clopper_pearson(alarms, TRIALS).low <= 0.05, "{alarms}");
}

#[test]
fn too_little_is_no_comparison_and_few_processes_no_verdict() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let settings = Settings::default();
    let mut processes = paired(&[0.05, 0.0501, 0.0499, 0.05, 0.0502], 1e-5, &mut rng);
    let outcome = |processes: &[Vec<Block>]| {
        compare(processes, &settings).map(|compared| judge_suite(&[compared], &settings)[0].outcome)
    };
    assert_eq!(outcome(&processes), Some(Outcome::Regression));
    assert_eq!(outcome(&processes[..4]), Some(Outcome::Inconclusive));
    processes[2].iter_mut().for_each(|block| block.arms[1].clear());
    processes[3].clear();
    let compared = compare(&processes, &settings).expect("three processes");
    assert_eq!((compared.processes, compared.log_ratios.len()), ([3, 3], 3));
    assert_eq!((outcome(&processes[..1]), outcome(&processes[2..4]), outcome(&[])), (None, None, None));
    assert!(judge_suite(&[], &settings).is_empty());
}

proptest! {
    #[test]
    fn a_slower_candidate_is_that_much_slower(ratio in 0.5..2.0_f64, scale in 0.1..10.0_f64, seed: u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let processes = paired(&[0.001, -0.002, 0.0, 0.003, 0.001, -0.001], 0.01, &mut rng);
        let times = |by: [f64; 2]| -> Vec<Vec<Block>> {
            let block = |Block { arms: [one, other] }: &Block| Block {
                arms: [one.iter().map(|ns| ns * by[0]).collect(), other.iter().map(|ns| ns * by[1]).collect()],
            };
            processes.iter().map(|blocks| blocks.iter().map(block).collect()).collect()
        };
        let settings = Settings { seed, ..Settings::default() };
        let [plain, slower] = [[1.0, 1.0], [scale, scale * ratio]].map(|by| compare(&times(by), &settings).expect("processes"));
        let pairs = [
            (plain.ratio, slower.ratio),
            (plain.ci95.low, slower.ci95.low),
            (plain.hodges_lehmann, slower.hodges_lehmann),
            (plain.bootstrap_ci95.high, slower.bootstrap_ci95.high),
        ];
        prop_assert!(pairs.iter().all(|(plain, slower)| close(plain * ratio, *slower, 1e-9)));
        prop_assert!(close(plain.se, slower.se, 1e-9));
        // Arms that change places turn the ratio around.
        let swap = |Block { arms: [one, other] }: &Block| Block { arms: [other.clone(), one.clone()] };
        let swapped: Vec<Vec<Block>> = processes.iter().map(|blocks| blocks.iter().map(swap).collect()).collect();
        let swapped = compare(&swapped, &settings).expect("processes");
        prop_assert!(close(swapped.ratio, 1.0 / plain.ratio, 1e-12) && close(swapped.ci95.low, 1.0 / plain.ci95.high, 1e-12));
        prop_assert!(close(swapped.mann_whitney_p, plain.mann_whitney_p, 1e-12));
    }

    /// A verdict and its bounds say the same.
    #[test]
    fn verdicts_are_their_bounds(cases in prop::collection::vec((-0.01..0.03_f64, 1e-4..5e-3_f64), 1..12)) {
        let mut rng = ChaCha8Rng::seed_from_u64(cases.len() as u64);
        let settings = Settings::default();
        let comparisons: Vec<Comparison> = cases.iter().map(|&(log, spread)| {
            let logs: Vec<f64> = (0..8).map(|_| log + spread * rng.sample::<f64, _>(StandardNormal)).collect();
            compare(&paired(&logs, 1e-4, &mut rng), &settings).expect("processes")
        }).collect();
        let limit = 1.0 + settings.margin;
        for (judged, compared) in judge_suite(&comparisons, &settings).iter().zip(&comparisons) {
            prop_assert_eq!(judged.outcome == Outcome::Regression, judged.lower > limit);
            prop_assert_eq!(judged.outcome == Outcome::Regression, judged.p_holm <= settings.alpha);
            prop_assert_eq!(judged.outcome == Outcome::Pass, judged.upper < limit);
            prop_assert!(judged.lower < compared.ratio && compared.ratio < judged.upper);
            let rounded = 1.0 + 1e-12;
            prop_assert!(judged.p_holm * rounded >= judged.q_bh && judged.q_bh * rounded >= compared.p_slower);
            prop_assert!(judged.mde >= compared.mde && compared.mde > settings.margin);
        }
    }

    #[test]
    fn no_comparison_is_nan(
        processes in prop::collection::vec(
            prop::collection::vec([prop::collection::vec(any_sample(), 0..4), prop::collection::vec(any_sample(), 0..4)], 0..3),
            0..7,
        ),
    ) {
        // Ratios of the smallest and the largest floats overflow, which those of times do not.
        let tame = |x: f64| if x.is_finite() { x.signum() * x.abs().clamp(1e-50, 1e50) } else { x };
        let blocks = |blocks: &Vec<[Vec<f64>; 2]>| -> Vec<Block> {
            blocks.iter().map(|arms| Block { arms: arms.clone().map(|arm| arm.into_iter().map(tame).collect()) }).collect()
        };
        let processes: Vec<Vec<Block>> = processes.iter().map(blocks).collect();
        if let Some(compared) = compare(&processes, &Settings::default()) {
            let Comparison { ratio, se, df, p_slower, mann_whitney_p, hodges_lehmann, .. } = compared;
            for value in [ratio, se, df, p_slower, mann_whitney_p, hodges_lehmann] {
                prop_assert!(value.is_finite(), "{:?}", compared);
            }
            prop_assert!((0.0..=1.0).contains(&p_slower) && (0.0..=1.0).contains(&mann_whitney_p));
            let judged = judge_suite(&[compared], &Settings::default())[0];
            prop_assert!(!judged.lower.is_nan() && !judged.upper.is_nan() && !judged.mde.is_nan());
        }
    }
}
