"""What the stages found, as report.json with everything and report.md to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import report
from bench.device.stage import Outcome

Rows = list[dict[str, Any]]


def write(folder: Path, outcomes: Sequence[Outcome]) -> None:
    (folder / "report.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    (folder / "report.md").write_text(markdown(outcomes))


def well(outcomes: Sequence[Outcome]) -> bool:
    """Whether every stage ended, and no engine was found wrong."""
    ended = all(outcome.status == "done" for outcome in outcomes)
    found = {outcome.stage: outcome.rows for outcome in outcomes}
    smoke = all(row["status"] == "ok" for row in found.get("smoke", ()))
    tests = all(not row["problems"] and row["status"] == "done" for row in found.get("tests", ()))
    times = all(row.get("status") in ("ok", "out of memory") for row in found.get("times", ()) if "loss" in row)
    return ended and smoke and tests and times


def markdown(outcomes: Sequence[Outcome]) -> str:
    lines = ["# A GPU, measured", ""]
    header = next((row for o in outcomes for row in o.rows if row.get("kind") == "header"), None)
    if header is not None:
        lines += [report.describe(header), ""]
    lines += _table(("stage", "ended", "s"), [(o.stage, o.status, f"{o.seconds:.0f}") for o in outcomes])
    for outcome in outcomes:
        lines += ["", f"## {outcome.stage}", ""]
        lines += SECTIONS[outcome.stage](outcome.rows) if outcome.rows else ["Nothing was written."]
        if outcome.status != "done" and outcome.output:
            lines += ["", "The end of what it printed:", "", "```", outcome.output[-1500:].strip(), "```"]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return lines + [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    ]


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.{digits}g}"


def _machine(rows: Rows) -> list[str]:
    lines = []
    for row in rows:
        if row["kind"] != "header":
            lines += [
                f"- {row['kind']}: "
                + ", ".join(f"{name} {_value(value)}" for name, value in row.items() if name != "kind")
            ]
    return lines


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _smoke(rows: Rows) -> list[str]:
    good = sum(row["status"] == "ok" for row in rows)
    engines = sorted({(row["engine"], row["dtype"]) for row in rows if row["status"] == "ok"})
    lines = [f"{good} of {len(rows)} cases agree with float64: " + ", ".join(f"{e} {d}" for e, d in engines) + "."]
    bad = [row for row in rows if row["status"] != "ok"]
    if bad:
        lines += [
            "",
            *_table(
                ("engine", "dtype", "case", "status"),
                [[row[k] for k in ("engine", "dtype", "case", "status")] for row in bad],
            ),
        ]
    return lines


def _tests(rows: Rows) -> list[str]:
    lines = _table(
        ("pass", "status", "passed", "failed", "skipped", "s"),
        [
            (
                row["name"],
                row["status"],
                *(row["outcomes"].get(k, 0) for k in ("passed", "failed", "skipped")),
                f"{row.get('seconds', 0):.0f}",
            )
            for row in rows
        ],
    )
    for row in rows:
        lines += [""] + [f"- {p['outcome']}: {p['test']}: {p['text']}" for p in row["problems"]]
        if row.get("output"):
            lines += ["```", row["output"].strip(), "```"]
    return lines


def _sanitizer(rows: Rows) -> list[str]:
    keys = ("tool", "dtype", "case", "status", "summary")
    return _table(keys, [[row.get(key, "") for key in keys] for row in rows])


def _times(rows: Rows) -> list[str]:
    cells = []
    for row in rows:
        if "loss" in row and row.get("ms"):
            peak = row.get("peak_bytes")
            cells.append((
                f"{row['loss']} {row['setup']}".strip(), f"{row['n']} x {row['d']}", row["dtype"], row["contender"],
                _number(row["ms"]), _number(row["forward_ms"]), _number(row["backward_ms"]),
                "" if peak is None else _number(peak / 2**20), _number(row.get("tflops")),
                "" if row.get("of_cublas") is None else f"{row['of_cublas']:.0%}",
            ))  # fmt: skip
        elif "loss" in row:
            cells.append(
                (
                    row["loss"],
                    f"{row['n']} x {row['d']}",
                    row["dtype"],
                    row.get("contender", ""),
                    row["status"],
                    *[""] * 5,
                )
            )
    head = ("loss", "N x D", "dtype", "contender", "ms", "forward", "backward", "peak MiB", "TFLOP/s", "of cuBLAS")
    lines = _table(head, cells)
    lines += ["", "TFLOP/s count the products that streaming needs; cuBLAS is the product of the similarities alone."]
    for row in rows:
        if "kernels" in row:
            lines += [
                "",
                f"{row['profile']} by {row['contender']}: {row['launches']} launches, "
                f"{_number(row['device_ms'])} ms on the device",
                "",
            ]
            lines += _table(("kernel", "launches", "ms"), row["kernels"])
        elif "profile" in row:
            lines += ["", f"{row['profile']} by {row['contender']}: {row['status']}"]
    return lines


def _tilings(rows: Rows) -> list[str]:
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["field"], row["features"]), []).append(row)
    cells = []
    for (dtype, field, features), of_group in groups.items():
        timed = sorted((row for row in of_group if row["ms"] is not None), key=lambda row: row["ms"])
        for rank, row in enumerate(timed[:4]):
            name = f"{dtype}, D = {features}" if rank == 0 else ""
            cells.append((name, f"{field}=Tiling({', '.join(map(str, row['tiling']))}),", _number(row["ms"], 4)))
        if not timed:
            cells.append((f"{dtype}, D = {features}", field, of_group[0]["status"]))
    return _table(("problem", "tiling", "ms"), cells)


def _host(rows: Rows) -> list[str]:
    keys = ("step_ms", "host_ms", "graph_ms")
    return _table(
        ("N x D", "dtype", "contender", "step ms", "of the host ms", "graph ms", "replay equal"),
        [
            (f"{row['n']} x {row['d']}", row["dtype"], row["contender"], *(_number(row.get(key)) for key in keys),
             row.get("same", row["status"]))
            for row in rows
        ],
    )  # fmt: skip


SECTIONS = {
    "machine": _machine,
    "smoke": _smoke,
    "tests": _tests,
    "sanitizer": _sanitizer,
    "times": _times,
    "tilings": _tilings,
    "host": _host,
}
