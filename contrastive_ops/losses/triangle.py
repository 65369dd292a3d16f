"""The TRIANGLE loss: a softmax over the areas of triangles whose corners are three modalities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from contrastive_ops import checks
from contrastive_ops.dtypes import without_autocast
from contrastive_ops.losses import terms, volume
from contrastive_ops.losses.gram import Directions, symmetric
from contrastive_ops.losses.terms import LossStats
from contrastive_ops.ops import gramian_volume, orthogonalised, unit

BACKENDS = ("auto", "tiled", "reference")


def triangle_loss(
    anchor: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    label_smoothing: float = 0.1,
    squared: bool = False,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Symmetric cross-entropy over the areas of triangles: a small area is a good match.

    .. math::
        z_{ij} = -\frac{A(a_i, x_j, y_j)}{\tau}, \qquad
        A(a, x, y) = \tfrac12 \sqrt{|u|^2 |w|^2 - \langle u, w \rangle^2}, \quad u = a - x, \; w = a - y

    The cross-entropies of rows and columns are those of `gram_loss`.

    Parameters
    ----------
    anchor, x, y : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
        Row i of all modalities is sample i.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
    label_smoothing : float in [0, 1)
        Mass spread evenly over all N candidates.
    squared : bool
        :math:`2 A^2` in place of the area, as the official code has it: smooth at 0.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the samples in the sum; the mean divides by their sum.
    normalize : bool
        Triangles of unit vectors; False takes the vectors as they are.
    reduction : "mean", "sum" or "none"
    return_stats : bool
        Also return `LossStats`, from the same sweep; a similarity is a negative area.
    backend : "auto", "tiled", "reference"
        Plain PyTorch on every device, in row chunks or ("reference") in one piece.

    Returns
    -------
    Tensor of shape (), or (N,) for ``reduction="none"`` (unweighted), float32 (float64 for float64)
        With `return_stats`, a pair of it and `LossStats`: `lse` of shape (2, N), anchors then pairs,
        `positive_similarity` of shape (N,), `accuracy` the mean of both directions.

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Extra memory is O(N D) and one chunk of about 2**22 areas, which backward computes again. Positives are computed
    from differences, without cancellation; the squared height of another triangle has an absolute error of about
    1e-7 :math:`|p - c|^2`, of its corners p less the mean c of all.
    Triangles without area (two equal corners, corners on a line) are the best match there is and have zero gradient.
    For N = 1 there are no negatives: the loss is 0 with zero gradient. Gradients reach all modalities, `temperature`
    and `sample_weight`.

    References
    ----------
    Grassucci, Cicchetti, Comminiello: A TRIANGLE Enables Multimodal Alignment Beyond Cosine Similarity,
    arXiv:2509.24734.

    Examples
    --------
    >>> triangle_loss(torch.eye(3), torch.eye(3), -torch.eye(3), temperature=1.0)
    tensor(0.6181)
    """
    terms.check_options(reduction=reduction, normalize=normalize, label_smoothing=label_smoothing, squared=squared)
    anchor, (x, y) = volume.checked(anchor, (x, y), ("x", "y"), to=torch.float32)  # distances, as in torch.cdist
    n, device = anchor.shape[0], anchor.device
    checks.temperature("temperature", temperature, device)
    checks.choice("backend", backend, BACKENDS)
    if sample_weight is not None:
        checks.weights("sample_weight", sample_weight, n, device, rows_of="anchor")

    logit_scale = terms.inverse(temperature, anchor)
    a, b, c = terms.centred(*(unit(p, backend) if normalize else p for p in (anchor, x, y)))
    positive = -logit_scale * _of_parallelogram(gramian_volume(volume.stacked((a - b, a - c))), squared)
    (length,), (direction,) = orthogonalised((c - b).unsqueeze(1))
    foot = b - (b * direction).sum(1, keepdim=True) * direction
    size = max(n, 1) if backend == "reference" else volume.rows_per_chunk(n, n)
    chunks = [
        checkpoint(
            _chunk,
            start,
            a[start : start + size],
            *(foot, direction, length),
            logit_scale,
            squared,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, max(n, 1), size)
    ]
    row_max, row_sum, row_total, col_max, col_sum, col_total = zip(*chunks, strict=True)
    col_largest = torch.stack(col_max).amax(0)
    shrunk = [total * (largest - _finite(col_largest)).exp() for largest, total in zip(col_max, col_sum, strict=True)]
    row_largest = torch.cat(row_max)
    directions = Directions(
        positive,
        (_lse(row_largest, torch.cat(row_sum)), _lse(col_largest, sum(shrunk))),
        (row_largest, col_largest),
        (torch.cat(row_total), sum(col_total)) if label_smoothing > 0.0 else (),
    )
    return symmetric([directions], logit_scale, label_smoothing, sample_weight, reduction, return_stats, backend)


def _of_parallelogram(area: Tensor, squared: bool) -> Tensor:
    return area.square() / 2 if squared else area / 2


def _chunk(
    start: int,
    a: Tensor,
    foot: Tensor,
    direction: Tensor,
    length: Tensor,
    logit_scale: float | Tensor,
    squared: bool,
) -> tuple[Tensor, ...]:
    """Maximum, sum of exponentials relative to it, and sum of the logits off the diagonal: of the rows, of the columns.

    The height over a side is the distance between a and the side's `foot`, its point that is nearest to 0, across the
    side's direction; below its rounding errors it is 0, with zero gradient.
    """
    lengths = a.square().sum(1)[:, None] + foot.square().sum(1)
    height = lengths - _product(a, direction.T).square() - 2 * _product(a, foot.T)
    nothing = height <= 8 * torch.finfo(a.dtype).eps * lengths
    if squared:
        area = _of_parallelogram(length, True) * height.masked_fill(nothing, 0.0)
    else:
        area = _of_parallelogram(length, False) * height.masked_fill(nothing, 1.0).sqrt().masked_fill(nothing, 0.0)
    logits = -logit_scale * area
    row, col = torch.arange(start, start + a.shape[0], device=a.device), torch.arange(foot.shape[0], device=a.device)
    positives = row[:, None] == col
    negatives = logits.masked_fill(positives, -torch.inf)
    return tuple(
        statistic
        for dim in (1, 0)
        for statistic in (*_max_and_sum(negatives, dim), logits.masked_fill(positives, 0.0).sum(dim))
    )


def _max_and_sum(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Apart until the last chunk: the rounding of a log-sum-exp of 1e4 is 1e-3, and so would be that of its weights."""
    if logits.shape[dim] == 0:
        return logits.detach().sum(dim) - torch.inf, logits.sum(dim)
    largest = logits.detach().amax(dim)
    return largest, (logits - _finite(largest).unsqueeze(dim)).exp().sum(dim)


def _finite(largest: Tensor) -> Tensor:
    """A maximum to subtract: 0 for the -inf of an empty set, whose exponentials are 0 as they are."""
    return largest.masked_fill(largest == -torch.inf, 0.0)


def _lse(largest: Tensor, total: Tensor) -> Tensor:
    """-inf with zero gradient for an empty set."""
    empty = largest == -torch.inf
    return torch.where(empty, -torch.inf, largest + total.masked_fill(empty, 1.0).log())


class _Product(torch.autograd.Function):
    """a @ b that autocast leaves alone, also where backward runs under it."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with without_autocast(a):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return _product(grad, b.T), _product(a.T, grad)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return _Product.apply(a, b)
