//! From raw samples to rows: what `measure` says once, `replay` says again, and a cross-check in another language too.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::case::Case;
use super::measure::{Mode, ProcessReport, Protocol, Sample};
use super::stats::{
    Block, Comparison, Description, Judged, Outcome, Series, Settings, compare, describe, judge_suite, quantum,
};
use crate::attention::CausalAlign;

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
    let [rows, keys] = [case.seq_len_q, case.seq_len_k].map(|len| len as i64);
    let diagonal = if case.options.causal_align == CausalAlign::BottomRight { keys - rows } else { 0 };
    let window = case.options.window.unwrap_or_default();
    let right = if case.options.causal { Some(0) } else { window.right };
    let seen = |row: i64| {
        let first = window.left.map_or(0, |left| (row + diagonal - i64::from(left)).clamp(0, keys));
        let end = right.map_or(keys, |right| (row + diagonal + i64::from(right) + 1).clamp(0, keys));
        (end - first).max(0) as f64
    };
    let scores = (case.batch * case.num_heads_q) as f64 * (0..rows).map(seen).sum::<f64>();
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

/// The samples of one case and mode, without the discarded ones.
struct Kept<'a> {
    samples: Vec<&'a Sample>,
    all: [usize; 2],
    kept: [usize; 2],
}

impl Measured<'_> {
    fn settings(&self) -> Settings {
        settings(self.protocol)
    }

    fn kept(&self) -> BTreeMap<(u32, Mode), Kept<'_>> {
        let mut groups: BTreeMap<(u32, Mode), Vec<&Sample>> = BTreeMap::new();
        for sample in self.samples {
            groups.entry((sample.case, sample.mode)).or_default().push(sample);
        }
        groups.into_iter().map(|(key, samples)| (key, Kept::new(samples, self.protocol.min_sm_share))).collect()
    }

    /// One row per case, mode and arm.
    pub fn measured(&self) -> Vec<MeasureRow> {
        let mut rows = Vec::new();
        for (&(case_index, mode), kept) in &self.kept() {
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
        let kept = self.kept();
        let mut rows = Vec::new();
        for mode in Mode::ALL {
            let of_mode = kept.iter().filter(|((_, of), _)| *of == mode);
            let compared: Vec<(usize, &Kept<'_>, Comparison)> = of_mode
                .filter_map(|(&(case, _), kept)| {
                    Some((case as usize, kept, compare(&kept.blocks(), &self.settings())?))
                })
                .collect();
            let judged = judge_suite(&compared.iter().map(|(.., c)| c.clone()).collect::<Vec<_>>(), &self.settings());
            for ((case_index, kept, comparison), judged) in compared.into_iter().zip(judged) {
                let discarded = kept.discarded(0).max(kept.discarded(1));
                let outcome = verdict(&judged, discarded, self.protocol);
                let name = self.cases.get(case_index).map(Case::to_string).unwrap_or_default();
                let arms = [baseline.clone(), candidate.clone()];
                rows.push(CompareRow { case_index, name, mode, arms, comparison, judged, discarded, outcome });
            }
        }
        rows
    }

    /// Per process the ratio of candidate to baseline of each block: times in a unit that other machines have too.
    pub fn ratios(&self, case_index: usize, mode: Mode) -> Vec<Series> {
        let median = |ns: &[f64]| describe(&[ns.to_vec()]).map(|stats| stats.median);
        let kept = self.kept();
        let Some(kept) = kept.get(&(case_index as u32, mode)) else { return Vec::new() };
        let ratio = |block: &Block| Some(median(&block.arms[1])? / median(&block.arms[0])?);
        kept.blocks().iter().map(|blocks| blocks.iter().filter_map(ratio).collect()).collect()
    }

    /// The share of samples of a case and mode that the clock rule discarded, of the arm that lost most.
    pub fn discarded(&self, case_index: usize, mode: Mode) -> f64 {
        let kept = self.kept();
        let shares = kept.get(&(case_index as u32, mode)).map(|kept| [kept.discarded(0), kept.discarded(1)]);
        shares.unwrap_or_default().into_iter().fold(0.0, f64::max)
    }

    /// The times of one arm, by process.
    pub fn times(&self, case_index: usize, mode: Mode, arm: usize) -> Vec<Series> {
        self.kept().get(&(case_index as u32, mode)).map(|kept| kept.series(arm)).unwrap_or_default()
    }
}

/// What the statistics need of a protocol.
pub fn settings(protocol: &Protocol) -> Settings {
    let &Protocol { margin, alpha, power, seed, .. } = protocol;
    Settings { margin, alpha, power, seed }
}

/// The verdict: nothing is concluded from what is left when too much was discarded.
pub fn verdict(judged: &Judged, discarded: f64, protocol: &Protocol) -> Outcome {
    if discarded > protocol.max_discarded { Outcome::Inconclusive } else { judged.outcome }
}

impl<'a> Kept<'a> {
    fn new(samples: Vec<&'a Sample>, min_sm_share: Option<f64>) -> Self {
        let count = |samples: &[&Sample]| [0, 1].map(|arm| samples.iter().filter(|s| s.arm == arm).count());
        let all = count(&samples);
        let mut clocks: Vec<f64> = samples.iter().filter_map(|sample| sample.sm_mhz).collect();
        clocks.sort_by(f64::total_cmp);
        let least = match (min_sm_share, describe(&[clocks])) {
            (Some(share), Some(clocks)) => share * clocks.median,
            _ => 0.0,
        };
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
