"""The page of modelled costs: it is what the kernels' constants give, and counts what each scheme computes."""

from __future__ import annotations

import difflib
import functools
import math
from collections import Counter

import pytest

pytest.importorskip("triton", reason="triton: not installed; pip install triton")

from bench import cost
from contrastive_ops import backends
from contrastive_ops.backends import sweep


def test_page_is_what_is_modelled():
    committed, now = (text.splitlines() for text in (cost.PAGE.read_text(), cost.page()))
    changes = [*difflib.unified_diff(committed, now, cost.PAGE.name, "now", n=0, lineterm="")]
    if changes:
        pytest.fail("\n".join([*changes, "", f"If that is meant: {cost.COMMAND}"]), pytrace=False)


@pytest.mark.parametrize(
    ("goal", "seconds"), cost.TARGETS, ids=[f"{device.name}-{d}" for (device, d), _ in cost.TARGETS]
)
def test_bound_is_within_the_target(goal, seconds):
    device, d = goal
    assert cost.bound(cost.ours(d, device), device) <= seconds


class Recorder:
    """Stands in for a kernel, and keeps its programs of each launch."""

    def __init__(self):
        self.programs = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.programs.append(math.prod(grid))


@pytest.mark.parametrize("device", cost.DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize(
    ("case", "d"),
    [(case, 512) for _, case in cost.CASES if case.members <= 2]
    + [(cost.CLIP, 128), (cost.FROZEN, 128), (cost.Case(groups=4), 512)],
    ids=str,
)
def test_launches_are_those_of_the_code(case, d, device, monkeypatch):
    plan, launch = cost.plan(case, device), backends.triton.kernels("launch")
    launched = {name: Recorder() for name in ("forward", "attention", "excluded", "merge", "block", "product", "rows")}
    for name, recorder in launched.items():
        monkeypatch.setattr(launch, f"{name}_kernel", recorder)
    products, sums = Counter(), []
    monkeypatch.setattr(sweep, "_accumulate", lambda total, a, b: products.update([(*a.shape, *b.shape[1:])]))
    monkeypatch.setattr(sweep, "_add_sums", lambda totals, *of: sums.extend(t for t in totals if t is not None))
    monkeypatch.setattr(cost.TILINGS, "device_class", lambda x: plan.device_class)
    monkeypatch.setattr(launch.TritonKernels, "programs", lambda self, x: plan.programs)
    problem = cost.problem(case, d, "meta")
    vector = problem.vectors.row_scale
    incoming = sweep.Incoming(vector, vector, vector, vector, None if case.members else vector)
    basis = problem.y if case.members else problem.y[:, None]
    needs = [True, case.vectors > 1, True, case.members > 0, False, False]
    if cost.takes_attention(case, d):
        _, kept = sweep.attention(cost.KERNELS, problem)
        sweep.multiples(problem, vector, vector, vector, kept, needs)
    else:
        sweep.forward(cost.KERNELS, problem, True, not (case.mirrored or case.frozen))
        sweep.backward(cost.KERNELS, problem, basis, incoming, needs)

    phases = cost.ours(d, device, case)
    assert {phase.programs for phase in phases if phase.name == "attention"} == {*launched["attention"].programs}
    modelled = Counter()
    for phase in phases:
        modelled[phase.name.partition(",")[0]] += phase.launches
    statistics = modelled["forward"] + modelled["attention"] + modelled["statistics"]
    names = ("forward", "attention", "excluded", "merge")
    assert statistics == sum(len(launched[name].programs) for name in names)
    assert modelled["coefficients"] == len(launched["block"].programs)
    assert modelled["rows"] == len(launched["rows"].programs)
    assert modelled["product"] == sum(products.values()) + len(launched["product"].programs)
    assert modelled["sums"] == 2 * len(sums)  # a sum, and its addition
    if launched["forward"].programs and not case.mirrored:  # whose programs below the diagonal have nothing to do
        assert {phases[0].programs} == {*launched["forward"].programs}
    assert {phase.programs for phase in phases[1:] if phase.name in ("coefficients", "rows")} == {
        *launched["block"].programs,
        *launched["rows"].programs,
    }
    if case.groups > 1:
        of_products = {phase.programs for phase in phases if phase.name.startswith("product")}
        assert (of_products, products) == ({*launched["product"].programs}, Counter())
        return
    flops = sum(2 * math.prod(shape) * count for shape, count in products.items())
    assert flops == sum(phase.flops for phase in phases if phase.name.startswith("product"))


@pytest.mark.parametrize("device", cost.DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize(
    ("phases", "d", "products"),
    [
        (cost.ours, 768, 8),
        (cost.ours, 128, 10),
        (functools.partial(cost.ours, case=cost.FROZEN), 128, 4),
        (functools.partial(cost.ours, case=cost.FROZEN), 768, 6),
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
