"""What the demo shows: lines, tables and progress in the terminal, curves in a file, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contrastive_ops.demo.training import Quality, Step

NO_MATPLOTLIB = '--plot needs matplotlib, which is not installed: pip install "contrastive_ops[bench]".'
WIDTH = 110  # characters, where the output is no terminal


class Screen:
    """Prints with rich where it is installed, in plain text otherwise; for a log, progress is one line now and then."""

    def __init__(self) -> None:
        try:
            from rich.console import Console
        except ImportError:
            self.console: Any = None
        else:
            # code and docstrings hold brackets and colons, which are no markup here
            self.console = Console(markup=False, emoji=False, highlight=False)
            if not self.console.is_terminal:
                self.console.width = WIDTH

    def line(self, text: str = "") -> None:
        if self.console is None:
            print(text, flush=True)
        else:
            self.console.print(text, soft_wrap=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column is text, the others are numbers."""
        self.line(f"\n{title}")
        if self.console is None:
            widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
            for first, *others in (header, *rows):
                cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
                self.line("  ".join(["", first.ljust(widths[0]), *cells]))
            return
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=any(header))
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Gives a function to call with how much is done and a note."""
        if self.console is None or not self.console.is_terminal:
            last = time.monotonic()

            def print_line(done: int, note: str) -> None:
                nonlocal last
                if done == total or time.monotonic() - last > 2:
                    last = time.monotonic()
                    self.line(f"{title} {done:>{len(str(total))}}/{total}  {note}".rstrip())

            yield print_line
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}", markup=False))
        with Progress(TextColumn(title), BarColumn(), *columns, console=self.console) as bars:
            bar = bars.add_task(title, total=total, note="")
            yield lambda done, note: bars.update(bar, completed=done, note=note)


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def resident_bytes() -> int | None:
    """Memory this process holds now. Where the system doesn't say, the most it has held so far."""
    try:
        import resource

        fields = Path("/proc/self/statm").read_text().split()
        return int(fields[1]) * resource.getpagesize()
    except (ImportError, OSError):
        return peak_bytes()


def peak_bytes() -> int | None:
    """The most memory this process has held so far; None on Windows, which has no `resource`."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """Memory that this process could still have without swapping; None where the system doesn't say."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return None
    try:  # a container may have less than its machine
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    return available if limit == "max" else min(available, int(limit) - (resident_bytes() or 0))


def plot(file: Path, steps: Sequence[Step], qualities: Sequence[Quality], title: str) -> None:
    """Draw the loss of every step, and the quality before the first step and after each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(steps) + 1), [step.loss for step in steps])
    left.set(xlabel="step", ylabel="loss", yscale="log")
    for label, field in (("recall@10", "recall_at_10"), ("MRR", "mean_reciprocal_rank"), ("recall@1", "recall_at_1")):
        right.plot([getattr(quality, field) for quality in qualities], label=label)
    right.set(xlabel="step", ylabel="on held-out pairs", ylim=(0, 1))
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def why_no_plot(file: Path) -> str | None:
    """The sentence that says why `plot` can't write the file; None when it can. Asked before the work, not after."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return NO_MATPLOTLIB
    formats = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in formats:
        return f"--plot must name a file ending in one of .{', .'.join(sorted(formats))}, got {file}."
    if not file.absolute().parent.is_dir():
        return f"--plot must name a file in a folder that exists, got {file}."
    return None
