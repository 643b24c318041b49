"""The answers, everywhere attention runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flashcore
from reference import BANDS, EMPTY, SCALES, SHAPES, Case, assert_correct, visible

Place = tuple[str, torch.dtype]


def run(case: Case, place: Place, attn_mask: Tensor | None = None) -> None:
    inputs = case.tensors(*place)
    out, lse = flashcore.attention(*inputs, attn_mask, return_lse=True, **case.options)
    assert_correct(case, inputs, out, lse, attn_mask)
    assert torch.equal(out, flashcore.attention(*inputs, attn_mask, **case.options))


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: Case, place: Place) -> None:
    run(case, place)


@pytest.mark.parametrize("case", BANDS, ids=str)
def test_causal_and_windows(case: Case, place: Place) -> None:
    run(case, place)


@pytest.mark.parametrize("case", SCALES, ids=str)
def test_scales(case: Case, place: Place) -> None:
    run(case, place)


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_nothing_to_do(case: Case, place: Place) -> None:
    inputs = case.tensors(*place)
    if place[0] == "cuda" and case.dim == 0:
        with pytest.raises(flashcore.UnsupportedError, match="head_dim 0"):
            flashcore.attention(*inputs, return_lse=True)
        return
    out, lse = flashcore.attention(*inputs, return_lse=True, **case.options)
    assert out.shape == (*inputs[0].shape[:3], inputs[2].shape[3])
    assert not out.any()
    assert lse.shape == out.shape[:3]
    if case.seq_k == 0:
        assert torch.all(lse == float("-inf"))


@pytest.mark.parametrize("case", BANDS, ids=str)
def test_a_band_is_the_same_as_its_mask(case: Case, device: str) -> None:
    inputs = case.tensors(device, torch.float16)
    seen = visible(case).to(device)
    masked = flashcore.attention(*inputs, attn_mask=seen)
    torch.testing.assert_close(flashcore.attention(*inputs, **case.options), masked, rtol=2e-3, atol=2e-3)


MASK_SHAPES = [(5, 7), (1, 7), (5, 1), (3, 5, 7), (1, 5, 7), (2, 3, 5, 7), (2, 1, 1, 7), (1, 3, 5, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float32", "query"])
def test_masks_broadcast(shape: tuple[int, ...], kind: str, place: Place) -> None:
    device, dtype = place
    if kind == "float32" and dtype == torch.float64:
        pytest.skip("covered by the query's own type")
    seed = torch.Generator().manual_seed(1)
    mask = torch.randn(shape, generator=seed).to(device)
    mask = mask > -0.7 if kind == "bool" else mask.to(dtype if kind == "query" else torch.float32)
    run(Case(), place, mask)


def test_masks_of_any_strides(place: Place) -> None:
    seed = torch.Generator().manual_seed(2)
    wide = (torch.randn(7, 2, 5, 6, generator=seed) > -1).to(place[0])
    run(Case(), place, wide[..., ::2].permute(1, 3, 2, 0))


def test_a_mask_and_a_window(place: Place) -> None:
    seed = torch.Generator().manual_seed(3)
    run(Case(window=(2, 1)), place, (torch.randn(5, 7, generator=seed) > -0.5).to(place[0]))


def test_rows_that_see_nothing_are_zero(place: Place) -> None:
    device, dtype = place
    case = Case(seq_q=9, seq_k=9)
    inputs = case.tensors(device, dtype)
    seen = torch.ones(9, 9, dtype=torch.bool, device=device)
    seen[4] = False
    additive = torch.zeros(9, 9, device=device).masked_fill(~seen, float("-inf")).to(dtype)
    for mask in (seen, additive):
        out, lse = flashcore.attention(*inputs, mask, return_lse=True)
        assert torch.all(out[:, :, 4] == 0)
        assert torch.all(lse[:, :, 4] == float("-inf"))
        assert_correct(case, inputs, out, lse, mask)
    out, lse = flashcore.attention(*inputs, window=(0, 3), causal_align="bottom_right", return_lse=True)
    assert torch.isfinite(out).all()


BROADCAST = [
    ((2, 4), (1, 4), (1, 4)),
    ((2, 4), (2, 1), (2, 1)),
    ((1, 4), (2, 4), (2, 4)),
    ((2, 1), (2, 4), (2, 4)),
    ((2, 4), (2, 4), (1, 1)),
    ((2, 4), (2, 1), (2, 4)),
]


@pytest.mark.parametrize("sizes", BROADCAST, ids=str)
def test_batches_and_heads_broadcast_as_in_sdpa(sizes: tuple[tuple[int, int], ...], device: str) -> None:
    seed = torch.Generator().manual_seed(4)
    inputs = [torch.randn(*size, 6, 8, generator=seed).to(device, torch.float16) for size in sizes]
    out = flashcore.attention(*inputs)
    expected = F.scaled_dot_product_attention(*(x.double() for x in inputs))
    assert out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("case", [Case(dim=32), Case(dim=32, dim_v=16), Case(heads=6, heads_kv=2, dim=64)], ids=str)
def test_layouts_without_copies(case: Case, place: Place) -> None:
    inputs = case.tensors(*place)
    plain = flashcore.attention(*inputs, **case.options)
    permuted = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    out = flashcore.attention(*permuted, **case.options)
    assert torch.equal(out, plain)
    assert out.transpose(1, 2).is_contiguous(), "the output has the query's order of dimensions"
    padded = [torch.cat([torch.full_like(x, 9.0)[..., :3, :], x], dim=2)[:, :, 3:] for x in inputs]
    assert torch.equal(flashcore.attention(*padded, **case.options), plain)


def test_slices_of_a_packed_projection(place: Place) -> None:
    device, dtype = place
    case = Case(seq_q=20, seq_k=20, dim=16)
    packed = torch.randn(2, 20, 3, 3, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    query, key, value = packed.to(device, dtype).permute(2, 0, 3, 1, 4)
    out = flashcore.attention(query, key, value)
    assert_correct(case, (query, key, value), out)
    assert out.stride() == torch.empty_like(query).stride()


def test_expanded_and_unaligned_inputs(place: Place) -> None:
    device, dtype = place
    case = Case(seq_q=12, seq_k=12, dim=16)
    query, key, value = case.tensors(device, dtype)
    one_off = torch.empty(query.numel() + 1, dtype=dtype, device=device)[1:].view_as(query).copy_(query)
    assert_correct(case, (query, key, value), flashcore.attention(one_off, key, value))
    shared = key[:, :1].expand(-1, 3, -1, -1)
    assert_correct(case, (query, shared, value), flashcore.attention(query, shared, value))


def test_out_is_written_and_nothing_else(place: Place) -> None:
    device, dtype = place
    case = Case(seq_q=13, seq_k=29, dim=40)
    inputs = case.tensors(device, dtype)
    around = torch.full((4, 5, 15, 56), 7.0, dtype=dtype, device=device)
    before = around.clone()
    out = around[1:3, 1:4, 1:14, 8:48]
    assert flashcore.attention(*inputs, out=out) is out
    assert_correct(case, inputs, out)
    before[1:3, 1:4, 1:14, 8:48] = out
    assert torch.equal(around, before)


def test_out_with_lse(place: Place) -> None:
    inputs = Case().tensors(*place)
    out = torch.empty_like(inputs[0])
    returned, lse = flashcore.attention(*inputs, out=out, return_lse=True)
    assert returned is out
    assert_correct(Case(), inputs, out, lse)


def test_inputs_are_left_alone(place: Place) -> None:
    inputs = Case(seq_q=65, seq_k=65).tensors(*place)
    before = [x.clone() for x in inputs]
    flashcore.attention(*inputs, is_causal=True)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_what_is_not_finite_stays_in_its_head(place: Place) -> None:
    query, key, value = Case(seq_q=40, seq_k=40).tensors(*place)
    plain = flashcore.attention(query, key, value)
    key[0, 1, 3] = float("nan")
    value[1, 2, 5] = float("inf")
    out = flashcore.attention(query, key, value)
    assert torch.isnan(out[0, 1]).all()
    assert not torch.isfinite(out[1, 2]).any()
    for batch, head in ((0, 0), (0, 2), (1, 0), (1, 1)):
        assert torch.equal(out[batch, head], plain[batch, head])


def test_repeats_are_bit_identical(place: Place) -> None:
    case = Case(seq_q=150, seq_k=200, dim=64, is_causal=True)
    inputs = case.tensors(*place)
    first = flashcore.attention(*inputs, **case.options)
    out = torch.empty_like(first)
    for _ in range(200):
        flashcore.attention(*inputs, out=out, **case.options)
        assert torch.equal(out, first)


def test_agrees_with_sdpa(place: Place) -> None:
    device, dtype = place
    query, key, value = Case(seq_q=50, seq_k=60, dim=64).tensors(device, dtype)
    mask = torch.randn(50, 60, generator=torch.Generator().manual_seed(6)).to(device) > 0
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 0.3}, {"scale": -0.1}):
        expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), **options)
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
        ours = flashcore.attention(query, key, value, **options)
        torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


sizes = st.integers(1, 70)


@settings(max_examples=60, deadline=None)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 2),
        heads=st.just(4),
        heads_kv=st.sampled_from([1, 2, 4]),
        seq_q=sizes,
        seq_k=sizes,
        dim=sizes,
        dim_v=st.none() | sizes,
        is_causal=st.booleans(),
        causal_align=st.sampled_from(["top_left", "bottom_right"]),
        window=st.none() | st.tuples(st.none() | st.integers(0, 80), st.none() | st.integers(0, 80)),
        scale=st.none() | st.floats(-2, 2, width=32),
    ),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    order=st.permutations([0, 1, 2]),
)
def test_any_call_is_correct(case: Case, dtype: torch.dtype, order: list[int]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inverse = [order.index(dim) for dim in range(3)]
    inputs = tuple(x.permute(*order, 3).contiguous().permute(*inverse, 3) for x in case.tensors(device, dtype))
    out, lse = flashcore.attention(*inputs, return_lse=True, **case.options)
    assert_correct(case, inputs, out, lse)
