"""Trace loss, gradients and state updates of the whole step into one graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import drop_dead, finish, results, value_of
from passes.linearize import flatten_output
from passes.markers import STOP
from passes.origin import note_new
from passes.simplify import simplify
from passes.tracing import example_inputs, fake_mode_of, trace
from passes.tracking import reverse_pass, run


@dataclass(frozen=True)
class Roles:
    """What the inputs and outputs of a derivative graph are.

    Attributes:
        wanted: Positions of the inputs that require gradients.
        unreached: Those of ``wanted`` whose gradient eager leaves at None.
        n_outputs: How many results are the loss's own; the others are new values of inputs that it
            writes to.
        differentiable: Positions of the outputs a gradient can come back to.
        updated: Positions of the inputs that the other results are written to.
    """

    wanted: tuple[int, ...]
    unreached: frozenset[int]
    n_outputs: int
    differentiable: tuple[int, ...]
    updated: tuple[int, ...]


def trace_value(module: GraphModule) -> GraphModule:
    """Trace ``inputs → (outputs, updates)``: no gradient of the loss is computed."""
    joint = _traced_value(module)
    finish_joint(joint)
    return joint


def trace_value_and_stops(module: GraphModule) -> GraphModule:
    """Trace the same, and leave in what keeps gradients back."""
    joint = _traced_value(module)
    flatten_output(joint.graph)
    simplify(joint)
    return joint


def _traced_value(module: GraphModule) -> GraphModule:
    examples = example_inputs(module)

    def step(*values: Any) -> list[Any]:
        with torch.no_grad():
            return list(run(module, values))

    return trace(step, examples, fake_mode_of(examples))


def trace_joint(module: GraphModule, roles: Roles, *, seeded: bool) -> GraphModule:
    """Trace ``inputs → (outputs, updates, gradients)``, or with ``seeded`` ``(inputs, cotangents) →
    …``.

    Args:
        module: A derivative graph with each site in its chosen form.
        roles: What its inputs and outputs are.
        seeded: Whether the outputs' cotangents are inputs. Without, the one output is a scalar and
            its cotangent is 1: gradients are linear in it, so the caller scales them.

    Returns:
        The simplified joint graph. A gradient that eager leaves at None is None here; one that
        eager fills with zeros is zeros.
    """
    like = [value_of(results(module.graph)[i]) for i in roles.differentiable]
    return trace_step(
        lambda inputs: run(module, inputs),
        example_inputs(module),
        roles,
        leaves=roles.wanted,
        cotangents=[torch.empty_like(value) for value in like] if seeded else [],
    )


def trace_step(
    run: Callable[[list[Any]], Sequence[Any]],
    examples: Sequence[Any],
    roles: Roles,
    *,
    leaves: Sequence[int],
    cotangents: Sequence[Tensor],
) -> GraphModule:
    """Trace any function ``inputs → (*outputs, *updates)`` with its gradients.

    Args:
        run: Computes outputs and updates from a list of inputs under autograd.
        examples: Fake inputs, constants to autograd.
        roles: What inputs and outputs are.
        leaves: Positions of the inputs that require grad when ``run`` starts.
        cotangents: Fake cotangents of the differentiable outputs; none for a scalar whose cotangent
            is 1.
    """
    step = step_of(run, roles, leaves, len(examples))
    joint = trace(step, [*examples, *cotangents], fake_mode_of(examples))
    finish_joint(joint)
    return joint


def step_of(
    run: Callable[[list[Any]], Sequence[Any]],
    roles: Roles,
    leaves: Sequence[int],
    n_inputs: int,
) -> Callable[..., tuple[list[Any], list[Any], list[Any]]]:
    """Return ``(*inputs, *cotangents) → (outputs, updates, gradients)``, computed by autograd; see
    `trace_step`."""
    reached = [i for i in roles.wanted if i not in roles.unreached]

    def gradients(outputs: Sequence[Any], inputs: list[Any], given: Sequence[Tensor]) -> list[Any]:
        ends = [outputs[i] for i in roles.differentiable]
        found: Sequence[Any] = [torch.zeros_like(inputs[i]) for i in reached]
        with reverse_pass("gradient", ends):
            seeds = list(given) or [torch.ones_like(u) for u in ends]
            live = [(u, c) for u, c in zip(ends, seeds, strict=True) if u.requires_grad]
            if live and reached:
                found = torch.autograd.grad(
                    [u for u, _ in live],
                    [inputs[i] for i in reached],
                    [c for _, c in live],
                    allow_unused=True,
                    materialize_grads=True,
                )
        by_input = dict(zip(reached, found, strict=True))
        return [by_input.get(i) for i in roles.wanted]

    def step(*values: Any) -> tuple[list[Any], list[Any], list[Any]]:
        inputs, given = list(values[:n_inputs]), values[n_inputs:]
        with torch.enable_grad():
            for i in leaves:
                inputs[i] = inputs[i].detach().requires_grad_()
            out = run(inputs)
            grads = gradients(out, inputs, given)
        return list(out[: roles.n_outputs]), list(out[roles.n_outputs :]), grads

    return step


def finish_joint(joint: GraphModule) -> None:
    """Simplify; how many changes that took stays with the graph, for the report."""
    flatten_output(joint.graph)
    drop_stops(joint)
    joint.meta["simplified"] = sum(simplify(joint).values())
    note_new(joint, "joint", "joint.")


def drop_stops(module: GraphModule) -> int:
    """Drop the stops of a graph that nothing differentiates any more."""
    stops = list(module.graph.find_nodes(op="call_function", target=STOP))
    for node in stops:
        source = node.args[0]
        assert isinstance(source, Node)
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
    drop_dead(module.graph)
    finish(module)
    return len(stops)
