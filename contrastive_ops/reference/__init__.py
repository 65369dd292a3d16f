"""The dense, naive twin of every op and every loss: the specification in code."""

from contrastive_ops.reference.losses import clip_loss, dcl, dclw, info_nce, nt_xent, supcon
from contrastive_ops.reference.similarity_logsumexp import logits_at, logsumexp, similarity_logits
from contrastive_ops.reference.volume_logsumexp import volume_logits, volumes

__all__ = [
    "clip_loss",
    "dcl",
    "dclw",
    "info_nce",
    "logits_at",
    "logsumexp",
    "nt_xent",
    "similarity_logits",
    "supcon",
    "volume_logits",
    "volumes",
]
