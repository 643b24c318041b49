//! Measuring in fresh processes: what one does, and how they are started.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::arm::Arm;
use super::bench::{Bench, Reading, Reference, Timed, Turn};
use super::samples::Sample;
use super::spec::{ArmSpec, Mode, Source, Suite};
use crate::device::Stream;
use crate::runtime::Runtime;
use crate::tensor::Device;
use crate::validate::case::Case;
use crate::validate::environment::State;
use crate::validate::inputs::Inputs;
use crate::validate::open;
use crate::validate::stats::steady;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Samples between two looks at whether warming up is done.
const CHUNK: usize = 50;
/// Share of the device's memory, and bytes of the host's, that the tensors of cases measured together may take.
const DEVICE_SHARE: usize = 2;
const HOST_BYTES: usize = 4 << 30;

/// What a process has to say beside its samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProcessReport {
    /// Its number.
    pub process: u32,
    /// How each case and arm was warmed up.
    pub warmups: Vec<Warmup>,
    /// Nanoseconds of a call that does nothing, by mode.
    pub floor_ns: Vec<(Mode, Option<f64>)>,
    /// The card before and after, where it says.
    pub state: Option<[State; 2]>,
}

/// How a case was warmed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warmup {
    /// Index of the case.
    pub case: u32,
    /// Index of the arm.
    pub arm: u32,
    /// Unmeasured samples.
    pub samples: usize,
    /// Whether there was no change point in the last half of them; `None` when there were too few to tell.
    pub steady: Option<bool>,
}

/// What a process writes, one a line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Sample(Sample),
    Report(ProcessReport),
}

/// Runs a suite in fresh processes of `program`, a command with its first arguments. `progress` is called for every sample.
///
/// The command is given the words `measure-process N`, where N counts the processes, and a [`Suite`] as JSON on its standard
/// input. On its standard output it writes a line of JSON for every [`Sample`], `{"sample": ...}`, in the order of time, and
/// `{"report": ...}` with a [`ProcessReport`]. This program does so (see [`run_process`]); others may, for arms that are
/// [`Source::External`].
///
/// # Errors
/// When a process cannot be started or fails; it has said why on its standard error.
pub fn run_suite(
    program: &[OsString],
    suite: &Suite,
    progress: &mut dyn FnMut(),
) -> Result<(Vec<Sample>, Vec<ProcessReport>)> {
    let (mut samples, mut reports) = (Vec::new(), Vec::new());
    let [program, arguments @ ..] = program else { return Err("no program to measure with".into()) };
    for process in 0..suite.protocol.processes {
        let mut child = Command::new(program)
            .args(arguments)
            .args(["measure-process", &process.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}", program.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // Whether it read its suite shows in what it writes.
            drop(stdin.write_all(&serde_json::to_vec(suite)?));
        }
        let lines = match child.stdout.take() {
            Some(stdout) => read_lines(BufReader::new(stdout), progress),
            None => Err("no standard output".into()),
        };
        if lines.is_err() {
            // It may have ended by itself.
            drop(child.kill());
        }
        let status = child.wait()?;
        let named = |error: &dyn std::fmt::Display| format!("process {process} that measures: {error}");
        let (sampled, reported) = lines.map_err(|error| named(&error))?;
        if !status.success() {
            return Err(named(&format_args!("ended with {status}")).into());
        }
        complete(suite, process, &sampled, &reported).map_err(|error| named(&error))?;
        samples.extend(sampled);
        reports.extend(reported);
    }
    Ok((samples, reports))
}

/// Whether a process wrote what its suite asks for.
fn complete(suite: &Suite, process: u32, samples: &[Sample], reports: &[ProcessReport]) -> Result<(), String> {
    let fits = |sample: &Sample| sample.fits(suite.cases.len(), suite.arms.len(), &suite.protocol.modes);
    if let Some(sample) = samples.iter().find(|sample| sample.process != process || !fits(sample)) {
        return Err(format!("{sample:?} is none of this suite and process, or no time"));
    }
    let mut counts = std::collections::HashMap::new();
    for sample in samples {
        *counts.entry((sample.case, sample.mode, sample.arm)).or_insert(0) += 1;
    }
    let each = suite.protocol.blocks as usize * suite.protocol.samples as usize;
    if samples.len() != suite.samples_per_process() || counts.values().any(|&count| count != each) {
        let expected = suite.samples_per_process();
        return Err(format!("{} samples, not {expected}: {each} of every case, mode and arm", samples.len()));
    }
    match reports {
        [report] if report.process == process => Ok(()),
        _ => Err(format!("{} reports, not one of process {process}", reports.len())),
    }
}

/// What a process wrote.
pub(in crate::validate) fn read_lines(
    lines: impl BufRead,
    progress: &mut dyn FnMut(),
) -> Result<(Vec<Sample>, Vec<ProcessReport>)> {
    let (mut samples, mut reports) = (Vec::new(), Vec::new());
    for line in lines.lines() {
        let line = line?;
        match serde_json::from_str(&line).map_err(|error| format!("wrote {line:?}: {error}"))? {
            Line::Sample(sample) => {
                samples.push(sample);
                progress();
            }
            Line::Report(report) => reports.push(report),
        }
    }
    Ok((samples, reports))
}

/// Measures in this process, and writes a line for every sample and one for the process.
///
/// # Errors
/// Whatever keeps a case from running, or the lines from being written.
pub fn run_process(suite: &Suite, process: u32, out: &mut dyn Write) -> Result<()> {
    let runtimes = suite.arms.iter().map(|arm| runtime(arm, suite.ordinal)).collect::<Result<Vec<_>>>()?;
    measure_on(&runtimes, suite, process, out)
}

/// The same on runtimes that are open, one per arm.
pub(in crate::validate) fn measure_on(
    runtimes: &[Runtime],
    suite: &Suite,
    process: u32,
    out: &mut dyn Write,
) -> Result<()> {
    let device = runtimes.iter().find(|runtime| runtime.device() != Device::Cpu);
    let stream = device.map(Runtime::new_stream).transpose()?;
    let turns = suite.arms.len() * suite.protocol.samples as usize;
    let mut bench = Bench::new(stream.clone(), suite.protocol.flush, turns.max(CHUNK) + 1)?;
    let mut report = ProcessReport { process, warmups: Vec::new(), floor_ns: Vec::new(), state: None };
    let before = device.and_then(State::read);
    for &mode in &suite.protocol.modes {
        report.floor_ns.push((mode, bench.floor(mode)?));
    }
    let budget = device.and_then(Runtime::device_info).map_or(HOST_BYTES, |info| info.total_memory / DEVICE_SHARE);
    let copies = suite.arms.len() * suite.protocol.sets;
    let mut rng = ChaCha8Rng::seed_from_u64(suite.protocol.seed ^ u64::from(process) << 32);
    for first in groups(&suite.cases, budget / copies.max(1)) {
        let mut group = Group { suite, process, first: first.start, arms: Vec::new() };
        let cases = &suite.cases[first];
        let drawn = cases.par_iter().map(|case| drawn(suite, case)).collect::<crate::Result<Vec<_>>>()?;
        for (case, inputs) in cases.iter().zip(drawn) {
            group.arms.push(arms(suite, runtimes, stream.as_ref(), case, &inputs)?);
        }
        group.warm_up(&mut bench, &mut report)?;
        group.measure(&mut bench, &mut rng, out)?;
    }
    report.state = before.zip(device.and_then(State::read)).map(<[State; 2]>::from);
    write_line(out, &Line::Report(report))
}

fn write_line(out: &mut dyn Write, line: &Line) -> Result<()> {
    serde_json::to_writer(&mut *out, line)?;
    Ok(out.write_all(b"\n")?)
}

fn runtime(arm: &ArmSpec, ordinal: u32) -> Result<Runtime> {
    Ok(match &arm.source {
        Source::Cpu | Source::Reference => Runtime::cpu(),
        Source::External(name) => return Err(format!("arm {name}: measured by a program that --worker names").into()),
        source => open::on_device(source, ordinal)?,
    })
}

/// The inputs of one case: as many sets as the protocol has, each from a seed of its own.
fn drawn(suite: &Suite, case: &Case) -> crate::Result<Vec<Inputs>> {
    let seeds = (0..suite.protocol.sets.max(1) as u64).into_par_iter().map(|set| suite.protocol.seed ^ set << 48);
    seeds.map(|seed| Inputs::draw(case, seed)).collect()
}

/// The arms of one case, with the same inputs.
fn arms<'a>(
    suite: &Suite,
    runtimes: &'a [Runtime],
    stream: Option<&Stream>,
    case: &Case,
    inputs: &[Inputs],
) -> Result<Vec<Box<dyn Timed + 'a>>> {
    let arm = |(spec, runtime): (&ArmSpec, &'a Runtime)| -> Result<Box<dyn Timed + 'a>> {
        Ok(match spec.source {
            Source::Reference => Box::new(Reference::new(inputs[0].clone(), Inputs::outputs(case)?.0)),
            _ => {
                let stream = stream.filter(|_| runtime.device() != Device::Cpu).cloned();
                Box::new(Arm::on(runtime, stream, case, inputs.to_vec())?)
            }
        })
    };
    suite.arms.iter().zip(runtimes).map(arm).collect()
}

/// Splits cases into runs whose tensors fit a budget; a case that is larger is a run of its own.
fn groups(cases: &[Case], budget: usize) -> Vec<std::ops::Range<usize>> {
    let mut groups: Vec<std::ops::Range<usize>> = Vec::new();
    let mut used = usize::MAX;
    for (i, case) in cases.iter().enumerate() {
        used = used.saturating_add(case.bytes());
        match groups.last_mut() {
            Some(group) if used <= budget => group.end = i + 1,
            _ => {
                groups.push(i..i + 1);
                used = case.bytes();
            }
        }
    }
    groups
}

/// Cases that are measured together, interleaved.
struct Group<'a> {
    suite: &'a Suite,
    process: u32,
    /// Index of the first.
    first: usize,
    arms: Vec<Vec<Box<dyn Timed + 'a>>>,
}

impl Group<'_> {
    /// Takes samples that do not count, until times no longer change.
    fn warm_up(&mut self, bench: &mut Bench, report: &mut ProcessReport) -> Result<()> {
        let modes = &self.suite.protocol.modes;
        let mode = modes.iter().copied().find(|&mode| mode == Mode::Hot).unwrap_or(modes[0]);
        for (case, arms) in self.arms.iter_mut().enumerate() {
            for (arm, timed) in arms.iter_mut().enumerate() {
                let mut ns = Vec::new();
                let mut settled = None;
                while ns.len() < self.suite.protocol.warmup && settled != Some(true) {
                    let chunk = CHUNK.min(self.suite.protocol.warmup - ns.len());
                    let mut turn = [Turn { timed: timed.as_mut(), delay: Duration::ZERO }];
                    let readings = bench.block(&mut turn, mode, &vec![0; chunk])?;
                    ns.extend(readings.iter().map(|reading| reading.ns));
                    settled = (ns.len() >= CHUNK).then(|| steady(&ns));
                }
                let case = (self.first + case) as u32;
                report.warmups.push(Warmup { case, arm: arm as u32, samples: ns.len(), steady: settled });
            }
        }
        Ok(())
    }

    fn measure(&mut self, bench: &mut Bench, rng: &mut ChaCha8Rng, out: &mut dyn Write) -> Result<()> {
        let modes = &self.suite.protocol.modes;
        let mut order: Vec<(usize, Mode)> =
            (0..self.arms.len()).flat_map(|case| modes.iter().map(move |&mode| (case, mode))).collect();
        for block in 0..self.suite.protocol.blocks {
            order.shuffle(rng);
            for &(case, mode) in &order {
                let readings = self.block(bench, case, mode, rng.random_bool(0.5))?;
                let case = (self.first + case) as u32;
                for (position, Reading { arm, ns, sm_mhz }) in (0..).zip(readings) {
                    let process = self.process;
                    let sample = Sample { case, mode, process, block, position, arm: arm as u32, ns, sm_mhz };
                    write_line(out, &Line::Sample(sample))?;
                }
            }
        }
        Ok(())
    }

    /// One block: the arms take turns, in one of both orders.
    fn block(&mut self, bench: &mut Bench, case: usize, mode: Mode, backwards: bool) -> Result<Vec<Reading>> {
        let specs = &self.suite.arms;
        let mut order: Vec<usize> = (0..specs.len()).collect();
        if backwards {
            order.reverse();
        }
        let turns = order.repeat(self.suite.protocol.samples as usize);
        let mut arms: Vec<Turn<'_, '_>> = self.arms[case]
            .iter_mut()
            .zip(specs)
            .map(|(timed, spec)| {
                timed.rotate();
                Turn { timed: timed.as_mut(), delay: Duration::from_secs_f64(spec.delay_us * 1e-6) }
            })
            .collect();
        Ok(bench.block(&mut arms, mode, &turns)?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::spec::Protocol;
    use super::*;

    fn suite(arms: &[Source]) -> Suite {
        let case = |seq| Case::new("test", [2, 2], [seq, seq], 8).batch(1).without_lse();
        let quick = Protocol::for_device(Device::Cpu, true);
        Suite {
            cases: vec![case(16), case(24)],
            arms: arms.iter().cloned().map(ArmSpec::from).collect(),
            ordinal: 0,
            protocol: Protocol { blocks: 3, samples: 4, warmup: 60, ..quick },
        }
    }

    fn lines(suite: &Suite) -> (Vec<Sample>, ProcessReport) {
        let mut out = Vec::new();
        run_process(suite, 7, &mut out).expect("a run");
        let (samples, mut reports) = read_lines(out.as_slice(), &mut || ()).expect("lines");
        assert_eq!(reports.len(), 1);
        (samples, reports.remove(0))
    }

    #[test]
    fn arms_take_turns_in_both_orders() {
        let suite = suite(&[Source::Reference, Source::Cpu]);
        let (samples, report) = lines(&suite);
        assert_eq!(samples.len(), suite.samples_per_process());
        let mut firsts = Vec::new();
        for block in samples.chunk_by(|a, b| (a.case, a.block) == (b.case, b.block)) {
            assert_eq!(block.len(), 8);
            assert!(block.windows(2).all(|pair| pair[0].arm != pair[1].arm && pair[0].position < pair[1].position));
            firsts.push(block[0].arm);
        }
        assert!(firsts.contains(&0) && firsts.contains(&1), "{firsts:?}");
        assert!(samples.iter().all(|sample| sample.ns > 0.0 && sample.process == 7));
        assert_eq!(report.warmups.len(), 4);
        assert!(report.warmups.iter().all(|warmup| (50..=60).contains(&warmup.samples) && warmup.steady.is_some()));
        assert!(report.floor_ns[0].1.is_some_and(|ns| ns < 1e5), "{report:?}");
    }

    #[test]
    fn a_planted_delay_shows() {
        let mut suite = suite(&[Source::Cpu, Source::Cpu]);
        suite.arms[1].delay_us = 300.0;
        let (samples, _) = lines(&suite);
        let fastest = |arm| samples.iter().filter(|s| s.arm == arm).map(|s| s.ns).fold(f64::INFINITY, f64::min);
        assert!(fastest(1) >= 3e5 && fastest(0) < 3e5, "{} and {}", fastest(0), fastest(1));
    }

    #[test]
    fn what_a_process_leaves_out_or_invents_is_found() {
        let suite = suite(&[Source::Cpu]);
        let (samples, report) = lines(&suite);
        let reports = [report];
        let with = |change: &dyn Fn(&mut Vec<Sample>)| {
            let mut changed = samples.clone();
            change(&mut changed);
            complete(&suite, 7, &changed, &reports)
        };
        assert_eq!(with(&|_| ()), Ok(()));
        assert!(complete(&suite, 7, &samples, &[]).is_err());
        assert!(complete(&suite, 6, &samples, &reports).is_err());
        let wrong: [fn(&mut Vec<Sample>); 7] = [
            |samples| samples.clear(),
            |samples| samples[0].arm = 1,
            |samples| samples[0].case = 2,
            |samples| samples[0].mode = Mode::Hot,
            |samples| samples[0].ns = 0.0,
            |samples| samples[0].process = 1,
            |samples| samples[0].case = 1 - samples[0].case,
        ];
        for (i, change) in wrong.into_iter().enumerate() {
            assert!(with(&change).is_err(), "change {i}");
        }
    }

    #[test]
    fn cases_that_fit_are_measured_together() {
        let case = |batch| Case::new("test", [1, 1], [64, 64], 64).batch(batch);
        let bytes = case(1).bytes();
        let cases = [case(1), case(1), case(1), case(5), case(1)];
        assert_eq!(groups(&cases, 3 * bytes), [0..3, 3..4, 4..5]);
        assert_eq!(groups(&cases, usize::MAX).len(), 1);
        assert_eq!(groups(&[], 1), Vec::<std::ops::Range<usize>>::new());
    }
}
