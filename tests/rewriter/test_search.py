"""The search over forms: what is tried, in which order, and when it stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import sympy
from torch import nn
from torch.fx import Graph, GraphModule

from passes.price import Price
from rewriter.forms import Candidate, Form
from rewriter.search import Search

J, R = "jvp_over_gradient", "reverse"
NONE = sympy.Integer(0)
Prices = Callable[[Mapping[str, str]], Mapping[str, int]]


def form(
    strategies: Mapping[str, str], costs: Mapping[str, int], rest: int = 0, nodes: int = 0
) -> Form:
    """A form that is nothing but its price."""
    flops = sum(costs.values()) + rest
    price = Price(sympy.Integer(flops), NONE, NONE, 0)
    empty = GraphModule(nn.Module(), Graph())
    candidate = Candidate(dict(strategies), price, flops, 0, 0, 0, nodes, {}, dict(costs))
    return Form(candidate, empty, empty, 0.0, 0.0)


def search(
    prices: Prices,
    names: str,
    parts: Sequence[str],
    limit: int = 10,
    nodes: int = 0,
    **options: Any,
) -> tuple[Search, list[str]]:
    """Return a finished search over sites with names of one letter, and what it has built.

    Parts are written apart, or with a bar between those that are alike.
    """
    built: list[str] = []

    def build(wish: Mapping[str, str]) -> Form:
        built.append("".join(wish[name][0] for name in names))
        return form(wish, prices(wish), nodes=nodes)

    first = [build(dict.fromkeys(names, strategy)) for strategy in (J, R)]
    alike = [[frozenset(part) for part in group.split("|")] for group in parts]
    found = Search(first, build, alike, limit, 1000)
    found.run(**options)
    return found, built[2:]


def taken(found: Search, names: str) -> str:
    return "".join(found.best.candidate.strategies[name][0] for name in names)


def table(**rows: tuple[int, int]) -> Prices:
    """Prices of sites that share no work: with J, with R."""
    return lambda wish: {name: rows[name][wish[name] == R] for name in rows}


def test_sites_apart_are_changed_at_once() -> None:
    """A tie goes to the earlier strategy."""
    found, built = search(table(a=(1, 9), b=(9, 2), c=(8, 3), d=(4, 4)), "abcd", "abcd")
    assert built == ["jrrj"] and taken(found, "abcd") == "jrrj" and found.best.candidate.flops == 10


def test_what_is_best_everywhere_is_not_searched_further() -> None:
    found, built = search(table(a=(1, 9), b=(2, 2)), "ab", "ab")
    assert built == [] and taken(found, "ab") == "jj"


def test_a_tie_goes_to_the_earlier_strategy() -> None:
    found, _ = search(table(a=(5, 5), b=(7, 7)), "ab", "ab")
    assert taken(found, "ab") == "jj"


def test_derivatives_inside_of_one_another_are_changed_together() -> None:
    """The inner one is dearer and the outer one cheaper in reverse mode; together, neither."""
    found, built = search(table(a=(4, 9), b=(9, 4), c=(9, 1)), "abc", ["ab", "c"])
    assert built == [] and taken(found, "abc") == "rrr"
    found, built = search(table(a=(4, 9), b=(9, 4), c=(1, 9)), "abc", ["ab", "c"])
    assert built == [] and taken(found, "abc") == "jjj"


def shared(wish: Mapping[str, str]) -> Mapping[str, int]:
    """What looks cheaper at ``b`` and at ``c`` is so at one of them only: they share work."""
    costs = {"a": 1 if wish["a"] == J else 20, "b": 9, "c": 9}
    if wish["b"] == R:
        costs["b"] = 4
    if wish["c"] == R:
        costs["c"] = 8 if wish["b"] == J else 30
    return costs if wish["a"] == J else {**costs, "c": 8}


def test_where_prices_do_not_add_up_changes_are_tried_one_by_one() -> None:
    found, built = search(shared, "abc", "abc")
    assert built[0] == "jrr", "what looks better everywhere, at once"
    assert taken(found, "abc") == "jrj" and found.best.candidate.flops == 14


def test_bound() -> None:
    found, built = search(shared, "abc", "abc", limit=3)
    assert built == ["jrr"] and len(found.tried) == 3
    assert found.untried > 0


def hidden(wish: Mapping[str, str]) -> Mapping[str, int]:
    """A mix that the forms with one strategy do not hint at."""
    return {"a": 5, "b": 5 if wish["a"] == wish["b"] else 1}


@pytest.mark.parametrize("thorough", [False, True])
def test_thorough(thorough: bool) -> None:
    found, _ = search(hidden, "ab", ["ab"], thorough=thorough)
    assert found.best.candidate.flops == (6 if thorough else 10)


def test_what_no_site_is_charged_with_may_be_any_sites() -> None:
    """The first form has dear work that carries no site's name."""
    first = [form({"a": J, "b": J}, {"a": 1, "b": 1}, 4), form({"a": R, "b": R}, {"a": 5, "b": 2})]
    built: list[Mapping[str, str]] = []

    def build(wish: Mapping[str, str]) -> Form:
        built.append(dict(wish))
        return form(wish, {"a": 1, "b": 2})

    found = Search(first, build, [[frozenset("a")], [frozenset("b")]], 10, 1000)
    found.run()
    assert {"a": J, "b": R} in built and found.best.candidate.flops == 3


def test_a_form_that_the_user_does_not_want_is_left_out() -> None:
    first = [form({"a": J, "b": J}, {"a": 1, "b": 9}), form({"a": R, "b": R}, {"a": 9, "b": 2})]
    found = Search(first, lambda _: None, [[frozenset("a")], [frozenset("b")]], 10, 1000)
    found.run(thorough=True)
    assert found.tried == first and taken(found, "ab") == "jj"


def test_parts_that_are_alike_change_together() -> None:
    """What the first and the last of many steps gain differs; no form has one of them changed."""

    def prices(wish: Mapping[str, str]) -> Mapping[str, int]:
        gains = {"a": 3, "b": 5, "c": 4}
        together = len({wish[name] for name in "abc"}) == 1
        costs = {name: 20 - gain * (wish[name] == R) for name, gain in gains.items()}
        return {**costs, "d": (1 if wish["d"] == J else 90) + 2 * together}

    found, built = search(prices, "abcd", ["a|b|c", "d"])
    assert built == ["rrrj"] and taken(found, "abcd") == "rrrj" and not found.untried


def test_no_form_is_made_once_there_are_too_many_operators() -> None:
    found, built = search(table(a=(1, 9), b=(9, 1)), "ab", "ab", nodes=500)
    assert built == [] and found.untried == 1


def test_a_large_form_is_not_made_for_a_small_gain() -> None:
    """400 operators are worth 1 FLOP in 2500."""
    small, large = table(a=(9, 8), b=(990, 2000)), table(a=(9, 8), b=(9000, 20000))
    assert search(small, "ab", "ab", nodes=400)[1] == ["rj"]
    assert search(large, "ab", "ab", nodes=400)[1] == []
    assert search(large, "ab", "ab", nodes=40)[1] == ["rj"]
