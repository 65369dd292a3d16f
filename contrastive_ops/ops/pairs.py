"""What the ops over pairs of embeddings have in common: the options of a pair, checked, as their schemas take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from contrastive_ops import backends, checks
from contrastive_ops.dtypes import promoted
from contrastive_ops.ops.arguments import integers, per_row

VECTORS = "Tensor? row_scale, Tensor? col_scale, Tensor? row_bias, Tensor? col_bias"
INDICES = "Tensor? exclude, Tensor? row_ids, Tensor? col_ids"
GUIDE = "Tensor? guide_x, Tensor? guide_y, Tensor? ceiling, Tensor? col_ceiling"


class Pairs(NamedTuple):
    """The arguments of an op, by their place in its schema, and the backend that runs it."""

    features: tuple[Tensor, Tensor | None]
    vectors: tuple[Tensor | None, ...]
    indices: tuple[Tensor | None, ...]
    restrict: bool
    backend: str

    @property
    def columns(self) -> tuple[int, str]:
        """How many there are, and the argument that has them."""
        x, y = self.features
        return (x.shape[0], "x") if y is None else (y.shape[0], "y")


def pairs(
    op: str,
    x: Tensor,
    y: Tensor | None,
    *,
    row_scale: float | Tensor | None,
    col_scale: float | Tensor | None,
    row_bias: float | Tensor | None,
    col_bias: float | Tensor | None,
    exclude: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    ids: str,
    rows: bool,
    cols: bool,
    backend: str,
) -> Pairs:
    checks.features("x", x)
    if y is None:
        of_columns = {"col_scale": col_scale, "col_bias": col_bias, "col_ids": col_ids}
        checks.rows_alone(of_columns, rows, cols)
    else:
        checks.features("y", y)
        x, y = promoted(x, y)
        checks.same_kind("y", y, "x", x)
        checks.both_or_neither("row_ids", row_ids, "col_ids", col_ids)
        checks.a_direction(rows, cols)
    checks.choice("ids", ids, ("exclude", "restrict"))
    if ids == "restrict" and row_ids is None:
        raise ValueError('row_ids must be given with ids="restrict", got None; pass ids="exclude" for no groups.')
    n = x.shape[0]
    m, col_name = (n, "x") if y is None else (y.shape[0], "y")
    chosen = backends.choose(op, x, backend)
    return Pairs(
        (x, y),
        vectors("", (row_scale, col_scale, row_bias, col_bias), x, n, m, col_name),
        (
            integers("exclude", exclude, n, x, "x", chosen),
            integers("row_ids", row_ids, n, x, "x", chosen),
            integers("col_ids", col_ids, m, x, col_name, chosen),
        ),
        ids == "restrict",
        chosen,
    )


def vectors(
    form: str, values: tuple[float | Tensor | None, ...], x: Tensor, n: int, m: int, col_name: str
) -> tuple[Tensor | None, ...]:
    """Scales and biases of the rows and columns of a bilinear form."""
    names = ("row_scale", "col_scale", "row_bias", "col_bias")
    sides = ((n, "x"), (m, col_name)) * 2
    return tuple(
        per_row(f"{form}{name}", value, size, x, rows_of)
        for name, value, (size, rows_of) in zip(names, values, sides, strict=True)
    )


def guide_of(
    given: Pairs,
    guide: Tensor | tuple[Tensor, Tensor] | None,
    ceiling: float | Tensor | None,
    col_ceiling: float | Tensor | None,
    keep: str,
) -> tuple[tuple[Tensor | None, ...], bool]:
    """The guide of the pairs, its ceilings, and whether those above them are the ones that take part."""
    checks.choice("keep", keep, ("below", "above"))
    x, y = given.features
    m, col_name = given.columns
    if y is None:
        checks.rows_alone({"col_ceiling": col_ceiling}, True, False)
    if ceiling is None and col_ceiling is None:
        checks.no_ceiling(guide, keep)
        return (None, None, None, None), False
    of_rows = per_row("ceiling", ceiling, x.shape[0], x, "x")
    of_cols = per_row("col_ceiling", col_ceiling, m, x, col_name)
    u, v = (None, None) if guide is None else checks.forms("guide", guide, alone=y is None)
    u, v = second_form(("guide", "guide[1]"), u, v, given)
    return tuple(None if value is None else value.detach() for value in (u, v, of_rows, of_cols)), keep == "above"


def second_form(
    names: tuple[str, str], u: Tensor | None, v: Tensor | None, given: Pairs
) -> tuple[Tensor | None, Tensor | None]:
    """Other features of the same rows and columns, of a width of their own, in the dtype of x."""
    x, y = given.features
    if u is None:
        return None, None
    checks.other_features(names[0], u, "x", x)
    if v is None or y is None:
        return u.to(x.dtype), None
    checks.other_features(names[1], v, "y", y)
    checks.same_width(names[1], v, names[0], u)
    return u.to(x.dtype), v.to(x.dtype)
