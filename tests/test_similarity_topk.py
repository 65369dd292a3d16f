"""The k best of every row against a sort of the dense logits, their ties, their gradients and the draws by noise."""

from __future__ import annotations

import pytest
import torch
from problems import PLAIN, VECTORS, problem
from tolerance import assert_accurate, judge

import contrastive_ops as co
from contrastive_ops import noise
from contrastive_ops.dtypes import statistics_dtype
from contrastive_ops.reference import similarity_logits

OP = "similarity_topk"
DIRECTIONS = ("rows", "cols")
NAMES = [name for name in PLAIN if not name.endswith(("-cols", "low_precision_scale")) and name not in ("cols", "rows")]


def without_directions(options):
    return {key: value for key, value in options.items() if key not in DIRECTIONS}


def logits_of(*arguments, ids="exclude", **options):
    """The dense logits, -inf where a pair does not take part."""
    sizes = {"row": len(arguments[0]), "col": len(arguments[-1])}
    for name in VECTORS:
        value = options.get(name)
        if value is not None:
            dtype = statistics_dtype(arguments[0])
            options[name] = torch.as_tensor(value, dtype=dtype).reshape(-1).expand(sizes[name[:3]])
    return similarity_logits(*arguments, **options, restrict=ids == "restrict")


def best(*arguments, backend, **options):
    return co.similarity_topk(*arguments, backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize("name", NAMES)
def test_options(name, largest, backend, dtype):
    arguments, options = problem(name, 65, 129, 17, dtype)
    options = without_directions(options) | {"k": 7, "largest": largest}

    values, indices = best(*arguments, backend=backend, **options)
    there = indices >= 0
    none = -torch.inf if largest else torch.inf

    def found(*arguments, **options):
        return best(*arguments, **options).values

    def at_those(*arguments, k, largest, **options):
        """In another rounding equals may change places, and all their gradient with them."""
        return logits_of(*arguments, **options).gather(1, indices.clamp(min=0)).where(there, none)

    judge(found, at_those, arguments, options, fused_options={"backend": backend})
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    del exact["k"], exact["largest"]
    logits = logits_of(*(x.double() for x in arguments), **exact).detach()
    sought = logits if largest else logits.masked_fill(logits == -torch.inf, torch.inf)
    assert_accurate(values, sought.topk(7, largest=largest).values, logits=16.0)
    assert torch.equal(there, values.isfinite())
    assert all(len(row) == len(set(row)) for row in (of[of >= 0].tolist() for of in indices))


@pytest.mark.parametrize("k", [1, 2, 10, 64, 100, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1300), (130, 129), (257, 40)], ids=str)
def test_ties_go_to_the_lower_column(shape, k, backend):
    """Logits of a few integers, exact in every order of their sums: most of the k are ties."""
    n, m = shape
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-1, 2, (size, 5), generator=generator).float() for size in (n, m))
    values, indices = best(x, y, k, backend=backend)
    expected, order = (x @ y.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(values[:, :m], expected[:, :k])
    assert torch.equal(indices[:, :m], order[:, :k])
    assert (values[:, m:] == -torch.inf).all()
    assert (indices[:, m:] == -1).all()
    values, indices = best(x, y, k, largest=False, backend=backend)
    expected, order = (x @ y.T).sort(dim=1, stable=True)
    assert torch.equal(values[:, :m], expected[:, :k])
    assert torch.equal(indices[:, :m], order[:, :k])


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0)])
def test_empty_sides(n, m, backend):
    x, y = torch.randn(n, 3, requires_grad=True), torch.randn(m, 3, requires_grad=True)
    values, indices = best(x, y, 2, backend=backend)
    assert values.shape == indices.shape == (n, 2)
    assert n == 0 or m > 0 or ((values == -torch.inf).all() and (indices == -1).all())
    grads = torch.autograd.grad(values.sum(), (x, y))
    assert all((grad == 0).all() for grad in grads)


def test_nan_comes_first_as_in_torch(backend):
    x, y = torch.randn(3, 4), torch.randn(50, 4)
    y[7] = torch.nan
    values, indices = best(x, y, 3, backend=backend)
    expected = (x @ y.T).topk(3, dim=1)
    assert values[:, 0].isnan().all()
    assert torch.equal(indices, expected.indices)
    smallest = best(x, y, 60, largest=False, row_ids=torch.ones(3).long(), col_ids=torch.arange(50), backend=backend)
    assert smallest.values[:, 48].isnan().all()
    assert (smallest.indices[:, 48:50] == torch.tensor([7, -1])).all()


@pytest.mark.parametrize("name", ["everything", "self-everything"])
@pytest.mark.parametrize("noise", [None, 3])
def test_gradcheck(noise, name, backend):
    arguments, options = problem(name, 7, 9, 3, torch.float64, seed=3)
    options = without_directions(options) | {"k": 3, "noise": noise}
    leaves = {k: v for k, v in options.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    rest = {k: v for k, v in options.items() if k not in leaves}

    def call(*tensors):
        count = len(arguments)
        given = dict(zip(leaves, tensors[count:], strict=True))
        values = best(*tensors[:count], **given, **rest, backend=backend).values
        return values[values.isfinite()]

    torch.autograd.gradcheck(call, (*arguments, *leaves.values()))


def test_noise_is_that_of_the_reference(backend):
    """Row by row the same columns, whatever the order of the tiles."""
    x, y = torch.randn(150, 8, dtype=torch.float64), torch.randn(1100, 8, dtype=torch.float64)
    values, indices = best(x, y, 5, noise=-12345678901, backend=backend)
    gumbel = noise.gumbel(-12345678901, torch.arange(150)[:, None], torch.arange(1100), torch.float64)
    expected = (x @ y.T + gumbel).topk(5)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(values, (x @ y.T).gather(1, indices))
    assert not torch.equal(indices, best(x, y, 5, noise=7, backend=backend).indices)
    again = best(x[:70], y, 5, noise=-12345678901, backend=backend).indices
    assert torch.equal(again, indices[:70])


def test_draws_follow_the_softmax(backend):
    """Chi-square of 40,000 draws of one row: 20 columns have 19 degrees of freedom, the 0.9999 quantile is 50.8."""
    n = 40000
    x, y = torch.randn(1, 4).expand(n, 4), torch.randn(20, 4)
    drawn = best(x, y, 1, noise=1, backend=backend).indices.flatten()
    expected = n * (x[0] @ y.T).softmax(0)
    counts = torch.bincount(drawn, minlength=20)
    assert ((counts - expected).square() / expected).sum() < 50.8


def test_noise_is_gumbel():
    """Mean the Euler-Mascheroni constant, variance pi^2 / 6; and no two of a million places share their neighbours'."""
    rows, cols = torch.arange(1000)[:, None], torch.arange(1000)
    values = noise.gumbel(0, rows, cols, torch.float64)
    assert abs(values.mean().item() - 0.5772) < 0.005
    assert abs(values.var().item() - torch.pi**2 / 6) < 0.02
    assert values.isfinite().all()
    for shifted in (values.roll(1, 0), values.roll(1, 1), noise.gumbel(1, rows, cols, torch.float64)):
        correlation = torch.corrcoef(torch.stack((values.flatten(), shifted.flatten())))[0, 1]
        assert abs(correlation) < 0.005
    assert values[2, 3].item() == gumbel_of(0, 2, 3)


def test_noise_is_finite_at_the_ends(monkeypatch):
    """The highest bits of all, and the lowest: with one bit more a float32 would be 1, and its noise infinite."""
    for bits in (-1, 0):
        monkeypatch.setattr(noise, "_mix", lambda _, bits=bits: torch.full((1,), bits))
        assert noise.gumbel(
            0, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.float32
        ).isfinite()


def gumbel_of(seed, i, j):
    """The definition, in integers of Python."""
    mask = (1 << 64) - 1

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    bits = mix((mix(seed & mask) + 0x9E3779B97F4A7C15 * ((i << 32) + j + 1)) & mask)
    uniform = torch.tensor(((bits >> 41) + 0.5) * 2.0**-23, dtype=torch.float64)
    return -(-uniform.log()).log().item()


@pytest.mark.parametrize("k", [0, 1025, True, 2.0])
def test_k_is_checked(k):
    with pytest.raises(ValueError, match=r"k must be an integer in \[1, 1024\]"):
        co.similarity_topk(torch.ones(2, 2), k=k)


def test_noise_is_checked():
    with pytest.raises(ValueError, match=r"noise must be an integer of 64 bits, the seed of the draw, got 0\.5"):
        co.similarity_topk(torch.ones(2, 2), noise=0.5)
    with pytest.raises(ValueError, match="noise must be None with largest=False, got 3"):
        co.similarity_topk(torch.ones(2, 2), noise=3, largest=False)
