"""The options of the decorator, checked once."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from passes.strategies import NAMES
from rewriter.switches import is_off

BACKENDS = ("inductor", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
STARTS = ("compiled", "tiered")
CAPTURES = ("auto", "dynamo", "trace", "layers")
VERIFY = "OPTIMIZE_NESTED_VERIFY"
STRATEGIES = ("auto", "as written", *NAMES)

_disabled: contextvars.ContextVar[bool] = contextvars.ContextVar("disabled", default=False)

# What `os.environ` keeps the variables in: to be told there that one is not set, as nearly always,
# is an exception raised and caught in each call of a loss.
_environment: dict[Any, Any] = os.environ._data  # pyright: ignore[reportAttributeAccessIssue]
_VARIABLE = "OPTIMIZE_NESTED"
_KEY = os.environ.encodekey(_VARIABLE)


@dataclass(frozen=True)
class Options:
    """How a loss is optimised.

    Attributes:
        backend: ``"inductor"`` compiles the rewritten graph, ``"eager"`` runs it op by op.
        mode: Passed to Inductor. ``"max-autotune"`` and ``"max-autotune-no-cudagraphs"`` also time
            the best candidates on the arguments of the first call and keep the fastest.
        start: ``"compiled"`` compiles before the first step, so that runs repeat bit by bit;
            ``"tiered"`` runs the first steps op by op while Inductor compiles in a process of its
            own, and switches between two calls: see `rewriter.wait_until_compiled`. Where the
            cheapest form takes long to find, the very first are as written, and the search goes on
            in that process.
        dynamic: As in `torch.compile`.
        strategy: A strategy's name for all sites, or a mapping from site names to strategies;
            ``"auto"`` takes the cheapest.
        capture: ``"dynamo"`` traces the loss's Python; ``"trace"`` runs it and records the calls of
            PyTorch that it makes, once for each kind of call; ``"layers"`` captures its modules
            only. ``"auto"`` takes the first of these that can be had.
        race: Whether the first calls of a kind are spent on timing our form and the user's in turns
            where a price cannot tell which is the quicker; None means with Inductor, unless
            ``strict``, ``check`` or a strategy asks for ours. False makes runs repeat bit by bit.
        strict: Whether anything left as written is an error.
        verify: Whether each new specialisation is compared with the loss as written at its first
            call, on the caller's arguments; one that differs runs as written, with a warning. The
            environment variable ``OPTIMIZE_NESTED_VERIFY=0`` switches it off everywhere.
        check: Whether each new specialisation is compared with the loss as written in float64; a
            difference is an error.
        enabled: False calls the loss as written.
    """

    backend: str = "inductor"
    mode: str = "default"
    start: str = "compiled"
    dynamic: bool | None = None
    strategy: str | Mapping[str, str] = "auto"
    capture: str = "auto"
    race: bool | None = None
    strict: bool = False
    verify: bool = True
    check: bool = False
    enabled: bool = True

    def __post_init__(self) -> None:
        _require("backend", self.backend, BACKENDS)
        _require("mode", self.mode, MODES)
        _require("start", self.start, STARTS)
        _require("capture", self.capture, CAPTURES)
        for name in ("dynamic", "race"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                got = getattr(self, name)
                raise ValueError(f"{name}: expected None, True or False, got {got!r}")
        if isinstance(self.strategy, Mapping):
            for site, name in self.strategy.items():
                _require(f"strategy[{site!r}]", name, STRATEGIES)
        else:
            _require("strategy", self.strategy, STRATEGIES)
        for name in ("strict", "verify", "check", "enabled"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")

    @property
    def is_verified(self) -> bool:
        """Whether specialisations are compared with the loss as written, unless they are checked
        anyway."""
        return self.verify and not self.check and not is_off(VERIFY)

    @property
    def is_measured(self) -> bool:
        """Whether the best candidates are timed on the user's arguments, the fastest kept."""
        return self.mode.startswith("max-autotune")

    @property
    def is_raced(self) -> bool:
        """Whether the clock decides between our form and the user's."""
        if self.race is not None:
            return self.race
        is_asked_for = self.strict or self.check or self.strategy != "auto"
        return self.backend == "inductor" and not is_asked_for

    def strategy_for(self, site: str) -> str:
        """Return the strategy that was asked for at a site."""
        if isinstance(self.strategy, Mapping):
            return self.strategy.get(site, "auto")
        return self.strategy


def make_options(given: Mapping[str, Any]) -> Options:
    """Build `Options`, naming an unknown one and the known ones.

    Raises:
        TypeError: An option that does not exist.
        ValueError: A value an option does not take.
    """
    known = [field.name for field in fields(Options)]
    for name in given:
        if name not in known:
            raise TypeError(
                f"optimize_nested() has no option {name!r}; the options are {', '.join(known)}"
            )
    return Options(**given)


def _require(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(repr(item) for item in allowed)
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Run every decorated loss as written inside the ``with`` block (of this thread and its tasks).

    >>> with disabled():
    ...     pass
    """
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def is_disabled() -> bool:
    """Whether `disabled` or ``OPTIMIZE_NESTED=0`` (also ``false``, ``off``, ``no``) is in force."""
    return _disabled.get() or (_KEY in _environment and is_off(_VARIABLE))
