"""The table of times is printed."""

from __future__ import annotations

import pytest

from tests.clients.common import example

example("zuko", "client_zuko")
clients = example("rich", "clients")


def test_clients(capsys: pytest.CaptureFixture[str]) -> None:
    clients.main(["--backend", "eager", "--rounds", "1", "--only", "estimate"])
    printed = capsys.readouterr().out
    assert "zuko, estimate" in printed
    assert "milliseconds per training step" in printed
