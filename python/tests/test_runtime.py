"""Runtimes, plans, decisions and bundles."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

import flashcore
from reference import Case, assert_correct

BUNDLES = Path(__file__).parents[2] / "flashcore-rs" / "bundle"


def driver_is_missing() -> bool:
    try:
        flashcore.devices()
    except flashcore.FlashCoreError as error:
        return isinstance(error, flashcore.DriverNotFoundError)
    return False


without_driver = pytest.mark.skipif(not driver_is_missing(), reason="this machine has a CUDA driver")


def test_plans_give_what_calls_give(device: str) -> None:
    case = Case(heads=6, heads_kv=2, seq_q=40, seq_k=50, dim=64, is_causal=True)
    query, key, value = case.tensors(device, torch.float16)
    plan = flashcore.Runtime(device).plan(query, key, value, return_lse=True, **case.options)
    assert not plan.kernel or plan.kernel == flashcore.explain(query, key, value, **case.options).chosen
    for seed in range(3):
        query.copy_(torch.randn(query.shape, generator=torch.Generator().manual_seed(seed)))
        plan.launch()
        assert_correct(case, (query, key, value), plan.out, plan.lse)


def test_plans_keep_their_memory(device: str) -> None:
    inputs = Case().tensors(device, torch.float16)
    expected = flashcore.attention(*inputs)
    plan = flashcore.Runtime(device).plan(*inputs)
    del inputs
    gc.collect()
    noise = [torch.full_like(expected, float("nan")) for _ in range(100)]
    plan.launch()
    assert torch.equal(plan.out, expected)
    del noise


def test_plans_keep_numpy_memory() -> None:
    query = np.random.default_rng(0).random((1, 2, 5, 8), np.float32)
    plan = flashcore.Runtime("cpu").plan(query, query, query)
    expected = flashcore.attention(query, query, query)
    del query
    gc.collect()
    plan.launch()
    np.testing.assert_array_equal(plan.out, expected)
    assert plan.lse is None


def test_the_cpu_runtime() -> None:
    runtime = flashcore.Runtime("cpu")
    assert (runtime.device, runtime.info, runtime.bundle) == ("cpu", None, None)
    assert repr(runtime) == "<flashcore.Runtime on cpu>"


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda0", "0"])
def test_device_names(name: str) -> None:
    with pytest.raises(flashcore.InvalidArgumentError, match=f'device: given "{name}"; accepted "cpu" or "cuda:0"'):
        flashcore.Runtime(name)


def test_explanations(device: str) -> None:
    query, key, value = Case(heads=4, heads_kv=2, dim=64).tensors(device, torch.float16)
    explanation = flashcore.explain(query, key, value, is_causal=True, enable_gqa=True)
    assert "heads 4/2" in explanation.request
    assert explanation.chosen is not None
    assert explanation.chosen in str(explanation)
    assert all(name and reason for name, reason in explanation.rejected)
    assert (explanation.arch == "cpu") == (device == "cpu")
    assert explanation.chosen in repr(explanation)
    rule = f" ({explanation.rule})" if explanation.rule else ""
    assert f"\n  runs {explanation.chosen}{rule}\n" in f"{explanation}\n"


def test_explanations_of_numpy_arrays() -> None:
    query = np.zeros((1, 2, 5, 8), np.float32)
    explanation = flashcore.explain(query, query, query)
    assert (explanation.chosen, explanation.rule) == ("attention_forward.cpu", None)


@without_driver
def test_no_driver() -> None:
    with pytest.raises(
        flashcore.DriverNotFoundError, match=r"CUDA driver not found: .*install the NVIDIA driver, or use"
    ):
        flashcore.Runtime("cuda:0")
    with pytest.raises(flashcore.DriverError):
        flashcore.devices()


def test_the_hierarchy_of_errors() -> None:
    bases = {
        flashcore.InvalidArgumentError: (flashcore.FlashCoreError, ValueError, RuntimeError),
        flashcore.UnsupportedError: (flashcore.FlashCoreError, NotImplementedError),
        flashcore.OutOfMemoryError: (flashcore.FlashCoreError, MemoryError),
        flashcore.ContextLostError: (flashcore.DriverError,),
        flashcore.DriverTooOldError: (flashcore.DriverError,),
        flashcore.DeviceNotFoundError: (flashcore.FlashCoreError,),
        flashcore.BundleNotFoundError: (flashcore.BundleError,),
    }
    for error, parents in bases.items():
        assert all(issubclass(error, parent) for parent in parents)


def test_embedded_bundles_are_the_committed_ones() -> None:
    embedded = {bundle.arch: bundle for bundle in flashcore.bundles()}
    committed = {path.stem: flashcore.Bundle.parse(path.read_bytes()) for path in BUNDLES.glob("*.fcb")}
    assert embedded.keys() == committed.keys()
    for arch, bundle in committed.items():
        assert [k.sha256 for k in embedded[arch].kernels] == [k.sha256 for k in bundle.kernels]
        assert len({k.name for k in bundle.kernels}) == len(bundle.kernels)


DAMAGE = {
    "empty": (lambda data: b"", "header: 0 bytes, expected 112"),
    "text": (lambda data: b"hello" * 100, "not a FlashCore bundle"),
    "truncated": (lambda data: data[:-1], r"body: \d+ bytes, expected \d+"),
    "longer": (lambda data: data + b"x", r"body: \d+ bytes, expected \d+"),
    "version": (lambda data: data[:8] + b"\2" + data[9:], "container version 2; this runtime reads version 1"),
    "hash": (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], "sha256 mismatch"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_bundles(name: str) -> None:
    damage, message = DAMAGE[name]
    data = next(BUNDLES.glob("sm_90a.fcb")).read_bytes()
    with pytest.raises(flashcore.BundleError, match=message):
        flashcore.Bundle.parse(damage(data))


def test_every_bundle_on_the_device_it_is_for(cuda: str) -> None:
    """Bundles that run here run correctly, PTX included; the others say that they do not."""
    case = Case(heads=8, heads_kv=2, seq_q=130, seq_k=150, dim=64, is_causal=True)
    inputs = case.tensors(cuda, torch.float16)
    ran = []
    for bundle in flashcore.bundles():
        try:
            runtime = flashcore.Runtime("cuda:0", arch=bundle.arch)
        except flashcore.BundleError as error:
            assert "the device is" in str(error)
            continue
        plan = runtime.plan(*inputs, return_lse=True, **case.options)
        plan.launch()
        assert_correct(case, inputs, plan.out, plan.lse)
        ran.append(bundle.arch)
    assert "compute_80" in ran
    assert len(ran) > 1


def test_devices(cuda: str) -> None:
    found = flashcore.devices()
    assert len(found) == torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(0)
    runtime = flashcore.Runtime("cuda:0")
    assert runtime.info is not None
    assert runtime.info.name == found[0].name == properties.name
    assert runtime.info.compute_capability == (properties.major, properties.minor)
    assert runtime.info.sm_count == properties.multi_processor_count
    with pytest.raises(flashcore.DeviceNotFoundError, match="no CUDA device 63: the driver reports"):
        flashcore.Runtime("cuda:63")


def test_foreign_and_damaged_bundles_on_a_device(cuda: str) -> None:
    with pytest.raises(flashcore.BundleError, match="not a FlashCore bundle"):
        flashcore.Runtime("cuda:0", bundle=b"hello" * 100)
    with pytest.raises(flashcore.BundleNotFoundError, match="no bundle for"):
        flashcore.Runtime("cuda:0", arch="sm_1")
    major, _ = torch.cuda.get_device_capability()
    foreign = "sm_80" if major != 8 else "sm_90a"
    with pytest.raises(flashcore.BundleError, match=f"bundle is for {foreign}, the device is"):
        flashcore.Runtime("cuda:0", bundle=(BUNDLES / f"{foreign}.fcb").read_bytes())


def test_audited_only_needs_kernels() -> None:
    with pytest.raises(ValueError, match="audited_only"):
        flashcore.Runtime("cpu", audited_only=True)
