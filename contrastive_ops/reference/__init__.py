"""The dense, naive twin of every op and every loss: the specification in code."""

from contrastive_ops.reference.area_logsumexp import line_logits
from contrastive_ops.reference.flex import flex_logsumexp, flex_sum
from contrastive_ops.reference.gram import gram_loss, gram_volumes, triangle_areas, triangle_loss
from contrastive_ops.reference.losses import (
    clip_loss,
    dcl,
    dclw,
    info_nce,
    mw_loss,
    nt_xent,
    nt_xent_labelled,
    siglip_loss,
    supcon,
)
from contrastive_ops.reference.multi_view import (
    alignment,
    dhel,
    joint_entropy,
    mv_dhel,
    mv_infonce,
    pairwise_views,
    pvc,
    uniformity,
)
from contrastive_ops.reference.second_form import guided_info_nce, soft_target_loss
from contrastive_ops.reference.similarity import logits_at, logsumexp, similarity_logits
from contrastive_ops.reference.volume_logsumexp import volume_logits, volumes

__all__ = [
    "alignment",
    "clip_loss",
    "dcl",
    "dclw",
    "dhel",
    "flex_logsumexp",
    "flex_sum",
    "gram_loss",
    "gram_volumes",
    "guided_info_nce",
    "info_nce",
    "joint_entropy",
    "line_logits",
    "logits_at",
    "logsumexp",
    "mv_dhel",
    "mv_infonce",
    "mw_loss",
    "nt_xent",
    "nt_xent_labelled",
    "pairwise_views",
    "pvc",
    "siglip_loss",
    "similarity_logits",
    "soft_target_loss",
    "supcon",
    "triangle_areas",
    "triangle_loss",
    "uniformity",
    "volume_logits",
    "volumes",
]
