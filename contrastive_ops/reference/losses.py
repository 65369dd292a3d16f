"""The naive twin of every loss: dense, written from the paper, differentiable to any order, float64-capable.

Nothing is shared with the fused losses but the formula. Rows without positives or without negatives contribute 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _unit(x: Tensor, normalize: bool) -> Tensor:
    if not normalize:
        return x
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, torch.inf)  # a zero row stays zero, with zero gradient


def _reduce(per_row: Tensor, reduction: str, sample_weight: Tensor | None = None) -> Tensor:
    if reduction == "none":
        return per_row
    weight = torch.ones_like(per_row) if sample_weight is None else sample_weight.expand_as(per_row)
    total, mass = (weight * per_row).sum(), weight.sum()
    return total if reduction == "sum" else total / mass.masked_fill(mass == 0, 1.0)


def _cross_entropy(logits: Tensor, target: Tensor, out: Tensor, label_smoothing: float) -> Tensor:
    """Row-wise cross-entropy against `target`; `out` marks the pairs that do not take part."""
    out = out.scatter(1, target[:, None], False)
    masked = logits.masked_fill(out, -torch.inf)
    log_p = masked.log_softmax(1)
    of_target = log_p.gather(1, target[:, None]).squeeze(1)
    of_all = log_p.masked_fill(out, 0.0).sum(1) / (~out).sum(1)
    return -(1 - label_smoothing) * of_target - label_smoothing * of_all


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = None,
    target: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    label_smoothing: float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy over the N x M logits, and those of the negatives that each query has for itself."""
    if target is None:
        target = torch.arange(len(query), device=query.device)
    logits = _unit(query, normalize) @ _unit(key, normalize).T
    if negatives is not None:
        own = torch.einsum("nd,nhd->nh", _unit(query, normalize), _unit(negatives, normalize))
        logits = torch.cat([logits, own], 1)
    logits = logits / (temperature.reshape(-1, 1) if isinstance(temperature, Tensor) else temperature)
    out = torch.zeros_like(logits, dtype=torch.bool)
    if query_ids is not None and key_ids is not None:
        out[:, : len(key)] = query_ids[:, None] == key_ids[None, :]
    return _reduce(_cross_entropy(logits, target, out, label_smoothing), reduction, sample_weight)


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
) -> Tensor:
    """Half of the cross-entropy over the rows and half of that over the columns of the N x N logits."""
    logits = logit_scale * (_unit(image_features, normalize) @ _unit(text_features, normalize).T)
    logits = logits if logit_bias is None else logits + logit_bias
    diagonal = torch.arange(len(logits), device=logits.device)
    out = torch.zeros_like(logits, dtype=torch.bool) if ids is None else ids[:, None] == ids[None, :]
    rows = _cross_entropy(logits, diagonal, out, label_smoothing)
    cols = _cross_entropy(logits.T, diagonal, out.T, label_smoothing)
    return _reduce((rows + cols) / 2, reduction, sample_weight)


def _equal(ids: Tensor | None, like: Tensor) -> Tensor:
    """Which of N x N samples are not negatives of each other."""
    ids = torch.arange(len(like), device=like.device) if ids is None else ids
    return ids[:, None] == ids[None, :]


def _two_views(
    z1: Tensor, z2: Tensor, temperature: float | Tensor, ids: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The 2N x 2N logits, which of them are no negatives, and where the positives are."""
    z = _unit(torch.cat([z1, z2]), normalize)
    positive = torch.arange(2 * len(z1), device=z.device).roll(len(z1))
    return z @ z.T / temperature, _equal(ids, z1).repeat(2, 2), positive


def _twice(sample_weight: Tensor | None) -> Tensor | None:
    return None if sample_weight is None else sample_weight.repeat(2)


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the 2N x 2N logits without their diagonal."""
    logits, out, positive = _two_views(z1, z2, temperature, ids, normalize)
    logits = logits.masked_fill(out.scatter(1, positive[:, None], False), -torch.inf)
    return _reduce(F.cross_entropy(logits, positive, reduction="none"), reduction, _twice(sample_weight))


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
) -> Tensor:
    """DCL with weights 2 - N softmax(similarity / sigma) on the positives."""
    similarity = (_unit(z1, normalize) * _unit(z2, normalize)).sum(1).detach()
    weight = 2 - len(z1) * (similarity / sigma).softmax(0)
    per_anchor = _decoupled(z1, z2, temperature, weight.repeat(2), ids, normalize)
    return _reduce(per_anchor, reduction, _twice(sample_weight))


def dcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The positive leaves the denominator."""
    per_anchor = _decoupled(z1, z2, temperature, torch.ones_like(z1[:, 0]).repeat(2), ids, normalize)
    return _reduce(per_anchor, reduction, _twice(sample_weight))


def _decoupled(
    z1: Tensor, z2: Tensor, temperature: float | Tensor, weight: Tensor, ids: Tensor | None, normalize: bool
) -> Tensor:
    logits, out, positive = _two_views(z1, z2, temperature, ids, normalize)
    empty = out.all(1)  # no negatives
    lse = logits.masked_fill(out & ~empty[:, None], -torch.inf).logsumexp(1)
    return (lse - weight * logits.gather(1, positive[:, None]).squeeze(1)).masked_fill(empty, 0.0)


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
) -> Tensor:
    """The printed formula, with the masks of the positives and of what there is: without keys all but the anchor."""
    shape, singles = features.shape[:-1], [1] * (features.dim() - 2)
    z = _unit(features.flatten(0, -2), normalize)
    of_label = labels.shape[1:]
    label = labels.reshape(-1, *singles, *of_label).expand(*shape, *of_label).flatten(0, len(shape) - 1)
    if keys is None or key_labels is None:
        keys, key_labels = z, label
        others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    else:
        keys = _unit(keys, normalize)
        others = torch.ones(len(z), len(keys), dtype=torch.bool, device=z.device)
    logits = z @ keys.T / temperature
    if labels.dim() > 1:
        label, key_labels = ((of != 0).double() for of in (label, key_labels))
        same = (label @ key_labels.T > 0) & others
    else:
        same = (label[:, None] == key_labels[None, :]) & others
    valid = same.any(1) & (same != others).any(1)
    log_p = logits - logits.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
    size = same.sum(1).clamp(min=1)
    if variant == "out":
        per_row = -log_p.masked_fill(~same, 0.0).sum(1) / size
    else:
        per_row = size.to(z.dtype).log() - log_p.masked_fill(~(same | ~valid[:, None]), -torch.inf).logsumexp(1)
    per_row, valid = per_row.masked_fill(~valid, 0.0).reshape(shape), valid.reshape(shape)
    weight = torch.ones_like(per_row) if sample_weight is None else sample_weight.reshape(-1, *singles).expand(shape)
    return _reduce(per_row, reduction, weight * valid if empty == "drop" else weight)


def nt_xent_labelled(
    features: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    over: str = "pairs",
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """For each positive pair the cross-entropy of its logit and those of the anchor's negatives."""
    z = _unit(features, normalize)
    logits = z @ z.T / temperature
    same = labels[:, None] == labels[None, :]
    positive = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    none = same.all(1)[:, None]
    lse = logits.masked_fill(same & ~none, -torch.inf).logsumexp(1, keepdim=True)
    of_pairs = (torch.logaddexp(logits, lse) - logits).masked_fill(~positive | none, 0.0)
    weight = torch.ones_like(of_pairs[:, 0]) if sample_weight is None else sample_weight
    if over == "pairs" and reduction != "none":
        weight = (weight[:, None] * positive)[positive]
        return _reduce(of_pairs[positive], reduction, weight)
    return _reduce(of_pairs.sum(1) / positive.sum(1).clamp(min=1), reduction, weight)


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
) -> Tensor:
    """Binary cross-entropy of every pair: 1 for those that belong together, 0 for the others."""
    logits = logit_scale * (_unit(image_features, normalize) @ _unit(text_features, normalize).T) + logit_bias
    match = _equal(ids, image_features)
    positives, negatives = (-F.logsigmoid(sign * logits) for sign in (1, -1))
    if weight == "per_pair":
        return _reduce(positives.where(match, negatives).sum(1), reduction, sample_weight)
    per_anchor = positives.where(match, 0.0) / match.sum(1) + negatives.masked_fill(match, 0.0)
    return _reduce((per_anchor.sum(1) + per_anchor.sum(0)) / 2, reduction, sample_weight)


def mw_loss(
    query: Tensor,
    key: Tensor,
    *,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    compare: str = "all",
    temperature: float | Tensor = 0.01,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Every negative against every positive, N x N x M of them, or against that of its own query."""
    target = torch.arange(len(query), device=query.device) if target is None else target.long()
    logits = _unit(query, normalize) @ _unit(key, normalize).T / temperature
    positive = logits.gather(1, target[:, None])
    out = torch.zeros_like(logits, dtype=torch.bool).scatter(1, target[:, None], True)
    if query_ids is not None and key_ids is not None:
        out = out | (query_ids[:, None] == key_ids)
    gap = logits[:, None] - (positive.T if compare == "all" else positive)[..., None]
    return _reduce(-F.logsigmoid(-gap).masked_fill(out[:, None], 0.0).sum((1, 2)), reduction)
