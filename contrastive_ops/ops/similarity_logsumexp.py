"""The streaming reduction behind every softmax-type loss: row and column log-sum-exps of scaled similarities.

From top to bottom: the public function, the op's schema.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from contrastive_ops.backends import reference
from contrastive_ops.ops import autograd
from contrastive_ops.ops.pairs import GUIDE, INDICES, VECTORS, guide_of, pairs


class SimilarityLSE(NamedTuple):
    """What `similarity_logsumexp` returns; what was not asked for is empty."""

    row_lse: Tensor
    col_lse: Tensor
    row_max: Tensor
    col_max: Tensor
    excluded_logit: Tensor


def similarity_logsumexp(
    x: Tensor,
    y: Tensor | None = None,
    *,
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
) -> SimilarityLSE:
    r"""Log-sum-exp of the similarity logits over rows, columns or both, without ever holding the N x M matrix.

    .. math::
        s_{ij} = \mathrm{row\_scale}_i \, \mathrm{col\_scale}_j \, \langle x_i, y_j \rangle
                 + \mathrm{row\_bias}_i + \mathrm{col\_bias}_j, \qquad
        \mathrm{row\_lse}_i = \log \sum_{j \in A(i)} e^{s_{ij}}, \quad
        \mathrm{col\_lse}_j = \log \sum_{i : j \in A(i)} e^{s_{ij}}

    Parameters
    ----------
    x : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
        Row embeddings.
    y : Tensor of shape (M, D), dtype of `x`, optional
        Column embeddings. None is self-similarity: the columns are the rows, the row options apply to both sides
        (``s_ij = row_scale_i row_scale_j <x_i, x_j> + row_bias_i + row_bias_j``), and only the upper triangle of
        tiles is computed. Logits that are not symmetric, such as a temperature per row, take ``y=x``.
    row_scale, col_scale, row_bias, col_bias : float, Tensor of one element, or Tensor of shape (N,) / (M,)
        Tensors receive their gradients. None is 1 for a scale and 0 for a bias.
    exclude : integer Tensor of shape (N,), optional
        Row i leaves out column ``exclude[i]``; -1 leaves out nothing. In self-similarity a pair is left out when
        either of its rows names the other. The logits of these pairs are returned: for a loss whose excluded pair
        is the positive, it rides on the sweep of the negatives.
    row_ids, col_ids : integer Tensors of shape (N,) and (M,), optional
        Group ids; self-similarity takes `row_ids` only.
    ids : "exclude" or "restrict"
        Whether pairs with equal ids are left out, or are the only ones that take part. Sorted ids let the engine
        skip whole tiles.
    guide : pair of Tensors of shape (N, D_g) and (M, D_g), or in self-similarity one Tensor of shape (N, D_g), optional
        Other features of the rows and columns, of any width, taken in the dtype of `x`: :math:`g_{ij} = \langle u_i,
        v_j \rangle` says which pairs take part. Without it :math:`g_{ij}` is the pair's own logit. No gradient goes
        through it.
    ceiling, col_ceiling : float, Tensor of one element, or Tensor of shape (N,) / (M,), optional
        A pair is above them if :math:`g_{ij} > \mathrm{ceiling}_i` or :math:`g_{ij} > \mathrm{col\_ceiling}_j`. In
        self-similarity `ceiling` applies to both sides. They are constants.
    keep : "below" or "above"
        Which of the pairs take part: those that are not above the ceilings, or those that are.
    rows, cols : bool
        The directions to reduce; both cost one sweep. Self-similarity has `rows` only, the columns are the same.
    backend : "auto", "cpu", "cuda", "triton", "tiled", "reference"
        "auto" takes the first that can run the input, a named one runs or raises.

    Returns
    -------
    SimilarityLSE
        ``row_lse``, ``row_max`` of shape (N,), ``col_lse``, ``col_max`` of shape (M,), float32 (float64 for float64).
        The maxima are of the logits and carry no gradient. An empty set has -inf, and zero gradient.
        ``excluded_logit`` of shape (N,) is ``s[i, exclude[i]]``, differentiable, whatever the ids say of the pair;
        -inf where there is no such column.

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument. RuntimeError for a backend that can't run the input.

    Notes
    -----
    Extra memory is O(N + M) in forward and O((N + M) D) in backward, which computes the tiles again; the cpu backend
    keeps up to 64 MB of them instead. Work in units of N M D multiply-adds: 1 forward, 1 for the recomputation and 1
    for each side that requires a gradient; in self-similarity 0.5 + 0.5 + 1. For 16-bit rows of at most 256 features
    alone, with a y side that requires none, the cuda and triton backends do all in forward: 2, and they keep O(N D).
    Sums, maxima and gradients accumulate in float32 (float64). Runs are bitwise repeatable. Differentiable once;
    differentiating twice raises.

    Examples
    --------
    >>> import torch
    >>> x = torch.eye(3)
    >>> similarity_logsumexp(x, x, row_scale=2.0, exclude=torch.arange(3)).row_lse
    tensor([0.6931, 0.6931, 0.6931])
    """
    given = pairs(
        "similarity_logsumexp",
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
    arguments = (*given.features, *given.vectors, *given.indices, *guides, given.restrict, above, rows, cols)
    if given.backend == "reference":  # dense PyTorch, autograd sees through it
        outputs = reference.similarity_logsumexp(*arguments)
    else:
        outputs = autograd.call("similarity_logsumexp", arguments, given.backend)
    row_lse, col_lse, excluded, row_max, col_max = outputs
    return SimilarityLSE(row_lse, col_lse, row_max, col_max, excluded)


autograd.define(
    "similarity_logsumexp",
    f"Tensor x, Tensor? y, {VECTORS}, {INDICES}, {GUIDE}",
    "bool restrict, bool above, bool rows, bool cols",
    gradients=6,
    results=("row_lse", "col_lse"),
    others=("excluded",),
    shown=2,
)
