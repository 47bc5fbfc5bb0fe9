"""Compile a loss into a file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passes.graph import placeholders, print_graph, value_of
from rewriter.ahead.archive import MANIFEST, canonical, digest, pack, unpack
from rewriter.ahead.cache import cached
from rewriter.ahead.decode import encode
from rewriter.ahead.dynamic import declared_sizes, kernels_not_chosen, mark
from rewriter.ahead.machine import machine_for
from rewriter.ahead.manifest import (
    FORMAT,
    Argument,
    GraphFile,
    Manifest,
    Member,
    Slot,
    Stored,
)
from rewriter.ahead.observe import in_mode, observe
from rewriter.ahead.portable import write_graph
from rewriter.ahead.program import Built, build, roots_of
from rewriter.ahead.signature import Call, take_apart
from rewriter.ahead.structure import leaves_in
from rewriter.codegen import package_graph
from rewriter.errors import CaptureError, NestedGradientWarning
from rewriter.files import write_whole
from rewriter.options import Options
from rewriter.version import __version__

MODES = ("train", "eval")


@dataclass(frozen=True)
class _Compiled:
    """Programs and which mode each is for."""

    slots: tuple[Slot, ...]
    built: tuple[Built, ...]


def compile_ahead(
    function: Callable[..., Any],
    options: Options,
    path: str | os.PathLike[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    dynamic: Any = None,
    portable: bool = False,
    modes: Sequence[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> str:
    """Compile a call of a loss, write it to a file, and return the SHA-256 of its manifest.

    See `rewriter.OptimizedLoss.compile_ahead`.
    """
    wanted = _modes(modes)
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"path: the folder {target.parent} does not exist")
    call = take_apart(function, args, kwargs)
    declared = declared_sizes(dynamic, call.tensors)
    if declared and options.capture == "trace":
        raise ValueError(
            "dynamic: a recording (capture='trace') holds for its sizes only; leave dynamic "
            "out, or capture the loss with capture='dynamo'"
        )
    mark(declared)
    ending = ".json" if portable else ".pt2"
    compiled = _programs(function, options, call, declared, wanted, ending)
    manifest = _manifest(function, call, compiled, portable)

    def make() -> bytes:
        return _packed(manifest, compiled.built, options, portable)

    if cache is None:
        data = make()
    else:
        contents = [_content(built) for built in compiled.built]
        data = cached(Path(cache), [encode(manifest), contents, options.mode], make)
    write_whole(target, data)
    return digest(unpack(data, "the artifact")[MANIFEST])


def _modes(modes: Sequence[str] | None) -> tuple[str, ...] | None:
    if modes is None:
        return None
    if isinstance(modes, str) or not modes or any(mode not in MODES for mode in modes):
        raise ValueError(f'modes: expected a list of "train" and "eval", got {modes!r}')
    return tuple(dict.fromkeys(modes))


def _programs(
    function: Callable[..., Any],
    options: Options,
    call: Call,
    declared: Any,
    wish: tuple[str, ...] | None,
    ending: str,
) -> _Compiled:
    """Capture the loss in each mode asked for. Modes whose programs are equal share one.

    Without a wish, the mode the modules are in; if the other one gives the same program, it holds
    for both.
    """
    modules = list(call.roots.values())
    slots: list[Slot] = []
    built: list[Built] = []
    texts: list[Any] = []
    now = _name({m.training for root in modules for m in root.modules()})
    others = [mode for mode in MODES if mode != now] if modules else []
    tried: list[str | None] = [*wish] if wish else [None, *others]
    for mode in tried:
        with in_mode(modules, mode), kernels_not_chosen():
            flags = {
                name: {path: m.training for path, m in root.named_modules()}
                for name, root in call.roots.items()
            }
            try:
                observed = observe(function, options, call.args, call.kwargs, declared)
                found = build(observed, function, call, declared)
            except CaptureError as error:
                if mode is None or wish:
                    raise _as_refusal(error) from error
                break  # the loss is for this mode only
        text = _content(found)
        if text in texts:
            number = texts.index(text)
        elif not wish and built:
            break
        else:
            for said in observed.rewritten.detached:
                warnings.warn(said, NestedGradientWarning, stacklevel=4)
            number = len(built)
            texts.append(text)
            built.append(_in_folder(found, f"program{number}", ending))
        slots.append(Slot(mode or now, flags, number))
    every = len(built) == 1 and len(slots) == len(tried) and (not wish or len(slots) == 2)
    if every:
        slots = [replace(slots[0], modes=None)]
    return _Compiled(tuple(slots), tuple(built))


def _name(flags: set[bool]) -> str:
    return {frozenset({True}): "train", frozenset({False}): "eval"}.get(
        frozenset(flags), "as compiled"
    )


def _as_refusal(error: CaptureError) -> CaptureError:
    reason = (error.reason.splitlines() or [""])[0]
    return CaptureError(f"the loss cannot be compiled ahead of time: {reason}", error.where)


def _content(built: Built) -> Any:
    """Return what makes two programs the same."""
    graphs = {name: _text(closed.module) for name, closed in built.graphs.items()}
    values = {name: digest(data) for name, data in built.values.items()}
    return [encode(built.program), graphs, values]


def _text(module: torch.fx.GraphModule) -> str:
    strides = [str(value_of(node).stride()) for node in placeholders(module.graph)]
    return f"{print_graph(module)}\n{' '.join(strides)}"


def _in_folder(built: Built, folder: str, ending: str) -> Built:
    """Return a program whose files are in a folder of its own."""

    def moved(member: str) -> str:
        return f"{folder}/{member}"

    def stored(one: Stored) -> Stored:
        return replace(one, member=moved(one.member))

    def file(one: GraphFile | None) -> Any:
        constants = () if one is None else tuple(map(stored, one.constants))
        return one and replace(one, member=moved(one.member) + ending, constants=constants)

    program = built.program
    inputs = [replace(x, stored=x.stored and stored(x.stored)) for x in program.inputs]
    program = replace(
        program,
        inputs=tuple(inputs),
        step=file(program.step),
        pullback=file(program.pullback),
        value=file(program.value),
    )
    graphs = {moved(name) + ending: closed for name, closed in built.graphs.items()}
    values = {moved(name): data for name, data in built.values.items()}
    return Built(program, graphs, values)


def _manifest(
    function: Callable[..., Any], call: Call, compiled: _Compiled, portable: bool
) -> Manifest:
    """Return the manifest, members still missing."""
    devices = {
        str(value_of(node).device)
        for built in compiled.built
        for closed in built.graphs.values()
        for node in closed.module.graph.nodes
        if isinstance(value_of(node), Tensor)
    }
    used = {x.root for built in compiled.built for x in built.program.inputs}
    given = {name for argument in call.arguments for name in _modules_of(argument)}
    roots = {name: root for name, root in call.roots.items() if name in used | given}
    return Manifest(
        format=FORMAT,
        form="portable" if portable else "native",
        project=__version__,
        torch=torch.__version__,
        machine=machine_for(devices, is_native=not portable),
        loss=getattr(function, "__name__", type(function).__name__),
        arguments=call.arguments,
        leaves=tuple(call.tensors),
        roots=roots_of(roots),
        slots=compiled.slots,
        programs=tuple(built.program for built in compiled.built),
        members={},
    )


def _modules_of(argument: Argument) -> list[str]:
    return [name for kind, name in leaves_in(argument.value) if kind == "module"]


def _packed(
    manifest: Manifest, programs: Sequence[Built], options: Options, portable: bool
) -> bytes:
    """Compile the graphs and return the archive."""
    members: dict[str, bytes] = {}
    for built in programs:
        members |= built.values
        for name, closed in built.graphs.items():
            code = (
                write_graph(closed.module)
                if portable
                else package_graph(closed.module, options.mode)
            )
            members[name] = code
    listed = {name: Member(digest(data), len(data)) for name, data in members.items()}
    text = canonical(encode(replace(manifest, members=listed)))
    return pack({MANIFEST: text, **members})
