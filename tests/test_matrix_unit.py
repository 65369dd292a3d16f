"""float32 products on the matrix unit: a sum of three bfloat16 parts is exact, and what is none goes another way.

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
    if not build.extension.matrix_unit():
        pytest.skip("this processor has no matrix unit (AMX), or CONTRASTIVE_OPS_MATRIX_UNIT=0 leaves it alone")


def logits(x: torch.Tensor, column: int, **options) -> torch.Tensor:
    """x[:, column], as dot products of its rows with a unit vector."""
    features = x.shape[1]
    unit = torch.eye(features)[column].expand(len(x), -1).contiguous()
    return co.similarity_logsumexp(x, unit, exclude=torch.zeros(len(x), dtype=torch.int64), **options).excluded_logit


@pytest.mark.parametrize("exponent", [-100, -60, -20, 0, 40, 120])
def test_every_bit_of_a_float32_passes(exponent):
    """A product with 1 is the value itself, bit for bit: no part is lost, at no place of a fragment."""
    torch.manual_seed(exponent)
    x = (1 + torch.rand(50, 70)) * torch.randint(-1, 2, (50, 70)) * 2.0**exponent
    for column in range(x.shape[1]):
        assert torch.equal(logits(x, column), x[:, column]), column


@pytest.mark.parametrize("value", [1e-39, 1.3e-36, 3.4e38, float("inf"), float("nan")])
def test_values_without_three_parts(value):
    """Their lowest part would be below the normal numbers, or the highest beyond them: no such value loses a digit."""
    x = torch.full((3, 40), 0.0)
    x[1, 5] = value
    x[2, 5] = 1 / 3
    torch.testing.assert_close(logits(x, 5), x[:, 5], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("side", ["x", "y"])
def test_gradients_of_tiny_features(side):
    """2^-118: two of the three parts would be flushed to 0."""
    torch.manual_seed(0)
    features = {"x": torch.randn(40, 33), "y": torch.randn(30, 33)}
    features[side] *= 2.0**-118

    def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        x, y = (value.to(dtype).requires_grad_() for value in features.values())
        backend = "cpu" if dtype == torch.float32 else "reference"
        out = co.similarity_logsumexp(x, y, row_scale=2.0**117, backend=backend)
        return torch.autograd.grad(out.row_lse.sum() * 2.0**-60, (x, y))

    for name, got, truth in zip("xy", gradients(torch.float32), gradients(torch.float64), strict=True):
        assert_accurate(got, truth, what=f"gradient of {name}", logits=64)


def test_the_environment_leaves_it_alone():
    code = "from contrastive_ops import build; print(build.extension.matrix_unit())"
    for value, expected in (("0", "False"), ("1", "True")):
        environment = os.environ | {"CONTRASTIVE_OPS_MATRIX_UNIT": value}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == expected
