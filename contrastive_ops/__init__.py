"""Contrastive losses that never build the N x M similarity matrix."""

from contrastive_ops import nn, reference
from contrastive_ops.backends import explain
from contrastive_ops.losses import LossStats, clip_loss, dcl, dclw, info_nce, nt_xent, supcon
from contrastive_ops.ops import SimilarityLSE, VolumeLSE, similarity_logsumexp, volume_logsumexp

__all__ = [
    "LossStats",
    "SimilarityLSE",
    "VolumeLSE",
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
    "volume_logsumexp",
]
__version__ = "0.1.0"
