"""What a symmetric contrastive loss would cost on a GPU, counted, for ours and its peers: bench/COST.md.

python -m bench.cost [--write]

A scheme is a list of phases, one after the other. A phase takes as long as what it needs most of: floating-point
operations, bytes of HBM, bytes of L2, or exponentials. What ours does is read from the kernels' own constants.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import resources
from contrastive_ops.backends import triton as backend

PAGE = Path(__file__).parents[1] / "bench" / "COST.md"
COMMAND = "python -m bench.cost --write"
N = 65536
FEATURES = (128, 512, 768, 1024)
HALF, SINGLE = 2, 4  # bytes of an element


@dataclass(frozen=True)
class Device:
    name: str
    target: str  # of bench/RESOURCES.md
    peak: dict[int, float]  # FLOP/s by bytes of an element: bfloat16, TF32
    attained: float  # share of the peak that the vendor's large products reach; no kernel is taken to reach more
    hbm: float  # bytes/s
    l2: float  # bytes/s of reads that hit
    cache: float  # bytes of L2
    multiprocessors: int
    clock: float

    @property
    def exponentials(self) -> float:
        """Per second: 16 in a clock of a multiprocessor."""
        return 16 * self.multiprocessors * self.clock


A100 = Device("A100", "cuda:80", {HALF: 312e12, SINGLE: 156e12}, 0.80, 2.0e12, 5.4e12, 40e6, 108, 1.41e9)
H100 = Device("H100", "cuda:90", {HALF: 989e12, SINGLE: 494e12}, 0.75, 3.35e12, 7.0e12, 50e6, 132, 1.755e9)
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
    programs: int = 0  # of one launch, of equal length; 0 where the grid is not known or does not matter
    launches: int = 1

    def bounds(self, device: Device) -> dict[str, float]:
        """Seconds by resource, each at its peak."""
        return {
            "products": self.flops / device.peak[self.width],
            "HBM": self.hbm / device.hbm,
            "L2": self.l2 / device.l2,
            "exp": self.exponentials / device.exponentials,
        }

    def bound(self, device: Device) -> float:
        return max(self.bounds(device).values())

    def estimate(self, device: Device) -> float:
        """With the share of the peak that products attain, and the multiprocessors that wait for the last program."""
        seconds = self.bounds(device)
        seconds["products"] /= device.attained
        return max(seconds.values()) / balance(self.programs, device)


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


Phases = Callable[[int, Device], list[Phase]]  # by features and device


@dataclass(frozen=True)
class Scheme:
    name: str
    phases: Phases
    workspace: Callable[[int], float]  # bytes beyond inputs and gradients, by features
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


def kernels() -> Any:
    return backend.kernels()


def tiling(device: Device) -> Any:
    table = kernels().TILINGS
    return table.get(f"sm_{device.target.partition(':')[2]}", table["any"])[HALF]


def our_forward(d: int, device: Device) -> Phase:
    tile, groups = tiling(device), kernels().GROUPS
    x = N * d * HALF
    # the programs of a group go through its rows together, once for every tile of columns of their strips
    sweeps = 1 if x < device.cache / 2 else N / groups / tile.block_n
    return Phase(
        "forward",
        flops=2 * N * N * d,
        hbm=sweeps * x + x,
        l2=tiles_read(d, tile.block_m, tile.block_n),
        exponentials=N * N,
        programs=groups * groups,
        launches=3,
    )


def workspace_backward(d: int, device: Device) -> list[Phase]:
    """Coefficients of a block, two products of the vendor, their sums, and those of the scales' gradients."""
    tile, side = tiling(device), kernels().WORKSPACE
    blocks = math.ceil(N / side) ** 2
    coefficients = N * N * HALF
    features = blocks * 2 * side * d * HALF
    results = blocks * 2 * side * d * SINGLE
    return [
        Phase(
            "coefficients",
            flops=2 * N * N * d,
            hbm=coefficients + features,
            l2=tiles_read(d, tile.block_m, tile.block_n) + coefficients,
            exponentials=2 * N * N,
            programs=math.ceil(side / tile.block_m) * math.ceil(side / tile.block_n),
            launches=blocks,
        ),
        Phase(
            "products",
            flops=4 * N * N * d,
            hbm=2 * coefficients + features + results,
            programs=product_programs(side, d, side, device),
            launches=2 * blocks,
        ),
        Phase("sums", hbm=3 * results, launches=10 * blocks),
    ]


def owner_backward(d: int, device: Device) -> list[Phase]:
    """A program owns rows, goes through all columns, and keeps the gradient of its rows in registers; both sides."""
    rows = tiling(device).block_m
    side = Phase(
        "owner",
        flops=4 * N * N * d,
        hbm=3 * N * d * HALF,
        l2=N * N * d * HALF / rows,
        exponentials=2 * N * N,
        programs=math.ceil(N / rows),
    )
    return [side, side]


def workspace_bytes(d: int) -> float:
    """The workspace, gradients in float32 and a product, and the partials of forward: a maximum and a sum."""
    side = kernels().WORKSPACE
    return side * side * HALF + (2 * N + side) * d * SINGLE + 4 * kernels().GROUPS * N * SINGLE


def owner_bytes(d: int) -> float:
    return 4 * kernels().GROUPS * N * SINGLE


def ours(d: int, device: Device) -> list[Phase]:
    return [our_forward(d, device), *workspace_backward(d, device)]


def ours_owner(d: int, device: Device) -> list[Phase]:
    return [our_forward(d, device), *owner_backward(d, device)]


OWNER_FEATURES = 128  # at most


# peers: traffic that is not known is left out, in their favour


def memeff(d: int, device: Device) -> list[Phase]:
    """Tiles of 128 forward; backward as our owner form, rows by the accumulator of a power of two of lanes."""
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
    Scheme("ours, workspace", ours, workspace_bytes),
    Scheme("ours, owner", ours_owner, owner_bytes, lambda d, device: d <= OWNER_FEATURES),
    Scheme("memeff", memeff, lambda d: 4 * N * SINGLE),
    Scheme("Inf-CL", inf_cl, lambda d: 14 * N * d * SINGLE),
    Scheme("Liger, chunks x 2", liger_chunked, lambda d: liger_chunk(d) * N * HALF + 2 * N * d * HALF),
    Scheme(
        "Liger, sm_90 x 2",
        liger_fused,
        lambda d: 1024 * N * HALF + 2 * N * d * HALF,
        lambda d, device: device.target == "cuda:90",
    ),
    Scheme("eager", eager, lambda d: 4 * N * N * SINGLE),
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
# share of the peak in a product of 4096 x D x 4096, by NVIDIA's model: nvidia-matmul-heuristics 0.1.0.27
HEURISTICS = {("A100", 512): 0.41, ("A100", 768): 0.71, ("H100", 512): 0.48, ("H100", 768): 0.48}


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
            rows.append([str(d), scheme.name, *counts, size(scheme.workspace(d)), *times(scheme.phases, d, on)])
    return table(("D", "scheme", "TFLOP", "per N²D", "HBM", "workspace", *TIMES), rows, 2)


def phases_table() -> str:
    rows = []
    for (device, d), _ in TARGETS:
        for phase in ours(d, device):
            seconds = phase.bounds(device)
            of_grid = [str(phase.programs), f"{balance(phase.programs, device):.0%}"] if phase.programs else ["", ""]
            limit = max(seconds, key=lambda what: seconds[what])
            of_time = [ms(phase.bound(device)), ms(phase.estimate(device))]
            rows.append([f"{device.name}, D = {d}", phase.name, held(phase.name, device), *of_grid, limit, *of_time])
    columns = ("", "phase", "programs held", "programs", "at work", "limit", "bound, ms", "estimate, ms")
    return table(columns, rows, 2)


def held(phase: str, device: Device) -> str:
    """Programs that a multiprocessor holds, of the compiled bfloat16 kernel: fewest and most over the options."""
    kernel = {"forward": "forward", "coefficients": "backward"}.get(phase)
    _, section = resources.committed(device.target)
    lines = ([cell.strip() for cell in line.split("|")] for line in section.splitlines())
    found = [int(cells[-2]) for cells in lines if cells[1:3] == [kernel, "bfloat16"]]
    return "" if not found else " to ".join(map(str, sorted({min(found), max(found)})))


def forms_table() -> str:
    rows = []
    file = 65536 * SINGLE  # bytes of the registers of a multiprocessor
    for d in (64, 128, 256, 512):
        for name, form in (("workspace", workspace_backward), ("owner", owner_backward)):
            phases = form(d, H100)
            counts = [
                f"{total(phases, 'flops') / 1e12:.1f}",
                size(total(phases, "hbm")),
                size(total(phases, "l2")),
                f"{total(phases, 'exponentials') / N**2:.0f}",
                f"{total(phases, 'launches'):.0f}",
                f"{tiling(H100).block_m * d * SINGLE / file:.0%}" if name == "owner" else "",
            ]
            rows.append([str(d), name, *counts, *times(form, d)])
    counted = ("TFLOP", "HBM", "L2", "exp per pair", "launches", "registers")
    return table(("D", "form", *counted, *TIMES), rows, 2)


def published_table() -> str:
    rows = []
    for what, scheme, d, device, published in PUBLISHED:
        modelled = [time(scheme(d, device), device) for time in (bound, estimate)]
        ratios = [f"{published / 1e3 / seconds:.1f}" for seconds in modelled]
        rows.append([what, str(d), f"{published:g}", *map(ms, modelled), *ratios])
    columns = ("", "D", "published, ms", "bound, ms", "estimate, ms", "published / bound", "published / estimate")
    return table(columns, rows, 1)


def heuristics() -> str:
    def here(name: str, d: int) -> float:
        device = next(device for device in DEVICES if device.name == name)
        return device.attained * balance(product_programs(4096, d, 4096, device), device)

    return "; ".join(f"{name}, D = {d}: {there:.2f} ({here(name, d):.2f})" for (name, d), there in HEURISTICS.items())


def assumptions_table() -> str:
    def row(what: str, of: Callable[[Device], str], source: str) -> list[str]:
        return [what, *(of(device) for device in DEVICES), source]

    rows = [
        row(
            "bfloat16, TF32 products, TFLOP/s",
            lambda on: " / ".join(f"{v / 1e12:g}" for v in on.peak.values()),
            "data sheet",
        ),
        row("HBM, TB/s", lambda on: f"{on.hbm / 1e12:g}", "data sheet"),
        row("multiprocessors, GHz", lambda on: f"{on.multiprocessors}, {on.clock / 1e9:g}", "data sheet"),
        row("exponentials per second", lambda on: f"{on.exponentials:.3g}", "16 per clock and multiprocessor"),
        row("L2 reads, TB/s", lambda on: f"{on.l2 / 1e12:g}", "measured by te42kyfo/gpu-benches, the H100 on PCIe"),
        row("share of the peak that products attain", lambda on: f"{on.attained:g}", "assumed, of all kernels"),
        row("a launch from Python, µs", lambda _: f"{LAUNCH * 1e6:g}", "assumed"),
    ]
    return table(("", *(f"{device.name}-SXM" for device in DEVICES), "from"), rows, 1)


def page() -> str:
    tiles = ", ".join(f"{device.name} {' x '.join(map(str, tiling(device)[:3]))}" for device in DEVICES)
    targets = "; ".join(
        f"{device.name}, D = {d}: {ms(bound(ours(d, device), device))} ms, target {ms(seconds)} ms"
        for (device, d), seconds in TARGETS
    )
    return f"""# What the loss would cost on a GPU

Every figure on this page is modelled, counted from the algorithms; nothing was measured on a GPU. Two times that others
published are named as such. `{COMMAND}` writes the page, and a test compares.

Symmetric InfoNCE (CLIP's loss) with a learned scale, forward + backward, N = {N:,} pairs of bfloat16 vectors.

- **bound**: of each phase, the most of FLOPs, HBM, L2 and exponentials at their peak rates; the phases added up.
  Ours: {targets}.
- **estimate**: with the share of the peak that products attain, with the multiprocessors that idle while the last
  programs finish, and with the host's launches where they take longer. It still leaves out what a tile does beside
  products and exponentials, latencies that nothing hides, and instructions that a tile is too small for.
- per N²D: FLOPs over N²D, of which one product takes 2.
- HBM: where a peer's traffic is not known, its least. Workspace: beyond inputs and gradients of their dtype.

## Ours and its peers, modelled

{schemes_table()}

Ours keeps float32 sums of the gradients in its workspace. Volumes of tuples of P vectors (`volume_logsumexp`) take P
times the products. Peers as their code was read: memeff 0.3.1, inf-cl 1.2.1, Liger-Kernel 0.8.5, and for eager
open_clip of June 2026.

## Where ours spends it, modelled

Tiles: {tiles}. {kernels().GROUPS} groups of rows, as many strips of columns, a workspace of {kernels().WORKSPACE}
rows and columns. Programs held: by a multiprocessor at once, with all options and with none, from RESOURCES.md.

{phases_table()}

## Two forms of backward, modelled

The workspace form computes 6 N²D, and the coefficients of all pairs go through memory three times. The owner form
computes 8 N²D, and nothing of the pairs goes through memory: a program goes through all columns and keeps the gradient
of its rows in registers. The fewer the features, the cheaper its products beside that traffic, and the smaller the
gradient. "Registers" is its share of a multiprocessor's file: at a half there is room for one program with small tiles,
which no count here shows, but memeff's published time below does. Ours takes the owner form up to D = {OWNER_FEATURES}.

{forms_table()}

## Against what is known

Two times were published for kernels of this kind, and ours may be as far from the model:

{published_table()}

The share of the peak in a vendor's product of 4096 x D x 4096 by NVIDIA's own model, nvidia-matmul-heuristics
0.1.0.27, and in brackets here: {heuristics()}.

## Assumptions

{assumptions_table()}

A product of the vendor has tiles of {VENDOR_TILE} x {VENDOR_TILE}; where they are too few, programs share a tile, each
with {SHORTEST_SPLIT} or more of the reduced dimension. The programs of one launch take equally long.
"""


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description="Modelled cost of the loss on GPUs.")
    parser.add_argument("--write", action="store_true", help=f"into bench/{PAGE.name}")
    if parser.parse_args(argv).write:
        PAGE.write_text(page())
    else:
        print(page(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
