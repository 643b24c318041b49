//! What to measure, as data: it goes to the processes that measure, and into the evidence.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::super::case::Case;
use super::super::stats::Settings;
use crate::tensor::Device;

/// What a sample is the time of; see the [module](super).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The whole call, by the host's clock.
    Call,
    /// One launch after a flush of the L2 cache, by events.
    Cold,
    /// One launch after another of the same, by events.
    Hot,
    /// One of many launches in a graph, by events.
    Graph,
}

impl Mode {
    /// All modes; a device has all, the CPU the first.
    pub const ALL: [Self; 4] = [Self::Call, Self::Cold, Self::Hot, Self::Graph];

    /// As reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Call => "call",
            Self::Cold => "cold",
            Self::Hot => "hot",
            Self::Graph => "graph",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|mode| mode.name() == text).ok_or_else(|| "expected call, cold, hot or graph".into())
    }
}

/// Where an arm's code is from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The embedded bundle that suits the device.
    Embedded,
    /// The embedded bundle of an architecture.
    Arch(String),
    /// A bundle in a file.
    Bundle(PathBuf),
    /// The CPU backend.
    Cpu,
    /// Eager attention on one CPU thread: what the CPU backend is compared with where runs are from different machines.
    Reference,
    /// Whatever another program calls so; see [`run_suite`](super::run_suite).
    External(String),
}

/// One of the things that are timed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArmSpec {
    /// Where its code is from.
    pub source: Source,
    /// Microseconds that are added to every call: a planted slowdown.
    #[serde(default)]
    pub delay_us: f64,
}

impl From<Source> for ArmSpec {
    fn from(source: Source) -> Self {
        Self { source, delay_us: 0.0 }
    }
}

impl ArmSpec {
    /// Whether it runs on the host, where events say nothing about its time.
    pub(in crate::validate) fn is_on_host(&self) -> bool {
        matches!(self.source, Source::Cpu | Source::Reference)
    }
}

impl FromStr for ArmSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let source = match text {
            "embedded" => Source::Embedded,
            "cpu" => Source::Cpu,
            "reference" => Source::Reference,
            _ if text.starts_with("sm_") || text.starts_with("compute_") => Source::Arch(text.into()),
            _ if text.ends_with(".fcb") => Source::Bundle(text.into()),
            _ => {
                return Err(
                    "expected embedded, an architecture such as sm_80, a bundle FILE.fcb, cpu or reference".into()
                );
            }
        };
        Ok(source.into())
    }
}

impl fmt::Display for ArmSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Embedded => f.write_str("embedded")?,
            Source::Arch(arch) => f.write_str(arch)?,
            Source::Bundle(path) => write!(f, "{}", path.file_name().unwrap_or_default().to_string_lossy())?,
            Source::Cpu => f.write_str("cpu")?,
            Source::Reference => f.write_str("reference")?,
            Source::External(name) => f.write_str(name)?,
        }
        if self.delay_us > 0.0 { write!(f, " + {} us", self.delay_us) } else { Ok(()) }
    }
}

/// How to measure, and how to judge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Protocol {
    /// What to take the time of.
    pub modes: Vec<Mode>,
    /// Fresh processes, one after the other.
    pub processes: u32,
    /// Blocks of each case and mode in a process.
    pub blocks: u32,
    /// Samples of each arm in a block.
    pub samples: u32,
    /// Copies of an arm's tensors; blocks go round them.
    pub sets: usize,
    /// The most unmeasured samples of each case and arm at the start of a process. Warming up ends before, once there is no
    /// change point in the last half of them.
    pub warmup: usize,
    /// Bytes written to flush the L2 cache, in units of its size.
    pub flush: u32,
    /// Slowdown that is still no regression, as a share.
    pub margin: f64,
    /// Error rate of the whole suite: regressions that are none.
    pub alpha: f64,
    /// Power at which the smallest effect that would be found is stated.
    pub power: f64,
    /// Coverage of the intervals.
    pub confidence: f64,
    /// A sample is discarded when the SM clock after it is less than this share of the median of its case and mode.
    pub min_sm_share: Option<f64>,
    /// Share of discarded samples beyond which nothing is concluded.
    pub max_discarded: f64,
    /// Seed of inputs, orders and resampling.
    pub seed: u64,
}

impl Default for Protocol {
    fn default() -> Self {
        Self {
            modes: Mode::ALL.to_vec(),
            processes: 10,
            blocks: 20,
            samples: 20,
            sets: 3,
            warmup: 400,
            flush: 2,
            margin: 0.005,
            alpha: 0.05,
            power: 0.95,
            confidence: 0.95,
            min_sm_share: Some(0.75),
            max_discarded: 0.05,
            seed: 0,
        }
    }
}

impl Protocol {
    /// What the statistics need of it.
    pub fn settings(&self) -> Settings {
        let &Self { margin, alpha, power, seed, .. } = self;
        Settings { margin, alpha, power, seed }
    }

    /// What suits a device, at length or for a smoke run.
    pub fn for_device(device: Device, quick: bool) -> Self {
        let gpu = Self::default();
        let cpu = Self { modes: vec![Mode::Call], sets: 1, samples: 1, min_sm_share: None, ..gpu.clone() };
        match (device, quick) {
            (Device::Cuda(_), false) => gpu,
            (Device::Cuda(_), true) => Self { processes: 5, blocks: 3, samples: 5, warmup: 50, ..gpu },
            (Device::Cpu, false) => Self { processes: 2, blocks: 4, warmup: 1, ..cpu },
            (Device::Cpu, true) => Self { processes: 1, blocks: 1, warmup: 0, ..cpu },
        }
    }
}

impl Protocol {
    /// Whether it can be measured and judged by.
    ///
    /// # Errors
    /// The first field that cannot be, with what it is and what it may be.
    pub fn check(&self) -> Result<(), String> {
        let count = |n: usize| (n as f64, n > 0, "at least 1");
        let share = |x: f64| (x, x > 0.0 && x < 1.0, "more than 0 and less than 1");
        let distinct = self.modes.iter().enumerate().all(|(i, mode)| !self.modes[..i].contains(mode));
        let fields = [
            ("processes", count(self.processes as usize)),
            ("blocks", count(self.blocks as usize)),
            ("samples", count(self.samples as usize)),
            ("sets", count(self.sets)),
            ("flush", count(self.flush as usize)),
            ("margin", (self.margin, self.margin >= 0.0 && self.margin.is_finite(), "0 or a positive share")),
            ("alpha", share(self.alpha)),
            ("power", share(self.power)),
            ("confidence", (self.confidence, self.confidence == 0.95, "0.95 alone")),
            ("max_discarded", (self.max_discarded, (0.0..=1.0).contains(&self.max_discarded), "a share from 0 to 1")),
        ];
        if self.modes.is_empty() || !distinct {
            return Err(format!("modes: given {:?}; accepted some of call, cold, hot, graph, each once", self.modes));
        }
        match fields.into_iter().find(|(_, (_, fits, _))| !fits) {
            Some((name, (given, _, accepted))) => Err(format!("{name}: given {given}; accepted {accepted}")),
            None => Ok(()),
        }
    }
}

/// What a process measures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Suite {
    /// The problems.
    pub cases: Vec<Case>,
    /// One, or a baseline and a candidate.
    pub arms: Vec<ArmSpec>,
    /// The device's ordinal.
    pub ordinal: u32,
    /// How.
    pub protocol: Protocol,
}

impl Suite {
    /// Samples of one process.
    pub fn samples_per_process(&self) -> usize {
        let Protocol { modes, blocks, samples, .. } = &self.protocol;
        self.cases.len() * modes.len() * self.arms.len() * *blocks as usize * *samples as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_that_decide_nothing_are_refused() {
        let of = |change: fn(&mut Protocol)| {
            let mut protocol = Protocol::default();
            change(&mut protocol);
            protocol.check().err().unwrap_or_default()
        };
        assert_eq!(of(|_| ()), "");
        assert_eq!(of(|p| p.margin = 0.0), "");
        assert_eq!(of(|p| p.samples = 0), "samples: given 0; accepted at least 1");
        assert_eq!(of(|p| p.margin = f64::NAN), "margin: given NaN; accepted 0 or a positive share");
        assert!(of(|p| p.margin = -1.0).starts_with("margin: given -1;"));
        assert!(of(|p| p.alpha = 2.0).starts_with("alpha: given 2;"));
        assert!(of(|p| p.confidence = 0.99).starts_with("confidence: given 0.99;"));
        assert!(of(|p| p.modes = vec![Mode::Call; 2]).starts_with("modes: given [Call, Call];"));
        assert!(of(|p| p.modes.clear()).starts_with("modes: given [];"));
    }
}
