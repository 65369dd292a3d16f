"""Alignment, uniformity and joint entropy against their naive twins, and what must hold of them by definition."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import evaluate, judge
from torch.nn import functional as F

import contrastive_ops as co
from contrastive_ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(2, 3), (40, 17), (129, 96)]


def rows_of(n, d, dtype=torch.float32, count=1, norms=(1.0, 1.0)):
    x = F.normalize(torch.randn(count, n, d, dtype=torch.float64), dim=-1)
    x = x * torch.linspace(*norms, n, dtype=torch.float64)[:, None]
    return tuple(rows.to(dtype).requires_grad_() for rows in x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("t", [0.5, 2.0])
@pytest.mark.parametrize("count", [1, 2], ids=["within", "across"])
def test_uniformity(count, t, normalize, n, d, backend, dtype):
    arguments = rows_of(n, d, dtype, count, norms=(0.5, 2.0))
    options = {"t": t, "normalize": normalize}
    # exponents of up to t |x - y|^2, terms of up to 2t |x|^2
    judge(
        co.uniformity, reference.uniformity, arguments, options, fused_options={"backend": backend}, logits=16 * t + 8
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_joint_entropy(reduction, normalize, n, d, backend, dtype):
    arguments = rows_of(n, d, dtype, norms=(0.5, 2.0))
    options = {"normalize": normalize, "reduction": reduction}
    judge(co.joint_entropy, reference.joint_entropy, arguments, options, fused_options={"backend": backend}, logits=20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.5])
def test_alignment(alpha, reduction, normalize, n, d, dtype):
    arguments = rows_of(n, d, dtype, count=2, norms=(0.5, 2.0))
    judge(
        co.alignment,
        reference.alignment,
        arguments,
        {"alpha": alpha, "normalize": normalize, "reduction": reduction},
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0, 100.0])
def test_an_offset_of_all_rows_costs_no_digits(offset, dtype, backend):
    """Distances don't change with it, so neither do errors. Of 16-bit rows the inputs are exact, many of them equal."""
    x, y = 0.3 * torch.randn(2, 64, 16, dtype=torch.float64) + offset
    y = y + torch.randn(16)
    x, y = (rows.to(dtype).requires_grad_() for rows in (x, y))
    options = {"normalize": False}
    fused = {"fused_options": {"backend": backend}, "logits": 20}
    judge(co.uniformity, reference.uniformity, (x,), options, **fused)
    judge(co.uniformity, reference.uniformity, (x, y), options, **fused)
    judge(co.joint_entropy, reference.joint_entropy, (x,), options, **fused)
    judge(co.alignment, reference.alignment, (x, y), options)


def test_uniformity_is_that_of_differences():
    """Not of products, in the naive twin neither."""
    x = (0.3 * torch.randn(64, 16) + 1000).requires_grad_()
    rows = x.detach().double().requires_grad_()
    i, j = torch.triu_indices(64, 64, 1)
    truth = (-2.0 * (rows[i] - rows[j]).square().sum(1)).logsumexp(0) - math.log(len(i))
    (expected,) = torch.autograd.grad(truth, rows)
    for function in (co.uniformity, reference.uniformity):
        value = function(x, normalize=False)
        (grad,) = torch.autograd.grad(value, x)
        assert value.item() == pytest.approx(truth.item(), abs=1e-5)
        assert (grad - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_gradcheck(n, normalize, backend):
    x, y = rows_of(n, 4, torch.float64, count=2, norms=(0.5, 2.0))
    options = {"normalize": normalize}
    torch.autograd.gradcheck(lambda x: co.uniformity(x, **options, backend=backend), (x,))
    torch.autograd.gradcheck(lambda x, y: co.uniformity(x, y, **options, backend=backend), (x, y))
    torch.autograd.gradcheck(lambda x: co.joint_entropy(x, **options, reduction="none", backend=backend), (x,))
    for alpha in (1.0, 2.0):
        torch.autograd.gradcheck(lambda x, y, a=alpha: co.alignment(x, y, alpha=a, **options, reduction="none"), (x, y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [0, 1])
def test_too_few_rows_contribute_zero(n, normalize, dtype, backend):
    """No pairs: 0 with zero gradient, where a mean over nothing is NaN."""
    x, y = rows_of(n, 4, dtype, count=2)
    options = {"normalize": normalize, "backend": backend}
    for function, arguments in ((co.uniformity, (x,)), (co.uniformity, (x, y)), (co.joint_entropy, (x,))):
        results = evaluate(function, arguments, options)
        assert "grad of argument0" in results
        assert all((value == 0).all() for value in results.values()), results
    assert co.alignment(x[:0], y[:0], normalize=normalize).item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_have_zero_gradient_of_cosines(dtype, backend):
    x, y = rows_of(9, 5, dtype, count=2)
    with torch.no_grad():
        x[[2, 5]] = 0
        y[[2, 7]] = 0
    judge(co.uniformity, reference.uniformity, (x,), fused_options={"backend": backend}, logits=20)
    judge(co.uniformity, reference.uniformity, (x, y), fused_options={"backend": backend}, logits=20)
    judge(co.joint_entropy, reference.joint_entropy, (x,), {"normalize": True}, fused_options={"backend": backend},
          logits=20)  # fmt: skip
    results = evaluate(co.alignment, (x, y), {"reduction": "none"})
    expected = evaluate(reference.alignment, (x, y), {"reduction": "none"}, dtype=torch.float64)
    assert results["output0"][[2, 5, 7]].tolist() == pytest.approx([0.0, 1.0, 1.0], abs=1e-6)
    torch.testing.assert_close(results["output0"].double(), expected["output0"], rtol=1e-5, atol=0)
    assert (results["grad of argument0"][[2, 5]] == 0).all()
    assert (results["grad of argument1"][[2, 7]] == 0).all()
    assert all(value.isfinite().all() for value in results.values())


def test_uniformity_of_the_authors_pdist(backend):
    """`align_uniform`: torch.pdist, and the whole loss of the paper."""
    x, y = (F.normalize(torch.randn(30, 6, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2))

    def uniform(x):
        return torch.pdist(x).pow(2).mul(-2).exp().mean().log()

    theirs = (x - y).norm(dim=1).pow(2).mean() + (uniform(x) + uniform(y)) / 2
    ours = co.alignment(x, y) + (co.uniformity(x, backend=backend) + co.uniformity(y, backend=backend)) / 2
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    # ours normalises: its gradient has no part along the rows
    grads = zip((x, y), torch.autograd.grad(ours, (x, y)), torch.autograd.grad(theirs, (x, y)), strict=True)
    for rows, our, their in grads:
        along = (their * rows).sum(1, keepdim=True) * rows
        torch.testing.assert_close(our, their - along, rtol=1e-9, atol=1e-12)


def test_uniformity_is_its_loop(backend):
    x, y = torch.randn(2, 5, 3, dtype=torch.float64)

    def gaussian(a, b, t):
        return math.exp(-t * sum((p - q) ** 2 for p, q in zip(a.tolist(), b.tolist(), strict=True)))

    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    within = math.log(sum(gaussian(x[i], x[j], 0.3) for i, j in pairs) / 20)
    across = math.log(sum(gaussian(x[i], y[j], 0.3) for i, j in pairs) / 20)
    rows = [math.log(sum(gaussian(x[i], x[j], 0.3) for j in range(5)) / 5) for i in range(5)]
    for module, options in ((co, {"backend": backend}), (reference, {})):
        given = {"t": 0.3, "normalize": False, **options}
        assert module.uniformity(x, **given).item() == pytest.approx(within, rel=1e-13)
        assert module.uniformity(x, y, **given).item() == pytest.approx(across, rel=1e-13)
        got = module.joint_entropy(x, t=0.3, reduction="none", **options)
        torch.testing.assert_close(got.tolist(), rows, rtol=1e-13, atol=0)


def test_a_product_of_gaussians_is_one_over_the_concatenation(backend):
    """The joint entropy term as SepCLR writes it, from a kernel matrix for each of the two codes."""
    common, salient = F.normalize(torch.randn(12, 4, dtype=torch.float64), dim=1), torch.randn(12, 3).double()
    kernel = [torch.exp(-(torch.cdist(code, code) ** 2)) for code in (common, salient)]
    theirs = (kernel[0] * kernel[1]).mean(1).log().mean()
    ours = co.joint_entropy(torch.cat([common, salient], dim=1), backend=backend)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_far_rows_do_not_underflow(backend):
    """Rows 1000 apart: the mean of the Gaussians is e^-2000000, whose logarithm the dense form gives as -inf."""
    x = (1000.0 * torch.eye(4)).requires_grad_()
    value = co.uniformity(x, t=1.0, normalize=False, backend=backend)
    value.backward()
    assert value.item() == pytest.approx(-2e6, rel=1e-6)
    assert x.grad.isfinite().all()
    assert reference.uniformity(x, t=1.0, normalize=False).item() == -math.inf
    alone = co.joint_entropy(x, reduction="none", backend=backend)
    assert alone.tolist() == pytest.approx([-math.log(4)] * 4, rel=1e-6)  # each row sees itself, exactly


def test_equal_rows_are_not_uniform(backend):
    x = torch.randn(1, 6).expand(7, 6)
    for value in (co.uniformity(x, backend=backend), co.joint_entropy(x, backend=backend)):
        assert value.item() == pytest.approx(0.0, abs=1e-5)  # 8 t |x|^2 eps, the rounding of the exponents
    assert co.alignment(x, x).item() == 0.0


def test_rotation_and_order_change_nothing(backend):
    x, y = torch.randn(2, 15, 5, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    order = torch.randperm(15)
    moved_x, moved_y = (x @ rotation)[order], (y @ rotation)[order]
    for function in (
        lambda x, y: co.uniformity(x, backend=backend),
        lambda x, y: co.uniformity(x, y, backend=backend),
        lambda x, y: co.joint_entropy(x, backend=backend),
        lambda x, y: co.alignment(x, y),
    ):
        torch.testing.assert_close(function(moved_x, moved_y), function(x, y), rtol=1e-12, atol=0)


def test_uniformity_across_is_symmetric(backend):
    x, y = torch.randn(2, 15, 5, dtype=torch.float64)
    torch.testing.assert_close(
        co.uniformity(y, x, backend=backend), co.uniformity(x, y, backend=backend), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_runs_are_bitwise_repeatable(normalize, backend, two_threads):
    x, y = rows_of(300, 24, count=2)
    for function, arguments in ((co.uniformity, (x,)), (co.uniformity, (x, y)), (co.joint_entropy, (x,))):
        options = {"normalize": normalize, "backend": backend}
        first, second = (evaluate(function, arguments, options) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_rows_that_coincide_have_zero_gradient(normalize, alpha):
    x = torch.randn(5, 4).requires_grad_()
    y = x.detach().clone()
    y[3] += 1.0
    loss = co.alignment(x, y, alpha=alpha, normalize=normalize, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert (loss[[0, 1, 2, 4]] == 0).all()
    assert (grad[[0, 1, 2, 4]] == 0).all()
    assert (grad[3] != 0).any()


@pytest.mark.parametrize("normalize", [True, False])
def test_compiled(normalize):
    """What the catalogue's rows leave out; one graph for two sizes that share no factor."""

    def call(x, y):
        options = {"normalize": normalize}
        return co.uniformity(x, y, **options), co.alignment(x, y, **options), co.alignment(x, y, alpha=1.0, **options)

    torch.compiler.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (14, 33):
        arguments = rows_of(n, 6, count=2)
        results, expected = (evaluate(function, arguments, {}) for function in (compiled, call))
        for name, value in expected.items():
            torch.testing.assert_close(results[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_changes_nothing_across(dtype, backend):
    arguments = rows_of(12, 6, dtype, count=2)

    def call(x, y):
        return co.uniformity(x, y, backend=backend), co.alignment(x, y, alpha=1.0, reduction="none")

    expected = evaluate(call, arguments, {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = evaluate(call, arguments, {})
    assert all(torch.equal(results[name], value) for name, value in expected.items())


@pytest.mark.parametrize("norm", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("distance", [1e-3, 1e-6])
def test_tiny_alignment_keeps_its_relative_accuracy(distance, norm):
    """Unit vectors in float32 are off by 1e-7 each: their plain difference says nothing about a distance of 1e-6."""
    x = norm * F.normalize(torch.randn(20, 16), dim=1)
    y = x * (1 + distance * torch.randn(20, 16))
    results = {}
    for name, function, dtype in (
        ("ours", co.alignment, torch.float32),
        ("truth", reference.alignment, torch.float64),
        ("dense", reference.alignment, torch.float32),
    ):
        given = (x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_())
        loss = function(*given)
        results[name] = [tensor.double() for tensor in (loss.detach(), *torch.autograd.grad(loss, given))]
    for ours, truth in zip(results["ours"], results["truth"], strict=True):
        assert (ours - truth).norm() <= 1e-5 * truth.norm()
    if distance == 1e-6:
        assert results["truth"][0].item() < 1e-11
        assert abs(results["dense"][0] - results["truth"][0]) > 1e-3 * results["truth"][0]
