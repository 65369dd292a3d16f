"""The naive twins of losses in which a teacher or a guide has similarities of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops.reference.losses import _reduce, _unit


def soft_target_loss(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    teacher_temperature: float | Tensor | None = None,
    symmetric: bool = True,
    one_hot: float = 0.0,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of two softmaxes, along the rows and along the columns."""
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    x, y, u, v = (_unit(of, normalize) for of in (x, y, u.to(x.dtype), v.to(x.dtype)))
    student, teacher = x @ y.T / temperature, u @ v.T / teacher_temperature
    hard = torch.eye(*student.shape, dtype=student.dtype, device=student.device)
    per_row = torch.stack(
        [
            -(((1 - one_hot) * z.softmax(1) + one_hot * target) * s.log_softmax(1)).sum(1)
            for s, z, target in ((student, teacher, hard), (student.T, teacher.T, hard.T))[: 1 + symmetric]
        ]
    )
    return _reduce(per_row.mean(0), reduction, sample_weight)


def guided_info_nce(
    anchor: Tensor,
    positive: Tensor,
    *,
    negatives: Tensor | None = None,
    guide: tuple[Tensor, ...] | None = None,
    margin: float = 0.0,
    margin_strategy: str = "absolute",
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    temperature: float | Tensor = 0.01,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy over the blocks side by side, without what the guide finds more similar than the positive."""
    sides = [_unit(x, normalize) for x in (anchor, positive, *(() if negatives is None else (negatives,)))]
    guides = sides if guide is None else [_unit(g.to(anchor.dtype), normalize) for g in guide]
    known = (guides[0] * guides[1]).sum(1)
    ceiling = (known - (margin if margin_strategy == "absolute" else margin * known.abs())).detach()
    diagonal = torch.eye(len(anchor), dtype=torch.bool, device=anchor.device)
    own = (sides[0] * sides[1]).sum(1, keepdim=True) / temperature
    blocks = [own]
    for row, col, wanted in ((0, 1, True), (0, 0, contrast_anchors), (1, 1, contrast_positives), (0, 2, True)):
        if not wanted or col >= len(sides):
            continue
        out = guides[row] @ guides[col].T > ceiling[:, None]
        out = out if col == 2 else out | diagonal
        blocks.append((sides[row] @ sides[col].T / temperature).masked_fill(out, -torch.inf))
    return _reduce(-torch.cat(blocks, 1).log_softmax(1)[:, 0], reduction, sample_weight)
