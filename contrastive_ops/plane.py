"""A sweep over the N x M plane as the kernels of a GPU engine take it: its inputs, its results, and the `Kernels`.

What a sweep makes of its pairs is the `reduction` of its `Problem`:

    logsumexp     row i: the maximum and the sum of e^(s_ij - maximum); its gradient weights pairs by that share
    expectation   the same, and the mean of s_ij under the softmax of the teacher's logits z_ij, or of s_ij itself
    one of SUMS   the sum of f(s_ij)

The kernels of Triton are launched by kernels/launch.py, those of CUDA by contrastive_ops/backends/cuda.py;
contrastive_ops/backends/sweep.py says which runs when.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

PROGRAMS = 256  # of a launch, about two for each multiprocessor of an H100, where the device doesn't say
# |x|^2 - |y|^2 is off by about 4 units in the last place of |x|^2: there the distance is 0, at its minimum
AT_MINIMUM = 4 * torch.finfo(torch.float32).eps
SUMS = ("identity", "softplus", "relu", "sigmoid", "square", "step")


class Vectors(NamedTuple):
    """What the options of the op say of every row and every column."""

    row_scale: Tensor | None
    col_scale: Tensor | None
    row_bias: Tensor | None
    col_bias: Tensor | None
    row_exclude: Tensor | None  # the column that a row leaves out, -1 for none
    col_exclude: Tensor | None  # the row that a column leaves out: in self-similarity a pair has two sides
    row_ids: Tensor | None
    col_ids: Tensor | None


class Span(NamedTuple):
    """What distances need beside the vectors."""

    inverse: Tensor | None = None  # [P (P + 1) / 2, M], the lower triangles of L^-1
    square: Tensor | None = None  # [N], |x_i|^2


class Second(NamedTuple):
    """A second form of every pair: the logits of a teacher (of "expectation"), or a guide (of all else).

    teacher: z_ij = a'_i b'_j <u_i, v_j> + c'_i + d'_j; without u it is s_ij
    guide: g_ij = <u_i, v_j>, or without u s_ij; a pair is above where g_ij > row_ceiling_i or g_ij > col_ceiling_j

    In self-similarity v is u, and the vectors of the columns are those of the rows.
    """

    u: Tensor | None = None  # [N, D'], in the dtype of x
    v: Tensor | None = None  # [M, D']
    row_scale: Tensor | None = None
    col_scale: Tensor | None = None
    row_bias: Tensor | None = None
    col_bias: Tensor | None = None
    row_ceiling: Tensor | None = None
    col_ceiling: Tensor | None = None


class Incoming(NamedTuple):
    """Gradients of what the op returned, and what the coefficients of pairs are relative to.

    dL/dlse_i e^(s - lse_i) = row_weight_i e^(s - row_max_i) with row_weight_i = dL/dlse_i e^-log_sum_i: the maximum
    stays apart, as at logits of 1e4 the lse has no digits left for a gradient. For an expectation, likewise,
    dL/dmean_i t_ij = row_share_i e^(z_ij - teacher_row_max_i) with row_share_i = dL/dmean_i e^-teacher_log_sum_i.
    """

    row_weight: Tensor | None = None  # of sums dL/dsum_i itself, and there is no maximum
    col_weight: Tensor | None = None
    row_max: Tensor | None = None  # inf for an empty set: e^(s - max) = 0
    col_max: Tensor | None = None
    row_excluded: Tensor | None = None
    col_excluded: Tensor | None = None
    row_total: Tensor | None = None
    col_total: Tensor | None = None
    row_share: Tensor | None = None
    col_share: Tensor | None = None
    teacher_row_max: Tensor | None = None  # None without u: the teacher's is row_max
    teacher_col_max: Tensor | None = None
    row_mean: Tensor | None = None
    col_mean: Tensor | None = None


class Part(NamedTuple):
    """Partial statistics of one direction, [parts, size]; a reduction has some of them, see `fields_of_part`."""

    maximum: Tensor | None = None
    sum: Tensor | None = None  # of e^(s - maximum); of SUMS that of f(s), in float64, and there is no maximum
    total: Tensor | None = None  # of volumes: the sum of s
    teacher_maximum: Tensor | None = None  # of z
    teacher_sum: Tensor | None = None  # of e^(z - teacher_maximum)
    moment: Tensor | None = None  # the sum of e^(z - teacher_maximum) s, or without u of e^(s - maximum) s


class Sums(NamedTuple):
    """Partial sums of the gradients of one direction, [parts, size]; None where not needed."""

    scale: Tensor | None = None
    bias: Tensor | None = None
    along: Tensor | None = None  # of volumes: what x_i itself has of its gradient
    teacher_scale: Tensor | None = None
    teacher_bias: Tensor | None = None


class Slopes(NamedTuple):
    """Gradients of what is reduced over a row, each over the columns of a strip: means under its softmax, or sums.

    The weight w_ij of a pair is e^(s_ij - lse_i of the strip), or of SUMS f'(s_ij).
    """

    x: Tensor  # [strips, N, D], a_i times the sum of w_ij b_j y_j
    scale: Tensor  # [strips, N], the sum of w_ij b_j pair_ij
    bias: Tensor | None = None  # [strips, N], the sum of w_ij, which of a softmax is 1


class Block(NamedTuple):
    """A block of the plane, and the coefficients' rows in the workspace: `stride` elements, a multiple of 16."""

    first_row: int
    first_col: int
    rows: int
    cols: int
    stride: int

    def transposed(self) -> Block:
        return Block(self.first_col, self.first_row, self.cols, self.rows, self.stride)


class Best(NamedTuple):
    """The best pairs of every row in each strip, [N, strips, K], in any order.

    A candidate is an integer: the order of its key, the better the larger, and in the low 32 bits LAST_COLUMN less the
    column. The order is the bits of float32, but for the sign flipped where that is set; of the smallest ~order.
    """

    keys: Tensor  # int64; NO_KEY where there is no more pair
    logits: Tensor | None  # where they are not the keys


MOST_CANDIDATES = 256  # of a row in one sweep
NO_KEY = -(2**31)
LAST_COLUMN = 2**31 - 1
NO_SPAN, NO_SECOND = Span(), Second()


class Problem:
    """The inputs of a sweep as the kernels take them: contiguous, with the columns of self-similarity filled in."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        vectors: Vectors,
        span: Span = NO_SPAN,
        second: Second = NO_SECOND,
        *,
        reduction: str = "logsumexp",
        mirrored: bool = False,
        restrict: bool = False,
        above: bool = False,
    ) -> None:
        self.x = x.contiguous()
        self.y = self.x if y is x else y.contiguous()
        self.vectors = Vectors(*(None if vector is None else vector.contiguous() for vector in vectors))
        self.span = span
        self.second = Second(*(None if tensor is None else tensor.contiguous() for tensor in second))
        self.reduction = reduction
        self.n, self.m, self.features = x.shape[0], y.shape[0], x.shape[1]
        self.members = y.shape[1] if y.dim() == 3 else 0
        self.second_features = 0 if second.u is None else second.u.shape[1]
        self.mirrored, self.restrict, self.above = mirrored, restrict, above

    @property
    def guided(self) -> bool:
        """Whether a ceiling decides which pairs take part."""
        return self.second.row_ceiling is not None or self.second.col_ceiling is not None

    @property
    def teaches(self) -> bool:
        """Whether the logits of the teacher are others than those of the pairs."""
        return self.reduction == "expectation" and self.second.u is not None

    @property
    def tf32(self) -> bool:
        """PyTorch's own setting for float32 matrix products: TF32 only where the user allows it."""
        nvidia = self.x.device.type == "cuda" and torch.version.hip is None
        return nvidia and self.x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"

    def transposed(self) -> Problem:
        """Of pairs: x and y change places. Volumes have no such form."""
        return Problem(
            self.y,
            self.x,
            Vectors(*swapped(self.vectors)),
            self.span,
            Second(*swapped(self.second)),
            reduction=self.reduction,
            mirrored=self.mirrored,
            restrict=self.restrict,
            above=self.above,
        )

    def full(self, shape: tuple[int, ...], value: float) -> Tensor:
        return self.x.new_full(shape, value, dtype=torch.float32)

    def empty(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)


def swapped(pairs: tuple[Any, ...]) -> list[Any]:
    """(row, col, row, col, ...) with the sides swapped."""
    return [value for row, col in zip(pairs[::2], pairs[1::2], strict=True) for value in (col, row)]


def fields_of_part(problem: Problem, totals: bool = False) -> tuple[str, ...]:
    """What forward folds of each direction."""
    if problem.reduction in SUMS:
        return ("sum",)
    of_teacher = ("teacher_maximum", "teacher_sum") if problem.teaches else ()
    moment = ("moment",) if problem.reduction == "expectation" else ()
    return ("maximum", "sum", *(("total",) if totals else ()), *of_teacher, *moment)


def cdiv(size: int, part: int) -> int:
    return -(-size // part)


def accumulate(total: Tensor, a: Tensor, b: Tensor, begins: bool) -> None:
    """total += a @ b, in float32."""
    beta = 0.0 if begins else 1.0  # with 0 what is there is not read
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=beta)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=beta)


class Kernels(Protocol):
    """What an engine offers, csrc/cuda/sweep.h in C++; what has a body here may be left out.

    Tilings are the rows and columns of a tile; groups of rows and strips of columns are whole tiles. None instead of a
    tensor: an option that was not given, or a result that is not needed.

    What `forward`, `block`, `rows` and `attention` do is said for all reductions by what they fold and by g = dL/ds,
    h = dL/dz of a pair (those of columns, with their own weights, are added):

        logsumexp    g = row_weight e^(s - row_max) + row_total
        SUMS         g = row_weight f'(s)
        expectation  g = row_weight e^(s - row_max) + t, h = t (s - row_mean), t = row_share e^(z - teacher_row_max),
                     where the teacher is s itself g + h

    A pair that takes no part is folded as nothing, and has g = h = 0, whatever its logits are; so has a pair of weight
    0 in a mean. One that is left out by index has g = row_excluded. Which take part is said by the indices and ids of
    `Vectors`, and by the ceilings of `Second`: those above, or all others (`Problem.above`). NaN is not above.
    """

    def programs(self, x: Tensor) -> int:
        """Programs of a launch: two waves of the multiprocessors, or one if each holds two."""
        if x.device.type != "cuda":
            return PROGRAMS
        return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count

    def forward_tiling(self, problem: Problem) -> tuple[int, int]:
        """In self-similarity the columns of a tile divide its rows: the diagonal is between tiles of rows."""

    def block_tiling(self, problem: Problem) -> tuple[int, int]: ...

    def rows_tiling(self, problem: Problem) -> tuple[int, int] | None:
        """None where `rows` does not take the problem."""
        return None

    def forward(self, problem: Problem, row: Part, col: Part, rows_per_group: int, cols_per_strip: int) -> None:
        """Partials of the statistics, of rows [strips, N] and of columns [groups, M]: see `fields_of_part`."""

    def excluded(self, problem: Problem, logits: Tensor) -> None:
        """The logit of every row with the column that it leaves out; -inf where it leaves out none."""

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
        """Join the partials [parts, size], and those of the mirror [mirrors, size], in their order.

        They have a maximum and a sum, and where the mean is asked for a moment: it is moment / sum, and 0 of an empty
        set. Those of a teacher come as such a `Part` of their own. SUMS are joined by PyTorch.
        """

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
        """Coefficients g a b / unit of a block, and partial sums.

        [planes, rows, stride]: of volumes P planes, of pairs one, or of a teacher that needs gradients two, the second
        h a' b' / unit[1]. In float16 the units are there, a bound for each plane.
        """

    def product(
        self, problem: Problem, block: Block, total: Tensor, coefficients: Tensor, y: Tensor, begins: bool
    ) -> None:
        """total += coefficients @ y of the rows of a block, in float32; of its columns with the sides of all swapped.

        y are features of the columns, of the pairs or of the teacher.

        Where the total begins with it, there is nothing in it yet. An engine of its own may leave out tiles without a
        pair that counts, whose coefficients `block` need not write.
        """
        accumulate(total, coefficients, y, begins)

    def product_tiling(self, problem: Problem) -> tuple[int, int] | None:
        """Rows and features of a tile; None where `product` is the vendor's, of all pairs."""
        return None

    def rows(
        self,
        problem: Problem,
        incoming: Incoming,
        unit: Tensor | None,
        gradient: Tensor | None,
        sums: Sums,
        cols_per_strip: int,
    ) -> None:
        """Gradients of all rows by strips of columns, [strips, N, D], in float32 or in the dtype of x."""

    def takes_attention(self, op: str, dtype: torch.dtype, features: int) -> bool:
        """Of what has no second form. Asked of traced tensors, too, whose device need not be there."""
        return False

    def attention_tiling(self, problem: Problem) -> tuple[int, int]:
        raise NotImplementedError

    def attention(self, problem: Problem, unit: Tensor | None, row: Part, slopes: Slopes, cols_per_strip: int) -> None:
        """Of rows, the partials of the statistics [strips, N] and the gradients of what is reduced over each strip."""

    def topk_tiling(self, problem: Problem, k: int) -> tuple[int, int]:
        raise RuntimeError(f"{type(self).__name__} has no topk")

    def topk(
        self, problem: Problem, largest: bool, noise: int | None, bound: Tensor | None, best: Best, cols_per_strip: int
    ) -> None:
        """Of every row and strip of columns those that take part with the largest (smallest) keys.

        The key is the logit, and with noise the logit and Gumbel noise of the pair, see contrastive_ops/noise.py: it is
        the start of its stream. -inf is no key, and NaN the largest. With a bound [N] only candidates below it count.
        """
        raise RuntimeError(f"{type(self).__name__} has no topk")

    def factor(self, tuples: Tensor) -> tuple[Tensor, Tensor] | None:
        """L^-1 and the volume of each tuple, see backends/tuples.py; None for PyTorch's."""
        return None

    def rowwise(self, x: Tensor) -> ModuleType | None:
        """Kernels of what is done for every row, see backends/rowwise.py; None for PyTorch's."""
        return None
