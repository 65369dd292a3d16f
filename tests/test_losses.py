"""Every loss of the catalogue on every backend against its naive twin, and what must hold of losses by definition."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from tolerance import assert_accurate, evaluate, judge
from torch.nn import functional as F

import contrastive_ops as co
from contrastive_ops import reference
from contrastive_ops.catalogue import LOSSES, VIEWS, Loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TABLE = {loss.name: loss for loss in LOSSES}
# what has no temperature is tested in test_uniformity.py
SCALED = [row for row in LOSSES if row.name not in ("uniformity", "joint_entropy")]
VARIANTS = [pytest.param(row, v, id=f"{row.name}-{'-'.join(map(str, v.values())) or 'plain'}")
            for row in SCALED for v in row.variants]  # fmt: skip
ROWS = [pytest.param(row, id=row.name) for row in SCALED]
WITH_STATS = [row for row in SCALED if "return_stats" in inspect.signature(row.fused).parameters]


def arguments_of(loss: Loss, n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    return loss.inputs(n, d, dtype, torch.Generator().manual_seed(seed))


BY_LOGIT_SCALE = ("clip_loss", "siglip_loss")  # their third argument, which the others have as a temperature


def with_temperature(loss: Loss, arguments, temperature):
    """The arguments and options of a call at that temperature, a number or a tensor."""
    if loss.name in BY_LOGIT_SCALE:
        return (*arguments[:2], 1 / temperature, *arguments[3:]), {}
    return arguments, {"temperature": temperature}


def temperature_of(loss: Loss, dtype: torch.dtype, value: float = 0.25) -> dict[str, torch.Tensor]:
    """A learnable temperature for the losses that don't take a logit scale among their arguments."""
    if loss.name in BY_LOGIT_SCALE:
        return {}
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return {"temperature": torch.tensor(value, dtype=dtype).requires_grad_()}


# sizes of logits: 1 / 0.07 for CLIP, 4 for the others, and log 2N on top for the log-sum-exp
LOGITS = 20.0


def logits_of(loss: Loss) -> float:
    """SigLIP has a bias of 10 on top, guided InfoNCE the rounding of the log-sum-exp of each of its blocks."""
    return 1.5 * LOGITS if loss.name in ("siglip_loss", "guided_info_nce") else LOGITS


# 3 x 2: fewer than any register; 129 x 96: two micro tiles and a row; 40 x 17: D not a multiple of anything
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(3, 2), (40, 17), (129, 96)])
@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_value_and_gradients(loss, variant, n, d, backend, dtype):
    if loss.op == "volume_logsumexp":
        d = max(d, 4)  # the volumes of more vectors than features are 0: all that is left to compare is rounding
    options = {**variant, **temperature_of(loss, dtype), "reduction": "none"}
    arguments = arguments_of(loss, n, d, dtype)
    judge(loss.fused, loss.naive, arguments, options, fused_options={"backend": backend}, logits=logits_of(loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_raw_dot_products(loss, variant, reduction, backend, dtype):
    """normalize=False, with rows of norms from 0.5 to 2."""
    arguments = tuple(
        (a.detach() * torch.linspace(0.5, 2.0, a.shape[-2], dtype=a.dtype)[:, None]).requires_grad_()
        if a.dim() >= 2
        else a
        for a in arguments_of(loss, 33, 12, dtype)
    )
    options = {**variant, **temperature_of(loss, dtype, 1.0), "normalize": False, "reduction": reduction}
    judge(loss.fused, loss.naive, arguments, options, fused_options={"backend": backend}, logits=4 * logits_of(loss))


@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_norms_do_not_matter_to_cosines(loss, variant, backend):
    """normalize=True: the scale of a row changes nothing but the scale of its gradient."""
    arguments = arguments_of(loss, 20, 6)
    factors = [torch.rand(*a.shape[:-1], 1) + 0.5 if a.dim() >= 2 else None for a in arguments]
    scaled = tuple(
        a if f is None else (f * a.detach()).requires_grad_() for a, f in zip(arguments, factors, strict=True)
    )
    plain = evaluate(loss.fused, arguments, {**variant, "backend": backend})
    other = evaluate(loss.fused, scaled, {**variant, "backend": backend})
    torch.testing.assert_close(other["output0"], plain["output0"], rtol=1e-5, atol=1e-6)
    for i, f in enumerate(factors):
        if f is not None:
            torch.testing.assert_close(
                f * other[f"grad of argument{i}"], plain[f"grad of argument{i}"], rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_reductions_agree(loss, variant, backend):
    if loss.name == "nt_xent_labelled" and variant.get("over") != "anchors":
        pytest.skip("its mean is over pairs, and there is no vector of these")
    arguments = arguments_of(loss, 21, 8, torch.float64)
    none, total, mean = (
        loss.fused(*arguments, **variant, reduction=reduction, backend=backend) for reduction in ("none", "sum", "mean")
    )
    two_views = loss.name in ("nt_xent", "dcl", "dclw", "pairwise_views") and variant.get("loss") != "info_nce"
    assert none.shape == ((42,) if two_views else (VIEWS, 21) if loss.name == "pvc" else (21,))
    torch.testing.assert_close(total, none.sum(), rtol=1e-14, atol=0)
    torch.testing.assert_close(mean, none.mean(), rtol=1e-14, atol=0)


def ids(n: int, groups: int) -> torch.Tensor:
    return torch.randint(-groups, 0, (n,), generator=torch.Generator().manual_seed(groups))


# what the catalogue leaves out: side inputs, and shapes that only one loss has
OPTIONS = {
    "info_nce": {
        "more keys than queries": lambda n: {},
        "target": lambda n: {"target": torch.randperm(n + 9)[:n]},
        "one key for all": lambda n: {"target": torch.full((n,), 4, dtype=torch.int32)},
        "ids": lambda n: {"query_ids": ids(n, 5), "key_ids": ids(n + 9, 5)},
        "ids-smoothing": lambda n: {"query_ids": ids(n, 5), "key_ids": ids(n + 9, 7), "label_smoothing": 0.2},
        "ids-target-smoothing": lambda n: {
            "query_ids": ids(n, 5), "key_ids": ids(n + 9, 4), "label_smoothing": 0.2,
            "target": torch.randperm(n + 9)[:n],
        },
        "temperature per row": lambda n: {"temperature": (0.2 + 0.3 * torch.rand(n)).requires_grad_()},
        "temperature per row-smoothing": lambda n: {
            "temperature": (0.2 + 0.3 * torch.rand(n)).requires_grad_(), "label_smoothing": 0.1,
        },
        "temperature of one element": lambda n: {"temperature": torch.tensor([0.25]).requires_grad_()},
        "weight": lambda n: {"sample_weight": torch.rand(n).requires_grad_(), "reduction": "mean"},
        "weight-sum": lambda n: {"sample_weight": torch.rand(n).requires_grad_(), "reduction": "sum"},
    },
    "clip_loss": {
        "ids": lambda n: {"ids": ids(n, 6)},
        "ids-smoothing": lambda n: {"ids": ids(n, 6), "label_smoothing": 0.2},
        "weight": lambda n: {"sample_weight": torch.rand(n).requires_grad_(), "reduction": "mean"},
        "weight-sum-smoothing": lambda n: {
            "sample_weight": torch.rand(n).requires_grad_(), "reduction": "sum", "label_smoothing": 0.1,
        },
    },
    "dclw": {"sigma": lambda n: {"sigma": 0.1}},
    "supcon": {
        "drop": lambda n: {"empty": "drop", "reduction": "mean"},
        "drop-in": lambda n: {"empty": "drop", "reduction": "mean", "variant": "in"},
        "sum": lambda n: {"reduction": "sum"},
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "case"), [pytest.param(n, c, id=f"{n}-{c}") for n in OPTIONS for c in OPTIONS[n]])
def test_side_inputs(name, case, backend, dtype):
    n = 43
    loss = TABLE[name]
    arguments = arguments_of(loss, n, 10, dtype)
    if name == "info_nce":
        arguments = (arguments[0], arguments_of(loss, n + 9, 10, dtype, seed=5)[1])
    options = {"reduction": "none"} | temperature_of(loss, dtype) | OPTIONS[name][case](n)
    judge(loss.fused, loss.naive, arguments, options, fused_options={"backend": backend}, logits=logits_of(loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("empty", ["zero", "drop"])
def test_supcon_of_several_views(empty, views, variant, backend, dtype):
    features = F.normalize(torch.randn(21, views, 12), dim=-1).to(dtype).requires_grad_()
    labels = torch.randint(0, 9, (21,))
    for reduction in ("none", "mean"):
        options = {"variant": variant, "empty": empty, "reduction": reduction, "temperature": 0.25}
        judge(with_labels(co.supcon, labels), with_labels(reference.supcon, labels), (features,), options,
              fused_options={"backend": backend}, logits=LOGITS)  # fmt: skip


def with_labels(function, labels):
    return lambda features, **options: function(features, labels, **options)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0d", "1-element"])
@pytest.mark.parametrize("loss", ROWS)
def test_gradient_of_a_learnable_scale_has_its_shape_and_dtype(loss, shape, backend):
    arguments = list(arguments_of(loss, 12, 4))
    options = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scale = torch.full(shape, 4.0 if loss.name in BY_LOGIT_SCALE else 0.25, dtype=dtype).requires_grad_()
        if loss.name in BY_LOGIT_SCALE:
            arguments[2] = scale
        else:
            options["temperature"] = scale
        result = loss.fused(*arguments, **options, backend=backend)
        assert result.shape == ()
        assert result.dtype == torch.float32
        result.backward()
        assert scale.grad.shape == shape
        assert scale.grad.dtype == dtype
        assert scale.grad.abs().item() > 1e-3


SYMMETRIC = ("clip_loss", "gram_loss", "triangle_loss")


def dense_logits(loss: Loss, arguments, temperature: float):
    """Float64: the logits of the rows (and columns), which pairs take part, and which of them are positive."""
    if loss.name in ("gram_loss", "triangle_loss"):
        matrix = reference.gram_volumes if loss.name == "gram_loss" else reference.triangle_areas
        logits = -matrix(*(F.normalize(a.double(), dim=1).detach() for a in arguments)) / temperature
        eye = torch.eye(len(logits), dtype=torch.bool)
        return logits, ~torch.zeros_like(eye), eye
    x = F.normalize(arguments[0].double(), dim=1).detach()
    if loss.name in ("info_nce", *BY_LOGIT_SCALE):
        logits = x @ F.normalize(arguments[1].double(), dim=1).detach().T / temperature
        eye = torch.eye(len(x), dtype=torch.bool)
        bias = arguments[3].item() if loss.name == "siglip_loss" else 0.0
        return logits + bias, ~torch.zeros_like(eye), eye
    if loss.name == "supcon":
        label = arguments[1]
    else:
        x = torch.cat([x, F.normalize(arguments[1].double(), dim=1).detach()])
        label = torch.arange(len(x) // 2).repeat(2)
    others = ~torch.eye(len(x), dtype=torch.bool)
    return x @ x.T / temperature, others, (label[:, None] == label) & others


@pytest.mark.parametrize("loss", [pytest.param(row, id=row.name) for row in WITH_STATS])
def test_stats(loss, backend):
    arguments = arguments_of(loss, 27, 5)
    if loss.name != "supcon":  # positives that are alike, so that some of them are the nearest
        with torch.no_grad():
            arguments[1].copy_(arguments[0] + 0.4 * arguments[1])
    temperature = 0.2
    arguments, options = with_temperature(loss, arguments, temperature)
    value, stats = loss.fused(*arguments, **options, return_stats=True, backend=backend)
    assert torch.equal(value, loss.fused(*arguments, **options, backend=backend))
    assert value.requires_grad
    assert not any(tensor.requires_grad for tensor in stats)

    logits, part, positive = dense_logits(loss, arguments, temperature)
    lse, correct = [], []
    for s, p, q in ((logits, part, positive), (logits.T, part.T, positive.T))[: 2 if loss.name in SYMMETRIC else 1]:
        lse.append(s.masked_fill(~p, -torch.inf).logsumexp(1))
        best = s.masked_fill(~p, -torch.inf).argmax(1)
        correct.append(q.gather(1, best[:, None]).squeeze(1).double())
    if loss.name == "siglip_loss":
        logits = logits - arguments[3].item()
    similarity = (temperature * logits).masked_fill(~positive, 0.0).sum(1) / positive.sum(1).clamp(min=1)
    assert_accurate(stats.lse, torch.stack(lse) if loss.name in SYMMETRIC else lse[0], what="lse")
    assert_accurate(stats.positive_similarity, similarity, what="positive_similarity")
    assert stats.accuracy.shape == ()
    assert stats.accuracy.item() == pytest.approx(torch.stack(correct).mean().item(), abs=1e-6)
    assert 0.0 < stats.accuracy.item() < 1.0


def test_stats_with_ids_count_only_the_pairs_that_take_part(backend):
    """Duplicates of the positive would tie with it; left out by their ids they don't."""
    x = F.normalize(torch.randn(8, 6), dim=1).repeat_interleave(2, 0)
    group = torch.arange(8).repeat_interleave(2)
    _, plain = co.clip_loss(x, x, 5.0, return_stats=True, backend=backend)
    _, grouped = co.clip_loss(x, x, 5.0, ids=group, return_stats=True, backend=backend)
    assert grouped.accuracy.item() == 1.0
    assert plain.accuracy.item() < 1.0
    part = (group[:, None] != group) | torch.eye(16, dtype=torch.bool)
    lse = (5 * F.normalize(x.double()) @ F.normalize(x.double()).T).masked_fill(~part, -torch.inf).logsumexp(1)
    assert_accurate(grouped.lse, torch.stack([lse, lse]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_zero_rows_have_zero_gradient(loss, variant, backend, dtype):
    """The cosine of a zero row is 0; in eager PyTorch its gradient is NaN or about 1e12."""
    arguments = arguments_of(loss, 11, 4, dtype)
    with torch.no_grad():
        arguments[0][..., [2, 7], :] = 0.0
        if len(arguments) > 1:
            arguments[1][7] = 0 if arguments[1].dim() == 1 else 0.0
    options = {**variant, **temperature_of(loss, dtype)}
    results = evaluate(loss.fused, arguments, options | {"backend": backend})
    assert all(value.isfinite().all() for value in results.values())
    grad = results["grad of argument0"]
    assert (grad[..., [2, 7], :] == 0).all()
    assert (grad[..., 3, :] != 0).any()
    judge(loss.fused, loss.naive, arguments, options, fused_options={"backend": backend}, logits=logits_of(loss))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_one_sample_contributes_zero(loss, variant, backend, dtype):
    """No negatives: the loss is 0 with zero gradient, connected to the graph."""
    if loss.name == "siglip_loss":
        pytest.skip("its positive is a question of its own, whatever negatives there are")
    arguments = arguments_of(loss, 1, 4, dtype)
    results = evaluate(loss.fused, arguments, {**variant, **temperature_of(loss, dtype), "backend": backend})
    assert all((value == 0).all() for value in results.values()), results
    assert any(key.startswith("grad") for key in results)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_no_samples(loss, variant, reduction, backend):
    """The mean of nothing is 0; every gradient is there and has its shape."""
    arguments = arguments_of(loss, 0, 4)
    options = {**variant, **temperature_of(loss, torch.float32), "reduction": reduction, "backend": backend}
    results = evaluate(loss.fused, arguments, options)
    assert results["output0"].numel() == (0 if reduction == "none" else 1)
    assert all((value == 0).all() for value in results.values())
    assert results["grad of argument0"].shape == arguments[0].shape
    if loss not in WITH_STATS:
        return
    _, stats = loss.fused(*arguments, **options, return_stats=True)
    assert stats.accuracy.item() == 0.0
    assert stats.positive_similarity.shape == (0,)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_of_one_id_contribute_zero(smoothing, backend):
    x, y = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    same = torch.full((9,), 3)
    for results in (
        evaluate(co.clip_loss, (x, y, 5.0), {"ids": same, "label_smoothing": smoothing, "backend": backend}),
        evaluate(co.info_nce, (x, y), {"query_ids": same, "key_ids": same, "label_smoothing": smoothing,
                                       "backend": backend}),
    ):  # fmt: skip
        assert all((value == 0).all() for value in results.values()), results


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("empty", ["zero", "drop"])
@pytest.mark.parametrize("labels", [torch.zeros(9, dtype=torch.int64), torch.arange(9)], ids=["one class", "unique"])
def test_supcon_without_negatives_or_without_positives(labels, empty, variant, backend):
    options = {"empty": empty, "variant": variant, "backend": backend}
    results = evaluate(co.supcon, (torch.randn(9, 4, requires_grad=True), labels), options)
    assert all((value == 0).all() for value in results.values())


def test_weights_of_zero_do_not_divide_by_zero(backend):
    x, y = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    weight = torch.zeros(5)
    for loss in (
        co.info_nce(x, y, sample_weight=weight, backend=backend),
        co.clip_loss(x, y, 5.0, sample_weight=weight, backend=backend),
    ):
        assert loss.item() == 0.0
        grads = torch.autograd.grad(loss, (x, y))
        assert all((grad == 0).all() for grad in grads)


def test_weight_of_zero_leaves_a_pair_out_of_the_mean(backend):
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    per_row = co.info_nce(x, y, reduction="none", backend=backend)
    loss = co.info_nce(x, y, sample_weight=weight, backend=backend)
    torch.testing.assert_close(loss, per_row[[0, 2, 3]].mean())


# Losses about 1e-12: the positive is as similar as can be and the negatives are orthogonal. The scale makes
# (N - 1) e^-scale small; a random rotation keeps the similarities from being exact by luck.
def orthonormal(n: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q.to(dtype)


def stable_cross_entropy(x, y, scale, *, self_similarity=False, both=False):
    """Cross-entropy with the diagonal (or the other view) as the class, written so that float64 keeps it exact."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    if self_similarity:
        z = torch.cat([x, y])
        s, n = scale * z @ z.T, len(z)
        positive = torch.arange(n).roll(n // 2)
    else:
        s, n = scale * x @ y.T, len(x)
        positive = torch.arange(n)

    def rows(s):
        out = torch.zeros_like(s, dtype=torch.bool).scatter(1, positive[:, None], True)
        if self_similarity:
            out |= torch.eye(n, dtype=torch.bool)
        gap = s.masked_fill(out, -torch.inf).logsumexp(1) - s.gather(1, positive[:, None]).squeeze(1)
        return torch.log1p(gap.exp()).mean()

    return (rows(s) + rows(s.T)) / 2 if both else rows(s)


def eager_cross_entropy(x, y, scale, *, self_similarity=False, both=False):
    """What everybody writes."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    if self_similarity:
        z = torch.cat([x, y])
        s = (scale * z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
        return F.cross_entropy(s, torch.arange(len(z)).roll(len(x)))
    s, target = scale * x @ y.T, torch.arange(len(x))
    return (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2 if both else F.cross_entropy(s, target)


def views(x, y, **options):
    return co.supcon(torch.stack([x, y], dim=1), torch.arange(len(x)), **options)


TINY = {
    "clip_loss": (lambda x, y, s, b: co.clip_loss(x, y, s, backend=b), {"both": True}),
    "info_nce": (lambda x, y, s, b: co.info_nce(x, y, temperature=1 / s, backend=b), {}),
    "nt_xent": (lambda x, y, s, b: co.nt_xent(x, y, temperature=1 / s, backend=b), {"self_similarity": True}),
    "supcon-out": (lambda x, y, s, b: views(x, y, temperature=1 / s, backend=b), {"self_similarity": True}),
    "supcon-in": (
        lambda x, y, s, b: views(x, y, temperature=1 / s, variant="in", backend=b),
        {"self_similarity": True},
    ),
}


@pytest.mark.parametrize("scale", [28.0, 33.0])
@pytest.mark.parametrize("name", TINY)
def test_tiny_losses_keep_their_relative_accuracy(name, scale, backend):
    function, options = TINY[name]
    n = 24

    def evaluated(call, dtype):
        x, y = (orthonormal(n, torch.float32).to(dtype).requires_grad_() for _ in range(2))
        s = torch.tensor(scale, dtype=dtype, requires_grad=True)
        loss = call(x, y, s)
        return loss.detach().double(), [g.double() for g in torch.autograd.grad(loss, (x, y, s))]

    truth, grads = evaluated(lambda x, y, s: stable_cross_entropy(x, y, s, **options), torch.float64)
    assert 1e-14 < truth.item() < 1e-10
    value, got = evaluated(lambda x, y, s: function(x, y, s, backend), torch.float32)
    assert abs(value - truth) <= 1e-5 * truth
    for grad, expected in zip(got, grads, strict=True):
        assert (grad - expected).norm() <= 1e-5 * expected.norm()
    eager, eager_grads = evaluated(lambda x, y, s: eager_cross_entropy(x, y, s, **options), torch.float32)
    assert abs(eager - truth) > 0.5 * truth
    assert (eager_grads[2] - grads[2]).norm() > 1e-2 * grads[2].norm()


def test_loss_of_1e_minus_12_is_no_rounding_of_zero(backend):
    """In numbers: log(1 + 15 e^-30)."""
    eye = torch.eye(16)
    expected = math.log1p(15 * math.exp(-30.0))
    assert co.info_nce(eye, eye, temperature=1 / 30.0, backend=backend).item() == pytest.approx(expected, rel=1e-5)
    assert F.cross_entropy(30.0 * eye, torch.arange(16)).item() == 0.0


# identities of the losses: two fused losses, or a fused loss and another way to call it, in float64 to 1e-12
def assert_identical(left, right, *tensors):
    assert left.dtype == torch.float64
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)
    weight = torch.linspace(1.0, 2.0, left.numel(), dtype=torch.float64).reshape(left.shape)
    for a, b in zip(
        torch.autograd.grad((weight * left).sum(), tensors),
        torch.autograd.grad((weight * right).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.fixture
def pair():
    return tuple(torch.randn(2, 14, 6, dtype=torch.float64).requires_grad_()[i] for i in range(2))


def test_supcon_of_unique_labels_and_two_views_is_nt_xent(backend, pair):
    labels = torch.randperm(14)
    for variant in ("out", "in"):
        expected = co.nt_xent(*pair, temperature=0.3, reduction="none", backend=backend)
        got = views_of(pair, labels, variant=variant, temperature=0.3, reduction="none", backend=backend)
        assert_identical(torch.cat([got[:, 0], got[:, 1]]), expected, *pair)


def views_of(pair, labels, **options):
    return co.supcon(torch.stack(pair, dim=1), labels, **options)


def test_supcon_in_is_out_where_each_anchor_has_one_positive(backend):
    features = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(10).repeat(2)[torch.randperm(20)]
    out, inside = (
        co.supcon(features, labels, variant=variant, reduction="none", backend=backend) for variant in ("out", "in")
    )
    assert_identical(out, inside, features)


def test_views_of_supcon_are_samples_of_one_label(backend):
    features = torch.randn(9, 3, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (9,))
    views_first = co.supcon(features, labels, reduction="none", backend=backend)
    flat = co.supcon(features.flatten(0, 1), labels.repeat_interleave(3), reduction="none", backend=backend)
    assert_identical(views_first.flatten(), flat, features)


def test_label_smoothing_of_zero_is_none(backend, pair):
    for smoothing, same in ((0.0, True), (0.1, False)):
        plain = co.info_nce(*pair, reduction="none", backend=backend)
        smooth = co.info_nce(*pair, label_smoothing=smoothing, reduction="none", backend=backend)
        assert torch.equal(plain, smooth) == same


def test_clip_loss_is_the_mean_of_info_nce_in_both_directions(backend, pair):
    x, y = pair
    for options in ({}, {"label_smoothing": 0.1}):
        both = [co.info_nce(a, b, temperature=0.2, **options, reduction="none", backend=backend)
                for a, b in ((x, y), (y, x))]  # fmt: skip
        clip = co.clip_loss(x, y, 5.0, **options, reduction="none", backend=backend)
        assert_identical(clip, (both[0] + both[1]) / 2, x, y)


def test_clip_loss_swaps(backend, pair):
    x, y = pair
    assert_identical(
        co.clip_loss(x, y, 5.0, reduction="none", backend=backend),
        co.clip_loss(y, x, 5.0, reduction="none", backend=backend), x, y,
    )  # fmt: skip


def test_queue_of_size_zero_is_the_in_batch_loss(backend, pair):
    x, y = pair
    queue = torch.randn(5, 6, dtype=torch.float64)
    plain = co.info_nce(x, y, reduction="none", backend=backend)
    assert_identical(co.info_nce(x, torch.cat([y, queue[:0]]), reduction="none", backend=backend), plain, x, y)
    longer = co.info_nce(x, torch.cat([y, queue]), reduction="none", backend=backend)
    assert (longer > plain).all()


def test_target_permutes_the_keys(backend, pair):
    x, y = pair
    order = torch.randperm(14)
    plain = co.info_nce(x, y, reduction="none", backend=backend)
    assert_identical(co.info_nce(x, y[order], target=order.argsort(), reduction="none", backend=backend), plain, x, y)


def test_unique_ids_exclude_nothing(backend, pair):
    x, y = pair
    assert_identical(
        co.clip_loss(x, y, 5.0, ids=torch.randperm(14), reduction="none", backend=backend),
        co.clip_loss(x, y, 5.0, reduction="none", backend=backend), x, y,
    )  # fmt: skip


def test_nt_xent_is_dcl_with_its_positive_added_back(backend, pair):
    """softplus(DCL) = NT-Xent, row by row."""
    decoupled = co.dcl(*pair, temperature=0.4, reduction="none", backend=backend)
    assert_identical(
        co.nt_xent(*pair, temperature=0.4, reduction="none", backend=backend),
        F.softplus(decoupled, threshold=100.0), *pair,
    )  # fmt: skip


def test_dclw_is_dcl_where_all_positives_are_equally_hard(backend):
    """Equal similarities have weights of 1."""
    x = F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1).requires_grad_()
    assert_identical(
        co.dclw(x, x, reduction="none", backend=backend), co.dcl(x, x, reduction="none", backend=backend), x
    )


def test_nt_xent_labelled_of_two_views_is_nt_xent(backend, pair):
    z = torch.cat(pair)
    found = co.nt_xent_labelled(z, torch.arange(14).repeat(2), temperature=0.3, reduction="none", backend=backend)
    assert_identical(found, co.nt_xent(*pair, temperature=0.3, reduction="none", backend=backend), *pair)


def test_guided_info_nce_that_leaves_out_nothing_is_info_nce(backend, pair):
    """One block after the other: with the others' anchors, and with candidates of all."""
    x, y = pair
    more = torch.randn(9, 6, dtype=torch.float64)
    options = {"temperature": 0.2, "reduction": "none", "backend": backend}
    alone = {"margin": -10.0, "contrast_anchors": False, "contrast_positives": False}
    assert_identical(co.guided_info_nce(x, y, **alone, **options), co.info_nce(x, y, **options), x, y)
    found = co.guided_info_nce(x, y, negatives=more, **alone, **options)
    assert_identical(found, co.info_nce(x, torch.cat([y, more]), **options), x, y)
    # the anchors are keys of all but themselves
    ids = torch.arange(14)
    keys = co.info_nce(
        x, torch.cat([y, x]), query_ids=ids, key_ids=torch.cat([torch.full_like(ids, -1), ids]), **options
    )
    found = co.guided_info_nce(x, y, **(alone | {"contrast_anchors": True}), **options)
    assert_identical(found, keys, x, y)


@pytest.mark.parametrize("own", [True, False], ids=["student", "guide"])
def test_guide_that_leaves_out_everything(own, backend):
    """No candidate is as little similar as that: 0 with zero gradient."""
    x, y, z = (torch.randn(size, 4, requires_grad=True) for size in (9, 9, 5))
    guide = None if own else tuple(torch.randn(size, 3) for size in (9, 9, 5))
    results = evaluate(
        lambda x, y, negatives, **options: co.guided_info_nce(x, y, negatives=negatives, guide=guide, **options),
        (x, y, z),
        {"margin": 3.0, "backend": backend},
    )
    assert all((value == 0).all() for value in results.values()), results
    assert len(results) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [0, 1, 70])
def test_guided_info_nce_with_negatives(m, dtype, backend):
    x, y = arguments_of(TABLE["guided_info_nce"], 43, 10, dtype)
    negatives = F.normalize(torch.randn(m, 10), dim=1).to(dtype).requires_grad_()
    guides = tuple(torch.randint(-1, 2, (size, 8)).to(dtype) for size in (43, 43, m))
    options = {"guide": guides, "margin": 0.5, "normalize": False, "temperature": 0.25, "reduction": "none"}

    def call(function):
        return lambda x, y, z, **more: function(x, y, negatives=z, **more)

    judge(call(co.guided_info_nce), call(reference.guided_info_nce), (x, y, negatives), options,
          fused_options={"backend": backend}, logits=1.5 * LOGITS)  # fmt: skip


def test_soft_targets_that_are_sharp_are_clip_loss(backend, pair):
    """All of the teacher's mass is on the diagonal."""
    x, y = pair
    eye = torch.eye(14, dtype=torch.float64)
    options = {"temperature": 0.2, "teacher_temperature": 1e-3, "reduction": "none", "backend": backend}
    expected = co.clip_loss(x, y, 5.0, reduction="none", backend=backend)
    for one_hot in (0.0, 0.4):
        found = co.soft_target_loss(x, y, eye, eye, one_hot=one_hot, **options)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one_hot", [0.0, 0.3])
def test_soft_targets_over_other_columns(one_hot, dtype, backend):
    """More columns than rows, such as a queue, in the one direction that there is."""
    x, u = (F.normalize(torch.randn(21, d), dim=1).to(dtype).requires_grad_() for d in (10, 7))
    y, v = (F.normalize(torch.randn(50, d), dim=1).to(dtype).requires_grad_() for d in (10, 7))
    options = {"temperature": 0.25, "symmetric": False, "one_hot": one_hot, "reduction": "none"}
    judge(co.soft_target_loss, reference.soft_target_loss, (x, y, u, v), options,
          fused_options={"backend": backend}, logits=LOGITS)  # fmt: skip


@pytest.mark.parametrize("m", [0, 1])
def test_soft_targets_over_no_column_and_one(m, backend):
    x, y, u, v = (torch.randn(size, 4, requires_grad=True) for size in (5, m, 5, m))
    results = evaluate(co.soft_target_loss, (x, y, u, v), {"symmetric": False, "backend": backend})
    assert all((value == 0).all() for value in results.values()), results
    assert len(results) == 5


# a feature that is 1 everywhere shifts dot products; it changes volumes, and areas not at all
SHIFTED = [
    case
    for case in VARIANTS
    if case.values[0].op.startswith("similarity")
    and "dhel" not in case.values[0].name
    and case.values[0].name != "siglip_loss"
    and "relative" not in case.values[1].values()
]


@pytest.mark.parametrize(("loss", "variant"), SHIFTED)
def test_a_shift_of_the_logits_of_a_row_changes_nothing(loss, variant, backend):
    """The rows of the gradient w.r.t. the logits sum to 0: a feature that is 1 everywhere adds a constant to them.

    Not for DCLW, whose weighted positive doesn't balance its denominator row by row; its mean does, the weights' is 1.
    Nor for DHEL, whose denominators, one in each view, share one positive; for SigLIP, which has no denominator; or
    where a margin is a share of the similarity.
    """
    arguments = arguments_of(loss, 15, 5, torch.float64)
    options = {
        **variant,
        "normalize": False,
        "reduction": "mean" if loss.name == "dclw" else "none",
        "backend": backend,
    }

    def shifted(x):
        return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1) if x.dim() >= 2 else x

    if loss.name == "dclw":
        # its weights see the shift of the similarity, too, and are the same: softmax is blind to it
        options["sigma"] = 0.7
    torch.testing.assert_close(
        loss.fused(*map(shifted, arguments), **options), loss.fused(*arguments, **options), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_order_of_the_samples_does_not_matter(loss, variant, backend):
    arguments = arguments_of(loss, 31, 6, torch.float64)
    order = torch.randperm(31)
    moved = [a.index_select(-2 if a.dim() >= 2 else 0, order) if a.dim() else a for a in arguments]
    plain = loss.fused(*arguments, **variant, reduction="none", backend=backend).reshape(-1, 31)
    other = loss.fused(*moved, **variant, reduction="none", backend=backend).reshape(-1, 31)
    torch.testing.assert_close(other, plain[:, order], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
@pytest.mark.parametrize("loss", ROWS)
def test_extreme_temperatures_stay_finite(loss, scale, backend):
    arguments = arguments_of(loss, 30, 8)
    arguments, options = with_temperature(loss, arguments, 1 / scale)
    results = evaluate(loss.fused, arguments, options | {"backend": backend})
    assert all(value.isfinite().all() for value in results.values())
    truth = loss.naive(*(a.detach().double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                         for a in arguments), **options)  # fmt: skip
    # of the mean of 30 rows one may be all that is not 0, with the rounding of its logits
    rounding = scale * torch.finfo(torch.float32).eps / 30
    assert results["output0"].item() == pytest.approx(truth.item(), rel=1e-5, abs=rounding)


def test_gradients_have_the_dtypes_of_their_inputs(backend):
    """Features in bfloat16 with a float32 scale: the loss is float32, each gradient in the dtype of its input."""
    x, y = (torch.randn(10, 6).bfloat16().requires_grad_() for _ in range(2))
    scale = torch.tensor(5.0, requires_grad=True)
    loss = co.clip_loss(x, y, scale, backend=backend)
    loss.backward()
    assert (loss.dtype, x.grad.dtype, scale.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
