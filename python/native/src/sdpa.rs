//! What SDPA's arguments mean: options, broadcasting, and the shape and order in memory of the results.

use flashcore::{AttentionOptions, CausalAlign, Error, Window};

use crate::call::Inputs;
use crate::errors::{Failure, Result, invalid, unsupported};
use crate::operand::{MAX_RANK, OUTER, Operand};

const BATCH: usize = OUTER;
const HEADS: usize = OUTER + 1;

/// Everything about a call but its tensors, in SDPA's words and types.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Options {
    pub(crate) dropout_p: f64,
    pub(crate) is_causal: bool,
    pub(crate) scale: Option<f64>,
    pub(crate) enable_gqa: bool,
    /// (left, right).
    pub(crate) window: Option<(Option<i64>, Option<i64>)>,
    pub(crate) causal_align: CausalAlign,
}

impl Options {
    /// In the library's words.
    pub(crate) fn check(&self, masked: bool) -> Result<AttentionOptions> {
        if self.dropout_p != 0.0 {
            return Err(unsupported(format!("dropout_p: given {}; only 0.0 is there yet", self.dropout_p)));
        }
        if self.is_causal && masked {
            let accepted = "one of the two; fold the causal mask into attn_mask";
            return Err(invalid("attn_mask", "attn_mask and is_causal=True", accepted).into());
        }
        let window = self.window.map(|(left, right)| Ok::<_, Error>(Window { left: side(left)?, right: side(right)? }));
        Ok(AttentionOptions {
            causal: self.is_causal,
            causal_align: self.causal_align,
            window: window.transpose()?,
            scale: self.scale.map(|scale| scale as f32),
        })
    }

    /// Whether `torch.nn.functional.scaled_dot_product_attention` takes them too.
    pub(crate) fn are_plain(&self) -> bool {
        self.window.is_none() && self.causal_align == CausalAlign::TopLeft
    }
}

/// Why torch's own SDPA may answer a call that was refused here; `None` when the refusal stands. `inputs` are those of
/// the call, where they could be read.
pub(crate) fn elsewhere(
    options: &Options,
    failure: &Failure,
    inputs: impl FnOnce() -> Option<Inputs>,
) -> Option<String> {
    if !options.are_plain() {
        return None;
    }
    match failure {
        Failure::Unsupported(reason) => Some(reason.clone()),
        Failure::Elsewhere(error) => Some(error.to_string()),
        Failure::Library(Error::Unsupported(error)) => Some(format!("no kernel answers {}", error.request)),
        Failure::Library(Error::InvalidArgument { .. }) => inputs()?.beyond_us(),
        _ => None,
    }
}

/// One side of a window; more keys than there can be is all of them.
fn side(keys: Option<i64>) -> Result<Option<u32>, Error> {
    let Some(keys) = keys else { return Ok(None) };
    if keys < 0 {
        return Err(invalid("window", keys, "numbers >= 0, or None for no limit"));
    }
    Ok(Some(u32::try_from(keys).unwrap_or(u32::MAX)))
}

/// Repeats dimensions of size 1 before `seq`, as SDPA does. Head counts may differ otherwise only by `enable_gqa`.
pub(crate) fn broadcast(inputs: &mut Inputs, enable_gqa: bool) -> Result<(), Error> {
    let Inputs { query, key, value, attn_mask, .. } = inputs;
    let common = |sizes: [usize; 2]| if sizes[0] == 1 { sizes[1] } else { sizes[0] };
    let heads_kv = common([key.shape[HEADS], value.shape[HEADS]]);
    if !enable_gqa {
        let heads = common([query.shape[HEADS], heads_kv]);
        query.broadcast(HEADS, heads);
        if heads_kv != heads && heads_kv != 1 {
            let given = format!("{heads_kv} heads for {heads} query heads");
            return Err(invalid("key", given, "the query's number of heads, or enable_gqa=True"));
        }
    }
    for operand in [&mut *key, &mut *value] {
        operand.broadcast(HEADS, heads_kv);
    }
    // The library compares the sizes of the last four dimensions.
    for dim in 0..=BATCH {
        let size = common([query.shape[dim], common([key.shape[dim], value.shape[dim]])]);
        for operand in [&mut *query, &mut *key, &mut *value] {
            operand.broadcast(dim, size);
            check_outer(operand, dim, size)?;
        }
        if let Some(mask) = attn_mask
            && dim < BATCH
        {
            mask.broadcast(dim, size);
            check_outer(mask, dim, size)?;
        }
    }
    Ok(())
}

fn check_outer(operand: &Operand, dim: usize, size: usize) -> Result<(), Error> {
    if dim == BATCH || operand.shape[dim] == size {
        return Ok(());
    }
    let accepted = format!("a size of 1 or {size} in dimension -{}", MAX_RANK - dim);
    Err(invalid(operand.role.name, format!("shape {:?}", operand.own_shape()), accepted))
}

/// The shape of the output, with as many leading ones as there is room for, and how many dimensions count.
pub(crate) fn out_shape(inputs: &Inputs) -> ([usize; MAX_RANK], usize) {
    let Inputs { query, key, value, .. } = inputs;
    let mut shape = query.shape;
    shape[MAX_RANK - 1] = value.shape[MAX_RANK - 1];
    (shape, query.rank.max(key.rank).max(value.rank))
}

/// The strides of a new output: dense, head_dim innermost, and the other dimensions in the query's order; row-major
/// where the query was broadcast.
pub(crate) fn out_strides(query: &Operand, shape: &[usize; MAX_RANK]) -> [i64; MAX_RANK] {
    let mut order: [usize; MAX_RANK] = std::array::from_fn(|dim| dim);
    let leading = &mut order[..MAX_RANK - 1];
    if !query.repeats() {
        leading.sort_by_key(|&dim| std::cmp::Reverse(if shape[dim] > 1 { query.strides[dim] } else { i64::MAX }));
    }
    let mut strides = [1; MAX_RANK];
    let mut next = 1i64;
    for &dim in order.iter().rev() {
        strides[dim] = next;
        next = next.saturating_mul(shape[dim].max(1) as i64);
    }
    strides
}
