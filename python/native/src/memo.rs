//! Calls on a device that this thread made lately, ready to be made again.
//!
//! All but the addresses of a call decides what it means, which kernel answers it and what its results look like; with
//! the addresses, the arguments of the launch are decided too. Programs make the same calls over and over, and allocators
//! give the same memory again, so both are remembered: a kind of call at once, its launch once a call is made for the
//! second time. What is remembered holds no memory: a call is launched again only for one that vouches for the same
//! memory anew.

use std::cell::RefCell;
use std::rc::Rc;

use crate::asked::{Results, TorchCall};
use crate::call::ReadyCall;
use crate::errors::Result;
use crate::operand::MAX_RANK;
use crate::sdpa::Options;
use crate::shim::Look;

/// Places for calls by all but their addresses. A power of two, as the next.
const KINDS: usize = 64;
/// Places for calls to be launched again: many more than a model has layers, so that few meet at one place.
const LAUNCHES: usize = 256;

/// A call without its addresses, and what is known of it.
pub(crate) struct Kind {
    query: Outline,
    key: Outline,
    value: Outline,
    attn_mask: Option<Outline>,
    out: Option<Outline>,
    return_lse: bool,
    options: Options,
    pub(crate) results: Results,
    place: usize,
}

/// A tensor without its address.
struct Outline {
    rank: usize,
    sizes: [i64; MAX_RANK],
    strides: [i64; MAX_RANK],
    numbers: [i32; 3],
}

impl Outline {
    /// Of a tensor that was read as an operand, and so has no more dimensions than that.
    fn of(look: &Look<'_>) -> Self {
        let (mut sizes, mut strides) = ([0; MAX_RANK], [0; MAX_RANK]);
        let rank = look.sizes.len().min(MAX_RANK);
        sizes[..rank].copy_from_slice(&look.sizes[..rank]);
        strides[..rank].copy_from_slice(&look.strides[..rank]);
        Self { rank, sizes, strides, numbers: look.numbers() }
    }

    #[inline]
    fn is_of(&self, look: &Look<'_>) -> bool {
        // In place: to compare so few numbers by `memcmp` takes longer.
        let same = |ours: &[i64; MAX_RANK], theirs: &[i64]| theirs.iter().zip(ours).all(|(one, other)| one == other);
        look.sizes.len() == self.rank
            && look.strides.len() == self.rank
            && same(&self.sizes, look.sizes)
            && same(&self.strides, look.strides)
            && look.numbers() == self.numbers
    }
}

impl Kind {
    #[inline]
    fn is_of(&self, call: &TorchCall<'_>) -> bool {
        let both = |outline: &Option<Outline>, look: &Option<Look<'_>>| match (outline, look) {
            (Some(outline), Some(look)) => outline.is_of(look),
            (outline, look) => outline.is_none() && look.is_none(),
        };
        self.query.is_of(&call.query)
            && self.key.is_of(&call.key)
            && self.value.is_of(&call.value)
            && both(&self.attn_mask, &call.attn_mask)
            && both(&self.out, &call.out)
            && self.return_lse == call.return_lse
            && self.options == call.options
    }
}

/// Where the tensors of a call are; 0 where there is none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Addresses {
    words: [u64; 6],
}

impl Addresses {
    #[inline]
    pub(crate) fn of(call: &TorchCall<'_>, out: u64, lse: u64) -> Self {
        let attn_mask = call.attn_mask.map_or(0, |mask| mask.address);
        Self { words: [call.query.address, call.key.address, call.value.address, out, attn_mask, lse] }
    }

    /// Of the output.
    pub(crate) fn out(&self) -> u64 {
        self.words[3]
    }

    /// Of the log-sum-exp.
    pub(crate) fn lse(&self) -> u64 {
        self.words[5]
    }

    #[inline]
    fn place(&self) -> usize {
        mix(self.words) % LAUNCHES
    }
}

/// A call that was made.
struct Launch {
    kind: Rc<Kind>,
    addresses: Addresses,
    /// `None` when it was made once.
    call: Option<RefCell<ReadyCall>>,
}

/// What became of a call that may have been made before.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    /// It was launched.
    Launched,
    /// It was made once.
    Once,
    /// It was not made lately.
    New,
}

struct Memo {
    kinds: [Option<Rc<Kind>>; KINDS],
    launches: [Option<Rc<Launch>>; LAUNCHES],
}

thread_local! {
    static MEMO: RefCell<Memo> =
        const { RefCell::new(Memo { kinds: [const { None }; KINDS], launches: [const { None }; LAUNCHES] }) };
}

/// What this thread knows of calls like this one.
#[inline]
pub(crate) fn find(call: &TorchCall<'_>) -> Option<Rc<Kind>> {
    MEMO.with_borrow(|memo| memo.kinds[place_of(call)].as_ref().filter(|kind| kind.is_of(call)).cloned())
}

impl Kind {
    /// A kind of its own, of which nothing is remembered yet.
    pub(crate) fn new(call: &TorchCall<'_>, results: Results) -> Rc<Self> {
        Rc::new(Self {
            query: Outline::of(&call.query),
            key: Outline::of(&call.key),
            value: Outline::of(&call.value),
            attn_mask: call.attn_mask.as_ref().map(Outline::of),
            out: call.out.as_ref().map(Outline::of),
            return_lse: call.return_lse,
            options: call.options,
            results,
            place: place_of(call),
        })
    }
}

/// Launches a call again, if it is ready for that.
///
/// # Safety
/// As [`crate::call::Call::run`], for memory at these addresses as large as the kind says.
#[expect(unsafe_code, reason = "memory that the caller vouches for")]
#[inline]
pub(crate) unsafe fn launch(kind: &Rc<Kind>, addresses: &Addresses, stream: u64) -> Result<Again> {
    let made = MEMO.with_borrow(|memo| {
        let launch = memo.launches[addresses.place()].as_ref();
        launch.filter(|launch| Rc::ptr_eq(&launch.kind, kind) && launch.addresses == *addresses).cloned()
    });
    let Some(launch) = made else { return Ok(Again::New) };
    let Some(call) = &launch.call else { return Ok(Again::Once) };
    // In use already: a logger, say, that calls again.
    let Ok(mut call) = call.try_borrow_mut() else { return Ok(Again::New) };
    // SAFETY: the call was prepared for these addresses and this kind; the rest is the caller's promise.
    unsafe { call.launch(stream) }?;
    Ok(Again::Launched)
}

/// Remembers that a call was made, and how to make it again.
pub(crate) fn keep(kind: Rc<Kind>, addresses: Addresses, call: Option<ReadyCall>) {
    let launch = Rc::new(Launch { kind: kind.clone(), addresses, call: call.map(RefCell::new) });
    let old = MEMO.with_borrow_mut(|memo| {
        let place = kind.place;
        (memo.launches[addresses.place()].replace(launch), memo.kinds[place].replace(kind))
    });
    drop(old);
}

#[inline]
fn place_of(call: &TorchCall<'_>) -> usize {
    let TorchCall { query, key, attn_mask, out, return_lse, options, .. } = call;
    let flags = [options.is_causal, attn_mask.is_some(), out.is_some(), *return_lse, options.enable_gqa];
    let flags = flags.iter().fold(0, |flags, &flag| flags << 1 | u64::from(flag));
    let side = |side: Option<i64>| side.map_or(0, |keys| keys.wrapping_add(1) as u64);
    let (left, right) = options.window.unwrap_or_default();
    let [scalar, ..] = query.numbers();
    let words = [flags, side(left), side(right), scalar as u64];
    let layout = query.sizes.iter().chain(query.strides).chain(key.sizes).map(|&number| number as u64);
    mix(layout.chain(words)) % KINDS
}

/// Spreads words over the low bits. Multiply-shift hashing (Dietzfelbinger et al. 1997, "A reliable randomized algorithm
/// for the closest-pair problem"): each word times an odd number of its own, so that no product waits for another.
#[inline]
fn mix(words: impl IntoIterator<Item = u64>) -> usize {
    const FIRST: u64 = 0x9e37_79b9_7f4a_7c15;
    const STEP: u64 = 0xbf58_476d_1ce4_e5b8;
    let term = |(place, word): (u64, u64)| word.wrapping_mul(STEP.wrapping_mul(place).wrapping_add(FIRST));
    let sum = (0..).zip(words).map(term).fold(0, u64::wrapping_add);
    (sum >> 48) as usize
}
