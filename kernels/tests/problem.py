"""Attention problems for tests: inputs surrounded by poison, the fp64 oracle, and what eager attention gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

Array = NDArray[Any]

FAR = 1 << 29  # a bound of a band that bounds nothing
CANARY = 31234.0  # what surrounds an output
MASK_DTYPES: dict[str, np.dtype[Any]] = {
    "bool": np.dtype(np.uint8),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
}


@dataclass(frozen=True)
class Problem:
    """One call of attention in float16. `mask_dims`: the axes (batch, head, query, key) the mask does not broadcast."""

    seq_q: int = 40
    seq_k: int = 50
    head_dim_qk: int = 32
    head_dim_v: int = 32
    batch: int = 1
    num_heads_q: int = 2
    num_heads_kv: int = 1
    scale: float = 0.2
    band: tuple[int, int] | None = None
    mask: str = "none"
    mask_dims: tuple[int, ...] = (0, 1, 2, 3)
    mask_step: int = 1  # elements from key to key
    layout: str = "bhsd"
    alignment: str = "unaligned"
    lse: bool = True

    @property
    def group(self) -> int:
        return self.num_heads_q // self.num_heads_kv

    def shape(self, tensor: str) -> tuple[int, int, int, int]:
        heads = self.num_heads_q if tensor in ("q", "out") else self.num_heads_kv
        seq = self.seq_q if tensor in ("q", "out") else self.seq_k
        return self.batch, heads, seq, self.head_dim_qk if tensor in ("q", "k") else self.head_dim_v


def poisoned(shape: tuple[int, ...], layout: str, alignment: str, poison: float) -> tuple[Array, Array]:
    """A buffer full of poison and, somewhere inside, a view of `shape` that touches at most one edge of each gap.

    Strides and base are multiples of 8 elements, or odd where the layout is unaligned.
    """
    step = 1 if alignment == "unaligned" else 8
    gap = 1 if alignment == "unaligned" else 8
    order = [layout.index(axis) for axis in "bhsd"]
    strides = [0, 0, 0, 1]
    stride = -(-(shape[3] + gap) // step) * step
    for place in (2, 1, 0):
        axis = order.index(place)
        strides[axis] = stride
        stride = stride * max(shape[axis], 1) + gap
    buffer = np.full(stride + 128, poison, np.float16)
    base = (-buffer.ctypes.data // 2) % 8 + (3 if alignment == "unaligned" else 8)
    view = as_strided(buffer[base:], shape, [2 * s for s in strides])
    return buffer, view


def mask_of(problem: Problem, rng: np.random.Generator) -> Array | None:
    """The mask, broadcast to (batch, num_heads_q, seq_q, seq_k) by zero strides; some rows have no visible key."""
    if problem.mask == "none":
        return None
    full = (problem.batch, problem.num_heads_q, problem.seq_q, problem.seq_k)
    stored = [size if axis in problem.mask_dims else 1 for axis, size in enumerate(full)]
    stored[3] = stored[3] * problem.mask_step if 3 in problem.mask_dims else 1
    values: Array
    if problem.mask == "bool":
        values = rng.random(stored) < 0.6
        values[..., stored[2] // 2, :] = stored[2] == 1
    else:
        values = rng.standard_normal(stored)
        values[rng.random(stored) < 0.2] = -np.inf
        values[..., stored[2] // 2, :] = -np.inf if stored[2] > 1 else 0.5
    stored_mask: Array = np.ascontiguousarray(values.astype(MASK_DTYPES[problem.mask]))
    return np.broadcast_to(stored_mask[..., :: problem.mask_step] if 3 in problem.mask_dims else stored_mask, full)


def inputs(problem: Problem, seed: int = 0) -> dict[str, Array]:
    """q, k, v (views into poisoned buffers) and the mask if there is one."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in ("q", "k", "v"):
        _, view = poisoned(problem.shape(name), problem.layout, problem.alignment, np.nan)
        view[...] = rng.standard_normal(problem.shape(name))
        tensors[name] = view
    if (mask := mask_of(problem, rng)) is not None:
        tensors["attn_mask"] = mask
    return tensors


def visible(problem: Problem, tensors: dict[str, Array]) -> NDArray[np.bool_]:
    """Which keys each row sees, by the band and a boolean mask."""
    i, j = np.arange(problem.seq_q)[:, None], np.arange(problem.seq_k)[None, :]
    lo, hi = problem.band or (-FAR, FAR)
    seen: Array = np.broadcast_to((i + lo <= j) & (j <= i + hi), (problem.batch, problem.num_heads_q, *(i + j).shape))
    return seen & (tensors["attn_mask"] != 0) if problem.mask == "bool" else seen


def attend(problem: Problem, tensors: dict[str, Array], dtype: Any) -> tuple[Array, Array]:
    """Attention in one precision: float64 is the oracle; float32, with the weights and the output rounded to float16,
    is what an eager implementation gives. Rows that see nothing get 0 and -inf."""
    q, k, v = (np.asarray(tensors[name], dtype) for name in ("q", "k", "v"))
    k, v = np.repeat(k, problem.group, 1), np.repeat(v, problem.group, 1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        scores = np.einsum("bhid,bhjd->bhij", q, k) * dtype(problem.scale)
        if problem.mask in ("f16", "f32"):
            scores = scores + np.asarray(tensors["attn_mask"], dtype)
        scores = np.where(visible(problem, tensors), scores, -np.inf)
        peak = scores.max(-1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isneginf(peak), 0, peak))
        total = weights.sum(-1, keepdims=True)
        lse = np.where(total == 0, -np.inf, peak + np.log(total))[..., 0]
        weights = weights / np.where(total == 0, 1, total)
        if dtype is np.float32:
            weights = weights.astype(np.float16).astype(np.float32)
        out = np.einsum("bhij,bhjd->bhid", weights, v)
    return (out.astype(np.float16) if dtype is np.float32 else out), lse


def tolerance(problem: Problem, tensors: dict[str, Array], exact: Array) -> float:
    """1.5 times the error of eager attention, and one unit in the last place of the output."""
    eager, _ = attend(problem, tensors, np.float32)
    error = np.abs(eager.astype(np.float64) - exact).max(initial=0.0)
    largest = np.abs(exact).max(initial=0.0)
    return 1.5 * float(error) + math.ulp(float(largest)) * 2**42  # float16 has 42 bits fewer than float64
