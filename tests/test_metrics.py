"""Recall by the streaming op against that of the dense similarities."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import contrastive_ops as co

OP = "similarity_topk"
KS = (1, 3, 10)


def dense_recall(query, key, positive, k, normalize=True):
    """The share of the rows with a positive among the k first of a stable sort."""
    x, y = (F.normalize(side.double(), dim=1) if normalize else side.double() for side in (query, key))
    first = (x @ y.T).sort(dim=1, descending=True, stable=True).indices[:, :k]
    return positive.gather(1, first).any(1).double().mean().item()


@pytest.fixture
def sides():
    query = torch.randn(57, 6)
    return query, torch.cat([query + 1.5 * torch.randn(57, 6), torch.randn(20, 6)]) * torch.rand(77, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_of_the_row_itself(sides, normalize, dtype, backend):
    query, key = (side.to(dtype).requires_grad_() for side in sides)
    found = co.metrics.recall_at_k(query, key, ks=KS, normalize=normalize, backend=backend)
    positive = torch.eye(57, 77, dtype=torch.bool)
    assert list(found) == list(KS)
    for k, recall in found.items():
        assert (recall.shape, recall.requires_grad) == ((), False)
        assert recall.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert recall.item() == pytest.approx(dense_recall(query, key, positive, k, normalize), abs=1e-6)
    assert 0 < found[1] < found[3] < found[10] < 1


def test_of_a_target(sides, backend):
    query, key = sides
    order = torch.randperm(77)
    place = order.argsort()[:57]
    expected = co.metrics.recall_at_k(query, key, ks=KS, backend=backend)
    assert co.metrics.recall_at_k(query, key[order], place.int(), KS, backend=backend) == expected


def test_of_ids(sides, backend):
    """Several positives, one of them is enough; ids of queries that no key has are not found."""
    query, key = sides
    query_ids, key_ids = torch.randint(12, (57,)), torch.randint(2, 30, (77,), dtype=torch.int32)
    positive = query_ids[:, None] == key_ids
    assert not positive.any(1).all()
    found = co.metrics.recall_at_k(query, key, ks=KS, query_ids=query_ids, key_ids=key_ids, backend=backend)
    for k, recall in found.items():
        assert recall.item() == pytest.approx(dense_recall(query, key, positive, k), abs=1e-6)


def test_ids_of_one_another_are_a_target(sides, backend):
    query, key = sides
    expected = co.metrics.recall_at_k(query, key, backend=backend)
    by_ids = co.metrics.recall_at_k(query, key, query_ids=torch.arange(57), key_ids=torch.arange(77), backend=backend)
    assert by_ids == expected
    assert list(expected) == [1, 5, 10]


def test_more_than_there_are(backend):
    """All keys are among the first 100 of 4; no key has the id of what is not there."""
    x = torch.randn(4, 3)
    assert co.metrics.recall_at_k(x, x.roll(1, 0), ks=(100,), backend=backend)[100] == 1
    ids = torch.arange(4)
    missing = co.metrics.recall_at_k(x, x, ks=[2, 9], query_ids=ids, key_ids=ids.clamp(max=2), backend=backend)
    assert missing[9].item() == 0.75


def test_ties_go_to_the_first(backend):
    key = torch.ones(3, 2)
    assert co.metrics.recall_at_k(key, key, ks=(1,), backend=backend)[1].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("ids", [None, torch.empty(0, dtype=torch.int64)], ids=["target", "ids"])
def test_of_nothing(ids, backend):
    nothing, keys = torch.empty(0, 3), torch.randn(4, 3)
    options = {} if ids is None else {"query_ids": ids, "key_ids": torch.arange(4)}
    assert co.metrics.recall_at_k(nothing, keys, **options, backend=backend)[1] == 0
    if ids is not None:
        found = co.metrics.recall_at_k(keys, nothing, query_ids=torch.arange(4), key_ids=ids, backend=backend)
        assert found[10] == 0


def test_on_meta(sides):
    query, key = (side.to("meta") for side in sides)
    assert co.metrics.recall_at_k(query, key)[5].device.type == "meta"


def test_autocast_promotes(sides, backend):
    query, key = sides[0], sides[1].bfloat16()
    expected = co.metrics.recall_at_k(query.bfloat16(), key, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert co.metrics.recall_at_k(query, key, backend=backend) == expected
