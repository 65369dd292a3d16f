"""The one table of losses that tests, doctests, benches and the README's table iterate.

A new loss is a function in `losses/`, its naive twin in `reference/`, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive_ops import losses, reference


@dataclass(frozen=True)
class Loss:
    """One row: the fused loss, its naive twin, and how to call both.

    inputs(n, d, dtype, generator) makes the positional arguments: n samples of d unit features, tensors that require a
    gradient where the loss has one. `variants` are option sets that make the loss another formula; `sides` make
    options that are tensors, which say who is in which role and how much it counts, of the same arguments as `inputs`.
    """

    name: str
    fused: Callable[..., Any]
    naive: Callable[..., Any]
    inputs: Callable[[int, int, torch.dtype, torch.Generator], tuple[Any, ...]]
    formula: str
    paper: str
    variants: tuple[dict[str, Any], ...] = field(default=({},))
    sides: tuple[Callable[[int, int, torch.dtype, torch.Generator], dict[str, Any]], ...] = ()
    op: str = "similarity_logsumexp"  # the streaming reduction below it


def unit(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """n random unit vectors that require a gradient."""
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(dtype).requires_grad_()


def pair(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return unit(n, d, dtype, generator), unit(n, d, dtype, generator)


def triple(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """An anchor and two modalities at about 45 degrees to it: unrelated ones have equal volumes but for noise."""
    anchor, *noise = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(3))
    related = (anchor, *(anchor + difference for difference in noise))
    return tuple(F.normalize(x, dim=1).to(dtype).requires_grad_() for x in related)


def pair_and_scale(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.tensor(1 / 0.07, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return *pair(n, d, dtype, generator), scale.requires_grad_()


def labelled(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return unit(n, d, dtype, generator), torch.randint(max(n // 4, 1), (n,), generator=generator)


def pair_scale_and_bias(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    *features, scale = pair_and_scale(n, d, dtype, generator)
    return *features, scale, torch.full_like(scale, -10.0).requires_grad_()


def student_and_teacher(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    return *pair(n, d, dtype, generator), *pair(n, d + 3, dtype, generator)


def guides(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Four of twelve features each: their cosines are quarters, exact in every dtype, and often equal."""
    places = (torch.rand(n, 12, generator=generator).topk(4).indices for _ in range(2))
    return {"guide": tuple(torch.zeros(n, 12, dtype=dtype).scatter(1, place, 1.0) for place in places)}


def topics(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Four anchors of a topic at cosines of 0.8, with positives at 0.96 and 0.5: a guide leaves others of these out.

    So few similarities are near that of a positive that no rounding moves one across it.
    """
    topic, of_x, of_y = torch.randn(3, n, d, generator=generator, dtype=torch.float64)
    x = topic[torch.arange(n) // 4] + 0.5 * of_x
    y = x + torch.tensor([0.3, 2.0], dtype=torch.float64)[torch.arange(n) % 2, None] * of_y
    return tuple(F.normalize(side, dim=1).to(dtype).requires_grad_() for side in (x, y))


VIEWS = 4


def views(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor]:
    return (unit(VIEWS * n, d, dtype, generator).detach().unflatten(0, (VIEWS, n)).requires_grad_(),)


def alone(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor]:
    return (unit(n, d, dtype, generator),)


def same(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Up to four samples of an id, or about so many; some are alone."""
    return {"ids": torch.randint(n // 4 + 2, (n,), generator=generator)}


def same_of_both(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    return {f"{role}_ids": same(n, d, dtype, generator)["ids"] for role in ("query", "key")}


def weights(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    weight = torch.rand(n, generator=generator, dtype=torch.float64)
    return {"sample_weight": weight.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()}


def same_and_weights(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    return same(n, d, dtype, generator) | weights(n, d, dtype, generator)


def queue(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """As many keys as samples; some labels are in one of them only."""
    return {
        "keys": unit(n, d, dtype, generator),
        "key_labels": torch.randint(max(n // 4, 1), (n,), generator=generator) + n // 16,
    }


def queue_and_weights(n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    return queue(n, d, dtype, generator) | weights(n, d, dtype, generator)


OF_SAMPLES = (same, weights, same_and_weights)

LOSSES: tuple[Loss, ...] = (
    Loss(
        "info_nce",
        losses.info_nce,
        reference.info_nce,
        pair,
        "-log softmax over all keys of the positive key",
        "arXiv:1807.03748",
        ({}, {"label_smoothing": 0.1}),
        sides=(same_of_both, weights),
    ),
    Loss(
        "clip_loss",
        losses.clip_loss,
        reference.clip_loss,
        pair_and_scale,
        "mean of InfoNCE from images to texts and from texts to images",
        "arXiv:2103.00020",
        ({}, {"label_smoothing": 0.1}),
        sides=OF_SAMPLES,
    ),
    Loss(
        "siglip_loss",
        losses.siglip_loss,
        reference.siglip_loss,
        pair_scale_and_bias,
        "sigmoid loss of every pair, match or no match",
        "arXiv:2303.15343",
        ({}, {"weight": "per_anchor"}),
        sides=OF_SAMPLES,
        op="similarity_sum",
    ),
    Loss(
        "nt_xent",
        losses.nt_xent,
        reference.nt_xent,
        pair,
        "InfoNCE of each view against all 2N - 1 others",
        "arXiv:2002.05709",
        sides=OF_SAMPLES,
    ),
    Loss(
        "dcl",
        losses.dcl,
        reference.dcl,
        pair,
        "NT-Xent without the positive in the denominator",
        "arXiv:2110.06848",
        sides=OF_SAMPLES,
    ),
    Loss(
        "dclw",
        losses.dclw,
        reference.dclw,
        pair,
        "DCL with hard positives weighted up",
        "arXiv:2110.06848",
        sides=OF_SAMPLES,
    ),
    Loss(
        "supcon",
        losses.supcon,
        reference.supcon,
        labelled,
        "mean over the positives of the class of -log softmax",
        "arXiv:2004.11362",
        ({}, {"variant": "in"}),
        sides=(weights, queue, queue_and_weights),
    ),
    Loss(
        "nt_xent_labelled",
        losses.nt_xent_labelled,
        reference.nt_xent_labelled,
        labelled,
        "NT-Xent of each pair of the same label, against other labels alone",
        "arXiv:2008.09164",
        ({}, {"over": "anchors"}),
        sides=(weights,),
        op="similarity_sum",
    ),
    Loss(
        "guided_info_nce",
        losses.guided_info_nce,
        reference.guided_info_nce,
        topics,
        "InfoNCE without what a guide finds more similar than the positive",
        "arXiv:2402.16829",
        ({}, {"margin": 0.3, "margin_strategy": "relative", "contrast_anchors": False}),
        sides=(weights, guides),
    ),
    Loss(
        "soft_target_loss",
        losses.soft_target_loss,
        reference.soft_target_loss,
        student_and_teacher,
        "cross-entropy of a student's softmax under a teacher's, in both directions",
        "arXiv:2107.09282",
        ({}, {"symmetric": False, "one_hot": 0.3, "teacher_temperature": 0.2}),
        sides=(weights,),
        op="similarity_expectation",
    ),
    Loss(
        "mv_infonce",
        losses.mv_infonce,
        reference.mv_infonce,
        views,
        "one term per instance: all pairs of its V views against all other views of the batch",
        "arXiv:2507.06979",
        ({}, {"include_same_view": False}),
        sides=OF_SAMPLES,
    ),
    Loss(
        "mv_dhel",
        losses.mv_dhel,
        reference.mv_dhel,
        views,
        "one term per instance: all pairs of its V views, against the negatives within each view",
        "arXiv:2507.06979",
        sides=OF_SAMPLES,
    ),
    Loss(
        "dhel",
        losses.dhel,
        reference.dhel,
        pair,
        "MV-DHEL of two views: no negatives across them",
        "arXiv:2405.18045",
        sides=OF_SAMPLES,
    ),
    Loss(
        "pvc",
        losses.pvc,
        reference.pvc,
        views,
        "NT-Xent of each of V views with each other view of its instance",
        "arXiv:2403.05490",
        ({}, {"aggregate": "arithmetic"}),
        sides=OF_SAMPLES,
    ),
    Loss(
        "pairwise_views",
        losses.pairwise_views,
        reference.pairwise_views,
        views,
        "mean over all pairs of V views of NT-Xent, InfoNCE or DCL",
        "arXiv:1906.05849",
        ({}, {"loss": "info_nce"}, {"loss": "dcl"}),
        sides=OF_SAMPLES,
    ),
    Loss(
        "uniformity",
        losses.uniformity,
        reference.uniformity,
        alone,
        "log of the mean over all pairs of exp(-t distance^2); `alignment` is its companion",
        "arXiv:2005.10242",
    ),
    Loss(
        "joint_entropy",
        losses.joint_entropy,
        reference.joint_entropy,
        alone,
        "mean over the rows of the log of their mean exp(-t distance^2)",
        "arXiv:2402.11928",
    ),
    Loss(
        "gram_loss",
        losses.gram_loss,
        reference.gram_loss,
        triple,
        "softmax over the volumes of anchors with tuples, in both directions",
        "arXiv:2412.11959",
        ({}, {"label_smoothing": 0.0}, {"detach_others": True}),
        op="volume_logsumexp",
        sides=(weights,),
    ),
    Loss(
        "triangle_loss",
        losses.triangle_loss,
        reference.triangle_loss,
        triple,
        "softmax over the areas of triangles of three modalities, in both directions",
        "arXiv:2509.24734",
        ({}, {"squared": True}),
        op="area_logsumexp",
        sides=(weights,),
    ),
)


def table() -> str:
    """The losses as a Markdown table, as the README has it between its markers."""
    lines = ["| loss | formula | paper |", "|---|---|---|"]
    lines += [f"| `{loss.name}` | {loss.formula} | {loss.paper} |" for loss in LOSSES]
    return "\n".join(lines)
