"""FlashCore in the place of torch's own SDPA kernels."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashcore
import flashcore.sdpa
from reference import Case

sdpa = F.scaled_dot_product_attention
KERNELS = {
    "cuda": (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
    ),
    "cpu": ("_scaled_dot_product_flash_attention_for_cpu",),
}


@pytest.fixture(autouse=True)
def off_afterwards() -> Iterator[None]:
    yield
    flashcore.disable_sdpa()


def forget(device: str) -> None:
    """Makes some other call the last one."""
    x = torch.zeros(1, 1, 0, 8, dtype=torch.float16, device=device)
    flashcore.attention(x, x, x)


def reached(device: str, *inputs: Any, **options: Any) -> bool:
    """Whether FlashCore answered; the answer is right in any case."""
    forget(device)
    out = sdpa(*inputs, **options)
    plan = flashcore.last_plan()
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = sdpa(*wide, **options)
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=4e-3)
    return plan is not None and plan.kernel != "none"


CALLS: dict[str, tuple[Case, dict[str, Any]]] = {
    "plain": (Case(seq_q=64, seq_k=64, dim=64), {}),
    "causal": (Case(seq_q=64, seq_k=64, dim=64), {"is_causal": True}),
    "masked": (Case(seq_q=64, seq_k=64, dim=64), {"mask": "bool"}),
    "float mask": (Case(seq_q=40, seq_k=56, dim=64), {"mask": "float"}),
    "gqa": (Case(heads=6, heads_kv=2, seq_q=64, seq_k=64, dim=64), {"enable_gqa": True}),
    "head_dim 72": (Case(seq_q=33, seq_k=65, dim=72), {}),
    "scale": (Case(seq_q=64, seq_k=64, dim=64), {"scale": 0.3}),
    "decode": (Case(heads=8, heads_kv=8, seq_q=1, seq_k=300, dim=128), {}),
}


def arguments(name: str, device: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    case, options = CALLS[name]
    inputs = case.tensors(device, torch.float16)
    generator = torch.Generator().manual_seed(3)
    mask = torch.randn(case.seq_q, case.seq_k, generator=generator).to(device)
    kind = options.get("mask")
    options = {key: value for key, value in options.items() if key != "mask"}
    if kind:
        options["attn_mask"] = mask > -1 if kind == "bool" else mask.half()
    return inputs, options


@pytest.mark.parametrize("name", CALLS)
def test_sdpa_reaches_flashcore(name: str, device: str) -> None:
    """Under torch's default order of its backends."""
    inputs, options = arguments(name, device)
    mask = options.pop("attn_mask", None)
    positional = (*inputs, mask)
    with torch.no_grad():
        assert not reached(device, *positional, **options), "not active on import"
        with flashcore.sdpa_override((device,)):
            if device == "cpu" and name == "gqa":
                sdpa(*positional, **options)  # torch computes this one with its math backend on the CPU
            else:
                assert reached(device, *positional, **options)
        assert not reached(device, *positional, **options), "off again"


def test_every_backend_is_ours(cuda: str) -> None:
    inputs = Case(seq_q=64, seq_k=64, dim=64).tensors(cuda, torch.bfloat16)
    backends = torch.nn.attention.SDPBackend
    with torch.no_grad(), flashcore.sdpa_override():
        for backend in (backends.FLASH_ATTENTION, backends.CUDNN_ATTENTION, backends.EFFICIENT_ATTENTION):
            with torch.nn.attention.sdpa_kernel(backend):
                assert reached(cuda, *inputs, is_causal=True), backend
        with torch.nn.attention.sdpa_kernel(backends.MATH):
            assert not reached(cuda, *inputs)


def test_outputs_are_laid_out_as_torch_promises(device: str) -> None:
    """What was compiled against torch's kernels goes on working."""
    query, key, value = Case(heads=4, heads_kv=4, seq_q=24, seq_k=24, dim=64).tensors(device, torch.float16)
    swapped = query.transpose(1, 2).contiguous().transpose(1, 2)
    with torch.no_grad():
        for name in KERNELS[device]:
            operator = getattr(torch.ops.aten, name)
            flag = (None, False) if "flash" not in name else ()
            for tensors in ((query, key, value), (swapped, key, value)):
                with flashcore.sdpa_override((device,)):
                    found = operator(*tensors, *flag)
                theirs = operator(*tensors, *flag)
                meta = operator(*(x.to("meta") for x in tensors), *flag)
                assert found[0].shape == theirs[0].shape
                assert found[0].stride() == meta[0].stride() or found[0].stride() == theirs[0].stride(), name
                torch.testing.assert_close(found[0], theirs[0], rtol=2e-3, atol=2e-3)
                if "flash" in name:
                    assert found[1].shape == theirs[1].shape
                    torch.testing.assert_close(found[1].float(), theirs[1].float(), rtol=1e-3, atol=1e-3)


def test_what_goes_to_torch(device: str) -> None:
    inputs = [x.requires_grad_() for x in Case(seq_q=64, seq_k=64, dim=64).tensors(device, torch.float16)]
    wanted = torch.autograd.grad(sdpa(*inputs, is_causal=True).float().square().sum(), inputs)
    with flashcore.sdpa_override((device,)):
        forget(device)
        found = torch.autograd.grad(sdpa(*inputs, is_causal=True).float().square().sum(), inputs)
        assert flashcore.last_plan().kernel == "none"
        torch.manual_seed(0)
        dropped = sdpa(*inputs, dropout_p=0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    torch.manual_seed(0)
    assert torch.equal(dropped, sdpa(*inputs, dropout_p=0.5))


def test_varlen_attention_still_works(cuda: str) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    tensors = [torch.randn(96, 4, 64, dtype=torch.float16, device=cuda) for _ in range(3)]
    ends = torch.tensor([0, 32, 96], dtype=torch.int32, device=cuda)
    wanted = varlen.varlen_attn(*tensors, ends, ends, 64, 64)
    with flashcore.sdpa_override():
        assert torch.equal(varlen.varlen_attn(*tensors, ends, ends, 64, 64), wanted)
    assert torch.equal(varlen.varlen_attn(*tensors, ends, ends, 64, 64), wanted)


def test_compiled_code_reaches_flashcore(device: str) -> None:
    torch._dynamo.reset()
    inputs = Case(seq_q=64, seq_k=64, dim=64).tensors(device, torch.float16)
    compiled = torch.compile(lambda q, k, v: sdpa(q * 1.5, k, v, is_causal=True) + 1, fullgraph=True)
    with torch.no_grad(), flashcore.sdpa_override((device,)):
        forget(device)
        found = compiled(*inputs)
        assert flashcore.last_plan().kernel != "none"
    torch.testing.assert_close(found, sdpa(inputs[0] * 1.5, *inputs[1:], is_causal=True) + 1, rtol=4e-3, atol=4e-3)


def test_compiled_training(device: str) -> None:
    """The compiled forward asks for no gradients: FlashCore answers it, and torch's backward gets its results."""
    case = Case(seq_q=64, seq_k=64, dim=64)
    inputs = [x.requires_grad_() for x in case.tensors(device, torch.float16 if device == "cuda" else torch.float32)]
    for backend in (sdpa_kernel(SDPBackend.FLASH_ATTENTION), contextlib.nullcontext()):
        with backend:
            expected = torch.autograd.grad(sdpa(*inputs).sum(), inputs)
            with flashcore.sdpa_override((device,)):
                compiled = torch.compile(lambda *tensors: sdpa(*tensors), backend="aot_eager")
                found = torch.autograd.grad(compiled(*inputs).sum(), inputs)
        torch._dynamo.reset()
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_what_a_flash_backward_keeps() -> None:
    query, key, value = Case().tensors("cpu", torch.float16)
    returns = torch.ops.aten._scaled_dot_product_flash_attention.default._schema.returns
    results = flashcore.sdpa.flash(query, key, value)
    found = {result.name: value for result, value in zip(returns, results, strict=True)}
    kept = {"output", "logsumexp", *list(found)[6:8]}
    assert {name for name, value in found.items() if isinstance(value, Tensor)} == kept


def test_a_subclass_without_behaviour_reaches_flashcore() -> None:
    class Subclass(Tensor):
        pass

    query, key, value = Case().tensors("cpu", torch.float32)
    with torch.no_grad(), flashcore.sdpa_override(("cpu",)):
        assert reached("cpu", query.as_subclass(Subclass), key, value)


def test_cuda_graphs(cuda: str) -> None:
    inputs = Case(seq_q=64, seq_k=64, dim=64).tensors(cuda, torch.float16)
    with torch.no_grad(), flashcore.sdpa_override():
        expected = sdpa(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = sdpa(*inputs)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)


def test_switching() -> None:
    assert flashcore.sdpa_enabled() == ()
    flashcore.enable_sdpa(("cpu",))
    flashcore.enable_sdpa(("cpu",))
    assert flashcore.sdpa_enabled() == ("cpu",)
    with flashcore.sdpa_override(("cpu",)):
        pass
    assert flashcore.sdpa_enabled() == ("cpu",), "what was on stays on"
    flashcore.disable_sdpa()
    flashcore.disable_sdpa()
    assert flashcore.sdpa_enabled() == ()
    with pytest.raises(flashcore.InvalidArgumentError, match="device_types: given 'xpu'; accepted 'cuda', 'cpu'"):
        flashcore.enable_sdpa(("xpu",))


def test_the_registry_of_torch() -> None:
    if not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        pytest.skip(f"torch {torch.__version__} has no registry of flash implementations that gives them back")
    assert "FlashCore" in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None
    torch.nn.attention.activate_flash_attention_impl("FlashCore")
    assert torch.nn.attention.current_flash_attention_impl() == "FlashCore"
    assert flashcore.sdpa_enabled() == ("cuda",)
    torch.nn.attention.restore_flash_attention_impl()
    assert flashcore.sdpa_enabled() == ()


LOGGED = """
import torch, flashcore
x = torch.randn(1, 2, 5, 16)
with torch.no_grad(), flashcore.sdpa_override(("cpu",)):
    torch.nn.functional.scaled_dot_product_attention(x, x, x)
"""


def test_the_log_tells_which_kernel_ran() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOGGED],
        capture_output=True,
        text=True,
        check=True,
        env={**__import__("os").environ, "FLASHCORE_LOG": "info"},
    )
    assert "flashcore INFO: attention(f32" in done.stderr, done.stderr
    assert "runs cpu" in done.stderr


def test_last_plan(device: str) -> None:
    inputs = Case(heads=6, heads_kv=2, seq_q=40, seq_k=50, dim=64).tensors(device, torch.float16)
    for call in (flashcore.attention, torch.ops.flashcore.attention):
        forget(device)
        call(*inputs, enable_gqa=True)
        plan = flashcore.last_plan()
        assert plan.device.startswith(device)
        assert "heads 6/2" in plan.request
        chosen = flashcore.explain(*inputs, enable_gqa=True).chosen
        assert plan.kernel == ("cpu" if device == "cpu" else chosen)
        assert repr(plan) == f"<flashcore.LastPlan: {plan.kernel} on {plan.device}>"
