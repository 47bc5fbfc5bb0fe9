"""A function and its derivatives of every order, each an explicit graph: the levels of a tower.

Level 0 is a function ``f : u → y``. It returns its residuals ``r`` too, the values of its
expensive operators, and they count as outputs: level 1 is the pullback ``(u, r, ȳ, r̄) → ū`` of
``u ↦ (y, r)``, in which everything cheap is computed again from ``r``. Level 1 is a function like
any other, so its pullback is level 2, and so on.

Forward mode is the pullback of the pullback in its cotangent, ``ẏ = ∂(ȳᵀJu̇)/∂ȳ``, which is linear
in both, so that only the tangent is left; under a `torch.func.vmap` a level is the vmap of its
graph. Both are levels too.

What level 2 sends back to ``r`` meets the cotangent of ``y`` in one sweep of level 1: a gradient
penalty with a data loss costs one pass for ``f``, one for its input gradient, two for the pullback
of that and two for the sweep.
"""

from __future__ import annotations

import enum
import functools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from passes import derivative
from passes.everywhere import select_scatter
from passes.graph import (
    copy_graph,
    drop_dead,
    finish,
    is_float,
    is_random,
    placeholders,
    results,
    value_of,
)
from passes.joint import trace_value
from passes.linearize import flatten_output
from passes.markers import STOP
from passes.tracing import (
    AnySize,
    example_inputs,
    fake_mode_of,
    over_batch,
    trace_differentiable,
)

aten = torch.ops.aten


class Cotangent(enum.IntEnum):
    """What is known of a cotangent before it is computed."""

    ABSENT = 0
    GIVEN = 1
    ZERO = 2


class CannotBatch(RuntimeError):
    """An operator has no batching rule."""


class Level:
    """One level of a tower.

    Attributes:
        graph: ``inputs → (*outputs, *updates)``, whole operators; an output may be None.
        n_outputs: How many of its results are outputs; updates are not differentiated.
        wanted: Positions of the inputs that a derivative can be asked for.
        residual_inputs: Positions of the inputs that are residuals of the level below.
        tensors: Positions of the inputs that are tensors, and which tensor each is.
    """

    def __init__(
        self,
        graph: GraphModule,
        n_outputs: int,
        wanted: Sequence[int],
        residual_inputs: Collection[int] = (),
    ) -> None:
        self.graph, self.n_outputs = graph, n_outputs
        self.wanted, self.residual_inputs = tuple(wanted), frozenset(residual_inputs)
        values = [value_of(node) for node in placeholders(graph.graph)]
        of_tensors = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        self.tensors = {position: index for index, position in enumerate(of_tensors)}

    @functools.cached_property
    def _saved(self) -> tuple[list[Node], tuple[int, ...], frozenset[int]]:
        """Residuals, kept inputs, active ends: by tracing the pullback in everything at once."""
        candidates = [node for node in self.graph.graph.nodes if _is_expensive(node)]
        module, live = _pulled_back(self, candidates, None, self.wanted)
        n_inputs = len(placeholders(self.graph.graph))
        read = [bool(node.users) for node in placeholders(module.graph)]
        used = read[n_inputs : n_inputs + len(candidates)]
        ends = [*range(self.n_outputs)]
        ends += [self.n_outputs + i for i, is_used in enumerate(used) if is_used]
        residuals = [node for node, is_used in zip(candidates, used, strict=True) if is_used]
        # Sizes cost nothing, and forward mode may read more of them.
        kept = tuple(i for i in range(n_inputs) if read[i] or i not in self.tensors)
        return residuals, kept, frozenset(i for i, end in enumerate(ends) if end in live)

    def prepare(self) -> None:
        """Find out what is kept; later calls cost nothing."""
        _ = self._saved

    @property
    def residuals(self) -> list[Node]:
        """The nodes of ``graph`` that the pullback reads, beside the inputs."""
        return self._saved[0]

    @property
    def kept(self) -> tuple[int, ...]:
        """Positions of the inputs that the pullback reads."""
        return self._saved[1]

    @property
    def active(self) -> frozenset[int]:
        """Positions, among outputs and residuals, of those that carry a derivative."""
        return self._saved[2]

    def _moves(self, residual: int) -> bool:
        return self.n_outputs + residual in self.active

    def _with_residuals(self) -> GraphModule:
        """Return ``inputs → (*outputs, *updates, *residuals)``, whole operators."""
        module = copy_graph(self.graph)
        names = {node.name: node for node in module.graph.nodes}
        output = module.graph.output_node()
        kept = [names[node.name] for node in self.residuals]
        output.args = ((*results(module.graph), *kept),)
        module.recompile()
        return module

    def primal(self) -> GraphModule:
        """Return ``inputs → (*outputs, *updates, *residuals)``, ready to be compiled."""
        return trace_value(self._with_residuals())

    def value(self) -> GraphModule:
        """Return ``inputs → (*outputs, *updates)``, ready to be compiled."""
        return trace_value(self.graph)

    def pullback(self, given: Sequence[Cotangent], needed: Sequence[int]) -> Level:
        """Return the next level: ``(*kept inputs, *residuals, *given cotangents) → (*gradients)``.

        Args:
            given: For each output and residual, what is known of its cotangent.
            needed: Positions of the inputs whose gradients are asked for.
        """
        module, _ = _pulled_back(self, self.residuals, given, needed)
        return self._above(module, len(needed))

    def pushforward(self, given: Sequence[int]) -> Level:
        """Return ``(*kept inputs, *residuals, *tangents) → (*tangents of outputs and residuals)``;
        None where one is zero.

        Args:
            given: Positions of the inputs that have a tangent; the others' are zero.
        """
        module = _pushed_forward(self, given)
        return self._above(module, self.n_outputs + len(self.residuals))

    def _above(self, module: GraphModule, n_outputs: int) -> Level:
        """Make a level of a graph that takes this level's inputs and residuals and more."""
        n_inputs = len(placeholders(self.graph.graph))
        for index, node in enumerate(placeholders(module.graph)):
            if index < n_inputs and index not in self.kept:
                module.graph.erase_node(node)
        finish(module)
        taken = placeholders(module.graph)
        n_kept = len(self.kept)
        residuals = range(n_kept, n_kept + len(self.residuals))
        constant = {n_kept + i for i in range(len(self.residuals)) if not self._moves(i)}
        constant |= {index for index, i in enumerate(self.kept) if i not in self.wanted}
        wanted = tuple(i for i, n in enumerate(taken) if is_float(n) and i not in constant)
        return Level(module, n_outputs, wanted, residuals)

    def any_size(self, example: int) -> AnySize | None:
        """Return a batch size that `batched` need not know; None where sizes cannot be symbols."""
        mode = fake_mode_of(example_inputs(self.graph))
        return None if mode.shape_env is None else AnySize(mode, example)

    def batched(self, size: int | torch.SymInt, over: Sequence[int]) -> tuple[Level, list[bool]]:
        """Return this level for a batch: outputs and residuals are the outputs of the new one.

        Args:
            size: How many there are.
            over: Positions of the inputs that are batched, in their first dimension.

        Returns:
            The level, and for each of its outputs whether it is batched (in its first dimension).

        Raises:
            CannotBatch: An operator has no batching rule.
        """
        module = self._with_residuals()
        inputs = example_inputs(self.graph)
        mode = fake_mode_of(inputs)
        with mode:
            for i in over:
                x = inputs[i]
                inputs[i] = torch.empty((size, *x.shape), dtype=x.dtype, device=x.device)
        is_batched: list[bool] = []

        def run(*values: Any) -> list[Any]:
            in_dims = tuple(0 if i in over else None for i in range(len(values)))
            interpreter = _Batchable(module)
            out, dims = over_batch(lambda *v: interpreter.run(*v), in_dims, size)(*values)
            is_batched[:] = [dim is not None for dim in dims]
            return [
                x if dim is None else x.movedim(dim, 0) for x, dim in zip(out, dims, strict=True)
            ]

        try:
            batched = trace_differentiable(run, inputs, mode)
        except RuntimeError as error:
            raise CannotBatch(str(error)) from error
        flatten_output(batched.graph)
        _drop_detach(batched.graph)
        finish(batched)
        return Level(batched, len(is_batched), self.wanted, self.residual_inputs), is_batched


# Beside pointwise operators: what costs nothing to do again.
CHEAP = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default,
    aten.t.default, aten.transpose.int, aten.expand.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int, aten.slice.Tensor,
    aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default,
    aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format,
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.scalar_tensor.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.cat.default,
    aten.stack.default, aten.flip.default, aten.diagonal.default, aten.eye.default, STOP,
    derivative.stop, aten.movedim.int, aten.unflatten.int, aten.chunk.default, aten.narrow.default,
}  # fmt: skip


# Pointwise operators whose derivative is a function of their result: it is kept in place of what
# they are applied to, which costs no memory and saves the transcendental function.
_KEPT_RESULTS = {
    aten.tanh.default, aten.sigmoid.default, aten.exp.default, aten.expm1.default,
    aten.tan.default, aten.sqrt.default, aten.rsqrt.default,
}  # fmt: skip


def _is_expensive(node: Node) -> bool:
    """Whether a node's value is kept rather than computed again."""
    if node.op != "call_function" or not isinstance(value_of(node), Tensor):
        return False
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, Node)
    if source.op != "call_function":
        return False
    if is_random(source) or source.target in _KEPT_RESULTS:
        return True
    if source.target in CHEAP:
        return False
    return torch.Tag.pointwise not in getattr(source.target, "tags", ())


class _Batchable(Interpreter):
    """Run a graph inside of a vmap."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.as_strided_scatter.default:
            return _scatter_strided(*args, **kwargs)
        if target is aten.select_scatter.default:
            return select_scatter(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def _scatter_strided(
    x: Tensor, source: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Tensor:
    """Do what ``x.as_strided_scatter(...)`` does, by operators that have batching rules."""
    index = torch.full(tuple(size), offset or 0, device=x.device)
    for dim, (n, step) in enumerate(zip(size, stride, strict=True)):
        shape = [n if i == dim else 1 for i in range(len(size))]
        index = index + step * torch.arange(n, device=x.device).reshape(shape)
    return x.reshape(-1).scatter(0, index.reshape(-1), source.reshape(-1)).reshape(x.shape)


class _Recorder(Interpreter):
    """Run a graph and keep the values of some nodes."""

    def __init__(self, module: GraphModule, kept: Sequence[Node]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.kept = kept

    def run_and_keep(self, values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        out = self.run(*values)
        return list(out), [self.env[node] for node in self.kept]


def run_and_keep(
    graph: GraphModule, kept: Sequence[Node], values: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Run a graph; return its results, and the values of some of its nodes."""
    return _Recorder(graph, kept).run_and_keep(values)


def _pulled_back(
    level: Level,
    residuals: Sequence[Node],
    given: Sequence[Cotangent] | None,
    needed: Sequence[int],
) -> tuple[GraphModule, set[int]]:
    """Trace ``(*inputs, *residuals, *given cotangents) → (*gradients of needed)``.

    Args:
        level: The function.
        residuals: What need not be computed again.
        given: What is known of each cotangent; None for everything that has a derivative.
        needed: Positions of the inputs to differentiate with respect to.

    Returns:
        The graph, and the positions of the outputs and residuals that carry a derivative.
    """
    like = [*results(level.graph.graph)[: level.n_outputs], *residuals]
    if given is None:
        given = [Cotangent.GIVEN if is_float(node) else Cotangent.ABSENT for node in like]
    dense = [n for n, kind in zip(like, given, strict=True) if kind is Cotangent.GIVEN]
    live: list[int] = []

    def pull_back(own: Sequence[Any], ends: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        seeds = iter(cotangents)
        pairs = []
        for index, (end, kind) in enumerate(zip(ends, given, strict=True)):
            if kind is Cotangent.ABSENT:
                continue
            seed = next(seeds) if kind is Cotangent.GIVEN else torch.zeros_like(end)
            if end.requires_grad:
                live.append(index)
                pairs.append((end, seed))
        return _gradients([u for u, _ in pairs], own, [c for _, c in pairs])

    return _derived(level, residuals, needed, dense, pull_back), set(live)


def _pushed_forward(level: Level, given: Sequence[int]) -> GraphModule:
    """Trace ``(*inputs, *residuals, *tangents of given) → (*tangents of outputs and residuals)``;
    None where one is zero."""
    moving = placeholders(level.graph.graph)

    def push_forward(own: Sequence[Any], ends: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        found: list[Any] = [None] * len(ends)
        moved = [i for i in sorted(level.active) if ends[i].requires_grad]
        # The pullback is linear in them, so its own pullback does not depend on them.
        cotangents = [torch.zeros_like(ends[i]).requires_grad_() for i in moved]
        grads = _gradients([ends[i] for i in moved], own, cotangents)
        pairs = [
            (g, t)
            for g, t in zip(grads, tangents, strict=True)
            if g is not None and g.requires_grad
        ]
        out = _gradients([g for g, _ in pairs], cotangents, [t for _, t in pairs])
        for i, tangent in zip(moved, out, strict=True):
            found[i] = tangent
        return found

    return _derived(level, level.residuals, given, [moving[i] for i in given], push_forward)


def _gradients(
    outputs: Sequence[Any], inputs: Sequence[Any], cotangents: Sequence[Any]
) -> list[Any]:
    """Pull back, by formulas that can be differentiated; None for what does not depend."""
    if not outputs or not inputs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, allow_unused=True)
    )


def _derived(
    level: Level,
    residuals: Sequence[Node],
    moving: Sequence[int],
    more: Sequence[Node],
    derivative_of: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], list[Any]],
) -> GraphModule:
    """Trace ``(*inputs, *residuals, *more) → derivative_of(moving inputs, ends, more)``, where the
    ends are the outputs and the residuals.

    Args:
        level: The function.
        residuals: What need not be computed again.
        moving: Positions of the inputs to differentiate with respect to.
        more: Nodes that the further inputs are like.
        derivative_of: The derivative.
    """
    inputs = example_inputs(level.graph)
    mode = fake_mode_of(inputs)
    with mode:
        further = [
            torch.empty(value_of(n).shape, dtype=value_of(n).dtype, device=value_of(n).device)
            for n in more
        ]

    def run(*values: Any) -> list[Any]:
        own = list(values[: len(inputs)])
        with torch.enable_grad():
            for i in moving:
                own[i] = own[i].detach().requires_grad_()
            out, kept = _Recorder(level.graph, residuals).run_and_keep(own)
            ends = [*out[: level.n_outputs], *kept]
            found = derivative_of([own[i] for i in moving], ends, values[len(inputs) :])
        return [*found, *kept]

    module = trace_differentiable(run, [*inputs, *further], mode)
    flatten_output(module.graph)
    _cut(module.graph, len(inputs), len(residuals))
    return finish(module)


def _cut(graph: Graph, n_inputs: int, n_residuals: int) -> None:
    """Make inputs of the graph's last ``n_residuals`` results, after the first ``n_inputs``."""
    _drop_detach(graph)
    outputs = results(graph)
    kept = outputs[len(outputs) - n_residuals :]
    graph.output_node().args = (tuple(outputs[: len(outputs) - n_residuals]),)
    taken = placeholders(graph)
    after = taken[n_inputs - 1] if n_inputs else None
    for index, node in enumerate(kept):
        with graph.inserting_after(after):
            new = graph.placeholder(f"residual_{index}")
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        after = new
    for node in reversed(list(graph.nodes)):
        if is_random(node) and not node.users:
            graph.erase_node(node)  # drawn at the level below
    drop_dead(graph)


def _drop_detach(graph: Graph) -> None:
    """Take out the detaching of what autograd saves; what the user detached is a stop."""
    for node in list(graph.nodes):
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is STOP:
            node.target = derivative.stop
