"""Dense PyTorch: O(N M) memory, the correctness oracle. Runs only when named.

Autograd differentiates it directly, to any order, so it has no backward of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastive_ops.reference.area_logsumexp import line_logits
from contrastive_ops.reference.similarity import (
    FUNCTIONS,
    best,
    expectation,
    largest,
    logits_at,
    logsumexp,
    similarity_logits,
    takes_part,
)
from contrastive_ops.reference.volume_logsumexp import volume_logits

OPS = (
    "similarity_logsumexp",
    "similarity_sum",
    "similarity_expectation",
    "similarity_topk",
    "volume_logsumexp",
    "gramian_volume",
    "area_logsumexp",
)


def why_not(op: str, x: Tensor) -> str | None:
    return None


def similarity_logsumexp(*arguments: Any) -> tuple[Tensor, ...]:
    *pairs, rows, cols = arguments
    logits, excluded = _logits(*pairs)
    nothing = logits.new_empty(0)
    return (
        logsumexp(logits, 1) if rows else nothing,
        logsumexp(logits, 0) if cols else nothing,
        excluded,
        largest(logits, 1) if rows else nothing,
        largest(logits, 0) if cols else nothing,
    )


def similarity_sum(*arguments: Any) -> tuple[Tensor, ...]:
    x, y, *options, rows, cols, of = arguments
    logits = similarity_logits(x, y, **dict(zip(_VECTORS, options, strict=False)))
    masks = dict(zip(_MASKS, options[len(_VECTORS) :], strict=True))
    taking_part = takes_part(logits, y is None, **masks) & (logits != -torch.inf)
    terms = torch.where(taking_part, FUNCTIONS[of](logits.where(taking_part, 0.0)), 0.0)
    nothing, exclude = logits.new_empty(0), masks["exclude"]
    return (
        terms.sum(1) if rows else nothing,
        terms.sum(0) if cols else nothing,
        nothing if exclude is None else logits_at(logits, exclude),
    )


def similarity_expectation(*arguments: Any) -> tuple[Tensor, ...]:
    x, y, row_scale, col_scale, row_bias, col_bias, u, v, *options, exclude, row_ids, col_ids, restrict, rows, cols = (
        arguments
    )
    masks = {"exclude": exclude, "row_ids": row_ids, "col_ids": col_ids, "restrict": restrict}
    vectors = dict(zip(_VECTORS, (row_scale, col_scale, row_bias, col_bias), strict=True))
    logits = similarity_logits(x, y, **vectors, **masks)
    teacher = logits if u is None else similarity_logits(u, v, **dict(zip(_VECTORS, options, strict=True)), **masks)
    nothing = logits.new_empty(0)
    return (
        expectation(logits, teacher, 1) if rows else nothing,
        expectation(logits, teacher, 0) if cols else nothing,
        logsumexp(logits, 1) if rows else nothing,
        logsumexp(logits, 0) if cols else nothing,
    )


def similarity_topk(*arguments: Any) -> tuple[Tensor, ...]:
    x, y, *options, k, biggest, noise = arguments
    names = (*_VECTORS, "exclude", "row_ids", "col_ids", "restrict")
    return best(similarity_logits(x, y, **dict(zip(names, options, strict=True))), k, biggest, noise)


_VECTORS = ("row_scale", "col_scale", "row_bias", "col_bias")
_MASKS = ("exclude", "row_ids", "col_ids", "guide_x", "guide_y", "ceiling", "col_ceiling", "restrict", "above")


def _logits(x: Tensor, y: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    """The logits, and those of the excluded pairs."""
    vectors = dict(zip(_VECTORS, options, strict=False))
    masks = dict(zip(_MASKS, options[len(_VECTORS) :], strict=True))
    logits = similarity_logits(x, y, **vectors, **masks)
    exclude = masks["exclude"]
    if exclude is None:
        return logits, logits.new_empty(0)
    return logits, logits_at(similarity_logits(x, y, **vectors), exclude)


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
        largest(logits, 1) if rows else nothing,
        largest(logits, 0) if cols else nothing,
    )
