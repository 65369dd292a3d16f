"""Training on one batch of everything, and the quality of the search."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive_ops import clip_loss
from contrastive_ops.demo.encoder import BUCKETS, Bags, TwoTowers, row_indices


class Step(NamedTuple):
    """One step of training."""

    loss: float
    seconds: float
    loss_seconds: float  # the part of `seconds` that the loss takes, forward and backward


class Quality(NamedTuple):
    """How well texts find their own code among all the code they are compared with."""

    recall_at_1: float
    recall_at_10: float
    mean_reciprocal_rank: float


def train(encoder: TwoTowers, code: Bags, text: Bags, steps: int, backend: str) -> Iterator[Step]:
    """Take `steps` steps of Adam; every batch is the whole training set."""
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        start = time.perf_counter()
        encoder.train()
        embeddings = encoder.code(code), encoder.text(text)
        arrivals: list[float] = []
        for embedding in embeddings:  # the backward of the loss ends where the gradients of the embeddings arrive
            embedding.register_hook(lambda _, arrivals=arrivals: arrivals.append(time.perf_counter()))
        encoded = time.perf_counter()
        loss = clip_loss(*embeddings, encoder.logit_scale(), backend=backend)
        assert isinstance(loss, Tensor)  # no statistics were asked for
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        encoder.logit_scale.clamp_()
        schedule.step()
        yield Step(loss.item(), time.perf_counter() - start, max(arrivals) - encoded)


def dense_loss(code: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """`clip_loss` as it is written without this package."""
    logits = logit_scale * F.normalize(code) @ F.normalize(text).T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def dense_seconds(encoder: TwoTowers, code: Bags, text: Bags) -> float:
    """Time of the dense loss on the whole training set, forward and backward."""
    with torch.no_grad():
        embeddings = encoder.code(code), encoder.text(text)
    for embedding in embeddings:
        embedding.requires_grad_()
    start = time.perf_counter()
    dense_loss(*embeddings, encoder.logit_scale()).backward()
    return time.perf_counter() - start


@torch.no_grad()
def similarities(encoder: TwoTowers, text: Bags, code: Bags) -> Tensor:
    """Cosines of shape (texts, functions)."""
    encoder.eval()
    return F.normalize(encoder.text(text)) @ F.normalize(encoder.code(code)).T


def lexical_similarities(text: Bags, code: Bags) -> Tensor:
    """Cosines of the bags themselves, of shape (texts, functions): the search before anything is learned."""
    texts = torch.zeros(BUCKETS, len(text.offsets))
    texts[text.features, row_indices(text)] = text.weights
    return F.embedding_bag(code.features, texts, code.offsets, mode="sum", per_sample_weights=code.weights).T


def quality_of(similarity: Tensor) -> Quality:
    """Recall and mean reciprocal rank of a square matrix whose diagonal holds the right answers.

    A tie counts against the right answer, so an encoder that maps everything to one point finds nothing.

    Examples
    --------
    >>> quality_of(torch.tensor([[0.9, 0.1], [0.8, 0.3]]))
    Quality(recall_at_1=0.5, recall_at_10=1.0, mean_reciprocal_rank=0.75)
    """
    rank = (similarity >= similarity.diagonal()[:, None]).sum(1)  # 1 is the best
    return Quality(*(value.double().mean().item() for value in (rank <= 1, rank <= 10, 1 / rank)))
