"""Triton kernels of what is O(N D) and O(N) around a sweep: scales of rows, the loss's formula, what backward reads.

scale:            a_i = c t^p / |x_i|
scale, backward:  dX_i = dX'_i + da_i d a_i / d x_i, and in one program dt = sum_i da_i d a_i / dt
contrast:         sum_i sum_d softplus(lse_di - s_i) + slope s_i - share total_di, in one program
contrast, back:   its gradients
incoming:         dL/dlse e^-log_sum and the maximum, of rows and of columns; indices in 32 bits

A program that goes through N elements alone takes microseconds, where the sweep has N^2; it needs no second launch, and
no atomics. Under each kernel is the function that launches it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, FEATURES = 16, 128  # of a program's step
VECTOR = 1024  # elements of a step of what has one number per row


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
