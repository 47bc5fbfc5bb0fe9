"""Where a node comes from: which pass of differentiation, whose line and module, which site, which
stage.

What PyTorch's traces copy from node to node carries it: ``stack_trace`` and ``nn_module_stack``,
which Dynamo fills in, and our own marks among the annotations (``custom``).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace

from torch.fx import GraphModule, Node

from passes.graph import graphs_in, where
from passes.markers import GRADIENT, TANGENT

ROLES = ("primal", "tangent", "cotangent", "gradient")
"""Which pass computes a node.

| role | computed by |
|---|---|
| ``primal`` | the loss's own code; in a form left as written, PyTorch's forward mode beside it |
| ``cotangent`` | the reverse pass of a nested derivative |
| ``tangent`` | a forward-mode pass, over the loss's code or over such a reverse pass |
| ``gradient`` | the reverse pass of the whole step, which makes the gradients |
"""

KEY = "optimize_nested"
_ROLE_OF = {GRADIENT: "cotangent", TANGENT: "tangent"}


@dataclass(frozen=True)
class Mark:
    """What we note of a node, beside what Dynamo does; an empty word is not known.

    Attributes:
        role: One of `ROLES`.
        site: The nested derivative whose value or pullback the node belongs to.
        stage: The stage in which the computation came into being.
        source: What the computation is called in every stage. Operators that one is taken apart
            into share its name.
    """

    role: str = ""
    site: str = ""
    stage: str = ""
    source: str = ""


@dataclass(frozen=True)
class Origin(Mark):
    """Where a node comes from; an empty word is not known.

    Attributes:
        module: The innermost module whose ``forward`` made it, as ``net.0``.
        where: ``file:line: code`` of the user's innermost frame.
    """

    module: str = ""
    where: str = ""


def mark_of(node: Node) -> Mark:
    """Return what we have noted of a node."""
    return (node.meta.get("custom") or {}).get(KEY) or Mark()


def origin_of(node: Node) -> Origin:
    """Return where a node comes from, as far as known."""
    stack = node.meta.get("nn_module_stack") or {}
    module = readable(next(reversed(stack.values()))[0]) if stack else ""
    found = where(node)
    return Origin(**asdict(mark_of(node)), module=module, where="" if found == "?" else found)


def note(node: Node, **known: str) -> None:
    """Note more of a node: fields of `Mark`."""
    mark = replace(mark_of(node), **known)
    node.meta["custom"] = {**(node.meta.get("custom") or {}), KEY: mark}


def note_new(module: GraphModule, stage: str, prefix: str = "") -> None:
    """Note what is not known of the nodes of a graph, and of the graphs that it calls: they are
    new.

    Args:
        module: The graph.
        stage: The stage that has made it.
        prefix: What makes its nodes' names differ from those of other graphs.
    """
    graphs = [part.graph for part in graphs_in(module)]
    for node in [node for graph in graphs for node in graph.nodes]:
        mark = mark_of(node)
        if node.op != "output" and not (mark.role and mark.stage and mark.source):
            note(
                node,
                role=mark.role or _ROLE_OF.get(node.target, "primal"),
                stage=mark.stage or stage,
                source=mark.source or f"{prefix}{node.name}",
            )


def note_site(module: GraphModule, site: str, like: Node) -> None:
    """Note the site of every node of its body that is not a deeper site's, and its line where
    nothing says otherwise.

    Args:
        module: The body, or another graph made of it.
        site: The site's name.
        like: A node with the site's line.
    """
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if not mark_of(node).site:
            note(node, site=site)
        if not node.meta.get("stack_trace"):
            node.meta["stack_trace"] = like.meta.get("stack_trace", "")


_LOCAL = re.compile(r"^[LG]\['(\w+)'\]")
_ITEM = re.compile(r"(?<!\))\.?(?:_modules|_parameters|_buffers)?\[['\"]?([^'\"\]]+)['\"]?\]")


def readable(source: str) -> str:
    """Return Dynamo's expression for a value as a path: ``L['net']._modules['0'] → net.0``.

    >>> readable("L['self'].net._modules['0']._parameters['weight']")
    'self.net.0.weight'
    """
    return _ITEM.sub(r".\1", _LOCAL.sub(r"\1", source))
