"""The demo: what it collects, how it hashes and scores, and that a small run learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contrastive_ops import build, clip_loss
from contrastive_ops.demo import __main__ as command
from contrastive_ops.demo import report
from contrastive_ops.demo.__main__ import main
from contrastive_ops.demo.encoder import TfIdf, bucket, count_features, row_indices
from contrastive_ops.demo.pairs import Pair, collect_pairs, words
from contrastive_ops.demo.report import NO_MATPLOTLIB, Screen
from contrastive_ops.demo.training import dense_loss, lexical_similarities, quality_of

MODULE = '''
class Reader:
    def readLine(self, size=-1):
        """Read one line
        of the file.

        And a second paragraph.
        """
        # comment stays
        return self.file.readline(size)

    def only_documented(self):
        """A function without any code."""

    def one_line(self): "Docstring and code share a line."; return 1


async def close(reader):
    """Close the reader after use."""
    def inner():
        """Part of the code of the outer function."""
        return 1
    await reader.close()


def brief():
    """Too short."""
    return 2
'''


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "module.py").write_text(MODULE)
    (tmp_path / "package" / "copy.py").write_text(MODULE)
    (tmp_path / "tests" / "test_module.py").write_text(MODULE.replace("Read one", "Test that it reads one"))
    (tmp_path / "broken.py").write_text("def broken(:\n    'A docstring of four words.'\n    return 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "package" / "other.py").write_text(
        'def again(a):\n    """CLOSE the reader, after use!"""\n    return a\n\n\n'
        'def escape(a):\n    """Find the "\\d" digits of it."""\n    return a\n'
    )
    return tmp_path


def test_pairs_are_functions_without_their_docstring(root: Path) -> None:
    read, close, escape = collect_pairs([root], limit=100)
    assert read.text == "Read one line of the file."
    assert read.code == (
        "    def readLine(self, size=-1):\n        # comment stays\n        return self.file.readline(size)"
    )
    assert (read.name, read.place) == ("readLine", "module.py:3")
    assert close.code.startswith("async def close(reader):\n    def inner():")
    assert close.text not in close.code
    assert (escape.name, escape.place) == ("escape", "package/other.py:6")


def test_pairs_are_the_same_every_time_and_as_many_as_asked(root: Path) -> None:
    everything = collect_pairs([root], limit=100)
    assert collect_pairs([root], limit=100) == everything
    assert collect_pairs([root], limit=2) == everything[:2]
    assert collect_pairs([root, root], limit=100) == everything
    assert collect_pairs([root / "missing"], limit=100) == []


def test_words_split_identifiers() -> None:
    assert words("readHTTPHeader_2(fooBar)") == ["read", "http", "header", "2", "foo", "bar"]


def test_hashing_is_the_same_in_every_process() -> None:
    assert bucket("read") == 16743
    program = (
        "from contrastive_ops.demo.encoder import count_features; print(count_features(['parse a file']).features)"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    assert _python("-c", program, PYTHONHASHSEED=seed).stdout == f"{count_features(['parse a file']).features}\n"


def test_bags_have_length_one_and_find_the_words_they_share() -> None:
    features = TfIdf()
    code = features.fit_transform(["def parse(x)", "def write(file)", ""])
    squares = torch.zeros(3).index_add_(0, row_indices(code), code.weights.square())
    torch.testing.assert_close(squares, torch.tensor([1.0, 1.0, 0.0]))
    scores = lexical_similarities(features.transform(["write it", "unseen"]), code)
    assert scores.shape == (2, 3)
    assert scores[0].argmax() == 1
    assert scores[0, 0] == scores[0, 2] == 0


def test_quality_by_hand() -> None:
    scores = torch.full((12, 12), -1.0).fill_diagonal_(1.0)
    scores[0] = torch.arange(12.0)  # right answer last of 12
    scores[1, 2:5] = 2.0  # right answer fourth
    scores[2, 7] = 1.0  # a tie counts against it: second
    quality = quality_of(scores)
    assert quality.recall_at_1 == pytest.approx(9 / 12)
    assert quality.recall_at_10 == pytest.approx(11 / 12)
    assert quality.mean_reciprocal_rank == pytest.approx((9 + 1 / 12 + 1 / 4 + 1 / 2) / 12)


def test_a_small_run_learns(tmp_path: Path) -> None:
    plot = tmp_path / "curves.png"
    query = "write bytes to a file"
    arguments = ("--pairs", "400", "--steps", "6", "--dim", "32", "--query", query, "--plot", str(plot))
    ours = () if build.missing is None else ("-W", 'ignore:backend="auto" takes "tiled"')
    run = _python("-W", "error", *ours, "-m", "contrastive_ops.demo", *arguments)
    assert run.returncode == 0, run.stderr
    before, after = (
        float(re.search(rf"{row} +[\d.]+ +([\d.]+)", run.stdout)[1])  # type: ignore[index]
        for row in ("before training", "after training")
    )
    assert before < 0.25
    assert after > before + 0.25
    assert "training on 300 pairs as one batch, 100 held out; D = 32" in run.stdout
    assert re.search(r"\n +the dense loss in its place, one step +\d+\.\d\d s", run.stdout)
    assert f"\n{query}\n" in run.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_dense_loss_is_ours() -> None:
    code, text = torch.randn(2, 50, 8).unbind()
    scale = torch.tensor(20.0)
    torch.testing.assert_close(dense_loss(code, text, scale), clip_loss(code, text, scale))


@pytest.mark.parametrize(
    ("bytes_", "cell"), [(None, "no memory for it"), (2 * 4 * 4 * 15**2, "no memory for it"), (10**9, r"\d\.\d\d s")]
)
def test_the_dense_loss_is_timed_where_memory_allows(bytes_, cell, monkeypatch, capsys, root) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(report, "available_bytes", lambda: bytes_)
    monkeypatch.setattr(
        command, "collect_pairs", lambda *_: [Pair(f"f{i}", f"does {i}", "f", f"f:{i}") for i in range(20)]
    )
    assert main(["--steps", "1", "--dim", "4", "--backend", "tiled"]) == 0
    assert re.search(f"the dense loss in its place, one step +{cell}\n", capsys.readouterr().out)


def test_memory_that_a_container_leaves(monkeypatch) -> None:
    assert report.available_bytes() is None or report.available_bytes() > 0
    texts = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 4096 kB", "/sys/fs/cgroup/memory.max": "max\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: texts[str(path)])
    monkeypatch.setattr(report, "resident_bytes", lambda: 2**20)
    assert report.available_bytes() == 2**22
    texts["/sys/fs/cgroup/memory.max"] = f"{2**21}\n"
    assert report.available_bytes() == 2**20


def test_plot_without_matplotlib_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as exit_:
        main(["--plot", "curves.png"])
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", NO_MATPLOTLIB + "\n")
    assert 'pip install "contrastive_ops[bench]"' in NO_MATPLOTLIB


def test_tables_and_progress_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    screen = Screen()
    screen.table("Title", ("", "recall"), [("before", "0.1"), ("a [bold]", "0.25")])
    with screen.progress("training", 2) as advance:
        advance(1, "soon")
        advance(2, "done")
    assert capsys.readouterr().out == (
        "\nTitle\n            recall\n  before       0.1\n  a [bold]    0.25\ntraining 2/2  done\n"
    )


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
