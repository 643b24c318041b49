//! Is the output right? Against the fp64 oracle, by bits around it, and over repeats.

use std::ops::Range;

use serde::Serialize;

use super::case::{Case, Order, Special, SpecialTensor};
use super::host::{Damage, HostTensor};
use super::inputs::Inputs;
use super::subject::{Ran, Subject};
use crate::attention::check::{Operands, problem};
use crate::attention::{Band, Problem};
use crate::cpu::oracle::{ErrorReport, LseReport, eager, judge, judge_lse, oracle, values};
use crate::error::{Error, Result};
use crate::tensor::TensorView;

/// What became of one case.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// The kernel variant that ran.
    pub variant: Option<String>,
    /// The output against the oracle. With several judged heads, the worst of them.
    #[serde(flatten)]
    pub error: Option<ErrorReport>,
    /// The log-sum-exp against the oracle, likewise.
    pub lse: Option<LseReport>,
    /// Writes outside the output, and elements of it that were not written; both outputs together.
    pub damage: Damage,
    /// NaNs where a tile, but not the row itself, sees a key that is not finite. The contract allows them.
    pub spread: usize,
    /// Bitwise different outputs among the repeats.
    pub irreproducible: usize,
    /// Why there is no output: the error of the call.
    pub refused: Option<String>,
    /// Whether the call was refused because no kernel answers it.
    pub unsupported: bool,
    /// Whether the device failed at it.
    pub device_failed: bool,
    /// The whole verdict.
    #[serde(rename = "correct")]
    pub pass: bool,
}

impl Verdict {
    fn refused(error: &Error) -> Self {
        Self {
            variant: None,
            error: None,
            lse: None,
            damage: Damage::default(),
            spread: 0,
            irreproducible: 0,
            refused: Some(error.to_string()),
            unsupported: matches!(error, Error::Unsupported(_)),
            device_failed: matches!(error, Error::Driver { .. } | Error::ContextLost { .. }),
            pass: false,
        }
    }

    /// Why the case failed, in a line.
    pub fn reason(&self) -> String {
        let mut reasons = Vec::new();
        if let Some(refused) = &self.refused {
            reasons.push(refused.lines().next().unwrap_or_default().to_string());
        }
        if let Some(e) = self.error.as_ref().filter(|e| !e.pass) {
            reasons.push(format!(
                "error {:.3e} (bound {:.3e}, reference {:.3e}), {:.2} units in a row (reference {:.2}), {} misplaced NaN or Inf",
                e.e, e.bound, e.e_ref, e.max_ulp, e.max_ulp_ref, e.misplaced
            ));
        }
        if let Some(lse) = self.lse.as_ref().filter(|lse| !lse.pass) {
            reasons
                .push(format!("lse error {:.3e}, {:.2} of its bound, {} misplaced", lse.e, lse.ratio, lse.misplaced));
        }
        if self.damage != Damage::default() {
            let Damage { outside, unwritten } = self.damage;
            reasons.push(format!("{outside} elements written outside the output, {unwritten} inside not written"));
        }
        if self.irreproducible > 0 {
            reasons.push(format!("{} repeats differ from the first run", self.irreproducible));
        }
        reasons.join("; ")
    }
}

/// Runs a case once and judges it.
pub fn check(subject: &dyn Subject, case: &Case, seed: u64) -> Verdict {
    check_repeatedly(subject, case, seed, 1)
}

/// Runs a case `repeats` times, judges the first output, and compares the others with it bit by bit.
pub fn check_repeatedly(subject: &dyn Subject, case: &Case, seed: u64, repeats: usize) -> Verdict {
    check_variant(subject, case, seed, repeats, None)
}

/// As [`check_repeatedly`], of the variant of this name: one of [`Subject::variants`]. `None` leaves the choice to the
/// subject.
pub fn check_variant(subject: &dyn Subject, case: &Case, seed: u64, repeats: usize, variant: Option<&str>) -> Verdict {
    let attempt = || -> Result<Verdict> {
        let mut inputs = Inputs::draw(case, seed)?;
        inputs.variant = variant.map(str::to_owned);
        let first = Outcome::new(subject, case, &inputs)?;
        let mut verdict = first.judge(case, &inputs)?;
        for _ in 1..repeats {
            verdict.irreproducible += usize::from(!Outcome::new(subject, case, &inputs)?.same_bits(&first));
        }
        verdict.pass &= verdict.irreproducible == 0;
        Ok(verdict)
    };
    attempt().unwrap_or_else(|error| Verdict::refused(&error))
}

/// What a call wrote.
pub(super) struct Outcome {
    pub(super) out: HostTensor,
    pub(super) lse: Option<HostTensor>,
    pub(super) ran: Ran,
}

impl Outcome {
    pub(super) fn new(subject: &dyn Subject, case: &Case, inputs: &Inputs) -> Result<Self> {
        let (mut out, mut lse) = Inputs::outputs(case)?;
        let ran = subject.compute(inputs, &mut out, lse.as_mut())?;
        Ok(Self { out, lse, ran })
    }

    /// Of both outputs together.
    pub(super) fn damage(&self) -> Damage {
        let mut damage = self.out.damage();
        if let Some(lse) = &self.lse {
            let Damage { outside, unwritten } = lse.damage();
            damage.outside += outside;
            damage.unwritten += unwritten;
        }
        damage
    }

    fn same_bits(&self, other: &Self) -> bool {
        let lse = match (&self.lse, &other.lse) {
            (Some(one), Some(other)) => one.same_bits(other),
            _ => true,
        };
        lse && self.out.same_bits(&other.out)
    }

    fn judge(&self, case: &Case, inputs: &Inputs) -> Result<Verdict> {
        let mut verdict = Verdict {
            variant: Some(self.ran.variant.clone()),
            error: None,
            lse: None,
            damage: self.damage(),
            spread: 0,
            irreproducible: 0,
            refused: None,
            unsupported: false,
            device_failed: false,
            pass: true,
        };
        let problem = problem_of(inputs, &self.out, self.lse.is_some())?;
        if case.judged_heads.is_empty() {
            verdict.add(self.whole(inputs)?, &problem, &|row| self.may_spread(case, &problem, row));
        }
        for &[batch, head] in &case.judged_heads {
            let one = Problem { batch: 1, num_heads_q: 1, num_heads_kv: 1, ..problem };
            verdict.add(self.head(inputs, &problem, batch, head)?, &one, &|_| false);
        }
        verdict.pass = verdict.damage == Damage::default()
            && verdict.error.as_ref().is_some_and(|e| e.pass)
            && verdict.lse.as_ref().is_none_or(|lse| lse.pass);
        Ok(verdict)
    }

    fn whole<'a>(&'a self, inputs: &'a Inputs) -> Result<Judged<'a>> {
        Ok(Judged {
            inputs: [inputs.query.view()?, inputs.key.view()?, inputs.value.view()?],
            attn_mask: inputs.attn_mask.as_ref().map(HostTensor::view).transpose()?,
            out: values(&self.out.view()?),
            lse: self.lse.as_ref().map(|lse| lse.as_f32().to_vec()),
        })
    }

    fn head<'a>(&'a self, inputs: &'a Inputs, problem: &Problem, batch: usize, head: usize) -> Result<Judged<'a>> {
        let kv_head = head / problem.group();
        let rows = problem.seq_len_q;
        let first = (batch * problem.num_heads_q + head) * rows;
        Ok(Judged {
            inputs: [
                inputs.query.head(batch, head)?,
                inputs.key.head(batch, kv_head)?,
                inputs.value.head(batch, kv_head)?,
            ],
            attn_mask: inputs.attn_mask.as_ref().map(|mask| mask.head(batch, head)).transpose()?,
            out: values(&self.out.head(batch, head)?),
            lse: self.lse.as_ref().map(|lse| lse.as_f32()[first..first + rows].to_vec()),
        })
    }

    /// Whether a row (batch, head and position in one number) may be NaN although it sees nothing that is not finite: when
    /// its tile of query rows visits the tile of the special key, or the row's own query is special and a mask hides all
    /// its keys.
    fn may_spread(&self, case: &Case, problem: &Problem, row: usize) -> bool {
        let (Some(Special { key, tensor, .. }), Some(tile)) = (case.special, self.ran.tile) else { return false };
        let (order, sharing) = match tensor {
            SpecialTensor::Query => (case.memory[0].order, 1),
            SpecialTensor::Key => (case.memory[1].order, problem.group()),
            SpecialTensor::Value => (case.memory[2].order, problem.group()),
        };
        let (head, i) = (row / problem.seq_len_q, row % problem.seq_len_q);
        if head >= if order == Order::Expanded { problem.num_heads_q } else { sharing } {
            return false;
        }
        match tensor {
            SpecialTensor::Query => i == key,
            SpecialTensor::Key | SpecialTensor::Value => visited(problem, i, tile).contains(&key),
        }
    }
}

/// The keys of the tiles that the tile of query row `i` visits: from what its first row may see to what its last row may.
fn visited(problem: &Problem, i: usize, [tile_q, tile_k]: [usize; 2]) -> Range<usize> {
    let first = i / tile_q * tile_q;
    let last = (first + tile_q).min(problem.seq_len_q) - 1;
    let keys = problem.seq_len_k as i64;
    let (start, end) = problem.band.map_or((0, keys), |Band { lo, hi }| {
        ((first as i64 + i64::from(lo)).max(0), (last as i64 + i64::from(hi) + 1).clamp(0, keys))
    });
    start as usize / tile_k * tile_k..(end as usize).next_multiple_of(tile_k)
}

/// The problem that a call poses.
pub(super) fn problem_of(inputs: &Inputs, out: &HostTensor, lse: bool) -> Result<Problem> {
    let (query, key, value) = (inputs.query.view()?, inputs.key.view()?, inputs.value.view()?);
    let attn_mask = inputs.attn_mask.as_ref().map(HostTensor::view).transpose()?;
    let operands = Operands { query, key, value, attn_mask };
    problem(&operands, &inputs.options, out.layout(), lse)
}

/// A call, or one head of it, with its outputs widened.
struct Judged<'a> {
    inputs: [TensorView<'a>; 3],
    attn_mask: Option<TensorView<'a>>,
    out: Vec<f64>,
    lse: Option<Vec<f32>>,
}

impl Verdict {
    /// Judges a call, and keeps its errors if they are the worst so far.
    fn add(&mut self, mut judged: Judged<'_>, problem: &Problem, may_spread: &dyn Fn(usize) -> bool) {
        let [query, key, value] = judged.inputs;
        let exact = oracle(problem, query, key, value, judged.attn_mask);
        let reference = eager(problem, query, key, value, judged.attn_mask);

        for (row, out) in judged.out.chunks_mut(problem.head_dim_v.max(1)).enumerate() {
            for (x, exact) in out.iter_mut().zip(&exact.out[row * problem.head_dim_v..]) {
                if x.is_nan() && !exact.is_nan() && may_spread(row) {
                    *x = *exact;
                    self.spread += 1;
                }
            }
        }
        let error = judge(problem, &judged.out, &exact, &reference);
        if self.error.as_ref().is_none_or(|worst| badness(worst) < badness(&error)) {
            self.error = Some(error);
        }
        if let Some(lse) = &mut judged.lse {
            for (row, (x, exact)) in lse.iter_mut().zip(&exact.lse).enumerate() {
                if x.is_nan() && !exact.is_nan() && may_spread(row) {
                    *x = *exact as f32;
                    self.spread += 1;
                }
            }
            let error = judge_lse(problem, lse, &exact, &reference);
            if self.lse.as_ref().is_none_or(|worst| (!worst.pass, worst.ratio) < (!error.pass, error.ratio)) {
                self.lse = Some(error);
            }
        }
    }
}

/// Orders error reports: those that fail last, by the share of the bound that they use.
fn badness(report: &ErrorReport) -> (bool, f64) {
    (!report.pass, report.e / report.bound.max(f64::MIN_POSITIVE))
}
