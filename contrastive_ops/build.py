"""What was compiled when the package was installed: loads the C++ engine if it is there.

`missing` is None when the engine is loaded, else the sentence that says why it is not.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

extension: ModuleType | None = None
missing: str | None = None
try:
    # importing the module registers torch.ops.contrastive_ops_cpu
    extension = importlib.import_module("contrastive_ops._C")
except ModuleNotFoundError:
    missing = (
        "the C++ engine is not part of this installation; install where torch and a C++ compiler are present: "
        "pip install --no-build-isolation --force-reinstall --no-deps contrastive_ops."
    )
except ImportError as error:
    missing = (
        f"the C++ engine does not load ({error}); rebuild it against torch {torch.__version__}: "
        "pip install --no-build-isolation --force-reinstall --no-deps contrastive_ops."
    )
