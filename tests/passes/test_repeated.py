"""Constants of open sizes: what is known of them holds at every size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from passes.contraction.constants import Constants
from passes.graph import results
from tests.passes.test_simplify import traced

aten = torch.ops.aten
WIDTH = 3


def units(x: Tensor) -> Tensor:
    """Unit vectors for each row."""
    zeros = x.new_zeros(x.shape[0], WIDTH, WIDTH)
    ones = aten.fill.Scalar(aten.diagonal(zeros, 0, 1, 2), 1)
    return aten.diagonal_scatter(zeros, ones, 0, 1, 2)


# Of x (rows, 3), the number of rows open. False: not known.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "ones": (lambda x: torch.ones_like(x), True),
    "number": (lambda x: aten.full_like(x, 0.5), True),
    "units": (units, True),
    "units, turned": (lambda x: units(x).permute(1, 0, 2), True),
    "units, selected": (lambda x: aten.select(units(x), 1, 2), True),
    "units, reshaped": (lambda x: units(x).reshape(x.shape[0], 1, WIDTH * WIDTH), True),
    "units, repeated": (lambda x: aten.unsqueeze(units(x), 1).expand(-1, 2, -1, -1), True),
    "one column": (lambda x: aten.squeeze(x.new_ones(x.shape[0], 1), [1]), True),
    "joined": (lambda x: units(x).reshape(x.shape[0] * WIDTH, WIDTH), False),
    "positions": (lambda x: torch.arange(x.shape[0]).to(x.dtype), False),
    "of the number of rows": (lambda x: torch.ones_like(x) / x.shape[0], False),
    "one row": (lambda x: aten.select(units(x), 0, 0), False),
    "diagonal of rows": (lambda x: aten.diagonal(x.new_ones(x.shape[0], x.shape[0])), False),
    "not constant": (lambda x: x.sin(), False),
}


@pytest.mark.parametrize("name", CASES)
def test_repeated(name: str) -> None:
    function, is_known = CASES[name]
    module = traced(function, torch.randn(5, WIDTH), mode="symbolic")
    result = results(module.graph)[0]
    found = Constants(module.graph)
    assert (found.repeated(result) is not None) == is_known
    assert found.value(result) is None, "its size is not known"
    for rows in (1, 2, 7) if is_known else ():
        expected = function(torch.randn(rows, WIDTH))
        repeated = found.repeated(result)
        assert repeated is not None
        torch.testing.assert_close(repeated.expand(expected.shape), expected)
