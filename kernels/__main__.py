"""`python -m kernels build|list|check`: make the bundles, show what is in them, prove that they are what they say."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from kernels import bundle, compile, specs

BUNDLE_DIR = Path(__file__).resolve().parent.parent / "flashcore-rs" / "bundle"


def _path(arch: str) -> Path:
    return BUNDLE_DIR / f"{arch}.fcb"


def _read(arch: str) -> bundle.Bundle | None:
    path = _path(arch)
    return bundle.unpack(path.read_bytes()) if path.exists() else None


def build(args: argparse.Namespace) -> int:
    wanted = [spec for arch in args.arch for spec in specs.specs(arch) if args.only in (None, spec.family)]
    started = time.monotonic()
    built: dict[tuple[str, str], list[compile.Member]] = {}
    failed = []
    for spec, result in compile.compile_all(wanted, args.jobs):
        if isinstance(result, str):
            failed.append(f"{spec.arch} {spec.name}: {result}")
        else:
            built[spec.arch, spec.name] = result
        print(f"\r{len(built)}/{len(wanted)}", end="", file=sys.stderr, flush=True)
    print(f" in {time.monotonic() - started:.0f} s", file=sys.stderr)
    if failed:
        print("\n".join(failed), file=sys.stderr)
        return 1
    BUNDLE_DIR.mkdir(parents=True, exist_ok=True)
    for arch in args.arch:
        variants = [
            (compile.variant_entry(spec, members), [member.code for member in members])
            for spec in wanted
            if spec.arch == arch
            for members in [built[arch, spec.name]]
        ]
        data = bundle.pack(arch, compile.compiler_versions(), variants)
        _path(arch).write_bytes(data)
        print(f"{_path(arch).name}: {len(variants)} variants, {len(data)} bytes")
    return 0


def show(args: argparse.Namespace) -> int:
    for arch in args.arch:
        found = _read(arch)
        if found is None:
            continue
        for variant in found.manifest["variants"]:
            for launch in variant["launches"]:
                print(_row(arch, variant, launch))
    return 0


def _row(arch: str, variant: dict[str, Any], launch: dict[str, Any]) -> str:
    tile = variant["tile"]
    return (
        f"{arch:10} {variant['name']:62} {tile['query']:3}x{tile['key']:<3} {launch['block_threads'] // 32:2} warps "
        f"{launch['registers']:3} regs {launch['spill_bytes']:4} B spilled {launch['shared_bytes']:6} B shared "
        f"{launch['code']['len']:6} B"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, function in (("build", build), ("list", show)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--arch", action="append")
        command.add_argument("--only")
        command.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.arch = args.arch or ["sm_90a"]
    return args.function(args)


if __name__ == "__main__":
    sys.exit(main())
