"""Rules for operators that users have defined, beside the tables of PyTorch's own.

What is registered here is asked for first by `passes.tangent_rules`, `passes.taylor.rules` and
`passes.contraction.rows`; `rewriter.operator_rules` fills it, once a rule has been checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CustomRule:
    """What is known of one operator.

    Attributes:
        tangent: As in `passes.tangent_rules.RULES`.
        series: As in `passes.taylor.rules.RULES_OF_SERIES`.
        rows: Positions of the arguments whose row n, along the first dimension, is all that row n
            of the result depends on.
    """

    tangent: Callable[[Any, Any, tuple, dict, tuple], Any]
    series: Callable[..., Any]
    rows: frozenset[int] = frozenset()


CUSTOM: dict[Any, CustomRule] = {}
