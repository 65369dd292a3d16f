"""What one writes in plain PyTorch today, in the dtype of the inputs: one product, then a dense softmax.

The forms are the fast ones: the temperature multiplies the N x D factor, not the N x N logits; masks work in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(query: Tensor, key: Tensor, temperature: float = 0.07) -> Tensor:
    return F.cross_entropy((query / temperature) @ key.T, torch.arange(len(query), device=query.device))


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale * image_features @ text_features.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    logits = torch.addmm(logit_bias.to(image_features.dtype), logit_scale * image_features, text_features.T)
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(logits)


def nt_xent_labelled(features: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    logits = (features / temperature) @ features.T
    same = labels[:, None] == labels
    lse = logits.masked_fill(same, -torch.inf).logsumexp(1)
    anchor, positive = same.fill_diagonal_(False).nonzero(as_tuple=True)
    return F.softplus(lse[anchor] - logits[anchor, positive]).mean()


def guided_info_nce(anchor: Tensor, positive: Tensor, temperature: float = 0.01) -> Tensor:
    ceiling = (anchor * positive).sum(1, keepdim=True).detach()
    diagonal = torch.eye(len(anchor), dtype=torch.bool, device=anchor.device)
    pairs = anchor @ positive.T
    blocks = [pairs.masked_fill((pairs > ceiling) & ~diagonal, -torch.inf)]
    for x in (anchor, positive):
        similarity = x @ x.T
        blocks.append(similarity.masked_fill((similarity > ceiling) | diagonal, -torch.inf))
    return F.cross_entropy(torch.cat(blocks, 1) / temperature, torch.arange(len(anchor), device=anchor.device))


def soft_target_loss(x: Tensor, y: Tensor, u: Tensor, v: Tensor, temperature: float = 0.07) -> Tensor:
    student, teacher = (x / temperature) @ y.T, (u / temperature) @ v.T
    return (F.cross_entropy(student, teacher.softmax(1)) + F.cross_entropy(student.T, teacher.T.softmax(1))) / 2


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    z = torch.cat([z1, z2])
    logits = ((z / temperature) @ z.T).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


def dcl(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    return (_negative_lse(z1, z2, temperature) - (z1 * z2).sum(1).repeat(2) / temperature).mean()


def dclw(z1: Tensor, z2: Tensor, temperature: float = 0.1, sigma: float = 0.5) -> Tensor:
    similarity = (z1 * z2).sum(1)
    weight = 2 - len(z1) * (similarity.detach() / sigma).softmax(0)
    return (_negative_lse(z1, z2, temperature) - (weight * similarity).repeat(2) / temperature).mean()


def _negative_lse(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    z = torch.cat([z1, z2])
    sample = torch.arange(len(z1), device=z.device).repeat(2)
    logits = (z / temperature) @ z.T
    return logits.masked_fill_(sample[:, None] == sample, -torch.inf).logsumexp(1)


def supcon(features: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    logits = (features / temperature) @ features.T
    positives = (labels[:, None] == labels).fill_diagonal_(False)
    count = positives.sum(1)
    mean_positive = torch.where(positives, logits, 0.0).sum(1) / count.clamp(min=1)
    lse = logits.fill_diagonal_(-torch.inf).logsumexp(1)
    return torch.where(count > 0, lse - mean_positive, 0.0).mean()


def mv_infonce(views: Tensor, temperature: float = 0.1) -> Tensor:
    n = views.shape[1]
    z = views.flatten(0, 1)
    denominator = ((z / temperature) @ z.T).fill_diagonal_(-torch.inf).logsumexp(1)
    # the sum of A is over both orders of a pair
    numerator = _positives(views, temperature).logsumexp(0) + math.log(2)
    return (denominator.view(-1, n).logsumexp(0) - numerator).mean()


def mv_dhel(views: Tensor, temperature: float = 0.1) -> Tensor:
    logits = (views / temperature) @ views.mT
    logits.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return (logits.logsumexp(2).sum(0) - _positives(views, temperature).logsumexp(0)).mean()


def dhel(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    return mv_dhel(torch.stack([z1, z2]), temperature)


def pvc(views: Tensor, temperature: float = 0.1) -> Tensor:
    v, n, _ = views.shape
    z = views.flatten(0, 1)
    instance = torch.arange(n, device=z.device).repeat(v)
    logits = (z / temperature) @ z.T
    negative = logits.masked_fill_(instance[:, None] == instance, -torch.inf).logsumexp(1).view(v, n)
    pairs = zip(combinations(range(v), 2), _positives(views, temperature), strict=True)
    return torch.stack([F.softplus(negative[anchor] - s).mean() for pair, s in pairs for anchor in pair]).mean()


def _positives(views: Tensor, temperature: float) -> Tensor:
    """Logits of the pairs of views of each instance."""
    return torch.stack([(a * b).sum(1) for a, b in combinations(views.unbind(), 2)]) / temperature


def pairwise_views(views: Tensor) -> Tensor:
    return torch.stack([nt_xent(a, b) for a, b in combinations(views.unbind(), 2)]).mean()


def uniformity(x: Tensor, t: float = 2.0) -> Tensor:
    n = len(x)
    potential = _squared_distances(x).mul(-t).fill_diagonal_(-torch.inf).exp()
    return (potential.sum() / (n * (n - 1))).log()


def joint_entropy(x: Tensor, t: float = 1.0) -> Tensor:
    return _squared_distances(x).mul(-t).exp().mean(1).log().mean()


def _squared_distances(x: Tensor) -> Tensor:
    squared = x.square().sum(1)
    return squared[:, None] + squared - 2 * x @ x.T


def gram_loss(anchor: Tensor, x: Tensor, y: Tensor, temperature: float = 0.07) -> Tensor:
    """The official form: an N x N x 3 x 3 tensor of Gram matrices, and their determinants."""
    ax, ay = anchor @ x.T, anchor @ y.T
    aa = anchor.square().sum(1)[:, None].expand_as(ax)
    xx, xy, yy = ((p * q).sum(1).expand_as(ax) for p, q in ((x, x), (x, y), (y, y)))
    rows = ((aa, ax, ay), (ax, xx, xy), (ay, xy, yy))
    gram = torch.stack([torch.stack(row, -1) for row in rows], -2)
    return _smoothed(-torch.linalg.det(gram.float()).abs().sqrt() / temperature)


def triangle_loss(anchor: Tensor, x: Tensor, y: Tensor, temperature: float = 0.07) -> Tensor:
    """Two products in place of the official N x N x D differences, which would be the slower form."""
    aa, xx, yy, xy = ((p * q).sum(1) for p, q in ((anchor, anchor), (x, x), (y, y), (x, y)))
    ax, ay = anchor @ x.T, anchor @ y.T
    uu, ww, uw = aa[:, None] + xx - 2 * ax, aa[:, None] + yy - 2 * ay, aa[:, None] - ax - ay + xy
    return _smoothed((uu * ww - uw.square()).abs().sqrt() / (-2 * temperature))


def _smoothed(logits: Tensor) -> Tensor:
    target = torch.arange(len(logits), device=logits.device)
    rows, cols = (F.cross_entropy(z, target, label_smoothing=0.1) for z in (logits, logits.T))
    return (rows + cols) / 2


FORMS: dict[str, Callable[..., Tensor]] = {
    "info_nce": info_nce,
    "clip_loss": clip_loss,
    "siglip_loss": siglip_loss,
    "guided_info_nce": guided_info_nce,
    "soft_target_loss": soft_target_loss,
    "nt_xent_labelled": nt_xent_labelled,
    "nt_xent": nt_xent,
    "dcl": dcl,
    "dclw": dclw,
    "supcon": supcon,
    "mv_infonce": mv_infonce,
    "mv_dhel": mv_dhel,
    "dhel": dhel,
    "pvc": pvc,
    "pairwise_views": pairwise_views,
    "uniformity": uniformity,
    "joint_entropy": joint_entropy,
    "gram_loss": gram_loss,
    "triangle_loss": triangle_loss,
}


def why_not(loss: str) -> str | None:
    return None if loss in FORMS else f"{loss} has no form in bench/contenders/eager.py yet."


def function(loss: str, backend: str) -> Callable[..., Tensor]:
    return FORMS[loss]
