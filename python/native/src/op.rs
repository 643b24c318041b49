//! `torch.ops.flashcore.attention` and `attention_lse`, registered with libtorch's dispatcher from here.
//!
//! The dispatcher calls these kernels for CPU and CUDA tensors, below autograd and autocast, whose kernels are in
//! `flashcore/ops.py`, as is the one for tensors without memory. What FlashCore does not answer, and torch's own SDPA may,
//! goes there; it is logged once for each reason.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

use flashcore::CausalAlign;
use pyo3::prelude::*;

use crate::asked::TorchCall;
use crate::errors::{Failure, Result, internal};
use crate::library::Library;
use crate::operand::{ATTN_MASK, KEY, MAX_RANK, OUT, QUERY, VALUE};
use crate::sdpa::{Options, elsewhere, out_strides};
use crate::shim::{SYMBOLS, Sdpa, Tensor, Torch, Value};
use crate::torch_call::{self, Made};

const NAMESPACE: &CStr = c"flashcore";
const SCHEMAS: [&CStr; 2] = [
    c"attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, \
      bool is_causal=False, *, float? scale=None, bool enable_gqa=False, int? window_left=None, int? window_right=None, \
      bool bottom_right=False, bool fallback=True) -> Tensor",
    c"attention_lse(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, \
      bool is_causal=False, *, float? scale=None, bool enable_gqa=False, int? window_left=None, int? window_right=None, \
      bool bottom_right=False, bool fallback=True) -> (Tensor, Tensor)",
];

/// Adds the operators to the torch that the program has loaded; once. Looks at torch now, while no mode is on.
#[pyfunction]
pub(crate) fn register_torch_operators(py: Python<'_>) -> Result<()> {
    static REGISTERED: OnceLock<()> = OnceLock::new();
    if REGISTERED.get().is_some() {
        return Ok(());
    }
    Library::torch(py)?;
    let torch = Torch::get()?;
    torch.define(NAMESPACE, &SCHEMAS)?;
    for key in [c"CPU", c"CUDA"] {
        torch.implement(NAMESPACE, key, &[(c"attention", attention), (c"attention_lse", attention_lse)])?;
    }
    _ = REGISTERED.set(());
    Ok(())
}

/// The functions of libtorch that every supported version must have.
#[pyfunction]
pub(crate) fn torch_symbols() -> Vec<&'static str> {
    SYMBOLS.to_vec()
}

/// The exception for the last failure of an operator on this thread, which torch could only report as text; once.
#[pyfunction]
pub(crate) fn last_failure() -> Option<PyErr> {
    LAST.with_borrow_mut(|last| last.failure.take()).map(PyErr::from)
}

/// Says, once for each reason, that torch's own SDPA answers a call.
#[pyfunction]
pub(crate) fn log_fallback(reason: &str) {
    static SAID: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.get_or_insert_default().insert(reason.to_owned()) {
        drop(said);
        log::warn!("torch's own scaled_dot_product_attention answers instead: {reason}");
    }
}

thread_local! {
    static LAST: RefCell<Last> = RefCell::default();
}

/// The last failure of an operator on this thread.
#[derive(Default)]
struct Last {
    failure: Option<Failure>,
    /// Outlives the exception, whose thrower has no frame to own it.
    message: CString,
}

unsafe extern "C-unwind" fn attention(stack: *mut Value, _arguments: u64, _results: u64) {
    // SAFETY: the dispatcher's call of this operator, forwarded.
    unsafe { enter(stack, false) }
}

unsafe extern "C-unwind" fn attention_lse(stack: *mut Value, _arguments: u64, _results: u64) {
    // SAFETY: as above.
    unsafe { enter(stack, true) }
}

/// # Safety
/// `stack` holds the arguments of one of the schemas, and has room for its results. Called by C++ through frames of the
/// C-unwind ABI that own nothing.
unsafe fn enter(stack: *mut Value, lse: bool) {
    // SAFETY: forwarded from the caller.
    let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { answer(stack, lse) }));
    let failed = match outcome {
        Ok(Ok(())) => false,
        Ok(Err(failure)) => remember(failure),
        Err(panic) => remember(internal(&*panic)),
    };
    if failed {
        // SAFETY: nothing in this frame needs dropping; the borrow is over before the exception starts.
        unsafe { throw() }
    }
}

fn remember(failure: Failure) -> bool {
    let message = CString::new(failure.to_string().replace('\0', "")).unwrap_or_default();
    LAST.set(Last { failure: Some(failure), message });
    true
}

/// # Safety
/// As [`Torch::throw`].
unsafe fn throw() {
    // Cloning would leak; the cell is left alone until the next failure of this thread.
    let message = LAST.with(|last| last.as_ptr().cast_const());
    if let Ok(torch) = Torch::get() {
        // SAFETY: the thread's cell is alive and not borrowed; the caller's promise.
        unsafe { torch.throw(&(*message).message) }
    }
}

/// # Safety
/// As [`enter`].
unsafe fn answer(stack: *mut Value, lse: bool) -> Result<()> {
    let torch = Torch::get()?;
    // SAFETY: forwarded from the caller.
    let arguments = unsafe { Arguments::take(torch, stack) };
    // SAFETY: the arguments own references to the tensors until the end of this function.
    let outcome = arguments.call(lse).and_then(|call| unsafe { torch_call::run(torch, &call, None) });
    let made = match outcome {
        Err(failure) if arguments.fallback && !lse => {
            Made { out: Some(arguments.fall_through(torch, failure)?), lse: None }
        }
        outcome => outcome?,
    };
    for (place, tensor) in [made.out, made.lse].into_iter().flatten().enumerate() {
        // SAFETY: the stack has room for the results.
        unsafe { *stack.add(place) = tensor.into_value() };
    }
    Ok(())
}

/// The arguments of a schema.
struct Arguments {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Option<Tensor>,
    options: Options,
    fallback: bool,
}

impl Arguments {
    /// # Safety
    /// As [`enter`]; the arguments are taken once.
    unsafe fn take(torch: &'static Torch, stack: *const Value) -> Self {
        // SAFETY: the schema has twelve arguments, of these types in this order.
        unsafe {
            let flag = |place| *stack.add(place) & 0xff != 0;
            let optional = |place| torch.take_optional(*stack.add(place));
            let [left, right] = [optional(8), optional(9)].map(|side| side.map(|keys| keys as i64));
            Self {
                query: torch.take_tensor(*stack),
                key: torch.take_tensor(*stack.add(1)),
                value: torch.take_tensor(*stack.add(2)),
                attn_mask: optional(3).map(|mask| torch.take_tensor(mask)),
                options: Options {
                    dropout_p: f64::from_bits(*stack.add(4)),
                    is_causal: flag(5),
                    scale: optional(6).map(f64::from_bits),
                    enable_gqa: flag(7),
                    window: (left.is_some() || right.is_some()).then_some((left, right)),
                    causal_align: if flag(10) { CausalAlign::BottomRight } else { CausalAlign::TopLeft },
                },
                fallback: flag(11),
            }
        }
    }

    fn call(&self, return_lse: bool) -> Result<TorchCall<'_>> {
        Ok(TorchCall {
            query: self.query.borrow().look(&QUERY)?,
            key: self.key.borrow().look(&KEY)?,
            value: self.value.borrow().look(&VALUE)?,
            attn_mask: self.attn_mask.as_ref().map(|mask| mask.borrow().look(&ATTN_MASK)).transpose()?,
            out: None,
            return_lse,
            options: self.options,
        })
    }

    /// The answer of torch's own SDPA to a call that was refused here, or the refusal.
    fn fall_through(&self, torch: &'static Torch, refusal: Failure) -> Result<Tensor> {
        let Self { query, key, value, options, .. } = self;
        let Some(reason) = elsewhere(options, &refusal, || self.call(false).ok()?.asked().ok()?.inputs().ok()) else {
            return Err(refusal);
        };
        log_fallback(&reason);
        let &Options { dropout_p, is_causal, scale, enable_gqa, .. } = options;
        let attn_mask = self.attn_mask.as_ref();
        let call = Sdpa { query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa };
        let result = torch.sdpa(&call, refusal)?;
        self.in_our_order(torch, result)
    }

    /// What was compiled against this operator expects its order of dimensions in memory.
    fn in_our_order(&self, torch: &'static Torch, result: Tensor) -> Result<Tensor> {
        let (Ok(query), Ok(found)) = (self.query.read(&QUERY), result.read(&OUT)) else { return Ok(result) };
        let strides = out_strides(&query, &found.shape);
        let first = MAX_RANK - found.rank;
        if (first..MAX_RANK).all(|dim| found.shape[dim] <= 1 || found.strides[dim] == strides[dim]) {
            return Ok(result);
        }
        let ordered = torch.empty(&found.shape[first..], &strides[first..], found.dtype, found.device)?;
        ordered.copy_from(&result)?;
        Ok(ordered)
    }
}
