"""What is done row by row: the engine's passes and Triton's kernels against plain PyTorch, and when which runs."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import DENSE_FACTOR
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import contrastive_ops as co
from contrastive_ops import backends
from contrastive_ops.backends import cpu, cuda, sweep, tuples
from contrastive_ops.catalogue import LOSSES
from contrastive_ops.ops import rowwise
from contrastive_ops.ops.classes import by_class, class_contrast_sum, with_class_mean
from contrastive_ops.ops.cross_entropy import contrast_sum

V, N, D = 3, 131, 37  # no multiple of a vector's length, more than two tasks of rows
ENGINE = pytest.mark.skipif(co.build.missing is not None, reason=str(co.build.missing))
# of x [V, N, D], in one pass where there is one, and by the steps of PyTorch
FUNCTIONS = {
    "inverse_norm": (lambda x: (rowwise.inverse_norm(x),), lambda x: (rowwise._inverse_norm(x),)),
    "with_inverse_norm": (rowwise.with_inverse_norm, lambda x: (x, rowwise._inverse_norm(x))),
    "with_pair_products": (rowwise.with_pair_products, lambda x: rowwise.with_pair_products(x, "tiled")),
    "unit_tuples": (lambda x: rowwise.unit_tuples(*x), lambda x: rowwise._unit(*x)),
}
EACH = pytest.mark.parametrize("name", FUNCTIONS)
HALF = (torch.bfloat16, torch.float16)


def itself(name, results):
    """Of the results of a function, its input where it returns that."""
    return results[: int(name.startswith("with"))]


def made(name, results):
    return results[len(itself(name, results)) :]


def run(function, x, used=slice(None)):
    """Values of a function of x, and the gradient of those that are used."""
    x = x.detach().requires_grad_()
    values = function(x)
    torch.manual_seed(1)
    incoming = [torch.randn(value.shape, dtype=torch.float64).to(value.dtype) for value in values]
    return *(value.detach() for value in values), torch.autograd.grad(values[used], x, incoming[used])[0]


def error(results, truth):
    return [((r.double() - t).abs().max() / t.abs().max()).item() for r, t in zip(results, truth, strict=True)]


@EACH
@pytest.mark.parametrize("layout", ["contiguous", "strided rows", "strided features"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@ENGINE
def test_engine_is_as_exact_as_pytorch(name, layout, dtype):
    ours, steps = FUNCTIONS[name]
    x = torch.randn(V, N, 2 * D)[..., :D] if layout == "strided rows" else torch.randn(V, N, D)
    x = x.to(dtype).mT.contiguous().mT if layout == "strided features" else x.to(dtype)
    truth = run(steps, x.double())
    result, dense = run(ours, x), run(steps, x)
    expected = [*itself(name, [dtype]), *[torch.float32] * len(made(name, result[:-1])), dtype]
    assert [r.dtype for r in result] == [r.dtype for r in dense] == expected
    for of_result, of_dense in zip(error(result, truth), error(dense, truth), strict=True):
        assert of_result <= DENSE_FACTOR * of_dense


@pytest.mark.parametrize("name", ["with_inverse_norm", "with_pair_products", "unit_tuples"])
@ENGINE
def test_each_result_alone(name):
    """Autograd gives no gradient for a result that is not used."""
    ours, steps = FUNCTIONS[name]
    x = torch.randn(V, N, D)
    for used in range(len(ours(x))):
        torch.testing.assert_close(*(run(f, x, slice(used, used + 1)) for f in (ours, steps)))


@ENGINE
def test_a_gradient_that_is_not_finite_stays_in_its_view():
    x = torch.randn(V, N, D, requires_grad=True)
    views, inverse, _ = rowwise.with_pair_products(x)
    (views[0, 0, 0] * torch.inf + inverse.sum()).backward()
    assert x.grad[1:].isfinite().all()


ONE_PASS = {"_Views": rowwise._Views.apply, "_Unit": lambda x: rowwise._Unit.apply(*x)}


@pytest.mark.parametrize("name", ONE_PASS)
@ENGINE
def test_gradients_of_every_order(name):
    """Of the one pass itself, in float64, where PyTorch runs otherwise."""
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(ONE_PASS[name], x)
    assert gradgradcheck(ONE_PASS[name], x)
    assert gradcheck(ONE_PASS[name], x, check_batched_grad=True)


@ENGINE
@pytest.mark.parametrize(
    "function",
    [
        co.gramian_volume,
        lambda x: rowwise.unit_tuples(*x.unbind(1))[0],
        lambda x: rowwise.with_pair_products(x.transpose(0, 1))[2],
        lambda x: (lambda rows, scale: scale[..., None] * rows)(*rowwise.with_inverse_norm(x)),
    ],
)
def test_many_gradients_at_once(function):
    x = torch.randn(4, 3, 5, requires_grad=True)
    value = function(x)
    incoming = torch.randn(2, *value.shape)
    (batched,) = torch.autograd.grad(value, x, incoming, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(value, x, one, retain_graph=True)[0] for one in incoming]
    torch.testing.assert_close(batched, torch.stack(each))


@ENGINE
@pytest.mark.parametrize("other", [lambda x: x, lambda x: 2 * x.roll(1, 1)], ids=["the same", "dependent"])
def test_vectors_that_depend_on_each_other(other):
    """Autograd takes the gradient of each for its own."""

    def orders(function):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (first,) = torch.autograd.grad(function(x, other(x))[0].pow(3).sum(), x, create_graph=True)
        return first.detach(), torch.autograd.grad(first.pow(2).sum(), x)[0]

    torch.testing.assert_close(orders(rowwise.unit_tuples), orders(rowwise._unit), rtol=1e-4, atol=1e-5)


@ENGINE
def test_checkpointing_and_inference_tensors():
    x, y, z = (torch.randn(6, 5).requires_grad_() for _ in range(3))
    plain = torch.autograd.grad(co.gram_loss(x, y, z), (x, y, z))
    again = torch.autograd.grad(checkpoint(co.gram_loss, x, y, z, use_reentrant=False), (x, y, z))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    with torch.inference_mode():
        frozen = y.clone(), z.clone()
    (gradient,) = torch.autograd.grad(co.gram_loss(x, *frozen), x)
    torch.testing.assert_close(gradient, plain[0])


class Called(TorchDispatchMode):
    """The operators of the C++ engine that are called while it is active."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "contrastive_ops_cpu":
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@EACH
@ENGINE
def test_inference_mode_runs_the_engine(name):
    """Where nothing is saved for backward."""
    x = torch.randn(V, N, D)
    with torch.inference_mode(), Called() as called:
        inside = FUNCTIONS[name][0](x.clone())
    assert called.names
    torch.testing.assert_close(tuple(value.clone() for value in inside), FUNCTIONS[name][1](x))


@ENGINE
@pytest.mark.parametrize("named", ["argument", "environment"])
def test_another_backend_leaves_the_engine_alone(named, monkeypatch):
    x, y, z = torch.randn(3, 6, 5).unbind()
    if named == "environment":
        monkeypatch.setenv("CONTRASTIVE_OPS_BACKEND", "tiled")
    options = {"backend": "tiled"} if named == "argument" else {}
    with Called() as called:
        for loss in (co.clip_loss, co.nt_xent, co.gram_loss):
            loss(x, y, *([z] if loss is co.gram_loss else [1.0] if loss is co.clip_loss else []), **options)
        co.mv_dhel(torch.stack([x, y, z]), **options)
        assert called.names == []
        if named == "environment":
            monkeypatch.delenv("CONTRASTIVE_OPS_BACKEND")
        co.nt_xent(x, y)
    assert {"contrastive_ops_cpu::scale", "contrastive_ops_cpu::contrast"} <= set(called.names)


@EACH
@ENGINE
def test_a_gradient_that_is_differentiated_again(name):
    ours, steps = FUNCTIONS[name]
    second = []
    for function in (ours, steps):
        x = torch.randn(V, 5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = sum(value.pow(3).sum() for value in function(x))
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    assert error(second[:1], second[1:])[0] < 1e-5


@ENGINE
def test_one_of_several_vectors_requires_a_gradient():
    x, y = torch.randn(2, 5, 6).unbind()
    y.requires_grad_()
    rowwise.unit_tuples(x, y)[0][:, 1, 0].sum().backward()
    expected = torch.autograd.grad(rowwise._unit(x, y)[0][:, 1, 0].sum(), y)[0]
    torch.testing.assert_close(y.grad, expected)
    for backend in ("cpu", "tiled"):
        assert [value.requires_grad for value in rowwise.unit_tuples(x, y, backend=backend)] == [True, False, True]
    (again,) = torch.autograd.grad(rowwise.unit_tuples(x, y)[0][:, 1, 0].sum(), y, create_graph=True)
    torch.testing.assert_close(again.detach(), expected)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_zero_rows(name, dtype):
    x = torch.zeros(2, 3, 4, dtype=dtype)
    # that of x itself passes, whatever it is
    results = run(lambda x: made(name, FUNCTIONS[name][0](x)), x)
    assert not any(result.any() for result in results)


@EACH
@pytest.mark.parametrize("shape", [(2, 0, 4), (2, 1, 1), (3, 1, 3)])
def test_no_rows_and_one_row(name, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(*(run(function, x) for function in FUNCTIONS[name]))


@ENGINE
def test_norms_beyond_the_squares_of_float32():
    x = torch.tensor([[3e-30, 4e-30], [3e30, 4e30], [1e-45, 0.0], [torch.nan, 1.0]])
    inverse = rowwise.inverse_norm(x)
    torch.testing.assert_close(inverse[:2], torch.tensor([2e29, 2e-31]))
    assert inverse[2] == 0.0  # 1 / |x| is no float32
    assert inverse[3].isnan()


@EACH
@ENGINE
def test_dual_tensors_take_the_steps(name):
    ours, steps = FUNCTIONS[name]
    x, tangent = torch.randn(2, V, 5, 6).unbind()
    with forward_ad.dual_level():
        tangents = [
            [forward_ad.unpack_dual(value).tangent for value in f(forward_ad.make_dual(x, tangent))]
            for f in (ours, steps)
        ]
    torch.testing.assert_close(*tangents)


@EACH
@ENGINE
def test_runs_are_bitwise_equal_for_any_number_of_threads(name):
    x = torch.randn(V, 1000, D)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(FUNCTIONS[name][0], x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@ENGINE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_combinations_of_several_tensors(dtype):
    """More rows than are converted at a time, into a result with strides of its own."""
    n = 4100
    weights = torch.randn(n, 2, 3, dtype=torch.float64)
    one, two = torch.randn(n, 1, D).to(dtype), torch.randn(2, n, D).to(dtype).transpose(0, 1)
    result = torch.empty(2, n, D + 3, dtype=dtype)[..., :D].transpose(0, 1)
    cpu.combine_rows(weights, (one, two), result)
    expected = weights @ torch.cat([one, two], 1).double()
    torch.testing.assert_close(result, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    products = cpu.row_products(one, two)
    torch.testing.assert_close(products, one.double() @ two.double().mT)


@ENGINE
@pytest.mark.parametrize(
    ("weights", "vectors", "result", "sentence"),
    [
        ((2, 1, 1), [(2, 3)], (2, 1, 3), "vectors must have shape"),
        ((2, 1, 1), [(3, 1, 3)], (2, 1, 3), "vectors must have shape"),
        ((2, 1, 1), [], (2, 1, 3), "vectors and result must have shape"),
        ((2, 1, 2), [(2, 1, 3)], (2, 1, 3), "weights must be float64 of shape"),
    ],
)
def test_the_operator_refuses(weights, vectors, result, sentence):
    weights = torch.zeros(weights, dtype=torch.float64)
    with pytest.raises(ValueError, match=sentence):
        cpu.combine_rows(weights, [torch.zeros(shape) for shape in vectors], torch.zeros(result))


@ENGINE
def test_the_operator_refuses_other_shapes_and_dtypes_of_products():
    with pytest.raises(ValueError, match="a must have shape"):
        cpu.row_products(torch.zeros(2, 3), torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="b must have shape"):
        cpu.row_products(torch.zeros(2, 1, 3), torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="one dtype"):
        cpu.row_products(torch.zeros(2, 1, 3), torch.zeros(2, 1, 3, dtype=torch.float64))


@pytest.mark.parametrize("loss", [pytest.param(row, id=row.name) for row in LOSSES])
def test_fake_tensors(loss):
    """Without torch.compile, whose traces take the steps of PyTorch."""
    given = loss.inputs(8, 16, torch.float32, torch.Generator().manual_seed(0))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given]
        value = loss.fused(*fakes)
        value.backward()
    assert value.shape == ()
    learned = [
        (fake, a) for fake, a in zip(fakes, given, strict=True) if isinstance(a, torch.Tensor) and a.requires_grad
    ]
    assert learned
    assert all(fake.grad.shape == a.shape for fake, a in learned)


# Triton's kernels of the same, in its interpreter
NO_TRITON = backends.why_not("triton", "similarity_logsumexp", torch.empty(1, 1))
TRITON = pytest.mark.skipif(NO_TRITON is not None, reason=f"triton: {NO_TRITON}")
IN_KERNELS = {
    "inverse_norm": (lambda x: (rowwise.inverse_norm(x, "triton"),), FUNCTIONS["inverse_norm"][1]),
    "with_inverse_norm": (lambda x: rowwise.with_inverse_norm(x, "triton"), FUNCTIONS["with_inverse_norm"][1]),
    "unit_tuples": (lambda x: rowwise.unit_tuples(*x, backend="triton"), FUNCTIONS["unit_tuples"][1]),
    "one unit": (lambda x: (rowwise.unit(x[0], "triton"),), lambda x: (rowwise._unit(x[0])[1],)),
}
EACH_KERNEL = pytest.mark.parametrize("name", IN_KERNELS)


@EACH_KERNEL
@pytest.mark.parametrize("layout", ["contiguous", "strided rows", "strided features"])
@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 37), (torch.float32, 300), (torch.float16, 130)])
@TRITON
def test_kernels_are_as_exact_as_pytorch(name, layout, dtype, d):
    ours, steps = IN_KERNELS[name]
    x = torch.randn(V, 35, 2 * d)[..., :d] if layout == "strided rows" else torch.randn(V, 35, d)
    x = x.to(dtype).mT.contiguous().mT if layout == "strided features" else x.to(dtype)
    truth = run(steps, x.double())
    result, dense = run(ours, x), run(steps, x)
    assert [r.dtype for r in result] == [r.dtype for r in dense]
    for of_result, of_dense in zip(error(result, truth), error(dense, truth), strict=True):
        assert of_result <= DENSE_FACTOR * of_dense


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.5, 1.0])
@pytest.mark.parametrize("factor", [0.3, torch.tensor([0.3]), torch.full((2100,), 0.3)], ids=["number", "one", "rows"])
@TRITON
def test_scales_by_a_power(factor, power):
    """Also of a tensor with one factor for each row, which the kernels leave to PyTorch."""
    results = []
    for dtype, backend in ((torch.float64, "tiled"), (torch.float32, "triton"), (torch.float32, "tiled")):
        x = torch.randn(2100, 9, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        t = factor.to(dtype).requires_grad_() if isinstance(factor, torch.Tensor) else factor
        rows, scale = rowwise.with_scale(x, t, power, backend)
        weight = torch.linspace(-1.0, 2.0, 2100, dtype=dtype)
        leaves = [value for value in (x, t) if isinstance(value, torch.Tensor)]
        grads = torch.autograd.grad((weight * scale).sum() + rows.square().sum(), leaves)
        results.append((rows.detach(), scale.detach(), *grads))
    truth, ours, dense = results
    for of_ours, of_dense in zip(error(ours, truth), error(dense, truth), strict=True):
        assert of_ours <= max(DENSE_FACTOR * of_dense, 2e-7)


def formula(lse, positive, totals, **options):
    arguments = [value.detach().clone().requires_grad_() for value in (positive, *lse, *totals)]
    s, *others = arguments
    value = contrast_sum(s, others[: len(lse)], others[len(lse) :], **options)
    return value.detach(), *torch.autograd.grad(value * 3.0, arguments)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("smoothing", [{}, {"slope": 0.09, "share": 0.01}], ids=["plain", "smoothing"])
@TRITON
def test_formula(smoothing, directions):
    """Rows without negatives, certain, undecided and lost ones; more than one step."""
    z = torch.linspace(-80.0, 80.0, 1100)
    positive = torch.linspace(-3.0, 3.0, 1100)
    lse = [z + positive, (z.flip(0) + positive)][:directions]
    lse[0] = lse[0].index_fill(0, torch.tensor([0, 7]), -torch.inf)
    totals = [torch.randn(1100) for _ in lse] if smoothing else []
    options = smoothing | {"divisor": 1100.0 * directions}
    double = [value.double() for value in (*lse, positive, *totals)]
    truth = formula(double[:directions], double[directions], double[directions + 1 :], **options, backend="tiled")
    for result, right in zip(formula(lse, positive, totals, **options, backend="triton"), truth, strict=True):
        torch.testing.assert_close(result.double(), right, rtol=1e-5, atol=0.0)  # a difference of 80 is rounded


@TRITON
def test_formula_of_tiny_losses():
    positive = torch.zeros(1)
    for z in (-1.0, -10.0, -30.0, -80.0):
        value, of_positive, of_lse = formula([torch.tensor([z])], positive, [], divisor=1.0, backend="triton")
        assert value.item() == pytest.approx(math.log1p(math.exp(z)), rel=5e-6)
        assert of_lse.item() == -of_positive.item() == pytest.approx(3.0 / (1.0 + math.exp(-z)), rel=5e-6)


@TRITON
@pytest.mark.parametrize("names", [("row", "col"), ("row",), ("col",), ()], ids=str)
def test_what_backward_reads(names):
    """As of PyTorch; an index beyond the columns names none, whatever 64 bits it has."""
    sides = {}
    for name, size in (("row", 1030), ("col", 9)):
        maximum, log_sum = torch.randn(size), torch.rand(size)
        maximum[3], log_sum[3] = -torch.inf, -torch.inf
        sides[name] = (torch.randn(size), maximum, log_sum) if name in names else None
    index = torch.tensor([0, 8, 9, -1, -5, 2**32, 2**40 + 3, 5] * 128)
    x, results = torch.empty(1, 1), []
    for kernels in (backends.triton._engine(), cuda.CudaKernels("contrastive_ops_cuda")):
        incoming, below = sweep._incoming(kernels, x, sides["row"], sides["col"], index, 9)
        assert torch.equal(below, sweep._index_below(kernels, x, 9, index))
        results.append([*incoming[:4], below])
    torch.testing.assert_close(*results)
    assert results[0][-1].dtype == torch.int32


LAUNCHED = {
    "scale": lambda x, t: rowwise.with_scale(x, t, -0.5, "triton"),
    "units": lambda x, t: rowwise.unit_tuples(x, t * x.roll(1, 0), backend="triton"),
    "contrast": lambda x, t: (contrast_sum(t * x[0], x[1:3], x[3:5], 0.3, 0.2, divisor=2.0, backend="triton"),),
    "classes": lambda x, t: (lambda one, other, mean: (*one, *other, mean))(
        *with_class_mean(x, t.expand(5), by_class(torch.tensor([1, 2, 1, 1, 0]), x, "triton"), "triton")
    ),
    "class contrast": lambda x, t: (
        class_contrast_sum(t * x[0], x[1], x[2], torch.arange(6.0), False, divisor=2.0, backend="triton"),
    ),
}


@TRITON
@pytest.mark.parametrize("name", LAUNCHED)
def test_kernels_and_the_transforms(name, monkeypatch):
    """Differentiated again, for many gradients at once, in forward mode and under torch.func: the steps of PyTorch."""

    def results():
        torch.manual_seed(0)
        x, t = torch.randn(5, 6).requires_grad_(), torch.tensor([0.7]).requires_grad_()

        def loss(x, t):
            return sum(value.pow(3).sum() for value in LAUNCHED[name](x, t))

        first = torch.autograd.grad(loss(x, t), (x, t), create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), (x, t))
        many = torch.autograd.grad(loss(x, t).expand(2), (x, t), torch.eye(2), is_grads_batched=True)
        x, t = x.detach(), t.detach()
        transformed = torch.func.vmap(torch.func.grad(loss), (0, None))(torch.stack([x, 2 * x]), t)
        with forward_ad.dual_level():
            dual = loss(forward_ad.make_dual(x, x.cos()), t)
            return (*first, *second, *many, transformed, forward_ad.unpack_dual(dual).tangent)

    ours = results()
    monkeypatch.setattr(rowwise, "in_kernels", lambda *_: False)
    torch.testing.assert_close(ours, results(), rtol=1e-4, atol=1e-5)


@TRITON
@pytest.mark.parametrize("name", LAUNCHED)
def test_kernels_in_inference_mode_and_of_what_is_frozen(name):
    x, t = torch.randn(5, 6), torch.tensor([0.7])
    expected = LAUNCHED[name](x, t)
    with torch.inference_mode():
        inside = LAUNCHED[name](x.clone(), t.clone())
    assert all(torch.equal(a, b.clone()) for a, b in zip(expected, inside, strict=True))
    t.requires_grad_()
    sum(value.sum() for value in LAUNCHED[name](x, t)[-1:]).backward()
    assert t.grad.isfinite().all()
    assert not (name == "scale" and LAUNCHED[name](x, t)[0].requires_grad)


@TRITON
@pytest.mark.parametrize("n", [0, 1])
def test_kernels_of_no_rows_and_one_row(n):
    x, y, t = torch.randn(n, 5).requires_grad_(), torch.randn(n, 5).requires_grad_(), torch.tensor(0.7).requires_grad_()
    for loss in (
        co.clip_loss(x, y, t, backend="triton"),
        co.nt_xent(x, y, temperature=t, backend="triton"),
        co.supcon(torch.stack([x, y], 1), torch.arange(n), temperature=t, backend="triton"),
        co.gram_loss(x, y, temperature=t, backend="triton"),
    ):
        assert loss.item() == 0.0 or (n == 1 and loss.item() < 1.0)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (x, y, t)))


@TRITON
@pytest.mark.parametrize("members", [1, 2, 3, 4, 5])
def test_factors_of_sets(members):
    """As in PyTorch, all in float64: also of vectors that depend on those before, and of zeros."""
    kernels = backends.triton.kernels("rowwise")
    sets = torch.randn(9, members, 37)
    sets[1, -1] = sets[1, 0]
    sets[2] = 0.0
    basis = tuples.factor(sets)
    torch.testing.assert_close(kernels.factor(sets), tuple(basis), rtol=1e-9, atol=1e-12)
    weight = torch.randn(9)
    truth = tuples.volume_gradient(sets.double(), basis.inverse, weight.double())
    torch.testing.assert_close(
        kernels.volume_gradient(sets, basis.inverse, weight).double(), truth, rtol=1e-6, atol=1e-6
    )
    if members == 5:
        return
    anchor, scale = torch.randn(6, 37), torch.rand(9)
    *_, triangles, of_columns, squares, q = kernels.span(anchor, sets, scale, True)
    torch.testing.assert_close(triangles, tuples.triangles(basis, anchor))
    torch.testing.assert_close(of_columns, tuples.column_weight(basis, scale, anchor))
    torch.testing.assert_close(squares, tuples.squares(anchor))
    torch.testing.assert_close(q, tuples.orthonormal(sets, basis))
    moments = torch.randn(members, 9, 37)
    truth = tuples.tuple_gradient(sets.double(), basis, moments.transpose(0, 1).double(), weight.double())
    found = kernels.tuple_gradient(sets, *basis, moments, weight)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
