"""Attention for NVIDIA GPUs as finished machine code.

>>> import numpy as np, flashcore
>>> query = key = value = np.ones((1, 2, 5, 8), np.float32)  # (batch, heads, seq, head_dim)
>>> flashcore.attention(query, key, value, is_causal=True).shape
(1, 2, 5, 8)
"""

import os

from flashcore import _core
from flashcore._core import (
    Bundle,
    DeviceInfo,
    Explanation,
    Kernel,
    Plan,
    Runtime,
    __version__,
    bundles,
    devices,
    explain,
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
    "OutOfMemoryError",
    "Plan",
    "Runtime",
    "UnsupportedError",
    "__version__",
    "attention",
    "bundles",
    "devices",
    "explain",
]

_core.start_logging(os.environ.get("FLASHCORE_LOG", "warn"))
