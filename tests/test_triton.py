"""The Triton backend: the tests of the op in Triton's interpreter, and its kernels compiled for GPUs without one.

The interpreter shows values, masks and strides, one program after the other, in float32 and float16. It shows no race
and no bfloat16; nothing here has run on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_similarity_logsumexp as op_tests
import torch
from problems import ALL_OPTIONS, problem
from tolerance import evaluate

import contrastive_ops as co
from contrastive_ops import backends

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # log(0) of an empty set, in numpy
SENTENCE = backends.why_not("triton", "similarity_logsumexp", torch.empty(1, 1))
runs = pytest.mark.skipif(SENTENCE is not None, reason=f"triton: {SENTENCE}")
DTYPES = [torch.float32, torch.float16]


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL_OPTIONS)
def test_options(name, dtype):
    op_tests.test_options(name, "triton", dtype)


@runs
@pytest.mark.parametrize("name", ["both", "everything", "self-everything"])
@pytest.mark.parametrize("shape", op_tests.SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_shapes(shape, name):
    op_tests.test_shapes(shape, name, "triton", torch.float32)


# more than one group of rows and strip of columns, and more tiles than GROUPS in neither, one and both directions
@runs
@pytest.mark.parametrize("name", ["everything-restrict", "self-everything", "self-ids-restrict-sorted"])
def test_many_tiles(name, monkeypatch):
    kernels = backends.triton.kernels("sweep")
    monkeypatch.setattr(kernels, "PROGRAMS", 9)
    monkeypatch.setattr(kernels, "WORKSPACE", 192)
    monkeypatch.setattr(kernels, "MERGE", 64)
    op_tests.test_shapes((500, 420, 20), name, "triton", torch.float32)


@runs
@pytest.mark.parametrize("name", ["both", "self-row_scale-0d"])
@pytest.mark.parametrize("size", ["scale 1e4", "magnitude 100", "negative scale"])
def test_huge_logits(size, name):
    op_tests.test_huge_logits(size, name, "triton", torch.float32)


@runs
@pytest.mark.parametrize(
    "test",
    [
        op_tests.test_all_pairs_excluded,
        op_tests.test_backward_can_run_twice,
        op_tests.test_columns_are_the_rows_of_the_transposed_problem,
        op_tests.test_duplicates,
        op_tests.test_excluded_rows_have_minus_infinity_and_no_gradient,
        op_tests.test_far_ids_are_told_apart,
        op_tests.test_index_beyond_the_columns_excludes_nothing,
        op_tests.test_inputs_are_left_alone,
        op_tests.test_maxima_carry_no_gradient,
        op_tests.test_nan_in_an_excluded_pair_is_not_read,
        op_tests.test_zero_strides,
    ],
    ids=lambda test: test.__name__,
)
def test_properties(test):
    test("triton")


@runs
@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sides(n, m):
    op_tests.test_empty_sides(n, m, "triton", torch.float32)


@runs
def test_nan_reaches_the_rows_it_affects_and_no_others():
    op_tests.test_nan_reaches_the_rows_it_affects_and_no_others("triton", torch.float32)


@runs
@pytest.mark.parametrize("name", ["everything", "self-everything"])
def test_layout_and_repetition_do_not_matter(name):
    op_tests.test_layout_does_not_matter(name, op_tests.strided, "triton", torch.float32)
    arguments, options = problem(name, 65, 70, 17)
    first = evaluate(op_tests.fused, arguments, options | {"backend": "triton"})
    op_tests.assert_same(evaluate(op_tests.fused, arguments, options | {"backend": "triton"}), first)


@runs
def test_losses_run_on_it():
    x, y = torch.randn(2, 70, 12).requires_grad_()
    for loss in (co.info_nce, co.nt_xent, co.dcl):
        grads = [torch.autograd.grad(loss(x, y, backend=backend), (x, y)) for backend in ("triton", "tiled")]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_a_fault_is_seen(monkeypatch):
    """The comparison catches what a kernel may get wrong: here, one group's partials that nobody merges."""
    if SENTENCE is not None:
        pytest.skip(f"triton: {SENTENCE}")
    kernels = backends.triton.kernels("sweep")
    merge = kernels._merge
    monkeypatch.setattr(kernels, "_merge", lambda problem, a, b, parts, *rest: merge(problem, a, b, parts - 1, *rest))
    with pytest.raises(AssertionError):
        op_tests.test_options("vectors", "triton", torch.float32)


def test_refusals(monkeypatch):
    if SENTENCE is not None:
        pytest.skip(f"triton: {SENTENCE}")
    refuse = pytest.raises(RuntimeError, match=r"^backend=\"triton\" can't run similarity_logsumexp: ")
    with refuse:
        co.similarity_logsumexp(torch.ones(2, 2).bfloat16(), backend="triton")
    with refuse:
        co.similarity_logsumexp(torch.ones(2, 2).double(), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with refuse:
        co.similarity_logsumexp(torch.ones(2, 2), backend="triton")
    with pytest.raises(RuntimeError, match=r"triton has no volume_logsumexp"):
        co.volume_logsumexp(torch.ones(2, 2), torch.ones(2, 1, 2), backend="triton")


# bytes of shared memory that a program may have; the compiler does not check
SHARED = {"cuda:80": 166912, "cuda:90": 232448, "cuda:100": 232448, "hip:gfx942": 65536}


@pytest.mark.parametrize("target", SHARED)
def test_kernels_compile_for(target):
    """No spills, shared memory within bounds, and the matrix units in every product of 16-bit inputs."""
    pytest.importorskip("triton", reason="triton: not installed; pip install triton")
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, root / "tests" / "ahead_of_time.py", target],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == 25
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["shared"] <= SHARED[target], kernel
        half = kernel["dtype"] != "float32"
        assert (kernel["matrix"] > 0) or not half, kernel
