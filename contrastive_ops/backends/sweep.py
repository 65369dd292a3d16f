"""The host side of the GPU engines: which kernel of an engine runs when, on what part of the N x M plane.

    forward: `forward`, one program per (group of rows, strip of columns), gives partials of the statistics, [strips, N]
        and [groups, M]; `merge` joins them in a fixed order, PyTorch those of sums, in float64; `excluded` looks up the
        logits left out by index
    forward of rows alone whose other side needs no gradient, where the engine takes the problem: `attention` gives the
        statistics and the gradients of the log-sum-exps, of which backward takes the multiples
    backward by blocks of the plane:
        `block` gives g a b, with g = dL/ds, in a workspace, and partial sums of g for scales and biases; likewise of
        the logits of a teacher, if it needs gradients
        dX += (g a b) Y and dY += (g a b)^T X: two matrix products of the vendor's library, or `product` of the engine's
        own, which can leave out tiles without a pair of equal ids
    backward by rows, where the engine takes the problem: `rows` gives dX, and with the sides swapped dY
    the best k: `topk` gives candidates of every row and strip, which PyTorch sorts

No atomics: the results are bitwise repeatable where the vendor's products are. In self-similarity (no y) forward and
the blocks visit the tiles on and above the diagonal; a tile above it also stands for its mirror image.

An engine is a set of `Kernels`, see contrastive_ops/plane.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_ops import noise as pair_noise
from contrastive_ops.backends import tuples as tuple_basis
from contrastive_ops.plane import (
    AT_MINIMUM,
    LAST_COLUMN,
    MOST_CANDIDATES,
    NO_KEY,
    NO_SECOND,
    SUMS,
    Best,
    Block,
    Incoming,
    Kernels,
    Part,
    Problem,
    Second,
    Slopes,
    Span,
    Sums,
    Vectors,
    cdiv,
    fields_of_part,
    swapped,
)

# rows and columns of a block of 16-bit coefficients, 128 MiB; a block of float32 has half of them. On an H200 backward
# of 16384 x 768 takes 2.4 ms so, and 2.8 with blocks of half the side: they stay in L2, but are four times as many
WORKSPACE = 8192


class Reduced(NamedTuple):
    """What forward returns of a direction; empty where the reduction has none, or the direction is not asked for."""

    maximum: Tensor
    log_sum: Tensor
    lse: Tensor
    total: Tensor
    sum: Tensor
    teacher_maximum: Tensor
    teacher_log_sum: Tensor
    mean: Tensor


class Statistics(NamedTuple):
    """What forward returns."""

    row: Reduced
    col: Reduced
    excluded: Tensor  # the logits left out by index, [N], or empty

    def both(self, *fields: str) -> tuple[Tensor, ...]:
        """The fields of rows and columns in turn."""
        return tuple(getattr(direction, field) for field in fields for direction in (self.row, self.col))


# of an empty set
_NOTHING = Reduced._make((-torch.inf, -torch.inf, -torch.inf, 0.0, 0.0, -torch.inf, -torch.inf, 0.0))._asdict()


def _reduced(problem: Problem, size: int, totals: bool = False) -> Reduced:
    """Of an empty set what it has; else memory that the kernels write."""
    fields = {"sum"} if problem.reduction in SUMS else {"maximum", "log_sum", "lse"}
    fields |= {"total"} if totals else set()
    fields |= {"mean"} if problem.reduction == "expectation" else set()
    fields |= {"teacher_maximum", "teacher_log_sum"} if problem.teaches else set()
    empty = problem.n == 0 or problem.m == 0
    return Reduced(
        **{
            field: problem.full((size,), value)
            if empty and field in fields
            else problem.empty(size * (field in fields))
            for field, value in _NOTHING.items()
        }
    )


def forward(kernels: Kernels, problem: Problem, rows: bool, cols: bool, totals: bool = False) -> Statistics:
    """Statistics of rows and columns, and the excluded logits."""
    n, m = problem.n, problem.m
    row, col = _reduced(problem, n if rows else 0, totals), _reduced(problem, m if cols else 0, totals)
    if n == 0 or m == 0:
        return Statistics(row, col, _excluded(kernels, problem))
    block_rows, block_cols = kernels.forward_tiling(problem)
    most_groups, most_strips = groups_and_strips(kernels, problem)
    rows_per_group, cols_per_strip = share(n, block_rows, most_groups), share(m, block_cols, most_strips)
    groups, strips = cdiv(n, rows_per_group), cdiv(m, cols_per_strip)
    row_part = _part(problem, strips, n, totals) if rows else Part()
    col_part = _part(problem, groups, m, totals) if cols or problem.mirrored else Part()
    kernels.forward(problem, row_part, col_part, rows_per_group, cols_per_strip)
    if rows:
        mirror = (col_part, groups) if problem.mirrored else (Part(), 0)
        row = _joined(kernels, problem, row, row_part, strips, *mirror)
    if cols:
        col = _joined(kernels, problem, col, col_part, groups, Part(), 0)
    return Statistics(row, col, _excluded(kernels, problem))


def _excluded(kernels: Kernels, problem: Problem) -> Tensor:
    if problem.vectors.row_exclude is None or problem.members or problem.reduction == "expectation":
        return problem.empty(0)
    if problem.n == 0 or problem.m == 0:
        return problem.full((problem.n,), -torch.inf)
    logits = problem.empty(problem.n)
    kernels.excluded(problem, logits)
    return logits


def _joined(
    kernels: Kernels, problem: Problem, reduced: Reduced, part: Part, parts: int, mirror: Part, mirrors: int
) -> Reduced:
    """The partials of a direction joined, with those of its mirror image."""
    assert part.sum is not None
    if problem.reduction in SUMS:  # float64 until here
        total = part.sum.sum(0) if mirror.sum is None else part.sum.sum(0).add_(mirror.sum.sum(0))
        return reduced._replace(sum=total.float())
    own = [Part(p.maximum, p.sum, moment=None if problem.teaches else p.moment) for p in (part, mirror)]
    mean = None if own[0].moment is None else reduced.mean
    kernels.merge(own[0], parts, own[1], mirrors, reduced.maximum, reduced.log_sum, reduced.lse, mean)
    if problem.teaches:
        teachers = [Part(p.teacher_maximum, p.teacher_sum, moment=p.moment) for p in (part, mirror)]
        statistics = reduced.teacher_maximum, reduced.teacher_log_sum
        kernels.merge(teachers[0], parts, teachers[1], mirrors, *statistics, None, reduced.mean)
    if part.total is not None:
        torch.sum(part.total, 0, out=reduced.total)
    return reduced


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


def _part(problem: Problem, count: int, size: int, totals: bool = False) -> Part:
    dtype = torch.float64 if problem.reduction in SUMS else torch.float32
    fields = fields_of_part(problem, totals)
    return Part(**{field: problem.x.new_empty((count, size), dtype=dtype) for field in fields})


def _attends(
    kernels: Kernels, op: str, x: Tensor, y: Tensor | None, cols: bool, needs: list[bool], second: bool
) -> bool:
    """Whether forward computes the gradients, too: of pairs, of their rows alone, where there is no second form."""
    if y is None or y.dim() != 2 or second or cols or any(needs[1::2]) or not any(needs):
        return False
    return x.shape[0] > 0 and y.shape[0] > 0 and kernels.takes_attention(op, x.dtype, x.shape[1])


def kept(
    kernels: Kernels, op: str, x: Tensor, y: Tensor | None, cols: bool, needs: list[bool], second: bool = False
) -> int:
    """Elements that forward keeps for backward: of every row the slopes."""
    of_row = x.shape[1] + (2 if op == "similarity_sum" else 1)
    return x.shape[0] * of_row if _attends(kernels, op, x, y, cols, needs, second) else 0


def attention(kernels: Kernels, problem: Problem) -> tuple[Statistics, Tensor]:
    """The statistics of rows and the excluded logits, and what is kept."""
    n, m = problem.n, problem.m
    cols_per_strip = _cols_per_strip(kernels, problem, kernels.attention_tiling(problem))
    strips = cdiv(m, cols_per_strip)
    part, sums = _part(problem, strips, n), problem.reduction in SUMS
    slopes = Slopes(
        problem.empty(strips, n, problem.features),
        problem.empty(strips, n),
        problem.empty(strips, n) if sums else None,
    )
    unit = _unit(kernels, problem, Incoming(row_weight=problem.full((1,), 1.0)))
    kernels.attention(problem, unit, part, slopes, cols_per_strip)
    row = _joined(kernels, problem, _reduced(problem, n), part, strips, Part(), 0)
    if strips > 1:
        given = [slope for slope in slopes if slope is not None]
        if part.maximum is not None and part.sum is not None:  # each has its share in the sum
            share_of_strip = (part.maximum - row.maximum + part.sum.log() - row.log_sum).exp()
            weight = share_of_strip.masked_fill(torch.isneginf(part.maximum), 0.0)
            slopes.x.mul_(weight[..., None])
            slopes.scale.mul_(weight)
        slopes = Slopes(*(slope.sum(0) for slope in given))
    statistics = Statistics(row, _reduced(problem, 0), _excluded(kernels, problem))
    return statistics, torch.cat([slope.flatten() for slope in slopes if slope is not None])


def multiples(
    problem: Problem, grad: Tensor, grad_excluded: Tensor, maximum: Tensor | None, kept: Tensor, needs: list[bool]
) -> Gradients:
    """The gradients of rows from what was kept, and for the logits left out by index from themselves."""
    n, features, vectors = problem.n, problem.features, problem.vectors
    slope, *of_vectors = kept.split([n * features, *[n] * (kept.shape[0] // n - features)])
    need_x, _, need_scale, _, need_bias, _ = needs
    if maximum is not None:
        grad = grad.masked_fill(maximum == -torch.inf, 0.0)  # an empty row's may be infinite
    grad_x = grad[:, None] * slope.view(n, features) if need_x else None
    grad_scale = grad * of_vectors[0] if need_scale else None
    grad_bias = (grad * of_vectors[1] if len(of_vectors) > 1 else grad.clone()) if need_bias else None
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
    u: Tensor | None = None
    v: Tensor | None = None
    teacher_row_scale: Tensor | None = None
    teacher_col_scale: Tensor | None = None
    teacher_row_bias: Tensor | None = None
    teacher_col_bias: Tensor | None = None


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


class Plane(NamedTuple):
    """Features, and the totals of their gradients, that go with a matrix C of coefficients: C y and C^T x."""

    x: Tensor
    y: Tensor | None
    of_rows: Total | None
    of_cols: Total | None


def backward(
    kernels: Kernels, problem: Problem, basis: Tensor | None, incoming: Incoming, needs: list[bool]
) -> Gradients:
    """Gradients where they are needed. `basis` is y again, [M, 1, D], or of volumes L^-1 y, whose products give dX."""
    incoming = Incoming(*(None if grad is None else grad.contiguous() for grad in incoming))
    unit = _unit(kernels, problem, incoming)
    if kernels.rows_tiling(problem) is not None and problem.n > 0 and problem.m > 0:
        return _backward_by_rows(kernels, problem, incoming, unit, needs)
    return _backward_by_blocks(kernels, problem, basis, incoming, unit, needs)


def _unit(kernels: Kernels, problem: Problem, incoming: Incoming) -> Tensor | None:
    """What the coefficients are divided by, of each plane of them.

    float16 has no room below 6e-8: the largest that its coefficients can be becomes 2^14.
    """
    if problem.x.dtype != torch.float16:
        return None
    weights = [grad for grad in incoming[:2] if grad is not None and grad.numel()]
    shares = [grad for grad in (incoming.row_share, incoming.col_share) if grad is not None and grad.numel()]
    others = [grad for grad in incoming[4:8] if grad is not None and grad.numel()]
    spreads: list[Tensor] = []
    if shares or problem.reduction == "square":  # the derivative of s^2, and what a logit is from the mean
        spread = 2.0 * _largest_logit(problem)
        spreads = [grad.abs().max().reshape(1) * spread for grad in shares or weights]
        if problem.reduction == "square":
            weights = spreads
        elif not problem.teaches:
            weights += spreads
    # q y <= g w |x| / distance, and the distance is not below this share of |x|
    factor = 2.0**-14 / (AT_MINIMUM**0.5 if problem.members else 1.0)
    unit = _bound(kernels, problem, weights + shares + others, problem.vectors[:2], factor)
    if not problem.teaches:
        return unit
    return torch.cat([unit, _bound(kernels, problem, spreads, problem.second[2:4], 2.0**-14)])


def _bound(
    kernels: Kernels, problem: Problem, grads: Sequence[Tensor], scales: Sequence[Tensor | None], factor: float
) -> Tensor:
    """factor * (sum of max |grad|) * product of max |scale|, or 1 where its reciprocal is not finite."""
    given = [scale for scale in scales if scale is not None and scale.numel()]
    rowwise = kernels.rowwise(problem.x)
    if rowwise is not None and grads:
        return rowwise.bound(grads, given, factor)
    bound = factor * sum((grad.abs().max() for grad in grads), start=problem.full((), 0.0))
    for scale in given:
        bound = bound * scale.abs().max()
    return torch.where(bound >= torch.finfo(torch.float32).tiny, bound, 1.0).reshape(1)


def _largest_logit(problem: Problem) -> Tensor:
    """At least as large as any |s| that is finite, [1]."""
    largest = problem.full((1,), 1.0)
    for x in (problem.x, problem.y):
        largest *= torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).max()
    for scale in problem.vectors[:2]:
        if scale is not None:
            largest *= scale.abs().max()
    for bias in problem.vectors[2:4]:
        if bias is not None:
            largest += bias.masked_fill(bias.isinf(), 0.0).abs().max()
    return largest


def _backward_by_rows(
    kernels: Kernels, problem: Problem, incoming: Incoming, unit: Tensor | None, needs: list[bool]
) -> Gradients:
    grad_x, row_scale, row_bias = _rows(kernels, problem, incoming, unit, needs[::2])
    of_cols = Incoming(*swapped(incoming))
    grad_y, col_scale, col_bias = _rows(kernels, problem.transposed(), of_cols, unit, needs[1::2])
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
    sums = Sums(*(problem.empty(strips, n) if need else None for need in needs[1:3]))
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
    n, m, members, mirrored, second = problem.n, problem.m, problem.members, problem.mirrored, problem.second
    block_rows, block_cols = kernels.block_tiling(problem)
    needs = [*needs, *[False] * (12 - len(needs))]
    need_x, need_y, need_u, need_v = *needs[:2], *needs[6:8]

    def total(need: bool, *shape: int) -> Total | None:
        return Total(problem.empty(*shape)) if need else None

    total_x = total(need_x, n, problem.features)
    total_u, total_v = (total(need, size, problem.second_features) for need, size in ((need_u, n), (need_v, m)))
    grad_y = problem.empty(max(members, 1), m, problem.features) if need_y else None
    planes = [
        Plane(
            problem.x,
            None if basis is None else basis[:, t],
            total_x,
            None if grad_y is None else Total(grad_y[t]),
        )
        for t in range(max(members, 1))
    ]
    if second.u is not None and (need_u or need_v):
        planes.append(Plane(second.u, second.v, total_u, total_v))
    need_rows = (needs[2], needs[4], need_x and members > 0, needs[8], needs[10])  # the fields of Sums
    need_cols = need_rows if mirrored else (needs[3], needs[5], False, needs[9], needs[11])
    row_totals = [total(need, n) for need in need_rows]
    col_totals = row_totals if mirrored else [total(need, m) for need in need_cols]
    if n == 0 or m == 0:  # no block writes them
        for plane in planes:
            for of_plane in (plane.of_rows, plane.of_cols):
                if of_plane is not None:
                    of_plane.value.zero_()
        for of_vector in (*row_totals, *col_totals):
            if of_vector is not None:
                of_vector.value.zero_()
    side = math.isqrt((WORKSPACE * 2 // problem.x.element_size()) ** 2 // len(planes))
    side = max(side // block_rows, 1) * block_rows
    size = min(n, side) * padded(min(m, side)) if need_x or need_y or need_u or need_v else 0
    workspace = problem.x.new_empty(len(planes) * size)
    of_cols = problem if members else problem.transposed()  # asked for ids, which volumes have none of
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
                whole = workspace[: len(planes) * height * block.stride]
                coefficients = whole.view(len(planes), height, block.stride)
            kernels.block(problem, incoming, unit, coefficients, row_sums, col_sums, block)
            # a block on the diagonal has both sides of its pairs
            mirror = mirrored and first_row != first_col
            for plane, of_plane in zip(planes, () if coefficients is None else coefficients, strict=False):
                given = of_plane[:, :width]
                if plane.of_rows is not None and plane.y is not None:
                    _product(kernels, problem, block, plane.of_rows, rows, given, plane.y[cols])
                    if mirror:
                        _product(kernels, of_cols, block.transposed(), plane.of_rows, cols, given.T, plane.x[rows])
                if plane.of_cols is not None:
                    _product(kernels, of_cols, block.transposed(), plane.of_cols, cols, given.T, plane.x[rows])
            _add_sums(row_totals, rows, row_sums)
            if mirror or not mirrored:
                _add_sums(col_totals, cols, col_sums)
    grad_x, grad_u = (None if of_rows is None else of_rows.value for of_rows in (total_x, total_u))
    grad_v = None if total_v is None else total_v.value
    if unit is not None:
        for grad, of_grad in ((grad_x, unit[:1]), (grad_y, unit[:1]), (grad_u, unit[1:]), (grad_v, unit[1:])):
            if grad is not None:
                grad.mul_(of_grad)
    row = Sums(*(None if of_vector is None else of_vector.value for of_vector in row_totals))
    col = Sums(*(None if of_vector is None or mirrored else of_vector.value for of_vector in col_totals))
    if grad_x is not None and row.along is not None:
        grad_x = torch.addcmul(grad_x, row.along[:, None], problem.x, value=-1)
    return Gradients(
        grad_x, grad_y, row.scale, col.scale, row.bias, col.bias,
        grad_u, grad_v, row.teacher_scale, col.teacher_scale, row.teacher_bias, col.teacher_bias,
    )  # fmt: skip


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
    vectors: Sequence[Tensor | None],
    index: Tensor | None,
    ids: Sequence[Tensor | None],
    second: Second = NO_SECOND,
    **choices: Any,
) -> Problem:
    """The problem of pairs: in self-similarity what belongs to the rows belongs to the columns, too."""
    row_scale, col_scale, row_bias, col_bias = vectors
    row_ids, col_ids = ids
    mirrored = y is None
    if y is None:
        y, col_scale, col_bias, col_ids = x, row_scale, row_bias, row_ids
        second = Second(*_of_rows(second))
    if row_ids is not None and col_ids is not None:
        row_ids, col_ids = _ranks(row_ids, row_ids if mirrored else col_ids)
    of_all = Vectors(row_scale, col_scale, row_bias, col_bias, index, index if mirrored else None, row_ids, col_ids)
    return Problem(x, y, of_all, second=second, mirrored=mirrored, **choices)


def _of_rows(pairs: tuple[Any, ...]) -> list[Any]:
    """(row, col, row, col, ...) with those of the rows for both."""
    return [row for row in pairs[::2] for _ in range(2)]


def _guided(reduction: str, index: Tensor | None, *options: Any) -> Problem:
    """The problem of an op whose second form is a guide."""
    x, y, *vectors, _exclude, row_ids, col_ids, guide_x, guide_y, ceiling, col_ceiling, restrict, above = options
    second = NO_SECOND
    if ceiling is not None or col_ceiling is not None:
        second = Second(guide_x, guide_y, row_ceiling=ceiling, col_ceiling=col_ceiling)
    choices = {"reduction": reduction, "restrict": restrict, "above": above}
    return _pairs(x, y, vectors, index, (row_ids, col_ids), second, **choices)


def _taught(index: Tensor | None, *options: Any) -> Problem:
    """The problem of an expectation, whose second form is a teacher."""
    x, y, *vectors, u, v, row_scale, col_scale, row_bias, col_bias, _exclude, row_ids, col_ids, restrict = options
    second = NO_SECOND if u is None else Second(u, v, row_scale, col_scale, row_bias, col_bias)
    return _pairs(x, y, vectors, index, (row_ids, col_ids), second, reduction="expectation", restrict=restrict)


def _reduced_pairs(
    kernels: Kernels, op: str, problem: Problem, y: Tensor | None, rows: bool, cols: bool, needs: list[bool]
) -> tuple[Statistics, Tensor]:
    """The statistics, and what is kept for backward."""
    if _attends(kernels, op, problem.x, y, cols, needs, problem.guided):
        return attention(kernels, problem)
    return forward(kernels, problem, rows, cols), problem.empty(0)


def _gradients_of_pairs(
    kernels: Kernels, problem: Problem, incoming: Incoming, grad_excluded: Tensor | None, needs: list[bool]
) -> Gradients:
    if problem.vectors.row_exclude is not None:
        incoming = incoming._replace(row_excluded=grad_excluded)
    if problem.mirrored:
        incoming = Incoming(*_of_rows(incoming))
    return backward(kernels, problem, problem.y[:, None], incoming, needs)


def _returned(problem: Problem, grads: Gradients, needs: list[bool]) -> tuple[Tensor, ...]:
    """Those of features in the dtype of these; empty where not needed."""
    grads = grads._replace(y=None if grads.y is None else grads.y[0])
    dtypes = dict.fromkeys(("x", "y", "u", "v"), problem.x.dtype)
    named = list(zip(Gradients._fields, grads, strict=True))[: len(needs)]
    return tuple(
        problem.x.new_empty(0, dtype=dtype) if grad is None else grad.to(dtype)
        for grad, dtype in ((grad, dtypes.get(name, torch.float32)) for name, grad in named)
    )


def similarity_logsumexp_forward(kernels: Kernels, *arguments: Any) -> tuple[Tensor, ...]:
    *options, rows, cols, needs = arguments
    x, y, exclude = options[0], options[1], options[6]
    with launching(x):
        index = _index_below(kernels, x, len(x if y is None else y), exclude)
        problem = _guided("logsumexp", index, *options)
        results, kept = _reduced_pairs(kernels, "similarity_logsumexp", problem, y, rows, cols, needs)
    return (*results.both("maximum", "log_sum"), kept, results.excluded, *results.both("lse"))


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
    *options, rows, cols, needs = arguments
    x, y, exclude = options[0], options[1], options[6]
    attended = kept.numel() > 0 and not any(needs[1::2])
    with launching(x):
        of_rows = (grad_row_lse, row_max, row_log_sum) if rows and not attended else None
        of_cols = (grad_col_lse, col_max, col_log_sum) if cols and not attended else None
        incoming, index = _incoming(kernels, x, of_rows, of_cols, exclude, len(x if y is None else y))
        problem = _guided("logsumexp", index, *options)
        if attended:
            grads = multiples(problem, grad_row_lse, grad_excluded, row_max, kept, needs)
        else:
            grads = _gradients_of_pairs(kernels, problem, incoming, grad_excluded, needs)
    return _returned(problem, grads, needs)


def similarity_sum_forward(kernels: Kernels, *arguments: Any) -> tuple[Tensor, ...]:
    *options, rows, cols, of, needs = arguments
    x, y, exclude = options[0], options[1], options[6]
    with launching(x):
        index = _index_below(kernels, x, len(x if y is None else y), exclude)
        problem = _guided(of, index, *options)
        results, kept = _reduced_pairs(kernels, "similarity_sum", problem, y, rows, cols, needs)
    return (kept, results.excluded, *results.both("sum"))


def similarity_sum_backward(
    kernels: Kernels,
    grad_row_sum: Tensor,
    grad_col_sum: Tensor,
    grad_excluded: Tensor,
    kept: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *options, rows, cols, of, needs = arguments
    x, y, exclude = options[0], options[1], options[6]
    with launching(x):
        index = _index_below(kernels, x, len(x if y is None else y), exclude)
        problem = _guided(of, index, *options)
        if kept.numel() > 0 and not any(needs[1::2]):
            grads = multiples(problem, grad_row_sum, grad_excluded, None, kept, needs)
        else:
            incoming = Incoming(grad_row_sum if rows else None, grad_col_sum if cols else None)
            grads = _gradients_of_pairs(kernels, problem, incoming, grad_excluded, needs)
    return _returned(problem, grads, needs)


def similarity_expectation_forward(kernels: Kernels, *arguments: Any) -> tuple[Tensor, ...]:
    *options, rows, cols, _needs = arguments
    x, y, exclude = options[0], options[1], options[12]
    with launching(x):
        index = _index_below(kernels, x, len(x if y is None else y), exclude)
        problem = _taught(index, *options)
        results = forward(kernels, problem, rows, cols)
    statistics = results.both("maximum", "log_sum", "teacher_maximum", "teacher_log_sum")
    return (*statistics, problem.empty(0), *results.both("mean", "lse"))


def similarity_expectation_backward(
    kernels: Kernels,
    grad_row_mean: Tensor,
    grad_col_mean: Tensor,
    grad_row_lse: Tensor,
    grad_col_lse: Tensor,
    row_max: Tensor,
    col_max: Tensor,
    row_log_sum: Tensor,
    col_log_sum: Tensor,
    teacher_row_max: Tensor,
    teacher_col_max: Tensor,
    teacher_row_log_sum: Tensor,
    teacher_col_log_sum: Tensor,
    _kept: Tensor,
    row_mean: Tensor,
    col_mean: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *options, rows, cols, needs = arguments
    x, y, exclude = options[0], options[1], options[12]
    own = options[6] is None  # the teacher's logits are those of the pairs
    size = len(x if y is None else y)
    with launching(x):
        of_rows = (grad_row_lse, row_max, row_log_sum) if rows else None
        of_cols = (grad_col_lse, col_max, col_log_sum) if cols else None
        incoming, index = _incoming(kernels, x, of_rows, of_cols, exclude, size)
        teacher_row = (row_max, row_log_sum) if own else (teacher_row_max, teacher_row_log_sum)
        teacher_col = (col_max, col_log_sum) if own else (teacher_col_max, teacher_col_log_sum)
        of_rows = (grad_row_mean, *teacher_row) if rows else None
        of_cols = (grad_col_mean, *teacher_col) if cols else None
        shares, _ = _incoming(kernels, x, of_rows, of_cols, None, size)
        incoming = incoming._replace(
            row_share=shares.row_weight,
            col_share=shares.col_weight,
            teacher_row_max=None if own else shares.row_max,
            teacher_col_max=None if own else shares.col_max,
            row_mean=row_mean if rows else None,
            col_mean=col_mean if cols else None,
        )
        problem = _taught(index, *options)
        grads = _gradients_of_pairs(kernels, problem, incoming, None, needs)
    return _returned(problem, grads, needs)


def similarity_topk_forward(kernels: Kernels, *arguments: Any) -> tuple[Tensor, ...]:
    x, y, *vectors, exclude, row_ids, col_ids, restrict, k, largest, noise = arguments
    with launching(x):
        index = _index_below(kernels, x, len(x if y is None else y), exclude)
        problem = _pairs(x, y, vectors, index, (row_ids, col_ids), restrict=restrict)
        n, m = problem.n, problem.m
        values = problem.full((n, k), -torch.inf if largest else torch.inf)
        indices = torch.full((n, k), -1, dtype=torch.int64, device=x.device)
        if n == 0 or m == 0:
            return values, indices
        start = None if noise is None else pair_noise.start(noise)
        bound = None
        for first in range(0, min(k, m), MOST_CANDIDATES):
            part = slice(first, min(first + MOST_CANDIDATES, k, m))
            wanted = part.stop - part.start
            lanes = 1 << (wanted - 1).bit_length()
            cols_per_strip = _cols_per_strip(kernels, problem, kernels.topk_tiling(problem, lanes))
            shape = (n, cdiv(m, cols_per_strip), lanes)
            logits = None if noise is None else problem.empty(*shape)
            best = Best(torch.empty(shape, dtype=torch.int64, device=x.device), logits)
            kernels.topk(problem, largest, start, bound, best, cols_per_strip)
            keys, place = (of_all[:, :wanted] for of_all in best.keys.flatten(1).sort(1, descending=True))
            order = (keys >> 32).to(torch.int32)
            there = order > NO_KEY
            if logits is None:
                bits = order if largest else ~order
                found = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
            else:
                found = logits.flatten(1).gather(1, place)
            values[:, part] = found.where(there, values[:, part])
            indices[:, part] = (LAST_COLUMN - (keys & 0xFFFFFFFF)).where(there, -1)
            bound = keys[:, -1].contiguous()
    return values, indices


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
        engines_own = kernels.factor(tuples)
        basis = tuple_basis.factor(tuples) if engines_own is None else tuple_basis.Basis(*engines_own)
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
    statistics = results.both("maximum", "log_sum")
    return (*statistics, problem.empty(0), *results.both("total", "lse"))


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


def functions(kernels: Callable[[], Kernels], ops: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """What the module of a backend has for the ops that are sweeps, by the kernels of its engine."""

    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(kernels(), *arguments)

    names = [f"{op}_{way}" for op in ops for way in ("forward", "backward")]
    return {name: run(globals()[name]) for name in ("kept", *names) if name in globals()}
