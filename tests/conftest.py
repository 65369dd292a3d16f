"""What every test gets: a backend to run on, seeds, and memory in which nothing is 0 by luck."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
# what cuBLAS needs to be deterministic, read when it starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# --import-mode=importlib leaves this folder off the path; the helpers (tolerance, problems) are imported by name
sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed

from contrastive_ops import backends
from contrastive_ops.catalogue import Loss

BACKENDS = ("tiled", "cpu")


def refusal(name: str, op: str = "similarity_logsumexp") -> str | None:
    return backends.why_not(name, op, torch.empty(1, 1))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; one that can't run here, or not the op of the test, skips with its own sentence.

    The op is that of the test's `loss`, its `op`, or that of the whole file.
    """
    loss, op = (request.node.callspec.params.get(name) for name in ("loss", "op"))
    if isinstance(loss, Loss):
        sentence = refusal(request.param, loss.op)
    else:
        sentence = refusal(request.param, getattr(op, "name", getattr(request.module, "OP", "similarity_logsumexp")))
    if sentence is not None:
        pytest.skip(f"{request.param}: {sentence}")
    request.node.user_properties.append(("backend", request.param))
    return request.param


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # the tests name their backends; one that is forced from outside would answer for "auto"
    monkeypatch.delenv("CONTRASTIVE_OPS_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On small tensors a second thread costs more than it brings, and much more where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(_one_thread: None) -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """PyTorch's deterministic mode fills torch.empty (and at::empty) with NaN: an element never written shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "core: the part of the backend tests that runs again for every ISA variant")
    config.addinivalue_line("markers", "gpu: what only a machine with a GPU can show")
    backends._warned.add("tiled")  # an installation without the C++ engine is tested, too


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Ids that can be read: clip_loss-tiled-bfloat16-N129."""
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    if argname in ("n", "m", "d") and isinstance(val, int):
        return f"{argname.upper()}{val}"
    if argname == "shape" and isinstance(val, tuple):
        return "-".join(f"{name}{size}" for name, size in zip("NMD", val, strict=False))
    if type(val).__name__ == "Op":
        return str(val)
    if isinstance(val, dict):
        return "+".join(f"{name}={value}" for name, value in val.items()) or "plain"
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    refusals = {name: refusal(name) for name in BACKENDS}
    skipped = [f"{name}: {sentence}" for name, sentence in refusals.items() if sentence is not None]
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [pair for report in reports for pair in getattr(report, "user_properties", ())]
    ran = sorted({value for name, value in properties if name == "backend"})
    capability = os.environ.get("ATEN_CPU_CAPABILITY", torch.backends.cpu.get_cpu_capability())
    terminalreporter.write_line(
        f"{len(ran)} backends ran ({', '.join(ran) or 'none'}; ISA {capability}), {len(skipped)} skipped"
        + "".join(f": {line}" for line in skipped)
    )
