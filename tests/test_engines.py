"""The GPU engines on the CPU: the tests of the ops and of the losses, on the kernels of Triton and on those of CUDA.

Triton's kernels run in its interpreter, which shows values, masks and strides, one program after the other, in float32
and float16; it shows no race and no bfloat16. Those of CUDA run as backend "cuda-host" with the binding and the host
code that they have on a GPU, see tests/cuda_host. Nothing here has run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import test_compile as compile_tests
import test_losses as loss_tests
import test_similarity_logsumexp as op_tests
import test_similarity_topk as topk_tests
import test_volume_logsumexp as volume_tests
import torch
from cuda_host import build as host
from problems import ALL_OPTIONS, EXPECTATIONS, LOGSUMEXP, OPS, SUMS, frozen, problem
from tolerance import evaluate, judge

import contrastive_ops as co
from contrastive_ops import backends, plane
from contrastive_ops.backends import cuda, sweep

DTYPES = {"triton": (torch.float32, torch.float16), "cuda-host": cuda.DTYPES}
PAIRS = [(engine, dtype) for engine, dtypes in DTYPES.items() for dtype in dtypes]
FEWER = PAIRS[:1] + PAIRS[2:]  # the interpreter takes seconds for a tile


@pytest.fixture(scope="module")
def host_backend() -> Iterator[None]:
    """The backend "cuda-host" for as long as the tests of this file run, or why there is none."""
    sentence = host.why_not()
    if sentence is None:
        torch.ops.load_library(host.backend())
    kernels = cuda.CudaKernels("contrastive_ops_cuda_host")
    functions = sweep.functions(lambda: kernels, cuda.OPS)
    module = SimpleNamespace(OPS=cuda.OPS, factor=kernels.factor, why_not=lambda _op, _x: sentence, **functions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._MODULES, "cuda-host", module)
        patch.setattr(backends, "NAMES", (*backends.NAMES, "cuda-host"))
        yield


@pytest.fixture(params=list(DTYPES))
def engine(request: pytest.FixtureRequest, host_backend: None) -> str:
    sentence = backends.why_not(request.param, "similarity_logsumexp", torch.empty(1, 1))
    if sentence is not None:
        pytest.skip(f"{request.param}: {sentence}")
    request.node.user_properties.append(("backend", request.param))
    return request.param


def skip_without(engine: str, op: str) -> None:
    sentence = backends.why_not(engine, op, torch.empty(1, 1))
    if sentence is not None:
        pytest.skip(f"{engine}: {sentence}")


# what a reduction has of its own, with all masks; log-sum-exps have all option sets
SOME_OPTIONS = ("rows", "cols", "everything", "everything-restrict", "self-everything",
                "guide-above", "guide-own_logits", "guide-everything", "self-guide-everything")  # fmt: skip


@pytest.mark.parametrize(("engine", "dtype"), PAIRS, indirect=["engine"])
@pytest.mark.parametrize("name", ALL_OPTIONS)
def test_options(name, engine, dtype):
    op_tests.test_options(LOGSUMEXP, name, engine, dtype)


@pytest.mark.parametrize(
    ("engine", "dtype", "op", "name"),
    [(*pair, op, name) for pair in FEWER for op in OPS[1:] for name in SOME_OPTIONS if name in op.options]
    + [(*PAIRS[1], op, name) for op in OPS[1:] for name in ("everything-restrict", "self-everything")],
    indirect=["engine"],
)
def test_options_of_every_op(op, name, engine, dtype):
    skip_without(engine, op.name)
    op_tests.test_options(op, name, engine, dtype)


@pytest.mark.parametrize(("engine", "dtype"), FEWER, indirect=["engine"])
@pytest.mark.parametrize("op", [op for op in SUMS if op not in OPS])
def test_functions(op, engine, dtype):
    skip_without(engine, op.name)
    op_tests.test_functions(op, "everything", engine, dtype)


@pytest.mark.parametrize(("engine", "dtype"), FEWER, indirect=["engine"])
@pytest.mark.parametrize("name", ["both", "everything", "self-everything"])
@pytest.mark.parametrize("shape", op_tests.SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_shapes(shape, name, engine, dtype):
    op_tests.test_shapes(LOGSUMEXP, shape, name, engine, dtype)


@pytest.mark.parametrize(("engine", "dtype"), FEWER, indirect=["engine"])
@pytest.mark.parametrize("name", ["everything", "self-everything"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (65, 64, 1), (129, 127, 257)], ids=str)
@pytest.mark.parametrize("op", [SUMS[1], *EXPECTATIONS])
def test_shapes_of_every_op(op, shape, name, engine, dtype):
    skip_without(engine, op.name)
    op_tests.test_shapes(op, shape, name, engine, dtype)


# more than one group of rows and strip of columns, more tiles than groups, and more than one block, in both forms of
# backward
@pytest.mark.parametrize(
    ("engine", "dtype", "d"),
    [(*FEWER[0], 20), *((*pair, d) for pair in FEWER[1:] for d in (20, 260))],
    indirect=["engine"],
)
@pytest.mark.parametrize("name", ["everything-restrict", "self-everything", "self-ids-restrict-sorted"])
def test_many_tiles(name, d, engine, dtype, monkeypatch):
    monkeypatch.setattr(plane, "PROGRAMS", 9)
    monkeypatch.setattr(sweep, "WORKSPACE", 192 * dtype.itemsize // 2)  # blocks of 192 rows, of every dtype
    if engine == "triton":
        monkeypatch.setattr(backends.triton.kernels("launch"), "MERGE", 64)
    op_tests.test_shapes(LOGSUMEXP, (500, 420, d), name, engine, dtype)


@pytest.mark.parametrize(("engine", "dtype"), FEWER, indirect=["engine"])
@pytest.mark.parametrize("name", ["everything-restrict", "self-everything"])
@pytest.mark.parametrize("op", [SUMS[1], *EXPECTATIONS])
def test_many_tiles_of_every_op(op, name, engine, dtype, monkeypatch):
    skip_without(engine, op.name)
    monkeypatch.setattr(plane, "PROGRAMS", 4)
    monkeypatch.setattr(sweep, "WORKSPACE", 128 * dtype.itemsize // 2)
    op_tests.test_shapes(op, (230, 180, 20), name, engine, dtype)


# sigmoid(s) of s = -1e4 is 1 / (1 + infinity), 0 as it should be; numpy says so
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize("name", ["both", "self-row_scale-0d"])
@pytest.mark.parametrize("size", ["scale 1e4", "magnitude 100", "negative scale"])
@pytest.mark.parametrize("op", [LOGSUMEXP, SUMS[1], EXPECTATIONS[0]])
def test_huge_logits(op, size, name, engine):
    skip_without(engine, op.name)
    op_tests.test_huge_logits(op, size, name, engine, torch.float32)


PROPERTIES = [
    op_tests.test_all_pairs_excluded,
    op_tests.test_columns_are_the_rows_of_the_transposed_problem,
    op_tests.test_duplicates,
    op_tests.test_excluded_rows_have_minus_infinity_and_no_gradient,
    op_tests.test_far_ids_are_told_apart,
    op_tests.test_index_beyond_the_columns_excludes_nothing,
    op_tests.test_maxima_carry_no_gradient,
    op_tests.test_nan_in_an_excluded_pair_is_not_read,
    op_tests.test_zero_strides,
]


@pytest.mark.parametrize("test", PROPERTIES, ids=lambda test: test.__name__)
def test_properties(test, engine):
    test(engine)


PROPERTIES_OF_EVERY_OP = [
    op_tests.test_backward_can_run_twice,
    op_tests.test_empty_sets_of_every_op,
    op_tests.test_inputs_are_left_alone,
    op_tests.test_nan_in_an_excluded_pair_is_not_read_by_any_op,
    op_tests.test_nan_reaches_the_rows_of_every_op,
]


@pytest.mark.parametrize("op", [SUMS[1], *EXPECTATIONS])
@pytest.mark.parametrize("test", PROPERTIES_OF_EVERY_OP, ids=lambda test: test.__name__)
def test_properties_of_every_op(test, op, engine):
    skip_without(engine, op.name)
    test(op, engine)


def launched(monkeypatch, engine, method):
    """The calls of a method of the engine."""
    kernels = cuda.CudaKernels if engine == "cuda-host" else backends.triton.kernels("launch").TritonKernels
    calls, run = [], getattr(kernels, method)
    monkeypatch.setattr(kernels, method, lambda *arguments: (calls.append(arguments), run(*arguments))[1])
    return calls


# one tile and strip, several of each, more rows than columns, and rows with no column at all
@pytest.mark.parametrize("shape", [(1, 1, 1), (65, 129, 17), (130, 450, 20), (300, 40, 100)], ids=str)
@pytest.mark.parametrize("name", ["rows", "vectors-rows", "ids-restrict-far", "everything", "everything-restrict"])
def test_frozen_columns(name, shape, engine, monkeypatch):
    """Forward has the gradients of 16-bit rows alone, and nothing is launched in backward."""
    check_frozen_columns(LOGSUMEXP, name, shape, engine, monkeypatch)


@pytest.mark.parametrize("shape", [(1, 1, 1), (65, 129, 17), (130, 450, 20)], ids=str)
@pytest.mark.parametrize("name", ["vectors-rows", "everything"])
@pytest.mark.parametrize("op", [op for op in SUMS if op.of in ("softplus", "square")])
def test_frozen_columns_of_sums(op, name, shape, engine, monkeypatch):
    skip_without(engine, op.name)
    check_frozen_columns(op, name, shape, engine, monkeypatch)


def check_frozen_columns(op, name, shape, engine, monkeypatch):
    of = {} if op.of is None else {"of": op.of}
    calls = {method: launched(monkeypatch, engine, method) for method in ("forward", "attention", "block", "rows")}
    arguments, options = frozen(name, *shape, torch.float16)
    judge(op.fused, op.naive, arguments, options | of, fused_options={"backend": engine})
    assert {method: len(of_method) for method, of_method in calls.items()} == {
        "forward": 0, "attention": 1, "block": 0, "rows": 0,
    }  # fmt: skip


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
def test_no_gradient_in_forward(dtype, d, wanted, options, engine, monkeypatch):
    """Where the columns count, or the engine does not take it, or no gradient is asked for."""
    calls = launched(monkeypatch, engine, "attention")
    arguments, given = frozen("vectors-rows", 20, 30, d, dtype)
    named = {"argument0": arguments[0], "argument1": arguments[1], **given}
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            value.requires_grad_(name == wanted)
    judge(op_tests.fused, op_tests.naive, arguments, given | options, fused_options={"backend": engine})
    assert not calls


@pytest.mark.parametrize("wanted", ["argument0", "row_scale", "row_bias"])
def test_one_gradient_of_frozen_columns(wanted, engine, monkeypatch):
    """Whether it alone requires one, or it alone is asked for."""
    (x, y), options = frozen("everything", 65, 129, 17, torch.float16)
    leaf = {"argument0": x, **options}[wanted]
    both = [torch.autograd.grad(op_tests.fused(x, y, **options, backend=engine)[0].sum(), leaf)[0]]
    for value in (x, options["row_scale"], options["row_bias"]):
        value.requires_grad_(value is leaf)
    both.append(torch.autograd.grad(op_tests.fused(x, y, **options, backend=engine)[0].sum(), leaf)[0])
    assert torch.equal(*both)


def test_empty_row_of_frozen_columns(engine):
    """Its log-sum-exp is -inf, and so may be what comes back: its gradients are 0 all the same."""
    (x, y), options = frozen("vectors-rows", 5, 7, 3, torch.float16)
    ids = torch.zeros(5, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)
    ids[0][2] = 1
    lse = op_tests.fused(x, y, **options, row_ids=ids[0], col_ids=ids[1], ids="restrict", backend=engine)[0]
    leaves = (x, options["row_scale"], options["row_bias"])
    for grad in torch.autograd.grad(lse.square().sum(), leaves):
        assert torch.equal(grad[2], torch.zeros_like(grad[2]))
        assert grad.isfinite().all()


def test_opcheck_of_frozen_columns(engine):
    needs = [True, False] * 3
    *arguments, _, backend = compile_tests.forward_arguments("vectors-rows", 9, 7, 5, torch.float16, engine)
    forward = (*arguments, needs, backend)
    for op, given in (
        (compile_tests.FORWARD, forward),
        (compile_tests.BACKWARD, compile_tests.backward_arguments(forward, needs)),
    ):
        torch.library.opcheck(op, given, test_utils=compile_tests.FAST_CHECKS)
    assert compile_tests.FORWARD(*forward)[4].numel() == 9 * (5 + 1)


def test_gradient_that_forward_was_not_told_of(engine):
    """y requires one after all: what forward kept is of no use then, and backward computes the tiles again."""
    (x, y), _ = problem("rows", 20, 30, 17, torch.float16)
    options = (x.detach(), y.detach(), *[None] * 11, False, False, True, False)
    needs = [True, True] + [False] * 4
    grads = []
    for told in ([True] + [False] * 5, needs):
        row_max, col_max, row_log_sum, col_log_sum, kept, excluded, *_ = torch.ops.contrastive_ops.similarity_logsumexp(
            *options, told, engine
        )
        incoming = (torch.ones(20), torch.ones(0), excluded)
        statistics = (row_max, col_max, row_log_sum, col_log_sum, kept)
        backward = torch.ops.contrastive_ops.similarity_logsumexp_backward
        grads.append(backward(*incoming, *statistics, *options, needs, engine))
    for told, right in zip(*grads, strict=True):
        torch.testing.assert_close(told, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("engine", ["cuda-host"], indirect=True)
def test_tf32(engine, monkeypatch):
    """Where it is allowed, logits are those of operands rounded to 10 bits, ties away from zero."""
    (x, y), _ = problem("rows", 70, 130, 33)
    monkeypatch.setattr(plane.Problem, "tf32", True)
    lse = op_tests.fused(x, y, backend=engine)[0]
    bits = [value.detach().view(torch.int32) for value in (x, y)]
    rounded = [((value + 0x1000) & ~0x1FFF).view(torch.float32).double() for value in bits]
    torch.testing.assert_close(lse.double(), torch.logsumexp(rounded[0] @ rounded[1].T, 1), rtol=1e-6, atol=1e-6)
    exact = torch.logsumexp(x.double() @ y.double().T, 1)
    assert (lse.double() - exact).abs().max() > 1e-5


# coefficients of float16 are stored in units of a bound, which has the scales in it
@pytest.mark.parametrize(("make", "d"), [(problem, 16), (problem, 272), (frozen, 16)])
@pytest.mark.parametrize("row_scale", [1e-3, 50.0])
def test_small_and_large_scales_in_float16(row_scale, make, d, engine):
    arguments, options = make("both", 20, 30, d, torch.float16)
    for scales in ({"row_scale": row_scale}, {"row_scale": row_scale, "col_scale": 1 / row_scale}):
        judge(
            op_tests.fused,
            op_tests.naive,
            arguments,
            scales | options,
            fused_options={"backend": engine},
            logits=100.0,
        )


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sides(n, m, engine):
    op_tests.test_empty_sides(n, m, engine, torch.float32)


def test_nan_reaches_the_rows_it_affects_and_no_others(engine):
    op_tests.test_nan_reaches_the_rows_it_affects_and_no_others(engine, torch.float32)


@pytest.mark.parametrize("name", ["everything", "self-everything"])
@pytest.mark.parametrize("op", [LOGSUMEXP, SUMS[1], EXPECTATIONS[0]])
def test_layout_and_repetition_do_not_matter(op, name, engine):
    skip_without(engine, op.name)
    op_tests.test_layout_does_not_matter(op, name, op_tests.strided, engine, torch.float32)
    arguments, options = op.problem(name, 65, 70, 17)
    first = evaluate(op.fused, arguments, options | {"backend": engine})
    op_tests.assert_same(evaluate(op.fused, arguments, options | {"backend": engine}), first)


@pytest.mark.parametrize(("engine", "dtype"), PAIRS, indirect=["engine"])
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize("name", ["everything", "everything-restrict", "self-everything"])
def test_best(name, largest, engine, dtype):
    skip_without(engine, topk_tests.OP)
    topk_tests.test_options(name, largest, engine, dtype)


# padded, several strips, more rows than a tile, and more than one sweep finds
@pytest.mark.parametrize(("shape", "k"), [((1, 1), 10), ((3, 700), 10), ((130, 129), 2), ((5, 300), 300)], ids=str)
def test_ties_of_the_best(shape, k, engine):
    skip_without(engine, topk_tests.OP)
    topk_tests.test_ties_go_to_the_lower_column(shape, k, engine)


def test_best_of_nothing_and_of_nan(engine):
    skip_without(engine, topk_tests.OP)
    for n, m in ((0, 5), (5, 0)):
        topk_tests.test_empty_sides(n, m, engine)
    topk_tests.test_nan_comes_first_as_in_torch(engine)


@pytest.mark.parametrize("seed", [0, 7, -12345678901, 2**63 - 1])
def test_noise_of_the_best(seed, engine):
    """The draws of `tiled`, from one tile or from several strips."""
    skip_without(engine, topk_tests.OP)
    x, y = torch.randn(70, 8), torch.randn(300, 8)
    drawn, right = (co.similarity_topk(x, y, 3, noise=seed, backend=name) for name in (engine, "tiled"))
    assert torch.equal(drawn.indices, right.indices)
    torch.testing.assert_close(drawn.values, right.values)


@pytest.mark.parametrize(("engine", "dtype"), PAIRS, indirect=["engine"])
@pytest.mark.parametrize("members", volume_tests.MEMBERS)
@pytest.mark.parametrize(
    "flags",
    [{"cols": True, "totals": True}, {"cols": False, "totals": False}, {"rows": False, "cols": True, "totals": True}],
    ids=["everything", "rows", "cols"],
)
def test_volumes(flags, members, engine, dtype):
    volume_tests.test_options(flags, members, engine, dtype)


@pytest.mark.parametrize("engine", ["cuda-host"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES["cuda-host"])
@pytest.mark.parametrize("members", [1, 2, 3, 4, 5])
def test_volume_of_one_set(members, dtype, engine):
    """The kernel that factors has the Gram matrix in float64, as PyTorch's way has."""
    vectors = torch.randn(6, members, 33, dtype=dtype)
    vectors[1, -1] = vectors[1, 0]  # inside the span of those before
    vectors[2] = 0
    found, right = vectors.clone().requires_grad_(), vectors.clone().requires_grad_()
    volumes = [co.gramian_volume(leaf, backend=name) for leaf, name in ((found, engine), (right, "tiled"))]
    torch.testing.assert_close(*volumes, rtol=1e-6, atol=0.0)
    for volume in volumes:
        volume.sum().backward()
    torch.testing.assert_close(found.grad, right.grad)


@pytest.mark.parametrize("shape", volume_tests.SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_shapes_of_volumes(shape, engine):
    volume_tests.test_shapes(shape, engine, torch.float32)


@pytest.mark.parametrize("kind", [{}, {"row_scale": 0.7}, {"col_scale": torch.tensor([0.4])}], ids=str)
def test_scales_of_volumes(kind, engine):
    volume_tests.test_kinds_of_scales(kind, engine)


@pytest.mark.parametrize(
    "test",
    [
        volume_tests.test_every_subset_of_requires_grad_gives_the_same_gradients,
        volume_tests.test_more_vectors_than_dimensions,
        volume_tests.test_only_pair_excluded,
    ],
    ids=lambda test: test.__name__,
)
def test_properties_of_volumes(test, engine):
    test(engine)


def test_degenerate_tuples(engine):
    volume_tests.test_degenerate_tuples(engine, torch.float32)


@pytest.mark.parametrize("angle", [1e-1, 1e-3])
def test_tuples_of_close_vectors(angle, engine):
    volume_tests.test_tuples_of_close_vectors(angle, engine)


def test_layout_of_volumes_does_not_matter(engine):
    volume_tests.test_layout_does_not_matter("strided", engine)


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sides_of_volumes(n, m, engine):
    volume_tests.test_empty_sides(n, m, engine, torch.float32)


VARIANTS = [variant for variant in loss_tests.VARIANTS if variant.values[0].op in cuda.OPS]


@pytest.mark.parametrize(("engine", "dtype"), PAIRS, indirect=["engine"])
@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_losses(loss, variant, engine, dtype):
    loss_tests.test_value_and_gradients(loss, variant, 33, 17, engine, dtype)


@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_losses_of_raw_dot_products(loss, variant, engine):
    loss_tests.test_raw_dot_products(loss, variant, "mean", engine, torch.float32)
