//! Is the call well-formed? Every refusal names the argument, what was given and what is accepted.

use super::plan::Addresses;
use super::problem::{Band, CausalAlign, MaskLayout, Problem};
use super::{AttentionOptions, Window};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::{Device, Layout, TensorView, TensorViewMut};

/// The largest head_dim that kernels exist for.
pub const MAX_HEAD_DIM: usize = 256;
/// Kernels add a row number, a band offset of up to this and 1 in 32 bits.
const MAX_SEQ_LEN: usize = (1 << 30) - 1;

/// A call that has passed every check.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Checked {
    pub(crate) problem: Problem,
    pub(crate) device: Device,
    extents: Extents,
}

/// The bytes from the first to one past the last of each tensor.
#[derive(Debug, Clone, Copy)]
struct Extents {
    q: u64,
    k: u64,
    v: u64,
    out: u64,
    lse: u64,
    attn_mask: u64,
    attn_mask_element: u64,
}

/// The tensors that a call reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands<'a> {
    pub(crate) query: TensorView<'a>,
    pub(crate) key: TensorView<'a>,
    pub(crate) value: TensorView<'a>,
    pub(crate) attn_mask: Option<TensorView<'a>>,
}

impl Checked {
    /// Checks a call against its output.
    pub(crate) fn new(
        operands: &Operands<'_>,
        options: &AttentionOptions,
        out: &TensorViewMut<'_>,
        lse: Option<&TensorViewMut<'_>>,
    ) -> Result<Self> {
        let problem = problem(operands, options, out.layout(), lse.is_some())?;
        let device = operands.query.device();
        same_device("out", out.device(), device)?;
        if let Some(lse) = lse {
            same_device("lse", lse.device(), device)?;
            check_lse(&problem, lse.layout())?;
        }
        if out.layout().may_self_overlap() {
            return Err(Error::invalid(
                "out",
                format!("shape {:?} with strides {:?}", out.layout().shape, out.layout().strides),
                "a tensor whose elements do not share memory",
            ));
        }
        let extents = Extents {
            q: bytes(operands.query.layout()),
            k: bytes(operands.key.layout()),
            v: bytes(operands.value.layout()),
            out: bytes(out.layout()),
            lse: lse.map_or(0, |lse| bytes(lse.layout())),
            attn_mask: operands.attn_mask.as_ref().map_or(0, |mask| bytes(mask.layout())),
            attn_mask_element: operands.attn_mask.as_ref().map_or(1, |mask| mask.layout().dtype.size() as u64),
        };
        let checked = Self { problem, device, extents };
        checked.check_addresses(&Addresses::of(operands, out, lse))?;
        Ok(checked)
    }

    /// Addresses must be aligned to their element, and null only where there is nothing. Outputs must not share memory
    /// with anything.
    #[inline]
    pub(crate) fn check_addresses(&self, addresses: &Addresses) -> Result<()> {
        if self.plainly_apart(addresses) { Ok(()) } else { self.check_spans(addresses) }
    }

    /// Whether the addresses pass, as far as can be told in few steps: a call of an ordinary form is refused by
    /// [`Checked::check_spans`] alone, which knows why.
    fn plainly_apart(&self, addresses: &Addresses) -> bool {
        let &Addresses { q, k, v, out, lse, attn_mask } = addresses;
        let extents = &self.extents;
        let element = self.problem.dtype.size() as u64;
        let aligned = (q | k | v | out) & (element - 1) == 0
            && lse & (DType::F32.size() as u64 - 1) == 0
            && attn_mask & (extents.attn_mask_element - 1) == 0;
        let present = q != 0
            && k != 0
            && v != 0
            && out != 0
            && (lse != 0 || extents.lse == 0)
            && (attn_mask != 0 || extents.attn_mask == 0);
        let end = |address: u64, bytes: u64| address.saturating_add(bytes);
        let out_end = end(out, extents.out);
        let inputs = [(q, end(q, extents.q)), (k, end(k, extents.k)), (v, end(v, extents.v))];
        let mask = (attn_mask, end(attn_mask, extents.attn_mask));
        // Bitwise: without jumps.
        let apart = |from: u64, to: u64, input: (u64, u64)| (input.1 <= from) | (to <= input.0);
        let all_apart = |from, to| inputs.iter().fold(true, |all, &input| all & apart(from, to, input));
        aligned
            && present
            && all_apart(out, out_end)
            && (extents.attn_mask == 0 || apart(out, out_end, mask))
            && (extents.lse == 0 || {
                let lse_end = end(lse, extents.lse);
                let mask_apart = extents.attn_mask == 0 || apart(lse, lse_end, mask);
                all_apart(lse, lse_end) && apart(lse, lse_end, (out, out_end)) && mask_apart
            })
    }

    #[cold]
    fn check_spans(&self, addresses: &Addresses) -> Result<()> {
        let Extents { q, k, v, out, lse, attn_mask, attn_mask_element } = self.extents;
        let element = self.problem.dtype.size() as u64;
        let span = |name, address, bytes, element| Span { name, address, bytes, element };
        let inputs = [
            span("query", addresses.q, q, element),
            span("key", addresses.k, k, element),
            span("value", addresses.v, v, element),
            span("attn_mask", addresses.attn_mask, attn_mask, attn_mask_element),
        ];
        let outputs =
            [span("out", addresses.out, out, element), span("lse", addresses.lse, lse, DType::F32.size() as u64)];
        inputs.iter().chain(&outputs).try_for_each(Span::check)?;
        for input in &inputs {
            for output in &outputs {
                output.check_apart(input)?;
            }
        }
        outputs[1].check_apart(&outputs[0])
    }
}

impl Addresses {
    #[inline]
    pub(crate) fn of(operands: &Operands<'_>, out: &TensorViewMut<'_>, lse: Option<&TensorViewMut<'_>>) -> Self {
        Self {
            q: operands.query.address(),
            k: operands.key.address(),
            v: operands.value.address(),
            out: out.address(),
            lse: lse.map_or(0, TensorViewMut::address),
            attn_mask: operands.attn_mask.as_ref().map_or(0, TensorView::address),
        }
    }
}

fn bytes(layout: &Layout) -> u64 {
    (layout.extent() as u64).saturating_mul(layout.dtype.size() as u64)
}

/// The memory between a tensor's first and last element.
struct Span {
    name: &'static str,
    address: u64,
    bytes: u64,
    element: u64,
}

impl Span {
    fn check(&self) -> Result<()> {
        // Elements have sizes that are powers of two.
        if self.bytes == 0 || (self.address != 0 && self.address & (self.element - 1) == 0) {
            return Ok(());
        }
        let accepted = format!("a non-null address that is a multiple of {}", self.element);
        Err(Error::invalid(self.name, format!("address {:#x}", self.address), accepted))
    }

    fn check_apart(&self, other: &Self) -> Result<()> {
        let end = |span: &Self| span.address.saturating_add(span.bytes);
        let apart = self.bytes == 0 || other.bytes == 0 || end(self) <= other.address || end(other) <= self.address;
        if apart {
            return Ok(());
        }
        Err(Error::invalid(self.name, format!("memory shared with {}", other.name), "memory of its own"))
    }
}

/// The problem that a call poses.
pub(crate) fn problem(operands: &Operands<'_>, options: &AttentionOptions, out: &Layout, lse: bool) -> Result<Problem> {
    let (q, k, v) = (operands.query.layout(), operands.key.layout(), operands.value.layout());
    check_dtypes(q, k, v, out)?;
    check_shapes(q, k, v, out)?;
    let device = operands.query.device();
    same_device("key", operands.key.device(), device)?;
    same_device("value", operands.value.device(), device)?;
    let scale = check_scale(options.scale, q.shape[3])?;
    let attn_mask = match &operands.attn_mask {
        None => None,
        Some(mask) => {
            same_device("attn_mask", mask.device(), device)?;
            Some(check_mask(mask.layout(), q, k)?)
        }
    };
    Ok(Problem {
        dtype: q.dtype,
        batch: q.shape[0],
        num_heads_q: q.shape[1],
        num_heads_kv: k.shape[1],
        seq_len_q: q.shape[2],
        seq_len_k: k.shape[2],
        head_dim_qk: q.shape[3],
        head_dim_v: v.shape[3],
        q_strides: normalise("query", q)?,
        k_strides: normalise("key", k)?,
        v_strides: normalise("value", v)?,
        out_strides: normalise("out", out)?,
        attn_mask,
        band: band(options, q.shape[2], k.shape[2]),
        scale_bits: scale.to_bits(),
        lse,
    })
}

/// A problem that was put together by hand, with the strides that a call would give it.
pub(crate) fn restate(problem: &Problem) -> Result<Problem> {
    let checked = |name, layout: Layout| Layout::new(name, layout.dtype, &layout.shape, &layout.strides);
    let q = checked("query", problem.q_layout())?;
    let k = checked("key", problem.k_layout())?;
    let v = checked("value", problem.v_layout())?;
    let out = checked("out", problem.out_layout())?;
    check_dtypes(&q, &k, &v, &out)?;
    check_shapes(&q, &k, &v, &out)?;
    check_scale(Some(problem.scale()), q.shape[3])?;
    let attn_mask = problem.attn_mask.map(|MaskLayout { dtype, strides }| {
        let shape = [q.shape[0], q.shape[1], q.shape[2], k.shape[2]];
        check_mask(&Layout::new("attn_mask", dtype, &shape, &strides)?, &q, &k)
    });
    Ok(Problem {
        q_strides: normalise("query", &q)?,
        k_strides: normalise("key", &k)?,
        v_strides: normalise("value", &v)?,
        out_strides: normalise("out", &out)?,
        attn_mask: attn_mask.transpose()?,
        band: problem.band.and_then(|Band { lo, hi }| clamp_band(lo.into(), hi.into(), q.shape[2], k.shape[2])),
        ..*problem
    })
}

fn check_dtypes(q: &Layout, k: &Layout, v: &Layout, out: &Layout) -> Result<()> {
    if q.dtype == DType::Bool {
        return Err(Error::invalid("query", "dtype bool", "f16, bf16, f32 or f64 (f16 or bf16 on a GPU)"));
    }
    for (name, layout) in [("key", k), ("value", v), ("out", out)] {
        if layout.dtype != q.dtype {
            let accepted = format!("the query's dtype, {}", q.dtype);
            return Err(Error::invalid(name, format!("dtype {}", layout.dtype), accepted));
        }
    }
    Ok(())
}

fn check_shapes(q: &Layout, k: &Layout, v: &Layout, out: &Layout) -> Result<()> {
    let [batch, heads_q, seq_q, dim_qk] = q.shape;
    let [_, heads_kv, seq_k, _] = k.shape;
    let expect = |name: &'static str, shape: [usize; 4], wanted: [usize; 4], why: &str| {
        if shape == wanted {
            return Ok(());
        }
        Err(Error::invalid(name, format!("shape {shape:?}"), format!("shape {wanted:?} ({why})")))
    };
    expect("key", k.shape, [batch, heads_kv, seq_k, dim_qk], "batch and head_dim of the query")?;
    expect("value", v.shape, [batch, heads_kv, seq_k, v.shape[3]], "batch, heads and seq of the key")?;
    if heads_q != 0 && (heads_kv == 0 || heads_q % heads_kv != 0) {
        return Err(Error::invalid(
            "key",
            format!("{heads_kv} heads for {heads_q} query heads"),
            "a number of heads that divides the query's",
        ));
    }
    for (name, dim) in [("query", dim_qk), ("value", v.shape[3])] {
        if dim > MAX_HEAD_DIM {
            return Err(Error::invalid(name, format!("head_dim {dim}"), format!("head_dim 0 to {MAX_HEAD_DIM}")));
        }
    }
    for (name, seq) in [("query", seq_q), ("key", seq_k)] {
        if seq > MAX_SEQ_LEN {
            return Err(Error::invalid(name, format!("seq {seq}"), format!("seq 0 to {MAX_SEQ_LEN}")));
        }
    }
    expect("out", out.shape, [batch, heads_q, seq_q, v.shape[3]], "query's batch, heads and seq, value's head_dim")
}

fn check_scale(scale: Option<f32>, head_dim: usize) -> Result<f32> {
    let scale = scale.unwrap_or_else(|| 1.0 / (head_dim.max(1) as f32).sqrt());
    if !scale.is_finite() {
        return Err(Error::invalid("scale", scale, "a finite number"));
    }
    Ok(scale)
}

fn check_mask(mask: &Layout, q: &Layout, k: &Layout) -> Result<MaskLayout> {
    if !matches!(mask.dtype, DType::Bool | DType::F32) && mask.dtype != q.dtype {
        let accepted = format!("bool, f32 or the query's dtype, {}", q.dtype);
        return Err(Error::invalid("attn_mask", format!("dtype {}", mask.dtype), accepted));
    }
    let full = [q.shape[0], q.shape[1], q.shape[2], k.shape[2]];
    let mut strides = mask.strides;
    for dim in 0..4 {
        if mask.shape[dim] == 1 || full[dim] <= 1 {
            strides[dim] = 0;
        }
        if mask.shape[dim] != full[dim] && mask.shape[dim] != 1 {
            let accepted = format!("a shape that broadcasts to {full:?}");
            return Err(Error::invalid("attn_mask", format!("shape {:?}", mask.shape), accepted));
        }
    }
    Ok(MaskLayout { dtype: mask.dtype, strides })
}

/// Checks the last dimension, and gives dimensions of size 1 (or 0), whose stride means nothing, the stride that a
/// padded contiguous tensor would have, so that it breaks no alignment and splits no cached plan.
fn normalise(argument: &'static str, layout: &Layout) -> Result<[i64; 4]> {
    let mut strides = layout.strides;
    if layout.shape[3] <= 1 {
        strides[3] = 1;
    }
    if strides[3] != 1 && !layout.is_empty() {
        return Err(Error::invalid(
            argument,
            format!("strides {:?}", layout.strides),
            "a contiguous last dimension (stride 1); call .contiguous() first",
        ));
    }
    strides[3] = 1;
    let mut inner = layout.shape[3].max(1).next_multiple_of(8) as i64;
    for dim in (0..3).rev() {
        if layout.shape[dim] <= 1 || layout.is_empty() {
            strides[dim] = inner;
        }
        inner = inner.max(strides[dim].saturating_mul(layout.shape[dim].max(1) as i64));
        inner = inner.saturating_add(7) & !7;
    }
    Ok(strides)
}

fn check_lse(problem: &Problem, lse: &Layout) -> Result<()> {
    let shape = [problem.batch, problem.num_heads_q, problem.seq_len_q, 1];
    let wanted = Layout::contiguous("lse", DType::F32, &shape)?;
    let same_strides = (0..4).all(|d| shape[d] <= 1 || lse.strides[d] == wanted.strides[d]);
    if lse.dtype == DType::F32 && lse.shape == shape && (same_strides || lse.is_empty()) {
        return Ok(());
    }
    Err(Error::invalid(
        "lse",
        format!("{} {:?} with strides {:?}", lse.dtype, lse.shape, lse.strides),
        format!("f32 {shape:?}, contiguous"),
    ))
}

fn same_device(argument: &'static str, given: Device, wanted: Device) -> Result<()> {
    if given == wanted {
        return Ok(());
    }
    Err(Error::invalid(argument, format!("a tensor on {given}"), format!("the query's device, {wanted}")))
}

/// The band of causal and window, clamped so that `row + offset` stays within 32 bits without changing who sees whom.
pub(crate) fn band(options: &AttentionOptions, seq_q: usize, seq_k: usize) -> Option<Band> {
    let Window { left, right } = options.window.unwrap_or_default();
    if !options.causal && left.is_none() && right.is_none() {
        return None;
    }
    let diagonal = match options.causal_align {
        CausalAlign::TopLeft => 0,
        CausalAlign::BottomRight => seq_k as i64 - seq_q as i64,
    };
    let right = if options.causal { Some(0) } else { right };
    let lo = left.map_or(i64::MIN, |left| diagonal - i64::from(left));
    let hi = right.map_or(i64::MAX, |right| diagonal + i64::from(right));
    clamp_band(lo, hi, seq_q, seq_k)
}

/// `None` when the band hides nothing.
fn clamp_band(lo: i64, hi: i64, seq_q: usize, seq_k: usize) -> Option<Band> {
    let (seq_q, seq_k) = (seq_q as i64, seq_k as i64);
    let (lo, hi) = (lo.clamp(-seq_q, seq_k), hi.clamp(-seq_q - 1, seq_k));
    if lo <= 1 - seq_q && hi >= seq_k - 1 {
        return None;
    }
    Some(Band { lo: lo as i32, hi: hi as i32 })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn options(causal: bool, align: CausalAlign, window: Option<(Option<u32>, Option<u32>)>) -> AttentionOptions {
        let window = window.map(|(left, right)| Window { left, right });
        AttentionOptions { causal, causal_align: align, window, scale: None }
    }

    #[test]
    fn causal_bands_follow_the_diagonal() {
        let top = band(&options(true, CausalAlign::TopLeft, None), 5, 7);
        assert_eq!(top, Some(Band { lo: -5, hi: 0 }));
        let bottom = band(&options(true, CausalAlign::BottomRight, None), 5, 7);
        assert_eq!(bottom, Some(Band { lo: -5, hi: 2 }));
    }

    #[test]
    fn a_window_that_covers_everything_is_dense() {
        assert_eq!(band(&options(false, CausalAlign::TopLeft, Some((Some(4), Some(6)))), 5, 7), None);
        assert!(band(&options(false, CausalAlign::TopLeft, Some((Some(3), Some(6)))), 5, 7).is_some());
        assert_eq!(band(&options(true, CausalAlign::BottomRight, None), 1, 9), None);
    }

    #[test]
    fn huge_windows_do_not_overflow() {
        let band = band(&options(true, CausalAlign::TopLeft, Some((Some(u32::MAX), None))), 1 << 30, 1 << 30);
        assert_eq!(band, Some(Band { lo: -(1 << 30), hi: 0 }));
    }

    proptest! {
        #[test]
        fn plain_addresses_pass_the_whole_check(
            [q, k, v, out, lse, attn_mask] in [0u64..60, 0..60, 0..60, 0..60, 0..60, 0..60],
            extents in [0u64..9, 0..9, 0..9, 0..9, 0..9, 0..9],
            ordinary in any::<bool>(),
        ) {
            let [eq, ek, ev, eout, else_, emask] = extents;
            let (data, mut out_data) = ([half::f16::ZERO; 8], [half::f16::ZERO; 8]);
            let view = TensorView::from_slice(&data, &[1, 1, 1, 8]).expect("a view");
            let operands = Operands { query: view, key: view, value: view, attn_mask: None };
            let to = TensorViewMut::from_slice(&mut out_data, &[1, 1, 1, 8]).expect("a view");
            let mut checked = Checked::new(&operands, &AttentionOptions::default(), &to, None).expect("a call");
            // Ordinary tensors are not empty, and lie on even addresses.
            let (least, unit) = if ordinary { (1, 4) } else { (0, 1) };
            let bytes = |extent: u64| 2 * extent.max(least);
            let at = |address: u64| unit * address;
            let (q, k, v, out, lse, attn_mask) = (at(q), at(k), at(v), at(out), at(lse), at(attn_mask));
            checked.extents = Extents {
                q: bytes(eq),
                k: bytes(ek),
                v: bytes(ev),
                out: bytes(eout),
                lse: 2 * else_,
                attn_mask: 2 * emask,
                attn_mask_element: 1,
            };
            let addresses = Addresses { q, k, v, out, lse, attn_mask };
            let passes = checked.check_spans(&addresses).is_ok();
            prop_assert_eq!(checked.check_addresses(&addresses).is_ok(), passes);
            if ordinary && lse != 0 && attn_mask != 0 {
                prop_assert_eq!(checked.plainly_apart(&addresses), passes);
            }
        }
    }

    #[test]
    fn strides_of_single_dimensions_are_normalised() {
        let layout = Layout::new("query", DType::F16, &[1, 3, 1, 40], &[7, 40, 3, 1]).expect("a layout");
        assert_eq!(normalise("query", &layout), Ok([120, 40, 40, 1]));
    }
}
