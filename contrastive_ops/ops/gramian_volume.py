"""The volume of one set of vectors; `volume_logsumexp` has those of all pairs of two sides."""

from __future__ import annotations

from functools import reduce
from operator import mul

import torch
from torch import Tensor

from contrastive_ops import backends, checks
from contrastive_ops.dtypes import statistics_dtype
from contrastive_ops.ops import autograd


def gramian_volume(vectors: Tensor, *, backend: str = "auto") -> Tensor:
    r"""Volume of the parallelotope that K vectors span, accurate where the vectors almost coincide.

    .. math::
        V = \sqrt{\det G} = \prod_{t=1}^{K} |e_t|, \qquad G_{st} = \langle x_s, x_t \rangle

    :math:`e_t` is what is left of :math:`x_t` without its projection on the vectors before it. A determinant of
    products rounded to :math:`\epsilon` has volumes below :math:`\sqrt\epsilon` as noise. Here they keep their digits:
    the products of 32 and 16-bit inputs are float64, and of float64 inputs the residuals themselves are computed.

    Parameters
    ----------
    vectors : Tensor of shape (..., K, D), float32 / bfloat16 / float16 / float64
        The order and the signs of the K vectors do not matter.
    backend : "auto", "cpu", "cuda", "triton", "tiled", "reference"
        "cpu" has kernels, "cuda" has one for up to 5 vectors of 32 and 16 bits; all others run the same PyTorch.

    Returns
    -------
    Tensor of shape (...), float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError
        Naming the argument.
    RuntimeError
        For a named backend that can't run the input.

    Notes
    -----
    Differentiable to any order; extra memory is that of `vectors`. Vectors that are linearly dependent to within
    rounding (duplicates, a zero vector, K > D) have volume 0, the minimum, and zero gradient.

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
    chosen = backends.choose("gramian_volume", vectors, backend)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _by_residuals(vectors)
    return _Volume.apply(vectors, chosen)


def _by_residuals(vectors: Tensor) -> Tensor:
    norms, _ = orthogonalised(vectors)
    return reduce(mul, norms)


class _Volume(torch.autograd.Function):
    """With L L^T the Gram matrix of X, the gradient of the volume V is V L^-T L^-1 X."""

    @staticmethod
    def forward(ctx, vectors, backend):
        dtype = statistics_dtype(vectors)
        if dtype == torch.float64:
            norms, directions = orthogonalised(vectors)
            volume, q = reduce(mul, norms), torch.stack(directions, -2)
            upper = q @ vectors.mT
            # where a residual is 0, so is the volume, and with it the gradient
            upper.diagonal(dim1=-2, dim2=-1).copy_(
                torch.stack([norm.masked_fill(norm == 0, 1.0) for norm in norms], -1)
            )
            identity = torch.eye(vectors.shape[-2], dtype=dtype, device=vectors.device)
            inverse = torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True).mT
        else:
            basis = backends.factor(backend, vectors.reshape(-1, *vectors.shape[-2:]))
            volume, inverse = basis.volume.view(vectors.shape[:-2]).to(dtype), basis.inverse
        ctx.save_for_backward(vectors, volume, inverse)
        ctx.backend = backend
        return volume

    @staticmethod
    def backward(ctx, grad):
        vectors, volume, inverse = ctx.saved_tensors
        if autograd.wants_steps(grad):
            return *autograd.by_steps(lambda x: (_by_residuals(x),), (vectors,), (True,), (grad,)), None
        sets = vectors.reshape(-1, *vectors.shape[-2:])
        factor = (grad * volume).flatten()
        inverse = inverse.reshape(-1, *inverse.shape[-2:])
        return backends.volume_gradient(ctx.backend, sets, inverse, factor).view(vectors.shape), None


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
                rest = torch.addcmul(rest, (rest * q).sum(-1, keepdim=True), q, value=-1)
        squared = rest.square().sum(-1)
        # rounding leaves about an eps of the vector per projection
        nothing = squared <= (8 * torch.finfo(dtype).eps) ** 2 * vector.square().sum(-1)
        norm = squared.masked_fill(nothing, 1.0).sqrt()
        norms.append(norm.masked_fill(nothing, 0.0))
        directions.append((rest / norm.unsqueeze(-1)).masked_fill(nothing.unsqueeze(-1), 0.0))
    return norms, directions
