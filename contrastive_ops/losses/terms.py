"""The terms that losses share and that cost O(N D): norms, uniform means, the final reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import statistics_dtype
from contrastive_ops.ops import (
    BACKENDS,
    contrast,
    contrast_sum,
    matches,
    row_dot,
    sums_of_groups,
    with_inverse_norm,
    with_scale,
)

Check = Callable[[str, Any], None]


class LossStats(NamedTuple):
    """What `return_stats=True` adds; detached.

    lse : log-sum-exp of all logits of a row that take part, the positives included
    positive_similarity : similarity of a row to its positive (their mean if several), without the temperature
    accuracy : share of the rows whose positive is more similar than every negative, of shape ()
    """

    lse: Tensor
    positive_similarity: Tensor
    accuracy: Tensor


def ones(x: Tensor) -> Tensor:
    """The scale of the rows of x that leaves them as they are."""
    return torch.ones(x.shape[:-1], dtype=statistics_dtype(x), device=x.device)


def with_norm_scale(x: Tensor, normalize: bool, backend: str) -> tuple[Tensor, Tensor | None]:
    """x, to go on with, and the scale of its rows that makes dot products cosines; None to take them as they are."""
    return with_inverse_norm(x, backend) if normalize else (x, None)


def with_logit_scale(
    x: Tensor, factor: float | Tensor, power: float, normalize: bool, backend: str
) -> tuple[Tensor, float | Tensor]:
    """As `with_norm_scale`, times factor^power."""
    return with_scale(x, factor, power, backend) if normalize else (x, factor**power)


def centred(*features: Tensor) -> tuple[Tensor, ...]:
    """Tensors [N, D] less the mean row of them all, in the dtype of the statistics: for functions of differences alone.

    |x|^2 - 2 <x, y> + |y|^2 cancels where an offset is common to all rows: its rounding is that of the offset's square.
    The mean is a constant: a shift of all rows changes nothing, so no gradient goes through it. 16 bits don't hold what
    is left of 16-bit features, nor do coefficients of 16 bits cancel well enough, so the sweep goes on in float32.
    """
    rows = tuple(x.to(statistics_dtype(x)) for x in features)
    mean = torch.stack([x.detach().mean(0) for x in rows]).mean(0)
    return tuple(x - mean for x in rows)


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """torch.logsumexp, with zero gradient where all entries are -inf and that one has NaN."""
    empty = (x == -torch.inf).all(dim, keepdim=True)
    return torch.where(empty.squeeze(dim), -torch.inf, x.masked_fill(empty, 0.0).logsumexp(dim))


def inverse(temperature: float | Tensor, x: Tensor) -> float | Tensor:
    """The logit scale 1 / temperature, a tensor in the dtype of the statistics."""
    temperature = flat(temperature, x)
    return temperature.reciprocal() if isinstance(temperature, Tensor) else 1.0 / temperature


def flat(scale: float | Tensor, x: Tensor) -> float | Tensor:
    """A scale that multiplies vectors of rows: a float as it is, a tensor of shape (1,) or (N,)."""
    return scale.to(statistics_dtype(x)).reshape(-1) if isinstance(scale, Tensor) else scale


def scaled(scale: float | Tensor | None, vector: Tensor) -> Tensor:
    """scale * vector, where None is a scale of 1."""
    return vector if scale is None else scale * vector


def uniform_similarity(
    x: Tensor,
    y: Tensor,
    x_scale: float | Tensor | None,
    y_scale: float | Tensor | None,
    positive: Tensor,
    target: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    own: Tensor | None = None,
) -> Tensor:
    """Mean of row i over the columns that take part, its negatives and its positive: of logits where these are scales.

    `own` [N, H] take part, too, each in its row alone.

    A mean of dot products is the dot product with a mean, so label smoothing needs no sweep; the columns that are
    left out by their ids are taken off as the sum of their group.
    """
    m = y.shape[0]
    cols = scaled(y_scale[:, None] if isinstance(y_scale, Tensor) else y_scale, y.to(statistics_dtype(y)))
    total = scaled(x_scale, row_dot(x, cols.sum(0)))
    if own is not None:
        total, m = total + own.sum(1), m + own.shape[1]
    if x_ids is None or y_ids is None:
        return total / max(m, 1)
    y_ids = y_ids.long().contiguous()
    ordered = y_ids.sort().values
    x_group, group_size = matches(ordered, x_ids)
    same = total_of_group(x, cols, x_scale, x_group, group_size, torch.searchsorted(ordered, y_ids))
    positive_in_group = (x_ids == y_ids[target]).to(cols.dtype)
    size = m - group_size + positive_in_group
    return (total - same + positive_in_group * positive) / size


def group_sizes(ids: Tensor) -> Tensor:
    """Of each row how many have its id."""
    return matches(ids.long().sort().values, ids)[1]


def total_of_group(
    x: Tensor, cols: Tensor, x_scale: float | Tensor | None, x_group: Tensor, size: Tensor, group: Tensor
) -> Tensor:
    """The sum of row i over the `size` columns of its group; columns with their scale, in the dtype of statistics."""
    m = cols.shape[0]
    if m == 0:
        return cols.new_zeros(x.shape[0])
    sums = sums_of_groups(cols, group)[x_group.clamp(max=m - 1)]
    return scaled(x_scale, row_dot(x, sums)).masked_fill(size == 0, 0.0)


def reduce(per_row: Tensor, reduction: str, sample_weight: Tensor | None = None) -> Tensor:
    """The vector itself, its (weighted) sum, or its (weighted) mean; the mean of nothing is 0."""
    if reduction == "none":
        return per_row
    if sample_weight is None:
        total = per_row.sum()
        return total if reduction == "sum" else total / max(per_row.numel(), 1)
    weight = sample_weight.to(per_row.dtype)
    total = (weight * per_row).sum()
    if reduction == "sum":
        return total
    mass = weight.sum()
    return total / mass.masked_fill(mass == 0, 1.0)


def rows_of_mean(n: int, reduction: str) -> int:
    """What divides a sum over n rows; the mean of nothing is 0."""
    return 1 if reduction == "sum" else max(n, 1)


def cross_entropy(
    positive: Tensor,
    lse: Sequence[Tensor],
    *,
    totals: Sequence[Tensor] = (),
    label_smoothing: float = 0.0,
    spread: Tensor | None = None,
    reduction: str,
    sample_weight: Tensor | None = None,
    backend: str,
) -> Tensor:
    """The mean over the directions of softplus(lse - positive), reduced.

    Label smoothing adds eps (s_i - mean of the row): as `spread` [N], or from the totals of each direction's negatives
    where all N logits of a row take part.
    """
    n, directions = positive.shape[0], len(lse)
    smoothing = (label_smoothing * (n - 1) / max(n, 1), label_smoothing / max(n, 1))
    if reduction == "none" or sample_weight is not None or spread is not None:
        per_row = contrast(positive, lse, totals, *smoothing) / directions
        return reduce(per_row if spread is None else per_row + spread, reduction, sample_weight)
    divisor = directions * rows_of_mean(n, reduction)
    return contrast_sum(positive, lse, totals, *smoothing, divisor=divisor, backend=backend)


def accuracy(positive: Tensor, largest_negative: Tensor) -> Tensor:
    """Share of the rows whose positive exceeds every negative; 0 for no rows."""
    return (positive > largest_negative).to(positive.dtype).sum() / max(positive.numel(), 1)


def _one_of(*allowed: Any) -> Check:
    return lambda name, value: checks.choice(name, value, allowed)


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


# what an option may be in every loss that has it, as far as that can be said before there are features
OPTIONS: dict[str, Check] = {
    "reduction": _one_of("mean", "sum", "none"),
    "backend": _one_of(*BACKENDS),
    **dict.fromkeys(
        (
            "normalize",
            "include_same_view",
            "detach_others",
            "squared",
            "symmetric",
            "contrast_anchors",
            "contrast_positives",
        ),
        _one_of(True, False),
    ),
    "variant": _one_of("out", "in"),
    "empty": _one_of("zero", "drop"),
    "aggregate": _one_of("geometric", "arithmetic"),
    "weight": _one_of("per_pair", "per_anchor"),
    "over": _one_of("pairs", "anchors"),
    "compare": _one_of("all", "own"),
    "margin_strategy": _one_of("absolute", "relative"),
    **dict.fromkeys(("temperature", "logit_scale"), checks.positive_number),
    "teacher_temperature": _optional(checks.positive_number),
    **dict.fromkeys(("sigma", "t", "alpha"), checks.positive),
    **dict.fromkeys(("label_smoothing", "one_hot"), checks.fraction),
    "margin": checks.finite,
    "logit_bias": _optional(checks.number),
    "output_dict": lambda _, value: checks.no_dict(value),
    "sample_weight": _optional(checks.floating),
    **dict.fromkeys(("target", "ids", "query_ids", "key_ids"), _optional(checks.integers)),
    "key_labels": _optional(checks.labels),
    "keys": _optional(lambda _, value: checks.keys(value)),
}


def check_options(**options: Any) -> None:
    """Those that are in the table; sizes and devices are checked by the loss, the backend's name where it is chosen."""
    for name, value in options.items():
        if name in OPTIONS:
            OPTIONS[name](name, value)
