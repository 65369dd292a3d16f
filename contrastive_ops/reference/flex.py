"""The dense twins of the flex ops: a pair function over the N x M matrix, differentiable to any order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from contrastive_ops.reference.similarity import logsumexp, similarity_logits

ScoreMod = Callable[[Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor], Tensor]


def flex_logsumexp(
    x: Tensor,
    y: Tensor | None = None,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    rows: bool = True,
    cols: bool = False,
) -> tuple[Tensor, Tensor]:
    """row_lse and col_lse, empty where they are not asked for."""
    terms = _terms(x, x if y is None else y, score_mod, mask_mod, absent=-torch.inf)
    return logsumexp(terms, 1) if rows else terms.new_empty(0), logsumexp(terms, 0) if cols else terms.new_empty(0)


def flex_sum(
    x: Tensor,
    y: Tensor | None = None,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    rows: bool = True,
    cols: bool = False,
) -> tuple[Tensor, Tensor]:
    """row_sum and col_sum, empty where they are not asked for."""
    terms = _terms(x, x if y is None else y, score_mod, mask_mod, absent=0.0)
    return terms.sum(1) if rows else terms.new_empty(0), terms.sum(0) if cols else terms.new_empty(0)


def _terms(x: Tensor, y: Tensor, score_mod: ScoreMod | None, mask_mod: MaskMod | None, absent: float) -> Tensor:
    score = similarity_logits(x, y)
    row, col = (torch.arange(size, device=x.device) for size in score.shape)
    row, col = row[:, None], col[None, :]
    takes_part = None if mask_mod is None else mask_mod(row, col).expand_as(score)
    if takes_part is not None:  # an infinite derivative counts only where the pair does
        score = score.where(takes_part, score.detach())
    terms = score if score_mod is None else score_mod(score, row, col)
    return terms if takes_part is None else terms.masked_fill(~takes_part, absent)
