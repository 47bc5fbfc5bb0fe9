"""What PyTorch does not announce to a torch function mode, announced to a recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._functorch import eager_transforms, predispatch
from torch._functorch import vmap as functorch_vmap
from torch.amp import autocast_mode
from torch.autograd import functional
from torch.fx import Node

from rewriter import nesting, stateful
from rewriter.recording import Recording
from rewriter.sizes import numbers
from rewriter.stateful import write_outside
from rewriter.substitutes import SUBSTITUTES, linearize

_C: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def unannounced(recording: Recording) -> Iterator[tuple[Any, str, Any]]:
    """Yield the functions that are not announced to a mode, with what to call meanwhile."""

    def of(target: Any, original: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if recording.is_busy:  # called by PyTorch, for a call that is recorded
                return original(*args, **kwargs)
            with torch._C.DisableTorchFunction(), recording.busily():
                return call(target, args, kwargs)

        return stand_in

    def step(target: Any, args: Any, kwargs: Any) -> Any:
        node = recording.step(target, args, kwargs)
        out = node.meta["example_value"] = target(*numbers(args), **kwargs)
        return out

    for owner, name, target in _STEPS:
        yield owner, name, of(target, getattr(owner, name), step)
    for owner, name, target in _OPERATORS:
        yield owner, name, of(target, getattr(owner, name), recording.operator)
    for function, substitute in SUBSTITUTES.items():
        yield functional, function.__name__, substitute
    for owner in (torch.func, eager_transforms):
        yield owner, "linearize", linearize
    # It reads values only to raise on those that a distribution is not defined for.
    yield torch.distributions.Distribution, "_validate_args", False
    yield torch, "from_numpy", of(torch.from_numpy, torch.from_numpy, recording.burn)

    def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
        if recording.is_busy:
            return original_apply.__func__(kind, *args, **kwargs)
        raise recording.refuse(f"a user-defined autograd.Function ({kind.__name__})")

    original_apply = torch.autograd.Function.__dict__["apply"]
    yield torch.autograd.Function, "apply", classmethod(apply)

    def make_parameter(kind: Any, data: Any = None, requires_grad: bool = True) -> Any:
        if recording.is_busy or data is None:
            return original_parameter(kind, data, requires_grad)
        with torch._C.DisableTorchFunction(), recording.busily():
            return recording.parameter(kind, data, requires_grad)

    original_parameter = nn.Parameter.__new__
    yield nn.Parameter, "__new__", staticmethod(make_parameter)

    def enter(self: Any) -> Any:
        if not recording.is_busy:
            arguments = (self.device, self.fast_dtype, self._enabled, self._cache_enabled)
            casts[id(self)] = recording.step(autocast_mode._enter_autocast, arguments, {})
        return original_enter(self)

    def leave(self: Any, *error: Any) -> Any:
        if id(self) in casts:
            recording.step(autocast_mode._exit_autocast, (casts.pop(id(self)),), {})
        return original_leave(self, *error)

    casts: dict[int, Node] = {}
    original_enter, original_leave = torch.autocast.__enter__, torch.autocast.__exit__
    yield torch.autocast, "__enter__", enter
    yield torch.autocast, "__exit__", leave


_STEPS: list[tuple[Any, str, Any]] = [
    (eager_transforms, "_grad_increment_nesting", _C._grad_increment_nesting),
    (eager_transforms, "_grad_decrement_nesting", _C._grad_decrement_nesting),
    (
        eager_transforms,
        "set_inplace_requires_grad_allowed",
        _C.set_inplace_requires_grad_allowed,
    ),
    (eager_transforms, "_jvp_increment_nesting", nesting.jvp_increment_nesting),
    (eager_transforms, "_jvp_decrement_nesting", nesting.jvp_decrement_nesting),
    (functorch_vmap, "_vmap_increment_nesting", predispatch._vmap_increment_nesting),
    (functorch_vmap, "_vmap_decrement_nesting", predispatch._vmap_decrement_nesting),
    (nesting.LEVELS, "_enter_dual_level", nesting.enter_dual_level),
    (nesting.LEVELS, "_exit_dual_level", nesting.exit_dual_level),
]

_OPERATORS: list[tuple[Any, str, Any]] = [
    (eager_transforms, "_wrap_for_grad", _C._wrap_for_grad),
    (eager_transforms, "_unwrap_for_grad", nesting.unwrap_for_grad),
    (
        eager_transforms,
        "_set_tensor_requires_grad",
        eager_transforms._set_tensor_requires_grad,
    ),
    (eager_transforms, "_autograd_grad", eager_transforms._autograd_grad),
    (functorch_vmap, "_add_batch_dim", predispatch._add_batch_dim),
    (functorch_vmap, "_remove_batch_dim", predispatch._remove_batch_dim),
    (nesting.DUALS, "_make_dual", nesting.make_dual),
    (nesting.DUALS, "_unpack_dual", nesting.unpack_dual),
    (stateful, "write_outside", write_outside),
]
