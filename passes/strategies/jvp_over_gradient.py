"""JVP over gradient: the pullback of a gradient is one forward-mode pass over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes import derivative
from passes.bodies import Linearizations, kind_of
from passes.graph import arguments, copy_graph, is_float, placeholders, value_of
from passes.linearize import Linearization, linearize
from passes.nest import active_nodes, all_sites, body_of, sites
from passes.origin import note_new, note_site
from passes.simplify import simplify
from passes.strategies.base import FORWARD, Inside, Refused, Strategy
from passes.symmetry import not_a_gradient
from passes.tangent_rules import NoRule
from passes.tracing import fake_mode_of, trace
from passes.tracking import reverse_pass, run


@dataclass(frozen=True)
class _Parts:
    """The arguments of a derivative node, by role."""

    points: list[Any]
    captured: list[Any]
    seeds: list[Any]
    n_outputs: int

    @property
    def inputs(self) -> list[Any]:
        return [*self.points, *self.captured, *self.seeds]


class JvpOverGradient(Strategy):
    """Pull a site back by one JVP over the gradient of ``φ(x, θ, c, e) = ⟨c, f(x, θ)⟩ + ⟨e, other
    values⟩`` at ``e = 0``.

    A cotangent ``v`` of ``∇ₓφ`` moves the point, a cotangent ``ū`` of a value moves that value's
    seed, and because the Hessian of φ is symmetric the tangents of ``∇φ`` in that direction are the
    gradients of everything φ reads.
    """

    name = "jvp_over_gradient"

    def build(
        self,
        module: GraphModule,
        node: Node,
        active: set[Node],
        inside: Inside,
        known: Linearizations,
    ) -> dict[str, str]:
        """Replace ``gradient(body, …)`` by ``jvp_over_gradient(P, T, …)``."""
        if node.target is derivative.tangent:
            return {site.name: FORWARD for site in all_sites(module, [node])}
        _, n_points, n_outputs, seed_dims, *inputs = arguments(node)
        if seed_dims:
            raise Refused(
                "several seeds are pulled back at once; their tangents are not batched yet"
            )
        parts = _Parts(
            inputs[:n_points],
            inputs[n_points : len(inputs) - n_outputs],
            inputs[len(inputs) - n_outputs :],
            n_outputs,
        )
        if any(value_of(n).is_complex() for n in parts.inputs if isinstance(value_of(n), Tensor)):
            raise Refused("complex tensors: the symmetry of the Hessian is not proven")
        if derivative.holds_user_function(body_of(module, node)):
            raise Refused(
                "a user-defined autograd.Function: its backward need not be the derivative of its "
                "forward, so the symmetry of the Hessian is not proven"
            )
        body = body_of(module, node)
        reason = not_a_gradient(body, placeholders(body.graph)[:n_points])
        if reason:
            raise Refused(reason)
        used = sorted({arguments(item)[1] for item in node.users})
        name = node.meta["site"].name
        body, taken = self._inner_sites_built(body, parts, active, inside)
        try:
            self._replace(module, node, body, parts, active, used, known)
        except NoRule as error:
            raise Refused(f"no forward-mode rule for {error}") from error
        return {**taken, name: self.name}

    def _inner_sites_built(
        self, body: GraphModule, parts: _Parts, active: set[Node], inside: Inside
    ) -> tuple[GraphModule, dict[str, str]]:
        """Return the body with the derivatives inside it in their forms."""
        if not sites(body):
            return body, {}
        body = copy_graph(body)
        moving = {
            inner
            for inner, outer in zip(placeholders(body.graph), parts.inputs, strict=False)
            if outer in parts.points or outer in active
        }
        taken = inside(body, active_nodes(body, moving))
        body.recompile()
        return body, taken

    def _replace(
        self,
        module: GraphModule,
        node: Node,
        body: GraphModule,
        parts: _Parts,
        active: set[Node],
        used: list[int],
        known: Linearizations,
    ) -> None:
        n_points, n_results = len(parts.points), len(value_of(node))
        first_seed = n_points + len(parts.captured)
        extra = [i for i in used if i >= n_points + parts.n_outputs and is_float_value(node, i)]
        pulled = [
            i for i, read in enumerate(parts.inputs) if isinstance(read, Node) and read in active
        ]
        # input position in the gradient graph → position of the result whose cotangent moves it
        moved_by = {i: i for i in range(n_points) if i in used}
        moved_by |= {
            first_seed + k: n_points + k for k in range(parts.n_outputs) if n_points + k in used
        }
        moved_by |= {len(parts.inputs) + k: i for k, i in enumerate(extra)}
        captured = [i for i in pulled if n_points <= i < first_seed]
        # pulled input → output of the gradient graph whose tangent is its gradient
        answer = {i: i for i in range(n_points)}
        answer |= {i: n_results + k for k, i in enumerate(captured)}
        answer |= {first_seed + k: n_points + k for k in range(parts.n_outputs)}
        name = node.meta["site"].name

        def linearized() -> Linearization:
            found = linearize(
                self._gradient_graph(node, body, parts, extra, pulled),
                moving=list(moved_by),
                kept=range(n_results),
                wanted=[answer[i] for i in pulled],
                zero=range(len(parts.inputs), len(parts.inputs) + len(extra)),
            )
            for part in (found.primal, found.tangent):
                note_site(part, name, node)
                note_new(part, "choose", f"{name}.")
            return found

        inputs = tuple(kind_of(value_of(read)) for read in parts.inputs)
        roles = n_points, parts.n_outputs, tuple(used), tuple(extra), tuple(pulled)
        about = inputs, roles, kind_of(value_of(node))
        lin = known.get(body, about, node, linearized)
        own = name
        while hasattr(module, f"primal_{own}"):  # a contraction may have several nodes of one site
            own += "_"
        module.register_module(f"primal_{own}", lin.primal)
        module.register_module(f"tangent_{own}", lin.tangent)
        with module.graph.inserting_before(node):
            primal = module.graph.get_attr(f"primal_{own}")
            tangent = module.graph.get_attr(f"tangent_{own}")
        node.target = derivative.jvp_over_gradient
        node.args = (
            primal,
            tangent,
            n_results,
            tuple(moved_by.values()),
            tuple(pulled),
            *parts.inputs,
        )

    def _gradient_graph(
        self, node: Node, body: GraphModule, parts: _Parts, extra: list[int], pulled: list[int]
    ) -> GraphModule:
        """Trace ``(x, θ, c, e) → (∇ₓφ, values, ∇_θφ)``."""
        n_points, n_captured = len(parts.points), len(parts.captured)
        captured = [i for i in pulled if n_points <= i < n_points + n_captured]
        examples = [_example(read) for read in parts.inputs]
        mode = fake_mode_of(examples)
        with mode:
            zeros = [torch.empty_like(value_of(node)[i]) for i in extra]

        def gradient(*values: Any) -> tuple[Any, ...]:
            inputs, seeds_of_extra = list(values[: len(examples)]), values[len(examples) :]
            seeds = inputs[n_points + n_captured :]
            with torch.enable_grad():
                for i in [*range(n_points), *captured]:
                    inputs[i] = inputs[i].detach().requires_grad_()
                results = run(body, inputs[: n_points + n_captured])
                pairs = [*zip(results[: parts.n_outputs], seeds, strict=True)]
                pairs += [
                    (results[i - n_points], e) for i, e in zip(extra, seeds_of_extra, strict=True)
                ]
                pairs = [(u, c) for u, c in pairs if u.requires_grad]
                at = [inputs[i] for i in [*range(n_points), *captured]]
                grads = _gradients(pairs, at, node.meta["site"].name)
            return (*grads[:n_points], *results, *grads[n_points:])

        graph = trace(gradient, [*examples, *zeros], mode)
        simplify(graph)
        return graph


def _gradients(
    pairs: list[tuple[Tensor, Tensor]], at: list[Tensor], site: str
) -> tuple[Tensor, ...]:
    if not pairs:
        return tuple(torch.zeros_like(x) for x in at)
    outputs, seeds = zip(*pairs, strict=True)
    # Some formulas hold for a first derivative only (`cumprod` at a zero) or read a factorisation
    # that has no tangent (`det`, `solve`); `create_graph` asks for one to be differentiated again.
    with reverse_pass("cotangent", outputs, site):
        return torch.autograd.grad(
            outputs, at, seeds, create_graph=True, allow_unused=True, materialize_grads=True
        )


def _example(read: Any) -> Any:
    value = value_of(read)
    return value.detach() if isinstance(value, Tensor) else value


def is_float_value(node: Node, index: int) -> bool:
    """Whether a result of a derivative node can carry a cotangent."""
    return is_float(value_of(node)[index])
