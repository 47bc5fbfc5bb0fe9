"""Find the cheapest order to contract a product in."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from passes.contraction.terms import Index
from passes.graph import hint
from passes.simplify.factors.terms import Dim, Factor

# All orders of that many factors are tried: 3 to this power.
MOST_FACTORS = 8


@dataclass(frozen=True)
class Step:
    """A product of two parts, or one factor, summed over what nobody else needs.

    Attributes:
        parts: Two steps, or a factor.
        kept: The indices that are left.
        work: Multiplications, additions and elements written, those inside of the parts included.
    """

    parts: tuple[Step, Step] | Factor
    kept: frozenset[Index]
    work: int


def cheapest(
    factors: Sequence[Factor], wanted: Iterable[Index], known: Container[Any] = ()
) -> Step:
    """Return the order with the least work, of all that there are.

    ``Σ`` over an index is taken as soon as all factors that have it are multiplied. What is known
    already takes no work.

    Args:
        factors: What is multiplied.
        wanted: The indices that are not summed over.
        known: The keys of products that are there anyway: `key_of`.
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
        total = _values(indices[i]) + _values(left)
        best[1 << i] = Step(factor, left, total if left != indices[i] else 0)
    for subset in sorted(range(1, everything + 1), key=int.bit_count):
        if subset in best:
            continue
        left, part = kept(subset), (subset - 1) & subset
        while part:
            if part < subset ^ part:  # each pair once
                one, other = best[part], best[subset ^ part]
                work = one.work + other.work + _work(one.kept, other.kept, left)
                if subset not in best or work < best[subset].work:
                    best[subset] = Step((one, other), left, work)
            part = (part - 1) & subset
        if known and key_of(best[subset])[0] in known:
            best[subset] = replace(best[subset], work=0)
    return best[everything]


def _work(one: frozenset[Index], other: frozenset[Index], left: frozenset[Index]) -> int:
    """Return the work of a product: one multiplication for each value of all indices, and one
    addition where some are summed over. If the sum is no matrix product, all terms are written."""
    every = one | other
    is_matrix_product = every != left and one != other
    return _values(every) * (2 if is_matrix_product or every == left else 3) + (
        _values(left) if every != left else 0
    )


def key_of(step: Step) -> tuple[Any, Dim]:
    """Return what two steps have in common if they compute the same, and the order in which they
    then number their indices."""
    factors = sorted(_factors(step), key=lambda factor: factor.node.name)
    order = tuple(dict.fromkeys(index for factor in factors for index in factor.indices))
    number = {index: at for at, index in enumerate(order)}
    read = tuple(
        (f.node, tuple(tuple((number[i], str(i.size)) for i in dim) for dim in f.dims))
        for f in factors
    )
    return (read, frozenset(number[index] for index in step.kept)), order


def _factors(step: Step) -> Iterator[Factor]:
    if isinstance(step.parts, Factor):
        yield step.parts
        return
    for part in step.parts:
        yield from _factors(part)


def _values(indices: Iterable[Index]) -> int:
    return math.prod(hint(index.size) for index in indices)
