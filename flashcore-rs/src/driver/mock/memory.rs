//! Memory of the mock: owned bytes behind made-up addresses, and who touched them when.
//!
//! Operations run when they are queued, but a device may run them in any order that streams, events and host waits
//! allow. So each operation carries a vector clock, and two conflicting accesses that no clock orders are a violation:
//! a sequence without violations gives the same bytes in every order that a device may choose.

use std::collections::BTreeMap;

/// How much of each stream's work is known to be done, by stream.
pub(super) type Clock = BTreeMap<u64, u64>;

/// Takes over what `other` knows.
pub(super) fn join(clock: &mut Clock, other: &Clock) {
    for (&stream, &time) in other {
        let mine = clock.entry(stream).or_default();
        *mine = time.max(*mine);
    }
}

/// An operation: its place on its stream, and what came before it.
#[derive(Clone, Debug)]
pub(super) struct Point {
    pub(super) stream: u64,
    pub(super) time: u64,
    pub(super) clock: Clock,
    pub(super) what: String,
}

/// Bytes on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) address: u64,
    pub(super) bytes: u64,
}

#[derive(Debug)]
struct Access {
    from: u64,
    to: u64,
    write: bool,
    stream: u64,
    time: u64,
    what: String,
}

#[derive(Debug, PartialEq, Eq)]
enum Life {
    Live,
    /// Allocated by a graph: there while the graph runs.
    Asleep,
    Freed,
}

#[derive(Debug)]
struct Allocation {
    ordinal: u32,
    bytes: Vec<u8>,
    len: usize,
    life: Life,
    accesses: Vec<Access>,
}

/// All memory of all devices. Addresses are never used twice, so that a stale one is noticed.
#[derive(Debug)]
pub(super) struct Memory {
    allocations: BTreeMap<u64, Allocation>,
    next: u64,
}

impl Default for Memory {
    fn default() -> Self {
        Self { allocations: BTreeMap::new(), next: 0x7000_0000_0000 }
    }
}

/// What fresh memory holds: NaN in every float type.
const UNINITIALISED: u8 = 0xff;

impl Memory {
    /// Reserves `len` bytes that are not there yet.
    pub(super) fn reserve(&mut self, ordinal: u32, len: usize) -> u64 {
        let address = self.next;
        // A gap, so that running off one end is not the start of the next.
        self.next += (len as u64).next_multiple_of(512) + 4096;
        let allocation = Allocation { ordinal, bytes: Vec::new(), len, life: Life::Asleep, accesses: Vec::new() };
        self.allocations.insert(address, allocation);
        address
    }

    /// Brings reserved memory into being, as an access that every later one must follow.
    pub(super) fn wake(&mut self, at: &Point, address: u64) {
        if let Some(allocation) = self.allocations.get_mut(&address) {
            allocation.bytes = vec![UNINITIALISED; allocation.len];
            allocation.life = Life::Live;
            allocation.accesses.clear();
            allocation.remember(at, address, address + allocation.len as u64, true);
        }
    }

    /// Ends the memory; `asleep` when a graph may wake it again.
    pub(super) fn free(&mut self, at: &Point, address: u64, asleep: bool) -> Result<(), String> {
        let Some(allocation) = self.allocations.get_mut(&address) else {
            return Err(format!("{}: {address:#x} was never allocated", at.what));
        };
        if allocation.life != Life::Live {
            return Err(format!("{}: {address:#x} is freed twice", at.what));
        }
        let ordered = allocation.check(at, address, address + allocation.len as u64, true);
        allocation.life = if asleep { Life::Asleep } else { Life::Freed };
        allocation.bytes = Vec::new();
        ordered
    }

    /// The bytes of a span, after checking that it is live, inside one allocation, and ordered after every conflicting
    /// access. An access out of order is reported by the second value and still made.
    pub(super) fn access(
        &mut self,
        at: &Point,
        ordinal: u32,
        span: Span,
        write: bool,
    ) -> Result<(&mut [u8], Result<(), String>), String> {
        let Span { address, bytes } = span;
        let (&start, allocation) =
            self.allocations.range_mut(..=address).next_back().ok_or_else(|| unmapped(at, span))?;
        let end = address.checked_add(bytes).ok_or_else(|| unmapped(at, span))?;
        if end > start + allocation.len as u64 {
            return Err(unmapped(at, span));
        }
        if allocation.life != Life::Live {
            return Err(format!("{}: {address:#x} is used after it was freed", at.what));
        }
        if allocation.ordinal != ordinal {
            return Err(format!("{}: {address:#x} is memory of device {}", at.what, allocation.ordinal));
        }
        let ordered = allocation.check(at, address, end, write);
        allocation.remember(at, address, end, write);
        let range = (address - start) as usize..(end - start) as usize;
        Ok((&mut allocation.bytes[range], ordered))
    }

    /// From `address` to the end of its allocation; `None` when it lies in no live one.
    pub(super) fn rest(&self, address: u64) -> Option<Span> {
        let (&start, allocation) = self.allocations.range(..=address).next_back()?;
        let end = start + allocation.len as u64;
        (allocation.life == Life::Live && address < end).then(|| Span { address, bytes: end - address })
    }

    /// Bytes in use on a device.
    pub(super) fn used(&self, ordinal: u32) -> usize {
        self.live().filter(|allocation| allocation.ordinal == ordinal).map(|allocation| allocation.len).sum()
    }

    /// Number of live allocations.
    pub(super) fn count(&self) -> usize {
        self.live().count()
    }

    /// Whether `address` is in memory of this device.
    pub(super) fn is_on(&self, address: u64, ordinal: u32) -> bool {
        self.allocations.range(..=address).next_back().is_some_and(|(_, allocation)| allocation.ordinal == ordinal)
    }

    fn live(&self) -> impl Iterator<Item = &Allocation> {
        self.allocations.values().filter(|allocation| allocation.life == Life::Live)
    }
}

fn unmapped(at: &Point, Span { address, bytes }: Span) -> String {
    format!("{}: {bytes} bytes at {address:#x} are not inside one allocation", at.what)
}

impl Allocation {
    fn check(&self, at: &Point, from: u64, to: u64, write: bool) -> Result<(), String> {
        let unordered = |access: &&Access| {
            access.from < to
                && from < access.to
                && (write || access.write)
                && at.clock.get(&access.stream).is_none_or(|&known| known < access.time)
        };
        match self.accesses.iter().find(unordered) {
            None => Ok(()),
            Some(access) => Err(format!("{} is not ordered after {}", at.what, access.what)),
        }
    }

    fn remember(&mut self, at: &Point, from: u64, to: u64, write: bool) {
        // What follows this access on the same stream follows those that it makes superfluous.
        self.accesses.retain(|old| old.stream != at.stream || (old.write && !write) || old.from < from || old.to > to);
        self.accesses.push(Access { from, to, write, stream: at.stream, time: at.time, what: at.what.clone() });
    }
}
