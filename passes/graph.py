"""What passes ask of a graph: the one place that reads ``node.meta``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten

_ROOT = os.path.dirname(os.path.dirname(__file__))
# Frames that are not the user's: PyTorch's, and our Python that stands in for it.
_NOT_THE_USERS = (os.path.dirname(torch.__file__), os.path.join(_ROOT, "rewriter"))
_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
}


def value_of(node: Any) -> Any:
    """Return the example value of a node (a fake tensor, a symbolic size, a tuple), or the argument
    itself if it is no node."""
    return node.meta.get("val") if isinstance(node, Node) else node


UNKNOWN_SIZE = 64
"""What a size counts as that depends on values, where a number is wanted to judge by."""


def hint(size: Any) -> Any:
    """Return the number a symbolic size had when it was captured; to ask the size itself for a
    number would fix it."""
    if not isinstance(size, torch.SymInt):
        return size
    return int(size.node.hint) if size.node.has_hint() else UNKNOWN_SIZE


def has_hints(node: Node) -> bool:
    """Whether a tensor's sizes were numbers when it was captured; that of what a mask picks was
    none."""
    sizes = getattr(value_of(node), "shape", ())
    return all(isinstance(size, int) or size.node.has_hint() for size in sizes)


def is_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are proven equal (a comparison of symbols must not become a guard)."""
    left, right = (getattr(getattr(s, "node", None), "expr", s) for s in (a, b))
    return bool(left == right)


def is_one(size: Any) -> bool:
    """Whether a size is the number 1."""
    return isinstance(size, int) and size == 1


def are_equal(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes, or the strides of two tensors, are proven equal."""
    return len(one) == len(other) and all(map(is_equal, one, other))


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are proven to have the same type, device, shape and strides."""
    kinds = (one.dtype, one.device) == (other.dtype, other.device)
    return kinds and are_equal(one.shape, other.shape) and are_equal(one.stride(), other.stride())


def elements(value: Tensor) -> int:
    """Return how many elements a tensor has at the sizes it was captured at."""
    return math.prod(map(hint, value.shape))


def arguments(node: Node) -> Any:
    """Return the arguments of a node whose target says what they are."""
    return node.args


def is_float(node: Any) -> bool:
    """Whether the node is a tensor that can carry a derivative."""
    value = value_of(node)
    return isinstance(value, Tensor) and (value.dtype.is_floating_point or value.dtype.is_complex)


def describe(value: Any) -> str:
    """Print a value as ``f32[64, 3]``."""
    if isinstance(value, Tensor):
        kind = _SHORT.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{kind}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(describe(item) for item in value)})"
    return str(value)


def print_graph(module: GraphModule) -> str:
    """Print a graph, one node a line, with shapes: the format of tests, docs and bug reports."""
    lines = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{node.name}: {describe(value_of(node))}")
        elif node.op == "output":
            lines.append(f"return {node.args[0]}")
        elif node.op != "get_attr":
            name = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
            arguments = ", ".join(
                [*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())]
            )
            lines.append(f"{node.name}: {describe(value_of(node))} = {name}({arguments})")
    return "\n".join(lines)


def where(node: Node) -> str:
    """Return ``file:line: code`` of the innermost frame, outside of torch, that made this node."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    found = "?"
    for line, code in zip(lines, [*lines[1:], ""], strict=False):
        if not line.startswith("File "):
            continue
        path, _, rest = line.removeprefix('File "').partition('", line ')
        if found == "?" or is_users(path):
            found = f"{path}:{rest.split(',')[0]}: {code}"
    return found


def is_users(path: str) -> bool:
    """Whether a file is the user's: not PyTorch's, nor our Python that stands in for it."""
    return not path.startswith(_NOT_THE_USERS)


def placeholders(graph: Graph) -> list[Node]:
    """Return the graph's inputs in order."""
    return list(graph.find_nodes(op="placeholder"))


def results(graph: Graph) -> list[Any]:
    """Return the graph's results in order; each a node, a constant or None."""
    return list(graph.output_node().args[0])  # pyright: ignore[reportArgumentType]


def shares_memory(graph: Graph) -> bool:
    """Whether a result of the graph may share memory with an input or with another result."""
    found = [node for node in results(graph) if isinstance(node, Node)]
    return len(set(found)) < len(found) or any(
        node.op != "call_function"
        or not isinstance(node.target, torch._ops.OpOverload)
        or any(value.alias_info is not None for value in node.target._schema.returns)
        for node in found
    )


def reaches(sources: Iterable[Node], *, through: Callable[[Node], bool] | None = None) -> set[Node]:
    """Return every node that depends on one of ``sources``, these included.

    Args:
        sources: Where to start.
        through: Which nodes pass the dependency on; all of them if None. A node it rejects is not
            in the answer.
    """
    found: set[Node] = set()
    stack = list(sources)
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        stack.extend(user for user in node.users if through is None or through(user))
    return found


def needs(targets: Iterable[Node], *, since: Node | None = None) -> set[Node]:
    """Return every node that one of ``targets`` depends on, these included.

    Args:
        targets: Where to start.
        since: The first node of the graph's order that is of interest, if not all are.
    """
    found: set[Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node not in found and not (since is not None and node < since):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def between(sources: Sequence[Node], targets: Sequence[Node]) -> set[Node]:
    """Return every node on a path from one of ``sources`` to one of ``targets``, these included.

    The nodes are in an order that can run: what lies before the first source or behind the last
    target is not looked at.
    """
    if not sources or not targets:
        return set()
    first, last = min(sources), max(targets)
    return reaches(sources, through=lambda n: not last < n) & needs(targets, since=first)


def is_random(node: Node) -> bool:
    """Whether running the node, or a graph that it calls, draws from a random generator."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or node.meta.get("draws", False)


def is_impure(node: Node) -> bool:
    """Whether the node must stay even without users, and must never be merged with another."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return is_random(node) or (schema is not None and schema.is_mutable)


def drop_dead(graph: Graph) -> int:
    """Remove nodes without users; random draws stay, because the generator must end where eager
    leaves it. Return how many."""
    before = len(graph.nodes)
    graph.eliminate_dead_code(is_impure_node=is_impure)
    return before - len(graph.nodes)


def graphs_in(module: torch.nn.Module) -> list[GraphModule]:
    """Return a graph and those that it calls, each once."""
    return [part for part in module.modules() if isinstance(part, GraphModule)]


def copy_graph(module: GraphModule) -> GraphModule:
    """Copy a graph; its attributes are shared."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return GraphModule(module, graph)


def finish(module: GraphModule) -> GraphModule:
    """Check and recompile a graph after it was changed."""
    module.graph.lint()
    module.recompile()
    return module


def attribute_of(module: torch.nn.Module, target: str) -> Any:
    """Return what a ``get_attr`` node names."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value
