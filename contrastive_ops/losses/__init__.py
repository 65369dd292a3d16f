"""The losses: each a page of ordinary PyTorch over the streaming reductions."""

from contrastive_ops.losses.clip import clip_loss
from contrastive_ops.losses.info_nce import info_nce
from contrastive_ops.losses.supcon import supcon
from contrastive_ops.losses.terms import LossStats
from contrastive_ops.losses.two_views import dcl, dclw, nt_xent

__all__ = ["LossStats", "clip_loss", "dcl", "dclw", "info_nce", "nt_xent", "supcon"]
