"""Models of Hugging Face transformers, made from small configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashcore

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 101,
}
LLAMA = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 128}


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=101))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def mistral() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=6))


MODELS: dict[str, Callable[[], Any]] = {"bert": bert, "gpt2": gpt2, "llama": llama, "mistral": mistral}
PLACES = [("cpu", torch.float32), ("cuda", torch.float16)]


@pytest.fixture(params=PLACES, ids=lambda place: place[0])
def made(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """A model under an attention implementation, with the same weights every time."""
    device, dtype = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def make(name: str, implementation: str) -> Any:
        torch.manual_seed(0)
        model = MODELS[name]().eval().to(device, dtype)
        model.set_attn_implementation(implementation)
        return model

    return make


def tokens(model: Any, padded: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (3, 17), generator=generator)
    present = torch.ones_like(ids)
    if padded:
        for row, count in enumerate((5, 0, 11)):
            present[row, :count] = 0
    return {"input_ids": ids.to(model.device), "attention_mask": present.to(model.device)}


def tolerance(model: Any) -> dict[str, float]:
    return {"rtol": 2e-2, "atol": 2e-2} if model.dtype == torch.float16 else {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left padding"])
@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, padded: bool, made: Callable[[str, str], Any]) -> None:
    flashcore.register_transformers()
    theirs, ours = made(name, "sdpa"), made(name, "fcore")
    assert ours.config._attn_implementation == "fcore"
    inputs = tokens(theirs, padded)
    with torch.no_grad():
        wanted = theirs(**inputs).logits
        found = ours(**inputs).logits
    plan = flashcore.last_plan()
    assert plan is not None
    assert plan.device.startswith(theirs.device.type)
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[shown], wanted[shown], **tolerance(theirs))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left padding"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_decoding_with_a_cache(name: str, padded: bool, made: Callable[[str, str], Any]) -> None:
    """Greedy tokens, and the scores they were chosen by."""
    flashcore.register_transformers()
    theirs, ours = made(name, "sdpa"), made(name, "fcore")
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    inputs = tokens(theirs, padded)
    wanted = theirs.generate(**inputs, **options, pad_token_id=0)
    found = ours.generate(**inputs, **options, pad_token_id=0)
    if theirs.dtype == torch.float32:
        assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.scores[0], wanted.scores[0], **tolerance(theirs))


@pytest.mark.parametrize("name", MODELS)
def test_models_through_the_override(name: str, made: Callable[[str, str], Any]) -> None:
    model = made(name, "sdpa")
    inputs = tokens(model, True)
    shown = inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**inputs).logits
        with flashcore.sdpa_override((model.device.type,)):
            found = model(**inputs).logits
    torch.testing.assert_close(found[shown], wanted[shown], **tolerance(model))


def test_what_fcore_refuses() -> None:
    with pytest.raises(flashcore.InvalidArgumentError, match="name: given 'flashcore', which has \"flash\" in it"):
        flashcore.register_transformers("flashcore")
    x = torch.randn(1, 2, 5, 8)
    with pytest.raises(flashcore.UnsupportedError, match="softcap: the model asks for it"):
        flashcore.hf.forward(torch.nn.Module(), x, x, x, None, softcap=30.0)
