"""One loss of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Batch = Callable[[], tuple[Any, ...]]
Build = Callable[[], tuple[Callable[..., Any], Batch]]

GRAPH = "graph"
RECORDED = "recorded"
PARTLY = "partly"
BY_LAYER = "by layer"
AS_WRITTEN = "as written"
WAYS = (GRAPH, RECORDED, PARTLY, BY_LAYER, AS_WRITTEN)
"""How a loss runs, the best first: as one graph (or one for each kind of call) that Dynamo has
traced, or that a recording has; calls of some kinds so; only the modules that it calls; not at
all."""


@dataclass(frozen=True)
class Loss:
    """A loss, and how it is captured.

    Attributes:
        build: Makes the loss, with networks of its own, and a function that returns the arguments
            of its next call.
        way: One of ``WAYS``: what the tests hold it to; None if nothing is known.
        is_whole_step: Whether the loss calls ``backward()`` itself, as closures of optimizers do.
        differs: What is known to be left otherwise than as written.
        is_slow: Whether it takes long to capture.
    """

    build: Build
    way: str | None = GRAPH
    is_whole_step: bool = False
    differs: str = ""
    is_slow: bool = False

    @property
    def name(self) -> str:
        return self.build.__name__

    @property
    def field(self) -> str:
        return self.build.__module__.rsplit(".", 1)[-1]

    @property
    def about(self) -> str:
        """The first line of the builder's docstring."""
        return (self.build.__doc__ or "").strip().splitlines()[0].rstrip(".")
