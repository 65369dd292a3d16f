"""`python -m bench.device`: the first minutes with a GPU as a report. See --help."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.device import report, stage

# in the order of worth, with seconds each takes at most; --budget cuts from the end
STAGES = {"machine": 90, "smoke": 60, "tests": 200, "sanitizer": 45, "times": 130, "tilings": 100, "host": 30}
REHEARSED = 200  # seconds of a stage on a CPU, of which it takes ten


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.device",
        description="Tests, times and tunes the GPU engines on this machine's GPU, stage by stage, each in a process "
        "of its own, and writes report.md and report.json after each. Exit status 1 when a stage did not end or an "
        "engine is wrong.",
    )
    parser.add_argument("--out", type=Path, default=Path("device-report"), metavar="DIR", help="folder of the report")
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="of all stages together")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE",
                        help=f"of {', '.join(STAGES)}, in the order given")  # fmt: skip
    parser.add_argument("--limit", nargs="+", default=[], metavar="STAGE=SECONDS", help="other limits of stages")
    parser.add_argument("--rehearse", action="store_true", help="every stage on the CPU, as small as can be")
    options = parser.parse_args(argv)
    limits: dict[str, float] = dict(STAGES)
    for text in options.limit:
        name, _, seconds = text.partition("=")
        if name not in STAGES or not seconds.replace(".", "", 1).isdigit():
            parser.error(f"--limit takes a stage and its seconds such as tests=120, got {text!r}.")
        limits[name] = float(seconds)
    options.limits = limits
    return options


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    outcomes: list[stage.Outcome] = []
    for name in options.only:
        left = options.budget - (time.perf_counter() - begin)
        seconds = min(REHEARSED if options.rehearse else options.limits[name], left)
        if seconds < 5:
            outcomes.append(stage.Outcome(name, "not run: no time was left", 0.0, [], ""))
        else:
            print(f"{name}: at most {seconds:.0f} s", flush=True)
            outcomes.append(stage.start(name, options.out, seconds, options.rehearse))
            print(f"{name}: {outcomes[-1].status} after {outcomes[-1].seconds:.0f} s", flush=True)
        report.write(options.out, outcomes)
    print((options.out / "report.md").read_text())
    return 0 if report.well(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
