"""Python of the user's with a statement left out, for as long as a probe takes.

No file is changed and no module is run again: the file's source is compiled with the statement
switched off, and the functions that hold it run that code inside the ``with`` block. What is
switched off stays where it is as dead code, so that functions close over the same variables.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import gc
import linecache
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_PROBE = "__optimize_nested_probe__"
_HOST_CALLS = {"float", "int", "bool", "len", "str"}
_HOST_METHODS = {"item", "tolist", "data_ptr"}
_SIMPLE = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class Place:
    """A statement of the user's.

    Attributes:
        path: Its file.
        line: Where it is.
        text: Its first line.
    """

    path: str
    line: int
    text: str


@dataclass(frozen=True)
class Edit:
    """A change to a statement.

    Attributes:
        place: The statement.
        values: Expressions (by their position) → the values that they had in a run; without any
            the statement is left out.
    """

    place: Place
    values: Mapping[tuple[int, int], Any] | None = None


def place_of(where: str) -> Place | None:
    """Return the place that ``file:line: code`` names; None where there is no source."""
    head, _, text = where.partition(": ")
    path, _, line = head.rpartition(":")
    if not path or not line.isdigit() or not linecache.getlines(path):
        return None
    try:
        _tree(path)
    except SyntaxError:  # changed since it was imported
        return None
    return Place(path, int(line), text.strip())


def is_left_out(place: Place) -> bool:
    """Whether a statement can be left out: nothing later needs what it does, by its form."""
    found = _statement(_tree(place.path), place.line)
    if isinstance(found, (ast.Expr, ast.Assert)):
        return True
    if isinstance(found, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        targets = found.targets if isinstance(found, ast.Assign) else [found.target]
        return not any(isinstance(n, ast.Name) for target in targets for n in _bound(target))
    if isinstance(found, ast.If):
        return not found.orelse and all(map(_only_says, found.body))
    return isinstance(found, ast.With) and all(i.optional_vars is None for i in found.items)


def _bound(target: ast.expr) -> Iterator[ast.expr]:
    if isinstance(target, (ast.Tuple, ast.List)):
        for item in target.elts:
            yield from _bound(item)
    else:
        yield target


def _only_says(statement: ast.stmt) -> bool:
    return isinstance(statement, (ast.Raise, ast.Expr, ast.Pass, ast.Assert))


def host_values(place: Place) -> list[tuple[int, int]]:
    """Return the expressions of a statement whose values, numbers of Python, could stand for them,
    by their position."""
    found = _statement(_tree(place.path), place.line)
    return [] if found is None else [_position(node) for node in _host_expressions(found)]


def _host_expressions(statement: ast.stmt) -> list[ast.expr]:
    if isinstance(statement, ast.If):
        return [statement.test]
    if isinstance(statement, (ast.For, ast.While, ast.FunctionDef, ast.ClassDef, ast.With)):
        return []
    calls = [n for n in ast.walk(statement) if isinstance(n, ast.Call) and _is_of_host(n)]
    if calls:
        inside = {id(n) for call in calls for n in ast.walk(call) if n is not call}
        return [call for call in calls if id(call) not in inside]
    value = getattr(statement, "value", None)
    return [] if value is None else [value]


def _is_of_host(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in _HOST_METHODS
    return isinstance(call.func, ast.Name) and call.func.id in _HOST_CALLS


@contextlib.contextmanager
def edited(edits: Sequence[Edit]) -> Iterator[None]:
    """Run the user's functions with these changes inside the ``with`` block."""
    with _running({path: _compiled(path, _of(edits, path)) for path in _paths(edits)}, edits):
        yield


@contextlib.contextmanager
def observed(place: Place, edits: Sequence[Edit]) -> Iterator[dict[tuple[int, int], Any]]:
    """Give the values that `host_values` of a statement have inside the ``with`` block, the first
    of each; what is no plain value is not among them."""
    found: dict[tuple[int, int], Any] = {}

    def probe(row: int, column: int, value: Any) -> Any:
        if isinstance(value, _SIMPLE):
            found.setdefault((row, column), value)
        return value

    code = _compiled(place.path, _of(edits, place.path), observe=place)
    others = {path: _compiled(path, _of(edits, path)) for path in _paths(edits)}
    setattr(builtins, _PROBE, probe)
    try:
        with _running({**others, place.path: code}, [*edits, Edit(place)]):
            yield found
    finally:
        delattr(builtins, _PROBE)


def _paths(edits: Sequence[Edit]) -> list[str]:
    return list(dict.fromkeys(edit.place.path for edit in edits))


def _of(edits: Sequence[Edit], path: str) -> list[Edit]:
    return [edit for edit in edits if edit.place.path == path]


@contextlib.contextmanager
def _running(compiled: Mapping[str, types.CodeType], edits: Sequence[Edit]) -> Iterator[None]:
    """Let functions run other code: those that hold one of the statements."""
    lines = [(edit.place.path, edit.place.line) for edit in edits]
    new: dict[tuple[str, str, int], types.CodeType] = {}
    for path, module in compiled.items():
        for code in _codes(module):
            new[path, code.co_name, code.co_firstlineno] = code
    swapped: list[tuple[types.FunctionType, types.CodeType]] = []
    try:
        for function in _functions(list(compiled)):
            code = function.__code__
            other = new.get((code.co_filename, code.co_name, code.co_firstlineno))
            if other is None or other.co_freevars != code.co_freevars:
                continue
            if any(path == code.co_filename and _holds(code, line) for path, line in lines):
                swapped.append((function, code))
                function.__code__ = other
        yield
    finally:
        for function, code in swapped:
            function.__code__ = code


def _functions(paths: Sequence[str]) -> list[types.FunctionType]:
    """Return the functions of some files: those that the garbage collector knows, and those of
    modules that were imported before it was told to forget them (`gc.freeze`)."""
    found = {id(f): f for f in gc.get_objects() if type(f) is types.FunctionType}
    modules = [m for m in list(sys.modules.values()) if getattr(m, "__file__", None) in paths]
    ahead: list[Any] = [value for module in modules for value in vars(module).values()]
    seen: set[int] = set()
    while ahead:
        value = ahead.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) is types.FunctionType:
            found[id(value)] = value
            ahead += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        elif isinstance(value, type) and value.__module__ in {m.__name__ for m in modules}:
            ahead += vars(value).values()
        names = ("__wrapped__", "as_written")
        ahead += [value.__dict__[n] for n in names if n in getattr(value, "__dict__", {})]
        if isinstance(value, (staticmethod, classmethod, property)):
            ahead.append(value.fget if isinstance(value, property) else value.__func__)
    return list(found.values())


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield inner
            yield from _codes(inner)


def _holds(code: types.CodeType, line: int) -> bool:
    lines = [number for _, _, number in code.co_lines() if number is not None]
    if lines and min(lines) <= line <= max(lines):
        return True
    return any(_holds(inner, line) for inner in code.co_consts if isinstance(inner, types.CodeType))


def _tree(path: str) -> ast.Module:
    return ast.parse("".join(linecache.getlines(path)))


def _compiled(path: str, edits: Sequence[Edit], observe: Place | None = None) -> types.CodeType:
    tree = _tree(path)
    for edit in edits:
        found = _statement(tree, edit.place.line)
        if found is None:
            continue
        if edit.values is None:
            tree = _Replace({id(found): _switched_off(found)}).visit(tree)
        else:
            tree = _Replace(
                {
                    id(node): _constant(node, edit.values[_position(node)])
                    for node in _host_expressions(found)
                    if _position(node) in edit.values
                }
            ).visit(tree)
    if observe is not None:
        found = _statement(tree, observe.line)
        nodes = [] if found is None else _host_expressions(found)
        tree = _Replace({id(node): _probed(node) for node in nodes}).visit(tree)
    return compile(tree, path, "exec", dont_inherit=True)


class _Replace(ast.NodeTransformer):
    def __init__(self, new: Mapping[int, Any]) -> None:
        self._new = new

    def visit(self, node: ast.AST) -> Any:
        return self._new[id(node)] if id(node) in self._new else self.generic_visit(node)


def _statement(tree: ast.Module, line: int) -> ast.stmt | None:
    """Return the innermost statement at a line."""
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    return max(found, key=lambda node: (node.lineno, -(node.end_lineno or 0)), default=None)


def _switched_off(statement: ast.stmt) -> ast.stmt:
    """Return the statement as dead code; of a ``with`` block the block stays."""
    kept = list(statement.body) if isinstance(statement, ast.With) else []
    dead = ast.With(statement.items, [ast.Pass()]) if isinstance(statement, ast.With) else statement
    never = ast.Constant(0)
    made = ast.If(never, [ast.copy_location(dead, statement)], kept)
    return ast.fix_missing_locations(ast.copy_location(made, statement))


def _constant(node: ast.expr, value: Any) -> ast.expr:
    made = ast.IfExp(ast.Constant(0), node, ast.Constant(value))
    return ast.fix_missing_locations(ast.copy_location(made, node))


def _probed(node: ast.expr) -> ast.expr:
    row, column = _position(node)
    probe = ast.Name(_PROBE, ast.Load())
    made = ast.Call(probe, [ast.Constant(row), ast.Constant(column), node], [])
    return ast.fix_missing_locations(ast.copy_location(made, node))


def _position(node: ast.expr) -> tuple[int, int]:
    return node.lineno, node.col_offset
