"""Differentiable ops that read embeddings and return vectors: the streaming reductions, and what is done row by row."""

from contrastive_ops.backends import NAMES as BACKENDS
from contrastive_ops.ops.area_logsumexp import area_logsumexp, of_parallelogram
from contrastive_ops.ops.classes import (
    Classes,
    by_class,
    class_contrast,
    class_contrast_sum,
    in_order,
    matches,
    sums_of_groups,
    with_class_mean,
)
from contrastive_ops.ops.cross_entropy import contrast, contrast_sum, softplus
from contrastive_ops.ops.flex import FlexLSE, FlexSum, flex_logsumexp, flex_sum
from contrastive_ops.ops.gramian_volume import gramian_volume, orthogonalised
from contrastive_ops.ops.pair_contrast import pair_contrast_sum
from contrastive_ops.ops.rowwise import (
    inverse_norm,
    row_dot,
    row_dots,
    unit,
    unit_tuples,
    with_inverse_norm,
    with_pair_products,
    with_scale,
)
from contrastive_ops.ops.similarity_expectation import SimilarityExpectation, similarity_expectation
from contrastive_ops.ops.similarity_logsumexp import SimilarityLSE, similarity_logsumexp
from contrastive_ops.ops.similarity_sum import SimilaritySum, similarity_sum
from contrastive_ops.ops.similarity_topk import SimilarityTopK, similarity_topk
from contrastive_ops.ops.volume_logsumexp import VolumeLSE, volume_logsumexp

__all__ = [
    "BACKENDS",
    "Classes",
    "FlexLSE",
    "FlexSum",
    "SimilarityExpectation",
    "SimilarityLSE",
    "SimilaritySum",
    "SimilarityTopK",
    "VolumeLSE",
    "area_logsumexp",
    "by_class",
    "class_contrast",
    "class_contrast_sum",
    "contrast",
    "contrast_sum",
    "flex_logsumexp",
    "flex_sum",
    "gramian_volume",
    "in_order",
    "inverse_norm",
    "matches",
    "of_parallelogram",
    "orthogonalised",
    "pair_contrast_sum",
    "row_dot",
    "row_dots",
    "similarity_expectation",
    "similarity_logsumexp",
    "similarity_sum",
    "similarity_topk",
    "softplus",
    "sums_of_groups",
    "unit",
    "unit_tuples",
    "volume_logsumexp",
    "with_class_mean",
    "with_inverse_norm",
    "with_pair_products",
    "with_scale",
]
