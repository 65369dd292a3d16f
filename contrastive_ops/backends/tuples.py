"""The vectors of each tuple, factored once, outside of the sweep: what every streaming backend of the volumes shares.

With M_j the P x D matrix of tuple j and L L^T = M_j M_j^T its Gram matrix, Q = L^-1 M_j is an orthonormal basis of the
span, and volume(a, M_j) = v_j * distance of a from the span, with v_j = prod_t L_tt the volume of the tuple itself.
The sweep sees the distances alone, with v_j as a factor of the column's scale. Gram matrices are formed and factored in
float64: of a float32 one, the error of L ruins the tuples whose vectors are close to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_ops.dtypes import statistics_dtype, without_autocast

# A vector whose square outside of the span of those before it is this share of itself counts as inside of it: its row
# of L^-1 is 0, and so are the volume of the tuple and its gradient. Well above the rounding of a float64 Gram matrix.
INSIDE = 1e-12
ROWS = 4096  # at a time in float64, so that no float64 copy of the input is made


class Basis(NamedTuple):
    inverse: Tensor  # [M, P, P], L^-1
    volume: Tensor  # [M], v_j


def factor(tuples: Tensor) -> Basis:
    """Factor the Gram matrices of tuples [M, P, D], in float64."""
    m, members, _ = tuples.shape
    gram = tuples.new_empty((m, members, members), dtype=torch.float64)
    for rows in range(0, m, ROWS):
        part = tuples[rows : rows + ROWS].double()
        gram[rows : rows + ROWS] = part @ part.mT
    return factor_gram(gram)


def factor_gram(gram: Tensor) -> Basis:
    """The Cholesky factors L of Gram matrices [M, P, P], float64, as what the sweep and the gradients need of them."""
    members = gram.shape[1]
    lower = torch.zeros_like(gram)
    inverse = torch.zeros_like(gram)
    volume = gram.new_ones(gram.shape[0])
    for t in range(members):
        square = gram[:, t, t]
        pivot = square - lower[:, t, :t].square().sum(-1)
        inside = pivot <= INSIDE * square
        reciprocal = pivot.masked_fill(inside, torch.inf).rsqrt()
        length = pivot.masked_fill(inside, 0.0).sqrt()
        volume = volume * length
        below = gram[:, t + 1 :, t] - (lower[:, t + 1 :, :t] @ lower[:, t, :t, None]).squeeze(-1)
        lower[:, t, t] = length
        lower[:, t + 1 :, t] = below * reciprocal[:, None]
        inverse[:, t, t] = reciprocal
        inverse[:, t, :t] = -reciprocal[:, None] * (lower[:, t, None, :t] @ inverse[:, :t, :t]).squeeze(1)
    return Basis(inverse, volume)


def volume_gradient(vectors: Tensor, inverse: Tensor, factor: Tensor) -> Tensor:
    """factor L^-T L^-1 X [M, P, D], in the dtype of the vectors."""
    dtype = statistics_dtype(vectors)
    inverse = inverse.to(dtype)
    with without_autocast(vectors):  # it would round the operands
        q = inverse @ vectors.to(dtype)
        return ((factor[:, None, None] * inverse.mT) @ q).to(vectors.dtype)


def orthonormal(tuples: Tensor, basis: Basis) -> Tensor:
    """Q = L^-1 M [M, P, D], in the dtype of the tuples."""
    q = torch.empty_like(tuples)
    for rows in range(0, tuples.shape[0], ROWS):
        part = slice(rows, rows + ROWS)
        q[part] = basis.inverse[part] @ tuples[part].double()
    return q


def triangles(basis: Basis, anchor: Tensor) -> Tensor:
    """What the sweep reads of the tuples: the lower triangles of L^-1 [P (P + 1) / 2, M], row after row."""
    row, col = torch.tril_indices(*basis.inverse.shape[1:], device=anchor.device)
    return basis.inverse[:, row, col].T.to(statistics_dtype(anchor)).contiguous()


def squares(anchor: Tensor) -> Tensor:
    """|a_i|^2 [N], summed in float64."""
    dtype = statistics_dtype(anchor)
    return torch.cat([part.to(dtype).square().sum(-1, dtype=torch.float64) for part in anchor.split(ROWS)]).to(dtype)


def column_weight(basis: Basis, col_scale: Tensor | None, anchor: Tensor) -> Tensor:
    """The scale of a column's distances: col_scale_j v_j."""
    volume = basis.volume.to(statistics_dtype(anchor))
    return volume if col_scale is None else col_scale * volume


def needs_of_sweep(needs: list[bool]) -> list[bool]:
    """The gradient of the tuples takes that of the column's scale, too, which has their volume."""
    anchor, tuples, row_scale, col_scale = needs
    return [anchor, tuples, row_scale, tuples or col_scale]


def tuple_gradient(tuples: Tensor, basis: Basis, moments: Tensor, grad_volume: Tensor) -> Tensor:
    """The gradient of the tuples from the moments T_jt = sum_i q_ij y_ijt a_i of the sweep, and that of v_j.

    The moments move the span; only their part outside of it does: dM = L^-T (T + (dL/dv v I - T Q^T) Q).
    """
    dtype = moments.dtype
    inverse, volume = basis.inverse.to(dtype), basis.volume.to(dtype)
    with without_autocast(tuples):  # it would round the operands
        q = inverse @ tuples.to(dtype)
        along = torch.diag_embed((grad_volume * volume)[:, None].expand(inverse.shape[:2])) - moments @ q.mT
        grad = inverse.mT @ torch.baddbmm(moments, along, q)
    return grad.to(tuples.dtype)


def gradients(
    tuples: Tensor,
    basis: Basis,
    col_scale: Tensor | None,
    sweep: tuple[Tensor, ...],
    needs: list[bool],
    of_tuples: Callable[..., Tensor] = tuple_gradient,
) -> tuple[Tensor, ...]:
    """The gradients of the op from those of the sweep, that of the tuples by `of_tuples`."""
    grad_anchor, moments, grad_row_scale, grad_weight = sweep
    grad_tuples, grad_col_scale = tuples.new_empty(0), grad_weight.new_empty(0)
    if needs[1]:
        grad_volume = grad_weight if col_scale is None else grad_weight * col_scale
        grad_tuples = of_tuples(tuples, basis, moments, grad_volume)
    if needs[3]:
        grad_col_scale = grad_weight * basis.volume.to(grad_weight.dtype)
    return grad_anchor, grad_tuples, grad_row_scale, grad_col_scale
