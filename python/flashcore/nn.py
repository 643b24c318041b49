"""Modules that attend with FlashCore."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashcore.functional import Align, Backend, Window, attention


class Attention(torch.nn.Module):
    """`flashcore.attention` as a module without parameters; its options are those of the function."""

    def __init__(
        self,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        window: Window | None = None,
        causal_align: Align = "top_left",
        dropout_p: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.scale = scale
        self.enable_gqa = enable_gqa
        self.window = window
        self.causal_align: Align = causal_align
        self.dropout_p = dropout_p
        self.backend: Backend = backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return attention(
            query,
            key,
            value,
            attn_mask,
            self.dropout_p if self.training else 0.0,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
            window=self.window,
            causal_align=self.causal_align,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_") and value
        )


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with its parameters and its arguments, attending with FlashCore.

    A state_dict of the one loads into the other. Attention weights, which FlashCore never has in memory, are returned
    only by torch's own way: ask for them with `need_weights=True`, whose default is False here.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights or self.bias_k is not None or self.add_zero_attn:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(1 - self.batch_first) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self.split(x) for x in self.project(query, key, value))
        mask = self.merge(attn_mask, key_padding_mask, q, k)
        # torch takes `is_causal` as a hint about the mask that comes with it.
        causal = is_causal and mask is None
        dropout = self.dropout if self.training else 0.0
        attended = attention(q, k, v, mask, dropout, causal).transpose(1, 2).flatten(2)
        out = F.linear(attended, self.out_proj.weight, self.out_proj.bias)
        if not self.batch_first:
            out = out.transpose(0, 1)
        return (out if batched else out.squeeze(1 - self.batch_first)), None

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections of the inputs, in one product where the inputs are one."""
        if self._qkv_same_embed_dim:
            weight = self.in_proj_weight
            if query is key and key is value:
                packed = F.linear(query, weight, self.in_proj_bias).chunk(3, dim=-1)
                return packed[0], packed[1], packed[2]
            weights = list(weight.chunk(3))
        else:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))
        projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        return projected[0], projected[1], projected[2]

    def split(self, x: Tensor) -> Tensor:
        """(batch, heads, seq, head_dim): a view, no copy."""
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def merge(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, key: Tensor
    ) -> Tensor | None:
        """torch's two masks, in which True hides, as one of SDPA's, in which True shows."""
        batch, heads, seq_q, _ = query.shape
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.view(batch, heads, seq_q, key.shape[2])
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None, :]
        masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
        if not masks:
            return None
        if all(mask.dtype == torch.bool for mask in masks):
            hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
            return ~hidden
        total = additive(masks[0], query.dtype)
        return total if len(masks) == 1 else total + additive(masks[1], query.dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in which True hides, as numbers to add."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
