"""The dense twin of the area op as the engines have it, points and lines, differentiable to any order.

The areas of triangles from the lengths of their sides are in `triangle_areas`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops.reference.volume_logsumexp import logits_of


def line_logits(
    points: Tensor,
    lines: Tensor,
    *,
    squared: bool = False,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    """The N x M logits of minus the distances (or their squares) of points from lines (M, 2, D), foot and direction.

    A squared distance within rounding of 0 is 0, with zero gradient.
    """
    foot, direction = lines.unbind(1)
    lengths = points.square().sum(1)[:, None] + foot.square().sum(1)
    distance = lengths - (points @ direction.T).square() - 2 * points @ foot.T
    nothing = distance <= 8 * torch.finfo(points.dtype).eps * lengths
    if squared:
        distance = distance.masked_fill(nothing, 0.0)
    else:
        distance = distance.masked_fill(nothing, 1.0).sqrt().masked_fill(nothing, 0.0)
    return logits_of(-distance, row_scale, col_scale, exclude)
