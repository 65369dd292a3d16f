"""Reductions of a pair function of the user's own, in tiles of plain PyTorch: the escape hatch.

Forward, for every tile (I, J) of the N x M plane:
    terms = score_mod(x[I] y[J]^T, I, J), -inf (for a sum 0) where mask_mod(I, J) is False
    fold them into the statistics of the rows I, and of the columns J
Backward, for every tile:
    terms as above, which autograd records, and their gradients from those of the statistics
    autograd takes these to g, of the scores, and to the parameters
    grad_x[I] += g y[J], grad_y[J] += g^T x[I]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from contrastive_ops import checks
from contrastive_ops.backends.reductions import LogSumExp, Softmax, Sum
from contrastive_ops.backends.tiles import Tiles
from contrastive_ops.dtypes import promoted, without_autocast

ScoreMod = Callable[[Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor], Tensor]


class FlexLSE(NamedTuple):
    """What `flex_logsumexp` returns; what was not asked for is empty."""

    row_lse: Tensor
    col_lse: Tensor


class FlexSum(NamedTuple):
    """What `flex_sum` returns; what was not asked for is empty."""

    row_sum: Tensor
    col_sum: Tensor


def flex_logsumexp(
    x: Tensor,
    y: Tensor | None = None,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    parameters: Iterable[Tensor] = (),
    rows: bool = True,
    cols: bool = False,
) -> FlexLSE:
    return FlexLSE(*_call(_LSE, x, y, score_mod, mask_mod, parameters, rows, cols))


def flex_sum(
    x: Tensor,
    y: Tensor | None = None,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    parameters: Iterable[Tensor] = (),
    rows: bool = True,
    cols: bool = False,
) -> FlexSum:
    return FlexSum(*_call(_SUM, x, y, score_mod, mask_mod, parameters, rows, cols))


class _Reduction(NamedTuple):
    op: str
    absent: float  # the term of a pair that takes no part
    quantity: type[LogSumExp] | type[Sum]
    statistics: tuple[str, ...]  # what backward needs of it
    result: str


_LSE = _Reduction("flex_logsumexp", -torch.inf, LogSumExp, ("max", "log_sum"), "lse")
_SUM = _Reduction("flex_sum", 0.0, Sum, (), "total")


def _call(reduction: _Reduction, *arguments: Any) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling():
        # a graph would have every tile of the plane in it; between two graphs the call is what it is without them
        run = torch.compiler.disable(_run, reason=f"{reduction.op} runs functions of the user's, tile by tile")
        return run(reduction, *arguments)
    return _run(reduction, *arguments)


def _run(
    reduction: _Reduction,
    x: Tensor,
    y: Tensor | None,
    score_mod: ScoreMod | None,
    mask_mod: MaskMod | None,
    parameters: Iterable[Tensor],
    rows: bool,
    cols: bool,
) -> tuple[Tensor, ...]:
    checks.features("x", x)
    if y is not None:
        checks.features("y", y)
        x, y = promoted(x, y)
        checks.same_kind("y", y, "x", x)
    checks.a_direction(rows, cols)
    checks.pair_function("score_mod", score_mod, "(score, row, col)")
    checks.pair_function("mask_mod", mask_mod, "(row, col)")
    given = checks.parameters(parameters)
    instead = f"contrastive_ops.reference.{reduction.op}"
    checks.no_transform(reduction.op, instead)
    checks.no_jit_trace(reduction.op, instead)
    checks.no_forward_mode(reduction.op, x, y, *given, instead=instead)

    with without_autocast(x):
        plane = _Plane(x, y, score_mod, mask_mod)
        read = _read(plane, given) if torch.is_grad_enabled() else ()
        learned = torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (x, y, *read))
        if learned:
            return _Differentiable.apply(reduction, score_mod, mask_mod, rows, cols, x, y, *read)
        return _reduced(plane, reduction, rows, cols)[0]


class _Tile(NamedTuple):
    i: slice
    j: slice
    row: Tensor  # [R, 1]
    col: Tensor  # [1, C]
    out: Tensor | None  # [R, C], the pairs that take no part; None where there are none

    def sides(self, *of_rows_and_cols: Any) -> Iterator[tuple[Any, slice, int]]:
        """Of rows and of columns what is not None, the part of it, and the dimension that is reduced to it."""
        for of, part, dim in zip(of_rows_and_cols, (self.i, self.j), (1, 0), strict=True):
            if of is not None:
                yield of, part, dim


class _Plane(Tiles):
    """All pairs; of self-similarity also those below the diagonal, since terms need not be symmetric."""

    def __init__(self, x: Tensor, y: Tensor | None, score_mod: ScoreMod | None, mask_mod: MaskMod | None) -> None:
        super().__init__(x, x if y is None else y)
        self.alone = y is None
        self.score_mod, self.mask_mod = score_mod, mask_mod

    def taking_part(self) -> Iterator[_Tile]:
        """The tiles in which there is a pair that takes part."""
        index = torch.arange(max(self.n, self.m), device=self.x.device)
        for i, j in self:
            row, col = index[i, None], index[None, j]
            if self.mask_mod is None:
                yield _Tile(i, j, row, col, None)
                continue
            mask = self.mask_mod(row, col)
            checks.pair_mask(mask, row, col)
            mask = mask.expand(row.shape[0], col.shape[1])
            # on a device the host would wait for the count
            count = int(torch.count_nonzero(mask)) if checks.readable(mask) else None
            if count != 0:
                yield _Tile(i, j, row, col, None if count == mask.numel() else ~mask)

    def score(self, i: slice, j: slice) -> Tensor:
        return self.pairs(i, j)[0]

    def terms(self, score: Tensor, row: Tensor, col: Tensor) -> Tensor:
        if self.score_mod is None:
            return score
        terms = self.score_mod(score, row, col)
        checks.pair_terms(terms, score)
        return terms


def _reduced(
    plane: _Plane, reduction: _Reduction, rows: bool, cols: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The results for rows and columns, empty where they were not asked for, and the statistics of both."""
    none = plane.full(0, 0.0)
    of_rows = reduction.quantity(none, plane.n) if rows else None
    of_cols = reduction.quantity(none, plane.m) if cols else None
    for tile in plane.taking_part():
        score = plane.score(tile.i, tile.j)
        terms = plane.terms(score, tile.row, tile.col)
        if tile.out is not None:  # in place where the tensor is none of the user's
            fill = terms.masked_fill_ if terms is score else terms.masked_fill
            terms = fill(tile.out, reduction.absent)
        for of, part, dim in tile.sides(of_rows, of_cols):
            of.fold(part, terms, dim)
        del score, terms, tile  # not beside those of the next tile

    def of_both(*names: str) -> tuple[Tensor, ...]:
        return tuple(
            none.clone() if of is None else getattr(of, name) for name in names for of in (of_rows, of_cols)
        )

    return of_both(reduction.result), of_both(*reduction.statistics)


class _Incoming:
    """The gradients of the results, and what they are of the terms of a tile."""

    def __init__(self, grads: Sequence[Tensor | None], statistics: Sequence[Tensor]) -> None:
        softmaxes = (Softmax(*statistics[0::2]), Softmax(*statistics[1::2])) if statistics else (None, None)
        self.sides = [
            None if grad is None else (grad, softmax) for grad, softmax in zip(grads, softmaxes, strict=True)
        ]

    def of_terms(self, tile: _Tile, terms: Tensor) -> Tensor:
        total: Tensor | None = None
        for (grad, softmax), part, dim in tile.sides(*self.sides):
            weight = grad[part].unsqueeze(dim)
            # the derivative of a sum is 1, and that of a log-sum-exp the softmax
            share = weight.expand_as(terms).clone() if softmax is None else softmax.of(part, terms, dim).mul_(weight)
            total = share if total is None else total.add_(share)
        assert total is not None
        return total if tile.out is None else total.masked_fill_(tile.out, 0.0)


def _gradients(
    plane: _Plane, incoming: _Incoming, needs: Sequence[bool], parameters: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Of x, of y and of the parameters; in self-similarity that of x has the share of both sides."""
    leaves = _Leaves(parameters)
    grad_x, grad_y = (
        z.new_zeros(z.shape, dtype=plane.dtype) if need else None
        for z, need in zip((plane.x, plane.y), needs, strict=True)
    )
    if plane.alone:
        grad_y = grad_x
    totals = [x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, plane.dtype)) for x in parameters]
    for tile in plane.taking_part():
        score = plane.score(tile.i, tile.j)
        grad, of_leaves = _of_score(plane, incoming, tile, score, leaves, grad_x is not None or grad_y is not None)
        for total, part in zip(totals, of_leaves, strict=True):
            if part is not None:
                total += part
        if grad is not None:
            plane.add_gradients(tile.i, tile.j, score, None, grad, grad_x, grad_y)
        del tile, score, grad, of_leaves
    return (
        None if grad_x is None else grad_x.to(plane.x.dtype),
        None if grad_y is None or plane.alone else grad_y.to(plane.y.dtype),
        *(total.to(x.dtype) for total, x in zip(totals, parameters, strict=True)),
    )


def _of_score(
    plane: _Plane, incoming: _Incoming, tile: _Tile, score: Tensor, leaves: _Leaves, needed: bool
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """The gradients of the scores of a tile, if needed, and of the leaves; None of what the terms do not depend on."""
    if plane.score_mod is None:
        return incoming.of_terms(tile, score), ()
    terms = leaves.terms(plane, score.requires_grad_(needed), tile.row, tile.col)
    if not terms.requires_grad:
        return None, [None] * len(leaves.all)
    inputs = [score, *leaves.all] if needed else leaves.all
    found = torch.autograd.grad(terms, inputs, incoming.of_terms(tile, terms.detach()), allow_unused=True)
    grad, of_leaves = (found[0], found[1:]) if needed else (None, found)
    if grad is not None and tile.out is not None:  # a derivative may be infinite where a pair takes no part
        grad = grad.masked_fill(tile.out, 0.0)
    return grad, of_leaves


class _Leaves(TorchFunctionMode):
    """Within it torch's functions take leaves in place of the parameters.

    So what autograd records of a tile ends there: it does not run a parameter's hooks, once per tile, nor go on to
    another parameter on which this one depends.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.all = [x.detach().requires_grad_() for x in parameters]
        self.leaf_of = {id(x): leaf for x, leaf in zip(parameters, self.all, strict=True)}

    def leaf(self, value: Any) -> Any:
        return self.leaf_of.get(id(value), value)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(self.leaf, (args, kwargs or {}))
        return func(*args, **kwargs)

    def terms(self, plane: _Plane, score: Tensor, row: Tensor, col: Tensor) -> Tensor:
        with torch.enable_grad(), self:
            return self.leaf(plane.terms(score, row, col))


def _read(plane: _Plane, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The parameters that are learned, from the term of the first pair.

    A tensor that requires a gradient and is read, but is none of them, would be left without.
    """
    if plane.score_mod is None or plane.n == 0 or plane.m == 0:
        return ()
    learned = tuple(x for x in parameters if x.requires_grad)
    leaves, first, index = _Leaves(learned), slice(0, 1), torch.zeros(1, 1, dtype=torch.int64, device=plane.x.device)
    score = plane.score(first, first).detach().requires_grad_()
    reached = {id(leaf): leaf for leaf in _leaves_below(leaves.terms(plane, score, index, index))}
    known = {id(score), *map(id, leaves.all)}
    for name, leaf in reached.items():
        if name not in known:
            checks.not_a_parameter(leaf)
    return tuple(x for x, leaf in zip(learned, leaves.all, strict=True) if id(leaf) in reached)


def _leaves_below(result: Tensor) -> Iterator[Tensor]:
    """The leaves of the graph that autograd has of a tensor."""
    if result.grad_fn is None and result.requires_grad:
        yield result
    waiting, seen = [result.grad_fn], {None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch._C._functions.AccumulateGrad):
            yield node.variable
        waiting += [parent for parent, _ in node.next_functions]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reduction, score_mod, mask_mod, rows, cols, x, y, *parameters):
        results, statistics = _reduced(_Plane(x, y, score_mod, mask_mod), reduction, rows, cols)
        # the parameters, too: PyTorch says if one has been changed since
        ctx.save_for_backward(x, y, *statistics, *parameters)
        # score_mod reads these very tensors, and not what comes back of saved ones
        ctx.fixed = reduction, score_mod, mask_mod, parameters
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, *grads):
        checks.no_batched_gradients(ctx.fixed[0].op, *grads)
        saved = ctx.saved_tensors  # once: checkpointing minds
        run = _Once.apply if torch.is_grad_enabled() else partial(_Once.forward, None)  # create_graph=True
        return (*[None] * 5, *run(ctx.fixed, ctx.needs_input_grad[5:7], *grads, *saved))


class _Once(torch.autograd.Function):
    """The gradients in a graph that may be differentiated again, which it refuses."""

    @staticmethod
    def forward(ctx, fixed, needs, grad_row, grad_col, x, y, *saved):
        reduction, score_mod, mask_mod, parameters = fixed
        if ctx is not None:
            ctx.op = reduction.op
        incoming = _Incoming((grad_row, grad_col), saved[: 2 * len(reduction.statistics)])
        with without_autocast(x):
            return _gradients(_Plane(x, y, score_mod, mask_mod), incoming, needs, parameters)

    @staticmethod
    def backward(ctx, *_grads):
        checks.no_second_differentiation(ctx.op, f"call contrastive_ops.reference.{ctx.op}")
