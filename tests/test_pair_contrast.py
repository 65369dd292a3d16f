"""The losses that run as one node of autograd: the same bits as in steps, and steps where something looks on."""

from __future__ import annotations

import pytest
import torch

import contrastive_ops as co
from contrastive_ops.ops import pair_contrast

LOSSES = {"clip_loss": co.clip_loss, "nt_xent": co.nt_xent}


def results(loss, x, y, factor, backend, **options):
    name = {"logit_scale": factor} if loss is co.clip_loss else {"temperature": factor}
    value = loss(x, y, **name, backend=backend, **options)
    leaves = [of for of in (x, y, factor) if isinstance(of, torch.Tensor) and of.requires_grad]
    return value, *torch.autograd.grad(value, leaves)


@pytest.fixture
def in_steps(monkeypatch):
    def switch(on):
        monkeypatch.setattr(pair_contrast, "_is_plain", lambda *_: not on)

    return switch


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("factor", [0.3, torch.tensor(0.3), torch.tensor([0.3])], ids=["float", "0d", "1"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_in_steps(loss, frozen, factor, ids, dtype, backend, in_steps):
    x, y = (torch.randn(33, 17, dtype=dtype).requires_grad_(i not in frozen) for i in range(2))
    if isinstance(factor, torch.Tensor):
        factor = factor.clone().requires_grad_()
    elif frozen == (0, 1):
        pytest.skip("nothing to learn")
    options = {"ids": torch.arange(33) % 20} if ids else {}
    for reduction in ("mean", "sum"):
        found = []
        for steps in (False, True):
            in_steps(steps)
            found.append(results(loss, x, y, factor, backend, reduction=reduction, **options))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_it_is_one_node(in_steps):
    x, y = torch.randn(2, 5, 4, requires_grad=True)
    if co.explain(x).chosen != "cpu":
        pytest.skip("the steps of other backends are PyTorch's")
    assert type(co.clip_loss(x, y, 5.0).grad_fn).__name__ == "_PairContrastBackward"
    in_steps(True)
    assert type(co.clip_loss(x, y, 5.0).grad_fn).__name__ == "_ContrastBackward"


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_few_rows(loss, n, backend):
    x, y = (torch.randn(n, 4, requires_grad=True) for _ in range(2))
    assert all((value == 0).all() for value in results(loss, x, y, 1.0, backend))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_differentiating_twice_says_what_to_do(loss, backend):
    x, y = torch.randn(2, 5, 4, requires_grad=True)
    factor = torch.tensor(0.5, requires_grad=True)
    name = {"logit_scale": factor} if loss is co.clip_loss else {"temperature": factor}
    plain = torch.autograd.grad(loss(x, y, **name, backend=backend), (x, y, factor))
    again = torch.autograd.grad(loss(x, y, **name, backend=backend), (x, y, factor), create_graph=True)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="similarity_logsumexp is differentiable once"):
        sum(grad.sum() for grad in again).backward()
