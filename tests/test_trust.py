"""Trust at first use: an engine that agrees with tiled is taken, one that lies, raises or breaks is not.

The CPU stands in for a GPU, and for an engine "planted": tiled, but for a fault.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy
import pytest
import torch
from cuda_host import build as host
from test_compile import compiled
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import contrastive_ops as co
from contrastive_ops import backends, info
from contrastive_ops.backends import cuda, sweep, tiled, trust, tuples

OPS = cuda.OPS  # those that there is an engine for
SWEPT = tuple(op for op in OPS if op in trust._SWEEPS)
X = torch.zeros(4, 3)
CPU = torch.device("cpu")
choose = partial(backends.choose, x=X, backend="auto")


class Engine(SimpleNamespace):
    """tiled as an engine, with a record of its calls; `faults` replace functions, and get the original one first."""

    def __init__(self, **faults):
        self.OPS, self.kept, self.calls = OPS, tiled.kept, []
        for name in (*(f"{op}_{way}" for op in SWEPT for way in ("forward", "backward")),
                     "factor", "volume_gradient"):  # fmt: skip
            function = getattr(tiled, name, None) or getattr(tuples, name)
            if name in faults:
                function = partial(faults[name], function)
            setattr(self, name, partial(self.call, name, function))

    def call(self, name, function, *arguments):
        self.calls.append((name, arguments))
        return function(*arguments)

    def why_not(self, op, x):
        return None if op in OPS else f"no {op}."


@pytest.fixture
def plant(monkeypatch):
    """Let "auto" on the CPU try the engines, in this order, and then tiled; nothing is checked yet."""
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    monkeypatch.setattr(trust, "_verdicts", {})
    monkeypatch.setattr(trust, "_warned", set())
    monkeypatch.setattr(trust, "_lost", {})
    monkeypatch.setattr(trust, "checked_on", lambda device: device.type == "cpu")

    def plant(**engines):
        for name, engine in engines.items():
            monkeypatch.setitem(backends._MODULES, name, engine)
        monkeypatch.setattr(backends, "AUTO_ON_GPU", (*engines, "tiled"))
        monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, *engines))
        return next(iter(engines.values()))

    return plant


def refused(op="similarity_logsumexp", x=X, instead="tiled"):
    """The one warning of an engine that is not taken; after it there is silence."""
    with pytest.warns(RuntimeWarning) as caught:
        assert backends.choose(op, x, "auto") == instead
    (warning,) = caught
    assert backends.choose(op, x, "auto") == instead
    return str(warning.message)


# what is checked, and how often


@pytest.mark.parametrize("op", OPS)
def test_an_engine_that_agrees_is_taken(op, plant):
    engine = plant(planted=Engine())
    assert choose(op) == "planted"
    assert engine.calls
    calls = len(engine.calls)
    assert choose(op) == "planted"
    assert len(engine.calls) == calls


def test_each_use_has_its_own_check(plant):
    """Of an engine, an op, a device and a dtype."""
    engine = plant(planted=Engine())
    seen = [0]
    for op in OPS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert choose(op, x=X.to(dtype)) == "planted"
            seen.append(len(engine.calls))
    assert seen == sorted(set(seen))
    dtypes = {arguments[0].dtype for name, arguments in engine.calls if name == "similarity_logsumexp_forward"}
    assert dtypes == {torch.float32, torch.float16, torch.bfloat16}


def test_problems_have_both_directions_an_exclusion_and_scales(plant):
    engine = plant(planted=Engine())
    for op in OPS:
        choose(op)
    arguments = [given for name, given in engine.calls if name == "similarity_logsumexp_forward"]
    assert {(rows, cols) for *_, rows, cols, _needs in arguments} == {(True, True), (True, False)}
    assert {y is None for _x, y, *_ in arguments} == {True, False}
    assert {restrict for *_, restrict, _above, _rows, _cols, _needs in arguments} == {True, False}
    for x, _y, row_scale, _col_scale, row_bias, _col_bias, exclude, *_ in arguments:
        assert x.shape[0] % 2 == 1
        assert (exclude >= 0).any()
        assert (exclude < 0).any()
        assert len(row_scale.unique()) > 1 < len(row_bias.unique())
    assert any(x.shape[1] % 16 == 0 for x, *_ in arguments)
    assert any(x.shape[1] % 2 == 1 for x, *_ in arguments)


def test_float64_of_an_engine_without_it_takes_the_next(plant):
    engine = plant(planted=Engine())
    engine.why_not = lambda _op, x: "no float64." if x.dtype == torch.float64 else None
    assert choose("similarity_logsumexp", x=X.double()) == "tiled"
    assert not engine.calls


def test_order_is_that_of_one_tuple():
    assert backends.order(X) == backends.AUTO == ("cpu", "tiled")
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    assert backends.order(on_gpu) == backends.AUTO_ON_GPU
    assert backends.AUTO_ON_GPU[-1] == "tiled"
    assert set(backends.AUTO_ON_GPU[:-1]) == {"triton", "cuda"}


def test_the_interpreter_of_triton_is_not_taken(monkeypatch):
    """It would be correct, and a thousand times slower."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for op in OPS:
        assert choose(op) in ("cpu", "tiled")


# faults


def changed(place, change):
    """A function one of whose results is changed: (the original, *arguments) -> results."""

    def fault(function, *arguments):
        results = list(function(*arguments))
        results[place] = change(results[place].clone())
        return tuple(results)

    return fault


def off(tensor, by=1e-3):
    """One element is off by a thousandth of the tensor's size."""
    if tensor.numel():
        finite = tensor.isfinite()
        tensor.flatten()[finite.flatten().nonzero()[-1]] += by * tensor[finite].square().mean().sqrt()
    return tensor


def nan(tensor):
    return tensor.index_fill_(0, torch.tensor([0]), torch.nan) if tensor.numel() else tensor


RESULTS = [
    (op, way, place, name)
    for op, names in ((op, trust._SWEEPS[op]) for op in SWEPT)
    for way, given in (
        ("forward", (*names.statistics, None, *names.others, *names.results)), ("backward", names.inputs)
    )
    for place, name in enumerate(given)
    if name is not None
]  # fmt: skip


@pytest.mark.parametrize("change", [off, nan])
@pytest.mark.parametrize(("op", "way", "place", "name"), RESULTS, ids=lambda value: str(value))
def test_wrong_numbers_are_found(op, way, place, name, change, plant):
    """In each result and in each gradient."""
    plant(planted=Engine(**{f"{op}_{way}": changed(place, change)}))
    message = refused(op)
    assert message.startswith(f"planted was checked with {op} of float32 on cpu: ")
    assert "(allowed error " in message
    assert " tiled runs instead" in message
    if way == "backward":
        assert f"the gradient of {name} at [" in message
    if change is nan:
        assert "is nan, that of tiled" in message


def test_wrong_volumes_of_single_sets_are_found(plant):
    def lie(function, vectors):
        inverse, volume = function(vectors)
        return tuples.Basis(inverse, off(volume.clone()))

    plant(planted=Engine(factor=lie))
    assert "the volume at [" in refused("gramian_volume")
    for change in (off, nan):
        plant(planted=Engine(volume_gradient=lambda function, *given, change=change: change(function(*given))))
        trust._verdicts.clear()
        trust._warned.clear()
        assert "the gradient of the vectors at [" in refused("gramian_volume")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wrong_gradients_of_16_bits_are_found(dtype, plant):
    by = 2.5 * trust.BANDS[dtype]
    plant(planted=Engine(similarity_logsumexp_backward=changed(0, partial(off, by=by))))
    assert "the gradient of x at [" in refused(x=X.to(dtype))


@pytest.mark.parametrize(("dtype", "by"), [(torch.float32, 1e-3), (torch.float16, 0.05), (torch.bfloat16, 0.2)])
def test_totals_do_not_drown_the_rest(dtype, by, plant):
    """The gradients of log-sum-exps alone are wrong."""

    def wrong(function, grad_row_lse, grad_col_lse, *others):
        return function(grad_row_lse * (1 + by), grad_col_lse * (1 + by), *others)

    plant(planted=Engine(volume_logsumexp_backward=wrong))
    assert "the gradient of anchor at [" in refused("volume_logsumexp", x=X.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_no_fault(dtype, plant):
    """A unit in the last place of every gradient."""

    def rounded(function, *arguments):
        return tuple(x * (1 + torch.finfo(x.dtype).eps) for x in function(*arguments))

    plant(planted=Engine(**{f"{op}_backward": rounded for op in SWEPT}))
    for op in OPS:
        assert choose(op, x=X.to(dtype)) == "planted"


def test_an_infinity_in_place_of_a_number_is_found(plant):
    plant(planted=Engine(similarity_logsumexp_backward=changed(2, lambda x: x.fill_(torch.inf))))
    assert "the gradient of row_scale at [0] is inf, that of tiled" in refused()


def test_a_number_in_place_of_minus_infinity_is_found(plant):
    plant(planted=Engine(similarity_logsumexp_forward=changed(0, lambda x: x.clamp(min=-1e9))))
    assert "row_max at [130] is -1e+09, that of tiled -inf (" in refused()


def test_a_wrong_shape_is_found(plant):
    plant(planted=Engine(similarity_logsumexp_backward=changed(0, lambda x: x[:-1])))
    assert "the gradient of x has shape (130, 37), that of tiled (131, 37)." in refused()


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("op", SWEPT)
def test_an_exception_is_found(op, way, plant):
    def fail(_function, *_arguments):
        raise ValueError("out of resource: shared memory,\n  required 1, limit 0")

    plant(planted=Engine(**{f"{op}_{way}": fail}))
    assert refused(op) == (
        f"planted was checked with {op} of float32 on cpu: it raised ValueError: out of resource: shared memory, "
        "required 1, limit 0. tiled runs instead; backend= takes an engine by its name all the same."
    )


@pytest.mark.parametrize("call", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("how", ["wrong", "raises"])
def test_what_breaks_at_a_later_call_is_found(call, how, plant):
    count = []

    def breaks(function, *arguments):
        count.append(None)
        if len(count) < call:
            return function(*arguments)
        if how == "raises":
            raise RuntimeError("no more.")
        return changed(0, off)(function, *arguments)

    plant(planted=Engine(similarity_logsumexp_backward=breaks))
    assert ("no more." if how == "raises" else "the gradient of x at [") in refused()


def test_a_wrong_engine_of_one_dtype_runs_in_the_others(plant):
    def half_wrong(function, *arguments):
        results = function(*arguments)
        return changed(0, nan)(function, *arguments) if arguments[0].dtype == torch.float16 else results

    plant(planted=Engine(similarity_logsumexp_forward=half_wrong))
    refused(x=X.half())
    assert choose("similarity_logsumexp") == "planted"
    assert choose("volume_logsumexp", x=X.half()) == "planted"


def test_the_next_engine_is_taken_if_it_agrees(plant):
    wrong = {"similarity_logsumexp_forward": changed(0, nan)}
    plant(first=Engine(**wrong), second=Engine())
    assert " second runs instead; " in refused(instead="second")
    plant(third=Engine(**wrong), fourth=Engine(**wrong))
    message = refused()
    assert "third was checked with" in message
    assert "fourth was checked with" in message
    assert " tiled runs instead; " in message


def test_a_warning_that_is_an_error_is_raised_once(plant):
    """As in every test here: the verdict stays."""
    plant(planted=Engine(similarity_logsumexp_forward=changed(0, nan)))
    with pytest.raises(RuntimeWarning, match=r"^planted was checked"):
        choose("similarity_logsumexp")
    assert choose("similarity_logsumexp") == "tiled"


def test_a_device_that_is_lost_is_said_so(plant, monkeypatch):
    """After an illegal access nothing runs on a GPU, and tiled doesn't, either."""

    def fail(_function, *_arguments):
        raise RuntimeError("an illegal memory access was encountered")

    plant(planted=Engine(similarity_logsumexp_forward=fail))
    monkeypatch.setattr(trust, "_works", lambda device: False)
    sentence = (
        r"^the check of planted for similarity_logsumexp of float32 on cpu left the device unusable for this process "
        r"\(RuntimeError: an illegal memory access was encountered\): not even tiled runs there any more\. Start again "
        r"with CONTRASTIVE_OPS_BACKEND=tiled\.$"
    )
    for op in OPS[:2]:
        with pytest.raises(RuntimeError, match=sentence):
            choose(op)
    lines = dict(info.report())
    assert "left the device unusable" in lines["auto on cpu"]


def test_works():
    assert trust._works(CPU)
    assert not trust._works(torch.device("meta"))


def test_memory_that_runs_out_says_nothing_of_an_engine(plant):
    def fail(function, *arguments):
        if len(engine.calls) == 1:
            raise torch.OutOfMemoryError("full")
        return function(*arguments)

    wrong = Engine(similarity_logsumexp_forward=changed(0, nan))
    engine = Engine(similarity_logsumexp_forward=fail)
    plant(wrong=wrong, planted=engine)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        choose("similarity_logsumexp")
    assert "wrong was checked with" in refused(instead="planted")  # not lost with the exception


# what explain and info say


def test_explain(plant):
    plant(first=Engine(similarity_logsumexp_forward=changed(0, nan)), second=Engine(), third=Engine())
    report = co.explain(X, backend="tiled")
    assert report.checks == dict.fromkeys(("first", "second", "third"), "not checked yet")
    assert report.reasons["first"] is None
    assert "  first      can run, not checked yet" in str(report).splitlines()
    with pytest.warns(RuntimeWarning, match="second runs instead"):
        report = co.explain(X)
    assert report.chosen == "second"
    sentence = report.checks["first"]
    assert sentence.startswith("checked with similarity_logsumexp of float32 on cpu: row_max at [0] is nan, that of ")
    assert report.reasons["first"] == sentence
    assert report.checks == {"first": sentence, "second": "checked: agrees with tiled", "third": "not checked yet"}
    assert report.reasons["second"] is None is report.reasons["third"]
    assert str(report).splitlines()[4:] == [
        "  tiled      can run, not needed",
        "  reference  can run, only when named",
        f"  first      only when named, {sentence}",
        "  second     chosen, checked: agrees with tiled",
        "  third      can run, not checked yet",
    ]
    assert str(co.explain(X)) == str(report)
    assert f"  first      chosen, {sentence}" in str(co.explain(X, backend="first")).splitlines()


def test_info(plant):
    engine = plant(planted=Engine(volume_logsumexp_forward=changed(0, nan)), other=Engine())
    lines = dict(info.report())
    assert lines["other on cpu"] == "can run, checked: agrees with tiled"
    assert lines["auto on cpu"] == "takes planted"
    start, *rest = lines["planted on cpu"].split("; ")
    assert start == "can run"
    assert ": checked: agrees with tiled" in rest[0]
    assert any(
        part.startswith("volume_logsumexp of float16: checked with volume_logsumexp of float16 on cpu: row_max at [0] ")
        for part in rest
    )
    calls = len(engine.calls)
    assert dict(info.report()) == lines
    assert len(engine.calls) == calls


# the environment and names


def test_the_environment_variable_skips_the_check(plant, monkeypatch):
    engine = plant(planted=Engine(similarity_logsumexp_forward=changed(0, nan)))
    monkeypatch.setenv("CONTRASTIVE_OPS_SELF_CHECK", "0")
    assert choose("similarity_logsumexp") == "planted"
    assert not engine.calls
    assert "chosen, not checked (CONTRASTIVE_OPS_SELF_CHECK=0)" in str(co.explain(X))
    monkeypatch.setenv("CONTRASTIVE_OPS_SELF_CHECK", "1")
    refused()
    monkeypatch.setenv("CONTRASTIVE_OPS_SELF_CHECK", "no")
    with pytest.raises(ValueError, match=r"^CONTRASTIVE_OPS_SELF_CHECK must be one of '0', '1', got 'no'\.$"):
        choose("similarity_logsumexp")


def test_a_named_engine_is_not_checked(plant, monkeypatch):
    engine = plant(planted=Engine(similarity_logsumexp_forward=changed(0, nan)))
    assert backends.choose("similarity_logsumexp", X, "planted") == "planted"
    monkeypatch.setenv("CONTRASTIVE_OPS_BACKEND", "planted")
    assert choose("similarity_logsumexp") == "planted"
    assert not engine.calls


# threads


@pytest.mark.parametrize("fault", [{}, {"similarity_logsumexp_forward": changed(0, nan)}], ids=["agrees", "wrong"])
@pytest.mark.filterwarnings("always::RuntimeWarning")
def test_threads_wait_for_one_check(fault, plant):
    def slow(function, *arguments):
        time.sleep(0.05)
        return fault.get("similarity_logsumexp_forward", lambda f, *a: f(*a))(function, *arguments)

    engine = plant(planted=Engine(similarity_logsumexp_forward=slow))
    barrier = threading.Barrier(8)

    def first():
        barrier.wait()
        return choose("similarity_logsumexp")

    with pytest.warns(RuntimeWarning) if fault else SimpleContext() as caught, ThreadPoolExecutor(8) as threads:
        chosen = {future.result() for future in [threads.submit(first) for _ in range(8)]}
    assert chosen == {"tiled" if fault else "planted"}
    forwards = [name for name, _ in engine.calls if name == "similarity_logsumexp_forward"]
    assert len(forwards) == (1 if fault else 8)
    assert not fault or len(caught) == 1


class SimpleContext:
    def __enter__(self):
        return []

    def __exit__(self, *_exception):
        return None


# the caller's state


class Witness(Engine):
    """Asserts that nothing of the caller reaches the check; the calls of the op itself are in the main thread."""

    def __init__(self, **faults):
        super().__init__(**faults)
        self.steps = []

    def call(self, name, function, *arguments):
        if threading.current_thread() is threading.main_thread():
            self.steps.append(name)
            return function(*arguments)
        assert all(type(value) is torch.Tensor for value in arguments if isinstance(value, torch.Tensor))
        assert not any(value.is_inference() for value in arguments if isinstance(value, torch.Tensor))
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert torch.empty(0).device == CPU
        assert not torch._C._functorch.maybe_current_level()
        assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        return super().call(name, function, *arguments)


STATES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "fake tensors": FakeTensorMode,
}


@pytest.mark.parametrize("state", list(STATES))
def test_states_of_the_caller(state, plant):
    engine = plant(planted=Witness())
    with STATES[state]():
        for op in OPS:
            before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            assert choose(op) == "planted"
            after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            assert before == after
    assert engine.calls
    assert set(trust._verdicts.values()) == {trust.AGREES}


@pytest.mark.parametrize("deterministic", [True, False])
def test_settings_of_the_process(deterministic, plant):
    plant(planted=Witness())
    torch.use_deterministic_algorithms(deterministic)
    torch.set_default_dtype(torch.float64)
    try:
        for op in OPS:
            assert choose(op) == "planted"
        assert torch.get_default_dtype() == torch.float64
        assert torch.are_deterministic_algorithms_enabled() is deterministic
    finally:
        torch.set_default_dtype(torch.float32)


def test_random_numbers_are_left_alone(plant):
    plant(planted=Engine())
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    for op in OPS:
        choose(op)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), before[2], strict=True))


@pytest.mark.parametrize("fault", ["none", "wrong", "raises"])
def test_no_tensor_stays_behind(fault, plant):
    kept = []

    def remember(function, *arguments):
        results = function(*arguments)
        kept.extend(weakref.ref(value) for value in (*arguments, *results) if isinstance(value, torch.Tensor))
        if fault == "raises":
            raise RuntimeError("broken")
        return changed(0, nan)(lambda *_: results) if fault == "wrong" else results

    engine = plant(planted=Engine(similarity_logsumexp_backward=remember))
    if fault == "none":
        choose("similarity_logsumexp")
    else:
        refused()
    engine.calls.clear()
    assert kept
    assert not [reference for reference in kept if reference() is not None]


# traces


def step(x, y, backend="auto"):
    out = co.similarity_logsumexp(x, y, cols=True, backend=backend)
    return out.row_lse.sum() + out.col_lse.sum()


def nodes(graphs):
    return [
        node.args[-1] for graph in graphs for node in graph.graph.nodes if "similarity_logsumexp" in str(node.target)
    ]


@pytest.mark.parametrize("fault", [{}, {"similarity_logsumexp_backward": changed(0, off)}], ids=["agrees", "wrong"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_first_use_in_a_compiled_step(compiler, fault, plant):
    """The verdict is asked for while Dynamo traces, with tensors of its own, and the graph has what it says."""
    engine = plant(planted=Witness(**fault))
    x, y = (value.requires_grad_() for value in torch.randn(2, 9, 5).unbind())
    run = compiled(step, compiler)
    if fault:
        with pytest.warns(RuntimeWarning, match="tiled runs instead"):
            value = run(x, y)
    else:
        value = run(x, y)
    assert engine.calls
    verdict = trust._verdicts[trust.Use("planted", "similarity_logsumexp", CPU, torch.float32)]
    assert verdict.trusted is not bool(fault)
    steps = len(engine.steps)
    assert steps == (0 if fault else 1)
    grads = torch.autograd.grad(value, (x, y))
    assert len(engine.steps) == (0 if fault else 2)
    torch.testing.assert_close(grads, torch.autograd.grad(step(x, y, "tiled"), (x, y)))
    checked = len(engine.calls)
    assert compiled(step, compiler)(x, y) == value
    assert len(engine.calls) == checked


def test_graphs_have_the_chosen_engine(plant):
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    engine = plant(planted=Witness())
    x, y = torch.randn(2, 9, 5)
    compiled(step, keep)(x, y)
    assert nodes(graphs) == ["planted"]
    calls = len(engine.calls)
    assert nodes([make_fx(lambda x, y: step(x, y))(x, y)]) == ["planted"]
    assert len(engine.calls) == calls


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_first_use_under_make_fx(mode, plant):
    plant(planted=Engine())
    assert nodes([make_fx(lambda x, y: step(x, y), tracing_mode=mode)(*torch.randn(2, 9, 5))]) == ["planted"]
    assert list(trust._verdicts.values()) == [trust.AGREES]


def test_first_use_with_fake_tensors(plant):
    engine = plant(planted=Witness())
    with FakeTensorMode() as mode:
        x, y = (mode.from_tensor(value) for value in torch.randn(2, 9, 5))
        assert isinstance(step(x, y), FakeTensor)
    assert list(trust._verdicts.values()) == [trust.AGREES]
    assert engine.calls


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_first_use_under_a_transform(transform, plant):
    plant(planted=Witness())
    y = torch.randn(9, 5)
    with torch.enable_grad():
        if transform == "grad":
            x = torch.randn(9, 5)
            assert torch.func.grad(lambda x: step(x, y))(x).shape == x.shape
        else:
            chosen = torch.func.vmap(lambda x: torch.zeros(()) if choose("similarity_logsumexp", x=x) else x)
            chosen(torch.randn(3, 9, 5))
    assert list(trust._verdicts.values()) == [trust.AGREES]


def test_first_use_in_backward_of_a_checkpoint(plant):
    """Its forward runs again, in backward; no check is asked for twice."""
    engine = plant(planted=Engine())
    x, y = (value.requires_grad_() for value in torch.randn(2, 9, 5).unbind())
    torch.utils.checkpoint.checkpoint(step, x, y, use_reentrant=False).backward()
    forwards = [name for name, _ in engine.calls if name == "similarity_logsumexp_forward"]
    assert len(forwards) == 8 + 2


# captures


def test_a_capture_without_a_verdict_raises(plant, monkeypatch):
    engine = plant(planted=Engine())
    monkeypatch.setattr(trust, "_capturing", lambda device: True)
    sentence = (
        r"^planted must be checked before its first similarity_logsumexp of float32 on cpu, and a CUDA graph is being "
        r"captured, in which no check can run; warm up: run the step once before the capture, or name a backend\.$"
    )
    for call in (lambda: choose("similarity_logsumexp"), lambda: step(torch.randn(4, 3), torch.randn(5, 3))):
        with pytest.raises(RuntimeError, match=sentence):
            call()
    assert not engine.calls
    assert backends.choose("similarity_logsumexp", X, "planted") == "planted"
    monkeypatch.setattr(trust, "_capturing", lambda device: False)
    assert choose("similarity_logsumexp") == "planted"
    monkeypatch.setattr(trust, "_capturing", lambda device: True)
    assert choose("similarity_logsumexp") == "planted"
    monkeypatch.setenv(trust.VARIABLE, "0")
    assert choose("volume_logsumexp") == "planted"


def test_capturing_asks_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert trust._capturing(torch.device("cuda", 0))
    assert not trust._capturing(CPU)


# devices


def test_a_device_that_is_not_here_is_not_checked(plant, monkeypatch):
    """Of fake tensors: nothing is known of the engines, and there is nothing to warn of."""
    plant(planted=Engine())
    monkeypatch.setattr(trust, "checked_on", lambda device: device.type == "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with FakeTensorMode():
        x = torch.empty(4, 3, device="cuda")
        assert choose("similarity_logsumexp", x=x) == "tiled"
        report = co.explain(x)
    assert report.checks["planted"] == f"not checked: torch finds no {x.device} here."
    assert not trust._verdicts


def test_a_device_without_an_index_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    use = trust.Use("planted", OPS[0], torch.device("cuda"), torch.float32)
    assert trust._with_index(use).device == torch.device("cuda", 2)
    assert [trust._present(torch.device("cuda", index)) for index in (0, 2, 3)] == [True, True, False]


# the engines themselves


@pytest.fixture
def engine(request, monkeypatch):
    """A GPU engine that runs on the CPU, its kernels, and the names of those that are launched."""
    if request.param == "triton":
        sentence = backends.why_not("triton", OPS[0], torch.empty(1, 1))
        if sentence is not None:
            pytest.skip(f"triton: {sentence}")
        module, kernels = backends.triton, backends.triton.kernels("launch").TritonKernels
    else:
        sentence = host.why_not()
        if sentence is not None:
            pytest.skip(sentence)
        torch.ops.load_library(host.backend())
        kernels = cuda.CudaKernels
        on_host = kernels("contrastive_ops_cuda_host")
        functions = sweep.functions(lambda: on_host, OPS)
        module = SimpleNamespace(OPS=OPS, factor=lambda vectors: on_host.factor(vectors), **functions)
    launched = set()
    for name in KERNELS[request.param]:
        run = getattr(kernels, name)

        def launch(*arguments, name=name, run=run):
            launched.add(name)
            return run(*arguments)

        monkeypatch.setattr(kernels, name, launch)
    return SimpleNamespace(module=module, kernels=kernels, launched=launched, names=KERNELS[request.param])


SWEEP = ("forward", "excluded", "merge", "block", "product", "rows", "attention")
KERNELS = {"triton": (*SWEEP, "topk"), "cuda-host": (*SWEEP, "factor")}
engines = pytest.mark.parametrize("engine", list(KERNELS), indirect=True)


def difference(engine, op, dtype):
    return trust._difference(trust.Use("engine", op, CPU, dtype), engine.module)


@engines
def test_the_check_launches_every_kernel_and_they_agree(engine):
    """Of 16 bits: float32 has no use for two of them."""
    for op in engine.module.OPS:
        assert difference(engine, op, torch.float16) is None
    assert engine.launched == set(engine.names)


@engines
def test_engines_agree_in_float32(engine):
    for op in engine.module.OPS:
        assert difference(engine, op, torch.float32) is None


@pytest.mark.parametrize("engine", ["cuda-host"], indirect=True)
def test_engines_agree_in_bfloat16(engine):
    for op in OPS:
        assert difference(engine, op, torch.bfloat16) is None


@pytest.mark.parametrize("kernel", KERNELS["cuda-host"])
@pytest.mark.parametrize("engine", ["cuda-host"], indirect=True)
def test_a_kernel_that_does_nothing_is_found(engine, kernel, monkeypatch):
    """One that is never launched leaves its results as they were: memory that is not written is NaN here."""
    nothing = (lambda self, vectors: tuples.Basis(*(torch.zeros_like(x) for x in tuples.factor(vectors)))) if (
        kernel == "factor") else lambda *_arguments: None  # fmt: skip
    monkeypatch.setattr(engine.kernels, kernel, nothing)
    op = "gramian_volume" if kernel == "factor" else "similarity_logsumexp"
    assert " at [" in difference(engine, op, torch.float16)
