"""`torch.ops.flashcore`: the meaning of SDPA, whatever torch puts around a call."""

from __future__ import annotations

import ctypes
import itertools
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashcore
from reference import ULP, Case

attention = torch.ops.flashcore.attention
attention_lse = torch.ops.flashcore.attention_lse
sdpa = F.scaled_dot_product_attention


def drawn(shape: tuple[int, ...], place: tuple[str, torch.dtype], seed: int) -> Tensor:
    device, dtype = place
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def assert_as_sdpa(inputs: tuple[Tensor, ...], out: Tensor, **options: Any) -> None:
    """No further from SDPA in float64 than SDPA itself, give or take the rounding of the output."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    if isinstance(options.get("attn_mask"), Tensor) and options["attn_mask"].is_floating_point():
        wide_options = options | {"attn_mask": options["attn_mask"].double()}
    else:
        wide_options = options
    wanted = sdpa(*wide, **wide_options)
    assert out.shape == wanted.shape
    assert out.dtype == inputs[0].dtype
    if not wanted.numel():
        return
    # Fused kernels of torch give NaN for a scale <= 0 and fault on some masks; its own composition takes every call.
    with sdpa_kernel(SDPBackend.MATH):
        theirs = (sdpa(*inputs, **options).double() - wanted).abs().max()
    # The scale is a float32 everywhere in FlashCore, in float64 too.
    unit = max(ULP[out.dtype], 2**-23)
    allowed = 2 * theirs + 4 * unit * wanted.abs().max()
    assert (out.double() - wanted).abs().max() <= allowed


SHAPES = {
    "2-D": ((5, 16), (7, 16), (7, 16)),
    "3-D": ((3, 5, 16), (3, 7, 16), (3, 7, 16)),
    "4-D": ((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
    "5-D": ((2, 2, 3, 5, 16), (2, 2, 3, 7, 16), (2, 2, 3, 7, 16)),
    "6-D": ((2, 1, 2, 3, 5, 16), (2, 1, 2, 3, 7, 16), (2, 1, 2, 3, 7, 16)),
    "Ev != E": ((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 24)),
    "batch broadcasts": ((2, 3, 5, 16), (1, 3, 7, 16), (1, 3, 7, 16)),
    "query broadcasts": ((1, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
    "heads broadcast": ((2, 3, 5, 16), (2, 1, 7, 16), (2, 1, 7, 16)),
    "outer broadcasts": ((2, 1, 3, 5, 16), (1, 4, 3, 7, 16), (2, 4, 3, 7, 16)),
    "ranks differ": ((2, 2, 3, 5, 16), (3, 7, 16), (2, 3, 7, 16)),
    "no batch": ((0, 3, 5, 16), (0, 3, 7, 16), (0, 3, 7, 16)),
    "no queries": ((2, 3, 0, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
    "no keys": ((2, 3, 5, 16), (2, 3, 0, 16), (2, 3, 0, 16)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "scale 0": {"scale": 0.0},
    "scale < 0": {"scale": -0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes(shapes: tuple[tuple[int, ...], ...], options: dict[str, Any], place: tuple[str, torch.dtype]) -> None:
    inputs = tuple(drawn(shape, place, seed) for seed, shape in enumerate(shapes))
    out = attention(*inputs, **options)
    assert_as_sdpa(inputs, out, **options)
    assert torch.equal(flashcore.attention(*inputs, **options), out), "the direct path is the same"
    meta = attention(*(x.to("meta") for x in inputs), **options)
    assert (meta.shape, meta.dtype) == (out.shape, out.dtype)


@pytest.mark.parametrize("enable_gqa", [True, False])
@pytest.mark.parametrize("heads", [(6, 2), (6, 1), (6, 6)], ids=str)
def test_gqa(heads: tuple[int, int], enable_gqa: bool, place: tuple[str, torch.dtype]) -> None:
    inputs = tuple(drawn((2, heads[i > 0], 5, 16), place, i) for i in range(3))
    if heads == (6, 2) and not enable_gqa:
        with pytest.raises(RuntimeError):
            attention(*inputs)
        return
    assert_as_sdpa(inputs, attention(*inputs, enable_gqa=enable_gqa), enable_gqa=enable_gqa)


MASKS = [(5, 7), (1, 7), (5, 1), (3, 5, 7), (2, 1, 1, 7), (2, 3, 5, 7), (1, 3, 1, 1)]


@pytest.mark.parametrize("kind", ["bool", "query", "float32"])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks(shape: tuple[int, ...], kind: str, place: tuple[str, torch.dtype]) -> None:
    device, dtype = place
    if kind == "float32" and dtype == torch.float64:
        pytest.skip("SDPA takes no narrower mask")
    inputs = tuple(drawn((2, 3, length, 16), place, i) for i, length in enumerate((5, 7, 7)))
    mask = drawn(shape, (device, torch.float32), 9)
    mask = mask > -0.5 if kind == "bool" else mask.to(dtype if kind == "query" else torch.float32)
    assert_as_sdpa(inputs, attention(*inputs, mask), attn_mask=mask)


def test_masks_of_five_dimensions(place: tuple[str, torch.dtype]) -> None:
    inputs = tuple(drawn((2, 4, 3, length, 16), place, i) for i, length in enumerate((5, 7, 7)))
    for shape in ((4, 3, 5, 7), (2, 1, 1, 5, 7), (2, 4, 1, 1, 7)):
        mask = drawn(shape, (place[0], torch.float32), 9) > -0.5
        assert_as_sdpa(inputs, attention(*inputs, mask), attn_mask=mask)


def test_rows_that_see_nothing(place: tuple[str, torch.dtype]) -> None:
    inputs = tuple(drawn((2, 3, 6, 16), place, i) for i in range(3))
    seen = torch.ones(6, 6, dtype=torch.bool, device=place[0])
    seen[2] = False
    for mask in (seen, torch.zeros(6, 6, device=place[0], dtype=place[1]).masked_fill(~seen, float("-inf"))):
        out = attention(*inputs, mask)
        assert not out[:, :, 2].any()
        assert_as_sdpa(inputs, out, attn_mask=mask)


LAYOUTS: dict[str, Callable[[tuple[str, torch.dtype]], Tensor]] = {
    "contiguous": lambda place: drawn((2, 3, 5, 16), place, 0),
    "seq before heads": lambda place: drawn((2, 5, 3, 16), place, 0).transpose(1, 2),
    "packed": lambda place: drawn((2, 5, 3, 3, 16), place, 0)[:, :, 1].transpose(1, 2),
    "expanded": lambda place: drawn((2, 1, 5, 16), place, 0).expand(2, 3, 5, 16),
    "sliced": lambda place: drawn((4, 3, 9, 32), place, 0)[1:3, :, 2:7, 8:24],
    "batch innermost": lambda place: drawn((5, 3, 2, 16), place, 0).permute(2, 1, 0, 3),
    "single heads": lambda place: drawn((2, 5, 1, 16), place, 0).transpose(1, 2),
    "5-D, outer innermost": lambda place: drawn((3, 2, 4, 5, 16), place, 0).transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dim_v", [16, 24])
def test_strides_follow_the_query(
    layout: Callable[[tuple[str, torch.dtype]], Tensor], dim_v: int, place: tuple[str, torch.dtype]
) -> None:
    query = layout(place)
    value = drawn((*query.shape[:-1], dim_v), place, 1)
    out = attention(query, query, value)
    assert_as_sdpa((query, query, value), out)
    steps = [(stride, size) for stride, size in zip(query.stride()[:-1], query.shape[:-1], strict=True) if size > 1]
    order = [stride for stride, size in zip(out.stride()[:-1], out.shape[:-1], strict=True) if size > 1]
    if all(stride for stride, _ in steps):
        assert sorted(range(len(order)), key=lambda i: order[i]) == sorted(range(len(order)), key=lambda i: steps[i][0])
    direct = flashcore.attention(query, query, value)
    meta = attention(query.to("meta").as_strided(query.shape, query.stride()), query.to("meta"), value.to("meta"))
    for other in (direct, meta):
        assert [other.stride(i) for i, n in enumerate(out.shape) if n > 1] == [
            out.stride(i) for i, n in enumerate(out.shape) if n > 1
        ]


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "mask and causal": (lambda q: attention(q, q, q, q.new_ones(5, 5, dtype=torch.bool), is_causal=True), "is_causal"),
    "heads": (lambda q: attention(q, q[:, :2], q[:, :2]), "key: given 2 heads for 3 query heads"),
    "head_dim": (lambda q: attention(q, q[..., :8], q), "key: given shape"),
    "mask shape": (lambda q: attention(q, q, q, q.new_ones(4, 5, dtype=torch.bool)), "attn_mask: given shape"),
    "mask rank": (lambda q: attention(q, q, q, q.new_ones(5, dtype=torch.bool)), "attn_mask: given 1 dimensions"),
    "mask enlarges": (lambda q: attention(q[0], q[0], q[0], q.new_ones(2, 3, 5, 5) > 0), "attn_mask: given shape"),
    "mask dtype": (lambda q: attention(q, q, q, q.new_ones(5, 5, dtype=torch.uint8)), "attn_mask"),
    "1-D": (lambda q: attention(q[0, 0, 0], q, q), "query: given 1 dimensions"),
    "7-D": (lambda q: attention(q[None, None, None], q, q), "query: given 7 dimensions"),
    "dtypes": (lambda q: attention(q, q.double(), q), "key: given dtype f64"),
    "scale": (lambda q: attention(q, q, q, scale=float("nan")), "scale: given NaN"),
    "window": (lambda q: attention(q, q, q, window_left=-1), "window: given -1"),
    "lse and dropout": (lambda q: attention_lse(q, q, q, dropout_p=0.5), "dropout_p: given 0.5"),
    "no fall-through": (lambda q: attention(q, q, q, dropout_p=0.5, fallback=False), "dropout_p: given 0.5"),
    "window elsewhere": (lambda q: attention(q, q, q, dropout_p=0.5, window_left=3), "dropout_p: given 0.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, device: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(2, 3, 5, 16).to(device, torch.float16))


def elsewhere(device: str) -> dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """Calls that torch's own SDPA answers."""
    query = torch.randn(2, 3, 5, 16).to(device, torch.float16)
    return {
        "last dimension": ((query.transpose(2, 3).contiguous().transpose(2, 3), query, query), {}),
        "head_dim 300": ((torch.randn(1, 1, 4, 300, device=device),) * 3, {}),
        "dropout": ((query, query, query), {"dropout_p": 0.5}),
    } | ({"float32": ((query.float(),) * 3, {})} if device == "cuda" else {})


@pytest.mark.parametrize("name", ["last dimension", "head_dim 300", "dropout", "float32"])
def test_what_torch_answers(name: str, device: str) -> None:
    if name not in elsewhere(device):
        pytest.skip("FlashCore answers that on the CPU")
    inputs, options = elsewhere(device)[name]
    results = []
    for call in (sdpa, attention, flashcore.attention):
        torch.manual_seed(0)
        results.append(call(*inputs, **options))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    with pytest.raises(flashcore.FlashCoreError):
        flashcore.attention(*inputs, **options, backend="flashcore")
    with pytest.raises(RuntimeError):
        attention(*inputs, **options, fallback=False)


def test_gradients_are_those_of_torch(device: str) -> None:
    inputs = [torch.randn(2, 3, 5, 16, device=device, requires_grad=True) for _ in range(3)]
    wanted = torch.autograd.grad(sdpa(*inputs, is_causal=True).square().sum(), inputs)
    for call in (attention, flashcore.attention):
        found = torch.autograd.grad(call(*inputs, is_causal=True).square().sum(), inputs)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    for refused in (
        lambda: flashcore.attention(*inputs, backend="flashcore"),
        lambda: flashcore.attention(*inputs, return_lse=True),
        lambda: flashcore.attention(*inputs, window=(1, 1)),
    ):
        with pytest.raises(flashcore.UnsupportedError, match="query: requires_grad; there is no backward yet"):
            refused()
    with torch.no_grad():
        assert not attention(*inputs).requires_grad


LOGGED = """
import torch, flashcore
x = torch.randn(1, 2, 5, 16)
for _ in range(3):
    flashcore.attention(x, x, x, dropout_p=0.5)
    torch.ops.flashcore.attention(x, x, x, dropout_p=0.25)
    flashcore.attention(x.requires_grad_(), x, x)
    x = x.detach()
"""


def test_a_fall_through_is_logged_once_for_each_reason() -> None:
    done = subprocess.run([sys.executable, "-c", LOGGED], capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "answers instead" in line]
    assert len(lines) == 3, done.stderr
    assert "dropout_p: given 0.5; only 0.0" in lines[0]
    assert "requires_grad" in lines[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: str, dtype: torch.dtype) -> None:
    inputs = tuple(torch.randn(2, 3, 5, 16, device=device) for _ in range(3))
    mask = torch.randn(5, 5, device=device)
    with torch.autocast(device, dtype=dtype), torch.no_grad():
        for call in (attention, flashcore.attention):
            out = call(*inputs, mask)
            assert out.dtype == sdpa(*inputs, mask).dtype == dtype
            assert torch.equal(out, attention(*(x.to(dtype) for x in inputs), mask.to(dtype)))
        wide = tuple(x.double() for x in inputs)
        assert attention(*wide).dtype == torch.float64
        assert attention_lse(*inputs)[1].dtype == torch.float32


def samples(device: str, dtype: torch.dtype) -> list[Any]:
    methods = pytest.importorskip(
        "torch.testing._internal.common_methods_invocations", reason="torch's own tests need the package expecttest"
    )
    (info,) = [op for op in methods.op_db if op.name == "nn.functional.scaled_dot_product_attention"]
    return list(info.sample_inputs(device, dtype, requires_grad=False))


def test_the_samples_of_torch(place: tuple[str, torch.dtype]) -> None:
    """What PyTorch tests its own SDPA with."""
    found = samples(*place)
    assert len(found) > 20
    for sample in found:
        inputs = (sample.input, *sample.args)
        torch.manual_seed(0)
        out = attention(*inputs, **sample.kwargs)
        if sample.kwargs.get("dropout_p"):
            torch.manual_seed(0)
            assert torch.equal(out, sdpa(*inputs, **sample.kwargs))
        else:
            assert_as_sdpa(inputs, out, **sample.kwargs)


def checked_calls(device: str) -> list[tuple[Any, tuple[Tensor, ...], dict[str, Any]]]:
    query, key, value = Case(seq_q=5, seq_k=7).tensors(device, torch.float16)
    mask = torch.ones(5, 7, dtype=torch.bool, device=device)
    swapped = query.transpose(1, 2).contiguous().transpose(1, 2)
    wide = tuple(x.float().requires_grad_() for x in (query, key, value))
    return [
        (attention, (query, key, value), {}),
        (attention, (swapped, key, value[..., :8]), {"is_causal": True}),
        (attention, (query, key, value, mask), {"scale": 0.5}),
        (attention, (query, key[:, :1], value[:, :1]), {"enable_gqa": True}),
        (attention, (query, key, value), {"window_left": 2, "bottom_right": True}),
        (attention, wide, {}),
        (attention_lse, (query, key, value), {"is_causal": True}),
    ]


@pytest.mark.parametrize("index", range(7))
def test_opcheck(index: int, device: str) -> None:
    operator, inputs, options = checked_calls(device)[index]
    outcome = torch.library.opcheck(operator.default, inputs, options)
    assert set(outcome.values()) == {"SUCCESS"}, outcome


def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out, lse = flashcore.attention(query, key, value, is_causal=True, return_lse=True)
    windowed = flashcore.attention(query * 2, key, value, window=(3, 0))
    return out + windowed + lse[..., None].to(out.dtype)


def test_compile_and_dynamic_shapes(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch, seq in ((2, 5), (3, 9), (2, 17)):
        inputs = tuple(drawn((batch, 3, seq, 16), (device, torch.float16), i) for i in range(3))
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=2e-3, atol=2e-3)


def test_compile_with_gradients(device: str) -> None:
    torch._dynamo.reset()
    inputs = [torch.randn(2, 3, 5, 16, device=device, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(lambda q, k, v: flashcore.attention(q, k, v).square().sum(), fullgraph=True)
    found = torch.autograd.grad(compiled(*inputs), inputs)
    wanted = torch.autograd.grad(sdpa(*inputs).square().sum(), inputs)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, wanted, strict=True))


def test_out_in_compiled_code(device: str) -> None:
    torch._dynamo.reset()
    inputs = tuple(drawn((2, 3, 5, 16), (device, torch.float16), i) for i in range(3))
    out = torch.empty_like(inputs[0])
    torch.compile(lambda q, k, v, out: flashcore.attention(q, k, v, out=out), fullgraph=True)(*inputs, out)
    torch.testing.assert_close(out, flashcore.attention(*inputs), rtol=2e-3, atol=2e-3)


class Module(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return model(query, key, value)


def exported(device: str) -> tuple[torch.export.ExportedProgram, tuple[Tensor, ...]]:
    inputs = tuple(drawn((2, 3, 6, 16), (device, torch.float16), i) for i in range(3))
    seq = torch.export.Dim("seq", min=2, max=64)
    return torch.export.export(Module(), inputs, dynamic_shapes=({2: seq}, {2: seq}, {2: seq})), inputs


def test_export(device: str) -> None:
    program, inputs = exported(device)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"flashcore.attention.default", "flashcore.attention_lse.default"} <= targets
    assert torch.equal(program.module()(*inputs), model(*inputs))
    longer = tuple(x.repeat(1, 1, 3, 1) for x in inputs)
    assert torch.equal(program.module()(*longer), model(*longer))


class Torchs(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa(query, key, value)


def loads_packages(device: str, folder: Path) -> bool:
    """Whether this installation of torch can load what it has packed, without FlashCore: some crash."""
    module = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"
    inputs = tuple(drawn((2, 3, 6, 16), (device, torch.float16), i) for i in range(3))
    program = torch.export.export(Torchs(), inputs)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "torch.pt2"))
    return subprocess.run([sys.executable, "-c", module, package], capture_output=True, check=False).returncode == 0


def test_aot_inductor(device: str, tmp_path: Path) -> None:
    if not loads_packages(device, tmp_path):
        pytest.skip("this torch crashes when it loads a package of its own SDPA")
    program, inputs = exported(device)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    found = torch._inductor.aoti_load_package(package)(*inputs)
    torch.testing.assert_close(found, model(*inputs), rtol=2e-3, atol=2e-3)


def test_inference_mode(place: tuple[str, torch.dtype]) -> None:
    inputs = Case().tensors(*place)
    expected = attention(*inputs)
    with torch.inference_mode():
        assert torch.equal(attention(*inputs), expected)
        assert torch.equal(flashcore.attention(*inputs), expected)


def test_vmap(place: tuple[str, torch.dtype]) -> None:
    inputs = tuple(drawn((4, 2, 3, 5, 16), place, i) for i in range(3))
    mask = drawn((5, 5), (place[0], torch.float32), 3) > -0.5
    dims: tuple[tuple[int | None, ...], ...] = ((0, 0, 0), (1, 1, 1), (0, None, None), (None, 0, 2))
    for in_dims in dims:
        chosen = tuple(x if d is not None else x[0] for x, d in zip(inputs, in_dims, strict=True))
        sizes = {x.shape[d] for x, d in zip(chosen, in_dims, strict=True) if d is not None}
        if len(sizes) > 1:
            continue
        rest = [
            x.select(d, 0).shape[:-3] if d is not None else x.shape[:-3] for x, d in zip(chosen, in_dims, strict=True)
        ]
        if len(set(rest)) > 1:
            continue
        for call in (attention, flashcore.attention):
            found = torch.vmap(lambda q, k, v, call=call: call(q, k, v, mask), in_dims)(*chosen)
            wanted = torch.vmap(lambda q, k, v: sdpa(q, k, v, mask), in_dims)(*chosen)
            torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    nested = torch.vmap(torch.vmap(attention))(*inputs)
    assert torch.equal(nested, attention(*inputs))
    _, lse = torch.vmap(attention_lse)(*inputs)
    assert torch.equal(lse, attention_lse(*inputs)[1])


@pytest.mark.parametrize("transform", ["grad", "functionalize", "jvp"])
def test_function_transforms(transform: str) -> None:
    x = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    apply: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
        "grad": lambda f: torch.func.grad(lambda x: f(x, x, x).square().sum())(x),
        "functionalize": lambda f: torch.func.functionalize(lambda x: f(x, x, x))(x),
        "jvp": lambda f: torch.func.jvp(lambda x: f(x, x, x), (x,), (x,))[1],
    }
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = apply[transform](sdpa)
        for call in (attention, flashcore.attention):
            torch.testing.assert_close(apply[transform](call), wanted)


def test_negative_views_and_subclasses(device: str) -> None:
    class Named(torch.Tensor):
        pass

    query = torch.randn(2, 3, 5, 16, device=device).half()
    negative = torch._neg_view(query)
    for call in (attention, flashcore.attention):
        assert torch.equal(call(negative, query, query), call(-query, query, query))
        assert torch.equal(call(query.as_subclass(Named), query, query).as_subclass(Tensor), call(query, query, query))


def test_modes_see_the_call() -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **kwargs or {})

    class Function(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **kwargs or {})

    x = torch.randn(1, 2, 5, 16)
    for mode in (Dispatch(), Function()):
        seen.clear()
        with mode:
            flashcore.attention(x, x, x)
        assert any("flashcore.attention" in name for name in seen)


def test_jit_tracing_sees_the_call() -> None:
    x = torch.randn(1, 2, 5, 16)
    traced = torch.jit.trace(lambda x: flashcore.attention(x, x, x), (x,))
    assert "flashcore::attention" in str(traced.graph)
    other = torch.randn(1, 2, 5, 16)
    assert torch.equal(traced(other), flashcore.attention(other, other, other))


def test_every_combination_of_optional_arguments(device: str) -> None:
    """The boxes of optional arguments are taken apart and freed here."""
    query, key, value = Case(seq_q=6, seq_k=6).tensors(device, torch.float16)
    mask = torch.ones(6, 6, dtype=torch.bool, device=device)
    for attn_mask, scale, left, right in itertools.product((None, mask), (None, 0.25), (None, 2), (None, 3)):
        found = attention(query, key, value, attn_mask, scale=scale, window_left=left, window_right=right)
        wanted = flashcore.attention(
            query, key, value, attn_mask, scale=scale, window=(left, right) if left or right else None
        )
        assert torch.equal(found, wanted)


def test_the_symbols_of_libtorch() -> None:
    """The list that `docs/pytorch.md` gives, in the torch that is installed."""
    symbols = flashcore._core.torch_symbols()
    libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    assert len(symbols) == len(set(symbols)) == 17
    assert all(hasattr(libtorch, name) for name in symbols)


def test_memory_does_not_grow(device: str) -> None:
    x = torch.randn(1, 2, 8, 16).to(device, torch.float16)
    mask = torch.ones(8, 8, dtype=torch.bool, device=device)

    def calls(count: int) -> None:
        for _ in range(count):
            attention(x, x, x, mask, scale=0.5, window_left=3)
            attention_lse(x, x, x)
            with pytest.raises(RuntimeError):
                attention(x, x, x, mask, is_causal=True)
            with pytest.raises(flashcore.InvalidArgumentError):
                flashcore.attention(x, x, x, mask, is_causal=True)

    calls(500)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(5000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096, "KiB"
