"""What the losses and searches over volumes share: unit vectors, tuples, tiles of an N x M plane of volumes."""

from __future__ import annotations

from functools import reduce
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import promoted, without_autocast
from contrastive_ops.losses import terms
from contrastive_ops.ops import inverse_norm, orthogonalised, unit_tuples


def inverse_norms(tuples: Tensor) -> Tensor:
    """The product over a tuple of 1 / |m_t|: the scale that makes its volume that of unit vectors."""
    return reduce(mul, inverse_norm(tuples).unbind(-1))


class Columns(NamedTuple):
    """What a tile of volumes needs of its tuples."""

    volume: Tensor  # [M], of the tuple alone
    directions: list[Tensor]  # P times [M, D]


def columns(tuples: Tensor, normalize: bool) -> Columns:
    norms, directions = orthogonalised(tuples)
    return Columns(terms.scaled(inverse_norms(tuples) if normalize else None, reduce(mul, norms)), directions)


def tile(anchor: Tensor, cols: Columns) -> Tensor:
    """Volumes of all pairs: that of the tuple times the distance of the anchor from its span.

    The squared distance is a difference, |a|^2 - sum_t <q_t, a>^2; below its rounding errors it is 0.
    """
    squared = anchor.square().sum(1)[:, None]
    distance = squared
    with without_autocast(anchor):
        for q in cols.directions:
            distance = distance - (anchor @ q.T).square()
    nothing = distance <= 8 * torch.finfo(anchor.dtype).eps * squared
    return distance.masked_fill(nothing, 0.0).sqrt() * cols.volume


def rows_per_chunk(size: int, per_row: int) -> int:
    """How many rows make a chunk of about 2**22 numbers: 16 MB in float32."""
    return max(1, min(size, 2**22 // max(per_row, 1)))


def stacked(vectors: tuple[Tensor, ...]) -> Tensor:
    """K times (N, D) as (N, K, D)."""
    with without_autocast(vectors[0]):  # its rule for stack fails on float16 tensors on CPU
        return torch.stack(vectors, 1)


def matched(anchor: Tensor, others: tuple[Tensor, ...], normalize: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors of each sample (N, K, D), of these the anchors (N, D), and the tuples (N, K - 1, D)."""
    if normalize:
        return unit_tuples(anchor, *others, backend=backend)
    return stacked((anchor, *others)), anchor, stacked(others)


def checked(
    anchor: Tensor, others: tuple[Tensor, ...], names: tuple[str, ...] = (), to: torch.dtype | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The modalities, to go on with: all of one shape (N, D), device and dtype; without names the items of `others`."""
    names = names or tuple(f"others[{t}]" for t in range(len(others)))
    checks.features("anchor", anchor)
    checks.modalities(others)
    for name, other in zip(names, others, strict=True):
        checks.features(name, other)
    anchor, *rest = promoted(anchor, *others, to=to)
    for name, other in zip(names, rest, strict=True):
        checks.same_kind(name, other, "anchor", anchor)
        checks.same_shape(name, other, "anchor", anchor)
    return anchor, tuple(rest)
