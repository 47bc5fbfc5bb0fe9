"""The zoo: every loss is right, however it is captured, and is captured no worse than before."""

from __future__ import annotations

from typing import Any

import pytest

from tests.zoo.row import AS_WRITTEN, BY_LAYER, WAYS, Loss
from tests.zoo.running import capture_of, compare
from tests.zoo.table import LOSSES


def _param(row: Loss) -> Any:
    marks: list[Any] = [pytest.mark.slow] if row.is_slow else []
    if row.differs:
        marks.append(pytest.mark.xfail(reason=row.differs, strict=True))
    return pytest.param(row, id=row.name, marks=marks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", list(map(_param, LOSSES)))
def test_losses_of_the_zoo(row: Loss) -> None:
    wrong, side = compare(row)
    assert not wrong, "\n".join(wrong)
    found = capture_of(side)
    if row.way is None or {found.way, row.way} == {AS_WRITTEN, BY_LAYER}:  # the clock decides
        return
    worse = WAYS.index(found.way) > WAYS.index(row.way)
    assert not worse, f"{found.way}, and was {row.way}: {found.reason}"


def test_names_are_unique() -> None:
    names = [row.name for row in LOSSES]
    assert len(set(names)) == len(names)


def test_each_says_what_it_is() -> None:
    assert all(row.about for row in LOSSES)
