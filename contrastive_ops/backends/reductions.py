"""The reductions of the streaming engine in plain PyTorch: what is made of the logits of a row, and of a column.

Each says for one direction what it folds of a tile, what it gives in the end, and what of its gradient each logit of a
tile has. Logits of pairs that do not take part are -inf; `dim` is the one along which a tile is reduced, `part` the
slice of the rows or columns that are left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops.reference.similarity import FUNCTIONS


class LogSumExp:
    """Invariant: sum * exp(max) is the sum of exp(logit) over all tiles so far."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.max, self.sum = like.new_full((size,), -torch.inf), like.new_zeros(size)

    def fold(self, part: slice, logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Also gives the terms e^(s - max), and the factor by which what was there has shrunk."""
        new = torch.maximum(self.max[part], logits.amax(dim))
        # a set that is empty so far has max = -inf; shifting it by 0 keeps (-inf) - (-inf) out of exp
        shift = torch.where(new == -torch.inf, 0.0, new)
        factor = (self.max[part] - shift).exp()
        terms = (logits - shift.unsqueeze(dim)).exp_()
        self.sum[part] = self.sum[part] * factor + terms.sum(dim)
        self.max[part] = new
        return terms, factor

    @property
    def log_sum(self) -> Tensor:
        return self.sum.log()

    @property
    def lse(self) -> Tensor:
        return self.max + self.log_sum


class Softmax:
    """e^(s - lse) of the logits of a tile, where the log-sum-exp is known."""

    def __init__(self, maximum: Tensor, log_sum: Tensor) -> None:
        # an empty set gives nothing: exp(-inf - inf) = 0
        self.max, self.log_sum = maximum.where(maximum > -torch.inf, torch.inf), log_sum.clamp(min=0.0)

    def of(self, part: slice, logits: Tensor, dim: int) -> Tensor:
        shifted = logits - self.max[part].unsqueeze(dim)
        return shifted.sub_(self.log_sum[part].unsqueeze(dim)).exp_()


class Sum:
    """A sum over tiles that loses no digits: what rounding takes off is kept apart (Neumaier)."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.sum, self.lost = like.new_zeros(size), like.new_zeros(size)

    def fold(self, part: slice, terms: Tensor, dim: int) -> None:
        old, added = self.sum[part], terms.sum(dim)
        new = old + added
        lost = torch.where(old.abs() >= added.abs(), (old - new) + added, (added - new) + old)
        self.lost[part] += lost.where(new.isfinite(), 0.0)
        self.sum[part] = new

    @property
    def total(self) -> Tensor:
        return self.sum + self.lost


class Expectation:
    """The mean of the logits under the softmax of the teacher's: sum of e^(z - max) s, over that of e^(z - max)."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.teacher, self.moment = LogSumExp(like, size), like.new_zeros(size)

    def fold(self, part: slice, logits: Tensor, teacher: Tensor, dim: int) -> None:
        weights, factor = self.teacher.fold(part, teacher, dim)
        nothing = weights == 0.0  # of a logit that is -inf, too
        terms = weights.mul_(logits).masked_fill_(nothing, 0.0)
        self.moment[part] = self.moment[part] * factor + terms.sum(dim)

    @property
    def mean(self) -> Tensor:
        return torch.where(self.teacher.sum == 0.0, 0.0, self.moment / self.teacher.sum)


def function(of: str, logits: Tensor) -> Tensor:
    """f(s) of the functions that are summed, 0 for a logit of -inf, which takes no part."""
    terms = FUNCTIONS[of](logits)
    return terms.masked_fill_(logits == -torch.inf, 0.0) if of in ("identity", "square") else terms


def derivative(of: str, logits: Tensor) -> Tensor:
    """df/ds."""
    if of == "softplus":
        return logits.sigmoid()
    if of == "sigmoid":
        value = logits.sigmoid()
        return value * (1.0 - value)
    if of == "relu":
        return (logits > 0.0).to(logits.dtype)
    if of == "step":
        return torch.zeros_like(logits)
    value = 2.0 * logits if of == "square" else torch.ones_like(logits)
    return value.masked_fill_(logits == -torch.inf, 0.0)
