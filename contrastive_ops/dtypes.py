"""Which dtype the results have."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Statistics and losses are float32 whatever the input, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
