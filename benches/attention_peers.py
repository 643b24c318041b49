"""The attention forward of FlashCore beside every other one that is installed: cuDNN, FA2, FA3, FA4, FlexAttention.

    python benches/attention_peers.py --json OUT [--sets forward,heads,...] [--impls flashcore,cudnn,...]
        [--bundle NAME=FILE ...] [--fa3 LIBRARY] [--rounds N] [--dtype bf16|f16]

All implementations of a case take turns, in random order within each round, in one process; the figure of a turn is the
device time of one launch inside a CUDA graph of several, with warm caches. Inputs are the same standard normal numbers,
in each implementation's own contiguous layout: (batch, heads, seq, head_dim), but (batch, seq, heads, head_dim) for FA3
and FA4. Every output is compared with fp32 on a sample of rows. `--bundle` adds other builds of FlashCore's kernels.
FA3 is an operator library that `torch.ops.load_library` can load; FA4 and FlexAttention are imported when asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timing import replay, timed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashcore

Row = dict[str, Any]
Launch = Callable[[], Any]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
# How long the graph of one turn should run; at most MAX_LAUNCHES launches.
TURN_MS, MAX_LAUNCHES = 6.0, 50


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. `window`: how many keys before its own a row sees; None is all. Causal masks are bottom-right."""

    batch: int
    heads_q: int
    heads_kv: int
    seq_q: int
    seq_k: int
    head_dim: int
    causal: bool
    window: int | None = None
    dtype: str = "bf16"

    @property
    def mask(self) -> str:
        return ("causal" if self.causal else "dense") + (f", window {self.window}" if self.window else "")

    @property
    def name(self) -> str:
        heads = str(self.heads_q) if self.heads_q == self.heads_kv else f"{self.heads_q}/{self.heads_kv}"
        seq = str(self.seq_q) if self.seq_q == self.seq_k else f"{self.seq_q}x{self.seq_k}"
        return f"{self.batch},{heads},{seq},{self.head_dim} {self.mask} {self.dtype}"

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key it sees, in one head."""
        if not self.causal:
            return self.seq_q * self.seq_k
        reach = self.seq_k if self.window is None else self.window + 1
        seen = (i + 1 + self.seq_k - self.seq_q for i in range(self.seq_q))
        return sum(min(max(keys, 0), reach) for keys in seen)

    @property
    def flops(self) -> float:
        """The convention of the field: a causal square counts as half of the whole one."""
        pairs = self.pairs
        if self.causal and self.seq_q == self.seq_k and self.window is None:
            pairs = self.seq_q * self.seq_k // 2
        return 4.0 * self.batch * self.heads_q * pairs * self.head_dim

    def row(self) -> Row:
        fields = {"B": self.batch, "Hq": self.heads_q, "Hkv": self.heads_kv, "Sq": self.seq_q, "Sk": self.seq_k}
        return fields | {"D": self.head_dim, "dtype": self.dtype, "mask": self.mask}


def square(batch: int, heads: int, seq: int, head_dim: int, causal: bool, **other: Any) -> Case:
    return Case(batch, heads, heads, seq, seq, head_dim, causal, **other)


FORWARD = [
    (32, 16, 512, 128),
    (16, 16, 1024, 128),
    (4, 16, 4096, 128),
    (1, 16, 16384, 128),
    (1, 96, 2048, 128),
    (16, 32, 1024, 64),
    (4, 32, 4096, 64),
    (1, 32, 16384, 64),
    (16, 8, 1024, 256),
    (4, 8, 4096, 256),
    (1, 8, 16384, 256),
]
BOTH = (False, True)
PEERS = ("cudnn", "fa2", "fa3", "fa4", "flex")
SETS: dict[str, list[Case]] = {
    "forward": [square(*shape, causal) for shape in FORWARD for causal in BOTH],
    "heads": [square(1, heads, 2048, 128, causal) for heads in (32, 64, 96, 128) for causal in BOTH],
    "long": [
        square(1, heads, seq << 10, head_dim, True)
        for heads, head_dim in ((1, 64), (8, 64), (1, 128), (8, 128), (32, 128))
        for seq in (4, 8, 16, 32, 64, 128)
    ],
    "gqa": [
        Case(4, 32, 32 // group, 4096, 4096, head_dim, causal)
        for head_dim in (64, 128)
        for group in (4, 8)
        for causal in BOTH
    ],
    "window": [
        square(2, 16, seq, head_dim, True, window=window)
        for head_dim in (64, 128)
        for seq in (8192, 16384)
        for window in (1024, 4096)
    ],
    "ragged": [
        Case(4, 16, 16, seq_q, seq_k, head_dim, causal)
        for head_dim in (64, 128)
        for seq_q, seq_k in ((1000, 3000), (777, 4099), (2049, 2049), (4095, 1025))
        for causal in BOTH
        if not causal or seq_q <= seq_k
    ],
    "small": [square(batch, 8, seq, 64, False, dtype="f16") for seq in (128, 256, 512) for batch in (8, 16, 32)],
    "head_dims": [
        square(4, 16, 4096, head_dim, causal) for head_dim in (40, 72, 80, 96, 112, 160, 192, 224) for causal in BOTH
    ],
}


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Query, key, value as (batch, heads, seq, head_dim)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def by_seq(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same as (batch, seq, heads, head_dim), contiguous."""
        return tuple(x.transpose(1, 2).contiguous() for x in (self.q, self.k, self.v))  # type: ignore[return-value]


def draw(case: Case) -> Tensors:
    generator = torch.Generator("cuda").manual_seed(0)

    def one(heads: int, seq: int) -> torch.Tensor:
        shape = (case.batch, heads, seq, case.head_dim)
        return torch.randn(shape, generator=generator, device="cuda", dtype=DTYPES[case.dtype])

    return Tensors(one(case.heads_q, case.seq_q), one(case.heads_kv, case.seq_k), one(case.heads_kv, case.seq_k))


def reference(case: Case, x: Tensors, head: int, rows: torch.Tensor) -> torch.Tensor:
    """fp32 attention of some rows of one head of the first batch."""
    kv = head // (case.heads_q // case.heads_kv)
    scores = x.q[0, head, rows].float() @ x.k[0, kv].float().mT / math.sqrt(case.head_dim)
    if case.causal:
        distance = (rows + case.seq_k - case.seq_q)[:, None] - torch.arange(case.seq_k, device="cuda")
        hidden = (distance < 0) | (distance > (case.window if case.window is not None else case.seq_k))
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ x.v[0, kv].float()


class Unsupported(Exception):
    """This implementation does not answer this case; the message is recorded."""


# Each takes a case and its tensors and returns the launch, whose result is (batch, heads, seq, head_dim).
Implementation = Callable[[Case, Tensors], Launch]


def planned(runtime: flashcore.Runtime) -> Implementation:
    def prepare(case: Case, x: Tensors) -> Launch:
        out = torch.full_like(x.q, torch.nan)
        window = None if case.window is None else (case.window, 0)
        plan = runtime.plan(
            x.q,
            x.k,
            x.v,
            is_causal=case.causal and window is None,
            window=window,
            causal_align="bottom_right",
            enable_gqa=case.heads_q != case.heads_kv,
            out=out,
        )

        def launch() -> torch.Tensor:
            plan.launch()
            return out

        return launch

    return prepare


def sdpa(backend: SDPBackend) -> Implementation:
    def prepare(case: Case, x: Tensors) -> Launch:
        if case.window is not None or (case.causal and case.seq_q != case.seq_k):
            raise Unsupported("only with a mask tensor")

        def launch() -> torch.Tensor:
            with sdpa_kernel(backend):
                gqa = case.heads_q != case.heads_kv
                return scaled_dot_product_attention(x.q, x.k, x.v, is_causal=case.causal, enable_gqa=gqa)

        return launch

    return prepare


def window_sides(case: Case) -> tuple[int, int]:
    return (-1 if case.window is None else case.window, 0 if case.window is not None else -1)


def fa3(library: Path) -> Implementation:
    torch.ops.load_library(str(library))
    operator = torch.ops.sgl_kernel.fwd.default
    # The operator has no defaults of its own: what is not said here is None, 0 or False by the type of the argument.
    # A `num_splits` of 0 leaves the number of key splits to its heuristic.
    blank = {"int": 0, "bool": False, "float": 0.0, "SymInt": 0}

    def prepare(case: Case, x: Tensors) -> Launch:
        q, k, v = x.by_seq()
        left, right = window_sides(case)
        given = {"q": q, "k": k, "v": v, "is_causal": case.causal, "softmax_scale": case.head_dim**-0.5}
        given |= {"window_size_left": left, "window_size_right": right}
        arguments = [given.get(a.name, blank.get(str(a.type))) for a in operator._schema.arguments]
        return lambda: operator(*arguments)[0].transpose(1, 2)

    return prepare


def fa4() -> Implementation:
    from flash_attn.cute.interface import flash_attn_func

    def prepare(case: Case, x: Tensors) -> Launch:
        q, k, v = x.by_seq()
        window = (None, None) if case.window is None else (case.window, 0)

        def launch() -> torch.Tensor:
            out = flash_attn_func(q, k, v, causal=case.causal, window_size=window)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return launch

    return prepare


def flex() -> Implementation:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def prepare(case: Case, x: Tensors) -> Launch:
        shift, reach = case.seq_k - case.seq_q, case.seq_k if case.window is None else case.window

        def sees(_b: Any, _h: Any, i: Any, j: Any) -> Any:
            return (i + shift >= j) & (i + shift - j <= reach)

        mask = create_block_mask(sees, None, None, case.seq_q, case.seq_k) if case.causal else None
        gqa = case.heads_q != case.heads_kv
        return lambda: compiled(x.q, x.k, x.v, block_mask=mask, enable_gqa=gqa)

    return prepare


def implementations(args: argparse.Namespace) -> dict[str, Implementation]:
    makers: dict[str, Callable[[], Implementation]] = {
        "flashcore": lambda: planned(flashcore.Runtime("cuda:0")),
        "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "fa2": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        "fa3": lambda: fa3(args.fa3),
        "fa4": fa4,
        "flex": flex,
    }
    for bundle in args.bundle:
        name, _, file = bundle.partition("=")
        data = Path(file).read_bytes()
        makers[name] = lambda data=data: planned(flashcore.Runtime("cuda:0", bundle=data))
    wanted = [name for name in args.impls.split(",") if name]
    wanted += [bundle.partition("=")[0] for bundle in args.bundle]
    return {name: makers[name]() for name in wanted}


class Arm:
    """One implementation of one case, captured in a graph, and the milliseconds of a launch in each of its turns."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.ms: list[float] = []
        self.error = math.nan
        self.graph = torch.cuda.CUDAGraph()
        self.launches = 1

    def prepare(self, case: Case, x: Tensors, samples: list[tuple[int, torch.Tensor, torch.Tensor]]) -> None:
        out = self.launch()
        errors = [(out[0, head, rows].float() - expected).norm() / expected.norm() for head, rows, expected in samples]
        self.error = max(error.item() for error in errors)
        if not self.error < 0.02:
            raise Unsupported(f"wrong: relative error {self.error}")
        del out
        once = timed(self.launch)
        self.launches = max(1, min(MAX_LAUNCHES, round(TURN_MS / once)))
        # One output buffer serves all launches of the graph: its own pool, and each result dies at once.
        with torch.cuda.graph(self.graph):
            for _ in range(self.launches):
                self.launch()

    def turn(self) -> None:
        self.ms.append(replay(self.graph) / self.launches)


def measure(case: Case, impls: dict[str, Implementation], rounds: int, shuffle: random.Random) -> Iterator[Row]:
    x = draw(case)
    heads = sorted({0, case.heads_q - 1})
    ends = torch.arange(min(64, case.seq_q), device="cuda")
    rows = torch.cat([ends, case.seq_q - 1 - ends]).unique()
    samples = [(head, rows, reference(case, x, head, rows)) for head in heads]
    arms: dict[str, Arm] = {}
    for name, prepare in impls.items():
        try:
            arm = Arm(prepare(case, x))
            arm.prepare(case, x, samples)
            arms[name] = arm
        except (Unsupported, RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
            yield {"case": case.row(), "impl": name, "skipped": (str(error).strip() or repr(error)).splitlines()[0]}
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize()
    for _ in range(rounds):
        for name in shuffle.sample(list(arms), len(arms)):
            arms[name].turn()
    peers = {name: arm for name, arm in arms.items() if name in PEERS}
    best = min((statistics.median(arm.ms) for arm in peers.values()), default=math.nan)
    for name, arm in arms.items():
        ms = statistics.median(arm.ms)
        yield {
            "case": case.row(),
            "impl": name,
            "ms": ms,
            "tflops": case.flops / ms / 1e9,
            "ratio_to_best_peer": best / ms,
            "rounds": arm.ms,
            "launches": arm.launches,
            "error": arm.error,
            "ratio": {peer: paired(arms[peer].ms, arm.ms) for peer in peers if peer != name},
        }


def paired(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """How many times faster `ours` is: the geometric mean of the rounds' ratios, and its lower 95 % bound (t)."""
    logs = [math.log(a / b) for a, b in zip(theirs, ours, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return {"mean": math.exp(mean), "low": 0.0}
    from scipy.stats import t

    margin = t.ppf(0.95, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"mean": math.exp(mean), "low": math.exp(mean - margin)}


def show(case: Case, rows: list[Row]) -> None:
    measured = {row["impl"]: row for row in rows if "ms" in row}
    cells = [f"{name} {row['tflops']:.0f} ({row['ms'] * 1e3:.1f})" for name, row in measured.items()]
    print(f"{case.name:40s} {'  '.join(cells)}")
    for row in rows:
        if "skipped" in row:
            print(f"    {row['impl']}: {row['skipped']}")
    sys.stdout.flush()


def matmul_peak() -> float:
    """TFLOP/s of the vendor's 8192^3 bf16 matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = [timed(lambda: a @ b) for _ in range(30)]
    return 2 * 8192**3 / statistics.median(times[5:]) / 1e9


def environment() -> Row:
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
    card = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
    return {
        "gpu": {"name": torch.cuda.get_device_name(), "nvidia_smi": card},
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "flashcore": flashcore.__version__,
        "matmul_tflops": matmul_peak(),
    }


def label(name: str, dtype: str | None) -> str:
    """What a set is called in the evidence."""
    return f"{name}-{dtype}" if dtype else name


def kept(args: argparse.Namespace) -> list[Row]:
    """Rows of earlier evidence, each with its commit, but for the sets that are measured now."""
    if args.into is None:
        return []
    now = {label(name, args.dtype) for name in args.sets.split(",")}
    before = json.loads(args.into.read_text())
    return [{"commit": before["commit"], **row} for row in before["rows"] if row["set"] not in now]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--into", type=Path, metavar="FILE", help="keep this evidence's rows of other sets")
    parser.add_argument("--sets", default="forward", help=f"of {', '.join(SETS)}")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--impls", default="flashcore,cudnn,fa2", help="of flashcore, cudnn, fa2, fa3, fa4, flex")
    parser.add_argument("--bundle", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--fa3", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="instead of the case's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()

    impls = implementations(args)
    document = {"schema": "flashcore.evidence/1", "topic": "forward", "commit": args.commit, "env": environment()}
    rows = kept(args)
    shuffle = random.Random(args.seed)
    for name in args.sets.split(","):
        for case in SETS[name]:
            if args.dtype:
                case = dataclasses.replace(case, dtype=args.dtype)
            if args.only not in case.name:
                continue
            found = [{"set": label(name, args.dtype)} | row for row in measure(case, impls, args.rounds, shuffle)]
            show(case, found)
            rows += found
            args.json.write_text(json.dumps(document | {"rows": rows}, indent=1) + "\n")
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
