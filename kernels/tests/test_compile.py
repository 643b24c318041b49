"""From spec to machine code: reproducible, and refused when its interface is not what the manifest would say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kernels import __main__ as cli
from kernels import compile, specs
from kernels.compile import CompileError, CubinFacts, Member
from kernels.specs import Launch, Shape, Spec

SMALL = Shape(16, 16, 1, 1)
BUILD = """
import hashlib
from kernels import compile, specs
def main():
    spec = specs.forward("sm_90a", "bf16", 32, False, "none", "exact", specs.Shape(16, 16, 1, 1))
    ((_, members),) = compile.compile_all([spec], 1)
    print(members[0].entry["code"]["sha256"] if isinstance(members, list) else members)
if __name__ == "__main__":
    main()
"""


def small_spec(arch: str = "sm_90a") -> Spec:
    return specs.forward(arch, "bf16", 32, False, "none", "exact", SMALL)


def build_one(spec: Spec) -> list[Member] | str:
    ((built, result),) = compile.compile_all([spec], 1)
    assert built is spec
    return result


@pytest.fixture(scope="module")
def member() -> Member:
    result = build_one(small_spec())
    assert isinstance(result, list), result
    return result[0]


def test_the_entry_is_what_the_spec_asks_for(member: Member) -> None:
    params = [(p["kind"], p["value"]) for p in member.entry["params"]]
    assert params[:6] == [
        ("ptr", "q"),
        ("ptr", "k"),
        ("ptr", "v"),
        ("ptr", "out"),
        ("ptr", "lse"),
        ("i64", "q.stride.batch"),
    ]
    assert params[-3:] == [("f32", "scale_log2"), ("scratch", "none"), ("scratch", "none")]
    assert member.entry["block_threads"] == 32
    assert member.code[:4] == b"\x7fELF"


def test_another_directory_and_process_give_the_same_bytes(member: Member, tmp_path: Path) -> None:
    shutil.copytree(Path(cli.__file__).parent, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    script = tmp_path / "build_one.py"
    script.write_text(BUILD)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == member.entry["code"]["sha256"]


def test_no_path_of_this_machine_in_the_code(member: Member) -> None:
    for path in (cli.ROOT, Path.home(), Path(sys.prefix)):
        assert str(path).encode() not in member.code


def test_ptx_is_for_any_driver() -> None:
    result = build_one(small_spec("compute_80"))
    assert isinstance(result, list), result
    text = result[0].code.decode()
    assert ".version 7.0" in text
    assert ".target sm_80" in text
    assert result[0].entry["code"]["kind"] == "ptx"


def test_interface_mismatch_is_refused(member: Member) -> None:
    facts = compile.cubin_facts(member.code)
    sizes = [size for _, size in compile.expand_params(small_spec().launches[0], [])]
    compile.check_interface(facts, sizes, 32)
    for wrong in (sizes[:-1], [*sizes, 8], [*sizes[:5], 4, *sizes[6:]]):
        with pytest.raises(CompileError, match="parameters"):
            compile.check_interface(facts, wrong, 32)
    with pytest.raises(CompileError, match="threads"):
        compile.check_interface(facts, sizes, 64)


def test_a_descriptor_expands_to_map_shapes_and_strides() -> None:
    launch = Launch(
        kernel="k",
        sources=("kernels.forward",),
        signature={"query": "tensordesc<bf16[1, 1, 64, 128],...>", "n": "i32", "X": "constexpr"},
        constexprs={"X": 1},
        values={"query": "q", "n": "num_tiles"},
        grid=specs.Grid(x=(1,)),
        num_warps=4,
        num_stages=1,
    )
    params = compile.expand_params(launch, [{"swizzle": 3, "block_size": [1, 1, 64, 64]}])
    assert [size for _, size in params] == [128, 4, 4, 4, 4, 8, 8, 8, 8, 4, 8, 8]
    assert params[0][0] == {"kind": "tensor_map", "value": "q", "box": [64, 64, 1, 1], "swizzle": 128}
    assert [p["value"] for p, _ in params[1:9]] == [
        *(f"q.shape.{axis}" for axis in ("batch", "head", "seq", "dim")),
        *(f"q.stride.{axis}" for axis in ("batch", "head", "seq", "dim")),
    ]


def test_what_cannot_be_built_is_an_error_that_names_it() -> None:
    spec = small_spec()
    launch = spec.launches[0]
    renamed = {("query" if name == "q" else name): kind for name, kind in launch.signature.items()}
    result = build_one(replace(spec, launches=(replace(launch, signature=renamed),)))
    assert isinstance(result, str)
    assert "are not the kernel's" in result


def test_what_cannot_run_or_would_crawl_is_refused() -> None:
    compile.check_resources("sm_86", 99 << 10, 0, 0, "ptxas info    : Used 255 registers")
    with pytest.raises(CompileError, match="shared memory"):
        compile.check_resources("sm_86", (99 << 10) + 1, 0, 0, "")
    with pytest.raises(CompileError, match="scratch"):
        compile.check_resources("sm_90a", 0, 128, 0, "")
    with pytest.raises(CompileError, match="spilled"):
        compile.check_resources("sm_90a", 0, 0, 8, "")
    with pytest.raises(CompileError, match="serialised"):
        compile.check_resources("sm_90a", 0, 0, 0, "ptxas info    : (C7512) Potential Performance Loss: wgmma")


def test_the_hash_covers_what_the_code_is_made_from() -> None:
    spec = small_spec()
    launch = spec.launches[0]
    compiler = {"triton": "3.9.0", "ptxas": "12.9.86"}
    hashes = {
        compile.source_hash(spec, launch, compiler),
        compile.source_hash(replace(spec, arch="sm_80"), launch, compiler),
        compile.source_hash(spec, replace(launch, num_warps=2), compiler),
        compile.source_hash(spec, replace(launch, sources=("kernels.specs",)), compiler),
        compile.source_hash(spec, launch, compiler | {"ptxas": "13.0.0"}),
    }
    assert len(hashes) == 5
    assert compile.source_hash(spec, launch, compiler) == compile.source_hash(small_spec(), launch, compiler)


def test_facts_are_the_cubins(member: Member) -> None:
    facts = compile.cubin_facts(member.code)
    assert isinstance(facts, CubinFacts)
    assert (facts.registers, facts.stack) == (member.entry["registers"], member.entry["spill_bytes"])
