"""Stage `times`: forward + backward of the losses by every contender, interleaved, and beside the same run's cuBLAS.

Unit vectors of normal data, device events, medians. A contender must first agree with the dense loss in float64.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import contenders, measure
from bench.cases import Case
from bench.device import machine, stage
from contrastive_ops import backends, catalogue

ENGINES = ("triton", "cuda", "tiled")
LARGEST_EAGER = {"bfloat16": 65536, "float32": 16384}  # the dense forms take several matrices of N x N
SCALE = 1.0 / 0.07
LARGEST_TILED = 4096  # some hundred times slower than a kernel
# in the order of worth
CASES = (
    Case("clip_loss", 16384, 768, "bfloat16"),
    Case("clip_loss", 4096, 512, "bfloat16"),
    Case("clip_loss", 65536, 768, "bfloat16"),
    Case("clip_loss", 1024, 512, "bfloat16"),
    Case("clip_loss", 16384, 768, "bfloat16", "a scale that is a number"),
    Case("nt_xent", 65536, 256, "bfloat16"),
    Case("info_nce", 65536, 256, "bfloat16", "frozen keys"),
    Case("gram_loss", 16384, 512, "bfloat16"),
    Case("clip_loss", 16384, 768, "float32"),
    Case("supcon", 16384, 256, "bfloat16"),
    Case("clip_loss", 4096, 512, "float32"),
    Case("clip_loss", 65536, 512, "bfloat16"),
    Case("clip_loss", 65536, 1024, "bfloat16"),
    Case("mv_infonce", 8192, 256, "bfloat16"),
    Case("clip_loss", 1024, 512, "float32"),
    Case("gram_loss", 4096, 512, "float32"),
    Case("clip_loss", 65536, 768, "float32"),
    Case("nt_xent", 65536, 256, "float32"),
)
REHEARSED = (Case("clip_loss", 96, 16, "float32"), Case("info_nce", 96, 16, "float32", "frozen keys"))
COMPILED = {(4096, 512), (16384, 768)}  # torch.compile takes half a minute for each
PROFILED = (Case("clip_loss", 16384, 768, "bfloat16"), Case("clip_loss", 4096, 512, "bfloat16"),
            Case("nt_xent", 65536, 256, "bfloat16"))  # fmt: skip

Step = Callable[[], tuple[Tensor, Sequence[Tensor]]]


def inputs_of(case: Case, place: str, n: int | None = None) -> tuple[Any, ...]:
    """The catalogue's inputs, drawn on the device: float64 of a CPU takes longer than what is measured."""
    n = case.n if n is None else n
    if n <= 4096:
        drawn = case.inputs(n)
    else:
        few = case.inputs(64)  # kinds and dtypes of the arguments
        torch.manual_seed(0)
        drawn = tuple(_like(x, n, place) for x in few)
    moved = [x.detach().to(place).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in drawn]
    if case.setup == "frozen keys":
        moved[1] = moved[1].detach()
    if case.setup == "a scale that is a number":
        moved[2] = SCALE
    return tuple(moved)


def _like(x: Any, n: int, place: str) -> Any:
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    if not x.is_floating_point():
        return torch.randint(max(n // 4, 1), (n,), device=place)
    shape = tuple(n if size == 64 and i == x.dim() - 2 else size for i, size in enumerate(x.shape))
    return torch.nn.functional.normalize(torch.randn(shape, device=place), dim=-1).to(x.dtype).requires_grad_()


def step(function: Callable[..., Tensor], inputs: Sequence[Any]) -> tuple[Tensor, Sequence[Tensor]]:
    loss = function(*inputs)
    return loss, torch.autograd.grad(loss, [x for x in inputs if isinstance(x, Tensor) and x.requires_grad])


def functions_of(case: Case, this: stage.Stage) -> dict[str, Callable[..., Tensor]]:
    """By the name of the contender; ours by that of the engine."""
    ours, op = contenders.load("ours"), catalogue_op(case)
    found = {name: ours.function(case.loss, name) for name in ENGINES if op in backends.module(name).OPS}
    if this.rehearse:
        found = {name: found[name] for name in ("triton", "tiled")}
    elif case.n > LARGEST_TILED:
        del found["tiled"]
    if case.n <= LARGEST_EAGER[case.dtype]:
        found["eager"] = contenders.load("eager").function(case.loss, "")
        if (case.n, case.d) in COMPILED and case.dtype == "bfloat16":
            found["compiled"] = contenders.load("compiled").function(case.loss, "")
    files = filter(None, os.environ.get("CONTRASTIVE_OPS_CONTENDERS", "").split(os.pathsep))
    for path in () if this.rehearse else (*contenders.PEERS, *files):
        if contenders.load(path).why_not(case.loss) is None:
            found[contenders.label(path)] = contenders.load(path).function(case.loss, "")
    return found


def catalogue_op(case: Case) -> str:
    return next(row.op for row in catalogue.LOSSES if row.name == case.loss)


def verdict(case: Case, function: Callable[..., Tensor], truth: Sequence[Tensor], place: str) -> str:
    """ "ok" where it agrees with the dense loss in float64, else the sentence."""
    gate = inputs_of(case, place, min(case.n, 600))
    try:
        loss, gradients = step(function, gate)
        return measure.why_wrong([loss.detach(), *gradients], truth, measure.TOLERANCE[case.dtype]) or "ok"
    except Exception as error:
        return measure.sentence(error)


def time_case(case: Case, this: stage.Stage, seconds: float) -> None:
    place = this.place
    functions = functions_of(case, this)
    gate = inputs_of(case, "cpu", min(case.n, 600))
    in_float64 = [
        x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in gate
    ]
    naive = next(row.naive for row in catalogue.LOSSES if row.name == case.loss)
    loss, gradients = step(partial(naive, normalize=False), in_float64)
    truth = [loss.detach(), *gradients]
    statuses = {name: verdict(case, function, truth, place) for name, function in functions.items()}
    inputs = inputs_of(case, place)
    running: dict[str, Callable[..., Tensor]] = {}
    peaks: dict[str, int] = {}
    for name, function in functions.items():
        if statuses[name] != "ok":
            continue
        try:
            step(function, inputs)  # the warm-up, at full size
            if place == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step(function, inputs)
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() - before
            running[name] = function
        except torch.cuda.OutOfMemoryError:
            statuses[name] = "out of memory"
            torch.cuda.empty_cache()
    products = partial(product_ms, case, place)
    of_products = [products()]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    end = time.perf_counter() + seconds
    names = list(running)
    for i in range(200):
        if i >= 3 and time.perf_counter() > end:
            break
        for name in names[i % len(names) :] + names[: i % len(names)] if names else ():
            times[name].append(timed(running[name], inputs, place))
    of_products.append(products())
    plane, flops = case.plane, case.flops()
    product_flops = 2 * plane[0] * plane[1] * case.d if plane else 0
    rate = product_flops / min(of_products) / 1e9 if plane else None
    for name, status in statuses.items():
        row: dict[str, Any] = {"contender": name, "status": status, "ms": None}
        if name in running:
            forward, backward = (statistics.median(of) for of in zip(*times[name], strict=True))
            total = statistics.median(a + b for a, b in times[name])
            row |= {"ms": total, "forward_ms": forward, "backward_ms": backward, "rounds": len(times[name])}
            row["peak_bytes"] = peaks.get(name)
            if flops is not None and rate:
                row["tflops"] = flops["both"] / total / 1e9
                row["of_cublas"] = row["tflops"] / rate
        this.write(loss=case.loss, n=case.n, d=case.d, dtype=case.dtype, setup=case.setup, cublas_tflops=rate, **row)


def timed(function: Callable[..., Tensor], inputs: Sequence[Any], place: str) -> tuple[float, float]:
    """Milliseconds of forward and backward."""
    learned = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if place != "cuda":
        start = time.perf_counter()
        loss = function(*inputs)
        middle = time.perf_counter()
        torch.autograd.grad(loss, learned)
        return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize()
    events[0].record()
    loss = function(*inputs)
    events[1].record()
    gradients = torch.autograd.grad(loss, learned)
    events[2].record()
    events[2].synchronize()
    del gradients
    return events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2])


def product_ms(case: Case, place: str) -> float:
    """The similarities' product alone, in slabs of 8192 rows, of normal data."""
    if case.plane is None:
        return float("nan")
    rows, cols = case.plane
    dtype = getattr(torch, case.dtype)
    x, y = (torch.randn(size, case.d, device=place).to(dtype) for size in (rows, cols))
    out = torch.empty(min(rows, 8192), cols, dtype=dtype, device=place)

    def all_slabs() -> None:
        for slab in x.split(8192):
            torch.mm(slab, y.T, out=out[: len(slab)])

    return machine.milliseconds(all_slabs, place, 4)


def profile(case: Case, engine: str, this: stage.Stage) -> None:
    """Device time of a step by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    function, inputs = contenders.load("ours").function(case.loss, engine), inputs_of(case, this.place)
    for _ in range(3):
        step(function, inputs)
    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step(function, inputs)
        torch.cuda.synchronize()
    events = [
        event for event in trace.key_averages() if event.self_device_time_total > 0 and event.device_type.name == "CUDA"
    ]
    events.sort(key=lambda event: -event.self_device_time_total)
    this.write(
        profile=str(case),
        contender=engine,
        launches=sum(event.count for event in events),
        device_ms=sum(event.self_device_time_total for event in events) / 1e3,
        kernels=[[event.key[:90], event.count, round(event.self_device_time_total / 1e3, 4)] for event in events[:14]],
    )


def run(this: stage.Stage) -> None:
    torch.set_grad_enabled(True)
    for case in REHEARSED if this.rehearse else CASES:
        if this.left() < 5:
            break
        try:
            time_case(case, this, 0.0 if this.rehearse else 0.8)
        except Exception as error:
            this.write(loss=case.loss, n=case.n, d=case.d, dtype=case.dtype, status=measure.sentence(error))
        if not this.rehearse:
            torch.cuda.empty_cache()
            if case in PROFILED:
                for engine in ENGINES[:2]:
                    try:
                        profile(case, engine, this)
                    except Exception as error:
                        this.write(profile=str(case), contender=engine, status=measure.sentence(error))


if __name__ == "__main__":
    stage.main(run)
