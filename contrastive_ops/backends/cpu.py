"""The C++ engine (csrc/cpu): fused tiles, threads, vector instructions chosen at run time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastive_ops import build, checks
from contrastive_ops.backends import tuples as tuple_basis

OPS = ("similarity_logsumexp", "volume_logsumexp", "gramian_volume")


def why_not(op: str, x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"cpu runs CPU tensors, got a tensor on {x.device.type}."
    if build.missing is not None:
        return build.missing
    if x.dtype not in checks.FEATURE_DTYPES:
        return f"cpu takes {checks.names(checks.FEATURE_DTYPES)}, got {checks.names([x.dtype])}."
    return None


def kept(x: Tensor, y: Tensor | None, cols: bool, needs: list[bool]) -> int:
    """Dots that forward keeps for backward: whole tiles of 128 x 128, within 64 MB (kKeptDotsBytes in csrc/cpu)."""
    if not any(needs):
        return 0
    y = x if y is None else y
    n, m, members = x.shape[0], y.shape[0], 1 if y.dim() == 2 else y.shape[1]
    tile = 128 * 128 * members
    tiles = ((n + 127) // 128) * ((m + 127) // 128)
    limit = (64 << 20) // (tile * (8 if x.dtype == torch.float64 else 4))
    return torch.sym_min(tiles, limit) * tile


def similarity_logsumexp_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, needs = arguments
    return torch.ops.contrastive_ops_cpu.similarity_logsumexp(*inputs, any(needs))


def similarity_logsumexp_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.contrastive_ops_cpu.similarity_logsumexp_backward(*arguments)


def factor(vectors: Tensor) -> tuple_basis.Basis:
    return tuple_basis.factor_gram(torch.ops.contrastive_ops_cpu.gram_matrices(vectors))


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
    weight = tuple_basis.column_weight(basis, col_scale, anchor)
    return torch.ops.contrastive_ops_cpu.volume_logsumexp(
        anchor, tuples, *tuple_basis.packed(basis, anchor), row_scale, weight, exclude, *flags, any(needs)
    )


def volume_logsumexp_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *incoming, anchor, tuples, row_scale, col_scale, exclude, rows, cols, totals, needs = arguments
    basis = factor(tuples)
    weight = tuple_basis.column_weight(basis, col_scale, anchor)
    grads = torch.ops.contrastive_ops_cpu.volume_logsumexp_backward(
        *incoming, anchor, tuples, *tuple_basis.packed(basis, anchor), row_scale, weight, exclude, rows, cols, totals,
        tuple_basis.needs_of_sweep(needs),
    )  # fmt: skip
    return tuple_basis.gradients(tuples, basis, col_scale, grads, needs)
