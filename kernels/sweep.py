"""The Triton kernels: sweeps over the tiles of the N x M plane. contrastive_ops/backends/sweep.py says which runs when.

forward, one program per (group of rows, strip of columns):
    for each tile of rows of the group, for each tile of columns of the strip:
        s = logits of the tile, and with a second form also z
        fold what the reduction has of its rows and of its columns into statistics that no other program writes
block, one program per tile:
    s again, g = dL/ds -> g a b into a workspace, and partial sums of g for scales and biases; likewise of z
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

from contrastive_ops.kernels.reduction import (
    empty_state,
    function_of,
    gradients_of_tile,
    join,
    load_state,
    slope_of,
    state_if,
    statistics_of_tile,
    store_state,
)
from contrastive_ops.kernels.tile import (
    exp,
    has_excluded,
    is_needed,
    logits_of_tile,
    pairs_of_tile,
    ranges_of_cols,
    ranges_of_rows,
    scaled_by_cols,
    scaled_by_rows,
    second_pairs_of_tile,
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
def forward_kernel(
    x, y, vectors, span, u, v, second, row_part, col_part, n, m, features, width, rows_per_group, cols_per_strip,
    MEMBERS: tl.constexpr, MIRRORED: tl.constexpr, DESCRIBED: tl.constexpr,
    REDUCTION: tl.constexpr, RESTRICT: tl.constexpr, ABOVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group, strip = tl.program_id(0), tl.program_id(1)
    first_row = group * rows_per_group
    last_row = tl.minimum(first_row + rows_per_group, n)
    first_col = strip * cols_per_strip
    last_col = tl.minimum(first_col + cols_per_strip, m)
    ROWS: tl.constexpr = row_part.sum is not None
    COLS: tl.constexpr = col_part.sum is not None
    TEACHES: tl.constexpr = REDUCTION == "expectation" and u is not None
    row_begin = strip.to(tl.int64) * n  # of the statistics of this strip
    col_begin = group.to(tl.int64) * m
    if COLS:
        for col in range(first_col, last_col, BLOCK_N):
            cols = col_begin + col + tl.arange(0, BLOCK_N)
            store_state(col_part, 0, cols, cols < col_begin + m, empty_state(col_part, BLOCK_N))
    tl.debug_barrier()
    # statistics of the rows stay in registers, those of the columns in memory, where no other program writes them
    for row in range(first_row, last_row, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        of_rows = ranges_of_rows(vectors, rows, n)
        row_state = empty_state(row_part, BLOCK_M)
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
                    col_state = load_state(col_part, place, cols < m, False, BLOCK_N)
                pairs, _ = pairs_of_tile(
                    x, y, span, rows, cols, row, col, n, m, features,
                    MEMBERS, DESCRIBED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                logits = logits_of_tile(pairs, vectors, rows, cols, n, m)
                others = logits
                if u is not None:
                    others = second_pairs_of_tile(
                        u, v, rows, cols, row, col, n, m, width, DESCRIBED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
                    )
                    others = logits_of_tile(others, second, rows, cols, n, m)
                of_tile_rows, of_tile_cols = statistics_of_tile(
                    logits, others, row_part, col_part, vectors, second,
                    of_rows, of_cols, has, rows, cols, row, col, n, m,
                    REDUCTION, TEACHES, RESTRICT, ABOVE, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                if ROWS:
                    row_state = join(row_part, row_state, of_tile_rows)
                if COLS:
                    if MIRRORED:  # the tiles on the diagonal have both sides already
                        of_tile_cols = state_if(row + BLOCK_M <= col, col_part, of_tile_cols, BLOCK_N)
                    col_state = col_state + load_state(col_part, place, cols < m, True, BLOCK_N)
                    col_state = join(col_part, col_state, of_tile_cols)
                    tl.debug_barrier()  # several threads may have read an element, of which one writes it
                    store_state(col_part, 0, place, place < col_begin + m, col_state)
                    tl.debug_barrier()  # other threads may read it for the next tile
        if ROWS:
            store_state(row_part, 0, row_begin + rows, row_begin + rows < row_begin + n, row_state)


@triton.jit
def join_parts(part, parts, state, index, size, BLOCK: tl.constexpr):
    """Join the partials [parts, size] of every row to its state, in their order."""
    place = index.to(tl.int64)
    for _ in range(parts):
        state = join(part, state, load_state(part, place, index < size, False, BLOCK))
        place += size
    return state


@triton.jit
def merge_kernel(
    part, parts, mirror, mirrors, out_max, out_log_sum, out_lse, out_mean, size, BLOCK: tl.constexpr
):  # fmt: skip
    """Join the partials of every row; in self-similarity also those of its columns."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    state = join_parts(part, parts, empty_state(part, BLOCK), index, size, BLOCK)
    if mirror.maximum is not None:
        state = join_parts(mirror, mirrors, state, index, size, BLOCK)
    best, total = state[0], state[1]
    best = tl.where(total == total, best, total)  # NaN is in the sums only, so far
    tl.store(out_max + index, best, mask=index < size)
    log_sum = tl.log(total)
    tl.store(out_log_sum + index, log_sum, mask=index < size)
    if out_lse is not None:
        tl.store(out_lse + index, best + log_sum, mask=index < size)
    if out_mean is not None:
        tl.store(out_mean + index, tl.where(total == 0.0, 0.0, state[2] / total), mask=index < size)


@triton.jit
def store_sums(
    gradient, pairs, vectors, row_scale, row_bias, col_scale, col_bias,
    rows, cols, n, m, row_place, col_place, local_rows, local_cols, block_rows, block_cols,
):  # fmt: skip
    """Partial sums of g for the scales and biases of a tile; also gives g b."""
    weighted = scaled_by_cols(gradient, vectors, cols, m)
    if row_scale is not None:
        tl.store(row_scale + row_place, tl.sum(weighted * pairs, 1), mask=local_rows < block_rows)
    if row_bias is not None:
        tl.store(row_bias + row_place, tl.sum(gradient, 1), mask=local_rows < block_rows)
    if col_scale is not None:
        of_scale = tl.sum(scaled_by_rows(gradient * pairs, vectors, rows, n), 0)
        tl.store(col_scale + col_place, of_scale, mask=local_cols < block_cols)
    if col_bias is not None:
        tl.store(col_bias + col_place, tl.sum(gradient, 0), mask=local_cols < block_cols)
    return weighted


@triton.jit
def block_kernel(
    x, y, vectors, span, u, v, second, incoming, unit, coefficients, row_sums, col_sums,
    n, m, features, width, first_row, first_col, block_rows, block_cols, stride,
    MEMBERS: tl.constexpr, PLANES: tl.constexpr, DESCRIBED: tl.constexpr,
    REDUCTION: tl.constexpr, RESTRICT: tl.constexpr, ABOVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Coefficients of one tile of a block, [PLANES, block_rows, stride], see `Kernels` in contrastive_ops/plane.py.

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
    TEACHES: tl.constexpr = REDUCTION == "expectation" and u is not None
    pairs = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    other_pairs, of_others = pairs, gradient
    coordinates = ()
    if MEMBERS > 0:  # ids are of pairs alone, so that all are needed
        pairs, coordinates = pairs_of_tile(
            x, y, span, rows, cols, row, col, n, m, features,
            MEMBERS, DESCRIBED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        logits = logits_of_tile(pairs, vectors, rows, cols, n, m)
        gradient, _ = gradients_of_tile(
            logits, logits, vectors, second, incoming, of_rows, of_cols, has, rows, cols, row, col, n, m,
            REDUCTION, TEACHES, RESTRICT, ABOVE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif needed:
        pairs, _ = pairs_of_tile(
            x, y, span, rows, cols, row, col, n, m, features,
            MEMBERS, DESCRIBED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        logits = logits_of_tile(pairs, vectors, rows, cols, n, m)
        others = logits
        if u is not None:
            other_pairs = second_pairs_of_tile(
                u, v, rows, cols, row, col, n, m, width, DESCRIBED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
            )
            others = logits_of_tile(other_pairs, second, rows, cols, n, m)
        gradients = gradients_of_tile(
            logits, others, vectors, second, incoming, of_rows, of_cols, has, rows, cols, row, col, n, m,
            REDUCTION, TEACHES, RESTRICT, ABOVE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        gradient = gradients[0]
        if TEACHES:
            of_others = gradients[1]
    weighted = store_sums(
        gradient, pairs, vectors, row_sums.scale, row_sums.bias, col_sums.scale, col_sums.bias,
        rows, cols, n, m, row_place, col_place, local_rows, local_cols, block_rows, block_cols,
    )  # fmt: skip
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
    if TEACHES:
        weighted = store_sums(
            of_others, other_pairs, second,
            row_sums.teacher_scale, row_sums.teacher_bias, col_sums.teacher_scale, col_sums.teacher_bias,
            rows, cols, n, m, row_place, col_place, local_rows, local_cols, block_rows, block_cols,
        )  # fmt: skip
        if PLANES == 2 and needed:
            weighted = scaled_by_rows(weighted, second, rows, n)
            if unit is not None:
                weighted = weighted / tl.load(unit + 1)
            of_teacher = coefficients + tl.cast(block_rows, tl.int64) * stride
            tl.store(of_teacher + place, weighted.to(coefficients.dtype.element_ty), mask=inside)


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
    x, y, vectors, second, incoming, unit, grad, sums, n, m, features, cols_per_strip,
    REDUCTION: tl.constexpr, RESTRICT: tl.constexpr, ABOVE: tl.constexpr, PRECISION: tl.constexpr,
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
            logits = logits_of_tile(pairs, vectors, rows, cols, n, m)
            gradient, _ = gradients_of_tile(
                logits, logits, vectors, second, incoming, of_rows, of_cols, has, rows, cols, row, col, n, m,
                REDUCTION, False, RESTRICT, ABOVE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
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
    x, y, vectors, second, unit, part, slopes, n, m, features, cols_per_strip,
    REDUCTION: tl.constexpr, RESTRICT: tl.constexpr, ABOVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Statistics of a tile of rows over a strip of columns, and the gradients of what is reduced in registers."""
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
    state = empty_state(part, BLOCK_M)
    of_bias = tl.zeros((BLOCK_M,), tl.float32)
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
            if REDUCTION == "logsumexp":
                logits = those_taking_part(
                    logits, logits, -float("inf"), vectors, second, of_rows, of_cols, has, rows, cols, row, col, n, m,
                    RESTRICT, ABOVE, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                new = tl.maximum(state[0], tl.max(logits, 1))
                shift = shift_of(new)
                decay = exp(state[0] - shift)
                terms = exp(logits - shift[:, None])
                state = (new, state[1] * decay + tl.sum(terms, 1))
            else:
                decay = tl.full((BLOCK_M,), 1.0, tl.float32)
                values = those_taking_part(
                    function_of(logits, REDUCTION), logits, 0.0,
                    vectors, second, of_rows, of_cols, has, rows, cols, row, col, n, m,
                    RESTRICT, ABOVE, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                terms = those_taking_part(
                    slope_of(logits, REDUCTION), logits, 0.0,
                    vectors, second, of_rows, of_cols, has, rows, cols, row, col, n, m,
                    RESTRICT, ABOVE, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                state = (state[0] + tl.sum(values, 1).to(tl.float64),)
                of_bias += tl.sum(terms, 1)
            weighted = scaled_by_cols(terms, vectors, cols, m)
            of_scale = of_scale * decay + tl.sum(weighted * pairs, 1)
            # before it is rounded: `unit` is a bound of the product
            weighted = scaled_by_rows(weighted, vectors, rows, n)
            if unit is not None:
                weighted *= per_unit
            of_x = tl.dot(weighted.to(y.dtype.element_ty), y_tile, of_x * decay[:, None], input_precision=PRECISION)
    share = tl.full((BLOCK_M,), 1.0, tl.float32)
    if REDUCTION == "logsumexp":
        share = 1.0 / tl.where(state[1] == 0.0, 1.0, state[1])
    of_strip = strip.to(tl.int64) * n
    store_state(part, of_strip, rows, rows < n, state)
    tl.store(slopes.scale + of_strip + rows, of_scale * share, mask=rows < n)
    if slopes.bias is not None:
        tl.store(slopes.bias + of_strip + rows, of_bias, mask=rows < n)
    if unit is not None:
        share *= tl.load(unit)
    tl.store(slopes.x + of_strip * features + x_place, of_x * share[:, None], mask=x_inside)
