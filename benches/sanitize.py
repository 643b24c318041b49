"""Runs the kernels under compute-sanitizer: the shipped ones must be clean, every planted fault must be found.

    python benches/sanitize.py VALIDATOR [--planted DIR] --json OUT

VALIDATOR is the `flashcore-validate` program, whose correctness matrix is run; DIR holds what
`python -m kernels.tests.build_planted DIR` wrote. The calls of `sanitizer_calls.py` run too: their tensors are
allocations of their own, and their outputs uninitialised. Needs a Hopper GPU, compute-sanitizer, and flashcore and
torch for this Python. Exits non-zero when a clean run is not clean or a planted fault is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

TOOLS = ("memcheck", "synccheck", "initcheck")
CALLS = [sys.executable, str(Path(__file__).with_name("sanitizer_calls.py"))]
SECONDS = 240
# Every tensor an allocation of its own: a byte beyond it is nobody's.
ENVIRONMENT = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def sanitize(tool: str, command: list[str], seconds: int) -> dict[str, object]:
    """One run of one tool: how many errors it counted, and the first thing it said."""
    started = time.monotonic()
    full = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command]
    try:
        done = subprocess.run(full, capture_output=True, text=True, timeout=seconds, check=False, env=ENVIRONMENT)
        output, timed_out = done.stdout + done.stderr, False
    except subprocess.TimeoutExpired as error:
        output, timed_out = (error.stdout or b"").decode(errors="replace"), True
    summary = re.search(r"ERROR SUMMARY: (\d+) error", output)
    found = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    findings = [line for line in found if line and "COMPUTE-SANITIZER" not in line and "ERROR SUMMARY" not in line]
    problems = re.search(r"(\d+) problems, (\d+) failed", output)
    return {
        "tool": tool,
        "errors": int(summary[1]) if summary else None,
        "first_finding": findings[0] if findings else None,
        "problems": int(problems[1]) if problems else None,
        "failed": int(problems[2]) if problems else None,
        "timed_out": timed_out,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("validator", type=Path)
    parser.add_argument("--planted", type=Path, help="bundles with planted faults")
    parser.add_argument(
        "--cases", nargs="*", default=["correct", "--repeats", "1", "--matrix-only"], help="arguments of the clean runs"
    )
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    rows: list[dict[str, object]] = []
    for tool in TOOLS:
        for name, command in (("matrix", [str(args.validator), *args.cases]), ("calls", CALLS)):
            row = sanitize(tool, command, SECONDS)
            ok = row["errors"] == 0 and not row["failed"] and not row["timed_out"]
            rows.append({"kind": "clean", "subject": name, "expected": "0 errors", **row, "ok": ok})
    for path in sorted(args.planted.glob("*.fcb")) if args.planted else []:
        tool, _, fault = path.stem.partition("-")
        row = sanitize(tool, [*CALLS, str(path)], 60)
        rows.append({"kind": "planted", "subject": fault, "expected": "found", **row, "ok": bool(row["errors"])})
    for row in rows:
        verdict = "ok" if row["ok"] else "NOT OK"
        what = f"{row['tool']:10} {row['kind']:8} {row['subject']!s:24}"
        print(f"{what} errors {row['errors']!s:>5} {row['seconds']:>6} s  {verdict:6}  {row['first_finding']}")
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True, check=False).stdout
    gpu = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    env = {
        "gpu": subprocess.run(gpu, capture_output=True, text=True, check=False).stdout.strip(),
        "compute_sanitizer": (re.findall(r"[\d.]+\d", version) or ["unknown"])[0],
    }
    evidence = {"schema": "flashcore.evidence/1", "topic": "sanitizer", "commit": args.commit, "env": env, "rows": rows}
    args.json.write_text(json.dumps(evidence, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
