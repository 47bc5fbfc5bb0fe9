"""What calls go through that are not captured: in the end the user's function itself, one look-up
away."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import nn

from rewriter.binding import Binding, bound
from rewriter.capture import is_recorded
from rewriter.errors import CaptureError, TooLittleWork
from rewriter.modes import is_watched
from rewriter.refusals import Call, Refusals, exact_key, leaves_in, rough_key
from rewriter.turns import Turns

Way = Callable[..., Any]

AS_WRITTEN, BY_LAYER = "as written", "by layer"

# Kinds of calls; a loss that makes more of them begins anew.
_MOST = 512
# How many calls in a row no specialisation holds for, where there are some, before their guards are
# asked no more, and for how many calls.
_STREAK, _PAUSE = 8, 1000
# After how many calls a loss's modules are looked for again.
_AGAIN = 100
# Calls of sizes that cannot be compared, before the loss as written is kept.
_MOST_OTHERS = 50
# A first call may not come to what others call.
_CALLS = 2


class Owner(Protocol):
    """A function that is captured, where it can be."""

    as_written: Callable[..., Any]
    steps: list[Any]

    @property
    def is_on(self) -> bool:
        """Whether it is not switched off."""
        ...

    @property
    def is_raced(self) -> bool:
        """Whether the clock decides between its layers and the function as written."""
        ...

    def binding(self, args: Any, kwargs: Any, /) -> Binding:
        """Return the modules that a call may run, with their towers."""
        ...


class Ways:
    """What each kind of call goes through that is known not to be captured.

    Attributes:
        is_any: Whether there is such a kind.
        races: What was timed.
    """

    def __init__(self, owner: Owner, refused: Refusals) -> None:
        self._owner, self._refused = owner, refused
        self.is_any = False
        self.races: list[Turns] = []
        self._exact: dict[Any, Way] = {}
        self._alike: dict[Any, Way] = {}
        self._seen: dict[Any, tuple[int, int]] = {}

    def of(self, args: Any, kwargs: Any) -> Way | None:
        """Return what such a call goes through, if that is known."""
        watched = self._refused.watched
        if self._alike:
            found = self._alike.get(rough_key(args, kwargs, watched))
            if found is not None:
                return found
        return self._exact.get(exact_key(args, kwargs, watched)) if self._exact else None

    def settle(self, call: Call, refusal: CaptureError, args: Any, kwargs: Any, count: int) -> None:
        """Note that a call has run without being captured; decide on later ones.

        Args:
            call: Its arguments, as they were before.
            refusal: Why it was not captured.
            args: Its arguments.
            kwargs: Its keyword arguments.
            count: How many calls there were that a specialisation was looked for.
        """
        if isinstance(refusal, TooLittleWork):
            self._put(self._exact, call.exact, self._owner.as_written)
            return
        is_alike = self._refused.is_of_its_kind(call)
        key = call.alike if is_alike else call.exact
        at, times = self._seen.get(key, (-1, 0))
        has_steps = bool(self._owner.steps)
        times = times + 1 if at == count - 1 or not has_steps else 1
        self._seen[key] = count, times
        if times < (_STREAK if has_steps else 1 if is_alike else _CALLS):
            return
        store = self._alike if is_alike else self._exact
        binding = self._owner.binding(args, kwargs)
        if not binding.is_of_use:
            self._put(store, key, self._owner.as_written)
            return
        by_layer = _ByLayer(self._owner)
        if not self._owner.is_raced:
            self._put(store, key, by_layer)
            return
        turns = Turns((AS_WRITTEN, BY_LAYER))
        self.races.append(turns)
        settle = functools.partial(self._put, store, key)
        self._put(store, key, _Raced(self._owner, by_layer, turns, settle))

    def _put(self, store: dict[Any, Way], key: Any, way: Way) -> None:
        if len(store) >= _MOST:
            store.clear()
        if self._owner.steps:
            way = _Paused(way, functools.partial(store.pop, key, None))
        store[key] = way
        self.is_any = True


class _ByLayer:
    """The function as written, the modules that it calls as towers."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._binding, self._ids, self._left = Binding({}), [], 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner
        if not owner.is_on or is_recorded():
            return owner.as_written(*args, **kwargs)
        ids = [id(x) for x in leaves_in(args, kwargs) if isinstance(x, nn.Module)]
        if not self._left or ids != self._ids:
            self._binding, self._ids, self._left = owner.binding(args, kwargs), ids, _AGAIN
        self._left -= 1
        with bound(self._binding):
            return owner.as_written(*args, **kwargs)


class _Raced:
    """The function as written and by layer in turns, until the clock has decided."""

    def __init__(
        self, owner: Owner, by_layer: Way, turns: Turns, settle: Callable[[Way], None]
    ) -> None:
        self._owner, self._turns, self._settle = owner, turns, settle
        self._forms: Sequence[Way] = (owner.as_written, by_layer)
        self._key: Any = None
        self._others = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        turns = self._turns
        if turns.is_over:
            way = self._forms[turns.winner]
            self._settle(way)
            return way(*args, **kwargs)
        if not self._owner.is_on or is_recorded():
            return self._owner.as_written(*args, **kwargs)
        if is_watched():  # a profiler's time is not the user's
            return self._forms[-1](*args, **kwargs)
        key = exact_key(args, kwargs)
        self._key = self._key or key
        if key != self._key:  # of another size
            self._others += 1
            if self._others > _MOST_OTHERS:
                self._settle(self._owner.as_written)
            return self._forms[-1](*args, **kwargs)
        return turns.run(self._forms[turns.turn], args, kwargs)


class _Paused:
    """A way for so many calls, after which guards are asked once more."""

    def __init__(self, way: Way, end: Callable[[], object]) -> None:
        self._way, self._end, self._left = way, end, _PAUSE

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        if not self._left:
            self._end()
        return self._way(*args, **kwargs)
