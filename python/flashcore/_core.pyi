from typing import Any, Literal, TypeVar, final

import numpy
import torch

__all__ = [
    "Bundle",
    "DeviceInfo",
    "Explanation",
    "Kernel",
    "LastPlan",
    "Plan",
    "Runtime",
    "__version__",
    "attention",
    "bundles",
    "devices",
    "explain",
    "is_quiet",
    "last_failure",
    "last_plan",
    "log_fallback",
    "register_torch_operators",
    "start_logging",
    "torch_symbols",
]

_Array = TypeVar("_Array", torch.Tensor, numpy.ndarray[Any, Any])
_Window = tuple[int | None, int | None]
_Align = Literal["top_left", "bottom_right"]

__version__: str

def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: _Window | None,
    causal_align: str,
    return_lse: bool,
    out: Any,
    backend: str,
    /,
) -> Any: ...
def last_plan() -> LastPlan | None: ...
def start_logging(level: str) -> None: ...
def register_torch_operators() -> None: ...
def torch_symbols() -> list[str]: ...
def is_quiet(*tensors: torch.Tensor) -> tuple[bool, bool | None]: ...
def last_failure() -> Exception | None: ...
def log_fallback(reason: str) -> None: ...
def explain(
    query: _Array,
    key: _Array,
    value: _Array,
    attn_mask: _Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: _Window | None = None,
    causal_align: _Align = "top_left",
) -> Explanation: ...
def devices() -> list[DeviceInfo]: ...
def bundles() -> list[Bundle]: ...

@final
class Explanation:
    @property
    def request(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def chosen(self) -> str | None: ...
    @property
    def rule(self) -> str | None: ...
    @property
    def rejected(self) -> list[tuple[str, str]]: ...

@final
class LastPlan:
    @property
    def device(self) -> str: ...
    @property
    def kernel(self) -> str: ...
    @property
    def request(self) -> str: ...

@final
class DeviceInfo:
    @property
    def ordinal(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def compute_capability(self) -> tuple[int, int]: ...
    @property
    def sm_count(self) -> int: ...
    @property
    def total_memory(self) -> int: ...
    @property
    def driver_version(self) -> tuple[int, int]: ...

@final
class Bundle:
    @staticmethod
    def parse(data: bytes) -> Bundle: ...
    @property
    def arch(self) -> str: ...
    @property
    def triton(self) -> str: ...
    @property
    def ptxas(self) -> str: ...
    @property
    def kernels(self) -> list[Kernel]: ...

@final
class Kernel:
    @property
    def name(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def head_dim_qk(self) -> tuple[int, int]: ...
    @property
    def head_dim_v(self) -> tuple[int, int]: ...
    @property
    def band(self) -> bool: ...
    @property
    def attn_mask(self) -> str: ...
    @property
    def tile(self) -> tuple[int, int, int]: ...
    @property
    def priority(self) -> int: ...
    @property
    def block_threads(self) -> int: ...
    @property
    def registers(self) -> int: ...
    @property
    def spill_bytes(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def code(self) -> str: ...
    @property
    def code_bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    @property
    def audit(self) -> str: ...

@final
class Runtime:
    def __new__(
        cls,
        device: str = "cuda:0",
        *,
        arch: str | None = None,
        bundle: bytes | None = None,
        audited_only: bool = False,
    ) -> Runtime: ...
    @property
    def device(self) -> str: ...
    @property
    def info(self) -> DeviceInfo | None: ...
    @property
    def bundle(self) -> Bundle | None: ...
    def plan(
        self,
        query: _Array,
        key: _Array,
        value: _Array,
        attn_mask: _Array | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        window: _Window | None = None,
        causal_align: _Align = "top_left",
        return_lse: bool = False,
        out: _Array | None = None,
    ) -> Plan: ...

@final
class Plan:
    @property
    def kernel(self) -> str: ...
    @property
    def out(self) -> Any: ...
    @property
    def lse(self) -> Any: ...
    def launch(self) -> None: ...
