"""The dense twin of the op: the specification in code, differentiable by autograd to any order."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity_logits(
    x: Tensor,
    y: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    exclude: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    restrict: bool = False,
) -> Tensor:
    """The N x M logits s_ij in float32 (float64 for float64), -inf where a pair does not take part."""
    if y is None:
        y, col_scale, col_bias, col_ids = x, row_scale, row_bias, row_ids
        if exclude is not None:  # either row of a pair may name the other
            named = torch.arange(len(x), device=x.device) == exclude[:, None]
            out = named | named.T
    elif exclude is not None:
        out = torch.arange(len(y), device=x.device) == exclude[:, None]
    if x.dtype != torch.float64:
        x, y = x.float(), y.float()
    logits = x @ y.T
    if row_scale is not None:
        logits = logits * row_scale[:, None]
    if col_scale is not None:
        logits = logits * col_scale[None, :]
    if row_bias is not None:
        logits = logits + row_bias[:, None]
    if col_bias is not None:
        logits = logits + col_bias[None, :]
    if exclude is not None:
        logits = logits.masked_fill(out, -torch.inf)
    if row_ids is not None and col_ids is not None:
        equal = row_ids[:, None] == col_ids[None, :]
        logits = logits.masked_fill(~equal if restrict else equal, -torch.inf)
    return logits


def logits_at(logits: Tensor, index: Tensor) -> Tensor:
    """Of each row the logit at an index, -inf where there is no such column."""
    n, m = logits.shape
    there = (index >= 0) & (index < m)
    if m == 0:
        return logits.new_full((n,), -torch.inf)
    return logits.gather(1, index.where(there, 0)[:, None])[:, 0].masked_fill(~there, -torch.inf)


def logsumexp(logits: Tensor, dim: int) -> Tensor:
    """log sum exp along `dim`; an empty set has -inf, with zero gradient where torch.logsumexp has NaN."""
    if logits.shape[dim] == 0:
        return logits.new_full(logits.sum(dim).shape, -torch.inf)
    largest = logits.detach().amax(dim)
    empty = largest == -torch.inf
    shift = largest.masked_fill(empty, 0.0)
    total = (logits - shift.unsqueeze(dim)).exp().sum(dim)
    return torch.where(empty, -torch.inf, shift + total.masked_fill(empty, 1.0).log())
