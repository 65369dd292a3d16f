"""`python -m bench`: this package's losses against what PyTorch offers. See --help."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bench import cases, contenders, measure, report
from bench.device import DEVICES
from contrastive_ops import backends


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time and memory of the losses against eager PyTorch, torch.compile of it, and "
        "F.linear_cross_entropy. Each contender must first agree with the dense loss in float64. "
        "Exit status 1 when ours does not run or is wrong.",
    )
    parser.add_argument("losses", nargs="*", metavar="loss", help=f"of {', '.join(cases.LOSSES)}; all by default")
    parser.add_argument("--size", nargs="+", type=_size, default=(), metavar="NxD", help="samples x features")
    parser.add_argument("--dtype", nargs="+", choices=cases.DTYPES, default=(), help="of the embeddings")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=contenders.DEFAULT,
        metavar="NAME",
        help=f"of {', '.join(contenders.BUILT_IN)}, or paths of .py files like those in bench/contenders",
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where everything runs")
    parser.add_argument(
        "--backend", choices=backends.NAMES, default="auto", help='of ours; with --device cuda "auto" is triton'
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="K")
    parser.add_argument("--repeats", type=int, default=5, metavar="K", help="rounds at least; quick cases get more")
    parser.add_argument("--quick", action="store_true", help="one small size per loss, a tenth of the time per case")
    parser.add_argument("--no-memory", action="store_true", help="no process per case and contender for its memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, after every case")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory over N, .png or .svg")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    options = parser.parse_args(argv)

    for loss in options.losses:
        if loss not in cases.LOSSES:
            parser.error(f"loss must be one of {', '.join(cases.LOSSES)}, got {loss!r}.")
    if min(options.threads, options.repeats) < 1:
        parser.error("--threads and --repeats must be at least 1.")
    reason = DEVICES[options.device].why_not()
    if reason is not None:
        parser.error(f"--device {options.device} {reason}")
    for name in options.contenders:
        try:
            contenders.load(name)
        except ValueError as error:
            parser.error(str(error))
    # before the minutes of measuring, not after them
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib; pip install matplotlib.")
    for path in filter(None, (options.json, options.plot)):
        if not path.absolute().parent.is_dir():
            parser.error(f"the folder of {path} does not exist.")
    if options.readme:
        reason = report.readme_lacks_markers(report.ROOT / "README.md")
        if reason is not None:
            parser.error(reason)
    return options


def _size(text: str) -> tuple[int, int]:
    n, _, d = text.partition("x")
    if not (n.isdigit() and d.isdigit() and int(n) > 1 and int(d) > 0):
        raise argparse.ArgumentTypeError(f"a size must be samples x features such as 8192x512, got {text!r}")
    return int(n), int(d)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    settings = measure.Settings(
        repeats=options.repeats,
        seconds=0.1 if options.quick else 1.0,
        memory=not options.no_memory,
        backend=options.backend,
        threads=options.threads,
        device=options.device,
    )
    chosen = cases.select(options.losses, options.size, options.dtype, options.quick)
    header = report.header(shlex.join(["python", "-m", "bench", *argv]), DEVICES[options.device])
    screen = report.screen()
    screen.write(report.describe(header))
    busy = report.disturbance(header)
    if busy is not None:
        screen.write(busy)
    screen.write(
        "Median times; '/ ours' is a time over that of ours, above 1 where ours is faster.\n"
        "GFLOP/s count what streaming needs, for every contender; the roof is a product alone, in the same run.\n"
    )

    rows: list[measure.Row] = []
    with screen.progress(len(chosen)) as show:
        for done, case in enumerate(chosen):
            of_case = measure.measure(case, options.contenders, settings, partial(show, done))
            rows += of_case
            screen.table(case, of_case)
            if options.json is not None:
                report.write_json(options.json, header, rows)
    if options.plot is not None:
        report.plot(options.plot, header, rows)
    if options.readme:
        report.write_readme(report.ROOT / "README.md", report.markdown(header, rows))
    return 0 if all(row.ok for row in rows if row.contender == "ours") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
