"""The page on what PyTorch gets wrong says what is so: PyTorch wrong, the rewritten loss right."""

from __future__ import annotations

import re

import pytest
import torch

from tests.wrong_in_pytorch import CASES, PAGE, SECTIONS, Case, imports, section, source
from tests.wrong_measures import Numbers, measured

TEXT = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
# The version of PyTorch whose numbers the page has; another may have been mended.
VERSION = re.search(r"with torch ([\d.]+)\.", TEXT)
IS_THIS_VERSION = VERSION is not None and torch.__version__.startswith(VERSION[1])
# One of each kind; the others take their time.
QUICK = {"layer-norm-jvp", "batch-norm-hessian-trace", "weight-norm-direction", "solve", "pdist"}


def parameters(cases: tuple[Case, ...]) -> list:
    marks = [[] if case.anchor in QUICK else [pytest.mark.slow] for case in cases]
    return [pytest.param(c, id=c.anchor, marks=m) for c, m in zip(cases, marks, strict=True)]


@pytest.mark.parametrize("case", parameters(CASES))
def test_case(case: Case) -> None:
    numbers = measured(case.measure, case.code)
    assert numbers.is_ours_right, numbers
    if IS_THIS_VERSION:
        assert numbers.is_theirs_wrong, f"PyTorch is right: {numbers}"
        assert section(case, numbers) in TEXT, "run `make wrong`"


def test_page_has_all_cases_in_order() -> None:
    anchors = re.findall(r"^### .* \{: #([\w-]+) \}$", TEXT, re.M)
    assert anchors == [case.anchor for case in CASES]
    titles = re.findall(r"^## (.*)$", TEXT, re.M)
    assert titles == list(SECTIONS)
    assert imports() in TEXT
    for case in CASES:
        assert f"(#{case.anchor})" in TEXT
        assert source(case) in TEXT, f"{case.anchor}: run `make wrong`"


def test_numbers_are_judged() -> None:
    assert Numbers(1.1, 1.0, 1.0).is_theirs_wrong
    assert Numbers("RuntimeError: no", 1.0, 1.0).is_theirs_wrong
    assert Numbers(float("nan"), 1.0, 1.0).is_theirs_wrong
    assert not Numbers(1.0, 1.0, 1.0).is_theirs_wrong
    assert not Numbers(1.1, 1.01, 1.0).is_ours_right
    assert not Numbers(1.1, float("nan"), 1.0).is_ours_right
