"""What is done row by row, O(N D): norms, unit vectors, dot products of the views of an instance.

For 32 and 16-bit tensors on the CPU each is one pass of the C++ engine, summed in float64, and its gradient another.
Plain PyTorch, several passes, does the same elsewhere, and where the steps themselves are asked for: by torch.compile,
transforms of torch.func, forward mode, and a gradient that is to be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from contrastive_ops.backends import cpu
from contrastive_ops.dtypes import statistics_dtype


def inverse_norm(x: Tensor) -> Tensor:
    """1 / |x_i| of x [..., D], the scale that makes dot products cosines; 0 with zero gradient for a zero row."""
    return _InverseNorm.apply(x) if _in_one_pass(x) else _inverse_norm(x)


def unit(*vectors: Tensor) -> Tensor:
    """Rows at length 1 of K tensors [N, D], side by side as [N, K, D]; a zero row stays 0, with zero gradient."""
    return _Unit.apply(*vectors) if _in_one_pass(*vectors) else _unit(*vectors)


def view_products(views: Tensor) -> Tensor:
    """Dot products <views[l, i], views[m, i]> of views [V, N, D], as [V, V, N]."""
    return _ViewProducts.apply(views) if _in_one_pass(views) else _view_products(views)


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> in the dtype of the statistics."""
    dtype = statistics_dtype(x)
    with torch.autocast(x.device.type, enabled=False):  # it would round the products
        return torch.linalg.vecdot(x.to(dtype), y.to(dtype))


def _in_one_pass(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if tensors[0].dtype == torch.float64 or cpu.why_not("", tensors[0]) is not None:
        return False
    return all(forward_ad.unpack_dual(x).tangent is None for x in tensors)


def _inverse_norm(x: Tensor) -> Tensor:
    squared = x.to(statistics_dtype(x)).square().sum(-1)
    zero = squared == 0
    return squared.masked_fill(zero, 1.0).rsqrt().masked_fill(zero, 0.0)


def _unit(*vectors: Tensor) -> Tensor:
    with torch.autocast(vectors[0].device.type, enabled=False):  # its rule for stack fails on float16 tensors on CPU
        stacked = torch.stack(vectors, 1)
    return _inverse_norm(stacked).unsqueeze(-1) * stacked.to(statistics_dtype(stacked))


def _view_products(views: Tensor) -> Tensor:
    # not views[i], whose backward fills and adds a tensor as large as all views; and not a batched matrix product,
    # whose backward under autocast would round
    rows = views.unbind()
    lower = [[row_dot(x, y) for y in rows[: i + 1]] for i, x in enumerate(rows)]
    both = [[lower[max(i, j)][min(i, j)] for j in range(len(rows))] for i in range(len(rows))]
    return torch.stack([torch.stack(row) for row in both])


def _inverse_lengths(vectors: Tensor) -> Tensor:
    """1 / |x_i| of x [N, D] in float64; 0 for what has none in the dtype of the statistics."""
    row = vectors.unsqueeze(1)
    inverse = cpu.row_products(row, row).flatten().rsqrt_()
    return inverse.masked_fill_(inverse > torch.finfo(statistics_dtype(vectors)).max, 0.0)


def _by_steps(steps: Callable[..., Tensor], inputs: tuple[Tensor, ...], needs: tuple[bool, ...], grad: Tensor) -> Any:
    """The gradients of a function by steps that autograd sees, to be differentiated again."""
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(steps(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs)


class _InverseNorm(torch.autograd.Function):
    """The gradient of 1 / |x| is -x / |x|^3."""

    @staticmethod
    def forward(ctx, x):
        inverse = _inverse_lengths(x.reshape(-1, x.shape[-1]))
        ctx.save_for_backward(x, inverse)
        return inverse.view(x.shape[:-1]).to(statistics_dtype(x))

    @staticmethod
    def backward(ctx, grad):
        x, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _by_steps(_inverse_norm, (x,), ctx.needs_input_grad, grad)
        rows = x.reshape(-1, 1, x.shape[-1])
        weights = -grad.reshape(-1) * inverse**3
        return cpu.combine_rows(weights.view(-1, 1, 1), (rows,), torch.empty_like(rows)).view(x.shape)


class _Unit(torch.autograd.Function):
    """The gradient is what of the incoming one is orthogonal to the unit vector, over the length."""

    @staticmethod
    def forward(ctx, *vectors):
        n, d = vectors[0].shape
        result = vectors[0].new_empty(n, len(vectors), d, dtype=statistics_dtype(vectors[0]))
        inverses = []
        for k, x in enumerate(vectors):
            inverses.append(_inverse_lengths(x))
            cpu.combine_rows(inverses[-1].view(n, 1, 1), (x.unsqueeze(1),), result[:, k : k + 1])
        ctx.save_for_backward(*vectors, result, *inverses)
        return result

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad
        vectors, (result, *inverses) = ctx.saved_tensors[: len(needs)], ctx.saved_tensors[len(needs) :]
        if torch.is_grad_enabled():
            return _by_steps(_unit, vectors, needs, grad)
        gradients = []
        for k, (x, inverse, need) in enumerate(zip(vectors, inverses, needs, strict=True)):
            pair = grad[:, k : k + 1], result[:, k : k + 1]
            weights = torch.stack([inverse, -inverse * cpu.row_products(*pair).flatten()], -1).unsqueeze(1)
            gradients.append(
                cpu.combine_rows(weights, pair, torch.empty_like(x).unsqueeze(1)).squeeze(1) if need else None
            )
        return tuple(gradients)


class _ViewProducts(torch.autograd.Function):
    """With P = X X^T of the views X of an instance, the gradient of X is (dP + dP^T) X."""

    @staticmethod
    def forward(ctx, views):
        ctx.save_for_backward(views)
        instances = views.transpose(0, 1)
        return cpu.row_products(instances, instances).permute(1, 2, 0).to(statistics_dtype(views), copy=True)

    @staticmethod
    def backward(ctx, grad):
        (views,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _by_steps(_view_products, (views,), ctx.needs_input_grad, grad)[0]
        weights = (grad + grad.transpose(0, 1)).permute(2, 0, 1)
        result = torch.empty_like(views)
        cpu.combine_rows(weights, (views.transpose(0, 1),), result.transpose(0, 1))
        return result
