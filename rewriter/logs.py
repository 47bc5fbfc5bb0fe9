"""Lists that a loss appends to and does not read: logs.

Dynamo takes every list that it meets for an input: what is compiled holds for its length, and the
whole list is written anew. A list that grows by a value at each call would have the loss captured
at each call. One that nothing is asked of but to append has no part in what is computed: the values
are outputs of the graph, and they are appended after it has run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import VariableBuilder
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.misc import DebuggingVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable

# What Dynamo can put together after the graph has run, without another look at the user's objects.
_VALUES = (TensorVariable, ConstantVariable, SymNodeVariable)


class _Log(VariableTracker):
    """A list of the user's that can be appended to, and nothing else.

    Args:
        refuse: Ends the trace, with a reason.
        **options: As for every `VariableTracker`.
    """

    def __init__(self, refuse: Callable[[str], None], **options: Any) -> None:
        super().__init__(**options)
        self.refuse = refuse

    def python_type(self) -> type:
        return list

    def call_method(self, tx: Any, name: str, args: Any, kwargs: Any) -> VariableTracker:
        values = [value.realize() for value in args]
        if name != "append" or len(values) != 1 or not isinstance(values[0], _VALUES):
            self.refuse("a list that grows is read")
        assert self.source is not None
        append = DebuggingVariable(list.append, source=AttrSource(self.source, "append"))
        tx.output.root_tx.debug_locals.append((append, values))
        return ConstantVariable.create(None)

    def unpack_var_sequence(self, tx: Any) -> list[VariableTracker]:
        self.refuse("a list that grows is read")
        raise AssertionError

    force_unpack_var_sequence = unpack_var_sequence


@contextlib.contextmanager
def appended_later(names: Collection[str], refuse: Callable[[str], None]) -> Iterator[None]:
    """Let Dynamo take lists for logs, in the block.

    Args:
        names: Dynamo's expressions for them.
        refuse: Ends a trace that asks for more.
    """
    wrap = VariableBuilder._wrap

    def wrap_log(self: Any, value: Any) -> VariableTracker:
        if type(value) is not list or self.source.name not in names:
            return wrap(self, value)
        self.install_guards(GuardBuilder.TYPE_MATCH)
        log = _Log(refuse, source=self.source)
        # Under another name it is the same.
        return self.tx.output.side_effects.track_mutable(value, log)

    if not names:
        yield
        return
    VariableBuilder._wrap = wrap_log
    try:
        yield
    finally:
        VariableBuilder._wrap = wrap
