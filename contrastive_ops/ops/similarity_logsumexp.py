"""The streaming reduction behind every softmax-type loss: row and column log-sum-exps of scaled similarities.

From top to bottom: the public function, the op's schema, its fakes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_ops import backends, checks
from contrastive_ops.backends import reference
from contrastive_ops.dtypes import promoted, statistics_dtype
from contrastive_ops.ops import autograd
from contrastive_ops.ops.arguments import integers, per_row


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
    >>> x = torch.eye(3)
    >>> similarity_logsumexp(x, x, row_scale=2.0, exclude=torch.arange(3)).row_lse
    tensor([0.6931, 0.6931, 0.6931])
    """
    checks.features("x", x)
    n = x.shape[0]
    if y is None:
        m, col_name = n, "x"
        for name, value in (("col_scale", col_scale), ("col_bias", col_bias), ("col_ids", col_ids)):
            if value is not None:
                raise ValueError(
                    f"{name} must be None in self-similarity (y=None), where the row option applies to both sides, "
                    "got a value; pass y=x for logits that are not symmetric."
                )
        if cols or not rows:
            raise ValueError(
                f"rows=True, cols=False is expected in self-similarity (y=None), got rows={rows}, cols={cols}; "
                "the columns have the same log-sum-exp, or pass y=x."
            )
    else:
        checks.features("y", y)
        x, y = promoted(x, y)
        checks.same_kind("y", y, "x", x)
        m, col_name = y.shape[0], "y"
        checks.both_or_neither("row_ids", row_ids, "col_ids", col_ids)
        checks.a_direction(rows, cols)
    checks.choice("ids", ids, ("exclude", "restrict"))
    if ids == "restrict" and row_ids is None:
        raise ValueError('row_ids must be given with ids="restrict", got None; pass ids="exclude" for no groups.')

    vectors = (
        per_row("row_scale", row_scale, n, x, "x"),
        per_row("col_scale", col_scale, m, x, col_name),
        per_row("row_bias", row_bias, n, x, "x"),
        per_row("col_bias", col_bias, m, x, col_name),
    )
    chosen = backends.choose("similarity_logsumexp", x, backend)
    indices = (
        integers("exclude", exclude, n, x, "x", chosen),
        integers("row_ids", row_ids, n, x, "x", chosen),
        integers("col_ids", col_ids, m, x, col_name, chosen),
    )
    arguments = (x, y, *vectors, *indices, ids == "restrict", rows, cols)
    if chosen == "reference":  # dense PyTorch, autograd sees through it
        outputs = reference.similarity_logsumexp(*arguments)
    else:
        outputs = autograd.call("similarity_logsumexp", len(_GRADIENTS), arguments, chosen)
    row_lse, col_lse, excluded, row_max, col_max = outputs
    return SimilarityLSE(row_lse, col_lse, row_max, col_max, excluded)


_GRADIENTS = ("x", "y", "row_scale", "col_scale", "row_bias", "col_bias")
autograd.define(
    "similarity_logsumexp",
    "Tensor x, Tensor? y, Tensor? row_scale, Tensor? col_scale, Tensor? row_bias, Tensor? col_bias, "
    "Tensor? exclude, Tensor? row_ids, Tensor? col_ids",
    _GRADIENTS,
    "bool restrict, bool rows, bool cols",
    others=("excluded",),
)


@torch.library.register_fake("contrastive_ops::similarity_logsumexp")
def _forward_fake(x, y, *options):
    _row_scale, _col_scale, _row_bias, _col_bias, exclude, *_, rows, cols, needs, backend = options
    n, m = x.shape[0], x.shape[0] if y is None else y.shape[0]
    dtype = statistics_dtype(x)
    row, col, excluded = n if rows else 0, m if cols else 0, 0 if exclude is None else n
    kept = backends.module(backend).kept(x, y, cols, needs)
    return tuple(x.new_empty(size, dtype=dtype) for size in (row, col, row, col, kept, excluded, row, col))


@torch.library.register_fake("contrastive_ops::similarity_logsumexp_backward")
def _backward_fake(*arguments):
    x, y, *_, needs, _backend = arguments[8:]  # after the gradients, the statistics and what forward kept
    n, m = x.shape[0], x.shape[0] if y is None else y.shape[0]
    dtype = statistics_dtype(x)
    sizes = (x.shape, x.shape if y is None else y.shape, (n,), (m,), (n,), (m,))
    dtypes = (x.dtype, x.dtype, dtype, dtype, dtype, dtype)
    return tuple(
        x.new_empty(size if need else (0,), dtype=dtype) for size, dtype, need in zip(sizes, dtypes, needs, strict=True)
    )
