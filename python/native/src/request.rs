//! A call as Python makes it: the meaning of SDPA's arguments.

use flashcore::{AttentionOptions, CausalAlign, Error, Window};
use pyo3::prelude::*;

use crate::call::{Call, Inputs};
use crate::errors::{Result, invalid, unsupported};
use crate::info::Explanation;
use crate::library::{Library, Reader, outputs};
use crate::operand::{ATTN_MASK, KEY, LSE, OUT, QUERY, VALUE};
use crate::runtime::default_runtime;

/// The arguments that `attention`, `explain` and `Runtime.plan` share.
pub(crate) struct Request<'a, 'py> {
    pub(crate) query: &'a Bound<'py, PyAny>,
    pub(crate) key: &'a Bound<'py, PyAny>,
    pub(crate) value: &'a Bound<'py, PyAny>,
    pub(crate) attn_mask: Option<&'a Bound<'py, PyAny>>,
    pub(crate) dropout_p: f64,
    pub(crate) is_causal: bool,
    pub(crate) scale: Option<f64>,
    pub(crate) enable_gqa: bool,
    pub(crate) window: Option<(Option<i64>, Option<i64>)>,
    pub(crate) causal_align: &'a str,
}

/// A request that has been read, and its outputs as Python objects.
pub(crate) struct Prepared<'py> {
    pub(crate) call: Call,
    pub(crate) reader: Reader,
    pub(crate) out: Bound<'py, PyAny>,
    pub(crate) lse: Option<Bound<'py, PyAny>>,
}

impl<'py> Request<'_, 'py> {
    /// Reads the inputs; with `share`, so that they may be used after the call.
    pub(crate) fn inputs(&self, share: bool) -> Result<(Reader, Inputs)> {
        let options = self.options()?;
        let mut reader = Reader::new(Library::of(&QUERY, self.query)?, share);
        let mut inputs = Inputs {
            query: reader.read(&QUERY, self.query)?,
            key: reader.read(&KEY, self.key)?,
            value: reader.read(&VALUE, self.value)?,
            attn_mask: self.attn_mask.map(|mask| reader.read(&ATTN_MASK, mask)).transpose()?,
            options,
        };
        broadcast(&mut inputs, self.enable_gqa)?;
        Ok((reader, inputs))
    }

    /// Reads the inputs, and reads or makes the outputs.
    pub(crate) fn prepare(
        &self,
        share: bool,
        out: Option<&Bound<'py, PyAny>>,
        return_lse: bool,
    ) -> Result<Prepared<'py>> {
        let (mut reader, inputs) = self.inputs(share)?;
        let shape = inputs.out_shape();
        let out = match out {
            Some(out) => out.clone(),
            None => reader.library.empty_out(self.query, &inputs.query, shape)?,
        };
        let [batch, heads, seq, _] = shape;
        let lse = return_lse.then(|| reader.library.empty_lse(self.query, [batch, heads, seq])).transpose()?;
        let call = Call {
            inputs,
            out: reader.read(&OUT, &out)?,
            lse: lse.as_ref().map(|lse| reader.read(&LSE, lse)).transpose()?,
        };
        Ok(Prepared { call, reader, out, lse })
    }

    fn options(&self) -> Result<AttentionOptions> {
        if self.dropout_p != 0.0 {
            return Err(unsupported(format!("dropout_p: given {}; only 0.0 is there yet", self.dropout_p)));
        }
        if self.is_causal && self.attn_mask.is_some() {
            let accepted = "one of the two; fold the causal mask into attn_mask";
            return Err(invalid("attn_mask", "attn_mask and is_causal=True", accepted).into());
        }
        let causal_align = match self.causal_align {
            "top_left" => CausalAlign::TopLeft,
            "bottom_right" => CausalAlign::BottomRight,
            other => {
                return Err(invalid("causal_align", format!("{other:?}"), r#""top_left" or "bottom_right""#).into());
            }
        };
        let window = self.window.map(|(left, right)| Ok::<_, Error>(Window { left: side(left)?, right: side(right)? }));
        Ok(AttentionOptions {
            causal: self.is_causal,
            causal_align,
            window: window.transpose()?,
            scale: self.scale.map(|scale| scale as f32),
        })
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

/// SDPA's broadcasting: batches and heads of size 1 are repeated. Other head counts may differ only by `enable_gqa`.
fn broadcast(inputs: &mut Inputs, enable_gqa: bool) -> Result<(), Error> {
    let Inputs { query, key, value, .. } = inputs;
    let common = |sizes: &[usize]| sizes.iter().copied().find(|&size| size != 1).unwrap_or(1);
    let batch = common(&[query.shape[0], key.shape[0], value.shape[0]]);
    let heads_kv = common(&[key.shape[1], value.shape[1]]);
    if !enable_gqa {
        let heads = common(&[query.shape[1], heads_kv]);
        query.broadcast(1, heads);
        if heads_kv != heads && heads_kv != 1 {
            let given = format!("{heads_kv} heads for {heads} query heads");
            return Err(invalid("key", given, "the query's number of heads, or enable_gqa=True"));
        }
    }
    for operand in [query, key, value] {
        operand.broadcast(0, batch);
    }
    for operand in [&mut inputs.key, &mut inputs.value] {
        operand.broadcast(1, heads_kv);
    }
    Ok(())
}

/// Scaled dot-product attention with the semantics of `torch.nn.functional.scaled_dot_product_attention`.
///
/// Tensors are (batch, heads, seq, head_dim), torch tensors (CUDA or CPU) or numpy arrays, with any batch, head and seq
/// strides; the last dimension is contiguous. Work on a CUDA device is queued on torch's current stream.
///
/// attn_mask: bool (True = attend) or additive in the query's dtype or float32; broadcasts to (batch, heads, seq_q,
///     seq_k). Not together with is_causal.
/// window: (left, right), how many keys a query sees before and after its diagonal; None is unlimited.
/// causal_align: where the diagonal of is_causal and window starts when seq_q != seq_k: "top_left" as in SDPA, or
///     "bottom_right" as in flash-attn.
/// return_lse: also return the natural log-sum-exp of each row, float32 (batch, heads, seq_q).
/// out: write into this tensor instead of a new one.
///
/// A row that sees no key gives 0, and a log-sum-exp of -inf. Nothing is written when an exception is raised.
#[pyfunction]
#[pyo3(signature = (query, key, value, attn_mask=None, dropout_p=0.0, is_causal=false, *, scale=None, enable_gqa=false,
    window=None, causal_align="top_left", return_lse=false, out=None))]
#[expect(clippy::too_many_arguments, reason = "the signature of SDPA")]
pub(crate) fn attention<'py>(
    query: &Bound<'py, PyAny>,
    key: &Bound<'py, PyAny>,
    value: &Bound<'py, PyAny>,
    attn_mask: Option<&Bound<'py, PyAny>>,
    dropout_p: f64,
    is_causal: bool,
    scale: Option<f64>,
    enable_gqa: bool,
    window: Option<(Option<i64>, Option<i64>)>,
    causal_align: &str,
    return_lse: bool,
    out: Option<&Bound<'py, PyAny>>,
) -> Result<Bound<'py, PyAny>> {
    let request =
        Request { query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, causal_align };
    let Prepared { call, reader, out, lse } = request.prepare(false, out, return_lse)?;
    let device = call.inputs.query.device;
    let py = query.py();
    #[expect(unsafe_code, reason = "memory that Python owns")]
    // SAFETY: the arguments keep the arrays alive during the call, `reader` their buffers, and a library that frees
    // device memory reuses it in the order of the stream that it named. As for every operation of torch and numpy, the
    // caller may not write to the arrays from another thread meanwhile.
    unsafe {
        call.run(py, default_runtime(device)?, reader.library.current_stream(py, device)?)?;
    }
    drop(reader);
    Ok(outputs(out, lse)?)
}

/// Which kernel would answer a call, and why not each of the others. Takes the arguments of `attention`; launches
/// nothing.
#[pyfunction]
#[pyo3(signature = (query, key, value, attn_mask=None, dropout_p=0.0, is_causal=false, *, scale=None, enable_gqa=false,
    window=None, causal_align="top_left"))]
#[expect(clippy::too_many_arguments, reason = "the signature of SDPA")]
pub(crate) fn explain(
    query: &Bound<'_, PyAny>,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    attn_mask: Option<&Bound<'_, PyAny>>,
    dropout_p: f64,
    is_causal: bool,
    scale: Option<f64>,
    enable_gqa: bool,
    window: Option<(Option<i64>, Option<i64>)>,
    causal_align: &str,
) -> Result<Explanation> {
    let request =
        Request { query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, causal_align };
    let (_reader, inputs) = request.inputs(false)?;
    Ok(inputs.explain(default_runtime(inputs.query.device)?)?.into())
}
