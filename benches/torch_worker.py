"""Measures FlashCore and SDPA from Python for `flashcore-validate`: a program for its `--worker`.

    flashcore-validate compare --worker "python benches/torch_worker.py" --baseline sdpa --candidate flashcore \\
        --modes call,graph --json OUT

Arms: `flashcore`, `sdpa` (what torch chooses), `sdpa_flash`, `sdpa_cudnn`, `sdpa_efficient`, `sdpa_math`. It is started
as `torch_worker.py measure-process N` with a suite as JSON on its standard input, and writes a line of JSON for every
sample and one for the process. Modes: `call`, the whole call with an empty queue by the host's clock, and `graph`, one
of 50 launches in a CUDA graph by events. Every arm makes its own output.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timing import replay
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashcore

LAUNCHES = 50
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
Case = dict[str, Any]
Call = Callable[[], torch.Tensor]


def write(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=False)


def unsupported(case: Case) -> str | None:
    """What of a case this program does not measure."""
    options = case["options"]
    plain = all(memory == {"order": "bhsd", "pad": 0, "offset": 0} for memory in case["memory"])
    if options["window"] is not None or case["attn_mask"] is not None or not plain:
        return "a window, a mask or memory that is not contiguous"
    if options["causal"] and options["causal_align"] != "top_left" and case["seq_len_q"] != case["seq_len_k"]:
        return "a bottom-right diagonal"
    return None


def tensors(case: Case, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    heads, rows = (case["num_heads_q"], case["num_heads_kv"]), (case["seq_len_q"], case["seq_len_k"])
    shapes = (
        (case["batch"], heads[0], rows[0], case["head_dim_qk"]),
        (case["batch"], heads[1], rows[1], case["head_dim_qk"]),
        (case["batch"], heads[1], rows[1], case["head_dim_v"]),
    )
    dtype = DTYPES[case["dtype"]]
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)
    return q, k, v


def call_of(name: str, case: Case, seed: int, device: str) -> Call:
    q, k, v = tensors(case, seed, device)
    options = case["options"]
    causal, scale = options["causal"], options["scale"]
    grouped = case["num_heads_q"] != case["num_heads_kv"]
    if name == "flashcore":
        return lambda: flashcore.attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    if name != "sdpa" and name not in BACKENDS:
        raise SystemExit(f"arm {name}: expected flashcore, sdpa, {', '.join(BACKENDS)}")
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)


@dataclass
class Arm:
    """One arm of one case."""

    name: str
    call: Call
    graph: torch.cuda.CUDAGraph | None = field(default=None)

    def warm_up(self, calls: int, device: str, graph: bool) -> None:
        for _ in range(max(calls, 1)):
            self.call()
        if device == "cuda":
            torch.cuda.synchronize()
            if graph:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    for _ in range(LAUNCHES):
                        self.call()

    def whole_call(self, device: str) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter_ns()
        self.call()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(time.perf_counter_ns() - start)

    def launch(self) -> float:
        """Nanoseconds of one launch."""
        assert self.graph is not None
        return round(replay(self.graph) * 1e6) / LAUNCHES


def chosen(name: str) -> Any:
    """Entered outside of what is timed: choosing a backend is no part of a call."""
    return sdpa_kernel(BACKENDS[name] if name in BACKENDS else list(BACKENDS.values()))


def sample(arm: Arm, mode: str, device: str) -> float:
    with chosen(arm.name):
        return arm.whole_call(device) if mode == "call" else arm.launch()


def measure(suite: dict[str, Any], process: int) -> None:
    protocol = suite["protocol"]
    names = [arm["source"]["external"] for arm in suite["arms"]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if bad := set(protocol["modes"]) - ({"call", "graph"} if device == "cuda" else {"call"}):
        raise SystemExit(f"modes {', '.join(sorted(bad))}: not measured from Python on {device}")
    for case in suite["cases"]:
        if reason := unsupported(case):
            raise SystemExit(f"{reason} is not measured from Python")
    arms = [[Arm(name, call_of(name, case, protocol["seed"], device)) for name in names] for case in suite["cases"]]
    for arm in (arm for group in arms for arm in group):
        with chosen(arm.name):
            arm.warm_up(protocol["warmup"], device, "graph" in protocol["modes"])
    turns(arms, protocol, process, device)
    floor = [[mode, None] for mode in protocol["modes"]]
    write({"report": {"process": process, "warmups": [], "floor_ns": floor, "state": None}})


def turns(arms: list[list[Arm]], protocol: dict[str, Any], process: int, device: str) -> None:
    """Blocks of all cases and modes in random order; in each the arms take turns, in one of both orders."""
    shuffle = random.Random(protocol["seed"] << 32 | process)
    order = [(case, mode) for case in range(len(arms)) for mode in protocol["modes"]]
    for block in range(protocol["blocks"]):
        shuffle.shuffle(order)
        for case, mode in order:
            group = list(enumerate(arms[case]))
            if shuffle.random() < 0.5:
                group.reverse()
            for position, (index, arm) in enumerate(group * protocol["samples"]):
                place = {"case": case, "mode": mode, "process": process, "block": block, "position": position}
                write({"sample": {**place, "arm": index, "ns": sample(arm, mode, device), "sm_mhz": None}})


def main() -> None:
    command, process = sys.argv[1:]
    if command != "measure-process":
        raise SystemExit(__doc__)
    with torch.inference_mode():
        measure(json.load(sys.stdin), int(process))


if __name__ == "__main__":
    main()
