//! From raw samples to rows: what `measure` says once, `replay` says again, and a cross-check in another language too.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::case::Case;
use super::measure::{Mode, ProcessReport, Protocol, Sample};
use super::stats::{
    Block, Comparison, Description, Judged, Outcome, Series, compare, describe, judge_suite, median, quantum,
};
use crate::attention::{band, visible_pairs};

/// One case, mode and arm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeasureRow {
    /// Index of the case.
    pub case_index: usize,
    /// Name of the case.
    pub name: String,
    /// The case.
    pub case: Case,
    /// What the times are of.
    pub mode: Mode,
    /// Index of the arm.
    pub arm: usize,
    /// Its name.
    pub arm_name: String,
    /// What its clock can tell.
    pub timer: Timer,
    /// Share of its samples that the clock rule discarded.
    pub discarded: f64,
    /// The times, nanoseconds.
    pub stats: Description,
    /// 10^12 floating-point operations per second, of the median.
    pub tflops: f64,
    /// The speed of light, for cards whose ceilings have been measured.
    pub floor: Option<Floor>,
}

/// What a clock can tell.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timer {
    /// Its step, nanoseconds: the greatest common divisor of the differences of samples.
    pub quantum_ns: Option<f64>,
    /// What a call that does nothing takes, nanoseconds; the median over processes.
    pub floor_ns: Option<f64>,
}

/// A candidate beside a baseline: one case and mode.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompareRow {
    /// Index of the case.
    pub case_index: usize,
    /// Name of the case.
    pub name: String,
    /// What the times are of.
    pub mode: Mode,
    /// Baseline and candidate.
    pub arms: [String; 2],
    /// The ratio of their times.
    pub comparison: Comparison,
    /// What it means in this suite.
    pub judged: Judged,
    /// Share of samples that the clock rule discarded.
    pub discarded: f64,
    /// The verdict: that of the statistics, unless too much was discarded.
    pub outcome: Outcome,
}

/// The least time that a card's measured ceilings allow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// Whose ceilings.
    pub card: String,
    /// Microseconds to move the bytes, each once.
    pub bytes_us: f64,
    /// Microseconds to do the operations.
    pub flops_us: f64,
}

/// A card's measured ceilings: bytes read and dense 16-bit operations, per second.
struct Ceiling {
    card: &'static str,
    bytes: f64,
    flops: f64,
}

/// Measured with a device-wide read and an 8192^3 matrix product.
const CEILINGS: [Ceiling; 1] = [Ceiling { card: "H200", bytes: 4480e9, flops: 787e12 }];

impl Floor {
    /// The floor of a case on a device with this name.
    pub fn of(case: &Case, device: &str) -> Option<Self> {
        let ceiling = CEILINGS.iter().find(|ceiling| device.contains(ceiling.card))?;
        Some(Self {
            card: ceiling.card.into(),
            bytes_us: case.bytes() as f64 / ceiling.bytes * 1e6,
            flops_us: flops(case) / ceiling.flops * 1e6,
        })
    }

    /// The larger of the two.
    pub fn us(&self) -> f64 {
        self.bytes_us.max(self.flops_us)
    }
}

/// Floating-point operations of both products, for the keys that a row's band shows it.
pub fn flops(case: &Case) -> f64 {
    let [rows, keys] = [case.seq_len_q, case.seq_len_k];
    let scores = (case.batch * case.num_heads_q) as f64 * visible_pairs(band(&case.options, rows, keys), rows, keys);
    2.0 * scores * (case.head_dim_qk + case.head_dim_v) as f64
}

/// Everything that the rows are made from.
pub struct Measured<'a> {
    /// The cases.
    pub cases: &'a [Case],
    /// Names of the arms.
    pub arms: &'a [String],
    /// How it was measured and is judged.
    pub protocol: &'a Protocol,
    /// What the processes said.
    pub processes: &'a [ProcessReport],
    /// The samples, in the order of time.
    pub samples: &'a [Sample],
    /// The card's name, for the floor.
    pub device: &'a str,
}

/// Samples by case and mode, without the discarded ones.
pub(super) struct Grouped<'a>(BTreeMap<(u32, Mode), Kept<'a>>);

/// The samples of one case and mode, without the discarded ones.
struct Kept<'a> {
    samples: Vec<&'a Sample>,
    all: [usize; 2],
    kept: [usize; 2],
}

impl<'a> Measured<'a> {
    /// Sorts the samples, once for whatever is asked of them.
    pub(super) fn grouped(&self) -> Grouped<'a> {
        let mut groups: BTreeMap<(u32, Mode), Vec<&Sample>> = BTreeMap::new();
        for sample in self.samples {
            groups.entry((sample.case, sample.mode)).or_default().push(sample);
        }
        let kept = |(key, samples)| (key, Kept::new(samples, self.protocol.min_sm_share));
        Grouped(groups.into_iter().map(kept).collect())
    }

    /// One row per case, mode and arm.
    pub fn measured(&self) -> Vec<MeasureRow> {
        let mut rows = Vec::new();
        for (&(case_index, mode), kept) in &self.grouped().0 {
            for arm in 0..self.arms.len() {
                rows.extend(self.measure_row(case_index as usize, mode, arm, kept));
            }
        }
        rows
    }

    fn measure_row(&self, case_index: usize, mode: Mode, arm: usize, kept: &Kept<'_>) -> Option<MeasureRow> {
        let case = self.cases.get(case_index)?;
        let stats = describe(&kept.series(arm))?;
        let ns: Vec<f64> = kept.of(arm).map(|sample| sample.ns).collect();
        Some(MeasureRow {
            case_index,
            name: case.to_string(),
            case: case.clone(),
            mode,
            arm,
            arm_name: self.arms[arm].clone(),
            timer: Timer { quantum_ns: quantum(&ns), floor_ns: self.floor_ns(mode) },
            discarded: kept.discarded(arm),
            tflops: flops(case) / stats.median * 1e-3,
            stats,
            floor: Floor::of(case, self.device),
        })
    }

    fn floor_ns(&self, mode: Mode) -> Option<f64> {
        let floors = self.processes.iter().flat_map(|process| &process.floor_ns);
        let mut ns: Vec<f64> = floors.filter(|(of, _)| *of == mode).filter_map(|(_, ns)| *ns).collect();
        ns.sort_by(f64::total_cmp);
        ns.get(ns.len() / 2).copied()
    }

    /// One row per case and mode of a suite with two arms; each mode is a suite of its own.
    pub fn compared(&self) -> Vec<CompareRow> {
        let [baseline, candidate] = self.arms else { return Vec::new() };
        let settings = self.protocol.settings();
        let grouped = self.grouped();
        let of_mode = |mode: Mode| {
            let compared = grouped.0.iter().filter(|((_, of), _)| *of == mode).filter_map(|(&(case, _), kept)| {
                let name = self.cases.get(case as usize).map(Case::to_string).unwrap_or_default();
                let comparison = compare(&kept.blocks(), &settings)?;
                Some(Compared { case_index: case as usize, name, comparison, discarded: kept.most_discarded() })
            });
            judged(compared.collect(), mode, [baseline, candidate], self.protocol)
        };
        Mode::ALL.into_iter().flat_map(of_mode).collect()
    }
}

/// A case of a suite that is not judged yet.
pub(super) struct Compared {
    pub(super) case_index: usize,
    pub(super) name: String,
    pub(super) comparison: Comparison,
    /// Share of samples that the clock rule discarded.
    pub(super) discarded: f64,
}

/// Judges the cases of one suite: nothing is concluded from what is left when too much was discarded.
pub(super) fn judged(suite: Vec<Compared>, mode: Mode, arms: [&str; 2], protocol: &Protocol) -> Vec<CompareRow> {
    let comparisons: Vec<Comparison> = suite.iter().map(|compared| compared.comparison.clone()).collect();
    let row = |(compared, judged): (Compared, Judged)| {
        let Compared { case_index, name, comparison, discarded } = compared;
        let outcome = if discarded > protocol.max_discarded { Outcome::Inconclusive } else { judged.outcome };
        let arms = arms.map(str::to_owned);
        CompareRow { case_index, name, mode, arms, comparison, judged, discarded, outcome }
    };
    suite.into_iter().zip(judge_suite(&comparisons, &protocol.settings())).map(row).collect()
}

impl Grouped<'_> {
    fn kept(&self, case_index: usize, mode: Mode) -> Option<&Kept<'_>> {
        self.0.get(&(case_index as u32, mode))
    }

    /// Per process the ratio of candidate to baseline of each block: times in a unit that other machines have too.
    pub(super) fn ratios(&self, case_index: usize, mode: Mode) -> Vec<Series> {
        let Some(kept) = self.kept(case_index, mode) else { return Vec::new() };
        let ratio = |block: &Block| Some(median(&block.arms[1])? / median(&block.arms[0])?);
        kept.blocks().iter().map(|blocks| blocks.iter().filter_map(ratio).collect()).collect()
    }

    /// The share of samples that the clock rule discarded, of the arm that lost most.
    pub(super) fn discarded(&self, case_index: usize, mode: Mode) -> f64 {
        self.kept(case_index, mode).map_or(0.0, Kept::most_discarded)
    }

    /// The times of one arm, by process.
    pub(super) fn times(&self, case_index: usize, mode: Mode, arm: usize) -> Vec<Series> {
        self.kept(case_index, mode).map(|kept| kept.series(arm)).unwrap_or_default()
    }
}

impl<'a> Kept<'a> {
    fn new(samples: Vec<&'a Sample>, min_sm_share: Option<f64>) -> Self {
        let count = |samples: &[&Sample]| [0, 1].map(|arm| samples.iter().filter(|s| s.arm == arm).count());
        let all = count(&samples);
        let clocks: Vec<f64> = samples.iter().filter_map(|sample| sample.sm_mhz).collect();
        let least = min_sm_share.zip(median(&clocks)).map_or(0.0, |(share, usual)| share * usual);
        let samples: Vec<&Sample> =
            samples.into_iter().filter(|sample| sample.sm_mhz.is_none_or(|mhz| mhz >= least)).collect();
        Self { kept: count(&samples), all, samples }
    }

    fn of(&self, arm: usize) -> impl Iterator<Item = &Sample> {
        self.samples.iter().copied().filter(move |sample| sample.arm as usize == arm)
    }

    fn discarded(&self, arm: usize) -> f64 {
        (self.all[arm] - self.kept[arm]) as f64 / self.all[arm].max(1) as f64
    }

    fn most_discarded(&self) -> f64 {
        self.discarded(0).max(self.discarded(1))
    }

    fn series(&self, arm: usize) -> Vec<Series> {
        let mut processes: BTreeMap<u32, Series> = BTreeMap::new();
        for sample in self.of(arm) {
            processes.entry(sample.process).or_default().push(sample.ns);
        }
        processes.into_values().collect()
    }

    fn blocks(&self) -> Vec<Vec<Block>> {
        let mut processes: BTreeMap<u32, BTreeMap<u32, Block>> = BTreeMap::new();
        for sample in &self.samples {
            let blocks = processes.entry(sample.process).or_default();
            let block = blocks.entry(sample.block).or_insert_with(|| Block { arms: [Vec::new(), Vec::new()] });
            block.arms[sample.arm as usize].push(sample.ns);
        }
        processes.into_values().map(|blocks| blocks.into_values().collect()).collect()
    }
}
