"""Stage `smoke`: every kernel of both engines once, at small odd sizes, against float64; half a minute.

Each engine and dtype has a process of its own, which goes on after a case that crashed or hung.

    python -m bench.device.smoke --engine cuda --dtype bfloat16 [--case NAME]     cases alone, for a sanitizer
"""

from __future__ import annotations

import argparse
import json
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bench.device import stage

# the tests' problems and their rule: what is right is written once
sys.path.insert(0, str(stage.ROOT / "tests"))
import problems  # type: ignore[import-not-found]
import test_volume_logsumexp as volumes  # type: ignore[import-not-found]
from tolerance import judge  # type: ignore[import-not-found]

import contrastive_ops as co
from contrastive_ops import backends
from contrastive_ops.reference import gram as dense_gram

ENGINES = ("triton", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
CASE_SECONDS = 40.0


def cases(engine: str, dtype: torch.dtype, place: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Names that say which kernels run, and checks that raise."""

    def fused(op: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        arguments, options = tree_map_only(Tensor, lambda x: x.to(place), (arguments, options))
        return tree_map_only(Tensor, lambda x: x.cpu(), op(*arguments, backend=engine, **options))

    def pairs(make: Callable[..., Any], name: str, *sizes: int) -> None:
        arguments, options = make(name, *sizes, dtype)
        judge(partial(fused, problems.fused), problems.naive, arguments, options)

    def of_volumes(*sizes: int) -> None:
        arguments, options = volumes.problem(*sizes, dtype)
        judge(partial(fused, volumes.fused), volumes.naive, arguments, options)

    def of_one_set(members: int) -> None:
        vectors = torch.randn(37, members, 67, generator=torch.Generator().manual_seed(0)).to(dtype)
        truth = dense_gram.gramian_volume(vectors.double())
        torch.testing.assert_close(fused(co.gramian_volume, vectors).double(), truth, rtol=1e-5, atol=0.0)

    rows_or_blocks = ((20, "rows"), (260, "blocks")) if dtype.itemsize == 2 else ((20, "blocks"),)
    for d, backward in rows_or_blocks:
        for name in ("both", "everything", "self-everything", "everything-restrict", "self-ids-restrict-sorted"):
            yield f"forward, {backward}: {name}, D = {d}", partial(pairs, problems.problem, name, 131, 70, d)
    for d in (17, 128):
        yield f"rows alone, frozen columns, D = {d}", partial(pairs, problems.frozen, "vectors-rows", 131, 70, d)
    for members in range(1, 5):
        yield f"volumes, P = {members}", partial(of_volumes, 65, 37, members, 33)
    if backends.why_not(engine, "gramian_volume", torch.empty(1, 2, 3, device=place, dtype=dtype)) is None:
        for members in (1, 3, 5):
            yield f"volumes of sets of {members}", partial(of_one_set, members)


def alone(engine: str, dtype: str, skip: int, only: str | None, place: str) -> None:
    """The cases of one engine and dtype; prints a line of JSON before and after each."""
    x = torch.empty(1, 1, dtype=getattr(torch, dtype), device=place)
    sentence = backends.why_not(engine, "similarity_logsumexp", x)
    if sentence is not None:
        print(json.dumps({"case": "all", "status": f"can't run: {sentence}"}), flush=True)
        return
    for number, (name, check) in enumerate(cases(engine, getattr(torch, dtype), place)):
        if number < skip or only not in (None, name):
            continue
        print(json.dumps({"begin": name, "number": number}), flush=True)
        try:
            check()
            status = "ok"
        except AssertionError as error:
            status = f"wrong: {' '.join(str(error).split())[:400]}"
        except Exception as error:
            status = f"raised {type(error).__name__}: {' '.join(str(error).split())[:400]}"
        print(json.dumps({"case": name, "status": status}), flush=True)
        if place == "cuda" and status != "ok":
            torch.cuda.synchronize()  # raises where the device can't be used any more, and the process starts anew


def command(engine: str, dtype: str, *more: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "bench.device.smoke", "--engine", engine, "--dtype", dtype, *more]


def supervised(this: stage.Stage, engine: str, dtype: str) -> None:
    """Runs the cases of an engine and dtype to their end, in as many processes as it takes."""
    skip = 0
    while this.left() > 0:
        process = subprocess.Popen(
            command(engine, dtype, "--skip", str(skip), *(["--rehearse"] if this.rehearse else [])),
            cwd=stage.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        begun, other = None, ""
        hangs = False
        while True:
            try:
                line = lines.get(timeout=min(CASE_SECONDS, max(this.left() - 1, 0.1)))
            except queue.Empty:
                hangs = True
                break
            if line is None:
                break
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                other = stage.tail(other + line, 1500)
                continue
            if "begin" in row:
                begun, skip = row["begin"], row["number"] + 1
            else:
                begun = None
                this.write(engine=engine, dtype=dtype, **row)
        process.kill()
        process.wait()
        if begun is None and not (hangs or process.returncode):
            return
        if begun is not None:
            what = "hangs" if hangs else f"crashed with exit status {process.returncode}"
            this.write(engine=engine, dtype=dtype, case=begun, status=f"{what}: {other[-600:]}")
        elif skip == 0:
            this.write(engine=engine, dtype=dtype, case="all", status=f"does not start: {other[-600:]}")
            return


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def run(this: stage.Stage) -> None:
    pairs = [(engine, dtype) for dtype in DTYPES for engine in ENGINES]
    if this.rehearse:
        pairs = [("triton", "float16")]
    with ThreadPoolExecutor(len(pairs)) as pool:
        for done in [pool.submit(supervised, this, *pair) for pair in pairs]:
            done.result()
    failed = [row for row in stage.read(this.rows) if row["status"] != "ok" and row["case"] != "all"]
    if failed and not this.rehearse and shutil.which("compute-sanitizer"):
        for row in failed[:4]:
            if this.left() < 15:
                break
            tool = ["compute-sanitizer", "--tool", "memcheck", "--print-limit", "5"]
            ((status, output),) = stage.parallel(
                [[*tool, *command(row["engine"], row["dtype"], "--case", row["case"])]], this.left() - 5
            )
            this.write(**{**row, "case": f"{row['case']}, under memcheck", "status": f"{status}: {output[-1500:]}"})


if __name__ == "__main__":
    if "--engine" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--engine", choices=ENGINES, required=True)
        parser.add_argument("--dtype", choices=DTYPES, required=True)
        parser.add_argument("--case")
        parser.add_argument("--skip", type=int, default=0)
        parser.add_argument("--rehearse", action="store_true")
        options = parser.parse_args()
        torch.set_num_threads(1)
        alone(options.engine, options.dtype, options.skip, options.case, "cpu" if options.rehearse else "cuda")
    else:
        stage.main(run)
