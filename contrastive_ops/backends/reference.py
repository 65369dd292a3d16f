"""Dense PyTorch: O(N M) memory, the correctness oracle. Runs only when named.

Autograd differentiates it directly, to any order, so it has no backward of its own.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from contrastive_ops.reference.area_logsumexp import line_logits
from contrastive_ops.reference.similarity_logsumexp import logits_at, logsumexp, similarity_logits
from contrastive_ops.reference.volume_logsumexp import volume_logits

OPS = ("similarity_logsumexp", "volume_logsumexp", "gramian_volume", "area_logsumexp")


def why_not(op: str, x: Tensor) -> str | None:
    return None


def similarity_logsumexp(
    x: Tensor,
    y: Tensor | None,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    exclude: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    restrict: bool,
    rows: bool,
    cols: bool,
) -> tuple[Tensor, ...]:
    logits_with = partial(
        similarity_logits,
        x,
        y,
        row_scale=row_scale,
        col_scale=col_scale,
        row_bias=row_bias,
        col_bias=col_bias,
    )
    logits = logits_with(exclude=exclude, row_ids=row_ids, col_ids=col_ids, restrict=restrict)
    nothing = logits.new_empty(0)
    return (
        logsumexp(logits, 1) if rows else nothing,
        logsumexp(logits, 0) if cols else nothing,
        nothing if exclude is None else logits_at(logits_with(), exclude),
        _largest(logits.detach(), 1) if rows else nothing,
        _largest(logits.detach(), 0) if cols else nothing,
    )


def volume_logsumexp(
    anchor: Tensor,
    tuples: Tensor,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    exclude: Tensor | None,
    rows: bool,
    cols: bool,
    totals: bool,
) -> tuple[Tensor, ...]:
    logits = volume_logits(anchor, tuples, row_scale=row_scale, col_scale=col_scale, exclude=exclude)
    return _with_totals(logits, rows, cols, totals)


def area_logsumexp(
    anchor: Tensor,
    lines: Tensor,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    exclude: Tensor | None,
    squared: bool,
    rows: bool,
    cols: bool,
    totals: bool,
) -> tuple[Tensor, ...]:
    logits = line_logits(anchor, lines, squared=squared, row_scale=row_scale, col_scale=col_scale, exclude=exclude)
    return _with_totals(logits, rows, cols, totals)


def _with_totals(logits: Tensor, rows: bool, cols: bool, totals: bool) -> tuple[Tensor, ...]:
    nothing = logits.new_empty(0)
    taking_part = logits.where(logits > -torch.inf, 0.0)
    return (
        logsumexp(logits, 1) if rows else nothing,
        logsumexp(logits, 0) if cols else nothing,
        taking_part.sum(1) if rows and totals else nothing,
        taking_part.sum(0) if cols and totals else nothing,
        _largest(logits.detach(), 1) if rows else nothing,
        _largest(logits.detach(), 0) if cols else nothing,
    )


def _largest(logits: Tensor, dim: int) -> Tensor:
    if logits.shape[dim] == 0:
        return logits.new_full((logits.shape[1 - dim],), -torch.inf)
    return logits.amax(dim)
