"""Autograd around the streaming ops: an op boundary costs less without it, and torch.compile traces it.

Every op `name` has one shape, so that this is written once:

    name(*tensors, *flags, needs, backend)
        -> *statistics, kept, *others, *results
    name_backward(*grad_results, *grad_others, *statistics, kept, *saved, *tensors, *flags, needs, backend)
        -> a gradient for each of the first tensors, as many as `needs` has entries

The statistics of a log-sum-exp are a maximum and the log of a sum relative to it. Their sum is the result, which a
kernel writes while it has both, but backward takes them apart: at logits of 1e4 the rounding of the log-sum-exp is
1e-3, and so would be the error of every gradient. `kept` is what a backend keeps from forward for backward, `saved` are
results that backward reads; `needs` are the gradients that may be asked for, and in backward those that are, which may
be fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_ops import backends, checks
from contrastive_ops.dtypes import statistics_dtype

LSE_STATISTICS = ("row_max", "col_max", "row_log_sum", "col_log_sum")


class Op(NamedTuple):
    """The names of what an op takes and gives, in their order."""

    tensors: tuple[str, ...]  # those that have gradients first
    flags: tuple[str, ...]
    gradients: tuple[str, ...]
    statistics: tuple[str, ...]
    others: tuple[str, ...]
    results: tuple[str, ...]
    saved: tuple[str, ...]
    shown: int  # of the statistics, for who calls the op

    @property
    def outputs(self) -> tuple[str, ...]:
        return (*self.results, *self.others)


_OPS: dict[str, Op] = {}


def define(
    name: str,
    tensors: str,
    flags: str,
    *,
    gradients: int,
    results: tuple[str, ...],
    others: tuple[str, ...] = (),
    statistics: tuple[str, ...] = LSE_STATISTICS,
    saved: tuple[str, ...] = (),
    shown: int = 0,
) -> None:
    """Define the schemas of an op and of its backward with their fakes, and let the named backend run them.

    Results and statistics are vectors of rows, of columns, or of those that leave a column out, as their names say.
    """
    names = tuple(_names(tensors))
    op = Op(names, tuple(_names(flags)), names[:gradients], statistics, others, results, saved, shown)
    _OPS[name] = op
    options = f"{tensors}, {flags}, bool[{gradients}] needs, str backend"

    def many(names: Sequence[str], prefix: str = "") -> str:
        return ", ".join(f"Tensor {prefix}{name}" for name in names)

    torch.library.define(
        f"contrastive_ops::{name}", f"({options}) -> ({many((*statistics, 'kept', *others, *results))})"
    )
    torch.library.define(
        f"contrastive_ops::{name}_backward",
        f"({many(op.outputs, 'grad_')}, {many((*statistics, 'kept', *saved))}, {options}) -> ({many(op.gradients)})",
    )

    def run(function: str) -> Any:
        def implementation(*arguments: Any) -> tuple[Tensor, ...]:
            *inputs, backend = arguments
            return getattr(backends.module(backend), function)(*inputs)

        return implementation

    torch.library.impl(f"contrastive_ops::{name}", "CompositeExplicitAutograd", run(f"{name}_forward"))
    torch.library.impl(f"contrastive_ops::{name}_backward", "CompositeExplicitAutograd", run(f"{name}_backward"))

    def forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
        given = dict(zip((*op.tensors, *op.flags, "needs", "backend"), arguments, strict=True))
        x, y = arguments[:2]
        dtype, cols = statistics_dtype(x), given["cols"]
        n, m = x.shape[0], x.shape[0] if y is None else y.shape[0]
        second = any(given.get(name) is not None for name in ("u", "guide_x", "ceiling", "col_ceiling"))
        kept = backends.module(given["backend"]).kept(name, x, y, cols, given["needs"], second)

        def size(of: str) -> Any:
            if of == "kept":
                return kept
            if of == "excluded":
                return 0 if given["exclude"] is None else n
            if (of.startswith("teacher") and given["u"] is None) or (of.endswith("total") and not given["totals"]):
                return 0
            return (n if given["rows"] else 0) if "row" in of else (m if cols else 0)

        return tuple(x.new_empty(size(of), dtype=dtype) for of in (*statistics, "kept", *others, *results))

    def backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
        *_, needs, _backend = arguments
        first = len(op.outputs) + len(statistics) + 1 + len(saved)
        inputs = arguments[first : first + gradients]
        x = inputs[0]
        return tuple(
            value.new_empty(value.shape) if need else x.new_empty(0, dtype=_dtype_of(name, value, x))
            for name, value, need in zip(op.gradients, inputs, needs, strict=True)
        )

    torch.library.register_fake(f"contrastive_ops::{name}", forward_fake)
    torch.library.register_fake(f"contrastive_ops::{name}_backward", backward_fake)


def _names(schema: str) -> list[str]:
    return [argument.split()[-1] for argument in schema.split(", ")]


def _dtype_of(name: str, value: Tensor | None, x: Tensor) -> torch.dtype:
    """Of a gradient that is not asked for: features that are not there have the dtype of x."""
    if value is None:
        return x.dtype if name in ("y", "u", "v") else statistics_dtype(x)
    return value.dtype


def call(name: str, arguments: tuple[Any, ...], backend: str) -> tuple[Tensor, ...]:
    """Run the op differentiably: its results, the others, and the statistics that are shown.

    `arguments` are its tensors and flags.
    """
    op = _OPS[name]
    tensors = arguments[: len(op.gradients)]
    checks.no_jit_trace(name)
    checks.no_forward_mode(name, *tensors)
    enabled = torch.is_grad_enabled()
    needs = [enabled and tensor is not None and tensor.requires_grad for tensor in tensors]
    transformed = torch._C._are_functorch_transforms_active()
    shown = len(op.outputs) + op.shown
    if not (any(needs) or transformed):  # no node; and Dynamo gives forward a ctx, though there is a setup_context
        return _Differentiable.forward(name, *arguments, needs, backend)[:shown]
    if torch.compiler.is_compiling():
        arguments = _aliased(arguments)
    elif not transformed:
        return _DifferentiableEager.apply(name, *arguments, needs, backend)
    return _Differentiable.apply(name, *arguments, needs, backend)[:shown]


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
    def forward(name, *arguments):
        """The results, the others, the statistics, and what is kept."""
        op = _OPS[name]
        returned = getattr(torch.ops.contrastive_ops, name)(*arguments)
        first = len(op.statistics) + 1
        results = first + len(op.others)
        return (*returned[results:], *returned[first:results], *returned[:first])

    @staticmethod
    def setup_context(ctx, inputs, output):
        name, *arguments, _needs, backend = inputs
        op = _OPS[name]
        outputs, statistics = output[: len(op.outputs)], output[len(op.outputs) :]
        tensors, flags = arguments[: len(op.tensors)], arguments[len(op.tensors) :]
        saved = [outputs[op.results.index(result)] for result in op.saved]
        ctx.save_for_backward(*statistics, *saved, *tensors)
        ctx.name, ctx.flags, ctx.backend = name, flags, backend
        ctx.sizes = [value.shape[0] for value in outputs]
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)  # it would fill the 64 MB of a gradient of `kept` with zeros

    @staticmethod
    def backward(ctx, *grads):
        needs = list(ctx.needs_input_grad[1 : 1 + len(_OPS[ctx.name].gradients)])
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
        return (None, *wanted, *[None] * (len(ctx.needs_input_grad) - 1 - len(wanted)))


class _DifferentiableEager(torch.autograd.Function):
    """The same, without torch.func and for less of the host's time.

    PyTorch inspects a signature at every call of a Function with a setup_context, and makes a node of each output: what
    backward alone needs is saved, and not returned.
    """

    @staticmethod
    def forward(ctx, *inputs):
        output = _Differentiable.forward(*inputs)
        _Differentiable.setup_context(ctx, inputs, output)
        op = _OPS[ctx.name]
        outputs = len(op.outputs)
        ctx.mark_non_differentiable(*output[outputs : outputs + op.shown])
        return output[: outputs + op.shown]

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
        checks.no_second_differentiation(ctx.name, 'call it with backend="reference"')
