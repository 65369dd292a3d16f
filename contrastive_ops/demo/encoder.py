"""A two-tower encoder of hashed words: a document is the weighted sum of the vectors of its features."""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive_ops.demo.pairs import words
from contrastive_ops.nn import LogitScale

BUCKETS = 2**15
GRAMS = (3, 4)  # characters


class Bags(NamedTuple):
    """Documents as the rows of a sparse matrix of shape (N, BUCKETS); row i starts at ``offsets[i]``."""

    features: Tensor  # [nonzeros], int32
    offsets: Tensor  # [N], int32
    weights: Tensor  # [nonzeros], float32


def bucket(feature: str) -> int:
    """CRC-32 rather than hash(), which differs from process to process."""
    return zlib.crc32(feature.encode()) % BUCKETS


@cache
def word_buckets(word: str) -> tuple[int, ...]:
    """A word and its character n-grams, by which `parse`, `parser` and `parsing` share features."""
    marked = f"<{word}>"
    grams = [marked[start : start + n] for n in GRAMS for start in range(len(marked) - n + 1)]
    return bucket(word), *(bucket(f"#{gram}") for gram in grams)


def count_features(documents: Iterable[str]) -> Bags:
    """Words, their character n-grams and pairs of neighbouring words; the weights are how often each occurs."""
    features, offsets, counts = array("i"), array("i"), array("f")
    for document in documents:
        row = words(document)
        counter = Counter(feature for word in row for feature in word_buckets(word))
        counter.update(bucket(f"{left} {right}") for left, right in pairwise(row))
        offsets.append(len(features))
        features.extend(counter.keys())
        counts.extend(counter.values())
    return Bags(
        torch.tensor(features, dtype=torch.int32),
        torch.tensor(offsets, dtype=torch.int32),
        torch.tensor(counts, dtype=torch.float32),
    )


def row_indices(bags: Bags) -> Tensor:
    """The row of every nonzero."""
    ends = torch.tensor([len(bags.features)], dtype=torch.int32)
    rows = torch.arange(len(bags.offsets), dtype=torch.int32)
    return rows.repeat_interleave(torch.diff(bags.offsets, append=ends))


class TfIdf:
    """Weights (1 + log count) log((1 + N) / (1 + documents that have the feature)), in rows scaled to length 1."""

    idf: Tensor  # [BUCKETS]

    def fit_transform(self, documents: Iterable[str]) -> Bags:
        counts = count_features(documents)
        frequency = torch.bincount(counts.features, minlength=BUCKETS)
        self.idf = ((1 + len(counts.offsets)) / (1 + frequency)).log()
        return self._weigh(counts)

    def transform(self, documents: Iterable[str]) -> Bags:
        return self._weigh(count_features(documents))

    def _weigh(self, counts: Bags) -> Bags:
        weights = (1 + counts.weights.log()) * self.idf[counts.features]
        rows = row_indices(counts)
        squares = torch.zeros(len(counts.offsets)).index_add_(0, rows, weights.square())
        return counts._replace(weights=weights * squares.clamp_min(1e-12).rsqrt()[rows])


class Tower(torch.nn.Module):
    """Embeds bags: the sum of a learned vector per feature. In training a random part of the features is dropped."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.table = torch.nn.EmbeddingBag(BUCKETS, dim, mode="sum")
        # small beside the steps of the optimizer, so that what is learned soon outweighs the random start
        torch.nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, bags: Bags) -> Tensor:
        weights = F.dropout(bags.weights, self.dropout, self.training)
        return self.table(bags.features, bags.offsets, per_sample_weights=weights)


class TwoTowers(torch.nn.Module):
    """One tower for code and one for text, with nothing in common: before training their similarities are noise."""

    def __init__(self, dim: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.code = Tower(dim, dropout)
        self.text = Tower(dim, dropout)
        self.logit_scale = LogitScale()
