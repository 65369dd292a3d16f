"""supcon of samples with several labels: those that share any are positives of each other."""

from __future__ import annotations

import math

import pytest
import torch
from test_losses import LOGITS
from test_roles import call
from test_rowwise import TRITON
from tolerance import evaluate, judge
from torch.nn import functional as F

import contrastive_ops as co
from contrastive_ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def drawn(n, m, d, dtype, classes, views=None):
    """Features, keys, and the labels of both: one or two of each sample, none of every seventh."""
    generator = torch.Generator().manual_seed(n + m)
    shape = (n, d) if views is None else (n, views, d)
    x, k = (F.normalize(torch.randn(s, generator=generator, dtype=torch.float64), dim=-1) for s in (shape, (m, d)))
    sets = []
    for size in (n, m):
        own = torch.randint(classes, (size, 2), generator=generator)
        own = torch.zeros(size, classes, dtype=torch.bool).scatter(1, own, True)
        own[::7] = False
        sets.append(own)
    return x.to(dtype).requires_grad_(), k.to(dtype).requires_grad_(), *sets


def among_themselves(function, labels, **given):
    return lambda x, **options: function(x, labels, **given, **options)


@pytest.mark.parametrize("empty", ["zero", "drop"])
@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "views", "classes"), [(33, None, 9), (140, None, 130), (12, 3, 70)])
def test_value_and_gradients(n, views, classes, dtype, variant, empty, backend):
    x, _, labels, _ = drawn(n, 0, 12, dtype, classes, views)
    weight = torch.rand(n).to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    for options in ({"reduction": "none"}, {"sample_weight": weight}):
        options |= {"temperature": 0.25, "variant": variant, "empty": empty}
        judge(among_themselves(co.supcon, labels), among_themselves(reference.supcon, labels), (x,), options,
              fused_options={"backend": backend}, logits=LOGITS)  # fmt: skip


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "views", "classes"), [(21, 50, None, 9), (140, 33, None, 70), (12, 130, 3, 9)])
def test_against_keys(n, m, views, classes, dtype, variant, backend):
    x, k, labels, key_labels = drawn(n, m, 12, dtype, classes, views)
    weight = torch.rand(n).to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    for options in ({"reduction": "none"}, {"sample_weight": weight, "empty": "drop"}):
        options |= {"temperature": 0.25, "variant": variant}
        judge(call(co.supcon, labels, key_labels), call(reference.supcon, labels, key_labels), (x, k), options,
              fused_options={"backend": backend}, logits=LOGITS)  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # log(0) of an empty set, in numpy
@pytest.mark.parametrize("keys", [False, True], ids=["themselves", "keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@TRITON
def test_in_triton(dtype, keys):
    """In its interpreter, with its row kernels."""
    x, k, labels, key_labels = drawn(43, 30, 10, dtype, 70)
    loss, given = (call, (labels, key_labels)) if keys else (among_themselves, (labels,))
    judge(loss(co.supcon, *given), loss(reference.supcon, *given), (x, k) if keys else (x,), {"temperature": 0.25},
          fused_options={"backend": "triton"}, logits=LOGITS)  # fmt: skip


@pytest.mark.parametrize("keys", [False, True], ids=["themselves", "keys"])
@pytest.mark.parametrize("variant", ["out", "in"])
def test_by_hand(variant, keys, backend):
    """The printed formula, in a loop over sets."""
    sets, of_keys = [{0}, {0, 2}, {1}, set(), {1, 2}, {3}], [{2}, {0, 1}, set(), {1}, {0}]
    x, k, tau = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64), 0.5
    others, their = (k, of_keys) if keys else (x, sets)
    s = (F.normalize(x, dim=1) @ F.normalize(others, dim=1).T / tau).tolist()
    expected = []
    for i in range(6):
        part = [j for j in range(len(their)) if keys or j != i]
        positives = [s[i][j] for j in part if sets[i] & their[j]]
        lse = math.log(sum(math.exp(s[i][j]) for j in part))
        inside = math.log(sum(map(math.exp, positives)) / len(positives)) if positives else lse
        mean = sum(positives) / len(positives) if positives else lse
        expected.append(lse - (mean if variant == "out" else inside))
    assert expected[3] == expected[5] == 0.0

    def entries(sets):
        return torch.tensor([[c in own for c in range(4)] for own in sets])

    options = {"keys": k, "key_labels": entries(of_keys)} if keys else {}
    options |= {"temperature": tau, "variant": variant, "reduction": "none"}
    expected = torch.tensor(expected, dtype=torch.float64)
    for function, more in ((co.supcon, {"backend": backend}), (reference.supcon, {})):
        torch.testing.assert_close(function(x, entries(sets), **options, **more), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", [False, True], ids=["themselves", "keys"])
@pytest.mark.parametrize("views", [None, 2])
def test_single_labels_are_sets_of_one(views, keys, backend):
    x, k, *_ = drawn(20, 30, 5, torch.float64, 6, views)
    labels, key_labels = torch.randint(6, (20,)), torch.randint(6, (30,))
    for variant in ("out", "in"):
        options = {"variant": variant, "temperature": 0.3, "backend": backend}
        if keys:
            of_sets = call(co.supcon, F.one_hot(labels, 6), F.one_hot(key_labels, 6))
            found, expected = (evaluate(f, (x, k), options) for f in (of_sets, call(co.supcon, labels, key_labels)))
        else:
            of_sets = among_themselves(co.supcon, F.one_hot(labels, 6))
            found, expected = (evaluate(f, (x,), options) for f in (of_sets, among_themselves(co.supcon, labels)))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-12)


def test_whatever_is_not_zero_is_a_label(backend):
    """Booleans, counts, and shares; of 16-bit features too, whatever the size of a count."""
    for dtype in (torch.float32, torch.float16):
        x, _, labels, _ = drawn(20, 0, 6, dtype, 5)
        expected = co.supcon(x, labels, backend=backend)
        for entries in (labels.int() * 2**20, labels.double() * 1e-30, -labels.to(torch.int8), labels.to(torch.uint8)):
            assert torch.equal(co.supcon(x, entries, backend=backend), expected)


@pytest.mark.parametrize("empty", ["zero", "drop"])
@pytest.mark.parametrize("all_of", [True, False], ids=["all labels", "no labels"])
def test_without_negatives_or_without_positives(all_of, empty, backend):
    x, k = torch.randn(9, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    labels, key_labels = torch.full((9, 3), all_of), torch.full((5, 3), all_of)
    for loss, given in ((among_themselves(co.supcon, labels), (x,)), (call(co.supcon, labels, key_labels), (x, k))):
        results = evaluate(loss, given, {"empty": empty, "backend": backend})
        assert all((value == 0).all() for value in results.values()), results
        assert "grad of argument0" in results


@pytest.mark.parametrize("m", [None, 0, 3])
@pytest.mark.parametrize("n", [0, 1])
def test_no_sample_and_one(n, m, backend):
    x, labels = torch.randn(n, 4, requires_grad=True), torch.ones(n, 3)
    options = {} if m is None else {"keys": torch.randn(m, 4), "key_labels": torch.ones(m, 3)}
    for reduction in ("mean", "sum", "none"):
        of_sets = among_themselves(co.supcon, labels, **options)
        results = evaluate(of_sets, (x,), {"reduction": reduction, "backend": backend})
        assert all((value == 0).all() for value in results.values()), results


def test_stats(backend):
    x, _, labels, _ = drawn(27, 0, 5, torch.float32, 9)
    loss = among_themselves(co.supcon, labels, temperature=0.2, backend=backend)
    value, stats = loss(x, return_stats=True)
    assert torch.equal(value, loss(x))
    s = (x.double() @ x.double().T / 0.2).detach().fill_diagonal_(-torch.inf)
    same = (labels.double() @ labels.double().T > 0).fill_diagonal_(False)
    torch.testing.assert_close(stats.lse.double(), s.logsumexp(1), rtol=1e-5, atol=1e-5)
    mean = 0.2 * s.masked_fill(~same, 0.0).sum(1) / same.sum(1).clamp(min=1)
    torch.testing.assert_close(stats.positive_similarity.double(), mean, rtol=1e-5, atol=1e-5)
    nearest = same.gather(1, s.argmax(1, keepdim=True)).double().mean()
    assert stats.accuracy.item() == pytest.approx(nearest.item(), abs=1e-6)


def test_frozen_keys_get_none(backend):
    x, k, labels, key_labels = drawn(20, 30, 6, torch.float32, 5)
    of_sets = call(co.supcon, labels, key_labels)
    (expected,) = torch.autograd.grad(of_sets(x, k, backend=backend), x)
    torch.testing.assert_close(torch.autograd.grad(of_sets(x, k.detach(), backend=backend), x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype, backend):
    x, k, labels, key_labels = drawn(21, 30, 6, dtype, 5)
    of_sets = call(co.supcon, labels, key_labels, backend=backend)
    plain = evaluate(of_sets, (x, k), {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluate(of_sets, (x, k), {})
    assert all(torch.equal(found[name], value) for name, value in plain.items())


@pytest.mark.parametrize("keys", [False, True], ids=["themselves", "keys"])
def test_compiled(keys):
    """One graph for two sizes, forward and backward; and meta tensors."""

    def loss(x, k, labels, key_labels):
        return co.supcon(x, labels, **({"keys": k, "key_labels": key_labels} if keys else {}))

    torch.compiler.reset()
    both = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, m in ((14, 25), (33, 9)):
        arguments = drawn(n, m, 6, torch.float32, 5)
        found, expected = evaluate(both, arguments, {}), evaluate(loss, arguments, {})
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert loss(*(value.detach().to("meta") for value in arguments)).shape == ()
