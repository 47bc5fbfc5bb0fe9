"""The arithmetic of truncated Taylor series along several directions at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Series:
    """What follows the value in a Taylor series.

    Attributes:
        terms: Coefficients 1 … m; None is a zero that costs nothing. Of an operator with several
            results each is a tuple.
    """

    terms: tuple[Any, ...]

    @property
    def is_zero(self) -> bool:
        """Whether nothing moves."""
        return all(term is None for term in self.terms)


@dataclass(frozen=True)
class Jets:
    """Series ``x(t) = x₀ + x₁t + … + xₘtᵐ`` along K directions that share ``x₀``.

    Coefficients have a leading dimension K, save the last one where it is collapsed: with weights
    ``w`` only ``Σₖ wₖ xₘ[k]`` is kept. The last coefficient enters every rule linearly and with
    factors that are the same for all directions, so that sum can be propagated in place of its
    K terms: ``1 + (m − 1)K + 1`` vectors in place of ``1 + mK``.

    The coefficients of ``f(x(t))`` are derivatives: ``x₁ = v`` and zeros after it give
    ``Dⁿf[v, …, v] / n!`` at position n.

    Attributes:
        order: m.
        weights: A tensor of shape (K,), or None: nothing is collapsed.

    Source: Griewank, Utke, Walther (2000), "Evaluating higher derivative tensors by forward
    propagation of univariate Taylor series"; Dangel et al. (2025), "Collapsing Taylor mode
    automatic differentiation"; for m = 2 Li et al. (2023), "A computational framework for neural
    network-based variational Monte Carlo with forward Laplacian".
    """

    order: int
    weights: Tensor | None = None

    def is_collapsed(self, grade: int) -> bool:
        """Whether the coefficient of a power is a sum over directions."""
        return grade == self.order and self.weights is not None

    def each(self, grade: int, function: Callable[..., Any], *coefficients: Any) -> Any:
        """Apply a linear function to coefficients of this grade, for each direction."""
        if self.is_collapsed(grade):
            return function(*coefficients)
        return over_directions(function, *coefficients)

    @property
    def zero(self) -> Series:
        """Return the series of what does not move."""
        return Series((None,) * self.order)

    def product(
        self, multiply: Callable[[Any, Any], Any], left: Sequence[Any], right: Sequence[Any]
    ) -> Series:
        """Return the series of a bilinear function: ``cₙ = Σᵢ₊ⱼ₌ₙ multiply(aᵢ, bⱼ)``.

        Args:
            multiply: The function.
            left: ``a₀, a₁, …``.
            right: ``b₀, b₁, …``.
        """
        orders = range(1, self.order + 1)
        return Series(tuple(self.convolved(multiply, n, left, right) for n in orders))

    def convolved(
        self, multiply: Callable[[Any, Any], Any], n: int, left: Sequence[Any], right: Sequence[Any]
    ) -> Any:
        """Return ``Σᵢ₊ⱼ₌ₙ multiply(aᵢ, bⱼ)`` over those that are there, both counted from 0."""
        total = None
        for i in range(n + 1):
            j = n - i
            if i >= len(left) or j >= len(right) or left[i] is None or right[j] is None:
                continue
            total = plus(total, self._term(multiply, i, j, left[i], right[j]))
        return total

    def _term(self, multiply: Callable[[Any, Any], Any], i: int, j: int, a: Any, b: Any) -> Any:
        if i == 0:
            return self.each(j, lambda y: multiply(a, y), b)
        if j == 0:
            return self.each(i, lambda x: multiply(x, b), a)
        term = over_directions(multiply, a, b)
        return self.collapse(term) if self.is_collapsed(i + j) else term

    def collapse(self, coefficient: Tensor) -> Tensor:
        """Return ``Σₖ wₖ c[k]``."""
        assert self.weights is not None
        weights = self.weights.to(coefficient.dtype)
        return (coefficient * weights.view(-1, *[1] * (coefficient.dim() - 1))).sum(0)


def plus(a: Any, b: Any) -> Any:
    """Add two coefficients, either of which may be a zero that costs nothing."""
    if a is None:
        return b
    return a if b is None else a + b


def over_directions(function: Callable[..., Any], *coefficients: Any) -> Any:
    """Apply a function that takes one direction to all of them: the leading dimension.

    It may return None, or a tuple with None in it.
    """
    specs: list[Any] = []

    def one(*given: Any) -> tuple[Tensor, ...]:
        leaves, spec = pytree.tree_flatten(function(*given))
        specs.append((spec, [leaf is None for leaf in leaves]))
        return tuple(leaf for leaf in leaves if leaf is not None)

    found = iter(torch.vmap(one)(*coefficients))
    spec, absent = specs[0]
    return pytree.tree_unflatten([None if gone else next(found) for gone in absent], spec)
