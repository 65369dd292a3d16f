"""Who runs an op. One dispatch function; every backend says in a sentence why it can't."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from contrastive_ops import build, checks, tracing
from contrastive_ops.backends import cpu, cuda, reference, tiled, triton, trust, tuples

_MODULES: dict[str, ModuleType] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "tiled": tiled,
    "reference": reference,
}
# in the order of preference; the others run only when named
AUTO = ("cpu", "tiled")
AUTO_ON_GPU = ("triton", "cuda", "tiled")  # to be measured which of the first two is faster
NAMES = ("auto", *_MODULES)

_warned: set[str] = set()  # backends that were taken for want of an engine


def module(name: str) -> ModuleType:
    return _MODULES[name]


def factor(name: str, vectors: Tensor) -> tuples.Basis:
    """Sets of vectors [M, P, D] factored for `gramian_volume`; a backend without a kernel for it has PyTorch's."""
    return getattr(_MODULES[name], "factor", tuples.factor)(vectors)


def volume_gradient(name: str, vectors: Tensor, inverse: Tensor, factor: Tensor) -> Tensor:
    """factor L^-T L^-1 X, the gradient of the volumes of sets X [M, P, D]; likewise."""
    return getattr(_MODULES[name], "volume_gradient", tuples.volume_gradient)(vectors, inverse, factor)


def why_not(name: str, op: str, x: Tensor) -> str | None:
    """The sentence that says why the backend can't run `op` on tensors like `x`; None when it can."""
    if op not in _MODULES[name].OPS:
        return f"{name} has no {op}."
    return _MODULES[name].why_not(op, x)


def requested(backend: str) -> str:
    """The backend that is asked for, by an argument or by the environment in place of "auto"."""
    return os.environ.get("CONTRASTIVE_OPS_BACKEND", "auto") if backend == "auto" else backend


def order(x: Tensor) -> tuple[str, ...]:
    """The backends that "auto" tries for tensors like `x`, the fastest first."""
    return AUTO_ON_GPU if trust.checked_on(x.device) else AUTO


def choose(op: str, x: Tensor, backend: str) -> str:
    """The backend that runs `op` on tensors like `x`: the named one or an error, for "auto" the first that can.

    On a GPU that is the first that agrees with `tiled`, which is checked at its first use. The environment variable
    CONTRASTIVE_OPS_BACKEND stands in for "auto". Where that misses the engine of a CPU, one warning says so.
    """
    chosen = would_choose(op, x, backend)
    if chosen == "tiled" and requested(backend) == "auto" and x.device.type == "cpu" and op in cpu.OPS:
        _warn_of_tiled()
    return chosen


@tracing.constant  # said while the graph is made, and not in it
def _warn_of_tiled() -> None:
    if "tiled" in _warned:
        return
    _warned.add("tiled")
    warnings.warn(
        f'backend="auto" takes "tiled" on this CPU, plain PyTorch, as there is no engine: {build.missing} '
        'backend="tiled" and CONTRASTIVE_OPS_BACKEND=tiled take it without this warning.',
        stacklevel=2,
    )


def would_choose(op: str, x: Tensor, backend: str) -> str:
    """As `choose`, for who only asks: no warning."""
    source = "CONTRASTIVE_OPS_BACKEND" if backend == "auto" else "backend"
    backend = requested(backend)
    checks.choice(source, backend, NAMES)
    if backend != "auto":
        sentence = why_not(backend, op, x)
        if sentence is not None:
            raise RuntimeError(f'{source}="{backend}" can\'t run {op}: {sentence} Pass backend="auto".')
        return backend
    able = tuple(name for name in order(x) if why_not(name, op, x) is None)
    chosen = able[0] if able else None
    if trust.checked_on(x.device):
        chosen = _first_trusted(op, able, x.device, x.dtype)
    if chosen is not None:
        return chosen
    reasons = " ".join(filter(None, (_why_not_taken(name, op, x) for name in order(x))))
    raise RuntimeError(f"no backend can run {op} on {x.device} tensors: {reasons}")


@tracing.constant  # a check runs before the graph is made, and not in it
def _first_trusted(op: str, names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> str | None:
    return trust.first_trusted(op, names, _MODULES, device, dtype)


def standing(name: str, op: str, x: Tensor, *, check: bool = False) -> trust.Standing | None:
    """What is known of an engine that `op` takes on tensors like `x` once it is checked; None for other backends.

    With `check` it is checked now if it has not been.
    """
    if not trust.checked_on(x.device) or name not in AUTO_ON_GPU or _MODULES[name] is tiled:
        return None
    if why_not(name, op, x) is not None:
        return None
    use = trust.Use(name, op, x.device, x.dtype)
    return trust.checked(use, _MODULES[name]) if check else trust.standing(use)


@dataclass(frozen=True)
class Explanation:
    """The backend a call would take, and for each backend the reason it isn't taken; print it."""

    op: str
    chosen: str
    reasons: dict[str, str | None]
    subject: str
    checks: dict[str, str] = field(default_factory=dict)  # of engines that are checked: what is known

    def __str__(self) -> str:
        lines = [f'{self.op} on {self.subject} takes backend "{self.chosen}"']
        for name, reason in self.reasons.items():
            check = self.checks.get(name)
            if name == self.chosen:
                verdict = "chosen"
            elif reason is not None:
                verdict = "only when named" if reason == check else f"can't: {reason}"
            elif check is not None:
                verdict = "can run"
            elif name in AUTO:
                verdict = "can run, not needed"
            else:
                verdict = "can run, only when named"
            lines.append(f"  {name:<10} {verdict}" + ("" if check is None else f", {check}"))
        return "\n".join(lines)


def explain(x: Tensor, *, op: str = "similarity_logsumexp", backend: str = "auto") -> Explanation:
    """Say which backend an op takes on tensors like `x`, and why the others don't run.

    What "auto" takes on a GPU has to agree with `tiled` there: an engine that has not been checked is checked now, as
    it would be by the call.

    Parameters
    ----------
    x : Tensor
        An input of the call to explain; only its device and dtype matter.
    op : str
        The streaming reduction; every softmax-type loss is made of "similarity_logsumexp".
    backend : str
        As in the call to explain.

    Returns
    -------
    Explanation
        With the fields ``chosen``, ``reasons`` (None for a backend that would run) and ``checks`` (what is known of the
        engines of a GPU); its ``str`` is the report.

    Raises
    ------
    ValueError, RuntimeError
        For a name that is no backend, and for a named backend that can't run the input.

    Examples
    --------
    >>> import torch
    >>> print(explain(torch.zeros(4, 8), backend="tiled"))  # doctest: +ELLIPSIS
    similarity_logsumexp on float32 tensors on cpu takes backend "tiled"
      cpu        ...
      cuda       ...
      triton     ...
      tiled      chosen
      reference  can run, only when named
    """
    checks.features("x", x)
    checks.choice("op", op, tiled.OPS)
    chosen = would_choose(op, x, backend)  # before the standings, which it may change
    standings = {name: known for name in _MODULES if (known := standing(name, op, x)) is not None}
    return Explanation(
        op=op,
        chosen=chosen,
        reasons={name: _why_not_taken(name, op, x) for name in _MODULES},
        subject=f"{checks.names([x.dtype])} tensors on {x.device.type}",
        checks={name: known.sentence for name, known in standings.items()},
    )


def _why_not_taken(name: str, op: str, x: Tensor) -> str | None:
    """The sentence of `why_not`, or of a check that found the engine wrong."""
    known = standing(name, op, x)
    return known.sentence if known is not None and known.trusted is False else why_not(name, op, x)
