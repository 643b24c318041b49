"""What an attention call costs the host, by the way it is made.

    python benches/overhead.py --json OUT [--rust LIBRARY] [--commit COMMIT] [--rounds N] [--device cpu]

LIBRARY is `libflashcore_benches.so` (`cargo build --release -p flashcore-benches --lib`), which makes the same calls
from Rust, in this process. Kinds of rows:

- `path`: nanoseconds of the host for one call of (8, 8, 128, 64), f16, out of 200 in a row, which keep the queue from
  running empty; the device is waited for between them. All ways in turn within each round, with autograd on ("grad"),
  in inference_mode ("inference"), and from Rust ("rust"). `raw` is the launch alone: every other row is to be read
  against it.
- `floor`: a whole call with an empty queue that launches a kernel which does nothing.
- `configuration`: the nine small configurations of `first_light.py`: whole calls with an empty queue, and device times.
- `graph`: a decode step of 32 layers in a CUDA graph: host time of a replay, device time, and the same eagerly.
- `criterion`: what Rust adds to a launch, over the device time of each configuration.

On the CPU (for tests of this program) there are no launches, and only the `path` rows that need none.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import first_light
import torch
import torch.nn.functional as F
from timing import replay
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashcore

Row = dict[str, Any]
Call = Callable[[], Any]
SHAPE = (8, 8, 128, 64)
CALLS = 200
LAYERS = 32
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_ns(call: Call, calls: int = CALLS) -> float:
    """Nanoseconds of the host for one of many calls in a row."""
    synchronize()
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    spent = time.perf_counter_ns() - start
    synchronize()
    return spent / calls


def ways(device: str) -> dict[str, Call]:
    """Every way to make the call from Python."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(SHAPE, generator=generator).to(device, torch.float16) for _ in range(3))
    if device == "cpu":
        q, k, v = (x[:0] for x in (q, k, v))  # nothing to compute: what is left is the way there
    out = torch.empty_like(q)
    plan = flashcore.Runtime(device).plan(q, k, v, out=out)

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    found: dict[str, Call] = {
        "torch.empty_like": lambda: torch.empty_like(q),
        "Plan.launch": plan.launch,
        "Plan.launch, then torch.empty_like": lambda: (plan.launch(), torch.empty_like(q)),
        "flashcore.attention, out": lambda: flashcore.attention(q, k, v, out=out),
        "flashcore.attention, out, other tensors": other_tensors(q),
        "flashcore.attention": lambda: flashcore.attention(q, k, v),
        "torch.ops.flashcore.attention": lambda: torch.ops.flashcore.attention(q, k, v),
        "torch.ops.aten.alias": lambda: torch.ops.aten.alias(q),
        "SDPA": sdpa,
        "SDPA, overridden": sdpa,
    }
    if device == "cuda":
        found |= {f"SDPA, {name}": sdpa for name in BACKENDS}
        found |= peers(q, k, v)
    return found


def other_tensors(like: torch.Tensor) -> Call:
    """A call with tensors that were not called with lately: it goes round more of them than FlashCore remembers."""
    sets = [tuple(torch.empty_like(like).normal_() for _ in range(4)) for _ in range(5 * CALLS)]
    turn = itertools.cycle(sets)

    def call() -> None:
        q, k, v, out = next(turn)
        flashcore.attention(q, k, v, out=out)

    return call


def peers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Call]:
    """Other libraries' ways, where they are installed."""
    found: dict[str, Call] = {}
    for name, make in {"FA4": fa4, "Triton": triton_launches}.items():
        try:
            found |= make(q, k, v)
        except Exception as error:
            print(f"without {name}: {type(error).__name__}: {error}", file=sys.stderr)
    return found


def fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Call]:
    from flash_attn.cute.interface import flash_attn_func

    by_seq = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    return {"FA4": lambda: flash_attn_func(*by_seq)}


def triton_launches(x: torch.Tensor, *_: torch.Tensor) -> dict[str, Call]:
    """A Triton kernel with the parameters of the portable forward that does next to nothing, launched three ways."""
    from launched import kernel

    pointers = [x] * 5
    numbers = [*SHAPE, *[x.stride(dim) for dim in range(3)] * 4, 7, 9, 11, 13]
    grid = (64, 1, 1)
    compiled = kernel[grid](*pointers, *numbers, 0.125)
    return {
        "Triton JIT": lambda: kernel[grid](*pointers, *numbers, 0.125),
        "Triton CompiledKernel": lambda: compiled[grid](*pointers, *numbers, 0.125),
        "cuLaunchKernelEx, ctypes": ctypes_launch(compiled, grid, pointers, numbers),
    }


class LaunchConfig(ctypes.Structure):
    """`CUlaunchConfig`."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


def ctypes_launch(compiled: Any, grid: tuple[int, ...], pointers: list[torch.Tensor], numbers: list[int]) -> Call:
    """The bare driver call from Python, with its arguments made ready."""
    driver = ctypes.CDLL("libcuda.so.1")
    values: list[Any] = [ctypes.c_void_p(tensor.data_ptr()) for tensor in pointers]
    # Triton drops what it compiled in, so the kernel takes fewer than these. All are 8 bytes wide, and it follows none.
    values += [ctypes.c_int64(number) for number in numbers]
    values += [ctypes.c_double(0.125), ctypes.c_void_p(0), ctypes.c_void_p(0)]
    arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    stream = torch.cuda.current_stream().cuda_stream
    threads = 32 * compiled.metadata.num_warps
    config = LaunchConfig(*grid, threads, 1, 1, compiled.metadata.shared, stream, None, 0)
    function = ctypes.c_void_p(compiled.function)
    launch, place = driver.cuLaunchKernelEx, ctypes.byref(config)

    def call() -> None:
        if launch(place, function, arguments, None):
            raise RuntimeError("cuLaunchKernelEx failed")

    call.keep = (values, config)  # type: ignore[attr-defined]
    return call


def modes() -> dict[str, Callable[[], contextlib.AbstractContextManager[Any]]]:
    return {"grad": contextlib.nullcontext, "inference": torch.inference_mode}


# In the library's order.
RUST = ("raw", "prepared", "repeated", "first_seen")


def rust_ways(library: Path) -> dict[str, Callable[[], float]]:
    """The same calls from Rust: each way gives nanoseconds of the host for one of `CALLS` calls."""
    measure = ctypes.CDLL(str(library)).flashcore_host_path
    measure.argtypes, measure.restype = (ctypes.c_uint32, ctypes.c_uint64), ctypes.c_double
    return {name: functools.partial(measure, number, CALLS) for number, name in enumerate(RUST)}


def turns(device: str, rust: Path | None) -> dict[tuple[str, str], Callable[[], float]]:
    """Every way in every mode: one measurement of it, in nanoseconds of the host for a call."""

    def turn(name: str, mode: str, call: Call) -> float:
        with modes()[mode](), context_of(name, device):
            return host_ns(call)

    found: dict[tuple[str, str], Callable[[], float]] = {
        (name, mode): functools.partial(turn, name, mode, call)
        for name, call in ways(device).items()
        for mode in modes()
    }
    for name, measure in (rust_ways(rust) if rust else {}).items():
        found[name, "rust"] = measure
    return found


def paths(device: str, rounds: int, seed: int, rust: Path | None) -> Iterator[Row]:
    """Every way in every mode, in random order within each round."""
    figures: dict[tuple[str, str], list[float]] = {}
    failed: dict[tuple[str, str], str] = {}
    every = turns(device, rust)
    shuffle = random.Random(seed)
    for done in range(-2, rounds):
        for way in shuffle.sample(list(every), len(every)):
            if way in failed:
                continue
            try:
                nanoseconds = every[way]()
            except Exception as error:
                failed[way] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                continue
            if done >= 0:
                figures.setdefault(way, []).append(nanoseconds)
    for name, mode in every:
        head = {"kind": "path", "name": name, "mode": mode}
        if (name, mode) in failed:
            yield head | {"error": failed[name, mode]}
        else:
            found = figures[name, mode]
            yield head | {"median_ns": statistics.median(found), "rounds_ns": [round(x, 1) for x in found]}


def context_of(name: str, device: str) -> contextlib.AbstractContextManager[Any]:
    """What has to be on for a way; entered anew for every turn, outside of what is timed."""
    if name == "SDPA, overridden":
        return flashcore.sdpa_override((device,))
    backend = BACKENDS.get(name.removeprefix("SDPA, "))
    return sdpa_kernel(backend) if backend is not None else contextlib.nullcontext()


def floor_rows(rounds: int) -> Iterator[Row]:
    """What no whole call can go below: the bare launch of a kernel that does nothing, and the wait for it."""
    with contextlib.suppress(ImportError):
        launch = triton_launches(torch.zeros(SHAPE, dtype=torch.float16, device="cuda"))["cuLaunchKernelEx, ctypes"]
        found = [first_light.whole_call(launch) for _ in range(20 * (rounds + 2))][40:]
        yield {"kind": "floor", "name": "launch and wait", "median_us": statistics.median(found)}


def graph_rows() -> Iterator[Row]:
    """A decode step: 32 layers of one query over 2048 keys, grouped heads."""
    query = torch.randn(1, 32, 1, 128, dtype=torch.float16, device="cuda")
    cache = [torch.randn(1, 8, 2048, 128, dtype=torch.float16, device="cuda") for _ in range(2)]
    out = torch.empty_like(query)
    steps: dict[str, Call] = {
        "flashcore": lambda: flashcore.attention(query, *cache, enable_gqa=True, out=out),
        "sdpa": lambda: F.scaled_dot_product_attention(query, *cache, enable_gqa=True),
        "copy of the query": lambda: out.copy_(query),
    }
    for name, step in steps.items():

        def loop(step: Call = step) -> None:
            for _ in range(LAYERS):
                step()

        with torch.inference_mode():
            loop()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loop()
            replays = [host_ns(graph.replay, 20) / 1e3 for _ in range(31)]
            device = [replay(graph) * 1e3 for _ in range(31)]
            eager = [host_ns(loop, 5) / 1e3 for _ in range(31)]
        yield {
            "kind": "graph",
            "name": name,
            "layers": LAYERS,
            "replay_host_us": statistics.median(replays),
            "device_us": statistics.median(device),
            "eager_host_us": statistics.median(eager),
        }


def criterion_rows(rows: list[Row]) -> Iterator[Row]:
    """What Rust adds to a launch, over the device time that the Python runtime measured."""
    rust = {row["name"]: row["rounds_ns"] for row in rows if row["kind"] == "path" and row["mode"] == "rust"}
    if not rust:
        return
    # Within the rounds, so that what changes from round to round falls out.
    extra = statistics.median(call - launch for call, launch in zip(rust["prepared"], rust["raw"], strict=True))
    for row in rows:
        if row["kind"] == "configuration":
            device_us = row["arms"]["flashcore"]["device_us"]["median"]
            yield {
                "kind": "criterion",
                "name": row["name"],
                "rust_adds_ns": extra,
                "device_us": device_us,
                "share": extra / 1e3 / device_us,
            }


def environment(device: str) -> Row:
    card = {"name": torch.cuda.get_device_name()} if device == "cuda" else None
    return {"gpu": card, "python": first_light.environment(), "calls": CALLS, "shape": SHAPE}


def show(row: Row) -> None:
    if row["kind"] == "path":
        figure = f"{row['median_ns'] / 1e3:8.2f} us" if "median_ns" in row else row["error"]
        print(f"{row['mode']:10} {row['name']:34} {figure}")
    elif row["kind"] != "configuration":
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    else:
        first_light.show(row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rust", type=Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows = list(paths(args.device, args.rounds, args.seed, args.rust))
    if args.device == "cuda":
        with torch.inference_mode():
            rows += floor_rows(args.rounds)
            rows += first_light.configurations(30, 20, args.seed)
        rows += graph_rows()
        rows += criterion_rows(rows)
    for row in rows:
        show(row)
    document = {
        "schema": "flashcore.evidence/1",
        "topic": "overhead",
        "commit": args.commit,
        "env": environment(args.device),
        "rows": rows,
    }
    args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
