"""Whose a file of Python is: the user's, a library's, Python's own, PyTorch's or ours."""

from __future__ import annotations

import functools
import inspect
import os
import sysconfig
import types
from typing import Any

import mpmath
import numpy
import sympy
import torch

USER, LIBRARY, PYTHON, TORCH, OWN = "user", "library", "python", "torch", "own"

_TORCH = os.path.dirname(torch.__file__) + os.sep
_ROOT = os.path.dirname(os.path.dirname(__file__))
_OWN = tuple(os.path.join(_ROOT, name) + os.sep for name in ("passes", "rewriter"))
_STANDARD = sysconfig.get_path("stdlib") + os.sep
# Libraries that compute, and keep nothing that a user would miss.
_PLAIN = tuple(os.path.dirname(str(m.__file__)) + os.sep for m in (numpy, sympy, mpmath))
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


@functools.cache
def owner_of(path: str) -> str:
    """Return whose code a file holds."""
    if path.startswith(_TORCH):
        return TORCH
    if path.startswith(_OWN):
        return OWN
    if path.startswith(_PLAIN):
        return PYTHON
    if any(part in path for part in _INSTALLED):
        return LIBRARY
    return PYTHON if path.startswith((_STANDARD, "<frozen ")) else USER


def is_of_users(value: Any) -> bool:
    """Whether a function, class or module is part of the user's program."""
    if isinstance(value, types.FunctionType):
        return owner_of(value.__code__.co_filename) == USER
    module = inspect.getmodule(value) if isinstance(value, type) else value
    if getattr(module, "__name__", "") == "__main__":
        return True
    path = getattr(module, "__file__", None)
    return path is not None and owner_of(path) == USER
