"""Wrong kernels as machine code: what a validation of results has to notice. `python -m kernels.mutants OUTDIR`.

A mutant is a kernel with a mistake that somebody could make, put there by edits of the text, and built by the path of
the real ones into a bundle of its own. It answers the requests that its variants answer. On the validation's cases it
comes to an end, reads no foreign memory, and writes none but the 128 elements on either side of an output.

`--slow` builds right kernels that take longer, and one that does not: what a comparison of timings has to notice, and
what it must not. OUTDIR/mutants.json lists what is there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kernels import bundle, compile, specs
from kernels.edits import Edit, EditError, build, drop, insert, swap
from kernels.specs import Spec

SCHEMA = "flashcore.mutants/1"
PORTABLE, HOPPER, COMBINE = "forward", "forward_hopper", "combine"


@dataclass(frozen=True)
class Mutant:
    """`edits` of `kernels/<kernel>.py`, and the variants that show them.

    filter: words in the names of the validation's cases, all of which a case that shows it has. Cases of the families
    `large` and `huge` are those of a full run.
    unlimited: the variants answer all sizes, not only those at which they are the fastest.
    """

    name: str
    description: str
    kernel: str
    edits: tuple[Edit, ...]
    variants: tuple[str, ...]
    filter: str = ""
    unlimited: bool = False

    def specs(self, arch: str) -> list[Spec]:
        """Those of the variants that there are for an architecture."""
        matrix = {spec.name: spec for spec in specs.specs(arch)}
        found = [matrix[name] for name in self.variants if name in matrix]
        return [replace(spec, when=replace(spec.when, limits={})) if self.unlimited else spec for spec in found]


def _names(family: str, *variants: str) -> tuple[str, ...]:
    return tuple(f"attention_forward.{family}.{variant}" for variant in variants)


BOTH = _names("portable", "f16.d64.dense.exact", "f16.d64.band.exact")
DENSE = BOTH[:1]
BAND = BOTH[1:]
BOTH_BF16 = _names("portable", "bf16.d64.dense.exact", "bf16.d64.band.exact")
PADDED = _names("portable", "f16.d64.dense.aligned", "f16.d64.band.aligned")
DENSE_128 = _names("portable", "f16.d128.dense.exact")
BOOL_MASK = _names("portable", "f16.d64.band.mask_bool.aligned")
F32_MASK = _names("portable", "f16.d64.band.mask_f32.aligned")

PORTABLE_MUTANTS = (
    Mutant(
        "portable_value_from_key",
        "reads the values from the keys' memory",
        PORTABLE,
        (
            swap(
                "_load(value_at, start, keys_ok, dims_ok[1], EDGE, PADDED)",
                "_load(key_at, start, keys_ok, dims_ok[0], EDGE, PADDED)",
            ),
        ),
        DENSE,
    ),
    Mutant(
        "portable_value_stride_of_key",
        "takes the keys' distance from row to row for the values' too",
        PORTABLE,
        (
            swap("keys[:, None].to(tl.int64) * v_stride_seq", "keys[:, None].to(tl.int64) * k_stride_seq"),
            swap("        v_stride_seq,\n    )", "        k_stride_seq,\n    )"),
        ),
        DENSE,
        "memory v:sbhd",
    ),
    Mutant(
        "portable_masked_score_zero",
        "scores keys that a row does not see with 0 instead of -inf, those beyond the last one included",
        PORTABLE,
        (swap('tl.where(visible, scores, float("-inf"))', "tl.where(visible, scores, 0.0)"),),
        BOTH_BF16,
    ),
    Mutant(
        "portable_causal_one_key_more",
        "lets every row see one key beyond the diagonal",
        PORTABLE,
        (swap("(row_first - start + band_hi)", "(row_first - start + band_hi + 1)"),),
        BAND,
        "causal",
    ),
    Mutant(
        "portable_window_one_key_less",
        "hides the first key of every row's window",
        PORTABLE,
        (swap("(row_first - start + band_lo)", "(row_first - start + band_lo + 1)"),),
        BAND,
        "window",
    ),
    Mutant(
        "portable_scale_without_log2e",
        "takes the exponential to base 2 of scores that are scaled for base e",
        PORTABLE,
        (swap("scale = tl.abs(scale)", "scale = tl.abs(scale) * LN_2"),),
        DENSE,
    ),
    Mutant(
        "portable_scale_missing_at_edges",
        "scales the scores of whole key tiles only",
        PORTABLE,
        (drop("scores = scores * scale"),),
        BOTH,
    ),
    Mutant(
        "portable_negative_scale_as_positive",
        "forgets the sign of the softmax scale",
        PORTABLE,
        (drop("query = tl.where(scale < 0.0, -query, query)"),),
        BOTH,
        "scale-",
    ),
    Mutant(
        "portable_output_not_rescaled",
        "adds to the output so far without the factor of the new maximum",
        PORTABLE,
        (swap("acc * decay[:, None])", "acc)"),),
        DENSE,
    ),
    Mutant(
        "portable_row_sum_not_rescaled",
        "adds to the row sum so far without the factor of the new maximum",
        PORTABLE,
        (swap("row_sum = row_sum * decay + ", "row_sum = row_sum + "),),
        BOTH_BF16,
    ),
    Mutant(
        "portable_maximum_of_last_tile",
        "forgets the maximum of earlier key tiles: right unless it was higher by more than exp2 can express",
        PORTABLE,
        (
            swap("tl.maximum(row_max, tl.max(scores, 1))", "tl.max(scores, 1)"),
            swap("tl.maximum(row_max, tl.max(scores, 1) * scale)", "tl.max(scores, 1) * scale"),
        ),
        BOTH,
        "magnitude 2^[7, 7, 0]",
    ),
    Mutant(
        "portable_heads_interleaved",
        "deals the key heads to the query heads in turn instead of in groups",
        PORTABLE,
        (swap("head_kv = (head // group)", "head_kv = (head % (num_heads_q // group))"),),
        BOTH,
        "head_group",
    ),
    Mutant(
        "portable_lse_without_maximum",
        "leaves the row's maximum out of the log-sum-exp",
        PORTABLE,
        (swap("log_sum = row_max * LN_2 + _log(sum_or_1)", "log_sum = _log(sum_or_1)"),),
        DENSE,
        "lse",
    ),
    Mutant(
        "portable_blind_tile_nan",
        "subtracts -inf from -inf in rows that have not seen a key yet",
        PORTABLE,
        (swap('pivot = tl.where(new_max == float("-inf"), 0.0, new_max)', "pivot = new_max"),),
        BAND,
        "window",
    ),
    Mutant(
        "portable_nan_score_hidden",
        "hides keys whose score is NaN",
        PORTABLE,
        (
            swap(
                "scores = tl.dot(query, tl.trans(key))\n",
                "scores = tl.dot(query, tl.trans(key))\n"
                '    scores = tl.where(scores == scores, scores, float("-inf"))\n',
            ),
        ),
        BOTH,
        "special Nan-in-Key",
    ),
    Mutant(
        "portable_first_tile_skipped",
        "starts with the second of the key tiles that every row sees whole",
        PORTABLE,
        (swap("tl.range(full_begin, full_end)", "tl.range(full_begin + 1, full_end)"),),
        BOTH,
    ),
    Mutant(
        "portable_last_tile_dropped",
        "leaves out the last of the key tiles that some row sees in part",
        PORTABLE,
        (swap("tl.range(0, before + (end - full_end))", "tl.range(0, before + (end - full_end) - 1)"),),
        BAND,
    ),
    Mutant(
        "portable_weights_in_float8",
        "rounds the weights to float8 (e5m2) before the product with the values",
        PORTABLE,
        (swap("weights.to(value.dtype)", "weights.to(tl.float8e5).to(value.dtype)"),),
        DENSE,
    ),
    Mutant(
        "portable_weights_in_bfloat16",
        "rounds the weights of a float16 problem to bfloat16",
        PORTABLE,
        (swap("weights.to(value.dtype)", "weights.to(tl.bfloat16).to(value.dtype)"),),
        DENSE,
    ),
    Mutant(
        "portable_output_so_far_in_float16",
        "rounds the output so far to float16 after every key tile",
        PORTABLE,
        (swap("return acc, row_sum, new_max", "return acc.to(value.dtype).to(tl.float32), row_sum, new_max"),),
        DENSE,
        "length 1000",
    ),
    # The sum of an offset in 32 bits would be negative, and its address nobody's. Without the sign it is a wrong place
    # of the same tensor.
    Mutant(
        "portable_output_offset_in_31_bits",
        "keeps the place of a tile of the output, in elements, in 31 bits",
        PORTABLE,
        (
            swap(
                "out + batch * out_stride_batch + head_q * out_stride_head + row_first.to(tl.int64) * out_stride_seq",
                "out + ((batch * out_stride_batch + head_q * out_stride_head + row_first.to(tl.int64) * out_stride_seq)"
                " & 0x7FFFFFFF)",
            ),
        ),
        DENSE_128,
        "huge h128-1",
    ),
    Mutant(
        "portable_key_offset_in_31_bits",
        "keeps the place of a key tile in its head, in bytes, in 31 bits",
        PORTABLE,
        (
            swap(
                "at[0] + first.to(tl.int64) * at[2] + at[1]",
                "at[0] + tl.multiple_of(first.to(tl.int64) * at[2] & 0x3FFFFFFF, 8) + at[1]",
            ),
        ),
        DENSE_128,
        "huge k:bhsd+1920",
    ),
    # Up to 127 elements beyond the log-sum-exp, and a row beyond the output where rows are close together.
    Mutant(
        "portable_lse_beyond_the_rows",
        "stores the log-sum-exp of rows that there are not",
        PORTABLE,
        (
            swap(
                "lse_rows = tl.where(lse.to(tl.int64) != 0, rows_left, 0)",
                "lse_rows = tl.where(lse.to(tl.int64) != 0, BLOCK_Q, 0)",
            ),
        ),
        DENSE,
        "lse",
    ),
    Mutant(
        "portable_output_one_row_more",
        "stores one row more than the output has",
        PORTABLE,
        (
            swap(
                "tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=rows_ok[:, None])",
                "more = (out_stride_seq <= 2 * BLOCK_D).to(tl.int32)\n"
                "        more_ok = rows < rows_left + more\n"
                "        tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=more_ok[:, None])",
            ),
        ),
        DENSE,
    ),
    Mutant(
        "portable_head_dim_padding_stored",
        "stores the columns that pad the head_dim",
        PORTABLE,
        (swap("mask=rows_ok[:, None] & dims_ok[1][None, :])", "mask=rows_ok[:, None])"),),
        PADDED,
        "head_dim",
    ),
    Mutant(
        "portable_mask_ignored",
        "does not apply the boolean mask",
        PORTABLE,
        (drop("visible = visible & (mask != 0)"),),
        BOOL_MASK,
        "bool-mask",
    ),
    Mutant(
        "portable_mask_inverted",
        "takes the boolean mask for one of hidden keys",
        PORTABLE,
        (swap("(mask != 0)", "(mask == 0)"),),
        BOOL_MASK,
        "bool-mask",
    ),
    Mutant(
        "portable_mask_scaled",
        "scales the additive mask as it does the scores",
        PORTABLE,
        (swap("scores = scores + mask.to(tl.float32)", "scores = scores + mask.to(tl.float32) * scale"),),
        F32_MASK,
        "f32-mask",
    ),
    Mutant(
        "portable_mask_of_first_head",
        "applies the first head's mask to every head",
        PORTABLE,
        (
            swap(
                "attn_mask + batch * mask_stride_batch + head_q * mask_stride_head",
                "attn_mask + batch * mask_stride_batch",
            ),
        ),
        F32_MASK,
        "f32-mask[bh",
    ),
)

H_DENSE = _names("hopper", "f16.d64.dense.q128")
H_BAND = _names("hopper", "f16.d64.band.q128")
H_BOTH = H_DENSE + H_BAND
H_BOTH_BF16 = _names("hopper", "bf16.d64.dense.q128", "bf16.d64.band.q128")
H_BOTH_128 = _names("hopper", "f16.d128.dense", "f16.d128.band")
# The blocks of query, key and value are of one size at this head_dim alone.
H_BOTH_256 = _names("hopper", "f16.d256.dense", "f16.d256.band")
H_SPLIT = _names("hopper", "f16.d64.dense.split")

# Long enough for the loads that should have waited to arrive.
PAUSE = 'gl.inline_asm("nanosleep.u32 2000;")'
BEFORE_PRODUCER = "    blocks = gl.to_tensor(0)  # key blocks of the tiles before this one\n    for turn"

HOPPER_MUTANTS = (
    Mutant(
        "hopper_value_from_key",
        "loads the values from the keys' memory",
        HOPPER,
        (swap(BEFORE_PRODUCER, "    v_desc = k_desc\n" + BEFORE_PRODUCER),),
        H_DENSE,
    ),
    Mutant(
        "hopper_value_from_query",
        "loads the values from the queries' memory",
        HOPPER,
        (swap(BEFORE_PRODUCER, "    v_desc = q_desc\n" + BEFORE_PRODUCER),),
        H_BOTH_256,
    ),
    Mutant(
        "hopper_query_and_key_swapped",
        "loads the keys in place of the queries, and the other way round",
        HOPPER,
        (
            swap(BEFORE_PRODUCER, "    q_desc, k_desc = k_desc, q_desc\n" + BEFORE_PRODUCER),
            swap(
                "head_kv = head_q // p.group\n",
                "head_v = head_q // p.group\n        head_q, head_kv = head_v, head_q\n",
            ),
            swap("v_desc, batch, head_kv, col - (i - 1)", "v_desc, batch, head_v, col - (i - 1)"),
            swap("v_desc, batch, head_kv, col - (steps - 1)", "v_desc, batch, head_v, col - (steps - 1)"),
        ),
        H_BOTH_256,
    ),
    Mutant(
        "hopper_first_batch_only",
        "loads the first batch's queries, keys and values for all",
        HOPPER,
        (insert("batch = gl.to_tensor(0)", before="# The place of a single query is free last"),),
        H_DENSE,
    ),
    Mutant(
        "hopper_heads_interleaved",
        "deals the key heads to the query heads in turn instead of in groups",
        HOPPER,
        (swap("head_q // p.group", "head_q % (p.num_heads_q // p.group)"),),
        H_BOTH,
        "head_group",
    ),
    Mutant(
        "hopper_tail_scores_zero",
        "scores keys beyond the last one with 0 instead of -inf",
        HOPPER,
        (
            swap(
                'gl.where(keys < self.seq_len_k - lane, x, float("-inf"))',
                "gl.where(keys < self.seq_len_k - lane, x, 0.0)",
            ),
        ),
        H_DENSE,
    ),
    Mutant(
        "hopper_tail_one_key_more",
        "lets rows see one key beyond the last one",
        HOPPER,
        (swap("keys < self.seq_len_k - lane", "keys <= self.seq_len_k - lane"),),
        H_DENSE,
    ),
    Mutant(
        "hopper_causal_one_key_more",
        "lets every row see one key beyond the diagonal",
        HOPPER,
        (
            swap(
                "gl.minimum(rows + self.band_hi + 1, self.seq_len_k) - lane",
                "gl.minimum(rows + self.band_hi + 2, self.seq_len_k) - lane",
            ),
        ),
        H_BAND,
        "causal",
    ),
    Mutant(
        "hopper_window_one_key_less",
        "hides the first key of every row's window",
        HOPPER,
        (swap("keys >= rows", "keys > rows"),),
        H_BAND,
        "window",
    ),
    Mutant(
        "hopper_last_block_dropped",
        "leaves out the last key block unless it is whole",
        HOPPER,
        (swap("end = (keys + self.KEYS - 1) // self.KEYS", "end = keys // self.KEYS"),),
        H_BOTH,
    ),
    Mutant(
        "hopper_value_of_next_block",
        "weighs the values of the key block after the one that the weights are of",
        HOPPER,
        (swap("v_ring.tile(n - 1), o", "v_ring.tile(n), o"),),
        H_DENSE,
    ),
    Mutant(
        "hopper_next_stage_read",
        "reads every ring one stage ahead of the one it waited for",
        HOPPER,
        (swap("self.tiles.index(n % self.stages)", "self.tiles.index((n + 1) % self.stages)"),),
        H_DENSE,
    ),
    Mutant(
        "hopper_held_columns_forgotten",
        "starts the scores anew with the columns that are not in registers",
        HOPPER,
        (swap("use_acc=self.HELD > 0", "use_acc=False"),),
        H_BOTH_128,
    ),
    Mutant(
        "hopper_stale_output",
        "starts a tile with the output of the one before: needs more tiles than there are SMs",
        HOPPER,
        (
            drop("o = gl.zeros([p.ROWS, D], gl.float32, O_LAYOUT)"),
            insert(
                "o = gl.zeros([p.ROWS, D], gl.float32, O_LAYOUT)",
                before="for turn in range(p.tiles()):\n        if AHEAD",
            ),
        ),
        H_DENSE,
        "grid",
    ),
    Mutant(
        "hopper_output_not_rescaled",
        "adds to the output so far without the factor of the new maximum",
        HOPPER,
        (swap("return _scale_rows(o, alpha), l", "return o, l"),),
        H_BOTH_BF16,
    ),
    Mutant(
        "hopper_row_sum_not_rescaled",
        "adds to the row sum so far without the factor of the new maximum",
        HOPPER,
        (swap("l = _scale_rows(l, alpha) + ", "l = l + "),),
        H_DENSE,
    ),
    Mutant(
        "hopper_first_maximum_not_scaled",
        "subtracts the first block's maximum unscaled: weights that float16 cannot express",
        HOPPER,
        (swap("gl.max(s, 1) * scale_log2, -", "gl.max(s, 1), -"),),
        H_DENSE,
    ),
    Mutant(
        "hopper_maximum_starts_at_zero",
        "takes 0 for the lowest maximum: right unless all scores of a row are so low that their exponentials are 0",
        HOPPER,
        (
            swap("gl.max(s, 1) * scale_log2, -3.0e38", "gl.max(s, 1) * scale_log2, 0.0"),
            swap("m * scale_log2, -3.0e38", "m * scale_log2, 0.0"),
        ),
        H_BOTH_128,
        "magnitude d128 causal 2^[7, 7, 0]",
    ),
    Mutant(
        "hopper_exponent_clamped",
        "clamps exponents at -126, which loses NaN scores and the rows that see nothing",
        HOPPER,
        (
            swap(
                "return gl.exp2(s * scale_log2 - gl.expand_dims(m, 1))",
                "return gl.exp2(gl.maximum(s * scale_log2 - gl.expand_dims(m, 1), -126.0))",
            ),
        ),
        H_BOTH,
        "special Nan-in-Key",
    ),
    Mutant(
        "hopper_blind_row_nan",
        "divides by the sum of rows that see nothing",
        HOPPER,
        (
            swap(
                "    o = _scale_rows(o, gl.where(l == 0.0, 0.0, _reciprocal(l)))\n    batch",
                "    o = _scale_rows(o, _reciprocal(l))\n    batch",
            ),
        ),
        H_BAND,
        "window",
    ),
    Mutant(
        "hopper_lse_to_base_two",
        "stores the log-sum-exp to base 2",
        HOPPER,
        (swap(" * LN_2\n", "\n"),),
        H_DENSE,
        "lse",
    ),
    # Up to 127 elements beyond the log-sum-exp.
    Mutant(
        "hopper_lse_beyond_the_rows",
        "stores the log-sum-exp of rows that there are not",
        HOPPER,
        (swap(", mask=rows < p.seq_len_q)", ")"),),
        H_DENSE,
        "lse",
    ),
    Mutant(
        "hopper_rows_of_first_consumer",
        "both consumers store the first one's rows",
        HOPPER,
        (drop("row += WG * p.ROWS"),),
        H_BOTH,
    ),
    Mutant(
        "hopper_output_tile_shared",
        "a race: both consumers store through the same shared memory",
        HOPPER,
        (swap("out_tiles.index(WG)", "out_tiles.index(0)"),),
        H_DENSE,
    ),
    Mutant(
        "hopper_query_not_awaited",
        "a race: reads the query without waiting for its load",
        HOPPER,
        (drop("q_ring.wait(query)"),),
        H_DENSE,
    ),
    Mutant(
        "hopper_key_released_early",
        "a race: gives a key block back before it reads it, and pauses in between; needs four blocks of 128 keys",
        HOPPER,
        (
            drop("k_ring.release(n)"),
            swap("    k_ring.wait(n)\n", f"    k_ring.wait(n)\n    k_ring.release(n)\n    {PAUSE}\n"),
        ),
        H_BOTH_128,
        "1000",
    ),
    Mutant(
        "hopper_every_part_the_last",
        "gives the last keys to every part that a tile's keys are split into",
        HOPPER,
        (swap("end -= head % self.splits * part", "end -= 0 * part"),),
        H_SPLIT,
        unlimited=True,
    ),
)

COMBINE_MUTANTS = (
    Mutant(
        "combine_unweighted",
        "adds the parts' outputs up without their weights",
        COMBINE,
        (swap("acc += weight[:, None] * o", "acc += o"),),
        H_SPLIT,
        unlimited=True,
    ),
    Mutant(
        "combine_last_part_dropped",
        "leaves the last part out",
        COMBINE,
        (
            swap(
                "acc = tl.zeros([ROWS, BLOCK_D], tl.float32)\n    for part in range(splits):",
                "acc = tl.zeros([ROWS, BLOCK_D], tl.float32)\n    for part in range(tl.maximum(splits - 1, 1)):",
            ),
        ),
        H_SPLIT,
        unlimited=True,
    ),
    Mutant(
        "combine_maximum_forgotten",
        "weighs the parts by their sums themselves, not by quotients of them: beyond what float32 can express",
        COMBINE,
        (swap("m = tl.maximum(m, -3.0e38)", "m = tl.zeros([ROWS], tl.float32)"),),
        H_SPLIT,
        "magnitude 2^[7, 7, 0]",
        unlimited=True,
    ),
    Mutant(
        "combine_lse_to_base_two",
        "stores the log-sum-exp to base 2",
        COMBINE,
        (swap("(m + log) * LN_2", "m + log"),),
        H_SPLIT,
        "lse",
        unlimited=True,
    ),
)

MUTANTS = PORTABLE_MUTANTS + HOPPER_MUTANTS + COMBINE_MUTANTS

# --- slower ones ---

CLASSIC = "attention_forward.hopper.f16.d64.dense.q128"  # which answers the nine classic configurations


@dataclass(frozen=True)
class Slowed:
    """The variant of the classic configurations in another shape, or with edits that change no result."""

    name: str
    description: str
    edits: tuple[Edit, ...] = ()
    shape: Mapping[str, int] = field(default_factory=dict)  # what differs from the real one's
    kernel: str = HOPPER
    filter: str = "classic"

    def specs(self, arch: str) -> list[Spec]:
        if arch != "sm_90a":
            return []
        (real,) = (spec for spec in specs.specs(arch) if spec.name == CLASSIC)
        shape = replace(specs.HOPPER_SHAPES[64], **self.shape)
        return [specs.hopper("f16", 64, False, shape, real.when.limits, ".q128")]


def _spin(cycles: int) -> Edit:
    """Every consumer waits in every tile, before the first product: longer, and nothing else."""
    loop = "{ .reg .pred p; .reg .b32 a, b; mov.u32 a, %clock; SPIN: mov.u32 b, %clock; sub.u32 b, b, a;"
    spin = f'gl.inline_asm("{loop} setp.lt.u32 p, b, {cycles}; @p bra SPIN; }}")'
    return insert(spin, before="s = q.scores(k_ring.tile(blocks))")


SLOWED = (
    Slowed("same", "the real kernel: not slower"),
    Slowed(
        "spin_160", "160 cycles more in every tile, some 0.08 us: about 1 % of a classic configuration", (_spin(160),)
    ),
    Slowed(
        "spin_600", "600 cycles more in every tile, some 0.3 us: 3 to 6 % of a classic configuration", (_spin(600),)
    ),
    Slowed("two_stages", "half of the stages: the loads are less far ahead", shape={"stages": 2}),
    Slowed("half_tiles", "half of the keys in a tile: twice as many steps", shape={"key": 64}),
)


# --- bundles ---


Entry = Mutant | Slowed


def row(entry: Entry, arch: str, data: bytes) -> dict[str, Any]:
    """What the index says about a bundle."""
    return {
        "name": entry.name,
        "file": f"{entry.name}.fcb",
        "description": entry.description,
        "kernel": entry.kernel,
        "arch": arch,
        "variants": sorted(bundle.unpack(data).variants()),
        "filter": entry.filter,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def write(entries: Sequence[Entry], arch: str, folder: Path, jobs: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Builds the bundles, `jobs` at a time: their rows, and a line for each that failed. Some have no variant there."""

    def one(entry: Entry) -> dict[str, Any] | str | None:
        if not (wanted := entry.specs(arch)):
            return None
        try:
            data = build(entry.kernel, entry.edits, wanted)
        except EditError as error:
            return f"{entry.name}: {error}"
        (folder / f"{entry.name}.fcb").write_bytes(data)
        print(f"{entry.name}: {len(wanted)} variants, {len(data)} bytes", flush=True)
        return row(entry, arch, data)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        made = list(pool.map(one, entries))
    return [m for m in made if isinstance(m, dict)], [m for m in made if isinstance(m, str)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.mutants", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="OUTDIR")
    parser.add_argument("--slow", action="store_true", help="right kernels that are slower, instead of wrong ones")
    parser.add_argument("--arch", choices=specs.ARCHES, default="sm_90a")
    parser.add_argument("--only", default="", metavar="WORDS", help="those with every one of these words in their name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    table: Sequence[Entry] = SLOWED if args.slow else MUTANTS
    entries = [entry for entry in table if all(word in entry.name for word in args.only.split())]
    args.folder.mkdir(parents=True, exist_ok=True)
    rows, failures = write(entries, args.arch, args.folder, args.jobs)
    index = {"schema": SCHEMA, "arch": args.arch, "compiler": compile.compiler_versions(), "mutants": rows}
    (args.folder / "mutants.json").write_text(json.dumps(index, indent=1) + "\n")
    print(f"{len(rows)} bundles in {args.folder}")
    print("\n".join(failures), file=sys.stderr, end="\n" if failures else "")
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
