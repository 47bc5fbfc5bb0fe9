"""See what one call of a loss is: its graphs, where its inputs come from, what it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.graph import hint, placeholders, results, value_of
from passes.linearize import split
from rewriter.ahead.dynamic import Declared, check_declared
from rewriter.capture import refusing_side_effects
from rewriter.checking import check_step
from rewriter.errors import CaptureError
from rewriter.layer import Layers
from rewriter.naming import modules_in
from rewriter.options import Options
from rewriter.recorder import Recorder
from rewriter.rewrite import Rewritten, rewrite
from rewriter.specialising import Specialising, gradients_on
from rewriter.step import Step


@dataclass(frozen=True)
class Observed:
    """One call of a loss.

    Attributes:
        rewritten: What its graphs are.
        inputs: The tensors it reads, by the positions of the graphs' inputs; sizes are numbers.
        outputs: What stands for each of the graphs' outputs in ``result``.
        result: What it returned.
    """

    rewritten: Rewritten
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    result: Any


class _Observer(Specialising):
    """Captures a loss, and returns tensors without memory in place of its outputs."""

    quiet = True

    def __init__(
        self, function: Callable[..., Any], options: Options, declared: Sequence[Declared]
    ) -> None:
        super().__init__(function, options, Layers(options))
        if options.capture == "trace":
            self._is_by_dynamo = False
            self._compiled = Recorder(function, self._built, check=options.check, dynamic=False)
        self.declared = declared
        self.given: Sequence[Any] = ()
        self.seen: list[tuple[Rewritten, tuple[Any, ...], tuple[Any, ...]]] = []

    def _build(self, captured: GraphModule) -> Any:
        rewritten = rewrite(captured, self.options, self.name)
        check_declared(rewritten, self.given, self.declared)
        return lambda *inputs: self._note(rewritten, inputs)

    def _built(self, captured: GraphModule, inputs: Any) -> Any:
        self.given = inputs
        return super()._built(captured, inputs)

    def _modules(self, args: Any, kwargs: Any) -> Iterable[nn.Module]:
        return modules_in(self.as_written, args, kwargs)

    def _note(self, rewritten: Rewritten, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.options.check:
            step = Step(
                rewritten,
                replace(self.options, backend="eager", mode="default", check=False, verify=False),
            )
            check_step(rewritten, step, inputs)
        found = results(rewritten.joint.graph)[: rewritten.roles.n_outputs]
        outputs = tuple(_without_memory(value_of(node)) for node in found)
        self.seen.append((rewritten, inputs, outputs))
        return outputs

    def observe(self, args: Any, kwargs: Any) -> Observed:
        with gradients_on(), refusing_side_effects():
            result = self._captured_call(args, kwargs)
        if len(self.seen) != 1:
            raise CaptureError("the loss computes no tensors")
        return Observed(*self.seen[0], result)


def observe(
    function: Callable[..., Any],
    options: Options,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    declared: Sequence[Declared] = (),
) -> Observed:
    """Capture a call of a loss; nothing of it is run and no state is touched.

    Args:
        function: The loss as written.
        options: How it is optimised.
        args: Its arguments.
        kwargs: Its keyword arguments.
        declared: Sizes that may change.

    Raises:
        CaptureError: It cannot be captured as one graph, or it does something beside computing
            tensors, such as assigning an attribute.
    """
    observer = _Observer(function, replace(options, dynamic=False), declared)
    return observer.observe(tuple(args), dict(kwargs))


@contextlib.contextmanager
def in_mode(modules: Sequence[nn.Module], mode: str | None) -> Iterator[None]:
    """Put modules into train or eval mode for the block; None leaves them as they are."""
    before = {m: m.training for root in modules for m in root.modules()}
    try:
        if mode is not None:
            for module in modules:
                module.train(mode == "train")
        yield
    finally:
        for module, training in before.items():
            module.training = training


def graphs_of(rewritten: Rewritten) -> dict[str, GraphModule]:
    """Return the graphs of a specialisation: ``value``, and ``step`` if it has gradients, and
    ``pullback`` if cotangents are inputs."""
    roles = rewritten.roles
    graphs = {"value": rewritten.value_graph()}
    if not roles.differentiable:
        return graphs
    if not rewritten.seeded:
        return {"step": rewritten.joint, **graphs}
    n_inputs = len(placeholders(rewritten.derivative.graph))
    late = placeholders(rewritten.joint.graph)[n_inputs:]
    halves = split(rewritten.joint, late, roles.n_outputs + len(roles.updated))
    for node in placeholders(halves.tangent.graph):
        value = value_of(node)
        if isinstance(value, Tensor):
            # Code is compiled for strides, and these are what the pullback is given.
            node.meta["val"] = torch.empty_like(value, memory_format=torch.contiguous_format)
    return {"step": halves.primal, "pullback": halves.tangent, **graphs}


def _without_memory(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return hint(value)
    return torch.empty([hint(size) for size in value.shape], dtype=value.dtype, device="meta")
