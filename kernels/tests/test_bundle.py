"""The container: what goes in comes out, the same bytes each time, and no damaged file is taken for a sound one."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from typing import Any

import pytest

from kernels import __main__ as cli
from kernels import bundle, compile, specs
from kernels.compile import Member

COMPILER = {"triton": "3.9.0", "ptxas": "12.9.86"}


def member(code: bytes, spec: specs.Spec) -> Member:
    """Stands for the compiled code of a portable variant."""
    launch = spec.launches[0]
    place = {"kind": "cubin", "len": len(code), "sha256": hashlib.sha256(code).hexdigest()}
    entry = {
        "kernel": launch.kernel,
        "code": place,
        "source_sha256": "0" * 64,
        "grid": {"x": ["tiles_query", 2], "y": [], "z": [], "max_ctas_per_sm": None},
        "block_threads": 128,
        "cluster": 1,
        "tile_bytes": 0,
        "shared_bytes": 1024,
        "registers": 100,
        "spill_bytes": 0,
        "params": [param for param, _ in compile.expand_params(launch, [])],
        "audit": {"verdict": "not_run", "auditor": 0, "disassembler": ""},
    }
    return Member(code, entry)


@pytest.fixture
def variants() -> list[tuple[dict[str, Any], list[bytes]]]:
    matrix = specs.specs("sm_80")[:3]
    members = [[member(bytes([i]) * (100 + i), spec)] for i, spec in enumerate(matrix)]
    return [
        (compile.variant_entry(spec, made), [m.code for m in made]) for spec, made in zip(matrix, members, strict=True)
    ]


@pytest.fixture
def packed(variants: list[tuple[dict[str, Any], list[bytes]]]) -> bytes:
    return bundle.pack("sm_80", COMPILER, variants)


def test_round_trip(variants: list[tuple[dict[str, Any], list[bytes]]], packed: bytes) -> None:
    found = bundle.unpack(packed)
    assert found.manifest["arch"] == "sm_80"
    for entry, codes in variants:
        launches = found.variants()[entry["name"]]["launches"]
        assert [found.member(launch) for launch in launches] == codes
        assert all(launch["code"]["offset"] % 16 == 0 for launch in launches)


def test_deterministic(variants: list[tuple[dict[str, Any], list[bytes]]], packed: bytes) -> None:
    assert bundle.pack("sm_80", COMPILER, variants) == packed


def test_layout(packed: bytes) -> None:
    magic, version, reserved = struct.unpack_from("<8sII", packed)
    assert (magic, version, reserved) == (b"FCBUNDLE", 1, 0)
    manifest_len, _, _ = struct.unpack_from("<QQ32s", packed, 16)
    code_len, raw_len, _ = struct.unpack_from("<QQ32s", packed, 64)
    assert len(packed) == 112 + manifest_len + code_len
    assert raw_len == 3 * 112  # each padded to a multiple of 16


def test_a_flipped_bit_is_noticed_unless_it_changes_nothing(packed: bytes) -> None:
    sound, harmless = bundle.unpack(packed), 0
    for offset in range(len(packed)):
        damaged = bytearray(packed)
        damaged[offset] ^= 1 << offset % 8
        try:
            assert bundle.unpack(bytes(damaged)) == sound
            harmless += 1
        except bundle.BundleError:
            pass
    assert harmless < 8  # zstd ignores a bit of its frame header and has some freedom in its tables


@pytest.mark.parametrize("length", [0, 8, 111, 112, -1])
def test_truncated(packed: bytes, length: int) -> None:
    with pytest.raises(bundle.BundleError):
        bundle.unpack(packed[:length])


def test_trailing_bytes(packed: bytes) -> None:
    with pytest.raises(bundle.BundleError, match="length"):
        bundle.unpack(packed + b"\0")


def test_a_section_that_claims_too_much(packed: bytes) -> None:
    damaged = bytearray(packed)
    struct.pack_into("<Q", damaged, 16 + 8, bundle.MAX_RAW + 1)
    with pytest.raises(bundle.BundleError, match="256 MiB"):
        bundle.unpack(bytes(damaged))


def _edit(manifest: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        manifest = manifest[int(key)] if isinstance(manifest, list) else manifest[key]
    manifest[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", "flashcore.bundle/2"),
        ("surprise", 1),
        ("variants/0/when/dtype", "f64"),
        ("variants/0/when/band", 1),
        ("variants/0/when/sinks", True),
        ("variants/0/priority", "10"),
        ("variants/0/requires/positive_scale", None),
        ("variants/0/launches/0/block_threads", True),
        ("variants/0/launches/0/code/kind", "fatbin"),
        ("variants/0/launches/0/grid/x", [1.5]),
        ("variants/0/launches/0/params/0/kind", "tensor_map"),
        ("variants/0/launches/0/params/0/kind", "f64"),
        ("variants/0/name", "attention_forward.portable.bf16.d32.dense.exact"),
    ],
)
def test_schema(packed: bytes, path: str, value: Any) -> None:
    manifest = copy.deepcopy(bundle.unpack(packed).manifest)
    bundle.validate(manifest)
    _edit(manifest, path, value)
    with pytest.raises(bundle.BundleError):
        bundle.validate(manifest)


@pytest.mark.parametrize(("field", "value"), [("offset", 1 << 20), ("len", 1 << 20), ("offset", 8), ("sha256", "0")])
def test_a_member_that_is_not_there(packed: bytes, field: str, value: Any) -> None:
    found = bundle.unpack(packed)
    found.manifest["variants"][0]["launches"][0]["code"][field] = value
    sections = (json.dumps(found.manifest).encode(), found.code)
    with pytest.raises(bundle.BundleError, match="its code"):
        bundle.unpack(bundle._serialise(*sections))


def test_check_notices_other_code_and_another_entry(packed: bytes) -> None:
    committed, spec = bundle.unpack(packed), specs.specs("sm_80")[0]
    same = member(bytes([0]) * 100, spec)
    assert cli.compare_members("sm_80", {spec.name: [same]}, committed) == []
    other = member(bytes([9]) * 100, spec)
    assert "not what the sources give" in cli.compare_members("sm_80", {spec.name: [other]}, committed)[0]
    renamed = Member(same.code, same.entry | {"registers": 255})
    assert "same code, but" in cli.compare_members("sm_80", {spec.name: [renamed]}, committed)[0]


def test_check_notices_a_manifest_that_is_not_the_matrix(packed: bytes) -> None:
    committed, matrix = bundle.unpack(packed), specs.specs("sm_80")
    first, second = matrix[0].name, matrix[1].name
    committed.variants()[second]["priority"] += 1
    problems = cli.compare_manifest("sm_80", matrix[1:4], committed)
    assert f"sm_80 {first}: not in the matrix any more" in problems
    assert f"sm_80 {second}: the manifest entry is not what the spec says" in problems
    assert f"sm_80 {matrix[2].name}: its sources changed since it was built" in problems
    assert f"sm_80 {matrix[3].name}: missing from the bundle" in problems


@pytest.mark.parametrize("arch", specs.ARCHES)
def test_the_committed_bundle(arch: str) -> None:
    """Sound, complete, and its machine code declares the parameters and the block that the manifest says."""
    committed = cli.read(arch)
    assert committed is not None
    assert committed.variants().keys() == {spec.name for spec in specs.specs(arch)}
    sizes = {"tensor_map": 128, "ptr": 8, "scratch": 8, "i64": 8, "i32": 4, "f32": 4}
    for variant in committed.manifest["variants"][:: len(committed.manifest["variants"]) // 4]:
        for launch in variant["launches"]:
            assert launch["shared_bytes"] <= specs.ARCHES[arch]
            if launch["code"]["kind"] == "cubin":
                facts = compile.cubin_facts(committed.member(launch))
                compile.check_interface(facts, [sizes[p["kind"]] for p in launch["params"]], launch["block_threads"])
                assert (facts.registers, facts.stack) == (launch["registers"], launch["spill_bytes"])


def test_all_bundles_fit_the_package() -> None:
    assert sum(cli.bundle_path(arch).stat().st_size for arch in specs.ARCHES) < 6 << 20
