//! What is true of attention whatever the inputs: metamorphic properties.
//!
//! Each asks a subject related questions whose exact answers are known functions of each other, and compares. Inputs are
//! changed in ways that are exact in their element type, so nothing but the subject's own rounding comes between the
//! answers: they may differ by the sum of what the correctness rule allows each of them (see `trial.rs`), and where the
//! arithmetic has to be the same they must agree bit by bit. Questions after the first go to the variant that answered it.
//!
//! The method is that of metamorphic testing (Chen et al., "Metamorphic testing: a new approach for generating next test
//! cases", 1998). What bounds the differences comes from the oracle, what is compared does not: a property would show an
//! oracle that is wrong in the same way as the kernels.

use rand::RngExt;
use rand::seq::SliceRandom;
use serde::Serialize;

use super::case::{Case, Hidden, Mask, MaskType, Memory, Mode, Order};
use super::host::HostTensor;
use super::inputs::generator;
use super::matrix::{DTYPES, Extent};
use super::subject::Subject;
use super::trial::{Answer, Findings, Question, Remap, Trial};
use crate::attention::CausalAlign::{BottomRight, TopLeft};
use crate::attention::{AttentionOptions, Window};
use crate::cpu::oracle::ulp;
use crate::dtype::DType;
use crate::error::Result;

/// What became of one property in one case.
#[derive(Clone, Debug, Serialize)]
pub struct PropertyVerdict {
    /// Its name.
    pub property: &'static str,
    /// The case's name.
    pub case: String,
    /// The kernel variants that were asked.
    pub variants: Vec<String>,
    /// The difference that takes most of its bound.
    pub error: f64,
    /// That bound.
    pub bound: f64,
    /// Whether what must be the same bit by bit was; `None` when nothing had to be.
    pub bitwise: Option<bool>,
    /// Whether the property holds.
    pub pass: bool,
    /// Whether it could not be tried: a call was refused.
    pub refused: bool,
    /// What is wrong, in a line; empty when nothing is.
    pub reason: String,
}

/// A property, and the cases that it is about.
struct Property {
    name: &'static str,
    applies: fn(&Case) -> bool,
    check: fn(&Trial<'_>, &mut Findings) -> Result<()>,
}

const PROPERTIES: [Property; 15] = [
    Property { name: "key_permutation", applies: |case| dense(case) && case.seq_len_k > 1, check: key_permutation },
    Property { name: "value_linearity", applies: |_| true, check: value_linearity },
    Property { name: "softmax_shift", applies: |_| true, check: softmax_shift },
    Property { name: "causal_prefix", applies: |case| prefix(case).is_some(), check: causal_prefix },
    Property { name: "split_merge", applies: |case| split(case).is_some(), check: split_merge },
    Property { name: "grouped_heads", applies: |case| case.num_heads_q > case.num_heads_kv, check: grouped_heads },
    Property { name: "head_alone", applies: |case| case.batch * case.num_heads_q > 1, check: head_alone },
    Property { name: "position", applies: |case| case.batch * case.num_heads_kv > 1, check: position },
    Property { name: "ones", applies: |_| true, check: ones },
    Property { name: "uniform", applies: |case| !additive(case), check: uniform },
    Property { name: "scale_exchange", applies: |_| true, check: scale_exchange },
    Property { name: "column_permutation", applies: |_| true, check: column_permutation },
    Property { name: "duplication", applies: dense, check: duplication },
    Property { name: "band_as_mask", applies: |case| !dense(case) && case.attn_mask.is_none(), check: band_as_mask },
    Property { name: "bool_as_additive", applies: |case| bool_mask(case).is_some(), check: bool_as_additive },
];

/// Tries every property that applies to a case. None applies where there is nothing to compute, to values that are not
/// finite or not of ordinary size, and to cases that are too large to be judged whole.
pub fn check_properties(subject: &dyn Subject, case: &Case, seed: u64) -> Vec<PropertyVerdict> {
    let empty = case.shapes().iter().any(|shape| shape.contains(&0));
    if empty || case.special.is_some() || case.magnitude != [0; 3] || !case.judged_heads.is_empty() {
        return Vec::new();
    }
    let name = case.to_string();
    let verdict = |property: &Property, trial: &Result<Trial<'_>>| {
        let mut found = Findings::default();
        let checked = match trial {
            Ok(trial) => {
                found.note(&trial.answer);
                (property.check)(trial, &mut found)
            }
            Err(error) => Err(error.clone()),
        };
        let refusal =
            checked.as_ref().err().map(|error| error.to_string().lines().next().unwrap_or_default().to_owned());
        let reason = refusal.unwrap_or_else(|| found.reason());
        let (error, bound) = found.worst();
        PropertyVerdict {
            property: property.name,
            case: name.clone(),
            error,
            bound,
            bitwise: found.bitwise,
            pass: reason.is_empty(),
            refused: checked.is_err(),
            reason,
            variants: found.variants,
        }
    };
    let trial = Trial::new(subject, case, seed);
    PROPERTIES.iter().filter(|property| (property.applies)(case)).map(|property| verdict(property, &trial)).collect()
}

/// The cases on which the properties are tried.
pub fn property_cases(extent: Extent) -> Vec<Case> {
    let case = |heads, seq, dim| Case::new("property", heads, seq, dim);
    let shapes = [
        case([4, 2], [65, 65], 64),
        case([2, 2], [129, 140], 128),
        case([8, 1], [17, 300], 64),
        case([2, 1], [63, 127], 40),
        case([3, 3], [70, 90], 111),
        case([2, 2], [40, 65], 256),
        case([4, 4], [1, 257], 128),
        case([2, 2], [150, 31], 96),
        case([2, 2], [33, 50], 1),
        case([6, 2], [96, 64], 64).head_dim_v(128),
        case([2, 1], [64, 128], 192).head_dim_v(128),
        case([2, 2], [20, 129], 24).head_dim_v(33),
    ];
    let banded = |case: &Case| {
        let modes = [Mode::Dense, Mode::TopLeft, Mode::BottomRight].map(|mode| case.clone().mask(mode));
        let windows = [(TopLeft, Some(20), Some(3)), (BottomRight, Some(9), Some(64))];
        let windows = windows.map(|(align, left, right)| case.clone().window(align, left, right));
        modes.into_iter().chain(windows)
    };
    let base = case([4, 2], [50, 97], 64);
    let kinds = [MaskType::Bool, MaskType::Query, MaskType::F32];
    let broadcasts = [[false; 4], [true, true, false, false], [false, true, true, false]];
    let masks = kinds.into_iter().flat_map(|kind| {
        let mask = move |broadcast, hidden| Mask { kind, broadcast, hidden, memory: Memory::default() };
        let masked = broadcasts.map(|broadcast| base.clone().attn_mask(mask(broadcast, Hidden::None)));
        let hidden = base.clone().attn_mask(mask([false; 4], Hidden::Some));
        masked.into_iter().chain([hidden.clone(), hidden.mask(Mode::TopLeft)])
    });
    let of = |order, pad, offset| [Memory { order, pad, offset }; 4];
    let memories =
        [of(Order::Bshd, 0, 0), of(Order::Sbhd, 8, 8), of(Order::Bshd, 5, 3)].into_iter().flat_map(|memory| {
            [case([4, 2], [65, 70], 64), case([2, 2], [40, 129], 111).mask(Mode::BottomRight)]
                .map(|case| case.memory(memory))
        });
    let scales = [-0.3, 0.0, 1.0].map(|scale| case([2, 1], [65, 100], 64).scale(scale));
    let long = case([2, 1], [3, 5000], 64).batch(1);
    let cases: Vec<Case> = shapes
        .iter()
        .flat_map(banded)
        .chain(masks)
        .chain(memories)
        .chain(scales)
        .chain([long.clone(), long.mask(Mode::BottomRight)])
        .collect();
    let step = if extent == Extent::Quick { 7 } else { 1 };
    cases.iter().step_by(step).flat_map(|case| DTYPES.map(|dtype| case.clone().dtype(dtype))).collect()
}

fn dense(case: &Case) -> bool {
    !case.options.causal && case.options.window.is_none()
}

fn bool_mask(case: &Case) -> Option<Mask> {
    case.attn_mask.filter(|mask| mask.kind == MaskType::Bool)
}

fn additive(case: &Case) -> bool {
    case.attn_mask.is_some_and(|mask| mask.kind != MaskType::Bool)
}

/// A permutation of `0..len`.
fn permutation(trial: &Trial<'_>, what: &str, len: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    order.shuffle(&mut generator(trial.seed, &trial.question.case.to_string(), what));
    order
}

/// Keys in another order, values and mask with them: softmax and sum do not care.
fn key_permutation(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    let order = permutation(trial, "keys", trial.question.case.seq_len_k);
    let remap = Remap { key: &|j| order[j], ..Remap::IDENTITY };
    trial.compare_remapped(trial.question.case.clone(), &remap, SAME, found)
}

/// Columns of query and key in another order, and columns of value in another.
fn column_permutation(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    let case = &trial.question.case;
    let (inner, outer) =
        (permutation(trial, "head_dim_qk", case.head_dim_qk), permutation(trial, "head_dim_v", case.head_dim_v));
    let remap = Remap { dim_qk: &|d| inner[d], dim_v: &|d| outer[d], ..Remap::IDENTITY };
    trial.compare_remapped(case.clone(), &remap, SAME, found)
}

/// Every key twice: the same weights in twice the sum.
fn duplication(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    let case = &trial.question.case;
    let keys = case.seq_len_k;
    let remap = Remap { key: &|j| j % keys, ..Remap::IDENTITY };
    let twice = Case { seq_len_k: 2 * keys, ..case.clone() };
    trial.compare_remapped(twice, &remap, (std::f64::consts::LN_2, false), found)
}

/// Grouped heads are those of multi-head attention whose key/value heads repeat.
fn grouped_heads(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    let case = &trial.question.case;
    let group = case.num_heads_q / case.num_heads_kv;
    let remap = Remap { head_kv: &|h| h / group, ..Remap::IDENTITY };
    trial.compare_remapped(Case { num_heads_kv: case.num_heads_q, ..case.clone() }, &remap, SAME, found)
}

/// A head does not know what else is in the batch.
fn head_alone(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    let case = &trial.question.case;
    let mut draw = generator(trial.seed, &case.to_string(), "head");
    let (batch, head) = (draw.random_range(0..case.batch), draw.random_range(0..case.num_heads_q));
    let group = case.num_heads_q / case.num_heads_kv;
    let remap = Remap { batch: &|_| batch, head_q: &|_| head, head_kv: &|_| head / group, ..Remap::IDENTITY };
    let alone = Case { batch: 1, num_heads_q: 1, num_heads_kv: 1, ..case.clone() };
    trial.compare_remapped(alone, &remap, SAME_BITS, found)
}

/// Nor where in it it is.
fn position(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    let case = &trial.question.case;
    let (batch, heads, group) = (case.batch, case.num_heads_kv, case.num_heads_q / case.num_heads_kv);
    let moved = |h: usize| (h + 1) % heads;
    let remap = Remap {
        batch: &|b| (b + 1) % batch,
        head_q: &|h| moved(h / group) * group + h % group,
        head_kv: &moved,
        ..Remap::IDENTITY
    };
    trial.compare_remapped(case.clone(), &remap, SAME_BITS, found)
}

/// Compared within bounds, the log-sum-exp unchanged.
const SAME: (f64, bool) = (0.0, false);
/// Compared bit by bit too.
const SAME_BITS: (f64, bool) = (0.0, true);

/// Rows and keys of a shorter call under the same diagonal; `None` where it has none, or no row to spare.
fn prefix(case: &Case) -> Option<(usize, usize)> {
    let ahead = match case.options.causal_align {
        TopLeft => 0,
        BottomRight => case.seq_len_k as i64 - case.seq_len_q as i64,
    };
    let rows = (case.seq_len_q * 5 / 8).max(1).max((1 - ahead).max(1) as usize);
    let keys = case.seq_len_k.min((rows as i64 + ahead) as usize);
    (case.options.causal && rows < case.seq_len_q).then_some((rows, keys))
}

/// A causal row knows nothing of what comes after it.
fn causal_prefix(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    let case = &trial.question.case;
    let Some((seq_len_q, seq_len_k)) = prefix(case) else { return Ok(()) };
    trial.compare_remapped(Case { seq_len_q, seq_len_k, ..case.clone() }, &Remap::IDENTITY, SAME, found)
}

/// Keys in the first part, and the first row of the second; `None` where a part's band cannot be said.
fn split(case: &Case) -> Option<(usize, usize)> {
    let keys = case.seq_len_k * 2 / 5;
    let AttentionOptions { causal, causal_align, window, .. } = case.options;
    let first_row = match (causal, causal_align, window) {
        (false, _, None) => 0,
        // Rows from the second part's first key on stand in it as in a call of its own.
        (true, TopLeft, _) => keys,
        _ => return None,
    };
    (case.lse && keys > 0 && first_row < case.seq_len_q).then_some((keys, first_row))
}

/// Attention over parts of the keys, put together by their log-sum-exps, is attention over all (Dao et al.,
/// Flash-Decoding, 2023). Errors of the log-sum-exps move weight from one part to the other.
fn split_merge(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    let case = &trial.question.case;
    let Some((keys, first_row)) = split(case) else { return Ok(()) };
    let part = |seq_len_q, seq_len_k, remap: &Remap<'_>, found: &mut Findings| {
        trial.ask(trial.question.remapped(Case { seq_len_q, seq_len_k, ..case.clone() }, remap)?, found)
    };
    let one = part(case.seq_len_q, keys, &Remap::IDENTITY, found)?;
    let rest = Remap { row: &|i| i + first_row, key: &|j| j + keys, ..Remap::IDENTITY };
    let other = part(case.seq_len_q - first_row, case.seq_len_k - keys, &rest, found)?;
    let (whole, dim) = (&trial.answer, case.head_dim_v);
    let (Some(whole_lse), Some(one_lse), Some(other_lse)) = (&whole.lse, &one.lse, &other.lse) else { return Ok(()) };
    for (row, [b, h, i]) in whole.rows().enumerate() {
        let second = i.checked_sub(first_row).map(|i| other.row([b, h, i]));
        let lses = [one_lse[row], second.map_or(f64::NEG_INFINITY, |row| other_lse[row])];
        let max = lses[0].max(lses[1]);
        let shares = lses.map(|lse| if lse == f64::NEG_INFINITY { 0.0 } else { (lse - max).exp() });
        let sum = shares[0] + shares[1];
        let [p, q] = shares.map(|share| if sum > 0.0 { share / sum } else { 0.0 });
        let bounds = [one.lse_tolerance[row], second.map_or(0.0, |row| other.lse_tolerance[row])];
        let bound = whole.lse_tolerance[row] + p * bounds[0] + q * bounds[1];
        found.compare("log-sum-exp", whole_lse[row], if sum > 0.0 { max + sum.ln() } else { max }, bound);
        let moved = p * q * (bounds[0] + bounds[1]).exp_m1();
        let bound = whole.tolerance[row] + p * one.tolerance[row] + second.map_or(0.0, |row| q * other.tolerance[row]);
        for d in 0..dim {
            let [x, y] = [one.out[row * dim + d], second.map_or(0.0, |row| other.out[row * dim + d])];
            let error = bound + moved * (x - y).abs();
            found.compare("output", whole.out[row * dim + d], p * x + q * y, error);
        }
    }
    Ok(())
}

/// A tensor whose elements are functions of another's and of their index.
fn mapped(tensor: &HostTensor, memory: Memory, f: impl Fn([usize; 4], f32) -> f32) -> Result<HostTensor> {
    let layout = tensor.layout();
    let mut result = HostTensor::input(layout.dtype, layout.shape, memory)?;
    result.draw(|index| f(index, tensor.get(index)));
    Ok(result)
}

/// On a grid of `step` within `limit`, so that sums of a few are exact in 8 bits.
fn on_grid(x: f32, step: f32, limit: f32) -> f32 {
    ((x / step).round() * step).clamp(-limit, limit)
}

/// `attention(q, k, a v1 + b v2) = a attention(q, k, v1) + b attention(q, k, v2)`, and no value moves the log-sum-exp.
fn value_linearity(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    const FACTORS: [f32; 2] = [2.0, -0.5];
    let Question { case, inputs } = &trial.question;
    let memory = case.memory[2];
    let first = mapped(&inputs.value, memory, |_, x| on_grid(x, 0.25, 4.0))?;
    // Independent of the first enough: the drawn values in the reverse order of heads, keys and columns.
    let [batch, heads, keys, dim] = case.shapes()[2];
    let reversed = |[b, h, j, d]: [usize; 4]| [batch - 1 - b, heads - 1 - h, keys - 1 - j, dim - 1 - d];
    let second = mapped(&inputs.value, memory, |index, _| on_grid(inputs.value.get(reversed(index)), 0.25, 4.0))?;
    let both = mapped(&first, memory, |index, x| FACTORS[0] * x + FACTORS[1] * second.get(index))?;
    let mut ask = |value: HostTensor| {
        let mut question = trial.question.clone();
        question.inputs.value = value;
        trial.ask(question, found)
    };
    let [one, other, whole] = [ask(first)?, ask(second)?, ask(both)?];
    let [a, b] = FACTORS.map(f64::from);
    for (at, &x) in whole.out.iter().enumerate() {
        let row = at / dim;
        let bound = whole.tolerance[row] + a.abs() * one.tolerance[row] + b.abs() * other.tolerance[row];
        found.compare("output", x, a * one.out[at] + b * other.out[at], bound);
    }
    if case.lse {
        found.same_bits(same_lse(&one, &whole) && same_lse(&other, &whole));
    }
    Ok(())
}

fn same_lse(one: &Answer, other: &Answer) -> bool {
    let bits = |answer: &Answer| -> Vec<u64> { answer.lse.iter().flatten().map(|x| x.to_bits()).collect() };
    bits(one) == bits(other)
}

/// A vector added to every key moves all scores of a row alike: the output stays, the log-sum-exp moves with them.
fn softmax_shift(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    const SHIFT: f32 = 8.0;
    let Question { case, inputs } = &trial.question;
    let mut draw = generator(trial.seed, &case.to_string(), "shift");
    let u: Vec<f32> = (0..case.head_dim_qk).map(|_| if draw.random() { SHIFT } else { -SHIFT }).collect();
    let mut ask = |u: &dyn Fn(usize) -> f32| {
        let mut question = trial.question.clone();
        question.inputs.key = mapped(&inputs.key, case.memory[1], |[.., d], x| on_grid(x, 0.125, 4.0) + u(d))?;
        trial.ask(question, found)
    };
    let (plain, shifted) = (ask(&|_| 0.0)?, ask(&|d| u[d])?);
    let scale = f64::from(scale(case));
    for (row, [b, h, i]) in plain.rows().enumerate() {
        for d in 0..plain.dim() {
            let at = row * plain.dim() + d;
            found.compare("output", shifted.out[at], plain.out[at], plain.tolerance[row] + shifted.tolerance[row]);
        }
        if let (Some(plain_lse), Some(shifted_lse)) = (&plain.lse, &shifted.lse) {
            let product = |(d, u): (usize, &f32)| f64::from(inputs.query.get([b, h, i, d])) * f64::from(*u);
            let shift = scale * u.iter().enumerate().map(product).sum::<f64>();
            let bound = plain.lse_tolerance[row] + shifted.lse_tolerance[row];
            found.compare("log-sum-exp", shifted_lse[row], plain_lse[row] + shift, bound);
        }
    }
    Ok(())
}

/// The softmax scale of a case.
fn scale(case: &Case) -> f32 {
    case.options.scale.unwrap_or_else(|| 1.0 / (case.head_dim_qk as f32).sqrt())
}

/// Weights sum to 1.
fn ones(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    let mut question = trial.question.clone();
    question.inputs.value = mapped(&question.inputs.value, question.case.memory[2], |_, _| 1.0)?;
    let answer = trial.ask(question, found)?;
    for (row, out) in answer.out.chunks(answer.dim()).enumerate() {
        let expected = if answer.blind[row] { 0.0 } else { 1.0 };
        out.iter().for_each(|&x| found.compare("output", x, expected, answer.tolerance[row]));
    }
    Ok(())
}

/// A query of zeros weighs all keys that it sees alike: the output is their values' mean, the log-sum-exp the logarithm of
/// their number. Values are on a grid, so that their sum is exact in fp32 under weights of 1, and the output of a kernel
/// that divides after it has summed is rounded once: it is held to half a unit in the last place of the element type, and
/// to the fp32 rounding of weights and quotient.
fn uniform(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    const NOISE: f64 = 1.0 / (1 << 20) as f64;
    let Question { case, inputs } = &trial.question;
    let mut question = trial.question.clone();
    question.inputs.query = mapped(&inputs.query, case.memory[0], |_, _| 0.0)?;
    question.inputs.value = mapped(&inputs.value, case.memory[2], |_, x| on_grid(x, 0.125, 4.0))?;
    let value = question.inputs.value.clone();
    let answer = trial.ask(question, found)?;
    let group = case.num_heads_q / case.num_heads_kv;
    for (row, [b, h, i]) in answer.rows().enumerate() {
        let visible = |j: usize| inputs.attn_mask.as_ref().is_none_or(|mask| mask.get([b, h, i, j]) != 0.0);
        let keys: Vec<usize> = (0..case.seq_len_k).filter(|&j| sees(case, i, j) && visible(j)).collect();
        let count = keys.len() as f64;
        for d in 0..answer.dim() {
            let values = || keys.iter().map(|&j| f64::from(value.get([b, h / group, j, d])));
            let share = 1.0 / count.max(1.0);
            let mean = share * values().sum::<f64>();
            let noise = NOISE * share * values().map(f64::abs).sum::<f64>();
            let bound = ulp(case.dtype, mean) / 2.0 + noise;
            found.compare("output", answer.out[row * answer.dim() + d], mean, bound);
        }
        if let Some(lse) = &answer.lse {
            found.compare("log-sum-exp", lse[row], count.ln(), answer.lse_tolerance[row]);
        }
    }
    Ok(())
}

/// Whether row `i` sees key `j`, mask aside: from the meaning of the options, not from the library's band.
fn sees(case: &Case, i: usize, j: usize) -> bool {
    let AttentionOptions { causal, causal_align, window, .. } = case.options;
    let ahead = match causal_align {
        TopLeft => 0,
        BottomRight => case.seq_len_k as i64 - case.seq_len_q as i64,
    };
    let before = i as i64 + ahead - j as i64;
    let Window { left, right } = window.unwrap_or_default();
    let right = if causal { Some(0) } else { right };
    left.is_none_or(|left| before <= left.into()) && right.is_none_or(|right| -before <= right.into())
}

/// A power of two may move from the scale into the query: not a bit changes.
fn scale_exchange(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    let mut question = trial.question.clone();
    let Question { case, inputs } = &mut question;
    case.options.scale = Some(scale(case) / 2.0);
    inputs.options = case.options;
    inputs.query = mapped(&inputs.query, case.memory[0], |_, x| 2.0 * x)?;
    trial.compare_with_first(question, true, found)
}

/// What a band hides a mask can hide.
fn band_as_mask(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    let Question { case, inputs } = &trial.question;
    let (memory, broadcast) = (Memory::default(), [true, true, false, false]);
    let mask = Mask { kind: MaskType::Bool, broadcast, hidden: Hidden::None, memory };
    let mut question = Question { case: case.clone().attn_mask(mask), inputs: inputs.clone() };
    question.case.options = AttentionOptions { scale: case.options.scale, ..AttentionOptions::default() };
    question.inputs.options = question.case.options;
    let mut drawn = HostTensor::input(DType::Bool, question.case.mask_shape(mask), memory)?;
    drawn.draw(|[_, _, i, j]| f32::from(u8::from(sees(case, i, j))));
    question.inputs.attn_mask = Some(drawn);
    trial.compare_with_first(question, false, found)
}

/// What a boolean mask hides an additive one hides by -inf.
fn bool_as_additive(trial: &Trial<'_>, found: &mut Findings) -> Result<()> {
    let mut question = trial.question.clone();
    let (Some(mask), Some(source)) = (&mut question.case.attn_mask, &trial.question.inputs.attn_mask) else {
        return Ok(());
    };
    *mask = Mask { kind: MaskType::F32, memory: Memory::default(), ..*mask };
    let mask = *mask;
    let mut drawn = HostTensor::input(DType::F32, question.case.mask_shape(mask), mask.memory)?;
    drawn.draw(|index| if source.get(index) == 0.0 { f32::NEG_INFINITY } else { 0.0 });
    question.inputs.attn_mask = Some(drawn);
    trial.compare_with_first(question, false, found)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::runtime::Runtime;

    #[test]
    fn the_cpu_backend_has_every_property() {
        let mut tried: BTreeMap<&str, usize> = BTreeMap::new();
        for case in property_cases(Extent::Quick) {
            let verdicts = check_properties(&Runtime::cpu(), &case, 3);
            assert!(verdicts.len() > 5, "{case}: {} properties", verdicts.len());
            for PropertyVerdict { property, pass, reason, bitwise, .. } in verdicts {
                *tried.entry(property).or_default() += 1;
                assert!(pass, "{property} of {case}: {reason}");
                let exact = ["head_alone", "position", "scale_exchange", "value_linearity"];
                assert_eq!(bitwise.is_some(), exact.contains(&property), "{property} of {case}");
            }
        }
        for Property { name, .. } in &PROPERTIES {
            assert!(tried.get(name).is_some_and(|&tried| tried >= 2), "{name} was hardly tried: {tried:?}");
        }
    }

    #[test]
    fn property_cases_are_many_and_unique() {
        let cases = property_cases(Extent::Default);
        let names: std::collections::HashSet<String> = cases.iter().map(Case::to_string).collect();
        assert_eq!(names.len(), cases.len());
        let tried = |case: &Case| PROPERTIES.iter().filter(|property| (property.applies)(case)).count();
        let properties: usize = cases.iter().map(tried).sum();
        assert!(properties > 1000, "{properties} properties of {} cases", cases.len());
    }
}
