"""The streaming reduction behind hard negatives, retrieval and sampling: the best k columns of every row.

From top to bottom: the public function, the values as differentiable products, the op's schema and its fake.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contrastive_ops import backends, checks
from contrastive_ops.backends import reference
from contrastive_ops.dtypes import statistics_dtype, without_autocast
from contrastive_ops.ops.pairs import INDICES, VECTORS, pairs

MOST = 1024
GATHERED = 1 << 22  # elements of y that are gathered at a time


class SimilarityTopK(NamedTuple):
    """What `similarity_topk` returns."""

    values: Tensor
    indices: Tensor


def similarity_topk(
    x: Tensor,
    y: Tensor | None = None,
    k: int = 1,
    *,
    row_scale: float | Tensor | None = None,
    col_scale: float | Tensor | None = None,
    row_bias: float | Tensor | None = None,
    col_bias: float | Tensor | None = None,
    exclude: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: str = "exclude",
    largest: bool = True,
    noise: int | None = None,
    backend: str = "auto",
) -> SimilarityTopK:
    r"""The k largest similarity logits of each row and their columns, without ever holding the N x M matrix.

    The logits :math:`s_{ij}` and the pairs that take part are those of `similarity_logsumexp`, whose options are not
    repeated here; with ``y=None`` the rows are compared with each other.

    Parameters
    ----------
    k : int
        How many of each row, 1 to 1024.
    largest : bool
        False finds the smallest.
    noise : int, optional
        A seed. The order is then that of :math:`s_{ij} + G_{ij}` with Gumbel noise of each pair, so that ``k=1`` draws
        a column from the softmax of the row, and k columns are drawn without replacement. The draw depends on the seed
        and on the places of the pairs alone.

    Returns
    -------
    SimilarityTopK
        ``values`` of shape (N, k), float32 (float64 for float64), the logits without noise; ``indices`` of shape
        (N, k), int64. In order, the best first; of equal logits the lower column comes first. Where fewer columns take
        part, the rest has the value -inf (inf if the smallest are asked for), the index -1, and zero gradient.

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument. RuntimeError for a backend that can't run the input.

    Notes
    -----
    Extra memory is O(N k). Work: N M D multiply-adds. The values are differentiable: their pairs, N k, are gathered
    again, a part at a time. Deterministic.

    Examples
    --------
    >>> similarity_topk(torch.eye(2), torch.tensor([[1.0, 3.0], [2.0, 0.0], [0.0, 0.0]]), k=2).indices
    tensor([[1, 0],
            [0, 1]])
    """
    given = pairs(
        "similarity_topk",
        x,
        y,
        row_scale=row_scale,
        col_scale=col_scale,
        row_bias=row_bias,
        col_bias=col_bias,
        exclude=exclude,
        row_ids=row_ids,
        col_ids=col_ids,
        ids=ids,
        rows=True,
        cols=False,
        backend=backend,
    )
    checks.neighbours("k", k, MOST, of="columns that are kept of each row at most")
    checks.choice("largest", largest, (True, False))
    checks.seed("noise", noise, largest)
    arguments = (*given.features, *given.vectors, *given.indices, given.restrict, k, bool(largest), noise)
    if given.backend == "reference":
        return SimilarityTopK(*reference.similarity_topk(*arguments))
    return SimilarityTopK(*_Best.apply(*arguments, given.backend))


class _Best(torch.autograd.Function):
    """The values, as functions of their pairs: backward gathers the columns again, for a part of the rows at a time."""

    @staticmethod
    def forward(ctx, *arguments):
        values, indices = torch.ops.contrastive_ops.similarity_topk(*arguments)
        ctx.save_for_backward(indices, *arguments[:6])
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        indices, *sources = ctx.saved_tensors
        needs = ctx.needs_input_grad[:6]
        totals = [
            torch.zeros_like(source, dtype=statistics_dtype(sources[0])) if need else None
            for source, need in zip(sources, needs, strict=True)
        ]
        _add_gradients(totals, grad, indices, sources)
        of_sources = (None if of is None else of.to(source.dtype) for of, source in zip(totals, sources, strict=True))
        return *of_sources, *[None] * (len(ctx.needs_input_grad) - 6)


def _add_gradients(totals: list[Tensor | None], grad: Tensor, indices: Tensor, sources: Sequence[Any]) -> None:
    """Add to the gradients of features, scales and biases those of the pairs (row, index)."""
    x, y, row_scale, col_scale, *_ = sources
    of_x, of_y, of_row_scale, of_col_scale, of_row_bias, of_col_bias = totals
    if y is None:  # both sides have what the rows have
        y, col_scale, of_y, of_col_scale, of_col_bias = x, row_scale, of_x, of_row_scale, of_row_bias
    dtype = grad.dtype
    grad, index = grad.masked_fill(indices < 0, 0.0), indices.clamp(min=0)
    height = max(GATHERED // max(index.shape[1] * x.shape[1], 1), 1)
    with without_autocast(x):
        for first in range(0, x.shape[0] if y.shape[0] else 0, height):
            part = slice(first, first + height)
            columns, g = index[part], grad[part]
            rows, cols = x[part].to(dtype), y[columns].to(dtype)
            a = torch.ones_like(g) if row_scale is None else row_scale[part, None].expand_as(g)
            b = torch.ones_like(g) if col_scale is None else col_scale[columns]
            weight = (g * a * b).unsqueeze(1)
            along = g * (cols @ rows.unsqueeze(2)).squeeze(2)
            if of_x is not None:
                of_x[part] += (weight @ cols).squeeze(1)
            if of_y is not None:
                _add(of_y, columns, weight.mT * rows.unsqueeze(1))
            if of_row_scale is not None:
                of_row_scale[part] += (along * b).sum(1)
            if of_col_scale is not None:
                _add(of_col_scale, columns, along * a)
            if of_row_bias is not None:
                of_row_bias[part] += g.sum(1)
            if of_col_bias is not None:
                _add(of_col_bias, columns, g)


def _add(total: Tensor, index: Tensor, values: Tensor) -> None:
    """total[index] += values, in a fixed order: index_add_ has one on CPUs, index_put_ on GPUs."""
    index, values = index.flatten(), values.flatten(0, 1)
    if total.is_cuda:
        total.index_put_((index,), values, accumulate=True)
    else:
        total.index_add_(0, index, values)


torch.library.define(
    "contrastive_ops::similarity_topk",
    f"(Tensor x, Tensor? y, {VECTORS}, {INDICES}, bool restrict, int k, bool largest, int? noise, str backend) -> "
    "(Tensor values, Tensor indices)",
)


@torch.library.impl("contrastive_ops::similarity_topk", "CompositeExplicitAutograd")
def _run(*arguments):
    *inputs, backend = arguments
    return backends.module(backend).similarity_topk_forward(*inputs)


@torch.library.register_fake("contrastive_ops::similarity_topk")
def _fake(x, *arguments):
    *_, k, _largest, _noise, _backend = arguments
    size = (x.shape[0], k)
    return x.new_empty(size, dtype=statistics_dtype(x)), x.new_empty(size, dtype=torch.int64)
