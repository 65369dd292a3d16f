"""The options of the streaming ops as their schemas take them: vectors of the statistics' dtype, indices."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops import backends, checks
from contrastive_ops.dtypes import statistics_dtype


def per_row(name: str, value: float | Tensor | None, size: int, x: Tensor, rows_of: str) -> Tensor | None:
    """A scale or bias of the logits as a vector of one value per row."""
    if value is None:
        return None
    checks.scale(name, value, size, x.device, rows_of=rows_of)
    dtype = statistics_dtype(x)
    if not isinstance(value, Tensor):
        return torch.full((size,), float(value), dtype=dtype, device=x.device)
    return value.to(dtype).reshape(-1).expand(size)


def integers(name: str, value: Tensor | None, size: int, x: Tensor, rows_of: str, backend: str) -> Tensor | None:
    """Indices or ids, one per row; in 64 bits, but for backends that say they take others."""
    if value is None:
        return None
    checks.integer_vector(name, value, size, x.device, rows_of=rows_of)
    dtypes = getattr(backends.module(backend), "INDICES", ())
    return value if value.dtype in dtypes else value.to(torch.int64)
