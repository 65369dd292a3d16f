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

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from contrastive_ops import checks
from contrastive_ops.backends.reductions import LogSumExp, Softmax, Sum
from contrastive_ops.backends.tiles import Tiles
from contrastive_ops.dtypes import promoted, without_autocast

# rows and columns of a tile: some tensors of 1 MB that stay in a core's cache, as fast here as 4 MB; on a GPU each step
# on one is a launch
SIDE_ON_CPU, SIDE = 512, 2048

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
    compile: bool = False,
) -> FlexLSE:
    r"""Log-sum-exp over rows, columns or both of a pair function of your own, without ever holding the N x M matrix.

    .. math::
        t_{ij} = \mathrm{score\_mod}(\langle x_i, y_j \rangle, i, j), \qquad
        \mathrm{row\_lse}_i = \log \sum_{j : \mathrm{mask\_mod}(i, j)} e^{t_{ij}}, \quad
        \mathrm{col\_lse}_j = \log \sum_{i : \mathrm{mask\_mod}(i, j)} e^{t_{ij}}

    The two functions are plain PyTorch, as those of FlexAttention, and run on one tile of the plane after another. They
    close over what they need beside the score: labels, tables, vectors of one value per row.

    Parameters
    ----------
    x : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
        Row embeddings.
    y : Tensor of shape (M, D), dtype of `x`, optional
        Column embeddings. None is ``y=x``; all pairs are computed, since terms need not be symmetric.
    score_mod : function of (score, row, col), optional
        Takes the dot products of a tile, (R, C), float32 (float64 for float64), with the indices of its rows, (R, 1),
        and of its columns, (1, C), int64. Returns the terms, of the shape and dtype of ``score``. Each must depend on
        its own pair alone, and be the same when computed again. None is the dot product itself.
    mask_mod : function of (row, col), optional
        Returns a bool tensor that broadcasts to the tile, True where a pair takes part. None is all pairs. Tiles in
        which no pair does are skipped (on CPUs), so sort by label, if you can.
    parameters : iterable of floating-point Tensors
        What `score_mod` reads and is to receive gradients: the very tensors, not what they were computed from. A tensor
        that requires a gradient, is read and is not there raises.
    rows, cols : bool
        The directions to reduce; both cost one sweep.
    compile : bool
        Run `score_mod` through torch.compile. Worth its seconds of compilation where `score_mod` has several steps;
        where it fails there is one warning, and tiles are eager. So they are with parameters that are computed from
        others, or that have hooks.

    Returns
    -------
    FlexLSE
        ``row_lse`` of shape (N,), ``col_lse`` of shape (M,), float32 (float64 for float64). An empty set has -inf, and
        zero gradient.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, or what is wrong with what a function returned.
    RuntimeError
        Under a transform of torch.func, torch.jit.trace, or for a second differentiation.

    Notes
    -----
    Memory beyond the inputs is O((N + M) D), the parameters' gradients and some tiles of 512 x 512 (2048 x 2048 on
    a GPU): nothing is kept of a tile, backward computes it again. Work in units of N M D multiply-adds: 1 forward, 1
    for the recomputation and 1 for each side that requires a gradient; and the steps of the two functions, twice.

    Gradients reach `x`, `y` and `parameters`; maxima, sums and gradients accumulate in float32 (float64), autocast is
    off, and runs are bitwise repeatable if the functions are. A pair that takes no part gives x and y nothing, even
    where its derivative is infinite; that of a parameter should be finite there. Tensors that the functions read must
    not be changed between forward and backward, and ``score`` not in place. Differentiable once;
    `contrastive_ops.reference.flex_logsumexp` is to any order. In a function under torch.compile the call is a break of
    the graph.

    Examples
    --------
    A learned margin for every class, which negatives have to keep:

    >>> x, label = torch.eye(3), torch.tensor([0, 0, 1])
    >>> margin = torch.tensor([0.5, 1.0], requires_grad=True)
    >>> out = flex_logsumexp(
    ...     x,
    ...     score_mod=lambda score, row, col: score + margin[label[row]],
    ...     mask_mod=lambda row, col: label[row] != label[col],
    ...     parameters=[margin],
    ... )
    >>> out.row_lse
    tensor([0.5000, 0.5000, 1.6931], grad_fn=<...>)
    """
    return FlexLSE(*_call(_LSE, x, y, score_mod, mask_mod, parameters, rows, cols, compile))


def flex_sum(
    x: Tensor,
    y: Tensor | None = None,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    parameters: Iterable[Tensor] = (),
    rows: bool = True,
    cols: bool = False,
    compile: bool = False,
) -> FlexSum:
    r"""Sums over rows, columns or both of a pair function of your own, without ever holding the N x M matrix.

    .. math::
        t_{ij} = \mathrm{score\_mod}(\langle x_i, y_j \rangle, i, j), \qquad
        \mathrm{row\_sum}_i = \sum_{j : \mathrm{mask\_mod}(i, j)} t_{ij}, \quad
        \mathrm{col\_sum}_j = \sum_{i : \mathrm{mask\_mod}(i, j)} t_{ij}

    Parameters
    ----------
    x, y, score_mod, mask_mod, parameters, rows, cols, compile
        As of `flex_logsumexp`; `score_mod` returns the terms that are summed.

    Returns
    -------
    FlexSum
        ``row_sum`` of shape (N,), ``col_sum`` of shape (M,), float32 (float64 for float64). An empty set has 0, and
        zero gradient.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `flex_logsumexp`.

    Notes
    -----
    Memory, work and gradients are those of `flex_logsumexp`. Sums of as many as 1e8 terms keep the digits of float32:
    those of tiles are joined in higher precision.

    Examples
    --------
    Pairs pushed apart, the more their labels differ:

    >>> x, label = torch.eye(3), torch.tensor([1.0, 2.0, 4.0])
    >>> flex_sum(x, score_mod=lambda score, row, col: (label[row] - label[col]).abs() * (1 + score)).row_sum
    tensor([4., 3., 5.])
    """
    return FlexSum(*_call(_SUM, x, y, score_mod, mask_mod, parameters, rows, cols, compile))


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
        # a graph would have every tile of the plane in it: between two graphs the call is what it is without them
        reason = f"{reduction.op} runs functions of yours, tile by tile, which one graph does not hold"
        torch._dynamo.graph_break(msg=reason)
        return torch.compiler.disable(_run, reason=reason)(reduction, *arguments)
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
    compile: bool,
) -> tuple[Tensor, ...]:
    checks.features("x", x)
    if y is not None:
        checks.features("y", y)
        x, y = promoted(x, y)
        checks.same_kind("y", y, "x", x)
    checks.a_direction(rows, cols)
    checks.pair_function("score_mod", score_mod, "(score, row, col)")
    checks.pair_function("mask_mod", mask_mod, "(row, col)")
    checks.choice("compile", compile, (True, False))
    original = getattr(score_mod, "_torchdynamo_orig_callable", None)
    if original is not None:  # the user has compiled it
        score_mod, compile = original, True
    given = checks.parameters(parameters)
    instead = f"contrastive_ops.reference.{reduction.op}"
    checks.no_transform(reduction.op, instead)
    checks.no_jit_trace(reduction.op, instead)
    checks.no_forward_mode(reduction.op, x, y, *given, instead=instead)

    with without_autocast(x):
        read: tuple[Tensor, ...] = ()
        if score_mod is not None:
            if torch.is_grad_enabled():
                read = _read(_Plane(x, y, score_mod, mask_mod), given)
            if compile:
                score_mod = _compiled(score_mod, read)
        if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (x, y, *read)):
            return _Differentiable.apply(reduction, score_mod, mask_mod, rows, cols, x, y, *read)
        return _reduced(_Plane(x, y, score_mod, mask_mod), reduction, rows, cols)[0]


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
        self.side = SIDE_ON_CPU if x.device.type == "cpu" else SIDE

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for i in range(0, self.n, self.side):
            for j in range(0, self.m, self.side):
                yield slice(i, min(i + self.side, self.n)), slice(j, min(j + self.side, self.m))

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
        return tuple(none.clone() if of is None else getattr(of, name) for name in names for of in (of_rows, of_cols))

    return of_both(reduction.result), of_both(*reduction.statistics)


class _Incoming:
    """The gradients of the results, and what they are of the terms of a tile."""

    def __init__(self, grads: Sequence[Tensor | None], statistics: Sequence[Tensor]) -> None:
        softmaxes = (Softmax(*statistics[0::2]), Softmax(*statistics[1::2])) if statistics else (None, None)
        self.sides = [None if grad is None else (grad, softmax) for grad, softmax in zip(grads, softmaxes, strict=True)]

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
    leaves = _Themselves(parameters) if isinstance(plane.score_mod, _Compiled) else _Leaves(parameters)
    grad_x, grad_y = (
        z.new_zeros(z.shape, dtype=plane.dtype) if need else None
        for z, need in zip((plane.x, plane.y), needs, strict=True)
    )
    if plane.alone:
        grad_y = grad_x
    # of every tile autograd gives a whole gradient for each parameter that is indexed
    while plane.side < SIDE and plane.side**2 < sum(x.numel() for x in parameters):
        plane.side *= 2
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
    plane: _Plane, incoming: _Incoming, tile: _Tile, score: Tensor, leaves: _Leaves | _Themselves, needed: bool
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


class _Themselves:
    """The parameters as they are, for a compiled score_mod: within a mode it would be compiled anew for each tile."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.all = list(parameters)

    def terms(self, plane: _Plane, score: Tensor, row: Tensor, col: Tensor) -> Tensor:
        with torch.enable_grad():
            return plane.terms(score, row, col)


class _Compiled:
    """A score_mod by torch.compile, or as it is where that fails."""

    failed: ClassVar[set[Any]] = set()  # of code that would fail again at every step

    def __init__(self, function: ScoreMod) -> None:
        self.function = function
        self.compiled = torch.compile(function, dynamic=True)

    def __call__(self, score: Tensor, row: Tensor, col: Tensor) -> Tensor:
        if _code(self.function) not in self.failed:
            try:
                return self.compiled(score, row, col)
            except Exception as error:  # whatever Dynamo, a backend or a C++ compiler raises
                terms = self.function(score, row, col)  # an error of the user's is raised here
                self.failed.add(_code(self.function))
                sentence = str(error).partition("\n")[0]
                warnings.warn(f"torch.compile failed on score_mod, which runs without it: {sentence}", stacklevel=2)
                return terms
        return self.function(score, row, col)


def _code(function: ScoreMod) -> Any:
    return getattr(function, "__code__", type(function))


def _compiled(score_mod: ScoreMod, read: tuple[Tensor, ...]) -> ScoreMod:
    """Not with parameters that are computed or have hooks: those need the leaves in their place."""
    plain = all(x.is_leaf and not x._backward_hooks for x in read)
    return _Compiled(score_mod) if plain else score_mod


def _read(plane: _Plane, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The parameters that are learned, from the term of the first pair.

    A tensor that requires a gradient and is read, but is none of them, would be left without.
    """
    if plane.n == 0 or plane.m == 0:
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
    if result.grad_fn is None:
        if result.requires_grad:
            yield result
        return
    waiting, seen = [result.grad_fn], {result.grad_fn}
    while waiting:
        node = waiting.pop()
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable  # type: ignore[attr-defined]
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                waiting.append(parent)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reduction, score_mod, mask_mod, rows, cols, x, y, *parameters):
        results, statistics = _reduced(_Plane(x, y, score_mod, mask_mod), reduction, rows, cols)
        # the parameters, too: PyTorch says if one has been changed since
        ctx.save_for_backward(x, y, *statistics, *parameters)
        # score_mod reads these very tensors, and not what comes back of saved ones
        ctx.fixed = reduction, score_mod, mask_mod, parameters
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(result for result, asked in zip(results, (rows, cols), strict=True) if not asked))
        return results

    @staticmethod
    def backward(ctx, *grads):
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
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
