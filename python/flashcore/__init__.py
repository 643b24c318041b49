"""Attention for NVIDIA GPUs as finished machine code.

>>> import numpy as np, flashcore
>>> query = key = value = np.ones((1, 2, 5, 8), np.float32)  # (batch, heads, seq, head_dim)
>>> flashcore.attention(query, key, value, is_causal=True).shape
(1, 2, 5, 8)
"""

import logging as _logging
import os as _os

from flashcore import _core
from flashcore._core import (
    Bundle,
    DeviceInfo,
    Explanation,
    Kernel,
    LastPlan,
    Plan,
    Runtime,
    __version__,
    bundles,
    devices,
    explain,
    last_plan,
)
from flashcore.errors import (
    BundleError,
    BundleNotFoundError,
    ContextLostError,
    DeviceNotFoundError,
    DriverError,
    DriverNotFoundError,
    DriverTooOldError,
    FlashCoreError,
    InvalidArgumentError,
    OutOfMemoryError,
    UnsupportedError,
)
from flashcore.functional import HAS_TORCH as _HAS_TORCH
from flashcore.functional import attention

__all__ = [
    "Bundle",
    "BundleError",
    "BundleNotFoundError",
    "ContextLostError",
    "DeviceInfo",
    "DeviceNotFoundError",
    "DriverError",
    "DriverNotFoundError",
    "DriverTooOldError",
    "Explanation",
    "FlashCoreError",
    "InvalidArgumentError",
    "Kernel",
    "LastPlan",
    "OutOfMemoryError",
    "Plan",
    "Runtime",
    "UnsupportedError",
    "__version__",
    "attention",
    "bundles",
    "devices",
    "explain",
    "last_plan",
]

if _HAS_TORCH:
    from flashcore import nn
    from flashcore.hf import register_transformers
    from flashcore.sdpa import disable_sdpa, enable_sdpa, sdpa_enabled, sdpa_override

    __all__ += ["disable_sdpa", "enable_sdpa", "nn", "register_transformers", "sdpa_enabled", "sdpa_override"]


def _start_logging(level: str | None) -> None:
    """Messages go to the logger "flashcore"; `FLASHCORE_LOG` also prints them, from that level on."""
    _core.start_logging(level or "warn")
    if level and level != "off":
        logger = _logging.getLogger("flashcore")
        handler = _logging.StreamHandler()
        handler.setFormatter(_logging.Formatter("flashcore %(levelname)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(_logging.DEBUG)
        logger.propagate = False


_start_logging(_os.environ.get("FLASHCORE_LOG"))
