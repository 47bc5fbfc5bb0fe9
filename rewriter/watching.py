"""Compare the derivatives of a tower with plain autograd when each is first asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import is_random
from passes.levels import Cotangent, Level, run_and_keep
from passes.tracing import without_fused_kernels
from rewriter.as_written import without_checkpoints
from rewriter.errors import OptimizeNestedError
from rewriter.generators import Generators, generators_restored
from rewriter.stateful import has_saved_tensor_hooks, levels_restored
from rewriter.verifying import SAME, Verdict, coarsest, failed, tell, verify_code


@dataclass
class Watch:
    """What is known of a tower's numbers.

    Attributes:
        captured: The module's call as Dynamo captured it.
        base: The level that it is.
        name: The module, for messages.
        strict: Whether a difference is an error.
        verdict: What came of comparing it with itself as written; None before its first call.
    """

    captured: GraphModule
    base: Level
    name: str
    strict: bool
    verdict: Verdict | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether the module runs as written from now on."""
        return self.verdict is not None and self.verdict.is_wrong

    def is_to_be_raised(self, error: Exception) -> bool:
        """Whether an error says what is the matter by itself, or another run would not help."""
        is_said = isinstance(error, (OptimizeNestedError, torch.OutOfMemoryError))
        return self.strict or is_said or has_saved_tensor_hooks()

    def failed(self, error: Exception) -> None:
        """Let the module run as written from now on: something of ours has failed."""
        self.found(failed(self.name, self.captured, error))

    def found(self, verdict: Verdict) -> None:
        """Take note of a verdict.

        Raises:
            CheckFailed: With ``strict``: the tower differs from the module as written.
        """
        tell(verdict, self.name, strict=self.strict)
        if not self.is_wrong:
            self.verdict = verdict


@dataclass(frozen=True)
class Seen:
    """One call of a level, to be run again.

    Attributes:
        inputs: What it was called with, before it wrote to any.
        start: Where the random generators began, if it draws.
    """

    inputs: list[Any]
    start: Generators | None

    @staticmethod
    def of(level: Level, inputs: Sequence[Any], updated: Sequence[int]) -> Seen:
        """Keep a call that is about to run."""
        own = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        for i in updated:
            own[i] = own[i].clone()
        draws = any(is_random(node) for node in level.graph.graph.nodes)
        return Seen(own, Generators.now() if draws else None)


@dataclass(frozen=True)
class Pullback:
    """One pullback of a level of a tower, as autograd would compute it.

    Attributes:
        watch: What is known of the tower.
        level: The level that is pulled back.
        seen: Its call.
        given: What is known of each cotangent, of outputs and residuals.
        needed: Positions of the inputs whose gradients are asked for.
        cotangents: Those that are given.
        inputs: Those of the call, as autograd knows them.
    """

    watch: Watch
    level: Level
    seen: Seen
    given: Sequence[Cotangent]
    needed: Sequence[int]
    cotangents: Sequence[Tensor]
    inputs: Sequence[Any]

    def compared(self, ours: Sequence[Any]) -> Sequence[Any]:
        """Return a tower's gradients; where they are not autograd's, autograd's.

        Raises:
            CheckFailed: With ``strict``: the two differ.
        """

        def reference(*values: Any) -> list[Any]:
            n = len(self.seen.inputs)
            own = [x.detach() if isinstance(x, Tensor) else x for x in values[:n]]
            for i in self.needed:
                own[i].requires_grad_()
            return self._of(own, values[n:])

        given, unit = [*self.seen.inputs, *self.cotangents], coarsest(self.level.graph)
        found, verdict = verify_code(ours, reference, given, "a gradient of a module", unit)
        if self.watch.verdict in (None, SAME) or verdict.is_wrong:
            self.watch.found(verdict)
        if not (verdict.is_wrong and torch.is_grad_enabled()):
            return found
        return self.as_written()

    def as_written(self) -> list[Any]:
        """Return autograd's gradients, for another derivative too."""
        own = [x.view_as(x) if isinstance(x, Tensor) else x for x in self.inputs]
        for i in self.needed:
            if not own[i].requires_grad:
                own[i] = own[i].detach().requires_grad_()
        return self._of(own, self.cotangents)

    def _of(self, own: list[Any], cotangents: Sequence[Tensor]) -> list[Any]:
        """Return the gradients at other inputs, for other cotangents."""
        create_graph, start = torch.is_grad_enabled(), self.seen.start
        with _as_then(start), torch.enable_grad(), without_fused_kernels(), levels_restored():
            seeds = iter(cotangents)
            pairs = [
                (end, next(seeds))
                for end, kind in zip(self._ends(own), self.given, strict=False)
                if kind is Cotangent.GIVEN
            ]
            pairs = [(end, seed) for end, seed in pairs if end.requires_grad]
            if not pairs:
                return [None] * len(self.needed)
            return list(
                torch.autograd.grad(
                    [end for end, _ in pairs],
                    [own[i] for i in self.needed],
                    [seed for _, seed in pairs],
                    create_graph=create_graph,
                    allow_unused=True,
                )
            )

    def _ends(self, own: Sequence[Any]) -> Sequence[Any]:
        """Return outputs and residuals; the module's own outputs where no residual has a
        cotangent."""
        level, n_outputs = self.level, self.level.n_outputs
        of_residuals = self.given[n_outputs:]
        if level is self.watch.base and Cotangent.GIVEN not in of_residuals:
            # It writes to its state.
            return list(without_checkpoints(self.watch.captured)(*map(_copied, own)))
        outputs, residuals = run_and_keep(level.graph, level.residuals, own)
        return [*outputs[:n_outputs], *residuals]


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


@contextlib.contextmanager
def _as_then(start: Generators | None) -> Iterator[None]:
    if start is None:
        yield
        return
    with generators_restored(start):
        yield
