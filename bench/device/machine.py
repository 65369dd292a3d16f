"""Stage `machine`: what it is, how fast it copies and multiplies, and the CUDA kernels built for its GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from bench import report
from bench.device import DEVICES, stage

WAIT = 4_000_000  # cycles, about 2 ms
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def run(this: stage.Stage) -> None:
    this.write(kind="header", **report.header("python -m bench.device", DEVICES[this.place]))
    this.write(kind="engine", **_engine(this))
    if not this.rehearse:
        properties = torch.cuda.get_device_properties()
        this.write(
            kind="gpu",
            name=properties.name,
            capability=list(torch.cuda.get_device_capability()),
            multiprocessors=properties.multi_processor_count,
            memory_bytes=properties.total_memory,
            l2_bytes=properties.L2_cache_size,
            clocks={"before": _clocks()},
        )
    this.write(kind="ceilings", **ceilings(this))
    if not this.rehearse:
        this.write(kind="clocks", after=_clocks())


def _clocks() -> str:
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        return f"{CLOCKS}: {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}"
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


def _engine(this: stage.Stage) -> dict[str, object]:
    """Builds the CUDA kernels unless they are there, and run on this GPU."""
    state = _state()
    if state == "loaded" or this.rehearse or shutil.which("nvcc") is None:
        return {"cuda": state, "built_in_s": None}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=stage.ROOT,
        env=os.environ | {"CONTRASTIVE_OPS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": ""},  # for this GPU
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cuda": _state() if done.returncode == 0 else f"not built: {stage.tail(done.stdout + done.stderr, 600)}",
        "built_in_s": time.perf_counter() - begin,
    }


def _state() -> str:
    """Asked of a process of its own: a library is loaded when the package is."""
    place = "cuda" if torch.cuda.is_available() else "cpu"
    code = (
        "import torch; from contrastive_ops import backends; "
        f"print(backends.why_not('cuda', 'similarity_logsumexp', torch.empty(1, 1, device='{place}')) or 'loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=stage.ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or stage.tail(done.stderr, 300)


def milliseconds(function: Callable[[], object], place: str, repeats: int = 10) -> float:
    """Median time of a call on the device, by events; the first two are warm-up.

    The device first waits for long enough that the host has launched everything: its time is not counted.
    """
    times = []
    for i in range(repeats + 2):
        if place == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(WAIT)
            begin.record()
            function()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            function()
            elapsed = 1e3 * (time.perf_counter() - start)
        if i >= 2:
            times.append(elapsed)
    return sorted(times)[len(times) // 2]


def ceilings(this: stage.Stage) -> dict[str, float]:
    """TB/s of a copy, read and written, and TFLOP/s of square products of normal data."""
    size = 64 if this.rehearse else 8192
    a, b = (torch.randn(size, size, device=this.place) for _ in range(2))
    found = {"copy_tbs": 2 * a.nbytes / milliseconds(lambda: b.copy_(a), this.place) / 1e9}
    if not this.rehearse:
        large = torch.empty(2**30, dtype=torch.int32, device=this.place)
        target = torch.empty_like(large)
        found["copy_tbs"] = 2 * large.nbytes / milliseconds(lambda: target.copy_(large), this.place) / 1e9
        del large, target
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, y = a.to(dtype), b.to(dtype)
        out = torch.empty_like(x)
        ms = milliseconds(lambda x=x, y=y, out=out: torch.mm(x, y, out=out), this.place)  # type: ignore[misc]
        found[f"mm_{str(dtype).removeprefix('torch.')}_tflops"] = 2 * size**3 / ms / 1e9
    return found


if __name__ == "__main__":
    stage.main(run)
