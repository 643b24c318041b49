"""The portable forward in Triton's interpreter, against the fp64 oracle."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from kernels import specs
from kernels.tests import interpreter
from kernels.tests.problem import FAR, Array, Problem, attend, inputs, tolerance, visible

Attention = Callable[..., tuple[Array, Array]]


@pytest.fixture(scope="module")
def attention() -> Iterator[Attention]:
    """attention(problem, tensors, shape, tile) in the interpreter; the spec is the matrix's, with small tiles."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:

        def run(
            problem: Problem, tensors: dict[str, Array], shape: specs.Shape | None = None, tile: int | None = None
        ) -> tuple[Array, Array]:
            tile = tile or min(t for t in specs.TILES if t >= max(problem.head_dim_qk, problem.head_dim_v))
            band = problem.band is not None or problem.mask != "none"
            shape = shape or specs.Shape(32, 16, 4, 1)
            spec = specs.forward("sm_80", "f16", tile, band, problem.mask, problem.alignment, shape)
            return pool.submit(interpreter.run, spec, problem, tensors).result()

        yield run


def check(problem: Problem, tensors: dict[str, Array], out: Array, lse: Array) -> None:
    exact, exact_lse = attend(problem, tensors, np.float64)
    np.testing.assert_allclose(out, exact, rtol=0, atol=tolerance(problem, tensors, exact))
    if problem.lse:
        np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-5)


def causal(problem: Problem, bottom_right: bool = False) -> Problem:
    return replace(problem, band=(-FAR, problem.seq_k - problem.seq_q if bottom_right else 0))


BASE = Problem()
EXACT = Problem(alignment="exact")
PROBLEMS = {
    "one row, one key": Problem(1, 1, 1, 1, num_heads_q=1),
    "no keys": replace(BASE, seq_k=0),
    "no keys, band": replace(causal(BASE), seq_k=0),
    "whole tiles": replace(EXACT, seq_q=64, seq_k=64),
    "one more than a tile": replace(EXACT, seq_q=33, seq_k=17),
    "one less than a tile": replace(EXACT, seq_q=31, seq_k=15),
    "many keys": replace(EXACT, seq_q=3, seq_k=333),
    "grouped heads": replace(BASE, batch=2, num_heads_q=6, num_heads_kv=2),
    "heads apart": replace(BASE, batch=2, num_heads_q=3, num_heads_kv=3),
    "batch, seq, head order": replace(EXACT, batch=2, num_heads_q=4, layout="bshd"),
    "unaligned, batch, seq, head order": replace(BASE, batch=2, num_heads_q=4, num_heads_kv=4, layout="bshd"),
    "head_dim 1": replace(BASE, head_dim_qk=1, head_dim_v=1, scale=1.0),
    "head_dim 8": replace(BASE, head_dim_qk=8, head_dim_v=8, alignment="aligned"),
    "head_dim 40": replace(BASE, head_dim_qk=40, head_dim_v=40, alignment="aligned"),
    "head_dim 111": replace(BASE, head_dim_qk=111, head_dim_v=111),
    "head_dim 192": replace(BASE, head_dim_qk=192, head_dim_v=192, alignment="aligned", seq_q=5),
    "head_dim 256": replace(EXACT, head_dim_qk=256, head_dim_v=256, seq_q=5),
    "wide query, narrow value": replace(BASE, head_dim_qk=48, head_dim_v=17),
    "narrow query, wide value": replace(BASE, head_dim_qk=8, head_dim_v=64, alignment="aligned"),
    "causal": causal(EXACT),
    "causal, more rows": replace(causal(EXACT), seq_q=90),
    "causal, bottom right": causal(replace(EXACT, seq_q=40, seq_k=70), True),
    "causal, bottom right, blind rows": causal(replace(BASE, seq_q=70, seq_k=40), True),
    "causal, one row": causal(replace(EXACT, seq_q=1, seq_k=70), True),
    "window": replace(EXACT, seq_q=100, seq_k=100, band=(-20, 0)),
    "window of one key": replace(BASE, seq_q=50, seq_k=50, band=(0, 0)),
    "window ahead": replace(BASE, seq_q=60, seq_k=80, band=(3, 40)),
    "window wider than a tile": replace(EXACT, seq_q=100, seq_k=150, band=(-70, 50)),
    "window that leaves the keys": replace(BASE, seq_q=100, seq_k=30, band=(-10, 10)),
    "window before the keys": replace(BASE, band=(-FAR, -45)),
    "window beyond the keys": replace(BASE, band=(60, FAR)),
    "empty band": replace(BASE, band=(5, 4)),
    "unbounded band": replace(BASE, band=(-FAR, FAR)),
    "negative scale": replace(BASE, scale=-0.3),
    "negative scale, causal": replace(causal(EXACT), scale=-2.0),
    "zero scale": replace(EXACT, scale=0.0),
    "zero scale, causal": replace(causal(BASE), scale=0.0),
    "large scale": replace(EXACT, scale=30.0),
    "without lse": replace(EXACT, lse=False),
    "without lse, causal": replace(causal(BASE), lse=False),
    "mask": replace(BASE, mask="bool", batch=2, num_heads_q=4, num_heads_kv=2),
    "mask of keys": replace(BASE, mask="bool", batch=2, mask_dims=(0, 3)),
    "mask of rows": replace(BASE, mask="bool", mask_dims=(2,)),
    "mask of heads": replace(BASE, mask="bool", mask_dims=(1, 2, 3), alignment="aligned"),
    "mask of every other byte": replace(BASE, mask="bool", mask_step=2, alignment="aligned"),
    "mask, causal": replace(causal(BASE), mask="bool", num_heads_q=1),
    "mask, no keys": replace(BASE, mask="bool", seq_k=0, num_heads_q=1),
    "additive mask": replace(BASE, mask="f16", batch=2, alignment="aligned"),
    "additive mask, f32": replace(BASE, mask="f32", batch=2, mask_dims=(2, 3)),
    "additive mask, every third": replace(BASE, mask="f32", mask_step=3, mask_dims=(0, 3), batch=2),
    "additive mask, window": replace(BASE, mask="f32", band=(-20, 3)),
    "additive mask, negative scale": replace(BASE, mask="f16", scale=-0.5),
    "additive mask, zero scale": replace(BASE, mask="f32", scale=0.0),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_numbers(attention: Attention, problem: Problem) -> None:
    tensors = inputs(problem)
    check(problem, tensors, *attention(problem, tensors))


@pytest.mark.parametrize("offset", range(-24, 24, 3))
def test_band_edges_at_every_place_of_a_key_tile(attention: Attention, offset: int) -> None:
    problem = Problem(33, 64, num_heads_q=1, band=(offset, offset + 9))
    tensors = inputs(problem)
    check(problem, tensors, *attention(problem, tensors))


@pytest.mark.parametrize("tile", specs.TILES)
def test_head_dim_in_a_wider_tile(attention: Attention, tile: int) -> None:
    problem = replace(causal(BASE), head_dim_qk=24, head_dim_v=16, alignment="aligned", seq_q=20)
    tensors = inputs(problem)
    check(problem, tensors, *attention(problem, tensors, tile=tile))


@pytest.mark.parametrize(("arch", "loads"), [(arch, key) for arch in specs.SHAPES_OF for key in specs.SHAPES_OF[arch]])
def test_shapes_of_the_matrix(attention: Attention, arch: str, loads: tuple[str, int]) -> None:
    kind, tile = loads
    problem = replace(causal(BASE), seq_q=130, seq_k=150, num_heads_q=1, head_dim_qk=tile, head_dim_v=tile)
    alignment = "aligned" if kind.startswith("wide") else "unaligned"
    problem = replace(problem, alignment=alignment, mask="f32" if kind.endswith("mask") else "none")
    tensors = inputs(problem)
    check(problem, tensors, *attention(problem, tensors, specs.SHAPES_OF[arch][loads]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["k", "v"])
def test_what_is_not_finite_reaches_the_rows_that_see_it(attention: Attention, tensor: str, bad: float) -> None:
    problem = Problem(80, 80, batch=2, num_heads_q=4, num_heads_kv=2, band=(-10, 10))
    tensors = inputs(problem)
    tensors[tensor][1, 1, 40, 5] = bad
    out, _ = attention(problem, tensors)
    clean = np.asarray(np.isfinite(out).all(-1))
    reached = visible(problem, tensors)[1, 2:, :, 40]
    if tensor == "k" and not np.isnan(bad):  # scores of +inf and -inf, by the sign of the query
        scores = tensors["q"][1, 2:, :, 5].astype(np.float64) * bad
        reached = reached & (scores == np.inf)
    assert not clean[1, 2:][reached].any()
    assert clean[0].all(), "another batch"
    assert clean[1, :2].all(), "other heads"
    assert clean[1, 2:, 64:].all(), "a query tile that does not visit the key"


def test_a_mask_of_the_lowest_number_is_not_a_mask_of_minus_infinity(attention: Attention) -> None:
    problem = replace(BASE, mask="f32")
    tensors = inputs(problem)
    mask = np.zeros((1, 2, problem.seq_q, problem.seq_k), np.float32)
    mask[:, :, 7] = np.finfo(np.float32).min  # every key of the row: as if there were no scores
    tensors["attn_mask"] = mask
    out, lse = attention(problem, tensors)
    np.testing.assert_allclose(out[0, :, 7], np.repeat(tensors["v"].mean(2), 2, 1)[0], atol=1e-3)
    assert np.isfinite(lse).all()


def test_the_same_bits_twice(attention: Attention) -> None:
    problem = causal(replace(BASE, seq_q=70))
    tensors = inputs(problem)
    for first, second in zip(attention(problem, tensors), attention(problem, tensors), strict=True):
        np.testing.assert_array_equal(first, second)
