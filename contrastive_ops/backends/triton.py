"""Triton kernels (kernels/): NVIDIA and AMD GPUs, and CPU tensors in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.backends import sweep
from contrastive_ops.backends import tuples as tuple_basis
from contrastive_ops.plane import Kernels

OPS = (
    "similarity_logsumexp",
    "similarity_sum",
    "similarity_expectation",
    "similarity_topk",
    "volume_logsumexp",
    "gramian_volume",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(op: str, x: Tensor) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton can't be imported ({error}); pip install triton."
    if x.dtype not in DTYPES:
        return f"triton takes {checks.names(DTYPES)}, got {checks.names([x.dtype])}."
    if x.device.type == "cpu" and interpreting():
        if x.dtype == torch.bfloat16:
            return "triton's interpreter computes bfloat16 wrongly; it takes float32 and float16."
        return None
    if x.device.type != "cuda":
        return f"triton runs GPU tensors, got a tensor on {x.device.type} (CPU tensors: set TRITON_INTERPRET=1)."
    return None


@cache
def kernels(name: str) -> ModuleType:
    """A module of the kernels, contrastive_ops.kernels.<name>, imported at first use, as is Triton.

    The folder has no __init__.py, so an editable install doesn't find it in this package: there it lies beside.
    """
    package = "contrastive_ops.kernels"
    inside, beside = (Path(__file__).parents[up] / "kernels" / "sweep.py" for up in (1, 2))
    if package not in sys.modules and not inside.is_file() and beside.is_file():
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(beside.parent)]
    return importlib.import_module(f"{package}.{name}")


def _engine() -> Kernels:
    return kernels("launch").TritonKernels()


def factor(vectors: Tensor) -> tuple_basis.Basis:
    if vectors.shape[1] > kernels("rowwise").MOST_VECTORS:
        return tuple_basis.factor(vectors)
    return tuple_basis.Basis(*torch.ops.contrastive_ops.factor(vectors))


def volume_gradient(vectors: Tensor, inverse: Tensor, factor: Tensor) -> Tensor:
    if vectors.shape[1] > kernels("rowwise").MOST_VECTORS:
        return tuple_basis.volume_gradient(vectors, inverse, factor)
    return torch.ops.contrastive_ops.volume_gradient(vectors, inverse, factor)


globals().update(sweep.functions(_engine, OPS))
