"""Compare a rule with what PyTorch's own derivatives of the operator give, nested."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from passes.custom_rules import CustomRule
from passes.taylor.jets import Jets, Series

ORDER, DIRECTIONS, TOLERANCE = 4, 2, 1e-9


class RuleFails(Exception):
    """A rule that is not the operator's."""


def check_rule(
    target: Any, rule: CustomRule, args: Sequence[Any], moving: Sequence[int], *, is_linear: bool
) -> None:
    """Compare tangents and series of orders 1 to 4 along two directions with reverse mode.

    Args:
        target: The operator, with one tensor for a result.
        rule: Its rule.
        args: Arguments in float64.
        moving: Positions of the tensors that move together.
        is_linear: Whether the result must be linear in these.

    Raises:
        RuleFails: They differ, or PyTorch cannot differentiate the operator that often.
    """
    generator = torch.Generator().manual_seed(0)
    curves = {
        i: torch.randn(
            DIRECTIONS, ORDER, *args[i].shape, generator=generator, dtype=torch.float64
        ).to(args[i].device)
        for i in moving
    }
    out = target(*args)
    seed = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
    expected = torch.stack(
        [_by_autograd(target, args, {i: c[k] for i, c in curves.items()}, seed)
         for k in range(DIRECTIONS)]
    )  # fmt: skip
    if is_linear:
        _compare("as a linear operator", target, *_linearity(target, args, moving))
    weights = torch.tensor([0.7, -1.3], dtype=torch.float64, device=out.device)
    for collapse in (None, weights):
        for n, found, wanted in _by_rule(target, rule, args, curves, expected, seed, collapse):
            _compare(f"at order {n}", target, found, wanted)
    along = tuple(curves[i][0, 0] if i in curves else None for i in range(len(args)))
    found = rule.tangent(target, out, tuple(args), {}, along)
    _compare("as a tangent", target, (_full(found, out) * seed).sum(), expected[0, 0])


def check_rows(target: Any, args: Sequence[Any], rows: Sequence[int]) -> None:
    """Change every other row of some arguments, and see that a row of the result stays.

    Raises:
        RuleFails: It does not; or there are no rows.
    """
    out = target(*args)
    sizes = {args[i].shape[:1] for i in rows} | {out.shape[:1]}
    if len(sizes) != 1 or not out.dim() or len(out) < 2:
        raise RuleFails(f"{target}: the example needs two rows or more, as many in the result")
    generator = torch.Generator().manual_seed(1)
    for kept in range(len(out)):
        moved = list(args)
        for i in rows:
            noise = torch.randn(args[i].shape, generator=generator, dtype=torch.float64)
            noise[kept] = 0
            moved[i] = args[i] + 0.1 * noise.to(args[i].device)
        _compare(f"in row {kept} when others change", target, target(*moved)[kept], out[kept])


def _by_autograd(target: Any, args: Sequence[Any], curve: dict[int, Tensor], seed: Tensor) -> Any:
    """Return ``⟨seed, n-th coefficient⟩`` along a curve with these coefficients, n = 1 …"""
    t = torch.zeros((), dtype=torch.float64, device=seed.device, requires_grad=True)
    moved = list(args)
    for i, terms in curve.items():
        moved[i] = sum((t**n * c for n, c in enumerate(terms, start=1)), args[i])
    found = []
    try:
        value = (target(*moved) * seed).sum()
        if not value.requires_grad:
            raise RuleFails(f"{target}: PyTorch gives its result no gradient; register_autograd it")
        for n in range(1, ORDER + 1):
            if value.requires_grad:
                (value,) = torch.autograd.grad(value, t, create_graph=True, materialize_grads=True)
            else:
                value = torch.zeros_like(value)
            found.append(value.detach() / math.factorial(n))
    except RuntimeError as error:
        raise RuleFails(
            f"{target}: PyTorch differentiates it {len(found)} times only, and a rule is compared "
            f"with derivatives of order {ORDER}; give its backward a formula that can be "
            f"differentiated ({str(error).splitlines()[0]})"
        ) from error
    return torch.stack(found)


def _by_rule(
    target: Any,
    rule: CustomRule,
    args: Sequence[Any],
    curves: dict[int, Tensor],
    expected: Tensor,
    seed: Tensor,
    weights: Tensor | None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield order, what the rule gives, and what it should."""
    jets, out = Jets(ORDER, weights), target(*args)
    along: list[Any] = [None] * len(args)
    for i, terms in curves.items():
        *first, last = terms.unbind(1)
        along[i] = Series((*first, last if weights is None else jets.collapse(last)))
    found = rule.series(jets, target, out, tuple(args), {}, tuple(along))
    if len(found.terms) != ORDER:
        raise RuleFails(f"{target}: its rule gives {len(found.terms)} coefficients for {ORDER}")
    for n, term in enumerate(found.terms, start=1):
        if weights is not None and jets.is_collapsed(n):
            yield n, (_full(term, out) * seed).sum(), (weights * expected[:, n - 1]).sum()
            continue
        for k in range(DIRECTIONS):
            one = None if term is None else term[k]
            yield n, (_full(one, out) * seed).sum(), expected[k, n - 1]


def _full(term: Tensor | None, out: Tensor) -> Tensor:
    found = torch.zeros_like(out) if term is None else term
    if found.shape != out.shape:
        shapes = f"{tuple(found.shape)}, the result has {tuple(out.shape)}"
        raise RuleFails(f"its rule gives a coefficient of shape {shapes}")
    return found


def _linearity(target: Any, args: Sequence[Any], moving: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the result at three times the arguments, and three times the result."""
    scaled = [3 * x if i in moving else x for i, x in enumerate(args)]
    return target(*scaled), 3 * target(*args)


def _compare(what: str, target: Any, found: Tensor, wanted: Tensor) -> None:
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))
    if not error <= TOLERANCE:
        raise RuleFails(f"{target}: the rule is wrong {what}, by {error:.2g} of the value")
