"""Compute many directions some at a time, where only sums over them are wanted.

    Σₖ f(vₖ) = Σ_{k ∈ 1st part} f(vₖ) + Σ_{k ∈ 2nd part} f(vₖ) + …

A Laplacian's directions go through a network as one batch, layer by layer, and of each layer only
``Σₖ ż²`` is read. The work is the same in parts, and memory is that of one part. Each part waits
for the sums of the part before: compilers would put equal loops of all parts together, and keep
them all alive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes.bytes import memory_owners, size_in_bytes
from passes.graph import aten, drop_dead, finish, is_random, reaches, value_of
from passes.kernels import is_product
from passes.order import sort_nodes
from passes.origin import mark_of
from passes.simplify.emit import call

MOST_PARTS = 8
LEAST_PARTS = 4  # fewer save little
# Of the largest value of a part: what a core's cache holds, what keeps a GPU busy.
BYTES = 2**18
BYTES_ON_GPU = 2**28

_RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}
_COPIES = {aten.clone.default, aten._to_copy.default}
_REDUCTIONS = {aten.sum.dim_IntList, aten.mean.dim}


class _NotInParts(Exception):
    """A value that is computed for all directions at once."""


@dataclass
class _Region:
    """What is computed for each of ``count`` directions, and summed over them.

    Attributes:
        count: How many directions.
        axes: Node → the dimension whose outermost factor the directions are.
        sources: Those of them that are there for all directions, and are sliced.
        whole: What is read that does not depend on the direction.
        ends: Sums over the directions.
    """

    count: int
    axes: dict[Node, int] = field(default_factory=dict)
    sources: set[Node] = field(default_factory=set)
    whole: set[Node] = field(default_factory=set)
    ends: dict[Node, None] = field(default_factory=dict)

    def add_end(self, end: Node, dim: int) -> None:
        """Add a sum, what it is computed from, and all else that is computed from that.

        Raises:
            _NotInParts: One of these values is read for all directions at once.
        """
        self.ends[end] = None
        stack: list[tuple[Any, int]] = [(end.args[0], dim)]
        while stack:
            node, axis = stack.pop()
            if node in self.axes:
                if self.axes[node] != axis:
                    raise _NotInParts
                continue
            self.axes[node] = axis
            read = _reads(node, axis, self.count)
            if read is None:
                self.sources.add(node)
                continue
            stack += [(source, its_axis) for source, its_axis in read if its_axis is not None]
            self.whole.update(source for source, its_axis in read if its_axis is None)
            for user in node.users:
                if _is_sum_over(user, axis, self.count):
                    self.ends[user] = None
                else:
                    stack.append((user, _axis_after(user, node, axis, self.count)))

    @property
    def computed(self) -> list[Node]:
        """What is computed in parts, in the graph's order."""
        return sorted(node for node in self.axes if node not in self.sources)


def in_parts(module: GraphModule) -> int:
    """Compute directions in parts where their values are large; return how many values are.

    Args:
        module: A functional ATen graph, changed in place. Sizes that are symbols stay as they are.
    """
    found = 0
    for end in module.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        # Another sum's region may have had this one in it, and left it without users.
        region = _region_of(module, end) if end.users else None
        if region is None:
            continue
        largest = max(size_in_bytes(value_of(node)) for node in region.computed)
        on_cpu = value_of(end).is_cpu
        n = min(int(largest) // (BYTES if on_cpu else BYTES_ON_GPU), MOST_PARTS, region.count)
        if n >= LEAST_PARTS:
            found += len(region.computed)
            _split(module.graph, region, n)
            sort_nodes(module.graph)
    if found:
        drop_dead(module.graph)
        finish(module)
    return found


def _region_of(module: GraphModule, end: Node) -> _Region | None:
    """Return what a sum is over, if it can be computed in parts."""
    for dim in _summed(end):
        count = _shape(end.args[0])[dim]
        if not isinstance(count, int) or count < LEAST_PARTS:
            continue
        region = _Region(count)
        try:
            region.add_end(end, dim)
            _check(region, memory_owners(module))
        except _NotInParts:
            continue
        return region
    return None


def _check(region: _Region, owners: dict[Node, Node]) -> None:
    """Check that parts are worth it, and that one can follow the other.

    Raises:
        _NotInParts: They are not, or it cannot.
    """
    computed = region.computed
    values = [value_of(node) for node in (*region.axes, *region.whole, *region.ends)]
    tensors = [x for x in values if isinstance(x, Tensor)]
    if any(not isinstance(size, int) for x in tensors for size in x.shape):
        raise _NotInParts
    products = [node for node in computed if is_product(node)]
    # The samples of a batch are such directions too: a user who has many of them makes parts.
    if not products or any(mark_of(node).role == "primal" for node in products):
        raise _NotInParts
    if region.whole & set(computed) or reaches(region.ends) & {*region.whole, *region.sources}:
        raise _NotInParts
    if any(value_of(end).numel() == 0 for end in region.ends):
        raise _NotInParts
    made = [node for node in region.sources if owners[node].op == "call_function"]
    if any(size_in_bytes(value_of(node)) > BYTES for node in made):
        raise _NotInParts


def _split(graph: Graph, region: _Region, n: int) -> None:
    """Put ``n`` parts, one after the other, in the place of the whole."""
    step = -(-region.count // n)
    totals: dict[Node, Node] = {}
    with graph.inserting_before(graph.output_node()):
        for first in range(0, region.count, step):
            last = min(first + step, region.count)
            made: dict[Node, Node] = {}
            barrier = _barrier(graph, list(totals.values())) if totals else None
            for node in region.sources:
                axis = region.axes[node]
                inner = _shape(node)[axis] // region.count
                piece = call(
                    graph, aten.slice.Tensor, (node, axis, first * inner, last * inner), {}, node
                )
                if barrier is not None:
                    piece = call(graph, aten.masked_fill.Scalar, (piece, barrier, 0), {}, node)
                made[node] = piece
            for node in sorted([*region.computed, *region.ends]):
                made[node] = _for_part(graph, node, region, last - first, made)
                if node in region.ends and node in totals:
                    made[node] = call(graph, aten.add.Tensor, (totals[node], made[node]), {}, node)
            totals = {end: made[end] for end in region.ends}
    for end, total in totals.items():
        end.replace_all_uses_with(total)


def _barrier(graph: Graph, totals: Sequence[Node]) -> Node:
    """Return a scalar that is false whatever these values are, and known when they are."""
    total: Node | None = None
    for node in totals:
        one = call(graph, aten.reshape.default, (node, [-1]), {}, node)
        one = call(graph, aten.select.int, (one, 0, 0), {}, node)
        total = one if total is None else call(graph, aten.add.Tensor, (total, one), {}, node)
    assert total is not None
    same = call(graph, aten.eq.Tensor, (total, total), {}, total)
    other = call(graph, aten.ne.Tensor, (total, total), {}, total)  # it is no number
    return call(graph, aten.logical_and.default, (same, other), {}, total)


def _for_part(
    graph: Graph, node: Node, region: _Region, count: int, made: dict[Node, Node]
) -> Node:
    target: Any = node.target
    args: Any = node.args
    if target in _RESHAPES or target is aten.expand.default:
        axis, size = region.axes[node], list(_shape(node))
        size[axis] = size[axis] // region.count * count
        args = (node.args[0], size)
        target = target if target is aten.expand.default else aten.reshape.default
    args, kwargs = torch.fx.map_arg((args, node.kwargs), lambda n: made.get(n, n))
    return call(graph, target, args, kwargs, node)


def _summed(node: Node) -> list[int]:
    """Return the dimensions that a sum or a mean is over."""
    shape = _shape(node.args[0])
    dims: Any = node.args[1] if len(node.args) > 1 else None  # none of them means all
    return [dim % len(shape) for dim in dims or range(len(shape))] if shape else []


def _is_sum_over(node: Node, dim: int, count: int) -> bool:
    """Whether a node is a sum over a dimension that has nothing but the directions."""
    if node.target is not aten.sum.dim_IntList:
        return False
    return dim in _summed(node) and _shape(node.args[0])[dim] == count


def _axis_after(user: Node, node: Node, axis: int, count: int) -> int:
    """Return the dimension that holds the directions in what is computed from a node."""
    if user.op == "call_function" and isinstance(value_of(user), Tensor):
        for dim in range(value_of(user).dim()):
            if (node, axis) in (_reads(user, dim, count) or ()):
                return dim
    raise _NotInParts


def _shape(node: Any) -> Sequence[int]:
    return value_of(node).shape


def _reads(node: Node, axis: int, count: int) -> list[tuple[Node, int | None]] | None:
    """Return what the directions of a value are computed from: nodes, with the dimension whose
    outermost factor their directions are, None where they do not depend on it; None for a value
    that is not computed direction by direction."""
    target = node.target
    shape = _shape(node)
    if node.op != "call_function" or is_random(node):
        return None
    if not isinstance(shape[axis], int) or shape[axis] % count:
        return None
    read: list[Any] = [item for item in node.args if isinstance(item, Node)]
    tags = getattr(target, "tags", ())
    if torch.Tag.pointwise in tags or target in _COPIES or target is aten.expand.default:
        return [(item, _aligned(item, axis, len(shape))) for item in node.all_input_nodes]
    if target is aten.mm.default:
        return list(zip(read, (0, None) if axis == 0 else (None, 1), strict=True))
    if target is aten.addmm.default:
        axes = (0, None) if axis == 0 else (None, 1)
        return [(read[0], _aligned(read[0], axis, 2)), *zip(read[1:], axes, strict=True)]
    if target is aten.bmm.default:
        return list(zip(read, ((0, 0), (1, None), (None, 2))[axis], strict=True))
    if target in _RESHAPES:
        found = _before_reshape(_shape(read[0]), shape, axis, count)
        return None if found is None else [(read[0], found)]
    if target is aten.unsqueeze.default:
        dim = int(node.args[1]) % len(shape)  # pyright: ignore[reportArgumentType]
        return None if dim == axis else [(read[0], axis - (dim < axis))]
    if target is aten.permute.default:
        dims: Any = node.args[1]
        return [(read[0], dims[axis] % len(shape))]
    if target in _REDUCTIONS:
        keeps = len(shape) == len(_shape(read[0]))
        summed = _summed(node)
        left = [d for d in range(len(_shape(read[0]))) if keeps or d not in summed]
        return None if left[axis] in summed else [(read[0], left[axis])]
    return None


def _aligned(node: Node, axis: int, rank: int) -> int | None:
    """Return the dimension of an operand that an operator broadcasts to a dimension of its result;
    None if the operand is the same along it."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return None
    dim = axis - (rank - value.dim())
    return None if dim < 0 or value.shape[dim] == 1 else dim


def _before_reshape(old: Sequence[int], new: Sequence[int], axis: int, count: int) -> int | None:
    """Return the dimension of the old shape whose outermost factor is that of a dimension of the
    new shape."""
    before = math.prod(new[:axis])
    for dim, size in enumerate(old):
        if before == 1 and size % count == 0:
            return dim
        if not size or before % size:
            return None
        before //= size
    return None
