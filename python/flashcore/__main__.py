"""`python -m flashcore env` and `python -m flashcore kernels`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flashcore
from flashcore import _core

KERNEL_COLUMNS = ("name", "dtype", "head_dim_qk", "band", "attn_mask", "tile", "registers", "spill_bytes", "code_bytes")


def properties(record: object) -> dict[str, Any]:
    """A native record's fields, in their order in the documentation."""
    return {name: getattr(record, name) for name in vars(type(record)) if not name.startswith("_")}


def attempt(probe: Callable[[], Any]) -> Any:
    """The probe's result, or its failure in words: a report on a broken machine must still be printed."""
    try:
        return probe()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def driver() -> str:
    """The newest CUDA that the driver supports."""
    found = flashcore.devices()
    return "CUDA {}.{}".format(*found[0].driver_version) if found else "no devices"


def asked_through() -> str:
    """How calls learn what torch knows of tensors and the thread."""
    _, inside = _core.is_quiet()
    return "Python" if inside is None else "C++"


def environment() -> dict[str, Any]:
    """Everything that a bug report needs."""
    return {
        "flashcore": flashcore.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "torch": attempt(lambda: version_of("torch")),
        "torch_asked_through": attempt(asked_through),
        "numpy": attempt(lambda: version_of("numpy")),
        "driver": attempt(driver),
        "devices": attempt(lambda: [properties(device) for device in flashcore.devices()]),
        "bundles": attempt(
            lambda: [
                {"arch": b.arch, "kernels": len(b.kernels), "triton": b.triton, "ptxas": b.ptxas}
                for b in flashcore.bundles()
            ]
        ),
    }


def kernels(arch: str | None) -> list[dict[str, Any]]:
    """The kernels of the embedded bundles."""
    return [
        {"arch": bundle.arch, **properties(kernel)}
        for bundle in flashcore.bundles()
        if arch in (None, bundle.arch)
        for kernel in bundle.kernels
    ]


def print_environment(report: dict[str, Any]) -> None:
    for key, value in report.items():
        lines = value if isinstance(value, list) else [value]
        for line in lines or ["none"]:
            text = ", ".join(f"{k} {v}" for k, v in line.items()) if isinstance(line, dict) else str(line)
            print(f"{key:10} {text}")


def print_table(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    cells = [list(columns), *([cell(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def cell(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flashcore", description=flashcore.__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    env = commands.add_parser("env", help="this machine, as a bug report needs it")
    listing = commands.add_parser("kernels", help="the kernels in this package")
    listing.add_argument("--arch", help="of this architecture only")
    for command in (env, listing):
        command.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args(arguments)

    if options.command == "env":
        report = environment()
        print(json.dumps(report, indent=2)) if options.json else print_environment(report)
        return 0
    rows = kernels(options.arch)
    if not rows:
        present = ", ".join(bundle.arch for bundle in flashcore.bundles())
        print(f"no kernels for {options.arch}; architectures: {present}", file=sys.stderr)
        return 1
    print(json.dumps(rows, indent=2)) if options.json else print_table(("arch", *KERNEL_COLUMNS), rows)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head` closed the pipe; Python would complain once more while it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
