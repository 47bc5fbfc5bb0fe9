"""From an observed call to a program: records of its inputs and results, and its graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from passes.graph import placeholders, value_of
from rewriter.ahead.closed import Closed, close
from rewriter.ahead.dynamic import Declared, sizes_of
from rewriter.ahead.manifest import Entry, GraphFile, Input, Kind, Program, Root, Stored
from rewriter.ahead.observe import Observed, graphs_of
from rewriter.ahead.portable import dtype_name, tensor_bytes
from rewriter.ahead.signature import Call
from rewriter.ahead.sizes import size_of
from rewriter.ahead.structure import describe, leaves_in
from rewriter.errors import CaptureError
from rewriter.flags import left_off
from rewriter.naming import named_tensors


@dataclass
class Built:
    """A program, its graphs by their members' names, and the values it holds.

    Attributes:
        program: The record.
        graphs: Member → closed graph.
        values: Member → a constant's bytes.
    """

    program: Program
    graphs: dict[str, Closed] = field(default_factory=dict)
    values: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class _State:
    root: str
    keys: tuple[str, ...]
    is_kept: bool


def roots_of(roots: Mapping[str, nn.Module]) -> tuple[Root, ...]:
    """Return the records of modules."""
    return tuple(Root(name, _entries(module)) for name, module in roots.items())


def _entries(module: nn.Module) -> dict[str, Entry]:
    return {
        key: Entry(dtype_name(x.dtype), tuple(x.shape))
        if isinstance(x, Tensor)
        else Entry(None, None)
        for key, x in module.state_dict().items()
    }


def build(
    observed: Observed,
    function: Any,
    call: Call,
    declared: Sequence[Declared],
) -> Built:
    """Make a program of an observed call.

    Args:
        observed: What the call is.
        function: The loss as written.
        call: The call, taken apart.
        declared: Sizes that may change.

    Raises:
        CaptureError: The loss reads, writes or returns something that an artifact cannot hold.
    """
    if left_off(observed.rewritten.captured):
        raise CaptureError("the loss leaves requires_grad switched off on an input")
    roles = observed.rewritten.roles
    promoted = observed.rewritten.flat.promoted
    tensors = [(i, x) for i, x in enumerate(observed.inputs) if isinstance(x, Tensor)]
    place = {full: place for place, (full, _) in enumerate(tensors)}
    position = {id(x): place[full] for full, x in tensors}
    closed = {name: close(graph) for name, graph in graphs_of(observed.rewritten).items()}
    # Last, when nothing can ask anything of the sizes any more.
    names, sizes, conditions = sizes_of(observed.rewritten, declared, position)
    built = Built(program=None)  # pyright: ignore[reportArgumentType]
    finder = _Finder(function, call, built)
    fakes = [value_of(node) for node in placeholders(observed.rewritten.derivative.graph)]
    inputs = []
    for full, x in tensors:
        kind = _kind(finder.name_of(x), x, fakes[full].shape, names)
        has_gradient, is_updated = full in roles.wanted, full in roles.updated
        inputs.append(finder.input(x, kind, has_gradient, is_updated, full in promoted))
    files: dict[str, GraphFile | None] = {"step": None, "pullback": None}
    for name, graph in closed.items():
        files[name] = _file(name, graph, built, names)
    value = files["value"]
    assert value is not None
    reached = observed.rewritten.as_written.reached
    built.program = Program(
        inputs=tuple(inputs),
        sizes=tuple(sizes),
        conditions=tuple(conditions),
        n_outputs=roles.n_outputs,
        updated=tuple(place[i] for i in roles.updated),
        unreached=tuple(sorted(place[i] for i in roles.unreached)),
        reached={str(k): tuple(sorted(place[i] for i in v)) for k, v in reached.items() if v},
        hollow=tuple(observed.rewritten.as_written.hollow),
        result=_result(observed, call, position, bool(declared)),
        step=files["step"],
        pullback=files["pullback"],
        value=value,
    )
    return built


class _Finder:
    """Where each tensor that a loss reads comes from."""

    def __init__(self, function: Any, call: Call, built: Built) -> None:
        self.built = built
        self.leaves = {id(x): (i, n) for i, (n, x) in enumerate(call.tensors.items())}
        self.state: dict[int, _State] = {}
        for name, root in call.roots.items():
            self._add(name, root)
        found = named_tensors(function, call.args, call.kwargs)
        self.others = {id(x): name for name, x in found.items()}

    def _add(self, name: str, root: nn.Module) -> None:
        kept = root.state_dict(keep_vars=True)
        named = [
            *root.named_parameters(remove_duplicate=False),
            *root.named_buffers(remove_duplicate=False),
        ]
        for key, x in named:
            before = self.state.get(id(x))
            if before is not None and before.root != name:
                continue
            keys = (*(before.keys if before else ()), key)
            is_kept = kept.get(key) is x
            if not is_kept and isinstance(x, nn.Parameter):
                raise CaptureError(
                    f"{name}.state_dict() does not hold the parameter {key} under its name; a hook "
                    "changes it, so an artifact cannot find it there"
                )
            self.state[id(x)] = _State(name, keys, is_kept and (before is None or before.is_kept))

    def name_of(self, x: Tensor) -> str:
        if id(x) in self.leaves:
            return self.leaves[id(x)][1]
        if id(x) in self.state:
            found = self.state[id(x)]
            return f"{found.root}.{found.keys[0]}"
        return self.others.get(id(x), "a tensor that is no argument")

    def input(
        self, x: Tensor, kind: Kind, has_gradient: bool, is_updated: bool, is_promoted: bool
    ) -> Input:
        name = self.name_of(x)
        leaf, _ = self.leaves.get(id(x), (-1, ""))
        state = self.state.get(id(x))
        stored = None
        if leaf >= 0:
            role = "argument"
        elif state is not None:
            role = "state"
            if not state.is_kept:
                stored = store(x, "constant", self.built)
        else:
            role, stored = "constant", store(x, "constant", self.built)
            if has_gradient or is_updated:
                what = "is given a gradient" if has_gradient else "is written to"
                raise CaptureError(
                    f"{name}, of shape {tuple(x.shape)}, {what} and is neither an argument nor in "
                    "a module: pass it as an argument of the loss"
                )
        return Input(
            name=name,
            role=role,
            root=state.root if state and leaf < 0 else "",
            keys=state.keys if state and leaf < 0 else (),
            leaf=leaf,
            stored=stored,
            kind=kind,
            has_gradient=has_gradient,
            is_promoted=is_promoted,
        )


def store(x: Tensor, prefix: str, built: Built) -> Stored:
    """Keep a tensor's value with a program."""
    member = f"{prefix}.{len(built.values)}"
    built.values[member] = tensor_bytes(x)
    return Stored(member, dtype_name(x.dtype), tuple(x.shape), str(x.device))


def _kind(name: str, x: Tensor, shape: Sequence[Any], names: Mapping[sympy.Symbol, str]) -> Kind:
    if type(x) not in (Tensor, nn.Parameter, nn.Buffer) or x.layout is not torch.strided:
        raise CaptureError(f"{name} is a {type(x).__name__}, {x.layout}, not a plain tensor")
    order = memory_order(x)
    if not is_in_order(x, order):
        raise CaptureError(
            f"{name}: shape {tuple(x.shape)} with strides {x.stride()} has gaps or overlaps in "
            "memory; compile for name.contiguous()"
        )
    sizes = [
        s.node.shape_env.replace(s.node.expr) if isinstance(s, torch.SymInt) else s for s in shape
    ]
    kind = tuple(size_of(size, names) for size in sizes)
    return Kind(dtype_name(x.dtype), kind, order, str(x.device))


def memory_order(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions in the order of memory, slowest first."""
    dims = range(x.dim())
    if x.is_contiguous():
        return tuple(dims)
    return tuple(sorted(dims, key=lambda d: (-x.stride(d), d)))


def is_in_order(x: Tensor, order: Sequence[int]) -> bool:
    """Whether a tensor fills its memory without gaps in this order of dimensions."""
    expected = 1
    for dim in reversed(order):
        if x.shape[dim] == 1:
            continue
        if x.stride(dim) != expected:
            return x.numel() == 0
        expected *= x.shape[dim]
    return True


def _file(
    member: str, closed: Closed, built: Built, names: Mapping[sympy.Symbol, str]
) -> GraphFile:
    built.graphs[member] = closed
    constants = tuple(store(x, f"{member}.constant", built) for x in closed.constants)
    found = [
        r if r is True or r is None or isinstance(r, list) else size_of(r, names)
        for r in closed.results
    ]
    return GraphFile(
        member, constants, tuple(size_of(size, names) for size in closed.sizes), tuple(found)
    )


def _result(
    observed: Observed, call: Call, position: Mapping[int, int], is_dynamic: bool
) -> dict[str, Any]:
    output = {id(x): i for i, x in enumerate(observed.outputs) if isinstance(x, Tensor)}
    leaves = {id(x): i for i, x in enumerate(call.tensors.values())}

    def leaf(path: str, value: Any) -> dict[str, Any] | None:
        for kind, found in (("output", output), ("leaf", leaves), ("input", position)):
            if isinstance(value, Tensor) and id(value) in found:
                return {kind: found[id(value)]}
        if isinstance(value, Tensor) or (is_dynamic and type(value) is int):
            what = (
                "a number that may depend on a dynamic size" if type(value) is int else "a tensor"
            )
            raise CaptureError(f"{path}: {what} that the captured graph does not compute")
        return None

    tree = describe("the result", observed.result, leaf, objects=False)
    for kind, name in leaves_in(tree):
        if kind == "opaque":
            raise CaptureError(
                f"the loss returns a {name}; an artifact returns tensors, numbers, text, tuples, "
                "lists and dicts of these"
            )
    return tree
