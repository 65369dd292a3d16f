"""An installation without the C++ engine, or with that of another torch: what is said, and the command in it."""

from __future__ import annotations

import json
import re
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch

import contrastive_ops as co
from contrastive_ops import backends, build, info

X = torch.randn(4, 3)
SENTENCE = "the C++ engine is not here; this adds it: `pip install .`."


@pytest.fixture
def without_engine(monkeypatch):
    monkeypatch.setattr(build, "missing", SENTENCE)
    monkeypatch.setattr(build, "extension", None)
    monkeypatch.setattr(backends, "_warned", set())


def said(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(warning.category is UserWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def test_tiled_for_want_of_an_engine_is_said_once(without_engine):
    assert said(lambda: co.explain(X)) == said(info.report) == []  # these say it themselves
    assert said(lambda: co.clip_loss(X, X, 1.0)) == [
        f'backend="auto" takes "tiled" on this CPU, plain PyTorch, as there is no engine: {SENTENCE} '
        'backend="tiled" and CONTRASTIVE_OPS_BACKEND=tiled take it without this warning.'
    ]
    assert said(lambda: co.clip_loss(X, X, 1.0)) == said(lambda: co.uniformity(X)) == []


@pytest.mark.parametrize("op", [co.uniformity, co.nt_xent, co.gram_loss, co.gramian_volume])
def test_any_op_may_be_the_first(op, without_engine):
    arguments = {co.uniformity: (X,), co.gramian_volume: (X,)}.get(op, (X, X))
    assert len(said(lambda: op(*arguments))) == 1


def test_a_compiled_step_says_it_too(without_engine):
    torch.compiler.reset()
    step = torch.compile(lambda x: co.nt_xent(x, x), backend="eager", fullgraph=True)
    assert [text for text in said(lambda: step(X)) if "no engine" in text]


def test_tiled_by_name_is_no_surprise(without_engine, monkeypatch):
    assert said(lambda: co.nt_xent(X, X, backend="tiled")) == []
    monkeypatch.setenv("CONTRASTIVE_OPS_BACKEND", "tiled")
    assert said(lambda: co.nt_xent(X, X)) == []


def test_nothing_is_said_where_the_engine_runs(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(build, "missing", None)
    assert said(lambda: backends.choose("similarity_logsumexp", X, "auto")) == []


# an engine for another torch


@pytest.fixture
def engine(monkeypatch):
    """One for torch 2.13.0 in place of the engine that is built."""
    module = ModuleType("contrastive_ops._C")
    module.torch_version = "2.13.0"
    monkeypatch.setitem(sys.modules, "contrastive_ops._C", module)
    return module


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.13.0+cu130", "2.13.2"])
def test_an_engine_for_this_torch(version, engine, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert build.load_engine() is engine


@pytest.mark.parametrize("version", ["2.14.1+cpu", "2.12.1", "2.1.3", "3.13.0"])
def test_an_engine_for_another_torch_is_refused(version, engine, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert build.load_engine() == (
        f"the C++ engine was built for torch 2.13.0, and this is torch {version}; this rebuilds it: {build.install()}."
    )


def test_an_engine_that_is_not_there_or_does_not_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "contrastive_ops._C", None)
    assert build.load_engine().startswith(
        "the C++ engine is not part of this installation; where there are torch and a"
    )

    def broken(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(build.importlib, "import_module", broken)
    assert re.match(r"the C\+\+ engine does not load \(undefined symbol\); this rebuilds it for ", build.load_engine())


# the command


def test_the_command_is_one_line_to_copy():
    """Nothing is glued to it, and its variables reach the build and not what comes before."""
    command = build.install(CONTRASTIVE_OPS_BUILD="cuda", TORCH_CUDA_ARCH_LIST="")
    assert command == (
        "`pip install \"setuptools>=77\" wheel ninja && CONTRASTIVE_OPS_BUILD=cuda TORCH_CUDA_ARCH_LIST='' pip install "
        f"--no-build-isolation --no-deps --force-reinstall --no-cache-dir {build.source()}`"
    )


def test_a_checkout_is_installed_in_place(tmp_path):
    (tmp_path / "a clone").mkdir()
    (tmp_path / "a clone" / "setup.py").touch()
    assert build.source(tmp_path / "a clone" / "contrastive_ops") == f"-e '{tmp_path}/a clone'"


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        ({"url": "file:///home/me/clone", "dir_info": {}}, "file:///home/me/clone"),
        ({"url": "file:///home/me/contrastive_ops-0.1.0.tar.gz", "archive_info": {}},
         "file:///home/me/contrastive_ops-0.1.0.tar.gz"),
        ({"url": "https://host/clone.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
         "git+https://host/clone.git@abc"),
        ({"url": "file:///home/me/contrastive_ops-0.1.0-py3-none-any.whl", "archive_info": {}},
         "path/to/contrastive_ops"),
        (None, "--no-binary contrastive_ops contrastive_ops"),
    ],
    ids=["clone", "archive", "repository", "wheel", "index"],
)  # fmt: skip
def test_what_was_installed_is_installed_again(origin, source, tmp_path, monkeypatch):
    recorded = SimpleNamespace(read_text=lambda name: None if origin is None else json.dumps(origin))
    monkeypatch.setattr(build.metadata, "distribution", lambda name: recorded)
    assert build.source(tmp_path / "contrastive_ops") == source


def test_a_package_that_nothing_installed(tmp_path, monkeypatch):
    def unknown(name):
        raise build.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(build.metadata, "distribution", unknown)
    assert build.source(tmp_path / "contrastive_ops") == "path/to/contrastive_ops"
