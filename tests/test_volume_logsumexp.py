"""The volume op on every backend against the determinant form in float64, and where that form fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerance import assert_accurate, evaluate, judge
from torch import Tensor

import contrastive_ops as co
from contrastive_ops.dtypes import statistics_dtype
from contrastive_ops.reference import logsumexp, volume_logits

DTYPES = (*(pytest.param(dtype, marks=pytest.mark.core) for dtype in (torch.float32, torch.bfloat16)),
          torch.float16, torch.float64)  # fmt: skip
MEMBERS = (1, 2, 3, 4)
# N, M, P, D: tails of registers, micro tiles and cache blocks as in test_similarity_logsumexp.py; D beyond the tuples,
# as with P + 1 > D every volume is 0
SHAPES = (
    (1, 1, 1, 2), (1, 257, 2, 64), (257, 1, 3, 17), (2, 63, 1, 16), (7, 2, 2, 4), (63, 65, 4, 100), (65, 64, 1, 9),
    (127, 129, 2, 64), (129, 127, 3, 257), (300, 64, 1, 3),
)  # fmt: skip


def problem(n: int, m: int, members: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Vectors of lengths about 2, scales about 0.3 / 2^P, so that logits are about 2."""
    generator = torch.Generator().manual_seed(seed)

    def vectors(*shape: int) -> Tensor:
        x = torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)
        return (2 * x).to(dtype).requires_grad_()

    def scale(size: int, value: float) -> Tensor:
        spread = value * (1 + 0.3 * torch.rand(size, generator=generator, dtype=torch.float64))
        return spread.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()

    exclude = torch.arange(n)
    exclude[1::3] = -1
    arguments = (vectors(n, d), vectors(m, members, d))
    options = {"row_scale": scale(n, 2.0), "col_scale": scale(m, 0.5**members), "exclude": exclude}
    return arguments, options | {"cols": True, "totals": True}


def requested(outputs: Any, rows: bool = True, cols: bool = False, totals: bool = False) -> tuple[Tensor, ...]:
    row_lse, col_lse, row_max, col_max, row_total, col_total = outputs
    return (
        *((row_lse, row_max) if rows else ()),
        *((col_lse, col_max) if cols else ()),
        *((row_total,) if rows and totals else ()),
        *((col_total,) if cols and totals else ()),
    )


def fused(anchor: Tensor, tuples: Tensor, *, backend: str, **options: Any) -> tuple[Tensor, ...]:
    outputs = co.volume_logsumexp(anchor, tuples, backend=backend, **options)
    rows, cols, totals = options.get("rows", True), options.get("cols", False), options.get("totals", False)
    for asked, vector in (
        (rows, outputs.row_lse), (rows, outputs.row_max), (rows and totals, outputs.row_total),
        (cols, outputs.col_lse), (cols, outputs.col_max), (cols and totals, outputs.col_total),
    ):  # fmt: skip
        assert asked or vector.shape == (0,)
    return requested(outputs, rows, cols, totals)


def naive(
    anchor: Tensor, tuples: Tensor, *, rows: bool = True, cols: bool = False, totals: bool = False, **options: Any
) -> tuple[Tensor, ...]:
    for name, size in (("row_scale", len(anchor)), ("col_scale", len(tuples))):
        value = options.get(name)
        if value is not None:
            options[name] = torch.as_tensor(value, dtype=statistics_dtype(anchor)).reshape(-1).expand(size)
    return reduced(volume_logits(anchor, tuples, **options), rows, cols, totals)


def reduced(logits: Tensor, rows: bool = True, cols: bool = False, totals: bool = False) -> tuple[Tensor, ...]:
    largest = [
        logits.detach().amax(dim) if logits.shape[dim] else logits.new_full((logits.shape[1 - dim],), -torch.inf)
        for dim in (1, 0)
    ]
    taking_part = logits.where(logits > -torch.inf, 0.0)
    outputs = (logsumexp(logits, 1), logsumexp(logits, 0), *largest, taking_part.sum(1), taking_part.sum(0))
    return requested(outputs, rows, cols, totals)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize(
    "flags",
    [
        {"cols": True, "totals": True},
        {"cols": False, "totals": True},
        {"rows": False, "cols": True, "totals": True},
        {"cols": True, "totals": False},
    ],
    ids=["everything", "rows", "cols", "no totals"],
)
def test_options(flags, members, backend, dtype):
    arguments, options = problem(65, 129, members, 17, dtype)
    judge(fused, naive, arguments, options | flags, fused_options={"backend": backend})


@pytest.mark.parametrize(
    "scales",
    [{}, {"row_scale": 0.7}, {"row_scale": torch.tensor(0.7).requires_grad_()}, {"col_scale": torch.tensor([0.4])}],
    ids=["none", "float", "0-d", "one element"],
)
def test_kinds_of_scales(scales, backend):
    arguments, options = problem(40, 33, 2, 9)
    plain = {name: value for name, value in options.items() if not name.endswith("scale")}
    judge(fused, naive, arguments, plain | scales, fused_options={"backend": backend})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_shapes(shape, backend, dtype):
    arguments, options = problem(*shape, dtype)
    judge(fused, naive, arguments, options, fused_options={"backend": backend})


# 1024 is the edge of the outer tiles
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", [(1100, 1030, 2, 8), (1030, 2100, 1, 5)], ids=lambda s: "-".join(map(str, s)))
def test_beyond_one_outer_tile(shape, backend):
    arguments, options = problem(*shape)
    judge(fused, naive, arguments, options, fused_options={"backend": backend}, roundings=1)


def test_every_subset_of_requires_grad_gives_the_same_gradients(backend):
    arguments, options = problem(70, 67, 2, 9)
    named = {f"argument{i}": value for i, value in enumerate(arguments)} | options
    leaves = [key for key, value in named.items() if isinstance(value, Tensor) and value.requires_grad]
    everything = evaluate(fused, arguments, options | {"backend": backend})
    assert len(leaves) == 4
    for wanted in range(1, 15):
        subset = [key for i, key in enumerate(leaves) if wanted >> i & 1]
        for key in leaves:
            named[key].requires_grad_(key in subset)
        results = evaluate(fused, arguments, options | {"backend": backend})
        for key, value in results.items():
            assert torch.equal(value, everything[key]), key
        assert {f"grad of {key}" for key in subset} <= results.keys()


@pytest.mark.parametrize("members", MEMBERS)
def test_gradcheck(members, backend):
    arguments, options = problem(6, 7, members, 6, torch.float64)
    scales = (options.pop("row_scale"), options.pop("col_scale"))

    def call(anchor, tuples, row_scale, col_scale):
        out = co.volume_logsumexp(anchor, tuples, row_scale=row_scale, col_scale=col_scale, **options, backend=backend)
        return out.row_lse, out.col_lse, out.row_total, out.col_total

    torch.autograd.gradcheck(call, (*arguments, *scales))


def test_one_vector_is_the_sine(backend):
    """P = 1 and unit vectors: V = sqrt(1 - cos^2), and the sign of a vector does not matter."""
    (anchor, tuples), _ = problem(20, 30, 1, 8, torch.float64)
    a, m = torch.nn.functional.normalize(anchor, dim=-1), torch.nn.functional.normalize(tuples, dim=-1)
    sine = (1 - (a @ m[:, 0].T).square()).sqrt()
    expected = (-sine).logsumexp(1)
    for sign in (1, -1):
        assert_accurate(co.volume_logsumexp(a, sign * m, backend=backend).row_lse, expected.detach())


def test_columns_of_a_common_plane_do_not_see_each_other(backend):
    """The order of the vectors in a tuple does not matter, and a length is a factor."""
    (anchor, tuples), _ = problem(20, 30, 3, 8, torch.float64)
    expected = co.volume_logsumexp(anchor, tuples, backend=backend).row_lse
    torch.testing.assert_close(co.volume_logsumexp(anchor, tuples.flip(1), backend=backend).row_lse, expected)
    longer = tuples * torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)[:, None]
    torch.testing.assert_close(co.volume_logsumexp(anchor, longer, backend=backend).row_lse, expected)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_degenerate_tuples(backend, dtype):
    """Dependent vectors, zero vectors, anchors in the span: finite, at the minimum, and with gradient 0 there."""
    generator = torch.Generator().manual_seed(3)
    anchor = torch.randn(5, 8, generator=generator).to(dtype)
    tuples = torch.randn(6, 2, 8, generator=generator).to(dtype)
    tuples[0, 1] = tuples[0, 0]  # a duplicate
    tuples[1, 1] = -2 * tuples[1, 0]  # collinear
    tuples[2, 0] = 0  # a zero vector
    tuples[3] = torch.eye(8)[:2]
    anchor[4] = torch.eye(8)[0] + torch.eye(8)[1]  # in the span of tuple 3, exactly
    anchor[3] = 0
    x, t = anchor.requires_grad_(), tuples.requires_grad_()
    out = co.volume_logsumexp(x, t, cols=True, totals=True, backend=backend)
    assert all(value.isfinite().all() for value in out)
    assert torch.equal(out.col_lse[:3], torch.tensor(5.0, dtype=out.col_lse.dtype).log().expand(3))  # all logits are 0
    assert out.row_max[4] == 0
    assert (out.row_max[:3] == 0).all()
    grads = torch.autograd.grad(sum(value.sin().sum() for value in (out.row_lse, out.col_lse, out.col_total)), (x, t))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[1][:3] == 0).all()
    assert (grads[0][:3] != 0).any(1).all()

    # the official form, on the same inputs
    gram = torch.cat([x[:, None, None].expand(5, 6, 1, 8), t.expand(5, 6, 2, 8)], 2).float()
    official = torch.linalg.det(gram @ gram.mT).abs().sqrt()
    grads = torch.autograd.grad(official.sin().sum(), (x, t))
    assert not all(grad.isfinite().all() for grad in grads)


@pytest.mark.core
@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3])
def test_tuples_of_close_vectors(angle, backend):
    """Volumes are as well conditioned as the tuple, eps / angle; a Gram matrix in float32 is off by eps / angle^2."""
    generator = torch.Generator().manual_seed(0)
    first = torch.nn.functional.normalize(torch.randn(60, 1, 32, generator=generator), dim=-1)
    tuples = torch.cat([first, first + angle * torch.randn(60, 1, 32, generator=generator) / 32**0.5], 1)
    anchor = torch.nn.functional.normalize(torch.randn(50, 32, generator=generator), dim=-1)
    # logits of order 1, and their gradient with respect to the direction of the small side
    options = {"row_scale": 1.0 / angle, "cols": True, "totals": True}
    arguments = (anchor.requires_grad_(), tuples.requires_grad_())
    results = evaluate(fused, arguments, options | {"backend": backend})
    truth = evaluate(naive, arguments, options, dtype=torch.float64, exact=True)
    dense = evaluate(naive, arguments, options)
    eps = torch.finfo(torch.float32).eps
    for name, value in results.items():
        error, dense_error = ((x - truth[name]).norm() / truth[name].norm() for x in (value, dense[name]))
        assert error < eps / angle, name
        assert angle > 1e-3 or not dense_error < 20 * error, name


def test_more_vectors_than_dimensions(backend):
    """Every volume is 0."""
    (anchor, tuples), _ = problem(9, 11, 3, 3)
    out = co.volume_logsumexp(anchor, tuples, backend=backend)
    # in float32 a distance is 0 to within the root of its rounding
    torch.testing.assert_close(out.row_lse, torch.tensor(11.0).log().expand(9), rtol=0, atol=2e-2)
    grads = torch.autograd.grad(out.row_lse.sum(), (anchor, tuples))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sides(n, m, backend, dtype):
    arguments, options = problem(n, m, 2, 4, dtype)
    results = evaluate(fused, arguments, options | {"backend": backend})
    row_lse, row_max, col_lse, col_max, row_total, col_total = (results[f"output{i}"] for i in range(6))
    for vector, size in ((row_lse, n), (row_max, n), (col_lse, m), (col_max, m)):
        assert vector.shape == (size,)
        assert (vector == -torch.inf).all()
    assert torch.equal(row_total, torch.zeros_like(row_total))
    assert torch.equal(col_total, torch.zeros_like(col_total))
    assert (row_total.shape, col_total.shape) == ((n,), (m,))
    for key, grad in results.items():
        assert key.startswith("output") or (grad == 0).all(), key
    assert results["grad of argument1"].shape == (m, 2, 4)


def test_only_pair_excluded(backend):
    (anchor, tuples), _ = problem(1, 1, 2, 4)
    out = co.volume_logsumexp(anchor, tuples, exclude=torch.tensor([0]), cols=True, totals=True, backend=backend)
    assert out.row_lse.item() == out.col_lse.item() == -torch.inf
    assert out.row_total.item() == out.col_total.item() == 0
    grads = torch.autograd.grad(out.row_lse + out.col_total, (anchor, tuples))
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_bitwise_repeatable_for_any_number_of_threads(backend, dtype):
    arguments, options = problem(1100, 1030, 2, 20, dtype)
    first = evaluate(fused, arguments, options | {"backend": backend})
    before = torch.get_num_threads()
    try:
        for threads in (before, 1, 3):
            torch.set_num_threads(threads if backend == "cpu" else before)
            for name, value in evaluate(fused, arguments, options | {"backend": backend}).items():
                assert torch.equal(value, first[name]), (name, threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_layout_does_not_matter(layout, backend):
    arguments, options = problem(65, 70, 3, 17)

    def laid_out(x):
        x = x.detach()
        x = x.mT.contiguous().mT if layout == "transposed" else x.repeat_interleave(2, 0)[::2]
        assert not x.is_contiguous()
        return x.requires_grad_()

    expected = evaluate(fused, arguments, options | {"backend": backend})
    for name, value in evaluate(fused, [laid_out(x) for x in arguments], options | {"backend": backend}).items():
        assert torch.equal(value, expected[name]), name


def test_autocast_changes_nothing(backend):
    arguments, options = problem(40, 33, 2, 9)
    expected = evaluate(fused, arguments, options | {"backend": backend})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = evaluate(fused, arguments, options | {"backend": backend})
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name


FORWARD = torch.ops.contrastive_ops.volume_logsumexp.default
BACKWARD = torch.ops.contrastive_ops.volume_logsumexp_backward.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("members", [1, 3])
def test_opcheck(members, backend, dtype):
    (anchor, tuples), options = problem(9, 7, members, 5, dtype)
    vectors = (options["row_scale"].detach(), options["col_scale"].detach(), options["exclude"])
    inputs = (anchor.detach(), tuples.detach(), *vectors, True, True, True)
    fast = ("test_schema", "test_autograd_registration", "test_faketensor")
    checks = (*fast, "test_aot_dispatch_dynamic") if dtype == torch.float32 else fast
    torch.library.opcheck(FORWARD, (*inputs, [True] * 4, backend), test_utils=fast)
    torch.library.opcheck(FORWARD, (*inputs, [False] * 4, backend), test_utils=checks)
    row_max, col_max, row_log_sum, col_log_sum, kept, row_total, col_total, *_ = FORWARD(*inputs, [True] * 4, backend)
    incoming = [torch.randn_like(value) for value in (row_max, col_max, row_total, col_total)]
    for needs in ([True] * 4, [True, False, False, False], [False, True, False, False]):
        saved = (row_max, col_max, row_log_sum, col_log_sum, kept)
        torch.library.opcheck(BACKWARD, (*incoming, *saved, *inputs, needs, backend), test_utils=checks)


def test_compiled(backend):
    """One graph for all N and M, forward and backward."""

    def call(*arguments, **options):
        return fused(*arguments, **options, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, m in ((14, 25), (33, 9)):
        arguments, options = problem(n, m, 2, 6)
        expected = evaluate(call, arguments, options)
        for name, value in evaluate(compiled, arguments, options).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_differentiating_twice_is_refused_except_by_the_reference(backend):
    arguments, options = problem(5, 6, 2, 4, torch.float64)
    (grad,) = torch.autograd.grad(
        fused(*arguments, **options, backend=backend)[0].sum(), arguments[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"^volume_logsumexp is differentiable once, "):
        grad.sum().backward()
    reference = fused(*arguments, **options, backend="reference")[0].sum()
    (grad,) = torch.autograd.grad(reference, arguments[0], create_graph=True)
    torch.autograd.grad(grad.square().sum(), arguments[0])
