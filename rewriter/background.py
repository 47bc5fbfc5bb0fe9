"""Compile graphs in a process of their own, while this one trains.

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

WORKER = "rewriter.background_worker"


class Job:
    """A graph that is being compiled in the background.

    Attributes:
        data: What `rewriter.codegen.packed` returned.
        done: Set when the compilation has ended, well or not.
        error: Why it failed; empty if it did not.
        seconds: How long it took, the wait for its turn included.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.done = data, threading.Event()
        self.error, self.seconds = "", 0.0
        self.start = time.perf_counter()

    def end(self, error: str) -> None:
        """Be done."""
        self.data, self.error = b"", error
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
            start_new_session=True,  # Ctrl-C is for the training
        )

    def run(self, data: bytes) -> str:
        """Let a graph be compiled; return why that failed, or nothing.

        Raises:
            EOFError: The process has ended before that.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            pickle.dump(data, stdin)
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
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._thread: threading.Thread | None = None
        self._worker: _Worker | None = None

    def submit(self, data: bytes) -> Job:
        """Begin to compile what `rewriter.codegen.packed` returned."""
        job = Job(data)
        with self._lock:
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=WORKER, daemon=True)
                self._thread.start()
        return job

    def _next(self) -> Job | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._thread = None
            return None

    def _serve(self) -> None:
        worker: _Worker | None = None
        while job := self._next():
            try:
                worker = self._worker = worker or _Worker()
                job.end(worker.run(job.data))
            except (EOFError, OSError) as error:
                job.end(str(error))
                if worker is not None:
                    worker.close()
                    worker = None
        if worker is not None:
            worker.close()

    def stop(self) -> None:
        """Let the interpreter end without waiting for what is being compiled."""
        with self._lock:
            self._waiting.clear()
            thread, worker = self._thread, self._worker
        if thread is not None and worker is not None:
            worker.kill()
            thread.join()


queue = Queue()
atexit.register(queue.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=queue.forget)
