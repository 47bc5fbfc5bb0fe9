"""Search and compile in a process of its own, while this one trains.

A process and not a thread: Inductor's tracing replaces methods of `torch.nn.Module` for all
threads, and holds the interpreter's lock. The process leaves its code in Inductor's cache on disk;
here it is then loaded in a fraction of a second.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

WORKER = "rewriter.background_worker"
LINGERS = 30.0  # seconds: a search is followed by what it has found, to be compiled


# Ctrl-C is for the training. In a session of its own the process would get as much of the cores as
# all of the training (autogroups), which waits for its slowest thread at every operator.
_APART: Any = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}

Task = Callable[[bytes], bytes]


class Job:
    """Something that is being done in the background.

    Attributes:
        task: A function at the top of a module.
        data: What it is called with.
        done: Set when it has ended, well or not.
        answer: What it has returned.
        error: Why it failed; empty if it did not.
        seconds: How long it took, the wait for its turn included.
    """

    def __init__(self, task: Task, data: bytes) -> None:
        self.task, self.data, self.done = task, data, threading.Event()
        self.answer, self.error, self.seconds = b"", "", 0.0
        self.start = time.perf_counter()  # of the wait for its turn

    def end(self, error: str, answer: bytes = b"") -> None:
        """Be done."""
        self.data, self.error, self.answer = b"", error, answer
        self.seconds = time.perf_counter() - self.start
        self.done.set()


class _Worker:
    """The other process: `rewriter.background_worker`. It ends when its input does."""

    def __init__(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
            **_APART,
        )

    def run(self, task: Task, data: bytes) -> tuple[str, bytes]:
        """Let a task be done; return why it failed, or nothing, and its answer.

        Raises:
            EOFError: The process has ended before that.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            pickle.dump((task, data), stdin)
            stdin.flush()
            return pickle.load(stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").strip().splitlines() or [""]
            raise EOFError(f"the compiling process ended, code {code}: {lines[-1]}") from error

    def kill(self) -> None:
        """End the process at once, and the compilers that it has started."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def close(self) -> None:
        """Let the process end."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # the other end may be gone
                pipe.close()
        self._process.wait()
        self._said.close()


class Queue:
    """Jobs, and a thread that hands them to a worker one by one; both end when there are no
    more."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin empty, as a forked process must: it has none of the threads."""
        self._more, self._is_ending = threading.Condition(), False
        self._waiting: deque[Job] = deque()
        self._thread: threading.Thread | None = None
        self._worker: _Worker | None = None

    def submit(self, job: Job) -> None:
        """Let a job be done."""
        job.start = time.perf_counter()
        with self._more:
            self._waiting.append(job)
            self._more.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=WORKER, daemon=True)
                self._thread.start()

    def _next(self) -> Job | None:
        with self._more:
            self._more.wait_for(lambda: self._waiting or self._is_ending, LINGERS)
            if self._waiting:
                return self._waiting.popleft()
            self._thread = None
            return None

    def _serve(self) -> None:
        worker: _Worker | None = None
        while job := self._next():
            try:
                worker = self._worker = worker or _Worker()
                job.end(*worker.run(job.task, job.data))
            except (EOFError, OSError) as error:
                job.end(str(error))
                if worker is not None:
                    worker.close()
                    worker = None
        if worker is not None:
            worker.close()

    def stop(self) -> None:
        """Let the interpreter end without waiting for what is being compiled."""
        with self._more:
            self._waiting.clear()
            self._is_ending = True
            self._more.notify()
            thread, worker = self._thread, self._worker
        if thread is not None and worker is not None:
            worker.kill()
            thread.join()


queue = Queue()
atexit.register(queue.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=queue.forget)
