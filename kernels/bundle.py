"""The bundle container: one file per architecture, a manifest and the machine code it describes (`docs/bundle.md`)."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import zstandard

MAGIC = b"FCBUNDLE"
VERSION = 1
SCHEMA = "flashcore.bundle/1"
ALIGN = 16
MAX_RAW = 256 << 20
_HEAD = struct.Struct("<8sII")
_SECTION = struct.Struct("<QQ32s")


class BundleError(Exception):
    """A file that is not a sound bundle."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its manifest, and the code section that the manifest's offsets point into."""

    manifest: dict[str, Any]
    code: bytes

    def member(self, launch: dict[str, Any]) -> bytes:
        place = launch["code"]
        return self.code[place["offset"] : place["offset"] + place["len"]]

    def variants(self) -> dict[str, dict[str, Any]]:
        return {variant["name"]: variant for variant in self.manifest["variants"]}


def pack(arch: str, compiler: dict[str, str], variants: Iterable[tuple[dict[str, Any], list[bytes]]]) -> bytes:
    """Serialise variants, each with the code of its launches; similar ones should come one after the other."""
    code = bytearray()
    entries = []
    for variant, members in variants:
        launches = []
        for launch, member in zip(variant["launches"], members, strict=True):
            place = launch["code"]
            placed = {"kind": place["kind"], "offset": len(code), "len": len(member), "sha256": place["sha256"]}
            launches.append(launch | {"code": placed})
            code += member + bytes(-len(member) % ALIGN)
        entries.append(variant | {"launches": launches})
    manifest = {"schema": SCHEMA, "arch": arch, "compiler": compiler, "variants": entries}
    validate(manifest)
    return _serialise(json.dumps(manifest, separators=(",", ":")).encode(), bytes(code))


def _serialise(*sections: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(level=19)
    frames = [compressor.compress(raw) for raw in sections]
    headers = [
        _SECTION.pack(len(frame), len(raw), hashlib.sha256(raw).digest())
        for frame, raw in zip(frames, sections, strict=True)
    ]
    return b"".join([_HEAD.pack(MAGIC, VERSION, 0), *headers, *frames])


def unpack(data: bytes) -> Bundle:
    """Parse and verify a bundle, down to the hash of every member."""
    if len(data) < _HEAD.size + 2 * _SECTION.size:
        raise BundleError("truncated header")
    magic, version, reserved = _HEAD.unpack_from(data)
    if magic != MAGIC or version != VERSION or reserved != 0:
        raise BundleError("not a version 1 bundle")
    headers = [_SECTION.unpack_from(data, _HEAD.size + i * _SECTION.size) for i in range(2)]
    start = _HEAD.size + 2 * _SECTION.size
    if len(data) != start + sum(header[0] for header in headers):
        raise BundleError("the file's length is not its sections'")
    raw = []
    for compressed_len, raw_len, digest in headers:
        raw.append(_decompress(data[start : start + compressed_len], raw_len, digest))
        start += compressed_len
    bundle = Bundle(json.loads(raw[0]), raw[1])
    _verify(bundle)
    return bundle


def _decompress(frame: bytes, raw_len: int, digest: bytes) -> bytes:
    if raw_len > MAX_RAW:
        raise BundleError("a section is larger than 256 MiB")
    try:
        raw = zstandard.ZstdDecompressor().decompress(frame, max_output_size=raw_len, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BundleError(f"zstd: {error}") from error
    if len(raw) != raw_len or hashlib.sha256(raw).digest() != digest:
        raise BundleError("a section's bytes are not what its header says")
    return raw


def _verify(bundle: Bundle) -> None:
    validate(bundle.manifest)
    for variant in bundle.manifest["variants"]:
        for launch in variant["launches"]:
            member = bundle.member(launch)
            place = launch["code"]
            if place["offset"] % ALIGN or len(member) != place["len"]:
                raise BundleError(f"{variant['name']}: its code lies outside the code section")
            if hashlib.sha256(member).hexdigest() != place["sha256"]:
                raise BundleError(f"{variant['name']}: its code is not what the manifest says")


# The manifest's schema. A type, a set of allowed values, a predicate, a list of one kind of item, or an object with
# these fields.
_FACTOR = (str, int)
_RANGE = [int]
LIMITED = {"batch", "num_heads_q", "num_heads_kv", "group", "seq_len_q", "seq_len_k"}
LIMITED |= {"head_dim_qk", "head_dim_v", "tiles_query", "num_tiles"}


def _limits(value: Any) -> bool:
    return isinstance(value, dict) and all(name in LIMITED and _ordered(pair) for name, pair in value.items())


def _ordered(pair: Any) -> bool:
    return isinstance(pair, list) and [type(n) for n in pair] == [int, int] and 0 <= pair[0] <= pair[1]


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


MANIFEST: dict[str, Any] = {
    "schema": {SCHEMA},
    "arch": str,
    "compiler": {"triton": str, "ptxas": str},
    "variants": [
        {
            "name": str,
            "op": str,
            "family": str,
            "priority": int,
            "when": {
                "dtype": {"f16", "bf16"},
                "head_dim_qk": _RANGE,
                "head_dim_v": _RANGE,
                "band": bool,
                "attn_mask": {"none", "bool", "f16", "bf16", "f32"},
                "limits": _limits,
            },
            "requires": {"base_align": int, "stride_align": int, "head_dim_align": int, "positive_scale": bool},
            "tile": {"query": int, "key": int, "head_dim": int},
            "max_key_splits": _positive,
            "secret": [str],
            "workspace": [{"bytes": [_FACTOR]}],
            "launches": [
                {
                    "kernel": str,
                    "code": {"kind": {"cubin", "ptx"}, "offset": int, "len": int, "sha256": str},
                    "source_sha256": str,
                    "grid": {"x": [_FACTOR], "y": [_FACTOR], "z": [_FACTOR], "max_ctas_per_sm": (int, type(None))},
                    "block_threads": int,
                    "cluster": int,
                    "shared_bytes": int,
                    "tile_bytes": int,
                    "registers": int,
                    "spill_bytes": int,
                    "params": [dict],
                    "audit": {"verdict": {"not_run", "pass", "pass_as_assembled"}, "auditor": int, "disassembler": str},
                }
            ],
        }
    ],
}
_PARAM = {"kind": {"ptr", "i32", "i64", "f32", "scratch"}, "value": str}
_TENSOR_MAP = {"kind": {"tensor_map"}, "value": str, "box": [int], "swizzle": {0, 32, 64, 128}}


def validate(manifest: dict[str, Any]) -> None:
    """Refuse a manifest with a missing, unknown or wrongly typed field, or two variants of one name."""
    _validate(manifest, MANIFEST, "manifest")
    for variant in manifest["variants"]:
        for launch in variant["launches"]:
            for param in launch["params"]:
                _validate(param, _TENSOR_MAP if param.get("kind") == "tensor_map" else _PARAM, variant["name"])
    names = [variant["name"] for variant in manifest["variants"]]
    if len(set(names)) != len(names):
        raise BundleError("two variants have the same name")


def _validate(value: Any, schema: Any, where: str) -> None:
    match schema:
        case dict():
            if not isinstance(value, dict) or value.keys() != schema.keys():
                raise BundleError(f"{where}: expected the fields {', '.join(schema)}")
            for key, inner in schema.items():
                _validate(value[key], inner, f"{where}.{key}")
        case list():
            if not isinstance(value, list):
                raise BundleError(f"{where}: expected a list")
            for item in value:
                _validate(item, schema[0], f"{where}[]")
        case set():
            if value not in schema:
                raise BundleError(f"{where}: {value!r} is none of {', '.join(map(repr, sorted(schema)))}")
        case FunctionType():
            if not schema(value):
                raise BundleError(f"{where}: {value!r} is not allowed")
        case _:
            if not isinstance(value, schema) or (isinstance(value, bool) and schema is not bool):
                raise BundleError(f"{where}: {value!r} has the wrong type")
