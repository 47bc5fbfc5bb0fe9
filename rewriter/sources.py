"""The user's code that a graph comes from."""

from __future__ import annotations

import ast
import linecache
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from passes.graph import is_users


@dataclass(frozen=True)
class Source:
    """A function of the user's.

    Attributes:
        path: Its file, as `shown`.
        first_line: The number of its first line, from 1.
        lines: The lines, without line ends.
    """

    path: str
    first_line: int
    lines: tuple[str, ...]


def shown(path: str) -> str:
    """Return a file's name as a report shows it: below the working directory, or below where it is
    imported from."""
    below = [
        os.path.relpath(path, start)
        for start in (os.getcwd(), *sys.path)
        if start and path.startswith(start.rstrip(os.sep) + os.sep)
    ]
    return min(below, key=len, default=path)


def place_of(where: str) -> tuple[str, int, str]:
    """Return path, line and code of ``file:line: code``; ``("", 0, "")`` if it is not known.

    >>> place_of("train.py:12: u = net(x)")
    ('train.py', 12, 'u = net(x)')
    """
    head, _, code = where.partition(": ")
    path, colon, number = head.rpartition(":")
    return (path, int(number), code) if colon and number.isdigit() else ("", 0, "")


def sources_of(places: Iterable[tuple[str, int]]) -> tuple[Source, ...]:
    """Return the functions that hold the given lines of the user's files, each once.

    Args:
        places: Files and line numbers. A line outside of any function stands for itself.
    """
    wanted: dict[str, set[int]] = {}
    for path, line in places:
        if path and is_users(path):
            wanted.setdefault(path, set()).add(line)
    found = []
    for path, numbers in sorted(wanted.items()):
        text = [line.rstrip("\n") for line in linecache.getlines(path)]
        spans = _function_spans("\n".join(text))
        for first, last in _joined({_around(n, spans) for n in numbers if n <= len(text)}):
            found.append(Source(shown(path), first, tuple(text[first - 1 : last])))
    return tuple(found)


def _function_spans(text: str) -> list[tuple[int, int]]:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []  # a notebook's cell with magics: lines stand for themselves
    spans = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            spans.append((first, node.end_lineno or node.lineno))
    return spans


def _around(line: int, spans: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the innermost function around a line."""
    holding = [span for span in spans if span[0] <= line <= span[1]]
    return max(holding, default=(line, line))


def _joined(spans: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans that no other one contains."""
    return sorted(
        s for s in spans if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in spans)
    )
