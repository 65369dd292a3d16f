"""What is measured, in this order: whether a contender is right, how long it takes, how much memory it needs.

A contender that is wrong or raises gets a row that says so, and no time.
"""

from __future__ import annotations

import gc
import multiprocessing
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

import contrastive_ops
from bench import contenders
from bench.cases import LOSSES, Case
from bench.device import DEVICES, Device
from contrastive_ops import backends, build

MODES = ("forward", "backward", "both")
# largest error of the loss, and of each gradient over its largest element, against the dense twin in float64 on the
# same inputs; 4 to 20 times what eager PyTorch shows with 16-bit logits, or with sums in another order
TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "float16": 5e-3, "bfloat16": 3e-2}
GATE_N = 1200  # the truth is dense; more than one tile, and no multiple of a tile
WARM_UP_N = 32
MOST_ROUNDS = 1000

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Settings:
    repeats: int = 5
    seconds: float = 1.0  # rounds go on for this long, times the contenders
    memory: bool = True
    backend: str = "auto"  # of ours
    threads: int = 1
    device: str = "cpu"

    @property
    def on(self) -> Device:
        return DEVICES[self.device]

    def backend_of(self, loss: str) -> str:
        """What ours is called with: for "auto" the device's engine, or tiled where that has no such op."""
        if self.backend != "auto" or self.on.backend == "auto":
            return self.backend
        return self.on.backend if LOSSES[loss].op in backends.module(self.on.backend).OPS else "tiled"


@dataclass
class Row:
    """One line of the JSON: one contender in one mode. What was not measured is None, and `status` says why."""

    loss: str
    contender: str
    backend: str | None  # which of ours ran
    mode: str
    n: int
    d: int
    dtype: str
    status: str = "ok"
    ms: dict[str, float] | None = None
    ratio: dict[str, float] | None = None  # time over that of ours
    peak_bytes: int | None = None  # of forward + backward, beyond the inputs
    flops: int | None = None
    gflops: float | None = None
    roof_gflops: float | None = None
    roof: str | None = None  # what ran at the roof

    @property
    def verdict(self) -> str:
        """One word for where a time would stand: ok, WRONG, n/a or the name of an exception."""
        return re.split("[:,]", self.status)[0]

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"

    @property
    def inapplicable(self) -> bool:
        return self.verdict == "n/a"


def measure(case: Case, names: Sequence[str], settings: Settings, tell: Callable[[str], None]) -> list[Row]:
    """All rows of a case; `tell` hears what comes next."""
    failed: dict[str, str] = {}
    functions: dict[str, LossFunction] = {}
    truth = loss_and_gradients(_naive(case), _in_float64(_gate_inputs(case)))
    for name in names:
        tell(f"{case}: is {contenders.label(name)} right?")
        contender = contenders.load(name)
        reason = contender.why_not(case.loss)
        if reason is not None:
            failed[name] = f"n/a: {reason}"
            continue
        try:
            function = contender.function(case.loss, settings.backend_of(case.loss))
            inputs = moved(_gate_inputs(case), settings.on)
            wrong = why_wrong(loss_and_gradients(function, inputs), truth, TOLERANCE[case.dtype])
        except Exception as error:
            failed[name] = sentence(error)
            continue
        if wrong is None:
            functions[name] = function
        else:
            failed[name] = f"WRONG: {wrong} ({case.dtype}, N = {min(case.n, GATE_N)})."
    del truth

    tell(f"{case}: timing")
    roof_before = roof(case, settings.seconds / 4, settings.on)
    times = time_interleaved(functions, moved(case.inputs(), settings.on), settings, failed)
    roof_gflops, roof_name = max(roof_before, roof(case, settings.seconds / 4, settings.on))

    rows = []
    for name in names:
        if name not in times:
            rows.append(_row(case, name, settings, "both", status=failed[name]))
            continue
        status, peak = "ok", None
        if settings.memory:
            tell(f"{case}: memory of {contenders.label(name)}")
            try:
                peak = peak_bytes(case, name, settings)
            except Exception as error:
                status = f"ok, but its memory was not measured: {sentence(error)}"
        for mode in MODES:
            row = _row(case, name, settings, mode, status=status, roof_gflops=roof_gflops, roof=roof_name)
            row.ms = quantiles(times[name][mode])
            if "ours" in times:
                ours = quantiles(times["ours"][mode])
                row.ratio = {"best": row.ms["min"] / ours["min"], "median": row.ms["p50"] / ours["p50"]}
            flops = case.flops()
            if flops is not None:
                row.flops = flops[mode]
                row.gflops = row.flops / row.ms["p50"] / 1e6
            if mode == "both":
                row.peak_bytes = peak
            rows.append(row)
    return rows


def _row(case: Case, name: str, settings: Settings, mode: str, **values: Any) -> Row:
    backend = None
    if name == "ours":
        op, asked = LOSSES[case.loss].op, settings.backend_of(case.loss)
        try:
            features = torch.empty(1, case.d, dtype=getattr(torch, case.dtype), device=settings.on.place)
            backend = contrastive_ops.explain(features, op=op, backend=asked).chosen
        except RuntimeError:  # a named backend that can't run; the row's status has the sentence
            backend = asked
    return Row(case.loss, contenders.label(name), backend, mode, case.n, case.d, case.dtype, **values)


def sentence(error: Exception) -> str:
    """The error in one line that names no folder of this machine."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {without_folders(text)[:300]}"


def without_folders(text: str) -> str:
    """Absolute paths cut to their last part."""
    return re.sub(r"(?<![\w.])(?:/[^\s/:'\"]+)+/([^\s/:'\"]+)", r"\1", text)


def loss_and_gradients(function: LossFunction, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    loss = function(*inputs)
    return loss.detach(), *torch.autograd.grad(loss, _learned(inputs))


def why_wrong(got: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> str | None:
    """The sentence that says how far the loss or a gradient is off; None when it is right."""
    for i, (value, true) in enumerate(zip(got, truth, strict=True)):
        name = "the loss" if i == 0 else f"gradient {i}"
        if value.shape != true.shape:
            return f"{name} has shape {tuple(value.shape)}, expected {tuple(true.shape)}"
        error = float((value.cpu().double() - true).abs().max() / true.abs().max())
        if not error <= tolerance:  # a NaN is wrong, too
            return f"{name} is off by {error:.1e} of its largest value, tolerance {tolerance:.0e}"
    return None


def _naive(case: Case) -> LossFunction:
    return lambda *inputs: LOSSES[case.loss].naive(*inputs, normalize=False)


def _gate_inputs(case: Case) -> tuple[Any, ...]:
    return case.inputs(min(case.n, GATE_N))


def _in_float64(inputs: Sequence[Any]) -> list[Any]:
    return [x.detach().double().requires_grad_(x.requires_grad) if _is_float(x) else x for x in inputs]


def moved(inputs: Sequence[Any], device: Device) -> list[Any]:
    """The inputs on the device, leaves again."""
    return [x.detach().to(device.place).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _learned(inputs: Sequence[Any]) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def time_interleaved(
    functions: dict[str, LossFunction], inputs: Sequence[Any], settings: Settings, failed: dict[str, str]
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by contender and mode. One that raises leaves, and its sentence goes to `failed`.

    Every round runs every contender once, each time another one first, so that a machine that slows down for a while
    slows all of them down. The round before the first is the warm-up.
    """
    running = dict(functions)
    times: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in MODES} for name in functions}
    gc.collect()
    start = time.perf_counter()
    for i in range(-1, MOST_ROUNDS):
        if i == 0:
            start = time.perf_counter()
        if i >= settings.repeats and time.perf_counter() - start >= settings.seconds * len(running):
            break
        order = list(running)
        first = i % max(len(order), 1)
        for name in order[first:] + order[:first]:
            try:
                forward, backward = _time_once(running[name], inputs, settings.on)
            except Exception as error:
                failed[name] = sentence(error)
                del running[name], times[name]
                continue
            if i >= 0:
                for mode, seconds in zip(MODES, (forward, backward, forward + backward), strict=True):
                    times[name][mode].append(1e3 * seconds)
        if not running:
            break
    return times


def _time_once(function: LossFunction, inputs: Sequence[Any], device: Device) -> tuple[float, float]:
    learned = _learned(inputs)
    device.synchronize()
    start = time.perf_counter()
    loss = function(*inputs)
    device.synchronize()
    middle = time.perf_counter()
    # named, so that freeing the gradients is not timed
    gradients = torch.autograd.grad(loss, learned)
    device.synchronize()
    end = time.perf_counter()
    del gradients
    return middle - start, end - middle


def quantiles(ms: Sequence[float]) -> dict[str, float]:
    p20, p50, p80 = (float(value) for value in numpy.percentile(ms, (20, 50, 80)))
    return {"p20": p20, "p50": p50, "p80": p80, "min": min(ms)}


def roof(case: Case, seconds: float, device: Device) -> tuple[float, str]:
    """GFLOP/s of the tile products alone, with nothing between them, and what computed them."""
    dtype = getattr(torch, case.dtype)
    if device.extension and build.extension is not None and case.plane is not None:
        rows, cols = (torch.ones(size, case.d, dtype=dtype) for size in case.plane)
        return build.extension.tile_product_rate(rows, cols, seconds) / 1e9, "tile products"
    size = device.roof_size
    square = torch.ones(size, size, dtype=dtype, device=device.place)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds or best == float("inf"):
        device.synchronize()
        before = time.perf_counter()
        torch.mm(square, square)
        device.synchronize()
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best / 1e9, "torch.mm"


def peak_bytes(case: Case, name: str, settings: Settings) -> int:
    """Peak memory of forward + backward beyond the inputs, in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak_bytes_here, case, name, settings).result()


def _peak_bytes_here(case: Case, name: str, settings: Settings) -> int:
    torch.set_num_threads(settings.threads)
    contender, device = contenders.load(name), settings.on
    function = contender.function(case.loss, settings.backend_of(case.loss))
    # libraries and threads start before the count
    torch.ones(1 << 17).exp()
    at_full_size = getattr(contender, "WARM_UP_AT_FULL_SIZE", False)
    loss_and_gradients(function, moved(case.inputs(None if at_full_size else min(case.n, WARM_UP_N)), device))
    inputs = moved(case.inputs(), device)
    before, peak = device.memory()
    loss_and_gradients(function, inputs)
    return max(peak() - before, 0)
