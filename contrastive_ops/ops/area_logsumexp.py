"""The streaming reduction behind the TRIANGLE loss: row and column log-sum-exps of negative areas.

The area of a triangle is half of a side times the distance of the corner from the side's line. The lines are made here,
for every side once; the op sees points and lines, with the sides' lengths in the scales of the columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops import backends, checks
from contrastive_ops.dtypes import promoted, statistics_dtype
from contrastive_ops.ops import autograd
from contrastive_ops.ops.arguments import integers, per_row
from contrastive_ops.ops.gramian_volume import orthogonalised
from contrastive_ops.ops.volume_logsumexp import VolumeLSE, call


def area_logsumexp(
    anchor: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    squared: bool = False,
    row_scale: float | Tensor | None = None,
    col_scale: float | Tensor | None = None,
    exclude: Tensor | None = None,
    rows: bool = True,
    cols: bool = False,
    totals: bool = False,
    backend: str = "auto",
) -> VolumeLSE:
    r"""Log-sum-exp of the negative areas of the triangles of anchors with sides, without an N x M object.

    .. math::
        A_{ij} = \tfrac12 |y_j - x_j| \, \mathrm{dist}(a_i, \overline{x_j y_j}), \qquad
        s_{ij} = -\mathrm{row\_scale}_i \, \mathrm{col\_scale}_j \, A_{ij}, \qquad
        \mathrm{row\_lse}_i = \log \sum_{j \in A(i)} e^{s_{ij}}, \quad
        \mathrm{col\_lse}_j = \log \sum_{i : j \in A(i)} e^{s_{ij}}

    Parameters
    ----------
    anchor : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
    x, y : Tensor of shape (M, D), dtype of `anchor`
        The ends of the sides.
    squared : bool
        :math:`2 A^2` in place of the area: smooth at 0.
    row_scale, col_scale : float, Tensor of one element, or Tensor of shape (N,) / (M,)
        Tensors receive their gradients. None is 1. The inverse of a temperature goes into one of them.
    exclude : integer Tensor of shape (N,), optional
        Row i leaves out column ``exclude[i]``; -1 leaves out nothing.
    rows, cols : bool
        The directions to reduce; both cost one sweep.
    totals : bool
        Also sum the logits of each direction over the pairs that take part, for label smoothing.
    backend : "auto", "tiled", "reference"
        The other backends have no such op; "auto" takes "tiled" on every device.

    Returns
    -------
    VolumeLSE
        As of `volume_logsumexp`.

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument. RuntimeError for a backend that can't run the input.

    Notes
    -----
    With f the point of the line that is nearest to 0 and d its direction, the squared distance is
    ``|a|^2 + |f|^2 - 2 <a, f> - <a, d>^2``: to about 1e-7 of the first two in float32, so take off an offset that all
    corners share. Below that it is 0, with zero gradient, and so is the area of a side whose ends are equal.

    All is computed in float32 (float64 for float64). Extra memory is O((N + M) D) and a few tiles; backward computes
    the tiles again. Work in units of N M D multiply-adds: 2 forward, 2 for the recomputation and 2 for each side that
    requires a gradient. Gradients reach `anchor`, `x`, `y` and the scales; runs are bitwise repeatable. Differentiable
    once; differentiating twice raises.

    References
    ----------
    Grassucci, Cicchetti, Comminiello: A TRIANGLE Enables Multimodal Alignment Beyond Cosine Similarity,
    arXiv:2509.24734.

    Examples
    --------
    >>> x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
    >>> area_logsumexp(torch.tensor([[1.0, 3.0]]), x, y).row_max
    tensor([-6.])
    """
    checks.choice("squared", squared, (True, False))
    for name, value in (("anchor", anchor), ("x", x), ("y", y)):
        checks.features(name, value)
    anchor, x, y = promoted(anchor, x, y, to=torch.float32)  # distances, as in torch.cdist
    checks.same_kind("x", x, "anchor", anchor)
    checks.same_kind("y", y, "anchor", anchor)
    checks.one_per_row("y", y, "x", x)
    checks.a_direction(rows, cols)
    chosen = backends.choose("area_logsumexp", anchor, backend)
    n, m = anchor.shape[0], x.shape[0]
    row_scale = per_row("row_scale", row_scale, n, anchor, "anchor")
    col_scale = per_row("col_scale", col_scale, m, anchor, "x")
    exclude = integers("exclude", exclude, n, anchor, "anchor", chosen)

    points, x, y = (corner.to(statistics_dtype(corner)) for corner in (anchor, x, y))
    (length,), (direction,) = orthogonalised((y - x).unsqueeze(1))
    foot = x - (x * direction).sum(1, keepdim=True) * direction
    weight = of_parallelogram(length, squared)
    col_scale = weight if col_scale is None else col_scale * weight
    lines = torch.stack((foot, direction), 1)
    return call(
        "area_logsumexp", (points, lines, row_scale, col_scale, exclude, bool(squared), rows, cols, totals), chosen
    )


def of_parallelogram(area: Tensor, squared: bool) -> Tensor:
    """The area A of the triangle that is half of it, or 2 A^2."""
    return area.square() / 2 if squared else area / 2


autograd.define(
    "area_logsumexp",
    "Tensor anchor, Tensor lines, Tensor? row_scale, Tensor? col_scale, Tensor? exclude",
    "bool squared, bool rows, bool cols, bool totals",
    gradients=4,
    results=("row_lse", "col_lse"),
    others=("row_total", "col_total"),
    shown=2,
)
