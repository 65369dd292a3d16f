"""Modules: the losses with their options stored, and the learnable logit scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contrastive_ops import losses


class _Loss(torch.nn.Module):
    """Stores the keyword options of a loss function; `forward` takes its tensors and may override options."""

    function: Callable[..., Any]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *tensors: Tensor, **options: Any) -> Any:
        return type(self).function(*tensors, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class InfoNCE(_Loss):
    """Module of `info_nce`: ``InfoNCE(temperature=0.07)(query, key)``.

    Examples
    --------
    >>> InfoNCE(temperature=1.0)(torch.eye(3), torch.eye(3))
    tensor(0.5514)
    """

    function = staticmethod(losses.info_nce)


class CLIPLoss(_Loss):
    """Module of `clip_loss`: ``CLIPLoss()(image_features, text_features, logit_scale)``.

    Examples
    --------
    >>> CLIPLoss()(torch.eye(3), torch.eye(3), 1.0)
    tensor(0.5514)
    """

    function = staticmethod(losses.clip_loss)


class NTXent(_Loss):
    """Module of `nt_xent`: ``NTXent(temperature=0.5)(z1, z2)``.

    Examples
    --------
    >>> NTXent(temperature=1.0)(torch.eye(3), torch.eye(3))
    tensor(0.9048)
    """

    function = staticmethod(losses.nt_xent)


class DCL(_Loss):
    """Module of `dcl`: ``DCL(temperature=0.1)(z1, z2)``.

    Examples
    --------
    >>> DCL(temperature=1.0)(torch.eye(3), torch.eye(3))
    tensor(0.3863)
    """

    function = staticmethod(losses.dcl)


class DCLW(_Loss):
    """Module of `dclw`: ``DCLW(temperature=0.1, sigma=0.5)(z1, z2)``.

    Examples
    --------
    >>> DCLW(temperature=1.0)(torch.eye(3), torch.eye(3))
    tensor(0.3863)
    """

    function = staticmethod(losses.dclw)


class SupCon(_Loss):
    """Module of `supcon`: ``SupCon(temperature=0.07)(features, labels)``.

    Examples
    --------
    >>> SupCon(temperature=1.0)(torch.eye(4), torch.tensor([0, 0, 1, 1]))
    tensor(1.0986)
    """

    function = staticmethod(losses.supcon)


class MVInfoNCE(_Loss):
    """Module of `mv_infonce`: ``MVInfoNCE(temperature=0.1)(views)``.

    Examples
    --------
    >>> MVInfoNCE(temperature=1.0)(torch.eye(3).expand(2, 3, 3))
    tensor(0.9048)
    """

    function = staticmethod(losses.mv_infonce)


class MVDHEL(_Loss):
    """Module of `mv_dhel`: ``MVDHEL(temperature=0.1)(views)``.

    Examples
    --------
    >>> MVDHEL(temperature=1.0)(torch.eye(3).expand(2, 3, 3))
    tensor(0.3863)
    """

    function = staticmethod(losses.mv_dhel)


class DHEL(_Loss):
    """Module of `dhel`: ``DHEL(temperature=0.1)(z1, z2)``.

    Examples
    --------
    >>> DHEL(temperature=1.0)(torch.eye(3), torch.eye(3))
    tensor(0.3863)
    """

    function = staticmethod(losses.dhel)


class PVC(_Loss):
    """Module of `pvc`: ``PVC(temperature=0.1)(views)``.

    Examples
    --------
    >>> PVC(temperature=1.0)(torch.eye(3).expand(3, 3, 3))
    tensor(1.1654)
    """

    function = staticmethod(losses.pvc)


class PairwiseViews(_Loss):
    """Module of `pairwise_views`: ``PairwiseViews(loss="nt_xent", temperature=0.5)(views)``.

    Examples
    --------
    >>> PairwiseViews(temperature=1.0)(torch.eye(3).expand(4, 3, 3))
    tensor(0.9048)
    """

    function = staticmethod(losses.pairwise_views)


class Uniformity(_Loss):
    """Module of `uniformity`: ``Uniformity(t=2.0)(x)``.

    Examples
    --------
    >>> Uniformity()(torch.eye(3))
    tensor(-4.)
    """

    function = staticmethod(losses.uniformity)


class JointEntropy(_Loss):
    """Module of `joint_entropy`: ``JointEntropy(t=1.0)(x)``.

    Examples
    --------
    >>> JointEntropy()(torch.eye(2))
    tensor(-0.5662)
    """

    function = staticmethod(losses.joint_entropy)


class Alignment(_Loss):
    """Module of `alignment`: ``Alignment(alpha=2.0)(x, y)``.

    Examples
    --------
    >>> Alignment()(torch.eye(3), torch.eye(3).roll(1, 0))
    tensor(2.)
    """

    function = staticmethod(losses.alignment)


class GramLoss(_Loss):
    """Module of `gram_loss`: ``GramLoss(temperature=0.07)(anchor, *others)``.

    Examples
    --------
    >>> GramLoss(temperature=1.0, label_smoothing=0.0)(torch.eye(3), torch.eye(3))
    tensor(0.5514)
    """

    function = staticmethod(losses.gram_loss)


class TriangleLoss(_Loss):
    """Module of `triangle_loss`: ``TriangleLoss(temperature=0.07)(anchor, x, y)``.

    Examples
    --------
    >>> TriangleLoss(temperature=1.0)(torch.eye(3), torch.eye(3), -torch.eye(3))
    tensor(0.6181)
    """

    function = staticmethod(losses.triangle_loss)


class LogitScale(torch.nn.Module):
    """The learnable logit scale of the CLIP family; calling it gives the multiplier ``exp(logit_scale)``.

    Parameters
    ----------
    initial : float
        Multiplier to start from; its logarithm is the parameter `logit_scale`.
    maximum : float
        Bound that `clamp_` restores; call it after each optimizer step.
    shape : () or (1,)
        Shape of the parameter; (1,) can be sharded. Checkpoints of either shape load into both.

    Examples
    --------
    >>> LogitScale(initial=10.0)().item()  # doctest: +ELLIPSIS
    10.0...
    """

    def __init__(self, initial: float = 1 / 0.07, maximum: float = 100.0, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        if shape not in ((), (1,)):
            raise ValueError(f"shape must be () or (1,), got {shape}.")
        if not 0 < initial <= maximum:
            raise ValueError(f"initial must be in (0, maximum] = (0, {maximum}], got {initial}.")
        self.maximum = maximum
        self.logit_scale = torch.nn.Parameter(torch.full(shape, math.log(initial)))

    def forward(self) -> Tensor:
        return self.logit_scale.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring the multiplier back into [1, maximum], outside of the graph."""
        self.logit_scale.clamp_(0.0, math.log(self.maximum))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        name = prefix + "logit_scale"
        if name in state_dict and state_dict[name].numel() == 1:
            state_dict[name] = state_dict[name].reshape(self.logit_scale.shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
