"""The flex ops against their dense twins in float64, with pair functions that users write."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
from tolerance import evaluate, judge
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import contrastive_ops as co
from contrastive_ops.ops import flex

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPS = ("flex_logsumexp", "flex_sum")
CLASSES = 5
SHAPES = ((1, 1, 1), (1, 65, 8), (63, 1, 17), (7, 2, 4), (64, 129, 16))

op = pytest.mark.parametrize("op", OPS)


def score_and_mask(kind: str, vectors: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Any]:
    """The two functions of a kind of pair. The table of classes is flat: the judge permutes what has features."""
    row_label, col_label = labels["row_label"], labels["col_label"]

    def by_table(score, row, col):
        return vectors["scale"] * score + vectors["table"][row_label[row] * CLASSES + col_label[col]]

    def by_vectors(score, row, col):
        return score * vectors["row_scale"][row] + vectors["col_bias"][col]

    def by_distance(score, row, col):
        return (row_label[row] - col_label[col]).abs() * F.softplus(vectors["scale"] * score - 0.5)

    def margin(score, row, col):
        return torch.where(row_label[row] == col_label[col], score - vectors["row_scale"][row], score).tanh()

    def others(row, col):
        return row_label[row] != col_label[col]

    def not_last(row, col):
        return col != len(col_label) - 1  # broadcasts

    score_mod, mask_mod = {
        "plain": (None, None),
        "masked": (None, others),
        "table": (by_table, None),
        "vectors": (by_vectors, not_last),
        "distance": (by_distance, None),
        "margin": (margin, others),
    }[kind]
    return {"score_mod": score_mod, "mask_mod": mask_mod}


KINDS = ("plain", "masked", "table", "vectors", "distance", "margin")
READ = {"table": ("scale", "table"), "vectors": ("row_scale", "col_bias"), "distance": ("scale",),
        "margin": ("row_scale",)}  # fmt: skip


def problem(kind: str, n: int, m: int | None, d: int, dtype: torch.dtype = torch.float32):
    """x, y (without m self-similarity) and what the pair function reads."""
    generator = torch.Generator().manual_seed(0)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32

    def unit(size):
        x = torch.randn(size, d, generator=generator, dtype=torch.float64)
        return (2 * F.normalize(x, dim=1)).to(dtype).requires_grad_()

    sides = (unit(n),) if m is None else (unit(n), unit(m))
    m = n if m is None else m
    sizes = {"scale": (), "table": (CLASSES**2,), "row_scale": (n,), "col_bias": (m,)}
    vectors = {
        name: (0.5 + torch.rand(sizes[name], generator=generator, dtype=torch.float64)).to(statistics).requires_grad_()
        for name in READ.get(kind, ())
    }
    labels = {
        "row_label": torch.randint(CLASSES, (n,), generator=generator),
        "col_label": torch.randint(CLASSES, (m,), generator=generator),
    }
    if len(sides) == 1:
        labels["col_label"] = labels["row_label"]
    return sides, vectors | labels | {"kind": kind}


def call(function: Any, arguments: tuple[Tensor, ...], options: dict[str, Any], **more: Any) -> tuple[Tensor, ...]:
    options = dict(options)
    kind = options.pop("kind")
    labels = {name: options.pop(name) for name in ("row_label", "col_label")}
    vectors = {name: options.pop(name) for name in READ.get(kind, ())}
    out = function(*arguments, **score_and_mask(kind, vectors, labels), **options, **more)
    asked = (options.get("rows", True), options.get("cols", False))
    return tuple(value for value, wanted in zip(out, asked, strict=True) if wanted)


def both(op: str, **more: Any) -> tuple[Any, Any]:
    def fused(*arguments, **options):
        parameters = [options[name] for name in READ.get(options["kind"], ())]
        return call(getattr(co, op), arguments, options, parameters=parameters, **more)

    def naive(*arguments, **options):
        return call(getattr(co.reference, op), arguments, options)

    return fused, naive


@op
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [70, None], ids=["two sides", "self"])
def test_kinds_of_pairs(m, dtype, kind, op):
    arguments, options = problem(kind, 65, m, 17, dtype)
    judge(*both(op), arguments, options | {"cols": True})


@op
@pytest.mark.parametrize("flags", [{}, {"rows": False, "cols": True}], ids=["rows", "cols"])
@pytest.mark.parametrize("kind", ["plain", "masked", "table"])
def test_one_direction(kind, flags, op):
    arguments, options = problem(kind, 40, 33, 9)
    judge(*both(op), arguments, options | flags)


@op
@pytest.mark.parametrize("kind", ["masked", "vectors"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, kind, op):
    arguments, options = problem(kind, *shape)
    judge(*both(op), arguments, options | {"cols": True})


@op
@pytest.mark.parametrize("side", [1, 7, 64])
@pytest.mark.parametrize("kind", ["table", "margin"])
def test_tiles_of_any_size(kind, side, op, monkeypatch):
    monkeypatch.setattr(flex, "SIDE_ON_CPU", side)
    arguments, options = problem(kind, 23, 64, 9)
    judge(*both(op), arguments, options | {"cols": True})


@pytest.mark.usefixtures("two_threads")
@op
@pytest.mark.parametrize("kind", ["vectors", "margin"])
def test_beyond_one_tile(kind, op):
    arguments, options = problem(kind, 520, 1030, 16)
    judge(*both(op), arguments, options | {"cols": True}, roundings=1)


@op
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, op, monkeypatch):
    monkeypatch.setattr(flex, "SIDE_ON_CPU", 4)
    fused, naive = both(op)
    arguments, options = problem(kind, 6, 7, 5, torch.float64)
    names = READ.get(kind, ())

    def function(form):
        # the log-sum-exp of an empty column has no differences
        cols = kind != "vectors" or op == "flex_sum"
        return lambda x, y, *vectors: form(x, y, **options | dict(zip(names, vectors, strict=True)), cols=cols)

    inputs = (*arguments, *(options[name] for name in names))
    torch.autograd.gradcheck(function(fused), inputs)
    torch.autograd.gradgradcheck(function(naive), inputs)


@op
def test_every_subset_of_requires_grad_gives_the_same_gradients(op):
    fused, _ = both(op)
    arguments, options = problem("vectors", 20, 17, 5)
    leaves = {"argument0": arguments[0], "argument1": arguments[1], **{name: options[name] for name in READ["vectors"]}}
    everything = evaluate(fused, arguments, options)
    for wanted in range(1, 15):
        subset = [name for i, name in enumerate(leaves) if wanted >> i & 1]
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in subset)
        results = evaluate(fused, arguments, options)
        assert {f"grad of {name}" for name in subset} <= results.keys()
        for name, value in results.items():
            assert torch.equal(value, everything[name]), name


def test_large_logits():
    """Maxima are online, and statistics keep apart what a log-sum-exp of 1e4 would round."""
    arguments, options = problem("vectors", 30, 33, 9)
    options["row_scale"] = (options["row_scale"].detach() * 3e3).requires_grad_()
    judge(*both("flex_logsumexp"), arguments, options | {"cols": True}, logits=1e4)


@op
def test_sums_keep_their_digits(op):
    """A hundred tiles of one row; a running sum in float32 would be off by some 1e-6."""
    x, y = torch.ones(1, 1), 0.1 + torch.rand(51_200, 1)
    (value, _), (truth, _) = getattr(co, op)(x, y), getattr(co.reference, op)(x.double(), y.double())
    torch.testing.assert_close(value.double(), truth, rtol=2e-7, atol=0.0)


@op
def test_empty_sets(op):
    """Rows and columns without a pair, and a whole plane of them: -inf or 0, with zero gradients."""
    absent = -math.inf if op == "flex_logsumexp" else 0.0
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    for some in (True, False):
        out = getattr(co, op)(
            x,
            y,
            score_mod=lambda score, row, col: scale * score.exp(),
            mask_mod=lambda row, col, some=some: (row != 2) & (col != 3) & some,
            parameters=(scale,),
            cols=True,
        )
        assert out[0][2] == out[1][3] == absent
        assert some or all((value == absent).all() for value in out)
        grads = torch.autograd.grad(sum(value.sin().nan_to_num().sum() for value in out), (x, y, scale))
        assert all(grad.isfinite().all() for grad in grads)
        assert (grads[0][2] == 0).all()
        assert (grads[1][3] == 0).all()
        assert some or all((grad == 0).all() for grad in grads)


@op
@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sides(n, m, op):
    x, y, scale = (torch.ones(shape, requires_grad=True) for shape in ((n, 3), (m, 3), ()))
    out = getattr(co, op)(x, y, score_mod=lambda score, row, col: scale * score, parameters=[scale], cols=True)
    assert [value.tolist() for value in out] == [[-math.inf if op == "flex_logsumexp" else 0.0] * k for k in (n, m)]
    grads = torch.autograd.grad(sum(value.sum() for value in out), (x, y, scale), materialize_grads=True)
    assert all((grad == 0).all() for grad in grads)


def test_what_is_not_asked_for_is_empty_and_has_no_gradient():
    x = torch.randn(4, 3, requires_grad=True)
    for flags in ({}, {"rows": False, "cols": True}):
        out = co.flex_sum(x, **flags)
        assert sorted(len(value) for value in out) == [0, 4]
        assert [value.requires_grad for value in out] == [len(value) > 0 for value in out]
        sum(value.sum() for value in out).backward()


@op
def test_rows_of_nan_stay_where_they_are(op):
    x, y = torch.randn(600, 4), torch.randn(30, 4)
    expected = getattr(co, op)(x, y)[0]
    x[[3, 520]] = math.nan
    x.requires_grad_()
    row, _ = getattr(co, op)(x, y)
    rest = torch.ones(600, dtype=torch.bool).index_fill(0, torch.tensor([3, 520]), False)
    assert torch.equal(row.isnan(), ~rest)
    torch.testing.assert_close(row[rest], expected[rest])
    (grad,) = torch.autograd.grad(row[rest].sum(), x)
    assert grad[rest].isfinite().all()


@op
def test_an_infinite_derivative_where_a_pair_takes_no_part_does_not_count(op):
    """The distance of unit vectors, whose derivative is infinite at 0: of each with itself, which is left out."""
    x = torch.eye(6, dtype=torch.float64).requires_grad_()
    names = {"score_mod": lambda score, row, col: -(2 - 2 * score).sqrt(), "mask_mod": lambda row, col: row != col}
    got, expected = (
        torch.autograd.grad(getattr(form, op)(x, **names)[0].sin().sum(), x)[0] for form in (co, co.reference)
    )
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("two_threads")
@op
def test_runs_are_bitwise_repeatable(op):
    arguments, options = problem("margin", 600, 520, 20)
    first, second = (evaluate(both(op)[0], arguments, options | {"cols": True}) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@op
@pytest.mark.parametrize("kind", ["plain", "vectors"])
def test_autocast_changes_nothing(kind, op):
    arguments, options = problem(kind, 40, 33, 9)
    expected = evaluate(both(op)[0], arguments, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = evaluate(both(op)[0], arguments, options)
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name


def test_layout_does_not_matter():
    arguments, options = problem("table", 40, 33, 9)
    expected = evaluate(both("flex_logsumexp")[0], arguments, options)
    strided = [x.detach().repeat_interleave(2, 1)[:, ::2].requires_grad_() for x in arguments]
    for name, value in evaluate(both("flex_logsumexp")[0], strided, options).items():
        torch.testing.assert_close(value, expected[name])


def test_tiles_in_which_no_pair_takes_part_are_skipped(monkeypatch):
    monkeypatch.setattr(flex, "SIDE_ON_CPU", 10)
    label, tiles = torch.arange(40) // 10, []

    def score_mod(score, row, col):
        tiles.append((int(row[0, 0]), int(col[0, 0])))
        return score

    out = co.flex_sum(torch.ones(40, 2), score_mod=score_mod, mask_mod=lambda row, col: label[row] == label[col])
    assert out.row_sum.tolist() == [20.0] * 40
    assert set(tiles) == {(k, k) for k in (0, 10, 20, 30)}


# parameters
def test_a_parameter_may_be_computed_and_have_hooks():
    """Hooks see the gradient once, whole; one parameter that depends on another does not count twice."""
    x = torch.randn(9, 4)
    log_scale = torch.tensor(0.3, requires_grad=True)
    scale = log_scale.exp()
    scale.retain_grad()
    seen = []
    for each in (log_scale, scale):
        each.register_hook(seen.append)

    def loss(form, **parameters):
        mod = {"score_mod": lambda score, row, col: scale * score + log_scale * row}
        return form.flex_logsumexp(x, **mod, **parameters)[0].sum()

    (expected,) = torch.autograd.grad(loss(co.reference), log_scale, retain_graph=True)
    of_scale, scale.grad = scale.grad, None
    seen.clear()
    loss(co, parameters=(log_scale, scale)).backward()
    torch.testing.assert_close(log_scale.grad, expected)
    torch.testing.assert_close(scale.grad, of_scale)
    assert len(seen) == 2


def test_only_what_is_read_gets_a_gradient():
    x, used, unused = torch.randn(9, 4), torch.ones(9, requires_grad=True), torch.ones(9, requires_grad=True)
    out = co.flex_sum(x, score_mod=lambda score, row, col: used[row] * score, parameters=iter([unused, used]))
    out.row_sum.sum().backward()
    assert used.grad is not None
    assert unused.grad is None
    assert not co.flex_sum(x, score_mod=lambda s, r, c: s, parameters=[unused]).row_sum.requires_grad
    with torch.no_grad():
        assert not co.flex_sum(x, score_mod=lambda s, r, c: used[r] * s).row_sum.requires_grad


def test_a_term_may_be_a_parameter_itself_or_not_depend_on_scores():
    x, term = torch.randn(1, 3, requires_grad=True), torch.tensor([[2.0]], requires_grad=True)
    out = co.flex_logsumexp(x, score_mod=lambda s, r, c: term, parameters=[term], cols=True)
    assert [value.item() for value in out] == [2, 2]
    grad_x, grad = torch.autograd.grad(sum(value.sum() for value in out), (x, term))
    assert grad.item() == 2
    assert (grad_x == 0).all()
    x, matrix = torch.randn(5, 3, requires_grad=True), torch.randn(5, 5)
    before = matrix.clone()
    out = co.flex_sum(x, score_mod=lambda s, r, c: matrix[: len(r), : c.shape[1]], mask_mod=lambda r, c: r != c)
    torch.testing.assert_close(out.row_sum, matrix.sum(1) - matrix.diagonal())
    assert torch.equal(matrix, before)  # masks are not written into it


@pytest.mark.parametrize("computed", [False, True])
def test_a_tensor_that_would_lose_its_gradient_raises(computed):
    scale = torch.ones(3, requires_grad=True)
    read = scale.exp() if computed else scale
    sentence = (
        "score_mod must read no tensor that requires a gradient and is not in parameters, got one of shape (3,), or "
        "one computed from it; pass the very tensor that it reads in parameters=, or detach it."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        co.flex_sum(torch.ones(3, 2), score_mod=lambda s, r, c: s * read[r], parameters=(scale,) if computed else ())
    co.flex_sum(torch.ones(3, 2), score_mod=lambda s, r, c: s * read[r], parameters=(read,))


def test_a_parameter_that_has_changed_since_forward_raises():
    x, scale = torch.ones(3, 2), torch.ones((), requires_grad=True)
    out = co.flex_sum(x, score_mod=lambda s, r, c: s * scale, parameters=[scale])
    with torch.no_grad():
        scale += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.row_sum.sum().backward()


class Margins(torch.nn.Module):
    """Class prototypes with a learnable margin and scale, and a small network on scores."""

    def __init__(self, classes: int, d: int) -> None:
        super().__init__()
        self.prototypes = torch.nn.Parameter(torch.randn(classes, d))
        self.margin = torch.nn.Parameter(torch.zeros(classes))
        self.network = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))

    def forward(self, x: Tensor, label: Tensor, form: Any = co) -> Tensor:
        def score_mod(score, row, col):
            bent = score + self.network(score.unsqueeze(-1)).squeeze(-1)
            return torch.where(label[row] == col, bent, bent + F.softplus(self.margin[label[row]]))

        options = {"parameters": [self.margin, *self.network.parameters()]} if form is co else {}
        keys = F.normalize(self.prototypes)
        negatives = form.flex_logsumexp(x, keys, score_mod=score_mod, **options)[0]
        positive = (x * keys[label]).sum(1)
        positive = positive + self.network(positive.unsqueeze(-1)).squeeze(-1)
        return (negatives - positive).mean()


def test_training_of_a_module():
    torch.manual_seed(3)
    module, label = Margins(7, 6), torch.arange(40) % 7
    x = F.normalize(torch.randn(7, 6)[label] + 0.3 * torch.randn(40, 6))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    for _ in range(10):
        loss, expected = module(x, label), module(x, label, co.reference)
        torch.testing.assert_close(loss, expected)
        dense = torch.autograd.grad(expected, list(module.parameters()))
        optimizer.zero_grad()
        loss.backward()
        for parameter, grad in zip(module.parameters(), dense, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# contracts with PyTorch
@op
def test_differentiating_twice_is_refused_except_by_the_reference(op):
    fused, _ = both(op)
    arguments, options = problem("vectors", 5, 6, 4, torch.float64)
    (grad,) = torch.autograd.grad(fused(*arguments, **options)[0].sum(), arguments[0], create_graph=True)
    sentence = (
        f"{op} is differentiable once, got a second differentiation (create_graph=True); call "
        f"contrastive_ops.reference.{op}, which autograd differentiates to any order."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}$"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_transforms_are_refused():
    x = torch.randn(4, 3)
    with pytest.raises(
        RuntimeError, match=r"^flex_sum can't run under a transform of torch\.func .* contrastive_ops\.reference"
    ):
        torch.func.grad(lambda z: co.flex_sum(z).row_sum.sum())(x)
    with pytest.raises(RuntimeError, match=r"^flex_sum can't run under a transform of torch\.func"):
        torch.vmap(lambda z: co.flex_sum(z).row_sum)(x[None])
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"^flex_sum has no forward-mode derivative, .* contrastive_ops\.reference"),
    ):
        co.flex_sum(forward_ad.make_dual(x, x))
    with pytest.raises(
        RuntimeError, match=r"^flex_sum can't be recorded by torch\.jit\.trace, .* contrastive_ops\.reference"
    ):
        torch.jit.trace(lambda z: co.flex_sum(z).row_sum, x, check_trace=False)


def test_batched_gradients_are_refused():
    x = torch.randn(4, 3, requires_grad=True)
    out = co.flex_sum(x).row_sum
    with pytest.raises(RuntimeError, match=r"^flex_sum takes one gradient at a time"):
        torch.autograd.grad(out, x, torch.eye(4), is_grads_batched=True)


def test_checkpoint():
    x, log_scale = torch.randn(6, 3, requires_grad=True), torch.zeros((), requires_grad=True)

    def loss(x):
        scale = log_scale.exp()
        return co.flex_logsumexp(x, score_mod=lambda s, r, c: scale * s, parameters=[scale]).row_lse.sum()

    expected = torch.autograd.grad(loss(x), (x, log_scale))
    got = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), (x, log_scale))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


# Dynamo hides this warning where warnings are no errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_under_an_outer_compile_there_is_a_break():
    torch.compiler.reset()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(x, y, log_scale, label):
        scale = log_scale.exp()
        z = F.normalize(x)
        row, _ = co.flex_logsumexp(
            z,
            y,
            score_mod=lambda s, r, c: scale * s,
            mask_mod=lambda r, c: label[r] != label[c],
            parameters=[scale],
        )
        return (2 * row).mean()

    for n in (6, 9):
        x, y = (torch.randn(n, 4, requires_grad=True) for _ in range(2))
        log_scale, label = torch.tensor(0.2, requires_grad=True), torch.arange(n) % 3
        got, expected = (
            form(x, y, log_scale, label) for form in (torch.compile(loss, backend=counted, dynamic=True), loss)
        )
        torch.testing.assert_close(got, expected)
        leaves = (x, y, log_scale)
        for one, other in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(one, other)
    assert 2 <= len(graphs) <= 4
    with pytest.raises(torch._dynamo.exc.Unsupported, match="flex_logsumexp runs functions of yours, tile by tile"):
        torch.compile(lambda x: co.flex_logsumexp(x), backend="eager", fullgraph=True)(x)


@pytest.fixture
def compiled_graphs(monkeypatch):
    """The graphs that torch.compile makes; none of them goes to a C++ compiler."""
    torch.compiler.reset()
    compile_with, graphs = torch.compile, []

    def counted(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_with(*args, **options, backend=counted))
    return graphs


@op
def test_compiled_tiles(op, monkeypatch, compiled_graphs):
    """One graph without gradients and one with them: fresh closures of each step find those of the first."""
    monkeypatch.setattr(flex, "SIDE_ON_CPU", 16)
    for seed in range(3):
        torch.manual_seed(seed)
        arguments, options = problem("table", 32, 48, 9)
        arguments = [torch.randn_like(x).requires_grad_() for x in arguments]
        expected = evaluate(both(op)[0], arguments, options)
        for name, value in evaluate(both(op, compile=True)[0], arguments, options).items():
            torch.testing.assert_close(value, expected[name])
    assert len(compiled_graphs) == 2


@pytest.mark.usefixtures("compiled_graphs")
def test_a_score_mod_that_the_user_has_compiled():
    scale, x = torch.tensor(2.0, requires_grad=True), torch.randn(5, 3)
    seen = []
    score_mod = torch.compile(lambda s, r, c: scale * s)
    assert isinstance(flex._compiled(score_mod._torchdynamo_orig_callable, (scale,)), flex._Compiled)
    out = co.flex_sum(x, score_mod=score_mod, parameters=[scale]).row_sum
    torch.testing.assert_close(out, 2 * (x @ x.T).sum(1))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), scale)[0], (x @ x.T).sum())
    scale.register_hook(seen.append)  # once, for the whole gradient: by eager tiles
    co.flex_sum(x, score_mod=score_mod, parameters=[scale]).row_sum.sum().backward()
    assert len(seen) == 1


def test_where_compilation_fails_there_is_one_warning(monkeypatch):
    def broken(function, **options):
        def run(*arguments):
            raise ValueError("no compiler\nhere")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(flex._Compiled, "failed", set())
    x = torch.ones(3, 2, requires_grad=True)

    def twice(score, row, col):
        return 2 * score

    with pytest.warns(UserWarning, match=r"^torch\.compile failed on score_mod, which runs without it: no compiler$"):
        out = co.flex_sum(x, score_mod=twice, compile=True)
    assert out.row_sum.tolist() == [12.0] * 3
    out.row_sum.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        co.flex_sum(x, score_mod=twice, compile=True)
    with pytest.raises(ZeroDivisionError):
        co.flex_sum(x.detach(), score_mod=lambda s, r, c: s / (1 // 0), compile=True)


ONE = torch.ones(3, 2)
ERRORS = {
    "score_mod": (
        {"score_mod": 2},
        TypeError,
        "score_mod must be a function of (score, row, col) or None, got int; pass one that reads it, such as a lambda.",
    ),
    "mask_mod": (
        {"mask_mod": ONE},
        TypeError,
        "mask_mod must be a function of (row, col) or None, got Tensor; pass one that reads it, such as a lambda.",
    ),
    "one parameter": (
        {"parameters": ONE},
        TypeError,
        "parameters must be tensors, one after another, got Tensor; put it into a tuple.",
    ),
    "named parameters": (
        {"parameters": {"a": ONE}},
        TypeError,
        "parameters must be tensors, one after another, got dict; pass a tuple of those that score_mod reads.",
    ),
    "integers": (
        {"parameters": (ONE, ONE.long())},
        TypeError,
        "parameters[1] must be a floating-point tensor, got int64; call parameters[1].float().",
    ),
    "no tensor": (
        {"score_mod": lambda s, r, c: 1.0},
        TypeError,
        "score_mod must return a tensor, got float; return the terms of a tile.",
    ),
    "shape": (
        {"score_mod": lambda s, r, c: s.sum(1, keepdim=True)},
        ValueError,
        "score_mod must return a term for each pair of a tile, of shape (3, 3), got (3, 1); row has shape "
        "(R, 1) and col (1, C), so that what they index is of the shape of score beside it.",
    ),
    "dtype": (
        {"score_mod": lambda s, r, c: s.double()},
        TypeError,
        "score_mod must return the dtype of score, float32, got float64; cast what it reads with .to(score.dtype).",
    ),
    "mask of floats": (
        {"mask_mod": lambda r, c: (r == c).float()},
        TypeError,
        "mask_mod must return a bool tensor, True where a pair takes part, got float32; return a comparison.",
    ),
    "mask of no tensor": (
        {"mask_mod": lambda r, c: True},
        TypeError,
        "mask_mod must return a tensor, got bool; compare row, col or what they index.",
    ),
    "shape of mask": (
        {"mask_mod": lambda r, c: r[:, 0] == 1},
        ValueError,
        "mask_mod must return a tile of shape (3, 3), or one that broadcasts to it, got (3,); index with row "
        "and col as they come.",
    ),
    "directions": (
        {"rows": False},
        ValueError,
        "rows or cols must be True, got rows=False, cols=False; there would be nothing to do.",
    ),
    "compile": (
        {"compile": "yes"},
        ValueError,
        "compile must be one of True, False, got 'yes'.",
    ),
}


@pytest.mark.parametrize(("options", "error", "sentence"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(options, error, sentence):
    with torch.no_grad(), pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        co.flex_logsumexp(ONE, **options)


@pytest.mark.parametrize("x", [ONE.long(), ONE[0], None])
def test_errors_of_features(x):
    with pytest.raises((TypeError, ValueError), match=r"^x must "):
        co.flex_sum(x)
    with pytest.raises((TypeError, ValueError), match=r"^y must "):
        co.flex_sum(ONE, ONE.double())
