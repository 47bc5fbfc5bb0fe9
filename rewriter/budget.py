"""How often a function is captured anew because of one value that keeps changing.

A value that a specialisation holds for (a mode, the length of a list, a size) may have a few; one
that is another at each call would have the function captured at each call, for ever. So:

- an integer that has changed becomes an input of the graph, as Dynamo makes of integers and floats
  among a function's locals by itself, and a list that grows is appended to after the graph has run,
  if nothing reads it (`rewriter.logs`);
- of the specialisations that were made because of one value, `LIMIT` may be such that no later
  call has used them; the next call that they do not hold for, and all such calls after it, run as
  written.

Specialisations that are used again are not counted: who trains with twenty batch sizes, or in
train and eval mode, keeps them all.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from passes.origin import readable
from rewriter.errors import CaptureError, KeepsChanging
from rewriter.guarded import Miss

LIMIT = 8


@dataclass(frozen=True)
class Spent:
    """What captures of one function have come to.

    Attributes:
        captures: How often it was captured; a value of a kind that is not captured counts too.
        seconds: How long that took, without what is compiled later.
        inputs: Integers that were made inputs because they change.
        logs: Lists that grow, and are appended to after the graph has run.
        given_up: Why calls run as written that no specialisation holds for.
    """

    captures: int = 0
    seconds: float = 0.0
    inputs: tuple[str, ...] = ()
    logs: tuple[str, ...] = ()
    given_up: tuple[str, ...] = ()

    def __str__(self) -> str:
        times = "once" if self.captures == 1 else f"{self.captures} times"
        changing = f"; inputs because they change: {', '.join(self.inputs)}" if self.inputs else ""
        growing = f"; appended to afterwards: {', '.join(self.logs)}" if self.logs else ""
        return f"captured {times}, {self.seconds:.1f} s{changing}{growing}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@runtime_checkable
class Specialisations(Protocol):
    """A function that knows what was made of it."""

    def made(self) -> Sequence[Any]:
        """Return what there is: an object for each specialisation."""
        ...

    def is_used_again(self, made: Any, /) -> bool:
        """Whether a specialisation has had a second call."""
        ...


class Budget:
    """What one function may spend on captures.

    Args:
        where: ``file:line: code`` of the function.

    Attributes:
        limit: How many specialisations made because of one value may not have been used again.
        inputs: Integers that are made inputs, as Dynamo's expressions for them.
        logs: Lists that are taken for logs, which are appended to and not read.
    """

    def __init__(self, where: str) -> None:
        self.limit = LIMIT
        self.inputs: list[str] = []
        self.logs: list[str] = []
        self._opened: list[str] = []  # of both, for the capture at hand
        self._where = where
        self._fixed: set[str] = set()  # they were one of these, and the function was not captured
        self._differ: set[str] = set()  # integers that two modules have different ones of
        self._made: dict[str, list[Any]] = {}  # value → specialisations made because of it
        self._given_up: dict[str, KeepsChanging] = {}
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._captures, self._seconds = 0, 0.0

    @property
    def given_up(self) -> list[CaptureError]:
        """Why calls run as written that no specialisation holds for."""
        return list(self._given_up.values())

    @property
    def spent(self) -> Spent:
        """What captures have come to."""
        return Spent(
            captures=self._captures,
            seconds=self._seconds,
            inputs=tuple(map(readable, self.inputs)),
            logs=tuple(map(readable, self.logs)),
            given_up=tuple(str(reason) for reason in self._given_up.values()),
        )

    def ask(self, misses: Sequence[Miss], compiled: Callable[..., Any]) -> None:
        """Ask for one more capture; decide which integers are inputs of it.

        Args:
            misses: Why no specialisation holds for the call.
            compiled: The function behind its guards.

        Raises:
            KeepsChanging: There were enough for a value that has changed again.
        """
        blamed = {_key(miss): miss for miss in misses}
        for key in blamed:
            if key in self._given_up:
                raise self._given_up[key].with_traceback(None)
        self._opened = []
        for miss in blamed.values():
            self._open(miss)
        for key, miss in blamed.items():
            unused = [made for made in self._made.get(key, ()) if not _is_used(compiled, made)]
            if len(unused) >= self.limit:
                self._given_up[key] = reason = KeepsChanging(
                    _said(miss, self.limit), self._where if miss.where == "?" else miss.where
                )
                raise reason

    def _open(self, miss: Miss) -> None:
        """Make an integer an input, and a list a log; not an integer that another module has, which
        may stay as it is, until there is a third."""
        if miss.kind is None or miss.values[0] in self._fixed:
            return
        name, opened = miss.values[0], self.inputs if miss.kind is int else self.logs
        if name in opened:
            return
        is_new = isinstance(miss.owner, nn.Module) and miss.owner not in self._seen
        if miss.kind is int and is_new and name not in self._differ:
            self._differ.add(name)
            return
        opened.append(name)
        self._opened.append(name)

    def close(self) -> bool:
        """Hold for the values again that were made inputs or logs for this capture; return whether
        there are some, so that another one is worth while."""
        found, self._opened = self._opened, []
        self._fixed.update(found)
        self.inputs = [name for name in self.inputs if name not in found]
        self.logs = [name for name in self.logs if name not in found]
        return bool(found)

    @contextlib.contextmanager
    def spending(
        self,
        misses: Sequence[Miss],
        compiled: Callable[..., Any],
        modules: Callable[[], Iterable[nn.Module]],
    ) -> Iterator[None]:
        """Note what is made inside the ``with`` block, and how long it takes.

        Args:
            misses: Why it is made.
            compiled: The function behind its guards.
            modules: Returns what the call may read.
        """
        before, start = _made_by(compiled), time.perf_counter()
        try:
            yield
        finally:
            self._captures += 1
            self._seconds += time.perf_counter() - start
            with contextlib.suppress(TypeError):  # arguments that are not its own
                self._seen.update(inner for module in modules() for inner in module.modules())
            new = [weakref.ref(made) for made in _made_by(compiled) if made not in before]
            for key in {_key(miss) for miss in misses}:
                self._made.setdefault(key, []).extend(new or [None])


def _key(miss: Miss) -> str:
    """Return what a guard is about: a value, and of a tensor which property; for one that is about
    no value, its words without numbers."""
    if miss.values:
        what = miss.guard.partition("' ")[2].split()[:1] if miss.guard.startswith("tensor") else []
        return " ".join([*miss.values, *what])
    return "".join(letter for letter in miss.guard if not letter.isdigit())


def _said(miss: Miss, limit: int) -> str:
    names = ", ".join(map(readable, miss.values)) or "what PyTorch computes by"
    guard = miss.guard
    for value in miss.values:
        guard = guard.replace(value, readable(value))
    return (
        f"`{names}` keeps changing: of the specialisations made because of it, {limit} were used "
        f"by one call each, such as the one for `{guard}`"
    )


def _made_by(compiled: Callable[..., Any]) -> Sequence[Any]:
    return compiled.made() if isinstance(compiled, Specialisations) else ()


def _is_used(compiled: Any, made: weakref.ref[Any] | None) -> bool:
    alive = made() if made is not None else None
    if alive is None or not isinstance(compiled, Specialisations):
        return False
    return compiled.is_used_again(alive)
