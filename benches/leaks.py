"""Memory that calls leave behind: `python benches/leaks.py [--calls N] [--json evidence/leaks.json --commit COMMIT]`.

Every kind of call many times on tiny CPU tensors: the process's resident memory after them, less that before.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import flashcore

WARM = 20_000


def resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4


def kinds() -> dict[str, Callable[[], Any]]:
    x = torch.randn(1, 1, 4, 8, dtype=torch.float16)
    mask = torch.ones(4, 4, dtype=torch.bool)
    operator = torch.ops.flashcore.attention
    return {
        "operator, optional arguments": lambda: operator(x, x, x, mask, scale=0.5, window_left=3),
        "operator, refused": lambda: operator(x, x, x, mask, is_causal=True),
        "flashcore.attention": lambda: flashcore.attention(x, x, x, mask, scale=0.5),
        "flashcore.attention, refused": lambda: flashcore.attention(x, x, x, mask, is_causal=True),
    }


def repeat(call: Callable[[], Any], count: int) -> int:
    """Makes the calls; how many raised."""
    raised = 0
    for _ in range(count):
        try:
            call()
        except RuntimeError:
            raised += 1
    return raised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for subject, call in kinds().items():
            repeat(call, WARM)
            before = resident_kib()
            raised = repeat(call, args.calls)
            growth = resident_kib() - before
            row = {"subject": subject, "calls": args.calls, "raised": raised, "growth_kib": growth}
            rows.append({"kind": "leak", **row})
            print(rows[-1], flush=True)
    if args.json:
        document = {
            "schema": "flashcore.evidence/1",
            "topic": "leaks",
            "commit": args.commit,
            "env": {"gpu": None, "python": platform.python_version(), "torch": torch.__version__},
            "rows": rows,
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
