"""Which tensors of a captured graph share memory, and where a mark has parted them.

A mark returns a copy. Where eager has two names for one piece of memory (``x.detach()``, a view
under `no_grad`), the flat graph may have two tensors, and a write to one would not reach the other.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from rewriter.capture import example_of
from rewriter.stateful import is_wrapped, write_outside

_C: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]

_IN_PLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
    operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul, operator.iand,
    operator.ior, operator.ixor, operator.ilshift, operator.irshift,
}  # fmt: skip


def written_by(node: Node) -> list[Node]:
    """Return the nodes whose tensors a node of the captured graph writes to."""
    found: list[Any] = []
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.target is write_outside:
        found = [node.args[1]]
    elif is_renormalising(node):
        found = [_option(node, "weight")]
    elif (
        node.target in _IN_PLACE
        or (name.endswith("_") and not name.endswith("__"))
        or _option(node, "inplace")
    ):
        found = [node.args[0] if node.args else node.kwargs.get("input")]
    found += pytree.tree_leaves(node.kwargs.get("out"))
    return [item for item in pytree.tree_leaves(found) if isinstance(item, Node)]


def is_renormalising(node: Node) -> bool:
    """Whether a node looks rows up in a table and makes them shorter there, in place."""
    is_lookup = node.target in (F.embedding, F.embedding_bag)
    return is_lookup and _option(node, "max_norm") is not None


def _option(node: Node, name: str) -> Any:
    """Return an option of a call by its name, however it is given."""
    if node.op != "call_function" or not isinstance(node.target, FunctionType):
        return node.kwargs.get(name)
    given = inspect.signature(node.target).bind_partial(*node.args, **node.kwargs)
    return given.arguments.get(name)


def requires_grad(x: Any) -> bool:
    """Whether a fake value carries a gradient at any level of the transforms around it."""
    return any(level.requires_grad for level in _levels(x))


def _levels(x: Any) -> Iterator[Tensor]:
    while isinstance(x, Tensor):
        yield x
        x = _C.get_unwrapped(x) if is_wrapped(x) else None


def storages(node: Node) -> set[int]:
    """Return what memory the value of a node lies in as written."""
    plain = [
        [*_levels(x)][-1] for x in pytree.tree_leaves(example_of(node)) if isinstance(x, Tensor)
    ]
    return {x.untyped_storage()._cdata for x in plain if x.layout is torch.strided}


class Memory:
    """Which values of a captured graph share memory while it is interpreted.

    Attributes:
        owner: Node → the node that first had the memory that its value lies in.
    """

    def __init__(self, graph: Graph) -> None:
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self.at: dict[int, list[Node]] = {}
        self.owner: dict[Node, Node] = {}

    def add(self, node: Node, *, copied: bool) -> None:
        """Take note of a value.

        Args:
            node: The node that made it.
            copied: Whether it is a copy where as written it may share memory with what was read.
        """
        found = storages(node)
        self.owner[node] = node
        if not copied:
            sources = [n for n in node.all_input_nodes if n in self.owner and storages(n) & found]
            self.owner[node] = self.owner[sources[0]] if sources else node
        for storage in found:
            self.at.setdefault(storage, []).append(node)

    def parted(self, node: Node) -> list[tuple[Node, Node]]:
        """Return the values that a write does not reach, and that are read later and have the same
        memory as written: each with what is written to."""
        return [
            (target, other)
            for target in written_by(node)
            for other in {n for storage in storages(target) for n in self.at.get(storage, ())}
            if self.owner.get(other) is not self.owner.get(target) and self._counts(other, node)
        ]

    def _counts(self, other: Node, node: Node) -> bool:
        later = any(self.position[user] > self.position[node] for user in other.users)
        return later or other.op in ("placeholder", "get_attr")

    def is_read_later(self, memory: set[int], node: Node) -> bool:
        """Whether a value in this memory is read after a node, by another one."""
        found = {n for storage in memory for n in self.at.get(storage, ())}
        return any(self._counts(other, node) for other in found)
