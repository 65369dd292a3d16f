"""The best k columns of every row, one program per (tile of rows, strip of columns).

    for each tile of columns of the strip:
        key of every pair, its logit, and with noise the logit and Gumbel noise of the pair
        while any row has a key better than the worst of its candidates: that candidate is replaced by the tile's best

With a bound only those beyond it count: more candidates than registers hold take another sweep.

Candidates stay in registers, as integers in the order of (key, then the lower column), all of them different: which is
replaced doesn't depend on where it is. They are not sorted: contrastive_ops/backends/sweep.py sorts them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from contrastive_ops.kernels.tile import (
    has_excluded,
    is_needed,
    logits_of_tile,
    pairs_of_tile,
    ranges_of_cols,
    ranges_of_rows,
    those_taking_part,
)
from contrastive_ops.noise import MIX, STEP
from contrastive_ops.plane import LAST_COLUMN, NO_KEY

NONE = tl.constexpr(NO_KEY)
LAST = tl.constexpr(LAST_COLUMN)
INCREMENT = tl.constexpr(STEP % 2**64)
FIRST_SHIFT, FIRST_FACTOR = tl.constexpr(MIX[0][0]), tl.constexpr(MIX[0][1] % 2**64)
SECOND_SHIFT, SECOND_FACTOR = tl.constexpr(MIX[1][0]), tl.constexpr(MIX[1][1] % 2**64)


@triton.jit
def gumbel(start, rows, cols):
    """Standard Gumbel noise of pairs, as contrastive_ops/noise.py has it."""
    place = (rows.to(tl.uint64)[:, None] << 32) + cols.to(tl.uint64)[None, :] + 1
    bits = start.to(tl.uint64) + place * INCREMENT
    bits = (bits ^ (bits >> FIRST_SHIFT)) * FIRST_FACTOR
    bits = (bits ^ (bits >> SECOND_SHIFT)) * SECOND_FACTOR
    bits = bits ^ (bits >> 31)
    uniform = ((bits >> 41).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return -tl.log(-tl.log(uniform))


@triton.jit
def ordered(keys, LARGEST: tl.constexpr):
    """Integers in the order of keys, the better the larger: NaN is the largest of all keys, and 0 is as -0."""
    bits = tl.where(keys == 0.0, 0.0, keys).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(keys != keys, 0x7FFFFFFF, order)
    if not LARGEST:
        order = tl.maximum(-1 - order, NONE + 1)
    return order


@triton.jit
def best_of_tile(order, col, kept):
    """Of every row the best that is left, as a candidate; which candidate is the worst; and whether it is better."""
    best, place = tl.max(order, 1, return_indices=True)  # of equal ones the first
    candidate = (best.to(tl.int64) << 32) + LAST - (place + col).to(tl.int64)
    worst = tl.min(kept, 1)
    return place, candidate, worst, (best > NONE) & (candidate > worst)


@triton.jit
def topk_kernel(
    x, y, vectors, span, second, start, bound, best, n, m, features, cols_per_strip,
    LARGEST: tl.constexpr, RESTRICT: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    strip, strips = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, K)
    first_col = strip * cols_per_strip
    last_col = tl.minimum(first_col + cols_per_strip, m)
    of_rows = ranges_of_rows(vectors, rows, n)
    kept = tl.zeros((BLOCK_M, K), tl.int64) + ((tl.full((1, K), NONE, tl.int64) << 32) | lanes[None, :])
    values = tl.zeros((BLOCK_M, K), tl.float32)
    if bound is not None:
        below = tl.load(bound + rows, mask=rows < n, other=0)
        bound_order = (below >> 32).to(tl.int32)[:, None]
        bound_col = (-((below & 0xFFFFFFFF) - LAST)).to(tl.int32)[:, None]
    for col in range(first_col, last_col, BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        of_cols = ranges_of_cols(vectors, cols, m)
        has = has_excluded(vectors, of_rows, of_cols, row, col, BLOCK_M, BLOCK_N)
        if is_needed(of_rows, of_cols, has, RESTRICT):
            pairs, _ = pairs_of_tile(
                x, y, span, rows, cols, row, col, n, m, features, 0, DESCRIBED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
            )
            logits = logits_of_tile(pairs, vectors, rows, cols, n, m)
            logits = those_taking_part(
                logits, logits, -float("inf"), vectors, second, of_rows, of_cols, has, rows, cols, row, col, n, m,
                RESTRICT, False, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            keys = logits
            if start is not None:
                keys = logits + gumbel(start, rows, cols)
            order = tl.where(keys == -float("inf"), NONE, ordered(keys, LARGEST))
            if bound is not None:
                taken = (order > bound_order) | ((order == bound_order) & (cols[None, :] <= bound_col))
                order = tl.where(taken, NONE, order)
            place, candidate, worst, better = best_of_tile(order, col, kept)
            while tl.max(better.to(tl.int32), 0) > 0:
                replaced = better[:, None] & (kept == worst[:, None])
                taken = (cols - col)[None, :] == place[:, None]
                kept = tl.where(replaced, candidate[:, None], kept)
                if start is not None:
                    value = tl.sum(tl.where(taken, logits, 0.0), 1)
                    values = tl.where(replaced, value[:, None], values)
                order = tl.where(taken, NONE, order)
                place, candidate, worst, better = best_of_tile(order, col, kept)
    where = (rows.to(tl.int64)[:, None] * strips + strip) * K + lanes[None, :]
    tl.store(best.keys + where, kept, mask=rows[:, None] < n)
    if start is not None:
        tl.store(best.logits + where, values, mask=rows[:, None] < n)
