"""Stage `sanitizer`: compute-sanitizer over the smoke cases of the CUDA engine, for accesses and for races."""

from __future__ import annotations

import shutil

from bench.device import smoke, stage

CASES = (
    ("bfloat16", "forward, rows: everything, D = 20"),
    ("bfloat16", "forward, blocks: self-everything, D = 260"),
    ("float32", "forward, blocks: everything, D = 20"),
    ("float16", "rows alone, frozen columns, D = 17"),
    ("bfloat16", "volumes, P = 3"),
)


def run(this: stage.Stage) -> None:
    if shutil.which("compute-sanitizer") is None:
        this.write(tool="compute-sanitizer", status="is not on this machine")
        return
    for tool in ("memcheck", "racecheck"):
        options = ["compute-sanitizer", "--tool", tool, "--print-limit", "5", "--error-exitcode", "9"]
        commands = [[*options, *smoke.command("cuda", dtype, "--case", case)] for dtype, case in CASES]
        share = this.left() - 3 if tool == "racecheck" else 0.5 * this.left()
        for (dtype, case), (status, output) in zip(CASES, stage.parallel(commands, share), strict=True):
            lines = [line for line in output.splitlines() if line.startswith("=========")]
            summary = lines[-1].strip("= ") if lines else stage.tail(output, 300)
            found = "" if status == "done" else stage.tail(output, 1500)
            this.write(tool=tool, dtype=dtype, case=case, status=status, summary=summary, output=found)


if __name__ == "__main__":
    stage.main(run)
