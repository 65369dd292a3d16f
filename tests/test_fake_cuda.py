"""CUDA tensors without a GPU: dispatch, and tracing with fake tensors, which have a device and no memory.

A PyTorch without CUDA traces forward. It can't trace backward: autograd asks for CUDA's device guard, and the process
aborts. So backward is traced as the op that it is.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import test_compile as compile_tests
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

import contrastive_ops as co
from contrastive_ops import backends, build
from contrastive_ops.backends import sweep
from contrastive_ops.catalogue import LOSSES

OPS = ("similarity_logsumexp", "volume_logsumexp")
OF_TILED = "area_logsumexp"  # no other engine has it
NO_TRITON = backends.why_not("triton", OPS[0], torch.empty(1, 1))
BACKENDS = ("tiled", *(() if NO_TRITON is not None and "imported" in NO_TRITON else ("triton",)))


class WithoutGuard(TorchFunctionMode):
    """Indexing from Python asks for CUDA's device guard: the shape is that of the same on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ == "__getitem__" and args[0].is_cuda:
            of_cpu = torch.empty(args[0].shape)[tree_map_only(Tensor, lambda index: index.cpu(), args[1])]
            return args[0].new_empty(of_cpu.shape)
        if function.__name__ == "__setitem__" and args[0].is_cuda:
            return args[0].add_(args[2].sum())  # the same devices, or it raises
        return function(*args, **(kwargs or {}))


@pytest.fixture
def mode():
    """Fake tensors only: an op that meets a tensor on the CPU beside one on CUDA raises."""
    with FakeTensorMode() as mode, WithoutGuard():
        yield mode


def on_cuda(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    "name", [f"contrastive_ops::{op}{suffix}" for op in (*OPS, OF_TILED) for suffix in ("", "_backward")]
)
def test_cuda_tensors_reach_the_implementation(name):
    """One for every device, CompositeExplicitAutograd, so that none is registered for CUDA and one is found for it."""
    dispatched = torch._C._dispatch_dump_table(name).splitlines()
    for key in ("CPU", "CUDA"):
        (line,) = (line for line in dispatched if line.startswith(f"{key}:"))
        assert "CompositeExplicitAutograd" in line or "default backend kernel" in line, line
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key)


@pytest.mark.parametrize("op", OPS)
def test_triton_takes_cuda_tensors_and_asks_no_driver(op, mode, monkeypatch):
    if "triton" not in BACKENDS:
        pytest.skip(NO_TRITON)

    def asked(*_arguments):
        raise AssertionError("asked the driver")

    for function in ("_lazy_init", "current_device", "get_device_capability", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, function, asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = on_cuda(4, 8, dtype=dtype)
        assert backends.why_not("triton", op, x) is None
        assert backends.choose(op, x, "triton") == "triton"
        assert backends.choose(op, x, "auto") == "tiled"  # there is no GPU to check an engine on
        report = co.explain(x, op=op)
        assert report.reasons["cpu"] is not None
        assert report.checks["triton"] == f"not checked: torch finds no {x.device} here."
    assert "takes" in backends.why_not("triton", op, on_cuda(4, 8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_of_the_ops(backend, dtype, mode):
    n, m, d = 9, 7, 5
    x, y, tuples = on_cuda(n, d, dtype=dtype), on_cuda(m, d, dtype=dtype), on_cuda(m, 3, d, dtype=dtype)
    exclude = torch.arange(n, device="cuda")
    options = {"row_scale": 2.0, "col_bias": on_cuda(m), "exclude": exclude}
    results = [
        (co.similarity_logsumexp(x, backend=backend), (n, 0, n, 0, 0)),
        (co.similarity_logsumexp(x, y, **options, cols=True, backend=backend), (n, m, n, m, n)),
        (co.volume_logsumexp(x, tuples, cols=True, totals=True, backend=backend), (n, m, n, m, n, m)),
    ]
    if backend == "tiled":
        results.append((co.area_logsumexp(x, y, y, cols=True, totals=True), (n, m, n, m, n, m)))
    for outputs, sizes in results:
        for value, size in zip(outputs, sizes, strict=True):
            assert (value.device.type, value.dtype, value.shape) == ("cuda", torch.float32, (size,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["everything", "self-everything"])
def test_results_of_backward(name, backend, dtype):
    """The gradients of a call on the CPU, on CUDA."""
    forward = compile_tests.forward_arguments(name, 9, 7, 5, dtype, "tiled")
    given = [value is not None for value in forward[:6]]
    for needs in (given, [True] + [False] * 5):
        arguments = compile_tests.backward_arguments(forward, needs)
        expected = compile_tests.BACKWARD(*arguments)
        with FakeTensorMode():
            fakes = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"), arguments[:-1])
            results = compile_tests.BACKWARD(*fakes, backend)
        for result, like in zip(results, expected, strict=True):
            assert (result.device.type, result.dtype, result.shape) == ("cuda", like.dtype, like.shape)


VARIANTS = [pytest.param(row, v, id=f"{row.name}-{'-'.join(map(str, v.values())) or 'plain'}")
            for row in LOSSES for v in row.variants]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_losses(loss, variant, backend):
    """Nothing in a loss is made on the CPU by default."""
    arguments = loss.inputs(8, 6, torch.float16, torch.Generator().manual_seed(0))
    if loss.op not in backends.module(backend).OPS:
        pytest.skip(backends.why_not(backend, loss.op, torch.empty(1, 1)))
    with FakeTensorMode(), WithoutGuard():
        fakes = [on_cuda(*argument.shape, dtype=argument.dtype) for argument in arguments]
        for reduction in ("mean", "none") if loss.name != "uniformity" else ("mean",):
            options = {"reduction": reduction} if loss.name != "uniformity" else {}
            value = loss.fused(*fakes, **variant, **options, backend=backend)
            assert (value.device.type, value.dtype) == ("cuda", torch.float32)
            assert (value.dim() == 0) == (reduction == "mean")


SIDES = [pytest.param(row, v, s, id=f"{row.name}-{'-'.join(map(str, v.values())) or 'plain'}-{s.__name__}")
         for row in LOSSES for v in row.variants for s in row.sides]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("loss", "variant", "side"), SIDES)
def test_sides_of_losses(loss, variant, side, backend):
    """Nor by what the sides ask for."""
    if loss.op not in backends.module(backend).OPS:
        pytest.skip(backends.why_not(backend, loss.op, torch.empty(1, 1)))
    drawn = [make(8, 6, torch.float16, torch.Generator().manual_seed(0)) for make in (loss.inputs, side)]
    with FakeTensorMode(), WithoutGuard():
        fakes, sides = tree_map_only(Tensor, lambda x: on_cuda(*x.shape, dtype=x.dtype), drawn)
        for reduction in ("mean", "none"):
            value = loss.fused(*fakes, **variant, **sides, reduction=reduction, backend=backend)
            assert (value.device.type, value.dtype) == ("cuda", torch.float32)
            assert (value.dim() == 0) == (reduction == "mean")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_traced_loss_has_the_op_as_one_node(backend, mode):
    def call(x, y):
        return co.clip_loss(x, y, 5.0, backend=backend)

    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    x, y = on_cuda(9, 5), on_cuda(9, 5)
    value = torch.compile(call, backend=keep, fullgraph=True)(x, y)
    assert (value.device.type, value.shape) == ("cuda", ())
    for graph in (*graphs, make_fx(call)(x, y)):
        ours = [node for node in graph.graph.nodes if "similarity_logsumexp" in str(node.target)]
        assert len(ours) == 1
        assert ours[0].args[-1] == backend


@pytest.mark.parametrize("engine", [*BACKENDS[1:], "cuda"])
def test_a_traced_loss_asks_for_the_verdict_of_an_engine(engine, mode, monkeypatch):
    """Once, with what is known while Dynamo traces; what it takes is in the graph."""
    asked = []

    def first_trusted(op, names, modules, device, dtype):
        asked.append((op, names, device.type, dtype))
        return names[0]

    monkeypatch.setattr(backends.trust, "first_trusted", first_trusted)
    monkeypatch.setattr(backends, "AUTO_ON_GPU", (engine, "tiled"))
    if engine == "cuda":
        monkeypatch.setattr(build, "cuda", build.Cuda("nvcc 13.0.88", ("sm_80", "compute_80")))
        device = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda device: (9, 0))
        with_gpu = SimpleNamespace(version=SimpleNamespace(cuda="13.0"), cuda=device)
        monkeypatch.setattr(backends.cuda, "torch", with_gpu)  # Dynamo has the one without
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    x, y = on_cuda(9, 5), on_cuda(9, 5)
    torch.compile(lambda x, y: co.clip_loss(x, y, 5.0), backend=keep, fullgraph=True)(x, y)
    assert asked == [("similarity_logsumexp", (engine, "tiled"), "cuda", torch.float32)]
    (node,) = (node for graph in graphs for node in graph.graph.nodes if "similarity_logsumexp" in str(node.target))
    assert node.args[-1] == engine


def test_launches_on_the_device_of_the_tensors(mode, monkeypatch):
    """Launches are on the current device, and an op that is written in Python has no device guard."""
    current = [0]

    def exchange(index):
        current.append(index)
        return current[-2]

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    with sweep.launching(torch.empty(4, 8, device="cuda:1")):
        assert current == [0, 1]
    assert current == [0, 1, 0]
    with sweep.launching(torch.empty(4, 8, device="cuda:0")):
        assert current == [0, 1, 0]
