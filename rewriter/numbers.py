"""Python numbers in a captured graph: floats that change from call to call, or that the loss reads
from tensors.

They are inputs of the graph, or computed in it, so here they are tensors: of shape () and float64,
as exact as a Python float. Integers that are read from tensors are int64, and only compared and
returned. What is computed with them has the type that it has with a Python
number, which yields to every tensor's; a tensor of shape () yields to those with dimensions alone.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from passes.graph import where
from rewriter.capture import FROM_DATA, MATH, TESTS, example_of, is_numpys
from rewriter.errors import NeedsInteger
from rewriter.memory import written_by

_NUMBER = "python_number"  # in a node's meta: True for a number, False for what is made of some
# A tensor of half precision takes part in an operator as float32, and a number beside it does too.
_HALF = (torch.float16, torch.bfloat16)
_FILLED = {torch.full: 1, torch.full_like: 1, "new_full": 2}
_POWERS = {operator.pow, torch.pow, "pow", "__pow__"}
_ONE_TYPE = {torch.lerp, torch.quantile, torch.nanquantile, "lerp", "quantile", "nanquantile"}


def number_of(x: Tensor) -> Tensor:
    """Do what ``x.item()`` does, without leaving the graph: a constant of shape ()."""
    if x.dtype is torch.bool:
        return x.detach().reshape(())
    kind = torch.float64 if x.dtype.is_floating_point else torch.int64
    return x.detach().reshape(()).to(kind)


def rounded(x: Tensor) -> Tensor:
    """Do what ``int(x)`` does for a number."""
    return x.to(torch.int64)


def fraction(x: Tensor) -> Tensor:
    """Do what ``float(x)`` does for a number."""
    return x.to(torch.float64)


_CONVERSIONS: dict[Any, Callable[..., Any]] = {
    torch.sym_int: rounded,
    torch.sym_float: fraction,
    torch.sym_max: torch.maximum,
    torch.sym_min: torch.minimum,
}
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""Python's functions of numbers, as Dynamo calls them."""


def is_number(node: Node) -> bool:
    """Whether a node of a captured graph is a Python float as written, and a tensor here."""
    return node.meta.get(_NUMBER, False)


def keep_numbers(captured: GraphModule) -> None:
    """Turn ``x.item()`` of floats (also Dynamo's own, for a float argument that changed) into
    `number_of`, and let what is computed with them have the type that it has as written.

    Raises:
        NeedsInteger: An integer is read from a tensor, and sizes depend on it.
    """
    for module in captured.modules():
        if isinstance(module, GraphModule) and _keep_numbers(module, module is not captured):
            module.recompile()


def _keep_numbers(module: GraphModule, is_inner: bool) -> bool:
    """Do it in one graph; return whether it has such numbers."""
    found = False
    for node in list(module.graph.nodes):
        value = example_of(node)
        if isinstance(value, Tensor):
            _take_fractions(node)
        if node.target in _POWERS and len(node.args) == 2:
            _take_exponent(node, *node.args)
        if node.op == "call_method" and node.target == "item":
            read = example_of(node.args[0])  # a constant of the graph has none
            if read is None or not (read.dtype.is_floating_point or _is_told_only(node)):
                raise NeedsInteger("an integer is read from a tensor", where(node))
            node.op, node.target = "call_function", number_of
            node.meta[_NUMBER] = True
        elif node.op == "placeholder":
            if is_inner and isinstance(value, torch.SymFloat):
                node.meta[_NUMBER] = True
        elif node.target in MATH or node.target in TESTS:
            _compute(node)
        elif any(map(is_number, node.all_input_nodes)):
            if isinstance(value, (float, torch.SymFloat, torch.SymInt)):
                _convert(node)
                node.meta[_NUMBER] = True
            elif isinstance(value, Tensor) and not (_NUMBER in node.meta or is_numpys(node)):
                node.meta[_NUMBER] = False  # done: a graph may come here twice
                _promote(node, value)
        found = found or _NUMBER in node.meta
    return found


def _is_told_only(node: Node) -> bool:
    """Whether a number is returned, compared and computed with, and no tensor is made of it."""
    return all(
        user.op == "output"
        or user.meta.get("condition", False)
        or (isinstance(example_of(user), _SYMBOLIC) and _is_told_only(user))
        for user in node.users
    )


def _convert(node: Node) -> None:
    """Let PyTorch do to numbers what Python does."""
    if node.target is operator.truediv:  # of integers too
        for number in filter(is_number, node.all_input_nodes):
            with node.graph.inserting_before(node):
                node.replace_input_with(number, node.graph.call_function(fraction, (number,)))
    if node.target in (torch.sym_max, torch.sym_min):
        with node.graph.inserting_before(node):
            node.args = tuple(_as_number(x, node) for x in node.args)
    node.target = _CONVERSIONS.get(node.target, node.target)


def _as_number(x: Any, user: Node) -> Any:
    """Return a number beside another one: `torch.maximum` takes nothing but tensors."""
    if isinstance(x, Node):
        return x if is_number(x) else _float_of(x, user)
    kind = torch.float64 if isinstance(x, float) else torch.int64
    return user.graph.call_function(torch.scalar_tensor, (x,), {"dtype": kind})


def _take_exponent(node: Node, base: Any, exponent: Any) -> None:
    """Make a number of an exponent that is a symbolic size: PyTorch's derivative of a power asks
    for its value."""
    if not (isinstance(exponent, Node) and isinstance(example_of(exponent), torch.SymInt)):
        return
    value = example_of(base) if isinstance(base, Node) else base
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        node.args = (base, _float_of(exponent, node))


def _take_fractions(node: Node) -> None:
    """Make numbers of floats that are computed from symbolic sizes, such as ``0.1 * n``."""
    for value in node.all_input_nodes:
        if isinstance(example_of(value), torch.SymFloat) and _NUMBER not in value.meta:
            node.replace_input_with(value, _float_of(value, node))


def _float_of(size: Node, user: Node) -> Node:
    """Return a number that is computed from a size."""
    with user.graph.inserting_before(user):
        made = user.graph.call_function(torch.scalar_tensor, (size,), {"dtype": torch.float64})
    made.meta[_NUMBER] = True
    return made


def _compute(node: Node) -> None:
    """Let PyTorch compute a function of a number."""
    (x,) = node.args
    if isinstance(x, Node) and not is_number(x):
        x = _float_of(x, node)
    node.target, node.args = {**MATH, **TESTS}[node.target], (x,)
    node.meta[_NUMBER] = True


def _promote(node: Node, value: Tensor) -> None:
    """Let a tensor that is computed with numbers have the type that it has as written.

    Args:
        node: What computes it.
        value: The tensor as written.
    """
    tensors = [n for n in node.all_input_nodes if isinstance(example_of(n), Tensor)]
    tensors = [n for n in tensors if not is_number(n)]
    if node.target in _FILLED:
        _fill(node, value)
    elif node.target in FROM_DATA:
        _from_data(node, value)
    elif not written_by(node):
        _promote_beside(node, value, tensors)


def _promote_beside(node: Node, value: Tensor, tensors: Sequence[Node]) -> None:
    examples = [example_of(n) for n in tensors]
    floats = [x for x in examples if x.dtype.is_floating_point or x.dtype.is_complex]
    if not floats:
        _cast_numbers(node, torch.get_default_dtype())
    elif node.target in _ONE_TYPE:
        _cast_numbers(node, floats[0].dtype)
    elif not any(x.dim() for x in floats):
        if any(x.dtype in _HALF for x in floats):
            _lift(node, value, tensors)
        else:
            _cast_numbers(node, functools.reduce(torch.promote_types, {x.dtype for x in floats}))


def _cast_numbers(node: Node, dtype: torch.dtype) -> None:
    for number in filter(is_number, node.all_input_nodes):
        with node.graph.inserting_before(node):
            node.replace_input_with(number, _cast(number, dtype))


def _cast(number: Node, dtype: torch.dtype) -> Node:
    """Return the number as a tensor of a type, of its real part where that is complex."""
    cast = number.graph.call_method("to", (number, dtype.to_real()))
    cast.meta = {key: number.meta[key] for key in ("stack_trace",) if key in number.meta}
    return cast


def _lift(node: Node, value: Tensor, tensors: Sequence[Node]) -> None:
    """Give tensors of half precision a dimension: a number beside those is not rounded."""
    for tensor in tensors:
        if not example_of(tensor).dim():
            with node.graph.inserting_before(node):
                row = node.graph.call_method("reshape", (tensor, 1))
            row.meta = dict(tensor.meta)  # which memory it is, and whether it carries a gradient
            node.replace_input_with(tensor, row)
    if not value.dim():
        _replace(node, lambda graph: graph.call_method("reshape", (node, ())))


def _fill(node: Node, value: Tensor) -> None:
    """``full(size, number)`` → ``fill(full(size, 0), number)``."""
    position, name = _FILLED[node.target], "fill_value"
    number = node.args[position] if len(node.args) > position else node.kwargs[name]
    if not (isinstance(number, Node) and is_number(number)):
        return  # a size is computed from it
    node.args = tuple(0 if i == position else x for i, x in enumerate(node.args))
    given = {k: v for k, v in node.kwargs.items() if k != name}
    rest = {} if len(node.args) > position else {name: 0}
    node.kwargs = {**given, **rest, "dtype": value.dtype}
    _replace(node, lambda graph: graph.call_function(torch.fill, (node, number)))


def _from_data(node: Node, value: Tensor) -> None:
    """``tensor([number, 2.0])`` → ``stack([number, 2.0])``, with its type and shape."""
    data, *_ = [*node.args, *(node.kwargs[k] for k in ("data", "obj", "s") if k in node.kwargs)]
    if node.kwargs.get("requires_grad"):
        return
    graph, parts = node.graph, []
    with graph.inserting_before(node):
        for item in pytree.tree_leaves(data):
            if isinstance(item, Node):
                parts.append(graph.call_method("to", (item, value.dtype)))
            else:
                parts.append(graph.call_function(torch.full, ((), item), {"dtype": value.dtype}))
        made = parts[0]
        if isinstance(data, (list, tuple)):
            made = graph.call_function(torch.stack, (parts,))
            made = graph.call_method("reshape", (made, tuple(value.shape)))
        made = graph.call_method("to", (made, value.device))
    _take_place(node, made)
    graph.erase_node(node)


def _replace(node: Node, make: Callable[[Graph], Node]) -> None:
    """Let what is made of a node stand for it wherever it is used."""
    with node.graph.inserting_after(node):
        made = make(node.graph)
    _take_place(node, made)


def _take_place(node: Node, made: Node) -> None:
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
