"""Distillation of similarities: a student's softmax over the batch under that of a teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import promoted
from contrastive_ops.losses import terms
from contrastive_ops.ops import row_dot, similarity_expectation


def soft_target_loss(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    teacher_temperature: float | Tensor | None = None,
    symmetric: bool = True,
    one_hot: float = 0.0,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Cross-entropy of a student's similarities under the softmax of a teacher's.

    .. math::
        s_{ij} = \frac{\langle x_i, y_j \rangle}{\tau}, \qquad t_{ij} = \mathrm{softmax}_j \,
        \frac{\langle u_i, v_j \rangle}{\tau_t}, \qquad
        \ell_i = \log \sum_j e^{s_{ij}} - (1 - h) \sum_j t_{ij} s_{ij} - h \, s_{ii}

    and, if it is symmetric, the mean of this over the rows and over the columns. With ``1 / temperature`` as scales
    it is the distillation term of open_clip's ``DistillClipLoss``.

    Parameters
    ----------
    x, y : Tensors of shape (N, D) and (M, D), float32 / bfloat16 / float16 / float64
        The student's features of rows and columns.
    u, v : Tensors of shape (N, D_t) and (M, D_t)
        The teacher's, of any width, taken in the dtype of `x`. They receive gradients where they require them: detach
        those of a teacher that is not to learn.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
    teacher_temperature : float or Tensor of one element, optional
        None takes that of the student, whose gradient then is that of both.
    symmetric : bool
        Also in the direction of the columns; needs N = M.
    one_hot : float in [0, 1)
        h, the mass of the targets that is on column i, instead of under the teacher; above 0 it needs M >= N.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the rows in the sum; the mean divides by their sum.
    normalize : bool
        Cosine similarities; False takes the dot products as they are.
    reduction : "mean", "sum" or "none"
    backend : str
        See `similarity_logsumexp`.

    Returns
    -------
    Tensor of shape (), or (N,) for ``reduction="none"`` (unweighted), float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    One sweep for both forms and both directions. Extra memory is O((N + M)(D + D_t)). A frozen teacher costs one
    product each way. A single column contributes 0 with zero gradient.

    References
    ----------
    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv:1503.02531. Zheng et al.: ReSSL,
    arXiv:2107.09282.

    Examples
    --------
    >>> x = torch.eye(3)
    >>> soft_target_loss(x, x, x, x, temperature=1.0)  # the entropy of the teacher, which is the student
    tensor(0.9753)
    """
    terms.check_options(
        reduction=reduction, normalize=normalize, symmetric=symmetric, one_hot=one_hot, sample_weight=sample_weight
    )
    checks.features("x", x)
    checks.features("y", y, expected="(M, D)", axes="every row is a column of the similarities")
    x, y = promoted(x, y)
    checks.same_kind("y", y, "x", x)
    checks.other_features("u", u, "x", x)
    checks.other_features("v", v, "y", y)
    checks.same_width("v", v, "u", u)
    n, m = x.shape[0], y.shape[0]
    if symmetric:
        checks.one_per_row("y", y, "x", x)
    elif one_hot > 0.0:
        checks.enough_columns(n, m)
    checks.temperature("temperature", temperature, x.device)
    if teacher_temperature is not None:
        checks.temperature("teacher_temperature", teacher_temperature, x.device)
    checks.samples(None, sample_weight, n, x.device, rows_of="x")

    u, v = u.to(x.dtype), v.to(x.dtype)
    student = terms.flat(temperature, x)
    teacher = student if teacher_temperature is None else terms.flat(teacher_temperature, x)
    x, row_scale = terms.with_logit_scale(x, student, -1.0, normalize, backend)
    y, col_scale = terms.with_norm_scale(y, normalize, backend)
    u, teacher_row_scale = terms.with_logit_scale(u, teacher, -1.0, normalize, backend)
    v, teacher_col_scale = terms.with_norm_scale(v, normalize, backend)
    swept = similarity_expectation(
        x,
        y,
        u,
        v,
        row_scale=row_scale,
        col_scale=col_scale,
        teacher_row_scale=teacher_row_scale,
        teacher_col_scale=teacher_col_scale,
        cols=symmetric,
        backend=backend,
    )
    soft = 1.0 - one_hot
    per_row = swept.row_lse - soft * swept.row_mean
    if symmetric:
        per_row = (per_row + swept.col_lse - soft * swept.col_mean) / 2
    if one_hot > 0.0:
        positive = terms.scaled(row_scale, row_dot(x, y[:n]))
        per_row = per_row - one_hot * terms.scaled(None if col_scale is None else col_scale[:n], positive)
    if m < 2:  # all the mass of both is on one column, or there is none: exactly 0, where roundings differ
        per_row = per_row.masked_fill(torch.ones_like(per_row, dtype=torch.bool), 0.0)
    return terms.reduce(per_row, reduction, sample_weight)
