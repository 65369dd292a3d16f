"""Who does what is O(N D) and O(N) around a sweep: Triton's row kernels on a GPU, where it can be imported.

Their operators are in torch.ops.contrastive_ops; some have a twin of the C++ engine, in torch.ops.contrastive_ops_cpu.

On a GPU each step of PyTorch is a launch, and launches cost more than products at thousands of rows. Where `kernels`
says None, plain PyTorch does the same in more steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from contrastive_ops import build
from contrastive_ops.backends import sweep, triton


def kernels(x: Tensor, backend: str) -> ModuleType | None:
    """The row kernels for tensors like x, where a backend is asked for; CPU tensors have them in the interpreter."""
    if backend not in (("auto", "cuda", "triton") if x.is_cuda else ("triton",)):
        return None
    return triton.kernels("rowwise") if triton.why_not("", x) is None else None


def _first_tensor(arguments: tuple[Any, ...]) -> Tensor:
    flat = (part for value in arguments for part in (value if isinstance(value, (list, tuple)) else (value,)))
    return next(part for part in flat if isinstance(part, Tensor))


def _define(name: str, schema: str, fake: Callable[..., Any], twin: Callable[..., Any] | None = None) -> None:
    """An operator for a function of kernels/rowwise.py: what traces without torch.compile sees its results only.

    `twin` stands for the C++ engine's operator in the same way.
    """

    def run(*arguments: Any) -> Any:
        with sweep.launching(_first_tensor(arguments)):
            return getattr(triton.kernels("rowwise"), name)(*arguments)

    torch.library.define(f"contrastive_ops::{name}", schema)
    torch.library.impl(f"contrastive_ops::{name}", "CompositeExplicitAutograd", run)
    torch.library.register_fake(f"contrastive_ops::{name}", fake)
    if twin is not None and build.missing is None:
        torch.library.register_fake(f"contrastive_ops_cpu::{name}", twin)


def _vector(x: Tensor, size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.float32)


def _scale_backward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_x, need_factor = rest[-1]
    return x.new_empty(x.shape if need_x else 0), _vector(x, int(need_factor))


def _contrast(positive: Tensor, *_: Any) -> Tensor:
    return positive.new_empty(())


def _contrast_backward(_: Tensor, positive: Tensor, lse: Sequence[Tensor], totals: bool, *__: Any) -> Sequence[Tensor]:
    n = len(positive)
    return positive.new_empty(n), positive.new_empty(len(lse), n), positive.new_empty(n if totals else 0)


_define(
    "scale",
    "(Tensor x, Tensor? factor, float multiplier, float power) -> (Tensor scale, Tensor inverse)",
    lambda x, *_: (_vector(x, len(x)), _vector(x, len(x))),
    lambda x, *_: (_vector(x, len(x)), x.new_empty(len(x), dtype=torch.float64)),
)
_define(
    "scale_backward",
    "(Tensor x, Tensor inverse, Tensor? grad, Tensor grad_scale, Tensor? factor, float multiplier, float power, "
    "bool[2] needs) -> (Tensor x, Tensor factor)",
    _scale_backward,
    _scale_backward,
)
_define(
    "units",
    "(Tensor[] vectors) -> (Tensor units, Tensor first, Tensor others, Tensor inverse)",
    lambda vectors: (
        *(
            vectors[0].new_empty((len(vectors[0]), *size, vectors[0].shape[1]), dtype=torch.float32)
            for size in ((len(vectors),), (), (len(vectors) - 1,))
        ),
        vectors[0].new_empty((len(vectors[0]), len(vectors)), dtype=torch.float64),
    ),
)
_define(
    "units_backward",
    "(Tensor? of_all, Tensor? of_first, Tensor? of_others, Tensor units, Tensor inverse, Tensor[] vectors, "
    "bool[] needs) -> Tensor[]",
    lambda of_all, of_first, of_others, units, inverse, vectors, needs: [
        x.new_empty(x.shape if need else 0) for x, need in zip(vectors, needs, strict=True)
    ],
)
_define(
    "factor",
    "(Tensor vectors) -> (Tensor inverse, Tensor volume)",
    lambda vectors: (
        vectors.new_empty((len(vectors), vectors.shape[1], vectors.shape[1]), dtype=torch.float64),
        vectors.new_empty(len(vectors), dtype=torch.float64),
    ),
)
_define(
    "volume_gradient",
    "(Tensor vectors, Tensor inverse, Tensor factor) -> Tensor",
    lambda vectors, *_: vectors.new_empty(vectors.shape),
)
_define(
    "contrast",
    "(Tensor positive, Tensor[] lse, Tensor[] totals, float factor, float slope, float share) -> Tensor",
    _contrast,
    _contrast,
)
_define(
    "contrast_backward",
    "(Tensor grad, Tensor positive, Tensor[] lse, bool totals, float factor, float slope, float share) -> "
    "(Tensor positive, Tensor lse, Tensor total)",
    _contrast_backward,
    _contrast_backward,
)
_define(
    "classes",
    "(Tensor labels, Tensor order) -> (Tensor inverse, Tensor group, Tensor place, Tensor others)",
    lambda labels, order: (
        torch.empty_like(order),
        *(labels.new_empty(len(labels), dtype=dtype) for dtype in (torch.int32, torch.int32, torch.float32)),
    ),
)
_define(
    "class_mean",
    "(Tensor x, Tensor scale, Tensor group, Tensor others) -> (Tensor mean, Tensor sums)",
    lambda x, *_: (_vector(x, len(x)), x.new_empty(x.shape, dtype=torch.float32)),
)
_define(
    "class_mean_backward",
    "(Tensor x, Tensor scale, Tensor grad, Tensor group, Tensor others, Tensor sums, Tensor[] grads, "
    "Tensor[] grad_scales, bool[2] needs) -> (Tensor x, Tensor scale)",
    lambda x, *rest: (x.new_empty(x.shape if rest[-1][0] else 0), _vector(x, len(x) if rest[-1][1] else 0)),
)
_define(
    "class_contrast",
    "(Tensor negatives, Tensor positives, Tensor mean, Tensor others, bool inside, float? factor) -> "
    "(Tensor sum, Tensor unit)",
    lambda negatives, *_: (negatives.new_empty(()), negatives.new_empty(())),
)
_define(
    "class_contrast_backward",
    "(Tensor grad, Tensor unit, Tensor negatives, Tensor positives, Tensor others, bool inside) -> "
    "(Tensor negatives, Tensor positives, Tensor mean)",
    lambda grad, unit, negatives, positives, others, inside: (
        *(negatives.new_empty(len(negatives)) for _ in range(2)),
        negatives.new_empty(0 if inside else len(negatives)),
    ),
)
