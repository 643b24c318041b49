"""FlashCore from Rust, from Python and beside PyTorch's own attention, in one process.

    python benches/first_light.py VALIDATOR --json OUT [--into EVIDENCE] [--device cpu]

VALIDATOR is the `flashcore-validate` program. Three kinds of rows are written:

- `path`: a case computed by the Rust program and again here from the same bits, through `flashcore.attention` and
  through `Runtime.plan(...).launch()`; all outputs must be the same bits.
- `python_repeat`: one call many times; all outputs must be the same bits.
- `configuration` (GPU only): the nine classic configurations, FlashCore and every SDPA backend in turn, in random order
  within each round. `call_us` is an event pair around one call with an empty queue, `wall_us` a call without events by
  the host's clock to the end of its work, `device_us` one of 50 launches in a CUDA graph. Caches are warm.

With `--into`, the rows are added to evidence that `flashcore-validate --json` wrote, which also says what ran where.
Exits with 1 when outputs differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import shlex
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timing import replay, timed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashcore

LAUNCHES = 50
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.bool,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CONFIGURATIONS = [(seq, batch) for seq in (128, 256, 512) for batch in (8, 16, 32)]
HEADS, HEAD_DIM = 8, 64
# Bytes and operations per second that the card was measured to reach.
CEILINGS = {"H200": (4480e9, 787e12)}

Row = dict[str, Any]


@dataclass
class Dump:
    """A case that the Rust program ran: the call, its inputs, and what it wrote."""

    name: str
    variant: str
    case: Row
    tensors: dict[str, torch.Tensor]

    @staticmethod
    def read(path: Path, device: str) -> Dump:
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        metadata = header.pop("__metadata__")
        tensors = {}
        for name, view in json.loads(metadata["tensors"]).items():
            entry = header[name]
            first, last = (8 + size + offset for offset in entry["data_offsets"])
            memory = torch.frombuffer(bytearray(data[first:last]), dtype=DTYPES[entry["dtype"]]).to(device)
            tensors[name] = torch.as_strided(memory, view["shape"], view["strides"], view["start"])
        return Dump(metadata["name"], metadata["variant"], json.loads(metadata["case"]), tensors)

    def arguments(self) -> dict[str, Any]:
        """Those of `flashcore.attention`, with an output of the same strides."""
        options = self.case["options"]
        window = (options["window"]["left"], options["window"]["right"]) if options["window"] else None
        causal = options["causal"]
        if causal and "attn_mask" in self.tensors:
            # Python takes a mask or `is_causal`, as PyTorch does; a window says the same.
            causal, window = False, (window[0] if window else None, 0)
        return {
            "query": self.tensors["query"],
            "key": self.tensors["key"],
            "value": self.tensors["value"],
            "attn_mask": self.tensors.get("attn_mask"),
            "is_causal": causal,
            "causal_align": options["causal_align"],
            "window": window,
            "scale": options["scale"],
            "enable_gqa": self.case["num_heads_q"] != self.case["num_heads_kv"],
            "return_lse": self.case["lse"],
            "out": self.blank(),
        }

    def blank(self) -> torch.Tensor:
        """An output like the Rust program's, in memory of its own, all NaN."""
        out = self.tensors["out"]
        memory = torch.full((out.untyped_storage().nbytes() // out.element_size(),), torch.nan, dtype=out.dtype)
        return torch.as_strided(memory.to(out.device), out.shape, out.stride(), out.storage_offset())


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = BITS[one.element_size()]
    return one.shape == other.shape and torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def paths(validator: Path, device: str, cases: list[str]) -> Iterator[Row]:
    """Every dumped case through the two Python paths."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([validator, "dump", folder, "--device", device, *cases], check=True)
        runtime = flashcore.Runtime("cuda:0" if device == "cuda" else device)
        for file in sorted(Path(folder).iterdir()):
            dump = Dump.read(file, device)
            yield {"kind": "path", "name": dump.name, "case": dump.case, **path(runtime, dump)}


def path(runtime: flashcore.Runtime, dump: Dump) -> Row:
    expected = (dump.tensors["out"], dump.tensors["lse"].squeeze(-1)) if "lse" in dump.tensors else dump.tensors["out"]
    torch_result = flashcore.attention(**dump.arguments())
    plan = runtime.plan(**dump.arguments())
    plan.launch()
    if device_of(expected) == "cuda":
        torch.cuda.synchronize()
    plan_result = (plan.out, plan.lse) if "lse" in dump.tensors else plan.out
    outcome = {"torch": all_same(torch_result, expected), "plan": all_same(plan_result, expected)}
    return {"variant": dump.variant, "kernel": plan.kernel, **outcome, "identical": all(outcome.values())}


Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def as_tuple(result: Result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def device_of(result: Result) -> str:
    return as_tuple(result)[0].device.type


def all_same(one: Result, other: Result) -> bool:
    return all(same_bits(x, y.reshape(x.shape)) for x, y in zip(as_tuple(one), as_tuple(other), strict=True))


def inputs(seq: int, batch: int, device: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Independent query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, seq, HEAD_DIM)
    drawn = [torch.randn(shape, generator=generator).half().to(device) for _ in range(3)]
    return drawn[0], drawn[1], drawn[2]


def python_repeats(device: str, repeats: int) -> Iterator[Row]:
    for seq, batch in CONFIGURATIONS if device == "cuda" else CONFIGURATIONS[:1]:
        for causal in (False, True):
            tensors = inputs(seq, batch, device)
            first, first_lse = flashcore.attention(*tensors, is_causal=causal, return_lse=True)
            differ = 0
            for _ in range(1, repeats):
                out = torch.full_like(first, torch.nan)
                again, lse = flashcore.attention(*tensors, is_causal=causal, return_lse=True, out=out)
                differ += not (same_bits(again, first) and same_bits(lse, first_lse))
            yield {
                "kind": "python_repeat",
                "name": f"S {seq} B {batch}{' causal' if causal else ''}",
                "repeats": repeats,
                "irreproducible": differ,
                "identical": differ == 0,
            }


def between_events(call: Callable[[], Any]) -> float:
    """Microseconds between two events around a call into an empty queue."""
    torch.cuda.synchronize()
    return timed(call) * 1e3


def whole_call(call: Callable[[], Any]) -> float:
    """Microseconds of the host's clock from an empty queue to the end of a call's work."""
    stream = torch.cuda.current_stream()
    stream.synchronize()
    began = time.perf_counter_ns()
    call()
    stream.synchronize()
    return (time.perf_counter_ns() - began) / 1e3


@dataclass
class Arm:
    """One way to compute a configuration, and its figures so far, in microseconds."""

    call: Callable[[], torch.Tensor]
    backend: SDPBackend | None = None
    graph: torch.cuda.CUDAGraph = field(default_factory=torch.cuda.CUDAGraph)
    figures: dict[str, list[float]] = field(default_factory=lambda: {"call_us": [], "wall_us": [], "device_us": []})
    error: float = 0.0

    def chosen(self) -> contextlib.AbstractContextManager[None]:
        """Entered outside of what is timed: choosing a backend is no part of a call."""
        return contextlib.nullcontext() if self.backend is None else sdpa_kernel(self.backend)

    def prepare(self, reference: torch.Tensor) -> None:
        with self.chosen():
            for _ in range(20):
                out = self.call()
            self.error = (out.double() - reference).abs().max().item()
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                for _ in range(LAUNCHES):
                    self.call()

    def turn(self, calls: int) -> None:
        with self.chosen():
            between = [between_events(self.call) for _ in range(calls)]
            whole = [whole_call(self.call) for _ in range(calls)]
        self.figures["call_us"].append(statistics.median(between))
        self.figures["wall_us"].append(statistics.median(whole))
        self.figures["device_us"].append(self.launch_time())

    def launch_time(self) -> float:
        return replay(self.graph) * 1e3 / LAUNCHES

    def summary(self) -> Row:
        return {
            "error": self.error,
            **{
                name: {"median": statistics.median(x), "min": min(x), "max": max(x), "rounds": len(x)}
                for name, x in self.figures.items()
            },
        }


def arms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Arm]:
    def sdpa() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v)

    return {
        "flashcore": Arm(lambda: flashcore.attention(q, k, v)),
        "sdpa": Arm(sdpa),
        "sdpa_flash": Arm(sdpa, SDPBackend.FLASH_ATTENTION),
        "sdpa_cudnn": Arm(sdpa, SDPBackend.CUDNN_ATTENTION),
        "sdpa_efficient": Arm(sdpa, SDPBackend.EFFICIENT_ATTENTION),
    }


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q.double() @ k.double().mT / HEAD_DIM**0.5
    return scores.softmax(-1) @ v.double()


def configurations(rounds: int, calls: int, seed: int) -> Iterator[Row]:
    """All arms of all configurations in turn; a round has each once, in random order."""
    every: dict[tuple[int, int], dict[str, Arm]] = {}
    for seq, batch in CONFIGURATIONS:
        tensors = inputs(seq, batch, "cuda")
        exact = reference(*tensors)
        every[seq, batch] = arms(*tensors)
        for arm in every[seq, batch].values():
            arm.prepare(exact)
    turns = [arm for group in every.values() for arm in group.values()]
    shuffle = random.Random(seed)
    for done in range(rounds):
        for arm in shuffle.sample(turns, len(turns)):
            arm.turn(calls)
        print(f"\rround {done + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for (seq, batch), group in every.items():
        yield {
            "kind": "configuration",
            "name": f"S {seq} B {batch} H {HEADS} D {HEAD_DIM} f16",
            "seq_len": seq,
            "batch": batch,
            "launches_per_graph": LAUNCHES,
            "calls_per_round": calls,
            "kernel": flashcore.explain(*inputs(seq, batch, "cuda")).chosen,
            "floor_us": floor(seq, batch),
            "arms": {name: arm.summary() for name, arm in group.items()},
            **speedups(group),
        }


def speedups(group: dict[str, Arm]) -> Row:
    """How many times the default SDPA's time FlashCore's is, by round: the median of the paired ratios."""

    def ratio(figure: str) -> float:
        pairs = zip(group["sdpa"].figures[figure], group["flashcore"].figures[figure], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    return {f"speedup_over_sdpa_{name}": ratio(f"{name}_us") for name in ("call", "wall", "device")}


def floor(seq: int, batch: int) -> float | None:
    """Microseconds at the card's measured ceilings."""
    name = torch.cuda.get_device_name()
    for card, (bytes_per_second, flops_per_second) in CEILINGS.items():
        if card in name:
            elements = batch * HEADS * seq * HEAD_DIM
            return max(4 * 2 * elements / bytes_per_second, 4 * elements * seq / flops_per_second) * 1e6
    return None


def environment() -> Row:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "flashcore": flashcore.__version__,
    }


def evidence(into: Path | None, commit: str, device: str) -> Row:
    if into is not None:
        document: Row = json.loads(into.read_text())
    else:
        env = {"gpu": {"name": torch.cuda.get_device_name()} if device == "cuda" else None}
        document = {"schema": "flashcore.evidence/1", "topic": "first-light", "commit": commit, "env": env, "rows": []}
    document["env"]["python"] = environment()
    return document


def show(row: Row) -> None:
    if row["kind"] == "configuration":
        cells = (f"{n} {a['call_us']['median']:.1f}/{a['device_us']['median']:.1f}" for n, a in row["arms"].items())
        print(f"{row['name']}: call/device us: {', '.join(cells)}")
    elif not row["identical"]:
        print(f"DIFFERENT {row}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("validator", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--into", type=Path, help="evidence of flashcore-validate to add the rows to")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cases", default="--quick", help="options of `flashcore-validate dump`, in one argument")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows = [*paths(args.validator, args.device, shlex.split(args.cases)), *python_repeats(args.device, args.repeats)]
    if args.device == "cuda":
        rows += configurations(args.rounds, args.calls, args.seed)
    for row in rows:
        show(row)
    document = evidence(args.into, args.commit, args.device)
    kinds = {row["kind"] for row in rows}
    document["rows"] = [row for row in document["rows"] if row["kind"] not in kinds] + rows
    args.json.write_text(json.dumps(document, indent=2) + "\n")
    compared = [row for row in rows if "identical" in row]
    different = sum(not row["identical"] for row in compared)
    print(f"{len(compared)} comparisons, {different} not bit-identical")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
