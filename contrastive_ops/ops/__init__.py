"""The streaming reductions: differentiable ops that read embeddings and return vectors."""

from contrastive_ops.ops.similarity_logsumexp import SimilarityLSE, similarity_logsumexp, statistics_dtype

__all__ = ["SimilarityLSE", "similarity_logsumexp", "statistics_dtype"]
