"""The Hopper forward on the emulator: numbers against an fp64 oracle, and planted faults that must be noticed."""

from __future__ import annotations

import heapq
import inspect
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kernels import compile, emulator, specs
from kernels.edits import Edit, drop, edited, insert, move, swap
from kernels.tests.planted_faults import planted_sources

KERNELS = Path(__file__).parents[1]
SOURCE = (KERNELS / "forward_hopper.py").read_text()
DTYPES = {"f16": emulator.FLOAT16, "bf16": emulator.BFLOAT16}
FAR = 1 << 29  # a bound of a band that is no bound


@dataclass(frozen=True)
class Case:
    """A problem, and the build and the grid that answer it. The default tiles are small, to have many of them."""

    heads: tuple[int, int, int] = (1, 2, 1)  # batch, num_heads_q, num_heads_kv
    seq: tuple[int, int] = (70, 90)
    head_dim: tuple[int, int] = (16, 16)  # of query and key, of value
    band: tuple[int, int] | None = None
    dtype: str = "bf16"
    scale: float = 0.3
    rows: int = 16
    keys: int = 16
    tile_dim: int = 16
    stages: int = 2
    consumers: int = 2
    queries: int = 2
    held: int = 0
    out_columns: int | None = None  # of the output's blocks, fewer than tile_dim
    ctas: int | None = None  # fewer than tiles
    lse: bool = True
    splits: int | None = None

    @property
    def tiles_query(self) -> int:
        return -(-self.seq[0] // (self.consumers * self.rows))

    @property
    def num_tiles(self) -> int:
        return self.tiles_query * self.heads[0] * self.heads[1]

    def causal(self, bottom_right: bool = False) -> Case:
        return replace(self, band=(-FAR, self.seq[1] - self.seq[0] if bottom_right else 0))


def inputs(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    (batch, heads_q, heads_kv), (seq_q, seq_k), (dim_qk, dim_v) = case.heads, case.seq, case.head_dim
    shapes = ((batch, heads_q, seq_q, dim_qk), (batch, heads_kv, seq_k, dim_qk), (batch, heads_kv, seq_k, dim_v))
    q, k, v = (DTYPES[case.dtype].round(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)
    return q, k, v


def visible(case: Case) -> np.ndarray:
    i, j = np.arange(case.seq[0])[:, None], np.arange(case.seq[1])[None, :]
    lo, hi = case.band or (-FAR, FAR)
    return (i + lo <= j) & (j <= i + hi)


def oracle(
    case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, precision: type = np.float64
) -> tuple[np.ndarray, np.ndarray]:
    """Attention and its log-sum-exp in `precision`; for float32, P and the output are rounded to the input dtype."""
    group = case.heads[1] // case.heads[2]
    k, v = (np.repeat(x, group, 1).astype(precision) for x in (k, v))
    rounded = DTYPES[case.dtype].round if precision is np.float32 else np.asarray
    with np.errstate(all="ignore"):
        scores = q.astype(precision) @ k.swapaxes(2, 3) * precision(case.scale)
        scores = np.where(visible(case), scores, -np.inf)
        peak = scores.max(-1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isneginf(peak), 0, peak))
        total = weights.sum(-1, keepdims=True)
        lse = np.where(total == 0, -np.inf, peak + np.log(total))
        out = rounded(rounded(weights / np.where(total == 0, 1, total)) @ v)
    return out, lse[..., 0]


def attention(
    kernel: emulator.Kernel, case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, schedule: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    dtype = DTYPES[case.dtype]
    _, heads_q, heads_kv = case.heads
    out = np.full((*q.shape[:3], v.shape[3]), np.nan, np.float32)
    lse = np.full(out[..., 0].size, np.nan, np.float32)
    splits = case.splits or 1
    partial = np.full(out[..., 0].size * splits * (case.tile_dim + 1), np.nan, np.float32)
    rows, keys = (1, 1, case.rows, case.tile_dim), (1, 1, case.keys, case.tile_dim)
    quantities = {
        "num_tiles": case.num_tiles,
        "tiles_query": case.tiles_query,
        "num_heads_q": heads_q,
        "group": heads_q // heads_kv,
        "seq_len_q": case.seq[0],
        "seq_len_k": case.seq[1],
        "scale_log2": case.scale / math.log(2),
    }
    quantities |= dict(zip(("band_lo", "band_hi"), case.band, strict=True)) if case.band else {}
    quantities |= {"splits": splits} if case.splits else {}
    values = {name: emulator.scalar(value) for name, value in quantities.items()}
    values |= {} if case.band else {"band_lo": 0, "band_hi": 0}
    values |= {} if case.splits else {"splits": 1}
    values |= {
        "q": emulator.Descriptor(q, rows, dtype),
        "k": emulator.Descriptor(k, keys, dtype),
        "v": emulator.Descriptor(v, keys, dtype),
        "out": emulator.Descriptor(out, (1, 1, case.rows, case.out_columns or case.tile_dim), dtype),
        "lse": emulator.Pointer(partial if case.splits else lse if case.lse else None),
        "BAND": case.band is not None,
        "SPLIT": case.splits is not None,
        "CONSUMERS": case.consumers,
        "STAGES": case.stages,
        "QUERIES": case.queries,
        "HELD": case.held,
    }
    tiles = case.num_tiles * splits
    arguments = [values[name] for name in inspect.signature(kernel).parameters]
    emulator.launch(kernel, min(case.ctas or tiles, tiles), arguments, seed=schedule)
    if case.splits:
        return combine(case, partial)
    return out, lse.reshape(out.shape[:3])


def combine(case: Case, partial: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `kernels/combine.py` makes of the parts."""
    shape = (*case.heads[:2], case.splits or 1, case.seq[0])
    sums = partial[math.prod(shape) * case.tile_dim :].reshape(shape)
    parts = partial[: math.prod(shape) * case.tile_dim].reshape(*shape, case.tile_dim)
    with np.errstate(divide="ignore"):
        peak = np.maximum(sums.max(2), np.float32(-3e38))
        weights = np.exp2(sums - peak[:, :, None])
        total = weights.sum(2)
        out = (weights[..., None] * parts).sum(2) / np.where(total == 0, 1, total)[..., None]
        lse = ((peak + np.log2(total)) * math.log(2)).astype(np.float32)
    assert not out[..., case.head_dim[1] :].any()
    return DTYPES[case.dtype].round(out[..., : case.head_dim[1]]), lse


def check(
    kernel: emulator.Kernel,
    case: Case,
    schedule: int = 0,
    tensors: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> None:
    """The project's gate, per tensor: at most 1.5 times the error of eager attention with rounded P and output."""
    q, k, v = tensors or inputs(case, schedule)
    out, lse = attention(kernel, case, q, k, v, schedule)
    exact, exact_lse = oracle(case, q, k, v)
    eager, _ = oracle(case, q, k, v, np.float32)

    def error(x: np.ndarray) -> float:
        return float(np.linalg.norm(x - exact))

    assert error(out) <= 1.5 * error(eager) + 1e-6
    assert not out[:, :, ~visible(case).any(1)].any()
    if case.lse:
        np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-5)
    else:
        assert np.isnan(lse).all()


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "half the query held, half of the columns out": {"held": 8, "out_columns": 8},
    "one query": {"queries": 1},
    "one query, held, half of the columns out": {"queries": 1, "held": 16, "out_columns": 8},
    "three consumers": {"consumers": 3},
    "three consumers, one query, half of the columns out": {
        "consumers": 3,
        "queries": 1,
        "held": 8,
        "out_columns": 8,
    },
}
CASES = {
    "dense": Case(),
    "dense, f16": Case(dtype="f16"),
    "whole blocks": Case(seq=(64, 64)),
    "one row": Case(seq=(1, 50)),
    "one key": Case(seq=(50, 1)),
    "block and one": Case(seq=(33, 17)),
    "no key": Case(seq=(40, 0)),
    "no key, band": Case(seq=(40, 0), band=(-3, 4), ctas=1),
    "odd head_dim": Case(head_dim=(13, 13)),
    "narrow value": Case(head_dim=(16, 5)),
    "narrow key": Case(head_dim=(3, 16)),
    "no lse": Case(lse=False),
    "large scale": Case(scale=3.0),
    "batch and groups": Case(heads=(2, 6, 2), seq=(40, 40)),
    "three stages": Case(stages=3),
    "persistent": Case(heads=(2, 2, 1), ctas=3),
    "persistent, one CTA": Case(ctas=1),
    "persistent, one key block": Case(heads=(2, 4, 1), seq=(40, 9), ctas=2),
    "persistent, three stages": Case(ctas=2, stages=3),
    "causal": Case().causal(),
    "causal, one key block": Case(heads=(1, 4, 1), seq=(90, 9), ctas=2).causal(),
    "causal, bottom right": Case().causal(True),
    "causal, more rows": Case(seq=(90, 40)).causal(),
    "causal, more rows, bottom right": Case(seq=(90, 40), ctas=2).causal(True),
    "causal, square, persistent": Case(seq=(96, 96), ctas=2).causal(),
    "causal, groups, persistent": Case(heads=(2, 4, 2), seq=(100, 70), ctas=5).causal(True),
    "causal, wide keys": Case(keys=64, seq=(130, 130)).causal(),
    "causal, narrow keys": Case(keys=8, seq=(80, 80)).causal(),
    "causal, narrow keys, persistent": Case(keys=8, seq=(90, 70), ctas=1).causal(),
    "window": Case(band=(-20, 0)),
    "window, both sides": Case(band=(-17, 9), ctas=2),
    "window, narrower than a block": Case(band=(-2, 1), keys=32),
    "window, ahead": Case(band=(30, 45)),
    "window, one key": Case(band=(7, 7), ctas=1),
    "window, blocks": Case(band=(-32, -16), seq=(96, 96), ctas=2),
    "nothing visible above": Case(band=(-FAR, -40), ctas=2),
    "nothing visible below": Case(band=(60, FAR), ctas=2),
    "nothing visible": Case(band=(5, 3), ctas=2),
    "unbounded band": Case(band=(-FAR, FAR)),
}
# Two consumers compute a tile's first block by halves: of 64 keys here, which are seen whole, in part or not at all.
FIRST_BLOCKS = (16, 128)  # keys of a tile's first block: at once, and by halves
WIDE = Case(heads=(1, 1, 1), keys=128)
HALVES = {
    "causal": replace(WIDE, seq=(196, 196), ctas=2).causal(),
    "causal, bottom right": replace(WIDE, seq=(100, 170)).causal(True),
    "causal, more rows": replace(WIDE, seq=(200, 70)).causal(),
    "causal, heads": replace(WIDE, heads=(2, 4, 2), seq=(80, 80), ctas=3).causal(),
    "window": replace(WIDE, seq=(160, 160), band=(-40, 0)),
    "window, both sides": replace(WIDE, seq=(160, 200), band=(-17, 9), ctas=1),
    "window, a diagonal": replace(WIDE, seq=(130, 130), band=(0, 0)),
    "window, ahead": replace(WIDE, seq=(150, 190), band=(30, 45)),
    "window, as wide as a half": replace(WIDE, seq=(150, 150), band=(-63, 0)),
    "window, wide": replace(WIDE, seq=(130, 330), band=(-10, 200)),
    "one key of the right half": replace(WIDE, seq=(64, 100), band=(-FAR, 1)),
    "the left half but its last key": replace(WIDE, seq=(64, 100), band=(-FAR, 14)),
    "the left half but its first key": replace(WIDE, seq=(32, 100), band=(-30, 60)),
    "end of the keys in the left half": replace(WIDE, seq=(40, 150), band=(-FAR, FAR)),
    "end of the keys in the right half": replace(WIDE, seq=(40, 220), band=(-FAR, FAR)),
    "end of the keys at the middle": replace(WIDE, seq=(40, 192), band=(-FAR, FAR)),
    "end of the keys before the middle": replace(WIDE, seq=(40, 63), band=(-FAR, 50)),
    "end of the keys after the middle": replace(WIDE, seq=(80, 193), band=(-FAR, 120)),
    "whole blocks": replace(WIDE, seq=(32, 256), band=(-FAR, FAR)),
    "no key": replace(WIDE, seq=(40, 0), band=(-3, 4)),
    "nothing visible": replace(WIDE, seq=(40, 200), band=(5, 3)),
    "nothing visible above": replace(WIDE, seq=(150, 90), band=(-FAR, -70)),
    "nothing visible below": replace(WIDE, seq=(150, 190), band=(110, FAR), ctas=2),
    "split": replace(WIDE, seq=(40, 400), band=(-60, 300), splits=2),
    "f16": replace(WIDE, seq=(100, 100), dtype="f16", scale=3.0).causal(),
}


@pytest.fixture(scope="module")
def kernel() -> emulator.Kernel:
    return emulator.load(SOURCE)["attention_forward_hopper"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(kernel: emulator.Kernel, name: str, mode: str) -> None:
    check(kernel, replace(CASES[name], **MODES[mode]), schedule=list(MODES).index(mode))


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", ["dense", "one key", "causal, groups, persistent", "window, both sides", "no key, band"]
)
def test_split_keys_match_the_oracle(kernel: emulator.Kernel, name: str, mode: str, splits: int) -> None:
    check(kernel, replace(CASES[name], **MODES[mode], splits=splits))


@pytest.mark.parametrize("mode", ["plain", "one query, held, half of the columns out"])
@pytest.mark.parametrize("name", HALVES)
def test_first_blocks_by_halves_match_the_oracle(kernel: emulator.Kernel, name: str, mode: str) -> None:
    check(kernel, replace(HALVES[name], **MODES[mode]), schedule=list(MODES).index(mode))


def random_case(seed: int, by_halves: bool) -> Case:
    rng = np.random.default_rng(seed)
    heads_kv = int(rng.integers(1, 4))
    far = 320 if by_halves else 120
    seq = (int(rng.integers(1, 120)), int(rng.integers(1, far)))
    bounds = sorted(int(bound) for bound in rng.integers(-130, far + 10, 2))
    band = [None, (-FAR, bounds[1]), (bounds[0], FAR), (bounds[0], bounds[1])][seed % 4]
    case = Case(
        heads=(int(rng.integers(1, 3)), heads_kv * int(rng.integers(1, 3)), heads_kv),
        seq=seq,
        head_dim=(int(rng.integers(1, 17)), int(rng.integers(1, 17))),
        band=band,
        dtype=str(rng.choice(list(DTYPES))),
        scale=float(rng.uniform(0.05, 2)),
        keys=int(rng.choice([8, 16, 32])),
        stages=int(rng.integers(2, 4)),
        consumers=int(rng.integers(2, 4)),
        queries=int(rng.integers(1, 3)),
        held=int(rng.choice([0, 8, 16])),
        out_columns=[None, 8][int(rng.integers(2))],
        ctas=[None, int(rng.integers(1, 6))][int(rng.integers(2))],
        splits=[None, int(rng.integers(2, 5))][int(rng.integers(4) == 0)],
    )
    return replace(case, keys=128, consumers=2, heads=(1, heads_kv, heads_kv)) if by_halves else case


@pytest.mark.parametrize("seed", range(64))
def test_matches_the_oracle_on_random_problems(kernel: emulator.Kernel, seed: int) -> None:
    check(kernel, random_case(seed, by_halves=False), seed)


@pytest.mark.parametrize("seed", [seed for seed in range(64) if seed % 4])
def test_first_blocks_by_halves_match_the_oracle_on_random_problems(kernel: emulator.Kernel, seed: int) -> None:
    check(kernel, random_case(seed, by_halves=True), seed)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_dim", specs.HOPPER_SHAPES)
def test_matches_the_oracle_with_the_shipped_tiles(
    kernel: emulator.Kernel, tile_dim: int, dtype: str, causal: bool
) -> None:
    shape = specs.HOPPER_SHAPES[tile_dim]
    case = Case(
        seq=(200, 330),
        head_dim=(tile_dim, tile_dim - 3),
        dtype=dtype,
        scale=tile_dim**-0.5,
        rows=specs.CONSUMER_ROWS,
        keys=shape.key,
        tile_dim=tile_dim,
        stages=shape.stages,
        consumers=shape.consumers,
        queries=shape.queries,
        held=shape.held,
        out_columns=min(tile_dim, specs.OUT_COLUMNS),
        ctas=3,
    )
    check(kernel, case.causal() if causal else case)


@pytest.mark.parametrize("held", [0, 32, 64])
@pytest.mark.parametrize("consumers", [2, 3])
def test_matches_the_oracle_with_whole_warpgroups(kernel: emulator.Kernel, consumers: int, held: int) -> None:
    case = Case(seq=(250, 250), head_dim=(64, 64), rows=64, keys=64, tile_dim=64, ctas=1, held=held)
    check(kernel, replace(case, consumers=consumers).causal())


def test_views_come_in_without_a_copy(kernel: emulator.Kernel) -> None:
    case = Case(heads=(2, 2, 1))
    q, k, v = inputs(case)
    q_bshd, k_bshd, v_bshd = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v))
    np.testing.assert_array_equal(
        attention(kernel, case, q, k, v)[0], attention(kernel, case, q_bshd, k_bshd, v_bshd)[0]
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_schedule_does_not_change_a_bit(kernel: emulator.Kernel, mode: str) -> None:
    case = Case(ctas=2, **MODES[mode]).causal()
    results = [attention(kernel, case, *inputs(case), schedule) for schedule in range(8)]
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


@pytest.mark.parametrize("mode", ["plain", "one query, held, half of the columns out", "three consumers"])
def test_nan_reaches_the_rows_that_see_it_and_no_other_head(kernel: emulator.Kernel, mode: str) -> None:
    case = Case(seq=(64, 64), ctas=1, **MODES[mode]).causal()
    for poisoned in range(3):
        tensors = inputs(case)
        key = 40
        tensors[poisoned][0, 0, key] = np.nan
        out, _ = attention(kernel, case, *tensors)
        clean, _ = attention(kernel, case, *inputs(case))
        sees = np.arange(64) == key if poisoned == 0 else visible(case)[:, key]
        assert np.isnan(out[0, 0, sees]).all()
        # Rows of query tiles that do not visit the key keep every bit. Both query heads share the one key head.
        np.testing.assert_array_equal(out[0, :, :32], clean[0, :, :32])
        if poisoned == 0:
            np.testing.assert_array_equal(out[0, 1], clean[0, 1])


@pytest.mark.parametrize("keys", FIRST_BLOCKS)
def test_infinite_scores(kernel: emulator.Kernel, keys: int) -> None:
    case = Case(seq=(40, 40), band=(-5, 5), scale=1.5, keys=keys)
    q, k, v = inputs(case)
    q[...] = np.abs(q)
    k[:, :, 10:30, 0] = -np.inf
    out, lse = attention(kernel, case, q, k, v)
    blind = slice(15, 25)  # these rows see only keys whose scores are -inf
    assert not out[:, :, blind].any() and np.isneginf(lse[:, :, blind]).all()
    assert np.isfinite(out).all()
    k[:, :, 20, 0] = np.inf
    out, _ = attention(kernel, case, q, k, v)
    assert np.isnan(out[:, :, 15:26]).all() and np.isfinite(out[:, :, :15]).all()


@pytest.mark.parametrize("keys", FIRST_BLOCKS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_far_from_zero(kernel: emulator.Kernel, sign: int, keys: int) -> None:
    case = Case(seq=(40, 40), band=(-5, 5), dtype="f16", keys=keys)
    q, k, v = inputs(case)
    q, k = np.abs(q), 100 * sign * np.abs(k)
    check(kernel, case, tensors=(q, DTYPES["f16"].round(k), v))


@pytest.mark.parametrize("keys", FIRST_BLOCKS)
def test_rows_that_see_nothing_read_nothing(kernel: emulator.Kernel, keys: int) -> None:
    for case in (Case(band=(-FAR, -200), keys=keys), Case(band=(200, FAR), keys=keys)):
        q, k, v = inputs(case)
        k[...] = v[...] = np.nan
        out, lse = attention(kernel, case, q, k, v)
        assert not out.any() and np.isneginf(lse).all()


# --- the order of the tiles under a band ---


def deal(
    names: dict[str, Any], tiles_query: int, heads: int, ctas: int, fold: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many tiles each CTA computes; head and tile by turn and CTA, for two turns more than anybody has."""
    emulator.enter(0, ctas)
    order = names["_order"](emulator.scalar(heads), emulator.scalar(tiles_query), fold)
    emulator.enter(np.arange(ctas), ctas)
    problem = SimpleNamespace(BAND=True, order=order)
    counts = names["Problem"].tiles(problem).value
    turns = emulator.Tensor(np.arange(counts.max() + 2, dtype=np.int32)[:, None])
    head, tile = names["Problem"].place(problem, turns)
    return counts, head.value, tile.value


def check_order(names: dict[str, Any], tiles_query: int, heads: int, ctas: int, fold: bool = True) -> None:
    """Every tile once; where a head's middle tile finds no partner also one more in each, which has no rows."""
    counts, head, tile = deal(names, tiles_query, heads, ctas, fold)
    assert counts.min() >= 1, "the kernel needs a tile in each CTA"
    mine = np.arange(len(head))[:, None] < counts
    head, tile = head[mine], tile[mine]
    all_tiles = tiles_query + (tiles_query % 2 and (heads % 2 or not fold))
    assert head.min() >= 0 and head.max() < heads and tile.min() >= 0 and tile.max() < all_tiles
    np.testing.assert_array_equal(np.sort(head * all_tiles + tile), np.arange(heads * all_tiles))


def balance(names: dict[str, Any], tiles_query: int, heads: int, ctas: int) -> float:
    """Of a causal square with as many rows in a tile as keys in a block: the mean number of blocks over the largest."""
    counts, _, tile = deal(names, tiles_query, heads, ctas)
    mine = np.arange(len(tile))[:, None] < counts
    blocks = np.where(mine, np.where(tile < tiles_query, tile + 1, 1), 0).sum(0)
    return heads * tiles_query * (tiles_query + 1) / 2 / ctas / int(blocks.max())


def longest_first(tiles_query: int, heads: int, ctas: int) -> float:
    """The same of the usual heuristic: the longest tile that is left goes to the CTA that has the least to do."""
    blocks = [0] * ctas
    for tile in reversed(range(tiles_query)):
        for _ in range(heads):
            heapq.heapreplace(blocks, blocks[0] + tile + 1)
    return sum(blocks) / ctas / max(blocks)


CTAS = (1, 2, 3, 7, 30, 78, 114, 131, 132)


@pytest.mark.parametrize("tiles_query", [*range(1, 18), 31, 32, 33, 64, 127, 128])
def test_the_order_has_every_tile_once(tiles_query: int) -> None:
    names = emulator.load(SOURCE)
    for heads in (*range(1, 20), 31, 32, 63, 64, 100, 257):
        for ctas in CTAS:
            for fold in (True, False):
                check_order(names, tiles_query, heads, min(ctas, heads * tiles_query), fold)


@pytest.mark.parametrize("tiles_query", [4, 8, 16, 32, 64, 128])
def test_the_order_shares_the_work(tiles_query: int) -> None:
    names = emulator.load(SOURCE)
    for heads in (8, 16, 24, 32, 48, 64, 96, 128, 160, 256):
        for ctas in (78, 114, 132):
            if heads * tiles_query >= ctas:
                share = balance(names, tiles_query, heads, ctas)
                assert share >= 0.9 * longest_first(tiles_query, heads, ctas), (heads, ctas)
                if heads * tiles_query >= 6 * ctas:
                    assert share >= 0.93, (heads, ctas)


@pytest.mark.parametrize("tiles_query", [4, 8, 16])
def test_long_and_short_tiles_of_pairs_are_computed_at_the_same_time(tiles_query: int) -> None:
    names = emulator.load(SOURCE)
    for ctas in (78, 114, 132):
        _, _, tile = deal(names, tiles_query, 4096 // tiles_query, ctas)
        long = (tile[:20] >= tiles_query // 2).mean(1)  # of turns that are all of pairs
        assert (np.abs(long - 0.5) < 0.12).all(), (ctas, long)


# --- planted faults ---

# Each fault is a list of edits of the kernel's text. All have to be noticed by some case of the suite: as an error of
# the emulator, or as a wrong number.
FAULTS: dict[str, list[Edit]] = {
    "empty: phase": [swap("& 1) ^ 1)", "& 1))")],
    "empty: no wait": [drop("mbarrier.wait(self.empty")],
    "full: phase": [swap("(n // self.stages) & 1],", "((n // self.stages) & 1) ^ 1],")],
    "full: stage": [swap("[self.full.index(n % self.stages),", "[self.full.index((n + 1) % self.stages),")],
    "tile: stage": [swap("self.tiles.index(n % self.stages)", "self.tiles.index((n + 1) % self.stages)")],
    "release: stage": [swap("[self.empty.index(n % self.stages)]", "[self.empty.index((n + 1) % self.stages)]")],
    "release: every lane": [swap("elect.sync _|p, 0xffffffff; @p", "")],
    "load: stage": [swap("self.tiles.index(stage))", "self.tiles.index((stage + 1) % self.stages))")],
    "load: barrier": [swap("index(stage), self.tiles", "index((stage + 1) % self.stages), self.tiles")],
    "load: half the bytes": [swap("desc.block_type.nbytes)", "desc.block_type.nbytes // 2)")],
    "load: twice the bytes": [swap("desc.block_type.nbytes)", "desc.block_type.nbytes * 2)")],
    "barriers: one arrival a warpgroup": [swap("count=readers * WARPS", "count=readers")],
    "barriers: one reader": [swap("count=readers * WARPS", "count=WARPS")],
    "barriers: no fence": [swap("    fence_async_shared()\n    sizes", "    sizes")],
    "producer: query of one consumer": [swap("row + wg * p.ROWS, turn", "row, turn")],
    "producer: one query stage": [swap("turn * p.CONSUMERS + wg)", "turn * p.CONSUMERS)")],
    "producer: tiles not counted": [swap("turn * p.CONSUMERS + wg)", "wg)")],
    "producer: blocks not counted": [swap("        blocks += steps\n        v_ring", "        v_ring")],
    "producer: batch": [swap("        batch = _quotient(head, p.num_heads_q)", "        batch = gl.to_tensor(0)")],
    "producer: batch of another size": [
        swap("        batch = _quotient(head, p.num_heads_q)", "        batch = _quotient(head, p.group)")
    ],
    "producer: key head": [swap("head_q // p.group", "head_q % (p.num_heads_q // p.group)")],
    "producer: first key twice": [swap("if QUERIES == 1:\n            k_ring", "if QUERIES > 0:\n            k_ring")],
    "producer: first key forgotten": [
        swap("if QUERIES > 1:\n            k_ring", "if QUERIES > 2:\n            k_ring")
    ],
    "producer: first key after the others": [
        swap("if QUERIES > 1:\n            k_ring", "if QUERIES > 2:\n            k_ring"),
        insert("k_ring.fill(k_desc, batch, head_kv, col, blocks)", before="blocks += steps\n        v_ring"),
    ],
    "producer: queries after the keys": [
        drop("q_ring.fill(q_desc"),
        insert(
            "for wg in range(p.CONSUMERS): "
            "q_ring.fill(q_desc, batch, head_q, row + wg * p.ROWS, turn * p.CONSUMERS + wg)",
            before="blocks += steps\n        v_ring",
        ),
    ],
    "producer: value of another block": [swap("col - (i - 1) * p.KEYS", "col - i * p.KEYS")],
    "producer: last value": [swap("col - (steps - 1) * p.KEYS, blocks", "col - steps * p.KEYS, blocks")],
    "query: a column too few": [swap("if self.HELD < D:", "if self.HELD == 0:")],
    "query: the first columns twice": [swap("rest = self.tile.slice(self.HELD", "rest = self.tile.slice(0")],
    "query: held columns forgotten": [swap("use_acc=self.HELD > 0", "use_acc=False")],
    "query: other keys": [swap("k = k.slice(self.HELD,", "k = k.slice(0,")],
    "no wait for query": [drop("q_ring.wait(query)")],
    "no wait for the first key": [swap("k_ring.wait(blocks)\n        s = ", "s = ")],
    "no wait for the first value": [swap("        if CONSUMERS > 2:\n            v_ring.wait(blocks)\n", "")],
    "no wait for key": [drop("k_ring.wait(n)")],
    "no wait for value": [drop("v_ring.wait(n)")],
    "no wait for value, ping-pong": [
        swap("        v_ring.wait(n - 1)\n    o = warpgroup_mma(", "        pass\n    o = warpgroup_mma(")
    ],
    "no wait for the last value": [
        swap("        v_ring.wait(blocks - 1)\n        o = warpgroup_mma(", "        o = warpgroup_mma(")
    ],
    "no release of query": [drop("q_ring.release(query)")],
    "no release of the first key": [swap("        k_ring.release(blocks)\n        m, l", "        m, l")],
    "no release of key": [drop("k_ring.release(n)")],
    "no release of value": [drop("v_ring.release(n - 1)")],
    "no release of the last value": [drop("v_ring.release(blocks - 1)")],
    "early release of query": move("q_ring.release(query)", before="o, l, m, prob = _later_steps("),
    "early release of a held query": move("q_ring.release(query)", before="k_ring.wait(blocks)\n        s = "),
    "early release of the first key": [
        swap("        k_ring.release(blocks)\n        m, l", "        m, l"),
        swap("        s = warpgroup_mma_wait(", "        k_ring.release(blocks); s = warpgroup_mma_wait("),
    ],
    "early release of key": move("k_ring.release(n)", before="s = warpgroup_mma_wait(num_outstanding=1"),
    "early release of value": [
        drop("v_ring.release(n - 1)"),
        swap(
            "    o = warpgroup_mma_wait(num_outstanding=0, deps=[o])\n    pass",
            "    v_ring.release(n - 1); o = warpgroup_mma_wait(num_outstanding=0, deps=[o])",
        ),
    ],
    "early release of the last value": [
        drop("v_ring.release(blocks - 1)"),
        swap(
            "v_ring.tile(blocks - 1), o, is_async=True)",
            "v_ring.tile(blocks - 1), o, is_async=True); v_ring.release(blocks - 1)",
        ),
    ],
    "hidden: key kept": [swap("k_ring.release(blocks)\n            v_ring", "v_ring")],
    "hidden: value kept": [swap("            v_ring.wait(blocks)\n            v_ring.release(blocks)\n", "")],
    "hidden: key released unseen": [swap("k_ring.wait(blocks)\n            k_ring.release", "k_ring.release")],
    "hidden: value released unseen": [swap("v_ring.wait(blocks)\n            v_ring.release", "v_ring.release")],
    "hidden: not counted": [drop("blocks += 1")],
    "hidden: same keys": [drop("col -= p.KEYS")],
    "hidden: as many steps": [drop("steps -= 1")],
    "hidden: the only block": [swap("(steps > 1)", "(steps > 0)")],
    "hidden: seen by one row": [swap("(col >= end)", "(col >= end - 1)")],
    "hidden: by the first row": [
        swap("end = gl.minimum(row + self.ROWS + self.band_hi", "end = gl.minimum(row + self.band_hi")
    ],
    "scores in flight": [swap("num_outstanding=1, deps=[s]", "num_outstanding=2, deps=[s]")],
    "first scores in flight": [swap("num_outstanding=0, deps=[s]", "num_outstanding=1, deps=[s]")],
    "output in flight": [
        swap("num_outstanding=0, deps=[o])\n    v_ring", "num_outstanding=1, deps=[o])\n    v_ring"),
    ],
    "values of this block": [swap("v_ring.tile(n - 1), o", "v_ring.tile(n), o")],
    "ping-pong: nobody starts": [swap("        if WG == 1:\n            _pass_turn(WG)", "        pass")],
    "ping-pong: both start": [swap("        if WG == 1:\n            _pass_turn(WG)", "        _pass_turn(WG)")],
    "ping-pong: last turn not taken": [drop("_take_turn(WG)  # the turn")],
    "ping-pong: turn not passed": [swap("        _pass_turn(WG)\n    s =", "        pass\n    s =")],
    "ping-pong: own turn": [swap('"bar.arrive 9, 256;"', '"bar.arrive 8, 256;"')],
    "ping-pong: half the threads": [swap('"bar.sync 8, 256;"', '"bar.sync 8, 128;"')],
    "consumer: tiles not counted": [swap("query = turn * CONSUMERS + WG", "query = WG")],
    "consumer: blocks not counted": [insert("blocks -= steps", before="_finish(p, out_desc, lse, out_tiles")],
    "consumer: next tile is this one": [swap("next_steps = p.tile(turn + 1)", "next_steps = p.tile(turn)")],
    "consumer: next tile but one": [swap("next_steps = p.tile(turn + 1)", "next_steps = p.tile(turn + 2)")],
    "consumer: starts with the next tile": [swap("p.tile(gl.to_tensor(0))", "p.tile(gl.to_tensor(1))")],
    "consumer: always the next tile": [
        swap("steps = p.tile(turn)\n        row += WG", "steps = p.tile(turn + 1)\n        row += WG")
    ],
    "consumer: same rows": [drop("row += WG * p.ROWS")],
    "mask: right edge": [
        swap("rows + self.band_hi + 1, self.seq_len_k) - lane", "rows + self.band_hi + 2, self.seq_len_k) - lane")
    ],
    "mask: right edge, one less": [
        swap("rows + self.band_hi + 1, self.seq_len_k) - lane", "rows + self.band_hi, self.seq_len_k) - lane")
    ],
    "mask: left edge": [swap("keys >= rows", "keys > rows")],
    "mask: left edge, one more": [swap("keys >= rows", "keys >= rows - 1")],
    "mask: end of the keys": [swap("keys < self.seq_len_k - lane", "keys <= self.seq_len_k - lane")],
    "mask: end of the keys, band": [
        swap("gl.minimum(rows + self.band_hi + 1, self.seq_len_k) - lane", "rows + self.band_hi + 1 - lane")
    ],
    "mask: skipped at the left edge": [swap("if col < row + self.ROWS - 1", "if col < row + self.ROWS - 2")],
    "mask: only the first row at the left edge": [swap("if col < row + self.ROWS - 1", "if col < row")],
    "mask: of another block": [
        swap("s = p.mask(s, row, col)\n    m_new", "s = p.mask(s, row, col + p.KEYS)\n    m_new")
    ],
    "mask: of other rows": [swap("s = p.mask(s, row, col)\n    m_new", "s = p.mask(s, row + 1, col)\n    m_new")],
    "mask: lanes": [swap("_axis(4, 2, L) * 2", "_axis(4, 2, L)")],
    "mask: registers": [swap("_axis(KEYS // 8, 1, L) * 8", "_axis(KEYS // 8, 1, L) * 4")],
    "mask: pairs": [swap(" + _axis(2, 3, L)", "")],
    "seen: one key more": [swap("return col < gl.minimum(", "return col <= gl.minimum(")],
    "seen: one key less": [swap("return col < gl.minimum(", "return col + 1 < gl.minimum(")],
    "seen: by the first row": [
        swap("return col < gl.minimum(row + self.ROWS + self.band_hi", "return col < gl.minimum(row + 1 + self.band_hi")
    ],
    "seen: beyond the keys": [
        swap("< gl.minimum(row + self.ROWS + self.band_hi, self.seq_len_k)\n", "< row + self.ROWS + self.band_hi\n")
    ],
    "partly: no left edge": [swap("return right | (begin <", "return right; (begin <")],
    "partly: no right edge": [swap("return right | (begin <", "return (begin <")],
    "partly: right edge, one key more": [
        swap("right = end > gl.minimum(row + self.band_hi + 1", "right = end > gl.minimum(row + self.band_hi + 2")
    ],
    "partly: right edge, one key less": [
        swap("right = end > gl.minimum(row + self.band_hi + 1", "right = end > gl.minimum(row + self.band_hi")
    ],
    "partly: right edge of the last row": [
        swap("right = end > gl.minimum(row + ", "right = end > gl.minimum(row + self.ROWS - 1 + ")
    ],
    "partly: beyond the keys": [
        swap("right = end > gl.minimum(row + self.band_hi + 1, self.seq_len_k)", "right = end > row + self.band_hi + 1")
    ],
    "partly: left edge, one key more": [swap("(begin < row + self.ROWS - 1 ", "(begin + 1 < row + self.ROWS - 1 ")],
    "partly: left edge, one key less": [swap("(begin < row + self.ROWS - 1 ", "(begin <= row + self.ROWS - 1 ")],
    "partly: left edge of the first row": [swap("(begin < row + self.ROWS - 1 ", "(begin < row ")],
    "halves: swapped": [swap("left, right = _halves(s)", "right, left = _halves(s)")],
    "halves: the left one twice": [swap("left, right = _halves(s)", "left, right = _halves(s)[0], _halves(s)[0]")],
    "halves: every other column": [
        swap("x.reshape([x.shape[0], 2, HALF]).permute([0, 2, 1])", "x.reshape([x.shape[0], HALF, 2])")
    ],
    "halves: middle at the end": [swap("middle = col + p.KEYS // 2", "middle = col + p.KEYS")],
    "halves: middle at the beginning": [swap("middle = col + p.KEYS // 2", "middle = col")],
    "halves: left not masked": [drop("left = p.mask(left, row, col)")],
    "halves: left never asked": [swap("p.partly(row, col, middle)", "p.partly(row, col, col)")],
    "halves: left asked for all": [swap("p.partly(row, col, middle)", "p.partly(row, middle, middle)")],
    "halves: right not masked": [drop("right = p.mask(right, row, middle)")],
    "halves: right masked like the left": [
        swap("right = p.mask(right, row, middle)", "right = p.mask(right, row, col)")
    ],
    "halves: maximum of the left": [drop("m = gl.maximum(m, gl.max(right, 1))")],
    "halves: maximum of the right": [swap("m = gl.maximum(m, gl.max(right, 1))", "m = gl.max(right, 1)")],
    "halves: sum of the left": [drop("l += _lane_sums(right)")],
    "halves: sum of the right": [swap("l += _lane_sums(right)", "l = _lane_sums(right)")],
    "halves: hidden one kept": [drop("right = gl.zeros_like(right)")],
    "halves: seen by nobody": [swap("right_seen = p.seen(row, middle)", "right_seen = False")],
    "halves: joined the other way round": [swap("gl.join(left, right)", "gl.join(right, left)")],
    "halves: interleaved": [swap("gl.join(left, right).permute([0, 2, 1])", "gl.join(left, right)")],
    "halves: a key further": [
        swap(
            "        return _first_step_by_halves(p, s, row, col,",
            "        return _first_step_by_halves(p, s, row, col + 1,",
        )
    ],
    "edges: right": [
        swap("first_end = gl.minimum(row + self.band_hi + 1", "first_end = gl.minimum(row + self.band_hi + 2")
    ],
    "edges: right, of the last row": [
        swap("first_end = gl.minimum(row + ", "first_end = gl.minimum(row + self.ROWS + ")
    ],
    "edges: left": [swap("last_begin = row + self.ROWS - 1", "last_begin = row + self.ROWS - 2")],
    "edges: left, of the first row": [swap("last_begin = row + self.ROWS - 1", "last_begin = row")],
    "edges: right, rounded down": [swap("first_end, 0) + self.KEYS - 1)", "first_end, 0))")],
    "edges: left, rounded up": [
        swap(
            "b = gl.maximum(col + self.KEYS - last_begin, 0)",
            "b = (gl.maximum(col + self.KEYS - last_begin, 0) + self.KEYS - 1)",
        )
    ],
    "edges: the first block again": [swap("gl.maximum(a, 1)", "gl.maximum(a, 0)")],
    "edges: before the first": [swap("return a, gl.minimum(gl.maximum(b, a)", "return a, gl.minimum(gl.maximum(b, 0)")],
    "edges: beyond the last": [swap("gl.minimum(gl.maximum(a, 1), steps)", "gl.maximum(a, 1)")],
    "edges: no left one": [swap("range(1 + (left < steps).to(gl.int32))", "range(1)")],
    "blocks: last key": [swap("last_row + self.band_hi + 1, keys", "last_row + self.band_hi, keys")],
    "blocks: last row": [swap("self.seq_len_q) - 1", "self.seq_len_q) - 2")],
    "blocks: first key": [swap("row + self.band_lo, 0) //", "row + self.band_lo + 1, 0) //")],
    "blocks: negative": [swap("gl.maximum(row + self.band_lo, 0) //", "(row + self.band_lo) //")],
    "blocks: rounded down": [swap("end = (keys + self.KEYS - 1)", "end = keys")],
    "blocks: blind rows read keys": [swap("self.seq_len_k // self.KEYS + 1)", "0)")],
    "order: nothing cut": [
        swap("    full = 2 * pairs // ctas\n", "    cut = gl.to_tensor(0)\n    full = 2 * pairs // ctas\n")
    ],
    "order: cut one less": [swap("cut = rounds * ctas - (", "cut = rounds * ctas - 1 - (")],
    "order: cut head": [
        swap("o.first_group + remainder, o.first_group - 1)", "o.first_group + remainder, o.first_group)")
    ],
    "order: cut width": [swap("o.groups + (o.cut > 0).to(gl.int32)", "o.groups")],
    "order: cut not added": [swap("gl.where(above < 0, 0, o.cut)", "0")],
    "order: first group rounded down": [
        swap("(rounds * ctas + per_group - 1) // per_group", "rounds * ctas // per_group")
    ],
    "order: odd number of tiles": [swap("per_group = (tiles + 1) // 2", "per_group = tiles // 2")],
    "order: the same end twice": [swap("o.tiles - 1 - short_tile\n", "o.tiles // 2 + short_tile\n")],
    "order: the middle twice": [swap("gl.where(short_tile == long_tile, o.tiles, short_tile)", "short_tile")],
    "order: an odd number of heads folded": [swap("(tiles_query & 1 & ~heads)", "(tiles_query & 1)")],
    "order: one head of a group": [swap("group * o.fold + (tile & (o.fold - 1))", "group * o.fold")],
    "order: group's tiles as a head's": [swap("tile >> (o.fold - 1)", "tile")],
    "order: divided by the width": [swap("quotient = _quotient(x, divisor)", "quotient = _quotient(x, width)")],
    "order: dense, divided by the heads": [swap("_quotient(t, self.tiles_query)", "_quotient(t, self.num_heads_q)")],
    "order: not back and forth": [swap("gl.where((again & 1) != 0, ctas - 1 - cta, cta)", "cta")],
    "order: who has one more": [
        swap(
            "gl.where((o.full & 1) != 0, gl.num_programs(0) - 1 - gl.program_id(0), gl.program_id(0))",
            "gl.program_id(0)",
        )
    ],
    "order: all in rounds": [swap("(pairs + ctas // per_group) // ctas - 1", "pairs // ctas")],
    "order: long ones twice": [swap("((32 * turn + cta) & 32)", "(cta & 32)")],
    "order: short ones first": [
        swap("gl.where(r < o.pairs, r, 2 * o.pairs - 1 - r)", "gl.where(r < o.pairs, r, r - o.pairs)")
    ],
    "order: dense, one tile less": [swap("+ gl.num_programs(0) - 1) // gl.num_programs(0)", ") // gl.num_programs(0)")],
    "split: tiles not counted": [drop("num_tiles *= splits")],
    "split: rounded down": [swap("gl.maximum(end - begin, 0) + self.splits - 1) //", "gl.maximum(end - begin, 0)) //")],
    "split: the same part": [swap("end -= head % self.splits * part", "end -= part")],
    "split: beyond the part": [drop("begin = gl.maximum(begin, end - part)")],
    "split: before the first block": [swap("begin = gl.maximum(begin, end - part)", "begin = end - part")],
    "split: head": [swap("head = head // p.splits", "head = head % p.splits")],
    "split: sums among the outputs": [swap("partial + p.heads.to(gl.int64) * p.seq_len_q * D", "partial")],
    "split: sums beyond the rows": [
        swap(
            "gl.store(sums + rows, m + _log2(l), mask=row + rows < p.seq_len_q)", "gl.store(sums + rows, m + _log2(l))"
        )
    ],
    "split: outputs beyond the rows": [swap("o, mask=row + rows < p.seq_len_q)", "o)")],
    "split: division by the empty sum": [
        swap(
            "    o = _scale_rows(o, gl.where(l == 0.0, 0.0, _reciprocal(l)))\n    rows",
            "    o = _scale_rows(o, _reciprocal(l))\n    rows",
        )
    ],
    "softmax: starts at -inf": [swap("gl.max(s, 1) * scale_log2, -3.0e38", 'gl.max(s, 1) * scale_log2, float("-inf")')],
    "softmax: starts at 0": [swap("gl.max(s, 1) * scale_log2, -3.0e38", "gl.max(s, 1) * scale_log2, 0.0")],
    "halves: starts at -inf": [swap("m * scale_log2, -3.0e38", 'm * scale_log2, float("-inf")')],
    "halves: starts at 0": [swap("m * scale_log2, -3.0e38", "m * scale_log2, 0.0")],
    "halves: maximum not scaled": [swap("m * scale_log2, -3.0e38", "m, -3.0e38")],
    "softmax: first maximum not scaled": [swap("gl.max(s, 1) * scale_log2, -", "gl.max(s, 1), -")],
    "softmax: maximum not scaled": [swap("gl.max(s, 1) * scale_log2)", "gl.max(s, 1))")],
    "softmax: sum not rescaled": [swap("l = _scale_rows(l, alpha) + ", "l = l + ")],
    "softmax: output not rescaled": [swap("return _scale_rows(o, alpha), l", "return o, l")],
    "softmax: factor upside down": [swap("_exp2_here(m - m_new)", "_exp2_here(m_new - m)")],
    "softmax: factor of the new maximum": [swap("_exp2_here(m - m_new)", "_exp2_here(m_new - m_new)")],
    "softmax: factor upside down, wide values": [swap("gl.exp2(m - m_new)", "gl.exp2(m_new - m)")],
    "softmax: division by the empty sum": [
        swap(
            "    o = _scale_rows(o, gl.where(l == 0.0, 0.0, _reciprocal(l)))\n    batch",
            "    o = _scale_rows(o, _reciprocal(l))\n    batch",
        )
    ],
    "lse: to base 2": [swap(" * LN_2\n", "\n")],
    "lse: beyond the rows": [swap(", mask=rows < p.seq_len_q)", ")")],
    "lse: of the row before": [swap("p.seq_len_q + rows, value", "p.seq_len_q + (rows - 1), value")],
    "lse: null": [swap("lse.to(gl.int64) != 0", "p.seq_len_q != 0")],
    "store: no fence": [swap("    fence_async_shared()\n    tma", "    tma")],
    "store: no wait for the one before": [drop("tma.store_wait(0)  # the store")],
    "store: no barrier after the wait": [swap("has read `out`\n    gl.barrier()\n", "has read `out`\n")],
    "store: unfinished": [swap("    tma.store_wait(0)\n\n\n", "\n\n")],
    "store: tile of the other consumer": [swap("out_tiles.index(WG)", "out_tiles.index(0)")],
    "store: batch of another size": [
        swap(
            "    batch = _quotient(head, p.num_heads_q)\n    head_q", "    batch = _quotient(head, p.group)\n    head_q"
        )
    ],
    "store: both halves in the first columns": [
        swap("right, batch, head_q, row, COLUMNS)", "right, batch, head_q, row, 0)")
    ],
    "store: the left half twice": [swap("_store(out_desc, out, right,", "_store(out_desc, out, left,")],
    "store: halves swapped": [swap("left, right = _halves(o)", "right, left = _halves(o)")],
    "store: no wait between the halves": [
        swap("    tma.store_wait(0)  # the store", "    if column == 0: tma.store_wait(0)  # the store")
    ],
    "store: no barrier between the halves": [
        swap("has read `out`\n    gl.barrier()", "has read `out`\n    if column == 0: gl.barrier()")
    ],
    "store: no fence for the second half": [
        swap("    fence_async_shared()\n    tma", "    if column == 0: fence_async_shared()\n    tma")
    ],
}
SUITE = [
    Case(heads=(2, 4, 2), ctas=2, scale=3.0, held=8, out_columns=8),
    HALVES["window, both sides"],
    HALVES["causal"],
    HALVES["window"],
    HALVES["end of the keys in the right half"],
    Case(heads=(1, 2, 1), ctas=1, queries=1).causal(),
    Case(heads=(1, 2, 1), ctas=1, consumers=3, held=16, keys=8).causal(),
    Case(band=(-20, 5), ctas=2, stages=3),
    Case(seq=(96, 96), ctas=2, held=8).causal(),
    Case(seq=(96, 96), ctas=2, queries=1, consumers=3, out_columns=8),
    Case(seq=(64, 64), band=(-16, 16)),
    Case(seq=(96, 96), band=(-30, 14)),
    Case(seq=(100, 100), band=(-17, 9), held=8),
    Case(seq=(90, 40), band=(-9, 2)),
    Case(seq=(48, 47)),
    Case(seq=(47, 95), band=(-FAR, 1)),
    Case(seq=(70, 60), band=(-9, -1), ctas=1, keys=8),
    Case(heads=(1, 6, 1), seq=(32, 48), ctas=1, stages=6),
    Case(heads=(1, 2, 1), seq=(48, 48), consumers=3, keys=64, band=(-FAR, -20)),
    Case(heads=(1, 2, 1), seq=(96, 96), consumers=3, keys=8, band=(-FAR, 1)),
    Case(heads=(1, 12, 1), seq=(96, 96), ctas=1, consumers=3, keys=8).causal(),
    Case(lse=False),
    Case(heads=(1, 4, 1), seq=(96, 96), ctas=1, consumers=3, band=(-30, -20)),
    Case(seq=(40, 70), splits=3),
    Case(seq=(90, 70), splits=2, ctas=3, band=(-40, -7)),
    Case(heads=(1, 1, 1), seq=(16, 40), head_dim=(8, 8), tile_dim=256, rows=8, scale=2.0),
]
ORDERS = [(1, 3, 2), (5, 3, 4), (4, 7, 3), (7, 10, 7), (32, 24, 132), (64, 31, 78)]


def check_predicates(names: dict[str, Any]) -> None:
    """`Problem.partly` and `seen` are exact: where they say too much, time is lost and no number changes."""
    row, begin, end, key, more = np.ogrid[0:12, 0:14, 1:16, 0:16, 0:3]
    at = [emulator.Tensor(x[..., 0, 0].astype(np.int32)) for x in (row, begin, end)]
    for lo, hi in ((-FAR, 0), (-FAR, 5), (-FAR, -2), (-4, 1), (-1, 0), (0, FAR), (2, 6), (-9, 9), (-FAR, FAR)):
        sizes = {"band_lo": lo, "band_hi": hi, "seq_len_k": 11}
        problem = SimpleNamespace(ROWS=3, **{name: emulator.scalar(size) for name, size in sizes.items()})
        sees = (row + more + lo <= key) & (key <= row + more + hi) & (key < 11)
        partly = names["Problem"].partly(problem, *at).value & (at[1].value < at[2].value)
        np.testing.assert_array_equal(partly, ((begin <= key) & (key < end) & ~sees).any((3, 4)))
        seen = names["Problem"].seen(problem, *at[:2]).value
        some = ((begin <= key) & sees).any((3, 4))
        assert not (some & ~seen).any()
        assert lo > -FAR or (some == seen).all()


def test_the_predicates_of_a_band_are_exact() -> None:
    check_predicates(emulator.load(SOURCE))


def noticed(text: str) -> str | None:
    """What the suite says about a kernel; None if it finds nothing."""
    names = emulator.load(text)
    kernel = names["attention_forward_hopper"]
    try:
        for order in ORDERS:
            check_order(names, *order)
        assert balance(names, 32, 24, 132) > 0.97 and balance(names, 16, 16, 114) > 0.9
        check_predicates(names)
        for schedule in range(2):
            for case in SUITE:
                check(kernel, case, schedule)
        for keys in FIRST_BLOCKS:
            test_infinite_scores(kernel, keys)
            test_scores_far_from_zero(kernel, -1, keys)
            test_rows_that_see_nothing_read_nothing(kernel, keys)
    except (emulator.KernelError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_the_suite_accepts_the_kernel() -> None:
    assert noticed(SOURCE) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault: str) -> None:
    assert noticed(edited(SOURCE, FAULTS[fault]))


# --- machine code ---


@pytest.mark.parametrize(("head_dim", "band"), [(64, False), (128, True), (256, True)])
def test_the_machine_code_overlaps_maxima_and_products(head_dim: int, band: bool, tmp_path: Path) -> None:
    spec = specs.hopper("bf16", head_dim, band)
    ((_, members),) = compile.compile_all([spec], 1)
    assert isinstance(members, list), members
    assert members[0].entry["spill_bytes"] == 0
    (tmp_path / "kernel.cubin").write_bytes(members[0].code)
    sass = compile.run_tool("nvdisasm", "-c", str(tmp_path / "kernel.cubin"))
    for instruction in ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "SYNCS"):
        assert instruction in sass
    # In the loops of either consumer (with a mask and without, under a band) all row maxima come between the wait for
    # the scores and that for the product P V, which is still in flight: for each of a thread's scores, and twice in the
    # shuffles of either of its rows.
    loops = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b(.*?)WARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", sass, re.S)
    scores = specs.CONSUMER_ROWS * spec.tile.key // 128
    assert [loop.count("FMNMX") for loop in loops] == [scores + 4] * (4 if band else 2)
    assert not any("HGMMA" in loop for loop in loops)


BUILD = """
import tempfile
from kernels import compile, specs
with tempfile.TemporaryDirectory() as cache:
    compile.prepare_environment(cache)
    compile.compile_spec(specs.hopper("bf16", 64, False))
"""


def test_faults_for_the_sanitizer_compile(tmp_path: Path) -> None:
    builds = []
    for fault, text in planted_sources():
        tree = tmp_path / fault.name
        shutil.copytree(KERNELS, tree / "kernels", ignore=shutil.ignore_patterns("__pycache__", "tests"))
        (tree / "kernels" / "forward_hopper.py").write_text(text)
        (tree / "build.py").write_text(BUILD)
        command = [sys.executable, str(tree / "build.py")]
        builds.append(subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(tree)}, stderr=subprocess.PIPE))
    for build in builds:
        _, error = build.communicate()
        assert build.returncode == 0, error.decode()
