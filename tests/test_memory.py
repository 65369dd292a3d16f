"""Peak extra memory stays O(N D): the reason the project exists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

N, D = 8192, 64
MATRIX = N * N * 4  # bytes of one float32 N x N matrix: 256 MiB

# a process of its own, because the peak of resident memory never falls again. The small call first loads what the
# libraries load on first use. Importing torch needs more than stays resident: the ballast fills that gap, in which
# hundreds of megabytes would pass unseen.
SCRIPT = """
import resource, sys
import torch
import contrastive_ops as co

backend, name, n, d = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(2)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def step(n):
    x, y = (torch.randn(n, d, requires_grad=True) for _ in range(2))
    ballast = torch.ones(max(peak() - resident(), 0), dtype=torch.uint8)
    before = peak()
    arguments = (x, y, 10.0) if name == "clip_loss" else (x, y)
    if name == "soft_target_loss":
        arguments = (x, y, y.detach(), x.detach())
    if name == "triangle_loss":
        arguments = (x, y, y.roll(1, 0))
    if name.startswith("mv"):
        arguments = (torch.cat([x, y]).unflatten(0, (4, -1)),)
    if name == "flex_logsumexp":
        label, scale = torch.arange(n) % 100, torch.tensor(3.0, requires_grad=True)
        options = {
            "score_mod": lambda score, row, col: scale * score + (label[row] - label[col]).abs(),
            "mask_mod": lambda row, col: label[row] != label[col],
        }
        out = co.flex_logsumexp(x, y, **options, parameters=[scale], cols=True)
        (out.row_lse.sum() + out.col_lse.sum()).backward()
    else:
        getattr(co, name)(*arguments, backend=backend).backward()
    assert x.grad.isfinite().all()
    return peak() - before

step(96)
print(step(n))
"""


def extra_bytes(backend: str, name: str, n: int) -> int:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, name, str(n), str(D)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return int(result.stdout)


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and ru_maxrss in kilobytes: Linux only")


# The cpu engine may keep up to 64 MB of dot products from forward to backward, whatever N is, and tiled has a dozen
# tiles of 4 MB at a time; half of one matrix is still far from the several that the dense loss holds. NT-Xent stacks
# its views: N / 2 samples are N rows, and those two matrices are four views for MV-InfoNCE.
@pytest.mark.parametrize(
    ("op", "name", "n"),
    [
        ("similarity_logsumexp", "clip_loss", N),
        ("volume_logsumexp", "gram_loss", N),
        ("similarity_logsumexp", "nt_xent", N // 2),
        ("similarity_logsumexp", "mv_infonce", N // 2),
        ("similarity_expectation", "soft_target_loss", N),
    ],
)
def test_extra_memory_is_far_below_one_matrix(op, name, n, backend):
    assert extra_bytes(backend, name, n) < MATRIX / 2


def test_extra_memory_of_areas():
    n = 3 * N // 2  # its tiles, some 100 MB, are not far below half of a matrix of N
    assert extra_bytes("tiled", "triangle_loss", n) < n * n * 4 / 2


def test_extra_memory_of_a_pair_function():
    assert extra_bytes("tiled", "flex_logsumexp", N) < MATRIX / 8


def test_the_measurement_sees_a_matrix():
    """The dense backend at half the rows, whose matrices are a quarter: beyond the bound, or the test says nothing."""
    assert extra_bytes("reference", "clip_loss", N // 2) > MATRIX / 2
