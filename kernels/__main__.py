"""`python -m kernels build|list|check|audit|tune`: make, show, prove and audit the bundles, choose what goes in."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kernels import audit, bundle, compile, specs, tune
from kernels.bundle import Bundle
from kernels.compile import Member
from kernels.specs import Spec

ROOT = Path(__file__).resolve().parent.parent
BUNDLE_DIR = "flashcore-rs/bundle"
SAMPLE = 3  # unchanged variants per architecture that `check` rebuilds anyway


def bundle_path(arch: str) -> Path:
    return ROOT / BUNDLE_DIR / f"{arch}.fcb"


def read(arch: str) -> Bundle | None:
    path = bundle_path(arch)
    if not path.exists():
        return None
    try:
        return bundle.unpack(path.read_bytes())
    except bundle.BundleError as error:
        raise bundle.BundleError(f"{path.name}: {error}") from error


def committed_members(spec: Spec, committed: Bundle | None) -> list[Member] | None:
    """The members a bundle already holds for a spec, if they were made from what the spec says now."""
    variant = committed.variants().get(spec.name) if committed else None
    if committed is None or variant is None:
        return None
    compilers = compile.compiler_versions()
    hashes = [compile.source_hash(spec, launch, compilers) for launch in spec.launches]
    if hashes != [launch["source_sha256"] for launch in variant["launches"]]:
        return None
    return [Member(committed.member(launch), _without_offset(launch)) for launch in variant["launches"]]


def _without_offset(launch: dict[str, Any]) -> dict[str, Any]:
    return launch | {"code": {key: value for key, value in launch["code"].items() if key != "offset"}}


def compile_with_progress(wanted: list[Spec], jobs: int) -> tuple[dict[tuple[str, str], list[Member]], list[str]]:
    """Members by (arch, name), and a line for each variant that failed."""
    started = time.monotonic()
    built: dict[tuple[str, str], list[Member]] = {}
    failures = []
    for done, (spec, result) in enumerate(compile.compile_all(wanted, jobs), 1):
        if isinstance(result, str):
            failures.append(f"{spec.arch} {spec.name}: {result.strip()}")
        else:
            built[spec.arch, spec.name] = result
        if sys.stderr.isatty():
            print(f"\r{done}/{len(wanted)} compiled", end="", file=sys.stderr, flush=True)
    if wanted:
        print(f"\rcompiled {len(wanted)} variants in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return built, failures


def build(args: argparse.Namespace) -> int:
    """Write the bundles, compiling what changed since the last build (or everything), if the auditor lets them pass."""
    wanted = {arch: specs.specs(arch, args.only) for arch in args.arch}
    members: dict[tuple[str, str], list[Member]] = {}
    for arch, matrix in wanted.items():
        committed = None if args.all else read(arch)
        for spec in matrix:
            if (unchanged := committed_members(spec, committed)) is not None:
                members[arch, spec.name] = unchanged
    stale = [spec for matrix in wanted.values() for spec in matrix if (spec.arch, spec.name) not in members]
    built, failures = compile_with_progress(stale, args.jobs)
    members |= built
    whole = {arch: matrix for arch, matrix in wanted.items() if all((arch, s.name) in members for s in matrix)}
    members, refused = audited(whole, members)
    failures += refused
    for arch, matrix in wanted.items():
        if any((arch, spec.name) not in members for spec in matrix):
            failures.append(f"{arch}: left as it was")
            continue
        data = _pack(arch, [(spec, members[arch, spec.name]) for spec in matrix])
        bundle_path(arch).parent.mkdir(parents=True, exist_ok=True)
        bundle_path(arch).write_bytes(data)
        print(f"{arch}: {len(matrix)} variants, {len(data)} bytes")
    print("\n".join(failures), file=sys.stderr, end="\n" if failures else "")
    return 1 if failures else 0


Members = dict[tuple[str, str], list[Member]]


def audited(wanted: dict[str, list[Spec]], members: Members) -> tuple[Members, list[str]]:
    """The members with the auditor's verdict in their entries, without those that fail; a line for each of these."""
    with tempfile.TemporaryDirectory(prefix="flashcore-bundles-") as folder:
        files = []
        for arch, matrix in wanted.items():
            files.append(Path(folder) / f"{arch}.fcb")
            files[-1].write_bytes(_pack(arch, [(spec, members[arch, spec.name]) for spec in matrix]))
        reports, tools = audit.run(files) if files else ([], {})
    # Code may be audited twice under different declarations; one complaint is enough to refuse it.
    refused = {report["sha256"]: audit.complaint(report) for report in reports if report["verdict"] != "pass"}
    verdicts = {report["sha256"]: audit.entry(report, tools) for report in reports}
    kept: Members = {}
    for name, launches in members.items():
        hashes = [member.entry["code"]["sha256"] for member in launches]
        if name[0] in wanted and not refused.keys() & set(hashes):
            entries = [member.entry | {"audit": verdicts[h]} for member, h in zip(launches, hashes, strict=True)]
            kept[name] = [Member(member.code, made) for member, made in zip(launches, entries, strict=True)]
    return kept, list(refused.values())


def reaudit(args: argparse.Namespace) -> int:
    """Audit the committed bundles, and prove that their manifests say what the audit says."""
    started = time.monotonic()
    reports, tools = audit.run([bundle_path(arch) for arch in args.arch])
    problems = [audit.complaint(report) for report in reports if report["verdict"] != "pass"]
    verdicts = {report["sha256"]: audit.entry(report, tools) for report in reports}
    for arch in args.arch:
        committed = read(arch)
        for variant in committed.manifest["variants"] if committed else []:
            for launch in variant["launches"]:
                if launch["audit"] != verdicts[launch["code"]["sha256"]]:
                    problems.append(
                        f"{arch} {variant['name']}: the manifest has {launch['audit']}, not what the audit says"
                    )
    seconds = round(time.monotonic() - started)
    print("\n".join(problems) if problems else f"{len(reports)} cubins audited, all pass", end="")
    print(f" (nvdisasm {tools['nvdisasm']}, {seconds} s)")
    if args.json:
        rows = reports + [row for file in args.rows for row in json.loads(file.read_text())]
        args.json.write_text(json.dumps(audit.evidence(rows, tools | {"seconds": seconds}), indent=1) + "\n")
    return 1 if problems else 0


def _pack(arch: str, variants: Iterable[tuple[Spec, list[Member]]]) -> bytes:
    entries = ((compile.variant_entry(spec, members), [m.code for m in members]) for spec, members in variants)
    return bundle.pack(arch, compile.compiler_versions(), entries)


def show(args: argparse.Namespace) -> int:
    """The matrix as the bundles have it: one row per launch."""
    found = [(arch, read(arch)) for arch in args.arch]
    rows = [
        _row(arch, variant, launch)
        for arch, committed in found
        if committed is not None
        for variant in committed.manifest["variants"]
        for launch in variant["launches"]
    ]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    line = "{:10} {:74} {:>9} {:>5} {:>4} {:>6} {:>7} {:>7}"
    print(line.format("arch", "variant", "tile", "warps", "regs", "spills", "shared", "bytes"))
    for r in rows:
        print(line.format(*(r[k] for k in ("arch", "name", "tile", "warps", "registers", "spills", "shared", "bytes"))))
    for arch, committed in found:
        if committed is not None:
            mine = [row for row in rows if row["arch"] == arch]
            raw, packed = len(committed.code), bundle_path(arch).stat().st_size
            spilling = sum(row["spills"] > 0 for row in mine)
            print(f"{arch}: {len(mine)} kernels, {raw} bytes of code in {packed}; {spilling} spill")
    return 0


def _row(arch: str, variant: dict[str, Any], launch: dict[str, Any]) -> dict[str, Any]:
    when, tile = variant["when"], variant["tile"]
    return {
        "arch": arch,
        "name": variant["name"],
        "family": variant["family"],
        "dtype": when["dtype"],
        "head_dim_qk": when["head_dim_qk"],
        "head_dim_v": when["head_dim_v"],
        "band": when["band"],
        "attn_mask": when["attn_mask"],
        "requires": variant["requires"],
        "tile": f"{tile['query']}x{tile['key']}",
        "warps": launch["block_threads"] // 32,
        "registers": launch["registers"],
        "spills": launch["spill_bytes"],
        "shared": launch["shared_bytes"],
        "bytes": launch["code"]["len"],
    }


def check(args: argparse.Namespace) -> int:
    """Prove that the committed bundles are what the sources give."""
    problems: list[str] = []
    suspects: list[Spec] = []
    for arch in args.arch:
        committed = read(arch)
        if committed is None:
            problems.append(f"{arch}: no bundle")
            continue
        matrix = specs.specs(arch)
        problems += compare_manifest(arch, matrix, committed)
        suspects += matrix if args.all else _suspects(arch, matrix, committed, args.base)
    built, failures = compile_with_progress(suspects, args.jobs)
    problems += failures
    for arch in args.arch:
        if committed := read(arch):
            problems += compare_members(arch, {name: made for (a, name), made in built.items() if a == arch}, committed)
    print("\n".join(problems) if problems else f"{len(built)} variants rebuilt, all as committed")
    return 1 if problems else 0


def compare_manifest(arch: str, matrix: list[Spec], committed: Bundle) -> list[str]:
    """Everything the manifest says that does not take a compiler to know."""
    problems = []
    if (committed.manifest["arch"], committed.manifest["compiler"]) != (arch, compile.compiler_versions()):
        problems.append(f"{arch}: built for another architecture or by another compiler")
    variants = committed.variants()
    names = [spec.name for spec in matrix]
    problems += [f"{arch} {name}: not in the matrix any more" for name in variants if name not in names]
    for spec in matrix:
        variant = variants.get(spec.name)
        if variant is None:
            problems.append(f"{arch} {spec.name}: missing from the bundle")
        elif compile.variant_entry(spec, []) | {"launches": variant["launches"]} != variant:
            problems.append(f"{arch} {spec.name}: the manifest entry is not what the spec says")
        elif committed_members(spec, committed) is None:
            problems.append(f"{arch} {spec.name}: its sources changed since it was built")
    return problems


def _suspects(arch: str, matrix: list[Spec], committed: Bundle, base: str | None) -> list[Spec]:
    """What to rebuild: what the sources say is stale, what differs from `base`, and a sample drawn by hash."""
    digest = hashlib.sha256(bundle_path(arch).read_bytes()).digest()
    drawn = sorted(matrix, key=lambda spec: hashlib.sha256(digest + spec.name.encode()).digest())[:SAMPLE]
    sample = {spec.name for spec in drawn}
    before = _at_revision(arch, base).variants() if base else committed.variants()
    now = committed.variants()
    return [
        spec
        for spec in matrix
        if spec.name in now
        and (spec.name in sample or committed_members(spec, committed) is None or _differ(spec.name, before, now))
    ]


def _differ(name: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    return name not in before or [_without_offset(launch) for launch in before[name]["launches"]] != [
        _without_offset(launch) for launch in now[name]["launches"]
    ]


def _at_revision(arch: str, revision: str) -> Bundle:
    """The bundle of a git revision; empty where it had none."""
    path = f"{revision}:{BUNDLE_DIR}/{arch}.fcb"
    shown = subprocess.run(["git", "show", path], cwd=ROOT, capture_output=True, check=False)
    return bundle.unpack(shown.stdout) if shown.returncode == 0 else Bundle({"variants": []}, b"")


def compare_members(arch: str, built: dict[str, list[Member]], committed: Bundle) -> list[str]:
    """Byte for byte, and every measured field but the verdict; `compare_manifest` has looked at the source hash."""
    problems = []
    variants = committed.variants()
    for name, members in built.items():
        if name not in variants:
            continue
        for member, launch in zip(members, variants[name]["launches"], strict=True):
            if member.code != committed.member(launch):
                problems.append(f"{arch} {name}: the committed code is not what the sources give")
            elif member.entry != _without_offset(launch) | {k: member.entry[k] for k in ("source_sha256", "audit")}:
                problems.append(f"{arch} {name}: same code, but the manifest entry is not what the build gives")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, function in (("build", build), ("list", show), ("check", check), ("audit", reaudit)):
        command = commands.add_parser(name, help=(function.__doc__ or "").splitlines()[0])
        command.set_defaults(function=function)
        command.add_argument("--arch", action="append", choices=specs.ARCHES, help="one of them (default: all)")
        if name in ("build", "check"):
            command.add_argument("--all", action="store_true", help="compile everything, changed or not")
            command.add_argument("--jobs", type=int, default=os.cpu_count())
        if name == "build":
            command.add_argument("--only", choices=specs.FAMILIES, help="leave the other kernel families out")
        if name == "audit":
            command.add_argument("--json", type=Path, metavar="FILE", help="write the evidence")
            command.add_argument("--rows", type=Path, nargs="+", default=[], metavar="FILE", help="rows to add to it")
        if name == "list":
            command.add_argument("--json", action="store_true")
        if name == "check":
            command.add_argument("--base", metavar="REVISION", help="also rebuild what differs from this git revision")
    tuning = commands.add_parser("tune", help="find out which build answers which sizes")
    tuning.set_defaults(arch=[tune.ARCH])
    tune.add_arguments(tuning)
    args = parser.parse_args()
    args.arch = args.arch or list(specs.ARCHES)
    try:
        result: int = args.function(args)
    except (audit.AuditError, bundle.BundleError, compile.CompileError) as error:
        print(error, file=sys.stderr)
        return 1
    return result


if __name__ == "__main__":
    sys.exit(main())
