"""What a call does, and reads, that is not PyTorch's: files, clocks, the environment, objects."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import numpy
import torch

from rewriter.errors import CaptureError
from rewriter.host_calls import line_of, users_frames
from rewriter.host_state import HostState
from rewriter.programs import OWN, PYTHON, TORCH, owner_of
from rewriter.record import Names

# Modules in C whose functions act on the world, or tell what it is like just now.
_MODULES = {
    "time", "posix", "nt", "_io", "io", "_socket", "select", "_posixsubprocess", "_ssl", "mmap",
    "_uuid", "fcntl", "termios", "resource", "_winapi", "msvcrt", "signal",
}  # fmt: skip
_HARMLESS = {
    "fspath", "fsencode", "fsdecode", "getpid", "cpu_count", "get_terminal_size", "StringIO",
    "BytesIO", "text_encoding", "strftime",
}  # fmt: skip
_BUILTINS = {"print", "input", "open", "breakpoint"}
_NAMED = {"start_new_thread", "start_joinable_thread", "fromfile", "now", "utcnow", "today"}

# Python's own and PyTorch's that is run where no effect is meant that anyone would miss.
_QUIET = tuple(
    os.path.join(os.path.dirname(os.__file__), name)
    for name in ("logging" + os.sep, "warnings.py", "linecache.py", "importlib", "traceback.py")
) + tuple(
    os.path.join(os.path.dirname(torch.__file__), name)
    for name in (
        "_dynamo", "_logging", "fx", "_subclasses", "_inductor", "_guards", "utils/_traceback",
        "_library", "_ops", "_jit_internal", "overrides", "_functorch", "utils/_python_dispatch",
    )
)  # fmt: skip


def _code_of(function: Any) -> CodeType | None:
    return getattr(function, "__code__", None)


# What is read by these is another value at any time, and no argument.
_READERS = {
    _code_of(type(os.environ).__getitem__): "reads the environment",
    _code_of(torch.random.initial_seed): "reads the state of a random generator",
    _code_of(torch.random.get_rng_state): "reads the state of a random generator",
    _code_of(torch.random.seed): "seeds a random generator",
}


class Effect(BaseException):
    """A call is about to do what it must not do in a run that is not to be noticed.

    No `Exception`: the user's code does not catch it.
    """

    def __init__(self, refusal: CaptureError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class Effects(Names):
    """Watch the Python that is run, as a profile function.

    Args:
        state: What the call can change.
        is_stopped: Whether a call with an effect is stopped before it has it.

    Attributes:
        found: The first effect.
    """

    def __init__(self, state: HostState, *, is_stopped: bool) -> None:
        super().__init__()
        self.state, self.is_stopped = state, is_stopped
        self.found: CaptureError | None = None

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        super().__call__(frame, event, argument)
        if self.is_ours():
            return
        if event == "call":
            self.state.see(frame)
            reason = _READERS.get(frame.f_code, "")
        elif event == "c_call":
            reason = _effect_of(argument, self.state.was_there)
        else:
            return
        if not reason or _is_quiet(frame):
            return
        effect = CaptureError(f"the loss {reason}", line_of(_without_libraries(users_frames())))
        self.found = self.found or effect
        if self.is_stopped:
            raise Effect(effect)


def _without_libraries(frames: list[FrameType]) -> list[FrameType]:
    own = [f for f in frames if owner_of(f.f_code.co_filename) not in (PYTHON, TORCH, OWN)]
    return own or frames


def _effect_of(function: Any, was_there: Callable[[Any], bool]) -> str:
    """Return what a function in C does that is no computation, in words; nothing if it is one."""
    name = getattr(function, "__name__", "")
    owner = getattr(function, "__self__", None)
    if isinstance(owner, io.IOBase):
        is_own = isinstance(owner, (io.StringIO, io.BytesIO)) and not was_there(owner)
        return "" if is_own else f"calls {name} of a file"
    module = getattr(function, "__module__", None) or ""
    if module == "builtins":
        return f"calls {name}" if name in _BUILTINS else ""
    if name in _HARMLESS:
        return ""
    if module in _MODULES:
        return f"calls {module.strip('_')}.{name}"
    is_clock = name in ("now", "utcnow", "today") and isinstance(owner, type)
    if is_clock or name in _NAMED - {"now", "utcnow", "today"}:
        return f"calls {name}"
    return ""


def _is_quiet(frame: FrameType | None) -> bool:
    """Whether a call is made by Python, PyTorch or ours on the way to something else."""
    while frame is not None:
        path = frame.f_code.co_filename
        owner = owner_of(path)
        if owner == OWN or path.startswith(_QUIET) or path.startswith("<frozen importlib"):
            return True
        if owner not in (PYTHON, TORCH):
            return False
        frame = frame.f_back
    return True


def watched(effects: Effects, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function and return its result; ``effects`` gets to know what it does."""
    profile = sys.getprofile()
    sys.setprofile(effects)
    try:
        return function(*args, **kwargs)
    finally:
        sys.setprofile(profile)


def unsteady(found: dict[str, Any]) -> str:
    """Return which of the things that a call reads cannot be compared from call to call; nothing
    if all can be.

    Args:
        found: What it reads, by path.
    """
    for path, value in found.items():
        if isinstance(value, _MOVING) or (
            hasattr(value, "__next__") and hasattr(value, "__iter__")
        ):
            return f"`{path}`, a {type(value).__name__}"
        if isinstance(value, numpy.ndarray) and (
            value.nbytes > _MAX_BYTES or value.dtype.hasobject
        ):
            return f"`{path}`, an array too large to be compared at each call"
    return ""


_MOVING = (bytearray, memoryview, io.IOBase)
_MAX_BYTES = 2**22
