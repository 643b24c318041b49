"""`torch.ops.flashcore.attention` and `attention_lse`.

The operators and their kernels for CPU and CUDA are registered from Rust. Here is what they do at the keys of torch's
dispatcher where torch speaks Python: autograd, autocast, tensors without memory, and `vmap`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from flashcore import _core
from flashcore.errors import FlashCoreError, InvalidArgumentError, UnsupportedError

OPERATORS = ("attention", "attention_lse")
NO_BACKWARD = "requires_grad; there is no backward yet: call under torch.no_grad(), or detach the tensor"
NO_FORWARD_MODE = "forward-mode differentiation is not there yet: call outside of dual_level()"
NAMES = ("query", "key", "value", "attn_mask")

Kernel = Callable[..., Any]


def dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None,
    enable_gqa: bool,
    window: tuple[int | None, int | None] | None,
    causal_align: str,
    return_lse: bool,
    out: Tensor | None,
    backend: str,
) -> Any:
    """A call of `flashcore.attention` that torch has to see."""
    if backend not in ("auto", "flashcore"):
        raise InvalidArgumentError(f'backend: given {backend!r}; accepted "auto" or "flashcore"')
    operator = torch.ops.flashcore.attention_lse if return_lse else torch.ops.flashcore.attention
    left, right = window or (None, None)
    options = {
        "scale": scale,
        "enable_gqa": enable_gqa,
        "window_left": left,
        "window_right": right,
        "bottom_right": causal_align == "bottom_right",
        "fallback": backend == "auto",
    }
    if is_dynamo_compiling():
        result = operator(query, key, value, attn_mask, dropout_p, is_causal, **options)
    else:
        try:
            result = operator(query, key, value, attn_mask, dropout_p, is_causal, **options)
        except FlashCoreError:
            raise
        except RuntimeError as error:
            failure = _core.last_failure()
            if failure is not None and str(failure) in str(error):
                raise failure from None
            raise
    return result if out is None else write(out, result)


def write(out: Tensor, result: Any) -> Any:
    """Moves a new output to where the caller wants it."""
    new = result[0] if isinstance(result, tuple) else result
    if out.shape != new.shape or out.dtype != new.dtype or out.device != new.device:
        given = f"{out.dtype} {tuple(out.shape)} on {out.device}"
        raise InvalidArgumentError(f"out: given {given}; accepted {new.dtype} {tuple(new.shape)} on {new.device}")
    out.copy_(new)
    return (out, result[1]) if isinstance(result, tuple) else out


def is_plain(options: dict[str, Any]) -> bool:
    """Whether torch's own SDPA takes these options too."""
    unlimited = options.get("window_left") is None and options.get("window_right") is None
    return unlimited and not options.get("bottom_right")


def direct(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    return_lse: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    bottom_right: bool = False,
    fallback: bool = True,
) -> Any:
    """The call without the rest of torch's dispatcher; `NotImplemented` when torch has to see it."""
    if type(query) is not Tensor:
        return NotImplemented
    window = None if window_left is None and window_right is None else (window_left, window_right)
    align = "bottom_right" if bottom_right else "top_left"
    backend = "auto" if fallback else "flashcore"
    return _core.attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, align, return_lse, None, backend
    )


def autograd(name: str) -> Kernel:
    """Above autograd: torch's own SDPA where gradients are asked for, else a launch, or the kernels below."""
    operator = getattr(torch.ops.flashcore, name).default
    return_lse = name == "attention_lse"

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Any:
        result = direct(query, key, value, attn_mask, dropout_p, is_causal, return_lse, **options)
        if result is not NotImplemented:
            return result
        reason = needs_derivative(query, key, value, attn_mask)
        if reason is None:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(query, key, value, attn_mask, dropout_p, is_causal, **options)
        if return_lse or not is_plain(options) or not options.get("fallback", True):
            raise UnsupportedError(reason)
        _core.log_fallback(reason)
        return torch.ops.aten.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=options.get("scale"),
            enable_gqa=options.get("enable_gqa", False),
        )

    return kernel


def needs_derivative(*tensors: Tensor | None) -> str | None:
    """Why only torch's own SDPA will do, if it is because of derivatives."""
    if torch.is_grad_enabled():
        for name, tensor in zip(NAMES, tensors, strict=False):
            if tensor is not None and tensor.requires_grad:
                return f"{name}: {NO_BACKWARD}"
    return NO_FORWARD_MODE if forward_ad._current_level >= 0 else None


def autocast(name: str, device_type: str) -> Kernel:
    """SDPA's rule: tensors on the device go to autocast's type, but for float64."""
    operator = getattr(torch.ops.flashcore, name).default
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")

    def cast(argument: Any) -> Any:
        eligible = isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64
        if eligible and argument.device.type == device_type:
            return argument.to(torch.get_autocast_dtype(device_type))
        return argument

    def kernel(*arguments: Any, **options: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return operator(*map(cast, arguments), **options)

    return kernel


def empty_result(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """An output that nothing is written to; the shape and the order in memory are the rule of `sdpa.rs`."""
    split = -3 if options.get("enable_gqa") and query.dim() > 2 else -2
    leading = torch.broadcast_shapes(query.shape[:split], key.shape[:split], value.shape[:split])  # type: ignore[no-untyped-call]
    shape = (*leading, *query.shape[split:-1], value.shape[-1])
    order = list(range(len(shape) - 1))
    own = query.stride()
    broadcast = len(shape) != query.dim() or any(
        shape[dim] != query.shape[dim] or (shape[dim] > 1 and own[dim] == 0) for dim in order
    )
    if not broadcast:
        # Where a dimension of size 1 stands does not matter.
        larger = [dim for dim in order if shape[dim] > 1]
        order = [dim for dim in order if shape[dim] <= 1] + sorted(larger, key=lambda dim: -own[dim])
    strides = [1] * len(shape)
    step = max(shape[-1], 1)
    for dim in reversed(order):
        strides[dim] = step
        step = step * max(shape[dim], 1)
    return query.new_empty_strided(shape, strides)


def fake(name: str) -> Kernel:
    """The results without their contents."""

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Any:
        out = empty_result(query, key, value, options)
        return (out, out.new_empty(out.shape[:-1], dtype=torch.float32)) if name == "attention_lse" else out

    return kernel


def vmap(name: str) -> Kernel:
    """A batched dimension is one more before the others."""
    operator = getattr(torch.ops.flashcore, name).default

    def kernel(info: Any, in_dims: Sequence[int | None], *arguments: Any, **options: Any) -> tuple[Any, Any]:
        dims = [*in_dims, *[None] * (len(arguments) - len(in_dims))]
        batched = [
            (argument, dim) for argument, dim in zip(arguments, dims, strict=True) if isinstance(argument, Tensor)
        ]
        rank = max(tensor.dim() - (dim is not None) for tensor, dim in batched)

        def front(argument: Any, dim: int | None) -> Any:
            if dim is None:
                return argument
            tensor = argument.movedim(dim, 0)
            return tensor.reshape(tensor.shape[0], *[1] * (rank + 1 - tensor.dim()), *tensor.shape[1:])

        result = operator(*map(front, arguments, dims), **options)
        return result, (0, 0) if name == "attention_lse" else 0

    return kernel


def register() -> torch.library.Library | None:
    """Adds the operators to torch; None for a torch that is too old, of which calls with its tensors complain."""
    try:
        _core.register_torch_operators()
    except UnsupportedError as error:
        logging.getLogger("flashcore").warning("torch.ops.flashcore is not there: %s", error)
        return None
    library = torch.library.Library("flashcore", "IMPL")  # type: ignore[no-untyped-call]
    for name in OPERATORS:
        kernels = {
            "Autograd": autograd(name),
            "AutocastCPU": autocast(name, "cpu"),
            "AutocastCUDA": autocast(name, "cuda"),
        }
        for key, kernel in kernels.items():
            library.impl(name, kernel, key)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"flashcore::{name}", fake(name), lib=library)
        torch.library.register_vmap(f"flashcore::{name}", vmap(name), lib=library)
    return library


LIBRARY = register()
