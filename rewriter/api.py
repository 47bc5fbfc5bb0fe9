"""The decorator."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rewriter.capture import (
    DYNAMO_ERRORS,
    Trace,
    as_capture_error,
    capturing,
    compile_function,
    forget,
    is_dynamos_own,
    is_transformed,
    refuse_no_grad_in_transforms,
)
from rewriter.errors import CaptureError, NeedsNumber, NeedsPullbacks, NestedGradientWarning
from rewriter.naming import named_tensors
from rewriter.options import Options, is_disabled, make_options
from rewriter.report import Report, make_report
from rewriter.rewrite import rewrite
from rewriter.snapshot import restored_on_error
from rewriter.step import Explained, Step, explaining, value_only


class OptimizedLoss:
    """A loss whose nested derivatives are rewritten; called exactly like the function it wraps.

    Attributes:
        as_written: The user's function.
        options: How it is optimised.
        steps: One `rewriter.step.Step` per specialisation built so far.
    """

    def __init__(self, function: Callable[..., Any], options: Options) -> None:
        functools.update_wrapper(self, function)
        self._name: str = getattr(function, "__name__", type(function).__name__)
        self.as_written = function
        self.options = options
        self.steps: list[Step] = []
        self._specialize_floats = self._by_pullbacks = False
        self._refused: dict[Any, CaptureError] = {}
        self._compiled = compile_function(function, self._build, options.dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_on():
            return self.as_written(*args, **kwargs)
        if self._refused and _signature(args, kwargs) in self._refused:
            return self.as_written(*args, **kwargs)
        try:
            with _gradients_on():
                return self._captured_call(args, kwargs)
        except CaptureError as refusal:
            reason = refusal
        return self._fall_back(reason, args, kwargs)

    def _captured_call(self, args: Any, kwargs: Any) -> Any:
        """Call the loss through Dynamo's guards.

        Raises:
            CaptureError: The loss cannot be captured; nothing of it has run.
        """
        if self.steps:
            # The usual case: a specialisation exists, and Dynamo need not be prepared for ours.
            try:
                return self._compiled(*args, **kwargs)
            except DYNAMO_ERRORS:
                pass
        while True:
            try:
                return self._capture(args, kwargs)
            except NeedsNumber:
                if self._specialize_floats:
                    raise
                self._specialize_floats = True
            except NeedsPullbacks:
                self._by_pullbacks = True

    def _capture(self, args: Any, kwargs: Any) -> Any:
        trace = Trace(self._by_pullbacks)
        try:
            with capturing(trace, specialize_floats=self._specialize_floats):
                return self._compiled(*args, **kwargs)
        except Exception as error:
            refusal = as_capture_error(error, trace)
            if refusal is None:
                raise
            forget(error)
            if trace.has_forward_mode and is_dynamos_own(error, trace):
                raise NeedsPullbacks(refusal.reason, refusal.where) from error
            raise refusal from error

    def _is_on(self) -> bool:
        return self.options.enabled and not is_disabled() and not is_transformed()

    def _build(self, captured: torch.fx.GraphModule, inputs: Any) -> Step:
        """Be Dynamo's backend: rewrite and compile what it captured."""
        if self._by_pullbacks:
            refuse_no_grad_in_transforms(captured)
        step = Step(rewrite(captured, self.options), self.options)
        if not explaining.get():
            step.prepare()
        self.steps.append(step)
        return step

    def _fall_back(self, refusal: CaptureError, args: Any, kwargs: Any) -> Any:
        """Run the loss as written, and say once why."""
        if self.options.strict:
            raise refusal
        try:
            with restored_on_error(self.as_written, args, kwargs):
                value = self.as_written(*args, **kwargs)
        except Exception as error:
            note: Any = getattr(error, "add_note", None)  # Python 3.11
            if note is not None:
                note(f"{self._name} ran as written because of: {refusal}")
            raise
        # An error of the user's own was raised above, as it is; what is left is ours to report.
        self._refused[_signature(args, kwargs)] = refusal
        warnings.warn(
            f"{self._name} runs as written: {refusal.reason} (at {refusal.where})",
            NestedGradientWarning,
            stacklevel=4,
        )
        return value

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else _BoundLoss(self, instance)

    def value_and_grad(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Return the loss and its gradients by name: ``"model.0.weight"``, ``"x"``.

        Every parameter of the modules among the arguments and every tensor argument that requires
        grad has an entry, if the loss depends on it; modules and tensors that the function closes
        over, reads as globals or through ``self`` count too. No ``.grad`` is touched.

        Raises:
            TypeError: The loss returns no tensor to differentiate.
        """
        tensors = named_tensors(self.as_written, args, kwargs)
        value = self(*args, **kwargs)
        # The loss may have called `requires_grad_()` on one of its arguments.
        tensors = {name: x for name, x in tensors.items() if x.requires_grad}
        end = _scalar_of(value, self._name)
        if not end.requires_grad or not tensors:
            return value, {}
        grads = torch.autograd.grad(end, list(tensors.values()), allow_unused=True)
        return value, {n: g for n, g in zip(tensors, grads, strict=True) if g is not None}

    def explain(self, *args: Any, **kwargs: Any) -> Report:
        """Return what is done to the loss for these arguments.

        The loss is captured and rewritten; nothing is compiled or run, and no state is touched.
        """
        token = explaining.set(True)
        try:
            with _gradients_on():
                self._captured_call(args, kwargs)
        except Explained as found:
            return make_report(found.rewritten)
        except CaptureError as refusal:
            return Report(captured=False, reason=str(refusal))
        finally:
            explaining.reset(token)
        return Report(captured=False, reason="the loss computes no tensors")

    def __repr__(self) -> str:
        return f"<optimize_nested {self.as_written!r}, {len(self.steps)} specialisations>"


class _BoundLoss:
    """A decorated method, bound to its object."""

    def __init__(self, loss: OptimizedLoss, instance: Any) -> None:
        self._loss, self.__self__ = loss, instance
        self.as_written = functools.partial(loss.as_written, instance)
        functools.update_wrapper(self, loss.as_written)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._loss(self.__self__, *args, **kwargs)

    def value_and_grad(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """See `OptimizedLoss.value_and_grad`."""
        return self._loss.value_and_grad(self.__self__, *args, **kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> Report:
        """See `OptimizedLoss.explain`."""
        return self._loss.explain(self.__self__, *args, **kwargs)


@contextlib.contextmanager
def _gradients_on() -> Iterator[None]:
    """Let the loss's inner derivatives exist under `no_grad`, where only its value is computed."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        yield
        return
    token = value_only.set(True)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        value_only.reset(token)


def _signature(args: Any, kwargs: Any) -> Any:
    """Return what decides whether a refused loss is worth another try."""

    def kind(item: Any) -> Any:
        if isinstance(item, Tensor):
            return tuple(item.shape), item.dtype, item.requires_grad
        if isinstance(item, torch.nn.Module):
            return id(item), item.training
        return type(item)

    leaves = pytree.tree_leaves((args, kwargs))
    return tuple(kind(leaf) for leaf in leaves)


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
        A callable like ``function``: ``loss(...)`` returns what ``function`` returns, and
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


def _decorate(function: Any, options: Options) -> OptimizedLoss:
    if isinstance(function, OptimizedLoss):
        function = function.as_written
    if not callable(function) or inspect.isclass(function) or isinstance(function, torch.nn.Module):
        raise TypeError(
            f"optimize_nested: expected a loss function, got {type(function).__name__}; decorate a "
            "function that calls the module"
        )
    return OptimizedLoss(function, options)
