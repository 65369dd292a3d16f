"""What is done row by row, O(N D): norms, unit vectors, dot products of the views of an instance.

For 32 and 16-bit tensors on the CPU each is one pass of the C++ engine, summed in float64, and its gradient another.
Plain PyTorch, several passes, does the same elsewhere, where another backend is named, and where the steps themselves
are asked for: by torch.compile, transforms of torch.func, forward mode, and gradients that are differentiated again.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from contrastive_ops import backends
from contrastive_ops.backends import cpu
from contrastive_ops.dtypes import statistics_dtype
from contrastive_ops.ops import autograd


def inverse_norm(x: Tensor, backend: str = "auto") -> Tensor:
    """1 / |x_i| of x [..., D], the scale that makes dot products cosines; 0 with zero gradient for a zero row."""
    return _InverseNorm.apply(x) if _in_one_pass(backend, x) else _inverse_norm(x)


def unit(*vectors: Tensor, backend: str = "auto") -> Tensor:
    """Rows at length 1 of K tensors [N, D], side by side as [N, K, D]; a zero row stays 0, with zero gradient."""
    return _Unit.apply(*vectors) if _in_one_pass(backend, *vectors) else _unit(*vectors)


def pair_products(views: Tensor, backend: str = "auto") -> Tensor:
    """<views[l, i], views[m, i]> for the pairs l < m of views [V, N, D], as [V (V - 1) / 2, N] in their order."""
    return _PairProducts.apply(views) if _in_one_pass(backend, views) else _pair_products(views)


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> in the dtype of the statistics."""
    dtype = statistics_dtype(x)
    with torch.autocast(x.device.type, enabled=False):  # it would round the products
        return torch.linalg.vecdot(x.to(dtype), y.to(dtype))


def _in_one_pass(backend: str, *tensors: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if tensors[0].dtype == torch.float64 or backends.requested(backend) not in ("auto", "cpu"):
        return False
    if cpu.why_not("", tensors[0]) is not None:
        return False
    # neither can be saved for backward: what has a tangent would lose it, and what was made in inference mode must not
    return all(not x.is_inference() and forward_ad.unpack_dual(x).tangent is None for x in tensors)


def _inverse_norm(x: Tensor) -> Tensor:
    squared = x.to(statistics_dtype(x)).square().sum(-1)
    zero = squared == 0
    return squared.masked_fill(zero, 1.0).rsqrt().masked_fill(zero, 0.0)


def _unit(*vectors: Tensor) -> Tensor:
    with torch.autocast(vectors[0].device.type, enabled=False):  # its rule for stack fails on float16 tensors on CPU
        stacked = torch.stack(vectors, 1)
    return _inverse_norm(stacked).unsqueeze(-1) * stacked.to(statistics_dtype(stacked))


def _pair_products(views: Tensor) -> Tensor:
    # not views[l], whose backward fills and adds a tensor as large as all views; and not a batched matrix product,
    # whose backward under autocast would round
    rows = views.to(statistics_dtype(views)).unbind()
    return torch.stack([row_dot(left, right) for left, right in combinations(rows, 2)])


def _inverse_lengths(vectors: Tensor) -> Tensor:
    """1 / |x_i| of x [N, D] in float64; 0 for what has none in the dtype of the statistics."""
    inverse = cpu.squares(vectors).rsqrt_()
    return inverse.masked_fill_(inverse > torch.finfo(statistics_dtype(vectors)).max, 0.0)


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
        if autograd.wants_steps(grad):
            return autograd.by_steps(_inverse_norm, (x,), ctx.needs_input_grad, grad)
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
        needs, saved = ctx.needs_input_grad, ctx.saved_tensors  # once: checkpointing minds
        vectors, (result, *inverses) = saved[: len(needs)], saved[len(needs) :]
        if autograd.wants_steps(grad):
            return autograd.by_steps(_unit, vectors, needs, grad)
        gradients: list[Tensor | None] = [None] * len(needs)
        for k in (k for k, need in enumerate(needs) if need):
            pair, inverse = (grad[:, k : k + 1], result[:, k : k + 1]), inverses[k]
            weights = torch.stack([inverse, -inverse * cpu.row_products(*pair).flatten()], -1).unsqueeze(1)
            gradients[k] = cpu.combine_rows(weights, pair, torch.empty_like(vectors[k]).unsqueeze(1)).squeeze(1)
        return tuple(gradients)


class _PairProducts(torch.autograd.Function):
    """With P = X X^T of the views X of an instance, the gradient of X is (dP + dP^T) X."""

    @staticmethod
    def forward(ctx, views):
        ctx.save_for_backward(views)
        instances = views.transpose(0, 1)
        left, right = torch.triu_indices(len(views), len(views), 1, device=views.device)
        return cpu.row_products(instances, instances)[:, left, right].T.to(statistics_dtype(views))

    @staticmethod
    def backward(ctx, grad):
        (views,) = ctx.saved_tensors
        if autograd.wants_steps(grad):
            return autograd.by_steps(_pair_products, (views,), ctx.needs_input_grad, grad)[0]
        left, right = torch.triu_indices(len(views), len(views), 1, device=views.device)
        weights = views.new_zeros((views.shape[1], len(views), len(views)), dtype=torch.float64)
        weights[:, left, right] = weights[:, right, left] = grad.T.double()
        result = torch.empty_like(views)
        cpu.combine_rows(weights, (views.transpose(0, 1),), result.transpose(0, 1))
        return result
