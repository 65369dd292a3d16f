"""Other people's implementations, in float64: the libraries where they install, else their formula as they print it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import contrastive_ops as co


def assert_same(ours, theirs, *tensors):
    """Value and gradients to 1e-9."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    grads = torch.autograd.grad(ours, tensors), torch.autograd.grad(theirs, tensors)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert (b != 0).any()


@pytest.fixture
def pair():
    x, y = torch.randn(2, 24, 10, dtype=torch.float64)
    return x.requires_grad_(), (x.detach() + y).requires_grad_()


@pytest.fixture
def labelled():
    """Every class has at least two members, so that no policy about empty rows is involved."""
    labels = torch.cat([torch.arange(6), torch.arange(6), torch.randint(0, 6, (11,))])[torch.randperm(23)]
    return torch.randn(23, 10, dtype=torch.float64).requires_grad_(), labels


@pytest.fixture
def metric_losses():
    return pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")


@pytest.fixture
def reducers():
    return pytest.importorskip("pytorch_metric_learning.reducers", reason="pytorch-metric-learning is not installed")


@pytest.fixture
def info_nce_module():
    return pytest.importorskip("info_nce", reason="info-nce-pytorch is not installed")


def test_nt_xent_is_that_of_pytorch_metric_learning(metric_losses, backend, pair):
    theirs = metric_losses.SelfSupervisedLoss(metric_losses.NTXentLoss(temperature=0.2))
    assert_same(co.nt_xent(*pair, temperature=0.2, backend=backend), theirs(*pair), *pair)


def test_nt_xent_is_supcon_of_pytorch_metric_learning(metric_losses, backend, pair):
    theirs = metric_losses.SelfSupervisedLoss(metric_losses.SupConLoss(temperature=0.2))
    assert_same(co.nt_xent(*pair, temperature=0.2, backend=backend), theirs(*pair), *pair)


def test_info_nce_is_the_one_way_nt_xent_of_pytorch_metric_learning(metric_losses, backend, pair):
    theirs = metric_losses.SelfSupervisedLoss(metric_losses.NTXentLoss(temperature=0.2), symmetric=False)
    assert_same(co.info_nce(*pair, temperature=0.2, backend=backend), theirs(*pair), *pair)


def test_supcon_is_that_of_pytorch_metric_learning(metric_losses, backend, labelled):
    features, labels = labelled
    theirs = metric_losses.SupConLoss(temperature=0.2)(features, labels)
    assert_same(co.supcon(features, labels, temperature=0.2, backend=backend), theirs, features)


@pytest.mark.parametrize("empty", ["drop", "zero"])
def test_supcon_with_classes_of_one_is_that_of_pytorch_metric_learning(metric_losses, reducers, empty, backend):
    """Its default reducer leaves anchors without positives out of the mean; its MeanReducer counts them as 0."""
    features = torch.randn(20, 10, dtype=torch.float64, requires_grad=True)
    labels = torch.cat([torch.arange(8), torch.arange(4).repeat(3)])  # 4 to 7 are alone
    reducer = {} if empty == "drop" else {"reducer": reducers.MeanReducer()}
    theirs = metric_losses.SupConLoss(temperature=0.2, **reducer)(features, labels)
    ours = co.supcon(features, labels, temperature=0.2, empty=empty, backend=backend)
    assert_same(ours, theirs, features)


@pytest.mark.parametrize("alone", [False, True], ids=["all have positives", "classes of one"])
def test_nt_xent_labelled_is_ntxent_of_pytorch_metric_learning(metric_losses, alone, backend, labelled):
    """A mean over the pairs: an anchor without a positive is in none."""
    features, labels = labelled
    if alone:
        labels = torch.where(labels < 4, labels, torch.arange(23) + 10)
    theirs = metric_losses.NTXentLoss(temperature=0.2)(features, labels)
    assert_same(co.nt_xent_labelled(features, labels, temperature=0.2, backend=backend), theirs, features)


def test_info_nce_is_that_of_info_nce_pytorch(info_nce_module, backend, pair):
    theirs = info_nce_module.InfoNCE(temperature=0.2)(*pair)
    assert_same(co.info_nce(*pair, temperature=0.2, backend=backend), theirs, *pair)
    per_row = info_nce_module.InfoNCE(temperature=0.2, reduction="none")(*pair)
    torch.testing.assert_close(co.info_nce(*pair, temperature=0.2, reduction="none", backend=backend), per_row)


def test_info_nce_with_shared_negatives_is_that_of_info_nce_pytorch(info_nce_module, backend, pair):
    """negative_mode="unpaired": only the given negatives, not the other positives. One id keeps the others out."""
    query, positive = pair
    negatives = torch.randn(17, 10, dtype=torch.float64).requires_grad_()
    theirs = info_nce_module.InfoNCE(temperature=0.2, negative_mode="unpaired")(query, positive, negatives)
    ours = co.info_nce(
        query,
        torch.cat([positive, negatives]),
        temperature=0.2,
        query_ids=torch.zeros(24, dtype=torch.int64),
        key_ids=torch.cat([torch.zeros(24, dtype=torch.int64), torch.ones(17, dtype=torch.int64)]),
        backend=backend,
    )
    assert_same(ours, theirs, query, positive, negatives)


@pytest.mark.parametrize("logit_bias", [None, -10.0])
def test_clip_loss_is_that_of_open_clip(logit_bias, backend, pair):
    """ClipLoss.get_logits and forward; features come normalised, a bias cancels."""
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    image, text = (F.normalize(x, dim=-1) for x in pair)
    logits_per_image = scale * image @ text.T
    logits_per_text = scale * text @ image.T
    if logit_bias is not None:
        logits_per_image, logits_per_text = logits_per_image + logit_bias, logits_per_text + logit_bias
    labels = torch.arange(len(image))
    theirs = (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2
    assert_same(co.clip_loss(*pair, scale, backend=backend), theirs, *pair, scale)
    image, text = (F.normalize(x, dim=-1) for x in pair)
    ours = co.clip_loss(image, text, scale, normalize=False, backend=backend)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("logit_bias", [-10.0, torch.tensor(3.0), torch.nn.Parameter(torch.tensor([-10.0]))])
def test_clip_takes_what_models_of_open_clip_return(logit_bias, backend, pair):
    """clip_loss(**model(images, texts)), of a model with a bias; a bias of all logits is in no softmax."""
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    image, text = (F.normalize(x, dim=-1) for x in pair)
    output = {"image_features": image, "text_features": text, "logit_scale": scale, "logit_bias": logit_bias}
    expected = co.clip_loss(image, text, scale, normalize=False, backend=backend)
    ours = co.clip_loss(**output, output_dict=False, normalize=False, backend=backend)
    assert torch.equal(ours, expected)
    assert co.nn.CLIPLoss(normalize=False, backend=backend)(**output).equal(expected)
    dense = co.reference.clip_loss(**output, normalize=False)
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=0)
    if isinstance(logit_bias, torch.nn.Parameter):  # DDP waits for its gradient
        for loss in (ours, dense):
            (grad,) = torch.autograd.grad(loss, logit_bias, retain_graph=True)
            assert grad.shape == (1,)
            assert abs(grad.item()) < 1e-7
    per_row = co.clip_loss(**output, normalize=False, reduction="none", backend=backend)
    assert per_row.shape == (len(image),)


@pytest.mark.parametrize("bias", [-10.0, 0.0])
def test_siglip_loss_is_that_of_open_clip(bias, backend, pair):
    """SigLipLoss.forward of one process: labels of 1 and -1, the sum over all pairs, divided by the images."""
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([bias], dtype=torch.float64, requires_grad=True)
    image, text = (F.normalize(x, dim=-1) for x in pair)
    logits = scale * image @ text.T + bias
    labels = 2 * torch.eye(len(image), dtype=torch.float64) - 1
    theirs = -F.logsigmoid(labels * logits).sum() / len(image)
    assert_same(co.siglip_loss(*pair, scale, bias, backend=backend), theirs, *pair, scale, bias)
    output = {"image_features": image, "text_features": text, "logit_scale": scale, "logit_bias": bias}
    ours = co.siglip_loss(**output, output_dict=False, normalize=False, backend=backend)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_siglip_with_ids_is_that_of_siglip_kernel(backend, pair):
    """SigLIPPlusLoss: 1 / k for each of the k positives of an anchor, the mean of both directions."""
    ids = torch.arange(24) % 7
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (8.0, -6.0))
    image, text = (F.normalize(x, dim=-1) for x in pair)
    logits = scale * image @ text.T + bias
    same = (ids[:, None] == ids).double()
    weight = same / same.sum(1, keepdim=True) + (1 - same)
    of_pairs = weight * F.binary_cross_entropy_with_logits(logits, same, reduction="none")
    theirs = (of_pairs.sum(1).mean() + of_pairs.sum(0).mean()) / 2
    ours = co.siglip_loss(*pair, scale, bias, ids=ids, weight="per_anchor", backend=backend)
    assert_same(ours, theirs, *pair, scale, bias)


@pytest.mark.parametrize("width", [10, 16])
def test_soft_target_loss_is_the_distillation_of_open_clip(width, backend, pair):
    """DistillClipLoss.dist_loss of both directions; the teacher has another scale, and may have another width."""
    scale, of_teacher = torch.tensor(14.0, dtype=torch.float64, requires_grad=True), 30.0
    teacher = [F.normalize(x, dim=-1) for x in torch.randn(2, 24, width, dtype=torch.float64)]
    image, text = (F.normalize(x, dim=-1) for x in pair)

    def dist_loss(teacher_logits, student_logits):
        return -(teacher_logits.softmax(dim=1) * student_logits.log_softmax(dim=1)).sum(dim=1).mean(dim=0)

    student_logits, teacher_logits = scale * image @ text.T, of_teacher * teacher[0] @ teacher[1].T
    theirs = (dist_loss(teacher_logits, student_logits) + dist_loss(teacher_logits.T, student_logits.T)) / 2
    ours = co.soft_target_loss(
        *pair, *teacher, temperature=1 / scale, teacher_temperature=1 / of_teacher, backend=backend
    )
    assert_same(ours, theirs, *pair, scale)


@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("contrast", [True, False])
def test_guided_info_nce_is_the_gist_loss_of_sentence_transformers(contrast, strategy, backend, pair):
    """GISTEmbedLoss.forward of an anchor, a positive and a negative each, whose own anchors and positives are masked.

    There only the positive's own logit is protected: an anchor and itself are left out because its guide finds 1, more
    than for the positive. So here, where no guide's similarity of anchor and positive is 1.
    """
    negative = torch.randn(24, 10, dtype=torch.float64, requires_grad=True)
    guides = [torch.randn(24, 7, dtype=torch.float64) for _ in range(3)]
    guides[1] = guides[0] + guides[1]
    margin, temperature = 0.05, 0.1
    a, p, n = (F.normalize(x, dim=1) for x in (*pair, negative))
    guided_a, guided_p, guided_n = (F.normalize(x, dim=1) for x in guides)
    guided_sim = (guided_a * guided_p).sum(1, keepdim=True)
    thresholds = guided_sim - (margin if strategy == "absolute" else guided_sim.abs() * margin)

    def masked(sim, guided, positives=None):
        out = guided > thresholds
        return sim.masked_fill(out if positives is None else out & ~positives, -torch.inf)

    scores = [masked(a @ p.T, guided_a @ guided_p.T, torch.eye(24, dtype=torch.bool))]
    if contrast:
        scores += [masked(a @ a.T, guided_a @ guided_a.T), masked(p @ p.T, guided_p @ guided_p.T)]
    scores += [masked(a @ n.T, guided_a @ guided_n.T)]
    theirs = F.cross_entropy(torch.cat(scores, dim=1) / temperature, torch.arange(24))
    ours = co.guided_info_nce(
        *pair,
        negatives=negative,
        guide=tuple(guides),
        margin=margin,
        margin_strategy=strategy,
        contrast_anchors=contrast,
        contrast_positives=contrast,
        temperature=temperature,
        backend=backend,
    )
    assert_same(ours, theirs, *pair, negative)


def test_guided_info_nce_without_a_guide_is_the_positive_aware_loss_of_ms_swift(backend, pair):
    """INFONCE_MASK_FAKE_NEGATIVE: what is more similar than the positive and 0.1 is left out."""
    a, p = (F.normalize(x, dim=1) for x in pair)
    eye = torch.eye(24, dtype=torch.bool)
    ceiling = (a * p).sum(1, keepdim=True).detach() + 0.1
    blocks = [(a @ p.T).masked_fill((a @ p.T > ceiling) & ~eye, -torch.inf)]
    blocks += [(a @ a.T).masked_fill((a @ a.T > ceiling) | eye, -torch.inf)]
    theirs = F.cross_entropy(torch.cat(blocks, 1) / 0.1, torch.arange(24))
    ours = co.guided_info_nce(*pair, margin=-0.1, contrast_positives=False, temperature=0.1, backend=backend)
    assert_same(ours, theirs, *pair)


def test_keys_of_each_query_as_the_error_says(backend, pair):
    """Flattened, with the positive first of K, and target=: without it row i would be the positive of query i."""
    query, n, k = pair[0], len(pair[0]), 3
    keys = torch.randn(n, k, query.shape[1], dtype=query.dtype, requires_grad=True)
    with pytest.raises(ValueError, match=r"pass target=.* torch\.arange\(N\) \* K") as info:
        co.info_nce(query, keys)
    assert "flatten the first two axes" in str(info.value)
    ours = co.info_nce(query, keys.flatten(0, 1), target=torch.arange(n) * k, backend=backend)
    every = F.normalize(keys, dim=-1).flatten(0, 1)
    logits = F.normalize(query, dim=-1) @ every.T / 0.07
    assert_same(ours, F.cross_entropy(logits, torch.arange(n) * k), query, keys)
    assert abs(co.info_nce(query, keys.flatten(0, 1), backend=backend) - ours) > 0.1


def dcl_of_lightly(z1, z2, tau, sigma=None, *, apart=False):
    """Half the sum over the directions of -w_i s_ii + lse(other samples in both views), as from 1.5.21 on.

    Before, the views were `apart`: + lse(other samples in the own view) + lse(other samples in the other view).
    """
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    eye = torch.eye(len(z1), dtype=torch.bool)
    total = 0.0
    for own, other in ((z1, z2), (z2, z1)):
        same_view = (own @ own.T / tau)[~eye].view(len(own), -1)
        cross_view = own @ other.T / tau
        positive = cross_view.diagonal()
        weight = 1.0
        if sigma is not None:
            cosine = (own.detach() * other.detach()).sum(dim=1)
            weight = 2 - len(own) * torch.softmax(cosine / sigma, dim=0)
        negatives = [same_view, cross_view[~eye].view(len(own), -1)]
        if not apart:
            negatives = [torch.cat(negatives, dim=1)]
        total = total + (sum(part.logsumexp(dim=1) for part in negatives) - weight * positive).mean()
    return total / 2


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_dcl_is_that_of_lightly(temperature, backend, pair):
    ours = co.dcl(*pair, temperature=temperature, backend=backend)
    assert_same(ours, dcl_of_lightly(*pair, temperature), *pair)


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_dclw_is_that_of_lightly(sigma, backend, pair):
    ours = co.dclw(*pair, temperature=0.1, sigma=sigma, backend=backend)
    assert_same(ours, dcl_of_lightly(*pair, 0.1, sigma), *pair)


@pytest.mark.parametrize(("loss", "sigma"), [(co.dcl, None), (co.dclw, 0.5)], ids=["dcl", "dclw"])
def test_dcl_says_whose_version_it_is(loss, sigma, pair):
    """lightly 1.5.20 has another formula under the same name."""
    assert "of lightly from 1.5.21 on; earlier ones" in " ".join(loss.__doc__.split())
    earlier = dcl_of_lightly(*pair, 0.1, sigma, apart=True)
    assert abs(loss(*pair, temperature=0.1) - earlier) > 1.0


def test_nt_xent_is_that_of_simclr(backend, pair):
    """The cross-entropy of the published pseudo-code: mask the diagonal, the class is the other view."""
    z = F.normalize(torch.cat(pair), dim=1)
    logits = (z @ z.T / 0.5).masked_fill(torch.eye(48, dtype=torch.bool), -torch.inf)
    theirs = F.cross_entropy(logits, torch.arange(48).roll(24))
    assert_same(co.nt_xent(*pair, temperature=0.5, backend=backend), theirs, *pair)


def test_supcon_in_is_that_of_solo_learn(backend, labelled):
    """-log of the positives' share of the sum; SupCon-in is that plus log |P|."""
    features, labels = labelled
    z = F.normalize(features, dim=1)
    others = ~torch.eye(23, dtype=torch.bool)
    same = (labels[:, None] == labels) & others
    e = (z @ z.T / 0.2).exp()
    share = (e * same).sum(1) / (e * others).sum(1)
    theirs = (same.sum(1).double().log() - share.log()).mean()
    assert_same(co.supcon(features, labels, temperature=0.2, variant="in", backend=backend), theirs, features)
