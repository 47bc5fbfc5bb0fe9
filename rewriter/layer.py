"""Modules whose call is a compiled function with compiled derivatives of every order."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule

from passes.graph import is_random, placeholders
from passes.levels import Level
from passes.nest import NotNested, active_nodes, nest
from passes.work import work_of
from rewriter.as_written import measure
from rewriter.capture import is_traced, keep_numbers
from rewriter.checking import check_layer
from rewriter.errors import CaptureError, OptionError, TooLittleWork
from rewriter.flatten import flatten
from rewriter.options import Options
from rewriter.rewrite import check_differentiability
from rewriter.specialising import Specialising, gradients_on
from rewriter.stand_ins import StandIns, standing_in, stood_in
from rewriter.stateful import (
    is_inside_level,
    is_inside_transform,
    is_inside_vmap,
    is_wrapped,
    loses_no_grad,
)
from rewriter.step import value_only
from rewriter.tower import CompiledLevel
from rewriter.tower_report import TowerReport, level_reports

M = TypeVar("M", bound=nn.Module)

STRATEGIES = ("auto", "jvp_over_gradient", "as written")


class OptimizedForward(Specialising):
    """The ``forward`` of a module, as a tower of compiled derivatives.

    Attributes:
        module: The user's module.
        steps: One tower per specialisation built so far.
    """

    def __init__(self, module: nn.Module, options: Options) -> None:
        self.module = module
        super().__init__(functools.partial(type(module).forward, module), options, Layers(options))
        functools.update_wrapper(self, type(module).forward)
        self.name = type(module).__name__

    def _build(self, captured: GraphModule) -> Callable[..., Any]:
        tower = Tower(captured, self.options)
        if self._may_be_small and (work := work_of(tower.base.level)).is_too_little:
            raise TooLittleWork(str(work))
        return tower

    @property
    def _may_be_small(self) -> bool:
        """Whether calls that are quicker as written run so: a tower is asked for by strategy."""
        options = self.options
        return options.backend == "inductor" and options.strategy == "auto" and not options.check

    def _modules(self, args: Any, kwargs: Any) -> Iterable[nn.Module]:
        return self.module.children()

    def explain(self) -> TowerReport:
        """Return what has been built so far, and why some calls run as written."""
        return TowerReport(
            name=self.name,
            levels=tuple(found for tower in self.steps for found in level_reports(tower.base)),
            reasons=tuple(str(refusal) for refusal in self.refusals),
            layers=self.layers.reports(),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.as_written(*args, **kwargs)
        refusal = self.refusal_of(args, kwargs)
        if isinstance(refusal, TooLittleWork):
            return self.as_written(*args, **kwargs)  # right in every mode, and soon found out
        if is_traced() or not is_inside_level() or not self.is_on:
            return super().__call__(*args, **kwargs)
        if refusal is not None:
            return self.as_written(*args, **kwargs)
        try:
            with stood_in(self.module, args, kwargs) as (plain_args, plain_kwargs), gradients_on():
                return self._captured_call(plain_args, plain_kwargs)
        except CaptureError as refusal:
            reason = refusal
        return self._fall_back(reason, args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"], state["options"])

    def __repr__(self) -> str:
        return f"<optimize_nested {self.name}.forward, {len(self.steps)} specialisations>"


class Tower:
    """One specialisation of a module's call.

    Called with the captured graph's inputs, returns its outputs, which are differentiable to any
    order; each derivative is a graph of its own, made and compiled when it is first asked for.
    """

    def __init__(self, captured: GraphModule, options: Options) -> None:
        keep_numbers(captured)
        flat = flatten(captured)
        as_written = measure(captured, flat.promoted)
        wanted = as_written.wanted
        inputs = placeholders(flat.module.graph)
        active = active_nodes(flat.module, {inputs[i] for i in wanted})
        check_differentiability(flat.module, flat.n_outputs, as_written.differentiable, active)
        try:
            nest(flat.module)
        except NotNested as error:
            raise CaptureError(str(error)) from error
        level = Level(flat.module, flat.n_outputs, wanted)
        self.promoted = flat.promoted
        self.base = CompiledLevel(level, options, flat.updated)
        self.captured = captured
        self._draws = any(is_random(node) for node in flat.module.graph.nodes)
        self._unchecked = options.check

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        stand_ins = standing_in.get()
        if stand_ins is not None:
            return self._inside_transforms(stand_ins, inputs)
        if self._unchecked:
            self._unchecked = False
            check_layer(self.captured, self.base, inputs, self.base.level.wanted, self.base.updated)
        for position in self.promoted:
            inputs[position].requires_grad_()
        return self.base.value(inputs) if value_only.get() else self.base(*inputs)

    def _inside_transforms(self, stand_ins: StandIns, inputs: Sequence[Any]) -> Sequence[Any]:
        """Call the tower with what its inputs stand for.

        Raises:
            CaptureError: The module draws or writes to its state, where PyTorch does otherwise.
        """
        with stand_ins.lifted():
            real = stand_ins.behind(inputs)
            written = [real[i] for i in self.base.updated]
            if self._draws and is_inside_transform():
                # PyTorch draws in another order there, by the memory format of what it wraps.
                raise CaptureError("a layer that draws, inside of a torch.func transform")
            if written and is_inside_vmap():
                raise CaptureError("a layer that updates its state, inside of a vmap")
            if any(is_wrapped(x) for x in written):
                raise CaptureError("a transform over the state that a layer updates")
            with torch.set_grad_enabled(not value_only.get()):
                if loses_no_grad():
                    raise CaptureError("no_grad and a torch.func transform")
                return self.base(*real)


class Layers:
    """The modules that a loss calls, as towers for as long as the loss runs.

    A loss that cannot be captured as one graph runs as written; what it calls is compiled all the
    same, at the largest modules that can be captured.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.forwards: dict[nn.Module, OptimizedForward] = {}

    @contextlib.contextmanager
    def on(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Let the modules and those inside them be towers inside the ``with`` block."""
        found = dict.fromkeys(inner for module in modules for inner in module.modules())
        taken = [module for module in found if _is_layer(module)]
        for module in taken:
            if module not in self.forwards:
                self.forwards[module] = OptimizedForward(module, self.options)
                self.forwards[module].quiet = True
            module.forward = self.forwards[module]
        try:
            yield
        finally:
            for module in taken:
                del module.forward

    @property
    def said(self) -> str:
        """What to say of them, after the reason why the function is not captured."""
        names = ", ".join(sorted({f.name for f in self.forwards.values() if f.steps}))
        return f"; captured by layer: {names}" if names else ""

    def reports(self) -> tuple[str, ...]:
        """Return a line for each that was called: captured, or as written and why."""
        called = list(self.forwards.values())
        return (
            *(f"{f.name}: captured, {len(f.steps)}" for f in called if f.steps),
            *(f"{f.name}: as written, {f.refusals[0]}" for f in called if f.refusals),
        )


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is worth a tower: not one of PyTorch's that calls a single operator, nor
    one whose ``forward`` somebody has replaced."""
    if "forward" in module.__dict__ or type(module).forward is nn.Module.forward:
        return False
    is_one_operator = type(module).__module__.startswith("torch.nn.") and not any(module.children())
    return not is_one_operator


def _check_strategy(options: Options) -> None:
    """Refuse what a tower cannot be told.

    Raises:
        OptionError: A strategy that is none of a tower's.
    """
    if options.strategy not in STRATEGIES:
        raise OptionError(
            f"strategy: a module takes one of {', '.join(map(repr, STRATEGIES))}, got "
            f"{options.strategy!r}"
        )


def optimize_module(module: M, options: Options) -> M:
    """Give a module a compiled ``forward`` with compiled derivatives, in place; return it.

    Raises:
        OptionError: A strategy that is none of a tower's.
    """
    _check_strategy(options)
    if options.strategy == "as written":
        return module
    module.forward = OptimizedForward(module, options)
    return module


def optimize_class(cls: type[M], options: Options) -> type[M]:
    """Make every instance of a class such a module, from the end of its ``__init__`` on."""
    _check_strategy(options)
    original = cls.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        optimize_module(self, options)

    cls.__init__ = init
    return cls
