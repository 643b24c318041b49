"""The matrix of variants: complete, unambiguous, and ordered as intended."""

from __future__ import annotations

import itertools

import pytest

from kernels import specs
from kernels.specs import ALIGNMENTS, ELEMENT, MASKS, TILES, Alignment, Spec

ARCHES = list(specs.ARCHES)


def qualifies(spec: Spec, dtype: str, head_dims: tuple[int, int], band: bool, mask: str, align: Alignment) -> bool:
    """The rules of docs/bundle.md for a tensor that is aligned as `align` says."""
    (qk, v), when, requires = head_dims, spec.when, spec.requires
    return (
        (when.dtype, when.attn_mask) == (dtype, mask)
        and (when.band or not band)
        and when.head_dim_qk[0] <= qk <= when.head_dim_qk[1]
        and when.head_dim_v[0] <= v <= when.head_dim_v[1]
        and requires.base_align <= align.base_align
        and requires.stride_align <= align.stride_align
        and qk * 2 % requires.head_dim_align == 0
        and v * 2 % requires.head_dim_align == 0
    )


def choose(
    matrix: list[Spec], dtype: str, head_dims: tuple[int, int], band: bool, mask: str, align: Alignment
) -> Spec | None:
    candidates = [spec for spec in matrix if qualifies(spec, dtype, head_dims, band, mask, align)]
    return max(candidates, key=lambda spec: (spec.priority, spec.name), default=None)


@pytest.mark.parametrize("arch", ARCHES)
def test_names_are_unique_and_say_what_they_are(arch: str) -> None:
    matrix = specs.specs(arch)
    assert len({spec.name for spec in matrix}) == len(matrix)
    for spec in matrix:
        assert spec.name.startswith(f"{spec.op}.{spec.family}.{spec.when.dtype}.d{spec.tile.head_dim}.")
        assert spec.arch == arch


@pytest.mark.parametrize("arch", ARCHES)
def test_every_request_has_an_answer(arch: str) -> None:
    matrix = specs.specs(arch)
    features = [(band, mask) for mask in MASKS for band in (False, True)]
    for dtype, (band, mask), align in itertools.product(ELEMENT, features, ALIGNMENTS.values()):
        if mask in ("f16", "bf16") and mask != dtype:
            continue
        answers = [spec for spec in matrix if (spec.when.dtype, spec.when.attn_mask) == (dtype, mask)]
        for head_dims in (
            [(d, d) for d in range(1, 257)] + [(d, 1) for d in (31, 65, 256)] + [(1, d) for d in (64, 256)]
        ):
            assert choose(answers, dtype, head_dims, band, mask, align), (dtype, head_dims, band, mask, align)


@pytest.mark.parametrize("arch", ARCHES)
def test_no_two_variants_tie(arch: str) -> None:
    def question(spec: Spec) -> tuple[object, ...]:
        return spec.when, spec.requires, spec.priority

    matrix = specs.specs(arch)
    assert len({question(spec) for spec in matrix}) == len(matrix)


@pytest.mark.parametrize(
    ("head_dim", "band", "alignment", "expected"),
    [
        (64, False, "exact", "d64.dense.exact"),
        (64, True, "exact", "d64.band.exact"),
        (64, False, "unaligned", "d64.band.unaligned"),
        (40, False, "aligned", "d64.dense.aligned"),
        (41, False, "aligned", "d64.band.unaligned"),
        (80, True, "aligned", "d128.band.aligned"),
        (1, True, "unaligned", "d32.band.unaligned"),
        (192, False, "aligned", "d256.dense.aligned"),
    ],
)
def test_the_smallest_tile_then_the_strongest_assumption(
    head_dim: int, band: bool, alignment: str, expected: str
) -> None:
    matrix = specs.specs("sm_80")
    chosen = choose(matrix, "f16", (head_dim, head_dim), band, "none", ALIGNMENTS[alignment])
    assert chosen is not None
    assert chosen.name == f"attention_forward.portable.f16.{expected}"


def test_hopper_goes_first_where_tma_can() -> None:
    matrix = specs.specs("sm_90a")
    families = {
        alignment: choose(matrix, "bf16", (128, 128), True, "none", ALIGNMENTS[alignment]) for alignment in ALIGNMENTS
    }
    assert {alignment: spec.family for alignment, spec in families.items() if spec} == {
        "exact": "hopper",
        "aligned": "hopper",
        "unaligned": "portable",
    }


@pytest.mark.parametrize("arch", ARCHES)
def test_launches_are_complete(arch: str) -> None:
    for spec in specs.specs(arch):
        for launch in spec.launches:
            constant = {name for name, kind in launch.signature.items() if kind == "constexpr"}
            assert constant == launch.constexprs.keys(), spec.name
            assert launch.signature.keys() - constant == launch.values.keys(), spec.name
            assert launch.divisibility.keys() <= launch.values.keys(), spec.name


@pytest.mark.parametrize("arch", ARCHES)
def test_what_the_code_assumes_is_what_the_manifest_requires(arch: str) -> None:
    for spec in specs.specs(arch, "portable"):
        (launch,) = spec.launches
        for argument, multiple in launch.divisibility.items():
            value = launch.values[argument]
            if launch.signature[argument].startswith("*"):
                assert multiple == spec.requires.base_align
            elif ".stride." in value:
                assert multiple * 2 == spec.requires.stride_align
            else:
                assert value in ("head_dim_qk", "head_dim_v")
                assert multiple * 2 == spec.requires.head_dim_align


@pytest.mark.parametrize("arch", ARCHES)
def test_tiles_cover_what_they_answer(arch: str) -> None:
    for spec in specs.specs(arch):
        assert max(spec.when.head_dim_qk[1], spec.when.head_dim_v[1]) == spec.tile.head_dim
        assert spec.tile.head_dim in TILES
