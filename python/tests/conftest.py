"""Where and in which types the tests run."""

from __future__ import annotations

import pytest
import torch

HALF = (torch.float16, torch.bfloat16)
TYPES = {"cpu": (*HALF, torch.float32, torch.float64), "cuda": HALF}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def on(device: str, *values: object, id: str) -> object:
    """A parameter that needs `device`."""
    missing = device == "cuda" and not torch.cuda.is_available()
    return pytest.param(*values, id=id, marks=pytest.mark.skipif(missing, reason="no CUDA device"))


@pytest.fixture(params=[on(device, device, id=device) for device in TYPES])
def device(request: pytest.FixtureRequest) -> str:
    """Every place where attention runs."""
    return request.param


@pytest.fixture(
    params=[on(device, (device, dtype), id=f"{device}-{short(dtype)}") for device in TYPES for dtype in TYPES[device]]
)
def place(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """Every place and every type that it computes in."""
    return request.param


@pytest.fixture
def cuda() -> str:
    """The GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"
