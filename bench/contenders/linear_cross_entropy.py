"""PyTorch's chunked F.linear_cross_entropy: the second embeddings stand for the weight of a classifier.

It has one direction, so that the CLIP loss takes two calls, and computes the gradients in forward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(query: Tensor, key: Tensor, temperature: float = 0.07) -> Tensor:
    return _chunked(query / temperature, key)


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    scaled = logit_scale * image_features
    return (_chunked(scaled, text_features) + _chunked(text_features, scaled)) / 2


def _chunked(rows: Tensor, cols: Tensor) -> Tensor:
    target = torch.arange(len(rows), device=rows.device)
    return F.linear_cross_entropy(rows, cols, target, options=torch.nn.LinearCrossEntropyOptions())


FORMS: dict[str, Callable[..., Tensor]] = {"info_nce": info_nce, "clip_loss": clip_loss}


def why_not(loss: str) -> str | None:
    if loss not in FORMS:
        return f"F.linear_cross_entropy takes products and no mask, {loss} is no such form."
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked F.linear_cross_entropy; it came with torch 2.13."
    return None


def function(loss: str, backend: str) -> Callable[..., Tensor]:
    return FORMS[loss]
