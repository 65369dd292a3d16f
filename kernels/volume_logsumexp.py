"""volume_logsumexp on the Triton engine: plain functions of tensors, in the arguments of the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastive_ops.backends import tuples as tuple_basis
from contrastive_ops.kernels import sweep
from contrastive_ops.kernels.tile import Incoming, Span, Vectors


def _problem(
    anchor: Tensor,
    tuples: Tensor,
    basis: tuple_basis.Basis,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    exclude: Tensor | None,
) -> sweep.Problem:
    weight = tuple_basis.column_weight(basis, col_scale, anchor)
    if exclude is not None:
        exclude = sweep.index_below(tuples.shape[0], exclude)
    vectors = Vectors(row_scale, weight, None, None, exclude, None, None, None)
    return sweep.Problem(anchor, tuples, vectors, Span(*tuple_basis.packed(basis, anchor)))


def forward(anchor: Tensor, tuples: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """row_max, col_max, row_log_sum, col_log_sum, row_total, col_total of the arguments of the op."""
    *options, rows, cols, totals = arguments
    results = sweep.forward(_problem(anchor, tuples, tuple_basis.factor(tuples), *options), rows, cols, totals)
    names = ("row_max", "col_max", "row_log_sum", "col_log_sum", "row_total", "col_total")
    return tuple(results[name] for name in names)


def backward(
    grad_row_lse: Tensor,
    grad_col_lse: Tensor,
    grad_row_total: Tensor,
    grad_col_total: Tensor,
    row_max: Tensor,
    col_max: Tensor,
    row_log_sum: Tensor,
    col_log_sum: Tensor,
    anchor: Tensor,
    tuples: Tensor,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    exclude: Tensor | None,
    rows: bool,
    cols: bool,
    totals: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of anchor, tuples, row_scale, col_scale; empty where not needed."""
    basis = tuple_basis.factor(tuples)
    problem = _problem(anchor, tuples, basis, row_scale, col_scale, exclude)
    row_weight, row_max = sweep.weight_of(grad_row_lse, row_max, row_log_sum) if rows else (None, None)
    col_weight, col_max = sweep.weight_of(grad_col_lse, col_max, col_log_sum) if cols else (None, None)
    incoming = Incoming(
        row_weight,
        col_weight,
        row_max,
        col_max,
        row_total=grad_row_total if rows and totals else None,
        col_total=grad_col_total if cols and totals else None,
    )
    orthonormal = tuple_basis.orthonormal(tuples, basis) if needs[0] else None
    needed = [*tuple_basis.needs_of_sweep(needs), False, False]
    grads = sweep.backward(problem, orthonormal, incoming, needed)
    empty = anchor.new_empty(0, dtype=torch.float32)
    sweep_grads = (
        anchor.new_empty(0) if grads.x is None else grads.x.to(anchor.dtype),
        empty if grads.y is None else grads.y.transpose(0, 1),
        empty if grads.row_scale is None else grads.row_scale,
        empty if grads.col_scale is None else grads.col_scale,
    )
    return tuple_basis.gradients(tuples, basis, col_scale, sweep_grads, needs)
