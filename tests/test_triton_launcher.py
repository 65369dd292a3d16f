"""The last step of a launch: what Triton's launcher packs is what the compiled kernel takes, in its order.

Binder, specialisation and compilation run in other tests, with a stand-in for the driver. Here the driver is Triton's
own, and cuda_stub/libcuda.c stands in for what is below it. Triton 3.6 compiles a launcher in C for every signature;
since 3.7 there is one for all. No kernel runs: what it makes of its arguments is for other tests.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest

HERE = Path(__file__).parent
SUPPORTED = ((3, 6), (3, 9))  # of Triton, the last not included; others may launch in ways of their own


def why_not() -> str | None:
    """The sentence that says why no launcher can be compiled here, or None."""
    include = sysconfig.get_path("include")
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton."
    if sys.platform != "linux":
        return f"triton has a launcher for Linux only, this is {sys.platform}."
    if compiler() is None:
        return "there is no C compiler for it; install gcc, or name a compiler in CC."
    if not Path(include, "Python.h").is_file():
        return f"there is no Python.h in {include}; install the headers of Python."
    return None


def compiler() -> str | None:
    """The compiler that Triton takes."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


SENTENCE = why_not()
pytestmark = pytest.mark.skipif(SENTENCE is not None, reason=f"triton's launcher: {SENTENCE}")

Launch = dict[str, Any]


def version() -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))


def stop(output: str) -> NoReturn:
    """Nothing was launched: a failure, unless this Triton is not one that must work."""
    if SUPPORTED[0] <= version() < SUPPORTED[1]:
        pytest.fail(output[-3000:], pytrace=False)
    reason = output.strip().rpartition("\n")[2]
    pytest.skip(f"triton's launcher: that of {importlib.metadata.version('triton')} is unknown to this test: {reason}")


def launches(folder: Path, *names: str) -> list[Launch]:
    """Launch in a process of its own: a process has one driver, and in that of the tests Triton interprets."""
    folder.mkdir(exist_ok=True)
    headers = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}", "-o", folder / "libcuda.so.1"]
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent))),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH")))),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    for command in (
        [compiler(), HERE / "cuda_stub" / "libcuda.c", *flags],
        [sys.executable, "-m", "cuda_stub.launches", *names],
    ):
        result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            stop(result.stderr + f"\nexit status {result.returncode}" * (not result.stderr))
    return [json.loads(line) for line in result.stdout.splitlines()]


def parameters(launch: Launch) -> list[dict[str, Any]]:
    """What is no constant of the compiled kernel: neither None nor, as Triton has it, an int of 1."""
    taken: list[dict[str, Any]] = []
    for argument in launch["arguments"]:
        if "block" in argument:
            taken += parameters_of_descriptor(argument)
        elif argument["type"] and (argument["type"] != "i32" or argument["value"] != 1):
            taken.append(argument | {"size": 4 if argument["type"] in ("i32", "f32") else 8})
    return taken


def parameters_of_descriptor(argument: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A tensor descriptor is a tensor map, and shape and strides once more."""
    yield argument | {"size": MAP_BYTES}
    for what, kind, size in (("shape", "i32", 4), ("stride", "i64", 8)):
        for axis, value in enumerate(argument["shape" if what == "shape" else "strides"]):
            yield {"name": f"{argument['name']}.{what}.{axis}", "type": kind, "value": value, "size": size}


MAP_BYTES = 128
MAP_LAYOUT = "<QIIQQQIII"  # of cuda_stub/libcuda.c
MAP_TYPES = {"f16": 6, "f32": 7, "bf16": 9}  # CUtensorMapDataType
MAP_FIELDS = ("base", "type", "fill", "width", "rows", "stride", "box width", "box rows", "swizzle")


def tensor_map(packed: str) -> dict[str, int]:
    values = struct.unpack_from(MAP_LAYOUT, bytes.fromhex(packed))
    return dict(zip(MAP_FIELDS, values, strict=True))


def map_of(argument: dict[str, Any], swizzle: int) -> dict[str, int]:
    """Of the whole tensor, in boxes as large as the kernel's blocks, with 0 beyond the edges."""
    (rows, width), (box_rows, box_width) = argument["shape"], argument["block"]
    stride = argument["strides"][0] * argument["bytes"]
    values = (argument["value"], MAP_TYPES[argument["element"]], 0, width, rows, stride, box_width, box_rows, swizzle)
    return dict(zip(MAP_FIELDS, values, strict=True))


def number(argument: dict[str, Any]) -> bytes:
    value, size = argument["value"], argument["size"]
    return struct.pack("<f", value) if isinstance(value, float) else value.to_bytes(size, "little")


# memory of Triton's own, which no kernel here asks for
SCRATCH = [{"name": name, "value": 0, "size": 8} for name in ("global scratch", "scratch of the profiler")]


def wrong(launch: Launch) -> dict[str, str]:
    """What differs between the engine's call, the compiled kernel, and what reached the driver."""
    takes, got, given = launch["declared"], launch["launched"], parameters(launch)
    packed = [*given, *SCRATCH]
    names = [each["name"] for each in given]
    if version() < (3, 8):  # which calls every field of a tuple by the name of the tuple
        names = [name.partition(".")[0] for name in names]
    compared = {
        "names": ([each["name"] for each in takes["parameters"]], names),
        "types": ([each["type"] for each in takes["parameters"]], [each["type"] for each in given]),
        "sizes": (takes["sizes"], [each["size"] for each in packed]),
        "function": ([got["name"], got["function"]], [launch["kernel"], launch["function"]]),
        "grid": (got["grid"], launch["grid"]),
        "threads": (got["block"], [32 * launch["warps"], 1, 1]),
        "threads of the kernel": (takes["threads"], 32 * launch["warps"]),
        "shared memory": (got["shared"], takes["shared"]),
        "stream": (got["stream"], launch["stream"]),
    }
    maps = iter(takes["maps"])
    for each, value in zip(packed, got["packed"], strict=False):
        if "block" in each:
            box, swizzle = next(maps, (None, None))
            compared[f"box of {each['name']}"] = (box, each["block"])
            compared[each["name"]] = (tensor_map(value), map_of(each, swizzle))
        else:
            compared[each["name"]] = (value, number(each).hex())
    for each, of_kernel in zip(given, takes["parameters"], strict=False):
        if each["type"] != "f32":
            compared[f"divisor of {each['name']}"] = (each["value"] % of_kernel["divisor"], 0)
    return {what: f"{is_!r}, not {should!r}" for what, (is_, should) in compared.items() if is_ != should}


# What no launch has, and what none is without, of the fields of tuples and of what may be None.
BY_THEMSELVES = {"second.u", "second.v"}  # features are arguments, which descriptors may take the place of
OF_SECOND = BY_THEMSELVES | {
    f"second.{side}_{name}" for side in ("row", "col") for name in ("scale", "bias", "ceiling")
}
OF_MEANS = {
    *(f"incoming.{side}_{name}" for side in ("row", "col") for name in ("mean", "share")),
    *(f"incoming.teacher_{side}_max" for side in ("row", "col")),
}
NEVER = {
    "forward_kernel": BY_THEMSELVES,
    # of a teacher they are joined as if they were its own; totals by torch.sum
    "merge_kernel": {
        *(f"{part}.{name}" for part in ("part", "mirror") for name in ("total", "teacher_maximum", "teacher_sum"))
    },
    "block_kernel": {"col_sums.along", *BY_THEMSELVES},
    # volumes, guides by features and teachers take the blocks
    "rows_kernel": {
        "incoming.row_total", "incoming.col_total", "sums.along", *OF_SECOND, *OF_MEANS,
        "sums.teacher_bias", "sums.teacher_scale",
    },
    # nor is self-similarity here
    "attention_kernel": {
        "vectors.col_exclude", "part.total", "part.moment", "part.teacher_maximum", "part.teacher_sum", "slopes.bias",
        *OF_SECOND,
    },
}  # fmt: skip
ALWAYS = {
    "excluded_kernel": {"vectors.row_exclude"},
    "merge_kernel": {"part.maximum", "part.sum"},
    "product_kernel": {"vectors.row_ids", "vectors.col_ids"},
    "attention_kernel": {"part.maximum", "part.sum", "slopes.x", "slopes.scale"},
    "contrast_kernel": {"lse.0"},
    "contrast_backward_kernel": {"lse.0"},
    "bound_kernel": {"summands.0", "sizes.0"},
    "units_kernel": {"vectors.0", "vectors.1"},
}
# What may be None and is no field of a tuple.
OPTIONAL = {
    "forward_kernel": {"u", "v", "width"},
    "merge_kernel": {"out_lse", "out_mean"},
    "block_kernel": {"u", "v", "width", "unit", "coefficients"},
    "rows_kernel": {"unit", "grad"},
    "attention_kernel": {"unit"},
    "scale_kernel": {"factor"},
    "scale_backward_kernel": {"factor", "grad", "result", "grad_factor"},
    "contrast_backward_kernel": {"grad_total"},
    "class_sums_kernel": {"grad"},
    "class_mean_backward_kernel": {"grad_x", "grad_scale"},
    "class_contrast_kernel": {"mean"},
    "class_contrast_backward_kernel": {"grad_mean"},
    "incoming_kernel": {"values", "result"},
    "factor_kernel": {"triangles", "weight", "col_scale", "basis", "anchor", "square"},
    "units_backward_kernel": {"of_all", "of_first", "of_others"},
}
SWEEP = ("forward", "excluded", "merge", "block", "product", "rows", "attention")
ROWWISE = (
    "scale", "scale_backward", "contrast", "contrast_backward", "incoming", "bound", "factor", "volume_gradient",
    "tuple_gradient", "units", "units_backward", "classes", "class_sums", "class_mean", "class_mean_backward",
    "class_contrast", "class_contrast_backward",
)  # fmt: skip
KERNELS = {f"{name}_kernel" for name in (*SWEEP, *ROWWISE)}
DESCRIBED = {"forward_kernel", "block_kernel"}  # whose features come by tensor descriptors, or else by pointers
# In self-similarity one tensor is both, and without it there is no second.
TWINS = {("vectors.row_exclude", "vectors.col_exclude"), ("incoming.row_excluded", "incoming.col_excluded")}


def test_launches(tmp_path):
    """What the driver is given: parameters in the order of the kernel, grid, threads, shared memory, stream."""
    with ThreadPoolExecutor() as pool:
        halves = pool.map(lambda half: launches(tmp_path / half, half), ("even", "odd"))
        launched = [*itertools.chain.from_iterable(halves)]
    for launch in launched:
        assert wrong(launch) == {}, f"{launch['kernel']} of {launch['label']}"

    # and nothing passes because it was not there, or the same as its neighbour
    assert {launch["kernel"] for launch in launched} == KERNELS
    forms = {(launch["kernel"], kind) for launch in launched for kind in types_of_features(launch)}
    assert forms >= {(kernel, kind) for kernel in DESCRIBED for kind in ("pointer", *MAP_TYPES)}
    assert max(launch["launched"]["shared"] for launch in launched) > 48 << 10  # what a kernel must ask for
    calls = defaultdict(list)
    for launch in launched:
        calls[launch["kernel"]].append({each["name"]: each["value"] for each in launch["arguments"]})
    for kernel, of_kernel in calls.items():
        names = {name for call in of_kernel for name in call}
        tuples = {name.rpartition(".")[0] for name in names}  # None at times, or of several lengths
        values = {name: [call.get(name) for call in of_kernel] for name in sorted(names - tuples)}
        optional = {name for name in values if "." in name} | OPTIONAL.get(kernel, set())
        absent = {name for name in values if None in values[name]}
        assert absent <= optional, kernel
        never = {name for name in absent if set(values[name]) == {None}}
        assert never == NEVER.get(kernel, set()), kernel
        assert optional - absent == ALWAYS.get(kernel, set()), kernel
        for one, other in itertools.combinations(values, 2):
            both = [pair for pair in zip(values[one], values[other], strict=True) if None not in pair]
            same = (one, other) in TWINS or (other, one) in TWINS
            assert not both or any(a != b for a, b in both) or same, f"{kernel}: {one}, {other}"


def types_of_features(launch: Launch) -> set[str]:
    features = [argument for argument in launch["arguments"] if argument["name"] in ("x", "y")]
    return {argument.get("element", "pointer") for argument in features}


# what is reported of the faults of cuda_stub/launches.py
FAULTS = {
    "two pointers swapped": {"x", "y"},
    "a pointer is null": {"y"},
    "a pointer left out": {"row_part.sum", "n", "m"},  # and what comes after it
    "two fields of a tuple swapped": {"row_part.maximum", "row_part.sum"},
    "two integers swapped": {"n", "m"},
    "a grid with its sides swapped": {"grid"},
    "another stream": {"stream"},
    "half of the warps": {"threads"},
    "no shared memory": {"shared memory"},
}
DESCRIPTOR_FAULTS = {
    "two descriptors swapped": {"x", "y", "x.shape.0", "y.shape.0"},
    "a descriptor of another tensor": {"y"},
    "a descriptor of fewer rows": {"x", "x.shape.0"},
    "a descriptor of narrower rows": {"x", "x.stride.0"},
    "a descriptor that has NaN beyond the edges": {"y"},
}

# and of another kernel than was compiled; its parameters are x, y, row_part.maximum, row_part.sum, n, m, ...
OTHER_KERNELS: dict[str, Callable[[Launch], Any]] = {
    "names": lambda kernel: kernel["parameters"].insert(0, kernel["parameters"].pop(1)),
    "types": lambda kernel: kernel["parameters"][0].update(type="!tt.ptr<f16>"),
    "sizes": lambda kernel: kernel["sizes"].pop(1),
    "threads of the kernel": lambda kernel: kernel.update(threads=kernel["threads"] // 2),
    "shared memory": lambda kernel: kernel.update(shared=kernel["shared"] + 16),
    "divisor of n": lambda kernel: kernel["parameters"][4].update(divisor=16),
}
OTHER_KERNELS_OF_DESCRIPTORS: dict[str, Callable[[Launch], Any]] = {
    "types": lambda kernel: kernel["parameters"][0].update(type="!tt.tensordesc<64x64xf32>"),
    "names": lambda kernel: kernel["parameters"].insert(0, kernel["parameters"].pop(5)),
    "sizes": lambda kernel: kernel["sizes"].insert(0, kernel["sizes"].pop(1)),
    "box of y": lambda kernel: kernel["maps"][1][0].reverse(),
    "x": lambda kernel: kernel["maps"][0].__setitem__(1, 0),  # not swizzled
}
RIGHT = ("none", "no fault of a descriptor")  # launches that these are compared with


def test_faults_are_seen(tmp_path):
    """A launcher that packs otherwise, and a kernel that takes otherwise."""
    faults, others = FAULTS | DESCRIPTOR_FAULTS, (OTHER_KERNELS, OTHER_KERNELS_OF_DESCRIPTORS)
    launched = launches(tmp_path, *RIGHT, *faults)
    of_forward = {launch["label"]: launch for launch in launched if launch["kernel"] == "forward_kernel"}
    assert of_forward.keys() == {*RIGHT, *faults}
    for fault, reported in faults.items():
        assert wrong(of_forward[fault]).keys() >= reported, fault
    for label, kernels in zip(RIGHT, others, strict=True):
        assert wrong(of_forward[label]) == {}, label
        for what, change in kernels.items():
            launch = copy.deepcopy(of_forward[label])
            change(launch["declared"])
            assert what in wrong(launch), what
