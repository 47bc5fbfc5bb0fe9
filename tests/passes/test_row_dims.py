"""Where the rows of a point are in what is computed of it: by tables, and in its Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from passes.contraction.rows import Rows
from passes.graph import placeholders, results
from tests.passes.flat import random_points
from tests.passes.test_simplify import traced

aten = torch.ops.aten
ROWS, WIDTH, OTHER = 5, 3, 4
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


# x (rows, width) moves; w (width, other) and t (other, rows) do not. None: rows mix.
CASES: dict[str, tuple[Function, int | None]] = {
    "linear": (lambda x, w, t: x @ w, 0),
    "bias": (lambda x, w, t: torch.addmm(w[0], x, w), 0),
    "operator": (lambda x, w, t: w.t() @ x.t(), 1),
    "operator and bias": (lambda x, w, t: torch.addmm(t, w.t(), x.t()), 1),
    "einsum": (lambda x, w, t: torch.einsum("km,nk->mn", w, x), 1),
    "operator of a product": (lambda x, w, t: (w.t() @ x.tanh().t()) * t.sin(), 1),
    "pointwise, both sides": (lambda x, w, t: (x @ w).t() * (w.t() @ x.t()), 1),
    "vector": (lambda x, w, t: aten.mv(x, w[:, 0]), 0),
    "repeated along rows": (lambda x, w, t: x[:, 0] * t, 1),
    "broadcast": (lambda x, w, t: x.sum(1, keepdim=True) * t.t(), 0),
    "batched": (lambda x, w, t: aten.bmm(x[:, None], x[:, :, None]), 0),
    "batched, on the left": (lambda x, w, t: aten.bmm(x[None], w[None]), 1),
    "batched, on the right": (lambda x, w, t: aten.bmm(w.t()[None], x.t()[None]), 2),
    "one function": (lambda x, w, t: (w.t() @ x.t())[2], 0),
    "summed over functions": (lambda x, w, t: (w.t() @ x.t()).sum(0), 0),
    "mean over functions": (lambda x, w, t: (w.t() @ x.t()).mean(0, True), 1),
    "softmax over functions": (lambda x, w, t: torch.softmax(w.t() @ x.t(), 0), 1),
    "squeezed": (lambda x, w, t: (w.t()[:1] @ x.t()).squeeze(0), 0),
    "not squeezed": (lambda x, w, t: (w.t() @ x.t()).squeeze(0), 1),
    "unsqueezed": (lambda x, w, t: x.t()[:, None], 2),
    "transposed": (lambda x, w, t: x[:, :, None].permute(2, 1, 0), 2),
    "turned": (lambda x, w, t: x[:, :, None].transpose(0, 2), 2),
    "stacked": (lambda x, w, t: torch.stack([x, x.sin()], 0), 1),
    "joined": (lambda x, w, t: torch.cat([x.t(), t], 0), 1),
    "split": (lambda x, w, t: torch.cat(x.split(1, 1)[::-1], 1), 0),
    "pieces": (lambda x, w, t: x.t().unbind(0)[1], 0),
    "chunk": (lambda x, w, t: x.chunk(2, 1)[1], 0),
    "picked": (lambda x, w, t: aten.index_select(x, 1, torch.tensor([1, 0])), 0),
    "taken apart": (lambda x, w, t: (w.t() @ x.t()).reshape(2, 2, ROWS), 2),
    "put together": (lambda x, w, t: (x[:, :, None] * w).reshape(ROWS, -1), 0),
    "expanded": (lambda x, w, t: x.expand(2, ROWS, WIDTH), 1),
    "cut elsewhere": (lambda x, w, t: x.t()[1:], 1),
    # What mixes them.
    "among themselves": (lambda x, w, t: x @ x.t(), None),
    "turned and added": (lambda x, w, t: x[:, :1] + x[:, :1].t(), None),
    "mean of the batch": (lambda x, w, t: x - x.mean(0), None),
    "softmax of the batch": (lambda x, w, t: torch.softmax(x, 0), None),
    "contracted": (lambda x, w, t: t @ x, None),
    "two batches": (lambda x, w, t: aten.bmm(x[:, None], x.t()[None].expand(ROWS, -1, -1)), None),
    "flattened": (lambda x, w, t: x.t().reshape(-1), None),
    "one row": (lambda x, w, t: x[1], None),
    "every other": (lambda x, w, t: x[::2], None),
    "running sum": (lambda x, w, t: x.cumsum(0), None),
    "joined rows": (lambda x, w, t: torch.cat([x, x], 0), None),
    "split rows": (lambda x, w, t: x.split(2, 0)[0], None),
    "summed": (lambda x, w, t: x.sum(), None),
}


@pytest.mark.parametrize("name", CASES)
def test_row_dim(name: str) -> None:
    """The rule's answer, and that a Jacobian is zero off the rows where it has one."""
    function, expected = CASES[name]
    inputs = [random_points(ROWS, WIDTH), random_points(WIDTH, OTHER), random_points(OTHER, ROWS)]
    module = traced(function, *inputs)
    rows = Rows(module.graph, placeholders(module.graph)[0])
    result: Any = results(module.graph)[0]
    assert rows.kept.get(result) == expected
    jacobian = torch.func.jacrev(function)(*inputs)
    assert isinstance(jacobian, Tensor)
    dims = [d for d in range(jacobian.dim() - 2) if _is_apart(jacobian, d)]
    assert (expected in dims) if expected is not None else (rows.reasons and not dims)


def _is_apart(jacobian: Tensor, dim: int) -> bool:
    """Whether position n of a result's dimension depends on row n alone."""
    if jacobian.shape[dim] != ROWS:
        return False
    by_row = jacobian.movedim((dim, -2), (0, 1)).reshape(ROWS, ROWS, -1)
    others = ~torch.eye(ROWS, dtype=torch.bool)
    return bool((by_row[others] == 0).all())
