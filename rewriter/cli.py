"""The command line: ``optimize-nested``, or ``python -m rewriter``.

Exit codes: 0 all is well; 1 the loss, the machine or an artifact is not as it should be; 2 the
command was not understood. An error in the user's own code is shown as Python shows it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from click.shell_completion import get_completion_class
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from rewriter.ahead.load import load
from rewriter.api import optimize_nested
from rewriter.bench import (
    Contender,
    comparison,
    compiled_as_written,
    measure,
    nothing_compiled_before,
    refusals,
)
from rewriter.doctor import BAD, GOOD, WARNING, examine
from rewriter.errors import OptimizeNestedError
from rewriter.files import write_whole
from rewriter.naming import named_tensors
from rewriter.options import BACKENDS, CAPTURES, MODES, STARTS
from rewriter.report import Report
from rewriter.target import Target, TargetError, find, find_target, make_arguments
from rewriter.version import __version__

PROGRAM = "optimize-nested"
SHELLS = ("bash", "zsh", "fish")
COLOURS = {GOOD: "green", WARNING: "yellow", BAD: "red"}

# What is asked for goes to standard output, what happens meanwhile to standard error.
out, aside = Console(soft_wrap=True), Console(stderr=True)


class _Commands(click.Group):
    """Turn what is wrong with a name into a usage error, and our own errors into exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TargetError as error:
            raise click.UsageError(str(error), ctx) from error
        except (OptimizeNestedError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM)
def app() -> None:
    """See, check, time and package what optimize_nested makes of a loss.

    A LOSS is module:function or file.py:function. Its arguments come from a function that returns
    them as a tuple, as a dict of keyword arguments, or as (tuple, dict): --args NAME, or make_args
    beside the loss.
    """


def on_loss(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a loss, with the options of `optimize_nested`; it gets a `Target`."""

    @functools.wraps(command)
    def with_target(
        loss: str,
        args_name: str | None,
        seed: int,
        strategy: Sequence[str],
        strict: bool,
        **arguments: Any,
    ) -> None:
        names = ("backend", "mode", "start", "dynamic", "capture")
        wishes = {name: arguments.pop(name) for name in names}
        wishes |= {"strategy": _strategies(strategy), "strict": strict or None}
        torch.manual_seed(seed)
        given = {name: value for name, value in wishes.items() if value is not None}
        command(find_target(loss, args_name, given), **arguments)

    options = [
        click.argument("loss"),
        click.option("--args", "args_name", metavar="NAME", help="What returns the arguments."),
        click.option("--seed", default=0, show_default=True, help="Of PyTorch's generators."),
        click.option("--backend", type=click.Choice(BACKENDS), help="What runs the graph."),
        click.option("--mode", type=click.Choice(MODES), help="A mode of Inductor."),
        click.option("--start", type=click.Choice(STARTS), help="What runs the first steps."),
        click.option("--dynamic/--no-dynamic", default=None, help="Symbolic sizes, or none."),
        click.option(
            "--strategy",
            multiple=True,
            metavar="[SITE=]NAME",
            help="A strategy for all sites, or for one (several times).",
        ),
        click.option("--capture", type=click.Choice(CAPTURES), help="How the loss is captured."),
        click.option("--strict", is_flag=True, help="Nothing may stay as written."),
    ]
    return functools.reduce(lambda made, option: option(made), reversed(options), with_target)


def _strategies(given: Sequence[str]) -> str | dict[str, str] | None:
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    pairs = [text.partition("=") for text in given]
    if not all(equals for _, equals, _ in pairs):
        raise click.BadParameter(
            "expected one NAME for all sites, or SITE=NAME for each", param_hint="--strategy"
        )
    return {site: name for site, _, name in pairs} or None


@contextmanager
def _doing(what: str) -> Iterator[None]:
    with aside.status(what):
        yield


@contextmanager
def _as_usage(what: str) -> Iterator[None]:
    """Show what is wrong with an argument as the program's own error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise click.ClickException(f"{what}: {error}") from error


def _report(target: Target) -> Report:
    with _doing("capturing and rewriting"):
        return target.loss.explain(*target.args, **target.kwargs)


def _fail_unless_captured(report: Report) -> None:
    if not report.captured:
        raise click.ClickException(f"the loss was not captured: {report.reason}")


@app.command()
@on_loss
@click.option("--stage", help="Print the graph after this stage in place of the report.")
@click.option("--diff", nargs=2, metavar="STAGE STAGE", help="Print what changed between two.")
def explain(target: Target, stage: str | None, diff: tuple[str, str] | None) -> None:
    """Print what is done to a loss: derivatives, forms and prices. Nothing is compiled."""
    report = _report(target)
    for name in (stage, *(diff or ())):
        if name is not None and name not in [s.name for s in report.stages]:
            _fail_unless_captured(report)
            known = ", ".join(s.name for s in report.stages)
            raise click.UsageError(f"there is no stage {name!r}; the stages are {known}")
    if diff is not None:
        out.print(report.diff(*diff))
    elif stage is not None:
        click.echo(report.stage(stage).text)
    else:
        out.print(report)
    _fail_unless_captured(report)


@app.command()
@on_loss
@click.option(
    "--out",
    "paths",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    default=[Path("report.html")],
    show_default=True,
    help="Where to: .html, .svg, .json or .txt (several times).",
)
def render(target: Target, paths: Sequence[Path]) -> None:
    """Draw the report on a loss as a page, a picture, data or text."""
    writers: dict[str, Callable[[Report, Path], object]] = {
        ".html": Report.to_html,
        ".svg": Report.to_svg,
        ".json": Report.to_json,
        ".txt": lambda report, path: write_whole(path, f"{report}\n"),
    }
    for path in paths:
        if path.suffix not in writers:
            raise click.BadParameter(
                f"{path}: expected a name that ends with one of {', '.join(writers)}",
                param_hint="--out",
            )
    report = _report(target)
    for path in paths:
        with _doing(f"drawing {path}"):
            writers[path.suffix](report, path)
        aside.print(f"wrote {path}", highlight=False)
    _fail_unless_captured(report)


@app.command()
@on_loss
def check(target: Target) -> None:
    """Compare value, gradients and state of a loss with the loss as written in float64."""
    _fail_unless_captured(_report(target))
    loss = optimize_nested(target.loss.as_written, **{**vars(target.loss.options), "check": True})
    with _doing("compiling and comparing"):
        value, grads = loss.value_and_grad(*target.args, **target.kwargs)
    size = {name: float(grad.norm()) for name, grad in grads.items()}
    _print_values("agrees with the loss as written", value, size)


def _print_values(title: str, value: Any, size: Mapping[str, float]) -> None:
    table = Table("", "value, or norm of the gradient", title=title, box=SIMPLE_HEAD)
    shown = f"{value.item():.10g}" if isinstance(value, Tensor) and value.numel() == 1 else "…"
    table.add_row("loss", shown)
    for name, norm in size.items():
        table.add_row(name, f"{norm:.6g}")
    out.print(table)


@app.command()
@on_loss
@click.option("--rounds", default=20, show_default=True, help="Timed steps of each form.")
@click.option("--warm-up", default=3, show_default=True, help="Untimed steps before them.")
@click.option("--warm-cache", is_flag=True, help="First steps may find compiled code on disk.")
@click.option(
    "--also",
    multiple=True,
    metavar="NAME",
    help="Another form of the loss, such as one in torch.func, run under torch.compile (several "
    "times).",
)
def bench(target: Target, rounds: int, warm_up: int, warm_cache: bool, also: Sequence[str]) -> None:
    """Time a loss as written, under torch.compile, and optimized; the forms take turns."""
    loss, backend, mode = target.loss, target.loss.options.backend, target.loss.options.mode
    report = _report(target)
    others = {name: getattr(other, "as_written", other) for name, other in _found(also)}
    forms: dict[str, Callable[..., Any]] = {"as written": loss.as_written}
    for name, other in {"torch.compile": loss.as_written, **others}.items():
        forms[name] = compiled_as_written(other, backend, mode)
    forms["optimize_nested"] = loss
    tensors = named_tensors(loss.as_written, target.args, target.kwargs)
    wanted = [x for x in tensors.values() if x.requires_grad]
    contenders = [Contender(name, form, wanted) for name, form in forms.items()]
    contenders[0].flops, contenders[-1].flops = report.flops_as_written, report.flops
    contenders[0].step(*target.args, **target.kwargs)  # what is wrong with the loss itself is said
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=aside) as progress:
        task = progress.add_task("", total=len(forms) * (rounds + warm_up + 2))

        def stepping(name: str) -> None:
            progress.update(task, advance=1, description=name)

        with contextlib.nullcontext() if warm_cache else nothing_compiled_before(backend):
            for contender in contenders:
                stepping(contender.name)
                contender.first_step(*target.args, **target.kwargs)
        measure(
            contenders,
            *target.args,
            rounds=rounds,
            warm_up=warm_up,
            on_step=stepping,
            **target.kwargs,
        )
    out.print(comparison(loss.name, contenders))
    for line in refusals(contenders):
        out.print(line, markup=False, highlight=False)
    _fail_unless_captured(report)


def _found(names: Sequence[str]) -> list[tuple[str, Any]]:
    return [(name, find(name)) for name in names]


@app.command("compile")
@on_loss
@click.option("--out", "path", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="ARG:DIM=NAME[:LEAST:MOST]",
    help="A size that may change from call to call, x:0=batch:2:1024 (several times).",
)
@click.option("--both-modes", is_flag=True, help="For modules in train mode and in eval mode.")
@click.option("--portable", is_flag=True, help="Graphs as data in place of native code.")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder of what was compiled before.",
)
def compile_(
    target: Target,
    path: Path,
    sizes: Sequence[str],
    both_modes: bool,
    portable: bool,
    cache: Path | None,
) -> None:
    """Compile loss and gradients ahead of time into a file, and print its SHA-256."""
    dynamic = _sizes(sizes)
    with _doing(f"compiling {path}"), _as_usage("compile"):
        digest = target.loss.compile_ahead(
            path,
            *target.args,
            dynamic=dynamic or None,
            modes=["train", "eval"] if both_modes else None,
            portable=portable,
            cache=cache,
            **target.kwargs,
        )
    click.echo(digest)


def _sizes(given: Sequence[str]) -> dict[str, dict[int, Any]]:
    found: dict[str, dict[int, Any]] = {}
    for text in given:
        match = _SIZE.fullmatch(text)
        if match is None:
            raise click.BadParameter(
                f"{text}: expected ARG:DIM=NAME or ARG:DIM=NAME:LEAST:MOST", param_hint="--size"
            )
        name, least, most = match["name"], match["least"], match["most"]
        size = name if least is None else (name, int(least), int(most))
        found.setdefault(match["argument"], {})[int(match["dim"])] = size
    return found


_SIZE = re.compile(
    r"(?P<argument>.+):(?P<dim>\d+)=(?P<name>[^:=]+)(?::(?P<least>\d+):(?P<most>\d+))?"
)


@app.command()
@click.argument("artifact", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--args", "args_name", metavar="NAME", required=True, help="Returns the arguments.")
@click.option("--seed", default=0, show_default=True, help="Of PyTorch's generators.")
@click.option("--sha256", help="What compile printed; another file is refused.")
@click.option("--backend", type=click.Choice(BACKENDS), default=BACKENDS[0], show_default=True)
def run(artifact: Path, args_name: str, seed: int, sha256: str | None, backend: str) -> None:
    """Load a compiled loss; print its value and the sizes of its gradients.

    The arguments are those of the loss; a state_dict may stand in a module's place, so that the
    model's Python is not needed.
    """
    torch.manual_seed(seed)
    args, kwargs = make_arguments(args_name)
    with _doing(f"loading {artifact}"):
        loaded = load(artifact, sha256, backend=backend)
    states, rest = _states(args), [value for value in args if not _is_state(value)]
    names = [root.name for root in loaded.manifest.roots]
    for name in names:
        if name in kwargs:
            states += _states([kwargs.pop(name)])
    state = states[0] if len(names) == 1 == len(states) else dict(zip(names, states, strict=False))
    with _doing("running"), _as_usage(args_name):
        value, grads = loaded.value_and_grad(state, *rest, **kwargs)
    _print_values(str(artifact), value, {name: float(g.norm()) for name, g in grads.items()})


def _is_state(value: Any) -> bool:
    is_dict = isinstance(value, Mapping) and all(isinstance(x, Tensor) for x in value.values())
    return isinstance(value, nn.Module) or is_dict


def _states(values: Sequence[Any]) -> list[Any]:
    found = [value for value in values if _is_state(value)]
    return [v.state_dict() if isinstance(v, nn.Module) else v for v in found]


@app.command()
@click.argument("loss", required=False)
@click.option("--args", "args_name", metavar="NAME", help="What returns the arguments.")
@click.option("--seed", default=0, show_default=True, help="Of PyTorch's generators.")
@click.option("--capture", type=click.Choice(CAPTURES), help="How the loss is captured.")
@click.option("--json", "as_json", is_flag=True, help="Print data.")
def doctor(
    loss: str | None, args_name: str | None, seed: int, capture: str | None, as_json: bool
) -> None:
    """Look for what would break on this machine, and say how to mend it; of a LOSS, for what keeps
    it from one graph, and say what to change.

    The loss is captured again and again, each time past one obstacle more, and run as written for
    the numbers that host code reads.
    """
    if loss is None:
        _examine_machine(as_json)
        return
    torch.manual_seed(seed)
    target = find_target(loss, args_name, {} if capture is None else {"capture": capture})
    with _doing("capturing, past one obstacle after the other"):
        found = target.loss.obstacles(*target.args, **target.kwargs)
    click.echo(json.dumps(found.to_dict(), ensure_ascii=False, indent=1) if as_json else found)
    if found.obstacles:
        raise click.exceptions.Exit(1)


def _examine_machine(as_json: bool) -> None:
    with _doing("looking"):
        findings = list(examine())
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    for finding in [] if as_json else findings:
        colour = COLOURS[finding.status]
        out.print(
            f"[{colour}]{finding.status:>7}[/]  {finding.what}: {finding.found}",
            highlight=False,
        )
        if finding.mend:
            out.print(f"         {finding.mend}", markup=False, highlight=False)
    if any(finding.status == BAD for finding in findings):
        raise click.exceptions.Exit(1)


@app.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script that completes this program's words: eval "$(optimize-nested completion
    bash)" """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(app, {}, PROGRAM, "_OPTIMIZE_NESTED_COMPLETE").source())


def main() -> None:
    """Run the program."""
    app(prog_name=PROGRAM)
