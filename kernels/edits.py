"""Kernels with faults planted on purpose: edits of a kernel's text, and bundles of what they make of it."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from kernels.specs import Spec

KERNELS = Path(__file__).parent

Edit = Callable[[str], str]


class EditError(Exception):
    """An edit that does not fit the text, or an edited kernel that cannot be built."""


def swap(old: str, new: str) -> Edit:
    """`new` in the only place of `old`."""

    def edit(text: str) -> str:
        if text.count(old) != 1:
            raise EditError(f"{text.count(old)} places for {old!r}")
        return text.replace(old, new)

    return edit


def _line(text: str, line: str) -> re.Match[str]:
    """The only line that starts with `line`, after its indentation."""
    found = list(re.finditer(rf"^( *){re.escape(line)}.*\n", text, re.M))
    if len(found) != 1:
        raise EditError(f"{len(found)} lines {line!r}")
    return found[0]


def drop(line: str) -> Edit:
    """A statement becomes `pass`."""
    return lambda text: text.replace(_line(text, line)[0], f"{_line(text, line)[1]}pass\n")


def insert(line: str, before: str) -> Edit:
    """A statement before another, and as far indented."""
    return lambda text: text.replace(
        _line(text, before)[0], f"{_line(text, before)[1]}{line}\n{_line(text, before)[0]}"
    )


def move(line: str, before: str) -> list[Edit]:
    return [drop(line), insert(line, before)]


def edited(text: str, edits: Iterable[Edit]) -> str:
    for edit in edits:
        text = edit(text)
    return text


# Run with a copy of `kernels/` as the only one there is.
BUILD = """
import pickle, sys
from kernels import bundle, compile
wanted = pickle.load(sys.stdin.buffer)
built = {spec.name: members for spec, members in compile.compile_all(wanted, 1)}
for name, members in built.items():
    if isinstance(members, str):
        sys.exit(f"{name}: {members}")
variants = [(compile.variant_entry(spec, built[spec.name]), [m.code for m in built[spec.name]]) for spec in wanted]
sys.stdout.buffer.write(bundle.pack(wanted[0].arch, compile.compiler_versions(), variants))
"""


def build(module: str, edits: Iterable[Edit], wanted: list[Spec]) -> bytes:
    """A bundle of variants of one architecture, from a copy of `kernels/` in which `module` is edited; else as ever."""
    text = edited((KERNELS / f"{module}.py").read_text(), edits)
    with tempfile.TemporaryDirectory(prefix="flashcore-edited-") as folder:
        ignored = shutil.ignore_patterns("__pycache__", "tests")
        shutil.copytree(KERNELS, Path(folder, "kernels"), ignore=ignored)
        Path(folder, "kernels", f"{module}.py").write_text(text)
        environment = os.environ | {"PYTHONPATH": folder}
        command = [sys.executable, "-c", BUILD]
        done = subprocess.run(
            command, input=pickle.dumps(wanted), cwd=folder, env=environment, capture_output=True, check=False
        )
    if done.returncode:
        raise EditError(done.stderr.decode(errors="replace").strip())
    return done.stdout
