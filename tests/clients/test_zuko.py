"""zuko trains a flow whose field is a tower: its trace, its solver, its adjoint."""

from __future__ import annotations

import pytest

from tests.clients.common import check, check_captured, check_float32, example

clients = example("zuko", "client_zuko")

SIZES = {"points": 16, "width": 8}


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "estimated"])
def test_float64(exact: bool) -> None:
    check_captured(check(clients.flow, **SIZES, exact=exact))


def test_float32() -> None:
    """With the exact trace: the vectors of the estimate are others in float32."""
    check_float32(clients.flow, **SIZES)
