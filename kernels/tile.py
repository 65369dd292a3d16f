"""What happens on one tile of the N x M plane, for all kernels: pairs, logits and masks. reduction.py has the rest.

    s_ij = a_i b_j pair_ij + c_i + d_j
    pair_ij = <x_i, y_j>, or for volumes minus the distance of x_i from the span of the vectors y_j1 .. y_jP

Functions of values in registers: they read the inputs and write nothing. vectors, span and second are the tuples of
contrastive_ops/plane.py; what is None was not given, and costs nothing: Triton compiles a kernel for each set
of arguments that are there.

A multiprocessor takes about as long for ten operations on every pair as for its products with 256 features. So masks
are for the tiles that need one, which a look at the ranges of their indices and ids tells.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(2147483647)  # beyond every index and every id, which are ranks


class Ranges(NamedTuple):
    """Of the rows, or of the columns, of a tile: which they leave out, and which ids they have; 0 without such."""

    first_excluded: object
    last_excluded: object
    first_id: object
    last_id: object


@triton.jit
def exp(x):
    """e^x by one instruction: values below 2^-126 are 0, where tl.exp takes three more to keep them."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def ranges_of_tile(exclude, ids, index, size):
    first_excluded, last_excluded, first_id, last_id = 0, 0, 0, 0
    if exclude is not None:
        excluded = tl.load(exclude + index, mask=index < size, other=-1)
        first_excluded = tl.min(tl.where(excluded < 0, NONE, excluded), 0)
        last_excluded = tl.max(excluded, 0)
    if ids is not None:
        first_id = tl.min(tl.load(ids + index, mask=index < size, other=NONE), 0)
        last_id = tl.max(tl.load(ids + index, mask=index < size, other=-1), 0)
    return Ranges(first_excluded, last_excluded, first_id, last_id)


@triton.jit
def ranges_of_rows(vectors, rows, n):
    return ranges_of_tile(vectors.row_exclude, vectors.row_ids, rows, n)


@triton.jit
def ranges_of_cols(vectors, cols, m):
    return ranges_of_tile(vectors.col_exclude, vectors.col_ids, cols, m)


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
def described_dot_products(
    x, y, row, col, features,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same through tensor descriptors, which the hardware copies by itself, with 0 beyond the edges."""
    dots = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, features, BLOCK_D):
        x_tile = x.load([row, begin])
        y_tile = y.load([col, begin])
        dots = tl.dot(x_tile, y_tile.T, dots, input_precision=PRECISION)
    return dots


@triton.jit
def pairs_of_tile(
    x, y, span, rows, cols, row, col, n, m, features,
    MEMBERS: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The pairs; for volumes of P = MEMBERS vectors also the coordinates of x_i in the span, L^-1 <x_i, y_j.>."""
    coordinates = ()
    if DESCRIBED:
        pairs = described_dot_products(x, y, row, col, features, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
    elif MEMBERS == 0:
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
def second_pairs_of_tile(
    u, v, rows, cols, row, col, n, m, width, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """<u_i, v_j>"""
    if DESCRIBED:
        pairs = described_dot_products(u, v, row, col, width, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
    else:
        pairs = dot_products(u, v, width, rows, cols, n, m, width, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
    return pairs


@triton.jit
def scaled_by_rows(values, vectors, rows, n):
    """a_i values_ij"""
    if vectors.row_scale is not None:
        values = values * tl.load(vectors.row_scale + rows, mask=rows < n, other=1.0)[:, None]
    return values


@triton.jit
def scaled_by_cols(values, vectors, cols, m):
    """b_j values_ij"""
    if vectors.col_scale is not None:
        values = values * tl.load(vectors.col_scale + cols, mask=cols < m, other=1.0)[None, :]
    return values


@triton.jit
def logits_of_tile(pairs, vectors, rows, cols, n, m):
    """Logits of all pairs, whether they take part or not.

    Not (a_i b_j) pair_ij, of which backward would keep a tile of products in registers.
    """
    logits = scaled_by_cols(scaled_by_rows(pairs, vectors, rows, n), vectors, cols, m)
    if vectors.row_bias is not None:
        logits = logits + tl.load(vectors.row_bias + rows, mask=rows < n, other=0.0)[:, None]
    if vectors.col_bias is not None:
        logits = logits + tl.load(vectors.col_bias + cols, mask=cols < m, other=0.0)[None, :]
    return logits


@triton.jit
def has_excluded(vectors, of_rows, of_cols, row, col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile may have a pair left out by index."""
    has = False
    if vectors.row_exclude is not None:
        has = (of_rows.first_excluded < col + BLOCK_N) & (of_rows.last_excluded >= col)
    if vectors.col_exclude is not None:
        has = has | ((of_cols.first_excluded < row + BLOCK_M) & (of_cols.last_excluded >= row))
    return has


@triton.jit
def may_be_equal(of_rows, of_cols):
    """Whether a row and a column of a tile may have the same id."""
    return (of_rows.first_id <= of_cols.last_id) & (of_cols.first_id <= of_rows.last_id)


@triton.jit
def is_needed(of_rows, of_cols, has, RESTRICT: tl.constexpr):
    """Whether any pair of a tile may count. If only equal ids take part, ids that are sorted rule most tiles out."""
    needed = True
    if RESTRICT:
        needed = has | may_be_equal(of_rows, of_cols)
    return needed


@triton.jit
def excluded_by_rows(vectors, rows, cols, n):
    """Whether column j is the one that row i leaves out; no index is beyond the columns."""
    return tl.load(vectors.row_exclude + rows, mask=rows < n, other=-1)[:, None] == cols[None, :]


@triton.jit
def excluded_by_cols(vectors, rows, cols, m):
    """Whether row i is the one that column j leaves out."""
    return tl.load(vectors.col_exclude + cols, mask=cols < m, other=-1)[None, :] == rows[:, None]


@triton.jit
def is_above(guides, second, rows, cols, n, m):
    """Whether a pair is above the ceiling of its row or of its column; NaN is not."""
    above = tl.zeros_like(guides) > 0.0
    if second.row_ceiling is not None:
        above = guides > tl.load(second.row_ceiling + rows, mask=rows < n, other=0.0)[:, None]
    if second.col_ceiling is not None:
        above = above | (guides > tl.load(second.col_ceiling + cols, mask=cols < m, other=0.0)[None, :])
    return above


@triton.jit
def those_taking_part(
    values, guides, nothing, vectors, second, of_rows, of_cols, has, rows, cols, row, col, n, m,
    RESTRICT: tl.constexpr, ABOVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`nothing` beyond the last row and column, and where the index, the ids or the guide leave a pair out."""
    leaves_out = has | (row + BLOCK_M > n) | (col + BLOCK_N > m)
    if vectors.row_ids is not None:
        leaves_out = leaves_out | RESTRICT | may_be_equal(of_rows, of_cols)
    if vectors.row_scale is None and vectors.col_scale is None:
        leaves_out = True  # Triton 3.6 can't compile rows_kernel where a product meets a condition as it is
    if second.row_ceiling is not None or second.col_ceiling is not None:
        leaves_out = True
    if leaves_out:
        values = tl.where((rows[:, None] < n) & (cols[None, :] < m), values, nothing)
        if vectors.row_ids is not None:
            row_id = tl.load(vectors.row_ids + rows, mask=rows < n, other=0)
            col_id = tl.load(vectors.col_ids + cols, mask=cols < m, other=0)
            values = tl.where((row_id[:, None] == col_id[None, :]) == RESTRICT, values, nothing)
        if second.row_ceiling is not None or second.col_ceiling is not None:
            values = tl.where(is_above(guides, second, rows, cols, n, m) == ABOVE, values, nothing)
        if vectors.row_exclude is not None:
            values = tl.where(excluded_by_rows(vectors, rows, cols, n), nothing, values)
        if vectors.col_exclude is not None:
            values = tl.where(excluded_by_cols(vectors, rows, cols, m), nothing, values)
    return values


@triton.jit
def shift_of(maximum):
    """What to subtract before exp: an empty set (-inf) is shifted by 0, as (-inf) - (-inf) would be NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def one_each(values, BLOCK: tl.constexpr):
    """The same vector with an element in a thread: what a reduction gives has copies in many, which all compute on."""
    return tl.gather(values, tl.arange(0, BLOCK), 0)
