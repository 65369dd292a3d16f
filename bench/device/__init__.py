"""What differs between devices: where tensors are, when work is done, what memory it took, what the header says."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Device:
    """The CPU, and what a device says of itself."""

    place: str = "cpu"  # where the tensors are
    backend: str = "auto"  # of ours, where "auto" is asked for
    roof_size: int = 2048  # rows and columns of a product at full speed
    extension: bool = True  # whether the C++ engine runs there

    def why_not(self) -> str | None:
        """The sentence that says why nothing can be measured there; None when it can."""
        return None

    def synchronize(self) -> None:
        """Return when all work is done."""

    def memory(self) -> tuple[int, Callable[[], int]]:
        """Bytes in use now, and a function that tells the peak since now."""
        gc.collect()
        _return_freed_memory()
        return _resident_bytes()

    def machine(self) -> dict[str, Any]:
        """What the header says of it."""
        return {}

    def versions(self) -> dict[str, str]:
        """Of the software that only this device takes."""
        return {}


@dataclass(frozen=True)
class CUDA(Device):
    place: str = "cuda"
    backend: str = "triton"  # not "auto": what is measured has a name, and never is what a failed check leaves
    roof_size: int = 8192
    extension: bool = False

    def why_not(self) -> str | None:
        if torch.cuda.is_available():
            return None
        return f"needs a GPU that PyTorch can use, torch {torch.__version__} finds none."

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def memory(self) -> tuple[int, Callable[[], int]]:
        gc.collect()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated

    def machine(self) -> dict[str, Any]:
        return {
            "gpu": torch.cuda.get_device_name(),
            "gpu_memory_bytes": torch.cuda.get_device_properties().total_memory,
            "driver": _driver(),
            "float32_products": torch.get_float32_matmul_precision(),  # "highest" without TF32
        }

    def versions(self) -> dict[str, str]:
        try:
            return {"triton": importlib.metadata.version("triton")}
        except importlib.metadata.PackageNotFoundError:
            return {"triton": "not installed"}


DEVICES: dict[str, Device] = {"cpu": Device(), "cuda": CUDA()}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _return_freed_memory() -> None:
    """What the allocator kept of freed memory would serve the contender unseen."""
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if malloc_trim is not None:
            malloc_trim(0)


def _resident_bytes() -> tuple[int, Callable[[], int]]:
    """Where Linux can't forget the peak so far, and on other systems, the peak since now is the growth of the peak.

    That is less than the truth when the inputs took more to make than they take.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS"), lambda: _status_bytes("VmHWM")
    except OSError:
        return _peak_since_start(), _peak_since_start


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _peak_since_start() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
