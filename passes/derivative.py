"""Derivative operators as plain functions of a body graph: the vocabulary of the derivative graph.

A node of the derivative graph calls one of these with the body as its first argument. They have
eager meaning, so a graph that holds them can be run at any stage and is its own oracle. All tensors
a body reads are explicit inputs, points first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import graphs_in
from passes.linearize import push_forward
from passes.markers import stop
from passes.tracking import reverse_pass, run, run_flat, run_reverse


def _as_point(x: Tensor) -> Tensor:
    """Give ``x`` an identity of its own to differentiate at, without cutting it from what computed
    it."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def gradient(
    body: GraphModule, n_points: int, n_outputs: int, seed_dims: int, *inputs: Any
) -> tuple[Tensor, ...]:
    """Return ``∇ₓ⟨c, f(x, θ)⟩`` by reverse mode, and the values of the body.

    Args:
        body: ``(*points, *captured) → (*outputs, *other values)``.
        n_points: How many of ``inputs`` are points, to begin with.
        n_outputs: How many of the body's results are differentiated; the last ``n_outputs`` of
            ``inputs`` are their seeds.
        seed_dims: Leading dimensions of the seeds that are a batch of seeds (the rows of a
            Jacobian).
        *inputs: points, captured values, seeds.

    Returns:
        One gradient per point, shape ``(*batch of seeds, *point.shape)``, then all values of the
        body.
    """
    seeds = inputs[len(inputs) - n_outputs :]
    captured = inputs[n_points : len(inputs) - n_outputs]
    with torch.enable_grad():
        points = [_as_point(x) for x in inputs[:n_points]]
        values = run(body, [*points, *captured])
        grads = _pullback(values[:n_outputs], points, seeds, seed_dims)
    return (*grads, *values)


def tangent(
    body: GraphModule, n_points: int, n_outputs: int, direction_dims: int, *inputs: Any
) -> tuple[Tensor, ...]:
    """Return ``∂f/∂x(x, θ)·v`` by forward mode, and the values of the body.

    Args:
        body: ``(*points, *captured) → (*outputs, *other values)``, no derivatives inside.
        n_points: How many of ``inputs`` are points, to begin with; as many directions come last.
        n_outputs: How many of the body's results are differentiated.
        direction_dims: Leading dimensions of the directions that are a batch of directions (the
            columns of a Jacobian).
        *inputs: points, captured values, directions.

    Returns:
        One tangent per output, shape ``(*batch of directions, *output.shape)``, then all values of
        the body.
    """
    primals, directions = inputs[: len(inputs) - n_points], inputs[len(inputs) - n_points :]
    rest = [None] * (len(primals) - n_points)

    def columns(along: Sequence[Tensor]) -> tuple[list[Tensor], list[Any]]:
        values, moved = push_forward(body, primals, [*along, *rest])
        pairs = zip(values[:n_outputs], moved[:n_outputs], strict=True)
        return [torch.zeros_like(u) if t is None else t for u, t in pairs], values

    batched = columns
    for _ in range(direction_dims):
        batched = torch.vmap(batched, out_dims=(0, None))  # pyright: ignore[reportArgumentType]
    tangents, values = batched(list(directions))
    return (*tangents, *values)


def _pullback(
    outputs: Sequence[Tensor], points: list[Tensor], seeds: Sequence[Tensor], seed_dims: int
) -> tuple[Tensor, ...]:
    live = [(u, c) for u, c in zip(outputs, seeds, strict=True) if u.requires_grad]
    if not live:
        batch = seeds[0].shape[:seed_dims]
        return tuple(x.new_zeros((*batch, *x.shape)) for x in points)
    live_outputs, live_seeds = [u for u, _ in live], [c for _, c in live]

    def rows(cotangents: list[Tensor]) -> tuple[Tensor, ...]:
        with reverse_pass("cotangent", live_outputs):
            return torch.autograd.grad(
                live_outputs,
                points,
                cotangents,
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )

    batched = rows
    for _ in range(seed_dims):
        batched = torch.vmap(batched)
    return batched(live_seeds)


class _Linearized(torch.autograd.Function):
    """A function whose forward is one graph and whose pullback is another (`passes.linearize`)."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, primal: GraphModule, tangent: GraphModule, n_results: int, active: tuple, *inputs
    ):
        ctx.set_materialize_grads(False)
        out = run_flat(primal, inputs)
        ctx.tangent, ctx.active, ctx.n_inputs = tangent, active, len(inputs)
        ctx.residuals = out[n_results:]
        results = _apart(out[:n_results], inputs)
        ctx.like = [(r.shape, r.dtype, r.device) for r in results]
        ctx.mark_non_differentiable(
            *(r for i, r in enumerate(results) if i not in active[0] and isinstance(r, Tensor))
        )
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        results, inputs = ctx.active
        directions = []
        for i in results:
            shape, dtype, device = ctx.like[i]
            given = cotangents[i]
            directions.append(
                torch.zeros(shape, dtype=dtype, device=device) if given is None else given
            )
        moved = run_reverse(ctx.tangent, [*ctx.residuals, *directions], keep_role=True)
        pulled = dict(zip(inputs, moved, strict=True))
        return (None, None, None, None, *(pulled.get(i) for i in range(ctx.n_inputs)))


def _apart(results: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Give each result an identity of its own: autograd takes equal tensors for one result."""
    seen = {id(x) for x in inputs}
    own = []
    for result in results:
        taken = isinstance(result, Tensor) and id(result) in seen
        seen.add(id(result))
        own.append(result.view_as(result) if taken else result)
    return own


def jvp_over_gradient(
    primal: GraphModule,
    tangent: GraphModule,
    n_results: int,
    differentiable: tuple[int, ...],
    pulled: tuple[int, ...],
    *inputs: Any,
) -> tuple[Tensor, ...]:
    """Return what `gradient` returns, with a pullback that is ONE forward-mode pass over the
    gradient.

    ``(x̄, θ̄, c̄) = d/dα ∇₍ₓ,θ,c₎⟨c + αū, f(x + αv, θ)⟩`` at ``α = 0``, for cotangents ``v`` of the
    gradient and ``ū`` of the values; the Hessian of ``⟨c, f⟩`` is symmetric, so its product with
    ``(v, 0, ū)`` is the pullback.

    Args:
        primal: ``P : inputs → (*results, *residuals)``.
        tangent: ``T : (*residuals, *cotangents) → input gradients``.
        n_results: How many results ``P`` has before its residuals.
        differentiable: Positions of the results that carry a cotangent, in the order ``T`` takes
            them.
        pulled: Positions of the inputs whose gradients ``T`` returns, in order.
        *inputs: points, captured values, seeds.
    """
    return _Linearized.apply(primal, tangent, n_results, (differentiable, pulled), *inputs)  # pyright: ignore[reportReturnType]


class _UserFunction(torch.autograd.Function):
    """A user's `autograd.Function`, its two halves as graphs."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        forward: Any,
        backward: Any,
        n_outputs: int,
        constant: tuple[int, ...],
        *inputs: Any,
    ):
        out = run(forward, inputs)
        outputs = _apart(out[:n_outputs], inputs)
        # What is saved may be an input or an output; autograd tells by identity.
        own = {id(raw): output for raw, output in zip(out, outputs, strict=False)}
        own |= {id(x): x for x in inputs}
        saved = [own.get(id(value), value) for value in out[n_outputs:]]
        ctx.backward_graph, ctx.n_arguments = backward, 4
        ctx.plain = [None if isinstance(value, Tensor) else value for value in saved]
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in saved))
        ctx.mark_non_differentiable(*(outputs[i] for i in constant))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        pairs = zip(ctx.saved_tensors, ctx.plain, strict=True)
        saved = [plain if tensor is None else tensor for tensor, plain in pairs]
        return (*(None,) * ctx.n_arguments, *run_reverse(ctx.backward_graph, [*cotangents, *saved]))


def user_function(
    forward: GraphModule,
    backward: GraphModule,
    n_outputs: int,
    constant: tuple[int, ...],
    *inputs: Any,
) -> tuple[Tensor, ...]:
    """Return what a user's `torch.autograd.Function` returns, with the pullback its author wrote.

    Nothing says that this is the derivative of ``forward`` (gradient reversal, straight-through
    estimators), so no identity about derivatives holds for it: reverse mode only.

    Args:
        forward: ``inputs → (*outputs, *saved values)``.
        backward: ``(*cotangents, *saved values) → one gradient or None per input``, itself
            differentiable in cotangents and in those saved values that are inputs or outputs.
        n_outputs: How many results ``forward`` has before the saved values.
        constant: Positions of the outputs that its author marked as not differentiable.
        *inputs: What it takes.
    """
    return _UserFunction.apply(forward, backward, n_outputs, constant, *inputs)  # pyright: ignore[reportReturnType]


def taylor(contractions: GraphModule, *inputs: Any) -> tuple[Tensor, ...]:
    """Return contractions of derivatives, computed in Taylor mode by a graph of plain operators.

    Args:
        contractions: ``inputs → contractions``.
        *inputs: Point, captured values, directions and weights.
    """
    return tuple(run(contractions, inputs))


def holds_user_function(module: GraphModule) -> bool:
    """Whether a graph, or a graph inside it, calls `user_function`."""
    graphs = [part.graph for part in graphs_in(module)]
    return any(node.target is user_function for graph in graphs for node in graph.nodes)


OPERATORS = (gradient, tangent, jvp_over_gradient, taylor, stop)
