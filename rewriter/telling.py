"""What a loss tells people on its way: prints, log records, progress bars, metrics of a writer.

None of that has a part in what is computed. The calls are made after the graph has run, in the
order in which the loss makes them, with the values that the graph has computed as one more output
each.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch._dynamo import symbolic_convert
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import VariableBuilder
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.lists import BaseListVariable, TupleVariable
from torch._dynamo.variables.misc import DebuggingVariable, StringFormatVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable

CLOCKS = frozenset(
    {time.time, time.time_ns, time.perf_counter, time.perf_counter_ns, time.monotonic}
)
"""Read before the graph is run, in the order of the calls."""

_LEVELS = ("debug", "info", "warning", "warn", "error", "critical", "log")

_PLACES: dict[str, tuple[str, ...]] = {
    "logging:Logger": _LEVELS,
    "logging:LoggerAdapter": _LEVELS,
    "io:TextIOBase": ("write", "flush"),
    "tqdm.std:tqdm": (
        *("set_postfix", "set_postfix_str", "set_description", "set_description_str", "update"),
        *("refresh", "write"),
    ),
    "torch.utils.tensorboard.writer:SummaryWriter": ("add_scalar", "add_scalars", "flush"),
    "tensorboardX.writer:SummaryWriter": ("add_scalar", "add_scalars", "flush"),
    "wandb.sdk.wandb_run:Run": ("log",),
}
"""Classes of what is told to, and methods that return nothing that a loss needs."""

_FUNCTIONS = ("wandb:log", "mlflow:log_metric", "mlflow:log_metrics")


def _known(name: str) -> Any:
    """Return a class or a function if its module has been imported."""
    module, _, name = name.partition(":")
    return getattr(sys.modules.get(module), name, None)


def _methods_of(value: Any) -> tuple[str, ...]:
    """Return what can be told to an object."""
    if isinstance(value, io.TextIOBase):
        return _PLACES["io:TextIOBase"]
    for name, methods in _PLACES.items():
        kind = _known(name)
        if isinstance(kind, type) and isinstance(value, kind):
            return methods
    return ()


def call_later(function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Call what the loss has called."""
    function(*args, **kwargs)


def percent(text: str, values: Any) -> str:
    """Return ``text % values``."""
    return text % values


class _Import(VariableTracker):
    """A function of this module, in the code that Dynamo writes."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(**options)
        self.name = name

    def reconstruct(self, codegen: Any) -> None:
        codegen.load_import_from(__name__, self.name)


class _Percent(VariableTracker):
    """A text that is put together after the graph has run."""

    def __init__(self, text: str, values: VariableTracker, **options: Any) -> None:
        super().__init__(**options)
        self.text, self.values = text, values

    def python_type(self) -> type:
        return str

    def reconstruct(self, codegen: Any) -> None:
        codegen.add_push_null(lambda: codegen.load_import_from(__name__, "percent"))
        codegen(ConstantVariable.create(self.text))
        codegen(self.values)
        codegen.extend_output(symbolic_convert.create_call_function(2, False))


def _is_tellable(value: Any) -> bool:
    """Whether Dynamo can put a value together after the graph has run, as it was when it was
    told."""
    if hasattr(value, "realize"):
        value = value.realize()
    if isinstance(value, (TensorVariable, SymNodeVariable, StringFormatVariable, _Percent)):
        return True
    if value.is_python_constant():
        return True
    if isinstance(value, BaseListVariable):
        return all(map(_is_tellable, value.items))
    return False


def _tell(tx: Any, function: VariableTracker, args: Any, kwargs: Any) -> VariableTracker | None:
    """Note a call for the time after the graph; None if it cannot be made then."""
    if not all(map(_is_tellable, [*args, *kwargs.values()])):
        return None
    names = {ConstantVariable.create(name): value for name, value in kwargs.items()}
    call = [function, TupleVariable(list(args)), ConstDictVariable(names)]
    # What is inlined has a list of its own, which nobody reads.
    tx.output.root_tx.debug_locals.append((_Import("call_later"), call))
    return ConstantVariable.create(None)


class _Place(VariableTracker):
    """An object that is told something, and asked nothing."""

    def __init__(self, value: Any, refuse: Callable[[str], None], **options: Any) -> None:
        super().__init__(**options)
        self.value, self.refuse = value, refuse

    def python_type(self) -> type:
        return type(self.value)

    def call_method(self, tx: Any, name: str, args: Any, kwargs: Any) -> VariableTracker:
        assert self.source is not None
        method = DebuggingVariable(None, source=AttrSource(self.source, name))
        told = _tell(tx, method, args, kwargs) if name in _methods_of(self.value) else None
        if told is None:
            self.refuse(f"{type(self.value).__name__}.{name}, whose result or arguments are needed")
        assert told is not None
        return told


def _print(refuse: Callable[[str], None]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if len(tx.output.tracers) > 1:
            refuse(f"{self.value.__name__}() in a part of the loss that may run again")
        place = kwargs.get("file")
        if isinstance(place, _Place):
            kwargs = {**kwargs, "file": DebuggingVariable(None, source=place.source)}
            told = _tell_to(tx, self, args, kwargs)
        else:
            told = _tell(tx, self, args, kwargs)
        if told is None:
            refuse(f"{self.value.__name__}() of other things than tensors, numbers and strings")
        return told

    return call_function


def _tell_to(tx: Any, function: VariableTracker, args: Any, kwargs: Any) -> VariableTracker | None:
    rest = {name: value for name, value in kwargs.items() if name != "file"}
    if not all(map(_is_tellable, rest.values())):
        return None
    told = _tell(tx, function, args, {})
    if told is not None:
        call = tx.output.root_tx.debug_locals[-1][1]
        names = {ConstantVariable.create(name): value for name, value in kwargs.items()}
        call[2] = ConstDictVariable(names)
    return told


def _format_value(original: Callable[..., Any]) -> Callable[..., Any]:
    """Put a number of the graph into a text after the graph has run."""

    def format_value(self: Any, spec: Any, flags: int) -> Any:
        value = self.stack[-1]
        value = value.realize() if hasattr(value, "realize") else value
        if not isinstance(value, SymNodeVariable):
            return original(self, spec, flags)
        self.pop()
        kind = {1: "!s", 2: "!r", 3: "!a"}.get(flags & 3, "")
        text = "{" + kind + ":" + spec.as_python_constant() + "}"
        return self.push(StringFormatVariable.create(text, [value], {}))

    return format_value


def _remainder(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``text % values`` be put together after the graph has run."""

    def remainder(self: Any, inst: Any) -> Any:
        text, values = self.stack[-2:]
        values = values.realize() if hasattr(values, "realize") else values
        is_text = text.is_python_constant() and isinstance(text.as_python_constant(), str)
        if not is_text or values.is_python_constant() or not _is_tellable(values):
            return original(self, inst)
        self.popn(2)
        return self.push(_Percent(text.as_python_constant(), values))

    return remainder


def _operators() -> Iterator[tuple[list[Any], int]]:
    """Return where Dynamo looks for what it does for ``%``."""
    table: Any = getattr(symbolic_convert, "_binary_op_lookup", ())
    named = symbolic_convert.InstructionTranslator.BINARY_REMAINDER
    for index, handler in enumerate(table):
        if handler is named and isinstance(table, list):
            yield table, index


@contextlib.contextmanager
def told_later(refuse: Callable[[str], None]) -> Iterator[None]:
    """Let Dynamo put off, in the block, what a loss tells people.

    Args:
        refuse: Ends a trace that asks what it tells for an answer.
    """
    wrap, translator = VariableBuilder._wrap, symbolic_convert.InstructionTranslatorBase

    def wrap_place(self: Any, value: Any) -> VariableTracker:
        if any(value is _known(name) for name in _FUNCTIONS if value is not None):
            self.install_guards(GuardBuilder.ID_MATCH)
            return DebuggingVariable(value, source=self.source)
        if not _methods_of(value):
            return wrap(self, value)
        self.install_guards(GuardBuilder.TYPE_MATCH)
        return _Place(value, refuse, source=self.source)

    with contextlib.ExitStack() as stack:
        for owner, name, handler in (
            (VariableBuilder, "_wrap", wrap_place),
            (DebuggingVariable, "call_function", _print(refuse)),
            (translator, "_format_value", _format_value(translator._format_value)),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, handler)
        for table, index in list(_operators()):
            stack.callback(table.__setitem__, index, table[index])
            table[index] = _remainder(table[index])
        yield
