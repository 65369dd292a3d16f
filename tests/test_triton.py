"""What the Triton backend alone has, in Triton's interpreter; test_engines.py has the tests of all engines."""

from __future__ import annotations

import pytest
import test_engines as engine_tests
import test_similarity_logsumexp as op_tests
import torch
from problems import LOGSUMEXP, problem
from tolerance import judge

import contrastive_ops as co
from contrastive_ops import backends, plane
from contrastive_ops.backends import sweep

SENTENCE = backends.why_not("triton", "similarity_logsumexp", torch.empty(1, 1))
runs = pytest.mark.skipif(SENTENCE is not None, reason=f"triton: {SENTENCE}")


# what only some devices have: tiles of columns half as wide as those of rows, also in self-similarity
@runs
@pytest.mark.parametrize("name", ["everything-restrict", "self-everything"])
def test_oblong_tiles(name, monkeypatch):
    table = backends.triton.kernels("tilings").TILINGS["any"]
    oblong = table[4]._replace(forward=table[4].forward._replace(block_m=64, block_n=32))
    monkeypatch.setitem(table, 4, oblong)
    monkeypatch.setattr(plane, "PROGRAMS", 9)
    op_tests.test_shapes(LOGSUMEXP, (300, 270, 20), name, "triton", torch.float32)


# several tiles of a block, and several blocks; 16-bit features beyond those that rows_kernel takes
@runs
@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 20), (torch.float16, 260)])
@pytest.mark.parametrize("name", ["ids-restrict", "everything-restrict", "self-ids-restrict-sorted"])
def test_products_of_equal_ids(name, dtype, d, monkeypatch):
    """Of every block one product for each side, by the engine and not the vendor."""
    blocks, products = (engine_tests.launched(monkeypatch, "triton", method) for method in ("block", "product"))
    monkeypatch.setattr(plane, "accumulate", None)
    monkeypatch.setattr(sweep, "WORKSPACE", 128 * dtype.itemsize // 2)
    arguments, options = problem(name, 150, 170, d, dtype)
    judge(op_tests.fused, op_tests.naive, arguments, options, fused_options={"backend": "triton"}, roundings=1)
    # a block on the diagonal of self-similarity has both sides of its pairs
    on_diagonal = sum(block.first_row == block.first_col for *_, block in blocks) if name.startswith("self") else 0
    assert len(products) == 2 * len(blocks) - on_diagonal


def test_a_fault_is_seen(monkeypatch):
    """The comparison catches what a kernel may get wrong: here, one group's partials that nobody merges."""
    if SENTENCE is not None:
        pytest.skip(f"triton: {SENTENCE}")
    engine = backends.triton.kernels("launch").TritonKernels
    merge = engine.merge
    monkeypatch.setattr(engine, "merge", lambda self, part, parts, *rest: merge(self, part, parts - 1, *rest))
    with pytest.raises(AssertionError):
        op_tests.test_options(LOGSUMEXP, "vectors", "triton", torch.float32)


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
