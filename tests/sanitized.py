"""The Triton kernels executed by ttsem: bounds, races between programs, uninitialised reads, bfloat16; without a GPU.

    python -m ttsem.sanitize pytest tests/sanitized.py

ttsem compiles every launch to Triton's IR, executes that on CPU tensors, and reports an access outside of a tensor and
an element that two programs of a launch write, or one writes and another reads; memory that nobody wrote is NaN. It
calls every tensor a CUDA tensor, so this takes a process of its own, which tests/test_sanitized.py starts. Tiles,
groups and workspace are cut down until problems of a hundred rows have several of each, with tails.

The kernels as they are pass. Each of FAULTS, a change of their source, must be reported, or fail the comparison. Races
between the threads of one program are beyond ttsem: no test here would miss a tl.debug_barrier.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import problems
import pytest
import torch
from tolerance import judge
from torch import Tensor
from triton import knobs

from __main__ import KernelFault  # python -m has a ttsem.sanitize of its own, with other classes
from contrastive_ops.ops.arguments import per_row

SOURCES = Path(__file__).parents[1] / "kernels"
PACKAGE = "contrastive_ops.kernels"
SHAPE = (130, 150, 20)  # N, M, D: tails of every tile, and N < M
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def shrink(kernels: ModuleType) -> None:
    """Several tiles in a group and a strip, several of these, several blocks of the workspace, several steps of D."""
    small = {"GROUPS": 3, "WORKSPACE": 96, "MERGE": 64}
    for name, value in small.items():
        assert hasattr(kernels, name), f"{kernels.__name__} has no {name} any more"
        setattr(kernels, name, value)
    kernels.TILINGS = _with_small_tiles(kernels.TILINGS)


def _with_small_tiles(tilings: Any) -> Any:
    if isinstance(tilings, dict):
        return {key: _with_small_tiles(value) for key, value in tilings.items()}
    return tilings._replace(block_m=32, block_n=32, block_d=16)


Load = Callable[..., ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Import the kernels of an op from a folder, in the place of the package's own."""

    def load_from(op: str, folder: Path = SOURCES) -> ModuleType:
        for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
            monkeypatch.delitem(sys.modules, name)
        package = ModuleType(PACKAGE)
        package.__path__ = [str(folder)]
        monkeypatch.setitem(sys.modules, PACKAGE, package)
        kernels = importlib.import_module(f"{PACKAGE}.{op}")
        shrink(kernels)
        return kernels

    return load_from


@pytest.fixture(autouse=True)
def _only_the_ir(monkeypatch: pytest.MonkeyPatch) -> None:
    """ttsem asks Triton for a whole compilation, and reads its first stage: a third of the time without the rest."""

    def no_binary(_ir: Any, metadata: dict[str, Any]) -> bytes:
        metadata.update(name="", shared=0)
        return b""

    def keep_the_ir(*arguments: Any) -> tuple[str, str] | None:
        if not arguments:  # what tells these compilations from others in Triton's cache
            return "only the IR", ""
        _backend, stages, *_ = arguments
        for name in ("ttgir", "llir", "ptx"):
            del stages[name]
        stages["cubin"] = no_binary
        return None

    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", keep_the_ir)


class Launched(torch.autograd.Function):
    """The autograd of contrastive_ops.ops.autograd around the launchers themselves, with no dispatcher between."""

    @staticmethod
    def forward(ctx, kernels, gradients, *arguments):
        row_max, col_max, row_log_sum, col_log_sum, *others = kernels.forward(*arguments)
        tensors = [argument for argument in arguments if not isinstance(argument, bool)]
        ctx.save_for_backward(row_max, col_max, row_log_sum, col_log_sum, *tensors)
        ctx.kernels, ctx.gradients, ctx.flags = kernels, gradients, arguments[len(tensors) :]
        ctx.mark_non_differentiable(row_max, col_max)
        return (row_max + row_log_sum, col_max + col_log_sum, *others, row_max, col_max)

    @staticmethod
    def backward(ctx, *grads):
        *incoming, _row_max, _col_max = grads
        needs = list(ctx.needs_input_grad[2 : 2 + ctx.gradients])
        results = ctx.kernels.backward(*incoming, *ctx.saved_tensors, *ctx.flags, needs)
        wanted = [result if need else None for result, need in zip(results, needs, strict=True)]
        return (None, None, *wanted, *[None] * (len(ctx.needs_input_grad) - 2 - len(wanted)))


def similarity_logsumexp(
    x: Tensor,
    y: Tensor | None = None,
    *,
    kernels: ModuleType,
    ids: str = "exclude",
    rows: bool = True,
    cols: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    sizes = {"row": len(x), "col": len(x if y is None else y)}
    vectors = [per_row(name, options.get(name), sizes[name[:3]], x, "x") for name in problems.VECTORS]
    indices = [options.get(name) for name in ("exclude", "row_ids", "col_ids")]
    row_lse, col_lse, excluded, row_max, col_max = Launched.apply(
        kernels, len(vectors) + 2, x, y, *vectors, *indices, ids == "restrict", rows, cols
    )
    return problems.requested((row_lse, col_lse, row_max, col_max, excluded), rows, cols, indices[0] is not None)


class Op(NamedTuple):
    names: tuple[str, ...]
    problem: Callable[..., tuple[tuple[Tensor, ...], dict[str, Any]]]  # of a name, a shape and a dtype
    launched: Callable[..., tuple[Tensor, ...]]
    naive: Callable[..., tuple[Tensor, ...]]


OPS = {
    "similarity_logsumexp": Op(
        ("rows", "cols", "both", "row_scale-0d", "col_bias-vector", "vectors", "exclude", "ids-restrict-sorted",
         "everything", "everything-restrict", "self", "self-row_scale-vector", "self-ids-restrict-sorted",
         "self-everything", "self-everything-restrict"),
        problems.problem, similarity_logsumexp, problems.naive,
    ),
}  # fmt: skip
CASES = [(op, name, dtype) for op in OPS for name in OPS[op].names for dtype in DTYPES]


def check(op: str, name: str, dtype: torch.dtype, kernels: ModuleType, shape: tuple[int, ...] = SHAPE) -> None:
    problem, launched, naive = OPS[op][1:]
    arguments, options = problem(name, *shape, dtype)
    judge(launched, naive, arguments, options, fused_options={"kernels": kernels})


@pytest.mark.parametrize(("op", "name", "dtype"), CASES)
def test_kernels(op, name, dtype, load):
    check(op, name, dtype, load(op))


# D of many steps, N > M
@pytest.mark.parametrize("name", ["everything", "self-everything"])
def test_many_features(name, load):
    check("similarity_logsumexp", name, torch.bfloat16, load("similarity_logsumexp"), (101, 70, 150))


@pytest.mark.parametrize("wanted", ["argument0", "argument1", "row_scale", "col_bias"])
def test_one_gradient(wanted, load):
    arguments, options = problems.problem("everything", *SHAPE)
    for name, value in {"argument0": arguments[0], "argument1": arguments[1], **options}.items():
        if isinstance(value, Tensor) and value.requires_grad:
            value.requires_grad_(name == wanted)
    kernels = load("similarity_logsumexp")
    judge(similarity_logsumexp, problems.naive, arguments, options, fused_options={"kernels": kernels})


class Fault(NamedTuple):
    """A change of a kernel's source, the case that shows it, and what catches it.

    "value" is the comparison with the float64 truth, "nan" the same where memory was read that nobody wrote or an empty
    set went wrong; the rest are ttsem's reports of an access to a tensor.
    """

    old: str
    new: str
    case: str
    caught: str
    dtype: torch.dtype = torch.float32
    op: str = "similarity_logsumexp"


FAULTS = {
    "load without its mask": Fault(
        "tl.load(vector + index, mask=index < size, other=otherwise)",
        "tl.load(vector + index)",
        "vectors", "oob_read of row_scale",
    ),
    "load with half of its mask": Fault(
        "mask=(rows[:, None] < n) & inside",
        "mask=rows[:, None] < n",
        "both", "oob_read of x",
    ),
    "stride of another matrix": Fault(
        "x + rows.to(tl.int64)[:, None] * features",
        "x + rows.to(tl.int64)[:, None] * n",
        "both", "oob_read of x",
    ),
    "store without its mask": Fault(
        "tl.store(out_max + index, best, mask=index < size)",
        "tl.store(out_max + index, best)",
        "both", "oob_write of out_max",
    ),
    "offset of the next tile": Fault(
        "tile_row.to(tl.int64) * block_cols",
        "(tile_row.to(tl.int64) + 1) * block_cols",
        "vectors", "oob_write of col_scale_part",
    ),
    "tiles that store into their neighbours": Fault(
        "coefficients.dtype.element_ty), mask=inside)",
        "coefficients.dtype.element_ty))",
        "both", "race of coefficients",
    ),
    "strips that share their partials": Fault(
        "own_row_max = row_max + strip.to(tl.int64) * n",
        "own_row_max = row_max",
        "rows", "race of row_max",
    ),
    "groups that share their partials": Fault(
        "col_sum + group.to(tl.int64) * m + cols",
        "col_sum + cols",
        "cols", "race of col_sum",
    ),
    "tiles that share their partial sums": Fault(
        "row_scale_part + row_place",
        "row_scale_part + local_rows",
        "vectors", "race of row_scale_part",
    ),
    "statistics that start as they were": Fault(
        'tl.store(own_row_max + rows, tl.full((BLOCK_M,), -float("inf"), tl.float32), mask=rows < n)',
        "pass",
        "rows", "nan",
    ),
    "partial sums that nobody writes": Fault(
        "tl.store(col_bias_part + col_place, tl.sum(gradient, 0), mask=local_cols < block_cols)",
        "pass",
        "col_bias-vector", "nan",
    ),
    "empty sets that are not told apart": Fault(
        'tl.where(maximum == -float("inf"), 0.0, maximum)',
        "maximum",
        "ids-restrict-sorted", "nan",
    ),
    "one part that is not merged": Fault("range(parts)", "range(parts - 1)", "rows", "value"),
    "mirror images that are not merged": Fault("range(mirrors)", "range(0)", "self", "value"),
    "diagonal that counts twice": Fault(
        "tl.where(row < col, tile_col",
        "tl.where(row <= col, tile_col",
        "self", "value",
    ),
    "diagonal that counts twice in the gradient": Fault(
        "mirrored and first_row != first_col",
        "mirrored",
        "self", "value",
    ),
    "columns of the first block in all blocks": Fault("first_col + local_cols", "local_cols", "both", "value"),
    "blocks that overwrite the gradient": Fault("grad_x[row_range] +=", "grad_x[row_range] =", "both", "value"),
    "no scale of the columns": Fault(
        "[:, None] * vector_or(col_scale, cols, m, 1.0)[None, :]",
        "[:, None]",
        "vectors", "value",
    ),
    "no scale of the columns in the gradient": Fault(
        "gradient * (a[:, None] * b[None, :])",
        "gradient * a[:, None]",
        "vectors", "value",
    ),
    "products rounded to bfloat16": Fault(
        "dots, input_precision=PRECISION)",
        "dots, input_precision=PRECISION).to(x_tile.dtype).to(tl.float32)",
        "both", "value", torch.bfloat16,
    ),
    "products in TF32": Fault("input_precision=PRECISION", 'input_precision="tf32"', "both", "value"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name, load, tmp_path):
    fault = FAULTS[name]
    assert (fault.op, fault.case, fault.dtype) in CASES, "without the fault, nobody runs its case"
    places = 0
    for path in SOURCES.glob("*.py"):
        source = path.read_text()
        places += source.count(fault.old)
        (tmp_path / path.name).write_text(source.replace(fault.old, fault.new))
    assert places > 0, f'"{name}" changes nothing: no kernel has {fault.old!r} any more'
    kernels = load(fault.op, tmp_path)
    with pytest.raises((KernelFault, AssertionError)) as caught:
        check(fault.op, fault.case, fault.dtype, kernels)
    assert what_caught(caught.value) == fault.caught, caught.value


def what_caught(report: BaseException) -> str:
    if isinstance(report, KernelFault):
        return f"{report.fault.kind} of {report.fault.buffer}"
    return "nan" if "candidate nan" in str(report) else "value"
