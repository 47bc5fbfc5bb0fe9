"""torchdiffeq integrates a tower and its divergence."""

from __future__ import annotations

import pytest

from tests.clients.common import check, check_captured, check_float32, example

clients = example("torchdiffeq", "client_torchdiffeq")

SIZES = {"points": 16, "width": 8}


@pytest.mark.parametrize("whole", [False, True], ids=["field", "field_and_divergence"])
@pytest.mark.parametrize("adjoint", [False, True], ids=["odeint", "odeint_adjoint"])
def test_float64(adjoint: bool, whole: bool) -> None:
    check_captured(check(clients.flow, **SIZES, adjoint=adjoint, whole=whole))


def test_float32() -> None:
    check_float32(clients.flow, **SIZES)
