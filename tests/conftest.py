"""Each test starts without anything compiled before, and on a small heap; the order of the tests;
how many random programs there are."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from rewriter.auto import Auto

# Graphs are cycles, which wake the collector.
gc.set_threshold(50_000, 20, 100)

# Dynamo times its guards once per capture, after it has emptied the caches: for its logs.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0

ABOUT_AUTO = ("test_auto.py", "test_zoo.py", "test_readme.py")

# Programs per family: the same in every run of the tests; others each time for `make fuzz`, which
# also makes a failing one smaller (minutes).
settings.register_profile(
    "tests",
    max_examples=5,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
settings.register_profile(
    "fuzz",
    settings.get_profile("tests"),
    max_examples=int(os.environ.get("PROGRAMS_PER_FAMILY", "30")),
    derandomize=False,
    phases=[Phase.generate, Phase.shrink],
)
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start what goes through a C++ compiler first, so that no worker is left alone with it."""
    items.sort(key=lambda item: item.get_closest_marker("inductor") is None)


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> Iterator[None]:
    """What is imported and cached so far is not walked through by the collector again: a capture
    that fails collects everything, which would take a second of each later test."""
    gc.collect()
    gc.freeze()
    yield


@pytest.fixture(autouse=True)
def not_recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Dynamo refuses is captured by layer, as with ``capture="dynamo"``, but where tests are
    about ``capture="auto"``: what they ask for must not be had in another way."""
    if request.path.name not in ABOUT_AUTO:
        monkeypatch.setattr(Auto, "_may_record", lambda *_: False)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Forget earlier specialisations, so that tests do not depend on their order."""
    torch._dynamo.reset()
    yield
