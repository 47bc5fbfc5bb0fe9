"""The process behind `rewriter.background`: does the tasks that come in on standard input."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
from typing import BinaryIO

from rewriter.background import Task


def _read(stream: BinaryIO, jobs: queue.Queue[tuple[Task, bytes]]) -> None:
    """Take in jobs; when there can be no more, end even if one is being done: nobody waits."""
    try:
        while True:
            jobs.put(pickle.load(stream))
    except EOFError:
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)  # the C++ compilers too: the group is our own
        os._exit(0)


def done(task: Task, data: bytes) -> tuple[str, bytes]:
    """Do a task; return why it failed, or nothing, and its answer."""
    try:
        return "", task(data)
    # Whatever a compiler raises is for the process that asked, which reports it.
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}", b""


def main() -> None:
    """Answer each job with what `done` returns."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no answer
    jobs: queue.Queue[tuple[Task, bytes]] = queue.Queue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, jobs), daemon=True).start()
    while True:
        pickle.dump(done(*jobs.get()), answers)
        answers.flush()


if __name__ == "__main__":
    main()
