"""Call what Dynamo has compiled without Dynamo around the call: its guards are asked here, then its
code is run. The one file that knows how Dynamo keeps specialisations.

Dynamo's own way to a specialisation is a wrapper that prepares for a trace which then is not
needed, and a hook into the interpreter. For a small network that costs more than its guards do, and
what the guards hold for is all that decides whether compiled code may run. A version of PyTorch
that lacks one of the names used here is called through Dynamo's own way.
"""

from __future__ import annotations

import inspect
import linecache
import pkgutil
import re
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.eval_frame
import torch._dynamo.guards
import torch._dynamo.mutation_guard

from rewriter.errors import NestedGradientWarning


def _named(name: str) -> Any:
    """Return what a name of PyTorch's stands for, None if there is none."""
    try:
        return pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return None


_ENTRIES_OF = "torch._C:_dynamo.eval_frame._debug_get_cache_entry_list"
_INTERCEPTION = "torch._C:_dynamo.eval_frame.get_eval_frame_callback"
_SCRIPT_TRACE = "torch._C:_get_tracing_state"
_STANCE = "torch._dynamo.eval_frame:_stance.stance"
_GENERATION = "torch._dynamo.mutation_guard:GenerationTracker.generation"
_COMPILED = "__compiled_fn"  # what the names begin with that Dynamo's code calls graphs by
_NAMES = (
    *(_ENTRIES_OF, _INTERCEPTION, _SCRIPT_TRACE, _STANCE, _GENERATION),
    "torch._C:_dynamo.eval_frame._CacheEntry.guard_manager",
    "torch._C:_dynamo.eval_frame._CacheEntry.code",
    "torch._dynamo.guards:GuardManagerWrapper.check",
)
_entries_of, _interception, _script_trace = map(_named, (_ENTRIES_OF, _INTERCEPTION, _SCRIPT_TRACE))
_stances = _named("torch._dynamo.eval_frame")
_generations = _named("torch._dynamo.mutation_guard:GenerationTracker")
_said: set[str] = set()

_SOURCE = re.compile(
    r"""\b[LG]\[(?:'[^']*'|"[^"]*")\](?:\.\w+(?!\()|\[(?:'[^']*'|"[^"]*"|-?\d+)\]|\.size\(\)\[\d+\])*"""
)


@dataclass(frozen=True)
class Miss:
    """Why a specialisation does not hold for a call.

    Attributes:
        guard: What it asks for.
        values: What that is about, as expressions over the function's locals and globals; empty if
            it is about none of them.
        where: ``file:line: code`` of the user's code that read it, or ``?``.
        kind: ``int`` if it asks for one integer, and another is there; ``list`` if it asks for the
            length of a list.
        owner: Whose attribute or item that is.
    """

    guard: str
    values: tuple[str, ...]
    where: str = "?"
    kind: type | None = None
    owner: Any = None


class NoSpecialisation(Exception):
    """No specialisation holds for a call, and none is to be made now.

    Attributes:
        misses: Why each that there is does not.
    """

    def __init__(self, misses: Sequence[Miss]) -> None:
        super().__init__("no specialisation holds")
        self.misses = tuple(misses)


def past_the_wrapper(
    function: types.FunctionType, compiled: Callable[..., Any], is_capturing: Callable[[], bool]
) -> Callable[..., Any]:
    """Return `Guarded`; where PyTorch lacks a name that this takes, ``compiled`` itself, with one
    warning in a process.

    Args:
        function: The user's function, with a code object of its own.
        compiled: The same under `torch.compile`.
        is_capturing: Whether Dynamo is prepared to make a specialisation.
    """
    missing = [name.replace(":", ".") for name in _NAMES if _named(name) is None]
    if not missing:
        return Guarded(function, compiled, is_capturing)
    if not _said.issuperset(missing):
        _said.update(missing)
        warnings.warn(
            f"optimize_nested: PyTorch {torch.__version__} has no {', '.join(missing)}, so every "
            "call goes through Dynamo's own wrapper: some tens of microseconds longer, with the "
            "same results. For the shortest calls use a version that optimize-nested is tested "
            "with.",
            NestedGradientWarning,
            stacklevel=8,
        )
    return compiled


class Guarded:
    """A function behind Dynamo's guards.

    Args:
        function: The user's function, with a code object of its own.
        compiled: The same under `torch.compile`.
        is_capturing: Whether Dynamo is prepared to make a specialisation.
    """

    def __init__(
        self,
        function: types.FunctionType,
        compiled: Callable[..., Any],
        is_capturing: Callable[[], bool],
    ) -> None:
        self._function, self._compiled, self._is_capturing = function, compiled, is_capturing
        self._code = function.__code__
        self._locals = _binder(function)
        self._cells = tuple(
            zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        )
        self._runnable: dict[types.CodeType, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the specialisation whose guards hold; let Dynamo find or make one if none is known
        to.

        Raises:
            NoSpecialisation: There are some, and none holds; Dynamo is not prepared for another.
        """
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
                    _generations.generation += 1
                    run = self._runnable.get(entry.code) or self._add(entry.code)
                    if run is not None:
                        return run(*args, **kwargs)
            if not self._is_capturing():
                raise NoSpecialisation(self._misses(entries, values))
        return self._compiled(*args, **kwargs)

    def made(self) -> list[types.CodeType]:
        """Return what Dynamo has made so far: a code object for each specialisation."""
        return [entry.code for entry in _entries_of(self._code) if entry.code is not None]

    def is_used_again(self, code: types.CodeType) -> bool:
        """Whether a specialisation has had a second call: its first one went through Dynamo."""
        return code in self._runnable

    def _misses(self, entries: Sequence[Any], values: dict[str, Any]) -> list[Miss]:
        found = []
        for entry in entries:
            if entry.code is None:
                reason = getattr(entry.guard_manager, "invalidation_reason", "an object is gone")
                found.append(Miss(reason, tuple(dict.fromkeys(_SOURCE.findall(reason)))))
            elif (miss := _miss(entry.guard_manager, values)) is not None:
                found.append(miss)
        return found

    def _add(self, code: types.CodeType | None) -> Callable[..., Any] | None:
        if code is None:  # an object that its guards name is gone, and they hold for anything
            return None
        known = {entry.code for entry in _entries_of(self._code)}
        self._runnable = {c: run for c, run in self._runnable.items() if c in known}
        made = self._runnable[code] = _with_code(self._function, self._direct(code))
        return made

    def _direct(self, code: types.CodeType) -> types.CodeType:
        """Return code that calls what was compiled as it is: what Dynamo has put around it switches
        off a hook that is not in force where this runs."""
        space = self._function.__globals__
        direct: dict[str, str] = {}
        for name in code.co_names:
            compiled = getattr(space.get(name), "_torchdynamo_orig_callable", None)
            if compiled is not None and name.startswith(_COMPILED):
                new = direct[name] = f"{name}_direct"
                space[new] = compiled
                weakref.finalize(code, space.pop, new, None)  # as Dynamo deletes its own name
        return code.replace(co_names=tuple(direct.get(name, name) for name in code.co_names))


def _miss(manager: Any, values: dict[str, Any]) -> Miss | None:
    """Return the first guard that does not hold for these locals; None if all do."""
    info = manager.check_verbose(values)
    if info.result:
        return None
    parts = [str(part) for part in info.verbose_code_parts]
    scope = {**(manager.closure_vars or {}), "L": values}
    space = manager.global_scope or {}
    scope.setdefault("G", space.get("G", {}))
    part = parts[0] if parts else "?"
    if len(parts) > 1:  # sizes: one guard for all that is asked of them
        part = next((part for part in parts if not _holds(part, space, scope)), part)
    guard, _, comment = (piece.strip() for piece in part.partition("  # "))
    sources = tuple(dict.fromkeys(_SOURCE.findall(guard)))
    kind, owner = None, None
    if len(sources) == 1:
        kind = _kind(guard.replace(sources[0], "x"), type(_value(sources[0], space, scope)))
        whose = re.fullmatch(r"(.*?)(\.\w+|\[[^\[\]]*\])", sources[0])
        owner = _value(whose[1], space, scope) if whose else None
    return Miss(guard, sources, _line(info, comment), kind, owner)


def _kind(guard: str, found: type) -> type | None:
    if found is int and re.fullmatch(r"x == -?\d+", guard):
        return int
    if found is list and re.fullmatch(r"x|not x|len\(x\) [!=]= \d+", guard):
        return list
    return None


def _holds(part: str, space: dict[str, Any], scope: dict[str, Any]) -> bool:
    return bool(_value(part, space, scope, True))


def _value(
    expression: str, space: dict[str, Any], scope: dict[str, Any], default: Any = None
) -> Any:
    """Evaluate an expression of a guard, which Dynamo evaluates as C++ where it can."""
    try:
        return eval(expression, dict(space), scope)
    except Exception:  # it is one only as a whole, or for other values: nothing is known of it
        return default


def _line(info: Any, comment: str) -> str:
    """Return the line of the user's code that a guard comes from."""
    stack = getattr(info, "user_stack", None)  # not in every version
    if stack:
        path, number = stack[-1].filename, stack[-1].lineno
        return f"{path}:{number}: {linecache.getline(path, number).strip()}"
    code, _, place = comment.rpartition("  # ")
    return f"{place.partition(' in ')[0]}: {code}" if code else "?"


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
        _stances._stance.stance == "default" and _interception() is None and _script_trace() is None
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
