use super::*;
use crate::validate::stats::student::{critical, upper_tail};

#[test]
fn students_t_is_that_of_scipy() {
    let quantiles = [
        (0.025, 9.0, 2.2621571627982053),
        (0.05 / 9.0, 9.0, 3.184113720001971),
        (0.05, 1.0, 6.313751514675044),
        (0.05, 4.0, 2.131846786326651),
        (1e-6, 9.0, 10.7201604099095),
        (0.025, 200.0, 1.9718962236339093),
        (0.2, 7.3, 0.893671357180227),
    ];
    for (p, df, expected) in quantiles {
        assert!(close(critical(p, df), expected, 1e-12), "{p} {df}: {}", critical(p, df));
    }
    let tails = [
        (1.0, 9.0, 0.1717181980689568),
        (12.5, 9.0, 2.717156590890327e-07),
        (-3.0, 4.0, 0.9800290159641406),
        (40.0, 11.7, 3.508922618279861e-14),
    ];
    for (t, df, expected) in tails {
        assert!(close(upper_tail(t, df), expected, 1e-11), "{t} {df}: {}", upper_tail(t, df));
    }
}

/// The ranks are those of `scipy.stats.binom`: `ppf(0.025)` and `isf(0.025) + 1`.
#[test]
fn order_statistics_have_the_ranks_of_the_binomial() {
    let cases = [
        (6, 0.5, 1, 6),
        (10, 0.5, 2, 9),
        (100, 0.9, 84, 96),
        (1000, 0.99, 983, 997),
        (200_000, 0.5, 99_562, 100_439),
        (1_000_000, 0.999, 998_938, 999_062),
    ];
    for (n, p, low, high) in cases {
        let ranks: Vec<f64> = (1..=n).map(f64::from).collect();
        let expected = Some(Interval { low: f64::from(low), high: f64::from(high) });
        assert_eq!(interval(&ranks, p, f64::from(n), 0.95), expected, "{n} {p}");
    }
    let five = [1.0, 2.0, 3.0, 4.0, 5.0];
    assert_eq!(interval(&five, 0.5, 5.0, 0.95), None);
    assert_eq!(interval(&[], 0.5, 0.0, 0.95), None);
}

#[test]
fn fewer_effective_samples_widen_the_interval() {
    let ranks: Vec<f64> = (1..=1000).map(f64::from).collect();
    let width = |ess: f64| interval(&ranks, 0.5, ess, 0.95).map(|interval| interval.high - interval.low);
    let widths = [1000.0, 500.0, 100.0, 20.0].map(|ess| width(ess).expect("enough"));
    assert!(widths.is_sorted() && widths[3] > 5.0 * widths[0], "{widths:?}");
    assert_eq!(width(5.9), None);
}

/// The interval of an autocorrelated series holds the true median as often as it says, and would not by its length alone.
#[test]
fn the_interval_of_a_median_covers_it() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (mut covered, mut naive) = (0, 0);
    const TRIALS: usize = 400;
    for _ in 0..TRIALS {
        let series = autoregressive(400, 0.6, &mut rng);
        let described = describe(std::slice::from_ref(&series)).expect("samples");
        let holds = |interval: Option<Interval>| interval.is_some_and(|i| i.low <= 0.0 && 0.0 <= i.high);
        covered += usize::from(holds(described.ci95));
        let mut sorted = series;
        sorted.sort_by(f64::total_cmp);
        naive += usize::from(holds(interval(&sorted, 0.5, 400.0, 0.95)));
    }
    assert!(clopper_pearson(covered, TRIALS).high >= 0.95, "{covered}");
    assert!(clopper_pearson(naive, TRIALS).high < 0.9, "{naive}");
}

#[test]
fn effective_samples_of_known_processes() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for (phi, tolerance) in [(0.0, 0.1), (0.3, 0.15), (0.6, 0.15), (0.9, 0.25)] {
        let series = autoregressive(20_000, phi, &mut rng);
        let expected = 20_000.0 * (1.0 - phi) / (1.0 + phi);
        assert!(close(ess(&series), expected, tolerance), "{phi}: {} of {expected}", ess(&series));
        assert!((acf(&series, 1) - phi).abs() < 0.03);
        assert!((acf(&series, 2) - phi * phi).abs() < 0.05);
    }
    let alternating = autoregressive(1000, -0.8, &mut rng);
    assert_eq!(ess(&alternating), 1000.0);
    assert_eq!((ess(&[0.1; 50]), acf(&[0.1; 50], 1)), (50.0, 0.0));
    assert_eq!((ess(&[]), ess(&[1.0]), ess(&[1.0, f64::NAN])), (0.0, 1.0, 1.0));
}

#[test]
fn the_step_of_a_clock_is_found_through_rounding() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut ticks: Vec<u32> = (0..400).map(|_| rng.random_range(600..700)).collect();
    ticks.push(5000);
    // Event times: milliseconds as 32-bit floats; and a fiftieth of them, for launches in a graph.
    let event = |scale: f64| -> Vec<f64> {
        ticks.iter().map(|&ticks| f64::from((f64::from(ticks) * 32e-6) as f32) * 1e6 / scale).collect()
    };
    assert!(close(quantum(&event(1.0)).expect("a step"), 32.0, 1e-4));
    assert!(close(quantum(&event(50.0)).expect("a step"), 0.64, 1e-4));
    let even: Vec<f64> = ticks.iter().map(|&ticks| f64::from(ticks / 2 * 2) * 1024.0).collect();
    assert_eq!(quantum(&even), Some(2048.0));
    let fine: Vec<f64> = (0..400).map(|_| 2e4 + 100.0 * rng.random::<f64>()).collect();
    assert_eq!(quantum(&fine), None);
    assert_eq!((quantum(&[]), quantum(&[5.0; 9]), quantum(&[f64::NAN, 3.0])), (None, None, None));
    assert_eq!(quantum(&[1.0, 1.5, 2.25, 1.25]), Some(0.25));
}

/// Samples about levels that begin at given offsets.
fn levels(count: usize, phi: f64, starts: &[(usize, f64)], rng: &mut ChaCha8Rng) -> Series {
    let level = |i: usize| starts.iter().rev().find(|start| start.0 <= i).map_or(0.0, |start| start.1);
    let noise = autoregressive(count, phi, rng);
    noise.iter().enumerate().map(|(i, noise)| 1000.0 + level(i) + noise).collect()
}

#[test]
fn planted_changes_are_found_where_they_are() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for phi in [0.0_f64, 0.6] {
        let size = 8.0 * ((1.0 + phi) / (1.0 - phi)).sqrt() / 2.0;
        let series = levels(400, phi, &[(100, size), (250, -size)], &mut rng);
        let found = changepoints(&series);
        assert!(found.len() == 2 && found[0].abs_diff(100) <= 2 && found[1].abs_diff(250) <= 2, "{phi}: {found:?}");
        assert!(!steady(&series));
    }
    let early = levels(400, 0.6, &[(40, -8.0)], &mut rng);
    assert!(changepoints(&early).len() == 1 && steady(&early));
}

/// Noise alone, autocorrelated, in steps of a clock and with late samples, is called steady.
#[test]
fn noise_is_not_a_change() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    const TRIALS: usize = 300;
    for (phi, step) in [(0.0, 0.0), (0.6, 0.0), (0.6, 0.5), (0.6, 2.0), (0.3, 4.0)] {
        let mut series = || -> Series {
            let noise = autoregressive(400, phi, &mut rng);
            let late =
                noise.iter().map(|noise| noise + if rng.random_bool(0.03) { 10.0 * rng.random::<f64>() } else { 0.0 });
            late.map(|ns| if step > 0.0 { (ns / step).round() * step } else { ns }).collect()
        };
        let changed = (0..TRIALS).filter(|_| !changepoints(&series()).is_empty()).count();
        assert!(clopper_pearson(changed, TRIALS).low <= 0.05, "{phi} {step}: {changed}");
    }
    assert!(changepoints(&[3.0; 100]).is_empty() && changepoints(&[]).is_empty());
    assert!(steady(&[3.0; 100]) && !steady(&[3.0; 9]) && !steady(&[]));
}

/// Squares about the means of segments, and the penalty of each change.
fn price(series: &[f64], changes: &[usize], penalty: f64) -> f64 {
    let edges: Vec<usize> = [&[0], changes, &[series.len()]].concat();
    let squares = |pair: &[usize]| {
        let segment = &series[pair[0]..pair[1]];
        variance(segment) * (segment.len() - 1) as f64
    };
    edges.windows(2).map(squares).sum::<f64>() + penalty * changes.len() as f64
}

/// The least price of any segmentation into parts of at least five, by trying every last part.
fn cheapest(series: &[f64], penalty: f64) -> f64 {
    let mut least = vec![f64::INFINITY; series.len() + 1];
    least[0] = -penalty;
    for end in 5..=series.len() {
        let prices = (0..=end - 5).map(|start| least[start] + penalty + price(&series[start..end], &[], penalty));
        least[end] = prices.fold(f64::INFINITY, f64::min);
    }
    least[series.len()]
}

proptest! {
    /// PELT prunes nothing that is in the best segmentation.
    #[test]
    fn no_segmentation_is_cheaper(
        parts in prop::collection::vec((-5.0..5.0_f64, 1..25_usize), 1..6),
        penalty in 0.5..20.0_f64,
        seed: u64,
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut series = Vec::new();
        for (level, count) in parts {
            series.extend((0..count).map(|_| level + rng.sample::<f64, _>(StandardNormal)));
        }
        prop_assume!(series.len() >= 5);
        let found = price(&series, &changes::pelt(&series, penalty), penalty);
        prop_assert!(close(found, cheapest(&series, penalty), 1e-9), "{}", found);
    }

    #[test]
    fn quantiles_are_between_their_neighbours(mut samples in prop::collection::vec(1.0..1e6_f64, 1..60), p in 0.0..=1.0_f64) {
        samples.sort_by(f64::total_cmp);
        let value = quantile(&samples, p);
        let at = p * (samples.len() - 1) as f64;
        prop_assert!(samples[at.floor() as usize] <= value && value <= samples[at.ceil() as usize]);
        prop_assert!(close(median(&samples).expect("samples"), quantile(&samples, 0.5), 1e-15));
    }

    #[test]
    fn steps_of_any_clock_are_found(step in 0.1..1e4_f64, ticks in prop::collection::vec(1000..2000_u32, 20..100)) {
        let divide = |one: u32, other: u32| { let (mut a, mut b) = (one, other); while b > 0 { (a, b) = (b, a % b); } a };
        let common = ticks.iter().fold(0, |common, &tick| divide(common, tick.abs_diff(ticks[0])));
        let samples: Vec<f64> = ticks.iter().map(|&tick| f64::from(tick) * step).collect();
        match quantum(&samples) {
            Some(found) => prop_assert!(close(found, f64::from(common) * step, 1e-9)),
            None => prop_assert_eq!(common, 0),
        }
    }

    #[test]
    fn no_description_is_nan(processes in prop::collection::vec(prop::collection::vec(any_sample(), 0..40), 0..5)) {
        let count: usize = processes.iter().map(|series| finite(series).len()).sum();
        // Squares of the largest floats overflow, which times do not.
        let processes: Vec<Series> =
            processes.iter().map(|s| s.iter().map(|x| if x.is_finite() { x.clamp(-1e100, 1e100) } else { *x }).collect()).collect();
        match describe(&processes) {
            None => prop_assert_eq!(count, 0),
            Some(d) => {
                prop_assert_eq!(d.samples, count);
                for value in [d.median, d.mean, d.sd, d.mad, d.min, d.max, d.acf1, d.ess] {
                    prop_assert!(value.is_finite(), "{:?}", d);
                }
                prop_assert!(d.percentiles.iter().all(|percentile| d.min <= percentile.ns && percentile.ns <= d.max));
                prop_assert!(d.ess <= count as f64 && d.changepoints.iter().all(|&change| change < count));
            }
        }
    }
}

#[test]
fn percentiles_without_enough_samples_have_no_interval() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let known = |count: usize, rng: &mut ChaCha8Rng| -> Vec<bool> {
        let described = describe(&[autoregressive(count, 0.0, rng)]).expect("samples");
        described.percentiles.iter().map(|percentile| percentile.ci.is_some()).collect()
    };
    assert_eq!(known(15, &mut rng), [false; 5]);
    assert_eq!(known(60, &mut rng), [true, false, false, false, false]);
    assert_eq!(known(800, &mut rng), [true, true, true, false, false]);
    assert_eq!(known(1500, &mut rng), [true, true, true, true, false]);
    assert_eq!(known(15_000, &mut rng), [true; 5]);
}
