"""One specialisation of a decorated loss at run time."""

from __future__ import annotations

import contextvars
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import is_random, needs, placeholders, results
from passes.linearize import Linearization, split
from rewriter.batched import one_by_one
from rewriter.checking import check_step
from rewriter.codegen import Compiled
from rewriter.errors import NestedGradientWarning, OptimizeNestedError
from rewriter.generators import Generators, generators_restored
from rewriter.options import Options
from rewriter.race import fastest, race, with_form, with_seconds
from rewriter.rewrite import Rewritten
from rewriter.start import Tiered, code_for
from rewriter.stateful import levels_restored

# Whether the caller of the decorated loss has gradients switched off: capture happens with them on.
value_only: contextvars.ContextVar[bool] = contextvars.ContextVar("value_only", default=False)


# Whether the caller wants to know what would be run, instead of running it.
explaining: contextvars.ContextVar[bool] = contextvars.ContextVar("explaining", default=False)


class Explained(BaseException):
    """A step was found for the caller's arguments; it has not run.

    Attributes:
        rewritten: What it is made of.
        inputs: What the graph would get.
    """

    def __init__(self, rewritten: Rewritten, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.rewritten, self.inputs = rewritten, inputs


class Step:
    """Compute the loss and its gradients for inputs that pass one set of guards.

    Called with the captured graph's inputs, returns its outputs. Gradients are computed with the
    loss and handed out by ``backward()``; where the loss has several differentiable outputs, or one
    that is no scalar, a second graph computes them when the cotangents are known.
    """

    def __init__(self, rewritten: Rewritten, options: Options) -> None:
        self.rewritten, self.options = rewritten, options
        roles = rewritten.roles
        self.roles = roles
        self.n_early = roles.n_outputs + len(roles.updated)
        self.is_random = any(is_random(node) for node in rewritten.joint.graph.nodes)
        self.halves: Linearization | None = None
        if rewritten.seeded and roles.differentiable:
            n_inputs = len(placeholders(rewritten.derivative.graph))
            late = placeholders(rewritten.joint.graph)[n_inputs:]
            self.halves = split(rewritten.joint, late, self.n_early)
        self._forward: Compiled | None = None
        self._backward: Compiled | None = None
        self._value: Compiled | None = None
        self._unchecked = options.check
        self._unmeasured = options.is_measured and bool(rewritten.choice.finalists)
        self._warnings = list(rewritten.detached)

    def _compile(self, module: GraphModule, part: str) -> Compiled:
        name = self.rewritten.function or "the loss"
        return code_for(module, self.options, f"{name} ({part})", self._check_next)

    def _check_next(self) -> None:
        self._unchecked = self.options.check

    @property
    def tiers(self) -> tuple[str, ...]:
        """What runs each graph at present, with ``start="tiered"``."""
        made = (self._forward, self._backward, self._value)
        return tuple(str(code) for code in made if isinstance(code, Tiered))

    def prepare(self) -> Step:
        """Compile what every call needs; return self."""
        if self.roles.differentiable:
            if self.halves:
                self._forward = self._compile(self.halves.primal, "forward graph")
            else:
                self._forward = self._compile(self.rewritten.joint, "joint graph")
        return self

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if explaining.get():
            raise Explained(self.rewritten, inputs)
        while self._warnings:
            warnings.warn(self._warnings.pop(0), NestedGradientWarning, stacklevel=2)
        for position in self.rewritten.flat.promoted:
            inputs[position].requires_grad_()  # as the loss as written does
        if self._unmeasured and not value_only.get():
            self._unmeasured = False
            self._take_fastest(inputs)
        if self._unchecked:
            self._unchecked = False
            check_step(self.rewritten, self._run, inputs)
        return self._run(*inputs)

    def _take_fastest(self, inputs: Sequence[Any]) -> None:
        """Become the finalist that is the fastest on these inputs; nothing else is changed."""
        finalists = self.rewritten.choice.finalists
        steps = [Step(with_form(self.rewritten, form), self.options) for form in finalists]
        steps[0]._forward, steps[0]._backward = self._forward, self._backward
        seconds = race([functools.partial(step.rehearse, inputs) for step in steps], inputs)
        best = steps[fastest(seconds)]
        self.rewritten = with_seconds(best.rewritten, seconds)
        self.halves, self.is_random = best.halves, best.is_random
        self._forward, self._backward = best._forward, best._backward

    def rehearse(self, inputs: Sequence[Any]) -> None:
        """Compute all that a call and its backward pass compute, and drop it: no state is
        written."""
        out = self._computed(inputs)
        if self.halves is not None:
            ends = [torch.ones_like(out[i]) for i in self.roles.differentiable]
            self.pull_back(out[self.n_early :], ends)

    def _run(self, *inputs: Any) -> Sequence[Any]:
        if value_only.get():
            return self.value(inputs)
        if self.roles.differentiable:
            outputs: Any = _StepFunction.apply(self, *inputs)
        else:
            outputs = self.value(inputs)
        for position in self.rewritten.as_written.hollow:
            outputs[position].requires_grad_()
        return outputs

    def value(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Compute outputs and state updates, no gradients."""
        if self._value is None:
            self._value = self._compile(self.rewritten.value_graph(), "value")
        with torch.no_grad():
            out = self._value(*inputs)
            self.update(inputs, out)
        return own_tensors(out[: self.roles.n_outputs], inputs)

    def forward(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Return the outputs, and the gradients or the residuals they need."""
        out = self._computed(inputs)
        self.update(inputs, out)
        return own_tensors(out[: self.roles.n_outputs], inputs), out[self.n_early :]

    def _computed(self, inputs: Sequence[Any]) -> Sequence[Any]:
        if self._forward is None:
            self.prepare()
        assert self._forward is not None
        return self._forward(*inputs)

    def update(self, inputs: Sequence[Any], out: Sequence[Any]) -> None:
        """Write new values to the inputs that the loss writes to."""
        for position, value in zip(
            self.roles.updated, out[self.roles.n_outputs : self.n_early], strict=True
        ):
            inputs[position].copy_(value)

    def pull_back(self, residuals: Sequence[Any], cotangents: Sequence[Tensor]) -> Sequence[Any]:
        """Return the gradients from residuals and cotangents."""
        assert self.halves is not None
        if self._backward is None:
            self._backward = self._compile(self.halves.tangent, "backward graph")
        return self._backward(*residuals, *(c.contiguous() for c in cotangents))

    def reached_from(self, cotangents: Sequence[Tensor | None]) -> set[int]:
        """Return the inputs that eager gives a gradient when these outputs are differentiated."""
        reached = self.rewritten.as_written.reached
        return {i for end in reached if cotangents[end] is not None for i in reached[end]}


def own_tensors(outputs: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Give the caller tensors that share no memory with the inputs' by accident of
    simplification."""
    seen = {id(x) for x in inputs}
    result = []
    for value in outputs:
        taken = isinstance(value, Tensor) and (id(value) in seen or value._is_view())
        seen.add(id(value))
        result.append(value.clone() if taken else value)
    return tuple(result)


class _StepFunction(torch.autograd.Function):
    """Hand out gradients that the step has already computed."""

    @staticmethod
    def forward(ctx: Any, step: Step, *inputs: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.set_materialize_grads(False)
        ctx.step, ctx.inputs = step, inputs
        ctx.versions = [x._version if isinstance(x, Tensor) else None for x in inputs]
        ctx.generator = Generators.now() if step.is_random else None
        outputs, rest = step.forward(inputs)
        for position in step.roles.updated:
            ctx.versions[position] = inputs[position]._version
        keep(ctx, outputs, rest, step.roles.differentiable)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        step: Step = ctx.step
        if torch.is_grad_enabled():
            return (None, *_differentiate_as_written(ctx, cotangents))
        pull_back = None if step.halves is None else step.pull_back
        grads = handed_out(ctx, cotangents, pull_back)
        reached = step.reached_from(cotangents)
        by_input = dict(zip(step.roles.wanted, grads, strict=True))
        return (None, *(by_input[i] if i in reached else None for i in range(len(ctx.inputs))))


def keep(
    ctx: Any, outputs: Sequence[Any], rest: Sequence[Any], differentiable: Sequence[int]
) -> None:
    """Keep for the backward pass what a step has computed for it.

    Args:
        ctx: The context of the step's `torch.autograd.Function`.
        outputs: What the step returns.
        rest: The gradients, or the residuals that they need.
        differentiable: Positions of the outputs that have a gradient.
    """
    ctx.present = [isinstance(value, Tensor) for value in rest]
    ctx.plain = [None if isinstance(value, Tensor) else value for value in rest]
    ctx.save_for_backward(*(value for value in rest if isinstance(value, Tensor)))
    ctx.like = {i: (outputs[i].shape, outputs[i].dtype, outputs[i].device) for i in differentiable}
    ctx.mark_non_differentiable(
        *(u for i, u in enumerate(outputs) if i not in differentiable and isinstance(u, Tensor))
    )


def handed_out(
    ctx: Any,
    cotangents: Sequence[Tensor | None],
    pull_back: Callable[[list[Any], Sequence[Tensor]], Sequence[Any]] | None,
) -> Sequence[Any]:
    """Return the gradients that belong to cotangents, from what `keep` has kept.

    Args:
        ctx: The context.
        cotangents: One for each output; None for zero.
        pull_back: Computes gradients from residuals and cotangents; None if what was kept are the
            gradients of one scalar.
    """
    saved = iter(ctx.saved_tensors)
    rest = [
        next(saved) if present else plain
        for present, plain in zip(ctx.present, ctx.plain, strict=True)
    ]
    given = [cotangents[i] for i in ctx.like]
    if pull_back is None:
        if given[0] is None:
            return [None] * len(rest)
        return one_by_one(lambda c: scaled(rest, c), [given[0]])
    full = [
        torch.zeros(shape, dtype=dtype, device=device) if g is None else g
        for g, (shape, dtype, device) in zip(given, ctx.like.values(), strict=True)
    ]
    return one_by_one(lambda *c: pull_back(rest, c), full)


def scaled(grads: Sequence[Tensor | None], cotangent: Tensor) -> list[Tensor | None]:
    """Multiply every gradient by the loss's cotangent, into new tensors: the caller may keep and
    change them."""
    factor = cotangent.reshape(())
    there = [g for g in grads if g is not None]
    scaled = iter(torch._foreach_mul(there, factor) if there else ())
    return [None if g is None else next(scaled) for g in grads]


def _differentiate_as_written(ctx: Any, cotangents: Sequence[Tensor | None]) -> list[Any]:
    """Gradients that can be differentiated once more (`create_graph=True`): run the loss as written
    again, under autograd.

    Raises:
        OptimizeNestedError: Something the loss reads was changed since.
    """
    step: Step = ctx.step
    for x, version in zip(ctx.inputs, ctx.versions, strict=True):
        if isinstance(x, Tensor) and x._version != version:
            raise OptimizeNestedError(
                f"create_graph=True: a tensor of shape {tuple(x.shape)} that the loss reads was "
                "changed in place after the loss was computed; compute the loss again before "
                "differentiating it twice"
            )
    if step.roles.updated and _reads_updated_state(step):
        raise OptimizeNestedError(
            "create_graph=True: the value of this loss depends on a buffer that it also updates; "
            "call loss.as_written instead"
        )
    inputs = list(ctx.inputs)
    for position in step.roles.updated:
        inputs[position] = inputs[position].detach().clone()
    with generators_restored(ctx.generator), levels_restored():
        outputs = list(step.rewritten.captured(*inputs))
    pairs = [
        (outputs[i], cotangents[i]) for i in step.roles.differentiable if cotangents[i] is not None
    ]
    wanted = [inputs[i] for i in step.roles.wanted]
    grads = torch.autograd.grad(
        [u for u, _ in pairs],
        wanted,
        [c for _, c in pairs],
        create_graph=True,
        allow_unused=True,
    )
    by_input = dict(zip(step.roles.wanted, grads, strict=True))
    return [by_input.get(i) for i in range(len(inputs))]


def _reads_updated_state(step: Step) -> bool:
    """Whether an output or a gradient depends on the old value of an input that the loss writes
    to."""
    joint = step.rewritten.joint
    found = results(joint.graph)
    read = needs(
        node
        for index, node in enumerate(found)
        if isinstance(node, Node) and not step.roles.n_outputs <= index < step.n_early
    )
    inputs = placeholders(joint.graph)
    return any(inputs[i] in read for i in step.roles.updated)
