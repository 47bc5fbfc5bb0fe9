"""What an object holds: through closures, defaults, attributes and globals."""

from __future__ import annotations

from rewriter import holders


def test_a_function_with_more_defaults_than_arguments_is_looked_through() -> None:
    def f(a: int) -> int:
        return a

    f.__defaults__ = (1, 2)
    assert ("a", 2) in list(holders.held_by(f))
