"""Puts the partial results of a forward whose keys were split together (Dao et al., Flash-Decoding, 2023)."""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attention_combine(
    partial,
    out,
    lse,
    out_stride_batch,
    out_stride_head,
    out_stride_seq,
    num_tiles,
    tiles_query,
    num_heads_q,
    seq_len_q,
    head_dim_v,
    splits,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = sum of the parts' outputs, weighted by their exponential sums; lse = the natural logarithm of all sums.

    partial: f32, the parts' normalised outputs (heads, splits, seq_len_q, BLOCK_D), then their base-2 log-sum-exps
    (heads, splits, seq_len_q), -inf where a part saw nothing. heads counts those of all batches.
    out: (batch, num_heads_q, seq_len_q, head_dim_v), f16 or bf16. lse: (heads, seq_len_q) f32, or null.
    The grid is num_tiles * (TILE / ROWS) CTAs of ROWS rows each, where num_tiles = heads * tiles_query.
    """
    pid = tl.program_id(0)
    tile = pid // (TILE // ROWS)
    head = tile // tiles_query
    row = (tile % tiles_query) * TILE + pid % (TILE // ROWS) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    live = row < seq_len_q
    heads = num_tiles // tiles_query
    sums = partial + (heads * splits).to(tl.int64) * seq_len_q * BLOCK_D

    m = tl.full([ROWS], float("-inf"), tl.float32)
    for part in range(splits):
        at = (head * splits + part).to(tl.int64) * seq_len_q + row
        m = tl.maximum(m, tl.load(sums + at, mask=live, other=float("-inf")))
    # Where no part saw anything every weight is 0.
    m = tl.maximum(m, -3.0e38)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for part in range(splits):
        at = (head * splits + part).to(tl.int64) * seq_len_q + row
        weight = tl.exp2(tl.load(sums + at, mask=live, other=float("-inf")) - m)
        total += weight
        o = tl.load(partial + at[:, None] * BLOCK_D + column[None, :], mask=live[:, None], other=0.0)
        acc += weight[:, None] * o

    inverse = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [total], tl.float32, True, 1)
    acc *= tl.where(total == 0.0, 0.0, inverse)[:, None]
    base = out + (head // num_heads_q) * out_stride_batch + (head % num_heads_q) * out_stride_head
    keep = live[:, None] & (column < head_dim_v)[None, :]
    tl.store(base + row[:, None] * out_stride_seq + column[None, :], acc.to(out.dtype.element_ty), mask=keep)
    if lse.to(tl.int64) != 0:
        log = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [total], tl.float32, True, 1)
        tl.store(lse + head.to(tl.int64) * seq_len_q + row, (m + log) * LN_2, mask=live)
