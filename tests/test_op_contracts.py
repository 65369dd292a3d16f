"""The contracts with PyTorch of every op over pairs: opcheck of what really runs, torch.compile, transforms, errors."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from problems import EXPECTATIONS, LOGSUMEXP, OPS, SUMS, Op, problem
from tolerance import evaluate
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

import contrastive_ops as co
from contrastive_ops.ops import similarity_topk

OTHERS = [op for op in OPS if op != LOGSUMEXP]  # test_compile.py has the log-sum-exp's
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@dataclass
class Calls(TorchDispatchMode):
    """What our ops are called with, forward and backward."""

    found: list = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "contrastive_ops":
            self.found.append((function, arguments))
        return function(*arguments, **options or {})


@pytest.mark.parametrize("name", ["both", "everything", "everything-restrict", "self-everything", "guide-everything"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, name, backend):
    if name not in op.options:
        pytest.skip(f"{op} has no guide")
    # of 16 bits the features alone: what is not there (y of self-similarity) has their dtype, too
    arguments, options = op.problem(name, 9, 7, 5, torch.bfloat16 if "self" in name else torch.float32)
    with Calls() as calls:
        evaluate(op.fused, arguments, options | {"backend": backend})
    assert [function._opname for function, _ in calls.found] == [op.name, f"{op.name}_backward"]
    for function, given in calls.found:
        given = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in given)
        torch.library.opcheck(function, given, test_utils=CHECKS)


def test_opcheck_of_topk(backend):
    if co.explain(torch.empty(1, 1), op="similarity_topk").reasons[backend] is not None:
        pytest.skip(f"{backend} has no similarity_topk")
    (x, y), options = problem("vectors-rows", 9, 7, 5)
    with Calls() as calls:
        similarity_topk(x, y, 3, **options, backend=backend)
    ((function, given),) = calls.found
    given = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in given)
    torch.library.opcheck(function, given, test_utils=CHECKS)


# two sizes that share no factor: a graph that remembers the first would recompile, or be wrong
@pytest.mark.parametrize("name", ["everything", "self-everything"])
@pytest.mark.parametrize("op", OTHERS)
def test_compiled(op, name, backend):
    """One graph for all N and M, forward and backward."""
    seen = []

    def counted(graph, inputs):
        seen.append(graph)
        return aot_eager(graph, inputs)

    def call(*arguments, **options):
        return op.fused(*arguments, **options, backend=backend)

    torch.compiler.reset()
    both = torch.compile(call, backend=counted, fullgraph=True, dynamic=True)
    for n, m in ((14, 25), (33, 9)):
        arguments, options = op.problem(name, n, m, 6)
        left, right = (evaluate(run, arguments, options) for run in (both, call))
        assert left.keys() == right.keys()
        for key, value in left.items():
            torch.testing.assert_close(value, right[key], rtol=1e-5, atol=1e-6)
    assert len(seen) == 1


def test_compiled_topk():
    def call(x, y):
        values, indices = similarity_topk(x, y, 3)
        return values.sum() + 0 * indices.sum()

    torch.compiler.reset()
    both = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, m in ((14, 25), (33, 9)):
        x, y = torch.randn(n, 6, requires_grad=True), torch.randn(m, 6, requires_grad=True)
        left, right = (torch.autograd.grad(run(x, y), (x, y)) for run in (both, call))
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("op", OTHERS)
def test_differentiating_twice_is_refused(op):
    arguments, options = op.problem("both", 5, 4, 3)
    total = sum(output.sum() for output in op.fused(*arguments, **options, backend="tiled"))
    (grad,) = torch.autograd.grad(total, arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op.name} is differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("op", OTHERS)
def test_autocast_leaves_the_op_alone(op, backend):
    arguments, options = op.problem("everything", 20, 30, 5)
    plain = op.fused(*arguments, **options, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = op.fused(*arguments, **options, backend=backend)
    assert all(torch.equal(left, right) for left, right in zip(plain, inside, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # the ops run once for each sample
@pytest.mark.parametrize("op", OTHERS)
def test_vmap_is_a_loop(op: Op):
    x, y = torch.randn(3, 5, 4), torch.randn(3, 6, 4)
    teacher = (torch.randn(3, 5, 2), torch.randn(3, 6, 2)) if op.teacher else ()
    options = {} if op.of is None else {"of": op.of}

    def total(*tensors):
        return op.fused(*tensors, **options, backend="tiled")[0].sum()

    mapped = torch.vmap(torch.func.grad(total))(x, y, *teacher)
    for i in range(3):
        expected = torch.func.grad(total)(*(of[i] for of in (x, y, *teacher)))
        torch.testing.assert_close(mapped[i], expected)


@pytest.mark.parametrize("op", [SUMS[1], EXPECTATIONS[0]])
def test_frozen_sides_receive_nothing(op, backend):
    """And cost nothing: the gradients of the others are the same bits."""
    arguments, options = op.problem("both", 70, 67, 9)
    everything = evaluate(op.fused, arguments, options | {"backend": backend})
    for frozen in range(len(arguments)):
        some = [x.detach().requires_grad_(i != frozen) for i, x in enumerate(arguments)]
        results = evaluate(op.fused, some, options | {"backend": backend})
        assert f"grad of argument{frozen}" not in results
        assert all(torch.equal(value, everything[key]) for key, value in results.items())


def test_sums_keep_the_digits_of_float32(backend):
    """2 x 3,000,000 terms of about 1e-3: float32 alone, one after the other, is off in the fourth digit."""
    sums = Op("similarity_sum", "softplus")
    if co.explain(torch.empty(1, 1), op="similarity_sum").reasons[backend] is not None:
        pytest.skip(f"{backend} has no similarity_sum")
    x, y = torch.randn(2, 2), torch.randn(3_000_000, 2)
    row_sum, col_sum = sums.fused(x, y, of="softplus", row_bias=-6.0, cols=True, backend=backend)
    expected = torch.nn.functional.softplus(x.double() @ y.double().T - 6.0)
    torch.testing.assert_close(row_sum.double(), expected.sum(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(col_sum.double(), expected.sum(0), rtol=1e-6, atol=1e-9)
