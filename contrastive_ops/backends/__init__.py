"""Who runs an op. One dispatch function; every backend says in a sentence why it can't."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.backends import cpu, cuda, reference, tiled, triton, tuples

_MODULES: dict[str, ModuleType] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "tiled": tiled,
    "reference": reference,
}
# in the order of preference; the others run only when named: cuda and triton until they have run on a GPU, the
# reference always
AUTO = ("cpu", "tiled")
NAMES = ("auto", *_MODULES)


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


def choose(op: str, x: Tensor, backend: str) -> str:
    """The backend that runs `op` on tensors like `x`: the named one or an error, for "auto" the first that can.

    The environment variable CONTRASTIVE_OPS_BACKEND stands in for "auto".
    """
    source = "CONTRASTIVE_OPS_BACKEND" if backend == "auto" else "backend"
    backend = requested(backend)
    checks.choice(source, backend, NAMES)
    if backend != "auto":
        sentence = why_not(backend, op, x)
        if sentence is not None:
            raise RuntimeError(f'{source}="{backend}" can\'t run {op}: {sentence} Pass backend="auto".')
        return backend
    for name in AUTO:
        if why_not(name, op, x) is None:
            return name
    reasons = " ".join(filter(None, (why_not(name, op, x) for name in AUTO)))
    raise RuntimeError(f"no backend can run {op} on {x.device} tensors: {reasons}")


@dataclass(frozen=True)
class Explanation:
    """The backend a call would take, and for each backend the reason it can't run; print it."""

    op: str
    chosen: str
    reasons: dict[str, str | None]
    subject: str

    def __str__(self) -> str:
        lines = [f'{self.op} on {self.subject} takes backend "{self.chosen}"']
        for name, reason in self.reasons.items():
            if name == self.chosen:
                verdict = "chosen"
            elif reason is not None:
                verdict = f"can't: {reason}"
            elif name in AUTO:
                verdict = "can run, not needed"
            else:
                verdict = "can run, only when named"
            lines.append(f"  {name:<10} {verdict}")
        return "\n".join(lines)


def explain(x: Tensor, *, op: str = "similarity_logsumexp", backend: str = "auto") -> Explanation:
    """Say which backend an op takes on tensors like `x`, and why the others don't run.

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
        With the fields ``chosen`` and ``reasons``; its ``str`` is the report.

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
    return Explanation(
        op=op,
        chosen=choose(op, x, backend),
        reasons={name: why_not(name, op, x) for name in _MODULES},
        subject=f"{checks.names([x.dtype])} tensors on {x.device.type}",
    )
