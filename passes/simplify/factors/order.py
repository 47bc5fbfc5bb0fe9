"""Find the cheapest order to contract a product in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from passes.contraction.terms import Index
from passes.graph import hint
from passes.simplify.factors.terms import Factor

# All orders of that many factors are tried: 3 to this power.
MOST_FACTORS = 7


@dataclass(frozen=True)
class Step:
    """A product of two parts, or one factor, summed over what nobody else needs.

    Attributes:
        parts: Two steps, or a factor.
        kept: The indices that are left.
        work: Multiplications and additions, those inside of the parts included.
    """

    parts: tuple[Step, Step] | Factor
    kept: frozenset[Index]
    work: int


def cheapest(factors: Sequence[Factor], wanted: Iterable[Index]) -> Step:
    """Return the order with the least work, of all that there are.

    ``Σ`` over an index is taken as soon as all factors that have it are multiplied. The work of a
    product is the number of values of all of its indices, twice that where some are summed over.
    """
    indices = [frozenset(factor.indices) for factor in factors]
    everything = (1 << len(factors)) - 1
    wanted = frozenset(wanted)

    def kept(subset: int) -> frozenset[Index]:
        inside: set[Index] = set()
        outside = set(wanted)
        for i, found in enumerate(indices):
            (inside if subset >> i & 1 else outside).update(found)
        return frozenset(inside & outside)

    best: dict[int, Step] = {}
    for i, factor in enumerate(factors):
        left = kept(1 << i)
        best[1 << i] = Step(factor, left, _values(indices[i]) if left != indices[i] else 0)
    for subset in sorted(range(1, everything + 1), key=int.bit_count):
        if subset in best:
            continue
        left, part = kept(subset), (subset - 1) & subset
        while part:
            if part < subset ^ part:  # each pair once
                one, other = best[part], best[subset ^ part]
                union = one.kept | other.kept
                work = one.work + other.work + _values(union) * (1 if union == left else 2)
                if subset not in best or work < best[subset].work:
                    best[subset] = Step((one, other), left, work)
            part = (part - 1) & subset
    return best[everything]


def _values(indices: Iterable[Index]) -> int:
    return math.prod(hint(index.size) for index in indices)
