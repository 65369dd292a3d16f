"""What is measured: sizes with the training setup each stands for, their inputs, and their count of FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from contrastive_ops import catalogue

LOSSES = {row.name: row for row in catalogue.LOSSES}
DTYPES = ("float32", "bfloat16", "float16", "float64")
# rows and columns per sample of the losses whose similarities are symmetric; blocks are stacked to one plane
V = catalogue.VIEWS
SELF_SIMILAR = {
    "nt_xent": (2, 2),
    "dcl": (2, 2),
    "dclw": (2, 2),
    "supcon": (1, 1),
    "mv_infonce": (V, V),
    "mv_dhel": (V, 1),  # within each view
    "dhel": (2, 1),
    "pvc": (V, V),
    "pairwise_views": (V * (V - 1), 2),  # two views against two, for each of V (V - 1) / 2 pairs
    "nt_xent_labelled": (1, 1),  # of the pairs of one label alone hardly a tile is visited
    "uniformity": (1, 1),
    "joint_entropy": (1, 1),
}
TWO_SIDED = (
    "info_nce", "clip_loss", "siglip_loss", "guided_info_nce", "soft_target_loss", "gram_loss", "triangle_loss",
)  # fmt: skip
# products per pair: of anchors with several vectors (two in the catalogue's inputs), of three blocks of similarities,
# of a student and a teacher
PRODUCTS = {"gram_loss": 2, "triangle_loss": 2, "guided_info_nce": 3, "soft_target_loss": 2}


@dataclass(frozen=True)
class Case:
    loss: str
    n: int  # samples
    d: int  # features
    dtype: str
    setup: str = ""

    def __str__(self) -> str:
        return f"{self.loss} {self.n}x{self.d} {self.dtype}"

    def inputs(self, n: int | None = None) -> tuple[Any, ...]:
        """The loss's positional arguments, always the same: unit vectors, and a scale where it is learned."""
        generator = torch.Generator().manual_seed(0)
        return LOSSES[self.loss].inputs(self.n if n is None else n, self.d, getattr(torch, self.dtype), generator)

    @property
    def plane(self) -> tuple[int, int] | None:
        """Rows and columns of the similarities; None for a loss that is not listed above."""
        if self.loss in TWO_SIDED:
            return self.n, self.n
        if self.loss in SELF_SIMILAR:
            rows, cols = SELF_SIMILAR[self.loss]
            return rows * self.n, cols * self.n
        return None

    def flops(self) -> dict[str, int] | None:
        """FLOPs that streaming needs, by mode; every contender's GFLOP/s count these, whatever it computes itself.

        Forward is one product of tiles, backward the same product again and one for each gradient. Self-similarity
        computes a tile above the diagonal once for both of its sides: half of the products that give similarities.
        A volume takes as many products as there are modalities beside the anchor.
        """
        if self.plane is None:
            return None
        product = 2 * self.plane[0] * self.plane[1] * self.d * PRODUCTS.get(self.loss, 1)
        similarities = product // 2 if self.loss in SELF_SIMILAR else product
        gradients = product if self.loss in SELF_SIMILAR else 2 * product
        return {
            "forward": similarities,
            "backward": similarities + gradients,
            "both": 2 * similarities + gradients,
        }


DEFAULT = (
    Case("clip_loss", 256, 512, "float32", "fine-tuning CLIP ViT-B on one small device"),
    Case("clip_loss", 1024, 512, "float32", "CLIP ViT-B, the batch of one device"),
    Case("clip_loss", 8192, 512, "float32", "CLIP ViT-B, a large batch"),
    Case("clip_loss", 8192, 512, "bfloat16", "CLIP ViT-B, a large batch in mixed precision"),
    Case("clip_loss", 4096, 1024, "float32", "CLIP ViT-H or ResNet-50, 1024 features"),
    Case("clip_loss", 8192, 128, "float32", "a small projection head, where exp weighs as much as the products"),
    Case("siglip_loss", 8192, 512, "float32", "SigLIP ViT-B, the batch of clip_loss"),
    Case("guided_info_nce", 1024, 384, "float32", "GIST with a small sentence encoder"),
    Case("soft_target_loss", 4096, 512, "float32", "distilling CLIP, a teacher that learns, too"),
    Case("nt_xent_labelled", 4096, 128, "float32", "metric learning, about four samples per class"),
    Case("info_nce", 4096, 768, "float32", "dense retrieval with a BERT-base encoder, in-batch negatives"),
    Case("nt_xent", 4096, 256, "float32", "SimCLR's batch of 4096 images, 8192 views"),
    Case("dcl", 2048, 128, "float32", "SimCLR's projection head, 4096 views"),
    Case("dclw", 2048, 128, "float32", "SimCLR's projection head, 4096 views"),
    Case("supcon", 4096, 128, "float32", "SupCon's projection head, 4096 views, about four per class"),
    Case("mv_infonce", 2048, 256, "float32", "four views of 2048 images"),
    Case("mv_dhel", 2048, 256, "float32", "four views of 2048 images"),
    Case("dhel", 2048, 256, "float32", "two views of 2048 images"),
    Case("pvc", 2048, 256, "float32", "four views of 2048 images"),
    Case("pairwise_views", 1024, 256, "float32", "four views of 1024 images, six calls of NT-Xent"),
    Case("uniformity", 4096, 128, "float32", "SimCLR's projection head, 4096 views"),
    Case("joint_entropy", 4096, 128, "float32", "two codes of 64 features, concatenated"),
    Case("gram_loss", 2048, 512, "float32", "GRAM's 512 features of three modalities"),
    Case("triangle_loss", 2048, 512, "float32", "TRIANGLE's 512 features of three modalities"),
)
OTHER_LOSSES = (4096, 256)  # size of a loss that has no case above
QUICK = (256, 64)


def select(
    losses: Sequence[str], sizes: Sequence[tuple[int, int]], dtypes: Sequence[str], quick: bool
) -> tuple[Case, ...]:
    """The cases of a command line; what it leaves open comes from the default set."""
    losses = losses or tuple(LOSSES)
    if not sizes and quick:
        sizes = (QUICK,)
    if sizes:
        return tuple(Case(loss, *size, dtype) for loss in losses for size in sizes for dtype in dtypes or ("float32",))
    chosen = []
    for loss in losses:
        cases = [case for case in DEFAULT if case.loss == loss] or [Case(loss, *OTHER_LOSSES, "float32")]
        if dtypes:
            setups = {(case.n, case.d): case.setup for case in reversed(cases)}
            sizes_of_loss = dict.fromkeys((case.n, case.d) for case in cases)
            cases = [Case(loss, *size, dtype, setups[size]) for size in sizes_of_loss for dtype in dtypes]
        chosen += cases
    return tuple(chosen)
