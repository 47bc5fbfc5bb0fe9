"""A module whose call is a compiled function with compiled derivatives of every order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import results
from passes.levels import Cotangent, Level
from passes.simplify.zeros import zero_nodes
from rewriter.codegen import Compiled, compile_graph
from rewriter.options import Options
from rewriter.step import own_tensors


class CompiledLevel:
    """A level of a tower and the code for it, made when it is first needed."""

    def __init__(self, level: Level, options: Options, updated: Sequence[int] = ()) -> None:
        self.level, self.options, self.updated = level, options, tuple(updated)
        self._value: Compiled | None = None
        self._primal: Compiled | None = None
        self._pullbacks: dict[Any, CompiledLevel] = {}
        self.zeros: frozenset[int] = frozenset()

    def _compile(self, module: GraphModule) -> Compiled:
        zeros = zero_nodes(module.graph)
        self.zeros = frozenset(i for i, node in enumerate(results(module.graph)) if node in zeros)
        options = self.options
        return compile_graph(module, options.backend, options.mode, strict=options.strict)

    def value(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Return the outputs, nothing kept."""
        if self._value is None:
            self._value = self._compile(self.level.value())
        with torch.no_grad():
            out = self._value(*inputs)
            self._update(inputs, out)
        return out[: self.level.n_outputs]

    def primal(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Return the outputs and the residuals."""
        if self._primal is None:
            self._primal = self._compile(self.level.primal())
        out = self._primal(*inputs)
        self._update(inputs, out)
        n = self.level.n_outputs
        return out[:n], out[n + len(self.updated) :]

    def _update(self, inputs: Sequence[Any], out: Sequence[Any]) -> None:
        for position, new in zip(self.updated, out[self.level.n_outputs :], strict=False):
            inputs[position].copy_(new)

    def pullback(self, given: tuple[Cotangent, ...], needed: tuple[int, ...]) -> CompiledLevel:
        """Return the next level for these cotangents and these gradients."""
        key = given, needed
        if key not in self._pullbacks:
            self._pullbacks[key] = CompiledLevel(self.level.pullback(given, needed), self.options)
        return self._pullbacks[key]

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """Return the outputs; they can be differentiated if gradients are on."""
        if torch.is_grad_enabled() and any(
            isinstance(inputs[i], Tensor) and inputs[i].requires_grad for i in self.level.wanted
        ):
            own = [_with_a_node(x) for x in inputs]
            return _LevelFunction.apply(self, *own)[: self.level.n_outputs]  # pyright: ignore[reportOptionalSubscript]
        return self.value(inputs)


class _LevelFunction(torch.autograd.Function):
    """Outputs and residuals of a level; its backward is the next level."""

    @staticmethod
    def forward(ctx: Any, compiled: CompiledLevel, *inputs: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.set_materialize_grads(False)
        level = compiled.level
        held = {i: inputs[i] for i in level.kept}
        held |= {i: x.clone() for i in compiled.updated if isinstance(x := held.get(i), Tensor)}
        outputs, residuals = compiled.primal(inputs)
        ends = own_tensors([*outputs, *residuals], inputs)
        ctx.compiled, ctx.n_inputs = compiled, len(inputs)
        ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        saved = [*held.values(), *ends[level.n_outputs :]]
        ctx.plain = [None if isinstance(value, Tensor) else value for value in saved]
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in saved))
        constant = (x for i, x in enumerate(ends) if i not in level.active)
        ctx.mark_non_differentiable(*(x for x in constant if isinstance(x, Tensor)))
        return ends

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        compiled: CompiledLevel = ctx.compiled
        given = tuple(_kind(c) for c in cotangents)
        needed = _asked_for(ctx)
        none = (None,) * (ctx.n_inputs + 1)
        if all(kind is Cotangent.ABSENT for kind in given):
            return none
        saved = [
            plain if tensor is None else tensor
            for tensor, plain in zip(ctx.saved_tensors, ctx.plain, strict=True)
        ]
        dense = [
            c.contiguous()
            for c, kind in zip(cotangents, given, strict=True)
            if c is not None and kind is Cotangent.GIVEN
        ]
        above = compiled.pullback(given, needed)
        found = list(above(*saved, *dense))
        grads = list(none)
        for position, grad in zip(needed, found, strict=True):
            grads[position + 1] = grad
        for index in above.zeros:
            if index < len(needed) and needed[index] in compiled.level.residual_inputs:
                like = found[index]
                grads[needed[index] + 1] = torch._efficientzerotensor(
                    like.shape, dtype=like.dtype, device=like.device
                )
        return tuple(grads)


def _with_a_node(x: Any) -> Any:
    """Put a node of its own before a leaf: whether the engine will run it says whether the leaf's
    gradient is asked for."""
    if isinstance(x, Tensor) and x.requires_grad and x.is_leaf:
        return x.view_as(x)
    return x


def _asked_for(ctx: Any) -> tuple[int, ...]:
    """Return the inputs whose gradients this run of the engine uses: fewer than require grad when
    `torch.autograd.grad` names its inputs."""
    ahead = dict(zip(ctx.tensors, ctx.next_functions, strict=True))
    return tuple(
        i for i in ctx.compiled.level.wanted if ctx.needs_input_grad[i + 1] and _is_run(ahead[i][0])
    )


def _is_run(node: Any) -> bool:
    return node is not None and torch._C._will_engine_execute_node(node)


def _kind(cotangent: Tensor | None) -> Cotangent:
    if cotangent is None:
        return Cotangent.ABSENT
    return Cotangent.ZERO if cotangent._is_zerotensor() else Cotangent.GIVEN
