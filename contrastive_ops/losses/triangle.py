"""The TRIANGLE loss: a softmax over the areas of triangles whose corners are three modalities."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.losses import terms, volume
from contrastive_ops.losses.gram import Directions, symmetric
from contrastive_ops.losses.terms import LossStats
from contrastive_ops.ops import area_logsumexp, gramian_volume, of_parallelogram, unit


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
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Symmetric cross-entropy over the areas of triangles: a small area is a good match.

    .. math::
        z_{ij} = -\frac{A(a_i, x_j, y_j)}{\tau}, \qquad
        A(a, x, y) = \tfrac12 \sqrt{|u|^2 |w|^2 - \langle u, w \rangle^2}, \quad u = a - x, \; w = a - y

    The cross-entropies of rows and columns are those of `gram_loss`.

    Parameters
    ----------
    anchor, x, y : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
        Row i of all modalities is sample i.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
    label_smoothing : float in [0, 1)
        Mass spread evenly over all N candidates.
    squared : bool
        :math:`2 A^2` in place of the area, as the official code has it: smooth at 0.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the samples in the sum; the mean divides by their sum.
    normalize : bool
        Triangles of unit vectors; False takes the vectors as they are.
    reduction : "mean", "sum" or "none"
    return_stats : bool
        Also return `LossStats`, from the same sweep; a similarity is a negative area.
    backend : str
        See `area_logsumexp`.

    Returns
    -------
    Tensor of shape (), or (N,) for ``reduction="none"`` (unweighted), float32 (float64 for float64)
        With `return_stats`, a pair of it and `LossStats`: `lse` of shape (2, N), anchors then pairs,
        `positive_similarity` of shape (N,), `accuracy` the mean of both directions.

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Extra memory is O(N D) and a few tiles of areas, which backward computes again. Positives are computed
    from differences, without cancellation; the squared height of another triangle has an absolute error of about
    1e-7 :math:`|p - c|^2`, of its corners p less the mean c of all.
    Triangles without area (two equal corners, corners on a line) are the best match there is and have zero gradient.
    For N = 1 there are no negatives: the loss is 0 with zero gradient. Gradients reach all modalities, `temperature`
    and `sample_weight`.

    References
    ----------
    Grassucci, Cicchetti, Comminiello: A TRIANGLE Enables Multimodal Alignment Beyond Cosine Similarity,
    arXiv:2509.24734.

    Examples
    --------
    >>> triangle_loss(torch.eye(3), torch.eye(3), -torch.eye(3), temperature=1.0)
    tensor(0.6181)
    """
    terms.check_options(reduction=reduction, normalize=normalize, label_smoothing=label_smoothing, squared=squared)
    anchor, (x, y) = volume.checked(anchor, (x, y), ("x", "y"), to=torch.float32)  # distances, as in torch.cdist
    n, device = anchor.shape[0], anchor.device
    checks.temperature("temperature", temperature, device)
    if sample_weight is not None:
        checks.weights("sample_weight", sample_weight, n, device, rows_of="anchor")

    logit_scale = terms.inverse(temperature, anchor)
    a, b, c = terms.centred(*(unit(p, backend) if normalize else p for p in (anchor, x, y)))
    smoothed = label_smoothing > 0.0
    negatives = area_logsumexp(
        *(a, b, c),
        squared=squared,
        row_scale=logit_scale,
        exclude=torch.arange(n, device=device, dtype=torch.int32),
        cols=True,
        totals=smoothed,
        backend=backend,
    )
    area = gramian_volume(volume.stacked((a - b, a - c)), backend=backend)
    sweep = Directions(
        -logit_scale * of_parallelogram(area, squared),
        (negatives.row_lse, negatives.col_lse),
        (negatives.row_max, negatives.col_max),
        (negatives.row_total, negatives.col_total) if smoothed else (),
    )
    return symmetric([sweep], logit_scale, label_smoothing, sample_weight, reduction, return_stats, backend)
