"""What Triton's launcher hands to the driver: every launch of a set of problems, as a line of JSON.

    LD_LIBRARY_PATH=FOLDER TRITON_LIBCUDA_PATH=FOLDER TRITON_INTERPRET=0 python -m cuda_stub.launches NAME ...

The driver is libcuda.c, compiled to FOLDER/libcuda.so.1. A process has one: tests/test_triton_launcher.py starts this
one, and judges. Kernels are compiled for an H100 as there, and launched on tensors of the CPU; nothing runs, and what
the engine computes from uninitialised results decides on no launch. Indices alone are filled in.

A name is that of one of the HALVES of the problems, or of a fault. With names of faults, forward_kernel is launched
with each of these in its launcher instead: by tensor descriptors with DESCRIPTOR_FAULTS, by pointers with FAULTS.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import problems
import test_volume_logsumexp as volumes
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import contrastive_ops as co
from contrastive_ops import backends
from contrastive_ops.ops import by_class, class_contrast_sum, contrast_sum, with_class_mean
from contrastive_ops.ops.rowwise import unit_tuples, with_scale

STREAM = 0x5EED  # not 0, the default stream
FEW, ODD = 24, 21  # features: rows of whole 16 bytes, which tensor descriptors take, and others
WORKSPACE = 128  # rows and columns: several blocks, so that the first row of one is not its first column
ELEMENTS = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}

NUMBERS = {int: "i32", float: "f32"}

Call = Callable[[], tuple[Tensor, ...]]


def pairs(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Call:
    kind, _, of_frozen = name.partition(" ")
    make = problems.frozen if kind == "frozen" else problems.problem
    arguments, options = make(of_frozen or name, *shape, dtype)
    return functools.partial(problems.fused, *arguments, backend="triton", **options)


def tuples(members: int, dtype: torch.dtype, **flags: bool) -> Call:
    arguments, options = volumes.problem(50, 60, members, 20, dtype)
    return functools.partial(volumes.fused, *arguments, backend="triton", **options | flags)


def of_op(op: problems.Op, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Call:
    arguments, options = op.problem(name, *shape, dtype)
    return functools.partial(op.fused, *arguments, backend="triton", **options)


def few_gradients(call: Call) -> Call:
    """Of the first argument alone: no sums of scales and biases."""
    first, *others = call.args
    options = {name: value.detach() if isinstance(value, Tensor) else value for name, value in call.keywords.items()}
    return functools.partial(call.func, first, *(other.detach() for other in others), **options)


def scales_alone(call: Call) -> Call:
    """No gradients of the features: no coefficients."""
    return functools.partial(call.func, *(argument.detach() for argument in call.args), **call.keywords)


def calls() -> Iterator[tuple[str, Call]]:
    """Every kernel, with each of its arguments and without; test_triton_launcher.py counts."""
    float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16
    few, many = (100, 120, FEW), (100, 120, 300)  # features: with 16 bits, for rows_kernel and for block_kernel
    odd, aligned = (100, 120, ODD), (100, 120, 304)
    yield "rows, float32", pairs("rows", few, float32)
    yield "cols, float32", pairs("cols", few, float32)
    yield "ids, float32", pairs("ids-restrict", few, float32)
    yield "two blocks, float32", pairs("everything-restrict", (128, 256, FEW), float32)
    yield "three blocks, self, float32", pairs("self-everything-restrict", (256, 256, FEW), float32)
    yield "by pointers, float32", pairs("everything", odd, float32)
    yield "float16", pairs("everything-restrict", many, float16)
    yield "by descriptors, bfloat16", pairs("everything", aligned, bfloat16)
    yield "by descriptors, self, float16", pairs("self-exclude", aligned, float16)
    yield "rows, bfloat16", pairs("rows", few, bfloat16)
    yield "bfloat16", pairs("everything", few, bfloat16)
    yield "self, float16", pairs("self-everything", few, float16)
    for name, dtype in (("blocks", float32), ("rows", float16)):
        yield f"scales alone, {name}", scales_alone(pairs("vectors", few, dtype))
        yield f"few gradients, {name}", few_gradients(pairs("everything", few, dtype))
    for name, dtype in (("exclude", float16), ("everything-restrict", float16), ("vectors-rows", bfloat16)):
        yield f"attention, {name}", pairs(f"frozen {name}", few, dtype)
    # Triton takes an int of 1 for a constant
    for name in ("everything-restrict", "self-everything-restrict"):
        yield f"{name}, 1 x 1 x 1", pairs(name, (1, 1, 1), float32)
    yield "guide, float32", pairs("guide-everything", few, float32)
    yield "guide, self, float16", pairs("self-guide-everything", few, float16)
    teacher, own = problems.EXPECTATIONS
    for op, name in (
        (problems.SUMS[1], "everything"),
        (own, "both"),
        (own, "self"),
        (teacher, "everything"),
        (teacher, "rows"),
    ):
        yield f"{op}, {name}", of_op(op, name, few, float32)
    yield "P = 1, rows", few_gradients(tuples(1, float32, cols=False))
    yield "P = 1, cols", scales_alone(tuples(1, float32, rows=False, totals=False))
    yield "P = 3", tuples(3, float16)
    yield "P = 2, no scale", tuples(2, float32, col_scale=None)
    yield from rowwise_calls()


def rowwise_calls() -> Iterator[tuple[str, Call]]:
    """What the losses do around a sweep."""
    wide = torch.randn(100, 2 * FEW)[:, :FEW]  # rows further apart than they are long
    x, y, t = (value.clone().requires_grad_() for value in (wide, wide, torch.tensor([0.07])))
    strided = wide.detach().requires_grad_()
    yield "scale", lambda: with_scale(strided, t, -0.5, "triton")
    yield "scale alone", lambda: with_scale(strided, 0.07, -1.0, "triton")[1:]
    yield "scale of frozen rows", lambda: with_scale(wide, t, 0.5, "triton")[1:]
    yield "units", lambda: unit_tuples(x, wide, y, backend="triton")
    yield "units side by side", lambda: unit_tuples(wide, y.half(), backend="triton")[:1]
    yield "units apart", lambda: unit_tuples(x, y, backend="triton")[1:]
    positive, *vectors = torch.randn(5, 100).requires_grad_().unbind()
    lse, totals = vectors[:2], vectors[2:]
    yield "contrast", lambda: (contrast_sum(positive, lse[:1], divisor=100.0, backend="triton"),)
    yield (
        "contrast of two directions",
        lambda: (contrast_sum(positive, lse, totals, 0.09, 0.01, divisor=200.0, backend="triton"),),
    )
    scale, labels = torch.rand(100).requires_grad_(), torch.arange(100) // 3

    def class_mean(x: Tensor, scale: float | Tensor) -> tuple[Tensor, ...]:
        one, other, mean = with_class_mean(x, scale, by_class(labels, x, "triton"), "triton")
        return *one, *other, mean

    yield "class mean", lambda: class_mean(strided, scale)
    yield "class mean alone", lambda: class_mean(strided, 1.5)[-1:]
    yield "class mean of frozen rows", lambda: class_mean(wide, scale)[-1:]
    for inside, divisor in ((False, 100.0), (True, None)):
        yield (
            f"class contrast, {divisor}",
            lambda inside=inside, divisor=divisor: (
                class_contrast_sum(*vectors[:2], positive, totals[0], inside, divisor=divisor, backend="triton"),
            ),
        )
    summands, factors = [torch.rand(size) for size in (30, 40, 50, 60)], [torch.rand(size) for size in (70, 80)]
    yield "bound", lambda: (backends.triton.kernels("rowwise").bound(summands, factors, 0.5),)
    sets = torch.randn(50, 3, 20).requires_grad_()
    yield "volumes", lambda: (co.gramian_volume(sets, backend="triton"),)


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Triton takes a tuple apart; a field is named as in the kernel, vectors.row_scale, or by its place, lse.0."""
    if isinstance(value, tuple):
        for field, of_field in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from leaves(f"{name}.{field}", of_field)
    else:
        yield name, value


def described(name: str, value: TensorDescriptor | Tensor | float | None) -> dict[str, Any]:
    if isinstance(value, TensorDescriptor):  # the shape and strides are those of the tensor, whatever it says
        x, block = value.base, value.block_shape
        element = ELEMENTS[x.dtype]
        return {
            "name": name,
            "type": f"!tt.tensordesc<{'x'.join(map(str, block))}x{element}>",
            "value": x.data_ptr(),
            "element": element,
            "bytes": x.element_size(),
            "shape": list(x.shape),
            "strides": list(x.stride()),
            "block": list(block),
        }
    if isinstance(value, Tensor):
        return {"name": name, "type": f"!tt.ptr<{ELEMENTS[value.dtype]}>", "value": value.data_ptr()}
    assert value is None or type(value) in NUMBERS, f"{name} is {value!r}"
    return {"name": name, "type": NUMBERS.get(type(value)), "value": value}


def declared(kernel: Any) -> dict[str, Any]:
    """What the compiled kernel takes: names and types of Triton's IR, the sizes of PTX, the threads of a block."""
    (takes,) = re.findall(rf"tt\.func public @{kernel.name}\((.*)\) attributes", kernel.asm["ttir"])
    takes = re.sub(r"tensordesc<tensor<(\w+)>>", r"tensordesc<\1>", takes)  # the former is Triton's before 3.8
    parameters = re.findall(
        r'%[\w.]+: (\S+)(?: \{tt\.divisibility = (\d+) : i32\})? loc\("([\w.]+)"\(#loc\d*\)\)(?:, |$)', takes
    )
    assert len(parameters) == takes.count("%"), takes
    ((entry, threads),) = re.findall(
        rf"\.entry {kernel.name}\(([^)]*)\)\s*\.(?:reqntid|maxntid) (\d+)", kernel.asm["ptx"]
    )
    sizes = re.findall(r"\.param (?:\.align \d+ )?\.[bfsu](\d+) [^,\[]*(?:\[(\d+)\])?", entry)
    assert len(sizes) == entry.count(".param "), entry
    maps = getattr(kernel.metadata, "tensordesc_meta", None) or ()
    return {
        "parameters": [
            {"name": name, "type": of_ir, "divisor": int(divisor or 1)} for of_ir, divisor, name in parameters
        ],
        "sizes": [int(bits) // 8 * int(elements or 1) for bits, elements in sizes],
        "maps": [(each["block_size"], each["swizzle"]) for each in maps],
        "threads": int(threads),
        "shared": kernel.metadata.shared,
    }


class Recorder:
    """Compiles a launch, carries it out, and prints what was asked for and what reached the driver."""

    SIGNATURE = ctypes.CFUNCTYPE(
        None,
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_uint),
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_uint64),
    )

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run  # Triton's own
        self.memory = os.open("/proc/self/mem", os.O_RDONLY)  # where an address is none, an error and no signal
        self.report = self.SIGNATURE(self._report)  # kept: C has no share in it
        ctypes.CDLL("libcuda.so.1").report_launches_to(self.report)
        self.label = ""
        self.sizes: list[int] = []
        self.launched: list[dict[str, Any]] = []

    def _report(self, function: int, name: bytes, shape: Any, stream: int, parameters: Any) -> None:
        packed = [self._read(parameters[index], size) for index, size in enumerate(self.sizes)]
        self.launched.append(
            {
                "function": function,
                "name": name.decode(),
                "grid": shape[:3],
                "block": shape[3:6],
                "shared": shape[6],
                "stream": stream or 0,  # ctypes has None for null
                "packed": packed,
            }
        )

    def _read(self, address: int, size: int) -> str:
        try:
            return os.pread(self.memory, size, address).hex()
        except (OSError, OverflowError):
            return "unreadable"

    def launch(self, kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        assert not warmup
        given = kernel.signature.bind_partial(
            *arguments, **{name: value for name, value in options.items() if name in kernel.arg_names}
        ).arguments
        constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        compiled = self.run(kernel, *arguments, grid=grid, warmup=True, **options)
        takes = declared(compiled)
        self.sizes, self.launched = takes["sizes"], []
        self.run(kernel, *arguments, grid=grid, warmup=False, **options)
        (launched,) = self.launched
        launch = {
            "label": self.label,
            "kernel": kernel.__name__,
            "arguments": [
                described(*leaf)
                for name, value in given.items()
                if name not in constants
                for leaf in leaves(name, value)
            ],
            "grid": [*grid, 1, 1][:3],
            "warps": options.get("num_warps", 4),  # Triton's default
            "stream": STREAM,
            "function": compiled.function,
            "declared": takes,
            "launched": launched,
        }
        print(json.dumps(launch), flush=True)
        if launch["kernel"] == "incoming_kernel" and given["result"] is not None:
            given["result"].zero_()  # indices, by which the engine looks up
        return compiled


# Places in a call of the launcher: grid, stream, function, (warps, clusters, shared), ..., the arguments of the kernel.
GRID_X, GRID_Y, ON_STREAM, METADATA = 0, 1, 3, 5
X, Y, ROW_PART, N, M = 9, 10, 16, 18, 19  # of forward_kernel

FAULTS: dict[str, Callable[[tuple[Any, ...]], dict[int, Any]]] = {
    "none": lambda call: {},
    "two pointers swapped": lambda call: {X: call[Y], Y: call[X]},
    "a pointer is null": lambda call: {Y: None},
    "a pointer left out": lambda call: {},  # by the signature, see `faulty`
    "two fields of a tuple swapped": lambda call: {
        ROW_PART: call[ROW_PART]._replace(maximum=call[ROW_PART].sum, sum=call[ROW_PART].maximum)
    },
    "two integers swapped": lambda call: {N: call[M], M: call[N]},
    "a grid with its sides swapped": lambda call: {GRID_X: call[GRID_Y], GRID_Y: call[GRID_X]},
    "another stream": lambda call: {ON_STREAM: 0},
    "half of the warps": lambda call: {METADATA: (call[METADATA][0] // 2, *call[METADATA][1:])},
    "no shared memory": lambda call: {METADATA: (*call[METADATA][:2], 0)},
}
DESCRIPTOR_FAULTS: dict[str, Callable[[tuple[Any, ...]], dict[int, Any]]] = {
    "no fault of a descriptor": lambda call: {},
    "two descriptors swapped": lambda call: {X: call[Y], Y: call[X]},
    "a descriptor of another tensor": lambda call: {Y: dataclasses.replace(call[Y], base=call[X].base)},
    "a descriptor of fewer rows": lambda call: {X: dataclasses.replace(call[X], shape=[call[X].shape[0] - 1, FEW])},
    "a descriptor of narrower rows": lambda call: {X: dataclasses.replace(call[X], strides=[FEW - 4, 1])},
    "a descriptor that has NaN beyond the edges": lambda call: {Y: dataclasses.replace(call[Y], padding="nan")},
}


def faulty(launcher: type, fault: str, source: Any, metadata: Any) -> Callable[..., None]:
    """Triton's launcher of a kernel, with a fault if the kernel is forward_kernel."""
    if source.fn.__name__ != "forward_kernel":
        return launcher(source, metadata)
    if fault == "a pointer left out":
        signature = source.signature | {"row_part": source.signature["row_part"]._replace(sum="constexpr")}
        source = SimpleNamespace(signature=signature, constants=source.constants, fn=source.fn)
    launch = launcher(source, metadata)

    def with_fault(*call: Any) -> None:
        changes = (FAULTS | DESCRIPTOR_FAULTS)[fault](call)
        launch(*(changes.get(place, value) for place, value in enumerate(call)))

    return with_fault


def active_driver() -> Any:
    """Triton's own driver for NVIDIA, without what it asks of PyTorch."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda _device=None: STREAM
    driver.get_device_capability = lambda _device=None: (9, 0)
    triton.runtime.driver.set_active(driver)
    return driver


HALVES = {"even": slice(0, None, 2), "odd": slice(1, None, 2)}  # of the problems: two processes take half as long


def main(*names: str) -> None:
    from triton.runtime.jit import JITFunction

    driver, recorder = active_driver(), Recorder(JITFunction.run)
    JITFunction.run = lambda kernel, *arguments, **options: recorder.launch(kernel, *arguments, **options)
    backends.triton.why_not = lambda _op, _x: None
    backends.triton.kernels("tilings").device_class = lambda _x: "sm_90"
    backends.sweep.WORKSPACE = WORKSPACE
    launcher, forward = driver.launcher_cls, backends.triton.kernels("sweep").forward_kernel
    if names[0] in HALVES:
        for recorder.label, call in [*calls()][HALVES[names[0]]]:
            outputs = [output for output in call() if output.requires_grad]
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        return
    for recorder.label in names:
        driver.launcher_cls = functools.partial(faulty, launcher, recorder.label)
        forward.device_caches.clear()  # which keep the launcher
        pairs("rows", (150, 270, FEW if recorder.label in DESCRIPTOR_FAULTS else ODD), torch.float32)()


if __name__ == "__main__":
    main(*sys.argv[1:])
