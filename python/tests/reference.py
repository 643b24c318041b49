"""What attention should give, and how far from it an answer may be."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

ULP = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-23, torch.float64: 2**-52}


@dataclass(frozen=True)
class Case:
    """One call: sizes, and the options of `flashcore.attention`."""

    batch: int = 2
    heads: int = 3
    heads_kv: int = 3
    seq_q: int = 5
    seq_k: int = 7
    dim: int = 16
    dim_v: int | None = None
    is_causal: bool = False
    causal_align: str = "top_left"
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None

    def __str__(self) -> str:
        default = Case()
        changed = [name for name in vars(self) if getattr(self, name) != getattr(default, name)]
        return ",".join(f"{name}={getattr(self, name)}" for name in changed) or "default"

    def tensors(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, drawn independently."""
        seed = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))
        kv = self.batch, self.heads_kv, self.seq_k
        shapes = (self.batch, self.heads, self.seq_q, self.dim), (*kv, self.dim), (*kv, self.dim_v or self.dim)
        query, key, value = (torch.randn(shape, generator=seed, dtype=torch.float64) for shape in shapes)
        return query.to(device, dtype), key.to(device, dtype), value.to(device, dtype)

    @property
    def options(self) -> dict[str, Any]:
        """The call's keyword arguments."""
        return {
            "is_causal": self.is_causal,
            "causal_align": self.causal_align,
            "window": self.window,
            "scale": self.scale,
            "enable_gqa": self.heads != self.heads_kv,
        }


def visible(case: Case) -> Tensor:
    """(seq_q, seq_k): which keys causal and window let each query see."""
    diagonal = 0 if case.causal_align == "top_left" else case.seq_k - case.seq_q
    offset = torch.arange(case.seq_k)[None, :] - torch.arange(case.seq_q)[:, None] - diagonal
    left, right = case.window or (None, None)
    seen = torch.ones(case.seq_q, case.seq_k, dtype=torch.bool)
    if left is not None:
        seen &= offset >= -left
    if right is not None:
        seen &= offset <= right
    if case.is_causal:
        seen &= offset <= 0
    return seen


def eager(
    case: Case, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, accumulate: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attention the long way, with a softmax in `accumulate`: the output and the log-sum-exp, in that type."""
    group = query.shape[1] // max(key.shape[1], 1)
    key, value = (x.repeat_interleave(group, 1).to(accumulate) for x in (key, value))
    # The scale is a float32 everywhere in FlashCore.
    scale = torch.tensor(case.dim**-0.5 if case.dim and case.scale is None else case.scale or 0.0, dtype=torch.float32)
    scores = (query.to(accumulate) @ key.transpose(-1, -2)) * scale.to(query.device, accumulate)
    hidden = ~visible(case).to(query.device)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = hidden | ~attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask.to(accumulate)
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], float("-inf"))
    weights = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
    if accumulate != torch.float64:
        weights = weights.to(query.dtype).to(accumulate)
    return weights @ value, lse


def assert_correct(
    case: Case,
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> None:
    """The field's rule: an error of at most 1.5 times that of eager attention in float32, and one ulp of the output."""
    query = inputs[0]
    wanted, wanted_lse = eager(case, *inputs, attn_mask, torch.float64)
    assert out.shape == wanted.shape
    assert out.dtype == query.dtype
    assert out.device == query.device
    if wanted.numel() == 0:
        return
    if query.dtype == torch.float64:
        allowed = 1e-13 * wanted.abs().max()
    else:
        plain = eager(case, *inputs, attn_mask, torch.float32)[0].to(query.dtype)
        allowed = 1.5 * (plain.double() - wanted).abs().max() + ULP[query.dtype] * wanted.abs().max()
    error = (out.double() - wanted).abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
    if lse is not None:
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


SHAPES = (
    Case(),
    Case(seq_q=1, seq_k=1, dim=1),
    Case(seq_q=63, seq_k=65, dim=64),
    Case(seq_q=64, seq_k=64, dim=64),
    Case(seq_q=129, seq_k=127, dim=32),
    Case(seq_q=1, seq_k=300, dim=128),
    Case(seq_q=300, seq_k=1, dim=40),
    Case(seq_q=33, seq_k=257, dim=80),
    Case(batch=1, heads=1, heads_kv=1, seq_q=100, seq_k=100, dim=256),
    Case(seq_q=17, seq_k=31, dim=111),
    Case(seq_q=17, seq_k=31, dim=64, dim_v=32),
    Case(seq_q=17, seq_k=31, dim=8, dim_v=24),
    Case(heads=8, heads_kv=2, seq_q=40, seq_k=70, dim=64),
    Case(heads=32, heads_kv=1, seq_q=9, seq_k=33, dim=32),
)

BANDS = tuple(
    replace(case, is_causal=causal, causal_align=align, window=window)
    for case in (Case(seq_q=70, seq_k=90, dim=32), Case(seq_q=90, seq_k=70, dim=32))
    for causal, window in ((True, None), (False, (10, 3)), (False, (None, 0)), (True, (5, None)), (False, (0, 0)))
    for align in ("top_left", "bottom_right")
)

SCALES = tuple(Case(seq_q=20, seq_k=40, dim=32, scale=scale) for scale in (0.0, -0.25, 1.0, 3.0))

EMPTY = tuple(
    replace(Case(), **dict.fromkeys(names, 0))
    for names in (("batch",), ("seq_q",), ("seq_k",), ("seq_q", "seq_k"), ("dim",), ("heads", "heads_kv"))
)
