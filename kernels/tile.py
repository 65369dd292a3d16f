"""What happens on one tile of the N x M plane, for all kernels: pairs, logits, masks, statistics, gradients.

    s_ij = a_i b_j pair_ij + c_i + d_j
    pair_ij = <x_i, y_j>, or for volumes minus the distance of x_i from the span of the vectors y_j1 .. y_jP

Functions of values in registers: they read the inputs and write nothing. vectors, span and incoming are the tuples of
contrastive_ops/backends/sweep.py; what is None was not given, and costs nothing: Triton compiles a kernel for each set
of arguments that are there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot_products(
    x, y, y_stride, rows, cols, n, m, features,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> in float32; rows and columns beyond the last are 0."""
    dots = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    x_rows = x + rows.to(tl.int64)[:, None] * features
    y_rows = y + cols.to(tl.int64)[:, None] * y_stride
    for begin in range(0, features, BLOCK_D):
        feature = begin + tl.arange(0, BLOCK_D)
        inside = feature[None, :] < features
        x_tile = tl.load(x_rows + feature[None, :], mask=(rows[:, None] < n) & inside, other=0.0)
        y_tile = tl.load(y_rows + feature[None, :], mask=(cols[:, None] < m) & inside, other=0.0)
        dots = tl.dot(x_tile, tl.trans(y_tile), dots, input_precision=PRECISION)
    return dots


@triton.jit
def pairs_of_tile(
    x, y, span, rows, cols, n, m, features,
    MEMBERS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The pairs; for volumes of P = MEMBERS vectors also the coordinates of x_i in the span, L^-1 <x_i, y_j.>."""
    coordinates = ()
    if MEMBERS == 0:
        pairs = dot_products(x, y, features, rows, cols, n, m, features, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
    else:
        dots = ()
        outside = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        outside += tl.load(span.square + rows, mask=rows < n, other=0.0)[:, None]
        for t in tl.static_range(MEMBERS):
            of_member = dot_products(
                x, y + t * features, MEMBERS * features, rows, cols, n, m, features,
                PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            dots = dots + (of_member,)  # noqa: RUF005, Triton has no *dots
            coordinate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for s in tl.static_range(t + 1):
                entries = span.inverse + (t * (t + 1) // 2 + s) * tl.cast(m, tl.int64)
                coordinate += tl.load(entries + cols, mask=cols < m, other=0.0)[None, :] * dots[s]
            outside -= coordinate * coordinate
            coordinates = coordinates + (coordinate,)  # noqa: RUF005
        pairs = -tl.sqrt(tl.maximum(outside, 0.0, propagate_nan=tl.PropagateNan.ALL))
    return pairs, coordinates


@triton.jit
def vector_or(vector, index, size, otherwise):
    """The values of a vector of the statistics' dtype, or `otherwise` where there is none."""
    values = tl.zeros_like(index).to(tl.float32) + otherwise
    if vector is not None:
        values = tl.load(vector + index, mask=index < size, other=otherwise)
    return values


@triton.jit
def logits_of_tile(pairs, vectors, rows, cols, n, m):
    """Logits of all pairs, whether they take part or not."""
    scale = vector_or(vectors.row_scale, rows, n, 1.0)[:, None] * vector_or(vectors.col_scale, cols, m, 1.0)[None, :]
    bias = vector_or(vectors.row_bias, rows, n, 0.0)[:, None] + vector_or(vectors.col_bias, cols, m, 0.0)[None, :]
    return pairs * scale + bias


@triton.jit
def those_taking_part(logits, vectors, rows, cols, n, m, RESTRICT: tl.constexpr):
    """-inf beyond the last row and column, and where the ids leave a pair out."""
    inside = (rows[:, None] < n) & (cols[None, :] < m)
    if vectors.row_ids is not None:
        row_id = tl.load(vectors.row_ids + rows, mask=rows < n, other=0)
        col_id = tl.load(vectors.col_ids + cols, mask=cols < m, other=0)
        inside = inside & ((row_id[:, None] == col_id[None, :]) == RESTRICT)
    return tl.where(inside, logits, -float("inf"))


@triton.jit
def excluded_by_rows(vectors, rows, cols, n):
    """Whether column j is the one that row i leaves out; no index is beyond the columns."""
    return tl.load(vectors.row_exclude + rows, mask=rows < n, other=-1)[:, None] == cols[None, :]


@triton.jit
def excluded_by_cols(vectors, rows, cols, m):
    """Whether row i is the one that column j leaves out."""
    return tl.load(vectors.col_exclude + cols, mask=cols < m, other=-1)[None, :] == rows[:, None]


@triton.jit
def without_excluded(logits, vectors, rows, cols, n, m):
    """-inf where a pair is left out by index."""
    if vectors.row_exclude is not None:
        logits = tl.where(excluded_by_rows(vectors, rows, cols, n), -float("inf"), logits)
    if vectors.col_exclude is not None:
        logits = tl.where(excluded_by_cols(vectors, rows, cols, m), -float("inf"), logits)
    return logits


@triton.jit
def has_excluded(vectors, row, col, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile has a pair left out by index. Few have, and the others need not look at every pair."""
    has = False
    if vectors.row_exclude is not None:
        rows = row + tl.arange(0, BLOCK_M)
        index = tl.load(vectors.row_exclude + rows, mask=rows < n, other=-1)
        has = tl.max(((index >= col) & (index < col + BLOCK_N)).to(tl.int32), 0) > 0
    if vectors.col_exclude is not None:
        cols = col + tl.arange(0, BLOCK_N)
        index = tl.load(vectors.col_exclude + cols, mask=cols < m, other=-1)
        has = has | (tl.max(((index >= row) & (index < row + BLOCK_M)).to(tl.int32), 0) > 0)
    return has


@triton.jit
def is_needed(vectors, has, rows, cols, n, m, RESTRICT: tl.constexpr):
    """Whether any pair of a tile counts. If only equal ids take part, ids that are sorted rule most tiles out."""
    needed = True
    if RESTRICT:
        large: tl.constexpr = 2147483647
        row_low = tl.min(tl.load(vectors.row_ids + rows, mask=rows < n, other=large), 0)
        row_high = tl.max(tl.load(vectors.row_ids + rows, mask=rows < n, other=-1), 0)
        col_low = tl.min(tl.load(vectors.col_ids + cols, mask=cols < m, other=large), 0)
        col_high = tl.max(tl.load(vectors.col_ids + cols, mask=cols < m, other=-1), 0)
        needed = has | ((row_low <= col_high) & (col_low <= row_high))
    return needed


@triton.jit
def shift_of(maximum):
    """What to subtract before exp: an empty set (-inf) is shifted by 0, as (-inf) - (-inf) would be NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def fold(old_max, old_sum, part_max, part_sum):
    """Join two (max, sum of e^(s - max)); an empty set is (-inf, 0)."""
    new_max = tl.maximum(old_max, part_max)
    shift = shift_of(new_max)
    return new_max, old_sum * tl.exp(old_max - shift) + part_sum * tl.exp(part_max - shift)


@triton.jit
def reduce_tile(logits, BOTH: tl.constexpr, ROWS: tl.constexpr):
    """Maxima and sums over the rows and over the columns of a tile, with one exponential per pair where it is exact.

    One shift serves all sets of a tile if their maxima lie within 40 of it: terms down to 2^-24 of the largest of a
    set stay above the smallest normal number. NaN shows in the sums; the maxima pass it over.
    """
    infinity = float("inf")
    row_max = tl.max(logits, 1)
    col_max = tl.max(logits, 0)
    row_sum = tl.zeros_like(row_max)
    col_sum = tl.zeros_like(col_max)
    if BOTH:
        high = tl.maximum(tl.max(row_max, 0), tl.max(col_max, 0))
        low = tl.minimum(
            tl.min(tl.where(row_max == -infinity, infinity, row_max), 0),
            tl.min(tl.where(col_max == -infinity, infinity, col_max), 0),
        )
        if high - low <= 40.0:
            shift = shift_of(high)
            terms = tl.exp(logits - shift)
            row_sum = tl.sum(terms, 1) * tl.exp(shift - tl.where(row_max == -infinity, shift, row_max))
            col_sum = tl.sum(terms, 0) * tl.exp(shift - tl.where(col_max == -infinity, shift, col_max))
        else:
            row_sum = tl.sum(tl.exp(logits - shift_of(row_max)[:, None]), 1)
            col_sum = tl.sum(tl.exp(logits - shift_of(col_max)[None, :]), 0)
    elif ROWS:
        row_sum = tl.sum(tl.exp(logits - shift_of(row_max)[:, None]), 1)
    else:
        col_sum = tl.sum(tl.exp(logits - shift_of(col_max)[None, :]), 0)
    return row_max, row_sum, col_max, col_sum


@triton.jit
def own_gradients(gradient, vectors, incoming, rows, cols, n, m):
    """Of a tile that leaves pairs out by index: they have the gradients of their own logits instead."""
    own = tl.zeros_like(gradient)
    if vectors.row_exclude is not None:
        named = excluded_by_rows(vectors, rows, cols, n)
        gradient = tl.where(named, 0.0, gradient)
        if incoming.row_excluded is not None:
            of_row = tl.load(incoming.row_excluded + rows, mask=rows < n, other=0.0)
            own = tl.where(named, of_row[:, None], 0.0)
    if vectors.col_exclude is not None:
        named = excluded_by_cols(vectors, rows, cols, m)
        gradient = tl.where(named, 0.0, gradient)
        if incoming.col_excluded is not None:
            of_col = tl.load(incoming.col_excluded + cols, mask=cols < m, other=0.0)
            own += tl.where(named, of_col[None, :], 0.0)
    return gradient + own


@triton.jit
def gradient_of_tile(pairs, has, vectors, incoming, rows, cols, n, m, RESTRICT: tl.constexpr):
    """dL/ds: u_i e^(s - row_max_i) + v_j e^(s - col_max_j), with one exponential per pair as in `reduce_tile`.

    On top of it the gradients of the totals, and for an excluded pair that of its own logit alone.
    """
    infinity = float("inf")
    logits = logits_of_tile(pairs, vectors, rows, cols, n, m)
    logits = those_taking_part(logits, vectors, rows, cols, n, m, RESTRICT)
    if incoming.row_max is not None:
        u = tl.load(incoming.row_weight + rows, mask=rows < n, other=0.0)
        row_max = tl.load(incoming.row_max + rows, mask=rows < n, other=infinity)
    if incoming.col_max is not None:
        v = tl.load(incoming.col_weight + cols, mask=cols < m, other=0.0)
        col_max = tl.load(incoming.col_max + cols, mask=cols < m, other=infinity)
    if incoming.col_max is None:
        gradient = u[:, None] * tl.exp(logits - row_max[:, None])
    elif incoming.row_max is None:
        gradient = v[None, :] * tl.exp(logits - col_max[None, :])
    else:
        low = tl.minimum(tl.min(row_max, 0), tl.min(col_max, 0))
        high = tl.maximum(
            tl.max(tl.where(row_max == infinity, -infinity, row_max), 0),
            tl.max(tl.where(col_max == infinity, -infinity, col_max), 0),
        )
        if high - low <= 40.0:
            shift = shift_of(high)
            of_row = u * tl.exp(shift - row_max)
            of_col = v * tl.exp(shift - col_max)
            gradient = (of_row[:, None] + of_col[None, :]) * tl.exp(logits - shift)
        else:
            of_rows = u[:, None] * tl.exp(logits - row_max[:, None])
            gradient = of_rows + v[None, :] * tl.exp(logits - col_max[None, :])
    if incoming.row_total is not None:
        of_row = tl.load(incoming.row_total + rows, mask=rows < n, other=0.0)
        gradient += tl.where(logits > -infinity, of_row[:, None], 0.0)
    if incoming.col_total is not None:
        of_col = tl.load(incoming.col_total + cols, mask=cols < m, other=0.0)
        gradient += tl.where(logits > -infinity, of_col[None, :], 0.0)
    if has:
        gradient = own_gradients(gradient, vectors, incoming, rows, cols, n, m)
    return gradient
