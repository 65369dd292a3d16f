"""The kernels of the sweep, launched by Triton."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from contrastive_ops.kernels import rowwise, tilings
from contrastive_ops.kernels.sweep import (
    attention_kernel,
    block_kernel,
    excluded_kernel,
    forward_kernel,
    merge_kernel,
    product_kernel,
    rows_kernel,
)
from contrastive_ops.kernels.topk import topk_kernel
from contrastive_ops.plane import Best, Block, Incoming, Kernels, Part, Problem, Slopes, Sums, cdiv

EXCLUDED = 32  # rows of a program that looks up the excluded logits
MERGE = 1024  # rows of a program that merges partials


def options(problem: Problem, tiling: tilings.Tiling) -> dict[str, Any]:
    return {
        "RESTRICT": problem.restrict,
        "PRECISION": "tf32" if problem.tf32 else tilings.precision(problem),
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "BLOCK_D": tiling.block_d,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }


def sizes(problem: Problem) -> tuple[Any, ...]:
    """N, M and the features of the pairs and of the second form."""
    return problem.n, problem.m, problem.features, None if problem.second.u is None else problem.second_features


def choices(problem: Problem) -> dict[str, Any]:
    """What a problem makes of its pairs."""
    return {"REDUCTION": problem.reduction, "ABOVE": problem.above}


def inputs(problem: Problem, tiling: tilings.Tiling) -> tuple[tuple[Any, ...], bool]:
    """The inputs as `forward` and `block` take them, and whether features are tensor descriptors.

    These need rows that start at multiples of 16 bytes; other features come by pointers.
    """
    second = problem.second
    features: list[Any] = [problem.x, problem.y, second.u, second.v]
    aligned = all(x is None or (x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0) for x in features)
    described = tiling.descriptors and not problem.members and aligned
    if described:
        blocks = ([tiling.block_m, tiling.block_d], [tiling.block_n, tiling.block_d]) * 2
        features = [
            None if x is None else TensorDescriptor.from_tensor(x, block)
            for x, block in zip(features, blocks, strict=True)
        ]
    x, y, u, v = features
    return (x, y, problem.vectors, problem.span, u, v, second._replace(u=None, v=None)), described


class TritonKernels(Kernels):
    def forward_tiling(self, problem: Problem) -> tuple[int, int]:
        return tilings.forward_tiling(problem)[:2]

    def block_tiling(self, problem: Problem) -> tuple[int, int]:
        return tilings.block_tiling(problem)[:2]

    def rows_tiling(self, problem: Problem) -> tuple[int, int] | None:
        tiling = tilings.rows_tiling(problem)
        return None if tiling is None else tiling[:2]

    def forward(self, problem: Problem, row: Part, col: Part, rows_per_group: int, cols_per_strip: int) -> None:
        tiling = tilings.forward_tiling(problem)
        given, described = inputs(problem, tiling)
        forward_kernel[(cdiv(problem.n, rows_per_group), cdiv(problem.m, cols_per_strip))](
            *given, row, col, *sizes(problem), rows_per_group, cols_per_strip,
            MEMBERS=problem.members, MIRRORED=problem.mirrored, DESCRIBED=described, **choices(problem),
            **options(problem, tiling),
        )  # fmt: skip

    def excluded(self, problem: Problem, logits: Tensor) -> None:
        excluded_kernel[(cdiv(problem.n, EXCLUDED),)](
            problem.x, problem.y, problem.vectors, logits, problem.n, problem.features, BLOCK_M=EXCLUDED, BLOCK_D=128
        )

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
        size = maximum.shape[0]
        merge_kernel[(cdiv(size, MERGE),)](part, parts, mirror, mirrors, maximum, log_sum, lse, mean, size, BLOCK=MERGE)

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
        tiling = tilings.block_tiling(problem)
        given, described = inputs(problem, tiling)
        block_kernel[(cdiv(block.rows, tiling.block_m), cdiv(block.cols, tiling.block_n))](
            *given, incoming, unit, coefficients, row, col, *sizes(problem), *block,
            MEMBERS=problem.members, PLANES=0 if coefficients is None else len(coefficients), DESCRIBED=described,
            **choices(problem), **options(problem, tiling),
        )  # fmt: skip

    def product(
        self, problem: Problem, block: Block, total: Tensor, coefficients: Tensor, y: Tensor, begins: bool
    ) -> None:
        tile = self.product_tiling(problem)
        if tile is None:
            super().product(problem, block, total, coefficients, y, begins)
            return
        tiling, features = tilings.product_tiling(problem), y.shape[1]
        product_kernel[(cdiv(block.rows, tile[0]), cdiv(features, tile[1]))](
            coefficients, y, total, problem.vectors, problem.n, problem.m, features, *block[:4],
            *coefficients.stride(), int(begins), 1.0, **options(problem, tiling),
        )  # fmt: skip

    def product_tiling(self, problem: Problem) -> tuple[int, int] | None:
        # of all pairs cuBLAS is ahead, on an H200 also in float32, of three products of TF32 parts
        tiling = tilings.product_tiling(problem) if problem.restrict else None
        return None if tiling is None else (tiling.block_m, tiling.block_d)

    def rows(
        self,
        problem: Problem,
        incoming: Incoming,
        unit: Tensor | None,
        gradient: Tensor | None,
        sums: Sums,
        cols_per_strip: int,
    ) -> None:
        tiling = tilings.rows_tiling(problem)
        rows_kernel[(cdiv(problem.n, tiling.block_m), cdiv(problem.m, cols_per_strip))](
            problem.x, problem.y, problem.vectors, problem.second, incoming, unit, gradient, sums,
            problem.n, problem.m, problem.features, cols_per_strip, **choices(problem), **options(problem, tiling),
        )  # fmt: skip

    def rowwise(self, x: Tensor) -> ModuleType | None:
        return rowwise

    def takes_attention(self, op: str, dtype: torch.dtype, features: int) -> bool:
        return (
            op in ("similarity_logsumexp", "similarity_sum")
            and dtype.itemsize == 2
            and features <= tilings.ATTENTION_FEATURES
        )

    def attention_tiling(self, problem: Problem) -> tuple[int, int]:
        return tilings.attention_tiling(problem)[:2]

    def attention(self, problem: Problem, unit: Tensor | None, row: Part, slopes: Slopes, cols_per_strip: int) -> None:
        tiling = tilings.attention_tiling(problem)
        attention_kernel[(cdiv(problem.n, tiling.block_m), cdiv(problem.m, cols_per_strip))](
            problem.x, problem.y, problem.vectors, problem.second, unit, row, slopes,
            problem.n, problem.m, problem.features, cols_per_strip, **choices(problem), **options(problem, tiling),
        )  # fmt: skip

    def topk_tiling(self, problem: Problem, k: int) -> tuple[int, int]:
        return tilings.topk_tiling(problem, k)[:2]

    def topk(
        self, problem: Problem, largest: bool, noise: int | None, bound: Tensor | None, best: Best, cols_per_strip: int
    ) -> None:
        k = best.keys.shape[2]
        tiling = tilings.topk_tiling(problem, k)
        given, described = inputs(problem, tiling)
        x, y, vectors, span, *_, second = given
        topk_kernel[(cdiv(problem.n, tiling.block_m), cdiv(problem.m, cols_per_strip))](
            x, y, vectors, span, second, noise, bound, best, problem.n, problem.m, problem.features, cols_per_strip,
            LARGEST=largest, DESCRIBED=described, K=k, **options(problem, tiling),
        )  # fmt: skip
