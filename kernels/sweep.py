"""The Triton kernels: sweeps over the tiles of the N x M plane. contrastive_ops/backends/sweep.py says which runs when.

forward, one program per (group of rows, strip of columns):
    for each tile of rows of the group, for each tile of columns of the strip:
        s = logits of the tile, -inf where a pair does not take part
        fold max and sum of e^s over its rows and over its columns into statistics that no other program writes
block, one program per tile:
    s again, g = dL/ds -> g a b into a workspace, and partial sums of g for scales and biases
product, where only equal ids take part, one program per (tile of rows, features) of a block:
    for each tile of columns that is needed: dX += coefficients Y
rows, for 16-bit features of few dimensions, one program per (tile of rows, strip of columns):
    for each tile of columns: s again, g = dL/ds, dX += (g a b) Y in registers
attention, of the same features, one program per (tile of rows, strip of columns):
    for each tile of columns: s, and a running max, sum of e^s and sum of (e^s a b) Y, rescaled where the max grows
"""

from __future__ import annotations

import triton
import triton.language as tl

from contrastive_ops.kernels.tile import (
    exp,
    fold,
    gradient_of_tile,
    has_excluded,
    is_needed,
    logits_of_tile,
    pairs_of_tile,
    ranges_of_cols,
    ranges_of_rows,
    reduce_tile,
    scaled_by_cols,
    scaled_by_rows,
    shift_of,
    those_taking_part,
)
from contrastive_ops.plane import AT_MINIMUM

SMALLEST = tl.constexpr(AT_MINIMUM)


@triton.jit
def excluded_kernel(
    x, y, vectors, excluded, n, features, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The logit of every row with the column that it leaves out; -inf where it leaves out none."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    index = tl.load(vectors.row_exclude + rows, mask=rows < n, other=-1)
    named = index >= 0
    dots = tl.zeros((BLOCK_M,), tl.float32)
    for begin in range(0, features, BLOCK_D):
        feature = begin + tl.arange(0, BLOCK_D)
        inside = named[:, None] & (feature[None, :] < features)
        x_tile = tl.load(x + rows.to(tl.int64)[:, None] * features + feature[None, :], mask=inside, other=0.0)
        y_tile = tl.load(y + index.to(tl.int64)[:, None] * features + feature[None, :], mask=inside, other=0.0)
        dots += tl.sum(x_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    bias = tl.zeros((BLOCK_M,), tl.float32)
    if vectors.row_scale is not None:
        scale *= tl.load(vectors.row_scale + rows, mask=rows < n, other=1.0)
    if vectors.col_scale is not None:
        scale *= tl.load(vectors.col_scale + index, mask=named, other=1.0)
    if vectors.row_bias is not None:
        bias += tl.load(vectors.row_bias + rows, mask=rows < n, other=0.0)
    if vectors.col_bias is not None:
        bias += tl.load(vectors.col_bias + index, mask=named, other=0.0)
    tl.store(excluded + rows, tl.where(named, dots * scale + bias, -float("inf")), mask=rows < n)


@triton.jit
def store_part(part, index, last, maximum, total, of_logits):
    inside = index < last
    tl.store(part.maximum + index, maximum, mask=inside)
    tl.store(part.sum + index, total, mask=inside)
    if part.total is not None:
        tl.store(part.total + index, of_logits, mask=inside)


@triton.jit
def total_of(logits, AXIS: tl.constexpr):
    """Sums of the logits of the pairs that take part."""
    return tl.sum(tl.where(logits > -float("inf"), logits, 0.0), AXIS)


@triton.jit
def forward_kernel(
    x, y, vectors, span, row_part, col_part, n, m, features, rows_per_group, cols_per_strip,
    MEMBERS: tl.constexpr, MIRRORED: tl.constexpr, RESTRICT: tl.constexpr, DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group, strip = tl.program_id(0), tl.program_id(1)
    first_row = group * rows_per_group
    last_row = tl.minimum(first_row + rows_per_group, n)
    first_col = strip * cols_per_strip
    last_col = tl.minimum(first_col + cols_per_strip, m)
    ROWS: tl.constexpr = row_part.maximum is not None
    COLS: tl.constexpr = col_part.maximum is not None
    row_begin = strip.to(tl.int64) * n  # of the statistics of this strip
    col_begin = group.to(tl.int64) * m
    if COLS:
        for col in range(first_col, last_col, BLOCK_N):
            cols = col_begin + col + tl.arange(0, BLOCK_N)
            nothing = tl.zeros((BLOCK_N,), tl.float32)
            store_part(col_part, cols, col_begin + m, nothing - float("inf"), nothing, nothing)
    tl.debug_barrier()
    # statistics of the rows stay in registers, those of the columns in memory, where no other program writes them
    for row in range(first_row, last_row, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        of_rows = ranges_of_rows(vectors, rows, n)
        row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        row_total = tl.zeros((BLOCK_M,), tl.float32)
        begin = first_col
        if MIRRORED:
            begin = tl.maximum(first_col, row)
        for col in range(begin, last_col, BLOCK_N):
            cols = col + tl.arange(0, BLOCK_N)
            of_cols = ranges_of_cols(vectors, cols, m)
            has = has_excluded(vectors, of_rows, of_cols, row, col, BLOCK_M, BLOCK_N)
            if is_needed(of_rows, of_cols, has, RESTRICT):
                # asked for before the products, needed after them
                if COLS:
                    place = col_begin + cols
                    col_max = tl.load(col_part.maximum + place, mask=cols < m, other=-float("inf"))
                    col_sum = tl.load(col_part.sum + place, mask=cols < m, other=0.0)
                pairs, _ = pairs_of_tile(
                    x, y, span, rows, cols, row, col, n, m, features,
                    MEMBERS, DESCRIBED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                logits = logits_of_tile(pairs, vectors, rows, cols, n, m)
                logits = those_taking_part(
                    logits, vectors, of_rows, of_cols, has, rows, cols, row, col, n, m, RESTRICT, BLOCK_M, BLOCK_N
                )
                tile_row_max, tile_row_sum, tile_col_max, tile_col_sum = reduce_tile(logits, ROWS, COLS, BLOCK_N)
                if ROWS:
                    row_max, row_sum = fold(row_max, row_sum, tile_row_max, tile_row_sum)
                    if row_part.total is not None:
                        row_total += total_of(logits, 1)
                if COLS:
                    if MIRRORED:  # the tiles on the diagonal have both sides already
                        tile_col_max = tl.where(row + BLOCK_M <= col, tile_col_max, -float("inf"))
                        tile_col_sum = tl.where(row + BLOCK_M <= col, tile_col_sum, 0.0)
                    col_total = tile_col_sum
                    if col_part.total is not None:
                        col_total = tl.load(col_part.total + place, mask=cols < m, other=0.0) + total_of(logits, 0)
                    col_max, col_sum = fold(col_max, col_sum, tile_col_max, tile_col_sum)
                    tl.debug_barrier()  # several threads may have read an element, of which one writes it
                    store_part(col_part, place, col_begin + m, col_max, col_sum, col_total)
                    tl.debug_barrier()  # other threads may read it for the next tile
        if ROWS:
            store_part(row_part, row_begin + rows, row_begin + n, row_max, row_sum, row_total)


@triton.jit
def fold_parts(part, parts, best, total, index, size):
    """Fold the partials [parts, size] of every row into (max, sum), in their order."""
    place = index.to(tl.int64)
    for _ in range(parts):
        part_best = tl.load(part.maximum + place, mask=index < size, other=-float("inf"))
        best, total = fold(best, total, part_best, tl.load(part.sum + place, mask=index < size, other=0.0))
        place += size
    return best, total


@triton.jit
def merge_kernel(part, parts, mirror, mirrors, out_max, out_log_sum, out_lse, size, BLOCK: tl.constexpr):
    """Join the partials of every row; in self-similarity also those of its columns."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    best, total = fold_parts(part, parts, best, total, index, size)
    if mirror.maximum is not None:
        best, total = fold_parts(mirror, mirrors, best, total, index, size)
    best = tl.where(total == total, best, total)  # NaN is in the sums only, so far
    tl.store(out_max + index, best, mask=index < size)
    log_sum = tl.log(total)
    tl.store(out_log_sum + index, log_sum, mask=index < size)
    tl.store(out_lse + index, best + log_sum, mask=index < size)


@triton.jit
def block_kernel(
    x, y, vectors, span, incoming, unit, coefficients, row_sums, col_sums,
    n, m, features, first_row, first_col, block_rows, block_cols, stride,
    MEMBERS: tl.constexpr, RESTRICT: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Coefficients of one tile of a block, [block_rows, stride] or for volumes [P, block_rows, stride].

    The stride of rows is a multiple of 16, and what is beyond the columns of the block is stored, too, as 0: stores of
    whole vectors, which a mask of single columns would prevent. Tiles that are not needed are not written.

    For volumes Q_j = L^-1 (y_j.) and q = -(dL/dpair) / pair give dL/dx_i = sum_jt (q y_ijt) Q_jt - (sum_j q) x_i and
    the moments sum_i (q y_ijt) x_i of a tuple; y_ijt are the coordinates.
    """
    tile_row, tile_col = tl.program_id(0), tl.program_id(1)
    local_rows = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    local_cols = tile_col * BLOCK_N + tl.arange(0, BLOCK_N)
    row, col = first_row + tile_row * BLOCK_M, first_col + tile_col * BLOCK_N
    rows, cols = first_row + local_rows, first_col + local_cols
    of_rows, of_cols = ranges_of_rows(vectors, rows, n), ranges_of_cols(vectors, cols, m)
    has = has_excluded(vectors, of_rows, of_cols, row, col, BLOCK_M, BLOCK_N)
    place = local_rows.to(tl.int64)[:, None] * stride + local_cols[None, :]
    inside = (local_rows[:, None] < block_rows) & (local_cols[None, :] < stride)
    row_place = tile_col.to(tl.int64) * block_rows + local_rows
    col_place = tile_row.to(tl.int64) * block_cols + local_cols
    needed = is_needed(of_rows, of_cols, has, RESTRICT)
    pairs = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    coordinates = ()
    if MEMBERS > 0:  # ids are of pairs alone, so that all are needed
        pairs, coordinates = pairs_of_tile(
            x, y, span, rows, cols, row, col, n, m, features,
            MEMBERS, DESCRIBED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        gradient = gradient_of_tile(
            pairs, vectors, incoming, of_rows, of_cols, has, rows, cols, row, col, n, m, RESTRICT, BLOCK_M, BLOCK_N
        )
    elif needed:
        pairs, _ = pairs_of_tile(
            x, y, span, rows, cols, row, col, n, m, features,
            MEMBERS, DESCRIBED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        gradient = gradient_of_tile(
            pairs, vectors, incoming, of_rows, of_cols, has, rows, cols, row, col, n, m, RESTRICT, BLOCK_M, BLOCK_N
        )
    weighted = scaled_by_cols(gradient, vectors, cols, m)
    if row_sums.scale is not None:
        tl.store(row_sums.scale + row_place, tl.sum(weighted * pairs, 1), mask=local_rows < block_rows)
    if row_sums.bias is not None:
        tl.store(row_sums.bias + row_place, tl.sum(gradient, 1), mask=local_rows < block_rows)
    if col_sums.scale is not None:
        of_scale = tl.sum(scaled_by_rows(gradient * pairs, vectors, rows, n), 0)
        tl.store(col_sums.scale + col_place, of_scale, mask=local_cols < block_cols)
    if col_sums.bias is not None:
        tl.store(col_sums.bias + col_place, tl.sum(gradient, 0), mask=local_cols < block_cols)
    if coefficients is not None:
        weighted = scaled_by_rows(weighted, vectors, rows, n)
        if MEMBERS == 0:
            if unit is not None:
                weighted = weighted / tl.load(unit)
            if needed:
                tl.store(coefficients + place, weighted.to(coefficients.dtype.element_ty), mask=inside)
        else:
            smallest = tl.sqrt(tl.load(span.square + rows, mask=rows < n, other=0.0) * SMALLEST)
            at_minimum = -pairs <= smallest[:, None]
            q = tl.where(at_minimum, 0.0, weighted / tl.where(at_minimum, 1.0, -pairs))
            if row_sums.along is not None:
                tl.store(row_sums.along + row_place, tl.sum(q, 1), mask=local_rows < block_rows)
            if unit is not None:
                q = q / tl.load(unit)
            for t in tl.static_range(MEMBERS):
                of_member = coefficients + t * tl.cast(block_rows, tl.int64) * stride
                tl.store(of_member + place, (q * coordinates[t]).to(coefficients.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(
    coefficients, y, total, vectors, n, m, features,
    first_row, first_col, block_rows, block_cols, row_stride, col_stride, begins, one,
    RESTRICT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """total += coefficients @ y of a block, [block_rows, D], without the tiles that are not needed.

    Where the total begins with this block, what is there is not read. `one` is 1.0, which the compiler does not know.

    These tiles divide those of block_kernel, whichever side the rows are: what is needed of them, it has written.
    """
    tile_row = tl.program_id(0) * BLOCK_M
    local_rows = tile_row + tl.arange(0, BLOCK_M)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_place = local_rows.to(tl.int64)[:, None] * row_stride
    of_rows = ranges_of_rows(vectors, first_row + local_rows, n)
    added = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tiles = 0
    for begin in range(0, block_cols, BLOCK_N):
        local_cols = begin + tl.arange(0, BLOCK_N)
        of_cols = ranges_of_cols(vectors, first_col + local_cols, m)
        has = has_excluded(vectors, of_rows, of_cols, first_row + tile_row, first_col + begin, BLOCK_M, BLOCK_N)
        if is_needed(of_rows, of_cols, has, RESTRICT):
            within = local_cols < block_cols
            place = row_place + local_cols.to(tl.int64)[None, :] * col_stride
            weights_inside = (local_rows[:, None] < block_rows) & within[None, :]
            weights = tl.load(coefficients + place, mask=weights_inside, other=0.0)
            y_place = local_cols.to(tl.int64)[:, None] * features + feature[None, :]
            y_tile = tl.load(y + y_place, mask=within[:, None] & (feature[None, :] < features), other=0.0)
            if PRECISION == "tf32x3":
                # matrix units cut sums off, by a bias that grows with every step of thousands: each step has a sum of
                # its own, which the compiler would make part of the whole if it were simply added
                added = tl.fma(tl.dot(weights, y_tile, input_precision=PRECISION), one, added)
            else:
                added = tl.dot(weights, y_tile, added, input_precision=PRECISION)
            tiles += 1
    if (tiles > 0) | (begins > 0):
        place = total + local_rows.to(tl.int64)[:, None] * features + feature[None, :]
        inside = (local_rows[:, None] < block_rows) & (feature[None, :] < features)
        before = tl.load(place, mask=inside & (begins == 0), other=0.0)
        tl.store(place, before + added, mask=inside)


@triton.jit
def rows_kernel(
    x, y, vectors, incoming, unit, grad, sums, n, m, features, cols_per_strip,
    RESTRICT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of rows over a strip of columns, [strips, N, D], with all features in registers."""
    strip = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    feature = tl.arange(0, BLOCK_D)
    first_col = strip * cols_per_strip
    last_col = tl.minimum(first_col + cols_per_strip, m)
    x_inside = (rows[:, None] < n) & (feature[None, :] < features)
    x_place = rows.to(tl.int64)[:, None] * features + feature[None, :]
    x_tile = tl.load(x + x_place, mask=x_inside, other=0.0)
    of_rows = ranges_of_rows(vectors, rows, n)
    grad_rows = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    scale_sum = tl.zeros((BLOCK_M,), tl.float32)
    bias_sum = tl.zeros((BLOCK_M,), tl.float32)
    for col in range(first_col, last_col, BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        of_cols = ranges_of_cols(vectors, cols, m)
        has = has_excluded(vectors, of_rows, of_cols, row, col, BLOCK_M, BLOCK_N)
        if is_needed(of_rows, of_cols, has, RESTRICT):
            y_place = cols.to(tl.int64)[:, None] * features + feature[None, :]
            y_tile = tl.load(y + y_place, mask=(cols[:, None] < m) & (feature[None, :] < features), other=0.0)
            pairs = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)
            gradient = gradient_of_tile(
                pairs, vectors, incoming, of_rows, of_cols, has, rows, cols, row, col, n, m, RESTRICT, BLOCK_M, BLOCK_N
            )
            weighted = scaled_by_cols(gradient, vectors, cols, m)
            if sums.scale is not None:
                scale_sum += tl.sum(weighted * pairs, 1)
            # before it is rounded: `unit` is a bound of the product
            weighted = scaled_by_rows(weighted, vectors, rows, n)
            if sums.bias is not None:
                bias_sum += tl.sum(gradient, 1)
            if grad is not None:
                if unit is not None:
                    weighted = weighted / tl.load(unit)
                grad_rows = tl.dot(weighted.to(y.dtype.element_ty), y_tile, grad_rows, input_precision=PRECISION)
    of_strip = strip.to(tl.int64) * n
    if grad is not None:
        if unit is not None:
            grad_rows *= tl.load(unit)
        tl.store(grad + of_strip * features + x_place, grad_rows.to(grad.dtype.element_ty), mask=x_inside)
    if sums.scale is not None:
        tl.store(sums.scale + of_strip + rows, scale_sum, mask=rows < n)
    if sums.bias is not None:
        tl.store(sums.bias + of_strip + rows, bias_sum, mask=rows < n)


@triton.jit
def attention_kernel(
    x, y, vectors, unit, part, slopes, n, m, features, cols_per_strip,
    RESTRICT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Statistics of a tile of rows over a strip of columns, and the gradients of their log-sum-exp in registers."""
    strip = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    feature = tl.arange(0, BLOCK_D)
    first_col = strip * cols_per_strip
    last_col = tl.minimum(first_col + cols_per_strip, m)
    x_inside = (rows[:, None] < n) & (feature[None, :] < features)
    x_place = rows.to(tl.int64)[:, None] * features + feature[None, :]
    x_tile = tl.load(x + x_place, mask=x_inside, other=0.0)
    of_rows = ranges_of_rows(vectors, rows, n)
    per_unit = 1.0
    if unit is not None:
        per_unit = 1.0 / tl.load(unit)
    best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    of_x = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    of_scale = tl.zeros((BLOCK_M,), tl.float32)
    for col in range(first_col, last_col, BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        of_cols = ranges_of_cols(vectors, cols, m)
        has = has_excluded(vectors, of_rows, of_cols, row, col, BLOCK_M, BLOCK_N)
        if is_needed(of_rows, of_cols, has, RESTRICT):
            y_place = cols.to(tl.int64)[:, None] * features + feature[None, :]
            y_tile = tl.load(y + y_place, mask=(cols[:, None] < m) & (feature[None, :] < features), other=0.0)
            pairs = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)
            logits = logits_of_tile(pairs, vectors, rows, cols, n, m)
            logits = those_taking_part(
                logits, vectors, of_rows, of_cols, has, rows, cols, row, col, n, m, RESTRICT, BLOCK_M, BLOCK_N
            )
            new = tl.maximum(best, tl.max(logits, 1))
            shift = shift_of(new)
            decay = exp(best - shift)
            terms = exp(logits - shift[:, None])
            best = new
            total = total * decay + tl.sum(terms, 1)
            weighted = scaled_by_cols(terms, vectors, cols, m)
            of_scale = of_scale * decay + tl.sum(weighted * pairs, 1)
            # before it is rounded: `unit` is a bound of the product
            weighted = scaled_by_rows(weighted, vectors, rows, n)
            if unit is not None:
                weighted *= per_unit
            of_x = tl.dot(weighted.to(y.dtype.element_ty), y_tile, of_x * decay[:, None], input_precision=PRECISION)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    of_strip = strip.to(tl.int64) * n
    tl.store(part.maximum + of_strip + rows, best, mask=rows < n)
    tl.store(part.sum + of_strip + rows, total, mask=rows < n)
    tl.store(slopes.scale + of_strip + rows, of_scale * share, mask=rows < n)
    if unit is not None:
        share *= tl.load(unit)
    tl.store(slopes.x + of_strip * features + x_place, of_x * share[:, None], mask=x_inside)
