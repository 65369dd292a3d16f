"""What one writes in plain PyTorch today, in the dtype of the inputs: one product, then a dense softmax.

The forms are the fast ones: the temperature multiplies the N x D factor, not the N x N logits; masks work in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(query: Tensor, key: Tensor, temperature: float = 0.07) -> Tensor:
    return F.cross_entropy((query / temperature) @ key.T, torch.arange(len(query), device=query.device))


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale * image_features @ text_features.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


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


FORMS: dict[str, Callable[..., Tensor]] = {
    "info_nce": info_nce,
    "clip_loss": clip_loss,
    "nt_xent": nt_xent,
    "dcl": dcl,
    "dclw": dclw,
    "supcon": supcon,
}


def why_not(loss: str) -> str | None:
    return None if loss in FORMS else f"{loss} has no form in bench/contenders/eager.py yet."


def function(loss: str, backend: str) -> Callable[..., Tensor]:
    return FORMS[loss]
