"""Runs the test stages in order and prints each one's time against its budget.

`python .ci/stages.py [NAME ...]` runs the named stages, or all. A stage over its budget is reported; it fails the run
only beyond twice the budget, because shared machines are noisy.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Stage:
    """One command and the seconds it should take on two cores from a clean checkout."""

    name: str
    budget: int
    command: str


STAGES = (
    Stage("format", 20, "cargo fmt --check"),
    Stage("ruff", 20, "ruff check kernels python benches .ci"),
    Stage("tables", 10, "python benches/tables.py --check"),
    Stage("ruff-format", 20, "ruff format --check kernels python benches .ci"),
    Stage("clippy", 180, "cargo clippy --workspace --all-targets --all-features -- -D warnings"),
    Stage("clippy-minimal", 60, "cargo clippy -p flashcore-rs --no-default-features --all-targets -- -D warnings"),
    Stage("rust", 240, "cargo test --workspace --all-features"),
    Stage("instructions", 180, "python .ci/instructions.py"),
    Stage("kernels", 300, "python -m pytest -q kernels/tests"),
    Stage("kernels-check", 120, "python -m kernels check"),
    Stage("audit", 180, "python -m kernels audit"),
    Stage("audit-plants", 120, "python -m kernels.plants --corpus 0.1 --mutations 12"),
    Stage("crate", 120, "python .ci/consumer.py"),
    Stage("wheel", 180, "python .ci/wheel.py"),
    Stage("typing", 60, "mypy kernels python/flashcore benches/tables.py benches/sanitize.py benches/crosscheck.py"),
    Stage("python", 300, "python -m pytest -q python/tests"),
    Stage("crosscheck", 20, "python -m pytest -q benches/tests"),
    Stage("overhead", 30, "python benches/overhead.py --device cpu --rounds 1 --json target/overhead.json"),
)


def run(stage: Stage) -> tuple[int, float]:
    """Runs one stage with the virtual environment first on the path; returns its exit code and seconds."""
    print(f"=== {stage.name}: {stage.command}", flush=True)
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    start = time.monotonic()
    code = subprocess.run(shlex.split(stage.command), cwd=ROOT, env=environment, check=False).returncode
    return code, time.monotonic() - start


def main(names: list[str]) -> int:
    unknown = set(names) - {stage.name for stage in STAGES}
    if unknown:
        print(f"no such stage: {', '.join(sorted(unknown))}; stages: {', '.join(s.name for s in STAGES)}")
        return 2
    failed = []
    lines = []
    for stage in STAGES:
        if names and stage.name not in names:
            continue
        code, seconds = run(stage)
        late = seconds > 2 * stage.budget
        verdict = "FAILED" if code else "TOO SLOW" if late else "over budget" if seconds > stage.budget else "ok"
        lines.append(f"{stage.name:18} {seconds:7.1f} s of {stage.budget:4} s  {verdict}")
        if code or late:
            failed.append(stage.name)
    print("\n" + "\n".join(lines))
    print(f"{len(lines) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
