"""The functions of the package flash-attn (2.x): `from flashcore.compat.flash_attn import flash_attn_func`.

Tensors are (batch, seq, heads, head_dim), heads of key and value may be fewer, and causal and windows are aligned to
the last query and the last key. What is not there yet raises `UnsupportedError`, which names the argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcore.errors import UnsupportedError
from flashcore.functional import Window, attention

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """The output, and with `return_attn_probs` also the log-sum-exp and None: there is no dropout to show.

    FlashCore's forward is always deterministic.
    """
    refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes)
    out, lse = attend(q, k, v, softmax_scale, causal, window_size)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """As `flash_attn_func`, for sequences of several lengths behind one another, (total, heads, head_dim).

    There is no kernel for this yet: sequences are attended to one by one, and their lengths are read on the host, which
    waits for the device.
    """
    refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes, block_table=block_table)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for first_q, last_q, first_k, last_k in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        rows, keys = slice(first_q, last_q), slice(first_k, last_k)
        part, part_lse = attend(q[None, rows], k[None, keys], v[None, keys], softmax_scale, causal, window_size)
        out[rows], lse[:, rows] = part[0], part_lse[0]
    return (out, lse, None) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Appends `k` and `v` to the caches, in place, and attends to what is in them.

    Lengths in a tensor stay on the device: they become a mask over the whole cache.
    """
    refuse(
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    used = append(k_cache, v_cache, k, v, cache_seqlens)
    if isinstance(used, int):
        out, lse = attend(q, k_cache[:, :used], v_cache[:, :used], softmax_scale, causal, window_size)
    else:
        mask = visible(q.shape[1], k_cache.shape[1], used, causal, window_size)
        out, lse = attend(q, k_cache, v_cache, softmax_scale, False, (-1, -1), mask)
    return (out, lse) if return_softmax_lse else out


def append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, seqlens: int | Tensor | None
) -> int | Tensor:
    """Writes new keys and values behind those in use; how many are in use then."""
    if k is None or v is None:
        return k_cache.shape[1] if seqlens is None else seqlens
    if seqlens is None:
        raise UnsupportedError("cache_seqlens: given None with new keys; say where they go")
    new = k.shape[1]
    if isinstance(seqlens, int):
        k_cache[:, seqlens : seqlens + new], v_cache[:, seqlens : seqlens + new] = k, v
    else:
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        places = seqlens[:, None].long() + torch.arange(new, device=k.device)
        k_cache[rows, places], v_cache[rows, places] = k, v
    return seqlens + new


def visible(seq_q: int, seq_k: int, used: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """(batch, 1, seq_q, seq_k): which keys of a cache each query sees."""
    keys = torch.arange(seq_k, device=used.device)
    used = used.long()[:, None, None]
    diagonal = used - seq_q + torch.arange(seq_q, device=used.device)[:, None]
    left, right = window(window_size)
    right = 0 if causal else right
    seen = keys < used
    if left is not None:
        seen = seen & (keys >= diagonal - left)
    if right is not None:
        seen = seen & (keys <= diagonal + right)
    return seen.expand(-1, seq_q, -1)[:, None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attention(
        query,
        key,
        value,
        attn_mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=True,
        window=window(window_size),
        causal_align="bottom_right",
        return_lse=True,
    )
    return out.transpose(1, 2), lse


def window(sizes: tuple[int, int]) -> Window:
    """flash-attn's -1 is no limit."""
    left, right = (None if size < 0 else size for size in sizes)
    return left, right


def refuse(**arguments: Any) -> None:
    """Raises for the first argument that is not at its default."""
    for name, value in arguments.items():
        given = value is not None if not isinstance(value, (int, float)) else bool(value)
        if given:
            shown = value if isinstance(value, (int, float)) else "a tensor"
            raise UnsupportedError(f"{name}: given {shown}; not there yet")
