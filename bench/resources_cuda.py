"""The rows of bench/RESOURCES.md for the CUDA kernels, found without a GPU.

Registers, spills and instructions are read from the library that the installation compiled. What is decided at launch,
threads and dynamic shared memory, comes from the same sources run on the CPU (tests/cuda_host), as do the wavefronts of
shared memory.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.resources import MATRIX, ROOT, Row, tool
from contrastive_ops import build

LIBRARY = Path(build.__file__).with_name("_cuda.so")
ELEMENTS = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
SIZE, FEATURES = 128, 64  # of the problems that are run


class Launch(NamedTuple):
    """A kernel as its operator launches it."""

    kernel: str
    dtype: torch.dtype
    variant: str
    tile: tuple[int, int] | None
    instance: str  # the arguments of its template
    arguments: tuple[Any, ...]


class Code(NamedTuple):
    """What a kernel was compiled to."""

    registers: int
    spills: int
    matrix: int


def why_not(target: str) -> str | None:
    """The sentence that says why there are no rows for an architecture; None when there are."""
    if build.cuda is None:
        return build.cuda_missing
    if target not in build.cuda.architectures:
        return f"the CUDA kernels are compiled for {', '.join(build.cuda.architectures)}."
    return host().why_not()


def host() -> Any:
    """tests/cuda_host/build.py; the tests are no package."""
    spec = importlib.util.spec_from_file_location("cuda_host_build", ROOT / "tests" / "cuda_host" / "build.py")
    assert spec, "there is always one for a file"
    assert spec.loader, "and it has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launches(operators: Any) -> Iterator[Launch]:
    """Every kernel of the engine, once."""
    nothing: list[Tensor | None] = [None] * 8
    for dtype, element in ELEMENTS.items():
        for members in range(5):
            rows, cols = operators.tiling(members)
            variant, instance = f"P = {members}" if members else "pairs", f"{element},Tile<{members}>"
            part = [*_empty((SIZE // cols, SIZE), (SIZE // cols, SIZE)), None]
            problem = _problem(dtype, members)
            arguments = (*problem, part, nothing[:3], rows, cols)
            yield Launch("forward", dtype, variant, (rows, cols), instance, arguments)
            coefficients = torch.empty(max(members, 1), SIZE, SIZE, dtype=dtype)
            sums = (nothing[:3], nothing[:3])
            arguments = (*problem, nothing, None, coefficients, *sums, 0, 0, SIZE, SIZE, SIZE)
            yield Launch("block", dtype, variant, (rows, cols), instance, arguments)
    for dtype in (torch.bfloat16, torch.float16):
        for features in (64, 128, 256):
            gradient = torch.empty(1, SIZE, features)
            arguments = (*_problem(dtype, 0, features), nothing, None, gradient, nothing[:3], SIZE)
            tile, instance = operators.rows_tiling(dtype, features), f"{ELEMENTS[dtype]},RowsTile<{features}>"
            yield Launch("rows", dtype, f"D <= {features}", tile, instance, arguments)
            part = [*_empty((1, SIZE), (1, SIZE)), None]
            arguments = (*_problem(dtype, 0, features), None, part, _empty((1, SIZE, features), (1, SIZE)), SIZE)
            yield Launch("attention", dtype, f"D <= {features}", tile, instance, arguments)
    for dtype, element in ELEMENTS.items():
        yield Launch("excluded", dtype, "", None, element, (*_problem(dtype, 0), *_empty((SIZE,))))
    for dtype, element in ELEMENTS.items():
        for count in range(1, 6):
            basis = _empty((1, count, count), (1,), dtype=torch.float64)
            arguments = (torch.ones(1, count, FEATURES, dtype=dtype), *basis)
            yield Launch("factor", dtype, f"K = {count}", None, f"{element},{count}", arguments)
    part = [*_empty((2, SIZE), (2, SIZE)), None]
    yield Launch("merge", torch.float32, "", None, "", (part, nothing[:3], *_empty((SIZE,), (SIZE,))))


def _empty(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


def _problem(dtype: torch.dtype, members: int, features: int = FEATURES) -> tuple[Any, ...]:
    """The arguments of an operator that are a Problem of csrc/cuda/sweep.h."""
    x = torch.ones(SIZE, features, dtype=dtype)
    y = torch.ones((SIZE, members, features) if members else (SIZE, features), dtype=dtype)
    span = (torch.ones(members * (members + 1) // 2, SIZE), torch.ones(SIZE)) if members else (None, None)
    exclude = torch.arange(SIZE, dtype=torch.int32)
    return (x, y, [None] * 4 + [exclude] + [None] * 3, span, False, False, False)


def rows_of(target: str) -> Iterator[Row]:
    """Every kernel, for an architecture."""
    path = host().backend()
    torch.ops.load_library(path)
    operators, runtime = torch.ops.contrastive_ops_cuda_host, ctypes.CDLL(str(path))
    runtime.contrastive_ops_host_wavefronts.restype = ctypes.c_char_p
    code = code_of(LIBRARY, target)
    for launch in launches(operators):
        runtime.contrastive_ops_host_wavefronts()  # those before
        getattr(operators, launch.kernel)(*launch.arguments)
        wavefronts = re.findall(rb"(\d+), (\d+)$", runtime.contrastive_ops_host_wavefronts(), re.MULTILINE)
        registers, spills, matrix = code.pop(f"{launch.kernel}_kernel<{launch.instance}>".replace("<>", ""))
        yield Row(
            kernel=launch.kernel,
            dtype=str(launch.dtype).removeprefix("torch."),
            variant=launch.variant,
            tile=" x ".join(map(str, launch.tile or ())),
            warps=runtime.contrastive_ops_host_threads() // 32,
            registers=registers,
            spills=spills,
            shared=runtime.contrastive_ops_host_shared_bytes(),
            matrix=matrix,
            conflicts=sum(int(taken) - int(least) for taken, least in wavefronts),
        )
    assert not code, f"kernels that no operator launched: {', '.join(code)}"


def code_of(library: Path, target: str) -> dict[str, Code]:
    """The kernels of a library for an architecture, by their names without namespaces."""
    code = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.check_output([tool("cuobjdump"), "-xelf", "all", library.resolve()], cwd=folder)
        for cubin in Path(folder).glob(f"*.{target}.cubin"):
            usage = subprocess.check_output([tool("cuobjdump"), "-res-usage", cubin], text=True)
            listing = subprocess.check_output([tool("nvdisasm"), "-c", cubin], text=True)
            sections = re.findall(r"(?ms)^\s*\.section\s+\.text\.([^,\s]+),(.*?)(?=^\s*\.section\s|\Z)", listing)
            matrix = {symbol: len(re.findall(MATRIX, instructions)) for symbol, instructions in sections}
            used = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
            full = subprocess.check_output(["c++filt", *(symbol for symbol, *_ in used)], text=True).splitlines()
            for name, (symbol, registers, stack) in zip(full, used, strict=True):
                code[_short(name)] = Code(int(registers), int(stack), matrix[symbol])
    return code


def _short(name: str) -> str:
    """forward_kernel<float,Tile<0>>"""
    short = re.sub(r"contrastive_ops::cuda::|\(anonymous namespace\)::|\s", "", name.removeprefix("void "))
    return short.partition("(")[0]
