"""Rows that are sorted by class: what a row has to do with the others of its class, in O(N D).

Plain PyTorch, and Triton's row kernels where `rowwise.in_kernels` has them. Nothing adds with atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_ops.dtypes import statistics_dtype
from contrastive_ops.ops import autograd, rowwise
from contrastive_ops.ops.cross_entropy import softplus


class Classes(NamedTuple):
    """Of N rows, all but the first two in the order of their classes.

    order : the row that comes at each place [N]
    inverse : the place of each row [N]
    group : the first place of the row's class, its number, int32 [N]
    place : 0, 1, ..., N - 1, int32
    others : how many other rows the class has, in the dtype of the statistics [N]
    """

    order: Tensor
    inverse: Tensor
    group: Tensor
    place: Tensor
    others: Tensor


def by_class(labels: Tensor, x: Tensor, backend: str = "auto") -> Classes:
    """The classes of the rows of x by their labels [N]."""
    ordered, order = labels.sort(stable=True)
    if rowwise.in_kernels(backend, x):
        return Classes(order, *torch.ops.contrastive_ops.classes(ordered, order))
    first, size = matches(ordered, ordered)
    others = (size - 1).to(statistics_dtype(x))
    place = torch.arange(order.shape[0], device=order.device)
    inverse = torch.empty_like(order).scatter(0, order, place)
    return Classes(order, inverse, first, place.to(torch.int32), others)


def matches(ordered: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Of each query the first place among ids in order that equal it, or where it would be; and how many do."""
    ordered, queries = ordered.long(), queries.long().contiguous()  # searchsorted takes two of one dtype
    first = torch.searchsorted(ordered, queries, out_int32=True)
    return first, torch.searchsorted(ordered, queries, out_int32=True, right=True) - first


def sums_of_groups(x: Tensor, group: Tensor) -> Tensor:
    """The sum of the rows of each group, in the row of x that is its number."""
    zeros = torch.zeros_like(x)
    if x.is_cuda:  # there index_add adds with atomics in any order, and this one in that of the rows
        return zeros.index_put((group.long(),), x, accumulate=True)
    return zeros.index_add(0, group, x)


def in_order(x: Tensor, classes: Classes) -> Tensor:
    """The rows of x in the order of their classes."""
    if rowwise.steps_are_asked_for(x):
        return x[classes.order]
    return _Permuted.apply(x, classes.order, classes.inverse)


class _Permuted(torch.autograd.Function):
    """x[order]; PyTorch doesn't know that no two gradients meet, and sorts to add them up."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        if autograd.wants_steps(grad):
            return grad[inverse], None, None
        return grad.index_select(0, inverse), None, None


Scaled = tuple[Tensor, float | Tensor]


def with_class_mean(
    x: Tensor, scale: float | Tensor, classes: Classes, backend: str = "auto"
) -> tuple[Scaled, Scaled, Tensor]:
    """x [N, D] and its scale, to go on with, twice; and the mean product of each row with the others of its class.

    A sum of products is the product with the sum: no sweep. A row that is alone in its class has 0.
    """
    learned = (scale,) if isinstance(scale, Tensor) else ()
    if not rowwise.in_kernels(backend, x, *learned):
        return (x, scale), (x, scale), _class_mean(x, scale, classes.group, classes.others)
    n = len(x)
    of_rows = scale.expand(n) if isinstance(scale, Tensor) else classes.others.new_full((n,), scale)
    *results, mean = _ClassMean.apply(x, of_rows, classes.group, classes.others)
    return (results[0], results[1]), (results[2], results[3]), mean


def _class_mean(x: Tensor, scale: float | Tensor, group: Tensor, others: Tensor) -> Tensor:
    scaled = (scale[:, None] if isinstance(scale, Tensor) else scale) * x.to(statistics_dtype(x))
    sums = sums_of_groups(scaled, group)[group]
    return (scaled * (sums - scaled)).sum(-1) / others.clamp(min=1.0)


class _ClassMean(torch.autograd.Function):
    """x and its scale twice, one of each for a sweep, whose gradients are added as those of the mean are written."""

    @staticmethod
    def forward(ctx, x, scale, group, others):
        ctx.set_materialize_grads(False)
        mean, sums = torch.ops.contrastive_ops.class_mean(x, scale, group, others)
        ctx.save_for_backward(x, scale, group, others, sums)
        results = [value.view_as(value) for _ in range(2) for value in (x, scale)]
        frozen = [value for k, value in enumerate(results) if not ctx.needs_input_grad[k % 2]]
        ctx.mark_non_differentiable(*frozen)
        return *results, mean

    @staticmethod
    def backward(ctx, *grads):
        x, scale, group, others, sums = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if autograd.wants_steps(*grads):

            def steps(x, scale):
                return x, scale, x, scale, _class_mean(x, scale, group, others)

            return *autograd.by_steps(steps, (x, scale), needs, grads), None, None
        *passed, grad_mean = grads
        of_x, of_scale = ([grad for grad in passed[k::2] if grad is not None] for k in (0, 1))
        if grad_mean is None:
            return *(sum(of[1:], start=of[0]) if of else None for of in (of_x, of_scale)), None, None
        grad_x, grad_scale = torch.ops.contrastive_ops.class_mean_backward(
            x, scale, grad_mean, group, others, sums, of_x, of_scale, needs
        )
        return grad_x if needs[0] else None, grad_scale if needs[1] else None, None, None


def class_contrast(
    negatives: Tensor, positives: Tensor, mean: Tensor, others: Tensor, inside: bool
) -> tuple[Tensor, Tensor]:
    """softplus(lse_N - lse_P) + lse_P - mean, or `inside` + log(others), of each row; and which rows have no loss.

    negatives, positives : log-sum-exps [N]; a row where one of them is -inf has no loss, and 0
    mean : of the logits of the positives [N]
    others : how many positives there are [N]
    """
    invalid = (positives == -torch.inf) | (negatives == -torch.inf)
    positives = positives.masked_fill(invalid, 0.0)
    per_row = softplus(negatives - positives)
    if inside:
        per_row = per_row + others.clamp(min=1.0).log()
    else:
        # of a single positive the log-sum-exp is the mean: exactly 0, where the difference of two roundings is not
        per_row = per_row + (positives - mean).masked_fill(others <= 1.0, 0.0)
    return per_row.masked_fill(invalid, 0.0), invalid


def class_contrast_sum(
    negatives: Tensor,
    positives: Tensor,
    mean: Tensor,
    others: Tensor,
    inside: bool,
    *,
    divisor: float | None,
    backend: str = "auto",
) -> Tensor:
    """The sum of `class_contrast` over the rows, divided, by None by how many have a loss; by Triton in one launch."""
    if rowwise.in_kernels(backend, negatives, positives, mean):
        return _ClassContrast.apply(negatives, positives, mean, others, inside, divisor)
    return _class_contrast_sum(negatives, positives, mean, others, inside, divisor)


def _class_contrast_sum(
    negatives: Tensor, positives: Tensor, mean: Tensor, others: Tensor, inside: bool, divisor: float | None
) -> Tensor:
    per_row, invalid = class_contrast(negatives, positives, mean, others, inside)
    return per_row.sum() / ((~invalid).sum().clamp(min=1) if divisor is None else divisor)


class _ClassContrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, negatives, positives, mean, others, inside, divisor):
        factor = None if divisor is None else 1.0 / divisor
        result, unit = torch.ops.contrastive_ops.class_contrast(negatives, positives, mean, others, inside, factor)
        ctx.save_for_backward(negatives, positives, mean, others, unit)
        ctx.options = inside, divisor
        return result

    @staticmethod
    def backward(ctx, grad):
        negatives, positives, mean, others, unit = ctx.saved_tensors
        inside, divisor = ctx.options
        needs = ctx.needs_input_grad[:3]
        if autograd.wants_steps(grad):

            def steps(negatives, positives, mean):
                return (_class_contrast_sum(negatives, positives, mean, others, inside, divisor),)

            return *autograd.by_steps(steps, (negatives, positives, mean), needs, (grad,)), None, None, None
        of_negatives, of_positives, of_mean = torch.ops.contrastive_ops.class_contrast_backward(
            grad, unit, negatives, positives, others, inside
        )
        return of_negatives, of_positives, None if inside else of_mean, None, None, None
