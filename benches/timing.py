"""Device time by events, as the benchmarks take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def timed(work: Callable[[], Any]) -> float:
    """Milliseconds from the start to the end of what `work` queues on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def replay(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of a replay, without host time: one before it keeps the device busy until the second is queued, and
    brings clocks and caches to its state.
    """
    graph.replay()
    return timed(graph.replay)
