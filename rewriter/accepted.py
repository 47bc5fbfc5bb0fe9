"""What may be decorated, and what is said of the rest."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn


def taken(given: Any) -> Any:
    """Return what is to be optimised of what was given: what `torch.compile` has wrapped, which
    would compile the loss as written.

    Raises:
        TypeError: Nothing can be made of it; says what to decorate in its place.
    """
    given = getattr(given, "_torchdynamo_orig_callable", given)
    if isinstance(given, nn.Module) and isinstance(getattr(given, "_orig_mod", None), nn.Module):
        given = given._orig_mod
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
        return f"{name} is a class of no modules; decorate a method of it, or an instance"
    if not callable(given):
        return (
            f"expected a loss function, a module or a class of modules, got {type(given).__name__}"
        )
    return ""
