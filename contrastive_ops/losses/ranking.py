"""Losses of comparisons: how often a negative is ranked above a positive."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import promoted, statistics_dtype
from contrastive_ops.losses import terms
from contrastive_ops.ops import flex_sum, row_dot, similarity_sum

# nodes of the table of `_of_all`, and how far from a positive softplus is a line to within 2e-9
NODES, FAR = 4096, 20.0


def mw_loss(
    query: Tensor,
    key: Tensor,
    *,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    compare: str = "all",
    temperature: float | Tensor = 0.01,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Mann-Whitney loss: every positive against the negatives of all queries, a bound on 1 - AUC.

    .. math::
        s_{kj} = \frac{\langle q_k, k_j \rangle}{\tau}, \qquad
        \ell_k = \sum_{j \in N(k)} \sum_i \mathrm{softplus}(s_{kj} - p_i)

    with :math:`p_i` the logit of query i and its positive, and :math:`N(k)` the keys but the positive of k and, with
    ids, but those of its id. So scores are comparable between queries: one threshold for all. With ``compare="own"``
    there is :math:`p_k` alone in place of the sum over i, as in RankNet.

    Parameters
    ----------
    query : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
    key : Tensor of shape (M, D), dtype of `query`
        Without `target`, M >= N and row i is the positive of query i; the other keys are negatives of all queries.
    target : integer Tensor of shape (N,), optional
        Index of each query's positive in `key`, in [0, M). Off the CPU, where the host would have to wait for them, the
        values are not checked: with one beyond the keys the loss is not finite.
    query_ids, key_ids : integer Tensors of shape (N,) and (M,), optional
        A key with the query's id that is not its positive is not a negative.
    compare : "all" or "own"
        Whether a negative is compared with the positives of all queries or with that of its own.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors. A tensor receives its gradient.
    normalize : bool
        Cosine similarity; False takes the dot product as it is.
    reduction : "mean", "sum" or "none"
        "mean" is the paper's: over the queries, and of sums that grow with the number of their comparisons.
    backend : str
        See `similarity_sum`. What goes over all pairs and positives is `flex_sum`, which is PyTorch on every device.

    Returns
    -------
    Tensor of shape (), or (N,) for ``reduction="none"``, float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument. RuntimeError from `flex_sum`, with ``compare="all"``, under torch.func.

    Notes
    -----
    The sum over i is one function of a logit for the whole batch, which is tabulated: the work is that of one sum over
    the pairs, and extra memory is O((N + M) D). Its error is below that of float32 where the positives are within
    1,000 temperatures of each other, as cosines are from a temperature of 0.002 on. Gradients reach `query`, `key` and
    `temperature`.

    References
    ----------
    Optimizing What Matters: AUC-Driven Learning for Robust Neural Retrieval, arXiv:2510.00137.

    Examples
    --------
    >>> mw_loss(torch.eye(3), torch.eye(3), temperature=1.0)  # 2 negatives of a query, against 3 positives
    tensor(1.8796)
    """
    terms.check_options(reduction=reduction, normalize=normalize, compare=compare)
    checks.features("query", query)
    checks.features("key", key, expected="(M, D)")
    query, key = promoted(query, key)
    checks.same_kind("key", key, "query", query)
    checks.ids_of_both(query_ids, key_ids, query, key)
    checks.positives(target, query, key)
    n, m = query.shape[0], key.shape[0]
    target = torch.arange(n, device=query.device) if target is None else target.long()
    checks.temperature("temperature", temperature, query.device)

    temperature = terms.flat(temperature, query)
    query, query_scale = terms.with_logit_scale(query, temperature, -1.0, normalize, backend)
    key, key_scale = terms.with_norm_scale(key, normalize, backend)
    place = target.clamp(0, max(m - 1, 0))
    positive = row_dot(query, key[place])
    positive = terms.scaled(query_scale, terms.scaled(None if key_scale is None else key_scale[place], positive))
    positive = positive.masked_fill(place != target, -torch.inf)
    if compare == "all" and n > 0:
        x, y = _scaled_rows(query_scale, query), _scaled_rows(key_scale, key)
        per_row = _of_all(x, y, positive, target, query_ids, key_ids, backend)
    else:
        per_row = similarity_sum(
            query,
            key,
            row_scale=query_scale,
            col_scale=key_scale,
            row_bias=-positive,
            exclude=target,
            row_ids=query_ids,
            col_ids=key_ids,
            backend=backend,
        ).row_sum
    return terms.reduce(per_row, reduction)


def _scaled_rows(scale: float | Tensor | None, x: Tensor) -> Tensor:
    return terms.scaled(scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale, x.to(statistics_dtype(x)))


def _of_all(
    x: Tensor,
    y: Tensor,
    positive: Tensor,
    target: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    backend: str,
) -> Tensor:
    """The sums over the negatives of each row of the sum over all positives, by its table."""
    n, first, step, cubics = len(x), *_table(positive, backend)
    cubics = tuple(part.to(x.dtype) for part in cubics)
    last = first + step * (NODES - 1)

    def of_positives(score: Tensor, row: Tensor, col: Tensor) -> Tensor:
        place = ((score - first) / step).clamp(0, NODES - 1)
        node = place.detach().nan_to_num().to(torch.int32).clamp_(max=NODES - 2)
        t, node = place - node, node.flatten()
        # one vector after the other: on CPUs the gradient of a row of four takes twice the time
        a, b, c, d = (part.index_select(0, node).view_as(score) for part in cubics)
        return a + t * (b + t * (c + t * d)) + n * (score - last).clamp(min=0.0)

    return flex_sum(
        x, y, score_mod=of_positives, mask_mod=_negatives(target, query_ids, key_ids), parameters=cubics
    ).row_sum


def _table(positive: Tensor, backend: str) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """F(s) = sum_i softplus(s - p_i) as cubics between nodes: the first node, their distance, the four coefficients.

    Of its values and slopes at the nodes, in float64: differences of neighbours keep few digits. They are sums of
    functions of p_i and of the node, as are those of logits that are biases alone.
    """
    low, high = (bound.to(positive.dtype) for bound in positive.detach().aminmax())
    first, step = low - FAR, (high - low + 2 * FAR) / (NODES - 1)
    nodes = first.double() + step.double() * torch.arange(NODES, device=positive.device, dtype=torch.float64)
    rows, cols = nodes.new_zeros(len(positive), 1), nodes.new_zeros(NODES, 1)
    value, slope = (
        similarity_sum(
            rows, cols, of=of, row_bias=-positive.double(), col_bias=nodes, rows=False, cols=True, backend=backend
        ).col_sum
        for of in ("softplus", "sigmoid")
    )
    slope = slope * step.double()
    rise, left, right = value.diff(), slope[:-1], slope[1:]
    return first, step, (value[:-1], left, 3 * rise - 2 * left - right, left + right - 2 * rise)


def _negatives(target: Tensor, query_ids: Tensor | None, key_ids: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    def mask(row: Tensor, col: Tensor) -> Tensor:
        other = target[row] != col
        return other if query_ids is None or key_ids is None else other & (query_ids[row] != key_ids[col])

    return mask
