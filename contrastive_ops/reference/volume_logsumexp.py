"""The dense twin of the volume op: the printed formula, a determinant per pair, differentiable to any order."""

from __future__ import annotations

import torch
from torch import Tensor


def volumes(anchor: Tensor, tuples: Tensor) -> Tensor:
    """The N x M volumes of (a_i, m_j1 .. m_jP) in float32 (float64 for float64); O(N M P^2) memory.

    A determinant that rounding has made negative is 0, and so is the gradient of a volume of 0.
    """
    if anchor.dtype != torch.float64:
        anchor, tuples = anchor.float(), tuples.float()
    (n, _), (m, members, _) = anchor.shape, tuples.shape
    corner = anchor.square().sum(-1)[:, None, None, None].expand(n, m, 1, 1)
    edge = torch.einsum("id,jtd->ijt", anchor, tuples)[..., None]
    block = (tuples @ tuples.mT).expand(n, m, members, members)
    gram = torch.cat([torch.cat([corner, edge.mT], -1), torch.cat([edge, block], -1)], -2)
    determinant = torch.linalg.det(gram)
    positive = determinant > 0
    return determinant.where(positive, 1.0).sqrt().where(positive, 0.0)


def volume_logits(
    anchor: Tensor,
    tuples: Tensor,
    *,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    """The N x M logits, -inf where a pair does not take part."""
    return logits_of(-volumes(anchor, tuples), row_scale, col_scale, exclude)


def logits_of(logits: Tensor, row_scale: Tensor | None, col_scale: Tensor | None, exclude: Tensor | None) -> Tensor:
    """The N x M pairs, scaled, -inf where one does not take part."""
    if row_scale is not None:
        logits = logits * row_scale[:, None]
    if col_scale is not None:
        logits = logits * col_scale[None, :]
    if exclude is not None:
        logits = logits.masked_fill(torch.arange(logits.shape[1], device=logits.device) == exclude[:, None], -torch.inf)
    return logits
