"""Attention forward for Hopper (sm_90a): TMA loads, asynchronous WGMMA, specialised warps.

The tiling and the online softmax are FlashAttention-2's (Dao, arXiv 2307.08691). The producer warp that feeds consumer
warpgroups through rings of tiles, Q K^T of the next key block issued before P V of this one, and the hand-over of the
tensor cores between two warpgroups are FlashAttention-3's (Shah et al., arXiv 2407.08608).

A CTA computes tiles of `CONSUMERS * ROWS` query rows of one head: each consumer warpgroup owns `ROWS` of them, and all
read the same key and value blocks, from the last to the first. Control flow, addresses and predicates depend on shapes
and on the band, never on tensor values.
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

WARPS = gl.constexpr(4)  # of a consumer
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.aggregate
class Ring:
    """Shared-memory tiles that the producer fills in turn and that consumers hand back.

    `n` counts fills since the start of the kernel. Fill `n` lives in stage `n % stages`; it is use `n // stages` of
    that stage and of its two barriers, and the parity of the use is the phase that ends it.
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    stages: gl.constexpr

    @gluon.jit
    def fill(self, desc, batch, head, row, n):
        stage = n % self.stages
        # A stage starts empty: waiting for the end of the phase before its first one returns at once.
        mbarrier.wait(self.empty.index(stage), ((n // self.stages) & 1) ^ 1)
        mbarrier.expect(self.full.index(stage), desc.block_type.nbytes)
        tma.async_load(desc, [batch, head, row, 0], self.full.index(stage), self.tiles.index(stage))

    @gluon.jit
    def wait(self, n):
        # `mbarrier.wait` in a loop would synchronise the whole warpgroup first.
        gl.inline_asm(
            "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra WAIT; }",
            "r,r",
            [self.full.index(n % self.stages), (n // self.stages) & 1],
        )

    @gluon.jit
    def tile(self, n):
        """Fill `n` as a matrix (rows, head_dim)."""
        tile = self.tiles.index(n % self.stages)
        return tile.reshape([tile.shape[2], tile.shape[3]])

    @gluon.jit
    def release(self, n):
        # One arrival per warp; `mbarrier.arrive` would synchronise the whole warpgroup first.
        gl.inline_asm(
            "{ .reg .pred p; elect.sync _|p, 0xffffffff; @p mbarrier.arrive.shared::cta.b64 _, [$0]; }",
            "r",
            [self.empty.index(n % self.stages)],
        )


@gluon.jit
def _ring(desc, stages: gl.constexpr, readers: gl.constexpr):
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(desc.dtype, [stages] + desc.block_type.shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], layout)
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], layout)
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=readers * WARPS)
    return Ring(tiles, full, empty, stages)


@gluon.jit
def _axis(SIZE: gl.constexpr, AXIS: gl.constexpr, LAYOUT: gl.constexpr):
    """0, 1, ... along one of four axes, of size 1 in the others."""
    A: gl.constexpr = 0 if AXIS != 0 else 1
    B: gl.constexpr = 1 if AXIS > 1 else 2
    C: gl.constexpr = 2 if AXIS == 3 else 3
    x = gl.arange(0, SIZE, layout=gl.SliceLayout(A, gl.SliceLayout(B, gl.SliceLayout(C, LAYOUT))))
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(x, A), B), C)


@gluon.jit
def _quotient(x, divisor):
    """x // divisor, for numbers that are not negative: a division of those with a sign takes more instructions."""
    return (x.to(gl.uint32) // divisor.to(gl.uint32)).to(gl.int32)


@gluon.aggregate
class Order:
    """In which order the CTAs compute the tiles of a problem with a band.

    There a late tile has more keys than an early one, but the first and the last of a head together have as many as any
    other such pair. CTAs take pairs in rounds, head by head so that the keys stay in the cache. The long tile of a pair
    reads its keys from memory and the short one finds them in the cache: of every 64 CTAs one half begins with the long
    ones and the other half with the short ones, so that memory has as much to do at any time.

    The rest is dealt out tile by tile, the longest first, and back and forth: who got the longest of one round gets the
    shortest of the next (longest processing time first: Graham, 1969). That evens out what the rounds leave, but it
    reads all its keys at its beginning and finds some no longer in the cache at its end. With n pairs in a group it is
    enough for 1 - 1/n to 2 - 1/n rounds: the fewer tiles a head has, the less they differ, for each costs something
    besides its keys.

    Heads with an odd number of tiles are taken two at a time (`FOLD`), so that their tiles make pairs; else, and where
    the number of heads is odd too, the middle tile of each makes a pair with one that has no rows.
    """

    fold: gl.tensor  # heads taken at a time, 1 or 2: a group
    tiles: gl.tensor  # of a group
    rounds: gl.tensor  # of pairs
    pairs: gl.tensor  # of the rest: those of `groups` from `first_group` on, and, if `cut` > 0, of the group before
    groups: gl.tensor  # those from its pair `cut` on
    first_group: gl.tensor
    cut: gl.tensor
    full: gl.tensor  # rounds of single tiles in which every CTA takes part, and the number of tiles in one more
    last: gl.tensor


@gluon.jit
def _order(heads, tiles_query, FOLD: gl.constexpr):
    ctas = gl.num_programs(0)
    fold = 1 + (tiles_query & 1 & ~heads) if FOLD else gl.to_tensor(1)
    groups = heads // fold
    tiles = tiles_query * fold
    per_group = (tiles + 1) // 2
    pairs = groups * per_group
    rounds = gl.maximum((pairs + ctas // per_group) // ctas - 1, 0)
    pairs -= rounds * ctas
    first_group = (rounds * ctas + per_group - 1) // per_group
    cut = rounds * ctas - (first_group * per_group - per_group)
    groups -= first_group
    full = 2 * pairs // ctas
    last = 2 * pairs - full * ctas
    return Order(fold, tiles, rounds, pairs, groups, first_group, cut, full, last)


@gluon.aggregate
class Problem:
    """What every partition knows: the sizes, and which keys a query row sees.

    With `BAND`, row `i` sees key `j` iff `i + band_lo <= j <= i + band_hi`; without, it sees every key.
    """

    num_tiles: gl.tensor
    tiles_query: gl.tensor
    num_heads_q: gl.tensor
    group: gl.tensor
    seq_len_q: gl.tensor
    seq_len_k: gl.tensor
    band_lo: gl.tensor
    band_hi: gl.tensor
    splits: gl.tensor
    heads: gl.tensor  # of all batches, times splits
    order: Order
    BAND: gl.constexpr
    SPLIT: gl.constexpr
    CONSUMERS: gl.constexpr
    ROWS: gl.constexpr
    KEYS: gl.constexpr

    @gluon.jit
    def tiles(self):
        """How many tiles this CTA computes."""
        if self.BAND:
            o = self.order
            place = gl.where((o.full & 1) != 0, gl.num_programs(0) - 1 - gl.program_id(0), gl.program_id(0))
            return 2 * o.rounds + o.full + (place < o.last).to(gl.int32)
        else:
            return (self.num_tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)

    @gluon.jit
    def place(self, turn):
        """The head (of all batches) and the tile in it that this CTA computes in its turn `turn`."""
        if self.BAND:
            o = self.order
            ctas = gl.num_programs(0)
            cta = gl.program_id(0)
            # In a round: pair `x` of all groups' pairs, first its long tile or first its short one.
            x = (turn // 2) * ctas + cta
            long = ((32 * turn + cta) & 32) == 0
            # Afterwards: tile `x` of the rest in order, all long ones by the pair's place in its group, then all short
            # ones, backwards. Places below `cut` have a pair in `groups` groups, the others one more.
            again = turn - 2 * o.rounds
            r = again * ctas + gl.where((again & 1) != 0, ctas - 1 - cta, cta)
            in_rest = again >= 0
            long = gl.where(in_rest, r < o.pairs, long)
            r = gl.where(r < o.pairs, r, 2 * o.pairs - 1 - r)
            above = r - o.cut * o.groups
            width = gl.maximum(gl.where(above < 0, o.groups, o.groups + (o.cut > 0).to(gl.int32)), 1)
            x = gl.where(in_rest, gl.where(above < 0, r, above), x)
            divisor = gl.where(in_rest, width, (o.tiles + 1) // 2)
            quotient = _quotient(x, divisor)
            remainder = x - quotient * divisor
            group = gl.where(remainder < o.groups, o.first_group + remainder, o.first_group - 1)
            group = gl.where(in_rest, group, quotient)
            short_tile = gl.where(in_rest, quotient + gl.where(above < 0, 0, o.cut), remainder)
            # A band's late tiles are the long ones. In a group of two heads, tiles alternate between them.
            long_tile = o.tiles - 1 - short_tile
            tile = gl.where(long, long_tile, gl.where(short_tile == long_tile, o.tiles, short_tile))
            return group * o.fold + (tile & (o.fold - 1)), tile >> (o.fold - 1)
        else:
            t = turn * gl.num_programs(0) + gl.program_id(0)
            head = _quotient(t, self.tiles_query)
            return head, t - head * self.tiles_query

    @gluon.jit
    def tile(self, turn):
        """This turn's tile: its head, first query row, first key of its last key block, number of key blocks.

        With `SPLIT` there are `splits` tiles in the place of one, head after head: each has a part of its key blocks.
        """
        head, m = self.place(turn)
        row = m * (self.CONSUMERS * self.ROWS)
        begin = gl.to_tensor(0)
        keys = self.seq_len_k
        if self.BAND:
            last_row = gl.minimum(row + self.CONSUMERS * self.ROWS, self.seq_len_q) - 1
            begin = gl.maximum(row + self.band_lo, 0) // self.KEYS
            keys = gl.maximum(gl.minimum(last_row + self.band_hi + 1, keys), 0)
            keys = gl.where(row < self.seq_len_q, keys, 0)
        end = (keys + self.KEYS - 1) // self.KEYS
        if self.SPLIT:
            part = (gl.maximum(end - begin, 0) + self.splits - 1) // self.splits
            end -= head % self.splits * part
            begin = gl.maximum(begin, end - part)
        # Rows that see no key visit one block beyond the last key, which TMA fills with zeros: every tile has a step.
        begin = gl.where(begin < end, begin, self.seq_len_k // self.KEYS + 1)
        end = gl.maximum(end, begin + 1)
        return head, row, (end - 1) * self.KEYS, end - begin

    @gluon.jit
    def edges(self, row, col, steps):
        """Of a tile's `steps` blocks, back from the one at `col`, those that the rows from `row` on see whole: [a, b).

        1 <= a <= b <= steps: the first block counts as seen in part.
        """
        if self.BAND:
            first_end = gl.minimum(row + self.band_hi + 1, self.seq_len_k)
            last_begin = row + self.ROWS - 1 + self.band_lo
            a = (gl.maximum(col + self.KEYS - first_end, 0) + self.KEYS - 1) // self.KEYS
            b = gl.maximum(col + self.KEYS - last_begin, 0) // self.KEYS
            a = gl.minimum(gl.maximum(a, 1), steps)
            return a, gl.minimum(gl.maximum(b, a), steps)
        else:
            return gl.to_tensor(1), steps

    @gluon.jit
    def hidden(self, row, col, steps):
        """Whether the rows from `row` on see nothing of a tile's first block, the one at `col`, but others do.

        Of two warpgroups that take turns the other one decides when the next block is due.
        """
        if self.BAND and self.CONSUMERS > 2:
            end = gl.minimum(row + self.ROWS + self.band_hi, self.seq_len_k)
            return (col >= end) & (steps > 1)
        else:
            return False

    @gluon.jit
    def seen(self, row, col):
        """Whether any of the rows from `row` on sees a key from `col` on."""
        return col < gl.minimum(row + self.ROWS + self.band_hi, self.seq_len_k)

    @gluon.jit
    def partly(self, row, begin, end):
        """Whether some of the rows from `row` on do not see all keys in [begin, end)."""
        right = end > gl.minimum(row + self.band_hi + 1, self.seq_len_k)
        return right | (begin < row + self.ROWS - 1 + self.band_lo)

    @gluon.jit
    def mask(self, s, row, col):
        """Scores `s` (ROWS, keys) f32 from (row, col) on, with -inf where a row does not see a key.

        As (ROWS, keys / 8, 4, 2) the second and last index are constants of a register and the third is one of a lane,
        so that a comparison takes a single instruction, with an immediate operand.
        """
        KEYS: gl.constexpr = s.shape[1]
        x = s.reshape([self.ROWS, KEYS // 8, 4, 2])
        L: gl.constexpr = x.type.layout
        rows = _axis(self.ROWS, 0, L) + row
        keys = _axis(KEYS // 8, 1, L) * 8 + _axis(2, 3, L)
        lane = _axis(4, 2, L) * 2 + col
        if self.BAND:
            x = gl.where(keys < gl.minimum(rows + self.band_hi + 1, self.seq_len_k) - lane, x, float("-inf"))
            if col < row + self.ROWS - 1 + self.band_lo:
                x = gl.where(keys >= rows + self.band_lo - lane, x, float("-inf"))
        else:
            x = gl.where(keys < self.seq_len_k - lane, x, float("-inf"))
        return gl.convert_layout(x.reshape([self.ROWS, KEYS]), s.type.layout, assert_trivial=True)


@gluon.jit
def _begin(
    sizes,
    rings,
    BAND: gl.constexpr,
    SPLIT: gl.constexpr,
    CONSUMERS: gl.constexpr,
    QUERIES: gl.constexpr,
):
    """What every partition begins with: the problem, and the rings of queries, keys and values.

    It works the problem out from the kernel's arguments: what is handed to partitions comes through shared memory, and
    ptxas no longer knows that it is the same for all threads.
    """
    q_ring, k_ring, v_ring = rings
    num_tiles, tiles_query, num_heads_q, group, seq_len_q, seq_len_k, band_lo, band_hi, splits = sizes
    num_tiles *= splits
    heads = num_tiles // tiles_query
    problem = Problem(
        num_tiles,
        gl.to_tensor(tiles_query),
        gl.to_tensor(num_heads_q),
        group,
        seq_len_q,
        seq_len_k,
        gl.to_tensor(band_lo),
        gl.to_tensor(band_hi),
        gl.to_tensor(splits),
        heads,
        _order(heads, tiles_query, QUERIES > 1),  # at head_dim 256 the registers do not suffice for more
        BAND,
        SPLIT,
        CONSUMERS,
        q_ring.tiles.shape[3],
        k_ring.tiles.shape[3],
    )
    return problem, q_ring, k_ring, v_ring


@gluon.jit
def _produce(
    sizes,
    q_desc,
    k_desc,
    v_desc,
    rings,
    BAND: gl.constexpr,
    SPLIT: gl.constexpr,
    CONSUMERS: gl.constexpr,
    QUERIES: gl.constexpr,
):
    """The producer warp: issue every load, in the order in which the consumers need them."""
    p, q_ring, k_ring, v_ring = _begin(sizes, rings, BAND, SPLIT, CONSUMERS, QUERIES)
    blocks = gl.to_tensor(0)  # key blocks of the tiles before this one
    for turn in range(p.tiles()):
        head, row, col, steps = p.tile(turn)
        if p.SPLIT:
            head = head // p.splits
        batch = _quotient(head, p.num_heads_q)
        head_q = head - batch * p.num_heads_q
        head_kv = head_q // p.group
        # The place of a single query is free last, that of a second one first.
        if QUERIES == 1:
            k_ring.fill(k_desc, batch, head_kv, col, blocks)
        for wg in gl.static_range(p.CONSUMERS):
            q_ring.fill(q_desc, batch, head_q, row + wg * p.ROWS, turn * p.CONSUMERS + wg)
        if QUERIES > 1:
            k_ring.fill(k_desc, batch, head_kv, col, blocks)
        for i in range(1, steps):
            k_ring.fill(k_desc, batch, head_kv, col - i * p.KEYS, blocks + i)
            v_ring.fill(v_desc, batch, head_kv, col - (i - 1) * p.KEYS, blocks + i - 1)
        blocks += steps
        v_ring.fill(v_desc, batch, head_kv, col - (steps - 1) * p.KEYS, blocks - 1)


@gluon.jit
def _halves(x):
    """The left and the right half of the columns of `x` (ROWS, columns): other registers of the same threads."""
    HALF: gl.constexpr = x.shape[1] // 2
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HALF, 16])
    left, right = x.reshape([x.shape[0], 2, HALF]).permute([0, 2, 1]).split()
    return gl.convert_layout(left, L, assert_trivial=True), gl.convert_layout(right, L, assert_trivial=True)


@gluon.jit
def _joined(left, right, LAYOUT: gl.constexpr):
    """The inverse of `_halves`."""
    x = gl.join(left, right).permute([0, 2, 1]).reshape([left.shape[0], 2 * left.shape[1]])
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def _lane_sums(p):
    """Row sums of `p` (ROWS, KEYS) as (ROWS, 4): a part for each of the four lanes that share a row, with no shuffle.

    In the accumulator layout of WGMMA, lane `i` of a row holds the columns `8 * j + 2 * i` and `8 * j + 2 * i + 1`.
    """
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _scale_rows(x, factor):
    """`x` (rows, columns) times `factor` (rows,): every thread already holds the factors of its rows."""
    return x * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout), assert_trivial=True), 1)


@gluon.jit
def _log2(x):
    # The library's logarithm branches on its argument.
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def _exp2_here(x):
    """`gl.exp2`, but no compiler moves it past a wait."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, False, 1)


# Ping-pong: a warpgroup issues its matrix products while the other one computes exponentials. Named barrier 8 is the
# turn of consumer 0, barrier 9 that of consumer 1; Triton uses the low numbers, one per partition.


@gluon.jit
def _take_turn(WG: gl.constexpr):
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


@gluon.aggregate
class Query:
    """A query tile (ROWS, head_dim) in shared memory, and its first `HELD` columns in registers too.

    WGMMA with both operands in shared memory takes nearly all of its bandwidth, and the loads want some.
    """

    tile: gl.shared_memory_descriptor
    held: gl.tensor
    HELD: gl.constexpr
    LAYOUT: gl.constexpr

    @gluon.jit
    def scores(self, k):
        """Start S = Q K^T, in f32, for `k` (KEYS, head_dim) in shared memory."""
        s = gl.zeros([self.tile.shape[0], k.shape[0]], gl.float32, self.LAYOUT)
        D: gl.constexpr = self.tile.shape[1]
        if self.HELD > 0:
            s = warpgroup_mma(self.held, k.slice(0, self.HELD, 1).permute([1, 0]), s, use_acc=False, is_async=True)
        if self.HELD < D:
            rest = self.tile.slice(self.HELD, D - self.HELD, 1)
            k = k.slice(self.HELD, D - self.HELD, 1).permute([1, 0])
            s = warpgroup_mma(rest, k, s, use_acc=self.HELD > 0, is_async=True)
        return s


@gluon.jit
def _query(tile, HELD: gl.constexpr, LAYOUT: gl.constexpr):
    if HELD > 0:
        operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
        held = tile.slice(0, HELD, 1).load(operand)
    else:
        held = gl.to_tensor(0)
    return Query(tile, held, HELD, LAYOUT)


@gluon.jit
def _exponentials(s, m, scale_log2):
    """2 ** (scale_log2 * s - m) for scores `s` (ROWS, KEYS) and scaled row maxima `m` (ROWS,), f32."""
    return gl.exp2(s * scale_log2 - gl.expand_dims(m, 1))


@gluon.jit
def _step(
    p,
    k_ring,
    v_ring,
    q,
    o,
    l,
    m,
    prob,
    n,
    row,
    col,
    scale_log2,
    MASK: gl.constexpr,
    WG: gl.constexpr,
):
    """Scores and exponentials of key block `n`, and the product of block n - 1's exponentials `prob` with its values.

    One step of the online softmax: `m` is each row's scaled maximum, `l` (ROWS, 4) its partial sums, `o` its output so
    far. The factor by which these shrink is 1 to the last bit while the maximum stays, so that nothing drifts over
    thousands of blocks.
    """
    TURNS: gl.constexpr = p.CONSUMERS == 2
    EARLY: gl.constexpr = v_ring.tiles.shape[4] <= 128
    k_ring.wait(n)
    if TURNS:
        _take_turn(WG)
    s = q.scores(k_ring.tile(n))
    if TURNS:
        v_ring.wait(n - 1)
    o = warpgroup_mma(prob, v_ring.tile(n - 1), o, is_async=True)
    if TURNS:
        _pass_turn(WG)
    s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
    k_ring.release(n)
    if MASK:
        s = p.mask(s, row, col)
    m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
    # With the factor at hand, the rescaling of `o` fills the gaps between the exponentials, which else it follows. At
    # head_dim 256 it is so long that it would fill them with nothing else.
    if EARLY:
        alpha = _exp2_here(m - m_new)
    # A wait ends a basic block: without one ptxas moves the wait for `o` up, before the maxima. By now that product is
    # done. Warpgroups that take turns wait for the values in use, which are long there; the others for the next ones,
    # which saves them the wait before the product.
    if TURNS:
        v_ring.wait(n - 1)
    else:
        v_ring.wait(n)
    o = warpgroup_mma_wait(num_outstanding=0, deps=[o])
    v_ring.release(n - 1)
    if not EARLY:
        alpha = gl.exp2(m - m_new)
    e = _exponentials(s, m_new, scale_log2)
    l = _scale_rows(l, alpha) + _lane_sums(e)
    prob = gl.convert_layout(e.to(k_ring.tiles.dtype), prob.type.layout, assert_trivial=True)
    return _scale_rows(o, alpha), l, m_new, prob


@gluon.jit
def _finish(p, out_desc, lse, out, o, l, m, head, row):
    """Store the rows from `row` on: the sums `o` (ROWS, head_dim) over their weights `l` (ROWS, 4), and their LSE."""
    l = gl.convert_layout(gl.sum(l, 1), m.type.layout, assert_trivial=True)
    if p.SPLIT:
        _finish_part(p, lse, o, l, m, head, row)
    else:
        _finish_tile(p, out_desc, lse, out, o, l, m, head, row)


@gluon.jit
def _finish_part(p, partial, o, l, m, head, row):
    """As f32 into `partial`: the outputs (heads * splits, seq_len_q, head_dim) of the parts, then their base-2 LSE."""
    D: gl.constexpr = o.shape[1]
    first = head.to(gl.int64) * p.seq_len_q + row
    rows = gl.arange(0, p.ROWS, layout=m.type.layout)
    sums = partial + p.heads.to(gl.int64) * p.seq_len_q * D + first
    gl.store(sums + rows, m + _log2(l), mask=row + rows < p.seq_len_q)
    o = _scale_rows(o, gl.where(l == 0.0, 0.0, _reciprocal(l)))
    rows = gl.expand_dims(gl.arange(0, p.ROWS, layout=gl.SliceLayout(1, o.type.layout)), 1)
    columns = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, o.type.layout)), 0)
    gl.store(partial + first * D + (rows * D + columns), o, mask=row + rows < p.seq_len_q)


@gluon.jit
def _store(out_desc, out, o, batch, head, row, column):
    tma.store_wait(0)  # the store before has read `out`
    gl.barrier()
    out.reshape(o.shape).store(o.to(out.dtype))
    fence_async_shared()
    tma.async_store(out_desc, [batch, head, row, column], out)


@gluon.jit
def _finish_tile(p, out_desc, lse, out, o, l, m, head, row):
    """Through `out`, which has room for all columns or for half of them."""
    o = _scale_rows(o, gl.where(l == 0.0, 0.0, _reciprocal(l)))
    batch = _quotient(head, p.num_heads_q)
    head_q = head - batch * p.num_heads_q
    COLUMNS: gl.constexpr = out.shape[3]
    gl.static_assert(o.shape[1] == COLUMNS or o.shape[1] == 2 * COLUMNS, "all columns or half of them")
    if COLUMNS == o.shape[1]:
        _store(out_desc, out, o, batch, head_q, row, 0)
    else:
        left, right = _halves(o)
        _store(out_desc, out, left, batch, head_q, row, 0)
        _store(out_desc, out, right, batch, head_q, row, COLUMNS)
    if lse.to(gl.int64) != 0:
        rows = row + gl.arange(0, p.ROWS, layout=m.type.layout)
        value = (m + _log2(l)) * LN_2
        gl.store(lse + head.to(gl.int64) * p.seq_len_q + rows, value, mask=rows < p.seq_len_q)


@gluon.jit
def _first_step(p, s, row, col, scale_log2, PROB_LAYOUT: gl.constexpr, DTYPE: gl.constexpr):
    """Row maxima, partial sums and exponentials of a tile's first block, of which its rows see least.

    The maximum is finite and below all others where a row sees nothing: it is no special case, its exponentials are 0.
    """
    if p.BAND and p.CONSUMERS == 2 and p.KEYS > 64:
        return _first_step_by_halves(p, s, row, col, scale_log2, PROB_LAYOUT, DTYPE)
    s = p.mask(s, row, col)
    m = gl.maximum(gl.max(s, 1) * scale_log2, -3.0e38)
    e = _exponentials(s, m, scale_log2)
    return m, _lane_sums(e), gl.convert_layout(e.to(DTYPE), PROB_LAYOUT, assert_trivial=True)


@gluon.jit
def _first_step_by_halves(p, s, row, col, scale_log2, PROB_LAYOUT: gl.constexpr, DTYPE: gl.constexpr):
    """`_first_step` that skips keys no row sees, and masks only where it must.

    On the diagonal of a causal mask the first warpgroup sees nothing of the right half, the second one all of the left.
    """
    left, right = _halves(s)
    middle = col + p.KEYS // 2
    if p.partly(row, col, middle):
        left = p.mask(left, row, col)
    m = gl.max(left, 1)
    right_seen = p.seen(row, middle)
    if right_seen:
        right = p.mask(right, row, middle)
        m = gl.maximum(m, gl.max(right, 1))
    m = gl.maximum(m * scale_log2, -3.0e38)
    left = _exponentials(left, m, scale_log2)
    l = _lane_sums(left)
    if right_seen:
        right = _exponentials(right, m, scale_log2)
        l += _lane_sums(right)
    else:
        right = gl.zeros_like(right)
    m = gl.convert_layout(m, gl.SliceLayout(1, s.type.layout), assert_trivial=True)
    l = gl.convert_layout(l, _lane_sums(s).type.layout, assert_trivial=True)
    return m, l, _joined(left.to(DTYPE), right.to(DTYPE), PROB_LAYOUT)


@gluon.jit
def _later_steps(p, k_ring, v_ring, q, o, l, m, prob, blocks, row, col, steps, scale_log2, WG: gl.constexpr):
    """All steps of a tile but the first."""
    if p.BAND:
        # Blocks that are seen in part, at the right edge; those seen whole; and again in part, at the left edge.
        seen, left = p.edges(row, col, steps)
        begin = gl.to_tensor(1)
        for edge in range(1 + (left < steps).to(gl.int32)):
            end = gl.where(edge == 0, seen, steps)
            for i in range(begin, end):
                n, at = blocks + i, col - i * p.KEYS
                o, l, m, prob = _step(p, k_ring, v_ring, q, o, l, m, prob, n, row, at, scale_log2, True, WG)
            begin = gl.where(edge == 0, left, steps)
            for i in range(end, begin):
                n, at = blocks + i, col - i * p.KEYS
                o, l, m, prob = _step(p, k_ring, v_ring, q, o, l, m, prob, n, row, at, scale_log2, False, WG)
    else:
        for i in range(1, steps):
            n, at = blocks + i, col - i * p.KEYS
            o, l, m, prob = _step(p, k_ring, v_ring, q, o, l, m, prob, n, row, at, scale_log2, False, WG)
    return o, l, m, prob


@gluon.jit
def _consume(
    sizes,
    out_desc,
    lse,
    rings,
    out_tiles,
    scale_log2,
    WG: gl.constexpr,
    HELD: gl.constexpr,
    BAND: gl.constexpr,
    SPLIT: gl.constexpr,
    CONSUMERS: gl.constexpr,
    QUERIES: gl.constexpr,
):
    """Consumer `WG`: rows [WG * ROWS, (WG + 1) * ROWS) of every tile."""
    p, q_ring, k_ring, v_ring = _begin(sizes, rings, BAND, SPLIT, CONSUMERS, QUERIES)
    D: gl.constexpr = v_ring.tiles.shape[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, p.KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    # The next tile's place is worked out while a product runs, where there are registers to keep it.
    AHEAD: gl.constexpr = CONSUMERS == 2 and QUERIES > 1
    blocks = gl.to_tensor(0)  # key blocks of the tiles before this one
    if CONSUMERS == 2:
        if WG == 1:
            _pass_turn(WG)
    if AHEAD:
        next_head, next_row, next_col, next_steps = p.tile(gl.to_tensor(0))
    for turn in range(p.tiles()):
        if AHEAD:
            head, row, col, steps = next_head, next_row, next_col, next_steps
        else:
            head, row, col, steps = p.tile(turn)
        row += WG * p.ROWS
        query = turn * CONSUMERS + WG  # the fill of `q_ring` that is this tile's query
        if p.hidden(row, col, steps):
            k_ring.wait(blocks)
            k_ring.release(blocks)
            v_ring.wait(blocks)
            v_ring.release(blocks)
            blocks += 1
            col -= p.KEYS
            steps -= 1
        q_ring.wait(query)
        q = _query(q_ring.tile(query), HELD, S_LAYOUT)
        k_ring.wait(blocks)
        s = q.scores(k_ring.tile(blocks))
        s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
        k_ring.release(blocks)
        m, l, prob = _first_step(p, s, row, col, scale_log2, P_LAYOUT, k_ring.tiles.dtype)
        o = gl.zeros([p.ROWS, D], gl.float32, O_LAYOUT)
        if CONSUMERS > 2:
            v_ring.wait(blocks)
        o, l, m, prob = _later_steps(p, k_ring, v_ring, q, o, l, m, prob, blocks, row, col, steps, scale_log2, WG)
        blocks += steps
        q_ring.release(query)
        v_ring.wait(blocks - 1)
        o = warpgroup_mma(prob, v_ring.tile(blocks - 1), o, is_async=True)
        # This wait is over already. It ends a basic block: what follows is computed while the product runs.
        v_ring.wait(blocks - 1)
        if AHEAD:
            next_head, next_row, next_col, next_steps = p.tile(turn + 1)
        o = warpgroup_mma_wait(num_outstanding=0, deps=[o])
        v_ring.release(blocks - 1)
        _finish(p, out_desc, lse, out_tiles.index(WG), o, l, m, head, row)
    if CONSUMERS == 2:
        if WG == 0:
            _take_turn(WG)  # the turn that nobody needs any more: arrivals and waits balance
    tma.store_wait(0)


@gluon.jit
def attention_forward_hopper(
    q,
    k,
    v,
    out,
    lse,
    num_tiles,
    tiles_query,
    num_heads_q,
    group,
    seq_len_q,
    seq_len_k,
    band_lo,
    band_hi,
    splits,
    scale_log2,
    BAND: gl.constexpr,
    SPLIT: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    QUERIES: gl.constexpr,
    HELD: gl.constexpr,
):
    """out = softmax(scale * q k^T) v, and the natural logarithm of each row's sum of exponentials.

    q, k, v, out: rank-4 descriptors over (batch, heads, seq, head_dim), f16 or bf16, with the true sizes; blocks
    (1, 1, ROWS, D) for q and out, (1, 1, KEYS, D) for k and v. Beyond the sizes TMA reads zeros and writes nothing.
    lse: (batch, num_heads_q, seq_len_q) f32, contiguous, or null.
    tiles_query = ceil(seq_len_q / (CONSUMERS * ROWS)); num_tiles = tiles_query * num_heads_q * batch; the grid has
    num_tiles * splits CTAs, or fewer that take several tiles each. scale_log2 = scale * log2(e) > 0. |band| and lengths
    below 2^30.
    SPLIT: the keys of each tile are dealt to `splits` tiles, and `lse` is not the log-sum-exp but the partial results
    (`_finish_part`) that `combine.attention_combine` puts together; `out` only says its block. Else splits is 1.
    out's blocks may have half of the D columns. CONSUMERS is 2, who take turns, or 3. STAGES >= 2. QUERIES: how many of
    each consumer's fit, 1 or 2. HELD: columns of the query in registers, a power of two or 0.
    """
    gl.static_assert(STAGES >= 2, "a step waits for the next values while it still reads its own")
    q_ring = _ring(q, CONSUMERS * QUERIES, 1)
    k_ring = _ring(k, STAGES, CONSUMERS)
    v_ring = _ring(v, STAGES, CONSUMERS)
    if SPLIT:
        out_tiles = q_ring.tiles
    else:
        out_tiles = gl.allocate_shared_memory(out.dtype, [CONSUMERS] + out.block_type.shape, out.layout)
    fence_async_shared()
    sizes = (num_tiles, tiles_query, num_heads_q, group, seq_len_q, seq_len_k, band_lo, band_hi, splits)
    rings = (q_ring, k_ring, v_ring)
    # Registers per thread; the first consumer gets what is left, as many as the others.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (sizes, out, lse, rings, out_tiles, scale_log2, 0, HELD, BAND, SPLIT, CONSUMERS, QUERIES)),
                (_consume, (sizes, out, lse, rings, out_tiles, scale_log2, 1, HELD, BAND, SPLIT, CONSUMERS, QUERIES)),
                (_produce, (sizes, q, k, v, rings, BAND, SPLIT, CONSUMERS, QUERIES)),
            ],
            [WARPS, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (sizes, out, lse, rings, out_tiles, scale_log2, 0, HELD, BAND, SPLIT, CONSUMERS, QUERIES)),
                (_consume, (sizes, out, lse, rings, out_tiles, scale_log2, 1, HELD, BAND, SPLIT, CONSUMERS, QUERIES)),
                (_consume, (sizes, out, lse, rings, out_tiles, scale_log2, 2, HELD, BAND, SPLIT, CONSUMERS, QUERIES)),
                (_produce, (sizes, q, k, v, rings, BAND, SPLIT, CONSUMERS, QUERIES)),
            ],
            [WARPS, WARPS, 1],
            [160, 160, 24],
        )
