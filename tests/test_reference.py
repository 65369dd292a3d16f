"""The naive twins against Python loops written from the papers, numbers worked out by hand, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from contrastive_ops import reference
from contrastive_ops.catalogue import LOSSES


def softmax_loss(positive, others):
    """-log of the softmax of the positive among itself and the others."""
    return math.log(math.exp(positive) + sum(math.exp(s) for s in others)) - positive


def dots(x, y):
    return [[sum(a * b for a, b in zip(p, q, strict=True)) for q in y] for p in x]


def unit(rows):
    return [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in rows]


def inputs(n, m=None, d=3):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(m or n, d, generator=generator, dtype=torch.float64)
    return x, y


@pytest.mark.parametrize("normalize", [True, False])
def test_info_nce_is_its_loop(normalize):
    x, y = inputs(4, 6)
    target, query_ids, key_ids = [5, 0, 0, 2], [1, 2, 3, 1], [3, 1, 1, 2, 9, 1]
    weight, epsilon, tau = [0.5, 1.0, 2.0, 0.0], 0.2, [0.5, 1.0, 2.0, 0.7]
    s = dots(unit(x.tolist()), unit(y.tolist())) if normalize else dots(x.tolist(), y.tolist())
    losses = []
    for i in range(4):
        row = [s[i][j] / tau[i] for j in range(6)]
        takes_part = [j for j in range(6) if j == target[i] or key_ids[j] != query_ids[i]]
        lse = math.log(sum(math.exp(row[j]) for j in takes_part))
        uniform = sum(row[j] for j in takes_part) / len(takes_part)
        losses.append(lse - (1 - epsilon) * row[target[i]] - epsilon * uniform)
    options = {
        "target": torch.tensor(target), "query_ids": torch.tensor(query_ids), "key_ids": torch.tensor(key_ids),
        "sample_weight": torch.tensor(weight, dtype=torch.float64), "label_smoothing": epsilon,
        "temperature": torch.tensor(tau, dtype=torch.float64), "normalize": normalize,
    }  # fmt: skip
    torch.testing.assert_close(reference.info_nce(x, y, **options, reduction="none").tolist(), losses)
    total = sum(w * value for w, value in zip(weight, losses, strict=True))
    assert reference.info_nce(x, y, **options, reduction="sum").item() == pytest.approx(total, rel=1e-12)
    assert reference.info_nce(x, y, **options).item() == pytest.approx(total / sum(weight), rel=1e-12)


@pytest.mark.parametrize("ids", [None, [0, 1, 0, 2, 1]])
def test_clip_loss_is_its_loop(ids):
    x, y = inputs(5)
    scale, epsilon = 3.0, 0.1
    s = [[scale * c for c in row] for row in dots(unit(x.tolist()), unit(y.tolist()))]
    losses = []
    for i in range(5):
        takes_part = [j for j in range(5) if j == i or ids is None or ids[j] != ids[i]]
        both = 0.0
        for line in ([s[i][j] for j in takes_part], [s[j][i] for j in takes_part]):
            lse = math.log(sum(math.exp(v) for v in line))
            both += lse - (1 - epsilon) * s[i][i] - epsilon * sum(line) / len(line)
        losses.append(both / 2)
    got = reference.clip_loss(
        x, y, scale, ids=None if ids is None else torch.tensor(ids), label_smoothing=epsilon, reduction="none"
    )
    torch.testing.assert_close(got.tolist(), losses)


@pytest.mark.parametrize("name", ["nt_xent", "dcl", "dclw"])
def test_losses_over_two_views_are_their_loops(name):
    n, tau, sigma = 4, 0.7, 0.4
    x, y = inputs(n)
    z = unit(x.tolist() + y.tolist())
    c = dots(z, z)
    losses = []
    for a in range(2 * n):
        other_view = (a + n) % (2 * n)
        negatives = [c[a][b] / tau for b in range(2 * n) if b % n != a % n]
        positive = c[a][other_view] / tau
        weights = [math.exp(c[i][i + n] / sigma) for i in range(n)]
        weight = 2 - n * weights[a % n] / sum(weights) if name == "dclw" else 1.0
        if name == "nt_xent":
            losses.append(softmax_loss(positive, negatives))
        else:
            losses.append(math.log(sum(math.exp(v) for v in negatives)) - weight * positive)
    options = {"temperature": tau, "reduction": "none"} | ({"sigma": sigma} if name == "dclw" else {})
    torch.testing.assert_close(getattr(reference, name)(x, y, **options).tolist(), losses)


def test_weights_of_dclw_carry_no_gradient():
    x, y = inputs(4)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(reference.dclw(x, y, normalize=False), x)
    weight = 2 - 4 * ((x * y).sum(1) / 0.5).softmax(0).detach()
    (decoupled,) = torch.autograd.grad(reference.dcl(x, y, normalize=False), x)
    # the difference to DCL is (1 - w_i) times the gradient of the positive's logit at tau = 0.1, in the mean of 2N
    torch.testing.assert_close(grad, decoupled + (1 - weight)[:, None] * y / 0.1 / 4)


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("views", [1, 2])
def test_supcon_is_its_loop(views, variant):
    labels, tau = [0, 1, 0, 2, 1, 0], 0.5
    x, _ = inputs(6 * views)
    z = unit(x.tolist())
    label = [y for y in labels for _ in range(views)]
    s = [[c / tau for c in row] for row in dots(z, z)]
    losses = []
    for a in range(len(z)):
        others = [b for b in range(len(z)) if b != a]
        positives = [b for b in others if label[b] == label[a]]
        if not positives:
            losses.append(0.0)
            continue
        lse = math.log(sum(math.exp(s[a][b]) for b in others))
        if variant == "out":
            losses.append(sum(lse - s[a][p] for p in positives) / len(positives))
        else:
            losses.append(lse - math.log(sum(math.exp(s[a][p]) for p in positives) / len(positives)))
    features = x if views == 1 else x.view(6, views, 3)
    options = {"temperature": tau, "variant": variant}
    got = reference.supcon(features, torch.tensor(labels), **options, reduction="none")
    torch.testing.assert_close(got.flatten().tolist(), losses)
    valid = sum(value != 0.0 for value in losses)
    assert valid == (5 if views == 1 else 12)
    dropped = reference.supcon(features, torch.tensor(labels), **options, empty="drop").item()
    assert dropped == pytest.approx(sum(losses) / valid, rel=1e-12)
    assert reference.supcon(features, torch.tensor(labels), **options).item() == pytest.approx(
        sum(losses) / len(losses), rel=1e-12
    )


# of an identity matrix every similarity is 1 or 0, and the losses are logarithms that one can write down
@pytest.mark.parametrize(
    ("name", "arguments", "options", "expected"),
    [
        ("info_nce", 2, {"temperature": 1.0}, math.log(math.e + 2) - 1),
        ("info_nce", 2, {"temperature": 0.5}, math.log(math.e**2 + 2) - 2),
        ("info_nce", 2, {"temperature": 1.0, "label_smoothing": 0.3}, math.log(math.e + 2) - 0.7 - 0.1),
        ("clip_loss", 2, {"logit_scale": 2.0}, math.log(math.e**2 + 2) - 2),
        ("nt_xent", 2, {"temperature": 1.0}, math.log(math.e + 4) - 1),
        ("dcl", 2, {"temperature": 1.0}, math.log(4) - 1),
        ("dclw", 2, {"temperature": 1.0}, math.log(4) - 1),
        ("siglip_loss", 2, {"logit_scale": 2.0, "logit_bias": -1.0}, math.log1p(1 / math.e) * 3),
        ("guided_info_nce", 2, {"temperature": 1.0}, math.log(math.e + 6) - 1),
        ("guided_info_nce", 2, {"temperature": 1.0, "contrast_anchors": False}, math.log(math.e + 4) - 1),
        ("guided_info_nce", 2, {"temperature": 1.0, "margin": 1.5}, 0.0),
        ("soft_target_loss", 4, {"temperature": 1.0}, math.log(math.e + 2) - math.e / (math.e + 2)),
        (
            "soft_target_loss",
            4,
            {"temperature": 1.0, "one_hot": 0.5},
            math.log(math.e + 2) - (1 + math.e / (math.e + 2)) / 2,
        ),
    ],
)
def test_identity_matrices_by_hand(name, arguments, options, expected):
    eye = torch.eye(3, dtype=torch.float64)
    assert getattr(reference, name)(*[eye] * arguments, **options).item() == pytest.approx(expected, rel=1e-14)


def test_supcon_by_hand():
    """Two classes of two orthonormal rows: three others, all at similarity 0, of which one is positive."""
    eye, labels = torch.eye(4, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    for variant in ("out", "in"):
        loss = reference.supcon(eye, labels, temperature=1.0, variant=variant)
        assert loss.item() == pytest.approx(math.log(3), rel=1e-14)


@pytest.mark.parametrize("weight", ["per_pair", "per_anchor"])
@pytest.mark.parametrize("ids", [None, [0, 1, 0, 2, 0]])
def test_siglip_loss_is_its_loop(ids, weight):
    x, y = inputs(5)
    scale, bias, of_samples = 3.0, -1.5, [0.5, 1.0, 2.0, 0.0, 1.0]
    s = [[scale * c + bias for c in row] for row in dots(unit(x.tolist()), unit(y.tolist()))]
    ids = ids or list(range(5))
    losses = []
    for i in range(5):
        count = ids.count(ids[i]) if weight == "per_anchor" else 1
        by_image, by_text = (
            sum(math.log1p(math.exp(-v)) / count if ids[j] == ids[i] else math.log1p(math.exp(v)) for j, v in row)
            for row in (enumerate(s[i]), enumerate(line[i] for line in s))
        )
        losses.append((by_image + by_text) / 2 if weight == "per_anchor" else by_image)
    options = {"ids": torch.tensor(ids), "weight": weight}
    got = reference.siglip_loss(x, y, scale, bias, **options, reduction="none")
    torch.testing.assert_close(got.tolist(), losses)
    weights = torch.tensor(of_samples, dtype=torch.float64)
    mean = reference.siglip_loss(x, y, scale, bias, **options, sample_weight=weights).item()
    weighted = sum(w * value for w, value in zip(of_samples, losses, strict=True))
    assert mean == pytest.approx(weighted / sum(of_samples), rel=1e-12)


@pytest.mark.parametrize("over", ["pairs", "anchors"])
def test_nt_xent_labelled_is_its_loop(over):
    labels, weight, tau = [0, 1, 0, 2, 1, 0], [0.5, 1.0, 2.0, 1.0, 0.0, 1.0], 0.5
    x, _ = inputs(6)
    z = unit(x.tolist())
    s = [[c / tau for c in row] for row in dots(z, z)]
    pairs = []  # of each anchor, one number for each of its positives
    for a in range(6):
        negatives = [s[a][b] for b in range(6) if labels[b] != labels[a]]
        positives = [s[a][b] for b in range(6) if labels[b] == labels[a] and b != a]
        pairs.append([softmax_loss(positive, negatives) for positive in positives])
    anchors = [sum(of_anchor) / max(len(of_anchor), 1) for of_anchor in pairs]
    if over == "pairs":
        terms = [(w, value) for w, of_anchor in zip(weight, pairs, strict=True) for value in of_anchor]
    else:
        terms = list(zip(weight, anchors, strict=True))
    options = {"temperature": tau, "over": over}
    weights = torch.tensor(weight, dtype=torch.float64)
    labels = torch.tensor(labels)
    got = reference.nt_xent_labelled(x, labels, **options, reduction="none")
    torch.testing.assert_close(got.tolist(), anchors)
    plain = reference.nt_xent_labelled(x, labels, **options).item()
    assert plain == pytest.approx(sum(value for _, value in terms) / len(terms), rel=1e-12)
    weighted = reference.nt_xent_labelled(x, labels, **options, sample_weight=weights).item()
    total = sum(w * value for w, value in terms)
    assert weighted == pytest.approx(total / sum(w for w, _ in terms), rel=1e-12)
    summed = reference.nt_xent_labelled(x, labels, **options, sample_weight=weights, reduction="sum").item()
    assert summed == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("strategy", ["absolute", "relative"])
def test_guided_info_nce_is_its_loop(strategy, guided):
    x, y = inputs(6)
    y = y + x
    z, _ = inputs(4)
    sides = [unit(side.tolist()) for side in (x, y, z)]
    of_guide = [torch.randn(len(side), 5, dtype=torch.float64) for side in sides]
    guides = [unit(side.tolist()) for side in of_guide] if guided else sides
    margin, tau = 0.1, 0.5
    losses = []
    for i in range(6):
        known = dots(guides[0], guides[1])[i][i]
        ceiling = known - (margin if strategy == "absolute" else margin * abs(known))
        candidates = []
        for row, col in ((0, 1), (0, 0), (1, 1), (0, 2)):
            s, g = dots(sides[row], sides[col])[i], dots(guides[row], guides[col])[i]
            candidates += [s[j] / tau for j in range(len(s)) if g[j] <= ceiling and (j != i or col == 2)]
        losses.append(softmax_loss(dots(sides[0], sides[1])[i][i] / tau, candidates))
    options = {"negatives": z, "guide": tuple(of_guide) if guided else None, "temperature": tau, "margin": margin}
    got = reference.guided_info_nce(x, y, **options, margin_strategy=strategy, reduction="none")
    torch.testing.assert_close(got.tolist(), losses)


@pytest.mark.parametrize("symmetric", [True, False])
def test_soft_target_loss_is_its_loop(symmetric):
    x, y = inputs(4, 4 if symmetric else 6)
    u, v = inputs(4, 4 if symmetric else 6, d=5)
    tau, of_teacher, h = 0.5, 0.3, 0.2
    s = [[c / tau for c in row] for row in dots(unit(x.tolist()), unit(y.tolist()))]
    z = [[c / of_teacher for c in row] for row in dots(unit(u.tolist()), unit(v.tolist()))]

    def cross_entropy(logits, teacher, place):
        lse = math.log(sum(math.exp(v) for v in logits))
        mass = [math.exp(v) for v in teacher]
        return sum((lse - logits[j]) * ((1 - h) * mass[j] / sum(mass) + h * (j == place)) for j in range(len(logits)))

    losses = [cross_entropy(s[i], z[i], i) for i in range(4)]
    if symmetric:
        cols = [cross_entropy([row[i] for row in s], [row[i] for row in z], i) for i in range(4)]
        losses = [(a + b) / 2 for a, b in zip(losses, cols, strict=True)]
    options = {"temperature": tau, "teacher_temperature": of_teacher, "one_hot": h, "symmetric": symmetric}
    torch.testing.assert_close(reference.soft_target_loss(x, y, u, v, **options, reduction="none").tolist(), losses)


def test_similarity_logits_is_its_loop():
    x, y = inputs(3, 4)
    a, b = [0.5, 1.0, 2.0], [1.0, -1.0, 0.5, 3.0]
    p, q = [0.1, 0.2, 0.3], [1.0, 2.0, 3.0, 4.0]
    exclude, rows, cols = [2, -1, 0], [0, 1, 2], [1, 1, 7, 0]
    c = dots(x.tolist(), y.tolist())
    tensors = {
        name: torch.tensor(v, dtype=torch.float64)
        for name, v in {"row_scale": a, "col_scale": b, "row_bias": p, "col_bias": q}.items()
    } | {"exclude": torch.tensor(exclude), "row_ids": torch.tensor(rows), "col_ids": torch.tensor(cols)}
    for restrict in (False, True):
        expected = [
            [
                -math.inf
                if j == exclude[i] or (rows[i] == cols[j]) != restrict
                else a[i] * b[j] * c[i][j] + p[i] + q[j]
                for j in range(4)
            ]
            for i in range(3)
        ]
        torch.testing.assert_close(reference.similarity_logits(x, y, **tensors, restrict=restrict).tolist(), expected)


def test_self_similarity_logits_are_symmetric():
    """The row options on both sides; a pair is out when either of its rows names the other."""
    x, _ = inputs(4)
    scale, bias = torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    exclude = torch.tensor([1, -1, 3, -1])
    logits = reference.similarity_logits(x, row_scale=scale, row_bias=bias, exclude=exclude)
    out = {(0, 1), (1, 0), (2, 3), (3, 2)}
    for i in range(4):
        for j in range(4):
            value = scale[i] * scale[j] * (x[i] @ x[j]) + bias[i] + bias[j]
            assert logits[i, j].item() == (-math.inf if (i, j) in out else pytest.approx(value.item()))


def test_logsumexp_of_an_empty_set_has_no_gradient():
    logits = torch.tensor([[1.0, 2.0], [-math.inf, -math.inf]], dtype=torch.float64, requires_grad=True)
    lse = reference.logsumexp(logits, 1)
    assert lse[0].item() == pytest.approx(math.log(math.e + math.e**2))
    assert lse[1].item() == -math.inf
    (grad,) = torch.autograd.grad(lse, logits, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(grad, torch.stack([logits[0].softmax(0), torch.zeros(2, dtype=torch.float64)]))
    assert reference.logsumexp(logits[:, :0], 1).tolist() == [-math.inf] * 2


# Not the derivative of their value: DCLW, its weights are detached (it has a test of its own above), and GRAM with one
# side detached. The areas of triangles are made of torch.cdist, which has no second derivative.
TWICE = [
    pytest.param(r, v, id=f"{r.name}-{v or 'plain'}")
    for r in LOSSES
    for v in r.variants
    if r.name not in ("dclw", "triangle_loss") and "detach_others" not in v
]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("loss", "variant"), TWICE)
def test_gradients_to_second_order(loss, variant, normalize):
    arguments = loss.inputs(5, 3, torch.float64, torch.Generator().manual_seed(1))
    tensors = [t for t in arguments if t.requires_grad]
    rest = arguments[len(tensors) :]
    unscaled = loss.name in ("clip_loss", "siglip_loss", "uniformity", "joint_entropy")
    options = {**variant, "normalize": normalize} | ({} if unscaled else {"temperature": 0.5})

    def call(*given):
        return loss.naive(*given, *rest, **options)

    torch.autograd.gradcheck(call, tensors)
    torch.autograd.gradgradcheck(call, tensors)


def test_zero_row_is_at_similarity_zero_without_gradient():
    x, y = inputs(4)
    x[1] = 0
    x.requires_grad_()
    loss = reference.info_nce(x, y, temperature=0.5, reduction="none")
    assert loss[1].item() == pytest.approx(math.log(4))
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert (grad[1] == 0).all()
    assert (grad[0] != 0).all()
