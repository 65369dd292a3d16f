"""Which dtypes there are: of the results, and of features under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Statistics and losses are float32 whatever the input, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context that autocast leaves alone on the device of x; an exported graph has it for those who run it."""
    if x.device.type != "meta" and (_in_autocast(x) or torch.compiler.is_compiling()):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _in_autocast(x: Tensor) -> bool:
    # meta has no autocast; torch.amp.is_autocast_available says so, but Dynamo of torch 2.11 can't trace it
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def promoted(*features: Tensor, to: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Features that meet: of mixed dtypes, all take that of autocast where it runs, as the factors of a product do.

    Where those of distances meet, they take the dtype `to`. Without autocast they stay as they are, and with a float64,
    which autocast leaves alone.
    """
    dtypes = {x.dtype for x in features}
    if len(dtypes) == 1 or torch.float64 in dtypes:
        return features
    if not _in_autocast(features[0]):
        return features
    dtype = torch.get_autocast_dtype(features[0].device.type) if to is None else to
    return tuple(x.to(dtype) for x in features)
