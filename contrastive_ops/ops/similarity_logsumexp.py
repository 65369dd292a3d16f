"""The streaming reduction behind every softmax-type loss: row and column log-sum-exps of scaled similarities.

From top to bottom: the public function, the op's schema, its fake, its autograd.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_ops import backends, checks
from contrastive_ops.backends import reference


class SimilarityLSE(NamedTuple):
    """What `similarity_logsumexp` returns; what was not asked for is empty."""

    row_lse: Tensor
    col_lse: Tensor
    row_max: Tensor
    col_max: Tensor
    excluded_logit: Tensor


def similarity_logsumexp(
    x: Tensor,
    y: Tensor | None = None,
    *,
    row_scale: float | Tensor | None = None,
    col_scale: float | Tensor | None = None,
    row_bias: float | Tensor | None = None,
    col_bias: float | Tensor | None = None,
    exclude: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ids: str = "exclude",
    rows: bool = True,
    cols: bool = False,
    backend: str = "auto",
) -> SimilarityLSE:
    r"""Log-sum-exp of the similarity logits over rows, columns or both, without ever holding the N x M matrix.

    .. math::
        s_{ij} = \mathrm{row\_scale}_i \, \mathrm{col\_scale}_j \, \langle x_i, y_j \rangle
                 + \mathrm{row\_bias}_i + \mathrm{col\_bias}_j, \qquad
        \mathrm{row\_lse}_i = \log \sum_{j \in A(i)} e^{s_{ij}}, \quad
        \mathrm{col\_lse}_j = \log \sum_{i : j \in A(i)} e^{s_{ij}}

    Parameters
    ----------
    x : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
        Row embeddings.
    y : Tensor of shape (M, D), dtype of `x`, optional
        Column embeddings. None is self-similarity: the columns are the rows, the row options apply to both sides
        (``s_ij = row_scale_i row_scale_j <x_i, x_j> + row_bias_i + row_bias_j``), and only the upper triangle of
        tiles is computed. Logits that are not symmetric, such as a temperature per row, take ``y=x``.
    row_scale, col_scale, row_bias, col_bias : float, Tensor of one element, or Tensor of shape (N,) / (M,)
        Tensors receive their gradients. None is 1 for a scale and 0 for a bias.
    exclude : integer Tensor of shape (N,), optional
        Row i leaves out column ``exclude[i]``; -1 leaves out nothing. In self-similarity a pair is left out when
        either of its rows names the other. The logits of these pairs are returned: for a loss whose excluded pair
        is the positive, it rides on the sweep of the negatives.
    row_ids, col_ids : integer Tensors of shape (N,) and (M,), optional
        Group ids; self-similarity takes `row_ids` only.
    ids : "exclude" or "restrict"
        Whether pairs with equal ids are left out, or are the only ones that take part. Sorted ids let the engine
        skip whole tiles.
    rows, cols : bool
        The directions to reduce; both cost one sweep. Self-similarity has `rows` only, the columns are the same.
    backend : "auto", "cpu", "tiled", "reference"
        "auto" takes the first that can run the input, a named one runs or raises.

    Returns
    -------
    SimilarityLSE
        ``row_lse``, ``row_max`` of shape (N,), ``col_lse``, ``col_max`` of shape (M,), float32 (float64 for float64).
        The maxima are of the logits and carry no gradient. An empty set has -inf, and zero gradient.
        ``excluded_logit`` of shape (N,) is ``s[i, exclude[i]]``, differentiable, whatever the ids say of the pair;
        -inf where there is no such column.

    Raises
    ------
    TypeError, ValueError
        Before any kernel, naming the argument. RuntimeError for a backend that can't run the input.

    Notes
    -----
    Extra memory is O(N + M) in forward and O((N + M) D) in backward, which computes the tiles again; the cpu backend
    keeps up to 64 MB of them instead. Work in units of N M D multiply-adds: 1 forward, 1 for the recomputation and 1
    for each side that requires a gradient; in self-similarity 0.5 + 0.5 + 1. Sums, maxima and gradients accumulate in
    float32 (float64). Runs are bitwise repeatable. Differentiable once; differentiating twice raises.

    Examples
    --------
    >>> x = torch.eye(3)
    >>> similarity_logsumexp(x, x, row_scale=2.0, exclude=torch.arange(3)).row_lse
    tensor([0.6931, 0.6931, 0.6931])
    """
    checks.features("x", x)
    n = x.shape[0]
    if y is None:
        m, col_name = n, "x"
        for name, value in (("col_scale", col_scale), ("col_bias", col_bias), ("col_ids", col_ids)):
            if value is not None:
                raise ValueError(
                    f"{name} must be None in self-similarity (y=None), where the row option applies to both sides, "
                    "got a value; pass y=x for logits that are not symmetric."
                )
        if cols or not rows:
            raise ValueError(
                f"rows=True, cols=False is expected in self-similarity (y=None), got rows={rows}, cols={cols}; "
                "the columns have the same log-sum-exp, or pass y=x."
            )
    else:
        checks.features("y", y)
        checks.same_kind("y", y, "x", x)
        m, col_name = y.shape[0], "y"
        checks.both_or_neither("row_ids", row_ids, "col_ids", col_ids)
        if not rows and not cols:
            raise ValueError("rows or cols must be True, got rows=False, cols=False; there would be nothing to do.")
    checks.choice("ids", ids, ("exclude", "restrict"))
    if ids == "restrict" and row_ids is None:
        raise ValueError('row_ids must be given with ids="restrict", got None; pass ids="exclude" for no groups.')

    vectors = (
        _per_row("row_scale", row_scale, n, x, "x"),
        _per_row("col_scale", col_scale, m, x, col_name),
        _per_row("row_bias", row_bias, n, x, "x"),
        _per_row("col_bias", col_bias, m, x, col_name),
    )
    integers = (
        _int64("exclude", exclude, n, x, "x"),
        _int64("row_ids", row_ids, n, x, "x"),
        _int64("col_ids", col_ids, m, x, col_name),
    )
    chosen = backends.choose("similarity_logsumexp", x, backend)
    arguments = (x, y, *vectors, *integers, ids == "restrict", rows, cols)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, *vectors))
    if chosen == "reference":  # dense PyTorch, autograd sees through it
        row_lse, col_lse, excluded, row_max, col_max = reference.similarity_logsumexp(*arguments)
    else:
        checks.no_forward_mode("similarity_logsumexp", x, y, *vectors)
        if torch.compiler.is_compiling():
            arguments = _aliased(arguments)
        plain = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
        function = _DifferentiableEager if plain else _Differentiable
        row_lse, col_lse, excluded, row_max, col_max, *_ = function.apply(*arguments, keep, chosen)
    return SimilarityLSE(row_lse, col_lse, row_max, col_max, excluded)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Statistics and losses are float32 whatever the input, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_row(name: str, value: float | Tensor | None, size: int, x: Tensor, rows_of: str) -> Tensor | None:
    if value is None:
        return None
    checks.scale(name, value, size, x.device, rows_of=rows_of)
    dtype = statistics_dtype(x)
    if not isinstance(value, Tensor):
        return torch.full((size,), float(value), dtype=dtype, device=x.device)
    return value.to(dtype).reshape(-1).expand(size)


def _int64(name: str, value: Tensor | None, size: int, x: Tensor, rows_of: str) -> Tensor | None:
    if value is None:
        return None
    checks.integer_vector(name, value, size, x.device, rows_of=rows_of)
    return value.to(torch.int64)


def _aliased(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A view for each tensor that comes again (y = x, one vector of ids): Dynamo traces no Function with it."""
    distinct: list[Any] = []
    for value in arguments:
        repeated = isinstance(value, Tensor) and any(value is other for other in distinct)
        distinct.append(value.view_as(value) if repeated else value)
    return tuple(distinct)


_OPTIONS = (
    "Tensor x, Tensor? y, Tensor? row_scale, Tensor? col_scale, Tensor? row_bias, Tensor? col_bias, "
    "Tensor? exclude, Tensor? row_ids, Tensor? col_ids, bool restrict, bool rows, bool cols"
)
# The statistics are a maximum and the log of a sum relative to it. Their sum is the log-sum-exp, but backward takes
# them apart: at logits of 1e4 the rounding of the log-sum-exp is 1e-3, and so would be the error of every gradient.
torch.library.define(
    "contrastive_ops::similarity_logsumexp",
    f"({_OPTIONS}, bool keep, str backend) -> "
    "(Tensor row_max, Tensor col_max, Tensor row_log_sum, Tensor col_log_sum, Tensor excluded, Tensor dots)",
)
torch.library.define(
    "contrastive_ops::similarity_logsumexp_backward",
    "(Tensor grad_row_lse, Tensor grad_col_lse, Tensor grad_excluded, "
    "Tensor row_max, Tensor col_max, Tensor row_log_sum, Tensor col_log_sum, Tensor dots, "
    f"{_OPTIONS}, bool[6] needs, str backend) -> "
    "(Tensor x, Tensor y, Tensor row_scale, Tensor col_scale, Tensor row_bias, Tensor col_bias)",
)


@torch.library.impl("contrastive_ops::similarity_logsumexp", "CompositeExplicitAutograd")
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, backend = arguments
    return backends.module(backend).similarity_logsumexp_forward(*inputs)


@torch.library.impl("contrastive_ops::similarity_logsumexp_backward", "CompositeExplicitAutograd")
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, backend = arguments
    return backends.module(backend).similarity_logsumexp_backward(*inputs)


@torch.library.register_fake("contrastive_ops::similarity_logsumexp")
def _forward_fake(x, y, *options):
    _row_scale, _col_scale, _row_bias, _col_bias, exclude, *_, rows, cols, keep, backend = options
    n, m = x.shape[0], x.shape[0] if y is None else y.shape[0]
    dtype = statistics_dtype(x)
    row, col, excluded = n if rows else 0, m if cols else 0, 0 if exclude is None else n
    dots = backends.module(backend).kept_dots(n, m, x.dtype) if keep else 0
    return tuple(x.new_empty(size, dtype=dtype) for size in (row, col, row, col, excluded, dots))


@torch.library.register_fake("contrastive_ops::similarity_logsumexp_backward")
def _backward_fake(*arguments):
    x, y, *_, needs, _backend = arguments[8:]  # after the gradients, the statistics and the dots
    n, m = x.shape[0], x.shape[0] if y is None else y.shape[0]
    dtype = statistics_dtype(x)
    sizes = (x.shape, x.shape if y is None else y.shape, (n,), (m,), (n,), (m,))
    dtypes = (x.dtype, x.dtype, dtype, dtype, dtype, dtype)
    return tuple(
        x.new_empty(size if need else (0,), dtype=dtype) for size, dtype, need in zip(sizes, dtypes, needs, strict=True)
    )


class _Differentiable(torch.autograd.Function):
    """Autograd around the op: an op boundary costs less without it, and torch.compile traces it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        statistics = torch.ops.contrastive_ops.similarity_logsumexp(*arguments)
        row_max, col_max, row_log_sum, col_log_sum, excluded, dots = statistics
        return (
            row_max + row_log_sum,
            col_max + col_log_sum,
            excluded,
            row_max,
            col_max,
            row_log_sum,
            col_log_sum,
            dots,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, restrict, rows, cols, _keep, backend = inputs
        _row_lse, _col_lse, _excluded, *statistics = output
        ctx.save_for_backward(*statistics, *tensors)
        ctx.flags = (restrict, rows, cols)
        ctx.backend = backend
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)  # it would fill the 64 MB of a gradient of dots with zeros

    @staticmethod
    def backward(ctx, grad_row_lse, grad_col_lse, grad_excluded, *_grads_of_the_rest):
        needs = list(ctx.needs_input_grad[:6])
        saved = row_max, col_max, *_, exclude, _row_ids, _col_ids = ctx.saved_tensors  # once: checkpointing minds
        grad_row_lse = torch.zeros_like(row_max) if grad_row_lse is None else grad_row_lse
        grad_col_lse = torch.zeros_like(col_max) if grad_col_lse is None else grad_col_lse
        if grad_excluded is None:
            grad_excluded = row_max.new_zeros(0 if exclude is None else exclude.shape[0])
        arguments = (grad_row_lse, grad_col_lse, grad_excluded, *saved, *ctx.flags, needs, ctx.backend)
        if torch.is_grad_enabled():  # create_graph=True
            grads = _Once.apply(*arguments)
        else:
            grads = torch.ops.contrastive_ops.similarity_logsumexp_backward(*arguments)
        wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return (*wanted, *[None] * (len(ctx.needs_input_grad) - len(wanted)))


class _DifferentiableEager(torch.autograd.Function):
    """The same, without torch.func: PyTorch inspects a signature at every call of a Function with a setup_context."""

    @staticmethod
    def forward(ctx, *arguments):
        output = _Differentiable.forward(*arguments)
        _Differentiable.setup_context(ctx, arguments, output)
        return output

    backward = _Differentiable.backward


class _Once(torch.autograd.Function):
    """The backward op in a graph that may be differentiated again, which it refuses."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return torch.ops.contrastive_ops.similarity_logsumexp_backward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_grads):
        raise RuntimeError(
            "similarity_logsumexp is differentiable once, got a second differentiation (create_graph=True); "
            'call it with backend="reference", which autograd differentiates to any order.'
        )
