"""FlashCore as an attention implementation of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcore.errors import InvalidArgumentError, UnsupportedError
from flashcore.functional import attention


def forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' own SDPA function, with FlashCore in the place of SDPA: same arguments, same rules for causal."""
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise UnsupportedError(f'{name}: the model asks for it, and "fcore" has it not yet; use "eager"')
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    out = attention(query, key, value, attention_mask, dropout, causal, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def register_transformers(name: str = "fcore") -> str:
    """Adds FlashCore to transformers' attention implementations: `model.set_attn_implementation("fcore")`.

    Its mask function is registered too, without which padding and sliding windows would be lost. Returns the name.
    """
    if "flash" in name:
        accepted = "one without: transformers takes such a name for a flash-attn package"
        raise InvalidArgumentError(f'name: given {name!r}, which has "flash" in it; accepted {accepted}')
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise UnsupportedError(f"transformers 4.53 or newer is needed: {error}") from error
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name
