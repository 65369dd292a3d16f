"""csrc/cuda/binding.cpp on the CPU: what the operators take and what they refuse, before any kernel."""

from __future__ import annotations

import re

import pytest
import torch
from cuda_host import build as host

from contrastive_ops.backends import cuda

N, M, D = 7, 9, 16
X, Y, TUPLES = torch.ones(N, D), torch.ones(M, D), torch.ones(M, 2, D)
NONE = (None,) * 8
ROWS, COLS = torch.zeros(N, dtype=torch.int32), torch.zeros(M, dtype=torch.int32)


@pytest.fixture(scope="module")
def operators():
    sentence = host.why_not()
    if sentence is not None:
        pytest.skip(f"cuda-host: {sentence}")
    torch.ops.load_library(host.backend())
    return torch.ops.contrastive_ops_cuda_host


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


def changed(values, place, value):
    return (*values[:place], value, *values[place + 1 :])


EXCLUDE = changed(NONE, 4, ROWS)
NO_PART, NO_SUMS, NOTHING = (None,) * 6, (None,) * 5, (None,) * 14


def statistics(parts, size, make=empty):
    """A maximum and a sum."""
    return changed(changed(NO_PART, 0, make(parts, size)), 1, make(parts, size))


TEACHER = (torch.ones(N, 3), torch.ones(M, 3), *NONE[2:])
GUIDE = changed(NONE, 6, torch.ones(N))


class Calls:
    """A right call of each operator, whose arguments a test replaces by name."""

    def __init__(self, operators):
        self.operators = operators
        self.rows, self.cols = operators.tiling("logsumexp", 0)
        self.block_cols = operators.rows_tiling(torch.float16, D)[1]

    def problem(
        self, x=X, y=Y, vectors=NONE, span=(None, None), second=NONE, reduction="logsumexp", mirrored=False,
        equal=False, above=False, tf32=False,
    ):  # fmt: skip
        return (x, y, vectors, span, second, reduction, mirrored, equal, above, tf32)

    def forward(self, *, row=None, col=NO_PART, rows_per_group=None, cols_per_strip=None, **problem):
        row = statistics(1, N) if row is None else row
        parts = (self.rows if rows_per_group is None else rows_per_group,)
        parts += (self.cols if cols_per_strip is None else cols_per_strip,)
        self.operators.forward(*self.problem(**problem), row, col, *parts)

    def excluded(self, *, logits=None, vectors=EXCLUDE, **problem):
        logits = empty(N) if logits is None else logits
        self.operators.excluded(*self.problem(vectors=vectors, **problem), logits)

    def merge(self, *, part=None, mirror=NO_PART, maximum=None, log_sum=None, mean=None):
        part = statistics(2, N, torch.zeros) if part is None else part
        maximum = empty(N) if maximum is None else maximum
        self.operators.merge(part, mirror, maximum, empty(N) if log_sum is None else log_sum, mean)

    def block(self, *, incoming=NOTHING, unit=None, coefficients=None, sums=NO_SUMS, where=(0, 0, N, M, 16), **problem):
        coefficients = empty(1, N, 16) if coefficients is None else coefficients
        self.operators.block(*self.problem(**problem), incoming, unit, coefficients, sums, NO_SUMS, *where)

    def by_rows(self, *, x=None, y=None, gradient=None, sums=NO_SUMS, cols_per_strip=None, **problem):
        x, y = X.half() if x is None else x, Y.half() if y is None else y
        gradient = empty(1, N, D) if gradient is None else gradient
        cols_per_strip = self.block_cols if cols_per_strip is None else cols_per_strip
        self.operators.rows(*self.problem(x, y, **problem), NOTHING, None, gradient, sums, cols_per_strip)

    def attention(self, *, x=None, y=None, unit=None, row=None, slopes=None, cols_per_strip=None, **problem):
        x, y = X.half() if x is None else x, Y.half() if y is None else y
        row = statistics(1, N) if row is None else row
        slopes = (empty(1, N, D), empty(1, N)) if slopes is None else slopes
        cols_per_strip = self.block_cols if cols_per_strip is None else cols_per_strip
        self.operators.attention(*self.problem(x, y, **problem), unit, row, slopes, cols_per_strip)

    def factor(self, *, vectors=TUPLES, inverse=None, volume=None):
        inverse = empty(M, 2, 2, dtype=torch.float64) if inverse is None else inverse
        self.operators.factor(vectors, inverse, empty(M, dtype=torch.float64) if volume is None else volume)


SPAN = (torch.ones(3, M), torch.ones(N))
REFUSALS = {
    # the problem
    "x-shape": ("forward", {"x": X[0]}, "x must have shape (N, D), got (16)"),
    "x-empty": ("forward", {"x": X[:0]}, "N must be from 1 to 1073741823, got 0"),
    "x-dtype": ("forward", {"x": X.double()}, "x must be of type Float, BFloat16 or Half, got Double"),
    "y-shape": ("forward", {"y": Y[:, :3].contiguous()}, "y must have shape (9, 16), got (9, 3)"),
    "y-dimensions": ("forward", {"y": Y[0]}, "y must have shape (M, D) or (M, P, D), got (16)"),
    "y-dtype": ("forward", {"y": Y.half()}, "y must be of type Float, got Half"),
    "y-layout": ("forward", {"y": torch.ones(D, M).T}, "y must be contiguous"),
    "y-device": ("merge", {"log_sum": empty(N).to("meta")}, None),
    "members": ("forward", {"y": torch.ones(M, 5, D), "span": SPAN}, "P must be from 1 to 4, got 5"),
    "vectors-count": ("forward", {"vectors": NONE[1:]}, "vectors must be 8 optional tensors, got 7"),
    "vectors-shape": ("forward", {"vectors": changed(NONE, 0, torch.ones(M))},
                      "row_scale must have shape (7), got (9)"),
    "vectors-side": ("forward", {"vectors": changed(NONE, 3, torch.ones(N))}, "col_bias must have shape (9), got (7)"),
    "vectors-float": ("forward", {"vectors": changed(NONE, 2, torch.ones(N).double())},
                      "row_bias must be of type Float, got Double"),
    "vectors-int": ("forward", {"vectors": changed(NONE, 4, ROWS.long())}, "row_exclude must be of type Int, got Long"),
    "ids-side": ("forward", {"vectors": changed(NONE, 6, ROWS)}, "row_ids and col_ids must be given together"),
    "ids-equal": ("forward", {"equal": True}, "equal needs row_ids and col_ids"),
    "span-none": ("forward", {"y": TUPLES}, "volumes need inverse and square"),
    "span-shape": ("forward", {"y": TUPLES, "span": (torch.ones(2, M), SPAN[1])},
                   "inverse must have shape (3, 9), got (2, 9)"),
    "mirrored": ("forward", {"mirrored": True}, "mirrored needs y to be x"),
    "reduction": ("forward", {"reduction": "tanh"}, "there is no reduction tanh"),
    "second-count": ("forward", {"second": NONE[1:]}, "second must be 8 optional tensors, got 7"),
    "second-shape": ("forward", {"second": changed(TEACHER, 0, torch.ones(N))},
                     "u must have shape (N, D), got (7)"),
    "second-side": ("forward", {"second": changed(TEACHER, 1, torch.ones(N, 3))},
                    "v must have shape (9, 3), got (7, 3)"),
    "second-dtype": ("forward", {"second": changed(TEACHER, 0, torch.ones(N, 3).half())},
                     "u must be of type Float, got Half"),
    "second-one": ("forward", {"second": changed(TEACHER, 1, None)}, "u and v must be given together"),
    "ceiling-shape": ("forward", {"second": changed(NONE, 7, torch.ones(N))},
                      "col_ceiling must have shape (9), got (7)"),
    "ceiling-mean": ("forward", {"second": GUIDE, "reduction": "expectation"}, "expectations have no guide"),
    "volumes-sum": ("forward", {"y": TUPLES, "span": SPAN, "reduction": "relu"},
                    "volumes have a log-sum-exp, and no second form"),
    "volumes-guide": ("forward", {"y": TUPLES, "span": SPAN, "second": GUIDE},
                      "volumes have a log-sum-exp, and no second form"),
    # where the results go
    "parts-none": ("forward", {"row": NO_PART}, "row or col must be given"),
    "parts-count": ("forward", {"row": statistics(2, N)}, "maximum must have shape (1, 7), got (2, 7)"),
    "parts-sum": ("forward", {"row": changed(NO_PART, 0, empty(1, N))}, "row must have maximum and sum, or neither"),
    "parts-total": ("forward", {"col": changed(NO_PART, 2, empty(1, M))}, "col has a total, but no maximum"),
    "parts-of-sum": ("forward", {"reduction": "step"}, "sum must be of type Double, got Float"),
    "parts-of-mean": ("forward", {"reduction": "expectation"}, "row must have a moment, if it is of means"),
    "parts-of-logits": ("forward", {"row": changed(statistics(1, N), 5, empty(1, N))},
                        "row must have a moment, if it is of means"),
    "parts-of-teacher": ("forward", {"reduction": "expectation", "second": TEACHER,
                                     "row": changed(statistics(1, N), 5, empty(1, N))},
                         "row must have a teacher's, where there is one"),
    "parts-mirrored": ("forward", {"y": X, "mirrored": True}, "mirrored needs col"),
    "group": ("forward", {"rows_per_group": 1}, "rows_per_group must be a multiple of {rows}, got 1"),
    "strip": ("forward", {"cols_per_strip": 1}, "cols_per_strip must be a multiple of {cols}, got 1"),
    "strip-none": ("forward", {"cols_per_strip": 0}, "cols_per_strip must be from 1 to 1073741823, got 0"),
    "excluded-none": ("excluded", {"vectors": NONE}, "row_exclude must be given"),
    "excluded-volumes": ("excluded", {"y": TUPLES, "span": SPAN}, "y must have shape (M, D)"),
    "excluded-shape": ("excluded", {"logits": empty(M)}, "logits must have shape (7), got (9)"),
    "merge-none": ("merge", {"part": NO_PART}, "parts must be from 1 to 1073741823, got 0"),
    "merge-shape": ("merge", {"log_sum": empty(M)}, "log_sum must have shape (7), got (9)"),
    "merge-mirror": ("merge", {"mirror": statistics(2, M)},
                     "maximum must have shape (2, 7), got (2, 9)"),
    "merge-mean": ("merge", {"mean": empty(N)}, "a mean needs moments"),
    "block-rows": ("block", {"where": (1, 0, N, M, 16)}, "rows from 1 to 8 are not in x"),
    "block-cols": ("block", {"where": (0, -1, N, M, 16)}, "columns from -1 to 8 are not in y"),
    "block-part-rows": ("block", {"where": (0, 0, 3, M, 16)}, "rows must be whole tiles of 128, got 3"),
    "block-part-cols": ("block", {"where": (0, 0, N, 4, 16)}, "cols must be whole tiles of 128, got 4"),
    "block-along": ("block", {"sums": changed(NO_SUMS, 2, empty(1, N))}, "along is of the rows of volumes alone"),
    "block-stride": ("block", {"where": (0, 0, N, M, 8)}, "stride must be at least the columns, 9, got 8"),
    "block-stride-16": ("block", {"where": (0, 0, N, M, 12)}, "stride must be a multiple of 16, got 12"),
    "block-shape": ("block", {"coefficients": empty(N, 16)}, "coefficients must have shape (1, 7, 16), got (7, 16)"),
    "block-dtype": ("block", {"coefficients": empty(1, N, 16).half()}, "coefficients must be of type Float, got Half"),
    "block-aligned": ("block", {"coefficients": empty(1 + N * 16)[1:].view(1, N, 16)},
                      "coefficients must be aligned to 16 bytes"),
    "block-sums": ("block", {"sums": changed(NO_SUMS, 0, empty(2, N))}, "scale must have shape (1, 7), got (2, 7)"),
    "block-unit": ("block", {"unit": torch.ones(())}, "unit must have shape (1), got ()"),
    "incoming-max": ("block", {"incoming": changed(NOTHING, 0, torch.ones(N))}, "row_weight and row_max go together"),
    "incoming-side": ("block", {"incoming": changed(NOTHING, 7, torch.ones(N))},
                      "col_total must have shape (9), got (7)"),
    "incoming-mean": ("block", {"incoming": changed(NOTHING, 8, torch.ones(N))}, "row_share and row_mean go together"),
    "rows-guide": ("by_rows", {"second": GUIDE}, "there is no such kernel for this reduction or with a guide"),
    "rows-dtype": ("by_rows", {"x": X, "y": Y}, "there is no such kernel for D = 16 and the type of x"),
    "rows-volumes": ("by_rows", {"y": TUPLES.half(), "span": SPAN}, "y must have shape (M, D)"),
    "rows-strip": ("by_rows", {"cols_per_strip": 1}, "cols_per_strip must be a multiple of {block_cols}, got 1"),
    "rows-gradient": ("by_rows", {"gradient": empty(N, D)}, "gradient must have shape (1, 7, 16), got (7, 16)"),
    "rows-gradient-dtype": ("by_rows", {"gradient": empty(1, N, D).bfloat16()},
                            "gradient must be of type Half, got BFloat16"),
    "attention-dtype": ("attention", {"x": X, "y": Y}, "there is no such kernel for D = 16 and the type of x"),
    "attention-row": ("attention", {"row": NO_PART}, "row must be given"),
    "attention-slopes": ("attention", {"slopes": (empty(1, N, D), None)}, "slopes must be given"),
    "attention-shape": ("attention", {"slopes": (empty(N, D), None)},
                        "slopes.x must have shape (1, 7, 16), got (7, 16)"),
    "attention-strip": ("attention", {"cols_per_strip": 1}, "cols_per_strip must be a multiple of {block_cols}, got 1"),
    "factor-shape": ("factor", {"vectors": Y}, "vectors must have shape (count, K, D), got (9, 16)"),
    "factor-members": ("factor", {"vectors": torch.ones(M, 6, D)}, "K must be from 1 to 5, got 6"),
    "factor-dtype": ("factor", {"inverse": empty(M, 2, 2)}, "inverse must be of type Double, got Float"),
    "factor-none": ("factor", {"vectors": TUPLES[:0]}, "vectors must have at least one set"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name, operators):
    calls = Calls(operators)
    operator, arguments, sentence = REFUSALS[name]
    if sentence is None:  # tensors on two devices find no operator, or are refused
        with pytest.raises((ValueError, NotImplementedError)):
            getattr(calls, operator)(**arguments)
        return
    sentence = f"{operator.removeprefix('by_')}: {sentence.format(**vars(calls))}"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        getattr(calls, operator)(**arguments)


@pytest.mark.parametrize("operator", ["forward", "excluded", "merge", "block", "by_rows", "attention", "factor"])
def test_the_same_call_without_a_fault_runs(operator, operators):
    """So it was the fault that was refused."""
    getattr(Calls(operators), operator)()


@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_rows_take_as_many_features_as_the_backend_says(dtype, operators):
    kernels = cuda.CudaKernels("contrastive_ops_cuda_host")
    for features in (1, cuda.ROWS_FEATURES, cuda.ROWS_FEATURES + 1):
        assert kernels.takes_attention("similarity_logsumexp", dtype, features) == (
            operators.rows_tiling(dtype, features)[0] > 0
        )
