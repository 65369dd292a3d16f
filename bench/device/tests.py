"""Stage `tests`: the tests marked `gpu`, in three passes; the first touches every kernel, dtype and option once.

A pass that ends at its limit keeps the results it had: pytest reports each test as it ends.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.device import stage

FIRST = (
    "test_options or test_properties or test_empty_and_nan or test_volume_of_one_set or test_huge_logits or "
    "(test_large_volumes and (1 or 4)) or (test_frozen_columns and everything) or test_results_stay_on_the_device"
)
ALONE = "2_to_the_31 or peak_memory or stream or another_device or capture or tf32"
WORKERS = 15
PASSES = {  # name: selection, workers, share of the time that is left
    "a minute's worth": (f"({FIRST}) and not ({ALONE})", WORKERS, 0.5),
    "the rest": (f"not ({FIRST}) and not ({ALONE})", WORKERS, 0.7),
    "the device alone": (ALONE, 1, 1.0),
}
REHEARSED = {"a minute's worth": ("test_volumes and triton and float16", 1, 1.0)}


def run(this: stage.Stage) -> None:
    for name, (selection, workers, share) in (REHEARSED if this.rehearse else PASSES).items():
        seconds = this.left() * share - 3
        if seconds < 5:
            this.write(name=name, status="no time was left", outcomes={}, problems=[])
            continue
        this.write(
            name=name,
            **one_pass(selection, min(workers, os.cpu_count() or 1), seconds, this.rows.with_name(".reports")),
        )


def one_pass(selection: str, workers: int, seconds: float, reports: Path) -> dict[str, object]:
    """Counts of outcomes, and the texts of what did not pass: also what skipped."""
    reports.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", selection, "tests/test_gpu.py"]
    command += ["-n", str(workers), "--dist", "worksteal", "--maxfail", "60", "-W", "default", "-p", "no:cacheprovider"]
    command += ["-p", "bench.device.tests", "-o", "addopts=--import-mode=importlib"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=stage.ROOT,
        env=os.environ | {"CONTRASTIVE_OPS_TEST_REPORTS": str(reports), "PYTHONPATH": str(stage.ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        status = "done" if process.returncode in (0, 1) else f"pytest ended with exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        status = f"stopped after {seconds:.0f} s"
    rows = stage.read(reports)
    reports.unlink(missing_ok=True)
    outcomes: dict[str, int] = {}
    for row in rows:
        outcomes[row["outcome"]] = outcomes.get(row["outcome"], 0) + 1
    slowest = sorted(rows, key=lambda row: -row["seconds"])[:10]
    return {
        "status": status,
        "seconds": time.perf_counter() - begin,
        "outcomes": outcomes,
        "problems": [row for row in rows if row["outcome"] != "passed"],
        "slowest": [[row["test"], round(row["seconds"], 2)] for row in slowest],
        "output": "" if rows and status == "done" else stage.tail(output, 2000),
    }


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """As a plugin of pytest: a line for each test that ran, failed or skipped."""
    path = os.environ.get("CONTRASTIVE_OPS_TEST_REPORTS")
    if path is None or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
    errors = re.findall(r"^E +(.*)$", text, re.MULTILINE)
    row = {
        "test": report.nodeid.split("::")[-1],
        "outcome": report.outcome,
        "seconds": report.duration,
        "text": "" if report.outcome == "passed" else " ".join(errors or [text[-500:]])[:700],
    }
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    stage.main(run)
