"""Modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import flashcore
from reference import Case


def test_attention_module(device: str) -> None:
    inputs = Case(heads=4, heads_kv=2, seq_q=20, seq_k=30, dim=32).tensors(device, torch.float16)
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "window": (8, 0), "causal_align": "bottom_right"}
    module = flashcore.nn.Attention(**options, scale=0.25)
    assert torch.equal(module(*inputs), flashcore.attention(*inputs, **options, scale=0.25))
    assert not list(module.parameters())
    assert "window=(8, 0)" in repr(module)
    dropping = flashcore.nn.Attention(dropout_p=0.5, enable_gqa=True)
    assert torch.equal(dropping.eval()(*inputs), flashcore.attention(*inputs, enable_gqa=True))
    torch.manual_seed(0)
    found = dropping.train()(*inputs)
    torch.manual_seed(0)
    assert torch.equal(found, F.scaled_dot_product_attention(*inputs, dropout_p=0.5, enable_gqa=True))


SETUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other widths": {"kdim": 24, "vdim": 40},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
}
MASKS = ("none", "causal", "bool", "float", "per head", "padding", "float padding", "bool and padding", "causal hint")


def masks(kind: str, seq_q: int, seq_k: int, batch: int, heads: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    causal = torch.ones(seq_q, seq_k).triu(1).bool()
    padding = torch.zeros(batch, seq_k, dtype=torch.bool)
    padding[0, -2:] = True
    return {
        "none": {},
        "causal": {"attn_mask": causal},
        "causal hint": {"attn_mask": causal, "is_causal": True},
        "bool": {"attn_mask": torch.rand(seq_q, seq_k, generator=generator) > 0.8},
        "float": {"attn_mask": torch.randn(seq_q, seq_k, generator=generator)},
        "per head": {"attn_mask": torch.randn(batch * heads, seq_q, seq_k, generator=generator)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.zeros(batch, seq_k).masked_fill(padding, float("-inf"))},
        "bool and padding": {"attn_mask": causal, "key_padding_mask": padding},
    }[kind]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("setup", SETUPS)
def test_multihead_attention_is_that_of_torch(setup: str, kind: str, device: str) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(32, 4, **SETUPS[setup]).to(device).eval()
    ours = flashcore.nn.MultiheadAttention(32, 4, **SETUPS[setup]).to(device).eval()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    first = SETUPS[setup].get("batch_first", False)
    shape = (lambda seq, dim: (3, seq, dim)) if first else (lambda seq, dim: (seq, 3, dim))
    query = torch.randn(shape(9, 32), device=device)
    key = torch.randn(shape(9, SETUPS[setup].get("kdim", 32)), device=device)
    value = torch.randn(shape(9, SETUPS[setup].get("vdim", 32)), device=device)
    options = {
        name: mask.to(device) if torch.is_tensor(mask) else mask for name, mask in masks(kind, 9, 9, 3, 4).items()
    }
    with torch.no_grad():
        wanted, _ = theirs(query, key, value, need_weights=False, **options)
        found, weights = ours(query, key, value, **options)
    assert weights is None
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_self_attention_unbatched_and_weights(device: str) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(32, 4, dropout=0.1).to(device).eval()
    ours = flashcore.nn.MultiheadAttention(32, 4, dropout=0.1).to(device).eval()
    ours.load_state_dict(theirs.state_dict())
    for shape in ((7, 32), (7, 2, 32)):
        x = torch.randn(shape, device=device)
        with torch.no_grad():
            torch.testing.assert_close(ours(x, x, x)[0], theirs(x, x, x)[0], rtol=1e-4, atol=1e-5)
            found, wanted = ours(x, x, x, need_weights=True), theirs(x, x, x, need_weights=True)
        torch.testing.assert_close(found, wanted)


def test_training(device: str) -> None:
    """There is no backward yet: gradients are torch's."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True).to(device)
    ours = flashcore.nn.MultiheadAttention(32, 4, batch_first=True).to(device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 32, device=device)
    for module in (theirs, ours):
        module(x, x, x, need_weights=False)[0].square().sum().backward()
    for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-4)
