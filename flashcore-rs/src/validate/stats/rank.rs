//! Estimates and tests by ranks.

use statrs::function::erf::erfc;

use super::order::{quantile, sorted};
use super::{CONFIDENCE, Interval};

/// The median of all pairwise means, each value with itself included, and Wilcoxon's signed-rank interval for the centre
/// of symmetry at 95 % (Hodges and Lehmann, "Estimates of location based on rank tests", Annals of Mathematical Statistics
/// 34, 1963; Hollander, Wolfe and Chicken, "Nonparametric Statistical Methods", 3rd edition, sections 3.2 and 3.3). `None`
/// for the interval of fewer than six values.
pub fn hodges_lehmann(values: &[f64]) -> Option<(f64, Option<Interval>)> {
    let walsh: Vec<f64> = (0..values.len())
        .flat_map(|i| (0..=i).map(move |j| (i, j)))
        .map(|(i, j)| (values[i] + values[j]) / 2.0)
        .collect();
    centre(&walsh, &signed_rank(values.len()))
}

/// The median of all differences `to - from`, and the Mann-Whitney interval for the shift at 95 % (same sources, sections
/// 4.2 and 4.3).
pub fn shift(from: &[f64], to: &[f64]) -> Option<(f64, Option<Interval>)> {
    let differences: Vec<f64> = to.iter().flat_map(|to| from.iter().map(move |from| to - from)).collect();
    centre(&differences, &rank_sum(from.len(), to.len()))
}

/// The median of what a rank statistic counts, and the interval that the statistic's exact distribution gives.
fn centre(counted: &[f64], distribution: &[f64]) -> Option<(f64, Option<Interval>)> {
    let sorted = sorted(counted);
    if sorted.is_empty() {
        return None;
    }
    let mut below = 0.0;
    let outside = |chance: &&f64| {
        below += **chance;
        below <= (1.0 - CONFIDENCE) / 2.0
    };
    let rank = distribution.iter().take_while(outside).count();
    let interval = (rank > 0).then(|| Interval { low: sorted[rank - 1], high: sorted[sorted.len() - rank] });
    Some((quantile(&sorted, 0.5), interval))
}

/// Chances of Wilcoxon's signed-rank statistic of `n` values: each rank counts or not.
fn signed_rank(n: usize) -> Vec<f64> {
    let mut chances = vec![1.0];
    for rank in 1..=n {
        let mut next = vec![0.0; chances.len() + rank];
        for (sum, chance) in chances.iter().enumerate() {
            next[sum] += chance / 2.0;
            next[sum + rank] += chance / 2.0;
        }
        chances = next;
    }
    chances
}

/// Chances of the Mann-Whitney statistic of `m` and `n` values (Mann and Whitney, "On a test of whether one of two random
/// variables is stochastically larger than the other", Annals of Mathematical Statistics 18, 1947, equation 3): the
/// largest of all is one of the `m` or one of the `n`.
fn rank_sum(m: usize, n: usize) -> Vec<f64> {
    let mut row: Vec<Vec<f64>> = vec![vec![1.0]; n + 1];
    for i in 1..=m {
        let mut next = vec![vec![1.0]];
        for j in 1..=n {
            let mut chances = vec![0.0; i * j + 1];
            let share = i as f64 / (i + j) as f64;
            for (u, chance) in row[j].iter().enumerate() {
                chances[u + j] += share * chance;
            }
            for (u, chance) in next[j - 1].iter().enumerate() {
                chances[u] += (1.0 - share) * chance;
            }
            next.push(chances);
        }
        row = next;
    }
    row.pop().unwrap_or_default()
}

/// Two-sided p-value of the Mann-Whitney test by the normal approximation, with corrections for ties and continuity (same
/// book, section 4.1, equations 4.8 to 4.12). It takes samples for independent, which those of one process are not.
pub fn mann_whitney(one: &[f64], other: &[f64]) -> f64 {
    let (first, second) = (super::finite(one), super::finite(other));
    let (m, n) = (first.len() as f64, second.len() as f64);
    let mut pooled: Vec<(f64, bool)> =
        first.into_iter().map(|x| (x, true)).chain(second.into_iter().map(|x| (x, false))).collect();
    pooled.sort_unstable_by(|one, other| one.0.total_cmp(&other.0));
    let (mut rank_sum, mut ties, mut before) = (0.0, 0.0, 0.0);
    for tied in pooled.chunk_by(|one, other| one.0 == other.0) {
        let count = tied.len() as f64;
        rank_sum += tied.iter().filter(|(_, first)| *first).count() as f64 * (before + (count + 1.0) / 2.0);
        ties += count * (count * count - 1.0);
        before += count;
    }
    let all = m + n;
    // Without samples of both, or where all are alike, there is nothing to tell.
    if m == 0.0 || n == 0.0 || ties == all * (all * all - 1.0) {
        return 1.0;
    }
    let variance = m * n / 12.0 * (all + 1.0 - ties / (all * (all - 1.0)));
    let distance = (rank_sum - m * (m + 1.0) / 2.0 - m * n / 2.0).abs() - 0.5;
    erfc(distance.max(0.0) / variance.sqrt() / std::f64::consts::SQRT_2).min(1.0)
}
