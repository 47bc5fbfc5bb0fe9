"""Changes of ``requires_grad`` on the inputs of a captured graph.

A network that is frozen and thawed within a step, an input that is a leaf for one derivative only:
each change is one node. To what is computed while the flag is off, the tensor is a constant. Who
takes part at all is decided at the end: as written, ``backward()`` gives a leaf no gradient whose
flag is off by then, whatever led to it before.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import placeholders


def set_requires_grad(x: Tensor, requires_grad: bool) -> Tensor:
    """Do what ``x.requires_grad_(requires_grad)`` does; one node of the captured graph."""
    return x.requires_grad_(requires_grad)


def begin_with_all_on(captured: GraphModule) -> None:
    """Let every input whose flag is changed require grad from the beginning if it did when it came
    in: then its first change in the graph is to on, and a copy of it may come in without."""
    graph = captured.graph
    seen: set[Node] = set()
    lowered: list[Node] = []
    for node in graph.find_nodes(op="call_function", target=set_requires_grad):
        source, flag = node.args
        if source.op == "placeholder" and source not in seen and not flag:
            lowered.append(source)
        seen.add(source)
    if not lowered:
        return
    with graph.inserting_after(placeholders(graph)[-1]):
        for source in lowered:
            graph.call_function(set_requires_grad, (source, True))
    captured.recompile()


def flags_at_the_end(captured: GraphModule) -> dict[int, bool]:
    """Return the flags that a captured graph changes: position of the input → what it is
    afterwards."""
    position = {node: index for index, node in enumerate(placeholders(captured.graph))}
    changes: Sequence[Node] = captured.graph.find_nodes(
        op="call_function", target=set_requires_grad
    )
    return {
        position[source]: bool(flag)
        for source, flag in (node.args for node in changes)
        if source in position
    }


def left_on(captured: GraphModule) -> tuple[int, ...]:
    """Return the positions of the inputs whose flag a captured graph changes, and leaves on."""
    return tuple(i for i, flag in sorted(flags_at_the_end(captured).items()) if flag)


def left_off(captured: GraphModule) -> tuple[int, ...]:
    """Return the positions of the inputs whose flag a captured graph changes, and leaves off."""
    return tuple(i for i, flag in sorted(flags_at_the_end(captured).items()) if not flag)
