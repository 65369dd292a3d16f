"""The Triton engine: sweeps over the tiles of the N x M plane that serve similarity_logsumexp and volume_logsumexp.

    forward, one program per (group of rows, strip of columns):
        for each tile of rows of the group, for each tile of columns of the strip:
            s = logits of the tile, -inf where a pair does not take part
            fold max and sum of e^s over its rows and over its columns into statistics that no other program writes
        -> partials [strips, N] and [groups, M], merged by a second kernel in a fixed order
    backward by blocks of the plane:
        one program per tile: s again, g = dL/ds -> g a b into a workspace, and partial sums of g for scales and biases
        dX += (g a b) Y and dY += (g a b)^T X: two matrix products of the vendor's library
    backward of 16-bit features of few dimensions, for dX and with the sides swapped for dY:
        one program per (tile of rows, strip of columns), dX of its rows in registers:
            for each tile of columns: s again, g = dL/ds, dX += (g a b) Y

No atomics: the results are bitwise repeatable where the vendor's products are. In self-similarity (no y) forward and
the blocks visit the tiles on and above the diagonal; a tile above it also stands for its mirror image.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_ops.kernels.tile import (
    Incoming,
    Span,
    Vectors,
    fold,
    gradient_of_tile,
    has_excluded,
    is_needed,
    logits_of_tile,
    pairs_of_tile,
    reduce_tile,
    those_taking_part,
    vector_or,
    without_excluded,
)


class Tiling(NamedTuple):
    """How a problem is cut; sizes are powers of two."""

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int


class Part(NamedTuple):
    """Partial statistics of one direction, [parts, size]."""

    maximum: Tensor | None = None
    sum: Tensor | None = None
    total: Tensor | None = None


class Sums(NamedTuple):
    """Partial sums of the gradients of one direction, [parts, size]; None where not needed."""

    scale: Tensor | None = None
    bias: Tensor | None = None
    along: Tensor | None = None  # of volumes: what x_i itself has of its gradient


# |x|^2 - |y|^2 is off by about 4 units in the last place of |x|^2: there the distance is 0, at its minimum
AT_MINIMUM = tl.constexpr(4 * torch.finfo(torch.float32).eps)


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
    scale = vector_or(vectors.row_scale, rows, n, 1.0)
    bias = vector_or(vectors.row_bias, rows, n, 0.0)
    if vectors.col_scale is not None:
        scale *= tl.load(vectors.col_scale + index, mask=named, other=1.0)
    if vectors.col_bias is not None:
        bias += tl.load(vectors.col_bias + index, mask=named, other=0.0)
    tl.store(excluded + rows, tl.where(named, dots * scale + bias, -float("inf")), mask=rows < n)


@triton.jit
def empty_part(part, index, last, BLOCK: tl.constexpr):
    inside = index < last
    tl.store(part.maximum + index, tl.full((BLOCK,), -float("inf"), tl.float32), mask=inside)
    tl.store(part.sum + index, tl.zeros((BLOCK,), tl.float32), mask=inside)
    if part.total is not None:
        tl.store(part.total + index, tl.zeros((BLOCK,), tl.float32), mask=inside)


@triton.jit
def fold_into(part, index, last, tile_max, tile_sum, logits, AXIS: tl.constexpr):
    """Fold the statistics of a tile into those in memory."""
    inside = index < last
    old_max = tl.load(part.maximum + index, mask=inside, other=-float("inf"))
    old_sum = tl.load(part.sum + index, mask=inside, other=0.0)
    if part.total is not None:
        total = tl.load(part.total + index, mask=inside, other=0.0)
        total += tl.sum(tl.where(logits > -float("inf"), logits, 0.0), AXIS)
    new_max, new_sum = fold(old_max, old_sum, tile_max, tile_sum)
    tl.debug_barrier()  # several threads may read an element, of which one writes it
    tl.store(part.maximum + index, new_max, mask=inside)
    tl.store(part.sum + index, new_sum, mask=inside)
    if part.total is not None:
        tl.store(part.total + index, total, mask=inside)


@triton.jit
def forward_kernel(
    x, y, vectors, span, row_part, col_part, n, m, features, rows_per_group, cols_per_strip,
    MEMBERS: tl.constexpr, MIRRORED: tl.constexpr, RESTRICT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
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
            empty_part(col_part, col_begin + col + tl.arange(0, BLOCK_N), col_begin + m, BLOCK_N)
    # columns inside: what is loaded for the tile that stays has few registers for rows, many for columns
    for row in range(first_row, last_row, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        if ROWS:
            empty_part(row_part, row_begin + rows, row_begin + n, BLOCK_M)
        tl.debug_barrier()
        begin = first_col
        if MIRRORED:
            begin = tl.maximum(first_col, row)
        for col in range(begin, last_col, BLOCK_N):
            cols = col + tl.arange(0, BLOCK_N)
            has = has_excluded(vectors, row, col, n, m, BLOCK_M, BLOCK_N)
            if is_needed(vectors, has, rows, cols, n, m, RESTRICT):
                pairs, _ = pairs_of_tile(
                    x, y, span, rows, cols, n, m, features, MEMBERS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
                )
                logits = logits_of_tile(pairs, vectors, rows, cols, n, m)
                if has:
                    logits = without_excluded(logits, vectors, rows, cols, n, m)
                logits = those_taking_part(logits, vectors, rows, cols, n, m, RESTRICT)
                tile_row_max, tile_row_sum, tile_col_max, tile_col_sum = reduce_tile(logits, ROWS and COLS, ROWS)
                if ROWS:
                    fold_into(row_part, row_begin + rows, row_begin + n, tile_row_max, tile_row_sum, logits, 1)
                if COLS:
                    if MIRRORED:  # the tiles on the diagonal have both sides already
                        tile_col_max = tl.where(row + BLOCK_M <= col, tile_col_max, -float("inf"))
                        tile_col_sum = tl.where(row + BLOCK_M <= col, tile_col_sum, 0.0)
                    fold_into(col_part, col_begin + cols, col_begin + m, tile_col_max, tile_col_sum, logits, 0)
                tl.debug_barrier()  # other threads may read these statistics for the next tile


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
def merge_kernel(part, parts, mirror, mirrors, out_max, out_log_sum, size, BLOCK: tl.constexpr):
    """Join the partials of every row; in self-similarity also those of its columns."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    best, total = fold_parts(part, parts, best, total, index, size)
    if mirror.maximum is not None:
        best, total = fold_parts(mirror, mirrors, best, total, index, size)
    best = tl.where(total == total, best, total)  # NaN is in the sums only, so far
    tl.store(out_max + index, best, mask=index < size)
    tl.store(out_log_sum + index, tl.log(total), mask=index < size)


@triton.jit
def block_kernel(
    x, y, vectors, span, incoming, unit, coefficients, row_sums, col_sums,
    n, m, features, first_row, first_col, block_rows, block_cols, stride,
    MEMBERS: tl.constexpr, RESTRICT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Coefficients of one tile of a block, [block_rows, stride] or for volumes [P, block_rows, stride].

    The stride of rows is a multiple of 16, and what is beyond the columns of the block is stored, too, as 0: stores of
    whole vectors, which a mask of single columns would prevent.

    For volumes Q_j = L^-1 (y_j.) and q = -(dL/dpair) / pair give dL/dx_i = sum_jt (q y_ijt) Q_jt - (sum_j q) x_i and
    the moments sum_i (q y_ijt) x_i of a tuple; y_ijt are the coordinates.
    """
    tile_row, tile_col = tl.program_id(0), tl.program_id(1)
    local_rows = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    local_cols = tile_col * BLOCK_N + tl.arange(0, BLOCK_N)
    row, col = first_row + tile_row * BLOCK_M, first_col + tile_col * BLOCK_N
    rows, cols = first_row + local_rows, first_col + local_cols
    a = vector_or(vectors.row_scale, rows, n, 1.0)
    b = vector_or(vectors.col_scale, cols, m, 1.0)
    has = has_excluded(vectors, row, col, n, m, BLOCK_M, BLOCK_N)
    place = local_rows.to(tl.int64)[:, None] * stride + local_cols[None, :]
    inside = (local_rows[:, None] < block_rows) & (local_cols[None, :] < stride)
    row_place = tile_col.to(tl.int64) * block_rows + local_rows
    col_place = tile_row.to(tl.int64) * block_cols + local_cols
    if MEMBERS == 0:
        pairs = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if is_needed(vectors, has, rows, cols, n, m, RESTRICT):
            pairs, _ = pairs_of_tile(
                x, y, span, rows, cols, n, m, features, MEMBERS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
            )
            gradient = gradient_of_tile(pairs, has, vectors, incoming, rows, cols, n, m, RESTRICT)
        if coefficients is not None:
            weighted = gradient * (a[:, None] * b[None, :])
            if unit is not None:
                weighted = weighted / tl.load(unit)
            tl.store(coefficients + place, weighted.to(coefficients.dtype.element_ty), mask=inside)
    else:
        pairs, coordinates = pairs_of_tile(
            x, y, span, rows, cols, n, m, features, MEMBERS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
        )
        gradient = gradient_of_tile(pairs, has, vectors, incoming, rows, cols, n, m, RESTRICT)
        if coefficients is not None:
            smallest = tl.sqrt(tl.load(span.square + rows, mask=rows < n, other=0.0) * AT_MINIMUM)
            at_minimum = -pairs <= smallest[:, None]
            distance = tl.where(at_minimum, 1.0, -pairs)
            q = tl.where(at_minimum, 0.0, gradient * (a[:, None] * b[None, :]) / distance)
            if row_sums.along is not None:
                tl.store(row_sums.along + row_place, tl.sum(q, 1), mask=local_rows < block_rows)
            if unit is not None:
                q = q / tl.load(unit)
            for t in tl.static_range(MEMBERS):
                of_member = coefficients + t * tl.cast(block_rows, tl.int64) * stride
                tl.store(of_member + place, (q * coordinates[t]).to(coefficients.dtype.element_ty), mask=inside)
    if row_sums.scale is not None:
        tl.store(row_sums.scale + row_place, tl.sum(gradient * pairs * b[None, :], 1), mask=local_rows < block_rows)
    if row_sums.bias is not None:
        tl.store(row_sums.bias + row_place, tl.sum(gradient, 1), mask=local_rows < block_rows)
    if col_sums.scale is not None:
        tl.store(col_sums.scale + col_place, tl.sum(gradient * pairs * a[:, None], 0), mask=local_cols < block_cols)
    if col_sums.bias is not None:
        tl.store(col_sums.bias + col_place, tl.sum(gradient, 0), mask=local_cols < block_cols)


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
    a = vector_or(vectors.row_scale, rows, n, 1.0)
    grad_rows = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    scale_sum = tl.zeros((BLOCK_M,), tl.float32)
    bias_sum = tl.zeros((BLOCK_M,), tl.float32)
    for col in range(first_col, last_col, BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        has = has_excluded(vectors, row, col, n, m, BLOCK_M, BLOCK_N)
        if is_needed(vectors, has, rows, cols, n, m, RESTRICT):
            y_place = cols.to(tl.int64)[:, None] * features + feature[None, :]
            y_tile = tl.load(y + y_place, mask=(cols[:, None] < m) & (feature[None, :] < features), other=0.0)
            pairs = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)
            gradient = gradient_of_tile(pairs, has, vectors, incoming, rows, cols, n, m, RESTRICT)
            weighted = gradient * vector_or(vectors.col_scale, cols, m, 1.0)[None, :]
            if sums.scale is not None:
                scale_sum += tl.sum(weighted * pairs, 1)
            weighted *= a[:, None]  # before it is rounded: `unit` is a bound of the product
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


class Tilings(NamedTuple):
    """The tiling of each kernel. Many: with options that take registers for every column, see `Problem`."""

    forward: Tiling  # tiles of columns divide those of rows: in self-similarity the diagonal is between tiles of rows
    forward_many: Tiling
    block: Tiling
    block_many: Tiling
    volume: Tiling  # forward and block, P = 1 and 2
    volume_many: Tiling  # P = 3 and 4
    rows: Tiling | None  # its block_d is all features; None where it is not used


# By class of device, then by bytes of an element. The largest that spill no registers: bench/RESOURCES.md has them all.
TILINGS = {
    "any": {
        2: Tilings(
            forward=Tiling(128, 128, 32, 8, 4),
            forward_many=Tiling(128, 64, 64, 8, 3),
            block=Tiling(128, 128, 64, 8, 3),
            block_many=Tiling(128, 64, 64, 8, 3),
            volume=Tiling(128, 64, 64, 8, 3),
            volume_many=Tiling(64, 32, 64, 8, 3),
            rows=Tiling(64, 32, 0, 8, 2),
        ),
        4: Tilings(*[Tiling(64, 64, 32, 8, 2)] * 5, volume_many=Tiling(64, 32, 16, 8, 3), rows=None),
    },
    "sm_90": {
        2: Tilings(
            forward=Tiling(128, 128, 64, 8, 3),
            forward_many=Tiling(128, 64, 64, 8, 3),
            block=Tiling(128, 128, 64, 8, 3),
            block_many=Tiling(128, 64, 64, 8, 3),
            volume=Tiling(128, 64, 32, 8, 4),
            volume_many=Tiling(64, 32, 64, 8, 3),
            rows=Tiling(64, 64, 0, 8, 2),
        ),
        4: Tilings(
            forward=Tiling(64, 64, 32, 16, 2),
            forward_many=Tiling(64, 32, 32, 8, 2),
            block=Tiling(64, 64, 32, 16, 2),
            block_many=Tiling(64, 64, 32, 16, 2),
            volume=Tiling(64, 64, 32, 16, 2),
            volume_many=Tiling(64, 32, 16, 8, 3),
            rows=None,
        ),
    },
    "sm_100": {
        2: Tilings(
            forward=Tiling(128, 64, 64, 8, 3),
            forward_many=Tiling(64, 64, 64, 8, 3),
            block=Tiling(64, 64, 64, 8, 3),
            block_many=Tiling(64, 64, 64, 8, 3),
            volume=Tiling(64, 32, 64, 8, 2),
            volume_many=Tiling(64, 32, 64, 8, 2),
            rows=Tiling(64, 64, 0, 8, 2),
        ),
        4: Tilings(
            forward=Tiling(64, 64, 32, 8, 2),
            forward_many=Tiling(64, 64, 32, 8, 2),
            block=Tiling(64, 64, 32, 8, 2),
            block_many=Tiling(64, 32, 32, 8, 2),
            volume=Tiling(64, 32, 32, 8, 2),
            volume_many=Tiling(64, 32, 32, 8, 2),
            rows=None,
        ),
    },
    "hip": {
        2: Tilings(
            forward=Tiling(128, 128, 64, 8, 2),
            forward_many=Tiling(128, 128, 64, 8, 2),
            block=Tiling(128, 128, 64, 8, 2),
            block_many=Tiling(128, 64, 64, 8, 2),
            volume=Tiling(128, 64, 64, 8, 2),
            volume_many=Tiling(64, 32, 64, 4, 2),
            rows=Tiling(64, 32, 0, 4, 2),
        ),
        4: Tilings(*[Tiling(64, 64, 16, 8, 3)] * 5, volume_many=Tiling(64, 32, 16, 4, 2), rows=None),
    },
}
ROWS_FEATURES = 256  # most features of rows_kernel; beyond, bench/COST.md has the blocks ahead or the registers full
PROGRAMS = 256  # of a launch, about two for each multiprocessor of an H100, where the device doesn't say
WORKSPACE = 4096  # rows and columns of a block of pairs: 32 MB of 16-bit coefficients, the class of an L2 cache
EXCLUDED = 32  # rows of a program that looks up the excluded logits
MERGE = 1024  # rows of a program that merges partials


class Problem:
    """The inputs of a sweep as the kernels take them: contiguous, with the columns of self-similarity filled in."""

    def __init__(
        self, x: Tensor, y: Tensor, vectors: Vectors, span: Span, *, mirrored: bool = False, restrict: bool = False
    ) -> None:
        self.x, self.y = x.contiguous(), y.contiguous()
        self.vectors = Vectors(*(None if vector is None else vector.contiguous() for vector in vectors))
        self.span = span
        self.n, self.m, self.features = x.shape[0], y.shape[0], x.shape[1]
        self.members = y.shape[1] if y.dim() == 3 else 0
        self.mirrored, self.restrict = mirrored, restrict
        self.tilings = TILINGS[device_class(x)][x.element_size()]
        many = any(option is not None for option in (vectors.col_scale, *vectors[2:4], *vectors[6:]))  # biases, ids
        if self.members:
            tiling = self.tilings.volume if self.members <= 2 else self.tilings.volume_many
            self.forward_tiling, self.block_tiling = tiling, tiling
        else:
            self.forward_tiling = self.tilings.forward_many if many else self.tilings.forward
            self.block_tiling = self.tilings.block_many if many or mirrored else self.tilings.block

    def transposed(self) -> Problem:
        """Of pairs: x and y change places. Volumes have no such form."""
        v = self.vectors
        swapped = Vectors(
            v.col_scale, v.row_scale, v.col_bias, v.row_bias, v.col_exclude, v.row_exclude, v.col_ids, v.row_ids
        )
        return Problem(self.y, self.x, swapped, self.span, mirrored=self.mirrored, restrict=self.restrict)

    def full(self, shape: tuple[int, ...], value: float) -> Tensor:
        return self.x.new_full(shape, value, dtype=torch.float32)

    def empty(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)

    def options(self, tiling: Tiling) -> dict[str, Any]:
        return {
            "RESTRICT": self.restrict,
            "PRECISION": _precision(self.x),
            "BLOCK_M": tiling.block_m,
            "BLOCK_N": tiling.block_n,
            "BLOCK_D": tiling.block_d,
            "num_warps": tiling.warps,
            "num_stages": tiling.stages,
        }


def index_below(size: int, index: Tensor) -> Tensor:
    """int32, half the registers of int64; what is not below size names none, and is -1."""
    return index.where((index >= 0) & (index < size), -1).to(torch.int32)


def device_class(x: Tensor) -> str:
    """The key of TILINGS for the device of a tensor."""
    if x.device.type != "cuda":
        return "any"
    if torch.version.hip is not None:
        return "hip"
    generation = f"sm_{torch.cuda.get_device_capability(x.device)[0]}0"
    return generation if generation in TILINGS else "any"


def _programs(x: Tensor) -> int:
    """Programs of a launch: two waves of the multiprocessors, or one if each holds two."""
    if x.device.type != "cuda":
        return PROGRAMS
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count


def _precision(x: Tensor) -> str:
    """PyTorch's own setting for float32 matrix products: TF32 only where the user allows it."""
    allowed = (
        x.device.type == "cuda" and torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    )
    return "tf32" if allowed and x.dtype == torch.float32 else "ieee"


def _share(size: int, block: int, parts: int) -> int:
    """Rows of a part: whole tiles, so that there are at most `parts`."""
    return triton.cdiv(triton.cdiv(size, block), parts) * block


def _groups(problem: Problem) -> tuple[int, int]:
    """Groups of rows and strips of columns: about sqrt(programs) of each keep partials and traffic small."""
    programs = _programs(problem.x)
    if problem.mirrored:  # those below the diagonal have nothing to do
        groups = (math.isqrt(8 * programs + 1) - 1) // 2
        return groups, groups
    groups = math.isqrt(programs)
    return groups, programs // groups


def forward(problem: Problem, rows: bool, cols: bool, totals: bool = False) -> dict[str, Tensor]:
    """Statistics of rows and columns, the excluded logits [N] and the totals; empty where not asked for."""
    n, m, tiling = problem.n, problem.m, problem.forward_tiling
    has_index = problem.vectors.row_exclude is not None and not problem.members
    results = {
        "row_max": problem.full((n if rows else 0,), -torch.inf),
        "col_max": problem.full((m if cols else 0,), -torch.inf),
        "row_log_sum": problem.full((n if rows else 0,), -torch.inf),
        "col_log_sum": problem.full((m if cols else 0,), -torch.inf),
        "excluded": problem.full((n if has_index else 0,), -torch.inf),
        "row_total": problem.full((n if rows and totals else 0,), 0.0),
        "col_total": problem.full((m if cols and totals else 0,), 0.0),
    }
    if n == 0 or m == 0:
        return results
    most_groups, most_strips = _groups(problem)
    rows_per_group = _share(n, tiling.block_m, most_groups)
    cols_per_strip = _share(m, tiling.block_n, most_strips)
    groups, strips = triton.cdiv(n, rows_per_group), triton.cdiv(m, cols_per_strip)
    row_part = _part(problem, strips, n, totals) if rows else Part()
    col_part = _part(problem, groups, m, totals) if cols or problem.mirrored else Part()
    forward_kernel[(groups, strips)](
        problem.x, problem.y, problem.vectors, problem.span, row_part, col_part,
        n, m, problem.features, rows_per_group, cols_per_strip,
        MEMBERS=problem.members, MIRRORED=problem.mirrored, **problem.options(tiling),
    )  # fmt: skip
    if has_index:
        excluded_kernel[(triton.cdiv(n, EXCLUDED),)](
            problem.x, problem.y, problem.vectors, results["excluded"], n, problem.features,
            BLOCK_M=EXCLUDED, BLOCK_D=128,
        )  # fmt: skip
    if rows:
        mirror = (col_part, groups) if problem.mirrored else (Part(), 0)
        _merge(row_part, strips, *mirror, results["row_max"], results["row_log_sum"])
    if cols:
        _merge(col_part, groups, Part(), 0, results["col_max"], results["col_log_sum"])
    if row_part.total is not None:
        results["row_total"] = row_part.total.sum(0)
    if col_part.total is not None:
        results["col_total"] = col_part.total.sum(0)
    return results


def _part(problem: Problem, parts: int, size: int, totals: bool) -> Part:
    return Part(*(problem.empty(parts, size) for _ in range(3 if totals else 2)))


def _merge(part: Part, parts: int, mirror: Part, mirrors: int, maximum: Tensor, log_sum: Tensor) -> None:
    size = maximum.shape[0]
    merge_kernel[(triton.cdiv(size, MERGE),)](part, parts, mirror, mirrors, maximum, log_sum, size, BLOCK=MERGE)


class Gradients(NamedTuple):
    """None where not needed; y is [1, M, D], or for volumes the moments [P, M, D] of the tuples."""

    x: Tensor | None
    y: Tensor | None
    row_scale: Tensor | None
    col_scale: Tensor | None
    row_bias: Tensor | None
    col_bias: Tensor | None


def backward(problem: Problem, basis: Tensor | None, incoming: Incoming, needs: list[bool]) -> Gradients:
    """Gradients where they are needed. `basis` is y again, or for volumes L^-1 y, whose products give dX."""
    incoming = Incoming(*(None if grad is None else grad.contiguous() for grad in incoming))
    unit = _unit(problem, incoming)
    by_rows = problem.members == 0 and problem.tilings.rows is not None and problem.features <= ROWS_FEATURES
    if by_rows and problem.n > 0 and problem.m > 0:
        return _backward_by_rows(problem, incoming, unit, needs)
    return _backward_by_blocks(problem, basis, incoming, unit, needs)


def weight_of(grad_lse: Tensor, maximum: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the maximum of `Incoming`, of one direction."""
    empty = maximum == -torch.inf
    return (grad_lse * (-log_sum).exp()).masked_fill(empty, 0.0), maximum.masked_fill(empty, torch.inf)


def _unit(problem: Problem, incoming: Incoming) -> Tensor | None:
    """What the coefficients are divided by.

    float16 has no room below 6e-8: the largest that its coefficients can be becomes 2^14.
    """
    if problem.x.dtype != torch.float16:
        return None
    bound = problem.full((), 2.0**-14)
    grads = incoming[:2] + incoming[4:]  # without the maxima
    sizes = [grad.abs().max() for grad in grads if grad is not None and grad.numel()]
    bound = bound * sum(sizes, start=problem.full((), 0.0))
    for scale in (problem.vectors.row_scale, problem.vectors.col_scale):
        if scale is not None and scale.numel():
            bound = bound * scale.abs().max()
    if problem.members:  # q y <= g w |x| / distance, and the distance is not below this share of |x|
        bound = bound / AT_MINIMUM.value**0.5
    return torch.where(bound > 0, bound, 1.0).reshape(1)


def _backward_by_rows(problem: Problem, incoming: Incoming, unit: Tensor | None, needs: list[bool]) -> Gradients:
    need_x, need_y, need_row_scale, need_col_scale, need_row_bias, need_col_bias = needs
    grad_x, row_scale, row_bias = _rows(problem, incoming, unit, (need_x, need_row_scale, need_row_bias))
    swapped = Incoming(*_swapped(incoming))
    grad_y, col_scale, col_bias = _rows(problem.transposed(), swapped, unit, (need_y, need_col_scale, need_col_bias))
    return Gradients(grad_x, None if grad_y is None else grad_y[None], row_scale, col_scale, row_bias, col_bias)


def _swapped(pairs: tuple[Any, ...]) -> list[Any]:
    """(row, col, row, col, ...) with the sides swapped."""
    return [value for row, col in zip(pairs[::2], pairs[1::2], strict=True) for value in (col, row)]


def _rows(
    problem: Problem,
    incoming: Incoming,
    unit: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the features, the scales and the biases of the rows."""
    if not any(needs):
        return None, None, None
    n, m, features = problem.n, problem.m, problem.features
    tiling = problem.tilings.rows._replace(block_d=max(16, triton.next_power_of_2(features)))
    tiles = triton.cdiv(n, tiling.block_m)
    cols_per_strip = _share(m, tiling.block_n, triton.cdiv(_programs(problem.x), tiles))
    strips = triton.cdiv(m, cols_per_strip)
    dtype = problem.x.dtype if strips == 1 else torch.float32
    grad = problem.x.new_empty((strips, n, features), dtype=dtype) if needs[0] else None
    sums = Sums(*(problem.empty(strips, n) if need else None for need in needs[1:]))
    rows_kernel[(tiles, strips)](
        problem.x, problem.y, problem.vectors, incoming, unit, grad, sums,
        n, m, features, cols_per_strip, **problem.options(tiling),
    )  # fmt: skip
    return tuple(None if part is None else part.sum(0) if strips > 1 else part[0] for part in (grad, *sums[:2]))


def _backward_by_blocks(
    problem: Problem,
    basis: Tensor | None,
    incoming: Incoming,
    unit: Tensor | None,
    needs: list[bool],
) -> Gradients:
    n, m, features, members, mirrored = problem.n, problem.m, problem.features, problem.members, problem.mirrored
    tiling = problem.block_tiling
    need_x, need_y, need_row_scale, need_col_scale, need_row_bias, need_col_bias = needs
    matrices = max(members, 1)
    grad_x = problem.full((n, features), 0.0) if need_x else None
    grad_y = problem.full((matrices, m, features), 0.0) if need_y else None
    need_rows = (need_row_scale, need_row_bias, need_x and members > 0)
    need_cols = (need_col_scale, need_col_bias) if not mirrored else need_rows[:2]
    row_grads = [problem.full((n,), 0.0) if need else None for need in need_rows]
    col_grads = row_grads[:2] if mirrored else [problem.full((m,), 0.0) if need else None for need in need_cols]
    side = math.isqrt(WORKSPACE**2 // matrices) // tiling.block_m * tiling.block_m
    size = min(n, side) * _padded(min(m, side)) if need_x or need_y else 0
    workspace = problem.x.new_empty(matrices * size)
    for first_row in range(0, n, side):
        block_rows = min(side, n - first_row)
        row_range = slice(first_row, first_row + block_rows)
        for first_col in range(first_row if mirrored else 0, m, side):
            block_cols = min(side, m - first_col)
            col_range = slice(first_col, first_col + block_cols)
            grid = (triton.cdiv(block_rows, tiling.block_m), triton.cdiv(block_cols, tiling.block_n))
            row_sums = Sums(*(problem.empty(grid[1], block_rows) if need else None for need in need_rows))
            col_sums = Sums(*(problem.empty(grid[0], block_cols) if need else None for need in need_cols))
            stride = _padded(block_cols)
            coefficients = workspace[: matrices * block_rows * stride].view(-1, block_rows, stride)
            block_kernel[grid](
                problem.x, problem.y, problem.vectors, problem.span, incoming, unit,
                coefficients if size else None, row_sums, col_sums,
                n, m, features, first_row, first_col, block_rows, block_cols, stride,
                MEMBERS=members, **problem.options(tiling),
            )  # fmt: skip
            # a block on the diagonal has both sides of its pairs
            mirror = mirrored and first_row != first_col
            coefficients = coefficients[:, :, :block_cols]
            for t in range(matrices if size else 0):
                if grad_x is not None:
                    _accumulate(grad_x[row_range], coefficients[t], basis[col_range, t])
                    if mirror:
                        _accumulate(grad_x[col_range], coefficients[t].T, problem.x[row_range])
                if grad_y is not None:
                    _accumulate(grad_y[t, col_range], coefficients[t].T, problem.x[row_range])
            _add_sums(row_grads, row_range, row_sums)
            if mirror or not mirrored:
                _add_sums(col_grads, col_range, col_sums)
    if unit is not None:
        for grad in (grad_x, grad_y):
            if grad is not None:
                grad.mul_(unit)
    if grad_x is not None and members:
        grad_x = torch.addcmul(grad_x, row_grads[2][:, None], problem.x, value=-1)
    col_scale, col_bias = (None, None) if mirrored else col_grads  # in self-similarity those of the rows have them
    return Gradients(grad_x, grad_y, row_grads[0], col_scale, row_grads[1], col_bias)


def _padded(size: int) -> int:
    return triton.cdiv(size, 16) * 16


def _add_sums(totals: list[Tensor | None], part: slice, sums: Sums) -> None:
    for total, of_block in zip(totals, sums, strict=False):
        if total is not None:
            total[part] += of_block.sum(0)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
