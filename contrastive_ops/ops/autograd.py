"""Autograd around the streaming ops: an op boundary costs less without it, and torch.compile traces it.

Every op `name` has one shape, so that this is written once:

    name(*tensors, *flags, needs, backend)
        -> row_max, col_max, row_log_sum, col_log_sum, kept, *others, row_lse, col_lse
    name_backward(grad_row_lse, grad_col_lse, *grad_others, row_max, col_max, row_log_sum, col_log_sum, kept,
                  *tensors, *flags, needs, backend)
        -> a gradient for each of the first tensors, as many as `needs` has entries

The statistics are a maximum and the log of a sum relative to it. Their sum is the log-sum-exp, which a kernel writes
while it has both, but backward takes them apart: at logits of 1e4 the rounding of the log-sum-exp is 1e-3, and so would
be the error of every gradient. `kept` is what a backend keeps from forward for backward; `needs` are the gradients that
may be asked for, and in backward those that are, which may be fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from contrastive_ops import backends, checks

STATISTICS = "Tensor row_max, Tensor col_max, Tensor row_log_sum, Tensor col_log_sum, Tensor kept"


def define(name: str, tensors: str, gradients: tuple[str, ...], flags: str, others: tuple[str, ...]) -> None:
    """Define the schemas of an op and of its backward, and let the named backend run them.

    tensors : the tensors of the schema, those that have gradients first
    gradients : the names of the latter
    flags : the rest of the options
    others : what forward returns beside the statistics
    """
    returned = "".join(f", Tensor {other}" for other in others)
    torch.library.define(
        f"contrastive_ops::{name}",
        f"({tensors}, {flags}, bool[{len(gradients)}] needs, str backend) -> "
        f"({STATISTICS}{returned}, Tensor row_lse, Tensor col_lse)",
    )
    incoming = ", ".join(f"Tensor grad_{output}" for output in ("row_lse", "col_lse", *others))
    torch.library.define(
        f"contrastive_ops::{name}_backward",
        f"({incoming}, {STATISTICS}, {tensors}, {flags}, bool[{len(gradients)}] needs, str backend) -> "
        f"({', '.join(f'Tensor {gradient}' for gradient in gradients)})",
    )

    def run(function: str) -> Any:
        def implementation(*arguments: Any) -> tuple[Tensor, ...]:
            *inputs, backend = arguments
            return getattr(backends.module(backend), function)(*inputs)

        return implementation

    torch.library.impl(f"contrastive_ops::{name}", "CompositeExplicitAutograd", run(f"{name}_forward"))
    torch.library.impl(f"contrastive_ops::{name}_backward", "CompositeExplicitAutograd", run(f"{name}_backward"))


def call(name: str, gradients: int, arguments: tuple[Any, ...], backend: str) -> tuple[Tensor, ...]:
    """Run the op differentiably: row_lse, col_lse, *others, row_max, col_max.

    `arguments` are its tensors and flags; the first `gradients` of them may have gradients.
    """
    tensors = arguments[:gradients]
    checks.no_jit_trace(name)
    checks.no_forward_mode(name, *tensors)
    enabled = torch.is_grad_enabled()
    needs = [enabled and tensor is not None and tensor.requires_grad for tensor in tensors]
    transformed = torch._C._are_functorch_transforms_active()
    if not (any(needs) or transformed):  # no node; and Dynamo gives forward a ctx, though there is a setup_context
        return _Differentiable.forward(name, gradients, *arguments, needs, backend)[:-3]
    if torch.compiler.is_compiling():
        arguments = _aliased(arguments)
    elif not transformed:
        return _DifferentiableEager.apply(name, gradients, *arguments, needs, backend)
    return _Differentiable.apply(name, gradients, *arguments, needs, backend)[:-3]


def wants_steps(*grads: Tensor | None) -> bool:
    """Whether gradients need steps that autograd sees: to be differentiated again, or for many gradients at once."""
    batched = torch._C._functorch.is_legacy_batchedtensor
    return torch.is_grad_enabled() or any(grad is not None and batched(grad) for grad in grads)


def by_steps(
    steps: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs of `steps` by autograd, from those of its outputs; None for one that is not used."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # not the inputs themselves: where one of them depends on another, autograd would go on from it
        inputs = [
            x.view_as(x) if again else x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)
        ]
        wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
        used = [(value, grad) for value, grad in zip(steps(*inputs), grads, strict=True) if grad is not None]
        values, incoming = zip(*used, strict=True)
        # an output that is used need not depend on all inputs
        found = iter(torch.autograd.grad(values, wanted, incoming, create_graph=again, allow_unused=True))
    return tuple(next(found) if need else None for need in needs)


def _aliased(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A view for each tensor that comes again (y = x, one vector of ids): Dynamo traces no Function with it."""
    distinct: list[Any] = []
    for value in arguments:
        repeated = isinstance(value, Tensor) and any(value is other for other in distinct)
        distinct.append(value.view_as(value) if repeated else value)
    return tuple(distinct)


class _Differentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name, gradients, *arguments):
        *results, row_lse, col_lse = getattr(torch.ops.contrastive_ops, name)(*arguments)
        statistics, others = results[:5], results[5:]
        return (row_lse, col_lse, *others, *statistics)

    @staticmethod
    def setup_context(ctx, inputs, output):
        name, gradients, *arguments, _needs, backend = inputs
        *outputs, row_max, col_max, row_log_sum, col_log_sum, kept = output
        statistics = (row_max, col_max, row_log_sum, col_log_sum, kept)
        flags = [argument for argument in arguments if isinstance(argument, bool)]
        ctx.save_for_backward(*statistics, *arguments[: len(arguments) - len(flags)])
        ctx.name, ctx.gradients, ctx.flags, ctx.backend = name, gradients, flags, backend
        ctx.sizes = [value.shape[0] for value in outputs]
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)  # it would fill the 64 MB of a gradient of `kept` with zeros

    @staticmethod
    def backward(ctx, *grads):
        needs = list(ctx.needs_input_grad[2 : 2 + ctx.gradients])
        saved = ctx.saved_tensors  # once: checkpointing minds
        incoming = [
            saved[0].new_zeros(size) if grad is None else grad
            for size, grad in zip(ctx.sizes, grads[: len(ctx.sizes)], strict=True)
        ]
        arguments = (*incoming, *saved, *ctx.flags, needs, ctx.backend)
        if torch.is_grad_enabled():  # create_graph=True
            results = _Once.apply(ctx.name, *arguments)
        else:
            results = getattr(torch.ops.contrastive_ops, f"{ctx.name}_backward")(*arguments)
        wanted = [result if need else None for result, need in zip(results, needs, strict=True)]
        return (None, None, *wanted, *[None] * (len(ctx.needs_input_grad) - 2 - len(wanted)))


class _DifferentiableEager(torch.autograd.Function):
    """The same, without torch.func and for less of the host's time.

    PyTorch inspects a signature at every call of a Function with a setup_context, and makes a node of each output: what
    backward alone needs is saved, and not returned.
    """

    @staticmethod
    def forward(ctx, *inputs):
        output = _Differentiable.forward(*inputs)
        _Differentiable.setup_context(ctx, inputs, output)
        outputs, (row_max, col_max, *_) = output[:-5], output[-5:]
        ctx.mark_non_differentiable(row_max, col_max)
        return (*outputs, row_max, col_max)

    backward = _Differentiable.backward


class _Once(torch.autograd.Function):
    """The backward op in a graph that may be differentiated again, which it refuses."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, *arguments):
        return getattr(torch.ops.contrastive_ops, f"{name}_backward")(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *_grads):
        raise RuntimeError(
            f"{ctx.name} is differentiable once, got a second differentiation (create_graph=True); "
            'call it with backend="reference", which autograd differentiates to any order.'
        )
