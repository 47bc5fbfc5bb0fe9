"""Each test starts without anything compiled before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Forget earlier specialisations, so that tests do not depend on their order."""
    torch._dynamo.reset()
    yield
