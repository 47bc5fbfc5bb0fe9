"""Take the first step of one form of one case, in this process: what `__main__` starts twice.

Imports are done before the clock starts, those that a first step itself asks for are not.
"""

import json

import click

from examples.benchmark.forms import FIRST_STEPS, FORMS, contenders_of, find_case


@click.command()
@click.argument("workload")
@click.argument("case_name")
@click.argument("form", type=click.Choice([*FORMS, *FIRST_STEPS]))
@click.option("--full", is_flag=True)
@click.option("--device", default="cpu")
def main(workload: str, case_name: str, form: str, full: bool, device: str) -> None:
    """Print the seconds of a first step, or why there is none."""
    case, args = find_case(workload, case_name, full=full, device=device)
    contender = contenders_of(case, args, [form])[form]
    contender.first_step(*args)
    seconds = None if contender.refusal else contender.first_seconds
    print(json.dumps({"seconds": seconds, "refusal": contender.refusal}), flush=True)


if __name__ == "__main__":
    main()
