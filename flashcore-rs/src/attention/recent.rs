//! What this thread called with lately.
//!
//! Everything that does not depend on addresses is a function of the tensors' layouts and the options: whether the call
//! is well-formed, which kernel answers it, the plan. A thread remembers the last few, so that a call that looks like an
//! earlier one needs no hashing, no lock and no memory; only its addresses are checked.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use super::check::Checked;
use super::{Attention, AttentionOptions, BaseAlign, Plan};
use crate::tensor::{Device, Layout, TensorView, TensorViewMut};

/// A power of two.
const SLOTS: usize = 32;

/// A call without its addresses, and what was found out about it.
#[derive(Debug)]
pub(crate) struct Geometry {
    layouts: [Layout; 4],
    attn_mask: Option<Layout>,
    lse: Option<Layout>,
    options: AttentionOptions,
    pin: Option<u32>,
    align: BaseAlign,
    /// The runtime's number.
    runtime: u64,
    pub(crate) checked: Checked,
    /// `None` when there is nothing to do.
    pub(crate) plan: Option<Arc<Plan>>,
}

/// A call as this module looks at it.
pub(crate) struct Key<'a> {
    pub(crate) runtime: u64,
    pub(crate) call: &'a Attention<'a>,
    pub(crate) out: &'a TensorViewMut<'a>,
    pub(crate) lse: Option<&'a TensorViewMut<'a>>,
    pub(crate) align: BaseAlign,
}

impl Key<'_> {
    fn layouts(&self) -> [&Layout; 4] {
        [self.call.query.layout(), self.call.key.layout(), self.call.value.layout(), self.out.layout()]
    }

    fn slot(&self) -> usize {
        let [q, k, v, out] = self.layouts();
        let pin = self.call.pin.map_or(0, |index| 1 + u64::from(index));
        let options = u64::from(self.call.options.causal) | u64::from(self.align.0) << 1 | pin << 32;
        let words = [
            q.shape[0] as u64,
            q.shape[1] as u64,
            q.shape[2] as u64,
            q.shape[3] as u64,
            k.shape[1] as u64,
            k.shape[2] as u64,
            q.strides[2] as u64,
            v.strides[1] as u64,
            out.strides[1] as u64,
            options,
            self.runtime,
        ];
        let mixed =
            words.iter().fold(0u64, |hash, word| (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29));
        mixed as usize % SLOTS
    }

    fn is(&self, geometry: &Geometry) -> bool {
        geometry.runtime == self.runtime
            && geometry.align == self.align
            && geometry.pin == self.call.pin
            && geometry.layouts.each_ref() == self.layouts()
            && geometry.attn_mask.as_ref() == self.call.attn_mask.as_ref().map(TensorView::layout)
            && geometry.lse.as_ref() == self.lse.map(TensorViewMut::layout)
            && geometry.options == self.call.options
    }

    /// Whether everything is where the geometry was.
    fn is_on(&self, device: Device) -> bool {
        let call = self.call;
        let inputs = [Some(&call.query), Some(&call.key), Some(&call.value), call.attn_mask.as_ref()];
        let outputs = [Some(self.out), self.lse];
        inputs.into_iter().flatten().all(|view| view.device() == device)
            && outputs.into_iter().flatten().all(|view| view.device() == device)
    }

    /// What is to be remembered of a call that passed all checks.
    pub(crate) fn geometry(&self, checked: Checked, plan: Option<Arc<Plan>>) -> Rc<Geometry> {
        Rc::new(Geometry {
            layouts: self.layouts().map(|layout| *layout),
            attn_mask: self.call.attn_mask.as_ref().map(|mask| *mask.layout()),
            lse: self.lse.map(|lse| *lse.layout()),
            options: self.call.options,
            pin: self.call.pin,
            align: self.align,
            runtime: self.runtime,
            checked,
            plan,
        })
    }
}

#[derive(Default)]
struct Recent {
    slots: [Option<Rc<Geometry>>; SLOTS],
    last: Option<Rc<Geometry>>,
}

thread_local! {
    static RECENT: RefCell<Recent> = RefCell::default();
}

/// What this thread knows about a call.
pub(crate) fn find(key: &Key<'_>) -> Option<Rc<Geometry>> {
    RECENT.with_borrow(|recent| {
        let geometry = recent.slots[key.slot()].as_ref()?;
        (key.is(geometry) && key.is_on(geometry.checked.device)).then(|| geometry.clone())
    })
}

/// Remembers a call.
pub(crate) fn keep(key: &Key<'_>, geometry: &Rc<Geometry>) {
    // What was there is dropped outside: a plan's drop may be anybody's code.
    let old = RECENT.with_borrow_mut(|recent| recent.slots[key.slot()].replace(geometry.clone()));
    drop(old);
}

/// Notes that a call was made.
pub(crate) fn ran(geometry: &Rc<Geometry>) {
    let old = RECENT.with_borrow_mut(|recent| recent.last.replace(geometry.clone()));
    drop(old);
}

/// What a thread's last call ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastPlan {
    /// Where.
    pub device: Device,
    /// The kernel variant, `cpu` for the CPU backend, `none` when there was nothing to do.
    pub kernel: String,
    /// The call in words.
    pub request: String,
}

/// The plan of the last call that this thread made; `None` when it needed none.
#[cfg(feature = "validate")]
pub(crate) fn last_planned() -> Option<Arc<Plan>> {
    RECENT.with_borrow(|recent| recent.last.as_ref().and_then(|last| last.plan.clone()))
}

/// The last call that this thread made, whichever runtime it was on; `None` before the first. Launches of a
/// [`PreparedCall`](crate::PreparedCall) do not count.
pub fn last_plan() -> Option<LastPlan> {
    let last = RECENT.with_borrow(|recent| recent.last.clone())?;
    let Checked { device, problem, .. } = &last.checked;
    let kernel = match (&last.plan, device) {
        (Some(plan), _) => plan.variant(),
        (None, _) if problem.is_empty() => "none",
        (None, _) => "cpu",
    };
    Some(LastPlan { device: *device, kernel: kernel.to_owned(), request: problem.to_string() })
}
