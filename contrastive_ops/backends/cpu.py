"""The C++ engine (csrc/cpu): fused tiles, threads, vector instructions chosen at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from contrastive_ops import build, checks
from contrastive_ops.backends import tuples as tuple_basis
from contrastive_ops.dtypes import statistics_dtype

OPS = (
    "similarity_logsumexp",
    "similarity_sum",
    "similarity_expectation",
    "similarity_topk",
    "volume_logsumexp",
    "gramian_volume",
)


def why_not(op: str, x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"cpu runs CPU tensors, got a tensor on {x.device.type}."
    if build.missing is not None:
        return build.missing
    if x.dtype not in checks.FEATURE_DTYPES:
        return f"cpu takes {checks.names(checks.FEATURE_DTYPES)}, got {checks.names([x.dtype])}."
    return None


def kept(op: str, x: Tensor, y: Tensor | None, cols: bool, needs: list[bool], second: bool) -> int:
    """Dots that forward keeps for backward: whole tiles of 128 x 128, within 64 MB (kKeptDotsBytes in csrc/cpu).

    Those of x and y; the dots of a guide or a teacher are made again.
    """
    if not any(needs):
        return 0
    y = x if y is None else y
    n, m, members = x.shape[0], y.shape[0], 1 if y.dim() == 2 else y.shape[1]
    tile = 128 * 128 * members
    tiles = ((n + 127) // 128) * ((m + 127) // 128)
    limit = (64 << 20) // (tile * (8 if x.dtype == torch.float64 else 4))
    return torch.sym_min(tiles, limit) * tile


def _forward(op: str, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, needs = arguments
    return getattr(torch.ops.contrastive_ops_cpu, op)(*inputs, any(needs))


def similarity_logsumexp_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return _forward("similarity_logsumexp", *arguments)


def similarity_logsumexp_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.contrastive_ops_cpu.similarity_logsumexp_backward(*arguments)


def similarity_sum_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return _forward("similarity_sum", *arguments)


def similarity_sum_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.contrastive_ops_cpu.similarity_sum_backward(*arguments)


def similarity_expectation_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return _forward("similarity_expectation", *arguments)


def similarity_expectation_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.contrastive_ops_cpu.similarity_expectation_backward(*arguments)


def similarity_topk_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.contrastive_ops_cpu.similarity_topk(*arguments)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """<a[n, s], b[n, t]> of a [N, S, D] and b [N, T, D], in float64."""
    return torch.ops.contrastive_ops_cpu.row_products(a, b)


def squares(x: Tensor) -> Tensor:
    """|x_i|^2 of x [N, D], in float64."""
    row = x.unsqueeze(1)
    return row_products(row, row).flatten()


def combine_rows(weights: Tensor, vectors: Sequence[Tensor], result: Tensor) -> Tensor:
    """Fill and return `result` [N, S, D]: weights [N, S, T] times tensors [N, T_i, D] side by side, in float64.

    A weight of 0 leaves its vector out, even one that is not finite.
    """
    torch.ops.contrastive_ops_cpu.combine_rows(weights.double(), vectors, result)
    return result


if build.missing is None:  # for FakeTensorMode, make_fx and what else traces without torch.compile

    @torch.library.register_fake("contrastive_ops_cpu::row_products")
    def _row_products_fake(a, b):
        return a.new_empty((*a.shape[:2], b.shape[1]), dtype=torch.float64)

    @torch.library.register_fake("contrastive_ops_cpu::combine_rows")
    def _combine_rows_fake(weights, vectors, result):
        return None


def factor(vectors: Tensor) -> tuple_basis.Basis:
    return tuple_basis.factor_gram(row_products(vectors, vectors))


def volume_gradient(vectors: Tensor, inverse: Tensor, factor: Tensor) -> Tensor:
    inverse = inverse.double()
    return combine_rows(factor[:, None, None] * (inverse.mT @ inverse), (vectors,), torch.empty_like(vectors))


def volume_logsumexp_forward(
    anchor: Tensor,
    tuples: Tensor,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    exclude: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *flags, needs = arguments
    basis = factor(tuples)
    return torch.ops.contrastive_ops_cpu.volume_logsumexp(
        anchor, tuples, *_span(basis, anchor), row_scale, tuple_basis.column_weight(basis, col_scale, anchor), exclude,
        *flags, any(needs),
    )  # fmt: skip


def volume_logsumexp_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *incoming, anchor, tuples, row_scale, col_scale, exclude, rows, cols, totals, needs = arguments
    basis = factor(tuples)
    grads = torch.ops.contrastive_ops_cpu.volume_logsumexp_backward(
        *incoming, anchor, tuples, *_span(basis, anchor), row_scale,
        tuple_basis.column_weight(basis, col_scale, anchor), exclude, rows, cols, totals,
        tuple_basis.needs_of_sweep(needs),
    )  # fmt: skip
    return tuple_basis.gradients(tuples, basis, col_scale, grads, needs, tuple_gradient)


def _span(basis: tuple_basis.Basis, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """What the sweep reads of the tuples, and |a_i|^2 [N]."""
    return tuple_basis.triangles(basis, anchor), squares(anchor).to(statistics_dtype(anchor))


def tuple_gradient(tuples: Tensor, basis: tuple_basis.Basis, moments: Tensor, grad_volume: Tensor) -> Tensor:
    """As `tuple_basis.tuple_gradient`, with L^-T T + L^-T (dL/dv v I - T M^T L^-T) L^-1 M from one pass in float64."""
    inverse, vectors = basis.inverse, tuples.to(moments.dtype)
    along = torch.diag_embed((grad_volume * basis.volume)[:, None].expand(inverse.shape[:2]))
    along = along - row_products(moments, vectors) @ inverse.mT
    weights = torch.cat([inverse.mT, inverse.mT @ along @ inverse], -1)
    return combine_rows(weights, (moments, vectors), torch.empty_like(tuples))
