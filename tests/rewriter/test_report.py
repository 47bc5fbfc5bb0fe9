"""The record of a report: where nodes come from, what it prints, writes and logs; its graphs."""

from __future__ import annotations

import io
import json
import linecache
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import rewriter.api
from rewriter import CaptureError, NestedGradientWarning, Report, optimize_nested
from rewriter.switches import say_once

MATMULS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
    return ((g - 1) ** 2).sum()


def residual(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (d2u,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
    return (d2u[:, 0] - u[:, 0]).square().mean()


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(net))(x).square().sum()


def pushed(net: nn.Module, x: Tensor) -> Tensor:
    _, du = torch.func.jvp(net, (x,), (torch.ones_like(x),))
    return du.square().sum()


def twice(net: nn.Module, x: Tensor) -> Tensor:
    data = net(x).square().mean()
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
    return data + g.square().mean()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def points(batch: int = 5) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, dtype=torch.float64, requires_grad=True)


def report_of(loss: Any, **options: Any) -> Report:
    x = points() if loss in (residual, jacobian) else points().detach()
    return optimize_nested(loss, backend="eager", **options).explain(network(), x)


def walk(nodes: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for node in nodes:
        yield node
        yield from walk(node.get("body", []))


def nodes_in(report: Report, stage: str) -> list[dict[str, Any]]:
    (found,) = [s for s in report.to_dict()["stages"] if s["name"] == stage]
    return list(walk(found["nodes"]))


@pytest.mark.parametrize(
    ("loss", "options", "matmuls"),
    [
        # Two layers: a value is two products, an input gradient two more; but the last one's seeds
        # are ones, whose product is a sum, and so is the gradient of its weight.
        (penalty, {}, {"primal": 1, "cotangent": 1, "tangent": 3}),
        (penalty, {"strategy": "reverse"}, {"primal": 1, "cotangent": 1, "gradient": 3}),
        (penalty, {"strategy": "as written"}, {"primal": 1, "cotangent": 1, "gradient": 3}),
        (penalty, {"capture": "trace"}, {"primal": 1, "cotangent": 1, "tangent": 3}),
        (twice, {}, {"primal": 2, "cotangent": 1, "tangent": 5}),
        (pushed, {}, {"primal": 1, "tangent": 1, "gradient": 3}),
        (jacobian, {}, {"primal": 1, "cotangent": 2, "gradient": 5}),
    ],
)
def test_roles(loss: Any, options: dict[str, Any], matmuls: dict[str, int]) -> None:
    found = [n for n in nodes_in(report_of(loss, **options), "joint") if n["op"] in MATMULS]
    assert Counter(node["role"] for node in found) == matmuls


def test_sites_and_stages_of_nodes() -> None:
    report = report_of(residual)
    first, second = (site.name for site in report.sites)
    joint = [node for node in nodes_in(report, "joint") if node["kind"] == "call"]
    assert {n["site"] for n in joint} == {None, first, second}
    assert all(n["stage"] == "joint" for n in joint if n["role"] == "gradient")
    assert all(n["stage"] == "choose" for n in joint if n["role"] == "tangent")
    assert {n["stage"] for n in joint if n["role"] == "primal"} <= {"flatten", "nest", "choose"}
    assert sum(n["flops"] for n in joint if n["site"] == first) == report.sites[0].flops > 0
    assert sum(n["flops"] for n in joint if n["site"] == second) == report.sites[1].flops > 0
    nested = [node for node in nodes_in(report, "nest") if node["kind"] == "site"]
    assert [node["site"] for node in nested] == [second, first] and all("body" in n for n in nested)
    marks = [node for node in nodes_in(report, "flatten") if node["kind"] == "site"]
    assert [node["site"] for node in marks] == [first, second]


@pytest.mark.parametrize(
    "loss", [penalty, residual, jacobian, pushed, twice], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    "options",
    [{}, {"strategy": "as written"}, {"capture": "trace"}],
    ids=["auto", "written", "recorded"],
)
def test_every_operator_has_a_line_of_the_loss(loss: Any, options: dict[str, Any]) -> None:
    report = report_of(loss, **options)
    (source,) = report.to_dict()["sources"]
    assert source["lines"][0] == f"def {loss.__name__}(net: nn.Module, x: Tensor) -> Tensor:"
    last = source["first_line"] + len(source["lines"])
    found = [node for node in nodes_in(report, "joint") if node["kind"] == "call"]
    for node in found:
        assert node["path"] == source["path"] == os.path.relpath(__file__)
        assert source["first_line"] < node["line"] < last, node
        code = linecache.getline(__file__, node["line"]).strip()
        assert node["where"] == f"{node['path']}:{node['line']}: {code}"
    layers = {node["module"] for node in found if node["op"] in MATMULS}
    unknown = {""} if loss is pushed and "strategy" in options else set()  # PyTorch's forward mode
    assert "net.0" in layers and layers <= {"net.0", "net.2"} | unknown
    assert "net.2" in {node["module"] for node in found}  # perhaps by sums in place of products


def test_record() -> None:
    report = report_of(residual)
    record = report.to_dict()
    assert (record["format"], record["function"], record["captured"]) == (1, "residual", True)
    assert [i["name"] for i in record["inputs"]][:3] == ["net.0.weight", "net.0.bias", "x"]
    for stage in record["stages"]:
        nodes = list(walk(stage["nodes"]))
        ids = [node["id"] for node in nodes]
        assert len(set(ids)) == len(ids)
        assert all(read in ids for node in nodes for read in node["inputs"])
        assert stage["seconds"] > 0 and stage["maker"].split(".")[0] in ("rewriter", "passes")
    totals, joint = record["totals"], record["stages"][-1]["nodes"]
    assert sum(node["flops"] for node in joint) == totals["flops"] == report.flops
    assert sum(node["bytes"] for node in joint) == totals["bytes_moved"]
    assert sum(node["op"] in MATMULS for node in joint) == totals["matmuls"]
    assert sum(node["kind"] == "call" for node in joint) == totals["nodes"]
    assert totals["matmuls"] <= totals["matmuls_as_written"]
    assert sum(candidate["taken"] for candidate in record["candidates"]) == 1
    site = record["sites"][1]
    assert (site["order"], site["code"].startswith("(d2u,)")) == (2, True)
    assert {c["strategy"] for c in site["candidates"]} >= {"jvp_over_gradient", "reverse"}


def test_refusals() -> None:
    (site,) = report_of(jacobian).sites
    refused = {c.strategy: c.reason for c in site.candidates if not c.accepted}
    assert refused.keys() == {"jvp_over_gradient", "contraction"}
    assert "seeds" in refused["jvp_over_gradient"]
    for strategy, reason in refused.items():
        assert f"{strategy} refused: {reason[:40]}" in str(report_of(jacobian))


def test_formulas_of_symbolic_sizes() -> None:
    report = report_of(penalty, dynamic=True)
    (size,) = report.flops_formula.free_symbols
    assert report.flops_formula.subs(size, 5) == report.flops
    assert f"FLOP = {report.flops_formula}" in str(report)


def test_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, path = report_of(penalty), tmp_path / "report.json"
    report.to_json(path)
    assert json.loads(path.read_text()) == report.to_dict()
    before = path.read_text()

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        report.to_json(path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_not_captured(tmp_path: Path) -> None:
    def branch(net: nn.Module, x: Tensor) -> Tensor:
        value = net(x).sum()
        value.register_hook(torch.clone)
        return value

    report = report_of(branch)
    record = report.to_dict()
    assert not record["captured"] and "register_hook is not understood" in record["reason"]
    assert record["breaks"] == [record["reason"]] and not record["stages"]
    assert record["sources"][0]["lines"][0].strip().startswith("def branch(")
    report.to_json(tmp_path / "report.json")
    assert (
        "register_hook is not understood" in str(report)
        and "register_hook is not understood" in report._repr_html_()
    )
    with pytest.raises(KeyError, match="was not captured"):
        report.stage("joint")
    with pytest.raises(CaptureError, match="register_hook is not understood"):
        optimize_nested(branch, backend="eager").stages(network(), points())


def test_breaks_and_recompiles() -> None:
    def loss(net: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
        value = penalty(net, x) * scale
        if len(x) == 7:
            value.register_hook(torch.clone)
        return value

    decorated, net = optimize_nested(loss, backend="eager", dynamic=False), network()
    decorated(net, points())
    decorated(net, points(4))
    with pytest.warns(UserWarning, match="register_hook is not understood"):
        decorated(net, points(7))
    report = decorated.explain(net, points())
    first, second = report.recompiles
    assert "x f64[5, 3] requires grad" in first and second == "x f64[4, 3] requires grad"
    (reason,) = report.breaks
    assert "register_hook is not understood" in reason and "register_hook(torch.clone)" in reason
    assert "specialisations: 2" in str(report) and "calls that run as written: 1" in str(report)


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(residual)
    report.print()
    text = capsys.readouterr().out
    assert text.rstrip("\n") == str(report) == repr(report) and "\x1b" not in text
    lines = text.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 100
    for part in ("test_report.py", "(d2u,) = torch.autograd.grad", "jvp_over_gradient", "matmuls",
                 "B kept", "flatten", "joint", "order 2"):  # fmt: skip
        assert part in text
    terminal = Console(force_terminal=True, file=io.StringIO(), width=120, color_system="standard")
    terminal.print(report)
    assert "\x1b[" in terminal.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_notebook() -> None:
    html = report_of(residual)._repr_html_()
    assert "<td>gradient_1</td>" in html and "<td>jvp_over_gradient</td>" in html
    assert "a &lt; b" in Report(captured=False, reason="a < b")._repr_html_()


def test_diff() -> None:
    report = report_of(twice)
    shared = report.diff("flatten", "share")
    assert sum(" = aten.addmm(" in node for node in shared.removed) == 2 and not shared.added
    assert str(shared).startswith(f"flatten → share: {len(shared.removed)} removed, 0 added")
    assert json.loads(json.dumps(shared.to_dict()))["same"] == shared.same
    unchanged = report.diff("joint", "joint")
    assert not (unchanged.added or unchanged.removed or unchanged.changed) and unchanged.same
    built = report.diff("share", "joint")
    forward = [node for node in (*built.added, *built.removed) if " = aten.addmm(" in node]
    assert not forward, "the forward was traced again, and is not new"
    assert all(node.split(":")[0].split(".")[0] in ("gradient", "joint") for node in built.added)
    with pytest.raises(KeyError, match="the stages are flatten, share, nest, choose, joint"):
        report.diff("flatten", "joined")


@pytest.mark.parametrize("loss", [penalty, residual, jacobian], ids=lambda f: f.__name__)
def test_stages_run(loss: Any) -> None:
    decorated, net, x = optimize_nested(loss, backend="eager"), network(), points()
    value = loss(net, x)
    wanted = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    inputs = decorated.inputs_of(net, x)
    stages = decorated.stages(net, x)
    assert list(stages) == ["flatten", "share", "nest", "choose", "joint"]
    for module in stages.values():
        torch.testing.assert_close(module(*inputs)[0], value)
    names = list(decorated.explain(net, x).inputs)
    parameters = {id(p): g for p, g in zip(net.parameters(), wanted, strict=True)}
    assert len(names) == len(inputs)
    requiring = [given for given in inputs if given.requires_grad]
    _, *gradients = stages["joint"](*inputs)
    for given, gradient in zip(requiring, gradients, strict=True):
        if id(given) in parameters:
            torch.testing.assert_close(gradient, parameters[id(given)])


def test_looking_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1)).double()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    x, loss = points(), optimize_nested(penalty, backend="eager")
    generator = torch.get_rng_state()
    report = loss.explain(net, x)
    report.to_dict(), str(report), report._repr_html_(), report.diff("flatten", "joint")
    loss.stages(net, x), loss.inputs_of(net, x)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())
    assert len(loss.steps) == 1


def test_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIMIZE_NESTED_LOG", "sites, choices,stages,code")
    caplog.set_level(logging.INFO, logger="optimize_nested")
    loss, net = optimize_nested(penalty, backend="eager"), network()
    loss(net, points())
    loss(net, points())
    told = [record.getMessage() for record in caplog.records]
    told = [
        text for text in told if not text.startswith("rewriting penalty took")
    ]  # if it was slow
    first = [text.splitlines()[0] for text in told]
    assert first == [f"{name} of penalty" for name in ("sites", "choices", "stages", "code")]
    assert "torch.autograd.grad" in told[0] and "FLOP" in told[1] and "passes.joint" in told[2]
    assert "addmm" in told[3]


def test_log_of_what_there_is_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once; what there is, is logged, and the loss is rewritten all the same."""
    monkeypatch.setenv("OPTIMIZE_NESTED_LOG", "graphs,choices")
    caplog.set_level(logging.INFO, logger="optimize_nested")
    say_once.cache_clear()
    loss, net = optimize_nested(penalty, backend="eager", strict=True), network()
    match = r"OPTIMIZE_NESTED_LOG.*sites, stages, choices, code; got 'graphs'"
    with pytest.warns(NestedGradientWarning, match=match) as said:
        loss(net, points()).backward()
    optimize_nested(penalty, backend="eager")(net, points())
    assert len(said) == 1 and len(loss.steps) == 1
    assert any(record.getMessage().startswith("choices of penalty") for record in caplog.records)


def test_dump_into_a_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once, and the loss is rewritten all the same."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path / "file" / "below"))
    say_once.cache_clear()
    loss, net = optimize_nested(penalty, backend="eager", strict=True, dynamic=False), network()
    with pytest.warns(NestedGradientWarning, match="DUMP: nothing is written there") as said:
        loss(net, points()).backward()
        loss(net, points(7)).backward()
    assert len(said) == 1 and len(loss.steps) == 2


def test_a_report_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("of the report")

    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path))
    monkeypatch.setattr(rewriter.api, "make_report", fail)
    loss, net = optimize_nested(penalty, backend="eager", strict=True), network()
    with pytest.warns(NestedGradientWarning, match="penalty cannot be reported on: KeyError"):
        loss(net, points()).backward()
    assert len(loss.steps) == 1


def test_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path / "dumps"))
    loss, net = optimize_nested(penalty, backend="eager", dynamic=False), network()
    for batch in (5, 4, 5):
        loss(net, points(batch))
    folders = sorted((tmp_path / "dumps").glob("optimize_nested_penalty_built_*"))
    assert len(folders) == len(list((tmp_path / "dumps").iterdir())) == 2
    for folder in folders:
        written = {path.name for path in folder.iterdir()}
        stages = ["flatten", "share", "nest", "choose", "joint"]
        numbered = {f"{k:02}_{name}" for k, name in enumerate(stages, start=1)}
        kinds = {f"{name}.{kind}" for name in numbered for kind in ("txt", "py")}
        assert written == kinds | {"00_captured.py", "report.txt", "report.json"}
        record = json.loads((folder / "report.json").read_text())
        assert record["function"] == "penalty" and len(record["stages"]) == 5
