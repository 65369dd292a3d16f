"""Every argument check and every error sentence, written once.

A sentence names the argument, what was expected, what came, and the way out, which must not lead to another loss. All
checks read only shapes, dtypes and devices, and values where that is free: they cost no synchronisation and hold under
`torch.compile`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def shape(tensor: Tensor) -> str:
    return "(" + ", ".join(str(size) for size in tensor.shape) + ("," if tensor.dim() == 1 else "") + ")"


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        if value is None:
            way_out = "pass a tensor, there is no default"
        elif isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
            way_out = "make one of its tensors, with torch.cat or torch.stack"
        else:
            way_out = f"call torch.as_tensor({name})"
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}; {way_out}.")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor; call {name}.full_tensor(), "
            f"{name}.to_local() is the part of this rank alone."
        )
    if value.is_nested:
        raise TypeError(
            f"{name} must be a plain tensor, got a nested one; its rows are torch.cat({name}.unbind()), "
            "of which row i goes with row i of the other arguments."
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}; call {name}.to_dense().")


def readable(value: Tensor) -> bool:
    """Whether the values can be read for nothing: not on a device, where the host would wait, nor while tracing."""
    return (
        not torch.compiler.is_compiling()
        and type(value) in (Tensor, torch.nn.Parameter)
        and value.device.type == "cpu"
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


# what the axes of features mean, by the shape that is expected
AXES = {
    "(N, D)": "reshape it to one row of features for each sample; every row counts as a sample",
    "(M, D)": "every row is a key of all queries: flatten the first two axes of keys (N, K, D), and pass target=, "
    "the row of each query's positive, which is torch.arange(N) * K where it is the first of K",
    "(N, H, D)": "its axes are queries, the negatives of each, features; negatives of all queries are more rows of key",
    "(N, V, D)": "its axes are samples, views, features",
    "(V, N, D)": "its axes are views, samples, features; torch.stack makes it of views of shape (N, D)",
    "(M, P, D)": "its axes are tuples, vectors, features; with one vector for each, unsqueeze(1)",
}


def features(name: str, value: Any, *, expected: str = "(N, D)", axes: str | None = None) -> None:
    """Embeddings: a strided floating-point tensor of the expected shape, with D >= 1."""
    tensor(name, value)
    dim = expected.count(",") + 1
    if value.dim() != dim:
        raise ValueError(f"{name} must have shape {expected}, got {shape(value)}; {axes or AXES[expected]}.")
    if value.dtype not in FEATURE_DTYPES:
        way_out = f"torch.view_as_real({name}).flatten(-2)" if value.is_complex() else f"{name}.float()"
        raise TypeError(f"{name} must be one of {names(FEATURE_DTYPES)}, got {names([value.dtype])}; call {way_out}.")
    if value.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one feature (D >= 1), got shape {shape(value)}.")


def keys(value: Any) -> None:
    """What anchors are compared with, each of a label."""
    axes = "every row is a key with a label of its own; flatten its first axes, and repeat key_labels"
    features("keys", value, expected="(M, D)", axes=axes)


def views(name: str, value: Any) -> None:
    """Two or more views of the same instances, one tensor of shape (V, N, D)."""
    if isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}; call torch.stack({name}).")
    features(name, value, expected="(V, N, D)")
    if value.shape[0] < 2:
        raise ValueError(
            f"{name} must have at least two views (V >= 2), got shape {shape(value)}; its axes are views, instances, "
            "features."
        )


def same_kind(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Two embeddings that meet in one product: same device, dtype and feature size."""
    same_device(name, value, other_name, other)
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {names([other.dtype])}, got {names([value.dtype])}; "
            f"call {name}.to({other_name}.dtype)."
        )
    same_width(name, value, other_name, other)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {value.device}; "
            f"call {name}.to({other_name}.device)."
        )


def same_width(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{name} must have the feature size of {other_name}, D = {other.shape[-1]}, got {value.shape[-1]}; "
            "project both to one size."
        )


def one_per_row(name: str, value: Tensor, rows_of: str, rows: Tensor) -> None:
    """What has an entry for each row of another tensor."""
    if value.shape[0] != rows.shape[0]:
        raise ValueError(
            f"{name} must have an entry for each row of {rows_of}, N = {rows.shape[0]}, got shape {shape(value)}; "
            "its first axis is that of the rows."
        )


def other_features(name: str, value: Any, rows_of: str, rows: Tensor) -> None:
    """Features of the same rows, of a width of their own."""
    features(name, value)
    one_per_row(name, value, rows_of, rows)
    same_device(name, value, rows_of, rows)


def same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {shape(other)}, got {shape(value)}; "
            f"row i of {name} is the positive of row i of {other_name}."
        )


def integers(name: str, value: Any) -> None:
    tensor(name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        way_out = f"{name}.long() keeps values that are whole" if value.is_floating_point() else "give integers"
        raise TypeError(f"{name} must be an integer tensor, got {names([value.dtype])}; {way_out}.")


def integer_vector(name: str, value: Any, size: int, device: torch.device, *, rows_of: str) -> None:
    """Labels, ids or indices: one integer per row."""
    integers(name, value)
    vector(name, value, size, device, rows_of=rows_of)


def labels(name: str, value: Any) -> None:
    """One label of each row, or which labels it has."""
    tensor(name, value)
    if value.dim() < 2:
        integers(name, value)


def label_sets(name: str, value: Any, rows_of: str, rows: Tensor, classes: int | None = None) -> None:
    """A row of C entries for each row of features, not 0 where it has a label; of `classes` if it is known how many.

    A single column is taken for labels that were not flattened: as a set it would make one class of all but label 0.
    """
    tensor(name, value)
    n = rows.shape[0]
    if value.dim() != 2 or value.shape[0] != n or value.shape[1] < 2 or (classes or value.shape[1]) != value.shape[1]:
        expected = f"({n},) or ({n}, C) with C >= 2" if classes is None else f"({n}, {classes})"
        if classes is not None:
            way_out = f"give an entry of each of the {classes} labels per row of {rows_of}"
        elif value.numel() == n:
            way_out = f"call {name}.flatten()"
        else:
            way_out = f"give one label, or an entry of each of C labels, per row of {rows_of}"
        raise ValueError(f"{name} must have shape {expected}, got {shape(value)}; {way_out}.")
    same_device(name, value, rows_of, rows)


def floating(name: str, value: Any) -> None:
    tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {names([value.dtype])}; call {name}.float().")


def weights(name: str, value: Any, size: int, device: torch.device, *, rows_of: str) -> None:
    floating(name, value)
    vector(name, value, size, device, rows_of=rows_of)


def samples(ids: Any, sample_weight: Any, size: int, device: torch.device, *, rows_of: str) -> None:
    """What may be said of each sample, if anything is."""
    if ids is not None:
        integer_vector("ids", ids, size, device, rows_of=rows_of)
    if sample_weight is not None:
        weights("sample_weight", sample_weight, size, device, rows_of=rows_of)


def vector(name: str, value: Tensor, size: int, device: torch.device, *, rows_of: str) -> None:
    if value.dim() != 1 or value.shape[0] != size:
        way_out = f"call {name}.flatten()" if value.numel() == size else f"give one value per row of {rows_of}"
        raise ValueError(f"{name} must have shape ({size},), got {shape(value)}; {way_out}.")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}; call {name}.to({rows_of}.device).")


def number(name: str, value: Any) -> None:
    """A scale or bias of the logits, whatever its size: float or floating-point tensor."""
    if isinstance(value, Tensor):
        floating(name, value)
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        if not isinstance(value, torch.nn.Module):
            way_out = "pass a number"
        elif name == "temperature":
            way_out = "call it for its value, of a LogitScale 1 / temperature()"
        else:
            way_out = f"call {name}() for its value"
        raise TypeError(f"{name} must be a float or a tensor, got {type(value).__name__}; {way_out}.")
    elif not -math.inf < value < math.inf:  # math.isfinite would break the graph of torch.compile
        raise ValueError(f"{name} must be finite, got {value}.")


def scale(name: str, value: Any, size: int, device: torch.device, *, rows_of: str) -> None:
    """A scale or bias of the logits: float, one-element tensor, or one value per row."""
    number(name, value)
    if isinstance(value, Tensor):
        one_or_each(name, value, size, device, rows_of=rows_of)


def one_or_each(name: str, value: Tensor, size: int, device: torch.device, *, rows_of: str) -> None:
    if value.numel() != 1:
        vector(name, value, size, device, rows_of=rows_of)
    elif value.device != device:
        raise ValueError(f'{name} must be on {device}, got {value.device}; call {name}.to("{device}").')


def positive_number(name: str, value: Any) -> None:
    """A temperature or a logit scale, whatever its size."""
    number(name, value)
    if not isinstance(value, Tensor):
        least = value
    elif readable(value) and value.numel() > 0:
        least = (value if value.numel() == 1 else value.min()).item()
    else:
        return
    if least <= 0:
        if name == "logit_scale":
            way_out = "pass it exponentiated, such as 1 / 0.07"
        else:
            way_out = "clamp it, or learn its logarithm" if isinstance(value, Tensor) else "pass a value such as 0.07"
        raise ValueError(f"{name} must be positive, got {least}; {way_out}.")


def temperature(name: str, value: Any, device: torch.device, *, rows: int | None = None, rows_of: str = "") -> None:
    """A temperature or a logit scale: positive; a float, a one-element tensor, or (where `rows` is given) a vector."""
    positive_number(name, value)
    if isinstance(value, Tensor):
        if rows is None:
            one_element(name, value)
        one_or_each(name, value, 1 if rows is None else rows, device, rows_of=rows_of)


def one_element(name: str, value: Tensor) -> None:
    if value.numel() != 1:
        raise ValueError(
            f"{name} must be a float or a tensor of one element, got shape {shape(value)}; give one value for all rows."
        )


def logit_bias(value: Any, device: torch.device) -> None:
    """One number for all logits, which leaves a softmax as it is."""
    number("logit_bias", value)
    if isinstance(value, Tensor):
        one_element("logit_bias", value)
        one_or_each("logit_bias", value, 1, device, rows_of="")


def no_dict(value: Any) -> None:
    if value is not False:
        raise ValueError(
            f'output_dict must be False, got {value!r}; the loss is a tensor, put it into {{"contrastive_loss": loss}}.'
        )


def fraction(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be a float in [0, 1), got {value!r}; 0.0 switches it off.")


def choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name} must be one of {options}, got {value!r}.")


def known_options(owner: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    for name, value in options.items():
        if name not in known:
            raise TypeError(f"{owner} has no option {name}, got {name}={value!r}; its options are {', '.join(known)}.")


def both_or_neither(name: str, value: Any, other_name: str, other: Any) -> None:
    if (value is None) != (other is None):
        given, missing = (other_name, name) if value is None else (name, other_name)
        raise ValueError(f"{missing} must be given together with {given}, got only {given}; pass both or neither.")


def enough_keys(queries: int, keys: int) -> None:
    if keys < queries:
        raise ValueError(
            f"key must have at least as many rows as query, N = {queries}, got M = {keys}; "
            "row i of key is the positive of query i, or pass target=."
        )


def positives(target: Any, query: Tensor, key: Tensor) -> None:
    """Which key is the positive of each query: that of its row, or the one it names."""
    n, m = query.shape[0], key.shape[0]
    if target is None:
        enough_keys(n, m)
    else:
        integer_vector("target", target, n, query.device, rows_of="query")
        target_range(target, m)


def ids_of_both(query_ids: Any, key_ids: Any, query: Tensor, key: Tensor) -> None:
    both_or_neither("query_ids", query_ids, "key_ids", key_ids)
    if query_ids is not None:
        integer_vector("query_ids", query_ids, query.shape[0], query.device, rows_of="query")
        integer_vector("key_ids", key_ids, key.shape[0], key.device, rows_of="key")


def enough_columns(rows: int, cols: int) -> None:
    if cols < rows:
        raise ValueError(
            f"y must have at least as many rows as x with one_hot, N = {rows}, got M = {cols}; "
            "row i of y is the positive of row i of x."
        )


def one_guide_for_each(guide: Any, count: int) -> None:
    if not isinstance(guide, (list, tuple)) or len(guide) != count:
        got = f"{len(guide)} values" if isinstance(guide, (list, tuple)) else type(guide).__name__
        of = "anchors and positives" if count == 2 else "anchors, positives and negatives"
        raise TypeError(f"guide must be {count} tensors, the guide's features of {of}, got {got}.")


def a_direction(rows: bool, cols: bool) -> None:
    if not rows and not cols:
        raise ValueError("rows or cols must be True, got rows=False, cols=False; there would be nothing to do.")


def rows_alone(of_columns: Mapping[str, Any], rows: bool, cols: bool) -> None:
    """What self-similarity has no use for: the columns are the rows."""
    for name, value in of_columns.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None in self-similarity (y=None), where the row option applies to both sides, "
                "got a value; pass y=x for logits that are not symmetric."
            )
    if cols or not rows:
        raise ValueError(
            f"rows=True, cols=False is expected in self-similarity (y=None), got rows={rows}, cols={cols}; "
            "the columns have the same result, or pass y=x."
        )


def forms(name: str, value: Any, *, alone: bool) -> tuple[Any, Any]:
    """The features that a second form of the pairs has of rows and of columns; in self-similarity one tensor."""
    if alone:
        if isinstance(value, (list, tuple)):
            raise TypeError(
                f"{name} must be one tensor in self-similarity (y=None), got a {type(value).__name__}; "
                "pass y=x for two that differ."
            )
        return value, None
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        got = f"{len(value)} values" if isinstance(value, (list, tuple)) else type(value).__name__
        raise TypeError(f"{name} must be a pair of tensors, for the rows of x and of y, got {got}; pass (u, v).")
    return tuple(value)


def no_ceiling(guide: Any, keep: str) -> None:
    if guide is not None or keep != "below":
        given = f"keep={keep!r}" if guide is None else "a guide"
        raise ValueError(
            f"ceiling or col_ceiling must be given with {given}, got neither; "
            "pairs are left out by what their guide is compared with."
        )


def finite(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite float, got {value!r}; 0.0 switches it off.")


def target_range(target: Tensor, keys: int) -> None:
    """Where values are not read no kernel reads beyond the keys: such a row has no positive, and its loss is inf."""
    if not readable(target) or target.numel() == 0:
        return
    low, high = (int(value) for value in target.aminmax())
    if low < 0 or high >= keys:
        raise ValueError(f"target must be in [0, M) = [0, {keys}), got values from {low} to {high}.")


def positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be a positive float, got {value!r}; pass a value such as 0.5.")


def no_forward_mode(op: str, *tensors: Tensor | None, instead: str = 'backend="reference"') -> None:
    """An op without a forward-mode rule would drop the tangents silently."""
    if torch.compiler.is_compiling():
        return
    for value in tensors:
        if value is not None and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                f"{op} has no forward-mode derivative, got a dual tensor (torch.func.jvp, forward_ad); "
                f"use reverse mode, or {instead}."
            )


def no_jit_trace(op: str, instead: str = 'torch.export or torch.compile, or backend="reference"') -> None:
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        raise RuntimeError(f"{op} can't be recorded by torch.jit.trace, got a call under it; use {instead}.")


def no_transform(op: str, instead: str) -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{op} can't run under a transform of torch.func (grad, vmap, jacrev), got a call under one; "
            f"use torch.autograd.grad, or {instead}."
        )


def no_batched_gradients(op: str, *grads: Tensor | None) -> None:
    """As of is_grads_batched=True, or where vmap runs over a backward."""
    batched = torch._C._functorch.is_legacy_batchedtensor
    if torch._C._are_functorch_transforms_active() or any(grad is not None and batched(grad) for grad in grads):
        raise RuntimeError(
            f"{op} takes one gradient at a time, got a batch of them (is_grads_batched=True, vectorize=True); "
            "call torch.autograd.grad once for each."
        )


def no_second_differentiation(op: str, instead: str) -> NoReturn:
    raise RuntimeError(
        f"{op} is differentiable once, got a second differentiation (create_graph=True); "
        f"{instead}, which autograd differentiates to any order."
    )


def pair_function(name: str, value: Any, arguments: str) -> None:
    if value is not None and not callable(value):
        raise TypeError(
            f"{name} must be a function of {arguments} or None, got {type(value).__name__}; "
            f"pass one that reads it, such as a lambda."
        )


def parameters(value: Any) -> tuple[Tensor, ...]:
    """The tensors that a function closes over and that are learned."""
    if isinstance(value, Tensor) or not isinstance(value, Iterable) or isinstance(value, (str, Mapping)):
        way_out = "put it into a tuple" if isinstance(value, Tensor) else "pass a tuple of those that score_mod reads"
        raise TypeError(f"parameters must be tensors, one after another, got {type(value).__name__}; {way_out}.")
    given = tuple(value)
    for place, each in enumerate(given):
        floating(f"parameters[{place}]", each)
    return given


def not_a_parameter(leaf: Tensor) -> NoReturn:
    raise ValueError(
        "score_mod must read no tensor that requires a gradient and is not in parameters, got one of shape "
        f"{shape(leaf)}, or one computed from it; pass the very tensor that it reads in parameters=, or detach it."
    )


def pair_terms(value: Any, score: Tensor) -> None:
    """What a score_mod returns for a tile."""
    if not isinstance(value, Tensor):
        raise TypeError(f"score_mod must return a tensor, got {type(value).__name__}; return the terms of a tile.")
    if value.shape != score.shape:
        raise ValueError(
            f"score_mod must return a term for each pair of a tile, of shape {shape(score)}, got {shape(value)}; "
            "row has shape (R, 1) and col (1, C), so that what they index is of the shape of score beside it."
        )
    if value.dtype != score.dtype:
        raise TypeError(
            f"score_mod must return the dtype of score, {names([score.dtype])}, got {names([value.dtype])}; "
            "cast what it reads with .to(score.dtype)."
        )


def pair_mask(value: Any, row: Tensor, col: Tensor) -> None:
    """What a mask_mod returns for a tile."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"mask_mod must return a tensor, got {type(value).__name__}; compare row, col or what they index."
        )
    if value.dtype != torch.bool:
        raise TypeError(
            f"mask_mod must return a bool tensor, True where a pair takes part, got {names([value.dtype])}; "
            "return a comparison."
        )
    sizes = (row.shape[0], col.shape[1])
    if value.dim() != 2 or any(size not in (1, whole) for size, whole in zip(value.shape, sizes, strict=True)):
        raise ValueError(
            f"mask_mod must return a tile of shape {tuple(sizes)}, or one that broadcasts to it, got {shape(value)}; "
            "index with row and col as they come."
        )


def vectors(name: str, value: Any) -> None:
    """Sets of vectors of any batch shape: (..., K, D) with K >= 1 and D >= 1."""
    tensor(name, value)
    if value.dim() < 2 or 0 in value.shape[-2:]:
        raise ValueError(
            f"{name} must have shape (..., K, D) with K >= 1 and D >= 1, got {shape(value)}; "
            "stack the K vectors of a set along dimension -2."
        )
    features(name, value.reshape(-1, value.shape[-1]))


def modalities(others: Sequence[Any]) -> None:
    if len(others) == 1 and isinstance(others[0], (list, tuple)):
        raise TypeError(
            f"others must be 1 to 4 tensors beside the anchor, got a {type(others[0]).__name__}; put * before it."
        )
    if not 1 <= len(others) <= 4:
        raise ValueError(
            f"others must be 1 to 4 tensors beside the anchor, got {len(others)}; pass each modality as an argument."
        )


def neighbours(name: str, value: Any, size: int, *, of: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= size:
        raise ValueError(f"{name} must be an integer in [1, {size}], the number of {of}, got {value!r}.")


def ranks(ks: Any, most: int) -> None:
    if not isinstance(ks, (list, tuple)) or not ks:
        raise TypeError(f"ks must be a list or tuple of at least one integer, got {ks!r}; pass (1, 5, 10).")
    for k in ks:
        neighbours("ks", k, most, of="keys that are kept of each query at most")


def one_answer(target: Any) -> None:
    if target is not None:
        raise ValueError(
            "target must be None with query_ids and key_ids, got a value; they say which keys are positives."
        )


def seed(name: str, value: Any, largest: bool) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be an integer of 64 bits, the seed of the draw, got {value!r}.")
    if not largest:
        raise ValueError(f"{name} must be None with largest=False, got {value}; draws are of the largest logits.")


def teacher(u: Any, v: Any, vectors: Sequence[Any], *, alone: bool) -> None:
    """Which of the teacher's arguments go together."""
    if alone and v is not None:
        raise ValueError("v must be None in self-similarity (y=None), got a value; pass y=x for two that differ.")
    if not alone:
        both_or_neither("u", u, "v", v)
    if u is None and any(value is not None for value in vectors):
        raise ValueError(
            "u must be given with scales or biases of a teacher, got None; without it the student is its own teacher."
        )


def enough_to_draw(name: str, size: int) -> None:
    if size < 2:
        raise ValueError(f"{name} must have at least 2 rows, got {size}; with one tuple there is no negative to draw.")
