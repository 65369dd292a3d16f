"""The SigLIP loss: every pair of an image and a text is a question of its own, match or no match."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import promoted
from contrastive_ops.losses import terms
from contrastive_ops.losses.terms import LossStats
from contrastive_ops.ops import similarity_logsumexp, similarity_sum, softplus


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    weight: str = "per_pair",
    normalize: bool = True,
    reduction: str = "mean",
    output_dict: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Pairwise sigmoid loss over the similarities of images and texts.

    .. math::
        s_{ij} = \mathrm{scale} \, \langle x_i, y_j \rangle + \mathrm{bias}, \qquad
        \ell_i = \sum_{j \in P(i)} w_i \, \mathrm{softplus}(-s_{ij}) + \sum_{j \in N(i)} \mathrm{softplus}(s_{ij})

    :math:`P(i)` is the text i, or with ids all texts of the image's id; :math:`N(i)` are the others. The mean over i is
    open_clip's ``SigLipLoss`` with ``normalize=False``: it divides by N, not by the number of pairs.

    Parameters
    ----------
    image_features, text_features : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
        Row i of one is a positive of row i of the other.
    logit_scale, logit_bias : float or Tensor of one element
        The scale is already exponentiated and positive: checked of floats and of CPU tensors. Tensors receive their
        gradients.
    ids : integer Tensor of shape (N,), optional
        Images and texts of the same id are positives of each other.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the :math:`\ell_i` in the sum; the mean divides by their sum.
    weight : "per_pair" or "per_anchor"
        :math:`w_i` is 1, or 1 over the number of positives of the image; then the loss is the mean of the sums over
        the texts of each image and over the images of each text.
    normalize : bool
        Cosine similarity; False takes the dot product as it is.
    reduction : "mean", "sum" or "none"
    output_dict : bool
        False: this is open_clip's, whose loss returns a dictionary for True.
    return_stats : bool
        Also return `LossStats`, for one more sweep without gradient.
    backend : str
        See `similarity_logsumexp`.

    Returns
    -------
    Tensor of shape (), or (N,) for ``reduction="none"`` (unweighted), float32 (float64 for float64)
        With `return_stats`, a pair of it and `LossStats` with vectors of shape (N,): of each image its own text, beside
        the texts of other ids.

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Extra memory is O(N D). One sweep, and with ids one more over the tiles of equal ids. Gradients reach both features,
    the scale, the bias and `sample_weight`. The paper starts from a scale of 10 and a bias of -10.

    References
    ----------
    Zhai, Mustafa, Kolesnikov, Beyer: Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343.

    Examples
    --------
    >>> siglip_loss(torch.eye(3), torch.eye(3), 10.0, -10.0)
    tensor(0.6932)
    """
    terms.check_options(reduction=reduction, normalize=normalize, weight=weight)
    checks.features("image_features", image_features)
    checks.features("text_features", text_features)
    image_features, text_features = promoted(image_features, text_features)
    checks.same_kind("text_features", text_features, "image_features", image_features)
    checks.same_shape("text_features", text_features, "image_features", image_features)
    n, device = image_features.shape[0], image_features.device
    checks.temperature("logit_scale", logit_scale, device)
    checks.logit_bias(logit_bias, device)
    checks.no_dict(output_dict)
    checks.samples(ids, sample_weight, n, device, rows_of="image_features")

    scale, bias = terms.flat(logit_scale, image_features), terms.flat(logit_bias, image_features)
    x, row_scale = terms.with_logit_scale(image_features, scale, 1.0, normalize, backend)
    y, col_scale = terms.with_norm_scale(text_features, normalize, backend)
    diagonal = torch.arange(n, device=device, dtype=torch.int32)
    both = weight == "per_anchor"
    negatives = similarity_sum(
        x,
        y,
        row_scale=row_scale,
        col_scale=col_scale,
        row_bias=bias,
        exclude=diagonal,
        row_ids=ids,
        col_ids=ids,
        cols=both,
        backend=backend,
    )
    positive = negatives.excluded_logit
    matches = softplus(-positive)
    if ids is not None:
        # sorted, so that the sweep visits only the tiles of equal ids
        order = ids.argsort(stable=True)
        others = similarity_sum(
            x[order],
            y[order],
            row_scale=-(row_scale[order] if isinstance(row_scale, Tensor) and row_scale.numel() > 1 else row_scale),
            col_scale=col_scale if col_scale is None else col_scale[order],
            row_bias=-bias,
            exclude=diagonal,
            row_ids=ids[order],
            col_ids=ids[order],
            ids="restrict",
            cols=both,
            backend=backend,
        )
        place = order.argsort()
        by_image = matches + others.row_sum[place]
        by_text = matches + others.col_sum[place] if both else by_image
    else:
        by_image = by_text = matches
    if both:
        share = 1.0 if ids is None else 1.0 / terms.group_sizes(ids).to(positive.dtype)
        rows, cols = share * by_image + negatives.row_sum, share * by_text + negatives.col_sum
        per_row = (rows + cols) / 2
    else:
        per_row = by_image + negatives.row_sum
    loss = terms.reduce(per_row, reduction, sample_weight)
    if not return_stats:
        return loss
    with torch.no_grad():
        swept = similarity_logsumexp(
            x,
            y,
            row_scale=row_scale,
            col_scale=col_scale,
            row_bias=bias,
            exclude=diagonal,
            row_ids=ids,
            col_ids=ids,
            backend=backend,
        )
    return loss, LossStats(
        lse=torch.logaddexp(swept.row_lse, positive).detach(),
        positive_similarity=((positive - bias) / scale).detach(),
        accuracy=terms.accuracy(positive, swept.row_max),
    )
