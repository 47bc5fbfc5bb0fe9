"""Modules whose call is a compiled function with compiled derivatives of every order."""

from __future__ import annotations

import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule

from passes.graph import is_random, placeholders
from passes.levels import Level
from passes.nest import NotNested, active_nodes, nest
from passes.work import work_of
from rewriter.as_written import measure, run_in_place
from rewriter.binding import Binding, Towers, bind, forward_of, is_active, is_bound
from rewriter.capture import compile_function, is_observed, is_traced
from rewriter.chain import base_of
from rewriter.checking import check_layer
from rewriter.data import replaced_data
from rewriter.errors import CaptureError, NestedGradientWarning, OptionError, TooLittleWork
from rewriter.flags import begin_with_all_on, left_off
from rewriter.flatten import flatten
from rewriter.modes import set_aside_here, through_modes
from rewriter.numbers import keep_numbers
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
from rewriter.tower_report import TowerReport, level_reports
from rewriter.verifying import coarsest, verify_layer
from rewriter.watching import Watch

M = TypeVar("M", bound=nn.Module)

# Of the modules that a tower serves: a class that is made anew for each clone is captured anew.
MOST_CLASSES = 4

STRATEGIES = ("auto", "jvp_over_gradient", "as written")


class OptimizedForward(Specialising):
    """The ``forward`` of a module, as a tower of compiled derivatives.

    ``module.forward`` is bound to its module, as methods are: it is called without, and has the
    attributes and methods listed here.

    Attributes:
        steps: One tower per specialisation built so far.

    Args:
        function: The ``forward`` of a class: a function of a module and the module's arguments.
        name: The class's name.
        options: How it is optimised.
    """

    def __init__(self, function: Callable[..., Any], name: str, options: Options) -> None:
        super().__init__(function, options, Layers(options))
        # No plain function: Dynamo goes a long way around one that is PyTorch's own.
        given = functools.partial(function)
        self._new = functools.partial(compile_function, given, self._built, options.dynamic)
        self._compiled = self._new()
        self.name = name
        self._classes: set[type] = set()

    def _build(self, captured: GraphModule) -> Callable[..., Any]:
        tower = Tower(captured, self.options, self.name)
        if self._may_be_small and (work := work_of(tower.base.level)).is_too_little:
            raise TooLittleWork(str(work))
        return tower

    @property
    def _may_be_small(self) -> bool:
        """Whether calls that are quicker as written run so: a tower is asked for by strategy."""
        options = self.options
        return options.backend == "inductor" and options.strategy == "auto" and not options.check

    def _modules(self, args: Any, kwargs: Any) -> Iterable[nn.Module]:
        return args[0].children()

    @property
    def is_raced(self) -> bool:
        """False: what comes after a module's call is not its own, so no clock can tell its share;
        the loss around it is raced as a whole."""
        return False

    def _serves(self, cls: type) -> bool:
        """Whether modules of a class are captured: those of the first few that were called."""
        if cls not in self._classes and len(self._classes) < MOST_CLASSES:
            self._classes.add(cls)
        return cls in self._classes

    def _owners(self, args: Any, kwargs: Any) -> Iterable[nn.Module]:
        return (args[0],)

    def explain(self) -> TowerReport:
        """Return what has been built so far, and why some calls run as written."""
        return TowerReport(
            name=self.name,
            levels=tuple(found for tower in self.steps for found in level_reports(tower.base)),
            reasons=tuple(str(refusal) for refusal in self.refusals),
            layers=self.layers.reports(),
            spent=self.budget.spent,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module that comes first with the arguments that follow."""
        if torch.compiler.is_compiling() or not self._serves(type(args[0])):
            return self.as_written(*args, **kwargs)
        if self.ways.is_any:
            way = self.ways.of(args, kwargs)
            if way is not None:
                return way(*args, **kwargs)
        refusal = self.refusal_of(args, kwargs)
        if isinstance(refusal, TooLittleWork):
            return self.as_written(*args, **kwargs)  # right in every mode, and soon found out
        if is_traced() or not is_inside_level() or not self.is_on:
            return super().__call__(*args, **kwargs)
        if refusal is not None:
            return self.as_written(*args, **kwargs)
        try:
            module, *own = args
            with stood_in(module, own, kwargs) as (plain, plain_kwargs), gradients_on():
                return self._captured_call((module, *plain), plain_kwargs)
        except CaptureError as refusal:
            reason = refusal
        return self._fall_back(reason, args, kwargs)

    def __repr__(self) -> str:
        return f"<optimize_nested {self.name}.forward, {len(self.steps)} specialisations>"


class Tower:
    """One specialisation of a module's call.

    Called with the captured graph's inputs, returns its outputs, which are differentiable to any
    order; each derivative is a graph of its own, made and compiled when it is first asked for.
    """

    def __init__(self, captured: GraphModule, options: Options, name: str) -> None:
        keep_numbers(captured)
        begin_with_all_on(captured)
        if left_off(captured):
            raise CaptureError("requires_grad is switched off on an input of a module, and left so")
        if replaced_data(captured.graph):
            raise CaptureError("a module assigns the data of its parameters or inputs")
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
        self._uncompared = frozenset({True, False} if options.is_verified else ())
        self.watch = Watch(captured, level, name, options.strict)
        watch = self.watch if self._uncompared else None
        carrying, hollow = as_written.reached, as_written.hollow
        self.base = base_of(level, options, flat.updated, carrying, hollow, watch)
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
        if self._uncompared and (False in self._uncompared or value_only.get()):
            self._compare(inputs)
        if self.watch.is_wrong:
            return run_in_place(self.captured, inputs, value_only=value_only.get())
        for position in self.promoted:
            inputs[position].requires_grad_()
        try:
            if value_only.get():
                return through_modes(self.base.value, inputs)
            return through_modes(self.base, *inputs)
        except Exception as error:
            if self.watch.is_to_be_raised(error):
                raise
            outputs = run_in_place(self.captured, inputs, value_only=value_only.get())
            self.watch.failed(error)
            return outputs

    def _compare(self, inputs: Sequence[Any]) -> None:
        """Compare what this call runs with the module as written, if it runs for the first time.

        Raises:
            CheckFailed: With ``strict``: they differ.
        """
        level = self.base.level
        is_value = value_only.get() or not any(inputs[i].requires_grad for i in level.wanted)
        if is_value not in self._uncompared or is_observed() or set_aside_here():
            return
        run: Any = (lambda *own: self.base.value(own)) if is_value else self.base
        found = verify_layer(
            self.captured,
            run,
            inputs,
            level.wanted,
            self.base.updated,
            coarsest(level.graph),
        )
        self.watch.found(found)
        self._uncompared -= {is_value}

    def _inside_transforms(self, stand_ins: StandIns, inputs: Sequence[Any]) -> Sequence[Any]:
        """Call the tower with what its inputs stand for.

        Raises:
            CaptureError: The module draws or writes to its state, where PyTorch does otherwise.
        """
        if self.watch.is_wrong:
            raise CaptureError("the compiled module differs from the module as written")
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
        self._towers: dict[int, tuple[weakref.ref[nn.Module], OptimizedForward]] = {}
        self._alike: weakref.WeakValueDictionary[Any, OptimizedForward] = (
            weakref.WeakValueDictionary()
        )

    def binding(self, modules: Iterable[nn.Module]) -> Binding:
        """Return the modules and those inside them with their towers, but for those that are known
        to run as written."""
        towers: dict[nn.Module, OptimizedForward] = {}
        for module in _in_reach(modules):
            function = _layer(module)
            if function is None:
                continue
            tower = self._tower_of(module, function)
            if tower.steps or not tower.refusals:
                towers[module] = tower
        return Binding(towers)

    def _tower_of(self, module: nn.Module, function: Callable[..., Any]) -> OptimizedForward:
        """Return the tower of a module for as long as there is the module; modules that are alike,
        such as clones that are made for each step, have one together."""
        known = self._towers.get(id(module))
        if known is not None and known[0]() is module and known[1].as_written is function:
            return known[1]
        kind = function, tuple((n, p.shape, p.dtype) for n, p in module.named_parameters())
        tower = self._alike.get(kind)
        if tower is None:
            tower = OptimizedForward(function, type(module).__name__, self.options)
            tower.quiet = True
            self._alike[kind] = tower
        gone = functools.partial(_drop, self._towers, id(module))
        self._towers[id(module)] = weakref.ref(module, gone), tower
        return tower

    @property
    def _called(self) -> list[OptimizedForward]:
        return [tower for _, tower in list(self._towers.values())]

    @property
    def said(self) -> str:
        """What to say of them, after the reason why the function is not captured."""
        names = ", ".join(sorted({f.name for f in self._called if f.steps}))
        return f"; captured by layer: {names}" if names else ""

    def reports(self) -> tuple[str, ...]:
        """Return a line for each that was called: captured, or as written and why."""
        return (
            *(f"{f.name}: captured, {len(f.steps)}" for f in self._called if f.steps),
            *(f"{f.name}: as written, {f.refusals[0]}" for f in self._called if f.refusals),
        )


def _drop(towers: dict[int, Any], key: int, gone: Any) -> None:
    """Drop the tower of a module that is gone, if it is not another's by now."""
    if key in towers and towers[key][0] is gone:
        del towers[key]


def _in_reach(modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    """Return the modules and those inside them, but nothing of those that carry towers of their
    own."""
    found: dict[nn.Module, None] = {}
    ahead = list(modules)[::-1]
    while ahead:
        module = ahead.pop()
        if module not in found and not is_bound(module):
            found[module] = None
            ahead.extend(module.children())
    return found


def _layer(module: nn.Module) -> Callable[..., Any] | None:
    """Return the ``forward`` of a module that is worth a tower: not one of PyTorch's that calls a
    single operator, nor one whose ``forward`` somebody has replaced."""
    function = forward_of(module)
    if function is None or function is nn.Module.forward or is_active(module):
        return None
    is_one_operator = type(module).__module__.startswith("torch.nn.") and not any(module.children())
    return None if is_one_operator else function


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

    A ``forward`` that was replaced on the module itself is left alone, with a warning: nothing says
    which module it calls.

    Raises:
        OptionError: A strategy that is none of a tower's.
        CaptureError: Its ``forward`` was replaced, and ``strict=True``.
    """
    _check_strategy(options)
    if options.strategy == "as written":
        return module
    own = module.__dict__.get("forward")
    if isinstance(own, types.MethodType) and own == types.MethodType(type(module).forward, module):
        del module.__dict__["forward"]  # Lightning leaves it there
    elif own is not None:
        _leave(module, own, options)
        return module
    bind(module, Towers(OptimizedForward, type(module).__name__, options))
    return module


def _leave(module: nn.Module, forward: Any, options: Options) -> None:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    where = f"{code.co_filename}:{code.co_firstlineno}" if code is not None else "?"
    reason = "its forward was replaced on the module itself; decorate it before"
    if options.strict:
        raise CaptureError(reason, where)
    warnings.warn(
        f"{type(module).__name__} runs as written: {reason} (at {where})",
        NestedGradientWarning,
        stacklevel=5,
    )


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
