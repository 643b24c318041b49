"""Every malformed call has its message, and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashcore
from reference import Case

Args = dict[str, Any]


class Subclass(torch.Tensor):
    pass


def strided(x: Tensor, dim: int) -> Tensor:
    """The same values with twice the stride along `dim`."""
    return x.repeat_interleave(2, dim).narrow(dim, 0, 2 * x.shape[dim])[(slice(None),) * dim + (slice(None, None, 2),)]


def change(**changes: Callable[[Tensor], Any]) -> Callable[[Args], Args]:
    """Applies functions to arguments; a mask or an output starts as a fresh one."""
    fresh = {
        "attn_mask": lambda query: query.new_ones(5, 7, dtype=torch.bool),
        "out": lambda query: torch.full_like(query, 3.0),
    }

    def apply(args: Args) -> Args:
        query = args["query"]
        return args | {name: f(args.get(name, fresh.get(name, lambda q: q)(query))) for name, f in changes.items()}

    return apply


def options(**values: Any) -> Callable[[Args], Args]:
    return lambda args: args | values


INVALID: dict[str, tuple[Callable[[Args], Args], str]] = {
    # shapes
    "query rank 1": (
        change(query=lambda x: x[0, 0, 0]),
        r"query: given 1 dimensions, shape \[16\]; accepted 2 to 6 dim",
    ),
    "key rank 7": (change(key=lambda x: x[(None,) * 3]), r"key: given 7 dimensions"),
    "outer size": (
        lambda args: change(query=lambda x: x.expand(3, 2, 3, 5, 16), key=lambda x: x.expand(2, 2, 3, 7, 16))(args),
        r"key: given shape \[2, 2, 3, 7, 16\]; accepted a size of 1 or 3 in dimension -5",
    ),
    "out rank 3": (change(out=lambda x: x[0]), r"out: given shape \[3, 5, 16\]; accepted shape"),
    "mask rank 1": (change(attn_mask=lambda x: x[0]), r"attn_mask: given 1 dimensions, shape \[7\]; accepted 2 to 6"),
    "mask rank 7": (change(attn_mask=lambda x: x[(None,) * 5]), r"attn_mask: given 7 dimensions"),
    "mask shape": (
        change(attn_mask=lambda x: x[:4]),
        r"attn_mask: given shape \[1, 1, 4, 7\]; .*broadcasts to \[2, 3,",
    ),
    "mask enlarges": (change(attn_mask=lambda x: x.expand(4, 3, 5, 7)), r"attn_mask: given shape \[4, 3, 5, 7\]"),
    "batches": (change(key=lambda x: x.repeat(2, 1, 1, 1)), r"key: given shape \[4, 3, 7, 16\]; accepted shape \[2, 3"),
    "head_dim": (change(key=lambda x: x[..., :8]), r"key: given shape \[2, 3, 7, 8\]; accepted shape \[2, 3, 7, 16\]"),
    "seq of value": (change(value=lambda x: x[:, :, :6]), r"value: given shape \[2, 3, 6, 16\]; accepted"),
    "heads of value": (change(value=lambda x: x[:, :2]), r"value: given shape \[2, 2, 7, 16\]; accepted shape \[2, 3"),
    "heads": (change(key=lambda x: x[:, :2], value=lambda x: x[:, :2]), r"key: given 2 heads for 3 .*enable_gqa=True"),
    "heads gqa": (
        lambda args: change(key=lambda x: x[:, :2], value=lambda x: x[:, :2])(args) | {"enable_gqa": True},
        r"key: given 2 heads for 3 query heads; accepted a number of heads that divides",
    ),
    "out shape": (
        change(out=lambda x: x[:, :, :4]),
        r"out: given shape \[2, 3, 4, 16\]; accepted shape \[2, 3, 5, 16\]",
    ),
    "head_dim 257": (
        lambda args: args | {name: args[name].new_zeros(1, 1, 2, 257) for name in ("query", "key", "value")},
        r"query: given head_dim 257; accepted head_dim 0 to 256",
    ),
    "head_dim of value 257": (
        change(value=lambda x: x.new_zeros(2, 3, 7, 257)),
        r"value: given head_dim 257; accepted head_dim 0 to 256",
    ),
    # types
    "integers": (change(query=lambda x: x.int()), r"query: given dtype int32; accepted f16, bf16, f32 or f64"),
    "bool": (change(query=lambda x: x.bool()), r"query: given dtype bool"),
    "complex": (change(query=lambda x: x.to(torch.complex64).conj()), r"query: given dtype complex64"),
    "float8": (change(query=lambda x: x.to(torch.float8_e4m3fn)), r"query: given dtype float8"),
    "mixed": (change(key=lambda x: x.bfloat16()), r"key: given dtype bf16; accepted the query's dtype, f16"),
    "mixed value": (change(value=lambda x: x.float()), r"value: given dtype f32; accepted the query's dtype, f16"),
    "mixed out": (change(out=lambda x: x.float()), r"out: given dtype f32; accepted the query's dtype, f16"),
    "mask uint8": (change(attn_mask=lambda x: x.byte()), r"attn_mask: given dtype uint8; accepted bool, f32 or the"),
    "mask other": (change(attn_mask=lambda x: x.bfloat16()), r"attn_mask: given dtype bf16; accepted bool, f32 or the"),
    # memory
    "last dim": (change(query=lambda x: strided(x, 3)), r"query: given strides \[.*\]; accepted a contiguous last dim"),
    "last dim of out": (change(out=lambda x: strided(x, 3)), r"out: given strides \[.*\]; accepted a contiguous last"),
    "out overlaps itself": (
        change(out=lambda x: x[:, :1].expand(-1, 3, -1, -1)),
        r"out: given shape .*; accepted a tensor whose elements do not share memory",
    ),
    # objects
    "list": (change(query=lambda x: [1.0]), r"query: given an object of type list; accepted a torch.Tensor or a nump"),
    "None": (change(key=lambda x: None), r"key: given an object of type NoneType; accepted a torch.Tensor, like the"),
    "numpy": (change(key=lambda x: x.cpu().numpy()), r"key: given an object of type numpy.ndarray; accepted a torch"),
    "mask list": (change(attn_mask=lambda x: [[True]]), r"attn_mask: given an object of type list"),
    # options
    "mask and causal": (
        lambda args: change(attn_mask=lambda x: x)(args) | {"is_causal": True},
        r"attn_mask: given attn_mask and is_causal=True",
    ),
    "align": (options(causal_align="left"), r'causal_align: given "left"; accepted "top_left" or "bottom_right"'),
    "window": (options(window=(-1, 0)), r"window: given -1; accepted numbers >= 0, or None"),
    "backend": (options(backend="cuda"), r"backend: given 'cuda'; accepted \"auto\" or \"flashcore\""),
    "nan scale": (options(scale=math.nan), r"scale: given NaN; accepted a finite number"),
    "inf scale": (options(scale=1e300), r"scale: given inf; accepted a finite number"),
}

UNSUPPORTED: dict[str, tuple[Callable[[Args], Args], str]] = {
    "dropout": (options(dropout_p=0.1), r"dropout_p: given 0.1; only 0.0"),
    "requires_grad": (change(key=lambda x: x.requires_grad_()), r"key: requires_grad; .*torch.no_grad"),
    "mask requires_grad": (
        change(attn_mask=lambda x: x.float().requires_grad_()),
        r"attn_mask: requires_grad; there is no backward yet",
    ),
    "parameter": (change(query=torch.nn.Parameter), r"query: requires_grad"),
}


def refused(device: str, make: Callable[[Args], Args], error: type[Exception], message: str) -> None:
    query, key, value = Case().tensors(device, torch.float16)
    args = make({"query": query, "key": key, "value": value})
    out = args.setdefault("out", torch.full_like(query, 3.0))
    with pytest.raises(error, match=message):
        flashcore.attention(**{"backend": "flashcore"} | args)
    assert torch.all(torch.as_tensor(out) == 3.0), "nothing is written"
    if not {"out", "backend"} & {message.partition(":")[0]}:
        del args["out"]
        with pytest.raises(error, match=message):
            flashcore.explain(**args)


@pytest.mark.parametrize("name", INVALID)
def test_invalid(name: str, device: str) -> None:
    make, message = INVALID[name]
    refused(device, make, flashcore.InvalidArgumentError, message)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(name: str, device: str) -> None:
    make, message = UNSUPPORTED[name]
    refused(device, make, flashcore.UnsupportedError, message)


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_out_must_not_overlap_an_input(name: str, device: str) -> None:
    query, key, value = Case(seq_k=5).tensors(device, torch.float32 if device == "cpu" else torch.float16)
    args = {"query": query, "key": key, "value": value, "attn_mask": query.new_zeros(2, 3, 5, 16)[..., :5]}
    before = args[name].clone()
    out = query.new_empty(0).set_(args[name].untyped_storage()).as_strided(query.shape, query.stride())
    with pytest.raises(
        flashcore.InvalidArgumentError, match=f"out: given memory shared with {name}; accepted memory of"
    ):
        flashcore.attention(**args, out=out)
    assert torch.equal(args[name], before)


def test_an_output_that_begins_where_an_input_ends() -> None:
    both = torch.randn(2, 1, 2, 3, 4)
    expected = flashcore.attention(both[0], both[0], both[0])
    flashcore.attention(both[0], both[0], both[0], out=both[1])
    assert torch.equal(both[1], expected)


def test_misaligned_memory() -> None:
    query, key, value = Case().tensors("cpu", torch.float32)
    raw = bytearray(query.nbytes + 1)
    crooked = torch.frombuffer(raw, dtype=torch.float32, offset=1, count=query.numel()).view_as(query)
    with pytest.raises(flashcore.InvalidArgumentError, match=r"query: given address .* a multiple of 4"):
        flashcore.attention(crooked, key, value)
    with pytest.raises(flashcore.InvalidArgumentError, match=r"out: given address .* a multiple of 4"):
        flashcore.attention(query, key, value, out=crooked)
    assert not any(raw)


def test_sizes_that_overflow() -> None:
    """A view may claim more elements than there are bytes in the world, if its strides are 0."""
    x = torch.zeros(1, 1, 1, 1).expand(1, 1, 1 << 31, 1)
    with pytest.raises(flashcore.InvalidArgumentError, match=r"query: .*accepted sizes below 2\^31"):
        flashcore.attention(x, x, x, out=torch.zeros(1, 1, 1, 1))
    x = torch.zeros(1, 1, 1, 1).expand(1, 1, 1 << 30, 1)
    with pytest.raises(flashcore.InvalidArgumentError, match=r"accepted seq 0 to 1073741823"):
        flashcore.attention(x[:, :, :1], x, x)


def test_torch_says_that_memory_is_short() -> None:
    """More than any machine has, asked for in an exception of torch's own."""
    query = torch.zeros(1, 1, 1, 256, dtype=torch.float64).expand(1, 1, (1 << 31) - 1, 256)
    key = torch.zeros(1, 1, 1, 256, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"allocator|out of memory|can't allocate"):
        flashcore.attention(query, key, key)


@pytest.mark.parametrize("backend", ["cuda", None, 1])
def test_a_backend_that_is_none(backend: object) -> None:
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(flashcore.InvalidArgumentError, match=r"backend: given .*accepted"):
        flashcore.attention(x, x, x, backend=backend)


def test_views_and_tensors_that_a_plan_cannot_keep(device: str) -> None:
    """A plan and an explanation read memory, and see no more of a tensor than that."""
    query, key, value = Case().tensors(device, torch.float16)
    refused: dict[str, tuple[Tensor, type[Exception]]] = {
        "a view with its sign to be flipped": (torch._neg_view(query), flashcore.InvalidArgumentError),
        "a subclass of torch.Tensor": (query.as_subclass(Subclass), flashcore.InvalidArgumentError),
        "requires_grad; there is no backward yet": (query.clone().requires_grad_(), flashcore.UnsupportedError),
        "cannot describe .*meta": (query.to("meta"), flashcore.InvalidArgumentError),
    }
    runtime = flashcore.Runtime(device)
    for message, (tensor, error) in refused.items():
        for call in (flashcore.explain, runtime.plan):
            with pytest.raises(error, match=message):
                call(tensor, key, value)
    with torch.autocast(device), pytest.raises(flashcore.UnsupportedError, match="a mode of torch is on"):
        flashcore.explain(query, key, value)


@pytest.mark.parametrize("real", [False, True])
def test_fake_tensors(real: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    query = torch.ones(1, 1, 2, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = flashcore.attention(*(query if real else torch.empty(1, 1, 2, 8) for _ in range(3)))
    assert isinstance(out, FakeTensor)


def test_forward_mode_differentiation() -> None:
    x = torch.randn(1, 1, 2, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(flashcore.UnsupportedError, match="forward-mode differentiation"):
            flashcore.attention(dual, dual, dual, backend="flashcore")


def test_sparse_tensors() -> None:
    x = torch.randn(1, 1, 2, 8)
    with pytest.raises(NotImplementedError):
        flashcore.attention(x, x.to_sparse(), x)


def test_gradients_that_nobody_asks_for_are_fine() -> None:
    x = torch.randn(1, 1, 2, 8)
    parameter = torch.nn.Parameter(x)
    expected = flashcore.attention(x, x, x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = flashcore.attention(parameter, parameter, parameter)
        assert type(out) is torch.Tensor
        assert torch.equal(out, expected)
        assert not out.requires_grad


def test_wrong_option_types() -> None:
    x = torch.randn(1, 1, 2, 8)
    for options in ({"scale": "1"}, {"is_causal": 1}, {"window": 3}, {"unknown": 1}, {"window": (1, 2, 3)}):
        with pytest.raises((TypeError, ValueError)):
            flashcore.attention(x, x, x, **options)


def test_devices_do_not_mix(cuda: str) -> None:
    query, key, value = Case().tensors(cuda, torch.float16)
    with pytest.raises(
        flashcore.InvalidArgumentError, match="key: given a tensor on cpu; accepted the query's device, cuda"
    ):
        flashcore.attention(query, key.cpu(), value)
    with pytest.raises(flashcore.InvalidArgumentError, match="out: given a tensor on cpu"):
        flashcore.attention(query, key, value, out=torch.empty_like(query, device="cpu"))
    with pytest.raises(flashcore.InvalidArgumentError, match="attn_mask: given a tensor on cpu"):
        flashcore.attention(query, key, value, torch.ones(5, 7, dtype=torch.bool))
    with pytest.raises(flashcore.InvalidArgumentError, match="query: given a tensor on cuda:0; accepted the runtime's"):
        flashcore.Runtime("cpu").plan(query, key, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_no_kernel_answers(cuda: str, dtype: torch.dtype) -> None:
    inputs = Case().tensors(cuda, dtype)
    out = torch.full_like(inputs[0], 3.0)
    with pytest.raises(
        flashcore.UnsupportedError, match=r"no kernel answers attention\(f.*\n.*: computes in"
    ) as refusal:
        flashcore.attention(*inputs, out=out, backend="flashcore")
    assert "cast" in str(refusal.value)
    assert torch.all(out == 3.0)
    explanation = flashcore.explain(*inputs)
    assert explanation.chosen is None
    assert "no kernel qualifies" in str(explanation)
