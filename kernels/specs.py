"""The matrix of kernel variants, as data: which kernels exist, for whom, and why.

Nothing here compiles anything and nothing here needs Triton. `compile.py` turns a `Spec` into machine code and a
manifest entry; `docs/bundle.md` says what the manifest fields mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

Factor = str | int


@dataclass(frozen=True)
class When:
    """The requests a variant answers. Ranges are inclusive; those of head_dim are of the true one.

    `limits` are ranges of quantities outside of which another variant was measured to be faster.
    """

    dtype: str
    head_dim_qk: tuple[int, int]
    head_dim_v: tuple[int, int]
    band: bool
    attn_mask: str = "none"
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Requires:
    """What the machine code takes for granted, in bytes; the runtime checks it before every launch."""

    base_align: int
    stride_align: int
    head_dim_align: int
    positive_scale: bool = False


@dataclass(frozen=True)
class Tile:
    """Rows of query and of key that one step works on, and the padded head_dim."""

    query: int
    key: int
    head_dim: int


@dataclass(frozen=True)
class Grid:
    """Each axis is a product of quantities and integers; `max_ctas_per_sm` caps x for persistent kernels."""

    x: tuple[Factor, ...]
    y: tuple[Factor, ...] = ()
    z: tuple[Factor, ...] = ()
    max_ctas_per_sm: int | None = None


@dataclass(frozen=True)
class Launch:
    """One kernel launch of a variant, and all that its machine code depends on.

    `signature` holds every argument of the kernel function in its order: a Triton type (`*bf16`, `i64`, `fp32`,
    `tensordesc<...>`) or `constexpr`, in which case `constexprs` has the value. `values` names the quantity each
    run-time argument receives (`docs/bundle.md`, Params); a `tensordesc` argument names the tensor alone (`"q"`) and
    expands to its map, four shapes and four strides. `divisibility` promises that a pointer (in bytes) or an integer
    (in its own unit) is a multiple. `tile_bytes` is how much of the shared memory, from its start, the tiles take,
    where the compiler keeps variables of its own behind them; the audit builds on it (docs/security). `sources` are the
    modules whose text makes this kernel: the first one defines it, the others hold device functions it calls.
    """

    kernel: str
    sources: tuple[str, ...]
    signature: Mapping[str, str]
    constexprs: Mapping[str, bool | int | float | str | None]
    values: Mapping[str, str]
    grid: Grid
    num_warps: int
    num_stages: int
    divisibility: Mapping[str, int] = field(default_factory=dict)
    num_ctas: int = 1
    tile_bytes: int = 0
    options: Mapping[str, bool | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """One variant of an operation on one architecture: its manifest entry before compilation."""

    name: str
    arch: str
    op: str
    family: str
    priority: int
    when: When
    requires: Requires
    tile: Tile
    secret: tuple[str, ...]
    launches: tuple[Launch, ...]
    workspace: tuple[tuple[Factor, ...], ...] = ()
    max_key_splits: int = 1


# --- attention_forward, portable ---

TENSORS = ("q", "k", "v", "out")
ELEMENT = {"f16": "fp16", "bf16": "bf16"}
TILES = (32, 64, 128, 256)
PRIORITY = {"portable": 0, "hopper": 1000}


@dataclass(frozen=True)
class Alignment:
    """What a build assumes of bases, strides and head_dims; `exact` also that both head_dims fill the tile."""

    rank: int
    base_align: int
    stride_align: int
    head_dim_align: int
    exact: bool = False


ALIGNMENTS = {
    "exact": Alignment(2, 16, 16, 16, exact=True),
    "aligned": Alignment(1, 16, 16, 16),
    "unaligned": Alignment(0, 2, 2, 2),
}

# attn_mask: (the kernel's ATTN_MASK, the type of its pointer)
MASKS = {
    "none": ("none", None),
    "bool": ("bool", "*u8"),
    "f16": ("additive", "*fp16"),
    "bf16": ("additive", "*bf16"),
    "f32": ("additive", "*fp32"),
}


@dataclass(frozen=True)
class Shape:
    """BLOCK_Q, BLOCK_K, warps and pipeline stages of one build."""

    query: int
    key: int
    warps: int
    stages: int


# How a build loads its tiles, which is what decides how many registers a shape costs: 16 bytes at a time ("wide"), or
# element by element with a 64-bit address each ("narrow"); a mask is read element by element too. The largest shapes
# that do not spill, chosen by compiling; those of sm_90a also keep ptxas from serialising WGMMA. Every one fits the
# 99 KB of shared memory of sm_86, sm_89 and sm_120, but for those that replace them where there is more.
SHAPES = {
    ("wide", 32): Shape(128, 64, 4, 3),
    ("wide", 64): Shape(128, 64, 4, 3),
    ("wide", 128): Shape(128, 64, 8, 2),
    ("wide", 256): Shape(64, 32, 8, 2),
    ("narrow", 32): Shape(128, 64, 8, 1),
    ("narrow", 64): Shape(128, 64, 8, 1),
    ("narrow", 128): Shape(64, 32, 8, 1),
    ("narrow", 256): Shape(64, 16, 8, 1),
    ("wide+mask", 32): Shape(64, 32, 4, 2),
    ("wide+mask", 64): Shape(128, 32, 8, 2),
    ("wide+mask", 128): Shape(64, 32, 8, 2),
    ("wide+mask", 256): Shape(64, 16, 8, 2),
    ("narrow+mask", 32): Shape(64, 32, 4, 1),
    ("narrow+mask", 64): Shape(64, 32, 8, 1),
    ("narrow+mask", 128): Shape(64, 16, 8, 1),
    ("narrow+mask", 256): Shape(32, 32, 8, 1),
}
SHAPES_OF = {
    "sm_86": {
        ("wide", 64): Shape(128, 64, 8, 3),
    },
    # WGMMA wants whole warpgroups and leaves the operands in shared memory, so key tiles can be wide. Pipelining a
    # mask's loads serialises WGMMA (C7515).
    "sm_90a": {
        ("wide", 32): Shape(128, 128, 8, 2),
        ("wide", 64): Shape(128, 128, 8, 2),
        ("wide", 128): Shape(128, 64, 8, 3),
        ("wide", 256): Shape(64, 64, 8, 2),
        ("narrow", 128): Shape(128, 32, 8, 1),
        ("wide+mask", 32): Shape(128, 32, 8, 1),
        ("wide+mask", 64): Shape(64, 64, 8, 1),
        ("wide+mask", 128): Shape(64, 32, 8, 1),
        ("wide+mask", 256): Shape(64, 32, 8, 1),
        ("narrow+mask", 32): Shape(128, 32, 8, 1),
        ("narrow+mask", 64): Shape(128, 32, 8, 1),
        ("narrow+mask", 128): Shape(64, 32, 8, 1),
        ("narrow+mask", 256): Shape(64, 32, 8, 1),
    },
    # The accumulators live in tensor memory, which frees registers, and have at least 64 rows.
    "sm_100a": {
        ("wide", 128): Shape(128, 64, 8, 3),
        ("wide", 256): Shape(128, 32, 8, 2),
        ("wide+mask", 64): Shape(64, 64, 8, 2),
        ("narrow+mask", 64): Shape(128, 32, 8, 1),
        ("narrow+mask", 128): Shape(64, 32, 8, 1),
        ("narrow+mask", 256): Shape(64, 16, 8, 1),
    },
    "sm_120a": {
        ("narrow+mask", 256): Shape(32, 16, 8, 1),
    },
}

# What each bundle is for, and the shared memory that a block may have there, in bytes. `compute_80` is PTX for a GPU
# that nobody built for, so it keeps to the least of them all.
ARCHES = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90a": 227 << 10,
    "sm_100a": 227 << 10,
    "sm_120a": 99 << 10,
    "compute_80": 99 << 10,
}


def _shape(arch: str, head_dim: int, mask: str, align: Alignment) -> Shape:
    loads = ("wide" if align.stride_align == 16 else "narrow") + ("" if mask == "none" else "+mask")
    return (SHAPES | SHAPES_OF.get(arch, {}))[loads, head_dim]


# (band, attn_mask) of each alignment. `exact` and `aligned` are for speed, so a dense build of their own; the rest
# answers dense requests as the band that contains everything.
FEATURES = {
    "exact": [(False, "none"), (True, "none")],
    "aligned": [(False, "none"), (True, "none"), (True, "bool"), (True, "same"), (True, "f32")],
    "unaligned": [(True, "none"), (True, "bool"), (True, "same"), (True, "f32")],
}
# PTX is the slow yes for a GPU nobody built for: few variants, since the driver compiles each on first use.
PTX_FEATURES = {
    "aligned": [(True, "none")],
    "unaligned": [(True, "none"), (True, "bool"), (True, "same"), (True, "f32")],
}
PTX_VERSION = 70  # the lowest that knows sm_80, so that any driver since CUDA 11.0 takes it


# An argument of the kernel: name, Triton type or constexpr, the quantity it receives or its constant, divisibility.
Argument = tuple[str, str, Any, int]


def _forward_arguments(dtype: str, head_dim: int, band: bool, mask: str, align: Alignment) -> Iterator[Argument]:
    """All but the block sizes, in the order of the kernel."""
    attn_mask, mask_type = MASKS[mask]
    elements = align.stride_align // 2
    for tensor in TENSORS:
        yield tensor, f"*{ELEMENT[dtype]}", tensor, align.base_align
    yield "lse", "*fp32", "lse", 1
    yield "attn_mask", mask_type or "constexpr", "attn_mask" if mask_type else None, 1
    for tensor in TENSORS:
        for axis in ("batch", "head", "seq"):
            yield f"{tensor}_stride_{axis}", "i64", f"{tensor}.stride.{axis}", elements
    for axis in ("batch", "head", "query", "key"):
        quantity = f"attn_mask.stride.{axis}" if mask_type else None
        yield f"mask_stride_{axis}", "i64" if mask_type else "constexpr", quantity, 1
    for size in ("num_heads_q", "group", "seq_len_q", "seq_len_k"):
        yield size, "i32", size, 1
    for size in ("head_dim_qk", "head_dim_v"):
        if align.exact:
            yield size, "constexpr", head_dim, 1
        else:
            yield size, "i32", size, align.head_dim_align // 2
    for bound in ("band_lo", "band_hi"):
        yield bound, "i32" if band else "constexpr", bound if band else None, 1
    yield "scale", "fp32", "scale" if attn_mask == "additive" else "scale_log2", 1


def _forward_launch(
    arch: str, dtype: str, head_dim: int, band: bool, mask: str, align: Alignment, shape: Shape
) -> Launch:
    arguments = list(_forward_arguments(dtype, head_dim, band, mask, align))
    blocks = {
        "BAND": band,
        "ATTN_MASK": MASKS[mask][0],
        "PADDED": not align.exact,
        "BLOCK_Q": shape.query,
        "BLOCK_K": shape.key,
        "BLOCK_D": head_dim,
    }
    return Launch(
        kernel="attention_forward",
        sources=("kernels.forward",),
        signature={a: kind for a, kind, _, _ in arguments} | dict.fromkeys(blocks, "constexpr"),
        constexprs={a: value for a, kind, value, _ in arguments if kind == "constexpr"} | blocks,
        values={a: value for a, kind, value, _ in arguments if kind != "constexpr"},
        divisibility={a: multiple for a, kind, _, multiple in arguments if kind != "constexpr" and multiple > 1},
        grid=Grid(x=("tiles_query", "num_heads_q", "batch")),
        num_warps=shape.warps,
        num_stages=shape.stages,
        options={"ptx_version": PTX_VERSION} if arch.startswith("compute_") else {},
    )


def forward(
    arch: str, dtype: str, head_dim: int, band: bool, mask: str, alignment: str, shape: Shape | None = None
) -> Spec:
    """The portable forward for head_dims up to `head_dim`; `shape` overrides the table, for tuning."""
    align = ALIGNMENTS[alignment]
    shape = shape or _shape(arch, head_dim, mask, align)
    head_dims = (head_dim, head_dim) if align.exact else (1, head_dim)
    features = ("band" if band else "dense") + ("" if mask == "none" else f".mask_{mask}")
    return Spec(
        name=f"attention_forward.portable.{dtype}.d{head_dim}.{features}.{alignment}",
        arch=arch,
        op="attention_forward",
        family="portable",
        # The smallest sufficient tile first, then the strongest assumption, then the narrower question.
        priority=PRIORITY["portable"] + 10 * (len(TILES) - TILES.index(head_dim)) + 2 * align.rank + (not band),
        when=When(dtype, head_dims, head_dims, band, mask),
        requires=Requires(align.base_align, align.stride_align, align.head_dim_align),
        tile=Tile(shape.query, shape.key, head_dim),
        secret=("q", "k", "v") if mask == "none" else ("q", "k", "v", "attn_mask"),
        launches=(_forward_launch(arch, dtype, head_dim, band, mask, align, shape),),
    )


def _portable(arch: str) -> list[Spec]:
    matrix = PTX_FEATURES if arch.startswith("compute_") else FEATURES
    return [
        forward(arch, dtype, head_dim, band, dtype if mask == "same" else mask, alignment)
        for head_dim in TILES
        for alignment, features in matrix.items()
        for band, mask in features
        for dtype in ELEMENT
    ]


# --- attention_forward, Hopper ---


@dataclass(frozen=True)
class HopperShape:
    """One build. `queries` of each consumer warpgroup are in shared memory, 1 or 2; `held` columns of one in registers.

    A consumer owns 64 query rows; two take turns at the tensor cores, three need not.
    """

    key: int
    stages: int
    queries: int = 2
    consumers: int = 2
    held: int = 0

    @property
    def rows(self) -> int:
        return self.consumers * CONSUMER_ROWS

    def tile_bytes(self, head_dim: int, split: bool) -> int:
        """Of the rings of queries, keys and values, and of the output, which a build that splits the keys has not."""
        out = 0 if split else self.rows * min(head_dim, OUT_COLUMNS)
        return 2 * (head_dim * (self.queries * self.rows + 2 * self.stages * self.key) + out)

    @property
    def slug(self) -> str:
        """Whatever is not as usual, in a word."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return "-".join(f"{name}{value}" for name, value in values.items())


# Of the 227 KB of shared memory: 176, 224 and 224 KB.
HOPPER_SHAPES = {
    64: HopperShape(128, 4, held=64),
    128: HopperShape(128, 2, held=64),
    256: HopperShape(64, 2, queries=1),
}
CONSUMER_ROWS = 64
OUT_COLUMNS = 128  # of the output that are in shared memory at a time


def _descriptor(dtype: str, rows: int, columns: int) -> str:
    """The Triton type of a rank-4 host descriptor for tiles (1, 1, rows, columns)."""
    layout = "swizzle_byte_width=128, element_bitwidth=16, rank=4, transposed=False, fp4_padded=False, cga_layout=[]"
    return f"tensordesc<{ELEMENT[dtype]}[1, 1, {rows}, {columns}],NVMMASharedLayout({layout})>"


def _hopper_launch(dtype: str, head_dim: int, band: bool, shape: HopperShape, split: bool = False) -> Launch:
    sizes = ("num_tiles", "tiles_query", "num_heads_q", "group", "seq_len_q", "seq_len_k")
    bounds = ("band_lo", "band_hi")
    constexprs: dict[str, bool | int] = {} if band else dict.fromkeys(bounds, 0)
    constexprs |= {} if split else {"splits": 1}
    constexprs |= {"BAND": band, "SPLIT": split, "CONSUMERS": shape.consumers, "STAGES": shape.stages}
    constexprs |= {"QUERIES": shape.queries, "HELD": shape.held}
    values = {name: name for name in (*TENSORS, "lse", *sizes, *(bounds if band else ()), "scale_log2")}
    values |= {"lse": "workspace.0", "splits": "key_splits"} if split else {}
    rows = {"q": CONSUMER_ROWS, "k": shape.key, "v": shape.key, "out": CONSUMER_ROWS}
    columns = dict.fromkeys(TENSORS, head_dim) | {"out": min(head_dim, OUT_COLUMNS)}
    types = {tensor: _descriptor(dtype, rows[tensor], columns[tensor]) for tensor in TENSORS}
    types |= {"lse": "*fp32"} | dict.fromkeys((*sizes, *bounds, "splits"), "i32") | {"scale_log2": "fp32"}
    return Launch(
        kernel="attention_forward_hopper",
        sources=("kernels.forward_hopper",),
        signature=types | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        values=values,
        grid=Grid(x=("num_tiles", *(("key_splits",) if split else ())), max_ctas_per_sm=1),
        num_warps=4,  # of the first consumer; the other partitions bring their own
        num_stages=1,
        tile_bytes=shape.tile_bytes(head_dim, split),
    )


COMBINE_ROWS = 16


def _combine_launch(dtype: str, head_dim: int, tile: int) -> Launch:
    """Puts the parts together that a launch with split keys wrote into workspace 0."""
    strides = {f"out_stride_{axis}": f"out.stride.{axis}" for axis in ("batch", "head", "seq")}
    sizes = ("num_tiles", "tiles_query", "num_heads_q", "seq_len_q", "head_dim_v")
    constexprs = {"TILE": tile, "ROWS": COMBINE_ROWS, "BLOCK_D": head_dim}
    pointers = {"partial": "*fp32", "out": f"*{ELEMENT[dtype]}", "lse": "*fp32"}
    values = {"partial": "workspace.0", "out": "out", "lse": "lse", **strides}
    values |= {name: name for name in sizes} | {"splits": "key_splits"}
    return Launch(
        kernel="attention_combine",
        sources=("kernels.combine",),
        signature=pointers
        | dict.fromkeys(strides, "i64")
        | dict.fromkeys((*sizes, "splits"), "i32")
        | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        values=values,
        divisibility={"partial": 16, "out": 16} | dict.fromkeys(strides, 8),
        grid=Grid(x=("num_tiles", tile // COMBINE_ROWS)),
        num_warps=4,
        num_stages=2,
    )


SMS = 132  # of an H100 SXM or H200
MAX_SIZE = 1 << 30
MAX_KEY_SPLITS = 8
SPLIT_HEAD_DIMS = (64, 128)  # at 256 it spills


def hopper_split(dtype: str, head_dim: int, band: bool) -> Spec:
    """For few and long rows: the keys of a tile go to several CTAs, and a second launch puts the parts together."""
    whole, shape = hopper(dtype, head_dim, band), HOPPER_SHAPES[head_dim]
    # Whole tiles leave SMs idle: under a band the short ones are done long before the long ones. Writing and reading
    # the parts costs about as much as 16 blocks of keys.
    limits = {"num_tiles": (1, SMS - 1 if band else SMS // 2), "seq_len_k": (4096, MAX_SIZE)}
    return replace(
        whole,
        name=f"attention_forward.hopper.{dtype}.d{head_dim}.{'band' if band else 'dense'}.split",
        priority=whole.priority + 4,
        when=replace(whole.when, limits=limits),
        launches=(
            _hopper_launch(dtype, head_dim, band, shape, split=True),
            _combine_launch(dtype, head_dim, whole.tile.query),
        ),
        # Per row of a part: its output and its log-sum-exp, f32.
        workspace=(("num_heads_q", "batch", "key_splits", "seq_len_q", 4 * (head_dim + 1)),),
        max_key_splits=MAX_KEY_SPLITS,
    )


def hopper(
    dtype: str,
    head_dim: int,
    band: bool,
    shape: HopperShape | None = None,
    limits: Mapping[str, tuple[int, int]] | None = None,
    suffix: str = "",
    rank: int = 0,
) -> Spec:
    """The sm_90a forward for head_dims up to `head_dim`; `shape` overrides the table, for tuning.

    Of builds that differ in their shape alone the one of the highest `rank`, up to 3, is preferred within its limits.
    """
    shape = shape or HOPPER_SHAPES[head_dim]
    return Spec(
        name=f"attention_forward.hopper.{dtype}.d{head_dim}.{'band' if band else 'dense'}{suffix}",
        arch="sm_90a",
        op="attention_forward",
        family="hopper",
        priority=PRIORITY["hopper"] + 10 * (len(TILES) - TILES.index(head_dim)) + 5 * (not band) + rank,
        when=When(dtype, (1, head_dim), (1, head_dim), band, limits=limits or {}),
        # What cuTensorMapEncodeTiled asks for; the head_dim itself may be odd.
        requires=Requires(16, 16, 2, positive_scale=True),
        tile=Tile(shape.rows, shape.key, head_dim),
        secret=("q", "k", "v"),
        launches=(_hopper_launch(dtype, head_dim, band, shape),),
    )


TUNING = Path(__file__).parent / "tuning" / "sm_90a.json"
Limits = Mapping[str, tuple[int, int]]


def _hopper_builds(head_dim: int, band: bool) -> list[tuple[HopperShape, Limits, str, int]]:
    """Shapes with their limits, name suffixes and ranks: those that measured best (`tune.py`), else the table's.

    The first has no limits: it answers what no other does. A later one, with a coarser tile, is for lengths from those
    on at which it was measured best, while there are enough tiles that the last round of them does not weigh.
    """
    rules = json.loads(TUNING.read_text())["rules"] if TUNING.exists() else []
    rules = [rule for rule in rules if (rule["head_dim"], rule["band"]) == (head_dim, band)]
    shapes = [HopperShape(**rule["shape"]) for rule in rules] or [HOPPER_SHAPES[head_dim]]
    limits: list[Limits] = [{}]
    for rule in rules[1:]:
        limits.append({"seq_len_q": (rule["limits"]["seq_len_q"][0], MAX_SIZE), "num_tiles": (5 * SMS // 2, MAX_SIZE)})
    return list(zip(shapes, limits, _suffixes(shapes), range(len(shapes)), strict=True))


def _suffixes(shapes: list[HopperShape]) -> list[str]:
    """What tells the builds apart: nothing if there is one, else their query rows, else all that they are."""
    forms = ([""] * len(shapes), [f".q{shape.rows}" for shape in shapes], [f".{shape.slug}" for shape in shapes])
    return next(suffixes for suffixes in forms if len(set(suffixes)) == len(shapes))


def _hopper(arch: str) -> list[Spec]:
    """The Gluon kernel, where there are TMA, WGMMA and the register reallocation it needs."""
    if arch != "sm_90a":
        return []
    kinds = [(head_dim, band, dtype) for head_dim in HOPPER_SHAPES for band in (False, True) for dtype in ELEMENT]
    whole = [hopper(dtype, d, band, *build) for d, band, dtype in kinds for build in _hopper_builds(d, band)]
    return whole + [hopper_split(dtype, d, band) for d, band, dtype in kinds if d in SPLIT_HEAD_DIMS]


# --- the whole matrix ---


FAMILIES = {"portable": _portable, "hopper": _hopper}


def specs(arch: str, only: str | None = None) -> list[Spec]:
    """Every variant of one architecture (of one family), similar ones next to each other."""
    return [spec for family, matrix in FAMILIES.items() if only in (None, family) for spec in matrix(arch)]
