"""Runs a portable kernel in Triton's interpreter, in a process of its own, from its spec: the arguments come from the
quantities that the spec names, as they do in the runtime.

Triton decides when it is imported whether to interpret, so nothing here imports it before `run` does, in the worker.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from typing import Any

import numpy as np

from kernels.specs import Spec
from kernels.tests.problem import CANARY, FAR, Array, Problem, poisoned


class HostArray:
    """As much of a torch tensor as the interpreter asks for: an address and a dtype. It is its own storage."""

    def __init__(self, address: int, dtype: str) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address

    def untyped_storage(self) -> HostArray:
        return self

    def cpu(self) -> HostArray:
        return self

    def copy_(self, other: HostArray) -> None:
        pass

    def new_empty(self, *_: Any, **__: Any) -> HostArray:
        return HostArray(0, self.dtype)

    def set_(self, storage: HostArray, *_: Any) -> None:
        self.address = storage.address

    def storage_offset(self) -> int:
        return 0

    size = stride = storage_offset


def _host(array: Array) -> HostArray:
    return HostArray(array.ctypes.data, str(array.dtype))


def quantities(problem: Problem, spec: Spec, tensors: dict[str, Array], lse: Array) -> dict[str, Any]:
    """Every quantity of docs/bundle.md that a portable kernel may name."""
    values: dict[str, Any] = {name: _host(tensor) for name, tensor in tensors.items()}
    values["lse"] = _host(lse) if problem.lse else HostArray(0, "float32")
    for name, tensor in tensors.items():
        axes = ("batch", "head", "query", "key") if name == "attn_mask" else ("batch", "head", "seq", "dim")
        for axis, stride in zip(axes, tensor.strides, strict=True):
            values[f"{name}.stride.{axis}"] = stride // tensor.itemsize
    for name in ("batch", "num_heads_q", "num_heads_kv", "group", "head_dim_qk", "head_dim_v"):
        values[name] = getattr(problem, name)
    values["seq_len_q"], values["seq_len_k"] = problem.seq_q, problem.seq_k
    values["band_lo"], values["band_hi"] = problem.band or (-FAR, FAR)
    values["scale"], values["scale_log2"] = problem.scale, problem.scale * math.log2(math.e)
    values["tiles_query"] = -(-problem.seq_q // spec.tile.query)
    return values


APPROXIMATIONS = {
    "rcp.approx.ftz.f32 $0, $1;": np.reciprocal,
    "lg2.approx.ftz.f32 $0, $1;": np.log2,
}


def _inline_asm(_builder: Any, asm: str, _constraints: str, values: list[Any], *_: Any) -> Any:
    """The instructions that the kernels name, which the interpreter does not know, to the last bit."""
    from triton.runtime.interpreter import TensorHandle

    (value,) = values

    class Call:
        def get_result(self, _index: int) -> Any:
            return TensorHandle(APPROXIMATIONS[asm](value.data), value.dtype)

    return Call()


def run(spec: Spec, problem: Problem, tensors: dict[str, Array]) -> tuple[Array, Array]:
    """out and lse. Fails if the kernel wrote anywhere else."""
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter = importlib.import_module("triton.runtime.interpreter")
    interpreter.InterpreterBuilder.create_inline_asm = _inline_asm
    (launch,) = spec.launches
    kernel = getattr(importlib.import_module(launch.sources[0]), launch.kernel)
    buffer, out = poisoned(problem.shape("out"), problem.layout, problem.alignment, CANARY)
    lse_buffer = np.full(math.prod(problem.shape("out")[:3]) + 2, CANARY, np.float32)
    values = quantities(problem, spec, tensors | {"out": out}, lse_buffer[1:])
    arguments = {
        name: launch.constexprs[name] if kind == "constexpr" else values[launch.values[name]]
        for name, kind in launch.signature.items()
    }
    grid = math.prod(values[factor] if isinstance(factor, str) else factor for factor in launch.grid.x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel[(grid,)](**arguments)
    result, lse = out.copy(), lse_buffer[1:-1].reshape(problem.shape("out")[:3]).copy()
    out[...] = CANARY
    assert (buffer == np.float16(CANARY)).all(), "the kernel wrote outside the output"
    ends = lse_buffer[[0, -1]] if problem.lse else lse_buffer
    assert (ends == np.float32(CANARY)).all(), "the kernel wrote outside the lse"
    return result, lse
