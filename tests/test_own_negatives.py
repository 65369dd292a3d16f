"""`info_nce` with negatives that each query has for itself."""

from __future__ import annotations

import pytest
import torch
from tolerance import judge

import contrastive_ops as co
from contrastive_ops import reference

N, M, H, D = 9, 13, 4, 8


def inputs(dtype=torch.float32, h=H):
    generator = torch.Generator().manual_seed(0)
    sizes = ((N, D), (M, D), (N, h, D))
    query, key, negatives = (torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes)
    return query, key, negatives


def with_negatives(function):
    return lambda query, key, negatives, **options: function(query, key, negatives=negatives, **options)


OPTIONS = {
    "plain": {},
    "raw": {"normalize": False, "temperature": 3.0},
    "smoothed": {"label_smoothing": 0.2},
    "ids": {"query_ids": torch.arange(N) % 4, "key_ids": torch.arange(M) % 5, "label_smoothing": 0.2},
    "only its own": {"query_ids": torch.zeros(N, dtype=torch.int64), "key_ids": torch.zeros(M, dtype=torch.int64)},
    "target": {"target": torch.arange(N).flip(0) + 3, "reduction": "none"},
    "weights": {"sample_weight": torch.arange(N) / 4.0, "reduction": "mean"},
    "a temperature per query": {"temperature": torch.linspace(0.05, 0.5, N).requires_grad_()},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_naive_loss(options, dtype, backend):
    judge(
        with_negatives(co.info_nce),
        with_negatives(reference.info_nce),
        inputs(dtype),
        options,
        fused_options={"backend": backend},
        logits=20.0,
    )


def test_all_keys_of_one_tensor(backend):
    """Documents (N, K, D), the first of each query its positive: its own negatives, or the negatives of all."""
    query, documents = torch.randn(4, 8), torch.randn(4, 3, 8)
    everything = co.info_nce(query, documents.flatten(0, 1), target=torch.arange(4) * 3, backend=backend)
    logits = (
        torch.nn.functional.normalize(query, dim=-1) @ torch.nn.functional.normalize(documents, dim=-1).flatten(0, 1).T
    )
    expected = torch.nn.functional.cross_entropy(logits / 0.07, torch.arange(4) * 3)
    torch.testing.assert_close(everything, expected)
    ids = torch.zeros(4, dtype=torch.int32)
    own = co.info_nce(query, documents[:, 0], negatives=documents[:, 1:], query_ids=ids, key_ids=ids, backend=backend)
    logits = torch.nn.functional.cosine_similarity(query[:, None], documents, dim=-1)
    torch.testing.assert_close(own, torch.nn.functional.cross_entropy(logits / 0.07, torch.zeros(4, dtype=torch.int64)))


def test_none_of_them(backend):
    query, key, negatives = inputs(h=0)
    value = co.info_nce(query, key, negatives=negatives, backend=backend)
    torch.testing.assert_close(value, co.info_nce(query, key, backend=backend), rtol=0.0, atol=0.0)
    one = co.info_nce(query[:1], key[:1], negatives=negatives[:1], backend=backend)
    assert [one.item(), *(x.abs().sum().item() for x in torch.autograd.grad(one, (query, key)))] == [0.0] * 3


def test_one_query(backend):
    """It has nothing but its own."""
    query, key, negatives = inputs()
    value = co.info_nce(query[:1], key[:1], negatives=negatives[:1], backend=backend)
    torch.testing.assert_close(value, reference.info_nce(query[:1], key[:1], negatives=negatives[:1]))
    assert all(x.isfinite().all() for x in torch.autograd.grad(value, (query, key, negatives)))


def test_stats(backend):
    query, key, negatives = (x.detach() for x in inputs())
    _, stats = co.info_nce(query, key, negatives=negatives, return_stats=True, temperature=0.5, backend=backend)
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (query, key, negatives)]
    logits = torch.cat([unit[0] @ unit[1].T, torch.einsum("nd,nhd->nh", unit[0], unit[2])], 1) / 0.5
    torch.testing.assert_close(stats.lse, logits.logsumexp(1))
    torch.testing.assert_close(stats.accuracy, (logits.argmax(1) == torch.arange(N)).float().mean())


def test_accuracy_counts_them(backend):
    """An own negative that is the query itself beats every key."""
    query, key, _ = (x.detach() for x in inputs())
    _, stats = co.info_nce(query, key, negatives=query[:, None], return_stats=True, backend=backend)
    assert stats.accuracy == 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_compiled_for_every_batch(smoothing, backend):
    compiled = torch.compile(
        lambda *x: co.info_nce(x[0], x[1], negatives=x[2], label_smoothing=smoothing, backend=backend),
        backend="aot_eager", fullgraph=True, dynamic=True,
    )  # fmt: skip
    torch.compiler.reset()
    for n in (7, 5, 3):
        given = [x[:n].detach().requires_grad_() for x in inputs()]
        value = compiled(*given)
        expected = co.info_nce(given[0], given[1], negatives=given[2], label_smoothing=smoothing, backend=backend)
        torch.testing.assert_close(value, expected)
        for one, other in zip(torch.autograd.grad(value, given), torch.autograd.grad(expected, given), strict=True):
            torch.testing.assert_close(one, other)


def test_autocast_and_meta():
    query, key, negatives = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = co.info_nce(query.bfloat16(), key, negatives=negatives)
    rounded = (x.bfloat16() for x in (query, key, negatives))
    torch.testing.assert_close(mixed, (lambda q, k, h: co.info_nce(q, k, negatives=h))(*rounded))
    on_meta = (x.detach().to("meta") for x in (query, key, negatives))
    assert (lambda q, k, h: co.info_nce(q, k, negatives=h))(*on_meta).shape == ()


def test_the_module_takes_them():
    query, key, negatives = inputs()
    value = co.nn.InfoNCE(temperature=0.2)(query, key, negatives=negatives)
    torch.testing.assert_close(value, co.info_nce(query, key, negatives=negatives, temperature=0.2))


WRONG = {
    "negatives must have the feature size of query, D = 8, got 5": torch.zeros(N, H, 5),
    "negatives must have the dtype of query, float32, got float64": torch.zeros(N, H, D, dtype=torch.float64),
}


@pytest.mark.parametrize(("sentence", "negatives"), WRONG.items(), ids=("features", "dtype"))
def test_sentences(sentence, negatives):
    query, key, _ = inputs()
    with pytest.raises((TypeError, ValueError), match=sentence):
        co.info_nce(query, key, negatives=negatives)
