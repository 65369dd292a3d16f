"""The streaming reduction behind distillation and soft targets: mean logits under a teacher's softmax.

From top to bottom: the public function, the op's schema.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.backends import reference
from contrastive_ops.ops import autograd
from contrastive_ops.ops.pairs import INDICES, VECTORS, pairs, second_form, vectors


class SimilarityExpectation(NamedTuple):
    """What `similarity_expectation` returns; what was not asked for is empty."""

    row_mean: Tensor
    col_mean: Tensor
    row_lse: Tensor
    col_lse: Tensor


def similarity_expectation(
    x: Tensor,
    y: Tensor | None = None,
    u: Tensor | None = None,
    v: Tensor | None = None,
    *,
    row_scale: float | Tensor | None = None,
    col_scale: float | Tensor | None = None,
    row_bias: float | Tensor | None = None,
    col_bias: float | Tensor | None = None,
    teacher_row_scale: float | Tensor | None = None,
    teacher_col_scale: float | Tensor | None = None,
    teacher_row_bias: float | Tensor | None = None,
    teacher_col_bias: float | Tensor | None = None,
    exclude: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: str = "exclude",
    rows: bool = True,
    cols: bool = False,
    backend: str = "auto",
) -> SimilarityExpectation:
    r"""Mean of the similarity logits under a teacher's softmax, beside their own log-sum-exp, without an N x M matrix.

    .. math::
        \mathrm{row\_mean}_i = \sum_{j \in A(i)} t_{ij} s_{ij}, \qquad
        t_{ij} = \frac{e^{z_{ij}}}{\sum_{k \in A(i)} e^{z_{ik}}}, \qquad
        \mathrm{row\_lse}_i = \log \sum_{j \in A(i)} e^{s_{ij}}

    and the same of columns; ``row_lse - row_mean`` is the cross-entropy of the student's softmax under the teacher's.
    The student's logits :math:`s_{ij}` and the pairs :math:`A` are those of `similarity_logsumexp`, whose options are
    not repeated here; the teacher's are
    :math:`z_{ij} = \mathrm{teacher\_row\_scale}_i \, \mathrm{teacher\_col\_scale}_j \, \langle u_i, v_j \rangle
    + \mathrm{teacher\_row\_bias}_i + \mathrm{teacher\_col\_bias}_j`.

    Parameters
    ----------
    u, v : Tensors of shape (N, D_t) and (M, D_t), optional
        Features of the teacher, of any width, taken in the dtype of `x`; with ``y=None`` there is `u` alone. Without
        them the student is its own teacher: the mean of the logits under their own softmax.
    teacher_row_scale, teacher_col_scale, teacher_row_bias, teacher_col_bias : as those of the student, optional
        With `u`.

    Returns
    -------
    SimilarityExpectation
        ``row_mean``, ``row_lse`` of shape (N,), ``col_mean``, ``col_lse`` of shape (M,), float32 (float64 for float64).
        An empty set has the mean 0 and the log-sum-exp -inf, and zero gradients.

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument. RuntimeError for a backend that can't run the input.

    Notes
    -----
    One sweep makes both forms. Extra memory is O(N + M) in forward and O((N + M)(D + D_t)) in backward. Work in units
    of N M D multiply-adds, with a teacher of the same width: 2 forward, 2 for the recomputation and 1 for each side
    that requires a gradient; a frozen teacher has no more. Gradients reach the features, scales and biases of both.
    Runs are bitwise repeatable. Differentiable once; differentiating twice raises.

    Examples
    --------
    >>> import torch
    >>> x = torch.eye(2)
    >>> similarity_expectation(x, x, torch.zeros(2, 1), torch.zeros(2, 1)).row_mean  # a uniform teacher
    tensor([0.5000, 0.5000])
    """
    given = pairs(
        "similarity_expectation",
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
    x, y = given.features
    of_teacher = (teacher_row_scale, teacher_col_scale, teacher_row_bias, teacher_col_bias)
    checks.teacher(u, v, of_teacher, alone=y is None)
    m, col_name = given.columns
    u, v = second_form(("u", "v"), u, v, given)
    teacher = (u, v, *vectors("teacher_", of_teacher, x, x.shape[0], m, col_name))
    arguments = (x, y, *given.vectors, *teacher, *given.indices, given.restrict, rows, cols)
    if given.backend == "reference":
        outputs = reference.similarity_expectation(*arguments)
    else:
        outputs = autograd.call("similarity_expectation", arguments, given.backend)
    return SimilarityExpectation(*outputs)


autograd.define(
    "similarity_expectation",
    f"Tensor x, Tensor? y, {VECTORS}, Tensor? u, Tensor? v, {VECTORS.replace('? ', '? teacher_')}, {INDICES}",
    "bool restrict, bool rows, bool cols",
    gradients=12,
    results=("row_mean", "col_mean", "row_lse", "col_lse"),
    statistics=(*autograd.LSE_STATISTICS, *(f"teacher_{name}" for name in autograd.LSE_STATISTICS)),
    saved=("row_mean", "col_mean"),
)
