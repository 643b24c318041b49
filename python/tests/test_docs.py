"""The snippets of the documentation run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import flashcore

PAGE = Path(__file__).parents[2] / "docs" / "pytorch.md"


def test_the_page_on_pytorch() -> None:
    pytest.importorskip("transformers", reason="one snippet needs transformers")
    text = PAGE.read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippets) >= 9
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"snippet {number} of {PAGE.name}", "exec"), names)
    assert flashcore.sdpa_enabled() == ()
    assert isinstance(names["out"], torch.Tensor)


def test_the_page_lists_the_symbols() -> None:
    """Those that are looked up, and no others."""
    text = PAGE.read_text()
    section = text[text.index("## What is used of libtorch") :].partition("Where they are there")[0]
    assert re.findall(r"`(\w+)`", section)[1:] == flashcore._core.torch_symbols()
