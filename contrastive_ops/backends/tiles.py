"""The pairs of the streaming engine in plain PyTorch: a plane of them cut into tiles, their logits and their gradients.

Logits are s_ij = a_i b_j pair_ij + c_i + d_j. A pair is a dot product; or for volumes minus the distance of x_i from
the span of the tuple y_j, whose gradient reaches the vectors through the coordinates y_ijt of x_i in the span; or for
areas minus the distance of x_i from the line y_j, or its square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from contrastive_ops.backends import tuples as tuple_basis
from contrastive_ops.dtypes import statistics_dtype, without_autocast

TILE = 1024  # rows and columns; 4 MB of float32 logits
STRIP = 256  # terms of a sum that is one thread's


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
        guide_x: Tensor | None = None,
        guide_y: Tensor | None = None,
        ceiling: Tensor | None = None,
        col_ceiling: Tensor | None = None,
        restrict: bool = False,
        above: bool = False,
    ) -> None:
        self.mirrored = y is None
        if y is None:
            y, col_scale, col_bias, col_ids, col_ceiling = x, row_scale, row_bias, row_ids, ceiling
        self.x, self.y = x, y
        self.n, self.m = x.shape[0], y.shape[0]
        self.dtype = statistics_dtype(x)
        ones, zeros = self.full(self.n, 1.0), self.full(self.n, 0.0)
        self.row_scale = ones if row_scale is None else row_scale
        self.row_bias = zeros if row_bias is None else row_bias
        self.col_scale = self.full(self.m, 1.0) if col_scale is None else col_scale
        self.col_bias = self.full(self.m, 0.0) if col_bias is None else col_bias
        self.exclude, self.row_ids, self.col_ids, self.restrict = exclude, row_ids, col_ids, restrict
        self.guide = None if guide_x is None else Tiles(guide_x, guide_y)
        self.ceiling, self.col_ceiling, self.above = ceiling, col_ceiling, above

    def full(self, size: int, value: float) -> Tensor:
        return self.x.new_full((size,), value, dtype=self.dtype)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        return ((i, j) for i, j in self.all() if not self.mirrored or j.start >= i.start)

    def all(self) -> Iterator[tuple[slice, slice]]:
        """Of self-similarity also those below the diagonal; in the order of the columns."""
        for i in range(0, self.n, TILE):
            for j in range(0, self.m, TILE):
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

    def out(self, i: slice, j: slice, logits: Tensor) -> Tensor | None:
        """Which pairs of a tile their ids or their guide leave out; None if they leave out none."""
        out = None
        if self.row_ids is not None and self.col_ids is not None:
            equal = self.row_ids[i, None] == self.col_ids[None, j]
            out = ~equal if self.restrict else equal
        if self.ceiling is not None or self.col_ceiling is not None:
            guide = logits if self.guide is None else self.guide.pairs(i, j)[0]
            above = torch.zeros_like(guide, dtype=torch.bool)
            if self.ceiling is not None:
                above |= guide > self.ceiling[i, None]
            if self.col_ceiling is not None:
                above |= guide > self.col_ceiling[None, j]
            guided = ~above if self.above else above
            out = guided if out is None else out.logical_or_(guided)
        return out

    def mask(self, i: slice, j: slice, values: Tensor, value: float, out: Tensor | None) -> Tensor:
        """The values of a tile, in place, with another where a pair does not take part."""
        for _rows, dim, place, inside in self.excluded_pairs(i, j):
            values.scatter_(dim, place, values.gather(dim, place).masked_fill(inside, value))
        return values if out is None else values.masked_fill_(out, value)

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


class Gradients:
    """Those of the features, scales and biases of a form, from the gradients of its logits, tile by tile.

    In self-similarity those of the rows are of both sides.
    """

    def __init__(self, tiles: Tiles, needs: Sequence[bool]) -> None:
        self.tiles = tiles
        sizes = (tiles.x.shape, tiles.y.shape, *((size,) for size in (tiles.n, tiles.m, tiles.n, tiles.m)))
        self.totals = [
            tiles.x.new_zeros(size, dtype=tiles.dtype) if need else None
            for size, need in zip(sizes, needs, strict=False)
        ]
        self.totals += [None] * (len(sizes) - len(self.totals))

    def add(self, i: slice, j: slice, pairs: Tensor, beside: Any, grad: Tensor) -> None:
        """`grad` is that of the logits of a tile."""
        tiles = self.tiles
        grad_x, grad_y, row_scale, col_scale, row_bias, col_bias = self.totals
        mirror = tiles.mirrored and i != j
        if row_scale is not None:
            row_scale[i] += (grad * pairs * tiles.col_scale[None, j]).sum(1)
            if mirror:
                row_scale[j] += (grad * pairs * tiles.row_scale[i, None]).sum(0)
        if col_scale is not None:
            col_scale[j] += (grad * pairs * tiles.row_scale[i, None]).sum(0)
        if row_bias is not None:
            row_bias[i] += grad.sum(1)
            if mirror:
                row_bias[j] += grad.sum(0)
        if col_bias is not None:
            col_bias[j] += grad.sum(0)
        if grad_x is not None or grad_y is not None:
            tiles.add_gradients(i, j, pairs, beside, grad * tiles.weight(i, j), grad_x, grad_y)

    def results(self) -> list[Tensor]:
        """Empty where not needed."""
        return [self.tiles.full(0, 0.0) if total is None else total for total in self.totals]
