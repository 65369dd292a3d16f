"""Inputs of the ops over pairs: named option sets at any shape and dtype, and the ops beside their naive twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tolerance import LOGITS
from torch import Tensor

import contrastive_ops as co
from contrastive_ops.dtypes import statistics_dtype
from contrastive_ops.ops.similarity_sum import FUNCTIONS
from contrastive_ops.reference import logits_at, logsumexp, similarity_logits

VECTORS = ("row_scale", "col_scale", "row_bias", "col_bias")
KINDS = ("float", "0d", "1", "vector")
# equal modulo 2^32, one of them negative: ids that are cut to 32 bits anywhere would collide
FAR_IDS = torch.tensor([-3, -1, 0, 1, 2**32, 2**32 + 1, -3 + 2**32, 2**40 + 1, -(2**62), 2**63 - 1])


class Maker:
    """Draws the options of one problem of N rows and M columns."""

    def __init__(self, n: int, m: int, dtype: torch.dtype, seed: int = 0) -> None:
        self.sizes = {"row": n, "col": m}
        self.n, self.m, self.dtype = n, m, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def features(self, size: int, d: int) -> Tensor:
        x = torch.nn.functional.normalize(torch.randn(size, d, generator=self.generator, dtype=torch.float64), dim=1)
        return (2.0 * x).to(self.dtype).requires_grad_()

    def vector(self, name: str, kind: str) -> float | Tensor:
        """A scale about 1.5, or a bias about 0; floats are exact in every dtype."""
        offset = 1.5 if name.endswith("scale") else 0.0
        if kind == "float":
            return offset + 0.25
        shape = {"0d": (), "1": (1,), "vector": (self.sizes[name.removesuffix("_scale").removesuffix("_bias")],)}[kind]
        value = offset + 0.4 * torch.randn(shape, generator=self.generator)
        return value.to(statistics_dtype(torch.empty(0, dtype=self.dtype))).requires_grad_()

    def exclude(self) -> Tensor:
        """A column per row, -1 for some rows, and some columns named by several rows.

        Not by hundreds: their coefficients are rounded to 16 bits where the features are, and in the sum of so many an
        element that cancels has more of that than its unit in the tolerance allows for.
        """
        exclude = torch.randint(-1, max(self.m, 1), (self.n,), generator=self.generator)
        exclude[1::5] = -1
        exclude[2:700:7] = max(self.m - 1, 0)
        return exclude

    def ids(self, groups: int, *, ordered: bool = False) -> dict[str, Tensor]:
        row, col = (torch.randint(-2, groups - 2, (size,), generator=self.generator) for size in (self.n, self.m))
        return {"row_ids": row.sort().values if ordered else row, "col_ids": col.sort().values if ordered else col}

    def far_ids(self) -> dict[str, Tensor]:
        pick = self.ids(len(FAR_IDS))
        return {name: FAR_IDS[index + 2] for name, index in pick.items()}

    def ceiling(self, name: str, *, of_logits: bool = False) -> Tensor:
        """About the middle of what it is compared with: of guides, halves between the integers that these are."""
        size = self.sizes["col" if name.startswith("col") else "row"]
        if of_logits:
            return torch.randn(size, generator=self.generator).to(statistics_dtype(torch.empty(0, dtype=self.dtype)))
        return torch.randint(-1, 3, (size,), generator=self.generator) + 0.5

    def guide(self, *sizes: int) -> tuple[Tensor, ...]:
        """Of a width of their own, small integers, so that no rounding moves a pair across its ceiling."""
        return tuple(torch.randint(-1, 2, (size, 11), generator=self.generator).to(self.dtype) for size in sizes)

    def vectors(self) -> dict[str, Any]:
        return {name: self.vector(name, "vector") for name in VECTORS}

    def of_rows(self, options: dict[str, Any]) -> dict[str, Any]:
        """In self-similarity the row options apply to both sides."""
        return {name: value for name, value in options.items() if not name.startswith("col")}


OPTIONS: dict[str, Callable[[Maker], dict[str, Any]]] = {
    "rows": lambda make: {},
    "cols": lambda make: {"rows": False, "cols": True},
    "both": lambda make: {"cols": True},
    **{
        f"{name}-{kind}": lambda make, name=name, kind=kind: {name: make.vector(name, kind), "cols": True}
        for name in VECTORS
        for kind in KINDS
    },
    "vectors": lambda make: {**make.vectors(), "cols": True},
    "vectors-rows": lambda make: make.vectors(),
    "vectors-cols": lambda make: {**make.vectors(), "rows": False, "cols": True},
    "low_precision_scale": lambda make: {
        "row_scale": torch.tensor(1.5, dtype=torch.bfloat16).requires_grad_(),
        "cols": True,
    },
    "exclude": lambda make: {"exclude": make.exclude(), "cols": True},
    "exclude-diagonal": lambda make: {"exclude": torch.arange(make.n).clamp(max=make.m - 1), "cols": True},
    "exclude-one_column": lambda make: {"exclude": torch.zeros(make.n, dtype=torch.int32), "cols": True},
    "ids-exclude": lambda make: {**make.ids(6), "cols": True},
    "ids-exclude-sorted": lambda make: {**make.ids(6, ordered=True), "cols": True},
    "ids-restrict": lambda make: {**make.ids(6), "ids": "restrict", "cols": True},
    "ids-restrict-sorted": lambda make: {**make.ids(6, ordered=True), "ids": "restrict", "cols": True},
    "ids-exclude-far": lambda make: {**make.far_ids(), "cols": True},
    "ids-restrict-far": lambda make: {**make.far_ids(), "ids": "restrict", "cols": True},
    "everything": lambda make: {**make.vectors(), "exclude": make.exclude(), **make.ids(6), "cols": True},
    "everything-restrict": lambda make: {
        **make.vectors(), "exclude": make.exclude(), **make.ids(3, ordered=True), "ids": "restrict", "cols": True,
    },
}  # fmt: skip
SELF_OPTIONS: dict[str, Callable[[Maker], dict[str, Any]]] = {
    "self": lambda make: {},
    **{
        f"self-{name}-{kind}": lambda make, name=name, kind=kind: {name: make.vector(name, kind)}
        for name in ("row_scale", "row_bias")
        for kind in KINDS
    },
    "self-exclude": lambda make: {"exclude": make.exclude()},
    "self-exclude-diagonal": lambda make: {"exclude": torch.arange(make.n)},
    "self-ids-exclude": lambda make: make.of_rows(make.ids(6)),
    "self-ids-exclude-sorted": lambda make: make.of_rows(make.ids(6, ordered=True)),
    "self-ids-restrict": lambda make: {**make.of_rows(make.ids(6)), "ids": "restrict"},
    "self-ids-restrict-sorted": lambda make: {**make.of_rows(make.ids(6, ordered=True)), "ids": "restrict"},
    "self-ids-far": lambda make: make.of_rows(make.far_ids()),
    "self-everything": lambda make: make.of_rows({**make.vectors(), "exclude": make.exclude(), **make.ids(6)}),
    "self-everything-restrict": lambda make: make.of_rows(
        {**make.vectors(), "exclude": torch.arange(make.n), **make.ids(3, ordered=True), "ids": "restrict"}
    ),
}
GUIDED: dict[str, Callable[[Maker], dict[str, Any]]] = {
    "guide": lambda make: {"guide": make.guide(make.n, make.m), "ceiling": make.ceiling("row"), "cols": True},
    "guide-col_ceiling": lambda make: {
        "guide": make.guide(make.n, make.m), "col_ceiling": make.ceiling("col"), "cols": True,
    },
    "guide-above": lambda make: {"guide": make.guide(make.n, make.m), "ceiling": 0.5, "keep": "above", "cols": True},
    "guide-own_logits": lambda make: {
        "ceiling": make.ceiling("row", of_logits=True), "row_scale": make.vector("row_scale", "vector"), "cols": True,
    },
    "guide-everything": lambda make: {
        **make.vectors(), "exclude": make.exclude(), **make.ids(6), "guide": make.guide(make.n, make.m),
        "ceiling": make.ceiling("row"), "col_ceiling": make.ceiling("col"), "cols": True,
    },
    "guide-everything-restrict": lambda make: {
        **make.vectors(), "exclude": make.exclude(), **make.ids(3, ordered=True), "ids": "restrict",
        "guide": make.guide(make.n, make.m), "ceiling": make.ceiling("row"), "keep": "above", "cols": True,
    },
}  # fmt: skip
SELF_GUIDED: dict[str, Callable[[Maker], dict[str, Any]]] = {
    "self-guide": lambda make: {"guide": make.guide(make.n)[0], "ceiling": make.ceiling("row")},
    "self-guide-above": lambda make: {"guide": make.guide(make.n)[0], "ceiling": 0.5, "keep": "above"},
    "self-guide-own_logits": lambda make: {"ceiling": make.ceiling("row", of_logits=True)},
    "self-guide-everything": lambda make: make.of_rows(
        {
            **make.vectors(), "exclude": make.exclude(), **make.ids(6), "guide": make.guide(make.n)[0],
            "ceiling": make.ceiling("row"),
        }
    ),
}  # fmt: skip
PLAIN = {**OPTIONS, **SELF_OPTIONS}
ALL_OPTIONS = PLAIN | GUIDED | SELF_GUIDED


def problem(
    name: str, n: int, m: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The positional arguments and the options of one problem; self-similarity ignores M."""
    alone = name.startswith("self")
    make = Maker(n, n if alone else m, dtype, seed)
    arguments = (make.features(n, d),) if alone else (make.features(n, d), make.features(m, d))
    return arguments, ALL_OPTIONS[name](make)


def frozen(
    name: str, n: int, m: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Of the rows alone, with columns that require no gradient."""
    (x, y), options = problem(name, n, m, d, dtype)
    of_cols = {key: value.detach() for key, value in options.items() if key in ("col_scale", "col_bias")}
    return (x, y.detach()), options | of_cols | {"cols": False}


def requested(outputs: Any, rows: bool, cols: bool, exclude: bool) -> tuple[Tensor, ...]:
    row_lse, col_lse, row_max, col_max, excluded_logit = outputs
    return (
        *((row_lse, row_max) if rows else ()),
        *((col_lse, col_max) if cols else ()),
        *((excluded_logit,) if exclude else ()),
    )


def fused(x: Tensor, y: Tensor | None = None, *, backend: str, **options: Any) -> tuple[Tensor, ...]:
    """The op on a backend: what was asked for of its results."""
    outputs = co.similarity_logsumexp(x, y, backend=backend, **options)
    rows, cols = options.get("rows", True), options.get("cols", False)
    for asked, *vectors in ((rows, outputs.row_lse, outputs.row_max), (cols, outputs.col_lse, outputs.col_max)):
        assert asked or all(vector.shape == (0,) for vector in vectors)
    exclude = options.get("exclude") is not None
    assert exclude or outputs.excluded_logit.shape == (0,)
    return requested(outputs, rows, cols, exclude)


def naive(
    x: Tensor, y: Tensor | None = None, *, rows: bool = True, cols: bool = False, ids: str = "exclude", **options: Any
) -> tuple[Tensor, ...]:
    """The same from the dense logits."""
    sizes = {"row": len(x), "col": len(x if y is None else y)}
    for name in VECTORS:
        value = options.get(name)
        if value is not None:
            value = (
                torch.as_tensor(value, dtype=statistics_dtype(x), device=x.device)
                if isinstance(value, float)
                else value
            )
            options[name] = value.reshape(-1).expand(sizes[name[:3]])
    guide = options.pop("guide", None)
    options["guide_x"], options["guide_y"] = (None, None) if guide is None else (guide, None) if y is None else guide
    for name, size in (("ceiling", "row"), ("col_ceiling", "col")):
        if isinstance(options.get(name), float):
            options[name] = x.new_full((sizes[size],), options[name], dtype=statistics_dtype(x))
    above = options.pop("keep", "below") == "above"
    logits = similarity_logits(x, y, restrict=ids == "restrict", above=above, **options)
    exclude = options.get("exclude")
    of_all_pairs = similarity_logits(x, y, **{name: options.get(name) for name in VECTORS})
    excluded = None if exclude is None else logits_at(of_all_pairs, exclude.long())
    largest = [
        logits.detach().amax(dim) if logits.shape[dim] else logits.new_full((logits.shape[1 - dim],), -torch.inf)
        for dim in (1, 0)
    ]
    return requested((logsumexp(logits, 1), logsumexp(logits, 0), *largest, excluded), rows, cols, exclude is not None)


def _half(x: Tensor) -> Tensor:
    """Of teachers: where a pair with itself has all the weight, s - E is nothing but its rounding."""
    return (x.detach() / 2).requires_grad_()


class Op(NamedTuple):
    """An op over pairs beside its dense twin; both give what was asked for of its results, one after the other."""

    name: str
    of: str | None = None  # the function that is summed
    teacher: bool = False

    def logits(self, dtype: torch.dtype) -> float:
        """As in tolerance.py: t (s - E) has the roundings of its weight and those of its logits.

        In float64 the truth has them, too: beside sums in long double it is up to twice as far off as the C++ engine.
        """
        return LOGITS * ((4.0 if dtype == torch.float64 else 2.0) if self in EXPECTATIONS else 1.0)

    @property
    def options(self) -> tuple[str, ...]:
        """The names of its option sets."""
        if self.name == "similarity_logsumexp":
            return tuple(ALL_OPTIONS)
        return tuple(ALL_OPTIONS if self.name == "similarity_sum" else PLAIN)

    def problem(
        self, name: str, n: int, m: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        arguments, options = problem(name, n, m, d, dtype, seed)
        if self.of is not None:
            options["of"] = self.of
        if self.name == "similarity_expectation" and not self.teacher:
            arguments = tuple(_half(x) for x in arguments)
        if self.teacher:
            make = Maker(n, len(arguments[-1]), dtype, seed + 1)
            sizes = (n, m)[: len(arguments)]
            teacher = tuple(_half(make.features(size, d + 2)) for size in sizes)
            arguments = (*arguments, *teacher)
            if name.startswith("self"):
                arguments, options["u"] = arguments[:1], arguments[1]
            # a bias of rows leaves their softmax as it is: without columns its gradient is 0, and dense is noise
            still = {"row_bias"} if not (options.get("cols") or "self" in name) else set()
            still |= {"col_bias"} if not options.get("rows", True) else set()
            still |= {"row_bias", "col_bias"} if 1 in (n, len(arguments[-1])) else set()
            vectors = [name for name in VECTORS if isinstance(options.get(name), Tensor) and name not in still]
            options |= {f"teacher_{vector}": make.vector(vector, "vector") for vector in vectors}
        return arguments, options

    def fused(self, *arguments: Tensor, backend: str, **options: Any) -> tuple[Tensor, ...]:
        if self.name == "similarity_logsumexp":
            return fused(*arguments, backend=backend, **options)
        outputs = getattr(co, self.name)(*arguments, backend=backend, **options)
        asked = {"row": options.get("rows", True), "col": options.get("cols", False)}
        asked["exc"] = options.get("exclude") is not None
        results = []
        for field, value in zip(outputs._fields, outputs, strict=True):
            if asked[field[:3]]:
                results.append(value)
            else:
                assert value.shape == (0,), field
        return tuple(results)

    def naive(self, *arguments: Tensor, **options: Any) -> tuple[Tensor, ...]:
        if self.name == "similarity_logsumexp":
            return naive(*arguments, **options)
        return self.fused(*arguments, backend="reference", **options)

    def __str__(self) -> str:
        return self.name.removeprefix("similarity_") + (
            f"-{self.of}" if self.of else "-teacher" if self.teacher else ""
        )


LOGSUMEXP = Op("similarity_logsumexp")
SUMS = tuple(Op("similarity_sum", of) for of in FUNCTIONS)
EXPECTATIONS = (Op("similarity_expectation", teacher=True), Op("similarity_expectation"))
# of the sums one whose function is 0 where a pair does not take part, and one where it is not
OPS = (LOGSUMEXP, *(op for op in SUMS if op.of in ("softplus", "square")), *EXPECTATIONS)
