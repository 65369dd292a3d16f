"""The streaming engine in plain PyTorch: any device, O((N + M) D) memory, the readable statement of the kernels.

Forward, for every tile (I, J) of the N x M plane:
    s = logits of the tile, -inf where a pair does not take part
    fold max and sum of exp(s) into the running statistics of the rows I, and of the columns J
Backward, for every tile:
    s as above, g = u_i exp(s - row_max_i - row_log_sum_i) + v_j exp(s - col_max_j - col_log_sum_j)   (u, v: gradients)
    g of an excluded pair = the gradient of its own logit
    grad_x[I] += (g w) y[J], grad_y[J] += (g w)^T x[I], and sums of g for scales and biases        (w_ij = a_i b_j)
In self-similarity J >= I: a tile above the diagonal also stands for its mirror image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

OPS = ("similarity_logsumexp",)
TILE = 1024  # rows and columns; 4 MB of float32 logits


def why_not(op: str, x: Tensor) -> str | None:
    return None


class Tiles:
    """The problem cut into tiles: slices of rows and columns, and the logits on them."""

    def __init__(self, x, y, row_scale, col_scale, row_bias, col_bias, exclude, row_ids, col_ids, restrict) -> None:
        self.mirrored = y is None
        if y is None:
            y, col_scale, col_bias, col_ids = x, row_scale, row_bias, row_ids
        self.x, self.y = x, y
        self.n, self.m = x.shape[0], y.shape[0]
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
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
        with torch.autocast(a.device.type, enabled=False):  # it would round the operands
            return a @ b

    def weight(self, i: slice, j: slice) -> Tensor:
        return self.row_scale[i, None] * self.col_scale[None, j]

    def dots_and_logits(self, i: slice, j: slice) -> tuple[Tensor, Tensor]:
        """The dot products of a tile and its logits, of all pairs."""
        dots = self.product(self.rows(i), self.cols(j).T)
        return dots, dots * self.weight(i, j) + (self.row_bias[i, None] + self.col_bias[None, j])

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
        if self.row_ids is not None:
            equal = self.row_ids[i, None] == self.col_ids[None, j]
            logits.masked_fill_(~equal if self.restrict else equal, -torch.inf)
        return logits


def _fold(running: tuple[Tensor, Tensor], part: slice, logits: Tensor, dim: int) -> None:
    """Fold one tile into (max, sum). Invariant: sum * exp(max) is the sum of exp(logit) over all tiles so far."""
    largest, total = running
    new = torch.maximum(largest[part], logits.amax(dim))
    # a set that is empty so far has max = -inf; shifting it by 0 keeps (-inf) - (-inf) out of exp
    shift = torch.where(new == -torch.inf, 0.0, new)
    total[part] = total[part] * (largest[part] - shift).exp() + (logits - shift.unsqueeze(dim)).exp().sum(dim)
    largest[part] = new


def kept_dots(n: int, m: int, dtype: torch.dtype) -> int:
    """Nothing is kept from forward to backward."""
    return 0


def similarity_logsumexp_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *options, rows, cols, _keep = arguments
    tiles = Tiles(x, *options)
    row = tiles.full(tiles.n if rows else 0, -torch.inf), tiles.full(tiles.n if rows else 0, 0.0)
    col = tiles.full(tiles.m if cols else 0, -torch.inf), tiles.full(tiles.m if cols else 0, 0.0)
    excluded = tiles.full(0 if tiles.exclude is None else tiles.n, -torch.inf)
    for i, j in tiles:
        _, logits = tiles.dots_and_logits(i, j)
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
    return row[0], col[0], row[1].log(), col[1].log(), excluded, tiles.full(0, 0.0)


def similarity_logsumexp_backward(
    grad_row_lse: Tensor,
    grad_col_lse: Tensor,
    grad_excluded: Tensor,
    row_max: Tensor,
    col_max: Tensor,
    row_log_sum: Tensor,
    col_log_sum: Tensor,
    _dots: Tensor,
    x: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *options, rows, cols, needs = arguments
    tiles = Tiles(x, *options)
    need_x, need_y, need_row_scale, need_col_scale, need_row_bias, need_col_bias = needs
    if tiles.mirrored:
        grad_col_lse, col_max, col_log_sum, cols = grad_row_lse, row_max, row_log_sum, True
    # an empty set gives nothing: exp(-inf - inf) = 0
    row_max, row_log_sum = row_max.where(row_max > -torch.inf, torch.inf), row_log_sum.clamp(min=0.0)
    col_max, col_log_sum = col_max.where(col_max > -torch.inf, torch.inf), col_log_sum.clamp(min=0.0)
    x, y = tiles.x, tiles.y
    nothing = tiles.full(0, 0.0)
    grad_x = x.new_zeros(x.shape, dtype=tiles.dtype) if need_x else nothing.clone()
    grad_y = y.new_zeros(y.shape, dtype=tiles.dtype) if need_y else nothing.clone()
    vectors = [
        tiles.full(size, 0.0) if need else nothing.clone()
        for size, need in zip((tiles.n, tiles.m, tiles.n, tiles.m), needs[2:], strict=True)
    ]
    grad_row_scale, grad_col_scale, grad_row_bias, grad_col_bias = vectors
    for i, j in tiles:
        dots, logits = tiles.dots_and_logits(i, j)
        tiles.mask(i, j, logits)
        pair = torch.zeros_like(logits)
        if rows:
            pair += grad_row_lse[i, None] * (logits - row_max[i, None] - row_log_sum[i, None]).exp()
        if cols:
            pair += grad_col_lse[None, j] * (logits - col_max[None, j] - col_log_sum[None, j]).exp()
        for rows_of, dim, place, inside in tiles.excluded_pairs(i, j):
            pair.scatter_add_(dim, place, grad_excluded[rows_of].unsqueeze(dim).where(inside, 0.0))
        weighted = pair * tiles.weight(i, j)
        mirror = tiles.mirrored and i != j
        if need_x:
            grad_x[i] += tiles.product(weighted, tiles.cols(j))
            if mirror:
                grad_x[j] += tiles.product(weighted.T, tiles.rows(i))
        if need_y:
            grad_y[j] += tiles.product(weighted.T, tiles.rows(i))
        if need_row_scale:
            grad_row_scale[i] += (pair * dots * tiles.col_scale[None, j]).sum(1)
            if mirror:
                grad_row_scale[j] += (pair * dots * tiles.row_scale[i, None]).sum(0)
        if need_col_scale:
            grad_col_scale[j] += (pair * dots * tiles.row_scale[i, None]).sum(0)
        if need_row_bias:
            grad_row_bias[i] += pair.sum(1)
            if mirror:
                grad_row_bias[j] += pair.sum(0)
        if need_col_bias:
            grad_col_bias[j] += pair.sum(0)
    return (grad_x.to(x.dtype), grad_y.to(x.dtype), *vectors)
