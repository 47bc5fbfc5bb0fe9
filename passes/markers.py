"""Marks that capture leaves in the flat graph where a derivative begins, ends, or stops.

The flat graph is a functional ATen graph of the loss in which nested derivatives are not computed
but *marked*: a ``gradient`` mark stands for the derivative of tensors that earlier nodes compute.
`passes.nest` turns each mark into one derivative node with a body of its own, so no mark but
``stop`` is ever executed.

| mark | in the user's loss | meaning for the gradients around it |
|---|---|---|
| ``point(x)`` | entry of a `torch.func` transform | identity, and a place to differentiate at |
| ``leaf(x)`` | ``x.detach().requires_grad_()`` | a point, no gradient to ``x`` |
| ``stop(x)`` | ``detach``, results under ``no_grad`` | no gradient to ``x`` |
| ``gradient(outputs, inputs, seeds)`` | ``autograd.grad`` | the inner gradient itself |
| ``tangent(outputs, inputs, vs)`` | `torch.func.jvp` | the same in forward mode |
| ``function(inputs, …)`` | a user's `autograd.Function` | the pullback that the user wrote |

All of them have batching rules, so that `torch.vmap` around a derivative dissolves into plain
tensors while the loss is captured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMESPACE = "optimize_nested"


class NeedsBatchedPoint(NotImplementedError):
    """A point that all samples of a `vmap` share has a derivative per sample; expand it."""


@torch.library.custom_op(f"{NAMESPACE}::stop", mutates_args=())
def stop_mark(x: Tensor) -> Tensor:
    """Return ``x`` as a constant: no derivative of any mode passes."""
    return x.clone()


@torch.library.custom_op(f"{NAMESPACE}::leaf", mutates_args=())
def leaf_mark(x: Tensor) -> Tensor:
    """Return ``x`` as a new leaf: a constant to what lies outside, a point to what lies inside."""
    return x.clone()


@torch.library.custom_op(f"{NAMESPACE}::point", mutates_args=())
def point_mark(x: Tensor, anchors: list[Tensor]) -> Tensor:
    """Return ``x``, a place to differentiate at.

    Args:
        x: The point, any shape.
        anchors: One tensor of shape () per enclosing `vmap`, batched at that level: a point inside
            a `vmap` has a gradient of its own per sample even where its value is shared, so the
            batching rule expands it.
    """
    return x.clone()


@torch.library.custom_op(f"{NAMESPACE}::gradient", mutates_args=())
def gradient_mark(
    outputs: list[Tensor], inputs: list[Tensor], seeds: list[Tensor], seed_dims: int
) -> list[Tensor]:
    """Stand for ``Σ ⟨seed, ∂output/∂input⟩``, one result per input.

    Args:
        outputs: Tensors that are differentiated.
        inputs: The points they are differentiated at.
        seeds: One per output, shape ``(*batch, *output.shape)``.
        seed_dims: How many leading dimensions of the seeds are a batch of seeds; results have the
            same leading dimensions.
    """
    raise AssertionError("a gradient mark reached execution; `passes.nest` replaces all of them")


@torch.library.custom_op(f"{NAMESPACE}::tangent", mutates_args=())
def tangent_mark(
    outputs: list[Tensor], inputs: list[Tensor], directions: list[Tensor], direction_dims: int
) -> list[Tensor]:
    """Stand for ``Σ ∂output/∂input · direction``, one result per output.

    Args:
        outputs: Tensors that are differentiated.
        inputs: The points they are differentiated at.
        directions: One per input, shape ``(*batch, *input.shape)``.
        direction_dims: How many leading dimensions of the directions are a batch of directions;
            results have the same leading dimensions.
    """
    raise AssertionError("a tangent mark reached execution; `passes.nest` replaces all of them")


@torch.library.custom_op(f"{NAMESPACE}::function", mutates_args=())
def function_mark(
    inputs: list[Tensor], sizes: list[int], like: list[Tensor], key: int
) -> list[Tensor]:
    """Stand for a user's `torch.autograd.Function`.

    Args:
        inputs: The tensors it takes.
        sizes: The symbolic sizes it takes, in the order of its arguments.
        like: Tensors such as it returns.
        key: Which function it is, among those of the graph.
    """
    raise AssertionError("a function mark reached execution; `rewriter.flatten` replaces them")


@stop_mark.register_fake
@leaf_mark.register_fake
def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@point_mark.register_fake
def _point_fake(x: Tensor, anchors: list[Tensor]) -> Tensor:
    return torch.empty_like(x)


@gradient_mark.register_fake
def _gradient_fake(
    outputs: list[Tensor], inputs: list[Tensor], seeds: list[Tensor], seed_dims: int
) -> list[Tensor]:
    batch = seeds[0].shape[:seed_dims]
    return [x.new_empty((*batch, *x.shape)) for x in inputs]


@tangent_mark.register_fake
def _tangent_fake(
    outputs: list[Tensor], inputs: list[Tensor], directions: list[Tensor], direction_dims: int
) -> list[Tensor]:
    batch = directions[0].shape[:direction_dims]
    return [u.new_empty((*batch, *u.shape)) for u in outputs]


@function_mark.register_fake
def _function_fake(
    inputs: list[Tensor], sizes: list[int], like: list[Tensor], key: int
) -> list[Tensor]:
    return [torch.empty_like(u) for u in like]


@function_mark.register_vmap
def _function_vmap(info: Any, in_dims: tuple, *arguments: Any) -> Any:
    raise NotImplementedError("a user-defined autograd.Function inside vmap is not understood yet")


@stop_mark.register_vmap
def _stop_vmap(info: Any, in_dims: tuple, x: Tensor) -> tuple[Tensor, int | None]:
    return stop_mark(x), in_dims[0]


@leaf_mark.register_vmap
def _leaf_vmap(info: Any, in_dims: tuple, x: Tensor) -> tuple[Tensor, int | None]:
    return leaf_mark(x), in_dims[0]


def _batch_first(x: Tensor, dim: int | None, size: int, at: int = 0) -> Tensor:
    """Move the batch dimension of ``x`` to position ``at``, expanding a tensor that has none."""
    if dim is not None:
        return x.movedim(dim, at)
    return x.unsqueeze(at).expand(*x.shape[:at], size, *x.shape[at:])


@point_mark.register_vmap
def _point_vmap(info: Any, in_dims: tuple, x: Tensor, anchors: list[Tensor]) -> tuple[Tensor, int]:
    x_dim, anchor_dims = in_dims
    outer = [anchor for anchor, dim in zip(anchors, anchor_dims, strict=True) if dim is None]
    return point_mark(_batch_first(x, x_dim, info.batch_size), outer), 0


@gradient_mark.register_vmap
def _gradient_vmap(
    info: Any,
    in_dims: tuple,
    outputs: list[Tensor],
    inputs: list[Tensor],
    seeds: list[Tensor],
    seed_dims: int,
) -> tuple[list[Tensor], list[int]]:
    """Peel one `vmap` level.

    Points batched at this level: samples are independent, so the gradient of the whole batch with
    every seed in place *is* the per-sample gradient. Points not batched: only the seeds are (a
    Jacobian's rows), one more leading seed dimension.
    """
    output_dims, point_dims, seed_batch, _ = in_dims
    size = info.batch_size
    if all(dim is None for dim in point_dims):
        if any(dim is not None for dim in output_dims):
            raise NeedsBatchedPoint("a derivative inside vmap at a point outside of that vmap")
        rows = [_batch_first(s, d, size) for s, d in zip(seeds, seed_batch, strict=True)]
        return gradient_mark(outputs, inputs, rows, seed_dims + 1), [0] * len(inputs)
    if any(dim is None for dim in point_dims):
        raise NotImplementedError("points of one derivative, some batched by vmap and some not")
    placed = []
    for output_dim, seed, dim in zip(output_dims, seeds, seed_batch, strict=True):
        if output_dim is None:
            raise NotImplementedError("a derivative of something that vmap does not batch")
        placed.append(_batch_first(seed, dim, size, at=seed_dims + output_dim))
    return gradient_mark(outputs, inputs, placed, seed_dims), [seed_dims + d for d in point_dims]


@tangent_mark.register_vmap
def _tangent_vmap(
    info: Any,
    in_dims: tuple,
    outputs: list[Tensor],
    inputs: list[Tensor],
    directions: list[Tensor],
    direction_dims: int,
) -> tuple[list[Tensor], Any]:
    """Peel one `vmap` level.

    Points batched at this level: samples are independent, one pass serves all. Only directions
    batched (a Jacobian's columns): one more leading dimension. Only outputs batched: the body
    reads something batched, and one direction serves all samples.
    """
    output_dims, point_dims, direction_batch, _ = in_dims
    size = info.batch_size
    if all(dim is None for dim in point_dims):
        if all(dim is None for dim in direction_batch):
            results = tangent_mark(outputs, inputs, directions, direction_dims)
            return results, [None if d is None else direction_dims + d for d in output_dims]
        if any(dim is not None for dim in output_dims):
            raise NeedsBatchedPoint("a direction per sample at a point that all samples share")
        columns = [
            _batch_first(v, d, size) for v, d in zip(directions, direction_batch, strict=True)
        ]
        return tangent_mark(outputs, inputs, columns, direction_dims + 1), [0] * len(outputs)
    if any(dim is None for dim in (*point_dims, *output_dims)):
        raise NotImplementedError("a derivative inside vmap of which only a part is batched")
    placed = [
        _batch_first(v, d, size, at=direction_dims + point_dim)
        for v, d, point_dim in zip(directions, direction_batch, point_dims, strict=True)
    ]
    results = tangent_mark(outputs, inputs, placed, direction_dims)
    return results, [direction_dims + dim for dim in output_dims]


STOP = torch.ops.optimize_nested.stop.default
LEAF = torch.ops.optimize_nested.leaf.default
POINT = torch.ops.optimize_nested.point.default
GRADIENT = torch.ops.optimize_nested.gradient.default
TANGENT = torch.ops.optimize_nested.tangent.default
FUNCTION = torch.ops.optimize_nested.function.default

# The marks that stand for something else and cannot run.
MARKS = (LEAF, POINT, GRADIENT, TANGENT)


def stop(x: Tensor) -> Tensor:
    """Return ``x`` as a constant.

    ``detach`` stops reverse mode here and is dropped from traced graphs as an alias; the mark
    stays, so that a later forward mode pass over the traced graph stops at the same place.
    """
    return STOP(x.detach())
