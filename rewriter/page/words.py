"""Numbers and names as they stand in a drawing."""

from __future__ import annotations

LONGEST = 26
"""Characters of a name."""


def si(number: float) -> str:
    """Return a number with three digits and an SI prefix.

    >>> si(41_040_000), si(950), si(0)
    ('41 M', '950 ', '0 ')
    """
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} P"


def shortened(text: str) -> str:
    """Return a text without its middle if it is long: both ends of a module's path say something.

    >>> shortened("model.encoder.layers.0.attention.query")
    'model.encoder…tention.query'
    """
    half = LONGEST // 2
    return text if len(text) <= LONGEST + 1 else f"{text[:half]}…{text[-half:]}"
