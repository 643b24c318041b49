"""The cross-check agrees with what Rust wrote, and notices whatever is changed in it.

`data/` is written by `flashcore-rs/tests/crosscheck.rs`, which also proves that it is up to date.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benches import crosscheck

DATA = Path(__file__).parent / "data"
CHECKED = ("stats", "timer", "comparison", "judged")


@pytest.fixture
def document() -> dict[str, Any]:
    return json.loads((DATA / "crosscheck.json").read_text())


def test_rust_and_scipy_agree(document: dict[str, Any]) -> None:
    assert crosscheck.check(document, DATA) == []


def test_the_document_has_every_outcome(document: dict[str, Any]) -> None:
    judged = {row["judged"]["outcome"] for row in document["rows"] if row["kind"] == "compare"}
    assert judged == {"pass", "regression", "inconclusive"}
    stats = [row["stats"] for row in document["rows"] if row["kind"] == "measure"]
    assert any(row["changepoints"] for row in stats)
    intervals = [percentile["ci"] for row in stats for percentile in row["percentiles"]]
    assert any(intervals) and not all(intervals)
    assert {row["timer"]["quantum_ns"] is None for row in document["rows"] if row["kind"] == "measure"} == {True, False}


def leaves(value: Any) -> Iterator[Callable[[], None]]:
    """For every number, word or null below a value, what changes it; for an empty list, what fills it."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries):

        def put(changed: Any, key: Any = key) -> None:
            value[key] = changed

        if isinstance(inner, dict) or (isinstance(inner, list) and inner):
            yield from leaves(inner)
        elif isinstance(inner, list):
            yield lambda put=put: put([1])
        elif isinstance(inner, int):
            yield lambda put=put, inner=inner: put(inner + 1)
        elif isinstance(inner, float):
            yield lambda put=put, inner=inner: put(inner * (1 + 1e-8) if inner else 1e-8)
        else:
            yield lambda put=put: put("something else")


def test_every_changed_field_is_noticed(document: dict[str, Any]) -> None:
    changes = [change for row in document["rows"] for part in CHECKED if part in row for change in leaves(row[part])]
    for change in changes:
        change()
    wrong = crosscheck.check(document, DATA)
    assert len(changes) > 400
    assert len(wrong) == len(changes)


def test_a_single_change_is_named(document: dict[str, Any]) -> None:
    document["rows"][-1]["judged"]["p_holm"] *= 1 - 1e-8
    (line,) = crosscheck.check(document, DATA)
    assert line.startswith("compare[1,call].judged.p_holm: ")


@pytest.mark.parametrize("part", CHECKED)
def test_a_missing_field_is_noticed(document: dict[str, Any], part: str) -> None:
    row = next(row for row in document["rows"] if part in row)
    missing = row[part].popitem()[0]
    (line,) = crosscheck.check(document, DATA)
    assert f".{part}.{missing}: " in line


def test_a_missing_row_is_noticed(document: dict[str, Any]) -> None:
    whole = copy.deepcopy(document)
    for i in range(len(whole["rows"])):
        document["rows"] = whole["rows"][:i] + whole["rows"][i + 1 :]
        assert any("only" in line for line in crosscheck.check(document, DATA))


def rewrite(document: dict[str, Any], folder: Path, old: str, new: str) -> None:
    """Puts a document's raw samples into a folder with one text replaced, and the right hash."""
    text = gzip.decompress((DATA / document["raw"]["path"]).read_bytes()).decode()
    assert old in text
    content = gzip.compress(text.replace(old, new, 1).encode())
    (folder / document["raw"]["path"]).write_bytes(content)
    document["raw"]["sha256"] = hashlib.sha256(content).hexdigest()


def test_changed_samples_are_noticed(document: dict[str, Any], tmp_path: Path) -> None:
    rewrite(document, tmp_path, "0,cold,0,0,0,1,", "0,cold,0,0,0,1,9")
    assert any(line.startswith("measure[0,cold,1].stats.mean") for line in crosscheck.check(document, tmp_path))


def test_another_raw_file_is_noticed(document: dict[str, Any], tmp_path: Path) -> None:
    digest = document["raw"]["sha256"]
    rewrite(document, tmp_path, "0,cold", "0,cold")
    document["raw"]["sha256"] = digest[::-1]
    assert crosscheck.check(document, tmp_path) == ["raw.sha256: the raw file is another one"]


def test_samples_of_a_slow_clock_count_without_the_rule(document: dict[str, Any]) -> None:
    document["protocol"]["min_sm_share"] = None
    assert any(line.startswith("measure[0,cold,0].stats.samples") for line in crosscheck.check(document, DATA))


def test_the_exit_code(tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    rewrite(document, tmp_path, "0,cold", "0,cold")
    path.write_text(json.dumps(document))
    assert crosscheck.main([str(path)]) == 0
    document["rows"][0]["stats"]["median"] += 1
    path.write_text(json.dumps(document))
    assert crosscheck.main([str(path)]) == 1
    assert "measure[0,cold,0].stats.median" in capsys.readouterr().out


def test_the_segmentation_finds_planted_levels() -> None:
    rng = np.random.default_rng(0)
    levels = np.repeat([0.0, 10.0, 4.0], 50) + rng.normal(size=150)
    assert crosscheck.segmentation(levels, 15.0)[1] == pytest.approx([50, 100], abs=2)
