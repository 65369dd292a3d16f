"""Noise that belongs to a pair: a hash of its row, its column and a seed, the same in every order of the tiles."""

from __future__ import annotations

import torch
from torch import Tensor

# of splitmix64 (Steele, Lea and Flood: Fast splittable pseudorandom number generators), as signed 64-bit numbers
STEP = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def start(seed: int) -> int:
    """Where the stream of a seed begins, as a signed 64-bit number."""
    return int(_mix(torch.tensor(_signed(seed))))


def gumbel(seed: int, rows: Tensor, cols: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise of pairs; rows and columns are int64 indices below 2^32 that are broadcast.

    The place of the pair (i, j) in the stream of the seed is i 2^32 + j + 1; of the 64 bits there the first 23 make a
    number in (0, 1).
    """
    bits = _mix(start(seed) + ((rows << 32) + cols + 1) * STEP)
    uniform = (_shifted(bits, 41).to(dtype) + 0.5) * 2.0**-23  # 24 bits: never 1 in float32
    return -(-uniform.log()).log()


def _signed(seed: int) -> int:
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, with zeros."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    for by, factor in MIX:
        bits = (bits ^ _shifted(bits, by)) * factor
    return bits ^ _shifted(bits, 31)
