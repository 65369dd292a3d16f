"""The ops over pairs on every backend against their dense twins in float64, and what holds whatever the numbers are."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import ALL_OPTIONS, EXPECTATIONS, FAR_IDS, LOGSUMEXP, OPS, SUMS, VECTORS, fused, naive, problem
from tolerance import assert_accurate, evaluate, judge

import contrastive_ops as co
from contrastive_ops import build

# every ISA variant has products of its own for these two; the others differ in how panels are filled
CORE_DTYPES = (*(pytest.param(dtype, marks=pytest.mark.core) for dtype in (torch.float32, torch.bfloat16)),
               torch.float16, torch.float64)  # fmt: skip
# N, M, D. Every size next to a power of two that a vector register, a micro tile or a cache block may have, each as a
# row count and as a column count, so that no tail is ever paired with the same tail; D of one element, of less than a
# register, of exactly one, of one more, and not a multiple of the pairs and quadruples that bf16 products take
SHAPES = (
    (1, 1, 1), (1, 257, 64), (257, 1, 17), (2, 63, 16), (7, 2, 3), (63, 7, 17), (64, 65, 100), (65, 64, 1),
    (127, 129, 64), (128, 128, 16), (129, 127, 257), (1000, 64, 3), (63, 1000, 100), (257, 128, 100), (2, 2, 257),
)  # fmt: skip


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bitwise, NaN included."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value.nan_to_num(nan=1e30), right[name].nan_to_num(nan=1e30)), name


# 65 x 129 x 17: two tails in every direction at the sizes of micro tiles
@pytest.mark.parametrize("dtype", CORE_DTYPES)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in op.options])
def test_options(op, name, backend, dtype):
    arguments, options = op.problem(name, 65, 129, 17, dtype)
    judge(
        op.fused, op.naive, arguments, options, fused_options={"backend": backend}, logits=op.logits(arguments[0].dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["everything", "guide-everything", "self-guide-everything"])
@pytest.mark.parametrize("op", [op for op in SUMS if op not in OPS])
def test_functions(op, name, backend, dtype):
    arguments, options = op.problem(name, 65, 129, 17, dtype)
    judge(
        op.fused, op.naive, arguments, options, fused_options={"backend": backend}, logits=op.logits(arguments[0].dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["both", pytest.param("everything", marks=pytest.mark.core), "self-everything"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", [LOGSUMEXP, SUMS[1], EXPECTATIONS[0]])
def test_shapes(op, shape, name, backend, dtype):
    # a seed by which dense PyTorch is not right by luck where the results are one element
    arguments, options = op.problem(name, *shape, dtype, seed=1)
    judge(
        op.fused, op.naive, arguments, options, fused_options={"backend": backend}, logits=op.logits(arguments[0].dtype)
    )


# 1024 is the edge of the outer tiles: more than one of them in both directions, and in self-similarity tiles on, next
# to and far from the diagonal
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("everything", (1100, 2100, 8)),
        ("ids-restrict-sorted", (2100, 1100, 8)),
        ("self-everything", (1100, 1100, 8)),
        ("self-everything", (2100, 2100, 8)),
        ("self-ids-restrict-sorted", (2100, 2100, 8)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"N{value[0]}-M{value[1]}",
)
@pytest.mark.parametrize("op", [LOGSUMEXP, SUMS[1], EXPECTATIONS[0]])
def test_beyond_one_outer_tile(op, name, shape, backend):
    arguments, options = op.problem(name, *shape)
    judge(
        op.fused,
        op.naive,
        arguments,
        options,
        fused_options={"backend": backend},
        logits=op.logits(arguments[0].dtype),
        roundings=1,
    )


# D beyond one panel of the products; an odd one, so that the last panel is ragged
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [LOGSUMEXP, SUMS[1], EXPECTATIONS[0]])
def test_many_features(op, backend, dtype):
    arguments, options = op.problem("everything", 65, 40, 2049, dtype)
    judge(
        op.fused, op.naive, arguments, options, fused_options={"backend": backend}, logits=op.logits(arguments[0].dtype)
    )


@pytest.mark.parametrize("name", ["everything", "self-everything"])
def test_every_subset_of_requires_grad_gives_the_same_gradients(name, backend):
    arguments, options = problem(name, 70, 67, 9)
    named = {f"argument{i}": value for i, value in enumerate(arguments)} | options
    leaves = [key for key, value in named.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    everything = evaluate(fused, arguments, options | {"backend": backend})
    assert len(leaves) == (3 if name.startswith("self") else 6)
    for size in range(len(leaves)):
        for subset in itertools.combinations(leaves, size):
            for key in leaves:
                named[key].requires_grad_(key in subset)
            results = evaluate(fused, arguments, options | {"backend": backend})
            expected = {k: v for k, v in everything.items() if k.startswith("output") or k[8:] in subset}
            assert_same(results, expected)


@pytest.mark.parametrize("directions", [(True, False), (False, True), (True, True)], ids=["rows", "cols", "both"])
def test_cotangent_of_one_direction_only(directions, backend):
    """The other one arrives as zeros, or not at all."""
    (x, y), options = problem("vectors", 33, 40, 5)
    use_rows, use_cols = directions
    leaves = [x, y, *(options[name] for name in VECTORS)]

    def gradients(outputs):
        row_lse, _, col_lse, _ = outputs
        total = (row_lse.sin().sum() if use_rows else 0) + (col_lse.cos().sum() if use_cols else 0)
        return torch.autograd.grad(total, leaves)

    expected = gradients(naive(x, y, **options))
    for got, grad in zip(gradients(fused(x, y, backend=backend, **options)), expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-5)


def transposed(x):
    return x.detach().T.contiguous().T.requires_grad_()


def strided(x):
    wide = torch.full((2 * x.shape[0], 2 * x.shape[1] + 1), torch.nan, dtype=x.dtype)
    wide[::2, 1::2] = x.detach()
    return wide[::2, 1::2].requires_grad_()


def apart(x):
    """Contiguous rows with something else between them."""
    wide = torch.full((x.shape[0], x.shape[1] + 3), torch.nan, dtype=x.dtype)
    wide[:, : x.shape[1]] = x.detach()
    return wide[:, : x.shape[1]].requires_grad_()


def offset(x):
    """Rows that start at an odd element of their storage: no vector load is aligned."""
    flat = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
    flat[1:] = x.detach().flatten()
    return flat[1:].view(x.shape).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [transposed, strided, apart, offset])
@pytest.mark.parametrize("name", ["everything", "self-everything"])
@pytest.mark.parametrize("op", [LOGSUMEXP, SUMS[1], EXPECTATIONS[0]])
def test_layout_does_not_matter(op, name, layout, backend, dtype):
    arguments, options = op.problem(name, 65, 70, 17, dtype)
    expected = evaluate(op.fused, arguments, options | {"backend": backend})
    laid_out = [layout(x) for x in arguments]
    assert layout is offset or not laid_out[0].is_contiguous()
    strided_options = {
        key: value.detach().repeat_interleave(2)[::2].requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.dim() == 1
        else value
        for key, value in options.items()
    }
    assert_same(evaluate(op.fused, laid_out, strided_options | {"backend": backend}), expected)


def test_zero_strides(backend):
    """One row, expanded: the same as its copies, and its gradient is their sum."""
    x, y = torch.randn(1, 12), torch.randn(1, 12)
    ids = torch.tensor([5]).expand(20)
    options = {"cols": True, "row_ids": ids, "col_ids": torch.arange(30), "backend": backend}
    expected = evaluate(lambda x, y, **o: fused(x.expand(20, 12).contiguous(), y.expand(30, 12).contiguous(), **o),
                        (x.requires_grad_(), y.requires_grad_()), options)  # fmt: skip
    assert_same(evaluate(lambda x, y, **o: fused(x.expand(20, 12), y.expand(30, 12), **o), (x, y), options), expected)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["both", "self-row_scale-0d"])
@pytest.mark.parametrize("size", ["scale 1e4", "magnitude 100", "negative scale"])
@pytest.mark.parametrize("op", [LOGSUMEXP, SUMS[1], EXPECTATIONS[0]])
def test_huge_logits(op, size, name, backend, dtype):
    """|s| about 1e4: finite, and as good as dense; a fixed shift of the exponent would overflow or lose every row."""
    arguments, options = op.problem(name, 65, 129, 17, dtype)
    if size == "magnitude 100":
        arguments = tuple((50 * x.detach()).requires_grad_() for x in arguments)
    if size == "scale 1e4":
        options["row_scale"] = torch.tensor(1e2 if name.startswith("self") else 1e4).requires_grad_()
    if size == "negative scale":
        options["row_scale"] = torch.tensor(-30.0).requires_grad_()
    results = evaluate(op.fused, arguments, options | {"backend": backend})
    assert all(value.isfinite().all() for value in results.values())
    assert max(value.abs().max() for key, value in results.items() if key.startswith("output")) > 10.0
    judge(
        op.fused, op.naive, arguments, options, fused_options={"backend": backend}, logits=op.logits(arguments[0].dtype)
    )


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_huge_biases(shift, backend):
    """A row bias moves the row by itself and leaves its softmax; exp(s) alone is inf, or 0."""
    (x, y), options = problem("both", 20, 30, 8)
    plain = evaluate(fused, (x, y), options | {"backend": backend})
    results = evaluate(fused, (x, y), options | {"row_bias": shift, "cols": False, "backend": backend})
    torch.testing.assert_close(results["output0"], plain["output0"] + shift, rtol=1e-6, atol=0)
    judge(fused, naive, (x, y), options | {"row_bias": shift}, fused_options={"backend": backend})


def test_duplicates(backend):
    """M copies of one column: log M above the logit, and each copy has one M-th of the gradient."""
    m = 37
    x = torch.randn(10, 8, requires_grad=True)
    y = torch.randn(1, 8).expand(m, 8).clone().requires_grad_()
    out = co.similarity_logsumexp(x, y, row_scale=3.0, backend=backend)
    logit = 3.0 * (x.double() @ y[0].double())
    assert_accurate(out.row_lse, (logit + torch.tensor(m).double().log()).detach())
    out.row_lse.sum().backward()
    assert_accurate(y.grad, (3.0 * x.double().sum(0) / m).expand(m, 8).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sides(n, m, backend, dtype):
    for name in ("both", "vectors", "exclude-diagonal", "ids-exclude", "everything", "ids-restrict-sorted"):
        arguments, options = problem(name, n, m, 3, dtype)
        results = evaluate(fused, arguments, options | {"backend": backend})
        row_lse, row_max, col_lse, col_max = (results[f"output{i}"] for i in range(4))
        for vector, size in ((row_lse, n), (row_max, n), (col_lse, m), (col_max, m)):
            assert vector.shape == (size,)
            assert (vector == -torch.inf).all()
        for key, grad in results.items():
            assert key.startswith("output") or (grad == 0).all(), key
        assert results["grad of argument0"].shape == (n, 3)
        assert results["grad of argument1"].shape == (m, 3)


@pytest.mark.parametrize("name", ["self", "self-everything"])
def test_empty_self_similarity(name, backend):
    arguments, options = problem(name, 0, 0, 3)
    results = evaluate(fused, arguments, options | {"backend": backend})
    assert results["output0"].shape == (0,)
    assert results["grad of argument0"].shape == (0, 3)


@pytest.mark.core
def test_excluded_rows_have_minus_infinity_and_no_gradient(backend):
    """Row 2 has no column left, column 1 no row; the rest is as if they were not there."""
    (x, y), options = problem("vectors", 6, 7, 3)
    row_ids = torch.tensor([0, 0, 9, 0, 0, 0])
    col_ids = torch.tensor([9, 0, 9, 9, 9, 9, 9])
    options |= {"row_ids": row_ids, "col_ids": col_ids, "exclude": torch.tensor([-1, -1, 1, -1, -1, -1])}
    results = evaluate(lambda *x, **o: fused(*x, **o)[:4], (x, y), options | {"backend": backend})
    row_lse, row_max, col_lse, col_max = (results[f"output{i}"] for i in range(4))
    assert (row_lse == -torch.inf).nonzero().tolist() == [[2]]
    assert (row_max == -torch.inf).nonzero().tolist() == [[2]]
    assert (col_lse == -torch.inf).nonzero().tolist() == [[1]]
    assert (col_max == -torch.inf).nonzero().tolist() == [[1]]
    for key, index in (("argument0", 2), ("row_scale", 2), ("row_bias", 2)):
        assert (results[f"grad of {key}"][index] == 0).all()
    for key in ("argument1", "col_scale", "col_bias"):
        assert (results[f"grad of {key}"][1] == 0).all()
    judge(fused, naive, (x, y), options, fused_options={"backend": backend})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", ["exclude", "restrict"])
@pytest.mark.parametrize("alone", [False, True], ids=["pair", "self"])
def test_excluded_logits_do_not_depend_on_the_ids(alone, ids, backend, dtype):
    """Tiles without a pair of equal ids are skipped, but not where the logit of an excluded pair is in them."""
    n = 300
    (x, y), options = problem("vectors", n, n, 8, dtype)
    group = torch.arange(n) // 100
    options |= {"exclude": torch.arange(n).flip(0), "row_ids": group, "ids": ids, "cols": False}
    options |= {} if alone else {"col_ids": group}
    if alone:
        options = {k: v for k, v in options.items() if not k.startswith("col_")}
    arguments = (x,) if alone else (x, y)
    judge(fused, naive, arguments, options, fused_options={"backend": backend})

    without_ids = {k: v for k, v in options.items() if k not in ("ids", "row_ids", "col_ids")}
    expected = co.similarity_logsumexp(*arguments, **without_ids, backend=backend).excluded_logit
    assert torch.equal(co.similarity_logsumexp(*arguments, **options, backend=backend).excluded_logit, expected)


def test_index_beyond_the_columns_excludes_nothing(backend):
    (x, y), _ = problem("both", 5, 4, 3)
    out = co.similarity_logsumexp(x, y, exclude=torch.tensor([-1, -7, 4, 2**40, 3]), backend=backend)
    assert (out.excluded_logit == -torch.inf).tolist() == [True, True, True, True, False]
    plain = co.similarity_logsumexp(x, y, backend=backend)
    assert torch.equal(out.row_lse[:4], plain.row_lse[:4])
    (grad,) = torch.autograd.grad(out.excluded_logit[:4].sum(), x)
    assert (grad == 0).all()


def test_all_pairs_excluded(backend):
    ids = torch.zeros(150, dtype=torch.int64)
    for arguments in ((torch.randn(150, 4, requires_grad=True),), tuple(torch.randn(2, 150, 4, requires_grad=True))):
        arguments = tuple(x.detach().requires_grad_() for x in arguments)
        options = {"row_ids": ids, "backend": backend} | ({"col_ids": ids, "cols": True} if len(arguments) == 2 else {})
        results = evaluate(fused, arguments, options)
        for key, value in results.items():
            assert (value == (-torch.inf if key.startswith("output") else 0)).all(), key


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_integer_dtypes_give_the_same(dtype, backend):
    (x, y), options = problem("exclude-diagonal", 20, 21, 4)
    options |= {"row_ids": torch.arange(20) % 3, "col_ids": torch.arange(21) % 3}
    expected = evaluate(fused, (x, y), options | {"backend": backend})
    narrow = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    assert_same(evaluate(fused, (x, y), narrow | {"backend": backend}), expected)


def test_far_ids_are_told_apart(backend):
    """Ids that agree in their low 32 bits are different groups: with one row of each, nothing is left out."""
    x = torch.randn(len(FAR_IDS), 4)
    out = co.similarity_logsumexp(x, row_ids=FAR_IDS, ids="restrict", backend=backend)
    assert_accurate(out.row_lse, x.double().square().sum(1))


@pytest.mark.parametrize(
    "name",
    ["both", "vectors", "row_scale-0d", "col_bias-1", "exclude", "ids-exclude", "ids-restrict", "everything",
     "self", "self-exclude", "self-row_scale-0d", "self-ids-exclude", "self-everything"],
)  # fmt: skip
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op, name, backend):
    arguments, options = op.problem(name, 7, 9, 3, torch.float64, seed=3)
    leaves = {k: v for k, v in options.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    rest = {k: v for k, v in options.items() if k not in leaves}
    count = len(arguments)

    def call(*tensors):
        """Without the sets that are empty: -inf has no finite difference."""
        given = dict(zip(leaves, tensors[count:], strict=True))
        outputs = op.fused(*tensors[:count], **given, **rest, backend=backend)
        return torch.cat([out[out > -torch.inf] for out in outputs if out.requires_grad])

    assert call(*arguments, *leaves.values()).numel() > 3
    torch.autograd.gradcheck(call, (*arguments, *leaves.values()))


# more than one outer tile and ragged, so that threads have work to divide and to race for
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["everything", "self-everything"])
@pytest.mark.parametrize("op", OPS)
def test_runs_are_bitwise_repeatable(op, name, backend, dtype):
    arguments, options = op.problem(name, 1100, 1030, 20, dtype)
    first = evaluate(op.fused, arguments, options | {"backend": backend})
    for _ in range(3 if op == LOGSUMEXP else 1):
        assert_same(evaluate(op.fused, arguments, options | {"backend": backend}), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["everything", "self-everything", "self-ids-restrict-sorted"])
@pytest.mark.parametrize(("op", "n"), [*((LOGSUMEXP, n) for n in (7, 300, 1100)), *((op, 300) for op in OPS[1:])])
def test_number_of_threads(op, n, name, backend, dtype):
    """The C++ engine has the same bits for any number; matrix products of PyTorch, in tiled, only the same value."""
    arguments, options = op.problem(name, n, n - 5, 20, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.get_num_threads() == threads
            results.append(evaluate(op.fused, arguments, options | {"backend": backend}))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        if backend == "cpu":
            assert_same(other, results[0])
        else:
            torch.testing.assert_close(other, results[0], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permutation_equivariance(backend, dtype):
    """Rows and columns in another order, with their options: the results and all gradients in that order."""
    (x, y), options = problem("everything", 130, 70, 6, dtype)
    p, q = torch.randperm(130), torch.randperm(70)

    def permuted(x, y, *, exclude, row_ids, col_ids, **options):
        place = torch.empty_like(q).scatter(0, q, torch.arange(70))
        exclude = torch.where(exclude < 0, -1, place[exclude.clamp(min=0)])[p]
        moved = {k: v[p if k.startswith("row") else q] if k in VECTORS else v for k, v in options.items()}
        outputs = fused(x[p], y[q], exclude=exclude, row_ids=row_ids[p], col_ids=col_ids[q], **moved)
        back_p, back_q = p.argsort(), q.argsort()
        return [output[back] for output, back in zip(outputs, (back_p, back_p, back_q, back_q, back_p), strict=True)]

    judge(permuted, naive, (x, y), options, fused_options={"backend": backend})


@pytest.mark.parametrize("cut", [1, 64, 99])
def test_two_halves_merge_to_the_whole(cut, backend):
    """Columns in two calls, joined by logaddexp: values and gradients of one call."""
    arguments, options = problem("vectors-rows", 65, 100, 12)

    def halves(x, y, *, col_scale, col_bias, **options):
        parts = [
            fused(x, y[part], col_scale=col_scale[part], col_bias=col_bias[part], **options)
            for part in (slice(0, cut), slice(cut, None))
        ]
        (left, left_max), (right, right_max) = parts
        return torch.logaddexp(left, right), torch.maximum(left_max, right_max)

    judge(halves, naive, arguments, options, fused_options={"backend": backend})


def test_columns_are_the_rows_of_the_transposed_problem(backend):
    (x, y), options = problem("vectors-cols", 40, 70, 6)

    def swapped(x, y, *, row_scale, col_scale, row_bias, col_bias, rows, cols, backend):
        return fused(
            y, x, row_scale=col_scale, col_scale=row_scale, row_bias=col_bias, col_bias=row_bias, backend=backend
        )

    judge(swapped, naive, (x, y), options, fused_options={"backend": backend})


@pytest.mark.parametrize("name", ["self-exclude", "self-ids-exclude", "self-row_scale-vector"])
def test_self_similarity_is_the_rectangular_problem_on_itself(name, backend):
    """Each tile above the diagonal stands for its mirror image, too: the gradient has both of its sides."""
    arguments, options = problem(name, 140, 140, 6)
    if "exclude" in options:  # symmetric, as self-similarity makes it
        options["exclude"] = torch.arange(140).view(-1, 2).flip(1).flatten()

    def rectangular(x, *, backend, **options):
        mirror = {f"col_{k[4:]}": v for k, v in options.items() if k.startswith("row_")}
        return fused(x, x, **options, **mirror, backend=backend)

    judge(rectangular, naive, arguments, options, fused_options={"backend": backend})


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nan_reaches_the_rows_it_affects_and_no_others(backend, dtype):
    (x, y), options = problem("both", 70, 67, 9, dtype)
    with torch.no_grad():
        x[3, 2] = torch.nan
    row_lse, _, col_lse, _ = fused(x, y, backend=backend, **options)
    assert row_lse.isnan().nonzero().flatten().tolist() == [3]
    assert col_lse.isnan().all()
    row_lse_alone, _ = fused(x, y, backend=backend)
    grad, grad_y = torch.autograd.grad(row_lse_alone.sum(), (x, y))
    assert grad.isnan().any(1).nonzero().flatten().tolist() == [3]
    assert grad_y.isnan().all()
    with torch.no_grad():
        x[3, 2] = 0.0
        y[5, 0] = torch.nan
    row_lse, _, col_lse, _ = fused(x, y, backend=backend, **options)
    assert row_lse.isnan().all()
    assert col_lse.isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("op", OPS[1:])
def test_nan_reaches_the_rows_of_every_op(op, backend):
    (x, y, *teacher), options = op.problem("both", 70, 67, 9)
    with torch.no_grad():
        x[3, 2] = torch.nan
    results = op.fused(x, y, *teacher, backend=backend, **options)
    for result in results:
        assert result.isnan().nonzero().flatten().tolist() == [3] if len(result) == 70 else result.isnan().all()


@pytest.mark.parametrize("op", OPS[1:])
def test_nan_in_an_excluded_pair_is_not_read_by_any_op(op, backend):
    (x, y, *teacher), options = op.problem("both", 20, 30, 4)
    with torch.no_grad():
        y[7] = torch.nan
    row_ids, col_ids = torch.zeros(20, dtype=torch.int64), torch.ones(30, dtype=torch.int64)
    col_ids[7] = 0
    results = op.fused(x, y, *teacher, row_ids=row_ids, col_ids=col_ids, backend=backend, **options)
    keep = torch.arange(30) != 7
    teacher = [teacher[0], teacher[1][keep]] if teacher else []
    expected = op.naive(x.double(), y.double()[keep], *(of.double() for of in teacher), **options)
    for result, truth in zip(results, expected, strict=True):
        assert_accurate(result if len(truth) == 20 else result[keep], truth.detach())


@pytest.mark.parametrize("op", [*SUMS, EXPECTATIONS[1]])  # a teacher may want what its student excludes
def test_a_bias_of_minus_infinity_leaves_out(op, backend):
    arguments, options = op.problem("both", 33, 40, 5)
    bias = torch.zeros(40)
    bias[::3] = -torch.inf
    ids = {"row_ids": torch.ones(33, dtype=torch.int64), "col_ids": bias.isfinite().long(), "ids": "restrict"}
    by_bias, by_ids = (
        evaluate(op.fused, arguments, options | given | {"backend": backend}) for given in ({"col_bias": bias}, ids)
    )
    for key, value in by_bias.items():
        torch.testing.assert_close(value, by_ids[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS[1:])
def test_empty_sets_of_every_op(op, backend):
    """Sums and means of nothing are 0, log-sum-exps -inf, with zero gradients."""
    ids = {"row_ids": torch.zeros(5, dtype=torch.int64), "col_ids": torch.zeros(3, dtype=torch.int64)}
    for n, m, options in ((0, 3, {}), (5, 0, {}), (5, 3, ids)):
        arguments, given = op.problem("both", n, m, 4)
        results = evaluate(op.fused, arguments, given | options | {"backend": backend})
        lse = (-torch.inf, 0.0) if op in EXPECTATIONS else (0.0,)
        for key, value in results.items():
            assert not key.startswith("output") or value.shape in ((n,), (m,))
            assert all(v in (0.0, *lse) for v in value.flatten().tolist()), key
            assert key.startswith("output") or (value == 0).all(), key


def test_nan_in_an_excluded_pair_is_not_read(backend):
    """Left out means absent: a NaN logit that takes no part changes nothing."""
    (x, y), _ = problem("both", 20, 30, 4)
    with torch.no_grad():
        y[7] = torch.nan
    row_ids, col_ids = torch.zeros(20, dtype=torch.int64), torch.ones(30, dtype=torch.int64)
    col_ids[7] = 0
    row_lse, _ = fused(x, y, row_ids=row_ids, col_ids=col_ids, backend=backend)
    keep = torch.arange(30) != 7
    expected, _ = naive(x.double(), y.double()[keep])
    assert_accurate(row_lse, expected.detach())


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_left_alone(op, backend):
    arguments, options = op.problem("everything", 40, 50, 6)
    given = [*arguments, *(v for v in options.values() if isinstance(v, torch.Tensor))]
    copies = [tensor.detach().clone() for tensor in given]
    versions = [tensor._version for tensor in given]
    evaluate(op.fused, arguments, options | {"backend": backend})
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies, strict=True))
    assert versions == [tensor._version for tensor in given]


@pytest.mark.parametrize("op", OPS)
def test_backward_can_run_twice(op, backend):
    """retain_graph: the saved statistics are not consumed."""
    arguments, options = op.problem("vectors", 40, 50, 6)
    total = sum(out.square().sum() for out in op.fused(*arguments, backend=backend, **options) if out.requires_grad)
    first = torch.autograd.grad(total, arguments, retain_graph=True)
    second = torch.autograd.grad(total, arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_maxima_carry_no_gradient(backend):
    out = co.similarity_logsumexp(*problem("both", 4, 5, 3)[0], cols=True, backend=backend)
    assert out.row_lse.requires_grad
    assert out.col_lse.requires_grad
    assert not out.row_max.requires_grad
    assert not out.col_max.requires_grad


def test_reference_backend_is_the_dense_twin():
    """`backend="reference"` is reachable through the op, for every option set, and bit for bit the twin."""
    for name in ALL_OPTIONS:
        arguments, options = problem(name, 20, 31, 5)
        assert_same(evaluate(fused, arguments, options | {"backend": "reference"}), evaluate(naive, arguments, options))


def test_every_option_set_matters():
    """None of the problems is the plain one by accident of its numbers."""
    for name in ALL_OPTIONS:
        if name in ("rows", "cols", "both", "self"):
            continue
        arguments, options = problem(name, 20, 31, 5, torch.float64)
        plain = {k: v for k, v in options.items() if k in ("rows", "cols")}
        assert not torch.allclose(naive(*arguments, **options)[0], naive(*arguments, **plain)[0]), name


@pytest.mark.core
def test_isa_variant_is_the_one_asked_for():
    asked = os.environ.get("ATEN_CPU_CAPABILITY")
    if asked is None:
        pytest.skip("ATEN_CPU_CAPABILITY is not set: the process runs the best variant of this machine")
    assert torch.backends.cpu.get_cpu_capability() == asked.upper()
    if "CONTRASTIVE_OPS_BFLOAT16_UNIT" in os.environ:
        assert build.extension.bfloat16_unit() == os.environ["CONTRASTIVE_OPS_BFLOAT16_UNIT"]


@pytest.mark.parametrize(
    ("capability", "unit"), [("default", "none"), ("avx2", "none"), ("avx512", "none"), ("avx512", "vectors")]
)
def test_isa_variants(capability, unit):
    """The core tests of the C++ engine again, in a process with a lesser instruction set or unit for bfloat16."""
    import conftest

    sentence = conftest.refusal("cpu")
    if sentence is not None:
        pytest.skip(f"cpu: {sentence}")
    best = torch.backends.cpu.get_cpu_capability()
    if best == "DEFAULT" and capability != "default":
        pytest.skip(f"this machine has no {capability}: it runs {best}")
    if capability == "avx512" and build.extension.bfloat16_unit() in ("none", unit):
        pytest.skip(f"no other unit for bfloat16: all other tests run {best} already")
    if "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.skip("ATEN_CPU_CAPABILITY is set already: this process is one of the variants")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "core",
            "-k",
            "cpu or isa",
            "-p",
            "no:cacheprovider",
            __file__,
            str(Path(__file__).with_name("test_volume_logsumexp.py")),
        ],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability, "CONTRASTIVE_OPS_BFLOAT16_UNIT": unit},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout.splitlines()[-1], result.stdout[-2000:]
