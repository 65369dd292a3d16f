"""The GRAM loss: a softmax over the volumes that anchors span with tuples of other modalities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.losses import terms, volume
from contrastive_ops.losses.terms import LossStats
from contrastive_ops.ops import gramian_volume, volume_logsumexp


class Directions(NamedTuple):
    """Logits of the rows, of the columns, or of both: each one's positive and what is known of its negatives.

    Of every direction a vector of shape (N,); the positives are those of all.
    """

    positive: Tensor
    negative_lse: tuple[Tensor, ...]
    negative_max: tuple[Tensor, ...]
    negative_total: tuple[Tensor, ...]  # their sum; none without label smoothing


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
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
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
    terms.check_options(
        reduction=reduction, normalize=normalize, label_smoothing=label_smoothing, detach_others=detach_others
    )
    anchor, others = volume.checked(anchor, others)
    n, device = anchor.shape[0], anchor.device
    checks.temperature("temperature", temperature, device)
    if sample_weight is not None:
        checks.weights("sample_weight", sample_weight, n, device, rows_of="anchor")

    logit_scale = terms.inverse(temperature, anchor)
    directions_of = partial(
        _directions, logit_scale=logit_scale, normalize=normalize, totals=label_smoothing > 0.0, backend=backend
    )
    if detach_others:
        fixed = tuple(other.detach() for other in others)
        sweeps = [directions_of(anchor, fixed, cols=False), directions_of(anchor.detach(), others, rows=False)]
    else:
        sweeps = [directions_of(anchor, others)]
    return symmetric(sweeps, logit_scale, label_smoothing, sample_weight, reduction, return_stats, backend)


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
) -> Directions:
    """The rows, the columns, or both, from one sweep; the positives exactly, apart from it."""
    # unit vectors and not scales: the gradient of a volume is radial but for a small part, which is all that is left of
    # it. Projecting the whole float32 gradient keeps that part; the sum of two that are rounded apart loses it.
    vectors, anchor, tuples = volume.matched(anchor, others, normalize, backend)
    negatives = volume_logsumexp(
        anchor,
        tuples,
        row_scale=logit_scale,
        exclude=torch.arange(anchor.shape[0], device=anchor.device, dtype=torch.int32),
        rows=rows,
        cols=cols,
        totals=totals,
        backend=backend,
    )
    positive = -logit_scale * gramian_volume(vectors, backend=backend)
    of_rows = (negatives.row_lse, negatives.row_max, negatives.row_total)
    of_cols = (negatives.col_lse, negatives.col_max, negatives.col_total)
    lse, largest, total = zip(*([of_rows] * rows + [of_cols] * cols), strict=True)
    return Directions(positive, lse, largest, total if totals else ())


def symmetric(
    sweeps: Sequence[Directions],
    logit_scale: float | Tensor,
    label_smoothing: float,
    sample_weight: Tensor | None,
    reduction: str,
    return_stats: bool,
    backend: str,
) -> Tensor | tuple[Tensor, LossStats]:
    """The mean over the directions, as many in each sweep, of their cross-entropies."""
    losses = [
        terms.cross_entropy(
            of_sweep.positive,
            of_sweep.negative_lse,
            totals=of_sweep.negative_total,
            label_smoothing=label_smoothing,
            reduction=reduction,
            sample_weight=sample_weight,
            backend=backend,
        )
        for of_sweep in sweeps
    ]
    loss = losses[0] if len(losses) == 1 else sum(losses[1:], start=losses[0]) / len(losses)
    if not return_stats:
        return loss
    positive = sweeps[0].positive
    lse = torch.stack([lse for of_sweep in sweeps for lse in of_sweep.negative_lse])
    largest = torch.stack([largest for of_sweep in sweeps for largest in of_sweep.negative_max])
    return loss, LossStats(
        lse=torch.logaddexp(lse, positive).detach(),
        positive_similarity=(positive / logit_scale).detach(),
        accuracy=terms.accuracy(positive.expand_as(largest), largest),
    )
