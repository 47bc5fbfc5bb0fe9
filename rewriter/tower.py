"""A module whose call is a compiled function with compiled derivatives of every order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Parameter

from passes.graph import results, shares_memory
from passes.levels import CannotBatch, Cotangent, Level
from passes.simplify.zeros import zero_nodes
from passes.tracing import AnySize
from rewriter.batched import one_by_one
from rewriter.codegen import Compiled
from rewriter.gradients import is_legacy_batch, own_tensors, uncompiled
from rewriter.options import Options
from rewriter.start import code_for
from rewriter.stateful import (
    has_saved_tensor_hooks,
    is_inside_level,
    is_inside_transform,
    is_wrapped,
    set_aside,
    unwrap_dead,
    without_saved_tensor_hooks,
)
from rewriter.watching import Pullback, Seen, Watch


class CompiledLevel:
    """A level of a tower and the code for it, made when it is first needed."""

    def __init__(
        self,
        level: Level,
        options: Options,
        updated: Sequence[int] = (),
        watch: Watch | None = None,
    ) -> None:
        self.level, self.options, self.updated = level, options, tuple(updated)
        self.watch, self._compared = watch, set[Any]()
        self._value: Compiled | None = None
        self._primal: Compiled | None = None
        self._derivatives: dict[Any, CompiledLevel] = {}
        self._batched: dict[Any, list[Batched]] = {}
        self.zeros: frozenset[int] = frozenset()
        self._shares = True
        self._is_prepared = False

    def _compile(self, make: Callable[[], GraphModule]) -> Compiled:
        with set_aside():
            module = make()
            zeros = zero_nodes(module.graph)
            found = results(module.graph)
            self.zeros = frozenset(i for i, node in enumerate(found) if node in zeros)
            self._shares = shares_memory(module.graph)
            return code_for(module, self.options, "a module's level")

    def value(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Return the outputs, nothing kept."""
        if self._value is None:
            self._value = self._compile(self.level.value)
        with torch.no_grad():
            out = self._value(*inputs)
            self._update([inputs[i] for i in self.updated], out)
        return out[: self.level.n_outputs]

    def primal(self, inputs: Sequence[Any], targets: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return the outputs and the residuals; write to ``targets`` what the level updates."""
        if self._primal is None:
            self._primal = self._compile(self.level.primal)
        out = self._primal(*inputs)
        if targets:
            self._update(targets, out)
            n = self.level.n_outputs
            out = [*out[:n], *out[n + len(targets) :]]
        return own_tensors(out, inputs) if self._shares else tuple(out)

    def _update(self, targets: Sequence[Tensor], out: Sequence[Any]) -> None:
        for target, new in zip(targets, out[self.level.n_outputs :], strict=False):
            target.copy_(new)

    def pullback(self, given: tuple[Cotangent, ...], needed: tuple[int, ...]) -> CompiledLevel:
        """Return the next level for these cotangents and these gradients."""
        found = self._derivatives.get((given, needed))
        return found or self._above((given, needed), lambda: self.level.pullback(given, needed))

    def pushforward(self, given: tuple[int, ...]) -> CompiledLevel:
        """Return the forward mode of this level for tangents of these inputs."""
        return self._derivatives.get(given) or self._above(
            given, lambda: self.level.pushforward(given)
        )

    def _above(self, key: Any, make: Callable[[], Level]) -> CompiledLevel:
        with set_aside():
            made = CompiledLevel(make(), self.options, watch=self.watch)
            self._derivatives[key] = made
        return made

    def batched(self, size: int, over: tuple[int, ...]) -> Batched:
        """Return this level, residuals among its outputs, for a batch: for its size the first time,
        for any size from the second one on.

        Args:
            size: How many there are.
            over: The inputs that are batched, in their first dimension.
        """
        found = self._batched.setdefault(over, [])
        for batched in found:
            if batched.size.admits(size):
                return batched
        with set_aside():
            several = self.level.any_size(size) if found and size > 1 else None
            batched = Batched(self.level, several or OneSize(size), over, self.options)
        found.append(batched)
        return batched

    @property
    def is_unknown(self) -> bool:
        """Whether no pullback of this level has been compared with autograd's."""
        return self.watch is not None and not self._compared

    def compared(
        self,
        ctx: Any,
        given: tuple[Cotangent, ...],
        needed: tuple[int, ...],
        cotangents: Sequence[Tensor],
        grads: Sequence[Any],
    ) -> Sequence[Any]:
        """Return a pullback, compared with autograd's if it is the first of its kind."""
        if self.watch is None or (given, needed) in self._compared:
            return grads
        if any(is_wrapped(c) or is_legacy_batch(c) for c in cotangents):
            return grads
        inputs = _inputs_of(ctx)
        with without_saved_tensor_hooks():
            out = Pullback(
                self.watch, self.level, ctx.seen, given, needed, cotangents, inputs
            ).compared(grads)
        self._compared.add((given, needed))
        return out

    def rescued(
        self,
        error: Exception,
        ctx: Any,
        given: tuple[Cotangent, ...],
        needed: tuple[int, ...],
        cotangents: Sequence[Tensor],
    ) -> Sequence[Any]:
        """Return autograd's pullback in place of one that cannot be built or run.

        Raises:
            Exception: What has failed: with ``strict``, or where the call is not known any more.
        """
        if self.watch is None or ctx.seen is None or self.watch.is_to_be_raised(error):
            raise error
        try:
            inputs = _inputs_of(ctx)  # what the user did wrong with them is his error
            with without_saved_tensor_hooks():
                grads = Pullback(
                    self.watch, self.level, ctx.seen, given, needed, cotangents, inputs
                ).as_written()
        except Exception:
            raise error from None
        self.watch.failed(error)
        return grads

    def graphs(self) -> list[GraphModule]:
        """Return the graphs that code was made for."""
        made = ((self._primal, self.level.primal), (self._value, self.level.value))
        return [graph() for compiled, graph in made if compiled is not None]

    def walk(self, order: int = 0, what: str = "value") -> Iterator[tuple[int, str, CompiledLevel]]:
        """Give this level and all that were made from it: order, what it is, level."""
        yield order, what, self
        for key, above in self._derivatives.items():
            is_pullback = bool(key) and isinstance(key[0], tuple)
            yield from above.walk(order + 1, "pullback" if is_pullback else "pushforward")
        for found in self._batched.values():
            for batched in found:
                if batched.compiled is not None:
                    yield from batched.compiled.walk(order, f"{what} of a batch")

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """Return the outputs; they can be differentiated if gradients are on."""
        level = self.level
        if is_inside_level():
            self._prepare()
            return _LevelFunction.apply(*self._arguments(inputs))[: level.n_outputs]  # pyright: ignore[reportOptionalSubscript]
        if torch.is_grad_enabled():
            for i in level.wanted:
                x = inputs[i]
                if isinstance(x, Tensor) and x.requires_grad:
                    self._prepare()
                    return _apply(*self._arguments(inputs))[: level.n_outputs]
        return self.value(inputs)

    def _prepare(self) -> None:
        if not self._is_prepared:
            with set_aside():
                self.level.prepare()
            self._is_prepared = True

    def _arguments(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the call and its inputs, those that it writes to as they are before."""
        call = _Call(self, [inputs[i] for i in self.updated])
        own = [call, *inputs]
        for i in self.level.wanted:
            x = inputs[i]
            # A node of its own before a leaf that is no parameter: the engine tells at less cost
            # whether it will run one than whether a leaf's gradient is asked for.
            if type(x) is not Parameter and isinstance(x, Tensor) and x.requires_grad and x.is_leaf:
                own[i + 1] = x.view_as(x)
        for i in self.updated:
            if i in self.level.kept:
                own[i + 1] = inputs[i].clone()
        return own


@dataclass(frozen=True)
class OneSize:
    """A batch size."""

    size: int

    def admits(self, size: int) -> bool:
        return size == self.size


class Batched:
    """A level for a batch.

    Attributes:
        size: What is known of the batch's size.
        compiled: The level, residuals among its outputs; None where an operator has no batching
            rule.
        is_batched: For each output whether it is batched, in its first dimension.
    """

    def __init__(
        self, level: Level, size: OneSize | AnySize, over: Sequence[int], options: Options
    ) -> None:
        self.size, self.compiled, self.is_batched = size, None, []
        with contextlib.suppress(CannotBatch):
            above, self.is_batched = level.batched(size.size, over)
            self.compiled = CompiledLevel(above, options)


class _Call:
    """One call of a level: what of it is neither a tensor nor differentiated.

    Attributes:
        compiled: The level.
        targets: The inputs that the call writes to.
        seen: The call, where its derivatives are to be compared with autograd's.
    """

    __slots__ = ("compiled", "seen", "targets")

    def __init__(self, compiled: CompiledLevel, targets: Sequence[Tensor]) -> None:
        self.compiled, self.targets = compiled, targets
        self.seen: Seen | None = None


class _LevelFunction(torch.autograd.Function):
    """Outputs and residuals of a level; its backward is the next level."""

    @staticmethod
    def forward(call: _Call, *inputs: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        compiled = call.compiled
        # What a checkpoint keeps can be asked for once.
        if compiled.is_unknown and not (is_inside_level() or has_saved_tensor_hooks()):
            call.seen = Seen.of(compiled.level, inputs, compiled.updated)
        return compiled.primal(inputs, call.targets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Any]) -> None:
        ctx.set_materialize_grads(False)
        compiled: CompiledLevel = inputs[0].compiled
        level = compiled.level
        ctx.compiled, ctx.n_inputs = compiled, len(inputs) - 1
        ctx.seen = inputs[0].seen
        saved = [inputs[i + 1] for i in level.kept]
        saved += output[level.n_outputs :]
        ctx.n_saved = len(saved)
        if ctx.seen is not None:
            saved += [x if i in level.wanted else None for i, x in enumerate(inputs[1:])]
        ctx.plain = {i: x for i, x in enumerate(saved) if not isinstance(x, Tensor)}
        for i in ctx.plain:
            saved[i] = None
        ctx.save_for_backward(*saved)
        ctx.is_inside = is_inside_level()
        if ctx.is_inside:
            ctx.save_for_forward(*saved)
            ctx.like = {
                i: (output[i].shape, output[i].dtype, output[i].device) for i in level.active
            }
        if len(level.active) < len(output):
            constant = (x for i, x in enumerate(output) if i not in level.active)
            ctx.mark_non_differentiable(*(x for x in constant if isinstance(x, Tensor)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.compiler.is_compiling():  # in another thread, perhaps
            return uncompiled(_LevelFunction, ctx, cotangents)
        return _LevelFunction.pulled(ctx, *cotangents)

    @staticmethod
    def pulled(ctx: Any, *cotangents: Tensor | None) -> Sequence[Any]:
        """Do what `backward` does, untraced."""
        compiled: CompiledLevel = ctx.compiled
        given = tuple([_kind(c) for c in cotangents])
        none = (None,) * (ctx.n_inputs + 1)
        is_real = isinstance(ctx, torch.autograd.function.BackwardCFunction)
        if all(kind is Cotangent.ABSENT for kind in given):
            return none if is_real else _all_there(ctx, none)
        needed = _asked_for(ctx) if is_real else _required(ctx)
        dense = [
            c.resolve_conj().resolve_neg().contiguous()
            for c, kind in zip(cotangents, given, strict=True)
            if c is not None and kind is Cotangent.GIVEN
        ]
        if ctx.is_inside:
            dense = unwrap_dead(dense)
        zeros: frozenset[int] = frozenset()
        try:
            above = compiled.pullback(given, needed)
            saved = _saved(ctx)
            found = one_by_one(lambda *c: above(*saved, *c), dense)
            zeros = above.zeros
        except Exception as error:
            found = compiled.rescued(error, ctx, given, needed, dense)
        else:
            if ctx.seen is not None:
                right = compiled.compared(ctx, given, needed, dense, found)
                if right is not found:  # autograd's: what is zero in the graph need not be
                    found, zeros = right, frozenset()
        grads: list[Any] = list(none)
        for position, grad in zip(needed, found, strict=True):
            grads[position + 1] = grad
        if not is_real:
            return _all_there(ctx, grads)
        if is_inside_transform():
            return tuple(grads)
        for index in zeros:
            if index < len(needed) and needed[index] in compiled.level.residual_inputs:
                like = found[index]
                grads[needed[index] + 1] = torch._efficientzerotensor(
                    like.shape, dtype=like.dtype, device=like.device
                )
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Push tangents forward: the forward mode of this level is a level too."""
        level = ctx.compiled.level
        given = tuple(i for i in level.wanted if tangents[i] is not None)
        above = ctx.compiled.pushforward(given)
        found = list(above(*_saved(ctx), *(tangents[i] for i in given)))
        for i, (shape, dtype, device) in ctx.like.items():
            if found[i] is None:
                found[i] = torch.zeros(shape, dtype=dtype, device=device)
        return tuple(found)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *inputs: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call the level for a batch; where an operator has no batching rule, one by one."""
        dims = in_dims[1:]
        over = tuple(i for i, dim in enumerate(dims) if dim is not None)
        moved = [
            x if d is None else x.movedim(d, 0).contiguous()
            for x, d in zip(inputs, dims, strict=True)
        ]
        batched = call.compiled.batched(info.batch_size, over)
        if batched.compiled is None:
            return _sample_by_sample(call, moved, over, info.batch_size)
        ends = tuple(batched.compiled(*moved))
        return ends, tuple(0 if is_batched else None for is_batched in batched.is_batched)


def _sample_by_sample(call: _Call, inputs: Sequence[Any], over: Sequence[int], size: int) -> Any:
    """Call a level for each sample by itself; return outputs and residuals, batched in front."""
    if not size:
        raise RuntimeError("a layer without a batching rule, inside of a vmap over nothing")
    rows = []
    for sample in range(size):
        own = [x[sample].contiguous() if i in over else x for i, x in enumerate(inputs)]
        rows.append(_LevelFunction.apply(call, *own))
    ends = [
        torch.stack(row) if isinstance(row[0], Tensor) else row[0]
        for row in zip(*rows, strict=True)
    ]
    return tuple(ends), tuple(0 if isinstance(end, Tensor) else None for end in ends)


# What `Function.apply` does outside of transforms, without its inspection of signatures.
_apply: Callable[..., Any] = super(torch.autograd.Function, _LevelFunction).apply  # pyright: ignore[reportAttributeAccessIssue]


def _saved(ctx: Any) -> Sequence[Any]:
    """Return the inputs that were kept and the residuals."""
    saved = ctx.saved_tensors
    if ctx.plain:
        saved = [ctx.plain.get(i, x) for i, x in enumerate(saved)]
    if ctx.seen is not None:
        saved = saved[: ctx.n_saved]
    return unwrap_dead(saved) if ctx.is_inside else saved


def _inputs_of(ctx: Any) -> list[Any]:
    """Return the inputs of a call that was seen, as autograd knows them."""
    inputs = [*ctx.saved_tensors[ctx.n_saved :]]
    return [x if own is None else own for own, x in zip(inputs, ctx.seen.inputs, strict=True)]


def _asked_for(ctx: Any) -> tuple[int, ...]:
    """Return the inputs whose gradients this run of the engine uses: fewer than require grad when
    `torch.autograd.grad` names its inputs."""
    needs, ahead, level = ctx.needs_input_grad, ctx.next_functions, ctx.compiled.level
    return tuple([i for i in level.wanted if needs[i + 1] and _is_run(ahead[level.tensors[i]][0])])


def _required(ctx: Any) -> tuple[int, ...]:
    """Return the inputs that require grad."""
    return tuple(i for i in ctx.compiled.level.wanted if ctx.needs_input_grad[i + 1])


def _all_there(ctx: Any, grads: Sequence[Any]) -> tuple[Any, ...]:
    """Fill in zeros: compiled autograd, which calls a backward with a context of its own, adds up
    what comes from all sides, and takes no None."""
    filled, level = list(grads), ctx.compiled.level
    for i in _required(ctx):
        if filled[i + 1] is None:
            node, index = ctx.next_functions[level.tensors[i]]
            like = node._input_metadata[index]
            filled[i + 1] = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    return tuple(filled)


def _is_run(node: Any) -> bool:
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError as error:
        # Of a leaf, just when `torch.autograd.grad` was asked for its gradient.
        if "A leaf node was passed" in str(error):
            return True
        raise


def _kind(cotangent: Tensor | None) -> Cotangent:
    if cotangent is None:
        return Cotangent.ABSENT
    return Cotangent.ZERO if cotangent._is_zerotensor() else Cotangent.GIVEN
