"""The decorator."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from rewriter.accepted import is_module, taken
from rewriter.ahead.compile import compile_ahead
from rewriter.auto import Auto
from rewriter.deferred import Deferred, step_for
from rewriter.dump import dump_built, is_asked_for
from rewriter.errors import CaptureError
from rewriter.generators import undo_draws
from rewriter.layer import optimize_class, optimize_module
from rewriter.leaves import leaves_of
from rewriter.log import log_built, wanted
from rewriter.make_report import make_report
from rewriter.modes import is_traced_by_a_mode, modes_set_aside
from rewriter.naming import modules_in, named_leaves, named_tensors
from rewriter.obstacles import Findings, find_obstacles
from rewriter.options import Options, make_options
from rewriter.progress import shown
from rewriter.report import Report
from rewriter.rewrite import Rewritten, in_full, rewrite
from rewriter.sources import sources_of
from rewriter.specialising import gradients_on
from rewriter.start import get_ready
from rewriter.step import Explained, Step, explaining
from rewriter.switches import say_once

M = TypeVar("M", bound=nn.Module)


class OptimizedLoss(Auto):
    """A loss whose nested derivatives are rewritten; called exactly like the function it wraps.

    Attributes:
        as_written: The user's function.
        options: How it is optimised.
        steps: One `rewriter.step.Step` per specialisation built so far.
    """

    speculates = True

    def __init__(self, function: Callable[..., Any], options: Options) -> None:
        super().__init__(function, options)

    def _capture(self, args: Any, kwargs: Any) -> Any:
        if not explaining.get():
            with contextlib.suppress(TypeError):  # arguments that are not its own: an error below
                get_ready(named_tensors(self.as_written, args, kwargs).values(), self.options)
        return super()._capture(args, kwargs)

    def _build(self, captured: GraphModule) -> Step | Deferred:
        is_told = bool(wanted()) or is_asked_for()
        with shown(f"rewriting {self.name}"):
            if not (is_told or explaining.get()):
                return step_for(captured, self.options, self.name, may_wait=self._may_wait)
            rewritten = rewrite(captured, self.options, self.name)
        if is_told:
            self._tell(rewritten)
        step = Step(rewritten, self.options)
        return step if explaining.get() else step.prepare()

    def _tell(self, rewritten: Rewritten) -> None:
        """Log and write what environment variables ask for."""
        try:
            report = self._report(rewritten)
            log_built(report)
            dump_built(rewritten, report)
        # Whatever a report runs into, training goes on.
        except Exception as error:
            say_once(f"{self.name} cannot be reported on: {error!r}")

    def _modules(self, args: Any, kwargs: Any) -> Iterable[nn.Module]:
        return modules_in(self.as_written, args, kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else _BoundLoss(self, instance)

    def value_and_grad(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Return the loss and its gradients by name: ``"model.0.weight"``, ``"x"``.

        Every parameter of the modules among the arguments and every tensor argument that requires
        grad has an entry, if the loss depends on it; so has whatever else ``backward()`` would give
        a ``.grad``, by the path that leads to it: what the function closes over, reads as globals
        or through ``self`` (``self.net.0.weight``) or a helper (``helper.net.0.weight``), and
        ``leaf.0`` where none is found. No ``.grad`` is touched.

        Raises:
            TypeError: The loss returns no tensor to differentiate.
        """
        tensors = named_tensors(self.as_written, args, kwargs)
        value = self(*args, **kwargs)
        end = _scalar_of(value, self.name)
        if not end.requires_grad:
            return value, {}
        # The loss may have called `requires_grad_()` on one of its arguments.
        tensors = {name: x for name, x in tensors.items() if x.requires_grad}
        named = set(map(id, tensors.values()))
        others = [x for x in leaves_of(end, tensors.values()) if id(x) not in named]
        tensors |= named_leaves(self.as_written, args, kwargs, others)
        if not tensors:
            return value, {}
        grads = torch.autograd.grad(end, list(tensors.values()), allow_unused=True)
        return value, {n: g for n, g in zip(tensors, grads, strict=True) if g is not None}

    @modes_set_aside()
    def explain(self, *args: Any, **kwargs: Any) -> Report:
        """Return what is done to the loss for these arguments.

        The loss is captured and rewritten; nothing is compiled or run, and no state is touched. One
        that cannot be captured is captured once more without the statement that is in the way, to
        say whether that alone is.
        """
        report = self._explain(args, kwargs)
        if report.captured:
            return report
        probe = functools.partial(self._anew()._explain, args, kwargs)
        return replace(report, remedy=find_obstacles(probe, first=report, most=2).advice)

    @modes_set_aside()
    def obstacles(self, *args: Any, **kwargs: Any) -> Findings:
        """Return what keeps the loss from one graph for these arguments, each obstacle in turn, and
        what that graph would gain.

        The loss as written is run for the numbers that host code reads, on these arguments.
        """
        run = functools.partial(self.as_written, *args, **kwargs)
        return find_obstacles(functools.partial(self._anew()._explain, args, kwargs), run)

    def _anew(self) -> OptimizedLoss:
        return OptimizedLoss(self.as_written, self.options)

    def _explain(self, args: Any, kwargs: Any) -> Report:
        try:
            found = self._explained(args, kwargs)
        except CaptureError as refusal:
            return self._not_captured(refusal)
        return self._report(found.rewritten)

    def _report(self, rewritten: Rewritten) -> Report:
        known = [step.rewritten for step in self.steps if step.rewritten is not None]
        own = [step for step in self.steps if step.rewritten is rewritten]
        if rewritten not in known:
            known.append(rewritten)
        report = make_report(
            in_full(rewritten, self.options),
            specialisations=known,
            breaks=[refusal.said for refusal in self.refusals],
            spent=self.budget.spent,
            tiers=[line for step in own for line in step.tiers],
            raced=[str(step.race) for step in own if getattr(step, "race", None) is not None],
            verified="; ".join(step.verdict.said for step in own if step.verdict is not None),
        )
        before = "" if self.refused_before is None else self.refused_before.said
        return replace(report, way=self.way, refused_before=before)

    @modes_set_aside()
    def stages(self, *args: Any, **kwargs: Any) -> dict[str, GraphModule]:
        """Return the graph after each pass by name, to be run.

        Each takes what `inputs_of` returns and returns the loss's outputs and the new values of the
        state that it updates; ``joint`` returns the gradients too, those of inputs that require
        grad in the order of the inputs. Where the loss is not one scalar, ``joint`` takes the
        cotangents of its differentiable outputs after its inputs.

        Raises:
            CaptureError: The loss cannot be captured.

        >>> import torch
        >>> @optimize_nested(backend="eager")
        ... def penalty(net, x):
        ...     (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        ...     return g.square().sum()
        >>> net, x = torch.nn.Linear(2, 1), torch.ones(3, 2, requires_grad=True)
        >>> joint = penalty.stages(net, x)["joint"]
        >>> value, *gradients = joint(*penalty.inputs_of(net, x))
        >>> bool(value == penalty(net, x))
        True
        """
        found = self._explained(args, kwargs)
        stages = in_full(found.rewritten, self.options).stages
        return {stage.name: stage.runnable for stage in stages}

    def inputs_of(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return what the graphs of `stages` take for a call: parameters, buffers and tensors of
        the caller's, in the order of ``explain(...).inputs``.

        Raises:
            CaptureError: The loss cannot be captured.
        """
        return list(self._explained(args, kwargs).inputs)

    def _explained(self, args: Any, kwargs: Any) -> Explained:
        """Return what would be run for these arguments; nothing is.

        Raises:
            CaptureError: The loss cannot be captured.
        """
        if is_traced_by_a_mode():
            raise CaptureError("a dispatch mode that traces is open around this call")
        token = explaining.set(True)
        try:
            with modes_set_aside(), gradients_on():
                self._captured_call(args, kwargs)
        except Explained as found:
            undo_draws()
            return found.with_traceback(None)
        finally:
            explaining.reset(token)
        raise CaptureError("the loss computes no tensors")

    def _not_captured(self, refusal: CaptureError) -> Report:
        reason = refusal.said
        code = getattr(inspect.unwrap(self.as_written), "__code__", None)
        place = [(code.co_filename, code.co_firstlineno)] if code is not None else []
        return Report(
            captured=False,
            way="layers" if (reports := self.layers.reports()) else "as written",
            reason=reason,
            layers=reports,
            raced=tuple(map(str, self.ways.races)),
            function=self.name,
            spent=self.budget.spent,
            sources=sources_of(place),
            breaks=tuple(dict.fromkeys([*(known.said for known in self.refusals), reason])),
        )

    @modes_set_aside()
    def compile_ahead(
        self,
        path: str | os.PathLike[str],
        /,
        *args: Any,
        dynamic: Mapping[str, Any] | None = None,
        portable: bool = False,
        modes: Sequence[str] | None = None,
        cache: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> str:
        """Compile the loss for these arguments into a file that `rewriter.load` loads in a process
        that has neither the loss's nor the model's Python.

        Parameters, buffers and tensor arguments are inputs; other values are burned in, tensors
        that the loss closes over are stored. No state is touched, and with ``check=True`` alone is
        anything of the loss run: on copies, to compare it with the loss as written in float64.

        Args:
            path: The file. It is replaced whole, or not at all.
            *args: The loss's arguments.
            dynamic: Sizes that may change from call to call: argument → dimension → name, range
                ``(least, most)``, ``(name, least, most)`` or `torch.export.Dim`. Dimensions of one
                name have equal sizes; the smallest size is 2.
            portable: Write the graphs as data instead of native code: it loads on any machine and
                version that has the operators, and is compiled there.
            modes: ``["train", "eval"]`` compiles for both; otherwise for the mode that the modules
                are in, which is both if they compute the same.
            cache: A folder of artifacts that were compiled before; several processes may share it.
            **kwargs: The loss's keyword arguments; one with a name of this method's goes by
                position.

        Returns:
            The SHA-256 of the file's manifest, for ``load(path, sha256=...)``.

        Raises:
            CaptureError: The loss cannot be captured as one graph, or does something that a graph
                cannot hold; names the line and the cause.
            OptimizeNestedError: Inductor fails on it.
            TypeError, ValueError: An argument of this method is not as described here.

        >>> import tempfile, torch
        >>> from rewriter import load, optimize_nested
        >>> @optimize_nested
        ... def penalty(net, x):
        ...     (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        ...     return g.square().sum()
        >>> net, x = torch.nn.Linear(2, 1), torch.ones(3, 2, requires_grad=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     digest = penalty.compile_ahead(f"{folder}/penalty", net, x, portable=True)
        ...     loaded = load(f"{folder}/penalty", sha256=digest, backend="eager")
        >>> value, grads = loaded.value_and_grad(net.state_dict(), x)
        >>> loaded.bind(net)(x).backward()
        """
        return compile_ahead(
            self.as_written,
            self.options,
            path,
            args,
            kwargs,
            dynamic=dynamic,
            portable=portable,
            modes=modes,
            cache=cache,
        )

    def __copy__(self) -> OptimizedLoss:
        """Return itself, as a function does."""
        return self

    def __deepcopy__(self, memo: Any) -> OptimizedLoss:
        """Return itself, as a function does; of a bound method, a partial or a callable object, one
        of their copy."""
        if inspect.isroutine(self.as_written) and not inspect.ismethod(self.as_written):
            return self
        return OptimizedLoss(copy.deepcopy(self.as_written, memo), self.options)

    def __reduce__(self) -> Any:
        """Pickle by name, as a function does; one that does not bear its function's name, by the
        function and the options."""
        found: Any = sys.modules.get(getattr(self.as_written, "__module__", ""))
        for part in getattr(self.as_written, "__qualname__", "").split("."):
            found = getattr(found, part, None)
        if found is self:
            return self.as_written.__qualname__
        return OptimizedLoss, (self.as_written, self.options)

    def __repr__(self) -> str:
        return f"<optimize_nested {self.as_written!r}, {len(self.steps)} specialisations>"


class _BoundLoss:
    """A decorated method, bound to its object; to be used as any bound method is.

    Attributes:
        as_written: The user's function, bound.
    """

    def __init__(self, loss: OptimizedLoss, instance: Any) -> None:
        self._loss = self.__func__ = loss
        self.__self__ = instance
        self.as_written = functools.partial(loss.as_written, instance)
        functools.update_wrapper(self, loss.as_written)

    @property
    def __signature__(self) -> inspect.Signature:
        """The parameters after the object."""
        return inspect.signature(types.MethodType(self._loss.as_written, self.__self__))

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the decorated function: ``steps``, ``options``."""
        if name == "_loss":  # an object that is being made
            raise AttributeError(name)
        return getattr(self._loss, name)

    def __get__(self, instance: Any, owner: type | None = None) -> _BoundLoss:
        """Return itself: bound is bound."""
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _BoundLoss):
            return NotImplemented
        return self.__self__ is other.__self__ and self._loss is other._loss

    def __hash__(self) -> int:
        return hash((id(self.__self__), self._loss))

    def __copy__(self) -> _BoundLoss:
        return self

    def __deepcopy__(self, memo: Any) -> _BoundLoss:
        """Return the method of the object's copy."""
        return _BoundLoss(self._loss, copy.deepcopy(self.__self__, memo))

    def __reduce__(self) -> Any:
        """Pickle as the object and the method's name."""
        return getattr, (self.__self__, self._loss.as_written.__name__)

    def __repr__(self) -> str:
        count = len(self._loss.steps)
        name = getattr(self._loss.as_written, "__qualname__", self._loss.name)
        return f"<bound optimize_nested {name} of {self.__self__!r}, {count} specialisations>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._loss(self.__self__, *args, **kwargs)

    def value_and_grad(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """See `OptimizedLoss.value_and_grad`."""
        return self._loss.value_and_grad(self.__self__, *args, **kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> Report:
        """See `OptimizedLoss.explain`."""
        return self._loss.explain(self.__self__, *args, **kwargs)

    def obstacles(self, *args: Any, **kwargs: Any) -> Findings:
        """See `OptimizedLoss.obstacles`."""
        return self._loss.obstacles(self.__self__, *args, **kwargs)

    def stages(self, *args: Any, **kwargs: Any) -> dict[str, GraphModule]:
        """See `OptimizedLoss.stages`."""
        return self._loss.stages(self.__self__, *args, **kwargs)

    def inputs_of(self, *args: Any, **kwargs: Any) -> list[Any]:
        """See `OptimizedLoss.inputs_of`."""
        return self._loss.inputs_of(self.__self__, *args, **kwargs)

    def compile_ahead(self, path: str | os.PathLike[str], /, *args: Any, **kwargs: Any) -> str:
        """See `OptimizedLoss.compile_ahead`; what is loaded takes no ``self``."""
        method = types.MethodType(self._loss.as_written, self.__self__)
        return OptimizedLoss(method, self._loss.options).compile_ahead(path, *args, **kwargs)


def _scalar_of(value: Any, name: str) -> Tensor:
    leaves = [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
    ends = leaves if isinstance(value, Tensor) else [x for x in leaves if x.requires_grad]
    if len(ends) != 1 or ends[0].numel() != 1:
        found = ", ".join(str(tuple(x.shape)) for x in leaves) or type(value).__name__
        raise TypeError(
            f"value_and_grad: {name} must return one scalar tensor that requires grad (beside any "
            f"number that do not); it returned {found}"
        )
    return ends[0]


@overload
def optimize_nested(function: M, /, **options: Any) -> M: ...  # pyright: ignore[reportOverlappingOverload]
@overload
def optimize_nested(function: type[M], /, **options: Any) -> type[M]: ...
@overload
def optimize_nested(function: Callable[..., Any], /, **options: Any) -> OptimizedLoss: ...
@overload
def optimize_nested(
    function: None = None, /, **options: Any
) -> Callable[[Callable[..., Any]], OptimizedLoss]: ...
def optimize_nested(function: Any = None, /, **options: Any) -> Any:
    """Rewrite the nested derivatives of a loss into their cheapest exact form, and compile loss and
    gradients as one graph.

    Use as ``@optimize_nested``, ``@optimize_nested(**options)`` or ``optimize_nested(loss,
    **options)``.

    Args:
        function: A function of modules, tensors and Python values that returns a tensor, or a
            structure with tensors in it.
        **options: See `rewriter.options.Options`.

    Returns:
        A callable like ``function``; ``loss(...)`` returns what ``function`` returns, and
        ``.backward()`` on it fills ``.grad`` exactly as for ``function``.

    Raises:
        TypeError: An unknown option, or ``function`` is not callable.
        ValueError: A value an option does not take.

    >>> import torch
    >>> @optimize_nested(backend="eager")
    ... def penalty(net, x):
    ...     (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    ...     return g.square().sum()
    >>> net, x = torch.nn.Linear(2, 1), torch.ones(3, 2, requires_grad=True)
    >>> penalty(net, x).backward()
    """
    chosen = make_options(options)
    if function is None:
        return lambda function: _decorate(function, chosen)
    return _decorate(function, chosen)


def _decorate(function: Any, options: Options) -> Any:
    if isinstance(function, (staticmethod, classmethod, property)):
        return _decorate_descriptor(function, options)
    if isinstance(function, _BoundLoss):
        function = types.MethodType(function.__func__.as_written, function.__self__)
    if isinstance(function, OptimizedLoss):
        function = function.as_written
    function = taken(function)
    if not is_module(function):
        return OptimizedLoss(function, options)
    if options.capture == "trace":
        raise ValueError(
            "capture: 'trace' records a loss; expected 'auto' or 'dynamo' for a module"
        )
    if isinstance(function, nn.Module):
        return optimize_module(function, options)
    return optimize_class(function, options)


def _decorate_descriptor(given: Any, options: Options) -> Any:
    """Decorate the function inside of ``@staticmethod``, ``@classmethod`` or ``@property``."""
    if isinstance(given, property):
        if given.fget is None:
            raise TypeError("optimize_nested: got a property that cannot be read")
        return property(_decorate(given.fget, options), given.fset, given.fdel, given.__doc__)
    inner = _decorate(given.__func__, options)
    return _ClassLoss(inner) if isinstance(given, classmethod) else staticmethod(inner)


class _ClassLoss(classmethod):
    """A decorated class method."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        loss: Any = self.__func__
        return _BoundLoss(loss, type(instance) if owner is None else owner)
