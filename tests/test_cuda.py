"""The CUDA engine on the CPU, backend "cuda-host": the tests of the ops and of the losses on the kernels of csrc/cuda.

The same sources, binding and host code as on a GPU; see tests/cuda_host. Sanitizers and planted faults are in
test_cuda_host.py, what is compiled for GPUs in test_cuda_build.py.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import test_similarity_logsumexp as op_tests
import test_volume_logsumexp as volume_tests
import torch
from cuda_host import build as host
from problems import ALL_OPTIONS

from contrastive_ops import backends
from contrastive_ops.backends import cuda, sweep

NAME = "cuda-host"
SENTENCE = host.why_not()
pytestmark = pytest.mark.skipif(SENTENCE is not None, reason=f"{NAME}: {SENTENCE}")
DTYPES = cuda.DTYPES


@pytest.fixture(autouse=True, scope="module")
def host_backend():
    """The backend, registered for as long as the tests of this file run."""
    torch.ops.load_library(host.backend())
    kernels = cuda.CudaKernels("contrastive_ops_cuda_host")
    functions = {
        f"{op}_{pass_}": partial(getattr(sweep, f"{op}_{pass_}"), kernels)
        for op in cuda.OPS
        for pass_ in ("forward", "backward")
    }
    functions["kept"] = partial(sweep.kept, kernels)
    module = SimpleNamespace(OPS=cuda.OPS, why_not=lambda op, x: None, **functions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._MODULES, NAME, module)
        patch.setattr(backends, "NAMES", (*backends.NAMES, NAME))
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL_OPTIONS)
def test_options(name, dtype):
    op_tests.test_options(name, NAME, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", volume_tests.MEMBERS)
@pytest.mark.parametrize(
    "flags",
    [{"cols": True, "totals": True}, {"cols": False, "totals": False}, {"rows": False, "cols": True, "totals": True}],
    ids=["everything", "rows", "cols"],
)
def test_volumes(flags, members, dtype):
    volume_tests.test_options(flags, members, NAME, dtype)
