"""From a `Spec` to machine code and its manifest entry, on a machine that needs no GPU.

Every kernel is compiled in a process of its own: a compiler pass that aborts fails one variant and says which, and no
variant can depend on what was compiled before it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from kernels.specs import ARCHES, Launch, Spec

# The build environment is part of what a member is made from, so it is part of its source hash.
BUILD_ENV = {
    "TRITON_DISABLE_LINE_INFO": "1",  # no paths in the code, and the same bytes from every directory
    "TRITON_DEFAULT_FP_FUSION": "1",
    "TRITON_DUMP_PTXAS_LOG": "1",  # read by `_compile_launch`, to refuse serialised WGMMA
}

NOT_AUDITED = {"verdict": "not_run", "auditor": 0, "disassembler": ""}

AXES = ("batch", "head", "seq", "dim")
ABI = {"i32": ("i32", 4), "i64": ("i64", 8), "fp32": ("f32", 4)}
SWIZZLE_BYTES = (0, 32, 64, 128)  # by tensordesc_meta's code


class CompileError(Exception):
    """A variant that cannot be built, or whose code is not what its spec says."""


@dataclass(frozen=True)
class Member:
    """Compiled code of one launch, and its manifest entry without the place in the bundle."""

    code: bytes
    entry: dict[str, Any]


def tool(name: str) -> Path:
    """A binary utility that the Triton wheel brings along."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        raise CompileError("triton is not installed: pip install -r kernels/requirements.txt")
    return Path(found.origin).parent / "backends" / "nvidia" / "bin" / name


def run_tool(name: str, *args: str) -> str:
    return subprocess.run([tool(name), *args], check=True, capture_output=True, text=True).stdout


@functools.cache
def compiler_versions() -> dict[str, str]:
    match = re.search(r"V(\d+\.\d+\.\d+)", run_tool("ptxas", "--version"))
    if match is None:
        raise CompileError("ptxas does not say its version")
    return {"triton": importlib.metadata.version("triton"), "ptxas": match[1]}


def source_hash(spec: Spec, launch: Launch, compiler: dict[str, str]) -> str:
    """What the member is made from: kernel text, variant, compilers, environment."""
    texts = [hashlib.sha256(_module_text(module)).hexdigest() for module in launch.sources]
    made_from = [spec.arch, dataclasses.asdict(launch), texts, compiler, BUILD_ENV]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _module_text(module: str) -> bytes:
    return (Path(__file__).parent / f"{module.removeprefix('kernels.')}.py").read_bytes()


def expand_params(launch: Launch, tensordesc_meta: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """The machine code's parameter list: manifest entry and size in bytes, in order."""
    params: list[tuple[dict[str, Any], int]] = []
    maps = iter(tensordesc_meta)
    for argument, kind in launch.signature.items():
        if kind == "constexpr":
            continue
        value = launch.values[argument]
        if kind.startswith("tensordesc"):
            params.extend(_expand_descriptor(value, next(maps)))
        elif kind.startswith("*"):
            params.append(({"kind": "ptr", "value": value}, 8))
        else:
            params.append(({"kind": ABI[kind][0], "value": value}, ABI[kind][1]))
    # Triton appends global and profile scratch; both are empty here (`_compile_launch` checks).
    return params + [({"kind": "scratch", "value": "none"}, 8)] * 2


def _expand_descriptor(tensor: str, meta: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int]]:
    box = list(reversed(meta["block_size"]))
    yield {"kind": "tensor_map", "value": tensor, "box": box, "swizzle": SWIZZLE_BYTES[meta["swizzle"]]}, 128
    for axis in AXES:
        yield {"kind": "i32", "value": f"{tensor}.shape.{axis}"}, 4
    for axis in AXES:
        yield {"kind": "i64", "value": f"{tensor}.stride.{axis}"}, 8


@dataclass(frozen=True)
class CubinFacts:
    """What the finished code says about itself."""

    registers: int
    stack: int
    param_sizes: tuple[int, ...]
    block_threads: int


def cubin_facts(cubin: bytes) -> CubinFacts:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        elf = run_tool("cuobjdump", "-elf", file.name)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    params = re.findall(r"Ordinal\s*:\s*(0x\w+)\s+Offset\s*:\s*0x\w+\s+Size\s*:\s*(0x\w+)", elf)
    threads = re.search(r"EIATTR_REQNTID.*?Value:\s*(0x\w+)\s+(0x\w+)\s+(0x\w+)", elf, re.S)
    if not resources or not threads:
        raise CompileError("cuobjdump does not show the resources of the cubin")
    x, y, z = (int(n, 16) for n in threads.groups())
    ordered = sorted((int(ordinal, 16), int(size, 16)) for ordinal, size in params)
    return CubinFacts(int(resources[1]), int(resources[2]), tuple(size for _, size in ordered), x * y * z)


def _triton_compile(launch: Launch, arch: str) -> tuple[Any, str]:
    """Triton's compiled kernel and ptxas's log."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    function = getattr(importlib.import_module(launch.sources[0]), launch.kernel)
    arguments = list(launch.signature)
    if arguments != function.arg_names:
        raise CompileError(f"the spec's arguments {arguments} are not the kernel's {function.arg_names}")
    attrs = {(arguments.index(a),): [["tt.divisibility", multiple]] for a, multiple in launch.divisibility.items()}
    source_class = GluonASTSource if function.is_gluon() else ASTSource
    source = source_class(function, dict(launch.signature), dict(launch.constexprs), attrs)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "num_ctas": launch.num_ctas,
        "enable_fp_fusion": True,
        **launch.options,
    }
    target = GPUTarget("cuda", int(re.sub(r"\D", "", arch)), 32)
    with redirect_stdout(io.StringIO()) as log:
        kernel = triton.compile(source, target=target, options=options)
    return kernel, log.getvalue()


def check_interface(facts: CubinFacts, sizes: list[int], block_threads: int) -> None:
    """Refuse code whose parameters or block are not what the manifest is going to say."""
    if list(facts.param_sizes) != sizes:
        raise CompileError(f"the cubin's parameters have sizes {facts.param_sizes}, the manifest's {sizes}")
    if facts.block_threads != block_threads:
        raise CompileError(f"the cubin wants {facts.block_threads} threads, the compiler said {block_threads}")


def check_resources(arch: str, shared: int, scratch: int, spilled: int, log: str) -> None:
    """Refuse code that cannot be launched, or that ptxas says is slow."""
    if shared > ARCHES[arch]:
        raise CompileError(f"{shared} bytes of shared memory, and {arch} has {ARCHES[arch]}")
    if scratch:
        raise CompileError(f"the kernel asks for {scratch} bytes of scratch memory")
    if spilled:
        raise CompileError(f"{spilled} bytes of registers spilled: take a smaller tile")
    if warnings := re.findall(r".*\(C75\d\d\).*", log):
        raise CompileError("ptxas serialised WGMMA: " + " ".join(warnings))


def _compile_launch(spec: Spec, launch: Launch) -> Member:
    kernel, log = _triton_compile(launch, spec.arch)
    meta = kernel.metadata
    params = expand_params(launch, meta.tensordesc_meta)
    facts = cubin_facts(kernel.asm["cubin"])
    check_interface(facts, [size for _, size in params], 32 * meta.num_warps)
    scratch = meta.global_scratch_size + meta.profile_scratch_size
    check_resources(spec.arch, meta.shared, scratch, facts.stack, log)
    # For PTX, registers and stack are those of the same text assembled for the lowest architecture it runs on.
    kind = "ptx" if spec.arch.startswith("compute_") else "cubin"
    code = kernel.asm["ptx"].encode() if kind == "ptx" else kernel.asm["cubin"]
    entry = {
        "kernel": meta.name,
        "code": {"kind": kind, "len": len(code), "sha256": hashlib.sha256(code).hexdigest()},
        "source_sha256": source_hash(spec, launch, compiler_versions()),
        "grid": _jsonable(launch.grid),
        "block_threads": facts.block_threads,
        "cluster": launch.num_ctas,
        "shared_bytes": meta.shared,
        "tile_bytes": launch.tile_bytes,
        "registers": facts.registers,
        "spill_bytes": facts.stack,
        "params": [param for param, _ in params],
        "audit": dict(NOT_AUDITED),
    }
    return Member(code, entry)


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(value)))


def variant_entry(spec: Spec, members: Iterable[Member]) -> dict[str, Any]:
    """The manifest entry of a variant; `bundle.pack` adds each member's offset."""
    return {
        "name": spec.name,
        "op": spec.op,
        "family": spec.family,
        "priority": spec.priority,
        "when": _jsonable(spec.when),
        "requires": _jsonable(spec.requires),
        "tile": _jsonable(spec.tile),
        "max_key_splits": spec.max_key_splits,
        "secret": list(spec.secret),
        "workspace": [{"bytes": list(factors)} for factors in spec.workspace],
        "launches": [member.entry for member in members],
    }


def prepare_environment(cache_dir: str) -> None:
    """Set what the compiler reads from the environment. Workers inherit it."""
    os.environ.update(BUILD_ENV, TRITON_CACHE_DIR=cache_dir)
    # Triton takes this assembler from sm_90 up; by default that is a 13.x, whose code CUDA 12 drivers cannot load.
    os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = str(tool("ptxas"))
    for name in ("TRITON_INTERPRET", "PTXAS_OPTIONS", "TRITON_OVERRIDE_ARCH"):
        os.environ.pop(name, None)


def compile_spec(spec: Spec) -> list[Member]:
    """Compile in this process."""
    return [_compile_launch(spec, launch) for launch in spec.launches]


def _worker(spec: Spec, pipe: Connection) -> None:
    try:
        pipe.send(compile_spec(spec))
    except Exception:
        pipe.send(traceback.format_exc(limit=-3))


def compile_all(specs: list[Spec], jobs: int) -> Iterator[tuple[Spec, list[Member] | str]]:
    """Compile `jobs` at a time, each in a fresh process; yields members, or what went wrong, as they finish."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kernels.compile", "triton"])
    waiting = list(reversed(specs))
    running: dict[Connection, tuple[Spec, BaseProcess]] = {}
    with tempfile.TemporaryDirectory(prefix="flashcore-kernels-") as cache_dir:
        prepare_environment(cache_dir)
        while waiting or running:
            while waiting and len(running) < jobs:
                spec = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                running[ours] = (spec, context.Process(target=_worker, args=(spec, theirs)))
                running[ours][1].start()
                theirs.close()
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                spec, process = running.pop(pipe)
                try:
                    result: list[Member] | str = pipe.recv()
                except EOFError:  # a pass aborted the process
                    result = "the compiler died"
                process.join()
                yield spec, result
