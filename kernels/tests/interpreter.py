"""Runs a portable kernel in Triton's interpreter, in a process of its own, from its spec: the arguments come from the
quantities that the spec names, as they do in the runtime.

Triton decides when it is imported whether to interpret, so nothing here imports it before `run` does, in the worker.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
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


def _function(module: str, name: str, source: Path | None) -> Any:
    """A kernel, interpreted; `source` is a file to take the module's text from instead."""
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter = importlib.import_module("triton.runtime.interpreter")
    interpreter.InterpreterBuilder.create_inline_asm = _inline_asm
    if source is None:
        return getattr(importlib.import_module(module), name)
    found = spec_from_file_location(source.stem, source)
    assert found and found.loader
    loaded = module_from_spec(found)
    found.loader.exec_module(loaded)
    return getattr(loaded, name)


def _launch(spec: Spec, number: int, values: dict[str, Any], source: Path | None) -> None:
    launch = spec.launches[number]
    arguments = {
        name: launch.constexprs[name] if kind == "constexpr" else values[launch.values[name]]
        for name, kind in launch.signature.items()
    }
    grid = math.prod(values[factor] if isinstance(factor, str) else factor for factor in launch.grid.x)
    kernel = _function(launch.sources[0], launch.kernel, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel[(grid,)](**arguments)


RIM = 128  # elements on either side of a log-sum-exp


def _rimmed(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """A buffer full of canaries, and the part of it that an output of float32 gets."""
    buffer = np.full(math.prod(shape) + 2 * RIM, CANARY, np.float32)
    return buffer, buffer[RIM:-RIM].reshape(shape)


def run(spec: Spec, problem: Problem, tensors: dict[str, Array], source: Path | None = None) -> tuple[Array, Array]:
    """out and lse. Fails if the kernel wrote anywhere else."""
    buffer, out = poisoned(problem.shape("out"), problem.layout, problem.alignment, CANARY)
    lse_buffer, lse = _rimmed(problem.shape("out")[:3])
    _launch(spec, 0, quantities(problem, spec, tensors | {"out": out}, lse), source)
    result, lse_result = out.copy(), lse.copy()
    out[...] = CANARY
    assert (buffer == np.float16(CANARY)).all(), "the kernel wrote outside the output"
    if problem.lse:
        lse[...] = CANARY
    assert (lse_buffer == np.float32(CANARY)).all(), "the kernel wrote outside the lse"
    return result, lse_result


def combine(spec: Spec, parts: Array, sums: Array, num_heads_q: int, source: Path | None = None) -> tuple[Array, Array]:
    """What the second launch of a variant with split keys makes of the parts (heads, splits, seq, head_dim) and their
    base-2 log-sum-exps (heads, splits, seq): out in float16, (batch, num_heads_q, seq, head_dim), and lse."""
    heads, splits, seq, head_dim = parts.shape
    shape = (heads // num_heads_q, num_heads_q, seq)
    partial = np.concatenate([parts.ravel(), sums.ravel()]).astype(np.float32)
    out = np.full((*shape, head_dim), CANARY, np.float16)
    lse_buffer, lse = _rimmed(shape)
    tiles = -(-seq // spec.tile.query)
    values = {"workspace.0": _host(partial), "out": _host(out), "lse": _host(lse), "key_splits": splits}
    values |= {f"out.stride.{axis}": out.strides[i] // 2 for i, axis in enumerate(("batch", "head", "seq"))}
    values |= {"num_tiles": heads * tiles, "tiles_query": tiles, "num_heads_q": num_heads_q}
    values |= {"seq_len_q": seq, "head_dim_v": head_dim}
    _launch(spec, 1, values, source)
    result = lse.copy()
    lse[...] = CANARY
    assert (lse_buffer == np.float32(CANARY)).all(), "the kernel wrote outside the lse"
    return out, result
