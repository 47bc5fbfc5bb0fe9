"""The benchmark: what is measured, kept, judged and shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from examples.benchmark import chart, forms, one_case, page, processes, results, targets
from examples.benchmark.results import FirstStep, Results, Row, Section, Timing
from rewriter import optimize_nested
from rewriter.bench import Contender, measure
from rewriter.peak_memory import peak_bytes

KIB = 1024


def row(
    seconds: dict[str, float], *, peak: dict[str, int] | None = None, flops: float = 6.0
) -> Row:
    """A case of penalties whose forms take these milliseconds; a form of no time has refused."""
    taken = {
        name: Timing(
            minimum=ms * 0.5e-3,
            median=ms * 1e-3,
            over_eager=seconds["E"] / ms,
            over_ours=ms / seconds["O"],
            peak_bytes=(peak or {}).get(name, 2**20),
            differs=1e-7,
        )
        if ms
        else Timing(refusal="RuntimeError: no")
        for name, ms in seconds.items()
    }
    return Row(2, "gp_mlp", "tanh", 20, {"E": 6.5, "O": flops}, 6.05, taken)


GOOD = row({"E": 4.0, "C": 2.0, "F": 0.0, "O": 1.0})


def section(**rows: Row) -> Section:
    return Section({"torch": "2"}, 2, dict(rows))


@pytest.mark.parametrize(
    ("work", "kib"),
    [
        (lambda: torch.ones(256), 1),
        (lambda: [torch.ones(256) for _ in range(3)], 3),
        (lambda: [torch.ones(256).sum().item() for _ in range(3)], 1),
        (lambda: None, 0),
    ],
    ids=["one", "kept", "freed", "nothing"],
)
def test_peak_bytes(work: Callable[[], Any], kib: int) -> None:
    before = torch.ones(1000)  # does not count
    assert kib * KIB <= peak_bytes(work) < (kib + 0.1) * KIB
    assert len(before) == 1000


def test_memory_and_value_of_a_contender() -> None:
    x = torch.ones(KIB, requires_grad=True)
    trained = Contender("trained", lambda: (2 * x).sum(), [x])
    valued = Contender("valued", lambda: (3 * x).detach().sum(), [x], backward=False)
    for contender in (trained, valued):
        contender.first_step()
        assert not contender.refusal
    measure([trained, valued], rounds=2)
    # 2 x, then the gradient of 2 x, which is one number expanded, and that of x.
    assert trained.peak_bytes is not None and 4 * KIB <= trained.peak_bytes < 4.1 * KIB
    assert valued.value == 3 * KIB and not len(valued.gradients)
    assert valued.minimum <= valued.median and x.grad is None
    other = Contender("other", lambda: (2.5 * x).sum(), [x])
    other.first_step()
    assert other.distance(trained) == pytest.approx(0.25)


def test_targets_met() -> None:
    met = section(a=GOOD)
    steps = {"C": FirstStep(20.0, 3.0), "O": FirstStep(10.0, 2.0), "T": FirstStep(1.0, 1.0)}
    met.first_steps = {"a": steps}
    assert [str(target).rpartition(" ")[2] for target in targets.targets_of(met)] == ["met."] * 8


def test_targets_missed_say_by_how_much() -> None:
    slow = row({"E": 4.0, "C": 3.0, "F": 2.0, "O": 2.5}, peak={"O": 2**21}, flops=7.0)
    found = section(
        a=slow, b=dataclasses.replace(slow, forms={**slow.forms, "O": Timing(refusal="no")})
    )
    steps = {"C": FirstStep(10.0, 3.0), "O": FirstStep(20.0, 8.0), "T": FirstStep(2.5, 2.0)}
    found.first_steps = {"a": steps}
    text = "\n".join(map(str, targets.targets_of(found)))
    for said in (
        "Every case runs: missed by 1 of 2: b.",
        "missed: a takes 1.25 × F.",
        "missed: 1.60 ×.",
        "missed: a 7.00 F, figure 6.05.",
        "missed: a 2.00 MiB, C 1.00.",
        "missed: a 20.0 s, C 10.0 s.",
        "missed: a 8.0 s of 20.0 s.",
        "missed: a 2.5 s.",
    ):
        assert said in text


def test_page(tmp_path: Path) -> None:
    found = section(a=GOOD)
    steps = {"C": FirstStep(20.0, 3.0), "O": FirstStep(refusal="no"), "T": FirstStep(1.5, 1.0)}
    found.first_steps = {"gp_mlp, tanh": steps}
    text = page.page({"one machine": found}, lambda name: f"{name}.svg")
    assert "| gp_mlp | tanh | 2 / 4 | 1 / 2 | – |  | 0.5 / 1 | 4.00 × | 2.00 × C |" in text
    assert "| gp_mlp | tanh | 6.50 | 6.00 | 6.05 | 1.00 | 1.00 |  | 1.00 | 1e-07 |" in text
    assert "| gp_mlp, tanh | 20.0 / 3.0 |  | – | 1.5 |" in text
    assert "tanh, F did not run: `RuntimeError: no`" in text and "(one machine.svg)" in text
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1
    chart.draw("one machine", [GOOD, GOOD], tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    assert drawn.count("<!-- gp_mlp -->") == 2 and drawn.count("<!-- 4 -->") == 2


def test_results_of_other_machines_are_kept(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "benchmarks.json"
    first = Results(path)
    first.section("one").rows["a"] = GOOD
    first.section("one").first_steps["a"] = {"C": FirstStep(20.0, 3.0)}
    first.save()
    second = Results(path)
    second.section("another").rows["b"] = GOOD
    second.save()
    third = Results(path)
    assert list(third.sections) == ["one", "another"]
    assert third.section("one") == first.section("one") and third.section("one").rows["a"] == GOOD
    monkeypatch.setattr(results, "_versions", lambda: {"torch": "3"})
    assert not third.section("one").rows and third.section("one").versions == {"torch": "3"}


def saying(monkeypatch, answers: list[list[Any]]) -> list[list[str]]:
    """Let processes say what is given, one list each; return the words they were started with."""
    started = []

    def lines(program: str, words: list[str], environment: Any = None) -> Iterator[Any]:
        started.append(words)
        for answer in answers[len(started) - 1]:
            if isinstance(answer, Exception):
                raise answer
            yield answer

    monkeypatch.setattr(processes, "_lines", lines)
    return started


def test_a_form_that_takes_the_process_down_is_left_out(monkeypatch) -> None:
    good = json.loads(json.dumps({"row": dataclasses.asdict(GOOD)}))
    death = processes.Died("the process died of SIGSEGV")
    started = saying(monkeypatch, [[{"step": "E"}, {"step": "F"}, death], [{"step": "E"}, good]])
    steps: list[str] = []
    where: Any = {
        "columns": "EFO",
        "sizes": [],
        "cache": Path("cache"),
        "on_step": steps.append,
    }
    found = processes.run_case("gp_mlp", "tanh", rounds=3, **where)
    assert found.forms["F"].refusal == str(death) and found.forms["O"] == GOOD.forms["O"]
    assert steps == ["E", "F", "E"] and started[1][-4:] == ["--form", "E", "--form", "O"]
    saying(monkeypatch, [[{"step": "O"}, death]])
    with pytest.raises(processes.Died, match="SIGSEGV"):
        processes.run_case("gp_mlp", "tanh", rounds=3, **where)


def test_jax_has_its_own_process(monkeypatch) -> None:
    in_jax = dataclasses.replace(GOOD.forms["E"], median=3 * GOOD.ours.median, over_ours=9.0)
    beside = dataclasses.replace(GOOD, forms={"E": GOOD.forms["E"], "J": in_jax})
    good = [json.loads(json.dumps({"row": dataclasses.asdict(row)})) for row in (GOOD, beside)]
    started = saying(monkeypatch, [[good[0]], [good[1]]])
    where: Any = {"sizes": [], "cache": Path("cache"), "on_step": lambda name: None}
    found = processes.run_case("gp_mlp", "tanh", columns="ECJO", rounds=3, **where)
    assert started[0][-6:] == ["--form", "E", "--form", "C", "--form", "O"]
    assert started[1][-4:] == ["--form", "E", "--form", "J"]
    assert found.forms["J"] == dataclasses.replace(in_jax, over_ours=pytest.approx(3.0))
    assert {name: found.forms[name] for name in GOOD.forms} == GOOD.forms


def test_first_steps(monkeypatch) -> None:
    said = [[{"seconds": 9.0, "refusal": ""}], [{"seconds": 2.0, "refusal": ""}]]
    refused = [[{"seconds": None, "refusal": "RuntimeError: no"}]]
    saying(monkeypatch, [*said, *refused])
    where: Any = {"sizes": [], "cache": Path("cache"), "on_step": lambda name: None}
    found = processes.first_steps("gp_mlp", "tanh", columns="CO", **where)
    assert found == {"C": FirstStep(9.0, 2.0), "O": FirstStep(refusal="RuntimeError: no")}


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(processes.Died, match="No module named"):
        list(processes._lines("nothing", []))


def test_a_process_that_says_nothing_is_ended(monkeypatch) -> None:
    monkeypatch.setattr(processes, "LIMIT", 0.2)
    with pytest.raises(processes.Died, match="more than 0 s, or all memory"):
        list(processes._lines("first_step", ["gp_mlp", "tanh", "C"]))


def test_one_case(tmp_path: Path, monkeypatch) -> None:
    eager = lambda loss: lambda *args: loss(*args)  # noqa: E731
    monkeypatch.setattr(forms, "compiled_as_written", eager)
    monkeypatch.setattr(
        forms, "optimized", lambda case: optimize_nested(case.loss, backend="eager")
    )
    words = ["gp_mlp", "small tanh", "--rounds", "2", "--cache", str(tmp_path)]
    words += [word for form in "ECFO" for word in ("--form", form)]
    done = CliRunner().invoke(one_case.main, words, catch_exceptions=False)
    *steps, last = map(json.loads, done.output.splitlines())
    # A first step, two warm-up steps, two rounds, one for memory; our own is the last of each turn.
    assert [said["step"] for said in steps] == ["E", "C", "F", "O"] * 6
    found = Row(
        **{**last["row"], "forms": {n: Timing(**f) for n, f in last["row"]["forms"].items()}}
    )
    assert (found.workload, found.case, found.rounds, found.figure) == (
        "gp_mlp",
        "small tanh",
        2,
        6.05,
    )
    assert 5.9 < found.flops["O"] <= found.flops["E"] < 6.05
    assert all(not timing.refusal and timing.differs < 1e-5 for timing in found.forms.values())
    assert found.ours.peak_bytes and found.ours.over_ours == 1.0
