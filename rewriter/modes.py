"""Dispatch modes around a call of ours: those that watch what is run, and those that trace it.

A mode that counts FLOPs or logs operators is set aside while a loss is captured and its guards are
asked, and put back around the rewritten graph, which runs op by op through it. Under a mode that
traces, the loss has to run as written.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.nn.modules import module as nn_module
from torch.utils import _python_dispatch as dispatch
from torch.utils import checkpoint
from torch.utils.module_tracker import ModuleTracker

Modes = Sequence[Any]

is_watched: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many dispatch modes are open around this call, whatever they do."""

_TRACING = (FakeTensorMode, FunctionalTensorMode, ProxyTorchDispatchMode)
# They replay the operators of a forward pass in its recomputation.
_REPLAYING = tuple(
    getattr(checkpoint, name)
    for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
    if hasattr(checkpoint, name)
)
_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")

_aside: contextvars.ContextVar[Modes] = contextvars.ContextVar("aside", default=())

set_aside_here: Callable[[], Modes] = _aside.get
"""The modes that were set aside around this call."""


def is_traced_by_a_mode() -> bool:
    """Whether a mode around this call takes what is run for a program of its own."""
    if not is_watched():
        return False
    open_modes = dispatch._get_current_dispatch_mode_stack()
    return any(
        isinstance(mode, (*_TRACING, *_REPLAYING)) or getattr(mode, "_mode_key", None) is not None
        for mode in open_modes
    )


@contextlib.contextmanager
def modes_set_aside() -> Iterator[None]:
    """Close the modes that watch in the ``with`` block; `through_modes` opens them inside of it."""
    if not is_watched() or is_traced_by_a_mode():
        yield
        return
    modes: list[Any] = [dispatch._pop_mode() for _ in range(is_watched())][::-1]
    token = _aside.set(modes)
    try:
        with _without_trackers():
            yield
    finally:
        _aside.reset(token)
        for mode in modes:
            dispatch._push_mode(mode)


@contextlib.contextmanager
def _without_trackers() -> Iterator[None]:
    """Take out the hooks on all modules by which a mode knows where it is (`FlopCounterMode`):
    Dynamo would trace them, and guard on them."""
    taken: list[tuple[str, OrderedDict[int, Any]]] = []
    for name in _HOOKS:
        hooks = getattr(nn_module, name)
        if any(isinstance(getattr(h, "__self__", None), ModuleTracker) for h in hooks.values()):
            taken.append((name, hooks.copy()))
            for key, hook in taken[-1][1].items():
                if isinstance(getattr(hook, "__self__", None), ModuleTracker):
                    del hooks[key]
    try:
        yield
    finally:
        for name, before in taken:
            hooks = getattr(nn_module, name)
            hooks.clear()
            hooks.update(before)


def through_modes(run: Callable[..., Any], *args: Any) -> Any:
    """Call a function under the modes that were set aside."""
    modes = set_aside_here()
    if not modes:
        return run(*args)
    token = _aside.set(())
    for mode in modes:
        dispatch._push_mode(mode)
    try:
        return run(*args)
    finally:
        for _ in modes:
            dispatch._pop_mode()
        _aside.reset(token)


class Watchable:
    """Compiled code for a graph, and the graph op by op for modes that watch.

    Args:
        compile: Makes the code, when it is first needed.
        op_by_op: Makes what runs the graph as it is.
    """

    def __init__(self, compile: Callable[[], Any], op_by_op: Callable[[], Any]) -> None:
        self._compile, self._make = compile, op_by_op
        self._compiled: Any = None
        self._plain: Any = None
        if not (is_watched() or set_aside_here()):
            self._compiled = compile()

    def __call__(self, *inputs: Any) -> Any:
        if is_watched():
            if self._plain is None:
                self._plain = self._make()
            return self._plain(*inputs)
        if self._compiled is None:
            self._compiled = self._compile()
        return self._compiled(*inputs)
