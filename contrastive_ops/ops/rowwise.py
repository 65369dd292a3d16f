"""What is done row by row, O(N D): norms, unit vectors, dot products of the views of an instance.

For 32 and 16-bit tensors on the CPU each is one pass of the C++ engine, summed in float64, and its gradient another; on
a GPU scales of rows are one launch of Triton, and so is their gradient. Plain PyTorch, several passes, does the same
elsewhere, where another backend is named, and where the steps themselves are asked for: by torch.compile, transforms of
torch.func, forward mode, and gradients that are differentiated again.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from contrastive_ops import backends
from contrastive_ops.backends import cpu
from contrastive_ops.backends import rowwise as kernels
from contrastive_ops.dtypes import statistics_dtype, without_autocast
from contrastive_ops.ops import autograd

# Some return their input, too: what goes on with that one, and not with the input, has its gradient added in the same
# pass, where autograd would make a tensor for each and add them up.


def inverse_norm(x: Tensor, backend: str = "auto") -> Tensor:
    """1 / |x_i| of x [..., D], the scale that makes dot products cosines; 0 with zero gradient for a zero row."""
    return with_inverse_norm(x, backend)[1]


def with_inverse_norm(x: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """x [..., D] itself, and `inverse_norm` of it."""
    fused = operators(backend, x)
    if fused is None:
        return x, _inverse_norm(x)
    if x.dim() == 2:
        return _Scale.apply(fused, x, None, 1.0, 1.0)
    rows, inverse = _Scale.apply(fused, x.reshape(-1, x.shape[-1]), None, 1.0, 1.0)
    return rows.view(x.shape), inverse.view(x.shape[:-1])


def with_scale(x: Tensor, factor: float | Tensor, power: float, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """x [N, D] itself, and factor^power / |x_i|, for powers of 1, -1, 1/2 and -1/2.

    The factor is a number, or a tensor with one or with one for each row.
    """
    learned = (factor,) if isinstance(factor, Tensor) else ()
    fused = operators(backend, x, *learned)
    if fused is None or any(value.numel() != 1 for value in learned):
        return _with_scale(*with_inverse_norm(x, backend), factor, power)
    return _Scale.apply(fused, x, *((factor, 1.0, power) if learned else (None, factor**power, 1.0)))


def _with_scale(x: Tensor, inverse: Tensor, factor: float | Tensor, power: float) -> tuple[Tensor, Tensor]:
    return x, factor**power * inverse


def with_pair_products(views: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Views [V, N, D] themselves, `inverse_norm` of them, and <views[l, i], views[m, i]> for the pairs l < m of views.

    The latter are [V (V - 1) / 2, N], in the order of `combinations`.
    """
    run = _Views.apply if _in_one_pass(backend, views) else _views
    instances, inverse, products = run(views.transpose(0, 1))
    return instances.transpose(0, 1), inverse.T, products.T


def unit(x: Tensor, backend: str = "auto") -> Tensor:
    """Rows of x [N, D] at length 1; a zero row stays 0, with zero gradient."""
    return unit_tuples(x, backend=backend)[1]


def unit_tuples(anchor: Tensor, *others: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Rows of K tensors [N, D] at length 1, side by side as [N, K, D]; of these the first [N, D], and the others.

    A zero row stays 0, with zero gradient. A side that is frozen stays so.
    """
    if in_kernels(backend, anchor, *others):
        return _Units.apply(anchor, *others)
    return (_Unit.apply if _in_one_pass(backend, anchor, *others) else _unit)(anchor, *others)


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> in the dtype of the statistics."""
    dtype = statistics_dtype(x)
    with without_autocast(x):  # it would round the products
        return torch.linalg.vecdot(x.to(dtype), y.to(dtype))


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_ik> [N, K] of x [N, D] and y [N, K, D], in the dtype of the statistics."""
    dtype = statistics_dtype(x)
    with without_autocast(x):
        return torch.bmm(y.to(dtype), x.to(dtype).unsqueeze(2)).squeeze(2)


def operators(backend: str, *tensors: Tensor) -> Any | None:
    """Whose `scale`, `contrast` and gradients of these run: the C++ engine's or Triton's; None for PyTorch's steps."""
    if _in_one_pass(backend, *tensors):
        return torch.ops.contrastive_ops_cpu
    return torch.ops.contrastive_ops if in_kernels(backend, *tensors) else None


def _in_one_pass(backend: str, *tensors: Tensor) -> bool:
    """Whether the C++ engine runs what is of these tensors."""
    if tensors[0].dtype == torch.float64 or backends.requested(backend) not in ("auto", "cpu"):
        return False
    return cpu.why_not("", tensors[0]) is None and not steps_are_asked_for(*tensors)


def in_kernels(backend: str, *tensors: Tensor) -> bool:
    """Whether Triton's row kernels do; for "auto" where Triton's engine is the one that is taken."""
    if steps_are_asked_for(*tensors) or kernels.kernels(tensors[0], backends.requested(backend)) is None:
        return False
    taken = backends.choose("similarity_logsumexp", tensors[0], backend)
    return taken == "triton" or backends.requested(backend) == taken


def steps_are_asked_for(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    # neither can be saved for backward: what has a tangent would lose it, and what was made in inference mode must not
    saved = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return any((saved and x.is_inference()) or forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _inverse_norm(x: Tensor) -> Tensor:
    squared = x.to(statistics_dtype(x)).square().sum(-1)
    zero = squared == 0
    return squared.masked_fill(zero, 1.0).rsqrt().masked_fill(zero, 0.0)


def _views(instances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # not instances[:, l], whose backward fills and adds a tensor as large as all views; and not a batched matrix
    # product, whose backward under autocast would round
    views = instances.to(statistics_dtype(instances)).unbind(1)
    products = [row_dot(left, right) for left, right in combinations(views, 2)]
    paired = torch.stack(products, 1) if products else views[0].new_empty(instances.shape[0], 0)
    return instances, _inverse_norm(instances), paired


def _unit(*vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    units = [_inverse_norm(x).unsqueeze(-1) * x.to(statistics_dtype(x)) for x in vectors]
    first, *others = units
    # not slices of all: they would require a gradient where their own side is frozen
    return torch.stack(units, 1), first, torch.stack(others, 1) if others else first.new_empty(first.shape[0], 0, 1)


def _inverse_lengths(squares: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / |x| in float64 from |x|^2; 0 for what has none in the dtype of the statistics."""
    inverse = squares.rsqrt()
    return inverse.masked_fill_(inverse > torch.finfo(dtype).max, 0.0)


class _Scale(torch.autograd.Function):
    """x, and c t^p / |x_i|; its gradient -a_i / |x_i|^2 x_i is added to that of x as it is written."""

    @staticmethod
    def forward(ctx, fused, x, factor, multiplier, power):
        ctx.set_materialize_grads(False)
        scale, inverse = fused.scale(x, factor, multiplier, power)
        ctx.save_for_backward(x, inverse, *(() if factor is None else (factor,)))
        ctx.fused, ctx.numbers = fused, (multiplier, power)
        rows = x.view_as(x)
        if not ctx.needs_input_grad[1]:  # a frozen side stays so, though what scales it is learned
            ctx.mark_non_differentiable(rows)
        return rows, scale

    @staticmethod
    def backward(ctx, grad, grad_scale):
        x, inverse, *factor = ctx.saved_tensors
        multiplier, power = ctx.numbers
        needs = ctx.needs_input_grad[1:3]
        if grad_scale is None:
            return None, grad, None, None, None
        if autograd.wants_steps(grad, grad_scale):

            def steps(x, factor=1.0):
                return _with_scale(x, multiplier * _inverse_norm(x), factor, power)

            grads = autograd.by_steps(steps, (x, *factor), needs[: 1 + len(factor)], (grad, grad_scale))
            return None, *grads, *[None] * (4 - len(grads))
        grad_x, grad_factor = ctx.fused.scale_backward(
            x, inverse, grad, grad_scale, factor[0] if factor else None, multiplier, power, needs
        )
        return None, grad_x if needs[0] else None, grad_factor if needs[1] else None, None, None


class _Views(torch.autograd.Function):
    """X, 1 / |x| and the products of pairs of the views X of an instance, for instances [N, V, D].

    With P = X X^T, the gradient of the products is (dP + dP^T) X, that of 1 / |x| is -x / |x|^3.
    """

    @staticmethod
    def forward(ctx, instances):
        ctx.set_materialize_grads(False)
        dtype = statistics_dtype(instances)
        products = cpu.row_products(instances, instances)
        inverse = _inverse_lengths(products.diagonal(dim1=1, dim2=2), dtype)
        ctx.save_for_backward(instances, inverse)
        left, right = _pairs(instances)
        return instances.view_as(instances), inverse.to(dtype), products[:, left, right].to(dtype)

    @staticmethod
    def backward(ctx, *grads):
        instances, inverse = ctx.saved_tensors
        if autograd.wants_steps(*grads):
            return autograd.by_steps(_views, (instances,), (True,), grads)[0]
        grad, grad_inverse, grad_products = grads
        n, v, _ = instances.shape
        weights = inverse.new_zeros((n, v, v))
        if grad_inverse is not None:
            weights.diagonal(dim1=1, dim2=2).copy_(-grad_inverse * inverse**3)
        if grad_products is not None:
            left, right = _pairs(instances)
            weights[:, left, right] = weights[:, right, left] = grad_products.double()
        vectors: tuple[Tensor, ...] = (instances,)
        if grad is not None:
            weights = torch.cat([torch.eye(v, dtype=weights.dtype).expand_as(weights), weights], -1)
            vectors = (grad, instances)
        return cpu.combine_rows(weights, vectors, torch.empty_like(instances))


def _pairs(instances: Tensor) -> Tensor:
    v = instances.shape[1]
    return torch.triu_indices(v, v, 1, device=instances.device)


class _Unit(torch.autograd.Function):
    """The gradient is what of the incoming ones is orthogonal to the unit vector, over the length."""

    @staticmethod
    def forward(ctx, *vectors):
        ctx.set_materialize_grads(False)
        n, d = vectors[0].shape
        result = vectors[0].new_empty(n, len(vectors), d, dtype=statistics_dtype(vectors[0]))
        inverses = []
        for k, x in enumerate(vectors):
            inverses.append(_inverse_lengths(cpu.squares(x), result.dtype))
            cpu.combine_rows(inverses[-1].view(n, 1, 1), (x.unsqueeze(1),), result[:, k : k + 1])
        ctx.save_for_backward(*vectors, result, *inverses)
        # detached: a view of a result that requires a gradient requires one, too
        sides = result.detach()[:, 0], result.detach()[:, 1:]
        _leave_frozen(ctx, *sides)
        return result, *sides

    @staticmethod
    def backward(ctx, *grads):
        needs, saved = ctx.needs_input_grad, ctx.saved_tensors  # once: checkpointing minds
        vectors, (result, *inverses) = saved[: len(needs)], saved[len(needs) :]
        if autograd.wants_steps(*grads):
            return autograd.by_steps(_unit, vectors, needs, grads)
        of_all, of_first, of_others = grads
        gradients: list[Tensor | None] = [None] * len(needs)
        for k in (k for k, need in enumerate(needs) if need):
            own = of_first if k == 0 else None if of_others is None else of_others[:, k - 1]
            incoming = [x.unsqueeze(1) for x in (None if of_all is None else of_all[:, k], own) if x is not None]
            x, inverse = result[:, k : k + 1], inverses[k]
            radial = sum(cpu.row_products(grad, x).flatten() for grad in incoming)
            weights = torch.stack([*[inverse] * len(incoming), -inverse * radial], -1).unsqueeze(1)
            gradient = torch.empty_like(vectors[k])
            cpu.combine_rows(weights, (*incoming, x), gradient.unsqueeze(1))
            gradients[k] = gradient
        return tuple(gradients)


def _leave_frozen(ctx, first: Tensor, others: Tensor) -> None:
    """What is made of nothing but frozen vectors is frozen."""
    learned = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:])
    ctx.mark_non_differentiable(*(side for side, needed in zip((first, others), learned, strict=True) if not needed))


class _Units(torch.autograd.Function):
    """As `_Unit`, in one launch each way."""

    @staticmethod
    def forward(ctx, *vectors):
        ctx.set_materialize_grads(False)
        result, first, others, inverse = torch.ops.contrastive_ops.units(vectors)
        ctx.save_for_backward(*vectors, result, inverse)
        _leave_frozen(ctx, first, others)
        return result, first, others

    @staticmethod
    def backward(ctx, *grads):
        needs, (*vectors, result, inverse) = ctx.needs_input_grad, ctx.saved_tensors
        if autograd.wants_steps(*grads):
            return autograd.by_steps(_unit, vectors, needs, grads)
        gradients = torch.ops.contrastive_ops.units_backward(*grads, result, inverse, vectors, needs)
        return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
