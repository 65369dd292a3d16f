"""What was compiled when the package was installed: loads the C++ engine and the CUDA kernels if they are there.

`missing` and `cuda_missing` are None when these are loaded, else the sentence that says why they are not.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

INSTALL = "pip install --no-build-isolation --force-reinstall --no-deps contrastive_ops."
INSTALL_CUDA = f"CONTRASTIVE_OPS_BUILD=cuda {INSTALL}"

extension: ModuleType | None = None
missing: str | None = None
try:
    # importing the module registers torch.ops.contrastive_ops_cpu
    extension = importlib.import_module("contrastive_ops._C")
except ModuleNotFoundError:
    missing = (
        "the C++ engine is not part of this installation; install where torch and a C++ compiler are "
        f"present: {INSTALL}"
    )
except ImportError as error:
    missing = f"the C++ engine does not load ({error}); rebuild it against torch {torch.__version__}: {INSTALL}"


class Cuda(NamedTuple):
    """How the CUDA kernels were compiled."""

    compiler: str
    architectures: tuple[str, ...]  # sm_80 for code, compute_80 for PTX


def load_cuda(library: Path) -> Cuda | str:
    """Registers torch.ops.contrastive_ops_cuda, or says why that can't be."""
    if not library.is_file():
        return (
            "the CUDA kernels are not part of this installation; install where torch 2.11, nvcc and a C++ compiler are "
            f"present: {INSTALL_CUDA}"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the CUDA kernels do not load ({error}); rebuild them against torch {torch.__version__}: {INSTALL_CUDA}"
    version, architectures = torch.ops.contrastive_ops_cuda.build_info()
    return Cuda(f"nvcc {version}", tuple(architectures.split(",")))


_loaded = load_cuda(Path(__file__).with_name("_cuda.so"))
cuda, cuda_missing = (_loaded, None) if isinstance(_loaded, Cuda) else (None, _loaded)
