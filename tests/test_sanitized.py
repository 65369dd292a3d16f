"""The Triton kernels under ttsem: tests/sanitized.py in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = 232


def test_kernels_under_ttsem():
    """No access out of bounds, race or uninitialised read in the kernels, and each planted fault is caught."""
    pytest.importorskip("triton", reason="triton: not installed; pip install triton")
    if importlib.util.find_spec("ttsem") is None:
        # the README has the only mention of a version: ttsem 0.1.0 asks for Python 3.12, so no extra can name it
        install = re.search(r"pip install .*ttsem\S+", (ROOT / "README.md").read_text())
        pytest.skip(f"ttsem: not installed; {install[0]}")
    result = subprocess.run(
        [sys.executable, "-m", "ttsem.sanitize", "pytest", "-q", "-p", "no:cacheprovider", "tests/sanitized.py"],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    output = result.stdout[-6000:] + result.stderr[-2000:]
    assert result.returncode == 0, output
    assert re.search(rf"^{CASES} passed in ", result.stdout, re.MULTILINE), output
    assert "not race-checked" not in result.stdout, output
