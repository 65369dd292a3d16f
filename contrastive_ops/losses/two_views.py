"""Losses over two views of every sample, each view an anchor against both views of all other samples.

NT-Xent and DCL are two formulas over one reduction: per anchor, the log-sum-exp of its negatives and the similarity
of its positive.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import promoted, without_autocast
from contrastive_ops.losses import terms
from contrastive_ops.losses.terms import LossStats
from contrastive_ops.ops import pair_contrast_sum, similarity_logsumexp


class Views(NamedTuple):
    """Both views, one after the other, and who is left out of whose negatives."""

    z: Tensor
    temperature: float | Tensor
    exclude: Tensor  # the positive
    row_ids: Tensor


class Anchors(NamedTuple):
    """Vectors of shape (2N,), the anchors of view 1, then those of view 2."""

    negative_lse: Tensor
    negative_max: Tensor
    positive: Tensor  # logit
    temperature: float | Tensor
    weight: Tensor | None

    @property
    def similarity(self) -> Tensor:
        """That of the positive, without the temperature."""
        return self.positive * self.temperature


def _views(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    ids: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    normalize: bool,
) -> Views:
    """Checked."""
    terms.check_options(reduction=reduction, normalize=normalize)
    checks.features("z1", z1)
    checks.features("z2", z2)
    z1, z2 = promoted(z1, z2)
    checks.same_kind("z2", z2, "z1", z1)
    checks.same_shape("z2", z2, "z1", z1)
    checks.temperature("temperature", temperature, z1.device)
    checks.samples(ids, sample_weight, z1.shape[0], z1.device, rows_of="z1")
    with without_autocast(z1):  # its rule for cat fails on float16 tensors on CPU
        z = torch.cat([z1, z2])
    anchor = torch.arange(z.shape[0], device=z.device, dtype=torch.int32)
    # an id of its own takes each anchor out of its own negatives
    row_ids = anchor if ids is None else ids.repeat(2)
    return Views(z, terms.flat(temperature, z), anchor.roll(z1.shape[0]), row_ids)


def _anchors(views: Views, sample_weight: Tensor | None, normalize: bool, backend: str) -> Anchors:
    # both sides of the symmetric product carry the root of the logit scale
    z, row_scale = terms.with_logit_scale(views.z, views.temperature, -0.5, normalize, backend)
    negatives = similarity_logsumexp(
        z, row_scale=row_scale, exclude=views.exclude, row_ids=views.row_ids, backend=backend
    )
    weight = None if sample_weight is None else sample_weight.repeat(2)
    return Anchors(negatives.row_lse, negatives.row_max, negatives.excluded_logit, views.temperature, weight)


def _finish(loss: Tensor, anchors: Anchors, return_stats: bool) -> Tensor | tuple[Tensor, LossStats]:
    if not return_stats:
        return loss
    return loss, LossStats(
        lse=torch.logaddexp(anchors.negative_lse, anchors.positive).detach(),
        positive_similarity=anchors.similarity.detach(),
        accuracy=terms.accuracy(anchors.positive, anchors.negative_max),
    )


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""NT-Xent, the loss of SimCLR: each view must find the other view of its sample among all 2N - 1 others.

    .. math::
        \ell_a = \mathrm{softplus}\Big(\log \sum_{b \in N(a)} e^{\langle z_a, z_b \rangle / \tau}
                 - \langle z_a, z_{a^+} \rangle / \tau\Big), \qquad a = 1 \dots 2N

    :math:`N(a)` are both views of all other samples and, with ids, of another id; :math:`a^+` is the other view of the
    same sample.

    Parameters
    ----------
    z1, z2 : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
        Row i of both are two views of sample i.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
    ids : integer Tensor of shape (N,), optional
        Samples of the same id are not negatives of each other.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the samples in the sum, each for both views; the mean divides by their sum.
    normalize : bool
        Cosine similarity; False takes the dot product as it is.
    reduction : "mean", "sum" or "none"
    return_stats : bool
        Also return `LossStats`, from the same sweep.
    backend : str
        See `similarity_logsumexp`.

    Returns
    -------
    Tensor of shape (), or (2N,) for ``reduction="none"`` (unweighted), anchors of `z1`, then `z2`; float32 (float64)
        With `return_stats`, a pair of it and `LossStats` with vectors of shape (2N,).

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Extra memory is O(N D); only the upper triangle of the 2N x 2N similarities is computed. A sample without negatives
    contributes 0 with zero gradient and stays in the mean. Gradients reach both views, `temperature` and
    `sample_weight`.

    References
    ----------
    Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning, arXiv:2002.05709.

    Examples
    --------
    >>> nt_xent(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.9048)
    """
    views = _views(z1, z2, temperature, ids, sample_weight, reduction, normalize)
    if normalize and reduction != "none" and sample_weight is None and not return_stats:
        z, temperature, exclude, row_ids = views
        divisor = terms.rows_of_mean(z.shape[0], reduction)
        loss = pair_contrast_sum(
            z, None, temperature, -0.5, exclude=exclude, row_ids=row_ids, divisor=divisor, backend=backend
        )
        if loss is not None:
            return loss
    anchors = _anchors(views, sample_weight, normalize, backend)
    lse = (anchors.negative_lse,)
    loss = terms.cross_entropy(
        anchors.positive, lse, reduction=reduction, sample_weight=anchors.weight, backend=backend
    )
    return _finish(loss, anchors, return_stats)


def dcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Decoupled contrastive loss: NT-Xent without the positive in its denominator.

    .. math::
        \ell_a = \log \sum_{b \in N(a)} e^{\langle z_a, z_b \rangle / \tau} - \langle z_a, z_{a^+} \rangle / \tau

    :math:`N(a)` are both views of all other samples and, with ids, of another id; :math:`a^+` is the other view of the
    same sample. It may be negative. This is the ``DCLLoss`` of lightly from 1.5.21 on; earlier ones add up two
    log-sum-exps, of the negatives of each view.

    Parameters
    ----------
    z1, z2 : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
        Row i of both are two views of sample i.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
    ids : integer Tensor of shape (N,), optional
        Samples of the same id are not negatives of each other.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the samples in the sum, each for both views; the mean divides by their sum.
    normalize : bool
        Cosine similarity; False takes the dot product as it is.
    reduction : "mean", "sum" or "none"
    return_stats : bool
        Also return `LossStats`, from the same sweep.
    backend : str
        See `similarity_logsumexp`.

    Returns
    -------
    Tensor of shape (), or (2N,) for ``reduction="none"`` (unweighted), anchors of `z1`, then `z2`; float32 (float64)
        With `return_stats`, a pair of it and `LossStats` with vectors of shape (2N,).

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Extra memory is O(N D). A sample without negatives contributes 0 with zero gradient and stays in the mean.
    Gradients reach both views, `temperature` and `sample_weight`.

    References
    ----------
    Yeh et al.: Decoupled Contrastive Learning, arXiv:2110.06848.

    Examples
    --------
    >>> dcl(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.3863)
    """
    anchors = _anchors(
        _views(z1, z2, temperature, ids, sample_weight, reduction, normalize), sample_weight, normalize, backend
    )
    per_anchor = _decoupled(anchors, anchors.positive)
    return _finish(terms.reduce(per_anchor, reduction, anchors.weight), anchors, return_stats)


def dclw(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    sigma: float = 0.5,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Decoupled contrastive loss that weights hard positives up.

    .. math::
        \ell_a = \log \sum_{b \in N(a)} e^{\langle z_a, z_b \rangle / \tau}
                 - w_a \langle z_a, z_{a^+} \rangle / \tau, \qquad
        w_i = 2 - N \, \mathrm{softmax}_i(\langle z_i, z_{i^+} \rangle / \sigma)

    :math:`N(a)` and :math:`a^+` are those of `dcl`. The weights are detached; their mean is 1. This is the
    ``DCLWLoss`` of lightly from 1.5.21 on; earlier ones differ as those of `dcl` do.

    Parameters
    ----------
    z1, z2 : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
        Row i of both are two views of sample i.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
    sigma : float
        Temperature of the weights, positive.
    ids : integer Tensor of shape (N,), optional
        Samples of the same id are not negatives of each other.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the samples in the sum, each for both views; the mean divides by their sum.
        The weights of the positives stay those of the batch, whatever these are.
    normalize : bool
        Cosine similarity; False takes the dot product as it is.
    reduction : "mean", "sum" or "none"
    return_stats : bool
        Also return `LossStats`, from the same sweep.
    backend : str
        See `similarity_logsumexp`.

    Returns
    -------
    Tensor of shape (), or (2N,) for ``reduction="none"`` (unweighted), anchors of `z1`, then `z2`; float32 (float64)
        With `return_stats`, a pair of it and `LossStats` with vectors of shape (2N,).

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Extra memory is O(N D). A sample without negatives contributes 0 with zero gradient and stays in the mean.
    Gradients reach both views, `temperature` and `sample_weight`, none flows through the weights of the positives.

    References
    ----------
    Yeh et al.: Decoupled Contrastive Learning, arXiv:2110.06848.

    Examples
    --------
    >>> dclw(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.3863)
    """
    terms.check_options(sigma=sigma)
    anchors = _anchors(
        _views(z1, z2, temperature, ids, sample_weight, reduction, normalize), sample_weight, normalize, backend
    )
    n = z1.shape[0]
    weight = 2.0 - n * (anchors.similarity[:n].detach() / sigma).softmax(0)
    per_anchor = _decoupled(anchors, weight.repeat(2) * anchors.positive)
    return _finish(terms.reduce(per_anchor, reduction, anchors.weight), anchors, return_stats)


def _decoupled(anchors: Anchors, positive: Tensor) -> Tensor:
    """negative_lse - positive; an anchor without negatives has 0, not -inf."""
    empty = anchors.negative_lse == -torch.inf
    return torch.where(empty, 0.0, anchors.negative_lse - positive)
