"""One stage of `python -m bench.device`: a process of its own, with a time limit, that leaves rows as it goes.

A stage is a module of this folder with `run(stage)`. What it finds it writes row by row, so that a crash, a hang or a
kill at the limit costs what comes after, and nothing that came before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = sysconfig.get_path("purelib")
REHEARSAL = {"TRITON_INTERPRET": "1", "CONTRASTIVE_OPS_TEST_DEVICE": "cpu"}


@dataclass
class Stage:
    """What a stage's process is told, and where its rows go."""

    rows: Path
    until: float  # when the process is killed, in seconds since the epoch: what it takes to start counts, too
    rehearse: bool  # on the CPU, with stand-ins, as small as can be

    @property
    def place(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def left(self) -> float:
        return self.until - time.time()

    def write(self, **row: Any) -> None:
        with self.rows.open("a") as file:
            # a report is passed on, and commands in sentences name the checkout
            file.write(without_folders(json.dumps(row)) + "\n")


@dataclass
class Outcome:
    """What came of a stage; JSON."""

    stage: str
    status: str  # "done", or what ended it
    seconds: float
    rows: list[dict[str, Any]]
    output: str  # the end of what it printed


def main(run: Callable[[Stage], None]) -> None:
    """The process of a stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    run(Stage(**vars(parser.parse_args())))


def start(name: str, folder: Path, seconds: float, rehearse: bool, module: str | None = None) -> Outcome:
    """Run a stage and wait for it; its whole process group ends with it."""
    rows, log = folder / f".{name}.jsonl", folder / f".{name}.log"
    for path in (rows, log):
        path.unlink(missing_ok=True)
    until = str(time.time() + seconds)
    command = [sys.executable, "-m", module or f"bench.device.{name}", "--rows", str(rows), "--until", until]
    begin = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *(["--rehearse"] if rehearse else [])],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (REHEARSAL if rehearse else {}),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status = wait(process, seconds)
    found = read(rows)
    if status == "done" and not found:
        status = "ended without a result"
    outcome = Outcome(name, status, time.perf_counter() - begin, found, tail(log.read_text(errors="replace")))
    for path in (rows, log):
        path.unlink(missing_ok=True)
    return outcome


def wait(process: subprocess.Popen[Any], seconds: float) -> str:
    """Until the process ends or its time does; the processes that it started end, too."""
    try:
        code = process.wait(timeout=max(seconds, 0))
        status = "done" if code == 0 else f"ended with exit status {code}"
    except subprocess.TimeoutExpired:
        status = f"stopped at its limit of {seconds:.0f} s"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return status


def read(rows: Path) -> list[dict[str, Any]]:
    """The rows of a file; the last one may be cut."""
    found = []
    for line in rows.read_text(errors="replace").splitlines() if rows.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def tail(text: str, size: int = 3000) -> str:
    return without_folders(text)[-size:]


def without_folders(text: str) -> str:
    """A report is for others: without the folders of this machine. The packages first: a `.venv` is in the checkout."""
    return text.replace(PACKAGES, "site-packages").replace(str(ROOT), ".")


def parallel(commands: Sequence[list[str]], seconds: float) -> list[tuple[str, str]]:
    """Statuses and outputs of processes that run side by side."""
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        for command in commands
    ]
    end = time.perf_counter() + seconds
    results = []
    for process in processes:
        try:
            output, _ = process.communicate(timeout=max(end - time.perf_counter(), 0.1))
            status = "done" if process.returncode == 0 else f"ended with exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            status = f"stopped after {seconds:.0f} s"
        results.append((status, output))
    return results
