"""Differentiable ops that read embeddings and return vectors: the streaming reductions, and what is done row by row."""

from contrastive_ops.backends import NAMES as BACKENDS
from contrastive_ops.ops.cross_entropy import contrast, contrast_sum, softplus
from contrastive_ops.ops.gramian_volume import gramian_volume, orthogonalised
from contrastive_ops.ops.rowwise import (
    inverse_norm,
    row_dot,
    unit,
    unit_tuples,
    with_inverse_norm,
    with_pair_products,
    with_scale,
)
from contrastive_ops.ops.similarity_logsumexp import SimilarityLSE, similarity_logsumexp
from contrastive_ops.ops.volume_logsumexp import VolumeLSE, volume_logsumexp

__all__ = [
    "BACKENDS",
    "SimilarityLSE",
    "VolumeLSE",
    "contrast",
    "contrast_sum",
    "gramian_volume",
    "inverse_norm",
    "orthogonalised",
    "row_dot",
    "similarity_logsumexp",
    "softplus",
    "unit",
    "unit_tuples",
    "volume_logsumexp",
    "with_inverse_norm",
    "with_pair_products",
    "with_scale",
]
