"""Pairs of a function's source and its docstring, read from the Python files on this machine."""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

# Tests say little in their docstrings, and lib2to3 holds its own copy of many; site-packages is a root of its own.
SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "lib2to3", "site-packages", "test", "testing", "tests"}
MAX_BYTES = 200_000  # larger files are tables, and parsing one takes a second
MAX_PER_FILE = 20  # so that no file fills the batch with functions that resemble each other
MIN_WORDS = 3  # of a docstring; below that it is "See above." or a name


class Pair(NamedTuple):
    """A function without its docstring, and the first paragraph of that docstring."""

    code: str
    text: str
    name: str
    place: str  # path under its root and line, "json/decoder.py:332"


def installed_roots() -> list[Path]:
    """The folders of the standard library and of the installed packages, in this order."""
    folders = sysconfig.get_paths()
    return list(dict.fromkeys(Path(folders[name]) for name in ("stdlib", "purelib", "platlib")))


def collect_pairs(
    roots: Sequence[Path], limit: int, progress: Callable[[int, str], None] = lambda found, package: None
) -> list[Pair]:
    """The first `limit` pairs of the files under `roots`; the same files give the same pairs in the same order.

    A pair whose docstring or whose code came before is left out: a copy in the held-out set would be no test.
    """
    pairs: list[Pair] = []
    seen: set[str] = set()
    for root in roots:
        for path in python_files(root):
            fresh = 0
            for pair in pairs_in(path, root):
                keys = {" ".join(words(pair.text)), " ".join(pair.code.split())}
                if seen.isdisjoint(keys):
                    seen |= keys
                    pairs.append(pair)
                    fresh += 1
                if len(pairs) == limit:
                    return pairs
                if fresh == MAX_PER_FILE:
                    break
            progress(len(pairs), path.relative_to(root).parts[0])
    return pairs


def python_files(root: Path) -> Iterator[Path]:
    """The files under `root`: its modules and packages take turns, in sorted order, so that a limit cuts all alike."""
    if not root.is_dir():
        return
    tops = sorted(entry for entry in root.iterdir() if entry.name not in SKIPPED_FOLDERS)
    for turn in zip_longest(*(_files_of(top) for top in tops)):
        yield from filter(None, turn)


def _files_of(top: Path) -> Iterator[Path]:
    if top.is_file():
        folders: Iterator[tuple[str, list[str], list[str]]] = iter([(str(top.parent), [], [top.name])])
    else:
        folders = os.walk(top)
    for folder, subfolders, names in folders:
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("test_"):
                yield Path(folder, name)


def pairs_in(path: Path, root: Path) -> Iterator[Pair]:
    """The pairs of one file; none when it is too large, unreadable or not of this Python's grammar."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "invalid escape sequence" and the like, in files that are not ours
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = re.split(r"\r\n|\r|\n", source)  # as the parser counts them; splitlines() also cuts at form feeds
    for function in _functions(tree.body):
        docstring = ast.get_docstring(function)
        statement = function.body[0]
        # nothing but a docstring, or one on the line of the def, leaves no code to search for
        if docstring is None or len(function.body) == 1 or statement.lineno == function.lineno:
            continue
        text = " ".join(re.split(r"\n\s*\n", docstring)[0].split())
        if len(words(text)) < MIN_WORDS:
            continue
        code = lines[function.lineno - 1 : statement.lineno - 1] + lines[statement.end_lineno : function.end_lineno]
        yield Pair("\n".join(code), text, function.name, f"{path.relative_to(root).as_posix()}:{function.lineno}")


def _functions(body: Sequence[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods; not those inside a function, whose docstrings are part of that function's code."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield statement
        elif isinstance(statement, ast.ClassDef):
            yield from _functions(statement.body)


def words(text: str) -> list[str]:
    """Lower-case words and numbers; ``readHTTPHeader_2`` gives read, http, header, 2."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)]
