"""Time the best forms of a step on the caller's arguments and keep the fastest:
``mode="max-autotune"``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from passes.graph import copy_graph
from passes.verify import verify
from rewriter.forms import Form
from rewriter.generators import generators_restored
from rewriter.rewrite import Rewritten

# A difference below this is noise: the form with fewer FLOPs is kept.
NOISE = 0.03
_SECONDS = 1.0
_ROUNDS = 3, 50


def race(contenders: Sequence[Callable[[], object]], inputs: Sequence[Any]) -> list[float]:
    """Return the median seconds of each contender; they take turns (A B C, A B C, …), so that a
    machine that slows down or speeds up does so for all of them alike.

    Whatever compiles does so in a first round that is not timed. The random generators are left as
    they are.

    Args:
        contenders: What to run; they must change nothing.
        inputs: What they run on: a device that works on its own is waited for.
    """
    on_device = any(isinstance(x, Tensor) and x.device.type != "cpu" for x in inputs)

    def timed(run: Callable[[], object]) -> float:
        if on_device:
            torch.accelerator.synchronize()
        start = time.perf_counter()
        run()
        if on_device:
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    with generators_restored(), torch.no_grad():
        for run in contenders:
            timed(run)
        once = sum(timed(run) for run in contenders)
        fewest, most = _ROUNDS
        rounds = max(fewest, min(most, int(_SECONDS / once)))
        times = [[timed(run) for run in contenders] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def fastest(seconds: Sequence[float]) -> int:
    """Return the first that is as fast as the fastest, but for noise."""
    limit = (1 + NOISE) * min(seconds)
    return next(i for i, time in enumerate(seconds) if time <= limit)


def with_form(rewritten: Rewritten, form: Form) -> Rewritten:
    """Return a specialisation with another of its finalists taken."""
    choice = replace(
        rewritten.choice,
        taken=form.candidate,
        form=form.module,
        joint=form.joint,
        build_seconds=form.build_seconds,
        trace_seconds=form.trace_seconds,
    )
    built = {
        "choose": (form.module, len(choice.rewritten), form.build_seconds),
        "joint": (form.joint, form.joint.meta["simplified"], form.trace_seconds),
    }
    stages = []
    for stage in rewritten.stages:
        if stage.name in built:
            module, changes, seconds = built[stage.name]
            verify(module)
            stage = replace(stage, module=copy_graph(module), changes=changes, seconds=seconds)
        stages.append(stage)
    return replace(rewritten, choice=choice, stages=tuple(stages))


def with_seconds(rewritten: Rewritten, seconds: Sequence[float]) -> Rewritten:
    """Return a specialisation that knows how long a step of each of its finalists takes, and has no
    finalists left."""
    choice = rewritten.choice
    timed = {
        id(form.candidate): replace(form.candidate, seconds=taken)
        for form, taken in zip(choice.finalists, seconds, strict=True)
    }
    known = replace(
        choice,
        taken=timed[id(choice.taken)],
        candidates=tuple(timed.get(id(c), c) for c in choice.candidates),
        finalists=(),
    )
    return replace(rewritten, choice=known)
