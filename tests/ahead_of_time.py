"""Compile the Triton kernels for one target without a GPU, and print what each takes, one JSON object per kernel.

python tests/ahead_of_time.py cuda:80 | cuda:90 | cuda:100 | hip:gfx942

Every entry of the table of tilings, every dtype, with all options of the op given and with none, for rows and columns
and for self-similarity. It needs a process of its own: in that of the tests Triton interprets.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from contrastive_ops.backends.triton import kernels as load

kernels = load()
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Device:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def resources(compiled: Any) -> dict[str, int]:
    """Registers, bytes of spills and of shared memory, and instructions of the matrix units."""
    found = {"shared": compiled.metadata.shared}
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        number = {key: int(re.search(rf"\.{key}:?\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        matrix = text.count("v_mfma")
        return found | {"registers": number["vgpr_count"], "spills": number["vgpr_spill_count"], "matrix": matrix}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", file.name], text=True)
        code = subprocess.check_output([TOOLS / "nvdisasm", "-c", file.name], text=True)
    matrix = len(re.findall(r"\b(HMMA|HGMMA|UTCHMMA)\b", code))
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    return found | {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "spills": stack, "matrix": matrix}


def compiled_kernels(dtype: torch.dtype, mirrored: bool, options: bool) -> Any:
    """Pairs of a name and a compiled kernel."""
    size, features = 512, 512
    x, vector = torch.zeros(size, features, dtype=dtype), torch.zeros(size)
    scale, integer = (vector, torch.zeros(size, dtype=torch.int64)) if options else (None, None)
    of_cols = (None, None, None) if mirrored else (scale, scale, integer)
    problem = kernels.Problem(
        x, None if mirrored else x, scale, of_cols[0], scale, of_cols[1], integer, integer, of_cols[2], options
    )
    part = torch.zeros(kernels.GROUPS, size)
    yield (
        "forward",
        kernels.forward_kernel.warmup(
            problem.x, problem.y, *problem.vectors, part, part, part, part, vector, size, size, features, 64, 64,
            ROWS=True, COLS=not mirrored, **problem.options, grid=(1, 1),
        ),
    )  # fmt: skip
    yield (
        "backward",
        kernels.backward_kernel.warmup(
            problem.x, problem.y, *problem.vectors, *[vector] * 7, vector if dtype == torch.float16 else None, x,
            part, part, part, part, size, size, features, 0, 0, size, size,
            ROWS=True, COLS=True, SUMS=options, **problem.options, grid=(1, 1),
        ),
    )  # fmt: skip


def main() -> None:
    kind, _, architecture = sys.argv[1].partition(":")
    warp = 64 if kind == "hip" else 32
    target = GPUTarget(kind, int(architecture) if kind == "cuda" else architecture, warp)
    triton.runtime.driver.set_active(Device(target))
    name = f"sm_{architecture}"
    kernels.device_class = lambda _: name if name in kernels.TILINGS else "any"
    for dtype, mirrored, options in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (False, True), (False, True)
    ):
        for kernel, compiled in compiled_kernels(dtype, mirrored, options):
            what = {"kernel": kernel, "dtype": str(dtype)[6:], "mirrored": mirrored, "options": options}
            print(json.dumps(what | resources(compiled)), flush=True)
    part, vector = torch.zeros(kernels.GROUPS, 512), torch.zeros(512)
    merge = kernels.merge_kernel.warmup(part, part, 16, part, part, 16, vector, vector, 512, BLOCK=1024, grid=(1,))
    print(json.dumps({"kernel": "merge", "dtype": "float32", "mirrored": True, "options": False} | resources(merge)))


if __name__ == "__main__":
    main()
