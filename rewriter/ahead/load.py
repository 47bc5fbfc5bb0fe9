"""Load an artifact: a loss and its gradients, without the Python they were written in."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from rewriter.ahead.archive import MANIFEST, digest, extract, parsed, read_bytes, unpack
from rewriter.ahead.decode import decode
from rewriter.ahead.loaded import Loaded
from rewriter.ahead.manifest import Manifest, Program, Stored
from rewriter.ahead.portable import device_named, dtype_named, read_graph, tensor_from
from rewriter.ahead.run import Runner
from rewriter.ahead.shapes import Shapes
from rewriter.ahead.validate import check_manifest, check_members, check_versions
from rewriter.codegen import compile_graph, load_package
from rewriter.errors import ArtifactError, OptimizeNestedError
from rewriter.options import BACKENDS


def load(
    path: str | os.PathLike[str], sha256: str | None = None, *, backend: str = "inductor"
) -> Loaded:
    """Load what `OptimizedLoss.compile_ahead` wrote. Neither the loss's nor the model's Python is
    needed.

    A native artifact is code: it can do anything that this process can. Give ``sha256``, from where
    the artifact was compiled, unless you trust the file for another reason. A portable one is data.

    Args:
        path: The file.
        sha256: The digest that `compile_ahead` returned.
        backend: How a portable artifact runs: ``"inductor"`` compiles its graphs at the first call,
            ``"eager"`` runs them op by op.

    Raises:
        ArtifactError: The file is damaged or is not the one of this digest, or was compiled for
            another version or machine.

    >>> load("no such file")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    rewriter.errors.ArtifactError: no such file cannot be read: No such file or directory
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    what = os.fspath(path)
    members = unpack(read_bytes(path), what)
    try:
        return _loaded(members, sha256, backend)
    except ArtifactError as error:
        raise ArtifactError(f"{what}: {error}") from error


def read_manifest(path: str | os.PathLike[str]) -> tuple[Manifest, str]:
    """Read what an artifact says of itself, and its digest; nothing of it is loaded or run.

    Raises:
        ArtifactError: The file is damaged, or of another format.
    """
    members = unpack(read_bytes(path), os.fspath(path))
    return _manifest_of(members), digest(members[MANIFEST])


def unpack_to(
    path: str | os.PathLike[str], folder: str | os.PathLike[str], sha256: str | None = None
) -> Manifest:
    """Write the files of an artifact below a folder, for use from C++; return its manifest.

    Raises:
        ArtifactError: As `load`.
    """
    what = os.fspath(path)
    members = unpack(read_bytes(path), what)
    try:
        manifest = _checked(members, sha256)
    except ArtifactError as error:
        raise ArtifactError(f"{what}: {error}") from error
    extract(members, folder)
    return manifest


def _manifest_of(members: dict[str, bytes]) -> Manifest:
    record = parsed(members[MANIFEST], MANIFEST)
    check_versions(record)
    return decode(Manifest, record, "manifest")


def _checked(members: dict[str, bytes], sha256: str | None) -> Manifest:
    found = digest(members[MANIFEST])
    if sha256 is not None and found != sha256.lower():
        raise ArtifactError(f"its manifest's SHA-256 is {found}, and not {sha256}")
    manifest = _manifest_of(members)
    check_members(manifest, {n: data for n, data in members.items() if n != MANIFEST})
    check_manifest(manifest)
    return manifest


def _loaded(members: dict[str, bytes], sha256: str | None, backend: str) -> Loaded:
    manifest = _checked(members, sha256)
    graphs = _portable if manifest.form == "portable" else _native
    runners = []
    for program in manifest.programs:
        constants = {one.member: _constant(one, members) for one in _stored(program)}
        code = graphs(program, members, backend)
        runners.append(Runner(manifest.loss, program, code, constants))
    return Loaded(manifest, digest(members[MANIFEST]), runners)


def _stored(program: Program) -> list[Stored]:
    files = [f for f in (program.step, program.pullback, program.value) if f is not None]
    found = [one for file in files for one in file.constants]
    return found + [x.stored for x in program.inputs if x.stored is not None]


def _constant(one: Stored, files: Mapping[str, bytes]) -> Tensor:
    x = tensor_from(files[one.member], one.shape, dtype_named(one.dtype))
    return x.to(device_named(one.device))


def _portable(program: Program, files: Mapping[str, bytes], backend: str) -> Any:
    """Read and check a program's graphs; each is compiled when it is first called."""
    shapes = Shapes(program)
    modules: dict[str, GraphModule] = {}
    for name, file in (("step", program.step), ("value", program.value)):
        if file is not None:
            modules[name] = read_graph(files[file.member], file.member)
            shapes.propagate(modules[name], shapes.inputs(file), file.member)
            _check_count(modules[name], file.results, file.member)
    if program.pullback is not None:
        file = program.pullback
        modules["pullback"] = read_graph(files[file.member], file.member)
        given = [*shapes.residuals(modules["step"]), *shapes.rest(file)]
        shapes.propagate(modules["pullback"], given, file.member)
        _check_count(modules["pullback"], file.results, file.member)
    compiled: dict[str, Callable[..., Any]] = {}

    def graph(name: str) -> Callable[..., Any]:
        if name not in compiled:
            made = compile_graph(modules[name], backend, "default", strict=False)
            if not shapes.are_open():  # as they were when the graphs were checked
                raise OptimizeNestedError(
                    "Inductor compiles this artifact for one size only of those declared dynamic, "
                    "as it does where a convolution has the batch as channels: load it with "
                    "backend='eager'"
                )
            compiled[name] = made
        return compiled[name]

    return graph


def _check_count(module: GraphModule, results: Sequence[Any], what: str) -> None:
    computed = len(module.graph.output_node().args[0])  # pyright: ignore[reportArgumentType]
    if computed != sum(result is True for result in results):
        raise ArtifactError(f"{what}: the graph has {computed} results, the manifest others")


def _native(program: Program, files: Mapping[str, bytes], backend: str) -> Any:
    """Load a program's packages, each when it is first called, from a folder of our own."""
    members = {"step": program.step, "pullback": program.pullback, "value": program.value}
    loaded: dict[str, Callable[..., Any]] = {}

    def graph(name: str) -> Callable[..., Any]:
        file = members[name]
        if name not in loaded and file is not None:
            with tempfile.TemporaryDirectory(prefix="optimize_nested_") as folder:
                path = Path(folder, "graph.pt2")
                path.write_bytes(files[file.member])
                loaded[name] = load_package(str(path))
        return loaded[name]

    return graph
