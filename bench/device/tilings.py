"""Stage `tilings`: candidates for the table of kernels/tilings.py, compiled side by side and timed one by one.

The best of each kernel is printed as the line that the table takes.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from bench.device import machine, stage
from bench.measure import sentence
from contrastive_ops import plane
from contrastive_ops.backends import sweep, triton

tilings = triton.kernels("tilings")
Tiling = tilings.Tiling
KERNELS = triton.kernels("launch").TritonKernels()
COMPILE_SHARE = 0.6


class Candidate(NamedTuple):
    field: str  # of Tilings
    dtype: str
    features: int
    tiling: Any

    @property
    def problem(self) -> tuple[str, str, int]:
        return self.field, self.dtype, self.features


def candidates(rehearse: bool) -> Iterator[Candidate]:
    """In the order of worth; what the table has comes first of each kernel."""
    if rehearse:
        yield Candidate("forward", "float32", 16, Tiling(16, 16, 16, 4, 2))
        return
    wide = [
        Tiling(*tile, d, warps, stages)
        for tile, d, warps, stages in itertools.product(
            ((128, 128), (128, 64), (256, 128), (128, 256)), (32, 64), (4, 8), (2, 3, 4)
        )
        if 32 <= _accumulators(tile, warps) <= 128 and 32 << 10 <= _shared(tile, d, stages, 2) <= 220 << 10
    ]
    for field in ("forward_many", "block_many", "forward", "block"):
        # in self-similarity the columns of a tile divide its rows
        yield from (Candidate(field, "bfloat16", 768, t) for t in wide if field == "block" or t[0] >= t[1])
    for features in (256, 128):
        for tile, warps, stages in itertools.product(((64, 64), (64, 32), (128, 32), (128, 64)), (4, 8), (2, 3)):
            if tile[0] * features / (32 * warps) <= 128:
                yield Candidate("rows", "bfloat16", features, Tiling(*tile, 0, warps, stages))
    for field in ("forward_many", "block_many"):
        for tile, d, warps in itertools.product(((64, 64), (128, 64), (128, 128)), (16, 32), (4, 8, 16)):
            if 8 <= _accumulators(tile, warps) <= 64:
                yield Candidate(field, "float32", 768, Tiling(*tile, d, warps, 2))
    for field, members in (("volume", 2), ("volume_many", 4)):
        for tile, d, warps in itertools.product(((128, 64), (64, 64), (64, 32)), (32, 64), (4, 8)):
            if members * _accumulators(tile, warps) <= 128:
                yield Candidate(field, "bfloat16", 512, Tiling(*tile, d, warps, 3))


def _accumulators(tile: tuple[int, int], warps: int) -> float:
    return tile[0] * tile[1] / (32 * warps)


def _shared(tile: tuple[int, int], d: int, stages: int, itemsize: int) -> int:
    return sum(tile) * d * stages * itemsize


def problem(candidate: Candidate, n: int, place: str) -> plane.Problem:
    """A CLIP loss: scales of rows, of columns too where there are many options, and the positive excluded."""
    dtype = getattr(torch, candidate.dtype)
    members = {"volume": 2, "volume_many": 4}.get(candidate.field, 0)
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(n, candidate.features, device=place), dim=1).to(dtype)
    shape = (n, members, candidate.features) if members else (n, candidate.features)
    y = torch.nn.functional.normalize(torch.randn(shape, device=place), dim=-1).to(dtype)
    scale = torch.full((n,), 14.0, device=place)
    index = torch.arange(n, device=place, dtype=torch.int32)
    many = candidate.field.endswith("_many") or members
    vectors = plane.Vectors(scale, torch.ones_like(scale) if many else None, None, None, index, None, None, None)
    span = plane.Span(None, None)
    if members:
        triangle = torch.randn(members * (members + 1) // 2, n, device=place) * 0.1
        span = plane.Span(triangle, torch.ones(n, device=place))
    return plane.Problem(x, y, vectors, span)


def call_of(candidate: Candidate, n: int, place: str) -> Callable[[], Any]:
    """What is timed: the kernel, with the statistics' merge for forward."""
    given = problem(candidate, n, place)
    ones = torch.ones(n, device=place)
    incoming = plane.Incoming(1e-3 * ones, 1e-3 * ones, 14 * ones, 14 * ones)
    if candidate.field.startswith(("forward", "volume")):
        return lambda: sweep.forward(KERNELS, given, True, True)
    if candidate.field == "rows":
        return lambda: sweep._rows(KERNELS, given, incoming, None, [True, False, False])
    side = min(n, sweep.WORKSPACE)
    block = plane.Block(0, 0, side, side, side)
    coefficients = given.x.new_empty(1, side, side)
    sums = plane.Sums(given.empty(side, side))
    return lambda: KERNELS.block(given, incoming, None, coefficients, sums, plane.Sums(), block)


@contextmanager
def in_the_table(candidate: Candidate, place: str) -> Iterator[None]:
    x = torch.empty(0, dtype=getattr(torch, candidate.dtype), device=place)
    table = tilings.TILINGS[tilings.device_class(x)]
    before = table[x.element_size()]
    table[x.element_size()] = before._replace(**{candidate.field: candidate.tiling})
    try:
        yield
    finally:
        table[x.element_size()] = before


def compiled(these: list[Candidate]) -> None:
    """Into Triton's cache on disk: a launch at a size that divides as the measured one does."""
    for candidate in these:
        try:
            with in_the_table(candidate, "cuda"):
                call_of(candidate, 512, "cuda")()
        except Exception as error:
            print(candidate, sentence(error))


def run(this: stage.Stage) -> None:
    every = list(candidates(this.rehearse))
    if not this.rehearse:
        workers = max(1, (os.cpu_count() or 2) - 2)
        commands = [
            [sys.executable, "-m", "bench.device.tilings", "--compile", str(i), str(workers)] for i in range(workers)
        ]
        stage.parallel(commands, COMPILE_SHARE * this.left())
    for candidate in every:
        if this.left() < 3:
            break
        n = 64 if this.rehearse else 8192 if candidate.dtype == "float32" else 16384
        row: dict[str, Any] = candidate._asdict() | {"tiling": list(candidate.tiling), "n": n}
        try:
            with in_the_table(candidate, this.place):
                call = call_of(candidate, n, this.place)
                row |= {"ms": machine.milliseconds(call, this.place, 1 if this.rehearse else 5), "status": "ok"}
        except Exception as error:
            row |= {"ms": None, "status": sentence(error)}
        this.write(**row)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        part, parts = map(int, sys.argv[2:])
        compiled(list(candidates(False))[part::parts])
    else:
        stage.main(run)
