"""Volumes and areas: against float64, where the official determinants are noise, and the pairs taken out of them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from tolerance import evaluate, judge
from torch.nn import functional as F

import contrastive_ops as co
from contrastive_ops import reference
from contrastive_ops.backends import tiles
from contrastive_ops.losses import volume

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOGITS = 20.0  # volumes up to 1 at a temperature of 0.25, and log N on top


def related(n, d, count, dtype=torch.float32, angle=0.8, seed=0):
    """One unit vector per sample, seen by `count` modalities: each turned by about `angle`."""
    generator = torch.Generator().manual_seed(seed)
    base = F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)
    noise = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(count))
    return tuple(F.normalize(base + angle * F.normalize(x, dim=1), dim=1).to(dtype).requires_grad_() for x in noise)


def official_volume(vectors):
    """ispamm/GRAM, utils/volume.py: products in the dtype of the features, then a float32 determinant."""
    return (vectors @ vectors.mT).float().det().abs().sqrt()


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "no smoothing": {"label_smoothing": 0.0},
    "detached": {"detach_others": True},
    "raw": {"normalize": False},
    "weights": {"reduction": "mean"},
}


# more features than vectors, at most 5: 7 x 11 is smaller than any tile, 67 x 33 fits no vector register
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(7, 11), (67, 33)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("others", [1, 2, 3, 4])
def test_loss_of_any_number_of_modalities(others, options, n, d, backend, dtype):
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    temperature = torch.tensor(0.25, dtype=statistics, requires_grad=True)
    weight = {}
    if "reduction" in options:
        weight = {"sample_weight": torch.linspace(0.5, 1.5, n, dtype=statistics).requires_grad_()}
    arguments = related(n, d, 1 + others, dtype)
    options = {"reduction": "none", "temperature": temperature, **weight, **options}
    if dtype != torch.float64:
        judge(
            co.gram_loss,
            reference.gram_loss,
            arguments,
            options,
            fused_options={"backend": backend},
            logits=LOGITS,
        )
        return
    # a determinant in float64 is no truth for float64: its gradient is off by three times as much as by residuals
    truth = evaluate(reference.gram_loss, arguments, options)
    for name, value in evaluate(co.gram_loss, arguments, {**options, "backend": backend}).items():
        torch.testing.assert_close(value, truth[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 23, 64])
@pytest.mark.parametrize("squared", [False, True])
def test_triangles_in_tiles(squared, size, dtype, monkeypatch):
    """23 rows are one tile, 64 more than there are."""
    monkeypatch.setattr(tiles, "TILE", size)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    options = {
        "squared": squared,
        "temperature": torch.tensor(0.3, dtype=statistics, requires_grad=True),
        "sample_weight": torch.linspace(0.5, 1.5, 23, dtype=statistics).requires_grad_(),
    }
    judge(co.triangle_loss, reference.triangle_loss, related(23, 9, 3, dtype), options, logits=LOGITS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("squared", [False, True])
def test_areas_do_not_change_with_an_offset_of_all_corners(squared, dtype):
    corners = torch.randn(3, 23, 9)
    options = {"squared": squared, "temperature": 0.5, "normalize": False}
    judge(co.triangle_loss, reference.triangle_loss, [(p + 8).to(dtype).requires_grad_() for p in corners], options)
    far = [(p + 1000).to(dtype).requires_grad_() for p in corners]
    found, truth = (
        evaluate(function, far, options, dtype=of, exact=True)
        for function, of in ((co.triangle_loss, torch.float32), (reference.triangle_loss, torch.float64))
    )
    for name, value in truth.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name


def test_triangles_in_one_piece_are_those_in_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 5)
    corners = related(23, 9, 3)
    whole, in_tiles = (
        evaluate(co.triangle_loss, corners, {"reduction": "none", "backend": name}) for name in ("reference", "tiled")
    )
    for name, value in whole.items():
        torch.testing.assert_close(value, in_tiles[name])


def test_loss_of_1e_minus_12_is_no_rounding_of_zero(backend):
    """Matched volumes and areas are 0, all others 1: log(1 + 15 e^-30)."""
    eye, options = torch.eye(16), {"temperature": 1 / 30.0, "label_smoothing": 0.0}
    expected = math.log1p(15 * math.exp(-30.0))
    assert co.gram_loss(eye, eye, **options, backend=backend).item() == pytest.approx(expected, rel=1e-5)
    assert co.triangle_loss(eye, eye, -eye, **options).item() == pytest.approx(expected, rel=1e-5)
    assert reference.gram_loss(eye, eye, **options).item() == 0.0


# volumes of listed vectors
def exact_volume(vectors):
    """Float64: the product of the singular values, and its gradient, the volume times the pseudo-inverse."""
    exact = vectors.detach().double()
    value = torch.linalg.svdvals(exact).prod(-1)
    return value, value[..., None, None] * torch.linalg.pinv(exact).mT


@pytest.mark.parametrize("angle", [1.0, 0.1, 0.03, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2, 3, 5])
def test_volume_and_gradient_of_near_duplicates(k, dtype, angle):
    """The error grows like 1 / angle: a vector moved by eps turns its residual by eps / angle."""
    if torch.finfo(dtype).eps > angle / 4:
        angle = 0.03  # of bfloat16 most elements would be equal
    vectors = torch.stack(related(50, 64, k, dtype, angle), 1).detach().requires_grad_()
    value = co.gramian_volume(vectors)
    truth, true_grad = exact_volume(vectors)
    # of the logarithm: gradients as small as the volumes themselves would be subnormal in float16
    (grad,) = torch.autograd.grad(value, vectors, 1 / truth.to(value.dtype))
    true_grad = true_grad / truth[:, None, None]
    # for float64 the truth is rounded as much
    allowed = (32 if dtype == torch.float64 else 8) * torch.finfo(value.dtype).eps / angle
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((value - truth).abs() <= allowed * truth).all()
    error = (grad.double() - true_grad).flatten(1).norm(dim=1) / true_grad.flatten(1).norm(dim=1)
    assert (error <= allowed + torch.finfo(dtype).eps).all()


def test_matched_pairs_in_bfloat16():
    """256 matched triples of 512 features at an angle of 0.03, where the official recipe has noise for a volume."""
    vectors = torch.stack(related(256, 512, 3, torch.bfloat16, 0.03), 1).detach()
    truth, _ = exact_volume(vectors)

    def median_error(value):
        return ((value.double() - truth).abs() / truth).median().item()

    assert 5e-4 < truth.median().item() < 5e-3
    assert median_error(co.gramian_volume(vectors)) < 1e-6
    assert median_error(official_volume(vectors)) > 1e-2
    _, stats = co.gram_loss(*vectors.unbind(1), return_stats=True)
    unit_truth = truth / vectors.double().norm(dim=-1).prod(-1)
    assert ((-stats.positive_similarity.double() - unit_truth).abs() / unit_truth).median().item() < 1e-3


def test_identities_of_volumes():
    x, y, z = (v.double() for v in torch.randn(3, 20, 7))
    volume_of = co.gramian_volume(torch.stack([x, y, z], 1))
    for order in ([x, z, y], [z, y, x], [-x, y, -z]):
        torch.testing.assert_close(co.gramian_volume(torch.stack(order, 1)), volume_of)
    torch.testing.assert_close(co.gramian_volume(torch.stack([3 * x, y / 2, z], 1)), 1.5 * volume_of)
    # adding multiples of the others moves a face along itself
    torch.testing.assert_close(co.gramian_volume(torch.stack([x, y + 2 * x, z - y], 1)), volume_of)
    torch.testing.assert_close(co.gramian_volume(x[:, None]), x.norm(dim=1))
    cosine = F.cosine_similarity(x, y)
    unit = F.normalize(torch.stack([x, y], 1), dim=-1)
    torch.testing.assert_close(co.gramian_volume(unit), (1 - cosine.square()).sqrt())
    # twice the area of the triangle, for triangles in the plane
    corner = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    assert co.gramian_volume(corner[1:] - corner[0]).item() == pytest.approx(12.0)
    assert reference.triangle_areas(*corner.split(1)).item() == pytest.approx(6.0)


def test_signs_and_norms_change_no_loss(backend):
    a, x, y = related(17, 8, 3, torch.float64)
    plain = co.gram_loss(a, x, y, reduction="none", backend=backend)
    signs = torch.randn(17, 1).sign()
    torch.testing.assert_close(co.gram_loss(a, signs * x, -y, reduction="none", backend=backend), plain)
    torch.testing.assert_close(co.gram_loss(3 * a, y, x / 7, reduction="none", backend=backend), plain)


# quarters of small integers: their multiples and sums are exact in every dtype
X = torch.tensor([[3.0, -1, 2, 0, 1, -2], [1, 2, 0, -3, 1, 1], [0, 1, 1, 2, -1, 3]]) / 4
DEGENERATE = {
    "duplicates": torch.stack([X[0], X[0], X[1]]),
    "opposites": torch.stack([X[0], X[1], -X[0]]),
    "collinear": torch.stack([X[0], 3 * X[1], X[1]]),
    "in the span": torch.stack([X[0] / 2 - 3 * X[1], X[0], X[1]]),
    "zero": torch.stack([X[0], torch.zeros(6), X[1]]),
    "all zero": torch.zeros(3, 6),
    "more than D": X[:, :2],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DEGENERATE)
def test_dependent_vectors_have_volume_zero_and_zero_gradient(case, dtype):
    vectors = DEGENERATE[case].to(dtype).requires_grad_()
    value = co.gramian_volume(vectors)
    (grad,) = torch.autograd.grad(value, vectors)
    assert value.item() == 0.0
    assert (grad == 0).all()


def test_official_form_has_nan_or_noise_for_dependent_vectors():
    """What the test above would see of it: no gradient, or one as large as that of any volume."""
    spoiled = []
    for vectors in DEGENERATE.values():
        vectors = vectors.clone().requires_grad_()
        value = official_volume(vectors)
        (grad,) = torch.autograd.grad(value, vectors)
        spoiled.append(bool(grad.isnan().any() or grad.abs().max() > 1e-2 or value > 1e-5))
    assert all(spoiled)
    eye = torch.eye(4, requires_grad=True)
    (grad,) = torch.autograd.grad(official_volume(torch.stack([eye, eye], 1)).sum(), eye)
    assert grad.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_dependent_vectors_are_finite(backend, dtype):
    a, x, y = (v.detach().clone() for v in related(9, 6, 3, dtype))
    x[0] = y[0] = a[0]  # the best match there is
    a[1] = 0.0
    y[2] = x[2]  # a tuple without area: volume 0 with every anchor
    x[3] = y[3] = 0.0
    a, x, y = (v.requires_grad_() for v in (a, x, y))
    losses = [(co.gram_loss, {"backend": backend}), (co.triangle_loss, {}), (co.triangle_loss, {"squared": True})]
    for loss, options in losses:
        for normalize in (True, False):
            results = evaluate(loss, (a, x, y), {**options, "normalize": normalize})
            assert all(value.isfinite().all() for value in results.values())
            assert (results["grad of argument0"][4] != 0).any()
            if loss is co.gram_loss:  # a zero anchor and a tuple without area: at the minimum of all their volumes
                assert (results["grad of argument0"][1] == 0).all()
                for i in (2, 3):
                    assert (results["grad of argument1"][i] == 0).all()
                    assert (results["grad of argument2"][i] == 0).all()


def test_more_vectors_than_features(backend):
    """All volumes are 0: the loss is log N with zero gradient, both to the accuracy of a tile, 1e-3 of a volume."""
    results = evaluate(co.gram_loss, related(8, 2, 3), {"temperature": 1.0, "backend": backend})
    assert results["output0"].item() == pytest.approx(math.log(8), abs=2e-3)
    for i in range(3):
        assert results[f"grad of argument{i}"].abs().max() < 1e-3


# contracts
def test_gradcheck(backend):
    modalities = related(5, 7, 3, torch.float64)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *v: co.gramian_volume(torch.stack(v, 1)), modalities)
    for options in ({}, {"label_smoothing": 0.0, "normalize": False}):
        for function, names in ((co.gram_loss, {"backend": backend}), (co.triangle_loss, {})):
            assert torch.autograd.gradcheck(
                lambda *v, f=function, o={**options, **names}: f(*v[:-1], temperature=v[-1], **o),
                (*modalities, temperature),
            )


def test_volumes_differentiate_twice():
    vectors = torch.stack(related(4, 6, 3, torch.float64), 1).detach().requires_grad_()
    assert torch.autograd.gradgradcheck(co.gramian_volume, vectors)
    corners = related(4, 6, 3, torch.float64)
    assert torch.autograd.gradgradcheck(partial(co.triangle_loss, backend="reference"), corners)


def test_compiled_volume_and_loss_of_five_modalities():
    def call(*modalities):
        return co.gramian_volume(torch.stack(modalities, 1)).sum() + co.gram_loss(*modalities)

    modalities = related(13, 9, 5)
    torch.compiler.reset()
    both = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    plain = evaluate(call, modalities, {})
    for name, value in evaluate(both, modalities, {}).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("two_threads")
def test_runs_are_bitwise_repeatable(backend):
    modalities = related(150, 40, 4)
    for call in (
        lambda *v: co.gram_loss(*v, backend=backend),
        lambda *v: co.gram_loss(*v, detach_others=True, backend=backend),
        lambda a, x, y, _: co.triangle_loss(a, x, y),
    ):
        first, second = (evaluate(call, modalities, {}) for _ in range(2))
        assert all(torch.equal(value, second[name]) for name, value in first.items())


# pairs out of the plane
SMALL_TILES = pytest.mark.parametrize("tile", [None, 5], ids=["one tile", "small tiles"])


def cut(monkeypatch, tile):
    if tile is not None:
        monkeypatch.setattr(volume, "rows_per_chunk", lambda size, per_row: tile)


@SMALL_TILES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("others", [1, 2, 4])
def test_retrieval_is_the_dense_order(others, normalize, dtype, tile, monkeypatch):
    cut(monkeypatch, tile)
    anchor, *_ = related(12, 16, 1, dtype)
    tuples = torch.stack(related(23, 16, others, dtype, seed=5), 1).detach()
    tuples = tuples * torch.linspace(0.5, 2.0, 23, dtype=dtype)[:, None, None]
    volumes, indices = co.gram_retrieve(anchor, tuples, 6, normalize=normalize)
    vectors = [anchor.detach().double(), *tuples.double().unbind(1)]
    dense = reference.gram_volumes(*(F.normalize(v, dim=1) if normalize else v for v in vectors))
    expected, order = dense.sort(1)
    assert torch.equal(indices, order[:, :6])
    assert not volumes.requires_grad
    assert volumes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(volumes.double(), expected[:, :6], rtol=1e-5, atol=0)


def test_retrieval_sorts_near_duplicates_exactly():
    """Volumes from 1e-5 to 1e-4 are below the rounding of a tile; the survivors are measured again."""
    anchor = F.normalize(torch.randn(1, 32), dim=1)
    away = torch.randn(40, 32)
    away = F.normalize(away - (away @ anchor.T) * anchor, dim=1)
    angle = torch.cat([1e-5 * torch.arange(1, 11).flip(0), torch.full((30,), 0.5)])
    tuples = (anchor + angle[:, None] * away)[:, None]
    volumes, indices = co.gram_retrieve(anchor, tuples, 10)
    assert indices.tolist() == [list(range(9, -1, -1))]
    torch.testing.assert_close(volumes[0], 1e-5 * torch.arange(1.0, 11.0), rtol=2e-2, atol=0)


def test_retrieval_of_everything_and_from_no_anchor():
    anchor, tuples = related(4, 6, 1)[0], torch.randn(7, 2, 6)
    _, indices = co.gram_retrieve(anchor, tuples, 7)
    assert torch.equal(indices.sort(1).values, torch.arange(7).expand(4, 7))
    volumes, indices = co.gram_retrieve(anchor[:0], tuples, 3)
    assert volumes.shape == indices.shape == (0, 3)


def probabilities(modalities, temperature):
    """Of each anchor over the tuples, and of each tuple over the anchors."""
    logits = -reference.gram_volumes(*(v.detach().double() for v in modalities)) / temperature
    weights = [(side.softmax(1) + 1e-4).fill_diagonal_(0.0) for side in (logits, logits.T)]
    return [weight / weight.sum(1, keepdim=True) for weight in weights]


# at 0.001 only the floor of the probabilities is left beside the matched pair: a uniform draw
@SMALL_TILES
@pytest.mark.parametrize(("temperature", "angle"), [(0.3, 0.8), (0.001, 0.05)])
def test_draws_have_the_exact_distribution(temperature, angle, tile, backend, monkeypatch):
    n, draws = 7, 600
    cut(monkeypatch, tile)
    modalities = related(n, 9, 3, angle=angle)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(2, n, n, dtype=torch.float64)
    one = torch.ones(n, 1, dtype=torch.float64)
    for _ in range(draws):
        drawn = co.sample_gram_negatives(*modalities, temperature=temperature, generator=generator, backend=backend)
        for count, index in zip(counts, drawn, strict=True):
            count.scatter_add_(1, index[:, None], one)
    assert (counts.diagonal(dim1=1, dim2=2) == 0).all()
    expected = draws * torch.stack(probabilities(modalities, temperature))
    off = ~torch.eye(n, dtype=torch.bool).expand(2, n, n)
    assert expected[off].min() > 5
    statistic = ((counts - expected)[off].square() / expected[off]).sum().item()
    assert statistic < 112.3  # 2 x 7 rows of 5 degrees of freedom: exceeded once in a thousand seeds


def test_draws_are_functions_of_the_generator(backend):
    modalities = related(60, 9, 3)
    draws = [
        co.sample_gram_negatives(*modalities, generator=torch.Generator().manual_seed(seed), backend=backend)
        for seed in (1, 1, 2)
    ]
    for first, again, other in zip(*draws, strict=True):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert not first.requires_grad
        assert (first != torch.arange(60)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_of_every_dtype_leave_the_diagonal_out(dtype):
    """Duplicates of the own tuple, zero vectors, an extreme temperature: never the own index, never out of range."""
    a, x = (v.detach().clone() for v in related(12, 5, 2, dtype))
    x[6:] = x[:6]
    a[3] = 0.0
    for index in co.sample_gram_negatives(a, x, temperature=1e-3, normalize=False):
        assert index.dtype == torch.int64
        assert ((index >= 0) & (index < 12) & (index != torch.arange(12))).all()
