"""`torch.autograd.functional`, written so that Dynamo can trace it.

Each function does what its namesake does, with one `torch.autograd.grad` node where the original
loops over rows; Dynamo inlines it in the namesake's place. Options that only say how to compute
(``vectorize``, ``strategy``, ``outer_jacobian_strategy``) change nothing: the chooser decides that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import functional
from torch.utils._pytree import tree_map


def _as_tuple(tensors: Any) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def _points(inputs: Any, create_graph: bool) -> tuple[Tensor, ...]:
    """Return what to differentiate at: the inputs themselves if their graph is to be kept."""
    return tuple(
        x.view_as(x) if create_graph and x.requires_grad else x.detach().requires_grad_()
        for x in _as_tuple(inputs)
    )


def _kept(values: Any, create_graph: bool) -> Any:
    if create_graph:
        return values
    if isinstance(values, Tensor):
        return values.detach()
    return tuple(_kept(value, create_graph) for value in values)


def _grads(
    outputs: Any, points: tuple[Tensor, ...], seeds: Any, create_graph: bool, strict: bool
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        outputs,
        points,
        seeds,
        create_graph=create_graph,
        retain_graph=True,
        materialize_grads=not strict,
    )


def _like(result: tuple[Tensor, ...], inputs: Any) -> Any:
    return result[0] if isinstance(inputs, Tensor) else result


def vjp(
    func: Callable[..., Any], inputs: Any, v: Any = None, create_graph: bool = False,
    strict: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """Return ``func(inputs)`` and ``⟨v, ∂func/∂inputs⟩``."""
    with torch.enable_grad():
        points = _points(inputs, create_graph)
        outputs = func(*points)
        seeds = None if v is None else _as_tuple(v)
        grads = _grads(_as_tuple(outputs), points, seeds, create_graph, strict)
        return _kept(outputs, create_graph), _like(grads, inputs)


def jvp(
    func: Callable[..., Any], inputs: Any, v: Any = None, create_graph: bool = False,
    strict: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """Return ``func(inputs)`` and ``∂func/∂inputs · v``."""
    with torch.enable_grad():
        primals = _as_tuple(inputs)
        directions = tuple(torch.ones_like(x) for x in primals) if v is None else _as_tuple(v)
        both: Any = torch.func.jvp(func, primals, directions)
        outputs, moved = both
        return _kept(outputs, create_graph), _kept(moved, create_graph)


def jacobian(
    func: Callable[..., Any], inputs: Any, create_graph: bool = False, strict: bool = False,
    vectorize: bool = False, strategy: str = "reverse-mode",
) -> Any:  # fmt: skip
    """Return ``∂func/∂inputs``, shape ``(*output.shape, *input.shape)`` per output and input."""
    with torch.enable_grad():
        points = _points(inputs, create_graph)
        outputs = func(*points)
        rows = []
        for u in _as_tuple(outputs):
            n = u.numel()
            seeds = torch.eye(n, dtype=u.dtype, device=u.device).reshape(n, *u.shape)
            grads = torch.autograd.grad(
                u,
                points,
                seeds,
                create_graph=create_graph,
                retain_graph=True,
                is_grads_batched=True,
                materialize_grads=not strict,
            )
            pairs = zip(grads, points, strict=True)
            rows.append(_like(tuple(_block(g, u, x) for g, x in pairs), inputs))
        return rows[0] if isinstance(outputs, Tensor) else tuple(rows)


def _block(g: Tensor, u: Tensor, x: Tensor) -> Tensor:
    """Return ``∂u/∂x`` from its rows; where ``u`` does not depend on ``x`` there is one zero for
    all of them."""
    if g.dim() == x.dim():
        g = g.expand(u.numel(), *x.shape)
    return g.reshape(*u.shape, *x.shape)


def _gradient_of(func: Callable[..., Any], strict: bool) -> Callable[..., tuple[Tensor, ...]]:
    def gradient(*points: Tensor) -> tuple[Tensor, ...]:
        return _grads(func(*points), points, None, True, strict)

    return gradient


def hessian(
    func: Callable[..., Any], inputs: Any, create_graph: bool = False, strict: bool = False,
    vectorize: bool = False, outer_jacobian_strategy: str = "reverse-mode",
) -> Any:  # fmt: skip
    """Return ``∂²func/∂inputs²`` of a scalar function."""
    blocks = jacobian(_gradient_of(func, strict), _as_tuple(inputs), create_graph, strict)
    return blocks[0][0] if isinstance(inputs, Tensor) else blocks


def hvp(
    func: Callable[..., Any], inputs: Any, v: Any = None, create_graph: bool = False,
    strict: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """Return ``func(inputs)`` and its Hessian times ``v``."""
    with torch.enable_grad():
        points = _points(inputs, create_graph)
        output = func(*points)
        first = _grads(output, points, None, True, strict)
        directions = tuple(torch.ones_like(x) for x in points) if v is None else _as_tuple(v)
        second = _grads(first, points, directions, create_graph, strict)
        return _kept(output, create_graph), _like(second, inputs)


def linearize(func: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """Return ``func(*primals)`` and ``t ↦ ∂func/∂primals · t``, evaluated once: the pullback is
    linear in its cotangent, and its own pullback is the tangent map.

    PyTorch's function returns a tangent map that is a constant to every outer derivative; this one
    is differentiable, as `torch.func.jvp` is.
    """
    made: Any = torch.func.vjp(func, *primals)
    output, pullback = made
    zeros = tree_map(torch.zeros_like, output)

    def tangent_map(*tangents: Any) -> Any:
        transposed: Any = torch.func.vjp(pullback, zeros)
        return transposed[1](tangents)[0]

    return output, tangent_map


def jvp_by_pullbacks(
    func: Callable[..., Any], primals: tuple, tangents: tuple, argnums: Any = None, *,
    strict: bool = False, has_aux: bool = False,
) -> Any:  # fmt: skip
    """Do what `torch._functorch.eager_transforms._jvp_with_argnums` does, by two pullbacks.

    It stands in where Dynamo cannot trace forward mode: some of it inside of itself.
    """
    moving = range(len(primals)) if argnums is None else argnums
    moving = (moving,) if isinstance(moving, int) else tuple(moving)

    def at(*points: Any) -> Any:
        arguments = list(primals)
        for position, point in zip(moving, points, strict=True):
            arguments[position] = point
        return func(*arguments)

    made: Any = torch.func.vjp(at, *[primals[i] for i in moving], has_aux=has_aux)
    output, pullback, *aux = made
    transposed: Any = torch.func.vjp(pullback, tree_map(torch.zeros_like, output))
    return (output, transposed[1](tuple(tangents))[0], *aux)


def without_a_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do what `functools.wraps` does for a transform, but for the name: a `functools.partial` has
    none, and Dynamo cannot trace how its other attributes are copied."""

    def same(wrapper: Callable[..., Any]) -> Callable[..., Any]:
        return wrapper

    return same


def standard_bases(
    tensors: Sequence[Tensor], numels: Sequence[int], chunk_size: int | None = None
) -> list[tuple[Tensor, ...]]:
    """Do what `torch._functorch.eager_transforms._chunked_standard_basis_for_` does, which before
    2.13 reads from a tensor where the diagonals are."""
    total = sum(numels)
    chunks = [(0, total)]
    if chunk_size is not None:
        chunks = [(i, min(chunk_size, total - i)) for i in range(0, total, chunk_size)]
    bases = []
    for first, rows in chunks:
        start, basis = first, []
        for x, n in zip(tensors, numels, strict=True):
            chunk = x.new_zeros(rows, n)
            chunk.diagonal(start).fill_(1)
            basis.append(chunk.view(rows, *x.shape))
            start -= n
        bases.append(tuple(basis))
    return bases


def accumulate_gradients(
    outputs: Any, leaves: tuple[Tensor, ...], gradients: Any, create_graph: bool
) -> None:
    """Do what `torch.autograd.backward` does: add to the ``.grad`` of each leaf it reaches."""
    found = torch.autograd.grad(
        outputs, leaves, gradients, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    for leaf, grad in zip(leaves, found, strict=True):
        if grad is not None:
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad


SUBSTITUTES: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.vjp: vjp,
    functional.jvp: jvp,
    functional.jacobian: jacobian,
    functional.hessian: hessian,
    functional.hvp: hvp,
    functional.vhp: hvp,  # a Hessian is symmetric
}
