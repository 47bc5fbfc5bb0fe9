"""Run a program that was loaded: outputs, state updates, gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.ahead.arguments import Checker
from rewriter.ahead.manifest import GraphFile, Input, Program
from rewriter.ahead.sizes import evaluated
from rewriter.ahead.structure import leaves_in, rebuild
from rewriter.errors import OptimizeNestedError
from rewriter.gradients import (
    hand_out,
    keep_residuals,
    mark_constant,
    own_tensors,
    owned,
    pulled_back,
)

Graphs = Callable[[str], Callable[..., Sequence[Any]]]


class Runner:
    """One program of an artifact.

    Attributes:
        program: What it takes and returns.
        check: Checks inputs, and returns the sizes of the call.
    """

    def __init__(
        self, loss: str, program: Program, graphs: Graphs, constants: Mapping[str, Tensor]
    ) -> None:
        """Make one.

        Args:
            loss: What the loss is called.
            program: The record.
            graphs: Returns the code of ``"step"``, ``"pullback"`` or ``"value"``.
            constants: Member → the tensor that is kept there.
        """
        self.loss = loss
        self.program, self.check = program, Checker(program)
        self.n_early = program.n_outputs + len(program.updated)
        self._graphs, self._constants = graphs, constants

    def _run(
        self, name: str, file: GraphFile, tensors: Sequence[Tensor], sizes: Mapping[str, int]
    ) -> list[Any]:
        given = [*tensors, *(self._constants[one.member] for one in file.constants)]
        given += [torch.empty(evaluated(size, sizes), 0) for size in file.sizes]
        computed = iter(self._graphs(name)(*given))
        found: list[Any] = []
        for result in file.results:
            if result is True:
                found.append(next(computed))
            elif isinstance(result, (list, tuple)) and result[0] == "input":
                found.append(given[result[1]])
            else:
                found.append(None if result is None else evaluated(result, sizes))
        return found

    def value(self, inputs: Sequence[Tensor], sizes: Mapping[str, int]) -> Sequence[Any]:
        """Return the outputs alone; write state updates to the inputs."""
        found = self._run("value", self.program.value, inputs, sizes)
        self._update(inputs, found)
        return own_tensors(found[: self.program.n_outputs], inputs)

    def step(
        self, inputs: Sequence[Tensor], sizes: Mapping[str, int]
    ) -> tuple[Sequence[Any], list[Any]]:
        """Return outputs, and gradients or residuals; write state updates to the inputs."""
        assert self.program.step is not None
        found = self._run("step", self.program.step, inputs, sizes)
        self._update(inputs, found)
        return own_tensors(found[: self.program.n_outputs], inputs), found[self.n_early :]

    def _update(self, inputs: Sequence[Tensor], found: Sequence[Any]) -> None:
        new = found[self.program.n_outputs : self.n_early]
        for position, value in zip(self.program.updated, new, strict=True):
            inputs[position].copy_(value)

    def pull_back(
        self, residuals: Sequence[Any], cotangents: Sequence[Tensor], sizes: Mapping[str, int]
    ) -> list[Any]:
        """Return gradients from residuals and cotangents."""
        assert self.program.pullback is not None
        tensors = [x.contiguous() for x in residuals if isinstance(x, Tensor)]
        given = [*tensors, *(c.contiguous() for c in cotangents)]
        return self._run("pullback", self.program.pullback, given, sizes)

    def __call__(self, inputs: Sequence[Tensor], sizes: Mapping[str, int]) -> Sequence[Any]:
        """Return the outputs under autograd: ``backward()`` hands out gradients."""
        program = self.program
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            with torch.no_grad():
                return self.value(inputs, sizes)
        self._check_requires_grad(inputs)
        self._promote(inputs)
        if program.step is None:
            with torch.no_grad():
                outputs: Any = self.value(inputs, sizes)
        else:
            outputs = _Gradients.apply(self, sizes, *inputs)
        for position in program.hollow:
            outputs[position].requires_grad_()
        return outputs

    def value_and_grad(
        self, inputs: Sequence[Tensor], leaves: Sequence[Any], sizes: Mapping[str, int]
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return what the loss returns, and the gradients by name.

        Raises:
            TypeError: The loss returns no scalar.
        """
        self._check_scalar()
        with torch.no_grad():
            self._promote(inputs)
            if self.program.step is None:
                return self.result(self.value(inputs, sizes), inputs, leaves), {}
            outputs, rest = self.step(inputs, sizes)
            taken = {id(x) for x in inputs}
            grads = [g.clone() if id(g) in taken else g for g in rest]
        names = [self.program.inputs[i].name for i in self.program.wanted]
        found = {n: g for n, g in zip(names, grads, strict=True) if g is not None}
        return self.result(outputs, inputs, leaves), found

    def result(self, outputs: Sequence[Any], inputs: Sequence[Any], leaves: Sequence[Any]) -> Any:
        """Return what the loss returns, made of outputs, inputs and arguments."""
        found = {"output": outputs, "input": inputs, "leaf": leaves}
        return rebuild(self.program.result, lambda kind, number: found[kind][number])

    def constant(self, x: Input) -> Tensor:
        """Return the value that the artifact holds of an input."""
        assert x.stored is not None
        return self._constants[x.stored.member]

    def _promote(self, inputs: Sequence[Tensor]) -> None:
        for x, record in zip(inputs, self.program.inputs, strict=True):
            if record.is_promoted:
                x.requires_grad_()  # as the loss does

    def _check_scalar(self) -> None:
        program = self.program
        outputs = [i for kind, i in leaves_in(program.result) if kind == "output"]
        ends = [i for i in outputs if i in (*program.differentiable, *program.hollow)]
        if program.pullback is not None or len(ends) > 1:
            raise TypeError(
                f"value_and_grad: {self.loss} must return one scalar tensor that requires grad "
                "(beside any number that do not); bind it to a module, and call backward() on what "
                "you need"
            )

    def _check_requires_grad(self, inputs: Sequence[Tensor]) -> None:
        for x, record in zip(inputs, self.program.inputs, strict=True):
            if x.requires_grad and not record.has_gradient:
                raise ValueError(
                    f"{record.name} requires grad, and did not when the loss was compiled: compile "
                    f"it again, or call {record.name}.requires_grad_(False)"
                )


class _Gradients(torch.autograd.Function):
    """Hand out gradients that the step has already computed."""

    @staticmethod
    def forward(ctx: Any, runner: Runner, sizes: Mapping[str, int], *inputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.set_materialize_grads(False)
        ctx.runner, ctx.sizes = runner, sizes
        outputs, rest = runner.step(inputs, sizes)
        differentiable = runner.program.differentiable
        if runner.program.pullback is None:
            ctx.gradients = owned(rest)
        else:
            keep_residuals(ctx, rest, [outputs[i] for i in differentiable])
        mark_constant(ctx, outputs, differentiable)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise OptimizeNestedError(
                "create_graph=True: an artifact holds the loss and its first derivative; "
                "differentiate the decorated loss instead"
            )
        runner: Runner = ctx.runner
        program = runner.program
        sizes = ctx.sizes
        given = [cotangents[i] for i in program.differentiable]
        if program.pullback is None:
            grads = hand_out(ctx, given[0])
        else:
            grads = pulled_back(ctx, given, lambda rest, c: runner.pull_back(rest, c, sizes))
        ends = [str(i) for i, c in enumerate(cotangents) if c is not None]
        reached = {i for end in ends for i in program.reached.get(end, ())}
        by_input = dict(zip(program.wanted, grads, strict=True))
        found = (by_input[i] if i in reached else None for i in range(len(program.inputs)))
        return (None, None, *found)
