"""Check that a manifest's records fit together, so that no later step has to ask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from rewriter.ahead.archive import digest, is_plain_path
from rewriter.ahead.machine import check_machine
from rewriter.ahead.manifest import FORMAT, GraphFile, Manifest, Program, Stored
from rewriter.ahead.portable import device_named, dtype_named
from rewriter.ahead.sizes import evaluated
from rewriter.ahead.structure import MAX_DEPTH, leaves_in
from rewriter.errors import ArtifactError
from rewriter.version import __version__

_ROLES = ("state", "argument", "constant")


def check_versions(record: Any) -> None:
    """Check format and versions, before anything else of a manifest is believed.

    Raises:
        ArtifactError: Another format, or native code for other versions; names both.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise ArtifactError(f"format {found!r}; this version reads format {FORMAT}")
    if record.get("form") == "portable":
        return
    for name, mine in (("torch", torch.__version__), ("project", __version__)):
        if record.get(name) != mine:
            raise ArtifactError(
                f"native code for {name} {record.get(name)!r}, and this is {mine!r}: compile it "
                "here, or with portable=True"
            )


def check_members(manifest: Manifest, members: dict[str, bytes]) -> None:
    """Check the archive's other files against the manifest.

    Raises:
        ArtifactError: One is missing, altered, or not listed; names it.
    """
    for name in sorted({*members, *manifest.members}):
        listed = manifest.members.get(name)
        if listed is None:
            raise ArtifactError(f"{name} is not in the manifest")
        if name not in members:
            raise ArtifactError(f"{name} is missing")
        if len(members[name]) != listed.size or digest(members[name]) != listed.sha256:
            raise ArtifactError(f"{name} is not what the manifest says")


def check_manifest(manifest: Manifest) -> None:
    """Check that records refer to what exists, and that this machine runs them.

    Raises:
        ArtifactError: They do not, or it does not; says what.
    """
    _require(manifest.form in ("native", "portable"), f"unknown form {manifest.form!r}")
    check_machine(manifest.machine)
    _require(bool(manifest.slots), "no program")
    for slot in manifest.slots:
        _require(0 <= slot.program < len(manifest.programs), "a slot without program")
    roots = {root.name for root in manifest.roots}
    for argument in manifest.arguments:
        _check_tree(argument.value)
        for kind, leaf in leaves_in(argument.value):
            _require(kind in ("tensor", "module", "value", "opaque"), f"a {kind} as argument")
            _require(kind != "tensor" or _is_index(leaf, manifest.leaves), "an unknown tensor")
            _require(kind != "module" or leaf in list(roots), "an unknown module")
    for program in manifest.programs:
        _check_program(program, manifest, roots)


def _check_program(program: Program, manifest: Manifest, roots: set[str]) -> None:
    sizes = {size.name: size.hint for size in program.sizes}
    n = len(program.inputs)
    for x in program.inputs:
        _require(x.role in _ROLES, f"{x.name} has the role {x.role!r}")
        _require(x.role != "argument" or _is_index(x.leaf, manifest.leaves), f"{x.name}: no leaf")
        _require(x.role != "state" or (x.root in roots and bool(x.keys)), f"{x.name}: no module")
        _require(x.role != "constant" or x.stored is not None, f"{x.name}: no value")
        dtype_named(x.kind.dtype)
        device_named(x.kind.device)
        _require(sorted(x.kind.order) == list(range(len(x.kind.shape))), f"{x.name}: no order")
        for size in x.kind.shape:
            number = evaluated(size, sizes)
            _require(type(number) is int and number >= 0, f"{x.name}: {size!r} is no size")
        if x.stored is not None:
            _check_stored(x.stored, manifest)
    for size in program.sizes:
        known = 0 <= size.input < n and 0 <= size.dim < len(program.inputs[size.input].kind.shape)
        _require(known and size.hint >= 2 and size.least >= 2, f"{size.name}: no size")
    for condition in program.conditions:
        evaluated(condition, sizes)
    _check_results(program, n, manifest, sizes)


def _check_results(
    program: Program, n_inputs: int, manifest: Manifest, sizes: dict[str, int]
) -> None:
    n_early = program.n_outputs + len(program.updated)
    positions = [
        *program.updated,
        *program.unreached,
        *(i for r in program.reached.values() for i in r),
    ]
    _require(all(0 <= i < n_inputs for i in positions), "a position beyond the inputs")
    ends = [int(name) for name in program.reached if name.isascii() and name.isdigit()]
    _require(len(ends) == len(program.reached), "a gradient of no output")
    outputs = [*ends, *program.hollow]
    _require(
        program.n_outputs >= 0 and all(0 <= i < program.n_outputs for i in outputs), "no output"
    )
    _check_tree(program.result)
    for kind, leaf in leaves_in(program.result):
        limit = {"output": program.n_outputs, "input": n_inputs, "leaf": len(manifest.leaves)}
        known = kind == "value" or (kind in limit and type(leaf) is int and 0 <= leaf < limit[kind])
        _require(known, f"a result that is {kind} {leaf!r}")
    _require((program.step is not None) == bool(ends), "no graph for the gradients")
    n_late = len(program.wanted)
    if program.step is not None:
        _check_file(program.step, n_inputs, manifest, sizes)
        enough = len(program.step.results) - n_early
        _require(
            enough == n_late if program.pullback is None else enough >= 0, "step: too few results"
        )
    if program.pullback is not None:
        assert program.step is not None or not ends
        _require(program.step is not None, "a pullback without a step")
        kept = [] if program.step is None else program.step.results[n_early:]
        tensors = [r for r in kept if r is True or isinstance(r, list)]
        _check_file(program.pullback, len(tensors) + len(program.differentiable), manifest, sizes)
        _require(len(program.pullback.results) == n_late, "pullback: not one result per gradient")
    _check_file(program.value, n_inputs, manifest, sizes)
    _require(len(program.value.results) == n_early, "value: not one result per output")


def _check_file(file: GraphFile, n_given: int, manifest: Manifest, sizes: dict[str, int]) -> None:
    _require(file.member in manifest.members, f"{file.member} is not in the archive")
    for stored in file.constants:
        _check_stored(stored, manifest)
    for size in file.sizes:
        evaluated(size, sizes)
    for result in file.results:
        if isinstance(result, list) and result[:1] == ["input"]:
            limit = n_given + len(file.constants)
            known = len(result) == 2 and type(result[1]) is int and 0 <= result[1] < limit
            _require(known, f"{file.member}: a result that is no input")
        elif result is not None and result is not True:
            evaluated(result, sizes)


def _check_stored(stored: Stored, manifest: Manifest) -> None:
    _require(is_plain_path(stored.member), f"{stored.member!r} is no path")
    dtype, member = dtype_named(stored.dtype), manifest.members.get(stored.member)
    device_named(stored.device)
    n_bytes = dtype.itemsize
    for size in stored.shape:
        _require(size >= 0, f"{stored.member} has a negative size")
        n_bytes *= size
    _require(member is not None and member.size == n_bytes, f"{stored.member} has another size")


def _check_tree(tree: Any, depth: int = 0) -> None:
    """Check that a structure is one: an object of one of the known forms, not too deep."""
    _require(isinstance(tree, dict) and depth <= MAX_DEPTH, "a structure that is none")
    for part in _items(tree):
        _check_tree(part, depth + 1)


def _items(tree: dict[str, Any]) -> Iterable[Any]:
    keys = set(tree)
    if keys == {"dict"}:
        pairs = tree["dict"]
        _require(isinstance(pairs, list), "a dict without items")
        for pair in pairs:
            is_pair = isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)
            _require(is_pair, "a dict whose items are no pairs")
        return [pair[1] for pair in pairs]
    if keys == {"object", "attributes"}:
        _require(isinstance(tree["attributes"], dict), "an object without attributes")
        return tree["attributes"].values()
    if keys == {"namedtuple", "fields", "items"}:
        fields, items = tree["fields"], tree["items"]
        names = [tree["namedtuple"], *fields] if isinstance(fields, list) else [None]
        plain = all(isinstance(name, str) and name.isidentifier() for name in names)
        fits = plain and isinstance(items, list) and len(items) == len(fields)
        _require(fits and len(set(fields)) == len(fields), "a namedtuple that is none")
        _require(not any(name.startswith("_") for name in fields), "a namedtuple that is none")
        return items
    if keys in ({"list"}, {"tuple"}):
        items = next(iter(tree.values()))
        _require(isinstance(items, list), "a list without items")
        return items
    _require(len(keys) == 1, f"a structure with keys {sorted(keys)}")
    return ()


def _is_index(index: Any, items: tuple[Any, ...]) -> bool:
    return type(index) is int and 0 <= index < len(items)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ArtifactError(f"the manifest does not fit together: {otherwise}")
