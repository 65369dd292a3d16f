"""How Triton cuts a problem: tiles, warps and stages by device, dtype and options, in one table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_ops.plane import Problem


class Tiling(NamedTuple):
    """Rows, columns and features of a step; sizes are powers of two."""

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int
    descriptors: bool = False  # features come by tensor descriptors, where they are aligned, and not by pointers


class Tilings(NamedTuple):
    """The tiling of each kernel. Many: with options that take registers for every column, see `_many`."""

    forward: Tiling  # tiles of columns divide those of rows: in self-similarity the diagonal is between tiles of rows
    forward_many: Tiling
    block: Tiling
    block_many: Tiling
    second: Tiling  # forward of pairs with a second form
    second_block: Tiling
    volume: Tiling  # forward and block, P = 1 and 2
    volume_many: Tiling  # P = 3 and 4
    product: Tiling  # where only equal ids take part; at most, see `product_tiling`
    rows: Tiling | None  # rows and attention, its block_d is all features; None where they are not used
    precision: str = "ieee"  # of float32 products; "tf32x3" is three products of parts, with the error of float32


# By class of device, then by bytes of an element. Where nothing is measured, the largest that spill no registers:
# bench/RESOURCES.md has them all.
TILINGS = {
    "any": {
        2: Tilings(
            forward=Tiling(128, 128, 32, 8, 4),
            forward_many=Tiling(128, 64, 64, 8, 3),
            block=Tiling(128, 64, 64, 4, 3),
            block_many=Tiling(128, 64, 64, 8, 3),
            second=Tiling(64, 64, 64, 8, 3),
            second_block=Tiling(64, 64, 64, 8, 3),
            volume=Tiling(128, 64, 64, 8, 3),
            volume_many=Tiling(64, 32, 64, 8, 3),
            product=Tiling(64, 64, 256, 8, 3),
            rows=Tiling(64, 32, 0, 8, 2),
        ),
        4: Tilings(
            *[Tiling(64, 64, 32, 8, 2)] * 7,
            volume_many=Tiling(64, 32, 16, 8, 3),
            product=Tiling(64, 32, 64, 8, 2),
            rows=None,
        ),
    },
    # the fastest of those measured on an H200, bench/devices; some spill registers, and are ahead all the same
    "sm_90": {
        2: Tilings(
            forward=Tiling(128, 128, 64, 4, 3, descriptors=True),
            forward_many=Tiling(128, 128, 64, 4, 3, descriptors=True),
            block=Tiling(64, 128, 64, 4, 3, descriptors=True),
            block_many=Tiling(64, 128, 64, 4, 3, descriptors=True),
            second=Tiling(64, 64, 64, 8, 3, descriptors=True),
            second_block=Tiling(64, 64, 64, 8, 3, descriptors=True),
            volume=Tiling(128, 64, 64, 4, 3),
            volume_many=Tiling(64, 64, 64, 4, 3),
            product=Tiling(64, 64, 256, 8, 3),
            rows=Tiling(64, 64, 0, 4, 3),
        ),
        4: Tilings(
            forward=Tiling(128, 64, 32, 4, 3, descriptors=True),
            forward_many=Tiling(128, 64, 32, 4, 3, descriptors=True),
            block=Tiling(128, 64, 32, 4, 3, descriptors=True),
            block_many=Tiling(128, 64, 32, 4, 3, descriptors=True),
            second=Tiling(64, 64, 32, 8, 3, descriptors=True),
            second_block=Tiling(64, 64, 32, 8, 3, descriptors=True),
            volume=Tiling(128, 64, 32, 8, 3),
            volume_many=Tiling(64, 32, 16, 8, 3),
            product=Tiling(64, 32, 64, 8, 2),
            rows=None,
            precision="tf32x3",
        ),
    },
    "sm_100": {
        2: Tilings(
            forward=Tiling(128, 64, 64, 8, 3),
            forward_many=Tiling(64, 64, 64, 8, 3),
            block=Tiling(64, 64, 64, 8, 3),
            block_many=Tiling(64, 64, 64, 8, 3),
            second=Tiling(64, 32, 128, 8, 2),
            second_block=Tiling(64, 32, 64, 8, 2),
            volume=Tiling(64, 32, 64, 8, 2),
            volume_many=Tiling(64, 32, 64, 8, 2),
            product=Tiling(64, 64, 256, 8, 3),
            rows=Tiling(64, 64, 0, 8, 2),
        ),
        4: Tilings(
            forward=Tiling(64, 64, 32, 8, 2),
            forward_many=Tiling(64, 64, 32, 8, 2),
            block=Tiling(64, 64, 32, 8, 2),
            block_many=Tiling(64, 32, 32, 4, 2),
            second=Tiling(32, 32, 32, 8, 2),
            second_block=Tiling(32, 32, 32, 8, 2),
            volume=Tiling(64, 32, 32, 8, 2),
            volume_many=Tiling(64, 32, 32, 8, 2),
            product=Tiling(64, 32, 128, 8, 2),
            rows=None,
        ),
    },
    "hip": {
        2: Tilings(
            forward=Tiling(128, 128, 64, 8, 2),
            forward_many=Tiling(128, 128, 64, 8, 2),
            block=Tiling(128, 128, 64, 8, 2),
            block_many=Tiling(128, 64, 64, 8, 2),
            second=Tiling(64, 64, 64, 8, 2),
            second_block=Tiling(64, 64, 64, 8, 2),
            volume=Tiling(128, 64, 64, 8, 2),
            volume_many=Tiling(64, 32, 64, 4, 2),
            product=Tiling(64, 64, 256, 8, 3),
            rows=Tiling(64, 32, 0, 4, 2),
        ),
        4: Tilings(
            *[Tiling(64, 64, 16, 8, 3)] * 7,
            volume_many=Tiling(64, 32, 16, 4, 2),
            product=Tiling(64, 32, 128, 8, 2),
            rows=None,
        ),
    },
}
# the most features of rows and of attention: beyond, the blocks are faster, by bench/devices
ROWS_FEATURES = 128
ATTENTION_FEATURES = 256
CANDIDATES = 4096  # of a program, in registers


def device_class(x: Tensor) -> str:
    """The key of TILINGS for the device of a tensor."""
    if x.device.type != "cuda":
        return "any"
    if torch.version.hip is not None:
        return "hip"
    generation = f"sm_{torch.cuda.get_device_capability(x.device)[0]}0"
    return generation if generation in TILINGS else "any"


def _many(problem: Problem) -> bool:
    v = problem.vectors
    return any(option is not None for option in (v.col_scale, v.row_bias, v.col_bias, v.row_ids))


def _of(problem: Problem) -> Tilings:
    return TILINGS[device_class(problem.x)][problem.x.element_size()]


def precision(problem: Problem) -> str:
    """Of products of float32, where TF32 is not allowed."""
    return _of(problem).precision


def forward_tiling(problem: Problem) -> Tiling:
    tilings = _of(problem)
    if problem.members:
        return tilings.volume if problem.members <= 2 else tilings.volume_many
    if problem.second.u is not None:
        return tilings.second
    return tilings.forward_many if _many(problem) else tilings.forward


def block_tiling(problem: Problem) -> Tiling:
    tilings = _of(problem)
    if problem.members:
        return forward_tiling(problem)
    if problem.second.u is not None:
        return tilings.second_block
    return tilings.block_many if _many(problem) or problem.mirrored else tilings.block


def product_tiling(problem: Problem) -> Tiling:
    """Tiles divide those of block_kernel, whichever side the rows are."""
    tiling, side = _of(problem).product, min(block_tiling(problem)[:2])
    return tiling._replace(
        block_m=min(tiling.block_m, side),
        block_n=min(tiling.block_n, side),
        block_d=min(tiling.block_d, _lanes(problem.features)),
    )


def rows_tiling(problem: Problem) -> Tiling | None:
    """None where rows_kernel does not take the problem."""
    tiling = _of(problem).rows
    simple = not problem.members and problem.second.u is None and problem.reduction != "expectation"
    if tiling is None or not simple or problem.features > ROWS_FEATURES:
        return None
    return _of_all_features(tiling, problem)


def attention_tiling(problem: Problem) -> Tiling:
    return _of_all_features(_of(problem).rows, problem)


def topk_tiling(problem: Problem, k: int) -> Tiling:
    """That of forward, with fewer rows where their candidates take the registers: no target spills any."""
    tiling = _of(problem).forward_many._replace(block_n=64)
    if k * 64 > CANDIDATES:
        return tiling._replace(block_m=16, warps=4)
    return tiling._replace(block_m=min(tiling.block_m, CANDIDATES // k), warps=8)


def _of_all_features(tiling: Tiling, problem: Problem) -> Tiling:
    return tiling._replace(block_d=_lanes(problem.features))


def _lanes(features: int) -> int:
    return max(16, 1 << (features - 1).bit_length())
