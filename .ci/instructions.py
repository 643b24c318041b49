"""Counts the instructions that a call takes above the driver, and holds them to a budget.

Valgrind counts them, on a driver that does nothing: unlike times, the figures are the same on every run. `callgrind` is
called directly: its usual front (gungraun) has a runner whose build takes longer than all that is counted here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "target" / "release" / "count-calls"
# Instructions a call. What a compiler changes stays within a tenth; what a change of ours adds does not.
BUDGETS = {"raw": 250, "prepared": 410, "repeated": 1240, "first_seen": 1840}
FEW, MANY = 100, 1100


def instructions(path: str, calls: int) -> int:
    """Instructions of a whole run."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", PROGRAM, path, str(calls)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if found is None:
        raise RuntimeError(f"callgrind did not count:\n{done.stderr}")
    return int(found[1])


def main() -> int:
    if shutil.which("valgrind") is None:
        print("skipped: valgrind is not installed (apt-get install valgrind)")
        return 1 if "CI" in os.environ else 0
    command = ["cargo", "build", "--release", "--quiet", "-p", "flashcore-benches", "--bin", PROGRAM.name]
    subprocess.run(command, cwd=ROOT, check=True)
    # What is not calls is the same in both runs.
    found = {path: (instructions(path, MANY) - instructions(path, FEW)) / (MANY - FEW) for path in BUDGETS}
    for path, count in found.items():
        print(f"{path:12} {count:8.0f} instructions a call, of {BUDGETS[path]}")
    if "--json" in sys.argv:
        print(json.dumps(found))
    return 1 if any(count > BUDGETS[path] for path, count in found.items()) else 0


if __name__ == "__main__":
    sys.exit(main())
