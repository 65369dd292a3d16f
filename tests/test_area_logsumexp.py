"""The area op against the areas from the lengths of the sides in float64, and where triangles have none."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from test_volume_logsumexp import reduced, requested
from tolerance import assert_accurate, evaluate, judge
from torch import Tensor

import contrastive_ops as co
from contrastive_ops import backends
from contrastive_ops.backends import cuda, tiles
from contrastive_ops.dtypes import statistics_dtype
from contrastive_ops.reference import triangle_areas
from contrastive_ops.reference.volume_logsumexp import logits_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("tiled", "reference")
FLAGS = {
    "everything": {"cols": True, "totals": True},
    "rows": {"cols": False, "totals": True},
    "cols": {"rows": False, "cols": True, "totals": True},
    "no totals": {"cols": True, "totals": False},
}
# of few features, many points come so close to a line that rounding is all of their distance
SHAPES = ((1, 1, 2), (1, 257, 64), (257, 1, 17), (2, 63, 16), (7, 2, 4), (63, 65, 100), (300, 64, 17))

backend = pytest.mark.parametrize("backend", BACKENDS)
squared = pytest.mark.parametrize("squared", [False, True], ids=["area", "squared"])


def problem(n: int, m: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Corners of length about 2, scales about 1, so that logits are of order 1."""
    generator = torch.Generator().manual_seed(seed)

    def corners(size: int) -> Tensor:
        x = torch.nn.functional.normalize(torch.randn(size, d, generator=generator, dtype=torch.float64), dim=-1)
        return (2 * x).to(dtype).requires_grad_()

    def scale(size: int, value: float) -> Tensor:
        spread = value * (1 + 0.3 * torch.rand(size, generator=generator, dtype=torch.float64))
        return spread.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()

    exclude = torch.arange(n)
    exclude[1::3] = -1
    arguments = (corners(n), corners(m), corners(m))
    options = {"row_scale": scale(n, 2.0), "col_scale": scale(m, 0.5), "exclude": exclude}
    return arguments, options | {"cols": True, "totals": True}


def fused(anchor: Tensor, x: Tensor, y: Tensor, *, backend: str = "auto", **options: Any) -> tuple[Tensor, ...]:
    outputs = co.area_logsumexp(anchor, x, y, backend=backend, **options)
    return requested(outputs, **{key: options[key] for key in ("rows", "cols", "totals") if key in options})


def naive(
    anchor: Tensor, x: Tensor, y: Tensor, *, squared: bool = False, exclude: Tensor | None = None,
    row_scale: Any = None, col_scale: Any = None, **flags: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = statistics_dtype(anchor)
    row_scale, col_scale = (
        None if value is None else torch.as_tensor(value, dtype=dtype).reshape(-1).expand(size)
        for value, size in ((row_scale, len(anchor)), (col_scale, len(x)))
    )
    areas = triangle_areas(*(corner.to(dtype) for corner in (anchor, x, y)), squared)
    return reduced(logits_of(-areas, row_scale, col_scale, exclude), **flags)


@backend
@squared
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_options(flags, dtype, squared, backend):
    arguments, options = problem(65, 129, 17, dtype)
    judge(fused, naive, arguments, options | flags | {"squared": squared}, fused_options={"backend": backend})


@backend
@pytest.mark.parametrize(
    "scales",
    [{}, {"row_scale": 0.7}, {"row_scale": torch.tensor(0.7).requires_grad_()}, {"col_scale": torch.tensor([0.4])}],
    ids=["none", "float", "0-d", "one element"],
)
def test_kinds_of_scales(scales, backend):
    arguments, options = problem(40, 33, 9)
    plain = {name: value for name, value in options.items() if not name.endswith("scale")}
    judge(fused, naive, arguments, plain | scales, fused_options={"backend": backend})


@backend
@squared
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype, squared, backend):
    arguments, options = problem(*shape, dtype)
    judge(fused, naive, arguments, options | {"squared": squared}, fused_options={"backend": backend})


@squared
@pytest.mark.parametrize("tile", [1, 7, 64])
def test_tiles_of_any_size(tile, squared, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", tile)
    arguments, options = problem(23, 64, 9)
    judge(fused, naive, arguments, options | {"squared": squared}, fused_options={"backend": "tiled"})


@pytest.mark.usefixtures("two_threads")
def test_beyond_one_tile():
    arguments, options = problem(1030, 1100, 16)
    judge(fused, naive, arguments, options, roundings=1)


def test_every_subset_of_requires_grad_gives_the_same_gradients():
    arguments, options = problem(40, 37, 9)
    named = {f"argument{i}": value for i, value in enumerate(arguments)} | options
    leaves = [key for key, value in named.items() if isinstance(value, Tensor) and value.requires_grad]
    everything = evaluate(fused, arguments, options)
    assert len(leaves) == 5
    for wanted in range(1, 31):
        subset = [key for i, key in enumerate(leaves) if wanted >> i & 1]
        for key in leaves:
            named[key].requires_grad_(key in subset)
        results = evaluate(fused, arguments, options)
        for key, value in results.items():
            assert torch.equal(value, everything[key]), key
        assert {f"grad of {key}" for key in subset} <= results.keys()


@backend
@squared
def test_gradcheck(squared, backend):
    arguments, options = problem(6, 7, 5, torch.float64)
    scales = (options.pop("row_scale"), options.pop("col_scale"))

    def call(*given):
        *corners, row_scale, col_scale = given
        out = co.area_logsumexp(
            *corners, row_scale=row_scale, col_scale=col_scale, squared=squared, **options, backend=backend
        )
        return out.row_lse, out.col_lse, out.row_total, out.col_total

    torch.autograd.gradcheck(call, (*arguments, *scales))
    if backend == "reference":
        torch.autograd.gradgradcheck(call, (*arguments, *scales))


@backend
def test_ends_of_a_side_and_the_place_of_the_triangle_do_not_matter(backend):
    (anchor, x, y), _ = problem(20, 30, 8, torch.float64)
    expected = co.area_logsumexp(anchor, x, y, backend=backend).row_lse
    for corners in ((anchor, y, x), (anchor + 3, x + 3, y + 3), (-anchor, -x, -y)):
        torch.testing.assert_close(co.area_logsumexp(*corners, backend=backend).row_lse, expected)
    twice = co.area_logsumexp(2 * anchor, 2 * x, 2 * y, row_scale=0.25, backend=backend).row_lse
    torch.testing.assert_close(twice, expected)


@backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])  # float16 can't hold the gradients
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_logits_of_any_size(scale, dtype, backend):
    """Maxima are online: one pair has all the weight, or all have the same."""
    arguments, options = problem(20, 33, 9, dtype)
    options |= {"row_scale": scale}
    results = evaluate(fused, arguments, options | {"backend": backend})
    truth = evaluate(naive, arguments, options, dtype=torch.float64, exact=True)
    assert all(value.isfinite().all() for value in results.values())
    # a logit has the relative error of its area, and a weight that error absolutely
    allowed = max(1.0, scale) * 32 * torch.finfo(statistics_dtype(arguments[0])).eps
    for name in ("output0", "output1", "output2", "output3"):
        torch.testing.assert_close(results[name].double(), truth[name], rtol=1e-5, atol=allowed)


@backend
@squared
@pytest.mark.parametrize("dtype", DTYPES)
def test_degenerate_triangles(dtype, squared, backend):
    """Sides of length 0, anchors on the line or on an end: areas of 0, finite everywhere and with gradient 0 there."""
    generator = torch.Generator().manual_seed(3)
    anchor, x, y = (torch.randn(size, 8, generator=generator).to(dtype) for size in (6, 5, 5))
    y[0] = x[0]
    x[1] = y[1] = 0
    x[2], y[2] = torch.eye(8)[0], -torch.eye(8)[0]  # through 0
    anchor[3], anchor[4], anchor[5] = 0, torch.eye(8)[0], 2 * torch.eye(8)[0]
    corners = [corner.requires_grad_() for corner in (anchor, x, y)]
    out = co.area_logsumexp(*corners, squared=squared, cols=True, totals=True, backend=backend)
    assert all(value.isfinite().all() for value in out)
    assert torch.equal(out.col_lse[:2], torch.tensor(6.0, dtype=out.col_lse.dtype).log().expand(2))
    assert (out.row_max == 0).all()
    grads = torch.autograd.grad(sum(value.sin().sum() for value in (out.row_lse, out.col_lse, out.col_total)), corners)
    assert all(grad.isfinite().all() for grad in grads)
    assert all((grad[:2] == 0).all() for grad in grads[1:])
    assert (grads[0] != 0).any(1).all()
    alone = co.area_logsumexp(anchor[3:], x[:3], y[:3], squared=squared, cols=True, backend=backend)
    assert torch.equal(alone.row_lse, torch.tensor(3.0, dtype=alone.row_lse.dtype).log().expand(3))
    grads = torch.autograd.grad(alone.row_lse.sum() + alone.col_lse.square().sum(), corners)
    assert all((grad == 0).all() for grad in grads)


@backend
def test_plane(backend):
    """Triangles whose areas are known: of a side of 4, points at heights of 3, 0 and 5, and a scaled one."""
    x, y = torch.tensor([[1.0, 1.0]]), torch.tensor([[5.0, 1.0]])
    anchor = torch.tensor([[2.0, 4.0], [7.0, 1.0], [0.0, -4.0]])
    torch.testing.assert_close(co.area_logsumexp(anchor, x, y, backend=backend).row_max, torch.tensor([-6.0, 0.0, -10]))
    doubled = co.area_logsumexp(anchor, x, y, squared=True, backend=backend).row_max
    torch.testing.assert_close(doubled, torch.tensor([-72.0, 0.0, -200]))


@backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sides(n, m, dtype, backend):
    arguments, options = problem(n, m, 4, dtype)
    results = evaluate(fused, arguments, options | {"backend": backend})
    row_lse, row_max, col_lse, col_max, row_total, col_total = (results[f"output{i}"] for i in range(6))
    for vector, size in ((row_lse, n), (row_max, n), (col_lse, m), (col_max, m)):
        assert vector.shape == (size,)
        assert (vector == -torch.inf).all()
    assert (row_total.tolist(), col_total.tolist()) == ([0.0] * n, [0.0] * m)
    assert all((value == 0).all() for name, value in results.items() if name.startswith("grad"))


@backend
def test_only_pair_excluded(backend):
    corners, _ = problem(1, 1, 4)
    out = co.area_logsumexp(*corners, exclude=torch.tensor([0]), cols=True, totals=True, backend=backend)
    assert out.row_lse.item() == out.col_lse.item() == -math.inf
    assert out.row_total.item() == out.col_total.item() == 0
    grads = torch.autograd.grad(out.row_lse + out.col_total, corners)
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.usefixtures("two_threads")
@squared
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_bitwise_repeatable_for_any_number_of_threads(dtype, squared):
    """The fixture puts their number back."""
    arguments, options = problem(1100, 1030, 20, dtype)
    first = evaluate(fused, arguments, options | {"squared": squared})
    for threads in (2, 1, 3):
        torch.set_num_threads(threads)
        for name, value in evaluate(fused, arguments, options | {"squared": squared}).items():
            assert torch.equal(value, first[name]), (name, threads)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_layout_does_not_matter(layout):
    arguments, options = problem(65, 70, 17)

    def laid_out(x):
        x = x.detach()
        x = x.mT.contiguous().mT if layout == "transposed" else x.repeat_interleave(2, 0)[::2]
        assert not x.is_contiguous()
        return x.requires_grad_()

    truth = evaluate(naive, arguments, options, dtype=torch.float64, exact=True)
    for name, value in evaluate(fused, [laid_out(x) for x in arguments], options).items():
        assert_accurate(value, truth[name], what=name)


def test_autocast_changes_nothing():
    arguments, options = problem(40, 33, 9)
    expected = evaluate(fused, arguments, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = evaluate(fused, arguments, options)
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name


FORWARD = torch.ops.contrastive_ops.area_logsumexp.default
BACKWARD = torch.ops.contrastive_ops.area_logsumexp_backward.default


@squared
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype, squared):
    (points, _, _), options = problem(9, 7, 5, dtype)
    vectors = (options["row_scale"].detach(), options["col_scale"].detach(), options["exclude"])
    inputs = (points.detach(), torch.randn(7, 2, 5, dtype=dtype), *vectors, squared, True, True, True)
    fast = ("test_schema", "test_autograd_registration", "test_faketensor")
    checks = (*fast, "test_aot_dispatch_dynamic") if dtype == torch.float32 else fast
    torch.library.opcheck(FORWARD, (*inputs, [True] * 4, "tiled"), test_utils=checks)
    row_max, col_max, row_log_sum, col_log_sum, kept, row_total, col_total, *_ = FORWARD(*inputs, [True] * 4, "tiled")
    incoming = [torch.randn_like(value) for value in (row_max, col_max, row_total, col_total)]
    for needs in ([True] * 4, [True, False, False, False], [False, True, False, False]):
        saved = (row_max, col_max, row_log_sum, col_log_sum, kept)
        torch.library.opcheck(BACKWARD, (*incoming, *saved, *inputs, needs, "tiled"), test_utils=checks)


def test_compiled():
    """One graph for all N and M, forward and backward."""
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, m in ((14, 25), (33, 9)):
        arguments, options = problem(n, m, 6)
        expected = evaluate(fused, arguments, options)
        for name, value in evaluate(compiled, arguments, options).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


# without a batching rule PyTorch loops over the batch, and says that this is slow
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@squared
def test_transforms_of_the_loss(squared):
    """vmap, grad, jacrev and their compositions are the loops that they stand for."""
    corners = torch.randn(3, 3, 9, 4)
    ours, dense = (
        partial(co.triangle_loss, squared=squared, reduction="none", backend=name) for name in ("tiled", "reference")
    )

    def gradients(function):
        return torch.func.grad(lambda *given: function(*given).sum(), argnums=(0, 1, 2))

    def close(got, expected):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    close(torch.vmap(ours)(*corners), torch.stack([dense(*each) for each in corners.unbind(1)]))
    one = corners[:, 0]
    close(gradients(ours)(*one), gradients(dense)(*one))
    close(torch.vmap(gradients(ours))(*corners), torch.vmap(gradients(dense))(*corners))
    close(torch.func.jacrev(ours)(*one), torch.func.jacrev(dense)(*one))


def test_differentiating_twice_is_refused_except_by_the_reference():
    arguments, options = problem(5, 6, 4, torch.float64)
    (grad,) = torch.autograd.grad(fused(*arguments, **options)[0].sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^area_logsumexp is differentiable once, "):
        grad.sum().backward()


def test_auto_takes_tiled_without_a_warning(monkeypatch):
    """The other engines have no such op, which is no fault of the installation."""
    monkeypatch.setattr(backends, "_warned", set())
    corners, _ = problem(4, 5, 3)
    co.area_logsumexp(*corners)
    assert backends._warned == set()
    report = co.explain(corners[0], op="area_logsumexp")
    assert report.chosen == "tiled"
    for name in ("cpu", "cuda", "triton"):
        assert report.reasons[name] == f"{name} has no area_logsumexp."
    assert "area_logsumexp" not in cuda.OPS
