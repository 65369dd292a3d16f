"""Who is measured: one file per contender, with two functions.

    why_not(loss)            the sentence that says why the contender has no form of the loss; None when it has one
    function(loss, backend)  the loss as a function of the catalogue's inputs: unit vectors, mean over the batch

`backend` concerns only `ours`. A file outside of this folder takes part when its path is given as the name.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor

DEFAULT = ("ours", "eager", "compiled", "linear_cross_entropy")
PEERS = ("memeff", "inf_cl")  # packages for GPUs, which may not be there
BUILT_IN = (*DEFAULT, *PEERS)


class Contender(Protocol):
    def why_not(self, loss: str) -> str | None: ...

    def function(self, loss: str, backend: str) -> Callable[..., Tensor]: ...


def load(name: str) -> Contender:
    """The module of a built-in contender, or of the file at the path `name`."""
    if name in BUILT_IN:
        return cast(Contender, importlib.import_module(f"bench.contenders.{name}"))
    spec = importlib.util.spec_from_file_location(label(name), name)
    if spec is None or spec.loader is None or not Path(name).is_file():
        raise ValueError(f"a contender must be one of {', '.join(BUILT_IN)} or the path of a .py file, got {name!r}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Contender, module)


def label(name: str) -> str:
    """How tables and JSON call it."""
    return name if name in BUILT_IN else Path(name).stem
