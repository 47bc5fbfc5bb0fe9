"""`start="tiered"`: op by op first, compiled code between two calls, and no harm where that
fails."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import rewriter.deferred
import rewriter.start
from rewriter import (
    NestedGradientWarning,
    OptimizeNestedError,
    optimize_nested,
    wait_until_compiled,
)
from rewriter.background import Job, Queue
from rewriter.codegen import compile_graph
from tests.cases import mlp
from tests.oracle import assert_same, outcome


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    """A penalty with a draw in it."""
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
    return nn.functional.dropout(g).square().sum()


def example() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return mlp(nn.Tanh, 3, 6, 2), torch.randn(5, 2, dtype=torch.float64)


class Background:
    """Jobs that end when a test says so, and code that is the graph itself.

    Attributes:
        jobs: What was submitted.
        compiled: How often code was made from what a job has left on disk.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.compiled = 0

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def compile_graph(self, module: Any, backend: str, mode: str, *, strict: bool, **_: Any) -> Any:
        self.compiled += backend == "inductor"
        return compile_graph(module, "eager", mode, strict=strict)


@pytest.fixture
def background(monkeypatch: pytest.MonkeyPatch) -> Iterator[Background]:
    made = Background()
    monkeypatch.setattr("rewriter.start.queue", made)
    monkeypatch.setattr("rewriter.deferred.MOST_PRODUCTS", 1000)  # what is above is found elsewhere
    monkeypatch.setattr("rewriter.start.compile_graph", made.compile_graph)
    yield made
    rewriter.start.waiting.clear()


def same_as_written(loss: Callable[..., Tensor], net: nn.Module, x: Tensor) -> None:
    torch.manual_seed(1)
    ours = outcome(loss, [net], (x,), {})
    torch.manual_seed(1)
    assert_same(ours, outcome(penalty, [net], (x,), {}))


def test_switch_between_two_calls(background: Background) -> None:
    net, x = example()
    loss = optimize_nested(penalty, start="tiered", strict=True, verify=False)
    same_as_written(loss, net, x)
    same_as_written(loss, net, x)
    assert len(background.jobs) == 1 and background.compiled == 0
    (line,) = loss.explain(net, x).tiers
    assert line.startswith("penalty (joint graph): op by op, 2 calls so far; being compiled for")
    assert not wait_until_compiled(timeout=0)
    background.jobs[0].end("")
    same_as_written(loss, net, x)  # op by op still; the next one is not
    assert background.compiled == 1
    same_as_written(loss, net, x)
    assert background.compiled == 1
    report = loss.explain(net, x)
    assert report.tiers[0].startswith("penalty (joint graph): compiled, after 3 calls op by op and")
    assert report.tiers[0] in str(report)
    assert wait_until_compiled(timeout=0)


def test_views_go_to_another_process(background: Background) -> None:
    """Along a coordinate, a tangent is a slice of the first layer's weight."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        p = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
        (h,) = torch.autograd.grad(g[:, 0].sum(), p, create_graph=True)
        return (g[:, 1] - h[:, 0]).square().sum()

    net, x = example()
    optimize_nested(loss, start="tiered")(net, x)
    assert len(background.jobs) == 1


def test_wait_until_compiled(background: Background) -> None:
    """After it the very next call is compiled: of forward and backward graph alike."""
    net, x = example()
    x.requires_grad_()
    loss = optimize_nested(lambda net, x: net(x).square().sum(1), start="tiered", verify=False)
    loss(net, x).sum().backward()
    assert len(background.jobs) == 2
    for job in background.jobs:
        job.end("")
    assert wait_until_compiled() and background.compiled == 2
    loss(net, x).sum().backward()
    assert background.compiled == 2
    assert [line.split(": compiled, after 1 calls")[0] for line in loss.explain(net, x).tiers] == [
        "<lambda> (forward graph)",
        "<lambda> (backward graph)",
    ]


def test_failure_is_said_once(background: Background) -> None:
    net, x = example()
    loss = optimize_nested(penalty, start="tiered")
    loss(net, x)
    background.jobs[0].end("CppCompileError: no space left")
    with pytest.warns(NestedGradientWarning, match="no space left; it goes on op by op") as said:
        same_as_written(loss, net, x)
        same_as_written(loss, net, x)
    assert len(said) == 1 and background.compiled == 0
    assert "op by op: compiling failed, CppCompileError" in loss.explain(net, x).tiers[0]


def test_failure_is_an_error_with_strict(background: Background) -> None:
    net, x = example()
    loss = optimize_nested(penalty, start="tiered", strict=True)
    loss(net, x)
    background.jobs[0].end("CppCompileError: no space left")
    for _ in range(2):
        with pytest.raises(OptimizeNestedError, match=r"penalty \(joint graph\).*no space left"):
            loss(net, x)
    assert all(p.grad is None for p in net.parameters())


def test_code_that_cannot_be_loaded(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = example()
    loss = optimize_nested(penalty, start="tiered")
    loss(net, x)
    background.jobs[0].end("")

    def fail(*_: object, **__: object) -> None:
        raise OSError("the cache is gone")

    monkeypatch.setattr("rewriter.start.compile_graph", fail)
    with pytest.warns(NestedGradientWarning, match="the cache is gone; it goes on op by op"):
        same_as_written(loss, net, x)
    same_as_written(loss, net, x)


def test_compiled_code_is_checked_too(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``check``, before the first call that it answers."""
    at: list[int] = []
    monkeypatch.setattr("rewriter.step.check_step", lambda *_, **__: at.append(background.compiled))
    net, x = example()
    loss = optimize_nested(penalty, start="tiered", check=True)
    loss(net, x)
    loss(net, x)
    background.jobs[0].end("")
    for _ in range(3):
        loss(net, x)
    assert at == [0, 1]


def compiled_at_once(background: Background, said: str) -> None:
    net, x = example()
    loss = optimize_nested(penalty, start="tiered")
    with pytest.warns(NestedGradientWarning, match=f"is compiled before its first step: .*{said}"):
        same_as_written(loss, net, x)
    assert background.compiled == 1 and not background.jobs


def test_cache_switched_off(background: Background) -> None:
    with inductor_config.patch(fx_graph_cache=False):
        compiled_at_once(background, "cache on disk is switched off")


def test_what_cannot_be_pickled(background: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    def dumps(*_: object) -> bytes:
        raise TypeError("cannot pickle this")

    monkeypatch.setattr("rewriter.parcel.GraphPickler.dumps", dumps)
    compiled_at_once(background, "cannot be pickled: TypeError: cannot pickle this")


def test_module(background: Background) -> None:
    """A module's levels begin op by op too."""
    net, x = example()
    fast = optimize_nested(net, start="tiered", strategy="jvp_over_gradient", strict=True)
    penalty(fast, x).backward()
    assert background.jobs and background.compiled == 0
    for job in background.jobs:
        job.end("")
    assert wait_until_compiled()
    assert background.compiled == len(background.jobs)


def test_process_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words are the reason; the next job has a new process."""
    monkeypatch.setattr("rewriter.background.WORKER", "no_such_module")
    jobs = Queue()
    for job in [Job(bytes, b""), Job(bytes, b"")]:
        jobs.submit(job)
        assert job.done.wait(60)
        assert "process ended" in job.error and "no_such_module" in job.error


def test_interpreter_exit_does_not_wait(tmp_path: Path) -> None:
    """It ends while the process is at work, and takes the process with it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import time, rewriter.background as background\n"
        "background.WORKER = 'sleeper'\n"
        "job = background.Job(bytes, b'')\n"
        "background.queue.submit(job)\n"
        "while background.queue._worker is None: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "print(background.queue._worker._process.pid, job.done.is_set())\n"
    )
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(600)\n")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    pid, was_done = done.stdout.split()
    assert was_done == "False" and not done.stderr
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.inductor
@pytest.mark.slow
def test_another_process_compiles() -> None:
    """For real, under autocast and with a draw: found on disk, nothing is compiled here."""
    net, _ = example()
    rows = 5 + int(time.time()) % 9973  # no earlier run has left code for so many
    x = torch.randn(rows, 2, dtype=torch.float64)
    loss = optimize_nested(penalty, start="tiered", strict=True)
    with torch.autocast("cpu"):
        same_as_written(loss, net, x)
        counters.clear()
        assert wait_until_compiled(timeout=300)
        assert loss.explain(net, x).tiers[0].startswith("penalty (joint graph): compiled")
        same_as_written(loss, net, x)
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0


class TestToolchain:
    """What C++ kernels need is begun before the loss is rewritten, and only where it is needed."""

    @pytest.mark.parametrize(
        ("options", "events"),
        [
            ({}, ["toolchain", "rewritten", "compiled"]),
            ({"backend": "eager"}, ["rewritten", "compiled"]),
            ({"start": "tiered"}, ["rewritten", "compiled"]),
        ],
    )
    def test_is_begun_first(
        self, options: dict[str, Any], events: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[str] = []

        def noting(event: str, function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: (seen.append(event), function(*args, **kwargs))[1]

        def compiled(module: Any, *_: Any, **__: Any) -> Any:
            return compile_graph(module, "eager", "default", strict=True)

        begin, prepare = rewriter.start.get_toolchain_ready, rewriter.deferred.prepare
        monkeypatch.setattr("rewriter.deferred.MOST_PRODUCTS", 1000)
        monkeypatch.setattr(rewriter.start, "get_toolchain_ready", noting("toolchain", begin))
        monkeypatch.setattr(rewriter.deferred, "prepare", noting("rewritten", prepare))
        monkeypatch.setattr(rewriter.start, "compile_graph", noting("compiled", compiled))
        monkeypatch.setattr(rewriter.start.queue, "submit", lambda job: None)
        loss = optimize_nested(penalty, **options)
        loss(*example()).backward()
        assert seen == events

    def test_is_not_begun_to_explain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rewriter.start, "get_toolchain_ready", pytest.fail)
        optimize_nested(penalty).explain(*example())
