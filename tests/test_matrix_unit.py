"""Products on the matrix unit: float32 is a sum of three bfloat16, float16 of two, and what is none goes another way.

Everything else of the unit is in the tests of the ops, which take it wherever the machine has one.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tolerance import assert_accurate

import contrastive_ops as co
from contrastive_ops import build


@pytest.fixture(autouse=True)
def _needs_the_unit() -> None:
    if build.extension is None:
        pytest.skip(f"no C++ engine: {build.missing}")
    if build.extension.bfloat16_unit() != "matrix":
        pytest.skip("this processor has no matrix unit (AMX), or CONTRASTIVE_OPS_BFLOAT16_UNIT leaves it alone")


def dots(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """<x_i, y_i>: the logits of the excluded pairs, as the engine makes them."""
    return co.similarity_logsumexp(x, y, exclude=torch.arange(len(x))).excluded_logit


def unit_vectors(count: int, features: int, column: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.eye(features, dtype=dtype)[column].repeat(count, 1)


def test_every_bit_of_a_float32_passes():
    """A product with 1 is the value itself, bit for bit: no part of either side is lost, at no place of a fragment."""
    torch.manual_seed(0)
    values = (1 + torch.rand(150, 70)) * torch.randint(-1, 2, (150, 70)) * 2.0 ** torch.randint(-40, 100, (150, 1))
    for column in range(values.shape[1]):
        ones = unit_vectors(*values.shape, column)
        assert torch.equal(dots(values, ones), values[:, column]), column
        assert torch.equal(dots(ones, values), values[:, column]), column


def test_products_of_all_parts():
    """One product each: an error above that of float32 is that of a product of parts which is not taken."""
    torch.manual_seed(0)
    x, y = (1 + torch.rand(2, 4000, 1)).unbind()
    truth = x.double() * y.double()
    error = (dots(x, y).double() - truth[:, 0]) / truth[:, 0]
    assert error.abs().max() < 2.0**-23


def test_products_of_float16_are_exact():
    """Of every finite value; all four products of its parts are taken, and float32 holds their sum."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    x = values[values.isfinite()].unsqueeze(1)
    y = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    got = torch.cat([dots(*pair) for pair in zip(x.split(1024), y.split(1024), strict=True)])
    assert torch.equal(got, (x.float() * y.float())[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [1e-39, 1.3e-36, 3.4e38, float("inf"), float("nan")])
def test_values_without_parts(value, dtype):
    """Their lowest part would be below the normal numbers, or the highest beyond them: no such value loses a digit."""
    x = torch.zeros(3, 40, dtype=dtype)
    x[1, 5] = value
    x[2, 5] = 1 / 3
    got = dots(x, unit_vectors(3, 40, 5, dtype))
    torch.testing.assert_close(got, x[:, 5].float(), rtol=0, atol=0, equal_nan=True)


def test_tiny_values_beside_large_ones():
    """What activations leave of -12, or a softmax: such a value counts for nothing, and sends nobody another way."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 30, 33).unbind()
    x[:, ::2] *= 1e-38
    y[:, ::3] *= 1e-33
    truth = (x.double() * y.double()).sum(1)
    assert_accurate(dots(x, y), truth, what="dots")


@pytest.mark.parametrize("exponents", [(-118, 0), (0, -118), (-60, -60), (-48, -48)])
def test_gradients_of_tiny_features(exponents):
    """Where parts, or products of parts, would be below the normal numbers, and at the edge of what the unit takes."""
    torch.manual_seed(0)
    features = [torch.randn(40, 33) * 2.0 ** exponents[0], torch.randn(30, 33) * 2.0 ** exponents[1]]

    def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        x, y = (value.to(dtype).requires_grad_() for value in features)
        backend = "cpu" if dtype == torch.float32 else "reference"
        out = co.similarity_logsumexp(x, y, row_scale=2.0 ** -sum(exponents), backend=backend)
        return torch.autograd.grad(out.row_lse.sum() * 2.0**-60, (x, y))

    for name, got, truth in zip("xy", gradients(torch.float32), gradients(torch.float64), strict=True):
        assert_accurate(got, truth, what=f"gradient of {name}", logits=64)


def unit_with(value: str) -> subprocess.CompletedProcess[str]:
    code = "from contrastive_ops import build; print(build.extension.bfloat16_unit())"
    environment = os.environ | {"CONTRASTIVE_OPS_BFLOAT16_UNIT": value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_environment_leaves_it_alone():
    for value in ("none", "vectors", "matrix"):
        assert unit_with(value).stdout.strip() == value
    assert "must be none, vectors or matrix, got 0" in unit_with("0").stderr
