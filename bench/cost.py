"""What a symmetric contrastive loss would cost on a GPU, counted, for ours and its peers: bench/COST.md.

python -m bench.cost [--write]

A scheme is a list of phases, one after the other. A phase takes as long as what it needs most of: floating-point
operations, bytes of HBM, bytes of L2, or exponentials. How ours cuts a problem is asked of the kernels' own code; that
of the CUDA kernels is what is installed, or else compiled for the CPU (tests/cuda_host).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.resources_cuda import host
from contrastive_ops import build, plane
from contrastive_ops.backends import cuda, sweep, triton

PAGE = Path(__file__).parents[1] / "bench" / "COST.md"
REPORTS = PAGE.parent / "devices"
COMMAND = "python -m bench.cost --write"
N = 65536
FEATURES = (128, 512, 768, 1024)
HALF, SINGLE = 2, 4  # bytes of an element


@dataclass(frozen=True, eq=False)  # by identity, a key
class Device:
    name: str
    capability: tuple[int, int]
    peak: dict[int, float]  # FLOP/s by bytes of an element: bfloat16, TF32
    mma_sync: float  # share of the peak that products by mma.sync can have
    attained: float  # share of that which the vendor's large products reach; no kernel is taken to reach more
    hbm: float  # bytes/s
    l2: float  # bytes/s of reads that hit
    cache: float  # bytes of L2
    multiprocessors: int
    clock: float

    @property
    def exponentials(self) -> float:
        """Per second: 16 in a clock of a multiprocessor."""
        return 16 * self.multiprocessors * self.clock


A100 = Device("A100", (8, 0), {HALF: 312e12, SINGLE: 156e12}, 1.0, 0.80, 2.0e12, 5.4e12, 40e6, 108, 1.41e9)
H100 = Device("H100", (9, 0), {HALF: 989e12, SINGLE: 494e12}, 0.63, 0.75, 3.35e12, 7.0e12, 50e6, 132, 1.755e9)
DEVICES = (A100, H100)
TARGETS = (((H100, 768), 66e-3), ((A100, 512), 95e-3))  # seconds, of the bound
LAUNCH = 6e-6  # seconds of the host for one kernel, launched from Python
VENDOR_TILE = 128  # rows and columns
SHORTEST_SPLIT = 4096  # of the reduced dimension of a vendor's product, where it has too few tiles


@dataclass(frozen=True)
class Phase:
    name: str
    flops: float = 0.0
    width: int = HALF  # bytes of an element of the products
    hbm: float = 0.0
    l2: float = 0.0
    exponentials: float = 0.0
    programs: int = 0  # of one launch; 0 where the grid is not known or does not matter
    length: float = 1.0  # mean of the programs, as a share of the longest
    launches: int = 1
    mma_sync: bool = False  # on Hopper, products that are not by wgmma

    def bounds(self, device: Device) -> dict[str, float]:
        """Seconds by resource, each at its peak."""
        return {
            "products": self.flops / (device.peak[self.width] * (device.mma_sync if self.mma_sync else 1.0)),
            "HBM": self.hbm / device.hbm,
            "L2": self.l2 / device.l2,
            "exp": self.exponentials / device.exponentials,
        }

    def bound(self, device: Device) -> float:
        return max(self.bounds(device).values())

    def at_work(self, device: Device) -> float:
        """Share of the multiprocessors' time, the others wait for the last programs."""
        return self.length * balance(self.programs, device)

    def estimate(self, device: Device) -> float:
        """With the share of the peak that products attain, and the multiprocessors that wait for the last program."""
        seconds = self.bounds(device)
        seconds["products"] /= device.attained
        return max(seconds.values()) / self.at_work(device)


def balance(programs: int, device: Device) -> float:
    """Share of the multiprocessors at work, when each takes its share of the programs in whole."""
    return programs / (math.ceil(programs / device.multiprocessors) * device.multiprocessors) if programs else 1.0


def bound(phases: Sequence[Phase], device: Device) -> float:
    return sum(phase.bound(device) for phase in phases)


def estimate(phases: Sequence[Phase], device: Device) -> float:
    """The host launches ahead: it is waited for where it takes longer than all kernels."""
    return max(LAUNCH * total(phases, "launches"), sum(phase.estimate(device) for phase in phases))


def total(phases: Sequence[Phase], what: str) -> float:
    return sum(getattr(phase, what) for phase in phases)


Phases = Callable[[int, Device], Sequence[Phase]]  # by features and device


@dataclass(frozen=True)
class Scheme:
    name: str
    phases: Phases
    workspace: Callable[[int, Device], float]  # bytes beyond inputs and gradients, by features and device
    runs: Callable[[int, Device], bool] = lambda d, device: True


def tiles_read(d: int, rows: int, cols: int, width: int = HALF) -> float:
    """Bytes of the operands of an N x N product in tiles of rows x cols, each tile reading its own."""
    return N * N * d * width * (1 / rows + 1 / cols)


def product_programs(m: int, d: int, k: int, device: Device) -> int:
    """Programs of the vendor's [m, k] x [k, d]; a long k is split, at no cost, where that balances better."""
    tiles = math.ceil(m / VENDOR_TILE) * math.ceil(d / VENDOR_TILE)
    splits = range(1, max(1, k // SHORTEST_SPLIT) + 1)
    return max((tiles * split for split in splits), key=lambda programs: balance(programs, device))


# ours


@dataclass(frozen=True, eq=False)  # by identity, a key
class Engine:
    name: str
    kernels: Callable[[], plane.Kernels]
    rows_features: int  # the most that rows take
    attention_features: int  # and attention
    lanes: Callable[[int], int]  # of features, those that rows and attention compute
    mma_sync: bool
    x_once: bool  # for all vectors of a tuple, rather than for each


@functools.cache
def triton_kernels() -> plane.Kernels:
    return triton.kernels("launch").TritonKernels()


@functools.cache
def cuda_kernels() -> plane.Kernels:
    if build.cuda is not None:
        return cuda.KERNELS
    torch.ops.load_library(host().backend())
    return cuda.CudaKernels("contrastive_ops_cuda_host")


def why_not() -> str | None:
    """The sentence that says why the tiles of the CUDA kernels are not known here; None when they are."""
    sentence = host().why_not() if build.cuda is None else None
    return None if sentence is None else f"{build.cuda_missing} To compile them for the CPU: {sentence}"


TRITON = Engine(
    "Triton",
    triton_kernels,
    triton.kernels("tilings").ROWS_FEATURES,
    triton.kernels("tilings").ATTENTION_FEATURES,
    lanes=lambda d: max(16, 1 << (d - 1).bit_length()),
    mma_sync=False,
    x_once=False,
)
CUDA = Engine(
    "CUDA",
    cuda_kernels,
    cuda.ROWS_FEATURES,
    cuda.ROWS_FEATURES,
    lanes=lambda d: 16 * math.ceil(d / 16),
    mma_sync=True,
    x_once=True,
)
ENGINES = (TRITON, CUDA)


class Case(NamedTuple):
    """What is asked of the ops. The pairs have a learned scale, and every row leaves out its positive by index."""

    mirrored: bool = False  # self-similarity
    frozen: bool = False  # y needs no gradient, and the rows alone are asked for
    members: int = 0  # vectors of a tuple, of volumes
    groups: int = 1  # of as many rows each, in order; where there are more, pairs of one group alone take part

    @property
    def matrices(self) -> int:
        return max(self.members, 1)

    @property
    def vectors(self) -> int:
        """For every row, those that need a gradient: x_i and y_i, or x_i and a tuple."""
        return 1 if self.mirrored or self.frozen else 1 + self.matrices


CLIP = Case()


class Tile(NamedTuple):
    rows: int
    cols: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.cols}"


class Plan(NamedTuple):
    """How the kernels cut a problem."""

    forward: Tile
    block: Tile
    rows: Tile | None  # of as many features as they take; None where they don't take the case
    attention: Tile  # likewise
    programs: int
    groups: int
    strips: int


@contextlib.contextmanager
def pretending(device: Device) -> Iterator[None]:
    """Tensors that hold nothing, on a device that is not there."""
    properties = SimpleNamespace(multi_processor_count=device.multiprocessors)
    with (
        FakeTensorMode(),
        mock.patch.object(torch.version, "hip", None),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=device.capability),
    ):
        yield


def problem(case: Case, d: int, device: str) -> plane.Problem:
    """As the kernels take it."""
    x = torch.empty(N, d, dtype=torch.bfloat16, device=device)
    y = x.new_empty(N, case.members, d) if case.members else x
    scale, index = x.new_empty(N, dtype=torch.float32), x.new_empty(N, dtype=torch.int32)
    of_cols = (scale, index) if case.mirrored else (scale if case.members else None, None)
    ids = index if case.groups > 1 else None
    vectors = plane.Vectors(scale, of_cols[0], None, None, index, of_cols[1], ids, ids)
    span = plane.Span(None, None)
    return plane.Problem(x, y, vectors, span, mirrored=case.mirrored, restrict=case.groups > 1)


@functools.cache
def plan(engine: Engine, case: Case, d: int, device: Device) -> Plan:
    with pretending(device):
        kernels, of = engine.kernels(), problem(case, min(d, engine.rows_features), "cuda")
        rows = kernels.rows_tiling(of)
        attention = kernels.attention_tiling(problem(case, min(d, engine.attention_features), "cuda"))
        return Plan(
            Tile(*kernels.forward_tiling(of)),
            Tile(*kernels.block_tiling(of)),
            None if rows is None else Tile(*rows),
            Tile(*attention),
            kernels.programs(of.x),
            *sweep.groups_and_strips(kernels, of),
        )


def operands(engine: Engine, case: Case, d: int, pairs: float, tile: Tile) -> float:
    """Bytes of the operands of the products of tiles, each reading its own."""
    of_x = 1 if engine.x_once else case.matrices
    return pairs * d * HALF * (case.matrices / tile.rows + of_x / tile.cols)


def our_forward(engine: Engine, case: Case, d: int, device: Device) -> Phase:
    p, x = plan(engine, case, d, device), N * d * HALF
    tile = p.forward
    group, strip = sweep.share(N, tile.rows, p.groups), sweep.share(N, tile.cols, p.strips)
    groups, strips = math.ceil(N / group), math.ceil(N / strip)
    longest = (group // tile.rows) * (strip // tile.cols)
    programs, tiles = groups * strips, math.ceil(N / tile.rows) * math.ceil(N / tile.cols)
    if case.mirrored:  # on the diagonal and above
        programs, tiles = groups * (groups + 1) // 2, (tiles + math.ceil(N / tile.cols)) // 2
    pairs = tiles * tile.rows * tile.cols
    # all strips go through their columns at the same time, once for every tile of rows of their groups
    waves = math.ceil(programs / device.multiprocessors)
    y = case.matrices * x
    sweeps = 1.0 if y < device.cache / 2 else waves * group / tile.rows * pairs / N**2
    positives = 0 if case.members else 2 * x  # read once more for their logits
    statistics = 2 * (strips if case.frozen else groups + strips) * N * SINGLE  # partial maxima and sums
    return Phase(
        "forward",
        flops=2 * case.matrices * pairs * d,
        hbm=x + sweeps * y + positives + 2 * statistics,
        # of every column of a tile a maximum and a sum are read and written; those of the rows stay in the program
        l2=operands(engine, case, d, pairs, tile) + pairs / tile.rows * 4 * SINGLE,
        exponentials=pairs,
        programs=programs,
        length=tiles / (programs * longest),
        launches=1 + (positives > 0) + (1 if case.mirrored or case.frozen else 2),  # merges
        mma_sync=engine.mma_sync,
    )


def by_blocks(engine: Engine, case: Case, d: int, device: Device, side: int = sweep.WORKSPACE) -> list[Phase]:
    """Of each block the coefficients, two products of the vendor onto the gradients, and the sums for the scale."""
    tile = plan(engine, case, d, device).block
    side = math.isqrt(side**2 // case.matrices) // tile.rows * tile.rows
    blocks = Counter(
        (min(side, N - row), min(side, N - col), case.mirrored and row != col)
        for row in range(0, N, side)
        for col in range(row if case.mirrored else 0, N, side)
    )
    phases = []
    for (rows, cols, mirror), count in blocks.items():
        pairs = count * rows * cols
        coefficients = case.matrices * pairs * HALF
        grid = math.ceil(rows / tile.rows), math.ceil(cols / tile.cols)
        phases.append(
            Phase(
                "coefficients",
                flops=2 * case.matrices * pairs * d,
                hbm=coefficients + count * (rows + case.matrices * cols) * d * HALF,
                l2=operands(engine, case, d, pairs, tile) + coefficients,
                exponentials=pairs,
                programs=grid[0] * grid[1],
                launches=count,
                mma_sync=engine.mma_sync,
            )
        )
        products = [("dX", rows, cols)]
        if mirror:
            products.append(("dX", cols, rows))
        if case.vectors > 1:
            products.append(("dY", cols, rows))
        phases += [
            Phase(
                f"product, {name}",
                flops=2 * case.matrices * pairs * d,
                hbm=coefficients + case.matrices * count * d * (k * HALF + 2 * m * SINGLE),  # reads and writes the sums
                programs=product_programs(m, d, k, device),
                launches=case.matrices * count,
            )
            for name, m, k in products
        ]
        of_rows, of_cols = (2, 1) if case.members else (1, int(mirror))  # vectors: of volumes also what x_i itself has
        partials = of_rows * grid[1] * rows + of_cols * grid[0] * cols
        phases.append(Phase("sums", hbm=2 * count * partials * SINGLE, launches=2 * count * (of_rows + of_cols)))
    # float32 gradients begin at 0, and end in 16 bits
    phases.append(Phase("gradients", hbm=case.vectors * N * d * (2 * SINGLE + HALF), launches=2 * case.vectors))
    return phases


def by_rows(engine: Engine, case: Case, d: int, device: Device) -> list[Phase]:
    """A program owns rows, goes through all columns, and keeps the gradient of its rows in registers; both sides."""
    tile = plan(engine, case, d, device).rows
    assert tile, "the case is one that rows take"
    return [owner("rows", tile, engine, case, d, device)] * case.vectors


def owner(name: str, tile: Tile, engine: Engine, case: Case, d: int, device: Device) -> Phase:
    """Two products; the gradient is taken to be written in 16 bits."""
    x = N * d * HALF
    tiles = math.ceil(N / tile.rows)
    most = math.ceil(plan(engine, case, d, device).programs / tiles)
    strips = math.ceil(N / sweep.share(N, tile.cols, most))
    programs = tiles * strips
    sweeps = 1 if x < device.cache / 2 else math.ceil(programs / device.multiprocessors)
    return Phase(
        name,
        flops=4 * N * N * engine.lanes(d),
        hbm=(2 + sweeps) * x,
        l2=N * N * d * HALF / tile.rows,
        exponentials=N * N,
        programs=programs,
        mma_sync=engine.mma_sync,
    )


def by_attention(engine: Engine, case: Case, d: int, device: Device) -> list[Phase]:
    """Of a frozen y: forward owns rows and keeps the gradients of their log-sum-exps, backward takes multiples."""
    x = N * d * HALF
    return [
        owner("attention", plan(engine, case, d, device).attention, engine, case, d, device),
        Phase("statistics", hbm=2 * x, launches=2),  # merge, and the positives' logits
        Phase("kept", hbm=2 * N * d * SINGLE),
        # the multiples, those of the positives, and the rounding to 16 bits
        Phase("multiples", hbm=5 * N * d * SINGLE + 4 * x, launches=8),
    ]


def takes_rows(engine: Engine, case: Case, d: int, device: Device) -> bool:
    return plan(engine, case, d, device).rows is not None and d <= engine.rows_features


def takes_attention(engine: Engine, case: Case, d: int) -> bool:
    return case.frozen and engine.kernels().takes_attention("similarity_logsumexp", torch.bfloat16, d)


def ours(engine: Engine, d: int, device: Device, case: Case = CLIP) -> list[Phase]:
    if takes_attention(engine, case, d):
        return by_attention(engine, case, d, device)
    if takes_rows(engine, case, d, device):
        return [our_forward(engine, case, d, device), *by_rows(engine, case, d, device)]
    return in_groups(engine, case, d, device, product_tile(engine, case, d, device))


def product_tile(engine: Engine, case: Case, d: int, device: Device) -> Tile | None:
    """Of the engine's own product, rows and features; None where it is the vendor's."""
    with pretending(device):
        tile = engine.kernels().product_tiling(problem(case, d, "cuda"))
    return None if tile is None else Tile(*tile)


def in_groups(engine: Engine, case: Case, d: int, device: Device, product: Tile | None) -> list[Phase]:
    """Forward, and backward by blocks, without the tiles of which no pair counts.

    The engine's own product, of tiles, leaves them out, too. That of the vendor, None, is of all blocks, and the
    coefficients of those tiles are written as zeros.
    """
    groups = case.groups
    zeros = 0 if product else N * N * HALF * (1 - 1 / groups)
    phases = []
    for phase in (our_forward(engine, case, d, device), *by_blocks(engine, case, d, device)):
        name = phase.name.partition(",")[0]
        if name in ("forward", "coefficients") or (name == "product" and product):
            phase = replace(
                phase,
                flops=phase.flops / groups,
                hbm=phase.hbm / groups,
                l2=phase.l2 / groups,
                exponentials=phase.exponentials / groups,
            )
        if name == "coefficients":
            phase = replace(phase, hbm=phase.hbm + zeros, l2=phase.l2 + zeros)
        if name == "product" and product:  # every tile reads its operands
            phase = replace(
                phase,
                l2=phase.flops * HALF / 2 * (1 / product.rows + 1 / product.cols),
                programs=math.ceil(sweep.WORKSPACE / product.rows) * math.ceil(d / product.cols),
                mma_sync=engine.mma_sync,
            )
        phases.append(phase)
    return phases


def our_workspace(engine: Engine, d: int, device: Device) -> float:
    """Of forward the partial maxima and sums; of backward by blocks the coefficients and the gradients in float32."""
    p = plan(engine, CLIP, d, device)
    statistics = 2 * (p.groups + p.strips) * N * SINGLE
    blocks = sweep.WORKSPACE**2 * HALF + CLIP.vectors * N * d * SINGLE
    return statistics if takes_rows(engine, CLIP, d, device) else max(statistics, blocks)


# peers: traffic that is not known is left out, in their favour


def memeff(d: int, device: Device) -> list[Phase]:
    """Tiles of 128 forward; backward as ours by rows, rows by the accumulator of a power of two of lanes."""
    lanes = 1 << (d - 1).bit_length()
    rows = 64 if lanes <= 512 else 32
    side = Phase(
        "owner",
        flops=4 * N * N * lanes,
        hbm=3 * N * d * HALF,
        l2=N * N * d * HALF / rows,
        exponentials=2 * N * N,
        programs=N // rows,
    )
    forward = Phase(
        "forward", flops=2 * N * N * d, hbm=2 * N * d * HALF, l2=tiles_read(d, 128, 128), exponentials=N * N
    )
    return [forward, side, side]


def inf_cl(d: int, device: Device) -> list[Phase]:
    """Per direction a forward and two backward kernels in TF32; these add to the gradient in memory at every tile."""
    read = tiles_read(d, 64, 64, SINGLE)
    forward = Phase("forward", flops=2 * N * N * d, width=SINGLE, hbm=2 * N * d * SINGLE, l2=read, exponentials=N * N)
    backward = Phase(
        "backward",
        flops=4 * N * N * d,
        width=SINGLE,
        hbm=3 * N * d * SINGLE,
        l2=read + 3 * N * N * d * SINGLE / 64,  # an operand of the second product; a gradient, read and written
        exponentials=N * N,
    )
    return 2 * [forward, backward, backward]


def liger_chunk(d: int) -> int:
    """Rows of a chunk, whose logits are about as large as the input."""
    return 1 << (math.ceil(N / math.ceil(N / d)) - 1).bit_length()


def liger_chunked(d: int, device: Device) -> list[Phase]:
    """Per direction: logits of a chunk of rows, their softmax in place (two readings, one writing), two products."""
    chunk = liger_chunk(d)
    chunks = N // chunk
    logits = N * N * HALF
    weights = chunks * 2 * N * d * HALF  # the gradient of all columns, read and written for every chunk
    one = [
        Phase("logits", flops=2 * N * N * d, hbm=logits + chunks * N * d * HALF, launches=chunks),
        Phase("softmax", hbm=3 * logits, exponentials=2 * N * N, launches=2 * chunks),
        Phase("products", flops=4 * N * N * d, hbm=2 * logits + weights, launches=4 * chunks),
    ]
    return 2 * one


def liger_fused(d: int, device: Device) -> list[Phase]:
    """Per direction: logits never written in forward, tiles of 128 x 320; a workspace of 1024 rows in backward."""
    coefficients = N * N * HALF
    read = tiles_read(d, 128, 320)
    one = [
        Phase("forward", flops=2 * N * N * d, hbm=2 * N * d * HALF, l2=read, exponentials=N * N),
        Phase("coefficients", flops=2 * N * N * d, hbm=coefficients, l2=read + coefficients, exponentials=N * N),
        Phase("products", flops=4 * N * N * d, hbm=2 * coefficients),
    ]
    return 2 * one


def eager(d: int, device: Device) -> list[Phase]:
    """open_clip under autocast: each direction's logits, their float32 copy, log-softmax, and all of it backward."""
    pairs = N * N
    softmax = Phase("softmax", hbm=pairs * (HALF + SINGLE + 2 * SINGLE), exponentials=pairs, launches=3)
    # the gradient that cross-entropy starts from, log-softmax, the copy in bfloat16
    backward = Phase("softmax backward", hbm=pairs * (SINGLE + 3 * SINGLE + SINGLE + HALF), exponentials=pairs)
    one = [
        Phase("logits", flops=2 * pairs * d, hbm=pairs * HALF),
        softmax,
        backward,
        Phase("products", flops=4 * pairs * d, hbm=2 * pairs * HALF, launches=2),
    ]
    return 2 * one


SCHEMES = (
    *(
        Scheme(f"ours, {engine.name}", functools.partial(ours, engine), functools.partial(our_workspace, engine))
        for engine in ENGINES
    ),
    Scheme("memeff", memeff, lambda d, device: 4 * N * SINGLE),
    Scheme("Inf-CL", inf_cl, lambda d, device: 14 * N * d * SINGLE),
    Scheme("Liger, chunks x 2", liger_chunked, lambda d, device: liger_chunk(d) * N * HALF + 2 * N * d * HALF),
    Scheme(
        "Liger, sm_90 x 2",
        liger_fused,
        lambda d, device: 1024 * N * HALF + 2 * N * d * HALF,
        lambda d, device: device is H100,
    ),
    Scheme("eager", eager, lambda d, device: 4 * N * N * SINGLE),
)


def siglip(d: int, device: Device) -> list[Phase]:
    """siglip-kernel: another loss, for its published time. Chunks of 4096 rows, gradient in forward."""
    pairs = N * N
    return [
        Phase("logits", flops=2 * pairs * d, hbm=pairs * HALF, launches=N // 4096),
        Phase("gradient", hbm=2 * pairs * HALF, exponentials=2 * pairs, launches=N // 4096),
        Phase(
            "products",
            flops=4 * pairs * d,
            hbm=2 * pairs * HALF,
            programs=product_programs(4096, d, N, device),
            launches=2 * N // 4096,
        ),
    ]


# what, features, device, published milliseconds
PUBLISHED: tuple[tuple[str, Phases, int, Device, float], ...] = (
    ("memeff 0.3.1, A100", memeff, 512, A100, 201.0),
    ("siglip-kernel 0.1.2, GH200 (modelled as an H100)", siglip, 768, H100, 48.8),
)
# share of the peak in a product of R x D x R, of bfloat16 into float32, by nvidia-matmul-heuristics 0.1.0.27
HEURISTICS_SIDES = (2304, 2816, 3456, 4096, 5632, 8192)
HEURISTICS = {
    (A100, 512): (0.40, 0.53, 0.70, 0.40, 0.69, 0.71),
    (A100, 768): (0.61, 0.41, 0.58, 0.71, 0.70, 0.81),
    (A100, 1024): (0.46, 0.59, 0.77, 0.65, 0.71, 0.87),
    (H100, 512): (0.20, 0.27, 0.38, 0.48, 0.44, 0.67),
    (H100, 768): (0.34, 0.41, 0.37, 0.48, 0.62, 0.67),
    (H100, 1024): (0.26, 0.38, 0.51, 0.54, 0.70, 0.67),
}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], text: int) -> str:
    """Markdown; the first columns hold text."""
    rule = "".join([" --- |" if i < text else " ---: |" for i in range(len(columns))])
    return "\n".join([f"| {' | '.join(columns)} |", f"|{rule}", *(f"| {' | '.join(row)} |" for row in rows)])


def size(number: float) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


TIMES = tuple(f"{device.name} {kind}, ms" for device in DEVICES for kind in ("bound", "estimate"))


def times(phases: Phases, d: int, on: Sequence[Device] = DEVICES) -> list[str]:
    """Cells under TIMES, empty for a device that the scheme does not run on."""
    return [
        ms(time(phases(d, device), device)) if device in on else "" for device in DEVICES for time in (bound, estimate)
    ]


def schemes_table() -> str:
    rows = []
    for d, scheme in itertools.product(FEATURES, SCHEMES):
        on = [device for device in DEVICES if scheme.runs(d, device)]
        if on:
            phases = scheme.phases(d, on[-1])
            flops = total(phases, "flops")
            counts = [f"{flops / 1e12:.1f}", f"{flops / (N * N * d):.3g}", size(total(phases, "hbm"))]
            rows.append([str(d), scheme.name, *counts, size(scheme.workspace(d, on[-1])), *times(scheme.phases, d, on)])
    return table(("D", "scheme", "TFLOP", "per N²D", "HBM", "workspace", *TIMES), rows, 2)


def measured_table() -> str:
    """What the reports of bench/devices have of the same loss, beside the estimate for the H100."""
    schemes = {scheme.name: scheme for scheme in SCHEMES}
    names = {"triton": "ours, Triton", "cuda": "ours, CUDA", "eager": "eager"}
    rows = []
    for path in sorted(REPORTS.glob("*/report.json")):
        found = [row for outcome in json.loads(path.read_text()) for row in outcome["rows"]]
        gpu = next(row["name"] for row in found if row.get("kind") == "gpu")
        for row in found:
            case = tuple(row.get(key) for key in ("loss", "n", "dtype"))
            if case != ("clip_loss", N, "bfloat16") or row["contender"] not in names or not row.get("ms"):
                continue
            scheme = schemes[names[row["contender"]]]
            modelled = estimate(scheme.phases(row["d"], H100), H100)
            rows.append([str(row["d"]), scheme.name, gpu, ms(row["ms"] / 1e3), ms(modelled)])
    return table(("D", "scheme", "GPU", "measured, ms", "H100 estimate, ms"), rows, 3)


def by_engine(labels: Sequence[str], cells_of: Callable[[Engine], list[str]]) -> list[list[str]]:
    """A row for each engine, or one for both where they agree."""
    cells = {engine.name: cells_of(engine) for engine in ENGINES}
    first, *others = cells.values()
    if all(other == first for other in others):
        return [[*labels, "both", *first]]
    return [[*labels, name, *of] for name, of in cells.items()]


def phases_table() -> str:
    def cells(engine: Engine, i: int, d: int, device: Device) -> list[str]:
        phase = ours(engine, d, device)[i]
        seconds = phase.bounds(device)
        of_grid = [str(phase.programs), f"{phase.at_work(device):.0%}"] if phase.programs else ["", ""]
        limit = max(seconds, key=lambda what: seconds[what])
        return [str(phase.launches), *of_grid, limit, ms(phase.bound(device)), ms(phase.estimate(device))]

    rows = []
    for (device, d), _ in TARGETS:
        for i, phase in enumerate(ours(TRITON, d, device)):
            labels = (f"{device.name}, D = {d}", phase.name)
            rows += by_engine(labels, functools.partial(cells, i=i, d=d, device=device))
    columns = ("", "phase", "engine", "launches", "programs", "at work", "limit", "bound, ms", "estimate, ms")
    return table(columns, rows, 3)


def forms_table() -> str:
    file = 65536 * SINGLE  # bytes of the registers of a multiprocessor

    def cells(engine: Engine, d: int, form: Callable[..., list[Phase]]) -> list[str]:
        phases, tile = form(engine, CLIP, d, H100), plan(engine, CLIP, d, H100).rows
        return [
            "taken" if (form is by_rows) == takes_rows(engine, CLIP, d, H100) else "",
            f"{total(phases, 'flops') / 1e12:.1f}",
            size(total(phases, "hbm")),
            size(total(phases, "l2")),
            f"{total(phases, 'exponentials') / N**2:.0f}",
            f"{total(phases, 'launches'):.0f}",
            f"{tile.rows * engine.lanes(d) * SINGLE / file:.0%}" if tile and form is by_rows else "",
            *times(functools.partial(form, engine, CLIP), d),
        ]

    rows = [
        row
        for d, (name, form) in itertools.product((64, 128, 256, 512), (("blocks", by_blocks), ("rows", by_rows)))
        for row in by_engine((str(d), name), functools.partial(cells, d=d, form=form))
    ]
    counted = ("TFLOP", "HBM", "L2", "exp per pair", "launches", "registers")
    return table(("D", "form", "engine", "", *counted, *TIMES), rows, 4)


SIDES = (4096, 5632, sweep.WORKSPACE)
BLOCK_FEATURES = (512, 768, 1024)


def with_side(d: int, device: Device, side: int) -> str:
    """The estimate of all, and the share of the multiprocessors in dX of a whole block."""
    product = product_programs(side, d, side, device)
    phases = [our_forward(TRITON, CLIP, d, device), *by_blocks(TRITON, CLIP, d, device, side)]
    return f"{ms(estimate(phases, device))} ({balance(product, device):.0%})"


def fitting_side(d: int, device: Device) -> int:
    """Of at most as many rows and columns as the kernels' own, those of the least estimate."""
    sides = range(sweep.WORKSPACE, sweep.WORKSPACE // 2 - 1, -VENDOR_TILE)
    return min(sides, key=lambda side: estimate(by_blocks(TRITON, CLIP, d, device, side), device))


def workspace_table() -> str:
    on = [*itertools.product(DEVICES, BLOCK_FEATURES)]
    rows = [[f"{side}", size(side**2 * HALF), *(with_side(d, device, side) for device, d in on)] for side in SIDES]
    fitting = [(device, d, fitting_side(d, device)) for device, d in on]
    rows.append(["as fits", "", *(f"{side}: {with_side(d, device, side)}" for device, d, side in fitting)])
    return table(("rows and columns", "workspace", *(f"{device.name}, D = {d}" for device, d in on)), rows, 1)


FROZEN = Case(frozen=True)
CASES = (
    ("clip's", CLIP),
    ("y frozen, rows alone", FROZEN),
    ("self-similarity", Case(mirrored=True)),
    *((f"volumes, P = {members}", Case(members=members)) for members in (1, 2, 3, 4)),
)


def cases_table() -> str:
    def cells(engine: Engine, case: Case) -> list[str]:
        of_time = []
        for (device, d), _ in TARGETS:
            phases = ours(engine, d, device, case)
            of_time += [ms(bound(phases, device)), ms(estimate(phases, device))]
        tile = plan(engine, case, d, device)
        return [str(tile.forward), str(tile.block), f"{total(phases, 'flops') / (N * N * d):.3g}", *of_time]

    rows = [row for name, case in CASES for row in by_engine((name,), functools.partial(cells, case=case))]
    timed = (f"{device.name}, D = {d}, {kind}, ms" for (device, d), _ in TARGETS for kind in ("bound", "estimate"))
    return table(("", "engine", "tile of forward", "of backward", "per N²D", *timed), rows, 4)


def recomputed(engine: Engine, d: int, device: Device) -> list[Phase]:
    """As for a y that needs its gradient, too."""
    backward = by_rows if takes_rows(engine, FROZEN, d, device) else by_blocks
    return [our_forward(engine, FROZEN, d, device), *backward(engine, FROZEN, d, device)]


def frozen_table() -> str:
    def cells(engine: Engine, d: int, form: Callable[..., list[Phase]]) -> list[str]:
        phases = form(engine, d, H100)
        return [
            f"{total(phases, 'flops') / (N * N * d):.3g}",
            f"{total(phases, 'exponentials') / N**2:.0f}",
            size(total(phases, "hbm")),
            *times(functools.partial(form, engine), d),
        ]

    forms: dict[str, Callable[..., list[Phase]]] = {
        "attention": functools.partial(ours, case=FROZEN),
        "computed again": recomputed,
    }
    rows = [
        row
        for d, (name, form) in itertools.product((64, 128, 256), forms.items())
        for row in by_engine((str(d), name), functools.partial(cells, d=d, form=form))
    ]
    return table(("D", "form", "engine", "per N²D", "exp per pair", "HBM", *TIMES), rows, 3)


def equal_ids_table() -> str:
    def cells(phases: Phases, d: int) -> list[str]:
        return [f"{total(phases(d, H100), 'flops') / (N * N * d):.3g}", *times(phases, d)]

    def with_vendor(engine: Engine, d: int, case: Case) -> list[str]:
        return cells(functools.partial(in_groups, engine, case, product=None), d)

    rows = []
    for d, groups in itertools.product((512, 768), (2, 4, 16)):
        case, labels = Case(groups=groups), (str(d), str(groups))
        for engine in ENGINES:
            if product_tile(engine, case, d, H100):
                rows.append([*labels, "its own", engine.name, *cells(functools.partial(ours, engine, case=case), d)])
        rows += by_engine((*labels, "the vendor's"), functools.partial(with_vendor, d=d, case=case))
    return table(("D", "groups", "products", "engine", "per N²D", *TIMES), rows, 4)


def published_table() -> str:
    rows = []
    for what, scheme, d, device, published in PUBLISHED:
        modelled = [time(scheme(d, device), device) for time in (bound, estimate)]
        ratios = [f"{published / 1e3 / seconds:.1f}" for seconds in modelled]
        rows.append([what, str(d), f"{published:g}", *map(ms, modelled), *ratios])
    columns = ("", "D", "published, ms", "bound, ms", "estimate, ms", "published / bound", "published / estimate")
    return table(columns, rows, 1)


def heuristics_table() -> str:
    rows = []
    for (device, d), shares in HEURISTICS.items():
        cells = []
        for side, share in zip(HEURISTICS_SIDES, shares, strict=True):
            here = device.attained * balance(product_programs(side, d, side, device), device)
            cells.append(f"{share:.2f} ({here:.2f})")
        rows.append([f"{device.name}, D = {d}", *cells])
    return table(("", *map(str, HEURISTICS_SIDES)), rows, 1)


def assumptions_table() -> str:
    def row(what: str, of: Callable[[Device], str], source: str) -> list[str]:
        return [what, *(of(device) for device in DEVICES), source]

    rows = [
        row(
            "bfloat16, TF32 products, TFLOP/s",
            lambda on: " / ".join(f"{v / 1e12:g}" for v in on.peak.values()),
            "data sheet",
        ),
        row(
            "mma.sync, share of it",
            lambda on: f"{on.mma_sync:g}",
            "Luo et al., arXiv:2501.12084, a mean on the H800 PCIe",
        ),
        row("HBM, TB/s", lambda on: f"{on.hbm / 1e12:g}", "data sheet"),
        row("multiprocessors, GHz", lambda on: f"{on.multiprocessors}, {on.clock / 1e9:g}", "data sheet"),
        row("exponentials per second", lambda on: f"{on.exponentials:.3g}", "16 per clock and multiprocessor"),
        row("L2 reads, TB/s", lambda on: f"{on.l2 / 1e12:g}", "measured by te42kyfo/gpu-benches, the H100 on PCIe"),
        row("share of the peak that products attain", lambda on: f"{on.attained:g}", "assumed, of all kernels"),
        row("a launch from Python, µs", lambda _: f"{LAUNCH * 1e6:g}", "assumed"),
    ]
    return table(("", *(f"{device.name}-SXM" for device in DEVICES), "from"), rows, 1)


def tiles_of(engine: Engine, device: Device) -> str:
    p = plan(engine, CLIP, engine.rows_features, device)
    by_rows = {plan(engine, CLIP, d, device).rows: d for d in (64, 128, engine.rows_features)}  # the most features last
    rows = ", ".join(f"{tile} to D = {d}" for tile, d in by_rows.items())
    return (
        f"- {engine.name}, {device.name}: forward {p.forward}, in {p.groups} x {p.strips} programs; "
        f"by blocks {p.block}; by rows {rows}."
    )


def page() -> str:
    def modelled(d: int, device: Device) -> str:
        return " / ".join(ms(bound(ours(engine, d, device), device)) for engine in ENGINES)

    targets = "; ".join(
        f"{device.name}, D = {d}: {modelled(d, device)} ms, target {ms(seconds)} ms" for (device, d), seconds in TARGETS
    )
    return f"""# What the loss would cost on a GPU

The figures on this page are modelled, counted from the algorithms, where they are not said to be measured. The reports
in bench/devices decided what the kernels take, as told below. Two times that others published are named as such.
`{COMMAND}` writes the page, and a test compares.

Symmetric InfoNCE (CLIP's loss) with a learned scale, forward + backward, N = {N:,} pairs of bfloat16 vectors.

- **bound**: of each phase, the most of FLOPs, HBM, L2 and exponentials at their peak rates; the phases added up.
  Ours, {" / ".join(engine.name for engine in ENGINES)}: {targets}.
- **estimate**: with the share of the peak that products attain, with the multiprocessors that idle while the last
  programs finish, and with the host's launches where they take longer. It still leaves out what a tile does beside
  products and exponentials, latencies that nothing hides, instructions that a tile is too small for, and reads of
  shared memory.
- per N²D: FLOPs over N²D, of which one product takes 2.
- HBM: where a peer's traffic is not known, its least. Workspace: beyond inputs and gradients of their dtype.

## Ours and its peers, modelled

{schemes_table()}

Ours goes by rows up to D = {TRITON.rows_features}, with CUDA's kernels to D = {CUDA.rows_features}, by blocks above,
and keeps float32 sums of the gradients there.
Both engines have the same host code, and the products of blocks are the vendor's. In the kernels, CUDA's products are
mma.sync (m16n8k16), as all are on the A100; on the H100 Triton's are wgmma, and mma.sync has {H100.mma_sync:.0%} of the
peak. There the difference shows where the products are the limit, by rows; in forward and the coefficients of blocks it
is L2, for both engines. That is in favour of CUDA's: mma.sync takes its operands through registers, with more to issue
and to hide.
Peers as their code was read: memeff 0.3.1, inf-cl 1.2.1, Liger-Kernel 0.8.5, and for eager open_clip of June 2026.

## Measured beside it

By the reports in bench/devices. An H200 has the multiprocessors of an H100, and faster memory.

{measured_table()}

## Where ours spends it, modelled

Tiles:

{chr(10).join(tiles_of(*of) for of in itertools.product(ENGINES, DEVICES))}

{phases_table()}

## Two forms of backward, modelled

By blocks computes 6 N²D, and the coefficients of all pairs go through memory three times. By rows computes 8 N²D, and
nothing of the pairs goes through memory: a program goes through all columns and keeps the gradient of its rows in
registers. The fewer the features, the cheaper its products beside that traffic, and the smaller the gradient.
"Registers" is the gradient's share of a multiprocessor's file. With more features it leaves room for fewer programs, or
for smaller tiles, which no count here shows: memeff goes by rows at D = 512, and its published time is far above the
model. On an H200 Triton's blocks were the faster beyond D = {TRITON.rows_features}, where the model has rows ahead, and
they take over there. CUDA's do beyond D = {CUDA.rows_features}, a limit that was not measured.

Nor does a count show shared memory, of 128 bytes per clock and multiprocessor, which a warp of CUDA's reads for its own
rows alone. Up to D = 128 it has 32 rows and reads 3/64 bytes per FLOP, on the H100 for as long as mma.sync computes;
above, it has 16 and reads 5/64, 1.25 times as long as the products on the A100 and 1.6 times on the H100. There blocks
may be as fast.

{forms_table()}

## The workspace of the blocks, modelled

Estimate of forward + backward in ms with Triton's kernels, and in brackets the share of the multiprocessors at work in
a product of a block. A larger block gives the vendor's products more tiles, and fewer multiprocessors wait for the
last. It takes more memory, and does not stay in L2, which is not counted here. Ours has {sweep.WORKSPACE} rows and
columns: on an H200 backward of 16,384 rows and D = 768 took 2.4 ms, and 2.8 ms with half as many. "As fits" is the best
of at most as many and at least half, in steps of {VENDOR_TILE}: a smaller block whose tiles fill the device.

{workspace_table()}

## Other cases, modelled

{cases_table()}

- y frozen: forward 2, the coefficients 2, one product 2. For 4, nothing may be computed twice. Up to
  D = {TRITON.attention_features}, of the rows alone, forward does that, below; the weights of the columns are not known
  before all rows are seen, and above, a program has no registers for the gradients of its rows.
- Self-similarity: forward and the coefficients visit the tiles or blocks on and above the diagonal, 1 each; a block
  above it has two products, 2 in all. With many blocks that is 4; the whole blocks on the diagonal add a little.
- Volumes of tuples of P vectors (`volume_logsumexp`) take P times the products, in smaller tiles, and P matrices of
  coefficients share the workspace: a block has {sweep.WORKSPACE} / sqrt(P) rows and columns. CUDA's kernels read the
  anchors of a tile once, Triton's for each of the P vectors.

## A frozen side, modelled

Of the rows alone, with a y that needs no gradient (a memory bank, a momentum encoder's keys, a teacher), forward adds
up the gradients of the log-sum-exps beside the sums, and shrinks both where a maximum grows, as attention does. It
keeps them in float32, and backward multiplies them. The alternative computes the pairs again, by rows or by blocks. On
an H200 attention was ahead of it to D = {TRITON.attention_features}.

{frozen_table()}

## Pairs of equal ids, modelled

With `ids="restrict"` (views of one kind, classes) and rows in the order of their ids, tiles without a pair that counts
are left out: by forward, by the coefficients, and with Triton's kernels by a product of its own, for which those
coefficients are not written. CUDA's kernels have the vendor's product of all blocks, with zeros for them. For Triton's
that is the alternative; of two groups it takes an H100 as long.

{equal_ids_table()}

## Against what is known

Two times were published for kernels of this kind, and ours may be as far from the model:

{published_table()}

The share of the peak that the vendor's products reach by NVIDIA's own model, nvidia-matmul-heuristics 0.1.0.27, by rows
and columns of a block, and in brackets here:

{heuristics_table()}

## Assumptions

{assumptions_table()}

A product of the vendor has tiles of {VENDOR_TILE} x {VENDOR_TILE}; where they are too few, programs share a tile, each
with {SHORTEST_SPLIT} or more of the reduced dimension. Ours takes one exponential per pair in forward, in the
coefficients and for each side by rows, as it does where maxima lie close together. A multiprocessor takes one program
at a time.
"""


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description="Modelled cost of the loss on GPUs.")
    parser.add_argument("--write", action="store_true", help=f"into bench/{PAGE.name}")
    write = parser.parse_args(argv).write
    if sentence := why_not():
        sys.exit(sentence)
    if write:
        PAGE.write_text(page())
    else:
        print(page(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
