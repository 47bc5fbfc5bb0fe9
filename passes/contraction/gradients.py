"""A derivative of which a whole gradient is used: that gradient is the operand.

``H v`` leaves one of the two indices of H uncontracted. Directions cannot take its place at the
price of one; reverse mode can:

    Σⱼ ∂²⟨s, f⟩/∂xᵢ∂xⱼ vⱼ = Dg[v]ᵢ,    g = ∇ₓ⟨s, f(x, θ)⟩

a first derivative, along one direction, of an operand whose results are the components of a
gradient. Nothing of it is as large as H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from passes.contraction.along import laid_out
from passes.contraction.directions import NotPlanned, at_each
from passes.contraction.terms import Base, Index, Term, example_of
from passes.nest import dissolve_marks
from passes.simplify import simplify
from passes.tracing import fake_mode_of, trace
from passes.tracking import reverse_pass, run


def with_gradients(term: Term, dims: Sequence[Index | None]) -> Iterator[Term]:
    """Return a sum that a term is, none of which has a slot that is used whole.

    Raises:
        NotPlanned: Two slots are, or a slot in some dimensions only; or rows mix.
    """
    if term.row is None:
        raise NotPlanned(term.base.mixing)
    free = [place for place, slot in enumerate(term.slots) if _is_free(term, slot, dims)]
    if not free:
        yield term
        return
    if len(free) > 1:
        raise NotPlanned("a whole Hessian is used: two indices are not contracted")
    many = [index for index in term.outs if index not in term.fixed and index in dims]
    for held in at_each(term, many, "a gradient of each of many outputs is used"):
        yield _with_gradient(held, free[0])


def _is_free(term: Term, slot: tuple[Index, ...], dims: Sequence[Index | None]) -> bool:
    """Whether no index of a slot is contracted."""
    every = [index for other in (*term.slots, term.outs, (term.row,)) for index in other]
    free = [i in dims and i not in term.fixed and every.count(i) == 1 for i in slot]
    if any(free) and not all(free):
        raise NotPlanned("a gradient is contracted in some of its dimensions only")
    return bool(free) and all(free)


@dataclass(frozen=True)
class _Seed:
    """``s[n, o]``: a product of explicit tensors, or a basis vector, in the results of f.

    Attributes:
        held: The value of an index of f's results that is held; None for another.
        factors: For each explicit tensor what its dimensions are: a dimension of f's result, or one
            that is held at a position.
    """

    held: tuple[int | None, ...]
    factors: tuple[tuple[Any, ...], ...]

    def __call__(self, like: Tensor, given: Sequence[Tensor]) -> Tensor:
        """Return s, of the shape of f's result."""
        seed = torch.ones_like(like)
        for dim, position in enumerate(self.held, start=1):
            if position is not None:
                places = torch.arange(like.shape[dim], device=like.device) == position
                shape = [-1 if d == dim else 1 for d in range(like.dim())]
                seed = seed * places.to(like.dtype).view(shape)
        for value, places in zip(given, self.factors, strict=True):
            seed = seed * laid_out(value, places, like.dim())
        return seed


def _with_gradient(term: Term, place: int) -> Term:
    """``Σₒ s[n, o] ∂ᵏf[n, o; …] → ∂ᵏ⁻¹g[n, i; …]``"""
    slot = term.slots[place]
    results = (term.row, *term.outs)
    left = [index for index in term.outs if index not in term.fixed]
    mine = [f for f in term.factors if any(index in left for index in f.indices)]
    places = []
    for factor in mine:
        at: list[Any] = []
        for index in factor.indices:
            if index in term.fixed or index is None:
                at.append(("at", 0 if index is None else term.fixed[index]))
            elif index in results:
                at.append(results.index(index))
            else:
                raise NotPlanned("a seed has an index that is no result's")
        places.append(tuple(at))
    held = tuple(term.fixed.get(index) for index in term.outs)
    point = term.points[place]
    base = _gradient(term.base, point, _Seed(held, tuple(places)), [f.node for f in mine])
    return replace(
        term,
        base=base,
        outs=slot,
        slots=(*term.slots[:place], *term.slots[place + 1 :]),
        points=(*term.points[:place], *term.points[place + 1 :]),
        factors=tuple(f for f in term.factors if f not in mine),
    )


def _gradient(base: Base, at: int, seed: _Seed, explicit: Sequence[Any]) -> Base:
    """Trace ``g(x, θ, s) = ∇ₓ⟨s, f(x, θ)⟩``."""
    examples = [example_of(item) for item in (*base.inputs, *explicit)]
    count = len(base.inputs)

    def gradient(*values: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            point = values[at].detach().requires_grad_()
            value = run(base.body, [*values[:at], point, *values[at + 1 : count]])[0]
            with reverse_pass("cotangent", [value]):
                return torch.autograd.grad(
                    value,
                    point,
                    seed(value, values[count:]),
                    create_graph=True,
                    materialize_grads=True,
                )

    module = trace(gradient, examples, fake_mode_of(examples))
    simplify(module)
    dissolve_marks(module)
    module.recompile()
    return replace(
        base,
        body=module,
        code=f"gradient {seed} at {at} of {base.code}",
        inputs=(*base.inputs, *explicit),
        order=base.order + 1,
    )
