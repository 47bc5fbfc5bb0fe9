"""Search the forms of a step for the cheapest, site by site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from passes.strategies import NAMES
from rewriter.forms import Candidate, Form

Build = Callable[[Mapping[str, str]], Form | None]


class Search:
    """Coordinate descent over the strategies of the sites, from the best of given forms.

    What each form spends on each site is known (`Candidate.site_costs`). So a site is worth another
    strategy only if some form spends less on it with that one. All such changes are made at once
    first: where sites do not share work their prices add up, the form costs what was foretold, and
    nothing is left to try. Where they do (one inside of another, two over the same network at the
    same points), the changes are tried one at a time, the most promising first.

    Attributes:
        best: The cheapest form so far, by `Candidate.preference`.
        tried: All forms, in the order of trial.
        untried: Changes that looked worth a trial when the bound was reached.
    """

    def __init__(self, first: Sequence[Form], build: Build, limit: int) -> None:
        """Prepare a search.

        Args:
            first: Forms to begin with; at least one.
            build: Returns the form for strategies by site; None if the user does not want it. It
                may return one that was there before.
            limit: The most forms there may be in all, ``first`` included.
        """
        self.tried = list(first)
        self.best = min(self.tried, key=preference)
        self.untried = 0
        self._build, self._limit = build, limit
        self._wished = {frozenset(form.candidate.strategies.items()) for form in first}

    def run(self, *, thorough: bool = False) -> None:
        """Search.

        Args:
            thorough: Try also what does not look worth it.
        """
        changes = self._promising()
        if changes and not thorough:
            foretold = self.best.candidate.flops - sum(gain for _, _, gain in changes)
            found = self._try({name: strategy for name, strategy, _ in changes})
            if found is not None and found.candidate.flops == foretold:
                return
        while True:
            before = self.best
            for name, strategy, _ in self._alternatives() if thorough else self._promising():
                self._try({name: strategy})
            if self.best is before:
                return

    def _try(self, change: Mapping[str, str]) -> Form | None:
        wish = {**self.best.candidate.strategies, **change}
        key = frozenset(wish.items())
        if key in self._wished:
            return None
        self._wished.add(key)
        if len(self.tried) >= self._limit:
            self.untried += 1
            return None
        found = self._build(wish)
        if found is None:
            return None
        if all(found is not form for form in self.tried):
            self.tried.append(found)
        self.best = min(self.best, found, key=preference)
        return found

    def _promising(self) -> list[tuple[str, str, int]]:
        """Return (site, strategy, FLOPs that a form with it spends less there), most first."""
        best = self.best.candidate
        gains: dict[str, tuple[int, str]] = {}
        for form in [form.candidate for form in self.tried]:
            # What no site is charged with may belong to any.
            unclear = max(0, _rest(best) - _rest(form))
            for name, strategy in form.strategies.items():
                gain = best.site_costs[name] - form.site_costs[name] + unclear
                if strategy != best.strategies[name] and gain > gains.get(name, (0, ""))[0]:
                    gains[name] = gain, strategy
        return _sorted((name, strategy, gain) for name, (gain, strategy) in gains.items())

    def _alternatives(self) -> list[tuple[str, str, int]]:
        """Return every change of one site, those that look worth it first."""
        promising = {(name, strategy): gain for name, strategy, gain in self._promising()}
        return _sorted(
            (name, strategy, promising.get((name, strategy), 0))
            for name, now in self.best.candidate.strategies.items()
            for strategy in NAMES
            if now in NAMES and strategy != now
        )


def preference(form: Form) -> tuple[int, int, int, int]:
    """Return what forms are compared by: `Candidate.preference`."""
    return form.candidate.preference


def _rest(candidate: Candidate) -> int:
    return candidate.flops - sum(candidate.site_costs.values())


def _sorted(changes: Iterable[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    return sorted(changes, key=lambda change: -change[2])
