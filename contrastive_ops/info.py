"""``python -m contrastive_ops.info``: what is installed, which backends can run here and why the others can't.

The engines of a GPU are checked, which may compile their kernels.
"""

from __future__ import annotations

import os
import platform

import torch

import contrastive_ops
from contrastive_ops import backends, build, checks


def processor() -> str:
    """Name of the processor; Linux has it in /proc/cpuinfo, others in the platform module."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def devices() -> list[torch.device]:
    """The CPU, and the accelerator that PyTorch sees, if any."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        found.append(torch.device(str(torch.accelerator.current_accelerator())))
    return found


def checked(name: str, device: torch.device) -> str:
    """What the checks of an engine say there, of all ops and dtypes, run now if need be; "" for other backends."""
    uses: dict[str, list[str]] = {}
    for op in backends.tiled.OPS:
        for dtype in checks.FEATURE_DTYPES:
            try:
                standing = backends.standing(name, op, torch.empty(1, 1, dtype=dtype, device=device), check=True)
            except RuntimeError as error:  # nothing runs on the device
                return f"; {error}"
            if standing is not None:
                uses.setdefault(standing.sentence, []).append(f"{op} of {checks.names([dtype])}")
    if len(uses) == 1:
        return f", {next(iter(uses))}"
    return "".join(f"; {', '.join(of)}: {sentence}" for sentence, of in uses.items())


def taken(example: torch.Tensor) -> str:
    """The backend that "auto" takes."""
    try:
        return f"takes {backends.would_choose('similarity_logsumexp', example, 'auto')}"
    except RuntimeError as error:
        return f"can't: {error}"


BFLOAT16_UNITS = {
    "matrix": "matrix unit (AMX), for products of 32 and 16 bits",
    "vectors": "vector units (AVX-512 BF16), for products of bfloat16",
    "none": "none, or not in use",
}


def report() -> list[tuple[str, str]]:
    """Pairs of a subject and what there is to say of it."""
    lines = [
        ("contrastive_ops", contrastive_ops.__version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("processor", f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in use"),
        ("capability", torch.backends.cpu.get_cpu_capability()),
    ]
    if build.extension is None:
        lines.append(("C++ engine", f"not loaded: {build.missing}"))
    else:
        engine = build.extension
        lines += [
            ("C++ engine", f"built with {engine.compiler} against torch {engine.torch_version}"),
            ("instruction sets", f"{', '.join(engine.instruction_sets)}; running {engine.instruction_set()}"),
            ("bfloat16 unit", BFLOAT16_UNITS[engine.bfloat16_unit()]),
        ]
    if build.cuda is None:
        lines.append(("CUDA kernels", f"not loaded: {build.cuda_missing}"))
    else:
        architectures = ", ".join(build.cuda.architectures)
        lines.append(("CUDA kernels", f"built with {build.cuda.compiler} for {architectures}"))
    for device in devices():
        example = torch.empty(1, 1, device=device)
        for name in backends.NAMES[1:]:
            sentence = backends.why_not(name, "similarity_logsumexp", example)
            note = f"can run{checked(name, device)}" if name in backends.order(example) else "can run, only when named"
            lines.append((f"{name} on {device.type}", note if sentence is None else f"can't: {sentence}"))
        lines.append((f"auto on {device.type}", taken(example)))
    dtypes = checks.names(checks.FEATURE_DTYPES)
    return [*lines, ("dtypes", dtypes)]


def main() -> None:
    lines = report()
    width = max(len(subject) for subject, _ in lines)
    for subject, text in lines:
        print(f"{subject:<{width}}  {text}")


if __name__ == "__main__":
    main()
