"""torch.compile of the eager forms, default mode, one graph, specialised to the shapes it meets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.contenders import eager
from bench.contenders.eager import why_not

__all__ = ["function", "why_not"]

# compiling for the full size takes memory in the process that is measured, so that its warm-up has the full size, too
WARM_UP_AT_FULL_SIZE = True


def function(loss: str, backend: str) -> Callable[..., Tensor]:
    # the graphs of the sizes before would count against the limit of recompilations
    torch.compiler.reset()
    return torch.compile(eager.function(loss, backend), fullgraph=True, dynamic=False)
