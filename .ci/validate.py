"""Runs `flashcore-validate` on the CPU backend: correctness, the selftest, and a comparison with the baseline.

What it writes goes to target/validate/, as JSON, JUnit XML and Markdown. Exit code 4, inconclusive, is none for the
comparison: a busy machine proves nothing about the code.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "target" / "validate"
BUILD = "cargo build --release --quiet -p flashcore-rs --features validate --bin flashcore-validate"
RUNS = {
    "correct": "correct --quick",
    "selftest": "selftest --quick",
    "compare": "compare --baseline evidence/baseline/cpu.json --tolerate-inconclusive",
}


def commit() -> str:
    """What the documents say that they are of."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> int:
    subprocess.run(BUILD.split(), cwd=ROOT, check=True)
    OUT.mkdir(parents=True, exist_ok=True)
    codes = {}
    of = commit()
    for name, arguments in RUNS.items():
        files = [
            f"--{kind}={OUT / name}.{suffix}"
            for kind, suffix in (("json", "json"), ("junit", "xml"), ("markdown", "md"))
        ]
        command = [
            "target/release/flashcore-validate",
            *arguments.split(),
            "--device",
            "cpu",
            f"--commit={of}",
            *files,
        ]
        codes[name] = subprocess.run(command, cwd=ROOT, check=False).returncode
    replay = ["target/release/flashcore-validate", "replay", str(OUT / "compare.json")]
    codes["replay"] = subprocess.run(replay, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
    print(", ".join(f"{name}: exit code {code}" for name, code in codes.items()))
    return next((abs(code) for code in codes.values() if code != 0), 0)  # negative: ended by a signal


if __name__ == "__main__":
    sys.exit(main())
