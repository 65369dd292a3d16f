"""The streaming reduction behind the Gramian losses: row and column log-sum-exps of negative volumes.

From top to bottom: the public function, the op's schema.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from contrastive_ops import backends, checks
from contrastive_ops.backends import reference
from contrastive_ops.dtypes import promoted
from contrastive_ops.ops import autograd
from contrastive_ops.ops.arguments import integers, per_row

MOST_VECTORS = 4


class VolumeLSE(NamedTuple):
    """What `volume_logsumexp` and `area_logsumexp` return; what was not asked for is empty."""

    row_lse: Tensor
    col_lse: Tensor
    row_max: Tensor
    col_max: Tensor
    row_total: Tensor
    col_total: Tensor


def volume_logsumexp(
    anchor: Tensor,
    tuples: Tensor,
    *,
    row_scale: float | Tensor | None = None,
    col_scale: float | Tensor | None = None,
    exclude: Tensor | None = None,
    rows: bool = True,
    cols: bool = False,
    totals: bool = False,
    backend: str = "auto",
) -> VolumeLSE:
    r"""Log-sum-exp of the negative volumes of anchors with tuples of vectors, without an N x M or a k x k object.

    .. math::
        V_{ij} = \sqrt{\det G(a_i, m_{j1}, \dots, m_{jP})}, \qquad
        s_{ij} = -\mathrm{row\_scale}_i \, \mathrm{col\_scale}_j \, V_{ij}, \qquad
        \mathrm{row\_lse}_i = \log \sum_{j \in A(i)} e^{s_{ij}}, \quad
        \mathrm{col\_lse}_j = \log \sum_{i : j \in A(i)} e^{s_{ij}}

    with G the Gram matrix of the P + 1 vectors. The volume is that of the tuple times the distance of the anchor from
    its span, so a pair costs P dot products and one root.

    Parameters
    ----------
    anchor : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
    tuples : Tensor of shape (M, P, D), dtype of `anchor`, P from 1 to 4
        The other vectors, P at a time. The volume is linear in the length of each vector: cosines are scales.
    row_scale, col_scale : float, Tensor of one element, or Tensor of shape (N,) / (M,)
        Tensors receive their gradients. None is 1. The inverse of a temperature goes into one of them.
    exclude : integer Tensor of shape (N,), optional
        Row i leaves out column ``exclude[i]``; -1 leaves out nothing.
    rows, cols : bool
        The directions to reduce; both cost one sweep.
    totals : bool
        Also sum the logits of each direction over the pairs that take part, for label smoothing.
    backend : "auto", "cpu", "cuda", "triton", "tiled", "reference"
        "auto" takes the first that can run the input, a named one runs or raises.

    Returns
    -------
    VolumeLSE
        ``row_lse``, ``row_max``, ``row_total`` of shape (N,), ``col_lse``, ``col_max``, ``col_total`` of shape (M,),
        float32 (float64 for float64). The maxima carry no gradient. An empty set has -inf, a total of 0, and zero
        gradient.

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument. RuntimeError for a backend that can't run the input.

    Notes
    -----
    The distance comes from ``|a|^2 - |y|^2`` with y the coordinates of the anchor in the span: to about 1e-3 |a| in
    float32 where the anchor lies in the span, and accurate elsewhere. Positives, which do, belong to `exclude` and
    `gramian_volume`. Where the distance is 0 to within its rounding, or the vectors of the tuple are dependent, the
    volume is at its minimum and the gradient is 0.

    Extra memory is O(N + M P^2) in forward and O((N + M P) D) in backward, which computes the tiles again; the cpu
    backend keeps up to 64 MB of them instead. Work in units of N M P D multiply-adds: 1 forward, 1 for the
    recomputation and 1 for each side that requires a gradient. Gradients reach `anchor`, `tuples` and the scales; runs
    are bitwise repeatable. Differentiable once; differentiating twice raises.

    References
    ----------
    Cicchetti, Grassucci, Sigillo, Comminiello: Gramian Multimodal Representation Learning and Alignment,
    arXiv:2412.11959.

    Examples
    --------
    >>> import torch
    >>> anchor = torch.tensor([[2.0, 0.0, 0.0]])
    >>> tuples = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    >>> volume_logsumexp(anchor, tuples).row_max
    tensor([-2.])
    """
    checks.features("anchor", anchor)
    checks.features("tuples", tuples, expected="(M, P, D)")
    anchor, tuples = promoted(anchor, tuples)
    checks.same_kind("tuples", tuples, "anchor", anchor)
    n, (m, members, _) = anchor.shape[0], tuples.shape
    if not 1 <= members <= MOST_VECTORS:
        raise ValueError(
            f"tuples must have 1 to {MOST_VECTORS} vectors each (P of (M, P, D)), got shape {checks.shape(tuples)}; "
            "another loss leaves modalities out, or averages some."
        )
    checks.a_direction(rows, cols)
    chosen = backends.choose("volume_logsumexp", anchor, backend)
    arguments = (
        anchor,
        tuples,
        per_row("row_scale", row_scale, n, anchor, "anchor"),
        per_row("col_scale", col_scale, m, anchor, "tuples"),
        integers("exclude", exclude, n, anchor, "anchor", chosen),
        rows,
        cols,
        totals,
    )
    return call("volume_logsumexp", arguments, chosen)


def call(name: str, arguments: tuple[Any, ...], chosen: str) -> VolumeLSE:
    """Run the op by the backend that is chosen: dense PyTorch, which autograd sees through, or an engine."""
    dense = chosen == "reference"
    outputs = getattr(reference, name)(*arguments) if dense else autograd.call(name, arguments, chosen)
    row_lse, col_lse, row_total, col_total, row_max, col_max = outputs
    return VolumeLSE(row_lse, col_lse, row_max, col_max, row_total, col_total)


autograd.define(
    "volume_logsumexp",
    "Tensor anchor, Tensor tuples, Tensor? row_scale, Tensor? col_scale, Tensor? exclude",
    "bool rows, bool cols, bool totals",
    gradients=4,
    results=("row_lse", "col_lse"),
    others=("row_total", "col_total"),
    shown=2,
)
