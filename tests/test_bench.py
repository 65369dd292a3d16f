"""The bench measures what it says: rights and wrongs are told apart, memory is seen, rows are complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import cases, device, measure
from contrastive_ops import backends

ROOT = Path(__file__).parents[1]

CONTENDERS = {
    "wrong": "return lambda *inputs: 1.001 * reference.clip_loss(*inputs, normalize=False)",
    "wrong_gradient": """
    def detached(x, y, scale):
        return reference.clip_loss(x, y, scale.detach(), normalize=False) + 0 * scale
    return detached""",
    "raising": "raise RuntimeError('planted in /some/private/folder/file.cpp')",
    # 1 MB per sample, so that the warm-up with its few samples can't hide it
    "hungry": """
    def hungry(x, y, scale):
        ballast = torch.ones(250_000 * len(x))
        return reference.clip_loss(x, y, scale, normalize=False) + 0 * ballast[0]
    return hungry""",
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Paths of the contenders above, each a file."""
    folder = tmp_path_factory.mktemp("contenders")
    for name, body in CONTENDERS.items():
        (folder / f"{name}.py").write_text(
            "import torch\nfrom contrastive_ops import reference\n"
            "def why_not(loss):\n    return None if loss == 'clip_loss' else f'no {loss}.'\n"
            f"def function(loss, backend):\n    {body.strip()}\n"
        )
    return {name: str(folder / f"{name}.py") for name in CONTENDERS}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments), "--quick", "--threads", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory, planted):
    """One run over two losses and the planted contenders: what it printed, what it wrote."""
    folder = tmp_path_factory.mktemp("bench")
    names = ("ours", "eager", planted["wrong"], planted["wrong_gradient"], planted["raising"])
    # fmt: off
    done = run("clip_loss", "nt_xent", "--size", "64x16", "--contenders", *names, "--no-memory", "--repeats", 2,
               "--json", folder / "rows.json", "--plot", folder / "plot.png")
    # fmt: on
    assert done.returncode == 0, done.stderr
    return done.stdout, (folder / "rows.json").read_text(), (folder / "plot.png").read_bytes()


def rows_of(quick, loss, contender):
    rows = [row for row in json.loads(quick[1])["rows"] if (row["loss"], row["contender"]) == (loss, contender)]
    return {row["mode"]: row for row in rows}


def test_json_has_machine_versions_commit_and_command(quick):
    header = json.loads(quick[1])
    assert set(header) == {"machine", "versions", "commit", "dirty", "command", "date", "rows"}
    assert {"cpu", "cores", "memory_bytes", "capability"} <= set(header["machine"])
    assert set(header["versions"]) == {"torch", "python", "contrastive_ops"}
    assert header["command"].startswith("python -m bench clip_loss nt_xent --size 64x16")


def test_json_names_no_folder_of_the_machine(quick, tmp_path_factory):
    for folder in (tmp_path_factory.getbasetemp(), ROOT, Path.home(), "/some/private"):
        assert f"{folder}/" not in quick[1]


@pytest.mark.parametrize("contender", ["ours", "eager"])
def test_a_right_contender_has_times_in_every_mode(quick, contender):
    rows = rows_of(quick, "clip_loss", contender)
    assert set(rows) == {"forward", "backward", "both"}
    for row in rows.values():
        assert row["status"] == "ok"
        assert 0 < row["ms"]["min"] <= row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        assert row["gflops"] == pytest.approx(row["flops"] / row["ms"]["p50"] / 1e6)
        assert row["roof_gflops"] > 0
        assert (row["backend"] is None) == (contender != "ours")
    assert rows_of(quick, "clip_loss", "ours")["both"]["ratio"] == {"best": 1.0, "median": 1.0}


def test_flops_follow_the_cost_model(quick):
    def flops(loss):
        return {mode: row["flops"] for mode, row in rows_of(quick, loss, "ours").items()}

    product = 64 * 64 * 16
    assert flops("clip_loss") == {"forward": 2 * product, "backward": 6 * product, "both": 8 * product}
    product = 128 * 128 * 16  # two views
    assert flops("nt_xent") == {"forward": product, "backward": 3 * product, "both": 4 * product}


def test_a_wrong_contender_is_reported_wrong_and_not_timed(quick):
    for contender, part in (
        ("wrong", "the loss is off by 1.0e-03"),
        ("wrong_gradient", "gradient 3 is off by 1.0e+00"),
    ):
        (row,) = rows_of(quick, "clip_loss", contender).values()
        assert row["status"].startswith(f"WRONG: {part}")
        assert row["ms"] is None
        assert f"{contender}: {row['status']}" in quick[0]


def test_a_raising_contender_is_reported_with_its_sentence(quick):
    (row,) = rows_of(quick, "clip_loss", "raising").values()
    assert row["status"] == "RuntimeError: planted in file.cpp"
    assert row["ms"] is None
    assert "raising: RuntimeError: planted in file.cpp" in quick[0]


def test_a_contender_without_the_loss_says_so(quick):
    (row,) = rows_of(quick, "nt_xent", "raising").values()
    assert row["status"] == "n/a: no nt_xent."


def test_output_is_plain_in_a_log(quick):
    assert "clip_loss  N = 64, D = 16, float32" in quick[0]
    assert "/ ours" in quick[0]
    assert "\x1b" not in quick[0]
    assert "\r" not in quick[0]


def test_plot_is_an_image(quick):
    assert quick[2].startswith(b"\x89PNG")


def test_memory_sees_an_allocation_of_known_size(planted, tmp_path):
    done = run("clip_loss", "--size", "200x16", "--contenders", planted["hungry"], "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    (row,) = (row for row in json.loads((tmp_path / "rows.json").read_text())["rows"] if row["mode"] == "both")
    assert row["status"] == "ok"
    assert 160e6 < row["peak_bytes"] < 230e6


def test_bad_arguments_are_refused_before_measuring():
    done = run("clip_loss", "--size", "64")
    assert done.returncode == 2
    assert "a size must be samples x features such as 8192x512, got '64'" in done.stderr


def test_a_gpu_that_is_not_there_is_refused_in_a_sentence():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: see `python -m bench --device cuda`")
    done = run("clip_loss", "--device", "cuda")
    assert done.returncode == 2
    assert "error: --device cuda needs a GPU that PyTorch can use, torch" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def cuda(monkeypatch):
    """A GPU whose tensors are on the CPU, in Triton's interpreter: what was asked of torch.cuda, in order."""
    sentence = backends.why_not("triton", "similarity_logsumexp", torch.empty(1, 1))
    if sentence is not None:
        pytest.skip(f"triton: {sentence}")
    asked = []

    def answer(name, value=None):
        monkeypatch.setattr(torch.cuda, name, lambda: asked.append(name) or value)

    answer("is_available", True)
    answer("synchronize")
    answer("reset_peak_memory_stats")
    answer("memory_allocated", 1000)
    answer("max_memory_allocated", 5000)
    answer("get_device_name", "A GPU")
    answer("get_device_properties", SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(device, "_driver", lambda: "550.54")
    monkeypatch.setitem(device.DEVICES, "cuda", device.CUDA(place="cpu", roof_size=64))
    return asked


def test_cuda_is_measured_with_triton_and_synchronised(cuda, tmp_path, capsys):
    # fmt: off
    status = command.main(["clip_loss", "triangle_loss", "--device", "cuda", "--size", "64x16", "--quick",
                           "--contenders", "ours", "eager", "linear_cross_entropy", "--threads", "1", "--repeats", "1",
                           "--no-memory", "--json", str(tmp_path / "rows.json")])
    # fmt: on
    assert status == 0
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["machine"]["gpu"] == "A GPU"
    assert written["machine"]["driver"] == "550.54"
    assert written["machine"]["float32_products"] == "highest"
    assert "triton" in written["versions"]
    assert "A GPU, 80 GiB, driver 550.54, float32 products in highest precision; " in capsys.readouterr().out
    rows = [row for row in written["rows"] if row["status"] == "ok"]
    assert {(row["loss"], row["contender"]): row["backend"] for row in rows} == {
        ("clip_loss", "ours"): "triton",
        ("clip_loss", "eager"): None,
        ("clip_loss", "linear_cross_entropy"): None,
        ("triangle_loss", "ours"): "tiled",
        ("triangle_loss", "eager"): None,
    }
    assert {row["roof"] for row in rows} == {"torch.mm"}
    # before, between and after forward and backward of two rounds of five contenders
    assert cuda.count("synchronize") > 3 * 2 * 5


def test_cuda_memory_is_that_of_its_allocator(cuda):
    case, settings = cases.Case("clip_loss", 64, 16, "float32"), measure.Settings(device="cuda")
    assert measure._peak_bytes_here(case, "ours", settings) == 4000
    assert cuda == ["synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"]
