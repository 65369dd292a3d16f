"""The Triton backend: the tests of the op in Triton's interpreter, and its kernels compiled for GPUs without one.

The interpreter shows values, masks and strides, one program after the other, in float32 and float16. It shows no race
and no bfloat16; nothing here has run on a GPU.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import importlib.util

import pytest
import test_compile as compile_tests
import test_losses as loss_tests
import test_similarity_logsumexp as op_tests
import test_volume_logsumexp as volume_tests
import torch
from problems import ALL_OPTIONS, frozen, problem
from tolerance import evaluate, judge

import contrastive_ops as co
from bench import resources
from contrastive_ops import backends
from contrastive_ops.backends import sweep

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


# more than one group of rows and strip of columns, and more tiles than groups in neither, one and both directions
@runs
@pytest.mark.parametrize("name", ["everything-restrict", "self-everything", "self-ids-restrict-sorted"])
def test_many_tiles(name, monkeypatch):
    launch = backends.triton.kernels("launch")
    monkeypatch.setattr(launch, "PROGRAMS", 9)
    monkeypatch.setattr(launch, "MERGE", 64)
    monkeypatch.setattr(sweep, "WORKSPACE", 192)
    op_tests.test_shapes((500, 420, 20), name, "triton", torch.float32)


# what only some devices have: tiles of columns half as wide as those of rows, also in self-similarity
@runs
@pytest.mark.parametrize("name", ["everything-restrict", "self-everything"])
def test_oblong_tiles(name, monkeypatch):
    table = backends.triton.kernels("tilings").TILINGS["any"]
    oblong = table[4]._replace(forward=table[4].forward._replace(block_m=64, block_n=32))
    monkeypatch.setitem(table, 4, oblong)
    monkeypatch.setattr(backends.triton.kernels("launch"), "PROGRAMS", 9)
    op_tests.test_shapes((300, 270, 20), name, "triton", torch.float32)


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


def launched(monkeypatch, method):
    """The calls of a method of the engine."""
    engine, calls = backends.triton.kernels("launch").TritonKernels, []
    run = getattr(engine, method)
    monkeypatch.setattr(engine, method, lambda *arguments: (calls.append(arguments), run(*arguments))[1])
    return calls


# one tile and strip, several of each, more rows than columns, and rows with no column at all
@runs
@pytest.mark.parametrize("shape", [(1, 1, 1), (65, 129, 17), (130, 450, 20), (300, 40, 100)], ids=str)
@pytest.mark.parametrize("name", ["rows", "vectors-rows", "ids-restrict-far", "everything", "everything-restrict"])
def test_frozen_columns(name, shape, monkeypatch):
    """Forward has the gradients of 16-bit rows alone, and nothing is launched in backward."""
    calls = {method: launched(monkeypatch, method) for method in ("forward", "attention", "block", "rows")}
    arguments, options = frozen(name, *shape, torch.float16)
    judge(op_tests.fused, op_tests.naive, arguments, options, fused_options={"backend": "triton"})
    assert {method: len(of_method) for method, of_method in calls.items()} == {
        "forward": 0, "attention": 1, "block": 0, "rows": 0,
    }  # fmt: skip


@runs
@pytest.mark.parametrize(
    ("dtype", "d", "wanted", "options"),
    [
        (torch.float32, 17, "argument0", {}),
        (torch.float16, 257, "argument0", {}),
        (torch.float16, 17, "argument1", {}),
        (torch.float16, 17, "col_scale", {}),
        (torch.float16, 17, "argument0", {"cols": True}),
        (torch.float16, 17, None, {}),
    ],
)
def test_no_gradient_in_forward(dtype, d, wanted, options, monkeypatch):
    """Where the columns count, or the engine does not take it, or no gradient is asked for."""
    calls = launched(monkeypatch, "attention")
    arguments, given = frozen("vectors-rows", 20, 30, d, dtype)
    named = {"argument0": arguments[0], "argument1": arguments[1], **given}
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            value.requires_grad_(name == wanted)
    judge(op_tests.fused, op_tests.naive, arguments, given | options, fused_options={"backend": "triton"})
    assert not calls


@runs
@pytest.mark.parametrize("wanted", ["argument0", "row_scale", "row_bias"])
def test_one_gradient_of_frozen_columns(wanted, monkeypatch):
    """Whether it alone requires one, or it alone is asked for."""
    (x, y), options = frozen("everything", 65, 129, 17, torch.float16)
    leaf = {"argument0": x, **options}[wanted]
    both = [torch.autograd.grad(op_tests.fused(x, y, **options, backend="triton")[0].sum(), leaf)[0]]
    for value in (x, options["row_scale"], options["row_bias"]):
        value.requires_grad_(value is leaf)
    both.append(torch.autograd.grad(op_tests.fused(x, y, **options, backend="triton")[0].sum(), leaf)[0])
    assert torch.equal(*both)


@runs
def test_opcheck_of_frozen_columns():
    needs = [True, False] * 3
    *arguments, _, backend = compile_tests.forward_arguments("vectors-rows", 9, 7, 5, torch.float16, "triton")
    forward = (*arguments, needs, backend)
    for op, given in (
        (compile_tests.FORWARD, forward),
        (compile_tests.BACKWARD, compile_tests.backward_arguments(forward, needs)),
    ):
        torch.library.opcheck(op, given, test_utils=compile_tests.FAST_CHECKS)
    assert compile_tests.FORWARD(*forward)[4].numel() == 9 * (5 + 1)


@runs
def test_gradient_that_forward_was_not_told_of():
    """y requires one after all: what forward kept is of no use then, and backward computes the tiles again."""
    (x, y), _ = problem("rows", 20, 30, 17, torch.float16)
    options = (x.detach(), y.detach(), *[None] * 7, False, True, False)
    needs = [True, True] + [False] * 4
    grads = []
    for told in ([True] + [False] * 5, needs):
        row_max, col_max, row_log_sum, col_log_sum, kept, excluded = torch.ops.contrastive_ops.similarity_logsumexp(
            *options, told, "triton"
        )
        incoming = (torch.ones(20), torch.ones(0), excluded)
        statistics = (row_max, col_max, row_log_sum, col_log_sum, kept)
        backward = torch.ops.contrastive_ops.similarity_logsumexp_backward
        grads.append(backward(*incoming, *statistics, *options, needs, "triton"))
    for told, right in zip(*grads, strict=True):
        torch.testing.assert_close(told, right, rtol=1e-3, atol=1e-4)


# several tiles of a block, and several blocks; 16-bit features beyond those that rows_kernel takes
@runs
@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 20), (torch.float16, 260)])
@pytest.mark.parametrize("name", ["ids-restrict", "everything-restrict", "self-ids-restrict-sorted"])
def test_products_of_equal_ids(name, dtype, d, monkeypatch):
    """Of every block one product for each side, by the engine and not the vendor."""
    blocks, products = launched(monkeypatch, "block"), launched(monkeypatch, "product")
    monkeypatch.setattr(sweep, "_accumulate", None)
    monkeypatch.setattr(sweep, "WORKSPACE", 128)
    arguments, options = problem(name, 150, 170, d, dtype)
    judge(op_tests.fused, op_tests.naive, arguments, options, fused_options={"backend": "triton"}, roundings=1)
    on_diagonal = 2 if name.startswith("self") else 0  # whose blocks have both sides of their pairs
    assert len(products) == 2 * len(blocks) - on_diagonal


# coefficients of float16 are stored in units of a bound, which has the scales in it
@runs
@pytest.mark.parametrize(("make", "d"), [(problem, 16), (problem, 272), (frozen, 16)])
@pytest.mark.parametrize("row_scale", [1e-3, 50.0])
def test_small_and_large_scales_in_float16(row_scale, make, d):
    arguments, options = make("both", 20, 30, d, torch.float16)
    for scales in ({"row_scale": row_scale}, {"row_scale": row_scale, "col_scale": 1 / row_scale}):
        judge(
            op_tests.fused,
            op_tests.naive,
            arguments,
            scales | options,
            fused_options={"backend": "triton"},
            logits=100.0,
        )


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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", volume_tests.MEMBERS)
@pytest.mark.parametrize(
    "flags",
    [{"cols": True, "totals": True}, {"cols": False, "totals": False}, {"rows": False, "cols": True, "totals": True}],
    ids=["everything", "rows", "cols"],
)
def test_volumes(flags, members, dtype):
    volume_tests.test_options(flags, members, "triton", dtype)


@runs
@pytest.mark.parametrize("shape", volume_tests.SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_shapes_of_volumes(shape):
    volume_tests.test_shapes(shape, "triton", torch.float32)


@runs
@pytest.mark.parametrize("kind", [{}, {"row_scale": 0.7}, {"col_scale": torch.tensor([0.4])}], ids=str)
def test_scales_of_volumes(kind):
    volume_tests.test_kinds_of_scales(kind, "triton")


@runs
@pytest.mark.parametrize(
    "test",
    [
        volume_tests.test_every_subset_of_requires_grad_gives_the_same_gradients,
        volume_tests.test_more_vectors_than_dimensions,
        volume_tests.test_only_pair_excluded,
    ],
    ids=lambda test: test.__name__,
)
def test_properties_of_volumes(test):
    test("triton")


@runs
def test_degenerate_tuples():
    volume_tests.test_degenerate_tuples("triton", torch.float32)


@runs
@pytest.mark.parametrize("angle", [1e-1, 1e-3])
def test_tuples_of_close_vectors(angle):
    volume_tests.test_tuples_of_close_vectors(angle, "triton")


@runs
def test_layout_of_volumes_does_not_matter():
    volume_tests.test_layout_does_not_matter("strided", "triton")


@runs
@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sides_of_volumes(n, m):
    volume_tests.test_empty_sides(n, m, "triton", torch.float32)


VARIANTS = [variant for variant in loss_tests.VARIANTS if variant.values[0].op is not None]


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_losses(loss, variant, dtype):
    loss_tests.test_value_and_gradients(loss, variant, 33, 17, "triton", dtype)


@runs
@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_losses_of_raw_dot_products(loss, variant):
    loss_tests.test_raw_dot_products(loss, variant, "mean", "triton", torch.float32)


def test_a_fault_is_seen(monkeypatch):
    """The comparison catches what a kernel may get wrong: here, one group's partials that nobody merges."""
    if SENTENCE is not None:
        pytest.skip(f"triton: {SENTENCE}")
    engine = backends.triton.kernels("launch").TritonKernels
    merge = engine.merge
    monkeypatch.setattr(engine, "merge", lambda self, part, parts, *rest: merge(self, part, parts - 1, *rest))
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


@pytest.mark.parametrize("target", resources.TARGETS)
def test_kernels_compile_for(target):
    """No spills, shared memory within bounds, the matrix unit in every product of 16 bits; else what was committed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton: not installed; pip install triton")
    rows = resources.compile_for(target)
    limits = resources.TARGETS[target]
    for row in rows:
        assert row.spills == 0, row
        assert row.registers <= limits.registers, row
        assert row.shared <= limits.program_shared, row
        assert row.matrix > 0 or row.dtype == "float32" or row.kernel in ("excluded", "merge"), row
        assert resources.programs(target, row) > 0, row

    installed, (version, table) = importlib.metadata.version("triton"), resources.committed(target)
    if installed != version:
        pytest.skip(f"{target}: all gates hold; bench/RESOURCES.md is of Triton {version}, here is {installed}.")
    now = resources.section(target, rows)
    if table.strip() != now.strip():
        _, _, columns, _, *kernels = now.splitlines()
        changes = difflib.unified_diff(table.splitlines()[4:], kernels, resources.PAGE.name, "now", n=0, lineterm="")
        message = (f"{target} is not what bench/RESOURCES.md says.", "", columns, *changes)
        pytest.fail("\n".join([*message, "", f"If that is meant: {resources.COMMAND}"]), pytrace=False)


def test_programs_of_a_multiprocessor():
    """As CUDA's own calculator has it: limited by shared memory on sm_80, by registers on sm_90."""
    row = resources.Row("", "", "", "", warps=4, stages=2, registers=79, spills=0, shared=27776, matrix=1)
    assert [resources.programs(target, row) for target in ("cuda:80", "cuda:90")] == [5, 6]
    assert resources.programs("cuda:90", dataclasses.replace(row, registers=72)) == 7
