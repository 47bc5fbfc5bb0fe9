"""Decide by finite differences whether a derivative is right, where two computations of it differ.

PyTorch's derivatives of derivatives are not always right. A derivative along a direction is a limit
of differences of values, whoever computes it: the derivative graph (`passes.derivative`) is run in
float64, each nested derivative compared with differences of its own body, inner ones first; then
the gradients of the loss with differences of its value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate

from passes import derivative
from passes.graph import copy_graph, graphs_in, is_random, where
from passes.markers import LEAF, STOP

# Of the largest element of a point. An error of fourth order, and of rounding by 1e-16 over it.
STEP = 1e-3
AGREES = 1e-5
_STENCIL = ((1, 8), (-1, -8), (2, -1), (-2, 1))  # over twelve steps


class Undecided(Exception):
    """Finite differences do not tell: a kink, a draw, or an operator that float64 is no input
    of."""


def widened(x: Any) -> Any:
    """Return a tensor in float64 or complex128, if it has a fraction; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    if x.is_complex():
        return x.detach().to(torch.complex128)
    return x.detach().double() if x.is_floating_point() else x


def widened_graph(module: GraphModule) -> GraphModule:
    """Return a copy of a graph, and of those that it calls, that computes in float64 what it
    computed in a narrower type."""
    made = copy_graph(module)
    for name, inner in list(made.named_children()):
        if isinstance(inner, GraphModule):
            setattr(made, name, widened_graph(inner))
    for node in made.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(made, str(node.target), None), Tensor):
            setattr(made, str(node.target), widened(getattr(made, str(node.target))))
        node.args = map_aggregate(node.args, _wide_type)  # pyright: ignore[reportAttributeAccessIssue]
        node.kwargs = map_aggregate(node.kwargs, _wide_type)  # pyright: ignore[reportAttributeAccessIssue]
    made.recompile()
    return made


def _wide_type(argument: Any) -> Any:
    if isinstance(argument, torch.dtype):
        if argument.is_complex:
            return torch.complex128
        return torch.float64 if argument.is_floating_point else argument
    return argument


def along(
    function: Callable[[Sequence[Any]], Sequence[Tensor]],
    point: Sequence[Any],
    direction: Sequence[Tensor | None],
) -> list[Tensor]:
    """Return the derivatives of a function's results along a direction, by differences of fourth
    order.

    Args:
        function: Takes what ``point`` is like.
        point: Tensors in float64 and other values.
        direction: A tensor for each; None for zero.

    Raises:
        Undecided: Two steps give two derivatives.
    """
    sizes = [float(x.abs().max()) for x in direction if x is not None and x.numel()]
    unit = max(sizes, default=0.0)
    if not unit:
        raise Undecided("nothing moves")

    def differences(step: float) -> list[Tensor]:
        total: list[Tensor] | None = None
        for place, weight in _STENCIL:
            moved = [
                x if v is None else x + (place * step) * v
                for x, v in zip(point, direction, strict=True)
            ]
            found = [weight * u / (12 * step) for u in function(moved)]
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        assert total is not None
        return total

    coarse, fine = differences(STEP / unit), differences(STEP / unit / 4)
    if not _agree(coarse, fine):
        raise Undecided("a kink, or a point where the derivative changes quickly")
    return fine


def _agree(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    size = max((float(x.abs().max()) for x in (*one, *other) if x.numel()), default=0.0)
    pairs = zip(one, other, strict=True)
    return all(bool(((a - b).abs() <= AGREES * size + 1e-9).all()) for a, b in pairs)


def check_sites(module: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Run a derivative graph, compare each of its derivatives with finite differences and return
    its results.

    Args:
        module: The graph, in float64.
        inputs: What it takes, in float64.

    Raises:
        Undecided: A derivative is not that of its body, or it cannot be told.
    """
    if any(is_random(node) for part in graphs_in(module) for node in part.graph.nodes):
        raise Undecided("the loss draws random numbers")
    with torch.no_grad():
        return list(_Checking(module).run(*inputs))


class _Checking(Interpreter):
    """Run a derivative graph; compare each derivative with differences of its body."""

    _now: Node

    def run_node(self, n: Node) -> Any:
        self._now = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in (derivative.gradient, derivative.tangent) and _has_stops(args[0]):
            raise Undecided("what is differentiated is detached in part")
        found = super().call_function(target, args, kwargs)
        if target is derivative.gradient:
            _check_gradient(found, *args, at=where(self._now))
        elif target is derivative.tangent:
            _check_tangent(found, *args, at=where(self._now))
        elif target is derivative.user_function:
            raise Undecided("a user's autograd.Function is what its author says")
        return found


def _has_stops(body: GraphModule) -> bool:
    nodes = (node for part in graphs_in(body) for node in part.graph.nodes)
    return any(node.target in (derivative.stop, STOP, LEAF) for node in nodes)


def _check_gradient(
    found: Sequence[Any],
    body: GraphModule,
    n_points: int,
    n_outputs: int,
    seed_dims: int,
    *inputs: Any,
    at: str,
) -> None:
    """Compare ``⟨∇⟨c, f⟩, v⟩`` with ``⟨c, d/dh f(x + hv)⟩`` for a direction ``v``, each seed
    ``c``."""
    own, seeds = list(inputs[: len(inputs) - n_outputs]), inputs[len(inputs) - n_outputs :]
    check_sites(body, own)
    grads = found[:n_points]
    direction = [_direction(x) for x in own[:n_points]]
    moved = along(
        lambda values: run(body, values)[:n_outputs],
        own,
        [*direction, *[None] * (len(own) - n_points)],
    )
    ours = sum(_dot(g, v, seed_dims) for g, v in zip(grads, direction, strict=True))
    theirs = sum(_dot(c, u, seed_dims) for c, u in zip(seeds, moved, strict=True))
    _require([torch.as_tensor(ours)], [torch.as_tensor(theirs)], at)


def _check_tangent(
    found: Sequence[Any],
    body: GraphModule,
    n_points: int,
    n_outputs: int,
    direction_dims: int,
    *inputs: Any,
    at: str,
) -> None:
    """Compare tangents with ``d/dh f(x + hv)``, a mixture of them where there are several ``v``."""
    own, directions = list(inputs[: len(inputs) - n_points]), inputs[len(inputs) - n_points :]
    check_sites(body, own)
    batch = directions[0].shape[:direction_dims]
    weights = _direction(torch.ones(batch, dtype=torch.float64, device=directions[0].device))

    def mixed(x: Tensor) -> Tensor:
        return torch.tensordot(weights.to(x.dtype), x, dims=direction_dims)

    moved = along(
        lambda values: run(body, values)[:n_outputs],
        own,
        [*map(mixed, directions), *[None] * (len(own) - n_points)],
    )
    _require([mixed(t) for t in found[:n_outputs]], moved, at)


def run(body: GraphModule, values: Sequence[Any]) -> list[Tensor]:
    """Return the results of a derivative graph."""
    with torch.no_grad():
        return list(body(*values))


def _direction(x: Tensor) -> Tensor:
    """Return numbers of both signs about 1, the same at each call."""
    return (torch.arange(1, x.numel() + 1, device=x.device).sin() + 0.1).view(x.shape).to(x.dtype)


def _dot(one: Tensor, other: Tensor, batch: int) -> Tensor:
    """Return the products of each of a batch with one tensor; the real part, which is what a real
    derivative of a complex function comes to."""
    rows = one.reshape(*one.shape[:batch], -1)
    product = (rows.conj() * other.reshape(-1)).sum(-1)
    return product.real if product.is_complex() else product


def _require(ours: Sequence[Tensor], theirs: Sequence[Tensor], at: str) -> None:
    if not _agree(ours, theirs):
        raise Undecided(f"the derivative at {at} is not that of finite differences")


def nearer(
    value: Callable[[Sequence[Any]], Tensor],
    inputs: Sequence[Any],
    wanted: Sequence[int],
    ours: Sequence[Tensor | None],
    plain: Sequence[Tensor | None],
) -> tuple[float, float, float]:
    """Return a directional derivative by finite differences, by our gradients and by PyTorch's; the
    direction is that in which the two differ.

    Args:
        value: The loss as a function of ``inputs``, a real scalar.
        inputs: In float64.
        wanted: Positions of the inputs that the gradients are of.
        ours: One gradient per position.
        plain: The same by PyTorch.

    Raises:
        Undecided: They do not differ, or finite differences do not tell.
    """
    pairs = [
        (_or_zero(a, inputs[i]), _or_zero(b, inputs[i]))
        for i, a, b in zip(wanted, ours, plain, strict=True)
    ]
    direction: list[Tensor | None] = [None] * len(inputs)
    for i, (a, b) in zip(wanted, pairs, strict=True):
        direction[i] = a - b
    (exact,) = along(lambda moved: [value(moved)], inputs, direction)
    by_ours = sum(float(_dot(a, a - b, 0)) for a, b in pairs)
    by_plain = sum(float(_dot(b, a - b, 0)) for a, b in pairs)
    return float(exact), by_ours, by_plain


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else widened(grad)
