"""`python -m bench.device` on a machine without a GPU: the rehearsal of all stages, and stages that go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.device import __main__ as command
from bench.device import report, stage
from contrastive_ops import backends, build

ROOT = Path(__file__).parents[1]
STAGES = {
    "good": "this.write(found=1)\nthis.write(found=2)",
    "silent": "print('nothing to tell')",
    "crashing": "this.write(found=1)\nimport os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
    "hanging": "this.write(found=1)\nimport subprocess, time\nsubprocess.Popen(['sleep', '60'])\ntime.sleep(60)",
    "cut": "this.write(found=1)\nthis.rows.open('a').write('{\"found\": ')",
}


def seconds_of(name: str) -> float:
    """Limits that a busy machine keeps, too: importing torch alone takes seconds."""
    return 20.0 if name == "hanging" else 120.0


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Stages that go wrong in one way each, as modules."""
    for name, body in STAGES.items():
        indented = "\n    ".join(body.splitlines())
        (tmp_path / f"planted_{name}.py").write_text(
            f"from bench.device import stage\n\n\ndef run(this):\n    {indented}\n\n\nstage.main(run)\n"
        )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "status", "rows"),
    [
        ("good", "done", 2),
        ("silent", "ended without a result", 0),
        ("crashing", "ended with exit status -11", 1),
        ("hanging", "stopped at its limit of 20 s", 1),
        ("cut", "done", 1),
    ],
)
def test_what_a_stage_leaves(name, status, rows, planted):
    """Rows that were written stay, whatever becomes of the process."""
    outcome = stage.start(name, planted, seconds_of(name), True, module=f"planted_{name}")
    assert (outcome.status, len(outcome.rows)) == (status, rows)
    assert ("nothing to tell" in outcome.output) == (name == "silent")


def test_a_stage_that_goes_wrong_costs_itself_alone(planted, monkeypatch, capsys):
    modules = {"machine": "planted_crashing", "smoke": "planted_hanging", "host": "planted_good"}
    start = stage.start

    def planted_start(name, folder, seconds, rehearse):
        module = modules[name]
        return start(name, folder, seconds_of(module.removeprefix("planted_")), rehearse, module=module)

    monkeypatch.setattr(stage, "start", planted_start)
    monkeypatch.setattr(report, "SECTIONS", dict.fromkeys(report.SECTIONS, lambda rows: [f"{len(rows)} rows"]))
    monkeypatch.setattr(report, "well", lambda outcomes: all(outcome.status == "done" for outcome in outcomes))
    status = command.main(["--out", str(planted / "out"), "--rehearse", "--only", *modules])
    assert status == 1
    written = json.loads((planted / "out" / "report.json").read_text())
    assert [len(outcome["rows"]) for outcome in written] == [1, 1, 2]
    assert sorted(path.name for path in (planted / "out").iterdir()) == ["report.json", "report.md"]


def test_the_budget_cuts_from_the_end(tmp_path, monkeypatch, capsys):
    given = []

    def start(name, folder, seconds, rehearse):
        given.append((name, seconds))
        return stage.Outcome(name, "done", 0.0, [], "")

    monkeypatch.setattr(stage, "start", start)
    command.main(["--out", str(tmp_path), "--budget", "100", "--limit", "tests=30"])
    assert [name for name, _ in given] == list(command.STAGES)
    assert all(seconds <= 100 for _, seconds in given)
    assert dict(given)["tests"] == 30
    given.clear()
    command.main(["--out", str(tmp_path), "--budget", "4"])
    assert given == []
    assert "not run: no time was left" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("limit", ["tests", "tests=", "nothing=3", "tests=soon"])
def test_a_bad_limit_is_refused(limit, capsys):
    with pytest.raises(SystemExit):
        command.parse(["--limit", limit])
    assert "--limit takes a stage and its seconds such as tests=120" in capsys.readouterr().err


def test_a_report_does_not_name_the_checkout(tmp_path):
    this = stage.Stage(tmp_path / "rows", until=0.0, rehearse=True)
    this.write(engine=build.install())
    assert build.source() == f"-e {ROOT}"
    (row,) = stage.read(tmp_path / "rows")
    assert row["engine"].endswith("-e .`")


@pytest.mark.parametrize("packages", ["/usr/lib/python3/site-packages", f"{ROOT}/.venv/lib/python3.12/site-packages"])
def test_nor_the_folder_of_packages(packages, monkeypatch):
    """Also where the end of a text begins in the middle of its name, and where the packages are in the checkout."""
    monkeypatch.setattr(stage, "PACKAGES", packages)
    text = f"warned by {stage.PACKAGES}/torch/_ops.py"
    assert stage.tail(text, 30) == "warned by site-packages/torch/_ops.py"[-30:]


def test_rehearsal(tmp_path):
    """Every stage on the CPU; the report can be read."""
    sentence = backends.why_not("triton", "similarity_logsumexp", torch.empty(1, 1))
    if sentence is not None:
        pytest.skip(f"triton: {sentence}")
    done = subprocess.run(
        [sys.executable, "-m", "bench.device", "--rehearse", "--budget", "1400", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    text = (tmp_path / "report.md").read_text()
    outcomes = json.loads((tmp_path / "report.json").read_text())
    assert [outcome["status"] for outcome in outcomes] == ["done"] * len(command.STAGES), text
    assert done.returncode == 0, text
    for name in command.STAGES:
        assert f"## {name}" in text
    found = {outcome["stage"]: outcome["rows"] for outcome in outcomes}
    assert all(row["status"] == "ok" for name in ("smoke", "times", "tilings", "host") for row in found[name])
    assert {row["contender"] for row in found["times"]} >= {"triton", "tiled", "eager"}
    for folder in (ROOT, tmp_path, Path.home()):
        assert f"{folder}/" not in text
