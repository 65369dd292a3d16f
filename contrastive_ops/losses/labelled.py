"""NT-Xent with labels: each positive pair has a softmax of its own, against the negatives of its anchor alone."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.losses import terms
from contrastive_ops.ops import similarity_logsumexp, similarity_sum


def nt_xent_labelled(
    features: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    over: str = "pairs",
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""NT-Xent of samples with labels: every pair of the same label is a positive, and not in another's denominator.

    .. math::
        \ell_{ap} = \mathrm{softplus}\Big(\log \sum_{n \in N(a)} e^{s_{an}} - s_{ap}\Big), \qquad
        s_{ab} = \frac{\langle z_a, z_b \rangle}{\tau}

    for the ordered pairs (a, p) of equal labels, with :math:`N(a)` the samples of other labels. It is
    pytorch-metric-learning's ``NTXentLoss``; `supcon` has all other positives in the denominator of each.

    Parameters
    ----------
    features : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
    labels : integer Tensor of shape (N,)
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the anchors, each for all its pairs; the mean divides by the sum of the weights of what it is over.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
    over : "pairs" or "anchors"
        What the mean is over: all positive pairs, or the anchors, each with the mean over its positives.
    normalize : bool
        Cosine similarity; False takes the dot product as it is.
    reduction : "mean", "sum" or "none"
        "sum" is over what the mean is over; "none" has the mean of each anchor over its positives.
    backend : str
        See `similarity_logsumexp`.

    Returns
    -------
    Tensor of shape (), or (N,) for ``reduction="none"`` (unweighted), float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Two sweeps; extra memory is O(N D). Rows are sorted by label, so that the sweep over the positives visits only the
    tiles of equal labels. An anchor without positives, or without negatives, contributes 0 with zero gradient.

    References
    ----------
    Sohn: Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NeurIPS 2016. Musgrave, Belongie, Lim:
    PyTorch Metric Learning, arXiv:2008.09164.

    Examples
    --------
    >>> nt_xent_labelled(torch.eye(4), torch.tensor([0, 0, 1, 1]), temperature=1.0)
    tensor(1.0986)
    """
    terms.check_options(reduction=reduction, normalize=normalize, over=over)
    checks.features("features", features)
    n, device = features.shape[0], features.device
    checks.integer_vector("labels", labels, n, device, rows_of="features")
    checks.samples(None, sample_weight, n, device, rows_of="features")
    checks.temperature("temperature", temperature, device)

    order = labels.argsort(stable=True)
    labels = labels[order]
    temperature = terms.flat(temperature, features)
    # both sides of the symmetric product carry the root of the logit scale
    z, scale = terms.with_logit_scale(features[order], temperature, -0.5, normalize, backend)
    negatives = similarity_logsumexp(z, row_scale=scale, row_ids=labels, backend=backend)
    pairs = similarity_sum(
        z,
        z,
        row_scale=-scale,
        col_scale=scale,
        row_bias=negatives.row_lse,
        exclude=torch.arange(n, device=device, dtype=torch.int32),
        row_ids=labels,
        col_ids=labels,
        ids="restrict",
        backend=backend,
    )
    positives = (terms.group_sizes(labels) - 1).to(pairs.row_sum.dtype)
    per_anchor = pairs.row_sum / positives.clamp(min=1.0)
    if reduction == "none":
        return per_anchor[order.argsort()]
    weight = None if sample_weight is None else sample_weight[order]
    if over == "pairs":  # of each anchor as many as it has positives
        weight = positives if weight is None else positives * weight
    return terms.reduce(per_anchor, reduction, weight)
