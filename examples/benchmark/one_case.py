"""Let the forms of one case take turns, in this process: what `__main__` starts for each case.

Says on standard output, a line of JSON each, which form is next, and at the end the row.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import click
import torch
from torch.utils.flop_counter import FlopCounterMode

from examples.benchmark.forms import FORMS, contenders_of, find_case, optimized
from examples.benchmark.results import Row, Timing
from examples.workloads import WORKLOADS, Case
from rewriter.bench import Contender, measure


@click.command()
@click.argument("workload")
@click.argument("case_name")
@click.option("--full", is_flag=True)
@click.option("--device", default="cpu")
@click.option("--rounds", default=20)
@click.option("--form", "columns", multiple=True, type=click.Choice(list(FORMS)), required=True)
@click.option("--cache", type=click.Path(path_type=Path), required=True)
def main(
    workload: str,
    case_name: str,
    full: bool,
    device: str,
    rounds: int,
    columns: tuple[str, ...],
    cache: Path,
) -> None:
    """Measure one case."""
    case, args = find_case(workload, case_name, full=full, device=device)
    racing = contenders_of(case, args, columns)
    for name, contender in racing.items():
        _say(name)
        with patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(cache / name)):
            contender.first_step(*args)
        if name == "E" and contender.refusal:
            raise click.ClickException(f"the loss as written fails: {contender.refusal}")
    measure(list(racing.values()), *args, rounds=rounds, warm_up=2, on_step=_say)
    row = Row(
        number=next(w.number for w in WORKLOADS if w.name == workload),
        workload=workload,
        case=case_name,
        rounds=rounds,
        flops=flops_of(case, args) if "O" in racing else {},
        figure=case.flops_over_f,
        forms={name: timing(c, racing["E"], racing.get("O")) for name, c in racing.items()},
    )
    print(json.dumps({"row": asdict(row)}), flush=True)


def _say(name: str) -> None:
    print(json.dumps({"step": name}), flush=True)


def timing(contender: Contender, eager: Contender, ours: Contender | None) -> Timing:
    """Return what was measured of a form."""
    if contender.refusal:
        return Timing(refusal=contender.refusal)
    return Timing(
        minimum=contender.minimum,
        median=contender.median,
        over_eager=contender.speedup(eager),
        over_ours=0.0 if ours is None or ours.refusal else ours.speedup(contender),
        peak_bytes=None if contender.name == "J" else contender.peak_bytes,
        differs=contender.distance(eager),
    )


def flops_of(case: Case, args: tuple[object, ...]) -> dict[str, float]:
    """Return the FLOPs of a step as written and ours, in forward passes."""
    if case.forward is None:
        return {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.forward()
    report, unit = optimized(case).explain(*args), counter.get_total_flops()
    return {"E": report.flops_as_written / unit, "O": report.flops / unit}


if __name__ == "__main__":
    main()
