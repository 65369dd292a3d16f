"""memeff: Triton kernels of the CLIP loss, for a temperature that is a number.

Without `stable` it gives the gradient of the loss; by default it gives a multiple of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from torch import Tensor


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: float) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    if isinstance(logit_scale, Tensor):
        raise TypeError("memeff takes a temperature that is a number, got a Tensor.")
    loss = MemoryEfficientCLIPLoss(temperature=1.0 / logit_scale, normalized_inputs=True, stable=False)
    return loss(image_features, text_features)


def why_not(loss: str) -> str | None:
    if loss != "clip_loss":
        return f"memeff has no {loss} of these inputs."
    return None if importlib.util.find_spec("memeff") else "memeff is not installed; pip install memeff."


def function(loss: str, backend: str) -> Callable[..., Tensor]:
    return clip_loss
