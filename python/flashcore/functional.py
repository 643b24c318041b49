"""`flashcore.attention`, on torch tensors and numpy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from flashcore._core import attention as native

try:
    from torch.compiler import is_dynamo_compiling

    from flashcore import ops

    HAS_TORCH = True
except (ImportError, OSError):  # no torch, or one that cannot load its own libraries: numpy is left
    HAS_TORCH = False

    def is_dynamo_compiling() -> bool:
        return False


if TYPE_CHECKING:
    import numpy
    import torch

    Array = TypeVar("Array", torch.Tensor, numpy.ndarray[Any, Any])

Window = tuple[int | None, int | None]
Align = Literal["top_left", "bottom_right"]
Backend = Literal["auto", "flashcore"]


@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
    causal_align: Align = "top_left",
    return_lse: Literal[False] = False,
    out: Array | None = None,
    backend: Backend = "auto",
) -> Array: ...
@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
    causal_align: Align = "top_left",
    return_lse: Literal[True],
    out: Array | None = None,
    backend: Backend = "auto",
) -> tuple[Array, Array]: ...
def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
    causal_align: Align = "top_left",
    return_lse: bool = False,
    out: Any = None,
    backend: Backend = "auto",
) -> Any:
    """Scaled dot-product attention with the semantics of `torch.nn.functional.scaled_dot_product_attention`.

    Tensors are (..., heads, seq, head_dim), torch tensors (CUDA or CPU) or numpy arrays, of 2 to 6 dimensions that
    broadcast, with any strides; the last dimension is contiguous. Work on a CUDA device is queued on torch's current
    stream.

    attn_mask: bool (True = attend) or additive in the query's dtype or float32; broadcasts to (..., heads, seq_q,
        seq_k). Not together with is_causal.
    window: (left, right), how many keys a query sees before and after its diagonal; None is unlimited.
    causal_align: where the diagonal of is_causal and window starts when seq_q != seq_k: "top_left" as in SDPA, or
        "bottom_right" as in flash-attn.
    return_lse: also return the natural log-sum-exp of each row, float32 (..., heads, seq_q).
    out: write into this tensor instead of a new one.
    backend: "auto" lets torch's own SDPA answer what FlashCore does not (gradients, dropout, other dtypes, head_dim
        above 256), and logs why, once for each reason; "flashcore" raises instead.

    A row that sees no key gives 0, and a log-sum-exp of -inf. Nothing is written when an exception is raised.
    """
    if not is_dynamo_compiling():
        result = native(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            window,
            causal_align,
            return_lse,
            out,
            backend,
        )
        if result is not NotImplemented:
            return result
    return ops.dispatch(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        window=window,
        causal_align=causal_align,
        return_lse=return_lse,
        out=out,
        backend=backend,
    )
