"""The streaming reductions: differentiable ops that read embeddings and return vectors."""

from contrastive_ops.ops.gramian_volume import gramian_volume, orthogonalised
from contrastive_ops.ops.similarity_logsumexp import SimilarityLSE, similarity_logsumexp
from contrastive_ops.ops.volume_logsumexp import VolumeLSE, volume_logsumexp

__all__ = [
    "SimilarityLSE",
    "VolumeLSE",
    "gramian_volume",
    "orthogonalised",
    "similarity_logsumexp",
    "volume_logsumexp",
]
