"""Search the forms of a step for the cheapest, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from passes.strategies import NAMES
from rewriter.forms import Candidate, Form, rank

# Of the step's FLOPs, for each operator that has to be traced to have it.
WORTH_AN_OPERATOR = 1e-6

Build = Callable[[Mapping[str, str]], Form | None]


@dataclass(frozen=True)
class Change:
    """Other strategies for some sites.

    Attributes:
        strategies: Site name → strategy.
        gain: FLOPs that a form with them is known to spend less on these sites.
    """

    strategies: Mapping[str, str]
    gain: int


class Search:
    """Coordinate descent from the best of given forms.

    Derivatives inside of one another are one part of the step: what one costs depends on the form
    of the other. What each form spends on each part is known (`Candidate.site_costs`), so a part is
    worth other strategies only if some form spends less on it with them. All such changes are made
    at once first: where parts share no work their prices add up, the form costs what was foretold,
    and nothing is left to try. Where they do (the same network at the same points), the changes are
    tried one at a time, the most promising first. Parts that are alike at different points change
    together: of sixty steps of an integrator, each a few derivatives of one network, no form is
    made in which one step differs from the others.

    Attributes:
        best: The cheapest form so far, by `Candidate.preference`.
        tried: All forms, in the order of trial.
        untried: Changes that were due for a trial when a bound was reached.
    """

    def __init__(
        self,
        first: Sequence[Form],
        build: Build,
        alike: Sequence[Sequence[frozenset[str]]],
        limit: int,
        most_operators: int,
    ) -> None:
        """Prepare a search.

        Args:
            first: Forms to begin with; at least one.
            build: Returns the form for strategies by site; None if the user does not want it. It
                may return one that was there before.
            alike: The parts, which are the names of sites that depend on one another; those
                together that are alike.
            limit: The most forms there may be in all, ``first`` included.
            most_operators: No form is made once there are as many in all of them together.
        """
        self.tried = list(first)
        self.best = min(self.tried, key=preference)
        self.untried = 0
        self._build, self._alike = build, alike
        self._limit, self._most_operators = limit, most_operators
        self._wished = {frozenset(form.candidate.strategies.items()) for form in first}

    def run(self, *, thorough: bool = False) -> None:
        """Search.

        Args:
            thorough: Try other strategies also at each single site, worth it or not.
        """
        changes = self._promising(ties=True)
        if len(changes) > 1 and changes[0].gain:
            foretold = self.best.candidate.flops - sum(change.gain for change in changes)
            together = {n: s for change in changes for n, s in change.strategies.items()}
            found = self._try(together)
            if found is not None and found.candidate.flops == foretold and not thorough:
                return
        while True:
            before = self.best
            for change in self._promising():
                self._try(change.strategies)
            for change in self._single() if thorough else ():
                self._try(change)
            if self.best is before:
                return

    def _try(self, change: Mapping[str, str]) -> Form | None:
        wish = {**self.best.candidate.strategies, **change}
        key = frozenset(wish.items())
        if key in self._wished:
            return None
        self._wished.add(key)
        if self._is_spent():
            self.untried += 1
            return None
        found = self._build(wish)
        if found is None:
            return None
        if all(found is not form for form in self.tried):
            self.tried.append(found)
        self.best = min(self.best, found, key=preference)
        return found

    def _is_spent(self) -> bool:
        operators = sum(form.candidate.nodes for form in self.tried)
        return len(self.tried) >= self._limit or operators >= self._most_operators

    def _promising(self, *, ties: bool = False) -> list[Change]:
        """Return for parts that are alike the strategies with which some form spends less on them
        than the best form does, the largest gain first.

        Args:
            ties: Also those with which a form spends as much, if they come first in the order of
                preference.
        """
        found: list[Change] = []
        for parts in self._alike:
            by_kind: dict[tuple[str, ...], list[Change]] = {}
            for change in filter(None, map(self._best_change, parts)):
                if change.gain > 0 or (ties and change.gain == 0 and self._is_earlier(change)):
                    kind = tuple(sorted(change.strategies.values()))
                    by_kind.setdefault(kind, []).append(change)
            found += map(_together, by_kind.values())
        best = self.best.candidate
        least = WORTH_AN_OPERATOR * best.nodes * best.flops
        found = [change for change in found if change.gain == 0 or change.gain > least]
        return sorted(found, key=lambda change: -change.gain)

    def _best_change(self, part: frozenset[str]) -> Change | None:
        """Return the strategies with which some form spends least on a part."""
        best = self.best.candidate
        changes = [
            Change(
                {name: form.strategies[name] for name in part},
                # What no site is charged with may belong to any.
                _spent(best, part) - _spent(form, part) + max(0, _rest(best) - _rest(form)),
            )
            for form in (form.candidate for form in self.tried)
            if any(form.strategies[name] != best.strategies[name] for name in part)
        ]
        return max(changes, key=lambda change: change.gain, default=None)

    def _is_earlier(self, change: Change) -> bool:
        now = self.best.candidate.strategies
        return rank(change.strategies) < rank({name: now[name] for name in change.strategies})

    def _single(self) -> Iterator[dict[str, str]]:
        """Yield every change of one site."""
        for name, now in list(self.best.candidate.strategies.items()):
            yield from ({name: s} for s in NAMES if now in NAMES and s != now)


def _together(changes: Sequence[Change]) -> Change:
    strategies = {n: s for change in changes for n, s in change.strategies.items()}
    return Change(strategies, sum(change.gain for change in changes))


def preference(form: Form) -> tuple[int, int, int, int]:
    """Return what forms are compared by: `Candidate.preference`."""
    return form.candidate.preference


def _spent(candidate: Candidate, part: frozenset[str]) -> int:
    return sum(candidate.site_costs[name] for name in part)


def _rest(candidate: Candidate) -> int:
    return candidate.flops - sum(candidate.site_costs.values())
