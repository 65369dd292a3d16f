"""Supervised contrastive loss: all samples of the anchor's class are its positives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import promoted, statistics_dtype
from contrastive_ops.losses import terms
from contrastive_ops.losses.terms import LossStats
from contrastive_ops.ops import (
    Classes,
    SimilarityLSE,
    by_class,
    class_contrast,
    class_contrast_sum,
    in_order,
    matches,
    similarity_logsumexp,
    similarity_sum,
    with_class_mean,
)


def supcon(
    features: Tensor,
    labels: Tensor,
    *,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    sample_weight: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    variant: str = "out",
    empty: str = "zero",
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Supervised contrastive loss over the samples (or all views of the samples) of a batch.

    .. math::
        \mathrm{out:} \quad \ell_a = \log \sum_{b \ne a} e^{s_{ab}} - \frac{1}{|P(a)|} \sum_{p \in P(a)} s_{ap}
        \qquad
        \mathrm{in:} \quad \ell_a = \log \sum_{b \ne a} e^{s_{ab}}
                    - \log \Big( \frac{1}{|P(a)|} \sum_{p \in P(a)} e^{s_{ap}} \Big)

    with :math:`s_{ab} = \langle z_a, z_b \rangle / \tau` and :math:`P(a)` the other rows of the anchor's class. With
    keys, b runs over all keys, and :math:`P(a)` are the keys of the anchor's class.
    Computed as :math:`\mathrm{softplus}(\mathrm{lse}_N - \mathrm{lse}_P)` plus what is left, so that it is exact
    where it is tiny.

    Parameters
    ----------
    features : Tensor of shape (N, D) or (N, V, D), float32 / bfloat16 / float16 / float64
        Samples, or V views of each sample; every view is an anchor.
    labels : integer Tensor of shape (N,), or Tensor of shape (N, C)
        Classes. Unique labels with V = 2 views make NT-Xent. Samples with several labels have an entry for each of C,
        not 0 where they have it: rows that share any are positives of each other.
    keys : Tensor of shape (M, D), dtype of `features`, optional
        What the anchors are compared with in place of each other: a queue, captions, a gathered batch. A key is never
        left out for being the anchor itself.
    key_labels : integer Tensor of shape (M,), or Tensor of shape (M, C), optional
        Classes of the keys, in the form of `labels`; with `keys`.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the samples in the sum, each for all its views; the mean divides by their sum.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
    variant : "out" or "in"
        Whether the mean over the positives is taken outside or inside the logarithm.
    empty : "zero" or "drop"
        An anchor without positives, or without negatives, contributes 0 with zero gradient; "drop" also leaves it
        out of the mean's denominator (and so its weight), as pytorch-metric-learning does.
    normalize : bool
        Cosine similarity; False takes the dot product as it is.
    reduction : "mean", "sum" or "none"
    return_stats : bool
        Also return `LossStats`, from the same sweeps.
    backend : str
        See `similarity_logsumexp`.

    Returns
    -------
    Tensor of shape (), or (N,) / (N, V) for ``reduction="none"`` (unweighted), float32 (float64 for float64)
        With `return_stats`, a pair of it and `LossStats` with tensors of that shape; the accuracy counts the anchors
        whose nearest row is of their class.

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Extra memory is O((N V + M) D). Rows and keys are sorted by label, so that the sweep over the positives visits only
    the tiles of equal labels; with several labels three sweeps visit all pairs. Gradients reach `features`, `keys`,
    `temperature` and `sample_weight`; keys that require none cost no products.

    References
    ----------
    Khosla et al.: Supervised Contrastive Learning, arXiv:2004.11362.

    Examples
    --------
    >>> supcon(torch.eye(4), torch.tensor([0, 0, 1, 1]), temperature=1.0)
    tensor(1.0986)
    """
    terms.check_options(reduction=reduction, normalize=normalize, variant=variant, empty=empty)
    checks.tensor("features", features)
    checks.features("features", features, expected="(N, D)" if features.dim() < 3 else "(N, V, D)")
    checks.labels("labels", labels)
    several = labels.dim() > 1
    if several:
        checks.label_sets("labels", labels, "features", features)
    else:
        checks.integer_vector("labels", labels, features.shape[0], features.device, rows_of="features")
    checks.both_or_neither("keys", keys, "key_labels", key_labels)
    if keys is not None and key_labels is not None:
        checks.keys(keys)
        features, keys = promoted(features, keys)
        checks.same_kind("keys", keys, "features", features)
        if several:
            checks.label_sets("key_labels", key_labels, "keys", keys, labels.shape[1])
        else:
            checks.integer_vector("key_labels", key_labels, keys.shape[0], keys.device, rows_of="keys")
    checks.samples(None, sample_weight, features.shape[0], features.device, rows_of="features")
    checks.temperature("temperature", temperature, features.device)

    shape = features.shape[:-1]

    def of_views(values: Tensor) -> Tensor:
        return values if features.dim() == 2 else values[:, None].expand(*shape, *values.shape[1:])

    x = features.reshape(-1, features.shape[-1])
    temperature = terms.flat(temperature, x)
    place: Tensor | slice = slice(None)  # of each anchor among those of the sweeps
    if several:
        sets = of_views(labels).reshape(x.shape[0], labels.shape[1])
        parts = _of_label_sets(x, sets, keys, key_labels, temperature, normalize, backend)
    else:
        label = of_views(labels).flatten()
        classes = by_class(label, x, backend)
        place, z = classes.inverse, in_order(x, classes)
        if keys is None or key_labels is None:
            parts = _among_themselves(z, classes, temperature, normalize, backend)
        else:
            parts = _against_keys(z, label[classes.order], keys, key_labels, temperature, normalize, backend)
    positives, negatives, mean, others = parts
    vectors = (negatives.row_lse, positives.row_lse, mean, others, variant == "in")
    if reduction == "none" or sample_weight is not None:
        per_row, invalid = (value[place].reshape(shape) for value in class_contrast(*vectors))
        weight = None if sample_weight is None else of_views(sample_weight)
        if weight is not None and empty == "drop":
            weight = weight.masked_fill(invalid, 0.0)
        loss = terms.reduce(per_row, reduction, weight)
    else:
        divisor = 1 if reduction == "sum" else None if empty == "drop" else max(x.shape[0], 1)
        loss = class_contrast_sum(*vectors, divisor=divisor, backend=backend)
    if not return_stats:
        return loss

    def in_given_order(values: Tensor) -> Tensor:
        return values.detach()[place].reshape(shape)

    return loss, LossStats(
        lse=in_given_order(torch.logaddexp(positives.row_lse, negatives.row_lse)),
        positive_similarity=in_given_order(mean * temperature),
        accuracy=terms.accuracy(positives.row_max, negatives.row_max),
    )


class Parts(NamedTuple):
    """Of every anchor, in the order of their classes: its positives, its negatives.

    mean : logit of the positives, 0 without any
    others : how many positives
    """

    positives: SimilarityLSE
    negatives: SimilarityLSE
    mean: Tensor
    others: Tensor


def _among_themselves(z: Tensor, classes: Classes, temperature: float | Tensor, normalize: bool, backend: str) -> Parts:
    # both sides of the symmetric product carry the root of the logit scale
    z, row_scale = terms.with_logit_scale(z, temperature, -0.5, normalize, backend)
    (z, row_scale), (other_z, other_scale), mean = with_class_mean(z, row_scale, classes, backend)
    positives = similarity_logsumexp(
        z,
        row_scale=row_scale,
        row_ids=classes.group,
        ids="restrict",
        exclude=classes.place,
        backend=backend,
    )
    negatives = similarity_logsumexp(other_z, row_scale=other_scale, row_ids=classes.group, backend=backend)
    return Parts(positives, negatives, mean, classes.others)


def _against_keys(
    z: Tensor,
    label: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    backend: str,
) -> Parts:
    classes = by_class(key_labels, keys, backend)
    group, size = matches(key_labels[classes.order], label)
    keys = in_order(keys, classes)
    z, row_scale = terms.with_logit_scale(z, temperature, -1.0, normalize, backend)
    keys, col_scale = terms.with_norm_scale(keys, normalize, backend)
    cols = terms.scaled(None if col_scale is None else col_scale[:, None], keys.to(statistics_dtype(keys)))
    total = terms.total_of_group(z, cols, row_scale, group, size, classes.group)
    others = size.to(cols.dtype)
    # still in order, so that tiles are skipped: a label that no key has comes between two that some have
    row_ids, col_ids = 2 * group - (size == 0).int(), 2 * classes.group
    positives, negatives = (
        similarity_logsumexp(
            z,
            keys,
            row_scale=row_scale,
            col_scale=col_scale,
            row_ids=row_ids,
            col_ids=col_ids,
            ids=ids,
            backend=backend,
        )
        for ids in ("restrict", "exclude")
    )
    return Parts(positives, negatives, total / others.clamp(min=1.0), others)


def _of_label_sets(
    x: Tensor,
    sets: Tensor,
    keys: Tensor | None,
    key_sets: Tensor | None,
    temperature: float | Tensor,
    normalize: bool,
    backend: str,
) -> Parts:
    """How many labels two samples share is a product of their sets: the guide that says who is a positive."""
    sets = (sets != 0).to(x.dtype)
    if keys is None or key_sets is None:
        # both sides of the symmetric product carry the root of the logit scale
        x, row_scale = terms.with_logit_scale(x, temperature, -0.5, normalize, backend)
        y, other_sets, col_scale = None, None, None
        guide: Any = sets
        exclude = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    else:
        x, row_scale = terms.with_logit_scale(x, temperature, -1.0, normalize, backend)
        y, col_scale = terms.with_norm_scale(keys, normalize, backend)
        other_sets, exclude = (key_sets != 0).to(x.dtype), None
        guide = (sets, other_sets)

    def swept(op: Callable[..., Any], **options: Any) -> Any:
        return op(
            x,
            y,
            row_scale=row_scale,
            col_scale=col_scale,
            exclude=exclude,
            guide=guide,
            ceiling=0.5,
            backend=backend,
            **options,
        )

    total = swept(similarity_sum, of="identity", keep="above").row_sum
    others = similarity_sum(sets, other_sets, of="step", exclude=exclude, backend=backend).row_sum
    return Parts(
        positives=swept(similarity_logsumexp, keep="above"),
        negatives=swept(similarity_logsumexp),
        mean=total / others.clamp(min=1.0),
        others=others,
    )
