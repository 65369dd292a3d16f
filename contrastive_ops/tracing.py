"""What torch.compile is told of the package's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Dynamo calls the function while it traces, with constants, and has its result in the graph.

    This is torch.compiler.assume_constant_result without the import of Dynamo, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
