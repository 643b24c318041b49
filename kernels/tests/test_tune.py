"""From times to rules, and from rules to variants."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from kernels import bundle, compile, specs, tune
from kernels.specs import HopperShape

SHORT = HopperShape(128, 3)
LONG = HopperShape(128, 3, consumers=3)
THIRD = HopperShape(128, 3, held=64)
LENGTHS = (128, 256, 512, 1024)


def rows(times: dict[HopperShape, tuple[float, ...]], head_dim: int = 64, band: bool = False) -> list[dict[str, Any]]:
    return [
        {"head_dim": head_dim, "band": band, "seq_len": length, "shape": dataclasses.asdict(shape), "ms": ms}
        for shape, measured in times.items()
        for length, ms in zip(LENGTHS, measured, strict=False)
    ]


def rule(shape: HopperShape, *seq_len_q: int, head_dim: int = 64, band: bool = False) -> dict[str, Any]:
    limits = {"seq_len_q": list(seq_len_q)} if seq_len_q else {}
    return {"head_dim": head_dim, "band": band, "shape": dataclasses.asdict(shape), "limits": limits}


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({SHORT: (1, 2, 3, 4)}, [rule(SHORT)]),
        ({SHORT: (2, 3, 4, 5), LONG: (1, 2, 3, 4)}, [rule(LONG)]),
        ({SHORT: (1, 1, 1, 1), LONG: (1, 1, 1, 1)}, [rule(SHORT)]),
        ({SHORT: (1, 1, 9, 9), LONG: (2, 2, 8, 8)}, [rule(SHORT, 1, 511), rule(LONG, 512, 1 << 30)]),
        ({LONG: (2, 2, 2, 8), SHORT: (1, 1, 1, 9)}, [rule(SHORT, 1, 1023), rule(LONG, 1024, 1 << 30)]),
        # Twice as fast twice outweighs half as fast once, however long that one takes.
        ({SHORT: (1, 100, 1), LONG: (2, 51, 2)}, [rule(SHORT)]),
        # Best at every other length, but there is one switch.
        ({SHORT: (1, 2, 1, 4), LONG: (4, 1, 4, 1)}, [rule(SHORT, 1, 1023), rule(LONG, 1024, 1 << 30)]),
        # Never far from the best and never the best.
        (
            {SHORT: (1, 1, 2, 2), THIRD: (1.5, 1.5, 1.5, 1.5), LONG: (2, 2, 1, 1)},
            [rule(SHORT, 1, 511), rule(LONG, 512, 1 << 30)],
        ),
        # Not measured everywhere.
        ({SHORT: (2, 2, 2, 2), THIRD: (1, 1)}, [rule(SHORT)]),
    ],
)
def test_rules_from_times(times: dict[HopperShape, tuple[float, ...]], expected: list[dict[str, Any]]) -> None:
    assert tune.derive(rows(times)) == expected


def test_no_schedule_is_better() -> None:
    times = {SHORT: (1.0, 2.5, 2.0, 3.1), LONG: (1.1, 2.0, 2.2, 3.0), THIRD: (1.2, 2.2, 1.8, 3.5)}
    chosen = tune.derive(rows(times))
    by_length = [
        next(HopperShape(**r["shape"]) for r in chosen if r["limits"]["seq_len_q"][1] >= length) for length in LENGTHS
    ]
    cost = math.prod(times[shape][i] for i, shape in enumerate(by_length))
    for a in times:
        for b in times:
            for at in range(len(LENGTHS) + 1):
                other = [a] * at + [b] * (len(LENGTHS) - at)
                assert cost <= math.prod(times[shape][i] for i, shape in enumerate(other)) * (1 + 1e-12)


def test_every_head_dim_and_band_has_rules_of_its_own() -> None:
    measured = rows({SHORT: (1, 1), LONG: (2, 2)}, 128, True) + rows({SHORT: (2, 2), LONG: (1, 1)}, 64)
    assert tune.derive(measured) == [rule(LONG), rule(SHORT, head_dim=128, band=True)]


def test_rules_are_derived_again_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    document = {"schema": tune.SCHEMA, "arch": "sm_90a", "rows": rows({SHORT: (1, 4), LONG: (2, 2)}), "rules": ["old"]}
    file.write_text(json.dumps(document))
    assert tune.rules(Namespace(file=file)) == 0
    found = json.loads(file.read_text())
    assert found == document | {"rules": [rule(SHORT, 1, 255), rule(LONG, 256, 1 << 30)]}


def hopper(monkeypatch: pytest.MonkeyPatch, path: Path, rules: list[dict[str, Any]]) -> list[specs.Spec]:
    path.write_text(json.dumps({"rules": rules}))
    monkeypatch.setattr(specs, "TUNING", path)
    return [spec for spec in specs.specs("sm_90a", "hopper") if spec.tile.head_dim == 64 and spec.max_key_splits == 1]


def test_variants_from_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dense = [rule(SHORT, 1, 255), rule(LONG, 256, 1 << 30)]
    matrix = hopper(monkeypatch, tmp_path / "rules.json", [*dense, rule(LONG, band=True)])
    named = {spec.name.removeprefix("attention_forward.hopper."): spec for spec in matrix}
    assert named.keys() == {
        f"{dtype}.d64.{kind}" for dtype in specs.ELEMENT for kind in ("dense.q128", "dense.q192", "band")
    }
    # The first answers what no other does; a later one also needs enough tiles.
    assert named["bf16.d64.dense.q128"].when.limits == {}
    assert named["f16.d64.dense.q192"].when.limits == {"seq_len_q": (256, 1 << 30), "num_tiles": (330, 1 << 30)}
    assert named["f16.d64.dense.q192"].priority > named["f16.d64.dense.q128"].priority
    assert named["f16.d64.dense.q192"].tile.query == 192
    assert named["f16.d64.band"].when.limits == {}
    assert named["f16.d64.band"].launches[0].constexprs["CONSUMERS"] == 3


def test_builds_with_as_many_rows_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    matrix = hopper(monkeypatch, tmp_path / "rules.json", [rule(SHORT, 1, 255), rule(THIRD, 256, 1 << 30)])
    names = {spec.name.rpartition(".")[2] for spec in matrix if not spec.when.band}
    assert names == {SHORT.slug, THIRD.slug} == {"key128-stages3", "key128-stages3-held64"}


def test_without_measurements_the_table_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(specs, "TUNING", tmp_path / "missing.json")
    whole = [spec for spec in specs.specs("sm_90a", "hopper") if spec.max_key_splits == 1]
    assert [spec.when.limits for spec in whole] == [{}] * len(whole)
    assert {spec.name.rpartition(".")[2] for spec in whole} == {"dense", "band"}


def test_candidates_have_bundles_and_variants_of_their_own(tmp_path: Path) -> None:
    paths = [tune.bundle_path(tmp_path, *candidate) for candidate in tune.candidates()]
    names = [spec.name for candidate in tune.candidates() for spec in tune.candidate_specs(*candidate)]
    assert len(set(paths)) == len(paths)
    assert len(set(names)) == len(names)


def test_nobody_needs_the_compiler_to_measure() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('triton', 'zstandard', 'torch', 'flashcore')))"
    code = f"{blocked}; from kernels import tune; sys.argv = ['tune', 'measure', '--help']; tune.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--rounds" in done.stdout


def manifest(**when: Any) -> dict[str, Any]:
    spec = specs.hopper("bf16", 64, False, SHORT, limits={"seq_len_q": (1, 255)})
    entry = compile.variant_entry(spec, [])
    entry["when"] |= when
    compiler = {"triton": "", "ptxas": ""}
    return {"schema": bundle.SCHEMA, "arch": "sm_90a", "compiler": compiler, "variants": [entry]}


def test_limits_are_in_the_manifest() -> None:
    found = manifest()
    bundle.validate(found)
    assert found["variants"][0]["when"]["limits"] == {"seq_len_q": [1, 255]}
    assert found["variants"][0]["max_key_splits"] == 1
    for name in bundle.LIMITED:
        bundle.validate(manifest(limits={name: [0, 0]}))
    bundle.validate(manifest(limits={}))


@pytest.mark.parametrize(
    "limits",
    [
        None,
        [],
        {"seq_len": [1, 2]},
        {"key_splits": [1, 2]},
        {"seq_len_q": [2, 1]},
        {"seq_len_q": [-1, 2]},
        {"seq_len_q": [1]},
        {"seq_len_q": [1, 2, 3]},
        {"seq_len_q": [1, 2.0]},
        {"seq_len_q": [False, 2]},
        {"seq_len_q": 1},
    ],
)
def test_bad_limits_are_refused(limits: object) -> None:
    with pytest.raises(bundle.BundleError, match=r"when\.limits"):
        bundle.validate(manifest(limits=limits))


@pytest.mark.parametrize("splits", [0, -1, True, 1.0, None])
def test_bad_splits_are_refused(splits: object) -> None:
    broken = manifest()
    broken["variants"][0]["max_key_splits"] = splits
    with pytest.raises(bundle.BundleError, match="max_key_splits"):
        bundle.validate(broken)
