"""Sizes of a loss's arguments that a recording of it does not fix.

The loss works on real tensors, and is told symbolic sizes of them: what it computes from a size is
then part of the graph, and what it decides by one is a guard.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node, Proxy
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from passes.graph import is_users
from passes.tracing import AnySizes

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)

_NAMES = sympy.symbols("size_:64")


class _Tracer(GraphAppendingTracer):
    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        node.meta["of_sizes"] = True
        return node


class Sizes:
    """The sizes of one recording.

    Args:
        graph: The graph that is recorded.
        examples: What they are in this recording, in the order in which they are met; those of the
            call if nothing is said.

    Attributes:
        env: Where the symbols live.
        any: The sizes as symbols.
        sources: For each an argument that has it, and in which dimension.
        nodes: For each its placeholder.
        taken: Which of them the graph takes, in this order after its tensors.
        asked_at: Lines that let a size be read as a number through a tensor.
    """

    def __init__(self, graph: Graph, examples: Sequence[int]) -> None:
        self.graph, self.examples = graph, examples
        self.env = ShapeEnv()
        self.any = AnySizes(self.env)
        self.sources: list[tuple[Any, int]] = []
        self.nodes: list[Node] = []
        self.taken: tuple[int, ...] = ()
        self.asked_at: list[str] = []
        self._computed: dict[Any, Node] = {}

    def shape_of(self, entry: Any, after: Node) -> list[int | torch.SymInt]:
        """Return the shape of an argument, symbolic where its size may be another.

        Args:
            entry: The input; its value has the sizes of the call.
            after: The last placeholder.
        """
        shape: list[int | torch.SymInt] = list(entry.value.shape)
        for dim, size in enumerate(entry.value.shape):
            if size < 2:
                continue
            index = len(self.nodes)
            size = self.examples[index] if index < len(self.examples) else size
            shape[dim] = self.any.new(size)
            with self.graph.inserting_after(self.nodes[-1] if self.nodes else after):
                node = self.graph.placeholder(f"size_{index}")
            node.meta["example_value"] = shape[dim]
            self.nodes.append(node)
            self.sources.append((entry, dim))
        return shape

    @property
    def of_call(self) -> list[int]:
        """What the sizes are in the call."""
        return [entry.value.shape[dim] for entry, dim in self.sources]

    @property
    def here(self) -> list[int]:
        """What they are in this recording."""
        return [number(node.meta["example_value"]) for node in self.nodes]

    def free_dims(self, entry: Any) -> tuple[int, ...]:
        """Return which dimensions of an argument have sizes that nothing has fixed."""
        pairs = zip(self.any.symbols, self.sources, strict=True)
        return tuple(dim for s, (of, dim) in pairs if of is entry and not self.any.is_fixed(s))

    def others(self) -> list[int] | None:
        """Return other sizes for which the recording should hold, each of those that need not be
        equal another one; None if there are none."""
        for factor, step in ((1, 1), (2, 1), (2, 0), (1, -1)):
            sizes = self.any.moved(self.of_call, factor, step)
            if sizes != self.of_call and self.any.admits(sizes):
                return sizes
        return None

    def fixed_at(self) -> list[str]:
        """Return the user's lines that ask for a size as a number, which fixes it: ``file:line:
        code``."""
        lines = list(self.asked_at)
        for guard in self.env.guards:
            frame = guard.sloc.framework_loc
            is_number = isinstance(guard.expr, sympy.Eq) and guard.expr.rhs.is_number
            if is_number and isinstance(frame, traceback.FrameSummary) and is_users(frame.filename):
                lines.append(f"{frame.filename}:{frame.lineno}: {frame.line}")
        return lines

    def node_of(self, value: Any) -> Any:
        """Return the node that computes a symbolic number; the number if it is fixed."""
        expression = value.node.expr
        if not expression.free_symbols:
            return number(value)
        found = self._computed.get(expression)
        if found is None:
            tracer = _Tracer(self.graph)
            symbols = zip(self.any.symbols, self.nodes, strict=True)
            proxies = {symbol: Proxy(node, tracer) for symbol, node in symbols}
            made: Any = sympy_interp(PythonReferenceAnalysis, proxies, expression)
            found = self._computed[expression] = made.node
            found.meta["example_value"] = value
        return found

    def drop_unused(self) -> None:
        """Take the sizes that the graph does not use out of it; the rest is `taken`."""
        self.taken = tuple(i for i, node in enumerate(self.nodes) if node.users)
        for index, node in enumerate(self.nodes):
            if index not in self.taken:
                self.graph.erase_node(node)

    def written(self, node: Node) -> str:
        """Return what a node computes of sizes as an expression in them."""
        names = zip(self.any.symbols, _NAMES, strict=False)
        return str(node.meta["example_value"].node.expr.subs(dict(names)))


def is_of_sizes(node: Node) -> bool:
    """Whether a node of a recorded graph computes a number from sizes."""
    return node.meta.get("of_sizes", False)


def number(value: Any) -> Any:
    """Return the number that a symbolic one is in this recording."""
    return value.node.hint if isinstance(value, SYMBOLIC) else value


def numbers(values: Any) -> Any:
    """Replace symbolic numbers, also in slices and structures, by what they are here."""
    return _mapped(values, number)


def folded(values: Any) -> Any:
    """Replace symbolic numbers that have been fixed by what they are."""
    return _mapped(values, lambda x: x if x.node.expr.free_symbols else number(x))


def fix(values: Any) -> Any:
    """Replace symbolic numbers by what they are here, and let the recording hold for that only."""
    return _mapped(values, lambda x: _FIX[type(x)](x))


_FIX: dict[Any, Callable[[Any], Any]] = {
    torch.SymInt: int,
    torch.SymFloat: float,
    torch.SymBool: bool,
}


def _mapped(values: Any, function: Callable[[Any], Any]) -> Any:
    """Replace the symbolic numbers among arguments or results; the rest stays what it is."""
    if isinstance(values, SYMBOLIC):
        return function(values)
    if isinstance(values, slice):
        return slice(*(_mapped(x, function) for x in (values.start, values.stop, values.step)))
    if isinstance(values, (tuple, list, dict)) and any(map(has_symbolic, _items(values))):
        if isinstance(values, dict):
            return {key: _mapped(value, function) for key, value in values.items()}
        made = [_mapped(value, function) for value in values]
        return type(values)(*made) if hasattr(values, "_fields") else type(values)(made)
    return values


def _items(values: Any) -> Any:
    return values.values() if isinstance(values, dict) else values


def has_symbolic(value: Any) -> bool:
    """Whether symbolic numbers are among arguments or results."""
    if isinstance(value, slice):
        return any(isinstance(x, SYMBOLIC) for x in (value.start, value.stop, value.step))
    if isinstance(value, (tuple, list, dict)):
        return any(map(has_symbolic, _items(value)))
    return isinstance(value, SYMBOLIC)


def enlarged(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor of another shape: its rows, and its first ones again where there are more."""
    for dim, size in enumerate(shape):
        if x.shape[dim] != size:
            rows = torch.arange(size, device=x.device) % x.shape[dim]
            x = x.index_select(dim, rows)
    return x.contiguous()
