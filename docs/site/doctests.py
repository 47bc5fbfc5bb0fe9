"""Show the examples of docstrings as code: Markdown takes ``>>>`` for three quotations."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

# A line with a prompt and all that follows until a blank line, where no fence is around it.
EXAMPLE = re.compile(r"^(?P<margin>[ ]*)>>>.*(?:\n[ ]*\S.*)*", re.MULTILINE)


class Doctests(Extension):
    """Put each example of a docstring in a fence."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Change the docstring of what griffe has found."""
        if obj.docstring is not None and "```" not in obj.docstring.value:
            obj.docstring.value = EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(found: re.Match[str]) -> str:
    margin = found["margin"]
    return f"{margin}```pycon\n{found[0]}\n{margin}```"
