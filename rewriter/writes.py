"""Writes to tensors that carry a gradient, as values: ``p.add_(…)`` under `no_grad`, ``p.data``.

As written, such a write changes what a tensor holds, and nothing about what it is to derivatives:
``p`` stays the same leaf. In a functional graph its new value is

    stop(new) + (p - stop(p))

whose derivative with respect to ``p`` is one. A tensor that is detached from it, and shares its
memory, has the same new value as a constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from passes.graph import where
from passes.markers import stop_mark
from rewriter.capture import example_of
from rewriter.data import set_data
from rewriter.errors import CaptureError
from rewriter.memory import Memory, is_renormalising, requires_grad, storages, written_by

SHARES = "an in-place write to a tensor that shares memory with a detached one"
BEHIND = (
    "a write through `.data` to a tensor whose earlier value the loss is differentiated through: "
    "PyTorch takes the later value there, without an error"
)


class Writes:
    """The values that writes leave behind, while a captured graph is interpreted.

    Attributes:
        points: Identity of a tensor that is written to → the leaf that it is to derivatives.
    """

    def __init__(self, graph: Graph, memory: Memory) -> None:
        self.memory = memory
        self.points: dict[int, Tensor] = {}
        self._raw: dict[Node, tuple[Tensor, Tensor]] = {}
        self._written: set[Node] = set()
        self._joined: list[tuple[set[int], set[int]]] = []
        self._at: set[int] = set()
        for node in graph.nodes:
            for target in self.targets(node):
                self._at |= storages(target)

    @staticmethod
    def targets(node: Node) -> list[Node]:
        """Return the nodes whose tensors a node gives new values by a write."""
        if is_renormalising(node):
            return []
        if node.target is set_data:
            return [x for x in node.args[:1] if isinstance(x, Node)]
        return written_by(node)

    def leaf(self, node: Node, value: Tensor) -> Tensor:
        """Return a leaf's value as a tensor that may be written to, and is the same leaf to
        derivatives afterwards."""
        if not storages(node) & self._at:
            return value
        own = value.clone()
        self.points[id(own)] = value
        self._raw[node] = value, own
        return own

    def point(self, x: Any) -> Any:
        """Return what a derivative with respect to a tensor is one with respect to."""
        return self.points.get(id(x), x)

    def set(self, x: Tensor, new: Tensor) -> None:
        """Give a tensor that carries a gradient a new value."""
        leaf = self.point(x)
        x.copy_(stop_mark(new) + (leaf - stop_mark(leaf)))

    def note(self, node: Node) -> None:
        """Take note that a value was written to."""
        self._written.add(node)

    def finish(self) -> None:
        """Write to the inputs what they hold at the end."""
        for node, (value, own) in self._raw.items():
            if node.op == "placeholder" and node in self._written:
                value.copy_(stop_mark(own))

    def join(self, node: Node, source: Node) -> None:
        """Take note that two values share memory from now on."""
        self._joined.append((storages(node), storages(source)))

    def check_joined(self, node: Node) -> None:
        """Check that no write reaches a value that is joined with what is written to.

        Raises:
            CaptureError: It does.
        """
        at = {storage for target in self.targets(node) for storage in storages(target)}
        for pair in self._joined:
            for one, other in (pair, pair[::-1]):
                if at & one and self.memory.is_read_later(other, node):
                    raise CaptureError(SHARES, where(node))

    def check_behind(self, node: Node, targets: Iterable[Node]) -> None:
        """Check that nothing is differentiated later through what was computed from an earlier
        value: a write that autograd does not see changes what its graph holds.

        Raises:
            CaptureError: It is.
        """
        now = self.memory.position[node]
        at = {storage for target in targets for storage in storages(target)}
        waiting = [
            user
            for storage in at
            for each in self.memory.at.get(storage, ())
            for user in each.users
            if self.memory.position[user] < now
        ]
        seen: set[Node] = set()
        while waiting:
            each = waiting.pop()
            if each in seen:
                continue
            seen.add(each)
            later = self.memory.position[each] > now
            if later and (each.op == "output" or each.target is torch.autograd.grad):
                raise CaptureError(BEHIND, where(node))
            if _carries(each):
                waiting += each.users


def _carries(node: Node) -> bool:
    return any(requires_grad(x) for x in pytree.tree_leaves(example_of(node)))


def same_place(one: Node, other: Node) -> bool:
    """Whether two values are the same numbers of one memory."""
    return _place(example_of(one)) == _place(example_of(other))


def _place(x: Tensor) -> Sequence[Any]:
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype


def is_part(part: Node, whole: Node) -> bool:
    """Whether a value is a part of the memory of another one, which is contiguous."""
    x, y = example_of(part), example_of(whole)
    if x.untyped_storage()._cdata != y.untyped_storage()._cdata or not y.is_contiguous():
        return False
    first = x.storage_offset() - y.storage_offset()
    last = first + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return bool(x.dtype == y.dtype and x.numel() > 0 and first >= 0 and last < y.numel())


def with_part(whole: Tensor, new: Tensor, part: Node, of: Node) -> Tensor:
    """Return a value with new numbers in a part of it, as a constant."""
    x, y = example_of(part), example_of(of)
    places = torch.arange(y.numel(), device=y.device)
    places = places.as_strided(x.shape, x.stride(), x.storage_offset() - y.storage_offset())
    flat = stop_mark(whole).reshape(-1)
    return flat.index_put((places.reshape(-1),), stop_mark(new).reshape(-1)).view(whole.shape)
