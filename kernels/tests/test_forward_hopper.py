"""The Hopper forward on the emulator: numbers against an fp64 oracle, and planted faults that must be noticed."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from kernels import compile, emulator, specs
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
    ping_pong: bool = True
    own_out: bool = True
    ctas: int | None = None  # persistent
    lse: bool = True

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
    batch, heads_q, heads_kv = case.heads
    out = np.full((*q.shape[:3], v.shape[3]), np.nan, np.float32)
    lse = np.full(out[..., 0].size, np.nan, np.float32)
    rows, keys = (1, 1, case.rows, case.tile_dim), (1, 1, case.keys, case.tile_dim)
    tiles_query = -(-case.seq[0] // (2 * case.rows))
    num_tiles = tiles_query * heads_q * batch
    sizes = (num_tiles, tiles_query, heads_q, heads_q // heads_kv, *case.seq)
    band = (0, 0) if case.band is None else tuple(emulator.scalar(bound) for bound in case.band)
    arguments = [
        emulator.Descriptor(q, rows, dtype),
        emulator.Descriptor(k, keys, dtype),
        emulator.Descriptor(v, keys, dtype),
        emulator.Descriptor(out, rows, dtype),
        emulator.Pointer(lse if case.lse else None),
        *(emulator.scalar(size) for size in sizes),
        *band,
        emulator.scalar(case.scale / math.log(2)),
        case.band is not None,
        case.stages,
        case.ping_pong,
        case.own_out,
    ]
    emulator.launch(kernel, min(case.ctas or num_tiles, num_tiles), arguments, seed=schedule)
    return out, lse.reshape(out.shape[:3])


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


CASES = {
    "dense": Case(),
    "dense, f16": Case(dtype="f16"),
    "whole blocks": Case(seq=(64, 64)),
    "one row": Case(seq=(1, 50)),
    "one key": Case(seq=(50, 1)),
    "block and one": Case(seq=(33, 17)),
    "no key": Case(seq=(40, 0)),
    "no key, band": Case(seq=(40, 0), band=(-3, 4)),
    "odd head_dim": Case(head_dim=(13, 13)),
    "narrow value": Case(head_dim=(16, 5)),
    "narrow key": Case(head_dim=(3, 16)),
    "no lse": Case(lse=False),
    "large scale": Case(scale=3.0),
    "batch and groups": Case(heads=(2, 6, 2), seq=(40, 40)),
    "three stages": Case(stages=3),
    "no ping-pong": Case(ping_pong=False),
    "persistent": Case(heads=(2, 2, 1), ctas=3),
    "persistent, one CTA": Case(ctas=1, ping_pong=False),
    "persistent, output over query": Case(ctas=2, own_out=False),
    "persistent, three stages": Case(ctas=2, stages=3),
    "causal": Case().causal(),
    "causal, bottom right": Case().causal(True),
    "causal, more rows": Case(seq=(90, 40)).causal(),
    "causal, more rows, bottom right": Case(seq=(90, 40)).causal(True),
    "causal, square, persistent": Case(seq=(96, 96), ctas=2).causal(),
    "causal, output over query": Case(heads=(1, 4, 2), own_out=False, ctas=3).causal(),
    "causal, wide keys": Case(keys=64, seq=(130, 130)).causal(),
    "causal, narrow keys": Case(keys=8, seq=(80, 80)).causal(),
    "window": Case(band=(-20, 0)),
    "window, both sides": Case(band=(-17, 9), ctas=2),
    "window, narrower than a block": Case(band=(-2, 1), keys=32),
    "window, ahead": Case(band=(30, 45)),
    "window, one key": Case(band=(7, 7)),
    "window, blocks": Case(band=(-32, -16), seq=(96, 96)),
    "nothing visible above": Case(band=(-FAR, -40)),
    "nothing visible below": Case(band=(60, FAR)),
    "nothing visible": Case(band=(5, 3)),
    "unbounded band": Case(band=(-FAR, FAR)),
}


@pytest.fixture(scope="module")
def kernel() -> emulator.Kernel:
    return emulator.load(SOURCE)["attention_forward_hopper"]


@pytest.mark.parametrize("schedule", range(2))
@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(kernel: emulator.Kernel, name: str, schedule: int) -> None:
    check(kernel, CASES[name], schedule)


@pytest.mark.parametrize("seed", range(32))
def test_matches_the_oracle_on_random_problems(kernel: emulator.Kernel, seed: int) -> None:
    rng = np.random.default_rng(seed)
    heads_kv = int(rng.integers(1, 4))
    seq = (int(rng.integers(1, 120)), int(rng.integers(1, 120)))
    bounds = sorted(int(bound) for bound in rng.integers(-130, 130, 2))
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
        ping_pong=bool(rng.integers(2)),
        own_out=bool(rng.integers(2)),
        ctas=[None, int(rng.integers(1, 4))][int(rng.integers(2))],
    )
    check(kernel, case, seed)


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
        own_out=shape.own_out,
        ctas=3,
    )
    check(kernel, case.causal() if causal else case)


def test_views_come_in_without_a_copy(kernel: emulator.Kernel) -> None:
    case = Case(heads=(2, 2, 1))
    q, k, v = inputs(case)
    q_bshd, k_bshd, v_bshd = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v))
    np.testing.assert_array_equal(
        attention(kernel, case, q, k, v)[0], attention(kernel, case, q_bshd, k_bshd, v_bshd)[0]
    )


@pytest.mark.parametrize("own_out", [False, True])
def test_the_schedule_does_not_change_a_bit(kernel: emulator.Kernel, own_out: bool) -> None:
    case = Case(ctas=2, own_out=own_out).causal()
    results = [attention(kernel, case, *inputs(case), schedule) for schedule in range(8)]
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


def test_nan_reaches_the_rows_that_see_it_and_no_other_head(kernel: emulator.Kernel) -> None:
    case = Case(seq=(64, 64)).causal()
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


def test_infinite_scores(kernel: emulator.Kernel) -> None:
    case = Case(seq=(40, 40), band=(-5, 5), scale=1.5)
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


@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_far_from_zero(kernel: emulator.Kernel, sign: int) -> None:
    case = Case(seq=(40, 40), band=(-5, 5), dtype="f16")
    q, k, v = inputs(case)
    q, k = np.abs(q), 100 * sign * np.abs(k)
    check(kernel, case, tensors=(q, DTYPES["f16"].round(k), v))


def test_rows_that_see_nothing_read_nothing(kernel: emulator.Kernel) -> None:
    for case in (Case(band=(-FAR, -200)), Case(band=(200, FAR))):
        q, k, v = inputs(case)
        k[...] = v[...] = np.nan
        out, lse = attention(kernel, case, q, k, v)
        assert not out.any() and np.isneginf(lse).all()


# Each fault is a list of edits of the kernel's text. All have to be noticed by some case of the suite: as an error of
# the emulator, or as a wrong number.
Edit = Callable[[str], str]


def swap(old: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert text.count(old) == 1, f"{text.count(old)} places for {old!r}"
        return text.replace(old, new)

    return edit


def _line(text: str, line: str) -> re.Match[str]:
    """The only line that starts with `line`, after its indentation."""
    found = list(re.finditer(rf"^( *){re.escape(line)}.*\n", text, re.M))
    assert len(found) == 1, f"{len(found)} lines {line!r}"
    return found[0]


def drop(line: str) -> Edit:
    """A statement becomes `pass`."""
    return lambda text: text.replace(_line(text, line)[0], f"{_line(text, line)[1]}pass\n")


def insert(line: str, before: str) -> Edit:
    return lambda text: text.replace(
        _line(text, before)[0], f"{_line(text, before)[1]}{line}\n{_line(text, before)[0]}"
    )


def move(line: str, before: str) -> list[Edit]:
    return [drop(line), insert(line, before)]


FAULTS: dict[str, list[Edit]] = {
    "empty: phase": [swap("& 1) ^ 1)", "& 1))")],
    "empty: no wait": [drop("mbarrier.wait(self.empty")],
    "full: phase": [swap("% self.stages), (n // self.stages) & 1)", "% self.stages), ((n // self.stages) & 1) ^ 1)")],
    "full: stage": [swap("self.full.index(n % self.stages)", "self.full.index((n + 1) % self.stages)")],
    "tile: stage": [swap("self.tiles.index(n % self.stages)", "self.tiles.index((n + 1) % self.stages)")],
    "release: stage": [swap("[self.empty.index(n % self.stages)]", "[self.empty.index((n + 1) % self.stages)]")],
    "release: every lane": [swap("elect.sync _|p, 0xffffffff; @p", "")],
    "load: stage": [swap("self.tiles.index(stage))", "self.tiles.index((stage + 1) % self.stages))")],
    "load: barrier": [swap("index(stage), self.tiles", "index((stage + 1) % self.stages), self.tiles")],
    "load: half the bytes": [swap("desc.block_type.nbytes)", "desc.block_type.nbytes // 2)")],
    "load: twice the bytes": [swap("desc.block_type.nbytes)", "desc.block_type.nbytes * 2)")],
    "barriers: one arrival a warpgroup": [swap("count=readers * WARPS", "count=readers")],
    "barriers: one reader": [swap("count=readers * WARPS", "count=WARPS")],
    "barriers: no fence": [swap("    fence_async_shared()\n    p = ", "    p = ")],
    "producer: query of one consumer": [swap("row + wg * p.ROWS, tiles", "row, tiles")],
    "producer: one query stage": [swap("tiles * CONSUMERS + wg)", "tiles * CONSUMERS)")],
    "producer: tiles not counted": [drop("tiles += 1")],
    "producer: blocks not counted": [swap("        blocks += steps\n        tiles", "        tiles")],
    "producer: key head": [swap("head_q // p.group", "head_q % (p.num_heads_q // p.group)")],
    "producer: value of another block": [swap("col - (i - 1) * p.KEYS", "col - i * p.KEYS")],
    "producer: last value": [swap("col - (steps - 1) * p.KEYS, blocks", "col - steps * p.KEYS, blocks")],
    "no wait for query": [drop("q_ring.wait(query)")],
    "no wait for the first key": [drop("k_ring.wait(blocks)")],
    "no wait for the first value": [drop("v_ring.wait(blocks)")],
    "no wait for key": [drop("k_ring.wait(n)")],
    "no wait for value": [drop("v_ring.wait(n)")],
    "no release of query": [swap("if OWN_OUT:\n            q_ring.release(query)", "pass")],
    "no release of the first key": [drop("k_ring.release(blocks)")],
    "no release of key": [drop("k_ring.release(n)")],
    "no release of value": [drop("v_ring.release(n - 1)")],
    "no release of the last value": [drop("v_ring.release(blocks - 1)")],
    "early release of query": [
        swap("if OWN_OUT:\n            q_ring.release(query)", "pass"),
        insert("if OWN_OUT: q_ring.release(query)", before="for i in range(1, steps):\n            # The scores"),
    ],
    "early release of the first key": [
        drop("k_ring.release(blocks)"),
        swap(
            "        s = warpgroup_mma_wait(num_outstanding=0",
            "        k_ring.release(blocks); s = warpgroup_mma_wait(num_outstanding=0",
        ),
    ],
    "early release of key": move("k_ring.release(n)", before="s = warpgroup_mma_wait(num_outstanding=1"),
    "early release of value": move("v_ring.release(n - 1)", before="v_ring.wait(n)"),
    "early release of the last value": [
        drop("v_ring.release(blocks - 1)"),
        swap(
            "v_ring.tile(blocks - 1), o, is_async=True)",
            "v_ring.tile(blocks - 1), o, is_async=True); v_ring.release(blocks - 1)",
        ),
    ],
    "scores in flight": [swap("num_outstanding=1, deps=[s]", "num_outstanding=2, deps=[s]")],
    "output in flight": [
        swap(
            "v_ring.wait(n)\n            o = warpgroup_mma_wait(num_outstanding=0",
            "v_ring.wait(n)\n            o = warpgroup_mma_wait(num_outstanding=1",
        )
    ],
    "values of this block": [swap("v_ring.tile(n - 1), o", "v_ring.tile(n), o")],
    "ping-pong: nobody starts": [swap("        if WG == 1:\n            _pass_turn(WG)", "        pass")],
    "ping-pong: both start": [swap("        if WG == 1:\n            _pass_turn(WG)", "        _pass_turn(WG)")],
    "ping-pong: last turn not taken": [drop("_take_turn(WG)  # the turn")],
    "ping-pong: turn not passed": [
        swap("                _pass_turn(WG)\n            s =", "                pass\n            s =")
    ],
    "ping-pong: own turn": [swap('"bar.arrive 9, 256;"', '"bar.arrive 8, 256;"')],
    "ping-pong: half the threads": [swap('"bar.sync 8, 256;"', '"bar.sync 8, 128;"')],
    "consumer: tiles not counted": [drop("query += CONSUMERS")],
    "consumer: blocks not counted": [
        swap("        blocks += steps\n        o = ", "        o = "),
        swap("v_ring.tile(blocks - 1)", "v_ring.tile(blocks + steps - 1)"),
        swap("v_ring.release(blocks - 1)", "v_ring.release(blocks + steps - 1)"),
    ],
    "consumer: same rows": [drop("row += WG * p.ROWS")],
    "mask: right edge": [swap("(cols < end)", "(cols <= end)")],
    "mask: left edge": [swap("(cols >= rows + self.band_lo)", "(cols > rows + self.band_lo)")],
    "mask: end of the keys": [swap("gl.where(cols < self.seq_len_k", "gl.where(cols <= self.seq_len_k")],
    "mask: end of the keys, band": [
        swap("end = gl.minimum(rows + self.band_hi + 1, self.seq_len_k)", "end = rows + self.band_hi + 1")
    ],
    "mask: skipped at the left edge": [swap("(col < last_begin)", "(col < last_begin - 1)")],
    "mask: skipped at the right edge": [swap("(col + self.KEYS > first_end)", "(col + self.KEYS > first_end + 1)")],
    "mask: skipped at the end": [
        swap("if col + self.KEYS > self.seq_len_k", "if col + self.KEYS > self.seq_len_k + 1")
    ],
    "mask: only the first row at the left edge": [swap("last_begin = row + self.ROWS - 1", "last_begin = row")],
    "mask: of another block": [swap("p.mask(s, row, col - i * p.KEYS", "p.mask(s, row, col - (i - 1) * p.KEYS")],
    "blocks: last key": [swap("last_row + self.band_hi + 1, keys", "last_row + self.band_hi, keys")],
    "blocks: last row": [swap("self.seq_len_q) - 1", "self.seq_len_q) - 2")],
    "blocks: first key": [swap("row + self.band_lo, 0) //", "row + self.band_lo + 1, 0) //")],
    "blocks: negative": [swap("gl.maximum(row + self.band_lo, 0) //", "(row + self.band_lo) //")],
    "blocks: rounded down": [swap("end = (keys + self.KEYS - 1)", "end = keys")],
    "blocks: blind rows read keys": [swap("self.seq_len_k // self.KEYS + 1)", "0)")],
    "softmax: starts at -inf": [swap("-3.0e38", 'float("-inf")')],
    "softmax: starts at 0": [swap("-3.0e38", "0.0")],
    "softmax: maximum not scaled": [swap("gl.max(s, 1) * scale_log2)", "gl.max(s, 1))")],
    "softmax: sum not rescaled": [swap("l = _scale_rows(l, alpha) + ", "l = l + ")],
    "softmax: output not rescaled": [drop("o = _scale_rows(o, alpha)")],
    "softmax: division by the empty sum": [swap("gl.where(l == 0.0, 0.0, 1.0 / l)", "1.0 / l")],
    "lse: to base 2": [swap(" * LN_2\n", "\n")],
    "lse: beyond the rows": [swap(", mask=rows < p.seq_len_q)", ")")],
    "lse: of the row before": [swap("p.seq_len_q + rows, value", "p.seq_len_q + (rows - 1), value")],
    "lse: null": [swap("lse.to(gl.int64) != 0", "p.seq_len_q != 0")],
    "store: no fence": [swap("        fence_async_shared()\n        tma", "        tma")],
    "store: no wait for the one before": [drop("tma.store_wait(0)  # the store")],
    "store: no barrier after the wait": [swap("has read `out`\n            gl.barrier()\n", "has read `out`\n")],
    "store: query released early": [swap("            tma.store_wait(0)\n            gl.barrier()\n", "")],
    "store: query released by those who did not wait": [
        swap("            gl.barrier()\n            q_ring", "            q_ring")
    ],
    "store: unfinished": [swap("    tma.store_wait(0)\n\n\n", "\n\n")],
    "store: tile of the other consumer": [swap("out_tiles.index(WG)", "out_tiles.index(0)")],
}
SUITE = [
    Case(heads=(1, 4, 2), ctas=2, scale=3.0),
    Case(heads=(1, 2, 1), ctas=1, own_out=False).causal(),
    Case(band=(-20, 5), ctas=2, stages=3),
    Case(seq=(96, 96), ctas=2).causal(),
    Case(seq=(64, 64), band=(-16, 16)),
    Case(seq=(96, 96), band=(-30, 14)),
    Case(seq=(100, 100), band=(-17, 9)),
    Case(seq=(90, 40), band=(-9, 2)),
    Case(seq=(48, 47)),
    Case(seq=(47, 95), band=(-FAR, 1)),
    Case(lse=False),
]


def noticed(text: str) -> str | None:
    """What the suite says about a kernel; None if it finds nothing."""
    kernel = emulator.load(text)["attention_forward_hopper"]
    try:
        for schedule in range(2):
            for case in SUITE:
                check(kernel, case, schedule)
        test_infinite_scores(kernel)
        test_scores_far_from_zero(kernel, -1)
        test_rows_that_see_nothing_read_nothing(kernel)
    except (emulator.KernelError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_the_suite_accepts_the_kernel() -> None:
    assert noticed(SOURCE) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault: str) -> None:
    text = SOURCE
    for edit in FAULTS[fault]:
        text = edit(text)
    assert noticed(text)


# --- machine code ---


@pytest.mark.parametrize(("head_dim", "band"), [(64, False), (128, True), (256, True)])
def test_the_machine_code_overlaps_softmax_and_products(head_dim: int, band: bool, tmp_path: Path) -> None:
    spec = specs.hopper("bf16", head_dim, band)
    ((_, members),) = compile.compile_all([spec], 1)
    assert isinstance(members, list), members
    assert members[0].entry["spill_bytes"] == 0
    (tmp_path / "kernel.cubin").write_bytes(members[0].code)
    sass = compile.run_tool("nvdisasm", "-c", str(tmp_path / "kernel.cubin"))
    for instruction in ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "SYNCS"):
        assert instruction in sass
    # In the loop of either consumer all exponentials come before the wait for the product P V.
    loops = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b(.*?)WARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", sass, re.S)
    exponentials = specs.CONSUMER_ROWS * spec.tile.key // 128 + 2
    assert [loop.count("MUFU.EX2") for loop in loops] == [exponentials] * 2


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
