"""What becomes of the rows: a table on the screen, JSON, a plot, the table in README.md."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import cycle, product
from pathlib import Path
from typing import Any, Literal

import torch

import contrastive_ops
from bench.cases import Case
from bench.device import Device
from bench.measure import MODES, Row, without_folders
from contrastive_ops.info import processor

ROOT = Path(__file__).parents[1]
MEASURED = ("contrastive_ops", "csrc", "kernels", "bench", "setup.py", "pyproject.toml")
START, END = "<!-- bench:start -->", "<!-- bench:end -->"


def header(command: str, device: Device) -> dict[str, Any]:
    """The machine, the versions and the command: what a number is worth nothing without."""
    return {
        "machine": {
            "cpu": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "load_average": os.getloadavg()[0],
            **device.machine(),
        },
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "contrastive_ops": contrastive_ops.__version__,
            **device.versions(),
        },
        "commit": _git("rev-parse", "HEAD"),
        # files that are not measured, such as the JSON itself, make nothing dirty
        "dirty": bool(_git("status", "--porcelain", "--", *MEASURED)),
        "command": without_folders(command),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def describe(header: dict[str, Any]) -> str:
    """The header in two lines."""
    machine, versions = header["machine"], header["versions"]
    commit = header["commit"][:10] + (", changed since" if header["dirty"] else "") if header["commit"] else "unknown"
    gpu, triton = "", ""
    if "gpu" in machine:
        gpu = (
            f"{machine['gpu']}, {machine['gpu_memory_bytes'] / 2**30:.0f} GiB, driver {machine['driver']}, "
            f"float32 products in {machine['float32_products']} precision; "
        )
        triton = f", triton {versions['triton']}"
    return (
        f"{gpu}{machine['cpu']} ({machine['capability']}), {machine['threads']} threads on {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; torch {versions['torch']}{triton}, Python {versions['python']}\n"
        f"contrastive_ops {versions['contrastive_ops']}, commit {commit}; {header['date'][:10]}; {header['command']}"
    )


def disturbance(header: dict[str, Any]) -> str | None:
    """The sentence that warns of other programs on the machine; None when it is quiet."""
    load, cores = header["machine"]["load_average"], header["machine"]["cores"]
    if load < 0.5 * cores:
        return None
    return (
        f"The machine is busy: load average {load:.1f} on {cores} cores. Times will vary, most with as many threads as "
        "cores; take the best of many, or --threads 1."
    )


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, header: dict[str, Any], rows: Sequence[Row]) -> None:
    path.write_text(json.dumps({**header, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


COLUMNS = (
    "contender",
    "forward ms",
    "backward ms",
    "both ms",
    "p20 to p80",
    "best ms",
    "/ ours",
    "best / ours",
    "peak MB",
    "GFLOP/s",
    "of roof",
)


def table(rows: Sequence[Row]) -> tuple[list[list[str]], list[str]]:
    """Cells under COLUMNS for the rows of one case, and the sentences below them."""
    median = {(row.contender, row.mode): row.ms["p50"] for row in rows if row.ms is not None}
    cells, sentences = [], []
    for row in (row for row in rows if row.mode == "both"):
        if row.status != "ok":
            sentences.append(f"{row.contender}: {row.status}")
        name = row.contender if row.backend is None else f"{row.contender} ({row.backend})"
        if row.ms is not None:
            cells.append(
                [
                    name,
                    *(_number(median[row.contender, mode]) for mode in MODES),
                    f"{_number(row.ms['p20'])} to {_number(row.ms['p80'])}",
                    _number(row.ms["min"]),
                    "" if row.ratio is None else f"{row.ratio['median']:.2f}",
                    "" if row.ratio is None else f"{row.ratio['best']:.2f}",
                    "" if row.peak_bytes is None else _number(row.peak_bytes / 1e6),
                    "" if row.gflops is None else _number(row.gflops),
                    "" if row.gflops is None or row.roof_gflops is None else f"{row.gflops / row.roof_gflops:.1%}",
                ]
            )
        elif not row.inapplicable:
            cells.append([name, "", "", row.verdict, *[""] * (len(COLUMNS) - 4)])
    roofs = {f"roof: {row.roof_gflops:.0f} GFLOP/s ({row.roof})" for row in rows if row.roof_gflops is not None}
    return cells, [*sorted(roofs), *sentences]


def _number(value: float) -> str:
    """Three significant digits, more before the point, and no exponent for what is measured here."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


class Screen:
    """Plain text: a table per case, nothing that moves."""

    def write(self, text: str) -> None:
        print(text, flush=True)

    def table(self, case: Case, rows: Sequence[Row]) -> None:
        cells, sentences = table(rows)
        widths = [max(len(line[i]) for line in (list(COLUMNS), *cells)) for i in range(len(COLUMNS))]
        lines = [[*COLUMNS], *cells]
        self.write(_title(case))
        for name, *values in lines:
            right = (value.rjust(width) for value, width in zip(values, widths[1:], strict=True))
            self.write("  ".join((name.ljust(widths[0]), *right)).rstrip())
        self.write("\n".join([*sentences, ""]))

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[int, str], None]]:
        """A function that takes how many cases are done, and what comes next."""
        yield lambda done, text: None


class RichScreen(Screen):
    """The same with rich; the bar moves only on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        # a log has no width of its own; a narrow terminal may break the lines, but no number is to be cut
        self.console = Console(highlight=False)
        self.console.width = max(self.console.width, 130)

    def write(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def table(self, case: Case, rows: Sequence[Row]) -> None:
        from rich import box
        from rich.table import Table

        cells, sentences = table(rows)
        drawn = Table(title=_title(case), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, column in enumerate(COLUMNS):
            drawn.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
        for line in cells:
            drawn.add_row(*line)
        self.console.print(drawn)
        self.write("\n".join([*sentences, ""]))

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[int, str], None]]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        # a bar that draws itself in a thread would take time from what is measured
        with Progress(
            *columns, console=self.console, disable=not self.console.is_terminal, transient=True, auto_refresh=False
        ) as bar:
            task = bar.add_task("", total=total)
            yield lambda done, text: bar.update(task, description=text, completed=done, refresh=True)


def screen() -> Screen:
    try:
        return RichScreen()
    except ModuleNotFoundError:
        return Screen()


def _title(case: Case) -> str:
    size = f"{case.loss}  N = {case.n}, D = {case.d}, {case.dtype}"
    return f"{size}: {case.setup}" if case.setup else size


def markdown(header: dict[str, Any], rows: Sequence[Row]) -> str:
    """One line per case, one column per contender: median time of forward + backward, and peak memory."""
    both = [row for row in rows if row.mode == "both"]
    names = list(dict.fromkeys(row.contender for row in both))
    cells: dict[tuple[str, str, str], list[str]] = {}
    for row in both:
        cells.setdefault((row.loss, f"{row.n} x {row.d}", row.dtype), []).append(_cell(row))
    failures = [f"{row.contender}, {row.loss}: {row.status}" for row in both if not (row.ok or row.inapplicable)]
    machine, software = describe({**header, "command": f"`{header['command']}`"}).splitlines()
    return "\n".join(
        [
            f"| {' | '.join(['loss', 'N x D', 'dtype', *names])} |",
            f"| --- | --- | --- |{' ---: |' * len(names)}",
            *(f"| {' | '.join([*case, *values])} |" for case, values in cells.items()),
            "",
            "Median time of forward + backward; peak memory beyond the inputs, gradients included, in a fresh process.",
            f"{machine}.",
            f"{software}.",
            *(f"\n{failure}" for failure in dict.fromkeys(failures)),
        ]
    )


def _cell(row: Row) -> str:
    if row.ms is None:
        return row.verdict
    time = f"{_number(row.ms['p50'])} ms"
    return time if row.peak_bytes is None else f"{time}, {_number(row.peak_bytes / 1e6)} MB"


def readme_lacks_markers(path: Path) -> str | None:
    """The sentence that says why the table has no place in the file; None when it has one."""
    text = path.read_text() if path.exists() else ""
    if text.count(START) == text.count(END) == 1 and text.index(START) < text.index(END):
        return None
    return f"{path.name} must have one line {START} and below it one line {END}, the table goes between them."


def write_readme(path: Path, table: str) -> None:
    text = path.read_text()
    before, after = text[: text.index(START)], text[text.index(END) :]
    path.write_text(f"{before}{START}\n{table}\n{after}")


def plot(path: Path, header: dict[str, Any], rows: Sequence[Row]) -> None:
    """Time and memory over N: a pair of panels per loss, a colour per contender, a line style per D and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    both = [row for row in rows if row.mode == "both"]
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row.contender for row in both))}
    losses = list(dict.fromkeys(row.loss for row in both))
    figure, panels = pyplot.subplots(
        len(losses), 2, figsize=(12, 1 + 3.2 * len(losses)), squeeze=False, layout="constrained"
    )
    for loss, (of_time, of_memory) in zip(losses, panels, strict=True):
        of_loss = sorted((row for row in both if row.loss == loss), key=lambda row: row.n)
        features = dict.fromkeys((row.d, row.dtype) for row in of_loss)
        styles = dict(zip(features, cycle(LINE_STYLES), strict=False))
        for (name, color), (feature, (marker, line)) in product(colors.items(), styles.items()):
            group = [row for row in of_loss if (row.contender, row.d, row.dtype) == (name, *feature)]
            style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": line}
            timed = [(row.n, row.ms) for row in group if row.ms is not None]
            of_time.plot([n for n, _ in timed], [ms["p50"] for _, ms in timed], **style)
            sized = [(row.n, row.peak_bytes / 1e6) for row in group if row.peak_bytes]
            of_memory.plot([n for n, _ in sized], [megabytes for _, megabytes in sized], **style)
        _log_axes(of_time, f"{loss}: forward + backward, median", "ms", of_loss)
        _log_axes(of_memory, f"{loss}: peak memory beyond the inputs", "MB", of_loss)
        of_memory.legend(
            handles=[
                *(Line2D([], [], color=color, linewidth=3, label=name) for name, color in colors.items()),
                *(
                    Line2D([], [], color="black", marker=marker, linestyle=line, label=f"D = {d}, {dtype}")
                    for (d, dtype), (marker, line) in styles.items()
                ),
            ],
            loc="center left",
            bbox_to_anchor=(1.02, 0.5),
        )
    figure.supxlabel(describe(header), fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


LINE_STYLES: tuple[tuple[str, Literal["-", "--", ":", "-."]], ...] = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))


def _log_axes(panel: Any, title: str, unit: str, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator

    sizes = sorted({row.n for row in rows})
    panel.set(title=title, xlabel="N", ylabel=unit, xscale="log", xlim=(sizes[0] / 1.3, sizes[-1] * 1.3))
    panel.set_xticks(sizes, labels=sizes)
    values = [value for line in panel.lines for value in line.get_ydata()]
    if values:
        # wide enough for two labels, however close the lines
        panel.set(yscale="log", ylim=(min(values) / 2, max(values) * 2))
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=30))
        panel.yaxis.set_major_formatter("{x:g}")
    else:
        panel.text(0.5, 0.5, "not measured", ha="center", transform=panel.transAxes)
    panel.minorticks_off()
    panel.grid(alpha=0.3)
