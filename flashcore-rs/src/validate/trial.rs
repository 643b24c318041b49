//! Asking a subject several related questions, and comparing its answers.
//!
//! Two answers may differ by as much as each may be wrong, and no more: a row's tolerance is what the correctness rule
//! ([`judge`](crate::cpu::oracle::judge), [`judge_lse`](crate::cpu::oracle::judge_lse)) allows of the error against the
//! fp64 oracle, and tolerances of the two sides add up.

use super::case::Case;
use super::correct::{Outcome, problem_of};
use super::host::{Damage, HostTensor};
use super::inputs::Inputs;
use super::subject::{Ran, Subject};
use crate::attention::Problem;
use crate::cpu::oracle::{Reference, eager, judge, lse_bound, oracle, values};
use crate::error::{Error, Result};
use crate::tensor::TensorView;

/// A call that is known in full.
#[derive(Clone)]
pub(super) struct Question {
    pub(super) case: Case,
    pub(super) inputs: Inputs,
}

/// What a subject wrote, and how far each row of it may be off.
pub(super) struct Answer {
    problem: Problem,
    pub(super) ran: Ran,
    /// Contiguous, as [`Reference::out`].
    pub(super) out: Vec<f64>,
    /// Contiguous, as [`Reference::lse`].
    pub(super) lse: Option<Vec<f64>>,
    pub(super) tolerance: Vec<f64>,
    pub(super) lse_tolerance: Vec<f64>,
    /// Rows that see no key.
    pub(super) blind: Vec<bool>,
    pub(super) damage: Damage,
}

/// Where each element of a call comes from in another one, coordinate by coordinate.
pub(super) struct Remap<'a> {
    pub(super) batch: &'a dyn Fn(usize) -> usize,
    pub(super) head_q: &'a dyn Fn(usize) -> usize,
    pub(super) head_kv: &'a dyn Fn(usize) -> usize,
    pub(super) row: &'a dyn Fn(usize) -> usize,
    pub(super) key: &'a dyn Fn(usize) -> usize,
    pub(super) dim_qk: &'a dyn Fn(usize) -> usize,
    pub(super) dim_v: &'a dyn Fn(usize) -> usize,
}

impl Remap<'_> {
    pub(super) const IDENTITY: Self = Self {
        batch: &|i| i,
        head_q: &|i| i,
        head_kv: &|i| i,
        row: &|i| i,
        key: &|i| i,
        dim_qk: &|i| i,
        dim_v: &|i| i,
    };
}

impl Question {
    /// The call whose inputs this one's become.
    pub(super) fn remapped(&self, case: Case, remap: &Remap<'_>) -> Result<Self> {
        let Remap { batch, head_q, head_kv, row, key, dim_qk, dim_v } = remap;
        let [q, k, v, _] = case.shapes();
        let [q_memory, k_memory, v_memory, _] = case.memory;
        let mut inputs = self.inputs.clone();
        inputs.options = case.options;
        inputs.query = HostTensor::input(case.dtype, q, q_memory)?;
        inputs.query.draw(|[b, h, i, d]| self.inputs.query.get([batch(b), head_q(h), row(i), dim_qk(d)]));
        inputs.key = HostTensor::input(case.dtype, k, k_memory)?;
        inputs.key.draw(|[b, h, j, d]| self.inputs.key.get([batch(b), head_kv(h), key(j), dim_qk(d)]));
        inputs.value = HostTensor::input(case.dtype, v, v_memory)?;
        inputs.value.draw(|[b, h, j, d]| self.inputs.value.get([batch(b), head_kv(h), key(j), dim_v(d)]));
        if let (Some(mask), Some(source)) = (case.attn_mask, &self.inputs.attn_mask) {
            let mut tensor = HostTensor::input(source.layout().dtype, case.mask_shape(mask), mask.memory)?;
            tensor.draw(|[b, h, i, j]| source.get([batch(b), head_q(h), row(i), key(j)]));
            inputs.attn_mask = Some(tensor);
        }
        Ok(Self { case, inputs })
    }
}

impl Answer {
    /// Asks for the variant that the question names, if it names one.
    pub(super) fn to(question: &Question, subject: &dyn Subject) -> Result<Self> {
        let Question { case, inputs } = question;
        let outcome = Outcome::new(subject, case, inputs)?;
        let problem = problem_of(inputs, &outcome.out, outcome.lse.is_some())?;
        let reference = |evaluate: Evaluate| -> Result<Reference> {
            let attn_mask = inputs.attn_mask.as_ref().map(HostTensor::view).transpose()?;
            Ok(evaluate(&problem, inputs.query.view()?, inputs.key.view()?, inputs.value.view()?, attn_mask))
        };
        let (exact, reference) = (reference(oracle)?, reference(eager)?);
        let bar = judge(&problem, &reference.out, &exact, &reference);
        let in_range = |row: usize| exact.lse[row].is_finite() == reference.lse[row].is_finite();
        let tolerance = |(row, unit): (usize, &f64)| {
            if in_range(row) { bar.bound.min((1.5 * bar.max_ulp_ref + 1.0) * unit) } else { f64::INFINITY }
        };
        Ok(Self {
            out: values(&outcome.out.view()?),
            lse: outcome.lse.as_ref().map(|lse| lse.as_f32().iter().map(|&x| x.into()).collect()),
            tolerance: exact.out_unit.iter().enumerate().map(tolerance).collect(),
            lse_tolerance: exact.lse.iter().zip(&exact.lse_unit).map(|(&lse, &unit)| lse_bound(lse, unit)).collect(),
            blind: exact.lse.iter().map(|&lse| lse == f64::NEG_INFINITY).collect(),
            problem,
            damage: outcome.damage(),
            ran: outcome.ran,
        })
    }

    /// Columns of the output.
    pub(super) fn dim(&self) -> usize {
        self.problem.head_dim_v
    }

    /// Batch, query head and row, in the order of rows in the output.
    pub(super) fn rows(&self) -> impl Iterator<Item = [usize; 3]> + use<> {
        let Problem { batch, num_heads_q, seq_len_q, .. } = self.problem;
        (0..batch).flat_map(move |b| (0..num_heads_q).flat_map(move |h| (0..seq_len_q).map(move |i| [b, h, i])))
    }

    pub(super) fn row(&self, [batch, head, row]: [usize; 3]) -> usize {
        (batch * self.problem.num_heads_q + head) * self.problem.seq_len_q + row
    }
}

/// The oracle, or the eager reference.
type Evaluate =
    for<'a> fn(&Problem, TensorView<'a>, TensorView<'a>, TensorView<'a>, Option<TensorView<'a>>) -> Reference;

/// Questions about one case, and what the answers have in common.
pub(super) struct Trial<'a> {
    subject: &'a dyn Subject,
    /// The case as drawn.
    pub(super) question: Question,
    pub(super) answer: Answer,
    pub(super) seed: u64,
}

impl<'a> Trial<'a> {
    /// Asks the first question.
    pub(super) fn new(subject: &'a dyn Subject, case: &Case, seed: u64) -> Result<Self> {
        let question = Question { case: case.clone(), inputs: Inputs::draw(case, seed)? };
        let answer = Answer::to(&question, subject)?;
        Ok(Self { subject, question, answer, seed })
    }

    /// Asks another one, of the variant that answered the first; of any, if that one cannot answer it.
    pub(super) fn ask(&self, mut question: Question, found: &mut Findings) -> Result<Answer> {
        question.inputs.variant = Some(self.answer.ran.variant.clone());
        let pinned = Answer::to(&question, self.subject);
        let answer = match pinned {
            Err(Error::Unsupported(_)) => {
                question.inputs.variant = None;
                Answer::to(&question, self.subject)?
            }
            pinned => pinned?,
        };
        found.note(&answer);
        Ok(answer)
    }

    /// Asks, and compares with the first answer.
    pub(super) fn compare_with_first(&self, question: Question, same_bits: bool, found: &mut Findings) -> Result<()> {
        let answer = self.ask(question, found)?;
        self.compare(&answer, &Remap::IDENTITY, (0.0, same_bits), found);
        Ok(())
    }

    /// Asks for this call remapped, and compares: output and log-sum-exp are remapped alike, the latter larger by `offset`.
    /// `same_bits`: they must be the same bit by bit where the plan is the same.
    pub(super) fn compare_remapped(
        &self,
        case: Case,
        remap: &Remap<'_>,
        (offset, same_bits): (f64, bool),
        found: &mut Findings,
    ) -> Result<()> {
        let answer = self.ask(self.question.remapped(case, remap)?, found)?;
        self.compare(&answer, remap, (offset, same_bits), found);
        Ok(())
    }

    fn compare(&self, answer: &Answer, remap: &Remap<'_>, (offset, same_bits): (f64, bool), found: &mut Findings) {
        let base = &self.answer;
        let mut same = true;
        for (row, [b, h, i]) in answer.rows().enumerate() {
            let from = base.row([(remap.batch)(b), (remap.head_q)(h), (remap.row)(i)]);
            for d in 0..answer.dim() {
                let (x, expected) =
                    (answer.out[row * answer.dim() + d], base.out[from * base.dim() + (remap.dim_v)(d)]);
                found.compare("output", x, expected, answer.tolerance[row] + base.tolerance[from]);
                same &= x.to_bits() == expected.to_bits();
            }
            if let (Some(lse), Some(expected)) = (&answer.lse, &base.lse) {
                let bound = answer.lse_tolerance[row] + base.lse_tolerance[from];
                found.compare("log-sum-exp", lse[row], expected[from] + offset, bound);
                same &= lse[row].to_bits() == expected[from].to_bits();
            }
        }
        if same_bits && answer.ran == base.ran {
            found.same_bits(same);
        }
    }
}

/// What came of comparisons.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// Error, bound, and what of, where the error takes most of its bound.
    worst: Option<(f64, f64, &'static str)>,
    /// Elements of another kind (finite, NaN, infinite) than they should be.
    pub(super) misplaced: usize,
    /// Whether everything that should be was the same bit by bit; `None` where nothing had to be.
    pub(super) bitwise: Option<bool>,
    pub(super) damage: Damage,
    pub(super) variants: Vec<String>,
}

impl Findings {
    /// Notes who answered, and what was wrong around the answer.
    pub(super) fn note(&mut self, answer: &Answer) {
        self.damage.outside += answer.damage.outside;
        self.damage.unwritten += answer.damage.unwritten;
        if !self.variants.contains(&answer.ran.variant) {
            self.variants.push(answer.ran.variant.clone());
        }
    }

    /// Compares one element.
    pub(super) fn compare(&mut self, what: &'static str, x: f64, expected: f64, bound: f64) {
        if x == expected || (x.is_nan() && expected.is_nan()) || bound == f64::INFINITY {
            self.worst.get_or_insert((0.0, bound, what));
        } else if !(x.is_finite() && expected.is_finite()) {
            self.misplaced += 1;
        } else {
            let error = (x - expected).abs();
            // A bound may be 0: what reaches it is then no share of it, and the first that exceeds it is the worst.
            let share = |error: f64, bound: f64| if error == 0.0 { 0.0 } else { error / bound };
            if self.worst.is_none_or(|(worst, its, _)| share(error, bound) > share(worst, its)) {
                self.worst = Some((error, bound, what));
            }
        }
    }

    pub(super) fn same_bits(&mut self, same: bool) {
        self.bitwise = Some(self.bitwise.unwrap_or(true) && same);
    }

    /// The error that takes most of its bound, and the bound.
    pub(super) fn worst(&self) -> (f64, f64) {
        self.worst.map_or((0.0, 0.0), |(error, bound, _)| (error, bound))
    }

    /// What is wrong, in a line; empty when nothing is.
    pub(super) fn reason(&self) -> String {
        let mut reasons = Vec::new();
        if let Some((error, bound, what)) = self.worst.filter(|(error, bound, _)| error > bound) {
            reasons.push(format!("{what} off by {error:.3e} (bound {bound:.3e})"));
        }
        if self.misplaced > 0 {
            reasons.push(format!("{} misplaced NaN or infinities", self.misplaced));
        }
        if self.bitwise == Some(false) {
            reasons.push("not the same bit by bit".into());
        }
        let Damage { outside, unwritten } = self.damage;
        if outside + unwritten > 0 {
            reasons.push(format!("{outside} elements written outside the output, {unwritten} inside not written"));
        }
        reasons.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exact_element_hides_no_error_after_it() {
        let mut found = Findings::default();
        found.compare("log-sum-exp", f64::NEG_INFINITY, f64::NEG_INFINITY, 0.0);
        found.compare("output", 1.0, 1.0, 0.0);
        assert_eq!((found.worst(), found.reason()), ((0.0, 0.0), String::new()));
        found.compare("output", 1.5, 1.0, 0.25);
        assert_eq!(found.worst(), (0.5, 0.25));
        found.compare("output", 1.0, 1.0, f64::INFINITY);
        found.compare("output", 1.25, 1.0, 0.25);
        assert!(found.reason().starts_with("output off by 5.000e-1"), "{}", found.reason());
        found.compare("log-sum-exp", 1e-9, 0.0, 0.0);
        assert_eq!(found.worst(), (1e-9, 0.0));
    }
}
