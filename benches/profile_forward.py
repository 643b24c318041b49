"""What Nsight Compute says about one launch of the forward: FlashCore's kernels and their peers.

    python benches/profile_forward.py --json OUT [--impls flashcore,cudnn,...] [--bundle NAME=FILE] [--fa3 LIBRARY]
        [--cases 4,16,4096,128:dense ...]

Needs `ncu` on the PATH and the permission to read counters. Each (implementation, case) is profiled in a process of its
own, which is this program again with `--launch`. The third launch is measured, at the clocks the card chooses.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import attention_peers as peers
import torch

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "InstructionStats", "Occupancy", "SourceCounters")
# The copies and the product's set-up kernels of a peer are not what is asked about.
KERNELS = "regex:attention|flash|cudnn|device_kernel|fmha"


def parse_case(text: str) -> peers.Case:
    sizes, mask = text.split(":")
    return peers.square(*map(int, sizes.split(",")), causal=mask == "causal")


def launch(args: argparse.Namespace) -> None:
    case = parse_case(args.cases[0])
    ((_, prepare),) = peers.implementations(args).items()
    run = prepare(case, peers.draw(case))
    for _ in range(3):
        run()
    torch.cuda.synchronize()


def ncu(*arguments: str) -> str:
    return subprocess.run(["ncu", *arguments], capture_output=True, text=True, check=True).stdout


def page(report: Path, name: str) -> list[list[str]]:
    """The rows of one page of a report, as CSV."""
    text = ncu("--import", str(report), "--csv", "--page", name, "--print-units", "base")
    return list(csv.reader(line for line in text.splitlines() if line.startswith('"')))


def profile(impl: str, case: str, command: list[str]) -> dict[str, Any]:
    sections = [word for section in SECTIONS for word in ("--section", section)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "forward.ncu-rep"
        ncu("--clock-control", "none", "-k", KERNELS, "-s", "2", "-c", "1", *sections, "-o", str(report), *command)
        details, source = page(report, "details"), page(report, "source")
    name, value = (details[0].index(column) for column in ("Metric Name", "Metric Value"))
    metrics = {row[name]: row[value] for row in details[1:] if row[name]}
    head = next(i for i, row in enumerate(source) if "Source" in row)
    lines = [dict(zip(source[head], row, strict=True)) for row in source[head + 1 :] if len(row) == len(source[head])]
    return {"impl": impl, "case": case, "metrics": metrics, "instructions": mix(lines), "stalls": stalls(lines)}


def number(text: str) -> float:
    return float(text.replace(",", "") or 0)


def mix(lines: list[dict[str, str]]) -> dict[str, int]:
    """Executed warp instructions by opcode, per million."""
    counts: Counter[str] = Counter()
    for line in lines:
        words = [word for word in line["Source"].split() if not word.startswith("@")]
        counts[words[0].split(".")[0] if words else "?"] += round(number(line["Instructions Executed"]))
    total = sum(counts.values())
    wanted = (
        "HGMMA",
        "HMMA",
        "UTMALDG",
        "UTMASTG",
        "LDGSTS",
        "MUFU",
        "FFMA",
        "FMUL",
        "FADD",
        "FMNMX",
        "F2FP",
        "FSEL",
        "BAR",
    )
    return {opcode: round(1e6 * counts[opcode] / total) for opcode in wanted}


def stalls(lines: list[dict[str, str]]) -> dict[str, float]:
    """Why sampled warps did not go on, in percent of all samples."""
    reasons = [name for name in lines[0] if name.startswith("stall_") and "Not Issued" not in name]
    counts = {name.removeprefix("stall_"): sum(number(line[name]) for line in lines) for name in reasons}
    total = sum(counts.values())
    return {name: round(100 * count / total, 1) for name, count in sorted(counts.items(), key=lambda item: -item[1])}


def card() -> dict[str, Any]:
    return {
        "gpu": {"name": torch.cuda.get_device_name()},
        "torch": torch.__version__,
        "ncu": ncu("--version").split()[-1],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--impls", default="flashcore")
    parser.add_argument("--bundle", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--fa3", type=Path)
    parser.add_argument("--cases", nargs="+", default=["4,16,4096,128:dense", "4,32,4096,64:dense"])
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--launch", action="store_true", help="only run the one implementation and case given")
    args = parser.parse_args()
    if args.launch:
        launch(args)
        return 0
    document = {"schema": "flashcore.evidence/1", "topic": "ncu-forward", "commit": args.commit, "env": card()}
    rows: list[dict[str, Any]] = []
    bundles = dict(bundle.split("=", 1) for bundle in args.bundle)
    for impl in [*args.impls.split(","), *bundles]:
        for case in args.cases:
            command = [sys.executable, __file__, "--launch", "--cases", case]
            command += ["--bundle", f"{impl}={bundles[impl]}", "--impls", ""] if impl in bundles else ["--impls", impl]
            command += ["--fa3", str(args.fa3)] if impl == "fa3" else []
            rows.append(profile(impl, case, command))
            print(impl, case, rows[-1]["metrics"].get("SM Busy"), rows[-1]["metrics"].get("Duration"), flush=True)
            args.json.write_text(json.dumps(document | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
