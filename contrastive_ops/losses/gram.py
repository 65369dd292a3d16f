"""The GRAM loss: a softmax over the volumes that anchors span with tuples of other modalities."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.losses import terms, volume
from contrastive_ops.losses.terms import LossStats
from contrastive_ops.ops import gramian_volume, volume_logsumexp


class Direction(NamedTuple):
    """Logits of one direction, vectors of shape (N,): each row's positive and what is known of its negatives."""

    negative_lse: Tensor
    negative_max: Tensor
    negative_total: Tensor  # their sum; empty without label smoothing
    positive: Tensor


def gram_loss(
    anchor: Tensor,
    *others: Tensor,
    temperature: float | Tensor = 0.07,
    label_smoothing: float = 0.1,
    detach_others: bool = False,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Symmetric cross-entropy over the volumes of anchors with tuples: a small volume is a good match.

    .. math::
        z_{ij} = -\frac{V(a_i, m_j^1, \dots, m_j^P)}{\tau}, \qquad
        \ell_i = \tfrac12 \big[ \mathrm{CE}_\epsilon(z_{i \cdot}, i) + \mathrm{CE}_\epsilon(z_{\cdot i}, i) \big], \\
        \mathrm{CE}_\epsilon(z_{i \cdot}, i) = \mathrm{softplus}\Big(\log \sum_{j \ne i} e^{z_{ij}} - z_{ii}\Big)
                                         + \epsilon \, (z_{ii} - \bar z_{i \cdot})

    :math:`V` is the volume of the parallelotope (`gramian_volume`), :math:`\bar z_{i \cdot}` the mean of a row.
    Tuples are never mixed. This is the mean of ``cross_entropy(z, arange(N), label_smoothing=epsilon)`` and the same
    of ``z.T``, exact where those round to 0.

    Parameters
    ----------
    anchor : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
        The modality that the others are aligned with, text in the paper.
    others : 1 to 4 Tensors of shape (N, D), dtype of `anchor`
        Row i of all modalities is sample i.
    temperature : float or Tensor of one element
        A tensor receives its gradient.
    label_smoothing : float in [0, 1)
        Mass spread evenly over all N candidates.
    detach_others : bool
        The gradients of the official training code, which gathers each direction's candidates without gradient:
        anchors learn from the rows only, tuples from the columns only.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the samples in the sum; the mean divides by their sum.
    normalize : bool
        Volumes of unit vectors; False takes the vectors as they are.
    reduction : "mean", "sum" or "none"
    return_stats : bool
        Also return `LossStats`, from the same sweep; a similarity is a negative volume.
    backend : str
        See `volume_logsumexp`.

    Returns
    -------
    Tensor of shape (), or (N,) for ``reduction="none"`` (unweighted), float32 (float64 for float64)
        With `return_stats`, a pair of it and `LossStats`: `lse` of shape (2, N), anchors then tuples,
        `positive_similarity` of shape (N,), `accuracy` the mean of both directions.

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Extra memory is O(N D P). With `normalize` the unit vectors are float32 (float64), and so are the products of half
    precision inputs; without it the op gets the vectors in their dtype. Positives, which are small volumes, are those
    of `gramian_volume`; the square of a negative's distance from a span has an absolute error of about 1e-7. For N = 1
    there are no negatives: the loss is 0 with zero gradient. A volume is even in each vector, so an opposite is as
    good a match as a duplicate; a zero vector, and more than D vectors, have volume 0, the best match there is, with
    zero gradient. Gradients reach all modalities, `temperature` and `sample_weight`; `detach_others` takes two sweeps.

    References
    ----------
    Cicchetti, Grassucci, Sigillo, Comminiello: Gramian Multimodal Representation Learning and Alignment,
    arXiv:2412.11959.

    Examples
    --------
    >>> gram_loss(torch.eye(3), torch.eye(3), temperature=1.0, label_smoothing=0.0)
    tensor(0.5514)
    """
    terms.check_options(reduction, normalize)
    volume.check_modalities(anchor, others)
    n, device = anchor.shape[0], anchor.device
    checks.temperature("temperature", temperature, device)
    checks.fraction("label_smoothing", label_smoothing)
    checks.choice("detach_others", detach_others, (True, False))
    if sample_weight is not None:
        checks.weights("sample_weight", sample_weight, n, device, rows_of="anchor")

    logit_scale = terms.inverse(temperature, anchor)
    directions_of = partial(
        _directions, logit_scale=logit_scale, normalize=normalize, totals=label_smoothing > 0.0, backend=backend
    )
    if detach_others:
        fixed = tuple(other.detach() for other in others)
        directions = directions_of(anchor, fixed, cols=False) + directions_of(anchor.detach(), others, rows=False)
    else:
        directions = directions_of(anchor, others)
    return symmetric(directions, logit_scale, label_smoothing, sample_weight, reduction, return_stats)


def _directions(
    anchor: Tensor,
    others: tuple[Tensor, ...],
    *,
    logit_scale: float | Tensor,
    normalize: bool,
    totals: bool,
    backend: str,
    rows: bool = True,
    cols: bool = True,
) -> tuple[Direction, ...]:
    """The rows, the columns, or both, from one sweep; the positives exactly, apart from it."""
    # unit vectors and not scales: the gradient of a volume is radial but for a small part, which is all that is left of
    # it. Projecting the whole float32 gradient keeps that part; the sum of two that are rounded apart loses it.
    vectors, anchor, tuples = volume.matched(anchor, others, normalize, backend)
    negatives = volume_logsumexp(
        anchor,
        tuples,
        row_scale=logit_scale,
        exclude=torch.arange(anchor.shape[0], device=anchor.device),
        rows=rows,
        cols=cols,
        totals=totals,
        backend=backend,
    )
    positive = -logit_scale * gramian_volume(vectors, backend=backend)
    of_rows = Direction(negatives.row_lse, negatives.row_max, negatives.row_total, positive)
    of_cols = Direction(negatives.col_lse, negatives.col_max, negatives.col_total, positive)
    return (of_rows,) * rows + (of_cols,) * cols


def symmetric(
    directions: tuple[Direction, ...],
    logit_scale: float | Tensor,
    label_smoothing: float,
    sample_weight: Tensor | None,
    reduction: str,
    return_stats: bool,
) -> Tensor | tuple[Tensor, LossStats]:
    """The mean over the directions of their cross-entropies."""
    positive = torch.stack([direction.positive for direction in directions])
    lse = torch.stack([direction.negative_lse for direction in directions])
    per_direction = terms.softplus(lse - positive)
    if label_smoothing > 0.0:
        n = positive.shape[1]
        total = torch.stack([direction.negative_total for direction in directions])
        per_direction = per_direction + label_smoothing * ((n - 1) * positive - total) / max(n, 1)
    loss = terms.reduce(per_direction.mean(0), reduction, sample_weight)
    if not return_stats:
        return loss
    largest = torch.stack([direction.negative_max for direction in directions])
    return loss, LossStats(
        lse=torch.logaddexp(lse, positive).detach(),
        positive_similarity=(positive[0] / logit_scale).detach(),
        accuracy=terms.accuracy(positive, largest),
    )
