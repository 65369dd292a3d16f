"""The streaming engine in plain PyTorch: any device, O((N + M) D) memory, the readable statement of the kernels.

An op is pairs (tiles.py beside this file) and a reduction (reductions.py). Forward, for every tile (I, J) of the plane:
    s = logits of the tile, -inf where a pair does not take part; with a teacher also its logits z
    fold them into the running statistics of the rows I, and of the columns J
Backward, for every tile:
    s as above, g = dL/ds from the gradients of the statistics, for a log-sum-exp
        u_i exp(s - row_max_i - row_log_sum_i) + v_j exp(s - col_max_j - col_log_sum_j)      (u, v: gradients)
    g of an excluded pair = the gradient of its own logit
    grad_x[I] += (g w) y[J], grad_y[J] += (g w)^T x[I], and sums of g for scales and biases        (w_ij = a_i b_j)
In self-similarity J >= I: a tile above the diagonal also stands for its mirror image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from contrastive_ops.backends import tuples as tuple_basis
from contrastive_ops.backends.reductions import Expectation, LogSumExp, Softmax, Sum, derivative, function
from contrastive_ops.backends.tiles import Gradients, LineTiles, SpanTiles, Tiles
from contrastive_ops.noise import gumbel

OPS = (
    "similarity_logsumexp",
    "similarity_sum",
    "similarity_expectation",
    "similarity_topk",
    "volume_logsumexp",
    "gramian_volume",
    "area_logsumexp",
)


def why_not(op: str, x: Tensor) -> str | None:
    return None


def kept(op: str, x: Tensor, y: Tensor | None, cols: bool, needs: list[bool], second: bool) -> int:
    """Nothing is kept from forward to backward."""
    return 0


class Directions:
    """A quantity of the rows and one of the columns, and which parts of them a tile counts for.

    In self-similarity the columns are the rows.
    """

    def __init__(self, tiles: Tiles, rows: Any, cols: Any) -> None:
        self.tiles, self.rows, self.cols = tiles, rows, cols

    def reduced(self, i: slice, j: slice) -> Iterator[tuple[Any, slice, int]]:
        """The quantity, the part of it, and the dimension of the tile that is reduced to it."""
        if self.rows is not None:
            yield self.rows, i, 1
            if self.tiles.mirrored and i != j:
                yield self.rows, j, 0
        if self.cols is not None:
            yield self.cols, j, 0

    def spread(self, i: slice, j: slice) -> Iterator[tuple[Any, slice, int]]:
        """Of gradients, where a tile of self-similarity has those of both sides, on the diagonal, too."""
        if self.rows is not None:
            yield self.rows, i, 1
        cols = self.rows if self.tiles.mirrored else self.cols
        if cols is not None:
            yield cols, j, 0


def _of_tiles(tiles: Tiles, quantity: type, rows: bool, cols: bool) -> Directions:
    like = tiles.full(0, 0.0)
    return Directions(tiles, quantity(like, tiles.n) if rows else None, quantity(like, tiles.m) if cols else None)


def _values(directions: Directions, *names: str) -> list[Tensor]:
    """The named values of rows and of columns, empty where a direction was not asked for."""
    nothing = directions.tiles.full(0, 0.0)
    return [
        nothing.clone() if of is None else getattr(of, name)
        for name in names
        for of in (directions.rows, directions.cols)
    ]


class _Excluded:
    """The logits of the pairs that are left out by their index."""

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles
        self.logits = tiles.full(0 if tiles.exclude is None else tiles.n, -torch.inf)

    def look_up(self, i: slice, j: slice, logits: Tensor) -> None:
        for rows, dim, place, inside in self.tiles.excluded_pairs(i, j):
            found = logits.gather(dim, place).where(inside, -torch.inf).squeeze(dim)
            self.logits[rows] = torch.maximum(self.logits[rows], found)

    def add(self, i: slice, j: slice, grad: Tensor, of_excluded: Tensor) -> None:
        for rows, dim, place, inside in self.tiles.excluded_pairs(i, j):
            grad.scatter_add_(dim, place, of_excluded[rows].unsqueeze(dim).where(inside, 0.0))


def _logsumexp(tiles: Tiles, rows: bool, cols: bool, totals: bool = False) -> dict[str, Tensor]:
    statistics = _of_tiles(tiles, LogSumExp, rows, cols)
    total = _of_tiles(tiles, Sum, rows and totals, cols and totals)
    excluded = _Excluded(tiles)
    for i, j in tiles:
        logits = tiles.logits(i, j, tiles.pairs(i, j)[0])
        excluded.look_up(i, j, logits)
        tiles.mask(i, j, logits, -torch.inf, tiles.out(i, j, logits))
        for of, part, dim in statistics.reduced(i, j):
            of.fold(part, logits, dim)
        if totals:
            taking_part = logits.where(logits > -torch.inf, 0.0)
            for of, part, dim in total.reduced(i, j):
                of.fold(part, taking_part, dim)
    values = dict(zip(_STATISTICS, _values(statistics, "max", "log_sum", "lse"), strict=True))
    row_total, col_total = _values(total, "total")
    return values | {
        "kept": tiles.full(0, 0.0),
        "excluded": excluded.logits,
        "row_total": row_total,
        "col_total": col_total,
    }


_STATISTICS = ("row_max", "col_max", "row_log_sum", "col_log_sum", "row_lse", "col_lse")


def _softmaxes(
    tiles: Tiles, rows: bool, cols: bool, row_max: Tensor, col_max: Tensor, row_log_sum: Tensor, col_log_sum: Tensor
) -> Directions:
    return Directions(
        tiles, Softmax(row_max, row_log_sum) if rows else None, Softmax(col_max, col_log_sum) if cols else None
    )


def _logsumexp_gradients(
    tiles: Tiles, incoming: dict[str, Tensor], statistics: tuple[Tensor, ...], rows: bool, cols: bool, needs: list[bool]
) -> list[Tensor]:
    """The gradients of x and y in the dtype of the statistics, of the scales and of the biases; empty if not needed."""
    softmaxes = _softmaxes(tiles, rows, cols, *statistics)
    lse = Directions(tiles, incoming["row_lse"] if rows else None, incoming["col_lse"] if cols else None)
    total = Directions(tiles, incoming.get("row_total") if rows else None, incoming.get("col_total") if cols else None)
    gradients, excluded = Gradients(tiles, needs), _Excluded(tiles)
    for i, j in tiles:
        pairs, beside = tiles.pairs(i, j)
        logits = tiles.logits(i, j, pairs)
        tiles.mask(i, j, logits, -torch.inf, tiles.out(i, j, logits))
        grad = torch.zeros_like(logits)
        for (softmax, part, dim), (of_lse, _, _) in zip(softmaxes.spread(i, j), lse.spread(i, j), strict=True):
            grad.addcmul_(softmax.of(part, logits, dim), of_lse[part].unsqueeze(dim))
        for of_total, part, dim in total.spread(i, j):
            grad += of_total[part].unsqueeze(dim).where(logits > -torch.inf, 0.0)
        if "excluded" in incoming:
            excluded.add(i, j, grad, incoming["excluded"])
        gradients.add(i, j, pairs, beside, grad)
        del pairs, beside, logits, grad  # not beside those of the next tile
    return gradients.results()


def similarity_logsumexp_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *options, rows, cols, _needs = arguments
    results = _logsumexp(Tiles(*options), rows, cols)
    names = ("row_max", "col_max", "row_log_sum", "col_log_sum", "kept", "excluded", "row_lse", "col_lse")
    return tuple(results[name] for name in names)


def similarity_logsumexp_backward(
    row_lse: Tensor, col_lse: Tensor, excluded: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    statistics, (_kept, x, *options, rows, cols, needs) = arguments[:4], arguments[4:]
    incoming = {"row_lse": row_lse, "col_lse": col_lse, "excluded": excluded}
    return _in_dtype(x, _logsumexp_gradients(Tiles(x, *options), incoming, statistics, rows, cols, needs))


def _in_dtype(x: Tensor, gradients: list[Tensor]) -> tuple[Tensor, ...]:
    grad_x, grad_y, *vectors = gradients
    return (grad_x.to(x.dtype), grad_y.to(x.dtype), *vectors)


def similarity_sum_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *options, rows, cols, of, _needs = arguments
    tiles = Tiles(*options)
    sums, excluded = _of_tiles(tiles, Sum, rows, cols), _Excluded(tiles)
    for i, j in tiles:
        logits = tiles.logits(i, j, tiles.pairs(i, j)[0])
        excluded.look_up(i, j, logits)
        out = tiles.out(i, j, logits)
        terms = tiles.mask(i, j, function(of, logits), 0.0, out)
        for of_direction, part, dim in sums.reduced(i, j):
            of_direction.fold(part, terms, dim)
    return (tiles.full(0, 0.0), excluded.logits, *_values(sums, "total"))


def similarity_sum_backward(
    grad_row_sum: Tensor, grad_col_sum: Tensor, grad_excluded: Tensor, _kept: Tensor, x: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *options, rows, cols, of, needs = arguments
    tiles = Tiles(x, *options)
    incoming = Directions(tiles, grad_row_sum if rows else None, grad_col_sum if cols else None)
    gradients, excluded = Gradients(tiles, needs), _Excluded(tiles)
    for i, j in tiles:
        pairs, beside = tiles.pairs(i, j)
        logits = tiles.logits(i, j, pairs)
        of_terms = torch.zeros_like(logits)
        for of_sum, part, dim in incoming.spread(i, j):
            of_terms += of_sum[part].unsqueeze(dim)
        out = tiles.out(i, j, logits)
        grad = tiles.mask(i, j, of_terms.mul_(derivative(of, logits)), 0.0, out)
        excluded.add(i, j, grad, grad_excluded)
        gradients.add(i, j, pairs, beside, grad)
        del pairs, beside, logits, grad, of_terms
    return _in_dtype(x, gradients.results())


def _student_and_teacher(arguments: tuple[Any, ...]) -> tuple[Tiles, Tiles]:
    """Of a student that is its own teacher they are the same; the student's masks are those of both."""
    x, y, row_scale, col_scale, row_bias, col_bias, u, v, *vectors, exclude, row_ids, col_ids, restrict = arguments
    masks = {"exclude": exclude, "row_ids": row_ids, "col_ids": col_ids, "restrict": restrict}
    student = Tiles(x, y, row_scale, col_scale, row_bias, col_bias, **masks)
    return student, student if u is None else Tiles(u, v, *vectors)


def _masked_logits(student: Tiles, teacher: Tiles, i: slice, j: slice) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Of both, the logits with -inf where a pair does not take part, the pairs, and what their gradients need."""
    out = None
    for tiles in (student,) if teacher is student else (student, teacher):
        pairs, beside = tiles.pairs(i, j)
        logits = tiles.logits(i, j, pairs)
        if tiles is student:
            out = student.out(i, j, logits)
        yield student.mask(i, j, logits, -torch.inf, out), pairs, beside


def similarity_expectation_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *options, rows, cols, _needs = arguments
    student, teacher = _student_and_teacher(tuple(options))
    means = _of_tiles(student, Expectation, rows, cols)
    statistics = _of_tiles(student, LogSumExp, rows, cols)
    for i, j in student:
        (logits, *_), *second = _masked_logits(student, teacher, i, j)
        z = second[0][0] if second else logits
        for of, part, dim in statistics.reduced(i, j):
            of.fold(part, logits, dim)
        for of, part, dim in means.reduced(i, j):
            of.fold(part, logits, z, dim)
    targets = Directions(student, *(None if of is None else of.teacher for of in (means.rows, means.cols)))
    own = teacher is student
    return (
        *_values(statistics, "max", "log_sum"),
        *([student.full(0, 0.0) for _ in range(4)] if own else _values(targets, "max", "log_sum")),
        student.full(0, 0.0),
        *_values(means, "mean"),
        *_values(statistics, "lse"),
    )


def similarity_expectation_backward(
    grad_row_mean: Tensor, grad_col_mean: Tensor, grad_row_lse: Tensor, grad_col_lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    own, of_teacher, (_kept, row_mean, col_mean, *rest) = arguments[:4], arguments[4:8], arguments[8:]
    *options, rows, cols, needs = rest
    student, teacher = _student_and_teacher(tuple(options))

    def directions(of_rows: Any, of_cols: Any) -> Directions:
        return Directions(student, of_rows if rows else None, of_cols if cols else None)

    softmaxes = _softmaxes(student, rows, cols, *own)
    targets = softmaxes if teacher is student else _softmaxes(student, rows, cols, *of_teacher)
    incoming = directions((grad_row_mean, grad_row_lse, row_mean), (grad_col_mean, grad_col_lse, col_mean))
    gradients, teacher_gradients = Gradients(student, needs[:6]), Gradients(teacher, needs[6:])
    of_logits, of_z = any(needs[:6]), any(needs[6:])
    for i, j in student:
        (logits, pairs, beside), *second = _masked_logits(student, teacher, i, j)
        z = second[0][0] if second else logits
        grad, grad_z = torch.zeros_like(logits), torch.zeros_like(z)
        for (softmax, part, dim), (target, _, _), (vectors, _, _) in zip(
            softmaxes.spread(i, j), targets.spread(i, j), incoming.spread(i, j), strict=True
        ):
            of_mean, of_lse, mean = (vector[part].unsqueeze(dim) for vector in vectors)
            t = target.of(part, z, dim)
            grad.addcmul_(softmax.of(part, logits, dim), of_lse).addcmul_(t, of_mean)
            if of_z or not second:  # a weight of 0 leaves out a logit of -inf, too
                grad_z += of_mean * t * (logits - mean).masked_fill_(t == 0.0, 0.0)
        if not second:
            grad += grad_z
        if of_logits:
            gradients.add(i, j, pairs, beside, grad)
        if of_z:
            teacher_gradients.add(i, j, *second[0][1:], grad_z)
        del pairs, beside, logits, grad, grad_z, second, z
    return (*_in_dtype(student.x, gradients.results()), *_in_dtype(student.x, teacher_gradients.results()))


def similarity_topk_forward(x: Tensor, y: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    *vectors, exclude, row_ids, col_ids, restrict, k, largest, noise = arguments
    masks = {"exclude": exclude, "row_ids": row_ids, "col_ids": col_ids, "restrict": restrict}
    tiles = Tiles(x, y, *vectors, **masks)
    none = -torch.inf if largest else torch.inf
    shape = (tiles.n, k)
    values, keys = x.new_full(shape, none, dtype=tiles.dtype), x.new_full(shape, none, dtype=tiles.dtype)
    indices = x.new_full(shape, -1, dtype=torch.int64)
    index = torch.arange(max(tiles.n, tiles.m), device=x.device)
    for i, j in tiles.all():
        logits = tiles.logits(i, j, tiles.pairs(i, j)[0])
        tiles.mask(i, j, logits, none, tiles.out(i, j, logits))
        if not largest:
            logits.masked_fill_(logits == -torch.inf, none)
        key = logits if noise is None else logits + gumbel(noise, index[i, None], index[None, j], tiles.dtype)
        # those found so far are of lower columns: a stable sort leaves them in front of their equals
        key = torch.cat((keys[i], key), 1)
        column = torch.cat((indices[i], index[j].expand_as(logits)), 1)
        order = key.argsort(stable=True, dim=1, descending=largest)
        if not largest:  # NaN comes last, but before those that are not there
            absent = (key == none).gather(1, order)
            order = order.gather(1, absent.int().argsort(stable=True, dim=1))
        order = order[:, :k]
        keys[i] = key.gather(1, order)
        values[i] = torch.cat((values[i], logits), 1).gather(1, order)
        indices[i] = column.gather(1, order).masked_fill(keys[i] == none, -1)
    return values, indices


def _volume_incoming(arguments: tuple[Any, ...]) -> tuple[dict[str, Tensor], tuple[Tensor, ...], list[Any]]:
    """The gradients of what a log-sum-exp with totals returned, its statistics, and its inputs."""
    incoming, statistics, (_kept, *inputs) = arguments[:4], arguments[4:8], arguments[8:]
    totals = inputs[-2]
    names = ("row_lse", "col_lse", *(("row_total", "col_total") if totals else ()))
    return dict(zip(names, incoming, strict=False)), statistics, inputs


_WITH_TOTALS = (
    "row_max", "col_max", "row_log_sum", "col_log_sum", "kept", "row_total", "col_total", "row_lse", "col_lse"
)  # fmt: skip


def volume_logsumexp_forward(anchor: Tensor, tuples: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *options, rows, cols, totals, _needs = arguments
    results = _logsumexp(SpanTiles(anchor, tuples, tuple_basis.factor(tuples), *options), rows, cols, totals)
    return tuple(results[name] for name in _WITH_TOTALS)


def volume_logsumexp_backward(*arguments: Any) -> tuple[Tensor, ...]:
    incoming, statistics, inputs = _volume_incoming(arguments)
    anchor, tuples, row_scale, col_scale, exclude, rows, cols, _totals, needs = inputs
    basis = tuple_basis.factor(tuples)
    tiles = SpanTiles(anchor, tuples, basis, row_scale, col_scale, exclude)
    of_sweep = tuple_basis.needs_of_sweep(needs)
    grad_anchor, *sweep = _logsumexp_gradients(tiles, incoming, statistics, rows, cols, of_sweep)[:4]
    return tuple_basis.gradients(tuples, basis, col_scale, (grad_anchor.to(anchor.dtype), *sweep), needs)


def area_logsumexp_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *options, rows, cols, totals, _needs = arguments
    results = _logsumexp(LineTiles(*options), rows, cols, totals)
    return tuple(results[name] for name in _WITH_TOTALS)


def area_logsumexp_backward(*arguments: Any) -> tuple[Tensor, ...]:
    incoming, statistics, (*options, rows, cols, _totals, needs) = _volume_incoming(arguments)
    return tuple(_logsumexp_gradients(LineTiles(*options), incoming, statistics, rows, cols, needs)[:4])
