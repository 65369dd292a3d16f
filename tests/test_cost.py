"""The page of modelled costs: it is what the kernels' constants give, and counts what each scheme computes."""

from __future__ import annotations

import difflib

import pytest

pytest.importorskip("triton", reason="triton: not installed; pip install triton")

from bench import cost


def test_page_is_what_is_modelled():
    committed, now = (text.splitlines() for text in (cost.PAGE.read_text(), cost.page()))
    changes = [*difflib.unified_diff(committed, now, cost.PAGE.name, "now", n=0, lineterm="")]
    if changes:
        pytest.fail("\n".join([*changes, "", f"If that is meant: {cost.COMMAND}"]), pytrace=False)


@pytest.mark.parametrize(
    ("goal", "seconds"), cost.TARGETS, ids=[f"{device.name}-{d}" for (device, d), _ in cost.TARGETS]
)
def test_bound_is_within_the_target(goal, seconds, request):
    device, d = goal
    if device is cost.H100 and cost.tiling(device).block_m == 64:
        request.applymarker(pytest.mark.xfail(strict=True, reason="tiles of 64 x 64 wait for L2"))
    assert cost.bound(cost.ours(d, device), device) <= seconds


@pytest.mark.parametrize("device", cost.DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize(
    ("phases", "d", "products"),
    [
        (cost.ours, 768, 8),
        (cost.ours_owner, 128, 10),
        (cost.memeff, 512, 10),
        (cost.memeff, 768, 2 + 8 * 1024 / 768),  # lanes are a power of two
        (cost.inf_cl, 768, 20),
        (cost.liger_chunked, 768, 12),
        (cost.liger_fused, 768, 16),
        (cost.eager, 768, 12),
        (cost.siglip, 768, 6),
    ],
)
def test_flops_over_squared_n_times_d(phases, d, products, device):
    assert cost.total(phases(d, device), "flops") == pytest.approx(products * cost.N**2 * d)


def test_balance_and_estimate():
    assert cost.balance(0, cost.H100) == cost.balance(132, cost.H100) == cost.balance(264, cost.H100) == 1
    assert cost.balance(133, cost.H100) == pytest.approx(133 / 264)
    phase = cost.Phase("", flops=989e12, hbm=3.35e12 * 1.2, programs=66)
    assert phase.bound(cost.H100) == pytest.approx(1.2)  # HBM
    assert phase.estimate(cost.H100) == pytest.approx(2 / 0.75)  # products, on half of the multiprocessors
    many = [cost.Phase("", flops=1.0, launches=10**6)]
    assert cost.estimate(many, cost.H100) == pytest.approx(6.0)  # the host
