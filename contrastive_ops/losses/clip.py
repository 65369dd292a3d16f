"""The CLIP loss: InfoNCE from images to texts and from texts to images, in one sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import promoted
from contrastive_ops.losses import terms
from contrastive_ops.losses.terms import LossStats
from contrastive_ops.ops import pair_contrast_sum, similarity_logsumexp


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    reduction: str = "mean",
    logit_bias: float | Tensor | None = None,
    output_dict: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Symmetric cross-entropy over the similarities of images and texts.

    .. math::
        s_{ij} = \mathrm{scale} \, \langle x_i, y_j \rangle, \qquad
        \ell_i = \tfrac12 \Big[ \mathrm{softplus}\Big(\log \sum_{j \in N(i)} e^{s_{ij}} - s_{ii}\Big)
                              + \mathrm{softplus}\Big(\log \sum_{j \in N(i)} e^{s_{ji}} - s_{ii}\Big) \Big]

    :math:`N(i)` are all pairs but i and, with ids, but the pairs of the same id. This is the mean of
    ``cross_entropy(s, arange(N))`` and ``cross_entropy(s.T, arange(N))``, exact where those round to 0; with
    ``normalize=False`` it is open_clip's ``ClipLoss``.

    Parameters
    ----------
    image_features, text_features : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
        Row i of one is the positive of row i of the other.
    logit_scale : float or Tensor of one element
        Multiplier of the similarities, already exponentiated. Positive: checked of floats and of CPU tensors. A tensor
        receives its gradient.
    ids : integer Tensor of shape (N,), optional
        Pairs of the same id are not negatives of each other.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the pairs in the sum; the mean divides by their sum.
    label_smoothing : float in [0, 1)
        Mass spread evenly over the columns that take part, the positive included.
    normalize : bool
        Cosine similarity; False takes the dot product as it is.
    reduction : "mean", "sum" or "none"
    logit_bias : float or Tensor of one element, optional
        What open_clip's models with a bias pass. One number added to all logits changes nothing: it is in no result,
        and its gradient is 0.
    output_dict : bool
        False: this too is open_clip's, whose loss returns a dictionary for True.
    return_stats : bool
        Also return `LossStats`, from the same sweep.
    backend : str
        See `similarity_logsumexp`.

    Returns
    -------
    Tensor of shape (), or (N,) for ``reduction="none"`` (unweighted), float32 (float64 for float64)
        With `return_stats`, a pair of it and `LossStats`: `lse` of shape (2, N), images then texts,
        `positive_similarity` of shape (N,), `accuracy` the mean of both directions.

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Extra memory is O(N D). A pair without negatives contributes 0 with zero gradient and stays in the mean.
    Gradients reach both features, `logit_scale` and `sample_weight`.

    References
    ----------
    Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, arXiv:2103.00020.

    Examples
    --------
    >>> clip_loss(torch.eye(3), torch.eye(3), 1.0)
    tensor(0.5514)
    """
    terms.check_options(reduction=reduction, normalize=normalize, label_smoothing=label_smoothing)
    checks.features("image_features", image_features)
    checks.features("text_features", text_features)
    image_features, text_features = promoted(image_features, text_features)
    checks.same_kind("text_features", text_features, "image_features", image_features)
    checks.same_shape("text_features", text_features, "image_features", image_features)
    n, device = image_features.shape[0], image_features.device
    checks.temperature("logit_scale", logit_scale, device)
    if logit_bias is not None:
        checks.logit_bias(logit_bias, device)
    checks.no_dict(output_dict)
    checks.samples(ids, sample_weight, n, device, rows_of="image_features")

    scale = terms.flat(logit_scale, image_features)
    diagonal = torch.arange(n, device=device, dtype=torch.int32)
    plain = label_smoothing == 0.0 and sample_weight is None and logit_bias is None and not return_stats
    if plain and normalize and reduction != "none":
        loss = pair_contrast_sum(
            image_features,
            text_features,
            scale,
            1.0,
            exclude=diagonal,
            row_ids=ids,
            cols=True,
            divisor=2 * terms.rows_of_mean(n, reduction),
            backend=backend,
        )
        if loss is not None:
            return loss
    image_features, image_scale = terms.with_logit_scale(image_features, scale, 1.0, normalize, backend)
    text_features, text_scale = terms.with_norm_scale(text_features, normalize, backend)
    negatives = similarity_logsumexp(
        image_features,
        text_features,
        row_scale=image_scale,
        col_scale=text_scale,
        exclude=diagonal,
        row_ids=ids,
        col_ids=ids,
        cols=True,
        backend=backend,
    )
    positive = negatives.excluded_logit
    spread = None
    if label_smoothing > 0.0:
        image, text = (image_features, image_scale), (text_features, text_scale)
        uniform = sum(
            terms.uniform_similarity(x, y, x_scale, y_scale, positive, diagonal, ids, ids)
            for (x, x_scale), (y, y_scale) in ((image, text), (text, image))
        )
        # without negatives the positive is the mean: exactly 0, where the difference of two roundings is not
        spread = label_smoothing * torch.where(negatives.row_lse > -torch.inf, positive - uniform / 2, 0.0)
    lse = (negatives.row_lse, negatives.col_lse)
    loss = terms.cross_entropy(
        positive, lse, spread=spread, reduction=reduction, sample_weight=sample_weight, backend=backend
    )
    if isinstance(logit_bias, Tensor):  # a gradient, which DDP waits for
        loss = loss + 0.0 * logit_bias.to(loss.dtype).sum()
    if not return_stats:
        return loss
    return loss, LossStats(
        lse=torch.logaddexp(torch.stack(lse), positive).detach(),
        positive_similarity=(positive / scale).detach(),
        accuracy=terms.accuracy(positive.expand(2, n), torch.stack([negatives.row_max, negatives.col_max])),
    )
