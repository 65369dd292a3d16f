"""What a row has to do with the others of its class: Triton's kernels in its interpreter, and plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from test_rowwise import TRITON
from tolerance import LOGITS, assert_accurate, judge
from torch.utils._python_dispatch import TorchDispatchMode

import contrastive_ops as co
from contrastive_ops import reference
from contrastive_ops.ops import (
    by_class,
    class_contrast_sum,
    in_order,
    sums_of_groups,
    with_class_mean,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # log(0) of an empty set, in numpy

# sizes that no tile divides; of classes that are shorter than a tile, longer than a step, and both
LABELS = {
    "none": torch.zeros(0, dtype=torch.int64),
    "one row": torch.tensor([7]),
    "one class": torch.zeros(277, dtype=torch.int32),
    "all different": torch.randperm(37, generator=torch.Generator().manual_seed(0)) - 2**40,
    "pairs": (torch.arange(70) // 2).to(torch.uint8),
    "mixed": torch.tensor([2] * 3 + [0] + [7] * 20 + [-1] * 5),
    "short and long": torch.tensor([-3] * 5 + [4] * 290 + [2] * 150 + [9] * 17 + [1] + [8] * 2)[torch.randperm(465)],
}
EACH = pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)


@EACH
@pytest.mark.parametrize("backend", ["tiled", pytest.param("triton", marks=TRITON)])
def test_classes(labels, backend):
    order, inverse, group, place, others = by_class(labels, torch.empty(len(labels), 1), backend)
    ordered = labels[order]
    assert torch.equal(order, labels.argsort(stable=True))
    assert torch.equal(order[inverse], torch.arange(len(labels)))
    assert torch.equal(place, torch.arange(len(labels), dtype=torch.int32))
    same = ordered[:, None] == ordered
    assert torch.equal(group[:, None] == group, same)
    assert torch.equal(others, same.sum(1) - 1.0)
    assert group.dtype == torch.int32
    assert not len(group) or 0 <= group.min() <= group.max() < len(group)


@TRITON
def test_classes_of_several_steps():
    """Of the program that has a number for each row."""
    labels = torch.randint(0, 900, (2300,)) ** 2
    found, expected = (by_class(labels, torch.empty(2300, 1), backend) for backend in ("triton", "tiled"))
    for name, value in found._asdict().items():
        assert torch.equal(value, getattr(expected, name)), name


def mean_of_classes(x, scale, labels, backend, used=slice(None)):
    """All that comes of it, as a loss uses it: the mean, and x and scale that go on."""
    one, other, mean = with_class_mean(x, scale, by_class(labels, x, backend), backend)
    passed = [x.float().square().sum(1) * scale for x, scale in (one, other)]
    return (mean, *passed)[used]


def naive_mean_of_classes(x, scale, labels, used=slice(None)):
    logits = scale[:, None] * scale * (x @ x.T)
    same = (labels[:, None] == labels) & ~torch.eye(len(x), dtype=torch.bool)
    mean = logits.masked_fill(~same, 0.0).sum(1) / same.sum(1).clamp(min=1)
    return (mean, *[x.square().sum(1) * scale] * 2)[used]


@EACH
@pytest.mark.parametrize(
    ("dtype", "d", "strided"), [(torch.float32, 37, False), (torch.float32, 150, True), (torch.float16, 20, True)]
)
@TRITON
def test_mean_and_gradients(labels, dtype, d, strided):
    labels = labels.sort().values
    x = torch.randn(len(labels), 2 * d)[:, :d] if strided else torch.randn(len(labels), d)
    x, scale = (x / d**0.5).to(dtype).requires_grad_(), torch.rand(len(labels)).requires_grad_()
    judge(
        lambda x, scale: mean_of_classes(x, scale, labels, "triton"),
        lambda x, scale: naive_mean_of_classes(x, scale, labels),
        (x, scale),
    )


@pytest.mark.parametrize("used", [slice(1), slice(1, None), slice(1, 2), slice(2)], ids=str)
@pytest.mark.parametrize("frozen", ["nothing", "x", "scale"])
@TRITON
def test_gradients_of_what_is_used(used, frozen):
    labels = torch.arange(40) // 3
    x, scale = torch.randn(40, 5), torch.rand(40)
    for name, value in (("x", x), ("scale", scale)):
        value.requires_grad_(name != frozen)
    judge(
        lambda x, scale: mean_of_classes(x, scale, labels, "triton", used),
        lambda x, scale: naive_mean_of_classes(x, scale, labels, used),
        (x, scale),
    )
    one, other, _ = with_class_mean(x, scale, by_class(labels, x), "triton")
    assert [value.requires_grad for value in (*one, *other)] == [x.requires_grad, scale.requires_grad] * 2


@pytest.mark.parametrize("learned", [False, True])
@TRITON
def test_one_scale_for_all_rows(learned):
    labels, scale = torch.arange(40) // 3, torch.tensor([1.5])
    x = torch.randn(40, 5).requires_grad_()
    judge(
        lambda x, t: with_class_mean(x, t if learned else 1.5, by_class(labels, x), "triton")[-1],
        lambda x, t: naive_mean_of_classes(x, t.expand(40), labels)[0],
        (x, scale.requires_grad_(learned)),
    )


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("divisor", [3.0, None])
@TRITON
def test_formula(divisor, inside):
    """Rows without positives or negatives, alone, in pairs, certain and lost ones; more than one step."""
    z = torch.linspace(-80.0, 80.0, 1100)
    positives = torch.linspace(-3.0, 3.0, 1100)
    mean, others = positives - torch.rand(1100), torch.arange(1100.0) % 4
    positives, negatives = positives.clone(), z + positives
    positives[5], negatives[[6, 9]] = -torch.inf, -torch.inf
    results = []
    for dtype, backend in ((torch.float64, "tiled"), (torch.float32, "triton")):
        leaves = [value.to(dtype).requires_grad_() for value in (negatives, positives, mean)]
        value = class_contrast_sum(*leaves, others.to(dtype), inside, divisor=divisor, backend=backend)
        results.append((value, *torch.autograd.grad(3.0 * value, leaves, materialize_grads=True)))
    for truth, found in zip(*results, strict=True):
        # a difference of 80 is rounded; PyTorch has sigmoid(z) - 1, which is 0 where sigmoid(-z) is not
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-15)


@pytest.mark.parametrize("name", ["mixed", "all different", "pairs"])
@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize(
    "options",
    [{}, {"empty": "drop"}, {"reduction": "sum"}, {"reduction": "none"}, {"normalize": False}],
    ids=str,
)
@TRITON
def test_supcon(name, variant, options):
    labels = LABELS[name]
    x, temperature = torch.randn(len(labels), 20).requires_grad_(), torch.tensor(0.3).requires_grad_()
    with torch.no_grad():
        x /= x.norm(dim=1, keepdim=True)
    judge(
        lambda x, t: co.supcon(x, labels, temperature=t, variant=variant, backend="triton", **options),
        lambda x, t: reference.supcon(x, labels, temperature=t, variant=variant, **options),
        (x, temperature),
        logits=LOGITS,
    )


@TRITON
def test_supcon_and_its_statistics():
    x, labels = torch.randn(33, 2, 8), torch.randint(0, 5, (33,))
    loss, stats = co.supcon(x, labels, return_stats=True, backend="triton")
    assert torch.equal(loss, co.supcon(x, labels, backend="triton"))
    _, expected = co.supcon(x.double(), labels, return_stats=True, backend="tiled")
    for value, truth in zip(stats, expected, strict=True):
        assert_accurate(value, truth)


def test_rows_in_order():
    x, labels = torch.randn(9, 4, dtype=torch.float64).requires_grad_(), torch.arange(9) % 4
    classes = by_class(labels, x)
    assert torch.equal(in_order(x, classes), x[labels.argsort(stable=True)])
    assert torch.autograd.gradcheck(lambda x: in_order(x, classes), x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: in_order(x, classes), x)


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_sums_on_a_gpu_are_repeatable(monkeypatch):
    """There index_add adds with atomics, and index_put in the order of the rows."""
    x, group = torch.randn(50, 3, dtype=torch.float64).requires_grad_(), torch.randint(0, 50, (50,), dtype=torch.int32)
    expected = sums_of_groups(x, group)
    gradient = torch.autograd.grad(expected.pow(2).sum(), x)[0]
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _self: True))
    with Names() as mode:
        found = sums_of_groups(x, group)
        again = torch.autograd.grad(found.pow(2).sum(), x)[0]
    assert not any("index_add" in name or "scatter" in name for name in mode.names)
    torch.testing.assert_close((found, again), (expected, gradient), rtol=1e-14, atol=0.0)
