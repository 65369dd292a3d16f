"""The README says what the code is: its table of losses, and the commands that CI takes out of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from contrastive_ops import catalogue

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_table_of_losses():
    start, end = "<!-- losses:start -->\n", "\n<!-- losses:end -->"
    assert README.partition(start)[2].partition(end)[0] == catalogue.table()


@pytest.mark.parametrize(
    ("name", "last"), [("demo", "-m contrastive_ops.demo"), ("tests", "-m pytest -q -n auto --dist worksteal")]
)
def test_commands_do_their_own_setup(name, last):
    (lines,) = re.findall(rf"<!-- command: {name} -->\n```sh\n(.*?)\n```", README, flags=re.DOTALL)
    first, *_, final = lines.splitlines()
    assert first == "python3 -m venv .venv"
    assert final == f".venv/bin/python {last}"
