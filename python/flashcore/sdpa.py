"""FlashCore as the engine of `torch.nn.functional.scaled_dot_product_attention`.

SDPA chooses one of torch's fused kernels and calls it through the dispatcher. While the override is on, FlashCore
stands in their place, and passes on to them what it does not answer: gradients, dropout, other types. Which of them
SDPA would have chosen does not matter: on Hopper it is cuDNN's, and a call with a mask never reaches the flash kernel.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from flashcore import _core, ops
from flashcore.errors import InvalidArgumentError, UnsupportedError

NAME = "FlashCore"

Answer = Callable[..., tuple[Any, ...]]


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """The results of `_scaled_dot_product_flash_attention`."""
    if return_debug_mask:
        raise UnsupportedError("return_debug_mask")
    out, lse = ours(query, key, value, None, dropout_p, is_causal, scale, return_lse=True)
    # A compiled forward keeps these two for a backward that does not read them.
    state, unused = (query.new_empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
    return out, lse, None, None, query.shape[2], key.shape[2], state, unused, None


def cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """The results of `_scaled_dot_product_cudnn_attention`."""
    if return_debug_mask or compute_log_sumexp:
        raise UnsupportedError("return_debug_mask" if return_debug_mask else GRADIENTS)
    out = ours(query, key, value, attn_bias, dropout_p, is_causal, scale)
    return out, None, None, None, query.shape[2], key.shape[2], None, None, None


def efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """The results of `_scaled_dot_product_efficient_attention`, whose output has seq before heads in memory."""
    if compute_log_sumexp:
        raise UnsupportedError(GRADIENTS)
    batch, heads, seq, _ = query.shape
    out = query.new_empty(batch, seq, heads, value.shape[3]).transpose(1, 2)
    return ours(query, key, value, attn_bias, dropout_p, is_causal, scale, out=out), None, None, None


def cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """The results of `_scaled_dot_product_flash_attention_for_cpu`."""
    out, lse = ours(query, key, value, attn_mask, dropout_p, is_causal, scale, return_lse=True)
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2).to(wide)


# Where SDPA goes on each type of device.
FORWARDS: dict[str, dict[str, Answer]] = {
    "cuda": {
        "_scaled_dot_product_flash_attention": flash,
        "_scaled_dot_product_cudnn_attention": cudnn,
        "_scaled_dot_product_efficient_attention": efficient,
    },
    "cpu": {"_scaled_dot_product_flash_attention_for_cpu": cpu},
}
GRADIENTS = "requires_grad; there is no backward yet"


def ours(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Any:
    """FlashCore's answer, or an exception."""
    result = _core.attention(
        query, key, value, mask, dropout_p, is_causal, scale, True, None, "top_left", return_lse, out, "flashcore"
    )
    if result is not NotImplemented:
        return result
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise UnsupportedError(GRADIENTS)
    return ops.dispatch(
        query,
        key,
        value,
        mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=True,
        window=None,
        causal_align="top_left",
        return_lse=return_lse,
        out=out,
        backend="flashcore",
    )


def override(operator: Any, key: str, answer: Answer) -> Callable[..., Any]:
    """The kernel that takes the place of torch's, which it keeps."""
    saved = torch.library.get_kernel(operator, key)

    def kernel(keys: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return answer(*arguments, **options)
        except (UnsupportedError, InvalidArgumentError) as error:
            reason = str(error).partition("\n")[0]
        _core.log_fallback(f"{operator}: {reason}")
        return saved.call_boxed(keys, *arguments, **options)

    return kernel


class Override:
    """The kernels of one type of device, while they are in place."""

    def __init__(self, device_type: str) -> None:
        key = device_type.upper()
        self.library = torch.library.Library("aten", "IMPL", key)  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            # To take another kernel's place is the point.
            warnings.simplefilter("ignore")
            for name, answer in FORWARDS[device_type].items():
                operator = getattr(torch.ops.aten, name).default
                kernel = override(operator, key, answer)
                self.library.impl(name, kernel, key, with_keyset=True)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Puts torch's own kernels back."""
        self.library._destroy()  # type: ignore[no-untyped-call]


LOCK = threading.Lock()
ACTIVE: dict[str, Override] = {}


def enable_sdpa(device_types: Sequence[str] = ("cuda",)) -> None:
    """Lets FlashCore answer `torch.nn.functional.scaled_dot_product_attention`, in the whole process.

    What it does not answer goes to the kernel that torch chose, and is logged once for each reason. SDPA's "math"
    backend is left alone. On the CPU ("cpu") this is for tests: torch's own kernel is faster there.
    """
    for device_type in device_types:
        if device_type not in FORWARDS:
            accepted = ", ".join(map(repr, FORWARDS))
            raise InvalidArgumentError(f"device_types: given {device_type!r}; accepted {accepted}")
    if not hasattr(torch.library, "get_kernel"):
        raise UnsupportedError(f"torch {torch.__version__} cannot give a kernel back (torch.library.get_kernel)")
    with LOCK:
        for device_type in device_types:
            if device_type not in ACTIVE:
                ACTIVE[device_type] = Override(device_type)


def disable_sdpa() -> None:
    """Gives `torch.nn.functional.scaled_dot_product_attention` back to torch."""
    with LOCK:
        while ACTIVE:
            ACTIVE.popitem()[1].remove()


def sdpa_enabled() -> tuple[str, ...]:
    """The types of devices on which FlashCore answers SDPA now."""
    return tuple(ACTIVE)


@contextlib.contextmanager
def sdpa_override(device_types: Sequence[str] = ("cuda",)) -> Iterator[None]:
    """`enable_sdpa` for the time of a `with` block; what was on before stays on."""
    before = sdpa_enabled()
    enable_sdpa(device_types)
    try:
        yield
    finally:
        with LOCK:
            for device_type in set(device_types) - set(before):
                if device_type in ACTIVE:
                    ACTIVE.pop(device_type).remove()


class Handle:
    """What torch's registry of flash implementations holds while FlashCore is the active one."""

    def remove(self) -> None:
        disable_sdpa()


def activate() -> Handle:
    enable_sdpa()
    return Handle()


def join_registry() -> None:
    """Makes `torch.nn.attention.activate_flash_attention_impl("FlashCore")` known where torch has such a registry."""
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is not None:
        register(NAME, register_fn=activate)


join_registry()
