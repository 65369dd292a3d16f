"""Triton kernels of what is O(N D) and O(N) around a sweep; under each is the function that launches it.

scale, one program per tile of rows:
    a_i = c t^p / |x_i|
    backward: dX_i += -da_i a_i / |x_i|^2 x_i, and in one more program dt = sum_i da_i / |x_i| d(c t^p) / dt
contrast, one program:
    for each step of rows: total += softplus(lse_di - s_i) + slope s_i - share total_di, of every direction d
    backward, one program per step of rows
incoming, one program per step of rows:
    dL/dlse e^-log_sum and the maximum, of rows and of columns; indices in 32 bits
bound, one program:
    for each vector: its largest element
classes, one program per step of rows, which are sorted by class:
    where the class of a row begins, by bisection, and how many other rows it has
class_sums, one program per tile of rows and of features:
    for each step of rows, for the classes that begin in the tile: S += sum_b w_b a_b x_b
class_mean, one program per tile of rows:
    a_i <x_i, S - a_i x_i> / others_i
    backward, with w_b = g_b / others_b of which the class sum is W: v_i = w_i (S - a_i x_i) + W - w_i a_i x_i,
    dX_i += a_i v_i and da_i += <x_i, v_i>
class_contrast, one program, and backward one program per step of rows, as contrast:
    for each step of rows: total += softplus(lse_Ni - lse_Pi) + lse_Pi - mean_i, or + log(others_i) inside
units, one program per tile of rows:
    for each of K tensors: its rows at length 1; backward: (g - u <u, g>) / |x|
factor, volume_gradient, tuple_gradient, one program per tile of sets of P vectors:
    for each step of features: P x P products; their algebra in registers
    for each step of features: P x P combinations of the vectors

A program that goes through N elements alone takes microseconds, where the sweep has N^2 pairs; it needs no second
launch, and no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_ops.backends.tuples import INSIDE

ROWS, FEATURES = 16, 128  # of a program's step
LONG, NARROW = 128, 32  # of a step through a class, which one program takes alone for all of its rows
VECTOR = 1024  # elements of a step of what has one number per row
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def power_of(factor, POWER: tl.constexpr):
    """t^p for p of -1, -1/2, 1/2 and 1, and its derivative."""
    t = tl.load(factor).to(tl.float32)
    root = t
    if POWER == 0.5 or POWER == -0.5:
        root = tl.sqrt_rn(t)
    value = root
    if POWER < 0.0:
        value = tl.div_rn(1.0, root)
    derivative = POWER * tl.div_rn(value, t)
    if POWER == 1.0:
        derivative = 1.0
    return value, derivative


@triton.jit
def scale_kernel(
    x, factor, multiplier, scale, inverse, n, features, stride,
    POWER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """1 / |x_i|, 0 for a zero row, and the scale c t^p / |x_i|."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = x + rows.to(tl.int64)[:, None] * stride
    squares = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for begin in range(0, features, BLOCK_D):
        feature = begin + tl.arange(0, BLOCK_D)
        inside = (rows[:, None] < n) & (feature[None, :] < features)
        tile = tl.load(x_rows + feature[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += tile * tile
    square = tl.sum(squares, 1)
    reciprocal = tl.where(square == 0.0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(square == 0.0, 1.0, square))))
    tl.store(inverse + rows, reciprocal, mask=rows < n)
    if factor is not None:
        value, _ = power_of(factor, POWER)
        multiplier = multiplier * value
    tl.store(scale + rows, reciprocal * multiplier, mask=rows < n)


@triton.jit
def scale_backward_kernel(
    x, inverse, grad, grad_scale, factor, multiplier, result, grad_factor, n, features, stride, grad_stride,
    POWER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dX of a tile of rows; the program behind those of the tiles has dt."""
    derivative = 0.0
    if factor is not None:
        value, derivative = power_of(factor, POWER)
        derivative *= multiplier
        multiplier = multiplier * value
    row = tl.program_id(0) * BLOCK_M
    if result is not None and row < n:
        rows = row + tl.arange(0, BLOCK_M)
        length = tl.load(inverse + rows, mask=rows < n, other=0.0)
        weight = -tl.load(grad_scale + rows, mask=rows < n, other=0.0) * multiplier * length * length
        place = rows.to(tl.int64)[:, None]
        for begin in range(0, features, BLOCK_D):
            feature = begin + tl.arange(0, BLOCK_D)[None, :]
            inside = (rows[:, None] < n) & (feature < features)
            direction = length[:, None] * tl.load(x + place * stride + feature, mask=inside, other=0.0).to(tl.float32)
            # a weight of 0 leaves its vector out, even one that is not finite
            tile = tl.where(weight[:, None] == 0.0, 0.0, weight[:, None] * direction)
            if grad is not None:
                tile += tl.load(grad + place * grad_stride + feature, mask=inside, other=0.0).to(tl.float32)
            tl.store(result + place * features + feature, tile.to(result.dtype.element_ty), mask=inside)
    elif grad_factor is not None:
        total = tl.zeros((VECTOR,), tl.float32)
        for begin in range(0, n, VECTOR):
            rows = begin + tl.arange(0, VECTOR)
            of_rows = tl.load(grad_scale + rows, mask=rows < n, other=0.0)
            total += of_rows * tl.load(inverse + rows, mask=rows < n, other=0.0)
        tl.store(grad_factor, tl.sum(total, 0) * derivative)


def scale(x: Tensor, factor: Tensor | None, multiplier: float, power: float) -> tuple[Tensor, Tensor]:
    """c t^p / |x_i| and 1 / |x_i| of x [N, D], for a tensor t of one element; without it c / |x_i|."""
    n, features = x.shape
    result, inverse = (x.new_empty(n, dtype=torch.float32) for _ in range(2))
    if n:
        x = _dense(x)
        scale_kernel[(triton.cdiv(n, ROWS),)](
            x, factor, multiplier, result, inverse, n, features, x.stride(0),
            POWER=power, BLOCK_M=ROWS, BLOCK_D=FEATURES,
        )  # fmt: skip
    return result, inverse


def scale_backward(
    x: Tensor,
    inverse: Tensor,
    grad: Tensor | None,
    grad_scale: Tensor,
    factor: Tensor | None,
    multiplier: float,
    power: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of x, with `grad` added, and of t; empty where they are not needed."""
    (n, features), (need_x, need_factor) = x.shape, needs
    result = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    grad_factor = inverse.new_empty(1) if need_factor else None
    x = _dense(x)
    grad = None if grad is None else _dense(grad)
    tiles = triton.cdiv(n, ROWS) if need_x else 0
    if not need_x:
        x, grad = inverse, None  # not read
    if tiles + need_factor:
        scale_backward_kernel[(tiles + need_factor,)](
            x, inverse, grad, grad_scale.contiguous(), factor, multiplier, result, grad_factor, n, features,
            x.stride(0), 0 if grad is None else grad.stride(0),
            POWER=power, BLOCK_M=ROWS, BLOCK_D=FEATURES, VECTOR=VECTOR,
        )  # fmt: skip
    return (
        x.new_empty(0) if result is None else result,
        inverse.new_empty(0) if grad_factor is None else grad_factor,
    )


def _dense(x: Tensor) -> Tensor:
    """Rows whose features lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def log1p_exp(z):
    """log(1 + e^z) with all digits also where it is tiny: of u = e^-|z| the series 2 artanh(u / (2 + u))."""
    u = tl.exp(-tl.abs(z))
    t = tl.div_rn(u, 2.0 + u)  # at most 1/3: the term after the last is below 2^-26 of the first
    square = t * t
    series = tl.full(z.shape, 1.0 / 15.0, tl.float32)
    for k in tl.static_range(7):
        series = series * square + 1.0 / (13.0 - 2.0 * k)
    return tl.where(z > 0.0, z, 0.0) + 2.0 * t * series


@triton.jit
def sigmoid(z):
    u = tl.exp(-tl.abs(z))
    return tl.where(z > 0.0, tl.div_rn(1.0, 1.0 + u), tl.div_rn(u, 1.0 + u))


@triton.jit
def contrast_kernel(
    positive, lse, totals, result, n, factor, slope, share, DIRECTIONS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """factor * sum_i sum_d softplus(lse_di - s_i) + slope s_i - share total_di."""
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, n, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < n
        s = tl.load(positive + index, mask=inside, other=0.0)
        of_row = tl.zeros((BLOCK,), tl.float32)
        for d in tl.static_range(DIRECTIONS):
            of_row += log1p_exp(tl.load(lse[d] + index, mask=inside, other=-float("inf")) - s)
            if totals is not None:
                of_row += slope * s - share * tl.load(totals[d] + index, mask=inside, other=0.0)
        total += tl.where(inside, of_row, 0.0)
    tl.store(result, tl.sum(total, 0) * factor)


@triton.jit
def contrast_backward_kernel(
    grad, positive, lse, grad_positive, grad_lse, grad_total, n, factor, slope, share,
    DIRECTIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of s [N], of lse [directions, N] and of a total [N], which is the same for all directions."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    unit = tl.load(grad).to(tl.float32) * factor
    s = tl.load(positive + index, mask=inside, other=0.0)
    of_positive = tl.zeros((BLOCK,), tl.float32)
    for d in tl.static_range(DIRECTIONS):
        of_lse = unit * sigmoid(tl.load(lse[d] + index, mask=inside, other=0.0) - s)
        tl.store(grad_lse + d * tl.cast(n, tl.int64) + index, of_lse, mask=inside)
        of_positive -= of_lse
    if grad_total is not None:
        of_positive += DIRECTIONS * slope * unit
        tl.store(grad_total + index, tl.zeros((BLOCK,), tl.float32) - share * unit, mask=inside)
    tl.store(grad_positive + index, of_positive, mask=inside)


def contrast(
    positive: Tensor, lse: Sequence[Tensor], totals: Sequence[Tensor], factor: float, slope: float, share: float
) -> Tensor:
    result = positive.new_empty(())
    contrast_kernel[(1,)](
        positive.contiguous(), _contiguous(lse), _contiguous(totals) if totals else None, result,
        positive.shape[0], factor, slope, share, DIRECTIONS=len(lse), BLOCK=VECTOR,
    )  # fmt: skip
    return result


def contrast_backward(
    grad: Tensor, positive: Tensor, lse: Sequence[Tensor], totals: bool, factor: float, slope: float, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the positives, of lse [directions, N], and of the totals of any direction."""
    n = positive.shape[0]
    grad_positive, grad_total = positive.new_empty(n), positive.new_empty(n if totals else 0)
    grad_lse = positive.new_empty(len(lse), n)
    if n:
        contrast_backward_kernel[(triton.cdiv(n, VECTOR),)](
            grad, positive.contiguous(), _contiguous(lse), grad_positive, grad_lse, grad_total if totals else None,
            n, factor, slope, share, DIRECTIONS=len(lse), BLOCK=VECTOR,
        )  # fmt: skip
    return grad_positive, grad_lse, grad_total


def _contiguous(vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(vector.contiguous() for vector in vectors)


@triton.jit
def classes_kernel(labels, order, inverse, group, place, others, n, steps, BLOCK: tl.constexpr):
    """Of sorted labels the first row of the class of each row, the row itself, and how many others the class has."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    label = tl.load(labels + rows, mask=inside, other=0)
    first, last = tl.zeros((BLOCK,), tl.int32), rows  # the first is among these
    after, end = rows + 1, tl.full((BLOCK,), 0, tl.int32) + n  # and the first of the next class
    for _ in range(steps):
        middle = (first + last) // 2
        below = tl.load(labels + middle, mask=inside, other=0) < label
        first, last = tl.where(below, middle + 1, first), tl.where(below, last, middle)
        middle = (after + end) // 2
        above = (middle >= n) | (tl.load(labels + middle, mask=middle < n, other=0) > label)
        after, end = tl.where(above, after, middle + 1), tl.where(above, middle, end)
    tl.store(inverse + tl.load(order + rows, mask=inside, other=0), rows.to(tl.int64), mask=inside)
    tl.store(group + rows, first, mask=inside)
    tl.store(place + rows, rows, mask=inside)
    tl.store(others + rows, (end - first - 1).to(tl.float32), mask=inside)


def classes(labels: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `classes_kernel`; before these the inverse of the order that has sorted the labels."""
    n = len(labels)
    inverse, others = torch.empty_like(order), labels.new_empty(n, dtype=torch.float32)
    group, place = (labels.new_empty(n, dtype=torch.int32) for _ in range(2))
    if n:
        classes_kernel[(triton.cdiv(n, VECTOR),)](
            labels, order, inverse, group, place, others, n, n.bit_length(), BLOCK=VECTOR
        )
    return inverse, group, place, others


@triton.jit
def per_other(values, others, rows, n):
    """v_i / others_i; 0 for a row that is alone in its class."""
    count = tl.load(others + rows, mask=rows < n, other=0.0)
    return tl.where(count == 0.0, 0.0, tl.div_rn(values, tl.maximum(count, 1.0)))


@triton.jit
def class_sums_kernel(
    x, scale, grad, group, others, sums, n, features, stride,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sums of a_b x_b over the classes that begin in a tile, by their numbers; with g of g_b / others_b a_b x_b.

    However long a class is, one program goes through it, always in the same order.
    """
    firsts = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    number = tl.load(group + firsts, mask=firsts < n, other=-1)
    begins = number != tl.load(group + firsts - 1, mask=(firsts > 0) & (firsts < n), other=-1)
    length = 1 + tl.load(others + firsts, mask=firsts < n, other=0.0).to(tl.int32)
    end = tl.max(tl.where(begins, firsts + length, 0), 0)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for begin in range(tl.min(tl.where(begins, firsts, end), 0), end, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        weight = tl.load(scale + rows, mask=rows < end, other=0.0)
        if grad is not None:
            weight *= per_other(tl.load(grad + rows, mask=rows < end, other=0.0), others, rows, end)
        inside = (rows[:, None] < end) & (feature < features)
        tile = tl.load(x + rows.to(tl.int64)[:, None] * stride + feature, mask=inside, other=0.0).to(tl.float32)
        own = number[:, None] == tl.load(group + rows, mask=rows < end, other=-1)[None, :]
        total += tl.dot(own.to(tl.float32), weight[:, None] * tile, input_precision="ieee")
    tl.store(
        sums + number.to(tl.int64)[:, None] * features + feature, total, mask=begins[:, None] & (feature < features)
    )


@triton.jit
def class_mean_kernel(
    x, scale, group, others, sums, mean, n, features, stride, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """a_i <x_i, S - a_i x_i> / others_i."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = rows.to(tl.int64)[:, None]
    number = tl.load(group + rows, mask=rows < n, other=0).to(tl.int64)[:, None]
    length = tl.load(scale + rows, mask=rows < n, other=0.0)[:, None]
    products = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for begin in range(0, features, BLOCK_D):
        feature = begin + tl.arange(0, BLOCK_D)[None, :]
        inside = (rows[:, None] < n) & (feature < features)
        tile = length * tl.load(x + place * stride + feature, mask=inside, other=0.0).to(tl.float32)
        products += tile * (tl.load(sums + number * features + feature, mask=inside, other=0.0) - tile)
    tl.store(mean + rows, per_other(tl.sum(products, 1), others, rows, n), mask=rows < n)


@triton.jit
def class_mean_backward_kernel(
    x, scale, grad, group, others, sums, weighted, grads, grad_scales, grad_x, grad_scale, n, features, stride,
    GRADS: tl.constexpr, GRAD_SCALES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dX and da of a tile of rows, with those added that they have from elsewhere."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = rows.to(tl.int64)[:, None]
    number = tl.load(group + rows, mask=rows < n, other=0).to(tl.int64)[:, None]
    length = tl.load(scale + rows, mask=rows < n, other=0.0)[:, None]
    share = per_other(tl.load(grad + rows, mask=rows < n, other=0.0), others, rows, n)[:, None]
    products = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for begin in range(0, features, BLOCK_D):
        feature = begin + tl.arange(0, BLOCK_D)[None, :]
        inside = (rows[:, None] < n) & (feature < features)
        tile = tl.load(x + place * stride + feature, mask=inside, other=0.0).to(tl.float32)
        own = tl.load(sums + number * features + feature, mask=inside, other=0.0) - length * tile
        of_others = tl.load(weighted + number * features + feature, mask=inside, other=0.0) - share * length * tile
        slope = share * own + of_others
        products += tile * slope
        if grad_x is not None:
            slope *= length
            if grads is not None:
                for k in tl.static_range(GRADS):
                    slope += tl.load(grads[k] + place * features + feature, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_x + place * features + feature, slope.to(grad_x.dtype.element_ty), mask=inside)
    if grad_scale is not None:
        total = tl.sum(products, 1)
        if grad_scales is not None:
            for k in tl.static_range(GRAD_SCALES):
                total += tl.load(grad_scales[k] + rows, mask=rows < n, other=0.0)
        tl.store(grad_scale + rows, total, mask=rows < n)


def _class_sums(x: Tensor, scale: Tensor, grad: Tensor | None, group: Tensor, others: Tensor) -> Tensor:
    """See `class_sums_kernel`; rows that are the number of no class are not filled."""
    n, features = x.shape
    sums = x.new_empty((n, features), dtype=torch.float32)
    if n:
        class_sums_kernel[(triton.cdiv(n, ROWS), triton.cdiv(features, NARROW))](
            x, scale, grad, group, others, sums, n, features, x.stride(0), BLOCK_M=ROWS, BLOCK=LONG, BLOCK_D=NARROW
        )
    return sums


def class_mean(x: Tensor, scale: Tensor, group: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The mean product of each row of x [N, D] with the others of its class, and the sums of the classes."""
    n, features = x.shape
    x, scale = _dense(x), scale.contiguous()
    mean, sums = scale.new_empty(n), _class_sums(x, scale, None, group, others)
    if n:
        class_mean_kernel[(triton.cdiv(n, ROWS),)](
            x, scale, group, others, sums, mean, n, features, x.stride(0), BLOCK_M=ROWS, BLOCK_D=FEATURES
        )
    return mean, sums


def class_mean_backward(
    x: Tensor,
    scale: Tensor,
    grad: Tensor,
    group: Tensor,
    others: Tensor,
    sums: Tensor,
    grads: Sequence[Tensor],
    grad_scales: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of its scale, with `grads` and `grad_scales` added; empty where they are not needed."""
    n, features = x.shape
    x, scale, grad = _dense(x), scale.contiguous(), grad.contiguous()
    grad_x = x.new_empty(x.shape if needs[0] else 0)
    grad_scale = scale.new_empty(n if needs[1] else 0)
    if n:
        weighted = _class_sums(x, scale, grad, group, others)
        class_mean_backward_kernel[(triton.cdiv(n, ROWS),)](
            x, scale, grad, group, others, sums, weighted,
            _contiguous(grads) if grads else None, _contiguous(grad_scales) if grad_scales else None,
            grad_x if needs[0] else None, grad_scale if needs[1] else None, n, features, x.stride(0),
            GRADS=len(grads), GRAD_SCALES=len(grad_scales), BLOCK_M=ROWS, BLOCK_D=FEATURES,
        )  # fmt: skip
    return grad_x, grad_scale


@triton.jit
def class_contrast_kernel(
    negatives, positives, mean, others, result, unit, n, factor, INSIDE: tl.constexpr, DROP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of what `ops.classes.contrast` has per row, times the factor, or over the rows that have a loss."""
    total = tl.zeros((BLOCK,), tl.float32)
    losses = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, n, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        of_negatives = tl.load(negatives + rows, mask=rows < n, other=-float("inf"))
        of_positives = tl.load(positives + rows, mask=rows < n, other=-float("inf"))
        count = tl.load(others + rows, mask=rows < n, other=0.0)
        valid = (of_negatives != -float("inf")) & (of_positives != -float("inf"))
        of_positives = tl.where(valid, of_positives, 0.0)
        of_row = log1p_exp(of_negatives - of_positives)
        if INSIDE:
            of_row += tl.log(tl.maximum(count, 1.0))
        else:
            of_row += tl.where(count <= 1.0, 0.0, of_positives - tl.load(mean + rows, mask=rows < n, other=0.0))
        total += tl.where(valid, of_row, 0.0)
        losses += tl.where(valid, 1.0, 0.0)
    if DROP:
        factor = tl.div_rn(1.0, tl.maximum(tl.sum(losses, 0), 1.0))
    tl.store(unit, factor)
    tl.store(result, tl.sum(total, 0) * factor)


@triton.jit
def class_contrast_backward_kernel(
    grad, unit, negatives, positives, others, grad_negatives, grad_positives, grad_mean, n,
    INSIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of_negatives = tl.load(negatives + rows, mask=rows < n, other=-float("inf"))
    of_positives = tl.load(positives + rows, mask=rows < n, other=-float("inf"))
    valid = (of_negatives != -float("inf")) & (of_positives != -float("inf"))
    slope = tl.where(valid, tl.load(grad).to(tl.float32) * tl.load(unit), 0.0)
    margin = tl.where(valid, of_negatives, 0.0) - tl.where(valid, of_positives, 0.0)
    tl.store(grad_negatives + rows, slope * sigmoid(margin), mask=rows < n)
    if INSIDE:
        tl.store(grad_positives + rows, -slope * sigmoid(margin), mask=rows < n)
    else:
        several = tl.load(others + rows, mask=rows < n, other=0.0) > 1.0
        of_positive = tl.where(several, sigmoid(-margin), -sigmoid(margin))
        tl.store(grad_positives + rows, slope * of_positive, mask=rows < n)
        tl.store(grad_mean + rows, tl.where(several, -slope, 0.0), mask=rows < n)


def class_contrast(
    negatives: Tensor, positives: Tensor, mean: Tensor, others: Tensor, inside: bool, factor: float | None
) -> tuple[Tensor, Tensor]:
    """See `class_contrast_kernel`; and by what each row was multiplied."""
    result, unit = (negatives.new_empty(()) for _ in range(2))
    class_contrast_kernel[(1,)](
        negatives.contiguous(), positives.contiguous(), None if inside else mean.contiguous(), others, result, unit,
        len(negatives), 1.0 if factor is None else factor, INSIDE=inside, DROP=factor is None, BLOCK=VECTOR,
    )  # fmt: skip
    return result, unit


def class_contrast_backward(
    grad: Tensor, unit: Tensor, negatives: Tensor, positives: Tensor, others: Tensor, inside: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of both log-sum-exps, and without `inside` of the mean."""
    n = len(negatives)
    of_negatives, of_positives, of_mean = (negatives.new_empty(size) for size in (n, n, 0 if inside else n))
    if n:
        class_contrast_backward_kernel[(triton.cdiv(n, VECTOR),)](
            grad, unit, negatives.contiguous(), positives.contiguous(), others, of_negatives, of_positives,
            None if inside else of_mean, n, INSIDE=inside, BLOCK=VECTOR,
        )  # fmt: skip
    return of_negatives, of_positives, of_mean


@triton.jit
def largest_of(vector, size, BLOCK: tl.constexpr):
    largest = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, size, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(vector + index, mask=index < size, other=0.0)))
    return tl.max(largest, 0)


@triton.jit
def bound_kernel(
    summands, sizes, factors, factor_sizes, factor, result, SUMMANDS: tl.constexpr, FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """factor * (sum of max |summand|) * product of max |factor|, or 1 where its reciprocal is not finite."""
    bound = 0.0
    for k in tl.static_range(SUMMANDS):
        bound += largest_of(summands[k], sizes[k], BLOCK)
    bound *= factor
    for k in tl.static_range(FACTORS):
        bound *= largest_of(factors[k], factor_sizes[k], BLOCK)
    tl.store(result, tl.where(bound >= SMALLEST, bound, 1.0))


def bound(summands: Sequence[Tensor], factors: Sequence[Tensor], factor: float) -> Tensor:
    """See `bound_kernel`; all are vectors."""
    summands, factors = _contiguous(summands), _contiguous(factors)
    result = summands[0].new_empty(1)
    bound_kernel[(1,)](
        summands, tuple(map(len, summands)), factors, tuple(map(len, factors)), factor, result,
        SUMMANDS=len(summands), FACTORS=len(factors), BLOCK=VECTOR,
    )  # fmt: skip
    return result


@triton.jit
def store_below(values, size, result, index, n):
    """Indices in 32 bits, half the registers of 64; what is not below size names none, and is -1."""
    value = tl.load(values + index, mask=index < n, other=-1)
    tl.store(result + index, tl.where((value >= 0) & (value < size), value, -1).to(tl.int32), mask=index < n)


@triton.jit
def store_incoming(read, written, index, n):
    """dL/dlse e^-log_sum, 0 for an empty set, and its maximum, inf for an empty set."""
    grad = tl.load(read[0] + index, mask=index < n, other=0.0)
    best = tl.load(read[1] + index, mask=index < n, other=0.0)
    log_sum = tl.load(read[2] + index, mask=index < n, other=0.0)
    empty = best == -float("inf")
    tl.store(written[0] + index, tl.where(empty, 0.0, grad * tl.exp(-log_sum)), mask=index < n)
    tl.store(written[1] + index, tl.where(empty, float("inf"), best), mask=index < n)


@triton.jit
def incoming_kernel(
    row, col, row_written, col_written, values, result, n, m, indices, size, BLOCK: tl.constexpr
):  # fmt: skip
    """What backward reads of n rows, of m columns, and the columns that rows leave out."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if row is not None:
        store_incoming(row, row_written, index, n)
    if col is not None:
        store_incoming(col, col_written, index, m)
    if values is not None:
        store_below(values, size, result, index, indices)


Side = tuple[Tensor, Tensor, Tensor]


def incoming(row: Side | None, col: Side | None, values: Tensor | None, size: int) -> tuple[Tensor | None, ...]:
    """Of rows and columns, from dL/dlse, max and log_sum, the weights, then the maxima; the indices below `size`."""
    read = [None if side is None else _contiguous(side) for side in (row, col)]
    written = [None if side is None else tuple(torch.empty_like(side[1]) for _ in range(2)) for side in read]
    values = None if values is None else values.contiguous()
    result = None if values is None else torch.empty_like(values, dtype=torch.int32)
    n, m, indices = (0 if vector is None else len(vector) for vector in (row and row[1], col and col[1], values))
    longest = max(n, m, indices)
    if longest:
        incoming_kernel[(triton.cdiv(longest, VECTOR),)](
            *read, *written, values, result, n, m, indices, size, BLOCK=VECTOR
        )
    weights, maxima = ([None if side is None else side[place] for side in written] for place in (0, 1))
    return *weights, *maxima, result


# What is done with sets of P vectors, P at most 5: in float64, as their Gram matrices lose the digits of vectors that
# almost coincide. A tile has SETS sets, all P padded to WIDTH, and some of their features.
SETS, SHARE = 4, 32
MOST_VECTORS = 5


@triton.jit
def set_tile(
    vectors, sets, n, begin, features, set_stride, stride,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Features of whole sets, [sets, WIDTH, BLOCK_D] in float64, 0 beyond the last."""
    member = tl.arange(0, WIDTH)[None, :, None]
    feature = (begin + tl.arange(0, BLOCK_D))[None, None, :]
    place = sets.to(tl.int64)[:, None, None] * set_stride + member.to(tl.int64) * stride + feature
    inside = (sets[:, None, None] < n) & (member < P) & (feature < features)
    return tl.load(vectors + place, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def store_set_tile(
    vectors, tile, sets, n, begin, features, P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):
    member = tl.arange(0, WIDTH)[None, :, None]
    feature = (begin + tl.arange(0, BLOCK_D))[None, None, :]
    place = (sets.to(tl.int64)[:, None, None] * P + member) * features + feature
    inside = (sets[:, None, None] < n) & (member < P) & (feature < features)
    tl.store(vectors + place, tile.to(vectors.dtype.element_ty), mask=inside)


@triton.jit
def matrices(values, sets, n, P: tl.constexpr, WIDTH: tl.constexpr):
    """P x P matrices of float64, [sets, WIDTH, WIDTH]."""
    row, col = tl.arange(0, WIDTH)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    place = sets.to(tl.int64)[:, None, None] * (P * P) + row * P + col
    return tl.load(values + place, mask=(sets[:, None, None] < n) & (row < P) & (col < P), other=0.0)


@triton.jit
def product_of(a, b):
    """a b of matrices [sets, s, t] and [sets, t, u]."""
    return tl.sum(a[:, :, :, None] * b[:, None, :, :], 2)


@triton.jit
def product_with_transposed(a, b):
    """a b^T of [sets, s, t] and [sets, u, t]."""
    return tl.sum(a[:, :, None, :] * b[:, None, :, :], 3)


@triton.jit
def entry(matrix, t, s, WIDTH: tl.constexpr):
    row, col = tl.arange(0, WIDTH)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    return tl.sum(tl.sum(tl.where((row == t) & (col == s), matrix, 0.0), 2), 1)


@triton.jit
def factor_kernel(
    vectors, inverse, volume, triangles, weight, col_scale, basis, anchor, square, n, m, features, tiles,
    P: tl.constexpr, WIDTH: tl.constexpr, INSIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The Cholesky factor L of the Gram matrix of each set as L^-1, and the volume; see backends/tuples.py.

    What the sweep reads: the lower triangles of L^-1, the scale of a column, and Q = L^-1 times the set. The programs
    behind those of the sets have |a_i|^2 of the anchors.
    """
    row, col = tl.arange(0, WIDTH)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    if tl.program_id(0) < tiles:
        sets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        gram = tl.zeros((BLOCK, WIDTH, WIDTH), tl.float64)
        for begin in range(0, features, BLOCK_D):
            tile = set_tile(vectors, sets, m, begin, features, P * features, features, P, WIDTH, BLOCK_D)
            gram += product_with_transposed(tile, tile)
        lower = ()
        reciprocals = ()
        upside = tl.zeros((BLOCK, WIDTH, WIDTH), tl.float64)  # L^-1
        size = tl.full((BLOCK,), 1.0, tl.float64)
        for t in tl.static_range(P):
            # row t of L, then its pivot, then row t of L^-1
            of_row = ()
            pivot = entry(gram, t, t, WIDTH)
            outside = pivot
            for s in tl.static_range(t):
                rest = entry(gram, t, s, WIDTH)
                for r in tl.static_range(s):
                    rest -= of_row[r] * lower[s][r]
                of_row = of_row + (rest * reciprocals[s],)  # noqa: RUF005, Triton has no *of_row
                outside -= of_row[s] * of_row[s]
            lower = lower + (of_row,)  # noqa: RUF005
            within = outside <= INSIDE * pivot
            length = tl.sqrt(tl.where(within, 0.0, outside))
            reciprocal = tl.where(within, 0.0, 1.0 / tl.where(within, 1.0, length))
            reciprocals = reciprocals + (reciprocal,)  # noqa: RUF005
            size *= length
            of_inverse = tl.where(col == t, 1.0, tl.zeros((BLOCK, 1, WIDTH), tl.float64))
            for s in tl.static_range(t):
                above = tl.sum(tl.where(row == s, upside, 0.0), 1)[:, None, :]
                of_inverse -= of_row[s][:, None, None] * above
            upside += tl.where(row == t, of_inverse * reciprocal[:, None, None], 0.0)
        inside = (sets[:, None, None] < m) & (row < P) & (col < P)
        tl.store(inverse + sets.to(tl.int64)[:, None, None] * (P * P) + row * P + col, upside, mask=inside)
        tl.store(volume + sets, size, mask=sets < m)
        if triangles is not None:
            place = (row * (row + 1) // 2 + col) * tl.cast(m, tl.int64) + sets[:, None, None]
            tl.store(triangles + place, upside.to(tl.float32), mask=inside & (col <= row))
            scale = size.to(tl.float32)
            if col_scale is not None:
                scale *= tl.load(col_scale + sets, mask=sets < m, other=0.0)
            tl.store(weight + sets, scale, mask=sets < m)
        if basis is not None:
            for begin in range(0, features, BLOCK_D):
                tile = set_tile(vectors, sets, m, begin, features, P * features, features, P, WIDTH, BLOCK_D)
                store_set_tile(basis, product_of(upside, tile), sets, m, begin, features, P, WIDTH, BLOCK_D)
    elif anchor is not None:
        rows = (tl.program_id(0) - tiles) * BLOCK + tl.arange(0, BLOCK)
        squares = tl.zeros((BLOCK,), tl.float64)
        for begin in range(0, features, BLOCK_D):
            tile = set_tile(anchor, rows, n, begin, features, features, 0, 1, 1, BLOCK_D)
            squares += tl.sum(tl.sum(tile * tile, 2), 1)
        tl.store(square + rows, squares.to(tl.float32), mask=rows < n)


@triton.jit
def volume_gradient_kernel(
    vectors, inverse, factor, result, m, features,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """factor L^-T L^-1 X of the sets X."""
    sets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lower = matrices(inverse, sets, m, P, WIDTH)
    upper = tl.permute(lower, (0, 2, 1))
    weights = product_of(upper, lower) * tl.load(factor + sets, mask=sets < m, other=0.0).to(tl.float64)[:, None, None]
    for begin in range(0, features, BLOCK_D):
        tile = set_tile(vectors, sets, m, begin, features, P * features, features, P, WIDTH, BLOCK_D)
        store_set_tile(result, product_of(weights, tile), sets, m, begin, features, P, WIDTH, BLOCK_D)


@triton.jit
def tuple_gradient_kernel(
    vectors, inverse, volume, moments, grad_volume, result, m, features,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """L^-T T + L^-T (dL/dv v I - T M^T L^-T) L^-1 M of tuples M and their moments T [P, M, D]."""
    sets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lower = matrices(inverse, sets, m, P, WIDTH)
    upper = tl.permute(lower, (0, 2, 1))
    products = tl.zeros((BLOCK, WIDTH, WIDTH), tl.float64)
    of_member = tl.cast(m, tl.int64) * features
    for begin in range(0, features, BLOCK_D):
        of_moments = set_tile(moments, sets, m, begin, features, features, of_member, P, WIDTH, BLOCK_D)
        tile = set_tile(vectors, sets, m, begin, features, P * features, features, P, WIDTH, BLOCK_D)
        products += product_with_transposed(of_moments, tile)
    grow = tl.load(grad_volume + sets, mask=sets < m, other=0.0) * tl.load(volume + sets, mask=sets < m, other=0.0)
    row, col = tl.arange(0, WIDTH)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    along = tl.where(row == col, grow[:, None, None], 0.0) - product_of(products, upper)
    weights = product_of(product_of(upper, along), lower)
    for begin in range(0, features, BLOCK_D):
        of_moments = set_tile(moments, sets, m, begin, features, features, of_member, P, WIDTH, BLOCK_D)
        tile = set_tile(vectors, sets, m, begin, features, P * features, features, P, WIDTH, BLOCK_D)
        added = product_of(upper, of_moments) + product_of(weights, tile)
        store_set_tile(result, added, sets, m, begin, features, P, WIDTH, BLOCK_D)


@triton.jit
def units_kernel(
    vectors, result, first, others, inverse, n, features, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows of K tensors at length 1, [N, K, D], and 1 / |x| [N, K] in float64; a zero row stays 0.

    Once more the first, [N, D], and the others, [N, K - 1, D], which the sweep takes without gaps.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = rows.to(tl.int64)[:, None]
    for k in tl.static_range(K):
        squares = tl.zeros((BLOCK_M,), tl.float64)
        for begin in range(0, features, BLOCK_D):
            feature = begin + tl.arange(0, BLOCK_D)[None, :]
            inside = (rows[:, None] < n) & (feature < features)
            tile = tl.load(vectors[k] + place * features + feature, mask=inside, other=0.0).to(tl.float64)
            squares += tl.sum(tile * tile, 1)
        reciprocal = 1.0 / tl.sqrt(tl.where(squares == 0.0, 1.0, squares))
        # 0 where 1 / |x| is no float32, as of a zero row
        reciprocal = tl.where((squares == 0.0) | (reciprocal > LARGEST), 0.0, reciprocal)
        tl.store(inverse + rows.to(tl.int64) * K + k, reciprocal, mask=rows < n)
        for begin in range(0, features, BLOCK_D):
            feature = begin + tl.arange(0, BLOCK_D)[None, :]
            inside = (rows[:, None] < n) & (feature < features)
            tile = tl.load(vectors[k] + place * features + feature, mask=inside, other=0.0).to(tl.float64)
            tile = tl.where(reciprocal[:, None] == 0.0, 0.0, tile * reciprocal[:, None])
            tl.store(result + (place * K + k) * features + feature, tile.to(tl.float32), mask=inside)
            if k == 0:
                tl.store(first + place * features + feature, tile.to(tl.float32), mask=inside)
            else:
                tl.store(others + (place * (K - 1) + k - 1) * features + feature, tile.to(tl.float32), mask=inside)


@triton.jit
def gradient_of_unit(
    of_all, of_first, of_others, rows, n, begin, features, k: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The sum of what comes to tensor k, in float64."""
    place = rows.to(tl.int64)[:, None]
    feature = begin + tl.arange(0, BLOCK_D)[None, :]
    inside = (rows[:, None] < n) & (feature < features)
    total = tl.zeros(inside.shape, tl.float64)
    if of_all is not None:
        total += tl.load(of_all + (place * K + k) * features + feature, mask=inside, other=0.0)
    if k == 0:
        if of_first is not None:
            total += tl.load(of_first + place * features + feature, mask=inside, other=0.0)
    else:
        if of_others is not None:
            total += tl.load(of_others + (place * (K - 1) + k - 1) * features + feature, mask=inside, other=0.0)
    return total


@triton.jit
def units_backward_kernel(
    of_all, of_first, of_others, result, inverse, gradients, n, features,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What of the incoming gradients is orthogonal to the unit vector u, over the length: (g - u <u, g>) / |x|."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = rows.to(tl.int64)[:, None]
    for k in tl.static_range(K):
        if gradients[k] is not None:
            radial = tl.zeros((BLOCK_M,), tl.float64)
            for begin in range(0, features, BLOCK_D):
                feature = begin + tl.arange(0, BLOCK_D)[None, :]
                inside = (rows[:, None] < n) & (feature < features)
                u = tl.load(result + (place * K + k) * features + feature, mask=inside, other=0.0).to(tl.float64)
                grad = gradient_of_unit(of_all, of_first, of_others, rows, n, begin, features, k, K, BLOCK_D)
                radial += tl.sum(u * grad, 1)
            length = tl.load(inverse + rows.to(tl.int64) * K + k, mask=rows < n, other=0.0)[:, None]
            for begin in range(0, features, BLOCK_D):
                feature = begin + tl.arange(0, BLOCK_D)[None, :]
                inside = (rows[:, None] < n) & (feature < features)
                u = tl.load(result + (place * K + k) * features + feature, mask=inside, other=0.0).to(tl.float64)
                grad = gradient_of_unit(of_all, of_first, of_others, rows, n, begin, features, k, K, BLOCK_D)
                tile = tl.where(length == 0.0, 0.0, (grad - u * radial[:, None]) * length)
                target = gradients[k] + place * features + feature
                tl.store(target, tile.to(gradients[k].dtype.element_ty), mask=inside)


def units(vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of K tensors [N, D] at length 1 as [N, K, D], the first, the others, and 1 / |x| [N, K] in float64."""
    (n, features), count = vectors[0].shape, len(vectors)
    sizes = ((n, count, features), (n, features), (n, count - 1, features))
    results = tuple(vectors[0].new_empty(size, dtype=torch.float32) for size in sizes)
    inverse = vectors[0].new_empty((n, count), dtype=torch.float64)
    if n:
        units_kernel[(triton.cdiv(n, ROWS),)](
            _contiguous(vectors), *results, inverse, n, features, K=count, BLOCK_M=ROWS, BLOCK_D=FEATURES
        )
    return *results, inverse


def units_backward(
    of_all: Tensor | None,
    of_first: Tensor | None,
    of_others: Tensor | None,
    result: Tensor,
    inverse: Tensor,
    like: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of the tensors in their dtypes; empty where they are not needed."""
    n, count, features = result.shape
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
            for x, need in zip(like, needs, strict=True)]  # fmt: skip
    incoming = (None if grad is None else grad.contiguous() for grad in (of_all, of_first, of_others))
    if n:
        units_backward_kernel[(triton.cdiv(n, ROWS),)](
            *incoming, result, inverse, tuple(made), n, features, K=count, BLOCK_M=ROWS, BLOCK_D=FEATURES
        )
    return [x.new_empty(0) if gradient is None else gradient for x, gradient in zip(like, made, strict=True)]


def factor(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Of sets [M, P, D] L^-1 [M, P, P] and the volumes [M], in float64."""
    m, members, _ = vectors.shape
    inverse = vectors.new_empty((m, members, members), dtype=torch.float64)
    volume = vectors.new_empty(m, dtype=torch.float64)
    if m:
        _factor(vectors, inverse, volume, *[None] * 6)
    return inverse, volume


def span(
    anchor: Tensor, tuples: Tensor, col_scale: Tensor | None, orthonormal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """`factor` of tuples [M, P, D], and what a sweep reads.

    Those are the lower triangles of L^-1 [P (P + 1) / 2, M], the scales of the columns [M] and |a_i|^2 [N] in float32,
    and where it is wanted Q = L^-1 times the tuples in their dtype.
    """
    n, (m, members, _) = len(anchor), tuples.shape
    inverse = tuples.new_empty((m, members, members), dtype=torch.float64)
    volume = tuples.new_empty(m, dtype=torch.float64)
    triangles = tuples.new_empty((members * (members + 1) // 2, m), dtype=torch.float32)
    weight, square = (tuples.new_empty(size, dtype=torch.float32) for size in (m, n))
    basis = torch.empty_like(tuples, memory_format=torch.contiguous_format) if orthonormal else None
    if n + m:
        col_scale = None if col_scale is None else col_scale.contiguous()
        _factor(tuples, inverse, volume, triangles, weight, col_scale, basis, anchor.contiguous(), square)
    return inverse, volume, triangles, weight, square, basis


def _factor(vectors: Tensor, *arguments: Tensor | None) -> None:
    (m, members, features), anchor = vectors.shape, arguments[-2]
    n, tiles = 0 if anchor is None else len(anchor), triton.cdiv(m, SETS)
    factor_kernel[(tiles + triton.cdiv(n, SETS),)](
        vectors.contiguous(), *arguments, n, m, features, tiles, P=members, WIDTH=triton.next_power_of_2(members),
        INSIDE=INSIDE, BLOCK=SETS, BLOCK_D=SHARE,
    )  # fmt: skip


def volume_gradient(vectors: Tensor, inverse: Tensor, factor: Tensor) -> Tensor:
    """factor L^-T L^-1 X of sets X [M, P, D], in their dtype."""
    m, members, features = vectors.shape
    result = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    if m:
        volume_gradient_kernel[(triton.cdiv(m, SETS),)](
            vectors.contiguous(), inverse.contiguous(), factor.contiguous(), result, m, features,
            P=members, WIDTH=triton.next_power_of_2(members), BLOCK=SETS, BLOCK_D=SHARE,
        )  # fmt: skip
    return result


def tuple_gradient(tuples: Tensor, inverse: Tensor, volume: Tensor, moments: Tensor, grad_volume: Tensor) -> Tensor:
    """The gradient of the tuples [M, P, D] from their moments [P, M, D] and that of their volumes."""
    m, members, features = tuples.shape
    result = torch.empty_like(tuples, memory_format=torch.contiguous_format)
    if m:
        tuple_gradient_kernel[(triton.cdiv(m, SETS),)](
            tuples.contiguous(), inverse, volume, moments, grad_volume.contiguous(), result, m, features,
            P=members, WIDTH=triton.next_power_of_2(members), BLOCK=SETS, BLOCK_D=SHARE,
        )  # fmt: skip
    return result
