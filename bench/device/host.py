"""Stage `host`: what the host costs. A step of small batches as a training loop sees it, and a CUDA graph's replay."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import contrastive_ops as co
from bench.device import machine, stage
from bench.measure import sentence

SIZES = (256, 1024, 4096, 8192)


def dense(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T
    target = torch.arange(len(logits), device=x.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def ours(backend: str) -> Callable[..., Any]:
    return partial(co.clip_loss, backend=backend)


CONTENDERS: dict[str, Callable[..., Any]] = {"eager": dense, "triton": ours("triton"), "cuda": ours("cuda")}


def run(this: stage.Stage) -> None:
    for n in (64,) if this.rehearse else SIZES:
        for dtype in (torch.float32,) if this.rehearse else (torch.bfloat16, torch.float32):
            for name, loss in CONTENDERS.items():
                if this.left() < 3 or (this.rehearse and name == "cuda"):
                    continue
                row: dict[str, Any] = {"n": n, "d": 512, "dtype": str(dtype).removeprefix("torch."), "contender": name}
                try:
                    this.write(**row, **measured(loss, n, dtype, this.place), status="ok")
                except Exception as error:
                    this.write(**row, status=sentence(error))


def measured(loss: Callable[..., Tensor], n: int, dtype: torch.dtype, place: str) -> dict[str, Any]:
    """Milliseconds of clip_loss forward + backward, normalised: in a loop, and replayed."""
    torch.manual_seed(0)
    d = 512 if place == "cuda" else 16
    x, y = (torch.randn(n, d, device=place).to(dtype).requires_grad_() for _ in range(2))
    scale = torch.tensor(14.0, device=place, requires_grad=True)

    def step() -> tuple[Tensor, ...]:
        # detached: a graph that is alive would tie a capture to the stream it was made on
        value = loss(x, y, scale)
        return value.detach(), *torch.autograd.grad(value, (x, y, scale))

    if place != "cuda":
        start = time.perf_counter()
        step()
        return {"step_ms": 1e3 * (time.perf_counter() - start), "host_ms": None, "graph_ms": None, "same": None}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            eager = step()
        side.synchronize()
        steps = 50
        start = time.perf_counter()
        for _ in range(steps):
            step()
        host = 1e3 * (time.perf_counter() - start) / steps  # until all is launched
        side.synchronize()
        total = 1e3 * (time.perf_counter() - start) / steps
    torch.cuda.current_stream().wait_stream(side)
    found: dict[str, Any] = {"step_ms": total, "host_ms": host, "graph_ms": None, "same": None}
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            static = step()
        graph.replay()
        torch.cuda.synchronize()
        found["same"] = all(torch.equal(a, b) for a, b in zip(static, eager, strict=True))
        found["graph_ms"] = machine.milliseconds(graph.replay, place, 20)
    except Exception as error:
        found["same"] = sentence(error)
    return found


if __name__ == "__main__":
    stage.main(run)
