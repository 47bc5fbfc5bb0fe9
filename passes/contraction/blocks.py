"""Jacobians of whole batches, of which only the blocks on the diagonal are not zero.

Where rows are apart, ``∂f[n, o]/∂x[m, i]`` is zero for ``n ≠ m``. A function that leaves zeros
alone then has to be applied to the blocks only, if what it gives is summed over ``m``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes import derivative
from passes.contraction.constants import Constants, is_identity
from passes.contraction.raising import Raised
from passes.graph import are_equal, arguments, drop_dead, value_of
from passes.nest import sites
from passes.simplify.emit import call
from passes.simplify.filled import RESHAPES

aten = torch.ops.aten
_SAME = {aten.alias.default, aten.clone.default}
_SPLITS = {aten.split_with_sizes.default, aten.split.Tensor}
_SUMS = {aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim}
# Zero where their argument is.
_ZERO_AT_ZERO = {
    aten.abs.default, aten.neg.default, aten.relu.default, aten.tanh.default, aten.sin.default,
    aten.sgn.default, aten.sign.default, *_SAME,
}  # fmt: skip


def unflatten(module: GraphModule) -> int:
    """Give unit vectors, which are numbered through as one batch, the dimensions of what they are
    unit vectors in, and drop the reshapes that do the same to the result.

    ``gradient(f, x, eye(N·O) as [N·O, N, O]) : [N·O, N, I] → [N, O, N, I]``.

    Args:
        module: A derivative graph; changed in place, not recompiled.

    Returns:
        How many derivative nodes were changed.
    """
    constants = Constants(module.graph)
    changed = 0
    for node in sites(module):
        if node.target not in (derivative.gradient, derivative.tangent):
            continue
        body, n_points, n_outputs, n_batch, *inputs = arguments(node)
        units = value_of(inputs[-1])
        shape = list(units.shape[1:])
        known = constants.value(inputs[-1])
        if (n_points, n_outputs, n_batch) != (1, 1, 1) or len(shape) < 2 or known is None:
            continue
        if known.shape[0] != math.prod(shape) or not is_identity(known, 1):
            continue
        with module.graph.inserting_before(node):
            shapes = [*shape, *shape]
            inputs[-1] = call(
                module.graph, aten.reshape.default, (inputs[-1], shapes), {}, inputs[-1]
            )
        before = value_of(node)[0]
        after = before.reshape(*shape, *before.shape[1:])
        node.args = (body, 1, 1, len(shape), *inputs)
        node.meta["val"] = (after, *value_of(node)[1:])
        for item in [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]:
            item.meta["val"] = after
            with module.graph.inserting_after(item):
                flat = call(
                    module.graph, aten.reshape.default, (item, list(before.shape)), {}, item
                )
            item.replace_all_uses_with(flat, delete_user_cb=lambda user, new=flat: user is not new)
            rest = [[at] for at in range(len(shape), after.dim())]
            _regroup(flat, item, [[*range(len(shape))], *rest])
        changed += 1
    drop_dead(module.graph)
    return changed


def _regroup(node: Node, whole: Node, groups: list[list[int]]) -> None:
    """Make permutations of reshapes that take apart what was joined.

    Args:
        node: What has dimensions joined.
        whole: The tensor that it is made of.
        groups: For each dimension of ``node`` those of ``whole`` that it joins.
    """
    shape = value_of(whole).shape
    order = [at for group in groups for at in group]
    for user in list(node.users):
        if user.target in RESHAPES and are_equal(value_of(user).shape, [shape[at] for at in order]):
            with user.graph.inserting_before(user):
                turned = call(user.graph, aten.permute.default, (whole, order), {}, user)
            user.replace_all_uses_with(turned)
            continue
        dims = _permuted(user, len(groups))
        if dims is not None:
            _regroup(user, whole, [groups[at] for at in dims])
        elif user.target in _SPLITS and len(value_of(user)) == 1:
            for item in user.users:
                _regroup(item, whole, groups)


def _permuted(node: Node, rank: int) -> list[int] | None:
    """Return the order of dimensions that a node puts its argument in; None if it does more."""
    order = list(range(rank))
    if node.target in _SAME:
        return order
    if node.target in (aten.expand.default, *RESHAPES):
        same = are_equal(value_of(node).shape, value_of(arguments(node)[0]).shape)
        return order if same else None
    if node.target is aten.permute.default:
        return [at % rank for at in arguments(node)[1]]
    if node.target is aten.transpose.int:
        a, b = arguments(node)[1:]
        order[a], order[b] = order[b], order[a]
        return order
    return None


def sum_blocks_only(raised: Raised) -> int:
    """``Σ g(J[n, o, m, i]) → Σ g(J[n, o, n, i])`` where the sum is over m and ``g(0) = 0``.

    Args:
        raised: A derivative graph, changed in place and not recompiled, as expressions.

    Returns:
        How many sums were changed.
    """
    changed = 0
    for node, expression in list(raised.expressions.items()):
        dims = expression.dims
        pairs = [
            (a, b)
            for b, index in enumerate(dims)
            for a in range(b)
            if index is not None and dims[a] == index
        ]
        if len(pairs) != 1:
            continue
        (kept, gone), rank = pairs[0], len(dims)
        others = [user for user in node.users if user not in raised.expressions]
        if not others:
            continue
        with node.graph.inserting_after(node):
            blocks = call(node.graph, aten.diagonal.default, (node, 0, kept, gone), {}, node)
        # The index of the diagonal is the last one.
        order = [*range(kept), rank - 2, *range(kept, rank - 2)]
        with node.graph.inserting_after(blocks):
            blocks = call(node.graph, aten.permute.default, (blocks, order), {}, node)
        changed += sum(_changed(user, node, blocks, gone) for user in others)
    return changed


def _changed(user: Node, whole: Node, blocks: Node, gone: int) -> int:
    """Compute a sum of a function from blocks; return how many there are."""
    args: Any = user.args
    graph = user.graph
    with graph.inserting_before(user):
        if user.target in _SUMS or user.target is aten.linalg_vector_norm.default:
            found = _reduced(user, blocks, gone, value_of(whole))
            if found is None:
                return 0
            user.replace_all_uses_with(found)
            return 1
        if not _is_zero_at_zero(user, whole):
            return 0
        new = [blocks if item is whole else item for item in args]
        own = call(graph, user.target, new, user.kwargs, user)
    return sum(_changed(after, user, own, gone) for after in list(user.users))


def _is_zero_at_zero(node: Node, whole: Node) -> bool:
    args: Any = node.args
    if node.target is aten.pow.Tensor_Scalar:
        return args[1] > 0
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        numbers = isinstance(args[1], (int, float)) and not node.kwargs
        return numbers or (node.target is aten.mul.Tensor and args == (whole, whole))
    return node.target in _ZERO_AT_ZERO


def _reduced(node: Node, blocks: Node, gone: int, whole: Tensor) -> Node | None:
    """Return a sum, mean or norm over the dimension that blocks have not, computed from them."""
    args: Any = node.args
    is_norm = node.target is aten.linalg_vector_norm.default
    at = 2 if is_norm else 1
    dims: Sequence[int] | None = args[at] if len(args) > at else None
    over = {d % whole.dim() for d in dims} if dims else set(range(whole.dim()))
    keeps = len(args) > at + 1 and args[at + 1]
    order = args[1] if is_norm and len(args) > 1 else 2
    if gone not in over or keeps or node.kwargs or order <= 0:
        return None
    left = [d - (d > gone) for d in sorted(over) if d != gone]
    if is_norm:
        return call(node.graph, node.target, (blocks, order, left), {}, node)
    if not left:
        total = blocks
    else:
        total = call(node.graph, aten.sum.dim_IntList, (blocks, left), {}, node)
    if node.target in (aten.sum.default, aten.sum.dim_IntList):
        return total
    sizes = [whole.shape[d] for d in over]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return call(node.graph, aten.div.Tensor, (total, math.prod(sizes)), {}, node)
