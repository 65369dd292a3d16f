"""The contracts with PyTorch: opcheck, torch.compile, autocast, transforms, differentiating twice."""

from __future__ import annotations

import re

import pytest
import torch
from problems import ALL_OPTIONS, problem
from tolerance import evaluate
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

import contrastive_ops as co
from contrastive_ops.catalogue import LOSSES
from contrastive_ops.dtypes import statistics_dtype

FORWARD = torch.ops.contrastive_ops.similarity_logsumexp.default
BACKWARD = torch.ops.contrastive_ops.similarity_logsumexp_backward.default
GRADIENTS = [result.name for result in BACKWARD._schema.returns]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VARIANTS = [pytest.param(row, v, id=f"{row.name}-{'-'.join(map(str, v.values())) or 'plain'}")
            for row in LOSSES for v in row.variants]  # fmt: skip
# of these a graph takes seconds, and what the variants change is not where the sides come in: each side in one of them
SLOW = ("siglip_loss", "nt_xent_labelled", "guided_info_nce", "soft_target_loss")
SIDES = [pytest.param(row, v, s, id=f"{row.name}-{'-'.join(map(str, v.values())) or 'plain'}-{s.__name__}")
         for row in LOSSES for j, v in enumerate(row.variants) for k, s in enumerate(row.sides)
         if row.name not in SLOW or k % len(row.variants) == j]  # fmt: skip


def forward_arguments(name, n, m, d, dtype, backend, transform=lambda x: x):
    """What the public function passes to the op for a problem, by the names in its schema."""
    arguments, options = problem(name, n, m, d, dtype)
    x, *y = (transform(a.detach()) for a in arguments)
    m = m if y else n
    given = {"x": x, "y": y[0] if y else None, "restrict": options.get("ids") == "restrict"}
    given |= {"rows": options.get("rows", True), "cols": options.get("cols", False), "backend": backend}
    for key, size in {"row_scale": n, "col_scale": m, "row_bias": n, "col_bias": m}.items():
        value = options.get(key)
        if value is not None:
            value = torch.as_tensor(value).detach().to(statistics_dtype(x)).reshape(-1).expand(size).clone()
        given[key] = value
    given |= {key: options[key].long() if key in options else None for key in ("exclude", "row_ids", "col_ids")}
    given |= dict.fromkeys(("guide_x", "guide_y", "ceiling", "col_ceiling")) | {"above": False}
    given["needs"] = [given[name] is not None for name in GRADIENTS]
    return tuple(given[argument.name] for argument in FORWARD._schema.arguments)


def backward_arguments(forward, needs):
    """The arguments of the backward op for a call of the forward op."""
    given = dict(zip((argument.name for argument in FORWARD._schema.arguments), forward, strict=True))
    returned = FORWARD(*forward)
    given |= dict(zip((result.name for result in FORWARD._schema.returns), returned, strict=True))
    given |= {f"grad_{side}_lse": torch.randn_like(given[side + "_max"]) for side in ("row", "col")}
    given["grad_excluded"] = torch.randn_like(given["excluded"])
    given["needs"] = needs
    return tuple(given[argument.name] for argument in BACKWARD._schema.arguments)


FAST_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL_CHECKS = (*FAST_CHECKS, "test_aot_dispatch_dynamic")  # ten times the time: not for what differs in dtype alone


def check(arguments, checks=ALL_CHECKS):
    """opcheck on the op and on its backward, as they are called: autograd is around them, not in them.

    What forward keeps for backward has padding that nobody writes: its values are compared where it keeps nothing.
    """
    torch.library.opcheck(FORWARD, arguments, test_utils=FAST_CHECKS)
    place = [argument.name for argument in FORWARD._schema.arguments].index("needs")
    torch.library.opcheck(FORWARD, (*arguments[:place], [False] * 6, *arguments[place + 1 :]), test_utils=checks)
    everything = [tensor is not None for tensor in arguments[:6]]
    for needs in (everything, [True] + [False] * 5):
        torch.library.opcheck(
            BACKWARD,
            backward_arguments(arguments, needs),
            test_utils=checks if needs is everything else FAST_CHECKS,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["everything", "self-everything"])
def test_opcheck_over_dtypes(name, backend, dtype):
    checks = ALL_CHECKS if dtype == torch.float32 else FAST_CHECKS
    check(forward_arguments(name, 9, 7, 5, dtype, backend), checks)


@pytest.mark.parametrize("name", ["rows", "cols", "vectors", "exclude", "ids-exclude", "ids-restrict-sorted",
                                  "everything-restrict", "self", "self-ids-restrict"])  # fmt: skip
def test_opcheck_over_options(name, backend):
    check(forward_arguments(name, 9, 7, 5, torch.float32, backend), FAST_CHECKS)


# a single row or column specialises a symbolic size; 129 x 65 is beyond one micro tile
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (7, 1, 3), (129, 65, 17)])
def test_opcheck_over_shapes(shape, backend):
    check(forward_arguments("everything", *shape, torch.float32, backend))


@pytest.mark.parametrize("name", ["everything", "self-everything"])
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_opcheck_of_layouts(layout, name, backend):
    def transform(x):
        return x.T.contiguous().T if layout == "transposed" else x.repeat_interleave(2, 1)[:, ::2]

    arguments = forward_arguments(name, 9, 7, 5, torch.float32, backend, transform)
    assert not arguments[0].is_contiguous()
    check(arguments)


def compiled(function, compiler="aot_eager"):
    torch.compiler.reset()
    return torch.compile(function, backend=compiler, fullgraph=True, dynamic=True)


def assert_close(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        torch.testing.assert_close(
            value, right[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


# two sizes that share no factor: a graph that remembers the first would recompile, or be wrong
@pytest.mark.parametrize("name", ["vectors", "everything", "self-everything", "row_scale-1"])
def test_compiled_op(name, backend):
    """One graph for all N and M, forward and backward."""
    seen = []

    def counted(graph, inputs):
        seen.append(graph)
        return aot_eager(graph, inputs)

    def call(*arguments, **options):
        out = co.similarity_logsumexp(*arguments, **options, backend=backend)
        return out.row_lse, out.col_lse, out.excluded_logit

    both = compiled(call, counted)
    for n, m in ((14, 25), (33, 9)):
        arguments, options = problem(name, n, m, 6)
        assert_close(evaluate(both, arguments, options), evaluate(call, arguments, options))
    assert len(seen) == 1


# the compiler sees one opaque op whatever backend runs it, so one backend is enough for what the losses add around it
@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_compiled_loss(loss, variant):
    def call(*arguments):
        return loss.fused(*arguments, **variant)

    both = compiled(call)
    for n in (14, 33):
        arguments = loss.inputs(n, 6, torch.float32, torch.Generator().manual_seed(n))
        assert_close(evaluate(both, arguments, {}), evaluate(call, arguments, {}))


@pytest.mark.parametrize(("loss", "variant", "side"), SIDES)
def test_compiled_loss_with_sides(loss, variant, side):
    def call(*arguments, **sides):
        return loss.fused(*arguments, **variant, **sides)

    both = compiled(call)
    for n in (14, 33):
        arguments, sides = (make(n, 6, torch.float32, torch.Generator().manual_seed(n)) for make in (loss.inputs, side))
        assert_close(evaluate(both, arguments, sides), evaluate(call, arguments, sides))


@pytest.mark.parametrize("loss", [pytest.param(row, id=row.name) for row in LOSSES])
def test_one_graph_for_ten_batch_sizes(loss):
    """More than Dynamo's limit of graphs for one function; forward decides it."""
    seen = []

    def counted(graph, _inputs):
        seen.append(graph)
        return graph.forward

    both = compiled(lambda *arguments: loss.fused(*arguments), counted)
    for n in range(5, 35, 3):
        arguments = loss.inputs(n, 6, torch.float32, torch.Generator().manual_seed(n))
        torch.testing.assert_close(both(*arguments), loss.fused(*arguments), rtol=1e-5, atol=1e-6)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "loss", [pytest.param(row, id=row.name) for row in LOSSES if row.name in ("clip_loss", "gram_loss")]
)
def test_compiled_loss_without_gradients(loss):
    """Validation: nothing requires a gradient, or no_grad says so."""

    def call(*arguments):
        return loss.fused(*arguments)

    both = compiled(call, "eager")
    arguments = loss.inputs(14, 6, torch.float32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(both(*arguments), call(*arguments))
    arguments = tuple(argument.detach() for argument in arguments)
    torch.testing.assert_close(both(*arguments), call(*arguments))


SIDE_INPUTS = {
    "info_nce": {"query_ids": torch.arange(14) % 5, "key_ids": torch.arange(14) % 5, "label_smoothing": 0.1,
                 "sample_weight": torch.linspace(0.5, 1.0, 14), "target": torch.arange(14).flip(0)},
    "clip_loss": {"ids": torch.arange(14) % 5, "label_smoothing": 0.1, "sample_weight": torch.linspace(0.5, 1.0, 14)},
    "siglip_loss": {"ids": torch.arange(14) % 5, "sample_weight": torch.linspace(0.5, 1.0, 14)},
    "nt_xent": {"ids": torch.arange(14) % 5, "sample_weight": torch.linspace(0.5, 1.0, 14)},
    "dclw": {"ids": torch.arange(14) % 5, "sample_weight": torch.linspace(0.5, 1.0, 14)},
    "supcon": {"empty": "drop", "keys": torch.eye(6), "key_labels": torch.arange(6) % 3,
               "sample_weight": torch.linspace(0.5, 1.0, 14)},
    "gram_loss": {"sample_weight": torch.linspace(0.5, 1.0, 14)},
    "triangle_loss": {"sample_weight": torch.linspace(0.5, 1.0, 14)},
}  # fmt: skip


@pytest.mark.parametrize("loss", [pytest.param(row, id=row.name) for row in LOSSES if row.name in SIDE_INPUTS])
def test_compiled_loss_with_stats_and_side_inputs(loss):
    options = SIDE_INPUTS[loss.name]

    def call(*arguments, **options):
        value, stats = loss.fused(*arguments, **options, return_stats=True)
        return value, *stats

    arguments = loss.inputs(14, 6, torch.float32, torch.Generator().manual_seed(0))
    assert_close(evaluate(compiled(call), arguments, options), evaluate(call, arguments, options))


def test_compiled_module_with_a_learnable_scale(backend):
    """The whole training step's loss: features, LogitScale, CLIPLoss."""

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.loss = co.nn.LogitScale(shape=(1,)), co.nn.CLIPLoss(backend=backend)

        def forward(self, x, y):
            return self.loss(x, y, self.scale())

    head, x, y = Head(), torch.randn(12, 5), torch.randn(12, 5)
    expected = head(x, y)
    (grad,) = torch.autograd.grad(expected, head.scale.logit_scale)
    torch.compiler.reset()
    loss = torch.compile(head, backend="aot_eager", fullgraph=True, dynamic=True)(x, y)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(head.scale.logit_scale.grad, grad)
    assert head.scale.logit_scale.grad.shape == (1,)


@pytest.mark.parametrize("scale", [False, True], ids=["parameter", "LogitScale"])
def test_compiled_module_with_a_learnable_temperature(scale, backend):
    initial = torch.tensor(0.3)
    temperature = co.nn.LogitScale(initial=1 / 0.3) if scale else torch.nn.Parameter(initial)
    module, x, y = co.nn.InfoNCE(temperature=temperature, backend=backend), torch.randn(12, 5), torch.randn(12, 5)
    (parameter,) = module.parameters()
    expected = module(x, y)
    (grad,) = torch.autograd.grad(expected, parameter)
    torch.compiler.reset()
    both = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    loss = both(x, y)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parameter.grad, grad)
    with torch.no_grad():
        parameter.add_(0.1)
    torch.testing.assert_close(both(x, y), module(x, y))
    assert not torch.equal(both(x, y), expected)


def test_compiled_op_takes_one_tensor_in_several_places(backend):
    """y = x, one vector of ids for both sides, one of scales: Dynamo minds where an autograd.Function gets it."""

    def call(x, scale, ids):
        out = co.similarity_logsumexp(
            x, x, row_scale=scale, col_scale=scale, row_ids=ids, col_ids=ids, cols=True, backend=backend
        )
        return out.row_lse, out.col_lse

    arguments = torch.randn(14, 6, requires_grad=True), torch.rand(14, requires_grad=True), torch.arange(14) % 4
    assert_close(evaluate(compiled(call), arguments, {}), evaluate(call, arguments, {}))


def inductor_refusal() -> str | None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        return f"inductor finds no C++ compiler: {error}"
    return None


def test_inductor():
    """The compiler of production once; the others differ only in what it fuses around the op."""
    sentence = inductor_refusal()
    if sentence is not None:
        pytest.skip(sentence)

    def call(x, y, scale):
        return co.clip_loss(x, y, scale, label_smoothing=0.1)

    arguments = LOSSES[1].inputs(14, 6, torch.float32, torch.Generator().manual_seed(0))
    assert LOSSES[1].name == "clip_loss"
    assert_close(evaluate(compiled(call, "inductor"), arguments, {}), evaluate(call, arguments, {}))


@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_meta_tensors_have_the_shapes_of_real_ones(loss, variant):
    real = loss.inputs(9, 6, torch.bfloat16, torch.Generator().manual_seed(0))
    meta = tuple(x.detach().to("meta").requires_grad_(x.requires_grad) for x in real)
    value, expected = loss.fused(*meta, **variant), loss.fused(*real, **variant)
    assert (value.device.type, value.shape, value.dtype) == ("meta", expected.shape, expected.dtype)
    value.backward()
    for x in meta:
        assert not x.requires_grad or (x.grad.device.type, x.grad.shape, x.grad.dtype) == ("meta", x.shape, x.dtype)


@pytest.mark.parametrize(("loss", "variant", "side"), SIDES)
def test_meta_tensors_of_sides(loss, variant, side):
    drawn = [make(9, 6, torch.bfloat16, torch.Generator().manual_seed(0)) for make in (loss.inputs, side)]
    real, sides = drawn
    meta, meta_sides = tree_map(lambda x: x.detach().to("meta").requires_grad_(x.requires_grad), drawn)
    for reduction in ("mean", "none"):
        options = {**variant, "reduction": reduction}
        value, expected = loss.fused(*meta, **options, **meta_sides), loss.fused(*real, **options, **sides)
        assert (value.device.type, value.shape, value.dtype) == ("meta", expected.shape, expected.dtype)
    loss.fused(*meta, **variant, **meta_sides).backward()
    for x in tree_leaves((meta, meta_sides)):
        assert not x.requires_grad or (x.grad.device.type, x.grad.shape, x.grad.dtype) == ("meta", x.shape, x.dtype)


class Call(torch.nn.Module):
    """A loss with tensor options after its tensors: torch.export takes modules."""

    def __init__(self, loss, names, options):
        super().__init__()
        self.loss, self.names, self.options = loss, names, options

    def forward(self, *tensors):
        place = len(tensors) - len(self.names)
        return self.loss(*tensors[:place], **dict(zip(self.names, tensors[place:], strict=True)), **self.options)


def exported(loss, n, options):
    """The module, and its arguments for n samples: of the options the tensors, cut to size."""
    names = [name for name, value in options.items() if isinstance(value, (torch.Tensor, tuple))]
    inputs = loss.inputs(n, 6, torch.float32, torch.Generator().manual_seed(n))
    rest = {name: value for name, value in options.items() if name not in names}
    given = (tree_map(lambda x: x[:n], options[name]) for name in names)
    return Call(loss.fused, names, rest), (*(x.detach() for x in inputs), *given)


ROWS_OF_IDS = {"query_ids": torch.arange(40) % 5, "key_ids": torch.arange(40) % 5}
EXPORTS = [
    *VARIANTS,
    *(pytest.param(row, {**options, **more}, id=f"{row.name}-{'-'.join(map(str, (*options, *more)))}")
      for row in LOSSES for name, options in (
          ("clip_loss", {"ids": torch.arange(40) % 5, "label_smoothing": 0.1}),
          ("clip_loss", {"ids": torch.arange(40) % 5, "sample_weight": torch.linspace(0.5, 1.0, 40)}),
          ("info_nce", {**ROWS_OF_IDS, "label_smoothing": 0.1, "temperature": torch.linspace(0.1, 0.2, 40)}),
          ("supcon", {"empty": "drop"}), ("nt_xent", {}))
      if row.name == name for more in ({"return_stats": True}, {"reduction": "none"})),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "options"), EXPORTS)
def test_exported_loss(loss, options):
    """torch.export, not strict, for every batch size from 2 on: 2 itself, where N - 1 is 1, and beyond that traced."""
    axis = {"mv_infonce": 1, "mv_dhel": 1, "pvc": 1, "pairwise_views": 1}.get(loss.name, 0)
    batch = torch.export.Dim("batch", min=2)
    call, arguments = exported(loss, 14, options)
    sizes = tuple({axis: batch} if x.dim() else {} for x in arguments)
    program = torch.export.export(call, arguments, dynamic_shapes=(sizes,), strict=False).module()
    for n in (2, 33):
        call, arguments = exported(loss, n, options)
        for ours, eager in zip(*(tree_leaves(f(*arguments)) for f in (program, call)), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("loss", "variant", "side"), SIDES)
def test_exported_loss_with_sides(loss, variant, side):
    """For every batch size from 2 on, keys included."""
    of_views = loss.inputs(2, 6, torch.float32, torch.Generator())[0].dim() == 3
    batch = torch.export.Dim("batch", min=2)

    def drawn(n):
        sides = side(n, 6, torch.float32, torch.Generator().manual_seed(n))
        return exported(loss, n, {**variant, **tree_map(torch.Tensor.detach, sides)})

    call, arguments = drawn(14)
    first = {1 if of_views else 0: batch}
    sizes = (first, *tree_map(lambda x: {0: batch} if x.dim() else {}, arguments[1:]))
    program = torch.export.export(call, arguments, dynamic_shapes=(sizes,), strict=False).module()
    for n in (2, 33):
        call, arguments = drawn(n)
        torch.testing.assert_close(program(*arguments), call(*arguments), rtol=1e-5, atol=1e-6)


def test_fake_tensors_have_the_shapes_of_real_ones(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name in ALL_OPTIONS:
        arguments = forward_arguments(name, 9, 7, 5, torch.bfloat16, backend)
        real = FORWARD(*arguments)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            fake = FORWARD(*fakes)
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), name


@pytest.mark.parametrize("where", ["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_autocast_changes_nothing(loss, variant, dtype, where, backend):
    """The loss runs in the dtype of its inputs; bfloat16 products would be off in the third digit."""
    arguments = loss.inputs(16, 6, dtype, torch.Generator().manual_seed(0))
    tensors = [a for a in arguments if a.requires_grad]
    plain = loss.fused(*arguments, **variant, backend=backend)
    expected = torch.autograd.grad(plain, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss.fused(*arguments, **variant, backend=backend)
        if where != "forward":
            grads = torch.autograd.grad(value, tensors)
    if where == "forward":
        grads = torch.autograd.grad(value, tensors)
    assert value.dtype == torch.float32
    assert torch.equal(value, plain)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_autocast_accepts_the_features_it_produces(backend):
    """Under autocast a linear layer gives bfloat16; its gradient reaches the float32 weight."""
    layer, x = torch.nn.Linear(6, 5), torch.randn(10, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = layer(x)
        assert features.dtype == torch.bfloat16
        loss = co.nt_xent(features, features.roll(1, 0), backend=backend)
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32
    assert (layer.weight.grad != 0).any()


# what of several features: a call, as many as it takes, and the dtype that they meet in under autocast
MEETING = {
    "info_nce": (co.info_nce, 2, torch.bfloat16),
    "clip_loss": (lambda x, y: co.clip_loss(x, y, 5.0), 2, torch.bfloat16),
    "siglip_loss": (lambda x, y: co.siglip_loss(x, y, 5.0, -5.0), 2, torch.bfloat16),
    "guided_info_nce": (lambda x, y, z: co.guided_info_nce(x, y, negatives=z), 3, torch.bfloat16),
    "soft_target_loss": (co.soft_target_loss, 4, torch.bfloat16),
    "nt_xent": (co.nt_xent, 2, torch.bfloat16),
    "dcl": (co.dcl, 2, torch.bfloat16),
    "dclw": (co.dclw, 2, torch.bfloat16),
    "dhel": (co.dhel, 2, torch.bfloat16),
    "uniformity": (co.uniformity, 2, torch.float32),
    "alignment": (co.alignment, 2, torch.float32),
    "gram_loss": (co.gram_loss, 3, torch.bfloat16),
    "triangle_loss": (co.triangle_loss, 3, torch.float32),
    "gram_retrieve": (lambda x, y: co.gram_retrieve(x, y[:, None], 2)[0], 2, torch.bfloat16),
    "sample_gram_negatives": (
        lambda x, y: co.sample_gram_negatives(x, y, generator=torch.Generator().manual_seed(0))[0], 2, torch.bfloat16,
    ),
    "similarity_logsumexp": (lambda x, y: co.similarity_logsumexp(x, y).row_lse.sum(), 2, torch.bfloat16),
    "similarity_sum": (lambda x, y: co.similarity_sum(x, y).row_sum.sum(), 2, torch.bfloat16),
    "similarity_expectation": (lambda x, y: co.similarity_expectation(x, y).row_mean.sum(), 2, torch.bfloat16),
    "similarity_topk": (lambda x, y: co.similarity_topk(x, y, 2).values.sum(), 2, torch.bfloat16),
    "volume_logsumexp": (lambda x, y: co.volume_logsumexp(x, y[:, None]).row_lse.sum(), 2, torch.bfloat16),
}  # fmt: skip


MIXTURES = ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
            (torch.float16, torch.bfloat16))  # fmt: skip


@pytest.mark.parametrize("dtypes", MIXTURES, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))
@pytest.mark.parametrize("name", MEETING)
def test_autocast_promotes_features_of_two_dtypes(name, dtypes):
    """Factors of products take autocast's dtype, features whose distance is taken float32, as torch.cdist has them."""
    call, count, dtype = MEETING[name]
    features = [torch.randn(9, 6).to(dtypes[k % 2]).requires_grad_() for k in range(count)]
    expected = call(*(x.to(dtype) for x in features))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = call(*features)
    assert torch.equal(value, expected)
    if value.requires_grad:
        for got, wanted in zip(*(torch.autograd.grad(of, features) for of in (value, expected)), strict=True):
            assert torch.equal(got, wanted)
    with pytest.raises(TypeError, match="must have the dtype of"):
        call(*features)


def test_autocast_promotes_as_the_dense_loss_does(backend):
    """One tower under autocast, one without: logits of bfloat16 factors, rounded to 8 bits in the dense loss alone."""
    layer, x, y = torch.nn.Linear(6, 5), torch.randn(10, 6), torch.randn(10, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image = layer(x)
        logits = image @ y.T
        dense = torch.nn.functional.cross_entropy(logits.float(), torch.arange(10))
        ours = co.info_nce(image, y, temperature=1.0, normalize=False, backend=backend)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(ours, dense, rtol=1e-2, atol=0.0)
    ours.backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_float64_alone(dtype):
    """So does torch.matmul, which refuses the pair."""
    x, y = torch.randn(2, 9, 6)
    sentence = f"key must have the dtype of query, float64, got {str(dtype).removeprefix('torch.')}"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=sentence):
        co.info_nce(x.double(), y.to(dtype))


def test_autocast_of_another_device_promotes_nothing():
    x, y = torch.randn(2, 9, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="key must have the dtype of"):
        co.info_nce(x.to("meta"), y.to("meta", torch.bfloat16))


def test_compiled_loss_promotes_under_autocast(backend):
    def call(x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return co.clip_loss(x, y, 5.0, backend=backend)

    arguments = torch.randn(9, 6).requires_grad_(), torch.randn(9, 6).bfloat16().requires_grad_()
    got, wanted = compiled(call)(*arguments), call(*arguments)
    torch.testing.assert_close(got, wanted)
    for ours, expected, x in zip(*(torch.autograd.grad(of, arguments) for of in (got, wanted)), arguments, strict=True):
        assert ours.dtype == x.dtype
        largest = expected.abs().max().item()  # gradients of bfloat16, rounded at other places
        torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-2 * largest)


@pytest.mark.parametrize("loss", [pytest.param(row, id=row.name) for row in LOSSES])
def test_differentiating_twice_is_refused(loss, backend):
    arguments = loss.inputs(8, 4, torch.float64, torch.Generator().manual_seed(0))
    x = arguments[0]
    value = loss.fused(*arguments, backend=backend)
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    sentence = (
        " is differentiable once, got a second differentiation (create_graph=True); "
        'call it with backend="reference", which autograd differentiates to any order.'
    )
    ops = f"({loss.op}|similarity_logsumexp)" if loss.name == "nt_xent_labelled" else loss.op  # it has both
    with pytest.raises(RuntimeError, match=f"^{ops}{re.escape(sentence)}$"):
        grad.square().sum().backward()
    value = loss.fused(*arguments, backend="reference")
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.isfinite().all()


def test_forward_mode_is_refused(backend):
    """It would give the tangent of the positives alone, silently."""
    x, y = torch.randn(2, 8, 4)
    sentence = (
        r"^similarity_logsumexp has no forward-mode derivative, got a dual tensor \(torch\.func\.jvp, forward_ad\)"
    )
    with pytest.raises(RuntimeError, match=sentence):
        torch.func.jvp(lambda x: co.info_nce(x, y, backend=backend), (x,), (y,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=sentence):
        co.clip_loss(x, forward_ad.make_dual(y, x), 5.0, backend=backend)
    scale = torch.tensor(5.0)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=sentence):
        co.clip_loss(x, y, forward_ad.make_dual(scale, scale), backend=backend)
    _, tangent = torch.func.jvp(lambda x: co.info_nce(x, y, backend="reference"), (x,), (y,))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(co.info_nce(x, y, backend=backend), x)
    torch.testing.assert_close(tangent, (grad * y).sum(), rtol=1e-4, atol=1e-5)


# without a batching rule PyTorch loops over the batch, and says that this is slow
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transforms(reduction, backend):
    """vmap, grad, jacrev and their compositions are the loops that they stand for."""
    x, y = torch.randn(2, 3, 9, 4)

    def dense(a, b):
        return co.info_nce(a, b, reduction=reduction, backend="reference")

    def fused(a, b):
        return co.info_nce(a, b, reduction=reduction, backend=backend)

    def gradients(function):
        return torch.func.grad(lambda a, b: function(a, b).sum(), argnums=(0, 1))

    def close(got, expected):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    close(torch.vmap(fused)(x, y), torch.stack([dense(a, b) for a, b in zip(x, y, strict=True)]))
    close(gradients(fused)(x[0], y[0]), gradients(dense)(x[0], y[0]))
    batched = torch.vmap(gradients(dense))(x, y)
    close(torch.vmap(gradients(fused))(x, y), batched)
    close(torch.func.jacrev(fused)(x[0], y[0]), torch.func.jacrev(dense)(x[0], y[0]))
    x.requires_grad_()
    y.requires_grad_()
    close(torch.autograd.grad(torch.vmap(fused)(x, y).sum(), (x, y)), batched)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_hessian_is_refused(backend):
    x, y = torch.randn(2, 9, 4)
    sentence = "You must implement the jvp function|similarity_logsumexp has no forward-mode derivative"
    with pytest.raises(RuntimeError, match=sentence):
        torch.func.hessian(lambda x: co.info_nce(x, y, backend=backend))(x)
    with pytest.raises(RuntimeError, match="similarity_logsumexp is differentiable once"):
        torch.func.jacrev(torch.func.jacrev(lambda x: co.info_nce(x, y, backend=backend)))(x)


def test_inference_mode_and_no_grad(backend):
    x, y = torch.randn(2, 9, 4).requires_grad_()
    expected = co.info_nce(x, y, backend=backend)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            value = co.info_nce(x, y, backend=backend)
        assert not value.requires_grad
        assert torch.equal(value, expected)


def test_checkpointing(backend):
    from torch.utils.checkpoint import checkpoint

    x, y = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4)
    expected = torch.autograd.grad(co.info_nce(x, y, backend=backend), x)
    value = checkpoint(lambda x: co.info_nce(x, y, backend=backend), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(value, x)[0], expected[0])
