"""similarity_logsumexp in Triton: row and column log-sum-exps of s_ij = a_i b_j <x_i, y_j> + c_i + d_j, and gradients.

    forward, one program per (group of rows, strip of columns):
        for each tile of columns of the strip, for each tile of rows of the group:
            s = logits of the tile, -inf where a pair does not take part
            fold max and sum of e^s into the statistics of the columns, in registers
            fold them into the statistics of the rows, in memory that no other program writes
        -> partials [strips, N] and [groups, M], merged by a second kernel in a fixed order
    backward, for each block of the plane:
        one program per tile: s again, g = u_i e^(s - row_lse_i) + v_j e^(s - col_lse_j), the gradient of an excluded
        pair's own logit in its place -> g a b into a workspace, and partial sums of g for scales and biases
        dX += (g a b) Y and dY += (g a b)^T X: two matrix products of the vendor's library

No atomics: the results are bitwise repeatable. In self-similarity (no y) forward visits the tiles on and above the
diagonal; a tile above it also stands for its mirror image. The launchers are plain functions of tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiling(NamedTuple):
    """How a problem is cut; sizes are powers of two."""

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int


# By class of device, then by bytes of an element; bench/resources.py compiles every entry. Square: in
# self-similarity a tile is on the diagonal, or it is not. 128 x 128 spills registers with every option given.
TILINGS = {
    "any": {2: Tiling(64, 64, 64, 8, 3), 4: Tiling(64, 64, 16, 8, 3)},
    "sm_90": {2: Tiling(64, 64, 64, 8, 3), 4: Tiling(64, 64, 32, 16, 2)},
}
GROUPS = 16  # of rows, and strips of columns: 256 programs for some 132 multiprocessors, and partials of 16 (N + M)
WORKSPACE = 4096  # rows and columns of a block of backward: 32 MB of bfloat16 coefficients
MERGE = 1024  # rows of a program that merges partials


@triton.jit
def dot_products(
    x, y, rows, cols, n, m, features,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> of a tile in float32; rows and columns beyond the last are 0."""
    dots = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    x_rows = x + rows.to(tl.int64)[:, None] * features
    y_rows = y + cols.to(tl.int64)[:, None] * features
    for begin in range(0, features, BLOCK_D):
        feature = begin + tl.arange(0, BLOCK_D)
        inside = feature[None, :] < features
        x_tile = tl.load(x_rows + feature[None, :], mask=(rows[:, None] < n) & inside, other=0.0)
        y_tile = tl.load(y_rows + feature[None, :], mask=(cols[:, None] < m) & inside, other=0.0)
        dots = tl.dot(x_tile, tl.trans(y_tile), dots, input_precision=PRECISION)
    return dots


@triton.jit
def vector_or(vector, index, size, otherwise):
    """The values of a vector of the statistics' dtype, or `otherwise` where there is none."""
    values = tl.zeros_like(index).to(tl.float32) + otherwise
    if vector is not None:
        values = tl.load(vector + index, mask=index < size, other=otherwise)
    return values


@triton.jit
def all_logits(dots, row_scale, col_scale, row_bias, col_bias, rows, cols, n, m):
    """Logits of all pairs of a tile, -inf beyond the last row and column."""
    scale = vector_or(row_scale, rows, n, 1.0)[:, None] * vector_or(col_scale, cols, m, 1.0)[None, :]
    bias = vector_or(row_bias, rows, n, 0.0)[:, None] + vector_or(col_bias, cols, m, 0.0)[None, :]
    inside = (rows[:, None] < n) & (cols[None, :] < m)
    return tl.where(inside, dots * scale + bias, -float("inf"))


@triton.jit
def excluded_of_rows(exclude, rows, cols, n):
    """Whether column j is exclude[i]."""
    return tl.load(exclude + rows, mask=rows < n, other=-1)[:, None] == cols[None, :]


@triton.jit
def excluded_of_cols(exclude, rows, cols, m):
    """Whether row i is exclude[j]; a pair of self-similarity has two sides."""
    return tl.load(exclude + cols, mask=cols < m, other=-1)[None, :] == rows[:, None]


@triton.jit
def masked(logits, exclude, row_ids, col_ids, rows, cols, n, m, MIRRORED: tl.constexpr, RESTRICT: tl.constexpr):
    """-inf where a pair does not take part."""
    if exclude is not None:
        logits = tl.where(excluded_of_rows(exclude, rows, cols, n), -float("inf"), logits)
        if MIRRORED:
            logits = tl.where(excluded_of_cols(exclude, rows, cols, m), -float("inf"), logits)
    if row_ids is not None:
        row_id = tl.load(row_ids + rows, mask=rows < n, other=0)
        col_id = tl.load(col_ids + cols, mask=cols < m, other=0)
        equal = row_id[:, None] == col_id[None, :]
        logits = tl.where(equal == RESTRICT, logits, -float("inf"))
    return logits


@triton.jit
def anything_in(exclude, row_ids, col_ids, rows, cols, n, m, MIRRORED: tl.constexpr, RESTRICT: tl.constexpr):
    """Whether a tile has a pair that takes part or an excluded one, by the ranges of its ids."""
    anything = True
    if RESTRICT:
        large: tl.constexpr = 9223372036854775807
        row_low = tl.min(tl.load(row_ids + rows, mask=rows < n, other=large))
        row_high = tl.max(tl.load(row_ids + rows, mask=rows < n, other=-large))
        col_low = tl.min(tl.load(col_ids + cols, mask=cols < m, other=large))
        col_high = tl.max(tl.load(col_ids + cols, mask=cols < m, other=-large))
        anything = (row_low <= col_high) & (col_low <= row_high)
        if exclude is not None:
            named = excluded_of_rows(exclude, rows, cols, n)
            if MIRRORED:
                named = named | excluded_of_cols(exclude, rows, cols, m)
            anything = anything | (tl.max(tl.max(named.to(tl.int32), 1), 0) > 0)
    return anything


@triton.jit
def shift_of(maximum):
    """What to subtract before exp: an empty set (-inf) is shifted by 0, as (-inf) - (-inf) would be NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def fold(old_max, old_sum, part_max, part_sum):
    """Join two (max, sum of e^(s - max)); an empty set is (-inf, 0)."""
    new_max = tl.maximum(old_max, part_max, propagate_nan=tl.PropagateNan.ALL)
    shift = shift_of(new_max)
    return new_max, old_sum * tl.exp(old_max - shift) + part_sum * tl.exp(part_max - shift)


@triton.jit
def largest(logits, AXIS: tl.constexpr):
    """Maximum along an axis; NaN where there is one, as in a sum."""
    maximum = tl.max(logits, AXIS)
    has_nan = tl.max((logits != logits).to(tl.int32), AXIS) > 0
    return tl.where(has_nan, float("nan"), maximum)


@triton.jit
def reduce_tile(logits, BOTH: tl.constexpr, ROWS: tl.constexpr):
    """Maxima and sums over the rows and over the columns of a tile, with one exponential per pair where it is exact.

    One shift serves all sets of a tile if their maxima lie within 40 of it: terms down to 2^-24 of the largest of a
    set stay above the smallest normal number.
    """
    row_max = largest(logits, 1)
    col_max = largest(logits, 0)
    row_sum = tl.zeros_like(row_max)
    col_sum = tl.zeros_like(col_max)
    if BOTH:
        infinity = float("inf")
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
def forward_kernel(
    x, y, row_scale, col_scale, row_bias, col_bias, exclude, row_ids, col_ids,
    row_max, row_sum, col_max, col_sum, excluded,
    n, m, features, rows_per_group, cols_per_strip,
    ROWS: tl.constexpr, COLS: tl.constexpr, MIRRORED: tl.constexpr, RESTRICT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group, strip = tl.program_id(0), tl.program_id(1)
    first_row = group * rows_per_group
    last_row = tl.minimum(first_row + rows_per_group, n)
    first_col = strip * cols_per_strip
    last_col = tl.minimum(first_col + cols_per_strip, m)
    TO_COLS: tl.constexpr = COLS or MIRRORED
    if ROWS:
        own_row_max = row_max + strip.to(tl.int64) * n
        own_row_sum = row_sum + strip.to(tl.int64) * n
        for row in range(first_row, last_row, BLOCK_M):
            rows = row + tl.arange(0, BLOCK_M)
            tl.store(own_row_max + rows, tl.full((BLOCK_M,), -float("inf"), tl.float32), mask=rows < n)
            tl.store(own_row_sum + rows, tl.zeros((BLOCK_M,), tl.float32), mask=rows < n)
        tl.debug_barrier()
    for col in range(first_col, last_col, BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        best = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        end = last_row
        if MIRRORED:
            end = tl.minimum(last_row, col + BLOCK_N)
        for row in range(first_row, end, BLOCK_M):
            rows = row + tl.arange(0, BLOCK_M)
            if anything_in(exclude, row_ids, col_ids, rows, cols, n, m, MIRRORED, RESTRICT):
                dots = dot_products(x, y, rows, cols, n, m, features, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
                logits = all_logits(dots, row_scale, col_scale, row_bias, col_bias, rows, cols, n, m)
                if exclude is not None:
                    named = excluded_of_rows(exclude, rows, cols, n) & (cols[None, :] < m)
                    found = tl.sum(tl.where(named, logits, 0.0), 1)
                    tl.store(excluded + rows, found, mask=tl.max(named.to(tl.int32), 1) > 0)
                    if MIRRORED:
                        named = excluded_of_cols(exclude, rows, cols, m) & (rows[:, None] < n)
                        found = tl.sum(tl.where(named, logits, 0.0), 0)
                        tl.store(excluded + cols, found, mask=(tl.max(named.to(tl.int32), 0) > 0) & (row < col))
                logits = masked(logits, exclude, row_ids, col_ids, rows, cols, n, m, MIRRORED, RESTRICT)
                tile_row_max, tile_row_sum, tile_col_max, tile_col_sum = reduce_tile(logits, ROWS and TO_COLS, ROWS)
                if ROWS:
                    old_max = tl.load(own_row_max + rows, mask=rows < n, other=-float("inf"))
                    old_sum = tl.load(own_row_sum + rows, mask=rows < n, other=0.0)
                    new_max, new_sum = fold(old_max, old_sum, tile_row_max, tile_row_sum)
                    tl.store(own_row_max + rows, new_max, mask=rows < n)
                    tl.store(own_row_sum + rows, new_sum, mask=rows < n)
                    tl.debug_barrier()  # the next tile of columns reads them, perhaps in other threads
                if TO_COLS:
                    if MIRRORED:  # the diagonal has both sides already
                        tile_col_max = tl.where(row < col, tile_col_max, -float("inf"))
                        tile_col_sum = tl.where(row < col, tile_col_sum, 0.0)
                    best, total = fold(best, total, tile_col_max, tile_col_sum)
        if TO_COLS:
            tl.store(col_max + group.to(tl.int64) * m + cols, best, mask=cols < m)
            tl.store(col_sum + group.to(tl.int64) * m + cols, total, mask=cols < m)


@triton.jit
def merge_kernel(
    part_max, part_sum, parts, mirror_max, mirror_sum, mirrors, out_max, out_log_sum, size, BLOCK: tl.constexpr
):
    """Join the partials [parts, size] and [mirrors, size] of every row, in their order."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        part_best = tl.load(part_max + index, mask=index < size, other=-float("inf"))
        best, total = fold(best, total, part_best, tl.load(part_sum + index, mask=index < size, other=0.0))
        part_max += size
        part_sum += size
    if mirror_max is not None:
        for _ in range(mirrors):
            part_best = tl.load(mirror_max + index, mask=index < size, other=-float("inf"))
            best, total = fold(best, total, part_best, tl.load(mirror_sum + index, mask=index < size, other=0.0))
            mirror_max += size
            mirror_sum += size
    tl.store(out_max + index, best, mask=index < size)
    tl.store(out_log_sum + index, tl.log(total), mask=index < size)


@triton.jit
def softmax_terms(logits, grad_lse, maximum, log_sum, index, size):
    """Gradient and exponent of one direction: u, and s - lse as (s - max) - log_sum; nothing for an empty set."""
    u = tl.load(grad_lse + index, mask=index < size, other=0.0)
    best = tl.load(maximum + index, mask=index < size, other=float("inf"))
    offset = tl.load(log_sum + index, mask=index < size, other=0.0)
    empty = best == -float("inf")
    return tl.where(empty, 0.0, u), tl.where(empty, float("inf"), best), tl.where(empty, 0.0, offset)


@triton.jit
def backward_kernel(
    x, y, row_scale, col_scale, row_bias, col_bias, exclude, row_ids, col_ids,
    grad_row_lse, grad_col_lse, grad_excluded, row_max, col_max, row_log_sum, col_log_sum,
    unit, coefficients, row_scale_part, row_bias_part, col_scale_part, col_bias_part,
    n, m, features, first_row, first_col, block_rows, block_cols,
    ROWS: tl.constexpr, COLS: tl.constexpr, MIRRORED: tl.constexpr, RESTRICT: tl.constexpr, SUMS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_row, tile_col = tl.program_id(0), tl.program_id(1)
    local_rows = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    local_cols = tile_col * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols = first_row + local_rows, first_col + local_cols
    inside = (local_rows[:, None] < block_rows) & (local_cols[None, :] < block_cols)
    gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if anything_in(exclude, row_ids, col_ids, rows, cols, n, m, MIRRORED, RESTRICT):
        dots = dot_products(x, y, rows, cols, n, m, features, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
        logits = all_logits(dots, row_scale, col_scale, row_bias, col_bias, rows, cols, n, m)
        logits = masked(logits, exclude, row_ids, col_ids, rows, cols, n, m, MIRRORED, RESTRICT)
        if ROWS:
            u, best, offset = softmax_terms(logits, grad_row_lse, row_max, row_log_sum, rows, n)
            gradient += u[:, None] * tl.exp((logits - best[:, None]) - offset[:, None])
        if COLS:
            u, best, offset = softmax_terms(logits, grad_col_lse, col_max, col_log_sum, cols, m)
            gradient += u[None, :] * tl.exp((logits - best[None, :]) - offset[None, :])
        if exclude is not None:
            own = tl.load(grad_excluded + rows, mask=rows < n, other=0.0)
            gradient += tl.where(excluded_of_rows(exclude, rows, cols, n) & (cols[None, :] < m), own[:, None], 0.0)
            if MIRRORED:
                own = tl.load(grad_excluded + cols, mask=cols < m, other=0.0)
                named = excluded_of_cols(exclude, rows, cols, m) & (rows[:, None] < n)
                gradient += tl.where(named, own[None, :], 0.0)
    a = vector_or(row_scale, rows, n, 1.0)
    b = vector_or(col_scale, cols, m, 1.0)
    weighted = gradient * (a[:, None] * b[None, :])
    if unit is not None:
        weighted = weighted / tl.load(unit)
    place = coefficients + local_rows.to(tl.int64)[:, None] * block_cols + local_cols[None, :]
    tl.store(place, weighted.to(coefficients.dtype.element_ty), mask=inside)
    if SUMS:
        with_dot = gradient * dots
        row_place = tile_col.to(tl.int64) * block_rows + local_rows
        tl.store(row_scale_part + row_place, tl.sum(with_dot * b[None, :], 1), mask=local_rows < block_rows)
        tl.store(row_bias_part + row_place, tl.sum(gradient, 1), mask=local_rows < block_rows)
        col_place = tile_row.to(tl.int64) * block_cols + local_cols
        tl.store(col_scale_part + col_place, tl.sum(with_dot * a[:, None], 0), mask=local_cols < block_cols)
        tl.store(col_bias_part + col_place, tl.sum(gradient, 0), mask=local_cols < block_cols)


class Problem:
    """The inputs as the kernels take them: contiguous, with the columns of self-similarity filled in."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None,
        row_scale: Tensor | None,
        col_scale: Tensor | None,
        row_bias: Tensor | None,
        col_bias: Tensor | None,
        exclude: Tensor | None,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        restrict: bool,
    ) -> None:
        self.mirrored = y is None
        if y is None:
            y, col_scale, col_bias, col_ids = x, row_scale, row_bias, row_ids
        self.x, self.y = x.contiguous(), y.contiguous()
        if exclude is not None:  # half the registers of int64; an index beyond the columns names none
            exclude = exclude.where((exclude >= 0) & (exclude < y.shape[0]), -1).to(torch.int32)
        vectors = (row_scale, col_scale, row_bias, col_bias, exclude, row_ids, col_ids)
        self.vectors = [None if vector is None else vector.contiguous() for vector in vectors]
        self.row_scale, self.col_scale, self.exclude = self.vectors[0], self.vectors[1], self.vectors[4]
        self.n, self.features = x.shape
        self.m = y.shape[0]
        self.tiling = TILINGS[device_class(x)][x.element_size()]
        self.options = {
            "MIRRORED": self.mirrored,
            "RESTRICT": restrict,
            "PRECISION": _precision(x),
            "BLOCK_M": self.tiling.block_m,
            "BLOCK_N": self.tiling.block_n,
            "BLOCK_D": self.tiling.block_d,
            "num_warps": self.tiling.warps,
            "num_stages": self.tiling.stages,
        }

    def full(self, shape: tuple[int, ...], value: float) -> Tensor:
        return self.x.new_full(shape, value, dtype=torch.float32)

    def empty(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)


def device_class(x: Tensor) -> str:
    """The key of TILINGS for the device of a tensor."""
    if x.device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(x.device)
        return f"sm_{major}{minor}" if f"sm_{major}{minor}" in TILINGS else "any"
    return "any"


def _precision(x: Tensor) -> str:
    """PyTorch's own setting for float32 matrix products: TF32 only where the user allows it."""
    allowed = x.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed and x.dtype == torch.float32 else "ieee"


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """row_max, col_max, row_log_sum, col_log_sum, excluded of (the options of the op, rows, cols)."""
    *options, rows, cols = arguments
    problem = Problem(*options)
    n, m, tiling = problem.n, problem.m, problem.tiling
    excluded = problem.full((0 if problem.exclude is None else n,), -torch.inf)
    if n == 0 or m == 0:
        row, col = (problem.full((size,), -torch.inf) for size in (n if rows else 0, m if cols else 0))
        return row, col, row.clone(), col.clone(), excluded
    rows_per_group = _share(n, tiling.block_m)
    cols_per_strip = _share(m, tiling.block_n)
    groups, strips = triton.cdiv(n, rows_per_group), triton.cdiv(m, cols_per_strip)
    to_cols = cols or problem.mirrored
    row_part = [problem.empty(strips, n) if rows else None for _ in range(2)]
    col_part = [problem.empty(groups, m) if to_cols else None for _ in range(2)]
    forward_kernel[(groups, strips)](
        problem.x, problem.y, *problem.vectors, *row_part, *col_part, excluded,
        n, m, problem.features, rows_per_group, cols_per_strip, ROWS=rows, COLS=cols, **problem.options,
    )  # fmt: skip
    mirror = (*col_part, groups) if problem.mirrored else (None, None, 0)
    nothing = (problem.empty(0), problem.empty(0))
    of_rows = _merge(problem, *row_part, strips, *mirror, n) if rows else nothing
    of_cols = _merge(problem, *col_part, groups, None, None, 0, m) if cols else nothing
    return of_rows[0], of_cols[0], of_rows[1], of_cols[1], excluded


def _share(size: int, block: int) -> int:
    """Rows of a group: whole tiles, so that there are at most GROUPS."""
    return triton.cdiv(triton.cdiv(size, block), GROUPS) * block


def _merge(problem: Problem, *arguments: Any) -> tuple[Tensor, Tensor]:
    *partials, size = arguments
    maximum, log_sum = problem.empty(size), problem.empty(size)
    merge_kernel[(triton.cdiv(size, MERGE),)](*partials, maximum, log_sum, size, BLOCK=MERGE)
    return maximum, log_sum


def backward(
    grad_row_lse: Tensor,
    grad_col_lse: Tensor,
    grad_excluded: Tensor,
    row_max: Tensor,
    col_max: Tensor,
    row_log_sum: Tensor,
    col_log_sum: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """Gradients of x, y, row_scale, col_scale, row_bias, col_bias; empty where not needed."""
    *options, rows, cols, needs = arguments
    problem = Problem(*options)
    n, m, tiling, mirrored = problem.n, problem.m, problem.tiling, problem.mirrored
    need_x, need_y, *need_vectors = needs
    sums = any(need_vectors)
    statistics = [grad_row_lse, grad_col_lse, row_max, col_max, row_log_sum, col_log_sum]
    grad_row_lse, grad_col_lse, row_max, col_max, row_log_sum, col_log_sum = (s.contiguous() for s in statistics)
    if mirrored:
        grad_col_lse, col_max, col_log_sum, cols = grad_row_lse, row_max, row_log_sum, True
    incoming = (
        grad_row_lse, grad_col_lse, grad_excluded.contiguous(), row_max, col_max, row_log_sum, col_log_sum
    )  # fmt: skip
    operand, unit = _operand(problem, grad_row_lse, grad_col_lse, grad_excluded)
    grad_x = problem.full((n if need_x else 0, problem.features), 0.0)
    grad_y = problem.full((m if need_y else 0, problem.features), 0.0)
    row_grads = [problem.full((n,), 0.0) for _ in range(2)]  # of scale and bias
    col_grads = row_grads if mirrored else [problem.full((m,), 0.0) for _ in range(2)]
    workspace = problem.x.new_empty(min(n, WORKSPACE) * min(m, WORKSPACE), dtype=operand)
    for first_row in range(0, n, WORKSPACE):
        for first_col in range(first_row if mirrored else 0, m, WORKSPACE):
            block_rows, block_cols = min(WORKSPACE, n - first_row), min(WORKSPACE, m - first_col)
            row_range, col_range = slice(first_row, first_row + block_rows), slice(first_col, first_col + block_cols)
            grid = (triton.cdiv(block_rows, tiling.block_m), triton.cdiv(block_cols, tiling.block_n))
            row_parts = [problem.empty(grid[1], block_rows) if sums else None for _ in range(2)]
            col_parts = [problem.empty(grid[0], block_cols) if sums else None for _ in range(2)]
            coefficients = workspace[: block_rows * block_cols].view(block_rows, block_cols)
            backward_kernel[grid](
                problem.x, problem.y, *problem.vectors, *incoming, unit, coefficients, *row_parts, *col_parts,
                n, m, problem.features, first_row, first_col, block_rows, block_cols,
                ROWS=rows, COLS=cols, SUMS=sums, **problem.options,
            )  # fmt: skip
            # a block on the diagonal has both sides of its pairs
            mirror = mirrored and first_row != first_col
            if need_x:
                grad_x[row_range] += _product(coefficients, problem.y[col_range])
                if mirror:
                    grad_x[col_range] += _product(coefficients.T, problem.x[row_range])
            if need_y:
                grad_y[col_range] += _product(coefficients.T, problem.x[row_range])
            for grad, part in zip(row_grads, row_parts, strict=True):
                if part is not None:
                    grad[row_range] += part.sum(0)
            for grad, part in zip(col_grads, col_parts, strict=True):
                if part is not None and (mirror or not mirrored):
                    grad[col_range] += part.sum(0)
    if unit is not None:
        grad_x, grad_y = grad_x * unit, grad_y * unit
    dtype = problem.x.dtype
    vectors = (row_grads[0], col_grads[0], row_grads[1], col_grads[1])
    kept = (vector if need else problem.empty(0) for vector, need in zip(vectors, need_vectors, strict=True))
    empty = problem.x.new_empty(0)
    return (grad_x.to(dtype) if need_x else empty, grad_y.to(dtype) if need_y else empty.clone(), *kept)


def _operand(problem: Problem, *grads: Tensor) -> tuple[torch.dtype, Tensor | None]:
    """The dtype of the coefficients, and what they are divided by.

    float16 has no room below 6e-8: its coefficients are stored in units of a bound of the largest.
    """
    dtype = problem.x.dtype
    if dtype != torch.float16:
        return dtype, None
    bound = problem.full((), 0.0)
    for grad in grads:
        bound = bound + grad.abs().max() if grad.numel() else bound
    for scale in (problem.row_scale, problem.col_scale):
        if scale is not None and scale.numel():
            bound = bound * scale.abs().max()
    return dtype, torch.where(bound > 0, bound, 1.0).float().reshape(1)


def _product(coefficients: Tensor, features: Tensor) -> Tensor:
    """A matrix product that accumulates and returns float32."""
    if coefficients.dtype == torch.float32:
        return coefficients @ features
    if coefficients.device.type == "cuda":
        return torch.mm(coefficients, features, out_dtype=torch.float32)
    return coefficients.float() @ features.float()
