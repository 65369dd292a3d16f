"""What was compiled when the package was installed: loads the C++ engine and the CUDA kernels if they are there.

`missing` and `cuda_missing` are None when these are loaded, else the sentence that says why they are not.
"""

from __future__ import annotations

import importlib
import json
import shlex
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch


def source(package: Path = Path(__file__).parent) -> str:
    """What pip is to install again: the checkout that the package is in, or what it was installed from."""
    if (package.parent / "setup.py").is_file():
        return f"-e {shlex.quote(str(package.parent))}"
    try:
        origin = json.loads(metadata.distribution("contrastive_ops").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return "path/to/contrastive_ops"
    url = origin.get("url")
    if url is None:  # from an index
        return "--no-binary contrastive_ops contrastive_ops"
    if url.endswith(".whl"):  # nothing in it to compile
        return "path/to/contrastive_ops"
    version = origin.get("vcs_info")
    return shlex.quote(url if version is None else f"{version['vcs']}+{url}@{version['commit_id']}")


def install(**variables: str) -> str:
    """The command that compiles the package beside the torch that is installed."""
    environment = "".join(f"{name}={shlex.quote(value)} " for name, value in variables.items())
    # a wheel that pip keeps may be one without what is to be compiled
    options = "--no-build-isolation --no-deps --force-reinstall --no-cache-dir"
    return f'`pip install "setuptools>=77" wheel ninja && {environment}pip install {options} {source()}`'


def load_engine() -> ModuleType | str:
    """Registers torch.ops.contrastive_ops_cpu, or says why that can't be."""
    try:
        engine = importlib.import_module("contrastive_ops._C")
    except ModuleNotFoundError:
        return (
            "the C++ engine is not part of this installation; where there are torch and a C++ compiler this command "
            f"adds it: {install()}."
        )
    except ImportError as error:
        return f"the C++ engine does not load ({error}); this rebuilds it for torch {torch.__version__}: {install()}."
    if _release(engine.torch_version) != _release(torch.__version__):  # the C++ interface of torch changes with each
        return (
            f"the C++ engine was built for torch {engine.torch_version}, and this is torch {torch.__version__}; this "
            f"rebuilds it: {install()}."
        )
    return engine


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


class Cuda(NamedTuple):
    """How the CUDA kernels were compiled."""

    compiler: str
    architectures: tuple[str, ...]  # sm_80 for code, compute_80 for PTX


def load_cuda(library: Path) -> Cuda | str:
    """Registers torch.ops.contrastive_ops_cuda, or says why that can't be."""
    if not library.is_file():
        return (
            "the CUDA kernels are not part of this installation; where there are torch 2.11 for CUDA, nvcc and a C++ "
            f"compiler this command adds them: {install(CONTRASTIVE_OPS_BUILD='cuda')}."
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return (
            f"the CUDA kernels do not load ({error}); this rebuilds them for torch {torch.__version__}: "
            f"{install(CONTRASTIVE_OPS_BUILD='cuda')}."
        )
    version, architectures = torch.ops.contrastive_ops_cuda.build_info()
    return Cuda(f"nvcc {version}", tuple(architectures.split(",")))


_engine = load_engine()
extension, missing = (_engine, None) if isinstance(_engine, ModuleType) else (None, _engine)
_kernels = load_cuda(Path(__file__).with_name("_cuda.so"))
cuda, cuda_missing = (_kernels, None) if isinstance(_kernels, Cuda) else (None, _kernels)
