"""What may be decorated, and what is said of the rest."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

_EXPECTED = "expected a loss function, a module or a class of modules"


def taken(given: Any) -> Any:
    """Return what is to be optimised of what was given: what `torch.compile` has wrapped, which
    would compile the loss as written.

    Raises:
        TypeError: Nothing can be made of it; says what to decorate in its place.
    """
    name = "_orig_mod" if isinstance(given, nn.Module) else "_torchdynamo_orig_callable"
    given = getattr(given, name, given)
    if isinstance(given, nn.Module) and getattr(given, "_compiled_call_impl", None) is not None:
        given._compiled_call_impl = None  # what `module.compile()` has set
    if said := _refusal(given):
        raise TypeError(f"optimize_nested: {said}")
    return given


def is_module(given: Any) -> bool:
    """Whether it is a module, or a class of modules."""
    return isinstance(given, nn.Module) or (inspect.isclass(given) and issubclass(given, nn.Module))


def _refusal(given: Any) -> str:
    name = getattr(given, "__qualname__", None) or type(given).__name__
    if isinstance(given, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        return (
            f"{name} is TorchScript, which cannot be captured; decorate the Python module or "
            "function that it was made of"
        )
    if isinstance(given, (functools.cached_property, functools.partialmethod)):
        return f"got a {type(given).__name__}; decorate the function that it is made of"
    function = inspect.unwrap(given) if callable(given) else given
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return f"{name} is asynchronous; decorate a plain function that it calls"
    if inspect.isgeneratorfunction(function):
        return f"{name} is a generator; decorate a function that returns its tensors"
    if inspect.isclass(given) and not is_module(given):
        return f"{_EXPECTED}, got the class {name}; decorate a method of it, or an instance"
    if not callable(given):
        return f"{_EXPECTED}, got {type(given).__name__}"
    return ""
