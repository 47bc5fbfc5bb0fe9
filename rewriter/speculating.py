"""Branches on values: the branch of the call that is captured is taken, and the graph says whether
later calls take it too.

Where host code asks what a tensor's value is (``if loss > 1``, ``assert (x > 0).all()``, ``while
error > tolerance``), what is captured so far is computed for the call at hand, and Dynamo goes on
with what comes out. The condition becomes one more output of the graph. It is looked at before
anything is handed out or written (`rewriter.step`): a call for which it is another one is run in
another way (`rewriter.branching`), so numbers are those of the loss as written whatever the branch.

A flag that is an input, and that nothing was written to, is a guard instead: it is compared before
the graph is run.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo import symbolic_convert
from torch._dynamo.guards import get_verbose_code_parts
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import SliceVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch._guards import Source
from torch.fx import GraphModule, Node
from torch.fx.node import has_side_effect, map_arg

from passes.graph import attribute_of, results, where
from rewriter.capture import example_of, replaced, tensor_method
from rewriter.generators import Generators
from rewriter.stateful import is_inside_level

MOST = 64
"""Branches in one capture; a loop that goes on until a value is small has one for each round."""

MOST_INTEGERS = 256
"""In a tensor whose values are all read."""

BRANCHES = "branches"
"""In a captured graph's meta: its `Branch`es, whose conditions are its last outputs."""


@dataclass(frozen=True)
class Branch:
    """A condition that a captured graph holds for: its last outputs are true if it does.

    Attributes:
        where: ``file:line: code`` of the user's code that asks.
    """

    where: str


class OtherBranch(BaseException):
    """A call takes another branch than the specialisation that its guards have found; nothing is
    handed out, written or drawn. Not an `Exception`: nothing has failed.

    Attributes:
        where: Where it branches, ``?`` if that is not known.
    """

    def __init__(self, place: str = "?") -> None:
        super().__init__(place)
        self.where = place


def branches_of(captured: GraphModule) -> tuple[Branch, ...]:
    """Return the branches that a captured graph takes."""
    return captured.meta.get(BRANCHES, ())


def taken(x: Any, value: Any) -> None:
    """Mark a value in a graph that is being captured: what follows holds if ``x`` is ``value``."""


has_side_effect(taken)  # it has no users


def has_value(x: Any, value: Any) -> Tensor:
    """Return whether a number, or a tensor of one element, has this value."""
    if isinstance(x, (bool, torch.SymBool)):
        x, value = torch.sym_ite(x, 1, 0), int(value)
    if not isinstance(x, Tensor):  # computed from sizes
        x = torch.scalar_tensor(x, dtype=torch.float64)
    return torch.eq(x, value)


def has_values(x: Tensor, values: Any) -> Tensor:
    """Return whether a tensor of integers has these values, shape ()."""
    return (x == torch.tensor(values, dtype=x.dtype, device=x.device)).all()


def take_branches(captured: GraphModule) -> None:
    """Make outputs of the conditions that a captured graph holds for."""
    marks = captured.graph.find_nodes(op="call_function", target=taken)
    if not marks:
        return
    conditions, branches = [], []
    for mark in marks:
        x, value = mark.args
        with captured.graph.inserting_before(mark):
            is_list = isinstance(value, (list, tuple))
            function = has_values if is_list else has_value
            condition = captured.graph.call_function(function, (x, value))
        condition.meta = {k: v for k, v in mark.meta.items() if k == "stack_trace"}
        condition.meta["condition"] = True
        if isinstance(example_of(x), Tensor) and not is_list:
            condition.meta["example_value"] = example_of(x) == value
        conditions.append(condition)
        branches.append(Branch(where(mark)))
        captured.graph.erase_node(mark)
    output = captured.graph.output_node()
    output.args = ((*results(captured.graph), *conditions),)
    captured.meta[BRANCHES] = tuple(branches)
    captured.recompile()


class _Values:
    """What a graph that Dynamo is capturing computes for the call at hand."""

    def __init__(self) -> None:
        self._values: dict[Node, Any] = {}
        self._generators = Generators.now()
        self._modes = _Modes.now()
        self.known: dict[Node, Any] = {}
        self.has_drawn = False

    def of(self, node: Node, modules: Any) -> Any:
        """Return the value of a node, and run what has come before it since the last time."""
        generators, modes = Generators.now(), _Modes.now()
        self._generators.set()
        self._modes.set()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the loss as written gives them
                for each in node.graph.nodes:
                    if each not in self._values:
                        self._values[each] = self._run(each, modules)
            now = Generators.now()
            self.has_drawn |= now != self._generators
            self._generators, self._modes = now, _Modes.now()
        finally:
            generators.set()
            modes.set()
        return self._values[node]

    def _run(self, node: Node, modules: Any) -> Any:
        if node.op == "placeholder":
            return _given(node)
        if node.op == "get_attr":
            return attribute_of(modules, str(node.target))
        args, kwargs = map_arg((node.args, node.kwargs), self._values.__getitem__)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return attribute_of(modules, str(node.target))(*args, **kwargs)


def _is_constant(node: Node) -> bool:
    """Whether a value is the same in every call: it is made of Python's numbers alone."""
    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each in seen:
            continue
        if each.op in ("placeholder", "get_attr"):
            return False
        seen.add(each)
        waiting += each.all_input_nodes
    return True


def _unchanged_input(node: Node) -> Source | None:
    """Return where a value comes from that is an input of shape (), read as it came in."""
    while node.target == "item" or node.target is torch.sym_int:
        node = node.all_input_nodes[0]
    argument: Any = node.meta.get("grapharg")
    example = getattr(argument, "example", None)
    if node.op != "placeholder" or not isinstance(example, Tensor) or example.dim():
        return None
    if argument.source is None or example.dtype.is_floating_point or argument.pass_arg_as_tensor:
        return None
    memory = example.untyped_storage()._cdata
    for other in node.graph.find_nodes(op="placeholder"):
        written = getattr(example_of(other), "_version", 0)
        real = getattr(other.meta.get("grapharg"), "example", None)
        if written and isinstance(real, Tensor) and real.untyped_storage()._cdata == memory:
            return None
    return argument.source


def _holds_value(builder: Any, guard: Any, *, value: Any) -> None:
    """Hold for a value of an input. Asked last of all, and always: Dynamo leaves out the guards of
    a tensor in a module that has the same tensors as before."""
    kind = type(value).__name__
    code = [f"{kind}({builder.arg_ref(guard)}) == {value!r}"]
    builder.add_python_lambda_leaf_guard_to_root(code, get_verbose_code_parts(code, guard))


@dataclass(frozen=True)
class _Modes:
    """What nodes of a graph switch on and off."""

    grad: bool
    casts: tuple[tuple[str, bool, torch.dtype], ...]

    @staticmethod
    def now() -> _Modes:
        casts = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
        ]
        return _Modes(torch.is_grad_enabled(), tuple(casts))

    def set(self) -> None:
        torch.set_grad_enabled(self.grad)
        for kind, enabled, dtype in self.casts:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


def _given(node: Node) -> Any:
    """Return a copy of what the caller has given for an input."""
    argument = node.meta["grapharg"]
    example = argument.example
    if isinstance(example, Tensor):
        return example.detach().clone().requires_grad_(example.requires_grad)
    if argument.pass_arg_as_tensor:
        return torch.tensor(example, dtype=torch.float64)
    return example


class _Speculation:
    """Decide, for the captures inside a ``with`` block, what host code asks of tensors.

    Args:
        lines: Where integers that are read from tensors are to be fixed.
    """

    def __init__(self, lines: Collection[str]) -> None:
        self.lines = lines
        self._output: Any = None
        self._values = _Values()

    def truth(self, tx: Any, variable: Any) -> bool | None:
        """Return whether a value is true for the call at hand; None if that cannot be told."""
        kind = getattr(variable, "sym_num", None)
        if isinstance(kind, (torch.SymInt, torch.SymFloat)):
            variable = SymNodeVariable.create(tx, variable.as_proxy() != 0)
        value = self.value(tx.output, variable.as_proxy())
        return None if value is None else bool(value)

    def value(self, output: Any, proxy: Any, *, is_number: bool = False) -> Any:
        """Return what a value is for the call at hand, as a Python number; None if that cannot be
        told. Of a tensor, whether it is true, unless its number is asked for."""
        node = proxy.node
        self._begin(output)
        values = self._values
        if node in values.known:
            return values.known[node]
        found = self._found(output, node)
        if found is None:
            return None
        if isinstance(found, Tensor):
            if found.numel() != 1 or found.dtype.is_complex:
                return None  # as eager, which raises an error
            found = found.item() if is_number or found.dtype is torch.bool else bool(found)
            if not (is_number or example_of(node).dtype is torch.bool):
                proxy = proxy != 0
                proxy.node.meta["example_value"] = example_of(node) != 0
        values.known[node] = found
        if (source := _unchanged_input(node)) is not None:
            output.guards.add(source.make_guard(functools.partial(_holds_value, value=found)))
        elif values.has_drawn or not _is_constant(node):
            output.create_proxy("call_function", taken, (proxy, found), {})
        return found

    def _begin(self, output: Any) -> None:
        if self._output is not output:  # Dynamo begins anew now and then
            self._output, self._values = output, _Values()

    def _found(self, output: Any, node: Node) -> Any:
        self._begin(output)
        if not output.is_root_tracer() or node.graph is not output.graph or is_inside_level():
            return None
        if len(self._values.known) >= MOST:
            return None
        try:
            return self._values.of(node, _Modules(output.nn_modules))
        # The loss as written raises it too, if it gets there; it is not for a trace to say.
        except Exception:
            return None

    def integers(self, output: Any, proxy: Any) -> Any:
        """Return the values of a tensor of integers as Python numbers, if it is read at a line
        where they are to be fixed; None otherwise."""
        example = example_of(proxy.node)
        if not self.lines or example is None or example.dtype.is_floating_point:
            return None
        mark = output.create_proxy("call_function", taken, (proxy, 0), {})
        found = None
        if where(mark.node) in self.lines:
            found = self._found(output, proxy.node)
        if not isinstance(found, Tensor) or found.numel() > MOST_INTEGERS:
            output.remove_node(mark.node)
            return None
        values = found.tolist()
        mark.node.args = (proxy.node, values)
        self._values.known[mark.node] = values
        return values


class _Modules:
    """The modules and constants of a graph that is being captured, by attribute."""

    def __init__(self, modules: dict[str, Any]) -> None:
        self.__dict__.update(modules)


def _jump(original: Callable[..., Any], speculation: _Speculation) -> Callable[..., Any]:
    def jump(self: Any, inst: Any) -> Any:
        value = self.stack[-1]
        if hasattr(value, "realize"):
            value = value.realize()
        if not _is_unknown(value) or (truth := speculation.truth(self, value)) is None:
            return original(self, inst)
        depth = len(self.stack)
        self.stack[-1] = ConstantVariable.create(truth)
        result = original(self, inst)
        if inst.opname.endswith("OR_POP") and len(self.stack) == depth:
            self.stack[-1] = value  # it is the value of ``x and y``
        return result

    return jump


def _is_unknown(value: Any) -> bool:
    """Whether nothing but a run of the graph tells what a value is."""
    if isinstance(value, SymNodeVariable):
        return _is_of_values(value.sym_num)
    return isinstance(value, TensorVariable) and not value.is_python_constant()


def _is_of_values(number: Any) -> bool:
    """Whether a symbolic number depends on a tensor's value."""
    if not isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return False
    return not number.node.has_hint()


def _bool_impl(original: Callable[..., Any], speculation: _Speculation) -> Callable[..., Any]:
    def bool_impl(self: Any, tx: Any) -> Any:
        truth = speculation.truth(tx, self) if _is_unknown(self) else None
        return original(self, tx) if truth is None else ConstantVariable.create(truth)

    return bool_impl


def _evaluate_expr(original: Callable[..., Any], speculation: _Speculation) -> Callable[..., Any]:
    def evaluate_expr(self: Any, output_graph: Any = None) -> Any:
        if not _is_of_values(self.sym_num):
            return original(self, output_graph)
        value = speculation.value(self.proxy.tracer.output_graph, self.proxy)
        return original(self, output_graph) if value is None else value

    return evaluate_expr


_ASKING = ("IF_TRUE", "IF_FALSE", "IF_TRUE_OR_POP", "IF_FALSE_OR_POP")


def _reading(
    name: str, original: Callable[..., Any], speculation: _Speculation
) -> Callable[..., Any]:
    """Let ``item`` and ``tolist`` return the integers of the call at hand."""

    def read(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        values = speculation.integers(tx.output, self.as_proxy())
        if values is None:
            return original(self, tx, *args, **kwargs)
        while name == "item" and isinstance(values, list):
            (values,) = values
        return VariableTracker.build(tx, values)

    return read


def _slice_as_proxy(original: Callable[..., Any], speculation: _Speculation) -> Callable[..., Any]:
    """Let bounds of a slice that are read from tensors be numbers."""

    def as_proxy(self: Any) -> Any:
        bounds = original(self)
        found = []
        for item, bound in zip(self.items, (bounds.start, bounds.stop, bounds.step), strict=True):
            item = item.realize() if hasattr(item, "realize") else item
            value = None
            if _is_unknown(item):
                proxy = item.as_proxy()
                value = speculation.value(proxy.tracer.output_graph, proxy, is_number=True)
            found.append(bound if value is None else value)
        return slice(*found)

    return as_proxy


def _translators() -> Iterator[Any]:
    """Return Dynamo's classes that interpret bytecode."""
    found = [symbolic_convert.InstructionTranslatorBase]
    for kind in found:
        found += kind.__subclasses__()
        yield kind


def _tables(speculation: _Speculation) -> Iterator[tuple[Any, list[Any]]]:
    """Return for each of these what is done for each instruction: those that jump, and ``not``, ask
    first what is on the stack."""
    for kind in _translators():
        table = list(kind.dispatch_table)
        for index, handler in enumerate(table):
            name = symbolic_convert.dis.opname[index]
            asks = ("JUMP" in name and name.endswith(_ASKING)) or name == "UNARY_NOT"
            if handler is not None and asks:
                table[index] = _jump(handler, speculation)
        yield kind, table


@contextlib.contextmanager
def speculated(lines: Collection[str] = ()) -> Iterator[None]:
    """Let Dynamo take, in the block, the branches that the call at hand takes.

    Args:
        lines: Where integers that are read from tensors are to be fixed.
    """
    speculation = _Speculation(lines)
    with contextlib.ExitStack() as stack:
        # An `assert` would be a node that nothing keeps.
        stack.enter_context(dynamo_config.patch(rewrite_assert_with_torch_assert=False))
        for kind, table in list(_tables(speculation)):
            stack.enter_context(replaced(kind, "dispatch_table", table))
        if hasattr(TensorVariable, "bool_impl"):
            for kind in (TensorVariable, SymNodeVariable):
                asked = _bool_impl(kind.bool_impl, speculation)
                stack.enter_context(replaced(kind, "bool_impl", asked))
        sliced = _slice_as_proxy(SliceVariable.as_proxy, speculation)
        stack.enter_context(replaced(SliceVariable, "as_proxy", sliced))
        if lines:
            for name in ("item", "tolist"):
                read = _reading(name, getattr(TensorVariable, f"method_{name}"), speculation)
                stack.enter_context(tensor_method(name, read))
        evaluated = _evaluate_expr(SymNodeVariable.evaluate_expr, speculation)
        stack.enter_context(replaced(SymNodeVariable, "evaluate_expr", evaluated))
        yield
