"""What a loss launches on a GPU, forward and backward, counted in Triton's interpreter.

At thousands of rows launches cost more than products. A launch is a kernel of Triton, or an operator of ATen that
computes or copies: all but views and memory that nobody fills. `python -m pytest tests/test_launches.py -s` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import contrastive_ops as co
from contrastive_ops import backends
from contrastive_ops.backends import sweep

SENTENCE = backends.why_not("triton", "similarity_logsumexp", torch.empty(1, 1))
runs = pytest.mark.skipif(SENTENCE is not None, reason=f"triton: {SENTENCE}")

# memory that nobody fills, and views that don't say that they are some
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}


class Launches(TorchDispatchMode):
    """The names of what is launched while it is active, also in backward and inside of the ops of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # what it does is seen, too
            if function.namespace.startswith("contrastive_ops"):
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
            results = function.decompose(*args, **kwargs)  # an operator that is made of others, such as matmul
            if results is not NotImplemented:
                return results
        results = function(*args, **kwargs)
        made = [result for result in tree_leaves(results) if isinstance(result, Tensor)]
        nothing = bool(made) and not any(result.numel() for result in made)  # no grid has 0 blocks
        if not (nothing or _is_view(function) or function._schema.name.removeprefix("aten::") in FREE):
            self.names.append(str(function))
        return results


def _is_view(function: Any) -> bool:
    returns = function._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


@contextmanager
def counted() -> Iterator[list[str]]:
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__
    with pytest.MonkeyPatch.context() as patch, Launches() as launches:

        def launch(self: Any, *args: Any, **kwargs: Any) -> None:
            launches.names.append(f"triton.{self.fn.__name__}")
            with _disable_current_modes():  # what the interpreter does is no launch
                run(self, *args, **kwargs)

        patch.setattr(GridExecutor, "__call__", launch)
        yield launches.names


def launched(loss: Callable[..., Tensor], *leaves: Tensor) -> list[str]:
    """Of forward and backward, after a call that sets up what is set up once."""
    loss(*leaves).backward()
    for value in leaves:
        value.grad = None  # or its gradients are added up
    with counted() as names:
        loss(*leaves).backward()
    return names


def report(name: str, names: list[str]) -> str:
    return "\n".join([f"{name} launches {len(names)}:", *(f"  {launch}" for launch in names)])


N, D = 40, 24


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


LABELS = torch.arange(N) % 7
KEYS = {"keys": torch.randn(30, D), "key_labels": torch.arange(30) % 7}
# with default options, but for what learns the temperature; budgets and leaves beside it
LOSSES: dict[str, tuple[int, int, Callable[..., Tensor]]] = {
    "clip_loss": (20, 2, lambda t, x, y: co.clip_loss(x, y, t, backend="triton")),
    "nt_xent": (16, 2, lambda t, x, y: co.nt_xent(x, y, temperature=t, backend="triton")),
    "supcon": (28, 1, lambda t, x: co.supcon(x, LABELS, temperature=t, backend="triton")),
    "supcon of frozen keys": (57, 1, lambda t, x: co.supcon(x, LABELS, temperature=t, backend="triton", **KEYS)),
    "gram_loss": (45, 3, lambda t, *x: co.gram_loss(*x, temperature=t, backend="triton")),
}


def launches_of(name: str) -> list[str]:
    _, sides, loss = LOSSES[name]
    return launched(loss, torch.tensor(0.3).requires_grad_(), *(leaf(N, D) for _ in range(sides)))


@runs
@pytest.mark.parametrize("name", LOSSES)
def test_budget(name):
    names = launches_of(name)
    print(report(name, names))
    assert len(names) <= LOSSES[name][0], report(name, names)


@runs
def test_what_is_counted():
    """Whatever computes, copies, casts or fills, and every kernel; no view, and no memory that is not filled."""
    x, y = leaf(4, 4), leaf(4, 4)
    triton = backends.triton.kernels("rowwise")
    with counted() as names, torch.no_grad():
        x.T.unsqueeze(0).expand(3, 4, 4), x.view(2, 8)
        torch.empty_like(x), x.new_empty(3), x.new_zeros(0), x.detach().contiguous()
        assert names == []
        torch.cat([x, y]), x.to(torch.float64), x.new_zeros(1), x.clone(), x @ y
        triton.scale(x, None, 1.0, 1.0)
    assert [name.split(".")[1] for name in names] == ["cat", "_to_copy", "new_zeros", "clone", "mm", "scale_kernel"]


@runs
@pytest.mark.parametrize("place", ["loss", "op", "backward"])
def test_one_more_is_seen(place, monkeypatch):
    """Wherever it is: in the page of the loss, in an op, or in a backward of autograd."""
    before = launches_of("clip_loss")
    if place == "loss":
        reduce = co.losses.clip.terms.cross_entropy
        monkeypatch.setattr(co.losses.clip.terms, "cross_entropy", lambda *a, **k: reduce(*a, **k) * 1.0)
        more = 2  # its gradient, too
    elif place == "op":
        run = sweep.forward
        monkeypatch.setattr(
            sweep, "forward", lambda kernels, problem, *a: (problem.x.clone(), run(kernels, problem, *a))[1]
        )
        more = 1
    else:
        run = sweep.backward
        monkeypatch.setattr(
            sweep, "backward", lambda kernels, problem, *a: (problem.x.clone(), run(kernels, problem, *a))[1]
        )
        more = 1
    assert len(launches_of("clip_loss")) == len(before) + more
