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

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import problems
import pytest
import test_volume_logsumexp as volumes
import torch
from tolerance import judge
from torch import Tensor
from triton import knobs
from ttsem import mlir

from __main__ import KernelFault  # python -m has a ttsem.sanitize of its own, with other classes
from contrastive_ops import backends
from contrastive_ops.backends import tiled, trust
from contrastive_ops.ops.arguments import per_row

KERNELS = Path(__file__).parents[1] / "kernels"
HOST = Path(backends.sweep.__file__)
PACKAGE, SWEEP = "contrastive_ops.kernels", "contrastive_ops.backends.sweep"
# N, M, D: tails of every tile, and N < M; of volumes N > M, where some rows name no column to leave out
PAIRS, VOLUMES = (130, 150, 20), (100, 60, 20)
PROGRAMS = 9  # 3 groups of rows and 3 strips of columns
WORKSPACE = 96  # rows and columns, of every dtype; of tuples of four vectors 48, which have one tile of rows
ONE_BLOCK = (70, 60, 20)  # N below WORKSPACE, and not a whole tile: the workspace ends where the block does
EMPTY_ROWS = (70, 30, 20)  # ids that no column has; two strips
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Engine(NamedTuple):
    """The modules of the engine, host side and Triton's."""

    sweep: ModuleType
    launch: ModuleType
    tilings: ModuleType


def shrink(engine: Engine) -> None:
    """Several tiles in a group and a strip, several of these, several blocks of the workspace, several steps of D."""
    # PROGRAMS counts where the device doesn't say, and ttsem's device says; in backward its tensors are the CPU's
    small = (
        (engine.tilings, "device_class", lambda _x: "sm_90"),
        (engine.sweep, "WORKSPACE", WORKSPACE),
        (engine.launch, "MERGE", 64),
        (engine.launch.TritonKernels, "programs", lambda _self, _x: PROGRAMS),
    )
    for owner, name, value in small:
        assert hasattr(owner, name), f"{owner.__name__} has no {name} any more"
        setattr(owner, name, value)
    engine.tilings.TILINGS = {
        device: {size: _small(tilings) for size, tilings in of_device.items()}
        for device, of_device in engine.tilings.TILINGS.items()
    }


def _small(tilings: Any) -> Any:
    """Tiles of two widths: where they are square, nothing tells rows from columns."""
    sizes = {"block_m": 32, "block_n": 16, "block_d": 16}
    of_kernels = {name: tiling for name, tiling in tilings._asdict().items() if isinstance(tiling, tuple)}
    return tilings._replace(**{name: tiling._replace(**sizes) for name, tiling in of_kernels.items()})


Load = Callable[..., Engine]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Import the engine from the files of its kernels and of its host side, in the place of the package's own."""

    def load_from(kernels: Path = KERNELS, host: Path = HOST) -> Engine:
        for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
            monkeypatch.delitem(sys.modules, name)
        package = ModuleType(PACKAGE)
        package.__path__ = [str(kernels)]
        monkeypatch.setitem(sys.modules, PACKAGE, package)
        spec = importlib.util.spec_from_file_location(SWEEP, host)
        sweep = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, SWEEP, sweep)
        spec.loader.exec_module(sweep)
        engine = Engine(sweep, *(importlib.import_module(f"{PACKAGE}.{name}") for name in ("launch", "tilings")))
        shrink(engine)
        return engine

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


parsed = functools.lru_cache(32)(mlir.parse)


@pytest.fixture(autouse=True)
def _parse_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """ttsem parses the IR of every launch, which takes as long as to execute it; the blocks of a backward share one."""
    monkeypatch.setattr(mlir, "parse", parsed)


class Launched(torch.autograd.Function):
    """The autograd of contrastive_ops.ops.autograd around the op's functions, with no dispatcher between."""

    @staticmethod
    def forward(ctx, engine, op, gradients, *arguments):
        names = trust._SWEEPS[op]
        run = getattr(engine.sweep, f"{op}_forward")
        kernels, needs = engine.launch.TritonKernels(), list(ctx.needs_input_grad[3 : 3 + gradients])
        given = (*names.statistics, "kept", *names.others, *names.results)
        outputs = dict(zip(given, run(kernels, *arguments, needs), strict=True))
        tensors = [argument for argument in arguments if argument is None or isinstance(argument, Tensor)]
        ctx.save_for_backward(*(outputs[name] for name in (*names.statistics, "kept", *names.saved)), *tensors)
        ctx.run = functools.partial(getattr(engine.sweep, f"{op}_backward"), kernels)
        ctx.gradients, ctx.flags = gradients, arguments[len(tensors) :]
        maxima = [outputs[name] for name in names.statistics[:2]]
        ctx.outputs = len(names.results) + len(names.others)
        ctx.mark_non_differentiable(*maxima)
        return tuple(outputs[name] for name in (*names.results, *names.others)) + tuple(maxima)

    @staticmethod
    def backward(ctx, *grads):
        needs = list(ctx.needs_input_grad[3 : 3 + ctx.gradients])
        results = ctx.run(*grads[: ctx.outputs], *ctx.saved_tensors, *ctx.flags, needs)
        wanted = [result if need else None for result, need in zip(results, needs, strict=True)]
        return (None, None, None, *wanted, *[None] * (len(ctx.needs_input_grad) - 3 - len(wanted)))


def pairs(
    op: problems.Op,
    *features: Tensor,
    engine: Engine,
    ids: str = "exclude",
    rows: bool = True,
    cols: bool = False,
    guide: Any = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """What an op over pairs gives, in the order of its `naive`."""
    alone = len(features) == 1
    x, y, u, v = (*features, *[None] * (4 - len(features)))
    u = options.get("u", u)
    sizes = {"row": len(x), "col": len(x if y is None else y)}

    def vectors(form: str = "") -> list[Tensor | None]:
        return [per_row(name, options.get(form + name), sizes[name[:3]], x, "x") for name in problems.VECTORS]

    indices = [options.get(name) for name in ("exclude", "row_ids", "col_ids")]
    restrict, above = ids == "restrict", options.get("keep") == "above"
    if op.name == "similarity_expectation":
        given = (x, y, *vectors(), u, v, *vectors("teacher_"), *indices, restrict, rows, cols)
    else:
        guides = (None, None) if guide is None else (guide, None) if alone else guide
        ceilings = [
            per_row("row_bias", options.get(name), sizes[side], x, "x")
            for name, side in (("ceiling", "row"), ("col_ceiling", "col"))
        ]
        of = () if op.of is None else (op.of,)
        given = (x, y, *vectors(), *indices, *guides, *ceilings, restrict, above, rows, cols, *of)
    outputs = Launched.apply(engine, op.name, 12 if op.name == "similarity_expectation" else 6, *given)
    if op == problems.LOGSUMEXP:
        row_lse, col_lse, excluded, row_max, col_max = outputs
        return problems.requested((row_lse, col_lse, row_max, col_max, excluded), rows, cols, indices[0] is not None)
    asked = (rows, cols, rows, cols) if op in problems.EXPECTATIONS else (rows, cols, indices[0] is not None)
    return tuple(value for value, wanted in zip(outputs, asked, strict=False) if wanted)


def volume_logsumexp(
    anchor: Tensor,
    tuples: Tensor,
    *,
    engine: Engine,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    exclude: Tensor | None = None,
    rows: bool = True,
    cols: bool = False,
    totals: bool = False,
) -> tuple[Tensor, ...]:
    row_lse, col_lse, row_total, col_total, row_max, col_max = Launched.apply(
        engine, "volume_logsumexp", 4, anchor, tuples, row_scale, col_scale, exclude, rows, cols, totals
    )
    return volumes.requested((row_lse, col_lse, row_max, col_max, row_total, col_total), rows, cols, totals)


def pair_problem(
    op: problems.Op, name: str, n: int, m: int, d: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    kind, _, other = name.partition("-")
    if kind == "frozen":
        arguments, options = problems.frozen(other, n, m, d, dtype)
    elif kind == "scaled":  # without scales every tile is masked
        arguments, options = problems.problem(other, n, m, d, dtype)
        options |= {"row_scale": 1.25}
    else:
        return op.problem(name, n, m, d, dtype)
    return arguments, options if op.of is None else options | {"of": op.of}


def volume_problem(name: str, n: int, m: int, d: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    members, _, kind = name.partition("-")
    (anchor, tuples), options = volumes.problem(n, m, int(members), d, dtype)
    if kind == "zeros":  # where a distance is 0 its gradient is, too
        with torch.no_grad():
            anchor[::7] = 0
            tuples[::5, -1] = 0
    if kind == "unscaled":
        options |= {"row_scale": None, "col_scale": None, "exclude": None}
    return (anchor, tuples), options | {
        "rows": {"cols": False},
        "cols": {"rows": False},
        "no totals": {"totals": False},
    }.get(kind, {})


def of_pairs(op: problems.Op, *names: str) -> Op:
    return Op(names, functools.partial(pair_problem, op), functools.partial(pairs, op), op.naive)


class Op(NamedTuple):
    names: tuple[str, ...]
    problem: Callable[..., tuple[tuple[Tensor, ...], dict[str, Any]]]  # of a name, a shape and a dtype
    launched: Callable[..., tuple[Tensor, ...]]
    naive: Callable[..., tuple[Tensor, ...]]


OPS = {
    "similarity_logsumexp": of_pairs(
        problems.LOGSUMEXP,
        "rows", "cols", "both", "row_scale-0d", "col_bias-vector", "vectors", "exclude", "exclude-diagonal",
         "ids-exclude-sorted", "ids-restrict-sorted",
         "everything", "everything-restrict", "self", "self-row_scale-vector", "self-ids-restrict-sorted",
         "self-everything", "self-everything-restrict", "guide-everything",
    ),
    "similarity_sum": of_pairs(
        problems.SUMS[1], "everything", "self-everything", "guide-everything", "self-guide-own_logits"
    ),
    "similarity_expectation": of_pairs(problems.EXPECTATIONS[0], "everything", "self-everything-restrict"),
    "tilted": of_pairs(problems.EXPECTATIONS[1], "everything", "self-everything"),
    "volume_logsumexp": Op(
        ("1", "2", "4", "2-rows", "2-cols", "2-no totals"),
        volume_problem, volume_logsumexp, volumes.naive,
    ),
}  # fmt: skip
CASES = [
    *((op, name, dtype) for op in OPS for name in OPS[op].names for dtype in DTYPES),
    *(
        ("similarity_logsumexp", f"frozen-{name}", dtype)
        for name in ("rows", "ids-restrict-sorted", "ids-restrict-far", "everything")
        for dtype in DTYPES[1:]
    ),
    *(
        ("similarity_logsumexp", f"scaled-{name}", torch.float32)
        for name in ("rows", "cols", "exclude", "ids-exclude-sorted", "ids-restrict-sorted")
    ),
    *(("similarity_sum", f"frozen-{name}", torch.float16) for name in ("rows", "everything")),
    ("volume_logsumexp", "3", torch.bfloat16),
    ("volume_logsumexp", "2-unscaled", torch.float32),
    ("volume_logsumexp", "2-zeros", torch.float32),
    ("volume_logsumexp", "2-zeros", torch.float16),
]


def shape_of(op: str) -> tuple[int, ...]:
    return VOLUMES if op == "volume_logsumexp" else PAIRS


def of_dtype(engine: Engine, dtype: torch.dtype) -> Engine:
    """With blocks of WORKSPACE rows: WORKSPACE of the engine counts 16-bit elements."""
    engine.sweep.WORKSPACE = WORKSPACE * dtype.itemsize // 2
    return engine


def check(op: str, name: str, dtype: torch.dtype, engine: Engine, shape: tuple[int, ...] | None = None) -> None:
    _, problem, launched, naive = OPS[op]
    arguments, options = problem(name, *(shape or shape_of(op)), dtype)
    judge(launched, naive, arguments, options, fused_options={"engine": of_dtype(engine, dtype)})


@pytest.mark.parametrize(("op", "name", "dtype"), CASES)
def test_kernels(op, name, dtype, load):
    check(op, name, dtype, load())


# D of many steps, which no 16-bit gradient has in registers, and N > M
@pytest.mark.parametrize("name", ["everything", "self-everything"])
def test_many_features(name, load):
    check("similarity_logsumexp", name, torch.bfloat16, load(), (101, 70, 150))


@pytest.mark.parametrize(("op", "name"), [("similarity_logsumexp", "both"), ("volume_logsumexp", "1")])
def test_one_block(op, name, load):
    check(op, name, torch.float32, load(), ONE_BLOCK)


def test_empty_rows(load):
    check("similarity_logsumexp", "frozen-ids-restrict-far", torch.bfloat16, load(), EMPTY_ROWS)


@pytest.mark.parametrize(("name", "dtype"), [("everything", torch.float16), ("self-everything", torch.bfloat16)])
def test_blocks_of_16_bits(name, dtype, load, monkeypatch):
    engine = load()
    monkeypatch.setattr(engine.tilings, "ROWS_FEATURES", 0)
    check("similarity_logsumexp", name, dtype, engine)


@pytest.mark.parametrize(
    ("dtype", "d", "by_descriptors"),
    [(torch.float32, 20, True), (torch.float32, 21, False), (torch.bfloat16, 136, True), (torch.bfloat16, 140, False)],
)
def test_features_by_descriptors_and_by_pointers(dtype, d, by_descriptors, load, monkeypatch):
    """Rows of whole 16 bytes have tensor descriptors; and of 16 bits more features than rows_kernel takes."""
    engine, taken = load(), set()
    inputs = engine.launch.inputs

    def counted(*arguments):
        given, described = inputs(*arguments)
        taken.add(described)
        return given, described

    monkeypatch.setattr(engine.launch, "inputs", counted)
    check("similarity_logsumexp", "everything", dtype, engine, (100, 70, d))
    assert taken == {by_descriptors}


def test_one_strip(load):
    """Ten tiles of rows fill the launch that has dX; dY has two tiles of rows, in several strips."""
    check("similarity_logsumexp", "everything", torch.float16, load(), (300, 40, 20))


@pytest.mark.parametrize(
    ("op", "name", "dtype", "wanted"),
    [
        ("similarity_logsumexp", "everything", torch.float32, "argument0"),
        ("similarity_logsumexp", "everything", torch.float32, "col_bias"),
        ("similarity_logsumexp", "everything", torch.float16, "argument1"),
        ("similarity_logsumexp", "everything", torch.float16, "row_scale"),
        ("volume_logsumexp", "2", torch.float16, "argument0"),
        ("volume_logsumexp", "2", torch.float16, "argument1"),
        ("volume_logsumexp", "2", torch.float32, "col_scale"),
    ],
)  # fmt: skip
def test_one_gradient(op, name, dtype, wanted, load):
    _, problem, launched, naive = OPS[op]
    arguments, options = problem(name, *shape_of(op), dtype)
    for key, value in {"argument0": arguments[0], "argument1": arguments[1], **options}.items():
        if isinstance(value, Tensor) and value.requires_grad:
            value.requires_grad_(key == wanted)
    judge(launched, naive, arguments, options, fused_options={"engine": of_dtype(load(), dtype)})


@pytest.mark.parametrize("noise", [None, 7])
def test_best(noise, load):
    """Some strips have fewer columns than are wanted, and the whole has fewer than two sweeps find."""
    engine = load()
    engine.sweep.MOST_CANDIDATES = 16
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-1, 2, (size, 20), generator=generator).float() for size in (70, 50))
    options = (None, None, None, None, torch.arange(70), None, None, False, 20, True, noise)
    values, indices = engine.sweep.similarity_topk_forward(engine.launch.TritonKernels(), x, y, *options)
    right = tiled.similarity_topk_forward(x, y, *options)
    assert torch.equal(indices, right[1])
    torch.testing.assert_close(values, right[0])


class Fault(NamedTuple):
    """A change of a kernel's source, the case that shows it, and what catches it.

    "value" is the comparison with the float64 truth, "nan" the same where memory was read that nobody wrote or an empty
    set went wrong. The rest are ttsem's reports of an access to a tensor, or to one of a tuple of tensors: "poison" is
    a store of two values to one place.
    """

    old: str
    new: str
    case: str
    caught: str
    dtype: torch.dtype = torch.float32
    op: str = "similarity_logsumexp"
    shape: tuple[int, ...] | None = None  # where it is not that of the case


VOLUME, TEACHER = "volume_logsumexp", "similarity_expectation"
FAULTS = {
    # one tile
    "load without its mask": Fault(
        "tl.load(vectors.col_scale + cols, mask=cols < m, other=1.0)",
        "tl.load(vectors.col_scale + cols)",
        "vectors", "oob_read of vectors",
    ),
    "load with half of its mask": Fault(
        "mask=(rows[:, None] < n) & inside",
        "mask=rows[:, None] < n",
        "both", "oob_read of x", torch.bfloat16,
    ),
    "stride of another matrix": Fault(
        "x + rows.to(tl.int64)[:, None] * features",
        "x + rows.to(tl.int64)[:, None] * n",
        "both", "oob_read of x", torch.bfloat16,
    ),
    "rows of another tile by a descriptor": Fault("x.load([row, begin])", "x.load([col, begin])", "both", "value"),
    "first features alone by a descriptor": Fault("y.load([col, begin])", "y.load([col, 0])", "both", "value"),
    "empty sets that are not told apart": Fault(
        'tl.where(maximum == -float("inf"), 0.0, maximum)',
        "maximum",
        "ids-restrict-sorted", "nan",
    ),
    "no scale of the columns": Fault(
        "scaled_by_cols(scaled_by_rows(pairs, vectors, rows, n), vectors, cols, m)",
        "scaled_by_rows(pairs, vectors, rows, n)",
        "vectors", "value",
    ),
    "pairs left out without the gradient of their own logit": Fault(
        "if has:  # those", "if False:  # those", "exclude", "value", torch.float16
    ),
    "tiles with a pair left out that are not masked": Fault(
        "leaves_out = has |", "leaves_out =", "scaled-exclude", "value"
    ),
    "tiles with the last row that are not masked": Fault("| (row + BLOCK_M > n)", "", "scaled-cols", "value"),
    "tiles with the last column that are not masked": Fault("| (col + BLOCK_N > m)", "", "scaled-rows", "value"),
    "tiles with other ids that are not masked": Fault(
        "leaves_out | RESTRICT | may_be_equal(of_rows, of_cols)", "leaves_out", "scaled-ids-restrict-sorted", "value"
    ),
    "tiles with equal ids that are not masked": Fault(
        "| RESTRICT | may_be_equal(of_rows, of_cols)", "| RESTRICT", "scaled-ids-exclude-sorted", "value"
    ),
    "columns left out before those that a tile knows of": Fault(
        "(of_rows.first_excluded < col + BLOCK_N)", "(of_rows.first_excluded < col)", "exclude-diagonal", "value"
    ),
    "columns left out after those that a tile knows of": Fault(
        "(of_rows.last_excluded >= col)", "(of_rows.last_excluded >= col + BLOCK_N)", "exclude-diagonal", "value"
    ),
    "rows left out before those that a tile knows of": Fault(
        "(of_cols.first_excluded < row + BLOCK_M)",
        "(of_cols.first_excluded < row)",
        "exclude-diagonal", "value", torch.float16,
    ),
    "rows left out after those that a tile knows of": Fault(
        "(of_cols.last_excluded >= row)",
        "(of_cols.last_excluded >= row + 16)",
        "exclude-diagonal", "value", torch.float16,
    ),
    "columns left out without their mask": Fault(
        "tl.load(exclude + index, mask=index < size, other=-1)",
        "tl.load(exclude + index)",
        "exclude", "oob_read of vectors",
    ),
    "the next row left out by a column": Fault(
        "[None, :] == rows[:, None]", "[None, :] + 1 == rows[:, None]", "self-everything", "value"
    ),
    "ids without their mask": Fault(
        "tl.load(vectors.col_ids + cols, mask=cols < m, other=0)",
        "tl.load(vectors.col_ids + cols)",
        "everything", "oob_read of vectors",
    ),
    "ids of a tile without their mask": Fault(
        "tl.load(ids + index, mask=index < size, other=NONE)",
        "tl.load(ids + index)",
        "everything-restrict", "oob_read of vectors", torch.float16,
    ),
    "tiles with one id in common that are left out": Fault(
        "(of_rows.first_id <= of_cols.last_id)",
        "(of_rows.first_id < of_cols.last_id)",
        "ids-restrict-sorted", "value",
    ),
    "products rounded to bfloat16": Fault(
        "dots, input_precision=PRECISION)",
        "dots, input_precision=PRECISION).to(x_tile.dtype).to(tl.float32)",
        "both", "value", torch.bfloat16,
    ),
    "products in TF32": Fault("input_precision=PRECISION", 'input_precision="tf32"', "both", "value"),
    # forward
    "strips that share their partials": Fault(
        "row_begin = strip.to(tl.int64) * n",
        "row_begin = tl.cast(0, tl.int64)",
        "rows", "race of row_part",
    ),
    "groups that share their partials": Fault(
        "col_begin = group.to(tl.int64) * m",
        "col_begin = tl.cast(0, tl.int64)",
        "cols", "race of col_part",
    ),
    "statistics beyond the last row": Fault(
        "tl.store(part[k] + begin + index, state[0], mask=inside)",
        "tl.store(part[k] + begin + index, state[0])",
        "rows", "oob_write of row_part",
    ),
    "statistics that start as they were": Fault(
        "store_state(col_part, 0, cols, cols < col_begin + m, empty_state(col_part, BLOCK_N))",
        "pass",
        "cols", "nan",
    ),
    "statistics of another column": Fault(
        "tl.arange(0, BLOCK), 0)", "BLOCK - 1 - tl.arange(0, BLOCK), 0)", "cols", "value"
    ),
    "sums that stay relative to the shift of their tile": Fault("total * factor", "total", "both", "value"),
    "diagonal that counts twice": Fault(
        "state_if(row + BLOCK_M <= col,",
        "state_if(row <= col,",
        "self", "value",
    ),
    "tiles on the diagonal that are left out": Fault(
        "begin = tl.maximum(first_col, row)",
        "begin = tl.maximum(first_col, row + BLOCK_M)",
        "self", "value",
    ),
    "store without its mask": Fault(
        "tl.store(out_max + index, best, mask=index < size)",
        "tl.store(out_max + index, best)",
        "both", "oob_write of out_max",
    ),
    "one part that is not merged": Fault("range(parts)", "range(parts - 1)", "rows", "value"),
    "mirror images that are not merged": Fault(
        "join_parts(mirror, mirrors, ", "join_parts(mirror, 0, ", "self", "value"
    ),
    # what other reductions fold
    "moments that stay relative to the shift of their tile": Fault(
        "row_moment = relative_to(row_max, row_moment, shift)", "pass", "everything", "value", op=TEACHER
    ),
    "weights of 0 that count": Fault(
        "tl.where(weight == 0.0, 0.0, weight * values)", "weight * values", "everything", "nan", op=TEACHER
    ),
    "coefficients of the teacher in the place of the others": Fault(
        "of_teacher = coefficients + tl.cast", "of_teacher = coefficients + 0 * tl.cast",
        "everything", "value", op=TEACHER,
    ),
    "width of the pairs for that of the teacher": Fault(
        "dot_products(u, v, width, rows, cols, n, m, width,", "dot_products(u, v, width, rows, cols, n, m, 20,",
        "everything", "value", torch.bfloat16, op=TEACHER,
    ),
    "means of the first form for its own teacher": Fault(
        "gradient += of_logits + of_others", "gradient += of_logits", "everything", "value", op="tilted"
    ),
    "ceilings without their mask": Fault(
        "tl.load(second.row_ceiling + rows, mask=rows < n, other=0.0)", "tl.load(second.row_ceiling + rows)",
        "guide-everything", "oob_read of second", op="similarity_sum",
    ),
    "pairs above the ceilings for those below": Fault(
        "m) == ABOVE", "m) != ABOVE", "guide-everything", "value", op="similarity_sum"
    ),
    "sums of pairs that take no part": Fault(
        "function_of(logits, REDUCTION), others, 0.0", "function_of(logits, REDUCTION), others, 1.0",
        "everything", "value", op="similarity_sum",
    ),
    # the logits that were left out
    "columns of rows that leave out none": Fault(
        "inside = named[:, None] & (",
        "inside = (rows[:, None] < n) & (",
        "exclude", "oob_read of y",
    ),
    "scale of the column of rows that leave out none": Fault(
        "tl.load(vectors.col_scale + index, mask=named, other=1.0)",
        "tl.load(vectors.col_scale + index, mask=rows < n, other=1.0)",
        "everything", "oob_read of vectors",
    ),
    "features beyond the last of the column left out": Fault(
        "mask=inside, other=0.0)\n        dots +=",
        "mask=named[:, None], other=0.0)\n        dots +=",
        "exclude", "oob_read of y",
    ),
    # backward by blocks
    "tiles that store beyond their block": Fault(
        "weighted.to(coefficients.dtype.element_ty), mask=inside)",
        "weighted.to(coefficients.dtype.element_ty))",
        "both", "oob_write of coefficients", shape=ONE_BLOCK,
    ),
    "offset of the next tile": Fault(
        "tile_row.to(tl.int64) * block_cols",
        "(tile_row.to(tl.int64) + 1) * block_cols",
        "vectors", "oob_write of col_sums",
    ),
    "tiles that share their partial sums": Fault(
        "row_scale + row_place",
        "row_scale + local_rows",
        "vectors", "race of row_sums",
    ),
    "partial sums that nobody writes": Fault(
        "tl.store(col_bias + col_place, tl.sum(gradient, 0), mask=local_cols < block_cols)",
        "pass",
        "col_bias-vector", "nan",
    ),
    "diagonal that counts twice in the gradient": Fault(
        "mirror = mirrored and first_row != first_col",
        "mirror = mirrored",
        "self", "value",
    ),
    "columns of the first block in all blocks": Fault("first_col + local_cols", "local_cols", "both", "value"),
    "blocks that overwrite the gradient": Fault(
        "coefficients, y, total.begins(part))", "coefficients, y, True)", "both", "value"
    ),
    "gradient that starts as it was": Fault(
        "coefficients, y, total.begins(part))", "coefficients, y, False)", "both", "nan"
    ),
    "sums of blocks that start as they were": Fault("if total.begins(part):", "if False:", "vectors", "nan"),
    "no scale of the columns in the gradient": Fault(
        "weighted = scaled_by_cols(gradient, vectors, cols, m)",
        "weighted = gradient",
        "vectors", "value",
    ),
    # products of equal ids
    "product that takes tiles that nobody wrote": Fault(
        "if is_needed(of_rows, of_cols, has, RESTRICT):\n            within",
        "if True:\n            within",
        "ids-restrict-sorted", "nan",
    ),
    "product that leaves out tiles with an excluded pair": Fault(
        "is_needed(of_rows, of_cols, has, RESTRICT):\n            within",
        "is_needed(of_rows, of_cols, False, RESTRICT):\n            within",
        "everything-restrict", "value",
    ),
    "sides of the whole in the product of the columns": Fault(
        "of_cols = problem if members else problem.transposed()",
        "of_cols = problem",
        "ids-restrict-sorted", "nan",
    ),
    "product that overwrites the gradient": Fault(
        "before + added, mask=inside)", "added, mask=inside)", "ids-restrict-sorted", "value"
    ),
    "product that starts from what was there": Fault("inside & (begins == 0)", "inside", "ids-restrict-sorted", "nan"),
    "product that leaves rows without a tile as they were": Fault(
        "if (tiles > 0) | (begins > 0):", "if tiles > 0:", "ids-restrict-sorted", "nan"
    ),
    "columns beyond the block in the product": Fault(
        "(local_rows[:, None] < block_rows) & within[None, :]",
        "local_rows[:, None] < block_rows",
        "ids-restrict-sorted", "nan",
    ),
    "features beyond the last in the product": Fault(
        "mask=within[:, None] & (feature[None, :] < features)",
        "mask=within[:, None]",
        "ids-restrict-sorted", "oob_read of y",
    ),
    "product that stores beyond its block": Fault(
        "+ added, mask=inside)", "+ added)", "ids-restrict-sorted", "race of total"
    ),
    # backward in registers
    "columns whose features are not masked": Fault(
        "mask=(cols[:, None] < m) & (feature[None, :] < features)",
        "mask=cols[:, None] < m",
        "both", "oob_read of y", torch.float16,
    ),
    "gradient stored beyond the features": Fault(
        "grad_rows.to(grad.dtype.element_ty), mask=x_inside)",
        "grad_rows.to(grad.dtype.element_ty), mask=rows[:, None] < n)",
        "both", "poison", torch.float16,
    ),
    "strips that share their gradient": Fault(
        "grad + of_strip * features + x_place",
        "grad + x_place",
        "both", "race of grad", torch.bfloat16,
    ),
    "strips that share their sums": Fault(
        "sums.bias + of_strip + rows",
        "sums.bias + rows",
        "col_bias-vector", "race of sums", torch.bfloat16,
    ),
    "strips that go on into the next": Fault(
        "for col in range(first_col, last_col, BLOCK_N):\n        cols = col + tl.arange(0, BLOCK_N)\n        of",
        "for col in range(first_col, m, BLOCK_N):\n        cols = col + tl.arange(0, BLOCK_N)\n        of",
        "rows", "value", torch.bfloat16,
    ),
    "gradient that stays divided by its unit": Fault(
        "grad_rows *= tl.load(unit)", "pass", "both", "value", torch.float16
    ),
    "gradient that is not divided by its unit": Fault(
        "weighted = weighted / tl.load(unit)", "pass", "both", "value", torch.float16
    ),
    "no scale of the rows in the gradient": Fault(
        "weighted = scaled_by_rows(weighted, vectors, rows, n)",
        "pass",
        "vectors", "value", torch.bfloat16,
    ),
    "gradients of the rows in the columns' place": Fault(
        "Incoming(*swapped(incoming))",
        "incoming",
        "both", "oob_read of incoming", torch.float16,
    ),
    # gradients in forward
    "gradients that do not shrink where the maximum grows": Fault(
        "of_x * decay[:, None]", "of_x", "frozen-rows", "value", torch.bfloat16
    ),
    "strips that share their gradients": Fault(
        "slopes.x + of_strip * features", "slopes.x", "frozen-rows", "race of slopes", torch.bfloat16
    ),
    "gradients of the scale beyond the last row": Fault(
        "of_scale * share, mask=rows < n)", "of_scale * share)", "frozen-rows", "oob_write of slopes", torch.float16
    ),
    "gradients that stay divided by their unit": Fault(
        "share *= tl.load(unit)", "pass", "frozen-rows", "value", torch.float16
    ),
    "strips of empty rows that have a share": Fault(
        ".masked_fill(torch.isneginf(part.maximum), 0.0)",
        "",
        "frozen-ids-restrict-far", "nan", torch.bfloat16, shape=EMPTY_ROWS,
    ),
    "strips of equal shares": Fault(
        "slopes.x.mul_(weight[..., None])", "slopes.x.div_(strips)", "frozen-rows", "value", torch.bfloat16
    ),
    "logits left out that have no gradient": Fault(
        "grad_x.addcmul_(weight[:, None], y)", "pass", "frozen-everything", "value", torch.bfloat16
    ),
    # volumes
    "stride of single vectors": Fault("MEMBERS * features, rows", "features, rows", "2", "value", op=VOLUME),
    "vectors of the next member": Fault("y + t * features", "y + (t + 1) * features", "1", "oob_read of y", op=VOLUME),
    "entries of the wrong row of the inverse": Fault("(t * (t + 1) // 2 + s)", "s", "2", "value", op=VOLUME),
    "squares without their mask": Fault(
        "tl.load(span.square + rows, mask=rows < n, other=0.0)",
        "tl.load(span.square + rows)",
        "1", "oob_read of span", op=VOLUME,
    ),
    "inverses without their mask": Fault(
        "tl.load(entries + cols, mask=cols < m, other=0.0)",
        "tl.load(entries + cols)",
        "1", "oob_read of span", op=VOLUME,
    ),
    "distances of 0 that have a gradient": Fault(
        "-pairs <= smallest[:, None]", "-pairs < 0.0", "2-zeros", "nan", op=VOLUME
    ),
    "coordinates of the first member for all": Fault(
        "q * coordinates[t]", "q * coordinates[0]", "2", "value", op=VOLUME
    ),
    "members that share their coefficients": Fault(
        "coefficients + t * tl.cast(block_rows, tl.int64) * stride", "coefficients", "2", "nan", op=VOLUME
    ),
    "offset of the member after": Fault(
        "coefficients + t * tl.cast", "coefficients + (t + 1) * tl.cast", "1", "oob_write of coefficients", op=VOLUME
    ),
    "member as large as a square block": Fault(
        "t * tl.cast(block_rows, tl.int64) * stride",
        "t * tl.cast(block_cols, tl.int64) * stride",
        "2", "race of coefficients", op=VOLUME,
    ),
    "members that store beyond their block": Fault(
        "(q * coordinates[t]).to(coefficients.dtype.element_ty), mask=inside)",
        "(q * coordinates[t]).to(coefficients.dtype.element_ty))",
        "1", "oob_write of coefficients", torch.float16, VOLUME, ONE_BLOCK,
    ),
    "moments of the first member for all": Fault(
        "Total(grad_y[t])", "Total(grad_y[0])", "2", "nan", op=VOLUME
    ),
    "sums along the row that are divided by the unit": Fault(
        "tl.sum(q, 1), mask",
        "tl.sum(q / tl.load(unit), 1), mask",
        "2", "value", torch.float16, VOLUME,
    ),
    "gradient of the anchor without its part along it": Fault(
        "along[:, None], problem.x, value=-1",
        "along[:, None], problem.x, value=0",
        "2", "value", op=VOLUME,
    ),
    "totals of pairs that take no part": Fault(
        'tl.where(logits > -float("inf"), logits, 0.0)', "logits", "2", "value", op=VOLUME
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name, load, tmp_path):
    fault = FAULTS[name]
    assert (fault.op, fault.case, fault.dtype) in CASES, "without the fault, nobody runs its case"
    places = 0
    kernels = tmp_path / KERNELS.name
    kernels.mkdir()
    for path, folder in (*((path, kernels) for path in KERNELS.glob("*.py")), (HOST, tmp_path)):
        source = path.read_text()
        places += source.count(fault.old)
        (folder / path.name).write_text(source.replace(fault.old, fault.new))
    assert places > 0, f'"{name}" changes nothing: no source of the engine has {fault.old!r} any more'
    engine = load(kernels, tmp_path / HOST.name)
    with pytest.raises((KernelFault, AssertionError)) as caught:
        check(fault.op, fault.case, fault.dtype, engine, fault.shape)
    assert what_caught(caught.value) == fault.caught, caught.value


def what_caught(report: BaseException) -> str:
    if isinstance(report, KernelFault):
        kind, buffer = report.fault.kind, report.fault.buffer
        return f"{kind} of {buffer.split('.')[0]}" if buffer else kind
    return "nan" if "candidate nan" in str(report) else "value"
