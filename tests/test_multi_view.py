"""What must hold of the losses over several views, beyond what every loss of the catalogue is tested for."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from tolerance import evaluate, judge
from torch.nn import functional as F

import contrastive_ops as co
from contrastive_ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = {
    "mv_infonce": (co.mv_infonce, reference.mv_infonce, {}),
    "mv_infonce-printed": (co.mv_infonce, reference.mv_infonce, {"include_same_view": False}),
    "mv_dhel": (co.mv_dhel, reference.mv_dhel, {}),
    "pvc-geometric": (co.pvc, reference.pvc, {"aggregate": "geometric"}),
    "pvc-arithmetic": (co.pvc, reference.pvc, {"aggregate": "arithmetic"}),
    "pairwise-nt_xent": (co.pairwise_views, reference.pairwise_views, {"loss": "nt_xent"}),
    "pairwise-info_nce": (co.pairwise_views, reference.pairwise_views, {"loss": "info_nce"}),
    "pairwise-dcl": (co.pairwise_views, reference.pairwise_views, {"loss": "dcl"}),
}
NAMES = [pytest.param(*case, id=name) for name, case in CASES.items()]
# InfoNCE has a direction: the query is the first view of a pair
SYMMETRIC = [pytest.param(*case, id=name) for name, case in CASES.items() if name != "pairwise-info_nce"]


def views_of(v, n, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    views = F.normalize(torch.randn(v, n, d, generator=generator, dtype=torch.float64), dim=-1)
    return views.to(dtype).requires_grad_()


# V N = 130, 330, 198: the views of an instance are in different tiles of 128, and a tile has rows of two views
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("v", "n", "d"), [(2, 2, 1), (2, 65, 19), (3, 7, 5), (5, 66, 8), (6, 33, 17)])
@pytest.mark.parametrize(("fused", "naive", "options"), NAMES)
def test_any_number_of_views(fused, naive, options, v, n, d, backend, dtype):
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    temperature = torch.tensor(0.3, dtype=statistics, requires_grad=True)
    options = {**options, "temperature": temperature, "reduction": "none"}
    # two instances of one feature have cosines of 1 or -1, and gradients that are 0 but for rounding
    normalize = {"normalize": d > 1}
    judge(fused, naive, (views_of(v, n, d, dtype),), options | normalize, fused_options={"backend": backend}, logits=20)


@pytest.mark.parametrize("layout", ["instances first", "strided", "expanded"])
@pytest.mark.parametrize(("fused", "naive", "options"), NAMES)
def test_any_layout(fused, naive, options, layout, backend):
    if layout == "instances first":
        views = torch.randn(11, 3, 6).transpose(0, 1)
    elif layout == "strided":
        views = torch.randn(3, 11, 12)[..., ::2]
    else:
        views = torch.randn(11, 6).expand(3, 11, 6)
    value = fused(views, **options, temperature=0.5, backend=backend)
    torch.testing.assert_close(value, fused(views.contiguous(), **options, temperature=0.5, backend=backend))
    torch.testing.assert_close(value, naive(views, **options, temperature=0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("fused", "naive", "options"), NAMES)
def test_gradcheck(fused, naive, options, n, normalize, backend):
    def call(views, temperature):
        return fused(views, **options, temperature=temperature, normalize=normalize, reduction="none", backend=backend)

    views = torch.randn(3, n, 4, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(call, (views, temperature))


@pytest.mark.parametrize("v", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fused", "naive", "options"), NAMES)
def test_one_instance_contributes_zero(fused, naive, options, dtype, v, backend):
    """No negatives: 0 with zero gradient, of every number of views, connected to the graph."""
    temperature = torch.tensor(0.2, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        results = evaluate(
            fused,
            (views_of(v, 1, 4, dtype),),
            {**options, "temperature": temperature, "reduction": reduction, "backend": backend},
        )
        assert {"grad of argument0", "grad of temperature"} <= results.keys()
        assert all((value == 0).all() for value in results.values()), results


@pytest.mark.parametrize(("fused", "naive", "options"), NAMES)
def test_runs_are_bitwise_repeatable(fused, naive, options, backend, two_threads):
    views = views_of(3, 150, 24)
    first, second = (evaluate(fused, (views,), {**options, "backend": backend}) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# identities, in float64 to 1e-12
def assert_identical(left, right, *tensors):
    assert left.dtype == torch.float64
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(1.0, 2.0, left.numel(), dtype=torch.float64).reshape(left.shape)
    for a, b in zip(
        torch.autograd.grad((weight * left).sum(), tensors),
        torch.autograd.grad((weight * right).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.fixture
def two():
    return torch.randn(2, 14, 6, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def temperature():
    return torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("normalize", [True, False])
def test_mv_dhel_of_two_views_is_dhel(normalize, two, temperature, backend):
    options = {"temperature": temperature, "normalize": normalize, "reduction": "none"}
    for got in (co.mv_dhel(two, **options, backend=backend), co.dhel(*two, **options, backend=backend)):
        assert_identical(got, reference.dhel(*two, **options), two, temperature)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("aggregate", ["geometric", "arithmetic"])
def test_pvc_of_two_views_is_nt_xent(aggregate, normalize, two, temperature, backend):
    options = {"temperature": temperature, "normalize": normalize, "reduction": "none", "backend": backend}
    expected = co.nt_xent(*two, **options).view(2, 14)
    assert_identical(co.pvc(two, aggregate=aggregate, **options), expected, two, temperature)


@pytest.mark.parametrize("loss", [co.nt_xent, co.info_nce, co.dcl])
def test_pairwise_views_of_two_views_is_the_loss_itself(loss, two, temperature, backend):
    options = {"temperature": temperature, "backend": backend}
    for reduction in ("mean", "sum", "none"):
        got = co.pairwise_views(two, loss.__name__, **options, reduction=reduction)
        assert_identical(got, loss(*two, **options, reduction=reduction), two, temperature)
    assert torch.equal(co.pairwise_views(two, loss.__name__), loss(*two))  # the loss's own defaults


def test_options_of_a_pair_reach_its_loss(two, backend):
    options = {"label_smoothing": 0.1, "query_ids": torch.arange(14) // 2, "key_ids": torch.arange(14) // 2}
    expected = co.info_nce(*two, **options, backend=backend)
    assert torch.equal(co.pairwise_views(two, "info_nce", **options, return_stats=False, backend=backend), expected)
    with pytest.raises(TypeError, match="label_smoothing"):
        co.pairwise_views(two, "dcl", label_smoothing=0.1)


def test_mv_infonce_as_printed_of_two_views_is_clip_in_one_logarithm(two, temperature, backend):
    """Without the same view, D is the sum of a row and a column of the CLIP logits; A is twice the positive."""
    options = {"temperature": temperature, "include_same_view": False, "reduction": "none", "backend": backend}
    x, y = F.normalize(two, dim=-1)
    logits = x @ y.T / temperature
    expected = torch.logaddexp(logits.logsumexp(1), logits.logsumexp(0)) - logits.diagonal() - math.log(2)
    assert_identical(co.mv_infonce(two, **options), expected, two, temperature)


def test_equal_views_of_mv_infonce_are_one_view(backend):
    """V equal views have V^2 times the negatives' sum and V (V - 1) times the positive's."""
    x = F.normalize(torch.randn(9, 5, dtype=torch.float64), dim=1).requires_grad_()
    out = torch.eye(9, dtype=torch.bool)
    lse = (x @ x.T / 0.5).masked_fill(out, -torch.inf).logsumexp(1)
    for v in (2, 3, 6):
        expected = F.softplus(lse - 1 / 0.5 + math.log(v / (v - 1)))
        got = co.mv_infonce(x.expand(v, 9, 5), temperature=0.5, normalize=False, reduction="none", backend=backend)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_means_of_pvc_are_ordered_and_agree_on_equal_positives(backend):
    """The log of a mean is at least the mean of logs; of equal views they are the same."""
    views = torch.randn(4, 12, 5, dtype=torch.float64)
    geometric, arithmetic = (
        co.pvc(views, temperature=0.3, aggregate=aggregate, reduction="none", backend=backend)
        for aggregate in ("geometric", "arithmetic")
    )
    assert (arithmetic < geometric).all()
    equal = views[:1].expand(4, 12, 5)
    torch.testing.assert_close(
        co.pvc(equal, aggregate="geometric", backend=backend), co.pvc(equal, aggregate="arithmetic", backend=backend),
        rtol=1e-12, atol=1e-12,
    )  # fmt: skip


@pytest.mark.parametrize(("fused", "naive", "options"), SYMMETRIC)
def test_order_of_the_views_does_not_matter(fused, naive, options, backend):
    views = torch.randn(4, 13, 6, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    for reduction in ("mean", "sum"):
        given = {**options, "temperature": 0.3, "reduction": reduction, "backend": backend}
        torch.testing.assert_close(fused(views[order], **given), fused(views, **given), rtol=1e-12, atol=0)
    if fused is co.pvc:
        plain, moved = (fused(x, **options, reduction="none", backend=backend) for x in (views, views[order]))
        torch.testing.assert_close(moved, plain[order], rtol=1e-11, atol=1e-12)


def test_pairs_of_info_nce_go_from_the_earlier_view_to_the_later(backend):
    views = torch.randn(3, 8, 5)
    expected = [co.info_nce(views[a], views[b], backend=backend) for a, b in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(co.pairwise_views(views, "info_nce", backend=backend), torch.stack(expected).mean())


# the positives are as similar as can be and the negatives are orthogonal; a random rotation keeps the similarities
# from being exact by luck
def orthonormal(n):
    generator = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q.float()


def stable(views, scale, kind):
    """The formulas as softplus of the decoupled loss, in dense float64: exact where they are tiny, and only there."""
    z = F.normalize(views, dim=-1)
    v, n, _ = z.shape
    s = scale * torch.einsum("lid,mjd->ijlm", z, z)
    pairs = list(combinations(range(v), 2))
    negatives = s.masked_fill(torch.eye(n, dtype=torch.bool)[:, :, None, None], -torch.inf)
    if kind.startswith("mv_infonce"):
        if kind.endswith("printed"):
            negatives = negatives.masked_fill(torch.eye(v, dtype=torch.bool), -torch.inf)
        rest = negatives.permute(0, 2, 1, 3).flatten(1).logsumexp(1)
        own = s.diagonal().permute(2, 0, 1)
        positives = torch.stack([own[:, a, b] for p in pairs for a, b in (p, p[::-1])])
        return torch.log1p((rest - positives.logsumexp(0)).exp()).mean()
    lse = negatives.permute(0, 2, 1, 3).flatten(2).logsumexp(2)  # [N, V]
    own = s.diagonal().permute(2, 0, 1)
    per_pair = torch.log1p((lse[:, :, None] - own).exp())  # [N, V, V]
    others = ~torch.eye(v, dtype=torch.bool)
    per_pair = per_pair[:, others].view(n, v, v - 1)
    if kind.endswith("geometric"):
        return per_pair.mean()
    return -torch.log1p(torch.expm1(-per_pair).mean(2)).mean()


@pytest.mark.parametrize("v", [2, 4])
@pytest.mark.parametrize("scale", [29.0, 34.0])
@pytest.mark.parametrize("name", ["mv_infonce", "mv_infonce-printed", "pvc-geometric", "pvc-arithmetic"])
def test_tiny_losses_keep_their_relative_accuracy(name, scale, v, backend):
    fused, naive, options = CASES[name]

    def evaluated(call, dtype):
        views = torch.stack([orthonormal(24)] * v).to(dtype).requires_grad_()
        s = torch.tensor(scale, dtype=dtype, requires_grad=True)
        loss = call(views, s)
        return loss.detach().double(), [g.double() for g in torch.autograd.grad(loss, (views, s))]

    truth, grads = evaluated(lambda views, s: stable(views, s, name), torch.float64)
    assert 1e-14 < truth.item() < 1e-10
    value, got = evaluated(lambda views, s: fused(views, **options, temperature=1 / s, backend=backend), torch.float32)
    assert abs(value - truth) <= 1e-5 * truth
    for grad, expected in zip(got, grads, strict=True):
        assert (grad - expected).norm() <= 1e-5 * expected.norm()
    dense, _ = evaluated(lambda views, s: naive(views, **options, temperature=1 / s), torch.float32)
    assert abs(dense - truth) > 0.5 * truth


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_stable_formulas_are_the_losses(scale):
    """What the test above calls the truth, where nothing is tiny, nor huge: there its exp would overflow."""
    views = torch.randn(3, 9, 5, dtype=torch.float64)
    for name in ("mv_infonce", "mv_infonce-printed", "pvc-geometric", "pvc-arithmetic"):
        _, naive, options = CASES[name]
        torch.testing.assert_close(stable(views, scale, name), naive(views, **options, temperature=1 / scale))


def test_no_overflow_where_a_product_of_sums_has_one(backend):
    """Eight views of 512 instances with logits about 12: the product over the views of the sums is e^150."""
    base = F.normalize(torch.randn(1, 16), dim=-1)
    views = F.normalize(base + 0.1 * torch.randn(8, 512, 16), dim=-1).requires_grad_()
    s = torch.einsum("vid,vjd->vij", views, views).detach() / 0.08
    sums = s.masked_fill(torch.eye(512, dtype=torch.bool), -torch.inf).exp().sum(2)
    assert sums.prod(0).isinf().any()
    loss = co.mv_dhel(views, temperature=0.08, backend=backend)
    loss.backward()
    truth = reference.mv_dhel(views.detach().double(), temperature=0.08)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert views.grad.isfinite().all()
    for function in (co.mv_infonce, co.pvc):
        assert function(views, temperature=1e-4, backend=backend).isfinite()


# of an identity matrix every similarity is 1 or 0: the losses are logarithms that one can write down
@pytest.mark.parametrize(
    ("name", "v", "expected"),
    [
        ("mv_infonce", 3, math.log1p(9 * 4 / (6 * math.e))),
        ("mv_infonce-printed", 3, math.log1p(6 * 4 / (6 * math.e))),
        ("mv_dhel", 3, 3 * math.log(4) - math.log(3) - 1),
        ("pvc-geometric", 3, math.log1p(3 * 4 / math.e)),
        ("pvc-arithmetic", 3, math.log1p(3 * 4 / math.e)),
        ("pairwise-nt_xent", 4, math.log1p(2 * 4 / math.e)),
        ("pairwise-info_nce", 4, math.log1p(4 / math.e)),
        ("pairwise-dcl", 4, math.log(2 * 4) - 1),
    ],
)
def test_identity_matrices_by_hand(name, v, expected, backend):
    """Five orthonormal instances: four others each, in as many views as the formula counts."""
    fused, naive, options = CASES[name]
    views = torch.eye(5, dtype=torch.float64).expand(v, 5, 5)
    assert fused(views, **options, temperature=1.0, backend=backend).item() == pytest.approx(expected, rel=1e-14)
    assert naive(views, **options, temperature=1.0).item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", ["mv_infonce", "mv_infonce-printed", "mv_dhel", "pvc-geometric", "pvc-arithmetic"])
def test_naive_twin_is_its_loop(name):
    """In plain Python, from the papers."""
    _, naive, options = CASES[name]
    v, n, tau = 3, 4, 0.5
    views = torch.randn(v, n, 3, dtype=torch.float64)
    z = F.normalize(views, dim=-1).tolist()

    def e(i, a, j, b):
        return math.exp(sum(p * q for p, q in zip(z[a][i], z[b][j], strict=True)) / tau)

    points = [(j, b) for j in range(n) for b in range(v)]
    losses = []
    for i in range(n):
        positives = [e(i, a, i, b) for a in range(v) for b in range(v) if a != b]
        if name.startswith("mv_infonce"):
            rest = [e(i, a, j, b) for a in range(v) for j, b in points
                    if (j, b) != (i, a) and (name == "mv_infonce" or b != a)]  # fmt: skip
            losses.append(-math.log(sum(positives) / sum(rest)))
        elif name == "mv_dhel":
            within = [sum(e(i, a, j, a) for j in range(n) if j != i) for a in range(v)]
            losses.append(-math.log(sum(positives) / 2) + sum(map(math.log, within)))
        else:
            for a in range(v):
                negatives = sum(e(i, a, j, b) for j, b in points if j != i)
                p = [e(i, a, i, b) / (e(i, a, i, b) + negatives) for b in range(v) if b != a]
                mean = math.log(sum(p) / 2) if name == "pvc-arithmetic" else sum(map(math.log, p)) / 2
                losses.append(-mean)
    got = naive(views, **options, temperature=tau, reduction="none")
    got = got.T.flatten() if name.startswith("pvc") else got
    torch.testing.assert_close(got.tolist(), losses)
