"""What a loss prints and warns of, after the graph has run.

Dynamo puts off calls of ``print`` and ``warnings.warn`` until the graph has run, but forgets those
of functions that it traces into (helpers, methods, the ``forward`` of a module), and all keyword
arguments. Here none is lost: each call is the outermost function's, with its keywords, and numbers
read from tensors may be among its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.misc import DebuggingVariable, StringFormatVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable

# What can be put together after the graph has run, without another look at the user's objects.
_VALUES = (TensorVariable, ConstantVariable, StringFormatVariable, SymNodeVariable)


class _WithKeywords(DebuggingVariable):
    """A function with keyword arguments that are constants.

    Args:
        function: The function, where it is read from.
        keywords: Its keyword arguments.
    """

    def __init__(self, function: DebuggingVariable, keywords: dict[str, Any]) -> None:
        super().__init__(function.value)
        self.function, self.keywords = function, keywords

    def reconstruct(self, codegen: Any) -> None:
        codegen.add_push_null(lambda: codegen.load_import_from("functools", "partial"))
        self.function.reconstruct(codegen)
        for value in self.keywords.values():
            codegen(value)
        names = tuple(self.keywords)
        codegen.extend_output(codegen.create_call_function_kw(1 + len(names), names, False))


def printed_later(refuse: Callable[[str], None]) -> Callable[..., Any]:
    """Return Dynamo's handling of a call that is put off.

    Args:
        refuse: Ends the trace, with a reason.
    """

    def call_function(self: DebuggingVariable, tx: Any, args: Any, kwargs: Any) -> Any:
        values = [value.realize() for value in args]
        keywords = {name: value.realize() for name, value in kwargs.items()}
        is_known = all(isinstance(value, _VALUES) for value in values)
        if not (is_known and all(isinstance(v, ConstantVariable) for v in keywords.values())):
            refuse(f"{self.value.__name__}() of other things than tensors, numbers and strings")
        if len(tx.output.tracers) > 1:
            refuse(f"{self.value.__name__}() in a part of the loss that may run again")
        function = _WithKeywords(self, keywords) if keywords else self
        tx.output.root_tx.debug_locals.append((function, values))
        return ConstantVariable.create(None)

    return call_function


def formatted_later(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return Dynamo's handling of a part of a formatted string: that of a number which is read from
    a tensor is put off as a whole. Dynamo asks for the number first, which a branch on it may do,
    but no ``f"{loss.item():.4f}"``.

    Args:
        original: Dynamo's own, ``_format_value``.
    """

    def format_value(self: Any, fmt_spec: Any, flags: int) -> Any:
        value = self.stack[-1].realize()
        if not (isinstance(value, SymNodeVariable) and _is_read(value.sym_num)):
            return original(self, fmt_spec, flags)
        self.pop()
        text = f"{{{_CONVERSIONS[flags & 3]}:{fmt_spec.as_python_constant()}}}"
        self.push(StringFormatVariable.create(text, [value], {}))

    return format_value


_CONVERSIONS = ("", "!s", "!r", "!a")


def _is_read(number: Any) -> bool:
    """Whether a symbolic number is a tensor's value."""
    is_symbolic = isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return is_symbolic and not number.node.has_hint()
