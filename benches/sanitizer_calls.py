"""Attention calls for compute-sanitizer to watch: every tensor an allocation of its own, outputs never filled before.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool TOOL python benches/sanitizer_calls.py [BUNDLE]

A kernel that touches a byte beyond a tensor, or reads an output before writing it, is reported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import flashcore

# (dtype, batch, query heads, key heads, query rows, key rows, head_dim, options)
CALLS: tuple[tuple[str, int, int, int, int, int, int, dict[str, Any]], ...] = (
    ("float16", 1, 2, 2, 300, 300, 64, {}),
    ("float16", 2, 4, 1, 300, 517, 64, {"is_causal": True}),
    ("float16", 1, 2, 2, 65, 129, 64, {"window": (40, 0)}),
    ("bfloat16", 1, 2, 1, 129, 200, 128, {"is_causal": True, "causal_align": "bottom_right"}),
    ("bfloat16", 1, 1, 1, 77, 300, 256, {}),
    ("float16", 1, 2, 2, 100, 100, 111, {"is_causal": True}),
    ("float16", 1, 2, 2, 33, 70, 40, {"attn_mask": True}),
    ("bfloat16", 1, 2, 2, 1, 0, 64, {}),
)


def main(bundle: Path | None) -> None:
    runtime = flashcore.Runtime("cuda:0", bundle=bundle.read_bytes()) if bundle else flashcore.Runtime("cuda:0")
    for name, batch, heads, heads_kv, rows, keys, head_dim, options in CALLS:
        dtype = getattr(torch, name)
        query = torch.randn(batch, heads, rows, head_dim, device="cuda").to(dtype)
        key, value = (torch.randn(batch, heads_kv, keys, head_dim, device="cuda").to(dtype) for _ in range(2))
        if options.get("attn_mask"):
            options = {"attn_mask": torch.rand(rows, keys, device="cuda") > 0.3}
        try:
            plan = runtime.plan(query, key, value, enable_gqa=heads != heads_kv, return_lse=True, **options)
        except flashcore.UnsupportedError:
            if bundle is None:
                raise
            continue  # a bundle with a planted fault holds few kernels
        plan.launch()
        torch.cuda.synchronize()
        print(plan.kernel, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
