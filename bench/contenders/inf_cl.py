"""inf-cl: Triton kernels of InfoNCE in one direction, in TF32; the CLIP loss takes two calls."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from torch import Tensor


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor) -> Tensor:
    return (info_nce(image_features, text_features, scale=logit_scale)
            + info_nce(text_features, image_features, scale=logit_scale)) / 2  # fmt: skip


def info_nce(query: Tensor, key: Tensor, temperature: float = 0.07, scale: float | Tensor | None = None) -> Tensor:
    from inf_cl import cal_flash_loss

    return cal_flash_loss(query, key, scale=1.0 / temperature if scale is None else scale).mean()


FORMS: dict[str, Callable[..., Tensor]] = {"info_nce": info_nce, "clip_loss": clip_loss}


def why_not(loss: str) -> str | None:
    if loss not in FORMS:
        return f"inf-cl has no {loss}."
    return None if importlib.util.find_spec("inf_cl") else "inf-cl is not installed; pip install inf-cl."


def function(loss: str, backend: str) -> Callable[..., Tensor]:
    return FORMS[loss]
