"""The functions of flash-attn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flashcore
from flashcore.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache


def drawn(shape: tuple[int, ...], device: str, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.float16)


def expected(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int], scale: float | None) -> Tensor:
    """The long way, diagonal at the bottom right."""
    offset = torch.arange(k.shape[1])[None] - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
    seen = torch.ones_like(offset, dtype=torch.bool)
    if causal:
        seen &= offset <= 0
    if window[0] >= 0:
        seen &= offset >= -window[0]
    if window[1] >= 0:
        seen &= offset <= window[1]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, seen.to(q.device), scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"causal": True},
    "window": {"window_size": (5, 3)},
    "left": {"window_size": (4, -1), "causal": True},
    "scale": {"softmax_scale": 0.3},
}


def wanted(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    window = options.get("window_size", (-1, -1))
    return expected(q, k, v, options.get("causal", False), window, options.get("softmax_scale"))


def close(found: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(found.double(), reference, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", [(20, 20), (9, 33), (33, 9)], ids=str)
def test_func(lengths: tuple[int, int], options: dict[str, Any], device: str) -> None:
    q = drawn((2, lengths[0], 6, 32), device, 0)
    k, v = (drawn((2, lengths[1], 2, 32), device, seed) for seed in (1, 2))
    close(flash_attn_func(q, k, v, **options), wanted(q, k, v, options))
    out, lse, dropped = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert torch.equal(out, flash_attn_func(q, k, v, **options))
    assert lse.shape == (2, 6, lengths[0])
    assert dropped is None


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_varlen(options: dict[str, Any], device: str) -> None:
    ends_q, ends_k = [0, 5, 5, 22], [0, 9, 12, 40]
    q, k, v = (drawn((total, 4, 32), device, total) for total in (22, 40, 40))
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in (ends_q, ends_k))
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 17, 28, **options, return_attn_probs=True)
    assert lse.shape == (4, 22)
    for i in range(3):
        rows, keys = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        if rows.start < rows.stop:
            close(out[None, rows], wanted(q[None, rows], k[None, keys], v[None, keys], options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", ["int", "tensor"])
@pytest.mark.parametrize("new", [0, 1, 3])
def test_kvcache(new: int, lengths: str, options: dict[str, Any], device: str) -> None:
    k_cache, v_cache = (drawn((2, 40, 2, 32), device, seed) for seed in (0, 1))
    q = drawn((2, max(new, 1), 6, 32), device, 2)
    k, v = (drawn((2, new, 2, 32), device, seed) for seed in (3, 4))
    used = [20, 20] if lengths == "int" else [7, 31]
    seqlens = 20 if lengths == "int" else torch.tensor(used, dtype=torch.int32, device=device)
    fresh = {"k": k, "v": v} if new else {}
    before = k_cache.clone()
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, **fresh, cache_seqlens=seqlens, **options, return_softmax_lse=True
    )
    assert lse.shape == (2, 6, q.shape[1])
    for row, length in enumerate(used):
        if new:
            assert torch.equal(k_cache[row, length : length + new], k[row])
            assert torch.equal(k_cache[row, :length], before[row, :length])
        parts = (q[row : row + 1], k_cache[row : row + 1, : length + new], v_cache[row : row + 1, : length + new])
        close(out[row : row + 1], wanted(*parts, options))


REFUSED: dict[str, Any] = {
    "dropout_p": 0.1,
    "softcap": 30.0,
    "alibi_slopes": torch.ones(4),
    "block_table": torch.zeros(1, 1, dtype=torch.int32),
    "rotary_cos": torch.ones(1, 1),
    "rotary_sin": torch.ones(1, 1),
    "cache_batch_idx": torch.zeros(1),
    "cache_leftpad": torch.zeros(1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_yet(name: str) -> None:
    x = torch.randn(1, 5, 4, 8)
    ends = torch.tensor([0, 5], dtype=torch.int32)
    calls = {
        flash_attn_func: (x, x, x),
        flash_attn_varlen_func: (x[0], x[0], x[0], ends, ends, 5, 5),
        flash_attn_with_kvcache: (x, x, x),
    }
    taken = 0
    for function, inputs in calls.items():
        if name in function.__annotations__:
            taken += 1
            with pytest.raises(flashcore.UnsupportedError, match=f"{name}: given .*; not there yet"):
                function(*inputs, **{name: REFUSED[name]})
    assert taken
    with pytest.raises(flashcore.UnsupportedError, match="cache_seqlens: given None with new keys"):
        flash_attn_with_kvcache(x, x, x, x, x)
