"""Losses over two or more views of every instance.

MV-InfoNCE, MV-DHEL and PVC are three formulas over two things: the log-sum-exp of the negatives of every view, which
is the sweep, and the logits of the pairs of views of one instance, which are few.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import promoted, without_autocast
from contrastive_ops.losses import terms
from contrastive_ops.losses.info_nce import info_nce
from contrastive_ops.losses.two_views import dcl, nt_xent
from contrastive_ops.ops import similarity_logsumexp, softplus, with_pair_products

PAIR_LOSSES: dict[str, Callable[..., Any]] = {"nt_xent": nt_xent, "info_nce": info_nce, "dcl": dcl}


def mv_infonce(
    views: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    include_same_view: bool = True,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""MV-InfoNCE: one term per instance, all pairs of its views against everything else.

    .. math::
        \ell_i = \log \frac{D_i}{A_i}, \qquad
        A_i = \sum_{l \ne m} e^{s_{il,im}}, \qquad
        D_i = \sum_l \sum_{(j,m) \ne (i,l)} e^{s_{il,jm}}, \qquad
        s_{il,jm} = \langle u_{il}, u_{jm} \rangle / \tau

    computed as :math:`\mathrm{softplus}(\log (D_i - A_i) - \log A_i)`, where the sum :math:`D_i - A_i` is taken over
    the other instances (with ids: of another id), so that it is exact where it is tiny.

    Parameters
    ----------
    views : Tensor of shape (V, N, D), float32 / bfloat16 / float16 / float64
        V >= 2 views of N instances: ``views[l, i]`` is view l of instance i.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
    include_same_view : bool
        Whether other instances in the same view are negatives, as in the authors' code; False leaves them out
        (:math:`m \ne l` in :math:`D_i`), as in the equation the authors print.
    ids : integer Tensor of shape (N,), optional
        Instances of the same id are not negatives of each other.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the instances in the sum; the mean divides by their sum.
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
    Extra memory is O(V N D); one sweep over the upper triangle of the VN x VN similarities, or with
    ``include_same_view=False`` one sweep of N x N for each of the V (V - 1) / 2 pairs of views. An instance without
    negatives contributes 0 with zero gradient and stays in the mean. Gradients reach `views`, `temperature` and
    `sample_weight`.

    References
    ----------
    Koromilas et al.: A Principled Framework for Multi-View Contrastive Learning, arXiv:2507.06979.

    Examples
    --------
    >>> mv_infonce(torch.eye(3).expand(2, 3, 3), temperature=1.0)
    tensor(0.9048)
    """
    terms.check_options(include_same_view=include_same_view)
    views, scale, positive = _prepared(views, temperature, ids, sample_weight, reduction, normalize, backend)
    if include_same_view:
        negative = _other_instances(views, scale, ids, backend)
    else:
        diagonal = torch.arange(views.shape[1], device=views.device)
        view = list(zip(_each(views), _each(scale), strict=True))
        sweeps = [
            similarity_logsumexp(
                x,
                y,
                row_scale=a,
                col_scale=b,
                exclude=diagonal,
                row_ids=ids,
                col_ids=ids,
                cols=True,
                backend=backend,
            )
            for (x, a), (y, b) in combinations(view, 2)
        ]
        negative = torch.stack([lse for sweep in sweeps for lse in (sweep.row_lse, sweep.col_lse)])
    # a pair of views counts in both of its orders
    per_instance = softplus(terms.logsumexp(negative, 0) - positive.logsumexp(0) - math.log(2.0))
    return terms.reduce(per_instance, reduction, sample_weight)


def mv_dhel(
    views: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""MV-DHEL: alignment across the views of an instance, uniformity within each view, nothing between the two.

    .. math::
        \ell_i = -\log \sum_{l < m} e^{s_{il,im}} + \sum_l \log \sum_{j \ne i} e^{s_{il,jl}}, \qquad
        s_{il,jm} = \langle u_{il}, u_{jm} \rangle / \tau

    There are no negatives across views and, with ids, none of the instance's id. The value grows by about
    :math:`\log N` with every view, and may be negative.

    Parameters
    ----------
    views : Tensor of shape (V, N, D), float32 / bfloat16 / float16 / float64
        V >= 2 views of N instances: ``views[l, i]`` is view l of instance i.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
    ids : integer Tensor of shape (N,), optional
        Instances of the same id are not negatives of each other.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the instances in the sum; the mean divides by their sum.
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
    Extra memory is O(V N D). One sweep visits the V diagonal blocks of N x N alone: V N^2 similarities where
    MV-InfoNCE has (V N)^2; with ids it is one sweep for each view. A sum of logarithms never overflows, where the
    product of V sums in the authors' code does. An instance without negatives contributes 0 with zero gradient and
    stays in the mean. Gradients reach `views`, `temperature` and `sample_weight`.

    References
    ----------
    Koromilas et al.: A Principled Framework for Multi-View Contrastive Learning, arXiv:2507.06979.

    Examples
    --------
    >>> mv_dhel(torch.eye(3).expand(2, 3, 3), temperature=1.0)
    tensor(0.3863)
    """
    views, scale, positive = _prepared(views, temperature, ids, sample_weight, reduction, normalize, backend)
    within = _other_instances_of_the_view(views, scale, ids, backend)
    per_instance = torch.where((within == -torch.inf).any(0), 0.0, within.sum(0) - positive.logsumexp(0))
    return terms.reduce(per_instance, reduction, sample_weight)


def dhel(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""DHEL: the positives attract across the two views, the negatives repel within each view.

    .. math::
        \ell_i = -\langle u_i, v_i \rangle / \tau + \log \sum_{j \ne i} e^{\langle u_i, u_j \rangle / \tau}
                 + \log \sum_{j \ne i} e^{\langle v_i, v_j \rangle / \tau}

    With ids, j is of another id, too. It is `mv_dhel` of two views.

    Parameters
    ----------
    z1, z2 : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
        Row i of both are two views of sample i.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
    ids : integer Tensor of shape (N,), optional
        Samples of the same id are not negatives of each other.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the samples in the sum; the mean divides by their sum.
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
    Extra memory is O(N D). A sample without negatives contributes 0 with zero gradient and stays in the mean.
    Gradients reach both views, `temperature` and `sample_weight`.

    References
    ----------
    Koromilas et al.: Bridging Mini-Batch and Asymptotic Analysis in Contrastive Learning, arXiv:2405.18045.

    Examples
    --------
    >>> dhel(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.3863)
    """
    checks.features("z1", z1)
    checks.features("z2", z2)
    z1, z2 = promoted(z1, z2)
    checks.same_kind("z2", z2, "z1", z1)
    checks.same_shape("z2", z2, "z1", z1)
    checks.samples(ids, sample_weight, z1.shape[0], z1.device, rows_of="z1")
    with without_autocast(z1):  # its rule for stack fails on float16 tensors on CPU
        views = torch.stack([z1, z2])
    return mv_dhel(
        views,
        temperature=temperature,
        ids=ids,
        sample_weight=sample_weight,
        normalize=normalize,
        reduction=reduction,
        backend=backend,
    )


def pvc(
    views: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    aggregate: str = "geometric",
    ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Poly-View Contrastive: each view must find each other view of its instance among all views of the others.

    .. math::
        \ell_{ilm} = \mathrm{softplus}\Big(\log \sum_{j \ne i} \sum_k e^{s_{il,jk}} - s_{il,im}\Big), \qquad
        \ell_{il} = \frac{1}{V - 1} \sum_{m \ne l} \ell_{ilm}
        \quad \text{or} \quad -\log \frac{1}{V - 1} \sum_{m \ne l} e^{-\ell_{ilm}}

    The own other views of an anchor are in no denominator but their own. With ids, j is of another id, too.

    Parameters
    ----------
    views : Tensor of shape (V, N, D), float32 / bfloat16 / float16 / float64
        V >= 2 views of N instances: ``views[l, i]`` is view l of instance i.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
    aggregate : "geometric" or "arithmetic"
        Which mean of the V - 1 probabilities of an anchor is maximised.
    ids : integer Tensor of shape (N,), optional
        Instances of the same id are not negatives of each other.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the instances in the sum, each for all views; the mean divides by their sum.
    normalize : bool
        Cosine similarity; False takes the dot product as it is.
    reduction : "mean", "sum" or "none"
    backend : str
        See `similarity_logsumexp`.

    Returns
    -------
    Tensor of shape (), or (V, N) for ``reduction="none"`` (unweighted), float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Extra memory is O(V N D + V^2 N); only the upper triangle of the VN x VN similarities is computed. Two views make
    NT-Xent, with either mean. An instance without negatives contributes 0 with zero gradient and stays in the mean.
    Gradients reach `views`, `temperature` and `sample_weight`. The arithmetic mean is taken per anchor, as in the
    paper, not of the losses of a batch.

    References
    ----------
    Shidani et al.: Poly-View Contrastive Learning, arXiv:2403.05490.

    Examples
    --------
    >>> pvc(torch.eye(3).expand(3, 3, 3), temperature=1.0)
    tensor(1.1654)
    """
    terms.check_options(aggregate=aggregate)
    views, scale, pairs = _prepared(views, temperature, ids, sample_weight, reduction, normalize, backend)
    negative = _other_instances(views, scale, ids, backend).unbind()
    v = len(negative)
    positive = dict(zip(combinations(range(v), 2), pairs.unbind(), strict=True))
    decoupled = [negative[a] - positive[min(a, b), max(a, b)] for a, b in permutations(range(v), 2)]
    per_pair = softplus(torch.stack(decoupled)).unflatten(0, (v, v - 1))
    weight = None if sample_weight is None else sample_weight.expand(v, -1)
    if aggregate == "geometric":
        return terms.reduce(per_pair.mean(1), reduction, weight)
    # relative to the smallest loss the sum of e^-loss is at least 1, and exact where all losses are tiny
    smallest = per_pair.detach().amin(1)
    per_anchor = smallest - torch.expm1(smallest[:, None] - per_pair).mean(1).log1p()
    return terms.reduce(per_anchor, reduction, weight)


def pairwise_views(views: Tensor, loss: str = "nt_xent", *, ids: Tensor | None = None, **options: Any) -> Tensor:
    r"""Mean of a loss of two views over all pairs of views.

    .. math:: \frac{2}{V (V - 1)} \sum_{l < m} \ell(\mathrm{views}_l, \mathrm{views}_m)

    Parameters
    ----------
    views : Tensor of shape (V, N, D), float32 / bfloat16 / float16 / float64
        V >= 2 views of N instances: ``views[l, i]`` is view l of instance i.
    loss : "nt_xent", "info_nce" or "dcl"
        Of the pair l < m, InfoNCE takes view l for the queries and view m for the keys.
    ids : integer Tensor of shape (N,), optional
        Instances of the same id are not negatives of each other: the `ids` of the loss, of InfoNCE both sides' ids.
    **options
        Keyword options of that loss, such as `temperature`, `sample_weight`, `normalize`, `reduction`, `backend`; not
        `return_stats`.

    Returns
    -------
    Tensor of shape (), or the shape that the loss has for ``reduction="none"``; float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    One call of the loss per pair of views: V (V - 1) / 2 times its work, and memory O(V N D). An instance without
    negatives contributes 0 with zero gradient and stays in the mean. Gradients reach `views` and what the loss learns.

    References
    ----------
    Tian, Krishnan, Isola: Contrastive Multiview Coding, arXiv:1906.05849.

    Examples
    --------
    >>> pairwise_views(torch.eye(3).expand(4, 3, 3), "nt_xent", temperature=1.0)
    tensor(0.9048)
    """
    checks.views("views", views)
    of_pair = pair_loss(loss, **options)
    checks.samples(ids, None, views.shape[1], views.device, rows_of="views[0]")
    of_ids = {} if ids is None else dict.fromkeys(("query_ids", "key_ids") if loss == "info_nce" else ("ids",), ids)
    per_pair = [of_pair(x, y, **of_ids, **options) for x, y in combinations(_each(views), 2)]
    return torch.stack(per_pair).mean(0)


def pair_loss(loss: str, *, return_stats: bool = False, **_options: Any) -> Callable[..., Any]:
    """The loss of that name, for pairs of views."""
    checks.choice("loss", loss, tuple(PAIR_LOSSES))
    if return_stats is not False:
        raise ValueError(
            f"return_stats must be False, got {return_stats!r}: every pair of views has its own statistics; "
            f"call {loss}(views[0], views[1], return_stats=True)."
        )
    return PAIR_LOSSES[loss]


def _prepared(
    views: Tensor,
    temperature: float | Tensor,
    ids: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments, and return the views to go on with, the scale [V, N] of every row, the logits of the pairs.

    Both sides of a product carry the scale, and with it the root of the logit scale. The logits [V (V - 1) / 2, N] are
    of the views l < m of each instance, in the order of `combinations`.
    """
    terms.check_options(reduction=reduction, normalize=normalize)
    checks.views("views", views)
    checks.temperature("temperature", temperature, views.device)
    checks.samples(ids, sample_weight, views.shape[1], views.device, rows_of="views[0]")
    views, norm_scale, products = with_pair_products(views, backend)
    scale = terms.inverse(temperature, views) ** 0.5 * (norm_scale if normalize else terms.ones(views))
    left, right = torch.triu_indices(len(views), len(views), 1, device=views.device)
    return views, scale, scale[left] * scale[right] * products


def _each(views: Tensor) -> list[Tensor]:
    """The views one by one; the backward of unbind is a stack, whose autocast rule fails on float16 tensors on CPU."""
    return [views[view] for view in range(len(views))]


def _other_instances(views: Tensor, scale: Tensor, ids: Tensor | None, backend: str) -> Tensor:
    """Log-sum-exp [V, N] of each view over all views of all other instances, with ids of those of another id."""
    v, n, _ = views.shape
    instance = (torch.arange(n, device=views.device) if ids is None else ids).repeat(v)
    lse = similarity_logsumexp(
        views.flatten(0, 1), row_scale=scale.flatten(), row_ids=instance, backend=backend
    ).row_lse
    return lse.view(v, n)


def _other_instances_of_the_view(views: Tensor, scale: Tensor, ids: Tensor | None, backend: str) -> Tensor:
    """As `_other_instances`, over the same view alone."""
    v, n, _ = views.shape
    if ids is not None:  # pairs have one kind of ids, either of views or of instances
        sweeps = [
            similarity_logsumexp(x, row_scale=a, row_ids=ids, backend=backend)
            for x, a in zip(_each(views), _each(scale), strict=True)
        ]
        return torch.stack([sweep.row_lse for sweep in sweeps])
    return similarity_logsumexp(
        views.flatten(0, 1),
        row_scale=scale.flatten(),
        row_ids=torch.arange(v, device=views.device).repeat_interleave(n),
        ids="restrict",
        exclude=torch.arange(v * n, device=views.device),  # itself
        backend=backend,
    ).row_lse.view(v, n)
