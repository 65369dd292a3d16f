"""Alignment and uniformity: the two halves of a contrastive loss, on squared distances.

A Gaussian of a distance is the exponential of a dot product with a bias on each side,
``-t |x_i - x_j|^2 = 2t <x_i, x_j> - t |x_i|^2 - t |x_j|^2``, so its sums are those of `similarity_logsumexp`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import promoted
from contrastive_ops.losses import terms
from contrastive_ops.ops import inverse_norm, row_dot, similarity_logsumexp, softplus, with_inverse_norm


def uniformity(
    x: Tensor, y: Tensor | None = None, *, t: float = 2.0, normalize: bool = True, backend: str = "auto"
) -> Tensor:
    r"""Log of the mean Gaussian potential of all pairs: the smaller, the more evenly the rows are spread.

    .. math:: \log \frac{1}{N (N - 1)} \sum_{i \ne j} e^{-t |x_i - x_j|^2}

    With `y`, :math:`|x_i - y_j|^2`: uniformity across two modalities, the pairs :math:`i = j` left out.

    Parameters
    ----------
    x : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
    y : Tensor of shape (N, D), dtype of `x`, optional
        The other modality; row i belongs to row i of `x`.
    t : float
        Sharpness of the Gaussian, positive: 1 over twice its variance.
    normalize : bool
        Distances of unit vectors; False takes the rows as they are.
    backend : str
        See `similarity_logsumexp`.

    Returns
    -------
    Tensor of shape (), float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Extra memory is O(N D); without `y` only the upper triangle of the pairs is computed. For N < 2 there are no pairs:
    the value is 0 with zero gradient. Far away rows don't underflow: the logarithm is that of a log-sum-exp. Exponents
    are differences of dot products: with ``normalize=False`` they carry a rounding of :math:`t |x_i - c|^2` eps, where
    c is the mean of all rows. The rows less c are float32 (float64 for float64), and so is the sweep.

    References
    ----------
    Wang, Isola: Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere,
    arXiv:2005.10242. Across modalities: Fahim et al.: It's Not a Modality Gap, arXiv:2405.18570.

    Examples
    --------
    >>> uniformity(torch.eye(3))
    tensor(-4.)
    """
    terms.check_options(normalize=normalize, t=t)
    checks.features("x", x)
    if y is not None:
        checks.features("y", y)
        x, y = promoted(x, y, to=torch.float32)  # as in torch.cdist
        checks.same_kind("y", y, "x", x)
        checks.same_shape("y", y, "x", x)
    n = x.shape[0]
    (x, row_scale, row_bias), *other = _gaussians((x,) if y is None else (x, y), t, normalize, backend)
    y, col_scale, col_bias = other[0] if other else (None, None, None)
    row_lse = similarity_logsumexp(
        x,
        y,
        row_scale=row_scale,
        col_scale=col_scale,
        row_bias=row_bias,
        col_bias=col_bias,
        exclude=torch.arange(n, device=x.device),
        backend=backend,
    ).row_lse
    total = terms.logsumexp(row_lse, 0)
    pairs = row_lse.new_full((), n * (n - 1))
    return torch.where(total == -torch.inf, 0.0, total - pairs.log())


def joint_entropy(
    x: Tensor, *, t: float = 1.0, normalize: bool = False, reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    r"""Log of the mean Gaussian potential around each row: minus an estimate of the entropy of the rows.

    .. math:: \ell_i = \log \frac{1}{N} \sum_j e^{-t |x_i - x_j|^2}

    The pair :math:`j = i` is in the mean. Of the concatenation of two codes it is minus their joint entropy, because
    the product of two Gaussians is one over the concatenation: minimised, it makes the codes independent.

    Parameters
    ----------
    x : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
        For the joint entropy of two codes, ``torch.cat([common, salient], dim=1)``.
    t : float
        Sharpness of the Gaussian, positive: 1 over twice its variance.
    normalize : bool
        Distances of unit vectors. False, the default here, takes the rows as they are: of the two codes in the
        paper one is normalised before the concatenation and one is not.
    reduction : "mean", "sum" or "none"
    backend : str
        See `similarity_logsumexp`.

    Returns
    -------
    Tensor of shape (), or (N,) for ``reduction="none"``, float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Extra memory is O(N D); only the upper triangle of the pairs is computed, the pair of a row with itself is added
    back exactly. For N = 1 the value is 0 with zero gradient. Exponents are differences of dot products, with
    a rounding and in a dtype as in `uniformity`.

    References
    ----------
    Louiset et al.: Separating common from salient patterns with Contrastive Representation Learning, arXiv:2402.11928.

    Examples
    --------
    >>> joint_entropy(torch.eye(2))
    tensor(-0.5662)
    """
    terms.check_options(reduction=reduction, normalize=normalize, t=t)
    checks.features("x", x)
    n = x.shape[0]
    ((x, row_scale, row_bias),) = _gaussians((x,), t, normalize, backend)
    others = similarity_logsumexp(
        x, row_scale=row_scale, row_bias=row_bias, exclude=torch.arange(n, device=x.device), backend=backend
    ).row_lse
    return terms.reduce(softplus(others) - others.new_full((), n).log(), reduction)


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0, normalize: bool = True, reduction: str = "mean") -> Tensor:
    r"""Distance of the positives: the smaller, the closer each row of `x` is to its row of `y`.

    .. math:: \ell_i = |x_i - y_i|^\alpha

    Parameters
    ----------
    x, y : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
        Row i of `y` is the positive of row i of `x`.
    alpha : float
        Power of the distance, positive.
    normalize : bool
        Distances of unit vectors; False takes the rows as they are.
    reduction : "mean", "sum" or "none"

    Returns
    -------
    Tensor of shape (), or (N,) for ``reduction="none"``, float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Time and memory are O(N D), there is no sweep and no backend to choose. Rows that coincide have zero gradient for
    every `alpha`, where the derivative of the norm is undefined.

    References
    ----------
    Wang, Isola: Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere,
    arXiv:2005.10242.

    Examples
    --------
    >>> alignment(torch.eye(3), torch.eye(3).roll(1, 0))
    tensor(2.)
    """
    terms.check_options(reduction=reduction, normalize=normalize, alpha=alpha)
    checks.features("x", x)
    checks.features("y", y)
    x, y = promoted(x, y, to=torch.float32)
    checks.same_kind("y", y, "x", x)
    checks.same_shape("y", y, "x", x)
    dtype = terms.statistics_dtype(x)
    x, y = x.to(dtype), y.to(dtype)
    squared = (_unit_difference(x, y) if normalize else x - y).square().sum(-1)
    coincide = squared == 0
    per_row = squared.masked_fill(coincide, 1.0).pow(alpha / 2).masked_fill(coincide, 0.0)
    return terms.reduce(per_row, reduction)


def _gaussians(
    features: tuple[Tensor, ...], t: float, normalize: bool, backend: str
) -> list[tuple[Tensor, float | Tensor, Tensor]]:
    """Features, with scale and bias of their side of -t |x_i - y_j|^2; a zero row stays zero where rows are unit."""
    root = (2.0 * t) ** 0.5
    if not normalize:
        return [(x, root, -t * row_dot(x, x)) for x in terms.centred(*features)]
    sides = [with_inverse_norm(x, backend) for x in features]
    return [(x, root * scale, -t * (scale.detach() > 0).to(scale.dtype)) for x, scale in sides]


def _unit_difference(x: Tensor, y: Tensor) -> Tensor:
    r"""x / |x| - y / |y|, with full relative accuracy where the two are close, in gradients, too.

    .. math:: \frac{x}{|x|} - \frac{y}{|y|} = \frac{1}{|x|} \Big(x - y - m \frac{y}{|y|}\Big), \qquad
              m = |x| - |y| = \frac{\langle x - y, x + y \rangle}{|x| + |y|}

    Each unit vector is rounded: their plain difference is off by eps, however small it is. Far apart it is the more
    accurate of the two, because m is not small there.
    """
    inverse_x, inverse_y = inverse_norm(x)[:, None], inverse_norm(y)[:, None]
    unit_y, difference = inverse_y * y, x - y
    plain = inverse_x * x - unit_y
    total = inverse_x + inverse_y
    inverse_sum = inverse_x * inverse_y / total.masked_fill(total == 0, 1.0)  # of the norms
    m = (difference * (x + y)).sum(-1, keepdim=True) * inverse_sum
    far = plain.detach().square().sum(-1, keepdim=True) > 0.1
    return torch.where(far, plain, inverse_x * (difference - m * unit_y))
