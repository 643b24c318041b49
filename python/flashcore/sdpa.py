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

from flashcore import _core
from flashcore.errors import InvalidArgumentError, UnsupportedError
from flashcore.functional import attention

NAME = "FlashCore"

Arguments = dict[str, Any]


def flash(call: Arguments) -> tuple[Any, ...]:
    """The results of `_scaled_dot_product_flash_attention`."""
    query, key = call["query"], call["key"]
    out, lse = ours(call, return_lse=True)
    nothing = query.new_empty(0)
    return out, lse, None, None, query.shape[2], key.shape[2], nothing, nothing, nothing


def cudnn(call: Arguments) -> tuple[Any, ...]:
    """The results of `_scaled_dot_product_cudnn_attention`; the log-sum-exp is for gradients alone."""
    query, key = call["query"], call["key"]
    nothing = query.new_empty(0, dtype=torch.float32)
    return ours(call), nothing, None, None, query.shape[2], key.shape[2], nothing, nothing, nothing


def efficient(call: Arguments) -> tuple[Any, ...]:
    """The results of `_scaled_dot_product_efficient_attention`, whose output has seq before heads in memory."""
    query, value = call["query"], call["value"]
    batch, heads, seq, _ = query.shape
    out = query.new_empty(batch, seq, heads, value.shape[3]).transpose(1, 2)
    nothing = query.new_empty((batch, heads, 0), dtype=torch.float32)
    return ours(call, out=out), nothing, nothing, nothing


def cpu(call: Arguments) -> tuple[Any, ...]:
    """The results of `_scaled_dot_product_flash_attention_for_cpu`."""
    out, lse = ours(call, return_lse=True)
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2).to(wide)


# Where SDPA goes on each type of device.
FORWARDS: dict[str, dict[str, Callable[[Arguments], tuple[Any, ...]]]] = {
    "cuda": {
        "_scaled_dot_product_flash_attention": flash,
        "_scaled_dot_product_cudnn_attention": cudnn,
        "_scaled_dot_product_efficient_attention": efficient,
    },
    "cpu": {"_scaled_dot_product_flash_attention_for_cpu": cpu},
}


def ours(call: Arguments, **options: Any) -> Any:
    """FlashCore's answer, or an exception."""
    mask = call.get("attn_bias", call.get("attn_mask"))
    return attention(
        call["query"],
        call["key"],
        call["value"],
        mask,
        call["dropout_p"],
        call["is_causal"],
        scale=call["scale"],
        enable_gqa=True,
        backend="flashcore",
        **options,
    )


def for_torch(call: Arguments) -> str | None:
    """Why a call must go to torch's kernel whatever FlashCore thinks of it."""
    if call.get("return_debug_mask"):
        return "return_debug_mask"
    tensors: tuple[Tensor, ...] = (call["query"], call["key"], call["value"])
    if call.get("compute_log_sumexp") or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return "requires_grad; there is no backward yet"
    return None


def override(operator: Any, key: str, answer: Callable[[Arguments], tuple[Any, ...]]) -> Callable[..., Any]:
    """The kernel that takes the place of torch's, which it keeps."""
    saved = torch.library.get_kernel(operator, key)
    defaults = {argument.name: argument.default_value for argument in operator._schema.arguments}
    names = list(defaults)

    def kernel(keys: Any, *arguments: Any, **options: Any) -> Any:
        call = {**defaults, **dict(zip(names, arguments, strict=False)), **options}
        reason = for_torch(call)
        if reason is None:
            try:
                return answer(call)
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
