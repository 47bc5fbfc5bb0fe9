"""Start the processes that measure, and survive them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from examples.benchmark.results import FirstStep, Row, Timing

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1200.0  # seconds in which a process must say something, such as that a form has compiled
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR")


class Died(Exception):
    """A process did not end well; says how."""


def run_case(
    workload: str,
    case: str,
    *,
    columns: Iterable[str],
    sizes: list[str],
    rounds: int,
    cache: Path,
    on_step: Callable[[str], object],
) -> Row:
    """Measure the steps of a case; a form that takes the process down is left out of the next try.

    JAX takes turns with the loss as written in a process of its own: its threads and its memory
    slow PyTorch down.

    Args:
        workload: Its name.
        case: The case's name.
        columns: The forms.
        sizes: Options that say which sizes, and where.
        rounds: Timed steps of each form.
        cache: A folder with one for each form's compiled code.
        on_step: Is told the form's column before each step.

    Raises:
        Died: The loss as written, or all of optimize_nested, takes the process down.
    """
    words = [workload, case, *sizes, "--rounds", str(rounds), "--cache", str(cache)]
    row = _row(words, [name for name in columns if name != "J"], on_step)
    if "J" not in columns:
        return row
    in_jax = _row(words, ["E", "J"], on_step).forms["J"]
    if not (in_jax.refusal or row.ours.refusal):
        in_jax = replace(in_jax, over_ours=in_jax.median / row.ours.median)
    return replace(row, forms=row.forms | {"J": in_jax})


def _row(words: list[str], columns: list[str], on_step: Callable[[str], object]) -> Row:
    dead: dict[str, str] = {}
    while True:
        step = ""
        chosen = [word for name in columns if name not in dead for word in ("--form", name)]
        try:
            for said in _lines("one_case", [*words, *chosen]):
                if "row" in said:
                    forms = {name: Timing(**form) for name, form in said["row"]["forms"].items()}
                    forms |= {name: Timing(refusal=reason) for name, reason in dead.items()}
                    return Row(**{**said["row"], "forms": forms})
                step = said["step"]
                on_step(step)
            raise Died("the process ended without a result")
        except Died as death:
            if step in ("", "E", "O"):
                raise
            dead[step] = str(death)


def first_steps(
    workload: str,
    case: str,
    *,
    columns: Iterable[str],
    sizes: list[str],
    cache: Path,
    on_step: Callable[[str], object],
) -> dict[str, FirstStep]:
    """Measure the first step of each form, cold and in a second process.

    Args:
        workload: Its name.
        case: The case's name.
        columns: The forms.
        sizes: Options that say which sizes, and where.
        cache: A folder with one for each form's compiled code; starts empty.
        on_step: Is told the form's column before each step.
    """
    found = {}
    for form in columns:
        environment = dict.fromkeys(CACHES, str(cache / form))
        seconds = []
        try:
            for _ in ("cold", "warm"):
                on_step(form)
                words = [workload, case, form, *sizes]
                (said,) = _lines("first_step", words, environment)
                if said["refusal"]:
                    raise Died(said["refusal"])
                seconds.append(said["seconds"])
            found[form] = FirstStep(*seconds)
        except Died as death:
            found[form] = FirstStep(refusal=str(death))
    return found


def _lines(
    program: str, words: list[str], environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield what a program beside this one says, line by line.

    JAX has as many threads there as PyTorch, and takes memory of a GPU as it needs it.

    Raises:
        Died: It ends in an error, or by a signal.
    """
    command = [sys.executable, "-m", f"examples.benchmark.{program}", *words]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "NPROC": str(torch.get_num_threads()),
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                **(environment or {}),
            },
        ) as process,
    ):
        for line in _within(LIMIT, process):
            if line.startswith("{"):
                yield json.loads(line)
        code = process.wait()
        errors.seek(0)
        if code == -signal.SIGKILL:
            raise Died(f"the process took more than {LIMIT:.0f} s, or all memory")
        if code < 0:
            raise Died(f"the process died of {signal.Signals(-code).name}")
        if code > 0:
            raise Died((errors.read().strip().splitlines() or ["no reason given"])[-1])


def _within(seconds: float, process: subprocess.Popen[str]) -> Iterator[str]:
    """Yield the lines of a process; kill it when none comes in time."""
    assert process.stdout is not None
    while True:
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            return
        yield line
