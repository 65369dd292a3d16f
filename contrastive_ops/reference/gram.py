"""The naive twins of the volume and area losses: a determinant and the sides of a triangle for each of N x M pairs.

Differentiable to any order but for the areas: torch.cdist has one derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops.reference.losses import _cross_entropy, _reduce, _unit


def _root(squared: Tensor, scale: Tensor) -> Tensor:
    """sqrt, where a square within rounding of 0 (in units of `scale`) is 0, with zero gradient: a minimum."""
    nothing = squared <= 8 * torch.finfo(squared.dtype).eps * scale
    return squared.masked_fill(nothing, 1.0).sqrt().masked_fill(nothing, 0.0)


def gramian_volume(vectors: Tensor) -> Tensor:
    """sqrt(det G) of vectors of shape (..., K, D)."""
    return _volume_of(vectors @ vectors.mT)


def _volume_of(gram: Tensor) -> Tensor:
    return _root(torch.linalg.det(gram), gram.diagonal(dim1=-2, dim2=-1).prod(-1))


def gram_volumes(anchor: Tensor, *others: Tensor) -> Tensor:
    """All N x M volumes."""
    n, m = len(anchor), len(others[0])
    entries = {(0, 0): anchor.square().sum(1)[:, None].expand(n, m)}
    for s, x in enumerate(others, 1):
        entries[0, s] = entries[s, 0] = anchor @ x.T
        for t, y in enumerate(others, 1):
            entries[s, t] = (x * y).sum(1).expand(n, m)
    size = range(1 + len(others))
    return _volume_of(torch.stack([torch.stack([entries[s, t] for t in size], -1) for s in size], -2))


def triangle_areas(anchor: Tensor, x: Tensor, y: Tensor, squared: bool = False) -> Tensor:
    """All N x M areas, by Heron's formula from the lengths of the sides; squared, 2 A^2."""
    to_x, to_y = (
        torch.cdist(anchor, corner, compute_mode="donot_use_mm_for_euclid_dist").square() for corner in (x, y)
    )
    scale = to_x * to_y
    four_squares = scale - (to_x + to_y - (x - y).square().sum(1)).square() / 4
    return four_squares / 2 if squared else _root(four_squares, scale) / 2


def _both_directions(
    rows: Tensor, cols: Tensor, label_smoothing: float, reduction: str, sample_weight: Tensor | None
) -> Tensor:
    diagonal = torch.arange(len(rows), device=rows.device)
    out = torch.zeros_like(rows, dtype=torch.bool)
    losses = [_cross_entropy(logits, diagonal, out, label_smoothing) for logits in (rows, cols.T)]
    return _reduce((losses[0] + losses[1]) / 2, reduction, sample_weight)


def gram_loss(
    anchor: Tensor,
    *others: Tensor,
    temperature: float | Tensor = 0.07,
    label_smoothing: float = 0.1,
    detach_others: bool = False,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy over the rows and over the columns of the N x N negative volumes."""
    a, *tuples = (_unit(x, normalize) for x in (anchor, *others))
    if detach_others:
        rows, cols = gram_volumes(a, *(x.detach() for x in tuples)), gram_volumes(a.detach(), *tuples)
    else:
        rows = cols = gram_volumes(a, *tuples)
    return _both_directions(-rows / temperature, -cols / temperature, label_smoothing, reduction, sample_weight)


def triangle_loss(
    anchor: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    label_smoothing: float = 0.1,
    squared: bool = False,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy over the rows and over the columns of the N x N negative areas."""
    areas = triangle_areas(_unit(anchor, normalize), _unit(x, normalize), _unit(y, normalize), squared)
    logits = -areas / temperature
    return _both_directions(logits, logits, label_smoothing, reduction, sample_weight)
