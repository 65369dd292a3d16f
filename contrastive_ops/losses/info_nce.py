"""InfoNCE: each query against all keys, one of them its positive."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import promoted
from contrastive_ops.losses import terms
from contrastive_ops.losses.terms import LossStats
from contrastive_ops.ops import row_dots, similarity_logsumexp


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = None,
    target: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    label_smoothing: float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    r"""InfoNCE: cross-entropy of each query over all keys, with its positive key as the class.

    .. math::
        s_{ij} = \frac{\langle q_i, k_j \rangle}{\tau}, \qquad
        \ell_i = \mathrm{softplus}\Big(\log \sum_{j \in N(i)} e^{s_{ij}} - s_{i t_i}\Big)
                 + \epsilon \, (s_{i t_i} - \bar s_i)

    :math:`N(i)` are all keys but the positive :math:`t_i` and, with ids, but the keys of the query's id, and the
    query's own negatives;
    :math:`\bar s_i` is the mean over :math:`N(i)` and the positive. This is
    ``cross_entropy(s, t, label_smoothing=epsilon)``, exact where that rounds to 0.

    Parameters
    ----------
    query : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
    key : Tensor of shape (M, D), dtype of `query`
        Without `target`, M >= N and row i is the positive of query i; the other keys are negatives of all queries.
    negatives : Tensor of shape (N, H, D), dtype of `query`, optional
        H negatives of each query that are not negatives of the others. Where they are to be its only ones, give all
        queries and all keys the same id.
    target : integer Tensor of shape (N,), optional
        Index of each query's positive in `key`, in [0, M). Off the CPU, where the host would have to wait for them, the
        values are not checked: a query whose positive is beyond the keys has the loss inf.
    temperature : float, Tensor of one element, or Tensor of shape (N,)
        Positive: checked of floats and of CPU tensors. Tensors receive their gradient.
    label_smoothing : float in [0, 1)
        Mass spread evenly over the keys that take part, the positive included.
    query_ids, key_ids : integer Tensors of shape (N,) and (M,), optional
        A key with the query's id that is not its positive is not a negative.
    sample_weight : floating-point Tensor of shape (N,), optional
        Weights of the queries in the sum; the mean divides by their sum.
    normalize : bool
        Cosine similarity; False takes the dot product as it is.
    reduction : "mean", "sum" or "none"
    return_stats : bool
        Also return `LossStats`, from the same sweep.
    backend : str
        See `similarity_logsumexp`.

    Returns
    -------
    Tensor of shape (), or (N,) for ``reduction="none"`` (unweighted), float32 (float64 for float64)
        With `return_stats`, a pair of it and `LossStats` with vectors of shape (N,).

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    Extra memory is O((N + M) D), and O(N H) for its own negatives, of which 16-bit ones are copied in float32. A query
    without negatives contributes 0 with zero gradient and stays in the mean.
    Gradients reach `query`, `key`, `negatives`, `temperature` and `sample_weight`.

    References
    ----------
    van den Oord, Li, Vinyals: Representation Learning with Contrastive Predictive Coding, arXiv:1807.03748.

    Examples
    --------
    >>> info_nce(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.5514)
    """
    terms.check_options(reduction=reduction, normalize=normalize, label_smoothing=label_smoothing)
    checks.features("query", query)
    checks.features("key", key, expected="(M, D)")
    if negatives is None:
        query, key = promoted(query, key)
    else:
        checks.features("negatives", negatives, expected="(N, H, D)")
        query, key, negatives = promoted(query, key, negatives)
        checks.same_kind("negatives", negatives, "query", query)
        checks.one_per_row("negatives", negatives, "query", query)
    checks.same_kind("key", key, "query", query)
    n = query.shape[0]
    checks.temperature("temperature", temperature, query.device, rows=n, rows_of="query")
    checks.ids_of_both(query_ids, key_ids, query, key)
    if sample_weight is not None:
        checks.weights("sample_weight", sample_weight, n, query.device, rows_of="query")
    checks.positives(target, query, key)
    target = torch.arange(n, device=query.device, dtype=torch.int32) if target is None else target.long()

    temperature = terms.flat(temperature, query)
    query, query_scale = terms.with_logit_scale(query, temperature, -1.0, normalize, backend)
    key, key_scale = terms.with_norm_scale(key, normalize, backend)
    swept = similarity_logsumexp(
        query,
        key,
        row_scale=query_scale,
        col_scale=key_scale,
        exclude=target,
        row_ids=query_ids,
        col_ids=key_ids,
        backend=backend,
    )
    positive, lse, largest, own = swept.excluded_logit, swept.row_lse, swept.row_max, None
    if negatives is not None and negatives.shape[1] > 0:
        negatives, negative_scale = terms.with_norm_scale(negatives, normalize, backend)
        own = terms.scaled(query_scale, terms.scaled(negative_scale, row_dots(query, negatives)).T).T
        lse, largest = torch.logaddexp(lse, own.logsumexp(1)), torch.maximum(largest, own.detach().amax(1))
    spread = None
    if label_smoothing > 0.0:
        uniform = terms.uniform_similarity(
            query, key, query_scale, key_scale, positive, target, query_ids, key_ids, own
        )
        # without negatives the positive is the mean: exactly 0, where the difference of two roundings is not
        spread = label_smoothing * torch.where(lse > -torch.inf, positive - uniform, 0.0)
    loss = terms.cross_entropy(
        positive, (lse,), spread=spread, reduction=reduction, sample_weight=sample_weight, backend=backend
    )
    if not return_stats:
        return loss
    return loss, LossStats(
        lse=torch.logaddexp(lse, positive).detach(),
        positive_similarity=(positive * temperature).detach(),
        accuracy=terms.accuracy(positive, largest),
    )
