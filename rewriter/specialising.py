"""A user's function behind Dynamo's guards: captured anew for each kind of call, as written where
that fails."""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rewriter.binding import Binding, bound
from rewriter.branching import Branching
from rewriter.budget import Budget
from rewriter.capture import (
    DYNAMO_ERRORS,
    OF_VALUES,
    Trace,
    as_capture_error,
    capturing,
    compile_function,
    first_of_values,
    forget,
    is_dynamos_own,
    is_recorded,
    refuse_switched_off,
    with_inputs_returned,
)
from rewriter.dump import dump_internal
from rewriter.errors import (
    CaptureError,
    InternalError,
    KeepsChanging,
    NeedsInteger,
    NeedsNumber,
    NeedsPullbacks,
    NestedGradientWarning,
    NotDifferentiable,
    OptimizeNestedError,
    TooLittleWork,
    for_its_words,
)
from rewriter.generators import forget_draws, undo_draws
from rewriter.guarded import Miss, NoSpecialisation
from rewriter.marking import refuse_no_grad_in_transforms
from rewriter.modes import is_watched, modes_set_aside
from rewriter.options import Options, is_disabled
from rewriter.refusals import Call, Refusals
from rewriter.remedies import kind_of
from rewriter.snapshot import restored_on_error
from rewriter.speculating import OtherBranch, speculated, take_branches
from rewriter.stateful import set_aside
from rewriter.step import CaptureAgain, explaining, value_only
from rewriter.uncaptured import Ways


class LayersOf(Protocol):
    """Modules that run as towers inside of a function that is not captured."""

    def binding(self, modules: Iterable[nn.Module], /) -> Binding:
        """Return the modules and those inside them with their towers."""
        ...

    @property
    def said(self) -> str:
        """What to say of them, after the reason why the function is not captured."""
        ...

    def reports(self) -> tuple[str, ...]:
        """Return a line for each that was called: captured, or as written and why."""
        ...


class Specialising(ABC):
    """A function that is captured as one graph for each kind of call.

    Attributes:
        as_written: The user's function.
        options: How it is optimised.
        layers: The modules that calls run as towers which are not captured.
        steps: What was built, one for each specialisation so far.
        budget: What may be spent on more of them.
        quiet: Whether no warning is given when a call is not captured.
        speculates: Whether branches on values are captured as the first call takes them.
    """

    quiet = False
    speculates = False

    def __init__(self, function: Callable[..., Any], options: Options, layers: LayersOf) -> None:
        functools.update_wrapper(self, function)
        self.name: str = getattr(function, "__name__", type(function).__name__)
        self.as_written = function
        self.options = options
        self.layers = layers
        self.steps: list[Any] = []
        self._specialize_floats = self._by_pullbacks = self._fixed_sizes = False
        self._is_by_dynamo = True
        self._may_wait = True
        self._fixed_at: set[str] = set()
        self._refused = Refusals()
        self.ways = Ways(self, self._refused)
        self._calls = 0
        self._known: list[CaptureError] = []
        self.budget = Budget(_where(function))
        # What calls go through while there is no specialisation yet.
        self._new: Callable[[], Callable[..., Any]] = functools.partial(
            compile_function, function, self._built, options.dynamic
        )
        self._compiled = self._new()
        self.branching = Branching()

    @property
    def refusals(self) -> list[CaptureError]:
        """Why calls were not captured, each kind of call once."""
        return [*self._refused.all, *self.budget.given_up]

    @abstractmethod
    def _build(self, captured: torch.fx.GraphModule) -> Callable[..., Any]:
        """Return what computes the outputs of a captured graph from its inputs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # First: inside of another capture Dynamo traces this line, and knows the answer.
        if torch.compiler.is_compiling():
            return self.as_written(*args, **kwargs)
        if self.ways.is_any:
            way = self.ways.of(args, kwargs)
            if way is not None:
                return way(*args, **kwargs)
        if not self.options.enabled or is_disabled() or is_recorded():
            return self.as_written(*args, **kwargs)
        if self._refused.all and not self.steps:
            refusal = self.refusal_of(args, kwargs)
            if refusal is not None:
                return self._run_uncaptured(refusal, args, kwargs)
        try:
            if is_watched():
                with modes_set_aside(), gradients_on():
                    return self._captured_call(args, kwargs)
            if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
                return self._captured_call(args, kwargs)
            with gradients_on():
                return self._captured_call(args, kwargs)
        except CaptureError as refusal:
            reason = refusal
        except OtherBranch:
            undo_draws()
            return self._once_as_written(args, kwargs)
        return self._fall_back(reason, args, kwargs)

    def _once_as_written(self, args: Any, kwargs: Any) -> Any:
        """Run the loss as written in place of a graph: under `no_grad` for its value too."""
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return self.as_written(*args, **kwargs)
        with gradients_on():
            outputs = self.as_written(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, torch.detach, outputs)

    def _captured_call(self, args: Any, kwargs: Any) -> Any:
        """Call the loss through Dynamo's guards.

        Raises:
            CaptureError: The loss cannot be captured, or not once more; nothing of it has run.
        """
        forget_draws()
        self._calls += 1
        misses: Sequence[Miss] = ()
        if self.steps:
            if self.branching.misses:
                self.branching.ask()
            # The usual case: a specialisation exists, and Dynamo need not be prepared for ours.
            try:
                return self._compiled(*args, **kwargs)
            except NoSpecialisation as found:
                misses = found.misses
            except DYNAMO_ERRORS:
                pass
            except CaptureAgain:
                undo_draws()
                self._begin_again()
            except CaptureError:
                undo_draws()
                raise
            except OtherBranch as found:
                return self._other_way(found, args, kwargs)
        if self._refused.all and not explaining.get():
            refusal = self.refusal_of(args, kwargs)
            if refusal is not None:
                raise refusal.with_traceback(None)
        self.budget.ask(misses, self._compiled)
        with self.budget.spending(misses, self._compiled, lambda: self._owners(args, kwargs)):
            return self._capture_in_some_way(args, kwargs)

    def _other_way(self, found: OtherBranch, args: Any, kwargs: Any) -> Any:
        """Call the loss for arguments that take other branches than those that were tried.

        Raises:
            CaptureError: Such calls are too frequent.
            OtherBranch: No way is right for them, and none is to be made.
        """
        tried = self._compiled
        self.branching.miss(found, tried)
        for way in self.branching.all:
            if way is tried:
                continue
            undo_draws()
            with contextlib.suppress(OtherBranch, NoSpecialisation, *DYNAMO_ERRORS):
                outputs = way(*args, **kwargs)
                self._compiled = way
                return outputs
        undo_draws()
        if not self.branching.may_have_another:
            raise found
        self._compiled = self._new()
        try:
            with self.budget.spending((), self._compiled, lambda: self._owners(args, kwargs)):
                outputs = self._capture_in_some_way(args, kwargs)
        except CaptureError:  # what is there holds for others
            self._compiled, self.branching.is_closed = tried, True
            raise found from None
        self.branching.all.append(self._compiled)
        return outputs

    def _capture_in_some_way(self, args: Any, kwargs: Any) -> Any:
        with_open_sizes: CaptureError | None = None
        while True:
            try:
                return self._capture(args, kwargs)
            except CaptureAgain:
                undo_draws()
                self._begin_again()
            except NeedsNumber:
                if self._specialize_floats:
                    raise
                self._specialize_floats = True
            except NeedsPullbacks:
                self._by_pullbacks = True
            except CaptureError as refusal:
                if isinstance(refusal, NeedsInteger) and self._may_fix(refusal):
                    self._fixed_at.add(refusal.where)
                elif self.budget.close():
                    undo_draws()
                elif self._may_fix_sizes(refusal):
                    self._fixed_sizes, with_open_sizes = True, refusal
                    undo_draws()
                elif with_open_sizes is not None:  # it was not for the sizes
                    self._fixed_sizes = False
                    raise with_open_sizes from None
                else:
                    raise

    def _may_fix_sizes(self, refusal: CaptureError) -> bool:
        """Whether a capture may have failed for its sizes, which were open: others were captured
        before, and Dynamo takes what differs for an input from then on."""
        is_asked = not self._fixed_sizes and self.options.dynamic is None
        return is_asked and bool(self.steps) and not isinstance(refusal, TooLittleWork)

    def _may_fix(self, refusal: CaptureError) -> bool:
        """Whether an integer may be taken for one that seldom changes."""
        return self.speculates and refusal.where not in self._fixed_at

    def _begin_again(self) -> None:
        """Drop all specialisations; where a search for a form has failed, those to come are built
        before their first call."""
        if not explaining.get():
            self._may_wait = False
        self.steps.clear()
        self._compiled = self._new()
        self.branching = Branching()

    def _capture(self, args: Any, kwargs: Any) -> Any:
        if self._is_by_dynamo:
            refuse_switched_off()
        trace = Trace(self._by_pullbacks)
        try:
            how: Any = {
                "specialize_floats": self._specialize_floats,
                "fixed_sizes": self._fixed_sizes,
                "inputs": self.budget.inputs,
                "logs": self.budget.logs,
            }
            branches = speculated(self._fixed_at) if self.speculates else contextlib.nullcontext()
            with capturing(trace, **how), branches:
                return self._compiled(*args, **kwargs)
        except Exception as error:
            refusal = as_capture_error(error, trace)
            if refusal is None:
                raise
            undo_draws()
            forget(error)
            if trace.graphs > 1:
                self.steps.pop()  # the first piece of a graph that was cut
            is_own = is_dynamos_own(error, trace) or isinstance(refusal, NotDifferentiable)
            if trace.has_forward_mode and is_own:
                raise NeedsPullbacks(refusal.reason, refusal.where) from error
            raise refusal from error

    @property
    def is_on(self) -> bool:
        """Whether this function is not switched off, here or everywhere."""
        return self.options.enabled and not is_disabled()

    def refusal_of(self, args: Any, kwargs: Any) -> CaptureError | None:
        """Return why calls like this one run as written, if they have been found to."""
        return self._refused.of(args, kwargs) if self._refused.all else None

    def _built(self, captured: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        """Be Dynamo's backend."""
        if self._by_pullbacks:
            refuse_no_grad_in_transforms(captured)
        take_branches(captured)
        try:
            with set_aside():
                step = self._build(captured)
        except (OptimizeNestedError, CaptureAgain):
            raise
        except Exception as error:  # nothing of the loss has run: it can run as written
            if (place := first_of_values(captured)) is not None:
                raise CaptureError(OF_VALUES, place) from error
            raise InternalError(error, captured) from error
        self.steps.append(step)
        return with_inputs_returned(captured, step)

    def _fall_back(self, refusal: CaptureError, args: Any, kwargs: Any) -> Any:
        """Run the loss as written, and say once why."""
        if self.options.strict and not isinstance(refusal, TooLittleWork):
            raise refusal
        if refusal in self._known:
            for_its_words(refusal)
            return self._run_uncaptured(refusal, args, kwargs)
        if not self._refused.all:
            self._refused.watch(self.as_written, args, kwargs)
        # As it is before the call, which may add to a dict.
        call = Call(args, kwargs, self._refused.watched)
        try:
            with restored_on_error(self.as_written, args, kwargs):
                value = self._run_uncaptured(refusal, args, kwargs)
        except Exception as error:
            note: Any = getattr(error, "add_note", None)  # Python 3.11
            if note is not None:
                note(f"{self.name} ran as written because of: {refusal}")
            raise
        # An error of the user's own was raised above, as it is; what is left is ours to report.
        self._note_refusal(refusal, call)
        return value

    def _note_refusal(self, refusal: CaptureError, call: Call) -> None:
        """Let calls like this one run as written, and say once why."""
        self._known.append(refusal)
        is_said = self._refused.has_same(refusal)
        if not isinstance(refusal, KeepsChanging):  # what is there holds for others like it
            self._refused.add(call, refusal)
        folder = None
        if isinstance(refusal, InternalError):
            if not is_said:
                folder = dump_internal(self.name, refusal.captured, refusal.error)
            refusal.captured, refusal.error = None, for_its_words(refusal.error)
        for_its_words(refusal)
        if not (self.quiet or is_said or isinstance(refusal, TooLittleWork)):
            other = f"; {refusal.other}" if refusal.other else ""
            said = f"{refusal.reason} (at {refusal.where}){other}{self.layers.said}"
            remedy = kind_of(refusal.reason, refusal.where.partition(": ")[2]).remedy
            said += f". For one graph: {remedy}" if remedy else ""
            said += f". Please report this, with {folder}" if folder else ""
            warnings.warn(
                f"{self.name} runs as written: {said}",
                NestedGradientWarning,
                stacklevel=5,
            )

    def _owners(self, args: Any, kwargs: Any) -> Iterable[nn.Module]:
        """Return the modules whose attributes a call may read, beside those inside of them."""
        return self._modules(args, kwargs)

    @abstractmethod
    def _modules(self, args: Any, kwargs: Any) -> Iterable[nn.Module]:
        """Return the modules that a call may run."""

    def _run_uncaptured(self, refusal: CaptureError, args: Any, kwargs: Any) -> Any:
        call = Call(args, kwargs, self._refused.watched)
        if isinstance(refusal, TooLittleWork):
            value = self.as_written(*args, **kwargs)
        else:
            with bound(self.binding(args, kwargs)):
                value = self.as_written(*args, **kwargs)
        self.ways.settle(call, refusal, args, kwargs, self._calls)
        return value

    def binding(self, args: Any, kwargs: Any) -> Binding:
        """Return the modules that a call may run, with their towers."""
        return self.layers.binding(self._modules(args, kwargs))

    @property
    def is_raced(self) -> bool:
        """Whether the clock decides between this function's layers and the function as written."""
        return self.options.is_raced


def _where(function: Any) -> str:
    """Return ``file:line: code`` of a function, ``?`` for what has none."""
    function = function.func if isinstance(function, functools.partial) else function
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return "?"
    path, number = code.co_filename, code.co_firstlineno
    return f"{path}:{number}: {linecache.getline(path, number).strip()}"


@contextlib.contextmanager
def gradients_on() -> Iterator[None]:
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
