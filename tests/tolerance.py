"""The one comparison of the suite: a result against the float64 truth, beside the error of dense PyTorch.

    |candidate - truth|_i  <=  unit_i * max(L eps, 2 * worst_k |dense - truth|_k / unit_k)
    unit_i = |truth_i| + rms(truth)

Element-wise, with eps of the candidate's dtype. Errors are counted in units of the element and of its tensor, because
an element that cancels to almost 0 has the rounding errors of its terms, in every implementation. The dense error is
the worst over the tensor and over a few roundings of the problem (features in another order, inputs moved by up to two
units in their last place), because in one run and at one element it may be 0 by luck. L is the size of the logits, 8
where a test says nothing else: a log-sum-exp of 8 is stored to within 4 eps, a logit of 8 too, and exp(s - lse) has
both as its relative error, where dense PyTorch divides by a sum. For float64 the band is twice that: the truth is
rounded as much.

For float16 and bfloat16 inputs nothing is given away: the inputs are exact, statistics are float32, so "dense" is dense
float32 on the same rounded inputs; only gradients that are returned in the input's dtype are judged with its eps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LOGITS = 8.0
DENSE_FACTOR = 2.0
ROUNDINGS = 4
# a case in which dense PyTorch itself is off by this much of a unit says nothing about the candidate
JUDGEABLE = 0.02


def assert_accurate(
    candidate: Tensor, truth: Tensor, dense: Sequence[Tensor] = (), what: str = "value", logits: float = LOGITS
) -> None:
    """Raise AssertionError with the worst element if `candidate` breaks the rule above.

    `dense` are results of dense PyTorch in the candidate's dtype, in several roundings; without them only the band of
    L eps counts. Where the truth is infinite or NaN the candidate must be the same.
    """
    assert truth.dtype == torch.float64, "the truth must be float64"
    assert candidate.shape == truth.shape, f"{what}: shape {tuple(candidate.shape)}, expected {tuple(truth.shape)}"
    value = candidate.detach().double()
    if truth.numel() == 0:
        return
    finite = truth.isfinite()
    special = ~finite & ~((value == truth) | (value.isnan() & truth.isnan()))
    if special.any():
        index = tuple(special.nonzero()[0].tolist())
        raise AssertionError(f"{what}[{index}]: candidate {value[index].item()}, truth {truth[index].item()}")
    if not finite.any():
        return
    plain = truth.where(finite, 0.0)
    unit = plain.abs() + (plain.square().sum() / finite.sum()).sqrt()
    eps = torch.finfo(candidate.dtype).eps
    ratios = [_ratio(result.detach().double(), truth, finite, unit).nan_to_num(0.0, posinf=0.0) for result in dense]
    worst_dense = max((ratio.max().item() for ratio in ratios), default=0.0)
    if eps < JUDGEABLE / DENSE_FACTOR:
        assert worst_dense < JUDGEABLE, f"{what}: dense PyTorch is off by {worst_dense:.3g} units, choose another case"
    band = logits * eps * (2.0 if candidate.dtype == torch.float64 else 1.0)  # there the truth is rounded as much
    allowed = max(band, DENSE_FACTOR * worst_dense)
    ratio = _ratio(value, truth, finite, unit).nan_to_num(torch.inf, posinf=torch.inf)
    bad = ratio > allowed
    if bad.any():
        index = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
        dense_value = dense[0].detach().double()[index].item() if dense else None
        raise AssertionError(
            f"{what}[{index}]: candidate {value[index].item()!r}, truth {truth[index].item()!r}, "
            f"dense {dense_value!r}; "
            f"error {ratio[index].item():.3g} units, allowed {allowed:.3g} = max(band {band:.3g}, "
            f"{DENSE_FACTOR:g} x dense {worst_dense:.3g}), ratio {ratio[index].item() / allowed:.3g}; "
            f"{int(bad.sum())} of {bad.numel()} elements are out"
        )


def _ratio(value: Tensor, truth: Tensor, finite: Tensor, unit: Tensor) -> Tensor:
    """Errors in units, 0 where the truth isn't finite; exact zeros among zeros are 0, not 0 / 0."""
    error = (value - truth).abs().where(finite, 0.0)
    return torch.where(error == 0.0, 0.0, error / unit)


def evaluate(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    options: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    rounding: int | None = None,
    exact: bool = False,
) -> dict[str, Tensor]:
    """Every output of the function, and the gradient of every input that requires one, for fixed random cotangents.

    dtype casts the floating-point inputs inside the graph (gradients come back in the input's dtype), or before it with
    `exact` (gradients come back in that dtype). A number for `rounding` permutes the features and moves every input by
    up to two units in its last place: the same problem for all that its dtype can tell, in other roundings.
    """
    named = {**{f"argument{i}": value for i, value in enumerate(arguments)}, **options}
    leaves: dict[str, Tensor] = {}
    prepared: dict[str, Any] = {}
    for name, value in named.items():
        prepared[name] = value
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if exact:
            value = value.detach().to(dtype).requires_grad_(value.requires_grad)
        if value.requires_grad:
            leaves[name] = value
        if dtype is not None:
            value = value.to(dtype)
        if rounding is not None:
            value = _otherwise_rounded(value, rounding)
        prepared[name] = value
    positional = [prepared.pop(f"argument{i}") for i in range(len(arguments))]
    outputs = function(*positional, **prepared)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    results = {f"output{i}": output.detach().cpu() for i, output in enumerate(outputs)}
    differentiable = [output for output in outputs if output.requires_grad]
    if leaves and differentiable:
        generator = torch.Generator().manual_seed(7)
        # both signs: a backward that takes the logarithm of its weights must fail
        cotangents = [torch.randn(output.shape, generator=generator).to(output) for output in differentiable]
        grads = torch.autograd.grad(differentiable, list(leaves.values()), cotangents, materialize_grads=True)
        results |= {f"grad of {name}": grad.cpu() for name, grad in zip(leaves, grads, strict=True)}
    return results


def judge(
    fused: Callable[..., Any],
    naive: Callable[..., Any],
    arguments: Sequence[Any],
    options: dict[str, Any] | None = None,
    *,
    fused_options: dict[str, Any] | None = None,
    logits: float = LOGITS,
    roundings: int = ROUNDINGS,
) -> None:
    """Hold every output and every gradient of `fused` to the rule, with `naive` as the truth and as the dense rival."""
    options = options or {}
    candidate = evaluate(fused, arguments, {**options, **(fused_options or {})})
    truth = evaluate(naive, arguments, options, dtype=torch.float64, exact=True)
    statistics = torch.float64 if arguments[0].dtype == torch.float64 else torch.float32
    dense = [evaluate(naive, arguments, options, dtype=statistics, rounding=k) for k in (None, *range(roundings))]
    assert candidate.keys() == truth.keys(), f"{candidate.keys()} != {truth.keys()}"
    for name, value in candidate.items():
        assert value.dtype == dense[0][name].dtype, f"{name}: {value.dtype}, expected {dense[0][name].dtype}"
        assert_accurate(value, truth[name], [results[name] for results in dense], name, logits)


def _otherwise_rounded(value: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if value.dim() >= 2:
        value = value.index_select(-1, torch.randperm(value.shape[-1], generator=generator))
    noise = 4.0 * torch.rand(value.shape, generator=generator, dtype=value.dtype) - 2.0
    return value * (1.0 + torch.finfo(value.dtype).eps * noise)
