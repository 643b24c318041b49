//! What this thread called with lately.
//!
//! Everything that does not depend on addresses is a function of the tensors' layouts and the options: whether the call
//! is well-formed, which kernel answers it, the plan. A thread remembers the last few, so that a call that looks like an
//! earlier one needs no hashing, no lock and no memory. It remembers the arguments of the last launch too: only
//! addresses that have changed are checked, and put in their places.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::check::{Checked, Operands};
use super::plan::Placed;
use super::{Attention, AttentionOptions, BaseAlign, Plan};
use crate::tensor::{Device, Layout, TensorView, TensorViewMut};

/// A power of two.
const SLOTS: usize = 32;

/// A call without its addresses, and what was found out about it.
pub(crate) struct Geometry {
    layouts: [Layout; 4],
    attn_mask: Option<Layout>,
    lse: Option<Layout>,
    options: AttentionOptions,
    pin: Option<u32>,
    align: BaseAlign,
    /// The runtime's number.
    runtime: u64,
    pub(crate) settled: Arc<Settled>,
    /// The arguments of the last call, whose addresses passed the checks; taken out while a call uses them.
    placed: Cell<Option<Box<Placed>>>,
}

impl Geometry {
    /// Arguments for a call, to be given back with [`Geometry::give_back`].
    #[inline]
    pub(crate) fn take_arguments(&self) -> Box<Placed> {
        self.placed
            .take()
            .unwrap_or_else(|| Box::new(self.settled.plan.as_deref().map(Plan::unplaced).unwrap_or_default()))
    }

    #[inline]
    pub(crate) fn give_back(&self, arguments: Box<Placed>) {
        self.placed.set(Some(arguments));
    }
}

/// What was found out about a call.
#[derive(Debug)]
pub(crate) struct Settled {
    pub(crate) checked: Checked,
    /// `None` on the CPU, and when there is nothing to do.
    pub(crate) plan: Option<Arc<Plan>>,
}

impl Settled {
    fn kernel(&self) -> &str {
        match &self.plan {
            Some(plan) => plan.variant(),
            None if self.checked.problem.is_empty() => "none",
            None => "cpu",
        }
    }

    /// Says in the log that the call is made.
    #[inline]
    pub(crate) fn announce(&self) {
        log::info!("{} runs {}", self.checked.problem, self.kernel());
    }
}

/// A call as this module looks at it.
pub(crate) struct Key<'a> {
    pub(crate) runtime: u64,
    pub(crate) call: &'a Attention<'a, 'a>,
    pub(crate) out: &'a TensorViewMut<'a>,
    pub(crate) lse: Option<&'a TensorViewMut<'a>>,
    pub(crate) align: BaseAlign,
}

impl Key<'_> {
    fn layouts(&self) -> [&Layout; 4] {
        let Operands { query, key, value, .. } = &self.call.operands;
        [query.layout(), key.layout(), value.layout(), self.out.layout()]
    }

    fn slot(&self) -> usize {
        let [q, k, v, out] = self.layouts();
        let pin = self.call.pin.map_or(0, |index| 1 + u64::from(index));
        let options = u64::from(self.call.options.causal) | u64::from(self.align.0) << 1 | pin << 32;
        // Multiply-shift hashing (Dietzfelbinger et al. 1997, "A reliable randomized algorithm for the closest-pair
        // problem"): each word times an odd number of its own, so that no product waits for another.
        let terms = [
            (q.shape[0] as u64, 0x9e37_79b9_7f4a_7c15_u64),
            (q.shape[1] as u64, 0xbf58_476d_1ce4_e5b9),
            (q.shape[2] as u64, 0x94d0_49bb_1331_11eb),
            (q.shape[3] as u64, 0xd6e8_feb8_6659_fd93),
            (k.shape[1] as u64, 0xa076_1d64_78bd_642f),
            (k.shape[2] as u64, 0xe703_7ed1_a0b4_28db),
            (q.strides[2] as u64, 0x8ebc_6af0_9c88_c6e3),
            (v.strides[1] as u64, 0x5899_65cc_7537_4cc3),
            (out.strides[1] as u64, 0x1d8e_4e27_c47d_124f),
            (options, 0xeb44_acca_b455_d165),
            (self.runtime, 0x9e6c_63d0_676a_9a99),
        ];
        let mixed = terms.iter().fold(0u64, |sum, (word, factor)| sum.wrapping_add(word.wrapping_mul(*factor)));
        (mixed >> (u64::BITS - SLOTS.ilog2())) as usize
    }

    fn is(&self, geometry: &Geometry) -> bool {
        geometry.runtime == self.runtime
            && geometry.align == self.align
            && geometry.pin == self.call.pin
            && geometry.layouts.each_ref() == self.layouts()
            && geometry.attn_mask.as_ref() == self.call.operands.attn_mask.as_ref().map(TensorView::layout)
            && geometry.lse.as_ref() == self.lse.map(TensorViewMut::layout)
            && geometry.options == self.call.options
    }

    /// Whether everything is where the geometry was.
    fn is_on(&self, device: Device) -> bool {
        let Operands { query, key, value, attn_mask } = &self.call.operands;
        query.device() == device
            && key.device() == device
            && value.device() == device
            && self.out.device() == device
            && attn_mask.as_ref().is_none_or(|mask| mask.device() == device)
            && self.lse.is_none_or(|lse| lse.device() == device)
    }

    /// What is to be remembered of a call that passed all checks.
    pub(crate) fn geometry(&self, checked: Checked, plan: Option<Arc<Plan>>) -> Rc<Geometry> {
        Rc::new(Geometry {
            layouts: self.layouts().map(|layout| *layout),
            attn_mask: self.call.operands.attn_mask.as_ref().map(|mask| *mask.layout()),
            lse: self.lse.map(|lse| *lse.layout()),
            options: self.call.options,
            pin: self.call.pin,
            align: self.align,
            runtime: self.runtime,
            settled: Arc::new(Settled { checked, plan }),
            placed: Cell::default(),
        })
    }
}

struct Recent {
    slots: [Option<Rc<Geometry>>; SLOTS],
    last: Option<Arc<Settled>>,
}

thread_local! {
    static RECENT: RefCell<Recent> = const { RefCell::new(Recent { slots: [const { None }; SLOTS], last: None }) };
}

/// What this thread knows about a call. A thread that ends knows nothing.
#[inline]
pub(crate) fn find(key: &Key<'_>) -> Option<Rc<Geometry>> {
    let find = |recent: &RefCell<Recent>| {
        let recent = recent.borrow();
        let geometry = recent.slots[key.slot()].as_ref()?;
        (key.is(geometry) && key.is_on(geometry.settled.checked.device)).then(|| geometry.clone())
    };
    RECENT.try_with(find).ok().flatten()
}

/// Remembers a call.
pub(crate) fn keep(key: &Key<'_>, geometry: &Rc<Geometry>) {
    // What was there is dropped outside: a plan's drop may be anybody's code.
    let keep = |recent: &RefCell<Recent>| recent.borrow_mut().slots[key.slot()].replace(geometry.clone());
    drop(RECENT.try_with(keep));
}

/// Notes that a call was made.
#[inline]
pub(crate) fn ran(settled: &Arc<Settled>) {
    let is_last = |last: &Option<Arc<Settled>>| last.as_ref().is_some_and(|last| Arc::ptr_eq(last, settled));
    let note = |recent: &RefCell<Recent>| {
        let noted = is_last(&recent.borrow().last);
        if noted { None } else { recent.borrow_mut().last.replace(settled.clone()) }
    };
    drop(RECENT.try_with(note));
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

fn last() -> Option<Arc<Settled>> {
    RECENT.try_with(|recent| recent.borrow().last.clone()).ok().flatten()
}

/// The plan of the last call that this thread made; `None` when it needed none.
#[cfg(feature = "validate")]
pub(crate) fn last_planned() -> Option<Arc<Plan>> {
    last().and_then(|last| last.plan.clone())
}

/// The last call that this thread made, whichever runtime it was on, launches of a
/// [`PreparedCall`](crate::PreparedCall) among them; `None` before the first.
pub fn last_plan() -> Option<LastPlan> {
    let last = last()?;
    let Checked { device, problem, .. } = &last.checked;
    Some(LastPlan { device: *device, kernel: last.kernel().to_owned(), request: problem.to_string() })
}
