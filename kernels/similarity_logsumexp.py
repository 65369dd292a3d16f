"""similarity_logsumexp on the Triton engine: plain functions of tensors, in the arguments of the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastive_ops.kernels import sweep
from contrastive_ops.kernels.tile import Incoming, Span, Vectors


def _problem(
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
) -> sweep.Problem:
    mirrored = y is None
    if y is None:
        y, col_scale, col_bias, col_ids = x, row_scale, row_bias, row_ids
    if exclude is not None:
        exclude = sweep.index_below(y.shape[0], exclude)
    if row_ids is not None and col_ids is not None:
        row_ids, col_ids = _ranks(row_ids, row_ids if mirrored else col_ids)
    vectors = Vectors(
        row_scale, col_scale, row_bias, col_bias, exclude, exclude if mirrored else None, row_ids, col_ids
    )
    return sweep.Problem(x, y, vectors, Span(None, None), mirrored=mirrored, restrict=restrict)


def _ranks(row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The ids by their order among all, as int32: equal where they are, and half the registers."""
    ids = torch.cat([row_ids, col_ids])
    ordered, order = ids.sort()
    rank = torch.zeros_like(ids, dtype=torch.int32)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    rank = torch.empty_like(rank).scatter_(0, order, rank)
    return rank[: row_ids.shape[0]], rank[row_ids.shape[0] :]


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """row_max, col_max, row_log_sum, col_log_sum, excluded of the arguments of the op."""
    *options, rows, cols = arguments
    results = sweep.forward(_problem(*options), rows, cols)
    return tuple(results[name] for name in ("row_max", "col_max", "row_log_sum", "col_log_sum", "excluded"))


def backward(
    grad_row_lse: Tensor,
    grad_col_lse: Tensor,
    grad_excluded: Tensor,
    row_max: Tensor,
    col_max: Tensor,
    row_log_sum: Tensor,
    col_log_sum: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """Gradients of x, y, row_scale, col_scale, row_bias, col_bias; empty where not needed."""
    *options, rows, cols, needs = arguments
    problem = _problem(*options)
    if problem.mirrored:
        grad_col_lse, col_max, col_log_sum, cols = grad_row_lse, row_max, row_log_sum, rows
    has_index = problem.vectors.row_exclude is not None
    row_weight, row_max = sweep.weight_of(grad_row_lse, row_max, row_log_sum) if rows else (None, None)
    col_weight, col_max = sweep.weight_of(grad_col_lse, col_max, col_log_sum) if cols else (None, None)
    incoming = Incoming(
        row_weight,
        col_weight,
        row_max,
        col_max,
        row_excluded=grad_excluded if has_index else None,
        col_excluded=grad_excluded if has_index and problem.mirrored else None,
    )
    grads = sweep.backward(problem, problem.y[:, None], incoming, needs)
    dtype = problem.x.dtype
    features = problem.x.new_empty(0)
    vectors = tuple(features.new_empty(0, dtype=torch.float32) if grad is None else grad for grad in grads[2:])
    return (
        features if grads.x is None else grads.x.to(dtype),
        features.clone() if grads.y is None else grads.y[0].to(dtype),
        *vectors,
    )
