"""Who is in which role and how much it counts: ids, weights, and keys of another set."""

from __future__ import annotations

import inspect
import math
from importlib import import_module

import pytest
import torch
from test_losses import LOGITS, TABLE, arguments_of, logits_of, temperature_of
from test_rowwise import TRITON
from tolerance import evaluate, judge
from torch.nn import functional as F

import contrastive_ops as co
from contrastive_ops import backends, reference
from contrastive_ops.catalogue import LOSSES, VIEWS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIDES = [pytest.param(row, v, s, id=f"{row.name}-{'-'.join(map(str, v.values())) or 'plain'}-{s.__name__}")
         for row in LOSSES for v in row.variants for s in row.sides]  # fmt: skip


def with_option(name):
    """The losses that have it, in each of their variants."""
    return [pytest.param(row, v, id=f"{row.name}-{'-'.join(map(str, v.values())) or 'plain'}")
            for row in LOSSES for v in row.variants for s in row.sides if s.__name__ == name]  # fmt: skip


OF_POSITIVES = "each of its positives is a question of its own, whatever negatives there are"
WITH_IDS, WITH_WEIGHTS = with_option("same"), with_option("weights")


def drawn(side, n, d, dtype, seed=7):
    return side(n, d, dtype, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(3, 2), (43, 10), (130, 33)])
@pytest.mark.parametrize(("loss", "variant", "side"), SIDES)
def test_value_and_gradients(loss, variant, side, n, d, dtype, reduction, backend):
    if loss.op == "volume_logsumexp":
        d = max(d, 4)
    options = variant | temperature_of(loss, dtype) | drawn(side, n, d, dtype) | {"reduction": reduction}
    judge(loss.fused, loss.naive, arguments_of(loss, n, d, dtype), options,
          fused_options={"backend": backend}, logits=logits_of(loss))  # fmt: skip


def in_triton(loss, variant, side):
    """Of the losses over sums and expectations, where Triton has them, the first variant: its interpreter is slow."""
    return loss.op == "similarity_logsumexp" or (
        loss.op.startswith("similarity") and loss.op in backends.triton.OPS and not variant
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # log(0) of an empty set, in numpy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("loss", "variant", "side"), [p for p in SIDES if in_triton(*p.values)])
@TRITON
def test_in_triton(loss, variant, side, dtype):
    """In its interpreter, with its row kernels."""
    options = variant | temperature_of(loss, dtype) | drawn(side, 43, 10, dtype)
    judge(loss.fused, loss.naive, arguments_of(loss, 43, 10, dtype), options,
          fused_options={"backend": "triton"}, logits=logits_of(loss))  # fmt: skip


@pytest.mark.parametrize(("loss", "variant"), WITH_IDS)
def test_ids_of_any_integers(loss, variant, backend):
    """Far apart, equal modulo 2^32, negative, and of few bits: what counts is which are equal."""
    arguments = arguments_of(loss, 20, 6)
    group = torch.arange(20) % 6
    far = torch.tensor([-3, -(2**62), 0, 2**32, 2**63 - 1, -3 + 2**32])
    near = torch.tensor([-(2**31), 0, 1, -1, 2**31 - 1, 7], dtype=torch.int32)
    expected = evaluate(loss.fused, arguments, {**variant, "ids": group, "backend": backend})
    for ids in (far[group], near[group], group.to(torch.uint8), group.to(torch.int16)):
        found = evaluate(loss.fused, arguments, {**variant, "ids": ids, "backend": backend})
        if loss.name == "siglip_loss":  # in the order of the ids, and so are its sums
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        else:
            assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("loss", "variant"), WITH_IDS)
def test_all_of_one_id_contribute_zero(loss, variant, dtype, backend):
    """No negatives: 0 with zero gradient, connected to the graph."""
    if loss.name == "siglip_loss":
        pytest.skip(OF_POSITIVES)
    arguments = arguments_of(loss, 9, 4, dtype)
    for reduction in ("mean", "sum", "none"):
        options = {**variant, **temperature_of(loss, dtype), "reduction": reduction}
        results = evaluate(loss.fused, arguments, {**options, "ids": torch.full((9,), 3), "backend": backend})
        assert {"output0", "grad of argument0"} <= results.keys()
        assert all((value == 0).all() for value in results.values()), results
        naive = loss.naive(*arguments, **options, ids=torch.full((9,), 3))
        torch.testing.assert_close(naive, torch.zeros_like(naive), rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("loss", "variant"), WITH_IDS)
def test_ids_of_one_another_change_nothing(loss, variant, backend):
    arguments = arguments_of(loss, 30, 6)
    plain = evaluate(loss.fused, arguments, {**variant, "backend": backend})
    found = evaluate(loss.fused, arguments, {**variant, "ids": 5 - torch.arange(30), "backend": backend})
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ids", [None, torch.zeros(1, dtype=torch.int64)], ids=["weight", "ids"])
@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize(("loss", "variant"), WITH_IDS)
def test_no_sample_and_one(loss, variant, n, ids, backend):
    if loss.name == "siglip_loss" and n == 1:
        pytest.skip(OF_POSITIVES)
    arguments = arguments_of(loss, n, 4)
    sides = {"sample_weight": torch.ones(n).requires_grad_()} | ({} if ids is None else {"ids": ids[:n]})
    for reduction in ("mean", "sum", "none"):
        results = evaluate(loss.fused, arguments, {**variant, **sides, "reduction": reduction, "backend": backend})
        assert all((value == 0).all() for value in results.values()), results


@pytest.mark.parametrize(("loss", "variant"), WITH_WEIGHTS)
def test_uniform_weights_change_nothing(loss, variant, backend):
    arguments = arguments_of(loss, 30, 6)
    plain = evaluate(loss.fused, arguments, {**variant, "backend": backend})
    for weight, reduction in ((2.5, "mean"), (1.0, "sum")):
        options = {**variant, "reduction": reduction, "backend": backend}
        plain = evaluate(loss.fused, arguments, options)
        found = evaluate(loss.fused, arguments, options | {"sample_weight": torch.full((30,), weight)})
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("loss", "variant"), WITH_WEIGHTS)
def test_weights_of_zero_are_zero(loss, variant, reduction, backend):
    arguments = arguments_of(loss, 7, 4)
    options = {**variant, "sample_weight": torch.zeros(7), "reduction": reduction}
    results = evaluate(loss.fused, arguments, options | {"backend": backend})
    assert all((value == 0).all() for value in results.values()), results
    naive = evaluate(loss.naive, arguments, options)
    assert all((value == 0).all() for value in naive.values()), naive


@pytest.mark.parametrize(("loss", "variant"), WITH_WEIGHTS)
def test_weights_are_of_the_samples_in_the_sum(loss, variant, backend):
    """Of all their views; a sample of weight 0 is no anchor, and still a negative of the others."""
    arguments = arguments_of(loss, 12, 5, torch.float64)
    weight = torch.rand(12, dtype=torch.float64)
    weight[[2, 5]] = 0.0
    options = {**variant, "backend": backend}
    none = loss.fused(*arguments, **options, reduction="none")
    assert torch.equal(none, loss.fused(*arguments, **options, sample_weight=weight, reduction="none"))
    if loss.name == "nt_xent_labelled" and not variant:  # over pairs: an anchor counts once for each of its positives
        options["sample_weight"] = weight
        _, labels = arguments
        pairs = (labels[:, None] == labels).sum(1) - 1
        weight = weight * pairs
        mean = (weight * none).sum() / weight.sum()
        torch.testing.assert_close(loss.fused(*arguments, **options), mean, rtol=1e-13, atol=0)
        return
    per_sample = none.reshape(-1, 12).mean(0)
    shared = none.numel() // 12
    total = loss.fused(*arguments, **options, sample_weight=weight, reduction="sum")
    mean = loss.fused(*arguments, **options, sample_weight=weight)
    torch.testing.assert_close(total, shared * (weight * per_sample).sum(), rtol=1e-13, atol=0)
    torch.testing.assert_close(mean, (weight * per_sample).sum() / weight.sum(), rtol=1e-13, atol=0)


@pytest.mark.parametrize(("loss", "variant"), WITH_IDS)
def test_samples_in_another_order(loss, variant, backend):
    """Nothing but the order of the results and gradients changes."""
    arguments = arguments_of(loss, 50, 8)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    sides = {"ids": torch.arange(50) % 17, "sample_weight": torch.linspace(0.5, 1.5, 50)}

    def permuted(value):
        return value if value.dim() == 0 else value[..., order, :] if value.dim() > 1 else value[order]

    plain = evaluate(loss.fused, arguments, {**variant, **sides, "backend": backend})
    other = tuple(permuted(value.detach()).requires_grad_(value.requires_grad) for value in arguments)
    sides = {name: permuted(value) for name, value in sides.items()}
    found = evaluate(loss.fused, other, {**variant, **sides, "backend": backend})
    for name, value in plain.items():
        torch.testing.assert_close(found[name], permuted(value), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["nt_xent", "dcl", "dclw", "dhel"])
def test_duplicates_by_hand(loss, backend):
    """Samples 2k and 2k + 1 are one; the dense formula, with the pairs of an id masked, in a loop."""
    n, tau, sigma = 10, 0.3, 0.5
    z1, z2 = (F.normalize(torch.randn(n, 6, dtype=torch.float64), dim=1) for _ in range(2))
    z1[1::2], z2[1::2] = z1[::2], z2[::2]
    ids = torch.arange(n) // 2
    views = (z1, z2)
    hardness = 2 - n * ((z1 * z2).sum(1) / sigma).softmax(0)
    expected = torch.zeros(2, n, dtype=torch.float64)
    for v in range(2):
        for i in range(n):
            positive = (z1[i] @ z2[i] / tau).item()
            within, across = (
                [math.exp(views[v][i] @ other[j] / tau) for j in range(n) if ids[j] != ids[i]]
                for other in (views[v], views[1 - v])
            )
            if loss == "dhel":
                expected[v, i] = math.log(sum(within)) - positive / 2
            elif loss == "nt_xent":
                expected[v, i] = math.log1p(sum(within + across) / math.exp(positive))
            else:
                weight = hardness[i].item() if loss == "dclw" else 1.0
                expected[v, i] = math.log(sum(within + across)) - weight * positive
    expected = expected.sum(0) if loss == "dhel" else expected.flatten()
    options = {"temperature": tau, "ids": ids, "reduction": "none"}
    torch.testing.assert_close(TABLE[loss].fused(z1, z2, **options, backend=backend), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(TABLE[loss].naive(z1, z2, **options), expected, rtol=1e-12, atol=1e-12)


def test_of_two_views_the_losses_still_agree(backend):
    """With ids and weights: DHEL is MV-DHEL, PVC is NT-Xent, pairs of views are the loss."""
    two = torch.randn(2, 14, 6, dtype=torch.float64)
    weight, ids = torch.rand(14, dtype=torch.float64), torch.arange(14) % 5
    options = {"temperature": 0.3, "backend": backend, "sample_weight": weight}
    same = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(co.mv_dhel(two, ids=ids, **options), co.dhel(*two, ids=ids, **options), **same)
    torch.testing.assert_close(co.pvc(two, ids=ids, **options), co.nt_xent(*two, ids=ids, **options), **same)
    for loss in (co.nt_xent, co.dcl):
        expected = loss(*two, ids=ids, **options)
        torch.testing.assert_close(co.pairwise_views(two, loss.__name__, ids=ids, **options), expected, **same)
    expected = co.info_nce(*two, query_ids=ids, key_ids=ids, **options)
    torch.testing.assert_close(co.pairwise_views(two, "info_nce", ids=ids, **options), expected, **same)


@pytest.mark.parametrize("loss", ["nt_xent", "dcl", "dclw"])
def test_stats_with_ids_count_only_the_pairs_that_take_part(loss, backend):
    """Duplicates of the positive would tie with it; left out by their ids they don't."""
    x = F.normalize(torch.randn(8, 6), dim=1).repeat_interleave(2, 0)
    group = torch.arange(8).repeat_interleave(2)
    _, plain = TABLE[loss].fused(x, x, return_stats=True, backend=backend)
    _, grouped = TABLE[loss].fused(x, x, ids=group, return_stats=True, backend=backend)
    assert grouped.accuracy.item() == 1.0
    assert plain.accuracy.item() < 1.0
    assert (grouped.lse < plain.lse).all()


# supcon against keys


def call(function, labels, key_labels, **given):
    """Of features and keys."""
    return lambda x, k, **options: function(x, labels, keys=k, key_labels=key_labels, **given, **options)


def sets(n, m, d, dtype, views=None, classes=7):
    generator = torch.Generator().manual_seed(n + m)
    shape = (n, d) if views is None else (n, views, d)
    x, k = (F.normalize(torch.randn(s, generator=generator, dtype=torch.float64), dim=-1) for s in (shape, (m, d)))
    labels = torch.randint(classes, (n,), generator=generator)
    key_labels = torch.randint(2, classes + 2, (m,), generator=generator)
    return x.to(dtype).requires_grad_(), k.to(dtype).requires_grad_(), labels, key_labels


@pytest.mark.parametrize("empty", ["zero", "drop"])
@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "views"), [(21, 50, None), (140, 33, None), (12, 130, 3), (5, 1, 1)])
def test_keys(n, m, views, dtype, variant, empty, backend):
    x, k, labels, key_labels = sets(n, m, 12, dtype, views)
    weight = torch.rand(n).to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    for reduction in ("none", "mean", "sum"):
        for sides in ({}, {"sample_weight": weight}):
            options = {"temperature": 0.25, "variant": variant, "empty": empty, "reduction": reduction, **sides}
            judge(call(co.supcon, labels, key_labels), call(reference.supcon, labels, key_labels), (x, k), options,
                  fused_options={"backend": backend}, logits=LOGITS)  # fmt: skip


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("variant", ["out", "in"])
def test_gradcheck_of_keys(variant, normalize, backend):
    x, k, labels, key_labels = sets(9, 12, 4, torch.float64)
    weight = torch.rand(9, dtype=torch.float64).requires_grad_()
    temperature = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def loss(x, k, temperature, weight):
        of_keys = call(co.supcon, labels, key_labels, variant=variant, normalize=normalize)
        return of_keys(x, k, temperature=temperature, sample_weight=weight, backend=backend)

    torch.autograd.gradcheck(loss, (x, k, temperature, weight))


@pytest.mark.parametrize("variant", ["out", "in"])
def test_keys_that_are_the_other_view(variant, backend):
    """Keys are the features in another order and a little moved: the dense formula, in a loop."""
    n, tau = 15, 0.4
    x = F.normalize(torch.randn(n, 6, dtype=torch.float64), dim=1)
    order = torch.randperm(n)
    k = F.normalize(x[order] + 0.1 * torch.randn(n, 6, dtype=torch.float64), dim=1)
    labels = torch.arange(n) % 4
    s = (x @ k.T / tau).tolist()
    expected = []
    for i in range(n):
        positives = [s[i][j] for j in range(n) if labels[order[j]] == labels[i]]
        lse = math.log(sum(map(math.exp, s[i])))
        mean = sum(positives) / len(positives)
        inside = math.log(sum(map(math.exp, positives)) / len(positives))
        expected.append(lse - (mean if variant == "out" else inside))
    options = {"temperature": tau, "variant": variant, "reduction": "none"}
    found = call(co.supcon, labels, labels[order])(x, k, **options, backend=backend)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_keys_of_unique_labels_are_info_nce(backend):
    """One positive each."""
    x, k = torch.randn(2, 20, 6, dtype=torch.float64)
    order = torch.randperm(20)
    target = order.argsort()
    options = {"temperature": 0.2, "reduction": "none", "backend": backend}
    found = call(co.supcon, torch.arange(20), order)(x, k, **options)
    torch.testing.assert_close(found, co.info_nce(x, k, target=target, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("empty", ["zero", "drop"])
@pytest.mark.parametrize("m", [0, 6])
def test_anchors_that_no_key_is_of(m, empty, backend):
    """And none at all, as of a queue that is empty."""
    x, k = torch.randn(9, 4, requires_grad=True), torch.randn(m, 4, requires_grad=True)
    for key_labels in (torch.full((m,), 5), torch.full((m,), 1)):  # a class that no anchor has, and no negatives
        labels = (
            torch.zeros(9, dtype=torch.int64) if len(key_labels) == 0 or key_labels[0] == 5 else torch.ones(9).long()
        )
        for reduction in ("mean", "sum", "none"):
            loss = call(co.supcon, labels, key_labels)
            results = evaluate(loss, (x, k), {"empty": empty, "reduction": reduction, "backend": backend})
            assert {"grad of argument0", "grad of argument1"} <= results.keys()
            assert all((value == 0).all() for value in results.values()), results


def test_dropped_anchors_take_their_weight_along(backend):
    x, k = torch.randn(2, 6, 4)
    labels, key_labels = torch.tensor([0, 1, 2, 0, 1, 9]), torch.tensor([0, 0, 1, 1, 3, 3])
    weight = torch.linspace(0.5, 2.0, 6)
    none = call(co.supcon, labels, key_labels)(x, k, reduction="none", backend=backend)
    dropped = call(co.supcon, labels, key_labels)(x, k, sample_weight=weight, empty="drop", backend=backend)
    kept = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(dropped, (weight * none)[kept].sum() / weight[kept].sum())


def test_labels_of_keys_have_a_dtype_of_their_own(backend):
    x, k, labels, key_labels = sets(12, 15, 5, torch.float32)
    expected = call(co.supcon, labels, key_labels)(x, k, backend=backend)
    for one, other in ((torch.int32, torch.int64), (torch.uint8, torch.int32), (torch.int64, torch.int16)):
        assert torch.equal(call(co.supcon, labels.to(one), key_labels.to(other))(x, k, backend=backend), expected)


def test_ids_of_two_dtypes_with_label_smoothing(backend):
    query, key = torch.randn(8, 5), torch.randn(9, 5)
    ids, of_keys = torch.arange(8) % 3, torch.arange(9) % 3
    options = {"label_smoothing": 0.1, "backend": backend}
    expected = co.info_nce(query, key, query_ids=ids, key_ids=of_keys, **options)
    assert torch.equal(co.info_nce(query, key, query_ids=ids.int(), key_ids=of_keys, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype, backend):
    x, k, labels, key_labels = sets(21, 30, 6, dtype)
    options = {"temperature": 0.3, "backend": backend, "sample_weight": torch.rand(21)}
    plain = evaluate(call(co.supcon, labels, key_labels), (x, k), options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluate(call(co.supcon, labels, key_labels), (x, k), options)
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_stats_of_keys(backend):
    x, k, labels, key_labels = sets(27, 40, 5, torch.float32)
    loss = call(co.supcon, labels, key_labels, temperature=0.2, backend=backend)
    value, stats = loss(x, k, return_stats=True)
    assert torch.equal(value, loss(x, k))
    s = (x.double() @ k.double().T / 0.2).detach()
    same = labels[:, None] == key_labels
    torch.testing.assert_close(stats.lse.double(), s.logsumexp(1), rtol=1e-5, atol=1e-5)
    mean = 0.2 * s.masked_fill(~same, 0.0).sum(1) / same.sum(1).clamp(min=1)
    torch.testing.assert_close(stats.positive_similarity.double(), mean, rtol=1e-5, atol=1e-5)
    nearest = same.gather(1, s.argmax(1, keepdim=True)).double().mean()
    assert stats.accuracy.item() == pytest.approx(nearest.item(), abs=1e-6)


def test_frozen_keys_cost_no_gradient(backend, monkeypatch):
    """Of their side nothing is asked for in either sweep, and the sweep over the positives sees both sides sorted."""
    page = import_module("contrastive_ops.losses.supcon")  # as an attribute it is the loss
    seen = []
    run = page.similarity_logsumexp

    def sweep(x, y, **options):
        seen.append((x.requires_grad, y.requires_grad, options["col_scale"].requires_grad))
        assert all((options[side].diff() >= 0).all() for side in ("row_ids", "col_ids"))
        assert not torch.isin(*(options[side] for side in ("row_ids", "col_ids"))).all()  # labels that no key has
        return run(x, y, **options)

    monkeypatch.setattr(page, "similarity_logsumexp", sweep)
    x, k, labels, _ = sets(20, 30, 6, torch.float32)
    key_labels = torch.tensor([3, 5, 6]).repeat(10)
    (expected,) = torch.autograd.grad(call(co.supcon, labels, key_labels)(x, k, backend=backend), x)
    assert seen == [(True, True, True)] * 2
    loss = call(co.supcon, labels, key_labels)(x, k.detach(), backend=backend)
    assert seen[2:] == [(True, False, False)] * 2
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_tiny_losses_against_keys_keep_their_relative_accuracy(backend):
    """About 1e-12, where log_softmax rounds to 0."""
    q = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q.float()
    labels = torch.arange(16)
    found = call(co.supcon, labels, labels)(q, q, temperature=1 / 30, backend=backend)
    s = 30 * F.normalize(q.double()) @ F.normalize(q.double()).T
    gap = s.masked_fill(torch.eye(16, dtype=torch.bool), -torch.inf).logsumexp(1) - s.diagonal()
    truth = torch.log1p(gap.exp()).mean().item()
    assert 1e-13 < truth < 1e-11
    assert found.item() == pytest.approx(truth, rel=1e-5)


def test_every_option_is_in_the_catalogue():
    """A loss with `ids`, weights or keys has inputs for them, so that no test misses one."""
    for row in LOSSES:
        drawn_names = {name for side in row.sides for name in drawn(side, 8, 4, torch.float32)}
        names = {"ids", "query_ids", "key_ids", "sample_weight", "keys", "key_labels"}
        own = names & set(inspect.signature(row.fused).parameters)
        assert own <= drawn_names, row.name
    assert VIEWS >= 2
