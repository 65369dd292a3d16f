"""The streaming reduction behind sigmoid, ranking and per-positive losses: row and column sums of a function of logits.

From top to bottom: the public function, the op's schema.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.backends import reference
from contrastive_ops.ops import autograd
from contrastive_ops.ops.pairs import GUIDE, INDICES, VECTORS, guide_of, pairs

FUNCTIONS = ("identity", "softplus", "relu", "sigmoid", "square", "step")


class SimilaritySum(NamedTuple):
    """What `similarity_sum` returns; what was not asked for is empty."""

    row_sum: Tensor
    col_sum: Tensor
    excluded_logit: Tensor


def similarity_sum(
    x: Tensor,
    y: Tensor | None = None,
    *,
    of: str = "softplus",
    row_scale: float | Tensor | None = None,
    col_scale: float | Tensor | None = None,
    row_bias: float | Tensor | None = None,
    col_bias: float | Tensor | None = None,
    exclude: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: str = "exclude",
    guide: Tensor | tuple[Tensor, Tensor] | None = None,
    ceiling: float | Tensor | None = None,
    col_ceiling: float | Tensor | None = None,
    keep: str = "below",
    rows: bool = True,
    cols: bool = False,
    backend: str = "auto",
) -> SimilaritySum:
    r"""Sums of a function of the similarity logits over rows, columns or both, without ever holding the N x M matrix.

    .. math::
        \mathrm{row\_sum}_i = \sum_{j \in A(i)} f(s_{ij}), \qquad
        \mathrm{col\_sum}_j = \sum_{i : j \in A(i)} f(s_{ij})

    with the logits :math:`s_{ij}` and the pairs :math:`A` of `similarity_logsumexp`, which has all options but `of`. A
    pair whose logit is -inf, by a bias, takes no part.

    Parameters
    ----------
    of : str
        f: "softplus" is :math:`\log(1 + e^s)`, "sigmoid" :math:`1 / (1 + e^{-s})`, "relu" :math:`\max(s, 0)`, "square"
        :math:`s^2`, "step" 1 for positive logits and else 0 (with zero gradient), "identity" s itself.

    Returns
    -------
    SimilaritySum
        ``row_sum`` of shape (N,), ``col_sum`` of shape (M,), float32 (float64 for float64); an empty set has 0, and
        zero gradient. ``excluded_logit`` of shape (N,) as in `similarity_logsumexp`.

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument. RuntimeError for a backend that can't run the input.

    Notes
    -----
    Memory, work and gradients are those of `similarity_logsumexp`. Sums of as many as 1e8 terms keep the digits of
    float32: those of tiles are joined in higher precision.

    Examples
    --------
    >>> import torch
    >>> x = torch.eye(3)
    >>> similarity_sum(x, x, of="step", row_bias=-0.5).row_sum  # the columns whose similarity exceeds 0.5
    tensor([1., 1., 1.])
    """
    checks.choice("of", of, FUNCTIONS)
    given = pairs(
        "similarity_sum",
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
        rows=rows,
        cols=cols,
        backend=backend,
    )
    guides, above = guide_of(given, guide, ceiling, col_ceiling, keep)
    arguments = (*given.features, *given.vectors, *given.indices, *guides, given.restrict, above, rows, cols, of)
    if given.backend == "reference":
        outputs = reference.similarity_sum(*arguments)
    else:
        outputs = autograd.call("similarity_sum", arguments, given.backend)
    return SimilaritySum(*outputs)


autograd.define(
    "similarity_sum",
    f"Tensor x, Tensor? y, {VECTORS}, {INDICES}, {GUIDE}",
    "bool restrict, bool above, bool rows, bool cols, str of",
    gradients=6,
    results=("row_sum", "col_sum"),
    others=("excluded",),
    statistics=(),
)
