"""Attention forward, portable: one Triton kernel for every GPU since sm_80.

    out = softmax(scale * query @ key^T + attn_mask, over the keys a row sees) @ value

The softmax is computed online, one key tile at a time, in base 2 and float32 (Milakov & Gimelshein 2018, arXiv
1805.02867), with the loop order of FlashAttention-2 (Dao 2023, arXiv 2307.08691): a program owns one tile of query
rows and walks the key tiles these rows see.

No branch, address or predicate depends on what a tensor holds; only on sizes, strides and the program's index.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _reciprocal(x):
    # A division would guard instructions by its operands. At most 1 ulp off, for normal numbers.
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _log(x):
    # As would the library's logarithm. At most 2^-22 off, or 2^-22 of the result if that is larger.
    log2 = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return log2 * LN_2


@triton.jit
def _tiles(n, BLOCK: tl.constexpr):
    """ceil(n / BLOCK), also for n near 2^31."""
    return n // BLOCK + tl.minimum(n % BLOCK, 1)


@triton.jit
def _visible_tiles(
    row_first, row_last, band_lo, band_hi, seq_len_k,
    BAND: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Key tiles that some row of the query tile sees, [begin, end), and those that all its rows see whole, [full_begin,
    full_end). begin <= full_begin <= full_end <= end."""
    if BAND:
        begin = tl.maximum(row_first + band_lo, 0) // BLOCK_K
        end = _tiles(tl.maximum(tl.minimum(row_last + band_hi, seq_len_k - 1) + 1, 0), BLOCK_K)
        end = tl.maximum(end, begin)
        full_begin = tl.minimum(_tiles(tl.maximum(row_last + band_lo, 0), BLOCK_K), end)
        full_end = tl.maximum(tl.minimum(row_first + band_hi, seq_len_k - 1) + 1, 0) // BLOCK_K
        full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    else:
        begin = 0
        full_begin = 0
        full_end = seq_len_k // BLOCK_K
        end = _tiles(seq_len_k, BLOCK_K)
    return begin, full_begin, full_end, end


@triton.jit
def _load(at, first, row_ok, dim_ok, ROWS_MASKED: tl.constexpr, DIMS_MASKED: tl.constexpr):
    """The tile that starts at row `first`; what lies outside the tensor reads as 0 and is never touched.

    at: (element (0, 0), offsets within a tile, stride from row to row)."""
    pointers = at[0] + first.to(tl.int64) * at[2] + at[1]
    if ROWS_MASKED and DIMS_MASKED:
        tile = tl.load(pointers, mask=row_ok[:, None] & dim_ok[None, :], other=0.0)
    elif ROWS_MASKED:
        tile = tl.load(pointers, mask=row_ok[:, None], other=0.0)
    elif DIMS_MASKED:
        tile = tl.load(pointers, mask=dim_ok[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _attend(
    acc, row_sum, row_max, query, tile, key_at, value_at, mask_at, dims_ok, rows, rows_ok, keys,
    row_first, seq_len_k, band_lo, band_hi, scale,
    BAND: tl.constexpr, ATTN_MASK: tl.constexpr, EDGE: tl.constexpr, PADDED: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """One key tile: scores, online softmax, and the weighted sum of values.

    key_at, value_at, mask_at: (first element of the head, offsets within a tile, stride from key to key).
    EDGE: some row may not see some key of the tile. Otherwise the softmax scale is folded into the exponent, one fused
    multiply-add per score. row_max is in units of the exponent: base 2, or natural when the mask is additive, because
    multiplying a mask of -3.4e38 by log2(e) would make it -inf.
    """
    start = tile * BLOCK_K
    keys_ok = keys < seq_len_k - start
    key = _load(key_at, start, keys_ok, dims_ok[0], EDGE, PADDED)
    scores = tl.dot(query, tl.trans(key))
    if EDGE:
        scores = scores * scale
        last = seq_len_k - 1 - start
        if BAND:
            first_seen = rows + (row_first - start + band_lo)
            last_seen = tl.minimum(rows + (row_first - start + band_hi), last)
            visible = (keys[None, :] >= first_seen[:, None]) & (keys[None, :] <= last_seen[:, None])
        else:
            visible = (keys <= last)[None, :]
        if ATTN_MASK != "none":
            in_bounds = rows_ok[:, None] & keys_ok[None, :]
            mask = tl.load(mask_at[0] + start.to(tl.int64) * mask_at[2] + mask_at[1], mask=in_bounds, other=0)
            if ATTN_MASK == "bool":
                visible = visible & (mask != 0)
            else:
                scores = scores + mask.to(tl.float32)
        scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    # A row that has seen no key yet has the maximum -inf, and -inf - -inf would be NaN.
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    if ATTN_MASK == "additive":
        weights = tl.math.exp2((scores - pivot[:, None]) * LOG2_E)
        decay = tl.math.exp2((row_max - pivot) * LOG2_E)
    elif EDGE:
        weights = tl.math.exp2(scores - pivot[:, None])
        decay = tl.math.exp2(row_max - pivot)
    else:
        weights = tl.math.exp2(scores * scale - pivot[:, None])
        decay = tl.math.exp2(row_max - pivot)
    row_sum = row_sum * decay + tl.sum(weights, 1)
    value = _load(value_at, start, keys_ok, dims_ok[1], EDGE, PADDED)
    acc = tl.dot(weights.to(value.dtype), value, acc * decay[:, None])
    return acc, row_sum, new_max


@triton.jit
def attention_forward(
    q, k, v, out, lse, attn_mask,
    q_stride_batch, q_stride_head, q_stride_seq,
    k_stride_batch, k_stride_head, k_stride_seq,
    v_stride_batch, v_stride_head, v_stride_seq,
    out_stride_batch, out_stride_head, out_stride_seq,
    mask_stride_batch, mask_stride_head, mask_stride_query, mask_stride_key,
    num_heads_q, group, seq_len_q, seq_len_k, head_dim_qk, head_dim_v, band_lo, band_hi, scale,
    BAND: tl.constexpr, ATTN_MASK: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Attention of one tile of BLOCK_Q query rows of one head.

    q (batch, num_heads_q, seq_len_q, head_dim_qk), k (batch, num_heads_kv, seq_len_k, head_dim_qk), v (batch,
    num_heads_kv, seq_len_k, head_dim_v) and out (batch, num_heads_q, seq_len_q, head_dim_v) are float16 or bfloat16
    with any strides (in elements) and a contiguous last dimension. Query head h reads key head h // group.
    lse (batch, num_heads_q, seq_len_q), contiguous float32, gets log(sum(exp(score))); null when not wanted.

    BAND: row i sees key j iff i + band_lo <= j <= i + band_hi; otherwise every row sees every key.
    ATTN_MASK: "none"; "bool", bytes, non-zero where the key is visible; or "additive", added to the scaled scores.
    The mask has strides for batch, head, query and key, 0 where it broadcasts.
    PADDED: head_dim_qk or head_dim_v may be less than BLOCK_D.
    scale is the softmax scale times log2(e), or the plain softmax scale when the mask is additive. Any sign, and 0.

    A row that sees no key gets 0, and -inf in lse. Grid: cdiv(seq_len_q, BLOCK_Q) * num_heads_q * batch, 1-D.
    """
    num_tiles = _tiles(seq_len_q, BLOCK_Q)
    pid = tl.program_id(0)
    # Neighbours share a key head, hence the L2 cache. With a band, later rows tend to see more keys: longest first.
    tile_q = pid % num_tiles
    if BAND:
        tile_q = num_tiles - 1 - tile_q
    head = (pid // num_tiles) % num_heads_q
    batch = (pid // num_tiles // num_heads_q).to(tl.int64)
    head_kv = (head // group).to(tl.int64)
    row_first = tile_q * BLOCK_Q
    rows_left = seq_len_q - row_first

    rows = tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_K)
    dims = tl.arange(0, BLOCK_D)
    rows_ok = rows < rows_left
    dims_ok = (dims < head_dim_qk, dims < head_dim_v)

    head_q = head.to(tl.int64)
    query_at = (
        q + batch * q_stride_batch + head_q * q_stride_head,
        rows[:, None].to(tl.int64) * q_stride_seq + dims[None, :],
        q_stride_seq,
    )
    key_at = (
        k + batch * k_stride_batch + head_kv * k_stride_head,
        keys[:, None].to(tl.int64) * k_stride_seq + dims[None, :],
        k_stride_seq,
    )
    value_at = (
        v + batch * v_stride_batch + head_kv * v_stride_head,
        keys[:, None].to(tl.int64) * v_stride_seq + dims[None, :],
        v_stride_seq,
    )
    if ATTN_MASK == "none":
        mask_at = (None, None, None)
    else:
        mask_base = attn_mask + batch * mask_stride_batch + head_q * mask_stride_head
        mask_at = (
            mask_base + row_first.to(tl.int64) * mask_stride_query,
            rows[:, None].to(tl.int64) * mask_stride_query + keys[None, :].to(tl.int64) * mask_stride_key,
            mask_stride_key,
        )

    query = _load(query_at, row_first, rows_ok, dims_ok[0], True, PADDED)
    # A negative scale moves its sign, exactly, to the query, so that the largest score is also the largest scaled one.
    query = tl.where(scale < 0.0, -query, query)
    scale = tl.abs(scale)

    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    row_last = row_first + tl.minimum(rows_left, BLOCK_Q) - 1
    begin, full_begin, full_end, end = _visible_tiles(row_first, row_last, band_lo, band_hi, seq_len_k, BAND, BLOCK_K)
    if ATTN_MASK == "none":
        for tile in tl.range(full_begin, full_end):
            acc, row_sum, row_max = _attend(
                acc, row_sum, row_max, query, tile, key_at, value_at, mask_at, dims_ok, rows, rows_ok, keys,
                row_first, seq_len_k, band_lo, band_hi, scale, BAND, ATTN_MASK, False, PADDED, BLOCK_K
            )  # fmt: skip
    else:  # the mask must be read in every tile
        full_begin = begin
        full_end = begin
    before = full_begin - begin
    for i in tl.range(0, before + (end - full_end)):
        tile = tl.where(i < before, begin + i, full_end + i - before)
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, query, tile, key_at, value_at, mask_at, dims_ok, rows, rows_ok, keys,
            row_first, seq_len_k, band_lo, band_hi, scale, BAND, ATTN_MASK, True, PADDED, BLOCK_K
        )  # fmt: skip

    # Either 0 or at least the 1 that the largest score adds, so that neither approximation meets a subnormal.
    sum_or_1 = tl.where(row_sum == 0.0, 1.0, row_sum)
    acc = acc * _reciprocal(sum_or_1)[:, None]
    out_base = out + batch * out_stride_batch + head_q * out_stride_head + row_first.to(tl.int64) * out_stride_seq
    out_pointers = out_base + rows[:, None].to(tl.int64) * out_stride_seq + dims[None, :]
    if PADDED:
        tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=rows_ok[:, None] & dims_ok[1][None, :])
    else:
        tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=rows_ok[:, None])
    if ATTN_MASK == "additive":
        log_sum = row_max + _log(sum_or_1)
    else:
        log_sum = row_max * LN_2 + _log(sum_or_1)
    log_sum = tl.where(row_sum == 0.0, float("-inf"), log_sum)
    lse_rows = tl.where(lse.to(tl.int64) != 0, rows_left, 0)
    lse_base = lse + (batch * num_heads_q + head) * seq_len_q + row_first
    tl.store(lse_base + rows, log_sum, mask=rows < lse_rows)
