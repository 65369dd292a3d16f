"""The CUDA kernels (csrc/cuda): NVIDIA GPUs from compute capability 8.0 on, compiled when the package is installed."""

from __future__ import annotations

import re
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from contrastive_ops import build, checks, tracing
from contrastive_ops.backends import rowwise, sweep
from contrastive_ops.backends import tuples as tuple_basis
from contrastive_ops.plane import Block, Incoming, Kernels, Part, Problem, Slopes, Sums

OPS = (
    "similarity_logsumexp", "similarity_sum", "similarity_expectation", "volume_logsumexp", "gramian_volume"
)  # fmt: skip
MOST_VECTORS = 5  # of factor.cu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)

ROWS_FEATURES = 256  # the most that rows_tiling takes: traced sizes can't be given to it


class CudaKernels(Kernels):
    """The operators of csrc/cuda/binding.cpp in a namespace of torch.ops.

    That of the GPU is contrastive_ops_cuda; the tests have one whose kernels run on the CPU.
    """

    def __init__(self, namespace: str) -> None:
        self.operators = getattr(torch.ops, namespace)

    def forward_tiling(self, problem: Problem) -> tuple[int, int]:
        return self.operators.tiling(problem.reduction, problem.members)

    def block_tiling(self, problem: Problem) -> tuple[int, int]:
        return self.operators.tiling(problem.reduction, problem.members)

    def rows_tiling(self, problem: Problem) -> tuple[int, int] | None:
        if problem.members or problem.guided or problem.reduction != "logsumexp":
            return None
        tiling = self.operators.rows_tiling(problem.x.dtype, problem.features)
        return tiling if tiling[0] else None

    def forward(self, problem: Problem, row: Part, col: Part, rows_per_group: int, cols_per_strip: int) -> None:
        self.operators.forward(*_of(problem), row, col, rows_per_group, cols_per_strip)

    def excluded(self, problem: Problem, logits: Tensor) -> None:
        self.operators.excluded(*_of(problem), logits)

    def merge(
        self,
        part: Part,
        parts: int,
        mirror: Part,
        mirrors: int,
        maximum: Tensor,
        log_sum: Tensor,
        lse: Tensor | None,
        mean: Tensor | None,
    ) -> None:
        self.operators.merge(part, mirror, maximum, log_sum, mean)
        if lse is not None:
            torch.add(maximum, log_sum, out=lse)

    def block(
        self,
        problem: Problem,
        incoming: Incoming,
        unit: Tensor | None,
        coefficients: Tensor | None,
        row: Sums,
        col: Sums,
        block: Block,
    ) -> None:
        self.operators.block(*_of(problem), incoming, unit, coefficients, row, col, *block)

    def rows(
        self,
        problem: Problem,
        incoming: Incoming,
        unit: Tensor | None,
        gradient: Tensor | None,
        sums: Sums,
        cols_per_strip: int,
    ) -> None:
        self.operators.rows(*_of(problem), incoming, unit, gradient, sums, cols_per_strip)

    def rowwise(self, x: Tensor) -> ModuleType | None:
        return rowwise.kernels(x, "cuda")

    def takes_attention(self, op: str, dtype: torch.dtype, features: int) -> bool:
        return op == "similarity_logsumexp" and dtype.itemsize == 2 and features <= ROWS_FEATURES

    def attention_tiling(self, problem: Problem) -> tuple[int, int]:
        return self.operators.rows_tiling(problem.x.dtype, problem.features)

    def attention(self, problem: Problem, unit: Tensor | None, row: Part, slopes: Slopes, cols_per_strip: int) -> None:
        self.operators.attention(*_of(problem), unit, row, slopes[:2], cols_per_strip)

    def factor(self, tuples: Tensor) -> tuple_basis.Basis:
        count, members, _ = tuples.shape
        inverse = tuples.new_empty((count, members, members), dtype=torch.float64)
        basis = tuple_basis.Basis(inverse, tuples.new_empty(count, dtype=torch.float64))
        if count:
            self.operators.factor(tuples.contiguous(), *basis)
        return basis


def _of(problem: Problem) -> tuple[Any, ...]:
    """The arguments of an operator for a Problem of sweep.h."""
    return (
        problem.x, problem.y, problem.vectors, problem.span, problem.second, problem.reduction,
        problem.mirrored, problem.restrict, problem.above, problem.tf32
    )  # fmt: skip


KERNELS = CudaKernels("contrastive_ops_cuda")


def why_not(op: str, x: Tensor) -> str | None:
    if op == "gramian_volume" and x.shape[-2] > MOST_VECTORS:
        return f"cuda takes sets of up to {MOST_VECTORS} vectors, got {x.shape[-2]}."
    if torch.version.cuda is None:  # before anything is compiled for it
        return f"torch {torch.__version__} has no CUDA; install one that has."
    if build.cuda is None:
        return build.cuda_missing
    if x.device.type != "cuda":
        return f"cuda runs GPU tensors, got a tensor on {x.device.type}."
    if x.dtype not in DTYPES:
        return f"cuda takes {checks.names(DTYPES)}, got {checks.names([x.dtype])}."
    return _unfit(build.cuda.architectures, x.device)


@tracing.constant
def _unfit(architectures: tuple[str, ...], device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no GPU."
    return no_code(architectures, torch.cuda.get_device_capability(device))


@cache
def no_code(architectures: tuple[str, ...], capability: tuple[int, int]) -> str | None:
    """The sentence that says why a GPU of the capability runs nothing of what was compiled; None when it does.

    sm_80 is code for 8.0 and what follows of 8, sm_90a for 9.0 alone; compute_80 is PTX, which the driver compiles for
    8.0 and all that follows.
    """
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        assert found, name
        kind, major, minor, specific = found.groups()
        first = (int(major), int(minor))
        same_family = first[0] == capability[0] and specific != "a"
        if first == capability or (first < capability and (same_family or (kind == "compute" and not specific))):
            return None
    version = "{}.{}".format(*capability)
    return (
        f"the CUDA kernels are compiled for {', '.join(architectures)}, and this GPU has compute capability {version}; "
        f"this compiles them for it: {build.install(CONTRASTIVE_OPS_BUILD='cuda', TORCH_CUDA_ARCH_LIST='')}."
    )


def factor(vectors: Tensor) -> tuple_basis.Basis:
    return KERNELS.factor(vectors)


def volume_gradient(vectors: Tensor, inverse: Tensor, factor: Tensor) -> Tensor:
    if rowwise.kernels(vectors, "cuda") is None:
        return tuple_basis.volume_gradient(vectors, inverse, factor)
    return torch.ops.contrastive_ops.volume_gradient(vectors, inverse, factor)


globals().update(sweep.functions(lambda: KERNELS, OPS))
