"""The modules, the learnable scale, and the shape of the package: its public names and the direction of its imports."""

from __future__ import annotations

import ast
import copy
import inspect
import math
import pickle
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
    "siglip_loss": (co.nn.SigLIPLoss, {"normalize": False, "weight": "per_anchor"}),
    "nt_xent": (co.nn.NTXent, {"temperature": 0.3, "reduction": "sum"}),
    "dcl": (co.nn.DCL, {"temperature": 0.3}),
    "dclw": (co.nn.DCLW, {"temperature": 0.3, "sigma": 0.2}),
    "supcon": (co.nn.SupCon, {"temperature": 0.3, "variant": "in", "empty": "drop"}),
    "nt_xent_labelled": (co.nn.NTXentLabelled, {"temperature": 0.3, "over": "anchors"}),
    "guided_info_nce": (co.nn.GuidedInfoNCE, {"temperature": 0.3, "margin": 0.1, "contrast_positives": False}),
    "soft_target_loss": (co.nn.SoftTargetLoss, {"temperature": 0.3, "symmetric": False, "one_hot": 0.5}),
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


KINDS = [pytest.param(row, *MODULES[row.name], id=row.name) for row in LOSSES]
WITH_TEMPERATURE = [row for row in KINDS if "temperature" in row.values[2]]


def inputs_of(loss, n=12, dtype=torch.float32):
    return loss.inputs(n, 5, dtype, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("loss", "kind", "options"), WITH_TEMPERATURE)
def test_learnable_temperature_is_a_parameter(loss, kind, options):
    """It is in parameters() and in the state, follows the module's dtype, survives copies, and learns."""
    parameter = torch.nn.Parameter(torch.tensor(0.3))
    module = kind(**{**options, "temperature": parameter})
    arguments = inputs_of(loss)
    expected = loss.fused(*arguments, **{**options, "temperature": 0.3})
    assert dict(module.named_parameters()) == {"temperature": parameter}
    assert module.temperature is parameter
    assert list(module.state_dict()) == ["temperature"]
    assert "temperature=Parameter of shape ()" in repr(module)
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for own in (module, *copies):
        torch.testing.assert_close(own(*arguments), expected)
    loaded = kind(**{**options, "temperature": torch.nn.Parameter(torch.tensor(1.0))})
    loaded.load_state_dict(module.state_dict())
    torch.testing.assert_close(loaded(*arguments), expected)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    module(*arguments).backward()
    assert parameter.grad.item() != 0
    optimizer.step()
    assert module.temperature.item() != pytest.approx(0.3, rel=1e-7)
    assert all(own.temperature.item() == pytest.approx(0.3) for own in copies)
    assert module.double().temperature.dtype == torch.float64


TENSORS = {
    "info_nce": {"target": torch.arange(12).flip(0), "query_ids": torch.arange(12) % 5, "key_ids": torch.arange(12) % 5,
                 "sample_weight": torch.linspace(0.5, 1.0, 12), "temperature": torch.linspace(0.1, 0.2, 12)},
    "clip_loss": {"ids": torch.arange(12) % 5, "sample_weight": torch.linspace(0.5, 1.0, 12)},
    "siglip_loss": {"ids": torch.arange(12) % 5, "sample_weight": torch.linspace(0.5, 1.0, 12)},
    "nt_xent": {"ids": torch.arange(12) % 5, "sample_weight": torch.linspace(0.5, 1.0, 12)},
    "dcl": {"ids": torch.arange(12) % 5, "sample_weight": torch.linspace(0.5, 1.0, 12)},
    "dclw": {"ids": torch.arange(12) % 5, "sample_weight": torch.linspace(0.5, 1.0, 12)},
    "supcon": {"temperature": torch.tensor(0.3), "keys": torch.eye(5), "key_labels": torch.arange(5) % 3,
               "sample_weight": torch.linspace(0.5, 1.0, 12)},
    "nt_xent_labelled": {"temperature": torch.tensor(0.3), "sample_weight": torch.linspace(0.5, 1.0, 12)},
    "guided_info_nce": {"negatives": torch.eye(5), "sample_weight": torch.linspace(0.5, 1.0, 12)},
    "soft_target_loss": {"teacher_temperature": torch.tensor([0.3]), "sample_weight": torch.linspace(0.5, 1.0, 12)},
    "mv_infonce": {"ids": torch.arange(12) % 5, "sample_weight": torch.linspace(0.5, 1.0, 12)},
    "mv_dhel": {"ids": torch.arange(12) % 5, "sample_weight": torch.linspace(0.5, 1.0, 12)},
    "dhel": {"ids": torch.arange(12) % 5, "sample_weight": torch.linspace(0.5, 1.0, 12)},
    "pvc": {"ids": torch.arange(12) % 5, "sample_weight": torch.linspace(0.5, 1.0, 12)},
    "gram_loss": {"sample_weight": torch.linspace(0.5, 1.0, 12), "temperature": torch.tensor([0.3])},
    "triangle_loss": {"sample_weight": torch.linspace(0.5, 1.0, 12)},
    "pairwise_views": {"loss": "info_nce", "query_ids": torch.arange(12) % 5, "key_ids": torch.arange(12) % 5},
}  # fmt: skip


@pytest.mark.parametrize("loss", [row for row in ROWS if row.id in TENSORS])
def test_tensors_are_buffers(loss):
    kind, options = MODULES[loss.name][0], TENSORS[loss.name]
    module, arguments = kind(**options), inputs_of(loss)
    tensors = [name for name, value in options.items() if isinstance(value, torch.Tensor)]
    assert [name for name, _ in module.named_buffers()] == tensors
    assert list(module.state_dict()) == tensors
    assert not list(module.parameters())
    expected = loss.fused(*arguments, **options)
    for own in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(own(*arguments), expected)
    moved = module.to("meta")
    assert all(buffer.device.type == "meta" for buffer in moved.buffers())
    assert moved(*(x.detach().to("meta") for x in arguments)).device.type == "meta"


@pytest.mark.parametrize(("loss", "kind", "options"), WITH_TEMPERATURE)
def test_logit_scale_as_temperature_is_its_inverse(loss, kind, options):
    scale, arguments = LogitScale(initial=1 / 0.3), inputs_of(loss)
    module = kind(**{**options, "temperature": scale})
    expected = loss.fused(*arguments, **{**options, "temperature": 0.3})
    torch.testing.assert_close(module(*arguments), expected)
    assert [name for name, _ in module.named_parameters()] == ["temperature.logit_scale"]
    assert "(temperature): LogitScale()" in repr(module)
    module(*arguments).backward()
    assert scale.logit_scale.grad.item() != 0
    torch.testing.assert_close(copy.deepcopy(module)(*arguments), expected)


def test_a_module_gives_the_value():
    class Temperature(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.raw = torch.nn.Parameter(torch.tensor(0.0))

        def forward(self):
            return 0.5 * self.raw.sigmoid()

    x, y = torch.randn(2, 7, 4)
    module = co.nn.NTXent(temperature=Temperature())
    torch.testing.assert_close(module(x, y), co.nt_xent(x, y, temperature=0.25))
    clip = co.nn.CLIPLoss(logit_scale=LogitScale(initial=10.0))
    torch.testing.assert_close(clip(x, y), co.clip_loss(x, y, 10.0))
    assert [name for name, _ in clip.named_parameters()] == ["logit_scale.logit_scale"]
    assert torch.equal(clip(x, y, logit_scale=3.0), co.clip_loss(x, y, 3.0))
    bank = co.nn.InfoNCE(key=y)  # fixed keys
    assert torch.equal(bank(x), co.info_nce(x, y))


def test_scale_and_bias_of_siglip_learn(backend):
    """From where the paper starts: the bias answers for nearly all pairs being none."""
    scale, bias = LogitScale(10.0), torch.nn.Parameter(torch.tensor(-10.0))
    module, x = co.nn.SigLIPLoss(logit_scale=scale, logit_bias=bias), torch.randn(12, 6)
    assert [name for name, _ in module.named_parameters()] == ["logit_bias", "logit_scale.logit_scale"]
    loss = module(x, x + 0.1 * torch.randn(12, 6), backend=backend)
    loss.backward()
    assert scale.logit_scale.grad.item() < 0  # good positives: sharper is better
    assert bias.grad.item() < 0  # and all but the diagonal is far below 0 already


def test_options_are_attributes_that_may_be_set():
    """A schedule sets the temperature, whatever was given before; a set option is checked as a given one."""
    x, y = torch.randn(2, 7, 4)
    for module in (co.nn.NTXent(), co.nn.NTXent(temperature=0.1)):
        module.temperature = 0.2
        assert torch.equal(module(x, y), co.nt_xent(x, y, temperature=0.2))
        assert repr(module) == "NTXent(temperature=0.2)"
        module.temperature = torch.tensor(0.3)
        assert torch.equal(module(x, y), co.nt_xent(x, y, temperature=torch.tensor(0.3)))
        assert list(module.state_dict()) == ["temperature"]
        module.temperature = torch.tensor(0.4)
        assert torch.equal(module(x, y), co.nt_xent(x, y, temperature=torch.tensor(0.4)))
    with pytest.raises(ValueError, match="reduction must be one of"):
        module.reduction = "avg"


def test_functional_call_takes_another_temperature():
    x, y = torch.randn(2, 7, 4)
    module = co.nn.NTXent(temperature=torch.nn.Parameter(torch.tensor(0.3)))

    def loss(temperature):
        return torch.func.functional_call(module, {"temperature": temperature}, (x, y))

    torch.testing.assert_close(loss(torch.tensor(0.2)), co.nt_xent(x, y, temperature=0.2))
    t = torch.tensor(0.2, requires_grad=True)
    (expected,) = torch.autograd.grad(co.nt_xent(x, y, temperature=t), t)
    torch.testing.assert_close(torch.func.grad(loss)(t.detach()), expected)


def test_parametrized_temperature():
    """torch.nn.utils.parametrize puts a property where the parameter was."""

    class Positive(torch.nn.Module):
        def forward(self, raw):
            return raw.exp()

    x, y = torch.randn(2, 7, 4)
    module = co.nn.NTXent(temperature=torch.nn.Parameter(torch.tensor(-1.0).exp()))
    torch.nn.utils.parametrize.register_parametrization(module, "temperature", Positive())
    expected = co.nt_xent(x, y, temperature=math.exp(math.exp(-1.0)))
    torch.testing.assert_close(module(x, y), expected)


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("scale", [False, True], ids=["parameter", "LogitScale"])
def test_fully_sharded(scale, group):
    """FSDP2 swaps the parameter for its shard, a DTensor, and back around forward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    temperature = LogitScale(initial=1 / 0.3, shape=(1,)) if scale else torch.nn.Parameter(torch.tensor([0.3]))
    x, y = torch.randn(2, 7, 4)
    module = co.nn.NTXent(temperature=temperature)
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    (parameter,) = module.parameters()
    assert type(parameter.data).__name__ == "DTensor"
    optimizer = torch.optim.SGD([parameter], lr=1e-2)
    value, reference = 0.3, torch.tensor([0.3], requires_grad=True)
    loss = module(x, y)
    torch.testing.assert_close(loss, co.nt_xent(x, y, temperature=value))
    loss.backward()
    co.nt_xent(x, y, temperature=reference).backward()
    factor = -0.3 if scale else 1.0  # the scale's parameter is -log of the temperature
    torch.testing.assert_close(parameter.grad.full_tensor(), factor * reference.grad)
    optimizer.step()
    assert module(x, y).item() != pytest.approx(loss.item(), rel=1e-6)


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
        if "of `similarity_logsumexp`" in doc:  # whose options are described there alone
            described += inspect.getdoc(co.similarity_logsumexp).partition("Returns\n---")[0]
        missing = [p for p in inspect.signature(value).parameters if p not in described]
        assert not missing, f"parameters without a description: {missing}"


@pytest.mark.parametrize(
    "kind",
    [*(kind for kind, _ in MODULES.values()), co.nn.Alignment, co.nn.MWLoss, LogitScale],
    ids=lambda kind: kind.__name__,
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
        assert [p for p in fused if p not in ("backend", "return_stats", "output_dict")] == list(naive)
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
    "reference": ("noise", "reference"),
    "nn.py": ("checks", "losses"),
    "metrics.py": ("checks", "dtypes", "ops"),
    "catalogue.py": ("losses", "reference"),
    "checks.py": (),
    "dtypes.py": (),
    "noise.py": (),
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
            below = ("checks", "dtypes", "noise", "plane", "tracing", "build")
            assert target in (*below, "backends", "reference"), name
            # a function that is summed is the same plain PyTorch for a tile as for the dense logits
            assert target != "reference" or path.name in ("reference.py", "reductions.py"), name
        elif place in ALLOWED:
            assert target in ALLOWED[place], f"{place} must not import {name}"


def test_the_folders_of_the_rule_exist():
    places = {path.relative_to(ROOT).parts[0] for path in FILES}
    assert set(ALLOWED) | {"backends"} <= places


def test_import_rule_finds_a_wrong_import(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from contrastive_ops import backends\nimport contrastive_ops.ops\nimport torch\n")
    assert imports_of(file) == {"contrastive_ops.backends", "contrastive_ops.ops"}
