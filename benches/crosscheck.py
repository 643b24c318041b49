"""Recomputes the statistics of a measurement with numpy and scipy: `python benches/crosscheck.py RESULT.json`.

Exits with 1 and a line for every field that differs by more than 1e-9 of its value. Written from the definitions in the
documentation of `flashcore::validate::stats`, not from its code: distributions and tests are scipy's, and changes of
level are judged by a full dynamic programme instead of PELT. Bootstrap intervals are compared too, where the document
says the seed: their draws are a counter through SplitMix64.

The document has `protocol` with `margin`, `alpha`, `power`, `confidence` (0.95), `seed` and `min_sm_share`; `raw` with
the `path` beside it and the `sha256` of a gzip'd CSV of `case,mode,process,block,position,arm,ns,sm_mhz` in the order
of time; and `rows` of the kinds `measure` (`case_index, mode, arm, timer, stats`) and `compare` (`case_index, mode,
comparison, judged`). All comparisons of one mode are a suite. Where `min_sm_share` is a number, samples whose `sm_mhz`
is below that share of the median of their case and mode do not count.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

Array = NDArray[np.float64]
Document = dict[str, Any]
Key = tuple[int, str]

TOLERANCE = 1e-9
DIFFERENCES = (".log_ratios[", ".acf1")  # fields that may be what rounding leaves of 0
ROUNDING = 1e-15
COLUMNS = ["case", "mode", "process", "block", "position", "arm", "ns", "sm_mhz"]
CONFIDENCE = 0.95
MIN_PROCESSES = 5
RESAMPLES = 1000
MISSING = "missing"


class Samples:
    """The samples of one case and mode that count, in the order of time."""

    def __init__(self, rows: list[list[str]], min_sm_share: float | None) -> None:
        self.process, self.block, self.arm = (np.array([int(row[i]) for row in rows]) for i in (2, 3, 5))
        self.ns = np.array([float(row[6]) for row in rows])
        sm_mhz = np.array([float(row[7]) if row[7] else np.nan for row in rows])
        keep = np.isfinite(self.ns)
        if min_sm_share is not None and np.isfinite(sm_mhz).any():
            keep &= ~(sm_mhz < min_sm_share * np.nanmedian(sm_mhz))
        self.process, self.block, self.arm, self.ns = (x[keep] for x in (self.process, self.block, self.arm, self.ns))

    def series(self, arm: int) -> list[Array]:
        """The samples of an arm by process."""
        mine = self.arm == arm
        return [self.ns[mine & (self.process == process)] for process in np.unique(self.process[mine])]

    def blocks(self) -> list[list[tuple[Array, Array]]]:
        """By process and block, the samples of both arms; only blocks with both."""
        processes = []
        for process in np.unique(self.process):
            here = self.process == process
            pairs = []
            for block in np.unique(self.block[here]):
                arms = [self.ns[here & (self.block == block) & (self.arm == arm)] for arm in (0, 1)]
                if all(arm.size and np.median(arm) > 0 for arm in arms):
                    pairs.append((arms[0], arms[1]))
            if pairs:
                processes.append(pairs)
        return processes


def interval(low: float, high: float) -> dict[str, float]:
    return {"low": float(low), "high": float(high)}


def exp(bounds: dict[str, float]) -> dict[str, float]:
    return {end: math.exp(value) for end, value in bounds.items()}


# One arm


def centred(x: Array) -> Array:
    shifted = x - x[0]
    return np.asarray(shifted - shifted.mean())


def autocovariance(x: Array) -> Array:
    return np.correlate(centred(x), centred(x), "full")[x.size - 1 :]


def effective(x: Array) -> float:
    """Geyer's initial positive sequence."""
    covariance = autocovariance(x)
    if covariance[0] == 0:
        return float(x.size)
    pairs = covariance[: x.size // 2 * 2].reshape(-1, 2).sum(axis=1) / covariance[0]
    negative = np.flatnonzero(pairs <= 0)
    total = 2 * pairs[: negative[0] if negative.size else None].sum() - 1
    return float(min(x.size / max(total, 1.0), x.size))


def order_interval(ordered: Array, p: float, ess: float) -> dict[str, float] | None:
    n, size, tail = min(int(ess), ordered.size), ordered.size, (1 - CONFIDENCE) / 2
    if n == 0:
        return None
    low, high = int(stats.binom.ppf(tail, n, p)), int(stats.binom.isf(tail, n, p)) + 1
    if low < 1 or high > n:
        return None
    return interval(ordered[(low - 1) * size // n], ordered[-(-high * size // n) - 1])


def quantum(x: Array) -> float | None:
    """The greatest step of which all differences are multiples, up to the rounding of floats."""
    ordered = np.unique(x)
    rounding = float(np.abs(ordered).max()) * 2.0**-22
    spans = (ordered - ordered[0])[ordered - ordered[0] > rounding].tolist()
    if not spans:
        return None
    step = spans[0]
    for last, span in itertools.pairwise(spans):
        for divisor in itertools.count(1):
            part = step / divisor
            if part < 8 * rounding:
                return None
            if abs(math.remainder(span, part)) <= rounding * (1 + span / last):
                break
        step = span / round(span / part)
    return float(step)


def trimmed_square(x: Array) -> float:
    """Mean square of a Gaussian from the smallest four fifths."""
    z = stats.norm.ppf(0.9)
    expected = 1 - 2 * z * stats.norm.pdf(z) / 0.8
    return float(np.sort(x * x)[: math.ceil(0.8 * x.size)].mean() / expected)


def filtered(x: Array) -> tuple[Array, float] | None:
    """The series without lone outliers, and the penalty of a change; None where nothing varies."""
    if x.size < 3:
        return None
    one, two = (trimmed_square(x[lag:] - x[:-lag]) for lag in (1, 2))
    r = min(max(two / one - 1, 0.0), 0.9) if one > 0 else 0.0
    sd = max(math.sqrt(one / (2 * (1 - r))), (quantum(x) or 0.0) / 2)
    if sd == 0:
        return None
    y = x - np.median(x)
    near = ndimage.generic_filter(y, np.nanmedian, size=7, mode="constant", cval=np.nan)
    return np.where(np.abs(y - near) > 3 * sd, near, y), 3 * math.log(x.size) * sd**2 * (1 + r) / (1 - r)


def segmentation(y: Array, penalty: float, shortest: int = 5) -> tuple[float, list[int]]:
    """The cheapest segmentation of all, by dynamic programming over every start of the last segment."""
    best, previous = np.full(y.size + 1, np.inf), np.zeros(y.size + 1, dtype=int)
    best[0] = -penalty
    sums, squares = np.concatenate(([0.0], np.cumsum(y))), np.concatenate(([0.0], np.cumsum(y * y)))
    for end in range(shortest, y.size + 1):
        starts = np.arange(end - shortest + 1)
        cost = squares[end] - squares[starts] - (sums[end] - sums[starts]) ** 2 / (end - starts)
        total = best[starts] + cost + penalty
        previous[end] = np.argmin(total)
        best[end] = total[previous[end]]
    changes, at = [], int(previous[y.size])
    while at > 0:
        changes.append(at)
        at = int(previous[at])
    return float(best[y.size]), changes[::-1]


def changepoints(processes: list[Array], claimed: list[int]) -> list[int]:
    """The claimed changes where they are as cheap as any (there may be ties), else the cheapest."""
    found, offset = [], 0
    for x in processes:
        prepared = filtered(x)
        if prepared is not None and x.size >= 5:
            y, penalty = prepared
            cost, changes = segmentation(y, penalty)
            mine = [change - offset for change in claimed if offset < change < offset + x.size]
            edges = [0, *mine, x.size]
            parts = [y[start:end] for start, end in itertools.pairwise(edges)]
            claim = sum(float(((part - part.mean()) ** 2).sum()) for part in parts) + penalty * len(mine)
            as_good = min(map(len, parts)) >= 5 and claim <= cost + TOLERANCE * (abs(cost) + penalty)
            found += [offset + change for change in (mine if as_good else changes)]
        offset += x.size
    return found


def describe(processes: list[Array], claimed: list[int]) -> Document:
    everything = np.concatenate(processes)
    ordered = np.sort(everything)
    ess = sum(map(effective, processes))
    covariances = [autocovariance(x) for x in processes]
    variance = sum(covariance[0] for covariance in covariances)
    neighbours = sum(covariance[1] for covariance in covariances if covariance.size > 1)
    percentiles = [0.5, 0.9, 0.95, 0.99, 0.999]
    return {
        "samples": everything.size,
        "processes": len(processes),
        "median": float(np.median(ordered)),
        "ci95": order_interval(ordered, 0.5, ess),
        "percentiles": [
            {
                "p": p,
                "ns": float(np.quantile(ordered, p)),
                "ci": order_interval(ordered, p, ess) if ess * min(p, 1 - p) >= 10 else None,
            }
            for p in percentiles
        ],
        "mean": float(everything.mean()),
        "sd": float(np.std(everything - everything[0], ddof=1)) if everything.size > 1 else 0.0,
        "mad": float(stats.median_abs_deviation(everything)),
        "min": float(ordered[0]),
        "max": float(ordered[-1]),
        "acf1": float(neighbours / variance) if variance > 0 else 0.0,
        "ess": ess,
        "changepoints": changepoints(processes, claimed),
    }


# Two arms


def signed_rank_interval(values: Array) -> tuple[float, dict[str, float] | None]:
    """Hodges and Lehmann's estimate, and the interval of Wilcoxon's exact distribution."""
    n = values.size
    walsh = np.sort([(values[i] + values[j]) / 2 for i in range(n) for j in range(i + 1)])
    chances = np.ones(1)
    for rank in range(1, n + 1):
        chances = np.convolve(chances, [0.5] + [0.0] * (rank - 1) + [0.5])
    rank = int((np.cumsum(chances) <= (1 - CONFIDENCE) / 2).sum())
    return float(np.median(walsh)), interval(walsh[rank - 1], walsh[-rank]) if rank else None


def rounding(medians: Array, step: float) -> tuple[float, float]:
    """What a clock's step does to log medians: the variance of one, and the mean square of their common bias."""
    if step == 0:
        return 0.0, 0.0
    square = float((step / medians.mean()) ** 2 / 12)
    spread = 2 * math.pi * float(np.std(medians - medians[0], ddof=1)) / step
    return square, square * math.exp(-(spread**2))


def draws(seed: int, counters: NDArray[np.uint64], bound: int) -> NDArray[np.int64]:
    """Numbers below a bound: SplitMix64 of a counter, the upper half of whose bits is scaled."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        return (((z >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def bootstrap(processes: list[Array], seed: int) -> dict[str, float]:
    """The percentile interval of means over drawn processes of medians over drawn blocks."""
    count, longest = len(processes), max(map(len, processes))
    resample, slot = np.meshgrid(np.arange(RESAMPLES), np.arange(count), indexing="ij")
    counters = ((resample * count + slot) * (1 + longest)).astype(np.uint64)
    picks = draws(seed, counters, count)
    values = np.empty(picks.shape)
    for i, blocks in enumerate(processes):
        where = picks == i
        inner = counters[where][:, None] + np.arange(1, blocks.size + 1, dtype=np.uint64)
        values[where] = np.median(blocks[draws(seed, inner, blocks.size)], axis=1)
    tail = (1 - CONFIDENCE) / 2
    return interval(*np.quantile(values.mean(axis=1), [tail, 1 - tail]))


def compare(samples: Samples, protocol: Document) -> Document:
    processes = samples.blocks()
    medians = [np.array([[np.median(one), np.median(other)] for one, other in blocks]) for blocks in processes]
    blocks = [np.log(pairs[:, 1] / pairs[:, 0]) for pairs in medians]
    logs = np.array([np.median(ratios) for ratios in blocks])
    arms = np.array([np.median(pairs, axis=0) for pairs in medians])
    same = np.all(samples.ns == samples.ns[0])
    step = float(samples.ns[0]) if same else quantum(samples.ns) or 0.0
    variances, biases = zip(*(rounding(medians, step) for medians in arms.T), strict=True)
    squared = max(float(np.var(logs, ddof=1)), sum(variances)) / logs.size + sum(biases)
    se, df, log_ratio = math.sqrt(squared), logs.size - 1, float(logs.mean())
    margin = math.log1p(protocol["margin"])
    hodges_lehmann, bounds = signed_rank_interval(logs)
    reach = stats.t.isf((1 - CONFIDENCE) / 2, df)
    p_slower = float(stats.t.sf((log_ratio - margin) / se, df)) if se > 0 else float(log_ratio <= margin)
    first, second = samples.ns[samples.arm == 0], samples.ns[samples.arm == 1]
    found: Document = {
        "ratio": math.exp(log_ratio),
        "ci95": exp(interval(log_ratio - reach * se, log_ratio + reach * se)),
        "processes": [logs.size, logs.size],
        "log_ratios": logs.tolist(),
        "se": se,
        "df": float(df),
        "hodges_lehmann": math.exp(hodges_lehmann),
        "hodges_lehmann_ci95": exp(bounds) if bounds else None,
        "mann_whitney_p": 1.0 if same else float(stats.mannwhitneyu(first, second, method="asymptotic").pvalue),
        "p_slower": p_slower,
        "mde": effect(se, df, protocol["alpha"], protocol),
    }
    if "seed" in protocol:
        found["bootstrap_ci95"] = exp(bootstrap(blocks, protocol["seed"]))
    return found


def effect(se: float, df: float, level: float, protocol: Document) -> float:
    """Minimum detectable effect."""
    errors = stats.t.isf(level, df) + stats.t.ppf(protocol["power"], df)
    return math.expm1(math.log1p(protocol["margin"]) + float(errors) * se)


def judge(suite: list[Document], protocol: Document) -> list[Document]:
    """Holm's procedure step by step, the upper bounds, and Benjamini and Hochberg's adjustment."""
    alpha, limit, count = protocol["alpha"], 1 + protocol["margin"], len(suite)
    enough = [min(case["processes"]) >= MIN_PROCESSES for case in suite]
    p = np.array([case["p_slower"] if known else 1.0 for case, known in zip(suite, enough, strict=True)])
    q = stats.false_discovery_control(p)
    order = np.argsort(p, kind="stable")
    judged: list[Document] = [{} for _ in suite]
    adjusted, rejecting, rejected = 0.0, True, 0
    for rank, i in enumerate(order):
        case = suite[i]
        adjusted = max(adjusted, min(1.0, (count - rank) * float(p[i])))
        rejecting = rejecting and adjusted <= alpha
        step = int((p[order[:rejected]] < p[i]).sum())
        rejected += rejecting
        log_ratio, se, df = math.log(case["ratio"]), case["se"], case["df"]
        upper = math.exp(log_ratio + float(stats.t.isf(alpha, df)) * se)
        outcome = "regression" if rejecting else "pass" if upper < limit else "inconclusive"
        judged[i] = {
            "outcome": outcome if enough[i] else "inconclusive",
            "p_holm": adjusted,
            "q_bh": float(q[i]),
            "lower": math.exp(log_ratio - float(stats.t.isf(alpha / (count - step), df)) * se),
            "upper": upper,
            "mde": effect(se, df, alpha / count, protocol),
        }
    return judged


# The document


def differences(path: str, claimed: Any, found: Any) -> Iterator[str]:
    """Fields of the document that are not what was found."""
    if isinstance(found, dict) and isinstance(claimed, dict):
        for key in sorted(claimed.keys() | found.keys()):
            yield from differences(f"{path}.{key}", claimed.get(key, MISSING), found.get(key, MISSING))
    elif isinstance(found, list) and isinstance(claimed, list) and len(found) == len(claimed):
        for i, (one, other) in enumerate(zip(claimed, found, strict=True)):
            yield from differences(f"{path}[{i}]", one, other)
    elif isinstance(found, float) and isinstance(claimed, int | float) and not isinstance(claimed, bool):
        slack = ROUNDING if any(field in path for field in DIFFERENCES) else 0.0
        if not abs(found - claimed) <= TOLERANCE * max(abs(found), abs(claimed)) + slack:
            yield f"{path}: {claimed!r}, recomputed {found!r}"
    elif claimed != found or isinstance(claimed, bool):
        yield f"{path}: {claimed!r}, recomputed {found!r}"


def read(document: Document, folder: Path) -> dict[Key, Samples]:
    """The raw samples by case and mode; a ValueError says what is wrong with them."""
    content = (folder / document["raw"]["path"]).read_bytes()
    if hashlib.sha256(content).hexdigest() != document["raw"]["sha256"]:
        raise ValueError("raw.sha256: the raw file is another one")
    rows = csv.reader(io.StringIO(gzip.decompress(content).decode()))
    header = next(rows)
    if header != COLUMNS or document["raw"]["columns"] != COLUMNS:
        raise ValueError(f"raw.columns: {header}")
    groups: dict[Key, list[list[str]]] = defaultdict(list)
    for row in rows:
        groups[int(row[0]), row[1]].append(row)
    return {key: Samples(group, document["protocol"]["min_sm_share"]) for key, group in groups.items()}


def check(document: Document, folder: Path) -> list[str]:
    """Every difference between a document and what its raw samples give."""
    try:
        samples = read(document, folder)
    except ValueError as error:
        return [str(error)]
    protocol = document["protocol"]
    wrong = list(differences("protocol.confidence", protocol["confidence"], CONFIDENCE))
    measured: dict[tuple[int, str, int], Document] = {}
    compared: dict[Key, Document] = {}
    for row in document["rows"]:
        if row["kind"] == "measure":
            measured[row["case_index"], row["mode"], row["arm"]] = row
        elif row["kind"] == "compare":
            compared[row["case_index"], row["mode"]] = row
    arms = {(*key, arm) for key, group in samples.items() for arm in np.unique(group.arm).tolist()}
    pairs = {key for key, group in samples.items() if len(group.blocks()) >= 2}
    wrong += [f"measure {key}: in the rows or in the samples only" for key in sorted(arms ^ measured.keys())]
    wrong += [f"compare {key}: in the rows or in the samples only" for key in sorted(pairs ^ compared.keys())]
    for case, mode, arm in sorted(arms & measured.keys()):
        row, series = measured[case, mode, arm], samples[case, mode].series(arm)
        name = f"measure[{case},{mode},{arm}]"
        claimed = row["stats"].get("changepoints", [])
        wrong += differences(f"{name}.stats", row["stats"], describe(series, claimed))
        step = row["timer"].get("quantum_ns", MISSING)
        wrong += differences(f"{name}.timer.quantum_ns", step, quantum(np.concatenate(series)))
    for mode in sorted({mode for _, mode in pairs & compared.keys()}):
        keys = [key for key in compared if key[1] == mode and key in pairs]
        suite = [compare(samples[key], protocol) for key in keys]
        for key, found, judged in zip(keys, suite, judge(suite, protocol), strict=True):
            name, row = f"compare[{key[0]},{mode}]", compared[key]
            claimed = {field: row["comparison"][field] for field in row["comparison"]}
            if "seed" not in protocol:
                claimed.pop("bootstrap_ci95", None)
            wrong += differences(f"{name}.comparison", claimed, found)
            wrong += differences(f"{name}.judged", row["judged"], judged)
    return wrong


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__)
        return 2
    path = Path(arguments[0])
    document = json.loads(path.read_text())
    wrong = check(document, path.parent)
    for line in wrong:
        print(line)
    rows = sum(row["kind"] in ("measure", "compare") for row in document["rows"])
    print(f"{len(wrong)} differences in {rows} rows")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
