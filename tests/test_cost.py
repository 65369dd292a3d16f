"""The page of modelled costs: it is what the kernels' constants give, and counts what each scheme computes."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="triton: not installed; pip install triton")

from bench import cost
from contrastive_ops import backends, plane
from contrastive_ops.backends import sweep


@pytest.fixture
def needs_cuda():
    """Tests of the CUDA kernels' tiles skip where these are not known, and say why."""
    sentence = cost.why_not()
    if sentence is not None:
        pytest.skip(sentence)


@pytest.fixture(params=cost.ENGINES, ids=lambda engine: engine.name)
def engine(request):
    if request.param is cost.CUDA:
        request.getfixturevalue("needs_cuda")
    return request.param


@pytest.mark.usefixtures("needs_cuda")
def test_page_is_what_is_modelled():
    committed, now = (text.splitlines() for text in (cost.PAGE.read_text(), cost.page()))
    changes = [*difflib.unified_diff(committed, now, cost.PAGE.name, "now", n=0, lineterm="")]
    if changes:
        pytest.fail("\n".join([*changes, "", f"If that is meant: {cost.COMMAND}"]), pytrace=False)


@pytest.mark.parametrize(
    ("goal", "seconds"), cost.TARGETS, ids=[f"{device.name}-{d}" for (device, d), _ in cost.TARGETS]
)
def test_bound_is_within_the_target(goal, seconds, engine):
    device, d = goal
    assert cost.bound(cost.ours(engine, d, device), device) <= seconds


def test_generator_says_why_there_is_no_page(monkeypatch):
    monkeypatch.setattr(cost, "why_not", lambda: "there is no compiler.")
    with pytest.raises(SystemExit, match=r"^there is no compiler\.$"):
        cost.main([])


class Recorder:
    """Stands in for a kernel of Triton, and keeps its programs of each launch."""

    def __init__(self):
        self.programs = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.programs.append(math.prod(grid))


def recorded(engine, monkeypatch):
    """Nothing is launched: the programs of each launch by the name of the kernel, filled as host code runs."""
    recorders = {name: Recorder() for name in ("forward", "attention", "excluded", "merge", "block", "product", "rows")}
    if engine is cost.TRITON:
        launch = backends.triton.kernels("launch")
        for name, recorder in recorders.items():
            monkeypatch.setattr(launch, f"{name}_kernel", recorder)
    else:  # the grids of csrc/cuda
        kernels = engine.kernels()
        real = kernels.operators

        def of_forward(*args):
            return math.ceil(cost.N / args[-2]), math.ceil(cost.N / args[-1])

        def of_rows(x, *args):
            return math.ceil(cost.N / real.rows_tiling(x.dtype, x.shape[1])[0]), math.ceil(cost.N / args[-1])

        def of_block(x, y, *args):
            rows, cols = real.tiling(args[3], y.shape[1] if y.dim() == 3 else 0)
            return math.ceil(args[-3] / rows), math.ceil(args[-2] / cols)

        grids = {"forward": of_forward, "attention": of_rows, "rows": of_rows, "block": of_block}
        stand_ins = {
            name: lambda *args, name=name, recorder=recorder: recorder[grids.get(name, lambda *_: ())(*args)]()
            for name, recorder in recorders.items()
        }
        stand_in = SimpleNamespace(tiling=real.tiling, rows_tiling=real.rows_tiling, **stand_ins)
        monkeypatch.setattr(kernels, "operators", stand_in)
    return {name: recorder.programs for name, recorder in recorders.items()}


@pytest.mark.parametrize("device", cost.DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize(
    ("case", "d"),
    [(case, 512) for _, case in cost.CASES if case.members <= 2]
    + [(cost.CLIP, 128), (cost.FROZEN, 128), (cost.FROZEN, 256), (cost.Case(groups=4), 512)],
    ids=str,
)
def test_launches_are_those_of_the_code(case, d, device, engine, monkeypatch):
    kernels, tilings = engine.kernels(), backends.triton.kernels("tilings")
    launched = recorded(engine, monkeypatch)
    products, sums = Counter(), []
    monkeypatch.setattr(plane, "accumulate", lambda total, a, b, begins: products.update([(*a.shape, *b.shape[1:])]))
    monkeypatch.setattr(sweep, "_add_sums", lambda totals, *of: sums.extend(t for t in totals if t is not None))
    with cost.pretending(device):
        on_device = cost.problem(case, d, "cuda").x
        programs, device_class = kernels.programs(on_device), tilings.device_class(on_device)
    monkeypatch.setattr(type(kernels), "programs", lambda self, x: programs)
    monkeypatch.setattr(tilings, "device_class", lambda x: device_class)
    problem = cost.problem(case, d, "meta")  # fake tensors of a GPU can't be indexed without one
    vector = problem.vectors.row_scale
    incoming = plane.Incoming(vector, vector, vector, vector, None if case.members else vector)
    basis = problem.y if case.members else problem.y[:, None]
    needs = [True, case.vectors > 1, True, case.members > 0, False, False]
    if cost.takes_attention(engine, case, d):
        _, kept = sweep.attention(kernels, problem)
        sweep.multiples(problem, vector, vector, vector, kept, needs)
    else:
        sweep.forward(kernels, problem, True, not (case.mirrored or case.frozen))
        sweep.backward(kernels, problem, basis, incoming, needs)

    phases = cost.ours(engine, d, device, case)
    assert {phase.programs for phase in phases if phase.name == "attention"} == {*launched["attention"]}
    modelled = Counter()
    for phase in phases:
        modelled[phase.name.partition(",")[0]] += phase.launches
    statistics = modelled["forward"] + modelled["attention"] + modelled["statistics"]
    names = ("forward", "attention", "excluded", "merge")
    assert statistics == sum(len(launched[name]) for name in names)
    assert modelled["coefficients"] == len(launched["block"])
    assert modelled["rows"] == len(launched["rows"])
    assert modelled["product"] == sum(products.values()) + len(launched["product"])
    assert modelled["sums"] == 2 * len(sums)  # a sum, and its addition
    if launched["forward"] and not case.mirrored:  # whose programs below the diagonal have nothing to do
        assert {phases[0].programs} == {*launched["forward"]}
    assert {phase.programs for phase in phases[1:] if phase.name in ("coefficients", "rows")} == {
        *launched["block"],
        *launched["rows"],
    }
    of_products = [phase for phase in phases if phase.name.startswith("product")]
    if cost.product_tile(engine, case, d, device):
        assert ({phase.programs for phase in of_products}, products) == ({*launched["product"]}, Counter())
    else:
        flops = sum(2 * math.prod(shape) * count for shape, count in products.items())
        assert (flops, launched["product"]) == (sum(phase.flops for phase in of_products), [])


@pytest.mark.parametrize("device", cost.DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize(
    ("case", "d", "products"),
    [(cost.CLIP, 768, 8), (cost.CLIP, 128, 10), (cost.FROZEN, 128, 4), (cost.FROZEN, 256, 4), (cost.FROZEN, 768, 6)],
)
def test_flops_of_ours(case, d, products, device, engine):
    assert cost.total(cost.ours(engine, d, device, case), "flops") == pytest.approx(products * cost.N**2 * d)


@pytest.mark.parametrize("device", cost.DEVICES, ids=lambda device: device.name)
def test_flops_of_groups(device, engine):
    products = {cost.TRITON: 8 / 4, cost.CUDA: 4 / 4 + 4}[engine]  # CUDA's are the vendor's, of all pairs
    flops = cost.total(cost.ours(engine, 512, device, cost.Case(groups=4)), "flops")
    assert flops == pytest.approx(products * cost.N**2 * 512)


def test_lanes():
    assert [cost.TRITON.lanes(d) for d in (1, 16, 17, 96)] == [16, 16, 32, 128]
    assert [cost.CUDA.lanes(d) for d in (1, 16, 17, 96)] == [16, 16, 32, 96]


@pytest.mark.parametrize("device", cost.DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize(
    ("phases", "d", "products"),
    [
        (cost.memeff, 512, 10),
        (cost.memeff, 768, 2 + 8 * 1024 / 768),  # lanes are a power of two
        (cost.inf_cl, 768, 20),
        (cost.liger_chunked, 768, 12),
        (cost.liger_fused, 768, 16),
        (cost.eager, 768, 12),
        (cost.siglip, 768, 6),
    ],
)
def test_flops_of_peers(phases, d, products, device):
    assert cost.total(phases(d, device), "flops") == pytest.approx(products * cost.N**2 * d)


def test_balance_and_estimate():
    assert cost.balance(0, cost.H100) == cost.balance(132, cost.H100) == cost.balance(264, cost.H100) == 1
    assert cost.balance(133, cost.H100) == pytest.approx(133 / 264)
    phase = cost.Phase("", flops=989e12, hbm=3.35e12 * 1.2, programs=66)
    assert phase.bound(cost.H100) == pytest.approx(1.2)  # HBM
    assert phase.estimate(cost.H100) == pytest.approx(2 / 0.75)  # products, on half of the multiprocessors
    by_mma_sync = cost.Phase("", flops=989e12, mma_sync=True)
    assert by_mma_sync.bound(cost.H100) == pytest.approx(1 / 0.63)
    many = [cost.Phase("", flops=1.0, launches=10**6)]
    assert cost.estimate(many, cost.H100) == pytest.approx(6.0)  # the host
