"""Make code for a graph: at once, or in the background while the graph runs op by op."""

from __future__ import annotations

import functools
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.fx import GraphModule

from passes.graph import value_of
from rewriter.background import Job, queue
from rewriter.codegen import (
    Compiled,
    compile_graph,
    fill_cache,
    get_toolchain_ready,
    has_compiler,
    is_for_cpp,
    packed,
)
from rewriter.errors import NestedGradientWarning, OptimizeNestedError
from rewriter.modes import Watchable, is_watched
from rewriter.options import Options
from rewriter.parcel import CannotPack
from rewriter.progress import shown
from rewriter.stateful import set_aside


def get_ready(tensors: Iterable[Tensor], options: Options) -> None:
    """Begin what compiled code needs besides a graph, before the graph is there.

    Args:
        tensors: What a loss is about to be captured for.
        options: ``backend`` and ``start`` count.
    """
    if options.backend == "inductor" and options.start == "compiled" and is_for_cpp(tensors):
        get_toolchain_ready()


def code_for(
    module: GraphModule,
    options: Options,
    what: str,
    on_switch: Callable[[], object] = lambda: None,
    static: Sequence[int] = (),
) -> Compiled:
    """Return a function that computes what a functional ATen graph computes.

    Args:
        module: The graph; its placeholders hold fake tensors.
        options: ``backend``, ``mode``, ``start`` and ``strict`` count.
        what: What the graph is, for messages.
        on_switch: Called when compiled code is there for the next call.
        static: See `rewriter.codegen.compile_graph`.
    """

    def make(*, strict: bool) -> Compiled:
        return compile_graph(module, options.backend, options.mode, strict=strict, static=static)

    if options.backend == "eager":
        return make(strict=options.strict)
    values = map(value_of, module.graph.nodes)
    if options.start == "tiered" and options.backend == "inductor" and has_compiler(values):
        try:
            return Tiered(module, options, what, make, on_switch)
        except CannotPack as error:
            warnings.warn(
                f'optimize_nested: start="tiered" cannot be had for {what}, which is compiled '
                f"before its first step: {error}",
                NestedGradientWarning,
                stacklevel=2,
            )
    operators = sum(node.op == "call_function" for node in module.graph.nodes)

    def compile() -> Compiled:
        with shown(f"compiling {what}, {operators} operators"):
            return make(strict=options.strict)

    return Watchable(compile, lambda: compile_graph(module, "eager", options.mode, strict=True))


class Tiered:
    """A graph that runs op by op until its compiled code is there.

    The draws from random generators are the same before and after; rounding is not.

    Attributes:
        is_waiting: Whether compiled code has not taken over yet.

    Args:
        module: The graph.
        options: How it is to be compiled.
        what: What it is, for messages.
        make: Compiles it here, or finds its code on disk.
        on_switch: Called when compiled code is there for the next call.
    """

    def __init__(
        self,
        module: GraphModule,
        options: Options,
        what: str,
        make: Callable[..., Compiled],
        on_switch: Callable[[], object],
    ) -> None:
        self._options, self._what = options, what
        self._make, self._on_switch = make, on_switch
        self._run = compile_graph(module, "eager", options.mode, strict=options.strict)
        self._op_by_op = self._run
        self._calls, self.is_waiting = 0, True
        self._seconds = 0.0
        self._error = ""
        self._switching = threading.Lock()
        self._job = Job(fill_cache, packed(module, options.mode))
        queue.submit(self._job)
        waiting.add(self)

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if is_watched():
            return self._op_by_op(*inputs)
        run = self._run
        if self.is_waiting:
            self._calls += 1
            if self._job.done.is_set():
                self.switch()
        return run(*inputs)

    def switch(self) -> None:
        """Let the next call run compiled code, now that the job is done.

        Raises:
            OptimizeNestedError: With ``strict``, if the compilation failed.
        """
        if not self._switching.acquire(blocking=False):
            return  # another thread is at it
        try:
            if self.is_waiting:
                self._load()
        finally:
            self.is_waiting = False
            waiting.discard(self)
            self._switching.release()

    def _load(self) -> None:
        self._error = self._job.error
        if not self._error:
            try:
                with set_aside():
                    self._run = self._make(strict=True)
            # Whatever Inductor raises, training goes on.
            except Exception as error:
                self._error = (str(error).strip() or type(error).__name__).splitlines()[0]
        self._seconds = time.perf_counter() - self._job.start
        if not self._error:
            self._on_switch()
            return
        said = f"Inductor fails on {self._what} in the background: {self._error}"
        if self._options.strict:
            self._run = functools.partial(_refuse, f"strict=True: {said}")
            self._run()
        warnings.warn(
            f"optimize_nested: {said}; it goes on op by op", NestedGradientWarning, stacklevel=4
        )

    def wait(self, seconds: float | None) -> bool:
        """Wait for the job; return whether it is done."""
        return self._job.done.wait(seconds)

    def __str__(self) -> str:
        """Say which tier runs, and when the switch came."""
        if self.is_waiting:
            passed = time.perf_counter() - self._job.start
            how = f"op by op, {self._calls} calls so far; being compiled for {passed:.1f} s"
        elif self._error:
            how = f"op by op: compiling failed, {self._error}"
        else:
            how = f"compiled, after {self._calls} calls op by op and {self._seconds:.1f} s"
        return f"{self._what}: {how}"


def is_waiting(code: Compiled) -> bool:
    """Whether other code may take this one's place."""
    return isinstance(code, Tiered) and code.is_waiting


def _refuse(reason: str, *_: Any) -> Sequence[Any]:
    raise OptimizeNestedError(reason)


class Switching(Protocol):
    """What switches to something faster when a job in the background is done."""

    def wait(self, seconds: float | None) -> bool:
        """Wait for the job; return whether it is done."""
        ...

    def switch(self) -> None:
        """Switch, now that the job is done; wait for no more."""
        ...


waiting: weakref.WeakSet[Switching] = weakref.WeakSet()


def wait_until_compiled(timeout: float | None = None) -> bool:
    """Wait for what is being compiled in the background: with ``start="tiered"``, the next call of
    every loss and module that was called before runs compiled code.

    Args:
        timeout: Seconds to wait at most; None for no limit.

    Returns:
        False if the time was up before.

    Raises:
        OptimizeNestedError: With ``strict``, if a compilation failed.

    >>> wait_until_compiled(timeout=60)
    True
    """
    end = None if timeout is None else time.perf_counter() + timeout
    while found := list(waiting):  # what a search has found is compiled after it
        for item in found:
            if not item.wait(None if end is None else max(end - time.perf_counter(), 0)):
                return False
            item.switch()
    return True
