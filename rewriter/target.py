"""Find a loss and its arguments by name: ``module:function`` or ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rewriter.api import OptimizedLoss, optimize_nested
from rewriter.errors import OptimizeNestedError

MAKE_ARGS = "make_args"


class TargetError(OptimizeNestedError, ValueError):
    """A name does not lead to what it should."""


@dataclass(frozen=True)
class Target:
    """A loss and what to call it with.

    Attributes:
        loss: The decorated loss.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """

    loss: OptimizedLoss
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def find_target(name: str, args: str | None, options: Mapping[str, Any]) -> Target:
    """Import a loss and make its arguments.

    Args:
        name: ``module:function`` or ``file.py:function``; the function may be decorated already.
        args: The same of what makes the arguments, see `make_arguments`; None takes ``make_args``
            beside the loss.
        options: Options of `optimize_nested`, in place of those the loss was decorated with.

    Raises:
        TargetError: A name leads nowhere, or to something else.
    """
    found = find(name)
    if isinstance(found, OptimizedLoss):
        own = {key: value for key, value in vars(found.options).items() if key not in options}
        found, options = found.as_written, {**own, **options}
    if not callable(found):
        raise TargetError(f"{name} is a {type(found).__name__}; expected a loss function")
    try:
        loss = optimize_nested(found, **options)
    except (TypeError, ValueError) as error:
        raise TargetError(str(error)) from error
    if not isinstance(loss, OptimizedLoss):
        raise TargetError(f"{name} is a module; expected a loss function that calls it")
    if args is None:
        args = f"{name.rpartition(':')[0]}:{MAKE_ARGS}"
        if not hasattr(_imported(args.rpartition(":")[0]), MAKE_ARGS):
            raise TargetError(
                f"--args: the loss's arguments are not known. Name a function that returns them, "
                f"--args module:function, or define {MAKE_ARGS}() beside {name}"
            )
    return Target(loss, *make_arguments(args))


def make_arguments(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Call what a name leads to; return positional and keyword arguments.

    It returns a tuple or list of arguments, a dict of keyword arguments, or a pair of both.

    Raises:
        TargetError: It is no function, or returns something else.
    """
    function = find(name)
    if not callable(function):
        raise TargetError(f"--args: {name} is a {type(function).__name__}; expected a function")
    made = function()
    if isinstance(made, Mapping):
        return (), dict(made)
    if isinstance(made, (tuple, list)):
        is_pair = len(made) == 2 and isinstance(made[0], tuple) and type(made[1]) is dict
        return (tuple(made[0]), dict(made[1])) if is_pair else (tuple(made), {})
    raise TargetError(
        f"--args: {name}() returned a {type(made).__name__}; expected a tuple of arguments, a dict "
        "of keyword arguments, or (tuple, dict)"
    )


def find(name: str) -> Any:
    """Return what ``module:name`` or ``file.py:name`` leads to.

    Raises:
        TargetError: There is no such thing.
    """
    where, colon, path = name.rpartition(":")
    if not colon or not where or not path:
        raise TargetError(f"{name!r}: expected module:function or file.py:function")
    module = _imported(where)
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            raise TargetError(f"{where} has no {path!r}; it has {', '.join(_own(module))}")
        found = getattr(found, part)
    return found


def _own(module: ModuleType) -> list[str]:
    """Return the names of the functions that a module defines."""
    found = vars(module).items()
    return [n for n, f in found if callable(f) and getattr(f, "__module__", "") == module.__name__]


def _imported(where: str) -> ModuleType:
    """Import a module by name, from the current folder too, or run a file as one."""
    if not where.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is not None and (where + ".").startswith(error.name + "."):
                raise TargetError(f"there is no module {where!r}") from error
            raise
    file = Path(where).resolve()
    if not file.is_file():
        raise TargetError(f"there is no file {where}")
    known = sys.modules.get(file.stem)
    if known is not None:
        if getattr(known, "__file__", None) == str(file):
            return known
        raise TargetError(f"{where}: a module {file.stem!r} is loaded already; rename the file")
    # As for a script: what lies beside the file can be imported.
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
    return module
