"""One specialisation of a decorated loss at run time."""

from __future__ import annotations

import contextvars
import functools
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import is_random, needs, placeholders, results, value_of
from passes.linearize import Linearization, split
from passes.price import count_matmuls, evaluated, size_hints
from rewriter.as_written import bytes_kept, run_in_place, without_checkpoints
from rewriter.capture import is_observed, is_parameter
from rewriter.checking import check_step
from rewriter.codegen import Compiled, compile_graph
from rewriter.data import replaced_data
from rewriter.errors import NestedGradientWarning, NotRewritten, OptimizeNestedError
from rewriter.flags import left_off
from rewriter.generators import Generators, generators_restored
from rewriter.gradients import (
    Ownership,
    hand_out,
    keep_residuals,
    mark_constant,
    own_tensors,
    pulled_back,
    uncompiled,
)
from rewriter.modes import is_watched, set_aside_here, through_modes
from rewriter.options import Options
from rewriter.race import fastest, race, with_form, with_seconds
from rewriter.rewrite import Rewritten
from rewriter.speculating import OtherBranch, branches_of
from rewriter.start import Tiered, code_for, is_waiting
from rewriter.stateful import any_wrapped, has_saved_tensor_hooks, levels_restored, unwrap_dead
from rewriter.turns import Turns
from rewriter.verifying import Verdict, coarsest, failed, tell, verify_code, verify_step

# Whether the caller of the decorated loss has gradients switched off: capture happens with them on.
value_only: contextvars.ContextVar[bool] = contextvars.ContextVar("value_only", default=False)


# Whether the caller wants to know what would be run, instead of running it.
explaining: contextvars.ContextVar[bool] = contextvars.ContextVar("explaining", default=False)


_VALUE, _GRADIENTS = "value", "gradients"


class Explained(BaseException):
    """A step was found for the caller's arguments; it has not run.

    Attributes:
        rewritten: What it is made of.
        inputs: What the graph would get.
    """

    def __init__(self, rewritten: Rewritten, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.rewritten, self.inputs = rewritten, inputs


class CaptureAgain(Exception):
    """A specialisation cannot be had as it was begun; nothing of this call has run."""


class Step:
    """Compute the loss and its gradients for inputs that pass one set of guards.

    Called with the captured graph's inputs, returns its outputs. Gradients are computed with the
    loss and handed out by ``backward()``; where the loss has several differentiable outputs, or one
    that is no scalar, a second graph computes them when the cotangents are known.
    """

    def __init__(self, rewritten: Rewritten, options: Options) -> None:
        self.rewritten, self.options = rewritten, options
        self.roles = roles = rewritten.roles
        self.is_random = any(is_random(node) for node in rewritten.joint.graph.nodes)
        self.n_early = roles.n_outputs + len(roles.updated)
        self.halves: Linearization | None = None
        self._ownership = Ownership(roles.n_outputs, self.n_early)
        if rewritten.seeded and roles.differentiable:
            n_inputs = len(placeholders(rewritten.derivative.graph))
            late = placeholders(rewritten.joint.graph)[n_inputs:]
            self.halves = split(rewritten.joint, late, self.n_early)
            self._ownership = Ownership(roles.n_outputs, None)
        self._unchecked = _parts(options)
        self.verdict: Verdict | None = None
        self._unmeasured = options.is_measured and bool(rewritten.choice.finalists)
        inputs = placeholders(rewritten.derivative.graph)
        tensors = [i for i, x in enumerate(inputs) if isinstance(value_of(x), Tensor)]
        # CUDA graphs return memory of their own.
        self._is_fixed = all(_is_fixed_on_cpu(value_of(x)) for x in inputs)
        self._is_settled = False
        self._is_wrapped: bool | None = None
        captured = placeholders(rewritten.captured.graph)
        self._parameters = [i for i, x in enumerate(captured) if is_parameter(x)]
        self._hollow, self._promoted = rewritten.as_written.hollow, rewritten.flat.promoted
        self._left_off = left_off(rewritten.captured)
        self._replaced = replaced_data(rewritten.captured.graph)
        self.tensors, self._wanted = _picker(tensors), _picker(roles.wanted)
        self._forward: Compiled | None = None
        self._backward: Compiled | None = None
        self._value: Compiled | None = None
        self.race = _race(rewritten, options)
        self._is_raced = self.race is not None
        self._is_slower = False
        self._shapes: list[torch.Size] | None = None
        self._warnings = list(rewritten.detached)
        self._is_compared = False
        self._branches = branches_of(rewritten.captured)
        self._first_condition = roles.n_outputs - len(self._branches)

    def _compile(self, module: GraphModule, part: str, static: Sequence[int] = ()) -> Compiled:
        name = self.rewritten.function or "the loss"
        return code_for(module, self.options, f"{name} ({part})", self._check_next, static)

    def _check_next(self) -> None:
        self._unchecked = _parts(self.options)

    @property
    def tiers(self) -> tuple[str, ...]:
        """What runs each graph at present, with ``start="tiered"``."""
        made = (self._forward, self._backward, self._value)
        return tuple(str(code) for code in made if isinstance(code, Tiered))

    def prepare(self) -> Step:
        """Compile what every call needs; return self."""
        if self.roles.differentiable:
            if self.halves:
                graph, part = self.halves.primal, "forward graph"
            else:
                graph, part = self.rewritten.joint, "joint graph"
            self._forward = self._compile(graph, part, self._parameters)
        return self

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if explaining.get():
            raise Explained(self.rewritten, inputs)
        return self._on_condition(inputs) if self._branches else self._called(inputs)

    def _called(self, inputs: Sequence[Any]) -> Sequence[Any]:
        if self._is_wrapped is None:  # guards ask for the same at each call
            self._is_wrapped = any_wrapped(self.tensors(inputs))
        if self._warnings and not value_only.get():
            self._warn()
        for position in self._promoted:
            inputs[position].requires_grad_()  # as the loss as written does
        if self._unmeasured and not value_only.get():
            self._unmeasured = False
            self._take_fastest(inputs)
        if self._unchecked and (_GRADIENTS in self._unchecked or value_only.get()):
            self._compare(inputs)
        try:
            if set_aside_here():
                return through_modes(self._run, *inputs)
            if self._is_raced and not value_only.get():
                return self._in_turns(inputs)
            return self._run(*inputs)
        except Exception as error:
            return self._rescued(error, inputs)
        finally:
            for position in self._left_off:
                inputs[position].requires_grad_(False)

    def _on_condition(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Return the outputs of a call that takes the branches which this step is made for.

        Raises:
            OtherBranch: It takes others; nothing of it has been done.
        """
        before = Generators.now() if self.is_random else None
        switched = [inputs[i] for i in {*self._promoted, *self._left_off}]
        flags = [x.requires_grad for x in switched]
        try:
            return self._called(inputs)[: self._first_condition]
        except BaseException:
            if before is not None:
                before.set()
            for x, flag in zip(switched, flags, strict=True):
                x.requires_grad_(flag)
            raise

    def _look_at_conditions(self, out: Sequence[Any]) -> None:
        conditions = out[self._first_condition : self.roles.n_outputs]
        if len(conditions) > 1 and all(c.is_cuda for c in conditions):  # wait for the device once
            conditions = torch.stack([c.reshape(()) for c in conditions]).tolist()
        for condition, branch in zip(conditions, self._branches, strict=True):
            if not condition:
                raise OtherBranch(branch.where)

    def _in_turns(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run the graph or the loss as written, whose turn it is, until the clock has decided."""
        race = self.race
        assert race is not None
        is_told = self.verdict is not None and self.verdict.is_wrong
        if race.is_over or is_told:
            self._is_raced = False
            self._is_slower = race.is_over and race.winner == 1
            return self._run(*inputs)
        if self._forward is None or is_waiting(self._forward) or is_observed():
            return self._run(*inputs)
        shapes = [x.shape for x in self.tensors(inputs)]
        if self._shapes is None:  # the call may still compile its backward pass
            self._shapes = shapes
            return self._run(*inputs)
        if shapes != self._shapes:
            return self._run(*inputs)
        return race.run((self._run, self._as_written)[race.turn], inputs, {})

    def _as_written(self, *inputs: Any) -> Sequence[Any]:
        return run_in_place(self.rewritten.captured, inputs, value_only=value_only.get())

    def _rescued(self, error: Exception, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run the loss as written in place of what has failed; where it runs, the fault is ours,
        and all later calls do.

        Raises:
            Exception: What the loss as written raises; with ``strict``, what our code did.
        """
        if self.options.strict or _is_to_be_raised(error) or has_saved_tensor_hooks():
            raise error
        if self._branches:
            # On the other side of a branch there may be no value, for a `cholesky` say.
            raise OtherBranch from error
        captured = self.rewritten.captured
        outputs = run_in_place(captured, inputs, value_only=value_only.get())
        self._give_up(error)
        return outputs

    def _give_up(self, error: Exception) -> None:
        name = self.rewritten.function
        self.verdict = failed(name, self.rewritten.captured, error)
        tell(self.verdict, name, strict=False)

    def _warn(self) -> None:
        """Say what the gradient of the loss does not see.

        Raises:
            NotRewritten: With ``strict``.
        """
        if self.options.strict:
            raise NotRewritten(f"strict=True: {self._warnings[0]}")
        while self._warnings:
            warnings.warn(self._warnings.pop(0), NestedGradientWarning, stacklevel=3)

    def _compare(self, inputs: Sequence[Any]) -> None:
        """Compare what this call runs with the loss as written, if it runs for the first time.

        Raises:
            CheckFailed: With ``check``, or ``strict``: they differ.
        """
        is_value = value_only.get() or not self.roles.differentiable
        part = _VALUE if is_value else _GRADIENTS
        if part not in self._unchecked or is_observed() or set_aside_here():
            return
        if self.options.check:
            self._unchecked -= {part}
            check_step(self.rewritten, self._run, inputs, value_only=is_value)
            return
        self._is_compared = True
        try:
            found = verify_step(self.rewritten, self._run, inputs, value_only=is_value)
        finally:
            self._is_compared = False
        tell(found, self.rewritten.function, strict=self.options.strict)
        self._unchecked -= {part}
        if self.verdict is None or not self.verdict.told:
            self.verdict = found

    def _take_fastest(self, inputs: Sequence[Any]) -> None:
        """Become the finalist that is the fastest on these inputs; nothing else is changed."""
        finalists = self.rewritten.choice.finalists
        steps = [Step(with_form(self.rewritten, form), self.options) for form in finalists]
        steps[0]._forward, steps[0]._backward = self._forward, self._backward
        seconds = race([functools.partial(step.rehearse, inputs) for step in steps], inputs)
        best = steps[fastest(seconds)]
        self.rewritten = with_seconds(best.rewritten, seconds)
        self.halves, self.is_random = best.halves, best.is_random
        self._ownership = best._ownership
        self._forward, self._backward = best._forward, best._backward

    def rehearse(self, inputs: Sequence[Any]) -> None:
        """Compute all that a call and its backward pass compute, and drop it: no state is
        written."""
        out = (self._forward or self._prepared())(*inputs)
        if self.halves is not None:
            ends = [torch.ones_like(out[i]) for i in self.roles.differentiable]
            self.pull_back(out[self.n_early :], ends)

    def _run(self, *inputs: Any) -> Sequence[Any]:
        if self.verdict is not None and self.verdict.is_wrong:
            if self._branches:
                raise OtherBranch
            return self._as_written(*inputs)
        if self._is_slower:
            return self._as_written(*inputs)
        if value_only.get():
            return self.value(inputs)
        if not self.roles.differentiable:
            outputs: Any = self.value(inputs)
        elif torch._C._are_functorch_transforms_active() or self._is_wrapped:
            inputs = tuple(unwrap_dead(inputs))
            outputs = _StepFunction.apply(self, inputs, *self._wanted(inputs))
        else:
            outputs = _apply(self, inputs, *self._wanted(inputs))
        for position in self._hollow:
            outputs[position].requires_grad_()
        return outputs

    def value(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Compute outputs and state updates, no gradients."""
        if self._value is None:
            self._value = self._compile(self.rewritten.value_graph(), "value", self._parameters)
        with torch.no_grad():
            out = self._value(*inputs)
            if self._branches:
                self._look_at_conditions(out)
            self.update(inputs, out)
        return own_tensors(out[: self.roles.n_outputs], inputs)

    def forward(self, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], Sequence[Any]]:
        """Return the outputs and the gradients, nobody else's, or the residuals they need."""
        run = self._forward or self._prepared()
        if not self._is_settled:
            self._is_settled = self._is_fixed and not is_waiting(run)
        is_settled = self._is_settled and not is_watched()
        out = run(*inputs)
        if self._branches:
            self._look_at_conditions(out)
        if self.roles.updated:
            self.update(inputs, out)
        out = self._ownership.taken(out, inputs, is_settled=is_settled)
        return tuple(out[: self.roles.n_outputs]), out[self.n_early :]

    def _prepared(self) -> Compiled:
        code = self.prepare()._forward
        assert code is not None
        return code

    def update(self, inputs: Sequence[Any], out: Sequence[Any]) -> None:
        """Write new values to the inputs that the loss writes to."""
        for position, value in zip(
            self.roles.updated, out[self.roles.n_outputs : self.n_early], strict=True
        ):
            if position in self._replaced:
                inputs[position].data = value.clone()
            else:
                inputs[position].copy_(value)

    def pull_back(self, residuals: Sequence[Any], cotangents: Sequence[Tensor]) -> Sequence[Any]:
        """Return the gradients from residuals and cotangents."""
        assert self.halves is not None
        given = [*residuals, *(c.resolve_conj().resolve_neg().contiguous() for c in cotangents)]
        if self._is_compared and self._backward is None:
            # A call whose gradients nobody may ask for: nothing is compiled for it.
            return self._op_by_op()(*given)
        if self._backward is None:
            self._backward = self._compile(self.halves.tangent, "backward graph")
            if self.options.is_verified and self.options.backend == "inductor":
                return self._compared_backward(given)
        return self._backward(*given)

    def _op_by_op(self) -> Compiled:
        """Return the backward graph, run as it is."""
        assert self.halves is not None
        return compile_graph(self.halves.tangent, "eager", self.options.mode, strict=True)

    def _compared_backward(self, given: Sequence[Any]) -> Sequence[Any]:
        """Return the gradients, compared with what the same graph gives op by op: that is what was
        compared with the loss as written.

        Raises:
            CheckFailed: With ``strict``: they differ.
        """
        assert self._backward is not None and self.halves is not None
        unit, ours = coarsest(self.halves.tangent), self._backward(*given)
        found, verdict = verify_code(ours, self._op_by_op(), given, "a gradient", unit)
        if verdict.is_wrong:
            self.verdict = verdict
            tell(verdict, self.rewritten.function, strict=self.options.strict)
        return found

    def rescued_backward(
        self, error: Exception, ctx: Any, cotangents: Sequence[Tensor | None]
    ) -> Sequence[Any]:
        """Return gradients by running the loss as written once more, where the graph that computes
        them has failed; later calls run as written.

        Raises:
            Exception: What our code raised: with ``strict``, or where the loss cannot run again.
        """
        if self.options.strict or _is_to_be_raised(error):
            raise error
        try:
            _ = ctx.saved_tensors  # what the user did wrong with them is his error
            with torch.enable_grad():
                grads = _differentiate_as_written(ctx, cotangents)
        except Exception:
            raise error from None
        self._give_up(error)
        return [grad if grad is None else grad.detach() for grad in grads]

    def reached_from(self, cotangents: Sequence[Tensor | None]) -> set[int] | None:
        """Return the inputs that eager gives a gradient when these outputs are differentiated; None
        if these are all outputs, and the graph knows."""
        given = [end for end in self.roles.differentiable if cotangents[end] is not None]
        if len(given) == len(self.roles.differentiable):
            return None
        return {i for end in given for i in self.rewritten.as_written.reached[end]}


def _race(rewritten: Rewritten, options: Options) -> Turns | None:
    """Return a race with the loss as written, unless it is plain which is quicker."""
    if branches_of(rewritten.captured):  # the loss as written writes before they are looked at
        return None
    if not options.is_raced or options.mode == "reduce-overhead" or not rewritten.roles.wanted:
        return None
    written, taken = rewritten.as_written, rewritten.choice.taken
    hints = size_hints(rewritten.joint)
    kernels = taken.kernels + count_matmuls(rewritten.joint)
    flops = evaluated(written.flops, hints)
    if flops >= _PLAIN * taken.flops and written.kernels >= _PLAIN * kernels:
        return None

    def is_leaner() -> bool:
        kept = bytes_kept(rewritten.captured, rewritten.flat.promoted)
        return kept < (1 - _NEAR) * taken.bytes_kept

    return Turns(("one graph", "as written"), sure=_SURE, near=_NEAR, is_leaner=is_leaner)


# A graph with so many times fewer FLOPs and kernels is the quicker one; so is one of whose calls
# the first takes so much less than that of the loss as written. Nearer than this memory decides.
_PLAIN, _SURE, _NEAR = 2.0, 1.3, 0.1


def _is_to_be_raised(error: Exception) -> bool:
    """Whether an error says what is the matter by itself, or another run would not help."""
    return isinstance(error, (OptimizeNestedError, CaptureAgain, torch.OutOfMemoryError))


def _parts(options: Options) -> frozenset[str]:
    """Return what is compared with the loss as written when it first runs."""
    return frozenset({_VALUE, _GRADIENTS} if options.check or options.is_verified else ())


def _is_fixed_on_cpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cpu and all(type(n) is int for n in value.shape)


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return what takes the values at these positions, at little cost for a call."""
    if len(positions) < 2:
        return lambda values: [values[i] for i in positions]
    return operator.itemgetter(*positions)


class _StepFunction(torch.autograd.Function):
    """Hand out gradients that the step has already computed."""

    @staticmethod
    def forward(ctx: Any, step: Step, inputs: Sequence[Any], *wanted: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.set_materialize_grads(False)
        ctx.step, ctx.inputs = step, inputs
        ctx.generator = Generators.now() if step.is_random else None
        outputs, rest = step.forward(inputs)
        ctx.versions = list(map(_version, step.tensors(inputs)))
        differentiable = step.roles.differentiable
        if step.halves is None:
            ctx.gradients = rest
        else:
            keep_residuals(ctx, rest, [outputs[i] for i in differentiable])
        if len(outputs) > len(differentiable):
            mark_constant(ctx, outputs, differentiable)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.compiler.is_compiling():  # in another thread, perhaps
            return uncompiled(_StepFunction, ctx, cotangents)
        return _StepFunction.pulled(ctx, *cotangents)

    @staticmethod
    def pulled(ctx: Any, *cotangents: Tensor | None) -> Sequence[Any]:
        """Do what `backward` does, untraced."""
        step: Step = ctx.step
        if torch.is_grad_enabled():
            return (None, None, *_differentiate_as_written(ctx, cotangents))
        differentiable = step.roles.differentiable
        if step.halves is None:
            return (None, None, *hand_out(ctx, cotangents[differentiable[0]]))
        given = [cotangents[i] for i in differentiable]
        try:
            grads = pulled_back(ctx, given, step.pull_back)
        except Exception as error:
            return (None, None, *step.rescued_backward(error, ctx, cotangents))
        reached = step.reached_from(cotangents)
        if reached is not None:
            pairs = zip(step.roles.wanted, grads, strict=True)
            grads = [grad if i in reached else None for i, grad in pairs]
        return (None, None, *grads)


# What `_StepFunction.apply` comes to outside of transforms, without its look at each argument.
_apply: Callable[..., Any] = super(torch.autograd.Function, _StepFunction).apply  # pyright: ignore[reportAttributeAccessIssue]
_version = operator.attrgetter("_version")


def _differentiate_as_written(ctx: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Any]:
    """Gradients that can be differentiated once more (`create_graph=True`): run the loss as written
    again, under autograd.

    Raises:
        OptimizeNestedError: Something the loss reads was changed since.
    """
    step: Step = ctx.step
    for x, version in zip(step.tensors(ctx.inputs), ctx.versions, strict=True):
        if x._version != version:
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
        outputs = list(without_checkpoints(step.rewritten.captured)(*inputs))
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
    return grads


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
