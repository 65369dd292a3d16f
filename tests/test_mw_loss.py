"""The Mann-Whitney loss: its table against the dense comparisons of every negative with every positive."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import evaluate, judge
from torch.nn import functional as F

import contrastive_ops as co
from contrastive_ops import reference

OP = "similarity_sum"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPARE = pytest.mark.parametrize("compare", ["all", "own"])


def sides(n, m, d, dtype=torch.float32):
    """Positives that are alike: some negatives are above the positive of another query and below that of their own."""
    generator = torch.Generator().manual_seed(n + m)
    x, noise = (torch.randn(size, d, generator=generator, dtype=torch.float64) for size in (n, m))
    return tuple(
        F.normalize(side, dim=1).to(dtype).requires_grad_() for side in (x, torch.cat([x + noise[:n], noise[n:]]))
    )


@COMPARE
@pytest.mark.parametrize("ids", [None, [0, 1, 2, 0]])
@pytest.mark.parametrize("target", [None, [4, 0, 4, 2]])
def test_by_hand(target, ids, compare, backend):
    x, y = (side.detach() for side in sides(4, 6, 3, torch.float64))
    tau, key_ids = 0.3, [0, 1, 2, 0, 1, 7]
    s = (x @ y.T / tau).tolist()
    place = target or [0, 1, 2, 3]
    positive = [s[i][place[i]] for i in range(4)]
    expected = []
    for k in range(4):
        negatives = [s[k][j] for j in range(6) if j != place[k] and (ids is None or ids[k] != key_ids[j])]
        against = positive if compare == "all" else positive[k : k + 1]
        expected.append(sum(math.log1p(math.exp(value - p)) for value in negatives for p in against))
    options = {"temperature": tau, "compare": compare, "reduction": "none"}
    options |= {} if target is None else {"target": torch.tensor(target)}
    options |= {} if ids is None else {"query_ids": torch.tensor(ids), "key_ids": torch.tensor(key_ids)}
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(reference.mw_loss(x, y, **options), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(co.mw_loss(x, y, **options, backend=backend), expected, rtol=1e-9, atol=1e-9)


@COMPARE
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("n", "m", "temperature"), [(43, 60, 0.25), (70, 70, 0.05)])
def test_value_and_gradients(n, m, temperature, reduction, dtype, compare, backend):
    options = {"temperature": torch.tensor(temperature, requires_grad=True), "compare": compare, "reduction": reduction}
    # of a table the interpolation has as many roundings again
    judge(co.mw_loss, reference.mw_loss, sides(n, m, 10, dtype), options, fused_options={"backend": backend},
          logits=2 / temperature)  # fmt: skip


@COMPARE
@pytest.mark.parametrize("normalize", [True, False])
def test_in_float64(normalize, compare, backend):
    """The table's own error, where rounding does not hide it."""
    x, y = sides(40, 55, 8, torch.float64)
    tau = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
    options = {"temperature": tau, "normalize": normalize, "compare": compare, "target": torch.randperm(55)[:40]}
    found = evaluate(co.mw_loss, (x, y), options | {"backend": backend})
    for name, value in evaluate(reference.mw_loss, (x, y), options).items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-8 * value.abs().max().item())


@pytest.mark.parametrize("temperature", [100.0, 0.002, 1e-4])
def test_extreme_temperatures(temperature, backend):
    x, y = sides(30, 40, 6)
    results = evaluate(co.mw_loss, (x, y), {"temperature": temperature, "backend": backend})
    truth = evaluate(reference.mw_loss, (x, y), {"temperature": temperature}, dtype=torch.float64, exact=True)
    for name, value in truth.items():
        torch.testing.assert_close(results[name].double(), value, rtol=1e-4, atol=1e-4 * value.abs().max().item())


def test_raw_dot_products_far_from_each_other(backend):
    """Beyond the last node F is a line, before the first it is 0."""
    x, y = (50 * side.detach() for side in sides(20, 40, 6))
    y = torch.cat([y[:20], 20 * y[20:]]).requires_grad_()
    options = {"normalize": False, "temperature": 1.0, "reduction": "none"}
    results = evaluate(co.mw_loss, (x, y), options | {"backend": backend})
    for name, value in evaluate(reference.mw_loss, (x, y), options, dtype=torch.float64, exact=True).items():
        torch.testing.assert_close(results[name].double(), value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


@COMPARE
@pytest.mark.parametrize("n", [0, 1])
def test_no_query_and_one(n, compare, backend):
    x, y = (torch.randn(n, 4, requires_grad=True) for _ in range(2))
    for reduction in ("mean", "sum", "none"):
        results = evaluate(co.mw_loss, (x, y), {"compare": compare, "reduction": reduction, "backend": backend})
        assert all((value == 0).all() for value in results.values()), results
        assert {"output0", "grad of argument0", "grad of argument1"} <= results.keys()


@COMPARE
def test_a_target_beyond_the_keys(compare, backend, monkeypatch):
    """Off the CPU its values are not read, and nothing reads the key that it names."""
    monkeypatch.setattr(co.checks, "target_range", lambda *_: None)
    x, y = sides(5, 7, 4)
    loss = co.mw_loss(x, y, target=torch.tensor([0, 1, 7, -(2**40), 4]), compare=compare, backend=backend)
    assert not loss.isfinite()


def test_nan_is_not_hidden(backend):
    x, y = (side.detach() for side in sides(5, 7, 4))
    x[2, 1] = float("nan")
    assert co.mw_loss(x, y, backend=backend).isnan()


def test_one_threshold_for_all_queries(backend):
    """Each query ranks its own positive first, and scores of the second query are lower: only "own" is content."""
    key = torch.eye(4)
    query = torch.stack([key[0] + 0.9 * key[2], 0.1 * key[1]])
    options = {"normalize": False, "temperature": 0.01, "backend": backend}
    own, every = (co.mw_loss(query, key, compare=compare, **options) for compare in ("own", "all"))
    assert own < 1e-3
    assert every > 10.0


def test_module():
    x, y = sides(12, 15, 5)
    module = co.nn.MWLoss(temperature=torch.nn.Parameter(torch.tensor(0.1)), compare="own")
    assert torch.equal(module(x, y), co.mw_loss(x, y, temperature=torch.tensor(0.1), compare="own"))
    module(x, y, compare="all").backward()
    assert module.temperature.grad.item() != 0
