"""A level in segments: one of its results is computed from another, or is a leaf that the module
makes and returns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from passes import derivative
from passes.graph import placeholders, results
from passes.levels import Level
from passes.nest import active_nodes
from passes.segments import read_results, segments
from rewriter.errors import CaptureError
from rewriter.gradients import own_tensors
from rewriter.options import Options
from rewriter.stateful import is_inside_level
from rewriter.tower import CompiledLevel
from rewriter.watching import Watch


def base_of(
    level: Level,
    options: Options,
    updated: Sequence[int],
    carrying: Collection[int],
    hollow: Collection[int],
    watch: Watch | None,
) -> CompiledLevel:
    """Return level 0 of a tower, in segments where it takes several.

    Args:
        level: The module's call.
        options: How it is optimised.
        updated: Positions of the inputs that it writes to.
        carrying: Positions of the outputs that require grad as written.
        hollow: Those of them that lead to no input, but to a leaf that the module makes.
        watch: Compares its derivatives with autograd's, if asked for.
    """
    found = results(level.graph.graph)
    cuts = read_results(level.graph, {found[i] for i in carrying if isinstance(found[i], Node)})
    if not cuts and not hollow:
        return CompiledLevel(level, options, updated, watch)
    return Chain(level, options, updated, watch, cuts, {found[i] for i in hollow})


@dataclass(frozen=True)
class _Part:
    """A segment: the values that it takes, by their positions among all values so far, and those
    among all that it makes whose history begins here."""

    compiled: CompiledLevel
    takes: tuple[int, ...]
    begins: tuple[int, ...]


class Chain(CompiledLevel):
    """A level whose results are computed one after the other, where one is computed from another.

    Args:
        level: The whole.
        options: How it is optimised.
        updated: Positions of the inputs that it writes to.
        watch: Compares its derivatives with autograd's, if asked for.
        cuts: The results that others are computed from.
        hollow: The results that require grad and lead to no input.
    """

    def __init__(
        self,
        level: Level,
        options: Options,
        updated: Sequence[int],
        watch: Watch | None,
        cuts: Sequence[Node],
        hollow: Collection[Node],
    ) -> None:
        super().__init__(level, options, updated, watch)
        module = level.graph
        inputs, found = placeholders(module.graph), results(module.graph)
        active = active_nodes(module, {*(inputs[i] for i in level.wanted), *hollow})
        at = {node: i for i, node in enumerate(inputs)}
        self._parts: list[_Part] = []
        for segment in segments(module, cuts):
            wanted = [i for i, node in enumerate(segment.takes) if node in active]
            own = Level(segment.module, len(segment.gives), wanted)
            part = CompiledLevel(own, options, watch=watch)
            takes = tuple(at[node] for node in segment.takes)
            at |= {node: len(at) + i for i, node in enumerate(segment.gives)}
            begins = tuple(at[node] for node in segment.gives if node in hollow)
            self._parts.append(_Part(part, takes, begins))
        self._ends = [at[node] if isinstance(node, Node) else None for node in found]
        self._constants = [None if isinstance(node, Node) else node for node in found]
        outputs = found[: level.n_outputs]
        self._leaves = [
            i
            for i, node in enumerate(outputs)
            if node in hollow and isinstance(node, Node) and node.target is derivative.stop
        ]

    def value(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Return the outputs, nothing kept; a leaf is one under `no_grad` too."""
        out = list(super().value(inputs))
        if self._leaves:
            out = list(own_tensors(out, inputs))
        for i in self._leaves:
            out[i].requires_grad_()
        return out

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """Return the outputs; they can be differentiated if gradients are on, with respect to one
        another too.

        Raises:
            CaptureError: A leaf is made inside of a transform, where PyTorch refuses it.
        """
        is_inside = is_inside_level()
        if is_inside and any(part.begins for part in self._parts):
            raise CaptureError("a module that makes a leaf, inside of a torch.func transform")
        if not is_inside and not torch.is_grad_enabled():
            return self.value(inputs)
        values = list(inputs)
        for i in self.updated:
            values[i] = inputs[i].clone()
        for part in self._parts:
            out = part.compiled(*(values[i] for i in part.takes))
            values += own_tensors(list(out), inputs) if part.begins else out
            for i in part.begins:
                values[i].requires_grad_()
        found = [
            constant if end is None else values[end]
            for end, constant in zip(self._ends, self._constants, strict=True)
        ]
        with torch.no_grad():
            self._update([inputs[i] for i in self.updated], found)
        return found[: self.level.n_outputs]

    def walk(self, order: int = 0, what: str = "value") -> Any:
        """Give the levels of each segment; see `CompiledLevel.walk`."""
        for number, part in enumerate(self._parts):
            yield from part.compiled.walk(order, what if not number else f"{what}, continued")
