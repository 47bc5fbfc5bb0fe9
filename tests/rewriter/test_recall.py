"""What an earlier process chose is taken over, without a search, only if it is what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter.recall
import rewriter.start
from rewriter import OptimizedLoss, Report, optimize_nested
from rewriter.codegen import compile_graph
from rewriter.forms import Form, Forms
from tests.cases import mlp, penalty_on_input
from tests.oracle import Outcome, assert_same, outcome


def laplacian(net: nn.Module, x: Tensor) -> Tensor:
    """The square of a Laplacian, by loops."""
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
    parts = [torch.autograd.grad(g[:, i].sum(), p, create_graph=True)[0][:, i] for i in range(3)]
    return torch.stack(parts).sum(0).square().mean()


def run(loss: Callable[..., Tensor], args: tuple[nn.Module, Tensor]) -> Outcome:
    return outcome(loss, [args[0]], (args[1],), {})


def example() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return mlp(nn.Tanh, 2, 6, 3), torch.randn(5, 3, dtype=torch.float64)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where choices are kept; code is the graph itself."""

    def op_by_op(module: Any, *_: Any, **__: Any) -> Any:
        return compile_graph(module, "eager", "default", strict=True)

    monkeypatch.setattr(rewriter.recall, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(rewriter.start, "compile_graph", op_by_op)
    monkeypatch.setattr(rewriter.start, "get_toolchain_ready", lambda: None)
    return tmp_path


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The wishes of the forms that are built."""
    seen: list[dict[str, str]] = []
    built = Forms._built

    def noting(self: Forms, wish: Any) -> Any:
        seen.append(dict(wish))
        return built(self, wish)

    monkeypatch.setattr(Forms, "_built", noting)
    return seen


def in_new_process(
    loss: Callable[..., Tensor], args: Any, **options: Any
) -> tuple[OptimizedLoss, Outcome]:
    """Return what a process that knows nothing of others makes of a loss."""
    torch._dynamo.reset()
    ours = optimize_nested(loss, **options)
    return ours, run(ours, args)


@pytest.mark.parametrize(("loss", "n_forms"), [(laplacian, 1), (penalty_on_input, 2)])
def test_second_process(
    loss: Callable[..., Tensor], n_forms: int, folder: Path, traced: list[dict[str, str]]
) -> None:
    args = example()
    reference = run(loss, args)
    first, found = in_new_process(loss, args)
    assert_same(found, reference)
    (kept,) = (folder / "optimize_nested").iterdir()
    chosen = first.steps[0].rewritten.choice
    assert not chosen.is_recalled
    assert len(traced) == n_forms
    traced.clear()

    second, found = in_new_process(loss, args)
    assert_same(found, reference)
    choice = second.steps[0].rewritten.choice
    assert choice.is_recalled
    assert (
        choice.taken.strategies
        == chosen.taken.strategies
        == json.loads(kept.read_text())["strategies"]
    )
    assert len(traced) == 1


def test_loss_that_is_cheapest_as_written(
    folder: Path, traced: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = example()
    with monkeypatch.context() as patch:
        patch.setattr("rewriter.choose.evaluated", lambda *_: 0)  # what it costs as written
        patch.setattr("rewriter.choose.preference", lambda form: form.candidate.nodes)
        patch.setattr(Forms, "build_as_written", _least(Forms.build_as_written))
        first, _ = in_new_process(laplacian, args)
    (kept,) = (folder / "optimize_nested").iterdir()
    data = json.loads(kept.read_text())
    assert set(data["strategies"].values()) == {"as written"} and traced
    traced.clear()
    second, found = in_new_process(laplacian, args)
    choice = second.steps[0].rewritten.choice
    assert choice.is_recalled and not traced
    assert choice.taken.strategies == first.steps[0].rewritten.choice.taken.strategies
    assert_same(found, run(laplacian, args))


def _least(build: Callable[..., Form]) -> Callable[..., Form]:
    """Return what builds the same form, with a price that no other has."""

    def built(*args: Any) -> Form:
        form = build(*args)
        return replace(form, candidate=replace(form.candidate, nodes=0))

    return built


def test_report_has_all_candidates(folder: Path) -> None:
    def lines(report: Report) -> list[str]:
        return [line for line in str(report).splitlines() if " s  " not in line]

    first, _ = in_new_process(laplacian, example())
    before = lines(first.explain(*example()))
    second, _ = in_new_process(laplacian, example())
    assert second.steps[0].rewritten.choice.is_recalled
    assert lines(second.explain(*example())) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"\xff",
        lambda data: b"[]",
        lambda data: b'{"strategies": 1, "flops": 2}',
        lambda data: data.replace(b"taylor", b"reverse"),  # costs something else
        lambda data: data.replace(b"gradient_1", b"gradient_9"),
        lambda data: data.replace(b"taylor", b"nothing"),
    ],
    ids=["empty", "no text", "a list", "other types", "other price", "other sites", "no strategy"],
)
def test_a_file_that_is_something_else(damage: Callable[[bytes], bytes], folder: Path) -> None:
    args = example()
    in_new_process(laplacian, args)
    (kept,) = (folder / "optimize_nested").iterdir()
    data = kept.read_bytes()
    assert damage(data) != data
    kept.write_bytes(damage(data))
    second, found = in_new_process(laplacian, args)
    assert not second.steps[0].rewritten.choice.is_recalled
    assert_same(found, run(laplacian, args))
    assert kept.read_bytes() == data


@pytest.mark.parametrize(
    "options",
    [{"backend": "eager"}, {"strategy": "jvp_over_gradient"}, {"strict": True}],
)
def test_is_not_asked(options: dict[str, Any], folder: Path) -> None:
    """Where the user's wishes decide, or nothing is compiled."""
    in_new_process(laplacian, example(), **options)
    assert not list(folder.iterdir())


def test_sizes_and_passes_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = example()
    in_new_process(laplacian, (net, x))
    in_new_process(laplacian, (net, x[:3]))
    monkeypatch.setattr(rewriter.recall, "_code", lambda: "other passes")
    in_new_process(laplacian, (net, x))
    assert len(list((folder / "optimize_nested").iterdir())) == 3


def test_a_folder_that_cannot_be_written_to(folder: Path) -> None:
    (folder / "optimize_nested").write_text("in the way")
    args = example()
    _, found = in_new_process(laplacian, args)
    assert_same(found, run(laplacian, args))
