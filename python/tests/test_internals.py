"""What torch's C++ functions say of tensors and of the thread is what Python says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flashcore
from flashcore import _core

State = Callable[[], contextlib.AbstractContextManager[Any]]


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return function(*arguments, **(options or {}))


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return function(*arguments, **(options or {}))


class Subclass(torch.Tensor):
    pass


STATES: dict[str, tuple[State, bool]] = {
    "plain": (contextlib.nullcontext, True),
    "no_grad": (torch.no_grad, True),
    "inference_mode": (torch.inference_mode, True),
    "autocast cpu": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), False),
    "autocast cuda": (lambda: torch.autocast("cuda"), False),
    "autocast off": (lambda: torch.autocast("cpu", enabled=False), True),
    "dispatch mode": (DispatchMode, False),
    "function mode": (FunctionMode, False),
    "default device": (lambda: torch.device("cpu"), False),
}


def both(*tensors: torch.Tensor) -> bool:
    """Both answers, which must be the same."""
    outside, inside = _core.is_quiet(*tensors)
    assert inside is not None, "this torch's C++ functions are not used"
    assert inside == outside
    return outside


@pytest.mark.parametrize("name", STATES)
def test_states_of_the_thread(name: str) -> None:
    if name == "autocast cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch leaves autocast off")
    state, quiet = STATES[name]
    x = torch.ones(2)
    assert both(x)
    with state():
        assert both(x) is quiet
        with torch.no_grad():
            assert both(x) is quiet
    assert both(x)


def test_forward_mode() -> None:
    """Python cannot tell a tensor without a tangent; torch's C++ can."""
    plain = torch.ones(2)
    view = torch.ones(2, 2)[0]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(plain, plain)
        assert _core.is_quiet(plain) == (False, True)
        for tensor in (dual, dual * 2, dual[:1]):
            assert not _core.is_quiet(tensor)[0]
        assert not both(dual)
        assert not both(plain, dual * 2)
        assert not both(dual[:1])
    assert both(plain, view)


def test_transforms_and_traces() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(both(x))
        return x.sum()

    torch.vmap(look)(torch.ones(3, 2))
    torch.func.grad(look)(torch.ones(2))
    torch.func.jvp(look, (torch.ones(2),), (torch.ones(2),))
    torch.jit.trace(look, (torch.ones(2),), check_trace=False)
    torch.fx.experimental.proxy_tensor.make_fx(look)(torch.ones(2))
    torch.fx.experimental.proxy_tensor.make_fx(look, pre_dispatch=True)(torch.ones(2))
    assert seen == [False] * 6
    assert both(torch.ones(2))


def test_flags_of_tensors() -> None:
    plain = torch.ones(2, 3)
    asking = torch.ones(2, requires_grad=True)
    parameter = torch.nn.Parameter(torch.ones(2))
    negative = torch._neg_view(plain)
    assert both(plain, plain.t())
    for loud in (asking, parameter, asking * 2):
        assert not both(plain, loud)
        with torch.no_grad():
            assert both(plain, loud)
    assert not both(negative)
    assert not both(plain.as_subclass(Subclass))
    asking.requires_grad_(False)
    assert both(asking)
    plain.data = negative
    assert not both(plain)


def test_threads_have_states_of_their_own() -> None:
    import threading

    found = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        thread = threading.Thread(target=lambda: found.append(both(torch.ones(2))))
        thread.start()
        thread.join()
        assert not both(torch.ones(2))
    assert found == [True]


@pytest.mark.parametrize(
    "strange",
    [
        lambda x: torch.nested.nested_tensor([x, x]),
        lambda x: x.to_sparse(),
    ],
    ids=["nested", "sparse"],
)
def test_tensors_without_plain_memory_are_not_read(strange: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(2, 3, 4, 8)
    # torch sees the call, and refuses it in its own words.
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)) as caught:
        flashcore.attention(strange(x), x, x, backend="flashcore")
    assert "internal error" not in str(caught.value)


@pytest.mark.parametrize("rows", [slice(None), slice(1, None)], ids=["whole", "view"])
def test_zeros_without_memory_reach_torch(rows: slice) -> None:
    """A view of them has an address: that of no memory, and the offset."""
    x = torch.randn(2, 3, 4, 8)
    zeros = torch._efficientzerotensor((3 if rows.start else 2, 3, 4, 8))[rows]
    assert not both(zeros)
    expected = x.mean(-2, keepdim=True).expand_as(x)
    for call in (flashcore.attention, torch.ops.flashcore.attention):
        torch.testing.assert_close(call(zeros, x, x), expected)
    with pytest.raises(flashcore.InvalidArgumentError, match="zeros without memory"):
        flashcore.explain(zeros, x, x)


def test_functional_tensors_reach_torch() -> None:
    x = torch.randn(2, 3, 4, 8)
    wrapped = torch._to_functional_tensor(x)
    result = flashcore.attention(wrapped, x, x)
    torch._sync(result)
    assert torch.equal(torch._from_functional_tensor(result), flashcore.attention(x, x, x))
