"""Contrastive losses that never build the N x M similarity matrix."""

from contrastive_ops import nn, reference
from contrastive_ops.backends import explain
from contrastive_ops.losses import (
    LossStats,
    alignment,
    clip_loss,
    dcl,
    dclw,
    dhel,
    gram_loss,
    gram_retrieve,
    info_nce,
    joint_entropy,
    mv_dhel,
    mv_infonce,
    nt_xent,
    pairwise_views,
    pvc,
    sample_gram_negatives,
    supcon,
    triangle_loss,
    uniformity,
)
from contrastive_ops.ops import SimilarityLSE, VolumeLSE, gramian_volume, similarity_logsumexp, volume_logsumexp

__all__ = [
    "LossStats",
    "SimilarityLSE",
    "VolumeLSE",
    "alignment",
    "clip_loss",
    "dcl",
    "dclw",
    "dhel",
    "explain",
    "gram_loss",
    "gram_retrieve",
    "gramian_volume",
    "info_nce",
    "joint_entropy",
    "mv_dhel",
    "mv_infonce",
    "nn",
    "nt_xent",
    "pairwise_views",
    "pvc",
    "reference",
    "sample_gram_negatives",
    "similarity_logsumexp",
    "supcon",
    "triangle_loss",
    "uniformity",
    "volume_logsumexp",
]
__version__ = "0.1.0"
