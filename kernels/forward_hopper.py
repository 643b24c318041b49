"""Attention forward for Hopper (sm_90a): TMA loads, asynchronous WGMMA, specialised warps.

The tiling and the online softmax are FlashAttention-2's (Dao, arXiv 2307.08691). One producer warp that feeds consumer
warpgroups through rings of tiles, Q K^T of the next key block issued before P V of this one, and the hand-over of the
tensor cores between two warpgroups are FlashAttention-3's (Shah et al., arXiv 2407.08608).

A CTA computes tiles of `2 * ROWS` query rows of one head: each of two consumer warpgroups owns `ROWS` of them, and both
read the same key and value tiles. Key blocks are walked from the last to the first. Control flow, addresses and
predicates depend on shapes and on the band, never on tensor values.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

CONSUMERS = gl.constexpr(2)
WARPS = gl.constexpr(4)  # of a warpgroup
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.aggregate
class Ring:
    """Shared-memory tiles that the producer fills in turn and consumers hand back.

    `n` counts fills since the start of the kernel: fill `n` lives in stage `n % stages`, and is use `n // stages` of that
    stage's two barriers, whose phase is the parity of the use.
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    stages: gl.constexpr

    @gluon.jit
    def fill(self, desc, batch, head, row, n):
        stage = n % self.stages
        # Waiting for the phase before the first one returns at once: every stage starts empty.
        mbarrier.wait(self.empty.index(stage), ((n // self.stages) & 1) ^ 1)
        mbarrier.expect(self.full.index(stage), desc.block_type.nbytes)
        tma.async_load(desc, [batch, head, row, 0], self.full.index(stage), self.tiles.index(stage))

    @gluon.jit
    def wait(self, n):
        mbarrier.wait(self.full.index(n % self.stages), (n // self.stages) & 1)

    @gluon.jit
    def tile(self, n):
        """Fill `n` as a matrix (rows, head_dim)."""
        tile = self.tiles.index(n % self.stages)
        return tile.reshape([tile.shape[2], tile.shape[3]])

    @gluon.jit
    def release(self, n):
        # One arrival per warp. `mbarrier.arrive` would first synchronise the whole warpgroup.
        gl.inline_asm(
            "{ .reg .pred p; elect.sync _|p, 0xffffffff; @p mbarrier.arrive.shared::cta.b64 _, [$0]; }",
            "r",
            [self.empty.index(n % self.stages)],
        )


@gluon.jit
def _ring(desc, stages: gl.constexpr, readers: gl.constexpr) -> Ring:
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(desc.dtype, [stages] + desc.block_type.shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], layout)
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], layout)
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=readers * WARPS)
    return Ring(tiles, full, empty, stages)


@gluon.aggregate
class Problem:
    """What every partition knows: sizes, and which keys a query row sees.

    With `BAND`, row `i` sees key `j` iff `i + band_lo <= j <= i + band_hi`; otherwise it sees every key.
    """

    seq_len_q: gl.tensor
    seq_len_k: gl.tensor
    num_heads_q: gl.tensor
    group: gl.tensor
    tiles_query: gl.tensor
    num_tiles: gl.tensor
    band_lo: gl.tensor
    band_hi: gl.tensor
    BAND: gl.constexpr
    ROWS: gl.constexpr
    KEYS: gl.constexpr

    @gluon.jit
    def tile(self, t):
        """Tile `t`: its head counted through all batches, first query row, last key block's first key, key blocks."""
        head = t // self.tiles_query
        m = t % self.tiles_query
        if self.BAND:
            # Under a causal mask the last rows see the most keys: a head's longest tiles start first.
            m = self.tiles_query - 1 - m
        row = m * (CONSUMERS * self.ROWS)
        begin = m * 0
        keys = self.seq_len_k
        if self.BAND:
            last_row = gl.minimum(row + CONSUMERS * self.ROWS, self.seq_len_q) - 1
            begin = gl.maximum(row + self.band_lo, 0) // self.KEYS
            keys = gl.maximum(gl.minimum(last_row + self.band_hi + 1, self.seq_len_k), 0)
        end = (keys + self.KEYS - 1) // self.KEYS
        # Rows that see no key visit one block past the last key, which TMA fills with zeros: every tile has a step.
        begin = gl.where(begin < end, begin, self.seq_len_k // self.KEYS + 1)
        end = gl.maximum(end, begin + 1)
        return head, row, (end - 1) * self.KEYS, end - begin

    @gluon.jit
    def mask(self, s, row, col, LAYOUT: gl.constexpr):
        """Scores `s` (ROWS, KEYS) f32 from (row, col) on, with -inf where a row does not see the key.

        Both branches are taken by the whole CTA or not at all, and only for blocks that cross an edge of the band.
        """
        rows = gl.expand_dims(row + gl.arange(0, self.ROWS, layout=gl.SliceLayout(1, LAYOUT)), 1)
        cols = gl.expand_dims(col + gl.arange(0, self.KEYS, layout=gl.SliceLayout(0, LAYOUT)), 0)
        end = rows * 0 + self.seq_len_k
        first_end = self.seq_len_k
        if self.BAND:
            end = gl.minimum(rows + self.band_hi + 1, end)
            first_end = gl.minimum(row + self.band_hi + 1, first_end)
        if col + self.KEYS > first_end:
            s = gl.where(cols < end, s, float("-inf"))
        if self.BAND:
            if col < row + self.ROWS - 1 + self.band_lo:
                s = gl.where(cols >= rows + self.band_lo, s, float("-inf"))
        return s


@gluon.jit
def _produce(p, q_desc, k_desc, v_desc, q, k, v):
    """The producer warp: issue the loads of every tile, in the order in which the consumers need them."""
    blocks = p.num_tiles * 0  # key blocks of the tiles before this one
    tiles = p.num_tiles * 0
    for t in range(gl.program_id(0), p.num_tiles, gl.num_programs(0)):
        head, row, col, steps = p.tile(t)
        batch = head // p.num_heads_q
        head_q = head % p.num_heads_q
        head_kv = head_q // p.group
        for wg in gl.static_range(CONSUMERS):
            q.fill(q_desc, batch, head_q, row + wg * p.ROWS, tiles * CONSUMERS + wg)
        k.fill(k_desc, batch, head_kv, col, blocks)
        for i in range(1, steps):
            k.fill(k_desc, batch, head_kv, col - i * p.KEYS, blocks + i)
            v.fill(v_desc, batch, head_kv, col - (i - 1) * p.KEYS, blocks + i - 1)
        v.fill(v_desc, batch, head_kv, col - (steps - 1) * p.KEYS, blocks + steps - 1)
        blocks += steps
        tiles += 1


@gluon.jit
def _lane_sum(p):
    """Row sums of `p` (ROWS, KEYS) as (ROWS, 4): one for each of the four lanes that share a row, with no shuffle.

    In the accumulator layout of WGMMA a lane holds columns `8 * j + 2 * lane` and the one after, for every j.
    """
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _softmax(s, m, scale_log2):
    """One step of the online softmax on raw scores `s` (ROWS, KEYS) f32.

    `m` (ROWS,) is the running maximum of the raw scores. Returns the exponentials, the new `m`, and the factor by which
    all that was accumulated under the old one has to shrink.
    """
    m_new = gl.maximum(m, gl.max(s, 1))
    shift = m_new * scale_log2
    p = gl.exp2(s * scale_log2 - gl.expand_dims(shift, 1))
    return p, m_new, gl.exp2(m * scale_log2 - shift)


@gluon.jit
def _log2(x):
    # The library's logarithm branches on its argument.
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def _scale_rows(x, factor):
    """`x` (rows, columns) times `factor` (rows,), which every thread already holds for its rows."""
    return x * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout), assert_trivial=True), 1)


@gluon.jit
def _take_turn(WG: gl.constexpr):
    """Wait until the other warpgroup has issued its matrix products."""
    if WG == 0:
        gl.inline_asm("bar.sync 8, 256;")
    else:
        gl.inline_asm("bar.sync 9, 256;")


@gluon.jit
def _pass_turn(WG: gl.constexpr):
    if WG == 0:
        gl.inline_asm("bar.arrive 9, 256;")
    else:
        gl.inline_asm("bar.arrive 8, 256;")


@gluon.jit
def _step(o, prob, m, l, n, row, col, p, q, k, v, scale_log2, WG: gl.constexpr,
          PING_PONG: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr):
    """Scores of key block `n` and the product of the previous block's `prob` with its values, both in flight."""
    k.wait(n)
    if PING_PONG:
        _take_turn(WG)
    s = warpgroup_mma(q, k.tile(n).permute([1, 0]), gl.zeros([p.ROWS, p.KEYS], gl.float32, S_LAYOUT), use_acc=False,
                      is_async=True)
    o = warpgroup_mma(prob, v.tile(n - 1), o, is_async=True)
    if PING_PONG:
        _pass_turn(WG)
    s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
    k.release(n)
    if p.BAND:  # otherwise only a tile's first block can reach beyond the last key
        s = p.mask(s, row, col, S_LAYOUT)
    prob, m, alpha = _softmax(s, m, scale_log2)
    l = _scale_rows(l, alpha) + _lane_sum(prob)
    prob = gl.convert_layout(prob.to(k.tiles.dtype), P_LAYOUT, assert_trivial=True)
    # The next product's wait comes here, before the wait for the current one: it starts a new basic block, across which
    # ptxas does not hoist the latter above the exponentials.
    v.wait(n)
    o = warpgroup_mma_wait(num_outstanding=0, deps=[o])
    v.release(n - 1)
    return _scale_rows(o, alpha), prob, m, l


@gluon.jit
def _consume(p, out_desc, lse, q_ring, k, v, out_tiles, scale_log2, WG: gl.constexpr, PING_PONG: gl.constexpr,
             OWN_OUT: gl.constexpr):
    """Consumer warpgroup `WG`: rows [WG * ROWS, (WG + 1) * ROWS) of every tile."""
    D: gl.constexpr = out_desc.block_type.shape[3]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, p.KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    # Below every score that is not -inf after scaling, yet finite before and after: a row that sees nothing needs no
    # special case, its exponentials are 0.
    lowest = -3.0e38 / gl.maximum(scale_log2, 1.0)
    blocks = p.num_tiles * 0
    tile = p.num_tiles * 0 + WG
    if PING_PONG:
        if WG == 1:
            _pass_turn(WG)
    for t in range(gl.program_id(0), p.num_tiles, gl.num_programs(0)):
        head, row, col, steps = p.tile(t)
        row += WG * p.ROWS
        o = gl.zeros([p.ROWS, D], gl.float32, O_LAYOUT)
        m = gl.zeros([p.ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT)) + lowest
        q_ring.wait(tile)
        q = q_ring.tile(tile)
        k.wait(blocks)
        s = warpgroup_mma(q, k.tile(blocks).permute([1, 0]), gl.zeros([p.ROWS, p.KEYS], gl.float32, S_LAYOUT),
                          use_acc=False, is_async=True)
        s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
        k.release(blocks)
        prob, m, alpha = _softmax(p.mask(s, row, col, S_LAYOUT), m, scale_log2)
        l = _lane_sum(prob)
        prob = gl.convert_layout(prob.to(k.tiles.dtype), P_LAYOUT, assert_trivial=True)
        v.wait(blocks)
        for i in range(1, steps):
            o, prob, m, l = _step(o, prob, m, l, blocks + i, row, col - i * p.KEYS, p, q, k, v, scale_log2, WG, PING_PONG,
                                  S_LAYOUT, P_LAYOUT)
        if OWN_OUT:
            q_ring.release(tile)
        blocks += steps
        o = warpgroup_mma(prob, v.tile(blocks - 1), o, is_async=True)
        o = warpgroup_mma_wait(num_outstanding=0, deps=[o])
        v.release(blocks - 1)

        l = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, S_LAYOUT), assert_trivial=True)
        l_safe = gl.where(l == 0.0, 1.0, l)
        if lse.to(gl.int64) != 0:
            value = gl.where(l == 0.0, float("-inf"), (m * scale_log2 + _log2(l_safe)) * LN_2)
            rows = row + gl.arange(0, p.ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
            gl.store(lse + head.to(gl.int64) * p.seq_len_q + rows, value, mask=rows < p.seq_len_q)
        o = _scale_rows(o, 1.0 / l_safe)
        if OWN_OUT:
            out = out_tiles.index(WG)
            tma.store_wait(0)
            gl.barrier()
        else:
            out = q_ring.tiles.index(tile % CONSUMERS)
        out.reshape([p.ROWS, D]).store(o.to(out.dtype))
        fence_async_shared()
        tma.async_store(out_desc, [head // p.num_heads_q, head % p.num_heads_q, row, 0], out)
        if not OWN_OUT:
            tma.store_wait(0)
            gl.barrier()
            q_ring.release(tile)
        tile += CONSUMERS
    if PING_PONG:
        if WG == 0:
            _take_turn(WG)
    tma.store_wait(0)


@gluon.jit
def attention_forward_hopper(q, k, v, out, lse, band_lo, band_hi, scale_log2, BAND: gl.constexpr, STAGES: gl.constexpr,
                             PING_PONG: gl.constexpr, OWN_OUT: gl.constexpr):
    """out = softmax(scale * q k^T) v over `(batch, heads, seq, head_dim)` f16 or bf16, and its log-sum-exp."""
    q_ring = _ring(q, CONSUMERS, 1)
    k_ring = _ring(k, STAGES, CONSUMERS)
    v_ring = _ring(v, STAGES, CONSUMERS)
    if OWN_OUT:
        out_tiles = gl.allocate_shared_memory(out.dtype, [CONSUMERS] + out.block_type.shape, out.layout)
    else:
        out_tiles = q_ring.tiles
    fence_async_shared()
    ROWS: gl.constexpr = q.block_type.shape[2]
    tiles_query = (q.shape[2] + (CONSUMERS * ROWS - 1)) // (CONSUMERS * ROWS)
    p = Problem(q.shape[2], k.shape[2], q.shape[1], q.shape[1] // k.shape[1], tiles_query,
                tiles_query * q.shape[1] * q.shape[0], gl.to_tensor(band_lo), gl.to_tensor(band_hi), BAND, ROWS,
                k.block_type.shape[2])
    gl.warp_specialize([
        (_consume, (p, out, lse, q_ring, k_ring, v_ring, out_tiles, scale_log2, 0, PING_PONG, OWN_OUT)),
        (_consume, (p, out, lse, q_ring, k_ring, v_ring, out_tiles, scale_log2, 1, PING_PONG, OWN_OUT)),
        (_produce, (p, q, k, v, q_ring, k_ring, v_ring)),
    ], [4, 1], [240, 24])
