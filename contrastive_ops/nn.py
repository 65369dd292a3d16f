"""Modules: the losses with their options, and the learnable logit scale."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from contrastive_ops import checks, losses
from contrastive_ops.losses import multi_view, terms


@cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """What may be given beside the first tensor, by name."""
    _, *others = inspect.signature(function).parameters.values()
    return tuple(p.name for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


class _Loss(torch.nn.Module):
    """A loss function with options; `forward` takes its tensors, and options that go before those of the module.

    Each option is an attribute, which may be set at any time. A Parameter is a parameter of the module, another tensor
    a buffer, a module a submodule whose call gives the value: with ``temperature=LogitScale()`` it is 1 / multiplier.
    """

    function: Callable[..., Any]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._given: list[str] = []
        checks.known_options(type(self).__name__, options, self._known(options))
        for name, value in options.items():
            setattr(self, name, value)

    @classmethod
    def _known(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of all options that there are beside these."""
        return _parameters(cls.function)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._known(self.__dict__):
            super().__setattr__(name, value)
            return
        registered = name in self._parameters or name in self._buffers
        if not registered and not isinstance(value, torch.nn.Module):
            terms.check_options(**{name: value})
        if isinstance(value, Tensor) and not registered and not isinstance(value, torch.nn.Parameter):
            self.__dict__.pop(name, None)
            self.register_buffer(name, value)
        else:
            super().__setattr__(name, value)
        if name not in self._given:
            self._given.append(name)

    @property
    def options(self) -> dict[str, Any]:
        """Those that were given, by name."""
        return {name: getattr(self, name) for name in self._given}

    def forward(self, *tensors: Tensor, **options: Any) -> Any:
        own = {name: _value(name, option) for name, option in self.options.items() if name not in options}
        return type(self).function(*tensors, **own, **options)

    def extra_repr(self) -> str:
        shown = {name: option for name, option in self.options.items() if name not in self._modules}
        return ", ".join(f"{name}={_in_words(option)}" for name, option in shown.items())


def _value(name: str, option: Any) -> Any:
    if not isinstance(option, torch.nn.Module):
        return option
    return option().reciprocal() if name == "temperature" and isinstance(option, LogitScale) else option()


def _in_words(option: Any) -> str:
    if isinstance(option, Tensor):
        return f"{type(option).__name__} of shape {checks.shape(option)}"
    return repr(option)


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


class SigLIPLoss(_Loss):
    """Module of `siglip_loss`: ``SigLIPLoss()(image_features, text_features, logit_scale, logit_bias)``.

    What the paper learns, from where it starts:
    ``SigLIPLoss(logit_scale=LogitScale(10.0), logit_bias=torch.nn.Parameter(torch.tensor(-10.0)))``.

    Examples
    --------
    >>> SigLIPLoss()(torch.eye(3), torch.eye(3), 10.0, -10.0)
    tensor(0.6932)
    """

    function = staticmethod(losses.siglip_loss)


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


class NTXentLabelled(_Loss):
    """Module of `nt_xent_labelled`: ``NTXentLabelled(temperature=0.07)(features, labels)``.

    Examples
    --------
    >>> NTXentLabelled(temperature=1.0)(torch.eye(4), torch.tensor([0, 0, 1, 1]))
    tensor(1.0986)
    """

    function = staticmethod(losses.nt_xent_labelled)


class GuidedInfoNCE(_Loss):
    """Module of `guided_info_nce`: ``GuidedInfoNCE(temperature=0.01, margin=0.1)(anchor, positive, guide=guide)``.

    Examples
    --------
    >>> GuidedInfoNCE(temperature=1.0)(torch.eye(3), torch.eye(3))
    tensor(1.1654)
    """

    function = staticmethod(losses.guided_info_nce)


class SoftTargetLoss(_Loss):
    """Module of `soft_target_loss`: ``SoftTargetLoss(teacher_temperature=0.05)(x, y, u, v)``.

    Examples
    --------
    >>> x = torch.eye(3)
    >>> SoftTargetLoss(temperature=1.0)(x, x, x, x)
    tensor(0.9753)
    """

    function = staticmethod(losses.soft_target_loss)


class MWLoss(_Loss):
    """Module of `mw_loss`: ``MWLoss(temperature=0.01)(query, key)``.

    Examples
    --------
    >>> MWLoss(temperature=1.0)(torch.eye(3), torch.eye(3))
    tensor(1.8796)
    """

    function = staticmethod(losses.mw_loss)


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

    @classmethod
    def _known(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        loss = multi_view.pair_loss(options.get("loss", "nt_xent"), return_stats=options.get("return_stats", False))
        _second, *of_loss = _parameters(loss)
        return tuple(dict.fromkeys(("loss", "ids", *of_loss)))


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

    As the `temperature` of a module of a loss it is 1 / multiplier.

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
