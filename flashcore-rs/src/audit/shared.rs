//! Which writes to shared and local memory a read may see.

use std::ops::Range as Span;

use super::flow::{Flow, closure};
use super::opcodes::{Class, Space, Width};
use super::operand::Operand;
use super::parse::Section;
use super::range::{self, Base, INFINITE};

/// What is known about a kernel's use of shared memory from its manifest entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Threads of a block.
    pub threads: u32,
    /// Where the block's own shared memory starts: the bytes below are the system's.
    pub start: i64,
    /// Bytes from there on that hold tiles, if the compiler keeps its own variables behind them: an access whose address
    /// has no bound stays among the tiles.
    pub tile_bytes: Option<u32>,
}

/// One instruction that touches shared or local memory.
#[derive(Clone, Debug)]
struct Access {
    index: usize,
    local: bool,
    span: Span<i64>,
    reads: bool,
    writes: bool,
    /// An end of the span is not from the code but from the layout, or unknown.
    assumed: bool,
}

/// All accesses of a kernel, and which writes each read may see.
#[derive(Debug)]
pub struct Memory {
    accesses: Vec<Access>,
    by_index: Vec<Option<usize>>,
    /// For each access that reads: the writes it may see.
    seen_by: Vec<Vec<usize>>,
}

impl Memory {
    /// Collects and compares the accesses of a section.
    pub fn of(section: &Section, flow: &Flow, layout: Layout) -> Self {
        let addresses = range::addresses(section, flow, layout.threads);
        let mut accesses = Vec::new();
        let mut by_index = vec![None; section.instructions.len()];
        for (index, address) in addresses.into_iter().enumerate() {
            let Some(address) = address else { continue };
            by_index[index] = Some(accesses.len());
            accesses.push(Access::of(section, index, address, layout));
        }
        let order = Order::of(section);
        let seen_by = accesses.iter().map(|read| visible(read, &accesses, section, flow, &order)).collect();
        Self { accesses, by_index, seen_by }
    }

    /// The instructions whose writes the read at `index` may see.
    pub fn writes_seen_by(&self, index: usize) -> impl Iterator<Item = usize> + '_ {
        let access = self.by_index[index];
        access.into_iter().flat_map(|access| self.seen_by[access].iter().map(|&write| self.accesses[write].index))
    }

    /// Accesses of shared memory: all of them, and those whose place the code alone does not show.
    pub fn counts(&self) -> (usize, usize) {
        let shared = self.accesses.iter().filter(|access| !access.local);
        (shared.clone().count(), shared.filter(|access| access.assumed).count())
    }
}

impl Access {
    fn of(section: &Section, index: usize, address: range::Range, layout: Layout) -> Self {
        let instruction = &section.instructions[index];
        let class = instruction.opcode.class;
        let local = matches!(class, Class::Load(Space::Local) | Class::Store(Space::Local));
        let known = match address.base {
            Base::Stack => local,
            Base::Window | Base::Zero => !local,
            Base::Rank => false,
        };
        let (low, high) = if known { (address.low, address.high) } else { (-INFINITE, INFINITE) };
        let bulk = instruction.opcode.width == Width::Tma;
        let mut assumed = low == -INFINITE || high == INFINITE || bulk;
        let mut span = low..if bulk { INFINITE } else { high.saturating_add(bytes(section, index)) };
        if !local {
            let tiles_end = layout.tile_bytes.map_or(INFINITE, |bytes| layout.start + i64::from(bytes));
            span.start = if low == -INFINITE { layout.start } else { low };
            // What starts among the tiles stays there; what starts behind them is no access to a tile.
            if span.start < tiles_end && span.end > tiles_end {
                span.end = tiles_end;
                assumed = true;
            }
        }
        let reads = matches!(class, Class::Load(_) | Class::Atomic(_));
        Self { index, local, span, reads, writes: !matches!(class, Class::Load(_)), assumed }
    }

    fn meets(&self, other: &Self) -> bool {
        self.local == other.local && self.span.start < other.span.end && other.span.start < self.span.end
    }
}

/// Bytes that one thread touches.
fn bytes(section: &Section, index: usize) -> i64 {
    let instruction = &section.instructions[index];
    let has = |modifier| instruction.has(modifier);
    match instruction.opcode.width {
        // Each thread names a row of a matrix.
        Width::Matrices => 16,
        _ if has("128") => 16,
        _ if has("96") => 12,
        _ if has("64") => 8,
        _ if has("U8") || has("S8") => 1,
        _ if has("U16") || has("S16") => 2,
        _ => 4,
    }
}

fn visible(read: &Access, all: &[Access], section: &Section, flow: &Flow, order: &Order) -> Vec<usize> {
    if !read.reads {
        return Vec::new();
    }
    let may_precede = if read.assumed || read.local { None } else { order.before_or_beside(section, flow, read.index) };
    let seen = |write: &Access| {
        write.writes && write.meets(read) && may_precede.as_ref().is_none_or(|before| before[write.index])
    };
    all.iter().enumerate().filter(|(_, write)| seen(write)).map(|(index, _)| index).collect()
}

/// The order that barriers of the whole block give to what its threads do.
struct Order {
    /// Every barrier of the kernel is one that all threads of the block meet at, at the same instruction.
    usable: bool,
}

impl Order {
    /// Kernels that specialise their warps use named barriers, and their warps meet at different instructions.
    fn of(section: &Section) -> Self {
        let mut barriers = section.instructions.iter().filter(|instruction| instruction.opcode.name == "BAR");
        let plain = |operands: &[Operand]| matches!(operands, [Operand::Integer(0)]);
        Self { usable: barriers.all(|barrier| barrier.has("SYNC") && plain(&barrier.operands)) }
    }

    /// The instructions that some thread may have executed when another executes `index`: those from which it can be
    /// reached, and those that share a stretch between two barriers with it. `None` if barriers do not tell.
    fn before_or_beside(&self, section: &Section, flow: &Flow, index: usize) -> Option<Vec<bool>> {
        if !self.usable {
            return None;
        }
        let count = section.instructions.len();
        let next = flow.steps();
        let mut back = vec![Vec::new(); count];
        for (from, followers) in next.iter().enumerate() {
            followers.iter().for_each(|&to| back[to].push(from));
        }
        let is_barrier = |at: usize| section.instructions[at].opcode.name == "BAR";
        let mut before = closure(&back, &[index], |_| false);
        // The starts of the stretches that `index` lies in: barriers, and the entry.
        let stretch = closure(&back, &[index], |at| at != index && is_barrier(at));
        let at_start = |at: &usize| stretch[*at] && (*at == 0 || back[*at].iter().any(|&from| is_barrier(from)));
        let starts: Vec<usize> = (0..count).filter(at_start).collect();
        let beside = closure(&next, &starts, is_barrier);
        before.iter_mut().zip(beside).for_each(|(before, beside)| *before |= beside);
        before[index] = true;
        Some(before)
    }
}
