"""`python -m kernels tune build|measure|rules`: which build of the Hopper kernel answers which query lengths.

`build` needs the compiler and no GPU; `measure` needs the GPU, torch and the flashcore wheel, and neither Triton nor
zstandard: where those are missing, it is `python -m kernels.tune measure`. The rules it derives are in
`kernels/tuning/`, where `specs.py` reads them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kernels import specs
from kernels.specs import HopperShape, Spec

SCHEMA = "flashcore.tuning/1"
ARCH = "sm_90a"
DTYPE = "bf16"  # what is measured; the rules hold for both types

CANDIDATES = {
    64: [HopperShape(128, 4, held=64), HopperShape(128, 4, consumers=3)],
    128: [HopperShape(128, 2, held=64), HopperShape(128, 2)],
    256: [HopperShape(64, 2, queries=1)],
}
HEADS = {64: 32, 128: 16, 256: 8}
SEQ_LENS = tuple(1 << n for n in range(7, 15))
TOKENS = 16384
SWITCH_GAIN = 0.01  # a smaller one could be noise

# How long the graph of one turn should run; at most MAX_LAUNCHES launches.
TURN_MS, MAX_LAUNCHES = 6.0, 50

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What candidates compete on."""

    head_dim: int
    band: bool
    seq_len: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return max(1, TOKENS // self.seq_len), HEADS[self.head_dim], self.seq_len, self.head_dim


def candidates() -> Iterator[tuple[int, HopperShape]]:
    return ((head_dim, shape) for head_dim, shapes in CANDIDATES.items() for shape in shapes)


def bundle_path(folder: Path, head_dim: int, shape: HopperShape) -> Path:
    return folder / f"d{head_dim}-{shape.slug}.fcb"


def candidate_specs(head_dim: int, shape: HopperShape) -> list[Spec]:
    """Dense and band, under names that no other candidate has."""
    return [specs.hopper(DTYPE, head_dim, band, shape, suffix=f".{shape.slug}") for band in (False, True)]


def build(args: argparse.Namespace) -> int:
    """Write one bundle per candidate."""
    from kernels import bundle, compile

    wanted = {candidate: candidate_specs(*candidate) for candidate in candidates()}
    every = list(itertools.chain.from_iterable(wanted.values()))
    made = {spec.name: result for spec, result in compile.compile_all(every, args.jobs)}
    args.folder.mkdir(parents=True, exist_ok=True)
    failures = [f"{name}: {result.strip()}" for name, result in made.items() if isinstance(result, str)]
    for (head_dim, shape), matrix in wanted.items():
        variants = []
        for spec in matrix:
            if not isinstance(members := made[spec.name], str):
                variants.append((compile.variant_entry(spec, members), [member.code for member in members]))
        if len(variants) == len(matrix):
            path = bundle_path(args.folder, head_dim, shape)
            path.write_bytes(bundle.pack(ARCH, compile.compiler_versions(), variants))
            print(f"{path.name}: {', '.join(_resources(entry) for entry, _ in variants)}")
    print("\n".join(failures), file=sys.stderr, end="\n" if failures else "")
    return 1 if failures else 0


def _resources(entry: dict[str, Any]) -> str:
    (launch,) = entry["launches"]
    kind = "band" if entry["when"]["band"] else "dense"
    return f"{kind} {launch['registers']} registers, {launch['spill_bytes']} spilled, {launch['shared_bytes']} shared"


class Arm:
    """One candidate on one problem, captured in a graph, and the milliseconds of a launch in each of its turns."""

    def __init__(self, launch: Callable[[], None]) -> None:
        import torch

        launch()
        self.launch = launch  # what the graph writes must outlive it
        self.ms: list[float] = []
        self.launches = max(1, min(MAX_LAUNCHES, round(TURN_MS / _timed(launch))))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(self.launches):
                launch()

    def turn(self) -> None:
        # The first replay brings clocks and caches to its own state.
        self.graph.replay()
        self.ms.append(_timed(self.graph.replay) / self.launches)


def _timed(work: Callable[[], None]) -> float:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def compete(problem: Problem, runtimes: dict[HopperShape, Any], rounds: int, shuffle: random.Random) -> Iterator[Row]:
    """Every candidate on one problem, in random order in each round."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = torch.randn(3, *problem.shape, device="cuda", dtype=torch.bfloat16)
    expected = scaled_dot_product_attention(q, k, v, is_causal=problem.band).float()
    arms = {}
    for shape, runtime in runtimes.items():
        plan = runtime.plan(q, k, v, is_causal=problem.band, out=torch.full_like(q, torch.nan))
        arms[shape] = Arm(plan.launch)
        error = float((plan.out.float() - expected).norm() / expected.norm())
        if not error < 0.02:
            raise SystemExit(f"{plan.kernel} is wrong on {problem}: relative error {error}")
    for _ in range(rounds):
        for shape in shuffle.sample(list(arms), len(arms)):
            arms[shape].turn()
    batch, heads, _, _ = problem.shape
    for shape, arm in arms.items():
        place = dataclasses.asdict(problem) | {"batch": batch, "heads": heads, "shape": dataclasses.asdict(shape)}
        yield place | {"ms": round(statistics.median(arm.ms), 6), "rounds": [round(ms, 6) for ms in arm.ms]}


def measure(args: argparse.Namespace) -> int:
    """Time the candidates that `build` wrote, and derive the rules."""
    import flashcore

    runtimes: dict[int, dict[HopperShape, Any]] = {head_dim: {} for head_dim in CANDIDATES}
    for head_dim, shape in candidates():
        data = bundle_path(args.folder, head_dim, shape).read_bytes()
        runtimes[head_dim][shape] = flashcore.Runtime("cuda:0", bundle=data)
    shuffle = random.Random(args.seed)
    rows: list[Row] = []
    for problem in (Problem(*place) for place in itertools.product(CANDIDATES, (False, True), SEQ_LENS)):
        found = list(compete(problem, runtimes[problem.head_dim], args.rounds, shuffle))
        cells = [f"{HopperShape(**row['shape']).slug} {row['ms'] * 1e3:.1f} us" for row in found]
        print(f"{problem}: {', '.join(cells)}", flush=True)
        rows += found
    document = {"schema": SCHEMA, "arch": ARCH, "commit": args.commit, "env": environment(), "rows": rows}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write(args.json, document)
    return 0


def environment() -> Row:
    import torch

    import flashcore

    query = "--query-gpu=name,driver_version,clocks.max.sm,power.limit"
    card = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False)
    gpu = {"name": torch.cuda.get_device_name(), "nvidia_smi": card.stdout.strip()}
    return {"gpu": gpu, "torch": torch.__version__, "flashcore": flashcore.__version__}


def rules(args: argparse.Namespace) -> int:
    """Derive the rules of a file again from its rows."""
    write(args.file, json.loads(args.file.read_text()))
    return 0


def write(path: Path, document: Row) -> None:
    """The document with the rules that follow from its rows."""
    derived = derive(document["rows"])
    path.write_text(json.dumps(document | {"rules": derived}, indent=1) + "\n")
    for rule in derived:
        kind, slug = "band" if rule["band"] else "dense", HopperShape(**rule["shape"]).slug
        print(f"d{rule['head_dim']} {kind}: {slug} {rule['limits'] or 'always'}")


Times = dict[HopperShape, dict[int, float]]
Stretch = tuple[HopperShape, tuple[int, ...]]  # a candidate, and the measured lengths it is for


def derive(rows: list[Row]) -> list[Row]:
    """For each head_dim and band: the candidates in the order of their query lengths, with at most one switch, whose
    times have the least geometric mean. Of equals, the one without a switch.
    """
    groups: dict[tuple[int, bool], Times] = {}
    for row in rows:
        times = groups.setdefault((row["head_dim"], row["band"]), {})
        times.setdefault(HopperShape(**row["shape"]), {})[row["seq_len"]] = row["ms"]
    return [
        {"head_dim": head_dim, "band": band, "shape": dataclasses.asdict(shape), "limits": limits}
        for (head_dim, band), times in sorted(groups.items())
        for shape, limits in _limits(min(_schedules(times), key=lambda schedule: _cost(times, schedule)))
    ]


def _schedules(times: Times) -> Iterator[list[Stretch]]:
    """What `derive` chooses from, those without a switch first."""
    lengths = tuple(sorted(set().union(*times.values())))
    complete = [shape for shape, measured in times.items() if measured.keys() == set(lengths)]
    yield from ([(shape, lengths)] for shape in complete)
    for short, long in itertools.permutations(complete, 2):
        for at in range(1, len(lengths)):
            yield [(short, lengths[:at]), (long, lengths[at:])]


def _cost(times: Times, schedule: list[Stretch]) -> float:
    """The mean logarithm of the times, and what a second build has to gain to be worth its place."""
    logs = [math.log(times[shape][length]) for shape, lengths in schedule for length in lengths]
    return math.fsum(logs) / len(logs) + SWITCH_GAIN * (len(schedule) - 1)


def _limits(schedule: list[Stretch]) -> Iterator[tuple[HopperShape, dict[str, list[int]]]]:
    """Each candidate from the first length that it was measured best at, up to the next one's."""
    starts = [1, *(lengths[0] for _, lengths in schedule[1:]), specs.MAX_SIZE + 1]
    for (shape, _), (low, end) in zip(schedule, itertools.pairwise(starts), strict=True):
        yield shape, {"seq_len_q": [low, end - 1]} if len(schedule) > 1 else {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True)
    described: dict[Callable[[argparse.Namespace], int], argparse.ArgumentParser] = {}
    for function in (build, measure, rules):
        described[function] = commands.add_parser(function.__name__, help=function.__doc__)
        described[function].set_defaults(function=function)
    for function in (build, measure):
        described[function].add_argument("folder", type=Path, help="of the candidates' bundles")
    described[build].add_argument("--jobs", type=int, default=os.cpu_count())
    described[measure].add_argument("--json", type=Path, default=specs.TUNING)
    described[measure].add_argument("--rounds", type=int, default=9)
    described[measure].add_argument("--seed", type=int, default=0)
    described[measure].add_argument("--commit", default="unknown")
    described[rules].add_argument("file", type=Path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    result: int = args.function(args)
    return result


if __name__ == "__main__":
    sys.exit(main())
