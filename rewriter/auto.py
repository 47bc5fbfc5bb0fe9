"""``capture="auto"``: Dynamo; where it refuses, a recording; where that is refused, layers.

A recording runs the user's code again, so that must be harmless. The first call that Dynamo refuses
runs as written, once, and is watched: what it changed beside tensors, what it read that may be
another value at any time (`rewriter.effects`). Only if there is nothing of that kind is it recorded
(two to four runs more, each of which is stopped before it has an effect, and put back), for the
calls that follow. One that has changed something has a second chance at the next call: what it
keeps may have been made by the first one. `TRIES` refusals of recordings are enough for a loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rewriter.budget import LIMIT
from rewriter.capture import is_switched_off
from rewriter.effects import Effects, watched
from rewriter.errors import (
    CaptureError,
    InternalError,
    KeepsChanging,
    TooLittleWork,
    for_its_words,
)
from rewriter.generators import HostGenerators
from rewriter.host_state import HostState
from rewriter.layer import Layers
from rewriter.modes import is_watched
from rewriter.options import Options, disabled
from rewriter.recorder import Recorder
from rewriter.refusals import Call
from rewriter.snapshot import restored_on_error
from rewriter.specialising import Specialising, gradients_on
from rewriter.step import explaining

TRIES = 2
UNUSED = 3  # recordings that were made because of one value, and used by one call each

# Calls that no recording would serve better: what stands in the way is no host code.
_NO_MATTER_OF_CODE = (TooLittleWork, KeepsChanging, InternalError)


class Auto(Specialising):
    """A loss that is captured in the first of several ways that can capture it.

    Attributes:
        refused_before: Why Dynamo does not capture the loss, if a recording does.
    """

    def __init__(self, function: Callable[..., Any], options: Options) -> None:
        super().__init__(function, options, Layers(options))
        self.refused_before: CaptureError | None = None
        self._pending: CaptureError | None = None  # there is a second chance at the next call
        self._tries = 0
        if options.capture == "trace":
            self._record_from_now(is_careful=False)
        elif options.capture == "layers":
            self.quiet = True

    @property
    def way(self) -> str:
        """How calls are captured: ``"dynamo"``, ``"trace"`` or ``"layers"``."""
        if self.options.capture == "layers":
            return "layers"
        return "dynamo" if self._is_by_dynamo else "trace"

    def _record_from_now(self, *, is_careful: bool) -> None:
        options = self.options
        how: Any = {
            "check": options.check or options.is_verified,
            "dynamic": options.dynamic,
            "is_careful": is_careful,
        }
        self._is_by_dynamo = False
        self._new = functools.partial(Recorder, self.as_written, self._built, **how)
        self._compiled = self._new()

    def _captured_call(self, args: Any, kwargs: Any) -> Any:
        if self.options.capture == "layers":
            raise CaptureError("capture='layers' was asked for")
        if self._pending is not None and not explaining.get():
            raise self._pending.with_traceback(None)
        try:
            return super()._captured_call(args, kwargs)
        except CaptureError as refusal:
            if not (explaining.get() or self.options.strict) or not self._may_record(refusal):
                raise
            reason = refusal
        with self._recording(reason):
            return super()._captured_call(args, kwargs)

    def _may_record(self, refusal: CaptureError) -> bool:
        return (
            self.options.capture == "auto"
            and self._is_by_dynamo
            and not self.steps
            and self._tries < TRIES
            and not isinstance(refusal, _NO_MATTER_OF_CODE)
            and not is_switched_off()
            and not is_watched()
            and not torch._C._are_functorch_transforms_active()
        )

    @contextmanager
    def _recording(self, refusal: CaptureError) -> Iterator[None]:
        """Capture by recordings in the block, and after it if nothing is raised.

        Raises:
            CaptureError: Both ways are refused.
        """
        before = self._new, self._compiled
        self._record_from_now(is_careful=True)
        self.budget.limit = UNUSED
        try:
            yield
        except Exception as error:
            self._is_by_dynamo, self.budget.limit = True, LIMIT
            self._new, self._compiled = before
            self.steps.clear()
            own = error if isinstance(error, CaptureError) else InternalError(error, None)
            raise self._refused_twice(refusal, own) from None
        finally:
            if self.steps or explaining.get():
                self._noted(refusal)
        self._pending = None

    def _noted(self, refusal: CaptureError) -> None:
        for_its_words(refusal)
        self.refused_before = None if self._is_by_dynamo else refusal

    def _refused_twice(self, refusal: CaptureError, other: CaptureError) -> CaptureError:
        if not explaining.get():
            self._tries += 1
        self._pending = None
        both = CaptureError(refusal.reason, refusal.where)
        both.other = f"recorded: {other.said}"
        return both

    def _fall_back(self, refusal: CaptureError, args: Any, kwargs: Any) -> Any:
        if self.options.strict or not self._may_record(refusal):
            return super()._fall_back(refusal, args, kwargs)
        call = Call(args, kwargs)
        with disabled(), restored_on_error(self.as_written, args, kwargs):
            state = HostState(self.as_written, args, kwargs)
            effects, generators = Effects(state, is_stopped=False), HostGenerators()
            value = watched(effects, self.as_written, args, kwargs)
        effect = effects.found
        if effect is None and generators.are_moved():
            effect = CaptureError("the loss draws from a random generator of Python or NumPy")
        if effect is None and state.is_too_large:
            effect = CaptureError("the loss can reach more objects than can be compared")
        if effect is None and (path := state.moving()):
            effect = CaptureError(f"the loss can move `{path}`")
        changed = state.changes() if effect is None else []
        if changed or (effect is None and Call(args, kwargs).exact != call.exact):
            if self._pending is None:
                self._pending = for_its_words(refusal)  # pyright: ignore[reportAttributeAccessIssue]
                return value
            name = changed[0] if changed else "its arguments"
            effect = CaptureError(f"the loss changes `{name}` at each call")
        if effect is not None:
            self._note_refusal(self._refused_twice(refusal, effect), call)
            return value
        try:
            self._record(refusal, args, kwargs)
        except CaptureError as both:
            self._note_refusal(both, call)
        return value

    def _record(self, refusal: CaptureError, args: Any, kwargs: Any) -> None:
        """Make a recording for the calls that follow."""
        with self._recording(refusal):
            assert isinstance(self._compiled, Recorder)
            with self._compiled.only_making(), gradients_on():
                super()._captured_call(args, kwargs)
