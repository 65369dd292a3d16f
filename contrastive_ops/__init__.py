"""Contrastive losses that never build the N x M similarity matrix."""

from contrastive_ops import nn, reference
from contrastive_ops.backends import explain
from contrastive_ops.losses import LossStats, clip_loss, dcl, dclw, info_nce, nt_xent, supcon
from contrastive_ops.ops import SimilarityLSE, similarity_logsumexp

__all__ = [
    "LossStats",
    "SimilarityLSE",
    "clip_loss",
    "dcl",
    "dclw",
    "explain",
    "info_nce",
    "nn",
    "nt_xent",
    "reference",
    "similarity_logsumexp",
    "supcon",
]
__version__ = "0.1.0"
