"""Another program measures for `flashcore-validate`, and numpy and scipy find in its samples what it found.

Needs the release build of the program (the CI stage `validate` makes it) and the installed wheel.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benches import crosscheck

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "target" / "release" / "flashcore-validate"
CASES = """
[protocol]
processes = 5
blocks = 3
samples = 4
warmup = 3

[[case]]
batch = 1
num_heads_q = 4
num_heads_kv = 2
seq_len_q = 32
head_dim = 16
causal = true
"""
INCONCLUSIVE, REGRESSION = 4, 2


def compare(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("torch")
    if not PROGRAM.exists():
        pytest.skip(f"{PROGRAM} is not built")
    (folder / "cases.toml").write_text(CASES)
    worker = f"{sys.executable} {ROOT / 'benches' / 'torch_worker.py'}"
    arms = ["--baseline", "sdpa", "--candidate", "flashcore", "--worker", worker]
    command = [PROGRAM, "compare", "--device", "cpu", "--cases", folder / "cases.toml", *arms, *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_another_program_measures(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    run = compare(tmp_path, "--json", str(result))
    assert run.returncode in (0, INCONCLUSIVE, REGRESSION), run.stderr
    document = json.loads(result.read_text())
    assert document["arms"] == ["sdpa", "flashcore"]
    assert [row["stats"]["samples"] for row in document["rows"] if row["kind"] == "measure"] == [60, 60]
    assert crosscheck.check(document, tmp_path) == []


def test_what_it_cannot_measure_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "window.toml").write_text(CASES + "window_left = 3\n")
    run = compare(tmp_path, "--cases", str(tmp_path / "window.toml"))
    assert run.returncode == 5, run.stderr
