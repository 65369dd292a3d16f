"""What a sweep makes of its pairs: for every reduction what it folds of a tile, and the coefficient of a pair.

REDUCTION is "logsumexp", "expectation", or the name of a function that is summed. What is folded is a tuple, the fields
of a `Part` (contrastive_ops/plane.py) that are there, in their order: the same for a tile in registers, for the running
state of its rows or columns, and for a partial in memory. A new reduction has a branch in `statistics_of_tile` and one
in `gradients_of_tile`; a new function of sums one in `function_of` and one in `slope_of`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from contrastive_ops.kernels.tile import (
    excluded_by_cols,
    excluded_by_rows,
    exp,
    one_each,
    shift_of,
    those_taking_part,
)
from contrastive_ops.plane import Part

FIELDS = tl.constexpr(len(Part._fields))
MAXIMUM = tl.constexpr(Part._fields.index("maximum"))
TOTAL = tl.constexpr(Part._fields.index("total"))
TEACHER_MAXIMUM = tl.constexpr(Part._fields.index("teacher_maximum"))


@triton.jit
def log1p(z):
    """log(1 + z) of 0 <= z <= 1 to 2 units in the last place; tl.log(1.0 + z) has lost the digits of a small z."""
    series = 0.07836166769266129 + z * (-0.02958850748836994 + z * 0.005253457929939032)
    series = 0.19111430644989014 + z * (-0.13674770295619965 + z * series)
    series = 0.33319270610809326 + z * (-0.24844369292259216 + z * series)
    return z * (1.0 + z * (-0.49999502301216125 + z * series))


@triton.jit
def function_of(logits, REDUCTION: tl.constexpr):
    """f(s) of the reductions that are sums."""
    value = logits
    if REDUCTION == "softplus":
        # a NaN is in the second term
        value = tl.maximum(logits, 0.0) + log1p(exp(-tl.abs(logits)))
    elif REDUCTION == "sigmoid":
        value = 1.0 / (1.0 + exp(-logits))
    elif REDUCTION == "relu":
        value = tl.maximum(logits, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif REDUCTION == "square":
        value = logits * logits
    elif REDUCTION == "step":
        value = tl.where(logits > 0.0, 1.0, 0.0)
    return value


@triton.jit
def slope_of(logits, REDUCTION: tl.constexpr):
    """f'(s)"""
    slope = tl.full(logits.shape, 1.0, tl.float32)  # identity
    if REDUCTION == "softplus":
        slope = 1.0 / (1.0 + exp(-logits))
    elif REDUCTION == "sigmoid":
        small = exp(-tl.abs(logits))
        slope = small / ((1.0 + small) * (1.0 + small))
    elif REDUCTION == "relu":
        slope = tl.where(logits > 0.0, 1.0, 0.0)
    elif REDUCTION == "square":
        slope = 2.0 * logits
    elif REDUCTION == "step":
        slope = tl.zeros_like(logits)
    return slope


@triton.jit
def empty_state(part, BLOCK: tl.constexpr):
    """The state of sets without a pair."""
    state = ()
    for k in tl.static_range(FIELDS):
        if part[k] is not None:
            nothing = tl.zeros((BLOCK,), part[k].dtype.element_ty)
            if (k == MAXIMUM) | (k == TEACHER_MAXIMUM):
                nothing -= float("inf")
            state = state + (nothing,)  # noqa: RUF005, Triton has no *state
    return state


@triton.jit
def load_state(part, index, inside, TOTALS: tl.constexpr, BLOCK: tl.constexpr):
    """The state without its total, or the total alone, which is the last of those that have one."""
    nothing = empty_state(part, BLOCK)
    state = ()
    for k in tl.static_range(FIELDS):
        if part[k] is not None:
            if (k == TOTAL) == TOTALS:
                state = state + (tl.load(part[k] + index, mask=inside, other=nothing[0]),)  # noqa: RUF005
            nothing = nothing[1:]
    return state


@triton.jit
def store_state(part, begin, index, inside, state):
    for k in tl.static_range(FIELDS):
        if part[k] is not None:
            tl.store(part[k] + begin + index, state[0], mask=inside)
            state = state[1:]


@triton.jit
def fold(old_max, old_sum, part_max, part_sum):
    """Join two (max, sum of e^(s - max)); an empty set is (-inf, 0)."""
    new_max = tl.maximum(old_max, part_max)
    shift = shift_of(new_max)
    return new_max, old_sum * exp(old_max - shift) + part_sum * exp(part_max - shift)


@triton.jit
def weighted(weight, values):
    """The product, 0 for a weight of 0, also of an infinite value."""
    return tl.where(weight == 0.0, 0.0, weight * values)


@triton.jit
def fold_moment(old_max, old_moment, part_max, part_moment):
    shift = shift_of(tl.maximum(old_max, part_max))
    return weighted(exp(old_max - shift), old_moment) + weighted(exp(part_max - shift), part_moment)


@triton.jit
def join(part, old, new):
    """Fold two states."""
    joined = ()
    if part.maximum is None:
        joined = (old[0] + new[0],)
    else:
        joined = fold(old[0], old[1], new[0], new[1])
        if part.total is not None:
            joined = joined + (old[2] + new[2],)  # noqa: RUF005
        if part.teacher_maximum is not None:
            joined = joined + fold(old[2], old[3], new[2], new[3])
            joined = joined + (fold_moment(old[2], old[4], new[2], new[4]),)  # noqa: RUF005
        elif part.moment is not None:
            joined = joined + (fold_moment(old[0], old[2], new[0], new[2]),)  # noqa: RUF005
    return joined


@triton.jit
def state_if(condition, part, state, BLOCK: tl.constexpr):
    """The state, or where the condition does not hold that of empty sets."""
    nothing = empty_state(part, BLOCK)
    chosen = ()
    for k in tl.static_range(FIELDS):
        if part[k] is not None:
            chosen = chosen + (tl.where(condition, state[0], nothing[0]),)  # noqa: RUF005
            state, nothing = state[1:], nothing[1:]
    return chosen


@triton.jit
def lowest(maxima):
    """The least of some maxima, those of empty sets apart."""
    infinity = float("inf")
    return tl.min(tl.where(maxima == -infinity, infinity, maxima), 0)


@triton.jit
def relative_to(maximum, total, shift):
    """Sums of e^(s - max) from those of e^(s - shift); they are what they should be where the shift is infinite."""
    infinity = float("inf")
    shifts = tl.zeros_like(maximum) + shift
    factor = exp(tl.where(shifts == infinity, maximum, shifts) - maximum)
    return tl.where(maximum == -infinity, total, total * factor)


@triton.jit
def reduce_tile(
    logits, values, ROWS: tl.constexpr, COLS: tl.constexpr, MOMENTS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Maxima, sums and moments over the rows and over the columns of a tile, with one exponential per pair if exact.

    One shift serves all sets of a tile if their maxima lie within 40 of it: terms down to 2^-24 of the largest of a
    set stay above the smallest normal number. NaN shows in the sums; the maxima pass it over. The moments are sums of
    the values, weighted by e^(s - max); without MOMENTS there are none.
    """
    row_max, col_max = tl.max(logits, 1), tl.max(logits, 0)
    row_sum, col_sum = tl.zeros_like(row_max), tl.zeros_like(col_max)
    row_moment, col_moment = tl.zeros_like(row_max), tl.zeros_like(col_max)
    shift = float("inf")
    if ROWS and COLS:
        high = tl.max(col_max, 0)
        if high - tl.minimum(lowest(row_max), lowest(col_max)) <= 40.0:
            shift = shift_of(high)
            terms = exp(logits - shift)
            row_sum, col_sum = tl.sum(terms, 1), tl.sum(terms, 0)
            if MOMENTS:
                moments = weighted(terms, values)
                row_moment, col_moment = tl.sum(moments, 1), tl.sum(moments, 0)
        else:
            terms = exp(logits - shift_of(row_max)[:, None])
            row_sum = tl.sum(terms, 1)
            if MOMENTS:
                row_moment = tl.sum(weighted(terms, values), 1)
            terms = exp(logits - shift_of(col_max)[None, :])
            col_sum = tl.sum(terms, 0)
            if MOMENTS:
                col_moment = tl.sum(weighted(terms, values), 0)
    elif ROWS:
        terms = exp(logits - shift_of(row_max)[:, None])
        row_sum = tl.sum(terms, 1)
        if MOMENTS:
            row_moment = tl.sum(weighted(terms, values), 1)
    else:
        terms = exp(logits - shift_of(col_max)[None, :])
        col_sum = tl.sum(terms, 0)
        if MOMENTS:
            col_moment = tl.sum(weighted(terms, values), 0)
    if COLS:
        col_max, col_sum = one_each(col_max, BLOCK_N), one_each(col_sum, BLOCK_N)
        if MOMENTS:
            col_moment = one_each(col_moment, BLOCK_N)
    if ROWS and COLS:
        row_sum = relative_to(row_max, row_sum, shift)
        col_sum = relative_to(col_max, col_sum, shift)
        if MOMENTS:
            row_moment = relative_to(row_max, row_moment, shift)
            col_moment = relative_to(col_max, col_moment, shift)
    of_rows, of_cols = (row_max, row_sum), (col_max, col_sum)
    if MOMENTS:
        of_rows, of_cols = of_rows + (row_moment,), of_cols + (col_moment,)  # noqa: RUF005
    return of_rows, of_cols


@triton.jit
def total_of(logits, AXIS: tl.constexpr):
    """Sums of the logits of the pairs that take part."""
    return tl.sum(tl.where(logits > -float("inf"), logits, 0.0), AXIS)


@triton.jit
def statistics_of_tile(
    logits, others, row_part, col_part, vectors, second, of_rows, of_cols, has, rows, cols, row, col, n, m,
    REDUCTION: tl.constexpr, TEACHES: tl.constexpr, RESTRICT: tl.constexpr, ABOVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The states of the rows and of the columns of a tile. `others` are the logits of the second form."""
    ROWS: tl.constexpr = row_part.sum is not None
    COLS: tl.constexpr = col_part.sum is not None
    if REDUCTION == "logsumexp" or REDUCTION == "expectation":
        logits = those_taking_part(
            logits, others, -float("inf"), vectors, second, of_rows, of_cols, has, rows, cols, row, col, n, m,
            RESTRICT, ABOVE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        OWN: tl.constexpr = REDUCTION == "expectation" and not TEACHES
        row_state, col_state = reduce_tile(logits, logits, ROWS, COLS, OWN, BLOCK_N)
        if row_part.total is not None:
            row_state = row_state + (total_of(logits, 1),)  # noqa: RUF005
        if col_part.total is not None:
            col_state = col_state + (total_of(logits, 0),)  # noqa: RUF005
        if TEACHES:
            others = those_taking_part(
                others, others, -float("inf"), vectors, second, of_rows, of_cols, has, rows, cols, row, col, n, m,
                RESTRICT, ABOVE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            of_teacher = reduce_tile(others, logits, ROWS, COLS, True, BLOCK_N)
            row_state, col_state = row_state + of_teacher[0], col_state + of_teacher[1]
    else:
        values = those_taking_part(
            function_of(logits, REDUCTION), others, 0.0,
            vectors, second, of_rows, of_cols, has, rows, cols, row, col, n, m,
            RESTRICT, ABOVE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        row_state = (tl.sum(values, 1).to(tl.float64),)
        col_state = (one_each(tl.sum(values, 0), BLOCK_N).to(tl.float64),)
    return row_state, col_state


@triton.jit
def of_shares(logits, incoming, rows, cols, n, m):
    """u_i e^(s - row_max_i) + v_j e^(s - col_max_j), with one exponential per pair as in `reduce_tile`."""
    infinity = float("inf")
    if incoming.row_max is not None:
        u = tl.load(incoming.row_weight + rows, mask=rows < n, other=0.0)
        row_max = tl.load(incoming.row_max + rows, mask=rows < n, other=infinity)
    if incoming.col_max is not None:
        v = tl.load(incoming.col_weight + cols, mask=cols < m, other=0.0)
        col_max = tl.load(incoming.col_max + cols, mask=cols < m, other=infinity)
    if incoming.col_max is None:
        gradient = u[:, None] * exp(logits - row_max[:, None])
    elif incoming.row_max is None:
        gradient = v[None, :] * exp(logits - col_max[None, :])
    else:
        low = tl.minimum(tl.min(row_max, 0), tl.min(col_max, 0))
        high = tl.maximum(
            tl.max(tl.where(row_max == infinity, -infinity, row_max), 0),
            tl.max(tl.where(col_max == infinity, -infinity, col_max), 0),
        )
        if high - low <= 40.0:
            shift = shift_of(high)
            of_row = u * exp(shift - row_max)
            of_col = v * exp(shift - col_max)
            gradient = (of_row[:, None] + of_col[None, :]) * exp(logits - shift)
        else:
            gradient = u[:, None] * exp(logits - row_max[:, None])
            gradient += v[None, :] * exp(logits - col_max[None, :])
    return gradient


@triton.jit
def of_mean(logits, others, share, maximum, mean):
    """The weights of the pairs in a mean, times its gradient, and what the gradients of their logits are."""
    weights = share * exp(others - maximum)
    return weights, weighted(weights, logits - mean)


@triton.jit
def of_means(logits, others, incoming, rows, cols, n, m, TEACHES: tl.constexpr):
    """dL/ds and dL/dz of the means."""
    infinity = float("inf")
    of_logits = tl.zeros_like(logits)
    of_others = tl.zeros_like(logits)
    if incoming.row_share is not None:
        maxima = incoming.teacher_row_max if TEACHES else incoming.row_max
        share = tl.load(incoming.row_share + rows, mask=rows < n, other=0.0)
        maximum = tl.load(maxima + rows, mask=rows < n, other=infinity)
        mean = tl.load(incoming.row_mean + rows, mask=rows < n, other=0.0)
        weights, slopes = of_mean(logits, others, share[:, None], maximum[:, None], mean[:, None])
        of_logits += weights
        of_others += slopes
    if incoming.col_share is not None:
        maxima = incoming.teacher_col_max if TEACHES else incoming.col_max
        share = tl.load(incoming.col_share + cols, mask=cols < m, other=0.0)
        maximum = tl.load(maxima + cols, mask=cols < m, other=infinity)
        mean = tl.load(incoming.col_mean + cols, mask=cols < m, other=0.0)
        weights, slopes = of_mean(logits, others, share[None, :], maximum[None, :], mean[None, :])
        of_logits += weights
        of_others += slopes
    return of_logits, of_others


@triton.jit
def gradients_of_tile(
    logits, others, vectors, second, incoming, of_rows, of_cols, has, rows, cols, row, col, n, m,
    REDUCTION: tl.constexpr, TEACHES: tl.constexpr, RESTRICT: tl.constexpr, ABOVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dL/ds and dL/dz of a tile: see `Kernels` in contrastive_ops/plane.py.

    For a pair left out by index that of its own logit alone.
    """
    infinity = float("inf")
    of_others = logits  # of nothing, without a teacher
    if REDUCTION == "logsumexp" or REDUCTION == "expectation":
        logits = those_taking_part(
            logits, others, -infinity, vectors, second, of_rows, of_cols, has, rows, cols, row, col, n, m,
            RESTRICT, ABOVE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        gradient = of_shares(logits, incoming, rows, cols, n, m)
        if REDUCTION == "expectation":
            if TEACHES:
                others = those_taking_part(
                    others, others, -infinity, vectors, second, of_rows, of_cols, has, rows, cols, row, col, n, m,
                    RESTRICT, ABOVE, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                of_logits, of_others = of_means(logits, others, incoming, rows, cols, n, m, TEACHES)
                gradient += of_logits
            else:
                of_logits, of_others = of_means(logits, logits, incoming, rows, cols, n, m, TEACHES)
                gradient += of_logits + of_others
        if incoming.row_total is not None:
            of_row = tl.load(incoming.row_total + rows, mask=rows < n, other=0.0)
            gradient += tl.where(logits > -infinity, of_row[:, None], 0.0)
        if incoming.col_total is not None:
            of_col = tl.load(incoming.col_total + cols, mask=cols < m, other=0.0)
            gradient += tl.where(logits > -infinity, of_col[None, :], 0.0)
    else:
        weight = tl.zeros_like(logits)
        if incoming.row_weight is not None:
            weight += tl.load(incoming.row_weight + rows, mask=rows < n, other=0.0)[:, None]
        if incoming.col_weight is not None:
            weight += tl.load(incoming.col_weight + cols, mask=cols < m, other=0.0)[None, :]
        gradient = those_taking_part(
            weight * slope_of(logits, REDUCTION), others, 0.0,
            vectors, second, of_rows, of_cols, has, rows, cols, row, col, n, m,
            RESTRICT, ABOVE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if has:  # those left out by index, whose gradient is 0 so far
        if incoming.row_excluded is not None:
            of_row = tl.load(incoming.row_excluded + rows, mask=rows < n, other=0.0)
            gradient += tl.where(excluded_by_rows(vectors, rows, cols, n), of_row[:, None], 0.0)
        if incoming.col_excluded is not None:
            of_col = tl.load(incoming.col_excluded + cols, mask=cols < m, other=0.0)
            gradient += tl.where(excluded_by_cols(vectors, rows, cols, m), of_col[None, :], 0.0)
    return gradient, of_others
