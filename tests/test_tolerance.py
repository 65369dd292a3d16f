"""The comparison must fail on planted errors, at the place of the error, and pass what is right."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_accurate, evaluate, judge


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rounding_once_passes(dtype):
    truth = torch.randn(100, dtype=torch.float64)
    assert_accurate(truth.to(dtype), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_wrong_element_fails_and_is_named(dtype):
    truth = torch.linspace(0.5, 1.5, 40, dtype=torch.float64).reshape(5, 8)
    candidate = truth.to(dtype, copy=True)
    # 10 eps of a unit of about 2: just over the band of 8 eps, and of twice that for float64
    candidate[3, 2] += (40 if dtype == torch.float64 else 20) * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"grad\[\(3, 2\)\]: candidate .*, truth .*, dense None; .* ratio") as info:
        assert_accurate(candidate, truth, what="grad")
    assert "1 of 40 elements are out" in str(info.value)


def test_small_element_is_judged_in_units_of_its_tensor():
    truth = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    assert_accurate(torch.tensor([1.0, 1e-9 + 1e-7]), truth)
    with pytest.raises(AssertionError, match=r"value\[\(1,\)\]"):
        assert_accurate(torch.tensor([1.0, 1e-9 + 1e-6]), truth)


def test_tiny_tensor_is_judged_relatively():
    truth = torch.full((4,), 1e-12, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"candidate 0\.0,"):
        assert_accurate(torch.zeros(4), truth)


def test_twice_the_dense_error_passes_and_three_times_fails():
    truth = torch.ones(10, dtype=torch.float64)
    dense = truth.float()
    dense[4] += 1e-4
    candidate = truth.float()
    candidate[7] += 1.9e-4
    assert_accurate(candidate, truth, [dense])
    candidate[7] += 1.1e-4
    with pytest.raises(AssertionError, match=r"\[\(7,\)\]"):
        assert_accurate(candidate, truth, [dense])


def test_broken_dense_result_allows_nothing():
    truth = torch.ones(3, dtype=torch.float64)
    broken = torch.tensor([torch.nan, torch.inf, 1.0])
    with pytest.raises(AssertionError, match=r"\[\(2,\)\]"):
        assert_accurate(torch.tensor([1.0, 1.0, 1.001]), truth, [broken])
    with pytest.raises(AssertionError, match="choose another case"):
        assert_accurate(truth.float(), truth, [torch.tensor([1.0, 1.0, 1.2])])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_must_agree(value):
    truth = torch.tensor([1.0, value], dtype=torch.float64)
    assert_accurate(truth.float(), truth)
    with pytest.raises(AssertionError, match=r"\[\(1,\)\]: candidate 2.0"):
        assert_accurate(torch.tensor([1.0, 2.0]), truth)
    with pytest.raises(AssertionError, match=r"\[\(1,\)\]"):
        assert_accurate(truth.float(), torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_zeros_must_be_zeros():
    zeros = torch.zeros(3, dtype=torch.float64)
    assert_accurate(zeros.float(), zeros)
    with pytest.raises(AssertionError, match="candidate 1e-30"):
        assert_accurate(torch.tensor([0.0, 0.0, 1e-30], dtype=torch.float64), zeros)


def test_shape_and_dtype_must_agree():
    truth = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(torch.ones(3, 1), truth)
    with pytest.raises(AssertionError, match=r"torch\.float64, expected torch\.float32"):
        judge(lambda x: x.sum(1).double(), lambda x: x.sum(1), (torch.ones(3, 2, requires_grad=True),), {})


def product(x, y, scale=1.0):
    return scale * (x @ y.T)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, y, scale: product(x, y, scale) + 1e-4,
        lambda x, y, scale: product(x, y.detach(), scale),
        lambda x, y, scale: product(x, y, scale.detach()),
        lambda x, y, scale: product(x, y, scale).abs(),
        lambda x, y, scale: product(x.bfloat16().float(), y, scale),
    ],
    ids=["value", "grad of y missing", "grad of scale missing", "sign", "precision"],
)
def test_judge_finds_planted_errors(wrong):
    x, y = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    scale = torch.tensor(1.5, requires_grad=True)
    judge(product, product, (x, y), {"scale": scale})
    with pytest.raises(AssertionError, match=r"(output|grad of)"):
        judge(wrong, product, (x, y), {"scale": scale})


def test_judge_finds_a_gradient_in_half_precision_that_is_off():
    class Inflated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.float()

        @staticmethod
        def backward(ctx, grad):
            return 1.1 * grad.bfloat16()

    x = torch.randn(5, 4, dtype=torch.bfloat16, requires_grad=True)
    judge(lambda x: x.float().exp().sum(1), lambda x: x.exp().sum(1), (x,))
    with pytest.raises(AssertionError, match="grad of argument0"):
        judge(lambda x: Inflated.apply(x).exp().sum(1), lambda x: x.exp().sum(1), (x,))


def test_evaluate_returns_gradients_in_the_dtype_of_the_input():
    x = torch.randn(5, 4, dtype=torch.bfloat16, requires_grad=True)
    results = evaluate(lambda x: x.sum(1), (x,), {}, dtype=torch.float32)
    assert results["output0"].dtype == torch.float32
    assert results["grad of argument0"].dtype == torch.bfloat16
    exact = evaluate(lambda x: x.sum(1), (x,), {}, dtype=torch.float64, exact=True)
    assert exact["grad of argument0"].dtype == torch.float64
