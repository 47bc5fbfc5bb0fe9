"""The pipeline: from a captured graph to the joint graph, with a record of every stage and
choice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch.fx import GraphModule, Node

from passes.convolutions import any_size_differentiable, needs_any_size
from passes.graph import (
    copy_graph,
    graphs_in,
    is_float,
    placeholders,
    print_graph,
    results,
    value_of,
)
from passes.joint import Roles, trace_value
from passes.markers import MARKS
from passes.nest import NotNested, Site, active_nodes, all_sites, drop_stops, nest, sites
from passes.parts import in_parts
from passes.price import evaluated, price, size_hints
from passes.share import share
from passes.verify import verify
from rewriter.as_written import AsWritten, measure
from rewriter.capture import marked_sizes, source_name
from rewriter.choose import Choice, choose
from rewriter.detached import detached_derivatives, lost_derivatives
from rewriter.errors import CaptureError, NotDifferentiable, NotRewritten
from rewriter.flags import begin_with_all_on
from rewriter.flatten import Flat, flatten
from rewriter.numbers import keep_numbers
from rewriter.options import Options
from rewriter.twice import write_out
from rewriter.widths import fix_widths

_MAKERS = {
    "flatten": "rewriter.flatten",
    "share": "passes.share",
    "nest": "passes.nest",
    "choose": "rewriter.choose",
    "joint": "passes.joint",
}


@dataclass(frozen=True)
class Stage:
    """A graph after one pass.

    Attributes:
        name: The pass.
        module: The graph; see `runnable`.
        changes: How many changes the pass made.
        seconds: How long it took.
        maker: The Python module of the pass.
    """

    name: str
    module: GraphModule
    changes: int
    seconds: float
    maker: str = ""

    @property
    def text(self) -> str:
        """The printed graph."""
        return print_graph(self.module)

    @property
    def runnable(self) -> GraphModule:
        """A copy that can be run: derivatives that are still marks are one node each."""
        module = copy_graph(self.module)
        if any(node.target in MARKS for node in module.graph.nodes):
            nest(module)
        return module


@dataclass(frozen=True)
class Prepared:
    """A specialisation of a loss with its nested derivatives found, and no form chosen for them.

    Attributes:
        captured: What Dynamo captured; run under autograd it is the loss as written.
        names: What each input of the captured graph is, as an expression over the function's locals
            and globals.
        as_written: What one step of that costs, and which gradients it leaves.
        flat: Inputs, outputs and state of the flat graph.
        derivative: The derivative graph, every site as `passes.derivative.gradient`.
        roles: What its inputs and outputs are.
        seeded: Whether the joint graph takes the outputs' cotangents as inputs.
        stages: The graph after each pass.
        detached: Warnings about inner derivatives that the outer gradient does not see.
        function: The loss's name.
    """

    captured: GraphModule
    names: tuple[str, ...]
    as_written: AsWritten
    flat: Flat
    derivative: GraphModule
    roles: Roles
    seeded: bool
    stages: tuple[Stage, ...]
    detached: tuple[str, ...]
    function: str

    @property
    def sites(self) -> list[Site]:
        """The nested derivatives, inner ones first."""
        return all_sites(self.derivative, sites(self.derivative))


@dataclass(frozen=True)
class Rewritten(Prepared):
    """A specialisation of a loss, rewritten.

    Attributes:
        choice: The form taken, with every candidate's price and every refusal's reason.
    """

    choice: Choice

    @property
    def joint(self) -> GraphModule:
        """Loss, state updates and gradients as one graph."""
        return self.choice.joint

    def value_graph(self) -> GraphModule:
        """Return the loss's value and state updates alone: with plain derivatives or in the form
        that was taken, whichever costs less where nothing is pulled back."""
        if self.roles.differentiable:
            graphs = map(trace_value, dict.fromkeys([self.derivative, self.choice.form]))
            best = min(graphs, key=lambda graph: evaluated(price(graph).flops, size_hints(graph)))
        else:
            best = copy_graph(self.joint)  # it has no gradients either
        in_parts(best)
        return best


def rewrite(captured: GraphModule, options: Options, function: str = "") -> Rewritten:
    """Run the pipeline on a captured graph.

    Args:
        captured: What Dynamo captured.
        options: The user's wishes.
        function: The loss's name, for reports.

    Raises:
        CaptureError: The graph holds something whose meaning would be lost.
        NotRewritten: With ``strict``, a site that accepts no rewriting strategy.
        OptionError: ``strategy`` names a site that does not exist, or a strategy that a site does
            not accept.
    """
    return decide(prepare(captured, options, function), options)


def prepare(captured: GraphModule, options: Options, function: str = "") -> Prepared:
    """Run the pipeline up to the choice of a form; see `rewrite`."""
    keep_numbers(captured)
    begin_with_all_on(captured)
    stages: list[Stage] = []
    start = time.perf_counter()
    flat = flatten(captured)
    seconds = time.perf_counter() - start
    module = _staged(stages, "flatten", lambda: (flat.module, 0), seconds)
    try:
        as_written = measure(captured, flat.promoted)
    except RuntimeError as error:
        if write_out(captured):
            return prepare(captured, options, function)
        if "modified by an inplace operation" in str(error):  # as written, too
            raise NotDifferentiable(
                "a value that a derivative needs is changed in place"
            ) from error
        if "is not implemented" in str(error):
            raise NotDifferentiable(f"PyTorch's {str(error).splitlines()[0]}") from error
        if not needs_any_size(error):
            raise
        with any_size_differentiable():
            as_written = measure(captured, flat.promoted)
    inputs = placeholders(module.graph)
    requiring = {inputs[i] for i in as_written.wanted}
    detached = detached_derivatives(module, requiring, as_written.differentiable, captured)
    if detached and options.strict:
        raise NotRewritten(f"strict=True: {detached[0]}")
    if not as_written.reached:
        detached = lost_derivatives(module, requiring, flat.n_outputs, captured)
    _staged(stages, "share", lambda: (module, share(module, active_nodes(module, requiring))))
    try:
        _staged(stages, "nest", lambda: (module, _nested(module, as_written)))
    except NotNested as error:
        raise CaptureError(str(error)) from error
    if options.dynamic is None and fix_widths(module, marked_sizes(captured)):
        return prepare(captured, options, function)
    roles = Roles(
        wanted=as_written.wanted,
        unreached=as_written.unreached,
        n_outputs=flat.n_outputs,
        differentiable=as_written.differentiable,
        updated=flat.updated,
    )
    active = active_nodes(module, requiring)
    check_differentiability(module, roles.n_outputs, roles.differentiable, active)
    return Prepared(
        captured=captured,
        names=tuple(source_name(node) for node in placeholders(captured.graph)),
        as_written=as_written,
        flat=flat,
        derivative=module,
        roles=roles,
        seeded=not _is_one_scalar(module, roles) or _has_half_precision(module),
        stages=tuple(stages),
        detached=tuple(detached),
        function=function,
    )


def _nested(module: GraphModule, as_written: AsWritten) -> int:
    changes = nest(module)
    return changes if as_written.differentiable else changes + drop_stops(module)


def decide(prepared: Prepared, options: Options, *, recalls: bool = False) -> Rewritten:
    """Run the rest of the pipeline.

    Args:
        prepared: What `prepare` returned.
        options: The user's wishes.
        recalls: Whether what an earlier process chose will do, see `rewriter.recall`: a report has
            all candidates.
    """
    choice = choose(
        prepared.derivative,
        prepared.roles,
        prepared.seeded,
        prepared.captured,
        prepared.as_written,
        prepared.flat.promoted,
        options,
        recalls=recalls,
    )
    stages, simplified = list(prepared.stages), choice.joint.meta["simplified"]
    _staged(stages, "choose", lambda: (choice.form, len(choice.rewritten)), choice.build_seconds)
    _staged(stages, "joint", lambda: (choice.joint, simplified), choice.trace_seconds)
    known = {field.name: getattr(prepared, field.name) for field in fields(Prepared)}
    return Rewritten(**{**known, "stages": tuple(stages)}, choice=choice)


def _staged(
    stages: list[Stage],
    name: str,
    run: Callable[[], tuple[GraphModule, int]],
    seconds: float = 0.0,
) -> GraphModule:
    """Run a pass, note what it made, and check it."""
    start = time.perf_counter()
    module, changes = run()
    seconds += time.perf_counter() - start
    stages.append(Stage(name, copy_graph(module), changes, seconds, _MAKERS[name]))
    verify(module)
    return module


def in_full(rewritten: Rewritten, options: Options) -> Rewritten:
    """Return a specialisation with every candidate priced, whoever chose among them."""
    if not rewritten.choice.is_recalled:
        return rewritten
    again = rewrite(rewritten.captured, options, rewritten.function)
    return replace(again, names=rewritten.names)  # the guards that they are read from are gone


def _is_one_scalar(module: GraphModule, roles: Roles) -> bool:
    """Whether gradients can be computed before a cotangent is known: one scalar loss, they are
    linear in its cotangent."""
    if len(roles.differentiable) != 1:
        return False
    loss = results(module.graph)[roles.differentiable[0]]
    return isinstance(loss, Node) and all(size == 1 for size in loss.meta["val"].shape)


def _has_half_precision(module: GraphModule) -> bool:
    """Whether anything is computed in float16, whose smallest numbers gradients fall below: then
    the loss's cotangent, which a `torch.amp.GradScaler` makes large, has to come first."""
    graphs = [part.graph for part in graphs_in(module)]
    values = (value_of(node) for graph in graphs for node in graph.nodes)
    return any(getattr(value, "dtype", None) is torch.float16 for value in values)


def check_differentiability(
    module: GraphModule, n_outputs: int, differentiable: Sequence[int], active: set[Node]
) -> None:
    """Check that what carries gradients in our graph is what does in the loss as written.

    Raises:
        CaptureError: An output or a new value of an input does in one of them only.
    """
    for position, result in enumerate(results(module.graph)[:n_outputs]):
        ours = isinstance(result, Node) and result in active and is_float(result)
        if position in differentiable and not ours:
            raise CaptureError(f"output {position} requires grad as written and not when captured")
    for result in results(module.graph)[n_outputs:]:
        if isinstance(result, Node) and result in active:
            raise CaptureError(
                "the loss writes a value that carries a gradient to one of its inputs"
            )
