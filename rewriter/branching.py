"""Which way a call goes through a loss that branches on values.

A specialisation holds for the branches that its first call has taken. A call that takes others is
run as written the first time, captured in a way of its own the second time, and from then on found
by trying: the way of the last call first. A wrong try costs a run of a graph, and there is a limit
to that: a wrong try costs as much credit as `HITS` right ones bring, and once it is spent the loss
runs as written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rewriter.errors import KeepsChanging
from rewriter.speculating import OtherBranch

MOST_WAYS = 4
CREDIT = 4.0
HITS = 4


class Branching:
    """The ways through one loss.

    Attributes:
        all: Functions behind their guards, each for other branches.
        is_closed: Whether no more are captured.
        given_up: Why the loss runs as written, if it does.
        misses: Calls that took other branches than the way that was tried first.
    """

    def __init__(self) -> None:
        self.all: list[Callable[..., Any]] = []
        self.is_closed = False
        self.given_up: KeepsChanging | None = None
        self.misses = 0
        self._credit = CREDIT

    def ask(self) -> None:
        """Ask for a try, which is right if `miss` is not told otherwise.

        Raises:
            KeepsChanging: There were too many in vain.
        """
        if self.given_up is not None:
            raise self.given_up.with_traceback(None)
        self._credit = min(CREDIT, self._credit + 1 / HITS)

    def miss(self, found: OtherBranch, tried: Callable[..., Any]) -> None:
        """Note a try in vain.

        Args:
            found: What came of it.
            tried: The way.

        Raises:
            KeepsChanging: It was one too many.
        """
        if tried not in self.all:
            self.all.append(tried)
        self.misses += 1
        self._credit -= 1
        if self._credit < 0:
            self.given_up = KeepsChanging(
                "a branch on the value of a tensor that goes both ways", found.where
            )
            raise self.given_up

    @property
    def may_have_another(self) -> bool:
        """Whether a call that no way was right for is captured."""
        return not self.is_closed and len(self.all) < MOST_WAYS and self.misses > 1
