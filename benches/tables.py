"""Writes the tables of README.md and docs/ from evidence/: `python benches/tables.py [--check]`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. With `--check` nothing is written, and a table that is
not what the evidence gives is an error.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)

Rows = list[dict[str, Any]]


def evidence(path: str) -> dict[str, Any] | None:
    file = ROOT / "evidence" / path
    if not file.exists():
        return None
    document: dict[str, Any] = json.loads(
        gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    )
    return document


def rows(document: dict[str, Any], kind: str) -> Rows:
    return [row for row in document["rows"] if row["kind"] == kind]


def markdown(header: list[str], body: Iterable[list[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in body]
    return "\n".join(lines)


def geomean(values: Iterable[float]) -> str:
    logs = [math.log(value) for value in values if value > 0 and math.isfinite(value)]
    return f"{math.exp(sum(logs) / len(logs)):.2f}" if logs else "-"


def source(document: dict[str, Any], path: str) -> str:
    gpu = document["env"].get("gpu") or {}
    card = gpu.get("name", "CPU") if isinstance(gpu, dict) else gpu
    return f"\n\nFrom `evidence/{path}`: {card}, commit `{document['commit'][:12]}`."


Table = Callable[[], str]


def of(path: str) -> Callable[[Callable[[dict[str, Any]], str | None]], Table]:
    """A table made of one evidence file, which it names; of a missing file, or of None, it says "Not measured yet."."""

    def decorate(make: Callable[[dict[str, Any]], str | None]) -> Table:
        def table() -> str:
            document = evidence(path)
            made = make(document) if document is not None else None
            return "Not measured yet." if document is None or made is None else made + source(document, path)

        return table

    return decorate


def correctness(document: dict[str, Any]) -> str:
    cases = rows(document, "correct")
    families = list(dict.fromkeys(row["case"]["family"] for row in cases))
    body = [_family(name, [row for row in cases if row["case"]["family"] == name]) for name in families]
    body.append(_family("**all**", cases))
    if pinned := rows(document, "variant"):
        body.append(_family("pinned to each variant that can compute them", pinned))
    repeats = rows(document, "repeat")
    runs = ", ".join(sorted({str(row["repeats"]) for row in repeats}))
    same = sum(row["irreproducible"] == 0 for row in repeats)
    header = ["family", "problems", "pass", "largest error / bound", "geomean e / e_ref", "largest LSE error / bound"]
    tail = f"\n\n{same} of {len(repeats)} sampled problems gave the same bits in every one of {runs} runs."
    return markdown(header, body) + tail


@of("h100/correctness.json.gz")
def properties(document: dict[str, Any]) -> str:
    found = rows(document, "property")
    body = []
    for name in dict.fromkeys(row["property"] for row in found):
        of_name = [row for row in found if row["property"] == name]
        # A bound of 0, where both results must be 0, leaves no share.
        shares = [row["error"] / row["bound"] for row in of_name if row["bound"]]
        bits = [row["bitwise"] for row in of_name if row["bitwise"] is not None]
        same = f"{sum(bits)} of {len(bits)}" if bits else "-"
        passed = sum(row["pass"] for row in of_name)
        body.append([name.replace("_", " "), len(of_name), passed, f"{max(shares, default=0):.2f}", same])
    return markdown(["property", "problems", "pass", "largest difference / bound", "same bits"], body)


SELFTEST = "selftest.json"


@of(SELFTEST)
def calibration(document: dict[str, Any]) -> str:
    header = ["what", "slowdown", "suites", "rate", "95 %", "must be", "met"]
    body = [
        [
            row["question"].replace("_", " "),
            f"{row['planted'] * 100:.1f} %",
            row["trials"],
            f"{row['rate']:.4f}",
            f"{row['ci95']['low']:.4f} to {row['ci95']['high']:.4f}",
            " ".join(f"{k.replace('_', ' ')} {v}" for k, v in row["bound"].items()) if row["bound"] != "none" else "-",
            "yes" if row["met"] else "no",
        ]
        for row in rows(document, "calibration")
    ]
    return markdown(header, body)


@of(SELFTEST)
def mutants(document: dict[str, Any]) -> str:
    found = rows(document, "mutant")
    body = []
    for device in dict.fromkeys(row["device"] for row in found):
        here = [row for row in found if row["device"] == device]
        body.append([device, len(here), sum(row["killed"] for row in here)])
    by = [
        [row["device"], row["description"], row["case"] or "**lives**"]
        for row in sorted(found, key=lambda row: row["device"])
    ]
    details = f"<details><summary>Each of them</summary>\n\n{markdown(['on', 'wrong', 'killed by'], by)}\n\n</details>"
    return markdown(["on", "wrong kernels", "killed"], body) + f"\n\n{details}"


@of(SELFTEST)
def planted(document: dict[str, Any]) -> str:
    header = ["candidate", "expected", "ratios", "regression", "inconclusive", "pass", "as expected"]
    body = [
        [
            row["candidate"],
            row["expected"],
            f"{min(row['ratios']):.3f} to {max(row['ratios']):.3f}",
            row["regressions"],
            row["inconclusive"],
            row["passes"],
            "yes" if row["pass"] else "no",
        ]
        for row in rows(document, "planted")
    ]
    return markdown(header, body)


def campaign(mode: str) -> Table:
    """The nine configurations beside SDPA, from the campaign's samples."""

    @of("h100/expert-validation/sdpa.json")
    def table(document: dict[str, Any]) -> str:
        header = ["S, B", "SDPA us", "FlashCore us", "p99 SDPA / FlashCore", "FlashCore / SDPA", "95 %", "samples each"]
        body = []
        for row in (row for row in rows(document, "compare") if row["mode"] == mode):
            of_case = [
                other
                for other in rows(document, "measure")
                if (other["case_index"], other["mode"]) == (row["case_index"], mode)
            ]
            theirs, ours = (next(other for other in of_case if other["arm"] == arm) for arm in (0, 1))
            tails = (_percentile(other["stats"], 0.99) for other in (theirs, ours))
            ratio, interval = row["comparison"]["ratio"], row["comparison"]["ci95"]
            body.append(
                [
                    f"{ours['case']['seq_len_q']}, {ours['case']['batch']}",
                    f"{theirs['stats']['median'] / 1e3:.2f}",
                    f"{ours['stats']['median'] / 1e3:.2f}",
                    " / ".join(tails),
                    f"{ratio:.3f}",
                    f"{interval['low']:.3f} to {interval['high']:.3f}",
                    ours["stats"]["samples"],
                ]
            )
        ratios = geomean(row["comparison"]["ratio"] for row in rows(document, "compare") if row["mode"] == mode)
        return markdown(header, body) + f"\n\nGeometric mean of the ratios: {ratios}."

    return table


def _percentile(stats: dict[str, Any], p: float) -> str:
    """A percentile that enough effective samples lie beyond."""
    found = next(x for x in stats["percentiles"] if x["p"] == p)
    return f"{found['ns'] / 1e3:.1f}" if found["ci"] else "-"


def _family(name: str, cases: Rows) -> list[object]:
    share = [row["e"] / row["bound"] for row in cases if row.get("bound")]
    lse = [row["lse"]["ratio"] for row in cases if row.get("lse")]
    return [
        name,
        len(cases),
        sum(row["correct"] for row in cases),
        f"{max(share, default=0):.2f}",
        # Problems whose scores saturate have references without error; a ratio to nothing says nothing.
        geomean(row["ratio"] for row in cases if row.get("e_ref", 0) > 1e-6),
        f"{max(lse, default=0):.2f}",
    ]


@of("h200/first-light.json")
def configurations(document: dict[str, Any]) -> str | None:
    measured = rows(document, "configuration")
    if not measured:
        return None
    header = [
        "S, B",
        "FlashCore call / device",
        "SDPA call / device",
        "call, times faster",
        "best other device",
        "floor",
    ]
    tail = """

Microseconds, 8 heads, head_dim 64, fp16, dense; medians of interleaved rounds in one process. call: an event pair
around one call with an empty queue; device: one of 50 launches in a CUDA graph; best other: the fastest SDPA backend;
floor: the bytes or operations at the card's measured ceilings."""
    return markdown(header, map(_configuration, measured)) + tail


def _configuration(row: dict[str, Any]) -> list[object]:
    def median(arm: str, figure: str) -> float:
        return float(row["arms"][arm][figure]["median"])

    best = min(median(arm, "device_us") for arm in row["arms"] if arm != "flashcore")
    return [
        f"{row['seq_len']}, {row['batch']}",
        f"{median('flashcore', 'call_us'):.1f} / {median('flashcore', 'device_us'):.1f}",
        f"{median('sdpa', 'call_us'):.1f} / {median('sdpa', 'device_us'):.1f}",
        f"{row['speedup_over_sdpa_call']:.2f}",
        f"{best:.1f}",
        f"{row['floor_us']:.1f}" if row["floor_us"] else "-",
    ]


@of("h200/first-light-ptx.json")
def ptx(document: dict[str, Any]) -> str:
    cases = rows(document, "correct")
    passed = sum(row["correct"] for row in cases)
    return f"The PTX meant for GPUs that nobody built for, forced: {passed} of {len(cases)} problems pass."


@of("h200/sanitizer.json")
def sanitizer(document: dict[str, Any]) -> str:
    header = ["tool", "run", "errors", "as expected", "first finding"]
    body = [
        [
            row["tool"],
            f"planted fault: {row['subject']}" if row["kind"] == "planted" else f"shipped kernels: {row['subject']}",
            row["errors"],
            "yes" if row["ok"] else "NO",
            row["first_finding"] or "",
        ]
        for row in document["rows"]
    ]
    return markdown(header, body)


def host(kind: str, header: list[str], fields: list[str]) -> Table:
    """A table of `evidence/reliability.json`, which is about the host and needs no GPU."""

    @of("reliability.json")
    def table(document: dict[str, Any]) -> str:
        body = [[f"{row[f]:,}" if isinstance(row[f], int) else row[f] for f in fields] for row in rows(document, kind)]
        return markdown(header, body)

    return table


@of("leaks.json")
def leaks(document: dict[str, Any]) -> str:
    body: list[list[object]] = [
        [row["subject"], f"{row['calls']:,}", f"{row['raised']:,}", row["growth_kib"]] for row in document["rows"]
    ]
    return markdown(["calls of", "how many", "raised", "memory left behind, KiB"], body)


NCU = {
    "SM Busy": "tensor pipe busy, %",
    "Issue Slots Busy": "issue slots busy, %",
    "L2 Cache Throughput": "L2 throughput, %",
    "DRAM Throughput": "DRAM throughput, %",
    "Achieved Occupancy": "occupancy, %",
    "Executed Instructions": "instructions",
    "Duration": "nanoseconds",
}


def ncu(case: str) -> Table:
    """What Nsight Compute says about one launch of each implementation on one case."""

    @of("h100/ncu-forward.json")
    def table(document: dict[str, Any]) -> str:
        measured = [row for row in document["rows"] if row["case"] == case]
        header = [case, *(row["impl"] for row in measured)]
        body = [[label, *(row["metrics"].get(name, "-") for row in measured)] for name, label in NCU.items()]
        mixes = list(dict.fromkeys(name for row in measured for name in row["instructions"]))
        body += [[f"{name} per million", *(row["instructions"].get(name, "-") for row in measured)] for name in mixes]
        reasons = [name for name in measured[0]["stalls"] if any(row["stalls"].get(name, 0) >= 1 for row in measured)]
        body += [[f"stall: {name}, %", *(row["stalls"].get(name, "-") for row in measured)] for name in reasons]
        return markdown(header, body)

    return table


@of("h100/forward-correctness.json")
def matrix(document: dict[str, Any]) -> str:
    header = [
        "what ran",
        "problems",
        "pass",
        "largest error / bound",
        "largest LSE error / bound",
        "run again, not the same bits",
    ]
    body = [
        [
            row["run"],
            row["problems"],
            row["passed"],
            f"{row['worst_error_over_bound']:.2f}",
            f"{row['worst_lse_over_bound']:.2f}",
            f"{row['irreproducible']} of {row['repeated']}",
        ]
        for row in rows(document, "matrix")
    ]
    return markdown(header, body)


HEAD_DIMS, MASKS = (64, 128, 256), ("dense", "causal")
# What changed; the exploratory run, and its arms that had it not and had it; where the arms differ in nothing else.
Trial = tuple[str, int, str, str, tuple[int, ...], tuple[str, ...]]
FIRST_TRIALS: list[Trial] = [
    ("Wait for P V before the maxima, not after the exponentials", 1, "flashcore", "noedge", HEAD_DIMS, MASKS),
    ("No turns between two warpgroups, first version", 1, "flashcore", "nopp", HEAD_DIMS, MASKS),
    ("Waits through inline assembly", 1, "flashcore", "asmwait", HEAD_DIMS, MASKS),
    ("Dense: a CTA for each tile; causal: round-robin instead", 1, "flashcore", "flip", HEAD_DIMS, MASKS),
    ("All of the query in registers, first version", 2, "flashcore", "qreg", (64, 128), MASKS),
    ("Three warpgroups, first version", 2, "flashcore", "x3", (64,), MASKS),
    ("Heads in sections of 16, longest tile first", 2, "flashcore", "lpt16", HEAD_DIMS, ("causal",)),
    ("Wait after the maxima; loops by edges; pairs of tiles", 3, "flashcore", "mid", HEAD_DIMS, MASKS),
    ("Tiles overlap, one query", 4, "mid", "flat", (64, 128), MASKS),
    ("Tiles overlap, two queries", 5, "mid", "flat", (64, 128), MASKS),
    ("Half of the query in registers", 6, "mid", "midh", (256,), MASKS),
    ("Half of the query in registers", 6, "mid", "midhh", (128,), MASKS),
    ("Wait for the values in use", 7, "edge1", "base", HEAD_DIMS, MASKS),
    ("Tiles overlap, loads in its order", 8, "base", "b", (128,), MASKS),
    ("No turns between two warpgroups, second version", 9, "base", "basenp2", HEAD_DIMS, MASKS),
    ("All of the query in registers, tiles do not overlap", 11, "a", "ah", (64,), ("causal",)),
]
SECOND_TRIALS: list[Trial] = [
    ("Divisions by multiplication, early factor, 4 stages at 64", 1, "base", "a4", (64, 128), MASKS),
    ("Tiles overlap, the query in registers", 1, "a4", "c1", (64, 128), MASKS),
    ("At 256 half of the output at a time", 1, "c1", "d1", (256,), MASKS),
    ("At 256 an early factor", 1, "d1", "d2", (256,), MASKS),
    ("Tiles overlap without turns there", 2, "f8", "f9", (64, 128), MASKS),
    ("Tiles do not overlap", 2, "f8", "f10", (64, 128), MASKS),
    ("First block by halves, next place early", 3, "f10", "g1", (64, 128), ("causal",)),
    ("First block by halves", 3, "g2", "g1", (64, 128), ("causal",)),
    ("First block by halves, second version", 6, "n2", "n1", (64, 128), ("causal",)),
    ("Early factor for the output", 3, "g3", "g1", (64, 128), MASKS),
    ("Half of the exponentials before the wait", 4, "h1", "h2", HEAD_DIMS, MASKS),
    ("Queries loaded a tile ahead", 5, "g1", "k2", (64, 128), MASKS),
    ("At 256 the first keys before the query", 5, "g1", "k2", (256,), MASKS),
    ("All that was kept", 7, "base", "z1", HEAD_DIMS, MASKS),
    ("One partition of 8 warps, so that consumers share code", 8, "z1", "w1", HEAD_DIMS, MASKS),
    ("The producer works a tile ahead", 9, "base", "ahead", (64, 128), MASKS),
    ("Half of the CTAs begin with the short tile of a pair", 9, "ahead", "phase", (64, 128), ("causal",)),
    ("Short heads leave less to the end", 9, "phase", "rest", (64, 128), ("causal",)),
]


def trials(path: str, what: list[Trial]) -> Table:
    """How many times faster each change made the kernel."""

    @of(path)
    def table(document: dict[str, Any]) -> str:
        columns = [(head_dim, mask) for head_dim in HEAD_DIMS for mask in MASKS]
        body: list[list[object]] = []
        for label, run, before, after, head_dims, masks in what:
            ms = {(row["impl"], json.dumps(row["case"])): row["ms"] for row in document["rows"] if row["run"] == run}
            gains = (
                _gain(ms, before, after, d, mask) if d in head_dims and mask in masks else "-" for d, mask in columns
            )
            body.append([label, *gains])
        return markdown(["change", *(f"{head_dim}, {mask}" for head_dim, mask in columns)], body)

    return table


def _gain(ms: dict[tuple[str, str], float], before: str, after: str, head_dim: int, mask: str) -> str:
    """How many times faster the second arm is than the first, over the cases of a head_dim and mask."""
    cases = {key: json.loads(key) for impl, key in ms if impl == after}
    wanted = [key for key, case in cases.items() if (case["D"], case["mask"]) == (head_dim, mask)]
    return geomean(ms[before, key] / ms[after, key] for key in wanted)


def trial(path: str, run: int, arms: list[str], peer: str) -> Table:
    """One exploratory run by case: how many times faster than the first arm the others are, and all than a peer."""

    @of(path)
    def table(document: dict[str, Any]) -> str:
        body: list[list[object]] = []
        for by_impl in _by_case([row for row in document["rows"] if row["run"] == run]).values():
            case, ms = by_impl[arms[0]]["case"], {impl: row["ms"] for impl, row in by_impl.items()}
            faster = (f"{ms[arms[0]] / ms[arm]:.3f}" for arm in arms[1:])
            beside = (f"{ms[peer] / ms[arm]:.2f}" for arm in arms)
            shape = f"{case['B']}, {case['Hq']}, {case['Sq']}, {case['D']}"
            body.append([shape, case["mask"], f"{ms[arms[0]] * 1e3:.1f}", *faster, *beside])
        names = [*arms[1:], *(f"{arm}, of {PEERS[peer]}" for arm in arms)]
        return markdown(["B, H, S, D", "mask", f"{arms[0]}, us", *names], body)

    return table


FORWARD = "h100/forward.json"
PEERS = {"cudnn": "cuDNN", "fa2": "FA2", "fa3": "FA3", "fa4": "FA4", "flex": "FlexAttention"}


def forward(name: str, unit: str) -> Table:
    """One set of cases of the forward's evidence: TFLOP/s, or microseconds, of everything that ran."""

    @of(FORWARD)
    def table(document: dict[str, Any]) -> str | None:
        cases = _by_case([row for row in document["rows"] if row["set"] == name])
        if not cases:
            return None
        names = {"flashcore": "FlashCore", **PEERS, "portable": "portable Triton"}
        shown = [impl for impl in names if any("ms" in rows.get(impl, {}) for rows in cases.values())]
        header = [
            "B, Hq/Hkv, Sq x Sk, D",
            "mask",
            *(names[impl] for impl in shown),
            "of the best",
            "of cuDNN (95 % low)",
        ]
        body = [_forward_row(rows, shown, unit) for rows in cases.values()]
        return markdown(header, body) + _forward_summary(cases) + _kept(document, name, names)

    return table


def _kept(document: dict[str, Any], name: str, names: dict[str, str]) -> str:
    """Which rows of a set are of an earlier commit."""
    of_set = [row for row in document["rows"] if row["set"] == name]
    kept = [row for row in of_set if "commit" in row]
    if not kept:
        return ""
    impls = {row["impl"] for row in kept}
    who = "Measured" if len(kept) == len(of_set) else f"{' and '.join(names[i] for i in names if i in impls)}: measured"
    return f" {who} earlier, at commit `{kept[0]['commit'][:12]}`."


def _by_case(found: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in found:
        cases.setdefault(json.dumps(row["case"]), {})[row["impl"]] = row
    return cases


def _forward_row(rows: dict[str, dict[str, Any]], shown: list[str], unit: str) -> list[object]:
    case, ours = next(iter(rows.values()))["case"], rows["flashcore"]

    def figure(impl: str) -> str:
        row = rows.get(impl, {})
        if "ms" not in row:
            return "-"
        return f"{row['tflops']:.0f}" if unit == "tflops" else f"{row['ms'] * 1e3:.1f}"

    low = ours["ratio"].get("cudnn")
    heads = f"{case['Hq']}/{case['Hkv']}" if case["Hq"] != case["Hkv"] else case["Hq"]
    seq = f"{case['Sq']}x{case['Sk']}" if case["Sq"] != case["Sk"] else case["Sq"]
    return [
        f"{case['B']}, {heads}, {seq}, {case['D']}",
        f"{case['mask']} {case['dtype']}",
        *map(figure, shown),
        f"{ours['ratio_to_best_peer']:.2f}",
        f"{low['mean']:.2f} ({low['low']:.2f})" if low else "-",
    ]


def _forward_summary(cases: dict[str, dict[str, dict[str, Any]]]) -> str:
    best = [rows["flashcore"]["ratio_to_best_peer"] for rows in cases.values()]
    return f"\n\nGeometric mean against the best peer of each row: {geomean(best)}; the worst row: {min(best):.2f}."


OVERHEAD = "h100/overhead.json"
# The same on another machine.
OVERHEAD_2 = "h100/overhead-2.json"
# The ways to make a call, and the most microseconds it may take over the launch alone; or over that and an output.
TARGETS: list[tuple[str, str, str, float | None, bool]] = [
    ("Rust, the launch alone (raw)", "raw", "rust", None, False),
    ("Rust, prepared call", "prepared", "rust", 0.2, False),
    ("Rust, first-seen pointers", "first_seen", "rust", 0.7, False),
    ("`Plan.launch()`", "Plan.launch", "inference", None, False),
    ("`flashcore.attention(q, k, v, out=out)`", "flashcore.attention, out", "inference", 1.0, False),
    ("the same with other tensors each time", "flashcore.attention, out, other tensors", "inference", None, False),
    ("`torch.empty_like` (empty)", "torch.empty_like", "inference", None, False),
    ("`Plan.launch()`, then `torch.empty_like`", "Plan.launch, then torch.empty_like", "inference", None, False),
    ("`flashcore.attention(q, k, v)`", "flashcore.attention", "inference", 1.2, True),
    ("`torch.ops.aten.alias(q)`, which does nothing", "torch.ops.aten.alias", "inference", None, False),
    ("`torch.ops.flashcore.attention`, inference_mode", "torch.ops.flashcore.attention", "inference", 2.0, True),
    ("`torch.ops.flashcore.attention`, grad mode", "torch.ops.flashcore.attention", "grad", None, False),
    ("SDPA under `sdpa_override`", "SDPA, overridden", "inference", None, False),
    ("SDPA, default", "SDPA", "inference", None, False),
    ("SDPA, flash", "SDPA, flash", "inference", None, False),
    ("SDPA, cuDNN", "SDPA, cudnn", "inference", None, False),
    ("SDPA, efficient", "SDPA, efficient", "inference", None, False),
    ("FA4", "FA4", "inference", None, False),
    ("Triton JIT", "Triton JIT", "inference", None, False),
    ("Triton CompiledKernel", "Triton CompiledKernel", "inference", None, False),
    ("cuLaunchKernelEx through ctypes", "cuLaunchKernelEx, ctypes", "inference", None, False),
]


def overhead_paths(document: dict[str, Any]) -> str | None:
    rounds = {(row["name"], row["mode"]): row["rounds_ns"] for row in rows(document, "path") if "rounds_ns" in row}
    raw, empty = rounds.get(("raw", "rust")), rounds.get(("torch.empty_like", "inference"))
    if raw is None or empty is None:
        return None
    body: list[list[object]] = []
    for label, name, mode, over, with_empty in TARGETS:
        found = rounds.get((name, mode))
        if found is None:
            body.append([label, "not there", "-", "-", "-"])
            continue
        # A round has every way once, so that what changes from round to round falls out.
        added = [way - launch - (new if with_empty else 0) for way, launch, new in zip(found, raw, empty, strict=True)]
        more = statistics.median(added) / 1e3
        against = "raw + empty" if with_empty else "raw"
        target = "-" if over is None else f"{against} + {over}"
        met = "-" if over is None else "met" if more <= over else "missed"
        shown = "-" if over is None else f"{against} + {more:.2f}" if more >= 0 else f"{against} - {-more:.2f}"
        body.append([label, f"{statistics.median(found) / 1e3:.2f}", shown, target, met])
    tail = """

Microseconds of the host for one call of (8, 8, 128, 64), f16, dense; medians of rounds of 200 calls in a row, which
keep the queue from running empty. All in one process, in random order within each round; differences are medians of
those within the rounds."""
    return markdown(["way", "us", "that is", "target", ""], body) + tail


def overhead_configurations(document: dict[str, Any]) -> str | None:
    measured = rows(document, "configuration")
    found = {(row["name"], row["mode"]): row for row in rows(document, "path")}
    floors = rows(document, "floor")
    if not measured or not floors or ("raw", "rust") not in found:
        return None
    raw, floor = found["raw", "rust"]["median_ns"] / 1e3, floors[0]["median_us"]
    body: list[list[object]] = []
    gains, bounds = [], []
    for row in measured:
        wall = {name: arm["wall_us"]["median"] for name, arm in row["arms"].items()}
        ours, device = wall["flashcore"], row["arms"]["flashcore"]["device_us"]["median"]
        best = min(value for name, value in wall.items() if name != "flashcore")
        gains.append(row["speedup_over_sdpa_wall"])
        bounds.append(wall["sdpa"] / (floor + device))
        cells = [f"{ours:.1f}", f"{raw + device + 5:.1f}", f"{wall['sdpa']:.1f}", f"{best:.1f}", f"{best / ours:.2f}"]
        body.append([f"{row['seq_len']}, {row['batch']}", *cells, f"{gains[-1]:.2f}", f"{bounds[-1]:.2f}"])
    header = ["S, B", "FlashCore", "raw + device + 5", "SDPA", "best backend", "of the best", "of SDPA", "at most"]
    tail = f"""

Microseconds of the host's clock from an empty queue to the end of the work, inference_mode. To launch a kernel that
does nothing and wait for it takes {floor:.1f}; "at most" is SDPA's time over that and the device time of our kernel,
with no other work of the host. Geometric mean over SDPA's default: {geomean(gains)}, at most {geomean(bounds)}."""
    return markdown(header, body) + tail


@of(OVERHEAD)
def overhead_graph(document: dict[str, Any]) -> str | None:
    measured = rows(document, "graph")
    fields = ["eager_host_us", "replay_host_us", "device_us"]
    body = [[row["name"], *(f"{row[field]:.1f}" for field in fields)] for row in measured]
    header = ["32 layers of", "eager, host us", "replay, host us", "device us"]
    return markdown(header, body) if measured else None


def overhead_criterion(document: dict[str, Any]) -> str | None:
    measured = rows(document, "criterion")
    if not measured:
        return None
    met = [row for row in measured if row["share"] <= 0.01]
    worst = max(measured, key=lambda row: row["share"])
    return (
        f"Between a prepared call from Rust and its launch alone there are {worst['rust_adds_ns']:.0f} ns (median of "
        f"the differences within rounds). That is within the criterion, 1 % of the device time, on {len(met)} of "
        f"{len(measured)} configurations; {worst['share']:.1%} on {worst['name']}."
    )


TRACE = "constant-trace.json"
FINDINGS = {"control_flow": "T1", "address": "T2", "guard": "T3", "guarded_alu": "T4", "variable_latency": "T5"}


def _audited(reports: Rows) -> list[object]:
    counts = [report["counts"] for report in reports]
    covered = [c["understood"] / c["instructions"] if c["instructions"] else 0.0 for c in counts]
    return [
        len(reports),
        sum(report["verdict"] == "pass" for report in reports),
        sum(count["instructions"] for count in counts),
        f"{100 * min(covered):.0f} %",
        sum(count["conditional_control_flow"] for count in counts),
        f"{sum(c['shared_assumed'] for c in counts)} of {sum(c['shared_accesses'] for c in counts)}",
        *(sum(report["found"].get(kind, 0) for report in reports) for kind in FINDINGS),
    ]


@of(TRACE)
def trace(document: dict[str, Any]) -> str:
    reports = rows(document, "cubin")
    header = ["code", "cubins", "pass", "instructions", "coverage", "public control flow", "shared, assumed"]
    arches = sorted({report["arch"] for report in reports})
    body = [[arch, *_audited([r for r in reports if r["arch"] == arch])] for arch in arches]
    tools = document["env"]["tools"]
    tail = f"\n\nAll in {tools['seconds']} s on {document['env']['cores']} cores; nvdisasm {tools['nvdisasm']}"
    tail += f", ptxas {tools['ptxas']}."
    return markdown([*header, *FINDINGS.values()], [*body, ["**all**", *_audited(reports)]]) + tail


@of(TRACE)
def plants(document: dict[str, Any]) -> str | None:
    header = ["set", "host", "leaks", "caught", "twins", "flagged"]
    body: list[list[object]] = []
    for kind in ("corpus", "mutation"):
        found = rows(document, kind)
        for host in sorted({row["host"] for row in found}):
            mine = [row for row in found if row["host"] == host]
            body.append([kind, host, *(sum(row[n] for row in mine) for n in ("leaks", "caught", "twins", "flagged"))])
    return markdown(header, body) if body else None


@of(TRACE)
def peers(document: dict[str, Any]) -> str | None:
    found = rows(document, "peer")
    header = ["cubin", "verdict", "instructions", *FINDINGS.values(), "reason"]
    body = [
        [
            row["name"],
            row["verdict"],
            row["instructions"] or "-",
            *(row["found"].get(kind, 0) if row["instructions"] else "-" for kind in FINDINGS),
            row["reason"] or "",
        ]
        for row in found
    ]
    return markdown(header, body) + f"\n\n{found[0]['source']}" if found else None


@of("h100/ct-time.json")
def ct_time(document: dict[str, Any]) -> str:
    header = [
        "kernel",
        "regime",
        "case",
        "inputs",
        "reference us",
        "us",
        "difference",
        "margin",
        "test",
        "detected",
        "false alarms",
    ]
    body = [
        [
            row["subject"],
            row["regime"],
            row["case"],
            row["class"],
            f"{row['us'][0]['median']:.3f}",
            f"{row['us'][1]['median']:.3f}",
            f"{max(map(abs, row['test']['deciles'])):.4f} +- {row['test']['band']:.4f}",
            f"{row['test']['margin']:.4f}",
            row["test"]["outcome"],
            f"{row['detection_rate']:.2f}",
            f"{row['false_alarm_rate']:.2f}",
        ]
        for row in document["rows"]
    ]
    return markdown(header, body)


TABLES: dict[str, Table] = {
    "overhead-paths": of(OVERHEAD)(overhead_paths),
    "overhead-paths-2": of(OVERHEAD_2)(overhead_paths),
    "overhead-configurations": of(OVERHEAD)(overhead_configurations),
    "overhead-configurations-2": of(OVERHEAD_2)(overhead_configurations),
    "overhead-graph": overhead_graph,
    "overhead-criterion": of(OVERHEAD)(overhead_criterion),
    "overhead-criterion-2": of(OVERHEAD_2)(overhead_criterion),
    "constant-trace": trace,
    "constant-trace-plants": plants,
    "constant-trace-peers": peers,
    "ct-time": ct_time,
    **{
        f"forward-{name}": forward(name, "tflops")
        for name in ("forward", "heads", "gqa", "window", "ragged", "head_dims")
    },
    **{f"forward-{name}": forward(name, "us") for name in ("long", "small")},
    "forward-f16": forward("forward-f16", "tflops"),
    "forward-ncu": ncu("4,16,4096,128:dense"),
    "forward-ncu-short": ncu("32,16,512,128:causal"),
    "forward-correctness": matrix,
    "forward-trials": trials("h200/forward-trials.json", FIRST_TRIALS),
    "forward-trials-2": trials("h100/forward-trials.json", SECOND_TRIALS),
    "forward-trial-order": trial("h100/forward-trials.json", 9, ["base", "ahead", "phase", "rest"], "cudnn"),
    "first-light-configurations": configurations,
    "first-light-correctness": of("h200/first-light.json")(correctness),
    "correctness": of("h100/correctness.json.gz")(correctness),
    "properties": properties,
    "selftest-calibration": calibration,
    "selftest-mutants": mutants,
    "selftest-planted": planted,
    "expert-validation": campaign("call"),
    "expert-validation-graph": campaign("graph"),
    "first-light-ptx": ptx,
    "leaks": leaks,
    "sanitizer": sanitizer,
    "fuzz": host("fuzz", ["target", "executions", "findings"], ["target", "executions", "findings"]),
    "host-checkers": host("checker", ["tool", "what", "tests", "errors"], ["tool", "subject", "tests", "errors"]),
}


def main(check: bool) -> int:
    stale = []
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = file.read_text()
        fresh = MARK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)
        if fresh != text:
            stale.append(str(file.relative_to(ROOT)))
            if not check:
                file.write_text(fresh)
    if stale:
        print(("not what the evidence gives: " if check else "written: ") + ", ".join(stale))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
