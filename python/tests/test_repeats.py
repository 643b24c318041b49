"""Calls that look like earlier ones: what is remembered of them must not show in what they compute."""

from __future__ import annotations

import concurrent.futures
import random
from typing import Any

import pytest
import torch

import flashcore

Tensor = torch.Tensor
SHAPES = ((2, 4, 32, 64), (2, 4, 64, 32), (4, 2, 32, 64), (1, 8, 64, 32))
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"scale": 0.5},
    {"window": (3, 0)},
    {"return_lse": True},
)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(as_tuple(one), as_tuple(other), strict=True))


def first(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """The same call on a thread that remembers none."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        result = thread.submit(flashcore.attention, q, k, v, **options).result()
    if q.is_cuda:
        torch.cuda.synchronize()
    return result


def test_one_memory_under_many_layouts(device: str) -> None:
    """The addresses stay; shapes, strides, types and options change."""
    # Of moderate size as numbers of either type.
    memory = [torch.randn(1 << 14, device=device).bfloat16() for _ in range(3)]
    out = torch.empty(1 << 14, device=device, dtype=torch.float16)
    choose = random.Random(0)
    for _ in range(200):
        shape = choose.choice(SHAPES)
        dtype = choose.choice((torch.float16, torch.bfloat16))
        options = choose.choice(OPTIONS)
        q, k, v = (x.view(dtype)[: 4 * 2 * 32 * 64].view(shape) for x in memory)
        if choose.random() < 0.5:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        expected = first(q, k, v, **options)
        assert same(flashcore.attention(q, k, v, **options), expected)
        where = out.view(dtype)[: q.numel()].view(q.shape)
        assert same(flashcore.attention(q, k, v, **options, out=where), expected)


def test_contents_change_in_place(device: str) -> None:
    q, k, v = (torch.randn(2, 4, 48, 64, device=device).half() for _ in range(3))
    out = torch.empty_like(q)
    for _ in range(5):
        for x in (q, k, v):
            x.normal_()
        expected = first(q, k, v)
        assert torch.equal(flashcore.attention(q, k, v, out=out), expected)
        assert torch.equal(torch.ops.flashcore.attention(q, k, v), expected)


def test_many_tensors_in_any_order(device: str) -> None:
    """More calls than are remembered, each several times; results that are freed and kept."""
    sets = [tuple(torch.randn(1, 2, 16 + n % 3, 64, device=device).half() for _ in range(3)) for n in range(400)]
    expected = [first(*tensors) for tensors in sets]
    choose = random.Random(1)
    kept = []
    for _ in range(1200):
        turn = choose.randrange(len(sets)) if choose.random() < 0.5 else choose.randrange(8)
        result = flashcore.attention(*sets[turn])
        assert torch.equal(result, expected[turn])
        if choose.random() < 0.3:
            kept.append(result)


def test_a_refusal_is_repeated(device: str) -> None:
    q, k, v = (torch.randn(1, 2, 16, 64, device=device).half() for _ in range(3))
    for _ in range(3):
        flashcore.attention(q, k, v, out=torch.empty_like(q))
        with pytest.raises(flashcore.InvalidArgumentError, match="out: given memory shared with query"):
            flashcore.attention(q, k, v, out=q)
        with pytest.raises(flashcore.InvalidArgumentError, match="out: "):
            flashcore.attention(q, k, v, out=torch.empty_like(q)[:, :1])


def test_last_plan_follows(device: str) -> None:
    q, k, v = (torch.randn(1, 2, 16, 64, device=device).half() for _ in range(3))
    for _ in range(3):
        for causal in (False, True):
            flashcore.attention(q, k, v, is_causal=causal)
            plan = flashcore.last_plan()
            assert plan is not None
            assert ("causal" in plan.request or "band" in plan.request) is causal, plan.request


def test_streams_change(cuda: str) -> None:
    q, k, v = (torch.randn(2, 4, 64, 64, device=cuda).half() for _ in range(3))
    expected = first(q, k, v)
    out = torch.empty_like(q)
    streams = [torch.cuda.Stream() for _ in range(3)] + [torch.cuda.default_stream()]
    torch.cuda.synchronize()
    for turn in range(24):
        with torch.cuda.stream(streams[turn % len(streams)]):
            out.fill_(torch.nan)
            flashcore.attention(q, k, v, out=out)
            # On the same stream, so that it sees the result only if the call was queued there.
            copy = out.clone()
        torch.cuda.synchronize()
        assert torch.equal(copy, expected), turn
