"""The dense twin of the ops over pairs of embeddings: the specification in code, differentiable to any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contrastive_ops import noise as pair_noise

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda s: s.clone(),
    "softplus": lambda s: torch.logaddexp(s, torch.zeros_like(s)),
    "relu": lambda s: torch.relu(s),
    "sigmoid": lambda s: torch.sigmoid(s),
    "square": lambda s: torch.square(s),
    "step": lambda s: torch.relu(torch.sign(s.nan_to_num(nan=0.0))),  # 1[s > 0], which PyTorch can differentiate
}


def similarity_logits(
    x: Tensor,
    y: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    **masks: Any,
) -> Tensor:
    """The N x M logits s_ij in float32 (float64 for float64), -inf where a pair does not take part (`takes_part`)."""
    mirrored = y is None
    if y is None:
        y, col_scale, col_bias = x, row_scale, row_bias
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
    return logits.masked_fill(~takes_part(logits, mirrored, **masks), -torch.inf)


def takes_part(
    logits: Tensor,
    mirrored: bool,
    *,
    exclude: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    restrict: bool = False,
    guide_x: Tensor | None = None,
    guide_y: Tensor | None = None,
    ceiling: Tensor | None = None,
    col_ceiling: Tensor | None = None,
    above: bool = False,
) -> Tensor:
    """Whether a pair takes part, N x M: not if it is left out by its index, by its ids or by its guide."""
    n, m = logits.shape
    taking_part = torch.ones(n, m, dtype=torch.bool, device=logits.device)
    if mirrored:
        col_ids, col_ceiling = row_ids, ceiling
    if exclude is not None:
        named = torch.arange(m, device=logits.device) == exclude[:, None]
        taking_part &= ~(named | named.T if mirrored else named)
    if row_ids is not None and col_ids is not None:
        equal = row_ids[:, None] == col_ids[None, :]
        taking_part &= equal if restrict else ~equal
    if ceiling is not None or col_ceiling is not None:
        guide = logits.detach() if guide_x is None else similarity_logits(guide_x, guide_y)
        is_above = torch.zeros_like(taking_part)
        if ceiling is not None:
            is_above |= guide > ceiling[:, None]
        if col_ceiling is not None:
            is_above |= guide > col_ceiling[None, :]
        taking_part &= is_above if above else ~is_above
    return taking_part


def logits_at(logits: Tensor, index: Tensor) -> Tensor:
    """Of each row the logit at an index, -inf where there is no such column."""
    n, m = logits.shape
    there = (index >= 0) & (index < m)
    if m == 0:
        return logits.new_full((n,), -torch.inf)
    return logits.gather(1, index.where(there, 0)[:, None])[:, 0].masked_fill(~there, -torch.inf)


def largest(logits: Tensor, dim: int) -> Tensor:
    """The maximum along `dim`, -inf for an empty set; no gradient."""
    if logits.shape[dim] == 0:
        return logits.new_full((logits.shape[1 - dim],), -torch.inf)
    return logits.detach().amax(dim)


def logsumexp(logits: Tensor, dim: int) -> Tensor:
    """log sum exp along `dim`; an empty set has -inf, with zero gradient where torch.logsumexp has NaN."""
    if logits.shape[dim] == 0:
        return logits.new_full(logits.sum(dim).shape, -torch.inf)
    shift = largest(logits, dim)
    empty = shift == -torch.inf
    shift = shift.masked_fill(empty, 0.0)
    total = (logits - shift.unsqueeze(dim)).exp().sum(dim)
    return torch.where(empty, -torch.inf, shift + total.masked_fill(empty, 1.0).log())


def expectation(logits: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """Mean of the logits under the softmax of the teacher's along `dim`; of an empty set 0, with zero gradient."""
    lse = logsumexp(teacher, dim).unsqueeze(dim)
    weight = (teacher - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    counts = weight != 0.0  # a weight of 0 leaves out a logit of -inf, too
    return torch.where(counts, weight * logits.masked_fill(~counts, 0.0), 0.0).sum(dim)


def best(logits: Tensor, k: int, biggest: bool, noise: int | None) -> tuple[Tensor, Tensor]:
    """The k largest (smallest) logits of each row, and their columns; ties go to the lower column."""
    n, m = logits.shape
    none = -torch.inf if biggest else torch.inf
    key = logits.detach()
    if noise is not None:
        rows, cols = (torch.arange(size, device=logits.device) for size in (n, m))
        key = key + pair_noise.gumbel(noise, rows[:, None], cols, logits.dtype)
    there = key > -torch.inf
    there |= key.isnan()
    key = key.masked_fill(~there, none)
    order = key.sort(stable=True, dim=1, descending=biggest).indices[:, :k]
    found = there.gather(1, order)
    values, indices = logits.gather(1, order).where(found, none), order.where(found, -1)
    missing = (0, k - order.shape[1])
    return torch.nn.functional.pad(values, missing, value=none), torch.nn.functional.pad(indices, missing, value=-1)
