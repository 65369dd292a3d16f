"""The streaming engine in plain PyTorch: any device, O((N + M) D) memory, the readable statement of the kernels.

Forward, for every tile (I, J) of the N x M plane:
    s = logits of the tile, -inf where a pair does not take part
    fold max and sum of exp(s) into the running statistics of the rows I, and of the columns J
Backward, for every tile:
    s as above, g = u_i exp(s - row_max_i - row_log_sum_i) + v_j exp(s - col_max_j - col_log_sum_j)   (u, v: gradients)
    g of an excluded pair = the gradient of its own logit
    grad_x[I] += (g w) y[J], grad_y[J] += (g w)^T x[I], and sums of g for scales and biases        (w_ij = a_i b_j)
In self-similarity J >= I: a tile above the diagonal also stands for its mirror image.

Logits are s_ij = a_i b_j pair_ij + c_i + d_j. A pair is a dot product; or for volumes minus the distance of x_i from
the span of the tuple y_j, whose gradient reaches the vectors through the coordinates y_ijt of x_i in the span; or for
areas minus the distance of x_i from the line y_j, or its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from contrastive_ops.backends import tuples as tuple_basis
from contrastive_ops.dtypes import statistics_dtype, without_autocast

OPS = ("similarity_logsumexp", "volume_logsumexp", "gramian_volume", "area_logsumexp")
TILE = 1024  # rows and columns; 4 MB of float32 logits
STRIP = 256  # terms of a sum that is one thread's


def why_not(op: str, x: Tensor) -> str | None:
    return None


def kept(x: Tensor, y: Tensor | None, cols: bool, needs: list[bool]) -> int:
    """Nothing is kept from forward to backward."""
    return 0


class Tiles:
    """The problem cut into tiles: slices of rows and columns, and the logits on them."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None,
        row_scale: Tensor | None = None,
        col_scale: Tensor | None = None,
        row_bias: Tensor | None = None,
        col_bias: Tensor | None = None,
        exclude: Tensor | None = None,
        row_ids: Tensor | None = None,
        col_ids: Tensor | None = None,
        restrict: bool = False,
    ) -> None:
        self.mirrored = y is None
        if y is None:
            y, col_scale, col_bias, col_ids = x, row_scale, row_bias, row_ids
        self.x, self.y = x, y
        self.n, self.m = x.shape[0], y.shape[0]
        self.dtype = statistics_dtype(x)
        ones, zeros = self.full(self.n, 1.0), self.full(self.n, 0.0)
        self.row_scale = ones if row_scale is None else row_scale
        self.row_bias = zeros if row_bias is None else row_bias
        self.col_scale = self.full(self.m, 1.0) if col_scale is None else col_scale
        self.col_bias = self.full(self.m, 0.0) if col_bias is None else col_bias
        self.exclude, self.row_ids, self.col_ids, self.restrict = exclude, row_ids, col_ids, restrict

    def full(self, size: int, value: float) -> Tensor:
        return self.x.new_full((size,), value, dtype=self.dtype)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for i in range(0, self.n, TILE):
            for j in range(i if self.mirrored else 0, self.m, TILE):
                yield slice(i, min(i + TILE, self.n)), slice(j, min(j + TILE, self.m))

    def rows(self, i: slice) -> Tensor:
        return self.x[i].to(self.dtype)

    def cols(self, j: slice) -> Tensor:
        return self.y[j].to(self.dtype)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        with self.exact():
            return a @ b

    def exact(self) -> AbstractContextManager[object]:
        """No autocast: it would round the operands."""
        return without_autocast(self.x)

    def weight(self, i: slice, j: slice) -> Tensor:
        return self.row_scale[i, None] * self.col_scale[None, j]

    def pairs(self, i: slice, j: slice) -> tuple[Tensor, Any]:
        """The pairs of a tile, and what else of it their gradients need."""
        return self.product(self.rows(i), self.cols(j).T), None

    def logits(self, i: slice, j: slice, pairs: Tensor) -> Tensor:
        """Of all pairs."""
        return pairs * self.weight(i, j) + (self.row_bias[i, None] + self.col_bias[None, j])

    def excluded_pairs(self, i: slice, j: slice) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
        """The pairs (row, exclude[row]) of a tile, as (rows, dim, place along dim, whether there is one).

        In self-similarity the row may be either side of the pair; on the diagonal both places are in the tile.
        """
        if self.exclude is None:
            return
        sides = [(i, j, 1), (j, i, 0)] if self.mirrored else [(i, j, 1)]
        for rows, cols, dim in sides:
            index = self.exclude[rows]
            inside = (index >= cols.start) & (index < cols.stop)
            yield rows, dim, (index - cols.start).where(inside, 0).unsqueeze(dim), inside.unsqueeze(dim)

    def mask(self, i: slice, j: slice, logits: Tensor) -> Tensor:
        """-inf, in place, where a pair does not take part."""
        for _rows, dim, place, inside in self.excluded_pairs(i, j):
            logits.scatter_(dim, place, logits.gather(dim, place).masked_fill(inside, -torch.inf))
        if self.row_ids is not None and self.col_ids is not None:
            equal = self.row_ids[i, None] == self.col_ids[None, j]
            logits.masked_fill_(~equal if self.restrict else equal, -torch.inf)
        return logits

    def add_gradients(
        self,
        i: slice,
        j: slice,
        pairs: Tensor,
        beside: Any,
        weighted: Tensor,
        grad_x: Tensor | None,
        grad_y: Tensor | None,
    ) -> None:
        """Add what the gradients of the pairs of a tile give to those of x and y, where wanted.

        `beside` and `weighted` may be overwritten.
        """
        if grad_x is not None:
            grad_x[i] += self.product(weighted, self.cols(j))
            if self.mirrored and i != j:
                grad_x[j] += self.product(weighted.T, self.rows(i))
        if grad_y is not None:
            grad_y[j] += self.product(weighted.T, self.rows(i))


class SpanTiles(Tiles):
    """Pairs of rows and tuples; the gradient of y is its moments, see `tuples.gradients`."""

    def __init__(
        self,
        anchor: Tensor,
        tuples: Tensor,
        basis: tuple_basis.Basis,
        row_scale: Tensor | None,
        col_scale: Tensor | None,
        exclude: Tensor | None,
    ) -> None:
        weight = tuple_basis.column_weight(basis, col_scale, anchor)
        super().__init__(anchor, tuples, row_scale, weight, exclude=exclude)
        self.inverse = basis.inverse.to(self.dtype)
        self.square = tuple_basis.squares(anchor)

    def coordinates(self, i: slice, j: slice) -> Tensor:
        """y_ijt as [P, rows, columns]."""
        dots = self.product(self.rows(i), self.cols(j).permute(1, 2, 0))
        with self.exact():
            return torch.einsum("jts,sij->tij", self.inverse[j], dots)

    def pairs(self, i: slice, j: slice) -> tuple[Tensor, Any]:
        y = self.coordinates(i, j)
        return -(self.square[i, None] - y.square().sum(0)).clamp(min=0.0).sqrt(), y

    def add_gradients(
        self,
        i: slice,
        j: slice,
        pairs: Tensor,
        beside: Any,
        weighted: Tensor,
        grad_x: Tensor | None,
        grad_y: Tensor | None,
    ) -> None:
        # |x|^2 - |y|^2 is off by about as many units in the last place of |x|^2: the distance is 0, at its minimum
        smallest = (4 * torch.finfo(self.dtype).eps * self.square[i, None]).sqrt()
        q = torch.where(-pairs <= smallest, 0.0, weighted / -pairs)
        y = beside
        if grad_x is not None:
            with self.exact():
                b = torch.einsum("jst,sij->tij", self.inverse[j], y)
            along = self.product(q * b, self.cols(j).transpose(0, 1)).sum(0)
            grad_x[i] += along - q.sum(1, keepdim=True) * self.rows(i)
        if grad_y is not None:
            grad_y[j] += self.product((q * y).mT, self.rows(i)).transpose(0, 1)


class LineTiles(Tiles):
    """Pairs of points a and lines [M, 2, D]: the foot f, which is the point nearest to 0, and the unit direction d.

    The squared distance is |a|^2 + |f|^2 - 2 <a, f> - <a, d>^2; below its rounding errors it is 0, with zero gradient.
    """

    def __init__(
        self,
        points: Tensor,
        lines: Tensor,
        row_scale: Tensor | None,
        col_scale: Tensor | None,
        exclude: Tensor | None,
        squared: bool,
    ) -> None:
        super().__init__(points, lines, row_scale, col_scale, exclude=exclude)
        self.squared = squared
        self.square, self.foot_square = points.square().sum(1), lines[:, 0].square().sum(1)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """In strips, whose sums a library leaves to one thread each: the bits are those of any number of threads."""
        with self.exact():
            result = a[:, :STRIP] @ b[:STRIP]
            for start in range(STRIP, a.shape[1], STRIP):
                result.addmm_(a[:, start : start + STRIP], b[start : start + STRIP])
        return result

    def pairs(self, i: slice, j: slice) -> tuple[Tensor, Any]:
        foot, direction = self.cols(j).unbind(1)
        lengths = self.square[i, None] + self.foot_square[None, j]
        along = self.product(self.rows(i), direction.T)
        distance = torch.addcmul(lengths, along, along, value=-1).sub_(self.product(self.rows(i), foot.T), alpha=2)
        distance.masked_fill_(distance <= lengths.mul_(8 * torch.finfo(self.dtype).eps), 0.0)
        return (distance if self.squared else distance.sqrt_()).neg_(), along

    def add_gradients(
        self,
        i: slice,
        j: slice,
        pairs: Tensor,
        beside: Any,
        weighted: Tensor,
        grad_x: Tensor | None,
        grad_y: Tensor | None,
    ) -> None:
        # in place: a tile less of each
        q = weighted.mul_(-2) if self.squared else weighted.div_(pairs)
        q.masked_fill_(pairs == 0.0, 0.0)
        along = beside.mul_(q)
        points, (foot, direction) = self.rows(i), self.cols(j).unbind(1)
        if grad_x is not None:
            to_line = self.product(q, foot) + self.product(along, direction)
            grad_x[i] += q.sum(1, keepdim=True) * points - to_line
        if grad_y is not None:
            grad_y[j, 0] += q.sum(0)[:, None] * foot - self.product(q.T, points)
            grad_y[j, 1] -= self.product(along.T, points)


def _fold(running: tuple[Tensor, Tensor], part: slice, logits: Tensor, dim: int) -> None:
    """Fold one tile into (max, sum). Invariant: sum * exp(max) is the sum of exp(logit) over all tiles so far."""
    largest, total = running
    new = torch.maximum(largest[part], logits.amax(dim))
    # a set that is empty so far has max = -inf; shifting it by 0 keeps (-inf) - (-inf) out of exp
    shift = torch.where(new == -torch.inf, 0.0, new)
    total[part] = total[part] * (largest[part] - shift).exp() + (logits - shift.unsqueeze(dim)).exp().sum(dim)
    largest[part] = new


def _forward(tiles: Tiles, rows: bool, cols: bool, totals: bool = False) -> dict[str, Tensor]:
    n, m = tiles.n if rows else 0, tiles.m if cols else 0
    row, col = (tiles.full(n, -torch.inf), tiles.full(n, 0.0)), (tiles.full(m, -torch.inf), tiles.full(m, 0.0))
    row_total, col_total = tiles.full(n if totals else 0, 0.0), tiles.full(m if totals else 0, 0.0)
    excluded = tiles.full(0 if tiles.exclude is None else tiles.n, -torch.inf)
    for i, j in tiles:
        logits = tiles.logits(i, j, tiles.pairs(i, j)[0])
        for rows_of, dim, place, inside in tiles.excluded_pairs(i, j):
            found = logits.gather(dim, place).where(inside, -torch.inf).squeeze(dim)
            excluded[rows_of] = torch.maximum(excluded[rows_of], found)
        tiles.mask(i, j, logits)
        if rows:
            _fold(row, i, logits, 1)
            if tiles.mirrored and i != j:
                _fold(row, j, logits, 0)
        if cols:
            _fold(col, j, logits, 0)
        if totals:
            taking_part = logits.where(logits > -torch.inf, 0.0)
            if rows:
                row_total[i] += taking_part.sum(1)
            if cols:
                col_total[j] += taking_part.sum(0)
    return {
        "row_max": row[0],
        "col_max": col[0],
        "row_log_sum": row[1].log(),
        "col_log_sum": col[1].log(),
        "kept": tiles.full(0, 0.0),
        "excluded": excluded,
        "row_total": row_total,
        "col_total": col_total,
        "row_lse": row[0] + row[1].log(),
        "col_lse": col[0] + col[1].log(),
    }


def _backward(
    tiles: Tiles,
    incoming: dict[str, Tensor],
    row_max: Tensor,
    col_max: Tensor,
    row_log_sum: Tensor,
    col_log_sum: Tensor,
    rows: bool,
    cols: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients of x and y in the dtype of the statistics, of the scales and of the biases; empty if not needed."""
    grad_row_lse, grad_col_lse = incoming["row_lse"], incoming["col_lse"]
    if tiles.mirrored:
        grad_col_lse, col_max, col_log_sum, cols = grad_row_lse, row_max, row_log_sum, True
    # an empty set gives nothing: exp(-inf - inf) = 0
    row_max, row_log_sum = row_max.where(row_max > -torch.inf, torch.inf), row_log_sum.clamp(min=0.0)
    col_max, col_log_sum = col_max.where(col_max > -torch.inf, torch.inf), col_log_sum.clamp(min=0.0)
    need_x, need_y, need_row_scale, need_col_scale, need_row_bias, need_col_bias = needs
    grad_x = tiles.x.new_zeros(tiles.x.shape, dtype=tiles.dtype) if need_x else None
    grad_y = tiles.y.new_zeros(tiles.y.shape, dtype=tiles.dtype) if need_y else None
    vectors = [
        tiles.full(size if need else 0, 0.0)
        for size, need in zip((tiles.n, tiles.m, tiles.n, tiles.m), needs[2:], strict=True)
    ]
    grad_row_scale, grad_col_scale, grad_row_bias, grad_col_bias = vectors
    for i, j in tiles:
        pairs, beside = tiles.pairs(i, j)
        logits = tiles.mask(i, j, tiles.logits(i, j, pairs))
        grad = torch.zeros_like(logits)
        if rows:
            grad += grad_row_lse[i, None] * (logits - row_max[i, None] - row_log_sum[i, None]).exp()
        if cols:
            grad += grad_col_lse[None, j] * (logits - col_max[None, j] - col_log_sum[None, j]).exp()
        if rows and "row_total" in incoming:
            grad += incoming["row_total"][i, None].where(logits > -torch.inf, 0.0)
        if cols and "col_total" in incoming:
            grad += incoming["col_total"][None, j].where(logits > -torch.inf, 0.0)
        for rows_of, dim, place, inside in tiles.excluded_pairs(i, j):
            if "excluded" in incoming:
                grad.scatter_add_(dim, place, incoming["excluded"][rows_of].unsqueeze(dim).where(inside, 0.0))
        tiles.add_gradients(i, j, pairs, beside, grad * tiles.weight(i, j), grad_x, grad_y)
        mirror = tiles.mirrored and i != j
        if need_row_scale:
            grad_row_scale[i] += (grad * pairs * tiles.col_scale[None, j]).sum(1)
            if mirror:
                grad_row_scale[j] += (grad * pairs * tiles.row_scale[i, None]).sum(0)
        if need_col_scale:
            grad_col_scale[j] += (grad * pairs * tiles.row_scale[i, None]).sum(0)
        if need_row_bias:
            grad_row_bias[i] += grad.sum(1)
            if mirror:
                grad_row_bias[j] += grad.sum(0)
        if need_col_bias:
            grad_col_bias[j] += grad.sum(0)
        del pairs, beside, logits, grad  # not beside those of the next tile
    none = tiles.x.new_empty(0)
    return (none if grad_x is None else grad_x, none.clone() if grad_y is None else grad_y, *vectors)


def similarity_logsumexp_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *options, rows, cols, _needs = arguments
    results = _forward(Tiles(*options), rows, cols)
    names = ("row_max", "col_max", "row_log_sum", "col_log_sum", "kept", "excluded", "row_lse", "col_lse")
    return tuple(results[name] for name in names)


def similarity_logsumexp_backward(
    grad_row_lse: Tensor,
    grad_col_lse: Tensor,
    grad_excluded: Tensor,
    row_max: Tensor,
    col_max: Tensor,
    row_log_sum: Tensor,
    col_log_sum: Tensor,
    _kept: Tensor,
    x: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *options, rows, cols, needs = arguments
    incoming = {"row_lse": grad_row_lse, "col_lse": grad_col_lse, "excluded": grad_excluded}
    grad_x, grad_y, *vectors = _backward(
        Tiles(x, *options), incoming, row_max, col_max, row_log_sum, col_log_sum, rows, cols, needs
    )
    return (grad_x.to(x.dtype), grad_y.to(x.dtype), *vectors)


_WITH_TOTALS = (
    "row_max", "col_max", "row_log_sum", "col_log_sum", "kept", "row_total", "col_total", "row_lse", "col_lse"
)  # fmt: skip


def _incoming(
    row_lse: Tensor, col_lse: Tensor, row_total: Tensor, col_total: Tensor, totals: bool
) -> dict[str, Tensor]:
    of_lse = {"row_lse": row_lse, "col_lse": col_lse}
    return of_lse | {"row_total": row_total, "col_total": col_total} if totals else of_lse


def volume_logsumexp_forward(anchor: Tensor, tuples: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *options, rows, cols, totals, _needs = arguments
    results = _forward(SpanTiles(anchor, tuples, tuple_basis.factor(tuples), *options), rows, cols, totals)
    return tuple(results[name] for name in _WITH_TOTALS)


def volume_logsumexp_backward(
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
    basis = tuple_basis.factor(tuples)
    tiles = SpanTiles(anchor, tuples, basis, row_scale, col_scale, exclude)
    incoming = _incoming(grad_row_lse, grad_col_lse, grad_row_total, grad_col_total, totals)
    needed = [*tuple_basis.needs_of_sweep(needs), False, False]
    grad_anchor, *sweep, _row_bias, _col_bias = _backward(
        tiles, incoming, row_max, col_max, row_log_sum, col_log_sum, rows, cols, needed
    )
    return tuple_basis.gradients(tuples, basis, col_scale, (grad_anchor.to(anchor.dtype), *sweep), needs)


def area_logsumexp_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *options, rows, cols, totals, _needs = arguments
    results = _forward(LineTiles(*options), rows, cols, totals)
    return tuple(results[name] for name in _WITH_TOTALS)


def area_logsumexp_backward(
    grad_row_lse: Tensor,
    grad_col_lse: Tensor,
    grad_row_total: Tensor,
    grad_col_total: Tensor,
    row_max: Tensor,
    col_max: Tensor,
    row_log_sum: Tensor,
    col_log_sum: Tensor,
    _kept: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *options, rows, cols, totals, needs = arguments
    incoming = _incoming(grad_row_lse, grad_col_lse, grad_row_total, grad_col_total, totals)
    gradients = _backward(
        LineTiles(*options), incoming, row_max, col_max, row_log_sum, col_log_sum, rows, cols, [*needs, False, False]
    )
    return gradients[:4]
