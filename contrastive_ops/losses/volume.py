"""The volume that vectors span, of tuples that are listed and of tiles of an N x M plane."""

from __future__ import annotations

from functools import reduce
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import statistics_dtype
from contrastive_ops.losses import terms


def gramian_volume(vectors: Tensor) -> Tensor:
    r"""Volume of the parallelotope that K vectors span, accurate where the vectors almost coincide.

    .. math::
        V = \sqrt{\det G} = \prod_{t=1}^{K} |e_t|, \qquad G_{st} = \langle x_s, x_t \rangle

    :math:`e_t` is what is left of :math:`x_t` without its projection on the vectors before it. A determinant of
    products rounded to :math:`\epsilon` has volumes below :math:`\sqrt\epsilon` as noise; residuals keep them to a
    relative accuracy of about :math:`\epsilon`.

    Parameters
    ----------
    vectors : Tensor of shape (..., K, D), float32 / bfloat16 / float16 / float64
        The order and the signs of the K vectors do not matter.

    Returns
    -------
    Tensor of shape (...), float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    Plain PyTorch, differentiable to any order; extra memory is that of `vectors`. Vectors that are linearly
    dependent to within rounding (duplicates, a zero vector, K > D) have volume 0, the minimum, and zero gradient.

    References
    ----------
    Cicchetti, Grassucci, Sigillo, Comminiello: Gramian Multimodal Representation Learning and Alignment,
    arXiv:2412.11959.

    Examples
    --------
    >>> gramian_volume(torch.tensor([[3.0, 0.0, 0.0], [1.0, 2.0, 0.0]]))
    tensor(6.)
    """
    checks.vectors("vectors", vectors)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _volume(vectors)
    return _Volume.apply(vectors)


def _volume(vectors: Tensor) -> Tensor:
    norms, _ = orthogonalised(vectors)
    return reduce(mul, norms)


class _Volume(torch.autograd.Function):
    """`_volume` with its gradient in closed form: with X = R^T Q it is V R^-1 Q, where autograd would keep every step."""

    @staticmethod
    def forward(ctx, vectors):
        norms, directions = orthogonalised(vectors)
        volume = reduce(mul, norms)
        ctx.save_for_backward(vectors, volume, torch.stack(directions, -2))
        return volume

    @staticmethod
    def backward(ctx, grad):
        vectors, volume, q = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: every step, after all
            (result,) = torch.autograd.grad(_volume(vectors), vectors, grad, create_graph=True)
            return result
        with torch.autocast(grad.device.type, enabled=False):  # it would round the operands
            r = q @ vectors.to(q.dtype).mT
            # where a residual is 0, so is the volume, and with it the gradient
            diagonal = r.diagonal(dim1=-2, dim2=-1)
            diagonal.masked_fill_(diagonal == 0, 1.0)
            scale = torch.diag_embed((grad * volume)[..., None].expand(diagonal.shape))
            return (torch.linalg.solve_triangular(r, scale, upper=True) @ q).to(vectors.dtype)


def orthogonalised(vectors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Norms and directions of the residuals e_1 .. e_K; both are 0, with zero gradient, where a vector adds nothing.

    The second projection takes off what rounding left in the first: without it, directions of almost parallel vectors
    are not orthogonal.
    """
    dtype = statistics_dtype(vectors)
    norms: list[Tensor] = []
    directions: list[Tensor] = []
    for vector in vectors.to(dtype).unbind(-2):
        rest = vector
        for _ in range(2):
            for q in directions:
                rest = torch.addcmul(rest, terms.row_dot(rest, q).unsqueeze(-1), q, value=-1)
        squared = rest.square().sum(-1)
        # rounding leaves about an eps of the vector per projection
        nothing = squared <= (8 * torch.finfo(dtype).eps) ** 2 * vector.square().sum(-1)
        norm = squared.masked_fill(nothing, 1.0).sqrt()
        norms.append(norm.masked_fill(nothing, 0.0))
        directions.append((rest / norm.unsqueeze(-1)).masked_fill(nothing.unsqueeze(-1), 0.0))
    return norms, directions


def inverse_norms(tuples: Tensor) -> Tensor:
    """The product over a tuple of 1 / |m_t|: the scale that makes its volume that of unit vectors."""
    return reduce(mul, terms.inverse_norm(tuples).unbind(-1))


class Columns(NamedTuple):
    """What a tile of volumes needs of its tuples."""

    volume: Tensor  # [M], of the tuple alone
    directions: list[Tensor]  # P times [M, D]


def columns(tuples: Tensor, normalize: bool) -> Columns:
    norms, directions = orthogonalised(tuples)
    return Columns(terms.scaled(inverse_norms(tuples) if normalize else None, reduce(mul, norms)), directions)


def tile(anchor: Tensor, cols: Columns) -> Tensor:
    """Volumes of all pairs: that of the tuple times the distance of the anchor from its span.

    The squared distance is a difference, |a|^2 - sum_t <q_t, a>^2; below its rounding errors it is 0.
    """
    squared = anchor.square().sum(1)[:, None]
    distance = squared
    with torch.autocast(anchor.device.type, enabled=False):
        for q in cols.directions:
            distance = distance - (anchor @ q.T).square()
    nothing = distance <= 8 * torch.finfo(anchor.dtype).eps * squared
    return distance.masked_fill(nothing, 0.0).sqrt() * cols.volume


def rows_per_chunk(size: int, per_row: int) -> int:
    """How many rows make a chunk of about 2**22 numbers: 16 MB in float32."""
    return max(1, min(size, 2**22 // max(per_row, 1)))


def unit(x: Tensor) -> Tensor:
    """The rows at length 1 in the dtype of the statistics; a zero row stays 0, with zero gradient."""
    return terms.inverse_norm(x)[:, None] * x.to(statistics_dtype(x))


def stacked(vectors: tuple[Tensor, ...]) -> Tensor:
    """K times (N, D) as (N, K, D)."""
    with torch.autocast(vectors[0].device.type, enabled=False):  # its rule for stack fails on float16 tensors on CPU
        return torch.stack(vectors, 1)


def check_modalities(anchor: Tensor, others: tuple[Tensor, ...], names: tuple[str, ...] = ()) -> None:
    """All of one shape (N, D), device and dtype; without names they are the items of `others`."""
    checks.features("anchor", anchor)
    checks.modalities(len(others))
    for name, other in zip(names or [f"others[{t}]" for t in range(len(others))], others, strict=True):
        checks.features(name, other)
        checks.same_kind(name, other, "anchor", anchor)
        checks.same_shape(name, other, "anchor", anchor)
