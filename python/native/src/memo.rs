//! Calls on a device that this thread made lately, ready to be made again.
//!
//! All but the addresses of a call decides what it means, which kernel answers it and what its results look like; with
//! the addresses, the arguments of the launch are decided too. Programs make the same calls over and over, and allocators
//! give the same memory again, so both are remembered. What is remembered holds no memory: a call is launched again only
//! for one that vouches for the same memory anew.

use std::cell::RefCell;
use std::rc::Rc;

use flashcore::Device;

use crate::asked::{Asked, Results};
use crate::call::ReadyCall;
use crate::errors::Result;
use crate::operand::Operand;

/// Calls by all but their addresses. A power of two.
const KINDS: usize = 32;
/// Calls ready to be launched: those of the layers of a model. A power of two.
const LAUNCHES: usize = 64;

/// A call without its addresses, and what is known of it.
pub(crate) struct Kind {
    asked: Asked,
    pub(crate) results: Results,
    /// No other kind of this thread ever has it.
    number: u64,
}

/// Where the tensors of a call are; 0 where there is none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Addresses([u64; 6]);

impl Addresses {
    pub(crate) fn of(asked: &Asked, out: &Operand, lse: Option<&Operand>) -> Self {
        let address = |operand: Option<&Operand>| operand.map_or(0, |operand| operand.address);
        let Asked { query, key, value, attn_mask, .. } = asked;
        Self([query.address, key.address, value.address, out.address, address(attn_mask.as_ref()), address(lse)])
    }
}

struct Launch {
    kind: u64,
    addresses: Addresses,
    call: ReadyCall,
}

struct Memo {
    kinds: [Option<Rc<Kind>>; KINDS],
    launches: [Option<Box<Launch>>; LAUNCHES],
    /// Kinds there have been.
    count: u64,
}

thread_local! {
    static MEMO: RefCell<Memo> =
        const { RefCell::new(Memo { kinds: [const { None }; KINDS], launches: [const { None }; LAUNCHES], count: 0 }) };
}

/// What this thread knows of calls like this one.
#[inline]
pub(crate) fn find(asked: &Asked) -> Option<Rc<Kind>> {
    if asked.query.device == Device::Cpu {
        return None;
    }
    MEMO.with_borrow(|memo| memo.kinds[place_of(asked)].as_ref().filter(|kind| kind.asked.is_like(asked)).cloned())
}

/// Remembers what the results of a call look like.
pub(crate) fn learn(asked: &Asked, results: Results) -> Rc<Kind> {
    MEMO.with_borrow_mut(|memo| {
        memo.count += 1;
        let kind = Rc::new(Kind { asked: *asked, results, number: memo.count });
        memo.kinds[place_of(asked)] = Some(kind.clone());
        kind
    })
}

/// Launches a call again; false if it was not made lately with these addresses.
///
/// # Safety
/// As [`crate::call::Call::run`], for memory at these addresses as large as the kind says.
#[expect(unsafe_code, reason = "memory that the caller vouches for")]
#[inline]
pub(crate) unsafe fn launch(kind: &Kind, addresses: &Addresses, stream: u64) -> Result<bool> {
    let place = addresses.place();
    // Taken out meanwhile: a logger, say, may call again.
    let taken = MEMO.with_borrow_mut(|memo| {
        memo.launches[place].take_if(|launch| launch.kind == kind.number && launch.addresses == *addresses)
    });
    let Some(mut launch) = taken else { return Ok(false) };
    // SAFETY: the call was prepared for these addresses and this kind; the rest is the caller's promise.
    unsafe { launch.call.launch(stream) }?;
    put(place, launch);
    Ok(true)
}

/// Remembers a call that was launched with these addresses.
pub(crate) fn keep(kind: &Kind, addresses: Addresses, call: ReadyCall) {
    put(addresses.place(), Box::new(Launch { kind: kind.number, addresses, call }));
}

fn put(place: usize, launch: Box<Launch>) {
    let old = MEMO.with_borrow_mut(|memo| memo.launches[place].replace(launch));
    drop(old);
}

impl Addresses {
    #[inline]
    fn place(&self) -> usize {
        mix(&self.0) % LAUNCHES
    }
}

#[inline]
fn place_of(asked: &Asked) -> usize {
    let Asked { query, key, options, out, return_lse, .. } = asked;
    let [.., batch, heads, seq, head_dim] = query.shape;
    let [.., heads_kv, seq_k, _] = key.shape;
    let flags = u64::from(options.is_causal) | u64::from(out.is_some()) << 1 | u64::from(*return_lse) << 2;
    let words = [batch, heads, seq, head_dim, heads_kv, seq_k].map(|size| size as u64);
    mix(&words).wrapping_add(flags as usize) % KINDS
}

/// Spreads words over the low bits.
#[inline]
fn mix(words: &[u64]) -> usize {
    let mixed = words.iter().fold(0u64, |hash, word| (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29));
    mixed as usize
}
