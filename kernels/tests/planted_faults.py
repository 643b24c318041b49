"""Faults for compute-sanitizer to find: a proof that a clean report of the Hopper forward means something.

A fault is a list of edits of the text of `kernels/forward_hopper.py`. Nothing here ships. To use one, apply it to a
copy of `kernels/`, build the bundle there, and run a forward with `lse` requested under the tool: it must report the
finding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kernels.edits import Edit, edited, swap

SOURCE = Path(__file__).parents[1] / "forward_hopper.py"


@dataclass(frozen=True)
class PlantedFault:
    """`tool`: of compute-sanitizer. `finding`: what it is expected to say."""

    name: str
    tool: str
    finding: str
    edits: tuple[Edit, ...]


LSE_STORE = "gl.store(lse + head.to(gl.int64) * p.seq_len_q + rows, value, mask=rows < p.seq_len_q)"
LSE_LOAD = "gl.load(lse + head.to(gl.int64) * p.seq_len_q + rows, mask=rows < p.seq_len_q, other=0.0)"

FAULTS = (
    # 64 TiB beyond the tensor, so that no neighbouring allocation can take it.
    PlantedFault(
        "out_of_bounds_store",
        "memcheck",
        "Invalid __global__ write of size 4 bytes",
        (swap("gl.store(lse + head.to(gl.int64) * p.seq_len_q", "gl.store(lse + (head.to(gl.int64) + 2**44)"),),
    ),
    # The last head's rows beyond seq_len_q: needs a seq_len_q that is no multiple of 128 and an allocation that ends
    # with the log-sum-exp.
    PlantedFault(
        "missing_store_mask",
        "memcheck",
        "Invalid __global__ write of size 4 bytes",
        (swap(LSE_STORE, LSE_STORE.replace(", mask=rows < p.seq_len_q", "")),),
    ),
    # Half of each warp does not reach the barrier. The hardware counts warps, so the kernel still ends.
    PlantedFault(
        "divergent_barrier",
        "synccheck",
        "Divergent thread(s) in warp",
        (
            swap(
                'gl.inline_asm("bar.sync 8, 256;")',
                'gl.inline_asm("{ .reg .pred p; .reg .b32 lane; mov.u32 lane, %laneid; setp.lt.u32 p, lane, 16;'
                ' @p bar.sync 8, 256; }")',
            ),
        ),
    ),
    # The barriers of the rings are used as the memory happens to be. May hang: run it with a time limit.
    PlantedFault(
        "uninitialised_mbarrier",
        "synccheck",
        "Missing init",
        (swap("        mbarrier.init(full.index(stage), count=1)\n", ""),),
    ),
    # Needs a log-sum-exp that nobody has filled.
    PlantedFault(
        "uninitialised_read",
        "initcheck",
        "Uninitialized __global__ memory read of size 4 bytes",
        (
            swap(
                LSE_STORE,
                f"old = {LSE_LOAD}; {LSE_STORE.replace('value', 'gl.where(old == 0.5, old, value)')}",
            ),
        ),
    ),
)


def planted_sources() -> Iterator[tuple[PlantedFault, str]]:
    """Every fault, and the text of the kernel with it."""
    source = SOURCE.read_text()
    return ((fault, edited(source, fault.edits)) for fault in FAULTS)
