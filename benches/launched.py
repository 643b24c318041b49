"""A Triton kernel to measure launches with: the parameters of the portable forward, and next to no work."""

import triton
import triton.language as tl


@triton.jit
def kernel(
    q, k, v, out, lse,
    batch, heads, seq, dim,
    qb, qh, qs, kb, kh, ks, vb, vh, vs, ob, oh, os,
    lo, hi, group, splits,
    scale,
):  # fmt: skip
    """Stores nothing unless a size is negative, which none is."""
    total = batch + heads + seq + dim + qb + qh + qs + kb + kh + ks + vb + vh + vs + ob + oh + os + lo + hi
    if total + group + splits < 0:
        tl.store(out + tl.program_id(0), tl.load(q) + tl.load(k) + tl.load(v) + tl.load(lse) + scale)
