"""The naive twins of the losses over several views and of those on distances: dense, written from the papers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor

from contrastive_ops.reference import losses
from contrastive_ops.reference.losses import _equal, _reduce, _unit


def _logits(views: Tensor, temperature: float | Tensor, normalize: bool) -> list[list[Tensor]]:
    """logits[l][m] are the N x N logits of view l against view m."""
    z = _unit(views, normalize)
    return [[x @ y.T / temperature for y in z] for x in z]


def mv_infonce(
    views: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    include_same_view: bool = True,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """log(D / A): A over the ordered pairs of views of an instance, D over all pairs of an own view and another row."""
    logits, same = _logits(views, temperature, normalize), _equal(ids, views[0])
    pairs = list(permutations(range(len(views)), 2))
    numerator = torch.stack([logits[a][b].diagonal() for a, b in pairs], dim=1)
    others = same & ~_equal(None, views[0])  # of the same id
    denominator = [logits[a][b].masked_fill(others, -torch.inf) for a, b in pairs]
    if include_same_view:
        denominator += [logits[a][a].masked_fill(same, -torch.inf) for a in range(len(views))]
    per_instance = torch.cat(denominator, dim=1).logsumexp(1) - numerator.logsumexp(1)
    return _reduce(per_instance, reduction, sample_weight)


def _log_uniformity(logits: Tensor, same: Tensor) -> Tensor:
    """Log of the sum over the others; where there are none it takes what is there, which counts for nothing."""
    return logits.masked_fill(same & ~same.all(1)[:, None], -torch.inf).logsumexp(1)


def mv_dhel(
    views: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """-log of the sum over the pairs of views of an instance, plus the log of the sum over the others in each view."""
    logits, same = _logits(views, temperature, normalize), _equal(ids, views[0])
    numerator = torch.stack([logits[a][b].diagonal() for a, b in combinations(range(len(views)), 2)], dim=1)
    loss = -numerator.logsumexp(1)
    for a in range(len(views)):
        loss = loss + _log_uniformity(logits[a][a], same)
    return _reduce(loss.masked_fill(same.all(1), 0.0), reduction, sample_weight)


def dhel(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The positive across the views, the negatives of each view within it."""
    x, y, same = _unit(z1, normalize), _unit(z2, normalize), _equal(ids, z1)
    loss = -(x * y).sum(1) / temperature
    for z in (x, y):
        loss = loss + _log_uniformity(z @ z.T / temperature, same)
    return _reduce(loss.masked_fill(same.all(1), 0.0), reduction, sample_weight)


def pvc(
    views: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    aggregate: str = "geometric",
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The mean over the positives of an anchor of their log-probability, or the log of their mean probability."""
    logits, same = _logits(views, temperature, normalize), _equal(ids, views[0])
    per_view = []
    for a in range(len(views)):
        negatives = torch.cat([block.masked_fill(same, -torch.inf) for block in logits[a]], dim=1)
        log_p = []
        for b in range(len(views)):
            if b != a:
                positive = logits[a][b].diagonal()
                log_p.append(positive - torch.cat([positive[:, None], negatives], dim=1).logsumexp(1))
        if aggregate == "geometric":
            per_view.append(-torch.stack(log_p).mean(0))
        else:
            per_view.append(-(torch.stack(log_p).logsumexp(0) - torch.ones_like(log_p[0]).mul(len(log_p)).log()))
    return _reduce(torch.stack(per_view), reduction, sample_weight)


def pairwise_views(views: Tensor, loss: str = "nt_xent", *, ids: Tensor | None = None, **options: Any) -> Tensor:
    """The mean of the naive loss over all pairs of views."""
    naive: dict[str, Callable[..., Tensor]] = {
        "nt_xent": losses.nt_xent,
        "info_nce": losses.info_nce,
        "dcl": losses.dcl,
    }
    options |= {"query_ids": ids, "key_ids": ids} if loss == "info_nce" and ids is not None else {}
    options |= {"ids": ids} if loss != "info_nce" else {}
    pairs = list(combinations(range(len(views)), 2))
    return torch.stack([naive[loss](views[a], views[b], **options) for a, b in pairs]).mean(0)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Of rows less an offset of them all, which changes no distance and whose square would drown them."""
    offset = x.detach().mean(0)
    x, y = x - offset, y - offset
    return x.square().sum(1)[:, None] + y.square().sum(1)[None, :] - 2 * x @ y.T


def uniformity(x: Tensor, y: Tensor | None = None, *, t: float = 2.0, normalize: bool = True) -> Tensor:
    """log of the mean of the Gaussians of all off-diagonal pairs."""
    n = len(x)
    if n < 2:
        return 0.0 * (x.sum() if y is None else (x + y).sum())
    x = _unit(x, normalize)
    potential = (-t * _squared_distances(x, x if y is None else _unit(y, normalize))).flatten()
    off_diagonal = ~torch.eye(n, dtype=torch.bool, device=x.device).flatten()
    return potential[off_diagonal].exp().mean().log()


def joint_entropy(x: Tensor, *, t: float = 1.0, normalize: bool = False, reduction: str = "mean") -> Tensor:
    """log of the mean of the Gaussians of each row, itself included."""
    x = _unit(x, normalize)
    return _reduce((-t * _squared_distances(x, x)).exp().mean(1).log(), reduction)


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0, normalize: bool = True, reduction: str = "mean") -> Tensor:
    """The distance to the power of alpha."""
    distance = torch.linalg.vector_norm(_unit(x, normalize) - _unit(y, normalize), dim=1)
    return _reduce(distance**alpha, reduction)
