"""The CUDA kernels on the CPU, under sanitizers: values, bounds, races; and what finds the faults planted in them.

tests/cuda_host/check.cpp runs the functions of csrc/cuda/sweep.h without torch. AddressSanitizer finds accesses out of
bounds, of global memory and of a block's shared memory, ThreadSanitizer those that no barrier orders, of the threads of
a block and of blocks, and runtime.cpp what it says itself: divergence, misaligned copies, bank conflicts.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_host import build

SENTENCE = build.why_not()
pytestmark = pytest.mark.skipif(SENTENCE is not None, reason=f"cuda-host: {SENTENCE}")


def check(variant: str, *arguments: str, planted: Path | None = None) -> str:
    """What check.cpp prints; with the objects of csrc/cuda, or one of a copy with a fault in front of them."""
    kernels = [path for path in sorted(build.KERNELS.glob("*.cu")) if planted is None or path.name != planted.name]
    # of a template that is in several objects, the linker takes the first
    sources = [*([] if planted is None else [planted]), *kernels, build.HERE / "check.cpp"]
    command = [build.program(sources, variant), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    return result.stdout + result.stderr


def conflicts(output: str) -> list[str]:
    """The lines of the kernels whose accesses of shared memory took more wavefronts than they must."""
    counts = re.findall(r"^(\w+ \S+), (\d+), (\d+)$", output, re.MULTILINE)
    assert counts, output
    return [site for site, taken, least in counts if taken != least]


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_kernels(variant):
    output = check(variant)
    assert output.startswith("ok\n"), output[:4000]
    assert "Sanitizer" not in output
    assert {line.split()[0] for line in output.splitlines()[1:]} == {
        "copy_async",
        "load_matrices",
        "load_matrices_transposed",
    }
    assert conflicts(output) == []


class Fault(NamedTuple):
    """A change of the kernels' source, the case of check.cpp that shows it, and what catches it."""

    file: str
    old: str
    new: str
    kernel: str  # the object that is compiled with it
    case: str
    caught: str
    eager: bool = False


FAULTS = {
    "no wait for the copies": Fault(
        "tile.cuh", "copy_async_wait<Shape::stages - 2>();", "", "forward", "bfloat16", "value"
    ),
    "a wait that leaves one group too many": Fault(
        "tile.cuh",
        "copy_async_wait<Shape::stages - 2>();",
        "copy_async_wait<Shape::stages - 1>();",
        "forward",
        "bfloat16 steps",
        "value",
    ),
    "no barrier between the wait and the products": Fault(
        "tile.cuh",
        "whose stage takes the next\n      __syncthreads();",
        "whose stage takes the next",
        "forward",
        "bfloat16 steps",
        "race",
    ),
    "no barrier before the stages are filled again": Fault(
        "tile.cuh",
        "    __syncthreads();\n  }\n\n  __device__ __forceinline__ void multiply(",
        "  }\n\n  __device__ __forceinline__ void multiply(",
        "forward",
        "bfloat16",
        "race",
        eager=True,
    ),
    "no barrier between the warps' sums and their fold": Fault(
        "forward.cu",
        "cols, more);\n      __syncthreads();",
        "cols, more);",
        "forward",
        "float32",
        "race",
    ),
    "no barrier between the members' coefficients": Fault(
        "block.cu",
        "__syncthreads();  // the member before has left shared memory",
        "",
        "block",
        "volume 4 half",
        "race",
    ),
    "no barrier between the coefficients of logits and teacher": Fault(
        "block.cu",
        "__syncthreads();  // the coefficients before have left shared memory",
        "",
        "block",
        "float32 expectation",
        "race",
    ),
    "a guide that is compared before it is there": Fault(
        "logits.cuh",
        "        second.finish(dots, row, col);\n        logits.begin(row, col);\n",
        "        logits.begin(row, col);\n        second.finish(dots, row, col);\n",
        "forward",
        "float32 guide",
        "value",
    ),
    "no barrier before the place of a tile is filled again": Fault(
        "rows.cu",
        "    __syncthreads();  // the tile is there for all",
        "    // the tile is there for all",
        "rows",
        "bfloat16 self",
        "race",
    ),
    "columns beyond the last that take part": Fault(
        "logits.cuh", "row + i < n && col + j < m", "row + i < n", "forward", "bfloat16 small", "value"
    ),
    "statistics of rows beyond the last": Fault(
        "forward.cu",
        "has_row(own_row) && row + own_row < last_row",
        "has_row(own_row)",
        "forward",
        "bfloat16 small",
        "bounds",
    ),
    "options of rows beyond the last": Fault(
        "logits.cuh",
        "set(i, index, index < last);",
        "set(i, index, true);",
        "rows",
        "bfloat16 self",
        "bounds",
    ),
    "strips that share their partials": Fault(
        "forward.cu",
        "return blockIdx.y * static_cast<int64_t>(problem.n) + row;",
        "return static_cast<int64_t>(row);",
        "forward",
        "float32 rows",
        "race",
    ),
    "misaligned rows that are copied as if they were aligned": Fault(
        "tile.cuh", "% 16 == 0 && x % 16 == 0 && y % 16 == 0", "% 16 == 0", "block", "bfloat16 misaligned", "alignment"
    ),
    "rows of a slab in the same banks": Fault(
        "tile.cuh", "(chunk ^ (row / 2 % 4)) * 16", "chunk * 16", "forward", "bfloat16", "conflicts"
    ),
}
VARIANTS = {"value": "plain", "alignment": "plain", "conflicts": "plain", "bounds": "asan", "race": "tsan"}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name, tmp_path):
    fault = FAULTS[name]
    shutil.copytree(build.KERNELS, tmp_path, dirs_exist_ok=True)
    place = tmp_path / fault.file
    source = place.read_text()
    assert source.count(fault.old) == 1, f"{fault.file} has {fault.old!r} {source.count(fault.old)} times"
    place.write_text(source.replace(fault.old, fault.new))
    run = [fault.case, "1", *(["eager"] if fault.eager else [])]
    output = check(VARIANTS[fault.caught], *run, planted=tmp_path / f"{fault.kernel}.cu")
    assert what_caught(output) == fault.caught, output[:4000]


def what_caught(output: str) -> str:
    if "ThreadSanitizer: data race" in output:
        return "race"
    if "AddressSanitizer: heap-buffer-overflow" in output:
        return "bounds"
    if re.search(r"copy_async: .* is not aligned to 16 bytes", output):
        return "alignment"
    if re.search(r" is \S+ instead of \S+, off by ", output):
        return "value"
    return "conflicts" if output.startswith("ok\n") and conflicts(output) else "nothing"
