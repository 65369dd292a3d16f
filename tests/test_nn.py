"""The modules, the learnable scale, and the shape of the package: its public names and the direction of its imports."""

from __future__ import annotations

import ast
import inspect
import math
from pathlib import Path

import pytest
import torch

import contrastive_ops as co
from contrastive_ops import backends, reference
from contrastive_ops.catalogue import LOSSES
from contrastive_ops.nn import LogitScale

MODULES = {
    "info_nce": (co.nn.InfoNCE, {"temperature": 0.3, "label_smoothing": 0.1}),
    "clip_loss": (co.nn.CLIPLoss, {"label_smoothing": 0.1, "normalize": False}),
    "nt_xent": (co.nn.NTXent, {"temperature": 0.3, "reduction": "sum"}),
    "dcl": (co.nn.DCL, {"temperature": 0.3}),
    "dclw": (co.nn.DCLW, {"temperature": 0.3, "sigma": 0.2}),
    "supcon": (co.nn.SupCon, {"temperature": 0.3, "variant": "in", "empty": "drop"}),
    "mv_infonce": (co.nn.MVInfoNCE, {"temperature": 0.3, "include_same_view": False}),
    "mv_dhel": (co.nn.MVDHEL, {"temperature": 0.3}),
    "dhel": (co.nn.DHEL, {"temperature": 0.3, "reduction": "sum"}),
    "pvc": (co.nn.PVC, {"temperature": 0.3, "aggregate": "arithmetic"}),
    "pairwise_views": (co.nn.PairwiseViews, {"loss": "dcl", "temperature": 0.3}),
    "uniformity": (co.nn.Uniformity, {"t": 0.5}),
    "joint_entropy": (co.nn.JointEntropy, {"t": 0.5, "normalize": True}),
    "gram_loss": (co.nn.GramLoss, {"temperature": 0.3, "detach_others": True, "label_smoothing": 0.0}),
    "triangle_loss": (co.nn.TriangleLoss, {"temperature": 0.3, "squared": True}),
}
ROWS = [pytest.param(row, id=row.name) for row in LOSSES]


@pytest.mark.parametrize("loss", ROWS)
def test_module_is_its_function(loss, backend):
    kind, options = MODULES[loss.name]
    arguments = loss.inputs(12, 5, torch.float32, torch.Generator().manual_seed(0))
    module = kind(**options, backend=backend)
    assert torch.equal(module(*arguments), loss.fused(*arguments, **options, backend=backend))
    assert not torch.equal(module(*arguments), loss.fused(*arguments, backend=backend))
    assert kind(backend=backend)(*arguments).equal(loss.fused(*arguments, backend=backend))


# one scalar per batch, there is nothing to reduce
@pytest.mark.parametrize("loss", [row for row in ROWS if row.id != "uniformity"])
def test_call_overrides_the_options_of_the_module(loss):
    kind, options = MODULES[loss.name]
    arguments = loss.inputs(12, 5, torch.float32, torch.Generator().manual_seed(0))
    module = kind(**options)
    assert module(*arguments, reduction="none").shape[-1] in (12, 24)
    assert module(*arguments).shape == ()
    assert "none" not in repr(module)


@pytest.mark.parametrize("loss", ROWS)
def test_module_prints_its_options_and_has_no_state(loss):
    kind, options = MODULES[loss.name]
    module = kind(**options)
    assert repr(module) == f"{kind.__name__}({', '.join(f'{k}={v!r}' for k, v in options.items())})"
    assert repr(kind()) == f"{kind.__name__}()"
    assert not module.state_dict()
    assert not list(module.parameters())


def test_module_of_alignment_is_its_function():
    x, y = torch.randn(2, 7, 4)
    assert torch.equal(co.nn.Alignment(alpha=1.0)(x, y), co.alignment(x, y, alpha=1.0))


def test_every_loss_has_a_module():
    assert MODULES.keys() == {loss.name for loss in LOSSES}


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0d", "1-element"])
def test_logit_scale_starts_where_it_is_told(shape):
    assert LogitScale(shape=shape)().item() == pytest.approx(1 / 0.07)
    scale = LogitScale(initial=10.0, shape=shape)
    assert scale().shape == scale.logit_scale.shape == shape
    assert scale.logit_scale.item() == pytest.approx(math.log(10.0))
    assert [name for name, _ in scale.named_parameters()] == ["logit_scale"]


def test_logit_scale_is_clamped_outside_of_the_graph():
    scale = LogitScale(initial=10.0, maximum=50.0)
    parameter = scale.logit_scale
    for value, expected in ((math.log(80.0), 50.0), (-1.0, 1.0), (math.log(7.0), 7.0)):
        with torch.no_grad():
            parameter.fill_(value)
        scale.clamp_()
        assert scale().item() == pytest.approx(expected)
    assert scale.logit_scale is parameter
    assert parameter.requires_grad
    assert parameter.is_leaf


def test_logit_scale_learns(backend):
    scale, x = LogitScale(initial=5.0), torch.randn(10, 6)
    co.clip_loss(x, x + 0.1 * torch.randn(10, 6), scale(), backend=backend).backward()
    assert scale.logit_scale.grad.item() < 0  # good positives: sharper is better


@pytest.mark.parametrize("before", [(), (1,)], ids=["from 0d", "from 1-element"])
@pytest.mark.parametrize("after", [(), (1,)], ids=["to 0d", "to 1-element"])
def test_checkpoints_of_either_shape_load(after, before):
    saved = torch.nn.ModuleDict({"head": LogitScale(initial=23.0, shape=before)})
    fresh = torch.nn.ModuleDict({"head": LogitScale(shape=after)})
    state = saved.state_dict()
    fresh.load_state_dict(state)
    assert fresh["head"].logit_scale.shape == after
    assert fresh["head"]().item() == pytest.approx(23.0, rel=1e-6)
    assert state["head.logit_scale"].shape == before


def test_checkpoint_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for logit_scale"):
        LogitScale().load_state_dict({"logit_scale": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="Missing key"):
        LogitScale().load_state_dict({})


# the package
ROOT = Path(co.__file__).parent


@pytest.mark.parametrize("name", co.__all__)
def test_public_name_exists_and_is_documented(name):
    value = getattr(co, name)
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        doc = inspect.getdoc(value)
        headings = ["Parameters", "Returns", "Raises", "Examples"]
        places = [doc.find(f"\n{heading}\n---") for heading in headings]
        assert -1 not in places, dict(zip(headings, places, strict=True))
        assert places == sorted(places)
        assert ">>>" in doc[places[-1] :]
        described = doc[places[0] : places[1]]
        missing = [p for p in inspect.signature(value).parameters if p not in described]
        assert not missing, f"parameters without a description: {missing}"


@pytest.mark.parametrize(
    "kind", [*(kind for kind, _ in MODULES.values()), co.nn.Alignment, LogitScale], ids=lambda kind: kind.__name__
)
def test_module_has_an_example(kind):
    assert "Examples" in inspect.getdoc(kind)


def test_public_names_are_sorted_and_complete():
    assert co.__all__ == sorted(co.__all__)
    assert {loss.name for loss in LOSSES} <= set(co.__all__)
    exported = {name for name in vars(co) if not name.startswith("_") and not inspect.ismodule(getattr(co, name))}
    assert exported == {name for name in co.__all__ if not inspect.ismodule(getattr(co, name))}


def test_every_loss_has_its_twin():
    for loss in LOSSES:
        assert loss.fused is getattr(co, loss.name)
        assert loss.naive is getattr(reference, loss.name)
        fused, naive = (inspect.signature(function).parameters for function in (loss.fused, loss.naive))
        assert [p for p in fused if p not in ("backend", "return_stats")] == list(naive)
        for name, parameter in naive.items():
            assert (parameter.default, parameter.kind) == (fused[name].default, fused[name].kind), name


def test_no_two_rows_of_the_catalogue_share_a_name():
    assert len({loss.name for loss in LOSSES}) == len(LOSSES)


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, as contrastive_ops.x.y; of `from package import name`, the name too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("contrastive_ops")}


# what the files of a folder may import of ours: downwards only
ALLOWED = {
    "losses": ("checks", "dtypes", "losses", "ops"),
    "ops": ("checks", "dtypes", "ops", "backends"),
    "reference": ("reference",),
    "nn.py": ("losses",),
    "catalogue.py": ("losses", "reference"),
    "checks.py": (),
    "dtypes.py": (),
    "tracing.py": (),
    "build.py": (),
}
# no backends: the first chooses one, the second compares one with tiled, the third has row kernels for all, by Triton
ABOVE_BACKENDS = ("__init__.py", "trust.py", "rowwise.py")
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py" or path.parent != ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_flow_downwards(path):
    place = path.relative_to(ROOT).parts[0]
    for name in imports_of(path):
        target = name.partition(".")[2].partition(".")[0]
        if place == "backends":
            sibling = name in {f"contrastive_ops.backends.{backend}" for backend in backends.NAMES}
            assert path.name in ABOVE_BACKENDS or not sibling, f"{path.name} imports another backend: {name}"
            assert target in ("checks", "dtypes", "tracing", "backends", "build", "reference"), name
            assert target != "reference" or path.name == "reference.py", name
        elif place in ALLOWED:
            assert target in ALLOWED[place], f"{place} must not import {name}"


def test_the_folders_of_the_rule_exist():
    places = {path.relative_to(ROOT).parts[0] for path in FILES}
    assert set(ALLOWED) | {"backends"} <= places


def test_import_rule_finds_a_wrong_import(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from contrastive_ops import backends\nimport contrastive_ops.ops\nimport torch\n")
    assert imports_of(file) == {"contrastive_ops.backends", "contrastive_ops.ops"}
