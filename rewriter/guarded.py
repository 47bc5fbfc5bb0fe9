"""Call what Dynamo has compiled without Dynamo around the call: its guards are asked here, then its
code is run. The one file that knows how Dynamo keeps specialisations.

Dynamo's own way to a specialisation is a wrapper that prepares for a trace which then is not
needed, and a hook into the interpreter. For a small network that costs more than its guards do, and
what the guards hold for is all that decides whether compiled code may run.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import eval_frame
from torch._dynamo.mutation_guard import GenerationTracker

_entries_of: Any = torch._C._dynamo.eval_frame._debug_get_cache_entry_list  # pyright: ignore[reportAttributeAccessIssue]
_interception: Any = torch._C._dynamo.eval_frame.get_eval_frame_callback  # pyright: ignore[reportAttributeAccessIssue]
_script_trace: Any = torch._C._get_tracing_state


class Guarded:
    """A function behind Dynamo's guards.

    Args:
        function: The user's function, with a code object of its own.
        compiled: The same under `torch.compile`.
    """

    def __init__(self, function: types.FunctionType, compiled: Callable[..., Any]) -> None:
        self._function, self._compiled = function, compiled
        self._code = function.__code__
        self._locals = _binder(function)
        self._cells = tuple(
            zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        )
        self._runnable: dict[types.CodeType, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the specialisation whose guards hold; let Dynamo find or make one if none is known
        to."""
        entries = _entries_of(self._code) if _is_undisturbed() else ()
        if entries:
            try:
                values = self._locals(*args, **kwargs)
                for name, cell in self._cells:
                    values[name] = cell.cell_contents
            # They are not its arguments, or a name has no value yet: the error is the user's.
            except (TypeError, ValueError):
                return self._compiled(*args, **kwargs)
            for entry in entries:
                if entry.guard_manager.check(values):
                    # As Dynamo does: CUDA graphs may write over what earlier calls have returned.
                    GenerationTracker.generation += 1
                    run = self._runnable.get(entry.code) or self._add(entry.code)
                    return run(*args, **kwargs)
        return self._compiled(*args, **kwargs)

    def _add(self, code: types.CodeType) -> Callable[..., Any]:
        known = {entry.code for entry in _entries_of(self._code)}
        self._runnable = {c: run for c, run in self._runnable.items() if c in known}
        made = self._runnable[code] = _with_code(self._function, code)
        return made


def _with_code(function: types.FunctionType, code: types.CodeType) -> Callable[..., Any]:
    made = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _is_undisturbed() -> bool:
    """Whether nothing is in force that Dynamo's wrapper would heed: a stance, a trace, another
    function of Dynamo's around the call."""
    return (
        eval_frame._stance.stance == "default"
        and _interception() is None
        and _script_trace() is None
    )


def _binder(function: types.FunctionType) -> Callable[..., dict[str, Any]]:
    """Return a function that takes the same arguments and returns them by name."""

    def bound() -> dict[str, Any]:
        return locals()

    code = function.__code__
    variadic = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + variadic.bit_count()]
    code = bound.__code__.replace(
        co_argcount=code.co_argcount,
        co_posonlyargcount=code.co_posonlyargcount,
        co_kwonlyargcount=code.co_kwonlyargcount,
        co_nlocals=len(names),
        co_varnames=names,
        co_flags=bound.__code__.co_flags | variadic,
    )
    bound = types.FunctionType(code, {"locals": locals}, "bound", function.__defaults__)
    bound.__kwdefaults__ = function.__kwdefaults__
    return bound
