"""Trust at first use: "auto" takes an engine of a GPU once it agrees with `tiled` there.

A driver, a compiler or a card that nobody has tried can make a kernel fail or, worse, give wrong numbers. So before the
first use of an engine for an op, on a device, with a dtype, small problems run forward and backward: by the engine, and
by `tiled` in float64 on the same device. What they say is kept as long as the process lives.

Modes, transforms, autocast, inference mode, the default device and the current stream belong to a thread, so the check
has one of its own: it has real tensors while the caller is traced, and changes nothing of the caller's. Its random
numbers are its own, too.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.backends import tiled
from contrastive_ops.backends import tuples as tuple_basis
from contrastive_ops.dtypes import statistics_dtype

VARIABLE = "CONTRASTIVE_OPS_SELF_CHECK"
# Errors allowed in units of |truth| + rms(truth), by the dtype of the result: 8 units in the last place of 16 bits, 64
# of more, as a GPU approximates exponentials. A kernel that is wrong is off by far more.
BANDS = {torch.float64: 2.0**-46, torch.float32: 2.0**-17, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}
TF32_BAND = 2.0**-7  # of float32 results where the user allows TF32


class Use(NamedTuple):
    """What is checked once."""

    engine: str
    op: str
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op} of {checks.names([self.dtype])} on {self.device}"


class Standing(NamedTuple):
    """What is known of a use."""

    sentence: str
    trusted: bool | None = None  # False: found wrong, None: nothing is known yet


AGREES = Standing("checked: agrees with tiled", trusted=True)
SKIPPED = Standing(f"not checked ({VARIABLE}=0)", trusted=True)

_lock = threading.Lock()
_verdicts: dict[Use, Standing] = {}
_warned: set[Use] = set()
_lost: dict[torch.device, str] = {}  # devices on which nothing runs any more, and why


def checked_on(device: torch.device) -> bool:
    """Whether engines are checked there: on GPUs, which are "cuda" under HIP, too."""
    return device.type == "cuda"


def first_trusted(
    op: str, names: Sequence[str], modules: Mapping[str, ModuleType], device: torch.device, dtype: torch.dtype
) -> str | None:
    """The first of the backends that is `tiled` or agrees with it, checked now if need be; None if there is none.

    Of engines that turn out not to agree there is one warning.
    """
    chosen = None
    wrong = {}
    with _lock:  # others wait for the verdict
        for name in names:
            use = _with_index(Use(name, op, device, dtype))
            known = AGREES if modules[name] is tiled else _checked(use, modules[name])
            if known.trusted:
                chosen = name
                break
            if known.trusted is False and use not in _warned:
                wrong[use] = f"{name} was {known.sentence}"
        _warned.update(wrong)
    if wrong:
        warnings.warn(
            f"{' '.join(wrong.values())} {chosen or 'Nothing'} runs instead; backend= takes an engine by its name "
            "all the same.",
            RuntimeWarning,
            stacklevel=2,
        )
    return chosen


def checked(use: Use, module: ModuleType) -> Standing:
    """What is known of a use, checked now if need be."""
    with _lock:
        return _checked(_with_index(use), module)


def standing(use: Use) -> Standing:
    """What is known of a use so far."""
    use = _with_index(use)
    if not _enabled():
        return SKIPPED
    if use in _verdicts:
        return _verdicts[use]
    return Standing("not checked yet" if _present(use.device) else f"not checked: torch finds no {use.device} here.")


def _checked(use: Use, module: ModuleType) -> Standing:
    if use.device in _lost:
        raise RuntimeError(_lost[use.device])
    known = standing(use)
    if known.trusted is not None or not _present(use.device):  # of fake tensors the device may be elsewhere
        return known
    if _capturing(use.device):
        raise RuntimeError(
            f"{use.engine} must be checked before its first {use}, and a CUDA graph is being captured, in which no "
            "check can run; warm up: run the step once before the capture, or name a backend."
        )
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(_difference, use, module).result()
    _verdicts[use] = AGREES if found is None else Standing(f"checked with {use}: {found}", trusted=False)
    return _verdicts[use]


def _enabled() -> bool:
    value = os.environ.get(VARIABLE, "1")
    checks.choice(VARIABLE, value, ("0", "1"))
    return value == "1"


def _with_index(use: Use) -> Use:
    """Fake tensors may be on "cuda", whichever that is."""
    if use.device.type != "cuda" or use.device.index is not None or not torch.cuda.is_available():
        return use
    return use._replace(device=torch.device("cuda", torch.cuda.current_device()))


def _present(device: torch.device) -> bool:
    return device.type != "cuda" or (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count())


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _works(device: torch.device) -> bool:
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


def _difference(use: Use, module: ModuleType) -> str | None:
    """The first difference of the engine's results from those of `tiled`, as a sentence."""
    if use.device.type == "cuda":
        torch.cuda.set_device(use.device)
    for arguments, needs in _PROBLEMS[use.op](_Maker(use.device, use.dtype)):
        exact = [value.double() if _is_floating(value) else value for value in arguments]
        truth = _run(tiled, use.op, exact, needs)
        for _ in range(2):  # what one run leaves behind may harm the next
            try:
                results = _run(module, use.op, arguments, needs)
            except torch.OutOfMemoryError:
                raise  # says nothing of the engine
            except Exception as error:
                raised = f"{type(error).__name__}: {' '.join(str(error).split())}"
                if _works(use.device):
                    return f"it raised {raised[:300]}."
                _lost[use.device] = (
                    f"the check of {use.engine} for {use} left the device unusable for this process ({raised[:300]}): "
                    f"not even tiled runs there any more. Start again with CONTRASTIVE_OPS_BACKEND=tiled."
                )
                raise RuntimeError(_lost[use.device]) from error
            for name, value in results.items():
                sentence = _judge(name, value, truth[name])
                if sentence is not None:
                    return sentence
    return None


def _judge(name: str, value: Tensor, truth: Tensor) -> str | None:
    """The sentence that says where a result is out of its band; None when it isn't."""
    if value.shape != truth.shape:
        return f"{name} has shape {checks.shape(value)}, that of tiled {checks.shape(truth)}."
    if truth.numel() == 0:
        return None
    band = TF32_BAND if value.dtype == torch.float32 and _allows_tf32() else BANDS[value.dtype]
    finite = truth.isfinite()
    plain = truth.where(finite, 0.0)
    allowed = band * (plain.abs() + (plain.square().sum() / finite.sum().clamp(min=1)).sqrt())
    error = (value.double() - truth).abs()
    # infinities have to be the same; a comparison with NaN is false
    out = ~torch.where(finite, error <= allowed, value == truth)
    if not out.any():
        return None
    worst = error.where(out, 0.0).nan_to_num(torch.inf, posinf=torch.inf).argmax()
    index = [int(i) for i in torch.unravel_index(worst, truth.shape)]
    return (
        f"{name} at {index} is {value.flatten()[worst].item():.6g}, that of tiled {truth.flatten()[worst].item():.6g} "
        f"(allowed error {allowed.flatten()[worst].item():.2g}); {int(out.sum())} of {out.numel()} elements are out."
    )


def _allows_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class _Sweep(NamedTuple):
    """Of an op that is a sweep, the names of what forward gives, but for what is kept, and of what has gradients."""

    statistics: tuple[str, ...]
    others: tuple[str, ...]
    results: tuple[str, ...]
    inputs: tuple[str, ...]
    saved: tuple[str, ...] = ()  # results that backward reads


_LSE = ("row_lse", "col_lse")
_LSE_STATISTICS = ("row_max", "col_max", "row_log_sum", "col_log_sum")
_PAIR_INPUTS = ("x", "y", "row_scale", "col_scale", "row_bias", "col_bias")
_TEACHER_INPUTS = ("u", "v", *(f"teacher_{name}" for name in _PAIR_INPUTS[2:]))
_MEANS = ("row_mean", "col_mean")
_SWEEPS = {
    "similarity_logsumexp": _Sweep(_LSE_STATISTICS, ("excluded_logit",), _LSE, _PAIR_INPUTS),
    "similarity_sum": _Sweep((), ("excluded_logit",), ("row_sum", "col_sum"), _PAIR_INPUTS),
    "similarity_expectation": _Sweep(
        (*_LSE_STATISTICS, *(f"teacher_{name}" for name in _LSE_STATISTICS)),
        (), (*_MEANS, *_LSE), (*_PAIR_INPUTS, *_TEACHER_INPUTS), _MEANS,
    ),
    "volume_logsumexp": _Sweep(
        _LSE_STATISTICS, ("row_total", "col_total"), _LSE, ("anchor", "tuples", "row_scale", "col_scale")
    ),
}  # fmt: skip


def _run(module: ModuleType, op: str, arguments: Sequence[Any], needs: list[bool]) -> dict[str, Tensor]:
    """Results and gradients of the op by a backend, on the CPU: what a launch did is known once they are there."""
    if op == "gramian_volume":
        results = _run_gramian_volume(module, *arguments)
    elif op == "similarity_topk":
        values, indices = module.similarity_topk_forward(*arguments)
        results = {"values": values, "indices": indices.to(values.dtype)}
    else:
        results = _run_sweep(module, op, arguments, needs)
    return {name: result.cpu() for name, result in results.items()}


def _run_sweep(module: ModuleType, op: str, arguments: Sequence[Any], needs: list[bool]) -> dict[str, Tensor]:
    names = _SWEEPS[op]
    given = (*names.statistics, "kept", *names.others, *names.results)
    outputs = dict(zip(given, getattr(module, f"{op}_forward")(*arguments, needs), strict=True))
    results = {name: outputs[name] for name in (*names.results, *names.others)}
    # totals grow with the problem: their gradients would drown those of the log-sum-exps
    weights = [2.0**-8 if name.endswith("total") else 1.0 for name in results]
    incoming = [weight * _incoming(result) for weight, result in zip(weights, results.values(), strict=True)]
    known = [outputs[name] for name in (*names.statistics, "kept", *names.saved)]
    gradients = getattr(module, f"{op}_backward")(*incoming, *known, *arguments, needs)
    # what backward and a loss's own numbers are made of
    results |= {name: outputs[name] for name in names.statistics if name.endswith("max")}
    return results | {
        f"the gradient of {name}": gradient
        for name, gradient, need in zip(names.inputs, gradients, needs, strict=True)
        if need
    }


def _run_gramian_volume(module: ModuleType, vectors: Tensor) -> dict[str, Tensor]:
    factor, volume_gradient = (
        getattr(module, function, getattr(tuple_basis, function)) for function in ("factor", "volume_gradient")
    )
    basis = factor(vectors)
    volume = basis.volume.to(statistics_dtype(vectors))
    gradient = volume_gradient(vectors, basis.inverse, _incoming(volume) * volume)
    return {"the volume": volume, "the gradient of the vectors": gradient}


def _incoming(result: Tensor) -> Tensor:
    """A gradient of both signs, the same in every dtype."""
    index = torch.arange(result.numel(), dtype=torch.int64, device=result.device)
    return ((index * 5 % 17 - 8) / 8).to(result.dtype).view(result.shape)


class _Maker:
    """Inputs that are the same in every process."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator("cpu").manual_seed(0)

    def features(self, *shape: int) -> Tensor:
        """Of few bits: their dot products are exact in every dtype, in TF32, and in the order of any kernel."""
        return (self.integers(-8, 9, *shape) / 8).to(self.dtype)

    def vector(self, size: int, about: float) -> Tensor:
        return (about + self.integers(-8, 9, size) * 0.02).to(statistics_dtype(torch.empty(0, dtype=self.dtype)))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        values = torch.randint(low, high, shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return values.to(self.device)

    def indices(self, low: int, high: int, size: int) -> Tensor:
        return self.integers(low, high, size).long()


_Problem = tuple[list[Any], list[bool]]  # the arguments of the op without `needs`, and these


NO_GUIDE = (None, None, None, None)


def _similarities(make: _Maker) -> Iterator[_Problem]:
    """More than one tile of each side, sizes that no tile divides; together they launch every kernel of an engine."""
    n, m, d = 131, 150, 37
    x, y = make.features(n, d), make.features(m, d)
    vectors = [make.vector(n, 0.7), make.vector(m, -0.8), make.vector(n, 0.0), make.vector(m, 0.3)]
    exclude = make.indices(-1, m, n)
    options = [x, y, *vectors, exclude, None, None]
    # both sides; then rows alone with columns that are frozen, whose gradients forward may have
    yield [*options, *NO_GUIDE, False, False, True, True], [True] * 6
    yield [*options, *NO_GUIDE, False, False, True, False], [True, False] * 3
    # more features, in whole vectors, and in self-similarity only pairs of equal ids; the last row has no pair
    x, ids = make.features(n, 272), make.indices(0, 7, n)
    exclude = make.indices(-1, n, n)
    ids[-1], exclude[-1] = 7, n - 1
    scale, bias = make.vector(n, 0.3), make.vector(n, 0.0)
    yield [x, None, scale, None, bias, None, exclude, ids, None, *NO_GUIDE, True, False, True, False], [True, False] * 3
    # a guide of its own
    yield [*options, *_guide(make, n, m), False, False, True, True], [True] * 6


def _guide(make: _Maker, n: int, m: int) -> tuple[Tensor, ...]:
    """No guide is at a ceiling: its products are whole multiples of 1/64, and the ceilings lie between these."""
    ceilings = (make.vector(size, 0.0).mul_(50.0).round_().add_(0.5).div_(64.0) for size in (n, m))
    return make.features(n, 24), make.features(m, 24), *ceilings


def _sums(make: _Maker) -> Iterator[_Problem]:
    n, m, d = 131, 150, 37
    x, y = make.features(n, d), make.features(m, d)
    vectors = [make.vector(n, 0.7), make.vector(m, -0.8), make.vector(n, 0.0), make.vector(m, 0.3)]
    options = [x, y, *vectors, make.indices(-1, m, n), None, None]
    yield [*options, *_guide(make, n, m), False, True, True, True, "softplus"], [True] * 6
    yield [*options, *NO_GUIDE, False, False, True, False, "sigmoid"], [True, False] * 3
    x, ids = make.features(n, 272), make.indices(0, 7, n)
    scale = make.vector(n, 0.3)
    yield [
        x, None, scale, *[None] * 4, ids, None, *NO_GUIDE, False, False, True, False, "square"
    ], [True, False, True, False, False, False]  # fmt: skip


def _expectations(make: _Maker) -> Iterator[_Problem]:
    n, m, d = 131, 150, 37
    x, y, u, v = make.features(n, d), make.features(m, d), make.features(n, 24), make.features(m, 24)
    vectors = [make.vector(n, 0.7), make.vector(m, -0.8), make.vector(n, 0.0), make.vector(m, 0.3)]
    teacher = [make.vector(n, 0.5), make.vector(m, 0.9), make.vector(n, 0.2), make.vector(m, 0.0)]
    exclude = make.indices(-1, m, n)
    yield [x, y, *vectors, u, v, *teacher, exclude, None, None, False, True, True], [True] * 12
    x, ids, scale = make.features(n, 272), make.indices(0, 7, n), make.vector(n, 0.3)
    needs = [True, False, True, *[False] * 9]
    yield [x, None, scale, *[None] * 10, ids, None, True, True, False], needs


def _best(make: _Maker) -> Iterator[_Problem]:
    """Logits that every dtype has as they are, and that tie."""
    # the second more than registers hold
    for n, m, d, k, largest, noise in ((131, 150, 37, 5, True, 7), (20, 300, 272, 300, False, None)):
        x, y, ids = make.features(n, d), make.features(m, d), (make.indices(0, 7, n), make.indices(0, 7, m))
        yield [x, y, *[None] * 4, make.indices(-1, m, n), *ids, False, k, largest, noise], []


def _volumes(make: _Maker) -> Iterator[_Problem]:
    n, m = 131, 150
    for members, d in ((2, 37), (3, 64)):
        anchor, tuples = make.features(n, d) / 4, make.features(m, members, d) / 4
        scales = [make.vector(n, 1.5), make.vector(m, 1.2)]
        yield [anchor, tuples, *scales, make.indices(-1, m, n), True, True, True], [True] * 4


def _sets(make: _Maker) -> Iterator[_Problem]:
    for members, d in ((2, 37), (5, 64)):
        vectors = make.features(150, members, d)
        vectors[0, 1] = vectors[0, 0]  # a volume of 0
        yield [vectors], []


_PROBLEMS = {
    "similarity_logsumexp": _similarities,
    "similarity_sum": _sums,
    "similarity_expectation": _expectations,
    "similarity_topk": _best,
    "volume_logsumexp": _volumes,
    "gramian_volume": _sets,
}
