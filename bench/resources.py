"""What the kernels take of a GPU, found by compiling them without one: bench/RESOURCES.md.

python -m bench.resources [--target cuda:90 sm_90a ...] [--write]

sm_80 and so on are the CUDA kernels, see resources_cuda.py. Each target has a process of its own; for Triton, in which
a stand-in for the driver names it: a process has one driver, and in that of the tests Triton interprets.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from contrastive_ops import build as installed
from contrastive_ops import plane
from contrastive_ops.backends import sweep
from contrastive_ops.backends import triton as backend

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "bench" / "RESOURCES.md"
COMMAND = "python -m bench.resources --write"


class Limits(NamedTuple):
    """What a target has. A multiprocessor of AMD is a compute unit."""

    name: str
    program_shared: int  # bytes that one program may have; the compiler does not check
    shared: int  # bytes of a multiprocessor
    reserved: int = 0  # bytes that the system takes of each program
    registers: int = 255  # of a thread
    warps: int = 64
    programs: int = 32


TARGETS = {
    "cuda:80": Limits("sm_80 (A100)", 166912, 164 << 10, 1 << 10),
    "cuda:90": Limits("sm_90 (H100)", 232448, 228 << 10, 1 << 10),
    "cuda:100": Limits("sm_100 (B200)", 232448, 228 << 10, 1 << 10),
    "hip:gfx942": Limits("gfx942 (MI300)", 65536, 64 << 10, registers=512, warps=32, programs=16),
}
CUDA_TARGETS = {"sm_80": TARGETS["cuda:80"], "sm_90a": TARGETS["cuda:90"], "sm_100a": TARGETS["cuda:100"]}
LIMITS = TARGETS | CUDA_TARGETS


@dataclass(frozen=True)
class Row:
    kernel: str
    dtype: str
    variant: str
    tile: str
    warps: int
    registers: int  # of a thread
    spills: int  # bytes (AMD: registers) of a thread
    shared: int  # bytes of a program
    matrix: int  # instructions of the matrix unit in the code
    stages: int = 0  # Triton's
    tensor_memory: int = 0  # columns of a program, sm_100
    conflicts: int = 0  # of CUDA, see resources_cuda.py


def programs(target: str, row: Row) -> int:
    """Programs that a multiprocessor holds at once, by registers, threads, shared and tensor memory."""
    limits = LIMITS[target]
    fit = [limits.programs, limits.warps // row.warps]
    if row.shared:
        fit.append(limits.shared // (_up(row.shared, 128) + limits.reserved))
    # of each of the four parts of a multiprocessor, a warp belongs to one
    if target.startswith("hip:"):  # a lane's share of the file has 512 registers, ordinary ones and accumulators
        warps_of_part = min(8, 512 // _up(row.registers, 8))
    else:
        warps_of_part = (65536 // 4) // _up(32 * row.registers, 256)
    fit.append(4 * warps_of_part // row.warps)
    if row.tensor_memory:
        fit.append(512 // row.tensor_memory)
    return min(fit)


def _up(size: int, granularity: int) -> int:
    return -(-size // granularity) * granularity


# of the products; tf32 is float32 where the user allows it
DTYPES = ("float32", "tf32", "bfloat16", "float16")


class Build(NamedTuple):
    """A kernel as it is launched, and how to compile it."""

    kernel: str
    dtype: str
    variant: str
    tile: str
    compile: Callable[[], Any]


SIZE, FEATURES = 1001, 512  # rows and columns that no vector of loads divides take more registers than others


def pair_builds() -> Iterator[Build]:
    """similarity_logsumexp with the options of a CLIP loss, and with all there are, which take the most registers."""
    for name, mirrored, options in itertools.product(DTYPES, (False, True), ("few", "all")):
        yield from _builds(name, f"{'self' if mirrored else 'x, y'}, {options}", _problem(name, mirrored, options))


def volume_builds() -> Iterator[Build]:
    """volume_logsumexp: the most vectors of each entry of the table of tilings."""
    for name, members in itertools.product(DTYPES, (2, 4)):
        yield from _builds(name, f"P = {members}", _volume_problem(name, members))


def reduction_builds() -> Iterator[Build]:
    """The other ops over pairs, with all options: those that take the most registers of 32 and of 16 bits."""
    for name, variant in itertools.product(("float32", "float16"), ("softplus", "mean", "teacher", "guide")):
        yield from _builds(name, f"{variant}, all", _problem(name, False, "all", variant))


def topk_builds() -> Iterator[Build]:
    launch, tilings = backend.kernels("launch"), backend.kernels("tilings")
    for name, k in itertools.product(("float32", "float16"), (16, plane.MOST_CANDIDATES)):
        problem = _problem(name, False, "all")
        tiling = tilings.topk_tiling(problem, k)
        (x, y, vectors, span, *_, second), described = launch.inputs(problem, tiling)
        best = plane.Best(torch.zeros(SIZE, 1, k, dtype=torch.int64), torch.zeros(SIZE, 1, k))
        bound = torch.zeros(SIZE, dtype=torch.int64)
        arguments = (x, y, vectors, span, second, 2**62, bound, best, SIZE, SIZE, FEATURES, 64)
        flags = {**launch.options(problem, tiling), "LARGEST": True, "DESCRIBED": described, "K": k, "grid": (1, 1)}
        shape = " x ".join(map(str, tiling[:3]))
        yield Build("topk", name, f"k = {k}", shape, _warmup(launch.topk_kernel, arguments, flags))


def helper_builds() -> Iterator[Build]:
    """What does O(N D) work or less."""
    launch = backend.kernels("launch")
    problem = _problem("bfloat16", False, "all")
    vector, part = _vector(), _part(problem)
    excluded = (problem.x, problem.y, problem.vectors, vector, SIZE, FEATURES)
    flags = {"BLOCK_M": launch.EXCLUDED, "BLOCK_D": 128, "grid": (1,)}
    tile = f"{launch.EXCLUDED} x 128"
    yield Build("excluded", "bfloat16", "x, y, all", tile, _warmup(launch.excluded_kernel, excluded, flags))
    flags = {"BLOCK": launch.MERGE, "grid": (1,)}
    merge = _warmup(launch.merge_kernel, (part, 16, part, 16, vector, vector, vector, None, SIZE), flags)
    yield Build("merge", "float32", "self", str(launch.MERGE), merge)


def row_builds() -> Iterator[Build]:
    """What is done row by row, with all that the losses may ask for."""
    rowwise = backend.kernels("rowwise")
    vector, index = _vector(), torch.zeros(SIZE, dtype=torch.int64)
    x, number = torch.zeros(SIZE, FEATURES, dtype=torch.bfloat16), torch.zeros(1)
    of_row = {"BLOCK_M": rowwise.ROWS, "BLOCK_D": rowwise.FEATURES, "grid": (1,)}
    tile, elements = f"{rowwise.ROWS} x {rowwise.FEATURES}", str(rowwise.VECTOR)

    def build(kernel: str, dtype: str, variant: str, tile: str, arguments: Sequence[Any], **flags: Any) -> Build:
        return Build(kernel, dtype, variant, tile, _warmup(getattr(rowwise, f"{kernel}_kernel"), arguments, flags))

    forward: tuple[Any, ...] = (x, number, 1.0, vector, vector, SIZE, FEATURES, FEATURES)
    yield build("scale", "bfloat16", "t^-1/2", tile, forward, POWER=-0.5, **of_row)
    backward: tuple[Any, ...] = (x, vector, x, vector, number, 1.0, x, number, SIZE, FEATURES, FEATURES, FEATURES)
    yield build("scale_backward", "bfloat16", "t^-1/2", tile, backward, POWER=-0.5, VECTOR=rowwise.VECTOR, **of_row)
    pair, flags = (vector, vector), {"DIRECTIONS": 2, "BLOCK": rowwise.VECTOR, "grid": (1,)}
    forward = (vector, pair, pair, number, SIZE, 1.0, 1.0, 1.0)
    yield build("contrast", "float32", "totals", elements, forward, **flags)
    backward = (number, vector, pair, vector, vector, vector, SIZE, 1.0, 1.0, 1.0)
    yield build("contrast_backward", "float32", "totals", elements, backward, **flags)
    incoming = ((vector,) * 3, (vector,) * 3, pair, pair, index, index.int(), SIZE, SIZE, SIZE, SIZE)
    forward = ((vector,) * 4, (SIZE,) * 4, pair, (SIZE,) * 2, 1.0, number)
    yield build("bound", "float32", "", elements, forward, SUMMANDS=4, FACTORS=2, BLOCK=rowwise.VECTOR, grid=(1,))
    yield build("incoming", "float32", "x, y", elements, incoming, BLOCK=rowwise.VECTOR, grid=(1,))
    forward = (index, index, index, index.int(), index.int(), vector, SIZE, 10)
    yield build("classes", "int64", "", elements, forward, BLOCK=rowwise.VECTOR, grid=(1,))
    rows = (index.int(), vector, x.float())  # of a class: its number, how many others, sums
    forward = (x, vector, vector, *rows, SIZE, FEATURES, FEATURES)
    flags = {"BLOCK_M": rowwise.ROWS, "BLOCK": rowwise.LONG, "BLOCK_D": rowwise.NARROW, "grid": (1, 1)}
    yield build("class_sums", "bfloat16", "weighted", f"{rowwise.LONG} x {rowwise.NARROW}", forward, **flags)
    forward = (x, vector, *rows, vector, SIZE, FEATURES, FEATURES)
    yield build("class_mean", "bfloat16", "", tile, forward, **of_row)
    backward = (x, vector, vector, *rows, x.float(), (x, x), pair, x, vector, SIZE, FEATURES, FEATURES)
    yield build("class_mean_backward", "bfloat16", "two sweeps", tile, backward, GRADS=2, GRAD_SCALES=2, **of_row)
    flags = {"INSIDE": False, "BLOCK": rowwise.VECTOR, "grid": (1,)}
    forward = (vector, vector, vector, vector, number, number, SIZE, 1.0)
    yield build("class_contrast", "float32", "", elements, forward, DROP=True, **flags)
    backward = (number, number, vector, vector, vector, vector, vector, vector, SIZE)
    yield build("class_contrast_backward", "float32", "", elements, backward, **flags)
    double, vectors = torch.zeros(SIZE, dtype=torch.float64), (x, x, x)
    forward = (vectors, x.float(), x.float(), x.float(), double, SIZE, FEATURES)
    yield build("units", "bfloat16", "K = 3", tile, forward, K=3, **of_row)
    backward = (x.float(), x.float(), x.float(), x.float(), double, vectors, SIZE, FEATURES)
    yield build("units_backward", "bfloat16", "K = 3", tile, backward, K=3, **of_row)
    for members in (2, 4, rowwise.MOST_VECTORS):
        width = 1 << (members - 1).bit_length()
        flags = {"P": members, "WIDTH": width, "BLOCK": rowwise.SETS, "BLOCK_D": rowwise.SHARE, "grid": (1,)}
        tile, variant = f"{rowwise.SETS} x {rowwise.SHARE}", f"P = {members}"
        swept = (vector, vector, vector, x, x, vector) if members < rowwise.MOST_VECTORS else (None,) * 6
        factor = (x, double, double, *swept, SIZE, SIZE, FEATURES, 1)
        yield build("factor", "bfloat16", variant, tile, factor, INSIDE=1e-12, **flags)
        yield build("volume_gradient", "bfloat16", variant, tile, (x, double, vector, x, SIZE, FEATURES), **flags)
        if members < rowwise.MOST_VECTORS:
            gradient = (x, double, double, x.float(), vector, x, SIZE, FEATURES)
            yield build("tuple_gradient", "bfloat16", variant, tile, gradient, **flags)


BUILDERS: tuple[Callable[[], Iterator[Build]], ...] = (
    pair_builds, volume_builds, reduction_builds, topk_builds, helper_builds, row_builds,
)  # fmt: skip


def _builds(name: str, variant: str, problem: Any) -> Iterator[Build]:
    """The kernels of forward and backward, as launch.py launches them."""
    launch, tilings = backend.kernels("launch"), backend.kernels("tilings")
    volumes, everything = problem.members > 0, "all" in variant
    part, vector = _part(problem, totals=volumes), _vector()
    planes = 2 if problem.teaches else max(problem.members, 1)
    sizes, own = launch.sizes(problem), launch.sizes(problem)[:3]
    unit = vector if name == "float16" else None
    maxima, of_mean = problem.reduction not in plane.SUMS, problem.reduction == "expectation"
    incoming = plane.Incoming(
        vector,
        vector,
        vector if maxima else None,
        vector if maxima else None,
        row_excluded=None if volumes or of_mean else vector,
        col_excluded=vector if problem.mirrored else None,
        row_total=vector if volumes else None,
        col_total=vector if volumes else None,
        row_share=vector if of_mean else None,
        col_share=vector if of_mean else None,
        teacher_row_max=vector if problem.teaches else None,
        teacher_col_max=vector if problem.teaches else None,
        row_mean=vector if of_mean else None,
        col_mean=vector if of_mean else None,
    )
    matrix = torch.zeros(16, SIZE)
    of_teacher = (matrix, matrix) if problem.teaches else (None, None)
    row_sums = plane.Sums(matrix, matrix if everything else None, matrix if volumes else None, *of_teacher)
    col_sums = plane.Sums(matrix if everything or volumes else None, matrix if everything else None, None, *of_teacher)
    inputs = (problem.x, problem.y, problem.vectors, problem.second)
    block = (SIZE, SIZE, sweep.padded(SIZE))

    def build(kernel: str, tiling: Any, arguments: Sequence[Any], **flags: Any) -> Build:
        flags = {**launch.options(problem, tiling), **flags, "grid": (1, 1)}
        if kernel != "product":
            flags |= launch.choices(problem)
        if name == "tf32":
            flags["PRECISION"] = "tf32"
        shape = " x ".join(map(str, tiling[:3]))
        return Build(kernel, name, variant, shape, _warmup(getattr(launch, f"{kernel}_kernel"), arguments, flags))

    tiling = tilings.forward_tiling(problem)
    given, described = launch.inputs(problem, tiling)
    yield build(
        "forward", tiling, (*given, part, part, *sizes, 64, 64),
        MEMBERS=problem.members, MIRRORED=problem.mirrored, DESCRIBED=described,
    )  # fmt: skip
    tiling = tilings.block_tiling(problem)
    given, described = launch.inputs(problem, tiling)
    coefficients, where = problem.x, (*sizes, 0, 0, *block)
    yield build(
        "block", tiling,
        (*given, incoming, unit, coefficients, row_sums, col_sums, *where),
        MEMBERS=problem.members, PLANES=planes, DESCRIBED=described,
    )  # fmt: skip
    logsumexp = problem.reduction == "logsumexp" and not problem.guided
    if everything and not volumes and logsumexp:
        stride = block[-1]
        strides = (1, stride) if problem.mirrored else (stride, 1)  # as for the rows, and as for the columns
        yield build(
            "product", tilings.product_tiling(problem),
            (problem.x, problem.y, problem.x.float(), problem.vectors, *own, 0, 0, SIZE, SIZE, *strides, 0, 1.0),
            RESTRICT=True,
        )  # fmt: skip
    op = "similarity_logsumexp" if logsumexp else "similarity_sum" if problem.reduction in plane.SUMS else ""
    for features in sorted({tilings.ROWS_FEATURES, tilings.ATTENTION_FEATURES}):
        problem.features = features  # whatever those of x: the tiling has them all
        tiling = tilings.rows_tiling(problem)
        if tiling is not None:
            yield build("rows", tiling, (*inputs, incoming, unit, problem.x, row_sums, *own, 64))
        takes = launch.TritonKernels().takes_attention(op, problem.x.dtype, features)
        if takes and not (volumes or problem.mirrored):
            slopes = plane.Slopes(problem.x.float(), matrix, None if logsumexp else matrix)
            yield build("attention", tilings.attention_tiling(problem), (*inputs, unit, part, slopes, *own, 64))


def _problem(name: str, mirrored: bool, options: str, variant: str = "logsumexp") -> Any:
    vector, index = _vector(), torch.zeros(SIZE, dtype=torch.int32)
    x = torch.zeros(SIZE, FEATURES, dtype=_dtype(name))
    col_exclude = index if mirrored else None
    if options == "few":
        vectors = plane.Vectors(vector, None, None, None, index, col_exclude, None, None)
    else:
        vectors = plane.Vectors(vector, vector, vector, vector, index, col_exclude, index, index)
    reduction = {"mean": "expectation", "teacher": "expectation", "guide": "logsumexp"}.get(variant, variant)
    second = plane.NO_SECOND
    if variant == "teacher":
        second = plane.Second(x, x, vector, vector, vector, vector)
    elif variant == "guide":
        second = plane.Second(x, x, row_ceiling=vector, col_ceiling=vector)
    return plane.Problem(x, x, vectors, second=second, reduction=reduction, mirrored=mirrored)


def _volume_problem(name: str, members: int) -> Any:
    vector, index = _vector(), torch.zeros(SIZE, dtype=torch.int32)
    anchor = torch.zeros(SIZE, FEATURES, dtype=_dtype(name))
    tuples = torch.zeros(SIZE, members, FEATURES, dtype=_dtype(name))
    vectors = plane.Vectors(vector, vector, None, None, index, None, None, None)
    return plane.Problem(anchor, tuples, vectors, plane.Span(vector, vector))


def _dtype(name: str) -> torch.dtype:
    return torch.float32 if name == "tf32" else getattr(torch, name)


def _vector() -> torch.Tensor:
    return torch.zeros(SIZE)


def _part(problem: Any, totals: bool = False) -> Any:
    dtype = torch.float64 if problem.reduction in plane.SUMS else torch.float32
    return plane.Part(**{field: torch.zeros(16, SIZE, dtype=dtype) for field in plane.fields_of_part(problem, totals)})


def _warmup(kernel: Any, arguments: Sequence[Any], flags: dict[str, Any]) -> Callable[[], Any]:
    return lambda: kernel.warmup(*arguments, **flags)


class Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def why_not(target: str) -> str | None:
    """The sentence that says why a target can't be compiled here; None when it can."""
    if target in CUDA_TARGETS:
        from bench import resources_cuda  # which imports this module

        return resources_cuda.why_not(target)
    return None if importlib.util.find_spec("triton") else "triton is not installed; pip install triton."


def compile_here(target: str) -> Iterator[Row]:
    """Every kernel, with this process's Triton set to the target."""
    if target in CUDA_TARGETS:
        from bench import resources_cuda

        yield from resources_cuda.rows_of(target)
        return
    import triton
    from triton.backends.compiler import GPUTarget

    kind, _, architecture = target.partition(":")
    gpu = GPUTarget("cuda", int(architecture), 32) if kind == "cuda" else GPUTarget(kind, architecture, 64)
    triton.runtime.driver.set_active(Driver(gpu))
    tilings, name = backend.kernels("tilings"), "hip" if kind == "hip" else f"sm_{architecture}"
    tilings.device_class = lambda _: name if name in tilings.TILINGS else "any"  # type: ignore[attr-defined]
    for build in (build for builder in BUILDERS for build in builder()):
        compiled = build.compile()
        metadata = compiled.metadata
        yield Row(
            kernel=build.kernel,
            dtype=build.dtype,
            variant=build.variant,
            tile=build.tile,
            warps=metadata.num_warps,
            stages=metadata.num_stages,
            shared=metadata.shared,
            tensor_memory=getattr(metadata, "tmem_size", None) or 0,
            **_of_code(compiled),
        )


def _of_code(compiled: Any) -> dict[str, int]:
    """Registers, spills, and instructions of the matrix unit."""
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        return {
            "registers": _number(r"\.vgpr_count:?\s+(\d+)", code),
            "spills": _number(r"\.vgpr_spill_count:?\s+(\d+)", code),
            "matrix": code.count("v_mfma"),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([tool("cuobjdump"), "-res-usage", file.name], text=True)
        code = subprocess.check_output([tool("nvdisasm"), "-c", file.name], text=True, stderr=subprocess.DEVNULL)
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "spills": _number(r"STACK:(\d+)", usage),
        "matrix": len(re.findall(MATRIX, code)),
    }


MATRIX = r"\b(HMMA|HGMMA|UTCHMMA)\b"


def tool(name: str) -> Path:
    """A program of CUDA that Triton brings."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in what the compiler wrote"
    return int(found[1])


def compile_for(target: str) -> list[Row]:
    """Every kernel, in a process of its own."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-m", "bench.resources", "--json", "--target", target],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"Compiling for {target} failed:\n{result.stderr[-3000:]}")
    return [Row(**json.loads(line)) for line in result.stdout.splitlines()]


def head() -> str:
    return f"""# What the kernels take of a GPU

Compiled by {compiler("cuda:80")} and {compiler("sm_80")} without a GPU; nothing here was measured on one.
`{COMMAND}` writes this page, and tests compile again and compare.

- registers: of a thread, 255 at most; on gfx942 ordinary ones and accumulators, 512 at most.
- spills: bytes of a thread's stack (gfx942: registers). Zero, or a test fails; not on cuda:90, whose tilings are the
  fastest of those measured on an H200.
- shared: bytes of a program (of a block), within the limit of a program or a test fails.
- matrix: instructions of the matrix unit in the code (HMMA, HGMMA, UTCHMMA, v_mfma).
- programs: how many a multiprocessor holds at once, by registers, threads and memory: an upper bound.

The sections cuda:80 to hip:gfx942 are Triton's kernels, for {SIZE} rows and columns, which no vector divides, and
{FEATURES} features. These come by tensor descriptors in forward and block of pairs of cuda:90, elsewhere by pointers;
where 16 does not divide them, loads are slower, and registers may spill. Tile: rows x columns x features of one step;
of what has a number per row, rows; of what is done row by row, rows, or sets of P vectors, x features.

The sections sm_80 to sm_100a are the CUDA kernels (csrc/cuda), each instance of them. Tile: rows x columns. Conflicts:
wavefronts of shared memory that its asynchronous copies and matrix loads take beyond the least possible, counted as
the kernel runs on the CPU. Zero, or a test fails.
"""


def compiler(target: str) -> str:
    """That of the kernels here; where nvcc compiled none, that of the page."""
    if target in TARGETS:
        return f"Triton {importlib.metadata.version('triton')}"
    return committed(target)[0] if installed.cuda is None else installed.cuda.compiler


COLUMNS = ("kernel", "dtype", "variant", "tile", "warps", "stages", "registers", "spills", "shared", "matrix")
CUDA_COLUMNS = (*COLUMNS[:5], *COLUMNS[6:], "conflicts")


def section(target: str, rows: Sequence[Row]) -> str:
    columns = CUDA_COLUMNS if target in CUDA_TARGETS else COLUMNS
    lines = [f"| {' | '.join((*columns, 'programs'))} |", f"|{' --- |' * 4}{' ---: |' * (len(columns) - 3)}"]
    for row in rows:
        values = [*(getattr(row, column) for column in columns), programs(target, row)]
        lines.append(f"| {' | '.join(map(str, values))} |")
    limits = LIMITS[target]
    return "\n".join([f"## {target}: {limits.name}, {limits.program_shared} bytes for a program", "", *lines, ""])


def committed(target: str) -> tuple[str, str]:
    """The compiler on the committed page, and the section of a target; empty where there is none."""
    text = PAGE.read_text() if PAGE.exists() else ""
    version = re.search(r"Triton \d\S*" if target in TARGETS else r"nvcc \d\S*", text)
    found = re.search(rf"^## {re.escape(target)}:.*?(?=\n## |\Z)", text, re.DOTALL | re.MULTILINE)
    return version[0] if version else "", found[0] if found else ""


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.resources", description="Compile the kernels without a GPU; what each takes."
    )
    parser.add_argument("--target", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--write", action="store_true", help=f"the targets into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--json", action="store_true", help="one object per kernel; of one target, in this process")
    options = parser.parse_args(argv)
    if options.json:
        if len(options.target) != 1:
            parser.error("--json needs one --target.")
        for row in compile_here(options.target[0]):
            print(json.dumps(asdict(row)), flush=True)
        return
    refusals = {target: why_not(target) for target in options.target}
    for target, sentence in refusals.items():
        if sentence is not None:
            print(f"{target} is left as it is: {sentence}", file=sys.stderr)
    targets = [target for target, sentence in refusals.items() if sentence is None]
    with ThreadPoolExecutor(2) as pool:
        rows = dict(zip(targets, pool.map(compile_for, targets), strict=True))
    sections = {target: section(target, of_target) for target, of_target in rows.items()}
    if options.write:
        sections = {target: sections.get(target) or committed(target)[1] for target in LIMITS}
        PAGE.write_text("\n".join([head(), *sections.values()]))
    else:
        print("\n".join([head(), *sections.values()]), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
