"""What was measured, on every machine that has run the benchmark, as one JSON file."""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rewriter.files import write_whole


@dataclass(frozen=True)
class Timing:
    """One form of one case.

    Attributes:
        minimum: Seconds, the shortest step.
        median: Seconds, the median step.
        over_eager: Steps in the time of one as written, median over the rounds.
        over_ours: Its seconds over ours, median over the rounds.
        peak_bytes: The most memory a step has allocated at once; None where it is not known.
        differs: Relative distance of value and gradients from those as written.
        refusal: Why it did not run; then the numbers are zero.
    """

    minimum: float = 0.0
    median: float = 0.0
    over_eager: float = 0.0
    over_ours: float = 0.0
    peak_bytes: int | None = None
    differs: float = 0.0
    refusal: str = ""


@dataclass(frozen=True)
class Row:
    """The steps of one case.

    Attributes:
        number: The workload's.
        workload: Its name.
        case: The case's name.
        rounds: Timed steps of each form.
        flops: FLOPs in forward passes: "E" as written, "O" ours; empty without such a unit.
        figure: The FLOPs to reach, in forward passes.
        forms: By column.
    """

    number: int
    workload: str
    case: str
    rounds: int
    flops: dict[str, float]
    figure: float | None
    forms: dict[str, Timing]

    @property
    def ours(self) -> Timing:
        """Our form; it may have refused."""
        return self.forms["O"]

    def best_of(self, names: Iterable[str]) -> tuple[str, Timing]:
        """Return the fastest form of these that ran."""
        ran = [(n, self.forms[n]) for n in names if n in self.forms and not self.forms[n].refusal]
        return min(ran, key=lambda named: named[1].over_ours)


@dataclass(frozen=True)
class FirstStep:
    """The first step of a form in a process of its own.

    Attributes:
        cold: Seconds with nothing compiled before.
        warm: Seconds in a second process.
        refusal: Why there was none.
    """

    cold: float = 0.0
    warm: float = 0.0
    refusal: str = ""


@dataclass
class Section:
    """What one machine has measured.

    Attributes:
        versions: Of what takes part; rows made with others are dropped.
        threads: Of PyTorch.
        rows: By "workload, case".
        first_steps: By "workload, case" and column.
    """

    versions: dict[str, str]
    threads: int
    rows: dict[str, Row] = field(default_factory=dict)
    first_steps: dict[str, dict[str, FirstStep]] = field(default_factory=dict)


class Results:
    """The sections by the machine's name, kept in a file that is written whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.sections = {name: _section(data) for name, data in stored.items()}

    def section(self, name: str) -> Section:
        """Return a machine's section; an empty one if its versions are not those of today."""
        found, today = self.sections.get(name), Section(_versions(), torch.get_num_threads())
        if found is None or (found.versions, found.threads) != (today.versions, today.threads):
            found = self.sections[name] = today
        return found

    def save(self) -> None:
        """Write the file."""
        data = {name: asdict(section) for name, section in self.sections.items()}
        write_whole(self.path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def machine(device: str, *, full: bool) -> str:
    """Return the name of what runs the workloads, and at which sizes."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return f"{name}, sizes for a GPU" if full else name


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    try:
        return found | {"JAX": version("jax")}
    except PackageNotFoundError:
        return found


def _section(data: dict[str, Any]) -> Section:
    rows = {
        name: Row(**{**row, "forms": {n: Timing(**form) for n, form in row["forms"].items()}})
        for name, row in data["rows"].items()
    }
    first_steps = {
        name: {form: FirstStep(**step) for form, step in steps.items()}
        for name, steps in data["first_steps"].items()
    }
    return Section(data["versions"], data["threads"], rows, first_steps)
