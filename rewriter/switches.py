"""Environment variables that switch something. None of them changes how a loss runs in any other
way: one that cannot be followed is said once, and training goes on."""

from __future__ import annotations

import functools
import os
import warnings

from rewriter.errors import NestedGradientWarning

OFF = ("0", "false", "off", "no")
ON = ("", "1", "true", "on", "yes")


def is_off(name: str) -> bool:
    """Whether an environment variable switches off what is on without it."""
    return means_off(name, os.environ.get(name, ""))


@functools.cache
def means_off(name: str, value: str) -> bool:
    """Whether a value of an environment variable means off; one that means nothing is said."""
    word = value.strip().lower()
    if word not in OFF + ON:
        say_once(f"{name}={value}: expected one of {', '.join(OFF + ON[1:])}; it is not heeded")
    return word in OFF


@functools.cache
def say_once(text: str) -> None:
    """Warn about a variable, once in this process."""
    warnings.warn(f"optimize_nested: {text}", NestedGradientWarning, stacklevel=3)
