"""A sample of PyTorch's operator database, and the table of all of it."""

from __future__ import annotations

import functools
import re

import pytest

from tests.conformance import (
    AS_WRITTEN,
    BEYOND,
    CRASH,
    REFUSED,
    REWRITTEN,
    SAMPLES,
    TABLE,
    VERSION,
    WRONG,
    entries,
    lines_of,
    result_in,
    run_entry,
)
from tests.degenerate import TITLE, Line
from tests.degenerate import run_entry as run_three_times
from tests.narrowed import TITLE as CUT
from tests.narrowed import run_cut
from tests.versions import second_derivative_of_grid_sample

# A few of every family, and each entry that has been wrong once.
SAMPLE = (
    # elementwise
    "add", "mul", "div (no_rounding_mode)", "pow", "exp", "log", "tanh", "sigmoid", "erf", "atan2",
    "clamp", "where", "hypot", "xlogy", "sinc", "polar",
    # reductions and scans
    "sum", "mean", "prod", "var", "amax", "std", "norm", "logsumexp", "cumsum", "cumprod",
    "logcumsumexp", "median", "linalg.vector_norm",
    # shapes and indices
    "cat", "expand", "permute", "gather", "scatter_add", "index_select", "take", "sort", "topk",
    "diff", "tril", "trace", "unfold", "masked_select", "masked_fill",
    "as_strided_scatter",
    # matrices
    "mm", "bmm", "addmm", "einsum", "linalg.det", "linalg.solve", "linalg.eigh", "linalg.inv",
    "matrix_exp", "cholesky_inverse", "triangular_solve",
    # layers
    "nn.functional.conv2d", "nn.functional.conv_transpose1d", "nn.functional.gelu",
    "nn.functional.hardsigmoid", "nn.functional.layer_norm", "nn.functional.max_pool2d",
    "nn.functional.max_unpool1d", "nn.functional.pad (circular)", "nn.functional.dropout",
    "nn.functional.cross_entropy", "nn.functional.embedding", "nn.functional.grid_sample",
    "nn.functional.scaled_dot_product_attention", "nn.functional.pixel_shuffle", "cdist",
    "fft.rfft",
    # modules
    "nn.Linear", "nn.Bilinear", "nn.BatchNorm1d", "nn.GroupNorm", "nn.CircularPad1d",
    "nn.MultiMarginLoss", "nn.GRUCell",
)  # fmt: skip

LATER = {"nn.functional.grid_sample": second_derivative_of_grid_sample}

known = functools.cache(entries)  # its import takes seconds


@pytest.mark.filterwarnings("ignore")  # the database builds its samples with deprecated functions
@pytest.mark.parametrize("name", [pytest.param(n, marks=LATER.get(n, ())) for n in SAMPLE])
@pytest.mark.parametrize("samples", [1, pytest.param(SAMPLES, marks=[pytest.mark.slow])])
def test_entry(name: str, samples: int) -> None:
    if name not in known():
        pytest.skip(f"torch {VERSION} has no such entry")
    result = run_entry(name, known()[name], samples)
    assert result.result in (REWRITTEN, BEYOND), f"{result.result}: {result.reason}"
    assert "reverse" in result.strategies


def written_for() -> str:
    found = re.search(r"^torch (\S+),", TABLE.read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_table() -> None:
    """Nothing is wrong, nothing crashes, and whatever is as written has a reason."""
    lines = lines_of(TABLE.read_text())
    assert [name for name, line in lines.items() if result_in(line) in (WRONG, CRASH)] == []
    silent = [line for line in lines.values() if result_in(line) in (AS_WRITTEN, REFUSED)]
    assert [line for line in silent if line.endswith("|  |")] == []


def test_table_has_every_entry() -> None:
    if written_for() != VERSION:
        pytest.skip(f"the table was written for torch {written_for()}, this is {VERSION}")
    assert list(lines_of(TABLE.read_text())) == list(known())
    assert [name for name in SAMPLE if name not in known()] == []


QUICK = ("logcumsumexp", "nn.functional.logsigmoid")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow])
        for n in (*QUICK, "cumprod", "sinc", "bmm", "softmax")
    ],
)
def test_three_times(name: str) -> None:
    line = run_three_times(name, known()[name])
    assert isinstance(line, Line)
    assert line.ours == line.numbers > 0, line.note


def test_cut_tensors() -> None:
    """Nothing on the page is wrong, and nothing crashes, for tensors of nothing or one element."""
    section = TABLE.read_text().split(CUT, 1)[1]
    counts = re.findall(r"^\| (?:no rows|one row|one element) \|(.*)\|$", section, re.MULTILINE)
    assert [count.split("|")[-2:] for count in counts] == [[" 0 ", " 0 "]] * 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["no rows", "one row"])
@pytest.mark.parametrize("name", ["nn.BatchNorm1d", "cumprod"])
def test_cut_entry(name: str, how: str) -> None:
    result = run_cut(f"{name}: {how}", known())
    assert result.result == REWRITTEN, result.reason


def test_special_points() -> None:
    """Nowhere on the page PyTorch has more right than we have."""
    section = TABLE.read_text().split(TITLE, 1)[1].split("\n## ", 1)[0]
    rows = [
        re.split(r" \| ", row) for row in section.splitlines() if re.search(r" \| \d+ \| ", row)
    ]
    assert rows
    assert [row[0] for row in rows if int(row[3]) < int(row[4])] == []
