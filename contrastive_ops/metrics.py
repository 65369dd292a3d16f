"""How good embeddings are at finding each other, without an N x M matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import promoted
from contrastive_ops.ops import inverse_norm, similarity_topk
from contrastive_ops.ops.similarity_topk import MOST


@torch.no_grad()
def recall_at_k(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    normalize: bool = True,
    backend: str = "auto",
) -> dict[int, Tensor]:
    """The share of the queries that have a positive among the k keys most similar to them, for each k.

    Parameters
    ----------
    query : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
    key : Tensor of shape (M, D), dtype of `query`
        Without `target` and ids, M >= N and row i is the positive of query i.
    target : integer Tensor of shape (N,), optional
        Index of each query's positive in `key`, in [0, M).
    ks : integers from 1 to 1024
    query_ids, key_ids : integer Tensors of shape (N,) and (M,), optional
        In place of `target`: the keys of the query's id are its positives, of which one is enough. A query without any
        counts as not found.
    normalize : bool
        Cosine similarity; False takes the dot product as it is.
    backend : str
        See `similarity_topk`.

    Returns
    -------
    dict of k to Tensor of shape (), float32 (float64 for float64)
        In the order of `ks`, on the device of `query`. The recall of no queries is 0.

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument.

    Notes
    -----
    One `similarity_topk` of the largest k. Of keys that are equally similar the first come first. Nothing is
    differentiated.

    Examples
    --------
    >>> key = torch.eye(3)
    >>> recall_at_k(key.roll(1, 0), key, ks=(1, 3))
    {1: tensor(0.), 3: tensor(1.)}
    """
    checks.choice("normalize", normalize, (True, False))
    checks.features("query", query)
    checks.features("key", key, expected="(M, D)")
    query, key = promoted(query, key)
    checks.same_kind("key", key, "query", query)
    checks.ranks(ks, MOST)
    checks.ids_of_both(query_ids, key_ids, query, key)
    n, m = query.shape[0], key.shape[0]
    if query_ids is not None:
        checks.one_answer(target)
    else:
        checks.positives(target, query, key)
        target = torch.arange(n, device=query.device) if target is None else target

    # a scale of the query does not change the order of its keys
    scale = inverse_norm(key, backend) if normalize else None
    values, found = similarity_topk(query, key, max(ks), col_scale=scale, backend=backend)
    if target is not None:
        hit = found == target[:, None]
    elif query_ids is not None and key_ids is not None and m > 0:
        hit = (key_ids[found.clamp(min=0)] == query_ids[:, None]) & (found >= 0)
    else:  # there are no keys
        hit = found >= 0
    return {k: hit[:, :k].any(1).to(values.dtype).sum() / max(n, 1) for k in ks}
