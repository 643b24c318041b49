"""Runs the constant-trace auditor, which is part of `flashcore-validate` (docs/security)."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels import compile

ROOT = Path(__file__).resolve().parent.parent
PASS, FAIL = 0, 3  # exit codes of flashcore-validate
BUILD = "cargo build --release --quiet -p flashcore-rs --no-default-features --features audit --bin flashcore-validate"
TARGET = "target/audit"  # apart from other builds, which have other features

Report = dict[str, Any]


class AuditError(Exception):
    """The auditor could not do its work."""


@functools.cache
def auditor() -> Path:
    """The program, built without any bundle: it decides what may become one. `$FLASHCORE_VALIDATE` names another."""
    if named := os.environ.get("FLASHCORE_VALIDATE"):
        return Path(named)
    target = ROOT / TARGET
    done = subprocess.run([*BUILD.split(), "--target-dir", str(target)], cwd=ROOT, check=False)
    if done.returncode:
        raise AuditError("the auditor does not build")
    return target / "release" / "flashcore-validate"


@functools.cache
def disassembler() -> Path:
    """That of the wheel nvidia-cuda-nvdisasm, whose version is pinned."""
    for folder in importlib.util.find_spec("nvidia").submodule_search_locations or []:  # type: ignore[union-attr]
        found = Path(folder) / "cu13" / "bin" / "nvdisasm"
        if found.exists():
            return found
    raise AuditError("nvdisasm is not installed: pip install -r kernels/requirements.txt")


def run(files: Sequence[Path], *options: str) -> tuple[list[Report], dict[str, Any]]:
    """The reports on bundles, cubins or PTX files, and the versions of the tools."""
    with tempfile.TemporaryDirectory(prefix="flashcore-audit-") as folder:
        out = Path(folder) / "reports.json"
        tools = ["--nvdisasm", str(disassembler()), "--ptxas", str(compile.tool("ptxas"))]
        command = [str(auditor()), "ct", *map(str, files), *tools, "--json", str(out), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in (PASS, FAIL):
            raise AuditError(f"the auditor failed: {done.stderr.strip() or done.stdout.strip()}")
        document = json.loads(out.read_text())
    return document["rows"], document["env"]["tools"]


def complaint(report: Report) -> str:
    """One line on a report that is not a pass."""
    leaks = [finding for finding in report["findings"] if finding["kind"] in ("control_flow", "address", "guard")]
    what = report["reason"] or f"{leaks[0]['kind']} at {leaks[0]['address']}: {leaks[0]['text']}"
    return f"{report['arch']} {', '.join(report['names'])}: {report['verdict']}: {what}"


def entry(report: Report, tools: dict[str, Any]) -> dict[str, Any]:
    """What the manifest keeps of a pass."""
    verdict = "pass_as_assembled" if report["assembled"] else "pass"
    return {"verdict": verdict, "auditor": tools["rules"], "disassembler": tools["nvdisasm"]}


def evidence(rows: list[Report], tools: dict[str, Any]) -> dict[str, Any]:
    """A file of `evidence/`."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    env = {"gpu": None, "tools": tools, "cores": os.cpu_count()}
    header = {"schema": "flashcore.evidence/1", "topic": "constant-trace", "commit": commit.stdout.strip()}
    return header | {"env": env, "rows": rows}
