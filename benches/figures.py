"""Draws docs/figures/ from `evidence/h100/`: `python benches/figures.py`. Needs matplotlib."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "flashcore": "FlashCore",
    "fa3": "FA3",
    "fa4": "FA4",
    "cudnn": "cuDNN",
    "fa2": "FA2",
    "flex": "FlexAttention",
    "portable": "portable Triton",
}

Rows = list[dict[str, Any]]


def lines(axis: Any, rows: Rows, x: str, y: str) -> None:
    for name, label in NAMES.items():
        points = sorted((row["case"][x], row[y]) for row in rows if row["impl"] == name and y in row)
        if points:
            width = 2.5 if name == "flashcore" else 1.2
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=width, label=label)


def throughput(rows: Rows) -> None:
    """TFLOP/s against the sequence length, a panel for each head_dim and mask."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), sharex=True)
    for column, head_dim in enumerate((64, 128, 256)):
        for line, mask in enumerate(("dense", "causal")):
            axis = axes[line][column]
            # The GPT-3 row has another number of tokens than its neighbours.
            panel = [row for row in rows if (row["case"]["D"], row["case"]["mask"]) == (head_dim, mask)]
            lines(axis, [row for row in panel if row["case"]["Hq"] != 96], "Sq", "tflops")
            axis.set_xscale("log", base=2)
            axis.set_title(f"head_dim {head_dim}, {mask}", fontsize=10)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("TFLOP/s")
    axes[1][0].set_ylabel("TFLOP/s")
    for axis in axes[1]:
        axis.set_xlabel("sequence length")
    axes[0][0].legend(fontsize=8)
    save(figure, "forward-throughput")


def heads(rows: Rows) -> None:
    """Microseconds of a head against the number of heads."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for axis, mask in zip(axes, ("dense", "causal"), strict=True):
        of_mask = [row | {"us": row["ms"] * 1e3 / row["case"]["Hq"]} for row in rows if row["case"]["mask"] == mask]
        lines(axis, of_mask, "Hq", "us")
        axis.set_title(f"S 2048, head_dim 128, {mask}", fontsize=10)
        axis.set_xlabel("heads")
        axis.set_ylabel("us per head")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save(figure, "forward-heads")


# Ways to make a call, and in which mode, from the one with the least around the launch on.
WAYS = {
    ("raw", "rust"): "the launch alone",
    ("prepared", "rust"): "Rust, prepared",
    ("first_seen", "rust"): "Rust, first-seen pointers",
    ("cuLaunchKernelEx, ctypes", "inference"): "ctypes",
    ("flashcore.attention, out", "inference"): "flashcore.attention(out=)",
    ("flashcore.attention", "inference"): "flashcore.attention",
    ("torch.ops.flashcore.attention", "inference"): "torch.ops.flashcore",
    ("SDPA", "inference"): "SDPA",
    ("Triton CompiledKernel", "inference"): "Triton CompiledKernel",
    ("Triton JIT", "inference"): "Triton JIT",
    ("FA4", "inference"): "FA4",
}


def overhead(rows: Rows) -> None:
    """Microseconds of the host for one call, by the way it is made."""
    found = {(row["name"], row["mode"]): row["median_ns"] / 1e3 for row in rows if "median_ns" in row}
    bars = [(label, found[way]) for way, label in WAYS.items() if way in found]
    figure, axis = plt.subplots(figsize=(7, 3.5))
    colours = [
        "tab:blue" if label[0] != "S" and "Triton" not in label and label != "FA4" else "0.6" for label, _ in bars
    ]
    placed = axis.barh([label for label, _ in bars], [value for _, value in bars], color=colours)
    axis.bar_label(placed, fmt="%.1f", fontsize=8, padding=2)
    axis.invert_yaxis()
    axis.set_xlabel("host us a call")
    axis.set_xscale("log")
    save(figure, "overhead")


def save(figure: Any, name: str) -> None:
    folder = ROOT / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    # No date in the file: the same evidence gives the same bytes.
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "flashcore"
    rows = json.loads((ROOT / "evidence/h100/forward.json").read_text())["rows"]
    measured = [row for row in rows if "ms" in row]
    throughput([row for row in measured if row["set"] == "forward"])
    heads([row for row in measured if row["set"] == "heads"])
    costs = ROOT / "evidence/h100/overhead.json"
    if costs.exists():
        overhead([row for row in json.loads(costs.read_text())["rows"] if row["kind"] == "path"])


if __name__ == "__main__":
    main()
