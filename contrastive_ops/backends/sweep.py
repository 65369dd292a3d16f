"""The host side of the GPU engines: which kernel of an engine runs when, on what part of the N x M plane.

    forward: `forward`, one program per (group of rows, strip of columns), gives partials of the statistics, [strips, N]
        and [groups, M]; `merge` joins them in a fixed order; `excluded` looks up the logits left out by index
    forward of rows alone whose other side needs no gradient, where the engine takes the problem: `attention` gives the
        statistics and the gradients of the log-sum-exps, of which backward takes the multiples
    backward by blocks of the plane:
        `block` gives g a b, with g = dL/ds, in a workspace, and partial sums of g for scales and biases
        dX += (g a b) Y and dY += (g a b)^T X: two matrix products of the vendor's library, or `product` of the engine's
        own, which can leave out tiles without a pair of equal ids
    backward by rows, where the engine takes the problem: `rows` gives dX, and with the sides swapped dY

No atomics: the results are bitwise repeatable where the vendor's products are. In self-similarity (no y) forward and
the blocks visit the tiles on and above the diagonal; a tile above it also stands for its mirror image.

An engine is a set of `Kernels`: Triton's in kernels/launch.py, those of CUDA in contrastive_ops/backends/cuda.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from contrastive_ops.backends import tuples as tuple_basis

PROGRAMS = 256  # of a launch, about two for each multiprocessor of an H100, where the device doesn't say
# rows and columns of a block of 16-bit coefficients, 128 MiB; a block of float32 has half of them. On an H200 backward
# of 16384 x 768 takes 2.4 ms so, and 2.8 with blocks of half the side: they stay in L2, but are four times as many
WORKSPACE = 8192
# |x|^2 - |y|^2 is off by about 4 units in the last place of |x|^2: there the distance is 0, at its minimum
AT_MINIMUM = 4 * torch.finfo(torch.float32).eps


class Vectors(NamedTuple):
    """What the options of the op say of every row and every column."""

    row_scale: Tensor | None
    col_scale: Tensor | None
    row_bias: Tensor | None
    col_bias: Tensor | None
    row_exclude: Tensor | None  # the column that a row leaves out, -1 for none
    col_exclude: Tensor | None  # the row that a column leaves out: in self-similarity a pair has two sides
    row_ids: Tensor | None
    col_ids: Tensor | None


class Span(NamedTuple):
    """What distances need beside the vectors."""

    inverse: Tensor | None  # [P (P + 1) / 2, M], the lower triangles of L^-1
    square: Tensor | None  # [N], |x_i|^2


class Incoming(NamedTuple):
    """Gradients of what the op returned, and the maxima that go with those of the log-sum-exps.

    dL/dlse_i e^(s - lse_i) = row_weight_i e^(s - row_max_i) with row_weight_i = dL/dlse_i e^-log_sum_i: the maximum
    stays apart, as at logits of 1e4 the lse has no digits left for a gradient.
    """

    row_weight: Tensor | None = None
    col_weight: Tensor | None = None
    row_max: Tensor | None = None  # inf for an empty set: e^(s - max) = 0
    col_max: Tensor | None = None
    row_excluded: Tensor | None = None
    col_excluded: Tensor | None = None
    row_total: Tensor | None = None
    col_total: Tensor | None = None


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


class Slopes(NamedTuple):
    """Gradients of the log-sum-exps of rows, each over the columns of a strip."""

    x: Tensor  # [strips, N, D], a_i times the mean of b_j y_j under the softmax of row i
    scale: Tensor  # [strips, N], the mean of b_j pair_ij


class Block(NamedTuple):
    """A block of the plane, and the coefficients' rows in the workspace: `stride` elements, a multiple of 16."""

    first_row: int
    first_col: int
    rows: int
    cols: int
    stride: int

    def transposed(self) -> Block:
        return Block(self.first_col, self.first_row, self.cols, self.rows, self.stride)


class Problem:
    """The inputs of a sweep as the kernels take them: contiguous, with the columns of self-similarity filled in."""

    def __init__(
        self, x: Tensor, y: Tensor, vectors: Vectors, span: Span, *, mirrored: bool = False, restrict: bool = False
    ) -> None:
        self.x = x.contiguous()
        self.y = self.x if y is x else y.contiguous()
        self.vectors = Vectors(*(None if vector is None else vector.contiguous() for vector in vectors))
        self.span = span
        self.n, self.m, self.features = x.shape[0], y.shape[0], x.shape[1]
        self.members = y.shape[1] if y.dim() == 3 else 0
        self.mirrored, self.restrict = mirrored, restrict

    @property
    def tf32(self) -> bool:
        """PyTorch's own setting for float32 matrix products: TF32 only where the user allows it."""
        nvidia = self.x.device.type == "cuda" and torch.version.hip is None
        return nvidia and self.x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"

    def transposed(self) -> Problem:
        """Of pairs: x and y change places. Volumes have no such form."""
        swapped = Vectors(*_swapped(self.vectors))
        return Problem(self.y, self.x, swapped, self.span, mirrored=self.mirrored, restrict=self.restrict)

    def full(self, shape: tuple[int, ...], value: float) -> Tensor:
        return self.x.new_full(shape, value, dtype=torch.float32)

    def empty(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)


class Kernels(Protocol):
    """What an engine offers, csrc/cuda/sweep.h in C++; what has a body here may be left out.

    Tilings are the rows and columns of a tile; groups of rows and strips of columns are whole tiles. None instead of a
    tensor: an option that was not given, or a result that is not needed.
    """

    def programs(self, x: Tensor) -> int:
        """Programs of a launch: two waves of the multiprocessors, or one if each holds two."""
        if x.device.type != "cuda":
            return PROGRAMS
        return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count

    def forward_tiling(self, problem: Problem) -> tuple[int, int]:
        """In self-similarity the columns of a tile divide its rows: the diagonal is between tiles of rows."""

    def block_tiling(self, problem: Problem) -> tuple[int, int]: ...

    def rows_tiling(self, problem: Problem) -> tuple[int, int] | None:
        """None where `rows` does not take the problem."""
        return None

    def forward(self, problem: Problem, row: Part, col: Part, rows_per_group: int, cols_per_strip: int) -> None:
        """Partials of the statistics, of rows [strips, N] and of columns [groups, M]."""

    def excluded(self, problem: Problem, logits: Tensor) -> None:
        """The logit of every row with the column that it leaves out; -inf where it leaves out none."""

    def merge(
        self, part: Part, parts: int, mirror: Part, mirrors: int, maximum: Tensor, log_sum: Tensor, lse: Tensor
    ) -> None:
        """Join the partials [parts, size], and those of the mirror [mirrors, size], in their order."""

    def block(
        self,
        problem: Problem,
        incoming: Incoming,
        unit: Tensor | None,
        coefficients: Tensor | None,
        row: Sums,
        col: Sums,
        block: Block,
    ) -> None:
        """Coefficients g a b / unit of a block, [rows, stride] or for volumes [P, rows, stride], and partial sums."""

    def product(
        self, problem: Problem, block: Block, total: Tensor, coefficients: Tensor, y: Tensor, begins: bool
    ) -> None:
        """total += coefficients @ y of the rows of a block, in float32; of its columns with the sides of all swapped.

        Where the total begins with it, there is nothing in it yet. An engine of its own may leave out tiles without a
        pair that counts, whose coefficients `block` need not write.
        """
        _accumulate(total, coefficients, y, begins)

    def product_tiling(self, problem: Problem) -> tuple[int, int] | None:
        """Rows and features of a tile; None where `product` is the vendor's, of all pairs."""
        return None

    def rows(
        self,
        problem: Problem,
        incoming: Incoming,
        unit: Tensor | None,
        gradient: Tensor | None,
        sums: Sums,
        cols_per_strip: int,
    ) -> None:
        """Gradients of all rows by strips of columns, [strips, N, D], in float32 or in the dtype of x."""

    def takes_attention(self, dtype: torch.dtype, features: int) -> bool:
        """Asked of traced tensors, too, whose device need not be there."""
        return False

    def attention_tiling(self, problem: Problem) -> tuple[int, int]:
        raise NotImplementedError

    def attention(self, problem: Problem, unit: Tensor | None, row: Part, slopes: Slopes, cols_per_strip: int) -> None:
        """Of rows, the partials of the statistics [strips, N] and the gradients of each strip's log-sum-exps."""

    def factor(self, tuples: Tensor) -> tuple_basis.Basis:
        return tuple_basis.factor(tuples)

    def rowwise(self, x: Tensor) -> ModuleType | None:
        """Kernels of what is done for every row, see backends/rowwise.py; None for PyTorch's."""
        return None


class Statistics(NamedTuple):
    """What forward returns; empty where not asked for."""

    row_max: Tensor
    col_max: Tensor
    row_log_sum: Tensor
    col_log_sum: Tensor
    excluded: Tensor
    row_total: Tensor
    col_total: Tensor
    row_lse: Tensor
    col_lse: Tensor


def forward(kernels: Kernels, problem: Problem, rows: bool, cols: bool, totals: bool = False) -> Statistics:
    """Statistics of rows and columns, the excluded logits [N] and the totals."""
    n, m = problem.n, problem.m
    has_index = problem.vectors.row_exclude is not None and not problem.members
    row, col = n if rows else 0, m if cols else 0
    sizes = (row, col, row, col, n if has_index else 0, row if totals else 0, col if totals else 0, row, col)
    if n == 0 or m == 0:
        values = [-torch.inf] * 5 + [0.0] * 2 + [-torch.inf] * 2
        return Statistics(*(problem.full((size,), value) for size, value in zip(sizes, values, strict=True)))
    results = Statistics(*(problem.empty(size) for size in sizes))
    block_rows, block_cols = kernels.forward_tiling(problem)
    most_groups, most_strips = groups_and_strips(kernels, problem)
    rows_per_group, cols_per_strip = share(n, block_rows, most_groups), share(m, block_cols, most_strips)
    groups, strips = cdiv(n, rows_per_group), cdiv(m, cols_per_strip)
    row_part = _part(problem, strips, n, totals) if rows else Part()
    col_part = _part(problem, groups, m, totals) if cols or problem.mirrored else Part()
    kernels.forward(problem, row_part, col_part, rows_per_group, cols_per_strip)
    if has_index:
        kernels.excluded(problem, results.excluded)
    if rows:
        mirror = (col_part, groups) if problem.mirrored else (Part(), 0)
        kernels.merge(row_part, strips, *mirror, results.row_max, results.row_log_sum, results.row_lse)
    if cols:
        kernels.merge(col_part, groups, Part(), 0, results.col_max, results.col_log_sum, results.col_lse)
    if row_part.total is not None:
        torch.sum(row_part.total, 0, out=results.row_total)
    if col_part.total is not None:
        torch.sum(col_part.total, 0, out=results.col_total)
    return results


def cdiv(size: int, part: int) -> int:
    return -(-size // part)


def share(size: int, block: int, most: int) -> int:
    """Rows of a part: whole tiles, so that there are at most `most` parts."""
    return cdiv(cdiv(size, block), most) * block


def groups_and_strips(kernels: Kernels, problem: Problem) -> tuple[int, int]:
    """Groups of rows and strips of columns: about sqrt(programs) of each keep partials and traffic small.

    Where a side has fewer tiles than that, the other has more parts.
    """
    programs = kernels.programs(problem.x)
    tiles = [
        cdiv(size, block) for size, block in zip((problem.n, problem.m), kernels.forward_tiling(problem), strict=True)
    ]
    if problem.mirrored:  # those below the diagonal have nothing to do
        groups = (math.isqrt(8 * programs + 1) - 1) // 2
        return groups, groups
    strips = min(math.isqrt(programs), tiles[1])
    groups = min(programs // strips, tiles[0])
    return groups, programs // groups


def _part(problem: Problem, count: int, size: int, totals: bool) -> Part:
    return Part(*(problem.empty(count, size) for _ in range(3 if totals else 2)))


def _attends(kernels: Kernels, x: Tensor, y: Tensor | None, cols: bool, needs: list[bool]) -> bool:
    """Whether forward computes the gradients, too: of pairs, of their rows alone."""
    if y is None or y.dim() != 2 or cols or any(needs[1::2]) or not any(needs):
        return False
    return x.shape[0] > 0 and y.shape[0] > 0 and kernels.takes_attention(x.dtype, x.shape[1])


def kept(kernels: Kernels, op: str, x: Tensor, y: Tensor | None, cols: bool, needs: list[bool], second: bool) -> int:
    """Elements that forward keeps for backward: of every row d lse / dx and d lse / d row_scale."""
    return x.shape[0] * (x.shape[1] + 1) if _attends(kernels, x, y, cols, needs) else 0


def attention(kernels: Kernels, problem: Problem) -> tuple[Statistics, Tensor]:
    """The statistics of rows and the excluded logits, and what is kept."""
    n, m = problem.n, problem.m
    has_index = problem.vectors.row_exclude is not None
    results = Statistics(*(problem.empty(size) for size in (n, 0, n, 0, n if has_index else 0, 0, 0, n, 0)))
    cols_per_strip = _cols_per_strip(kernels, problem, kernels.attention_tiling(problem))
    strips = cdiv(m, cols_per_strip)
    maxima, sums = problem.empty(strips, n), problem.empty(strips, n)
    slopes = Slopes(problem.empty(strips, n, problem.features), problem.empty(strips, n))
    unit = _unit(kernels, problem, Incoming(row_weight=problem.full((1,), 1.0)))
    kernels.attention(problem, unit, Part(maxima, sums), slopes, cols_per_strip)
    kernels.merge(Part(maxima, sums), strips, Part(), 0, results.row_max, results.row_log_sum, results.row_lse)
    if has_index:
        kernels.excluded(problem, results.excluded)
    if strips > 1:  # each has its share in the sum
        share_of_strip = (maxima - results.row_max + sums.log() - results.row_log_sum).exp()
        weight = share_of_strip.masked_fill(torch.isneginf(maxima), 0.0)
        slopes = Slopes(slopes.x.mul_(weight[..., None]).sum(0), slopes.scale.mul_(weight).sum(0))
    return results, torch.cat([slopes.x.flatten(), slopes.scale.flatten()])


def multiples(
    problem: Problem, grad_lse: Tensor, grad_excluded: Tensor, maximum: Tensor, kept: Tensor, needs: list[bool]
) -> Gradients:
    """The gradients of rows from what was kept, and for the logits left out by index from themselves."""
    n, features, vectors = problem.n, problem.features, problem.vectors
    slope, slope_of_scale = kept[: n * features].view(n, features), kept[n * features :]
    need_x, _, need_scale, _, need_bias, _ = needs
    grad_lse = grad_lse.masked_fill(maximum == -torch.inf, 0.0)  # an empty row's may be infinite
    grad_x = grad_lse[:, None] * slope if need_x else None
    grad_scale = grad_lse * slope_of_scale if need_scale else None
    grad_bias = grad_lse.clone() if need_bias else None
    if vectors.row_exclude is not None:
        named, index = vectors.row_exclude >= 0, vectors.row_exclude.clamp(min=0)
        own = grad_excluded.masked_fill(~named, 0.0)
        if grad_bias is not None:
            grad_bias += own
        if vectors.col_scale is not None:
            own = own * vectors.col_scale[index]
        y = problem.y[index].float().masked_fill_(~named[:, None], 0.0)
        if grad_scale is not None:
            grad_scale += own * (problem.x * y).sum(1)
        if grad_x is not None:
            weight = own if vectors.row_scale is None else own * vectors.row_scale
            grad_x.addcmul_(weight[:, None], y)
    return Gradients(grad_x, None, grad_scale, None, grad_bias, None)


class Gradients(NamedTuple):
    """None where not needed; y is [1, M, D], or for volumes the moments [P, M, D] of the tuples."""

    x: Tensor | None
    y: Tensor | None
    row_scale: Tensor | None
    col_scale: Tensor | None
    row_bias: Tensor | None
    col_bias: Tensor | None


class Total:
    """A sum over blocks, each part of which begins with its first term: filling it with zeros would be a launch."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.begun: set[int] = set()

    def begins(self, part: slice) -> bool:
        """Whether nothing is in a part yet; what asks then writes it."""
        begins = part.start not in self.begun
        self.begun.add(part.start)
        return begins


def backward(
    kernels: Kernels, problem: Problem, basis: Tensor | None, incoming: Incoming, needs: list[bool]
) -> Gradients:
    """Gradients where they are needed. `basis` is y again, or for volumes L^-1 y, whose products give dX."""
    incoming = Incoming(*(None if grad is None else grad.contiguous() for grad in incoming))
    unit = _unit(kernels, problem, incoming)
    if kernels.rows_tiling(problem) is not None and problem.n > 0 and problem.m > 0:
        return _backward_by_rows(kernels, problem, incoming, unit, needs)
    return _backward_by_blocks(kernels, problem, basis, incoming, unit, needs)


def _unit(kernels: Kernels, problem: Problem, incoming: Incoming) -> Tensor | None:
    """What the coefficients are divided by.

    float16 has no room below 6e-8: the largest that its coefficients can be becomes 2^14.
    """
    if problem.x.dtype != torch.float16:
        return None
    grads = [grad for grad in incoming[:2] + incoming[4:] if grad is not None and grad.numel()]  # without the maxima
    scales = [scale for scale in problem.vectors[:2] if scale is not None and scale.numel()]
    # q y <= g w |x| / distance, and the distance is not below this share of |x|
    factor = 2.0**-14 / (AT_MINIMUM**0.5 if problem.members else 1.0)
    rowwise = kernels.rowwise(problem.x)
    if rowwise is not None and grads:
        return rowwise.bound(grads, scales, factor)
    bound = factor * sum((grad.abs().max() for grad in grads), start=problem.full((), 0.0))
    for scale in scales:
        bound = bound * scale.abs().max()
    return torch.where(bound >= torch.finfo(torch.float32).tiny, bound, 1.0).reshape(1)  # its reciprocal is finite


def _swapped(pairs: tuple[Any, ...]) -> list[Any]:
    """(row, col, row, col, ...) with the sides swapped."""
    return [value for row, col in zip(pairs[::2], pairs[1::2], strict=True) for value in (col, row)]


def _backward_by_rows(
    kernels: Kernels, problem: Problem, incoming: Incoming, unit: Tensor | None, needs: list[bool]
) -> Gradients:
    grad_x, row_scale, row_bias = _rows(kernels, problem, incoming, unit, needs[::2])
    swapped = Incoming(*_swapped(incoming))
    grad_y, col_scale, col_bias = _rows(kernels, problem.transposed(), swapped, unit, needs[1::2])
    return Gradients(grad_x, None if grad_y is None else grad_y[None], row_scale, col_scale, row_bias, col_bias)


def _rows(
    kernels: Kernels, problem: Problem, incoming: Incoming, unit: Tensor | None, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the features, the scales and the biases of the rows."""
    tiling = kernels.rows_tiling(problem)
    if not any(needs) or tiling is None:
        return None, None, None
    n, m = problem.n, problem.m
    cols_per_strip = _cols_per_strip(kernels, problem, tiling)
    strips = cdiv(m, cols_per_strip)
    dtype = problem.x.dtype if strips == 1 else torch.float32
    gradient = problem.x.new_empty((strips, n, problem.features), dtype=dtype) if needs[0] else None
    sums = Sums(*(problem.empty(strips, n) if need else None for need in needs[1:]))
    kernels.rows(problem, incoming, unit, gradient, sums, cols_per_strip)
    return tuple(None if part is None else part.sum(0) if strips > 1 else part[0] for part in (gradient, *sums[:2]))


def _cols_per_strip(kernels: Kernels, problem: Problem, tiling: tuple[int, int]) -> int:
    """Of programs that have one tile of rows each: as few strips as fill the device."""
    block_rows, block_cols = tiling
    return share(problem.m, block_cols, cdiv(kernels.programs(problem.x), cdiv(problem.n, block_rows)))


def _backward_by_blocks(
    kernels: Kernels,
    problem: Problem,
    basis: Tensor | None,
    incoming: Incoming,
    unit: Tensor | None,
    needs: list[bool],
) -> Gradients:
    n, m, features, members, mirrored = problem.n, problem.m, problem.features, problem.members, problem.mirrored
    block_rows, block_cols = kernels.block_tiling(problem)
    need_x, need_y, need_row_scale, need_col_scale, need_row_bias, need_col_bias = needs
    matrices = max(members, 1)
    grad_x = problem.empty(n, features) if need_x else None
    grad_y = problem.empty(matrices, m, features) if need_y else None
    total_x = None if grad_x is None else Total(grad_x)
    totals_y = [] if grad_y is None else [Total(of_member) for of_member in grad_y]
    need_rows = (need_row_scale, need_row_bias, need_x and members > 0)
    need_cols = (need_col_scale, need_col_bias) if not mirrored else need_rows[:2]
    row_grads = [Total(problem.empty(n)) if need else None for need in need_rows]
    col_grads = row_grads[:2] if mirrored else [Total(problem.empty(m)) if need else None for need in need_cols]
    if n == 0 or m == 0:  # no block writes them
        for total in (total_x, *totals_y, *row_grads, *col_grads):
            if total is not None:
                total.value.zero_()
    side = math.isqrt((WORKSPACE * 2 // problem.x.element_size()) ** 2 // matrices)
    side = max(side // block_rows, 1) * block_rows
    size = min(n, side) * padded(min(m, side)) if need_x or need_y else 0
    workspace = problem.x.new_empty(matrices * size)
    swapped = problem if members else problem.transposed()  # asked for ids, which volumes have none of
    for first_row in range(0, n, side):
        rows = slice(first_row, min(first_row + side, n))
        for first_col in range(first_row if mirrored else 0, m, side):
            cols = slice(first_col, min(first_col + side, m))
            height, width = rows.stop - rows.start, cols.stop - cols.start
            block = Block(first_row, first_col, height, width, padded(width))
            tiles_of_rows, tiles_of_cols = cdiv(height, block_rows), cdiv(width, block_cols)
            row_sums = Sums(*(problem.empty(tiles_of_cols, height) if need else None for need in need_rows))
            col_sums = Sums(*(problem.empty(tiles_of_rows, width) if need else None for need in need_cols))
            coefficients = None
            if size:
                coefficients = workspace[: matrices * height * block.stride].view(matrices, height, block.stride)
            kernels.block(problem, incoming, unit, coefficients, row_sums, col_sums, block)
            # a block on the diagonal has both sides of its pairs
            mirror = mirrored and first_row != first_col
            for t, of_member in enumerate(() if coefficients is None else coefficients[:, :, :width]):
                if total_x is not None and basis is not None:
                    _product(kernels, problem, block, total_x, rows, of_member, basis[cols, t])
                    if mirror:
                        _product(kernels, swapped, block.transposed(), total_x, cols, of_member.T, problem.x[rows])
                if totals_y:
                    _product(kernels, swapped, block.transposed(), totals_y[t], cols, of_member.T, problem.x[rows])
            _add_sums(row_grads, rows, row_sums)
            if mirror or not mirrored:
                _add_sums(col_grads, cols, col_sums)
    if unit is not None:
        for grad in (grad_x, grad_y):
            if grad is not None:
                grad.mul_(unit)
    row_scale, row_bias, along = (None if total is None else total.value for total in row_grads)
    if grad_x is not None and along is not None:
        grad_x = torch.addcmul(grad_x, along[:, None], problem.x, value=-1)
    col_scale, col_bias = (None if total is None or mirrored else total.value for total in col_grads)
    return Gradients(grad_x, grad_y, row_scale, col_scale, row_bias, col_bias)


def padded(size: int) -> int:
    return cdiv(size, 16) * 16


def _product(
    kernels: Kernels, problem: Problem, block: Block, total: Total, part: slice, coefficients: Tensor, y: Tensor
) -> None:
    kernels.product(problem, block, total.value[part], coefficients, y, total.begins(part))


def _add_sums(totals: Sequence[Total | None], part: slice, sums: Sums) -> None:
    for total, of_block in zip(totals, sums, strict=False):
        if total is None or of_block is None:
            continue
        if total.begins(part):
            torch.sum(of_block, 0, out=total.value[part])
        else:
            total.value[part] += of_block.sum(0)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, begins: bool) -> None:
    """total += a @ b, in float32."""
    beta = 0.0 if begins else 1.0  # with 0 what is there is not read
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=beta)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=beta)


@contextmanager
def launching(x: Tensor) -> Iterator[None]:
    """Launches are on the current device, which need not be that of the tensors; autocast would round operands."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) and (kind != "cuda" or x.device.index == torch.cuda.current_device()):
        yield  # as it is nearly always: the contexts below take longer than a launch
        return
    with torch.autocast(kind, enabled=False), torch.cuda.device_of(x):
        yield


Side = tuple[Tensor, Tensor, Tensor]  # of a direction dL/dlse, max and log_sum


def _incoming(
    kernels: Kernels, x: Tensor, row: Side | None, col: Side | None, exclude: Tensor | None, size: int
) -> tuple[Incoming, Tensor | None]:
    """What backward reads of each direction; and the columns that rows leave out, see `_index_below`."""
    rowwise = kernels.rowwise(x)
    if rowwise is not None:
        *vectors, index = rowwise.incoming(row, col, exclude, size)
        return Incoming(*vectors), index
    (row_weight, row_max), (col_weight, col_max) = _weight_and_maximum(row), _weight_and_maximum(col)
    return Incoming(row_weight, col_weight, row_max, col_max), _index_below(kernels, x, size, exclude)


def _weight_and_maximum(side: Side | None) -> tuple[Tensor | None, Tensor | None]:
    if side is None:
        return None, None
    grad, maximum, log_sum = side
    empty = maximum == -torch.inf
    return (grad * (-log_sum).exp()).masked_fill(empty, 0.0), maximum.masked_fill(empty, torch.inf)


def _index_below(kernels: Kernels, x: Tensor, size: int, index: Tensor | None) -> Tensor | None:
    """int32, half the registers of int64; what is not below size names none, and is -1."""
    if index is None:
        return None
    rowwise = kernels.rowwise(x)
    if rowwise is not None:
        return rowwise.incoming(None, None, index, size)[-1]
    return index.where((index >= 0) & (index < size), -1).to(torch.int32)


def _ranks(row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The ids by their order among all, as int32: equal where they are, and half the registers.

    Those of 32 bits stay as they are.
    """
    if row_ids.dtype == col_ids.dtype == torch.int32:
        return row_ids, col_ids
    ids = torch.cat([row_ids, col_ids])
    ordered, order = ids.sort()
    rank = torch.zeros_like(ids, dtype=torch.int32)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    rank = torch.empty_like(rank).scatter_(0, order, rank)
    return rank[: row_ids.shape[0]], rank[row_ids.shape[0] :]


def _pairs(
    x: Tensor,
    y: Tensor | None,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    index: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    restrict: bool,
) -> Problem:
    mirrored = y is None
    if y is None:
        y, col_scale, col_bias, col_ids = x, row_scale, row_bias, row_ids
    if row_ids is not None and col_ids is not None:
        row_ids, col_ids = _ranks(row_ids, row_ids if mirrored else col_ids)
    vectors = Vectors(row_scale, col_scale, row_bias, col_bias, index, index if mirrored else None, row_ids, col_ids)
    return Problem(x, y, vectors, Span(None, None), mirrored=mirrored, restrict=restrict)


def similarity_logsumexp_forward(kernels: Kernels, *arguments: Any) -> tuple[Tensor, ...]:
    (
        x,
        y,
        row_scale,
        col_scale,
        row_bias,
        col_bias,
        exclude,
        row_ids,
        col_ids,
        *guide,
        restrict,
        _,
        rows,
        cols,
        needs,
    ) = arguments
    if any(value is not None for value in guide):
        raise RuntimeError('the engines of GPUs have no guide yet; pass backend="tiled".')
    with launching(x):
        index = _index_below(kernels, x, len(x if y is None else y), exclude)
        problem = _pairs(x, y, row_scale, col_scale, row_bias, col_bias, index, row_ids, col_ids, restrict)
        if _attends(kernels, x, y, cols, needs):
            results, kept = attention(kernels, problem)
        else:
            results, kept = forward(kernels, problem, rows, cols), problem.empty(0)
    return (*results[:4], kept, results.excluded, results.row_lse, results.col_lse)


def similarity_logsumexp_backward(
    kernels: Kernels,
    grad_row_lse: Tensor,
    grad_col_lse: Tensor,
    grad_excluded: Tensor,
    row_max: Tensor,
    col_max: Tensor,
    row_log_sum: Tensor,
    col_log_sum: Tensor,
    kept: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    (
        x,
        y,
        row_scale,
        col_scale,
        row_bias,
        col_bias,
        exclude,
        row_ids,
        col_ids,
        *guide,
        restrict,
        _,
        rows,
        cols,
        needs,
    ) = arguments
    if any(value is not None for value in guide):
        raise RuntimeError('the engines of GPUs have no guide yet; pass backend="tiled".')
    attended = kept.numel() > 0 and not any(needs[1::2])
    with launching(x):
        of_rows = (grad_row_lse, row_max, row_log_sum) if rows and not attended else None
        of_cols = (grad_col_lse, col_max, col_log_sum) if cols and not attended else None
        incoming, index = _incoming(kernels, x, of_rows, of_cols, exclude, len(x if y is None else y))
        problem = _pairs(x, y, row_scale, col_scale, row_bias, col_bias, index, row_ids, col_ids, restrict)
        if attended:
            grads = multiples(problem, grad_row_lse, grad_excluded, row_max, kept, needs)
        else:
            if index is not None:
                incoming = incoming._replace(row_excluded=grad_excluded)
            if problem.mirrored:
                incoming = incoming._replace(
                    col_weight=incoming.row_weight, col_max=incoming.row_max, col_excluded=incoming.row_excluded
                )
            grads = backward(kernels, problem, problem.y[:, None], incoming, needs)
    features = problem.x.new_empty(0)
    return (
        features if grads.x is None else grads.x.to(features.dtype),
        features.clone() if grads.y is None else grads.y[0].to(features.dtype),
        *(problem.empty(0) if grad is None else grad for grad in grads[2:]),
    )


def _volumes(
    kernels: Kernels,
    anchor: Tensor,
    tuples: Tensor,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    index: Tensor | None,
    orthonormal: bool = False,
) -> tuple[Problem, tuple_basis.Basis, Tensor | None]:
    """The problem, and the tuples factored, where it is wanted with Q."""
    anchor, tuples = anchor.contiguous(), tuples.contiguous()
    rowwise = kernels.rowwise(anchor)
    if rowwise is not None:
        *factored, triangles, weight, square, q = rowwise.span(anchor, tuples, col_scale, orthonormal)
        basis = tuple_basis.Basis(*factored)
    else:
        basis = kernels.factor(tuples)
        triangles, square = tuple_basis.triangles(basis, anchor), tuple_basis.squares(anchor)
        weight = tuple_basis.column_weight(basis, col_scale, anchor)
        q = tuple_basis.orthonormal(tuples, basis) if orthonormal else None
    vectors = Vectors(row_scale, weight, None, None, index, None, None, None)
    return Problem(anchor, tuples, vectors, Span(triangles, square)), basis, q


def volume_logsumexp_forward(kernels: Kernels, anchor: Tensor, tuples: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    row_scale, col_scale, exclude, rows, cols, totals, _needs = arguments
    with launching(anchor):
        index = _index_below(kernels, anchor, len(tuples), exclude)
        problem, _, _ = _volumes(kernels, anchor, tuples, row_scale, col_scale, index)
        results = forward(kernels, problem, rows, cols, totals)
    return (*results[:4], problem.empty(0), *results[5:])


def volume_logsumexp_backward(
    kernels: Kernels,
    grad_row_lse: Tensor,
    grad_col_lse: Tensor,
    grad_row_total: Tensor,
    grad_col_total: Tensor,
    row_max: Tensor,
    col_max: Tensor,
    row_log_sum: Tensor,
    col_log_sum: Tensor,
    _kept: Tensor,
    anchor: Tensor,
    tuples: Tensor,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    exclude: Tensor | None,
    rows: bool,
    cols: bool,
    totals: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    with launching(anchor):
        of_rows = (grad_row_lse, row_max, row_log_sum) if rows else None
        of_cols = (grad_col_lse, col_max, col_log_sum) if cols else None
        incoming, index = _incoming(kernels, anchor, of_rows, of_cols, exclude, len(tuples))
        incoming = incoming._replace(
            row_total=grad_row_total if rows and totals else None, col_total=grad_col_total if cols and totals else None
        )
        problem, basis, q = _volumes(kernels, anchor, tuples, row_scale, col_scale, index, orthonormal=needs[0])
        needed = [*tuple_basis.needs_of_sweep(needs), False, False]
        grads = backward(kernels, problem, q, incoming, needed)
        rowwise, of_tuples = kernels.rowwise(anchor), tuple_basis.tuple_gradient
        if rowwise is not None:

            def of_tuples(tuples: Tensor, basis: tuple_basis.Basis, moments: Tensor, grad_volume: Tensor) -> Tensor:
                return rowwise.tuple_gradient(tuples, *basis, moments.transpose(0, 1), grad_volume)

        empty = problem.empty(0)
        sweep_grads = (
            anchor.new_empty(0) if grads.x is None else grads.x.to(anchor.dtype),
            empty if grads.y is None else grads.y.transpose(0, 1),
            empty if grads.row_scale is None else grads.row_scale,
            empty if grads.col_scale is None else grads.col_scale,
        )
        return tuple_basis.gradients(tuples, basis, col_scale, sweep_grads, needs, of_tuples)
