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


class Reduced(NamedTuple):
    """A reduction of the kernels of tiles."""

    variant: str
    instance: str
    reduction: str = "logsumexp"
    members: int = 0
    ceilings: bool = False
    teacher: bool = False


REDUCED = (
    Reduced("pairs", "LogSumExp<Tile<0,1>,false>"),
    Reduced("guided", "LogSumExp<Tile<0,1>,true>", ceilings=True),
    Reduced("sum", "Sum", "softplus"),
    Reduced("mean", "Expectation", "expectation", teacher=True),
    *(Reduced(f"P = {members}", f"LogSumExp<Tile<{members},1>,false>", members=members) for members in range(1, 5)),
)


def launches(operators: Any) -> Iterator[Launch]:
    """Every kernel of the engine, once."""
    for dtype, element in ELEMENTS.items():
        for reduced in REDUCED:
            rows, cols = operators.tiling(reduced.reduction, reduced.members)
            instance = f"{element},{reduced.instance}"
            problem, strips = _problem(dtype, FEATURES, reduced), SIZE // cols
            part = _part(strips, reduced)
            yield Launch(
                "forward", dtype, reduced.variant, (rows, cols), instance, (*problem, part, _NO_PART, rows, cols)
            )
            planes = 2 if reduced.teacher else max(reduced.members, 1)
            coefficients = torch.empty(planes, SIZE, SIZE, dtype=dtype)
            place = (0, 0, SIZE, SIZE, SIZE)
            arguments = (*problem, _NOTHING, None, coefficients, _NO_SUMS, _NO_SUMS, *place)
            yield Launch("block", dtype, reduced.variant, (rows, cols), instance, arguments)
    for dtype in (torch.bfloat16, torch.float16):
        for features in (64, 128, 256):
            gradient = torch.empty(1, SIZE, features)
            arguments = (*_problem(dtype, features), _NOTHING, None, gradient, _NO_SUMS, SIZE)
            tile, instance = operators.rows_tiling(dtype, features), f"{ELEMENTS[dtype]},RowsTile<{features}>"
            yield Launch("rows", dtype, f"D <= {features}", tile, instance, arguments)
            slopes = _empty((1, SIZE, features), (1, SIZE))
            arguments = (*_problem(dtype, features), None, _part(1, REDUCED[0]), slopes, SIZE)
            yield Launch("attention", dtype, f"D <= {features}", tile, instance, arguments)
    for dtype, element in ELEMENTS.items():
        yield Launch("excluded", dtype, "", None, element, (*_problem(dtype), *_empty((SIZE,))))
    for dtype, element in ELEMENTS.items():
        for count in range(1, 6):
            basis = _empty((1, count, count), (1,), dtype=torch.float64)
            arguments = (torch.ones(1, count, FEATURES, dtype=dtype), *basis)
            yield Launch("factor", dtype, f"K = {count}", None, f"{element},{count}", arguments)
    vectors = _empty((SIZE,), (SIZE,))
    yield Launch("merge", torch.float32, "", None, "", (_part(2, REDUCED[0]), _NO_PART, *vectors, None))


# lists of optional tensors without any, see csrc/cuda/binding.cpp
_NO_PART, _NO_SUMS, _NOTHING = (None,) * 6, (None,) * 5, (None,) * 14


def _part(count: int, reduced: Reduced) -> list[Tensor | None]:
    """What forward folds."""
    if reduced.reduction == "softplus":
        return [None, *_empty((count, SIZE), dtype=torch.float64), *[None] * 4]
    of_teacher = _empty(*[(count, SIZE)] * 3) if reduced.teacher else [None] * 3
    return [*_empty((count, SIZE), (count, SIZE)), None, *of_teacher]


def _empty(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


def _problem(dtype: torch.dtype, features: int = FEATURES, reduced: Reduced = REDUCED[0]) -> tuple[Any, ...]:
    """The arguments of an operator that are a Problem of csrc/cuda/sweep.h."""
    members = reduced.members
    x = torch.ones(SIZE, features, dtype=dtype)
    y = torch.ones((SIZE, members, features) if members else (SIZE, features), dtype=dtype)
    span = (torch.ones(members * (members + 1) // 2, SIZE), torch.ones(SIZE)) if members else (None, None)
    exclude = torch.arange(SIZE, dtype=torch.int32)
    second = [x, x] if reduced.teacher or reduced.ceilings else [None, None]
    ceilings = [torch.ones(SIZE)] * 2 if reduced.ceilings else [None, None]
    vectors = [*[None] * 4, exclude, *[None] * 3]
    return (x, y, vectors, span, [*second, *[None] * 4, *ceilings], reduced.reduction, False, False, False, False)


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
