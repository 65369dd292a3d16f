"""InfoNCE without false negatives: what a guide finds more similar to a query than its positive takes no part."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import promoted
from contrastive_ops.losses import terms
from contrastive_ops.ops import SimilarityLSE, row_dot, similarity_logsumexp, unit


def guided_info_nce(
    anchor: Tensor,
    positive: Tensor,
    *,
    negatives: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor] | None = None,
    margin: float = 0.0,
    margin_strategy: str = "absolute",
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    temperature: float | Tensor = 0.01,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""InfoNCE over blocks of the batch, in which a guide's similarities leave out false negatives.

    .. math::
        \ell_i = \mathrm{softplus}\Big(\log \sum_{c \in C(i)} e^{s_{ic}} - s_{i}\Big), \qquad
        C(i) = \{c : g_{ic} \le g_i - m\}

    The candidates c are the positives of other anchors, the other anchors and the other positives (both compared with
    their own kind), and `negatives`; :math:`s_i` and :math:`g_i` are the similarity of anchor i and its positive, by
    the student (over the temperature) and by the guide. This is sentence-transformers' ``GISTEmbedLoss``; without a
    guide the student's own similarities decide, as in positive-aware mining.

    Parameters
    ----------
    anchor, positive : Tensors of shape (N, D), float32 / bfloat16 / float16 / float64
        Row i of one is the positive of row i of the other.
    negatives : Tensor of shape (M, D), dtype of `anchor`, optional
        Candidates of all anchors.
    guide : Tensors of the guide's features of anchors, positives and, with them, negatives, optional
        Of any width, taken in the dtype of `anchor`. Cosines with ``normalize``; no gradient goes through them. Where
        a candidate is exactly as similar as the positive, such as its duplicate, rounding decides: a small margin does.
    margin : float
        m; with "relative", :math:`m |g_i|`. A negative one also leaves out what is nearly as similar.
    margin_strategy : "absolute" or "relative"
    contrast_anchors, contrast_positives : bool
        Whether anchors are compared with anchors, and positives with positives.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the anchors in the sum; the mean divides by their sum.
    normalize : bool
        Cosine similarity; False takes the dot product as it is.
    reduction : "mean", "sum" or "none"
    backend : str
        See `similarity_logsumexp`.

    Returns
    -------
    Tensor of shape (), or (N,) for ``reduction="none"`` (unweighted), float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    One sweep for each block. Extra memory is O((N + M) D). An anchor is never its own negative, nor a positive its own;
    sentence-transformers has them where the guide gives anchor and positive a similarity of 1. An anchor without
    negatives contributes 0 with zero gradient.

    References
    ----------
    Solatorio: GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning,
    arXiv:2402.16829. Moreira et al.: NV-Retriever, arXiv:2407.15831.

    Examples
    --------
    >>> guided_info_nce(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(1.1654)
    """
    terms.check_options(
        reduction=reduction,
        normalize=normalize,
        margin=margin,
        margin_strategy=margin_strategy,
        contrast_anchors=contrast_anchors,
        contrast_positives=contrast_positives,
    )
    checks.features("anchor", anchor)
    checks.features("positive", positive)
    if negatives is None:
        anchor, positive = promoted(anchor, positive)
        features = [anchor, positive]
    else:
        checks.features("negatives", negatives, expected="(M, D)", axes="every row is a candidate of all anchors")
        anchor, positive, negatives = promoted(anchor, positive, negatives)
        checks.same_kind("negatives", negatives, "anchor", anchor)
        features = [anchor, positive, negatives]
    checks.same_kind("positive", positive, "anchor", anchor)
    checks.same_shape("positive", positive, "anchor", anchor)
    checks.temperature("temperature", temperature, anchor.device)
    checks.samples(None, sample_weight, anchor.shape[0], anchor.device, rows_of="anchor")
    guides = None if guide is None else _guides(guide, features, normalize, backend)

    scale = terms.inverse(temperature, anchor)
    sides = [terms.with_norm_scale(x, normalize, backend) for x in features]
    diagonal = torch.arange(anchor.shape[0], device=anchor.device, dtype=torch.int32)

    def block(row: int, col: int, ceiling: Tensor) -> SimilarityLSE:
        (x, x_scale), (y, y_scale) = sides[row], sides[col]
        return similarity_logsumexp(
            x,
            y,
            row_scale=scale if x_scale is None else x_scale * scale,
            col_scale=y_scale,
            exclude=None if col == 2 else diagonal,
            guide=None if guides is None else (guides[row], guides[col]),
            ceiling=ceiling,
            backend=backend,
        )

    (x, x_scale), (y, y_scale) = sides[:2]
    of_positive = terms.scaled(scale, terms.scaled(x_scale, terms.scaled(y_scale, row_dot(x, y))))
    with torch.no_grad():
        if guides is None:
            known, step = of_positive, margin * scale
        else:
            known, step = row_dot(*guides[:2]), margin
        ceiling = known - (step if margin_strategy == "absolute" else margin * known.abs())
    blocks = [block(0, 1, ceiling)]
    if contrast_anchors:
        blocks.append(block(0, 0, ceiling))
    if contrast_positives:
        blocks.append(block(1, 1, ceiling))
    if negatives is not None:
        blocks.append(block(0, 2, ceiling))
    lse = terms.logsumexp(torch.stack([of.row_lse for of in blocks]), 0)
    return terms.cross_entropy(of_positive, (lse,), reduction=reduction, sample_weight=sample_weight, backend=backend)


def _guides(guide: tuple[Tensor, ...], features: list[Tensor], normalize: bool, backend: str) -> list[Tensor]:
    """The guide's features, of length 1 if cosines are asked for."""
    checks.one_guide_for_each(guide, len(features))
    for name, of_guide, rows_of, x in zip(
        ("guide[0]", "guide[1]", "guide[2]"), guide, ("anchor", "positive", "negatives"), features, strict=False
    ):
        checks.other_features(name, of_guide, rows_of, x)
        checks.same_width(name, of_guide, "guide[0]", guide[0])
    of_all = [of_guide.detach() for of_guide in guide]
    if normalize:
        of_all = [unit(of_guide, backend) for of_guide in of_all]
    return [of_guide.to(features[0].dtype) for of_guide in of_all]
