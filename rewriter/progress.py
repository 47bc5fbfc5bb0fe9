"""Show that something is going on when a user has waited for two seconds."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from rewriter.switches import is_off

VARIABLE = "OPTIMIZE_NESTED_PROGRESS"
DELAY = 2.0
"""Seconds without a word."""

logger = logging.getLogger("optimize_nested")
_shown = threading.Lock()


@contextlib.contextmanager
def shown(what: str) -> Iterator[None]:
    """Say on the terminal what the ``with`` block does, once it has taken `DELAY` seconds; the line
    is gone when the block ends.

    Where standard error is no terminal, the logger ``optimize_nested`` is told when the block ends.
    ``OPTIMIZE_NESTED_PROGRESS=0`` switches the line off. Of several blocks at a time the first one
    is shown.

    Args:
        what: What the block does: ``"compiling penalty"``.
    """
    start, ended = time.monotonic(), threading.Event()
    is_watched = not is_off(VARIABLE) and sys.stderr.isatty()
    watch = threading.Thread(target=_watch, args=(what, start, ended), daemon=True)
    if is_watched:
        watch.start()
    try:
        yield
    finally:
        ended.set()
        if is_watched:
            watch.join()
        seconds = time.monotonic() - start
        if seconds > DELAY:
            logger.info("%s took %.1f s", what, seconds)


def _watch(what: str, start: float, ended: threading.Event) -> None:
    if ended.wait(DELAY) or not _shown.acquire(blocking=False):
        return
    columns = SpinnerColumn(), TextColumn("optimize_nested: {task.description}"), _Since(start)
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            progress.add_task(what, total=None)
            ended.wait()
    finally:
        _shown.release()


class _Since(ProgressColumn):
    """Seconds since the block began, which is before its line was shown."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self._start = start

    def render(self, task: Task) -> Text:
        return Text(f"… {time.monotonic() - self._start:.0f} s")
