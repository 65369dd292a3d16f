"""On a GPU: both ops and every loss, by CUDA, by Triton and by plain PyTorch, and what only a device has.

    python -m pytest -m gpu

Problems, truth and comparison are those of the other tests, on the CPU; a call moves its tensors to the device and its
results back. A dry run at small sizes, in Triton's interpreter, keeps this file from rotting where there is no GPU; it
is a part of the ordinary tests, and `CONTRASTIVE_OPS_TEST_DEVICE=cpu python -m pytest -m gpu` by itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import test_compile as compile_tests
import test_engines as engine_tests
import test_losses as loss_tests
import test_similarity_logsumexp as op_tests
import test_volume_logsumexp as volume_tests
import torch
from problems import LOGSUMEXP, OPS, SUMS, frozen, problem
from tolerance import ROUNDINGS, evaluate, judge
from torch import Tensor
from torch.utils._pytree import tree_map_only

import contrastive_ops as co
from contrastive_ops import backends, ops
from contrastive_ops.backends import sweep, trust
from contrastive_ops.catalogue import LOSSES

DEVICE = os.environ.get("CONTRASTIVE_OPS_TEST_DEVICE", "cuda")
DRY = DEVICE == "cpu"
NO_GPU = (
    None
    if DRY or torch.cuda.is_available()
    else ("no GPU that PyTorch can use; `python -m pytest -m gpu` is for a machine that has one")
)
FEW = DRY or NO_GPU is not None  # what skips need not be many
MIB = 2**20
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

gpu = pytest.mark.gpu
on_gpu = pytest.mark.usefixtures("device")
real = pytest.mark.usefixtures("real_device")
# what a GPU makes PyTorch warn of (TF32, for one) is shown; log(0) of an empty set is numpy's, in the interpreter
pytestmark = pytest.mark.filterwarnings("default", "ignore::RuntimeWarning")
# as they are before a test replaces them
OP, VOLUME_OP = co.similarity_logsumexp, co.volume_logsumexp
NAIVE, NAIVE_OF_VOLUMES = op_tests.naive, volume_tests.naive


def each(everything: Sequence[Any], few: Sequence[Any]) -> Sequence[Any]:
    """The parameters of a test; few of them without a GPU."""
    return few if FEW else everything


def moved(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its tensors moved to the device, and its results to the CPU."""

    def call(*arguments: Any, **options: Any) -> Any:
        arguments, options = tree_map_only(Tensor, lambda tensor: tensor.to(DEVICE), (arguments, options))
        return tree_map_only(Tensor, lambda tensor: tensor.cpu(), function(*arguments, **options))

    return call


def by_matrix_units(naive: Callable[..., Any]) -> Callable[..., Any]:
    """Dense PyTorch on the device, with the dot products of 16-bit features by the units that have those.

    These cut sums off where others round: in 768 features off by up to 4e-6 of the sum, whoever uses them. Under TF32
    PyTorch does, too, and 16-bit values are exact in it. The truth, in float64, has no part in this.
    """

    def call(*arguments: Any, **options: Any) -> Any:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            return moved(naive)(*arguments, **options)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    return call


def dense(naive: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """The rival of an engine on the device."""
    return by_matrix_units(naive) if dtype.itemsize == 2 else moved(naive)


FEWER_ROUNDINGS = 1 if FEW else ROUNDINGS  # the interpreter takes seconds for each
ENGINES = each(("cuda", "triton"), ("triton",))  # the interpreter is Triton's
BACKENDS = (*ENGINES, "tiled")  # "auto" takes one of the first on a GPU, if it agrees with the last


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops run on the device. On a GPU an engine that was asked for and can't run is a failure, and no skip."""
    if NO_GPU is not None:
        pytest.skip(NO_GPU)
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    dtype = given.get("dtype", torch.float32)
    x = torch.empty(1, 1, dtype=dtype, device=DEVICE)
    sentence = backends.why_not(given.get("backend") or given.get("engine", "tiled"), "similarity_logsumexp", x)
    if sentence is not None:
        (pytest.skip if DRY else pytest.fail)(sentence)
    monkeypatch.setattr(co, "similarity_logsumexp", moved(OP))
    monkeypatch.setattr(co, "volume_logsumexp", moved(VOLUME_OP))
    for name in ("similarity_sum", "similarity_expectation"):
        monkeypatch.setattr(co, name, moved(getattr(ops, name)))
    if dtype.itemsize == 2:  # of float32 the CPU's products are as good, and no launches
        monkeypatch.setattr(op_tests, "naive", by_matrix_units(NAIVE))
        monkeypatch.setattr(volume_tests, "naive", by_matrix_units(NAIVE_OF_VOLUMES))


@pytest.fixture
def real_device(device: None) -> None:
    if DRY:
        pytest.skip("the CPU has nothing of this: for a GPU only")


@gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("op", "name"),
    each(
        [(op, name) for op in OPS for name in op.options],
        [(LOGSUMEXP, "everything-restrict"), (LOGSUMEXP, "row_scale-float"), (SUMS[1], "guide"), (OPS[-2], "both")],
    ),
)
def test_options(op, name, backend, dtype):
    op_tests.test_options(op, name, backend, dtype)


@gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", each(["both", "everything", "self-everything"], ["both"]))
@pytest.mark.parametrize("shape", each(op_tests.SHAPES, [(7, 2, 3)]))
def test_shapes(shape, name, engine, dtype):
    op_tests.test_shapes(LOGSUMEXP, shape, name, engine, dtype)


# both forms of backward of 16-bit features, more than one step of the features, more than one block of the plane
@gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", each(["both", "everything", "self-everything", "self-ids-restrict-sorted"], ["both"]))
@pytest.mark.parametrize("shape", each([(5000, 4500, d) for d in (64, 128, 192, 768)], [(70, 130, 192)]))
def test_large(shape, name, engine, dtype, monkeypatch):
    monkeypatch.setattr(sweep, "WORKSPACE", 4096)
    arguments, options = problem(name, *shape, dtype)
    judge(
        op_tests.fused,
        dense(NAIVE, dtype),
        arguments,
        options,
        fused_options={"backend": engine},
        roundings=FEWER_ROUNDINGS,
        logits=11.0,  # the log-sum-exps of 4,500 logits go up to that
    )


# rows alone, with columns that require no gradient: of 16-bit features forward has the gradients
@gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", each(["rows", "vectors-rows", "everything", "everything-restrict"], ["vectors-rows"]))
@pytest.mark.parametrize(
    "shape", each([(1, 1, 1), (300, 40, 100), (5000, 4500, 64), (5000, 4500, 256)], [(65, 129, 17)])
)
def test_frozen_columns(shape, name, engine, dtype):
    arguments, options = frozen(name, *shape, dtype)
    judge(
        op_tests.fused,
        dense(NAIVE, dtype),
        arguments,
        options,
        fused_options={"backend": engine},
        roundings=FEWER_ROUNDINGS,
    )


@gpu
@real
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", [1, 2, 3, 4, 5])
def test_volume_of_one_set(members, dtype):
    vectors = torch.randn(1000, members, 257, dtype=dtype, device=DEVICE)
    sentence = backends.why_not("cuda", "gramian_volume", vectors)
    assert sentence is None, sentence
    volumes = [co.gramian_volume(vectors, backend=name) for name in ("cuda", "tiled")]
    torch.testing.assert_close(*volumes, rtol=1e-6, atol=0.0)


@gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", each(["both", "self-row_scale-0d"], ["self-row_scale-0d"]))
@pytest.mark.parametrize("size", each(["scale 1e4", "magnitude 100", "negative scale"], ["scale 1e4"]))
def test_huge_logits(size, name, engine, dtype):
    op_tests.test_huge_logits(LOGSUMEXP, size, name, engine, dtype)


PROPERTIES = [
    *(test for test in engine_tests.PROPERTIES if test is not op_tests.test_inputs_are_left_alone),  # they are copies
    volume_tests.test_more_vectors_than_dimensions,
    volume_tests.test_only_pair_excluded,
]


@gpu
@on_gpu
@pytest.mark.parametrize("test", each(PROPERTIES, PROPERTIES[-1:]), ids=lambda test: test.__name__)
def test_properties(test, engine):
    test(engine)


@gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_and_nan(engine, dtype):
    for n, m in ((0, 5), (5, 0), (0, 0)):
        op_tests.test_empty_sides(n, m, engine, dtype)
        volume_tests.test_empty_sides(n, m, engine, dtype)
    op_tests.test_nan_reaches_the_rows_it_affects_and_no_others(engine, dtype)


# a view that starts at an odd element has no aligned vector loads: Triton compiles another kernel for it
@gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", each([op_tests.transposed, op_tests.strided, op_tests.offset], [op_tests.offset]))
@pytest.mark.parametrize("name", each(["everything", "self-everything"], ["everything"]))
def test_layout_does_not_matter(name, layout, engine, dtype):
    def on_device(x: Tensor) -> Tensor:
        with torch.device(DEVICE):
            return layout(x.detach().to(DEVICE))

    arguments, options = problem(name, 65, 70, 17, dtype)
    expected = evaluate(op_tests.fused, arguments, options | {"backend": engine})
    laid_out = [on_device(x) for x in arguments]
    op_tests.assert_same(evaluate(op_tests.fused, laid_out, options | {"backend": engine}), expected)


@gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", each([(1100, 1030, 20), (5000, 4500, 256)], [(65, 70, 20)]))
@pytest.mark.parametrize("name", each(["everything", "self-everything"], ["self-everything"]))
def test_runs_are_bitwise_repeatable(name, shape, engine, dtype):
    arguments, options = problem(name, *shape, dtype)
    first = evaluate(op_tests.fused, arguments, options | {"backend": engine})
    for _ in range(each((1, 2, 3), (1,))[-1]):
        op_tests.assert_same(evaluate(op_tests.fused, arguments, options | {"backend": engine}), first)


# N, M, P, D
VOLUMES = [
    (*shape[:2], members, shape[3]) for shape in ((65, 129, 0, 17), (300, 257, 0, 100)) for members in (1, 2, 3, 4)
]


@gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", each(VOLUMES, [(20, 30, 2, 9)]), ids=lambda sizes: "-".join(map(str, sizes)))
def test_volumes(sizes, backend, dtype):
    arguments, options = volume_tests.problem(*sizes, dtype)
    judge(volume_tests.fused, volume_tests.naive, arguments, options, fused_options={"backend": backend})


@gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", each((1, 2, 3, 4), (1,)))
def test_large_volumes(members, engine, dtype):
    n, m, d = each((4500, 2500, 192), (70, 40, 70))
    arguments, options = volume_tests.problem(n, m, members, d, dtype)
    judge(
        volume_tests.fused,
        dense(NAIVE_OF_VOLUMES, dtype),
        arguments,
        options,
        fused_options={"backend": engine},
        roundings=FEWER_ROUNDINGS,
    )


VARIANTS = [
    pytest.param(loss, variant, backend, id="-".join([loss.name, *map(str, variant.values()), backend]))
    for loss in (LOSSES if not FEW else [row for row in LOSSES if row.name in ("clip_loss", "gram_loss")])
    for variant in loss.variants[: None if not FEW else 1]
    for backend in (BACKENDS if loss.op in backends.cuda.OPS else ("tiled",))
]


@gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("loss", "variant", "backend"), VARIANTS)
def test_losses(loss, variant, backend, dtype):
    n, d = each((129, 96), (20, 10))
    options = variant | (loss_tests.temperature_of(loss, dtype) if loss in loss_tests.SCALED else {})
    options |= {"reduction": "none"} if loss.name != "uniformity" else {}
    arguments = loss_tests.arguments_of(loss, n, d, dtype)
    given = {"fused_options": {"backend": backend}, "logits": loss_tests.logits_of(loss)}
    judge(moved(loss.fused), loss.naive, arguments, options, **given)


SIDES = [
    pytest.param(*param.values, side, id=f"{param.id}-{side.__name__}")
    for param in VARIANTS
    for side in param.values[0].sides[-1:]  # the one that has most
    if param.values[1] in param.values[0].variants[:1]
]


@gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("loss", "variant", "backend", "side"), SIDES)
def test_sides_of_losses(loss, variant, backend, side, dtype):
    n, d = each((129, 96), (20, 10))
    options = variant | loss_tests.temperature_of(loss, dtype) | {"reduction": "mean"}
    options |= side(n, d, dtype, torch.Generator().manual_seed(7))
    arguments = loss_tests.arguments_of(loss, n, d, dtype)
    given = {"fused_options": {"backend": backend}, "logits": loss_tests.logits_of(loss)}
    judge(moved(loss.fused), loss.naive, arguments, options, **given)


@contextmanager
def no_waiting() -> Iterator[None]:
    """What makes the host wait for the device raises."""
    if DRY:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_device(arguments: Any) -> Any:
    """Tensors as leaves on the device."""
    return tree_map_only(Tensor, lambda value: value.detach().to(DEVICE).requires_grad_(value.requires_grad), arguments)


@gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("loss", "variant", "backend"), VARIANTS)
def test_no_loss_waits_for_the_device(loss, variant, backend, dtype):
    arguments = on_device(loss_tests.arguments_of(loss, *each((129, 96), (20, 10)), dtype))
    options = tree_map_only(Tensor, lambda value: value.to(DEVICE), variant)
    for waiting in (nullcontext(), no_waiting()):  # at first kernels are compiled
        with waiting:
            value = loss.fused(*arguments, **options, backend=backend)
            value.sum().backward()


@gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("loss", "variant", "backend", "side"), SIDES)
def test_no_side_waits_for_the_device(loss, variant, backend, side, dtype):
    n, d = each((129, 96), (20, 10))
    arguments = on_device(loss_tests.arguments_of(loss, n, d, dtype))
    drawn = side(n, d, dtype, torch.Generator().manual_seed(7))
    options = variant | on_device(drawn)
    for waiting in (nullcontext(), no_waiting()):
        with waiting:
            loss.fused(*arguments, **options, backend=backend).backward()


@gpu
@on_gpu
def test_a_target_beyond_the_keys(engine, monkeypatch):
    """Its values are not read on a device: the row has the loss inf, and no kernel reads there."""
    if DRY:
        monkeypatch.setattr(co.checks, "target_range", lambda *_: None)
    x, y = torch.randn(2, 20, 8, device=DEVICE)
    target = torch.arange(20, device=DEVICE)
    target[3], target[7] = 20, -(2**40)
    loss = co.info_nce(x, y, target=target, reduction="none", backend=engine)
    beyond = torch.zeros(20, dtype=torch.bool)
    beyond[[3, 7]] = True
    assert torch.equal(loss.cpu() == torch.inf, beyond)
    assert loss.cpu()[~beyond].isfinite().all()


@gpu
@real
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["clip_loss", "info_nce", "nt_xent", "supcon", "gram_loss"])
def test_cuda_graph(name, engine, dtype):
    """Forward and backward as one graph, which gives for other inputs what they give without."""
    loss = loss_tests.TABLE[name]

    def leaves(seed: int) -> list[Tensor]:
        temperature = loss_tests.temperature_of(loss, dtype, 0.25 + seed).values()
        return on_device([*loss_tests.arguments_of(loss, 300, 64, dtype, seed), *temperature])

    def step(given: list[Tensor]) -> tuple[Tensor, ...]:
        count = len(given) - (name != "clip_loss")  # whose scale is an argument
        options = {} if name == "clip_loss" else {"temperature": given[-1]}
        value = loss.fused(*given[:count], **options, backend=engine)
        return value.detach(), *torch.autograd.grad(value, [leaf for leaf in given if leaf.requires_grad])

    first, second = leaves(0), leaves(1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled, cuBLAS takes its workspace
        step(first)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(first)
    with torch.no_grad():
        for leaf, value in zip(first, second, strict=True):
            leaf.copy_(value)
    graph.replay()
    for result, right in zip(results, step(second), strict=True):
        torch.testing.assert_close(result, right)


@gpu
@on_gpu
@pytest.mark.parametrize("name", each(["info_nce", "clip_loss", "nt_xent", "gram_loss"], ["clip_loss"]))
def test_compiled(name, engine):
    """One graph of forward and backward, for sizes that share no factor."""
    loss = loss_tests.TABLE[name]

    def call(*arguments: Tensor) -> Tensor:
        return loss.fused(*arguments, backend=engine)

    both = compile_tests.compiled(call, "aot_eager" if DRY else "inductor")
    for n in (14, 33):
        arguments = loss.inputs(n, 6, torch.float32, torch.Generator().manual_seed(n))
        compile_tests.assert_close(evaluate(moved(both), arguments, {}), evaluate(moved(call), arguments, {}))


@gpu
@on_gpu
@pytest.mark.parametrize("name", each(["everything", "self-everything"], ["self-everything"]))
def test_opcheck(name, engine):
    arguments = compile_tests.forward_arguments(name, 9, 7, 5, torch.float32, engine)
    compile_tests.check(tree_map_only(Tensor, lambda tensor: tensor.to(DEVICE), arguments))


@gpu
@on_gpu
def test_results_stay_on_the_device(engine):
    x, y = torch.randn(2, 20, 8, device=DEVICE).requires_grad_()
    for value in OP(x, y, cols=True, exclude=torch.arange(20, device=DEVICE), backend=engine):
        assert value.device == x.device
    for loss in (co.clip_loss(x, y, 5.0, backend=engine), co.gram_loss(x, y, backend=engine)):
        assert loss.device == x.device
        assert all(grad.device == x.device for grad in torch.autograd.grad(loss, (x, y)))


# Offsets beyond 32 bits: the last rows give what they give alone. Features of 4 GiB in 2 bytes each; the gradient twice
# of that in float32, again in 2 bytes, and some slack.
@gpu
@on_gpu
def test_more_than_2_to_the_31_elements(engine):
    n, d, last = each((2**31 // 512 + 1000, 512, 500), (500, 16, 30))
    dtype = torch.float16 if DRY else torch.bfloat16
    if not DRY:
        free, _ = torch.cuda.mem_get_info()
        if free < 24 * 1024 * MIB:
            pytest.skip(f"the GPU has {free / 1024 / MIB:.0f} GiB free, this takes 24")
    x = torch.randn(n, d, device=DEVICE, dtype=dtype).mul_(0.1).requires_grad_()
    y = torch.randn(60, d, device=DEVICE, dtype=dtype)
    tail = x.detach()[-last:].clone().requires_grad_()
    (lse, grad), (expected_lse, expected_grad) = (
        (rows.detach(), torch.autograd.grad(rows.sum(), features)[0])
        for features, rows in ((f, OP(f, y, backend=engine).row_lse) for f in (x, tail))
    )
    torch.testing.assert_close(lse[-last:], expected_lse, rtol=1e-6, atol=1e-6)
    assert (grad[-last:] - expected_grad).norm() < 1e-2 * expected_grad.norm()


@gpu
@real
@pytest.mark.parametrize("dtype", DTYPES)
def test_peak_memory(engine, dtype):
    """Both gradients in float32, as much again while they are scaled or cast, one block of coefficients; no matrix."""
    n, d = 32768, 512

    def peak(n: int) -> int:
        x, y = (torch.randn(n, d, device=DEVICE, dtype=dtype).requires_grad_() for _ in range(2))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = OP(x, y, row_scale=0.05, cols=True, backend=engine)
        torch.autograd.grad(out.row_lse.sum() + out.col_lse.sum(), (x, y))
        return torch.cuda.max_memory_allocated() - before

    peak(300)  # cuBLAS takes its workspace
    coefficients = sweep.WORKSPACE**2 * 2  # float32 has blocks of half the rows and columns
    partials = 32 * MIB  # a maximum and a sum of every row and column, for each of some 20 groups and strips
    bound = 4 * n * d * 4 + coefficients + partials
    assert peak(n) < bound < n * n * 4 / 8


@gpu
@real
def test_tf32_is_the_users_choice(engine):
    if torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    x, y = (torch.randn(300, 256, device=DEVICE) for _ in range(2))
    truth = (x.double() @ y.double().T).logsumexp(1)
    before = torch.get_float32_matmul_precision()
    errors = []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            errors.append((OP(x, y, backend=engine).row_lse - truth).abs().max().item())
    finally:
        torch.set_float32_matmul_precision(before)
    exact, rounded = errors
    assert exact < 1e-4 < 1e-3 < rounded < 1.0


@gpu
@real
def test_a_stream_that_is_not_the_default_one(engine):
    """What the stream has not yet computed would be read as zeros by a kernel of another one."""
    source = torch.randn(2, 500, 64, device=DEVICE)
    leaves = torch.zeros_like(source).requires_grad_()

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        out = OP(x, y, cols=True, backend=engine)
        return out.row_lse.detach(), *torch.autograd.grad(out.row_lse.sum() + out.col_lse.sum(), (x, y))

    expected = step(*source.clone().requires_grad_().unbind())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, about a tenth of a second
        with torch.no_grad():
            leaves.copy_(source)
        results = step(*leaves.unbind())
    stream.synchronize()
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


@gpu
@real
def test_a_device_that_is_not_the_current_one(engine):
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    x, y = torch.randn(2, 300, 64)
    results = []
    for where in ("cuda:0", "cuda:1"):
        given = [tensor.to(where).requires_grad_() for tensor in (x, y)]
        loss = co.clip_loss(*given, 5.0, backend=engine)
        results.append([loss.detach().cpu(), *(grad.cpu() for grad in torch.autograd.grad(loss, given))])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(second, first)


@pytest.fixture
def unchecked(real_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not used an engine."""
    monkeypatch.delenv("CONTRASTIVE_OPS_SELF_CHECK", raising=False)
    monkeypatch.setattr(trust, "_verdicts", {})
    monkeypatch.setattr(trust, "_warned", set())


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", backends.cuda.OPS)
def test_auto_takes_a_checked_engine(op, dtype, engine, unchecked, monkeypatch):
    """Each engine agrees with tiled, and the check leaves neither memory nor random numbers behind."""
    monkeypatch.setattr(backends, "AUTO_ON_GPU", (engine, "tiled"))
    x = torch.zeros(4, 2, 3, device=DEVICE, dtype=dtype)
    x @ x.mT  # cuBLAS takes its workspace
    allocated, random = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    assert backends.choose(op, x, "auto") == engine
    assert backends.standing(engine, op, x) == trust.AGREES
    assert torch.equal(torch.cuda.get_rng_state(), random)
    # the workspace of the check's own thread, and a second one where that begins before the last has ended
    workspaces = 64 * MIB
    assert torch.cuda.memory_allocated() - allocated <= workspaces
    seconds = []
    for _ in range(5):  # kernels are compiled now
        trust._verdicts.clear()
        start = time.perf_counter()
        backends.choose(op, x, "auto")
        seconds.append(time.perf_counter() - start)
    assert torch.cuda.memory_allocated() - allocated <= workspaces
    assert min(seconds) < 0.2


@gpu
def test_first_use_in_a_compiled_step(engine, unchecked, monkeypatch):
    monkeypatch.setattr(backends, "AUTO_ON_GPU", (engine, "tiled"))
    x, y = (value.requires_grad_() for value in torch.randn(2, 33, 20, device=DEVICE).unbind())
    value = compile_tests.compiled(lambda x, y: co.clip_loss(x, y, 5.0), "inductor")(x, y)
    assert backends.standing(engine, "similarity_logsumexp", x) == trust.AGREES
    expected = co.clip_loss(x, y, 5.0, backend="tiled")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected, (x, y)))


@gpu
def test_a_capture_without_a_verdict_raises(engine, unchecked, monkeypatch):
    """After a warm-up it is captured, and a replay computes what is in its tensors by then."""
    monkeypatch.setattr(backends, "AUTO_ON_GPU", (engine, "tiled"))
    x, y = torch.randn(2, 33, 20, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="warm up: run the step once before the capture"), torch.cuda.graph(graph):
        OP(x, y, cols=True)
    assert not trust._verdicts
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        OP(x, y, cols=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OP(x, y, cols=True)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured.row_lse, OP(x, y, backend="tiled").row_lse)


@pytest.mark.skipif("CONTRASTIVE_OPS_TEST_DEVICE" in os.environ, reason="this process has a device of its own")
def test_dry_run():
    """The above in Triton's interpreter, in float16: it has no bfloat16, and float32 adds only time."""
    sentence = backends.why_not("triton", "similarity_logsumexp", torch.empty(1, 1))
    if sentence is not None:
        pytest.skip(f"triton: {sentence}")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "not float32", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"CONTRASTIVE_OPS_TEST_DEVICE": "cpu", "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    for number, sentence in re.findall(r"^SKIPPED \[(\d+)\] \S+ (.*)$", result.stdout, re.MULTILINE):
        assert "bfloat16" in sentence or "for a GPU only" in sentence, (number, sentence)
