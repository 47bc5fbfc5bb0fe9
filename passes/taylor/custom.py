"""Make both rules of a user's operator, of tangents and of series, from one description."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from passes.custom_rules import CustomRule
from passes.tangent_rules import NoRule
from passes.taylor.elementwise import Function, derivatives
from passes.taylor.jets import Jets, Series, over_directions, plus
from passes.taylor.rules import NoSeries, composed, linear_series

# (arguments, their coefficients 1 … m or None for each that does not move) → coefficients 1 … m
Rule = Callable[..., Sequence[Tensor]]


def elementwise_rule(function: Function) -> CustomRule:
    """Return the rules of ``y = f(x, *numbers)``, elementwise: those of a composition."""
    names = [symbol.name for symbol, _ in function.parameters]
    defaults = {symbol.name: default for symbol, default in function.parameters}

    def factors(order: int, out: Tensor, args: tuple, kwargs: dict) -> list[Any]:
        given = defaults | dict(zip(names, args[1:], strict=False)) | kwargs
        return derivatives(function, order, out, args[0], *(given[name] for name in names))

    def tangent(target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Any:
        (factor,) = factors(1, out, args, kwargs)
        return None if factor is None else along[0] * factor

    def series(jets: Jets, target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Any:
        return composed(jets, factors(jets.order, out, args, kwargs), along[0])

    return CustomRule(tangent, series, frozenset({0}))


def linear_rule(positions: frozenset[int], rows: frozenset[int]) -> CustomRule:
    """Return the rules of an operator that is linear in some arguments taken together."""

    def tangent(target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Any:
        for position, moves in enumerate(along):
            if position not in positions and _is_there(moves):
                name = target._schema.arguments[position].name
                raise NoRule(target, f"{name} moves, and it is not registered as linear in that")
        moved = [
            arg if i not in positions else torch.zeros_like(arg) if along[i] is None else along[i]
            for i, arg in enumerate(args)
        ]
        return target(*moved, **kwargs)

    def series(jets: Jets, target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Any:
        try:
            return linear_series(jets, along, lambda t: tangent(target, out, args, kwargs, t))
        except NoRule as error:
            raise NoSeries(str(error)) from error

    return CustomRule(tangent, series, rows)


def series_rule(rule: Rule, rows: frozenset[int]) -> CustomRule:
    """Return the rules of an operator from one for series along a single direction."""

    def tangent(target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Any:
        given = tuple(None if t is None else (t,) for t in along)
        return rule(args, given, **kwargs)[0]

    def series(jets: Jets, target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Any:
        return _series(rule, jets, args, kwargs, along)

    return CustomRule(tangent, series, rows)


def _series(rule: Rule, jets: Jets, args: tuple, kwargs: dict, along: tuple) -> Series:
    """Apply a rule for one direction to all, by its linear dependence on the last coefficient:

    ``yₘ(x₁ … xₘ) = yₘ(x₁ … xₘ₋₁, 0) + y₁(xₘ)``, so where the last one is a sum over directions,
    the sum of the first term is taken, and the second is that of the sum.
    """
    collapsed = jets.weights is not None
    last = {i: s.terms[-1] for i, s in enumerate(along) if s is not None and collapsed}
    own = {
        (i, n): term
        for i, s in enumerate(along)
        for n, term in enumerate(() if s is None else s.terms)
        if term is not None and not (collapsed and n == jets.order - 1)
    }

    def one(*terms: Tensor) -> tuple[Tensor, ...]:
        there = dict(zip(own, terms, strict=True))
        given = tuple(
            None
            if s is None
            else tuple(
                there[i, n] if (i, n) in there else torch.zeros_like(args[i])
                for n in range(jets.order)
            )
            for i, s in enumerate(along)
        )
        return tuple(rule(args, given, **kwargs))

    found: list[Any] = list(over_directions(one, *own.values()) if own else [None] * jets.order)
    if not collapsed:
        return Series(tuple(found))
    top = None if found[-1] is None else jets.collapse(found[-1])
    moving = tuple(None if last.get(i) is None else (last[i],) for i in range(len(args)))
    if any(moving):
        top = plus(top, rule(args, moving, **kwargs)[0])
    return Series((*found[:-1], top))


def _is_there(tangent: Any) -> bool:
    return any(leaf is not None for leaf in pytree.tree_leaves(tangent))
