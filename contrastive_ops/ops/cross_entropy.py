"""The formula of softmax losses: softplus of the log-sum-exp of the negatives over the positive, one number per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive_ops.ops import autograd, rowwise


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), with full relative accuracy for very negative x; beyond 60 it is x in float64, too."""
    return F.softplus(x, threshold=60.0)


def contrast(
    positive: Tensor, lse: Sequence[Tensor], totals: Sequence[Tensor] = (), slope: float = 0.0, share: float = 0.0
) -> Tensor:
    """The sum over the directions d of softplus(lse_di - s_i), and with totals of slope s_i - share total_di, too.

    positive : s [N], logits
    lse : of each direction the log-sum-exp of the negatives [N]; -inf without negatives, which gives 0
    totals : of each direction the sum of the logits of the negatives [N], for label smoothing
    """
    terms = [softplus(negatives - positive) for negatives in lse]
    terms += [slope * positive - share * total for total in totals]
    return sum(terms[1:], start=terms[0])


def contrast_sum(
    positive: Tensor,
    lse: Sequence[Tensor],
    totals: Sequence[Tensor] = (),
    slope: float = 0.0,
    share: float = 0.0,
    *,
    divisor: float,
    backend: str = "auto",
) -> Tensor:
    """The sum of `contrast` over the rows, divided; by the C++ engine and by Triton in one step each way."""
    fused = rowwise.operators(backend, positive, *lse, *totals)
    if fused is None:
        return contrast(positive, lse, totals, slope, share).sum() / divisor
    return _Contrast.apply(fused, positive, 1.0 / divisor, slope, share, len(lse), *lse, *totals)


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, positive, factor, slope, share, directions, *vectors):
        lse, totals = vectors[:directions], vectors[directions:]
        ctx.save_for_backward(positive, *vectors)
        ctx.fused, ctx.numbers, ctx.directions = fused, (factor, slope, share), directions
        return fused.contrast(positive, lse, totals, *ctx.numbers)

    @staticmethod
    def backward(ctx, grad):
        positive, *vectors = ctx.saved_tensors
        lse, totals = vectors[: ctx.directions], vectors[ctx.directions :]
        if autograd.wants_steps(grad):
            factor, slope, share = ctx.numbers

            def steps(positive, *vectors):
                lse, totals = vectors[: ctx.directions], vectors[ctx.directions :]
                return (factor * contrast(positive, lse, totals, slope, share).sum(),)

            needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[6:])
            grad_positive, *others = autograd.by_steps(steps, (positive, *vectors), needs, (grad,))
            return None, grad_positive, None, None, None, None, *others
        grad_positive, grad_lse, grad_total = ctx.fused.contrast_backward(
            grad, positive, lse, bool(totals), *ctx.numbers
        )
        return None, grad_positive, None, None, None, None, *grad_lse, *[grad_total] * len(totals)
