"""The losses: each a page of ordinary PyTorch over the streaming reductions."""

from contrastive_ops.losses.clip import clip_loss
from contrastive_ops.losses.distillation import soft_target_loss
from contrastive_ops.losses.gram import gram_loss
from contrastive_ops.losses.gram_pairs import gram_retrieve, sample_gram_negatives
from contrastive_ops.losses.guided import guided_info_nce
from contrastive_ops.losses.info_nce import info_nce
from contrastive_ops.losses.labelled import nt_xent_labelled
from contrastive_ops.losses.multi_view import dhel, mv_dhel, mv_infonce, pairwise_views, pvc
from contrastive_ops.losses.ranking import mw_loss
from contrastive_ops.losses.siglip import siglip_loss
from contrastive_ops.losses.supcon import supcon
from contrastive_ops.losses.terms import LossStats
from contrastive_ops.losses.triangle import triangle_loss
from contrastive_ops.losses.two_views import dcl, dclw, nt_xent
from contrastive_ops.losses.uniformity import alignment, joint_entropy, uniformity

__all__ = [
    "LossStats",
    "alignment",
    "clip_loss",
    "dcl",
    "dclw",
    "dhel",
    "gram_loss",
    "gram_retrieve",
    "guided_info_nce",
    "info_nce",
    "joint_entropy",
    "mv_dhel",
    "mv_infonce",
    "mw_loss",
    "nt_xent",
    "nt_xent_labelled",
    "pairwise_views",
    "pvc",
    "sample_gram_negatives",
    "siglip_loss",
    "soft_target_loss",
    "supcon",
    "triangle_loss",
    "uniformity",
]
