"""The matrix of kernel variants, as data: which kernels exist, for whom, and why.

Nothing here compiles anything and nothing here needs Triton. `compile.py` turns a `Variant` into machine code and a
manifest entry; `docs/bundle.md` says what the manifest fields mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Factor = str | int


@dataclass(frozen=True)
class When:
    """The requests a variant answers. Ranges are inclusive and of the true head_dim."""

    dtype: str
    head_dim_qk: tuple[int, int]
    head_dim_v: tuple[int, int]
    band: bool
    attn_mask: str = "none"


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
    (in its own unit) is a multiple. `sources` are the modules whose text makes this kernel: the first one defines it,
    the others hold device functions it calls.
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


# --- attention_forward, portable -----------------------------------------------------------------------------------

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


def _forward_arguments(dtype: str, head_dim: int, band: bool, mask: str, align: Alignment) -> Iterator[tuple]:
    """(argument, Triton type or constexpr, quantity or constant, divisibility) in the order of the kernel."""
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


def _forward_launch(dtype: str, head_dim: int, band: bool, mask: str, alignment: str, shape: Shape) -> Launch:
    align = ALIGNMENTS[alignment]
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
        signature={a: t for a, t, _, _ in arguments} | dict.fromkeys(blocks, "constexpr"),
        constexprs={a: value for a, t, value, _ in arguments if t == "constexpr"} | blocks,
        values={a: value for a, t, value, _ in arguments if t != "constexpr"},
        divisibility={a: div for a, t, _, div in arguments if t != "constexpr" and div > 1},
        grid=Grid(x=("tiles_query", "num_heads_q", "batch")),
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


def _forward(arch: str, dtype: str, head_dim: int, band: bool, mask: str, alignment: str, shape: Shape) -> Spec:
    align = ALIGNMENTS[alignment]
    head_dims = (head_dim, head_dim) if align.exact else (1, head_dim)
    pattern = "band" if band else "dense"
    features = pattern if mask == "none" else f"{pattern}.mask_{mask}"
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
        launches=(_forward_launch(dtype, head_dim, band, mask, alignment, shape),),
    )


def specs(arch: str) -> list[Spec]:
    """Every variant of one architecture."""
    shape = Shape(128, 64, 4, 3)
    return [
        _forward(arch, dtype, 64, band, "none", alignment, shape)
        for dtype in ("f16", "bf16")
        for band in (False, True)
        for alignment in ("exact", "aligned", "unaligned")
    ]
